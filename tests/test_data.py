"""Pictures and boxes: one map for both, the same bits on every path, and a one-line message for every defect."""
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data
from configurator import InputError
from data import Augment, DetectionDataset, collate, letterbox, load_image, rect_shape
from eval import load_sample
from prepare.shapes import make_shapes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(ROOT, '..', 'shared', 'data')
NONE = dict.fromkeys(Augment.__dataclass_fields__, 0)
FULL = dict(mosaic=0.8, mixup=0.3, scale_aug=0.5, translate=0.1, hsv_h=0.015, hsv_s=0.7, hsv_v=0.4, flip=0.5)


def strengths(**some):
    """An Augment of these strengths, all others 0."""
    return Augment(**{**NONE, **some})


def write_coco(folder, images, annotations, categories=((1, 'a'),), name='set.json'):
    """images: [(id, file, w, h)], annotations: [(image, category, bbox, more)] -> path of the json."""
    path = os.path.join(folder, name)
    annotations = [dict(id=k, image_id=i, category_id=c, bbox=b, **more)
                   for k, (i, c, b, more) in enumerate(annotations, 10)]
    with open(path, 'w') as f:
        json.dump(dict(images=[dict(id=i, file_name=n, width=w, height=h) for i, n, w, h in images],
                       annotations=annotations,
                       categories=[dict(id=i, name=n) for i, n in categories]), f)
    return path


def noise(w, h, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8))


def equal(a, b):
    return a['index'] == b['index'] and all(torch.equal(a[key], b[key]) for key in ('image', 'labels', 'boxes'))


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    out = str(tmp_path_factory.mktemp('shapes'))
    make_shapes(out, train=40, val=4)
    return out


# -------------------------------------------------------------------------------- one map for pixels and boxes

def painted(folder, only, kind, seed):
    """Nine pictures of odd sizes with three objects each, label = object; one of the objects white, all else black."""
    rng, images, annotations = np.random.default_rng(seed), [], []
    for i in range(9):
        w, h = (int(v) for v in rng.integers(150, 700, 2))
        pixels = np.zeros((h, w, 3), np.uint8)
        for j in range(3):
            x, y, bw, bh = (int(v) for v in rng.uniform(0, 0.5, 4) * (w, h, w, h) + (0, 0, 12, 12))
            if 3 * i + j == only:
                pixels[y:y + bh, x:x + bw] = 255
            annotations.append((i, 3 * i + j, [x, y, bw, bh], {}))
        images.append((i, f'{only}_{i}.{kind}', w, h))
        options = dict(quality=95) if kind == 'jpg' else {}
        Image.fromarray(pixels).save(os.path.join(folder, f'{only}_{i}.{kind}'), **options)
    return write_coco(folder, images, annotations, [(k, f'object {k}') for k in range(27)], f'{only}.json')


@pytest.mark.parametrize('augment,imgsz,kind', [
    (strengths(mosaic=1.0, scale_aug=0.5, translate=0.1, flip=0.5), (160, 160), 'png'),
    (strengths(mosaic=1.0, scale_aug=0.9, translate=0.2), (96, 224), 'png'),
    (strengths(mosaic=0.0, scale_aug=0.5, translate=0.1, flip=0.5), (192, 128), 'png'),
    (strengths(mosaic=1.0, scale_aug=0.1, flip=0.5), (128, 128), 'jpg'),        # decoded at 1/2 and 1/4
    (strengths(flip=0.3, flip_vertical=0.5, quarter_turns=0.7, scale_aug=0.3, mosaic=0.5), (128, 128), 'png'),
    (None, (160, 128), 'png')])
def test_boxes_are_where_the_pixels_are(tmp_path, augment, imgsz, kind):
    def distinct_partners(epoch, i, count, rng):
        return rng.permutation([j for j in range(9) if j != i])[:count].tolist()

    checked, worst = 0, 0.0
    for only in range(0, 27, 2):
        ds = DetectionDataset(painted(str(tmp_path), only, kind, 5), imgsz=imgsz, augment=augment)
        ds.mosaic_indices = distinct_partners
        assert kind == 'png' or ds.shrink.max() > 1
        for index in range(9):
            sample = ds[(3, index)]
            bright = sample['image'][0] > 127
            mine = sample['boxes'][sample['labels'] == only]
            assert len(mine) <= 1
            assert (sample['boxes'] >= 0).all() and (sample['boxes'] <= torch.tensor([imgsz[1], imgsz[0]] * 2)).all()
            if len(mine):
                rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
                extent = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                checked, worst = checked + 1, max(worst, float((extent - mine[0]).abs().max()))
            else:
                assert bright.sum() < 0.11 * 350 * 350 * 1.9           # dropped, so little of it can be visible
    assert checked > 10 and worst <= 1.0, (checked, worst)


def test_src_dst_interval_maps_ends_to_ends():
    assert data.src_dst_interval(100, 2.0, 10, 400) == (0, 100, 10, 210)
    assert data.src_dst_interval(100, 2.0, -50, 100) == (25, 75, 0, 100)
    assert data.src_dst_interval(100, 1.0, 400, 400) is None and data.src_dst_interval(100, 1.0, -100, 400) is None
    for start in np.linspace(-90, 90, 50):                             # never beyond the picture, never empty
        a, b, c, d = data.src_dst_interval(7, 13.7, start, 100)
        assert 0 <= a < b <= 7 and 0 <= c < d <= 100


def test_clip_boxes_keeps_what_is_worth_it():
    boxes = np.array([[10, 10, 20, 20], [-90, 10, 9, 20], [-91, 10, 9, 20], [50, 50, 52, 90], [0, 0, 300, 2.5],
                      [-5, -5, 30, 30]], np.float32)
    kept, labels = data.clip_boxes(boxes, np.arange(6), (0, 1, 0, 400), (0, 1, 0, 400))
    assert labels.tolist() == [0, 5] and kept[1].tolist() == [0, 0, 30, 30]         # 9 %; 2 px; 120 : 1
    box = np.array([[-89, 10, 10, 20.]], np.float32)
    assert data.clip_boxes(box, np.arange(1), (0, 1, 0, 400), (0, 1, 0, 400))[1].tolist() == [0]


def test_colour_and_mixup():
    image = data.to_tensor(noise(40, 30))
    same = data.color_jitter(image, None, None, np.random.default_rng(0), (0, 0, 0))[0]
    assert torch.equal(same, image)
    grey = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    for seed in range(20):
        out = data.color_jitter(grey, None, None, np.random.default_rng(seed), (0.5, 0.9, 0.9))[0]
        assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])          # grey stays grey
        assert (out[0, 0].diff().int() >= 0).all() if out[0, 0, -1] else True       # and nothing wraps round
    a = (torch.zeros(3, 4, 4, dtype=torch.uint8), np.zeros((1, 4), np.float32), np.array([1]))
    b = (torch.full((3, 4, 4), 200, dtype=torch.uint8), np.ones((2, 4), np.float32), np.array([2, 3]))
    image, boxes, labels = data.mixup(a, b, np.random.default_rng(0))
    assert 50 < image[0, 0, 0] < 150 and labels.tolist() == [1, 2, 3] and boxes.shape == (3, 4)


@pytest.mark.parametrize('orientation', range(10))
def test_images_are_turned_as_exif_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112], exif[0x011B] = orientation, 72.0
    noise(40, 30).save(tmp_path / 'a.jpg', exif=exif)
    with Image.open(tmp_path / 'a.jpg') as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    assert (np.asarray(load_image(tmp_path / 'a.jpg')) == wanted).all()
    # the same with a resolution of a wrong type: Pillow's own function fails on writing the EXIF anew
    raw = (tmp_path / 'a.jpg').read_bytes()
    assert raw.count(b'\x01\x1b\x00\x05') == 1
    (tmp_path / 'b.jpg').write_bytes(raw.replace(b'\x01\x1b\x00\x05', b'\x01\x1b\x00\x01'))
    assert (np.asarray(load_image(tmp_path / 'b.jpg')) == wanted).all()


def test_pictures_of_floats():
    ramp = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    for scale in (1, 255):
        got = np.asarray(data.to_rgb(Image.fromarray(ramp * scale)))
        assert got.shape == (3, 4, 3) and (got[..., 0] == (ramp * 255).astype(np.uint8)).all()
    ramp[0, 0] = np.nan
    assert data.to_rgb(Image.fromarray(ramp)).getpixel((0, 0)) == (0, 0, 0)


def test_letterbox_and_back():
    for (w, h), shape in (((640, 480), (320, 320)), ((333, 500), (256, 320)), ((17, 900), (64, 64)),
                          ((64, 64), (64, 64))):
        image, scale, (left, top) = letterbox(noise(w, h), shape)
        assert image.shape == (*shape, 3) and image.dtype == np.uint8
        assert abs(w * scale + 2 * left - shape[1]) <= 1.5 and abs(h * scale + 2 * top - shape[0]) <= 1.5
        assert min(left, top) == 0
    image, scale, corner = letterbox(np.full((50, 100, 3), 200, np.uint8), (100, 100))
    assert (scale, corner) == (1.0, (0, 25))
    assert (image[:25] == 114).all() and (image[25:75] == 200).all() and (image[75:] == 114).all()


def test_rect_shape():
    assert rect_shape([(640, 480)], 320) == (256, 352)                 # with the slack that YOLOv8's own evaluation has
    assert rect_shape([(640, 480)], 320, pad=0) == (256, 320)
    assert rect_shape([(1920, 1080), (1000, 500)], 1920, pad=0) == (1088, 1920)
    assert rect_shape([(640, 480), (300, 600)], 640, pad=0) == (640, 640)


def test_collate_pads():
    def sample(n):
        return dict(image=torch.zeros(3, 4, 4, dtype=torch.uint8), labels=torch.arange(n), boxes=torch.ones(n, 4),
                    index=n)
    batch = collate([sample(0), sample(3)])
    assert batch['labels'].tolist() == [[-1, -1, -1], [0, 1, 2]] and batch['boxes'].shape == (2, 3, 4)
    assert batch['images'].dtype == torch.uint8 and batch['index'].tolist() == [0, 3] and batch['boxes'][0].sum() == 0
    assert collate([sample(0)])['labels'].tolist() == [[-1]]           # M is never 0


# -------------------------------------------------------------------------------- pure samples

def test_samples_do_not_depend_on_workers_or_cache(shapes):
    def make(seed=7, **more):
        augment = strengths(**FULL, mosaic_block=8)
        return DetectionDataset(os.path.join(shapes, 'train.json'), imgsz=96, augment=augment, seed=seed, **more)
    keys = [(e, i) for e in (0, 1) for i in (3, 17, 30, 5, 39, 3)]
    wanted = [make()[key] for key in keys]                             # each from a fresh data set
    assert not equal(wanted[0], wanted[6]) and equal(wanted[0], wanted[5])          # another epoch, the same key again
    for ds in (make(cache_mb=0), make(cache_mb=1), make(cache_mb=1000)):
        assert all(equal(ds[key], sample) for key, sample in zip(keys, wanted, strict=True))
        assert ds.cached_bytes <= ds.cache_mb * 2**20
    for workers in (0, 1, 2):
        loader = torch.utils.data.DataLoader(make(), batch_sampler=[keys[:5], keys[5:9], keys[9:]],
                                             num_workers=workers, collate_fn=collate)
        got = torch.cat([batch['images'] for batch in loader])
        assert torch.equal(got, torch.stack([s['image'] for s in wanted]))
    assert not equal(make(seed=8)[keys[0]], wanted[0])


def test_close_epoch_ends_mosaic_only(shapes):
    augment = strengths(**dict(FULL, mosaic=1.0, mixup=1.0))
    ds = DetectionDataset(os.path.join(shapes, 'train.json'), imgsz=96, augment=augment, no_aug_epoch=5)
    ds.mosaic_indices = None                                           # asking for mosaic partners now fails
    late = ds[(5, 0)]
    assert set(late['labels'].tolist()) <= set(ds.labels[0].tolist()) and not equal(late, ds[(6, 0)])
    with pytest.raises(TypeError):
        ds[(4, 0)]
    ds.no_aug_epoch = 4.5                                              # an epoch's fraction counts, and for this alone
    assert equal(ds[(4.5, 0)], ds[(4.75, 0)])
    with pytest.raises(TypeError):
        ds[(4.25, 0)]


def test_block_decodes_each_picture_once(shapes, monkeypatch):
    opened, real = [], data.load_image
    monkeypatch.setattr(data, 'load_image', lambda path, *more: opened.append(path) or real(path, *more))
    augment = strengths(mosaic=1.0, scale_aug=0.5, mosaic_block=8)
    ds = DetectionDataset(os.path.join(shapes, 'train.json'), imgsz=96, augment=augment, cache_mb=2)
    order = ds.order(0)
    assert sorted(order) == list(range(40)) and not (order == ds.order(1)).all()
    for i in order:
        ds[(0, int(i))]
    assert len(opened) == 40                                           # ten pictures fit the cache, a sample uses four
    near = set(order[8:16].tolist())
    assert all(set(ds.mosaic_indices(0, int(order[9]), 3, np.random.default_rng(s))) <= near for s in range(9))


def test_no_bit_depends_on_a_broken_neighbour_having_been_met(tmp_path, capsys):
    for i in range(6):
        noise(64, 48, i).save(tmp_path / f'{i}.png')
    path = write_coco(str(tmp_path), [(i, f'{i}.png', 64, 48) for i in range(6)],
                      [(i, 1, [5, 5, 30, 30], {}) for i in range(6)])
    (tmp_path / '2.png').write_bytes((tmp_path / '2.png').read_bytes()[:3000])
    (tmp_path / '3.png').write_bytes(b'nothing')
    ds = DetectionDataset(path, imgsz=64, augment=strengths(**FULL))
    first, again = [ds[(0, i)] for i in range(6)], [ds[(0, i)] for i in range(6)]
    assert all(map(equal, first, again))
    assert [s['index'] for s in first] == [0, 1, 4, 4, 4, 5]           # the next readable one stands in
    assert ds.issues['image unreadable'][0] == 2 and '.png' in ds.issues['image unreadable'][1]
    assert capsys.readouterr().err.count('warning: skipped') == 2      # each named once
    plain = DetectionDataset(path, imgsz=64)[2]                        # for evaluation nothing may stand in
    assert plain['index'] == 2 and len(plain['labels']) == 0 and (plain['image'] == 114).all()
    for i in range(6):
        (tmp_path / f'{i}.png').write_bytes(b'')
    none = DetectionDataset(path, imgsz=64, augment=strengths(**FULL))
    for _ in range(2):
        with pytest.raises(InputError, match='not one image of .*set.json can be used'):
            none[(0, 0)]


# -------------------------------------------------------------------------------- files as they come

def test_every_kind_of_picture(tmp_path):
    ramp = np.linspace(0, 255, 60).astype(np.uint8)[None].repeat(40, 0)             # (40, 60)
    grey = Image.fromarray(ramp)
    colour = Image.merge('RGB', (grey, grey.transpose(Image.FLIP_LEFT_RIGHT), Image.new('L', (60, 40), 90)))
    grey.save(tmp_path / 'grey.png')
    grey.save(tmp_path / 'grey.jpg', quality=95)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / 'deep.png')
    colour.convert('CMYK').save(tmp_path / 'cmyk.jpg', quality=95)
    colour.convert('P', palette=Image.ADAPTIVE).save(tmp_path / 'palette.png')
    palette = colour.convert('P', palette=Image.ADAPTIVE)
    palette.save(tmp_path / 'clear.png', transparency=bytes([9] * 256))
    colour.convert('RGBA').save(tmp_path / 'alpha.png')
    grey.convert('1').save(tmp_path / 'bits.png')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for name, wanted, slack in (('grey.png', grey, 0), ('grey.jpg', grey, 3), ('deep.png', grey, 0),
                                    ('cmyk.jpg', colour, 12), ('palette.png', colour, 24), ('clear.png', colour, 24),
                                    ('alpha.png', colour, 0), ('bits.png', grey.convert('1'), 0)):
            image = load_image(str(tmp_path / name))
            assert image.mode == 'RGB' and image.size == (60, 40), name
            assert np.abs(np.asarray(image, int) - np.asarray(wanted.convert('RGB'), int)).max() <= slack, name


def test_exif_orientation_and_whose_boxes(tmp_path):
    stored = Image.new('RGB', (60, 40))
    stored.paste((255, 255, 255), (0, 0, 20, 40))                      # the left third is white
    exif = Image.Exif()
    exif[0x0112] = 6                                                   # turn by 90 degrees clockwise: the top third
    stored.save(tmp_path / 'a.jpg', exif=exif, quality=95)
    up = np.asarray(load_image(str(tmp_path / 'a.jpg')))
    assert up.shape == (60, 40, 3) and up[:17].min() > 200 and up[23:].max() < 50
    assert load_image(str(tmp_path / 'a.jpg'), (60, 40)).size == (60, 40)           # labelled as stored
    assert load_image(str(tmp_path / 'a.jpg'), (40, 60), 2).size == (20, 30)        # and decoded at half
    noise(640, 3).save(tmp_path / 'thin.jpg')
    assert load_image(str(tmp_path / 'thin.jpg'), shrink=8).size == (320, 2)
    with pytest.raises(InputError, match='a.jpg is 60x40 but its annotations are for 61x40'):
        load_image(str(tmp_path / 'a.jpg'), (61, 40))
    stored.save(tmp_path / 'a.tif', exif=exif)                         # which Pillow turns by itself
    for name, size, box in (('a.jpg', (40, 60), [0, 0, 40, 20]), ('a.jpg', (60, 40), [0, 0, 20, 40]),
                            ('a.tif', (40, 60), [0, 0, 40, 20])):      # the white third in either reading
        ds = DetectionDataset(write_coco(str(tmp_path), [(1, name, *size)], [(1, 1, box, {})]), imgsz=64)
        sample = ds[0]
        x1, y1, x2, y2 = sample['boxes'][0].round().int().tolist()
        inner = sample['image'][:, y1 + 2:y2 - 2, x1 + 2:x2 - 2]
        assert inner.numel() and inner.min() > 200


def test_one_sentence_for_each_mistake(tmp_path):
    with pytest.raises(InputError, match='image gone.jpg not found'):
        load_image('gone.jpg')
    (tmp_path / 'cut.jpg').write_bytes(b'')
    with pytest.raises(InputError, match=r'image .*cut.jpg cannot be read'):
        load_image(str(tmp_path / 'cut.jpg'))
    for wrong in (dict(mosaic=1.5), dict(flip=-0.1), dict(mosaic_block=-1)):
        with pytest.raises(InputError, match=f'--{[*wrong][0]}='):
            Augment(**wrong)


def run_data(*args):
    return subprocess.run([sys.executable, 'data.py', *args], cwd=ROOT, capture_output=True, text=True)


def test_commands(tmp_path, shapes):
    done = run_data('check', os.path.join(shapes, 'val.json'), f'--out={tmp_path}/check.png', '--imgsz=96')
    assert '4 images, 0 of them without objects' in done.stdout and 'defects    none' in done.stdout
    assert 'at 96 px   the median object is' in done.stdout
    assert Image.open(tmp_path / 'check.png').size == (4 * 480, 480)
    all_json = tmp_path / 'all.json'
    all_json.write_bytes(open(os.path.join(shapes, 'train.json'), 'rb').read())
    done = run_data('split', str(all_json), '--val=0.25', '--seed=3')
    parts = [json.loads((tmp_path / f'all_{name}.json').read_text()) for name in ('train', 'val')]
    ids = [{image['id'] for image in part['images']} for part in parts]
    assert done.returncode == 0 and not ids[0] & ids[1] and len(ids[0] | ids[1]) == 40 and 8 <= len(ids[1]) <= 12
    os.remove(tmp_path / 'all_train.json')                           # the other one is there: nothing is written
    assert 'is there already' in run_data('split', str(all_json)).stderr
    assert not (tmp_path / 'all_train.json').exists()
    for args, words in ((['check', 'no.json'], 'no.json not found'),
                        (['chekc', 'x'], 'there are: python data.py check'),
                        ([], 'there are: '),
                        (['check', 'x', '--image=y'], 'unknown setting "image"'),
                        (['split', str(all_json)], 'is there already'),
                        (['split', 'x.yaml'], 'takes a COCO .json')):
        done = run_data(*args)
        assert done.returncode == 1 and words in done.stderr and done.stderr.count('\n') == 1, (args, done.stderr)


@pytest.mark.skipif(not os.path.isdir(os.path.join(SHARED, 'coco')), reason='no ../shared/data/coco here')
def test_real_coco():
    ds = DetectionDataset(os.path.join(SHARED, 'coco', 'train.json'), imgsz=320, augment=strengths(**FULL))
    assert len(ds) == 60 and len(ds.names) == 80 and ds.category_ids[-1] == 90 and ds.names[0] == 'person'
    assert {kind: count for kind, (count, _) in ds.issues.items()} == {'box without area': 1}
    assert 'image 361919, annotation 50016758' in ds.issues['box without area'][1]
    coco_gt = ds.coco()
    assert len(coco_gt['annotations']) == 652
    assert sum(map(len, ds.labels)) == 652 - 1 - sum(a['iscrowd'] for a in coco_gt['annotations'])
    assert min(map(len, ds.labels)) == 0
    batch = collate([ds[(0, i)] for i in range(60)])
    assert batch['images'].shape == (60, 3, 320, 320) and not ds.broken


@pytest.mark.skipif(not os.path.isdir(os.path.join(SHARED, 'bccd')), reason='no ../shared/data/bccd here')
def test_real_blood_cells():
    ds = DetectionDataset(os.path.join(SHARED, 'bccd', 'trainval.json'))
    assert len(ds) == 292 and ds.names == ['RBC', 'WBC', 'Platelets'] and sum(map(len, ds.labels)) == 3943 - 2
    assert {kind: count for kind, (count, _) in ds.issues.items()} == {'box without area': 2}


# -------------------------------------------------------------------------------- clips

def write_clips(folder, clips=3, length=4):
    """Clips of `length` frames, the last of which has a box, brighter by 30; frame t is of brightness 40 + 50 t."""
    images, annotations = [], []
    for c in range(clips):
        for t in range(length):
            pixels = np.full((64, 96, 3), 40 + 50 * t, np.uint8)
            pixels[10:30, 20 + 5 * c:50 + 5 * c] += 30
            Image.fromarray(pixels).save(os.path.join(folder, f'clip{c}_{t:03d}.png'))
        images.append((c + 1, f'clip{c}_{length - 1:03d}.png', 96, 64))
        annotations.append((c + 1, 1, [20 + 5 * c, 10, 30, 20], {}))
    return write_coco(folder, images, annotations)


def test_a_clip_is_its_frames_oldest_first(tmp_path):
    source = write_clips(str(tmp_path))
    clips, images = (DetectionDataset(source, imgsz=(64, 96), frames=frames) for frames in (2, 0))
    image, labels, boxes = (clips[1][key] for key in ('image', 'labels', 'boxes'))
    assert image.shape == (3, 3, 64, 96) and image[:, 0, 60, 90].tolist() == [90, 140, 190]
    assert torch.equal(image[2], images[1]['image']) and torch.equal(boxes, images[1]['boxes']) and len(labels) == 1
    assert [os.path.basename(f) for f in clips.clip_files(0)] == [f'clip0_{t:03d}.png' for t in (1, 2, 3)]
    longer = DetectionDataset(source, imgsz=(64, 96), frames=5)[0]['image']
    assert longer[:, 0, 60, 90].tolist() == [40, 40, 40, 90, 140, 190], 'at the start the first frame is repeated'
    batch = collate([clips[0], clips[2]])
    assert batch['images'].shape == (2, 3, 3, 64, 96) and batch['labels'].shape == (2, 1)


def test_frame_before_of_numbers_with_and_without_zeros(tmp_path):
    for name in ('a9.jpg', 'a10.jpg', 'b09.jpg', 'b10.jpg', 'b9.jpg', 'c1.jpg'):
        (tmp_path / name).touch()
    before = {'a10.jpg': 'a9.jpg', 'b10.jpg': 'b09.jpg', 'a9.jpg': 'a9.jpg', 'c1.jpg': 'c1.jpg'}
    for name, wanted in before.items():
        assert data.previous_frame(str(tmp_path / name)) == str(tmp_path / wanted)


def test_frames_of_a_clip_are_augmented_alike_and_a_clip_is_a_function_of_its_key(tmp_path):
    """Frames of one brightness each: after Mosaic, scale, shift and flip they still differ by 50 at every pixel."""
    source = write_clips(str(tmp_path))
    augment = strengths(mosaic=0.5, scale_aug=0.5, translate=0.2, flip=0.5)
    data = DetectionDataset(source, imgsz=64, augment=augment, frames=3, seed=4)
    alone = DetectionDataset(source, imgsz=64, augment=augment, seed=4)
    seen = set()
    for epoch in range(4):
        for index in range(3):
            clip = data[epoch, index]['image'].int()                                  # (4, 3, 64, 64)
            inside = clip[0] != clip[3]                                               # padding stays what it is
            assert all(((clip[t + 1] - clip[t])[inside] - 50).abs().max() <= 1 for t in range(3))
            assert torch.equal(data[epoch, index]['image'][3], alone[epoch, index]['image'])
            assert torch.equal(data[epoch, index]['boxes'], alone[epoch, index]['boxes'])
            assert equal(data[epoch, index], DetectionDataset(source, imgsz=64, augment=augment, frames=3, seed=4,
                                                              cache_mb=0)[epoch, index])
            seen.add(clip.sum().item())
    assert len(seen) > 6


def test_clips_without_earlier_frames_get_a_sentence(tmp_path, shapes):
    for name in ('first', 'second'):
        noise(40, 30).save(tmp_path / f'{name}.png')
    images = [(1, 'first.png', 40, 30), (2, 'second.png', 40, 30)]
    source = write_coco(str(tmp_path), images, [(1, 1, [3, 3, 9, 9], {})])
    with pytest.raises(InputError, match='no image has an earlier frame beside it'):
        DetectionDataset(source, frames=2)


def test_an_earlier_frame_that_cannot_be_read_is_grey(tmp_path):
    source = write_clips(str(tmp_path))
    (tmp_path / 'clip1_002.png').write_bytes(b'no image')
    image = DetectionDataset(source, imgsz=(64, 96), frames=1)[1]['image']
    assert (image[0] == data.PAD_VALUE).all() and image[1].float().std() > 1
    frames = load_sample(DetectionDataset(source, frames=1), 1, (64, 96), float('inf'), True)
    assert (frames[1][0] == data.PAD_VALUE).all() and frames[1][1].std() > 1 and frames[-1] is None    # evaluation too


def test_a_frame_of_another_size_is_grey_cached_or_not(tmp_path):
    for t, side in ((1, 40), (2, 200), (3, 200)):
        noise(side, side, t).save(tmp_path / f'{t:03d}.png')
    images = [(t, f'{t:03d}.png', side, side) for t, side in ((1, 40), (2, 200), (3, 200))]
    source = write_coco(str(tmp_path), images, [(2, 1, [5, 5, 90, 90], {})])
    warm, cold = (DetectionDataset(source, imgsz=64, augment=strengths(mosaic=1.0), frames=1, cache_mb=mb)
                  for mb in (64, 0))
    assert warm[0]['image'].shape == (2, 3, 64, 64)                    # now 001.png is in the cache, 40x40
    for epoch in range(4):
        assert equal(warm[epoch, 1], cold[epoch, 1])
    (tmp_path / '003.png').write_bytes(b'no image')                    # the last frame: then the whole clip is out
    fresh = DetectionDataset(source, imgsz=64, augment=strengths(mosaic=1.0), frames=1)
    before = [fresh[epoch, 1] for epoch in range(4)]
    assert fresh.read(2) is None and all(equal(fresh[epoch, 1], before[epoch]) for epoch in range(4))

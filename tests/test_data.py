"""Pictures and boxes: the same map for both, the same bits on every path, and a sentence for every defect."""
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import DetectionDataset, InputError, collate, draw_far, letterbox, load_image, make_shapes, rect_shape

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(ROOT, '..', 'shared', 'data')
FULL = dict(mosaic=0.8, mixup=0.3, scale=0.5, translate=0.1, hsv=(0.015, 0.7, 0.4), flip=0.5)


def write_coco(folder, images, annotations, categories=((1, 'a'),), name='set.json'):
    """images: [(id, file, w, h)], annotations: [(image, category, bbox, more)] -> path of the json."""
    path = os.path.join(folder, name)
    with open(path, 'w') as f:
        json.dump(dict(images=[dict(id=i, file_name=n, width=w, height=h) for i, n, w, h in images],
                       annotations=[dict(id=k, image_id=i, category_id=c, bbox=b, **more) for k, (i, c, b, more) in enumerate(annotations, 10)],
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


# ------------------------------------------------------------------------------------------ one map for pixels and boxes

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
        Image.fromarray(pixels).save(os.path.join(folder, f'{only}_{i}.{kind}'), **(dict(quality=95) if kind == 'jpg' else {}))
    return write_coco(folder, images, annotations, [(k, f'object {k}') for k in range(27)], f'{only}.json')


@pytest.mark.parametrize('augment,imgsz,kind', [
    (dict(mosaic=1.0, scale=0.5, translate=0.1, flip=0.5), (160, 160), 'png'),
    (dict(mosaic=1.0, scale=0.9, translate=0.2), (96, 224), 'png'),
    (dict(mosaic=0.0, scale=0.5, translate=0.1, flip=0.5), (192, 128), 'png'),
    (dict(mosaic=1.0, scale=0.1, flip=0.5), (128, 128), 'jpg'),        # decoded at 1/2 and 1/4
    (None, (160, 128), 'png')])
def test_boxes_are_where_the_pixels_are(tmp_path, augment, imgsz, kind):
    checked, worst = 0, 0.0
    for only in range(0, 27, 2):
        ds = DetectionDataset(painted(str(tmp_path), only, kind, 5), imgsz=imgsz, augment=augment)
        ds.mosaic_indices = lambda epoch, i, count, rng: rng.permutation([j for j in range(9) if j != i])[:count].tolist()   # none twice
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
                assert bright.sum() < 0.11 * 350 * 350 * 1.9           # dropped, so little of it can be in sight
    assert checked > 10 and worst <= 1.0, (checked, worst)


def test_span_maps_ends_to_ends():
    assert data.src_dst_interval(100, 2.0, 10, 400) == (0, 100, 10, 210)
    assert data.src_dst_interval(100, 2.0, -50, 100) == (25, 75, 0, 100)
    assert data.src_dst_interval(100, 1.0, 400, 400) is None and data.src_dst_interval(100, 1.0, -100, 400) is None
    for start in np.linspace(-90, 90, 50):                             # never beyond the picture, never empty
        a, b, c, d = data.src_dst_interval(7, 13.7, start, 100)
        assert 0 <= a < b <= 7 and 0 <= c < d <= 100


def test_cut_keeps_what_is_worth_it():
    boxes = np.array([[10, 10, 20, 20], [-90, 10, 9, 20], [-91, 10, 9, 20], [50, 50, 52, 90], [0, 0, 300, 2.5], [-5, -5, 30, 30]], np.float32)
    kept, labels = data.clip_boxes(boxes, np.arange(6), (0, 1, 0, 400), (0, 1, 0, 400))
    assert labels.tolist() == [0, 5] and kept[1].tolist() == [0, 0, 30, 30]         # 9 %; 2 px; 120 : 1
    assert data.clip_boxes(np.array([[-89, 10, 10, 20.]], np.float32), np.arange(1), (0, 1, 0, 400), (0, 1, 0, 400))[1].tolist() == [0]


def test_colour_and_mixup():
    image = data.to_tensor(noise(40, 30))
    same = data.color_jitter(image, None, None, np.random.default_rng(0), (0, 0, 0))[0]
    assert torch.equal(same, image)
    grey = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    for seed in range(20):
        out = data.color_jitter(grey, None, None, np.random.default_rng(seed), (0.5, 0.9, 0.9))[0]
        assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])          # hue and saturation do not touch grey
        assert (out[0, 0].diff().int() >= 0).all() if out[0, 0, -1] else True       # and nothing wraps round
    a = (torch.zeros(3, 4, 4, dtype=torch.uint8), np.zeros((1, 4), np.float32), np.array([1]))
    b = (torch.full((3, 4, 4), 200, dtype=torch.uint8), np.ones((2, 4), np.float32), np.array([2, 3]))
    image, boxes, labels = data.mixup(a, b, np.random.default_rng(0))
    assert 50 < image[0, 0, 0] < 150 and labels.tolist() == [1, 2, 3] and boxes.shape == (3, 4)


def test_letterbox_and_back():
    for (w, h), shape in (((640, 480), (320, 320)), ((333, 500), (256, 320)), ((17, 900), (64, 64)), ((64, 64), (64, 64))):
        image, scale, (left, top) = letterbox(noise(w, h), shape)
        assert image.shape == (*shape, 3) and image.dtype == np.uint8
        assert abs(w * scale + 2 * left - shape[1]) <= 1.5 and abs(h * scale + 2 * top - shape[0]) <= 1.5
        assert min(left, top) == 0
    image, scale, corner = letterbox(np.full((50, 100, 3), 200, np.uint8), (100, 100))
    assert (scale, corner) == (1.0, (0, 25)) and (image[:25] == 114).all() and (image[25:75] == 200).all() and (image[75:] == 114).all()


def test_rect_shape():
    assert rect_shape([(640, 480)], 320) == (256, 352)                 # with the slack that YOLOv8's own evaluation has
    assert rect_shape([(640, 480)], 320, pad=0) == (256, 320)
    assert rect_shape([(1920, 1080), (1000, 500)], 1920, pad=0) == (1088, 1920)
    assert rect_shape([(640, 480), (300, 600)], 640, pad=0) == (640, 640)


def test_collate_pads():
    def sample(n):
        return dict(image=torch.zeros(3, 4, 4, dtype=torch.uint8), labels=torch.arange(n), boxes=torch.ones(n, 4), index=n)
    batch = collate([sample(0), sample(3)])
    assert batch['labels'].tolist() == [[-1, -1, -1], [0, 1, 2]] and batch['boxes'].shape == (2, 3, 4)
    assert batch['images'].dtype == torch.uint8 and batch['index'].tolist() == [0, 3] and batch['boxes'][0].sum() == 0
    assert collate([sample(0)])['labels'].tolist() == [[-1]]           # M is never 0


# ------------------------------------------------------------------------------------------ pure samples

def test_samples_do_not_depend_on_workers_or_cache(shapes):
    def make(**more):
        return DetectionDataset(os.path.join(shapes, 'train.json'), imgsz=96, augment=dict(FULL, block=8), seed=7, **more)
    keys = [(e, i) for e in (0, 1) for i in (3, 17, 30, 5, 39, 3)]
    wanted = [make()[key] for key in keys]                             # each from a fresh data set
    assert not equal(wanted[0], wanted[6]) and equal(wanted[0], wanted[5])          # another epoch, the same key again
    for ds in (make(cache_mb=0), make(cache_mb=1), make(cache_mb=1000)):
        assert all(equal(ds[key], sample) for key, sample in zip(keys, wanted, strict=True))
        assert ds.cached_bytes <= ds.cache_mb * 2**20
    for workers in (0, 1, 2):
        loader = torch.utils.data.DataLoader(make(), batch_sampler=[keys[:5], keys[5:9], keys[9:]], num_workers=workers, collate_fn=collate)
        got = torch.cat([batch['images'] for batch in loader])
        assert torch.equal(got, torch.stack([s['image'] for s in wanted]))
    other = DetectionDataset(os.path.join(shapes, 'train.json'), imgsz=96, augment=dict(FULL, block=8), seed=8)
    assert not equal(other[keys[0]], wanted[0])


def test_close_epoch_ends_mosaic_only(shapes):
    ds = DetectionDataset(os.path.join(shapes, 'train.json'), imgsz=96, augment=dict(FULL, mosaic=1.0, mixup=1.0, no_aug_epoch=5))
    ds.mosaic_indices = None                                                 # whoever asks for partners now fails
    late = ds[(5, 0)]
    assert set(late['labels'].tolist()) <= set(ds.labels[0].tolist()) and not equal(late, ds[(6, 0)])
    with pytest.raises(TypeError):
        ds[(4, 0)]


def test_block_decodes_each_picture_once(shapes, monkeypatch):
    opened, real = [], data.load_image
    monkeypatch.setattr(data, 'load_image', lambda path, *more: opened.append(path) or real(path, *more))
    ds = DetectionDataset(os.path.join(shapes, 'train.json'), imgsz=96, augment=dict(mosaic=1.0, scale=0.5, block=8), cache_mb=2)
    order = ds.order(0)
    assert sorted(order) == list(range(40)) and not (order == ds.order(1)).all()
    for i in order:
        ds[(0, int(i))]
    assert len(opened) == 40                                           # ten pictures fit the cache, four a sample are used
    near = set(order[8:16].tolist())
    assert all(set(ds.mosaic_indices(0, int(order[9]), 3, np.random.default_rng(s))) <= near for s in range(9))


def test_no_bit_depends_on_a_broken_neighbour_having_been_met(tmp_path, capsys):
    for i in range(6):
        noise(64, 48, i).save(tmp_path / f'{i}.png')
    path = write_coco(str(tmp_path), [(i, f'{i}.png', 64, 48) for i in range(6)], [(i, 1, [5, 5, 30, 30], {}) for i in range(6)])
    (tmp_path / '2.png').write_bytes((tmp_path / '2.png').read_bytes()[:3000])
    (tmp_path / '3.png').write_bytes(b'nothing')
    ds = DetectionDataset(path, imgsz=64, augment=FULL)
    first, again = [ds[(0, i)] for i in range(6)], [ds[(0, i)] for i in range(6)]
    assert all(map(equal, first, again))
    assert [s['index'] for s in first] == [0, 1, 4, 4, 4, 5]           # the next readable one stands in
    assert ds.issues['image unreadable'][0] == 2 and '.png' in ds.issues['image unreadable'][1]
    assert capsys.readouterr().err.count('warning: skipped') == 2      # each named once
    plain = DetectionDataset(path, imgsz=64)[2]                        # for evaluation nothing may stand in
    assert plain['index'] == 2 and len(plain['labels']) == 0 and (plain['image'] == 114).all()
    for i in range(6):
        (tmp_path / f'{i}.png').write_bytes(b'')
    with pytest.raises(InputError, match='not one image of .*set.json can be used'):
        DetectionDataset(path, imgsz=64, augment=FULL)[(0, 0)]


# ------------------------------------------------------------------------------------------ files as they come

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
        for name, wanted, slack in (('grey.png', grey, 0), ('grey.jpg', grey, 3), ('deep.png', grey, 0), ('cmyk.jpg', colour, 12),
                                    ('palette.png', colour, 24), ('clear.png', colour, 24), ('alpha.png', colour, 0),
                                    ('bits.png', grey.convert('1'), 0)):
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
    with pytest.raises(InputError, match='a.jpg is 60x40 but its annotations are for 61x40'):
        load_image(str(tmp_path / 'a.jpg'), (61, 40))
    for size, box in (((40, 60), [0, 0, 40, 20]), ((60, 40), [0, 0, 20, 40])):      # the white third in either reading
        ds = DetectionDataset(write_coco(str(tmp_path), [(1, 'a.jpg', *size)], [(1, 1, box, {})]), imgsz=64)
        sample = ds[0]
        x1, y1, x2, y2 = sample['boxes'][0].round().int().tolist()
        inner = sample['image'][:, y1 + 2:y2 - 2, x1 + 2:x2 - 2]
        assert inner.numel() and inner.min() > 200


def test_ids_names_and_crowds(tmp_path):
    noise(100, 80).save(tmp_path / 'x.png')
    noise(100, 80).save(tmp_path / 'empty.png')
    path = write_coco(str(tmp_path), [(70, 'x.png', 100, 80), (8, 'empty.png', 100, 80)],
                      [(70, 90, [1, 2, 30, 40], {}), (70, 3, [50, 2, 30, 40], dict(iscrowd=1)), (70, 17, [10, 10, 20, 20], dict(area=123.0))],
                      [(90, 'zebra'), (3, 'ant'), (17, 'bee')])
    ds = DetectionDataset(path, imgsz=100)
    assert ds.names == ['ant', 'bee', 'zebra'] and ds.category_ids == [3, 17, 90] and ds.image_ids == [70, 8]
    assert ds.labels[0].tolist() == [2, 1] and ds.boxes[0].tolist() == [[1, 2, 31, 42], [10, 10, 30, 30]] and len(ds.labels[1]) == 0
    assert ds.sizes.tolist() == [[100, 80]] * 2 and not ds.issues
    assert collate([ds[1]])['labels'].tolist() == [[-1]]
    coco_gt = ds.coco()
    assert len(coco_gt['annotations']) == 3 and [a['iscrowd'] for a in coco_gt['annotations']] == [0, 1, 0]
    assert [a['area'] for a in coco_gt['annotations']] == [1200, 1200, 123.0] and coco_gt['annotations'][0]['category_id'] == 90
    other = DetectionDataset(path, names=['zebra', 'yak', 'ant'])      # the order of somebody else's training
    assert other.labels[0].tolist() == [0] and [other.category_ids[i] for i in (0, 2)] == [90, 3]
    assert other.category_ids[1] not in (3, 17, 90) and other.issues['unknown category'][0] == 1


def test_truth_is_what_pycocotools_needs(tmp_path):
    from pycocotools.coco import COCO
    noise(100, 80).save(tmp_path / 'x.png')
    with open(tmp_path / 'set.json', 'w') as f:                        # ids from 0, no area, no iscrowd, no info, one annotation to nowhere
        json.dump(dict(images=[dict(id=0, file_name='x.png', width=100, height=80)], categories=[dict(id=0, name='a')],
                       annotations=[dict(id=k, image_id=i, category_id=0, bbox=[k, 0, 9, 9]) for k, i in enumerate((0, 0, 5))]), f)
    coco_gt = DetectionDataset(str(tmp_path / 'set.json')).coco()
    assert [a['id'] for a in coco_gt['annotations']] == [1, 2]           # 0 would never be counted as found
    coco = COCO()
    coco.dataset = coco_gt
    coco.createIndex()
    assert len(coco.loadRes([dict(image_id=0, category_id=0, bbox=[0, 0, 9, 9], score=1.0)]).dataset['annotations']) == 1


def test_every_defect_is_counted_and_quoted(tmp_path):
    for name in ('a', 'b', 'small'):
        noise(100, 80).save(tmp_path / f'{name}.png')
    (tmp_path / 'junk.png').write_bytes(b'junk')
    images = [(1, 'a.png', 100, 80), (2, 'gone.png', 100, 80), (3, 'junk.png', 100, 80), (4, 'small.png', 200, 160), (1, 'b.png', 100, 80)]
    boxes = [[10, 10, 20, 20], [10, 10, 0, 20], [10, 10, 20, -3], [-10, 70, 30, 30], [200, 10, 20, 20], [10, 10, 20, 20],
             [0, 0, None, 5], [0, 0, 5], [0, 0, float('nan'), 5], [-0.5, 0, 100.9, 80]]
    path = write_coco(str(tmp_path), images, [(1, 1, box, {}) for box in boxes] + [
        (i, c, [0, 0, 5, 5], {}) for i, c in ((1, 99), (77, 1), (2, 1), (3, 1), (4, 1))])
    ds = DetectionDataset(path, imgsz=64)
    for i in range(len(ds)):
        ds[i]
    assert {kind: count for kind, (count, _) in ds.issues.items()} == {
        'image missing': 1, 'image listed twice': 1, 'unknown category': 1, 'annotation without image': 1, 'annotation without a proper bbox': 3,
        'box without area': 2, 'box beyond the border': 1, 'box outside its image': 1, 'box given twice': 1,
        'image unreadable': 1, 'image of another size': 1}
    for kind, where in (('box without area', 'image 1, annotation 11'), ('unknown category', 'category_id 99'), ('image missing', 'gone.png'),
                        ('image unreadable', 'junk.png'), ('image of another size', 'small.png is 100x80'), ('annotation without image', 'image 77')):
        assert where in ds.issues[kind][1]
    assert ds.boxes[0].tolist() == [[10, 10, 30, 30], [0, 70, 20, 80], [0, 0, 100, 80]]       # half a pixel too many is rounding


def yolo_twin(folder, shapes):
    """The val part of the shapes set as YOLO files: images/val, labels/val, data.yaml."""
    ds = DetectionDataset(os.path.join(shapes, 'val.json'))
    for kind in ('images', 'labels'):
        os.makedirs(os.path.join(folder, kind, 'val'))
    for file, (w, h), labels, boxes in zip(ds.files, ds.sizes, ds.labels, ds.boxes, strict=True):
        base = os.path.basename(file)
        Image.open(file).save(os.path.join(folder, 'images', 'val', base))
        with open(os.path.join(folder, 'labels', 'val', base[:-4] + '.txt'), 'w') as f:
            for label, (x1, y1, x2, y2) in zip(labels, boxes.astype(float), strict=True):
                print(label, (x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h, file=f)
    with open(os.path.join(folder, 'data.yaml'), 'w') as f:
        names = [f'  {i}: "{name}"' for i, name in enumerate(ds.names)]
        print('# shapes', 'path: .   # here', 'val: images/val', 'nc: 6', 'names:', *names, sep='\n', file=f)
    return ds


def test_yolo_equals_coco(tmp_path, shapes):
    wanted = yolo_twin(str(tmp_path), shapes)
    with open(tmp_path / 'list.txt', 'w') as f:
        print(*sorted(f'images/val/{name}' for name in os.listdir(tmp_path / 'images' / 'val')), sep='\n', file=f)
    for source in ('', 'images', 'images/val', 'data.yaml:val', 'list.txt'):
        ds = DetectionDataset(str(tmp_path / source))
        assert ds.names == wanted.names and len(ds) == len(wanted) == 4 and not ds.issues
        for a, b, x, y in zip(ds.labels, wanted.labels, ds.boxes, wanted.boxes, strict=True):
            assert (a == b).all() and np.abs(x - y).max() < 1e-3
    mine, theirs = ds.coco()['annotations'], wanted.coco()['annotations']
    assert np.allclose([a['bbox'] for a in mine], [a['bbox'] for a in theirs], atol=0.01) and mine[0]['id'] == 1
    assert np.allclose([a['area'] for a in mine], [a['area'] for a in theirs], rtol=1e-2)
    with pytest.raises(InputError, match='data.yaml has no entry "train:"'):
        DetectionDataset(str(tmp_path / 'data.yaml'))


def test_yolo_lines_good_and_bad(tmp_path):
    os.makedirs(tmp_path / 'images')
    os.makedirs(tmp_path / 'labels')
    for name in ('a', 'bare', 'none'):
        noise(100, 50).save(tmp_path / 'images' / f'{name}.png')
    exif = Image.Exif()
    exif[0x0112] = 8
    noise(100, 50).save(tmp_path / 'images' / 'turned.jpg', exif=exif)
    (tmp_path / 'images' / 'broken.jpg').write_bytes(b'\xff\xd8\xff')
    (tmp_path / 'classes.txt').write_text('dog\ncat\n')
    (tmp_path / 'labels' / 'bare.txt').write_text('\n')
    (tmp_path / 'labels' / 'turned.txt').write_text('0 0.5 0.5 1 1\n')
    (tmp_path / 'labels' / 'a.txt').write_text('0 0.5 0.5 0.2 0.4\n1 0.1 0.2 0.5 0.2 0.3 0.8\n\n7 0.5 0.5 0.2 0.4\n0 0.5 0.5 0.2\n0 x 0.5 0.2 0.1\n'
                                               '0.5 0.5 0.5 0.2 0.4\n0 0.5 0.5 0 0.4\n0 0.95 0.5 0.2 0.4\n0 0.5 0.5 0.2 0.4\n1 0.5 0.5 -0.2 0.4\n')
    ds = DetectionDataset(str(tmp_path))
    assert [os.path.basename(f) for f in ds.files] == ['a.png', 'bare.png', 'none.png', 'turned.jpg'] and ds.names == ['dog', 'cat']
    assert np.allclose(ds.boxes[0], [[40, 15, 60, 35], [10, 10, 50, 40], [85, 15, 100, 35]], atol=1e-4) and ds.labels[0].tolist() == [0, 1, 0]
    assert ds.sizes[3].tolist() == [50, 100] and ds.boxes[3].tolist() == [[0, 0, 50, 100]]
    assert {kind: count for kind, (count, _) in ds.issues.items()} == {
        'malformed line': 3, 'unknown category': 1, 'box without area': 2, 'box beyond the border': 1, 'box given twice': 1,
        'image without label file': 1, 'image unreadable': 1}
    assert 'a.txt, line 5' in ds.issues['malformed line'][1] and 'a.txt, line 4' in ds.issues['unknown category'][1]
    assert DetectionDataset(str(tmp_path), names=['cat', 'dog']).labels[0].tolist() == [1, 0, 1]


def test_yaml_as_people_write_it(tmp_path):
    for text in ('names: [a b, "c"]', "names:\n- a b\n- 'c'", 'names:\n  0: a b\n  1: c # the last', 'names: [a b,\n  c]', 'names: {0: a b, 1: c}'):
        (tmp_path / 'd.yaml').write_text('# top\npath: /x/y\n\n' + text + '\nval: images#1/val\n')
        assert data.read_yaml(str(tmp_path / 'd.yaml')) == dict(path='/x/y', names=['a b', 'c'], val='images#1/val'), text
    (tmp_path / 'd.yaml').write_text('names:\n  0: one\n')
    assert data.read_yaml(str(tmp_path / 'd.yaml')) == dict(names=['one'])


# ------------------------------------------------------------------------------------------ the shapes set

def test_shapes_are_seeded_crowded_and_inside(shapes, tmp_path):
    make_shapes(str(tmp_path / 'again'), train=3, val=1)
    for name in ('train/000001.jpg', 'train/000003.jpg', 'val/000001.jpg'):         # a picture does not depend on how many there are
        assert (tmp_path / 'again' / 'images' / name).read_bytes() == open(os.path.join(shapes, 'images', name), 'rb').read()
    ds = DetectionDataset(os.path.join(shapes, 'train.json'))
    boxes, counts = np.concatenate(ds.boxes), [len(b) for b in ds.boxes]
    assert ds.names == list(data.SHAPES) and not ds.issues and set(np.concatenate(ds.labels)) == set(range(6))
    assert min(counts) <= 5 and max(counts) >= 12 and boxes.min() >= 0 and boxes.max() <= 192
    side = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1))
    assert 6 < side.min() < 20 and (side < 32).mean() < 0.35 and side.max() > 70
    overlap = np.concatenate([data.max_pairwise_iou(b) for b in ds.boxes])
    assert (overlap > 0.3).mean() > 0.03 and (overlap > 0.1).mean() > 0.2           # they do hide each other
    assert (tmp_path / 'again' / 'train.json').exists() and not list((tmp_path / 'again').glob('*.part'))


def test_a_shape_fills_its_box():
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for kind in data.SHAPES:
            points = data.outline(kind, rng.uniform(0, 7))
            assert np.abs(np.hypot(*points.T).max() - 1) < 1e-9 and np.ptp(points, 0).min() > 1.2


# ------------------------------------------------------------------------------------------ sentences and commands

def test_one_sentence_for_each_mistake(tmp_path):
    def complaint(path, **more):
        with pytest.raises(InputError) as e:
            DetectionDataset(str(path), **more)
        assert '\n' not in str(e.value)
        return str(e.value)
    assert 'run: python data.py shapes' in complaint(tmp_path / 'data/shapes/train.json')
    assert 'run: python data.py coco20' in complaint(tmp_path / 'data/coco20/train.json')
    assert 'no.json not found: check the path' in complaint(tmp_path / 'no.json')
    (tmp_path / 'x.json').write_text('{"images": [')
    assert 'x.json is not valid JSON' in complaint(tmp_path / 'x.json')
    (tmp_path / 'x.json').write_text('[1, 2]')
    assert 'x.json is not a COCO annotation file, it has no list "images"' in complaint(tmp_path / 'x.json')
    (tmp_path / 'x.json').write_text('{"images": [{"id": 1}], "annotations": [], "categories": []}')
    assert 'lacks id or file_name' in complaint(tmp_path / 'x.json')
    (tmp_path / 'x.json').write_text('{"images": [{"id": "one", "file_name": "a.png"}], "annotations": [], "categories": []}')
    assert "the id 'one' in \"images\" is not a whole number" in complaint(tmp_path / 'x.json')
    assert 'not one image of' in complaint(write_coco(str(tmp_path), [(1, 'a.png', 9, 9)], [(1, 1, [0, 0, 5, 5], {})]))
    assert 'a.png' in complaint(tmp_path / 'set.json')
    assert 'nowhere' in complaint(tmp_path / 'set.json', images='nowhere')
    noise(9, 9).save(tmp_path / 'a.png')
    assert len(DetectionDataset(str(tmp_path / 'set.json'), images=str(tmp_path))) == 1
    assert 'has no annotations' in complaint(write_coco(str(tmp_path), [(1, 'a.png', 9, 9)], []))
    flat = complaint(write_coco(str(tmp_path), [(1, 'a.png', 9, 9)], [(1, 1, [0, 0, 0, 5], {})]))
    assert 'has no usable annotations; box without area: 1, such as' in flat
    os.makedirs(tmp_path / 'hollow')
    assert 'holds no images' in complaint(tmp_path / 'hollow')
    assert 'neither a COCO .json' in complaint(tmp_path / 'a.png')
    with pytest.raises(InputError, match='image gone.jpg not found'):
        load_image('gone.jpg')
    (tmp_path / 'cut.jpg').write_bytes(b'')
    with pytest.raises(InputError, match=r'image .*cut.jpg cannot be read'):
        load_image(str(tmp_path / 'cut.jpg'))


def test_commands(tmp_path, shapes, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.main(['check', os.path.join(shapes, 'val.json')])
    said = capsys.readouterr().out
    assert '4 images, 0 of them without objects' in said and 'defects    none' in said and said.endswith('out/check.png\n')
    assert Image.open('out/check.png').size == (4 * 480, 480)
    with open('small.py', 'w') as f:
        f.write(f'train_data = {os.path.join(shapes, "train.json")!r}\nimgsz = (64, 96)\nbatch_size = batch_size - 11\n')
    data.main(['show', 'small.py', '--mixup=1.0', '--out=batch.png'])
    assert Image.open('batch.png').size == (4 * 480, 2 * 320)
    for line, words in (('check no.json', 'no.json not found'), ('show no.py', 'config file no.py not found'), ('chekc', 'chekc is not understood'),
                        ('show small.py --mosiac=1', '--mosiac=1: unknown'), ('', 'no command'), ('check x --image=y', '--image'),
                        ('check x y', 'y is not'), ('shapes --out=small.py', 'cannot write'), ('shapes --seed=x', '--seed=x'),
                        ('show small.py --mixup=much', '--mixup=much')):
        with pytest.raises(InputError, match=words):
            data.main(line.split())
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'data.py'), 'check', 'no.json'], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == 'error: dataset no.json not found: check the path\n' and not done.stdout


def test_drawing_stays_inside_and_legible():
    boxes = torch.tensor([[0., 0, 200, 100], [190, 95, 260, 120], [50, 50, 50, 50]])          # whole, over the rim, nothing
    page = data.draw_boxes(Image.new('RGB', (200, 100)), boxes, [0, 1, 7], ['left', 'right'], [0.5, 1, 0])
    pixels = np.asarray(page)
    assert page.size == (200, 100) and (pixels.reshape(-1, 3) == data.class_color(0)).all(1).sum() > 500
    colours = np.array([data.class_color(i) for i in range(20)])
    assert np.abs(colours[:, None] - colours[None]).max(2)[~np.eye(20, dtype=bool)].min() > 10


# ------------------------------------------------------------------------------------------ the real sets

@pytest.mark.skipif(not os.path.isdir(os.path.join(SHARED, 'coco')), reason='no ../shared/data/coco here')
def test_real_coco():
    ds = DetectionDataset(os.path.join(SHARED, 'coco', 'train.json'), imgsz=320, augment=FULL)
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


def test_far_strips_keep_their_distance():
    for seed in range(20):
        image, labels, boxes = draw_far(np.random.default_rng(seed))
        assert image.size == (2048, 32) and len(labels) == len(boxes) >= 2
        assert labels[0] in (0, 1, 2) and set(labels[1:]) == {labels[0] + 3}
        assert boxes[0][2] < 64 and min(box[0] for box in boxes[1:]) > 1100
        assert all(0 <= x1 < x2 <= 2048 and 0 <= y1 < y2 <= 32 for x1, y1, x2, y2 in boxes)

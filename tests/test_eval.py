"""The figures of eval.py compared with cases worked out by hand, and with pycocotools used directly."""
import contextlib
import io
import json
import os
import types

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import eval as ev
from baselines.detr import DETR, DETRConfig
from configurator import InputError
from data import DetectionDataset, letterbox
from model import HSVDET, HSVDETConfig, select_detections
from report import draw_plots

SHARED = os.path.join(os.path.dirname(__file__), '..', '..', 'shared', 'data')


def make_gt(*objects, images=(1, 2), categories=(3, 7)):
    """objects: (image id, category id, [x, y, w, h]); annotation ids start at 0, as in many files."""
    annotations = [dict(id=n, image_id=i, category_id=c, bbox=b, area=b[2] * b[3], iscrowd=0)
                   for n, (i, c, b) in enumerate(objects)]
    return dict(images=[dict(id=i, width=100, height=100) for i in images],
                categories=[dict(id=i, name=f'kind{i}') for i in categories], annotations=annotations)


def make_detections(*rows):
    """rows: (image id, category id, [x, y, w, h], score)"""
    return np.array([[i, *b, score, c] for i, c, b, score in rows], float).reshape(-1, 7)


FOUR = [(1, 3, [10, 10, 20, 20]), (1, 3, [60, 60, 30, 30]), (2, 3, [5, 5, 40, 40]), (2, 3, [50, 10, 20, 50])]


def test_ap_by_hand():
    coco_gt = make_gt(*FOUR)
    perfect = make_detections(*[(i, c, b, 0.9 - n / 10) for n, (i, c, b) in enumerate(FOUR)])
    E = ev.run_cocoeval(coco_gt, perfect)
    numbers = ev.coco_summary(E)
    assert list(numbers) == ev.KEYS and numbers['AP'] == numbers['AP50'] == numbers['AR100'] == pytest.approx(1)
    assert numbers['AR1'] == pytest.approx(0.5)                      # one detection per image and class
    assert numbers['AP_large'] is None                               # no object above 96x96: that is not 0
    assert json.loads(json.dumps(numbers)) == numbers
    assert ev.per_class(E, coco_gt)['kind7'] == dict(AP=None, AP50=None, AR100=None, recall50=None, objects=0,
                                                     score=None, P=None, R=None, F1=None)
    # half of them missed: precision 1 at the 51 of 101 recalls up to 0.5
    assert ev.coco_summary(ev.run_cocoeval(coco_gt, perfect[:2]))['AP'] == pytest.approx(51 / 101)
    # and none at all
    numbers = ev.coco_summary(ev.run_cocoeval(coco_gt, make_detections()))
    assert numbers['AP'] == numbers['AP50'] == numbers['AR100'] == 0
    assert ev.coco_summary(ev.run_cocoeval(make_gt(), perfect))['AP'] is None


def random_case(images=30, seed=0):
    rng = np.random.default_rng(seed)
    objects, rows = [], []
    for i in rng.permutation(images * 3)[:images].tolist():
        boxes = np.concatenate([rng.uniform(0, 400, (8, 2)), rng.uniform(5, 150, (8, 2))], 1)
        kinds = rng.choice([2, 5, 9], 8)
        objects += [(i, int(c), b.tolist()) for b, c in zip(boxes, kinds, strict=True)]
        for _ in range(30):
            k = rng.integers(8)
            category = int(kinds[k]) if rng.random() < 0.8 else 5
            box = (boxes[k] + rng.normal(0, 5, 4)).clip(1).tolist()
            rows.append((i, category, box, round(rng.random(), 2)))
    coco_gt = make_gt(*objects, images=sorted({i for i, _, _ in objects}), categories=(2, 5, 9, 11))
    for a in coco_gt['annotations']:
        a['id'], a['iscrowd'] = a['id'] + 1, int(rng.random() < 0.05)
    return coco_gt, make_detections(*rows)[rng.permutation(len(rows))]


def test_same_as_pycocotools():
    """Class by class, in any order of detections, with equal scores: to the last bit what pycocotools alone gives."""
    coco_gt, detections = random_case()
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = dict(coco_gt, info={})
        gt.createIndex()
        E = COCOeval(gt, gt.loadRes(detections), 'bbox')
        E.evaluate()
        E.accumulate()
        E.summarize()
    assert list(ev.coco_summary(ev.run_cocoeval(coco_gt, detections)).values()) == E.stats.tolist()


def test_best_f1_by_hand():
    """Scores 0.9 true, 0.8 false, 0.7 true and false, of 4 objects: F1 2/5, 2/6, none at the tie's first, 4/8."""
    boxes = [box for _, _, box in FOUR]
    coco_gt = make_gt(*FOUR, (2, 7, [80, 80, 10, 10]))
    rows = make_detections((1, 3, boxes[0], 0.9), (1, 3, [90, 0, 9, 9], 0.8), (1, 3, boxes[1], 0.7),
                           (2, 3, [90, 0, 9, 9], 0.7), (2, 7, [80, 80, 10, 10], 0.75))
    E = ev.run_cocoeval(coco_gt, rows)
    assert ev.best_f1(E, 3) == dict(score=0.7, P=0.5, R=0.5, F1=0.5)
    assert ev.best_f1(E, 7) == dict(score=0.75, P=1.0, R=1.0, F1=1.0)
    assert ev.best_f1(E) == dict(score=0.7, P=0.6, R=0.6, F1=0.6)    # 3 of 5 detections are true, 3 of 5 objects found
    # a lower threshold than the best one only adds false positives
    rows = np.concatenate([rows, make_detections((2, 3, [0, 90, 9, 9], 0.1), (1, 7, boxes[0], 0.2))])
    assert ev.best_f1(ev.run_cocoeval(coco_gt, rows)) == ev.best_f1(E)
    # an object that is a crowd region is none, and what matches it counts neither way
    coco_gt['annotations'][1]['iscrowd'] = 1
    E = ev.run_cocoeval(coco_gt, rows[:3])
    assert ev.best_f1(E, 3) == dict(score=0.9, P=1.0, R=0.33333, F1=0.5)
    # nothing to choose from
    assert set(ev.best_f1(ev.run_cocoeval(coco_gt, rows[:0])).values()) == {None}
    assert set(ev.best_f1(ev.run_cocoeval(make_gt(), rows)).values()) == {None}


def test_best_f1_in_a_crowd_of_more_than_100():
    """150 objects of one class, each found: AP sees 100 of them, as COCO's does, the threshold all."""
    boxes = [[20 * (i % 15), 20 * (i // 15), 10, 10] for i in range(150)]
    scores = np.linspace(0.9, 0.5, 150).round(4).tolist()
    coco_gt = make_gt(*((1, 3, box) for box in boxes))
    rows = make_detections(*((1, 3, box, score) for box, score in zip(boxes, scores, strict=True)))
    E = ev.run_cocoeval(coco_gt, rows)
    assert ev.best_f1(E) == dict(score=0.5, P=1.0, R=1.0, F1=1.0)
    assert ev.coco_summary(E)['AR100'] == pytest.approx(2 / 3)
    assert ev.mean_metrics(E)['AR100'] == pytest.approx(2 / 3, abs=1e-5)
    assert ev.coco_summary(E)['AP'] == pytest.approx(67 / 101)             # 101 recall levels, those up to 2/3 reached


def test_best_f1_is_the_best_threshold():
    """Compared with the confusion matrix of one class at every threshold there is."""
    coco_gt, detections = random_case(10)
    coco_gt = dict(coco_gt, annotations=[a for a in coco_gt['annotations'] if a['category_id'] == 5])
    detections = detections[detections[:, 6] == 5]
    best = ev.best_f1(ev.run_cocoeval(coco_gt, detections))
    f1 = {}
    for threshold in np.unique(detections[:, 5]):
        matrix = ev.confusion(coco_gt, detections, threshold)
        true_positives, predicted, objects = matrix[1, 1], matrix[:, 1].sum(), matrix[1].sum()
        f1[threshold] = 2 * true_positives / (predicted + objects)
    assert best['F1'] == pytest.approx(max(f1.values()), abs=1e-5) and best['score'] == max(f1, key=f1.get)


def test_occlusion_by_hand():
    heavy = [(1, 3, [10, 10, 20, 20]), (1, 7, [10, 10, 20, 16])]     # IoU 0.8, of different classes
    apart = [(1, 3, [70, 70, 20, 20]),
             (2, 3, [0, 0, 20, 20]), (2, 3, [15, 0, 20, 20]),        # IoU 5/35 = 0.14
             (2, 3, [60, 60, 20, 20]), (2, 3, [60, 70, 20, 20])]     # IoU 1/3
    coco_gt = make_gt(*heavy, *apart)
    detections = make_detections((1, 3, [40, 10, 20, 20], 0.95), (1, 3, [70, 70, 20, 20], 0.9),
                                 (1, 3, [10, 10, 20, 20], 0.8))
    table = ev.under_occlusion(coco_gt, detections)
    assert [row['objects'] for row in table.values()] == [1, 2, 2, 2, 0]
    far, light, middle, over, crowd = table.values()
    # the false positive counts, what matches an object of another bin does not: false, true -> precision 1/2 throughout
    assert far['AP50'] == far['AP'] == pytest.approx(0.5) and far['recall50'] == 1
    # class 3: its one object, after one false positive; class 7: nothing detected
    assert over['AP50'] == pytest.approx((0.5 + 0) / 2) and over['recall50'] == pytest.approx(0.5)
    assert light['recall50'] == middle['recall50'] == light['AP50'] == 0
    assert crowd['AP'] is None
    # 21 objects in image 2 make a crowd; image 1 and its false positive stay outside
    many = [(2, 3, [4 * n, 90, 3, 5]) for n in range(21)]
    detections = np.concatenate([detections, make_detections(*[(*m, 0.5) for m in many])])
    table = ev.under_occlusion(make_gt(*heavy, *many), detections)
    assert table[ev.BINS[4]] == dict(AP=1.0, AP50=1.0, AR100=1.0, recall50=1.0, objects=21)


def test_duplicates_by_hand():
    """The first object has two detections, and a third of low score; another class, or a false one, is no duplicate."""
    one, two = FOUR[0][2], FOUR[1][2]
    rows = make_detections((1, 3, one, 0.9), (1, 3, [12, 10, 20, 20], 0.8), (1, 3, one, 0.2), (1, 7, one, 0.9),
                           (1, 3, two, 0.9), (1, 3, [90, 0, 9, 9], 0.9))
    assert ev.duplicates(make_gt(*FOUR), rows) == 1 / 4
    assert ev.duplicates(make_gt(*FOUR), rows, conf=0.1) == 2 / 4
    assert ev.duplicates(make_gt(*FOUR), rows[:0]) == 0


def test_confusion_by_hand():
    coco_gt = make_gt(*FOUR[:3], (2, 7, [50, 10, 20, 50]))
    rows = make_detections((1, 3, FOUR[0][2], 0.9), (1, 7, FOUR[1][2], 0.8), (2, 7, [50, 10, 20, 50], 0.7),
                           (2, 7, [80, 80, 10, 10], 0.6), (2, 3, FOUR[2][2], 0.1))    # the last is below 0.25
    matrix = ev.confusion(coco_gt, rows)
    assert matrix.tolist() == [[1, 1, 1], [0, 1, 0], [0, 1, 0]]


def test_match_at_half_by_hand():
    """A match, a second detection of it, one of another class, one in a crowd region; and who was missed."""
    boxes = [box for _, _, box in FOUR]
    coco_gt = make_gt(*FOUR)
    coco_gt['annotations'][2]['iscrowd'] = 1
    rows = make_detections((1, 3, boxes[0], 0.9), (1, 3, boxes[0], 0.8), (1, 7, boxes[1], 0.7), (2, 3, boxes[2], 0.6))
    matched, missed = ev.match_at_half(coco_gt, rows)
    assert matched.tolist() == [0, -1, -1, -2] and missed.tolist() == [False, True, False, True]
    matched, missed = ev.match_at_half(coco_gt, rows, by_class=False)
    assert matched.tolist() == [0, -1, 1, -2] and missed.tolist() == [False, False, False, True]


# --- with images -----------------------------------------------------------------------------------------------------

class Oracle(torch.nn.Module):
    """Knows every image by its colour and predicts its objects where the letterbox put them, or `off` pixels away."""

    nms, fixed_imgsz = True, None

    def __init__(self, dataset, imgsz, off=0.0):
        super().__init__()
        self.dataset, self.names, self.imgsz, self.off = dataset, dataset.names, imgsz, off

    def forward(self, images, targets=None):
        H, W = images.shape[2:]
        assert not self.training
        boxes, scores = torch.zeros(len(images), 9, 4), torch.zeros(len(images), 9, len(self.names))
        for n, image in enumerate(images):
            i = round((image[0, H // 2, W // 2] * 255 / 20).item())
            longest = max(self.imgsz)
            (w, h), k = self.dataset.sizes[i], len(self.dataset.boxes[i])
            scale = min(W / w, H / h, longest / max(w, h))
            corner = (W - round(w * scale)) // 2, (H - round(h * scale)) // 2
            boxes[n, :k] = torch.from_numpy(self.dataset.boxes[i]) * scale + torch.tensor(corner * 2) + i * self.off
            scores[n, range(k), self.dataset.labels[i]] = 0.9
        return (boxes, scores), {}

    def postprocess(self, raw, conf, iou, max_det, multi_label):
        return [select_detections(*pair, conf, iou, max_det, multi_label, self.nms) for pair in zip(*raw, strict=True)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Six images of several shapes, each of one colour, with two objects; category ids 3 and 7."""
    path = tmp_path_factory.mktemp('set')
    sizes = [(100, 60), (60, 100), (90, 90), (120, 60), (64, 64), (100, 60)]
    objects = []
    os.mkdir(path / 'images')
    for i, (w, h) in enumerate(sizes):
        Image.new('RGB', (w, h), (20 * i,) * 3).save(path / 'images' / f'{i}.png')
        objects += [(10 + i, 3, [0, 0, w / 2, h / 3]), (10 + i, 7, [w / 2, h / 2, w / 2, h / 2])]
    coco_gt = make_gt(*objects, images=range(10, 16))
    coco_gt['images'] = [dict(id=10 + i, file_name=f'{i}.png', width=w, height=h) for i, (w, h) in enumerate(sizes)]
    (path / 'val.json').write_text(json.dumps(coco_gt))
    return path


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = HSVDET(HSVDETConfig('n', 2, '-SS'))
    model.imgsz = (64, 64)
    return model


def test_letterbox_and_back(folder):
    dataset = DetectionDataset(str(folder / 'val.json'))
    oracle = Oracle(dataset, (128, 128)).train()
    oracle.frozen = torch.nn.Linear(1, 1).eval()
    for settings in (dict(), dict(rect=True), dict(rect=True, antialias=False, batch_size=1), dict(antialias=False)):
        settings = dict(dict(batch_size=4), **settings)
        assert ev.evaluate(oracle, dataset, 128, verbose=False, **settings)['AP'] == pytest.approx(1)
        assert oracle.training and not oracle.frozen.training


def test_letterbox_as_of_the_published_figures():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
    canvas, scale, corner = letterbox(image, (32, 64), longest=32, antialias=False)
    assert canvas.shape == (32, 64, 3) and scale == 0.5 and corner == (16, 4)
    mean = np.asarray(image, int).reshape(24, 2, 32, 2, 3).sum((1, 3))
    assert np.array_equal(canvas[4:28, 16:48], (mean + 2) // 4)      # at one half, bilinear is the mean of 2x2
    rows = np.array([[16, 4, 48, 28, 0.5, 1], [0, 0, 99, 99, 0.4, 0]], float)
    rows = ev.undo_letterbox(rows, scale, corner, (64, 48))
    assert rows.tolist() == [[0, 0, 64, 48, 0.5, 1], [0, 0, 64, 48, 0.4, 0]]


def one_of_two(rank, path, model, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{path}/rendezvous', rank=rank, world_size=2)
    dataset = DetectionDataset(f'{path}/val.json')
    numbers = ev.evaluate(model, dataset, 64, batch_size=2, rect=True, rank=rank, world_size=2, verbose=False)
    queue.put((rank, numbers))
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_one(folder):
    dataset = DetectionDataset(str(folder / 'val.json'))
    model = Oracle(dataset, (64, 64), off=0.5)
    settings = dict(batch_size=2, rect=True, verbose=False)
    alone = ev.evaluate(model, dataset, 64, **settings)
    assert 0.2 < alone['AP'] < 0.9
    (whole,), _ = ev.predict_dataset(model, dataset, 64, **settings)
    parts = [ev.predict_dataset(model, dataset, 64, rank=r, world_size=2, **settings)[0][0] for r in range(2)]
    assert np.array_equal(np.unique(whole, axis=0), np.unique(np.concatenate(parts), axis=0))
    assert len(whole) == sum(map(len, parts))
    context = torch.multiprocessing.get_context('spawn')
    queue = context.SimpleQueue()
    torch.multiprocessing.spawn(one_of_two, (str(folder), model, queue), nprocs=2)
    assert dict(queue.get() for _ in range(2)) == {0: alone, 1: alone}


def test_evaluate_finds_the_threshold(folder):
    """evaluate() has best F1 too, over all classes and by name, as plain numbers that a checkpoint can hold."""
    dataset = DetectionDataset(str(folder / 'val.json'))
    numbers = ev.evaluate(Oracle(dataset, (64, 64)), dataset, 64, verbose=False)
    best = numbers['best_f1']
    assert (best['P'], best['R'], best['F1']) == (1, 1, 1) and best['score'] == pytest.approx(0.9)
    assert set(best['by_class']) == {'kind3', 'kind7'} and json.loads(json.dumps(numbers)) == numbers
    assert best['by_class']['kind7'] == dict(score=best['score'], P=1.0, R=1.0, F1=1.0)


def run(monkeypatch, capsys, **settings):
    """python eval.py --setting=value ..., without a new process -> the json of its last line, all it printed."""
    for name, value in settings.items():
        monkeypatch.setattr(ev, name, value)
    ev.main()
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def test_classes_in_the_order_of_the_model(folder):
    """Whatever order the model has them in, and however many more; a set with other classes stays as it is."""
    data = ev.open_data(str(folder / 'val.json'), ['kind7', 'other', 'kind3'])
    assert data.names == ['kind7', 'other', 'kind3'] and data.category_ids[0] == 7 and data.category_ids[2] == 3
    numbers = ev.evaluate(Oracle(data, (64, 64)), data, (64, 64), verbose=False)
    assert numbers['AP'] > 0.99
    assert ev.open_data(str(folder / 'val.json'), ['kind7', 'other']).names == ['kind3', 'kind7']


def test_script(folder, model, tmp_path, monkeypatch, capsys):
    model.names = ['kind3', 'kind7']
    model.save(tmp_path / 'best.pt')
    common = dict(weights=str(tmp_path / 'best.pt'), data=str(folder / 'val.json'), out_dir=str(tmp_path / 'out'))
    first, out = run(monkeypatch, capsys, **common, by_class=True, nms_iou=(0.7,))
    assert first['images'] == 6 and 'images/s' in out and 'best F1' in out
    assert set(first['by_class']) == {'kind3', 'kind7'} and len(first['occlusion']) == 5
    assert set(first['best_f1']) == {'score', 'P', 'R', 'F1'}
    (tmp_path / 'alone.json').write_text((folder / 'val.json').read_text())           # no image beside it, none needed
    found = tmp_path / 'out' / 'detections.json'
    found.write_text(found.read_text() + '\n')                                 # as another program may write it
    again, _ = run(monkeypatch, capsys, data=str(tmp_path / 'alone.json'), from_json=str(found))
    assert found.read_text().endswith('\n'), 'the user\'s file is not written anew'
    # the boxes in the file are rounded
    assert [again[key] for key in ev.KEYS] == pytest.approx([first[key] for key in ev.KEYS], abs=2e-3)
    with pytest.raises(InputError, match='nowhere.json: No such file or directory, check the path'):
        run(monkeypatch, capsys, data='nowhere.json')
    sweep, out = run(monkeypatch, capsys, **common, nms_iou=(0.3, 0.7), from_json='')
    assert set(sweep['sweep']) == {'0.3', '0.7'} and sweep['AP'] == max(sweep['sweep'].values())
    assert 'NMS IoU' in out
    _, out = run(monkeypatch, capsys, **common, nms_iou=0.7, without='block4,p5')
    assert 'attention block block4 taken out' in out and 'attention block block5 taken out' in out
    with pytest.raises(InputError, match='no such attention block, it has block4, block5'):
        run(monkeypatch, capsys, **common, without='block3')
    monkeypatch.setattr(ev, 'without', '')
    assert ev.load_model(str(tmp_path / 'best.pt'), nms=False).best_f1 is None         # the other answers' threshold
    monkeypatch.setattr(ev, 'nms', False)
    ev.main()
    assert 'its duplicates stay' in capsys.readouterr().err
    monkeypatch.setattr(ev, 'nms', True)
    for settings, says in ((dict(batch_size=0), '--batch_size=0: must be above 0'), (dict(nms_iou=()), 'one threshold'),
                           (dict(out_dir=str(tmp_path / 'best.pt')), 'best.pt cannot be written')):
        with pytest.raises(InputError, match=says), monkeypatch.context() as some:
            run(some, capsys, **common | settings)
    none, out = run(monkeypatch, capsys, **common, conf=2.0)
    assert none['AP'] == 0 and 'no detections' in out


@torch.no_grad()
def test_blocks_taken_out(tmp_path):
    """A network whose blocks are taken out equals the one that is built without them, bit for bit, fused or not."""
    torch.manual_seed(0)
    model, x = HSVDET(HSVDETConfig('n', 2, 'SSS', k=8)), torch.rand(1, 3, 64, 64)
    for block in model.blocks().values():
        block.gate.fill_(1.0)
    model.save(tmp_path / 'a.pt')
    for fuse in (True, False):
        whole, cut = (ev.load_model(str(tmp_path / 'a.pt'), fuse=fuse) for _ in range(2))
        bare = ev.load_model(str(tmp_path / 'a.pt'), fuse=fuse, attn='---')
        ev.remove_blocks(cut, ['block3', 'p5', 'block4'])
        # the maps that the head sees, where no bias hides small differences
        for a, b, c in zip(*(m.forward_features(x) for m in (whole, cut, bare)), strict=True):
            assert torch.equal(b, c) and not torch.equal(a, b)
    with pytest.raises(InputError, match='none at all'):
        ev.remove_blocks(bare, ['p4'])


@torch.no_grad()
def test_rtdetr(tmp_path):
    """The architecture comes from the file; a DETR needs no NMS, and its sparse encoder block can be taken out."""
    small = dict(scale='n', num_classes=2, hidden=16, detr_heads=2, ffn=16, decoder_layers=1, queries=5)
    for encoder_attn in ('S', 'F'):
        DETR(DETRConfig(**small, encoder_attn=encoder_attn)).save(tmp_path / f'{encoder_attn}.pt')
    model, x = ev.load_model(str(tmp_path / 'S.pt')), torch.rand(1, 3, 64, 64)
    assert type(model) is DETR and model.nms is False and not model.training
    before = model(x)[0]
    ev.remove_blocks(model, ['block5'])
    assert not torch.equal(before[1], model(x)[0][1])
    with pytest.raises(InputError, match='--without=p4'):
        ev.remove_blocks(ev.load_model(str(tmp_path / 'S.pt')), ['p4'])
    with pytest.raises(InputError, match='none at all'):
        ev.remove_blocks(ev.load_model(str(tmp_path / 'F.pt')), ['p5'])
    with pytest.raises(InputError, match='--attn=-SS'):
        ev.load_model(str(tmp_path / 'F.pt'), attn='-SS')
    # early exit and fewer queries: one layer's answers are those of the first of two, three queries the best three
    torch.manual_seed(0)
    model = DETR(DETRConfig(**small | dict(decoder_layers=2)))
    for p in model.head.parameters():
        p.normal_(0, 0.3)
    model.save(tmp_path / 'two.pt')
    two, one, three = (ev.load_model(str(tmp_path / 'two.pt'), **some) for some in ({}, dict(eval_layers=1),
                                                                                    dict(queries=3)))
    whole, first, few = (m(x)[0] for m in (two, one, three))
    assert not torch.equal(first[0], whole[0]) and few[0].shape[1] == 3 and whole[0].shape[1] == 5
    HSVDET(HSVDETConfig('n', 2)).save(tmp_path / 'a.pt')
    with pytest.raises(InputError, match='--eval_layers=1'):
        ev.load_model(str(tmp_path / 'a.pt'), eval_layers=1)


def test_nms_or_one_to_one(tmp_path):
    """nms=False: the one-to-one head where there is one; nothing is suppressed."""
    model = HSVDET(HSVDETConfig('n', 2, '---', one2one=True))
    torch.nn.init.normal_(model.one2one_head.cls[0][-1].weight)
    model.save(tmp_path / 'a.pt')
    many, one = ev.load_model(str(tmp_path / 'a.pt')), ev.load_model(str(tmp_path / 'a.pt'), nms=False)
    assert many.nms is True and one.nms is False
    with torch.no_grad():
        x = torch.rand(1, 3, 64, 64)
        assert not torch.equal(one(x)[0][0], many(x)[0][0])
    image = [np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)]
    for model, fewer in ((many, True), (one, False)):
        (loose, strict), _, _ = ev.predict(model, image, (1.0, 0.01), 0.0, max_det=1000)
        assert (len(strict[0]) < len(loose[0])) == fewer


def test_plots(folder, tmp_path):
    pytest.importorskip('matplotlib')
    coco_gt, detections = random_case(5)
    draw_plots(ev.run_cocoeval(coco_gt, detections), coco_gt, detections, tmp_path)
    draw_plots(ev.run_cocoeval(coco_gt, detections[:0]), coco_gt, detections[:0], tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {'precision_recall.png', 'confusion.png'}


@pytest.mark.parametrize('text, message', [
    ('{"a": 1}', 'list of COCO results'), ('[{"image_id": 10}]', 'KeyError'), ('[1, 2]', 'list of COCO results'),
    ('[', 'list of COCO results'),
    ('[{"image_id": 10, "category_id": 3, "bbox": [1, 2, 3], "score": 1}]', 'list of COCO results'),
    ('[{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 1}]', 'image ids'),
    ('[{"image_id": 10, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]', 'category ids')])
def test_from_json_bad_file(text, message, folder, tmp_path):
    coco_gt = json.loads((folder / 'val.json').read_text())
    (tmp_path / 'd.json').write_text(text)
    with pytest.raises(InputError, match=message):
        ev.read_detections(str(tmp_path / 'd.json'), coco_gt)
    (tmp_path / 'd.json').write_text('[]')
    assert ev.read_detections(str(tmp_path / 'd.json'), coco_gt).shape == (0, 7)


def test_bad_input(folder, model, tmp_path, capsys):
    dataset = DetectionDataset(str(folder / 'val.json'))
    other = HSVDET(HSVDETConfig('n', 3, '---'))
    for message, call in (
            ('3 classes', lambda: ev.evaluate(other, dataset, 64, verbose=False)),
            ('multiples of 32', lambda: ev.evaluate(model, dataset, 100, verbose=False)),
            ('dtype', lambda: ev.evaluate(model, dataset, 64, dtype='int8', verbose=False)),
            ('not found', lambda: ev.load_model('nowhere.pt')),
            ('must be cpu, cuda', lambda: ev.load_model(__file__, 'auto')),
            ('ground truth', ev.main)):
        with pytest.raises(InputError, match=message):
            call()
    coco_gt = json.loads((folder / 'val.json').read_text())            # annotations made for other images
    for image in coco_gt['images'][1:]:
        image['width'] += 1
    (tmp_path / 'val.json').write_text(json.dumps(coco_gt))
    images = str(folder / 'images')
    dataset = DetectionDataset(str(tmp_path / 'val.json'), images=images)
    ev.evaluate(model, dataset, 64, verbose=False)
    assert '5 images cannot be used' in capsys.readouterr().err
    coco_gt['images'][0]['width'] += 1
    (tmp_path / 'val.json').write_text(json.dumps(coco_gt))
    with pytest.raises(InputError, match='not one image'):
        ev.evaluate(model, DetectionDataset(str(tmp_path / 'val.json'), images=images), 64, verbose=False)


def tiny_onnx(path, batch, size, with_nms=False, **metadata):
    """A graph as export.py writes it: each image gets the box (8, 8, 24, 24), with its brightness as the score."""
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    h = onnx.helper
    const = {'axes': np.array([1, 2, 3]), 'box': np.array([[[8, 8, 24, 24]]], np.float32),
             'two': np.array([-1, 1, 1], np.int64), 'zero': np.zeros(1, np.float32)}
    nodes = [h.make_node('ReduceMean', ['images', 'axes'], ['mean'], keepdims=0),
             h.make_node('Reshape', ['mean', 'two'], ['score']),
             h.make_node('Mul', ['score', 'zero'], ['nothing']), h.make_node('Add', ['box', 'nothing'], ['boxes'])]
    outputs = [('boxes', [batch, 1, 4]), ('scores', [batch, 1, 2])]
    if with_nms:
        nodes += [h.make_node('Concat', ['boxes', 'score', 'nothing'], ['detections'], axis=2)]
        outputs = [('detections', [batch, 1, 6])]
    else:
        nodes += [h.make_node('Concat', ['score', 'nothing'], ['scores'], axis=2)]
    graph = h.make_graph(nodes, 'tiny', [h.make_tensor_value_info('images', 1, [batch, 3, *size])],
                         [h.make_tensor_value_info(name, 1, shape) for name, shape in outputs],
                         [onnx.numpy_helper.from_array(v, k) for k, v in const.items()])
    model = h.make_model(graph, opset_imports=[h.make_opsetid('', 18)], ir_version=10)
    metadata = dict(names='["kind3", "kind7"]', stride='32', imgsz='[64, 64]') | metadata
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return ev.load_model(str(path))


def test_onnx(folder, tmp_path):
    dataset = DetectionDataset(str(folder / 'val.json'))
    free = tiny_onnx(tmp_path / 'free.onnx', 'B', ('H', 'W'))
    assert free.names == ['kind3', 'kind7'] and free.nms and free.blocks() == {} and free.best_f1 is None
    best = dict(score=0.3, P=0.5, R=0.5, F1=0.5, by_class={})
    assert tiny_onnx(tmp_path / 'best.onnx', 1, (64, 64), best_f1=json.dumps(best)).best_f1 == best
    assert ev.input_shape(free, 0) == (64, 64) and ev.input_shape(free, 128) == (128, 128)
    fixed = tiny_onnx(tmp_path / 'fixed.onnx', 4, (64, 64))          # six images in batches of four, the last padded
    inside = tiny_onnx(tmp_path / 'inside.onnx', 4, (64, 64), with_nms=True)
    tables = [ev.predict_dataset(m, dataset, 0, batch_size=3, conf=0.0, verbose=False)[0][0]
              for m in (free, fixed, inside)]
    assert len(tables[0]) == 6 and np.allclose(tables[0], tables[1]) and np.allclose(tables[0], tables[2], atol=1e-5)
    assert set(tables[0][:, 6]) == {3} and 0.2 < tables[0][:, 5].max() < 0.5
    with pytest.raises(InputError, match='exported at'):
        ev.input_shape(fixed, 128)
    (tmp_path / 'broken.onnx').write_bytes(b'no')
    with pytest.raises(InputError, match='onnxruntime can run'):
        ev.load_model(str(tmp_path / 'broken.onnx'))


def test_onnx_needs_nms_or_not(tmp_path):
    for metadata in (dict(nms='False', arch='rtdetr'), dict(nms='False')):
        assert not tiny_onnx(tmp_path / 'a.onnx', 1, (64, 64), **metadata).nms
    assert tiny_onnx(tmp_path / 'a.onnx', 1, (64, 64), nms='True').nms
    assert not ev.load_model(str(tmp_path / 'a.onnx'), nms=False).nms


def test_onnx_providers(monkeypatch, capsys):
    """onnxruntime gets the GPU asked for, without TF32; a warning where the session runs on the CPU after all."""
    onnxruntime = pytest.importorskip('onnxruntime')
    given, running = [], ['CUDAExecutionProvider', 'CPUExecutionProvider']
    entry = types.SimpleNamespace(name='images', type='tensor(float)', shape=['B', 3, 'H', 'W'])

    def session(path, options, providers):
        given.append(providers)
        return types.SimpleNamespace(
            get_providers=lambda: running, get_inputs=lambda: [entry], get_outputs=lambda: [],
            get_modelmeta=lambda: types.SimpleNamespace(custom_metadata_map=dict(names='["a"]')))

    monkeypatch.setattr(onnxruntime, 'InferenceSession', session)
    monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda: ['TensorrtExecutionProvider', *running])
    for device, number in (('cuda', 0), ('cuda:1', 1)):
        ev.OnnxModel('a.onnx', device)
        assert given.pop() == [('CUDAExecutionProvider', dict(device_id=number, use_tf32=0)), 'CPUExecutionProvider']
    assert capsys.readouterr().err == ''
    ev.OnnxModel('a.onnx', 'cpu')
    assert given.pop() == ['CPUExecutionProvider'] and capsys.readouterr().err == ''
    running = ['CPUExecutionProvider']                               # CUDA's libraries did not load
    ev.OnnxModel('a.onnx', 'cuda')
    assert 'a.onnx runs on the CPU' in capsys.readouterr().err
    assert given.pop() == ['CPUExecutionProvider']


@pytest.mark.skipif(not os.path.isdir(SHARED), reason='needs ../shared/data: blood cells, YOLOv8 weights')
@pytest.mark.parametrize('rect, expected', [(True, (0.564, 0.871, 0.621)), (False, (0.560, 0.865, 0.619))])
def test_yolov8_gets_its_ap(rect, expected):
    model = ev.load_model(os.path.join(SHARED, 'weights', 'yolov8n_bccd.pt'))
    dataset = DetectionDataset(os.path.join(SHARED, 'bccd', 'test.json'))
    numbers = ev.evaluate(model, dataset, 320, rect=rect, antialias=False, verbose=False)
    assert [numbers[key] for key in ('AP', 'AP50', 'AP75')] == pytest.approx(expected, abs=6e-4)

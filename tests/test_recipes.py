"""The code blocks of docs/recipes.md, run as they stand, with a detector that knows red from blue; config/idd.py."""
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detect
from checkpoint import read_checkpoint
from labels import read_labels
from model import HSVDET, HSVDETConfig
from video import VideoReader, VideoWriter

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / 'docs' / 'recipes.md').read_text(encoding='utf-8')
BLOCKS = dict(re.findall(r'^## (\w+).*?^```python\n(.*?)^```', TEXT, re.DOTALL | re.MULTILINE))


class RedFinder(torch.nn.Module):
    """Finds each red square, by its pixels; blue ones would be red if the channels were the wrong way round."""
    names, imgsz, fixed_imgsz, rect = ['square'], (640, 640), None, True

    def forward(self, images):
        return images, {}

    def postprocess(self, images, *settings):
        return [self.squares((image[0] > 0.7) & (image[1:] < 0.3).all(0)) for image in images]

    def squares(self, red):
        """(H, W) bool -> (n, 6): the squares here never share a row."""
        rows, runs = red.any(1).tolist() + [False], []
        for y, full in enumerate(rows):
            if full and (y == 0 or not rows[y - 1]):
                top = y
            if not full and y and rows[y - 1]:
                x = red[top:y].any(0).nonzero()[:, 0]
                runs.append([x.min(), top, x.max() + 1, y, 0.9, 0])
        return torch.tensor(runs, dtype=torch.float32).reshape(-1, 6)


def picture(size, red, blue):
    image = Image.new('RGB', size, 'gray')
    for squares, colour in ((red, 'red'), (blue, 'blue')):
        for x, y, side in squares:
            image.paste(colour, (x, y, x + side, y + side))
    return image


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(detect, 'load_model', lambda path: RedFinder())

    def run(name):
        namespace = {}
        exec(compile(BLOCKS[name], f'docs/recipes.md, {name}', 'exec'), namespace)
        return namespace
    return run


def test_tracking(run):
    """Two squares that move get one number each, the same from the first frame to the last."""
    pytest.importorskip('av')
    pytest.importorskip('trackers')
    with VideoWriter('clip.mp4', 25) as writer:
        for i in range(12):
            red = [(40 + 8 * i, 40, 64), (400 - 8 * i, 160, 64)]
            writer.write(picture((640, 320), red, [(300, 240, 64)]), i / 25)
    seen = {}

    def annotate(self, image, tracks, *labels):
        for box, i in zip(tracks.xyxy, tracks.tracker_id, strict=True):
            seen.setdefault(int(i), []).append(box)
        return original(self, image, tracks, *labels)

    import supervision
    original = supervision.BoxAnnotator.annotate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervision.BoxAnnotator, 'annotate', annotate)
        run('Track')
    assert len(seen) == 2 and all(len(boxes) >= 9 for boxes in seen.values())
    for boxes, step, top in zip(sorted(seen.values(), key=lambda boxes: boxes[0][1]), (8, -8), (40, 160), strict=True):
        assert np.allclose(np.diff([box[0] for box in boxes]), step, atol=4) and abs(boxes[-1][1] - top) < 4
    with VideoReader('tracks.mp4') as reader:
        frames = list(reader)
    assert len(frames) == 12 and np.allclose([seconds for _, seconds, _ in frames], np.arange(12) / 25, atol=1e-4)


def test_slicing(run):
    """One box for each red square, those on the edges of slices included, and none for the blue ones."""
    pytest.importorskip('supervision')
    red = [(20, 30, 40), (620, 100, 40), (1000, 200, 40), (500, 500, 60), (1130, 612, 60)]
    picture((1400, 900), red, [(300, 300, 60)]).save('large.jpg', quality=95)
    objects = run('Slice')['objects']
    assert len(objects) == 5
    boxes = sorted(objects.xyxy.tolist(), key=lambda box: box[1])
    assert np.allclose(boxes, [(x, y, x + side, y + side) for x, y, side in red], atol=3)


def test_opencv(run):
    cv2 = pytest.importorskip('cv2')
    picture((600, 400), [(100, 50, 80)], [(300, 200, 80)]).save('large.jpg', quality=95)
    rows = run('Images')['rows']
    assert np.allclose(rows, [(100, 50, 180, 130, 0.9, 0)], atol=3)
    assert np.abs(cv2.imread('boxes.jpg')[130, 140].astype(int) - (0, 0, 255)).max() < 60


IDD = ('animal', 'autorickshaw', 'bicycle', 'bus', 'car', 'caravan', 'motorcycle', 'person', 'rider', 'traffic light',
       'traffic sign', 'trailer', 'train', 'truck', 'vehicle fallback')


def make_idd(root):
    """Three frames of two routes as IDD stores them; val has one class of the fifteen."""
    for n, (stem, classes) in enumerate({'frontFar/route1/1': IDD[:8], 'frontFar/route1/2': IDD[8:],
                                         'highquality/route2/1': ['car']}.items()):
        (root / 'JPEGImages' / stem).parent.mkdir(parents=True, exist_ok=True)
        (root / 'Annotations' / stem).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(n).integers(0, 256, (108, 192, 3), np.uint8)
        Image.fromarray(pixels).save(root / 'JPEGImages' / f'{stem}.jpg')
        objects = ''.join(f'<object><name>{name}</name><bndbox><xmin>{20 * i}</xmin><ymin>10</ymin><xmax>{20 * i + 18}'
                          '</xmax><ymax>60</ymax></bndbox></object>' for i, name in enumerate(classes))
        (root / 'Annotations' / f'{stem}.xml').write_text(
            f'<annotation><size><width>192</width><height>108</height></size>{objects}</annotation>')
    (root / 'train.txt').write_text('frontFar/route1/1\nfrontFar/route1/2\n')
    (root / 'val.txt').write_text('highquality/route2/1\n')


def test_idd_is_read(tmp_path):
    """Fifteen classes, in the order of the training set for both lists."""
    make_idd(tmp_path)
    train = read_labels(str(tmp_path / 'train.txt'))
    val = read_labels(str(tmp_path / 'val.txt'), names=train.names)
    assert tuple(train.names) == tuple(val.names) == IDD and not train.issues and not val.issues
    assert [len(labels) for labels in train.labels] == [8, 7] and val.labels[0].tolist() == [IDD.index('car')]
    assert train.boxes[1][6].tolist() == [120, 10, 138, 60]


@pytest.mark.slow
def test_idd(tmp_path):
    """Two steps of the recipe, at scale n, on a tree of IDD's shape, from weights that know 80 other classes."""
    make_idd(tmp_path)
    HSVDET(HSVDETConfig('n', 80, '-SS')).save(tmp_path / 'coco.pt')
    settings = dict(train_data=tmp_path / 'train.txt', val_data=tmp_path / 'val.txt', out_dir=tmp_path / 'out',
                    init_from=tmp_path / 'coco.pt', scale='n', imgsz='(64,96)', batch_size=2, grad_accum=1, max_steps=2,
                    workers=0, device='cpu', dtype='float32', epochs=6, checkpointing=False)
    done = subprocess.run([sys.executable, 'train.py', 'config/idd.py', *(f'--{k}={v}' for k, v in settings.items())],
                          cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r'detect_head.cls starts fresh', done.stdout), done.stdout
    saved = read_checkpoint(str(tmp_path / 'out' / 'ckpt.pt'))
    assert tuple(saved['names']) == IDD and saved['step'] == 2 and tuple(saved['imgsz']) == (64, 96)

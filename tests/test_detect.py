"""detect.py: the same boxes by every road, in the pixels of the originals; and what it does with files that are no images."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import detect
from data import InputError, letterbox, rect_shape
from model import HSVDET, HSVDETConfig

SCORE = 0.7


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """A random network that sees things, some of them with scores above SCORE; weights at .path"""
    torch.manual_seed(0)
    model = HSVDET(HSVDETConfig('n', 3, '-SS', k=9))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0                                    # statistics from the one batch that follows: without
    model.train()(torch.rand(4, 3, 12, 12).repeat_interleave(8, 2).repeat_interleave(8, 3))          # them a random
    for branch in model.detect_head.cls:                             # network is blind
        torch.nn.init.constant_(branch[-1].bias, -2)
        torch.nn.init.normal_(branch[-1].weight, std=0.3)
    model.imgsz, model.names = (96, 96), ['cat', 'dog', 'bird']
    model.path = str(tmp_path_factory.mktemp('weights') / 'best.pt')
    model.save(model.path)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    """Four noisy images of three shapes; the last one lies on its side in the file, and EXIF says so."""
    rng = np.random.default_rng(0)
    for i, (w, h) in enumerate([(120, 80), (80, 120), (200, 130), (120, 80)]):
        image = Image.fromarray(rng.integers(0, 256, (h // 10, w // 10, 3), np.uint8)).resize((w, h), Image.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 3 else 1                            # 6: turn it a quarter clockwise
        image.save(tmp_path / f'{i}.jpg', quality=95, exif=exif)
    return tmp_path


def run(monkeypatch, model, source, out, **knobs):
    for name, value in dict(source=str(source), weights=model.path, out_dir=str(out), conf=SCORE, save_json=True, save_txt=True, **knobs).items():
        monkeypatch.setattr(detect, name, value)
    return detect.main()


def test_python_and_script_agree(model, folder, tmp_path, monkeypatch):
    """model.detect on an array, detect_images on arrays and on PIL images, and the script's json: the same boxes."""
    assert run(monkeypatch, model, folder, tmp_path / 'out', batch_size=3) == 0
    listed = json.loads((tmp_path / 'out' / 'detections.json').read_text())
    images = [detect.load_image(str(folder / f'{i}.jpg')) for i in range(4)]
    assert images[3].size == (80, 120)
    together = detect.detect_images(model, [np.asarray(image) for image in images], conf=SCORE)
    for i, image in enumerate(images):
        array, scale, (left, top) = letterbox(np.asarray(image), rect_shape([image.size], 96, pad=0))
        (rows,) = model.detect(torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255, conf=SCORE, iou=0.7)
        rows = rows.double().numpy()
        rows[:, :4] = ((rows[:, :4] - [left, top, left, top]) / scale).clip(0, image.size * 2)
        assert 5 < len(rows) < 300
        (alone,) = detect.detect_images(model, [image], conf=SCORE)
        mine = np.array([[*d['bbox'], d['score'], d['category_id']] for d in listed if d['image_id'] == i])         # names are numbers: 0.jpg is 0
        mine[:, 2:4] += mine[:, :2]
        mine[:, 5] -= 1
        for other, close in ((alone, 1e-3), (together[i], 1e-3), (mine, 5e-3)):
            assert rows.shape == other.shape and np.abs(rows - other).max() < close
        # YOLO text, and a picture of the original's size
        lines = np.loadtxt(tmp_path / 'out' / 'labels' / f'{i}.txt')
        w, h = image.size
        assert np.allclose(lines[:, 1:3] * (w, h), (mine[:, :2] + mine[:, 2:4]) / 2, atol=2e-3) and np.array_equal(lines[:, 0], mine[:, 5])
        assert np.allclose(lines[:, 3:5] * (w, h), mine[:, 2:4] - mine[:, :2], atol=2e-3)
        assert Image.open(tmp_path / 'out' / f'{i}.jpg').size == image.size
    assert {d['category'] for d in listed} <= set(model.names) and {d['file_name'] for d in listed} == {f'{i}.jpg' for i in range(4)}


def test_unreadable_files(model, folder, tmp_path):
    """The script as a user starts it: two bad files are named and skipped, the rest is done, the exit status is 1."""
    (folder / '1.jpg').write_bytes((folder / '1.jpg').read_bytes()[:300])
    (folder / 'notes.jpg').write_text('not a picture')
    command = [sys.executable, 'detect.py', str(folder), f'--weights={model.path}', f'--out_dir={tmp_path / "out"}']
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(detect.__file__)))
    assert done.returncode == 1, done.stderr
    assert '1.jpg' in done.stderr and 'notes.jpg' in done.stderr and '2 of 5' in done.stderr and 'Traceback' not in done.stderr
    assert sorted(os.listdir(tmp_path / 'out')) == ['0.jpg', '2.jpg', '3.jpg'] and '3 images' in done.stdout


def test_sources(folder):
    names = [str(folder / f'{i}.jpg') for i in range(4)]
    (folder / 'list.txt').write_text(f'{names[2]}\n\n0.jpg\n')
    assert detect.list_images(str(folder)) == detect.list_images(str(folder / '*.jpg')) == names
    assert detect.list_images(names[1]) == names[1:2]
    assert detect.list_images(str(folder / 'list.txt')) == [names[2], names[0]]
    assert detect.output_names(['a/1.jpg', 'b/1.jpg', 'b/1.png', 'c/2.jpg']) == ['1', '1_2', '1_3', '2']
    for nothing in ('', str(folder / 'nowhere.jpg'), str(folder / '*.gif')):
        with pytest.raises(InputError):
            detect.list_images(nothing)


def test_originals_are_safe(model, folder, monkeypatch):
    with pytest.raises(InputError, match='overwritten'):
        run(monkeypatch, model, folder, folder)


def test_tokens(model, folder, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, model, folder / '0.jpg', tmp_path / 'out', tokens=True) == 0
    assert '9 of 24 cells selected' in capsys.readouterr().out       # P4 of 96x64
    for level, cells in (('p4', 24), ('p5', 6)):
        image_grid = Image.open(tmp_path / 'out' / f'0_{level}.jpg')
        assert image_grid.size == (240, 80)                               # two pictures of 120x80 side by side
        light = np.asarray(image_grid.convert('L').crop((0, 0, 120, 80)), float) / np.asarray(Image.open(folder / '0.jpg').convert('L'), float).clip(1)
        assert abs((light > 0.65).mean() - min(9, cells) / cells) < 0.1         # what was selected stays light
    (rows,) = detect.detect_images(model, [Image.open(folder / '0.jpg')], conf=SCORE)
    assert len(rows) and not any(block._forward_pre_hooks for block in model.blocks().values())
    plain = HSVDET(HSVDETConfig('n', 3, '---'))
    plain.path = str(tmp_path / 'plain.pt')
    plain.save(plain.path)
    with pytest.raises(InputError, match='no sparse blocks'):
        run(monkeypatch, plain, folder / '0.jpg', tmp_path / 'out', tokens=True)

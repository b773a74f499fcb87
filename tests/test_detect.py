"""detect.py: the same boxes from Python and from the script, in the original images' pixels; bad files."""
import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import detect
from baselines.detr import DETR
from checkpoint import check_best_f1, read_weights
from configurator import InputError
from data import letterbox, rect_shape
from export import error_limits, largest_error, rounding
from model import HSVDET, HSVDETConfig

SCORE = 0.7


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """A random network that detects things, some of them with scores above SCORE; its weights are at .path"""
    torch.manual_seed(0)
    model = HSVDET(HSVDETConfig('n', 3, '-ST', k=9))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0                                    # statistics of the one batch that follows: without
    model.train()(torch.rand(4, 3, 12, 12).repeat_interleave(8, 2).repeat_interleave(8, 3))          # them the signal
    for branch in model.detect_head.cls:                                                              # dies on the way
        torch.nn.init.constant_(branch[-1].bias, -2)
        torch.nn.init.normal_(branch[-1].weight, std=0.3)
    model.imgsz, model.names = (96, 96), ['cat', 'dog', 'bird']
    model.path = str(tmp_path_factory.mktemp('weights') / 'best.pt')
    model.save(model.path)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    """Four noisy images of three shapes; the last one is stored lying on its side, and its EXIF entry says so."""
    rng = np.random.default_rng(0)
    for i, (w, h) in enumerate([(120, 80), (80, 120), (200, 130), (120, 80)]):
        image = Image.fromarray(rng.integers(0, 256, (h // 10, w // 10, 3), np.uint8)).resize((w, h), Image.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 3 else 1                            # 6: turn it a quarter clockwise
        image.save(tmp_path / f'{i}.jpg', quality=95, exif=exif)
    return tmp_path


def run(monkeypatch, model, source, out, **settings):
    settings = dict(source=str(source), weights=model.path, out_dir=str(out), conf=SCORE, save_json=True,
                    save_txt=True) | settings
    for name, value in settings.items():
        monkeypatch.setattr(detect, name, value)
    return detect.main()


def split(rows, K=3):
    """Detections (n, 6) -> what export.largest_error compares: boxes, and each score at its class."""
    rows = torch.as_tensor(np.asarray(rows), dtype=torch.float64)
    return [(rows[:, :4], torch.nn.functional.one_hot(rows[:, 5].long(), K) * rows[:, 4:5])]


def test_python_and_script_agree(model, folder, tmp_path, monkeypatch):
    """model.detect on an array, detect_images on arrays and on PIL images, and the script's json: the same boxes."""
    assert run(monkeypatch, model, folder, tmp_path / 'out', batch_size=3) == 0
    listed = json.loads((tmp_path / 'out' / 'detections.json').read_text())
    images = [detect.load_image(str(folder / f'{i}.jpg')) for i in range(4)]
    assert images[3].size == (80, 120)
    together = detect.detect_images(model, [np.asarray(image) for image in images], conf=SCORE)
    for i, image in enumerate(images):
        array, scale, (left, top) = letterbox(np.asarray(image), rect_shape([image.size], 96, pad=0))
        x = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255
        rows = model.detect(x, conf=SCORE, iou=0.7)[0].double().numpy()
        rows[:, :4] = ((rows[:, :4] - [left, top, left, top]) / scale).clip(0, image.size * 2)
        assert 5 < len(rows) < 300
        # what the script fuses and batches may round differently; the json has 3 decimals of x, y, w, h
        with torch.no_grad():
            px, share = error_limits(rounding(model, x), array.shape[:2])
        px = px / scale + 0.0011
        assert px < 0.5 and share < 0.005
        (alone,) = detect.detect_images(model, [image], conf=SCORE)
        mine = np.array([[*d['bbox'], d['score'], d['category_id'] - 1] for d in listed if d['image_id'] == i])
        mine[:, 2:4] += mine[:, :2]                                  # image_id: the names are numbers, 0.jpg is 0
        for other in (alone, together[i], mine):
            box, score = largest_error(split(rows), split(other))
            assert box < px and score < share + 1e-6
        # YOLO text, and a picture of the original's size
        lines = np.loadtxt(tmp_path / 'out' / 'labels' / f'{i}.txt')
        w, h = image.size
        assert np.array_equal(lines[:, 0], mine[:, 5]) and np.allclose(lines[:, 5], mine[:, 4], atol=1.1e-5)
        assert np.allclose(lines[:, 1:3] * (w, h), (mine[:, :2] + mine[:, 2:4]) / 2, atol=2e-3)
        assert np.allclose(lines[:, 3:5] * (w, h), mine[:, 2:4] - mine[:, :2], atol=2e-3)
        assert Image.open(tmp_path / 'out' / f'{i}.jpg').size == image.size
    assert {d['category'] for d in listed} <= set(model.names)
    assert {d['file_name'] for d in listed} == {f'{i}.jpg' for i in range(4)}


def test_the_device_is_the_models(model, monkeypatch):
    """Without a device setting the images go to where the model is; for an ONNX file, without parameters, the CPU."""
    asked = []

    def predict(model, batch, *settings, device, **more):
        asked.append(device)
        return [[np.zeros((0, 6))] * len(batch)], 0, 0

    monkeypatch.setattr(detect, 'predict', predict)
    image = Image.new('RGB', (40, 30))
    elsewhere = copy.deepcopy(model).to('meta')
    without = torch.nn.Module()
    without.imgsz, without.fixed_imgsz, without.rect = (64, 64), (64, 64), True
    for each in (elsewhere, model, without):
        detect.detect_images(each, [image])
    detect.detect_images(model, [image], device='meta')
    assert asked == ['meta', 'cpu', 'cpu', 'meta']
    for mode in ('L', 'RGBA', 'P'):                                  # whatever kind of PIL image it is
        assert len(detect.detect_images(model, [Image.new(mode, (40, 30))])) == 1


def test_what_the_network_sees(model, monkeypatch):
    seen = []

    def predict(model, batch, *settings, **more):
        seen.append(batch[0])
        return [[np.zeros((0, 6))] * len(batch)], 0, 0

    monkeypatch.setattr(detect, 'predict', predict)
    wide = Image.new('RGB', (100, 50))
    some = copy.copy(model)
    for imgsz, rect, wanted in (((96, 96), True, (64, 96)), ((96, 96), False, (96, 96)),         # RT-DETR: its square
                                ((32, 192), True, (32, 192))):       # not a square: as trained, whatever the image
        some.imgsz, some.rect = imgsz, rect
        detect.detect_images(some, [wide])
        assert seen[-1].shape[:2] == wanted
    assert HSVDET.rect and not DETR.rect
    detect.detect_images(model, [Image.fromarray(np.full((96, 96), 0x8000, np.uint16))])         # 16 bits: the upper 8
    assert (seen[-1] == 128).all()


def test_unreadable_files(model, folder, tmp_path):
    """The script as a user starts it: two bad files are named and skipped, the rest is done, the exit status is 1."""
    (folder / '1.jpg').write_bytes((folder / '1.jpg').read_bytes()[:300])
    (folder / 'notes.jpg').write_text('not a picture')
    command = [sys.executable, 'detect.py', str(folder), f'--weights={model.path}', f'--out_dir={tmp_path / "out"}',
               '--batch_size=2']
    root = os.path.dirname(os.path.abspath(detect.__file__))
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 1, done.stderr
    assert '1.jpg' in done.stderr and 'notes.jpg' in done.stderr and '2 of 5' in done.stderr
    assert 'Traceback' not in done.stderr
    assert sorted(os.listdir(tmp_path / 'out')) == ['0.jpg', '2.jpg', '3.jpg'] and '3 images' in done.stdout


BEST = dict(score=0.625, P=0.8, R=0.5, F1=0.61538, by_class=dict(cat=dict(score=0.5, P=1.0, R=1.0, F1=1.0),
                                                                 dog=dict.fromkeys(('score', 'P', 'R', 'F1'))))


def test_the_threshold_of_best_f1(model, folder, tmp_path, monkeypatch, capsys):
    """--conf=0 takes what the checkpoint says, prints it, and draws nothing below it; without it one sentence."""
    torch.save(model.checkpoint(best_f1=BEST), tmp_path / 'with.pt')
    assert read_weights(str(tmp_path / 'with.pt'))['best_f1'] == BEST
    known = SimpleNamespace(path=str(tmp_path / 'with.pt'))
    assert run(monkeypatch, known, folder, tmp_path / 'out', conf=0.0) == 0
    scores = [d['score'] for d in json.loads((tmp_path / 'out' / 'detections.json').read_text())]
    assert 0.625 <= min(scores) < SCORE
    assert 'score threshold 0.625' in (out := capsys.readouterr().out) and 'precision 0.800, recall 0.500' in out
    with pytest.raises(InputError, match=r'python eval.py --weights=.*--conf='):
        run(monkeypatch, model, folder, tmp_path / 'out', conf=0.0)
    good = dict(conf=0.5, nms_iou=0.7, batch_size=8, max_det=300)
    for name, value in dict(conf=2.0, nms_iou=-0.1, batch_size=0, max_det=0).items():
        with pytest.raises(InputError, match=f'--{name}={value}'):
            run(monkeypatch, known, folder, tmp_path / 'out', **good | {name: value})


@pytest.mark.parametrize('value', [
    'high', 0.5, [0.5], dict(score=0.5), BEST | dict(score=1.5), BEST | dict(P=float('nan')), BEST | dict(R=None),
    BEST | dict(by_class=[1]), BEST | dict(by_class=dict(cat=0.5)), BEST | dict(score=torch.rand(2)),
    BEST | dict(F1=10 ** 400)])
def test_a_false_best_f1_is_refused(value, tmp_path):
    with pytest.raises(InputError, match='best_f1'):
        check_best_f1(value, 'some.pt')


def test_json_list(tmp_path):
    """What was added before a failure is a complete list, and so is nothing."""
    with detect.json_list(tmp_path / 'none.json'):
        pass
    with pytest.raises(KeyboardInterrupt), detect.json_list(tmp_path / 'some.json') as add:
        add(dict(n=n) for n in range(3))
        add([])
        raise KeyboardInterrupt
    assert json.loads((tmp_path / 'none.json').read_text()) == []
    assert json.loads((tmp_path / 'some.json').read_text()) == [dict(n=0), dict(n=1), dict(n=2)]


def test_sources(folder):
    names = [str(folder / f'{i}.jpg') for i in range(4)]
    (folder / 'list.txt').write_text(f'{names[2]}\n\n0.jpg\n')
    assert detect.list_images(str(folder)) == detect.list_images(str(folder / '*.jpg')) == names
    assert detect.list_images(names[1]) == names[1:2]
    assert detect.list_images(str(folder / 'list.txt')) == [names[2], names[0]]
    assert detect.output_names(['a/1.jpg', 'b/1.jpg', 'b/1.png', 'c/2.jpg']) == ['1', '1_2', '1_3', '2']
    assert detect.output_names(['1.jpg', '1_p4.jpg', '1.png'], ('p5', 'p4')) == ['1', '1_p4_2', '1_2']
    assert len(set(detect.output_names([f'{i}/rgb.png' for i in range(20000)]))) == 20000             # in no time
    for nothing in ('', str(folder / 'nowhere.jpg'), str(folder / '*.gif')):
        with pytest.raises(InputError):
            detect.list_images(nothing)


def test_originals_are_safe(model, folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match='overwritten'):
        run(monkeypatch, model, folder, folder)
    os.symlink(folder, tmp_path / 'link')
    with pytest.raises(InputError, match='overwritten'):
        run(monkeypatch, model, folder, tmp_path / 'link')
    os.makedirs(tmp_path / 'set' / 'images')
    os.makedirs(tmp_path / 'set' / 'labels')
    Image.new('RGB', (64, 64)).save(tmp_path / 'set' / 'images' / '0.jpg')
    (tmp_path / 'set' / 'labels' / '0.txt').write_text('0 .5 .5 .2 .2\n')
    with pytest.raises(InputError, match='has labels of these images'):
        run(monkeypatch, model, tmp_path / 'set' / 'images', tmp_path / 'set', save_txt=True)


def test_tokens(model, folder, tmp_path, monkeypatch, capsys):
    """P4 has the letter S, P5 the letter T, whose mixer stands inside a Gated: both select tokens."""
    assert run(monkeypatch, model, folder / '0.jpg', tmp_path / 'out', tokens=True) == 0
    assert '9 of 24 cells selected' in capsys.readouterr().out       # P4 of 96x64
    original = np.asarray(Image.open(folder / '0.jpg').convert('L'), float).clip(1)
    for level, cells in (('p4', 24), ('p5', 6)):
        page = Image.open(tmp_path / 'out' / f'0_{level}.jpg')
        assert page.size == (240, 80)                                # two pictures of 120x80 side by side
        light = np.asarray(page.convert('L').crop((0, 0, 120, 80)), float) / original
        assert abs((light > 0.65).mean() - min(9, cells) / cells) < 0.1        # what was selected stays light
    (rows,) = detect.detect_images(model, [Image.open(folder / '0.jpg')], conf=SCORE)
    assert len(rows) and not any(module._forward_pre_hooks for module in model.modules())


def test_tokens_of_p_in_bf16():
    torch.manual_seed(0)
    model = HSVDET(HSVDETConfig('n', 3, '--P', k=4)).eval()
    model.imgsz = (64, 64)
    _, levels = detect.selected_tokens(model, Image.new('RGB', (60, 40), 'red'), dtype='bfloat16')
    assert list(levels) == ['p5']


@pytest.mark.parametrize('array', [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3))])
def test_other_arrays_get_a_sentence(model, array):
    with pytest.raises(InputError, match='image 0 is an array'):
        detect.detect_images(model, [array])


@pytest.mark.parametrize('attn', ['---', '-DD', '--M'])
def test_tokens_need_a_block_that_selects(attn, folder, tmp_path, monkeypatch):
    plain = HSVDET(HSVDETConfig('n', 3, attn))
    plain.path = str(tmp_path / 'plain.pt')
    plain.save(plain.path)
    with pytest.raises(InputError, match='no blocks that select tokens'):
        run(monkeypatch, plain, folder / '0.jpg', tmp_path / 'out', tokens=True)

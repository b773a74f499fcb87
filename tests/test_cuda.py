"""
The GPU against the CPU. All other tests hide the GPU, so run these alone:

    python -m pytest tests/test_cuda.py                            on a GPU: everything
    python -m pytest tests/test_cuda.py -m "slow or not slow"      without one: everything, the CPU in place of the GPU

The reference is the CPU in float64; on the device it is float32, TF32 off. Each test has a twin on the CPU, so that it
cannot rot where there is no GPU.
"""
import copy
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attention import HELP, make_block
from baselines.detr import DETR, DETRConfig, DETRHead
from loss import assign, decode_boxes, detection_loss, make_anchor_points, total_loss
from model import HSVDET, HSVDETConfig, nms
from optimizers import make_optimizers
from prepare.shapes import make_shapes
from sparse_attention import stable_topk

ROOT = Path(__file__).parents[1]
SLOW_CPU = pytest.param('cpu', marks=pytest.mark.slow)
GPU = pytest.param('cuda', marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason='no GPU, or hidden: python -m pytest tests/test_cuda.py sees one'))
BLOCKS = [('S', dict(select=select)) for select in ('l2sq', 'l2', 'random', 'learned', 'none')]
BLOCKS += [('S', settings) for settings in (dict(heads=4, pos=True), dict(k=0.3), dict(k=0), dict(k=500, pos=True),
                                            dict(k=0, heads=4), dict(select='learned', heads=4, pos=True))]
BLOCKS += [(letter, dict(heads=heads, pos=heads > 1)) for letter in 'FDWLNKMT' for heads in (1, 4)]
BLOCKS += [('S', dict(keep='mass:0.5')), ('T', dict(select='learned')), ('linear K', dict(heads=4))]


@pytest.fixture(params=['cpu', GPU])
def device(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)                    # float32 means float32
    assert torch.get_float32_matmul_precision() == 'highest'                          # PyTorch's default: no TF32
    return request.param


def block_of(letter, c=16, gate=0.7, seed=0, **settings):
    """A block whose gate is open, and whose last maps are not the zeros that P starts with."""
    torch.manual_seed(seed)
    kernel = 'linear' if letter == 'linear K' else 'epanechnikov'
    block = make_block(letter[-1], c, SimpleNamespace(**vars(HSVDETConfig(k=20, kernel=kernel)) | settings))
    block.gate.data.fill_(gate)
    for m in block.modules():
        if isinstance(m, torch.nn.Conv2d) and not m.weight.any():
            torch.nn.init.normal_(m.weight, std=0.1)
    return block


def feature_map(B=2, c=16, H=10, W=13):
    """(B, c, H, W), token norms at least 1 % apart: no rounding changes which are the largest."""
    x = torch.randn(B, c, H * W)
    norms = torch.stack([1.01 ** torch.randperm(H * W) for _ in range(B)])
    return (x / x.norm(dim=1, keepdim=True) * norms[:, None]).view(B, c, H, W)


def crowd(B=2, M=24, size=256, K=5):
    """Random targets: labels (B, M), a fifth of them padding, boxes (B, M, 4) in pixels."""
    corner, side = torch.rand(B, M, 2) * size * 0.8, torch.rand(B, M, 2) * size * 0.3 + 8
    labels = torch.randint(K, (B, M)).masked_fill(torch.rand(B, M) < 0.2, -1)
    return dict(labels=labels, boxes=torch.cat((corner, corner + side), -1))


def move(thing, device, dtype):
    """Tensors of any nesting to the device; floating ones take the dtype."""
    if isinstance(thing, dict):
        return {key: move(value, device, dtype) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [move(value, device, dtype) for value in thing]
    return thing.detach().to(device, dtype if thing.is_floating_point() else thing.dtype)


def both(function, device, *inputs):
    """function(*inputs) on the device in float32 and on the CPU in float64, random numbers alike."""
    found = []
    for where, dtype in ((device, torch.float32), ('cpu', torch.float64)):
        torch.manual_seed(1)
        found.append(function(*move(inputs, where, dtype)))
    return found


def assert_close(found, expected, tolerance=1e-4, where=''):
    """Integers exactly; floats to `tolerance` of the tensor's largest entry, or of 1 if that is smaller."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        expected, found = list(expected.items()), list(found.items())
        for (key, a), (_, b) in zip(found, expected, strict=True):
            assert_close(a, b, tolerance, f'{where}.{key}')
    elif isinstance(expected, (list, tuple)):
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_close(a, b, tolerance, f'{where}[{i}]')
    elif expected is None:                                                            # nobody attends to the memory
        assert found is None, where
    elif not expected.is_floating_point():
        assert torch.equal(found.cpu(), expected), where
    else:
        a, b = found.detach().cpu().double(), expected.detach().double()
        assert a.shape == b.shape and a.isfinite().all() and b.isfinite().all(), where
        if b.numel():
            assert (a - b).abs().max() <= tolerance * max(1, b.abs().max()), where


def gradients(module, loss, *inputs):
    """What loss(module, *inputs) returns, a scalar and more, and the gradients of the inputs and of all parameters."""
    for x in inputs:
        x.requires_grad_()
    scalar, more = loss(module, *inputs)
    scalar.backward()
    return [more, [x.grad for x in inputs], {name: p.grad for name, p in module.named_parameters()
                                             if p.grad is not None}]


# --- attention -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('letter, settings', BLOCKS, ids=str)
def test_blocks(device, letter, settings):
    """Training form with and without memory and its gradients, then the inference form; the tokens selected."""
    block, x, memory = block_of(letter, **settings), feature_map(), torch.randn(2, 5, 16)

    def loss(module, *inputs):
        y = module(*inputs)
        return y.sin().sum(), y.detach()

    def run(x, memory):
        module = copy.deepcopy(block).to(x.device, x.dtype)
        return [gradients(copy.deepcopy(module), loss, x.clone(), *more) for more in ((), (memory,))]

    @torch.no_grad()
    def infer(x):
        return copy.deepcopy(block).to(x.device, x.dtype).eval().fuse()(x)

    assert_close(*both(run, device, x, memory))
    assert_close(*both(infer, device, x))
    if letter in 'ST' and settings.get('select') != 'none':
        selector = block if letter == 'S' else block.mixer
        found, expected = both(lambda x: copy.deepcopy(selector).to(x.device, x.dtype).select_tokens(x)[0], device, x)
        assert torch.equal(found.cpu().sort(1).values, expected.sort(1).values)


def test_topk_breaks_ties_alike(device):
    importance = torch.randint(-3, 4, (4, 300)).float()
    for k in (1, 50, 299):
        found, expected = both(lambda t, k=k: stable_topk(t.float(), k).sort(1).values, device, importance)
        assert_close(found, expected)
    assert torch.equal(stable_topk(torch.zeros(1, 9, device=device), 4).sort(1).values.cpu(), torch.arange(4)[None])


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('letter', [letter for letter in HELP if letter != '-'])
def test_blocks_in_half_precision(device, letter, dtype):
    """Activations of 1e3 stay finite, forward and backward, under autocast and wholly in 16 bits; close to float32."""
    block = block_of(letter, 32, heads=2, pos=True).to(device)
    x = (feature_map(2, 32, 9, 12) * 1e3).to(device, getattr(torch, dtype)).requires_grad_()
    with torch.autocast(device, getattr(torch, dtype)):
        y = block(x)
    y.float().mean().backward()
    gradients = [p.grad for p in block.parameters() if p.requires_grad]                # P's gate does not learn
    assert y.dtype == x.dtype and all(t.isfinite().all() for t in (y, x.grad, *gradients))
    with torch.no_grad():
        wide = block(x.float())
        narrow = block.to(x.dtype)(x)
    for some in (y, narrow):
        assert (some.float() - wide).square().mean().sqrt() < 0.05 * wide.square().mean().sqrt()


# --- losses, boxes ---------------------------------------------------------------------------------------------------

def raw_maps(B=2, K=5, size=256):
    return [torch.randn(B, 64 + K, size // s, size // s) for s in (8, 16, 32)]


@pytest.mark.parametrize('topk', [10, 1])
def test_detection_loss(device, topk):
    torch.manual_seed(0)

    def run(maps, targets):
        for m in maps:
            m.requires_grad_()
        losses = detection_loss(maps, targets, topk=topk)
        total_loss(dict(one=losses)).backward()
        return [list(losses), [m.grad for m in maps]]

    assert_close(*both(run, device, raw_maps(), crowd()))
    nothing = dict(labels=torch.full((2, 1), -1), boxes=torch.zeros(2, 1, 4))
    assert_close(*both(run, device, raw_maps(), nothing))


@pytest.mark.parametrize('budget', [2 ** 20, 4000])
def test_assign(device, budget):
    """The same points for the same objects; of boxes twice in the list, too."""
    torch.manual_seed(0)
    maps, targets = raw_maps(), crowd()
    targets = {name: torch.cat((t, t[:, :3]), 1) for name, t in targets.items()}
    points, strides = make_anchor_points(maps)
    boxes, scores = decode_boxes(torch.randn(2, len(points), 64), points, strides), torch.rand(2, len(points), 5)
    found, expected = both(lambda s, b, p, t: assign(s, b, p, t['labels'], t['boxes'], budget=budget), device, scores,
                           boxes, points, targets)
    assert (expected[0] >= 0).sum() > 50
    assert_close(found, expected)


def test_nms(device):
    """2,000 jittered copies of 60 boxes, many scores equal: the same are kept, in the same order."""
    torch.manual_seed(0)
    of = torch.randint(60, (2000,))
    corner, side = torch.rand(60, 2) * 500, torch.rand(60, 2) * 100 + 10
    boxes = torch.cat((corner, corner + side), 1)[of] + torch.randn(2000, 4) * 3
    scores, labels = torch.rand(2000).mul(50).round() / 50, torch.randint(3, (60,))[of]
    for most in (300, 20):
        found, expected = both(lambda b, s, n, most=most: nms(b, s, n, 0.6, most), device, boxes, scores, labels)
        assert len(expected) >= 20
        assert_close(found, expected)


@pytest.mark.parametrize('settings', [{}, dict(multi_label=True, conf=0.6), dict(max_det=7)], ids=str)
def test_decode_and_postprocess(device, settings):
    torch.manual_seed(0)
    model, maps = HSVDET(HSVDETConfig(num_classes=5)), raw_maps(size=96)
    assert_close(*both(model.decode, device, maps))
    found, expected = both(lambda maps: model.postprocess(maps, **settings), device, maps)
    assert len(expected[0]) >= 5
    assert_close(found, expected)


# --- detectors -------------------------------------------------------------------------------------------------------

def small_detr(**settings):
    return DETRConfig(**dict(num_classes=5, hidden=32, detr_heads=4, ffn=64, decoder_layers=2, queries=20,
                             denoising=30) | settings)


@pytest.mark.parametrize('settings', [{}, dict(encoder_attn='S', k=6, class_loss='mal'), dict(denoising=0)], ids=str)
def test_detr_head(device, settings):
    """Losses, matching and gradients in training, boxes and scores in evaluation."""
    torch.manual_seed(0)
    head = DETRHead((8, 16, 32), small_detr(**settings))
    maps, targets = [feature_map(2, c, 128 // s, 128 // s) for c, s in ((8, 8), (16, 16), (32, 32))], crowd(2, 6, 128)

    def train(maps, targets):
        module = copy.deepcopy(head).to(maps[0].device, maps[0].dtype).train()

        def loss(module, *maps):
            raw, losses = module(maps, targets)
            return total_loss(losses), [list(raw), list(losses['detr'])]

        return gradients(module, loss, *maps)

    @torch.no_grad()
    def infer(maps):
        return copy.deepcopy(head).to(maps[0].device, maps[0].dtype).eval()(maps)[0]

    assert_close(*both(train, device, maps, targets))
    assert_close(*both(infer, device, maps))


def detectors():
    torch.manual_seed(0)
    hsvdet = HSVDET(HSVDETConfig(num_classes=5, attn='SSS', k=20, heads=2, select='learned', one2one=True))
    memory = HSVDET(HSVDETConfig(num_classes=5, k=(0, 12, 4), keep='joint', memory='scale,time'))
    detectors = dict(hsvdet=hsvdet, memory=memory, rtdetr=DETR(small_detr(encoder_attn='S', k=6)))
    for model in detectors.values():
        for block in model.blocks().values():
            block.gate.data.fill_(0.5)
    return detectors


def images_for(name):
    return torch.rand(2, 3, 3, 64, 96) if name == 'memory' else torch.rand(2, 3, 64, 96)      # clips of three frames


@pytest.mark.parametrize('name', ['hsvdet', 'memory', 'rtdetr'])
def test_detectors(device, name):
    """Raw outputs of the whole network in its inference form; losses and gradients, where BatchNorm is at rest."""
    model, images, targets = detectors()[name].eval(), images_for(name), crowd(2, 6, 64)

    def train(images, targets):
        module = copy.deepcopy(model).to(images.device, images.dtype)
        losses = module(images, targets)[1]
        total_loss(losses).backward()
        return [{part: list(some) for part, some in losses.items()},
                {n: p.grad for n, p in module.named_parameters() if p.grad is not None}]

    @torch.no_grad()
    def infer(images):
        return list(copy.deepcopy(model).to(images.device, images.dtype).fuse()(images)[0])

    assert_close(*both(train, device, images, targets), tolerance=1e-3)
    assert_close(*both(infer, device, images))


@pytest.mark.parametrize('device', [SLOW_CPU, GPU], indirect=True)
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('name', ['hsvdet', 'memory', 'rtdetr'])
def test_detectors_in_half_precision(device, name, dtype):
    """Losses and gradients are finite; checkpointing changes neither."""
    images, targets, found = images_for(name).to(device), move(crowd(2, 6, 64), device, torch.float32), []
    for checkpointing in (False, True):
        model = detectors()[name].to(device, memory_format=torch.channels_last).train()
        model.checkpointing = checkpointing
        torch.manual_seed(0)
        with torch.autocast(device, getattr(torch, dtype)):
            losses = model(images, targets)[1]
        total_loss(losses).backward()
        found.append([total_loss(losses).detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert all(t.isfinite().all() for t in found[-1])
    norms = [torch.stack([t.norm() for t in some[1:]]).norm() for some in found]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=0)
    torch.testing.assert_close(*norms, rtol=1e-2, atol=0)


@pytest.mark.parametrize('kind', ['adamw', 'sgd', 'muon'])
def test_optimizers(device, kind):
    torch.manual_seed(0)
    start, gradient = [torch.randn(6, 4, 3, 3), torch.randn(6)], [torch.randn(3, 6, 4, 3, 3), torch.randn(3, 6)]

    def run(start, gradient):
        params = [torch.nn.Parameter(t.clone()) for t in start]
        groups = [dict(params=[p], part='head', name=f'head.{what}', lr=1.0, weight_decay=0.1)
                  for p, what in zip(params, ('decay', 'no_decay'), strict=True)]
        optimizers = make_optimizers(groups, dict(head=kind), 0.9, 0.99)
        for i in range(3):
            for p, g in zip(params, gradient, strict=True):
                p.grad = g[i].clone()
            for o in optimizers:
                o.step()
        return [p.detach() for p in params]

    assert_close(*both(run, device, start, gradient))


# --- the scripts -----------------------------------------------------------------------------------------------------

def script(*arguments):
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='session', params=[SLOW_CPU, GPU])
def trained(request, tmp_path_factory):
    """A detector that knows six pictures by heart: 30 steps, resumed to 150. -> device, folder, rows of log.csv"""
    folder = tmp_path_factory.mktemp(request.param)
    make_shapes(str(folder), train=6, val=1, size=96)
    command = ['train.py', 'config/shapes.py', f'--train_data={folder}/train.json', f'--val_data={folder}/train.json',
               f'--val_images={folder}/images/train', f'--train_images={folder}/images/train', '--make_data=',
               f'--out_dir={folder}/run', f'--device={request.param}', '--imgsz=96', '--epochs=150',
               '--eval_interval=1e9', '--log_interval=5', '--num_pictures=1', '--report=False', '--ema_tau=20',
               '--workers=1',
               '--warmup_epochs=5', '--batch_size=6', '--flip=0.0',
               '--hsv_h=0.0', '--hsv_s=0.0', '--hsv_v=0.0', '--translate=0.0']
    script(*command, '--max_steps=30')
    script(*command, '--init_from=resume')
    with open(folder / 'run/log.csv', newline='') as f:
        return request.param, folder, list(csv.DictReader(f))


def test_training_and_resume(trained):
    """The loss falls within 30 steps, and goes on from there after the resume; no step is missing or twice."""
    rows = [row for row in trained[2] if row['cls']]
    loss = [sum(float(row[name]) for name in ('box', 'cls', 'dfl')) for row in rows]
    assert [int(row['step']) for row in rows] == list(range(5, 151, 5))
    assert loss[5] < 0.8 * loss[0] and loss[6] < 1.1 * loss[5] and loss[-1] < 0.5 * loss[0], loss


def test_evaluation_is_the_same(trained):
    device, folder, _ = trained
    command = ['eval.py', f'--weights={folder}/run/best.pt', f'--data={folder}/train.json',
               f'--images={folder}/images/train', '--occlusion=False']
    here, there = (json.loads(script(*command, f'--device={d}').splitlines()[-1]) for d in ('cpu', device))
    assert here['AP'] > 0.2 and abs(here['AP'] - there['AP']) <= 0.001
    half = json.loads(script(*command, f'--device={device}', '--dtype=bfloat16').splitlines()[-1])
    assert abs(here['AP'] - half['AP']) <= 0.03


def test_export(trained):
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package)
    folder = trained[1] / 'run'
    script('export.py', f'--weights={folder}/best.pt')
    assert os.path.getsize(folder / 'best.onnx') > 10 ** 6

"""The loop, run as a user runs it: gradients of the whole batch, resume to the bit, bad input and failures."""
import csv
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data import DetectionDataset, collate
from loss import total_loss
from model import HSVDET, HSVDETConfig
from prepare.shapes import make_shapes

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """Twelve pictures, the odd ones without objects."""
    out = tmp_path_factory.mktemp('shapes')
    make_shapes(str(out), train=12, val=3, size=96)
    data = json.loads((out / 'train.json').read_text())
    data['annotations'] = [a for a in data['annotations'] if a['image_id'] % 2 == 1]
    (out / 'half.json').write_text(json.dumps(data))
    return out


def command(shapes, out_dir, *settings, ranks=1, data='train'):
    launch = ['-m', 'torch.distributed.run', f'--nproc_per_node={ranks}', '--standalone'] if ranks > 1 else []
    return [sys.executable, *launch, 'train.py',
            f'--train_data={shapes}/{data}.json', f'--train_images={shapes}/images/train',
            f'--val_data={shapes}/val.json', f'--out_dir={out_dir}',
            '--imgsz=64', '--device=cpu', '--dtype=float32', '--workers=0', '--epochs=4', '--no_aug_epochs=1',
            '--warmup_epochs=1', '--eval_interval=2', '--batch_size=4', '--log_interval=2', '--k=8',
            '--num_pictures=1', '--report=False', *settings]


def train(shapes, out_dir, *settings, check=True, change='', **kwargs):
    """Runs train.py; its processes run `change`, lines of Python, before it."""
    arguments = command(shapes, out_dir, *settings, **kwargs)
    if change:
        script = Path(f'{out_dir}.py')
        script.write_text(f"import os, runpy, sys, torch\nsys.path.insert(0, '')\n{change}\n"
                          "runpy.run_path('train.py', run_name='__main__')\n")
        arguments[arguments.index('train.py')] = str(script)
    done = subprocess.run(arguments, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def test_an_evaluation_that_fails_loses_no_step(shapes, tmp_path):
    broken = 'import eval\ndef evaluate(*args, **how):\n    raise RuntimeError("no disk")\neval.evaluate = evaluate'
    done = train(shapes, tmp_path / 'out', '--max_steps=2', check=False, change=broken)
    assert done.returncode and 'no disk' in done.stderr and load(tmp_path / 'out' / 'ckpt.pt')['step'] == 2


def load(path):
    return torch.load(path, map_location='cpu', weights_only=True)


def assert_same(a, b, where=''):
    """Two checkpoints' contents, to the bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f'{where}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f'{where}[{i}]')
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def test_few_images_get_more_epochs(shapes, tmp_path):
    """12 images, 4 epochs, 4 a step: 12 steps become 24, and the warm-up of one epoch two."""
    done = train(shapes, tmp_path, '--min_steps=24', '--max_steps=2', '--log_interval=1', '--lr=0.006')
    assert '8 epochs instead of 4: 12 images then have 24 steps' in done.stdout and '; 24 steps' in done.stdout
    lr = [float(line.split(',')[2]) for line in (tmp_path / 'log.csv').read_text().splitlines()[1:]]
    assert lr[:2] == [0.0, 0.001]                                                     # a third of an epoch of two


# --- the gradient is that of the whole batch --------------------------------------------------------------------------

@pytest.fixture(scope='session')
def one_step(shapes, tmp_path_factory):
    """The change of all weights in three steps of plain SGD, nothing random, BatchNorm frozen, with `settings`."""
    seed = next(s for s in range(1000)                                 # ids start at 1
                if (np.random.default_rng((s, 0)).permutation(12)[:4] % 2 == [0, 0, 1, 1]).all())
    fixed = ['--optimizer=sgd', '--momentum=0.9', '--lr=0.001', '--warmup_epochs=0', '--grad_clip=1e9',
             '--weight_decay=0.0', '--freeze_bn=True', '--mosaic=0.0', '--scale_aug=0.0', '--translate=0.0',
             '--flip=0.0', '--hsv_h=0.0', '--hsv_s=0.0', '--hsv_v=0.0', '--max_steps=3', '--gate=fixed',
             '--one2one=True', f'--seed={seed}']
    start = tmp_path_factory.mktemp('start') / 'start.pt'
    torch.manual_seed(0)
    model = HSVDET(HSVDETConfig(num_classes=6, k=8, gate='fixed', one2one=True))
    model.save(start)

    def run(*settings, ranks=1):
        out = tmp_path_factory.mktemp('step')
        train(shapes, out, *fixed, f'--init_from={start}', *settings, ranks=ranks, data='half')
        after = load(out / 'ckpt.pt')['model']
        change = {name: after[name] - p for name, p in model.state_dict().items() if p.is_floating_point()}
        return change, (out / 'log.csv').read_text()

    return run, run(), seed


@pytest.mark.parametrize('settings, ranks', [(['--grad_accum=4'], 1), ([], 2), (['--grad_accum=2'], 2)],
                         ids=['4 micro-batches', '2 ranks', '2 x 2'])
def test_parts_give_the_gradient_of_the_whole(one_step, settings, ranks):
    """In the first of three steps rank 1, and the last two micro-batches, hold no object at all."""
    run, (whole, log), _ = one_step
    parts, parts_log = run(*settings, ranks=ranks)
    largest = max(v.abs().max() for v in whole.values())
    assert largest > 1e-4
    for name, change in whole.items():                                 # weights near 1 store changes to 1e-7
        assert (parts[name] - change).abs().max() <= 2e-5 * largest + 1e-7, name
    metrics, parts_metrics = (text.splitlines()[-1].split(',')[-3:] for text in (log, parts_log))
    assert parts_metrics == metrics, 'evaluation over ranks is the same'


# --- resume -----------------------------------------------------------------------------------------------------------

def test_killed_and_resumed_equals_uninterrupted(shapes, tmp_path):
    settings = ['--select=random', '--save_interval=3', '--log_interval=4', '--multi_scale=0.5',
                '--dtype_block=bfloat16']                                                              # 12 steps
    train(shapes, tmp_path / 'a', *settings)
    process = subprocess.Popen(command(shapes, tmp_path / 'b', *settings), cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL)
    while not (tmp_path / 'b/ckpt_prev.pt').exists():                  # two checkpoints are there: kill it
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert load(tmp_path / 'b/ckpt_prev.pt')['step'] < 12
    newest = tmp_path / 'b/ckpt.pt'
    newest.write_bytes(newest.read_bytes()[:-20000] if newest.exists() else b'')
    said = train(shapes, tmp_path / 'b', *settings, '--init_from=resume').stdout
    assert 'not a complete checkpoint' in said and 'going on from' in said and 'ckpt_prev.pt' in said
    a, b = load(tmp_path / 'a/ckpt.pt'), load(tmp_path / 'b/ckpt.pt')
    for saved in (a, b):
        del saved['config']
    assert a['step'] == 12
    assert_same(a, b)
    assert (tmp_path / 'a/log.csv').read_text() == (tmp_path / 'b/log.csv').read_text()
    rows = list(csv.DictReader((tmp_path / 'a/log.csv').open()))
    assert [int(r['step']) for r in rows] == [4, 6, 8, 12, 12] and all(r['AP'] for r in (rows[1], rows[4]))
    for name in ('best.pt', 'curves.png', 'val_0.jpg'):
        assert (tmp_path / 'a' / name).stat().st_size > 1000


RECORD_DRAWS = '''
out_dir = next(word for word in sys.argv if word.startswith('--out_dir=')).split('=')[1]
rand, draws = torch.rand, open(f"{out_dir}.rank{os.environ['RANK']}", 'w', buffering=1)
def recorded(*args, generator=None, **kwargs):
    drawn = rand(*args, generator=generator, **kwargs)
    if generator is None:
        draws.write(f'{drawn.flatten()[0].item()}\\n')
    return drawn
torch.rand = recorded'''


def test_two_ranks_resume_to_the_bit(shapes, tmp_path):
    """
    With fp16 and its scaler, random selection, a one-to-one head and BatchNorm: 3 steps and 3 more equal 6. No rank
    draws what another does, in any step, and each draws after resuming what it would have drawn.
    """
    settings = ['--dtype=float16', '--one2one=True', '--select=random', '--grad_accum=2', '--eval_interval=1',
                '--log_interval=1']
    train(shapes, tmp_path / 'a', *settings, '--max_steps=6', ranks=2, change=RECORD_DRAWS)
    os.makedirs(tmp_path / 'b')
    (tmp_path / 'b/ckpt.pt').write_bytes((tmp_path / 'a/ckpt_prev.pt').read_bytes())
    assert load(tmp_path / 'b/ckpt.pt')['step'] == 3
    said = train(shapes, tmp_path / 'b', *settings, '--max_steps=6', '--init_from=resume', ranks=2,
                 change=RECORD_DRAWS).stdout
    assert 'warning: this is not the run' not in said
    drawn = {run: [(tmp_path / f'{run}.rank{rank}').read_text().split() for rank in (0, 1)] for run in 'ab'}
    assert len(set(drawn['a'][0] + drawn['a'][1])) == 24, 'the block at P4, six steps, two micro-batches, two ranks'
    for a, b in zip(drawn['a'], drawn['b'], strict=True):
        assert b == a[6:]
    a, b = load(tmp_path / 'a/ckpt.pt'), load(tmp_path / 'b/ckpt.pt')
    assert a['step'] == b['step'] == 6 and a['scaler']['scale'] > 0
    assert not torch.equal(a['model']['backbone.stem.bn.running_mean'], torch.zeros(16))
    for saved in (a, b):
        del saved['config']
    assert_same(a, b)


def test_a_resumed_run_takes_the_settings_it_is_given(shapes, tmp_path):
    train(shapes, tmp_path, '--max_steps=2')
    said = train(shapes, tmp_path, '--max_steps=3', '--momentum=0.5', '--weight_decay=0.3', '--init_from=resume').stdout
    assert 'momentum=0.5 (was 0.9)' in said
    groups = load(tmp_path / 'ckpt.pt')['optimizers'][0]['param_groups']
    assert {group['betas'] for group in groups} == {(0.5, 0.999)} and {g['weight_decay'] for g in groups} == {0.3, 0.0}


@pytest.mark.slow
def test_an_optimizer_per_part_resumes_to_the_bit(shapes, tmp_path):
    pytest.importorskip('pytorch_optimizer')
    settings = ['--optimizer_backbone=sgd', '--optimizer_neck=soap', '--optimizer_block=muon', '--optimizer_head=lamb',
                '--eval_interval=1', '--max_steps=6']
    train(shapes, tmp_path / 'a', *settings)
    os.makedirs(tmp_path / 'b')
    (tmp_path / 'b/ckpt.pt').write_bytes((tmp_path / 'a/ckpt_prev.pt').read_bytes())
    train(shapes, tmp_path / 'b', *settings, '--init_from=resume')
    a, b = load(tmp_path / 'a/ckpt.pt'), load(tmp_path / 'b/ckpt.pt')
    assert len(a['optimizers']) == 5 and a['step'] == b['step'] == 6
    for saved in (a, b):
        del saved['config']
    assert_same(a, b)


def test_full_disk_costs_the_newest_file_only(shapes, tmp_path):
    """No file may outgrow 4 MB: every checkpoint fails to be written, the run goes on and says so."""
    done = subprocess.run(command(shapes, tmp_path, '--max_steps=2'), cwd=ROOT, env=ENV, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('was not written') == 2
    assert not list(tmp_path.glob('*.pt*')) and (tmp_path / 'log.csv').exists()


def test_sigterm_saves_and_leaves(shapes, tmp_path):
    process = subprocess.Popen(command(shapes, tmp_path, '--epochs=4000', '--eval_interval=4000'), cwd=ROOT, env=ENV,
                               stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith('step'):
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and 'SIGTERM at step' in rest and '--init_from=resume' in rest
    assert load(tmp_path / 'ckpt.pt')['step'] > 0


# --- what the settings do ---------------------------------------------------------------------------------------------

def test_everything_at_once(shapes, tmp_path):
    """Settings that no other run here uses, together; the frozen part stays, every other part moves."""
    start = tmp_path / 'start.pt'
    torch.manual_seed(1)
    model = HSVDET(HSVDETConfig(num_classes=6, k=8, attn='SFD', one2one=True))
    model.save(start)
    train(shapes, tmp_path, f'--init_from={start}', '--attn=SFD', '--one2one=True', '--checkpointing=True',
          '--freeze=backbone', '--optimizer_neck=sgd', '--optimizer_head=muon', '--lr_head=0.3', '--imgsz=(64, 96)',
          '--dtype=bfloat16', '--mixup=0.5', '--max_steps=4', '--workers=1')
    after = load(tmp_path / 'ckpt.pt')['model']
    moved = {name.split('.')[0] for name, p in model.state_dict().items() if not torch.equal(p, after[name])}
    assert 'backbone' not in moved
    assert moved >= {'fpn4', 'pan5', 'block3', 'block4', 'block5', 'detect_head', 'one2one_head'}
    start, row = list(csv.DictReader((tmp_path / 'log.csv').open()))[:2]
    assert start['step'] == '0' and start['AP'], 'weights from elsewhere are evaluated as they come'
    assert {'gate_p3', 'gate_p4', 'gate_p5', 'one2one_cls'} <= row.keys() and float(row['one2one_cls']) > 0


def test_fp16_on_cpu(shapes, tmp_path):
    """A scale that lets every gradient overflow costs steps, and nothing else: it is halved until it fits."""
    train(shapes, tmp_path, '--dtype=float16', '--max_steps=2')
    before = load(tmp_path / 'ckpt.pt')
    assert before['scaler']['scale'] == 2 ** 10, 'the scale that we start with lets none overflow'
    torch.save({**before, 'scaler': {**before['scaler'], 'scale': 2.0 ** 40}}, tmp_path / 'ckpt.pt')
    train(shapes, tmp_path, '--dtype=float16', '--max_steps=5', '--init_from=resume')
    after = load(tmp_path / 'ckpt.pt')
    assert after['step'] == 5 and after['scaler']['scale'] == 2 ** 37
    assert_same(before['optimizers'][0]['state'], after['optimizers'][0]['state'])
    moved = [name for name, p in before['model'].items() if not torch.equal(p, after['model'][name])]
    assert moved and all('running_' in name or 'num_batches' in name for name in moved)


def test_overfits_eight_pictures(shapes):
    """Sixty steps on eight pictures: the losses that can vanish nearly do, and every object is found."""
    torch.manual_seed(0)
    data = DetectionDataset(str(shapes / 'train.json'), imgsz=(96, 96))
    batch = collate([data[0, i] for i in range(8)])
    images, targets = batch['images'].float() / 255, dict(labels=batch['labels'], boxes=batch['boxes'])
    model = HSVDET(HSVDETConfig(num_classes=6, k=8)).train()
    optimizer = torch.optim.AdamW(model.param_groups(4e-3, 0.01))
    first = None
    for step in range(60):
        for group in optimizer.param_groups:
            group['lr'] = 4e-3 * min(1, (step + 1) / 10, (60 - step) / 20)
        losses = model(images, targets)[1]
        optimizer.zero_grad()
        total_loss(losses).backward()
        optimizer.step()
        sums, normalizer = losses['one2many']
        last = {name: (value / normalizer).item() for name, value in sums.items()}
        first = first or last
    assert last['box'] < 0.25 * first['box'] and last['cls'] < 0.25 * first['cls'], (first, last)
    assert all(block.gate != 0 for block in model.blocks().values()), 'the gates opened'


# --- bad input --------------------------------------------------------------------------------------------------------

def test_bad_input_is_one_sentence(shapes, tmp_path):
    cases = [
        (['--imgsz=100'], 'imgsz must be one multiple of 32'),
        (['--imgsz=32', '--batch_size=1'], 'a single value at P5'),
        (['--imgsz=64', '--batch_size=2', '--grad_accum=2', '--multi_scale=0.5'], 'a single value at P5'),
        (['--device=cuda'], 'sees no CUDA device; use --device=cpu'),
        (['--device=cuda:x'], 'must be auto, cpu, cuda or cuda:n'),
        (['--sync_bn=True'], 'needs CUDA devices'),
        (['--compile=True', '--checkpointing=True'], 'exclude each other'),
        (['--dtype=float8'], 'must be auto, float32, bfloat16 or float16'),
        (['--dtype_head=auto'], '--dtype_head=auto: must be float32, bfloat16 or float16'),
        (['--out_dir=/proc/no'], 'cannot write to out_dir /proc/no'),
        (['--train_data=nowhere.json'], 'nowhere.json not found'),
        (['--train_data=data/coco/annotations/instances_train2017_20.json'], 'python -m prepare.coco --fraction=0.2'),
        (['--attn=SS'], "attn has one of - S F D C W L N K M T P for each of P3 P4 P5, got 'SS'"),
        (['--batch_size=6', '--grad_accum=4'], 'does not divide'),
        (['--lr=0'], '--lr=0.0: must be above 0'),
        (['--seed=-1'], '--seed=-1: must be at least 0'),
        (['--lr_block=-5'], '--lr_block=-5.0: must be at least 0'),
        (['--ema_decay=2'], '--ema_decay=2.0: must be from 0 to 1'),
        (['--memory=scale:shuffled', '--grad_accum=4'], 'which has no other'),
        (['--beta2=1'], '--beta2=1.0: must be at least 0 and below 1'),
        (['--warmup_epochs=9'], 'must fit into epochs=4'),
        (['--optimizer=adam'], 'must be one of adamw sgd muon'),
        (['--init_from=nothing.pt'], 'checkpoint nothing.pt not found'),
        (['--init_from=resume'], 'nothing to resume in'),
    ]
    started = [subprocess.Popen(command(shapes, tmp_path, *settings), cwd=ROOT, env=ENV,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
               for settings, _ in cases]
    for process, (settings, sentence) in zip(started, cases, strict=True):
        said = process.communicate()[1]
        assert process.returncode == 1 and sentence in said and said.count('\n') == 1, (settings, said)


def test_non_finite_loss_stops_and_saves_the_batch(shapes, tmp_path):
    done = train(shapes, tmp_path, '--lr=1e30', '--warmup_epochs=0', '--grad_clip=1e30', check=False)
    assert done.returncode == 1 and 'is not finite at step' in done.stderr and '.jpg' in done.stderr
    assert 'Traceback' not in done.stderr
    saved = load(next(tmp_path.glob('nonfinite_*.pt')))
    assert saved['batch']['images'].shape == (4, 3, 64, 64)


def test_some_non_finite_steps_can_be_left_out(shapes, tmp_path):
    """A start whose stem holds one NaN: every step is left out, BatchNorm's statistics stay what they were."""
    torch.manual_seed(0)
    model = HSVDET(HSVDETConfig(num_classes=6, k=8))
    model.backbone.stem.conv.weight.data[0, 0, 0, 0] = torch.nan
    model.save(tmp_path / 'start.pt')
    done = train(shapes, tmp_path, f'--init_from={tmp_path}/start.pt', '--skip_nonfinite=2', check=False)
    assert done.returncode == 1 and done.stdout.count('warning: left out step') == 2


def test_neither_another_network_nor_a_new_run_harms_an_earlier_one(shapes, tmp_path):
    *_, evaluation, last = train(shapes, tmp_path, '--max_steps=1').stdout.splitlines()
    assert re.search(r'\| AP ([\d.]+) AP50 ([\d.]+)', evaluation), 'for scripts that read how far, and in which time'
    assert all(re.search(r'([\d.]+) min of training', line) for line in (evaluation, last))
    names = {'ckpt.pt', 'best.pt', 'log.csv', 'curves.png', 'val_0.jpg'}
    first = {name: (tmp_path / name).read_bytes() for name in names}
    done = train(shapes, tmp_path, '--init_from=resume', '--attn=---', check=False)
    assert done.returncode == 1 and 'holds another network' in done.stderr and 'Traceback' not in done.stderr
    (tmp_path / 'notes.txt').write_text('mine')
    said = train(shapes, tmp_path, '--max_steps=1', '--seed=1').stdout
    assert f'{tmp_path} held a run already: moved to {tmp_path}/earlier_1' in said
    assert {p.name: p.read_bytes() for p in (tmp_path / 'earlier_1').iterdir()} == first
    assert {p.name for p in tmp_path.iterdir()} == names | {'notes.txt', 'earlier_1'}


# --- the other architecture on the same loop ------------------------------------------------------------------------

RTDETR = ['--arch=rtdetr', '--hidden=32', '--ffn=32', '--detr_heads=4', '--decoder_layers=2', '--queries=12',
          '--denoising=8', '--log_interval=1']


def test_rtdetr_trains_evaluates_and_resumes_to_the_bit(shapes, tmp_path):
    """Denoising draws random numbers, so a resumed run must find the generator where it was."""
    train(shapes, tmp_path / 'a', *RTDETR, '--max_steps=6')
    os.makedirs(tmp_path / 'b')
    train(shapes, tmp_path / 'b', *RTDETR, '--max_steps=3', '--save_interval=3')
    assert load(tmp_path / 'b/ckpt.pt')['step'] == 3 and load(tmp_path / 'b/ckpt.pt')['arch'] == 'rtdetr'
    train(shapes, tmp_path / 'b', *RTDETR, '--max_steps=6', '--init_from=resume')
    a, b = load(tmp_path / 'a/ckpt.pt'), load(tmp_path / 'b/ckpt.pt')
    assert_same(a['model'], b['model'])
    assert_same(a['optimizers'], b['optimizers'])
    row = list(csv.DictReader((tmp_path / 'a/log.csv').open()))[0]
    assert all(float(row[name]) > 0 for name in ('cls', 'l1', 'giou', 'aux_l1', 'dn_l1'))


def test_rtdetr_on_two_ranks_one_without_objects(shapes, one_step, tmp_path):
    """The step is that of the whole batch; BatchNorm frozen, no denoising, whose groups depend on the rank."""
    settings = [s for s in RTDETR if 'denoising' not in s] + [
        '--denoising=0', '--optimizer=sgd', '--momentum=0.0', '--lr=0.001', '--warmup_epochs=0', '--grad_clip=1e9',
        '--weight_decay=0.0', '--freeze_bn=True', '--mosaic=0.0', '--scale_aug=0.0', '--translate=0.0', '--flip=0.0',
        '--hsv_h=0.0', '--hsv_s=0.0', '--hsv_v=0.0', '--max_steps=1', f'--seed={one_step[2]}']
    for ranks in (1, 2):
        train(shapes, tmp_path / str(ranks), *settings, ranks=ranks, data='half')
    one, two = (load(tmp_path / f'{ranks}/ckpt.pt')['model'] for ranks in (1, 2))
    largest = max(p.abs().max() for p in one.values() if p.is_floating_point())
    for name, p in one.items():
        if p.is_floating_point():
            assert (two[name] - p).abs().max() <= 1e-5 * largest, name

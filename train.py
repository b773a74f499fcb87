"""
Train a detector.

    python train.py config/shapes.py                                  minutes on a CPU, no download
    python train.py config/finetune_own.py --train_data=... --val_data=...
    python train.py config/hsvdet_coco20.py                           one GPU
    torchrun --nproc_per_node=8 train.py config/hsvdet_coco20.py      one machine, eight GPUs
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=10.0.0.1 --master_port=29500 train.py ...
    ... --init_from=resume                                            go on where a run broke off
    ... --show_batch=True                                             draw the first batch to out_dir/batch.png, stop

out_dir receives ckpt.pt (everything needed to go on; ckpt_prev.pt is the one before), best.pt (EMA weights of the best
evaluation), log.csv, curves.png, val_*.jpg and report.html, a page with all of it. What a new run finds there of an
older one it moves to earlier_1, ...

One step is one *effective* batch: batch_size images, over all ranks and `grad_accum` micro-batches. A loss is divided
by the normalizer of the whole effective batch (and multiplied by batch_size), so neither ranks nor accumulation change
its gradient. (BatchNorm stands apart: its statistics are those of a micro-batch on a rank, unless --freeze_bn or, over
ranks, --sync_bn.) Samples are numbered through: position p of the run is image order(seed, epoch = p // n)[p % n],
augmented as a pure function of (seed, epoch, image). Batches run across epoch ends, so every one is full; step s uses
positions s * B to (s + 1) * B. Nothing depends on the number of workers, and a resumed run on a CPU equals an
uninterrupted one bit for bit.

Three stages: 1 warm-up (lr rises linearly), 2 main (cosine decay), 3 the last epochs (lr stays at lr_final, Mosaic and
MixUp are off).

What it does not do: hyperparameter search, experiment trackers, callbacks. Change the loop, it is below.
"""
import contextlib
import copy
import csv
import datetime
import functools
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import time
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from baselines.detr import DETR, DETRConfig
from checkpoint import read_checkpoint, write_checkpoint
from configurator import InputError, build, configure
from data import Augment, DetectionDataset, collate, to_image
from eval import cpu_count, evaluate
from labels import evaluation_part
from model import HSVDET, HSVDETConfig
from optimizers import KINDS, PARTS, fastest_dtype, make_optimizers, set_precision
from plots import draw_boxes, draw_curves, image_grid, save_image
from report import write_report

# --- settings: value, then unit, range or reason. config/*.py and --key=value override them. Those of the augmentation
# and of the network are the fields of data.Augment, model.HSVDETConfig and baselines.detr.DETRConfig ------------------
# where to and where from
out_dir = 'out'
init_from = 'scratch'                                      # 'scratch', 'resume', or a checkpoint: ours or a YOLOv8 .pt
# data: a COCO json, a YOLO folder (images/ and labels/), or a VOC folder or list
train_data = 'data/shapes/train.json'
train_images = ''                                                      # folder of the images, '' looks beside the json
val_data = 'data/shapes/val.json'
val_images = ''
make_data = ''                      # shapes, long_range, half_hidden or clips: make this set if train_data is not there
imgsz: int | tuple = 640                                                      # pixels, multiples of 32; int, or (H, W)
multi_scale = 0.0                                                # 0.5: batches are resized by a random factor 0.5..1.5
workers = -1                     # loader processes; -1: none on a CPU (they would compete for its cores), else up to 8
cache_mb = 1024                                    # memory for decoded images, all loader processes of a rank together
# model
arch = 'hsvdet'                                                    # hsvdet, which is YOLOv8 with attn='---'; or rtdetr
# schedule
epochs: int | float = 100
warmup_epochs: int | float = 3                                                        # stage 1
no_aug_epochs: int | float = 10                          # stage 3, the last epochs: Mosaic and MixUp off, lr = lr_final
min_steps = 0               # > 0: on few images lengthen the run to this many steps, all its stages in proportion
max_steps = 0                                                # > 0: stop here, the schedule unchanged (tests, profiles)
batch_size = 16                                                       # images a step, over all ranks and micro-batches
grad_accum = 1                                                   # micro-batches a step: less memory, the same gradient
lr = 1e-3
lr_final = 1e-5
optimizer = 'adamw'        # adamw sgd muon lamb soap lion; with the last four AdamW still updates biases and norms
optimizer_backbone, optimizer_neck, optimizer_block, optimizer_head = '', '', '', ''  # '': as `optimizer`
lr_backbone, lr_neck, lr_block, lr_head = 1.0, 1.0, 1.0, 1.0                          # factors on lr
momentum = 0.9                                            # sgd's and muon's momentum (nesterov), beta1 of all others
beta2 = 0.999                                                                         # of adamw
weight_decay = 0.05                                                                   # not on biases, norms and gates
grad_clip = 10.0                                                     # gradient norm, of batch_size x normalized loss
ema_decay = 0.9999                                                                    # times 1 - exp(-step / ema_tau)
ema_tau = 2000                                                         # steps; a run of a few hundred steps wants less
freeze = ''                                                   # 'backbone': its weights and statistics stay as they are
freeze_bn = False                                      # BatchNorm uses its running statistics and does not update them
# machine
device = 'auto'                                                                       # auto cpu cuda cuda:1 ...
dtype = 'auto'                     # auto float32 bfloat16 float16: of the convolutions; attention and loss are float32
dtype_backbone, dtype_neck, dtype_block, dtype_head = '', '', '', ''                  # '': as `dtype`
compile = False                                                            # torch.compile of backbone, blocks and neck
checkpointing = False                                                      # recompute activations: less memory, slower
sync_bn = False                                                                   # BatchNorm statistics over all ranks
memory_cap_gb = 0.0                # > 0: limit on what PyTorch takes of the GPU's memory; CUDA itself takes up to 1 GB
seed = 0
# log
log_interval = 10                                                                     # steps
eval_interval: int | float = 1                                                        # epochs
save_interval = 0                                             # steps between checkpoints, besides those at evaluations
skip_nonfinite = 0                     # how many steps with a non-finite loss or gradient to leave out before stopping
num_pictures = 4                                                                      # val_*.jpg
report = True                                                   # report.html at the end, from one more evaluation
show_batch = False                                                 # draw the first batch to out_dir/batch.png and stop

config = configure(globals(), Augment, HSVDETConfig, DETRConfig)

# --- setup: ranks, device, precision -------------------------------------------------------------------------------
ddp = 'RANK' in os.environ
rank, local_rank, world_size = (int(os.environ.get(name, default))
                                for name, default in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
is_main_process = rank == 0


def print0(*words):
    if is_main_process:
        print(*words, flush=True)


def pick_device(device):
    """'auto', 'cpu', 'cuda' or 'cuda:n' -> 'cpu' or 'cuda:n'."""
    if not re.fullmatch(r'auto|cpu|cuda(:\d+)?', device):
        raise InputError(f'--device={device}: must be auto, cpu, cuda or cuda:n')
    available = torch.cuda.is_available()
    if device == 'auto' and not available and torch.version.cuda:
        print0(f'warning: this PyTorch is built for CUDA {torch.version.cuda} but sees no GPU (an old driver?): '
               'training on the CPU')
    if device == 'cpu' or device == 'auto' and not available:
        return 'cpu'
    if not available:
        raise InputError(f'--device={device}: this PyTorch sees no CUDA device; use --device=cpu')
    device = f'cuda:{local_rank}' if ddp else device if ':' in device else 'cuda:0'
    if int(device[5:]) >= torch.cuda.device_count():
        raise InputError(f'--device={device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0')
    torch.cuda.set_device(device)
    return device


device = pick_device(device)
device_type = device.partition(':')[0]
dtype = fastest_dtype(device) if dtype == 'auto' else dtype
imgsz = (imgsz, imgsz) if isinstance(imgsz, int) else tuple(imgsz)
for wrong, message in (
        (dtype not in ('float32', 'bfloat16', 'float16'),
         f'--dtype={dtype}: must be auto, float32, bfloat16 or float16'),
        *((config[name] not in ('', 'float32', 'bfloat16', 'float16'),
           f'--{name}={config[name]}: must be float32, bfloat16 or float16') for name in map('dtype_{}'.format, PARTS)),
        (len(imgsz) != 2 or any(type(s) is not int or s < 32 or s % 32 for s in imgsz),
         f'imgsz must be one multiple of 32 or two (H, W), got {imgsz}; 1080 rows are padded to 1088'),
        *((config[name] <= 0, f'--{name}={config[name]}: must be above 0') for name in
          ('epochs', 'batch_size', 'grad_accum', 'lr', 'eval_interval', 'log_interval', 'ema_tau', 'grad_clip')),
        *((config[name] < 0, f'--{name}={config[name]}: must be at least 0') for name in
          ('seed', 'max_steps', 'min_steps', 'save_interval', 'skip_nonfinite', 'warmup_epochs', 'no_aug_epochs',
           'lr_final', 'weight_decay', *map('lr_{}'.format, PARTS))),
        (not 0 <= ema_decay <= 1, f'--ema_decay={ema_decay}: must be from 0 to 1'),
        *((not 0 <= config[name] < 1, f'--{name}={config[name]}: must be at least 0 and below 1') for name in
          ('momentum', 'beta2')),
        (warmup_epochs + no_aug_epochs > epochs,
         f'stages: warmup_epochs={warmup_epochs} and no_aug_epochs={no_aug_epochs} must fit into epochs={epochs}'),
        (not 0 <= multi_scale < 1, f'--multi_scale={multi_scale}: must be 0 or a share below 1'),
        (compile and checkpointing, '--compile=True and --checkpointing=True exclude each other: checkpointing saves '
                                    'memory, compiling time; choose one'),
        (compile and sync_bn, '--compile=True and --sync_bn=True exclude each other: SyncBatchNorm breaks the graph at '
                              'every layer; choose one'),
        (compile and arch != 'hsvdet', f'--compile=True is for arch=hsvdet only, got arch={arch}'),
        (sync_bn and device_type == 'cpu', '--sync_bn=True needs CUDA devices; on CPU ranks --freeze_bn=True makes '
                                           'BatchNorm independent of them'),
        (batch_size % max(1, grad_accum * world_size), f'batch_size={batch_size} does not divide into '
                                                       f'grad_accum={grad_accum} micro-batches on {world_size} ranks'),
        (optimizer not in KINDS, f'--optimizer={optimizer}: must be one of {" ".join(KINDS)}'),
        *((config[name] not in ('', *KINDS), f'--{name}={config[name]}: must be one of {" ".join(KINDS)}')
          for name in map('optimizer_{}'.format, PARTS)),
        (freeze not in ('', 'backbone'), f"--freeze={freeze}: must be 'backbone' or nothing"),
        (arch not in ('hsvdet', 'rtdetr'), f'--arch={arch}: must be hsvdet or rtdetr'),
        (make_data not in ('', 'shapes', 'long_range', 'half_hidden', 'clips'),
         f'--make_data={make_data}: must be shapes, long_range, half_hidden, clips or nothing')):
    if wrong:
        raise InputError(message)
# the one place that knows architectures
Detector, DetectorConfig = (DETR, DETRConfig) if arch == 'rtdetr' else (HSVDET, HSVDETConfig)
build(DetectorConfig, config)                                       # wrong values are reported before data is read
augment = build(Augment, config)
try:
    os.makedirs(out_dir, exist_ok=True)
    with open(os.path.join(out_dir, f'.write{rank}'), 'w'):
        pass
    os.remove(os.path.join(out_dir, f'.write{rank}'))
except OSError as e:
    raise InputError(f'cannot write to out_dir {out_dir} ({e.strerror}): choose another with --out_dir=') from None
torch.backends.cudnn.allow_tf32 = False                                               # float32 means float32
if ddp:                                          # an hour: rank 0 alone runs the evaluation's matching, and makes data
    on_gpu = device_type == 'cuda'
    dist.init_process_group('nccl' if on_gpu else 'gloo', timeout=datetime.timedelta(hours=1),
                            device_id=torch.device(device) if on_gpu else None)
if memory_cap_gb and device_type == 'cpu':
    print0('warning: memory_cap_gb has no effect on a CPU')
elif memory_cap_gb:
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory_cap_gb * 2 ** 30 / total))
torch.manual_seed(seed)

# --- setup: data ----------------------------------------------------------------------------------------------------
made = tuple(os.path.join(os.path.dirname(train_data), name) for name in ('train.json', 'val.json'))
if make_data and is_main_process and not os.path.exists(train_data) and (train_data, val_data) == made:
    # never into somebody's own set
    from prepare import clips, long_range, shapes

    make = dict(shapes=shapes.make_shapes, long_range=long_range.make_long_range, clips=clips.make_clips,
                half_hidden=functools.partial(long_range.make_long_range, near=64, hidden=0.5))[make_data]
    make(os.path.dirname(train_data))
if ddp:
    dist.barrier()
memory_frames = config['frames'] if arch == 'hsvdet' and 'time' in config['memory'] else 0  # earlier frames per image
train_set = DetectionDataset(train_data, train_images, imgsz, augment, seed, cache_mb, frames=memory_frames)
val_data = evaluation_part(val_data)
val_set = DetectionDataset(val_data, val_images, imgsz, names=train_set.names, frames=memory_frames)
objects = np.bincount(np.concatenate(train_set.labels), minlength=len(train_set.names))
n_images, micro = len(train_set), batch_size // (grad_accum * world_size)
if micro < 2 and config['memory'].endswith(':shuffled'):
    raise InputError(f'--memory={config["memory"]}: an image gets the tokens of another one of its micro-batch, which '
                     'has no other: a larger --batch_size, or a smaller --grad_accum')
if micro == 1 and not freeze_bn and max(imgsz) * (1 - multi_scale) < 48:
    raise InputError('32x32, which multi_scale may also make of 64x64, with one image a micro-batch leaves BatchNorm a '
                     'single value at P5: a larger --imgsz or --batch_size')
stretch = max(1.0, min_steps * batch_size / (epochs * n_images))
if stretch > 1:
    epochs, warmup_epochs, no_aug_epochs, eval_interval = (
        some * stretch for some in (epochs, warmup_epochs, no_aug_epochs, eval_interval))
    print0(f'{epochs:.0f} epochs instead of {config["epochs"]}: {n_images} images then have {min_steps} steps '
           '(as you say it: --min_steps=0)')
train_set.no_aug_epoch = no_aug_start = epochs - no_aug_epochs
total_steps = max(1, round(epochs * n_images / batch_size))
print0(f'train: {n_images} images, {objects.sum()} objects, {len(objects)} classes; val: {len(val_set)} images')
for where, s in ((train_data, train_set), (val_data, val_set)):
    for kind, (count, example) in s.issues.items():
        missed = '; their objects count as missed' if s is val_set and kind.startswith('image') else ''
        print0(f'{where}: {kind}: {count}, such as {example}{missed}')
if (objects == 0).any():
    print0('warning: no training object of ' + ', '.join(train_set.names[i] for i in np.flatnonzero(objects == 0)[:10]))
if total_steps < 300 and init_from == 'scratch':
    print0(f'warning: {total_steps} steps are few to learn from scratch; more --epochs, or a smaller --batch_size')


class Batches:
    """The batch sampler: for every step from `first` on, this rank's `grad_accum` micro-batches of (epoch, index)."""

    def __init__(self, first):
        self.first = first

    def __iter__(self):
        epoch, order = -1, None
        for step in range(self.first, total_steps):
            for m in range(grad_accum):
                start = step * batch_size + (m * world_size + rank) * micro
                batch = []
                for p in range(start, start + micro):
                    if p // n_images != epoch:
                        epoch = p // n_images
                        order = train_set.order(epoch)
                    batch.append((p / n_images, int(order[p % n_images])))
                yield batch


def init_worker(worker):
    os.setpgrp()                                                           # torchrun's SIGTERM goes to the whole group
    signal.signal(signal.SIGINT, signal.SIG_IGN)                             # Ctrl-C is for the loop, which then saves


def make_loader(first):
    """Batches from step `first` on, from `workers` processes."""
    n = workers
    if n < 0:
        n = 0 if device_type == 'cpu' else max(1, min(8, cpu_count() // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))
    if 'fork' not in multiprocessing.get_all_start_methods():            # a spawned worker would run this script again
        n = 0
    return torch.utils.data.DataLoader(
        train_set, batch_sampler=Batches(first), num_workers=n, collate_fn=collate, pin_memory=device_type == 'cuda',
        prefetch_factor=4 if n else None, generator=torch.Generator(), multiprocessing_context='fork' if n else None,
        worker_init_fn=init_worker)


if show_batch:
    samples = [train_set[key] for key in next(iter(Batches(0)))]
    page = image_grid([(s['image'][-1] if memory_frames else s['image'], s['boxes'], s['labels']) for s in samples],
                      train_set.names)
    save_image(page, os.path.join(out_dir, 'batch.png'))
    raise SystemExit

# --- setup: model, optimizers, EMA ----------------------------------------------------------------------------------
def load_resume():
    """The checkpoint to go on from: ckpt.pt, or the one before it where that is damaged."""
    damaged = ''
    for path in (os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, 'ckpt_prev.pt')):
        try:
            saved = read_checkpoint(path)
            if 'optimizers' not in saved:
                raise InputError(f'{path} holds weights only: start from it with --init_from={path}')
            types = dict(model=dict, ema=dict, optimizers=list, scaler=dict, config=dict, running=dict, step=int,
                         count=int, best=float)
            if wrong := [name for name, some in types.items() if not isinstance(saved.get(name), some)]:
                raise InputError(f'{path} is damaged: {wrong[0]} is missing or of another kind')
        except InputError as e:
            damaged = damaged or str(e)
            continue
        if damaged:
            print0(f'{damaged}; going on from {path}, step {saved["step"]}')
        changed = [f'{name}={config[name]} (was {value})' for name, value in saved['config'].items()
                   if name in config and config[name] != value
                   and name not in ('init_from', 'out_dir', 'max_steps', 'workers', 'cache_mb', 'device')]
        if changed:
            print0('warning: this is not the run that was saved: ' + ', '.join(changed))
        return saved
    raise InputError(f'nothing to resume in {out_dir}: {damaged}')


def restore(saved):
    """The state of model, EMA, optimizers and scaler from a checkpoint; this command's settings win over its own."""
    try:
        for name in ('optimizer', *map('optimizer_{}'.format, PARTS)):
            if saved['config'].get(name, config[name]) != config[name]:
                raise ValueError(f'{name}={saved["config"][name]}')
        model.load_state_dict(saved['model'])
        ema.load_state_dict(saved['ema'])
        for o, state in zip(optimizers, saved['optimizers'], strict=True):
            now = [{name: group[name] for name in ('factor', 'weight_decay', 'momentum', 'betas') if name in group}
                   for group in o.param_groups]
            o.load_state_dict(state)
            for group, settings in zip(o.param_groups, now, strict=True):
                group.update(settings)
        if saved['scaler']:                                                           # empty unless the run was fp16
            scaler.load_state_dict(saved['scaler'])
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as e:
        why = ' '.join(str(e).split())[:150]
        raise InputError(f'the checkpoint in {out_dir} holds another network or optimizer ({why}): '
                         'resume with the settings of the run') from None


config['num_classes'] = len(train_set.names)
resume = load_resume() if init_from == 'resume' else None
if resume and list(resume.get('names', train_set.names)) != list(train_set.names):
    raise InputError(f'{train_data} has the classes {", ".join(train_set.names[:5])}, the run to resume had '
                     f'{", ".join(resume["names"][:5])}: resume with its labels, or start from its weights')
if init_from in ('scratch', 'resume'):
    model = Detector(build(DetectorConfig, config))
else:
    model = Detector.from_pretrained(init_from, verbose=is_main_process, **asdict(build(DetectorConfig, config)))
if sorted(model.names) == sorted(train_set.names) and list(model.names) != list(train_set.names):
    print0(f'warning: {init_from} has these classes in another order, {", ".join(model.names[:5])}: what it knows of '
           'one goes to another')
model.names, model.imgsz, model.checkpointing = train_set.names, imgsz, checkpointing
model = model.to(device, memory_format=torch.channels_last)
if sync_bn and ddp:
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
kinds = {part: config[f'optimizer_{part}'] or optimizer for part in PARTS}
factors = {part: config[f'lr_{part}'] for part in PARTS}
groups = model.param_groups(1.0, weight_decay, factors)      # before freezing: set_precision covers frozen parts too
if freeze == 'backbone':
    model.backbone.requires_grad_(False)
optimizers = make_optimizers(model.param_groups(1.0, weight_decay, factors), kinds, momentum, beta2)
dtypes = {part: config[f'dtype_{part}'] or dtype for part in PARTS}
if set(dtypes.values()) == {dtype}:                                                   # all as autocast does it anyhow
    dtypes = {}
half = 'float16' in (dtype, *dtypes.values())
scaler = torch.amp.GradScaler(device_type, init_scale=2.0 ** 10, enabled=half)        # our sums start large
ema = copy.deepcopy(model).eval().requires_grad_(False)
params = [p for p in model.parameters() if p.requires_grad]
loss_params = {part: [p for p in some if p.requires_grad] for part, some in model.loss_parameters().items()}


def split_state(model):
    """The tensors of its state dict: floating-point ones, which the EMA averages, and integers, which it copies."""
    tensors = model.state_dict().values()
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]


(ema_floats, ema_ints), (model_floats, model_ints) = split_state(ema), split_state(model)
step, best, running, count = 0, -1.0, {}, 0
if resume:
    restore(resume)
    step, best, running, count = resume['step'], resume['best'], resume['running'], resume['count']
batches = iter(make_loader(step))
set_precision(model, groups, dtypes, device_type)                                     # evaluation computes in float32
if compile:                                                             # assignment and losses change shape every time
    model.forward_features = torch.compile(model.forward_features)
net = model
if ddp:                            # only rank 0's BatchNorm statistics are ever used: see evaluate_and_log and restore
    net = torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[local_rank] if device_type == 'cuda' else None, broadcast_buffers=False)
amp = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
print0(f'{arch} {asdict(model.cfg)}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; '
       f'{imgsz[0]}x{imgsz[1]}, batch {batch_size} = {world_size} ranks x {grad_accum} micro-batches x {micro}; '
       f'{device} {dtype}{"".join(f", {part} {some}" for part, some in dtypes.items())}; {total_steps} steps')

# --- setup: log and checkpoints -------------------------------------------------------------------------------------
log_path = os.path.join(out_dir, 'log.csv')
parts = list(loss_params)
loss_columns = {part: [name if part == parts[0] else f'{part}_{name}' for name in model.LOSSES] for part in parts}
columns = ['step', 'epoch', 'lr', *sum(loss_columns.values(), []), 'objects', 'grad_norm',
           *(f'{what}_{level}' for what in ('gate', 'share', *(['kept'] if config['keep'] else []))
             for level in model.blocks()), 'AP', 'AP50', 'AP75']
FILES = r'(ckpt|ckpt_prev|best)\.pt|log\.csv|curves\.png|batch\.png|val_\d+\.jpg|report\.html'


def move_earlier_run():
    """What an older run left in out_dir goes to earlier_n there."""
    if not any(os.path.exists(os.path.join(out_dir, name)) for name in ('ckpt.pt', 'best.pt')):
        return
    n = next(n for n in range(1, 10 ** 6) if not os.path.exists(os.path.join(out_dir, f'earlier_{n}')))
    folder = os.path.join(out_dir, f'earlier_{n}')
    os.makedirs(folder)
    for name in os.listdir(out_dir):
        if re.fullmatch(FILES, name):
            os.replace(os.path.join(out_dir, name), os.path.join(folder, name))
    print0(f'{out_dir} held a run already: moved to {folder}')


def is_whole(row):
    """Has this row of log.csv all its cells, a number or nothing in each?"""
    try:
        int(row['step']), float(row['epoch'])
        return None not in row and None not in [float(cell) if cell else cell for cell in row.values()]
    except (KeyError, TypeError, ValueError):
        return False


def open_log():
    """log.csv, cut back to the step that the run goes on from. It holds no clock: a resumed run's log is the same."""
    rows = []
    if resume and os.path.exists(log_path):
        with open(log_path, newline='', errors='replace') as f:      # the last row may have broken off
            rows = [row for row in csv.DictReader(f) if is_whole(row) and int(row['step']) <= step]
    with open(log_path + '.part', 'w', newline='') as f:
        writer = csv.DictWriter(f, columns, restval='', extrasaction='ignore')
        writer.writeheader()
        writer.writerows(rows)
    os.replace(log_path + '.part', log_path)
    return open(log_path, 'a', newline='')


if is_main_process:
    if not resume:
        move_earlier_run()
    log_file = open_log()
try:
    commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=os.path.dirname(os.path.abspath(__file__)),
                            capture_output=True, text=True).stdout.strip()
except OSError:                                                                       # no git on this machine
    commit = ''


def log_row(row):
    try:
        csv.DictWriter(log_file, columns, restval='', extrasaction='ignore').writerow(row)
        log_file.flush()
    except OSError as e:
        print0(f'warning: step {row["step"]} is missing in {log_path} ({e.strerror})')


def save_checkpoint():
    if is_main_process:
        warning = write_checkpoint(os.path.join(out_dir, 'ckpt.pt'), dict(
            model.checkpoint(), ema=ema.state_dict(), optimizers=[o.state_dict() for o in optimizers],
            scaler=scaler.state_dict(), step=step, total_steps=total_steps, best=best, running=running,
            count=count, config=config, commit=commit, seed=seed), keep_previous=True)
        if warning:
            print0(f'warning: {warning}')


stop_signals = []


def request_stop(number, frame):
    """SIGTERM, Ctrl-C: finish the step, save, leave. A second signal ends the process at once."""
    stop_signals.append(signal.Signals(number).name)
    signal.signal(number, signal.SIG_DFL)


for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, request_stop)


# --- what the loop below calls ----------------------------------------------------------------------------------------

def lr_at(epoch):
    """Stage 1: linear up. Stage 2: half a cosine from lr to lr_final. Stage 3: lr_final."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if epoch >= no_aug_start:
        return lr_final
    done = (epoch - warmup_epochs) / (no_aug_start - warmup_epochs)
    return lr_final + (lr - lr_final) * 0.5 * (1 + math.cos(math.pi * done))


def to_device(batch):
    """A batch of the loader -> images (b, 3, H, W) in 0..1 or clips (b, F, 3, H, W), and targets; see multi_scale."""
    images = batch['images'].to(device, non_blocking=True)
    images = (images if memory_frames else images.to(memory_format=torch.channels_last)).float() / 255
    targets = {name: batch[name].to(device, non_blocking=True) for name in ('labels', 'boxes')}
    if multi_scale:
        factor = random.Random(seed * 1_000_003 + step).uniform(1 - multi_scale, 1 + multi_scale)
        H, W = (max(32, round(s * factor / 32) * 32) for s in imgsz)
        factors = torch.tensor([W / imgsz[1], H / imgsz[0]] * 2).to(device, non_blocking=True)
        targets['boxes'] = targets['boxes'] * factors
        images = F.interpolate(images.flatten(0, -4), (H, W), mode='bilinear').unflatten(0, images.shape[:-3])
    return images, targets


def skip_step(reason, batch, losses, buffers):
    """A step that is not finite is not taken: save what made it; stop, or restore the BatchNorm statistics."""
    where = os.path.join(out_dir, f'nonfinite_{step}_rank{rank}.pt')
    write_checkpoint(where, dict(batch=batch, losses=losses, **model.checkpoint()))
    names = ', '.join(train_set.files[i] for i in batch['index'][:4].tolist())
    message = (f'{reason} at step {step} (losses {losses}), last micro-batch {names}, ...; saved with the weights as '
               f'{where}. Try --dtype=float32 or a lower --lr, or leave out some such steps with --skip_nonfinite=10')
    if skipped > skip_nonfinite:
        raise InputError(message)
    print0(f'warning: left out step {step}: {message}')
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)


@torch.no_grad()
def block_columns(images):
    """
    What the EMA model's attention blocks do: gate; share = |block(x) - x| / |x| on these images; and, under
    `keep`, kept, the mean number of tokens that an image keeps.
    """
    found = {f'gate_{level}': block.gate.item() for level, block in ema.blocks().items()}

    def measure(block, inputs, output, level):
        x = inputs[0]
        found[f'share_{level}'] = ((output - x).float().norm() / x.float().norm().clamp(min=1e-12)).item()
        if config['keep'] and len(inputs) == 4 and inputs[3].kept is not None:        # inputs: see model.HSVDET.attend
            found[f'kept_{level}'] = inputs[3].kept.sum(1).float().mean().item()

    hooks = [block.register_forward_hook(lambda *a, level=level: measure(*a, level))
             for level, block in ema.blocks().items()]
    if hooks and images is not None:
        ema(images)
    for hook in hooks:
        hook.remove()
    return found


def draw_pictures():
    """val_*.jpg: what the EMA model sees in the first validation images."""
    for i in range(min(num_pictures, len(val_set))):
        image = val_set[0, i]['image']                                                # (3, H, W) uint8
        found = ema.detect(image[None].to(device).float() / 255)[0].cpu()
        image = image[-1] if memory_frames else image                                 # the last frame of a clip
        zoom = max(1, 480 // max(image.shape))                                        # words need room
        picture = to_image(image).resize((image.shape[2] * zoom, image.shape[1] * zoom))
        picture = draw_boxes(picture, found[:, :4] * zoom, found[:, 5], val_set.names, found[:, 4])
        picture.save(os.path.join(out_dir, f'val_{i}.jpg'), quality=92)


def evaluate_and_log(row):
    """Evaluate the EMA weights, log, save (best.pt, ckpt.pt), draw, print."""
    global best, evaluating, shown
    t = time.time()
    if ddp:                                                                      # each rank saw other images: rank 0's
        for buffer in ema.buffers():                                                  # BatchNorm is the model's
            dist.broadcast(buffer, 0)
    stats = evaluate(ema, val_set, imgsz, batch_size=max(1, micro), device=device, rank=rank, world_size=world_size)
    before, improved, best = best, stats['AP'] > best, max(best, stats['AP'])
    if not is_main_process:
        return
    blocks = block_columns(val_set[0, 0]['image'][None].to(device).float() / 255)
    log_row({**{name: row[name] for name in ('step', 'epoch', 'lr')}, **blocks,
             **{name: stats[name] for name in ('AP', 'AP50', 'AP75')}})
    if improved:
        warning = write_checkpoint(os.path.join(out_dir, 'best.pt'),
                                   ema.checkpoint(AP=best, best_f1=stats['best_f1'], step=step,
                                                  total_steps=total_steps, config=config, commit=commit))
        if warning:
            best = before                                                             # the next may still be written
            print0(f'warning: {warning}')
    save_checkpoint()
    try:
        draw_curves(log_path, os.path.join(out_dir, 'curves.png'), warmup_epochs, no_aug_start)
        draw_pictures()
    except OSError as e:
        print0(f'warning: no pictures this time ({e.strerror})')
    print0(f'epoch {row["epoch"]:.2f} | AP {stats["AP"]:.4f} AP50 {stats["AP50"]:.4f} AP75 {stats["AP75"]:.4f} | '
           f'best {best:.4f}' + ''.join(f' | {name} {value:+.3f}' for name, value in blocks.items())
           + f' | {time.time() - t:.1f} s evaluating | {(t - started - evaluating) / 60:.2f} min of training '
           + (f'since step {first_step}' if first_step else 'so far'))
    evaluating, shown = evaluating + time.time() - t, shown + time.time() - t
    if row['epoch'] > warmup_epochs + 3 and best < 0.002:
        print0('warning: AP is still near zero: look at --show_batch=True, and at the class ids of both files')


def print_progress(row, seconds, images):
    """One line that a tired person can read; and, once, that the data is what the loop waits for."""
    global warned
    left = (time.time() - started) / (step - first_step) * (last - step) / 60
    losses = ' '.join(f'{name} {row[name]:.3f}' for name in sum(loss_columns.values(), []) if name in row)
    memory = f' | {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB' if device_type == 'cuda' else ''
    print0(f'step {step}/{total_steps} epoch {row["epoch"]:.2f} | {losses} | lr {row["lr"]:.2e} | '
           f'{row["objects"]:.1f} objects an image | {images / seconds:.1f} images/s{memory} | {left:.1f} min left')
    if waited > 0.3 * seconds and step - first_step > 2 * log_interval and not warned:
        warned = True
        print0(f'warning: {waited / seconds:.0%} of the time is spent waiting for data; raise --workers ({workers}) or '
               '--cache_mb')


# --- the loop -------------------------------------------------------------------------------------------------------
model.train()
frozen = [model.backbone] if freeze == 'backbone' else []
norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
for module in frozen + (norms if freeze_bn else []):
    module.eval()
last = min(total_steps, max_steps) if max_steps else total_steps
first_step, shown_step, skipped, waited, evaluating, warned = step, step, 0, 0.0, 0.0, False
started = shown = time.time()
if step == 0 and init_from not in ('scratch', 'resume'):                              # what the weights are worth
    evaluate_and_log(dict(step=0, epoch=0.0, lr=0.0))
while step < last:
    # 1) learning rate
    now_lr = lr_at(step * batch_size / n_images)
    for o in optimizers:
        for group in o.param_groups:
            group['lr'] = group['factor'] * now_lr

    # 2) forward and backward, micro-batch by micro-batch, of losses that are sums: nothing is divided yet. Random
    # numbers (random selection, denoising) are seeded by (seed, step, rank): ranks differ, a resumed run repeats them
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))
    totals = {}                                       # keys: 'objects', (part, name of a loss), (part, 'normalizer')
    buffers = [b.clone() for b in model.buffers()] if skip_nonfinite else []         # a bad batch spoils BatchNorm too
    for m in range(grad_accum):
        t = time.time()
        batch = next(batches)
        waited += time.time() - t
        images, targets = to_device(batch)
        with net.no_sync() if ddp and m < grad_accum - 1 else contextlib.nullcontext():  # ranks talk once a step
            with amp:
                _, losses = net(images, targets)
            scaler.scale(sum(sum(sums.values()) for sums, _ in losses.values())).backward()
        totals['objects'] = totals.get('objects', 0) + (targets['labels'] >= 0).sum().double()
        for part, (sums, normalizer) in losses.items():
            for name, value in {**sums, 'normalizer': normalizer}.items():
                totals[part, name] = totals.get((part, name), 0) + value.detach().double()

    # 3) divide the gradients by the normalizer of the whole batch, which is known only now. Times the batch size, as
    # published recipes have it, so that their grad_clip and SGD's lr can be used as they are
    totals['stop'] = torch.full((), float(len(stop_signals)), dtype=torch.float64, device=device)
    packed = torch.stack(list(totals.values()))
    if ddp:
        dist.all_reduce(packed)
    totals = dict(zip(totals, packed.unbind(), strict=True))
    for o in optimizers:
        scaler.unscale_(o)
    for part, part_params in loss_params.items():                                     # DDP took the mean over ranks
        gradients = [p.grad for p in part_params if p.grad is not None]
        torch._foreach_mul_(gradients, (batch_size * world_size / totals[part, 'normalizer'].clamp(min=1)).float())
    totals['norm'] = torch.nn.utils.clip_grad_norm_(params, grad_clip).double()
    totals = dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True))  # the only wait for a GPU
    norm, stop_requested = totals.pop('norm'), totals.pop('stop') > 0

    # 4) step, if everything is finite. In fp16 a gradient that overflows is normal: the step is skipped, and the scaler
    # halves its scale; it counts as an error once the scale is below 2^-10
    loss_finite, overflow = math.isfinite(sum(totals.values())), not math.isfinite(norm)
    bad = not loss_finite or overflow and (not scaler.is_enabled() or scaler.get_scale() < 2 ** -10)
    if bad:
        skipped += 1
        skip_step(f'the {"gradient" if loss_finite else "loss"} is not finite', batch, totals, buffers)
    elif not overflow:                          # scaler.step() would check again, and make the CPU wait for the GPU
        for o in optimizers:
            o.step()
    scaler.update()
    for o in optimizers:
        o.zero_grad(set_to_none=True)

    # 5) EMA of the weights and of BatchNorm's statistics
    step += 1
    with torch.no_grad():
        torch._foreach_lerp_(ema_floats, model_floats, 1 - ema_decay * (1 - math.exp(-step / ema_tau)))
        torch._foreach_copy_(ema_ints, model_ints)

    # 6) log: means over the interval
    epoch = step * batch_size / n_images
    row = dict(step=step, epoch=round(epoch, 4), lr=now_lr)
    if not bad and not overflow:
        means = {column: totals.get((part, name), 0.0) / max(totals[part, 'normalizer'], 1.0)
                 for part in parts for name, column in zip(model.LOSSES, loss_columns[part], strict=True)}
        for name, value in {**means, 'objects': totals['objects'] / batch_size, 'grad_norm': norm}.items():
            running[name] = running.get(name, 0.0) + value
        count += 1
    if step % log_interval == 0 and count:
        row |= {name: value / count for name, value in running.items()}
        running, count = {}, 0
        if is_main_process:
            log_row(row | block_columns(None))
            print_progress(row, time.time() - shown, (step - shown_step) * batch_size)
        shown, shown_step, waited = time.time(), step, 0.0

    # 7) evaluate, save
    previous = (step - 1) * batch_size / n_images
    due = step == last or int(epoch / eval_interval + 1e-9) > int(previous / eval_interval + 1e-9)
    if due:
        try:
            evaluate_and_log(row)
        except Exception:                                                             # the steps are not lost with it
            save_checkpoint()
            raise
    if stop_requested or not due and save_interval and step % save_interval == 0:
        save_checkpoint()
    if stop_requested:
        reason = stop_signals[0] if stop_signals else 'another rank'
        print0(f'{reason} at step {step}: saved; go on with --init_from=resume')
        break

if is_main_process:
    with contextlib.suppress(OSError):                                                # a full disk was said before
        log_file.close()
    seconds = time.time() - started
    print0(f'{(seconds - evaluating) / 60:.2f} min of training and {evaluating / 60:.2f} of evaluation, '
           f'{(step - first_step) * batch_size / seconds:.1f} images/s with everything; '
           f'best AP {best:.4f}; in {out_dir}: ' + ' '.join(sorted(os.listdir(out_dir))))
if ddp:
    dist.barrier()
    dist.destroy_process_group()
if is_main_process and report and step == last and os.path.exists(os.path.join(out_dir, 'best.pt')):
    try:
        problem = write_report(out_dir, val_data, val_images, imgsz, max(1, micro), device)
    except OSError as e:
        problem = f'no report: {e.strerror}'
    print0(f'warning: {problem}' if problem else f'look at it: {out_dir}/report.html')
if ddp:
    print(end='', flush=True)
    os._exit(0)                                                            # gloo's threads can abort Python's own exit

"""
Train a detector.

    python train.py config/shapes.py                                  minutes on a CPU, no download
    python train.py config/finetune_own.py --train_data=... --val_data=...
    python train.py config/hsvdet_coco20.py                           one GPU
    torchrun --nproc_per_node=8 train.py config/hsvdet_coco20.py      one machine, eight GPUs
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=10.0.0.1 --master_port=29500 train.py ...    two machines
    ... --init_from=resume                                            go on where a run broke off

out_dir receives ckpt.pt (everything needed to go on; ckpt_prev.pt is the one before), best.pt (EMA weights of the best
evaluation), log.csv, curves.png and val_*.jpg. What a new run finds there of an older one it moves to earlier_1, _2, ...

One step is one *effective* batch: batch_size images, over all ranks and `grad_accum` micro-batches. A loss is normalised by
the sum of target scores of the whole effective batch, so neither ranks nor accumulation change its gradient. (BatchNorm
stands apart: its statistics are those of a micro-batch on a rank, unless --freeze_bn or, over ranks, --sync_bn.) Samples are
numbered through: position p of the run is image order(seed, epoch = p // n)[p % n], augmented as a pure function of
(seed, epoch, image). Batches run across epoch ends, so every one is full; step s uses positions s * B to (s + 1) * B.
Nothing depends on the number of workers, and a resumed run on a CPU equals an uninterrupted one bit for bit.

Three stages: warm-up (lr rises), main (cosine), last (lr constant at lr_final, Mosaic and MixUp off, which are on before).

What it does not do: hyperparameter search, experiment trackers, callbacks. Change the loop, it is below.
"""
import contextlib
import copy
import csv
import datetime
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from configurator import configure
from data import DetectionDataset, InputError, collate, draw_boxes, make_far, make_shapes
from eval import evaluate
from model import BACKBONE, HSVDET, HSVDETConfig, read_checkpoint

# --- knobs: value, then unit, range or reason. config/*.py and --key=value override them ------------------------------
# where to and where from
out_dir = 'out'
init_from = 'scratch'             # 'scratch', 'resume', or a checkpoint: ours or a YOLOv8 .pt
# data: a COCO json, or a YOLO folder (images/ and labels/)
train_data = 'data/shapes/train.json'
train_images = ''                 # folder of the images, '' looks beside the json
val_data = 'data/shapes/val.json'
val_images = ''
make_data = ''                    # 'shapes' or 'far': make this synthetic set if train_data is not there
imgsz: int | tuple = 640          # pixels, multiples of 32; int, or (H, W)
multi_scale = 0.0                 # 0.5: batches are resized by a random factor 0.5..1.5
workers = -1                      # loader processes; -1: none on a CPU (they would fight it for its cores), else up to 8
cache_mb = 1024                   # memory for decoded images, all loader processes of a rank together
# augmentation
mosaic = 1.0                      # probability
mixup = 0.0                       # probability, on top of Mosaic
mosaic_block = 0                  # partners from the same n neighbours of the epoch's order, which a cache serves; 0: from all
scale_aug = 0.5                   # size factor 1 - .. 1 + ..
translate = 0.1                   # share of the image
flip = 0.5                        # probability, left-right
hsv_h, hsv_s, hsv_v = 0.015, 0.7, 0.4
# model
scale = 'n'                       # n s m l x
attn = '-SS'                      # P3 P4 P5: - none, S sparse, F full, D dense path alone; '---' is YOLOv8
k: int | float = 512              # tokens: a count, a fraction below 1, 0 for all
select = 'l2sq'                   # l2sq l2 random learned
gate = 'learned'                  # learned fixed none
heads = 1
pos = False
one2one = False                   # a second head that needs no NMS
# schedule
epochs: int | float = 100
warmup_epochs: int | float = 3    # stage 1
no_aug_epochs: int | float = 10    # stage 3, the last ones: Mosaic and MixUp off, lr at lr_final
max_steps = 0                     # > 0: stop here, the schedule unchanged (tests, profiles)
batch_size = 16                   # images a step, over all ranks and micro-batches
grad_accum = 1                         # micro-batches a step: less memory, the same gradient
lr = 1e-3
lr_final = 1e-5
optimizer = 'adamw'               # adamw sgd lion
optimizer_backbone, optimizer_neck, optimizer_block, optimizer_head = '', '', '', ''      # '': as `optimizer`
lr_backbone, lr_neck, lr_block, lr_head = 1.0, 1.0, 1.0, 1.0                              # factors on lr
momentum = 0.9                    # sgd's momentum (nesterov), beta1 of the others
beta2 = 0.999
weight_decay = 0.05               # not on biases, norms and gates
grad_clip = 10.0                       # gradient norm, of a loss counted per image (sum over the batch)
ema_decay = 0.9999                # times 1 - exp(-step / ema_tau)
ema_tau = 2000                    # steps; a run of a few hundred steps wants less
freeze = ''                       # 'backbone': its weights and statistics stay as they are
freeze_bn = False                 # BatchNorm uses its running statistics and does not update them
# machine
device = 'auto'                   # auto cpu cuda cuda:1 ...
dtype = 'auto'                    # auto float32 bfloat16 float16: of the convolutions; attention and loss are float32
compile = False                   # torch.compile of backbone, blocks and neck
checkpointing = False             # recompute activations: less memory, slower
sync_bn = False                   # BatchNorm statistics over all ranks
memory_cap_gb = 0.0               # > 0: hard limit on what PyTorch takes of the GPU's memory; CUDA itself takes up to 1 GB more
seed = 0
# log
log_interval = 10                 # steps
eval_interval: int | float = 1    # epochs
save_interval = 0                 # steps between checkpoints, besides those at evaluations
skip_nonfinite = 0                # how many steps with a non-finite loss or gradient to leave out before stopping
num_pictures = 4                  # val_*.jpg

config = configure(globals())

# --- where are we ------------------------------------------------------------------------------------------------------
ddp = 'RANK' in os.environ
rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
is_main_process = rank == 0
if not re.fullmatch(r'auto|cpu|cuda(:\d+)?', device):
    raise InputError(f'--device={device}: must be auto, cpu, cuda or cuda:n')
if device == 'auto':
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
if device != 'cpu':
    if not torch.cuda.is_available():
        raise InputError(f'--device={device}: this PyTorch sees no CUDA device; use --device=cpu')
    device = f'cuda:{local_rank}' if ddp else device if ':' in device else 'cuda:0'
    if int(device[5:]) >= torch.cuda.device_count():
        raise InputError(f'--device={device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0')
    torch.cuda.set_device(device)
device_type = device.partition(':')[0]
if dtype == 'auto':                                                                   # emulated bf16 is slower than float32
    if device_type == 'cuda':
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    dtype = 'bfloat16' if fast else 'float16' if device_type == 'cuda' else 'float32'
if dtype not in ('float32', 'bfloat16', 'float16'):
    raise InputError(f'--dtype={dtype}: must be auto, float32, bfloat16 or float16')
imgsz = (imgsz, imgsz) if isinstance(imgsz, int) else tuple(imgsz)
if len(imgsz) != 2 or any(type(s) is not int or s < 32 or s % 32 for s in imgsz):
    raise InputError(f'imgsz must be one multiple of 32 or two (H, W), got {imgsz}; 1080 rows are padded to 1088')
for name in ('epochs', 'batch_size', 'grad_accum', 'lr', 'eval_interval', 'log_interval', 'ema_tau', 'grad_clip'):
    if config[name] <= 0:
        raise InputError(f'--{name}={config[name]}: must be above 0')
if not 0 <= warmup_epochs + no_aug_epochs <= epochs:
    raise InputError(f'stages: warmup_epochs={warmup_epochs} and no_aug_epochs={no_aug_epochs} must fit into epochs={epochs}')
if not 0 <= multi_scale < 1:
    raise InputError(f'--multi_scale={multi_scale}: must be 0 or a share below 1')
if compile and checkpointing:
    raise InputError('--compile=True and --checkpointing=True exclude each other: checkpointing saves memory, compiling time; choose one')
if sync_bn and device_type == 'cpu':
    raise InputError('--sync_bn=True needs CUDA devices; on CPU ranks --freeze_bn=True makes BatchNorm independent of them')
if batch_size % (grad_accum * world_size):
    raise InputError(f'batch_size={batch_size} does not divide into grad_accum={grad_accum} micro-batches on {world_size} ranks')
for name in ('optimizer', 'optimizer_backbone', 'optimizer_neck', 'optimizer_block', 'optimizer_head'):
    if config[name] not in ('adamw', 'sgd', 'lion') + (('',) if name != 'optimizer' else ()):
        raise InputError(f'--{name}={config[name]}: must be adamw, sgd or lion')
if freeze not in ('', 'backbone'):
    raise InputError(f"--freeze={freeze}: must be 'backbone' or nothing")
model_config = dict(scale=scale, attn=attn, k=k, select=select, gate=gate, heads=heads, pos=pos, one2one=one2one)
HSVDETConfig(**model_config)                                                          # a wrong letter is said before data is read
try:
    os.makedirs(out_dir, exist_ok=True)
    with open(os.path.join(out_dir, f'.write{rank}'), 'w'):
        pass
    os.remove(os.path.join(out_dir, f'.write{rank}'))
except OSError as e:
    raise InputError(f'cannot write to out_dir {out_dir} ({e.strerror}): choose another with --out_dir=') from None
if ddp:
    cuda = device_type == 'cuda'                                                      # an hour: rank 0 alone judges, and makes data
    dist.init_process_group('nccl' if cuda else 'gloo', timeout=datetime.timedelta(hours=1), device_id=torch.device(device) if cuda else None)
if memory_cap_gb and device_type == 'cpu':
    print('warning: memory_cap_gb has no effect on a CPU')
elif memory_cap_gb:
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory_cap_gb * 2 ** 30 / torch.cuda.get_device_properties(device).total_memory))
torch.manual_seed(seed)


def print0(*words):
    if is_main_process:
        print(*words, flush=True)


# --- data ----------------------------------------------------------------------------------------------------------------
if make_data not in ('', 'shapes', 'far'):
    raise InputError(f"--make_data={make_data}: must be 'shapes', 'far' or nothing")
made = (os.path.join(os.path.dirname(train_data), name) for name in ('train.json', 'val.json'))
if make_data and is_main_process and not os.path.exists(train_data) and (train_data, val_data) == tuple(made):     # never into somebody's own set
    {'shapes': make_shapes, 'far': make_far}[make_data](os.path.dirname(train_data))
if ddp:
    dist.barrier()
augment = dict(mosaic=mosaic, mixup=mixup, scale=scale_aug, translate=translate, hsv=(hsv_h, hsv_s, hsv_v), flip=flip,
               no_aug_epoch=epochs - no_aug_epochs, block=mosaic_block)
train_set = DetectionDataset(train_data, train_images, imgsz, augment, seed, cache_mb)
val_set = DetectionDataset(val_data, val_images, imgsz, names=train_set.names)           # classes in the training set's order
objects = np.bincount(np.concatenate(train_set.labels), minlength=len(train_set.names))
print0(f'train: {len(train_set)} images, {objects.sum()} objects, {len(objects)} classes; val: {len(val_set)} images')
for where, s in ((train_data, train_set), (val_data, val_set)):
    for kind, (count, example) in s.issues.items():
        missed = '; their objects count as missed' if s is val_set and kind.startswith('image') else ''
        print0(f'{where}: {kind}: {count}, such as {example}{missed}')
if (objects == 0).any():
    print0('warning: no training object of ' + ', '.join(train_set.names[i] for i in np.flatnonzero(objects == 0)[:10]))

n_images, micro = len(train_set), batch_size // (grad_accum * world_size)
total_steps = max(1, round(epochs * n_images / batch_size))


class Batches:
    """The batch sampler: for every step from `first` on, this rank's `grad_accum` micro-batches of (epoch, index) pairs."""

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
                    batch.append((epoch, int(order[p % n_images])))
                yield batch


# --- model, optimizer, EMA -----------------------------------------------------------------------------------------------
class Lion(torch.optim.Optimizer):
    """The sign of a momentum (Chen et al. 2023, 2302.06675). Wants an lr 3 to 10 times smaller than AdamW's."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group['betas']
            for p in group['params']:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p]['momentum'] = torch.zeros_like(p)
                    m = self.state[p]['momentum']
                    p.mul_(1 - group['lr'] * group['weight_decay']).sub_(group['lr'] * torch.lerp(p.grad, m, beta1).sign_())
                    m.lerp_(p.grad, 1 - beta2)


def make_optimizer(name, groups):
    if name == 'sgd':
        return torch.optim.SGD(groups, lr, momentum, nesterov=momentum > 0)
    if name == 'lion':
        return Lion(groups, lr, (momentum, beta2), weight_decay)
    return torch.optim.AdamW(groups, lr, (momentum, beta2), fused=True)


resume = None
if init_from == 'resume':
    damaged = ''
    for path in (os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, 'ckpt_prev.pt')):
        try:
            resume = read_checkpoint(path)
            if 'optimizers' not in resume:
                raise InputError(f'{path} holds weights only: start from it with --init_from={path}')
            break
        except InputError as e:
            damaged = damaged or str(e)
    if not resume or 'optimizers' not in resume:
        raise InputError(f'nothing to resume in {out_dir}: {damaged}')
    if damaged:
        print0(f'{damaged}; going on from {path}, step {resume["step"]}')
    changed = [f'{name}={config[name]} (was {value})' for name, value in resume['config'].items()
               if config.get(name) != value and name not in ('init_from', 'out_dir', 'max_steps', 'workers', 'cache_mb', 'device')]
    if changed:
        print0('warning: this is not the run that was saved: ' + ', '.join(changed))

model_config['num_classes'] = len(train_set.names)
if init_from in ('scratch', 'resume'):
    model = HSVDET(HSVDETConfig(**model_config))
else:
    model = HSVDET.from_pretrained(init_from, verbose=is_main_process, **model_config)
model.names, model.imgsz, model.checkpointing = train_set.names, imgsz, checkpointing
model = model.to(device, memory_format=torch.channels_last)
if sync_bn and ddp:
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
frozen = [getattr(model, name) for name in BACKBONE] if freeze == 'backbone' else []
for module in frozen:
    module.requires_grad_(False)
groups = model.param_groups(1.0, weight_decay, dict(backbone=lr_backbone, neck=lr_neck, block=lr_block, head=lr_head))
by_optimizer = {}
for group in groups:
    group['factor'] = group['lr']                                                     # on the schedule's lr
    by_optimizer.setdefault(config[f'optimizer_{group["part"]}'] or optimizer, []).append(group)
optimizers = [make_optimizer(name, its_groups) for name, its_groups in by_optimizer.items()]
scaler = torch.amp.GradScaler(device_type, init_scale=2.0 ** 10, enabled=dtype == 'float16')   # our sums start large
ema = copy.deepcopy(model).eval().requires_grad_(False)
params = [p for p in model.parameters() if p.requires_grad]
averaged, counted = (list(zip(*((mine, theirs) for mine, theirs in zip(ema.state_dict().values(), model.state_dict().values(), strict=True)
                                if mine.is_floating_point() == floats), strict=True)) for floats in (True, False))       # the state as pairs of lists
one2one_params = [p for name, p in model.named_parameters() if p.requires_grad and name.startswith('one2one')]
one2many_params = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith('one2one')]

step, best, running, count = 0, -1.0, {}, 0
if resume:
    try:
        model.load_state_dict(resume['model'])
        ema.load_state_dict(resume['ema'])
        for o, state in zip(optimizers, resume['optimizers'], strict=True):
            now = [dict(factor=group['factor'], weight_decay=group['weight_decay']) for group in o.param_groups]
            o.load_state_dict(state)
            for group, settings in zip(o.param_groups, now, strict=True):             # this command's word, not the checkpoint's
                group.update(settings)
        if resume['scaler']:                                                          # empty unless the run was fp16
            scaler.load_state_dict(resume['scaler'])
    except (RuntimeError, ValueError) as e:
        why = ' '.join(str(e).split())[:150]
        raise InputError(f'{path} holds another network or optimizer ({why}): resume with the settings of the run') from None
    step, best, running, count = resume['step'], resume['best'], resume['running'], resume['count']

if workers < 0:
    workers = 0 if device_type == 'cpu' else max(1, min(8, os.cpu_count() // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))
if 'fork' not in multiprocessing.get_all_start_methods():                             # a spawned worker would run this script again
    workers = 0


def quiet_worker(worker):
    os.setpgrp()                                                                      # torchrun's SIGTERM goes to the whole group
    signal.signal(signal.SIGINT, signal.SIG_IGN)                                      # Ctrl-C is for the loop, which then saves


loader = torch.utils.data.DataLoader(train_set, batch_sampler=Batches(step), num_workers=workers, collate_fn=collate,
                                     pin_memory=device_type == 'cuda', prefetch_factor=4 if workers else None, generator=torch.Generator(),
                                     multiprocessing_context='fork' if workers else None, worker_init_fn=quiet_worker)
batches = iter(loader)
if resume:
    torch.set_rng_state(resume['rng'])                                                # only random selection draws from it
if compile:                                                                           # assignment and losses have shapes of their own every time
    model.forward_features = torch.compile(model.forward_features)
net = model
if ddp:
    net = torch.nn.parallel.DistributedDataParallel(model, device_ids=[local_rank] if device_type == 'cuda' else None)
amp = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
print0(f'HSV-DET-{scale} attn={attn}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; {imgsz[0]}x{imgsz[1]}, batch {batch_size}'
    f' = {world_size} ranks x {grad_accum} micro-batches x {micro}; {device} {dtype}; {total_steps} steps')


# --- schedule, log, checkpoint -----------------------------------------------------------------------------------------
def lr_at(epoch):
    """Stage 1: linear up. Stage 2: half a cosine from lr to lr_final. Stage 3: lr_final."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if epoch >= epochs - no_aug_epochs:
        return lr_final
    done = (epoch - warmup_epochs) / (epochs - no_aug_epochs - warmup_epochs)
    return lr_final + (lr - lr_final) * 0.5 * (1 + math.cos(math.pi * done))


log_path = os.path.join(out_dir, 'log.csv')
columns = (['step', 'epoch', 'lr', 'box', 'cls', 'dfl'] + ['one2one_box', 'one2one_cls', 'one2one_dfl'] * one2one
           + ['objects', 'grad_norm'] + [f'gate_{level}' for level in model.blocks()] + ['AP', 'AP50', 'AP75'])
if is_main_process and not resume and any(os.path.exists(os.path.join(out_dir, name)) for name in ('ckpt.pt', 'best.pt')):
    n = next(n for n in range(1, 10 ** 6) if not os.path.exists(os.path.join(out_dir, f'earlier_{n}')))
    os.makedirs(os.path.join(out_dir, f'earlier_{n}'))
    for name in os.listdir(out_dir):
        if re.fullmatch(r'(ckpt|ckpt_prev|best)\.pt|log\.csv|curves\.png|val_\d+\.jpg', name):
            os.replace(os.path.join(out_dir, name), os.path.join(out_dir, f'earlier_{n}', name))
    print0(f'{out_dir} held a run already: moved to {os.path.join(out_dir, f"earlier_{n}")}')
if is_main_process:                                                                              # no clock in it: a resumed run's log is the same
    rows = []
    if resume and os.path.exists(log_path):
        with open(log_path, newline='') as f:
            rows = [row for row in csv.DictReader(f) if int(row['step']) <= step]
    with open(log_path + '.part', 'w', newline='') as f:
        log = csv.DictWriter(f, columns, restval='', extrasaction='ignore')
        log.writeheader()
        log.writerows(rows)
    os.replace(log_path + '.part', log_path)
    log_file = open(log_path, 'a', newline='')
    log = csv.DictWriter(log_file, columns, restval='', extrasaction='ignore')


def log_row(row):
    try:
        log.writerow(row)
        log_file.flush()
    except OSError as e:
        print0(f'warning: step {row["step"]} is missing in {log_path} ({e.strerror})')



try:
    here = os.path.dirname(os.path.abspath(__file__))
    commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=here, capture_output=True, text=True).stdout.strip()
except OSError:                                                                       # no git on this machine
    commit = ''


def write_checkpoint(path, content, keep):
    """Beside, then renamed; with `keep` the one before stays as *_prev. A full disk costs the newest file, not the run."""
    beside = path + '.part'
    try:
        with open(beside, 'wb') as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:
        print0(f'warning: {path} was not written ({str(e).splitlines()[0]}), an older one stays if there is one; free some space')
        with contextlib.suppress(OSError):
            os.remove(beside)
        return
    if keep and os.path.exists(path):
        os.replace(path, path.replace('.pt', '_prev.pt'))
    os.replace(beside, path)


def save_checkpoint():
    if is_main_process:
        write_checkpoint(os.path.join(out_dir, 'ckpt.pt'), dict(
            model=model.state_dict(), ema=ema.state_dict(), model_config=model_config, names=model.names, imgsz=imgsz,
            optimizers=[o.state_dict() for o in optimizers], scaler=scaler.state_dict(), step=step, best=best,
            running=running, count=count, rng=torch.get_rng_state(), config=config, commit=commit, seed=seed), keep=True)


def draw_curves():
    """log.csv -> curves.png: losses, AP, learning rate and gates over epochs, the three stages marked."""
    try:
        import matplotlib
    except ImportError:
        return print0('no curves.png: pip install matplotlib')
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    with open(log_path, newline='') as f:
        rows = list(csv.DictReader(f))
    fig, axes = plt.subplots(1, 4, figsize=(18, 4))
    panels = (('losses', [c for c in columns if c.endswith(('box', 'cls', 'dfl'))]), ('AP', ['AP', 'AP50', 'AP75']),
              ('learning rate', ['lr']), ('gates', [c for c in columns if c.startswith('gate_')]))
    for ax, (title, names) in zip(axes, panels, strict=True):
        for name in names:
            points = [(float(r['epoch']), float(r[name])) for r in rows if r[name] != '']
            if points:
                ax.plot(*zip(*points, strict=True), label=name, marker='.' if title == 'AP' else None)
        for edge in (warmup_epochs, epochs - no_aug_epochs):
            ax.axvline(edge, color='0.8', linewidth=1, zorder=0)
        ax.set(title=title, xlabel='epoch')
        ax.grid(alpha=0.3)
        if ax.lines[2:]:
            ax.legend()
    fig.tight_layout()
    fig.savefig(os.path.join(out_dir, 'curves.png'), dpi=80)
    plt.close(fig)


def draw_pictures():
    """val_*.jpg: what the EMA model sees in the first validation images."""
    from PIL import Image
    for i in range(min(num_pictures, len(val_set))):
        image = val_set[0, i]['image']                                                # (3, H, W) uint8
        found = ema.detect(image[None].to(device).float() / 255)[0].cpu()
        zoom = max(1, 480 // max(image.shape))                                        # words need room
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((image.shape[2] * zoom, image.shape[1] * zoom))
        picture = draw_boxes(picture, found[:, :4].numpy() * zoom, found[:, 5].long().numpy(), val_set.names, found[:, 4].numpy())
        picture.save(os.path.join(out_dir, f'val_{i}.jpg'), quality=92)


stop = []
for number in (signal.SIGTERM, signal.SIGINT):                                        # finish the step, save, leave
    def request_stop(number, frame):
        stop.append(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)                                         # the second time it is meant at once

    signal.signal(number, request_stop)


def nonfinite_message(reason, batch, losses):
    """A non-finite step: save what made it, say which images, stop."""
    where = os.path.join(out_dir, f'nonfinite_{step}_rank{rank}.pt')
    torch.save(dict(batch=batch, losses=losses, model=model.state_dict(), model_config=model_config), where)
    names = ', '.join(train_set.files[i] for i in batch['index'][:4].tolist())
    return (f'{reason} at step {step} (losses {losses}), last micro-batch {names}, ...; saved with the weights as {where}. '
            f'Try --dtype=float32 or a lower --lr, or leave out some such steps with --skip_nonfinite=10')


def evaluate_and_log(row):
    """Evaluate the EMA weights, log, save (best.pt, ckpt.pt), then draw and tell."""
    global best
    t = time.time()
    if ddp:                                                                           # each rank saw other images: rank 0's BatchNorm is the model's
        for buffer in ema.buffers():
            dist.broadcast(buffer, 0)
    stats = evaluate(ema, val_set, imgsz, batch_size=max(1, micro), device=device, rank=rank, world_size=world_size)
    improved, best = stats['AP'] > best, max(best, stats['AP'])
    if not is_main_process:
        return
    gates = {f'gate_{level}': block.gate.item() for level, block in model.blocks().items()}
    log_row({**{name: row[name] for name in ('step', 'epoch', 'lr')}, **gates, **{name: stats[name] for name in ('AP', 'AP50', 'AP75')}})
    if improved:
        write_checkpoint(os.path.join(out_dir, 'best.pt'), ema.checkpoint(AP=best, step=step, config=config, commit=commit), keep=False)
    save_checkpoint()
    try:
        draw_curves()
        draw_pictures()
    except OSError as e:
        print0(f'warning: no pictures this time ({e.strerror})')
    print(f'epoch {row["epoch"]:.2f} | AP {stats["AP"]:.4f} AP50 {stats["AP50"]:.4f} AP75 {stats["AP75"]:.4f} | best {best:.4f}'
          + ''.join(f' | {name} {value:+.3f}' for name, value in gates.items())
          + f' | {time.time() - t:.1f} s | {(time.time() - started) / 60:.1f} min so far', flush=True)
    if row['epoch'] > warmup_epochs + 3 and best < 0.002:
        print('warning: AP is still near zero: look at python data.py show, and at the class ids of both files', flush=True)


# --- the loop ----------------------------------------------------------------------------------------------------------
model.train()
for module in frozen + [m for m in model.modules() if freeze_bn and isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]:
    module.eval()
last = min(total_steps, max_steps) if max_steps else total_steps
first_step, shown_step, skipped, waited, dry = step, step, 0, 0.0, False
started = shown = time.time()
if step == 0 and init_from != 'scratch':                                              # what the weights are worth as they come
    evaluate_and_log(dict(step=0, epoch=0.0, lr=0.0))
while step < last:
    # 1) learning rate
    epoch = step * batch_size / n_images
    now_lr = lr_at(epoch)
    for o in optimizers:
        for group in o.param_groups:
            group['lr'] = group['factor'] * now_lr

    # 2) forward and backward, micro-batch by micro-batch, of plain sums
    sums = {}
    before = [b.clone() for b in model.buffers()] if skip_nonfinite else []           # a bad batch spoils BatchNorm too
    for m in range(grad_accum):
        t = time.time()
        batch = next(batches)
        waited += time.time() - t
        images = batch['images'].to(device, non_blocking=True).to(memory_format=torch.channels_last).float() / 255       # (b, 3, H, W)
        targets = dict(labels=batch['labels'].to(device, non_blocking=True), boxes=batch['boxes'].to(device, non_blocking=True))
        if multi_scale:
            factor = random.Random(seed * 1_000_003 + step).uniform(1 - multi_scale, 1 + multi_scale)
            H, W = (max(32, round(s * factor / 32) * 32) for s in imgsz)
            targets['boxes'] = targets['boxes'] * targets['boxes'].new_tensor([W / imgsz[1], H / imgsz[0]] * 2)
            images = F.interpolate(images, (H, W), mode='bilinear')
        last_micro = m == grad_accum - 1
        with net.no_sync() if ddp and not last_micro else contextlib.nullcontext():   # ranks talk once a step
            with amp:
                _, losses = net(images, targets, reduce=False)
            scaler.scale(sum(value for name, value in losses.items() if not name.endswith('normalizer'))).backward()
        losses['objects'] = (targets['labels'] >= 0).sum()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach().double()

    # 3) divide by the target scores of the whole batch, which only now are known; see the module's docstring
    names = list(sums)
    packed = torch.stack([sums[name] for name in names])
    if ddp:
        dist.all_reduce(packed)
    sums = dict(zip(names, packed.tolist(), strict=True))
    for o in optimizers:
        scaler.unscale_(o)
    for some, normalizer in ((one2many_params, 'normalizer'), (one2one_params, 'one2one_normalizer')):
        if some:
            torch._foreach_mul_([p.grad for p in some if p.grad is not None], batch_size * world_size / max(sums[normalizer], 1.0))     # DDP took the mean
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip).item()

    # 4) a step that is not finite is not taken (under fp16 the scaler itself skips those whose gradient overflowed)
    overflow = not math.isfinite(norm)
    bad = not math.isfinite(sum(sums.values())) or overflow and (not scaler.is_enabled() or scaler.get_scale() < 2 ** -10)
    if bad:
        skipped += 1
        sentence = nonfinite_message('the loss is not finite' if not math.isfinite(sum(sums.values())) else 'the gradient is not finite', batch, sums)
        if skipped > skip_nonfinite:
            raise InputError(sentence)
        print0(f'warning: left out step {step}: {sentence}')
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)
    elif not overflow:
        for o in optimizers:
            scaler.step(o)
    scaler.update()
    for o in optimizers:
        o.zero_grad(set_to_none=True)

    # 5) EMA over optimizer steps, BatchNorm's statistics included
    step += 1
    decay = ema_decay * (1 - math.exp(-step / ema_tau))
    with torch.no_grad():
        torch._foreach_lerp_(*averaged, 1 - decay)
        torch._foreach_copy_(*counted)

    # 6) log: means over the interval
    if not bad and not overflow:
        for name in ('box', 'cls', 'dfl'):
            running[name] = running.get(name, 0.0) + sums[name] / max(sums['normalizer'], 1.0)
            if one2one:
                running[f'one2one_{name}'] = running.get(f'one2one_{name}', 0.0) + sums[f'one2one_{name}'] / max(sums['one2one_normalizer'], 1.0)
        running['objects'] = running.get('objects', 0.0) + sums['objects'] / batch_size
        running['grad_norm'] = running.get('grad_norm', 0.0) + norm
        count += 1
    epoch = step * batch_size / n_images
    row = dict(step=step, epoch=round(epoch, 4), lr=now_lr)
    if step % log_interval == 0 and count:
        row |= {name: value / count for name, value in running.items()}
        row |= {f'gate_{level}': block.gate.item() for level, block in model.blocks().items()}
        running, count = {}, 0
        seconds = time.time() - shown
        left = (time.time() - started) / (step - first_step) * (last - step)
        if is_main_process:
            memory = f' | {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB' if device_type == 'cuda' else ''
            print(f'step {step}/{total_steps} epoch {epoch:.2f} | box {row["box"]:.3f} cls {row["cls"]:.3f} dfl {row["dfl"]:.3f} | lr {now_lr:.2e}'
                  f' | {row["objects"]:.1f} objects an image | {(step - shown_step) * batch_size / seconds:.1f} images/s{memory}'
                  f' | {left / 60:.1f} min left', flush=True)
            log_row(row)
            if waited > 0.3 * seconds and step - first_step > 2 * log_interval and not dry:
                dry = True
                print(f'warning: {waited / seconds:.0%} of the time goes by waiting for data; raise --workers (now {workers}) or --cache_mb',
                      flush=True)
        shown, shown_step, waited = time.time(), step, 0.0

    # 7) evaluate, save
    due = int(epoch / eval_interval + 1e-9) > int((step - 1) * batch_size / n_images / eval_interval + 1e-9) or step == last
    if due:
        t = time.time()
        evaluate_and_log(row)
        shown += time.time() - t
    stop_requested = bool(stop)
    if ddp:                                                                           # one rank was told to stop: all stop
        any_requested = torch.tensor(float(stop_requested), device=device)
        dist.all_reduce(any_requested)
        stop_requested = bool(any_requested.item())
    if stop_requested or not due and save_interval and step % save_interval == 0:
        save_checkpoint()
    if stop_requested:
        print0(f'{stop[0] if stop else "another rank"} at step {step}: saved; go on with --init_from=resume')
        break

if is_main_process:
    log_file.close()
    seconds = time.time() - started
    print0(f'{seconds / 60:.1f} min, {(step - first_step) * batch_size / seconds:.1f} images/s with everything; best AP {best:.4f}; in {out_dir}: '
        + ' '.join(sorted(os.listdir(out_dir))))
if ddp:
    dist.barrier()
    dist.destroy_process_group()
    print(end='', flush=True)
    os._exit(0)                                                                       # gloo's threads live on, and can abort Python's own way out

"""
Cost tables: what it costs, where it goes. Medians of repeated runs in one process; the ways compared interleave.

    python bench.py attention                  the block at P5 and P4, 640x640 to 3840x2160: definition, fast path,
                                               full; and its products alone, PyTorch's fused attention against two bmm
    python bench.py letters                    every kind of attention in attention.py: FLOPs, ms, memory
    python bench.py latency --scale=l          detectors by part: without and with the block, and RT-DETR
    python bench.py nms                        exact NMS, 300 to 30,000 candidates
    python bench.py train config/shapes.py     a training step by part; with --compile=True eager and compiled
    python bench.py memory config/hsvdet_1080p_8gb.py     peak memory of a training step by part, of all detectors
    python bench.py loader --train_data=...    augmented samples per second on one thread, cache off and on

Tables go to the terminal, csv (and the attention plot) to out/bench. --device=cuda measures a GPU. Machines are noisy:
compare within one run. It reads train.py's config files, and passes over the settings in them that it does not have.
"""
import contextlib
import copy
import cProfile
import csv
import functools
import itertools
import os
import platform
import pstats
import re
import sys
import time
import weakref
from statistics import median

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from attention import HELP, make_block
from baselines.detr import DETR, DETRConfig
from configurator import InputError, build, configure
from data import Augment, DetectionDataset, collate
from loss import detection_loss, total_loss
from model import HSVDET, HSVDETConfig, nms
from optimizers import KINDS, PARTS, fastest_dtype, make_optimizers
from plots import draw_attention_cost
from sparse_attention import SparseGlobalBlockGated

# --- settings; those of the augmentation and of the networks are the fields of the dataclasses below -----------------
what = ''                      # attention letters latency nms train memory loader
repeats = 7                    # timed runs, after two untimed ones; the median is printed
threads = 0                    # CPU threads, 0 leaves PyTorch's choice
device = 'auto'                # auto cpu cuda cuda:1 ...
dtype = 'auto'                 # float32 bfloat16 float16; auto: what train.py takes (train, memory), float32 (the rest)
sizes: tuple = ()              # attention, letters, latency: images ((H, W), ...); () is each table's own
channels = 512                 # attention, letters
onnx = True                    # latency: also onnxruntime, on a CPU, in float32
compile = False                # latency, train: also compiled by torch.compile
arch = 'hsvdet'                # train: hsvdet or rtdetr
imgsz: int | tuple = 640       # train, memory, loader: int, or (H, W)
batch_size = 16                # train, memory: images a step
grad_accum = 1                 # train, memory: micro-batches a step
checkpointing = False          # train, memory: recompute activations
optimizer = 'adamw'            # train, memory on a GPU: one of optimizers.KINDS
momentum = 0.9                 # train
weight_decay = 0.05            # train
memory_cap_gb = 0.0            # memory: > 0 limits what PyTorch takes of a GPU's memory
train_data = 'data/shapes/train.json'                                                 # train, loader
train_images = ''              # folder of the images, '' looks beside the json
cache_mb = 1024                # train, loader: memory for decoded images
seed = 0

OUT_DIR = os.path.join('out', 'bench')
config = configure(globals(), Augment, HSVDETConfig, DETRConfig, positional='what', lenient=True,
                   argv=sys.argv[1:] if __name__ == '__main__' else [])


# --- clocks, counters, tables ----------------------------------------------------------------------------------------

def sync():
    if device.startswith('cuda'):
        torch.cuda.synchronize()


def time_interleaved(ways, n=None):
    """{name: f} -> {name: median milliseconds of f()}, one call of each in turn: the machine's drift hits all alike."""
    samples = {name: [] for name in ways}
    for i, (name, f) in itertools.product(range((n or repeats) + 2), ways.items()):
        sync()
        t = time.perf_counter()
        f()
        sync()
        if i >= 2:
            samples[name].append((time.perf_counter() - t) * 1e3)
    return {name: median(some) for name, some in samples.items()}


class LiveMemory(TorchDispatchMode):
    """
    Bytes of tensors alive (live) and their peak: what an allocator would be asked for, on any device, also 'meta',
    where nothing is computed. already: tensors not to count. A kernel's inner workspace is not seen.
    """

    def __init__(self, *already):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, {t.untyped_storage()._cdata for t in already}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.seen:
                storage = t.untyped_storage()
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return result

    def gone(self, key, size):
        self.live -= size
        self.seen.discard(key)


def peak_mib(f, *already):
    with LiveMemory(*already) as memory:
        f()
    return memory.peak / 2 ** 20


@torch.no_grad()
def count_gflops(module, shape, forward=nn.Module.__call__):
    """GFLOPs of forward(module, input of `shape`), on meta tensors: the counter does not know a CPU's attention."""
    shadow = copy.deepcopy(module).to('meta')
    with FlopCounterMode(display=False) as counter:
        forward(shadow, torch.empty(shape, device='meta'))
    return counter.get_total_flops() / 1e9


def pick_dtype(training=False):
    """The setting, or what 'auto' stands for; in training that is train.py's choice."""
    if dtype != 'auto':
        return dtype
    return fastest_dtype(device) if training else 'float32'


def autocast(name):
    return torch.autocast(device.partition(':')[0], getattr(torch, name), enabled=name != 'float32')


def machine():
    """Such as 'AMD EPYC, 2 threads, bf16 yes'."""
    name = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):                                               # Linux
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            name = next(iter(re.findall(r'model name\s*: *(.+)', f.read())), name)
    gpu = device.startswith('cuda')
    name = torch.cuda.get_device_name(device) if gpu else f'{name}, {torch.get_num_threads()} threads'
    return f'{name}, bf16 {"yes" if fastest_dtype(device) == "bfloat16" else "no"}'


def write_table(name, title, numbers, rows):
    """Print rows (dicts with the same keys) below title, machine, dtype and date; write OUT_DIR/name.csv."""
    os.makedirs(OUT_DIR, exist_ok=True)
    with open(os.path.join(OUT_DIR, f'{name}.csv'), 'w', newline='') as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)

    def cell(v):
        return str(v) if not isinstance(v, float) else f'{v:.3g}' if abs(v) < 10 else f'{v:,.{int(abs(v) < 100)}f}'

    text = [list(rows[0])] + [[cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    print(f'{title}\n{machine()}; {numbers}; torch {torch.__version__}; {time.strftime("%Y-%m-%d")}')
    for line in text:
        print(' | '.join(value.rjust(width) for value, width in zip(line, widths, strict=True)))
    print(f'-> {OUT_DIR}/{name}.csv\n', flush=True)


# --- attention, letters ----------------------------------------------------------------------------------------------

def feature_maps(default):
    """For each image size the maps at P5 and P4: the columns that say so, x (1, channels, H/s, W/s)."""
    for (H, W), (level, s) in itertools.product(sizes or default, (('P5', 32), ('P4', 16))):
        x = torch.randn(1, channels, H // s, W // s, device=device).to(memory_format=torch.channels_last)
        print(f'{W}x{H} {level} ...', flush=True)
        yield dict(image=f'{W}x{H}', level=level, N=(H // s) * (W // s)), x


def costs(ways, x):
    """
    ways: {name: (module, its forward)}, x (1, C, H, W) -> {name: dict of GFLOPs, ms, MiB}. FLOPs are two per
    multiply-add of convolutions and matrix products, nothing else; MiB the peak beside input and weights.
    """
    calls = {name: functools.partial(forward, module, x) for name, (module, forward) in ways.items()}
    with autocast(pick_dtype()):
        times = time_interleaved(calls, min(repeats, 3) if x[0, 0].numel() > 8000 else None)
        return {name: {'GFLOPs': count_gflops(module, x.shape, forward), 'ms': times[name],
                       'MiB': peak_mib(calls[name], x, *module.parameters())}
                for name, (module, forward) in ways.items()}


@torch.no_grad()
def bench_attention():
    """Definition, fast path (inference form) and full attention (PyTorch's fused one, same dense map), batch 1."""
    rows, cfg, Block = [], build(HSVDETConfig, config), SparseGlobalBlockGated
    for row, x in feature_maps(((640, 640), (736, 1280), (1088, 1920), (1440, 2560), (2176, 3840))):
        torch.manual_seed(seed)
        plain = Block(channels, cfg.k, cfg.select, cfg.heads, cfg.pos, 'fixed').to(device).eval()
        full = Block(channels, 0, 'l2sq', cfg.heads, cfg.pos, 'fixed').to(device).eval()
        full.load_state_dict(plain.state_dict(), strict=False)                        # a learned score is left over
        ways = dict(plain=(plain, Block.forward_reference), fast=(copy.deepcopy(plain).fuse(), Block.forward),
                    full=(full.fuse(), Block.forward))
        cost = costs(ways, x)
        row |= {f'{name} {unit}': cost[name][unit] for unit in ('GFLOPs', 'ms', 'MiB') for name in ways}
        rows.append(row | {f'{name}/fast': row[f'{name} ms'] / row['fast ms'] for name in ('plain', 'full')})
    title = f'the sparse block, c = {channels}, k = {cfg.k}, batch 1'
    write_table('attention', title, pick_dtype(), rows)
    draw_attention_cost(rows, os.path.join(OUT_DIR, 'attention.png'), f'{title}, {pick_dtype()}, {device}')
    bench_products(cfg.k if cfg.k >= 1 else 512)


def attend_by_bmm(q, k, v):
    """softmax(q k^T / sqrt(c)) v of (B, n, c): two matrix products with the weights (B, n, n) in memory between."""
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=q.shape[2] ** -0.5)
    return torch.bmm(scores.softmax(-1), v)


@torch.enable_grad()
def bench_products(k):
    """Attention among k tokens, one head as wide as the block, always in float32: fused, and as two bmm."""
    q, key, v = torch.randn(3, 1, k, channels, device=device, requires_grad=True).unbind()
    ways = {'scaled_dot_product_attention': nn.functional.scaled_dot_product_attention, 'bmm': attend_by_bmm}
    with torch.no_grad():
        inference = time_interleaved({name: functools.partial(f, q, key, v) for name, f in ways.items()}, 5 * repeats)
        memory = {name: peak_mib(functools.partial(f, q, key, v), q) for name, f in ways.items()}
    training = time_interleaved({name: lambda f=f: f(q, key, v).sum().backward() for name, f in ways.items()},
                                5 * repeats)
    rows = [{'way': name, 'forward ms': inference[name], 'forward + backward ms': training[name], 'MiB': memory[name]}
            for name in ways]
    write_table('products', f'attention alone, k = {k}, one head of {channels}, batch 1', 'float32', rows)


@torch.no_grad()
def bench_letters():
    """Every letter of `attn` in its inference form, batch 1. Fourier transforms (M) are FLOPs that nobody counts."""
    rows, cfg = [], build(HSVDETConfig, config)
    for row, x in feature_maps(((640, 640), (1088, 1920))):
        blocks = {letter: make_block(letter, channels, cfg).to(device).eval() for letter in HELP if letter != '-'}
        sums = {letter: sum(p.numel() for p in block.parameters()) / 1e6 for letter, block in blocks.items()}
        for letter, cost in costs({letter: (b.fuse(), type(b).forward) for letter, b in blocks.items()}, x).items():
            kind = re.split('[:;]', HELP[letter])[0]
            rows.append({'letter': letter, 'kind': kind, **row, 'parameters M': sums[letter], **cost})
    write_table('letters', f'c = {channels}, k = {cfg.k}, heads = {cfg.heads}, batch 1', pick_dtype(), rows)


# --- latency ---------------------------------------------------------------------------------------------------------

def detector(settings, name):
    """name as for make_model; what a network without blocks, or RT-DETR, has no use for is left out."""
    if name == 'RT-DETR':
        return DETR(build(DETRConfig, {key: value for key, value in settings.items()
                                       if key != 'k' or type(value) is not tuple}))
    return HSVDET(build(HSVDETConfig, {**settings, 'attn': name} | (dict(memory='', keep='') if name == '---' else {})))


def clip_length(name):
    """Frames of a training sample: 0, a single image, or with memory=time more than one."""
    return config['frames'] + 1 if 'time' in config['memory'] and name not in ('---', 'RT-DETR') else 0


def make_model(name, num_classes=80):
    """name: 'RT-DETR', or an HSVDET's attn string. The gates are open, as if trained."""
    torch.manual_seed(seed)
    model = detector({**config, 'num_classes': num_classes}, name)
    for block in model.blocks().values():
        block.gate.data.fill_(0.5)
    return model.to(device, memory_format=torch.channels_last)


def clock_parts(model):
    """Clocks around the parts of a model -> a dict, to which every forward pass adds its milliseconds by part."""
    if isinstance(model, DETR):                                                       # selection and decoder: its head
        encoder = model.head.encoder
        parts = {model.backbone: 'backbone', encoder: 'neck', encoder.aifi: 'attention', model.head: 'head'}
    else:
        parts = {model: 'neck', model.backbone: 'backbone', model.detect_head: 'head'}
        parts |= dict.fromkeys(model.blocks().values(), 'attention')
    spent, inside, since = {}, [], [0.0]

    def charge():
        """The time since the last event belongs to the innermost part that runs."""
        sync()
        now = time.perf_counter()
        if inside:
            spent[inside[-1]] = spent.get(inside[-1], 0.0) + (now - since[0]) * 1e3
        since[0] = now

    def start(module, args):
        charge()
        inside.append(parts[module])

    def stop(module, args, output):
        charge()
        inside.pop()

    for module in parts:
        module.register_forward_pre_hook(start)
        module.register_forward_hook(stop)
    return spent


def time_parts(names, x):
    """{name: dict of median milliseconds by part and in all}; the detectors run interleaved."""
    models, samples = {name: make_model(name).fuse() for name in names}, {name: [] for name in names}
    clocks = {name: clock_parts(model) for name, model in models.items()}
    for i, (name, model) in itertools.product(range(repeats + 2), models.items()):
        clocks[name].clear()
        with autocast(pick_dtype()):
            raw, _ = model(x)
        sync()
        t = time.perf_counter()
        model.postprocess(raw)
        sync()
        if i >= 2:
            samples[name].append({**clocks[name], 'post': (time.perf_counter() - t) * 1e3})
    parts = ('backbone', 'attention', 'neck', 'head', 'post')
    return {name: {**{f'{part} ms': median(s.get(part, 0.0) for s in some) for part in parts},
                   'all ms': median(sum(s.values()) for s in some)} for name, some in samples.items()}


def onnx_session(model, x):
    """A function of the image that runs onnxruntime; raises InputError where a package for it is missing."""
    from eval import OnnxModel
    from export import export_onnx
    os.makedirs(OUT_DIR, exist_ok=True)
    path = os.path.join(OUT_DIR, 'latency.onnx')
    export_onnx(model, path, tuple(x.shape[2:]))
    exported = OnnxModel(path)
    return lambda image: exported.session.run(None, {exported.input_name: image.contiguous().numpy()})


def time_passes(names, x):
    """{(name, how): milliseconds} of whole forward passes, without post-processing."""
    ways = {}
    for name in names:
        ways |= {(name, 'not fused'): make_model(name).eval(), (name, 'fused'): make_model(name).fuse()}
        if compile:
            ways[name, 'compiled'] = torch.compile(make_model(name).fuse())
        if onnx and device == 'cpu' and pick_dtype() == 'float32':
            try:
                ways[name, 'onnxruntime'] = onnx_session(make_model(name).fuse(), x)
            except InputError as e:
                print(f'no ONNX row: {e}')
    with autocast(pick_dtype()):
        return time_interleaved({way: functools.partial(f, x) for way, f in ways.items()})


@torch.no_grad()
def bench_latency():
    """
    One image, batch 1: without the block, with it, and RT-DETR on the same backbone. "by part" is the inference form
    with clocks around its parts. post is decoding and, where the detector needs it, NMS of the scores above 0.25, of
    which random weights have hardly any: what NMS costs is in the table nms. The other rows are whole forward passes
    without post. Of RT-DETR, attention is AIFI, neck the rest of the encoder, head query selection and the decoder.
    """
    rows, names, scale = [], list(dict.fromkeys(('---', config['attn'], 'RT-DETR'))), config['scale']
    for H, W in sizes or ((640, 640), (1088, 1920)):
        x = torch.rand(1, 3, H, W, device=device).to(memory_format=torch.channels_last)
        for name, times in time_parts(names, x).items():
            model = make_model(name)
            count = sum(p.numel() for p in model.parameters()) / 1e6
            rows.append({'image': f'{W}x{H}', 'detector': name, 'how': 'by part', **times, 'parameters M': count,
                         'GFLOPs': count_gflops(model.fuse(), x.shape), 'NMS': 'yes' if model.nms else 'no'})
        for (name, how), ms in time_passes(names, x).items():
            row = {'image': f'{W}x{H}', 'detector': name, 'how': how, 'all ms': ms}
            rows.append(dict.fromkeys(rows[0], '') | row)
    write_table(f'latency_{scale}', f'detectors of scale {scale}, batch 1', pick_dtype(), rows)


# --- NMS -------------------------------------------------------------------------------------------------------------

def bench_nms(counts=(300, 1000, 3000, 10000, 30000)):
    """Crowded candidates, as evaluation at conf 0.001 sees them: clusters of jittered copies of objects, 80 classes."""
    rows = []
    for P in counts:
        g = torch.Generator().manual_seed(seed)
        objects = max(1, P // 30)
        centre, size = torch.rand(objects, 2, generator=g) * 640, (torch.rand(objects, 2, generator=g) * 3 + 2.5).exp()
        copy_of, jitter = torch.randint(0, objects, (P,), generator=g), torch.randn(P, 2, 2, generator=g) * 0.08
        c, s = centre[copy_of] + jitter[:, 0] * size[copy_of], size[copy_of] * (1 + jitter[:, 1]).clamp(0.3)
        boxes, scores = torch.cat((c - s / 2, c + s / 2), 1), torch.rand(P, generator=g).square()
        inputs = [t.to(device) for t in (boxes, scores, torch.randint(0, 80, (objects,), generator=g)[copy_of])]
        few, every = (functools.partial(nms, *inputs, 0.7, most) for most in (300, 10 ** 9))
        rows.append({'candidates': P, 'kept': len(few()), 'ms': time_interleaved({'few': few})['few'],
                     'ms, all kept': time_interleaved({'all': every}, 3)['all'], 'MiB': peak_mib(few, *inputs)})
    write_table('nms', 'exact NMS, 80 classes, IoU 0.7, at most 300 kept', 'float32', rows)


# --- a training step: time, memory -----------------------------------------------------------------------------------

def input_shape():
    return (imgsz, imgsz) if isinstance(imgsz, int) else tuple(imgsz)


def make_training(name, num_classes):
    """Model, EMA model and optimizers, one kind for the whole network."""
    if optimizer not in KINDS:
        raise InputError(f'--optimizer={optimizer}: must be one of {" ".join(KINDS)}')
    model = make_model(name, num_classes).train()
    ema = copy.deepcopy(model).requires_grad_(False)
    model.checkpointing = checkpointing
    kinds = dict.fromkeys(PARTS, optimizer)
    return model, ema, make_optimizers(model.param_groups(1e-3, weight_decay), kinds, momentum, 0.999)


def training_step(model, ema, optimizers, batch, clock):
    """One micro-batch and one optimizer step; clock(part) is a context. A one-to-one head is left out."""
    images = batch['images'].to(device)
    images = (images if images.ndim == 5 else images.to(memory_format=torch.channels_last)).float() / 255
    targets = dict(labels=batch['labels'].to(device), boxes=batch['boxes'].to(device))
    one_piece = isinstance(model, DETR)                                               # its losses are in its forward
    with clock('forward'), autocast(pick_dtype(training=True)):
        maps, losses = model(images, targets if one_piece else None)
    if not one_piece:
        with clock('assign + loss'):
            losses = dict(one2many=detection_loss(maps, targets))
    with clock('backward'):
        total_loss(losses).backward()
    with clock('optimizer + EMA'):
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        for o in optimizers:
            o.step()
            o.zero_grad()
        torch._foreach_lerp_([t for t in ema.state_dict().values() if t.is_floating_point()],
                             [t for t in model.state_dict().values() if t.is_floating_point()], 0.01)


def training_set(cache):
    frames = max(0, clip_length(config['attn'] if arch == 'hsvdet' else 'RT-DETR') - 1)
    return DetectionDataset(train_data, train_images, input_shape(), build(Augment, config), seed, cache, frames=frames)


def bench_train():
    """
    Where the time of a micro-batch and an optimizer step goes. Loading is one thread's time; with a loader process it
    runs beside the rest. RT-DETR's forward includes its losses.
    """
    data, micro, ways, spent = training_set(cache_mb), batch_size // grad_accum, {}, {}
    name, (H, W) = 'RT-DETR' if arch == 'rtdetr' else config['attn'], input_shape()
    for how in ('eager', 'compiled') if compile and arch == 'hsvdet' else ('eager',):
        ways[how] = make_training(name, len(data.names))
        if how == 'compiled':
            ways[how][0].forward_features = torch.compile(ways[how][0].forward_features)

    @contextlib.contextmanager
    def clock(part, how):
        sync()
        t = time.perf_counter()
        yield
        sync()
        spent.setdefault(how, {}).setdefault(part, []).append((time.perf_counter() - t) * 1e3)

    for i, (how, way) in itertools.product(range(repeats + 3), ways.items()):         # interleaved
        with clock('load', how):
            batch = collate([data[0, (i * micro + j) % len(data)] for j in range(micro)])
        training_step(*way, batch, functools.partial(clock, how=how))
    for how, parts in spent.items():
        times = {part: median(some[3:]) for part, some in parts.items()}
        times['all, one after the other'] = total = sum(times.values())
        rows = [{'part': part, 'ms': ms, 'share': f'{ms / total:.0%}', 'images/s': micro / ms * 1e3}
                for part, ms in times.items()]
        title = f'scale {config["scale"]}, {name}, {W}x{H}, batch {micro}, {optimizer}, {how}, {train_data}'
        write_table('train' if how == 'eager' else 'train_compiled', title, pick_dtype(training=True), rows)


def meta_memory(name):
    """Bytes by part; the backward pass is that of the sum of what the model returns without targets."""
    clip = (clip_length(name),) if clip_length(name) else ()
    with torch.device('meta'):
        model = detector(config, name).train()
        images = torch.empty(batch_size // grad_accum, *clip, 3, *input_shape())
    count, half = sum(p.numel() for p in model.parameters()), dtype != 'float32'
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if half:                                              # stands in for autocast, which meta tensors do not know:
        model, images = model.bfloat16(), images.bfloat16()           # activations and copies of the weights in 2 bytes
    model.checkpointing = checkpointing
    sum(m.float().sum() for m in model(images)[0]).backward()         # a second micro-batch finds the first's gradients
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with LiveMemory(*model.parameters(), *model.buffers(), *gradients) as memory:
        raw, _ = model(images)
        kept = memory.live
        sum(m.float().sum() for m in raw).backward()
    parts = {'parameters': count * 4, 'EMA': count * 4, 'optimizer': trained * 8, 'gradients': trained * 4,
             '2-byte weights': count * 2 * half, 'forward + backward': memory.peak}
    return parts | {'all': sum(parts.values()), 'of which kept for backward': kept}


def cuda_memory(name):
    """Bytes that PyTorch takes on the GPU for two real steps of one micro-batch, at their peak; inf if out of memory"""
    total, micro, (H, W) = torch.cuda.mem_get_info(device)[1], batch_size // grad_accum, input_shape()
    if memory_cap_gb:
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_cap_gb * 2 ** 30 / total))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    corner = torch.rand(micro, 50, 2) * torch.tensor([W, H]) * 0.8
    clip = (clip_length(name),) if clip_length(name) else ()
    batch = dict(images=torch.zeros(micro, *clip, 3, H, W, dtype=torch.uint8),
                 boxes=torch.cat((corner, corner + 60), -1), labels=torch.zeros(micro, 50, dtype=torch.long))
    try:
        training = make_training(name, config['num_classes'])
        for _ in range(2):
            training_step(*training, batch, lambda part: contextlib.nullcontext())
    except torch.OutOfMemoryError:
        return float('inf')
    return torch.cuda.max_memory_allocated()


def bench_memory():
    """
    A training step's peak, by part, from the sizes of all tensors on the meta device: nothing is computed, no GPU is
    needed. It is the second micro-batch, whose gradients are added to those of the first. AdamW's two moments; without
    assignment and losses, which are bounded and small beside the maps. Of RT-DETR also without its denoising queries
    and earlier layers' predictions: matching cannot be done without values, so it is called without targets. On a GPU
    the measured peak of a real step, with all of these, stands beside it, under memory_cap_gb if that is set.
    """
    rows, (H, W), names = [], input_shape(), list(dict.fromkeys(('---', config['attn'], 'RT-DETR')))
    for name in names:
        parts = meta_memory(name) | (dict(measured=cuda_memory(name)) if device.startswith('cuda') else {})
        rows.append({'detector': name, **{part: size / 2 ** 20 for part, size in parts.items()}})
    title = (f'MiB, scale {config["scale"]}, {W}x{H}, {grad_accum} micro-batches of {batch_size // grad_accum}, '
             f'checkpointing {checkpointing}')
    write_table('memory', title, 'float32' if dtype == 'float32' else '2-byte activations', rows)
    kept, total = (rows[-2][part] - rows[0][part] for part in ('of which kept for backward', 'all'))
    print(f'the blocks: {kept:.0f} MiB kept for backward, {total:.0f} MiB in all')


# --- the loader ------------------------------------------------------------------------------------------------------

def bench_loader(count=400):
    """Augmented samples per second, one process, one thread, wall clock; then the same under a profiler, by part."""
    torch.set_num_threads(1)
    rows, parts, (H, W) = [], [], input_shape()
    functions = {'decode': 'load_image', 'resample and place': 'paste_resized', 'colour': 'color_jitter'}
    for cache, profiled in itertools.product((0, cache_mb), (False, True)):
        data, profile = training_set(cache), cProfile.Profile()
        visits = [(epoch, int(i)) for epoch in range(1 + 2 * count // len(data)) for i in data.order(epoch)]
        for key in visits[:count] if cache else ():                                   # the cache fills
            data[key]
        with profile if profiled else contextlib.nullcontext():
            t = time.perf_counter()
            for key in visits[count:2 * count]:
                data[key]
            seconds = time.perf_counter() - t
        if not profiled:
            rows.append({'cache MiB': cache, 'samples/s': count / seconds, 'ms a sample': seconds / count * 1e3})
            continue
        inside = {name: total for (file, _, name), (_, _, _, total, _) in pstats.Stats(profile).stats.items()
                  if os.path.basename(file) == 'data.py'}
        part = {name: inside.get(function, 0.0) / inside['__getitem__'] for name, function in functions.items()}
        part['boxes and the rest'] = 1 - sum(part.values())
        parts.append({'cache MiB': cache, **{name: f'{share:.0%}' for name, share in part.items()}})
    title = f'{train_data}, {W}x{H}, mosaic {config["mosaic"]}, mosaic_block {config["mosaic_block"]}'
    write_table('loader', title, 'uint8', rows)
    write_table('loader_parts', 'under cProfile, which makes Python look dearer than it is', 'uint8', parts)


BENCHES = dict(attention=bench_attention, letters=bench_letters, latency=bench_latency, nms=bench_nms,
               train=bench_train, memory=bench_memory, loader=bench_loader)

if __name__ == '__main__':
    for wrong, message in (
            (what not in BENCHES, f'python bench.py needs one of {" ".join(BENCHES)}, got {what or "none"}'),
            (not re.fullmatch(r'auto|cpu|cuda(:\d+)?', device), f'--device={device}: is auto, cpu, cuda or cuda:n'),
            (device.startswith('cuda') and not torch.cuda.is_available(),
             f'--device={device}: this PyTorch sees no CUDA device; use --device=cpu'),
            (dtype not in ('auto', 'float32', 'bfloat16', 'float16'),
             f'--dtype={dtype}: must be auto, float32, bfloat16 or float16'),
            (arch not in ('hsvdet', 'rtdetr'), f'--arch={arch}: must be hsvdet or rtdetr'),
            (what in ('attention', 'letters') and type(config['k']) is tuple, f'{what} takes one k, got {config["k"]}'),
            (any(type(shape) is int or len(shape) != 2 or shape[0] % 32 or shape[1] % 32
                 for shape in (*sizes, input_shape())),
             f'sizes={sizes}, imgsz={imgsz}: images are (H, W), multiples of 32, as in --sizes="((1088, 1920),)"'),
            (grad_accum < 1 or batch_size < 1 or batch_size % grad_accum,
             f'batch_size={batch_size} does not divide into grad_accum={grad_accum} micro-batches')):
        if wrong:
            raise InputError(message)
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device != 'cpu':
        torch.cuda.set_device(int(device.partition(':')[2] or 0))
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False                                           # float32 means float32
    BENCHES[what]()

"""
Every cost table of the README: what it costs, where it goes. Medians of repeated runs in one process, ratios in one run.

    python bench.py attention                       the block at P5 and P4, 640x640 to 3840x2160: definition, fast path, full attention
    python bench.py latency --scale=l               a detector's milliseconds by part, '---' beside '-SS'; eager, compiled, ONNX
    python bench.py nms                             exact NMS, 300 to 30,000 candidates
    python bench.py train config/shapes.py          a training step by part: load, forward, assign + loss, backward, optimizer + EMA;
                                                    with --compile=True eager and compiled in turn
    python bench.py memory config/hsvdet_1080p_8gb.py    peak memory of a training step by part
    python bench.py loader --train_data=...         augmented samples per second on one thread, cache off and on

Tables go to the terminal, csv (and the attention plot) to out/bench. --device=cuda measures a GPU. Machines are noisy:
compare within one run. It takes train.py's settings, so that it measures what train.py would run.
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
import statistics
import sys
import time
import types
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from configurator import configure
from data import DetectionDataset, InputError, collate
from loss import detection_loss
from model import BACKBONE, HSVDET, HSVDETConfig, nms, select_detections
from sparse_attention import SparseGlobalBlockGated

# --- knobs: train.py's, and some more. The former are the lines of train.py between '# --- knobs' and 'config = configure(',
# executed into a dict here, so that a default stands in one place only
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py'), encoding='utf-8') as f:
    knobs = {}
    exec(f.read().split('\nconfig = configure(')[0].split('# --- knobs')[1].partition('\n')[2], knobs)
knobs |= dict(
    what='',               # attention latency nms train memory loader
    repeats=7,             # timed runs, after two untimed ones; the median is printed
    threads=0,             # CPU threads, 0 leaves PyTorch's choice
    channels=512,          # of the attention table
    onnx=True,             # latency: also onnxruntime, on a CPU
    sizes=(),              # of the image, ((H, W), ...), for attention and latency; () is each table's own
)
run = types.SimpleNamespace()                                                         # they stand here once configured
out_dir = os.path.join('out', 'bench')


def sync():
    if run.device.startswith('cuda'):
        torch.cuda.synchronize()


def time_median(f, n=None):
    """Median seconds of f()."""
    return time_interleaved({'f': f}, n)['f']


def time_interleaved(ways, n=None):
    """{name: f} -> {name: median seconds of f()}, one call of each in turn, so that the machine's drift hits all alike."""
    seconds = {name: [] for name in ways}
    for i in range((n or run.repeats) + 2):
        for name, f in ways.items():
            sync()
            t = time.perf_counter()
            f()
            sync()
            if i >= 2:
                seconds[name].append(time.perf_counter() - t)
    return {name: statistics.median(some) for name, some in seconds.items()}


class LiveMemory(TorchDispatchMode):
    """Bytes of tensors alive, and their peak: what an allocator would be asked for, on any device, also 'meta', where
    nothing is computed. The inner workspace of a kernel is not seen."""

    def __init__(self, *already):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, {}
        for t in already:
            self.seen[t.untyped_storage()._cdata] = True                              # counted elsewhere

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in self.seen:
                    self.seen[key] = True
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.gone, key, storage.nbytes())
        return result

    def gone(self, key, size):
        self.live -= size
        self.seen.pop(key, None)


def table(name, rows):
    """Print rows (dicts with the same keys), and write them to out/bench/name.csv."""
    os.makedirs(out_dir, exist_ok=True)
    with open(os.path.join(out_dir, f'{name}.csv'), 'w', newline='') as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    text = [[str(key) for key in rows[0]]] + [[f'{v:.3g}' if isinstance(v, float) and abs(v) < 10 else f'{v:,.0f}' if isinstance(v, float) else str(v)
                                               for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    for line in text:
        print(' | '.join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(f'-> {out_dir}/{name}.csv\n')


def model_config(attn, K=80):
    return HSVDETConfig(scale=run.scale, num_classes=K, attn=attn, k=run.k, select=run.select, gate=run.gate,
                        heads=run.heads, pos=run.pos, one2one=run.one2one)


def training_set(cache_mb):
    strengths = dict(mosaic=run.mosaic, mixup=run.mixup, scale=run.scale_aug, translate=run.translate,
                     hsv=(run.hsv_h, run.hsv_s, run.hsv_v), flip=run.flip, block=run.mosaic_block)
    return DetectionDataset(run.train_data, run.train_images, shape(), strengths, run.seed, cache_mb)


def make(attn, K=80):
    torch.manual_seed(0)
    model = HSVDET(model_config(attn, K))
    for block in model.blocks().values():
        block.gate.data.fill_(0.5)
    return model.to(run.device, memory_format=torch.channels_last)


def bench_attention():
    """Definition, fast path (inference form) and full attention (SDPA, same dense map), batch 1, float32."""
    rows = []
    for H, W in run.sizes or ((640, 640), (736, 1280), (1088, 1920), (1440, 2560), (2176, 3840)):
        for level, stride in (('P5', 32), ('P4', 16)):
            h, w = H // stride, W // stride
            x = torch.randn(1, run.channels, h, w, device=run.device).to(memory_format=torch.channels_last)
            torch.manual_seed(0)
            block = SparseGlobalBlockGated(run.channels, run.k, run.select, run.heads, run.pos).to(run.device).eval()
            full = SparseGlobalBlockGated(run.channels, 0, 'l2sq', run.heads, run.pos).to(run.device).eval()
            full.load_state_dict(block.state_dict(), strict=False)
            block.gate.data.fill_(0.5)
            full.gate.data.fill_(0.5)
            row = dict(image=f'{W}x{H}', level=level, N=h * w)
            with torch.no_grad():
                fast = copy.deepcopy(block)
                if run.heads == 1:
                    fast.merge_projections(), full.merge_projections()
                ways = {'plain': block.forward_reference, 'fast': fast.forward, 'full': full.forward}
                for name, f in ways.items():
                    shadow = getattr(copy.deepcopy(f.__self__).to('meta'), f.__name__)            # FLOPs are counted on meta tensors: the
                    with FlopCounterMode(display=False) as counter:                   # counter does not know a CPU's attention kernel
                        shadow(x.to('meta'))
                    row[f'{name} GFLOPs'] = counter.get_total_flops() / 1e9
                times = time_interleaved({name: functools.partial(f, x) for name, f in ways.items()}, 3 if h * w > 9000 else None)
                row |= {f'{name} ms': seconds * 1e3 for name, seconds in times.items()}
                for name, f in ways.items():
                    with LiveMemory(x) as memory:
                        f(x)
                    row[f'{name} MiB'] = memory.peak / 2 ** 20
            row['plain/fast'], row['full/fast'] = row['plain ms'] / row['fast ms'], row['full ms'] / row['fast ms']
            rows.append(row)
            print(f'{row["image"]} {level}: plain {row["plain ms"]:.1f} ms, fast {row["fast ms"]:.1f} ms, full {row["full ms"]:.1f} ms', flush=True)
    print()
    table('attention', rows)
    try:
        import matplotlib
    except ImportError:
        return print('no plot: pip install matplotlib')
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4.5))
    for level, style in (('P4', '-'), ('P5', '--')):
        for name, colour in (('full', 'C3'), ('plain', 'C1'), ('fast', 'C0')):
            some = [r for r in rows if r['level'] == level]
            ax.plot([r['N'] for r in some], [r[f'{name} ms'] for r in some], style, color=colour, marker='.', label=f'{name} {level}')
    ax.set(xscale='log', yscale='log', xlabel='tokens N', ylabel='ms', title=f'c = {run.channels}, k = {run.k}, float32, batch 1, {run.device}')
    ax.grid(alpha=0.3, which='both')
    ax.legend(ncols=2)
    fig.tight_layout()
    fig.savefig(os.path.join(out_dir, 'attention.png'), dpi=100)
    print(f'-> {out_dir}/attention.png')


PARTS = dict.fromkeys(BACKBONE, 'backbone') | dict.fromkeys(('block3', 'block4', 'block5'), 'attention') | {'detect_head': 'head'}


def clock_parts(model):
    """Seconds by part, filled anew by every forward pass of the model: a dict."""
    spent, begun = {}, [0.0]

    def start(module, args):
        sync()
        begun[0] = time.perf_counter()

    def stop(module, args, output, part):
        sync()
        spent[part] = spent.get(part, 0.0) + time.perf_counter() - begun[0]

    for name, layer in model.named_children():
        layer.register_forward_pre_hook(start)
        layer.register_forward_hook(functools.partial(stop, part=PARTS.get(name, 'neck')))
    return spent


def post(model, maps):
    boxes, scores = model.decode(maps)
    select_detections(boxes[0], scores[0], 0.25, 0.7, 300, False, True)


@torch.no_grad()
def bench_latency():
    """
    One image through the network, batch 1. "by part" is the inference form with a clock around every layer, post is
    decode and NMS at 0.25; the rows without parts are whole forward passes, without post.
    """
    rows = []
    for H, W in run.sizes or ((640, 640), (1088, 1920)):
        x = torch.rand(1, 3, H, W, device=run.device).to(memory_format=torch.channels_last)
        letters = dict.fromkeys(('---', run.attn))
        models = {attn: make(attn).fuse() for attn in letters}
        clocks = {attn: clock_parts(model) for attn, model in models.items()}
        samples = {attn: [] for attn in letters}
        for i in range(run.repeats + 2):                                              # in turn, so that drift hits all alike
            for attn, model in models.items():
                clocks[attn].clear()
                maps, _ = model(x)
                sync()
                t = time.perf_counter()
                post(model, maps)
                sync()
                if i >= 2:
                    samples[attn].append({**clocks[attn], 'post': time.perf_counter() - t})
        for attn in letters:
            row = dict(image=f'{W}x{H}', attn=attn, how='by part')
            for part in ('backbone', 'attention', 'neck', 'head', 'post'):
                row[f'{part} ms'] = statistics.median(s.get(part, 0.0) for s in samples[attn]) * 1e3
            rows.append(row | {'all ms': statistics.median(sum(s.values()) for s in samples[attn]) * 1e3})
        ways = {}
        for attn in letters:
            ways |= {(attn, 'not fused'): make(attn).eval(), (attn, 'fused'): make(attn).fuse()}
            if run.compile:
                ways[attn, 'compiled'] = torch.compile(make(attn).fuse())
            if run.onnx and run.device == 'cpu':
                ways[attn, 'onnxruntime'] = onnx_session(make(attn).fuse(), x)
        for (attn, how), seconds in time_interleaved({name: functools.partial(f, x) for name, f in ways.items() if f is not None}).items():
            rows.append(dict.fromkeys(rows[0], '') | {'image': f'{W}x{H}', 'attn': attn, 'how': how, 'all ms': seconds * 1e3})
    table(f'latency_{run.scale}', rows)


def onnx_session(model, x):
    """A function of the image that runs onnxruntime, or None."""
    try:
        import onnxruntime

        from export import export_onnx
        os.makedirs(out_dir, exist_ok=True)
        path = os.path.join(out_dir, 'latency.onnx')
        export_onnx(model, path, tuple(x.shape[2:]))
    except (ImportError, InputError) as e:
        return print(f'no ONNX row: {e}')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda image: session.run(None, {session.get_inputs()[0].name: image.contiguous().numpy()})


def bench_nms():
    """Crowded candidates, as evaluation at conf 0.001 sees them: clusters of jittered copies of objects, 80 classes."""
    rows = []
    for P in (300, 1000, 3000, 10000, 30000):
        g = torch.Generator().manual_seed(0)
        objects = max(1, P // 30)
        centre, size = torch.rand(objects, 2, generator=g) * 640, torch.exp(torch.rand(objects, 2, generator=g) * 3 + 2.5)
        which = torch.randint(0, objects, (P,), generator=g)
        jitter = torch.randn(P, 2, 2, generator=g) * 0.08
        c, s = centre[which] + jitter[:, 0] * size[which], size[which] * (1 + jitter[:, 1]).clamp(0.3)
        boxes = torch.cat((c - s / 2, c + s / 2), 1).to(run.device)
        scores = torch.rand(P, generator=g).square().to(run.device)
        labels = torch.randint(0, 80, (objects,), generator=g)[which].to(run.device)
        with LiveMemory() as memory:
            kept = len(nms(boxes, scores, labels, 0.7, 300))
        row = dict(candidates=P, kept=kept)
        row['ms'] = time_median(lambda b=boxes, s=scores, y=labels: nms(b, s, y, 0.7, 300)) * 1e3
        row['ms, all kept'] = time_median(lambda b=boxes, s=scores, y=labels: nms(b, s, y, 0.7, 10 ** 9), 3) * 1e3
        row['MiB'] = memory.peak / 2 ** 20
        rows.append(row)
    table('nms', rows)


def shape():
    return (run.imgsz, run.imgsz) if isinstance(run.imgsz, int) else tuple(run.imgsz)


def half_dtype():
    """What train.py's dtype='auto' is on this machine."""
    if run.device.startswith('cuda'):
        return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    return 'bfloat16' if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else 'float32'


def bench_train():
    """
    Where the time of a micro-batch and an optimizer step goes. Loading is one thread's time; with a loader process it runs
    beside the rest. AdamW and one head, whatever the settings.
    """
    name = run.dtype if run.dtype != 'auto' else half_dtype()
    data, micro, ways, spent = training_set(run.cache_mb), run.batch_size // run.grad_accum, {}, {}
    for how in ('eager', 'compiled')[:1 + run.compile]:
        model = make(run.attn, len(data.names)).train()
        ema = copy.deepcopy(model).requires_grad_(False)
        model.checkpointing = run.checkpointing
        if how == 'compiled':
            model.forward_features = torch.compile(model.forward_features)
        ways[how] = model, ema, torch.optim.AdamW(model.param_groups(1e-3, run.weight_decay), fused=True)

    @contextlib.contextmanager
    def clock(how, part):
        sync()
        t = time.perf_counter()
        yield
        sync()
        spent.setdefault(how, {}).setdefault(part, []).append(time.perf_counter() - t)

    for i, (how, (model, ema, optimizer)) in itertools.product(range(run.repeats + 3), ways.items()):                # in turn
        with clock(how, 'load'):
            batch = collate([data[0, (i * micro + j) % len(data)] for j in range(micro)])
        images = batch['images'].to(run.device).to(memory_format=torch.channels_last).float() / 255
        targets = dict(labels=batch['labels'].to(run.device), boxes=batch['boxes'].to(run.device))
        with clock(how, 'forward'), torch.autocast(run.device.split(':')[0], getattr(torch, name), enabled=name != 'float32'):
            maps, _ = model(images)
        with clock(how, 'assign + loss'):
            loss = sum(detection_loss(maps, targets).values())
        with clock(how, 'backward'):
            loss.backward()
        with clock(how, 'optimizer + EMA'):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_lerp_([p for p in ema.state_dict().values() if p.is_floating_point()],
                                 [p for p in model.state_dict().values() if p.is_floating_point()], 0.01)
    for how, parts in spent.items():
        rows = [dict(part=part, ms=statistics.median(seconds[3:]) * 1e3) for part, seconds in parts.items()]
        all_ms = sum(r['ms'] for r in rows)
        rows = [dict(r, share=f'{r["ms"] / all_ms:.0%}', **{'images/s': micro / r['ms'] * 1e3}) for r in rows]
        rows.append({'part': 'all, one after the other', 'ms': all_ms, 'share': '100%', 'images/s': micro / all_ms * 1e3})
        print(f'HSV-DET-{run.scale} attn={run.attn}, {shape()[0]}x{shape()[1]}, batch {micro}, {name}, {how}, {run.train_data}')
        table('train' + '_compiled' * (how == 'compiled'), rows)


def bench_memory():
    """
    A training step's peak, by part, from the sizes of all tensors on the 'meta' device: nothing is computed, no GPU is
    needed. It is the second micro-batch, whose gradients are added to those of the first. AdamW's two moments; without
    assignment and losses, which are bounded and small beside the maps. On a GPU the measured peak of the real step
    stands beside it, under memory_cap_gb if that is set.
    """
    H, W = shape()
    half = run.dtype != 'float32'
    micro = run.batch_size // run.grad_accum
    rows = []
    for letters in dict.fromkeys(('---', run.attn)):
        with torch.device('meta'):
            model = HSVDET(model_config(letters)).train()
            images = torch.empty(micro, 3, H, W)
        count = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if half:                                                                      # stands in for autocast, which meta tensors do not know:
            model, images = model.bfloat16(), images.bfloat16()                       # activations in 2 bytes, and the weights' 2-byte copies
        model.checkpointing = run.checkpointing
        sum(m.float().sum() for m in model(images)[0]).backward()                     # gradients are there from the second micro-batch on
        standing = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        with LiveMemory(*standing) as memory:
            maps, _ = model(images)
            kept = memory.live
            sum(m.float().sum() for m in maps).backward()
        row = dict(attn=letters, parameters=count * 4, EMA=count * 4, optimizer=trained * 8, gradients=trained * 4)
        row |= {'2-byte weights': count * 2 * half, 'forward + backward': memory.peak}
        row = row | {'all': sum(list(row.values())[1:]), 'of which kept for backward': kept}
        row = {name: value if name == 'attn' else value / 2 ** 20 for name, value in row.items()}
        if run.device.startswith('cuda'):
            row['measured'] = cuda_peak(letters, micro, H, W)
        rows.append(row)
    print(f'MiB; HSV-DET-{run.scale}, {H}x{W}, {run.grad_accum} micro-batches of {micro}, checkpointing {run.checkpointing}, '
          f'{"2-byte activations" if half else "float32"}')
    table('memory', rows)
    if len(rows) > 1:
        more = {name: rows[1][name] - rows[0][name] for name in ('of which kept for backward', 'all')}
        print(f'the blocks: {more["of which kept for backward"]:.0f} MiB kept for backward, {more["all"]:.0f} MiB in all')


def cuda_peak(letters, micro, H, W):
    if run.memory_cap_gb:
        torch.cuda.set_per_process_memory_fraction(min(1.0, run.memory_cap_gb * 2 ** 30 / torch.cuda.get_device_properties(run.device).total_memory))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = make(letters).train()
    model.checkpointing = run.checkpointing
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.param_groups(1e-3, run.weight_decay), fused=True)
    corner = torch.rand(micro, 50, 2, device=run.device) * torch.tensor([W, H], device=run.device) * 0.8
    targets = dict(labels=torch.zeros(micro, 50, dtype=torch.long, device=run.device), boxes=torch.cat((corner, corner + 60), -1))
    for _ in range(2):
        with torch.autocast('cuda', getattr(torch, half_dtype()), enabled=run.dtype != 'float32'):
            _, losses = model(torch.rand(micro, 3, H, W, device=run.device).to(memory_format=torch.channels_last), targets)
        sum(losses.values()).backward()
        optimizer.step()
    del ema
    return torch.cuda.max_memory_allocated() / 2 ** 20


def bench_loader():
    """Augmented samples per second, one process, one thread, wall clock; then the same under a profiler, by part."""
    torch.set_num_threads(1)
    rows, parts = [], []
    for cache in (0, run.cache_mb):
        for profiled in (False, True):
            data, profile = training_set(cache), cProfile.Profile()
            visits = [(epoch, int(i)) for epoch in range(1 + -(-400 // len(data))) for i in data.order(epoch)]        # as training does
            for key in visits[-800:-400] if cache else ():                            # the cache fills
                data[key]
            if profiled:
                profile.enable()
            t = time.perf_counter()
            for key in visits[-400:]:
                data[key]
            seconds = time.perf_counter() - t
            profile.disable()
            if not profiled:
                rows.append({'cache MiB': cache, 'samples/s': 400 / seconds, 'ms a sample': seconds / 400 * 1e3})
                continue
            inside = {name: time for (file, _, name), (_, _, _, time, _) in pstats.Stats(profile).stats.items() if file.endswith('data.py')}
            decode, pixels, colour = (inside.get(name, 0.0) for name in ('load_image', 'place', 'jitter_colour'))
            parts.append({'cache MiB': cache, 'decode': decode, 'resample and place': pixels, 'colour': colour,
                          'boxes and the rest': inside['__getitem__'] - decode - pixels - colour})
    print(f'{run.train_data}, {shape()[0]}x{shape()[1]}, mosaic {run.mosaic}, mosaic_block {run.mosaic_block}')
    table('loader', rows)
    for row in parts:
        row |= {name: f'{row[name] / sum(v for k, v in row.items() if k != "cache MiB"):.0%}' for name in list(row)[1:]}
    print('where the time goes, under cProfile, which makes Python look dearer than it is')
    table('loader_parts', parts)


if __name__ == '__main__':
    run = types.SimpleNamespace(**configure(knobs, 'what'))
    if run.device == 'auto':
        run.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if run.device.startswith('cuda'):
        if not torch.cuda.is_available():
            raise InputError(f'--device={run.device}: this PyTorch sees no CUDA device; use --device=cpu')
        torch.cuda.set_device(int(run.device.partition(':')[2] or 0))
    if run.threads:
        torch.set_num_threads(run.threads)
    benches = dict(attention=bench_attention, latency=bench_latency, nms=bench_nms, train=bench_train, memory=bench_memory, loader=bench_loader)
    if run.what not in benches:
        raise InputError(f'python bench.py needs one of: {" ".join(benches)}' + (f'; got {run.what!r}' if run.what else ''))
    machine = f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads'
    if run.device.startswith('cuda'):
        machine = torch.cuda.get_device_name(run.device)
    print(f'{machine}; torch {torch.__version__}, Python {sys.version.split()[0]}, {time.strftime("%Y-%m-%d")}\n')
    benches[run.what]()

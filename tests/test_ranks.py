"""What a GPU and several ranks ask of the loop, proven without them: waits, launches, ranks, recompiles."""
import collections
import contextlib
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from test_train import ROOT, RTDETR, assert_same, command, load, train
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from prepare.shapes import make_shapes

PLAIN = ['--optimizer=sgd', '--momentum=0.0', '--lr=0.001', '--warmup_epochs=0', '--grad_clip=1e9', '--max_steps=2']


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    out = tmp_path_factory.mktemp('shapes')
    make_shapes(str(out), train=12, val=3, size=96)
    return out


# --- one step of one process ------------------------------------------------------------------------------------------

class Enough(Exception):
    pass


class Counter(TorchDispatchMode):
    """Counts the operations PyTorch runs, and those for whose result a GPU would have to be waited for."""
    ASKING = ('aten::_local_scalar_dense', 'aten::nonzero', 'aten::masked_select', 'aten::_unique2', 'aten::equal')

    def __init__(self, monkeypatch):
        super().__init__()
        self.ops, self.waits = 0, collections.Counter()
        for name in ('tolist', 'cpu', '__array__'):                    # on a CPU these run no operation
            monkeypatch.setattr(torch.Tensor, name, self.counted(name))

    def counted(self, name):
        original = getattr(torch.Tensor, name)

        def method(*args, **kwargs):
            self.waits[name] += 1
            return original(*args, **kwargs)
        return method

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.ops += 1
        self.waits[name] += name in self.ASKING
        if name.startswith('aten::index') and isinstance(args[1], (list, tuple)):     # a mask as index is a nonzero
            self.waits['mask'] += sum(t is not None and t.dtype == torch.bool for t in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('settings, most_ops, waits', [
    ([], 2150, {'aten::nonzero': 3, 'tolist': 1}),
    (RTDETR[:-1], 4000, {'aten::nonzero': 1, 'cpu': 2, 'tolist': 1}),
], ids=['hsvdet', 'rtdetr'])
def test_a_step_waits_once_beside_the_assignment(shapes, tmp_path, monkeypatch, settings, most_ops, waits):
    """
    What lies between two optimizer steps. hsvdet: the assigner's three (objects, pairs of its one chunk, foreground);
    rtdetr: the matching's transfer of costs and of what is an object, denoising's pairs; and tolist, the loop's own.
    Every operation is a launch of at least 5 us on a GPU, so more of them than today are a regression.
    """
    counter, seen = Counter(monkeypatch), []

    def at_step(*_):
        seen.append((counter.ops, counter.waits.copy()))
        if len(seen) == 3:
            raise Enough

    arguments = command(shapes, tmp_path, *settings, '--log_interval=100')
    monkeypatch.setattr(sys, 'argv', arguments[1:])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    hook = register_optimizer_step_pre_hook(at_step)
    try:
        with counter, pytest.raises(Enough):
            runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')
    finally:
        hook.remove()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    (_, _), (ops_before, before), (ops, after) = seen
    assert dict(after - before) == waits
    assert 0.8 * most_ops < ops - ops_before <= most_ops, ops - ops_before


# --- several ranks ----------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_ranks_need_no_broadcast_of_buffers(shapes, tmp_path):
    """BatchNorm in training mode does not read its running statistics: rank 0's file is the same to the bit."""
    train(shapes, tmp_path / 'without', *PLAIN, ranks=2)
    train(shapes, tmp_path / 'with', *PLAIN, ranks=2, change='''
ddp = torch.nn.parallel.DistributedDataParallel
def broadcasting(*args, broadcast_buffers, **kwargs):
    assert not broadcast_buffers
    return ddp(*args, broadcast_buffers=True, **kwargs)
torch.nn.parallel.DistributedDataParallel = broadcasting''')
    a, b = (load(tmp_path / name / 'ckpt.pt') for name in ('without', 'with'))
    for saved in (a, b):
        del saved['config']
    assert_same(a, b)
    assert (tmp_path / 'with/log.csv').read_text() == (tmp_path / 'without/log.csv').read_text()


def assert_close(a, b, limit):
    """Two checkpoints' parameters and statistics, relative to the largest number of each."""
    for name, p in a['model'].items():
        assert (b['model'][name] - p).abs().max() <= limit * p.abs().max(), name


@pytest.mark.slow
def test_two_ranks_compiled(shapes, tmp_path):
    """All of torch.compile but the code generator, which is PyTorch's own to test and takes minutes on a CPU."""
    change = "import functools\ntorch.compile = functools.partial(torch.compile, backend='aot_eager')"
    for name, compiled in (('eager', False), ('compiled', True)):
        train(shapes, tmp_path / name, *PLAIN, f'--compile={compiled}', ranks=2, change=change)
    assert_close(load(tmp_path / 'eager/ckpt.pt'), load(tmp_path / 'compiled/ckpt.pt'), 1e-4)


@pytest.mark.slow
def test_two_ranks_with_checkpointing_in_bf16(shapes, tmp_path):
    """Recomputed activations are the activations: weights as without, and statistics that count a batch once."""
    for name, checkpointing in (('kept', False), ('recomputed', True)):
        train(shapes, tmp_path / name, *PLAIN, '--dtype=bfloat16', '--grad_accum=2', f'--checkpointing={checkpointing}',
              ranks=2)
    assert_close(load(tmp_path / 'kept/ckpt.pt'), load(tmp_path / 'recomputed/ckpt.pt'), 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/cmdline').exists(), reason='looks for processes in /proc')
def test_two_ranks_with_workers_leave_no_process(shapes, tmp_path):
    train(shapes, tmp_path / '1', *PLAIN, '--workers=1', ranks=2)
    left = []
    for path in Path('/proc').glob('[0-9]*/cmdline'):                  # a worker is a fork: its command line is ours
        with contextlib.suppress(OSError):                             # gone meanwhile
            left += [path] * (str(tmp_path / '1').encode() in path.read_bytes())
    assert not left
    train(shapes, tmp_path / '0', *PLAIN, '--workers=0', ranks=2)
    assert_same(*(load(tmp_path / n / 'ckpt.pt')['model'] for n in '10'))


# --- compile ----------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_recompiles_under_multi_scale_are_bounded(shapes, tmp_path):
    """
    Twelve steps at four sizes: one graph of the first size, one of symbolic sizes; 2 were counted, not one per size.
    Each block whose tokens are fewer than k at some sizes and more at others adds one, and a map of one cell another:
    4 with --imgsz=96 --multi_scale=0.8 --k=8. PyTorch gives up beyond 8.
    """
    said = train(shapes, tmp_path / 'out', '--imgsz=128', '--multi_scale=0.5', '--k=3', '--compile=True', change='''
import atexit, functools
from torch._dynamo.utils import counters
torch.compile = functools.partial(torch.compile, backend='eager')       # tracing is what is counted
atexit.register(lambda: print('graphs', counters['stats']['unique_graphs'], len(counters['graph_break'])))''').stdout
    graphs, breaks = map(int, said.split('graphs ')[1].split()[:2])
    assert graphs == 2 and breaks == 0, said

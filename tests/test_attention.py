"""The letters of `attn`: fast paths against definitions, numerics, the gate, export, costs."""
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attention import ATTENTION, HELP, Gated, KernelDensity, make_block, print_once
from configurator import InputError
from sparse_attention import SparseGlobalBlockGated

SIZES = [(1, 1), (2, 40), (10, 13), (17, 33)]                        # one cell; thinner than a tile; ragged; many tiles
VARIANTS = [(letter, {}) for letter in ATTENTION] + [('K', dict(kernel='linear'))]


def config(**settings):
    return SimpleNamespace(**dict(k=20, select='l2sq', heads=1, pos=False, gate='learned', keep='',
                                  kernel='epanechnikov') | settings)


def make(letter, c=16, variant=None, seed=0, **settings):
    """A mixer whose layer norms, and maps of zeros, are not at their start, where they might hide a mistake."""
    torch.manual_seed(seed)
    mixer = ATTENTION[letter](c, config(**settings | (variant or {})))
    for m in mixer.modules():
        if isinstance(m, nn.LayerNorm):
            nn.init.uniform_(m.weight, 0.8, 1.2)
            nn.init.normal_(m.bias, std=0.1)
        elif isinstance(m, nn.Conv2d) and not m.weight.any():
            nn.init.normal_(m.weight, std=0.1)
    return mixer


def results(path, mixer, x, memory):
    """y and every gradient of some function of it."""
    inputs = [t.clone().requires_grad_() for t in (x, memory) if t is not None]
    y = path(*inputs)
    y.sin().sum().backward()
    found = [y.detach()] + [t.grad for t in inputs] + [p.grad for p in mixer.parameters()]
    mixer.zero_grad()
    return found


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('letter, variant, settings', [
    *[(letter, variant, settings) for letter, variant in VARIANTS for settings in (dict(), dict(heads=4, pos=True))],
    ('T', {}, dict(select='learned', k=0.3)), ('P', {}, dict(select='learned', k=0.3))], ids=str)
def test_fast_equals_reference(letter, variant, settings, size):
    """Outputs and all gradients, float64, to 1e-10 of the largest entry; without and with memory."""
    mixer = make(letter, variant=variant, **settings).double()
    x, memory = torch.randn(2, 16, *size, dtype=torch.double), torch.randn(2, 5, 16, dtype=torch.double)
    for extra in (None, memory):
        fast, slow = results(mixer.forward, mixer, x, extra), results(mixer.forward_reference, mixer, x, extra)
        assert fast[0].shape == x.shape
        for i, (a, b) in enumerate(zip(fast, slow, strict=True)):
            assert a is not None and b is not None, f'result {i} has no gradient'
            assert (a - b).abs().max() <= 1e-10 * max(1, b.abs().max()), f'result {i} differs'


@pytest.mark.parametrize('letter, variant', VARIANTS, ids=str)
def test_memory_is_seen(letter, variant):
    mixer, x = make(letter, variant=variant), torch.randn(1, 16, 6, 7)
    near, far = (mixer(x, torch.randn(1, 5, 16)) for _ in range(2))
    assert (near - far).abs().max() > 1e-4


def test_window_sees_its_radius_and_no_further():
    """The gradient of one output cell reaches the 9x9 cells around it, across the borders of tiles."""
    x = torch.randn(1, 16, 20, 20, requires_grad=True)
    make('W')(x)[0, :, 8, 15].sum().backward()
    rows, columns = x.grad.abs().sum((0, 1)).nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max(), len(rows)) == (4, 12, 11, 19, 81)


def test_native_sparse_reads_four_chosen_tiles_exactly():
    """Only the branch of the chosen tiles is on: the gradient reaches four tiles, besides the query's own."""
    mixer = make('N')
    mixer.branch_gate.weight.data.zero_()
    mixer.branch_gate.bias.data = torch.tensor([-100.0, 100.0, -100.0])               # the chosen tiles alone
    x = torch.randn(1, 16, 24, 24, requires_grad=True)
    mixer(x)[0, :, 0, 0].sum().backward()
    read = x.grad.abs().sum((0, 1)).unflatten(0, (3, 8)).unflatten(2, (3, 8)).sum((1, 3)) > 0
    assert read.sum() in (4, 5)                                       # the query's own cell may make it five


def test_epanechnikov_forgets_what_is_far():
    q = torch.zeros(1, 1, 1, 8)
    k = torch.tensor([0.0, 1.0, 3.0]).expand(8, 3).T[None, None]     # |q - k|^2 = 0, 8, 72; h^2 = 16
    y = KernelDensity.epanechnikov(q, k, torch.eye(3)[None, None])
    torch.testing.assert_close(y, torch.tensor([[[[1.0, 0.5, 0.0]]]]) / 1.51)
    lonely = KernelDensity.epanechnikov(q, k[:, :, 2:], torch.ones(1, 1, 1, 1))
    assert lonely.item() == 0


def test_tokens_only_changes_the_selected_ones():
    mixer, x = make('T'), torch.randn(2, 16, 9, 11)
    selected, weights = mixer.attention(x)
    changed = mixer(x).abs().sum(1).flatten(1) > 0
    assert torch.equal(changed, torch.zeros_like(changed).scatter(1, selected, True))
    assert selected.shape == (2, 20) and weights.shape == (2, 1, 20, 20)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, 20))


@pytest.mark.parametrize('offset', [0, 1])                           # 1: all positive, as after SiLU
@pytest.mark.parametrize('letter, variant', VARIANTS, ids=str)
def test_large_inputs_stay_finite_in_fp16(letter, variant, offset):
    """Activations of 1e3, under autocast and wholly in fp16; close to float32. (4 tiles: N has no choice to make.)"""
    block = Gated(make(letter, c=32, variant=variant, heads=2, pos=True))
    block.gate.data.fill_(0.5)
    x = ((torch.randn(1, 32, 13, 16) + 4 * offset) * 1e3).half().requires_grad_()
    with torch.autocast('cpu', torch.float16):
        y = block(x)
    assert y.dtype == torch.float16 and y.isfinite().all()
    y.float().mean().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in block.parameters())
    with torch.no_grad():
        wide = block(x.detach().float())
        half = block.half()(x.detach())
    assert half.dtype == torch.float16
    for narrow in (y.detach(), half):
        assert (narrow.float() - wide).square().mean().sqrt() < 0.02 * wide.square().mean().sqrt()


def test_every_block_starts_as_the_identity_and_learns():
    for letter in ATTENTION:
        block, x = make_block(letter, 16, config()), torch.randn(2, 16, 9, 11)
        y = block(x)
        assert torch.equal(y, x)
        (y * torch.randn_like(y)).sum().backward()
        if letter == 'P':                                            # its last maps are zeros, and its gate stays 1
            assert block.gate == 1 and not block.gate.requires_grad
            assert all(m.weight.grad.any() for m in (block.mixer.place, block.mixer.out_proj, block.mixer.mlp_out))
            assert make_block('P', 128, config()).mixer.heads == 4
            continue
        assert block.gate.grad.abs() > 0
        assert not make_block(letter, 16, config(gate='fixed')).gate.requires_grad
    x = torch.randn(1, 16, 9, 11)
    torch.testing.assert_close(Gated(block.mixer, 'fixed')(x) - x, (Gated(block.mixer, 'none')(x) - x) / 2)


def test_gate_gradient_is_a_float32_sum():
    """30,720 terms of 100 * 1 exceed fp16's 65,504; their sum in float32 is exact."""
    x = torch.ones(1, 16, 48, 40, dtype=torch.float16, requires_grad=True)
    block = Gated(nn.Identity())
    block.mixer.forward = lambda x, memory: x
    block(x).backward(torch.full_like(x, 100))
    assert block.gate.grad.dtype == torch.float32 and block.gate.grad == 100 * x.numel()


def test_onnx_equals_eager():
    """All letters in one file, an output each, with 6 tiles, of which N chooses 4."""
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    logging.getLogger('torch.onnx._internal.exporter._registration').setLevel(logging.ERROR)
    blocks = nn.ModuleList(Gated(make(letter), 'none') for letter in ATTENTION).eval()
    blocks.forward = lambda x: tuple(block(x) for block in blocks)
    x = torch.randn(1, 16, 10, 17)
    program = torch.onnx.export(blocks, (x,), dynamo=True, opset_version=18, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for letter, block, y in zip(ATTENTION, blocks, outputs, strict=True):
        want = block(x).detach()
        assert (torch.from_numpy(y) - want).abs().max() < 1e-4 * want.abs().max(), letter


def test_costs_are_what_help_says():
    """Matrix products at P4 of 1080p, c = 512, from meta tensors; S and T beside each other."""
    c, H, W, k, cfg = 512, 68, 120, 512, config(k=512)
    N = H * W
    tiles, padded = 9 * 15, 9 * 15 * 64                              # 68x120 takes 9x15 tiles of 64 cells
    want = {'W': 8 * c**2 * N + 4 * 256 * c * padded, 'L': 1.5 * c**2 * N + N**2 * c + 2 * 2 * c**2 * c / 4,
            'N': 8 * c**2 * N + 6 * c * N + 4 * c * (tiles + 512) * padded, 'K': 8 * c**2 * N + 4 * N**2 * c,
            'M': 0, 'C': 36 * c * 114 * N,
            'T': 8 * k * c**2 + 4 * k**2 * c, 'P': 16 * k * c**2 + 4 * k**2 * c + 98 * c * N,
            'S': 2 * N * c**2 + 2 * c**3 + 4 * k * c**2 + 4 * k**2 * c}
    for letter, flops in want.items():
        with torch.device('meta'), torch.no_grad(), FlopCounterMode(display=False) as counter:
            make_block(letter, c, cfg)(torch.empty(1, c, H, W))
        counted = counter.get_total_flops()
        assert abs(counted - flops) <= 1e-3 * flops, f'{letter}: {counted:.4g}, HELP says {flops:.4g}'


def test_the_convolutions_cost_what_S_does_and_see_two_cells_far():
    block, sparse = (make_block(letter, 128, config()) for letter in 'CS')
    count, want = (sum(p.numel() for p in b.parameters()) for b in (block, sparse))
    assert abs(count / want - 1) < 0.02
    x = torch.randn(1, 128, 9, 9, requires_grad=True)
    block.mixer.eval()(x)[0, :, 4, 4].sum().backward()
    rows, columns = x.grad.abs().sum((0, 1)).nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 6, 2, 6)


def test_make_block_and_fallback_line(capsys):
    assert make_block('-', 16, config()) is None and set(HELP) == set(ATTENTION) | set('-SFDC')
    for letter, k, select in (('S', 20, 'l2sq'), ('F', 0, 'l2sq'), ('D', 0, 'none')):
        block = make_block(letter, 16, config())
        assert isinstance(block, SparseGlobalBlockGated) and (block.k, block.select) == (k, select)
    with pytest.raises(InputError, match="no letter 'Q'"):
        make_block('Q', 16, config())
    capsys.readouterr()
    for _ in range(2):
        print_once('a line of this test')
    assert capsys.readouterr().out == 'a line of this test\n'

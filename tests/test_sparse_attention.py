"""The block: reference arrays, fast path against definition, numerics, gates, ties."""
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_attention import SparseGlobalBlock, SparseGlobalBlockGated, stable_topk

REFERENCE = Path(__file__).parent / 'reference'
SETTINGS = [dict(), dict(k=0), dict(k=0.25), dict(k=1000), dict(select='l2'), dict(select='learned'),
            dict(select='none'), dict(heads=4), dict(pos=True), dict(k=0, heads=2, pos=True),
            dict(k=30, heads=2, select='learned'), dict(gate='fixed'), dict(gate='none')]


def make(c=32, seed=0, open_to=0.7, **settings):
    torch.manual_seed(seed)
    block = SparseGlobalBlockGated(c, **{'k': 40, **settings})
    if block.gate.requires_grad:
        block.gate.data.fill_(open_to)
    return block


@pytest.mark.parametrize('name', ['small', 'p5'])
@pytest.mark.parametrize('path', ['forward', 'plain', 'folded'])
def test_reference(name, path):
    d = {key: torch.from_numpy(value) for key, value in np.load(REFERENCE / f'sparse_block_{name}.npz').items()}
    c = d['x'].shape[1]
    for block in (SparseGlobalBlock(c, int(d['k'])), SparseGlobalBlockGated(c, int(d['k']))):
        for proj in ('q', 'k', 'v', 'out'):
            getattr(block, f'{proj}_proj').weight.data = d[f'{proj}_weight'][..., None, None]
        block.norm.weight.data, block.norm.bias.data = d['norm_weight'], d['norm_bias']
        gated = isinstance(block, SparseGlobalBlockGated)
        if gated:
            block.gate.data = d['gate']
        selected = block.select_tokens(d['x'])[0]
        assert torch.equal(selected.sort(1).values, d['selected'])
        with torch.no_grad():
            if path == 'plain':
                y = block.forward_reference(d['x'])
            elif path == 'folded':
                y = block.fuse()(d['x'])
            else:
                y = block(d['x'])
        torch.testing.assert_close(y, d['gated' if gated else 'block'], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize('settings', SETTINGS, ids=str)
def test_fast_equals_definition(settings):
    """Outputs and all gradients, float64, to 1e-12 of the largest entry."""
    block = make(**settings).double()
    x = torch.randn(2, 32, 10, 12, dtype=torch.double)
    results = []
    for path in (block.forward, block.forward_reference):
        x_in = x.clone().requires_grad_()
        y = path(x_in)
        y.sin().sum().backward()
        results.append([y, x_in.grad] + [p.grad.clone() for p in block.parameters() if p.grad is not None])
        block.zero_grad()
    assert len(results[0]) == len(results[1]) > 3
    for fast, slow in zip(*results, strict=True):
        assert (fast - slow).abs().max() <= 1e-12 * max(1, slow.abs().max())
    want = results[0][0]
    with torch.no_grad():                        # here the fast path writes into its own memory, which must not be x
        for some in (x.clone(), x.to(memory_format=torch.channels_last)):
            assert (block(some) - want).abs().max() <= 1e-12 * want.abs().max() and torch.equal(some, x)


def test_random_selection_repeats_in_evaluation_and_varies_in_training():
    block = make(select='random')
    x = torch.randn(1, 32, 10, 12)
    assert not torch.equal(block.select_tokens(x)[0], block.select_tokens(x)[0])
    block.eval()
    assert torch.equal(block.select_tokens(x)[0], block.select_tokens(x)[0])
    several = block.select_tokens(x.expand(3, -1, -1, -1))[0]
    assert all(torch.equal(cells, block.select_tokens(x)[0][0]) for cells in several)    # wherever it is in its batch
    with torch.no_grad():
        torch.testing.assert_close(block(x), block.forward_reference(x))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_memory_formats_agree(memory_format):
    block, x = make(), torch.randn(2, 32, 10, 12)
    torch.testing.assert_close(block(x.to(memory_format=memory_format)), block(x))


def test_ties_go_to_the_lower_index():
    importance = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 3.0],
                               [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
                               [-1.0, -2.0, -2.0, 5.0, -2.0, -9.0]])
    assert stable_topk(importance, 3).sort(1).values.tolist() == [[1, 2, 4], [0, 1, 2], [0, 1, 3]]
    many = torch.randint(0, 5, (4, 1000)).float() - 2
    want = many.sort(dim=1, descending=True, stable=True).indices[:, :300].sort(1).values
    assert torch.equal(stable_topk(many, 300).sort(1).values, want)


def test_gate_zero_is_the_identity_and_only_the_gate_learns():
    block = make(open_to=0.0)
    x = torch.randn(2, 32, 10, 12, requires_grad=True)
    y = block(x)
    assert torch.equal(y, x)
    (y * torch.randn_like(y)).sum().backward()
    assert block.gate.grad.abs() > 1e-3
    assert all((p.grad == 0).all() for name, p in block.named_parameters() if name != 'gate')
    torch.optim.SGD(block.parameters(), 0.1).step()
    block.zero_grad()
    block(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in block.parameters()), 'once the gate is open everything learns'


def test_learned_selection_gets_a_gradient():
    block = make(select='learned')
    block(torch.randn(2, 32, 10, 12)).square().sum().backward()
    assert block.score.weight.grad.abs().max() > 0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_large_inputs_stay_finite_under_autocast(dtype):
    """Activations of 1e3 in half precision: finite outputs and gradients; the definition, all in fp16, overflows."""
    block = make(c=64, k=20)
    x = (torch.randn(1, 64, 8, 8) * 1e3).to(dtype).requires_grad_()
    with torch.autocast('cpu', dtype):
        y = block(x)
    assert y.dtype == dtype and y.isfinite().all()
    y.float().mean().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in block.parameters())
    wide = block.float()(x.detach().float())
    assert (y.float() - wide).abs().max() < 0.02 * wide.abs().max()
    if dtype == torch.float16:                                         # the same formula, all of it in fp16
        t = x.detach().flatten(2).transpose(1, 2)
        half = {name: getattr(block, f'{name}_proj').weight.detach().flatten(1).half() for name in ('q', 'k', 'v')}
        assert t.square().sum(2).isinf().all(), 'a sum of squares leaves fp16: every token ties at infinity'
        q, k, v = (t @ half[name].T for name in ('q', 'k', 'v'))
        assert not ((q @ k.transpose(1, 2) / 8).softmax(-1) @ v).isfinite().all()


def test_selection_sees_float32_under_fp16():
    """Two tokens whose squared norms both overflow fp16: the larger must still be found."""
    x = torch.full((1, 64, 4, 4), 100.0, dtype=torch.float16)
    x[0, :, 2, 1], x[0, :, 3, 3] = 130, 120
    assert make(c=64, k=2).select_tokens(x)[0].sort(1).values.tolist() == [[9, 15]]


def test_attention_rows_for_pictures():
    block, x = make(k=20), torch.randn(2, 32, 6, 7)
    selected, weights = block.attention(x)
    assert selected.shape == (2, 20) and weights.shape == (2, 1, 20, 20)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, 20))


def test_folded_equals_unfolded():
    block, x = make(c=64), torch.randn(2, 64, 10, 12)
    with torch.no_grad():
        want = block(x)
        got = block.fuse()(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not hasattr(block, 'v_proj')

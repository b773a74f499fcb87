"""Muon: what orthogonalize does, a step by hand; optimizer and precision by part; resume with each optimizer."""
import io
import sys

import pytest
import torch

from baselines.detr import DETR, DETRConfig
from configurator import InputError
from model import HSVDET, HSVDETConfig
from optimizers import (
    KINDS,
    LIBRARY,
    PARTS,
    Muon,
    make_optimizers,
    orthogonalize,
    orthogonalize_all,
    set_precision,
)


@pytest.mark.parametrize('shape', [(8, 8), (16, 72), (72, 16), (1, 5)])
@pytest.mark.parametrize('function', [lambda x: orthogonalize(x[None])[0], lambda x: orthogonalize_all([x])[0]],
                         ids=['plain', 'fast'])
def test_orthogonalize_makes_singular_values_equal(shape, function):
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=g) * 1e-3
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    got = function(matrix)
    assert torch.linalg.svdvals(got)[:min(shape)].min() > 0.5 and torch.linalg.svdvals(got).max() < 1.3  # its band
    cosine = (got * (u @ vh)).sum() / got.norm() / (u @ vh).norm()
    assert cosine > 0.95
    torch.testing.assert_close(function(matrix * 1e3), got, rtol=1e-2, atol=1e-3)              # scale does not matter
    assert (function(torch.zeros(shape)) == 0).all()


def test_many_matrices_the_fast_way():
    """Of several shapes, tall, wide and square, ill-conditioned (singular values from 1 to 1e-6), in their order."""
    g = torch.Generator().manual_seed(2)
    shapes = [(16, 144), (64, 64), (16, 20), (48, 12), (16, 144), (12, 12), (3, 64), (20, 16)]
    many = [torch.randn(shape, generator=g, dtype=torch.float64)
            * torch.logspace(0, -6, shape[1], dtype=torch.float64)[torch.randperm(shape[1], generator=g)]
            for shape in shapes]
    for x, exact, single in zip(many, orthogonalize_all(many), orthogonalize_all([x.float() for x in many]),
                                strict=True):
        torch.testing.assert_close(exact, orthogonalize(x[None])[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(single.double(), orthogonalize(x[None])[0], rtol=0, atol=2e-3)
    assert orthogonalize_all([]) == []


def test_muon_step_by_hand():
    """Three kernels, two of one shape: a step by hand for each."""
    g = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in ((4, 3, 3, 3), (4, 6), (4, 27))]
    before, gradients = [p.detach().clone() for p in params], [torch.randn(p.shape, generator=g) for p in params]
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient.clone(memory_format=torch.channels_last) if p.ndim == 4 else gradient.clone()
    Muon([dict(params=params, lr=0.1, weight_decay=0.5)], momentum=0.9).step()
    for p, was, gradient in zip(params, before, gradients, strict=True):
        update = orthogonalize(gradient.lerp(gradient * 0.1, 0.9).flatten(1)[None]).view(p.shape)
        size = 0.2 * max(update.flatten(1).shape) ** 0.5
        torch.testing.assert_close(p.detach(), was * 0.95 - 0.1 * size * update, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(p.grad, gradient)                                       # the loop may still log it


def test_parts_get_their_optimizer():
    model = HSVDET(HSVDETConfig(num_classes=3))
    groups = model.param_groups(1.0, 0.05, dict(head=0.5))
    kinds = dict(backbone='muon', neck='adamw', block='muon', head='sgd')
    optimizers = make_optimizers(groups, kinds, 0.9, 0.999)
    by_kind = {type(o).__name__: [group['name'] for group in o.param_groups] for o in optimizers}
    assert by_kind['Muon'] == ['backbone.decay', 'block.decay']
    assert by_kind['SGD'] == ['head.decay', 'head.no_decay']
    assert set(by_kind['AdamW']) == {'backbone.no_decay', 'block.no_decay', 'neck.decay', 'neck.no_decay'}
    assert {group['factor'] for o in optimizers for group in o.param_groups if group['part'] == 'head'} == {0.5}
    count = sum(p.numel() for o in optimizers for group in o.param_groups for p in group['params'])
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)


def quadratic_steps(optimizers, params, steps, first=0):
    """Each parameter is drawn towards 1 with noise that is a function of the step."""
    for step in range(first, first + steps):
        g = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = p.detach() - 1 + 0.1 * torch.randn(p.shape, generator=g)
        for o in optimizers:
            o.step()


@pytest.mark.parametrize('kind', KINDS)
def test_each_kind_learns_and_resumes_to_the_bit(kind):
    """Through a file that is read with weights_only, fifteen steps and fifteen more equal thirty."""
    if kind in LIBRARY:
        pytest.importorskip('pytorch_optimizer')

    def start():
        g = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in ((4, 3, 3, 3), (6, 5), (4,), ())]
        groups = [dict(params=params[:2], part='head', name='head.decay', lr=1.0, weight_decay=0.05),
                  dict(params=params[2:], part='head', name='head.no_decay', lr=1.0, weight_decay=0.0)]
        return params, make_optimizers(groups, dict(head=kind), 0.9, 0.999)

    def distance(params):
        return sum((p - 1).square().sum() for p in params).item()

    params, optimizers = start()
    before = distance(params)
    quadratic_steps(optimizers, params, 30)
    assert distance(params) < 0.9 * before
    again, first = start()
    quadratic_steps(first, again, 15)
    file = io.BytesIO()
    torch.save([o.state_dict() for o in first], file)
    file.seek(0)
    resumed, second = start()
    for p, value in zip(resumed, again, strict=True):
        p.data.copy_(value.data)
    for o, state in zip(second, torch.load(file, weights_only=True), strict=True):
        o.load_state_dict(state)
    quadratic_steps(second, resumed, 15, first=15)
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


def test_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch_optimizer', None)
    group = dict(params=[torch.nn.Parameter(torch.zeros(2, 2))], part='head', name='head.decay', lr=1.0)
    with pytest.raises(InputError, match='pip install pytorch_optimizer'):
        make_optimizers([group], dict(head='lamb'), 0.9, 0.999)


DETECTORS = dict(
    hsvdet=lambda: HSVDET(HSVDETConfig(num_classes=3, k=3, one2one=True)),
    rtdetr=lambda: DETR(DETRConfig(num_classes=3, hidden=32, ffn=32, decoder_layers=2, queries=20, encoder_attn='S')),
    full=lambda: DETR(DETRConfig(num_classes=3, hidden=32, ffn=32, decoder_layers=2, queries=20)))      # takes all maps


def gradients(arch, dtypes, outside='bfloat16', said=None, frozen=False):
    """{name: gradient} of one batch, computed under autocast to `outside` but for the parts named in dtypes."""
    torch.manual_seed(0)
    model = DETECTORS[arch]().train()
    groups = model.param_groups(1.0, 0.0)
    model.backbone.requires_grad_(not frozen)
    set_precision(model, groups, dtypes, 'cpu')
    if said is not None:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda m, x, y, name=name: said.update({name: y.dtype}))
    targets = dict(labels=torch.tensor([[0, 2], [1, -1]]),
                   boxes=torch.tensor([[[4., 4, 40, 30], [20, 20, 60, 60]], [[8, 8, 30, 50], [0, 0, 0, 0]]]))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.autocast('cpu', getattr(torch, outside), enabled=outside != 'float32'):
        _, losses = model(images, targets)
    sum(sum(some.values()) for some, _ in losses.values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('arch', DETECTORS)
def test_a_part_in_its_own_precision(arch):
    """All parts in float32 under bf16: the gradients of float32, to the bit. One part in bf16: it and no other is."""
    exact = gradients(arch, {}, 'float32')
    full = gradients(arch, dict.fromkeys(PARTS, 'float32'))
    assert exact.keys() == full.keys()
    assert all(torch.equal(full[name], g) for name, g in exact.items())
    said = {}
    mixed = gradients(arch, dict.fromkeys(PARTS[:3], 'float32'), said=said)
    assert {said[name] for name in said if name.startswith('backbone')} == {torch.float32}
    if arch == 'hsvdet':
        heads = ('detect_head', 'one2one_head')
        assert {said[name] for name in said if name.startswith(heads)} == {torch.bfloat16}
        assert {dtype for name, dtype in said.items() if not name.startswith(heads)} == {torch.float32}
    flat, wanted = (torch.cat([some[name].flatten() for name in exact]) for some in (mixed, exact))
    assert not torch.equal(flat, wanted)
    assert torch.cosine_similarity(flat, wanted, dim=0) > 0.99


@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('arch', DETECTORS)
def test_backbone_in_bf16_beside_float32(arch, frozen):
    """As --dtype=float32 --dtype_backbone=bfloat16 asks for: it alone is, frozen or not."""
    said = {}
    dtypes = dict.fromkeys(PARTS, 'float32') | dict(backbone='bfloat16')
    mixed = gradients(arch, dtypes, 'float32', said, frozen)
    assert {dtype for name, dtype in said.items() if name.startswith('backbone')} == {torch.bfloat16}
    assert {dtype for name, dtype in said.items() if not name.startswith('backbone')} == {torch.float32}
    assert any(name.startswith('backbone') for name in mixed) != frozen
    assert all(g.isfinite().all() for g in mixed.values())

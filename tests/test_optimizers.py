"""Muon: what orthogonalize does to singular values, a step by hand, and who gets which optimizer."""
import pytest
import torch

from model import HSVDET, HSVDETConfig
from optimizers import Muon, make_optimizers, orthogonalize


@pytest.mark.parametrize('shape', [(8, 8), (16, 72), (72, 16), (1, 5)])
def test_orthogonalize_makes_singular_values_equal(shape):
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=g) * 1e-3
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    got = orthogonalize(matrix)
    assert torch.linalg.svdvals(got).min() > 0.5 and torch.linalg.svdvals(got).max() < 1.3       # the quintic's band
    cosine = (got * (u @ vh)).sum() / got.norm() / (u @ vh).norm()
    assert cosine > 0.95
    torch.testing.assert_close(orthogonalize(matrix * 1e3), got, rtol=1e-2, atol=1e-3)         # scale does not matter


def test_muon_step_by_hand():
    g = torch.Generator().manual_seed(1)
    p = torch.nn.Parameter(torch.randn(4, 3, 3, 3, generator=g))
    before, p.grad = p.detach().clone(), torch.randn(4, 3, 3, 3, generator=g)
    gradient = p.grad.clone()
    Muon([dict(params=[p], lr=0.1, weight_decay=0.5)], 0.1, momentum=0.9).step()
    update = orthogonalize(gradient.lerp(gradient * 0.1, 0.9).flatten(1)).view(p.shape)
    torch.testing.assert_close(p.detach(), before * 0.95 - 0.1 * 0.2 * 27 ** 0.5 * update)


def test_parts_get_their_optimizer():
    model = HSVDET(HSVDETConfig(num_classes=3))
    groups = model.param_groups(1.0, 0.05, dict(head=0.5))
    kinds = dict(backbone='muon', neck='adamw', block='muon', head='sgd')
    optimizers = make_optimizers(groups, kinds, 1e-3, 0.9, 0.999)
    by_kind = {type(o).__name__: [group['name'] for group in o.param_groups] for o in optimizers}
    assert by_kind['Muon'] == ['backbone.decay', 'block.decay']
    assert by_kind['SGD'] == ['head.decay', 'head.no_decay']
    assert set(by_kind['AdamW']) == {'backbone.no_decay', 'block.no_decay', 'neck.decay', 'neck.no_decay'}
    assert {group['factor'] for o in optimizers for group in o.param_groups if group['part'] == 'head'} == {0.5}
    count = sum(p.numel() for o in optimizers for group in o.param_groups for p in group['params'])
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)

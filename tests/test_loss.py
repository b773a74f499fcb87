"""Boxes, assignment and losses: reference arrays, and edge cases whose failure would go unnoticed."""
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loss import assign, bbox_iou, box_iou, ciou, decode_boxes, detection_loss, dfl, make_anchor_points, total_loss

REFERENCE = Path(__file__).parent / 'reference'


def normalized(sums, normalizer):
    return {name: value / normalizer.clamp(min=1) for name, value in sums.items()}


def load(name):
    return {key: torch.from_numpy(value) for key, value in np.load(REFERENCE / f'{name}.npz').items()}


def pad(images, classes, boxes, B):
    """One row per object -> the padded targets of a batch."""
    M = max(1, *torch.bincount(images, minlength=B).tolist())
    labels, padded = torch.full((B, M), -1), torch.zeros(B, M, 4)
    for b in range(B):
        n = int((images == b).sum())
        labels[b, :n], padded[b, :n] = classes[images == b], boxes[images == b]
    return dict(labels=labels, boxes=padded)


@pytest.mark.parametrize('kind', ['iou', 'giou', 'ciou'])
def test_iou_reference(kind):
    d = load('iou')
    torch.testing.assert_close(bbox_iou(d['boxes_a'], d['boxes_b'], kind), d[kind], rtol=1e-5, atol=1e-6)


def test_iou_by_hand():
    a = torch.tensor([[0.0, 0, 10, 10], [0, 0, 0, 0]])
    b = torch.tensor([[5.0, 0, 15, 10], [0, 0, 10, 10], [20, 20, 30, 30]])
    want = torch.tensor([[1 / 3, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(box_iou(a, b), want)
    torch.testing.assert_close(ciou(a[:1], b[1:2]), torch.ones(1), atol=1e-5, rtol=0)
    # squares of side 10 whose centres are 5 apart: hull 15x10, no aspect penalty
    torch.testing.assert_close(ciou(a[:1], b[:1]), torch.tensor([1 / 3 - 25 / 325]), atol=1e-5, rtol=0)


def test_assign_reference():
    d = load('assigner')
    labels = d['gt_labels'][..., 0].long()
    labels[d['gt_mask'][..., 0] == 0] = -1
    args = d['pred_scores'], d['pred_boxes'], d['anchor_points'], labels, d['gt_boxes']
    assigned_gt_idx, target_scores = assign(*args)
    assert torch.equal(assigned_gt_idx >= 0, d['foreground'])
    assert torch.equal(assigned_gt_idx[d['foreground']], d['assigned_gt'][d['foreground']])
    torch.testing.assert_close(target_scores, d['target_scores'], rtol=1e-5, atol=1e-6)
    for budget in (1, 2000):                                           # one object at a time, a few at a time
        again = assign(*args, budget=budget)
        assert torch.equal(again[0], assigned_gt_idx) and torch.equal(again[1], target_scores)


def test_head_and_loss_reference():
    d = load('head_and_loss')
    maps = [d[f'raw_p{i}'].requires_grad_() for i in (3, 4, 5)]
    targets = pad(d['gt_image'], d['gt_class'].long(), d['gt_xyxy'], 3)
    points, strides = make_anchor_points(maps)
    rows = torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2)
    boxes = decode_boxes(rows[..., :64], points, strides)
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    decoded = torch.cat((centre, size, rows[..., 64:].sigmoid()), -1).transpose(1, 2)
    # atol: a centre is a difference of numbers near 100
    torch.testing.assert_close(decoded, d['decoded'], rtol=1e-5, atol=1e-4)
    scores = rows[..., 64:].sigmoid().detach()
    assigned_gt_idx, _ = assign(scores, boxes.detach(), points, targets['labels'], targets['boxes'])
    assert torch.equal(assigned_gt_idx >= 0, d['foreground'])
    assert torch.equal(assigned_gt_idx[d['foreground']], d['assigned_gt'][d['foreground']])
    losses = normalized(*detection_loss(maps, targets))
    for name, value in losses.items():
        torch.testing.assert_close(value, d[f'{name}_loss'], rtol=1e-5, atol=0)
    sum(losses.values()).backward()
    for i, m in zip((3, 4, 5), maps, strict=True):
        torch.testing.assert_close(m.grad, d[f'grad_p{i}'], rtol=1e-4, atol=1e-5 * d[f'grad_p{i}'].abs().max().item())


def raw_maps(B=2, K=3, side=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, 64 + K, side // s, side // s, generator=g).requires_grad_() for s in (8, 16, 32)]


def losses_of(boxes, labels, maps=None):
    """The losses of one batch whose first image has these boxes, with finite gradients on every map."""
    maps = maps or raw_maps()
    B = maps[0].shape[0]
    labels, boxes = torch.tensor(labels).long(), torch.tensor(boxes).float().reshape(-1, 4)
    losses = normalized(*detection_loss(maps, pad(torch.zeros(len(labels), dtype=torch.long), labels, boxes, B)))
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(m.grad is not None and m.grad.isfinite().all() for m in maps)
    return losses, maps


def test_no_objects_at_all():
    losses, maps = losses_of([], [])
    assert losses['box'] == 0 and losses['dfl'] == 0 and losses['cls'] > 0
    for m in maps:
        assert (m.grad[:, :64] == 0).all() and (m.grad[:, 64:] != 0).all(), \
            'all background: only classes learn, everywhere'


@pytest.mark.parametrize('boxes', [
    [[0, 0, 64, 64]],                                                                 # covers everything
    [[10, 10, 40, 40], [10, 10, 40, 40]],                                             # twice the same
    [[17, 17, 19, 19]],                                                               # smaller than a cell, on no point
    [[2, 2, 6, 6]],                                                                   # smaller than a cell, on a point
    [[0, 20, 5, 44], [50, 0, 64, 9]],                                                 # cut by the border
], ids=['covering', 'identical', 'between points', 'tiny', 'cut'])
def test_unusual_boxes(boxes):
    losses, _ = losses_of(boxes, [1] * len(boxes))
    if boxes == [[17, 17, 19, 19]]:
        assert losses['box'] == 0, 'no point lies inside: nobody answers for it'


def test_identical_boxes_go_to_the_first():
    maps = raw_maps(1)
    points, strides = make_anchor_points(maps)
    boxes = torch.cat((points - 12, points + 12), 1)[None]
    gt = torch.tensor([[[10.0, 10, 40, 40]] * 2])
    assigned_gt_idx, _ = assign(torch.full((1, len(points), 3), 0.5), boxes, points, torch.tensor([[1, 1]]), gt)
    assert set(assigned_gt_idx.unique().tolist()) == {-1, 0}


def test_four_by_four_grid_by_hand():
    """Points 8 px apart, one object over the four middle ones; topk 2 takes the two whose boxes fit best."""
    y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing='ij')
    points = torch.stack((x, y), -1).reshape(-1, 2) * 8.0 + 4
    gt = torch.tensor([[[8.0, 8, 24, 24]]])
    boxes = torch.cat((points - 4, points + 4), 1)[None]
    boxes[0, 5], boxes[0, 10] = torch.tensor([8.0, 8, 24, 24]), torch.tensor([8.0, 8, 24, 20])
    assigned_gt_idx, target = assign(torch.full((1, 16, 1), 0.25), boxes, points, torch.tensor([[0]]), gt, topk=2)
    assert assigned_gt_idx[0].tolist() == [0 if i in (5, 10) else -1 for i in range(16)]
    assert target[0, 5, 0] == pytest.approx(1.0, abs=1e-4)                            # the best point gets its IoU
    second = ciou(boxes[0, 10], gt[0, 0]) ** 6
    assert target[0, 10, 0] == pytest.approx(second.item(), rel=1e-3)


def test_five_hundred_objects_in_one_image():
    g = torch.Generator().manual_seed(0)
    centre, size = torch.rand(500, 2, generator=g) * 256, torch.rand(500, 2, generator=g) * 40 + 4
    boxes = torch.cat((centre - size / 2, centre + size / 2), 1).clamp(0, 256)
    losses_of(boxes.tolist(), torch.randint(0, 3, (500,), generator=g).tolist(), raw_maps(2, side=256))


def test_crowded_batch_in_bounded_memory():
    """2,000 objects in each of 8 images of 1280 px, in a few hundred MB: a dense (B, M, A) matrix would take 2.1 GB."""
    from benches.costs import LiveMemory
    g = torch.Generator().manual_seed(0)
    B, M, K = 8, 2000, 2
    points, strides = make_anchor_points([torch.empty(1, 1, 1280 // s, 1280 // s) for s in (8, 16, 32)])
    boxes = torch.cat((points - strides * 2, points + strides * 2), 1) + torch.randn(len(points), 4, generator=g)
    boxes = boxes.expand(B, -1, 4).contiguous()
    centre, size = torch.rand(B, M, 2, generator=g) * 1280, torch.rand(B, M, 2, generator=g) * 40 + 8
    gt = torch.cat((centre - size / 2, centre + size / 2), 2)
    scores, labels = torch.rand(B, len(points), K, generator=g), torch.randint(0, K, (B, M), generator=g)
    with LiveMemory() as memory:
        assigned_gt_idx, target_scores = assign(scores, boxes, points, labels, gt)
    assert memory.peak < 400 * 2 ** 20, memory.peak
    assert len(assigned_gt_idx[0].unique()) > 1500
    alone = assign(scores[3:4], boxes[3:4], points, labels[3:4], gt[3:4])[0][0]
    assert torch.equal(assigned_gt_idx[3], alone), 'an image alone gets the same'


def naive_assign(scores, boxes, points, gt_labels, gt_boxes, topk=10):
    """The same assignment in dense (M, A) matrices, one image at a time, as the paper has it."""
    assigned_gt_idx = torch.full(scores.shape[:2], -1)
    for b in range(len(scores)):
        for_real = (gt_labels[b] >= 0).nonzero()[:, 0]
        if len(for_real) == 0:
            continue
        gt = gt_boxes[b, for_real]
        inside = torch.cat((points - gt[:, None, :2], gt[:, None, 2:] - points), -1).amin(-1) > 1e-9
        iou = ciou(gt[:, None].expand(-1, len(points), 4), boxes[b].expand(len(gt), -1, 4)).clamp(min=0) * inside
        bid = scores[b][:, gt_labels[b, for_real]].T ** 0.5 * iou ** 6
        claims = torch.zeros_like(inside).scatter_(1, bid.topk(min(topk, len(points)), 1).indices, True) & (bid > 0)
        several = claims.sum(0) > 1
        claims[:, several] = False
        claims[iou.argmax(0)[several], several] = True
        assigned_gt_idx[b] = torch.where(claims.any(0), for_real[claims.int().argmax(0)], -1)
    return assigned_gt_idx


def test_assign_equals_dense_on_crowds():
    g = torch.Generator().manual_seed(1)
    points, strides = make_anchor_points([torch.empty(1, 1, 160 // s, 160 // s) for s in (8, 16, 32)])
    A, M = len(points), 60
    scores = torch.rand(2, A, 4, generator=g)
    boxes = torch.cat((points - strides * 1.5, points + strides * 1.5), 1) + torch.randn(2, A, 4, generator=g) * 4
    centre, size = torch.rand(2, M, 2, generator=g) * 160, torch.rand(2, M, 2, generator=g) * 60 + 6
    gt = torch.cat((centre - size / 2, centre + size / 2), 2)
    labels = torch.randint(-1, 4, (2, M), generator=g)
    want = naive_assign(scores, boxes, points, labels, gt)
    assert (want >= 0).sum() > 50
    for budget in (A, 7 * A, 2 ** 22):
        assert torch.equal(assign(scores, boxes, points, labels, gt, budget=budget)[0], want)


class NonzeroCounter(TorchDispatchMode):
    """A GPU must be waited for where the number of results is not known before."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in ('aten::nonzero', 'aten::_local_scalar_dense', 'aten::masked_select')
        return func(*args, **(kwargs or {}))


def test_assign_waits_once_and_once_per_chunk():
    maps, gt = raw_maps(1), torch.tensor([[[10.0, 10, 40, 40], [0, 0, 64, 64], [5, 5, 30, 50]]])
    points, strides = make_anchor_points(maps)
    args = (torch.full((1, len(points), 3), 0.5), torch.cat((points - strides, points + strides), 1)[None], points,
            torch.tensor([[1, 0, 2]]), gt)
    for objects_per_chunk, waits in ((3, 2), (1, 4)):
        with NonzeroCounter() as counter:
            assign(*args, budget=objects_per_chunk * len(points))
        assert counter.count == waits


def test_dfl_by_hand():
    sides = torch.zeros(1, 4, 16)
    torch.testing.assert_close(dfl(sides, torch.full((1, 4), 3.25)), torch.tensor([np.log(16)]).float())
    sides[..., 3], sides[..., 4] = 20.0 + np.log(3), 20.0              # three quarters on bin 3, one on bin 4
    want = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert dfl(sides, torch.full((1, 4), 3.25)).item() == pytest.approx(want, abs=1e-4)
    assert dfl(sides, torch.full((1, 4), 99.0)).isfinite().all()                      # clamped to the last bin


def test_sums_divide_into_the_mean():
    d = load('head_and_loss')
    maps = [d[f'raw_p{i}'] for i in (3, 4, 5)]
    targets = pad(d['gt_image'], d['gt_class'].long(), d['gt_xyxy'], 3)
    sums, normalizer = detection_loss(maps, targets)
    total = total_loss(dict(one2many=(sums, normalizer)))
    torch.testing.assert_close(total, sum(sums.values()) / normalizer)
    parts = [detection_loss([m[b:b + 1] for m in maps], {key: t[b:b + 1] for key, t in targets.items()})
             for b in range(3)]
    for name, value in sums.items():
        torch.testing.assert_close(sum(part[name] for part, _ in parts) / sum(n for _, n in parts), value / normalizer)

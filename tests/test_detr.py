"""RT-DETR: every stage against reference arrays; matching, denoising, losses, odd batches, inference forms."""
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from baselines import detr
from baselines.detr import DETR, DETRConfig, DETRHead, class_loss, match, set_loss, to_pixels
from configurator import InputError
from loss import total_loss
from model import HSVDET, HSVDETConfig

REFERENCE = dict(np.load(Path(__file__).parent / 'reference/rtdetr.npz'))
TINY = dict(num_classes=5, hidden=32, detr_heads=4, ffn=64, decoder_layers=3, queries=20)
CHANNELS, SIZE = (24, 32, 48), (64, 96)                                               # of the reference
LAYERS = ('_aux_0', '_aux_1', '', '_aux_2')                  # the reference's suffixes: decoder layers, query selection


def make_head(seed=0, **settings):
    torch.manual_seed(seed)
    return DETRHead(CHANNELS, DETRConfig(**{**TINY, **settings}))


def make_features(B=2, H=64, W=96):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(B, c, H // s, W // s, generator=g) for c, s in zip(CHANNELS, (8, 16, 32), strict=True)]


def make_targets(counts, H=64, W=96, K=5, M=None):
    """Random objects, counts[i] in image i, padded to M."""
    g = torch.Generator().manual_seed(2)
    B, M = len(counts), M or max(1, *counts)
    corner, side = torch.rand(B, M, 2, generator=g) * 0.6, torch.rand(B, M, 2, generator=g) * 0.3 + 0.05
    boxes = torch.cat((corner, corner + side), 2) * torch.tensor([W, H, W, H])
    padding = torch.arange(M) >= torch.tensor(counts)[:, None]
    labels = torch.randint(K, (B, M), generator=g).masked_fill(padding, -1)
    return dict(labels=labels, boxes=boxes.masked_fill(padding[..., None], 0))


def randomize(model):
    """Weights, biases and BatchNorm statistics that leave nothing an identity or a tie by accident."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.7, 1.4)
            nn.init.normal_(m.bias, 0, 0.2)
        if isinstance(m, nn.Linear) and not m.weight.any():
            nn.init.normal_(m.weight, 0, 0.1)
        if isinstance(m, DETRHead):                  # scores far apart: rounding must not change the order of queries
            nn.init.normal_(m.enc_score_head.weight)
    return model


def make_model(**settings):
    """A DETR whose BatchNorms know the statistics of noise, so that the signal does not vanish."""
    torch.manual_seed(0)
    model = randomize(DETR(DETRConfig(**{**TINY, **settings}))).train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
            m.reset_running_stats()
    with torch.no_grad():
        model(torch.rand(4, 3, 128, 96))
    return model.eval()


def backward(model, *args):
    _, losses = model(*args)
    total_loss(losses).backward()
    return losses['detr']


def assert_all_have_gradients(model):
    for name, p in model.named_parameters():
        assert not p.requires_grad or p.grad is not None and p.grad.isfinite().all(), name


# --- against the reference -------------------------------------------------------------------------------------------

def ref(key):
    return torch.as_tensor(REFERENCE[key])


def close(got, want):
    """To 3e-5 of the largest number compared: float32 through some thirty layers, their sums in another order."""
    torch.testing.assert_close(got, want, rtol=0, atol=3e-5 * want.abs().max().item())


def transformers_key(name):
    """The key in transformers' RTDetr of one of DETRHead's tensors."""
    if name.split('.')[0] in ('query_pos_head', 'layers', 'class_embed', 'bbox_embed'):
        name = f'decoder.{name}'
    name = name.replace('encoder.input_proj', 'encoder_input_proj')
    conv, bn = ('.0.', '.1.') if '_input_proj' in name else ('.conv.', '.norm.')
    second = '.final_layer_norm.' if '.aifi.' in name else '.encoder_attn_layer_norm.'
    for ours, theirs in (('.aifi.', '.aifi.0.layers.0.'), ('.conv.', conv), ('.bn.', bn), ('.fc', '.mlp.fc'),
                         ('.norm1.', '.self_attn_layer_norm.'), ('.norm2.', second), ('.norm3.', '.final_layer_norm.')):
        name = name.replace(ours, theirs)
    return f'model.{name}'


@pytest.fixture
def reference():
    """The head with the reference's weights, its features, and the targets."""
    head = make_head(denoising=0, look_forward_twice=False).eval()
    head.load_state_dict({name: ref(f'weight:{transformers_key(name)}') for name in head.state_dict()
                          if not name.endswith('num_batches_tracked')}, strict=False)
    targets = make_targets([6, 1])
    for i in (0, 1):
        n = len(ref(f'gt_labels_{i}'))
        targets['labels'][i, :n] = ref(f'gt_labels_{i}')
        targets['boxes'][i, :n] = to_pixels(ref(f'gt_boxes_{i}'), *SIZE)
    return head, [ref(f'feature_p{i}').requires_grad_() for i in (3, 4, 5)], targets


def test_reference_stages(reference):
    head, features, _ = reference
    maps = head.encoder(features)
    for i, m in zip((3, 4, 5), maps, strict=True):
        close(m, ref(f'encoded_p{i}'))
    memory, shapes, x, start, logits, boxes = head.select_queries(maps, *SIZE)
    close(start, ref('init_reference'))
    close(logits, ref('enc_topk_logits'))
    close(boxes, ref('enc_topk_boxes'))
    for i, (logits, boxes) in enumerate(head.decode(x, start, memory, shapes)):
        close(logits, ref('layer_logits')[:, i])
        close(boxes, ref('layer_boxes')[:, i])
    boxes, scores = head(features)[0]
    close(boxes, to_pixels(ref('boxes'), *SIZE))
    close(scores, ref('logits').sigmoid())


def test_reference_matching_and_losses(reference):
    head, _, targets = reference
    layers = list(zip(ref('layer_logits').unbind(1), ref('layer_boxes').unbind(1), strict=True))
    layers.append((ref('enc_topk_logits'), ref('enc_topk_boxes')))
    pairs = match(layers, targets, SIZE)
    for i in (0, 1):
        image, query, gt = pairs[2]
        assert query[image == i].tolist() == ref(f'match_query_{i}').tolist()
        assert gt[image == i].tolist() == ref(f'match_gt_{i}').tolist()
    for layer, p, suffix in zip(layers, pairs, LAYERS, strict=True):
        losses = set_loss(*layer, p, targets, SIZE, 'vfl')
        for ours, theirs in (('cls', 'vfl'), ('l1', 'bbox'), ('giou', 'giou')):
            close(losses[ours] / 7, ref(f'loss:loss_{theirs}{suffix}'))               # 7 objects


def test_reference_total_and_gradients(reference):
    head, features, targets = reference
    sums, normalizer = backward(head, features, targets)
    assert normalizer == 7 and set(sums) == {f'{a}{b}' for a in ('', 'aux_') for b in ('cls', 'l1', 'giou')}
    close(sum(sums.values()) / 7, ref('loss'))
    for i, f in zip((3, 4, 5), features, strict=True):
        torch.testing.assert_close(f.grad, ref(f'grad_p{i}'), rtol=0, atol=1e-4 * ref(f'grad_p{i}').abs().max().item())


def test_look_forward_twice_changes_gradients_only(reference):
    head, features, targets = reference
    results = []
    for head.cfg.look_forward_twice in (False, True):
        head.zero_grad()
        sums, _ = backward(head, features, targets)
        results.append((sums, [p.grad.clone() for p in head.bbox_embed.parameters()]))
    for name in sums:
        close(results[1][0][name], results[0][0][name])
    first, last = (slice(0, 6), slice(12, 18))                                        # parameters of a box MLP: 6
    assert all(not torch.allclose(a, b) for a, b in zip(results[0][1][first], results[1][1][first], strict=True))
    for a, b in zip(results[0][1][last], results[1][1][last], strict=True):
        close(b, a)


def test_parameter_counts_of_the_published_model():
    """RT-DETR-R50 without its ResNet: 11.95 M in the encoder, 7.47 M in the decoder."""
    with torch.device('meta'):
        head = DETRHead((512, 1024, 2048), DETRConfig())
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in head.named_children()}
    encoder = count.pop('encoder')
    assert encoder / 1e6 == pytest.approx(11.95, abs=0.01)
    assert sum(count.values()) / 1e6 == pytest.approx(7.47, abs=0.01)


# --- matching and losses ---------------------------------------------------------------------------------------------

def test_class_losses_by_hand():
    logits = torch.tensor([0.0, 0.0, 2.0])                                            # p 0.5, 0.5, 0.8808
    iou, positive = torch.tensor([0.64, 0.0, 0.0]), torch.tensor([True, False, False])
    bce, p = [0.693147, 0.693147, 2.126928], 0.880797                                 # at p = 0.5 any target costs ln 2
    vfl = [0.64 * bce[0], 0.75 * 0.25 * bce[1], 0.75 * p ** 2 * bce[2]]
    mal = [bce[0], 0.5 ** 1.5 * bce[1], p ** 1.5 * bce[2]]
    torch.testing.assert_close(class_loss(logits, iou, positive, 'vfl'), torch.tensor(vfl), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(class_loss(logits, iou, positive, 'mal'), torch.tensor(mal), rtol=1e-5, atol=1e-6)
    # a target other than p shows which one it is: at logit 1, bce = ln(1 + e) - target
    one, zero_iou = torch.ones(1), torch.tensor([0.25])
    for kind, weight, target in (('vfl', 0.25, 0.25), ('mal', 1.0, 0.125)):
        got = class_loss(one, zero_iou, torch.tensor([True]), kind)
        assert got.item() == pytest.approx(weight * (1.313262 - target), abs=1e-5)


def test_queries_with_nan_or_infinite_costs_are_the_last_choice():
    targets = make_targets([3, 2])
    logits, boxes = torch.randn(2, 20, 5), torch.rand(2, 20, 4) * 0.5 + 0.1
    logits[:, ::2] = torch.nan                                                        # half of the queries
    boxes[1, 1] = torch.nan
    (image, query, gt), _ = match([(logits, boxes), (logits * torch.nan, boxes)], targets, SIZE)
    assert image.tolist() == [0, 0, 0, 1, 1] and sorted(gt[:3].tolist()) == [0, 1, 2]
    assert (query % 2 == 1).all(), 'queries with finite costs are preferred'
    boxes[:, 1::2] *= -torch.inf
    image, query, gt = match([(logits, boxes)], targets, SIZE)[0]
    assert image.tolist() == [0, 0, 0, 1, 1] and len(set(query[:3].tolist())) == 3


def test_each_image_is_matched_alone_and_padding_is_ignored():
    """Losses are sums over images, however they are batched and padded, wherever the padding stands."""
    head, features = make_head(denoising=0).eval(), make_features(3)
    targets, padded = make_targets([4, 0, 2]), make_targets([4, 0, 2])
    order = torch.tensor([5, 0, 6, 2, 1, 3, 4])                                       # objects and padding mixed
    padded['labels'] = nn.functional.pad(padded['labels'], (0, 3), value=-1)[:, order]
    padded['boxes'] = nn.functional.pad(padded['boxes'], (0, 0, 0, 3), value=7.0)[:, order]
    with torch.no_grad():
        want, n = head(features, targets)[1]['detr']
        got, m = head(features, padded)[1]['detr']
        alone = [head([f[i:i + 1] for f in features], {k: v[i:i + 1] for k, v in targets.items()})[1]['detr']
                 for i in range(3)]
    assert n == m == 6 == sum(one[1] for one in alone)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sum(one[0][name] for one in alone), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('counts', [[0, 0], [1, 0], [0, 500]], ids=str)
@pytest.mark.parametrize('denoising', [0, 10])
def test_odd_numbers_of_objects(counts, denoising):
    """Losses are finite and every parameter has a gradient, so that ranks with and without objects agree (DDP)."""
    head = make_head(denoising=denoising).train()
    sums, normalizer = backward(head, make_features(), make_targets(counts))
    assert normalizer.dtype == torch.float32 and normalizer == sum(counts)
    assert set(sums) == {f'{a}{b}' for a in ('', 'aux_', 'dn_')[:2 + (denoising > 0)] for b in ('cls', 'l1', 'giou')}
    assert_all_have_gradients(head)
    if not sum(counts):
        assert all(sums[name] == 0 for name in sums if 'cls' not in name and not sums[name].isnan())
        assert sums['cls'] > 0 and sums.get('dn_cls', 0) == 0


def test_fewer_tokens_than_queries():
    head = make_head(queries=300).train()
    features, targets = make_features(2, 32, 64), make_targets([3, 1], 32, 64)        # 32 + 8 + 2 tokens
    backward(head, features, targets)
    assert_all_have_gradients(head)
    boxes, scores = head.eval()(features)[0]
    assert boxes.shape == (2, 42, 4) and scores.shape == (2, 42, 5) and boxes.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('encoder_attn', ['F', 'S'])
def test_autocast(dtype, encoder_attn):
    head, features, targets = make_head(encoder_attn=encoder_attn).train(), make_features(), make_targets([3, 1])
    with torch.autocast('cpu', dtype):
        raw, losses = head(features, targets)
    assert all(t.dtype == torch.float32 for t in (*raw, *losses['detr'][0].values()))
    total = total_loss(losses)
    assert total.isfinite()
    total.backward()
    assert_all_have_gradients(head)


# --- denoising -------------------------------------------------------------------------------------------------------

def test_denoising_queries():
    targets, cfg = make_targets([3, 1], K=50), DETRConfig(**{**TINY, 'num_classes': 50, 'denoising': 1500})
    torch.manual_seed(0)
    labels, boxes, mask = detr.denoising_queries(targets, SIZE, cfg, 7)
    M, D, groups = 3, labels.shape[1], 500
    assert D == 2 * M * groups and boxes.shape == (2, D, 4) and mask.shape == (D + 7, D + 7)
    padding = (targets['labels'] < 0).repeat(1, 2 * groups)
    assert (labels[padding] == 50).all() and (boxes[padding] == 0).all()
    true = targets['labels'].repeat(1, 2 * groups)
    changed = (labels != true)[~padding].float().mean()                # 1/4 redrawn, of which 1/50 hit the same label
    assert changed.item() == pytest.approx(0.245, abs=0.03) and labels[~padding].max() < 50            # 4 sigma of 4000
    # corners: positives moved by less than half a side, negatives by more; clipping at the border hides some
    corners, gt = to_pixels(boxes, *SIZE), targets['boxes'].repeat(1, 2 * groups, 1)
    half = (gt[..., 2:] - gt[..., :2]).repeat(1, 1, 2) / 2
    inside = ((corners > 0.01) & (corners < torch.tensor([95.9, 63.9, 95.9, 63.9]))).all(-1) & ~padding
    inside &= (boxes[..., 2:] > 0).all(-1)
    shift = ((corners - gt) / half).abs()
    negative = (torch.arange(D) // M % 2).bool().expand(2, -1)
    assert shift[inside & ~negative].max() < 1.001 and shift[inside & negative].min() > 0.999
    assert shift[inside & negative].max() < 2.001 and (inside & negative).sum() > 500
    torch.manual_seed(0)
    assert torch.equal(detr.denoising_queries(targets, SIZE, cfg, 7)[1], boxes), 'drawn from the global generator'
    crowd = detr.denoising_queries(make_targets([30, 2]), SIZE, DETRConfig(denoising=10), 7)
    assert crowd[0].shape == (2, 60), 'one group at least'


@torch.no_grad()
def test_denoising_masks():
    """What each query may learn of the others, seen in the outputs."""
    head = randomize(make_head()).eval()
    memory, shapes, x, reference, *_ = head.select_queries(head.encoder(make_features()), *SIZE)
    D, Q = 12, 20                                                                     # 3 groups of 2 + 2
    g = torch.Generator().manual_seed(3)
    x = torch.cat((torch.randn(2, D, 32, generator=g), x), 1)
    reference = torch.cat((torch.randn(2, D, 4, generator=g), reference), 1)
    mask = detr.denoising_queries(make_targets([2, 1]), SIZE, DETRConfig(denoising=6), Q)[2]

    def changed(start, stop):
        """(D + Q,) bool: which outputs change with the content of queries start..stop?"""
        other = x.clone()
        other[:, start:stop] += torch.randn(2, stop - start, 32, generator=g)
        pairs = zip(head.decode(x, reference, memory, shapes, mask),
                    head.decode(other, reference, memory, shapes, mask), strict=True)
        (a, _), (b, _) = list(pairs)[-1]
        return (a - b).abs().amax((0, 2)) > 1e-5

    assert changed(0, 4).tolist() == [True] * 4 + [False] * 28
    assert changed(4, 8).tolist() == [False] * 4 + [True] * 4 + [False] * 24
    assert changed(D, D + Q).all(), 'denoising queries see the matching ones'
    without = head.decode(x[:, D:], reference[:, D:], memory, shapes)
    with_denoising = head.decode(x, reference, memory, shapes, mask)
    for (a, b), (c, d) in zip(without, with_denoising, strict=True):
        torch.testing.assert_close(c[:, D:], a, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(d[:, D:], b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_denoising_loss_is_per_group():
    """Without noise positives start at their objects, and all groups are alike: their number changes no loss."""
    features, targets, losses = make_features(), make_targets([3, 1]), []
    for denoising in (3, 9):
        head = make_head(denoising=denoising, label_noise=0.0, box_noise=0.0)
        sums = head(features, targets)[1]['detr'][0]
        assert sums['dn_l1'] < 1e-4 and sums['dn_giou'] < 1e-3, 'before training boxes stay at their references'
        losses.append(randomize(head)(features, targets)[1]['detr'][0])
    for name in ('dn_cls', 'dn_l1', 'dn_giou'):
        assert losses[0][name] > 0.1
        torch.testing.assert_close(losses[1][name], losses[0][name], rtol=1e-4, atol=1e-4)


# --- inference -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_early_exit_is_the_truncated_decoder():
    head, features = randomize(make_head()).eval(), make_features()
    full = head(features)[0]
    short = make_head(decoder_layers=2).eval()
    short.load_state_dict({k: v for k, v in head.state_dict().items() if k in short.state_dict()})
    head.cfg.eval_layers = 2
    for a, b, c in zip(head(features)[0], short(features)[0], full, strict=True):
        assert torch.equal(a, b) and not torch.allclose(a, c)
    head.cfg.eval_layers = 3
    assert torch.equal(head(features)[0][0], full[0])


def test_postprocess_by_hand():
    model = DETR(DETRConfig(**{**TINY, 'num_classes': 2, 'queries': 3}))
    boxes = torch.arange(12.0).view(1, 3, 4)
    scores = torch.tensor([[[0.9, 0.8], [0.1, 0.2], [0.3, 0.5]]])
    one, = model.postprocess((boxes, scores))
    torch.testing.assert_close(one[:, 4:], torch.tensor([[0.9, 0], [0.5, 1]]))
    assert torch.equal(one[:, :4], boxes[0, [0, 2]])
    several, = model.postprocess((boxes, scores), conf=0.15, multi_label=True, max_det=4)
    torch.testing.assert_close(several[:, 4], torch.tensor([0.9, 0.8, 0.5, 0.3]))
    assert several[:, 5].tolist() == [0, 1, 1, 0]
    assert model.postprocess((boxes, scores * 0))[0].shape == (0, 6)


@pytest.mark.parametrize('encoder_attn', ['F', 'S'])
@torch.no_grad()
def test_fused_equals_unfused(encoder_attn):
    model = make_model(encoder_attn=encoder_attn, k=4)
    assert list(model.blocks()) == (['p5'] if encoder_attn == 'S' else [])
    x = torch.rand(2, 3, 128, 96)
    want = model(x)[0]
    got = model.fuse().fuse()(x)[0]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not any(m.conv2 is not None for m in model.modules() if isinstance(m, detr.RepVGG))
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=2e-3)                 # pixels
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


def test_sparse_encoder_with_all_tokens_is_not_a_control_by_accident():
    """k < N must change the result, k >= N must not."""
    results = []
    for k in (2, 6, 0):
        head = randomize(make_head(encoder_attn='S', k=k)).eval()
        with torch.no_grad():
            results.append(head.encoder(make_features())[2])
    assert not torch.allclose(results[0], results[1], atol=1e-3)
    torch.testing.assert_close(results[1], results[2], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings('ignore:.*LeafSpec.*:FutureWarning')                      # torch.export's own
@torch.no_grad()
def test_onnx_equals_eager(tmp_path):
    """Of the head; the backbone is test_export.py's."""
    pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    head, features = Raw(randomize(make_head(decoder_layers=2))).eval(), make_features()
    torch.onnx.export(head, tuple(features), tmp_path / 'detr.onnx', dynamo=True, opset_version=18, verbose=False,
                      input_names=['p3', 'p4', 'p5'], output_names=['boxes', 'scores'])
    session = onnxruntime.InferenceSession(tmp_path / 'detr.onnx', providers=['CPUExecutionProvider'])
    boxes, scores = session.run(None, {f'p{i}': f.numpy() for i, f in zip((3, 4, 5), features, strict=True)})
    want = head(*features)
    torch.testing.assert_close(torch.as_tensor(boxes), want[0], rtol=1e-4, atol=1e-2)                 # pixels
    torch.testing.assert_close(torch.as_tensor(scores), want[1], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_export_with_free_sizes():
    """Traced at one batch and image size, run at another, which has fewer tokens than there are queries."""
    head = Raw(randomize(make_head(decoder_layers=1, queries=50))).eval()
    batch, h, w = torch.export.Dim('batch'), torch.export.Dim('h'), torch.export.Dim('w')
    free = tuple({0: batch, 2: n * h, 3: n * w} for n in (4, 2, 1))
    program = torch.export.export(head, tuple(make_features()), dynamic_shapes=free, strict=False).module()
    features = make_features(1, 64, 32)
    boxes, scores = program(*features)
    assert boxes.shape == (1, 42, 4)
    torch.testing.assert_close(boxes, head(*features)[0], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(scores, head(*features)[1], rtol=1e-3, atol=1e-4)


class Raw(nn.Module):
    """A head without the empty losses."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, p3, p4, p5):
        return self.head((p3, p4, p5))[0]


# --- the model in training -------------------------------------------------------------------------------------------

def test_parts_of_the_optimizer():
    model = DETR(DETRConfig(**TINY, encoder_attn='S'))
    groups = model.param_groups(0.1, 0.01, dict(backbone=0.5))
    assert sorted({group['part'] for group in groups}) == ['backbone', 'block', 'head', 'neck']
    params = [p for group in groups for p in group['params']]
    assert len(params) == len(set(params)) == sum(p.requires_grad for p in model.parameters())
    for group in groups:
        assert group['lr'] == (0.05 if group['part'] == 'backbone' else 0.1)
        assert group['weight_decay'] == (0.0 if 'no_decay' in group['name'] else 0.01)
        assert all((p.ndim > 1) == (group['weight_decay'] > 0) for p in group['params'])
    assert len(model.loss_parameters()['detr']) == len(list(model.parameters()))


def test_checkpointing_changes_nothing():
    images, targets, results = torch.rand(2, 3, 64, 96), make_targets([3, 1]), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = DETR(DETRConfig(**TINY)).train()
        model.checkpointing = checkpointing
        backward(model, images, targets)
        results.append([p.grad for p in model.parameters()] + list(model.buffers()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    model = randomize(DETR(DETRConfig(**TINY)))
    model.names, model.imgsz = list('abcde'), (64, 96)
    model.save(tmp_path / 'detr.pt')
    same = DETR.from_pretrained(str(tmp_path / 'detr.pt'), verbose=False)
    assert same.cfg == model.cfg and same.names == model.names and same.imgsz == (64, 96)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))
    other = DETR.from_pretrained(str(tmp_path / 'detr.pt'), verbose=False, num_classes=2, decoder_layers=4, denoising=0,
                                 encoder_attn='S')
    assert torch.equal(other.head.layers[2].fc1.weight, model.head.layers[2].fc1.weight) and len(other.names) == 2
    with pytest.raises(InputError, match='does not fit this network'):
        DETR.from_pretrained(str(tmp_path / 'detr.pt'), verbose=False, hidden=64)
    with pytest.raises(InputError, match='DETRConfig has no attn'):
        DETR.from_pretrained(str(tmp_path / 'detr.pt'), verbose=False, attn='-SS')
    HSVDET(HSVDETConfig(num_classes=3)).save(tmp_path / 'hsvdet.pt')
    known = torch.load(tmp_path / 'hsvdet.pt')['model']
    warm = DETR.from_pretrained(str(tmp_path / 'hsvdet.pt'), verbose=False, hidden=32)
    assert all(torch.equal(t, known[f'backbone.{name}']) for name, t in warm.backbone.state_dict().items())


@pytest.mark.parametrize('settings, message', [
    (dict(hidden=30), 'hidden must be a multiple of 4'), (dict(queries=0), 'queries must be an int of at least 1'),
    (dict(class_loss='focal'), 'class_loss must be vfl or mal'), (dict(eval_layers=7), 'at most decoder_layers=6'),
    (dict(encoder_attn='W'), 'encoder_attn must be F or S'), (dict(denoising=True), 'denoising must be an int'),
    (dict(scale='z'), 'scale must be one of'), (dict(k=-1), 'k must be a count')], ids=str)
def test_config_names_the_mistake(settings, message):
    with pytest.raises(InputError, match=message):
        DETRConfig(**settings)


@pytest.mark.parametrize('kind', ['vfl', 'mal'])
def test_overfits_two_images(kind):
    """The matched boxes do; denoising, drawn anew each step, would take longer."""
    torch.manual_seed(0)
    model = DETR(DETRConfig(**{**TINY, 'decoder_layers': 2, 'denoising': 6}, class_loss=kind)).train()
    images, targets = torch.rand(2, 3, 64, 64), make_targets([2, 1], 64, 64)
    optimizer = torch.optim.AdamW(model.param_groups(4e-3, 1e-4))
    steps = []
    for _ in range(40):
        optimizer.zero_grad()
        losses = model(images, targets)[1]
        total_loss(losses).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps.append({name: value.item() for name, value in losses['detr'][0].items()})
    first, last = steps[0], steps[-1]
    assert last['l1'] < first['l1'] / 2 and last['giou'] < first['giou'] * 0.6, (first, last)


def test_a_batch_without_room_for_objects():
    model = DETR(DETRConfig(**TINY)).train()
    raw, losses = model(torch.rand(2, 3, 64, 64), dict(labels=torch.zeros(2, 0).long(), boxes=torch.zeros(2, 0, 4)))
    total_loss(losses).backward()
    assert len(raw[0]) == 2 and losses['detr'][0]['l1'] == 0 and losses['detr'][0]['cls'] > 0


def test_dinov2_as_backbone(tmp_path):
    """Frozen but for its adapters: they and the head learn; saved, loaded and fused it answers the same."""
    torch.manual_seed(0)
    cfg = DETRConfig(num_classes=2, backbone='dinov2_s', hidden=32, ffn=32, decoder_layers=1, queries=8, detr_heads=4)
    model = DETR(cfg).train()
    images = torch.rand(1, 3, 64, 64)
    targets = dict(labels=torch.tensor([[1]]), boxes=torch.tensor([[[8.0, 8, 40, 50]]]))
    total_loss(model(images, targets)[1]).backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad and name.startswith('backbone.blocks')]
    assert trained and all('lora' in name for name in trained)
    assert all(p.grad is not None for name, p in model.named_parameters() if name in trained)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'lora' in name:
                p.normal_(0, 0.02)
    model.eval()
    want = model(images)[0]
    torch.save(model.checkpoint(), tmp_path / 'a.pt')
    again = DETR.from_pretrained(tmp_path / 'a.pt', verbose=False).eval()
    for got, expected in zip(again(images)[0], want, strict=True):
        torch.testing.assert_close(got, expected)
    for got, expected in zip(again.fuse()(images)[0], want, strict=True):
        assert (got - expected).abs().max() < 1e-3 * expected.abs().max()
    with pytest.raises(InputError, match='backbone must be'):
        DETRConfig(backbone='dinov3')

"""Exported networks, loaded again, compared with eager ones: scale n, tiny noise images, gates open so blocks act."""
import json
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import export
from baselines.detr import DETR, DETRConfig
from configurator import InputError
from eval import OnnxModel, input_shape, predict
from export import (
    difference,
    error_limits,
    export_onnx,
    export_torch,
    largest_error,
    pictures,
    quantise,
    reload,
    rounding,
)
from loss import decode_boxes, make_anchor_points
from model import HSVDET, HSVDETConfig, nms, select_detections
from sparse_attention import stable_topk

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript')
onnxruntime = pytest.importorskip('onnxruntime')

SHAPE = (64, 96)                     # P4 has 24 tokens, of which k = 10 attend; P5 has 6, and all do
# torch 2.13's own, where tests here call torch.onnx.export themselves
pytestmark = pytest.mark.filterwarnings('ignore:.*LeafSpec.*:FutureWarning')


def noise(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def set_statistics(model):
    """The BatchNorms take their statistics from noise, so that the signal of random weights does not vanish."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()(noise(4, 3, *SHAPE))
    return model.eval()


@torch.no_grad()
def make(gate=0.7, **settings):
    """A fused model with scores all over 0..1."""
    torch.manual_seed(0)
    model = HSVDET(HSVDETConfig(**{'num_classes': 3, 'k': 10, **settings}))
    model.names = ['one', 'zwei', 'três']
    for block in model.blocks().values():
        block.gate.fill_(gate)
    set_statistics(model)
    for head in filter(None, (model.detect_head, model.one2one_head)):
        for branch in [*head.box, *head.cls]:
            nn.init.normal_(branch[-1].weight, std=0.02)
            nn.init.normal_(branch[-1].bias, -1)
    return model.fuse()


@dataclass
class TinyConfig:
    k: int = 0


class Tiny(nn.Module):
    """The smallest detector: one convolution, 96 points, crowded boxes, three classes. Fast to export."""
    arch, backbone = 'tiny', None

    def __init__(self, nms=True):
        super().__init__()
        torch.manual_seed(0)
        self.cfg, self.names, self.nms, self.frames = TinyConfig(), ['a', 'b', 'c'], nms, 0
        self.conv = nn.Conv2d(3, 64 + 3, 8, 8)
        nn.init.normal_(self.conv.weight, std=0.3)

    def forward(self, images):
        return self.conv(images), {}

    def decode(self, raw):
        rows = raw.flatten(2).transpose(1, 2)
        return decode_boxes(rows[..., :64], *make_anchor_points([raw], (8,))), rows[..., 64:].sigmoid()

    def postprocess(self, raw, *settings):
        return [select_detections(b, s, *settings, self.nms) for b, s in zip(*self.decode(raw), strict=True)]


@torch.no_grad()
def assert_agrees(model, network, path, *shapes):
    """The limits come from the rounding error of this model on this image and processor."""
    run = reload(path)
    for shape in shapes:
        x = noise(*shape)
        (box, score), (px, share) = difference(model, network, run, x), error_limits(rounding(model, x), shape[2:])
        assert px < 2 and share < 0.01, f'{shape}: rounding alone moves boxes by {px / 10} px, scores by {share / 10}'
        assert box <= px and score <= share, f'{shape}: {box} px of {px}, score {score} of {share}'


def read_metadata(path):
    return {p.key: p.value for p in onnx.load(path).metadata_props}


@pytest.fixture(scope='session')
def plain(tmp_path_factory):
    """model, network, path of an ordinary export, for all tests that leave the file alone."""
    model, path = make(), str(tmp_path_factory.mktemp('export') / 'plain.onnx')
    return model, export_onnx(model, path, SHAPE), path


def test_onnx_equals_eager(plain):
    """k < N at P4 and k > N at P5; and a block left out would be noticed."""
    assert_agrees(*plain, (1, 3, *SHAPE))
    x = noise(1, 3, *SHAPE)
    with torch.no_grad():
        box, score = difference(make(gate=0.0), plain[1], reload(plain[2]), x)
        px, share = error_limits(rounding(plain[0], x), SHAPE)
    assert box > 10 * px and score > 10 * share


def test_largest_error():
    """By hand: the nearest box of another order, all classes compared, boxes below min_score passed over."""
    boxes = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 10], [50, 0, 90, 10]])
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.1]])
    order = [2, 1, 0]
    assert largest_error([(boxes, scores)], [(boxes[order], scores[order])]) == [0, 0]
    moved = boxes + torch.tensor([0.0, 0.5, 2.0])[:, None]
    assert largest_error([(boxes, scores)], [(moved[order], scores[order])]) == [2, 0]
    assert largest_error([(boxes, scores)], [(moved[order], scores[order])], min_score=0.5) == [0.5, 0]
    assert largest_error([(boxes, scores)], [(boxes, scores.flip(1))])[1] > 0.1, 'the classes are exchanged'
    assert largest_error([(boxes, scores)], [(boxes[1:], scores[1:])]) == [np.inf, np.inf]
    assert largest_error([(boxes[:0], scores[:0])], [(boxes[:0], scores[:0])]) == [0, 0]


def test_ties_at_the_last_place(tmp_path):
    """Of equal importances the lower indices win, in ONNX as in eager."""
    class Select(nn.Module):
        def forward(self, importance):
            return stable_topk(importance, 5)

    importance, path = torch.tensor([[1.0, 0, 1, 2, 1, 1, 1, 0, 1, 3]]), str(tmp_path / 'topk.onnx')
    torch.onnx.export(Select().eval(), (importance,), path, verbose=False, external_data=False, input_names=['x'])
    (indices,) = onnxruntime.InferenceSession(path).run(None, dict(x=importance.numpy()))
    assert sorted(indices[0].tolist()) == sorted(stable_topk(importance, 5)[0].tolist()) == [0, 2, 3, 4, 9]


def test_metadata_and_names(plain):
    loaded, metadata = OnnxModel(plain[2]), read_metadata(plain[2])
    assert loaded.names == ['one', 'zwei', 'três'] and input_shape(loaded, 0) == SHAPE and loaded.nms
    assert json.loads(metadata['imgsz']) == [64, 96] and json.loads(metadata['config'])['attn'] == '-SS'
    expected = dict(stride='32', num_classes='3', precision='fp32', arch='hsvdet', nms='True')
    assert {key: metadata[key] for key in expected} == expected and 'conf' not in metadata
    assert '114' in metadata['preprocessing'] and 'RGB' in metadata['preprocessing']
    assert 'x1, y1, x2, y2' in metadata['boxes']
    nodes = onnx.load(plain[2]).graph.node
    assert {'backbone', 'block4', 'block5', 'detect_head', 'after'} <= {node.name.split('/')[0] for node in nodes}
    with pytest.raises(InputError, match='exported at'):
        input_shape(loaded, 640)


@pytest.mark.filterwarnings('error::FutureWarning')                  # who exports sees none
@pytest.mark.parametrize('best_f1', [None, dict(score=0.4, P=0.9, R=0.8, F1=0.847, by_class=dict(
    one=dict(score=0.4, P=0.9, R=0.8, F1=0.847)))])
def test_best_f1_goes_along(best_f1, tmp_path, monkeypatch):
    """From a checkpoint, by export.py as a user runs it, into the file, and out of it again."""
    model = HSVDET(HSVDETConfig(num_classes=3, attn='---'))
    torch.save(model.checkpoint(**dict(best_f1=best_f1) if best_f1 else {}), tmp_path / 'w.pt')
    for name, value in dict(weights=str(tmp_path / 'w.pt'), imgsz=64).items():
        monkeypatch.setattr(export, name, value)
    export.main()
    assert json.loads(read_metadata(tmp_path / 'w.onnx')['best_f1']) == best_f1
    assert OnnxModel(str(tmp_path / 'w.onnx')).best_f1 == best_f1


def test_dynamic(tmp_path):
    """One file, any batch and size; k is min(k, N) in each."""
    model, path = make(attn='--S'), str(tmp_path / 'dynamic.onnx')   # 6, 4 and 12 tokens
    network = export_onnx(model, path, SHAPE, dynamic=True)
    assert_agrees(model, network, path, (2, 3, 64, 96), (1, 3, 64, 64), (3, 3, 128, 96))
    loaded = OnnxModel(path)
    assert loaded.fixed_imgsz is None and input_shape(loaded, 0) == SHAPE and input_shape(loaded, 320) == (320, 320)


def test_suppression_in_onnx(tmp_path):
    """Crowded boxes of several classes, three images, the operator alone: what model.nms keeps, in its place."""
    class Alone(nn.Module):
        def forward(self, boxes, scores):
            return export.suppress(boxes, scores, 0.3, 0.5, 12)

    corner, scores = noise(3, 60, 2) * 20, noise(3, 60, 4)
    boxes, path = torch.cat((corner, corner + 10 + 5 * noise(3, 60, 2)), 2), str(tmp_path / 'nms.onnx')
    table = {torch.ops.hsvdet.suppress.default: export.onnx_suppress}
    torch.onnx.export(Alone().eval(), (boxes, scores), path, verbose=False, external_data=False,
                      custom_translation_table=table)
    inputs = dict(boxes=boxes.numpy(), scores=scores.numpy())
    kept = torch.from_numpy(onnxruntime.InferenceSession(path).run(None, inputs)[0])
    for i in range(3):
        for label in range(4):
            s = scores[i, :, label].where(scores[i, :, label] > 0.3, 0)
            keep = [j for j in nms(boxes[i], s, torch.zeros(60), 0.5, 12).tolist() if s[j] > 0]
            assert kept[i, :, label].nonzero()[:, 0].tolist() == sorted(keep) and 1 < len(keep) < 13
            assert torch.equal(kept[i, keep, label], s[keep])


@pytest.mark.parametrize('multi_label', [False, True])
@pytest.mark.parametrize('suppressed', [False, True])
@torch.no_grad()
def test_detections_in_the_graph(multi_label, suppressed, tmp_path):
    """max_det and padding both at work; without NMS where the model needs none."""
    model, path, x = Tiny(nms=suppressed).eval(), str(tmp_path / 'nms.onnx'), noise(1, 3, *SHAPE)
    settings = dict(conf=0.5, iou=0.7, max_det=40, multi_label=multi_label)
    network = export_onnx(model, path, SHAPE, nms=True, **settings)
    assert_agrees(model, network, path, x.shape)
    want, (rows,) = model.postprocess(model(x)[0], 0.5, 0.7, 40, multi_label)[0], reload(path)(x)
    assert rows.shape == (1, 40, 6) and (rows[..., 4] > 0).sum() == len(want) > 10
    assert (rows[..., 4].diff(dim=1) <= 0).all() and (rows[rows[..., 4] == 0] == 0).all()
    assert ('NonMaxSuppression' in {node.op_type for node in onnx.load(path).graph.node}) == suppressed
    expected = dict(conf='0.5', iou='0.7', max_det='40', nms=str(suppressed))
    assert {key: value for key, value in read_metadata(path).items() if key in expected} == expected


def test_one2one_needs_no_nms(tmp_path):
    """The graph holds the one-to-one head alone; whatever loads the file knows that nothing is to be suppressed."""
    model, path = make(attn='---', one2one=True), str(tmp_path / 'one2one.onnx')
    model.nms = False
    assert_agrees(model, export_onnx(model, path, SHAPE), path, (1, 3, *SHAPE))
    assert not any(node.name.startswith('detect_head') for node in onnx.load(path).graph.node)
    loaded = OnnxModel(path)
    assert not loaded.nms
    image = torch.randint(0, 256, (*SHAPE, 3), dtype=torch.uint8)
    x = image.permute(2, 0, 1)[None].float() / 255
    got = torch.from_numpy(predict(loaded, [image.numpy()], (0.7,), 0.01, 50)[0][0][0])
    (want,) = model.detect(x, conf=0.01, max_det=50)
    assert len(got) == len(want) == 50
    with torch.no_grad():
        px, share = error_limits(rounding(model, x), SHAPE)
    box, score = largest_error([(want[:, :4], want[:, 4:5])], [(got[:, :4], got[:, 4:5])])
    assert box <= px and score <= share


def test_fp16_keeps_attention_in_float32(tmp_path):
    """Backbone in float16; importance, LayerNorm, softmax and both attention products in float32; nothing overflows."""
    model, path, x = make(), str(tmp_path / 'half.onnx'), noise(1, 3, *SHAPE)
    model.backbone.sppf.conv_out.conv.weight *= 40                   # then |x|^2 leaves float16 at block5
    model.backbone.sppf.conv_out.conv.bias *= 40
    seen = []
    hook = model.block5.register_forward_pre_hook(lambda _, x: seen.append(x[0].square().sum(1).max().item()))
    with torch.no_grad():
        boxes, scores = model.decode(model(x)[0])
    hook.remove()
    assert seen[0] > 2 * 65504
    export_onnx(model, path, SHAPE, precision='fp16')
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True).graph
    kind = {v.name: v.type.tensor_type.elem_type for v in [*graph.value_info, *graph.input, *graph.output]}
    kind |= {t.name: t.data_type for t in graph.initializer}
    count = dict.fromkeys(('ReduceL2', 'TopK', 'LayerNormalization', 'MatMul', 'Softmax'), 0)
    for node in graph.node:
        if node.op_type in count:
            count[node.op_type] += 1
            assert kind[node.input[0]] == onnx.TensorProto.FLOAT, f'{node.name} computes in half precision'
            assert onnx.TensorProto.FLOAT16 not in {kind[name] for name in [*node.input, *node.output] if name}
    assert count == dict(ReduceL2=1, TopK=1, LayerNormalization=4, MatMul=8, Softmax=3)
    assert {kind[node.input[0]] for node in graph.node if node.op_type == 'Conv'} == {onnx.TensorProto.FLOAT16}
    assert all(kind[v.name] == onnx.TensorProto.FLOAT for v in [*graph.input, *graph.output])
    got = reload(path)(x)
    assert got[0].isfinite().all() and (got[1] - scores).abs().mean() < 0.01
    assert (got[0] - boxes).abs().mean() < 0.01 * max(SHAPE)
    assert model.backbone.stem.conv.weight.dtype == torch.float32, 'the model itself is left as it was'


@pytest.mark.parametrize('symmetric', [False, True])
def test_int8(symmetric, plain, tmp_path):
    model, _, source = plain
    path = shutil.copy(source, str(tmp_path / 'int8.onnx'))
    quantise(path, [noise(1, 3, *SHAPE).numpy()], symmetric)
    graph = onnx.load(path).graph
    computed = {name for node in graph.node for name in node.output}
    every = {node.name for node in graph.node if node.op_type == 'Conv'}
    integer = {node.name for node in graph.node if node.op_type == 'Conv' and node.input[1] in computed}
    assert len(every - integer) == 8
    assert all(name.startswith('block') or 'head' in name and '/2/' in name for name in every - integer)
    zero = [onnx.numpy_helper.to_array(t) for t in graph.initializer if 'zero_point' in t.name]
    assert symmetric == all(np.all(z == 0) for z in zero)
    got = reload(path)(noise(1, 3, *SHAPE))
    with torch.no_grad():
        scores = model.decode(model(noise(1, 3, *SHAPE))[0])[1]
    assert (got[1] - scores).abs().mean() < 0.05 and OnnxModel(path).names == model.names


def test_torch_export(plain, tmp_path):
    model, path = plain[0], str(tmp_path / 'program.pt2')
    assert_agrees(model, export_torch(model, path, SHAPE), path, (1, 3, *SHAPE))
    with pytest.raises(InputError, match='attn=-W-: torch_export ties W and N'):       # it would fail for other sizes
        export_torch(HSVDET(HSVDETConfig(attn='-W-')), path, SHAPE, dynamic=True)
    extra = {'metadata.json': ''}
    torch.export.load(path, extra_files=extra)
    assert json.loads(json.loads(extra['metadata.json'])['names']) == model.names


def test_detr(tmp_path):
    """The other architecture, by the same calls: queries instead of points, nothing to suppress."""
    torch.manual_seed(0)
    model = DETR(DETRConfig(num_classes=3, hidden=32, detr_heads=4, ffn=64, decoder_layers=2, queries=9))
    for parameter in model.head.parameters():                        # boxes that start at their anchors would all agree
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    model, path = set_statistics(model).fuse(), str(tmp_path / 'detr.onnx')
    assert_agrees(model, export_onnx(model, path, SHAPE), path, (1, 3, *SHAPE))
    metadata = read_metadata(path)
    assert metadata['arch'] == 'rtdetr' and metadata['nms'] == 'False' and not OnnxModel(path).nms
    boxes, scores = reload(path)(noise(1, 3, *SHAPE))
    assert boxes.shape == (1, 9, 4) and scores.shape == (1, 9, 3)


def test_drawn_pictures_when_there_are_no_data():
    a, b = pictures(None, SHAPE, 2)
    assert a.shape == (1, 3, *SHAPE) and 0 <= a.min() and a.max() <= 1 and not torch.equal(a, b)


@pytest.mark.parametrize('settings, sentence', [
    (dict(format='tflite'), 'onnx or torch_export'), (dict(precision='int4'), 'fp32, fp16 or int8'),
    (dict(precision='int8'), 'add --calibration='), (dict(weights='best.onnx'), r'give the \.pt'),
    (dict(out='x.pt'), r'ends in \.onnx'), (dict(out='no/such/x.onnx'), 'cannot be written'),
    (dict(format='torch_export', nms=True), 'use --format=onnx'), (dict(imgsz=100), 'multiples of 32'),
    (dict(conf=2.0), 'conf=2.0: a score'), (dict(nms_iou=-1.0), 'nms_iou=-1.0: an overlap'),
    (dict(one2one=True), 'no one-to-one head'), (dict(weights='none.pt'), 'not found'),
    (dict(dynamic=True, imgsz=32), 'sides of 64 and more'), (dict(data='none.json'), 'none.json')])
def test_the_users_mistakes(settings, sentence, monkeypatch, tmp_path):
    HSVDET(HSVDETConfig(num_classes=3, attn='---')).save(tmp_path / 'w.pt')
    monkeypatch.chdir(tmp_path)
    for name, value in {'weights': 'w.pt', **settings}.items():
        monkeypatch.setattr(export, name, value)
    with pytest.raises(InputError, match=sentence):
        export.main()

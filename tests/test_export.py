"""Exported networks, loaded again, against eager ones: at scale n on small noise, with open gates so that the blocks matter."""
import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import export
from data import InputError
from eval import OnnxModel, input_shape, predict
from export import difference, export_onnx, export_torch, pictures, quantise, reload
from model import HSVDET, HSVDETConfig, nms

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript')
onnxruntime = pytest.importorskip('onnxruntime')

SHAPE = (64, 96)                     # P4 has 24 tokens, of which k = 10 attend; P5 has 6, and all do
pytestmark = pytest.mark.filterwarnings('ignore:.*LeafSpec.*:FutureWarning')          # torch.export's own, in torch 2.13


def noise(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def make(gate=0.7, **settings):
    """A fused model whose signal does not die on the way (BatchNorm knows its statistics), with scores all over 0..1."""
    torch.manual_seed(0)
    model = HSVDET(HSVDETConfig(**{'num_classes': 3, 'k': 10, **settings}))
    model.names = ['one', 'zwei', 'três']
    for block in model.blocks().values():
        block.gate.fill_(gate)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()(noise(4, 3, *SHAPE))
    for head in filter(None, (model.detect_head, model.one2one_head)):
        for branch in [*head.box, *head.cls]:
            nn.init.normal_(branch[-1].weight, std=0.02)
            nn.init.normal_(branch[-1].bias, -1)
    return model.fuse()


@torch.no_grad()
def agree(model, network, path, *shapes):
    for shape in shapes:
        box, score = difference(model, network, reload(path), noise(*shape))
        assert box < 0.02 and score < 2e-4, f'{shape}: {box} px, {score}'


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """model, network, path of an ordinary export."""
    model, path = make(), str(tmp_path_factory.mktemp('export') / 'plain.onnx')
    return model, export_onnx(model, path, SHAPE), path


def test_onnx_equals_eager(plain):
    """k < N at P4 and k > N at P5, and a block that is not there would be noticed."""
    agree(*plain, (1, 3, *SHAPE))
    with torch.no_grad():
        box, score = difference(make(gate=0.0), plain[1], reload(plain[2]), noise(1, 3, *SHAPE))
    assert box > 1 and score > 0.005


def test_a_flat_picture_ties(plain):
    """Equal tokens compete for the last places: ONNX breaks the tie as we do."""
    with torch.no_grad():
        box, score = difference(*plain[:2], reload(plain[2]), torch.full((1, 3, *SHAPE), 114 / 255))
    assert box < 0.02 and score < 2e-4


def test_metadata_and_names(plain):
    loaded, file = OnnxModel(plain[2]), onnx.load(plain[2])
    assert loaded.names == ['one', 'zwei', 'três'] and input_shape(loaded, 0) == SHAPE and not loaded.ends_in_nms
    metadata = {p.key: p.value for p in file.metadata_props}
    assert json.loads(metadata['imgsz']) == [64, 96] and metadata['stride'] == '32' and metadata['num_classes'] == '3' and metadata['precision'] == 'fp32'
    assert '114' in metadata['preprocessing'] and 'RGB' in metadata['preprocessing'] and 'x1, y1, x2, y2' in metadata['boxes'] and 'conf' not in metadata
    assert {'stem', 'block4', 'block5', 'detect_head', 'after'} <= {node.name.split('/')[0] for node in file.graph.node}
    with pytest.raises(InputError, match='exported at'):
        input_shape(loaded, 640)


def test_dynamic(tmp_path):
    """One file, any batch and size; k is min(k, N) in each."""
    model, path = make(attn='--S'), str(tmp_path / 'dynamic.onnx')   # 6, 4, 8 and 30 tokens
    network = export_onnx(model, path, SHAPE, dynamic=True)
    agree(model, network, path, (2, 3, 64, 96), (1, 3, 64, 64), (3, 3, 128, 64), (1, 3, 160, 192))
    loaded = OnnxModel(path)
    assert loaded.fixed is None and input_shape(loaded, 0) == SHAPE and input_shape(loaded, 320) == (320, 320)


def test_suppression_in_onnx(tmp_path):
    """Crowded boxes of several classes, three images, through the operator alone: what model.nms keeps, at its place."""
    class Alone(nn.Module):
        def forward(self, boxes, scores):
            return export.suppress(boxes, scores, 0.3, 0.5, 12)

    corner, scores = noise(3, 60, 2) * 20, noise(3, 60, 4)
    boxes, path = torch.cat((corner, corner + 10 + 5 * noise(3, 60, 2)), 2), str(tmp_path / 'nms.onnx')
    table = {torch.ops.hsvdet.suppress.default: export.onnx_suppress}
    torch.onnx.export(Alone().eval(), (boxes, scores), path, verbose=False, external_data=False, custom_translation_table=table)
    kept = torch.from_numpy(onnxruntime.InferenceSession(path).run(None, dict(boxes=boxes.numpy(), scores=scores.numpy()))[0])
    for i in range(3):
        for label in range(4):
            s = scores[i, :, label].where(scores[i, :, label] > 0.3, 0)
            keep = [j for j in nms(boxes[i], s, torch.zeros(60), 0.5, 12).tolist() if s[j] > 0]
            assert kept[i, :, label].nonzero()[:, 0].tolist() == sorted(keep) and 1 < len(keep) < 13
            assert torch.equal(kept[i, keep, label], s[keep])


@pytest.mark.parametrize('multi_label', [False, True])
def test_nms_inside_equals_detect(multi_label, tmp_path):
    model, path, x = make(attn='---'), str(tmp_path / 'nms.onnx'), noise(1, 3, *SHAPE)
    network = export_onnx(model, path, SHAPE, nms=True, conf=0.3, iou=0.7, max_det=30, multi_label=multi_label)
    agree(model, network, path, x.shape)
    rows, count = reload(path)(x)[0], 30 if multi_label else len(model.detect(x, 0.3, 0.7, 30)[0])
    assert rows.shape == (1, 30, 6) and (rows[..., 4] > 0).sum() == count and (multi_label or 10 < count < 30), 'max_det and padding both at work'
    assert (rows[..., 4].diff(dim=1) <= 0).all() and (rows[rows[..., 4] == 0] == 0).all()
    metadata = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert (metadata['conf'], metadata['iou'], metadata['max_det']) == ('0.3', '0.7', '30') and OnnxModel(path).ends_in_nms


def test_one2one_needs_no_nms(tmp_path):
    model, path = make(attn='---', one2one=True), str(tmp_path / 'one2one.onnx')
    network = export_onnx(model, path, SHAPE, nms=True, one2one=True, max_det=30)
    agree(model, network, path, (1, 3, *SHAPE))
    nodes = onnx.load(path).graph.node
    assert 'NonMaxSuppression' not in {node.op_type for node in nodes}
    assert not any(node.name.startswith('detect_head') for node in nodes), 'the one-to-many head stays at home'
    # without the detections in the graph, whoever loads it knows that nothing is to be suppressed
    export_onnx(model, path, SHAPE, one2one=True)
    image = torch.randint(0, 256, (*SHAPE, 3), dtype=torch.uint8).numpy()
    rows, _, _ = predict(OnnxModel(path), [image], (0.7,), 0.01, 50)
    want = model.detect(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255, conf=0.01, max_det=50, nms=False)[0]
    assert len(rows[0][0]) == len(want) == 50 and np.abs(rows[0][0][:, :5] - want[:, :5].numpy()).max() < 0.05


def test_fp16_keeps_the_island(tmp_path):
    """Backbone in float16; importance, LayerNorm, softmax and both products of the attention in float32; nothing overflows."""
    model, path = make(), str(tmp_path / 'half.onnx')
    model.sppf.conv_out.conv.weight *= 40                            # then |x|^2 leaves float16 at block5
    model.sppf.conv_out.conv.bias *= 40
    seen = []
    hook = model.block5.register_forward_pre_hook(lambda _, x: seen.append(x[0].square().sum(1).max().item()))
    with torch.no_grad():
        boxes, scores = model.decode(model(noise(1, 3, *SHAPE))[0])
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
    assert count['TopK'] == count['ReduceL2'] == 1 and count['LayerNormalization'] == 4 and count['MatMul'] == 8 and count['Softmax'] == 3
    assert {kind[node.input[0]] for node in graph.node if node.op_type == 'Conv'} == {onnx.TensorProto.FLOAT16}
    assert all(kind[v.name] == onnx.TensorProto.FLOAT for v in [*graph.input, *graph.output])
    got = reload(path)(noise(1, 3, *SHAPE))
    assert got[0].isfinite().all() and (got[1] - scores).abs().mean() < 0.01 and (got[0] - boxes).abs().mean() < 1
    assert model.stem.conv.weight.dtype == torch.float32, 'the model itself is left as it was'


def test_int8(plain, tmp_path):
    model, network, source = plain
    for symmetric in (False, True):
        path = shutil.copy(source, str(tmp_path / f'int8_{symmetric}.onnx'))
        quantise(path, [noise(1, 3, *SHAPE).numpy()], symmetric)
        nodes = onnx.load(path).graph.node
        made_by = {name: node for node in nodes for name in node.output}
        integer = {node.name for node in nodes if node.op_type == 'Conv' and node.input[1] in made_by}
        every = {node.name for node in nodes if node.op_type == 'Conv'}
        assert all(name.startswith('block') or '/2/' in name and 'head' in name for name in every - integer) and len(every - integer) == 8
        zero = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if 'zero_point' in t.name}
        assert symmetric == all(np.all(z == 0) for z in zero.values())
        got = reload(path)(noise(1, 3, *SHAPE))
        with torch.no_grad():
            scores = model.decode(model(noise(1, 3, *SHAPE))[0])[1]
        assert (got[1] - scores).abs().mean() < 0.05
        assert OnnxModel(path).names == model.names


def test_torch_export(tmp_path):
    model, path = make(), str(tmp_path / 'program.pt2')
    agree(model, export_torch(model, path, SHAPE), path, (1, 3, *SHAPE))
    extra = {'about.json': ''}
    torch.export.load(path, extra_files=extra)
    assert json.loads(json.loads(extra['about.json'])['names']) == model.names


def test_drawn_pictures_when_there_are_no_data():
    a, b = pictures(None, SHAPE, 2)
    assert a.shape == (1, 3, *SHAPE) and 0 <= a.min() and a.max() <= 1 and not torch.equal(a, b)


@pytest.mark.parametrize('settings, sentence', [
    (dict(format='tflite'), 'onnx or torch_export'), (dict(precision='int4'), 'fp32, fp16 or int8'), (dict(precision='int8'), 'add --calibration='),
    (dict(weights='best.onnx'), r'give the \.pt'), (dict(out='x.pt'), r'ends in \.onnx'), (dict(out='no/such/x.onnx'), 'cannot be written'),
    (dict(format='torch_export', nms=True), 'use --format=onnx'), (dict(imgsz=100), 'multiples of 32'), (dict(one2one=True), 'no one-to-one head'),
    (dict(weights='none.pt'), 'not found'), (dict(dynamic=True, imgsz=32), 'sides of 64 and more'), (dict(data='none.json'), 'none.json')])
def test_the_users_mistakes(settings, sentence, monkeypatch, tmp_path):
    HSVDET(HSVDETConfig(num_classes=3, attn='---')).save(tmp_path / 'w.pt')
    monkeypatch.chdir(tmp_path)
    for name, value in {'weights': 'w.pt', **settings}.items():
        monkeypatch.setattr(export, name, value)
    with pytest.raises(InputError, match=sentence):
        export.main()

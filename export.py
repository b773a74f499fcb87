"""
A checkpoint leaves the house: as ONNX, or as a torch.export program. Every file is loaded again and held against eager.

    python export.py --weights=out/best.pt                                  best.onnx beside it, for one image of the trained size
    python export.py --weights=out/best.pt --dynamic=True --data=val.json   any batch and size; checked on real images, AP too
    python export.py --weights=out/best.pt --nms=True --conf=0.3            finished detections, NMS in the graph
    python export.py --weights=out/best.pt --precision=fp16                 half the size; the attention stays float32
    python export.py --weights=out/best.pt --precision=int8 --calibration=train.json --data=val.json
    python export.py --weights=out/best.pt --format=torch_export            best.pt2, for torch.export.load

In go `images` (B, 3, H, W), float32 RGB in 0..1; out come `boxes` (B, A, 4), xyxy in input pixels, and `scores`
(B, A, K); or, with --nms=True, `detections` (B, max_det, 6), rows as model.detect's, behind the last one zeros. (Of a
one-to-one head, --one2one=True, nothing is suppressed: its best max_det as they are.) The metadata hold all else that
detect.py, eval.py or a stranger must know. A node is called after its module: block4/node_softmax.

fp16: the block's importance and attention and the decoding of boxes stay float32, by casts in the graph. int8:
onnxruntime's static quantisation, per channel; float stay the blocks, the head's last 1x1 convolutions (what leaves
them is pixels and logits) and the decoding. It suits onnxruntime on CPUs; --symmetric=True makes zero points 0 and
biases float, as TensorRT asks. Of equal importances ONNX takes the lower index, as we do; a .pt2 and TensorRT any.

Elsewhere; these commands were NOT RUN HERE:
    TensorRT 10 and 11, strongly typed: the casts in the graph are the island. (11 knows nothing else, and no such flag.)
        trtexec --onnx=best_fp16.onnx --saveEngine=best.engine --stronglyTyped
        with --dynamic=True also --minShapes=images:1x3x320x320 --optShapes=images:8x3x640x640 --maxShapes=images:16x3x1088x1920
    TensorRT 8 to 10, weakly typed, from the fp32 file: the island by layer precision (k at most 3,840).
        trtexec --onnx=best.onnx --saveEngine=best.engine --fp16 --precisionConstraints=obey --layerPrecisions='block*:fp32,after*:fp32'
    TensorRT, INT8, from --precision=int8 --symmetric=True (8: --int8 in place of the last flag):
        trtexec --onnx=best_int8.onnx --saveEngine=best.engine --stronglyTyped
    CoreML, from --format=torch_export, after pip install coremltools:
        python -c "import torch, coremltools as ct; ct.convert(torch.export.load('best.pt2').run_decompositions({})).save('best.mlpackage')"

What it does not do: quantisation-aware training, pruning. Paper: integer quantisation, Jacob et al. 2018 (1712.05877).
"""
import ast
import copy
import importlib.util
import json
import logging
import os
import re
import timeit

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from configurator import configure
from data import DetectionDataset, InputError, draw_shapes, letterbox
from eval import OnnxModel, evaluate, input_shape, open_data
from model import HSVDET

weights = 'out/best.pt'             # ours, or a YOLOv8 .pt
format = 'onnx'                     # onnx, torch_export
imgsz: int | tuple = 0              # pixels, or (H, W); 0 is what the weights were trained at, else 640
dynamic = False                     # batch, height and width stay free (sides in multiples of 32, from 64 on)
nms = False                         # detections instead of boxes and scores
one2one = False                     # the one-to-one head, which needs no suppression
conf = 0.25                         # with nms: the lowest score,
nms_iou = 0.7                       # the overlap that suppresses,
max_det = 300                       # the number of rows,
multi_label = False                 # and whether a point may name several classes, as in evaluation
precision = 'fp32'                  # fp32, fp16, int8
calibration = ''                    # int8: COCO json or YOLO folder of images like those to come; 64 are used
symmetric = False                   # int8: for TensorRT; slow in onnxruntime on x86
data = ''                           # check on these images, and print AP before and after
images = ''                         # folder of data's images; '' looks beside the json
out = ''                            # the file; '' is the weights' name, then _fp16 or _int8, then .onnx or .pt2

QUANTISED = ['Conv', 'Concat', 'MaxPool', 'Resize', 'Add', 'Mul', 'Sigmoid', 'Split']         # lists are no knobs
FLOAT = re.compile(r'block\d/|after/|\w+_head/(node_|(box|cls)/\d/2/)')              # nodes that int8 leaves alone


# --- the network that leaves, and its formats ---------------------------------------------------------------------------

@torch.library.custom_op('hsvdet::suppress', mutates_args=())
def suppress(boxes: torch.Tensor, scores: torch.Tensor, conf: float, iou: float, max_det: int) -> torch.Tensor:
    """boxes (B, A, 4), scores (B, A, K) -> the scores that NMS within classes keeps, 0 for all others: a name in the graph."""
    raise NotImplementedError('onnx_suppress is what it does')


suppress.register_fake(lambda boxes, scores, conf, iou, max_det: torch.empty_like(scores))


def onnx_suppress(boxes, scores, conf: float, iou: float, max_det: int):
    """`suppress` in ONNX. Its list of survivors has any length; scattered back over the scores it needs none."""
    from onnxscript import opset18 as op
    limits = op.Constant(value_ints=[max_det]), op.Constant(value_floats=[iou]), op.Constant(value_floats=[conf])
    chosen = op.NonMaxSuppression(boxes, op.Transpose(scores, perm=[0, 2, 1]), *limits)               # (n, 3) image, class, point
    at = op.Gather(chosen, op.Constant(value_ints=[0, 2, 1]), axis=1)                                 # (n, 3) image, point, class
    return op.ScatterND(op.Mul(scores, op.Constant(value_float=0.0)), at, op.GatherND(scores, at))


class Exported(nn.Module):
    """images (B, 3, H, W) float32 in 0..1 -> boxes (B, A, 4), scores (B, A, K); or detections (B, max_det, 6)."""

    def __init__(self, model, nms=False, one2one=False, conf=0.25, iou=0.7, max_det=300, multi_label=False):
        super().__init__()
        self.model, self.nms, self.one2one, self.multi_label = model, nms, one2one, multi_label
        self.conf, self.iou, self.max_det = float(conf), float(iou), max_det

    def forward(self, images):
        maps, _ = self.model(images.to(self.model.stem.conv.weight.dtype), one2one=self.one2one)
        boxes, scores = self.model.decode(maps)                                       # float32 whatever the maps are
        if not self.nms:
            return boxes, scores
        B, A, K = scores.shape
        if not self.multi_label:                                                      # of each point the best class only
            best = scores.argmax(2, keepdim=True)
            scores = torch.zeros_like(scores).scatter(2, best, scores.gather(2, best))
        scores = scores * (scores > self.conf) if self.one2one else suppress(boxes, scores, self.conf, self.iou, self.max_det)
        score, place = F.pad(scores.flatten(1), (0, self.max_det)).topk(self.max_det)                 # (B, max_det)
        point = (place // K).clamp(max=A - 1)[..., None].expand(-1, -1, 4)
        rows = torch.cat((boxes.gather(1, point), score[..., None], (place % K)[..., None].float()), 2)
        return rows * (score > 0)[..., None]                                          # (B, max_det, 6)


def prepare(model, imgsz, dynamic, precision, how):
    """-> the network in its precision; its example images and which of their sides are free; its metadata."""
    cfg, (H, W) = model.cfg, imgsz
    if cfg.select == 'random' and 'S' in cfg.attn:
        raise InputError('select=random is a control for training, which no format can hold: export a model of another selection')
    if dynamic and ('S' in cfg.attn and 0 < cfg.k < 1 or min(H, W) < 64):
        raise InputError(f'--dynamic=True takes sides of 64 and more and k as a count, got {H}x{W} and k={cfg.k}: use --dynamic=False')
    network = Exported(copy.deepcopy(model).half() if precision == 'fp16' else model, **how).eval()
    free = {0: torch.export.Dim('batch'), 2: 32 * torch.export.Dim('h'), 3: 32 * torch.export.Dim('w')}        # traced with 2 images: 1 is a constant
    metadata = dict(
        names=json.dumps(model.names), num_classes=cfg.num_classes, stride=32, imgsz=json.dumps([H, W]), precision=precision, one2one=network.one2one,
        model=f'HSV-DET-{cfg.scale} attn={cfg.attn} k={cfg.k} select={cfg.select}',
        preprocessing='RGB, scaled with antialiasing to fit (H, W) with its aspect kept, centred on grey 114, divided by 255; (B, 3, H, W) float32',
        boxes='x1, y1, x2, y2 in pixels of the network input; in the picture (x - left) / scale, (y - top) / scale')
    metadata |= dict(conf=network.conf, iou=network.iou, max_det=network.max_det, multi_label=network.multi_label) if network.nms else {}
    return network, (torch.rand(1 + dynamic, 3, H, W),), (free,) if dynamic else None, {name: str(value) for name, value in metadata.items()}


def export_onnx(model, path, imgsz, dynamic=False, precision='fp32', **how):
    """A fused model -> an ONNX file for images of imgsz (H, W). how: Exported's settings. (int8: then quantise it.)"""
    missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'ONNX needs what is not installed: pip install {" ".join(missing)}')
    logging.getLogger('torch.onnx._internal.exporter._registration').setLevel(logging.ERROR)      # it misses torchvision, we do not
    network, example, free, metadata = prepare(model, imgsz, dynamic, precision, how)
    program = torch.onnx.export(
        network, example, dynamo=True, opset_version=18, dynamic_shapes=free, verbose=False, input_names=['images'], output_names=['detections']
        if network.nms else ['boxes', 'scores'], custom_translation_table={torch.ops.hsvdet.suppress.default: onnx_suppress})
    for node in program.model.graph:                                                  # ['', 'model', 'model.stem', ...]
        scopes = ast.literal_eval(node.metadata_props.get('pkg.torch.onnx.name_scopes', '[]'))
        scope = next((s for s in reversed(scopes) if s.startswith('model.')), 'model.after')
        node.name = f'{scope[6:].replace(".", "/")}/{node.name}'
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)
    return network


def quantise(path, arrays, symmetric=False):
    """The ONNX file at path becomes int8. arrays (1, 3, H, W): pictures that show how large the activations get."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    feed = (dict(images=x) for x in arrays)
    reader = type('Reader', (CalibrationDataReader,), dict(get_next=lambda self: next(feed, None)))
    quant_pre_process(path, path, skip_optimization=True, skip_symbolic_shape=True)               # shapes only: it keeps the names
    quantize_static(
        path, path, reader(), per_channel=True, op_types_to_quantize=['Conv'] if symmetric else QUANTISED,
        nodes_to_exclude=[node.name for node in onnx.load(path).graph.node if FLOAT.match(node.name)],
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8, weight_type=QuantType.QInt8,
        extra_options=dict(ActivationSymmetric=symmetric, QuantizeBias=not symmetric, AddQDQPairToWeight=symmetric))


def export_torch(model, path, imgsz, dynamic=False, precision='fp32', **how):
    """The same as a torch.export program, its metadata the extra file about.json."""
    network, example, free, metadata = prepare(model, imgsz, dynamic, precision, how)
    torch.export.save(torch.export.export(network, example, dynamic_shapes=free), path, extra_files={'about.json': json.dumps(metadata)})
    return network


# --- the check -----------------------------------------------------------------------------------------------------------

def reload(path):
    """The file as it lies on the disk -> a function from images to outputs."""
    network = torch.export.load(path).module() if path.endswith('.pt2') else OnnxModel(path)
    return network if path.endswith('.pt2') else lambda x: network(x)[0]


def difference(model, network, run, x, sure=0.0):
    """Eager against `run`: the largest error of a box whose score is at least `sure`, in pixels, and of a score."""
    got = run(x)
    if not network.nms:
        boxes, scores = model.decode(model(x, one2one=network.one2one)[0])
        seen = scores.amax(2) >= sure                                                 # (B, A)
        return [(got[0] - boxes)[seen].abs().max().item() if seen.any() else 0.0, (got[1] - scores).abs().max().item()]
    worst = [[0.0, 0.0]]
    for want, rows in zip(model.detect(x, network.conf, network.iou, network.max_det, network.multi_label, not network.one2one), got[0], strict=True):
        rows = rows[rows[:, 4] > 0]
        if len(rows) != len(want):
            return [float('inf')] * 2
        if len(rows):                                                # not in order: scores that differ by 1e-8 may change places
            gap, nearest = ((want[:, None, :4] - rows[:, :4]).abs().amax(2) + 1e4 * (want[:, None, 5] != rows[:, 5])).min(1)
            worst.append([gap.max().item(), (want[:, 4] - rows[nearest, 4]).abs().max().item()])
    return np.max(worst, 0).tolist()


def pictures(dataset, shape, count):
    """The first `count` images of the dataset, (1, 3, H, W) each; without one, drawn ones."""
    for i in range(min(count, len(dataset)) if dataset else count):
        drawn = None if dataset else torch.from_numpy(letterbox(draw_shapes(np.random.default_rng(i))[0], shape)[0]).permute(2, 0, 1)
        yield (dataset[(0, i)]['image'] if dataset else drawn)[None].float() / 255


@torch.no_grad()
def check(model, network, path, shape, dynamic=False, dataset=None, sure=0.0):
    """Print how the file compares with the model; -> the largest errors of a box in pixels and of a score."""
    run, xs = reload(path), list(pictures(dataset, shape, 8))
    table = {'ms per image': [1e3 * np.median(timeit.repeat(lambda f=f: f(xs[0]), number=1, repeat=11)) for f in (
        lambda x: model.decode(model(x, one2one=network.one2one)[0]), run)]}
    if dynamic:                                                      # and two in one batch at half the size, where k may exceed N
        xs.append(F.interpolate(torch.cat((xs[0], xs[-1])), [max(64, n // 64 * 32) for n in shape], mode='bilinear', antialias=True))
    worst = np.max([difference(model, network, run, x, sure) for x in xs], 0).tolist()
    table |= {'largest box error, px' + f', where scores reach {sure}' * bool(sure): ['', worst[0]], 'largest score error': ['', worst[1]]}
    if dataset and path.endswith('.onnx'):
        table[f'AP on {len(dataset)} images' + f' (the file: above {network.conf})' * network.nms] = [
            evaluate(m, dataset, shape, nms=not network.one2one, verbose=False)['AP'] for m in (model, OnnxModel(path))]
    print(f'{path}: {os.path.getsize(path) / 1e6:.2f} MB; {len(xs)} batches of {"the data" if dataset else "drawn images"}, {shape[0]}x{shape[1]}')
    print(f'{"":<50}{"eager":>10}{"export":>10}')
    for name, row in table.items():
        print(f'{name:<50}' + ''.join(f'{value if value in ("", None) else f"{value:.4g}":>10}' for value in row))
    return worst


def main():
    suffix = '.onnx' if format == 'onnx' else '.pt2'
    path = out or os.path.splitext(weights)[0] + f'_{precision}' * (precision != 'fp32') + suffix
    for wrong, sentence in (
            (format not in ('onnx', 'torch_export'), f'--format={format}: it is onnx or torch_export'),
            (precision not in ('fp32', 'fp16', 'int8'), f'--precision={precision}: it is fp32, fp16 or int8'),
            (weights.endswith(('.onnx', '.pt2')), f'--weights={weights} has left the house already: give the .pt it was made of'),
            (suffix == '.pt2' and (precision == 'int8' or nms), '--format=torch_export has neither int8 nor NMS inside: use --format=onnx'),
            (precision == 'int8' and not calibration, '--precision=int8 must see how large activations get: add --calibration=train.json'),
            (not path.endswith(suffix), f'--out={path}: a file of --format={format} ends in {suffix}'),
            (os.path.exists(weights) and not os.access(os.path.dirname(path) or '.', os.W_OK), f'{path} cannot be written: name another, --out=')):
        if wrong:
            raise InputError(sentence)
    model = HSVDET.from_pretrained(weights).fuse()
    if one2one and model.one2one_head is None:
        raise InputError(f'--one2one=True: {weights} has no one-to-one head, train with --one2one=True or leave the setting out')
    shape = input_shape(model, imgsz)
    dataset = open_data(data, model.names, images, imgsz=shape) if data else None
    seen = DetectionDataset(calibration, imgsz=shape) if precision == 'int8' else None
    how = dict(nms=nms, one2one=one2one, conf=conf, iou=nms_iou, max_det=max_det, multi_label=multi_label)
    network = (export_onnx if suffix == '.onnx' else export_torch)(model, path, shape, dynamic, precision, **how)
    if precision == 'int8':
        quantise(path, (x.numpy() for x in pictures(seen, shape, 64)), symmetric)
    box, score = check(model, network, path, shape, dynamic, dataset, 0.0 if precision == 'fp32' else 0.25)
    if precision == 'fp32' and not (box <= 0.05 and score <= 1e-3):
        raise SystemExit(f'error: {path} is another network, {box:.3g} px and {score:.3g} away where 0.05 and 0.001 may be: do not use it')


if __name__ == '__main__':
    configure(globals())
    main()

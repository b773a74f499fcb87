"""
Export a checkpoint as ONNX or as a torch.export program; every file is loaded again and compared with eager PyTorch.

    python export.py --weights=out/best.pt                                   best.onnx: one image of the trained size
    python export.py --weights=out/best.pt --dynamic=True --data=val.json    any batch and size; checked on images, AP
    python export.py --weights=out/best.pt --nms=True --conf=0.3             detections, with NMS in the graph
    python export.py --weights=out/best.pt --precision=fp16                  half the size; attention stays float32
    python export.py --weights=out/best.pt --precision=int8 --calibration=train.json --data=val.json
    python export.py --weights=out/best.pt --format=torch_export             best.pt2, for torch.export.load

Input: `images` (B, 3, H, W), float32 RGB in 0..1. Output: `boxes` (B, A, 4), xyxy in input pixels, and `scores`
(B, A, K), with A anchor points or queries; or, with --nms=True, `detections` (B, max_det, 6), rows as detect() returns
them, then rows of zeros. (A one-to-one head, --one2one=True, and a DETR need no NMS: then the best max_det as they
are.) Everything else that a program must know to run the file is in its metadata. A node is named after its module:
block4/node_softmax.

fp16: token selection, attention and the decoding of boxes stay float32, by casts in the graph. int8: onnxruntime's
static quantisation, per channel; float stay the attention blocks, the last 1x1 convolutions of the head (their outputs
are pixels and logits), a DETR's decoder, and the decoding of boxes. It suits onnxruntime on CPUs; --symmetric=True
makes zero points 0 and biases float, as TensorRT asks. Of two tokens of equal importance ONNX selects the lower index,
as eager does; .pt2 and TensorRT leave that open.

The following commands were NOT RUN HERE:
    TensorRT 10 and 11, strongly typed: the casts in the graph keep attention in float32 (11 has no such flag any more)
        trtexec --onnx=best_fp16.onnx --saveEngine=best.engine --stronglyTyped
        with --dynamic=True also
        --minShapes=images:1x3x320x320 --optShapes=images:8x3x640x640 --maxShapes=images:16x3x1088x1920
    TensorRT 8 to 10, weakly typed, from the fp32 file: float32 by layer precision (k at most 3,840)
        trtexec --onnx=best.onnx --saveEngine=best.engine --fp16 --precisionConstraints=obey
        --layerPrecisions='block*:fp32,after*:fp32'
    TensorRT, INT8, from --precision=int8 --symmetric=True (8: --int8 in place of the last flag)
        trtexec --onnx=best_int8.onnx --saveEngine=best.engine --stronglyTyped
    CoreML, from --format=torch_export, after pip install coremltools
        python -c "import torch, coremltools as ct
        ct.convert(torch.export.load('best.pt2').run_decompositions({})).save('best.mlpackage')"

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
import warnings
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from configurator import InputError, configure
from data import DetectionDataset, letterbox, to_tensor
from eval import OnnxModel, evaluate, input_shape, load_model, open_data
from prepare.shapes import draw_shapes
from sparse_attention import SparseGlobalBlock

weights = 'out/best.pt'             # a checkpoint of train.py, or a YOLOv8 .pt
format = 'onnx'                     # onnx, torch_export
imgsz: int | tuple = 0              # pixels, or (H, W); 0 is what the weights were trained at, else 640
dynamic = False                     # batch, height and width stay free (sides in multiples of 32, from 64 on)
nms = False                         # output detections instead of boxes and scores
one2one = False                     # export the one-to-one head, which needs no NMS
conf = 0.25                         # with nms: the lowest score,
nms_iou = 0.7                       # the overlap that suppresses,
max_det = 300                       # the number of rows,
multi_label = False                 # and whether a point may name several classes, as in evaluation
precision = 'fp32'                  # fp32, fp16, int8
calibration = ''                    # int8: COCO json or YOLO folder of typical images, of which 64 are used
symmetric = False                   # int8: for TensorRT; slow in onnxruntime on x86
data = ''                           # check on these images, and print AP before and after
images = ''                         # folder of data's images; '' looks beside the json
out = ''                            # the file; '' is the weights' name, then _fp16 or _int8, then .onnx or .pt2

QUANTISED = ['Conv', 'Concat', 'MaxPool', 'Resize', 'Add', 'Mul', 'Sigmoid']                  # operators in int8
FLOAT = re.compile(r'block\d(_scale)?/|after/|\w+_head/(node_|(box|cls)/\d/2/)|head/encoder/aifi/|head/(?!encoder/)')


# --- the network in the file -----------------------------------------------------------------------------------------

@torch.library.custom_op('hsvdet::suppress', mutates_args=())
def suppress(boxes: torch.Tensor, scores: torch.Tensor, conf: float, iou: float, max_det: int) -> torch.Tensor:
    """boxes (B, A, 4), scores (B, A, K) -> the scores that NMS within classes keeps, all others 0. For the graph only:
    onnx_suppress is what it becomes."""
    raise NotImplementedError('hsvdet::suppress exists in ONNX graphs only')


suppress.register_fake(lambda boxes, scores, conf, iou, max_det: torch.empty_like(scores))


def onnx_suppress(boxes, scores, conf: float, iou: float, max_det: int):
    """`suppress` in ONNX, whose list of kept boxes has any length; scattered over the scores, the shape is fixed."""
    from onnxscript import opset18 as op
    limits = op.Constant(value_ints=[max_det]), op.Constant(value_floats=[iou]), op.Constant(value_floats=[conf])
    kept = op.NonMaxSuppression(boxes, op.Transpose(scores, perm=[0, 2, 1]), *limits)   # (n, 3) image, class, point
    place = op.Gather(kept, op.Constant(value_ints=[0, 2, 1]), axis=1)                  # (n, 3) image, point, class
    return op.ScatterND(op.Mul(scores, op.Constant(value_float=0.0)), place, op.GatherND(scores, place))


class Exported(nn.Module):
    """images (B, 3, H, W) float32 in 0..1 -> boxes (B, A, 4), scores (B, A, K); or detections (B, max_det, 6)."""

    def __init__(self, model, nms=False, conf=0.25, iou=0.7, max_det=300, multi_label=False):
        super().__init__()
        self.model, self.dtype = model, next(model.parameters()).dtype
        self.detections, self.multi_label = nms, multi_label
        self.conf, self.iou, self.max_det = float(conf), float(iou), max_det

    def forward(self, images):
        boxes, scores = self.model.decode(self.model(images.to(self.dtype))[0])       # float32 in every precision
        if not self.detections:
            return boxes, scores
        B, A, K = scores.shape
        if not self.multi_label:                                                      # the best class of each point
            best = scores.argmax(2, keepdim=True)
            scores = torch.zeros_like(scores).scatter(2, best, scores.gather(2, best))
        if self.model.nms:
            scores = suppress(boxes, scores, self.conf, self.iou, self.max_det)
        else:
            scores = scores * (scores > self.conf)
        score, place = F.pad(scores.flatten(1), (0, self.max_det)).topk(self.max_det)                 # (B, max_det)
        point = (place // K).clamp(max=A - 1)[..., None].expand(-1, -1, 4)
        rows = torch.cat((boxes.gather(1, point), score[..., None], (place % K)[..., None].float()), 2)
        return rows * (score > 0)[..., None]                                          # (B, max_det, 6)


def make_network(model, imgsz, dynamic, precision, best_f1, settings):
    """-> an Exported in its precision; its example input and which of the input's sides are free; its metadata."""
    H, W = imgsz
    sparse = [module for module in model.modules() if isinstance(module, SparseGlobalBlock)]
    if model.frames:
        raise InputError('memory=time carries a state from frame to frame, which no exported file holds: run the '
                         'checkpoint itself, or train without memory=time')
    if any(block.select == 'random' for block in sparse):
        raise InputError('select=random is a control for training that no format can hold: '
                         'export a model of another selection')
    if dynamic and (min(H, W) < 64 or any(0 < block.k < 1 for block in sparse)):
        raise InputError(f'--dynamic=True takes sides of 64 and more and k as a count, got {H}x{W} and '
                         f'k={model.cfg.k}: use --dynamic=False')
    if dynamic and getattr(model.backbone, 'position_resize', '') == 'scale':
        raise InputError('position_resize=scale ties the file to one image size: use --dynamic=False')
    network = Exported(copy.deepcopy(model).half() if precision == 'fp16' else model, **settings).eval()
    sides = {0: torch.export.Dim('batch'), 2: 32 * torch.export.Dim('h'), 3: 32 * torch.export.Dim('w')}
    metadata = dict(
        arch=model.arch, config=json.dumps(asdict(model.cfg)), nms=model.nms,
        names=json.dumps(model.names), num_classes=len(model.names), imgsz=json.dumps([H, W]), stride=32,
        precision=precision, best_f1=json.dumps(best_f1),
        preprocessing='RGB, scaled with antialiasing to fit (H, W) with its aspect kept, centred on grey 114, divided '
                      'by 255; (B, 3, H, W) float32',
        boxes='x1, y1, x2, y2 in pixels of the network input; in the picture (x - left) / scale, (y - top) / scale')
    if network.detections:
        metadata |= dict(conf=network.conf, iou=network.iou, max_det=network.max_det,
                         multi_label=network.multi_label)
    if dynamic:                                            # a batch of 1, and one tile of W and N, would be constants
        H, W = max(H, 288), max(W, 288)
    example = torch.rand(2 if dynamic else 1, 3, H, W)
    return network, (example,), (sides,) if dynamic else None, {name: str(value) for name, value in metadata.items()}


def export_onnx(model, path, imgsz, dynamic=False, precision='fp32', best_f1=None, **settings):
    """
    A fused model -> an ONNX file for images of imgsz (H, W); returns the Exported. best_f1: that of
    checkpoint.read_weights, for the metadata. settings: Exported's. For int8 export in fp32, then quantise the file.
    """
    missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'ONNX needs packages that are not installed: pip install {" ".join(missing)}')
    # it warns that torchvision is absent, which nothing here uses
    logging.getLogger('torch.onnx._internal.exporter._registration').setLevel(logging.ERROR)
    network, example, sides, metadata = make_network(model, imgsz, dynamic, precision, best_f1, settings)
    # inside torch 2.13 run_decompositions copies a LeafSpec, whose constructor torch deprecates: the warning is its own
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', r'`isinstance\(treespec, LeafSpec\)` is deprecated', FutureWarning)
        program = torch.onnx.export(
            network, example, dynamo=True, opset_version=18, dynamic_shapes=sides, verbose=False,
            input_names=['images'], output_names=['detections'] if network.detections else ['boxes', 'scores'],
            custom_translation_table={torch.ops.hsvdet.suppress.default: onnx_suppress})
    for node in program.model.graph:                                          # scopes: '', 'model', 'model.block4'
        scopes = ast.literal_eval(node.metadata_props.get('pkg.torch.onnx.name_scopes', '[]'))
        scope = next((s for s in reversed(scopes) if s.startswith('model.')), 'model.after')
        node.name = f'{scope.removeprefix("model.").replace(".", "/")}/{node.name}'
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)
    return network


def quantise(path, arrays, symmetric=False):
    """The ONNX file at path becomes int8. arrays: images (1, 3, H, W) float32 that show the range of activations."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    inputs = (dict(images=x) for x in arrays)

    class Reader(CalibrationDataReader):
        def get_next(self):
            return next(inputs, None)

    quant_pre_process(path, path, skip_optimization=True, skip_symbolic_shape=True)   # shapes only: it keeps the names
    quantize_static(
        path, path, Reader(), per_channel=True, op_types_to_quantize=['Conv'] if symmetric else QUANTISED,
        nodes_to_exclude=[node.name for node in onnx.load(path).graph.node if FLOAT.match(node.name)],
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8, weight_type=QuantType.QInt8,
        extra_options=dict(ActivationSymmetric=symmetric, QuantizeBias=not symmetric, AddQDQPairToWeight=symmetric))


def export_torch(model, path, imgsz, dynamic=False, precision='fp32', best_f1=None, **settings):
    """As export_onnx, but a torch.export program; its metadata are the extra file metadata.json."""
    if dynamic and set(getattr(model.cfg, 'attn', '')) & set('WN'):
        raise InputError(f'attn={model.cfg.attn}: torch_export ties W and N to the number of tiles that it saw: use '
                         '--format=onnx, or --dynamic=False')
    network, example, sides, metadata = make_network(model, imgsz, dynamic, precision, best_f1, settings)
    program = torch.export.export(network, example, dynamic_shapes=sides)
    torch.export.save(program, path, extra_files={'metadata.json': json.dumps(metadata)})
    return network


# --- the check -------------------------------------------------------------------------------------------------------

def reload(path):
    """The file on disk -> a function from images to a list or tuple of outputs."""
    if path.endswith('.pt2'):
        return torch.export.load(path).module()
    model = OnnxModel(path)
    return lambda images: model(images)[0]


def largest_error(want, got, min_score=0.0):
    """
    Two lists of boxes (n, 4) and scores (n, K), one of each per image -> the largest error of a box in pixels and of a
    score; infinite where an image has more boxes on one side.

    Looked at are the 300 highest scores of `want`; boxes only where they reach min_score. Each is compared with the
    nearest of `got` (0.01 of score counts as 1 px), because the order means nothing: a DETR's queries, or detections
    whose scores differ by 1e-8, may change places.
    """
    worst = [0.0, 0.0]
    for (boxes, scores), (got_boxes, got_scores) in zip(want, got, strict=True):
        if len(boxes) != len(got_boxes):
            return [np.inf, np.inf]
        if len(boxes):
            best = scores.amax(1)
            top = best.topk(min(300, len(best))).indices
            boxes, scores, best = boxes[top], scores[top], best[top]
            a, b = torch.cat((boxes, 100 * scores), 1), torch.cat((got_boxes, 100 * got_scores), 1)   # (n, 4 + K)
            nearest = torch.cdist(a, b.to(a), p=torch.inf).argmin(1)
            box = (boxes - got_boxes[nearest]).abs() * (best >= min_score)[:, None]
            worst = np.maximum(worst, (box.max().item(), (scores - got_scores[nearest]).abs().max().item())).tolist()
    return worst


def difference(model, network, run, images, min_score=0.0):
    """largest_error of `run`, the exported file, compared with the eager model on one batch."""
    raw, got = model(images)[0], run(images)
    if not network.detections:
        return largest_error(zip(*model.decode(raw), strict=True), zip(*got, strict=True), min_score)
    want = model.postprocess(raw, network.conf, network.iou, network.max_det, network.multi_label)
    K = len(model.names)
    pairs = [[(rows[:, :4], F.one_hot(rows[:, 5].long(), K) * rows[:, 4:5]) for rows in lists]
             for lists in (want, [rows[rows[:, 4] > 0] for rows in got[0]])]
    return largest_error(*pairs, min_score)


def rounding(model, images):
    """
    largest_error of eager in float32 compared with eager in float64: what rounding alone does to the answers. It
    depends on the depth, the weights and the processor, so that no fixed limit would hold.
    """
    exact = copy.deepcopy(model).double()
    exact, single = exact.decode(exact(images.double())[0]), model.decode(model(images)[0])
    return largest_error(zip(*exact, strict=True), zip(*single, strict=True))


def error_limits(worst_rounding, shape):
    """
    How far an fp32 file may be from eager, (pixels, score): ten times the rounding error of eager itself. Two float32
    programs that add up in different orders differ by about twice that; a wrong graph, by a thousand times. Where
    eager happens to be exact, a few units in the last place of the image side and of a score.
    """
    eps = torch.finfo(torch.float32).eps
    return [max(10 * r, 16 * eps * size) for r, size in zip(worst_rounding, (max(shape), 1), strict=True)]


def pictures(dataset, shape, count):
    """The first `count` images of the dataset, each (1, 3, H, W) float32 in 0..1; drawn ones if there is no dataset."""
    for i in range(min(count, len(dataset)) if dataset else count):
        if dataset:
            image = dataset[(0, i)]['image']
        else:
            image = to_tensor(letterbox(draw_shapes(np.random.default_rng(i))[0], shape)[0])          # (3, H, W)
        yield image[None].float() / 255


@torch.no_grad()
def check(model, network, path, shape, dynamic=False, dataset=None, min_score=0.0):
    """Print how the file compares with the model; -> the largest errors (pixels, score) and what rounding explains."""
    run, batches = reload(path), list(pictures(dataset, shape, 8))
    first = batches[0]
    if dynamic:                                      # and two in one batch at half the size, where k may exceed N
        half = [max(64, side // 64 * 32) for side in shape]
        batches.append(F.interpolate(torch.cat((first, batches[-1])), half, mode='bilinear', antialias=True))
    worst = np.max([difference(model, network, run, x, min_score) for x in batches], 0).tolist()
    explained = np.max([rounding(model, x) for x in batches], 0).tolist()
    where = f', where scores reach {min_score}' if min_score else ''
    table = {'ms per image': [1e3 * np.median(timeit.repeat(lambda f=f: f(first), number=1, repeat=11))
                              for f in (lambda x: model.decode(model(x)[0]), run)],
             f'largest box error, px{where}': [explained[0], worst[0]], 'largest score error': [explained[1], worst[1]]}
    if dataset and path.endswith('.onnx'):
        above = f' (the file: above {network.conf})' if network.detections else ''
        table[f'AP on {len(dataset)} images{above}'] = [
            evaluate(m, dataset, shape, verbose=False)['AP'] for m in (model, OnnxModel(path))]
    print(f'{path}: {os.path.getsize(path) / 1e6:.2f} MB; {len(batches)} batches of '
          f'{"the data" if dataset else "drawn images"}, {shape[0]}x{shape[1]}; errors of eager: against float64')
    print(f'{"":<50}{"eager":>10}{"export":>10}')
    for name, row in table.items():
        print(f'{name:<50}' + ''.join(f'{"" if value is None else f"{value:.4g}":>10}' for value in row))
    return worst, explained


def check_settings(path, suffix):
    """Raises InputError for settings that exclude each other, or a file that cannot be written."""
    for wrong, sentence in (
            (format not in ('onnx', 'torch_export'), f'--format={format}: it is onnx or torch_export'),
            (precision not in ('fp32', 'fp16', 'int8'), f'--precision={precision}: it is fp32, fp16 or int8'),
            (weights.endswith(('.onnx', '.pt2')),
             f'--weights={weights} is an export already: give the .pt it was made of'),
            (not 0 <= conf <= 1, f'--conf={conf}: a score lies in 0..1'),
            (not 0 <= nms_iou <= 1, f'--nms_iou={nms_iou}: an overlap lies in 0..1'),
            (suffix == '.pt2' and (precision == 'int8' or nms),
             '--format=torch_export has neither int8 nor NMS inside: use --format=onnx'),
            (precision == 'int8' and not calibration,
             '--precision=int8 needs images to measure the range of activations: add --calibration=train.json'),
            (not path.endswith(suffix), f'--out={path}: a file of --format={format} ends in {suffix}'),
            (os.path.exists(weights) and not os.access(os.path.dirname(path) or '.', os.W_OK),
             f'{path} cannot be written: name another, --out=')):
        if wrong:
            raise InputError(sentence)


def main():
    suffix = '.onnx' if format == 'onnx' else '.pt2'
    path = out or os.path.splitext(weights)[0] + ('' if precision == 'fp32' else f'_{precision}') + suffix
    check_settings(path, suffix)
    model = load_model(weights, nms=not one2one).to(memory_format=torch.contiguous_format)
    if one2one and getattr(model, 'one2one_head', None) is None:
        raise InputError(f'--one2one=True: {weights} has no one-to-one head, train with --one2one=True or leave the '
                         'setting out')
    shape = input_shape(model, imgsz)
    dataset = open_data(data, model.names, images, imgsz=shape) if data else None
    seen = DetectionDataset(calibration, imgsz=shape) if precision == 'int8' else None
    settings = dict(nms=nms, conf=conf, iou=nms_iou, max_det=max_det, multi_label=multi_label)
    export = export_onnx if format == 'onnx' else export_torch
    network = export(model, path, shape, dynamic, precision, model.best_f1, **settings)
    if precision == 'int8':
        quantise(path, (x.numpy() for x in pictures(seen, shape, 64)), symmetric)
    worst, explained = check(model, network, path, shape, dynamic, dataset, 0.0 if precision == 'fp32' else 0.25)
    limits = error_limits(explained, shape)
    if precision == 'fp32' and not (worst[0] <= limits[0] and worst[1] <= limits[1]):
        raise SystemExit(f'error: {path} computes something else: it is {worst[0]:.3g} px and {worst[1]:.3g} of score '
                         f'away from eager, where {limits[0]:.3g} and {limits[1]:.3g} are allowed: do not use it')


if __name__ == '__main__':
    configure(globals())
    main()

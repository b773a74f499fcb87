"""
COCO evaluation of a detector: this file produces the boxes, pycocotools matches them and computes every AP.

    python eval.py --weights=out/best.pt --data=path/val.json                      at the size it was trained at
    python eval.py --weights=yolov8n.pt --data=val.json --imgsz=640 --rect=True --antialias=False    as YOLOv8's figures
    python eval.py --weights=best.onnx --data=val.json --by_class=True --plots=True
    python eval.py --weights=out/best.pt --data=val.json --nms_iou=0.5,0.6,0.7     the NMS threshold with the best AP
    python eval.py --weights=out/best.pt --data=val.json --without=block4,block5   what do the attention blocks add?
    python eval.py --weights=out/best.pt --data=val.json --report=True             out/report.html: all of it, a page
    python eval.py --from_json=detections.json --data=val.json                     another program's, in COCO's format

The last line is json: the twelve COCO numbers, null where there are no objects, and whatever else was computed.
`evaluate` is what train.py calls: the same numbers, computed by one process or by several.

Best F1. AP looks at all scores; an application needs one threshold. We report the score above which F1 = 2PR / (P + R)
is largest, with its precision and recall, from pycocotools' matches at IoU 0.5, over all classes and for each class.

Occlusion. An object's overlap is the largest IoU of its box with any other object's box in the image, of whatever class
(crowd regions excluded). Objects fall into bins: up to 0.1, to 0.3, to 0.5, and above, which is "heavy overlap";
"extreme crowd" is every object of the images that hold more than 20. A bin is computed like COCO's AP_small: objects
outside it are *ignored*, and a detection matched to one of them counts neither as true nor as false. pycocotools does
this by area, and so do we: on a copy, an object's `area` is the number of its bin and the area range is that number.
There is one trap. pycocotools also ignores unmatched detections whose own area lies outside the range, which is right
for sizes (a large false positive is no small object) and wrong here, where a false positive has no overlap bin. So
detections get the area NaN: it compares false with both limits of a range, so it never lies outside of one, and an
unmatched detection is a false positive in *every* bin. A bin with few objects then bears the false positives of all:
compare models by AP, bins by recall.

What it does not do: masks, keypoints, test-time augmentation, any AP of its own.
Papers: COCO, Lin et al. 2014 (1405.0312); recall by overlap, CrowdHuman, Shao et al. 2018 (1805.00123).
"""
import collections
import concurrent.futures
import contextlib
import io
import json
import math
import os
import re
import sys
import time

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from checkpoint import check_best_f1, read_weights
from configurator import InputError, configure
from data import PAD_VALUE, DetectionDataset, letterbox, load_image, rect_shape
from labels import evaluation_part, ground_truth, read_coco, read_labels
from model import HSVDET, select_detections

weights = ''                        # out/best.pt, a YOLOv8 .pt, or an .onnx of export.py
data = ''                           # the ground truth: what labels.read_labels takes, COCO json, YOLO, VOC
images = ''                         # folder of the images of a COCO json; '' looks beside it
from_json = ''                      # evaluate the detections in this file, without any model
imgsz: int | tuple = 0              # pixels, or (H, W); 0: the size of training, else 640
rect = False                        # batches of like aspect ratio, each in the smallest shape with half a cell of slack
antialias = True                    # as in training; False: sample images as for YOLOv8's figures
batch_size = 16
conf = 0.001                        # lowest score; AP wants nearly all detections
nms_iou: float | tuple = 0.7        # several, 0.5,0.6,0.7, make a table
max_det = 300                       # detections per image
nms = True                          # False: the one-to-one head, without suppression
attn = ''                           # other blocks than the weights have, such as -SS; '': the same
eval_layers = 0                     # RT-DETR: decoder layers that run (early exit); 0: as trained
queries = 0                         # RT-DETR: the most objects it can report; 0: as trained
without = ''                        # take these blocks out of the trained model: block4,block5, or p4,p5
fuse = True                         # BatchNorm folded into convolutions
dtype = 'float32'                   # float32, bfloat16, float16: of the network; its attention stays float32
device = 'cuda' if torch.cuda.is_available() else 'cpu'
by_class = False                    # AP and best F1 of each class
occlusion = True                    # AP and recall by overlap
plots = False                       # precision-recall curves and confusion matrix as png
report = False                      # report.html, a page with every figure and pictures of the mistakes: report.py
out_dir = ''                        # for detections.json, png, report.html; '': none, out/eval with plots, and the
                                    # report beside the weights or from_json

KEYS = ['AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large',
        'AR1', 'AR10', 'AR100', 'AR_small', 'AR_medium', 'AR_large']
BINS = ['0-0.1', '0.1-0.3', '0.3-0.5', '>0.5 (heavy overlap)', '>20 objects (extreme crowd)']


# --- models ----------------------------------------------------------------------------------------------------------

def warn(sentence):
    print(f'warning: {sentence}', file=sys.stderr)


def onnx_providers(device, available):
    """What onnxruntime shall run on. Its CUDA defaults are GPU 0 and TF32; we mean `device`, and float32."""
    if device == 'cpu' or 'CUDAExecutionProvider' not in available:
        return ['CPUExecutionProvider']
    options = dict(device_id=int(device.partition(':')[2] or 0), use_tf32=0)
    return [('CUDAExecutionProvider', options), 'CPUExecutionProvider']


class OnnxModel(torch.nn.Module):
    """A file of export.py as a detector: forward and postprocess, and the attributes of HSVDET."""

    def __init__(self, path, device='cpu'):
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise InputError(f'{path} needs onnxruntime to run: pip install onnxruntime') from None
        try:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            providers = onnx_providers(device, onnxruntime.get_available_providers())
            self.session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as e:                                       # onnxruntime's errors have no common base class
            why = str(e).splitlines()[0]
            raise InputError(f'{path} is not a network that onnxruntime can run ({why}): export it again') from None
        if device != 'cpu' and 'CUDAExecutionProvider' not in self.session.get_providers():
            warn(f'{path} runs on the CPU: for --device={device} onnxruntime needs pip install onnxruntime-gpu')
        metadata = self.session.get_modelmeta().custom_metadata_map
        if 'names' not in metadata:
            raise InputError(f'{path} has no class names in its metadata: make it with python export.py --weights=...')
        self.nms = metadata.get('nms') != 'False'                    # an RT-DETR and a one-to-one head need none
        self.rect = metadata.get('arch') != 'rtdetr'                 # see HSVDET
        self.conf = metadata.get('conf')                             # of the NMS inside the file, if it has one
        self.has_detections = 'detections' in [output.name for output in self.session.get_outputs()]
        entry = self.session.get_inputs()[0]
        self.input_name, self.input_type = entry.name, np.float16 if entry.type == 'tensor(float16)' else np.float32
        try:
            self.names, imgsz, best_f1 = (json.loads(metadata.get(k, 'null')) for k in ('names', 'imgsz', 'best_f1'))
            B, _, H, W = entry.shape                                 # a name instead of a number: any
            if not (isinstance(self.names, list) and self.names and all(isinstance(n, str) for n in self.names)):
                raise ValueError('its names are no list of words')
            if imgsz is not None and not (isinstance(imgsz, list) and all(type(n) is int for n in imgsz)):
                raise ValueError('its imgsz is not two numbers')
            if isinstance(B, int) and not 0 < B <= 4096:
                raise ValueError(f'it wants {B} images at once')
        except (ValueError, RecursionError) as e:                    # of json too
            raise InputError(f'{path} is not as export.py writes it ({e}): export it again') from None
        self.path, self.batch, self.frames = path, B if isinstance(B, int) else 0, 0
        self.fixed_imgsz = (H, W) if isinstance(H, int) else None
        self.imgsz = self.fixed_imgsz or imgsz
        self.best_f1 = check_best_f1(best_f1, path)

    def blocks(self):
        return {}

    def forward(self, images, targets=None):
        """images (B, 3, H, W) -> [boxes (B, A, 4), scores (B, A, K)] or [detections (B, max_det, 6)]; no losses."""
        B, n = len(images), self.batch or len(images)
        x = np.pad(images.cpu().numpy().astype(self.input_type), ((0, -B % n), (0, 0), (0, 0), (0, 0)))
        try:
            parts = [self.session.run(None, {self.input_name: x[i:i + n]}) for i in range(0, B, n)]
            raw = [torch.from_numpy(np.concatenate(p)[:B]).float() for p in zip(*parts, strict=True)]
        except Exception as e:                                       # as above
            raise InputError(f'{self.path} fails on images {tuple(x[:n].shape)} ({" ".join(str(e).split())[:200]}): '
                             'export it again') from None
        shapes, ends = [tuple(r.shape) for r in raw], [6] if self.has_detections else [4, len(self.names)]
        if shapes != [(B, shapes[0][1:2] and shapes[0][1], end) for end in ends]:
            raise InputError(f'{self.path} gives {shapes}, not what export.py writes for {len(self.names)} classes: '
                             'export it again')
        return raw, {}

    def postprocess(self, raw, conf=0.25, iou=0.7, max_det=300, multi_label=False):
        """As HSVDET's; where NMS is inside the file, iou and multi_label are the file's own."""
        if self.has_detections:                                      # its empty rows have score 0
            return [d[d[:, 4] > conf][:max_det] for d in raw[0]]
        return [select_detections(b, s, conf, iou, max_det, multi_label, self.nms) for b, s in zip(*raw, strict=True)]


def load_model(path, device='cpu', fuse=True, nms=True, **overrides):
    """
    A checkpoint of ours (HSVDET or RT-DETR), a YOLOv8 .pt, or an .onnx, in evaluation mode on `device`. nms=False: the
    one-to-one head's detections, or those of the only head, without suppression. overrides: attn, of
    HSVDETConfig, or eval_layers and queries, of DETRConfig.
    The model's attribute best_f1 is what `evaluate` found for these weights in training, or None.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise InputError(f'weights "{path}" not found: give --weights=, or train with python train.py config/shapes.py')
    if not re.fullmatch(r'cpu|cuda(:\d+)?', device):
        raise InputError(f'--device={device}: must be cpu, cuda or cuda:n')
    if device.startswith('cuda') and not torch.cuda.is_available():
        raise InputError(f'--device={device}: this machine has no such device, use --device=cpu')
    saved = None if path.endswith('.onnx') else read_weights(path)
    known = () if saved is None else ('eval_layers', 'queries') if saved['arch'] == 'rtdetr' else ('attn',)
    for name, value in overrides.items():
        if name not in known:
            raise InputError(f'--{name}={value}: {path} has nothing of this kind to choose, leave the setting out')
    if saved is None:
        model = OnnxModel(path, device)
    else:
        from baselines.detr import DETR
        model = (DETR if saved['arch'] == 'rtdetr' else HSVDET).from_pretrained(path, **overrides)
        model.best_f1 = saved['best_f1']
    if model.nms and not nms:                                        # a detector that never needs NMS stays as it is
        model.nms, model.best_f1 = False, None                       # that threshold was the other answers'
    if fuse and not isinstance(model, OnnxModel):
        model.fuse()
    if device.startswith('cuda'):
        torch.backends.cudnn.allow_tf32 = False                      # float32 means float32, in convolutions too
    return model.eval().to(device, memory_format=torch.channels_last)


def remove_blocks(model, names):
    """Replace attention blocks, named block4 or p4, by the identity, which is what their residual connection leaves."""
    blocks = {level.replace('p', 'block'): block for level, block in model.blocks().items()}
    for name in names:
        block = name.replace('p', 'block')
        if block not in blocks:
            there = ', '.join(blocks) or 'none at all'
            raise InputError(f'--without={name}: the model has no such attention block, it has {there}')
        path = next(path for path, module in model.named_modules() if module is blocks[block])
        model.set_submodule(path, torch.nn.Identity())
        print(f'attention block {path} taken out')


def open_data(source, names, images='', **settings):
    """The dataset; its classes in the order of the model's `names`, if the model knows all of them."""
    source = evaluation_part(source)
    dataset = DetectionDataset(source, images=images, **settings)
    if set(dataset.names) <= set(names) and list(names) != list(dataset.names):
        dataset = DetectionDataset(source, images=images, names=names, **settings)
    return dataset


def input_shape(model, imgsz):
    """(H, W) of the network input: `imgsz`, else the model's, else 640. Raises InputError."""
    shape = imgsz or model.imgsz or 640
    shape = (shape, shape) if isinstance(shape, int) else tuple(shape)
    if model.fixed_imgsz and shape != tuple(model.fixed_imgsz):
        raise InputError(f'--imgsz={imgsz}: this network was exported at {model.fixed_imgsz}, leave the setting out or '
                         'export with --dynamic=True')
    if len(shape) != 2 or any(type(n) is not int or n <= 0 or n % 32 for n in shape):
        raise InputError(f'--imgsz={imgsz}: sides must be multiples of 32, such as 640 or 1088,1920')
    return shape


def predict(model, batch, ious, conf, max_det=300, multi_label=False, dtype='float32', device='cpu', state=None):
    """
    batch, a list of (H, W, 3) uint8, or of clips (F, H, W, 3); or, with state, of the next frames of one video, for
    which the list `state` holds what HSVDET.forward_frame returned, [None] at its start -> for each NMS threshold of
    `ious` a list of (n, 6) float64 arrays, boxes in input pixels; seconds in the network; seconds after it.
    """
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise InputError(f'--dtype={dtype}: must be float32, bfloat16 or float16')

    def now():
        if device.startswith('cuda'):
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    x = torch.from_numpy(np.stack(batch)).to(device).movedim(-1, -3).float() / 255            # (B, 3, H, W)
    with torch.no_grad(), torch.autocast(device.split(':')[0], getattr(torch, dtype), enabled=dtype != 'float32'):
        if state is None:
            raw, _ = model(x)
        else:
            maps = []
            for frame in x.split(1):
                one, state[0] = model.forward_frame(frame, state[0])
                maps.append(one)
            raw = [torch.cat(level) for level in zip(*maps, strict=True)]
    middle = now()
    with torch.no_grad():
        rows = [model.postprocess(raw, conf, iou, max_det, multi_label) for iou in ious]
    rows = [[d.cpu().double().numpy() for d in one] for one in rows]
    return rows, middle - start, now() - middle


# --- from images to detections ---------------------------------------------------------------------------------------

def cpu_count():
    """The processor cores that this process may use, which in a container are fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def undo_letterbox(rows, scale, corner, size):
    """Detections (n, 6) in input pixels -> in pixels of the image of `size` (w, h), clipped to it."""
    return np.concatenate([((rows[:, :4] - np.tile(corner, 2)) / scale).clip(0, np.tile(size, 2)), rows[:, 4:]], 1)


def read_photo(dataset, row, back=0):
    """An image of a dataset, or the frame `back` before it; grey where it cannot be read."""
    size = tuple(dataset.sizes[row].tolist())
    try:
        return load_image(dataset.clip_files(row)[-1 - back], size)
    except InputError:
        return Image.new('RGB', size, (PAD_VALUE,) * 3)


def load_sample(dataset, row, shape, longest, antialias):
    """
    -> row, canvas (H, W, 3) or of a clip (F, H, W, 3), scale, corner, seconds, error: None, or why the image cannot be
    used (all is grey). An earlier frame that cannot be used is grey.
    """
    start = time.perf_counter()
    clip = (dataset.frames + 1,) if dataset.frames else ()
    try:
        last = load_image(dataset.files[row], tuple(dataset.sizes[row]))
    except InputError as e:
        return row, np.full((*clip, *shape, 3), PAD_VALUE, np.uint8), 1.0, (0, 0), 0.0, e
    images = [*(read_photo(dataset, row, back) for back in range(dataset.frames, 0, -1)), last]
    frames = [letterbox(image, shape, longest, antialias) for image in images]
    canvas = np.stack([frame for frame, _, _ in frames]) if clip else frames[0][0]
    return row, canvas, *frames[-1][1:], time.perf_counter() - start, None


def load_batches(dataset, batches, shape, rect, antialias):
    """Yields lists of `load_sample`'s results, one for each batch of rows; threads are at work on the next two."""
    with concurrent.futures.ThreadPoolExecutor(min(8, cpu_count())) as pool:
        def submit(rows):
            how = (shape, math.inf, antialias)
            if rect:
                how = (rect_shape(dataset.sizes[rows], max(shape)), max(shape), antialias)
            return [pool.submit(load_sample, dataset, row, *how) for row in rows]

        ahead = collections.deque(submit(rows) for rows in batches[:2])
        for b in range(len(batches)):
            loaded = [job.result() for job in ahead.popleft()]
            ahead.extend(submit(rows) for rows in batches[b + 2:b + 3])
            yield loaded


def image_batches(sizes, batch_size, rect=False, rank=0, world_size=1):
    """This rank's batches, arrays of rows of `sizes` (n, 2) w h; under rect those of like aspect ratio together."""
    order = np.argsort(sizes[:, 1] / sizes[:, 0], kind='stable') if rect else np.arange(len(sizes))
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)][rank::world_size]


def predict_dataset(model, dataset, imgsz, batch_size=16, rect=False, conf=0.001, ious=(0.7,), max_det=300,
                    dtype='float32', device='cpu', rank=0, world_size=1, antialias=True, verbose=True):
    """
    Detections in this rank's share of the images: for each NMS threshold an array (n, 7) of image id, x, y, w, h,
    score, category id, boxes in original pixels; and a Counter of seconds. The model's training mode is kept.
    """
    if len(model.names) != len(dataset.names):
        raise InputError(f'the model has {len(model.names)} classes, the data has {len(dataset.names)}: give data with '
                         'the classes of the model')
    shape, category_ids, sizes = input_shape(model, imgsz), np.asarray(dataset.category_ids), dataset.sizes
    rect = rect and not model.fixed_imgsz
    batches = image_batches(sizes, batch_size, rect, rank, world_size)
    clock = collections.Counter(images=sum(map(len, batches)))
    tables, errors, done = [[np.zeros((0, 7))] for _ in ious], [], 0
    modes = {module: module.training for module in model.modules()}  # a frozen part may differ from the rest
    model.eval()
    start = shown = time.perf_counter()
    for loaded in load_batches(dataset, batches, shape, rect, antialias):
        canvases = [canvas for _, canvas, *_ in loaded]
        results, network, after = predict(model, canvases, ious, conf, max_det, True, dtype, str(device))
        clock.update(network=network, nms=after)
        for j, (row, _, scale, corner, seconds, error) in enumerate(loaded):
            if error:
                errors.append(error)
                continue
            clock['load'] += seconds
            for table, result in zip(tables, results, strict=True):
                d = undo_letterbox(result[j], scale, corner, sizes[row])
                image_ids = np.full(len(d), dataset.image_ids[row])
                table.append(np.column_stack([image_ids, d[:, :2], d[:, 2:4] - d[:, :2], d[:, 4],
                                              category_ids[d[:, 5].astype(int)]]))
        done, now = done + len(loaded), time.perf_counter()
        if verbose and rank == 0 and (now - shown > 0.5 or done == clock['images']):
            shown, rate = now, done / (now - start)
            print(f'\revaluating {done}/{clock["images"]} images, {rate:.1f}/s, '
                  f'{(clock["images"] - done) / rate:.0f} s left  ', end='', file=sys.stderr, flush=True)
    if verbose and rank == 0:
        print(file=sys.stderr)
    for module, mode in modes.items():
        module.training = mode
    clock['all'] = time.perf_counter() - start
    if errors and len(errors) == len(sizes):
        raise InputError(f'not one image can be used: {errors[0]}')
    if errors:
        warn(f'{len(errors)} images cannot be used, their objects count as missed; the first: {errors[0]}')
    return [np.concatenate(table) for table in tables], clock


# --- matching and AP: pycocotools ------------------------------------------------------------------------------------

def match_detections(objects, detections, binned=False, **params):
    """Annotations and detections (n, 7) -> a COCOeval after evaluate(); ids are positions + 1. params: COCOeval's."""
    gt, dt, keys = COCO(), COCO(), ('image_id', 'category_id', 'bbox', 'area', 'iscrowd')
    gt.dataset = dict(images=[], categories=[], annotations=[
        dict({key: a[key] for key in keys}, id=i) for i, a in enumerate(objects, 1)])
    dt.dataset = dict(images=[], categories=[], annotations=[
        dict(id=i, image_id=int(image), category_id=int(category), bbox=[x, y, w, h], score=score,
             area=np.nan if binned else w * h)
        for i, (image, x, y, w, h, score, category) in enumerate(detections.tolist(), 1)])
    gt.createIndex()
    dt.createIndex()
    coco_eval = COCOeval(gt, dt, 'bbox')
    coco_eval.params.imgIds = sorted({*gt.imgToAnns, *dt.imgToAnns})         # in the others there is nothing to match
    for name, value in params.items():
        setattr(coco_eval.params, name, value)
    coco_eval.evaluate()
    return coco_eval


def matched_scores(coco_eval):
    """
    One class, all sizes, IoU 0.5 -> scores (n,) of its detections, whether each was matched to an object (n,), and the
    number of objects; crowd regions, and what was matched to them, left out.
    """
    scores, correct, objects = [np.zeros(0)], [np.zeros(0, bool)], 0
    images = len(coco_eval.params.imgIds)
    for e in filter(None, coco_eval.evalImgs[:images]):              # ordered by area range, of which "all" comes first
        counted = ~e['dtIgnore'][0].astype(bool)
        scores.append(np.array(e['dtScores'])[counted])
        correct.append(e['dtMatches'][0][counted] > 0)
        objects += int((np.array(e['gtIgnore']) == 0).sum())
    return np.concatenate(scores), np.concatenate(correct), objects


def run_cocoeval(coco_gt, detections, bins=None):
    """
    A COCO dict and detections (n, 7) of predict_dataset -> a COCOeval after accumulate(), with one more attribute,
    `matches`: {category id: matched_scores}. With bins, one number for each annotation, the area ranges are the bins
    0, 1, 2, 3 (see the top), and there are no `matches`.

    One class at a time, as classes never meet: pycocotools makes a few kB of Python objects per detection, which for
    5,000 images with 300 each would be 3 GB.
    """
    by_category = {c['id']: [] for c in coco_gt['categories']}
    for i, a in enumerate(coco_gt['annotations']):
        by_category[a['category_id']].append(a if bins is None else dict(a, area=bins[i]))
    parts, matches = [], {}
    with contextlib.redirect_stdout(io.StringIO()):                  # pycocotools prints
        for category in sorted(by_category):
            mine = detections[detections[:, 6] == category]
            # COCO's figures look at the 100 best detections of a class in an image; a threshold needs all of them
            how = (dict(maxDets=[1, 10, 100, max(101, len(mine))]) if bins is None else
                   dict(binned=True, areaRng=[[b, b] for b in range(4)]))
            coco_eval = match_detections(by_category[category], mine, catIds=[category], **how)
            if bins is None:
                matches[category] = matched_scores(coco_eval)
            coco_eval.accumulate()
            parts.append(coco_eval.eval)
    coco_eval.eval = dict(precision=np.concatenate([p['precision'] for p in parts], 2),
                          recall=np.concatenate([p['recall'] for p in parts], 1))
    coco_eval.params.catIds, coco_eval.matches = sorted(by_category), matches
    return coco_eval


def coco_summary(coco_eval):
    """The twelve COCO numbers as a dict; None: no such objects."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval.summarize()
    return {key: None if value < 0 else float(value) for key, value in zip(KEYS, coco_eval.stats, strict=True)}


def best_f1(coco_eval, category=None):
    """
    dict(score, P, R, F1): the threshold (detections of this score and above stay) at which F1 of a category, or of all
    categories counted together, is largest at IoU 0.5. All None without objects or without detections.
    """
    parts = list(coco_eval.matches.values()) if category is None else [coco_eval.matches[category]]
    scores, correct = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    objects = sum(part[2] for part in parts)
    if not objects or not len(scores):
        return dict(score=None, P=None, R=None, F1=None)
    order = np.argsort(-scores, kind='stable')
    scores, true_positives = scores[order], correct[order].cumsum()  # (n,) each
    f1 = 2 * true_positives / (np.arange(1, len(scores) + 1) + objects)
    f1[:-1][scores[1:] == scores[:-1]] = -1                          # no threshold separates equal scores
    best = f1.argmax()
    metrics = dict(P=true_positives[best] / (best + 1), R=true_positives[best] / objects, F1=f1[best])
    return dict(score=float(scores[best])) | {name: round(float(value), 5) for name, value in metrics.items()}


def evaluate(model, dataset, imgsz, rank=0, world_size=1, **settings):
    """
    The twelve COCO numbers as a dict, the same on every rank and for any number of ranks; None: no such objects. With
    them best_f1: its score, P, R and F1 over all classes, and by_class, the same of each class by name.
    settings: those of predict_dataset. The model keeps its training mode.
    """
    (table,), _ = predict_dataset(model, dataset, imgsz, rank=rank, world_size=world_size, **settings)
    parts, numbers = [table] + [None] * (world_size - 1), [None]
    if world_size > 1:
        torch.distributed.gather_object(table, parts if rank == 0 else None)
    if rank == 0:
        coco_gt = dataset.coco()
        coco_eval = run_cocoeval(coco_gt, np.concatenate(parts))
        by_class = {c['name']: best_f1(coco_eval, c['id']) for c in coco_gt['categories']}
        numbers = [coco_summary(coco_eval) | dict(best_f1=best_f1(coco_eval) | dict(by_class=by_class))]
    if world_size > 1:
        torch.distributed.broadcast_object_list(numbers)
    return numbers[0]


# --- more metrics ----------------------------------------------------------------------------------------------------

def mean_metrics(coco_eval, k=slice(None), a=0):
    """AP, AP50, AR100 and the recall at IoU 0.5 of class k (of all) in range a; -1 marks a class without objects."""
    p, r = coco_eval.eval['precision'][:, :, k, a, 2], coco_eval.eval['recall'][:, k, a, 2]     # (T, R, K), (T, K)
    parts = dict(AP=p, AP50=p[:1], AR100=r, recall50=r[:1])
    return {name: round(float(x[x > -1].mean()), 5) if (x > -1).any() else None for name, x in parts.items()}


def per_class(coco_eval, coco_gt):
    """{class name: AP, AP50, AR100, recall50, objects, and best_f1's score, P, R, F1}"""
    count = collections.Counter(a['category_id'] for a in coco_gt['annotations'] if not a['iscrowd'])
    name = {c['id']: c['name'] for c in coco_gt['categories']}
    return {name[i]: dict(mean_metrics(coco_eval, k), objects=count[i], **best_f1(coco_eval, i))
            for k, i in enumerate(coco_eval.params.catIds)}


def under_occlusion(coco_gt, detections):
    """The bins of the top of this file: {bin: AP, AP50, AR100, recall50, objects}"""
    annotations = coco_gt['annotations']
    overlap, company = np.zeros(len(annotations)), np.zeros(len(annotations), int)
    rows = collections.defaultdict(list)
    for i, a in enumerate(annotations):
        if not a['iscrowd']:
            rows[a['image_id']].append(i)
    for r in rows.values():
        boxes = np.array([annotations[i]['bbox'] for i in r], float)
        iou = coco_mask.iou(boxes, boxes, [0] * len(r))
        np.fill_diagonal(iou, 0)
        overlap[r], company[r] = iou.max(1), len(r)
    bins = np.digitize(overlap, [0.1, 0.3, 0.5], right=True)
    coco_eval = run_cocoeval(coco_gt, detections, bins)
    table = {BINS[b]: dict(mean_metrics(coco_eval, a=b), objects=int((bins[company > 0] == b).sum())) for b in range(4)}
    crowded = {image for image, r in rows.items() if len(r) > 20}
    subset = dict(coco_gt, annotations=[a for a in annotations if a['image_id'] in crowded])
    coco_eval = run_cocoeval(subset, detections[np.isin(detections[:, 0], list(crowded))])
    return table | {BINS[4]: dict(mean_metrics(coco_eval), objects=int((company > 20).sum()))}


def match_at_half(coco_gt, detections, by_class=True):
    """
    Matching at IoU 0.5, within the classes or across them -> for each detection the position of its annotation, -1
    where it has none (a false positive), -2 where it counts neither way, in a crowd region; which objects were missed.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval = match_detections(coco_gt['annotations'], detections, useCats=int(by_class),
                                     iouThrs=np.array([0.5]), maxDets=[max(1, len(detections))],
                                     areaRng=[[0, 1e10]], catIds=[c['id'] for c in coco_gt['categories']])
    matched, missed = np.full(len(detections), -1), np.zeros(len(coco_gt['annotations']), bool)
    for e in filter(None, coco_eval.evalImgs):
        found, objects = np.array(e['dtIds'], int) - 1, np.array(e['gtIds'], int) - 1
        matched[found] = np.where(e['dtIgnore'][0], -2, e['dtMatches'][0].astype(int) - 1)
        missed[objects] = (e['gtMatches'][0] == 0) & (np.array(e['gtIgnore']) == 0)
    return matched, missed


def confusion(coco_gt, detections, conf=0.25):
    """(K + 1, K + 1) counts at IoU 0.5: rows true class, columns predicted class, the last of each is background."""
    detections = detections[detections[:, 5] >= conf]
    position = {c['id']: k for k, c in enumerate(coco_gt['categories'])}
    true = np.array([position[a['category_id']] for a in coco_gt['annotations']] + [len(position)])   # of -1: the last
    predicted = np.array([position[category] for category in detections[:, 6]], int)
    matched, missed = match_at_half(coco_gt, detections, by_class=False)
    matrix = np.zeros((len(position) + 1, len(position) + 1), int)
    np.add.at(matrix, (true[matched[matched > -2]], predicted[matched > -2]), 1)
    np.add.at(matrix, (true[:-1][missed], -1), 1)
    return matrix


def duplicates(coco_gt, detections, conf=0.25):
    """
    Detections per object beyond the first: those of score >= conf that overlap an object of their class by IoU >= 0.5,
    each counted for the object it overlaps most. Without suppression this is what NMS would have had to remove.
    """
    detections, boxes, extra = detections[detections[:, 5] >= conf], collections.defaultdict(list), 0
    for a in coco_gt['annotations']:
        if not a['iscrowd']:
            boxes[a['image_id'], a['category_id']].append(a['bbox'])
    for (image, category), gt_boxes in boxes.items():
        mine = detections[(detections[:, 0] == image) & (detections[:, 6] == category), 1:5]
        if len(mine):
            iou = coco_mask.iou(mine, np.array(gt_boxes, float), [0] * len(gt_boxes))           # (detections, objects)
            count = np.bincount(iou.argmax(1)[iou.max(1) >= 0.5], minlength=len(gt_boxes))
            extra += (count - 1).clip(0).sum()
    return round(float(extra / max(1, sum(map(len, boxes.values())))), 4)


# --- python eval.py --------------------------------------------------------------------------------------------------

def read_detections(path, coco_gt):
    """A COCO results file, [{image_id, category_id, bbox, score}, ...] -> (n, 7) as of predict_dataset."""
    try:
        with open(path, encoding='utf-8') as f:
            rows = [[d['image_id'], *d['bbox'], d['score'], d['category_id']] for d in json.load(f)]
        table = np.array(rows, float).reshape(len(rows), 7)
    except OSError as e:
        raise InputError(f'--from_json={path}: {e.strerror}, check the path') from None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as e:
        raise InputError(f'{path} must be a list of COCO results, each with image_id, category_id, bbox [x, y, w, h] '
                         f'and score; this one is not ({type(e).__name__}: {e})') from None
    for column, what, known in ((0, 'image', coco_gt['images']), (6, 'category', coco_gt['categories'])):
        unknown = set(table[:, column]) - {item['id'] for item in known}
        if unknown:
            raise InputError(f'{path} does not belong to --data: {len(unknown)} of its {what} ids are not in the '
                             f'ground truth, such as {min(unknown):.0f}')
    return table


def write_detections(table, path):
    """(n, 7) as of predict_dataset -> a COCO results file."""
    with open(path, 'w', encoding='utf-8') as f:
        json.dump([dict(image_id=int(image), category_id=int(category), bbox=[round(v, 3) for v in box],
                        score=round(score, 6)) for image, *box, score, category in table.tolist()], f)


def print_warnings(model, dataset):
    for kind, (count, example) in dataset.issues.items():
        if kind.startswith('image'):
            warn(f'{count} x {kind}, such as {example}')
    if list(model.names) != list(dataset.names):
        warn(f"the model's classes are {', '.join(model.names[:5])}, the data's {', '.join(dataset.names[:5])}")
    if not nms and isinstance(model, HSVDET) and model.one2one_head is None:
        warn('--nms=False on a model without a one-to-one head: its duplicates stay and count as false')
    if isinstance(model, OnnxModel) and model.has_detections:
        warn(f'NMS is inside the file: the settings here do not apply, and AP lacks all scores below {model.conf}')


def run_model(settings):
    """The model on the data; settings: those of predict_dataset -> model, dataset, predict_dataset's result."""
    chosen = dict(attn=attn, eval_layers=eval_layers, queries=queries)
    model = load_model(weights, device, fuse, nms,
                       **{name: value for name, value in chosen.items() if value})
    remove_blocks(model, [name for name in without.split(',') if name])
    dataset = open_data(data, model.names, images, frames=model.frames)
    print_warnings(model, dataset)
    tables, clock = predict_dataset(model, dataset, **settings)
    parts = ', '.join(f'{part} {clock["images"] / (clock[part] + 1e-9):.0f}' for part in ('load', 'network', 'nms'))
    print(f'{clock["images"]} images, {clock["images"] / clock["all"]:.2f} images/s; each part alone: {parts} images/s '
          '(loading overlaps the others)')
    return model, dataset, tables, clock


def show(title, table):
    """{name: {column: number}} as aligned lines."""
    width = max(map(len, [title, *table]))
    print(f'\n{title:<{width}}' + ''.join(f'{key:>10}' for key in next(iter(table.values()))))
    for name, row in table.items():
        cells = ['-' if v is None else str(v) if isinstance(v, int) else f'{v:.3f}' for v in row.values()]
        print(f'{name:<{width}}' + ''.join(f'{cell:>10}' for cell in cells))


def predict_or_read(settings):
    """
    What is to be evaluated -> ground truth; for each NMS threshold a table (n, 7); figures of speed; and model,
    dataset and predict_dataset's clock, all None with from_json.
    """
    if from_json:                                                    # no image is needed
        coco_gt = (ground_truth(read_coco(data)) if data.endswith('.json') else
                   read_labels(evaluation_part(data), images).coco())
        return coco_gt, [read_detections(from_json, coco_gt)], {}, None, None, None
    model, dataset, tables, clock = run_model(settings)
    coco_gt = dataset.coco()
    known = [c['id'] for c in coco_gt['categories']]                 # the model may have classes that the data has not
    speed = dict(images=clock['images'], images_per_s=round(clock['images'] / clock['all'], 2))
    return coco_gt, [table[np.isin(table[:, 6], known)] for table in tables], speed, model, dataset, clock


def main():
    if not data:
        raise InputError('no ground truth given: add --data=path/val.json, or a YOLO folder')
    ious = nms_iou if isinstance(nms_iou, tuple) and not from_json else (nms_iou,)
    for ok, sentence in ((batch_size > 0, f'--batch_size={batch_size}: must be above 0'),
                         (ious, '--nms_iou=(): give one threshold, or several')):
        if not ok:
            raise InputError(sentence)
    folder = out_dir or ('out/eval' if plots else '')
    try:                                                             # before an hour of evaluation, not after it
        os.makedirs(folder or '.', exist_ok=True)
    except OSError as e:
        raise InputError(f'--out_dir={folder} cannot be written ({e.strerror}): name another') from None
    settings = dict(imgsz=imgsz, batch_size=batch_size, rect=rect, conf=conf, ious=ious, max_det=max_det, dtype=dtype,
                    device=device, antialias=antialias)
    coco_gt, tables, speed, model, dataset, clock = predict_or_read(settings)
    evaluations = [run_cocoeval(coco_gt, table) for table in tables]
    numbers = [coco_summary(coco_eval) for coco_eval in evaluations]
    best = max(range(len(tables)), key=lambda i: numbers[i]['AP'] or 0)
    coco_eval, table, summary = evaluations[best], tables[best], numbers[best] | speed
    if summary['AP'] is None:
        print('the ground truth has no objects: there is no AP')
    elif not len(table):
        print('no detections at all: AP is 0')
    if len(ious) > 1:
        summary |= dict(nms_iou=ious[best], sweep={iou: one['AP'] for iou, one in zip(ious, numbers, strict=True)})
        columns = ('AP', 'AP50', 'AP75', 'AR100')
        show('NMS IoU', {str(iou): {key: one[key] for key in columns} for iou, one in zip(ious, numbers, strict=True)})
    if by_class or report:
        summary['by_class'] = per_class(coco_eval, coco_gt)
        show('class', summary['by_class'])
    if occlusion or report:
        summary['occlusion'] = under_occlusion(coco_gt, table)
        show('overlap with another object', summary['occlusion'])
    summary['best_f1'] = best_f1(coco_eval)
    show('best F1, IoU 0.5', {'all classes': summary['best_f1']})
    summary['duplicates'] = duplicates(coco_gt, table)
    print(f'\nduplicates: {summary["duplicates"]:.3f} per object at score 0.25')
    try:
        if folder and not from_json:
            write_detections(table, os.path.join(folder, 'detections.json'))
        if plots or report:
            from report import draw_plots, make_page  # here, as it imports this file
        if plots:
            draw_plots(coco_eval, coco_gt, table, folder)
        if report:
            with contextlib.suppress(InputError):                    # images that are elsewhere: then no pictures
                dataset = dataset or DetectionDataset(evaluation_part(data), images=images)
            folder = folder or os.path.dirname(from_json or weights)
            make_page(folder, data, coco_gt, coco_eval, table, summary, dataset, model, weights, clock,
                      settings | dict(ious=(ious[best],)))
    except OSError as e:
        raise InputError(f'{e.filename or folder} cannot be written ({e.strerror}): name another --out_dir=') from None
    finally:                                                         # the metrics are not lost with a file
        print(json.dumps(summary))


if __name__ == '__main__':
    configure(globals())
    main()

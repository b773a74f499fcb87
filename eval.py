"""
How good is a detector? pycocotools decides every figure here; we only hand it the boxes.

    python eval.py --weights=out/best.pt --data=path/val.json                  ours, at the size it was trained at
    python eval.py --weights=yolov8n.pt --data=val.json --imgsz=640 --rect=True --antialias=False     as YOLOv8's figures
    python eval.py --weights=best.onnx --data=val.json --by_class=True --plots=True
    python eval.py --weights=out/best.pt --data=val.json --nms_iou=0.5,0.6,0.7
    python eval.py --from_json=detections.json --data=val.json                 found elsewhere, in COCO's results format

The last line is json: the twelve COCO numbers and what was asked for beside them, null where there was nothing to find.
`evaluate` is what train.py calls: the same figures, from as many processes as there are.

Detection under occlusion. An object's overlap is the largest IoU of its box with any other object's box in the image,
of whatever class (crowd regions are no objects). Objects fall into bins: up to 0.1, to 0.3, to 0.5, and above, which
is "heavy overlap"; "extreme crowd" is every object of the images that hold more than 20. A bin is computed like COCO's
AP_small: objects outside it are *ignored*, so that a detection which finds one of them counts neither way. pycocotools
does this by area, and so do we: on a copy, an object's `area` is the number of its bin and the area range is that
number alone. There is one trap. pycocotools also ignores unmatched detections whose own area lies outside of the range,
which is right for sizes (a large false alarm is no small object) and wrong here, where a false alarm overlaps nothing
in particular. So detections get the area NaN, which lies outside of no range, and an unmatched one counts as false in
*every* bin. A bin with few objects then bears the false alarms of all: compare models by AP, bins by recall.

What it does not do: masks, keypoints, test-time augmentation, any AP of its own.
Papers: COCO, Lin et al. 2014 (1405.0312); recall by overlap, CrowdHuman, Shao et al. 2018 (1805.00123).
"""
import collections
import concurrent.futures
import contextlib
import io
import json
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from configurator import configure
from data import PAD_VALUE, DetectionDataset, InputError, ground_truth, letterbox, load_image, read_coco, rect_shape, resize
from model import HSVDET, select_detections

weights = ''                        # out/best.pt, a YOLOv8 .pt, or an .onnx of export.py
data = ''                           # the ground truth: COCO json, or a YOLO folder
images = ''                         # folder of the images; '' looks beside the json
from_json = ''                      # judge these detections instead of running a network
imgsz: int | tuple = 0              # pixels, or (H, W); 0 is what the weights were trained at, else 640
rect = False                        # batches of like aspect ratio, each in the smallest shape with half a cell of slack
antialias = True                    # as in training; False samples images as YOLOv8's figures do
batch_size = 16
conf = 0.001                        # detections below this score are dropped; AP wants nearly all of them
nms_iou: float | tuple = 0.7        # several, 0.5,0.6,0.7, make a table
max_det = 300                       # detections per image
nms = True                          # False: the one-to-one head's answers as they are
attn = ''                           # other blocks than the weights have, such as -SS; '' leaves them
fuse = True                         # BatchNorm folded into convolutions
dtype = 'float32'                   # float32, bfloat16, float16: of the network; its attention stays float32
device = 'cuda' if torch.cuda.is_available() else 'cpu'
by_class = False                    # AP of each class
occlusion = True                    # AP and recall by overlap
plots = False                       # precision-recall curves and confusion matrix as png
out_dir = ''                        # folder for detections.json and pictures; '' writes none ('out/eval' with plots)

# lists, because configure() takes tuples for knobs
KEYS = ['AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large', 'AR1', 'AR10', 'AR100', 'AR_small', 'AR_medium', 'AR_large']
BINS = ['0-0.1', '0.1-0.3', '0.3-0.5', '>0.5 (heavy overlap)', '>20 objects (extreme crowd)']


# --- models ----------------------------------------------------------------------------------------------------------

class OnnxModel(torch.nn.Module):
    """A network of export.py, with as much of HSVDET's face as evaluation and detection look at."""

    def __init__(self, path, device='cpu'):
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise InputError(f'{path} needs onnxruntime to run: pip install onnxruntime') from None
        there, wanted = onnxruntime.get_available_providers(), ['CUDAExecutionProvider', 'CPUExecutionProvider'][device == 'cpu':]
        try:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            self.session = onnxruntime.InferenceSession(path, options, providers=[p for p in wanted if p in there])
        except Exception as e:                                       # onnxruntime's errors have no base class of their own
            raise InputError(f'{path} is not a network that onnxruntime can run ({str(e).splitlines()[0]}): export it again') from None
        metadata = self.session.get_modelmeta().custom_metadata_map
        if 'names' not in metadata:
            raise InputError(f'{path} does not say what its classes are: make it with python export.py --weights=...')
        self.names = json.loads(metadata['names'])
        entry = self.session.get_inputs()[0]
        self.entry, self.kind = entry.name, np.float16 if entry.type == 'tensor(float16)' else np.float32
        B, _, H, W = entry.shape                                     # a name instead of a number where the export left it free
        self.batch, self.fixed = B if isinstance(B, int) else 0, (H, W) if isinstance(H, int) else None
        self.imgsz = self.fixed or json.loads(metadata.get('imgsz', 'null'))
        self.one2one = metadata.get('one2one') == 'True'                # then there is nothing to suppress
        self.ends_in_nms, self.conf = 'detections' in [output.name for output in self.session.get_outputs()], metadata.get('conf')

    def forward(self, images, one2one=False):
        B, n = len(images), self.batch or len(images)
        x = np.pad(images.cpu().numpy().astype(self.kind), ((0, -B % n), (0, 0), (0, 0), (0, 0)))
        parts = [self.session.run(None, {self.entry: x[i:i + n]}) for i in range(0, B, n)]
        return [torch.from_numpy(np.concatenate(p)[:B]).float() for p in zip(*parts, strict=True)], {}

    def decode(self, maps):
        return maps


def load_model(path, device='cpu', fuse=True, **overrides):
    """A checkpoint of ours, a YOLOv8 .pt, or an .onnx, ready to run."""
    if not os.path.exists(path):
        raise InputError(f'weights "{path}" not found: give --weights=, or train some with python train.py config/shapes.py')
    if device.startswith('cuda') and not torch.cuda.is_available():
        raise InputError(f'--device={device}: this machine has no such device, use --device=cpu')
    if path.endswith('.onnx'):
        return OnnxModel(path, device)
    model = HSVDET.from_pretrained(path, **overrides).eval()
    return (model.fuse() if fuse else model).to(device, memory_format=torch.channels_last)


def open_data(source, names, images='', **more):
    """The set, its classes in the order of `names`, the model's, if it has no others."""
    dataset = DetectionDataset(source, images=images, **more)
    known = set(dataset.names) <= set(names) and list(names) != list(dataset.names)
    return DetectionDataset(source, images=images, names=names, **more) if known else dataset


def input_shape(model, imgsz):
    """(H, W) of the network input: what was asked for, else what the model was trained at, else 640."""
    shape, fixed = imgsz or model.imgsz or 640, getattr(model, 'fixed', None)
    shape = (shape, shape) if isinstance(shape, int) else tuple(shape)
    if fixed and shape != fixed:
        raise InputError(f'--imgsz={imgsz}: this network was exported at {fixed}, leave the setting out or export with --dynamic=True')
    if len(shape) != 2 or any(type(n) is not int or n <= 0 or n % 32 for n in shape):
        raise InputError(f'--imgsz={imgsz}: sides must be multiples of 32, such as 640 or 1088,1920')
    return shape


def predict(model, batch, ious, conf, max_det=300, multi_label=False, nms=True, dtype='float32', device='cpu'):
    """
    batch, a list of (H, W, 3) uint8 -> for each NMS threshold of `ious` a list of (n, 6) float64 arrays in network
    pixels; and the seconds in the network and after it.
    """
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise InputError(f'--dtype={dtype}: must be float32, bfloat16 or float16')

    def now():
        if device.startswith('cuda'):
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    x = torch.from_numpy(np.stack(batch)).to(device).permute(0, 3, 1, 2).float() / 255        # channels_last as it comes
    with torch.no_grad(), torch.autocast(device.split(':')[0], getattr(torch, dtype), enabled=dtype != 'float32'):
        maps, _ = model(x, one2one=not nms and getattr(model, 'one2one_head', None) is not None)
    middle = now()
    if getattr(model, 'ends_in_nms', False):                                          # (B, max_det, 6), its empty rows score 0
        rows = [[d[d[:, 4] > conf][:max_det] for d in maps[0]]] * len(ious)
    else:
        pairs = list(zip(*model.decode(maps), strict=True))                           # (A, 4), (A, K) of each image
        nms = nms and not getattr(model, 'one2one', False)
        rows = [[select_detections(*pair, conf, iou, max_det, multi_label, nms) for pair in pairs] for iou in ious]
    rows = [[d.cpu().double().numpy() for d in one] for one in rows]
    return rows, middle - start, now() - middle


# --- from images to detections -----------------------------------------------------------------------------------------

def prepare(image, shape, longest=None, antialias=True):
    """
    data.letterbox, or what YOLOv8's figures were taken with: no enlarging beyond `longest` where a rectangular batch
    leaves slack, and bilinear interpolation that does not look at the pixels it skips (antialias=False).
    """
    if longest is None and antialias:
        return letterbox(image, shape)
    (w, h), (H, W) = image.size, shape
    scale = min(H / h, W / w, (longest or np.inf) / max(w, h))
    nh, nw = max(round(h * scale), 1), max(round(w * scale), 1)
    top, left = (H - nh) // 2, (W - nw) // 2
    x, canvas = torch.from_numpy(np.array(image)).permute(2, 0, 1), np.full((H, W, 3), PAD_VALUE, np.uint8)
    x = resize(x, nh, nw) if antialias else (F.interpolate(x[None].float(), (nh, nw), mode='bilinear')[0] + 0.5).byte()
    canvas[top:top + nh, left:left + nw] = x.permute(1, 2, 0).numpy()
    return canvas, scale, (left, top)


def undo_letterbox(rows, scale, corner, size):
    """(n, 6) detections in network pixels -> in those of the image of `size` (w, h), clipped to it."""
    return np.concatenate([((rows[:, :4] - np.tile(corner, 2)) / scale).clip(0, np.tile(size, 2)), rows[:, 4:]], 1)


def load(dataset, row, shape, *how):
    """-> row, image (H, W, 3), scale, corner, and the seconds it took, or what was wrong with it (then all is grey)."""
    start = time.perf_counter()
    try:
        return row, *prepare(load_image(dataset.files[row], tuple(dataset.sizes[row])), shape, *how), time.perf_counter() - start
    except InputError as e:
        return row, np.full((*shape, 3), PAD_VALUE, np.uint8), 1.0, (0, 0), e


def predict_dataset(model, dataset, imgsz, batch_size=16, rect=False, conf=0.001, ious=(0.7,), max_det=300, dtype='float32', device='cpu',
         rank=0, world_size=1, nms=True, antialias=True, verbose=True):
    """
    What the model sees in the images of this rank's batches -> for each NMS threshold an array (n, 7) of image id,
    x, y, w, h, score, category id in original pixels; and a count of seconds. Threads read the next two batches while
    the network works on this one. Of an image only its detections stay.
    """
    if len(model.names) != len(dataset.names):
        raise InputError(f'the model knows {len(model.names)} classes, the data has {len(dataset.names)}: give the data that it was made for')
    shape, kinds, sizes = input_shape(model, imgsz), np.asarray(dataset.category_ids), np.asarray(dataset.sizes)      # sizes (n, 2) w, h
    rect = rect and not getattr(model, 'fixed', None)
    order = np.argsort(sizes[:, 1] / sizes[:, 0], kind='stable') if rect else np.arange(len(sizes))
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)][rank::world_size]
    clock = collections.Counter(images=sum(map(len, batches)))
    rows_by_iou, unreadable, done = [[np.zeros((0, 7))] for _ in ious], [], 0
    modes = {module: module.training for module in model.modules()}                   # a frozen part may differ from the rest
    model.eval()
    start = shown = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        def submit(rows):
            how = (rect_shape(sizes[rows], max(shape)), max(shape), antialias) if rect else (shape, None, antialias)
            return [pool.submit(load, dataset, row, *how) for row in rows]

        ahead = collections.deque(submit(rows) for rows in batches[:2])
        for b in range(len(batches)):
            loaded = [job.result() for job in ahead.popleft()]
            ahead.extend(submit(rows) for rows in batches[b + 2:b + 3])
            results, network, after = predict(model, [item[1] for item in loaded], ious, conf, max_det, True, nms, dtype, str(device))
            clock.update(network=network, nms=after)
            for j, (row, _, scale, corner, seconds) in enumerate(loaded):
                if isinstance(seconds, InputError):
                    unreadable.append(seconds)
                    continue
                clock['load'] += seconds
                for mine, one in zip(rows_by_iou, results, strict=True):
                    d = undo_letterbox(one[j], scale, corner, sizes[row])
                    image = np.full(len(d), dataset.image_ids[row])
                    mine.append(np.column_stack([image, d[:, :2], d[:, 2:4] - d[:, :2], d[:, 4], kinds[d[:, 5].astype(int)]]))
            done, now = done + len(loaded), time.perf_counter()
            if verbose and rank == 0 and (now - shown > 0.5 or done == clock['images']):
                shown, left = now, (now - start) / done * (clock['images'] - done)
                print(f'\revaluating {done}/{clock["images"]} images, {done / (now - start):.1f}/s, {left:.0f} s left  ',
                      end='\n' if done == clock['images'] else '', file=sys.stderr, flush=True)
    for module, mode in modes.items():
        module.training = mode
    clock['all'] = time.perf_counter() - start
    if unreadable:
        if len(unreadable) == len(sizes):
            raise InputError(f'not one image can be used: {unreadable[0]}')
        print(f'warning: {len(unreadable)} images cannot be used, their objects count as missed; the first: {unreadable[0]}', file=sys.stderr)
    return [np.concatenate(mine) for mine in rows_by_iou], clock


# --- the judge -----------------------------------------------------------------------------------------------------------

def match_detections(objects, detections, binned=False, **params):
    """Annotations and detections (n, 7) -> a COCOeval that has matched them; ids are positions + 1. params: COCOeval's own."""
    gt, dt = COCO(), COCO()
    keys = ('image_id', 'category_id', 'bbox', 'area', 'iscrowd')
    gt.dataset = dict(images=[], categories=[], annotations=[dict({key: a[key] for key in keys}, id=i) for i, a in enumerate(objects, 1)])
    dt.dataset = dict(gt.dataset, annotations=[
        dict(id=i, image_id=int(image), category_id=int(kind), bbox=[x, y, w, h], score=score, area=np.nan if binned else w * h)
        for i, (image, x, y, w, h, score, kind) in enumerate(detections.tolist(), 1)])
    gt.createIndex()
    dt.createIndex()
    E = COCOeval(gt, dt, 'bbox')
    E.params.imgIds = sorted({*gt.imgToAnns, *dt.imgToAnns})         # elsewhere there is nothing to match
    for name, value in params.items():
        setattr(E.params, name, value)
    E.evaluate()
    return E


def run_cocoeval(coco_gt, detections, bins=None):
    """
    truth, a COCO dict, and detections (n, 7) as of `find` -> a COCOeval after its accumulate(). With bins, one number
    for each annotation, its area ranges are the bins 0, 1, 2, 3 (see the top).

    One class at a time, as classes never meet: pycocotools makes a few kB of Python objects per detection, which for
    5,000 images with 300 each would be 3 GB.
    """
    by_class = {c['id']: [] for c in coco_gt['categories']}
    for i, a in enumerate(coco_gt['annotations']):
        by_class[a['category_id']].append(a if bins is None else dict(a, area=bins[i]))
    more, parts = {} if bins is None else dict(binned=True, areaRng=[[b, b] for b in range(4)]), []
    with contextlib.redirect_stdout(io.StringIO()):                  # it talks
        for kind in sorted(by_class):
            E = match_detections(by_class[kind], detections[detections[:, 6] == kind], catIds=[kind], **more)
            E.accumulate()
            parts.append(E.eval)
    E.eval = dict(precision=np.concatenate([p['precision'] for p in parts], 2), recall=np.concatenate([p['recall'] for p in parts], 1))
    E.params.catIds = sorted(by_class)
    return E


def coco_summary(E):
    with contextlib.redirect_stdout(io.StringIO()):
        E.summarize()
    return {key: None if value < 0 else float(value) for key, value in zip(KEYS, E.stats, strict=True)}


def evaluate(model, dataset, imgsz, nms_iou=0.7, rank=0, world_size=1, **settings):
    """
    The twelve COCO numbers as a dict, the same on every rank and for any number of ranks; None: no such objects.
    settings: those of `find`. The model keeps its training mode.
    """
    (table,), _ = predict_dataset(model, dataset, imgsz, ious=(nms_iou,), rank=rank, world_size=world_size, **settings)
    parts, numbers = [table] + [None] * (world_size - 1), [None]
    if world_size > 1:
        torch.distributed.gather_object(table, parts if rank == 0 else None)
    if rank == 0:
        numbers = [coco_summary(run_cocoeval(dataset.coco(), np.concatenate(parts)))]
    if world_size > 1:
        torch.distributed.broadcast_object_list(numbers)
    return numbers[0]


# --- beyond the twelve -----------------------------------------------------------------------------------------------------

def mean_figures(E, k=slice(None), a=0):
    """AP, AP50, AR100 and the recall at IoU 0.5 of class k (of all) in range a; -1 marks a class without objects."""
    p, r = E.eval['precision'][:, :, k, a, -1], E.eval['recall'][:, k, a, -1]         # (T, R, K), (T, K)
    parts = dict(AP=p, AP50=p[:1], AR100=r, recall50=r[:1])
    return {name: round(float(x[x > -1].mean()), 5) if (x > -1).any() else None for name, x in parts.items()}


def per_class(E, coco_gt):
    count = collections.Counter(a['category_id'] for a in coco_gt['annotations'] if not a['iscrowd'])
    name = {c['id']: c['name'] for c in coco_gt['categories']}
    return {name[i]: dict(mean_figures(E, k), objects=count[i]) for k, i in enumerate(E.params.catIds)}


def under_occlusion(coco_gt, detections):
    """The bins of the top of this file: {bin: AP, AP50, AR100, recall50, objects}"""
    overlap, company = np.zeros(len(coco_gt['annotations'])), np.zeros(len(coco_gt['annotations']), int)
    rows = collections.defaultdict(list)
    for i, a in enumerate(coco_gt['annotations']):
        if not a['iscrowd']:
            rows[a['image_id']].append(i)
    for r in rows.values():
        boxes = np.array([coco_gt['annotations'][i]['bbox'] for i in r], float)
        iou = coco_mask.iou(boxes, boxes, [0] * len(r))
        np.fill_diagonal(iou, 0)
        overlap[r], company[r] = iou.max(1), len(r)
    bins = np.digitize(overlap, [0.1, 0.3, 0.5], right=True)
    E = run_cocoeval(coco_gt, detections, bins)
    table = {BINS[b]: dict(mean_figures(E, a=b), objects=int((bins[company > 0] == b).sum())) for b in range(4)}
    crowded = {image for image, r in rows.items() if len(r) > 20}
    there = dict(coco_gt, annotations=[a for a in coco_gt['annotations'] if a['image_id'] in crowded])
    E = run_cocoeval(there, detections[np.isin(detections[:, 0], list(crowded))])
    return table | {BINS[4]: dict(mean_figures(E), objects=int((company > 20).sum()))}


def confusion(coco_gt, detections, conf=0.25):
    """(K + 1, K + 1) counts at IoU 0.5: row what it is, column what it was called; the last of each is "nothing"."""
    detections, position = detections[detections[:, 5] >= conf], {c['id']: k for k, c in enumerate(coco_gt['categories'])}
    is_, called = [position[a['category_id']] for a in coco_gt['annotations']], [position[kind] for kind in detections[:, 6]]
    with contextlib.redirect_stdout(io.StringIO()):
        E = match_detections(coco_gt['annotations'], detections, useCats=0, iouThrs=np.array([0.5]), maxDets=[1000], areaRng=[[0, 1e10]], catIds=list(position))
    matrix = np.zeros((len(position) + 1, len(position) + 1), int)
    for e in filter(None, E.evalImgs):                               # what meets a crowd region is neither right nor wrong
        for i, match, ignored in zip(e['dtIds'], e['dtMatches'][0], e['dtIgnore'][0], strict=True):
            matrix[is_[int(match) - 1] if match else -1, called[i - 1]] += not ignored
        for i, match, ignored in zip(e['gtIds'], e['gtMatches'][0], e['gtIgnore'], strict=True):
            matrix[is_[i - 1], -1] += not ignored and not match
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
    for (image, kind), theirs in boxes.items():
        mine = detections[(detections[:, 0] == image) & (detections[:, 6] == kind), 1:5]
        if len(mine):
            iou = coco_mask.iou(mine, np.array(theirs, float), [0] * len(theirs))     # (detections, objects)
            count = np.bincount(iou.argmax(1)[iou.max(1) >= 0.5], minlength=len(theirs))
            extra += (count - 1).clip(0).sum()
    return round(float(extra / max(1, sum(map(len, boxes.values())))), 4)


def draw_plots(E, coco_gt, detections, folder):
    """precision_recall.png and confusion.png"""
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError:
        raise InputError('--plots=True needs matplotlib: pip install matplotlib') from None
    table = {name: row for name, row in per_class(E, coco_gt).items() if row['AP50'] is not None}
    curves = E.eval['precision'][0, :, :, 0, -1]                     # (101, K) at IoU 0.5
    curves = curves[:, curves[0] > -1]
    ax = (figure := Figure((7, 5), layout='constrained')).subplots()
    for (name, row), curve in zip(table.items(), curves.T, strict=True):
        ax.plot(E.params.recThrs, curve, lw=1.2, **dict(label=f'{name} {row["AP50"]:.3f}') if len(table) <= 12 else dict(color='0.8'))
    ax.plot(E.params.recThrs, curves.mean(1), 'k', lw=2.5, label=f'all {mean_figures(E)["AP50"] or 0:.3f}')
    ax.legend(title='AP50', loc='lower left')
    ax.set(xlabel='recall', ylabel='precision', xlim=(0, 1), ylim=(0, 1.02), title='precision and recall at IoU 0.5')
    figure.savefig(os.path.join(folder, 'precision_recall.png'), dpi=120)

    matrix, names = confusion(coco_gt, detections), [c['name'] for c in coco_gt['categories']]
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)     # of what is there, how much is called what
    side = min(4 + 0.35 * len(names), 24)
    ax = (figure := Figure((side + 1, side), layout='constrained')).subplots()
    ax.imshow(share, cmap='Blues', vmin=0, vmax=1)
    ax.set_xticks(range(len(matrix)), [*names, 'missed'], rotation=90)
    ax.set_yticks(range(len(matrix)), [*names, 'false alarm'])
    for i, j in zip(*matrix.nonzero(), strict=True):
        if len(names) <= 20:
            ax.text(j, i, matrix[i, j], ha='center', va='center', color='w' if share[i, j] > 0.5 else 'k', fontsize=9)
    ax.set(xlabel='called', ylabel='is', title='score >= 0.25, IoU 0.5')
    figure.savefig(os.path.join(folder, 'confusion.png'), dpi=120)


def read_detections(path, coco_gt):
    """A COCO results file, [{image_id, category_id, bbox, score}, ...] -> (n, 7) as of `find`."""
    try:
        with open(path, encoding='utf-8') as f:
            rows = [[d['image_id'], *d['bbox'], d['score'], d['category_id']] for d in json.load(f)]
        table = np.array(rows, float).reshape(len(rows), 7)
    except OSError as e:
        raise InputError(f'--from_json={path}: {e.strerror}, name a file that is there') from None
    except (ValueError, TypeError, KeyError) as e:
        raise InputError(f'{path} must be a list of COCO results, each with image_id, category_id, bbox [x, y, w, h] and score; '
                         f'this one has another form ({type(e).__name__}: {e})') from None
    for column, what, known in ((0, 'image', coco_gt['images']), (6, 'category', coco_gt['categories'])):
        strange = set(table[:, column]) - {item['id'] for item in known}
        if strange:
            raise InputError(f'{path} belongs to another set than --data: {len(strange)} of its {what} ids are not there, such as {min(strange):.0f}')
    return table


def show(title, table):
    """{name: {column: number}} as aligned lines."""
    width = max(map(len, [title, *table]))
    print(f'\n{title:<{width}}' + ''.join(f'{key:>10}' for key in next(iter(table.values()))))
    for name, row in table.items():
        print(f'{name:<{width}}' + ''.join(f'{"-" if v is None else v if isinstance(v, int) else f"{v:.3f}":>10}' for v in row.values()))


def main():
    if not data:
        raise InputError('no ground truth given: add --data=path/val.json, or a YOLO folder')
    model = None if from_json else load_model(weights, device, fuse, **dict(attn=attn) if attn else {})
    if from_json and data.endswith('.json'):                          # no image is needed
        dataset, coco_gt = None, ground_truth(read_coco(data))
    else:
        dataset = open_data(data, model.names if model else (), images)
        coco_gt = dataset.coco()
    folder, speed = out_dir or 'out/eval' * plots, {}
    ious = nms_iou if isinstance(nms_iou, tuple) and not from_json else (nms_iou,)
    for kind, (count, example) in dataset.issues.items() if dataset else ():
        if kind.startswith('image'):
            print(f'warning: {count} x {kind}, whose objects count as missed, such as {example}', file=sys.stderr)
    if from_json:
        tables = [read_detections(from_json, coco_gt)]
    else:
        if list(model.names) != list(dataset.names):
            print(f"warning: the model's classes are {', '.join(model.names[:5])}, the data's {', '.join(dataset.names[:5])}", file=sys.stderr)
        if not nms and isinstance(model, HSVDET) and model.one2one_head is None:
            print('warning: --nms=False on a model without a one-to-one head: its duplicates stay and count as false', file=sys.stderr)
        if getattr(model, 'ends_in_nms', False):
            print(f'warning: NMS is inside the file, beyond the settings here, and AP lacks what scores below its {model.conf}', file=sys.stderr)
        tables, clock = predict_dataset(model, dataset, imgsz, batch_size, rect, conf, ious, max_det, dtype, device, nms=nms, antialias=antialias)
        there = [c['id'] for c in coco_gt['categories']]
        tables = [table[np.isin(table[:, 6], there)] for table in tables]             # classes that the set does not know
        speed = dict(images=clock['images'], images_per_s=round(clock['images'] / clock['all'], 2))
        parts = ', '.join(f'{part} {clock["images"] / (clock[part] + 1e-9):.0f}' for part in ('load', 'network', 'nms'))
        print(f'{speed["images"]} images, {speed["images_per_s"]} images/s; each part alone: {parts} images/s (loading runs beside the others)')
    evaluations = [run_cocoeval(coco_gt, table) for table in tables]
    numbers = [coco_summary(E) for E in evaluations]
    best = max(range(len(tables)), key=lambda i: numbers[i]['AP'] or 0)
    E, table, summary = evaluations[best], tables[best], numbers[best] | speed
    if summary['AP'] is None or not len(table):
        print('the ground truth has no objects: there is no AP' if summary['AP'] is None else 'no detections at all: AP is 0')
    if len(ious) > 1:
        summary |= dict(nms_iou=ious[best], sweep={iou: one['AP'] for iou, one in zip(ious, numbers, strict=True)})
        show('NMS IoU', {str(iou): {key: one[key] for key in ('AP', 'AP50', 'AP75', 'AR100')} for iou, one in zip(ious, numbers, strict=True)})
    if by_class:
        summary['by_class'] = per_class(E, coco_gt)
        show('class', summary['by_class'])
    if occlusion:
        summary['occlusion'] = under_occlusion(coco_gt, table)
        show('overlap with another object', summary['occlusion'])
    summary['duplicates'] = duplicates(coco_gt, table)
    print(f'\nduplicates: {summary["duplicates"]:.3f} per object at score 0.25')
    if folder:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, 'detections.json'), 'w', encoding='utf-8') as f:
            json.dump([dict(image_id=int(i), category_id=int(kind), bbox=[round(v, 3) for v in box], score=round(score, 6))
                       for i, *box, score, kind in table.tolist()], f)
    if plots:
        draw_plots(E, coco_gt, table, folder)
    print(json.dumps(summary))


if __name__ == '__main__':
    configure(globals())
    main()

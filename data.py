"""
Pictures and boxes: reading, augmenting, batching, checking, drawing. A leaf: it imports nothing of ours.

    python data.py shapes                        make data/shapes, a dataset to learn on without any download
    python data.py check data/shapes/val.json    what is in a dataset, and what is wrong with it
    python data.py show config/shapes.py         one augmented batch as a picture: look before you train

    data = DetectionDataset('data/shapes/train.json', imgsz=256, augment=dict(mosaic=1.0, scale=0.5))
    data[(epoch, index)]      image (3, H, W) uint8, labels (n,), boxes (n, 4) xyxy pixels of that image

Three ideas carry the file.

1. A sample is a pure function of (seed, epoch, index). Workers, resume and cache may come and go: the bits stay.
2. Everything geometric is axis-aligned, so x and y never meet, and a whole chain (letterbox, Mosaic, scale, translate)
   is one map per axis: whole source pixels onto whole target pixels, one resampling, and only of what survives the
   crop. The boxes go through the very same map (see `span`).
3. A defect in somebody's data is counted, quoted once, and stepped over. Training goes on with the rest.

What it deliberately does not do: rotation, shear and perspective (0 in the YOLOv8 recipe, and without them idea 2
holds), masks, Copy-Paste (without masks it pastes rectangles, a cue that no photograph has), video.

Papers: Mosaic is YOLOv4's (Bochkovskiy et al. 2020), MixUp is Zhang et al. 2018.
"""
import ast
import concurrent.futures
import contextlib
import errno
import functools
import http.client
import json
import math
import os
import random
import re
import shutil
import socket
import struct
import sys
import threading
import time
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from configurator import InputError

PAD_VALUE = 114                                                             # fills what no picture covers
SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)      # what Pillow raises


# ------------------------------------------------------------------------------------------ pictures

def load_image(path, size=None, shrink=1):
    """
    A picture file as an upright RGB PIL.Image, whatever it was: grey, palette, CMYK, 16 bits, turned by EXIF.

    size    (w, h) that its labels were made for. Most tools label what they see (upright), some what is stored; where
            the two differ, the one of this size is returned
    shrink  2, 4 or 8: a JPEG is decoded at that fraction, from fewer DCT coefficients; other formats ignore it
    Raises InputError when the file is missing, broken, or of neither size.
    """
    try:
        with Image.open(path) as image:
            turned = upright_size(image) != image.size
            if size is not None and tuple(size) not in (image.size, upright_size(image)):
                raise InputError(f'image {path} is {image.width}x{image.height} but its annotations are for {size[0]}x{size[1]}: '
                                 'put the original image back, or mend width and height')
            as_stored = turned and size is not None and tuple(size) == image.size
            image.draft(None, (image.width // shrink, image.height // shrink))
            image.load()                                               # only now are the pixels read
            if image.format != 'PNG' and not as_stored:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith('I'):                             # 16 bits: the upper 8 of them
                image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
            if image.mode == 'P' and 'transparency' in image.info:
                image = image.convert('RGBA')
            return image if image.mode == 'RGB' else image.convert('RGB')
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f'image {path} not found: check the folder of the images') from None
    except BROKEN as e:
        raise InputError(f'image {path} cannot be read ({e or type(e).__name__}): replace the file or take it out') from None


def upright_size(image):
    """(w, h) of an opened picture once its EXIF orientation is obeyed. (To ask a PNG for EXIF would decode it.)"""
    lying = image.format != 'PNG' and image.getexif().get(0x0112, 1) > 4
    return image.size[::-1] if lying else image.size


def to_tensor(image):
    """PIL.Image or (h, w, 3) array -> (3, h, w) uint8, a view of (h, w, 3) memory, which `resize` likes best."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(tensor):
    """(3, h, w) uint8 -> PIL.Image."""
    return Image.fromarray(tensor.permute(1, 2, 0).contiguous().numpy())


def resize(image, h, w):
    """(3, h0, w0) uint8 -> (3, h, w) uint8: bilinear, antialiased. PyTorch's is Pillow's filter in a quarter of the time."""
    if image.shape[1:] == (h, w):
        return image
    return F.interpolate(image[None], size=(h, w), mode='bilinear', antialias=True)[0]


# ------------------------------------------------------------------------------------------ geometry

def src_dst_interval(length, scale, start, limit):
    """
    One axis of a placement: a picture of `length` pixels, drawn `scale` times as large from target coordinate `start`
    on, in a target of `limit` pixels. -> (a, b, c, d): source pixels a..b land on target pixels c..d. None: invisible.

    All rounding happens here, before anything is drawn, and pixels and boxes both follow a..b -> c..d exactly.
    An end inside the target is the picture's own end, so the tiles of a mosaic meet without a seam.
    """
    c, d = max(round(start), 0), min(round(start + length * scale), limit)
    if d <= c:
        return None
    a = min(max(round((c - start) / scale), 0), length - 1)
    b = min(max(round((d - start) / scale), a + 1), length)
    return a, b, c, d


def paste_resized(canvas, image, xs, ys):
    """Draw columns and rows `xs`, `ys` (two spans) of image (3, h, w) on canvas (3, H, W), in place."""
    (a, b, c, d), (e, f, g, h) = xs, ys
    canvas[:, g:h, c:d] = resize(image[:, e:f, a:b], h - g, d - c)


def transform_boxes(boxes, xs, ys):
    """Boxes (n, 4) through the same two spans, not yet cut."""
    (a, b, c, d), (e, f, g, h) = xs, ys
    gain = np.array([(d - c) / (b - a), (h - g) / (f - e)] * 2, np.float32)
    return (boxes - np.array([a, e] * 2, np.float32)) * gain + np.array([c, g] * 2, np.float32)


def clip_boxes(boxes, labels, xs, ys):
    """Boxes cut at the rim of what was drawn; kept with sides above 2 px, over a tenth of the area, and no slivers."""
    (_, _, c, d), (_, _, g, h) = xs, ys
    after = boxes.clip(np.array([c, g] * 2, np.float32), np.array([d, h] * 2, np.float32))
    (w0, h0), (w, h) = (boxes[:, 2:] - boxes[:, :2]).T, (after[:, 2:] - after[:, :2]).T
    keep = (w > 2) & (h > 2) & (w * h > 0.1 * w0 * h0) & (np.maximum(w, h) < 100 * np.minimum(w, h))
    return after[keep], labels[keep]


def letterbox_spans(size, shape):
    """(w, h) in (H, W): scale and the spans of the whole picture, centred, as large as fits."""
    (w, h), (H, W) = size, shape
    scale = min(W / w, H / h)
    nw, nh = max(round(w * scale), 1), max(round(h * scale), 1)
    left, top = (W - nw) // 2, (H - nh) // 2
    return scale, (0, w, left, left + nw), (0, h, top, top + nh)


def letterbox(image, shape):
    """
    A picture (PIL.Image or (h, w, 3) uint8) centred in an input of (H, W) pixels, as large as fits, on grey.
    -> uint8 (H, W, 3), scale, (left, top); a box comes back by (box - (left, top, left, top)) / scale.
    """
    image = to_tensor(image)                                           # (3, h, w)
    scale, xs, ys = letterbox_spans((image.shape[2], image.shape[1]), shape)
    canvas = torch.full((*shape, 3), PAD_VALUE, dtype=torch.uint8)          # (H, W, 3)
    paste_resized(canvas.permute(2, 0, 1), image, xs, ys)
    return canvas.numpy(), scale, (xs[2], ys[2])


def rect_shape(sizes, imgsz, stride=32, pad=0.5):
    """
    (H, W), multiples of `stride`, of the smallest input for pictures of `sizes` (n, 2) w, h whose longer side is made
    imgsz, plus `pad` cells of slack. The published YOLOv8 figures are taken so: 640x480 at 320 goes into 256x352,
    and objects at the rim are found better for it.
    """
    sizes = np.asarray(sizes, float).reshape(-1, 2)
    need = (sizes / sizes.max(1, keepdims=True)).max(0) * imgsz / stride           # (2,) cells wide, cells high
    W, H = np.ceil(need + pad - 1e-9).astype(int) * stride
    return int(H), int(W)


# ------------------------------------------------------------------------------------------ augmentation
# Each function takes its chances from `rng` alone and changes none of its arguments. A picture still to be placed is
# (read, (w, h), boxes, labels): read() decodes it, and is called only if some of it will be seen.

def compose_mosaic(pictures, rng, shape, scale, translate):
    """
    One picture, or four as a mosaic, on an (H, W) input -> image (3, H, W), boxes (n, 4), labels (n,).

    A mosaic is four pictures, each letterbox-sized, that meet corner to corner at a random centre of a canvas twice
    the input; the canvas is zoomed by 1 ± scale, shifted by ± translate of the input, and the middle cut out. As one
    map: canvas point X goes to (X - W) * zoom + shift. So it is enough to follow the centre, from which each picture
    hangs by a corner.
    """
    H, W = shape
    canvas = torch.full((3, H, W), PAD_VALUE, dtype=torch.uint8)
    zoom = rng.uniform(1 - scale, 1 + scale)
    shift = rng.uniform(0.5 - translate, 0.5 + translate, 2) * (W, H)
    meet = np.rint((rng.uniform(0.5, 1.5, 2) - 1) * (W, H) * zoom + shift)
    kept = [(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))]
    for corner, (read, (w, h), boxes, labels) in enumerate(pictures):
        grow = min(W / w, H / h) * zoom
        if len(pictures) == 1:
            x, y = shift - (w * grow / 2, h * grow / 2)
        else:                                                          # 0 1 / 2 3: left and upper ones end at the centre
            x, y = meet - (w * grow * (corner % 2 == 0), h * grow * (corner < 2))
        xs, ys = src_dst_interval(w, grow, x, W), src_dst_interval(h, grow, y, H)
        image = read() if xs and ys else None
        if image is not None:
            paste_resized(canvas, image, xs, ys)
            kept.append(clip_boxes(transform_boxes(boxes, xs, ys), labels, xs, ys))
    boxes, labels = zip(*kept, strict=True)
    return canvas, np.concatenate(boxes), np.concatenate(labels)


def mixup(a, b, rng):
    """Two scenes laid over each other, about half and half; the objects of both count."""
    image = torch.lerp(b[0].float(), a[0].float(), rng.beta(32.0, 32.0)).round_().byte()
    return image, np.concatenate((a[1], b[1])), np.concatenate((a[2], b[2]))


def color_jitter(image, boxes, labels, rng, hsv):
    """
    Hue, saturation and value by up to ± hsv, as ONE 3x3 matrix on RGB: hue turns the colour about the grey axis by up
    to h of the circle, saturation scales its distance from luma by 1 ± s, value scales all by 1 ± v. This is the
    linear cousin of the usual trip through HSV: changes of the same kind and size, not the same pixels, much faster.
    """
    h, s, v = rng.uniform(-1, 1, 3) * hsv
    cos, sin = math.cos(2 * math.pi * h), math.sin(2 * math.pi * h)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = cos * np.eye(3) + (1 - cos) / 3 + sin * cross               # Rodrigues, about (1, 1, 1)
    luma = np.array([[0.299, 0.587, 0.114]] * 3)
    matrix = (1 + v) * ((1 + s) * np.eye(3) - s * luma) @ turn
    # 16-bit fixed point takes half the time of float32; it gets as many bits as the largest sum leaves room for
    bits = int(math.log2(32000 / 255 / max(np.abs(matrix).sum(1).max(), 0.1)))
    weights = np.rint(matrix * 2**bits)
    weights += np.diag(np.rint((1 + v) * 2**bits) - weights.sum(1))    # rounding must not tint what is grey
    out = torch.empty_like(image)
    for y in range(0, image.shape[1], 128):                            # in bands that stay in the processor's cache
        red, green, blue = image[:, y:y + 128].short()                 # (128, W) each
        for channel, (r, g, b) in enumerate(weights.astype(int).tolist()):
            total = (red * r).add_(green, alpha=g).add_(blue, alpha=b).add_(2**bits // 2)
            out[channel, y:y + 128] = total.bitwise_right_shift_(bits).clamp_(0, 255)
    return out, boxes, labels


def hflip(image, boxes, labels, rng, chance):
    """Left for right, with probability `chance`."""
    if rng.random() >= chance:
        return image, boxes, labels
    W = image.shape[2]
    return image.flip(2), np.stack((W - boxes[:, 2], boxes[:, 1], W - boxes[:, 0], boxes[:, 3]), 1), labels


# ------------------------------------------------------------------------------------------ label files

def read_coco(path):
    """A COCO file as a dict, or an InputError that says why it is none."""
    try:
        with open(path, encoding='utf-8') as f:
            data = json.load(f)
    except OSError as e:
        raise InputError(f'{path}: {e.strerror}, check the path') from None
    except ValueError as e:
        raise InputError(f'{path} is not valid JSON ({e}): write it anew, or download it again') from None
    for key, fields in (('images', ('id', 'file_name')), ('annotations', ()), ('categories', ('id', 'name'))):
        entries = data.get(key) if isinstance(data, dict) else None
        if not isinstance(entries, list):
            raise InputError(f'{path} is not a COCO annotation file, it has no list "{key}": give the json with images, annotations, categories')
        for entry in entries:
            if not isinstance(entry, dict) or any(field not in entry for field in fields):
                raise InputError(f'{path}: {str(entry)[:80]} in "{key}" lacks {" or ".join(fields)}: mend that entry')
            if 'id' in fields and type(entry['id']) is not int:
                raise InputError(f'{path}: the id {entry["id"]!r} in "{key}" is not a whole number, as COCO wants it: number the {key}')
    return data


def ground_truth(data):
    """A COCO dict -> what of it pycocotools can judge by, crowds included."""
    images, categories = ({entry['id'] for entry in data[key]} for key in ('images', 'categories'))
    data['annotations'] = [a for a in data['annotations'] if a.get('image_id') in images and a.get('category_id') in categories
                           and len(floats(a.get('bbox'))) == 4]
    # pycocotools never counts an object of id 0 as found, nor two of one id apart
    renumber = len({a.get('id') or 0 for a in data['annotations']} - {0}) < len(data['annotations'])
    for n, a in enumerate(data['annotations'], 1):
        a.setdefault('iscrowd', 0)
        a.setdefault('area', a['bbox'][2] * a['bbox'][3])
        if renumber:
            a['id'] = n
    return dict(data, info=data.get('info', {}))


def find_images(source, file_names):
    """The folder in which the files of a COCO json lie, when nobody named it: the likely one beside it."""
    folder, stem = os.path.split(os.path.splitext(source)[0])
    stems = [stem, stem.removeprefix('instances_'), re.sub(r'^instances_|_\d+$', '', stem)]           # instances_train2017_20 -> train2017
    likely = [os.path.join(folder, *p) for p in (*(('images', s) for s in stems), ('images',), *((s,) for s in stems), (),
                                                 *(('..', s) for s in stems), *(('..', 'images', s) for s in stems), ('..', 'images'))]
    return next((p for p in likely if any(os.path.isfile(os.path.join(p, name)) for name in file_names[:100])), '')


def floats(values):
    """The values as a list of finite floats, or an empty list."""
    try:
        values = [float(v) for v in values]
    except (TypeError, ValueError):
        return []
    return values if all(map(math.isfinite, values)) else []


def read_yaml(path):
    """A YOLO data file as a dict, for the little YAML that those are written in: scalars, lists, numbered names."""
    with open(path, encoding='utf-8', errors='replace') as f:
        text = re.sub(r'(?m)(^|\s)#.*$', '', f.read())
    keys = {}
    for key, value in re.findall(r'(?m)^(\w+):(.*(?:\n(?!\w).*)*)', text):         # with the lines that belong to it
        many = re.search(r'[\[{\n]', value.rstrip())
        items = re.split(r'[,\n]', value.strip().strip('[]{}')) if many else [value]
        items = [re.sub(r'^(-\s+|\d+\s*:)', '', item.strip()).strip().strip('\'"') for item in items]
        keys[key] = [item for item in items if item] if many else items[0]
    return keys


def yolo_files(source):
    """The pictures of a YOLO set (see DetectionDataset) and its class names: a list of paths, a list of names or []."""
    yaml = re.fullmatch(r'(.+\.ya?ml)(?::(\w+))?', source)
    if yaml:
        path, split = yaml[1], yaml[2] or 'train'
        keys, here = read_yaml(path), os.path.dirname(path)
        parts = keys.get(split) or []
        if not parts:
            raise InputError(f'{path} has no entry "{split}:": add it, with the folder of its images')
        files = []
        for part in [parts] if isinstance(parts, str) else parts:
            paths = [os.path.join(here, keys.get('path', ''), part), os.path.join(here, part), os.path.join(keys.get('path', ''), part)]
            found = next((p for p in paths if os.path.exists(p)), None)
            if found is None:
                raise InputError(f'{path}: {split}: {part} is no folder or file (looked for {paths[0]}): mend "path:" or "{split}:"')
            files += yolo_files(found)[0]
        return files, keys.get('names', [])
    if os.path.isdir(source):
        inner = os.path.join(source, 'images')
        files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(inner if os.path.isdir(inner) else source)
                       for name in names if name.lower().endswith(SUFFIXES))
        folder = source
    else:
        folder = os.path.dirname(source)
        try:
            with open(source, encoding='utf-8') as f:
                files = [os.path.join(folder, line.strip()) for line in f if line.strip()]
        except UnicodeDecodeError:
            raise InputError(f'{source} is neither a COCO .json nor a .yaml, a folder, or a list of image files') from None
    for _ in range(3):                                                 # class names: here or up to two folders above
        folder = os.path.abspath(folder)
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if name in ('classes.txt', 'names.txt'):
                with open(path, encoding='utf-8') as f:
                    return files, [line.strip() for line in f if line.strip()]
            keys = read_yaml(path) if name.endswith(('.yaml', '.yml')) else {}
            if 'names' in keys and ('train' in keys or 'nc' in keys):
                return files, keys['names']
        folder = os.path.dirname(folder)
    return files, []


def yolo_labels(image):
    """.../images/train/a.jpg -> .../labels/train/a.txt; a.txt beside the picture where no folder is called images."""
    head, found, tail = f'{os.sep}{os.path.splitext(os.path.normpath(image))[0]}'.rpartition(f'{os.sep}images{os.sep}')
    return (f'{head}{os.sep}labels{os.sep}{tail}' if found else tail)[1:] + '.txt'


# ------------------------------------------------------------------------------------------ the dataset

class DetectionDataset:
    """
    A detection set on disk, as samples of one size.

    source    a COCO .json; or YOLO: a folder, a .txt of image paths, a data .yaml (data.yaml:val for its other part)
    images    folder of the images of a COCO json; '' looks in the likely places beside it
    imgsz     (H, W) of the samples, or one int for both
    augment   None: letterboxed, as evaluation sees it. Or a dict of strengths, what is absent being 0:
              mosaic, mixup, flip  probabilities;  scale, translate  ± shares;  hsv  three ± shares
              close_epoch  mosaic and mixup rest from this epoch on
              block  0: mosaic partners come from the whole set; n: from the n neighbours in order(epoch). Who also
              visits the set in that order decodes each picture once, not four times, with a cache of a few MB
    cache_mb  memory for decoded pictures, shared out among the workers of a loader; it changes no bit of any sample
    names     class names in the order wanted (a validation set takes the training set's); default: as in the file

    After loading: names, category_ids (label -> id in the file), image_ids, files, sizes (n, 2) w h; labels and boxes,
    one array per image, xyxy in ORIGINAL pixels, crowds left out; problems {kind: [count, first example]}.
    A COCO set opens no image file for that; a YOLO set reads their headers, as its labels do not know the sizes.
    """

    def __init__(self, source, images='', imgsz=(640, 640), augment=None, seed=0, cache_mb=1024, names=None):
        self.source, self.augment, self.seed, self.cache_mb = source, augment, seed, cache_mb
        self.shape = (imgsz, imgsz) if isinstance(imgsz, int) else tuple(imgsz)
        strange = set(augment or ()) - {'mosaic', 'mixup', 'scale', 'translate', 'hsv', 'flip', 'no_aug_epoch', 'block'}
        assert not strange, f'no such augmentation: {strange}'
        self.issues, self.image_ids, self.files, self.sizes, self.labels, self.boxes = {}, [], [], [], [], []
        if not os.path.exists(re.sub(r'(\.ya?ml):\w+$', r'\1', source)):
            makers = (('shapes', 'shapes'), ('instances_train2017.json', 'coco'), ('coco', 'coco20'))
            command = next((f'run: python data.py {name}' for part, name in makers if part in source), 'check the path')
            raise InputError(f'dataset {source} not found: {command}')
        self.is_coco = source.endswith('.json')
        self.load_coco(images, names) if self.is_coco else self.load_yolo(names)
        quoted = ''.join(f'; {kind}: {count}, such as {example}' for kind, (count, example) in self.issues.items())
        if not self.files:
            raise InputError(f'not one image of {source} can be used{quoted}: check the folder of the images')
        if not sum(map(len, self.labels)):
            raise InputError(f'{source} has no usable annotations{quoted}: nothing can be learned from it, give a labelled set')
        self.sizes = np.array(self.sizes, np.int64)                    # (n, 2) w, h
        self.shrink = np.ones(len(self), np.int64)
        if augment is not None:
            # A JPEG is decoded at 1/2, 1/4 or 1/8 where not even the largest zoom wants more. Decided by picture and
            # not by sample, so that one cached picture serves every sample.
            H, W = self.shape
            most = np.minimum(W / self.sizes[:, 0], H / self.sizes[:, 1]) * (1 + augment.get('scale', 0.0))
            jpeg = np.array([name.lower().endswith(('.jpg', '.jpeg')) for name in self.files])
            for shrink in (2, 4, 8):
                self.shrink[jpeg & (most <= 1 / shrink)] = shrink
        self.cache, self.cached_bytes, self.broken, self.sorted_epoch = OrderedDict(), 0, set(), None

    def __len__(self):
        return len(self.files)

    def record_issue(self, kind, example):
        self.issues.setdefault(kind, [0, example])[0] += 1

    def load_coco(self, images, names):
        data, source, known, rows, listings = read_coco(self.source), self.source, set(), {}, {}
        # 1) category ids, with whatever gaps, to labels 0..K-1
        categories = sorted(data['categories'], key=lambda c: c['id'])
        self.names = list(names or (c['name'] for c in categories))
        label_of = {c['id']: self.names.index(c['name']) for c in categories if c['name'] in self.names}
        id_of, spare = {label: id_ for id_, label in label_of.items()}, max([c['id'] for c in categories], default=0) + 1
        self.category_ids = [id_of.get(label, spare + label) for label in range(len(self.names))]
        # 2) the images that are there
        folder = images or find_images(source, [entry['file_name'] for entry in data['images']])
        for entry in data['images']:
            id_, file = entry['id'], os.path.join(folder, entry['file_name'])
            where, base = os.path.split(file)
            if where not in listings:                                  # one listing, not 118,287 questions
                listings[where] = set(os.listdir(where or '.')) if os.path.isdir(where or '.') else set()
            if id_ in known:
                self.record_issue('image listed twice', f'{source}: id {id_}, {entry["file_name"]}, the second left out')
            elif base not in listings[where]:
                self.record_issue('image missing', f'{file}, image id {id_}, left out')
            else:
                size = (entry.get('width'), entry.get('height'))
                size = size if all(size) else self.header_size(file)
                if size:
                    rows[id_] = []
                    self.image_ids.append(id_)
                    self.files.append(file)
                    self.sizes.append(size)
            known.add(id_)
        if not data['annotations']:
            raise InputError(f'{source} has no annotations: nothing can be learned from it, give a labelled set')
        if not rows:
            raise InputError(f'not one image of {source} found in {folder or "the folders beside it"}: name the folder that holds '
                             f'{data["images"][0]["file_name"] if data["images"] else "them"} (train_images, val_images, or check --images=)')
        # 3) the annotations, each to its image
        for a in data['annotations']:
            id_, image_id, category_id, box = a.get('id'), a.get('image_id'), a.get('category_id'), floats(a.get('bbox'))
            if image_id not in known:
                self.record_issue('annotation without image', f'{source}: annotation {id_} is for image {image_id}, which is not listed, dropped')
            elif len(box) != 4:
                self.record_issue('annotation without a proper bbox', f'{source}: annotation {id_} of image {image_id} has {a.get("bbox")}, dropped')
            elif category_id not in label_of:
                self.record_issue('unknown category', f'{source}: annotation {id_} of image {image_id} has category_id {category_id}, dropped')
            elif image_id in rows and not a.get('iscrowd'):
                x, y, w, h = box
                rows[image_id].append((label_of[category_id], x, y, x + w, y + h, id_))
        for image_id, size in zip(self.image_ids, self.sizes, strict=True):
            self.keep_good(rows[image_id], size, f'{source}: image {image_id}, annotation')

    def load_yolo(self, names):
        files, own = yolo_files(self.source)
        self.names = list(names or own)
        label_of = {i: self.names.index(name) for i, name in enumerate(own) if name in self.names} if own else {}
        for file in files:
            size, txt, rows = self.header_size(file), yolo_labels(file), []
            if not size:
                continue
            lines = []
            if os.path.isfile(txt):
                with open(txt, encoding='utf-8', errors='replace') as f:
                    lines = f.readlines()
            else:
                self.record_issue('image without label file', f'{file} has no {txt}, taken for a picture without objects')
            for number, line in enumerate(lines, 1):
                values, where = floats(line.split()), f'{txt}, line {number}'
                if not line.strip():
                    continue
                if len(values) < 5 or len(values) % 2 == 0 or values[0] < 0 or values[0] % 1:
                    self.record_issue('malformed line', f'{where}: "{line.strip()[:60]}" is not "class cx cy w h", dropped')
                    continue
                label = label_of.get(int(values[0]), -1) if own else int(values[0])
                if label < 0 or names and label >= len(names):
                    self.record_issue('unknown category', f'{where} has class {int(values[0])} of {len(own or names)}, dropped')
                    continue
                points = np.array(values[1:]).reshape(-1, 2)           # (2, 2): centre and size; (n, 2): an outline
                low, high = points[0] - points[1] / 2, points[0] + points[1] / 2
                if len(points) > 2:
                    low, high = points.min(0), points.max(0)
                rows.append((label, *(low * size).tolist(), *(high * size).tolist(), number))
            self.image_ids.append(len(self.files))
            self.files.append(file)
            self.sizes.append(size)
            self.keep_good(rows, size, f'{txt}, line')
        if not files:
            raise InputError(f'{self.source} holds no images ({" ".join(SUFFIXES)}): check the path')
        top = max((int(labels.max()) for labels in self.labels if len(labels)), default=-1)
        self.names = self.names or [f'class{i}' for i in range(top + 1)]
        self.category_ids = list(range(len(self.names)))

    def header_size(self, file):
        """Upright (w, h) from the file's first bytes; None, and a problem, if it cannot be had."""
        try:
            with Image.open(file) as image:
                return upright_size(image)
        except FileNotFoundError:
            self.record_issue('image missing', f'{file}, left out')
        except BROKEN as e:
            self.record_issue('image unreadable', f'{file} ({e}), left out')

    def keep_good(self, rows, size, where):
        """The good ones of one picture's rows (label, x1, y1, x2, y2, number) become its labels and boxes."""
        (w, h), kept = size, {}
        for label, x1, y1, x2, y2, number in rows:
            box, wrong = (max(x1, 0), max(y1, 0), min(x2, w), min(y2, h)), ''
            if min(x2 - x1, y2 - y1) < 1e-3:                           # float32 could not tell its sides apart
                wrong = 'box without area', 'dropped'
            elif min(box[2] - box[0], box[3] - box[1]) < 1e-3:
                wrong = 'box outside its image', 'dropped'
            elif (label, box) in kept:
                wrong = 'box given twice', 'the second dropped'
            elif max(-x1, -y1, x2 - w, y2 - h) > 1:                    # less is rounding, and not worth a word
                wrong = 'box beyond the border', 'cut'
            if wrong:
                self.record_issue(wrong[0], f'{where} {number}: {x1:.1f} {y1:.1f} {x2:.1f} {y2:.1f} in {w}x{h}, {wrong[1]}')
            if not wrong or wrong[1] == 'cut':
                kept[label, box] = True
        self.labels.append(np.array([label for label, _ in kept], np.int64))
        self.boxes.append(np.array([box for _, box in kept], np.float32).reshape(-1, 4))

    def coco(self):
        """The ground truth as pycocotools wants it: a COCO file as it is, crowds too; a YOLO set converted."""
        if not self.is_coco:
            images = [dict(id=i, file_name=self.files[i], width=w, height=h) for i, (w, h) in enumerate(self.sizes.tolist())]
            annotations = [dict(image_id=i, category_id=int(label), bbox=[float(v) for v in (x1, y1, x2 - x1, y2 - y1)])
                           for i in range(len(self)) for label, (x1, y1, x2, y2) in zip(self.labels[i], self.boxes[i], strict=True)]
            data = dict(images=images, annotations=annotations, categories=[dict(id=i, name=name) for i, name in enumerate(self.names)])
        else:
            data = read_coco(self.source)                              # anew: kept, it would cost gigabytes per worker
        return ground_truth(data)

    # What follows makes the samples.

    def read(self, i):
        """Picture i as (3, h, w) uint8, at 1/shrink. None if it cannot be used, which is said once."""
        if i in self.cache:
            self.cache.move_to_end(i)
            return self.cache[i]
        if i in self.broken:
            return None
        (w, h), shrink = self.sizes[i].tolist(), int(self.shrink[i])
        try:
            image = to_tensor(load_image(self.files[i], (w, h), shrink))
        except InputError as e:
            self.broken.add(i)
            self.record_issue('image of another size' if 'annotations are for' in str(e) else 'image unreadable', str(e))
            print(f'warning: skipped: {e}', file=sys.stderr)
            if len(self.broken) == len(self):
                raise InputError(f'not one image of {self.source} can be used: {e}') from None
            return None
        if shrink > 1:
            image = resize(image, -(-h // shrink), -(-w // shrink))    # for a .jpg that is a PNG; else it is so already
        worker = torch.utils.data.get_worker_info()
        budget = self.cache_mb * 2**20 // (worker.num_workers if worker else 1)
        if image.numel() <= budget:
            self.cache[i] = image
            self.cached_bytes += image.numel()
            while self.cached_bytes > budget:                          # out goes what was unused for longest
                self.cached_bytes -= self.cache.popitem(last=False)[1].numel()
        return image

    def order(self, epoch):
        """The order (n,) in which to visit the set in this epoch; see `block`."""
        return np.random.default_rng((self.seed, epoch)).permutation(len(self))

    def mosaic_indices(self, epoch, index, count, rng):
        """Some pictures to share a scene with picture `index`."""
        block = self.augment.get('block', 0)
        if not 0 < block < len(self):
            return rng.integers(len(self), size=count).tolist()
        if self.sorted_epoch != epoch:
            self.sorted_epoch, self.sorted = epoch, self.order(epoch)
            self.position = np.argsort(self.sorted)
        start = min(self.position[index] // block * block, len(self) - block)
        return self.sorted[start + rng.integers(block, size=count)].tolist()

    def picture(self, i, image=None):
        """Picture i for `scene`: (read, (w, h), boxes, labels), in pixels as decoded."""
        (w, h), shrink = self.sizes[i].tolist(), int(self.shrink[i])
        read = (lambda: self.read(i)) if image is None else (lambda: image)
        return read, (-(-w // shrink), -(-h // shrink)), self.boxes[i] / np.float32(shrink), self.labels[i]

    def letterboxed(self, i):
        """Picture i as evaluation sees it. An unreadable one is grey and empty, for evaluation keeps count."""
        canvas = torch.full((3, *self.shape), PAD_VALUE, dtype=torch.uint8)
        image = self.read(i)
        if image is None:
            return canvas, np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        _, xs, ys = letterbox_spans(self.sizes[i].tolist(), self.shape)
        paste_resized(canvas, image, xs, ys)
        return canvas, transform_boxes(self.boxes[i], xs, ys), self.labels[i].copy()

    def __getitem__(self, key):
        """key: (epoch, index), or an index, which is of epoch 0. The whole recipe, in its order."""
        epoch, index = map(int, key if isinstance(key, tuple) else (0, key))
        a, rng = self.augment, np.random.default_rng((self.seed, epoch, index))

        def make_sample(index, image=None):
            pictures = [self.picture(index, image)]
            if rng.random() < mosaic:
                pictures += [self.picture(i) for i in self.mosaic_indices(epoch, index, 3, rng)]
                pictures = [pictures[i] for i in rng.permutation(4)]
            return compose_mosaic(pictures, rng, self.shape, a.get('scale', 0.0), a.get('translate', 0.0))

        if a is None:
            image, boxes, labels = self.letterboxed(index)
        else:
            late = a.get('no_aug_epoch') is not None and epoch >= a['no_aug_epoch']
            mosaic, mixed = (0.0, 0.0) if late else (a.get('mosaic', 0.0), a.get('mixup', 0.0))
            while (image := self.read(index)) is None:                 # the next readable picture stands in
                index = (index + 1) % len(self)
            sample = make_sample(index, image)
            if rng.random() < mixed:
                sample = mixup(sample, make_sample(self.mosaic_indices(epoch, index, 1, rng)[0]), rng)
            sample = color_jitter(*sample, rng, a.get('hsv', (0.0, 0.0, 0.0)))
            image, boxes, labels = hflip(*sample, rng, a.get('flip', 0.0))
        return dict(image=image, labels=torch.from_numpy(labels), boxes=torch.from_numpy(boxes), index=index)


def collate(samples):
    """Samples -> images (B, 3, H, W) uint8, labels (B, M) padded with -1, boxes (B, M, 4), index (B,); M >= 1."""
    B, M = len(samples), max(1, *(len(s['labels']) for s in samples))
    labels, boxes = torch.full((B, M), -1), torch.zeros(B, M, 4)
    for b, s in enumerate(samples):
        labels[b, :len(s['labels'])], boxes[b, :len(s['labels'])] = s['labels'], s['boxes']
    return dict(images=torch.stack([s['image'] for s in samples]), labels=labels, boxes=boxes,
                index=torch.tensor([s['index'] for s in samples]))


# ------------------------------------------------------------------------------------------ drawing

def class_color(label):
    """A colour per class: golden-angle steps around the hue circle, so that neighbours differ most."""
    return tuple(int(127.5 + 127.5 * math.cos(2 * math.pi * (label * 0.381966 + third / 3))) for third in (0, 2, 1))


def draw_boxes(image, boxes, labels, names, scores=None):
    """A copy of a PIL.Image with boxes (n, 4) xyxy in its pixels; on each a plate with its class, and score."""
    image = image.convert('RGB')
    draw, (W, H) = ImageDraw.Draw(image), image.size
    font = ImageFont.load_default(size=max(9, round(max(W, H) / 64)))
    boxes, labels = [[float(v) for v in box] for box in boxes], [int(label) for label in labels]
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=class_color(label), width=max(1, round(max(W, H) / 500)))
    for n, ((x1, y1, _, _), label) in enumerate(zip(boxes, labels, strict=True)):  # plates last: no line crosses a word
        text = (names[label] if label < len(names) else f'class {label}') + (f' {float(scores[n]):.2f}' if scores is not None else '')
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        w, h, colour = right - left + 4, bottom - top + 3, class_color(label)
        x, y = min(max(x1, 0), max(W - w, 0)), y1 - h if y1 >= h else max(y1, 0)   # above the box, or just inside
        draw.rectangle((x, y, x + w - 1, y + h - 1), fill=colour)
        dark = colour[0] * 0.299 + colour[1] * 0.587 + colour[2] * 0.114 > 110
        draw.text((x + 2 - left, y + 1 - top), text, fill='black' if dark else 'white', font=font)
    return image


# ------------------------------------------------------------------------------------------ shapes, a set of our own

SHAPES = ('circle', 'square', 'triangle', 'star', 'ring', 'cross')


def outline(kind, turn):
    """The corners (n, 2) of a shape in the unit circle, `turn` radians from upright; round ones have many."""
    if kind == 'cross':
        arm, end = np.array([0.36, 1]) / math.hypot(0.36, 1)           # half the width of an arm, its length
        points = [(arm, end), (arm, arm), (end, arm), (end, -arm), (arm, -arm), (arm, -end)]
        points = np.array(points + [(-x, -y) for x, y in points])
    else:
        n = dict(circle=48, ring=48, square=4, triangle=3, star=10)[kind]
        angle = (np.arange(n) / n - 0.25 + (kind == 'square') / 8) * 2 * math.pi      # a corner on top, a square's side
        points = np.stack((np.cos(angle), np.sin(angle)), 1)
        if kind == 'star':
            points[1::2] *= 0.42
    cos, sin = math.cos(turn), math.sin(turn)
    return points @ np.array([[cos, sin], [-sin, cos]])


def texture(size, rng):
    """(size, size, 3) uint8: clouds, gradient, stripes or checks between two random colours, with noise."""
    y, x = np.mgrid[:size, :size] / size
    kind, angle, period = rng.integers(4), rng.uniform(0, 2 * math.pi), rng.uniform(3, 14)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if kind == 0:
        octaves = ((3, 0.4), (7, 0.3), (17, 0.2), (47, 0.1))
        t = sum(share / 255 * np.asarray(Image.fromarray(rng.integers(0, 256, (n, n), np.uint8)).resize((size, size), Image.BICUBIC))
                for n, share in octaves)
    elif kind == 1:
        t = (along - along.min()) / max(np.ptp(along), 1e-9)
    else:
        t = 0.5 + 0.5 * np.sin(2 * math.pi * period * along)
        if kind == 3:
            t = (t > 0.5) ^ (np.sin(2 * math.pi * period * across) > 0)
    a, b = rng.uniform(0, 255, (2, 3))
    return (a + (b - a) * t[..., None] + rng.normal(0, rng.uniform(1, 8), (size, size, 1))).clip(0, 255).astype(np.uint8)


def draw_shapes(rng, size=192):
    """
    One picture of the shapes set -> PIL.Image, labels (n,), boxes (n, 4) of the whole shapes, cut at the border.

    The background is textured; every shape has a random colour and stands nearly upright, so that form alone tells the
    class. Shapes hide each other, but one that would leave less than half of an earlier one in sight, or melts into what
    is under it, is tried elsewhere: every object in the picture can be seen, and has its label.
    """
    canvas = texture(size, rng)
    owner = np.zeros((size, size), np.int64)                           # which object does a pixel show? 0: none
    areas, labels, boxes = [], [], []
    for _ in range(rng.integers(3, 17)):
        for _ in range(12):
            kind, (cx, cy) = int(rng.integers(len(SHAPES))), rng.uniform(0, size, 2)
            radius = 4 * (90 / 8) ** rng.random() ** 0.35              # 8..90 px across, one in five below 32
            points = outline(SHAPES[kind], rng.uniform(-0.3, 0.3)) * radius + (cx, cy)
            x1, y1, x2, y2 = *points.min(0), *points.max(0)
            left, top, right, bottom = math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)
            mask = Image.new('L', (3 * (right - left), 3 * (bottom - top)))        # drawn three times as large: smooth rims
            pen = ImageDraw.Draw(mask)
            pen.polygon([tuple(p) for p in (points - (left, top)) * 3], fill=255)
            if SHAPES[kind] == 'ring':
                pen.polygon([tuple(p) for p in ((points - (cx, cy)) * 0.56 + (cx - left, cy - top)) * 3], fill=0)
            mask = np.asarray(mask.resize((right - left, bottom - top), Image.BOX)) / 255
            area = (mask > 0.5).sum()
            fill = (rng.uniform(0, 255, 3) + rng.normal(0, 5, (*mask.shape, 3))).clip(0, 255)       # one colour, a little grain
            # what of it lies inside the picture
            inside = np.s_[max(-top, 0):size - top, max(-left, 0):size - left]
            under = np.s_[max(top, 0):bottom, max(left, 0):right]
            mask, fill = mask[inside], fill[inside]
            solid = mask > 0.5
            seen = np.bincount(owner.ravel(), minlength=len(areas) + 1)[1:]
            hidden = np.bincount(owner[under][solid], minlength=len(areas) + 1)[1:]
            if solid.sum() < 0.6 * area or (seen - hidden < 0.5 * np.array(areas)).any():
                continue
            if np.abs(fill[solid].mean(0) - canvas[under][solid].mean(0)).max() < 50:
                continue
            canvas[under] = np.rint(canvas[under] + (fill - canvas[under]) * mask[..., None])
            areas.append(area)
            owner[under][solid] = len(areas)
            labels.append(kind)
            boxes.append((max(x1, 0), max(y1, 0), min(x2, size), min(y2, size)))
            break
    return Image.fromarray(canvas), labels, boxes


def write_set(out, names, draw, train, val, seed, judged):
    """
    Write train.json, val.json, images/train/*.jpg, images/val/*.jpg under `out`. Picture i is draw(rng of (seed, split, i))
    -> PIL.Image, labels, boxes, and depends on nothing else. val.json holds the objects with a label in `judged` only.
    """
    start = time.time()
    for split, name, count in ((0, 'val', val), (1, 'train', train)):
        folder, file = os.path.join(out, 'images', name), os.path.join(out, f'{name}.json')
        data = dict(info=dict(description=f'made by data.py, seed {seed}'), images=[], annotations=[],
                    categories=[dict(id=i, name=kind) for i, kind in enumerate(names, 1)])
        try:
            os.makedirs(folder, exist_ok=True)
            for i in range(1, count + 1):
                image, labels, boxes = draw(np.random.default_rng((seed, split, i)))
                image.save(os.path.join(folder, f'{i:06d}.jpg'), quality=92)
                data['images'].append(dict(id=i, file_name=f'{i:06d}.jpg', width=image.width, height=image.height))
                for label, (x1, y1, x2, y2) in zip(labels, boxes, strict=True):
                    if split == 1 or label in judged:
                        box = [round(float(v), 2) for v in (x1, y1, x2 - x1, y2 - y1)]
                        data['annotations'].append(dict(id=len(data['annotations']) + 1, image_id=i, category_id=label + 1,
                                                        bbox=box, area=round(box[2] * box[3], 2), iscrowd=0))
                if i == count or sys.stdout.isatty() and i % 20 == 0:
                    print(f'\r{folder}: {i}/{count} pictures, {time.time() - start:.0f} s', end='\n' if i == count else '', flush=True)
            with open(file + '.part', 'w', encoding='utf-8') as f:
                json.dump(data, f)
            os.replace(file + '.part', file)                           # train.json comes last, and says that all is there
        except OSError as e:
            raise InputError(f'cannot write the pictures to {out} ({e.strerror}): choose another folder with --out=') from None


def make_shapes(out='data/shapes', train=2000, val=200, size=192, seed=0):
    """The quick start's set: see draw_shapes."""
    write_set(out, SHAPES, lambda rng: draw_shapes(rng, size), train, val, seed, range(len(SHAPES)))


# A set that only global context solves. A strip 2,048 px long and 32 high: near its left end a lamp, red, green or
# blue; beyond column 1,100 some white discs. A disc's class is the lamp's colour, more than 1,000 px away, where the
# convolutions of scale n see 625 px to either side at the very most (all kernels of the longest path added up).
LAMPS = {'red': (230, 40, 40), 'green': (40, 200, 60), 'blue': (50, 80, 240)}


def draw_far(rng, size=(2048, 32)):
    """One strip -> PIL.Image, labels (n,): 0..2 the lamp, 3..5 the discs, boxes (n, 4)."""
    W, H = size
    grey = Image.fromarray(rng.integers(60, 190, (1, W // 16), np.uint8)).resize(size, Image.BICUBIC)
    canvas = Image.fromarray((np.asarray(grey) + rng.normal(0, 6, (H, W))).clip(0, 255).astype(np.uint8)).convert('RGB')
    pen, colour, x = ImageDraw.Draw(canvas), int(rng.integers(3)), rng.uniform(4, 30)
    labels, boxes, end = [colour], [(x, 4, x + 24, 28)], 0
    pen.rectangle(boxes[0], fill=tuple(LAMPS.values())[colour])
    for x in np.sort(rng.uniform(1100, W - 32, rng.integers(3, 7))):
        side = rng.uniform(14, 26)
        y = rng.uniform(1, H - 1 - side)
        if x > end + 2:
            pen.ellipse((x, y, x + side, y + side), fill=(255, 255, 255), outline=(0, 0, 0), width=2)
            labels.append(3 + colour)
            boxes.append((x, y, x + side, y + side))
            end = x + side
    return canvas, labels, boxes


def make_far(out='data/far', train=1500, val=200, seed=0):
    """See draw_far. Lamps are labelled in training, so that their colour is worth knowing; val.json lists the discs alone,
    so that its AP is theirs."""
    names = [f'{colour} lamp' for colour in LAMPS] + [f'{colour} disc' for colour in LAMPS]
    write_set(out, names, draw_far, train, val, seed, range(3, 6))


# ------------------------------------------------------------------------------------------ COCO download
#
# `python data.py coco20` takes the annotations, val2017 and a seeded 20 % of train2017, the latter image by image: the
# server's other offer is one zip of 19 GB. A file gets its name when it is whole and checked; until then it is
# NAME.part, beside it NAME.etag with the server's mark of that version, and can be continued, tomorrow if need be.
# Left out: redirects (reported, not followed), checksums (COCO publishes none), two downloads into one folder at once.

IMAGE_BYTES = 164e3                                                # what a COCO image weighs on average


class Traffic:
    """What the downloading threads share: the server, a connection each, the counters behind the progress line."""

    def __init__(self, base_url, files, expected):
        url = urllib.parse.urlsplit(base_url)
        if url.scheme not in ('http', 'https') or not url.hostname:
            raise InputError(f'--base_url={base_url} is not the address of a server, as http://images.cocodataset.org is')
        self.kind = http.client.HTTPSConnection if url.scheme == 'https' else http.client.HTTPConnection
        self.host, self.root = url.netloc, url.path.rstrip('/')
        proxy = urllib.request.getproxies().get('http') if url.scheme == 'http' else None
        if proxy and not urllib.request.proxy_bypass(url.netloc):                  # a proxy wants to hear the whole URL
            self.host, self.root = urllib.parse.urlsplit(proxy).netloc.rpartition('@')[2], base_url.rstrip('/')
        self.local, self.connections, self.lock, self.stop = threading.local(), [], threading.Lock(), threading.Event()
        self.files, self.expected, self.done, self.retries, self.got = files, expected, 0, 0, 0
        self.start = self.printed = time.monotonic()

    def connection(self):
        """Kept open from file to file: far from the server a handshake for every 164 kB would cost most of the time."""
        if not hasattr(self.local, 'connection'):
            self.local.connection = self.kind(self.host, timeout=30)               # opens itself, again after a close()
            self.connections.append(self.local.connection)
        return self.local.connection

    def count(self, done=0, retries=0, got=0):
        with self.lock:
            self.done, self.retries, self.got = self.done + done, self.retries + retries, self.got + got
            now, tty = time.monotonic(), sys.stdout.isatty()
            if got and now - self.printed > (0.5 if tty else 20):                # a log file wants fewer lines
                self.printed, speed = now, self.got / (now - self.start)
                left = max(self.expected - self.got, 0) / speed / 60
                print(f'{self.done:,} of {self.files:,} files, {self.got / 1e6:,.0f} of about {self.expected / 1e6:,.0f} MB, '
                      f'{speed / 1e6:.1f} MB/s, {left:.1f} min left    ', end='\r' if tty else '\n', flush=True)


def filesize(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def receive(net, name, part, etag):
    """One request for what `part` still lacks. A cut or a refusal raises; the bytes that came before it are kept."""
    held, mark = filesize(part), ''
    if held and os.path.exists(etag):
        with open(etag, encoding='utf-8') as f:
            mark = f.read()
    connection = net.connection()
    connection.request('GET', f'{net.root}/{name}', headers={'Range': f'bytes={held}-'} if mark else {})
    answer = connection.getresponse()
    version = answer.getheader('ETag', 'W/')                                       # weak marks (W/) vouch for no bytes
    version = answer.getheader('Last-Modified', '') if version.startswith('W/') else version
    if answer.status in (206, 416) and not (answer.status == 206 and version == mark and
                                            answer.getheader('Content-Range', '').startswith(f'bytes {held}-')):
        os.remove(part)
        raise http.client.HTTPException('not the version that the first piece is of')
    if answer.status not in (200, 206):
        reason = f'HTTP {answer.status} {answer.reason} {answer.getheader("Location", "")}'.strip()
        raise (http.client.HTTPException if answer.status in (408, 429) or answer.status >= 500 else InputError)(reason)
    with open(part, 'ab' if answer.status == 206 else 'wb', buffering=0) as f:     # 200: from the start
        if answer.status == 200:
            with open(etag, 'w', encoding='utf-8') as g:                           # `part` is empty by now: never a new
                g.write(version)                                                   # mark beside old bytes
        missing = answer.length                                                    # None: the server does not tell
        while not net.stop.is_set() and (chunk := answer.read1(1 << 16)):          # read() loses bytes before a reset
            f.write(chunk)
            net.count(got=len(chunk))
            missing = missing and missing - len(chunk)
    if missing or net.stop.is_set():
        raise http.client.HTTPException(f'cut {missing or 0:,} bytes before the end')
    answer.close()                                                                 # the connection itself stays open


def fetch(net, name, path, fault, tries, pause):
    """One file; InputError if it never comes. Cuts may be many: limited are the attempts that bring no new byte."""
    part, etag, idle = path + '.part', path + '.etag', 0
    furthest = filesize(part)
    while True:
        again = True
        try:
            receive(net, name, part, etag)
            reason = fault(part)
            if not reason:
                os.remove(etag)
                os.replace(part, path)
                return net.count(done=1)
            os.remove(part)                                                        # whole but wrong: all of it again
        except (InputError, OSError, http.client.HTTPException) as e:
            net.connection().close()
            reason = str(e) or type(e).__name__
            again = not isinstance(e, InputError) and getattr(e, 'errno', 0) != errno.ENOSPC
        idle, furthest = 0 if filesize(part) > furthest else idle + 1, max(filesize(part), furthest)
        if not again or idle > tries or net.stop.wait(pause * 2 ** idle):
            raise InputError(f'{name}: {reason}')
        net.count(retries=1)


def fetch_all(base_url, files, expected, jobs, *patience):
    """files: [(name on the server, path here, fault)], fault(path) -> '' or what is wrong. All arrive, or InputError."""
    net, failed = Traffic(base_url, len(files), expected), []
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    futures = [pool.submit(fetch, net, *file, *patience) for file in files]
    try:
        for future in concurrent.futures.as_completed(futures):
            try:
                future.result()
            except InputError as e:
                failed.append(e)
                print(f'{e!s:<100}', file=sys.stderr)
                if len(failed) == 20:                                              # asks no dead network 23,000 times
                    break
    finally:
        net.stop.set()
        for connection in net.connections:                                         # wakes whoever waits for bytes
            with contextlib.suppress(OSError, AttributeError):                     # or has just closed it
                connection.sock.shutdown(socket.SHUT_RDWR)
        pool.shutdown(cancel_futures=True)
        print(f'{net.done:,} of {net.files:,} files, {net.got / 1e6:,.1f} MB in {time.monotonic() - net.start:.0f} s, '
              f'{net.retries:,} retries{"":40}')
    if failed:
        raise InputError(f'{failed[0]}; {net.files - net.done:,} files are missing, the others are kept, and the same '
                         'command goes on from there')


def image_fault(path, width, height):
    try:
        with Image.open(path) as image, open(path, 'rb') as f:
            image.load()                                                           # all of it: finds cuts and garbage
            data = f.read()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        return f'broken image: {e}'
    # The decoder can do without the end marker, so look. Not all are JPEGs: train2017/000000320612.jpg is a PNG
    if image.format == 'JPEG' and b'\xff\xd9' not in data[len(data) // 2:]:
        return 'broken image: no end marker'
    return '' if image.size == (width, height) else f'image of {image.size}, in the annotations {(width, height)}'


def zip_fault(path):
    try:
        with zipfile.ZipFile(path) as z:
            broken = z.testzip()
            return f'{broken} is broken' if broken else ''
    except (zipfile.BadZipFile, zlib.error) as e:
        return f'broken zip: {e}'


def coco_subset(coco, fraction, seed):
    """A seeded share of the images with their annotations; it depends on the ids, the fraction and the seed only."""
    ids = sorted(image['id'] for image in coco['images'])
    chosen = set(random.Random(seed).sample(ids, max(1, round(fraction * len(ids)))))
    return {**coco, 'images': sorted((x for x in coco['images'] if x['id'] in chosen), key=lambda x: x['id']),
            'annotations': [x for x in coco['annotations'] if x['image_id'] in chosen]}


def download_coco(out='data/coco', fraction=0.2, seed=0, jobs=16, base_url='http://images.cocodataset.org', tries=5, pause=1.0):
    """
    Fill `out` with annotations/*.json, images/val2017 and a seeded fraction (1: all) of images/train2017. What is there
    stays. The annotation files come last: who finds them finds their images. Returns the path of the train file.
    """
    if not 0 < fraction <= 1 or not 1 <= jobs <= 64:
        raise InputError(f'--fraction={fraction} must lie above 0 and up to 1, --jobs={jobs} from 1 to 64')
    try:
        folders = [os.path.join(out, folder) for folder in ('images/train2017', 'images/val2017', 'annotations')]
        for folder in folders:
            os.makedirs(folder, exist_ok=True)
        there = sum(len(os.listdir(folder)) for folder in folders)
        needed, free = (118_287 * fraction + 5_000 - there) * IMAGE_BYTES + 0.8e9, shutil.disk_usage(out).free
        if free < needed:
            raise InputError(f'{out}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} free; make room or choose another --out')
        # 1) the annotations. The subset goes without the outlines, which are most of the 469 MB, and of the memory
        archive = os.path.join(out, 'annotations/annotations_trainval2017.zip')
        if not filesize(archive):
            fetch_all(base_url, [('annotations/annotations_trainval2017.zip', archive, zip_fault)], 253e6, 1, tries, pause)
        with zipfile.ZipFile(archive) as z:
            coco = {split: json.loads(z.read(f'annotations/instances_{split}2017.json'),
                                      object_hook=lambda x: {k: v for k, v in x.items() if k != 'segmentation'})
                    for split in ('val', 'train')}
        if fraction < 1:
            coco['train'] = coco_subset(coco['train'], fraction, seed)
        # 2) the images
        files, wanted = [], 0
        for split in coco:
            for image in coco[split]['images']:
                name = f'{split}2017/' + os.path.basename(image['file_name'])      # a zip may not point elsewhere
                path = os.path.join(out, 'images', name)
                wanted += 1
                if not filesize(path):                                             # empty: what a power cut leaves
                    fault = functools.partial(image_fault, width=image['width'], height=image['height'])
                    files.append((name, path, fault))
        print(f'{wanted:,} images wanted, {wanted - len(files):,} of them are there')
        if files:
            fetch_all(base_url, files, len(files) * IMAGE_BYTES, jobs, tries, pause)
        # 3) the annotation files: the zip's own as they are, or the subset
        share = f'_{100 * fraction:g}' + (f'_seed{seed}' if seed else '') if fraction < 1 else ''
        with zipfile.ZipFile(archive) as z:
            for member in ('annotations/instances_val2017.json', f'annotations/instances_train2017{share}.json'):
                path = os.path.join(out, member)
                with open(path + '.part', 'wb') as f:
                    f.write(z.read(member) if member in z.namelist() else json.dumps(coco['train']).encode())
                os.replace(path + '.part', path)
    except OSError as e:
        raise InputError(f'{out}: {e.strerror or e}; once that is mended, the same command goes on') from None
    except (zipfile.BadZipFile, KeyError) as e:
        raise InputError(f'{archive} is not the archive of COCO ({e}): delete it, and the same command goes on') from None
    except KeyboardInterrupt:
        raise SystemExit('interrupted; what has arrived is kept, the same command goes on from there') from None
    print(f'{path}: {len(coco["train"]["images"]):,} images, {len(coco["train"]["annotations"]):,} objects')
    return path


def coco_command(command, options):
    """options: name -> text, as they stand on the command line after `coco20` or `coco`."""
    kinds, values = dict(out=str, fraction=float, seed=int, jobs=int, base_url=str), {}
    for name, text in options.items():
        try:
            values[name] = kinds[name](text)
        except KeyError:
            raise InputError(f'--{name}: unknown setting, {command} has ' + ', '.join(f'--{kind}=' for kind in kinds)) from None
        except ValueError:
            raise InputError(f'--{name}={text}: must be {kinds[name].__name__}') from None
    if command == 'coco':
        values['fraction'] = 1.0
    path = download_coco(**values)
    if path == 'data/coco/annotations/instances_train2017_20.json':
        print('now: python train.py config/hsvdet_coco20.py')


# ------------------------------------------------------------------------------------------ command line

def image_grid(pictures, names, columns=4):
    """[((3, h, w) uint8 of one size, boxes, labels)] -> one picture of them all, large enough to read, boxes drawn."""
    _, h, w = pictures[0][0].shape
    zoom = max(1, round(480 / w))
    page = Image.new('RGB', (min(columns, len(pictures)) * w * zoom, -(-len(pictures) // columns) * h * zoom))
    for n, (image, boxes, labels) in enumerate(pictures):
        large = to_image(image).resize((w * zoom, h * zoom), Image.NEAREST)
        page.paste(draw_boxes(large, boxes * zoom, labels, names), (n % columns * w * zoom, n // columns * h * zoom))
    return page


def write_picture(page, path):
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        page.save(path)
    except (OSError, ValueError) as e:
        raise InputError(f'cannot write {path} ({e}): choose another file with --out=') from None
    print(path)


def check(source, images='', out='out/check.png'):
    """A few lines about a dataset, every defect by kind with an example, and a picture of sixteen of its images."""
    data = DetectionDataset(source, images, imgsz=480, cache_mb=0)
    n, boxes, labels = len(data), np.concatenate(data.boxes), np.concatenate(data.labels)
    good, start = [], time.time()
    for i in range(n):                                                 # decode all: a header says little about the rest
        if data.read(i) is not None:
            good.append(i)
        if sys.stderr.isatty() and (i % 50 == 49 or i == n - 1):
            print(f'\ropening {i + 1}/{n} images, {time.time() - start:.0f} s', end='\n' if i == n - 1 else '', file=sys.stderr)
    counts = np.array([len(b) for b in data.boxes])
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1))             # (N,) as COCO counts sizes: the root of the area
    edges = [0, 8, 16, 32, 64, 96, 128, 256, np.inf]
    shares = np.histogram(sides, edges)[0] / len(sides)                # by octaves, and COCO's own edges
    overlap = np.concatenate([max_pairwise_iou(b) for b in data.boxes])
    w, h = data.sizes.T
    print(f'{source}: {n} images, {(counts == 0).sum()} of them without objects, {len(boxes)} objects, {len(data.names)} classes')
    print(f'images     {w.min()}x{h.min()} to {w.max()}x{h.max()}, median {np.median(w):.0f}x{np.median(h):.0f}')
    per_class = np.bincount(labels, minlength=len(data.names))
    ranked = [f'{data.names[i]} {per_class[i]}' for i in np.argsort(-per_class, kind='stable')]
    print('objects    ' + ', '.join(ranked if len(ranked) <= 24 else ranked[:12] + ['...'] + ranked[-6:]))
    print('per image  ' + ', '.join(f'{q} % have up to {np.quantile(counts, q / 100):.0f}' for q in (10, 50, 90)) + f', most {counts.max()}')
    print('side       ' + ', '.join(f'{edges[i]}-{edges[i + 1]} px {share:.0%}'.replace('-inf', '+') for i, share in enumerate(shares) if share))
    small, large = (sides < 32).mean(), (sides >= 96).mean()
    print(f'COCO size  small (below 32 px) {small:.1%}, medium {1 - small - large:.1%}, large (from 96 px) {large:.1%}')
    print('crowding   ' + ', '.join(f'{(overlap > t).mean():.1%} overlap another by IoU > {t}' for t in (0.1, 0.3, 0.5)))
    print('defects    ' + ('none' if not data.issues else ''))
    for kind, (count, example) in data.issues.items():
        print(f'  {count} x {kind}, such as {example}')
    chosen = [good[i] for i in np.linspace(0, len(good) - 1, min(16, len(good))).round().astype(int)]
    write_picture(image_grid([(s['image'], s['boxes'], s['labels']) for s in (data[i] for i in chosen)], data.names), out)


def max_pairwise_iou(boxes):
    """For each of boxes (n, 4): its largest IoU with another one, (n,)."""
    low, high = np.maximum(boxes[:, None, :2], boxes[:, :2]), np.minimum(boxes[:, None, 2:], boxes[:, 2:])
    common = (high - low).clip(0).prod(2)                              # (n, n)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    iou = common / (area[:, None] + area - common)
    np.fill_diagonal(iou, 0)
    return iou.max(1, initial=0)


def show(config, settings, out='out/show.png'):
    """The first batch of epoch 0 as train.py would draw it, with this config file and these settings."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py'), encoding='utf-8') as f:
        script = f.read()
    k = {}
    exec(script[script.index('# --- knobs'):script.index('config = configure(')], k)           # the defaults have one place
    try:
        with open(config, encoding='utf-8') as f:
            exec(compile(f.read(), config, 'exec'), k)
    except FileNotFoundError:
        raise InputError(f'config file {config} not found: the ones we ship are in config/') from None
    except Exception as e:                                             # whatever a user's file raises is the user's to mend
        raise InputError(f'config file {config}: {type(e).__name__}: {e}') from None
    for name, text in settings.items():
        if name not in k:
            raise InputError(f'--{name}={text}: unknown setting; the settings are the names at the top of train.py')
        try:
            k[name] = text if isinstance(k[name], str) else ast.literal_eval(text)
        except (SyntaxError, ValueError):
            raise InputError(f'--{name}={text}: must be of the kind of {k[name]!r}') from None
    if k['make_data'] and not os.path.exists(k['train_data']):
        {'shapes': make_shapes, 'far': make_far}[k['make_data']](os.path.dirname(k['train_data']))
    augment = dict(mosaic=k['mosaic'], mixup=k['mixup'], scale=k['scale_aug'], translate=k['translate'],
                   hsv=(k['hsv_h'], k['hsv_s'], k['hsv_v']), flip=k['flip'], block=k['mosaic_block'])
    data = DetectionDataset(k['train_data'], k['train_images'], k['imgsz'], augment, k['seed'], k['cache_mb'])
    samples = [data[(0, int(i))] for i in data.order(0)[:k['batch_size']]]
    write_picture(image_grid([(s['image'], s['boxes'], s['labels']) for s in samples], data.names), out)


def main(args):
    """The commands of the first page."""
    options = dict(arg[2:].split('=', 1) for arg in args if arg.startswith('--') and '=' in arg)
    words = [arg for arg in args if not (arg.startswith('--') and '=' in arg)]
    takes = dict(shapes=('out', 'seed'), far=('out', 'seed'), check=('images', 'out'), show=None, coco20=None, coco=None)      # None: asked later
    command = words[0] if words else ''
    wrong = next((w for w in words[1 + (command in ('check', 'show')):]), None)
    if command not in takes or wrong or (command in ('check', 'show') and len(words) < 2):
        raise InputError(f'{wrong or command or "no command"} is not understood; there are: python data.py shapes, far, coco20, '
                         'coco, check PATH, show config/NAME.py')
    for name in options:
        if takes[command] is not None and name not in takes[command]:
            raise InputError(f'--{name}: python data.py {command} takes ' + ' and '.join(f'--{n}=' for n in takes[command]))
    if command in ('shapes', 'far'):
        if not options.get('seed', '0').isdigit():
            raise InputError(f'--seed={options["seed"]}: must be a whole number')
        make = {'shapes': make_shapes, 'far': make_far}[command]
        make(options.get('out', f'data/{command}'), seed=int(options.get('seed', 0)))
    elif command == 'check':
        check(words[1], **options)
    elif command in ('coco20', 'coco'):
        coco_command(command, options)
    else:
        out = options.pop('out', 'out/show.png')
        show(words[1], options, out)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f'error: {e}')

"""
Images and boxes: reading, augmenting, batching.

    python data.py check data/shapes/val.json       what is in a dataset, and what is wrong with it
    python data.py split my/all.json --val=0.2      my/all_train.json and my/all_val.json of it
    python train.py config/shapes.py --show_batch=True    one augmented batch as a picture: look before you train

    data = DetectionDataset('data/shapes/train.json', imgsz=256, augment=Augment(mosaic=1.0))
    data[(epoch, index)]      image (3, H, W) uint8, labels (n,), boxes (n, 4) xyxy pixels of that image

Two ideas carry the file.

1. A sample is a pure function of (seed, epoch, index). Workers, resume and cache may come and go: the bits stay.
2. All geometry is axis-aligned, so x and y can be treated separately, and the whole chain (letterbox, Mosaic, scale,
   translate) is one linear map per axis: a range of whole source pixels onto a range of whole target pixels. Only what
   survives the crop is resampled, and only once. The boxes go through the same map (see `src_dst_interval`).

Label files and their defects are labels.py's; the sets we make or fetch are in prepare/; pictures in plots.py.
What it deliberately does not do: rotation by any angle, shear and perspective (0 in the YOLOv8 recipe, and without them
idea 2 holds), masks, Copy-Paste (without masks it pastes rectangles, a cue that no photograph has).

Papers: Mosaic is YOLOv4's (Bochkovskiy et al. 2020, 2004.10934), MixUp is Zhang et al. 2018 (1710.09412).
"""
import json
import math
import os
import re
import sys
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from configurator import InputError, configure
from labels import IMAGE_ERRORS, read_coco, read_labels, split_labels, upright_size
from loss import box_iou
from plots import image_grid, save_image

PAD_VALUE = 114                                                      # grey, fills what no image covers


@dataclass
class Augment:
    """Strengths of the augmentation: settings of train.py and bench.py. One more is a line here, one in `augmented`."""
    mosaic: float = 1.0                                              # probability of four images in one
    mixup: float = 0.0                                             # probability of a second scene laid over the first
    mosaic_block: int = 0           # > 0: Mosaic's other images come from n neighbours in the epoch's order, so that a
    #                                 small cache holds them; 0: from the whole set
    scale_aug: float = 0.5                                           # size factor 1 - .. 1 + ..
    translate: float = 0.1                                           # share of the image
    flip: float = 0.5                                                # probability, left-right
    flip_vertical: float = 0.0                                  # probability, upside down: aerial images, microscopes
    quarter_turns: float = 0.0                  # probability of a turn by 90, 180 or 270 degrees (square inputs only)
    hsv_h: float = 0.015                                             # hue, share of the colour circle
    hsv_s: float = 0.7                                               # saturation, share
    hsv_v: float = 0.4                                               # value, share

    def __post_init__(self):
        for name, value in vars(self).items():
            if name == 'mosaic_block' and value < 0 or name != 'mosaic_block' and not 0 <= value <= 1:
                limits = 'at least 0' if name == 'mosaic_block' else 'from 0 to 1'
                raise InputError(f'--{name}={value}: must be {limits}')


# --- images ---------------------------------------------------------------------------------------------------------

# by EXIF orientation; Pillow's exif_transpose also writes the EXIF anew, and fails where another tag of it is wrong
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


def load_image(path, size=None, shrink=1):
    """
    An image file as an upright RGB PIL.Image, whatever it was: grey, palette, CMYK, 16 bits, turned by EXIF.

    size    (w, h) that its labels were made for. Most tools label what they see (upright), some what is stored; where
            the two differ, the one of this size is returned
    shrink  2, 4 or 8: a JPEG is decoded at that fraction, from fewer DCT coefficients; other formats ignore it
    Raises InputError when the file is missing, broken, or of neither size.
    """
    try:
        with Image.open(path) as image:
            turned = upright_size(image) != image.size
            if size is not None and tuple(size) not in (image.size, upright_size(image)):
                raise InputError(f'image {path} is {image.width}x{image.height} but its annotations are for '
                                 f'{size[0]}x{size[1]}: '
                                 'put the original image back, or correct width and height')
            as_stored = turned and size is not None and tuple(size) == image.size
            image.draft(None, (max(1, image.width // shrink), max(1, image.height // shrink)))
            image.load()                                             # only now are the pixels read
            turn = UPRIGHT.get(image.getexif().get(0x0112)) if image.format not in ('PNG', 'TIFF') else None
            if turn is not None and not as_stored:
                image = image.transpose(turn)
            return to_rgb(image)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f'image {path} not found: check the folder of the images') from None
    except IMAGE_ERRORS as e:
        why = e or type(e).__name__
        raise InputError(f'image {path} cannot be read ({why}): replace the file or take it out') from None


def to_rgb(image):
    """A PIL.Image of any mode -> RGB."""
    if image.mode.startswith('I'):                                   # 16 bits: the upper 8 of them
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    if image.mode == 'F':                                            # floats, of 0 to 1 or of 0 to 255
        pixels = np.nan_to_num(np.asarray(image))
        image = Image.fromarray((pixels * (255 if pixels.max() <= 1 else 1)).clip(0, 255).astype(np.uint8))
    if image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')
    return image if image.mode == 'RGB' else image.convert('RGB')


def to_tensor(image):
    """PIL.Image or (h, w, 3) array -> (3, h, w) uint8, a view of (h, w, 3) memory, which `resize` likes best."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(tensor):
    """(3, h, w) uint8 -> PIL.Image."""
    return Image.fromarray(tensor.permute(1, 2, 0).contiguous().numpy())


def resize(image, h, w, antialias=True):
    """(3, h0, w0) uint8 -> (3, h, w) uint8: bilinear, antialiased (Pillow's filter in a quarter of its time)."""
    if image.shape[1:] == (h, w):
        return image
    if not antialias:                                                # of the four nearest pixels, as OpenCV does
        return (F.interpolate(image[None].float(), (h, w), mode='bilinear')[0] + 0.5).byte()
    return F.interpolate(image[None], size=(h, w), mode='bilinear', antialias=True)[0]


# --- geometry ---------------------------------------------------------------------------------------------------------

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


def paste_resized(canvas, image, xs, ys, antialias=True):
    """Draw columns and rows `xs`, `ys` (two intervals) of image (3, h, w) on canvas (3, H, W), in place."""
    (a, b, c, d), (e, f, g, h) = xs, ys
    canvas[:, g:h, c:d] = resize(image[:, e:f, a:b], h - g, d - c, antialias)


def transform_boxes(boxes, xs, ys):
    """Boxes (n, 4) through the same two intervals, not yet clipped."""
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


def letterbox_intervals(size, shape, longest=math.inf):
    """(w, h) in (H, W): scale and the two intervals of the whole image, centred, as large as fits; see letterbox."""
    (w, h), (H, W) = size, shape
    scale = min(W / w, H / h, longest / max(w, h))
    nw, nh = max(round(w * scale), 1), max(round(h * scale), 1)
    left, top = (W - nw) // 2, (H - nh) // 2
    return scale, (0, w, left, left + nw), (0, h, top, top + nh)


def letterbox(image, shape, longest=math.inf, antialias=True):
    """
    An image (PIL.Image or (h, w, 3) uint8) centred in an input of (H, W) pixels, as large as fits, on grey.
    -> uint8 (H, W, 3), scale, (left, top); a box comes back by (box - (left, top, left, top)) / scale.

    Two options reproduce YOLOv8's published figures: `longest` limits the longer side, so that the slack of a
    rectangular batch is not filled by enlarging; antialias=False samples the four nearest pixels only.
    """
    image = to_tensor(image)                                         # (3, h, w)
    scale, xs, ys = letterbox_intervals((image.shape[2], image.shape[1]), shape, longest)
    canvas = torch.full((*shape, 3), PAD_VALUE, dtype=torch.uint8)   # (H, W, 3)
    paste_resized(canvas.permute(2, 0, 1), image, xs, ys, antialias)
    return canvas.numpy(), scale, (xs[2], ys[2])


def rect_shape(sizes, imgsz, pad=0.5):
    """
    (H, W), multiples of 32, of the smallest input for pictures of `sizes` (n, 2) w, h whose longer side is made
    imgsz, plus `pad` cells of slack. The published YOLOv8 figures are taken so: 640x480 at 320 goes into 256x352,
    and objects at the rim are found better for it.
    """
    sizes = np.asarray(sizes, float).reshape(-1, 2)
    need = (sizes / sizes.max(1, keepdims=True)).max(0) * imgsz / 32      # (2,) cells wide, cells high
    W, H = np.ceil(need + pad - 1e-9).astype(int) * 32
    return int(H), int(W)


# --- augmentation -----------------------------------------------------------------------------------------------------
# Each function takes all its random numbers from `rng` and changes none of its arguments. An image that is still to be
# placed is a tuple (read, (w, h), boxes, labels): read() decodes it, and is called only if part of it will be visible.

def compose_mosaic(images, rng, shape, scale, translate):
    """
    One image, or four as a mosaic, on an (H, W) input -> image (3, H, W), boxes (n, 4), labels (n,).

    A mosaic is four images, each letterbox-sized, that meet at a random centre of a canvas twice the input. The canvas
    is zoomed by 1 ± scale, shifted by ± translate of the input, and the middle is cut out. In one map: canvas point X
    goes to (X - W) * zoom + shift. So only the centre is transformed, and each image is placed by its corner there.
    """
    H, W = shape
    canvas = torch.full((3, H, W), PAD_VALUE, dtype=torch.uint8)
    zoom = rng.uniform(1 - scale, 1 + scale)
    shift = rng.uniform(0.5 - translate, 0.5 + translate, 2) * (W, H)
    meet = np.rint((rng.uniform(0.5, 1.5, 2) - 1) * (W, H) * zoom + shift)
    kept = [(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))]
    for corner, (read, (w, h), boxes, labels) in enumerate(images):
        grow = min(W / w, H / h) * zoom
        if len(images) == 1:
            x, y = shift - (w * grow / 2, h * grow / 2)
        else:                                                       # 0 1 / 2 3: left and upper ones end at the centre
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
    turn = cos * np.eye(3) + (1 - cos) / 3 + sin * cross             # Rodrigues, about (1, 1, 1)
    luma = np.array([[0.299, 0.587, 0.114]] * 3)
    matrix = (1 + v) * ((1 + s) * np.eye(3) - s * luma) @ turn
    # 16-bit fixed point takes half the time of float32; it gets as many bits as the largest sum leaves room for
    bits = int(math.log2(32000 / 255 / max(np.abs(matrix).sum(1).max(), 0.1)))
    weights = np.rint(matrix * 2**bits)
    weights += np.diag(np.rint((1 + v) * 2**bits) - weights.sum(1))  # rounding must not tint what is grey
    out = torch.empty_like(image)
    for y in range(0, image.shape[1], 128):                          # in bands that stay in the processor's cache
        red, green, blue = image[:, y:y + 128].short()               # (128, W) each
        for channel, (r, g, b) in enumerate(weights.astype(int).tolist()):
            total = (red * r).add_(green, alpha=g).add_(blue, alpha=b).add_(2**bits // 2)
            out[channel, y:y + 128] = total.bitwise_right_shift_(bits).clamp_(0, 255)
    return out, boxes, labels


def hflip(image, boxes, labels):
    """Left for right."""
    W = image.shape[2]
    return image.flip(2), np.stack((W - boxes[:, 2], boxes[:, 1], W - boxes[:, 0], boxes[:, 3]), 1), labels


def vflip(image, boxes, labels):
    """Upside down."""
    H = image.shape[1]
    return image.flip(1), np.stack((boxes[:, 0], H - boxes[:, 3], boxes[:, 2], H - boxes[:, 1]), 1), labels


def quarter_turn(image, boxes, labels):
    """A square scene by 90 degrees, counter-clockwise: what was right is on top."""
    W = image.shape[2]
    return image.rot90(1, (1, 2)), np.stack((boxes[:, 1], W - boxes[:, 2], boxes[:, 3], W - boxes[:, 0]), 1), labels


# --- the dataset ----------------------------------------------------------------------------------------------------

def previous_frame(file):
    """The frame before: clip/000041.jpg -> clip/000040.jpg if that file is there, else (at the start) the same."""
    number = re.search(r'\d+(?=\.\w+$)', file)
    if not number or not int(number[0]):
        return file
    before = str(int(number[0]) - 1)
    likely = [file[:number.start()] + digits + file[number.end():]             # 10.jpg follows 09.jpg, or 9.jpg
              for digits in (before.zfill(len(number[0])), before)]
    return next((earlier for earlier in likely if os.path.isfile(earlier)), file)


class DetectionDataset:
    """
    A detection set on disk, as samples of one size.

    source    what labels.read_labels takes: COCO .json, YOLO folder or .yaml, VOC folder or list
    images    folder of the images of a COCO json; '' looks in the likely places beside it
    imgsz     (H, W) of the samples, or one int for both
    augment   None: letterboxed, as evaluation sees it; or an Augment
    cache_mb  memory for decoded images, shared out among the workers of a loader; it changes no bit of any sample
    names     class names in the order wanted (a validation set takes the training set's); default: as in the file
    no_aug_epoch  from this epoch on, which may be a fraction, Mosaic and MixUp rest; None: never
    frames    earlier frames that come with each image, augmented alike: samples are clips (frames + 1, 3, H, W), oldest
              first, of whose last frame the boxes are. Files of a clip are numbered through, as ffmpeg's %06d.jpg; not
              all of them need labels. Where a clip starts its first frame is repeated

    The table of labels.Labels is here too: names, category_ids, image_ids, files, sizes (n, 2) w h, labels and boxes
    per image (xyxy in ORIGINAL pixels, crowds left out), issues {kind: [count, first example]}, coco().
    """

    def __init__(self, source, images='', imgsz=(640, 640), augment=None, seed=0, cache_mb=1024, names=None,
                 no_aug_epoch=None, frames=0):
        self.table = t = read_labels(source, images, names)
        self.source, self.names, self.category_ids, self.image_ids = source, t.names, t.category_ids, t.image_ids
        self.files, self.sizes, self.labels, self.boxes, self.issues = t.files, t.sizes, t.labels, t.boxes, t.issues
        self.coco = t.coco
        self.augment, self.seed, self.cache_mb, self.no_aug_epoch = augment, seed, cache_mb, no_aug_epoch
        self.frames = frames
        if frames and all(previous_frame(file) == file for file in self.files):
            raise InputError(f'{source}: no image has an earlier frame beside it, {self.files[0]} for one: memory=time '
                             'takes files that are numbered through (ffmpeg -i video.mp4 clip/%06d.jpg)')
        self.shape = (imgsz, imgsz) if isinstance(imgsz, int) else tuple(imgsz)
        if augment and augment.quarter_turns and self.shape[0] != self.shape[1]:
            raise InputError(f'--quarter_turns={augment.quarter_turns} needs a square input, imgsz is {self.shape}')
        self.shrink = np.ones(len(self), np.int64)
        if augment is not None:
            # A JPEG is decoded at 1/2, 1/4 or 1/8 where not even the largest zoom wants more. Decided by image and
            # not by sample, so that one cached image serves every sample.
            H, W = self.shape
            most = np.minimum(W / self.sizes[:, 0], H / self.sizes[:, 1]) * (1 + augment.scale_aug)
            jpeg = np.array([name.lower().endswith(('.jpg', '.jpeg')) for name in self.files])
            for shrink in (2, 4, 8):
                self.shrink[jpeg & (most <= 1 / shrink)] = shrink
        self.cache, self.cached_bytes, self.broken, self.sorted_epoch = OrderedDict(), 0, set(), None

    def __len__(self):
        return len(self.files)

    def clip_files(self, i):
        """The files of image i and of the `frames` before it, oldest first."""
        files = [self.files[i]]
        while len(files) <= self.frames:
            files.insert(0, previous_frame(files[0]))
        return files

    def read(self, i, back=0):
        """
        Image i, or the one `back` frames before it, as (3, h, w) uint8, at 1/shrink. None, and one printed warning, if
        it cannot be used; an earlier frame that cannot be used is replaced by grey.
        """
        if len(self.broken) == len(self):
            raise InputError(f'not one image of {self.source} can be used')
        if i in self.broken or back and self.read(i) is None:        # without its last frame a clip is of no use
            return None
        file = self.clip_files(i)[-1 - back]
        (w, h), shrink = self.sizes[i].tolist(), int(self.shrink[i])
        key = file, w, h, shrink                                     # clips of other sizes may share a frame
        if key in self.cache:
            self.cache.move_to_end(key)
            return self.cache[key]
        try:
            image = to_tensor(load_image(file, (w, h), shrink))
        except InputError as e:
            if back:
                return torch.full((3, -(-h // shrink), -(-w // shrink)), PAD_VALUE, dtype=torch.uint8)
            self.broken.add(i)
            kind = 'image of another size' if 'annotations are for' in str(e) else 'image unreadable'
            self.table.record_issue(kind, str(e))
            print(f'warning: skipped: {e}', file=sys.stderr)
            if len(self.broken) == len(self):
                raise InputError(f'not one image of {self.source} can be used: {e}') from None
            return None
        if shrink > 1:
            image = resize(image, -(-h // shrink), -(-w // shrink))  # for a .jpg that is a PNG; else it is so already
        worker = torch.utils.data.get_worker_info()
        budget = self.cache_mb * 2**20 // (worker.num_workers if worker else 1)
        if image.numel() <= budget:
            self.cache[key] = image
            self.cached_bytes += image.numel()
            while self.cached_bytes > budget:                        # out goes what was unused for longest
                self.cached_bytes -= self.cache.popitem(last=False)[1].numel()
        return image

    def order(self, epoch):
        """The order (n,) in which to visit the set in this epoch."""
        return np.random.default_rng((self.seed, epoch)).permutation(len(self))

    def mosaic_indices(self, epoch, index, count, rng):
        """Some images to share a scene with image `index`."""
        block = self.augment.mosaic_block
        if not 0 < block < len(self):
            return rng.integers(len(self), size=count).tolist()
        if self.sorted_epoch != epoch:
            self.sorted_epoch, self.sorted = epoch, self.order(epoch)
            self.position = np.argsort(self.sorted)
        start = min(self.position[index] // block * block, len(self) - block)
        return self.sorted[start + rng.integers(block, size=count)].tolist()

    def to_place(self, i, back, image=None):
        """Image i, or `back` frames before, for `scene`: (read, (w, h), boxes, labels), in pixels as decoded."""
        (w, h), shrink = self.sizes[i].tolist(), int(self.shrink[i])
        read = (lambda: self.read(i, back)) if image is None else (lambda: image)
        return read, (-(-w // shrink), -(-h // shrink)), self.boxes[i] / np.float32(shrink), self.labels[i]

    def letterboxed(self, i, back=0):
        """Image i as evaluation sees it. An unreadable one is grey and empty, for evaluation keeps count."""
        canvas = torch.full((3, *self.shape), PAD_VALUE, dtype=torch.uint8)
        image = self.read(i, back)
        if image is None:
            return canvas, np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        _, xs, ys = letterbox_intervals(self.sizes[i].tolist(), self.shape)
        paste_resized(canvas, image, xs, ys)
        return canvas, transform_boxes(self.boxes[i], xs, ys), self.labels[i].copy()

    def scene(self, epoch, index, rng, mosaic, back, image=None):
        """Image `index` alone or, with probability `mosaic`, with three others, on one canvas."""
        images = [self.to_place(index, back, image)]
        if rng.random() < mosaic:
            images += [self.to_place(i, back) for i in self.mosaic_indices(epoch, index, 3, rng)]
            images = [images[i] for i in rng.permutation(4)]
        return compose_mosaic(images, rng, self.shape, self.augment.scale_aug, self.augment.translate)

    def augmented(self, epoch, index, late=False, back=0):
        """The whole recipe, in its order, the same numbers for every frame of a clip. late: no Mosaic and MixUp."""
        rng = np.random.default_rng((self.seed, epoch, index))
        a = self.augment
        mosaic, mixed = (0.0, 0.0) if late else (a.mosaic, a.mixup)
        while (image := self.read(index)) is None:                   # the next readable image stands in
            index = (index + 1) % len(self)
        sample = self.scene(epoch, index, rng, mosaic, back, self.read(index, back) if back else image)
        if rng.random() < mixed:
            other = self.mosaic_indices(epoch, index, 1, rng)[0]
            sample = mixup(sample, self.scene(epoch, other, rng, mosaic, back), rng)
        sample = color_jitter(*sample, rng, (a.hsv_h, a.hsv_s, a.hsv_v))
        if rng.random() < a.flip:
            sample = hflip(*sample)
        if a.flip_vertical and rng.random() < a.flip_vertical:
            sample = vflip(*sample)
        if a.quarter_turns and rng.random() < a.quarter_turns:
            for _ in range(rng.integers(1, 4)):
                sample = quarter_turn(*sample)
        return index, *sample

    def __getitem__(self, key):
        """key: (epoch, index), or index alone for epoch 0. A fraction of an epoch matters for no_aug_epoch only."""
        when, index = key if isinstance(key, tuple) else (0, key)
        epoch, index, late = int(when), int(index), self.no_aug_epoch is not None and when >= self.no_aug_epoch
        if self.augment is None:
            views = [(index, *self.letterboxed(index, back)) for back in range(self.frames, -1, -1)]
        else:
            views = [self.augmented(epoch, index, late, back) for back in range(self.frames, -1, -1)]
        index, image, boxes, labels = views[-1]
        if self.frames:
            image = torch.stack([view[1] for view in views])                          # (frames + 1, 3, H, W)
        return dict(image=image, labels=torch.from_numpy(labels), boxes=torch.from_numpy(boxes), index=index)


def collate(samples):
    """
    Samples -> images (B, 3, H, W) uint8, of clips (B, frames + 1, 3, H, W), labels (B, M) padded with -1, boxes
    (B, M, 4), index (B,); M >= 1.
    """
    B, M = len(samples), max(1, *(len(s['labels']) for s in samples))
    labels, boxes = torch.full((B, M), -1), torch.zeros(B, M, 4)
    for b, s in enumerate(samples):
        labels[b, :len(s['labels'])], boxes[b, :len(s['labels'])] = s['labels'], s['boxes']
    return dict(images=torch.stack([s['image'] for s in samples]), labels=labels, boxes=boxes,
                index=torch.tensor([s['index'] for s in samples]))


# --- python data.py check | split -----------------------------------------------------------------------------------

def max_pairwise_iou(boxes):
    """For each of boxes (n, 4): its largest IoU with another one, (n,)."""
    boxes = torch.from_numpy(boxes)
    return box_iou(boxes, boxes).fill_diagonal_(0).numpy().max(1, initial=0)


def describe(data, imgsz):
    """The lines that `check` prints of a DetectionDataset, without its issues; imgsz: int, or a tuple of several."""
    boxes, labels = np.concatenate(data.boxes), np.concatenate(data.labels)
    counts = np.array([len(b) for b in data.boxes])
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1))           # (N,) as COCO counts sizes: the root of the area
    edges = [0, 8, 16, 32, 64, 96, 128, 256, np.inf]
    shares = np.histogram(sides, edges)[0] / len(sides)              # by octaves, and COCO's own edges
    overlap = np.concatenate([max_pairwise_iou(b) for b in data.boxes])
    w, h = data.sizes.T
    yield (f'{data.source}: {len(data)} images, {(counts == 0).sum()} of them without objects, {len(boxes)} objects, '
           f'{len(data.names)} classes')
    yield f'images     {w.min()}x{h.min()} to {w.max()}x{h.max()}, median {np.median(w):.0f}x{np.median(h):.0f}'
    per_class = np.bincount(labels, minlength=len(data.names))
    ranked = [f'{data.names[i]} {per_class[i]}' for i in np.argsort(-per_class, kind='stable')]
    yield 'objects    ' + ', '.join(ranked if len(ranked) <= 24 else ranked[:12] + ['...'] + ranked[-6:])
    yield ('per image  ' + ', '.join(f'{q} % have up to {np.quantile(counts, q / 100):.0f}' for q in (10, 50, 90))
           + f', most {counts.max()}')
    octaves = [f'{edges[i]}-{edges[i + 1]} px {share:.0%}' for i, share in enumerate(shares) if share]
    yield 'side       ' + ', '.join(octaves).replace('-inf', '+')
    small, large = (sides < 32).mean(), (sides >= 96).mean()
    yield f'COCO size  small (below 32 px) {small:.1%}, medium {1 - small - large:.1%}, large (from 96 px) {large:.1%}'
    for side in imgsz if isinstance(imgsz, tuple) else (imgsz,):
        median = np.median(sides * np.repeat(side / data.sizes.max(1), counts))       # in pixels of the network's input
        advice = 'fine' if median >= 16 else 'small: a larger imgsz will help' if median >= 8 else \
            'below what the stride of 8 px can tell apart: use a larger imgsz, or cut the images into tiles'
        yield (f'{f"at {side} px":<10} the median object is {median:.0f} px, the root of its area, {advice} '
               f'(train.py --imgsz={side})')
    yield 'crowding   ' + ', '.join(f'{(overlap > t).mean():.1%} overlap another by IoU > {t}' for t in (0.1, 0.3, 0.5))


def check_command(source, images, imgsz, out):
    """A few lines about a dataset, every defect by kind with an example, and a picture of sixteen of its images."""
    data, good = DetectionDataset(source, images, imgsz=480, cache_mb=0), []
    for i in tqdm(range(len(data)), 'opening images', disable=not sys.stderr.isatty(), leave=False):
        if data.read(i) is not None:                                 # decode all: a header says little about the rest
            good.append(i)
    print(*describe(data, imgsz), sep='\n')
    print('defects    ' + ('none' if not data.issues else ''))
    for kind, (count, example) in data.issues.items():
        print(f'  {count} x {kind}, such as {example}')
    chosen = [good[i] for i in np.linspace(0, len(good) - 1, min(16, len(good))).round().astype(int)]
    save_image(image_grid([(s['image'], s['boxes'], s['labels']) for s in (data[i] for i in chosen)], data.names), out)


def split_command(source, share, group, seed):
    """my/all.json -> my/all_train.json, my/all_val.json: seeded, classes balanced, groups kept whole."""
    stem, suffix = os.path.splitext(source)
    if suffix != '.json':
        raise InputError(f'{source}: split takes a COCO .json')
    paths = [f'{stem}_{name}.json' for name in ('train', 'val')]
    for path in paths:
        if os.path.exists(path):
            raise InputError(f'{path} is there already: move it away first')
    for path, part in zip(paths, split_labels(read_coco(source), share, group, seed), strict=True):
        try:
            with open(path + '.part', 'w', encoding='utf-8') as f:
                json.dump(part, f)
            os.replace(path + '.part', path)
        except OSError as e:
            raise InputError(f'{path} cannot be written ({e.strerror}): copy {source} to a folder of yours') from None
        print(f'{path}: {len(part["images"])} images, {len(part["annotations"])} annotations')


if __name__ == '__main__':
    images = ''                                                # check: folder of the images, '' looks beside the json
    imgsz: int | tuple = (320, 640)               # check: pixels, the inputs at which object sizes are judged; 320 is
    #                                                  config/finetune_own.py's
    out = 'out/check.png'                                            # check: the picture
    val = 0.2                                                       # split: share of the images that go to validation
    group = ''               # split: a regular expression; file names that agree in it (in its group 1) stay together
    seed = 0                                                         # split
    words = [arg for arg in sys.argv[1:] if not arg.startswith('--')]
    configure(globals(), argv=[arg for arg in sys.argv[1:] if arg.startswith('--')])
    if len(words) != 2 or words[0] not in ('check', 'split'):
        raise InputError('there are: python data.py check PATH, python data.py split my/all.json --val=0.2')
    what, source = words
    if what == 'check':
        check_command(source, images, imgsz, out)
    else:
        split_command(source, val, group, seed)

"""
Make data/shapes, the set of the quick start: pictures of overlapping shapes on textured backgrounds, COCO json files.

    python -m prepare.shapes                                 2,000 training and 200 validation pictures, half a minute
    python -m prepare.shapes --out=data/more --seed=1        another set of the same kind

    data/shapes/train.json, val.json, images/train/000001.jpg ..., images/val/000001.jpg ...

Picture i depends on (seed, split, i) alone. So all processor cores draw at once, and a longer set starts with the
pictures of a shorter one. What is there already is written again. What this set does not have: masks, small text,
perspective, crowds (iscrowd).
"""
import functools
import json
import math
import multiprocessing
import os
import signal
import sys
from multiprocessing.pool import ThreadPool

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from configurator import InputError, configure

# settings
out = 'data/shapes'
train = 2000                 # number of training pictures
val = 200                    # number of validation pictures
size = 192                   # pixels, both sides
seed = 0

SHAPES = ('circle', 'square', 'triangle', 'star', 'ring', 'cross')


# ----------------------------------------------------------------------------------------------- one picture

def shape_corners(kind, angle):
    """The corners (n, 2) of a shape in the unit circle, turned by `angle` radians; round shapes have many."""
    if kind == 'cross':
        arm, end = np.array([0.36, 1]) / math.hypot(0.36, 1)           # half the width of an arm, its length
        corners = [(arm, end), (arm, arm), (end, arm), (end, -arm), (arm, -arm), (arm, -end)]
        corners = np.array(corners + [(-x, -y) for x, y in corners])   # (12, 2)
    else:
        n = dict(circle=48, ring=48, square=4, triangle=3, star=10)[kind]
        angles = (np.arange(n) / n - 0.25 + (kind == 'square') / 8) * 2 * math.pi      # a corner on top; square: a side
        corners = np.stack((np.cos(angles), np.sin(angles)), 1)        # (n, 2)
        if kind == 'star':
            corners[1::2] *= 0.42
    cos, sin = math.cos(angle), math.sin(angle)
    return corners @ np.array([[cos, sin], [-sin, cos]])


def draw_texture(size, rng):
    """(size, size, 3) uint8: clouds, gradient, stripes or checks between two random colours, with noise."""
    y, x = np.mgrid[:size, :size] / size
    kind, angle, period = rng.integers(4), rng.uniform(0, 2 * math.pi), rng.uniform(3, 14)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if kind == 0:                                                      # clouds: grids of noise, coarse to fine
        t = 0
        for n, weight in ((3, 0.4), (7, 0.3), (17, 0.2), (47, 0.1)):
            grid = Image.fromarray(rng.integers(0, 256, (n, n), np.uint8))
            t = t + weight / 255 * np.asarray(grid.resize((size, size), Image.BICUBIC))
    elif kind == 1:
        t = (along - along.min()) / max(np.ptp(along), 1e-9)
    else:
        t = 0.5 + 0.5 * np.sin(2 * math.pi * period * along)
        if kind == 3:
            t = (t > 0.5) ^ (np.sin(2 * math.pi * period * across) > 0)
    a, b = rng.uniform(0, 255, (2, 3))
    noise = rng.normal(0, rng.uniform(1, 8), (size, size, 1))
    return (a + (b - a) * t[..., None] + noise).clip(0, 255).astype(np.uint8)


def rasterize(kind, corners, center):
    """Corners (n, 2), pixels of the picture -> coverage (h, w) of each pixel, 0..1, and the first pixel: left, top."""
    left, top = np.floor(corners.min(0)).astype(int).tolist()
    right, bottom = np.ceil(corners.max(0)).astype(int).tolist()
    mask = Image.new('L', (3 * (right - left), 3 * (bottom - top)))    # drawn three times as large: antialiased edges
    pen = ImageDraw.Draw(mask)
    pen.polygon([tuple(point) for point in (corners - (left, top)) * 3], fill=255)
    if kind == 'ring':
        hole = (corners - center) * 0.56 + (center - (left, top))
        pen.polygon([tuple(point) for point in hole * 3], fill=0)
    return np.asarray(mask.resize((right - left, bottom - top), Image.BOX)) / 255, left, top


def draw_shapes(rng, size=size):
    """
    One picture of size x size -> PIL.Image, labels (n ints into SHAPES), boxes (n times x1, y1, x2, y2 in pixels) of
    the whole shapes, hidden parts included, clipped to the picture.

    Every shape has a random colour and stands nearly upright, so only its form tells its class. Shapes occlude each
    other, but one that would leave less than half of an earlier one visible, that is mostly outside, or that has the
    colour of what is under it, is tried elsewhere: every labelled object can be seen, and every object has its label.
    """
    canvas = draw_texture(size, rng)
    pixel_owner = np.zeros((size, size), np.int64)                     # the object that a pixel shows; 0: none
    areas, labels, boxes = [], [], []
    for _ in range(rng.integers(3, 17)):                               # 3..16 objects, 12 attempts to place each
        for _ in range(12):
            # 1) a shape somewhere, 8..90 px across, one in five below 32
            label, center = int(rng.integers(len(SHAPES))), rng.uniform(0, size, 2)
            radius = 4 * (90 / 8) ** rng.random() ** 0.35
            corners = shape_corners(SHAPES[label], rng.uniform(-0.3, 0.3)) * radius + center
            coverage, left, top = rasterize(SHAPES[label], corners, center)            # (h, w)
            h, w = coverage.shape
            area = (coverage > 0.5).sum()
            fill = (rng.uniform(0, 255, 3) + rng.normal(0, 5, (h, w, 3))).clip(0, 255)  # one colour, a little noise
            # 2) the part of it inside the picture, and the same pixels of the canvas
            inside = np.s_[max(-top, 0):size - top, max(-left, 0):size - left]
            under = np.s_[max(top, 0):top + h, max(left, 0):left + w]
            coverage, fill = coverage[inside], fill[inside]
            solid = coverage > 0.5
            # 3) reject it where it could not be seen, or would hide another
            visible = np.bincount(pixel_owner.ravel(), minlength=len(areas) + 1)[1:]   # (objects,) pixels
            covered = np.bincount(pixel_owner[under][solid], minlength=len(areas) + 1)[1:]
            if solid.sum() < 0.6 * area or (visible - covered < 0.5 * np.array(areas)).any():
                continue
            contrast = np.abs(fill[solid].mean(0) - canvas[under][solid].mean(0)).max()
            if contrast < 50:                                          # of 255, in the channel that differs most
                continue
            # 4) draw it
            canvas[under] = np.rint(canvas[under] + (fill - canvas[under]) * coverage[..., None])
            areas.append(area)
            pixel_owner[under][solid] = len(areas)
            labels.append(label)
            (x1, y1), (x2, y2) = corners.min(0), corners.max(0)
            boxes.append((max(x1, 0), max(y1, 0), min(x2, size), min(y2, size)))
            break
    return Image.fromarray(canvas), labels, boxes


# ----------------------------------------------------------------------------------------------- a set of them

def reset_signals():
    """In a drawing process: Ctrl-C is for the parent alone, and SIGTERM ends it whatever the parent has made of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def make_picture(i, split, folder, draw, seed):
    """Draw and save picture i. -> (width, height), labels, boxes"""
    image, labels, boxes = draw(np.random.default_rng((seed, split, i)))
    image.save(os.path.join(folder, f'{i:06d}.jpg'), quality=92)
    return image.size, labels, boxes


def write_set(out, names, draw, train, val, seed, val_labels=None, suffix=''):
    """
    Write train.json, val.json, images/train/*.jpg and images/val/*.jpg under `out`. draw(rng) -> PIL.Image, labels
    (indices into `names`), boxes (xyxy pixels). val_labels: val.json lists only the objects with one of these labels.
    suffix: that of the file's name, where a picture saves itself as several files (prepare/clips.py).
    train.json comes last: where it is, the set is complete. Raises InputError when the folder cannot be written.
    """
    if train < 1 or val < 1 or seed < 0:
        raise InputError(f'--train={train} and --val={val} must be 1 or more, --seed={seed} must be 0 or more')
    if sys.platform == 'linux':
        pool = multiprocessing.get_context('fork').Pool(min(os.cpu_count(), 8), reset_signals)
    else:                                                              # a spawned process might run the caller again
        pool = ThreadPool(1)
    with pool:
        for split, name, count in ((0, 'val', val), (1, 'train', train)):
            folder, file = os.path.join(out, 'images', name), os.path.join(out, f'{name}.json')
            images, annotations = [], []
            try:
                os.makedirs(folder, exist_ok=True)
                make = functools.partial(make_picture, split=split, folder=folder, draw=draw, seed=seed)
                pictures = pool.imap(make, range(1, count + 1), chunksize=4)
                bar = tqdm(pictures, folder, count, unit=' pictures', disable=None)    # None: silent if not a terminal
                for i, ((width, height), labels, boxes) in enumerate(bar, 1):
                    images.append(dict(id=i, file_name=f'{i:06d}{suffix}.jpg', width=width, height=height))
                    for label, (x1, y1, x2, y2) in zip(labels, boxes, strict=True):
                        if name == 'val' and val_labels and label not in val_labels:
                            continue
                        box = [round(float(v), 2) for v in (x1, y1, x2 - x1, y2 - y1)]
                        annotations.append(dict(id=len(annotations) + 1, image_id=i, category_id=label + 1, bbox=box,
                                                area=round(box[2] * box[3], 2), iscrowd=0))
                with open(file + '.part', 'w', encoding='utf-8') as f:
                    json.dump(dict(info=dict(description=f'synthetic pictures made by prepare/, seed {seed}'),
                                   images=images, annotations=annotations,
                                   categories=[dict(id=i, name=kind) for i, kind in enumerate(names, 1)]), f)
                os.replace(file + '.part', file)
            except OSError as e:
                raise InputError(f'cannot write the pictures to {out} ({e.strerror or e}): '
                                 'choose another folder with --out=') from None
    print(f'{out}: {train:,} training and {val:,} validation pictures')


def make_shapes(out=out, train=train, val=val, size=size, seed=seed):
    """The set of the quick start, see draw_shapes. Raises InputError."""
    if size < 32:
        raise InputError(f'--size={size}: must be 32 pixels or more, for the shapes to have room')
    write_set(out, SHAPES, functools.partial(draw_shapes, size=size), train, val, seed)


if __name__ == '__main__':
    configure(globals())
    make_shapes(out, train, val, size, seed)
    if out == 'data/shapes':
        print('now: python train.py config/shapes.py')

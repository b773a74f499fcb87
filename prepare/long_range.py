"""
Make data/long_range, a set that only global context solves: does a block see further than convolutions do?

    python -m prepare.long_range                                      1,500 training and 200 validation strips, seconds
    python -m prepare.long_range --out=data/any_range --near=64       discs at every distance from the cue
    python -m prepare.long_range --out=data/half_hidden --near=64 --hidden=0.5      half of the discs show their colour

A strip is 2,048 px long and 32 high. Near its left end is the cue, a red, green or blue square; to the right of column
1,100 (`near`) are some white discs. A disc's class is the colour of the cue, more than 1,000 px away. The convolutions
of scale n see 625 px to either side at the very most (all kernels of the longest path added up), so for them a disc's
class is a guess among three: an AP50 near 0.33. With `hidden` below 1 the other discs show their colour, so that some
discs show their class themselves, for others only coloured discs or the cue do.

The cue is labelled in the training part, so that its colour is worth learning. val.json lists the discs alone, so that
its AP is theirs.
"""
import functools

import numpy as np
from PIL import Image, ImageDraw

from configurator import InputError, configure
from prepare.shapes import write_set

# settings
out = 'data/long_range'
train = 1500                 # number of training strips
val = 200                    # number of validation strips
near, far = 1100, 2048       # columns that the discs lie between
seed = 0
width = 2048                 # pixels of a strip; with less, set far too
hidden = 1.0                 # share of the discs that are white, whatever their class

COLOURS = {'red': (230, 40, 40), 'green': (40, 200, 60), 'blue': (50, 80, 240)}
NAMES = [f'{colour} cue' for colour in COLOURS] + [f'{colour} disc' for colour in COLOURS]
DISCS = (3, 4, 5)            # the labels of the discs


def draw_long_range(rng, near=near, far=far, width=width, hidden=hidden):
    """One strip, 32 px high -> PIL.Image, labels (the cue's, then the discs'), boxes (x1, y1, x2, y2, pixels)."""
    W, H = width, 32
    # 1) a background of smooth grey steps with noise
    grey = Image.fromarray(rng.integers(60, 190, (1, W // 16), np.uint8)).resize((W, H), Image.BICUBIC)
    grey = (np.asarray(grey) + rng.normal(0, 6, (H, W))).clip(0, 255).astype(np.uint8)           # (H, W)
    image = Image.fromarray(grey).convert('RGB')
    pen = ImageDraw.Draw(image)
    # 2) the cue, within the first 54 columns
    colour, x = int(rng.integers(3)), rng.uniform(4, 30)
    labels, boxes = [colour], [(x, 4, x + 24, 28)]
    pen.rectangle(boxes[0], fill=tuple(COLOURS.values())[colour])
    # 3) three to six discs, less those that would touch the one before
    right = 0
    for x in np.sort(rng.uniform(near, far - 32, rng.integers(3, 7))):
        diameter = rng.uniform(14, 26)
        y = rng.uniform(1, H - 1 - diameter)
        if x > right + 2:
            right = x + diameter
            white = hidden == 1 or rng.random() < hidden
            pen.ellipse((x, y, right, y + diameter), fill=(255, 255, 255) if white else tuple(COLOURS.values())[colour],
                        outline=(0, 0, 0), width=2)
            labels.append(DISCS[colour])
            boxes.append((x, y, right, y + diameter))
    return image, labels, boxes


def make_long_range(out=out, train=train, val=val, near=near, far=far, seed=seed, width=width, hidden=hidden):
    """Write the set, see the top of this file. Raises InputError."""
    if not 56 <= near <= far - 100 <= width - 100:
        raise InputError(f'--near={near} --far={far}: discs lie right of the cue, which ends at column 54, and within '
                         f'{width:,}, at least 100 columns of them')
    if not 0 <= hidden <= 1:
        raise InputError(f'--hidden={hidden}: a share of the discs, 0 to 1')
    draw = functools.partial(draw_long_range, near=near, far=far, width=width, hidden=hidden)
    write_set(out, NAMES, draw, train, val, seed, val_labels=DISCS)


if __name__ == '__main__':
    configure(globals())
    make_long_range(out, train, val, near, far, seed, width, hidden)
    if out == 'data/long_range':
        print('now: python train.py config/long_range.py')

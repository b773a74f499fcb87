"""
Make data/clips, a set that only memory of earlier frames solves: does `memory='time'` carry what is out of sight?

    python -m prepare.clips                  1,500 training and 200 validation clips, some seconds

A clip has three frames of 64x64 px. In the first one or two discs are seen, each red, green or blue; then a grey
plate slides over each and stays. Plates and discs drift, the same for all, a few pixels a frame. The objects are the
plates of the last frame, and the class of a plate is the colour of its disc, visible two frames ago. A network that
sees only the last one or two frames must guess among three colours: an AP50 near 0.33. With `same=True` all discs of a
clip have one colour; otherwise the answer must also come from the right place.

000001_2.jpg is the last frame of the first clip, and the only one with labels; 000001_1.jpg and 000001_0.jpg are found
by their numbers (data.previous_frame).
"""
import functools
import os

import numpy as np
from PIL import Image, ImageDraw

from configurator import InputError, configure
from prepare.long_range import COLOURS
from prepare.shapes import write_set

# settings
out = 'data/clips'
train = 1500                 # number of training clips
val = 200                    # number of validation clips
size = 64                    # pixels
same = False                 # one colour for all discs of a clip
seed = 0

FRAMES = 3
NAMES = [f'{colour} behind' for colour in COLOURS]


class Clip:
    """Frames, a list of PIL.Image of one size; written as NAME_0.jpg, NAME_1.jpg, ... where an image were NAME.jpg."""

    def __init__(self, frames):
        self.frames, self.size = frames, frames[0].size

    def save(self, path, **how):
        stem, suffix = os.path.splitext(path)
        for t, frame in enumerate(self.frames):
            frame.save(f'{stem}_{t}{suffix}', **how)


def draw_clip(rng, size=size, same=same):
    """-> Clip of FRAMES frames, labels and boxes (x1, y1, x2, y2, pixels) of the plates in the last."""
    # 1) one or two plates, apart from each other
    drift, centres = rng.uniform(-1.5, 1.5, 2), [rng.uniform(14, size - 14, 2)]
    for _ in range(rng.integers(6)):
        other = rng.uniform(14, size - 14, 2)
        if len(centres) < 2 and np.abs(other - centres[0]).max() > 24:
            centres.append(other)
    labels = [int(label) for label in rng.integers(3, size=len(centres))]
    if same:
        labels = labels[:1] * len(centres)
    halves = rng.uniform(7, 11, len(centres))
    # 2) the frames, oldest first; noise of its own in each
    grey, frames = Image.fromarray(rng.integers(80, 170, (size // 16, size // 16), np.uint8)), []
    grey = np.asarray(grey.resize((size, size), Image.BICUBIC))
    for t in range(FRAMES):
        noisy = (grey + rng.normal(0, 6, (size, size))).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(noisy).convert('RGB')
        pen = ImageDraw.Draw(image)
        boxes = []
        for centre, half, label in zip(centres, halves, labels, strict=True):
            x, y = centre + drift * t
            boxes.append((x - half, y - half, x + half, y + half))
            if t == 0:
                pen.ellipse((x - half, y - half, x + half, y + half), fill=tuple(COLOURS.values())[label])
            else:
                pen.rectangle(boxes[-1], fill=(200, 200, 200), outline=(20, 20, 20), width=2)
        frames.append(image)
    return Clip(frames), labels, boxes


def make_clips(out=out, train=train, val=val, size=size, same=same, seed=seed):
    """Write the set, see the top of this file. Raises InputError."""
    if size < 32:
        raise InputError(f'--size={size}: must be at least 32 pixels, or the plates have no room')
    draw = functools.partial(draw_clip, size=size, same=same)
    write_set(out, NAMES, draw, train, val, seed, suffix=f'_{FRAMES - 1}')            # the last frame has the labels


if __name__ == '__main__':
    configure(globals())
    make_clips(out, train, val, size, same, seed)
    if out == 'data/clips':
        print('now: python train.py config/clips.py')

"""
Detect objects in images: pictures with boxes; json and YOLO text on request.

    python detect.py photo.jpg --weights=out/best.pt
    python detect.py 'frames/*.png' --weights=yolov8n.pt --conf=0.4 --save_json=True --save_txt=True
    python detect.py folder --weights=best.onnx --batch_size=16
    python detect.py photo.jpg --weights=out/best.pt --tokens=True       the cells the blocks attend to

The source is an image, a folder (not those within it), a glob in quotes, or a .txt with one path a line. A file that
cannot be read is named and skipped, and the exit status is then 1. An image gets the smallest input shape that holds
it, whatever else is in the batch, so that its boxes do not depend on the other images.

From Python, on PIL images or (h, w, 3) uint8 RGB arrays, boxes in their own pixels:

    from detect import detect_images, load_model
    for rows in detect_images(load_model('out/best.pt'), [image, array]):     # (n, 6): x1, y1, x2, y2, score, class

detections.json is in COCO's results format. A checkpoint knows class names and no ids, so that category_id is label + 1
and image_id counts from 1 (or is the file's name, if all names are numbers, as COCO's are); the names stand beside
them. labels/NAME.txt has lines of class, centre x, y, width, height as shares of the image, and the score.

What it does not do: videos (ffmpeg makes frames of them), windows on a screen, tiling of huge images.
"""
import collections
import concurrent.futures
import glob
import json
import os
import sys
import time

import numpy as np
import torch
from PIL import Image

from attention import Gated
from configurator import InputError, configure
from data import letterbox, load_image, rect_shape
from eval import cpu_count, input_shape, load_model, predict, undo_letterbox
from labels import SUFFIXES
from plots import draw_boxes, draw_tokens
from sparse_attention import SparseGlobalBlock

source = ''                         # image, folder, 'glob*', or list.txt
weights = 'out/best.pt'             # a checkpoint of train.py, a YOLOv8 .pt, or an .onnx of export.py
imgsz: int | tuple = 0              # pixels of the longer side, or (H, W); 0: as the weights were trained, else 640
conf = 0.25                         # the lowest score worth drawing
nms_iou = 0.7                       # a box goes when a better one of its class overlaps it by more
max_det = 300
nms = True                          # False: the one-to-one head's answers as they are
batch_size = 8
dtype = 'float32'                   # float32, bfloat16, float16: of the network; its attention stays float32
device = 'cuda' if torch.cuda.is_available() else 'cpu'
out_dir = 'out/detect'
save_images = True
save_json = False                   # out_dir/detections.json
save_txt = False                    # out_dir/labels/NAME.txt
tokens = False                      # out_dir/NAME_p5.jpg, NAME_p4.jpg: the cells a block selected and attended to


def detect_images(model, images, imgsz=0, batch_size=8, conf=0.25, nms_iou=0.7, max_det=300, dtype='float32',
                  device=None):
    """
    images: PIL or (h, w, 3) uint8 RGB -> for each an array (n, 6): x1, y1, x2, y2 in its own pixels, score, class.
    device: where the model is, which is the default.
    """
    if device is None:
        device = next((str(p.device) for p in model.parameters()), 'cpu')             # an ONNX model has no parameters
    shape, groups = input_shape(model, imgsz), collections.defaultdict(list)
    for i, image in enumerate(images):
        size = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
        given = model.fixed_imgsz or isinstance(imgsz, tuple)
        group = shape if given else rect_shape([size], max(shape), pad=0)
        groups[group].append((i, size, *letterbox(image, group)))
    results = [None] * len(images)
    for group in groups.values():
        for first in range(0, len(group), batch_size):
            batch = group[first:first + batch_size]
            (rows,), _, _ = predict(model, [item[2] for item in batch], (nms_iou,), conf, max_det, dtype=dtype,
                                    device=device)
            for (i, size, _, scale, corner), d in zip(batch, rows, strict=True):
                results[i] = undo_letterbox(d, scale, corner, size)
    return results


def list_images(source):
    """The files that the source names, in order."""
    if not source:
        raise InputError("no source: python detect.py SOURCE, where SOURCE is an image, a folder, a 'glob*' or "
                         'a list.txt')
    if os.path.isdir(source):
        names = [name for name in sorted(os.listdir(source)) if name.lower().endswith(SUFFIXES)]
        files = [os.path.join(source, name) for name in names]
    elif source.endswith('.txt') and os.path.isfile(source):
        with open(source, encoding='utf-8') as f:
            lines = [line.strip() for line in f if line.strip()]
        folder = os.path.dirname(source)
        files = [line if os.path.exists(line) else os.path.join(folder, line) for line in lines]
    elif os.path.isfile(source):
        files = [source]
    else:
        files = sorted(file for file in glob.glob(source, recursive=True) if os.path.isfile(file))
    if not files:
        raise InputError(f"{source}: no image there, give an image, a folder, a 'glob*' in quotes or a list.txt")
    return files


def output_names(files):
    """One name per file to save under, without suffix: a/1.jpg, b/1.jpg, b/1.png -> 1, 1_2, 1_3."""
    names = []
    for file in files:
        stem = name = os.path.splitext(os.path.basename(file))[0]
        n = 1
        while name in names:
            n += 1
            name = f'{stem}_{n}'
        names.append(name)
    return names


def selecting_blocks(model):
    """Level -> the module that selects tokens and has attention(x), of those attention blocks that do."""
    mixers = {level: block.mixer if isinstance(block, Gated) else block for level, block in model.blocks().items()}
    return {level: mixer for level, mixer in mixers.items()
            if isinstance(mixer, SparseGlobalBlock) and mixer.select != 'none'}    # none: nobody attends, the control


@torch.no_grad()
def show_tokens(model, image, path, **settings):
    """
    For each block that selects tokens a picture path_p5.jpg (plots.draw_tokens), and a printed line: which cells of the
    padded network input were selected, and the attention weights, averaged over heads, of the selected cell nearest to
    the centre of the best object. settings: detect_images's.
    """
    seen, blocks = {}, selecting_blocks(model)
    hooks = [block.register_forward_pre_hook(lambda _, x, level=level: seen.update({level: x[0]}))
             for level, block in blocks.items()]
    (rows,) = detect_images(model, [image], **settings)
    for hook in hooks:
        hook.remove()
    for level, x in seen.items():
        _, _, h, w = x.shape
        stride = 2 ** int(level[1])
        selected, weights = blocks[level].attention(x.float())                        # (1, k), (1, heads, k, k)
        selected, weights = selected[0].cpu().numpy(), weights[0].mean(0).cpu().numpy()               # (k,), (k, k)
        _, scale, corner = letterbox(image, (h * stride, w * stride))
        y, x = np.divmod(np.arange(h * w), w)
        centres = (np.stack((x, y), 1) + 0.5) * stride                                # (N, 2) in input pixels
        padding = ((centres < corner) | (centres > corner + np.array(image.size) * scale)).any(1)     # (N,)
        row, focus, heat, note = None, None, None, ''
        if len(rows):
            row = rows[0]
            centre = (row[:2] + row[2:4]) / 2 * scale + corner
            nearest = ((centres[selected] - centre) ** 2).sum(1).argmin()
            focus, heat = selected[nearest], weights[nearest]
            note = f'; the largest weight at the best object is {heat.max() * len(selected):.1f} times the mean'
        draw_tokens(image, corner, scale, (h, w), stride, selected, heat, focus, row, model.names,
                    f'{path}_{level}.jpg')
        print(f'\n{path}_{level}.jpg: {len(selected)} of {h * w} cells selected, {padding[selected].sum()} of '
              f'{padding.sum()} in the padding{note}')


def read_batches(files):
    """Lists of (i, image or InputError) for files[i], batch_size at a time; threads read the next batch meanwhile."""
    def read(i):
        try:
            return i, load_image(files[i])
        except InputError as e:
            return i, e

    with concurrent.futures.ThreadPoolExecutor(min(8, cpu_count())) as pool:
        ahead = [pool.submit(read, i) for i in range(min(batch_size, len(files)))]
        while ahead:
            batch = [job.result() for job in ahead]
            first = batch[-1][0] + 1
            ahead = [pool.submit(read, i) for i in range(first, min(first + batch_size, len(files)))]
            yield batch


def coco_results(rows, image_id, file, names):
    """Detections (n, 6) -> dicts in COCO's results format, with the file's name and the class's beside the ids."""
    return [dict(image_id=image_id, category_id=int(label) + 1, score=round(score, 6), file_name=os.path.basename(file),
                 category=names[int(label)], bbox=[round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)])
            for x1, y1, x2, y2, score, label in rows.tolist()]


def save_yolo(rows, size, path):
    """Detections (n, 6) in an image of size (w, h) -> a text file: class, centre x, y, w, h as shares, score."""
    w, h = size
    with open(path, 'w', encoding='utf-8') as f:
        for x1, y1, x2, y2, score, label in rows.tolist():
            shares = (x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h
            f.write(f'{int(label)} {" ".join(f"{v:.6f}" for v in shares)} {score:.5f}\n')


def main():
    files = list_images(source)
    model = load_model(weights, device, nms=nms)
    if tokens and not selecting_blocks(model):
        raise InputError(f'--tokens=True: {weights} has no blocks that select tokens, give a .pt trained with attn '
                         'such as -SS')
    input_shape(model, imgsz)
    if save_images and any(os.path.abspath(os.path.dirname(file)) == os.path.abspath(out_dir) for file in files):
        raise InputError(f'--out_dir={out_dir} is the folder of the images, which would be overwritten: name another')
    try:
        os.makedirs(os.path.join(out_dir, 'labels') if save_txt else out_dir, exist_ok=True)
    except OSError as e:
        raise InputError(f'--out_dir={out_dir} cannot be written ({e.strerror}): name another') from None
    settings = dict(imgsz=imgsz, batch_size=batch_size, conf=conf, nms_iou=nms_iou, max_det=max_det, dtype=dtype)
    names = output_names(files)
    ids = [int(name) for name in names] if all(name.isdecimal() for name in names) else range(1, len(files) + 1)
    found, unreadable, done, start = [], 0, 0, time.perf_counter()
    for batch in read_batches(files):
        for _, error in batch:
            if isinstance(error, InputError):
                unreadable += 1
                print(f'\nskipped: {error}', file=sys.stderr)
        loaded = [(i, image) for i, image in batch if not isinstance(image, InputError)]
        results = detect_images(model, [image for _, image in loaded], **settings)
        for (i, image), rows in zip(loaded, results, strict=True):
            path = os.path.join(out_dir, names[i])
            if save_images:
                page = draw_boxes(image, rows[:, :4], rows[:, 5], model.names, rows[:, 4])
                page.save(f'{path}.jpg', quality=92)
            if tokens:
                show_tokens(model, image, path, **settings)
            found += coco_results(rows, ids[i], files[i], model.names)
            if save_txt:
                save_yolo(rows, image.size, os.path.join(out_dir, 'labels', f'{names[i]}.txt'))
        done, spent = done + len(batch), time.perf_counter() - start
        left = spent / done * (len(files) - done)
        print(f'\r{done}/{len(files)} images, {len(found)} objects, {done / spent:.1f} images/s, {left:.0f} s left  ',
              end='', flush=True)
    if save_json:
        with open(os.path.join(out_dir, 'detections.json'), 'w', encoding='utf-8') as f:
            json.dump(found, f)
    print(f'\n{out_dir}: {len(files) - unreadable} images, {len(found)} objects of score {conf} and up')
    if unreadable:
        print(f'{unreadable} of {len(files)} files could not be read (named above): exit status 1', file=sys.stderr)
    return 1 if unreadable else 0


if __name__ == '__main__':
    configure(globals(), positional='source')
    sys.exit(main())

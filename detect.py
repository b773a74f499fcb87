"""
Images in, pictures with boxes out; json and YOLO text on request.

    python detect.py photo.jpg --weights=out/best.pt
    python detect.py 'frames/*.png' --weights=yolov8n.pt --conf=0.4 --save_json=True --save_txt=True
    python detect.py folder --weights=best.onnx --batch_size=16
    python detect.py photo.jpg --weights=out/best.pt --tokens=True       what the sparse blocks look at

The source is an image, a folder (not those within it), a glob in quotes, or a .txt with one path a line. A file that
cannot be read is named and skipped, and the exit status is then 1. An image gets the smallest input shape that holds
it, whatever stands beside it in the batch, so that its boxes do not depend on its neighbours.

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
from PIL import Image, ImageDraw

from configurator import configure
from data import PAD_VALUE, SUFFIXES, InputError, draw_boxes, letterbox, load_image, rect_shape
from eval import input_shape, load_model, predict, undo_letterbox
from model import HSVDET

source = ''                         # image, folder, 'glob*', or list.txt
weights = 'out/best.pt'             # ours, a YOLOv8 .pt, or an .onnx of export.py
imgsz: int | tuple = 0              # pixels of the longer side, or (H, W); 0 is what the weights were trained at, else 640
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
tokens = False                      # out_dir/NAME_p5.jpg, NAME_p4.jpg: the cells a sparse block selected and attended to


def detect_images(model, images, imgsz=0, batch_size=8, conf=0.25, nms_iou=0.7, max_det=300, nms=True, dtype='float32', device='cpu'):
    """images: PIL or (h, w, 3) uint8 RGB -> for each an array (n, 6): x1, y1, x2, y2 in its own pixels, score, class."""
    shape, groups = input_shape(model, imgsz), collections.defaultdict(list)
    for i, image in enumerate(images):
        size = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
        fits = shape if getattr(model, 'fixed', None) or isinstance(imgsz, tuple) else rect_shape([size], max(shape), pad=0)
        groups[fits].append((i, size, *letterbox(image, fits)))
    results = [None] * len(images)
    for group in groups.values():
        for first in range(0, len(group), batch_size):
            some = group[first:first + batch_size]
            (rows,), _, _ = predict(model, [item[2] for item in some], (nms_iou,), conf, max_det, False, nms, dtype, device)
            for (i, size, _, scale, corner), d in zip(some, rows, strict=True):
                results[i] = undo_letterbox(d, scale, corner, size)
    return results


def list_images(source):
    """The files that the source names, in order."""
    if not source:
        raise InputError("nothing to look at: python detect.py SOURCE, where SOURCE is an image, a folder, a 'glob*' or a list.txt")
    if os.path.isdir(source):
        files = [os.path.join(source, name) for name in sorted(os.listdir(source)) if name.lower().endswith(SUFFIXES)]
    elif source.endswith('.txt') and os.path.isfile(source):
        with open(source, encoding='utf-8') as f:
            lines = [line.strip() for line in f if line.strip()]
        files = [line if os.path.exists(line) else os.path.join(os.path.dirname(source), line) for line in lines]
    else:
        files = [source] if os.path.isfile(source) else sorted(filter(os.path.isfile, glob.glob(source, recursive=True)))
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


def draw_tokens(model, image, path, **settings):
    """
    For each sparse block a picture path_pN.jpg of the network's input, padding included. Left: the cells that were
    selected stay light. Right, in red: how much the one nearest to the best object's centre (white) attends to each.
    """
    seen = {}
    hooks = [block.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]})) for name, block in model.blocks().items()]
    (rows,) = detect_images(model, [image], **settings)
    for hook in hooks:
        hook.remove()
    for name, x in seen.items():
        block = model.blocks()[name]
        if block.select == 'none':                                   # the control: nobody attends
            continue
        with torch.no_grad():
            selected, weights = block.attention(x.float())           # (1, k), (1, heads, k, k)
        selected, weights = selected[0].cpu().numpy(), weights[0].mean(0).cpu().numpy()       # (k,), (k, k)
        _, _, h, w = x.shape
        stride = 2 ** int(name[1])
        _, scale, corner = letterbox(image, (h * stride, w * stride))
        canvas = Image.new('RGB', (round(w * stride / scale), round(h * stride / scale)), (PAD_VALUE,) * 3)
        offset = round(corner[0] / scale), round(corner[1] / scale)
        canvas.paste(image, offset)

        def shade(values, colour, canvas=canvas, shape=(h, w)):
            """The canvas with a colour laid over its cells, as strongly as values (N,) in 0..1 say."""
            mask = Image.fromarray((values.reshape(shape) * 255).astype(np.uint8)).resize(canvas.size, Image.NEAREST)
            return Image.composite(Image.new('RGB', canvas.size, colour), canvas, mask)

        chosen = np.zeros(h * w)
        chosen[selected] = 1
        panels, said = [shade(0.7 * (1 - chosen), (0, 0, 0))], ''
        centres = (np.stack(np.divmod(np.arange(h * w), w)[::-1], 1) + 0.5) * stride          # (N, 2) x, y in network pixels
        padding = ((centres < corner) | (centres > corner + np.array(image.size) * scale)).any(1)
        if len(rows):
            middle = (rows[0, :2] + rows[0, 2:4]) / 2 * scale + corner
            nearest, heat = ((centres[selected] - middle) ** 2).sum(1).argmin(), np.zeros(h * w)
            heat[selected] = weights[nearest]
            panel = shade(0.8 * heat / heat.max(), (255, 40, 0), canvas=shade(np.full(h * w, 0.4), (0, 0, 0)))
            panel = draw_boxes(panel, rows[:1, :4] + np.tile(offset, 2), rows[:1, 5], model.names, rows[:1, 4])
            x, y = (centres[selected[nearest]] - stride / 2) / scale
            ImageDraw.Draw(panel).rectangle((x, y, x + stride / scale, y + stride / scale), outline='white', width=2)
            panels.append(panel)
            said = f'; the one at the best object looks at one of them {heat.max() * len(selected):.1f} times as hard as at the average'
        image_grid = Image.new('RGB', (canvas.width * len(panels), canvas.height))
        for i, panel in enumerate(panels):
            image_grid.paste(panel, (i * canvas.width, 0))
        image_grid.save(f'{path}_{name}.jpg', quality=92)
        print(f'\n{path}_{name}.jpg: {len(selected)} of {h * w} cells selected, {chosen[padding].sum():.0f} of {padding.sum()} in the padding{said}')


def main():
    files = list_images(source)
    model = load_model(weights, device)
    if tokens and not (isinstance(model, HSVDET) and model.blocks()):
        raise InputError(f'--tokens=True: {weights} has no sparse blocks to look into, give a .pt trained with attn such as -SS')
    settings = dict(imgsz=imgsz, batch_size=batch_size, conf=conf, nms_iou=nms_iou, max_det=max_det, nms=nms, dtype=dtype, device=device)
    input_shape(model, imgsz)
    if save_images and any(os.path.abspath(os.path.dirname(file)) == os.path.abspath(out_dir) for file in files):
        raise InputError(f'--out_dir={out_dir} is the folder of the images, which would be overwritten: name another')
    try:
        os.makedirs(os.path.join(out_dir, 'labels' * save_txt), exist_ok=True)
    except OSError as e:
        raise InputError(f'--out_dir={out_dir} cannot be written ({e.strerror}): name another') from None
    names = output_names(files)
    ids = [int(name) for name in names] if all(name.isdecimal() for name in names) else list(range(1, len(files) + 1))
    found, unreadable, done, start = [], [], 0, time.perf_counter()

    def read(file):
        try:
            return load_image(file)
        except InputError as e:
            return e

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        chunks = [range(i, min(i + batch_size, len(files))) for i in range(0, len(files), batch_size)]
        ahead = [pool.submit(read, files[i]) for i in chunks[0]]
        for c, chunk in enumerate(chunks):
            loaded = [(i, job.result()) for i, job in zip(chunk, ahead, strict=True)]
            ahead = [pool.submit(read, files[i]) for i in chunks[c + 1]] if c + 1 < len(chunks) else []
            for _, e in loaded:
                if isinstance(e, InputError):
                    unreadable.append(e)
                    print(f'\nskipped: {e}', file=sys.stderr)
            loaded = [(i, image) for i, image in loaded if not isinstance(image, InputError)]
            for (i, image), rows in zip(loaded, detect_images(model, [image for _, image in loaded], **settings), strict=True):
                (w, h), path = image.size, os.path.join(out_dir, names[i])
                if save_images:
                    draw_boxes(image, rows[:, :4], rows[:, 5], model.names, rows[:, 4]).save(f'{path}.jpg', quality=92)
                if tokens:
                    draw_tokens(model, image, path, **settings)
                lines = []
                for x1, y1, x2, y2, score, label in rows.tolist():
                    shares = (x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h
                    lines.append(f'{int(label)} {" ".join(f"{v:.6f}" for v in shares)} {score:.5f}\n')
                    found.append(dict(image_id=ids[i], category_id=int(label) + 1, bbox=[round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)],
                                      score=round(score, 6), file_name=os.path.basename(files[i]), category=model.names[int(label)]))
                if save_txt:
                    with open(os.path.join(out_dir, 'labels', f'{names[i]}.txt'), 'w', encoding='utf-8') as f:
                        f.writelines(lines)
            done, spent = done + len(chunk), time.perf_counter() - start
            left = spent / done * (len(files) - done)
            print(f'\r{done}/{len(files)} images, {len(found)} objects, {done / spent:.1f} images/s, {left:.0f} s left  ', end='', flush=True)
    if save_json:
        with open(os.path.join(out_dir, 'detections.json'), 'w', encoding='utf-8') as f:
            json.dump(found, f)
    print(f'\n{out_dir}: {len(files) - len(unreadable)} images, {len(found)} objects of score {conf} and up')
    if unreadable:
        print(f'{len(unreadable)} of {len(files)} files could not be read (named above): exit status 1', file=sys.stderr)
    return 1 if unreadable else 0


if __name__ == '__main__':
    configure(globals(), positional='source')
    sys.exit(main())

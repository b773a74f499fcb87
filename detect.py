"""
Detect objects in images and videos: pictures and mp4s with boxes; json and YOLO text on request.

    python detect.py photo.jpg --weights=out/best.pt
    python detect.py 'frames/*.png' --weights=yolov8n.pt --conf=0.4 --save_json=True --save_txt=True
    python detect.py folder --weights=best.onnx --batch_size=16
    python detect.py photo.jpg --weights=out/best.pt --tokens=True       the cells the blocks attend to
    python detect.py photo.jpg --weights=out/best.pt --conf=0            above the score of best F1, found in training
    python detect.py clip.mp4 --weights=out/best.pt --save_json=True     frame by frame; pip install "av>=17"

The source is an image or a video, a folder (its images), a glob in quotes, or a .txt with one path a line. A file that
cannot be read, or not to its end, is named, and the exit status is then 1. An image gets the smallest input shape that
holds it, whatever else is in the batch, so that its boxes do not depend on the other images. A video is never in memory
as a whole, and after Ctrl-C what was done of it can be played.

From Python, on PIL images or (h, w, 3) uint8 RGB arrays, boxes in their own pixels:

    from detect import detect_images, load_model
    for rows in detect_images(load_model('out/best.pt'), [image, array]):     # (n, 6): x1, y1, x2, y2, score, class

detections.json is in COCO's results format. A checkpoint knows class names and no ids, so that category_id is label + 1
and image_id counts from 1 (or is the file's name, if all names are numbers, as COCO's are); the names stand beside
them. In a video image_id is the frame, from 0, and `frame` and `seconds` stand beside it. labels/NAME.txt has lines of
class, centre x, y, width, height as shares of the image, and the score.

What it does not do: webcams and streams, windows on a screen. Tracking and tiling of huge images: docs/recipes.md.
"""
import collections
import concurrent.futures
import contextlib
import glob
import itertools
import json
import os
import shlex
import sys
import time

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import video
from attention import selecting
from configurator import InputError, configure
from data import letterbox, load_image, rect_shape, to_rgb
from eval import OnnxModel, cpu_count, input_shape, load_model, predict, undo_letterbox
from labels import SUFFIXES, printable, read_list, yolo_labels
from plots import draw_boxes, draw_tokens, shade_unselected

source = ''                         # image, video, folder, 'glob*', or list.txt
weights = 'out/best.pt'             # a checkpoint of train.py, a YOLOv8 .pt, or an .onnx of export.py
imgsz: int | tuple = 0              # pixels of the longer side, or (H, W); 0: as the weights were trained, else 640
conf = 0.25                         # the lowest score worth drawing; 0: that of best F1 on training's validation set
nms_iou = 0.7                       # a box goes when a better one of its class overlaps it by more
max_det = 300
nms = True                          # False: the one-to-one head's answers as they are
batch_size = 8
dtype = 'float32'                   # float32, bfloat16, float16: of the network; its attention stays float32
device = 'cuda' if torch.cuda.is_available() else 'cpu'
out_dir = 'out/detect'
save_images = True                  # out_dir/NAME.jpg, of a video NAME.mp4
save_json = False                   # out_dir/detections.json
save_txt = False                    # out_dir/labels/NAME.txt, of a video NAME_000000.txt for each frame
tokens = False                      # out_dir/NAME_p5.jpg, NAME_p4.jpg: the cells a block selected and attended to; of a
#                                     video NAME_p5.mp4, NAME_p4.mp4: the cells it selected


def detect_images(model, images, imgsz=0, batch_size=8, conf=0.25, nms_iou=0.7, max_det=300, dtype='float32',
                  device=None, state=None):
    """
    images: PIL or (h, w, 3) uint8 RGB -> for each an array (n, 6): x1, y1, x2, y2 in its own pixels, score, class.
    imgsz 0: as in training, but of a square only the rectangle that the image fills, if the network takes it (`rect`).
    device: where the model is, which is the default. state: see eval.predict; then the images are frames of one size.
    """
    if device is None:
        device = next((str(p.device) for p in model.parameters()), 'cpu')             # an ONNX model has no parameters
    shape, groups = input_shape(model, imgsz), collections.defaultdict(list)
    for i, image in enumerate(images):
        if isinstance(image, Image.Image):
            image = to_rgb(image)
        elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(f'image {i} is an array {image.shape} of {image.dtype}: give (height, width, 3) of uint8')
        size = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
        as_trained = isinstance(imgsz, tuple) or shape[0] != shape[1] or not model.rect
        group = shape if model.fixed_imgsz or as_trained else rect_shape([size], max(shape), pad=0)
        groups[group].append((i, size, *letterbox(image, group)))
    results = [None] * len(images)
    for group in groups.values():
        for first in range(0, len(group), batch_size):
            batch = group[first:first + batch_size]
            (rows,), _, _ = predict(model, [item[2] for item in batch], (nms_iou,), conf, max_det, dtype=dtype,
                                    device=device, state=state)
            for (i, size, _, scale, corner), d in zip(batch, rows, strict=True):
                results[i] = undo_letterbox(d, scale, corner, size)
    return results


def list_images(source):
    """The files that the source names, in order."""
    if not source:
        raise InputError("no source: python detect.py SOURCE, where SOURCE is an image, a video, a folder, a 'glob*' "
                         'or a list.txt')
    if os.path.isdir(source):
        names = [name for name in sorted(os.listdir(source)) if name.lower().endswith(SUFFIXES)]
        files = [os.path.join(source, name) for name in names]
    elif source.endswith('.txt') and os.path.isfile(source):
        lines = read_list(source)
        folder = os.path.dirname(source)
        files = [line if os.path.exists(line) else os.path.join(folder, line) for line in lines]
    elif os.path.isfile(source):
        files = [source]
    else:
        files = sorted(file for file in glob.glob(source, recursive=True) if os.path.isfile(file))
    if not files:
        raise InputError(f"{source}: no image there, give an image, a video, a folder, a 'glob*' in quotes or a "
                         'list.txt')
    return files


def output_names(files, levels=()):
    """
    One name per file to save under, without suffix: a/1.jpg, b/1.jpg, b/1.png -> 1, 1_2, 1_3. levels: p4, p5, where
    1_p4 and 1_p5 are written beside 1.
    """
    names, taken, counts = [], set(), collections.Counter()
    for file in files:
        stem = os.path.splitext(os.path.basename(file))[0]
        while True:
            counts[stem] += 1
            name = f'{stem}_{counts[stem]}' if counts[stem] > 1 else stem
            written = {name, *(f'{name}_{level}' for level in levels)}
            if not taken & written:
                break
        taken |= written
        names.append(name)
    return names


def selecting_blocks(model):
    """Level -> the module that selects tokens and has attention(x), of those attention blocks that do."""
    return {level: selecting(block) for level, block in model.blocks().items() if selecting(block)}


@torch.no_grad()
def selected_tokens(model, image, **settings):
    """
    Detections (n, 6) in the image, and for each level with a block that selects tokens: its map's (h, w) and stride;
    the scale and corner that letterboxed the image onto it; (k,) selected cells, row by row; (k, k) how their attention
    is shared out among them, averaged over heads: every row sums to 1, what goes to memory left out. settings:
    detect_images's, its state too.
    """
    seen, blocks, levels = {}, selecting_blocks(model), {}
    hooks = [block.register_forward_pre_hook(lambda _, inputs, level=level: seen.update({level: inputs}))
             for level, block in blocks.items()]
    (rows,) = detect_images(model, [image], **settings)
    for hook in hooks:
        hook.remove()
    for level, inputs in seen.items():
        _, _, h, w = inputs[0].shape
        stride = 2 ** int(level[1])
        selected, weights = blocks[level].attention(*inputs)                          # (1, k), (1, heads, k, k + T)
        selected, weights = selected[0], weights[0].mean(0)
        kept = weights.sum(1) > 0                                                     # fewer than k under `keep`
        selected, weights = selected[kept], weights[kept, :len(kept)][:, kept]        # the columns of memory left out
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-30)
        _, scale, corner = letterbox(image, (h * stride, w * stride))
        levels[level] = (h, w), stride, scale, corner, selected.cpu().numpy(), weights.cpu().numpy()
    return rows, levels


def show_tokens(model, image, path, **settings):
    """
    For each block that selects tokens a picture path_p5.jpg (plots.draw_tokens), and a printed line: which cells of the
    padded network input were selected, and how much the selected cell nearest to the centre of the best object attends
    to the others. settings: detect_images's.
    """
    rows, levels = selected_tokens(model, image, **settings)
    for level, ((h, w), stride, scale, corner, selected, weights) in levels.items():
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
        print(printable(f'\n{path}_{level}.jpg: {len(selected)} of {h * w} cells selected, '
                        f'{padding[selected].sum()} of {padding.sum()} in the padding{note}'))


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


@contextlib.contextmanager
def json_list(path):
    """A json file that holds a list of any length: yields a function that adds items. Complete whatever happens."""
    with open(path, 'w', encoding='utf-8') as f:
        separator = '[\n'

        def add(items):
            nonlocal separator
            for item in items:
                f.write(separator + json.dumps(item))
                separator = ',\n'

        try:
            yield add
        finally:
            f.write(']\n' if separator == ',\n' else '[]\n')


def draw_detections(image, rows, names):
    return draw_boxes(image, rows[:, :4], rows[:, 5], names, rows[:, 4])


def detect_files(model, files, names, add, **settings):
    """Images, saved as out_dir/names[i] as the settings say; add: json_list's -> number of objects, and of failures."""
    ids = [int(name) for name in names] if all(name.isdecimal() for name in names) else []
    ids = ids if len(set(ids)) == len(files) else range(1, len(files) + 1)                # 1.jpg and 01.jpg
    objects, unreadable, done, start = 0, 0, 0, time.perf_counter()
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
                draw_detections(image, rows, model.names).save(f'{path}.jpg', quality=92)
            if tokens:
                show_tokens(model, image, path, **settings)
            add(coco_results(rows, ids[i], files[i], model.names))
            if save_txt:
                save_yolo(rows, image.size, os.path.join(out_dir, 'labels', f'{names[i]}.txt'))
            objects += len(rows)
        done, spent = done + len(batch), time.perf_counter() - start
        left = spent / done * (len(files) - done)
        print(f'\r{done}/{len(files)} images, {objects} objects, {done / spent:.1f} images/s, {left:.0f} s left  ',
              end='' if done < len(files) else '\n', flush=True)
    return objects, unreadable


def detect_video(model, file, name, add, **settings):
    """One video, saved under out_dir/name; add: json_list's -> numbers of frames and objects, a warning or ''."""
    path, objects = os.path.join(out_dir, name), 0
    state = [None] if model.frames else None                         # what a network with memory=time saw before
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(video.VideoReader(file))
        views = [f'_{level}' for level in selecting_blocks(model)] if tokens else []
        if save_images:
            views.append('')
        writers = {view: stack.enter_context(video.VideoWriter(f'{path}{view}.mp4', reader.rate)) for view in views}
        bar = stack.enter_context(tqdm(total=reader.count, desc=name, unit=' frames', disable=None))
        frames = iter(reader)
        while batch := list(itertools.islice(frames, batch_size)):
            if tokens:                                               # frame by frame, as each passes through the blocks
                results = [selected_tokens(model, image, state=state, **settings) for _, _, image in batch]
            else:
                images = [image for _, _, image in batch]
                results = [(rows, {}) for rows in detect_images(model, images, state=state, **settings)]
            for (number, seconds, image), (rows, levels) in zip(batch, results, strict=True):
                if save_images:
                    writers[''].write(draw_detections(image, rows, model.names), seconds)
                for level, view in levels.items():
                    shaded = shade_unselected(image, *view[:-1])
                    writers[f'_{level}'].write(draw_detections(shaded, rows, model.names), seconds)
                add(found | dict(frame=number, seconds=round(seconds, 6))
                    for found in coco_results(rows, number, file, model.names))
                if save_txt:
                    save_yolo(rows, image.size, os.path.join(out_dir, 'labels', f'{name}_{number:06}.txt'))
                objects += len(rows)
            bar.update(len(batch))
    if reader.has_sound and save_images:
        command = ['ffmpeg', '-i', f'{path}.mp4', '-i', file, *'-map 0:v -map 1:a -c copy'.split(), f'{path}_sound.mp4']
        print(printable(f'{path}.mp4 is without sound, which is not copied; to add it: {shlex.join(command)}'))
    return reader.decoded, objects, reader.warning


def check_settings(model, files):
    """Raises InputError for settings that cannot be meant."""
    here, folders = os.path.realpath(out_dir), {os.path.dirname(file) for file in files}
    for wrong, sentence in (
            (not 0 <= conf <= 1, f'--conf={conf}: a score lies in 0..1'),
            (not 0 <= nms_iou <= 1, f'--nms_iou={nms_iou}: an overlap lies in 0..1'),
            (batch_size < 1 or max_det < 1, f'--batch_size={batch_size} --max_det={max_det}: both must be 1 or more'),
            (tokens and not selecting_blocks(model),
             f'--tokens=True: {weights} has no blocks that select tokens, give a .pt trained with attn such as -SS'),
            ((save_images or tokens) and here in map(os.path.realpath, folders),
             f'--out_dir={out_dir} is the folder of the images, which would be overwritten: name another'),
            (save_txt and any(os.path.realpath(os.path.dirname(path)) == os.path.join(here, 'labels')
                              for path in map(yolo_labels, files) if os.path.exists(path)),
             f'--out_dir={out_dir} has labels of these images, which would be overwritten: name another')):
        if wrong:
            raise InputError(sentence)
    input_shape(model, imgsz)


def score_threshold(model):
    """--conf, or with --conf=0 the score of best F1; never below what NMS inside an ONNX file has left."""
    lowest = 0.0
    if isinstance(model, OnnxModel) and model.has_detections:
        lowest = float(model.conf or 0)
        print(f'NMS is inside the file: nms_iou and max_det are its own, and no score is below {lowest}')
    if conf:
        return max(conf, lowest)
    best = model.best_f1
    if best is None or best['score'] is None:
        raise InputError(f'--conf=0: {weights} does not say at which score F1 was best; python eval.py '
                         f'--weights={weights} --data=val.json prints that score, give it as --conf=')
    print(f'score threshold {best["score"]:.3f}, where F1 on the validation set was best: precision {best["P"]:.3f}, '
          f'recall {best["R"]:.3f}, F1 {best["F1"]:.3f}')
    return max(lowest, float(np.nextafter(np.float32(best['score']), 0)))             # and up; conf means above it


def main():
    files = list_images(source)
    model = load_model(weights, device, nms=nms)
    check_settings(model, files)
    threshold = score_threshold(model)
    try:
        os.makedirs(os.path.join(out_dir, 'labels') if save_txt else out_dir, exist_ok=True)
    except OSError as e:
        raise InputError(f'--out_dir={out_dir} cannot be written ({e.strerror}): name another') from None
    if not os.access(out_dir, os.W_OK):
        raise InputError(f'--out_dir={out_dir} cannot be written (its permissions): name another')
    settings = dict(imgsz=imgsz, batch_size=batch_size, conf=threshold, nms_iou=nms_iou, max_det=max_det, dtype=dtype)
    named = list(zip(files, output_names(files, selecting_blocks(model) if tokens else ()), strict=True))
    videos = [(file, name) for file, name in named if file.lower().endswith(video.SUFFIXES)]
    pictures = [pair for pair in named if pair not in videos]
    if videos:
        video.import_av()                                            # if it is missing, say so before any work is done
    failures, above = 0, f'objects of score {threshold:.3g} and up'
    with json_list(os.path.join(out_dir, 'detections.json') if save_json else os.devnull) as add:
        try:
            if pictures and model.frames:
                print('warning: this network remembers earlier frames, which only videos have here: every image counts '
                      'as the first of its video')
            if pictures:
                objects, failures = detect_files(model, *zip(*pictures, strict=True), add, **settings)
                print(f'{out_dir}: {len(pictures) - failures} images, {objects} {above}')
            for file, name in videos:
                try:
                    frames, objects, warning = detect_video(model, file, name, add, **settings)
                    print(printable(f'{out_dir}: {name}, {frames} frames, {objects} {above}'))
                except InputError as e:
                    warning = f'skipped: {e}'
                if warning:
                    failures += 1
                    print(warning, file=sys.stderr)
        except KeyboardInterrupt:
            print(f'\nstopped: what was done until now is in {out_dir}', file=sys.stderr)
            return 130
    if failures:
        print(f'{failures} of {len(files)} files could not be read, or not to the end (named above): exit status 1',
              file=sys.stderr)
    return 1 if failures else 0


if __name__ == '__main__':
    configure(globals(), positional='source')
    sys.exit(main())

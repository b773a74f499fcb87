"""
report.html: one page about one detector, to be opened from disk: no network, no script, no file beside it.

    python eval.py --weights=out/best.pt --data=val.json --report=True      out/report.html, of any weights
    train.py writes out_dir/report.html of best.pt when it is done

On it: what was trained on what; every figure of eval.py's json line; the curves of log.csv; precision over recall and
F1 over the score threshold; the confusion matrix; AP by class and by overlap; speed and memory; what the attention
blocks do; and pictures of what goes right and wrong. Its false alarms that no labelled box explains are sorted by score
and double as a list of objects that whoever labelled the images may have overlooked.

A false alarm has one of five kinds, after TIDE (Bolya et al. 2020, 2008.08115), told by the labelled boxes it overlaps:
a duplicate (IoU >= 0.5 with an object of its class that a better detection took), the wrong class (IoU >= 0.5 with one
of another class), badly placed (IoU >= 0.1 with one of its class), both (IoU >= 0.1 with one of another class), or
nothing labelled there (IoU < 0.1 with everything).

Pictures and the statistics of the blocks come from a part of a large set, which the page states. What it deliberately
does not do: tables over several runs (bench.py experiment), AP of its own (every figure is eval.py's).
"""
import contextlib
import copy
import io
import math
import os
import sys
from html import escape as esc

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import eval as ev
from checkpoint import read_checkpoint
from configurator import InputError
from data import letterbox, load_image
from detect import selecting_blocks
from plots import ALL, data_uri, draw_confusion, draw_precision_recall, log_panels, svg_cells, svg_chart, svg_picture

try:
    import resource
except ImportError:                                                  # Windows has none
    resource = None

MAX_ABLATION = 500         # images on which AP is taken once more, without the blocks
MAX_ATTENTION = 32         # images whose tokens and attention weights are looked at
MAX_WEIGHTS = 2 ** 25      # attention weights of one image and block; beyond, it is not looked at
PHOTO, CROP = 640, 176     # longest side of a picture, side of a cut-out, in pixels
SUSPECTS, MISSED = 20, 12  # cut-outs of false alarms and of missed objects

STYLE = '''
:root{color-scheme:light dark;--bg:#fff;--ink:#18202b;--soft:#566172;--line:#d8dee6;--card:#f4f6f9;--fill:47 111 179;
--c0:#2f6fb3;--c1:#d9482b;--c2:#1f8a4c;--c3:#8e4fb0;--c4:#b56a00;--c5:#0b8486;--c6:#b8336a;--c7:#6b6b6b}
@media(prefers-color-scheme:dark){:root{--bg:#12161c;--ink:#e5e9ef;--soft:#9aa6b5;--line:#2f3844;--card:#1b212a;
--fill:90 150 220;--c0:#6cabf0;--c1:#ff8a6b;--c2:#57c785;--c3:#cf9be6;--c4:#f0ad4e;--c5:#4fd0d2;--c6:#f57fa9;
--c7:#b5b5b5}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1160px;padding:16px;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:26px;line-height:1.2;margin:8px 0 6px;overflow-wrap:anywhere}
h2{font-size:19px;margin:36px 0 6px;padding-top:12px;border-top:1px solid var(--line)}
h3{font-size:15px;margin:20px 0 6px}
p{margin:4px 0 12px;max-width:80ch}
nav{margin:12px 0} nav a{margin-right:14px;white-space:nowrap} a{color:var(--c0)}
.soft,figcaption,th{color:var(--soft)}
code{font:13px/1.4 ui-monospace,monospace;overflow-wrap:anywhere}
.grid{display:grid;gap:16px 28px;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr))}
.columns{display:grid;gap:0 40px;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr))}
.columns>*{min-width:0}
.tiles{display:grid;gap:10px;grid-template-columns:repeat(auto-fill,minmax(104px,1fr));margin:16px 0}
.tile{background:var(--card);border-radius:8px;padding:9px 12px;color:var(--soft);font-size:13px}
.tile data{display:block;font-size:23px;line-height:1.25;color:var(--ink);font-variant-numeric:tabular-nums}
.crops{display:grid;gap:12px 10px;grid-template-columns:repeat(auto-fill,minmax(104px,1fr))}
.pair{display:grid;gap:6px 10px;margin:0 0 22px}
@media(min-width:620px){.pair{grid-template-columns:1fr 1fr}}
.pair figcaption{grid-column:1/-1}
figure{margin:0;min-width:0} figcaption{font-size:13px;line-height:1.35;overflow-wrap:anywhere}
.crops figcaption{font-size:12px}
svg{display:block;width:100%;height:auto} svg text{font-family:system-ui,sans-serif}
.chart text{font-size:11px;fill:var(--soft)} .chart polyline{fill:none;stroke-linejoin:round}
.chart .point{fill:var(--ink);font-weight:600;paint-order:stroke;stroke:var(--bg);stroke-width:4px}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px}
.legend i{display:inline-block;width:14px;height:3px;margin-right:5px;vertical-align:middle}
.scroll{overflow:auto;max-height:540px;margin:8px 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th{font-weight:500;text-align:right;vertical-align:bottom;padding:3px 9px}
td{text-align:right;padding:3px 9px;border-top:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0;white-space:normal}
.bar{background:linear-gradient(rgb(var(--fill)/.28),rgb(var(--fill)/.28)) 0 50%/calc(var(--v)*100%) 74% no-repeat;
min-width:84px}
.cell{text-align:center;min-width:38px;border:1px solid var(--bg)}
.mark{fill:none;stroke-width:2;vector-effect:non-scaling-stroke}
.found{stroke:#25c26e;stroke-width:1.5} .false{stroke:#ff2d2d;stroke-width:2.5} .crowd{stroke:#b0b0b0}
.missed{stroke:#ffb000;stroke-width:2.5;stroke-dasharray:6 4}
.word{paint-order:stroke;stroke:#000;stroke-linejoin:round;stroke-dasharray:none;font-weight:600}
.word.false{fill:#ff8a80} .word.missed{fill:#ffd166}
.key{border:2px solid;padding:0 6px;border-radius:3px;font-size:13px;white-space:nowrap}
details{margin:8px 0} summary{cursor:pointer}
'''


# --- parts of a page -------------------------------------------------------------------------------------------------

def number(value, digits=3):
    return '–' if value is None else f'{value}' if isinstance(value, int) else f'{value:.{digits}f}'


def figure(summary, *keys):
    """A figure of eval.py's json line, with its place in it, its exact value, and what is shown of that."""
    value = summary
    for key in keys:
        value = value[key]
    exact = '' if value is None else repr(value)
    return f'<data data-key="{esc("/".join(map(str, keys)))}" value="{exact}">{number(value)}</data>'


def table(columns, rows):
    """Column names and rows of cells, as html already: text, or a number between 0 and 1 with its cell as (html, v)."""
    def cell(c):
        if isinstance(c, tuple):
            return f'<td class="bar" style="--v:{min(max(c[1] or 0, 0), 1):.3f}">{c[0]}</td>'
        return f'<td>{c}</td>'

    head = ''.join(f'<th scope="col">{c}</th>' for c in columns)
    body = ''.join('<tr>' + ''.join(map(cell, row)) + '</tr>' for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


# --- what went right and wrong ---------------------------------------------------------------------------------------

KINDS = ('duplicate', 'wrong class', 'badly placed', 'wrong class, badly placed', 'nothing labelled there')


def kinds_of_error(coco_gt, detections, false):
    """Of the detections (n, 7) named in `false` (m,) the kind, an index into KINDS, (m,): see the top of this file."""
    boxes, kinds = {}, np.full(len(false), 4)
    for a in coco_gt['annotations']:
        boxes.setdefault(a['image_id'], []).append((a['category_id'], a['bbox'], a['iscrowd']))
    for image in np.unique(detections[false, 0]).astype(int).tolist():
        mine = np.flatnonzero(detections[false, 0] == image)
        objects = boxes.get(image, ())
        if not objects:
            continue
        categories, gt, crowd = zip(*objects, strict=True)
        d = detections[false[mine]]
        iou = coco_mask.iou(np.ascontiguousarray(d[:, 1:5]), np.array(gt, float), list(crowd))           # (m, objects)
        same = d[:, 6:] == np.array(categories)
        mine_best, other_best = np.where(same, iou, 0).max(1), np.where(same, 0, iou).max(1)
        kinds[mine] = np.select([mine_best >= 0.5, other_best >= 0.5, mine_best >= 0.1, other_best >= 0.1],
                                [0, 1, 2, 3], 4)
    return kinds


class Mistakes:
    """
    Detections of score `threshold` and up, matched at IoU 0.5 within their classes. detections (n, 7) by falling score;
    matched (n,) and missed (annotations,) of eval.match_at_half; false: the positions of false alarms; kinds of them.
    """

    def __init__(self, coco_gt, detections, threshold):
        self.coco_gt, self.threshold = coco_gt, threshold
        detections = detections[detections[:, 5] >= threshold]
        self.detections = detections[np.argsort(-detections[:, 5], kind='stable')]
        self.matched, self.missed = ev.match_at_half(coco_gt, self.detections)
        self.false = np.flatnonzero(self.matched == -1)
        self.kinds = kinds_of_error(coco_gt, self.detections, self.false)
        self.names = {c['id']: c['name'] for c in coco_gt['categories']}
        self.of_image = {}                                           # image id -> positions of its annotations
        for i, a in enumerate(coco_gt['annotations']):
            self.of_image.setdefault(a['image_id'], []).append(i)

    def true_boxes(self, image_id):
        boxes = []
        for i in self.of_image.get(image_id, ()):
            a = self.coco_gt['annotations'][i]
            x, y, w, h = a['bbox']
            kind = 'crowd' if a['iscrowd'] else 'missed' if self.missed[i] else 'found'
            boxes.append((x, y, x + w, y + h, kind, self.names[a['category_id']]))
        return boxes

    def predicted_boxes(self, image_id):
        boxes = []
        for i in np.flatnonzero(self.detections[:, 0] == image_id):
            _, x, y, w, h, score, category = self.detections[i].tolist()
            kind = {-1: 'false', -2: 'crowd'}.get(int(self.matched[i]), 'found')
            boxes.append((x, y, x + w, y + h, kind, f'{self.names[category]} {score:.2f}'))
        return boxes

    def counts(self, image_ids):
        """For each image: objects, missed, false alarms, the highest score of a false alarm, (n, 4)."""
        counts, row = np.zeros((len(image_ids), 4)), {image_id: i for i, image_id in enumerate(image_ids)}
        for image_id, some in self.of_image.items():
            crowd = sum(self.coco_gt['annotations'][i]['iscrowd'] for i in some)
            counts[row[image_id], :2] = len(some) - crowd, self.missed[some].sum()
        for image, *_, score, _ in self.detections[self.false].tolist():
            counts[row[image], 2:] += 1, max(score - counts[row[image], 3], 0)
        return counts


def choose_images(counts):
    """Counts of Mistakes -> {heading: rows of at most two images}, none of them twice."""
    objects, missed, false, score = counts.T
    f1 = 2 * (objects - missed) / np.maximum(2 * (objects - missed) + missed + false, 1)
    orders = {'Most crowded': (np.lexsort((-f1, -objects)), objects > 1),
              'Most confident false alarms': (np.lexsort((-false, -score)), false > 0),
              'Most objects missed': (np.lexsort((-missed / np.maximum(objects, 1), -missed)), missed > 0),
              'Best': (np.lexsort((-objects, -f1)), (f1 > 0) & (objects > 0))}
    chosen, used = {}, set()
    for heading, (order, eligible) in orders.items():
        chosen[heading] = [int(row) for row in order if eligible[row] and row not in used][:2]
        used.update(chosen[heading])
    return {heading: chosen[heading] for heading in ('Best', *list(orders)[1:3], 'Most crowded') if chosen[heading]}


class Photos:
    """Images of a dataset, read when they are needed; those that cannot be read are None. `svg` holds each once."""

    def __init__(self, dataset):
        self.dataset, self.last, self.svg = dataset, (None, None), {}

    def load(self, row):
        if self.last[0] != row:
            try:
                image = load_image(self.dataset.files[row], tuple(self.dataset.sizes[row]))
            except InputError:
                image = None
            self.last = row, image
        return self.last[1]

    def use(self, row):
        """-> (svg that shows image `row`, its scale, its (w, h)) or None."""
        image = self.load(row)
        if image is None:
            return None
        scale = min(1.0, PHOTO / max(image.size))
        size = tuple(max(1, round(side * scale)) for side in image.size)
        if row not in self.svg:
            uri = data_uri(image.resize(size, Image.BILINEAR, reducing_gap=2.0))
            self.svg[row] = f'<image id="photo{row}" width="{size[0]}" height="{size[1]}" href="{uri}"/>'
        return f'<use href="#photo{row}"/>', scale, size

    def crop(self, row, box, boxes, alt):
        """A square cut-out around `box`, with `boxes` on it, as svg; or None. Its surroundings are part of the case."""
        image = self.load(row)
        if image is None:
            return None
        x1, y1, x2, y2 = box
        side = min(max(2.2 * max(x2 - x1, y2 - y1), 48), max(image.size))
        left, top = (np.clip((a + b - side) / 2, min(0, n - side), max(0, n - side))
                     for a, b, n in ((x1, x2, image.width), (y1, y2, image.height)))
        part = image.crop((round(left), round(top), round(left + side), round(top + side)))          # black outside
        part, zoom = part.resize((CROP, CROP), Image.BILINEAR), CROP / side
        content = f'<image width="{CROP}" height="{CROP}" href="{data_uri(part)}"/>'
        boxes = [(*((v - o) * zoom for v, o in zip(b[:4], (left, top) * 2, strict=True)), *b[4:]) for b in boxes]
        return svg_picture(content, (CROP, CROP), boxes, alt, words=0)


def show_images(mistakes, photos):
    """The chosen images, labelled boxes beside predicted ones."""
    ids, parts = photos.dataset.image_ids, []
    for heading, rows in choose_images(counts := mistakes.counts(ids)).items():
        pairs = []
        for row in rows:
            used = photos.use(row)
            if used is None:
                continue
            content, scale, size = used
            name = os.path.basename(photos.dataset.files[row])
            objects, missed, false, _ = counts[row].astype(int)
            sides = []
            for what, boxes_of in (('true', mistakes.true_boxes), ('predicted', mistakes.predicted_boxes)):
                boxes = [(*(v * scale for v in b[:4]), *b[4:]) for b in boxes_of(ids[row])]
                alt = f'{name}, {what} boxes: {objects} objects, {missed} missed, {false} false alarms'
                sides.append(f'<div><span class="soft">{what}</span>{svg_picture(content, size, boxes, alt)}</div>')
            pairs.append(f'<figure class="pair">{"".join(sides)}<figcaption>{esc(name)}: {objects} objects, {missed} '
                         f'missed, {false} false alarms</figcaption></figure>')
        parts += [f'<h3>{heading}</h3>', *pairs] if pairs else []
    return ''.join(parts)


def show_crops(mistakes, photos, cases):
    """cases [(image id, box xyxy, kind, text)] -> cut-outs with captions."""
    row_of, parts = {image_id: row for row, image_id in enumerate(photos.dataset.image_ids)}, {}
    for n in sorted(range(len(cases)), key=lambda n: row_of[cases[n][0]]):                # each image is decoded once
        image_id, box, kind, text = cases[n]
        row = row_of[image_id]
        name = os.path.basename(photos.dataset.files[row])
        x1, y1, x2, y2 = box
        here = [b for b in mistakes.true_boxes(image_id) if b[:4] != box]
        svg = photos.crop(row, box, [*here, (*box, kind, text)], f'{text} in {name}')
        if svg:
            parts[n] = (f'<figure>{svg}<figcaption>{esc(text)}<br>{esc(name)} at {x1:.0f}, {y1:.0f}, {x2 - x1:.0f} x '
                        f'{y2 - y1:.0f}</figcaption></figure>')
    return '<div class="crops">' + ''.join(parts[n] for n in sorted(parts)) + '</div>' if parts else ''


def suspects(mistakes):
    """The false alarms that no labelled box explains, as cases for show_crops, the most confident first."""
    cases = []
    for image, x, y, w, h, score, c in mistakes.detections[mistakes.false[mistakes.kinds == 4]][:SUSPECTS].tolist():
        cases.append((int(image), (x, y, x + w, y + h), 'false', f'{mistakes.names[c]} {score:.2f}'))
    return cases


def largest_missed(mistakes):
    """Missed objects, the largest share of their image first, as cases for show_crops."""
    annotations = [a for a, missed in zip(mistakes.coco_gt['annotations'], mistakes.missed, strict=True) if missed]
    annotations.sort(key=lambda a: -a['bbox'][2] * a['bbox'][3])
    return [(a['image_id'], (a['bbox'][0], a['bbox'][1], a['bbox'][0] + a['bbox'][2], a['bbox'][1] + a['bbox'][3]),
             'missed', mistakes.names[a['category_id']]) for a in annotations[:MISSED]]


# --- the attention blocks --------------------------------------------------------------------------------------------

def inside_boxes(centres, boxes):
    """centres (N, 2), boxes (n, 4) -> whether each point lies in a box, (N,)."""
    low, high = centres[:, None] >= boxes[:, :2], centres[:, None] <= boxes[:, 2:]
    return (low & high).all(2).any(1)


@torch.no_grad()
def watch_blocks(model, dataset, rows, shape, device):
    """
    What the blocks that select tokens do on the images of these rows, {level: dict}:

    images, cells, tokens       how many images, cells of the map, cells chosen
    on_objects, all_on_objects  shares of the chosen cells and of all cells whose centre lies in a labelled box
    distance, even_distance     how far attention reaches, in cells: the mean over chosen cells, weighted by attention,
                                and with equal weights
    entropy                     of the attention weights, in nats; equal weights have log(tokens)
    often (h, w)                in how many images a cell was chosen
    example                     of the image with most objects: row, scale, corner, chosen (k,), focus: the chosen cell
                                nearest to its largest object, attention (k,) of that one
    """
    blocks, seen, found = selecting_blocks(model), {}, {}
    hooks = [block.register_forward_pre_hook(lambda _, x, level=level: seen.update({level: x[0]}))
             for level, block in blocks.items()]
    for row in sorted(rows, key=lambda row: -len(dataset.boxes[row])):
        try:
            image = load_image(dataset.files[row], tuple(dataset.sizes[row]))
        except InputError:
            continue
        canvas, scale, corner = letterbox(image, shape)
        model(torch.from_numpy(canvas)[None].to(device).permute(0, 3, 1, 2).float() / 255)
        boxes = dataset.boxes[row] * scale + np.tile(corner, 2)      # (n, 4) in input pixels
        for level, features in seen.items():
            h, w = features.shape[2:]
            block, stride = blocks[level], 2 ** int(level[1])
            if block.num_selected(h * w) ** 2 * block.heads > MAX_WEIGHTS:
                continue
            chosen, weights = (t[0].cpu().numpy() for t in block.attention(features.float()))    # (k,), (heads, k, k)
            cells = np.stack(np.divmod(np.arange(h * w), w)[::-1], 1)                            # (N, 2) x, y
            covered = inside_boxes((cells + 0.5) * stride, boxes)
            distance = np.linalg.norm(cells[chosen][:, None] - cells[chosen], axis=2)            # (k, k)
            if level not in found:
                found[level] = dict(cells=h * w, tokens=len(chosen), often=np.zeros(h * w, int), figures=[])
                largest = max(boxes.tolist(), key=lambda b: (b[2] - b[0]) * (b[3] - b[1]), default=[0, 0, *shape[::-1]])
                middle = np.array([largest[0] + largest[2], largest[1] + largest[3]]) / 2
                focus = np.linalg.norm((cells[chosen] + 0.5) * stride - middle, axis=1).argmin()
                found[level]['example'] = dict(row=row, scale=scale, corner=corner, chosen=chosen, focus=chosen[focus],
                                               attention=weights[:, focus].mean(0))
            found[level]['often'][chosen] += 1
            entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(-1).mean()
            found[level]['figures'].append((covered[chosen].mean(), covered.mean(), (weights * distance).sum(-1).mean(),
                                            distance.mean(), entropy))
    for hook in hooks:
        hook.remove()
    names = 'on_objects', 'all_on_objects', 'distance', 'even_distance', 'entropy'
    for level, one in found.items():
        one |= dict(zip(names, np.mean(one['figures'], 0).tolist(), strict=True), images=len(one['figures']))
        stride = 2 ** int(level[1])
        one['often'] = one['often'].reshape(shape[0] // stride, shape[1] // stride)
    return found


def ap_without_blocks(model, dataset, coco_gt, detections, summary, settings):
    """
    COCO's numbers with the blocks and without them, on the same images, all or an even part of them; and how many.
    summary, settings: those of make_page.
    """
    parts = -(-len(dataset) // MAX_ABLATION)
    batches = ev.image_batches(dataset.sizes, settings['batch_size'], settings['rect'], 0, parts)
    ids = {dataset.image_ids[row] for batch in batches for row in batch}
    bare = copy.deepcopy(model)
    with contextlib.redirect_stdout(io.StringIO()):
        ev.remove_blocks(bare, list(bare.blocks()))
    (without,), _ = ev.predict_dataset(bare, dataset, **settings, world_size=parts, verbose=False)
    subset = dict(coco_gt, annotations=[a for a in coco_gt['annotations'] if a['image_id'] in ids])
    known = [c['id'] for c in coco_gt['categories']]
    without = ev.coco_summary(ev.run_cocoeval(subset, without[np.isin(without[:, 6], known)]))
    if len(ids) < len(dataset):
        detections = detections[np.isin(detections[:, 0], list(ids))]
        summary = ev.coco_summary(ev.run_cocoeval(subset, detections))
    return summary, without, len(ids)


def show_tokens(level, seen, shape, photos):
    """Three pictures of a block: where it chooses; what it chose in one image; what one of those attends to."""
    (h, w), (H, W), example = seen['often'].shape, shape, seen['example']
    share = seen['often'] / seen['images']
    cells = (f'<rect width="{W}" height="{H}" fill="var(--card)"/>'
             + svg_cells(share / share.max(), (217, 72, 43), (W, H)))
    parts = [(svg_picture(cells, (W, H), [], f'{level}: how often each of {h} x {w} cells is chosen'),
              f'How often each of {h} x {w} cells is chosen; strongest colour: in {share.max():.0%} of '
              f'{seen["images"]} images')]
    used = photos.use(example['row'])
    if used:
        content, photo_scale, _ = used
        scale, (left, top) = example['scale'] / photo_scale, example['corner']
        photo = (f'<rect width="{W}" height="{H}" fill="#727272"/>'
                 f'<g transform="translate({left} {top}) scale({scale:.5f})">{content}</g>')
        dark, heat = np.full(h * w, 0.72), np.zeros(h * w)
        dark[example['chosen']] = 0
        heat[example['chosen']] = 0.85 * example['attention'] / example['attention'].max()
        y, x = np.array(divmod(int(example['focus']), w)) * H / h
        focus = (f'<rect x="{x:.1f}" y="{y:.1f}" width="{W / w:.1f}" height="{H / h:.1f}" fill="none" stroke="#fff" '
                 'stroke-width="2" vector-effect="non-scaling-stroke"/>')
        parts += [(svg_picture(photo + svg_cells(dark.reshape(h, w), (0, 0, 0), (W, H)), (W, H), [],
                           f'{level}: the cells chosen in one image'),
                   f'{len(example["chosen"])} cells chosen in one image stay light'),
                  (svg_picture(photo + svg_cells(np.full((h, w), 0.45), (0, 0, 0), (W, H))
                           + svg_cells(heat.reshape(h, w), (255, 40, 0), (W, H)) + focus, (W, H), [],
                           f'{level}: what one cell attends to'),
                   'In red what the cell in the white frame attends to')]
    return (f'<h3>{level.upper()}</h3><div class="grid">'
            + ''.join(f'<figure>{svg}<figcaption>{text}</figcaption></figure>' for svg, text in parts) + '</div>')


def show_blocks(model, dataset, coco_gt, detections, summary, settings, panels, photos):
    """The section about the attention blocks, or nothing."""
    blocks = {level: b for level, b in model.blocks().items() if not isinstance(b, torch.nn.Identity)}
    if not blocks:
        return ''
    shape = ev.input_shape(model, settings['imgsz'])
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(MAX_ATTENTION, len(dataset))).round().astype(int))
    seen = watch_blocks(model, dataset, rows.tolist(), shape, settings['device'])
    whole, bare, n = ap_without_blocks(model, dataset, coco_gt, detections, summary, settings)
    rows = []
    for key in ('AP', 'AP50', 'AP75', 'AR100'):
        change = '–' if None in (whole[key], bare[key]) else f'{round(whole[key] - bare[key], 4) + 0:+.4f}'  # no -0
        rows.append((key, number(whole[key], 4), number(bare[key], 4), change))
    images = 'on all images' if n == len(dataset) else f'on {n} of the {len(dataset)} images'
    text = [f'<h2 id="blocks">Attention blocks</h2><p>What they add, {images}: the network as it was trained, and with '
            'its blocks taken out, which leaves their input as it is.</p>',
            table(('', 'with blocks', 'without', 'difference'), rows)]
    rows = []
    for level, block in blocks.items():
        share, s = panels.get('|block(x) - x| / |x|', {}).get(level), seen.get(level)
        row = [level.upper(), f'{block.gate.item():+.3f}', number(share[-1][1] if share else None)]
        row += [f'{s["tokens"]} of {s["cells"]}', f'{s["on_objects"]:.0%}', f'{s["all_on_objects"]:.0%}',
                f'{s["distance"]:.2f}', f'{s["even_distance"]:.2f}', f'{s["entropy"]:.2f}',
                f'{math.log(s["tokens"]):.2f}'] if s else ['–'] * 7
        rows.append(row)
    text.append(table(('map', 'gate', 'share', 'tokens', 'tokens on objects', 'all cells on objects', 'distance, cells',
                       'with equal weights', 'entropy, nats', 'with equal weights'), rows))
    looked = max((one['images'] for one in seen.values()), default=0)
    text.append('<p class="soft">Share is |block(x) - x| / |x| on one image, the last in log.csv. '
                + (f'The rest is the mean over {looked} of the {len(dataset)} images: distance, how far attention '
                   'reaches; entropy, how widely it spreads. A cell is on an object if its centre is in a labelled box.'
                   if looked else 'Such blocks choose no tokens, or too many to look at.') + '</p>')
    return ''.join(text + [show_tokens(level, one, shape, photos) for level, one in seen.items()])


# --- the page --------------------------------------------------------------------------------------------------------

def f1_curve(scores, correct, objects, thresholds):
    """F1 of the detections at each threshold and above."""
    order = np.argsort(scores)
    kept = len(scores) - np.searchsorted(scores[order], thresholds)
    true_positives = np.r_[correct[order][::-1].cumsum()[::-1], 0][len(scores) - kept]
    return 2 * true_positives / np.maximum(kept + objects, 1)


def show_threshold(E, summary, coco_gt):
    """Precision over recall and F1 over the score threshold, each class and all."""
    names = {c['id']: c['name'] for c in coco_gt['categories']}
    precision, thresholds = E.eval['precision'][0, :, :, 0, -1], np.linspace(0, 1, 101)              # (101, K)
    present = [k for k in range(len(names)) if precision[0, k] > -1]
    best, pr, f1 = summary['best_f1'], {}, {}
    for k in present:
        category = E.params.catIds[k]
        pr[names[category]], f1[names[category]] = precision[:, k], f1_curve(*E.matches[category], thresholds)
    if len(present) > 1:
        parts = [E.matches[E.params.catIds[k]] for k in present]
        scores, correct = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        pr[ALL] = precision[:, present].mean(1)
        f1[ALL] = f1_curve(scores, correct, sum(part[2] for part in parts), thresholds)
    if not present or best['score'] is None:
        return ''
    pr, f1 = ({name: list(zip(x.tolist(), y.tolist(), strict=True)) for name, y in curves.items()}
              for x, curves in ((E.params.recThrs, pr), (thresholds, f1)))
    square = dict(x_range=(0, 1), y_range=(0, 1))
    mark = best['score'], best['F1'], f'F1 {best["F1"]:.3f} at {best["score"]:.3f}'
    return ('<h2 id="threshold">The score threshold</h2><p>AP looks at all scores; an application needs one. At the '
            f'threshold with the best F1 over all classes, {figure(summary, "best_f1", "score")}, precision is '
            f'{figure(summary, "best_f1", "P")} (so many of the detections are right) and recall '
            f'{figure(summary, "best_f1", "R")} (so many of the objects are found), at IoU 0.5.</p><div class="grid">'
            + svg_chart('Precision over recall, IoU 0.5', pr, 'recall', **square)
            + svg_chart('F1 over the score threshold, IoU 0.5', f1, 'score threshold', **square, marks=[mark])
            + '</div>')


def show_confusion(coco_gt, detections, threshold):
    """The confusion matrix up to 12 classes, and of more the pairs that are confused most often."""
    matrix, names = ev.confusion(coco_gt, detections, threshold), [esc(c['name']) for c in coco_gt['categories']]
    names.append('background')
    text = (f'<h2 id="confusion">Confusion</h2><p>At score {threshold:.3f} and IoU 0.5. Rows are true, columns '
            'predicted classes: background that is predicted is a missed object, true background a false alarm.</p>')
    if len(names) > 13:
        np.fill_diagonal(matrix, 0)
        pairs = [divmod(int(i), len(names)) for i in np.argsort(-matrix, axis=None, kind='stable')[:15]]
        rows = [(names[i], f'<span style="float:left">{names[j]}</span>', str(matrix[i, j]))
                for i, j in pairs if matrix[i, j]]
        return text + '<p>The most frequent confusions:</p>' + table(('true', 'predicted', 'count'), rows)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    body = ''
    for i, name in enumerate(names):
        cells = ''.join(f'<td class="cell" style="background:rgb(var(--fill)/{0.7 * share[i, j]:.2f})">'
                        f'{matrix[i, j] or ""}</td>' for j in range(len(names)))
        body += f'<tr><th scope="row">{name}</th>{cells}</tr>'
    head = ''.join(f'<th scope="col">{name}</th>' for name in names)
    return (f'{text}<div class="scroll"><table><thead><tr><th>true \\ predicted</th>{head}</tr></thead><tbody>{body}'
            '</tbody></table></div>')


def show_headline(summary):
    tiles = [key for key in ev.KEYS if key == 'AR100' or not key.startswith('AR')]
    text = ''.join(f'<div class="tile">{figure(summary, key)}{key.replace("_", ", ")}</div>' for key in tiles)
    text += f'<div class="tile">{figure(summary, "best_f1", "F1")}best F1</div>'
    rows = [(key.replace('_', ', '), (figure(summary, key), summary[key])) for key in ev.KEYS if key.startswith('AR')]
    rows.append(('duplicates per object, score 0.25', figure(summary, 'duplicates')))
    return (f'<div class="tiles">{text}</div><details><summary>average recall, duplicates</summary>'
            f'{table(("", ""), rows)}</details>')


def show_groups(summary, key, title, note):
    """A table of summary[key], {group: {column: figure}}: by class or by overlap."""
    groups, bars = summary[key], ('AP', 'recall50')
    columns, order = list(next(iter(groups.values()))), list(groups)
    if key == 'by_class':
        order.sort(key=lambda name: -(groups[name]['AP'] or 0))
    rows = []
    for name in order:
        cells = [figure(summary, key, name, c) for c in columns]
        rows.append([esc(name)] + [(cell, groups[name][c]) if c in bars else cell
                                   for c, cell in zip(columns, cells, strict=True)])
    return f'<h2 id="{key}">{title}</h2><p class="soft">{note}</p>{table(("", *columns), rows)}'


def show_speed(summary, model, clock, settings, weights):
    images, device = max(clock['images'], 1), settings['device']
    rows = [('images a second, with everything', figure(summary, 'images_per_s')),
            *((what, f'{1000 * clock[part] / images:.1f} ms an image') for part, what in
              (('network', 'network'), ('nms', 'decoding, NMS'), ('load', 'reading and resizing, beside it'))),
            ('file of the weights', f'{os.path.getsize(weights) / 2 ** 20:.1f} MiB')]
    if device.startswith('cuda'):
        rows.append(('GPU memory, at most', f'{torch.cuda.max_memory_allocated(device) / 2 ** 20:.0f} MiB'))
        device = torch.cuda.get_device_name(device)
    elif resource:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == 'darwin' else 10)
        rows.append(('memory of the process, at most', f'{peak:.0f} MiB'))
        device = f'CPU, threads: {torch.get_num_threads()}'
    rows.append(('on', f'{esc(device)}; {settings["dtype"]}; batch {settings["batch_size"]}'))
    return '<h2 id="speed">Speed and memory</h2>' + table(('', ''), rows)


def show_mistakes(mistakes, photos):
    count = np.bincount(mistakes.kinds, minlength=len(KINDS)).tolist()
    text = [f'<h2 id="mistakes">Mistakes</h2><p>At score {mistakes.threshold:.3f} and above: {len(mistakes.false)} '
            f'false alarms among {len(mistakes.detections)} detections; {mistakes.missed.sum()} objects missed.</p>',
            table(('false alarms', 'count'), list(zip(KINDS, map(str, count), strict=True)))]
    if photos is None:
        return ''.join(text)
    for cases, title, note in (
            (suspects(mistakes), 'Overlooked by the labels?', 'The most confident false alarms (red) that no labelled '
             'box explains; labelled objects are green, or amber where missed. Is it the detector that is wrong?'),
            (largest_missed(mistakes), 'The largest missed objects', 'Labelled (amber) and not found. Some may be '
             'labels without an object.')):
        crops = show_crops(mistakes, photos, cases)
        text += [f'<h3>{title}</h3><p class="soft">{note}</p>', crops] if crops else []
    images = show_images(mistakes, photos)
    colours = (('solid #25c26e', 'found'), ('solid #ff2d2d', 'false alarm'), ('dashed #ffb000', 'missed'),
               ('solid #b0b0b0', 'does not count'))
    key = ' '.join(f'<span class="key" style="border:2px {colour}">{name}</span>' for colour, name in colours)
    return ''.join(text) + (f'<h2 id="pictures">Pictures</h2><p>{key}</p>{images}' if images else '')


def show_settings(saved):
    """All settings of the training run that the weights come from."""
    rows = [(esc(str(key)), f'<code>{esc(str(value))}</code>') for key, value in saved.get('config', {}).items()]
    return f'<details id="settings"><summary>all settings of the training</summary>{table(("", ""), rows)}</details>'


def describe(saved, model, coco_gt, data, settings):
    """What was trained on what, and what it was evaluated on: two sentences of html."""
    config, text = saved.get('config', {}), ''
    if model is not None:
        network = saved.get('model_config', {})
        known = [f'{key} {network[key]}' for key in ('scale', 'attn') if key in network]
        text = ', '.join([type(model).__name__, *known])
        parameters = sum(p.numel() for p in model.parameters())
        text += f', {parameters / 1e6:.2f} M parameters' if parameters else ''
        if 'train_data' in config:
            text += (f', trained on {config["train_data"]} at {"x".join(map(str, saved["imgsz"]))}, {config["epochs"]} '
                     f'epochs, batches of {config["batch_size"]}; the weights are those of step {saved.get("step")}')
            text += f', commit {saved["commit"][:9]}' if saved.get('commit') else ''
        shape = 'x'.join(map(str, ev.input_shape(model, settings['imgsz'])))
        text += f'. Evaluated at {shape} on '
    objects = sum(not a['iscrowd'] for a in coco_gt['annotations'])
    images, classes = len(coco_gt['images']), len(coco_gt['categories'])
    return esc(f'{text}{data}: {images} images, {objects} objects, {classes} classes.')


def draw_plots(E, coco_gt, detections, folder):
    """folder/precision_recall.png at IoU 0.5, of the classes with objects, and folder/confusion.png at score 0.25."""
    table = {name: row['AP50'] for name, row in ev.per_class(E, coco_gt).items() if row['AP50'] is not None}
    curves = E.eval['precision'][0, :, :, 0, -1]                     # (101, K) at IoU 0.5
    curves = curves[:, curves[0] > -1]
    path = os.path.join(folder, 'precision_recall.png')
    draw_precision_recall(E.params.recThrs, curves, list(table), list(table.values()), path)
    names = [c['name'] for c in coco_gt['categories']]
    draw_confusion(ev.confusion(coco_gt, detections), names, os.path.join(folder, 'confusion.png'))


def make_page(folder, data, coco_gt, E, detections, summary, dataset=None, model=None, weights='', clock=None,
              settings=None):
    """
    Write folder/report.html of one evaluation, and print its path.

    data                     the path of the ground truth, for the title
    coco_gt, E, detections   the ground truth, eval.run_cocoeval's result, and the table (n, 7) that it was given
    summary                  the json line of eval.py, with by_class and occlusion
    dataset                  where the images are; None: no pictures
    model, weights, clock, settings   where the detections come from, None if not from a model: its file, and the second
                             result of predict_dataset and its settings by name (imgsz, batch_size, rect, dtype, ...)
    """
    weights = weights if model else ''
    saved = read_checkpoint(weights) if weights.endswith('.pt') else {}
    if not isinstance(saved.get('config'), dict):                    # a YOLOv8 file has none of ours
        saved = {}
    log = os.path.join(os.path.dirname(weights), 'log.csv')
    panels = log_panels(log) if weights and os.path.isfile(log) else {}
    threshold = 0.25 if summary['best_f1']['score'] is None else summary['best_f1']['score']
    mistakes, photos = Mistakes(coco_gt, detections, threshold), Photos(dataset) if dataset else None
    title = f'{os.path.basename(os.path.dirname(os.path.abspath(weights)))}/' if weights else ''
    title = f'{title}{os.path.basename(weights) or "detections"} on {os.path.basename(data.rstrip("/"))}'
    body = [show_headline(summary)]
    if panels:
        charts = ''.join(svg_chart(name, lines, 'epoch') for name, lines in panels.items())
        body.append(f'<h2 id="curves">Training curves</h2><div class="grid">{charts}</div>')
    body += [show_threshold(E, summary, coco_gt),
             show_groups(summary, 'by_class', 'AP by class', 'Score, P, R and F1 are those of the class at its own '
                         'best threshold.') if summary['by_class'] else '',
             '<div class="columns"><div>', show_confusion(coco_gt, detections, threshold), '</div><div>',
             show_groups(summary, 'occlusion', 'AP by overlap', 'Bins by the largest IoU of an object with any other. '
                         'A false alarm counts in every bin: compare bins by recall, models by AP.'), '</div></div>']
    if model is not None:
        body.append(show_speed(summary, model, clock, settings, weights))
        body.append(show_blocks(model, dataset, coco_gt, detections, summary, settings, panels, photos))
    body.append(show_mistakes(mistakes, photos))
    body.append(show_settings(saved) if saved else '')
    body = ''.join(body)
    links = dict(curves='curves', threshold='threshold', by_class='classes', confusion='confusion', occlusion='overlap',
                 speed='speed', blocks='blocks', mistakes='mistakes', pictures='pictures')
    nav = ' '.join(f'<a href="#{key}">{label}</a>' for key, label in links.items() if f'id="{key}"' in body)
    images = ''.join(photos.svg.values()) if photos else ''
    page = ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src '
            f'\'unsafe-inline\'"><title>{esc(title)}</title><style>{STYLE}</style></head><body><h1>{esc(title)}</h1>'
            f'<p>{describe(saved, model, coco_gt, data, settings)}</p><nav>{nav}</nav>'
            f'<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>{images}</defs></svg>{body}'
            '</body></html>\n')
    path = os.path.join(folder, 'report.html')
    with open(path + '.part', 'w', encoding='utf-8', errors='backslashreplace') as f:
        f.write(page)
    os.replace(path + '.part', path)
    print(path)


def write_report(out_dir, data, images='', imgsz=0, batch_size=16, device='cpu'):
    """
    Evaluate out_dir/best.pt on `data` as eval.py does and write out_dir/report.html: for the end of training. -> '' or
    a sentence that says why there is none. An OSError while writing it is the caller's.
    """
    weights = os.path.join(out_dir, 'best.pt')
    settings = dict(imgsz=imgsz, batch_size=batch_size, rect=False, dtype='float32', device=str(device))
    try:
        model = ev.load_model(weights, str(device))
        dataset = ev.open_data(data, model.names, images)
        (detections,), clock = ev.predict_dataset(model, dataset, **settings, verbose=False)
    except InputError as e:
        return f'no report: {e}'
    coco_gt = dataset.coco()
    detections = detections[np.isin(detections[:, 6], [c['id'] for c in coco_gt['categories']])]
    E = ev.run_cocoeval(coco_gt, detections)
    summary = ev.coco_summary(E) | dict(images=clock['images'], images_per_s=round(clock['images'] / clock['all'], 2),
                                        by_class=ev.per_class(E, coco_gt), best_f1=ev.best_f1(E),
                                        occlusion=ev.under_occlusion(coco_gt, detections),
                                        duplicates=ev.duplicates(coco_gt, detections))
    make_page(out_dir, data, coco_gt, E, detections, summary, dataset, model, weights, clock, settings)
    return ''

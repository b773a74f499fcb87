"""
report.html: one page about one detector, to be opened from disk: no network, no script, no file beside it.

    python eval.py --weights=out/best.pt --data=val.json --report=True      out/report.html, of any weights
    train.py writes out_dir/report.html of best.pt when it is done

On it: every figure of eval.py's json line, the curves of log.csv, the confusion matrix, speed and memory, what the
attention blocks do, and pictures of what goes right and wrong. Its false alarms that no labelled box explains are
sorted by score and double as a list of objects that whoever labelled the images may have overlooked.

Pictures and the statistics of the blocks come from a part of a large set, which the page states. What it deliberately
does not do: tables over several runs (bench.py experiment), AP of its own (every figure is eval.py's).
"""
import collections
import contextlib
import copy
import io
import math
import os
import re
import sys
from html import escape as esc

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import eval as ev
from checkpoint import read_checkpoint
from configurator import InputError
from data import DetectionDataset, letterbox
from detect import detect_images, selected_tokens, selecting_blocks
from plots import ALL, data_uri, draw_confusion, draw_precision_recall, log_panels, svg_cells, svg_chart, svg_picture

MAX_ABLATION = 500         # images on which AP is taken once more, without the blocks
MAX_ATTENTION = 32         # images whose tokens and attention weights are looked at
MAX_WEIGHTS = 2 ** 25      # attention weights of one image and block; beyond, they are not looked at
PHOTO, CROP = 640, 176     # longest side of a picture, side of a cut-out, in pixels
SUSPECTS, MISSED = 20, 12  # cut-outs of false alarms and of missed objects

STYLE = '''
:root{color-scheme:light dark;--bg:#fff;--ink:#18202b;--soft:#566172;--line:#d8dee6;--card:#f4f6f9;--fill:80 140 205;
--c0:#3b82c4;--c1:#e0533a;--c2:#2f9e5b;--c3:#9b5fc0;--c4:#c27a12;--c5:#1b9596;--c6:#cc4d80;--c7:#808080}
@media(prefers-color-scheme:dark){:root{--bg:#12161c;--ink:#e5e9ef;--soft:#9aa6b5;--line:#2f3844;--card:#1b212a}}
body{margin:0 auto;max-width:1160px;padding:16px;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui}
h1,p,figcaption{overflow-wrap:anywhere}
h2{font-size:19px;margin:32px 0 6px;padding-top:12px;border-top:1px solid var(--line)}
p{margin:4px 0 12px;max-width:80ch}
a{color:inherit;margin-right:14px;white-space:nowrap}
.soft,figcaption,thead th{color:var(--soft)}
.grid,.small{display:grid;gap:12px 28px;grid-template-columns:repeat(auto-fit,minmax(min(330px,100%),1fr))}
.small{gap:10px;grid-template-columns:repeat(auto-fill,minmax(104px,1fr));margin:16px 0}
.tile{background:var(--card);border-radius:8px;padding:9px 12px;color:var(--soft);font-size:13px}
.tile data{display:block;font-size:22px;color:var(--ink)}
figure{margin:0 0 8px;min-width:0}
figcaption,.legend{font-size:12px}
svg{display:block;width:100%;height:auto}
.chart text{font-size:11px;fill:var(--soft)}
.chart .point{fill:var(--ink);font-weight:600;paint-order:stroke;stroke:var(--bg);stroke-width:4px}
.legend span{margin-right:14px;white-space:nowrap}
.legend i{display:inline-block;width:14px;height:3px;margin-right:5px;vertical-align:middle}
.scroll{overflow:auto;max-height:540px;margin-bottom:8px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th,td{font-weight:400;text-align:right;padding:3px 9px;border-bottom:1px solid var(--line)}
td{white-space:nowrap}
th:first-child{text-align:left;padding-left:0}
.bar{background:linear-gradient(rgb(var(--fill)/.3) 0 0) 0/calc(var(--v)*100%) 74% no-repeat;min-width:84px}
.cell{background:rgb(var(--fill)/calc(var(--v)*.8));text-align:center;min-width:38px}
polyline,.mark{fill:none}
.mark{stroke-width:2.5;vector-effect:non-scaling-stroke}
.found{stroke:#25c26e} .false{stroke:#ff2d2d} .missed{stroke:#ffb000;stroke-dasharray:6 4}
.crowd{stroke:#b0b0b0} .focus{stroke:#fff}
.word{fill:#fff;paint-order:stroke;stroke:#000;stroke-linejoin:round;stroke-dasharray:none;font-weight:600}
'''


# --- parts of a page -------------------------------------------------------------------------------------------------

def metric(summary, *keys):
    """A metric of eval.py's json line, with its place in it, its exact value, and what is shown of that."""
    value = summary
    for key in keys:
        value = value[key]
    exact, shown = '', '–'
    if value is not None:
        exact, shown = repr(value), value if isinstance(value, int) else f'{value:.3f}'
    return f'<data data-key="{esc("/".join(keys))}" value="{exact}">{shown}</data>'


def table(columns, rows, shade='bar'):
    """Names of columns and rows of cells, html already; a cell (html, v) is shaded by v in 0..1."""
    head, body = ''.join(f'<th scope="col">{c}</th>' for c in columns), ''
    for name, *cells in rows:
        body += f'<tr><th scope="row">{name}</th>'
        for c in cells:
            body += f'<td>{c}</td>' if isinstance(c, str) else f'<td class="{shade}" style="--v:{c[1]:.3f}">{c[0]}</td>'
        body += '</tr>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(image, size):
    """A PIL.Image as part of an svg, stretched to `size` (w, h)."""
    return f'<image width="{size[0]}" height="{size[1]}" preserveAspectRatio="none" href="{data_uri(image)}"/>'


# --- what went right and wrong ---------------------------------------------------------------------------------------

KINDS = 'duplicate', 'wrong class', 'badly placed', 'wrong class, badly placed', 'nothing labelled there'


# image: its id; xyxy in its pixels; kind: found, missed, false, crowd (does not count); error: one of KINDS, if false
Box = collections.namedtuple('Box', 'image xyxy kind text score error', defaults=(0.0, ''))


def kind_of_error(box, category, objects):
    """
    Why a box xywh is a false alarm, after TIDE (Bolya et al. 2020, 2008.08115), told by the annotations of its image:
    it overlaps one of its class with IoU >= 0.5, which a better detection took, or one of another class; with IoU >=
    0.1 one of its class, or one of another; or none. -> one of KINDS, in this order.
    """
    gt, crowd = np.array([a['bbox'] for a in objects], float), [a['iscrowd'] for a in objects]
    iou = coco_mask.iou(np.array([box]), gt, crowd)[0] if objects else ()                            # (objects,)
    own = max((v for v, a in zip(iou, objects, strict=True) if a['category_id'] == category), default=0)
    other = max((v for v, a in zip(iou, objects, strict=True) if a['category_id'] != category), default=0)
    return KINDS[(own >= 0.5, other >= 0.5, own >= 0.1, other >= 0.1, True).index(True)]


def find_boxes(coco_gt, detections, threshold):
    """-> labelled Boxes, and predicted ones by falling score, from `threshold`, matched at IoU 0.5 in their classes."""
    detections = detections[detections[:, 5] >= threshold]
    detections = detections[np.argsort(-detections[:, 5], kind='stable')]
    matched, missed = ev.match_at_half(coco_gt, detections)
    names, objects = {c['id']: c['name'] for c in coco_gt['categories']}, collections.defaultdict(list)
    true, predicted = [], []
    for a, lost in zip(coco_gt['annotations'], missed, strict=True):
        (x, y, w, h), kind = a['bbox'], 'crowd' if a['iscrowd'] else 'missed' if lost else 'found'
        true.append(Box(a['image_id'], (x, y, x + w, y + h), kind, names[a['category_id']]))
        objects[a['image_id']].append(a)
    for (image, x, y, w, h, score, category), match in zip(detections.tolist(), matched.tolist(), strict=True):
        kind = {-1: 'false', -2: 'crowd'}.get(match, 'found')
        error = kind_of_error((x, y, w, h), category, objects[image]) if kind == 'false' else ''
        predicted.append(Box(int(image), (x, y, x + w, y + h), kind, f'{names[category]} {score:.2f}', score, error))
    return true, predicted


def choose_images(counts):
    """Of each image objects, missed, false alarms, their highest score (n, 4) -> {heading: two rows}, none twice."""
    objects, missed, false, score = counts.T
    f1 = 2 * (objects - missed) / np.maximum(2 * (objects - missed) + missed + false, 1)
    chosen = {}
    for heading, key, tie in (('Most crowded', objects - 1, f1), ('Most confident false alarms', score, false),
                              ('Most objects missed', missed, missed / np.maximum(objects, 1)), ('Best', f1, objects)):
        used = sum(chosen.values(), [])
        chosen[heading] = [int(row) for row in np.lexsort((-tie, -key)) if key[row] > 0 and row not in used][:2]
    return {heading: chosen[heading] for heading in reversed(chosen) if chosen[heading]}


def show_images(dataset, true, predicted):
    """The chosen images, labelled boxes beside predicted ones."""
    count = collections.Counter((b.image, b.kind) for b in [*true, *(b for b in predicted if b.kind == 'false')])
    highest, text = {b.image: b.score for b in reversed(predicted) if b.kind == 'false'}, ''
    counts = np.array([(count[i, 'found'] + count[i, 'missed'], count[i, 'missed'], count[i, 'false'],
                        highest.get(i, 0)) for i in dataset.image_ids])
    for heading, rows in choose_images(counts).items():
        text += f'<h3>{heading}</h3>'
        for row in rows:
            image, name = ev.read_photo(dataset, row), os.path.basename(dataset.files[row])
            size, note = image.size, '{:.0f} objects, {:.0f} missed, {:.0f} false alarms'.format(*counts[row])
            image.thumbnail((PHOTO, PHOTO))
            sides = ''
            for side, content, boxes in (('true', f'<g id="photo{row}">{picture(image, size)}</g>', true),
                                         ('predicted', f'<use href="#photo{row}"/>', predicted)):
                boxes = [(*b.xyxy, b.kind, b.text) for b in boxes if b.image == dataset.image_ids[row]]
                svg = svg_picture(content, size, boxes, f'{name}, {side} boxes: {note}')
                sides += f'<div><span class="soft">{side}</span>{svg}</div>'
            text += f'<figure><div class="grid">{sides}</div><figcaption>{esc(name)}: {note}</figcaption></figure>'
    return text


def show_crops(dataset, cases, true):
    """Square cut-outs around Boxes, with the labelled ones there. Their surroundings are part of the case."""
    parts = []
    for case in cases:
        row = dataset.image_ids.index(case.image)
        image, name, (x1, y1, x2, y2) = ev.read_photo(dataset, row), os.path.basename(dataset.files[row]), case.xyxy
        side = round(min(max(2.2 * max(x2 - x1, y2 - y1), 48), max(image.size)))
        left, top = (round(np.clip((a + b - side) / 2, min(0, n - side), max(0, n - side)))
                     for a, b, n in ((x1, x2, image.width), (y1, y2, image.height)))
        part = image.crop((left, top, left + side, top + side)).resize((CROP, CROP))                 # black outside
        boxes = [b for b in true if b.image == case.image and b.xyxy != case.xyxy] + [case]
        boxes = [(*np.subtract(b.xyxy, (left, top) * 2), b.kind, b.text) for b in boxes]
        svg = svg_picture(picture(part, (side, side)), (side, side), boxes, f'{case.text} in {name}', words=0)
        parts.append(f'<figure>{svg}<figcaption>{esc(case.text)}<br>{esc(name)} at {x1:.0f}, {y1:.0f}, {x2 - x1:.0f} x '
                     f'{y2 - y1:.0f}</figcaption></figure>')
    return f'<div class="small">{"".join(parts)}</div>'


def show_mistakes(coco_gt, detections, threshold, dataset):
    true, predicted = find_boxes(coco_gt, detections, threshold)
    false, missed = [b for b in predicted if b.kind == 'false'], [b for b in true if b.kind == 'missed']
    count = collections.Counter(b.error for b in false)
    text = (f'<h2 id="mistakes">Mistakes</h2><p>At score {threshold:.3f} and above: {len(false)} false alarms among '
            f'{len(predicted)} detections; {len(missed)} objects missed.</p>'
            + table(('false alarms', 'count'), [(kind, str(count[kind])) for kind in KINDS]))
    if dataset is None:
        return text
    there = set(dataset.image_ids)                                   # an image without a file has objects, but no photo
    missed = [b for b in missed if b.image in there]
    suspects = [b for b in false if b.error == KINDS[-1] and b.image in there][:SUSPECTS]
    missed.sort(key=lambda b: (b.xyxy[0] - b.xyxy[2]) * (b.xyxy[3] - b.xyxy[1]))
    for cases, title, note in (
            (suspects, 'Overlooked by the labels?', 'The most confident false alarms (red) that no labelled box '
             'explains; labelled objects are green, or amber where missed. Is it the detector that is wrong?'),
            (missed[:MISSED], 'The largest missed objects', 'Labelled (amber) and not found; or is there no object?')):
        if cases:
            text += f'<h3>{title}</h3><p class="soft">{note}</p>{show_crops(dataset, cases, true)}'
    return (f'{text}<h2 id="pictures">Pictures</h2><p>Green: found; red: false alarm; amber: missed; grey: does not '
            f'count.</p>{show_images(dataset, true, predicted)}')


# --- the attention blocks --------------------------------------------------------------------------------------------

def watch_blocks(model, dataset, rows, shape):
    """
    What the blocks that select tokens do on the images of these rows, in an input of `shape`: {level: dict}. {} where
    there is none, or too much to look at. Attention is that of the chosen cells to each other, averaged over heads.

    measured (images, 6)   how many cells are chosen; which share of them has its centre in a labelled box; which share
                           of all cells; the distance of chosen cells, in cells, weighted by attention; the same with
                           equal weights; entropy of the attention, in nats
    often (h, w)           in how many images a cell was chosen
    canvas, chosen (k,)    the input with most objects, as a PIL.Image, and its chosen cells
    focus, attention (k,)  the chosen cell nearest to its largest object, and what that attends to
    """
    found, area = {}, shape[0] * shape[1]
    if any(block.num_selected(area // 4 ** int(level[1])) ** 2 * block.heads > MAX_WEIGHTS
           for level, block in selecting_blocks(model).items()):
        return found
    for row in sorted(rows, key=lambda row: -len(dataset.boxes[row])):
        state = [None] if model.frames else None                     # with memory=time the frames before it come first
        *before, image = (ev.read_photo(dataset, row, back) for back in reversed(range(dataset.frames + 1)))
        for frame in before:
            detect_images(model, [frame], imgsz=shape, state=state)
        _, levels = selected_tokens(model, image, imgsz=shape, state=state)
        for level, ((h, w), stride, scale, corner, chosen, weights) in levels.items():
            boxes = (dataset.boxes[row] * scale + np.tile(corner, 2)) / stride                       # (n, 4) in cells
            centres = np.stack(np.divmod(np.arange(h * w), w)[::-1], 1) + 0.5                        # (N, 2) x, y
            covered = ((centres[:, None] >= boxes[:, :2]) & (centres[:, None] <= boxes[:, 2:])).all(2).any(1)  # (N,)
            distance = np.linalg.norm(centres[chosen][:, None] - centres[chosen], axis=2)            # (k, k)
            if level not in found:
                x1, y1, x2, y2 = max(boxes.tolist(), key=lambda b: (b[2] - b[0]) * (b[3] - b[1]), default=(0, 0, w, h))
                focus = np.linalg.norm(centres[chosen] - ((x1 + x2) / 2, (y1 + y2) / 2), axis=1).argmin()
                found[level] = dict(measured=[], often=np.zeros((h, w)), chosen=chosen, focus=chosen[focus],
                                    attention=weights[focus], canvas=Image.fromarray(letterbox(image, shape)[0]))
            found[level]['often'].ravel()[chosen] += 1
            entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(1).mean()
            found[level]['measured'].append((len(chosen), covered[chosen].mean(), covered.mean(),
                                            (weights * distance).sum(1).mean(), distance.mean(), entropy))
    return found


def ap_without_blocks(model, dataset, coco_gt, detections, settings):
    """COCO's numbers with the blocks and without them, on the same images, all or an even part of them; how many."""
    parts = -(-len(dataset) // MAX_ABLATION)
    batches = ev.image_batches(dataset.sizes, settings['batch_size'], settings['rect'], 0, parts)
    ids = {dataset.image_ids[row] for batch in batches for row in batch}
    bare = copy.deepcopy(model)
    with contextlib.redirect_stdout(io.StringIO()):
        ev.remove_blocks(bare, list(bare.blocks()))
    (without,), _ = ev.predict_dataset(bare, dataset, **settings, world_size=parts, verbose=False)
    subset = dict(coco_gt, annotations=[a for a in coco_gt['annotations'] if a['image_id'] in ids])
    tables = detections[np.isin(detections[:, 0], list(ids))], without
    return *(ev.coco_summary(ev.run_cocoeval(subset, table)) for table in tables), len(ids)


def show_tokens(level, seen):
    """Three pictures of a block: where it chooses; what it chose in one image; what one of those attends to."""
    (h, w), images, image = seen['often'].shape, len(seen['measured']), seen['canvas']
    image.thumbnail((PHOTO, PHOTO))
    share, dark, red, (W, H) = seen['often'] / images, np.full((h, w), 0.72), np.zeros((h, w)), image.size
    dark.ravel()[seen['chosen']] = 0
    red.ravel()[seen['chosen']] = 0.85 * seen['attention'] / seen['attention'].max()
    y, x = np.divmod(seen['focus'], w)
    focus = x * W / w, y * H / h, (x + 1) * W / w, (y + 1) * H / h, 'focus', 'this cell'
    black, text = (0, 0, 0), f'<h3>{level.upper()}</h3><div class="grid">'
    for content, boxes, note in (
            (f'<rect width="{W}" height="{H}" fill="var(--card)"/>'
             + svg_cells(share / share.max(), (217, 72, 43), (W, H)), [],
             f'How often each of {h} x {w} cells is chosen; strongest: in {share.max():.0%} of {images} images'),
            (f'<g id="{level}">{picture(image, (W, H))}</g>' + svg_cells(dark, black, (W, H)), [],
             f'{len(seen["chosen"])} cells chosen in one image stay light'),
            (f'<use href="#{level}"/>' + svg_cells(np.full((h, w), 0.45), black, (W, H))
             + svg_cells(red, (255, 40, 0), (W, H)), [focus], 'In red what the cell in the white frame attends to')):
        svg = svg_picture(content, (W, H), boxes, f'{level}: {note}')
        text += f'<figure>{svg}<figcaption>{note}</figcaption></figure>'
    return text + '</div>'


def show_blocks(model, dataset, coco_gt, detections, settings, panels):
    """The section about the attention blocks, or nothing."""
    blocks = {level: b for level, b in model.blocks().items() if not isinstance(b, torch.nn.Identity)}
    if not blocks:
        return ''
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(MAX_ATTENTION, len(dataset))).astype(int)).tolist()
    seen = watch_blocks(model, dataset, rows, ev.input_shape(model, settings['imgsz']))
    whole, bare, n = ap_without_blocks(model, dataset, coco_gt, detections, settings)
    rows, looked = [], len(rows)
    for key in ('AP', 'AP50', 'AP75', 'AR100'):
        a, b = whole[key] or 0, bare[key] or 0
        rows.append((key, f'{a:.4f}', f'{b:.4f}', f'{round(a - b, 4) + 0:+.4f}'))        # + 0: no -0.0000
    text = ('<h2 id="blocks">Attention blocks</h2><p>What they add: the network as it was trained, and with its blocks '
            f'taken out, which leaves their input as it is; on {n} of {len(dataset)} images.</p>'
            + table(('', 'with blocks', 'without', 'difference'), rows))
    rows = []
    for level, block in blocks.items():
        share, cells = panels.get('|block(x) - x| / |x|', {}).get(level), ['–'] * 7
        if level in seen:
            k, chosen, covered, reach, even, entropy = np.mean(seen[level]['measured'], 0)
            cells = [f'{k:.0f} of {seen[level]["often"].size}', f'{chosen:.0%}', f'{covered:.0%}', f'{reach:.2f}',
                     f'{even:.2f}', f'{entropy:.2f}', f'{math.log(k):.2f}']
        rows.append((level.upper(), f'{block.gate.item():+.3f}', f'{share[-1][1]:.3f}' if share else '–', *cells))
    text += table(('map', 'gate', 'share', 'tokens', 'tokens on objects', 'all cells on objects', 'distance, cells',
                   'with equal weights', 'entropy, nats', 'with equal weights'), rows)
    text += '<p class="soft">Share is |block(x) - x| / |x| on one image, the last in log.csv. '
    text += (f'The rest is the mean over {looked} of {len(dataset)} images: distance, how far attention reaches; '
             'entropy, how widely it spreads. A cell is on an object if its centre is in a labelled box.</p>' if seen
             else 'Such blocks choose no tokens, or too many to look at.</p>')
    return text + ''.join(show_tokens(level, one) for level, one in seen.items())


# --- the page --------------------------------------------------------------------------------------------------------

def show_headline(summary):
    text = ''
    for keys in *((key,) for key in ev.KEYS), ('best_f1', 'F1'), ('duplicates',):
        text += f'<div class="tile">{metric(summary, *keys)}{keys[-1].replace("_", " ")}</div>'
    return f'<div class="small">{text}</div><p class="soft">F1 at its best; duplicates per object at score 0.25.</p>'


def f1_curve(scores, correct, objects, thresholds):
    """F1 of the detections at each threshold and above."""
    counts = [(correct[scores >= t].sum(), (scores >= t).sum() + objects) for t in thresholds]
    return np.array([2 * true_positives / max(both, 1) for true_positives, both in counts])


def show_threshold(coco_eval, summary):
    """Precision over recall and F1 over the score threshold, each class and all."""
    best, grid, curves, precision, f1 = summary['best_f1'], np.linspace(0, 1, 101), {}, {}, {}
    if best['score'] is None:
        return ''
    for k, (name, category) in enumerate(zip(summary['by_class'], coco_eval.params.catIds, strict=True)):
        if coco_eval.matches[category][2]:                                   # it has objects
            curves[name] = coco_eval.eval['precision'][0, :, k, 0, 2], *coco_eval.matches[category]
    if len(curves) > 1:
        scores, correct, objects = zip(*coco_eval.matches.values(), strict=True)
        mean = np.mean([curve[0] for curve in curves.values()], 0)
        curves[ALL] = mean, np.concatenate(scores), np.concatenate(correct), sum(objects)
    for name, (P, *part) in curves.items():
        precision[name], f1[name] = np.stack((grid, P), 1), np.stack((grid, f1_curve(*part, grid)), 1)
    mark = best['score'], best['F1'], f'F1 {best["F1"]:.3f} at {best["score"]:.3f}'
    charts = (svg_chart('Precision over recall, IoU 0.5', precision, 'recall', (0, 1), (0, 1))
              + svg_chart('F1 over the score threshold, IoU 0.5', f1, 'score threshold', (0, 1), (0, 1), [mark]))
    score, P, R = (metric(summary, 'best_f1', key) for key in ('score', 'P', 'R'))
    return ('<h2 id="threshold">The score threshold</h2><p>AP looks at all scores; an application needs one. At the '
            f'threshold with the best F1 over all classes, {score}, precision is {P} (so many of the detections are '
            f'right), recall {R} (so many of the objects are found), at IoU 0.5.</p><div class="grid">{charts}</div>')


def show_confusion(coco_gt, detections, threshold):
    """The confusion matrix up to 12 classes, and of more the pairs that are confused most often."""
    matrix = ev.confusion(coco_gt, detections, threshold)
    names = [esc(c['name']) for c in coco_gt['categories']] + ['background']
    text = (f'<h2 id="confusion">Confusion</h2><p>At score {threshold:.3f} and IoU 0.5. Rows are true, columns '
            'predicted classes: background that is predicted is a missed object, true background a false alarm.</p>')
    if len(names) <= 13:
        rows = [(name, *((str(n or ''), n / max(sum(row), 1)) for n in row))
                for name, row in zip(names, matrix.tolist(), strict=True)]
        return text + table(('true \\ predicted', *names), rows, 'cell')
    np.fill_diagonal(matrix, 0)
    pairs = [divmod(int(i), len(names)) for i in np.argsort(-matrix, axis=None, kind='stable')[:15]]
    rows = [(f'{names[i]} as {names[j]}', str(matrix[i, j])) for i, j in pairs if matrix[i, j]]
    return f'{text}<p>The most frequent confusions:</p>{table(("", "count"), rows)}'


def show_groups(summary, key, title, note):
    """A table of summary[key], {group: {column: figure}}: by class or by overlap."""
    groups, rows = summary[key], []
    order = sorted(groups, key=lambda name: -(groups[name]['AP'] or 0)) if key == 'by_class' else groups
    for name in order:
        cells = {c: metric(summary, key, name, c) for c in groups[name]}
        cells |= {c: (cells[c], groups[name][c] or 0) for c in ('AP', 'recall50')}
        rows.append((esc(name), *cells.values()))
    return f'<h2 id="{key}">{title}</h2><p class="soft">{note}</p>{table(("", *cells), rows)}'


def show_speed(summary, clock, settings, weights):
    rows = [('images a second, with everything', metric(summary, 'images_per_s')),
            ('file of the weights', f'{os.path.getsize(weights) / 2 ** 20:.1f} MiB')]
    for part, what in (('network', 'network'), ('nms', 'decoding, NMS'), ('load', 'reading and resizing, beside it')):
        rows.append((what, f'{1000 * clock[part] / clock["images"]:.1f} ms an image'))
    device = settings['device']
    if device.startswith('cuda'):
        rows.append(('GPU memory, at most', f'{torch.cuda.max_memory_allocated(device) / 2 ** 20:.0f} MiB'))
        device = torch.cuda.get_device_name(device)
    elif sys.platform != 'win32':
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == 'darwin' else 10)
        rows.append(('memory of the process, at most', f'{peak:.0f} MiB'))
        device = f'CPU, threads: {torch.get_num_threads()}'
    rows.append(('on', f'{esc(device)}; {settings["dtype"]}; batch {settings["batch_size"]}'))
    return '<h2 id="speed">Speed and memory</h2>' + table(('', ''), rows)


def describe(saved, model, coco_gt, data, settings):
    """What was trained on what, and what it was evaluated on: two sentences of html."""
    config, text = saved.get('config', {}), ''
    if model is not None:
        network, parameters = saved.get('model_config', {}), sum(p.numel() for p in model.parameters())
        text = type(model).__name__ + ''.join(f', {key} {network[key]}' for key in ('scale', 'attn') if key in network)
        text += f', {parameters / 1e6:.2f} M parameters' if parameters else ''
        if 'train_data' in config:
            text += (f', trained on {config["train_data"]} at {"x".join(map(str, saved["imgsz"]))}, batches of '
                     f'{config["batch_size"]}; the weights are those of step {saved.get("step")} of '
                     f'{saved.get("total_steps", "an unknown number")}')
        text += f', commit {saved["commit"][:9]}' if saved.get('commit') else ''
        text += f'. Evaluated at {"x".join(map(str, ev.input_shape(model, settings["imgsz"])))} on '
    images, classes = len(coco_gt['images']), len(coco_gt['categories'])
    objects = sum(not a['iscrowd'] for a in coco_gt['annotations'])
    return esc(f'{text}{data}: {images} images, {objects} objects, {classes} classes.')


def draw_plots(coco_eval, coco_gt, detections, folder):
    """folder/precision_recall.png at IoU 0.5, of the classes with objects, and folder/confusion.png at score 0.25."""
    ap50s = {name: row['AP50'] for name, row in ev.per_class(coco_eval, coco_gt).items() if row['AP50'] is not None}
    curves = coco_eval.eval['precision'][0, :, :, 0, 2]                      # (101, K), of 100 detections
    draw_precision_recall(coco_eval.params.recThrs, curves[:, curves[0] > -1], list(ap50s), list(ap50s.values()),
                          os.path.join(folder, 'precision_recall.png'))
    names = [c['name'] for c in coco_gt['categories']]
    draw_confusion(ev.confusion(coco_gt, detections), names, os.path.join(folder, 'confusion.png'))


def make_page(folder, data, coco_gt, coco_eval, detections, summary, dataset=None, model=None, weights='', clock=None,
              settings=None):
    """
    Write folder/report.html of one evaluation, and print its path.

    data, coco_gt, coco_eval, detections   path of the ground truth; that; eval.run_cocoeval's result, of a table (n, 7)
    summary, dataset               eval.py's json line, with by_class and occlusion; the images, or None: no pictures
    model, weights, clock, settings   if not None: its file, predict_dataset's second result and its settings
    """
    saved, panels, title = {}, {}, 'detections'
    if model is not None:
        title = '/'.join(os.path.abspath(weights).split(os.sep)[-2:])
        log = os.path.join(os.path.dirname(weights), 'log.csv')
        panels = log_panels(log) if os.path.isfile(log) else {}
        saved = read_checkpoint(weights) if weights.endswith('.pt') else {}
        saved = saved if isinstance(saved.get('config'), dict) else {}                    # not a YOLOv8 file's
    elif dataset is not None and len(dataset) < len(coco_gt['images']):
        dataset = None
    title = esc(f'{title} on {os.path.basename(data.rstrip("/"))}')
    threshold = 0.25 if summary['best_f1']['score'] is None else summary['best_f1']['score']
    body = show_headline(summary)
    if panels:
        charts = ''.join(svg_chart(name, lines, 'epoch') for name, lines in panels.items())
        body += f'<h2 id="curves">Training curves</h2><div class="grid">{charts}</div>'
    body += show_threshold(coco_eval, summary)
    body += show_groups(summary, 'by_class', 'AP by class', 'Score, P, R and F1 are those of the class at its own best '
                        'threshold.')
    body += show_confusion(coco_gt, detections, threshold)
    body += show_groups(summary, 'occlusion', 'AP by overlap', 'Bins by the largest IoU of an object with any other. A '
                        'false alarm counts in every bin: compare bins by recall, models by AP.')
    if model is not None:
        body += show_speed(summary, clock, settings, weights)
        body += show_blocks(model, dataset, coco_gt, detections, settings, panels)
    body += show_mistakes(coco_gt, detections, threshold, dataset)
    if saved:
        rows = [(esc(key), f'<code>{esc(str(value))}</code>') for key, value in saved['config'].items()]
        body += f'<details id="settings"><summary>all settings of the training</summary>{table(("", ""), rows)}'
        body += '</details>'
    nav = ' '.join(f'<a href="#{key}">{name}</a>' for key, name in re.findall(r'<h2 id="(\w+)">(.*?)</h2>', body))
    with open(os.path.join(folder, 'report.html'), 'w', encoding='utf-8', errors='backslashreplace') as f:
        f.write('<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
                'content="width=device-width,initial-scale=1"><meta http-equiv="Content-Security-Policy" '
                'content="default-src \'none\'; img-src data:; style-src \'unsafe-inline\'">'
                f'<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>'
                f'<p>{describe(saved, model, coco_gt, data, settings)}</p><nav>{nav}</nav>{body}</body></html>\n')
    print(f.name)


def write_report(out_dir, data, images='', imgsz=0, batch_size=16, device='cpu'):
    """
    Evaluate out_dir/best.pt on `data` as eval.py does and write out_dir/report.html: for the end of training. -> '' or
    a sentence that says why there is none. An OSError while writing it is the caller's.
    """
    weights = os.path.join(out_dir, 'best.pt')
    settings = dict(imgsz=imgsz, batch_size=batch_size, rect=False, dtype='float32', device=str(device))
    try:
        model = ev.load_model(weights, str(device))
        dataset = DetectionDataset(data, images, names=model.names, frames=model.frames)           # as train.py did
        (detections,), clock = ev.predict_dataset(model, dataset, **settings, verbose=False)
    except InputError as e:
        return f'no report: {e}'
    coco_gt = dataset.coco()
    detections = detections[np.isin(detections[:, 6], [c['id'] for c in coco_gt['categories']])]
    coco_eval = ev.run_cocoeval(coco_gt, detections)
    summary = ev.coco_summary(coco_eval) | dict(
        images=clock['images'], images_per_s=round(clock['images'] / clock['all'], 2),
        by_class=ev.per_class(coco_eval, coco_gt), best_f1=ev.best_f1(coco_eval),
        occlusion=ev.under_occlusion(coco_gt, detections), duplicates=ev.duplicates(coco_gt, detections))
    make_page(out_dir, data, coco_gt, coco_eval, detections, summary, dataset, model, weights, clock, settings)
    return ''

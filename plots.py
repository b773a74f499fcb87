"""
Every picture of the repository: boxes on images, training curves, evaluation plots, attended tokens, the README's
drawings.

    python plots.py network                                                -> .github/network.png
    python plots.py block                                                  -> .github/block.png
    python plots.py long_range --results=results/half_hidden.csv --labels=data/half_hidden_test/train.json
                                                                           -> .github/long_range.png

The results are rows of `bench.py experiment`; the strip above them is the first image of --labels.

Images are drawn with Pillow, all else with matplotlib, which is imported when first needed and may be missing: curves
are then left out with a printed line, what was asked for by name raises InputError. A leaf: of ours it imports the
configurator alone, and it computes nothing that is not a pixel.
"""
import base64
import csv
import io
import json
import math
import os
import re
from html import escape as esc

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from configurator import InputError, configure

# settings
picture = ''                                     # network, block or long_range
out = ''                                         # file to write; '' is .github/PICTURE.png
results = ''                                     # long_range: csv with the columns arm, seed, AP
labels = 'data/long_range/train.json'            # long_range: COCO labels of the strip to show

PAD = (114, 114, 114)                            # the grey of letterboxed padding
ATTENTION, DENSE, PLAIN, LINE = '#d9482b', '#4c78a8', '#eef1f5', '#44505c'          # one colour for one meaning


# --- images with boxes -----------------------------------------------------------------------------------------------

def class_color(label):
    """A colour per class, (r, g, b): golden-angle steps around the hue circle, so that neighbours differ most."""
    return tuple(int(127.5 + 127.5 * math.cos(2 * math.pi * (label * 0.381966 + third / 3))) for third in (0, 2, 1))


def draw_boxes(image, boxes, labels, names, scores=None):
    """A copy of a PIL.Image with boxes (n, 4) xyxy in its pixels; above each its class, and score, on a plate."""
    image = image.convert('RGB')                                       # a copy also if it is RGB already
    draw, (W, H) = ImageDraw.Draw(image), image.size
    font = ImageFont.load_default(size=max(9, round(min(max(W, H) / 64, min(W, H) / 3))))         # of a strip a third
    width = max(1, round(max(W, H) / 500))
    boxes, labels = [[float(v) for v in box] for box in boxes], [int(label) for label in labels]
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=class_color(label), width=width)
    for n, ((x1, y1, _, _), label) in enumerate(zip(boxes, labels, strict=True)):     # last: no line crosses a word
        text = names[label] if label < len(names) else f'class {label}'
        if scores is not None:
            text += f' {float(scores[n]):.2f}'
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        w, h, (r, g, b) = right - left + 4, bottom - top + 3, class_color(label)
        x, y = min(max(x1, 0), max(W - w, 0)), y1 - h if y1 >= h else max(y1, 0)      # above the box, or just inside
        draw.rectangle((x, y, x + w - 1, y + h - 1), fill=(r, g, b))
        ink = 'black' if 0.299 * r + 0.587 * g + 0.114 * b > 110 else 'white'
        draw.text((x + 2 - left, y + 1 - top), text, fill=ink, font=font)
    return image


def image_grid(samples, names, columns=4):
    """[((3, h, w) uint8 of one size, boxes (n, 4), labels (n,))] -> a PIL.Image of all, enlarged until readable."""
    _, h, w = samples[0][0].shape
    zoom = max(1, round(480 / w))
    page = Image.new('RGB', (min(columns, len(samples)) * w * zoom, -(-len(samples) // columns) * h * zoom))
    for n, (image, boxes, labels) in enumerate(samples):
        image = Image.fromarray(np.ascontiguousarray(np.asarray(image).transpose(1, 2, 0)))
        large = image.resize((w * zoom, h * zoom), Image.NEAREST)
        large = draw_boxes(large, np.asarray(boxes) * zoom, labels, names)
        page.paste(large, (n % columns * w * zoom, n // columns * h * zoom))
    return page


def save_image(page, path):
    """Write a PIL.Image, make its folder, print the path. Raises InputError where that cannot be done."""
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        page.save(path)
    except (OSError, ValueError) as e:
        raise InputError(f'cannot write {path} ({e}): choose another file') from None
    print(path)


def shade_cells(image, strength, colour):
    """Lay a colour over the cells of an image, as strongly as strength (h, w) in 0..1 says."""
    mask = Image.fromarray((strength * 255).astype(np.uint8)).resize(image.size, Image.NEAREST)
    return Image.composite(Image.new('RGB', image.size, colour), image, mask)


def draw_tokens(image, corner, scale, shape, stride, selected, heat, focus, row, names, path):
    """
    What a block that selects tokens looks at, on the network's input with its padding, at the image's own resolution.
    Left: the selected cells stay light. Right, or below where images are wide, with a focus: in red, how much that cell
    (white) attends to each.

    image    PIL.Image, before the letterbox; `scale` resized it and `corner` (left, top) placed it, in input pixels
    shape    (h, w) of the block's map, of `stride` input pixels a cell; cells count row by row
    selected (k,) cell indices; heat (k,) their attention weights, focus a cell index, both None without an object
    row      (6,) the object: x1, y1, x2, y2 in the image's pixels, score, class; or None
    """
    h, w = shape
    canvas = Image.new('RGB', (round(w * stride / scale), round(h * stride / scale)), PAD)
    left, top = round(corner[0] / scale), round(corner[1] / scale)
    canvas.paste(image, (left, top))
    dark = np.full(h * w, 0.7)
    dark[selected] = 0
    panels = [shade_cells(canvas, dark.reshape(h, w), 'black')]
    if focus is not None:
        red = np.zeros(h * w)
        red[selected] = 0.8 * heat / heat.max()
        panel = shade_cells(shade_cells(canvas, np.full((h, w), 0.4), 'black'), red.reshape(h, w), (255, 40, 0))
        if row is not None:
            panel = draw_boxes(panel, [row[:4] + np.array((left, top, left, top))], row[5:], names, row[4:5])
        side = stride / scale
        x, y = focus % w * side, focus // w * side
        width = max(2, round(max(canvas.size) / 400))
        ImageDraw.Draw(panel).rectangle((x, y, x + side, y + side), outline='white', width=width)
        panels.append(panel)
    (W, H), n = canvas.size, len(panels)
    dx, dy = (0, H) if W > 2 * H else (W, 0)                           # from one panel to the next
    page = Image.new('RGB', (W + (n - 1) * dx, H + (n - 1) * dy))
    for i, panel in enumerate(panels):
        page.paste(panel, (i * dx, i * dy))
    page.save(path, quality=92)


# --- training and evaluation -----------------------------------------------------------------------------------------

def new_figure(width, height, layout='constrained'):
    """A matplotlib Figure of width x height inches, without pyplot: no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('this picture needs matplotlib: pip install matplotlib') from None
    return Figure((width, height), layout=layout)


def log_panels(path):
    """log.csv -> {title of a panel: {label: [(epoch, value)]}}, without empty cells and columns, and broken rows."""
    with open(path, newline='', encoding='utf-8') as f:
        rows = [row for row in csv.DictReader(f) if row.get('epoch') and None not in row.values()]
    panels = {title: {} for title in ('losses', 'AP', 'learning rate', 'gates', '|block(x) - x| / |x|', 'tokens kept')}
    for column in rows[0] if rows else ():
        points = [(float(row['epoch']), float(row[column])) for row in rows if row[column]]            # (x, y)
        if points and column not in ('step', 'epoch', 'objects', 'grad_norm'):
            title = ('AP' if column.startswith('AP') else 'learning rate' if column == 'lr' else
                     'gates' if column.startswith('gate_') else
                     '|block(x) - x| / |x|' if column.startswith('share_') else
                     'tokens kept' if column.startswith('kept_') else 'losses')
            panels[title][re.sub('^(gate|share|kept)_', '', column)] = points
    return {title: lines for title, lines in panels.items() if lines}


def draw_curves(log_path, out_path, warmup_epochs, no_aug_start, title=''):
    """
    log.csv -> a png: losses, AP, learning rate, and of the attention blocks the gates and what they add to their input.
    Dotted lines mark the epochs at which warm-up ends and strong augmentation stops.
    """
    panels = log_panels(log_path)
    try:
        figure = new_figure(max(4.2 * len(panels), 4.2), 3.6)
    except InputError as e:
        print(f'no {out_path}: {e}')
        return
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for ax, (name, lines) in zip(axes, panels.items(), strict=False):
        for label, points in lines.items():
            ax.plot([x for x, _ in points], [y for _, y in points], lw=1.3, label=label,
                    marker='.' if len(points) < 50 else '')
        for edge in (warmup_epochs, no_aug_start):
            ax.axvline(edge, color='0.7', lw=1, ls=':', zorder=0)
        ax.set(title=name, xlabel='epoch')
        ax.grid(alpha=0.3)
        if len(lines) > 1:
            ax.legend(fontsize=9)
    if title:
        figure.suptitle(title)
    figure.savefig(out_path, dpi=90)


def plain(text):
    """Without matplotlib's mathematics between dollar signs."""
    return text.replace('$', r'\$')


def draw_precision_recall(recall_thresholds, curves, names, ap50s, path):
    """curves (101, K): precision at each recall, at IoU 0.5; names and ap50s (K,) of the classes that have objects."""
    figure = new_figure(7, 5)
    ax = figure.subplots()
    for name, ap50, curve in zip(names, ap50s, np.asarray(curves).T, strict=True):
        style = dict(label=plain(f'{name} {ap50:.3f}')) if len(names) <= 12 else dict(color='0.8')
        ax.plot(recall_thresholds, curve, lw=1.2, **style)
    if len(names):
        ax.plot(recall_thresholds, np.mean(curves, 1), 'k', lw=2.5, label=f'all {np.mean(ap50s):.3f}')
        ax.legend(title='AP50', loc='lower left')
    ax.set(xlabel='recall', ylabel='precision', xlim=(0, 1), ylim=(0, 1.02), title='precision and recall at IoU 0.5')
    figure.savefig(path, dpi=120)


def draw_confusion(matrix, names, path):
    """matrix (K + 1, K + 1) counts, row true, column predicted, the last of each background; shaded by row share."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)       # of what is there, how much is predicted as what
    side = min(4 + 0.35 * len(names), 24)
    figure = new_figure(side + 1, side)
    ax = figure.subplots()
    ax.imshow(share, cmap='Blues', vmin=0, vmax=1)
    ticks = [*map(plain, names), 'background']
    ax.set_xticks(range(len(ticks)), ticks, rotation=90)
    ax.set_yticks(range(len(ticks)), ticks)
    if len(names) <= 20:                                               # more would not be legible
        for i, j in np.argwhere(matrix):
            ink = 'white' if share[i, j] > 0.5 else 'black'
            ax.text(j, i, matrix[i, j], ha='center', va='center', color=ink, fontsize=9)
    ax.set(xlabel='predicted', ylabel='true', title='score at least 0.25, IoU at least 0.5')
    figure.savefig(path, dpi=120)


def draw_attention_cost(rows, path, title=''):
    """rows: dicts with N (tokens), level, and times in columns 'NAME ms' -> time against tokens, both logarithmic."""
    figure = new_figure(7, 4.5)
    ax = figure.subplots()
    names = [column.removesuffix(' ms') for column in rows[0] if column.endswith(' ms')]
    levels = list(dict.fromkeys(row['level'] for row in rows))
    for level, style in zip(levels, ('-', '--', ':'), strict=False):
        for i, name in enumerate(names):
            points = sorted((row['N'], row[f'{name} ms']) for row in rows if row['level'] == level)
            ax.plot([x for x, _ in points], [y for _, y in points], style, color=f'C{i}', marker='.',
                    label=f'{name} {level}')
    ax.set(xscale='log', yscale='log', xlabel='tokens N', ylabel='ms', title=title)
    ax.grid(alpha=0.3, which='both')
    ax.legend(ncols=max(len(levels), 1))
    figure.savefig(path, dpi=100)


# --- svg, for report.py ----------------------------------------------------------------------------------------------

ALL = 'all classes'                              # the bold line of a chart


def nice_ticks(low, high):
    """Three to six round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= 5)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def svg_chart(title, lines, x_label, x_range=None, y_range=None, marks=()):
    """
    A line chart as svg. lines: {label: [(x, y)]}, up to eight with colours and a legend, more in grey; the line named
    ALL is bold. marks: [(x, y, text)], points to point out.
    """
    lines = {label: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
             for label, points in lines.items()}
    xs, ys = zip(*[point for points in lines.values() for point in points], strict=True) if any(lines.values()) else (
        (0.0,), (0.0,))
    (x0, x1), (y0, y1) = x_range or (min(xs), max(xs)), y_range or (min(0.0, *ys), max(ys))
    x1, y1 = x1 + (x1 == x0), y1 + (y1 == y0)
    W, H, left, right, top, bottom = 360, 220, 44, 10, 10, 34

    def at(x, y):
        return left + (x - x0) / (x1 - x0) * (W - left - right), H - bottom - (y - y0) / (y1 - y0) * (H - top - bottom)

    svg = []
    for t in nice_ticks(y0, y1):
        y = at(x0, t)[1]
        svg.append(f'<path d="M{left} {y:.1f}H{W - right}" stroke="var(--line)"/>'
                   f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{t:g}</text>')
    svg += [f'<text x="{at(t, y0)[0]:.1f}" y="{H - bottom + 15}" text-anchor="middle">{t:g}</text>'
            for t in nice_ticks(x0, x1)]
    svg.append(f'<text x="{(W + left) / 2}" y="{H - 4}" text-anchor="middle">{esc(x_label)}</text>')
    few = len(lines) <= 8 + (ALL in lines)
    colours = {label: 'var(--ink)' if label == ALL else f'var(--c{i})' if few else 'var(--line)'
               for i, label in enumerate(lines)}
    for label, points in lines.items():
        path = ' '.join(f'{x:.1f},{y:.1f}' for x, y in (at(*point) for point in points))
        svg.append(f'<polyline points="{path}" stroke="{colours[label]}" stroke-width="{2.6 if label == ALL else 1.6}">'
                   f'<title>{esc(label)}</title></polyline>')
        if len(points) == 1:                                         # a line of one point is not seen
            x, y = at(*points[0])
            svg.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colours[label]}"/>')
    for x, y, text in marks:
        px, py = at(x, y)
        anchor, shift = ('end', -6) if px > W / 2 else ('start', 6)
        svg.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="var(--ink)"/><text class="point" '
                   f'x="{px + shift:.1f}" y="{min(py + 18, H - bottom - 6):.1f}" text-anchor="{anchor}">'
                   f'{esc(text)}</text>')
    legend = ''.join(f'<span><i style="background:{colours[label]}"></i>{esc(label)}</span>'
                     for label in lines if few or label == ALL)
    alt = f'{title}: {", ".join(list(lines)[:8])} over {x_label}'
    return (f'<figure><h3>{esc(title)}</h3><svg class="chart" viewBox="0 0 {W} {H}" role="img" aria-label="{esc(alt)}">'
            f'{"".join(svg)}</svg><div class="legend">{legend}</div></figure>')


def data_uri(image, kind='JPEG'):
    stream = io.BytesIO()
    image.save(stream, kind, **dict(quality=76) if kind == 'JPEG' else {})
    return f'data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}'


def svg_picture(content, size, boxes, alt, words=12):
    """
    An svg of `size` (w, h): content, svg already, under boxes [(x1, y1, x2, y2, class of css, text)]. The first `words`
    false and missed ones have their text written beside them, all show it under the mouse.
    """
    (w, h), svg, written = size, [content], []
    font = max(w, h) / 27
    for x1, y1, x2, y2, kind, text in boxes:
        svg.append(f'<rect class="mark {kind}" x="{x1:.1f}" y="{y1:.1f}" width="{max(x2 - x1, 1):.1f}" '
                   f'height="{max(y2 - y1, 1):.1f}"><title>{esc(text)}</title></rect>')
        if kind in ('false', 'missed') and len(written) < words:
            x, anchor = (min(x2, w), 'end') if x1 > 0.7 * w else (max(x1, 0), 'start')
            y = y1 - font * 0.25 if y1 > 1.25 * font else y1 + font
            written.append(f'<text class="word {kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" '
                           f'font-size="{font:.1f}" stroke-width="{font / 5:.1f}">{esc(text)}</text>')
    return f'<svg viewBox="0 0 {w:.0f} {h:.0f}" role="img" aria-label="{esc(alt)}">{"".join(svg + written)}</svg>'


def svg_cells(strength, colour, size):
    """strength (h, w) in 0..1 as an svg image of one colour, stretched over `size` (w, h)."""
    pixels = np.zeros((*strength.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = colour, np.round(255 * strength)
    return (f'<image width="{size[0]:.1f}" height="{size[1]:.1f}" preserveAspectRatio="none" '
            f'style="image-rendering:pixelated" href="{data_uri(Image.fromarray(pixels), "PNG")}"/>')


# --- the README's drawings: 10 inches wide, 1,600 px, legible at 800 -------------------------------------------------

def drawing(height):
    """A figure 10 inches wide and one axes over all of it, 100 units wide: a unit is a tenth of an inch."""
    figure = new_figure(10, height / 10, layout=None)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, 100), ylim=(0, height))
    ax.axis('off')
    return figure, ax


def add_box(ax, x, y, w, h, text='', small='', face=PLAIN, edge=LINE, ink='black', layer=2):
    """A rounded box centred on (x, y), a bold line in it and a smaller one below."""
    from matplotlib.patches import FancyBboxPatch
    style = 'round,pad=0,rounding_size=0.8'
    ax.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, style, fc=face, ec=edge, lw=1.2, zorder=layer))
    up = 1.2 if small else 0
    ax.text(x, y + up, text, ha='center', va='center', fontsize=12, weight='bold', color=ink, zorder=layer)
    ax.text(x, y - 1.4, small, ha='center', va='center', fontsize=10.5, color=ink, zorder=layer)


def add_arrow(ax, points, label='', at=(0, 0), ink=LINE):
    """An arrow along points [(x, y)]; the label starts at (x, y)."""
    x, y = np.array(points, float).T
    ax.plot(x[:-1], y[:-1], color=ink, lw=1.7, zorder=1, solid_joinstyle='miter')
    style = dict(arrowstyle='-|>,head_length=0.5,head_width=0.25', color=ink, lw=1.7, shrinkA=0, shrinkB=0)
    ax.annotate('', points[-1], points[-2], arrowprops=style, zorder=1)
    ax.text(*at, label, fontsize=10.5, va='center', color=ink)


def draw_network(path):
    """The network of model.HSVDET with attn='-SS'. The columns are its parts, the rows its levels."""
    figure, ax = drawing(49)
    stage, fpn, enriched, pan, head = 16.5, 37, 54.5, 74, 92           # x of the columns
    p5, p4, p3, p2 = 38, 26.5, 15, 5                                 # y of the rows
    for left, right, bottom, name in ((7.6, 25.4, 0.6, 'backbone'), (28.1, 63.4, 10, 'FPN, top-down'),
                                      (65.5, 82.5, 10, 'PAN, bottom-up'), (84.9, 99.1, 10, 'head')):
        add_box(ax, (left + right) / 2, (bottom + 48) / 2, right - left, 48 - bottom, face='#f7f9fb', edge='#d5dbe2',
                layer=0)
        ax.text((left + right) / 2, 45.3, name, ha='center', va='center', fontsize=13, color=LINE)
    for y, level in ((p5, 'P5\n1/32'), (p4, 'P4\n1/16'), (p3, 'P3\n1/8')):
        ax.text(4, y, level, ha='center', va='center', fontsize=12, color=LINE, linespacing=1.4)
    ax.text(0.5, p2, 'image', va='center', fontsize=12, color=LINE)
    # 1) the boxes
    for x, y, name, small in ((stage, p2, 'stem, stage 2', '1/4'), (stage, p3, 'stage 3', 'C2f'),
                              (stage, p4, 'stage 4', 'C2f'), (stage, p5, 'stage 5', 'C2f, SPPF'),
                              (fpn, p4, 'fpn 4', 'concat, C2f'), (enriched, p3, 'fpn 3', 'concat, C2f'),
                              (pan, p4, 'pan 4', 'concat, C2f'), (pan, p5, 'pan 5', 'concat, C2f')):
        add_box(ax, x, y, 14.8, 6.2, name, small)
    for x, y, name in ((fpn, p5, 'block 5'), (enriched, p4, 'block 4')):
        add_box(ax, x, y, 14.8, 6.2, name, 'sparse attention', face=ATTENTION, edge=ATTENTION, ink='white')
    add_box(ax, head, (p3 + p5) / 2, 11.6, p5 - p3 + 6.2)
    for y, name in ((29.5, 'Detect'), (26, 'at each level'), (23, 'box 4 x 16'), (20.5, 'class K')):
        weight, size = ('bold', 12) if name == 'Detect' else ('normal', 10.5)
        ax.text(head, y, name, ha='center', va='center', fontsize=size, weight=weight, zorder=3)
    # 2) along the levels
    add_arrow(ax, [(6, p2), (9.1, p2)])
    for y, first, *rest in ((p5, stage, fpn, pan, head + 1.6), (p4, stage, fpn, enriched, pan, head + 1.6),
                            (p3, stage, enriched, head + 1.6)):
        for x in rest:
            add_arrow(ax, [(first + 7.4, y), (x - 7.4, y)])
            first = x
    # 3) between them
    for x, below, above in ((stage, p2, p3), (stage, p3, p4), (stage, p4, p5), (pan, p4, p5)):
        add_arrow(ax, [(x, below + 3.1), (x, above - 3.1)], 'conv /2', (x + 1, (below + above) / 2))
    add_arrow(ax, [(pan, p3), (pan, p4 - 3.1)], 'conv /2', (pan + 1, (p3 + p4) / 2))
    for x, above, below in ((fpn, p5, p4), (enriched, p4, p3)):
        add_arrow(ax, [(x, above - 3.1), (x, below + 3.1)], 'up x2', (x + 1, (above + below) / 2))
    add_arrow(ax, [(head, p3 - 3.1), (head, p2 + 2)])
    ax.text(head, p2, 'decode, NMS', ha='center', va='center', fontsize=12, color=LINE)
    add_box(ax, 29.6, p2, 2.6, 2.6, face=ATTENTION, edge=ATTENTION)
    ax.text(32, p2, 'gated sparse global block: the k most salient tokens see each other', va='center', fontsize=10.5)
    figure.savefig(path, dpi=160)


def add_cells(ax, x, y, side, colours, edges='white'):
    """A grid of square cells centred on (x, y), colours (h, w); returns the cells' centres (h, w, 2)."""
    from matplotlib.patches import Rectangle
    h, w = len(colours), len(colours[0])
    centres = np.stack(np.meshgrid(np.arange(w) - (w - 1) / 2, (h - 1) / 2 - np.arange(h)), -1) * side + (x, y)
    for i, j in np.ndindex(h, w):
        corner = centres[i, j] - side / 2
        ax.add_patch(Rectangle(corner, side, side, fc=colours[i][j], ec=edges, lw=1, zorder=1))
    return centres


def draw_block(path):
    """The four steps of sparse_attention.py on 36 tokens, two objects far apart, of which k = 5 attend."""
    figure, ax = drawing(32.5)
    titles = '1  select', '2  attend', '3  scatter', '4  gate'
    captions = ('importance |x|² of every token;\nkeep the k largest',
                'A = softmax(LN(q) LN(k)ᵀ / √c)\namong the selected tokens',
                'v everywhere, A v if selected;\nthen one linear map, out',
                'y = x + gate · block(x);\nthe gate starts at 0')
    middle, y, side = [12.5, 37.5, 62.5, 87.5], 17.3, 2.6
    for i, (x, title, caption) in enumerate(zip(middle, titles, captions, strict=True)):
        ax.text(x, 29.3, title, ha='center', va='center', fontsize=14, weight='bold', color=LINE)
        ax.text(x, 4.2, caption, ha='center', va='center', fontsize=10.5, linespacing=1.5)
        if i:
            add_arrow(ax, [(x - 15, y), (x - 11.4, y)])
    # importance: two blobs on a little noise
    rows, columns = np.mgrid[:6, :6]
    importance = 0.12 + 0.1 * np.random.default_rng(1).random((6, 6))
    importance += 0.7 * np.exp(-((rows - 1) ** 2 + (columns - 1.2) ** 2) / 0.9)
    importance += 0.65 * np.exp(-((rows - 4.2) ** 2 + (columns - 4) ** 2) / 0.8)
    chosen = importance >= np.sort(importance.ravel())[-5]                                           # (6, 6)
    grey = [[str(0.97 - 0.75 * v) for v in row] for row in importance]
    empty = [[ATTENTION if c else PLAIN for c in row] for row in chosen]
    mixed = [[ATTENTION if c else '#b9cde4' for c in row] for row in chosen]
    # 1) select
    for cx, cy in add_cells(ax, middle[0], y, side, grey)[chosen]:
        ax.plot(cx + side / 2 * np.array((-1, 1, 1, -1, -1)), cy + side / 2 * np.array((-1, -1, 1, 1, -1)),
                color=ATTENTION, lw=2.4, zorder=3, solid_joinstyle='miter')
    # 2) attend: every selected token with every other
    nodes = add_cells(ax, middle[1], y, side, empty)[chosen]                                         # (k, 2)
    for a, b in np.argwhere(np.triu(np.ones((len(nodes), len(nodes))), 1)):
        ax.plot(*nodes[[a, b]].T, color='black', lw=1.2, marker='o', ms=4, zorder=3)
    # 3) scatter
    add_cells(ax, middle[2], y, side, mixed)
    # 4) gate: x + gate * block(x)
    add_cells(ax, middle[3] - 7.2, y, 1.2, grey)
    add_cells(ax, middle[3] + 7.2, y, 1.2, mixed)
    ax.text(middle[3], y, '+ gate ·', ha='center', va='center', fontsize=11)
    for x, name in ((middle[3] - 7.2, 'x'), (middle[3] + 7.2, 'block(x)')):
        ax.text(x, y - 5.6, name, ha='center', va='center', fontsize=11)
    figure.savefig(path, dpi=160)


def draw_long_range(image, boxes, labels, names, bars, path):
    """
    A strip of prepare/long_range.py, its two ends enlarged, and below it AP by network, the best first.

    image PIL.Image; boxes (n, 4) xyxy in its pixels, the cue first; labels (n,); bars {network: [AP of each seed]}
    """
    tall = 2.6 + 0.29 * len(bars)
    figure = new_figure(10, tall, layout=None)
    W, H = image.size
    cut = 10 * H                                                       # columns of an enlarged end
    boxes = np.asarray(boxes, float)
    last = int(np.argmax(boxes[:, 2]))
    right = int(np.clip(boxes[last, 2] + H / 2 - cut, 0, W - cut))

    def add_strip(left, top, width, first, columns, title):
        """Columns of the image as an axes, title above; left and width as shares, top in inches from the top."""
        high = 10 * width * H / columns
        ax = figure.add_axes((left, 1 - (top + high) / tall, width, high / tall))
        ax.imshow(image.crop((first, 0, first + columns, H)), extent=(first, first + columns, H, 0), aspect='auto')
        ax.set_title(title, fontsize=11)
        ax.set(xticks=[], yticks=[])
        return ax

    whole = add_strip(0.02, 0.35, 0.96, 0, W, f'one image, {W} x {H} px')
    for left, first, n in ((0.02, 0, 0), (0.51, right, last)):
        middle = boxes[n, [0, 2]].mean()
        away = f', {middle - boxes[0, [0, 2]].mean():,.0f} px away' if n else ''
        ax = add_strip(left, 1.05, 0.47, first, cut, f'{names[labels[n]]}{away}')
        ax.spines[:].set(color=ATTENTION, linewidth=2)
        whole.axvspan(first, first + cut, fill=False, ec=ATTENTION, lw=2, clip_on=False)           # enlarged below
    ax = figure.add_axes((0.24, 0.5 / tall, 0.7, 0.29 * len(bars) / tall))
    bars = dict(sorted(bars.items(), key=lambda bar: -np.mean(bar[1])))
    for i, values in enumerate(bars.values()):
        ax.plot(values, [i] * len(values), 'o', ms=6, color=DENSE, alpha=0.6, clip_on=False)
        ax.plot(np.mean(values), i, '|', ms=14, mew=2, color=LINE, clip_on=False)
    ax.set_yticks(range(len(bars)), bars, fontsize=11)
    ax.set(ylim=(len(bars) - 0.5, -0.5))
    ax.grid(axis='x', color=PLAIN)
    ax.set_axisbelow(True)
    ax.set_xlabel('AP of the discs: dots are seeds, lines their means', fontsize=11)
    ax.spines[['top', 'right', 'left']].set_visible(False)
    ax.tick_params(axis='y', length=0)
    figure.savefig(path, dpi=160)


def read_results(path):
    """csv with the columns arm, seed, AP -> {arm: [AP of each seed]}. Raises InputError."""
    bars = {}
    try:
        with open(path, newline='', encoding='utf-8') as f:
            for row in csv.DictReader(f):
                bars.setdefault(row['arm'], []).append(float(row['AP']))
    except OSError as e:
        raise InputError(f'--results={path}: {e.strerror}, name a csv with columns arm, seed, AP') from None
    except (KeyError, ValueError, TypeError) as e:
        raise InputError(f'{path}: each row needs arm, seed and a number under AP ({e})') from None
    if not bars:
        raise InputError(f'{path} has no rows: write one for each arm and seed')
    return bars


def first_image(path):
    """COCO labels as prepare/ writes them -> image, boxes (n, 4) xyxy, labels (n,), names of the first image."""
    try:
        with open(path, encoding='utf-8') as f:
            coco = json.load(f)
        entry, split = coco['images'][0], os.path.splitext(os.path.basename(path))[0]
        image = Image.open(os.path.join(os.path.dirname(path), 'images', split, entry['file_name'])).convert('RGB')
    except OSError as e:
        raise InputError(f'{e.filename}: {e.strerror}, make it: python -m prepare.long_range') from None
    found = [a for a in coco['annotations'] if a['image_id'] == entry['id']]
    boxes = np.array([a['bbox'] for a in found], float)
    boxes[:, 2:] += boxes[:, :2]
    ids = [c['id'] for c in coco['categories']]
    return image, boxes, [ids.index(a['category_id']) for a in found], [c['name'] for c in coco['categories']]


def main():
    path = out or f'.github/{picture}.png'
    if picture == 'network':
        draw_network(path)
    elif picture == 'block':
        draw_block(path)
    elif picture == 'long_range':
        draw_long_range(*first_image(labels), read_results(results), path)
    else:
        raise InputError(f'python plots.py network, block or long_range, not {picture!r}')
    print(path)


if __name__ == '__main__':
    configure(globals(), positional='picture')
    main()

"""
Pictures and charts: boxes on images, training curves, evaluation plots, selected tokens, parts of the report. (The
README's drawings are made by prepare/drawings.py and benches/clip.py.)

Images are drawn with Pillow, charts with matplotlib, which is imported when first needed. Without it training curves
are skipped with a printed line; a picture that was asked for by name raises InputError. Of ours this file imports only
configurator.py.
"""
import base64
import csv
import io
import math
import os
import re
from html import escape as esc

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from configurator import InputError

PAD = (114, 114, 114)                            # the grey of letterboxed padding


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


def shade_unselected(image, shape, stride, scale, corner, selected):
    """A video frame with all cells but the selected ones darkened; the other arguments are those of draw_tokens."""
    dark = np.full(shape[0] * shape[1], 180, np.uint8)                                # (N,) of 255
    dark[selected] = 0
    left, top = np.array(corner) / scale
    h, w = np.array(shape) * stride / scale                                           # in image pixels
    mask = Image.fromarray(dark.reshape(shape)).resize((round(w), round(h)), Image.NEAREST)
    mask = mask.crop((round(left), round(top), round(left) + image.width, round(top) + image.height))
    return Image.composite(Image.new('RGB', image.size), image, mask)


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
    titles = {'AP': 'AP', 'lr': 'learning rate', 'gate_': 'gates', 'share_': '|block(x) - x| / |x|',
              'kept_': 'tokens kept'}                                  # by the beginning of a column's name
    panels = {title: {} for title in ('losses', *titles.values())}
    for column in rows[0] if rows else ():
        points = [(float(row['epoch']), float(row[column])) for row in rows if row[column]]            # (x, y)
        if points and column not in ('step', 'epoch', 'objects', 'grad_norm'):
            title = next((title for start, title in titles.items() if column.startswith(start)), 'losses')
            panels[title][re.sub('^(gate|share|kept)_', '', column)] = points
    return {title: lines for title, lines in panels.items() if lines}


def draw_curves(log_path, out_path, warmup_epochs, no_aug_start):
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
    xs, ys = zip(*(sum(lines.values(), []) or [(0.0, 0.0)]), strict=True)
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

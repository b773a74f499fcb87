"""
The README's drawings: 10 inches wide, 1,600 px, legible at 800.

    python -m prepare.drawings network                                     -> .github/network.png
    python -m prepare.drawings block                                       -> .github/block.png
    python -m prepare.drawings long_range --results=results/half_hidden.csv --labels=data/half_hidden_test/train.json
                                                                           -> .github/long_range.png

The results are rows of `bench.py experiment`; the strip above them is the first image of --labels.
"""
import csv
import json
import os

import numpy as np
from PIL import Image

from configurator import InputError, configure
from plots import new_figure

# settings
picture = ''                                     # network, block or long_range
out = ''                                         # file to write; '' is .github/PICTURE.png
results = ''                                     # long_range: csv with the columns arm, seed, AP
labels = 'data/long_range/train.json'            # long_range: COCO labels of the strip to show

ATTENTION, DENSE, PLAIN, LINE = '#d9482b', '#4c78a8', '#eef1f5', '#44505c'          # one colour for one meaning


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
        raise InputError(f'python -m prepare.drawings network, block or long_range, not {picture!r}')
    print(path)


if __name__ == '__main__':
    configure(globals(), positional='picture')
    main()

"""report.html: its figures are eval.py's, it needs nothing but itself, and odd data does not break it."""
import html.parser
import json
import math
import os
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eval as ev
import report
from data import DetectionDataset
from model import HSVDET, HSVDETConfig
from plots import nice_ticks, svg_chart

NASTY = '<script>alert("1")</script> & co'
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


class Page(html.parser.HTMLParser):
    """figures: {place in the json line: (exact value, what is shown)}; tags; links: every href and src."""

    def __init__(self, path):
        super().__init__()
        self.figures, self.tags, self.links, self.ids, self.open, self.key = {}, [], [], [], [], None
        with open(path, encoding='utf-8') as f:
            self.text = f.read()
        self.feed(self.text)
        assert not self.open, f'not closed: {self.open}'

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.links += [attributes[name] for name in ('href', 'src') if name in attributes]
        self.ids.append(attributes.get('id'))
        if tag == 'data':
            self.key = attributes['data-key'], attributes['value']
        if tag not in ('meta', 'br'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.key:
            self.figures[self.key[0]] = self.key[1], text
            self.key = None


def leaves(value, place=()):
    """The json line -> {place: number}"""
    if not isinstance(value, dict):
        return {'/'.join(place): value}
    return {k: v for key, part in value.items() for k, v in leaves(part, (*place, key)).items()}


def make_set(path, sizes, objects, names, mode='RGB'):
    """Noise images of `sizes` with objects (row, label, [x, y, w, h]) -> the path of their COCO json."""
    rng = np.random.default_rng(0)
    os.makedirs(path / 'images')
    for i, (w, h) in enumerate(sizes):
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).convert(mode)
        image.save(path / 'images' / f'{i}&.png', compress_level=0)
    images = [dict(id=5 + i, file_name=f'{i}&.png', width=w, height=h) for i, (w, h) in enumerate(sizes)]
    annotations = [dict(id=n + 1, image_id=5 + row, category_id=label + 1, bbox=box, area=box[2] * box[3], iscrowd=0)
                   for n, (row, label, box) in enumerate(objects)]
    categories = [dict(id=label + 1, name=name) for label, name in enumerate(names)]
    (path / 'val.json').write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return str(path / 'val.json')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """
    Four images, weights with two blocks, and their log. The objects are the best detections of these weights, so that
    AP is high with the blocks and lower without them.
    """
    path, sizes, names = tmp_path_factory.mktemp('report'), [(100, 80), (80, 100), (96, 96), (64, 120)], ['cat', NASTY]
    make_set(path, sizes, [(row, 0, [0, 0, 9, 9]) for row in range(4)], names)
    torch.manual_seed(0)
    model = HSVDET(HSVDETConfig('n', 2, '-SS', k=0.5))
    for block in model.blocks().values():
        torch.nn.init.constant_(block.gate, 3.0)
    for layer in model.detect_head.cls:                              # an untrained head is sure of nothing
        torch.nn.init.constant_(layer[-1].bias, -1.0)
    for layer in model.modules():                                    # and its features fade without BatchNorm
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(torch.rand(4, 3, 64, 64))
    model.imgsz, model.names = (64, 64), names
    dataset = DetectionDataset(str(path / 'val.json'))
    (table,), _ = ev.predict_dataset(model, dataset, 64, ious=(0.3,), verbose=False)
    objects = [(int(image) - 5, int(label) - 1, box) for i in range(5, 9)
               for image, *box, _, label in table[table[:, 0] == i][:4].tolist()]
    shutil.rmtree(path / 'images')
    make_set(path, sizes, objects, names)
    config = dict(train_data='a<b>.json', epochs=3, batch_size=4, lr=0.1)
    model.save(path / 'best.pt', config=config, step=7, commit='0123456789abcdef')
    (path / 'log.csv').write_text('step,epoch,lr,box,gate_p4,gate_p5,share_p4,share_p5,AP\n1,0.5,0.1,nan,0.1,0.2,,,\n'
                                  '2,1,0.2,3,0.2,0.3,0.25,0.125,0.5\n')
    return path


def run(monkeypatch, capsys, **settings):
    """python eval.py --report=True --setting=value ... -> the json of its last line."""
    for name, value in dict(settings, report=True).items():
        monkeypatch.setattr(ev, name, value)
    ev.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def check_page(path):
    """What holds for every page."""
    page = Page(path)
    assert os.path.getsize(path) < 5 * 2 ** 20
    assert all(link.startswith(('#', 'data:image/')) for link in page.links) and 'url(' not in page.text
    assert {link[1:] for link in page.links if link.startswith('#')} <= set(page.ids), 'a link leads nowhere'
    tags = {tag for tag, _ in page.tags}
    assert not tags & {'script', 'link', 'iframe', 'img'} and "default-src 'none'" in page.text
    for tag, attributes in page.tags:
        if tag == 'svg' and 'aria-hidden' not in attributes:
            assert attributes['role'] == 'img' and attributes['aria-label']
    numbers = re.findall(r'(?:points|x|y|width|height|r|cx|cy|d)="([^"]*)"', page.text)
    assert not any(word in number for number in numbers for word in ('nan', 'inf'))
    return page


def test_every_figure_is_that_of_the_json_line(folder, monkeypatch, capsys):
    data, weights = str(folder / 'val.json'), str(folder / 'best.pt')
    line = run(monkeypatch, capsys, weights=weights, data=data, conf=0.05, batch_size=2)
    page = check_page(folder / 'report.html')
    numbers = leaves(line)
    del numbers['images']
    assert numbers.keys() == page.figures.keys() and line['best_f1']['score'] is not None
    for key, (exact, shown) in page.figures.items():
        value = numbers[key]
        assert exact == ('' if value is None else repr(value)), key
        assert shown == ('–' if value is None else str(value) if isinstance(value, int) else f'{value:.3f}'), key
    assert 'a&lt;b&gt;.json' in page.text and 'commit 012345678' in page.text and 'step 7' in page.text
    assert {'curves', 'threshold', 'by_class', 'confusion', 'occlusion', 'speed', 'blocks', 'mistakes', 'pictures',
            'settings'} <= set(page.ids)
    assert '<td>0.125</td>' in page.text                             # share of P5, the last of log.csv
    # the difference in AP is what taking them out by hand gives
    without = run(monkeypatch, capsys, weights=weights, data=data, conf=0.05, without='p4,block5')
    assert without['AP'] != line['AP'] and f'<td>{line["AP"]:.4f}</td><td>{without["AP"]:.4f}</td>' in page.text
    assert 'id="blocks"' not in check_page(folder / 'report.html').text                # nothing left to take out


def test_blocks_of_a_large_set_are_judged_on_a_part_of_it(folder, monkeypatch):
    """Both APs are of the same images: those of every second batch."""
    monkeypatch.setattr(report, 'MAX_ABLATION', 2)
    data = DetectionDataset(str(folder / 'val.json'))
    model, settings = ev.load_model(str(folder / 'best.pt')), dict(imgsz=64, batch_size=1, rect=False)
    (table,), _ = ev.predict_dataset(model, data, **settings, verbose=False)
    coco_gt = data.coco()
    whole, without, n = report.ap_without_blocks(model, data, coco_gt, table, settings)
    coco_gt['annotations'] = [a for a in coco_gt['annotations'] if a['image_id'] in (5, 7)]
    part = table[(table[:, 0] == 5) | (table[:, 0] == 7)]
    assert n == 2 and whole == ev.coco_summary(ev.run_cocoeval(coco_gt, part)) and without['AP'] != whole['AP']


def test_from_json_with_and_without_images(folder, tmp_path, monkeypatch, capsys):
    rows = [dict(image_id=5, category_id=1, bbox=[5, 5, 20, 20], score=0.9)]
    (tmp_path / 'd.json').write_text(json.dumps(rows))
    line = run(monkeypatch, capsys, data=str(folder / 'val.json'), from_json=str(tmp_path / 'd.json'))
    page = check_page(tmp_path / 'report.html')
    assert page.figures.keys() == leaves(line).keys() and 'id="pictures"' in page.text
    (tmp_path / 'val.json').write_text((folder / 'val.json').read_text())
    for there in ([], ['0&.png']):                                   # no image, and not all of them: no pictures
        for name in there:
            shutil.copy(folder / 'images' / name, tmp_path)
        run(monkeypatch, capsys, data=str(tmp_path / 'val.json'), from_json=str(tmp_path / 'd.json'))
        page = check_page(tmp_path / 'report.html')
        assert 'id="pictures"' not in page.text and 'id="mistakes"' in page.text


def test_write_report_at_the_end_of_training(folder, capsys):
    data = str(folder / 'val.json')
    assert report.write_report(str(folder), data, imgsz=(64, 64), batch_size=3) == ''
    page = check_page(folder / 'report.html')
    model, dataset = ev.load_model(str(folder / 'best.pt')), DetectionDataset(data)
    (table,), _ = ev.predict_dataset(model, dataset, 64, verbose=False)
    expected = leaves(ev.coco_summary(ev.run_cocoeval(dataset.coco(), table)))
    assert {key: page.figures[key][0] for key in expected} == {
        key: '' if value is None else repr(value) for key, value in expected.items()}
    assert 'nowhere/best.pt' in report.write_report('nowhere', data)
    with pytest.raises(OSError):
        report.make_page('nowhere', data, *evaluation(dataset.coco(), table))


def test_a_missing_image_with_large_objects(folder, tmp_path):
    """Its objects are missed, and there is no picture of them."""
    shutil.copytree(folder, tmp_path / 'part')
    os.remove(tmp_path / 'part/images/1&.png')
    assert report.write_report(str(tmp_path / 'part'), str(tmp_path / 'part/val.json'), imgsz=(64, 64)) == ''
    page = check_page(tmp_path / 'part/report.html')
    assert 'objects missed' in page.text and '1&amp;.png' not in page.text and '0&amp;.png' in page.text


def evaluation(coco_gt, table):
    """coco_gt, E, table, summary of make_page."""
    E = ev.run_cocoeval(coco_gt, table)
    return coco_gt, E, table, ev.coco_summary(E) | dict(
        by_class=ev.per_class(E, coco_gt), occlusion=ev.under_occlusion(coco_gt, table), best_f1=ev.best_f1(E),
        duplicates=ev.duplicates(coco_gt, table))


@pytest.mark.parametrize('case', ['no objects', 'no detections', 'one image', '80 classes', 'grey', 'noise', 'long',
                                  'missing'])
def test_odd_data(case, tmp_path, capsys):
    names = [f'kind {i}' for i in range(80)] if case == '80 classes' else ['a', 'b']
    sizes = {'one image': [(40, 30)], 'noise': [(800, 640)] * 8, 'long': [(6000, 60)]}.get(case, [(40, 30), (30, 40)])
    rng = np.random.default_rng(0)
    boxes = [(row, int(rng.integers(len(names))), [*rng.uniform(0, 15, 2).tolist(), 10, 12])
             for row in range(len(sizes)) for _ in range(20)]
    data = make_set(tmp_path, sizes, boxes, names, 'L' if case == 'grey' else 'RGB')
    dataset = DetectionDataset(data)
    if case == 'missing':
        os.remove(tmp_path / 'images' / '0&.png')
    table = np.array([[5 + row, *box, rng.random(), label + 1] for row, label, box in boxes])
    table[::3, 1:3] += 9                                             # these are false alarms
    if case == 'no detections':
        table = table[:0]
    coco_gt = dataset.coco()
    if case == 'no objects':
        coco_gt['annotations'] = []
    report.make_page(str(tmp_path), data, *evaluation(coco_gt, table), dataset)
    page = check_page(tmp_path / 'report.html')
    if case == '80 classes':
        assert 'most frequent confusions' in page.text and len(page.figures) > 80 * 9


def test_kinds_of_error_by_hand():
    def annotation(category, box):
        return dict(id=category, image_id=1, category_id=category, bbox=box, area=100, iscrowd=0)

    coco_gt = dict(images=[dict(id=1), dict(id=2)], categories=[dict(id=1, name='a'), dict(id=2, name='b')],
                   annotations=[annotation(1, [0, 0, 10, 10]), annotation(2, [50, 50, 10, 10])])
    rows = np.array([[1, 0, 0, 10, 10, 0.9, 1],                      # true
                     [1, 0, 0, 10, 9, 0.8, 1],                       # again
                     [1, 50, 50, 10, 9, 0.7, 1],                     # there is a b
                     [1, 0, 7, 10, 10, 0.6, 1],                      # IoU 3/17
                     [1, 50, 57, 10, 10, 0.5, 1],                    # IoU 3/17 with a b
                     [1, 80, 0, 10, 10, 0.4, 1], [2, 0, 0, 10, 10, 0.3, 2],
                     [1, 80, 80, 10, 10, 0.1, 1]])                   # below the threshold
    true, predicted = report.find_boxes(coco_gt, rows[::-1], 0.2)
    assert [box.error for box in predicted] == ['', *report.KINDS, report.KINDS[-1]]
    assert [box.kind for box in predicted] == ['found'] + ['false'] * 6 and [box.image for box in predicted][-1] == 2
    assert [box.text for box in predicted][-2:] == ['a 0.40', 'b 0.30'] and predicted[1].xyxy == (0, 0, 10, 9)
    assert true == [(1, (0, 0, 10, 10), 'found', 'a', 0, ''), (1, (50, 50, 60, 60), 'missed', 'b', 0, '')]


def test_images_are_chosen_once():
    counts = np.array([[3, 0, 0, 0], [9, 1, 0, 0], [2, 0, 4, 0.9], [5, 5, 0, 0], [0, 0, 1, 0.95], [0, 0, 0, 0]], float)
    chosen = report.choose_images(counts)
    assert list(chosen) == ['Best', 'Most confident false alarms', 'Most crowded']
    assert chosen == {'Most crowded': [1, 3], 'Most confident false alarms': [4, 2], 'Best': [0]}


def test_f1_curve_passes_through_the_best():
    rng = np.random.default_rng(0)
    scores, correct = rng.random(50).round(1), rng.random(50) < 0.5
    best = ev.best_f1(SimpleNamespace(matches={1: (scores, correct, 40)}))
    f1 = report.f1_curve(scores, correct, 40, np.linspace(0, 1, 101).round(2))
    assert f1.max() == pytest.approx(best['F1'], abs=1e-5) and f1[round(100 * best['score'])] == f1.max()
    assert report.f1_curve(scores[:0], correct[:0], 3, np.linspace(0, 1, 11)).tolist() == [0] * 11


def test_attention_by_hand(folder, monkeypatch):
    """Two tokens that look at each other, three cells apart: distance 3, entropy 0; equal weights: 1.5 and log 2."""
    model, dataset = ev.load_model(str(folder / 'best.pt')), DetectionDataset(str(folder / 'val.json'))
    dataset.boxes = [np.array([[0.0, 0, 2, 2], [80, 0, 100, 20]])] + [np.zeros((0, 4))] * 3
    cross, equal = torch.tensor([[[[0.0, 1], [1, 0]]]]), torch.full((1, 1, 2, 2), 0.5)
    for weights, distance, entropy in ((cross, 3.0, 0.0), (equal, 1.5, math.log(2))):
        monkeypatch.setattr(model.block4, 'attention', lambda x, weights=weights: (torch.tensor([[0, 3]]), weights))
        seen = report.watch_blocks(model, dataset, [0, 2], (64, 64))['p4']
        # the second box covers the centre of cell 3 of the first image; the other image has none
        figures = [[2, 0.5, 1 / 16, distance, 1.5, entropy], [2, 0, 0, distance, 1.5, entropy]]
        assert np.allclose(seen['measured'], figures, atol=1e-6)
        assert seen['often'].tolist() == [[2, 0, 0, 2]] + [[0] * 4] * 3 and seen['focus'] == 3
    assert not model.block4._forward_pre_hooks


def test_charts_of_odd_numbers():
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1] and nice_ticks(-0.007, 0) == [-0.006, -0.004, -0.002, 0]
    for lines in ({}, {'a': []}, {'a': [(1, math.nan)]}, {'a': [(1, 5)]}, {'a': [(0, 0), (1, 0)]},
                  {str(i): [(0, i), (1, -i)] for i in range(20)}):
        svg = svg_chart('<t>', lines, 'x')
        assert 'nan' not in svg and '&lt;t&gt;' in svg and svg.count('<polyline') == len(lines)


@pytest.mark.skipif(BROWSER is None, reason='no chromium or chrome on this machine')
@pytest.mark.parametrize('scheme, background', [(0, (18, 22, 28)), (1, (255, 255, 255))])
def test_page_in_a_browser(scheme, background, folder, tmp_path, monkeypatch, capsys):
    """On a phone, dark and light: the background is the theme's, something is on it, nothing reaches the right edge."""
    run(monkeypatch, capsys, weights=str(folder / 'best.pt'), data=str(folder / 'val.json'), out_dir=str(tmp_path))
    flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--hide-scrollbars',
             '--disable-background-networking', '--disable-component-update', '--disable-sync',
             f'--user-data-dir={tmp_path / "profile"}', f'--blink-settings=preferredColorScheme={scheme}',
             '--window-size=390,6000', f'--screenshot={tmp_path / "page.png"}']
    subprocess.run([BROWSER, *flags, f'file://{tmp_path}/report.html'], capture_output=True, timeout=120, check=True)
    pixels = np.asarray(Image.open(tmp_path / 'page.png').convert('RGB'))
    assert pixels.shape == (6000, 390, 3) and tuple(pixels[2, 2]) == background
    assert (pixels != background).any(2).mean() > 0.05
    assert (pixels[:, -14:] == background).all(), 'the page is wider than the screen'

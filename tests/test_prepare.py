"""The sets that prepare/ makes, and its COCO download from a small server here that cuts, ignores, lies and refuses."""
import http.server
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from configurator import InputError
from data import DetectionDataset
from prepare import coco
from prepare.clips import COLOURS, draw_clip, make_clips
from prepare.long_range import NAMES, draw_long_range, make_long_range
from prepare.shapes import SHAPES, draw_shapes, make_shapes, rasterize, shape_corners

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
USAGE = namedtuple('usage', 'total used free')


# ----------------------------------------------------------------------------------------------- shapes, long_range

def test_a_picture_depends_on_seed_split_and_number_only(tmp_path):
    make_shapes(str(tmp_path / 'a'), train=6, val=2, size=96)
    make_shapes(str(tmp_path / 'b'), train=2, val=1, size=96)
    make_shapes(str(tmp_path / 'c'), train=2, val=1, size=96, seed=1)
    a, b, c = ({path.name if path.suffix == '.json' else f'{path.parent.name}/{path.name}': path.read_bytes()
                for path in (tmp_path / name).rglob('*.*')} for name in 'abc')
    assert len(a) == 8 + 2 and len(b) == len(c) == 3 + 2                               # the json files, no .part
    pictures = [name for name in b if name.endswith('.jpg')]
    assert all(a[name] == b[name] != c[name] for name in pictures) and len(set(a.values())) == len(a)
    image, labels, boxes = draw_shapes(np.random.default_rng((0, 1, 2)), 96)           # split 1: train, picture 2
    entries = [e for e in json.loads(a['train.json'])['annotations'] if e['image_id'] == 2]
    assert entries == [e for e in json.loads(b['train.json'])['annotations'] if e['image_id'] == 2]
    assert [e['category_id'] - 1 for e in entries] == labels
    xywh = np.array([e['bbox'] for e in entries])
    assert np.abs(np.hstack((xywh[:, :2], xywh[:, :2] + xywh[:, 2:])) - boxes).max() < 0.02
    stored = np.asarray(Image.open(io.BytesIO(a['train/000002.jpg'])), float)
    assert stored.shape == (96, 96, 3) and np.abs(stored - np.asarray(image, float)).mean() < 16


def test_shapes_are_inside_occlude_each_other_and_stay_visible():
    counts, sides, ious, kinds = [], [], [], set()
    for i in range(30):
        image, labels, boxes = draw_shapes(np.random.default_rng((0, 1, i)))
        b = np.array(boxes)
        assert image.size == (192, 192) and b.min() >= 0 and b.max() <= 192 and (b[:, 2:] > b[:, :2]).all()
        area = (b[:, 2:] - b[:, :2]).prod(1)
        common = (np.minimum(b[:, None, 2:], b[:, 2:]) - np.maximum(b[:, None, :2], b[:, :2])).clip(0).prod(2)
        iou = common / (area[:, None] + area - common) - np.eye(len(b))
        counts.append(len(b))
        sides += np.sqrt(area).tolist()
        ious += iou.max(1).tolist()
        kinds |= set(labels)
    sides, ious = np.array(sides), np.array(ious)
    assert kinds == set(range(len(SHAPES))) and min(counts) <= 5 and max(counts) >= 12
    assert 6 < sides.min() < 20 and sides.max() > 70 and (sides < 32).mean() < 0.35
    assert (ious > 0.1).mean() > 0.2 and (ious > 0.3).mean() > 0.03


def test_what_is_drawn_fills_its_box():
    for kind in SHAPES:
        corners, center = shape_corners(kind, 0.2), np.array([50.3, 60.7])
        assert abs(np.hypot(*corners.T).max() - 1) < 1e-9 and np.ptp(corners, 0).min() > 1.2
        corners = corners * 30 + center
        coverage, left, top = rasterize(kind, corners, center)
        y, x = np.nonzero(coverage > 0)
        drawn = np.array([x.min() + left, y.min() + top, x.max() + 1 + left, y.max() + 1 + top])
        assert np.abs(drawn - np.hstack((corners.min(0), corners.max(0)))).max() < 1.4             # a pixel and a third
        (x, y), (x1, y1) = corners.T, np.roll(corners, -1, 0).T
        area = abs((x * y1 - x1 * y).sum()) / 2 * (1 - 0.56 ** 2 * (kind == 'ring'))              # shoelace formula
        assert abs(coverage.sum() / area - 1) < 0.12 and coverage.max() == 1       # Pillow draws the rim


def test_half_of_the_discs_may_show_their_colour():
    shown = []
    for seed in range(40):
        image, labels, boxes = draw_long_range(np.random.default_rng(seed), near=64, hidden=0.5)
        for x1, y1, x2, y2 in boxes[1:]:
            pixel = np.array(image.getpixel((round((x1 + x2) / 2), round((y1 + y2) / 2))))
            assert pixel.min() == 255 or pixel.argmax() == labels[0]
            shown.append(pixel.min() < 255)
    assert 0.35 < np.mean(shown) < 0.65


def test_long_range_cue_is_far_from_its_discs(tmp_path):
    for seed in range(20):
        image, labels, boxes = draw_long_range(np.random.default_rng(seed))
        assert image.size == (2048, 32) and len(labels) == len(boxes) >= 2
        assert labels[0] in (0, 1, 2) and set(labels[1:]) == {labels[0] + 3}
        assert min(box[0] for box in boxes[1:]) - boxes[0][2] > 1000
        assert all(0 <= x1 < x2 <= 2048 and 0 <= y1 < y2 <= 32 for x1, y1, x2, y2 in boxes)
        x, y = boxes[0][0] + 12, 16                                                    # the middle of the cue
        assert NAMES[labels[0]].split()[0] == ('red', 'green', 'blue')[int(np.argmax(image.getpixel((int(x), y))))]
        assert draw_long_range(np.random.default_rng(seed), 300, 700, width=1024)[0].size == (1024, 32)
        boxes = draw_long_range(np.random.default_rng(seed), near=300, far=700)[2][1:]
        assert min(box[0] for box in boxes) >= 300 and max(box[2] for box in boxes) <= 700
    for near, far in ((20, 2048), (700, 700), (1100, 3000)):
        with pytest.raises(InputError, match='--near'):
            make_long_range(str(tmp_path), 1, 1, near, far)
    with pytest.raises(InputError, match='--hidden'):
        make_long_range(str(tmp_path), hidden=1.5)
    make_long_range(str(tmp_path), train=3, val=3)
    train, val = (json.loads((tmp_path / name).read_text()) for name in ('train.json', 'val.json'))
    assert [c['name'] for c in val['categories']] == NAMES == ['red cue', 'green cue', 'blue cue', 'red disc',
                                                               'green disc', 'blue disc']
    assert sum(a['category_id'] <= 3 for a in train['annotations']) == 3
    assert val['annotations'] and all(a['category_id'] > 3 for a in val['annotations'])


def test_clips_show_the_class_in_the_first_frame_only(tmp_path):
    for seed in range(20):
        clip, labels, boxes = draw_clip(np.random.default_rng(seed))
        assert len(clip.frames) == 3 and len(labels) == len(boxes) >= 1
        for label, (x1, y1, x2, y2) in zip(labels, boxes, strict=True):
            assert 0 <= x1 < x2 <= 64 and 0 <= y1 < y2 <= 64
            x, y = int(x1 + x2) // 2, int(y1 + y2) // 2
            first, *later = (np.asarray(frame)[y, x].astype(int) for frame in clip.frames)
            assert (first == tuple(COLOURS.values())[label]).all() and all(np.ptp(pixel) == 0 for pixel in later)
    make_clips(str(tmp_path), train=3, val=2)
    assert len(os.listdir(tmp_path / 'images' / 'train')) == 9
    data = DetectionDataset(str(tmp_path / 'train.json'), imgsz=64, frames=2)
    colour = [np.ptp(frame.numpy(), axis=0).max() for frame in data[0]['image'].float()]
    assert len(data) == 3 and colour[0] > 100 and max(colour[1:]) < 20


def test_makers_complain_in_one_sentence(tmp_path):
    (tmp_path / 'file').write_text('')
    for more, words in ((dict(out=tmp_path / 'file'), 'another folder with --out='), (dict(train=0), '--train=0'),
                        (dict(seed=-1), '--seed=-1'), (dict(size=8), '--size=8')):
        with pytest.raises(InputError, match=words):
            make_shapes(**{**dict(out=tmp_path / 'x', train=1, val=1), **more})
    with pytest.raises(InputError, match='--size=24'):
        make_clips(str(tmp_path / 'x'), train=1, val=1, size=24)


# ----------------------------------------------------------------------------------------------- COCO

def picture(seed, width, height, kind='JPEG'):
    f = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(f, kind, quality=95)
    return f.getvalue()                                                # of about 20 kB


def tiny_coco():
    """name on the server -> bytes, of 30 train and 6 val images; ids with gaps, in no order. And split -> its json."""
    files, texts = {}, {}
    for split, ids in (('train', [7 * (i * 11 % 30) + 3 for i in range(30)]), ('val', range(1000, 1006))):
        images, annotations = [], []
        for i in ids:
            name, width, height = f'{i:012d}.jpg', 100 + i % 9, 90 + i % 7
            files[f'{split}2017/{name}'] = picture(i, width, height, 'PNG' if i == ids[0] else 'JPEG')    # as in COCO
            images.append(dict(id=i, file_name=name, width=width, height=height))
            for j in range(i % 3):                                     # some have none
                annotations.append(dict(id=10 * i + j, image_id=i, category_id=1, bbox=[1, 2, 3 + j, 4], area=12.0,
                                        iscrowd=0, segmentation=[[1, 2, 4, 2, 4, 6]]))
        images[0]['file_name'] = '../../' + images[0]['file_name']     # a hostile archive
        texts[split] = json.dumps(dict(info={'padding': 'x' * 20_000}, images=images, annotations=annotations,
                                       categories=[dict(id=1, name='thing')]))
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w') as z:
        for split, text in texts.items():
            z.writestr(f'annotations/instances_{split}2017.json', text)
    return {coco.ARCHIVE: f.getvalue(), **files}, texts


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'                                      # keeps connections open
    disable_nagle_algorithm = True                                     # or head and body of an answer are 40 ms apart

    def do_GET(self):
        server, name, asked = self.server, self.path.lstrip('/'), self.headers.get('Range')
        server.log.append((name, asked))
        behaviour = server.behaviour[name].pop(0) if server.behaviour.get(name) else ''
        if behaviour.isdigit() or name not in server.files:
            return self.send_error(int(behaviour or 404))
        body, start = server.files[name], 0
        if behaviour == 'garbage':
            body = b'<html>please log in</html>' * 9
        etag = server.etags.get(name, '"1"')
        if asked and name not in server.rangeless and self.headers.get('If-Range') == etag:
            start = int(asked[len('bytes='):-1])
        if start and start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(body) - start))
        if etag:
            self.send_header('ETag', etag)
        self.end_headers()
        if behaviour.startswith(('cut', 'hang')):                      # after so many bytes of the file
            body = body[:max(int(behaviour.split()[1]), start)]
            self.close_connection = True
        self.wfile.write(body[start:])
        if behaviour.startswith('hang'):
            self.wfile.flush()
            server.hung.set()
            server.hold.wait(20)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64                                            # the usual 5 makes a sixth caller wait a second

    def handle_error(self, request, client_address):                   # a client that hangs up is no error here
        pass


@pytest.fixture(scope='module')
def files_and_texts():
    return tiny_coco()


@pytest.fixture
def server(monkeypatch, files_and_texts):
    """behaviour[name]: one word for each time that the file is asked for; log: what was asked for, with its Range."""
    for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: USAGE(1e12, 0, 1e12))
    s = Server(('127.0.0.1', 0), Handler)
    s.files, s.texts = dict(files_and_texts[0]), files_and_texts[1]
    s.behaviour, s.etags, s.log, s.rangeless = {}, {}, [], set()
    s.hung, s.hold = threading.Event(), threading.Event()
    s.url = f'http://127.0.0.1:{s.server_port}'
    threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True).start()
    yield s
    s.hold.set()
    s.shutdown()
    s.server_close()


def get(server, out, **more):
    settings = dict(out=str(out), fraction=0.4, seed=0, jobs=4, base_url=server.url, tries=2, pause=0.001)
    return coco.download_coco(**{**settings, **more})


def chosen(server, fraction=0.4, seed=0):
    """The names of the subset, worked out independently."""
    ids = sorted(x['id'] for x in json.loads(server.texts['train'])['images'])
    return sorted(f'train2017/{i:012d}.jpg' for i in random.Random(seed).sample(ids, round(fraction * len(ids))))


def here(out):
    return {str(path.relative_to(out / 'images')): path.read_bytes() for path in (out / 'images').rglob('*.*')}


def test_all_arrives_over_a_bad_line(server, tmp_path, capsys):
    names, archive = chosen(server), coco.ARCHIVE
    assert min(map(len, server.files.values())) > 9000                 # more than the client's chunk of 8,192
    server.behaviour = {archive: ['cut 17000', 'cut 30000', 'cut 30000'], names[0]: ['cut 9000', '503', '429'],
                        names[1]: ['cut 9000'], names[2]: ['garbage'], names[3]: ['cut 9000'], names[4]: ['cut 9000'],
                        names[5]: ['408', '500']}
    server.rangeless, server.etags = {names[1]}, {names[3]: ''}
    path = get(server, tmp_path)
    val = [name for name in server.files if name.startswith('val')]
    assert here(tmp_path) == {name: server.files[name] for name in names + val}        # no .part, no .etag
    assert sorted(os.listdir(tmp_path)) == ['annotations', 'images'] and not list(tmp_path.parent.glob('*.jpg'))
    assert sorted(os.listdir(tmp_path / 'annotations')) == ['annotations_trainval2017.zip',
                                                            'instances_train2017_40.json', 'instances_val2017.json']
    # a second request asks for the rest, and gets the whole where the server or garbage leaves no choice
    asked = {name: [header for n, header in server.log if n == name] for name in server.files}
    assert asked[archive][0] is None and len(asked[archive]) == 4
    starts = [int(header[len('bytes='):-1]) for header in asked[archive][1:]]
    assert 17_000 - 8192 <= starts[0] <= 17_000 and 30_000 - 8192 <= starts[1] <= 30_000 and starts[1] <= starts[2]
    assert asked[names[0]] == [None] + ['bytes=8192-'] * 3
    assert asked[names[1]] == asked[names[4]] == [None, 'bytes=8192-']                 # one of them without effect
    assert asked[names[2]] == asked[names[3]] == [None, None] and len(asked[names[5]]) == 3
    # the subset is exact
    full, subset = json.loads(server.texts['train']), json.loads(open(path).read())
    assert [f'train2017/{os.path.basename(x["file_name"])}' for x in subset['images']] == names
    ids = {x['id'] for x in subset['images']}
    expected = [x for x in full['annotations'] if x['image_id'] in ids and x.pop('segmentation')]
    assert subset['annotations'] == expected and subset['categories'] == full['categories']
    assert (tmp_path / 'annotations/instances_val2017.json').read_text() == server.texts['val']
    # a second run finds everything in place
    server.log.clear()
    assert get(server, tmp_path) == path and server.log == []
    assert '18 images wanted, 18 of them are there' in capsys.readouterr().out


def test_subset_depends_on_the_seed_only(server, tmp_path):
    texts = {}
    for jobs, seed in ((1, 0), (8, 0), (8, 1)):
        path = get(server, tmp_path / f'{jobs}{seed}', jobs=jobs, seed=seed)
        assert path.endswith('_40.json' if seed == 0 else '_40_seed1.json')
        texts[jobs, seed] = open(path).read()
    assert texts[1, 0] == texts[8, 0] != texts[8, 1]
    path = get(server, tmp_path / '80', fraction=1.0)                  # all of it, the file as it came
    assert path.endswith('instances_train2017.json') and open(path).read() == server.texts['train']
    assert here(tmp_path / '80') == {name: body for name, body in server.files.items() if name != coco.ARCHIVE}


COMMAND = """
import runpy, shutil, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)               # a suite started in the background ignores it
shutil.disk_usage = lambda path: type('usage', (), dict(free=1e12))
runpy.run_module('prepare.coco', run_name='__main__', alter_sys=True)
"""


def run(server, out, *more):
    command = [sys.executable, '-c', COMMAND, f'--out={out}', f'--base_url={server.url}', '--fraction=0.4', *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize('name', [coco.ARCHIVE, 'train2017'])
@pytest.mark.parametrize('changed', [False, True])
def test_ctrl_c_leaves_at_once_and_the_same_command_continues(server, tmp_path, name, changed):
    name = name if name == coco.ARCHIVE else chosen(server)[11]
    server.behaviour = {name: ['hang 9000']}                           # the line goes silent
    process = run(server, tmp_path)
    assert server.hung.wait(20)
    path = tmp_path / ('' if name == coco.ARCHIVE else 'images') / (name + '.part')
    for _ in range(500):
        if coco.file_size(path) < 8192:
            server.hold.wait(0.01)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=8)                     # far less than the 30 s of a read timeout
    assert process.returncode == 130 and 'interrupted; what has arrived is kept' in error and 'Traceback' not in error
    assert path.stat().st_size == 8192 and not (tmp_path / 'annotations/instances_train2017_40.json').exists()
    finished = {n for n in here(tmp_path) if not n.endswith(('.part', '.etag'))}
    if changed:
        server.etags[name] = '"2"'
        if name != coco.ARCHIVE:
            server.files[name] = picture(99, *Image.open(io.BytesIO(server.files[name])).size)
    server.log.clear()
    get(server, tmp_path)
    assert [header for n, header in server.log if n == name] == ['bytes=8192-']        # with If-Range
    assert not finished & {n for n, _ in server.log}
    assert len(here(tmp_path)) == 18 and (name == coco.ARCHIVE or here(tmp_path)[name] == server.files[name])


def test_a_part_that_is_the_whole(server, tmp_path):
    (tmp_path / 'annotations').mkdir()
    (tmp_path / (coco.ARCHIVE + '.part')).write_bytes(server.files[coco.ARCHIVE])
    (tmp_path / (coco.ARCHIVE + '.etag')).write_text('"1"')            # killed before the check: 416
    get(server, tmp_path)
    assert [n for n, _ in server.log].count(coco.ARCHIVE) == 1 and len(here(tmp_path)) == 18


def test_what_never_arrives_is_named(server, tmp_path, capsys):
    gone, stuck = chosen(server)[3], chosen(server)[7]
    server.behaviour = {gone: ['404'], stuck: ['cut 9000'] * 9}
    server.rangeless = {stuck}
    with pytest.raises(InputError, match='2 of 18 files are missing, such as .*; what has arrived is kept'):
        get(server, tmp_path)
    error = capsys.readouterr().err
    assert f'{gone}: 404 ' in error and f'{stuck}: ChunkedEncodingError' in error
    asked = [n for n, _ in server.log]
    assert asked.count(gone) == 1 and asked.count(stuck) == 1 + 3      # no use; one new piece, then tries + 1 without
    assert sum(not n.endswith(('.part', '.etag')) for n in here(tmp_path)) == 16
    server.behaviour = {}
    server.log.clear()
    get(server, tmp_path)
    assert sorted({n for n, _ in server.log}) == sorted((gone, stuck)) and len(here(tmp_path)) == 18


def test_a_dead_network_ends_it_soon(server, tmp_path):
    server.behaviour = {name: ['503'] * 99 for name in server.files if name != coco.ARCHIVE}
    with pytest.raises(InputError, match='36 of 36 files are missing, such as .*: 503 '):
        get(server, tmp_path, fraction=1.0, tries=0)
    assert len(server.log) < 30                                        # of 36 images and the archive
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match=f'{coco.ARCHIVE}: ConnectionError; what has arrived is kept'):
        get(server, tmp_path / 'other')


def test_what_is_wrong_with_a_file(tmp_path):
    path, jpeg, png = str(tmp_path / 'x.jpg'), picture(0, 40, 30), picture(0, 40, 30, 'PNG')
    for body, words in ((jpeg, ''), (png, ''), (picture(0, 41, 30), '(41, 30)'), (jpeg[:-2], 'broken'),
                        (jpeg[:-2] + bytes(2), 'no end marker'), (jpeg[:-200], 'broken'), (png[:-200], 'broken'),
                        (b'', 'broken')):
        open(path, 'wb').write(body)
        issue = coco.image_issue(path, 40, 30)
        assert words in issue and bool(words) == bool(issue)


def test_an_archive_with_a_flipped_bit_is_named(server, tmp_path):
    body = bytearray(server.files[coco.ARCHIVE])
    body[5000] ^= 1
    server.files[coco.ARCHIVE] = bytes(body)
    with pytest.raises(InputError, match='annotations_trainval2017.zip is not the archive of COCO.*delete it'):
        get(server, tmp_path)


def test_one_sentence_before_it_starts(server, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    for more, words in ((dict(fraction=0.0), '--fraction=0.0'), (dict(jobs=0), '--jobs=0'),
                        (dict(tries=-1), '--tries=-1'), (dict(base_url='nowhere'), '--base_url=nowhere'),
                        (dict(out=str(tmp_path / 'file/coco')), 'file/coco')):
        with pytest.raises(InputError, match=words):
            get(server, **{**dict(out=tmp_path / 'coco'), **more})
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: USAGE(1e12, 0, 1e9))
    with pytest.raises(InputError, match=r'5\.\d GB needed, 1\.0 free'):
        get(server, tmp_path, fraction=0.2)
    assert server.log == []
    server.files.clear()
    process = run(server, tmp_path)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 1 and 'Traceback' not in error
    assert error.splitlines()[-1].startswith(f'error: 1 of 1 files are missing, such as {coco.ARCHIVE}: 404 ')

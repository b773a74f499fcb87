"""`python data.py coco20` against a small server on this machine that cuts, forgets, lies and refuses as real ones do."""
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

import data

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ZIP = 'annotations/annotations_trainval2017.zip'


def picture(seed, width, height, kind='JPEG'):
    f = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(f, kind)
    return f.getvalue()


def tiny_coco():
    """name on the server -> bytes, for 30 train and 6 val images; the ids have gaps and stand in no order."""
    files, texts = {}, {}
    for split, ids in (('train', [7 * (i * 11 % 30) + 3 for i in range(30)]), ('val', [1000 + i for i in range(6)])):
        images, annotations = [], []
        for i in ids:
            name, width, height = f'{i:012d}.jpg', 40 + i % 9, 30 + i % 7
            files[f'{split}2017/{name}'] = picture(i, width, height, 'PNG' if i == ids[0] else 'JPEG')    # as in the real one
            images.append(dict(id=i, file_name=name, width=width, height=height))
            for j in range(i % 3):                                                                        # some have none
                annotations.append(dict(id=10 * i + j, image_id=i, category_id=1, bbox=[1, 2, 3 + j, 4], area=12.0,
                                        iscrowd=0, segmentation=[[1, 2, 4, 2, 4, 6]]))
        texts[split] = json.dumps(dict(info={}, licenses=[], images=images, annotations=annotations,
                                       categories=[dict(id=1, name='thing')]))
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w') as z:
        for split, text in texts.items():
            z.writestr(f'annotations/instances_{split}2017.json', text)
        z.writestr('annotations/captions_val2017.json', '{}')
    return {ZIP: f.getvalue(), **files}, texts


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'                                      # keeps connections open
    disable_nagle_algorithm = True                                     # else head and body of an answer are 40 ms apart

    def do_GET(self):
        server, asked = self.server, self.headers.get('Range')
        name = self.path.removeprefix('http://coco.invalid').lstrip('/')               # so asked for, it is a proxy
        server.log.append((name, asked))
        server.hosts.add(self.headers['Host'])
        mood = server.moods[name].pop(0) if server.moods.get(name) else ''
        if mood == '404' or name not in server.files:
            return self.send_error(404)
        if mood == '503':
            return self.send_error(503)
        body, start = server.files[name], 0
        if mood == 'garbage':
            body = b'<html>please log in</html>' * 9
        if asked and name not in server.rangeless:
            start = int(asked[len('bytes='):-1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        self.send_header('Content-Length', str(len(body) - start))
        if name not in server.nameless:
            self.send_header('ETag', server.etags.get(name, '"1"'))
        self.end_headers()
        if mood.startswith('cut'):                                     # 'cut 100': after 100 bytes; 'cut': half way
            body = body[:start + int(mood[4:] or (len(body) - start) // 2)]
            self.close_connection = True
        self.wfile.write(body[start:])
        if mood == 'cut 50':
            self.wfile.flush()
            server.on_cut_50()

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64                                            # the usual 5 makes the sixth caller wait a second

    def handle_error(self, request, client_address):                   # a client that hangs up is no error here
        pass


@pytest.fixture
def server(monkeypatch):
    """A server of the tiny COCO; moods[name] is a list, one entry for each time the file is asked for."""
    for name in ('http_proxy', 'HTTP_PROXY', 'no_proxy', 'NO_PROXY'):
        monkeypatch.delenv(name, raising=False)
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(1e12, 0, 1e12))
    s = Server(('127.0.0.1', 0), Handler)
    s.files, s.texts = tiny_coco()
    s.moods, s.etags, s.log, s.rangeless, s.nameless, s.hosts, s.on_cut_50 = {}, {}, [], set(), set(), set(), lambda: None
    s.url = f'http://127.0.0.1:{s.server_port}'
    threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


def get(server, out, **more):
    return data.download_coco(**{**dict(out=str(out), fraction=0.4, jobs=4, base_url=server.url, tries=2, pause=0.001), **more})


def chosen(server, fraction=0.4, seed=0):
    """The names of the subset, worked out apart."""
    ids = sorted(x['id'] for x in json.loads(server.texts['train'])['images'])
    return sorted(f'train2017/{i:012d}.jpg' for i in random.Random(seed).sample(ids, round(fraction * len(ids))))


def here(out):
    return {os.path.relpath(os.path.join(folder, name), out / 'images'): (out / 'images' / folder / name).read_bytes()
            for folder, _, names in os.walk(out / 'images') for name in names}


def test_all_arrives_over_a_bad_line(server, tmp_path, capsys):
    names = chosen(server)
    server.moods = {ZIP: ['cut', 'cut'], names[0]: ['cut', '503', 'cut', 'cut'], names[1]: ['cut'], names[2]: ['garbage'],
                    names[3]: ['503'], names[4]: ['cut 100'] * 9, names[5]: ['cut'], 'val2017/000000001003.jpg': ['garbage', 'cut']}
    server.rangeless = {names[1]}
    server.nameless = {names[5]}                                       # no ETag: nothing vouches that a second half would fit
    path = get(server, tmp_path)
    val = [name for name in server.files if name.startswith('val')]
    assert here(tmp_path) == {name: server.files[name] for name in names + val}                   # no .part, no .etag either
    assert sorted(os.listdir(tmp_path / 'annotations')) == ['annotations_trainval2017.zip', 'instances_train2017_40.json',
                                                            'instances_val2017.json']
    # what is asked for again is the rest, and the whole only where the server or the garbage leaves no choice
    asked = {name: [header for n, header in server.log if n == name] for name in server.files}
    half = len(server.files[names[0]]) // 2
    assert asked[names[0]][:3] == [None, f'bytes={half}-', f'bytes={half}-'] and len(asked[names[0]]) == 5
    assert asked[names[1]][1].startswith('bytes=') and len(asked[names[1]]) == 2
    assert asked[names[2]] == [None, None] and asked[names[5]] == [None, None]
    assert asked[names[4]] == [None] + [f'bytes={100 * i}-' for i in range(1, 10)]                # 9 cuts, though tries=2
    assert asked[ZIP][1].startswith('bytes=') and len(asked[ZIP]) == 3
    # the subset is exact
    full, subset = json.loads(server.texts['train']), json.loads(open(path).read())
    assert [f'train2017/{x["file_name"]}' for x in subset['images']] == names
    ids = {x['id'] for x in subset['images']}
    expected = [{k: v for k, v in x.items() if k != 'segmentation'} for x in full['annotations'] if x['image_id'] in ids]
    assert subset['annotations'] == expected and subset['categories'] == full['categories']
    assert (tmp_path / 'annotations/instances_val2017.json').read_text() == server.texts['val']
    assert '18 of 18 files' in capsys.readouterr().out
    dataset = data.DetectionDataset(path, str(tmp_path / 'images/train2017'), imgsz=(64, 64))
    assert len(dataset) == 12 and not dataset.issues and all(dataset[(0, i)]['image'].shape == (3, 64, 64) for i in range(12))
    # a second run finds all in place
    server.log.clear()
    assert get(server, tmp_path) == path and server.log == []
    assert '18 images wanted, 18 of them are there' in capsys.readouterr().out


def test_subset_depends_on_the_seed_only(server, tmp_path):
    texts = {}
    for jobs, seed in ((1, 0), (8, 0), (8, 1)):
        shutil.rmtree(tmp_path, ignore_errors=True)
        texts[jobs, seed] = open(get(server, tmp_path, jobs=jobs, seed=seed)).read()
    assert texts[1, 0] == texts[8, 0] != texts[8, 1]
    path = get(server, tmp_path, fraction=1.0)                         # python data.py coco: all of it, the file as it came
    assert path.endswith('instances_train2017.json') and open(path).read() == server.texts['train']
    assert here(tmp_path) == {name: body for name, body in server.files.items() if name != ZIP}


@pytest.mark.parametrize('changed', [False, True])
def test_ctrl_c_and_on_with_it(server, tmp_path, changed):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)                  # a suite started in the background ignores it
    try:
        ctrl_c_and_on_with_it(server, tmp_path, changed)
    finally:
        signal.signal(signal.SIGINT, before)


def ctrl_c_and_on_with_it(server, tmp_path, changed):
    name, hold = chosen(server)[5], threading.Event()
    server.moods = {name: ['cut 50']}

    def press():                                                       # ... while the line has gone silent after 50 bytes
        while data.filesize(tmp_path / 'images' / (name + '.part')) < 50:
            hold.wait(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        hold.wait(20)                                                  # holds the connection open: the client must not wait for it
    server.on_cut_50 = press
    with pytest.raises(SystemExit, match='interrupted'):
        get(server, tmp_path)
    hold.set()
    done = here(tmp_path)
    assert len(done.pop(name + '.part')) == 50 and done.pop(name + '.etag') == b'"1"'
    assert not (tmp_path / 'annotations/instances_train2017_40.json').exists()         # not all is there, so nobody may train
    finished = {n for n in done if not n.endswith(('.part', '.etag'))}
    if changed:
        server.files[name], server.etags[name] = picture(99, *Image.open(io.BytesIO(server.files[name])).size), '"2"'
    server.log.clear()
    get(server, tmp_path)
    asked = [header for n, header in server.log if n == name]
    assert asked == (['bytes=50-', None] if changed else ['bytes=50-'])
    assert not finished & {n for n, _ in server.log}
    assert here(tmp_path)[name] == server.files[name] and len(here(tmp_path)) == 18


def test_what_never_arrives_is_named(server, tmp_path, capsys):
    gone, stuck = chosen(server)[3], chosen(server)[7]
    server.moods = {gone: ['404'], stuck: ['cut 100'] + ['cut 0'] * 9}
    server.rangeless = {stuck}
    with pytest.raises(data.InputError, match='2 files are missing'):
        get(server, tmp_path)
    error = capsys.readouterr().err
    assert f'{gone}: HTTP 404 Not Found' in error and stuck in error
    assert [n for n, _ in server.log].count(gone) == 1                 # no use asking again
    assert [n for n, _ in server.log].count(stuck) == 1 + 1 + 2        # one new piece, then tries + 1 without
    assert sum(not n.endswith(('.part', '.etag')) for n in here(tmp_path)) == 16
    server.moods = {}
    server.log.clear()
    get(server, tmp_path)
    assert sorted({n for n, _ in server.log}) == sorted((gone, stuck)) and len(here(tmp_path)) == 18


def test_a_dead_server_ends_it_soon(server, tmp_path):
    server.moods = {name: ['503'] * 99 for name in server.files if name != ZIP}
    with pytest.raises(data.InputError, match='HTTP 503.*36 files are missing'):
        get(server, tmp_path, fraction=1.0, tries=0)
    assert len(server.log) < 30                                        # of 36 files and the zip


def test_through_a_proxy(server, tmp_path, monkeypatch):
    monkeypatch.setenv('http_proxy', server.url)
    get(server, tmp_path, base_url='http://coco.invalid')
    assert len(here(tmp_path)) == 18 and server.hosts == {'coco.invalid'}


def test_faults(tmp_path):
    path = str(tmp_path / 'x.jpg')
    for body, words in ((picture(0, 40, 30), ''), (picture(0, 40, 30, 'PNG'), ''), (picture(0, 41, 30), '(41, 30)'),
                        (picture(0, 40, 30)[:-2], 'broken'), (picture(0, 40, 30)[:-200], 'broken'), (b'', 'broken'),
                        (picture(0, 40, 30, 'PNG')[:-200], 'broken')):
        open(path, 'wb').write(body)
        fault = data.image_fault(path, 40, 30)
        assert words in fault and bool(words) == bool(fault)
    good = tiny_coco()[0][ZIP]
    for body, words in ((good, ''), (good[:-9], 'broken'), (good[:60] + b'?' + good[61:], 'broken')):
        open(path, 'wb').write(body)
        assert words in data.zip_fault(path) and bool(words) == bool(data.zip_fault(path))


def test_one_sentence_before_it_starts(server, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    for more, words in ((dict(fraction=0.0), '--fraction=0.0'), (dict(jobs=0), '--jobs=0'), (dict(base_url='nowhere'), '--base_url=nowhere'),
                        (dict(out=str(tmp_path / 'file/coco')), 'file/coco')):
        with pytest.raises(data.InputError, match=words):
            get(server, **{**dict(out=tmp_path / 'coco'), **more})
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(1e12, 0, 1e9))
    with pytest.raises(data.InputError, match=r'5\.\d GB needed, 1\.0 free'):
        get(server, tmp_path, fraction=0.2)
    assert server.log == []
    (tmp_path / 'zip/annotations').mkdir(parents=True)
    (tmp_path / 'zip' / ZIP).write_text('something else')
    monkeypatch.undo()
    with pytest.raises(data.InputError, match='is not the archive of COCO'):
        get(server, tmp_path / 'zip', fraction=1e-9)


def test_command(server, tmp_path):
    server.files.clear()
    command = [sys.executable, 'data.py', 'coco20', f'--out={tmp_path}', f'--base_url={server.url}', '--fraction=0.001', '--jobs=2']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f'error: {ZIP}: HTTP 404 Not Found')

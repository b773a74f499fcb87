"""
Reliability in figures: training that is killed, and files that are broken.

    python tests/reliability.py kill                      20 runs killed at random moments, resumed, compared to the bit
    python tests/reliability.py fuzz                      2,000 damaged files, each used or refused in one sentence
    python tests/reliability.py fuzz --kinds=onnx,yaml --count=50 --seed=1
    python tests/reliability.py fuzz --kinds=onnx --first=17 --count=1        one case once more, with its traceback

kill. A tiny training on a CPU, one thread, dies by SIGKILL: by the clock anywhere in its run, just before it renames a
file, in the middle of writing a checkpoint, and one of two ranks under torchrun. It is then resumed with the command of
the README (or, if it died before its first checkpoint, started again). The weights, the EMA, the optimizers, the random
state and log.csv must equal those of a run that nobody killed, bit for bit.

fuzz. Case n of a kind is a pure function of (seed, kind, n): a good file with a few seeded edits, of its bytes or of
the values inside, and what a user would do with it. Accepted, or refused by InputError, is well; any other exception,
a crash of the interpreter, more than `seconds` or more than `gigabytes` on top of what the program takes anyway is a
failure. Failures keep their file and traceback in out_dir, and the exit status is 1.

A process is forked for every kind from one that has imported everything, so that a case costs its own time only.
Linux, because of fork and /proc. What it does not do: search by coverage, as fuzzers proper do.
"""
import collections
import contextlib
import faulthandler
import importlib.util
import io
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zipfile
import zlib

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.update(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', MPLBACKEND='agg')

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import detect  # noqa: E402
import eval as evaluation  # noqa: E402
import labels  # noqa: E402
from configurator import InputError, configure  # noqa: E402
from data import Augment, DetectionDataset, describe, letterbox, load_image  # noqa: E402
from model import HSVDET, HSVDETConfig  # noqa: E402
from prepare.shapes import make_shapes  # noqa: E402

# --- settings ---------------------------------------------------------------------------------------------------------
what = ''                      # kill or fuzz
count = 0                      # kills, or cases over all kinds; 0: 20 kills, 2,000 cases
first = 0                      # fuzz: the number of the first case of each kind
kinds = ''                     # fuzz: some of the kinds, separated by commas; '' is all
seed = 0
seconds = 10                   # fuzz: the most CPU time that one case may take
gigabytes = 2.0                # fuzz: the most memory that cases may take
out_dir = 'out/reliability'


# --- kill -------------------------------------------------------------------------------------------------------------

def train_arguments(folder, name):
    """16 steps, a checkpoint every 2, an evaluation every 8, and whatever draws random numbers."""
    return [f'--train_data={folder}/data/train.json', f'--val_data={folder}/data/val.json',
            f'--out_dir={folder}/{name}', '--imgsz=64', '--device=cpu', '--dtype=float32', '--workers=0',
            '--epochs=4', '--no_aug_epochs=1', '--warmup_epochs=1', '--eval_interval=2', '--save_interval=2',
            '--batch_size=4', '--log_interval=3', '--k=8', '--select=random', '--multi_scale=0.5', '--num_pictures=1',
            '--report=False']


def set_fault(fault):
    """
    'clock 1.5': this process is killed in 1.5 s. 'rename 3': before its third os.replace. 'write 3': when half of its
    third checkpoint is in the file. '': never. 'rename 3 1': only on rank 1.
    """
    kind, when, rank = [*fault.split(), *'000'][:3]
    if os.environ.get('RANK', '0') != rank:
        return
    calls, replace, save, me = collections.Counter(), os.replace, torch.save, os.getpid()

    def rename_or_die(*args, **kwargs):
        calls['rename'] += 1
        if kind == 'rename' and calls['rename'] == int(when):
            os.kill(me, signal.SIGKILL)
        replace(*args, **kwargs)

    def write_or_die(content, file, *args, **kwargs):
        calls['write'] += 1
        if kind == 'write' and calls['write'] == int(when):
            whole = io.BytesIO()
            save(content, whole)
            with file if hasattr(file, 'write') else open(file, 'wb') as f:
                f.write(whole.getvalue()[:whole.tell() // 2])
                f.flush()
                os.kill(me, signal.SIGKILL)
        save(content, file, *args, **kwargs)

    os.replace, torch.save = rename_or_die, write_or_die
    if kind == 'clock' and os.fork() == 0:                             # from outside, whatever the process is doing
        time.sleep(float(when))
        if os.getppid() == me:
            os.kill(me, signal.SIGKILL)
        os._exit(0)


def run_train(fault, arguments):
    set_fault(fault)
    sys.argv = ['train.py', *arguments]
    runpy.run_path(os.path.join(ROOT, 'train.py'), run_name='__main__')


def start_train(fault, arguments, log, ranks=1):
    """Train in another process until it ends, its words appended to the file `log` -> exit status, below 0: killed."""
    with open(log, 'a') as f:
        if ranks > 1:
            return subprocess.run([sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={ranks}',
                                   '--standalone', os.path.abspath(__file__), 'train', fault, *arguments],
                                  stdout=f, stderr=f, stdin=subprocess.DEVNULL).returncode
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            os.dup2(f.fileno(), 1)
            os.dup2(f.fileno(), 2)
            code = 1
            try:
                run_train(fault, arguments)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def first_difference(a, b, where=''):
    """'' if two contents of checkpoints are equal to the bit, else the place of the first difference."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f'{where} has other keys'
        return next(filter(None, (first_difference(a[key], b[key], f'{where}.{key}') for key in a)), '')
    if isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        return next(filter(None, (first_difference(x, y, f'{where}[{i}]')
                                  for i, (x, y) in enumerate(zip(a, b, strict=True)))), '')
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return '' if a.dtype == b.dtype and torch.equal(a, b) else where
    return '' if type(a) is type(b) and a == b else where or 'the top'


def compare_runs(a, b):
    """'' if the files of two runs are the same, settings and clocks apart, else what differs."""
    for name in ('ckpt.pt', 'best.pt'):
        one, two = (torch.load(os.path.join(folder, name), weights_only=True) for folder in (a, b))
        for saved in (one, two):
            for key in ('config', 'commit', 'seconds'):
                saved.pop(key, None)
        if where := first_difference(one, two):
            return f'{name} differs at {where}'
    logs = []
    for folder in (a, b):
        with open(os.path.join(folder, 'log.csv')) as f:
            logs.append(f.read())
    if logs[0] != logs[1]:
        return 'log.csv differs'
    left = [name for name in os.listdir(b) if name.endswith('.part')]
    return f'half a file is left: {left}' if left else ''


def draw_fault(rng, n, duration):
    """The fault of kill n, and the ranks of its run. Of five kills two are by the clock, one is of one of two ranks."""
    ranks, kind = (2 if n % 5 == 4 else 1), ('clock', 'rename', 'clock', 'write', 'clock')[n % 5]
    if ranks == 2 and rng.random() < 0.5:
        kind = rng.choice(('rename', 'write'))
    when = {'clock': round(rng.uniform(0, duration[ranks]), 3), 'rename': rng.randint(1, 16),
            'write': rng.randint(1, 9)}[kind]
    return f'{kind} {when} {rng.randrange(ranks) if kind == "clock" else 0}', ranks


def kill(folder, kills, seed):
    """-> the number of runs that did not come out the same."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    make_shapes(f'{folder}/data', train=16, val=4, size=96)
    duration, rng, failed, began = {}, random.Random(seed), 0, time.time()
    for ranks in (1, 2) if kills > 4 else (1,):
        started = time.time()
        code = start_train('', train_arguments(folder, f'whole_{ranks}'), f'{folder}/whole_{ranks}.txt', ranks)
        assert code == 0, f'the undisturbed run ended with {code}: {folder}/whole_{ranks}.txt'
        duration[ranks] = time.time() - started
        print(f'undisturbed, {ranks} ranks: {duration[ranks]:.1f} s', flush=True)
    for n in range(kills):
        name, code = f'run_{n:02d}', 0
        while code == 0:                                               # by the clock it may have come too late
            shutil.rmtree(f'{folder}/{name}', ignore_errors=True)
            fault, ranks = draw_fault(rng, n, duration)
            code = start_train(fault, train_arguments(folder, name), f'{folder}/{name}.txt', ranks)
        there = [file for file in ('ckpt.pt', 'ckpt_prev.pt') if os.path.exists(f'{folder}/{name}/{file}')]
        step = torch.load(f'{folder}/{name}/{there[0]}', weights_only=True)['step'] if there else 0
        again = ['--init_from=resume'] if there else []
        code = start_train('', [*train_arguments(folder, name), *again], f'{folder}/{name}.txt', ranks)
        wrong = f'ended with {code}' if code else compare_runs(f'{folder}/whole_{ranks}', f'{folder}/{name}')
        failed += bool(wrong)
        start = f'resumed from {there[0]}, step {step}' if there else 'started again'
        print(f'{n + 1:3d}  {ranks} ranks, {fault:<15} {start:<35}'
              + (f'FAILED: {wrong}, see {folder}/{name}.txt' if wrong else 'equal to the bit'), flush=True)
        if not wrong:
            shutil.rmtree(f'{folder}/{name}')
    print(f'{kills} kills, {kills - failed} runs equal to the bit, {failed} not; {time.time() - began:.0f} s')
    return failed


# --- fuzz: edits ------------------------------------------------------------------------------------------------------

SPLICES = ['null', '-1', '1e400', 'NaN', '"', '{', '}', '[', ']', ':', ',', '\0', '\n', '\t', '\ud800', '\\ud800',
           '9' * 30, '9' * 5000, '&a;', '<', '>', '</', '<!--', '<!DOCTYPE', '- ', '*', '&x ', '!!int ', '? ', '..',
           '/', "'", 'true', '[' * 2000, '<a>' * 2000, '', ' ']
BOMB = 'a: &a [x, x, x, x, x, x, x, x]\n' + ''.join(f'{b}: &{b} [{", ".join([f"*{a}"] * 8)}]\n'
                                                    for a, b in zip('abcdefgh', 'bcdefghi', strict=True))
VALUES = [None, True, -1, 0, 1, 2, 0.5, 1e9, 1e308, float('nan'), float('inf'), 10**400, 2**63, 10**9, '1', '', 'a.png',
          '\0', '..', '\ud800', [], {}, [1], [[1, 2, 3, 4]], {'id': 1}, [0, 0, 9, 9], 'x' * 5000]


def mutate_text(text, rng):
    """One to four edits, a splice of strange text, a cut, a copy from elsewhere -> bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        i, j = sorted(rng.randint(0, len(text)) for _ in range(2))
        j, k = min(j, i + rng.choice([0, 1, 3, 20])), rng.randint(0, len(text))
        text = text[:i] + rng.choice([rng.choice(SPLICES), rng.choice(SPLICES), text[k:k + 30]]) + text[j:]
    return text.encode('utf-8' if rng.random() < 0.9 else 'utf-16', 'surrogatepass')


def mutate_bytes(data, rng, most=6):
    """One to `most` edits: other bytes, a number at its limits, a cut, a copy, the end missing."""
    data = bytearray(data)
    for _ in range(rng.randint(1, most)):
        i = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 200) + 1)   # headers
        n = rng.choice((1, 2, 4, 8, 30))
        kind = rng.choice(('bits', 'bytes', 'limit', 'cut', 'copy', 'end'))
        if kind == 'bits' and i < len(data):
            data[i] ^= 1 << rng.randrange(8)
        elif kind == 'bytes':
            data[i:i + n] = rng.randbytes(n)
        elif kind == 'limit':
            data[i:i + 4] = rng.choice((b'\0\0\0\0', b'\xff\xff\xff\xff', b'\x7f\xff\xff\xff', b'\xff\xff\xff\x7f',
                                        b'\0\0\x40\0', b'\0\x40\0\0'))
        elif kind == 'cut':
            del data[i:i + n]
        elif kind == 'copy':
            k = rng.randrange(len(data) + 1)
            data[i:i] = data[k:k + n]
        elif rng.random() < 0.3:
            del data[i:]
    return bytes(data)


def mutate_value(value, rng):
    """A value of dicts and lists with one of its parts replaced by something of another kind, left out or renamed."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        if isinstance(value, list):
            return [mutate_value(v, rng) if i == key else v for i, v in enumerate(value)]
        rest = {k: v for k, v in value.items() if k != key}
        return rng.choice((rest, {**rest, f'{key}2': value[key]}, *[{**value, key: mutate_value(value[key], rng)}] * 6))
    if isinstance(value, torch.Tensor) and value.numel() and rng.random() < 0.7:
        return rng.choice((value.double(), value.long(), value[None], value.flatten()[:1], value * float('nan'),
                           value.to(torch.complex64), value.bool(), value.to_sparse(), value.flatten()[:0],
                           torch.zeros_like(value, device='meta'), value.half()))
    return rng.choice(VALUES)


def png_checksums(data):
    """The bytes of a PNG with the checksum of every chunk correct again, so that a reader looks at what is inside."""
    at, data = 8, bytearray(data)
    while at + 12 <= len(data):
        size = int.from_bytes(data[at:at + 4], 'big')
        end = at + 8 + size
        if end + 4 > len(data):
            break
        data[end:end + 4] = zlib.crc32(data[at + 4:end]).to_bytes(4, 'big')
        at = end + 4
    return bytes(data)


# --- fuzz: kinds. Each function makes the good files in `folder` and returns write(rng) -> path, and use(path). ---

def write(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as f:
        f.write(data if isinstance(data, bytes) else data.encode())
    return path


def draw(path, w, h):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(256, size=(h, w, 3), dtype=np.uint8)).save(path)


def coco_dict():
    return dict(images=[dict(id=i, file_name=name, width=100, height=80) for i, name in ((1, 'a.png'), (2, 'b.png'))],
                annotations=[dict(id=k, image_id=1 + k % 2, category_id=1 + k % 3, bbox=[k, 2, 30, 4], area=120,
                                  iscrowd=k // 3) for k in range(4)],
                categories=[dict(id=k, name=f'c{k}') for k in (1, 2, 3)])


def check_table(table):
    """Programmers' promises of labels.Labels, whatever the files hold."""
    n, gt = len(table.files), table.coco()
    assert n == len(table.labels) == len(table.boxes) == len(table.image_ids) == len(set(table.image_ids))
    assert len(set(table.names)) == len(table.names) == len(set(table.category_ids)) and table.sizes.shape == (n, 2)
    assert (table.sizes > 0).all() and json.dumps([table.names, table.issues], ensure_ascii=False).encode()
    for (w, h), classes, boxes in zip(table.sizes, table.labels, table.boxes, strict=True):
        assert classes.dtype == np.int64 and boxes.dtype == np.float32 and boxes.shape == (len(classes), 4)
        assert ((classes >= 0) & (classes < len(table.names))).all() and np.isfinite(boxes).all()
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (w, h)).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    assert all(type(a['id']) is int and a['id'] > 0 and a['area'] == a['area'] for a in gt['annotations'])
    return gt


def evaluate_boxes(gt, table):
    E = evaluation.run_cocoeval(gt, table)
    assert evaluation.coco_summary(E).keys() == set(evaluation.KEYS)
    evaluation.best_f1(E)
    evaluation.duplicates(gt, table)


def use_labels(source):
    """What training, evaluation and `python data.py check` and `split` do with a label file."""
    table = labels.read_labels(source)
    gt = check_table(table)
    if len(table.names) < 100:                                         # pycocotools takes some 10 ms a class
        rows = [[i, 1, 1, 20, 20, 0.5, c] for i in table.image_ids for c in table.category_ids]
        evaluate_boxes(gt, np.array(rows, float))
        evaluation.under_occlusion(gt, np.array(rows, float))
    data = DetectionDataset(source, imgsz=(64, 64), augment=Augment(mixup=0.5))
    for epoch in range(2):
        sample = data[epoch, 0]
        assert sample['image'].shape == (3, 64, 64) and torch.isfinite(sample['boxes']).all()
    assert len(list(describe(data, 64))) > 3
    if source.endswith('.json'):
        labels.split_labels(labels.read_coco(source), 0.5)


def label_kind(folder, good, broken, value=None):
    """
    good: {path: text} of a set; broken: {path of it: what to give read_labels}, the files that get edits; value: what
    such a file holds, to be edited and written as json (which is yaml too).
    """
    for inner in ('JPEGImages',) if 'val.txt' in good else ('',):
        for name in ('a.png', 'b.png'):
            draw(os.path.join(folder, inner, name), 100, 80)
    walk = labels.walk_files

    def walk_inside(where, suffixes):                                  # a broken path may name the whole disk
        return walk(where, suffixes) if os.path.abspath(folder) in os.path.abspath(where) else []

    labels.walk_files = walk_inside

    def write_set(rng):
        for path, text in good.items():
            write(os.path.join(folder, path), text)
        path = rng.choice(list(broken))
        changed = mutate_text(good[path], rng)
        if value is not None and rng.random() < 0.7:
            changed = json.dumps(mutate_value(value if rng.random() < 0.7 else mutate_value(value, rng), rng))
        write(os.path.join(folder, path), changed)
        return os.path.join(folder, broken[path])

    return write_set, use_labels


LINES = '0 .5 .5 .2 .2\n1 0.1 0.2 0.5 0.2 0.3 0.8\n2 .5 .5 .1 .1\n'
YAML = 'path: .\ntrain: [., .]\nnc: 3\nnames:\n  0: a\n  1: "b c"\n  2: {d: e}\n'
XML = '<annotation><size><width>100</width><height>80</height></size>' + ''.join(
    f'<object><name>{name}</name><difficult>{i}</difficult><bndbox><xmin>{x}</xmin><ymin>1</ymin><xmax>{x + 9}</xmax>'
    '<ymax>9</ymax></bndbox></object>' for i, (name, x) in enumerate((('car', 1), ('bus', 50)))) + '</annotation>'


def coco_kind(folder):
    return label_kind(folder, {'set.json': json.dumps(coco_dict())}, {'set.json': 'set.json'}, coco_dict())


def yolo_kind(folder):
    good = {'a.txt': LINES, 'b.txt': LINES, 'classes.txt': 'a\nb\nc\n', 'lists/list.txt': '../a.png\n../b.png\n'}
    return label_kind(folder, good, {'a.txt': '', 'classes.txt': '', 'lists/list.txt': 'lists/list.txt'})


def yaml_kind(folder):
    good = {'a.txt': LINES, 'b.txt': LINES, 'data.yaml': YAML, 'bomb.yaml': BOMB + YAML}
    value = dict(path='.', train=['.', '.'], val='.', nc=3, names={0: 'a', 1: 'b c', 2: 'on'})
    return label_kind(folder, good, {'data.yaml': 'data.yaml', 'bomb.yaml': 'bomb.yaml'}, value)


def voc_kind(folder):
    return label_kind(folder, {'Annotations/a.xml': XML, 'Annotations/b.xml': XML, 'val.txt': 'a\nb\n'},
                      {'Annotations/a.xml': '', 'val.txt': 'val.txt'})


def image_kind(folder):
    """JPEG, PNG, BMP, WebP, TIFF in their modes."""
    rng, files = np.random.default_rng(0), {}
    picture = Image.fromarray(rng.integers(256, size=(40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, mode, more in (('a.jpg', 'RGB', dict(exif=exif)), ('b.jpg', 'L', {}), ('c.jpg', 'CMYK', {}),
                             ('d.jpg', 'RGB', dict(progressive=True)), ('a.png', 'RGB', {}), ('b.png', 'RGBA', {}),
                             ('c.png', 'P', dict(transparency=0)), ('d.png', '1', {}), ('e.png', 'I;16', {}),
                             ('a.bmp', 'RGB', {}), ('b.bmp', 'P', {}), ('a.webp', 'RGB', dict(exif=exif)),
                             ('a.tif', 'RGB', dict(compression='tiff_lzw')), ('b.tif', 'F', {}), ('c.tif', 'CMYK', {})):
        image = Image.fromarray((np.asarray(picture.convert('L')).astype(np.uint16) * 256)) if mode == 'I;16' \
            else picture.convert(mode)
        memory = io.BytesIO()
        image.save(memory, dict(jpg='JPEG', png='PNG', bmp='BMP', webp='WEBP', tif='TIFF')[name[2:]], **more)
        files[name] = memory.getvalue()

    def write_image(rng):
        name = rng.choice(list(files))
        data = mutate_bytes(files[name], rng)
        if name.endswith('png') and rng.random() < 0.7:
            data = png_checksums(data)
        return write(os.path.join(folder, name), data)

    def use_image(path):
        try:
            size = labels.image_size(path)
        except labels.IMAGE_ERRORS:
            size = None
        for image in (load_image(path), load_image(path, size, shrink=2)):
            assert image.mode == 'RGB' and letterbox(image, (64, 64))[0].shape == (64, 64, 3)

    return write_image, use_image


def rezip(data, rng):
    """The bytes of a .pt file whose pickle got edits; its checksums are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, 'w') as new:
        for name in old.namelist():
            inner = old.read(name)
            new.writestr(name, mutate_bytes(inner, rng, 2) if name.endswith('data.pkl') else inner)
    return out.getvalue()


def write_checkpoint(content, path, rng):
    memory, how = io.BytesIO(), rng.random()
    torch.save(mutate_value(content, rng) if how > 0.5 else content, memory)
    data = memory.getvalue()
    return write(path, mutate_bytes(data, rng) if how < 0.2 else rezip(data, rng) if how < 0.5 else data)


def checkpoint_kind(folder):
    torch.manual_seed(0)
    content = HSVDET(HSVDETConfig(num_classes=3, k=8)).checkpoint(AP=0.1, config={}, step=3, commit='')
    image = Image.new('RGB', (60, 40))

    def write_weights(rng):
        given = dict(content)
        if rng.random() < 0.5:                                         # the few settings as often as the many tensors
            given['model_config'] = mutate_value(dict(content['model_config']), rng)
        return write_checkpoint(given, os.path.join(folder, 'best.pt'), rng)

    def use_weights(path):
        model = evaluation.load_model(path)
        (rows,) = detect.detect_images(model, [image], imgsz=64, conf=0.0)
        assert rows.shape[1] == 6 and all(model.names[int(label)] for label in rows[:, 5])

    return write_weights, use_weights


def resume_kind(folder):
    """ckpt.pt and log.csv of a run, and one step more from them."""
    arguments = [*train_arguments(folder, 'run'), '--num_pictures=0', '--report=False']
    if not os.path.exists(f'{folder}/whole/ckpt.pt'):
        make_shapes(f'{folder}/data', train=8, val=2, size=64)
        code = start_train('', [*arguments, '--max_steps=2'], f'{folder}/train.txt')
        assert code == 0, f'{folder}/train.txt'
        os.replace(f'{folder}/run', f'{folder}/whole')
    content = torch.load(f'{folder}/whole/ckpt.pt', weights_only=True)
    with open(f'{folder}/whole/log.csv') as f:
        log = f.read()

    def write_run(rng):
        write(f'{folder}/run/log.csv', mutate_text(log, rng) if rng.random() < 0.3 else log)
        return write_checkpoint(content, f'{folder}/run/ckpt.pt', rng)

    def use_run(path):
        run_train('', [*arguments, '--max_steps=3', '--init_from=resume'])

    return write_run, use_run


def onnx_kind(folder):
    """One convolution with the outputs and the metadata of export.py: so small that edits hit the graph."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    weights = np.random.default_rng(0).normal(size=(7, 3, 8, 8)).astype(np.float32) / 8
    parts = [numpy_helper.from_array(array, name) for name, array in
             (('w', weights), ('shape', np.array([0, 7, -1])), ('split', np.array([4, 3])))]
    nodes = [helper.make_node('Conv', ['images', 'w'], ['maps'], strides=[8, 8]),
             helper.make_node('Reshape', ['maps', 'shape'], ['rows']),
             helper.make_node('Transpose', ['rows'], ['table'], perm=[0, 2, 1]),
             helper.make_node('Split', ['table', 'split'], ['boxes', 'logits'], axis=2),
             helper.make_node('Sigmoid', ['logits'], ['scores'])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in
            (('images', (1, 3, 64, 64)), ('boxes', (1, 64, 4)), ('scores', (1, 64, 3)))]
    model = helper.make_model(helper.make_graph(nodes, 'net', ends[:1], ends[1:], parts), ir_version=9,
                              opset_imports=[helper.make_opsetid('', 18)])
    metadata = dict(names='["a", "b", "c"]', imgsz='[64, 64]', nms='True', stride='32', arch='hsvdet')
    image = Image.new('RGB', (60, 40))

    def write_network(rng):
        values, how = dict(metadata), rng.random()
        if how < 0.4:
            key = rng.choice(list(values))
            value = json.dumps(mutate_value(json.loads(values[key]), rng)) if key in ('names', 'imgsz') else \
                rng.choice(('False', '', 'x', 'null'))
            values[key] = value if rng.random() < 0.6 else mutate_text(value, rng).decode('utf-8', 'ignore')
        helper.set_model_props(model, values)
        changed = onnx.ModelProto.FromString(model.SerializeToString())
        if 0.3 < how < 0.6:
            shape = rng.choice([*changed.graph.input, *changed.graph.output]).type.tensor_type.shape
            rng.choice(shape.dim).dim_value = rng.choice((-1, 0, 1, 2, 5, 32, 96, 2**31, 2**62))
        if 0.5 < how < 0.7:
            rng.choice([*changed.graph.input, *changed.graph.output]).type.tensor_type.elem_type = rng.randrange(18)
        data = changed.SerializeToString()
        return write(os.path.join(folder, 'best.onnx'), mutate_bytes(data, rng, 3) if how > 0.65 else data)

    def use_network(path):
        model = evaluation.load_model(path)
        (rows,) = detect.detect_images(model, [image], conf=0.0)
        assert rows.shape[1] == 6 and all(model.names[int(label)] for label in rows[:, 5])

    return write_network, use_network


def results_kind(folder):
    """Detections of another program, eval.py --from_json=."""
    gt = labels.ground_truth(coco_dict())
    value = [dict(image_id=1 + k % 2, category_id=1 + k % 3, bbox=[k, 2, 3, 4], score=k / 9) for k in range(6)]

    def write_results(rng):
        text = json.dumps(mutate_value(value, rng) if rng.random() < 0.8 else value)
        return write(os.path.join(folder, 'results.json'), text if rng.random() < 0.7 else mutate_text(text, rng))

    return write_results, lambda path: evaluate_boxes(gt, evaluation.read_detections(path, gt))


def list_kind(folder):
    """A list of images for detect.py."""
    draw(os.path.join(folder, 'a.png'), 60, 40)

    def use_list(path):
        readable = 0
        for file in detect.list_images(path):
            with contextlib.suppress(InputError):                      # detect.py names it and goes on
                readable += load_image(file).mode == 'RGB'
        if not readable:
            raise InputError('no image could be read')

    return lambda rng: write(os.path.join(folder, 'list.txt'), mutate_text('a.png\na.png\na.png\n', rng)), use_list


def video_kind(folder):
    """What detect.py does with a video but for the network: read all of it, write it again."""
    import av

    import video
    frames, files = np.random.default_rng(0).integers(256, size=(8, 48, 64, 3), dtype=np.uint8), {}
    os.makedirs(folder, exist_ok=True)
    for name, codec in (('a.mp4', 'h264'), ('b.avi', 'mpeg4'), ('c.mkv', 'mjpeg'), ('d.webm', 'libvpx')):
        path = os.path.join(folder, name)
        with av.open(path, 'w') as container:
            stream = container.add_stream(codec, 10)
            stream.width, stream.height = 64, 48
            stream.pix_fmt = 'yuvj420p' if codec == 'mjpeg' else 'yuv420p'
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            container.mux(stream.encode(None))
        with open(path, 'rb') as f:
            files[name] = f.read()

    def write_video(rng):
        name = rng.choice(list(files))
        return write(os.path.join(folder, name), mutate_bytes(files[name], rng))

    def use_video(path):
        again = os.path.join(folder, 'again.mp4')
        with video.VideoReader(path) as reader, video.VideoWriter(again, reader.rate) as writer:
            for _, seconds, image in reader:
                letterbox(image, (64, 64))
                writer.write(image, seconds)

    return write_video, use_video


KINDS = dict(coco=(350, coco_kind), yolo=(250, yolo_kind), yaml=(200, yaml_kind), voc=(200, voc_kind),
             image=(350, image_kind), checkpoint=(150, checkpoint_kind), resume=(40, resume_kind),
             onnx=(210, onnx_kind), video=(100, video_kind), results=(100, results_kind),
             list=(50, list_kind))                                     # cases of 2,000
EXTRAS = dict(onnx=('onnx', 'onnxruntime'), video=('av',))             # packages that a kind needs


# --- fuzz: running ----------------------------------------------------------------------------------------------------

def run_cases(kind, folder, numbers, seed, report):
    """In a process of its own: the cases, and before and after each a line of json to the file `report`."""
    _, prepare = KINDS[kind]
    write_case, use = prepare(folder)
    with open('/proc/self/statm') as f:
        taken = int(f.read().split()[0]) * resource.getpagesize()      # address space: what setrlimit can limit
    limit = taken + int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    faulthandler.register(signal.SIGXCPU, chain=True)                  # prints where it was, and dies
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n in numbers:
        print(json.dumps([n, 'began', '', 0]), file=report, flush=True)
        used = resource.getrusage(resource.RUSAGE_SELF)                # CPU time: a busy machine makes no case fail
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds + 1, -1))
        faulthandler.dump_traceback_later(30 * seconds, exit=True)     # and for what sleeps for ever
        outcome, message = 'accepted', ''
        path = write_case(random.Random(f'{seed} {kind} {n}'))
        try:
            use(path)
        except InputError as e:
            outcome, message = 'refused', str(e)
            if '\n' in message or not message:
                outcome = 'failed'
        except BaseException:                                          # SystemExit too
            outcome, message = 'failed', traceback.format_exc()
            shutil.copy(path, f'{folder}_{n}_{os.path.basename(path)}') if os.path.isfile(path) else None
        faulthandler.cancel_dump_traceback_later()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before                         # KiB
        print(json.dumps([n, outcome, message, grown]), file=report, flush=True)


def fuzz_kind(kind, folder, numbers, seed):
    """-> [(n, 'accepted', 'refused' or 'failed', message)], KiB by which the memory grew."""
    results, grown, numbers = [], 0, list(numbers)
    while numbers:
        out, into = os.pipe()
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            try:
                log = os.open(f'{folder}.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                with open(into, 'w') as report:
                    run_cases(kind, folder, numbers, seed, report)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(2)
        os.close(into)
        n, outcome = None, ''
        with open(out) as report:
            for line in report:
                n, outcome, message, more = json.loads(line)
                grown = max(grown, more)
                if outcome != 'began':
                    results.append((n, outcome, message))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if outcome == 'began':                                         # it died in this case
            with open(f'{folder}.txt', errors='replace') as f:
                message = 'more time than allowed' if code in (1, -signal.SIGXCPU) else f'the process ended with {code}'
                results.append((n, 'failed', f'{message}\n{f.read()[-2000:]}'))
        elif code:
            with open(f'{folder}.txt', errors='replace') as f:
                raise RuntimeError(f'{kind}: no case ran\n{f.read()[-2000:]}')
        numbers = [k for k in numbers if n is not None and k > n]
    return results, grown


def fuzz(folder, cases, seed):
    """-> the number of cases that failed."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    wanted, total, began = kinds.split(',') if kinds else list(KINDS), collections.Counter(), time.time()
    if unknown := set(wanted) - set(KINDS):
        raise InputError(f'--kinds={kinds}: there is no {min(unknown)}, there are {",".join(KINDS)}')
    for kind in [kind for kind in wanted if not all(map(importlib.util.find_spec, EXTRAS.get(kind, ())))]:
        print(f'{kind} is left out, it needs: pip install {" ".join(EXTRAS[kind])}')
        wanted.remove(kind)
    share = cases / sum(KINDS[kind][0] for kind in wanted)
    print(f'{"kind":<12}{"cases":>7}{"accepted":>10}{"refused":>9}{"failed":>8}{"seconds":>9}{"MiB more":>10}')
    for kind in wanted:
        started, numbers = time.time(), range(first, first + max(1, round(share * KINDS[kind][0])))
        results, grown = fuzz_kind(kind, os.path.join(folder, kind), numbers, seed)
        tally = collections.Counter(outcome for _, outcome, _ in results)
        total.update(tally, cases=len(results))
        print(f'{kind:<12}{len(results):>7}{tally["accepted"]:>10}{tally["refused"]:>9}{tally["failed"]:>8}'
              f'{time.time() - started:>9.1f}{grown / 1024:>10.0f}', flush=True)
        seen = set()
        with open(f'{os.path.join(folder, kind)}.results.txt', 'w', errors='backslashreplace') as f:
            for n, outcome, message in results:
                f.write(f'{kind} {n} {outcome} {message}\n')
                last = message.strip().split('\n')[-1][:200]
                if outcome == 'failed' and last[:60] not in seen:      # one of each
                    seen.add(last[:60])
                    print(f'  {kind} {n}: {last}'.encode('ascii', 'backslashreplace').decode(), flush=True)
    print(f'{"all":<12}{total["cases"]:>7}{total["accepted"]:>10}{total["refused"]:>9}{total["failed"]:>8}'
          f'{time.time() - began:>9.1f}')
    return total['failed']


if __name__ == '__main__':
    if sys.argv[1:2] == ['train']:                                     # a rank that torchrun started for `kill`
        run_train(sys.argv[2], sys.argv[3:])
        sys.exit()
    configure(globals(), positional='what')
    torch.set_num_threads(1)
    if what == 'kill':
        sys.exit(kill(os.path.join(out_dir, 'kill'), count or 20, seed) > 0)
    elif what == 'fuzz':
        sys.exit(fuzz(os.path.join(out_dir, 'fuzz'), count or 2000, seed) > 0)
    raise InputError('there are: python tests/reliability.py kill, python tests/reliability.py fuzz')

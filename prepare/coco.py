"""
Download COCO 2017 into data/coco: annotations, val2017 (5,000 images) and train2017 (118,287), or a seeded share of it.

    python -m prepare.coco --fraction=0.2        23,657 training images, about 5 GB: what config/hsvdet_coco20.py reads
    python -m prepare.coco                       all of it, about 21 GB

It goes image by image, because the server's other offer is one zip of 19 GB. What is there already stays, so the same
command continues after Ctrl-C or a lost network. A file is NAME.part until it is complete and checked. The annotation
files come last: where they are, their images are.
Left out: checksums (COCO publishes none), two downloads into one folder at the same time.
"""
import functools
import json
import os
import random
import shutil
import struct
import sys
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed

from PIL import Image
from tqdm import tqdm

from configurator import InputError, configure

try:
    import requests
except ImportError:                                                  # is said below
    requests = None

# settings
out = 'data/coco'
fraction = 1.0               # share of train2017, above 0 and up to 1
seed = 0                     # chooses the images of that share
jobs = 16                    # downloads at the same time, 1 to 64
base_url = 'http://images.cocodataset.org'
tries = 5                    # attempts after the first one failed

ARCHIVE = 'annotations/annotations_trainval2017.zip'
IMAGE_BYTES = 164e3          # what an image weighs on average
KEPT = 'what has arrived is kept, and the same command continues from there'


def file_size(path):
    return os.path.getsize(path) if os.path.isfile(path) else 0


def image_issue(path, width, height):
    """What is wrong with the file, '' if it is a whole image of the annotated size."""
    try:
        with Image.open(path) as image, open(path, 'rb') as f:
            image.load()                                               # decode all of it: finds cuts and garbage
            data = f.read()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as e:
        return f'broken image ({type(e).__name__})'
    # zeros in place of the end decode without complaint, so look for the end marker; not all are JPEGs:
    # train2017/000000320612.jpg is a PNG
    if image.format == 'JPEG' and b'\xff\xd9' not in data[len(data) // 2:]:
        return 'broken image (no end marker)'
    return '' if image.size == (width, height) else f'image of {image.size}, in the annotations {(width, height)}'


def zip_issue(path):
    return '' if zipfile.is_zipfile(path) else 'not a whole zip'       # reading it will compare the CRCs


def receive(session, url, path, issue_of, bar, stop):
    """One request for what NAME.part still lacks; NAME.etag says which version of the file that part is from."""
    part, etag, headers = path + '.part', path + '.etag', {}
    if file_size(part) and file_size(etag):
        with open(etag, encoding='utf-8') as f:                        # If-Range: another version comes from its start
            headers = {'Range': f'bytes={file_size(part)}-', 'If-Range': f.read()}
    with session.get(url, headers=headers, stream=True, timeout=(10, 30)) as answer:   # seconds: connect, silence
        if answer.status_code != 416 or not headers:                   # 416: nothing is missing but the check
            answer.raise_for_status()
            resumed = answer.status_code == 206
            with open(part, 'ab' if resumed else 'wb', buffering=0) as f:
                if not resumed:                                        # `part` is empty now: no new mark, old bytes
                    with open(etag, 'w', encoding='utf-8') as g:
                        g.write(answer.headers.get('ETag') or answer.headers.get('Last-Modified', ''))
                for chunk in answer.iter_content(1 << 13):             # bytes; a cut loses up to one chunk
                    bar.update(f.write(chunk))
                    if stop.is_set():
                        raise requests.RequestException('stopped')
    issue = issue_of(part)
    if issue:
        os.remove(part)                                                # all of it again
        raise requests.RequestException(issue)
    os.remove(etag)                                                    # first: nobody looks for it beside a whole file
    os.replace(part, path)


def fetch(name, path, issue_of, session, base_url, tries, pause, bar, stop):
    """One file. InputError once it is refused (404) or has failed tries + 1 times without a new byte."""
    failures, held = 0, file_size(path + '.part')
    while True:
        try:
            return receive(session, f'{base_url}/{name}', path, issue_of, bar, stop)
        except requests.RequestException as e:
            status = 500 if e.response is None else e.response.status_code
            # a lost connection is described in five nested brackets: its kind says enough
            reason = e if type(e) in (requests.HTTPError, requests.RequestException) else type(e).__name__
        failures = failures + 1 if file_size(path + '.part') <= held else 0
        held = max(held, file_size(path + '.part'))
        refused = 400 <= status < 500 and status not in (408, 429)
        if refused or failures > tries or stop.wait(pause * 2**failures / 2):
            raise InputError(f'{name}: {reason}; {KEPT}')


def fetch_all(files, jobs, expected_bytes, *how):
    """files: list of (name on the server, path here, check). All arrive, or InputError names one that did not."""
    failed, arrived, stop = [], 0, threading.Event()
    bar = tqdm(None, f'{len(files):,} files', expected_bytes, unit='B', unit_scale=True, disable=None)
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = [pool.submit(fetch, *file, *how, bar, stop) for file in files]
        for future in as_completed(futures):
            try:
                future.result()
                arrived += 1
            except InputError as e:
                failed.append(e)
                tqdm.write(str(e), sys.stderr)
                if len(failed) == 20:                                  # the network is dead: do not try 23,000 times
                    break
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        bar.close()
    if failed:
        raise InputError(f'{len(files) - arrived:,} of {len(files):,} files are missing, such as {failed[0]}')


def coco_subset(coco, fraction, seed):
    """A seeded share of the images with their annotations; it depends on the ids, the fraction and the seed only."""
    ids = sorted(image['id'] for image in coco['images'])
    chosen = set(random.Random(seed).sample(ids, max(1, round(fraction * len(ids)))))
    images = [image for image in coco['images'] if image['id'] in chosen]
    return {**coco, 'images': sorted(images, key=lambda image: image['id']),
            'annotations': [a for a in coco['annotations'] if a['image_id'] in chosen]}


def missing_files(coco, out):
    """coco: split -> COCO dict. -> list of (name on the server, path here, check), images not there yet."""
    files = []
    for split in coco:
        for image in coco[split]['images']:
            name = f'{split}2017/' + os.path.basename(image['file_name'])              # never outside of this folder
            path = os.path.join(out, 'images', name)
            if not file_size(path):                                    # an empty file is what a crash may leave
                check = functools.partial(image_issue, width=image['width'], height=image['height'])
                files.append((name, path, check))
    return files


def download_coco(out, fraction, seed, jobs, base_url, tries, pause=1.0):
    """
    Fill `out` with annotations/*.json, images/val2017 and a share of images/train2017 -> path of the training json.
    pause: seconds before the second attempt, twice as long before each further one. Raises InputError.
    """
    if not 0 < fraction <= 1 or not 1 <= jobs <= 64 or tries < 0:
        raise InputError(f'--fraction={fraction} must be in (0, 1], --jobs={jobs} in 1..64, --tries={tries} >= 0')
    if not base_url.startswith(('http://', 'https://')):
        raise InputError(f'--base_url={base_url} is not the address of a server, as http://images.cocodataset.org is')
    session = requests.Session()                                       # keeps connections open from file to file
    session.mount(base_url, requests.adapters.HTTPAdapter(pool_maxsize=jobs))
    session.headers['Accept-Encoding'] = 'identity'                    # byte ranges of the file itself, not of a gzip
    how = session, base_url.rstrip('/'), tries, pause
    archive = os.path.join(out, ARCHIVE)
    try:
        folders = [os.path.join(out, folder) for folder in ('images/train2017', 'images/val2017', 'annotations')]
        for folder in folders:
            os.makedirs(folder, exist_ok=True)
        there = sum(len(os.listdir(folder)) for folder in folders)
        needed = (118_287 * fraction + 5_000 - there) * IMAGE_BYTES + 0.8e9            # bytes; 0.8e9: annotations
        free = shutil.disk_usage(out).free
        if free < needed:
            raise InputError(f'{out}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} free; choose another --out')
        # 1) the annotations say which images there are; their outlines are most of the 469 MB, and not needed here
        if not file_size(archive):
            fetch_all([(ARCHIVE, archive, zip_issue)], 1, 253e6, *how)
        with zipfile.ZipFile(archive) as z:
            coco = {split: json.loads(z.read(f'annotations/instances_{split}2017.json'),
                                      object_hook=lambda x: {k: v for k, v in x.items() if k != 'segmentation'})
                    for split in ('val', 'train')}
        if fraction < 1:
            coco['train'] = coco_subset(coco['train'], fraction, seed)
        # 2) the images
        files, wanted = missing_files(coco, out), sum(len(part['images']) for part in coco.values())
        print(f'{wanted:,} images wanted, {wanted - len(files):,} of them are there')
        if files:
            fetch_all(files, jobs, len(files) * IMAGE_BYTES, *how)
        # 3) the annotation files: the archive's own as they are, or the subset
        share = '' if fraction == 1 else f'_{100 * fraction:g}' + (f'_seed{seed}' if seed else '')
        with zipfile.ZipFile(archive) as z:
            for member in ('annotations/instances_val2017.json', f'annotations/instances_train2017{share}.json'):
                path = os.path.join(out, member)
                with open(path + '.part', 'wb') as f:
                    f.write(z.read(member) if member in z.namelist() else json.dumps(coco['train']).encode())
                os.replace(path + '.part', path)
    except OSError as e:
        raise InputError(f'{out}: {e.strerror or e}; once that is fixed, the same command continues') from None
    except (zipfile.BadZipFile, zlib.error, KeyError) as e:
        raise InputError(f'{archive} is not the archive of COCO ({e}): delete it and run the same command') from None
    print(f'{path}: {len(coco["train"]["images"]):,} images, {len(coco["train"]["annotations"]):,} objects')
    return path


if __name__ == '__main__':
    configure(globals())
    if requests is None:
        raise InputError('prepare.coco needs a package that is not installed: pip install requests')
    try:
        path = download_coco(out, fraction, seed, jobs, base_url, tries)
    except KeyboardInterrupt:
        print(f'\ninterrupted; {KEPT}', file=sys.stderr, flush=True)
        os._exit(130)                                                  # a normal exit waits for threads, they for bytes
    if path == 'data/coco/annotations/instances_train2017_20.json':
        print('now: python train.py config/hsvdet_coco20.py')

"""
Label files, checked once: COCO json, YOLO txt and Pascal VOC xml become one table and a list of issues.

    labels = read_labels('data/shapes/train.json')
    labels = read_labels('my/data.yaml:val', names=train.names)        # classes in the order of the training set
    labels = read_labels('IDD_Detection/train.txt')                    # VOC by route: the Indian Driving Dataset
    labels.files[i], labels.sizes[i], labels.labels[i], labels.boxes[i];  labels.issues;  labels.coco()

A defect is counted, quoted once and left out, and the rest is used. Only a set of which nothing is left, or a file that
is no label file at all, raises InputError. Whoever takes the table need not check anything again.

What it deliberately does not do: masks, keypoints, rotated boxes (an outline in a YOLO file becomes its bounding box);
decoding images (at most their headers are read).

Formats: COCO (Lin et al. 2014), Pascal VOC (Everingham et al. 2010), YOLO's txt files (Redmon's Darknet).
"""
import json
import math
import os
import random
import re
import reprlib
import struct
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field

import numpy as np
import yaml
from PIL import Image

from configurator import InputError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, TypeError, AttributeError, struct.error,      # Pillow's
                Image.DecompressionBombError)
MIN_SIDE = 1e-3              # pixels: float32 could not tell the two sides of a smaller box apart
MAX_SIDE = 100_000           # pixels: a larger width or height of an image is a mistake in the label file
MAX_CLASSES = 100_000        # a larger class number is a mistake, and the list of names up to it would fill the memory
MAX_ID = 2**53               # ids pass through pycocotools as float64
LABELLED = ('name a labelled set there (train_data, val_data or --data), or make both parts of one labelled json with '
            'python data.py split my/all.json --val=0.2')

short = reprlib.repr         # any value, however long or deep, in a few words


# ------------------------------------------------------------------------------------------ values and files

def printable(text):
    """At most 300 characters that any terminal takes: the lone surrogates of odd file names are escaped."""
    return str(text)[:300].encode('utf-8', 'backslashreplace').decode()


def parse_floats(values):
    """The values, numbers or text, as a list of finite floats; an empty list if one of them is none."""
    try:
        values = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        return []
    return values if all(map(math.isfinite, values)) else []


def coco_bbox(annotation):
    """[x, y, w, h] of a COCO annotation as four finite floats, or an empty list. Text is no number here."""
    bbox = annotation.get('bbox')
    proper = isinstance(bbox, list) and len(bbox) == 4 and all(type(value) in (int, float) for value in bbox)
    return parse_floats(bbox) if proper else []


def is_id(value, ids):
    """Is the value, of whatever type, one of these ids?"""
    return type(value) in (int, float) and value in ids


def is_crowd(annotation):
    return annotation.get('iscrowd') not in (None, 0, '', '0')


def unique_names(pairs, source='', record_issue=lambda kind, example: None):
    """[(number, name)] as in a file -> {number: name}. Classes never merge: a second "car" becomes "car (id 7)"."""
    names, taken = {}, set()
    for number, name in pairs:
        if number in names:
            record_issue('category listed twice', f'{source}: id {number}, {short(name)}, the second left out')
            continue
        text = printable(name) if type(name) in (str, int, float) and str(name).strip() else f'class{number}'
        if text == f'class{number}' != name:
            record_issue('category without name', f'{source}: class {number} has {short(name)}, called {text}')
        while text in taken:
            text += f' (id {number})'
            record_issue('category name given twice', f'{source}: {short(name)}, the second called {text}')
        names[number] = text
        taken.add(text)
    return names


def read_text(path, errors='strict'):
    """A UTF-8 file, with or without byte order mark. Raises InputError (cannot be opened) or UnicodeDecodeError."""
    try:
        with open(path, encoding='utf-8-sig', errors=errors) as f:
            return f.read()
    except OSError as e:
        raise InputError(f'{path}: {e.strerror}, check the path') from None


def read_list(path):
    """The lines of a text file that are not empty, stripped."""
    try:
        return [line.strip() for line in read_text(path).split('\n') if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f'{path} is neither a COCO .json nor a .yaml, a folder, or a list of image files') from None


def list_folder(folder):
    """The names in a folder, sorted; none if it is missing or not readable."""
    try:
        return sorted(os.listdir(folder or '.'))
    except (OSError, ValueError):                                      # ValueError: NUL bytes, lone surrogates
        return []


def walk_files(folder, suffixes):
    """All files with these suffixes in a folder and the folders below it, links to folders included, sorted."""
    found, seen = [], set()
    for where, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:                                               # a link to a folder above it would never end
            below.clear()
            continue
        seen.add(real)
        found += [os.path.join(where, name) for name in names if name.lower().endswith(suffixes)]
    return sorted(found)


def upright_size(image):
    """
    (w, h) of an opened PIL image with its EXIF orientation applied. (Asking a PNG for EXIF would decode it; of a TIFF
    Pillow gives the upright size and pixels by itself.)
    """
    sideways = image.format not in ('PNG', 'TIFF') and image.getexif().get(0x0112) in (5, 6, 7, 8)
    return image.size[::-1] if sideways else image.size


def image_size(file):
    """Upright (w, h) from the header of an image file. Raises IMAGE_ERRORS."""
    with Image.open(file) as image:
        return upright_size(image)


# ------------------------------------------------------------------------------------------ the table

@dataclass
class Labels:
    """What `read_labels` returns: n images with m objects each; an image without objects has empty arrays."""
    source: str
    names: list = field(default_factory=list)                          # label -> class name
    category_ids: list = field(default_factory=list)                   # label -> id in a COCO file, else the label
    image_ids: list = field(default_factory=list)                      # n ids in a COCO file, else 0..n-1
    files: list = field(default_factory=list)                          # n paths
    sizes: list = field(default_factory=list)                          # (n, 2) int64 w, h in which the boxes are given
    labels: list = field(default_factory=list)                         # n arrays (m,) int64, crowds left out
    boxes: list = field(default_factory=list)                          # n arrays (m, 4) float32 xyxy, original pixels
    crowds: list = field(default_factory=list)                         # VOC's difficult objects: (row, label, xyxy)
    issues: dict = field(default_factory=dict)                         # {kind: [count, first example]}

    def record_issue(self, kind, example):
        self.issues.setdefault(kind, [0, printable(example)])[0] += 1

    def name_classes(self, own, names):
        """The classes: the names wanted, else the file's own {number: name}. -> {number in the file: label}"""
        self.names = list(names or own.values())
        self.category_ids = list(range(len(self.names)))
        label_of = {name: label for label, name in reversed([*enumerate(self.names)])}    # of equal names the first
        return {number: label_of[name] for number, name in own.items() if name in label_of}

    def find_size(self, file, *stated):
        """(w, h) as the labels state it, else from the file's header; None, and an issue, if there is none."""
        sides = [parse_floats([side]) for side in stated]
        if sides and all(side and side[0].is_integer() and 1 <= side[0] <= MAX_SIDE for side in sides):
            return int(sides[0][0]), int(sides[1][0])
        if None not in stated and stated:
            self.record_issue('wrong width or height', f'{file} is listed as {short(stated)}, its own size is used')
        try:
            if os.path.isfile(file):
                return image_size(file)
            self.record_issue('image missing', f'{file}, left out')
        except IMAGE_ERRORS as e:
            self.record_issue('image unreadable', f'{file} ({e}), left out')

    def add_image(self, image_id, file, size, objects, where):
        """One more image. Of its objects (label, x1, y1, x2, y2, number, crowd) the good ones, clipped to the image."""
        (w, h), kept = size, {}
        for label, x1, y1, x2, y2, number, crowd in objects:
            box, issue, action = (max(x1, 0), max(y1, 0), min(x2, w), min(y2, h)), '', 'dropped'
            if min(x2 - x1, y2 - y1) < MIN_SIDE:
                issue = 'box without area'
            elif min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE:
                issue = 'box outside its image'
            elif (label, box, crowd) in kept:
                issue, action = 'box given twice', 'the second dropped'
            else:
                kept[label, box, crowd] = True
                if max(-x1, -y1, x2 - w, y2 - h) > 1:                  # less is rounding
                    issue, action = 'box beyond the border', 'clipped'
            if issue:
                corners = f'{x1:.6g} {y1:.6g} {x2:.6g} {y2:.6g}'
                self.record_issue(issue, f'{where} {short(number)}: {corners} in {w}x{h}, {action}')
        self.crowds += [(len(self.files), label, box) for label, box, crowd in kept if crowd]
        self.labels.append(np.array([label for label, _, crowd in kept if not crowd], np.int64))
        self.boxes.append(np.array([box for _, box, crowd in kept if not crowd], np.float32).reshape(-1, 4))
        self.image_ids.append(image_id)
        self.files.append(file)
        self.sizes.append(size)

    def coco(self):
        """
        The ground truth as pycocotools wants it, of the classes `names`: a COCO file as it is, crowds too; YOLO and VOC
        converted.
        """
        if self.source.endswith('.json'):
            data = read_coco(self.source)                              # again: in memory it would cost gigabytes
            data['categories'] = [c for c in data['categories'] if c['id'] in self.category_ids]
            return ground_truth(data)
        images = [dict(id=row, file_name=file, width=w, height=h)
                  for row, (file, (w, h)) in enumerate(zip(self.files, self.sizes.tolist(), strict=True))]
        objects = [(row, label, box, 0) for row in self.image_ids
                   for label, box in zip(self.labels[row].tolist(), self.boxes[row].tolist(), strict=True)]
        objects += [(*crowd, 1) for crowd in self.crowds]
        annotations = [dict(image_id=row, category_id=label, bbox=[x1, y1, x2 - x1, y2 - y1], iscrowd=crowd)
                       for row, label, (x1, y1, x2, y2), crowd in objects]
        categories = [dict(id=label, name=name) for label, name in enumerate(self.names)]
        return ground_truth(dict(images=images, annotations=annotations, categories=categories))


# ------------------------------------------------------------------------------------------ COCO

def read_coco(path):
    """A COCO file as a dict whose images and categories have ids. Raises InputError."""
    try:
        data = json.loads(read_text(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as e:
        raise InputError(f'{path} is not valid JSON ({e}): write it again, or download it again') from None
    for key, fields in (('images', ('id', 'file_name')), ('annotations', ()), ('categories', ('id', 'name'))):
        entries = data.get(key) if isinstance(data, dict) else None
        if not isinstance(entries, list):
            raise InputError(f'{path} is not a COCO annotation file, it has no list "{key}": '
                             'give the json with images, annotations, categories')
        for entry in entries if fields else ():
            if not isinstance(entry, dict) or any(name not in entry for name in fields):
                raise InputError(f'{path}: {short(entry)} in "{key}" lacks {" or ".join(fields)}: correct that entry')
            if type(entry['id']) is not int or abs(entry['id']) >= MAX_ID:
                raise InputError(f'{path}: the id {short(entry["id"])} in "{key}" is not a whole number below 2**53, '
                                 f'as COCO wants it: number the {key}')
    return data


def ground_truth(data):
    """A COCO dict -> the part of it that pycocotools can evaluate, crowds included; its annotations change in place."""
    images = {entry['id'] for entry in data['images']}
    listed = {}
    for c in data['categories']:                                       # of two entries of one id the first counts
        listed.setdefault(c['id'], c)
    names = unique_names(sorted((id_, c['name']) for id_, c in listed.items()))
    annotations = [a for a in data['annotations'] if isinstance(a, dict) and coco_bbox(a)
                   and is_id(a.get('image_id'), images) and is_id(a.get('category_id'), names)]
    # pycocotools never counts an object of id 0 as found, nor two of one id apart
    ids = [a.get('id') for a in annotations]
    renumber = not all(type(i) is int and 0 < i < MAX_ID for i in ids) or len(set(ids)) < len(ids)
    for number, a in enumerate(annotations, 1):
        a['iscrowd'] = int(is_crowd(a))
        area = a.get('area')                                           # pycocotools ignores objects of a negative one
        if type(area) not in (int, float) or not parse_floats([area]) or area < 0:
            a['area'] = a['bbox'][2] * a['bbox'][3]
        if renumber:
            a['id'] = number
    categories = [dict(c, name=names[id_]) for id_, c in listed.items()]
    return dict(data, annotations=annotations, categories=categories, info=data.get('info', {}))


def find_images(source, file_names):
    """The folder in which the files of a COCO json lie, when nobody named it: the likely one beside it, or ''."""
    folder, stem = os.path.split(os.path.splitext(source)[0])
    # train2017_20.json, a part of prepare.coco, has the images of train2017; so has what data.py split makes
    stems = [stem, stem.removeprefix('instances_'), re.sub(r'^instances_|_(\d+|train|val)$', '', stem)]
    likely = [*(('images', s) for s in stems), ('images',), *((s,) for s in stems), (),
              *(('..', s) for s in stems), *(('..', 'images', s) for s in stems), ('..', 'images')]
    folders = [os.path.join(folder, *parts) for parts in likely]
    return next((f for f in folders if any(os.path.isfile(os.path.join(f, name)) for name in file_names[:100])), '')


def find_coco_images(table, entries, folder):
    """The images that are there, {id: (file, (w, h))}, and the ids of all that are listed."""
    found, listed, listings = {}, set(), {}
    for entry in entries:
        id_, name, size = entry['id'], entry['file_name'], None
        file = os.path.join(folder, name) if isinstance(name, str) else ''
        where, base = os.path.split(file)
        if where not in listings:                                      # one listing, not 118,287 questions
            listings[where] = set(list_folder(where))
        if id_ in listed:
            table.record_issue('image listed twice', f'{table.source}: id {id_}, {file}, the second left out')
        elif not file:
            table.record_issue('image without file name', f'{table.source}: id {id_} has {short(name)}, left out')
        elif base not in listings[where]:
            table.record_issue('image missing', f'{file}, image id {id_}, left out')
        else:
            size = table.find_size(file, entry.get('width'), entry.get('height'))
        if size:
            found[id_] = file, size
        listed.add(id_)
    return found, listed


def read_coco_set(table, folder, names):
    source, data = table.source, read_coco(table.source)
    # 1) category ids, with whatever gaps, to labels 0..K-1
    pairs = sorted(((c['id'], c['name']) for c in data['categories']), key=lambda pair: pair[0])
    own = unique_names(pairs, source, table.record_issue)
    label_of = table.name_classes(own, names)
    id_of, unused = {label: id_ for id_, label in label_of.items()}, max(own, default=0) + 1
    table.category_ids = [id_of.get(label, unused + label) for label in table.category_ids]
    # 2) the images
    files = [entry['file_name'] for entry in data['images'] if isinstance(entry['file_name'], str)]
    folder = folder or find_images(source, files)
    found, listed = find_coco_images(table, data['images'], folder)
    if not data['annotations']:
        raise InputError(f'{source} has no annotations, nothing to learn from or measure against: {LABELLED}')
    if not found:
        raise InputError(f'not one image of {source} found in {folder or "the folders beside it"}: name the folder '
                         f'that holds {printable((files or ["them"])[0])} (train_images, val_images or --images)')
    # 3) the annotations, each to its image
    objects = {id_: [] for id_ in found}
    for a in data['annotations']:
        if not isinstance(a, dict):
            table.record_issue('malformed annotation', f'{source}: {short(a)} in "annotations", dropped')
            continue
        image_id, category_id, box, issue = a.get('image_id'), a.get('category_id'), coco_bbox(a), ''
        if not is_id(image_id, listed):
            issue, reason = 'annotation without image', 'which is not listed'
        elif not box:
            issue, reason = 'annotation without a proper bbox', f'has {short(a.get("bbox"))}'
        elif not is_id(category_id, label_of):
            issue, reason = 'unknown category', f'has category_id {short(category_id)}'
        elif image_id in objects and not is_crowd(a):
            x, y, w, h = box
            objects[image_id].append((label_of[category_id], x, y, x + w, y + h, a.get('id'), False))
        if issue:
            example = f'{source}: annotation {short(a.get("id"))} of image {short(image_id)} {reason}, dropped'
            table.record_issue(issue, example)
    for id_, (file, size) in found.items():
        table.add_image(id_, file, size, objects[id_], f'{source}: image {id_}, annotation')


# ------------------------------------------------------------------------------------------ YOLO

def read_yaml(path):
    """
    A YOLO data file as a dict; its class names, a list or numbered, become [(number, name)] without gaps. BaseLoader
    leaves every value text: classes may be called on, off or 007, which safe_load reads as True, False and 7.
    """
    text = read_text(path, 'replace')
    try:
        keys = yaml.load(text, Loader=yaml.BaseLoader)
        keys = keys if isinstance(keys, dict) else {}
        names = keys.get('names') or []
        names = [names] if isinstance(names, str) else names
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        numbered = {int(number): name for number, name in pairs}
        if not all(0 <= number < MAX_CLASSES for number in numbered):
            raise ValueError(f'classes numbered {min(numbered)} to {max(numbered)}')
        return dict(keys, names=[(number, numbered.get(number)) for number in range(max(numbered, default=-1) + 1)])
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        reason = ' '.join(str(e).split())[:150]
        raise InputError(printable(f'{path} is no YOLO data file ({reason}): correct that line; names is a list, or '
                                   'numbered from 0, and names with : or # need quotes')) from None


def yolo_files(source):
    """The image files of a folder, or of its images/ if it has one, or of a .txt of paths."""
    if os.path.isdir(source):
        inner = os.path.join(source, 'images')
        return walk_files(inner if os.path.isdir(inner) else source, SUFFIXES)
    return [os.path.join(os.path.dirname(source), line) for line in read_list(source)]


def yaml_files(path, split, keys):
    """The image files of one split of a data yaml."""
    parts, base, here, files = keys.get(split) or [], keys.get('path', ''), os.path.dirname(path), []
    parts = [parts] if isinstance(parts, str) else parts
    if not parts or not isinstance(parts, list) or not all(isinstance(part, str) for part in [*parts, base]):
        raise InputError(f'{path} has no entry "{split}:" with the folder of its images: add it')
    for part in parts:                                                 # some tools write ../x for a folder x beside it
        likely = [os.path.join(here, base, part), os.path.join(here, part), os.path.join(base, part),
                  os.path.join(here, part.removeprefix('../'))]
        found = next((p for p in likely if os.path.isdir(p) or p.endswith('.txt') and os.path.isfile(p)), None)
        if found is None:
            raise InputError(printable(f'{path}: {split}: {part} is no folder or .txt (looked for {likely[0]}): '
                                       f'correct "path:" or "{split}:"'))
        files += yolo_files(found)
    return files


def names_nearby(table, folder):
    """[(number, name)] from classes.txt, names.txt or a data yaml, in the folder or up to two folders above it."""
    start = folder = os.path.abspath(folder)
    for _ in range(3):
        for path in (os.path.join(folder, name) for name in list_folder(folder)):
            if os.path.basename(path) in ('classes.txt', 'names.txt'):
                return list(enumerate(line.strip() for line in read_text(path, 'replace').split('\n') if line.strip()))
            try:
                maybe = path.endswith(('.yaml', '.yml')) and 'names' in read_text(path, 'replace')
                keys = read_yaml(path) if maybe else {}
            except InputError as e:                                    # it may be a file of another program
                table.record_issue('yaml unreadable', f'{e}, passed over')
                continue
            if keys.get('names') and ('train' in keys or 'nc' in keys):
                if folder != start:
                    table.record_issue('class names of a file further up', f'{path}, for {start}')
                return keys['names']
        folder = os.path.dirname(folder)
    return []


def yolo_labels(image):
    """.../images/train/a.jpg -> .../labels/train/a.txt; a.txt beside the image where no folder is called images."""
    head, found, tail = f'{os.sep}{os.path.splitext(os.path.normpath(image))[0]}'.rpartition(f'{os.sep}images{os.sep}')
    return (f'{head}{os.sep}labels{os.sep}{tail}' if found else tail)[1:] + '.txt'


def yolo_objects(table, txt, size, label_of, K):
    """The objects of a label file: lines "class cx cy w h" or "class x1 y1 x2 y2 x3 y3 ...", shares of the image."""
    (w, h), objects = size, []
    for number, line in enumerate(read_text(txt, 'replace').split('\n'), 1):
        values, where = parse_floats(line.split()), f'{txt}, line {number}'
        if not line.strip():
            continue
        if len(values) < 5 or len(values) % 2 == 0 or values[0] < 0 or values[0] % 1:
            table.record_issue('malformed line', f'{where}: "{line.strip()[:60]}" is not "class cx cy w h", dropped')
            continue
        label = label_of.get(values[0], K) if label_of is not None else int(values[0])
        if label >= K:
            table.record_issue('unknown category', f'{where} has class {values[0]:.6g} of {K}, dropped')
            continue
        if len(values) == 5:
            _, cx, cy, bw, bh = values
            x1, y1, x2, y2 = cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2
        else:
            xs, ys = values[1::2], values[2::2]
            x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
        objects.append((label, x1 * w, y1 * h, x2 * w, y2 * h, number, False))
    return objects


def read_yolo_set(table, names):
    """The labels of YOLO do not know the image sizes, so the header of every image is read."""
    data_yaml = re.fullmatch(r'(?s)(.+\.ya?ml)(?::(\w+))?', table.source)
    if data_yaml:
        keys = read_yaml(data_yaml[1])
        files, pairs = yaml_files(data_yaml[1], data_yaml[2] or 'train', keys), keys['names']
    else:
        files = yolo_files(table.source)
        pairs = names_nearby(table, table.source if os.path.isdir(table.source) else os.path.dirname(table.source))
    if not files:
        raise InputError(f'{table.source} holds no images ({" ".join(SUFFIXES)}): check the path')
    own = unique_names(pairs, table.source, table.record_issue)
    label_of = table.name_classes(own, names)
    for file in files:
        size, txt, objects = table.find_size(file), yolo_labels(file), []
        if not size:
            continue
        if os.path.isfile(txt):
            objects = yolo_objects(table, txt, size, label_of if own else None, len(table.names) or MAX_CLASSES)
        else:
            table.record_issue('image without label file', f'{file} has no {txt}, taken for an image without objects')
        table.add_image(len(table.files), file, size, objects, f'{txt}, line')
    if not table.names:
        top = max((int(labels.max()) for labels in table.labels if len(labels)), default=-1)
        table.name_classes({}, [f'class{i}' for i in range(top + 1)])


# ------------------------------------------------------------------------------------------ Pascal VOC

def voc_root(source):
    """The folder of Annotations/ and JPEGImages/ for a folder, or a .txt of paths without suffix; '' for other sets."""
    folders = [source]
    if not os.path.isdir(source):
        if not source.endswith('.txt') or any(line.lower().endswith(SUFFIXES) for line in read_list(source)):
            return ''
        here = os.path.dirname(os.path.abspath(source))
        folders = [here, os.path.dirname(here), os.path.dirname(os.path.dirname(here))]      # ImageSets/Main/val.txt
    return next((folder for folder in folders if {'Annotations', 'JPEGImages'} <= set(list_folder(folder))), '')


def voc_objects(table, xml):
    """The objects of one annotation file, with class names in place of labels, and its width and height as text."""
    text, objects = read_text(xml), []
    if '<!DOCTYPE' in text or '<!ENTITY' in text:                      # a few lines of entities expand to gigabytes
        raise ValueError('it declares a document type or entities')
    root = ElementTree.fromstring(text)
    for number, item in enumerate(root.findall('object'), 1):
        name = printable((item.findtext('name') or '').strip())
        box = parse_floats(item.findtext(f'bndbox/{key}') for key in ('xmin', 'ymin', 'xmax', 'ymax'))
        if name and box:
            difficult = (item.findtext('difficult') or '').strip().lower() in ('1', 'true')
            objects.append((name, *box, number, difficult))
        else:
            kind = 'annotation without a proper bbox' if name else 'malformed annotation'
            table.record_issue(kind, f'{xml}: object {number}, {name or "without name"}, dropped')
    return objects, (root.findtext('size/width'), root.findtext('size/height'))


def read_voc_set(table, root, names):
    """
    The path below JPEGImages/ and Annotations/ pairs image and xml; <filename>, wrong in many copied sets, is ignored.
    Corners are taken as they stand: the original VOC counts pixels from 1, most tools since from 0.
    """
    images, annotations, read = os.path.join(root, 'JPEGImages'), os.path.join(root, 'Annotations'), []
    files = {os.path.relpath(os.path.splitext(file)[0], images): file for file in walk_files(images, SUFFIXES)}
    if os.path.isdir(table.source):
        stems = {os.path.relpath(xml[:-4], annotations) for xml in walk_files(annotations, '.xml')}
        stems = sorted(stems.union(files))
    else:
        stems = [os.path.normpath(line) for line in read_list(table.source)]
    for stem in stems:
        xml, file, objects, stated = os.path.join(annotations, stem + '.xml'), files.get(stem), [], ()
        if file is None:
            table.record_issue('image missing', f'{os.path.join(images, stem)}, left out')
            continue
        try:
            if os.path.isfile(xml):
                objects, stated = voc_objects(table, xml)
            else:
                table.record_issue('image without label file', f'{file} has no {xml}, taken for one without objects')
        except (ValueError, ElementTree.ParseError) as e:              # taken for empty, it would teach wrongly
            table.record_issue('image with a broken label file', f'{xml} ({e}), left out')
            continue
        if size := table.find_size(file, *stated):
            read.append((file, size, objects, xml))
    own = sorted({name for _, _, objects, _ in read for name, *_ in objects})
    label_of = table.name_classes(dict(zip(own, own, strict=True)), names)
    for row, (file, size, objects, xml) in enumerate(read):
        for name, *_, number, _ in objects:
            if name not in label_of:
                table.record_issue('unknown category', f'{xml}: object {number} is a {name}, dropped')
        known = [(label_of[name], *rest) for name, *rest in objects if name in label_of]
        table.add_image(row, file, size, known, f'{xml}: object')


# ------------------------------------------------------------------------------------------ reading, splitting

def evaluation_part(source):
    """my/data.yaml -> my/data.yaml:val, unless a part is named: nobody measures on what was trained on by oversight."""
    return re.sub(r'\.ya?ml$', r'\g<0>:val', source)


def read_labels(source, images='', names=None):
    """
    The labels of a detection set as a `Labels` table. Raises InputError.

    source    a COCO .json; YOLO: a folder, a .txt of image paths, a data .yaml (data.yaml:val for its other part); VOC:
              a folder with Annotations/ and JPEGImages/, or a .txt beside them of paths without suffix
    images    folder of the images of a COCO json; '' looks in the likely places beside it
    names     class names in the order wanted (a validation set takes the training set's); default: as in the file, or
              sorted where it has no list of them (VOC)
    """
    source, images = os.fspath(source), os.fspath(images)
    if not os.path.exists(re.sub(r'(\.ya?ml):\w+$', r'\1', source)):
        makers = (('shapes', 'shapes'), ('long_range', 'long_range'), ('clips', 'clips'),
                  ('instances_train2017.json', 'coco'), ('coco', 'coco --fraction=0.2'))
        command = next((f'run: python -m prepare.{name}' for part, name in makers if part in source), 'check the path')
        raise InputError(printable(f'dataset {source} not found: {command}'))
    table = Labels(source)
    if source.endswith('.json'):
        read_coco_set(table, images, names)
    elif root := voc_root(source):
        read_voc_set(table, root, names)
    else:
        read_yolo_set(table, names)
    quoted = ''.join(f'; {kind}: {count}, such as {example}' for kind, (count, example) in table.issues.items())
    if not table.files:
        raise InputError(f'not one image of {source} can be used{quoted}: check the folder of the images')
    if not any(map(len, table.labels)):
        raise InputError(f'{source} has no usable annotations{quoted}: {LABELLED}')
    table.sizes = np.array(table.sizes, np.int64)                      # (n, 2) w, h
    return table


def split_labels(data, share, group_regex='', seed=0):
    """
    A COCO dict -> (train, val), two COCO dicts, val with about `share` of the images and of the objects of each class.
    Images whose file names agree in group_regex (in its first group, if it has one) stay together: frames of one video
    in both parts would flatter the score. An image without a match is a group of its own. Groups, in a seeded random
    order, change sides where that brings the shares nearer to `share` (squared error, summed over images and classes).
    """
    try:
        pattern = re.compile(group_regex)
    except re.error as e:
        raise InputError(f'--group={group_regex} is not a regular expression ({e}): correct it') from None
    group_of, rows = {}, {}                                            # image id -> row of its group; group -> row
    for entry in data['images']:
        match = pattern.search(str(entry['file_name']))
        text = (match[min(1, pattern.groups)] or match[0]) if match else ''
        if entry['id'] not in group_of:
            group_of[entry['id']] = rows.setdefault(text or entry['id'], len(rows))
    if not 0 < share < 1 or len(rows) < 2:
        raise InputError(f'--val={share} must lie between 0 and 1, and there must be 2 groups of images or more, '
                         f'here are {len(rows)}: choose another --val= or --group=')
    annotations = [a for a in data['annotations'] if isinstance(a, dict) and is_id(a.get('image_id'), group_of)]
    columns = {c['id']: column for column, c in enumerate(data['categories'], 1)}
    shares = np.zeros((len(rows), len(data['categories']) + 1))        # (groups, 1 + K): of all images, of each class
    for row in group_of.values():
        shares[row, 0] += 1
    for a in annotations:
        if is_id(a.get('category_id'), columns):
            shares[group_of[a['image_id']], columns[a['category_id']]] += 1
    shares /= shares.sum(0).clip(1)
    error, in_val = np.where(shares.any(0), -share, 0.0), np.zeros(len(rows), bool)       # error: (1 + K,) val - wanted
    for row in 3 * random.Random(seed).sample(range(len(rows)), len(rows)):                  # fill val, refine it twice
        after = error - shares[row] if in_val[row] else error + shares[row]
        if (after**2).sum() < (error**2).sum() and (in_val[row] or in_val.sum() < len(rows) - 1):
            error, in_val[row] = after, not in_val[row]
    if not in_val.any():                                               # every group was too large: the nearest
        in_val[((error + shares)**2).sum(1).argmin()] = True
    return tuple(dict(data, images=[entry for entry in data['images'] if in_val[group_of[entry['id']]] == side],
                      annotations=[a for a in annotations if in_val[group_of[a['image_id']]] == side])
                 for side in (False, True))

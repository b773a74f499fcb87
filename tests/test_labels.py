"""
Label files of three formats in one table; a defect gives an issue or a one-line error, never a traceback. (Files with
random edits are in tests/reliability.py.)
"""
import json
import os
import random

import numpy as np
import pytest
from PIL import Image

from configurator import InputError
from labels import evaluation_part, ground_truth, image_size, read_coco, read_labels, split_labels

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(ROOT, '..', 'shared', 'data')


def draw(path, w=100, h=80, **more):
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    Image.new('RGB', (w, h)).save(path, **more)


def write(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as f:
        f.write(text if isinstance(text, bytes) else text.encode())
    return str(path)


def write_coco(folder, images, annotations, categories=((1, 'a'),)):
    """images: [(id, file, w, h)], annotations: [(image, category, bbox, more)] -> path of the json."""
    data = dict(images=[dict(id=i, file_name=name, width=w, height=h) for i, name, w, h in images],
                annotations=[dict(id=k, image_id=i, category_id=c, bbox=box, **more)
                             for k, (i, c, box, more) in enumerate(annotations, 10)],
                categories=[dict(id=i, name=name) for i, name in categories])
    return write(os.path.join(folder, 'set.json'), json.dumps(data))


def counts(table):
    return {kind: count for kind, (count, _) in table.issues.items()}


def complaint(source, **more):
    with pytest.raises(InputError) as e:
        read_labels(str(source), **more)
    assert '\n' not in str(e.value)
    return str(e.value)


# ------------------------------------------------------------------------------------------ COCO

def test_ids_names_and_crowds(tmp_path):
    draw(tmp_path / 'x.png')
    draw(tmp_path / 'empty.png')
    path = write_coco(tmp_path, [(70, 'x.png', 100, 80), (8, 'empty.png', 100, 80)],
                      [(70, 90, [1, 2, 30, 40], {}), (70, 3, [50, 2, 30, 40], dict(iscrowd=1)),
                       (70, 17, [10, 10, 20, 20], dict(area=123.0))], [(90, 'zebra'), (3, 'ant'), (17, 'bee')])
    table = read_labels(path)
    assert table.names == ['ant', 'bee', 'zebra'] and table.category_ids == [3, 17, 90] and table.image_ids == [70, 8]
    assert table.labels[0].tolist() == [2, 1] and table.boxes[0].tolist() == [[1, 2, 31, 42], [10, 10, 30, 30]]
    assert table.labels[1].shape == (0,) and table.boxes[1].shape == (0, 4) and not table.issues
    assert table.labels[1].dtype == np.int64 and table.boxes[1].dtype == np.float32 and table.sizes.dtype == np.int64
    assert table.sizes.tolist() == [[100, 80]] * 2
    gt = table.coco()
    assert [a['iscrowd'] for a in gt['annotations']] == [0, 1, 0] and gt['annotations'][0]['category_id'] == 90
    assert [a['area'] for a in gt['annotations']] == [1200, 1200, 123.0]
    other = read_labels(path, names=['zebra', 'yak', 'ant'])           # the order of somebody else's training
    assert other.labels[0].tolist() == [0] and other.category_ids[0] == 90 and other.category_ids[2] == 3
    assert other.category_ids[1] not in (3, 17, 90) and counts(other) == {'unknown category': 1}
    gt = other.coco()                                                  # dropped there too
    assert [c['id'] for c in gt['categories']] == [90, 3] and [a['category_id'] for a in gt['annotations']] == [90, 3]


def test_every_box_and_image_defect_is_counted_and_quoted(tmp_path):
    draw(tmp_path / 'a.png')
    draw(tmp_path / 'b.png')
    images = [(1, 'a.png', 100, 80), (2, 'gone.png', 100, 80), (1, 'b.png', 100, 80), (3, 'nul\0.png', 100, 80),
              (4, '../../a.png', 100, 80), (5, 'odd\udcff.png', 100, 80)]
    boxes = [[10, 10, 20, 20], [10, 10, 0, 20], [10, 10, 20, -3], [-10, 70, 30, 30], [200, 10, 20, 20],
             [10, 10, 20, 20],
             [0, 0, None, 5], [0, 0, 5], [0, 0, float('nan'), 5], [-0.5, 0, 100.9, 80]]
    others = [(i, c, [0, 0, 5, 5], {}) for i, c in ((1, 99), (77, 1), (2, 1), ('1', 1), ([1], 1), (1, '1'))]
    table = read_labels(write_coco(tmp_path, images, [(1, 1, box, {}) for box in boxes] + others))
    assert counts(table) == {
        'image missing': 4, 'image listed twice': 1, 'unknown category': 2, 'annotation without image': 3,
        'annotation without a proper bbox': 3, 'box without area': 2, 'box beyond the border': 1,
        'box outside its image': 1, 'box given twice': 1}
    for kind, where in (('box without area', 'image 1, annotation 11'), ('unknown category', 'category_id 99'),
                        ('image missing', 'gone.png'), ('annotation without image', 'image 77')):
        assert where in table.issues[kind][1]
    assert table.boxes[0].tolist() == [[10, 10, 30, 30], [0, 70, 20, 80], [0, 0, 100, 80]]     # 0.9 px is rounding
    assert all(example.encode() for _, example in table.issues.values())                     # any terminal can print it


def test_strange_values_are_issues(tmp_path):
    """In fields of images, annotations and categories: null, text, nesting, the huge and the infinite."""
    draw(tmp_path / 'a.png')
    images = [dict(id=1, file_name='a.png', width=100, height=80), dict(id=2, file_name=None), dict(id=3, file_name=7)]
    good = dict(id=1, image_id=1, category_id=1, bbox=[1, 2, 3, 4])
    bad = [dict(good, bbox=bbox) for bbox in (None, '1234', ['1', '2', '3', '4'], [1, 2, 3, 4, 5], [1, 2, 3, 10**400],
                                              [1, 2, 3, float('inf')], {'x': 1}, 7)]
    far = [dict(good, bbox=[1e308, 0, 1e308, 5]), dict(good, bbox=[-1e308, 0, 9, 5])]
    odd = [dict(good, bbox=[5, 5, 9, 9], id=[1], area=None, iscrowd='0'),
           dict(good, bbox=[-1e308, -9e307, 1.7e308, 1.7e308])]
    data = dict(images=images, annotations=[good, 3, None, [good], *bad, *far, *odd],
                categories=[dict(id=1, name=None)])
    table = read_labels(write(tmp_path / 'set.json', json.dumps(data)))
    assert counts(table) == {'category without name': 1, 'image without file name': 2, 'malformed annotation': 3,
                             'annotation without a proper bbox': 8, 'box outside its image': 1, 'box without area': 1,
                             'box beyond the border': 1}
    assert table.names == ['class1'] and table.boxes[0].tolist() == [[1, 2, 4, 6], [5, 5, 14, 14], [0, 0, 100, 80]]
    gt = table.coco()
    assert [a['id'] for a in gt['annotations']] == [1, 2, 3, 4, 5]     # [1] is no id: numbered again
    assert gt['annotations'][3]['area'] == 81 and gt['annotations'][3]['iscrowd'] == 0
    assert gt['categories'] == [dict(id=1, name='class1')]


@pytest.mark.parametrize('width,height,issue', [
    (100, 80, 0), ('100', '80', 0), (100.0, 80, 0), (None, None, 0), (-3, 80, 1), (0, 0, 1),
    (1e9, 80, 1), ('wide', 80, 1),
    (100.5, 80, 1), (10**400, 80, 1), (float('nan'), 80, 1), ([100], 80, 1)])
def test_width_and_height_or_the_size_of_the_file(tmp_path, width, height, issue):
    draw(tmp_path / 'a.png')
    table = read_labels(write_coco(tmp_path, [(1, 'a.png', width, height)], [(1, 1, [0, 0, 500, 500], {})]))
    assert table.sizes.tolist() == [[100, 80]] and table.boxes[0].tolist() == [[0, 0, 100, 80]]
    assert counts(table).get('wrong width or height', 0) == issue


def test_classes_of_one_name_stay_apart(tmp_path):
    draw(tmp_path / 'a.png')
    path = write_coco(tmp_path, [(1, 'a.png', 100, 80)], [(1, c, [c, 1, 9, 9], {}) for c in (2, 7, 9)],
                      [(7, 'car'), (2, 'car'), (9, 'bus'), (9, 'van')])
    table = read_labels(path)
    assert table.names == ['car', 'car (id 7)', 'bus'] and table.labels[0].tolist() == [0, 1, 2]
    assert counts(table) == {'category name given twice': 1, 'category listed twice': 1}
    kept = ground_truth(read_coco(path))['categories']                 # of what is evaluated: the same, each once
    assert [(c['id'], c['name']) for c in kept] == [(7, 'car (id 7)'), (2, 'car'), (9, 'bus')]
    again = read_labels(path, names=['bus', *table.names[:2]])
    assert again.labels[0].tolist() == [1, 2, 0] and again.category_ids == [9, 2, 7]
    draw(tmp_path / 'yolo' / 'b.png')
    write(tmp_path / 'yolo' / 'classes.txt', 'car\ncar\n')
    write(tmp_path / 'yolo' / 'b.txt', '1 .5 .5 .5 .5\n')
    assert read_labels(str(tmp_path / 'yolo')).names == ['car', 'car (id 1)']


def test_ground_truth_is_what_pycocotools_needs(tmp_path):
    from pycocotools.coco import COCO
    draw(tmp_path / 'x.png')
    images, categories = [dict(id=0, file_name='x.png', width=100, height=80)], [dict(id=0, name='a')]
    annotations = [dict(id=k, image_id=i, category_id=0, bbox=[k, 0, 9, 9]) for k, i in enumerate((0, 0, 5))]
    path = write(tmp_path / 'set.json', json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    assert ground_truth(read_coco(path)) == read_labels(path).coco()
    annotations[1]['area'] = -81.0                                     # of a polygon that runs clockwise, say
    write(path, json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    assert [a['area'] for a in read_labels(path).coco()['annotations']] == [81, 81]
    coco = COCO()
    coco.dataset = read_labels(path).coco()
    coco.createIndex()
    assert sorted(coco.anns) == [1, 2]                                 # id 0 would never be counted as found
    found = [dict(image_id=0, category_id=0, bbox=[0, 0, 9, 9], score=1.0)]
    assert len(coco.loadRes(found).dataset['annotations']) == 1


def test_folder_of_the_images_is_found(tmp_path):
    for image, source in (('images/val2017/a.png', 'annotations/instances_val2017.json'), ('s/b.png', 's.json'),
                          ('images/train2017/c.png', 'annotations/instances_train2017_20.json'),
                          ('images/default/d.png', 'annotations/instances_default_val.json')):     # of data.py split
        draw(tmp_path / image)
        path = write_coco(tmp_path, [(1, os.path.basename(image), 100, 80)], [(1, 1, [0, 0, 9, 9], {})])
        os.makedirs(os.path.dirname(tmp_path / source), exist_ok=True)
        os.replace(path, tmp_path / source)
        table = read_labels(str(tmp_path / source))
        assert os.path.samefile(table.files[0], tmp_path / image)


# ------------------------------------------------------------------------------------------ YOLO

def test_yolo_lines_good_and_bad(tmp_path):
    for name in ('a', 'bare', 'none'):
        draw(tmp_path / 'images' / f'{name}.png', 100, 50)
    exif = Image.Exif()
    exif[0x0112] = 8
    draw(tmp_path / 'images' / 'turned.jpg', 100, 50, exif=exif)
    write(tmp_path / 'images' / 'broken.jpg', b'\xff\xd8\xff')
    write(tmp_path / 'classes.txt', '\ufeffdog\ncat\n')
    write(tmp_path / 'labels' / 'bare.txt', '\n')
    write(tmp_path / 'labels' / 'turned.txt', '\ufeff0 0.5 0.5 1 1\r\n')
    write(tmp_path / 'labels' / 'a.txt', '\n'.join([
        '0 0.5 0.5 0.2 0.4', '1 0.1 0.2 0.5 0.2 0.3 0.8', '', '7 0.5 0.5 0.2 0.4', '0 0.5 0.5 0.2', '0 x 0.5 0.2 0.1',
        '0.5 0.5 0.5 0.2 0.4', '0 0.5 0.5 0 0.4', '0 0.95 0.5 0.2 0.4', '0 0.5 0.5 0.2 0.4', '1 0.5 0.5 -0.2 0.4',
        '0 inf 0 1 1', '0 1e308 1 1e308 1', '1e300 0.5 0.5 0.1 0.1']))
    table = read_labels(str(tmp_path))
    assert [os.path.basename(f) for f in table.files] == ['a.png', 'bare.png', 'none.png', 'turned.jpg']
    assert table.names == ['dog', 'cat'] and table.category_ids == [0, 1] and table.labels[0].tolist() == [0, 1, 0]
    assert np.allclose(table.boxes[0], [[40, 15, 60, 35], [10, 10, 50, 40], [85, 15, 100, 35]], atol=1e-4)
    assert table.sizes[3].tolist() == [50, 100] and table.boxes[3].tolist() == [[0, 0, 50, 100]]
    assert image_size(str(tmp_path / 'images' / 'turned.jpg')) == (50, 100)
    assert counts(table) == {
        'malformed line': 4, 'unknown category': 2, 'box without area': 2, 'box beyond the border': 1,
        'box given twice': 1,
        'box outside its image': 1, 'image without label file': 1, 'image unreadable': 1}
    assert 'a.txt, line 5' in table.issues['malformed line'][1]
    assert 'a.txt, line 4' in table.issues['unknown category'][1]
    assert read_labels(str(tmp_path), names=['cat', 'dog']).labels[0].tolist() == [1, 0, 1]
    assert 'unknown category: 10' in complaint(tmp_path, names=['bird'])             # no class of the file is wanted
    gt = table.coco()
    assert np.allclose(gt['annotations'][0]['bbox'], [40, 15, 20, 20], atol=1e-4) and gt['annotations'][0]['id'] == 1
    assert gt['categories'][1] == dict(id=1, name='cat') and gt['images'][3]['width'] == 50


@pytest.mark.parametrize('text,wanted', [
    ('''names: ['traffic light, red', "dog's bed", 'car # parked']''',
     ['traffic light, red', "dog's bed", 'car # parked']),
    ('names: {0: a, 1: b, 3: d}', ['a', 'b', 'class2', 'd']), ('names:\n- a b\n- \'c\'', ['a b', 'c']),
    ('names:\n  0: a b\n  1: c # the last', ['a b', 'c']), ('names: [a b,\n  c]', ['a b', 'c']),
    ('names: [on, off, 007, 1.50, null]', ['on', 'off', '007', '1.50', 'null']), ('names: person', ['person']),
    ('names: [traffic light: red, b]', ['class0', 'b']), ('nc: 2', ['class0', 'class1']),
    ('names: []', ['class0', 'class1'])])
def test_yaml_as_people_write_it(tmp_path, text, wanted):
    draw(tmp_path / 'val' / 'images' / 'a.png')
    write(tmp_path / 'val' / 'labels' / 'a.txt', '0 .5 .5 .5 .5\n1 .5 .5 .2 .2\n')
    draw(tmp_path / 'x' / 'b.png')
    for part in ('val/images', '../val/images', '[val, x]'):           # the second as some tools write it, one too high
        path = write(tmp_path / 'data.yaml', f'# top\npath: .  # here\n{text}\nval: {part}\n')
        assert read_labels(f'{path}:val').names == wanted
    write(tmp_path / 'data.yaml', f'{text}\nval: val/images\nnc: 2\n')             # found above a folder, too
    assert read_labels(str(tmp_path / 'val')).names == wanted
    assert 'data.yaml has no entry "train:"' in complaint(path)
    assert read_labels(evaluation_part(path)).names == wanted and evaluation_part(f'{path}:test') == f'{path}:test'
    assert evaluation_part('val.json') == 'val.json'


def test_yaml_nobody_can_use(tmp_path):
    draw(tmp_path / 'images' / 'a.png')
    write(tmp_path / 'labels' / 'a.txt', '0 .5 .5 .5 .5\n')
    for text, words in (('names: [a', 'is no YOLO data file'), ('names: {first: a}\ntrain: images', 'numbered from 0'),
                        ('names: {1000000000: a}\ntrain: images', 'numbered 1000000000'), ('[' * 100_000, 'is no YOLO'),
                        ('names: {-1: a}\ntrain: images', 'numbered -1'), ('- a\n- b', 'no entry "train:"'),
                        ('train: {images: images}', 'no entry "train:"'),
                        ('names: &a [*a]', 'recursive'), ('train: data.yaml', 'is no folder'),
                        ('train: "nul\\0"', 'is no folder'), ('path: [a]\ntrain: images', 'no entry'),
                        ('a: "\\ud800"\ntrain: "\\udfff"', ''), (b'\x00\xff\x01', 'is no YOLO data file')):
        path = write(tmp_path / 'data.yaml', text)
        assert words in complaint(path), text
    write(tmp_path / 'data.yaml', 'names: [a')                         # found by searching, it may be another program's
    table = read_labels(str(tmp_path / 'images'))
    assert table.names == ['class0'] and counts(table) == {'yaml unreadable': 1}


def test_linked_folders_and_names_of_a_yaml_further_up(tmp_path):
    draw(tmp_path / 'elsewhere' / '2.png')
    draw(tmp_path / 'set' / 'images' / 'a' / '1.png')
    os.symlink(tmp_path / 'elsewhere', tmp_path / 'set' / 'images' / 'b')
    os.symlink(tmp_path / 'set' / 'images', tmp_path / 'set' / 'images' / 'a' / 'loop')
    for file in ('a/1', 'b/2'):
        write(tmp_path / 'set' / 'labels' / f'{file}.txt', '0 .5 .5 .5 .5\n')
    write(tmp_path / 'other.yaml', 'names: [x, y]\nnc: 2\n')
    table = read_labels(str(tmp_path / 'set'))
    assert [os.path.basename(file) for file in table.files] == ['1.png', '2.png'] and table.names == ['x', 'y']
    assert 'other.yaml, for' in table.issues['class names of a file further up'][1]


def test_list_of_images(tmp_path):
    draw(tmp_path / 'a.png')
    write(tmp_path / 'a.txt', '99999999999 .5 .5 .5 .5\n2 .5 .5 .5 .5')
    path = write(tmp_path / 'list.txt', 'a.png\n\n../../gone.png\nnul\0.png\n')
    table = read_labels(path)                                          # no names anywhere: the numbers are the classes
    assert table.names == ['class0', 'class1', 'class2'] and table.labels[0].tolist() == [2]
    assert counts(table) == {'unknown category': 1, 'image missing': 2}
    write(tmp_path / 'list.txt', b'\x89PNG\xff\x00')
    assert 'neither a COCO .json' in complaint(path)


# ------------------------------------------------------------------------------------------ Pascal VOC

def voc_xml(objects, size=(100, 80), more=''):
    """objects: [(name, (xmin, ymin, xmax, ymax), difficult)]"""
    parts = [f'<object>{f"<name>{name}</name>" if name else ""}<difficult>{difficult}</difficult><bndbox>'
             + ''.join(f'<{key}>{value}</{key}>'
                       for key, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), box, strict=True))
             + '</bndbox><part><name>head</name></part></object>' for name, box, difficult in objects]
    header = f'<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>' if size else ''
    return f'<annotation><filename>wrong.jpg</filename>{header}{"".join(parts)}{more}</annotation>'


def voc_set(folder, xmls):
    """xmls: {route/name: text} -> the folder, with an image for each."""
    for stem, text in xmls.items():
        draw(folder / 'JPEGImages' / f'{stem}.jpg')
        write(folder / 'Annotations' / f'{stem}.xml', text)
    return str(folder)


def test_voc_by_route(tmp_path):
    source = voc_set(tmp_path, {
        'day/000001_r': voc_xml([('rider', (10, 10, 30, 30), 0), ('car', ('40.5', '10.25', '90', '60'), 0)]),
        'night/000001_r': voc_xml([('car', (5, 5, 20, 20), 1), ('bus', (1, 1, 50, 50), 0)], size=None)})
    write(tmp_path / 'train.txt', 'day/000001_r\n')
    write(tmp_path / 'ImageSets' / 'Main' / 'val.txt', 'night/000001_r\nnowhere/1\n')
    table = read_labels(source)
    assert table.names == ['bus', 'car', 'rider'] and table.sizes.tolist() == [[100, 80]] * 2 and not table.issues
    assert [row.tolist() for row in table.labels] == [[2, 1], [0]]            # the difficult car stays out
    assert table.boxes[0].tolist() == [[10, 10, 30, 30], [40.5, 10.25, 90, 60]]
    gt = table.coco()
    assert [a['iscrowd'] for a in gt['annotations']] == [0, 0, 0, 1] and gt['annotations'][3]['bbox'] == [5, 5, 15, 15]
    assert gt['annotations'][3]['image_id'] == 1 and gt['annotations'][3]['category_id'] == 1
    train = read_labels(str(tmp_path / 'train.txt'), names=['train', 'car'])
    assert train.files == [os.path.join(str(tmp_path), 'JPEGImages', 'day', '000001_r.jpg')]
    assert train.names == ['train', 'car'] and train.labels[0].tolist() == [1]
    assert counts(train) == {'unknown category': 1}
    val = read_labels(str(tmp_path / 'ImageSets' / 'Main' / 'val.txt'))
    assert len(val.files) == 1 and counts(val) == {'image missing': 1} and 'nowhere' in val.issues['image missing'][1]


def test_voc_defects(tmp_path):
    laughs = '<!DOCTYPE x [<!ENTITY a "haha">' + ''.join(
        f'<!ENTITY {c} "{f"&{b};" * 10}">' for b, c in zip('abcdefgh', 'bcdefghi', strict=True)) + ']>'
    box = ('a', (1, 1, 9, 9), 0)
    source = voc_set(tmp_path, {
        'good': voc_xml([box, ('a', (90, 1, 300, 9), 0), ('a', (200, 1, 300, 9), 0), ('', (1, 1, 9, 9), 0),
                         ('a', ('x', 1, 9, 9), 0), ('a', ('nan', 1, 9, 9), 0),
                         ('a', (9, 9, 1, 1), 0)], more='<object/>'),
        'size': voc_xml([box], size=(0, 0)),
        'bomb': laughs + voc_xml([('&i;', (1, 1, 9, 9), 0)]), 'cut': voc_xml([box])[:-20],
        'outside': '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + voc_xml([('&a;', (1, 1, 9, 9), 0)]),
        'utf16': voc_xml([box]).encode('utf-16'), 'empty': '', 'deep': '<a>' * 100_000, 'nul': '\0'})
    draw(tmp_path / 'JPEGImages' / 'unlabelled.png')
    write(tmp_path / 'Annotations' / 'unknown' / 'route.xml', voc_xml([box]))
    table = read_labels(source)
    assert counts(table) == {
        'image with a broken label file': 7, 'image without label file': 1, 'image missing': 1,
        'wrong width or height': 1,
        'malformed annotation': 2, 'annotation without a proper bbox': 2, 'box without area': 1,
        'box outside its image': 1,
        'box beyond the border': 1}
    assert 'declares a document type' in table.issues['image with a broken label file'][1]
    assert [os.path.basename(f) for f in table.files] == ['good.jpg', 'size.jpg', 'unlabelled.png']
    assert table.boxes[0].tolist() == [[1, 1, 9, 9], [90, 1, 100, 9]] and table.sizes.tolist() == [[100, 80]] * 3


# ------------------------------------------------------------------------------------------ sentences

def test_one_sentence_for_each_mistake(tmp_path):
    for path, words in (('data/shapes/train.json', 'prepare.shapes'),
                        ('data/long_range/val.json', 'prepare.long_range'),
                        ('data/coco/annotations/instances_train2017_20.json', 'prepare.coco --fraction=0.2'),
                        ('data/coco/annotations/instances_train2017.json', 'prepare.coco')):
        assert complaint(tmp_path / path).endswith(f'run: python -m {words}')
    assert 'no.json not found: check the path' in complaint(tmp_path / 'no.json')
    assert 'not found' in complaint(tmp_path / 'nul\0.json')
    path, rest = tmp_path / 'x.json', '"annotations": [], "categories": []}'
    for text, words in (('{"images": [', 'x.json is not valid JSON'),
                        ('[' * 100_000, 'not valid JSON'), (b'\xff', 'JSON'),
                        ('9' * 5000, 'not valid JSON'),
                        ('[1, 2]', 'x.json is not a COCO annotation file, it has no list "images"'),
                        ('{"images": [{"id": 1}], ' + rest, 'lacks id or file_name'),
                        ('{"images": [1], ' + rest, 'lacks'),
                        ('{"images": [{"id": "one", "file_name": "a"}], ' + rest,
                         "the id 'one' in \"images\" is not a whole"),
                        ('{"images": [{"id": 1e99, "file_name": "a"}], ' + rest, 'is not a whole number'),
                        ('{"images": [{"id": 99999999999999999999, "file_name": "a"}], ' + rest, 'below 2**53')):
        assert words in complaint(write(path, text))
    path = write_coco(tmp_path, [(1, 'a.png', 9, 9)], [(1, 1, [0, 0, 5, 5], {})])
    assert 'not one image of' in complaint(path) and 'a.png' in complaint(path)
    assert 'nowhere' in complaint(path, images='nowhere')
    draw(tmp_path / 'a.png', 9, 9)
    assert len(read_labels(path, images=str(tmp_path)).files) == 1
    empty = complaint(write_coco(tmp_path, [(1, 'a.png', 9, 9)], []))
    assert 'has no annotations, nothing to learn from or measure against: name a labelled set' in empty
    assert 'python data.py split my/all.json --val=0.2' in empty
    flat = complaint(write_coco(tmp_path, [(1, 'a.png', 9, 9)], [(1, 1, [0, 0, 0, 5], {})]))
    assert 'has no usable annotations; box without area: 1, such as' in flat
    os.makedirs(tmp_path / 'hollow')
    assert 'holds no images' in complaint(tmp_path / 'hollow')
    os.makedirs(tmp_path / 'folder.json')
    assert 'folder.json: ' in complaint(tmp_path / 'folder.json')
    assert 'neither a COCO .json' in complaint(tmp_path / 'a.png')


# ------------------------------------------------------------------------------------------ splitting

def video_set(videos=40, frames=5, seed=0):
    rng = random.Random(seed)
    images = [dict(id=v * frames + f, file_name=f'video{v}_{f}.jpg') for v in range(videos) for f in range(frames)]
    kinds = [[c for c in (1, 2, 3) if rng.random() < 0.6 / c] for _ in range(videos)]        # a video has its classes
    annotations = [dict(id=1 + n, image_id=image['id'], category_id=c, bbox=[0, 0, 1, 1])
                   for n, (image, c) in enumerate((image, c) for image in images for c in kinds[image['id'] // frames])]
    return dict(images=images, annotations=annotations, categories=[dict(id=c, name=f'c{c}') for c in (1, 2, 3)])


def test_split_keeps_groups_and_balance():
    data = video_set()
    train, val = split_labels(data, 0.2, r'(video\d+)_', 3)
    groups = [{image['file_name'].split('_')[0] for image in part['images']} for part in (train, val)]
    assert not groups[0] & groups[1] and len(groups[0] | groups[1]) == 40
    assert len(train['annotations']) + len(val['annotations']) == len(data['annotations'])
    for part in (train, val):
        ids = {image['id'] for image in part['images']}
        assert all(a['image_id'] in ids for a in part['annotations']) and part['categories'] == data['categories']
    for c in (1, 2, 3):                                                # a video is up to 1/7 of the rarest class
        share, whole = (sum(a['category_id'] == c for a in part['annotations']) for part in (val, data))
        assert abs(share / whole - 0.2) < 0.1
    assert abs(len(val['images']) / len(data['images']) - 0.2) < 0.05
    assert split_labels(data, 0.2, r'(video\d+)_', 3) == (train, val) != split_labels(data, 0.2, r'(video\d+)_', 4)
    assert split_labels(data, 0.2, r'video\d+', 3) == (train, val)     # without a group of the regex, the match
    alone = split_labels(data, 0.2, 'nothing', 3)[1]['images']         # no match: each image on its own
    assert abs(len(alone) - 40) <= 1 and len({image['file_name'].split('_')[0] for image in alone}) > 12
    for share in (0.01, 0.99):                                         # neither part is ever empty
        assert all(part['images'] for part in split_labels(video_set(2), share, r'video\d+'))
    for more in (dict(share=0), dict(share=1), dict(group_regex='v'), dict(group_regex='(')):
        with pytest.raises(InputError):
            split_labels(data, **dict(dict(share=0.2), **more))


# ------------------------------------------------------------------------------------------ the real sets

@pytest.mark.skipif(not os.path.isdir(SHARED), reason='no ../shared/data here')
def test_real_sets():
    for name, images, objects, issues in (('coco/train', 60, None, 1), ('bccd/trainval', 292, 3943 - 2, 2),
                                          ('bccd/test', 72, 945, 0), ('cherries/test', 94, 1228, 0)):
        table = read_labels(os.path.join(SHARED, f'{name}.json'))
        assert len(table.files) == images and counts(table) == ({'box without area': issues} if issues else {})
        gt = table.coco()['annotations']
        assert sum(map(len, table.labels)) == (objects or len(gt) - issues - sum(a['iscrowd'] for a in gt))

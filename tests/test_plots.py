"""Pictures: sizes, a few pixels, and files that are there. Their look is not tested."""
import builtins
import csv

import numpy as np
import pytest
from PIL import Image

import plots
from configurator import InputError
from prepare import drawings

NAMES = ['left', 'right']


def test_boxes_have_their_class_colour_and_leave_the_image_alone():
    image = Image.new('RGB', (200, 100))
    page = plots.draw_boxes(image, np.array([[20, 30, 80, 90], [150.0, 0, 200, 40]]), [0, 1], NAMES)
    pixels = np.asarray(page)
    assert page.size == (200, 100) and not np.asarray(image).any()
    for x, y, label in ((20, 60, 0), (79, 60, 0), (50, 89, 0), (150, 30, 1), (199, 30, 1)):    # its last pixels
        assert tuple(pixels[y, x]) == plots.class_color(label), (x, y)
    assert not pixels[60, 50].any() and not pixels[60, 80].any() and not pixels[91:].any()      # inside, beyond
    assert len({plots.class_color(i) for i in range(80)}) == 80


def test_boxes_out_of_the_image_and_unknown_classes_are_drawn():
    boxes = [[-5, -5, 300, 300], [190, 95, 190, 95]]
    assert plots.draw_boxes(Image.new('L', (200, 100)), boxes, [7, 0], NAMES, [1, 0.5]).size == (200, 100)


def test_image_grid_enlarges_and_fills_rows():
    samples = [(np.full((3, 40, 80), 10 * n, np.uint8), np.array([[8.0, 8, 40, 30]]), [n % 2]) for n in range(5)]
    page = plots.image_grid(samples, NAMES, columns=2)
    assert page.size == (2 * 480, 3 * 240)                                               # 80 pixels six times as large
    assert page.getpixel((480 + 300, 2)) == (10, 10, 10) and page.getpixel((300, 240 + 2)) == (20, 20, 20)
    assert page.getpixel((48, 120)) == plots.class_color(0)                              # x1 = 8, six times
    assert page.getpixel((900, 700)) == (0, 0, 0)                                        # nothing at the sixth place


def test_save_image_makes_the_folder_and_names_a_bad_one(tmp_path, capsys):
    plots.save_image(Image.new('RGB', (4, 4)), str(tmp_path / 'a' / 'b.png'))
    assert (tmp_path / 'a' / 'b.png').exists() and 'b.png' in capsys.readouterr().out
    with pytest.raises(InputError, match='no_such_kind'):
        plots.save_image(Image.new('RGB', (4, 4)), str(tmp_path / 'b.no_such_kind'))


def test_tokens_selected_cells_stay_light_and_heat_is_red(tmp_path):
    # 100x50 in a letterbox of 64x64 at scale 0.64, 16 rows above: 2x2 cells of 32 input pixels, 50 of the image's
    path = str(tmp_path / 'tokens.png')
    image = Image.new('RGB', (100, 50), (200, 200, 200))
    arguments = (image, (0, 16), 0.64, (2, 2), 32, np.array([3, 0]))
    plots.draw_tokens(*arguments, np.array([0.9, 0.1]), 0, np.array([60.0, 5, 90, 45, 0.8, 1]), NAMES, path)
    page = Image.open(path)
    assert page.size == (200, 100)
    assert page.getpixel((25, 40)) == (200, 200, 200)                                    # cell 0: selected
    assert max(page.getpixel((75, 40))) < 70                                             # cell 1: not
    assert page.getpixel((25, 10)) == plots.PAD
    assert page.getpixel((100 + 0, 25)) == (255, 255, 255)                               # the focus has a white outline
    red, green, blue = page.getpixel((100 + 55, 65))
    assert red > 200 and green < 80 and blue < 80                                        # cell 3 got 0.9
    assert page.getpixel((100 + 60, 45)) == plots.class_color(1)                         # x1 of the box
    plots.draw_tokens(*arguments, None, None, None, NAMES, path)
    assert Image.open(path).size == (100, 100)                                           # nothing found: the left panel
    strip = Image.new('RGB', (320, 32))
    plots.draw_tokens(strip, (0, 0), 1.0, (2, 20), 16, np.arange(4), np.ones(4), 3, None, NAMES, path)
    assert Image.open(path).size == (320, 64)                                            # of a wide image: below


def write_log(path):
    columns = 'step', 'epoch', 'lr', 'box', 'one2one_cls', 'objects', 'grad_norm', 'gate_p5', 'share_p5', 'AP', 'AP50'
    with open(path, 'w', newline='') as f:
        log = csv.DictWriter(f, columns, restval='')
        log.writeheader()
        log.writerow(dict(step=0, epoch=0, lr=0, AP=0.1, AP50=0.2))
        log.writerow(dict(step=5, epoch=0.5, lr=0.01, box=2.5, one2one_cls='nan', gate_p5=0))
        log.writerow(dict(step=9, epoch=1, lr=0.02, box=2.1, one2one_cls=1, gate_p5=0.01, share_p5=0.2, AP=0.2,
                          AP50=0.3))


def test_panels_by_kind_of_column(tmp_path):
    log = 'step,epoch,box,gate_p4,share_p4,kept_p4,AP\n1,0.5,2,0.1,0.2,41,0.3\n4,'                      # broke off
    (tmp_path / 'log.csv').write_text(log)
    assert plots.log_panels(tmp_path / 'log.csv') == {
        'losses': {'box': [(0.5, 2)]}, 'AP': {'AP': [(0.5, 0.3)]}, 'gates': {'p4': [(0.5, 0.1)]},
        '|block(x) - x| / |x|': {'p4': [(0.5, 0.2)]}, 'tokens kept': {'p4': [(0.5, 41)]}}


def test_curves_with_empty_cells(tmp_path, monkeypatch):
    figures, new_figure = [], plots.new_figure
    monkeypatch.setattr(plots, 'new_figure', lambda *args: figures.append(new_figure(*args)) or figures[-1])
    write_log(tmp_path / 'log.csv')
    plots.draw_curves(tmp_path / 'log.csv', tmp_path / 'curves.png', 0.2, 0.8)
    assert (tmp_path / 'curves.png').stat().st_size > 1000
    panels = {ax.get_title(): [line for line in ax.lines if not line.get_label().startswith('_')]
              for ax in figures[0].axes}
    lines = {title: {line.get_label(): list(line.get_xdata()) for line in some} for title, some in panels.items()}
    assert lines == {'losses': {'box': [0.5, 1], 'one2one_cls': [0.5, 1]}, 'AP': {'AP': [0, 1], 'AP50': [0, 1]},
                     'learning rate': {'lr': [0, 0.5, 1]}, 'gates': {'p5': [0.5, 1]},
                     '|block(x) - x| / |x|': {'p5': [1]}}
    (tmp_path / 'log.csv').write_text('step,epoch,lr\n')                                 # a run that has just begun
    plots.draw_curves(str(tmp_path / 'log.csv'), str(tmp_path / 'curves.png'), 0.2, 0.8)


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith('matplotlib'):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', missing)
    write_log(tmp_path / 'log.csv')
    plots.draw_curves(tmp_path / 'log.csv', tmp_path / 'curves.png', 0, 1)
    assert 'pip install matplotlib' in capsys.readouterr().out and not (tmp_path / 'curves.png').exists()
    with pytest.raises(InputError, match='pip install matplotlib'):
        plots.draw_confusion(np.eye(3, dtype=int), NAMES, tmp_path / 'confusion.png')


def test_evaluation_plots(tmp_path, monkeypatch):
    figures, new_figure = [], plots.new_figure
    monkeypatch.setattr(plots, 'new_figure', lambda *args: figures.append(new_figure(*args)) or figures[-1])
    recall, curves = np.linspace(0, 1, 101), np.stack((np.linspace(1, 0, 101), np.ones(101)), 1)
    plots.draw_precision_recall(recall, curves, NAMES, [0.5, 1.0], tmp_path / 'pr.png')
    plots.draw_precision_recall(recall, curves[:, :0], [], [], tmp_path / 'pr.png')      # no class has an object
    assert [line.get_label() for line in figures[0].axes[0].lines] == ['left 0.500', 'right 1.000', 'all 0.750']
    plots.draw_confusion(np.eye(3, dtype=int), ['a$b^$', 'c'], tmp_path / 'confusion.png')                # no formula
    plots.draw_confusion(np.array([[5, 1, 2], [0, 7, 0], [3, 0, 0]]), NAMES, tmp_path / 'confusion.png')
    ax = figures[-1].axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('predicted', 'true')
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [*NAMES, 'background']
    numbers = {text.get_position(): text.get_text() for text in ax.texts}
    assert numbers[2, 0] == '2' and numbers[0, 2] == '3' and len(numbers) == 5           # x predicted, y true
    rows = [{'level': level, 'N': n, 'full ms': n * n, 'fast ms': n} for level in ('P4', 'P5') for n in (100, 400)]
    plots.draw_attention_cost(rows, tmp_path / 'cost.png', 'c = 512')
    assert len(figures[-1].axes[0].lines) == 4


def test_readme_drawings(tmp_path):
    (tmp_path / 'results.csv').write_text('arm,seed,AP\n---,0,0.3\n---,1,0.4\nfull,0,0.99\n')
    bars = drawings.read_results(tmp_path / 'results.csv')
    assert bars == {'---': [0.3, 0.4], 'full': [0.99]}
    boxes = [(4, 4, 28, 28), (1500, 3, 1520, 23)]
    drawings.draw_long_range(Image.new('RGB', (2048, 32)), boxes, [0, 1], NAMES, bars, tmp_path / 'long_range.png')
    drawings.draw_network(tmp_path / 'network.png')
    drawings.draw_block(tmp_path / 'block.png')
    for name in ('network', 'block', 'long_range'):
        assert Image.open(tmp_path / f'{name}.png').width == 1600
    (tmp_path / 'results.csv').write_text('arm,seed\nfull,0\n')
    with pytest.raises(InputError, match='under AP'):
        drawings.read_results(tmp_path / 'results.csv')

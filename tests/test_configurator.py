"""Settings: what is accepted, what is refused, and that every shipped config fits train.py."""
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import InputError, build, configure, print_error
from data import Augment

ROOT = Path(__file__).parents[1]


def settings():
    return dict(lr=1e-3, epochs=10, name='out', on=False, imgsz=640, source='', _hidden=1, path=Path,
                __annotations__={'imgsz': int | tuple})


def test_overrides(tmp_path):
    (tmp_path / 'c.py').write_text('lr = lr / 2\nepochs = 20\n')
    space = settings()
    argv = [str(tmp_path / 'c.py'), '--epochs=30', '--name=2024', '--on=True', '--imgsz=(1088, 1920)']
    got = configure(space, argv=argv)
    assert got == dict(lr=5e-4, epochs=30, name='2024', on=True, imgsz=(1088, 1920), source='')
    assert space['epochs'] == 30 and space['_hidden'] == 1
    assert configure(settings(), argv=['--lr=1'])['lr'] == 1.0
    assert configure(settings(), positional='source', argv=['a.jpg'])['source'] == 'a.jpg'
    with pytest.raises(InputError, match='b.jpg: source is a.jpg already, and takes one'):        # an unquoted *.jpg
        configure(settings(), positional='source', argv=['a.jpg', 'b.jpg'])
    either = dict(layers='all', __annotations__=dict(layers=str | tuple))
    for text, value in (('some', 'some'), ('(1, 2)', (1, 2))):
        assert configure(dict(either), argv=[f'--layers={text}'])['layers'] == value


@pytest.mark.parametrize('argv, sentence', [
    (['--lrr=1'], 'unknown setting "lrr", did you mean "lr"'),
    (['--_hidden=1'], 'unknown setting'),
    (['--lr=fast'], "lr must be float, got 'fast'"),
    (['--epochs=1.5'], 'epochs must be int, got 1.5'),
    (['--on=1'], 'on must be bool'),
    (['--epochs=True'], 'epochs must be int, got True'),
    (['--imgsz=1.5'], 'imgsz must be int or tuple'),
    (['--lr'], 'settings are written --key=value'),
    (['stray'], 'neither a config file'),
    (['config/shape.py'], 'config/shape.py not found, did you mean config/shapes.py'),
], ids=str)
def test_refusals(argv, sentence, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=sentence.replace('(', r'\(')):
        configure(settings(), argv=argv)


@pytest.mark.parametrize('text, sentence', [
    ('lrr = 1', 'unknown setting "lrr"'),
    ('lr = "x"', 'lr must be float'),
    ('x = (', r'line 1: SyntaxError'),
    ('lr = 1\nlr = nothing', 'line 2: NameError'),
])
def test_config_file_errors_name_the_file(tmp_path, text, sentence):
    (tmp_path / 'c.py').write_text(text)
    with pytest.raises(InputError, match=sentence) as e:
        configure(settings(), argv=[str(tmp_path / 'c.py')])
    assert 'c.py' in str(e.value)


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('*.py')), ids=lambda p: p.name)
def test_shipped_configs_fit(path, tmp_path, monkeypatch):
    """train.py takes every setting of the file and builds its network's config; it ends where the data is missing."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    monkeypatch.setattr(sys, 'argv', ['train.py', str(path), f'--train_data={tmp_path}/none.json', '--device=cpu',
                                      f'--out_dir={tmp_path}', '--memory_cap_gb=0.0'])
    with pytest.raises(InputError, match='none.json not found'):
        runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')
    text = path.read_text()
    assert text.startswith('# ') and f'config/{path.name}' in text, 'begins with what it is and its command'


def test_dataclasses_are_settings():
    space = settings()
    config = configure(space, Augment, argv=['--mosaic=0.5', '--lr=1e-2'])
    assert build(Augment, config).mosaic == 0.5 and config['flip'] == Augment.flip and space['flip'] == Augment.flip
    assert type(build(Augment, dict(config, mosaic=1)).mosaic) is float
    with pytest.raises(InputError, match="Augment: mosaic must be float, got 'x' .str."):
        build(Augment, dict(mosaic='x'))                              # as a damaged checkpoint may say
    with pytest.raises(InputError, match='unknown setting "mosiac", did you mean "mosaic"'):
        configure(settings(), Augment, argv=['--mosiac=1.0'])
    with pytest.raises(InputError, match='mosaic must be float'):
        configure(settings(), Augment, argv=['--mosaic=much'])


def test_lenient_passes_over_names_in_files_only(tmp_path):
    (tmp_path / 'c.py').write_text('momentum = 0.9\nepochs = 3\n')
    assert configure(settings(), lenient=True, argv=[str(tmp_path / 'c.py')])['epochs'] == 3
    with pytest.raises(InputError, match='unknown setting'):
        configure(settings(), lenient=True, argv=['--momentum=0.9'])


def test_out_of_memory_keeps_its_line(capsys):
    class OutOfMemoryError(RuntimeError):
        pass
    try:
        raise OutOfMemoryError('CUDA out of memory')
    except OutOfMemoryError as e:
        print_error(type(e), e, e.__traceback__)
    said = capsys.readouterr().err
    assert "raise OutOfMemoryError('CUDA out of memory')" in said and '--grad_accum' in said


def test_what_a_loader_process_says_is_one_sentence(capsys):
    said = ('Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\n'
            'configurator.InputError: not one image can be used\n')
    print_error(InputError, InputError(said), None)
    assert capsys.readouterr().err == 'error: not one image can be used\n'


def test_scripts_answer_in_one_sentence():
    done = subprocess.run([sys.executable, 'train.py', '--bogus=1'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == (
        'error: --bogus=1: unknown setting "bogus"; the settings are the names at the top of train.py and the fields '
        'of data.Augment, model.HSVDETConfig, baselines.detr.DETRConfig\n')

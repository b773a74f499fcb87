"""benches/experiment.py: what is there is not run again, seeds are paired, and every figure is eval.py's."""
import csv
import glob
import os
import runpy
import shlex
import subprocess
import sys
import threading

import pytest
import torch

from baselines.detr import DETRConfig
from benches import experiment
from configurator import InputError, build, configure
from data import Augment
from model import HSVDETConfig
from prepare.shapes import make_shapes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_table(monkeypatch, capsys):
    monkeypatch.setattr(experiment, 'arms', (('a', ''), ('b', ''), ('c', '')))
    rows = [dict(dict.fromkeys(experiment.METRICS, ''), arm=arm, seed=str(seed), AP=str(ap))
            for arm, aps in dict(a=(0.5, 0.6, 0.7), b=(0.51, 0.62, 0.73)).items() for seed, ap in enumerate(aps)]
    experiment.print_table(rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == 'a: 3 seeds | AP 0.6 ± 0.1' and lines[3].startswith('c: 0 seeds')
    # differences 0.01, 0.02, 0.03: mean 0.02, standard error 0.01 / sqrt(3), t = 3.46 with 2 degrees: p = 0.074
    assert lines[4] == 'AP of b - a: +0.0200 ± 0.0058 (standard error, 3 pairs), p = 0.074'
    assert len(lines) == 5


def test_a_row_is_run_once(monkeypatch, tmp_path):
    ran = []
    monkeypatch.chdir(tmp_path)
    for key, value in dict(name='e', train='x.py', test=__file__, arms=(('a', ''), ('b', ''))).items():
        monkeypatch.setattr(experiment, key, value)
    monkeypatch.setattr(experiment, 'train_and_evaluate',
                        lambda arm, more, seed: ran.append((arm, seed)) or dict(arm=arm, seed=seed, AP=0.5))
    monkeypatch.setattr(experiment, 'seeds', (0,))
    experiment.main()
    monkeypatch.setattr(experiment, 'seeds', (0, 1))
    monkeypatch.setattr(experiment, 'only', 'b')
    experiment.main()
    assert ran == [('a', 0), ('b', 0), ('b', 1)]
    monkeypatch.setattr(experiment, 'only', 'b,c')
    with pytest.raises(InputError, match='e has no arm c, it has a, b'):
        experiment.main()
    with open(tmp_path / 'results' / 'e.csv', newline='') as f:
        assert [(row['arm'], row['seed'], row['AP']) for row in csv.DictReader(f)] == [
            ('a', '0', '0.5000'), ('b', '0', '0.5000'), ('b', '1', '0.5000')]


@pytest.mark.parametrize('settings,says', [
    (dict(arms=('a', '--attn=---')), 'of one arm too'),
    (dict(arms=(('a', ''), ('a', '-'))), 'two arms have one name, rename one: a, a'),
    (dict(test='nowhere.json'), 'not there: nowhere.json'), (dict(only='c'), 'no arm c')])
def test_mistakes_are_found_before_hours_are_spent(monkeypatch, tmp_path, settings, says):
    monkeypatch.chdir(tmp_path)
    for key, value in (dict(name='e', train='x.py', test=__file__, arms=(('a', ''), ('b', ''))) | settings).items():
        monkeypatch.setattr(experiment, key, value)
    with pytest.raises(InputError, match=says):
        experiment.main()


def test_an_edited_config_file_starts_afresh_and_sets_the_old_run_aside(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ran = []

    def run(script, arguments, log, spent=os.devnull):
        ran.append('--init_from=resume' in arguments)
        saved = dict(step=7, total_steps=20, config=dict(max_steps=0))
        torch.save(saved, os.path.join(os.path.dirname(log), 'ckpt.pt'))
        with open(spent, 'a') as f:
            f.write('6.0 6.0\n')

    for key, value in dict(name='e', train='x.py', test=__file__, run=run).items():
        monkeypatch.setattr(experiment, key, value)
    for base in ('lr = 1', 'lr = 1', 'lr = 2'):
        (tmp_path / 'x.py').write_text("exec(open('base.py').read())\n")
        (tmp_path / 'base.py').write_text(base)
        with pytest.raises(InputError, match='stopped at step 7'):
            experiment.train_and_evaluate('a', '', 0)
    assert ran == [False, True, False] and (tmp_path / 'out/experiments/e/a_0/before_ckpt.pt').exists()


def test_only_blocks_that_an_arm_has_are_taken_out(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    evaluated = []

    def run(script, arguments, log, spent=os.devnull):
        if script == 'eval.py':
            evaluated.append([a for a in arguments if a.startswith('--without')])
        else:
            saved = dict(step=2, total_steps=2, config=dict(max_steps=0, batch_size=8), commit='', model={},
                         model_config=dict(attn=arguments[1].partition('=')[2]))
            torch.save(saved, os.path.join(os.path.dirname(log), 'ckpt.pt'))
            for path, text in ((spent, '6.0 6.0\n'), (log, '; cpu float32; 2 steps\n')):
                with open(path, 'a') as f:
                    f.write(text)
        return '{"AP": 0.5}'

    for key, value in dict(name='e', train='x.py', test=__file__, run=run, without='block4,p5').items():
        monkeypatch.setattr(experiment, key, value)
    for attn in ('---', '--S', '-S-', '-SS'):
        experiment.train_and_evaluate(attn, f'--attn={attn}', 0)
    assert evaluated == [[], [], ['--without=p5'], [], ['--without=block4'], [], ['--without=block4,p5']]


def test_several_runs_at_a_time(monkeypatch, tmp_path):
    """Both of the first two must be there at once, or neither goes on; an error ends it, and what was done is kept."""
    barrier = threading.Barrier(2, timeout=20)
    monkeypatch.chdir(tmp_path)

    def run(arm, of_arm, seed):
        if arm == 'c':
            raise InputError('c is broken')
        barrier.wait()
        return dict(arm=arm, seed=seed, AP=0.5)

    for key, value in dict(name='e', train='x.py', test=__file__, arms=(('a', ''), ('b', ''), ('c', '')), seeds=(0,),
                           jobs=2, train_and_evaluate=run).items():
        monkeypatch.setattr(experiment, key, value)
    with pytest.raises(InputError, match='c is broken'):
        experiment.main()
    assert sorted(row['arm'] for row in experiment.read_rows(tmp_path / 'results' / 'e.csv')) == ['a', 'b']
    monkeypatch.setattr(experiment, 'jobs', 0)
    with pytest.raises(InputError, match='--jobs=0: must be at least 1'):
        experiment.main()


def test_a_run_that_was_stopped_is_no_row(monkeypatch, tmp_path):
    """train.py ends with 0 after Ctrl-C, too: its half-trained weights must not be evaluated."""
    monkeypatch.chdir(tmp_path)
    ran, config = [], {}

    def run(script, arguments, log, spent=os.devnull):
        ran.append((script, *arguments[:1], '--init_from=resume' in arguments))
        with open(spent, 'a') as f:
            f.write('6.0 6.0\n')
        torch.save(dict(step=7, total_steps=20, config=config), os.path.join(os.path.dirname(log), 'ckpt.pt'))
        return '{}'

    for key, value in dict(name='e', train='x.py', test=__file__, run=run).items():
        monkeypatch.setattr(experiment, key, value)
    for max_steps, last in ((0, 20), (9, 9)):
        config['max_steps'] = max_steps
        with pytest.raises(InputError, match=f'a, seed 0: stopped at step 7 of {last}; the same command goes on'):
            experiment.train_and_evaluate('a', '', 0)
    with pytest.raises(InputError):
        experiment.train_and_evaluate('a', '--lr=1', 0)                # an arm that was edited does not go on with it
    assert [resumed for _, _, resumed in ran] == [False, True, False]
    monkeypatch.setattr(experiment, 'run', lambda *_: 1 / 0)                    # broken off before train.py has tidied
    with pytest.raises(ZeroDivisionError):
        experiment.train_and_evaluate('a', '--lr=2', 0)
    assert not (tmp_path / 'out/experiments/e/a_0/ckpt.pt').exists()
    assert not (tmp_path / 'out/experiments/e/a_0/seconds.txt').exists()
    monkeypatch.setattr(experiment, 'run', run)
    with pytest.raises(InputError):
        experiment.train_and_evaluate('a', '--lr=1', 0)
    with open(tmp_path / 'out/experiments/e/a_0/seconds.txt') as f:
        assert f.read() == '6.0 6.0\n'


def test_an_interrupted_run_leaves_its_seconds(monkeypatch, tmp_path):
    wait, calls = os.wait4, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return wait(*args)

    monkeypatch.setattr(os, 'wait4', interrupted)
    (tmp_path / 'train.py').write_text('print("saved")\n')
    with pytest.raises(KeyboardInterrupt):
        experiment.run(str(tmp_path / 'train.py'), [], str(tmp_path / 'log'), str(tmp_path / 'spent'))
    assert len((tmp_path / 'spent').read_text().split()) == 2 and (tmp_path / 'log').read_text() == 'saved\n'


@pytest.mark.parametrize('file', sorted(glob.glob(os.path.join(ROOT, 'experiments', '*.py'))), ids=os.path.basename)
def test_every_arm_has_settings_of_train_py(monkeypatch, file):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)                                # configure() replaces it
    with open('train.py', encoding='utf-8') as f:
        settings, found = f.read().partition('\nconfig = configure(')[:2]
    assert found
    plan = runpy.run_path(file)
    for arm, of_arm in plan['arms']:
        namespace = dict(__name__='settings')
        exec(settings, namespace)
        argv = shlex.split(f'{plan["train"]} {of_arm.format(seed=0)}')
        config = configure(namespace, Augment, HSVDETConfig, DETRConfig, argv=argv)
        assert config['warmup_epochs'] + config['no_aug_epochs'] <= config['epochs'], arm
        build(DETRConfig if config['arch'] == 'rtdetr' else HSVDETConfig, config)


@pytest.mark.slow
def test_end_to_end(tmp_path):
    make_shapes(str(tmp_path / 'shapes'), 8, 4, 64, 0)
    file = tmp_path / 'tiny.py'
    file.write_text(f"name = 'tiny'\ntrain = 'config/shapes.py --imgsz=64 --epochs=2 --warmup_epochs=0 --make_data= "
                    f"--train_data={tmp_path}/shapes/train.json --val_data={tmp_path}/shapes/val.json'\n"
                    f"arms = (('sparse', '--attn=-SS'), ('none', '--attn=---'))\nseeds = (0,)\n"
                    f"without = 'block4,block5'\n"
                    f"test = '{tmp_path}/shapes/val.json'\n")
    os.makedirs(tmp_path / 'work')
    for folder in ('config', 'train.py', 'eval.py'):
        os.symlink(os.path.join(ROOT, folder), tmp_path / 'work' / folder)
    run = subprocess.run([sys.executable, '-m', 'benches.experiment', str(file), '--jobs=2', '--more=--momentum=0.8'],
                         cwd=tmp_path / 'work', text=True, capture_output=True, env=os.environ | dict(PYTHONPATH=ROOT))
    assert run.returncode == 0, run.stderr
    with open(tmp_path / 'work' / 'results' / 'tiny.csv', newline='') as f:
        row, other = sorted(csv.DictReader(f), key=lambda row: row['arm'], reverse=True)
    assert row['train'].endswith('--attn=-SS --momentum=0.8') and other['train'].endswith('--attn=--- --momentum=0.8')
    assert not other['AP without'] and other['parameters'] < row['parameters']
    assert int(row['steps']) == 2 and int(row['images']) == 16 and row['AP without'] and float(row['minutes']) > 0

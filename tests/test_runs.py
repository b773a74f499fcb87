"""benches/runs.py on made-up runs, whole and broken; benches/speedrun.py with a made-up train.py, once with ours."""
import csv
import importlib.util
import os
import sys
import time

import pytest
import torch

from benches import runs, speedrun
from configurator import InputError

BASE = dict(seed=0, out_dir='x', epochs=2, max_steps=0, lr=0.01, attn='-SS', init_from='scratch', num_classes=3)


def write_run(folder, scores, columns='step,epoch,lr,AP,AP50', **config):
    """A folder as train.py leaves it: a loss line and an evaluation for each of `scores`, (step, epoch, AP)."""
    os.makedirs(folder)
    lines = [columns, *(f'{step},{epoch},0.1,,\n{step},{epoch},0.1,{AP},{AP + 0.2}' for step, epoch, AP in scores)]
    (folder / 'log.csv').write_text('\n'.join(lines) + '\n')
    torch.save(dict(config=BASE | config, total_steps=10), folder / 'best.pt')
    return str(folder)


def rows_of(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, 'out', str(tmp_path / 'bench/runs'))
    return tmp_path / 'bench'


def test_groups_are_runs_that_differ_by_seed_only(tmp_path, out, capsys):
    a = write_run(tmp_path / 'a', [(5, 1, 0.3), (10, 2, 0.5)])
    b = write_run(tmp_path / 'b', [(5, 1, 0.8), (10, 2, 0.7)], seed=1, workers=4, out_dir='y',
                  init_from='resume', report=False)
    c = write_run(tmp_path / 'c', [(5, 1, 0.1)], lr=0.02)
    assert runs.read_settings(write_run(tmp_path / 'd', [], max_steps=100))[1] == 10              # it ends before those
    runs.main([a, b, c])
    rows = {os.path.basename(row['run']): row for row in rows_of(out / 'runs.csv')}
    assert [rows[name]['group'] for name in 'abc'] == ['0', '0', '1'] and rows['b']['seed'] == '1'
    assert rows['a']['settings'] == 'lr=0.01' and rows['c']['settings'] == 'lr=0.02'
    assert [rows['b'][key] for key in ('last', 'best', 'best epoch', 'steps')] == ['0.7', '0.8', '1.0', '10']
    assert [rows[name]['finished'] for name in 'abc'] == ['True', 'True', 'False']
    said = capsys.readouterr().out
    assert '0.6000 ± 0.1414' in said and '0.6500 ± 0.2121' in said and said.count('unfinished') == 1
    if importlib.util.find_spec('matplotlib'):
        assert (out / 'runs.png').read_bytes()[:4] == b'\x89PNG'


def test_broken_runs_are_named_and_the_rest_is_shown(tmp_path, out, capsys, monkeypatch):
    a = write_run(tmp_path / 'a', [(5, 1, 0.3)])
    with open(tmp_path / 'a/log.csv', 'a') as f:
        f.write('6,1.2,0.1,\n7,1.')                                    # the machine went off
    (tmp_path / 'a/best.pt').write_bytes(b'half a file')
    os.makedirs(tmp_path / 'empty')
    older = write_run(tmp_path / 'older', [], columns='step,epoch,mAP', max_steps=3)
    torch.save(dict(model={}), tmp_path / 'older/best.pt')             # no settings in it
    binary = tmp_path / 'binary'
    os.makedirs(binary)
    (binary / 'log.csv').write_bytes(b'\0\xff\n\0')
    runs.main([a, str(tmp_path / 'empty'), older, str(binary), a])
    said = capsys.readouterr().out
    assert 'empty has no log.csv: passed over' in said and 'not a complete checkpoint' in said
    rows = rows_of(out / 'runs.csv')
    assert [(row['last'], row['evaluations']) for row in rows] == [('0.3', '1'), ('', '0'), ('', '0')]
    assert rows[0]['steps'] == '6' and rows[0]['settings'].startswith('unknown: ')
    for folders, words in (([], 'name the folders'), (['nowhere'], 'nowhere is no folder'),
                           ([str(tmp_path / 'empty')], 'not one of the 1 folders has a log.csv')):
        with pytest.raises(InputError, match=words):
            runs.main(folders)
    monkeypatch.setattr(runs, 'out', str(tmp_path / 'a/log.csv/x'))
    with pytest.raises(InputError, match='cannot be written'):
        runs.main([a])


# --- speedrun ---------------------------------------------------------------------------------------------------------

LINE = ('epoch {e:.2f} | AP 0.{ap}00 AP50 0.{ap}50 AP75 0.0100 | best 0.{ap}00 | gate_p4 +0.002 | 1.8 s evaluating | '
        '{e:.2f} min of training so far')
TRAIN = '''
import signal, sys, time
stopped = []
signal.signal(signal.SIGTERM, lambda *a: stopped.append(1))
print('train: 8 images', sys.argv[1:], flush=True)
for e, ap in ((1, 1), (2, 3), (3, 2), (4, 5)):
    print(LINE.format(e=e, ap=ap), flush=True)
    until = time.time() + WAIT
    while time.time() < until and not stopped:
        time.sleep(0.01)
    if stopped or '--break=True' in sys.argv:
        print('SIGTERM at step 3: saved')
        sys.exit('--break=True' in sys.argv)
'''


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A train.py of four evaluations, a minute of training each, that leaves on SIGTERM."""

    def run(*arguments, wait=0.0, **settings):
        (tmp_path / 'train.py').write_text(TRAIN.replace('LINE', repr(LINE)).replace('WAIT', str(wait)))
        for name, value in dict(dict(seeds=(0, 1), until='AP50:0.3', threads=1), **settings).items():
            monkeypatch.setattr(speedrun, name, value)
        speedrun.main(list(arguments))
        return rows_of(tmp_path / 'results/speedrun.csv')

    monkeypatch.chdir(tmp_path)
    return run


def test_speedrun_counts_training_seconds_and_goes_on(fake, tmp_path, capsys):
    rows = fake('config/x.py')
    assert [(row['seed'], row['seconds'], row['epoch'], row['best AP50']) for row in rows] == [
        ('0', '120.0', '2.0', '0.55'), ('1', '120.0', '2.0', '0.55')]
    assert 'reached by 2 of 2 seeds: mean 120.0 s' in capsys.readouterr().out
    assert "'--seed=1', '--out_dir=out/speedrun/1'" in (tmp_path / 'out/speedrun/1/train.txt').read_text()
    before = (tmp_path / 'results/speedrun.csv').stat().st_mtime_ns
    assert fake('config/x.py') == rows and (tmp_path / 'results/speedrun.csv').stat().st_mtime_ns == before
    assert len(fake('config/x.py', '--lr=0.1', seeds=(0,))) == 3       # another command is another series
    rows = fake('config/x.py', until='AP:0.9', seeds=(0,))
    assert rows[-1]['seconds'] == '' and rows[-1]['best AP'] == '0.5'
    assert 'reached by 0 of 1 seeds of training' in capsys.readouterr().out


def test_speedrun_stops_a_run_that_is_there(fake):
    started = time.time()
    (row,) = fake('config/x.py', seeds=(0,), stop=True, wait=60, until='AP50:0.1')
    assert row['seconds'] == '60.0' and row['best AP50'] == '0.15' and time.time() - started < 50


def test_speedrun_refuses_in_one_sentence(fake, tmp_path):
    for arguments, settings, words in (
            (['config/x.py'], dict(until='AP75:0.5'), 'write AP or AP50, a colon'),
            (['config/x.py'], dict(until='AP50:90'), 'write AP or AP50, a colon'),
            ([], {}, 'what shall be trained'), (['config/x.py', '--seed=3'], {}, '--seed=3 is chosen here'),
            (['--break=True'], {}, 'ended with 1: SIGTERM at step 3: saved .all of it: out/speedrun/0/train.txt')):
        with pytest.raises(InputError, match=words):
            fake(*arguments, **settings)
    assert not (tmp_path / 'results').exists()


@pytest.mark.slow
def test_speedrun_understands_train(tmp_path, monkeypatch):
    """What our train.py prints is what `parse_line` reads."""
    from prepare.shapes import make_shapes
    make_shapes(str(tmp_path / 'data'), train=8, val=2, size=64)
    monkeypatch.setattr(speedrun, 'out', str(tmp_path / 'speedrun.csv'))
    monkeypatch.setattr(speedrun, 'until', 'AP:0')
    monkeypatch.setattr(speedrun, 'seeds', (7,))
    monkeypatch.setattr(speedrun, 'threads', 1)
    monkeypatch.setattr(sys, 'argv', ['speedrun.py'])
    speedrun.main([f'--train_data={tmp_path}/data/train.json', f'--val_data={tmp_path}/data/val.json', '--imgsz=64',
                   '--device=cpu', '--epochs=2', '--warmup_epochs=0', '--no_aug_epochs=0', '--batch_size=4', '--k=8'])
    (row,) = rows_of(tmp_path / 'speedrun.csv')
    assert row['seed'] == '7' and float(row['seconds']) < float(row['clock seconds']) and row['epoch'] == '1.0'

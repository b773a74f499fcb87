"""tests/reliability.py in small: that it finds what it looks for, and that what it looks for is not there."""
import os
import random
import signal
import subprocess
import sys

import pytest
import reliability
import torch

from configurator import InputError

ROOT = reliability.ROOT
linux = pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='needs /proc and fork')


def run(*arguments):
    command = [sys.executable, 'tests/reliability.py', *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@linux
def test_failures_of_every_sort_are_found(tmp_path, monkeypatch, capfd):
    """Planted: a bug, a message of two lines, a crash of the interpreter, an endless loop, a memory blow-up."""
    def use(path):
        with open(path) as f:
            fault = f.read()
        if fault == 'bug':
            raise KeyError(fault)
        if fault == 'lines':
            raise InputError('two\nlines')
        if fault == 'crash':
            os.kill(os.getpid(), signal.SIGKILL)
        while fault == 'loop':
            pass
        if fault == 'memory':
            bytearray(2**30)
        if fault == 'exit':
            raise SystemExit
        if fault == 'refused':
            raise InputError('the file is refused')

    def planted(folder):
        return lambda rng: reliability.write(f'{folder}/case.txt', rng.choice(faults)), use

    faults = ['bug', 'lines', 'crash', 'loop', 'memory', 'exit', 'refused', 'accepted']
    expected = [random.Random(f'72 planted {n}').choice(faults) for n in range(16)]
    assert set(expected) == set(faults)
    for name, value in dict(seconds=1, gigabytes=0.5, kinds='planted', KINDS=dict(planted=(1, planted))).items():
        monkeypatch.setattr(reliability, name, value)
    fine = expected.count('refused') + expected.count('accepted')
    assert reliability.fuzz(str(tmp_path / 'fuzz'), 16, 72) == 16 - fine
    said = capfd.readouterr().out
    for words in ("KeyError: 'bug'", 'planted', ': lines', ': MemoryError', ': SystemExit'):
        assert words in said
    text = (tmp_path / 'fuzz/planted.results.txt').read_text()
    assert text.count('the process ended with -9') == expected.count('crash')
    assert text.count('more time than allowed') == expected.count('loop')
    assert [line.split()[2] == 'failed' for line in text.splitlines() if line.startswith('planted ')] == [
        fault not in ('refused', 'accepted') for fault in expected]


def test_one_bit_is_a_difference(tmp_path):
    a = dict(model=dict(w=torch.ones(3)), optimizers=[dict(state={0: dict(m=torch.zeros(2))})], step=3)
    b = dict(a, optimizers=[dict(state={0: dict(m=torch.tensor([0.0, 1e-45]))})])
    assert reliability.first_difference(a, a) == ''
    assert reliability.first_difference(a, b) == '.optimizers[0].state.0.m'
    assert reliability.first_difference(a, dict(a, step=3.0)) == '.step'
    assert reliability.first_difference(a, dict(a, more=1)) == ' has other keys'


@linux
def test_damaged_files_in_small(tmp_path):
    lines = run('fuzz', '--kinds=coco,yolo,yaml,voc,image,results,list', '--count=70', f'--out_dir={tmp_path}')
    cases, accepted, refused, failed = map(int, lines[-1].split()[1:5])
    assert cases >= 68 and failed == 0 and accepted + refused == cases and min(accepted, refused) > 15


@linux
@pytest.mark.slow
def test_damaged_files(tmp_path):
    lines = run('fuzz', '--count=400', '--seed=1', f'--out_dir={tmp_path}')
    assert lines[-1].split()[4] == '0'


@linux
@pytest.mark.slow
def test_kills(tmp_path):
    lines = run('kill', '--count=5', '--seed=1', f'--out_dir={tmp_path}')
    assert '5 kills, 5 runs equal to the bit, 0 not' in lines[-1]

"""benches/gpu.py: the mechanism with other steps, the readers of figures, and (slow) the rehearsal itself."""
import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benches import gpu
from configurator import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(steps, **settings) -> rows of the csv; a step is (name, limit in seconds, code of a script)."""

    def run(steps, **settings):
        for name, value in (dict(device='cpu', out_dir=str(tmp_path / 'run'), results=str(tmp_path / 'a.csv'), only='',
                                 again=False) | settings).items():
            monkeypatch.setattr(gpu, name, value)
        monkeypatch.setattr(gpu, 'GRACE', 0.5)
        monkeypatch.setattr(gpu, 'make_steps', lambda: [
            gpu.Step(name, 'float32', limit, gpu.last(r'figure (?P<ms>\d+)'), ['-c', code])
            for name, limit, code in steps])
        monkeypatch.setattr(gpu, 'versions_command', lambda: ['-c', 'print("a machine")'])
        try:
            gpu.main()
            gpu.failed = ''
        except SystemExit as e:
            gpu.failed = str(e)
        with open(tmp_path / 'a.csv', newline='') as f:
            return list(csv.DictReader(f))

    return run


def counting(path):
    """A script that notes every run of its own."""
    return f'open({str(path)!r}, "a").write("x"); print("figure 7")'


def test_every_step_survives_the_others(run, tmp_path):
    """One that fails, one without end, one that leaves a process, one without figure; then one that succeeds."""
    child = 'import subprocess, sys; subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"]{}); {}'
    steps = [('fails', 9, 'raise SystemExit(3)'),
             ('hangs', 1, child.format('', 'print("figure 1", flush=True); import time; time.sleep(99)')),
             ('leaves', 9, child.format(', start_new_session=True', 'print("figure 1")')),
             ('silent', 9, 'print("nothing")'),
             ('good', 9, 'print("figure 3\\nfigure 42")')]
    started = time.time()
    rows = run(steps)
    assert time.time() - started < 20
    assert [(row['step'], row['exit'], row['left'], row['figure']) for row in rows] == [
        ('fails', '3', '0', ''), ('hangs', 'timeout', '0', ''), ('leaves', '0', '1', 'ms 1'), ('silent', '0', '0', ''),
        ('good', '0', '0', 'ms 42')]
    assert gpu.failed.startswith('failed: fails, hangs, leaves, silent;')
    assert not gpu.marked(f'HSVDET_STEP={os.getpid()}.'), 'processes of steps are still there'
    assert all(row['machine'] == 'a machine' and row['date'] == time.strftime('%Y-%m-%d') for row in rows)
    page = (tmp_path / 'run.md').read_text()
    assert '| good | float32 | ms 42 |' in page and '| leaves | float32 | ms 1 |' in page
    assert '0, 1 processes left' in page and '`python -c \'raise SystemExit(3)\'`' in page


def test_what_others_need_is_made_again(run, tmp_path):
    """Pictures are gone, as on a new machine of the same kind: only those who need them bring them back."""
    folder = tmp_path / 'run' / 'data'
    make = f'import os; os.makedirs({str(folder)!r}, exist_ok=True); open({str(folder / "train.json")!r}, "w"); '
    made, used, other = (tmp_path / name for name in ('made', 'used', 'other'))
    steps = [('data', 9, make + counting(made)), ('uses', 9, f'open({str(folder / "train.json")!r}); {counting(used)}'),
             ('other', 9, counting(other))]
    run(steps)
    (folder / 'train.json').unlink()
    run(steps)                                                                        # all succeeded: nothing to do
    (tmp_path / 'a.csv').unlink()
    run(steps, only='other')
    assert (made.read_text(), other.read_text()) == ('x', 'xx')
    rows = run(steps, only='uses')
    assert [row['step'] for row in rows] == ['other', 'data', 'uses'] and not gpu.failed
    assert (made.read_text(), used.read_text(), other.read_text()) == ('xx', 'xx', 'xx')


def test_what_succeeded_is_not_run_again(run, tmp_path):
    good, bad = tmp_path / 'good', tmp_path / 'bad'
    steps = [('good', 9, counting(good)), ('bad', 9, counting(bad) + '; raise SystemExit(1)')]
    run(steps)
    run(steps)
    assert (good.read_text(), bad.read_text()) == ('x', 'xx')
    assert len(run(steps, again=True)) == 2 and good.read_text() == 'xx'
    run([('good', 9, counting(good) + ' ')], only='good')                             # another command
    assert good.read_text() == 'xxx'
    with pytest.raises(InputError, match='the steps are good,bad'):
        run(steps, only='goof')


def test_training_figure():
    text = ('step 10/40 epoch 0.25 | box 1.000 cls 2.000 dfl 0.500 one2one_box 1.500 | lr 1e-3 | 3.0 objects an image '
            '| 9.0 images/s | 1.25 GiB | 0.1 min left\n')
    text += text.replace('box 1.000', 'box 0.500').replace('9.0', '12.5')
    text += '0.1 min, 8.0 images/s with everything; best AP 0.1250; in out: best.pt'
    assert gpu.training(text) == 'last loss 4.5, images per s 12.5, GiB 1.25'
    assert gpu.training(text.replace('| 1.25 GiB ', '')) == 'last loss 4.5, images per s 12.5'
    assert gpu.training('Traceback') == ''
    assert gpu.learning(text) == ''                                                   # 5.0 to 4.5 is no learning
    fell = text.replace('box 0.500 cls 2.000', 'box 0.500 cls 1.100')
    assert gpu.learning(fell) == 'first loss 5.0, last loss 3.6, images per s 12.5, GiB 1.25, AP 0.1250'
    assert gpu.learning(fell.replace('AP 0.1250', 'AP 0.0329')) == ''                 # that of the start biases


def test_figures_of_tables():
    text = ('detectors of scale l\na GPU; float16\n'
            'image | detector | how | attention ms | all ms\n1x1 | --- | by part | 0 | 4.0\n'
            '1x1 | --- | fused |  | 3.6\n'
            '1x1 | -SS | by part | 0.5 | 5.0\n1x1 | -SS | fused |  | 4.6\n-> out/bench/latency_l.csv\n')
    assert gpu.latency(text) == '--- 3.6 ms, attention 0% by part; -SS 4.6 ms, attention 10% by part'
    assert gpu.latency(text.replace('4.6', '4,600')).endswith('-SS 4,600 ms, attention 10% by part')
    assert gpu.memory('MiB\ndetector | all | measured\n-SS | 1,642 | 1,700\n') == '-SS 1,642 MiB, measured 1,700'


def test_syncs_are_those_between_two_progress_lines():
    warning = '/a/b/{}: UserWarning: called a synchronizing CUDA operation (Triggered internally at ...)\n  x.item()\n'
    text = (warning.format('data.py:1') + 'step 10/40 epoch 1 | box 1\n' + warning.format('loss.py:5') * 4
            + warning.format('train.py:7') * 2 + 'step 12/40 epoch 2\n' + warning.format('eval.py:9'))
    assert gpu.syncs(text) == '3 a step: loss.py:5 2, train.py:7 1'


def test_syncs_are_seen_where_they_happen(tmp_path):
    """The rehearsal's counter: item() and nonzero and a mask, each at its line of the script."""
    script = tmp_path / 'script.py'
    script.write_text('import torch\nx = torch.ones(3)\nx.sum().item()\nx.nonzero()\ny = x[x > 0]\nz = x[[0]]\n')
    done = subprocess.run([sys.executable, '-c', "from benches.gpu import warn_of_syncs; warn_of_syncs('cpu')",
                           str(script)], cwd=ROOT, capture_output=True, text=True)
    found = [line.split(': ')[0].rpartition('/')[2] for line in done.stderr.splitlines() if gpu.SYNC in line]
    assert done.returncode == 0 and found == ['script.py:3', 'script.py:4', 'script.py:5'], done.stderr


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """All steps as they are, at tiny sizes on the CPU."""
    done = subprocess.run([sys.executable, '-m', 'benches.gpu', '--device=cpu', '--small=True', '--patience=5',
                           f'--results={tmp_path}/gpu.csv', f'--out_dir={tmp_path}/gpu'], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(tmp_path / 'gpu.csv', newline='') as f:
        assert all(gpu.succeeded(row) for row in csv.DictReader(f))
    assert '| rtdetr |' in (tmp_path / 'gpu.md').read_text()

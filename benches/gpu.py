"""
The first run on a GPU: everything that a CPU cannot show, in about ten minutes, and a page of figures.

    python bench.py gpu                              on the GPU: results/gpu.csv, out/bench/gpu.md
    python bench.py gpu --only=parity,compile        these steps; those that succeeded already are not run again
    python bench.py gpu --again=True                 all of them anew
    python bench.py gpu --device=cpu --small=True --results=out/bench/gpu_small.csv --out_dir=out/bench/gpu_small
                                                     a rehearsal without a GPU: it shows that the steps run, and
                                                     nothing else; its losses, AP and times mean nothing

A step is one of our scripts in a process of its own, with a time limit. It has succeeded if it ends with 0, prints its
figure and leaves no process behind; whatever becomes of it, the next one runs. Its output is out_dir/STEP.txt. A step
is skipped if the csv has its row, of the same command on the same machine, and it succeeded.
"""
import csv
import glob
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter, namedtuple
from types import SimpleNamespace

from configurator import InputError, configure

# --- settings ---------------------------------------------------------------------------------------------------------
device = 'cuda'                # cuda cuda:1 ... cpu
small = False                  # tiny sizes: does it run at all?
only = ''                      # steps, separated by commas; '' is all
again = False                  # also those that succeeded already
results = 'results/gpu.csv'
out_dir = 'out/bench/gpu'      # pictures, runs, outputs; the page is beside it, out/bench/gpu.md
patience = 1.0                 # factor on the time limits

COLUMNS = ('step', 'dtype', 'figure', 'seconds', 'exit', 'left', 'machine', 'date', 'command')
Step = namedtuple('Step', 'name dtype limit figure command')                          # limit in seconds; see make_steps
GRACE = 5                                                                # seconds that children of a step have to leave
SYNC = 'called a synchronizing CUDA operation'                                        # what PyTorch warns of


# --- parts of steps that no script of ours has ------------------------------------------------------------------------

def print_versions(device):
    """One line: GPU, driver, versions."""
    import torch

    from benches import costs
    costs.device = device
    parts = [costs.machine(), f'torch {torch.__version__}', f'Python {sys.version.split()[0]}']
    if device != 'cpu':
        driver = subprocess.run(['nvidia-smi', '--query-gpu=driver_version,memory.total', '--format=csv,noheader'],
                                capture_output=True, text=True).stdout.splitlines()
        nccl = '.'.join(map(str, torch.cuda.nccl.version()))
        parts += [f'driver and memory {driver[0] if driver else "unknown"}', f'CUDA {torch.version.cuda}',
                  f'cuDNN {torch.backends.cudnn.version()}', f'NCCL {nccl}']
    print('; '.join(parts))


def warn_of_syncs(device):
    """Run the script in sys.argv[1:] with a warning for every operation at which the CPU waits for the GPU."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Dispatched(TorchDispatchMode):
        """Without a GPU: those that would wait for one, by name. (Copies to the CPU cannot be told from others.)"""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            by_mask = name in ('index', 'index_put_') and any(t is not None and t.dtype == torch.bool for t in args[1])
            if by_mask or name in ('_local_scalar_dense', 'nonzero', 'equal', 'masked_select'):
                ours = [f for f in traceback.extract_stack() if f'{os.sep}torch{os.sep}' not in f.filename]
                warnings.warn_explicit(SYNC, UserWarning, ours[-2].filename, ours[-2].lineno)
            return func(*args, **(kwargs or {}))

    warnings.filterwarnings('always', SYNC)
    sys.argv = sys.argv[1:]
    if device == 'cpu':
        with Dispatched():
            runpy.run_path(sys.argv[0], run_name='__main__')
    else:
        torch.cuda.set_sync_debug_mode('warn')
        runpy.run_path(sys.argv[0], run_name='__main__')


# --- figures: the output of a step -> a few words, '' if they are not in it -------------------------------------------

def last(*patterns):
    """A figure: the last match of each pattern, its groups as "name value", _ in a name a space."""
    def figure(text):
        found = [list(re.finditer(pattern, text)) for pattern in patterns]
        words = [f'{name.replace("_", " ")} {value}' for matches in found if matches
                 for name, value in matches[-1].groupdict().items() if value is not None]
        return ', '.join(words) if all(found) else ''
    return figure


def table(text):
    """The rows of all tables that benches/costs.py printed, as dicts."""
    rows, names = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(' | ')]
        if len(cells) == 1:
            names = None
        elif names is None:
            names = cells
        else:
            rows.append(dict(zip(names, cells, strict=True)))
    return rows


def number(cell):
    return float(cell.replace(',', ''))


def losses(text):
    """The sum of the losses in each progress line of train.py."""
    lines = re.findall(r'epoch [\d.]+ \| (.*?) \| lr', text)
    return [sum(map(float, re.findall(r'\w+ ([\d.]+)', line))) for line in lines]


def training(text):
    """
    Loss, speed and memory at the end of a run of a few steps. Neither its AP, which is that of the start biases (boxes
    as large as the image at P5, the same for every network), nor how far the loss fell: lr starts at 0, and with
    multi-scale a loss belongs to its image size.
    """
    rest = last(r'(?P<images_per_s>[\d.]+) images/s( \| (?P<GiB>[\d.]+) GiB)? \|')(text)
    return f'last loss {losses(text)[-1]:.1f}, {rest}' if losses(text) and rest else ''


def learning(text):
    """The same of a run that is long enough to learn: no figure, so no success, unless loss and AP show that it did."""
    found, ap = losses(text), re.findall(r'best AP ([\d.]+)', text)
    learned = found and ap and found[-1] < 0.8 * found[0] and float(ap[-1]) > 0.1
    return f'first loss {found[0]:.1f}, {training(text)}, AP {ap[-1]}' if learned else ''


def memory(text):
    return '; '.join(f'{row["detector"]} {row["all"]} MiB, measured {row.get("measured", "on a GPU only")}'
                     for row in table(text))


def latency(text):
    """Whole passes, and the attention's share of the time by part."""
    rows = table(text)
    whole = {row['detector']: row['all ms'] for row in rows if row['how'] == 'fused'}
    parts = {row['detector']: number(row['attention ms']) / number(row['all ms']) for row in rows
             if row['how'] == 'by part'}
    return '; '.join(f'{name} {whole[name]} ms, attention {share:.0%} by part' for name, share in parts.items())


def attention(text):
    rows = [row for row in table(text) if row.get('level') == 'P4']
    return '; '.join(f'P4 of {row["image"]}: {row["fast ms"]} ms, definition x {row["plain/fast"]}, full x '
                     f'{row["full/fast"]}' for row in rows) + ''.join(f'; {row["way"]} {row["forward ms"]} ms'
                                                                      for row in table(text) if 'way' in row)


def suppression(text):
    return '; '.join(f'{row["candidates"]} boxes {row["ms"]} ms' for row in table(text))


def speed(text):
    rows = [row for row in table(text) if row['part'].startswith('all')]
    return '; '.join(f'{row["images/s"]} images/s, {row["ms"]} ms a step' for row in rows)


def syncs(text):
    """Between the first and the last progress line of train.py: waits a step, and the lines that cause most."""
    marks = list(re.finditer(r'^step (\d+)/.*', text, re.M))
    if len(marks) < 2:
        return ''
    steps = int(marks[-1][1]) - int(marks[0][1])
    lines = Counter(re.findall(r'([^/\\\s]+:\d+): UserWarning: ' + SYNC, text[marks[0].end():marks[-1].start()]))
    most = ', '.join(f'{line} {count / steps:.3g}' for line, count in lines.most_common(3))
    return f'{sum(lines.values()) / steps:.3g} a step: {most}'


# --- the steps --------------------------------------------------------------------------------------------------------

def sizes():
    """Arguments that differ between a run and a rehearsal."""
    if small:
        return SimpleNamespace(
            tests=['-k', 'not detectors and not detr'], pictures=['--size=64', '--train=16', '--val=4'],
            schedule=['--imgsz=64', '--epochs=2', '--warmup_epochs=1', '--log_interval=1'],                  # 4 steps
            long='--max_steps=3', few='--max_steps=2', hd=['--scale=n', '--imgsz=(64,96)'], large='n',
            attention=['--sizes=((64,64),)', '--channels=32', '--repeats=1'], one=['--sizes=((64,64),)', '--repeats=1',
            '--onnx=False'], step=['--imgsz=64', '--batch_size=2', '--repeats=1'])
    return SimpleNamespace(
        tests=[], pictures=['--train=800', '--val=100'], schedule=['--epochs=4', '--log_interval=10'],     # 400 steps
        long='--max_steps=300', few='--max_steps=60', hd=[], large='l', attention=[], one=['--sizes=((1088,1920),)'],
        step=['--imgsz=640', '--batch_size=16'])


def train_step(name, dtype, limit, *more, launch=(), figure=training, folder='few'):
    """train.py on the pictures of the step `data`; the same without pictures of its own, evaluated once at the end."""
    return Step(name, dtype, limit, figure, [
        *launch, 'train.py', 'config/shapes.py', '--make_data=', f'--train_data={out_dir}/data/train.json',
        f'--val_data={out_dir}/data/val.json', *sizes().schedule, '--num_pictures=0', '--report=False',
        '--eval_interval=1e9',
        f'--device={device}', f'--dtype={dtype}', f'--out_dir={out_dir}/{folder}', *more])


def cost_step(name, dtype, limit, figure, *more):
    """A table of benches/costs.py."""
    return Step(name, dtype, limit, figure, ['bench.py', *more, f'--device={device}', f'--dtype={dtype}'])


def training_steps(s):
    everything = ['--select=learned', '--heads=4', '--pos=True', '--one2one=True', '--checkpointing=True',
                  '--grad_accum=2', '--multi_scale=0.5', s.few]
    one_rank = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1']
    return [
        train_step('train', 'bfloat16', 240, s.long, figure=training if small else learning, folder='train'),
        train_step('resume', 'bfloat16', 120, '--init_from=resume', folder='train'),
        train_step('fp16 adamw', 'float16', 120, '--optimizer=adamw', '--lr=1e-3', s.few),
        train_step('fp16 sgd', 'float16', 120, '--optimizer=sgd', s.few),
        train_step('fp16 muon', 'float16', 120, '--optimizer=muon', s.few),
        train_step('fp16 mixed', 'float16', 120, '--optimizer_block=adamw', '--optimizer_backbone=sgd', s.few),
        *(train_step(f'everything {attn}', 'bfloat16', 180, f'--attn={attn}', *everything)
          for attn in ('SST', 'NWL', 'KMF')),
        train_step('rtdetr', 'bfloat16', 180, '--arch=rtdetr', '--optimizer=adamw', '--lr=4e-4', s.few),
        train_step('torchrun', 'bfloat16', 180, s.few, *(['--sync_bn=True'] if device != 'cpu' else []),
                   launch=one_rank),
        train_step('compile', 'bfloat16', 400, '--compile=True', s.few),
        Step('train at 1080p', 'auto', 300, training, [
            'train.py', 'config/hsvdet_1080p_8gb.py', f'--train_data={out_dir}/data/train.json',
            f'--val_data={out_dir}/data/val.json', '--max_steps=2', '--log_interval=1', '--num_pictures=0',
            '--report=False',
            '--eval_interval=1e9', f'--device={device}', f'--out_dir={out_dir}/hd', *s.hd])]


def make_steps():
    """All of them in order. Of train.py's runs that show a mechanism only, each takes a few steps."""
    s, data = sizes(), f'--train_data={out_dir}/data/train.json'
    evaluate = ['eval.py', f'--weights={out_dir}/train/best.pt', f'--data={out_dir}/data/val.json']
    watch = ['-c', f'from benches.gpu import warn_of_syncs; warn_of_syncs({device!r})']
    figures_of_eval = last(r'"AP": (?P<AP>[\d.]+)', r'(?P<images_per_s>[\d.]+) images/s')
    return [
        Step('parity', 'all', 400, last(r'(?P<passed>\d+) passed(, (?P<skipped>\d+) skipped)?'),
             ['-m', 'pytest', '-n', '0', '-p', 'no:cacheprovider', 'tests/test_cuda.py', *s.tests]),
        Step('data', 'uint8', 120, last(r'(?P<pictures>[\d,]+) training'),
             ['-m', 'prepare.shapes', f'--out={out_dir}/data', *s.pictures]),
        *training_steps(s),
        cost_step('memory', 'auto', 180, memory, 'memory', 'config/hsvdet_1080p_8gb.py', *s.hd),
        cost_step('attention', 'float32', 240, attention, 'attention', *s.attention),
        *(cost_step(f'latency {dtype}', dtype, 180, latency, 'latency', f'--scale={s.large}', *s.one)
          for dtype in ('float16', 'bfloat16')),
        cost_step('nms', 'float32', 180, suppression, 'nms', *s.attention[-1:]),
        *(cost_step(f'speed {scale}', 'auto', 180, speed, 'train', data, f'--scale={size}', *s.step)
          for scale, size in (('n', 'n'), ('l', s.large))),
        train_step('syncs', 'bfloat16', 120, s.few, launch=watch, figure=syncs),
        Step('eval on cpu', 'float32', 300, figures_of_eval, [*evaluate, '--device=cpu']),
        Step('eval', 'float32', 120, figures_of_eval, [*evaluate, f'--device={device}'])]


# --- running one ------------------------------------------------------------------------------------------------------

def marked(mark):
    """
    Ids of the running processes with `mark` in their environment: a step, and all that it started, which the process
    group would not tell (loader processes and torchrun's ranks have their own). Linux only, elsewhere none.
    """
    found = []
    for path in glob.glob('/proc/[0-9]*/environ'):
        try:
            with open(path, 'rb') as f:
                if mark.encode() in f.read():
                    found.append(int(path.split('/')[2]))
        except OSError:                                                               # it has ended, or is not ours
            continue
    return found


def end_all(mark):
    for pid in marked(mark):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def versions_command():
    return ['-c', f'from benches.gpu import print_versions; print_versions({device!r})']


def run_step(step):
    """-> a row of the csv, without the machine."""
    log, started, mark = log_of(step.name), time.time(), f'HSVDET_STEP={os.getpid()}.{time.time_ns()}.'
    with open(log, 'w', encoding='utf-8') as f:
        process = subprocess.Popen([sys.executable, *step.command], stdout=f, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, env=os.environ | dict([mark.split('=')]))
        try:
            code = str(process.wait(step.limit * patience))
            seconds = time.time() - started
            while marked(mark) and time.time() - started < seconds + GRACE:
                time.sleep(0.1)
            left = len(marked(mark))
        except subprocess.TimeoutExpired:
            code, left, seconds = 'timeout', 0, time.time() - started
        finally:                                                                      # after Ctrl-C, too
            end_all(mark)
            if process.poll() is None:                                                # not Linux
                process.kill()
            process.wait()
    with open(log, encoding='utf-8', errors='replace') as f:
        text = f.read()
    try:
        figure = step.figure(text) if code == '0' else ''
    except (LookupError, ValueError) as e:                                            # the script prints otherwise now
        figure, code = '', f'0, but its output reads otherwise: {type(e).__name__} {e}'
    return dict(step=step.name, dtype=step.dtype, figure=figure, seconds=f'{seconds:.1f}', exit=code, left=left,
                date=time.strftime('%Y-%m-%d'), command=shlex.join(['python', *step.command]))


def what_they_lack(wanted, steps):
    """Of the steps that make pictures or weights for others, the names of those whose file is gone: they run too."""
    files = {'data': os.path.join(out_dir, 'data', 'train.json'), 'train': os.path.join(out_dir, 'train', 'best.pt')}
    lacking = set()
    for step in reversed(steps):                                       # what makes a file comes before what reads it
        if step.name in files and step.name not in wanted and not os.path.exists(files[step.name]) and any(
                f'{out_dir}/{step.name}' in argument for other in steps if other.name in wanted | lacking
                for argument in other.command):
            lacking.add(step.name)
    return lacking


def log_of(name):
    return os.path.join(out_dir, f'{name.replace(" ", "_")}.txt')


def succeeded(row):
    return row['exit'] == '0' and str(row['left']) == '0' and row['figure'] != ''


# --- the csv and the page ---------------------------------------------------------------------------------------------

def read_rows():
    if not os.path.exists(results):
        return {}
    with open(results, newline='', encoding='utf-8') as f:
        return {row['step']: row for row in csv.DictReader(f)}


def write_rows(rows):
    os.makedirs(os.path.dirname(results) or '.', exist_ok=True)
    with open(f'{results}.part', 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(rows.values())
    os.replace(f'{results}.part', results)


def write_page(rows):
    """out_dir.md: the rows, then the output of the cost tables, and the end of the output of what failed."""
    machines = dict.fromkeys(row['machine'] for row in rows.values())
    lines = ['# A rehearsal: steps run; figures mean nothing' if small else f'# On {device}', '', *machines, '',
             f'`python bench.py gpu --device={device}{" --small=True" if small else ""}`', '',
             '| step | dtype | figure | s | exit | date |', '|---|---|---|---|---|---|']
    for row in rows.values():
        code = row['exit'] + (f', {row["left"]} processes left' if str(row['left']) != '0' else '')
        lines.append(f'| {row["step"]} | {row["dtype"]} | {row["figure"] or "none"} | {row["seconds"]} | {code} | '
                     f'{row["date"]} |')
    for row in rows.values():
        lines += ['', f'**{row["step"]}**: `{row["command"]}`']
        if os.path.exists(log_of(row['step'])):
            with open(log_of(row['step']), encoding='utf-8', errors='replace') as f:
                output = f.read().splitlines()
            shown = output[-12:] if not succeeded(row) else [line for line in output if ' | ' in line]
            if shown and (not succeeded(row) or 'bench.py' in row['command']):
                lines += ['', '```', *shown, '```']
    with open(f'{out_dir}.md', 'w', encoding='utf-8') as f:
        f.write('\n'.join(lines) + '\n')


def main():
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit('asked to stop'))    # by way of run_step's finally
    os.makedirs(out_dir, exist_ok=True)
    versions = Step('versions', '', 120, last(r'(?P<_>\S.*)'), versions_command())
    row, rows, failed = run_step(versions), read_rows(), []
    machine = row['figure'].strip() or 'unknown'
    print(f'{machine}\n{log_of("versions")}: exit {row["exit"]}', flush=True)
    steps = make_steps()
    wanted = set(only.split(',') if only else (step.name for step in steps))
    if wanted - {step.name for step in steps}:
        raise InputError(f'--only={only}: the steps are {",".join(step.name for step in steps)}')
    for step in steps:                                                 # those that succeeded already are not run again
        known, command = rows.get(step.name), shlex.join(['python', *step.command])
        if known and succeeded(known) and (known['command'], known['machine']) == (command, machine) and not again:
            wanted.discard(step.name)
    if lacking := what_they_lack(wanted, steps):
        print(f'{out_dir} lacks what {" and ".join(sorted(lacking))} made: once more', flush=True)
        wanted |= lacking
    for step in steps:
        if step.name not in wanted:
            continue
        print(f'{time.strftime("%H:%M:%S")} {step.name} ... ', end='', flush=True)
        rows[step.name] = run_step(step) | dict(machine=machine)
        write_rows(rows)
        write_page(rows)
        row = rows[step.name]
        print(f'exit {row["exit"]}, {row["seconds"]} s, {row["left"]} processes left: {row["figure"]}', flush=True)
        if not succeeded(row):
            failed.append(step.name)
    print(f'-> {results}, {out_dir}.md')
    if failed:
        raise SystemExit(f'failed: {", ".join(failed)}; their output is in {out_dir}')


if __name__ == '__main__':
    configure(globals())
    main()

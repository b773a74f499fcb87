"""
Several trainings side by side: every arm of an experiment with every seed, one row of csv each, and their table.

    python bench.py experiment experiments/detectors_shapes.py                  hours; may be broken off and run again
    python bench.py experiment experiments/detectors_shapes.py --seeds='(3,)'   one more seed
    python bench.py experiment experiments/detectors_shapes.py --show=True      the table of what is there
    ... --name=detectors_gpu --jobs=12 --more='--workers=1 --dtype=float32'     on a GPU, which holds many small runs

An experiment is a config file of this script: the command that all its runs share, and its arms, which are what each
adds to it. A run is `train.py` with the arm's settings and its seed, then `eval.py` on the test images with the weights
of the last step, in processes of their own. A row that is in results/NAME.csv is not run again, and a run that broke
off goes on from its checkpoint. Seeds are the outer loop, so that a table of fewer seeds is complete too. Arms are
compared with the first one seed by seed: the mean difference, its standard error, and the p value of Student's paired
t test, which says little below five seeds.

Minutes are those of the training process: its CPU time over its threads, which other work on the machine hardly
stretches, and by the clock. Choose settings on val_data; the images of `test` are for the figure that is reported.
"""
import contextlib
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from statistics import mean, stdev

import torch
from scipy.stats import ttest_rel

from benches import costs
from configurator import InputError, configure

# --- settings ---------------------------------------------------------------------------------------------------------
name = ''                      # of the experiment: rows go to results/NAME.csv, runs to out/experiments/NAME/ARM_SEED
train = ''                     # arguments of train.py that all arms share: a config file, and settings
more = ''                      # further ones: what this machine wants
arms: tuple = ()               # ((name, further arguments with {seed} filled in), ...); the first is the reference
only = ''                      # the arms to run, separated by commas; '' runs all
seeds: tuple = (0, 1, 2)
test = ''                      # eval.py --data=: a label file
evaluate = '--occlusion=True'  # further arguments of eval.py
without = ''                   # eval.py --without=: the blocks to take out for one more AP, where an arm has them
threads = 1                    # CPU threads of a run
jobs = 1                       # runs at a time
show = False                   # run nothing, print the table of the rows there are

METRICS = ('AP', 'AP50', 'AP_small', 'AP_medium', 'AP_large', 'AR100', 'duplicates', 'recall <= 0.1', 'recall 0.1-0.3',
           'recall 0.3-0.5', 'recall > 0.5', 'AP without', 'minutes')
COLUMNS = ('arm', 'seed', *METRICS, 'clock minutes', 'steps', 'images', 'parameters', 'machine', 'dtype', 'threads',
           'date', 'commit', 'train')
BN_STATE = ('running_mean', 'running_var', 'num_batches_tracked')            # in a checkpoint, and no parameters


def run(script, arguments, log, spent=os.devnull):
    """`python SCRIPT arguments`, output to the file `log` -> its last line; to `spent` its CPU seconds and seconds."""
    started = time.time()
    with open(log, 'a', encoding='utf-8') as f:
        process = subprocess.Popen([sys.executable, script, *arguments], stdout=f, stderr=subprocess.STDOUT,
                                   env=os.environ | dict(OMP_NUM_THREADS=str(threads)))
        interrupted = False
        try:
            _, status, usage = os.wait4(process.pid, 0)                           # its CPU time and no other child's
        except KeyboardInterrupt:                                                 # train.py got it too, and saves
            interrupted, (_, status, usage) = True, os.wait4(process.pid, 0)
    process.returncode = code = os.waitstatus_to_exitcode(status)
    with open(spent, 'a', encoding='utf-8') as f:
        f.write(f'{usage.ru_utime + usage.ru_stime:.1f} {time.time() - started:.1f}\n')
    if interrupted:
        raise KeyboardInterrupt
    with open(log, encoding='utf-8') as f:
        last = (f.read().splitlines() or [''])[-1]
    if code:
        raise InputError(f'{script} {" ".join(arguments)} ended with {code}: {last} (all of it: {log})')
    return last


def read_rows(path):
    if not os.path.exists(path):
        return []
    with open(path, newline='', encoding='utf-8') as f:
        return list(csv.DictReader(f))


def train_and_evaluate(arm, of_arm, seed):
    """One row of the table; of_arm: what the arm adds to the command."""
    folder = os.path.join('out', 'experiments', name, f'{arm}_{seed}'.replace(' ', '_'))
    os.makedirs(folder, exist_ok=True)
    spent = os.path.join(folder, 'seconds.txt')                    # of all parts of a run that was broken off
    arguments = [*shlex.split(f'{train} {of_arm.format(seed=seed)} {more}'), f'--seed={seed}', f'--out_dir={folder}',
                 '--eval_interval=1e9', '--save_interval=200', '--num_pictures=0', '--report=False']
    command, known = shlex.join(arguments), os.path.join(folder, 'command.txt')
    files = [argument for argument in arguments if argument.endswith('.py')]
    for file in filter(os.path.exists, files):                     # and what its config files say, and those they exec
        with open(file, encoding='utf-8') as f:
            text = f.read()
        command += f'\n{text}'
        files += re.findall(r"open\('([^']+\.py)'\)", text)
    if os.path.exists(known) and open(known, encoding='utf-8').read() == command:
        if os.path.exists(os.path.join(folder, 'ckpt.pt')):
            arguments.append('--init_from=resume')
    else:                                                          # another arm's run of this name is not gone on with
        for file in ('ckpt.pt', 'ckpt_prev.pt'):
            with contextlib.suppress(FileNotFoundError):
                os.replace(os.path.join(folder, file), os.path.join(folder, f'before_{file}'))
        with open(known, 'w', encoding='utf-8') as f:
            f.write(command)
    if '--init_from=resume' not in arguments and os.path.exists(spent):                    # its clock starts anew too
        os.remove(spent)
    run('train.py', arguments, os.path.join(folder, 'train.txt'), spent)
    with open(spent, encoding='utf-8') as f:
        cpu, clock = (sum(map(float, column)) / 60 for column in zip(*map(str.split, f), strict=True))
    weights, log = os.path.join(folder, 'ckpt.pt'), os.path.join(folder, 'eval.txt')        # best.pt may be of step 0
    saved = torch.load(weights, weights_only=True, map_location='cpu')
    last_step = min(saved['total_steps'], saved['config']['max_steps'] or saved['total_steps'])
    if saved['step'] < last_step:                              # Ctrl-C and SIGTERM end train.py as the last step does
        raise InputError(f'{arm}, seed {seed}: stopped at step {saved["step"]} of {last_step}; the same command '
                         'goes on')
    arguments = [f'--weights={weights}', f'--data={test}', *shlex.split(evaluate)]
    metrics = json.loads(run('eval.py', arguments, log))
    for recall, bin in zip(METRICS[7:11], metrics.get('occlusion', {}).values(), strict=False):
        metrics[recall] = bin['recall50']
    attn = saved['model_config'].get('attn', '---')                                        # of P3, P4, P5
    there = ','.join(block for block in without.split(',') if block and attn[int(block[-1]) - 3] != '-')
    if there:
        metrics['AP without'] = json.loads(run('eval.py', [*arguments, f'--without={there}'], log))['AP']
    with open(os.path.join(folder, 'train.txt'), encoding='utf-8') as f:
        costs.device, dtype = re.search(r'; (\S+) (\w+)[^;]*; \d+ steps', f.read()).groups()  # 'auto' is settled there
    return dict(metrics, arm=arm, seed=seed, minutes=cpu, steps=saved['step'], dtype=dtype, threads=threads,
                images=saved['step'] * saved['config']['batch_size'],
                machine=f'{costs.machine().split(",")[0]}, {costs.device}',
                parameters=sum(t.numel() for key, t in saved['model'].items() if not key.endswith(BN_STATE)),
                date=time.strftime('%Y-%m-%d'), commit=saved['commit'][:9],
                train=f'{train} {of_arm} {more}'.strip()) | {'clock minutes': clock}


def cell(value):
    return f'{value:.4f}' if isinstance(value, float) else '' if value is None else str(value)


def print_table(rows):
    """Mean and standard deviation over seeds; below, the differences of AP from the first arm, seed by seed."""
    print(f'{name}: mean ± standard deviation over seeds')
    by_arm = {arm: {int(row['seed']): row for row in rows if row['arm'] == arm} for arm, _ in arms}
    for arm, mine in by_arm.items():
        columns = {key: [float(row[key]) for row in mine.values() if row[key]] for key in METRICS}
        text = (f'{key} {mean(x):.4g}' + (f' ± {stdev(x):.2g}' if len(x) > 1 else '')
                for key, x in columns.items() if x)
        print(f'{arm}: {len(mine)} seeds | ' + ' | '.join(text))
    first = by_arm[arms[0][0]]
    for arm, mine in list(by_arm.items())[1:]:
        both = sorted(set(first) & set(mine))
        a, b = ([float(some[seed]['AP']) for seed in both] for some in (first, mine))
        if len(both) > 1:
            differences = [y - x for x, y in zip(a, b, strict=True)]
            error = stdev(differences) / len(both) ** 0.5
            print(f'AP of {arm} - {arms[0][0]}: {mean(differences):+.4f} ± {error:.4f} (standard error, {len(both)} '
                  f'pairs), p = {ttest_rel(b, a).pvalue:.3f}')


def main():
    if not (name and train and arms and test):
        raise InputError('an experiment is a file with name, train, arms and test: '
                         'python bench.py experiment experiments/detectors_shapes.py')
    if jobs < 1:
        raise InputError(f'--jobs={jobs}: must be at least 1')
    if not all(isinstance(arm, tuple) and len(arm) == 2 and set(map(type, arm)) == {str} for arm in arms):
        raise InputError("arms is ((name, further arguments), ...), of one arm too: (('a', '--attn=---'),)")
    if len(dict(arms)) < len(arms):
        raise InputError(f'two arms have one name, rename one: {", ".join(arm for arm, _ in arms)}')
    if not show and not os.path.exists(re.sub(r'(\.ya?ml):\w+$', r'\1', test)):
        raise InputError(f'the images to test on are not there: {test}')
    wanted = only.split(',') if only else [arm for arm, _ in arms]
    if unknown := set(wanted) - {arm for arm, _ in arms}:
        raise InputError(f'--only={only}: {name} has no arm {", ".join(unknown)}, it has '
                         + ', '.join(arm for arm, _ in arms))
    path, writing = os.path.join('results', f'{name}.csv'), threading.Lock()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    there = {(row['arm'], int(row['seed'])) for row in read_rows(path)}

    def run_one(arm, of_arm, seed):
        print(f'{time.strftime("%H:%M")} {name}: {arm}, seed {seed}\n', end='', flush=True)   # whole lines from threads
        row = train_and_evaluate(arm, of_arm, seed)
        with writing:
            new = not os.path.exists(path)
            with open(path, 'a', newline='', encoding='utf-8') as f:
                writer = csv.DictWriter(f, COLUMNS, extrasaction='ignore')
                if new:
                    writer.writeheader()
                writer.writerow({key: cell(row.get(key)) for key in COLUMNS})

    todo = [(arm, of_arm, seed) for seed in seeds for arm, of_arm in arms if arm in wanted and (arm, seed) not in there]
    if not show and jobs == 1:
        for one in todo:
            run_one(*one)
    elif not show:
        pool = ThreadPoolExecutor(jobs)
        try:
            for future in as_completed([pool.submit(run_one, *one) for one in todo]):
                future.result()
        finally:                                                                  # after an error or Ctrl-C no new one
            pool.shutdown(cancel_futures=True)
    print_table(read_rows(path))


if __name__ == '__main__':
    configure(globals())
    main()

"""
How long does training take to a given AP? Seconds of train.py, evaluation excluded, until the validation set says so.

    python bench.py speedrun config/shapes.py --until=AP50:0.90 --seeds='(0,1,2)'
    python bench.py speedrun config/shapes.py --until=AP:0.5 --stop=True --eval_interval=0.25 --optimizer=adamw

What is no setting of this script goes to train.py as it is. A row of results/speedrun.csv is a seed; one that is there,
of the same command, aim and number of threads, is not run again, so that a series may be broken off. A seed that was
broken off starts anew: its clock would not be one run's. The aim counts as reached at the first evaluation that shows
it, so eval_interval is the resolution; a run that never reaches it has no seconds in its row.

The clock is train.py's: from its first step, data loading included, imports, setup and evaluations not. Machines,
threads and whatever else runs there change it: compare on one idle machine. What it does not do: keep the runs
comparable, for a shorter schedule is another recipe, and may be the faster one.
"""
import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from statistics import mean

from benches.costs import machine
from configurator import InputError, configure

# settings
until = 'AP50:0.90'            # AP:number or AP50:number, of the validation set
seeds: tuple = (0, 1, 2)
stop = False                   # end a run as soon as it is there; False: let it end, and know its final AP too
threads = 0                    # CPU threads of a run; 0: as many as there are cores
out = 'results/speedrun.csv'

SETTINGS = ['until', 'seeds', 'stop', 'threads', 'out']
COLUMNS = ['train', 'until', 'seed', 'seconds', 'epoch', 'best AP', 'best AP50', 'clock seconds', 'threads', 'machine',
           'date']


def parse_line(line):
    """A line that train.py prints at an evaluation -> dict(epoch, AP, AP50, seconds), else None."""
    scores, minutes = re.search(r'\| AP ([\d.]+) AP50 ([\d.]+)', line), re.search(r'([\d.]+) min of training', line)
    epoch = re.match(r'epoch ([\d.]+)', line)
    if not (scores and minutes and epoch):
        return None
    return dict(epoch=float(epoch[1]), AP=float(scores[1]), AP50=float(scores[2]), seconds=60 * float(minutes[1]))


def run_seed(arguments, seed, column, aim):
    """Train with this seed -> the row of the table."""
    folder, reached, best, started = os.path.join('out', 'speedrun', str(seed)), {}, dict(AP=0.0, AP50=0.0), time.time()
    os.makedirs(folder, exist_ok=True)
    command = [sys.executable, 'train.py', *arguments, f'--seed={seed}', f'--out_dir={folder}']
    line, env = '', os.environ | dict(OMP_NUM_THREADS=str(threads or os.cpu_count()))
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with open(os.path.join(folder, 'train.txt'), 'w', encoding='utf-8') as log:
        for line in process.stdout:
            log.write(line)
            log.flush()
            now = parse_line(line)
            if not now:
                continue
            print(f'seed {seed}: epoch {now["epoch"]:.2f}, {now["seconds"]:.1f} s, AP {now["AP"]:.4f}, '
                  f'AP50 {now["AP50"]:.4f}', flush=True)
            best = {name: max(best[name], now[name]) for name in best}
            if now[column] >= aim and not reached:
                reached = now
                if stop:
                    process.send_signal(signal.SIGTERM)                # it finishes its step and saves
    if process.wait():
        raise InputError(f'train.py ended with {process.returncode}: {line.strip()} (all of it: {folder}/train.txt)')
    return {'train': shlex.join(arguments), 'until': until, 'seed': seed, 'best AP': best['AP'],
            'best AP50': best['AP50'], 'seconds': round(reached['seconds'], 1) if reached else '',
            'epoch': reached.get('epoch', ''), 'clock seconds': round(time.time() - started, 1),
            'threads': threads or os.cpu_count(), 'machine': re.sub(r', \d+ threads', '', machine()),
            'date': time.strftime('%Y-%m-%d')}


def read_rows(arguments):
    """The rows of this command, aim and number of threads, by seed."""
    if not os.path.exists(out):
        return {}
    with open(out, newline='', encoding='utf-8') as f:
        same = (shlex.join(arguments), until, str(threads or os.cpu_count()))
        return {int(row['seed']): row for row in csv.DictReader(f)
                if (row['train'], row['until'], row['threads']) == same}


def main(arguments):
    column, _, number = until.partition(':')
    if column not in ('AP', 'AP50') or not re.fullmatch(r'0?\.\d+|[01]', number):
        raise InputError(f'--until={until}: write AP or AP50, a colon, and a number from 0 to 1, as in AP50:0.90')
    if not arguments:
        raise InputError('what shall be trained? As in: python bench.py speedrun config/shapes.py --until=AP50:0.90')
    if own := [arg for arg in arguments if re.match(r'--(seed|out_dir|init_from=resume)', arg)]:
        raise InputError(f'{own[0]} is chosen here, leave it out; --seeds=(0,1,2) are the seeds')
    for seed in seeds:
        if seed in read_rows(arguments):
            continue
        row = run_seed(arguments, seed, column, float(number))
        new = not os.path.exists(out)
        os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
        with open(out, 'a', newline='', encoding='utf-8') as f:
            writer = csv.DictWriter(f, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
    rows = [row for seed, row in read_rows(arguments).items() if seed in seeds]
    times = [float(row['seconds']) for row in rows if row['seconds']]
    spread = f': mean {mean(times):.1f} s, {min(times):.1f} to {max(times):.1f} s' if times else ''
    print(f'{until} reached by {len(times)} of {len(rows)} seeds{spread} of training; {out}')


if __name__ == '__main__':
    mine = [arg for arg in sys.argv[1:] if arg.startswith('--') and arg[2:].partition('=')[0] in SETTINGS]
    configure(globals(), argv=mine)
    main([arg for arg in sys.argv[1:] if arg not in mine])

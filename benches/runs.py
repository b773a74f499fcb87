"""
Several runs of train.py side by side: their AP, the settings in which they differ, the spread over seeds, one plot.

    python bench.py runs out/own out/own_muon
    python bench.py runs out/shapes_*                    a folder that holds no log.csv is named and passed over
    python bench.py runs out/a out/b --metric=AP50 --out=out/bench/mine

Runs that differ by their seed only are a group, and what one plots, prints and should compare is groups: one seed
beside another says little. "last" is the last evaluation, "best" the highest, which was chosen on the very images it is
measured on and so flatters runs that evaluate often. A run may be unfinished, or still going on.

out.csv has a row for each run, out.png a curve for each, in the colour of its group (with matplotlib). Settings come
from best.pt or ckpt.pt. Those that change no result (folders, workers, what is logged) are not compared, and a resumed
run counts as one from scratch, because its checkpoint no longer says what it started from.

What it does not do: significance tests (benches/experiment.py pairs runs by seed and does), other programs' logs.
"""
import csv
import math
import os
import sys
from statistics import mean, stdev

from checkpoint import read_checkpoint
from configurator import InputError, configure
from plots import new_figure

# settings
metric = 'AP'                  # a column of log.csv with a value for each evaluation: AP, AP50, AP75
out = 'out/bench/runs'         # out.csv and out.png

NO_RESULT = ['out_dir', 'workers', 'cache_mb', 'num_pictures', 'log_interval', 'save_interval', 'show_batch',
             'make_data', 'num_classes', 'report']
COLUMNS = ['run', 'group', 'seed', 'steps', 'epoch', 'finished', 'evaluations', 'last', 'best', 'best epoch',
           'settings']


def read_log(path):
    """log.csv -> [(step, epoch, value of the metric or None)]; lines that cannot be read, half a one, are left out."""
    points = []
    with open(path, encoding='utf-8', errors='replace') as f:
        lines = [line.replace('\0', '') for line in f if line.endswith('\n')]          # without, the line broke off
    for row in csv.DictReader(lines):
        try:
            value = row.get(metric)
            points.append((int(row['step']), float(row['epoch']), float(value) if value else None))
        except (KeyError, TypeError, ValueError):
            continue
    return points


def read_settings(folder):
    """The settings of a run as its ckpt.pt or best.pt has them, {} without either; and the steps it is to have."""
    for name in ('ckpt.pt', 'best.pt'):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            try:
                saved = read_checkpoint(path)
            except InputError as e:                                    # half a file: the other one may be whole
                print(f'warning: {e}')
                continue
            config = saved.get('config')
            if isinstance(config, dict):
                config |= dict(init_from='scratch') if config.get('init_from') == 'resume' else {}
                total = saved.get('total_steps', math.inf)
                return config, min(total, config.get('max_steps') or total)
    return {}, math.inf


def read_run(folder):
    """A folder of train.py -> dict(run, config, points, ...), or None and a printed line if there is no log in it."""
    path = os.path.join(folder, 'log.csv')
    if not os.path.isfile(path):
        print(f'warning: {folder} has no log.csv: passed over')
        return None
    points, (config, last_step) = read_log(path), read_settings(folder)
    steps, epoch, _ = points[-1] if points else (0, 0.0, None)
    scored = [(at, value) for _, at, value in points if value is not None]
    best_epoch, best = max(scored, key=lambda point: point[1], default=(None, None))
    return dict(run=os.path.normpath(folder), config=config, points=scored, seed=config.get('seed'), steps=steps,
                epoch=epoch, finished=steps >= last_step, evaluations=len(scored),
                last=scored[-1][1] if scored else None, best=best, **{'best epoch': best_epoch})


def differing_settings(configs):
    """The names of the settings, seed apart, that are not the same in all configs; a run without any is left out."""
    configs = [config for config in configs if config]
    names = dict.fromkeys(name for config in configs for name in config if name not in (*NO_RESULT, 'seed'))
    return [name for name in names if any(config.get(name) != configs[0].get(name) for config in configs)]


def group_runs(runs):
    """Write into each run its `settings`, those that differ between runs, as text; and the number of its `group`."""
    names, groups = differing_settings([run['config'] for run in runs]), {}
    for run in runs:
        config = run['config']
        text = ' '.join(f'{name}={config.get(name, "-")}' for name in names) if config else f'unknown: {run["run"]}'
        run['settings'] = text or 'all settings equal'
        run['group'] = groups.setdefault(run['settings'], len(groups))


def cell(value):
    return '-' if value is None else f'{value:.4f}' if isinstance(value, float) else str(value)


def print_table(runs):
    width = max(len(run['run']) for run in runs)
    print(f'{"run":<{width}}  group  seed    epoch  last {metric:<5} best {metric:<5} at epoch')
    for run in sorted(runs, key=lambda run: run['group']):
        note = '' if run['finished'] else '  unfinished' if run['config'] else '  no checkpoint'
        at = '-' if run['best epoch'] is None else f'{run["best epoch"]:.1f}'
        print(f'{run["run"]:<{width}}  {run["group"]:>5} {cell(run["seed"]):>5} {run["epoch"]:>8.2f} '
              f'{cell(run["last"]):>9}  {cell(run["best"]):>9} {at:>9}{note}')
    print(f'\ngroup  runs  last {metric}, mean ± standard deviation    best {metric}    settings')
    for group in sorted({run['group'] for run in runs}):
        mine = [run for run in runs if run['group'] == group]
        cells = []
        for what in ('last', 'best'):
            x = [run[what] for run in mine if run[what] is not None]
            cells.append('-' if not x else f'{mean(x):.4f}' + (f' ± {stdev(x):.4f}' if len(x) > 1 else ''))
        print(f'{group:>5}  {len(mine):>4}  {cells[0]:<33}  {cells[1]:<17}  {mine[0]["settings"]}')


def draw(runs, path):
    """The metric over epochs: a curve for each run, a colour for each group."""
    try:
        figure = new_figure(7, 4.4)
    except InputError as e:
        print(f'no {path}: {e}')
        return
    ax, named = figure.subplots(), set()
    for run in runs:
        label = None if run['group'] in named else run['settings'][:70]
        ax.plot(*zip(*run['points'], strict=True), color=f'C{run["group"] % 10}', lw=1.2, label=label,
                marker='.' if len(run['points']) < 50 else '')
        named.add(run['group'])
    ax.set(xlabel='epoch', ylabel=f'{metric}, validation set')
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    print(path)


def main(folders):
    if not folders:
        raise InputError('name the folders of the runs: python bench.py runs out/a out/b')
    if missing := [folder for folder in folders if not os.path.isdir(folder)]:
        raise InputError(f'{missing[0]} is no folder: name those that train.py wrote to, its out_dir')
    runs = [run for run in map(read_run, dict.fromkeys(folders)) if run]
    if not runs:
        raise InputError(f'not one of the {len(folders)} folders has a log.csv: name those that train.py wrote to')
    group_runs(runs)
    print_table(runs)
    if not any(run['points'] for run in runs):
        print(f'no run has an evaluation with {metric} yet: no curves')
    try:
        os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
        with open(f'{out}.csv', 'w', newline='', encoding='utf-8') as f:
            writer = csv.DictWriter(f, COLUMNS, extrasaction='ignore')
            writer.writeheader()
            writer.writerows(runs)
        print(f'{out}.csv')
        if scored := [run for run in runs if run['points']]:
            draw(scored, f'{out}.png')
    except OSError as e:
        raise InputError(f'--out={out} cannot be written ({e.strerror}): name another file') from None


if __name__ == '__main__':
    configure(globals(), argv=[arg for arg in sys.argv[1:] if arg.startswith('--')])
    main([arg for arg in sys.argv[1:] if not arg.startswith('--')])

"""
Everything that is measured. Each line is a script of its own, and says more at the top of its file.

    python bench.py attention | letters | latency | nms | train | memory | loader       benches/costs.py
    python bench.py experiment experiments/NAME.py      several trainings side by side: benches/experiment.py
    python bench.py runs out/a out/b                    what runs that are done have reached: benches/runs.py
    python bench.py speedrun config/shapes.py           seconds of training to a given AP: benches/speedrun.py
    python bench.py gpu                                 all that wants a GPU, in ten minutes: benches/gpu.py
    python bench.py clip --weights=out/clips/best.pt    what it remembers of earlier frames: benches/clip.py
"""
import runpy
import sys

from configurator import InputError, print_error

SCRIPTS = dict.fromkeys('attention letters latency nms train memory loader'.split(), 'costs') | dict(
    experiment='experiment', runs='runs', speedrun='speedrun', gpu='gpu', clip='clip')

if __name__ == '__main__':
    what = sys.argv[1] if len(sys.argv) > 1 else 'nothing'
    if what not in SCRIPTS:
        sys.excepthook = print_error
        raise InputError(f'python bench.py needs one of {" ".join(SCRIPTS)}, got {what}')
    if SCRIPTS[what] == what:                                                      # a script that has this name only
        del sys.argv[1]
    runpy.run_module(f'benches.{SCRIPTS[what]}', run_name='__main__', alter_sys=True)

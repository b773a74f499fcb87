"""
The poor man's configuration, after nanoGPT. Every script keeps its knobs as plain globals at its top and then says

    config = configure(globals())

after which `python train.py config/shapes.py --lr=0.002` has run config/shapes.py and then taken --lr, the later word
winning. A config file is Python: it may compute, and it may start from another one with
`exec(open('config/hsvdet_coco20.py').read())`. It sees the defaults (`lr = lr / 2` works).

What it does not do: sections, types beyond Python's own, environment variables. A name that is no knob, a value of
another type, a file that is not there: each ends the run with one sentence, before anything has been touched.
"""
import ast
import difflib
import os
import sys
import traceback


class InputError(ValueError):
    """The user's input is at fault. The message is one sentence that names the place and the way out."""


def one_sentence(kind, error, trace):
    """The excepthook of every script: the user's mistakes get their sentence, our bugs keep their traceback."""
    if issubclass(kind, InputError):
        print(f'error: {error}', file=sys.stderr)
    elif kind.__name__ == 'OutOfMemoryError':                        # torch's, named so that this file need not load torch
        print('error: out of GPU memory: more --grad_accum, --checkpointing=True, or a smaller --imgsz; python bench.py memory says where it goes',
              file=sys.stderr)
    else:
        traceback.print_exception(kind, error, trace)


def check(name, value, knobs, kinds, where):
    """The value as its knob wants it, or an InputError that names the place where it stands."""
    if name not in knobs:
        near = difflib.get_close_matches(name, knobs, 1)
        raise InputError(f'{where}: unknown setting "{name}"' + (f', did you mean "{near[0]}"?' if near else
                         f'; the settings are the names at the top of {os.path.basename(sys.argv[0])}'))
    wanted = kinds.get(name) or type(knobs[name])
    wanted = getattr(wanted, '__args__', (wanted,))                  # int | tuple -> (int, tuple)
    if type(value) is int and float in wanted and int not in wanted:
        return float(value)                                          # 1 may stand for 1.0
    if type(value) is list and tuple in wanted:
        return tuple(value)
    if type(value) not in wanted:                                    # isinstance would let True pass for 1
        names = ' or '.join(kind.__name__ for kind in wanted)
        raise InputError(f'{where}: {name} must be {names}, got {value!r} ({type(value).__name__})')
    return value


def configure(namespace, positional='', argv=None):
    """
    Override the knobs in `namespace` (a script's globals()) from the command line; return all of them as a dict.

    Knobs are the globals holding an int, float, bool, str or tuple under a lower-case name without a leading underscore. An
    annotation (`imgsz: int | tuple = 640`) widens what a knob takes. `positional` names the knob that receives an
    argument that is neither --key=value nor a config file. Raises InputError.
    """
    sys.excepthook = one_sentence
    knobs = {name: value for name, value in namespace.items()
             if type(value) in (int, float, bool, str, tuple) and name.islower() and not name.startswith('_')}
    kinds = namespace.get('__annotations__') or getattr(sys.modules.get(namespace.get('__name__')), '__annotations__', {})   # Python 3.14
    for arg in sys.argv[1:] if argv is None else argv:
        if arg.startswith('--'):
            name, equals, text = arg[2:].partition('=')
            if not equals:
                raise InputError(f'{arg}: settings are written --key=value, as in --{name or "lr"}=...')
            try:
                value = ast.literal_eval(text)
            except (SyntaxError, ValueError):
                value = text                                         # a bare word is a string
            if type(knobs.get(name)) is str:
                value = text                                         # a folder may be called 2024
            given, where = {name: value}, arg
        elif arg.endswith('.py'):
            given, where = run(arg, knobs), arg
        elif positional:
            given, where = {positional: arg}, arg
        else:
            raise InputError(f'{arg}: neither a config file (*.py) nor --key=value')
        for name, value in given.items():
            knobs[name] = check(name, value, knobs, kinds, where)
    namespace.update(knobs)
    return knobs


def run(path, knobs):
    """Execute one config file; return the names that it set."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or '.'
        here = sorted(f for f in os.listdir(folder) if f.endswith('.py')) if os.path.isdir(folder) else []
        near = difflib.get_close_matches(os.path.basename(path), here, 1)
        hint = f', did you mean {os.path.join(folder, near[0])}?' if near else '; the ones we ship are in config/'
        raise InputError(f'config file {path} not found{hint}')
    seen = dict(knobs)
    try:
        with open(path, encoding='utf-8') as f:
            exec(compile(f.read(), path, 'exec'), seen)
    except InputError:
        raise
    except Exception as e:                                           # whatever a user's file raises is the user's to mend
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
        line = e.lineno if isinstance(e, SyntaxError) else lines[-1] if lines else '?'
        raise InputError(f'config file {path}, line {line}: {type(e).__name__}: {e}') from None
    return {name: value for name, value in seen.items()
            if not name.startswith('_') and not callable(value) and type(value).__name__ != 'module'
            and (name not in knobs or value is not knobs[name])}

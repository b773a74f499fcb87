"""
Settings, in the manner of nanoGPT. Every script keeps its settings as plain globals at its top and then says

    config = configure(globals())

after which `python train.py config/shapes.py --lr=0.002` has run config/shapes.py and then taken --lr: the later one
wins. A config file is Python: it may compute, and it may start from another one with
`exec(open('config/hsvdet_coco20.py').read())`. It sees the defaults (`lr = lr / 2` works).

Settings that several scripts share (augmentation, network) are fields of a dataclass; `configure(globals(), Augment)`
makes every field a setting of the script, default included, and `build(Augment, config)` makes the dataclass of them.

This file imports nothing of ours, so that every other one may import it; hence InputError and the excepthook are here.
What it does not do: sections, types beyond Python's own, environment variables. A name that is no setting, a value of
another type, a file that is not there: each ends the run with one sentence, before anything has been touched.
"""
import ast
import dataclasses
import difflib
import os
import sys
import traceback


class InputError(ValueError):
    """The user's input is at fault. The message is one sentence that names the place and the fix."""


def print_error(kind, error, trace):
    """The excepthook of every script: mistakes of users get one sentence, bugs keep their traceback."""
    if issubclass(kind, InputError):
        message = str(error)
        if 'Original Traceback' in message:                        # raised in a loader process: its last line
            message = message.strip().splitlines()[-1].removeprefix('configurator.InputError: ')
        print(f'error: {message}', file=sys.stderr)
        return
    traceback.print_exception(kind, error, trace)
    if kind.__name__ == 'OutOfMemoryError':                        # torch's, by name, so that torch need not be loaded
        print('error: out of GPU memory on the line above: --grad_accum=4, --checkpointing=True or a lower --imgsz; '
              'python bench.py memory prints where memory goes', file=sys.stderr)


def check(name, value, settings, kinds, where, classes=()):
    """The value as its setting wants it, or an InputError that names the place where it stands."""
    if name not in settings:
        near = difflib.get_close_matches(name, settings, 1)
        fields = ', '.join(f'{cls.__module__}.{cls.__name__}' for cls in classes)
        known = f'the names at the top of {os.path.basename(sys.argv[0])}'
        if fields:
            known += f' and the fields of {fields}'
        hint = f', did you mean "{near[0]}"?' if near else f'; the settings are {known}'
        raise InputError(f'{where}: unknown setting "{name}"{hint}')
    wanted = kinds.get(name) or type(settings[name])
    wanted = getattr(wanted, '__args__', (wanted,))                  # int | tuple -> (int, tuple)
    if type(value) is int and float in wanted and int not in wanted:
        return float(value)                                          # 1 may stand for 1.0
    if type(value) is list and tuple in wanted:
        return tuple(value)
    if type(value) not in wanted:                                    # isinstance would let True pass for 1
        names = ' or '.join(kind.__name__ for kind in wanted)
        raise InputError(f'{where}: {name} must be {names}, got {value!r} ({type(value).__name__})')
    return value


def configure(namespace, *dataclass_settings, positional='', lenient=False, argv=None):
    """
    Override the settings in `namespace` (a script's globals()) from the command line; return all of them as a dict.

    Settings are the globals holding an int, float, bool, str or tuple under a lower-case name without a leading
    underscore, and the fields of the dataclasses given. An annotation (`imgsz: int | tuple = 640`) widens what a
    setting takes. `positional` names the setting that receives an argument that is neither --key=value nor a config
    file. `lenient`: names in a config file that this script does not have are passed over, so that bench.py can read
    the files of train.py. Raises InputError.
    """
    sys.excepthook = print_error
    settings = {name: value for name, value in namespace.items()
                if type(value) in (int, float, bool, str, tuple) and name.islower() and not name.startswith('_')}
    module = sys.modules.get(namespace.get('__name__'))
    kinds = dict(namespace.get('__annotations__') or getattr(module, '__annotations__', {}))  # Python 3.14: the latter
    for cls in dataclass_settings:
        for field in dataclasses.fields(cls):
            settings.setdefault(field.name, field.default)           # the script's own default goes first
            kinds.setdefault(field.name, field.type)
    named = ''                                                       # the positional argument
    for arg in sys.argv[1:] if argv is None else argv:
        if arg.startswith('--'):
            name, equals, text = arg[2:].partition('=')
            if not equals:
                raise InputError(f'{arg}: settings are written --key=value, as in --{name or "lr"}=...')
            given, where = {name: parse(text, settings.get(name), kinds.get(name))}, arg
        elif arg.endswith('.py'):
            given, where = run_config(arg, settings), arg
            if lenient:
                given = {name: value for name, value in given.items() if name in settings}
        elif positional and not named:
            given, where, named = {positional: arg}, arg, arg
        elif positional:
            raise InputError(f'{arg}: {positional} is {named} already, and takes one; a pattern such as "folder/*.jpg" '
                             'needs quotes')
        else:
            raise InputError(f'{arg}: neither a config file (*.py) nor --key=value')
        for name, value in given.items():
            settings[name] = check(name, value, settings, kinds, where, dataclass_settings)
    namespace.update(settings)
    return settings


def build(cls, settings, among=()):
    """
    An instance of the dataclass `cls` from the settings of the same names, which may be those in somebody's checkpoint:
    a value of another type than its field raises InputError, and so does a name in `among` that is none of its fields.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    if unknown := set(among) - set(kinds):
        raise InputError(f'{cls.__name__} has no {", ".join(sorted(unknown))}: it has {", ".join(kinds)}')
    return cls(**{name: check(name, settings[name], kinds, kinds, cls.__name__) for name in kinds if name in settings})


def parse(text, default, kind=None):
    """The text of --key=text as a Python value; a bare word is a string, and so is all that is meant for a string."""
    if type(default) is str and kind in (None, str):
        return text                                                  # a folder may be called 2024
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def run_config(path, settings):
    """Execute one config file; return the names that it set."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or '.'
        here = sorted(f for f in os.listdir(folder) if f.endswith('.py')) if os.path.isdir(folder) else []
        near = difflib.get_close_matches(os.path.basename(path), here, 1)
        there = f'; {folder} has {", ".join(here) or "none"}'
        hint = f', did you mean {os.path.join(folder, near[0])}?' if near else there
        raise InputError(f'config file {path} not found{hint}')
    seen = dict(settings)
    try:
        with open(path, encoding='utf-8') as f:
            exec(compile(f.read(), path, 'exec'), seen)
    except InputError:
        raise
    except Exception as e:                                         # whatever a user's file raises is the user's to fix
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
        line = e.lineno if isinstance(e, SyntaxError) else lines[-1] if lines else '?'
        raise InputError(f'config file {path}, line {line}: {type(e).__name__}: {e}') from None
    return {name: value for name, value in seen.items()
            if not name.startswith('_') and not callable(value) and type(value).__name__ != 'module'
            and (name not in settings or value is not settings[name])}

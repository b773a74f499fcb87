"""
Files with weights: written so that a crash costs nothing, read so that no foreign file gets to run code.

    read_checkpoint(path)     the content of a .pt file, ours or a foreign one, without executing anything in it
    read_weights(path)        of it: architecture, config, tensors, class names, image size, best F1; YOLOv8 converted
    fill(model, weights, ...) tensors into a model; says which parts start fresh, refuses what does not fit
    write_checkpoint(...)     beside, then renamed: an old file is never half overwritten

A .pt file is a zip with a pickle inside, and a pickle is a program. torch.load(weights_only=True) refuses everything
but tensors and plain containers. YOLOv8's published files name classes of their package, so for those an unpickler of
our own builds tensors and containers, puts an empty stub in place of the classes such files are known to name, and
refuses every other name, which is where code would come from.
"""
import collections
import contextlib
import os
import pickle
import types
import zipfile
import zlib

import torch

from configurator import InputError

BACKBONE = ('stem', 'down2', 'stage2', 'down3', 'stage3', 'down4', 'stage4', 'down5', 'stage5', 'sppf')
YOLOV8_LAYERS = dict(enumerate(BACKBONE)) | {                        # index in its names model.0 ... -> ours
    12: 'fpn4', 15: 'fpn3', 16: 'pan_down4', 18: 'pan4', 19: 'pan_down5', 21: 'pan5'}
YOLOV8_WIDTHS = {16: 'n', 32: 's', 48: 'm', 64: 'l', 80: 'x'}        # channels of the stem


# --- writing --------------------------------------------------------------------------------------------------------

def write_checkpoint(path, content, keep_previous=False):
    """
    Save `content` as path.part, then rename; with keep_previous the file before it stays as *_prev.pt. A full disk
    costs the newest file, not the run: -> '' or a sentence that says what went wrong.
    """
    part = path + '.part'
    try:
        with open(part, 'wb') as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        if keep_previous and os.path.exists(path):
            os.replace(path, path.removesuffix('.pt') + '_prev.pt')
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        with contextlib.suppress(OSError):
            os.remove(part)
        return f'{path} was not written ({str(e).splitlines()[0]}), an older one stays if there is one; free some space'
    return ''


# --- reading --------------------------------------------------------------------------------------------------------

class StubClass:
    """Stands in for every class of a foreign pickle: keeps the state it is given and does nothing with it."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key, value):                               # subclasses of dict and list are
        pass                                                         # filled while they load

    def append(self, value):
        pass

    def extend(self, values):
        pass


class RestrictedUnpickler(pickle.Unpickler):
    """Builds tensors and plain containers; the classes that a YOLO file is known to name become stubs; any other name
    is refused. (The storages, torch.HalfStorage and such, are markers of a dtype that torch.load resolves itself.)"""

    def find_class(self, module, name):
        allowed = {                                                # functions are wrapped: a pickle may set attributes
            ('collections', 'OrderedDict'): collections.OrderedDict,  # of what it gets, not of torch's own
            ('torch._utils', '_rebuild_tensor_v2'): lambda *a: torch._utils._rebuild_tensor_v2(*a),
            ('torch._utils', '_rebuild_parameter'): lambda *a: torch._utils._rebuild_parameter(*a),
            ('torch', 'Size'): torch.Size,
            ('builtins', 'set'): set, ('__builtin__', 'set'): set,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.split('.')[0] in ('ultralytics', 'models', 'utils') or module.startswith('torch.nn.modules.'):
            return type(name, (StubClass,), {})
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')


def check_archive(path):
    """A complete zip of weights, or an InputError. (torch.load does not check the CRCs, and would run TorchScript.)"""
    try:
        with zipfile.ZipFile(path) as z:
            broken = z.testzip()
            is_program = any(name.endswith('constants.pkl') for name in z.namelist())
        if broken:
            raise zipfile.BadZipFile(broken)
    except FileNotFoundError:
        raise InputError(f'checkpoint {path} not found: train one with python train.py config/shapes.py, '
                         'or give the path of another') from None
    except IsADirectoryError:
        raise InputError(f'{path} is a folder: give the checkpoint in it, such as {path}/best.pt') from None
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, zlib.error) as e:       # all zipfile's
        raise InputError(f'{path} is not a complete checkpoint ({e}): the download or the write broke off, '
                         'fetch it again') from None
    if is_program:
        raise InputError(f'{path} was refused: it is a TorchScript program, which is code; give weights instead')


def read_checkpoint(path):
    """The content of a .pt file as a dict: our own, or a foreign one with stubs in place of its classes. InputError."""
    check_archive(path)
    restricted = types.SimpleNamespace(Unpickler=RestrictedUnpickler, load=None, __name__='pickle')
    try:
        try:
            saved = torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError:                               # a genuine foreign file, or a hostile one
            saved = torch.load(path, map_location='cpu', weights_only=False, pickle_module=restricted)
    except Exception as e:                                           # there is no end to what a wrong file can raise
        why = ' '.join(str(e).split())[:200]
        raise InputError(f'{path} was refused: it cannot be read without running code, or at all ({why})') from None
    if not isinstance(saved, dict):
        raise InputError(f'{path} was refused: it holds a {type(saved).__name__}, not a checkpoint')
    return saved


def check_best_f1(value, path):
    """
    What a file says of the score with the best F1: None, or a dict of score, P, R, F1, each in 0..1 or None, and
    by_class, a dict of such dicts by class name -> the same in plain floats. Raises InputError.
    """
    def figures(d):
        row = {key: None if d[key] is None else float(d[key]) for key in ('score', 'P', 'R', 'F1')}
        if not all(v is None or 0 <= v <= 1 for v in row.values()) or len({v is None for v in row.values()}) > 1:
            raise ValueError(f'{row} are not all in 0..1')
        return row

    try:
        if value is None:
            return None
        return figures(value) | dict(by_class={str(name): figures(d) for name, d in value['by_class'].items()})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise InputError(f'{path} is damaged: its best_f1 should hold score, P, R, F1 and by_class '
                         f'({type(e).__name__}: {e}); take another copy, or train again') from None


def read_weights(path):
    """
    A .pt file -> dict(arch, config, weights, names, imgsz, best_f1): 'hsvdet' or 'rtdetr', the fields of its config
    dataclass, tensors by name (EMA weights where there are some), class names, (H, W) or None, and what check_best_f1
    returns (None for foreign files, and for ours from before they had it). Raises InputError.
    """
    saved = read_checkpoint(path)
    try:
        if 'model_config' not in saved:
            config, weights, names = convert_yolov8(saved, path)
            return dict(arch='hsvdet', config=config, weights=weights, names=names, imgsz=None, best_f1=None)
        imgsz, config = saved.get('imgsz'), dict(saved['model_config'])
        config['scale'], config['num_classes'] = str(config['scale']), int(config['num_classes'])
        weights, names = saved.get('ema') or saved['model'], [str(name) for name in saved['names']]
        if config['num_classes'] != len(names):
            raise ValueError(f'{config["num_classes"]} classes, {len(names)} names')
        for name, t in weights.items():
            if type(t) is not torch.Tensor or t.layout != torch.strided or t.is_meta or t.is_complex():
                raise ValueError(f'{name} is no ordinary tensor')
        return dict(arch=saved.get('arch', 'hsvdet'), config=config, names=names, weights=weights,
                    imgsz=tuple(imgsz) if imgsz else None,
                    best_f1=check_best_f1(saved.get('best_f1'), path))
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as e:
        raise InputError(f'{path} is neither a checkpoint of ours nor a YOLOv8 detector '
                         f'({type(e).__name__}: {e})') from None


def convert_yolov8(saved, path):
    """A YOLOv8 file's content -> our config dict, our state dict, class names."""
    root = saved.get('ema') or saved.get('model')
    tensors = {}

    def walk(module, prefix):
        for kind in ('_parameters', '_buffers'):
            for name, t in getattr(module, kind, {}).items():
                if isinstance(t, torch.Tensor):
                    tensors[prefix + name] = t.detach().float()
        for name, child in getattr(module, '_modules', {}).items():
            walk(child, f'{prefix}{name}.')

    walk(root, '')
    stem, logits = tensors.get('model.0.conv.weight'), tensors.get('model.22.cv3.0.2.weight')
    if (stem is None or logits is None or stem.shape[0] not in YOLOV8_WIDTHS or stem.shape[2] != 3
            or 'model.22.dfl.conv.weight' not in tensors):
        raise InputError(f'{path} is not a YOLOv8 detector (n s m l x): the layers do not have its names and shapes')
    weights = {yolov8_name(name, path): t for name, t in tensors.items()}
    weights['detect_head.bins'] = weights['detect_head.bins'].flatten()
    K = logits.shape[0]
    names = getattr(root, 'names', None) or {i: f'class{i}' for i in range(K)}
    names = [str(names[i]) for i in range(K)] if isinstance(names, dict) else [str(n) for n in names]
    return dict(scale=YOLOV8_WIDTHS[stem.shape[0]], num_classes=K, attn='---'), weights, names


def yolov8_name(name, path):
    """model.15.m.0.cv1.conv.weight -> fpn3.blocks.0.conv1.conv.weight"""
    if name == 'model.22.dfl.conv.weight':
        return 'detect_head.bins'
    if name.startswith('model.22.'):
        return name.replace('model.22.cv2.', 'detect_head.box.').replace('model.22.cv3.', 'detect_head.cls.')
    _, index, rest = name.split('.', 2) if name.count('.') > 1 else ('', '', '')
    layer = YOLOV8_LAYERS.get(int(index)) if index.isdigit() else None
    if layer is None:
        raise InputError(f'{path} is not a YOLOv8 detector: it has a tensor {name}')
    if rest.startswith('m.'):                                        # C2f's bottlenecks
        rest = 'blocks.' + rest[2:].replace('cv1.', 'conv1.').replace('cv2.', 'conv2.')
    else:
        rest = rest.replace('cv1.', 'conv_in.').replace('cv2.', 'conv_out.')
    return f'backbone.{layer}.{rest}' if layer in BACKBONE else f'{layer}.{rest}'


# --- weights into a model -------------------------------------------------------------------------------------------

def fill(model, weights, path, may_be_fresh, may_be_left, verbose=True):
    """
    Load the tensors of `weights` that `model` has. may_be_fresh(name): a tensor of the model that the file may lack, or
    have in another shape, and that then keeps its initial values; may_be_left(name): a tensor of the file that the
    model may have no place for. Anything else that does not match raises InputError.
    """
    own, fresh = model.state_dict(), []
    for name, tensor in own.items():
        given = weights.get(name)
        if given is not None and given.shape == tensor.shape:
            own[name] = given.to(tensor.dtype)
        elif may_be_fresh(name):
            fresh.append(name)
        else:
            had = 'is missing' if given is None else f'is {tuple(given.shape)}, not {tuple(tensor.shape)}'
            raise InputError(f'{path} does not fit this network ({model.cfg}): {name} {had}')
    left = [name for name in weights if name not in own]
    misplaced = [name for name in left if not may_be_left(name)]
    if misplaced:
        raise InputError(f'{path} holds tensors that this network (scale {model.cfg.scale}) has no place for, '
                         f'such as {misplaced[0]}')
    model.load_state_dict(own)
    if verbose:
        parts = collections.Counter('.'.join(name.split('.')[:2 if '_head' in name else 1]) for name in fresh)
        print(f'{path}: {len(own) - len(fresh)} tensors matched'
              + ''.join(f'; {part} starts fresh ({count})' for part, count in parts.items())
              + (f'; {len(left)} left unused, such as {left[0]}' if left else ''))

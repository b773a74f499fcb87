"""DINOv2: reference arrays, foreign names, position resize, LoRA, the pyramid, files that are refused."""
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baselines.detr import DETR, DETRConfig
from baselines.dinov2 import VARIANTS, DINOv2
from configurator import InputError

REFERENCE = Path(__file__).parent / 'reference' / 'dinov2.npz'
ARRAYS = {key: torch.from_numpy(value) for key, value in np.load(REFERENCE).items()}
TRANSFORMERS = {key.removeprefix('weight:'): value for key, value in ARRAYS.items() if key.startswith('weight:')}


def small(seed=0, **settings):
    torch.manual_seed(seed)
    return DINOv2(**{**dict(width=48, depth=4, heads=3, pretrain_size=70, pyramid_width=16), **settings})


def hub_names():
    """The reference weights as torch.hub publishes them: one qkv matrix, other names, a mask token."""
    hub = {'mask_token': torch.zeros(1, 48)}
    for key, value in TRANSFORMERS.items():
        key = key.replace('embeddings.patch_embeddings.projection', 'patch_embed.proj')
        key = key.replace('embeddings.cls_token', 'cls_token').replace('embeddings.position_embeddings', 'pos_embed')
        key = key.replace('encoder.layer', 'blocks').replace('attention.o_proj', 'attn.proj')
        key = key.replace('layer_scale1.lambda1', 'ls1.gamma').replace('layer_scale2.lambda1', 'ls2.gamma')
        key = key.replace('layernorm', 'norm')
        if 'attention.q_proj' in key:
            names = [f'encoder.layer.{key.split(".")[1]}.attention.{part}_proj.{key.split(".")[-1]}' for part in 'qkv']
            hub[key.replace('attention.q_proj', 'attn.qkv')] = torch.cat([TRANSFORMERS[name] for name in names])
        elif 'attention.' not in key:
            hub[key] = value
    return hub


def older_names():
    """The names in the files that transformers' users download."""
    renamed = {}
    for key, value in TRANSFORMERS.items():
        for old, new in (('q_proj', 'attention.query'), ('k_proj', 'attention.key'), ('v_proj', 'attention.value'),
                         ('o_proj', 'output.dense')):
            key = key.replace(f'attention.{old}', f'attention.{new}')
        renamed[key] = value
    return renamed


def saved(tmp_path, state):
    torch.save(state, tmp_path / 'weights.pth')
    return str(tmp_path / 'weights.pth')


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    return DINOv2.from_pretrained(saved(tmp_path_factory.mktemp('w'), TRANSFORMERS), heads=3, pyramid_width=16)


# --- the transformer -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('image', ['native', 'wide'])
def test_reference(reference, image):
    assert reference.position_resize == 'size' and len(reference.blocks) == 4 and reference.side == 5
    with torch.no_grad():
        inner, = reference.forward_features(ARRAYS[f'{image}_image'], layers=(2,), norm=False)
        last, = reference.forward_features(ARRAYS[f'{image}_image'], layers=(4,))
    torch.testing.assert_close(inner, ARRAYS[f'{image}_layer2'], rtol=1e-5, atol=1e-5)          # numbers up to 7
    torch.testing.assert_close(last, ARRAYS[f'{image}_tokens'], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('names', ['hub', 'older', 'npz'])
def test_every_naming_gives_the_same_model(reference, tmp_path, names):
    path = saved(tmp_path, older_names() if names == 'older' else hub_names())
    if names == 'npz':
        path = str(tmp_path / 'weights.npz')
        np.savez(path, **{key: value.numpy() for key, value in hub_names().items()})
    model = DINOv2.from_pretrained(path, heads=3, pyramid_width=16)
    for key, value in reference.state_dict().items():
        assert key.startswith('pyramid.') or torch.equal(value, model.state_dict()[key]), key


def test_layer_scale_matters(reference):
    model = small()
    model.load_state_dict({key: torch.ones_like(value) if key.endswith(('ls1', 'ls2')) else value
                           for key, value in reference.state_dict().items()})
    with torch.no_grad():
        tokens, = model.forward_features(ARRAYS['native_image'], layers=(4,))
    assert (tokens - ARRAYS['native_tokens']).abs().mean() > 0.05


@pytest.mark.parametrize('name, millions', [('dinov2_s', 22.06), ('dinov2_b', 86.58),
                                            ('dinov2_s_reg', 22.06), ('dinov2_b_reg', 86.58)])
def test_variants(name, millions):
    with torch.device('meta'):
        model = DINOv2(**VARIANTS[name])
    count = sum(p.numel() for key, p in model.named_parameters() if not key.startswith('pyramid.'))
    assert round(count / 1e6, 2) == millions
    assert model.layers == (3, 6, 9, 12) and model.pos_embed.shape[1] == 1 + 37 ** 2


def test_registers(tmp_path):
    """Four more tokens after CLS, which have no position, and no place on the maps."""
    model = small(registers=4)
    assert model.position_resize == 'antialias'
    images = torch.rand(2, 3, 64, 96)
    tokens = model.forward_features(torch.rand(2, 3, 56, 84))
    assert [t.shape for t in tokens] == [(2, 1 + 4 + 24, 48)] * 4
    assert [m.shape for m in model(images)] == [(2, 16, 8, 12), (2, 16, 4, 6), (2, 16, 2, 3)]
    state = {key: value for key, value in model.state_dict().items() if not key.startswith('pyramid.')}
    again = DINOv2.from_pretrained(saved(tmp_path, state), heads=3)
    assert again.registers == 4 and torch.equal(again.register_tokens, model.register_tokens)


# --- positions -------------------------------------------------------------------------------------------------------

def resize_matrix(n_in, n_out, scale, antialias):
    """One axis of the bicubic resize, from its definition: output i looks at input (i + 0.5) / scale - 0.5."""
    a = -0.5 if antialias else -0.75
    width = max(1 / scale, 1) if antialias else 1                                    # the kernel widens when it shrinks
    matrix = torch.zeros(n_out, n_in, dtype=torch.float64)
    for i in range(n_out):
        center = (i + 0.5) / scale - 0.5
        for j in range(-20, n_in + 20):
            x = abs(j - center) / width
            near = (a + 2) * x ** 3 - (a + 3) * x ** 2 + 1
            far = a * x ** 3 - 5 * a * x ** 2 + 8 * a * x - 4 * a
            weight = near if x <= 1 else far if x < 2 else 0
            if not antialias:
                matrix[i, min(max(j, 0), n_in - 1)] += weight                         # the border repeats
            elif 0 <= j < n_in:
                matrix[i, j] += weight                                                # the border is left out
    return matrix / matrix.sum(1, keepdim=True)


@pytest.mark.parametrize('how', ['size', 'scale', 'antialias'])
@pytest.mark.parametrize('h, w', [(4, 8), (3, 5), (7, 2)])
def test_position_resize_against_its_definition(how, h, w):
    model = small(position_resize=how)
    extra = 0.1 if how == 'scale' else 0
    rows, columns = (resize_matrix(5, n, (n + extra) / 5, how == 'antialias') for n in (h, w))
    grid = model.pos_embed[0, 1:].view(5, 5, 48).double()
    expected = torch.einsum('hi,wj,ijc->hwc', rows, columns, grid).flatten(0, 1)
    pos = model.position_embedding(h, w)[0]
    assert torch.equal(pos[0], model.pos_embed[0, 0])                                 # CLS is not resized
    torch.testing.assert_close(pos[1:].double(), expected, rtol=1e-4, atol=1e-6)      # numbers of 0.02


def test_position_resize_difference(reference):
    """How much the choice moves the last tokens, on reference weights whose positions are rough (random)."""
    tokens = {}
    for how in ('size', 'scale', 'antialias'):
        reference.position_resize = how
        with torch.no_grad():
            tokens[how], = reference.forward_features(ARRAYS['wide_image'], layers=(4,))
            native, = reference.forward_features(ARRAYS['native_image'], layers=(4,))
        torch.testing.assert_close(native, ARRAYS['native_tokens'], rtol=1e-5, atol=1e-5)       # nothing to resize
    reference.position_resize = 'size'
    difference = {how: ((tokens[how] - tokens['size']).norm() / tokens['size'].norm()).item() for how in tokens}
    # measured: scale 0.0034, antialias 0.0042
    assert 1e-4 < difference['scale'] < 0.05 and 1e-4 < difference['antialias'] < 0.05


# --- LoRA ------------------------------------------------------------------------------------------------------------

def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith('pyramid.')}


def test_lora_parameter_count():
    with torch.device('meta'):
        model = DINOv2(**VARIANTS['dinov2_s'])
        assert not trainable(model)
        model.add_lora(rank=4)
    adapters = [p for name, p in model.named_parameters() if 'lora_' in name]
    assert sum(p.numel() for p in adapters) == 73_728
    assert all('lora_' in name for name in trainable(model))


LORA = [dict(), dict(rank=2, alpha=8, layers=(2, 4), matrices='q,v'), dict(matrices=('k', 'proj', 'fc1', 'fc2')),
        dict(rank=16, matrices='qkv,fc2', layers=(4,))]


@pytest.mark.parametrize('settings', LORA, ids=str)
def test_lora_step_0_is_exact_and_merge_is_equal(settings):
    model = small().eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        before = model(images)
        plain = model.blocks[3].qkv.weight.clone()
        model.add_lora(**settings)
        assert all(torch.equal(a, b) for a, b in zip(before, model(images), strict=True))
        for name, p in model.named_parameters():
            if name.endswith('lora_b'):
                p.normal_(std=0.5)
        adapted = model(images)
        assert (adapted[1] - before[1]).abs().max() > 1e-2
        merged = model.merge_lora()(images)
    for a, b in zip(adapted, merged, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not any('lora_' in name for name, _ in model.named_parameters())
    if settings.get('matrices') == 'q,v':                                             # k's rows are untouched
        changed = (model.blocks[3].qkv.weight != plain).view(3, 48, 48).flatten(1).any(1)
        assert changed.tolist() == [True, False, True]


def test_only_adapters_and_head_train():
    model = small().add_lora(rank=4)
    head = torch.nn.Linear(16, 1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(0)
    images, wanted = torch.rand(8, 3, 32, 64), torch.rand(8, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=0.01, weight_decay=0.1)
    losses = []
    for _ in range(30):
        p3, p4, p5 = model(images)
        loss = F.mse_loss(head(p3.mean((2, 3)) + p4.mean((2, 3)) + p5.mean((2, 3))), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    for name, p in model.named_parameters():
        learns = 'lora_' in name or name.startswith('pyramid.')
        assert learns != torch.equal(p, before[name]), name


def test_gradient_starts_at_the_first_adapter():
    """Without adapters, and before the first one, autograd keeps nothing."""
    model = small()
    images = torch.rand(1, 3, 28, 28)
    assert not any(tokens.requires_grad for tokens in model.forward_features(images))
    model.add_lora(layers=(3,))
    assert [tokens.requires_grad for tokens in model.forward_features(images)] == [False, False, True, True]
    assert trainable(model.freeze(False)) == {name for name, _ in model.named_parameters() if 'pyramid' not in name}


# --- the pyramid -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('settings', [dict(), dict(layers=(4,)), dict(layers=(1, 3)), dict(depth=2)], ids=str)
def test_maps(settings):
    model = small(**settings)
    maps = model(torch.rand(2, 3, 64, 96))
    assert [m.shape[1] for m in maps] == list(model.channels) == [16, 16, 16]
    assert [m.shape[2:] for m in maps] == [(8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize('registers', [0, 4])
def test_a_token_sees_its_own_cell(monkeypatch, registers):
    """Strides are exact: with attention off, a change in one 32x32 cell of the image changes that cell's tokens."""
    model = small(layers=(1,), registers=registers).eval()
    monkeypatch.setattr(type(model.blocks[0]), 'attention', lambda self, x: torch.zeros_like(x))
    images = torch.rand(1, 3, 96, 128)
    changed = images.clone()
    changed[:, :, 32:64, 64:96] = 1 - changed[:, :, 32:64, 64:96]
    with torch.no_grad():
        differs = [(a != b).any(1)[0] for a, b in zip(model(images), model(changed), strict=True)]
    for level, cells in ((0, 4), (1, 2)):                                             # cells per 32 px at p3, p4
        expected = torch.zeros_like(differs[level])
        expected[cells:2 * cells, 2 * cells:3 * cells] = True
        assert torch.equal(differs[level], expected)


def test_attention_is_float32_under_autocast(reference, monkeypatch):
    seen, attention = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention',
                        lambda q, k, v: seen.append(q.dtype) or attention(q, k, v))
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        reference.forward_features(torch.rand(1, 3, 28, 28))
    assert seen and set(seen) == {torch.float32}


def test_mean_and_std_are_inside():
    model = small()
    seen = {}
    model.patch_embed.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    model(torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 64, 32) + 0.1)
    assert seen['x'].shape == (1, 3, 56, 28)
    torch.testing.assert_close(seen['x'][0, :, 0, 0], 0.1 / torch.tensor([0.229, 0.224, 0.225]))


def test_sides_must_divide_by_32():
    with pytest.raises(AssertionError, match='48x64'):
        small()(torch.rand(1, 3, 48, 64))


@pytest.mark.parametrize('settings', [dict(heads=5), dict(layers=(0,)), dict(layers=(5,)), dict(pretrain_size=64),
                                      dict(position_resize='nearest')], ids=str)
def test_wrong_settings(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        small(**settings)


@pytest.mark.parametrize('settings', [dict(rank=0), dict(rank=49), dict(rank=2.0), dict(layers=(0, 1)), dict(layers=()),
                                      dict(matrices='q,w'), dict(matrices='')], ids=str)
def test_wrong_lora_settings(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        small().add_lora(**settings)


# --- files that are refused ------------------------------------------------------------------------------------------

class Attack:
    def __init__(self, *call):
        self.call = call[0], call[1:]

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('how', ['zip', 'plain', 'npz', 'nested'])
def test_a_file_never_runs_code(tmp_path, how):
    proof = tmp_path / 'it_ran'
    attack = Attack(os.mkdir, str(proof))
    path = tmp_path / ('evil.npz' if how == 'npz' else 'evil.pth')
    if how == 'zip':
        with zipfile.ZipFile(path, 'w') as z:
            z.writestr('archive/data.pkl', pickle.dumps(attack, protocol=2))
            z.writestr('archive/version', '3\n')
    elif how == 'plain':
        path.write_bytes(pickle.dumps(attack, protocol=2))
    elif how == 'npz':
        np.savez(path, cls_token=np.array([attack], dtype=object))
    else:
        torch.save({**hub_names(), 'epoch': attack}, path)
    with pytest.raises(InputError, match='evil.*was refused'):
        DINOv2.from_pretrained(str(path))
    assert not proof.exists()


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore:.*TorchScript archive:UserWarning')
def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / 'program.pt')
    with pytest.raises(InputError, match='was refused'):
        DINOv2.from_pretrained(str(tmp_path / 'program.pt'))


@pytest.mark.parametrize('content, says', [
    (lambda: torch.zeros(3), 'state dict'), (lambda: {'model': {}}, 'state dict'), (lambda: {}, 'no pos_embed'),
    (lambda: {**hub_names(), 'pos_embed': torch.zeros(1, 25, 48)}, 'pos_embed must be'),
    (lambda: {**hub_names(), 'head.weight': torch.zeros(2, 48)}, 'head.weight is unknown'),
    (lambda: {key: v for key, v in hub_names().items() if key != 'norm.bias'}, 'norm.bias is missing'),
    (lambda: {key: v for key, v in older_names().items() if '.2.attention.attention.key.weight' not in key},
     'blocks.2.qkv.weight is missing'),
    (lambda: {key: v for key, v in hub_names().items() if 'ls1' not in key}, 'blocks.0.ls1 is missing'),
    (lambda: {**hub_names(), 'patch_embed.proj.weight': torch.zeros(48, 3, 16, 16)}, r'patch_embed.weight is \(48'),
    (lambda: {**hub_names(), 'register_tokens': torch.zeros(4)}, 'register_tokens is unknown')])
def test_other_files_get_a_sentence(tmp_path, content, says):
    with pytest.raises(InputError, match=says):
        DINOv2.from_pretrained(saved(tmp_path, content()), heads=3)


def test_paths_and_heads(tmp_path):
    with pytest.raises(InputError, match='no such file'):
        DINOv2.from_pretrained(str(tmp_path / 'nothing.pth'))
    (tmp_path / 'model.safetensors').write_bytes(b'')
    with pytest.raises(InputError, match='safetensors'):
        DINOv2.from_pretrained(str(tmp_path / 'model.safetensors'))
    (tmp_path / 'text.pth').write_text('not weights')
    with pytest.raises(InputError, match='was refused'):
        DINOv2.from_pretrained(str(tmp_path / 'text.pth'))
    with pytest.raises(InputError, match='give heads='):
        DINOv2.from_pretrained(saved(tmp_path, hub_names()))                          # 48 is no multiple of 64


def test_the_named_backbone_is_the_one_in_the_file(tmp_path, monkeypatch):
    """A checkpoint of the detector knows its backbone by name alone, so that another file's would not load again."""
    shape = dict(width=64, depth=4, heads=1, registers=0, pretrain_size=70)
    monkeypatch.setitem(VARIANTS, 'dinov2_tiny', shape)
    state = {key: value for key, value in DINOv2(**shape).state_dict().items() if not key.startswith('pyramid.')}
    settings = dict(backbone_weights=saved(tmp_path, state), num_classes=2, hidden=32, detr_heads=2, ffn=32,
                    decoder_layers=1, queries=10)
    with pytest.raises(InputError, match='is no dinov2_s: give --backbone=dinov2_tiny'):
        DETR(DETRConfig(backbone='dinov2_s', **settings))
    model = DETR(DETRConfig(backbone='dinov2_tiny', position_resize='scale', lora_layers=(2, 4),
                            lora_matrices='q,fc1', **settings))
    assert model.backbone.position_resize == 'scale'
    assert {name[16:-7] for name in model.state_dict() if 'lora_a' in name.lower()} == {
        f'{block}.{matrix}' for block in (1, 3) for matrix in ('qkv', 'fc1')}
    model.save(tmp_path / 'detr.pt')
    again = DETR.from_pretrained(str(tmp_path / 'detr.pt'))
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)

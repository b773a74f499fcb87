"""The network: counts, table, NMS, inference form, loading other weights."""
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from configurator import InputError
from loss import box_iou, total_loss
from model import HSVDET, HSVDETConfig, layer_table, nms, select_detections

REFERENCE = Path(__file__).parent / 'reference'
WEIGHTS = Path(__file__).parents[2] / 'shared/data/weights'
needs_weights = pytest.mark.skipif(not WEIGHTS.exists(), reason='the real checkpoints are not part of this repository')


def small(seed=0, **settings):
    torch.manual_seed(seed)
    return HSVDET(HSVDETConfig(**{'num_classes': 3, **settings})).eval()


def alive(model):
    """Random BatchNorm statistics and open gates, so that nothing is an identity by accident."""
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2)
            m.weight.data.uniform_(0.7, 1.4)
            m.bias.data.normal_(0, 0.2)
    for block in model.blocks().values():
        block.gate.data.fill_(0.5)
    return model


# --- counts and table ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('scale, count, gflops', [
    ('n', 3_157_200, 8.7),
    ('s', 11_166_560, 28.6),
    ('m', 25_902_640, 78.9),
    ('l', 43_691_520, 165.1),
    ('x', 68_229_648, 257.8),
])
def test_published_counts(scale, count, gflops):
    table = layer_table(HSVDET(HSVDETConfig(scale=scale, attn='---')), 640, 640)
    assert sum(row[4] for row in table) == count
    assert sum(row[5] for row in table) / 1e9 == pytest.approx(gflops, abs=0.06)


def test_counts_with_the_block():
    plain, sparse = (layer_table(HSVDET(HSVDETConfig(scale='l', attn=attn)), 1088, 1920) for attn in ('---', '-SS'))
    assert sum(row[4] for row in sparse) == 43_691_520 + 2 * (4 * 512 ** 2 + 1024 + 1)
    flops = [sum(row[5] for row in table) for table in (plain, sparse)]
    assert flops[0] / 1e9 == pytest.approx(842.3, abs=0.06)
    assert 1 < flops[1] / flops[0] < 1.015, 'both blocks together cost at most 1.5 % of the FLOPs'


def test_docstring_table_is_the_network():
    rows = [line.split('|') for line in HSVDET.__doc__.splitlines()]
    written = [row for row in rows if len(row) >= 6 and row[0].strip().isdigit()]
    table = layer_table(HSVDET(HSVDETConfig(scale='l')), 1088, 1920)
    assert len(written) == len(table) == 25
    names = [row[1] for row in table]
    for row, (index, ran, layer, shapes, _, _) in zip(written, table, strict=True):
        i, source, module, args, shape, name, *_ = row
        assert (int(i), name.strip()) == (index, ran)
        kind, _, repeats = module.strip().partition(' x')
        assert type(layer).__name__.startswith(kind)
        if repeats:
            assert len(layer.blocks) == int(repeats)
        if args.strip() and kind in ('Conv', 'C2f', 'SPPF', 'Sparse'):
            assert int(args.split(',')[0]) == shapes[0][0]
        if kind == 'Conv':
            assert [int(v) for v in args.split(',')[1:]] == [layer.conv.kernel_size[0], layer.conv.stride[0]]
        if kind == 'C2f':
            assert layer.blocks[0].shortcut == (args.split(',')[1].strip() == 'True')
        if kind == 'Detect':
            assert [s[1:] for s in shapes] == [(136, 240), (68, 120), (34, 60)]
        else:
            assert 'x'.join(map(str, shapes[0])) == shape.strip()
        if kind == 'Concat':                                           # its width is the sum of its sources' widths
            parts = [table[int(i) - 1 if s.strip() == '-1' else int(s)][3][0][0] for s in source.split(',')]
            assert sum(parts) == shapes[0][0]
    assert names[10] == 'block5' and names[14] == 'block4'


def test_shapes_of_maps_and_points():
    model = small(attn='SSS')
    maps, losses = model(torch.rand(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 67, 8, 12), (2, 67, 4, 6), (2, 67, 2, 3)] and losses == {}
    boxes, scores = model.decode(maps)
    assert boxes.shape == (2, 96 + 24 + 6, 4) and scores.shape == (2, 126, 3) and 0 <= scores.min() <= scores.max() <= 1
    with pytest.raises(AssertionError, match='multiples of 32, got 60x96'):
        model(torch.rand(1, 3, 60, 96))


# --- the gate, inference form, checkpointing --------------------------------------------------------------------------

def test_gate_zero_is_yolov8_bit_for_bit(tmp_path):
    plain = alive(small(attn='---'))
    plain.save(tmp_path / 'plain.pt')
    sparse = HSVDET.from_pretrained(tmp_path / 'plain.pt', attn='SSS', k=20).eval()
    x = torch.rand(2, 3, 128, 96)
    with torch.no_grad():
        for a, b in zip(plain(x)[0], sparse(x)[0], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(plain.fuse()(x)[0], sparse.fuse()(x)[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize('settings', [dict(attn='SSS', k=20), dict(attn='-FD'), dict(select='learned', k=20),
                                      dict(heads=4, k=20)], ids=str)
def test_fused_equals_unfused(settings):
    model = alive(small(**settings))
    x = torch.rand(1, 3, 128, 96)
    with torch.no_grad():
        want = model.decode(model(x)[0])
        got = model.fuse().decode(model(x)[0])
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=2e-3)                 # pixels
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


def test_activation_checkpointing_changes_nothing():
    x = torch.rand(2, 3, 64, 64)
    targets = dict(labels=torch.tensor([[1, 2], [0, -1]]),
                   boxes=torch.tensor([[[4.0, 4, 40, 50], [20, 8, 60, 30]], [[1, 1, 63, 63], [0, 0, 0, 0]]]))
    results = []
    for checkpointing in (False, True):
        model = alive(small(k=4)).train()
        model.checkpointing = checkpointing
        total_loss(model(x, targets)[1]).backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None] + list(model.buffers()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_compiled_training_step_is_the_eager_one():
    """As train.py does it, the code generator left out (that is PyTorch's own to test): losses and gradients agree."""
    x = torch.rand(2, 3, 64, 64)
    targets = dict(labels=torch.tensor([[1, 2], [0, -1]]),
                   boxes=torch.tensor([[[4.0, 4, 40, 50], [20, 8, 60, 30]], [[1, 1, 63, 63], [0, 0, 0, 0]]]))
    results = []
    for compiled in (False, True):
        model = alive(small(k=4)).train()
        if compiled:
            model.forward_features = torch.compile(model.forward_features, backend='aot_eager')
        losses = model(x, targets)[1]
        total_loss(losses).backward()
        sums = [value for part, _ in losses.values() for value in part.values()]
        results.append(sums + [p.grad for p in model.parameters() if p.grad is not None] + list(model.buffers()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * (1 + a.float().abs().max().item()))


def test_one_to_one_head_does_not_shape_the_features():
    targets = dict(labels=torch.tensor([[1]]), boxes=torch.tensor([[[4.0, 4, 40, 50]]]))
    x = torch.rand(1, 3, 64, 64)
    gradients = []
    for one2one in (False, True):
        model = small(one2one=one2one).train()
        losses = model(x, targets)[1]
        assert list(losses) == ['one2many'] + ['one2one'] * one2one
        total_loss(losses).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    head = [name for name in gradients[1] if name.startswith('one2one')]
    assert all(gradients[1][name].abs().max() > 0 for name in head if '.cls.' in name)
    assert any(gradients[1][name].abs().max() > 0 for name in head if '.box.' in name)


def test_groups_leave_gates_norms_and_biases_undecayed():
    model = small()
    groups = model.param_groups(1e-3, 0.05, dict(block=2.0))
    assert sum(len(g['params']) for g in groups) == sum(p.requires_grad for p in model.parameters())
    decayed = {id(p) for g in groups if g['weight_decay'] for p in g['params']}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert (id(p) in decayed) == (name.endswith('weight') and p.ndim > 1), name
    assert not {id(b.gate) for b in model.blocks().values()} & decayed
    assert {g['lr'] for g in groups if g['part'] == 'block'} == {2e-3}


# --- NMS --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mode, conf, iou, multi_label', [('val', 0.001, 0.7, True), ('predict', 0.25, 0.45, False)])
def test_nms_reference(mode, conf, iou, multi_label):
    d = {key: torch.from_numpy(value) for key, value in np.load(REFERENCE / 'nms.npz').items()}
    for i, p in enumerate(d['prediction']):
        centre, size, scores = p[:2].T, p[2:4].T, p[4:].T
        boxes = torch.cat((centre - size / 2, centre + size / 2), 1)
        got = select_detections(boxes, scores, conf, iou, 300, multi_label, True)
        want = d[f'{mode}_{i}']
        assert got.shape == want.shape and torch.equal(got[:, 5], want[:, 5])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def greedy(boxes, scores, labels, threshold, max_det):
    """The definition: take the best, drop what it overlaps, repeat."""
    order, kept = scores.argsort(descending=True, stable=True).tolist(), []
    iou = box_iou(boxes, boxes)
    while order and len(kept) < max_det:
        best = order.pop(0)
        kept.append(best)
        order = [i for i in order if labels[i] != labels[best] or iou[best, i] <= threshold]
    return kept


@pytest.mark.parametrize('P, K, max_det', [(0, 1, 300), (1, 1, 300), (900, 1, 300), (900, 4, 1000), (700, 80, 50)])
def test_nms_is_greedy(P, K, max_det):
    g = torch.Generator().manual_seed(P + K)
    centre, size = torch.rand(P, 2, generator=g) * 300, torch.rand(P, 2, generator=g) * 80 + 8
    boxes = torch.cat((centre - size / 2, centre + size / 2), 1)
    scores = (torch.rand(P, generator=g) * 50).round() / 50                           # many equal scores
    labels = torch.randint(0, K, (P,), generator=g)
    assert nms(boxes, scores, labels, 0.5, max_det).tolist() == greedy(boxes, scores, labels, 0.5, max_det)


def test_nms_compares_classes_far_from_the_origin():
    """Two boxes of one class at 8K coordinates, one of another on top; class 79 must not lose precision."""
    boxes = torch.tensor([[7600.0, 4200, 7602, 4202], [7600.9, 4200, 7602.9, 4202], [7600, 4200, 7602, 4202]])
    labels = torch.tensor([79, 79, 3])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), labels, 0.38).tolist() == [0, 1, 2]        # IoU 1.1 / 2.9 = 0.379
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), labels, 0.37).tolist() == [0, 2]


def test_detect_leaves_the_mode_and_orders_by_score():
    model = alive(small()).train()
    found = model.detect(torch.rand(2, 3, 64, 64), conf=1e-4)
    assert model.training and len(found) == 2
    assert all(f.shape[1] == 6 and (f[1:, 4] <= f[:-1, 4]).all() for f in found)


# --- weights ----------------------------------------------------------------------------------------------------------

def test_a_fused_model_is_not_saved(tmp_path):
    with pytest.raises(InputError, match='fuse=False'):
        HSVDET(HSVDETConfig('n', 3)).fuse().save(tmp_path / 'fused.pt')


def test_save_and_load(tmp_path):
    model = alive(small(attn='-S-', select='learned', k=0.25))
    model.names, model.imgsz = ['a', 'b', 'c'], (64, 96)
    model.save(tmp_path / 'm.pt')
    again = HSVDET.from_pretrained(tmp_path / 'm.pt')
    assert again.cfg == model.cfg and again.names == model.names and tuple(again.imgsz) == (64, 96)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_other_classes_start_fresh_and_the_rest_must_fit(tmp_path, capsys):
    small().save(tmp_path / 'm.pt')
    model = HSVDET.from_pretrained(tmp_path / 'm.pt', num_classes=7)
    said = capsys.readouterr().out
    assert model.cfg.num_classes == 7 and 'detect_head.cls starts fresh' in said and 'block' not in said
    with pytest.raises(InputError, match='does not fit this network'):
        HSVDET.from_pretrained(tmp_path / 'm.pt', scale='s')
    torch.save(dict(torch.load(tmp_path / 'm.pt'), model={}), tmp_path / 'empty.pt')
    with pytest.raises(InputError, match='is missing'):
        HSVDET.from_pretrained(tmp_path / 'empty.pt')


def test_a_block_of_another_letter_or_gate_starts_fresh(tmp_path):
    trained = alive(small(attn='-SS', k=20))
    for block in trained.blocks().values():
        block.gate.data.fill_(0.3)
    trained.save(tmp_path / 'S.pt')
    small(attn='-PP', k=20).save(tmp_path / 'P.pt')
    for letter in '-SFDCWLNKMTP':
        model = HSVDET.from_pretrained(tmp_path / 'S.pt', verbose=False, attn=f'-S{letter}')
        assert model.block4.gate.item() == pytest.approx(0.3) and torch.equal(model.block4.v_proj.weight,
                                                                              trained.block4.v_proj.weight)
        if letter in 'SFD':                                            # the same weights, so that they can be compared
            assert model.block5.gate.item() == pytest.approx(0.3)
        elif letter != '-':
            assert model.block5.gate.item() == (1.0 if letter == 'P' else 0.0)
        HSVDET.from_pretrained(tmp_path / 'P.pt', verbose=False, attn=f'-{letter}{letter}')
    assert HSVDET.from_pretrained(tmp_path / 'P.pt', verbose=False, attn='-SS').block5.gate.item() == 0
    for gate, value in (('fixed', 0.5), ('none', 1.0)):
        block = HSVDET.from_pretrained(tmp_path / 'S.pt', verbose=False, gate=gate).block5
        assert block.gate.item() == value and torch.equal(block.v_proj.weight, trained.block5.v_proj.weight)
    with pytest.raises(InputError, match='HSVDETConfig has no atn: it has scale, num_classes, attn'):
        HSVDET.from_pretrained(tmp_path / 'S.pt', atn='-FF')


@needs_weights
def test_genuine_yolov8_checkpoint(capsys):
    model = HSVDET.from_pretrained(str(WEIGHTS / 'yolov8n_bccd.pt'), attn='-SS')
    said = capsys.readouterr().out
    assert '355 tensors matched' in said and 'block5 starts fresh (7)' in said and 'block4 starts fresh (7)' in said
    assert model.names == ['RBC', 'WBC', 'Platelets'] and model.cfg.scale == 'n'
    assert model.detect_head.bins.tolist() == list(range(16))


@needs_weights
@pytest.mark.parametrize('name, sentence', [('yolov8l_truncated', 'not a complete checkpoint'),
                                            ('yolov5n_untrusted', 'not a YOLOv8 detector')])
def test_bad_checkpoints_are_refused(name, sentence):
    with pytest.raises(InputError, match=sentence):
        HSVDET.from_pretrained(str(WEIGHTS / f'{name}.pt'))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match='not found'):
        HSVDET.from_pretrained(str(tmp_path / 'none.pt'))
    with pytest.raises(InputError, match='is a folder'):
        HSVDET.from_pretrained(str(tmp_path))


class Attack:
    """Unpickled without care, this makes a file."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('how', ['os.system', 'eval', 'getattr', 'torch.nn', 'nested'])
def test_a_checkpoint_never_runs_code(tmp_path, how):
    proof = tmp_path / 'it_ran'
    payload = {
        'os.system': Attack(os.system, f'touch {proof}'),
        'eval': Attack(eval, f'open({str(proof)!r}, "w")'),
        'getattr': Attack(getattr, [], 'append'),
        'torch.nn': Attack(torch.hub.load_state_dict_from_url, 'file:///nowhere'),
        'nested': {'model': [1, {'ema': Attack(exec, f'open({str(proof)!r}, "w")')}]},
    }[how]
    with zipfile.ZipFile(tmp_path / 'evil.pt', 'w') as z:
        z.writestr('archive/data.pkl', pickle.dumps(payload, protocol=2))
        z.writestr('archive/version', '3\n')
        z.writestr('archive/byteorder', 'little')
    with pytest.raises(InputError, match='refused'):
        HSVDET.from_pretrained(str(tmp_path / 'evil.pt'))
    assert not proof.exists()


def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / 'program.pt')
    with pytest.raises(InputError, match='TorchScript program, which is code'):
        HSVDET.from_pretrained(str(tmp_path / 'program.pt'))


@pytest.mark.parametrize('content', ['zip', 'tensor', 'list', 'config', 'module'])
def test_other_files_get_a_sentence(tmp_path, content):
    path = tmp_path / 'x.pt'
    if content == 'zip':
        with zipfile.ZipFile(path, 'w') as z:
            z.writestr('hello.txt', 'hello')
    else:
        torch.save({'tensor': torch.ones(3),
                    'list': [1, 2],
                    'config': dict(model_config=dict(size='n'), model={}, names=[]),
                    'module': torch.nn.Linear(2, 2)}[content], path)
    with pytest.raises(InputError, match='x.pt'):
        HSVDET.from_pretrained(str(path))


def test_a_flipped_byte_is_noticed(tmp_path):
    small().save(tmp_path / 'm.pt')
    content = bytearray((tmp_path / 'm.pt').read_bytes())
    content[len(content) // 2] ^= 0xff
    (tmp_path / 'm.pt').write_bytes(content)
    with pytest.raises(InputError, match='not a complete checkpoint'):
        HSVDET.from_pretrained(str(tmp_path / 'm.pt'))


@pytest.mark.parametrize('settings', [dict(scale='q'), dict(attn='SS'), dict(attn='-SZ'), dict(select='best'),
                                      dict(gate='open'), dict(k=-1), dict(k=2.5), dict(k=1.0), dict(heads=3),
                                      dict(num_classes=0)], ids=str)
def test_wrong_settings(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        HSVDETConfig(**settings)


# --- what the block is for --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('attn, sees', [('---', False), ('-DD', False), ('-SS', True), ('-FF', True)])
def test_only_attention_sees_far(attn, sees):
    """Beyond column 1,100 no convolution of scale n depends on what is left of column 64: the far set needs this."""
    model = alive(small(attn=attn, num_classes=6))
    x = torch.rand(1, 3, 32, 2048)
    changed = x.clone()
    changed[..., :64] = 1 - changed[..., :64]
    with torch.no_grad():
        differs = [(a[..., m * 1100 // 2048 + 1:] != b[..., m * 1100 // 2048 + 1:]).any().item()
                   for a, b, m in zip(model(x)[0], model(changed)[0], (256, 128, 64), strict=True)]
    assert all(differs) if sees else not any(differs)


def test_importing_the_network_changes_no_switch_of_the_process():
    code = ('import torch; switches = torch.backends.cudnn.allow_tf32, torch.get_num_threads(); import model, eval; '
            'assert switches == (torch.backends.cudnn.allow_tf32, torch.get_num_threads())')
    done = subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

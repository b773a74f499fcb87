"""Tokens from elsewhere: memory over levels and frames, adaptive k, the clips that carry it."""
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from attention import make_block
from configurator import InputError
from data import DetectionDataset
from detect import selected_tokens
from eval import remove_blocks
from loss import total_loss
from model import HSVDET, HSVDETConfig
from report import watch_blocks
from sparse_attention import SparseGlobalBlockGated

TARGETS = dict(labels=torch.tensor([[1, 2], [0, -1]]),
               boxes=torch.tensor([[[4.0, 4, 40, 50], [20, 8, 60, 30]], [[1, 1, 63, 63], [0, 0, 0, 0]]]))


def block_of(letter='S', c=16, seed=0, **settings):
    torch.manual_seed(seed)
    cfg = HSVDETConfig(**dict(k=20, attn=f'--{letter}') | settings)
    block = make_block(letter, c, cfg)
    block.gate.data.fill_(0.7)
    return block


def small(seed=0, gate=0.5, **settings):
    """A network whose gates and frame codes are not at their start, where they might hide a mistake."""
    torch.manual_seed(seed)
    model = HSVDET(HSVDETConfig(**{'num_classes': 3, 'k': (0, 7, 3), **settings})).eval()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2)
    for block in model.blocks().values():
        block.gate.data.fill_(gate)
    for name, p in model.named_parameters():
        if name.endswith('_time.code'):
            torch.nn.init.normal_(p, std=0.3)
    return model


def count(selected):
    """SelectedTokens -> (B,): how many tokens each image kept."""
    B, k, _ = selected.tokens.shape
    return selected.kept.sum(1) if selected.kept is not None else torch.full((B,), k)


# --- the block -------------------------------------------------------------------------------------------------------

def test_attention_for_pictures_has_memory_last():
    """The weights that are shown are those that forward takes: of k tokens, then of memory."""
    block, x, memory = block_of(), torch.randn(2, 16, 9, 11), torch.randn(2, 5, 16)
    selected, weights = block.attention(x, memory)
    assert weights.shape == (2, 1, 20, 25)
    rows = selected[..., None].expand(-1, -1, 16)
    t = x.flatten(2).transpose(1, 2).gather(1, rows)                                  # (2, 20, 16)
    values = torch.cat((t, memory), 1) @ block.dense_weight().flatten(1).T            # (2, 25, 16)
    y = block(x, memory).flatten(2).transpose(1, 2).gather(1, rows)
    torch.testing.assert_close(y, t + weights[:, 0] @ values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('memory', ['', 'scale', 'time'])
def test_attention_to_each_other_is_a_distribution(memory):
    """What detect.py and the report show, with memory too, and with a video's state: that of the pass itself."""
    torch.manual_seed(0)
    model = HSVDET(HSVDETConfig('n', 2, '-SS', k=0.5, memory=memory)).eval()
    model.imgsz, rng, state = (64, 96), np.random.default_rng(0), [None] if memory == 'time' else None
    for _ in range(2):
        image, inputs = Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)), []
        hook = model.block5.register_forward_pre_hook(lambda _, x, inputs=inputs: inputs.append(x))
        rows, levels = selected_tokens(model, image, state=state)
        hook.remove()
        assert len(inputs) == 1                                        # one pass
        for (h, w), _, _, _, cells, weights in levels.values():
            assert weights.shape == (len(cells), len(cells)) and len(cells) == h * w // 2
            assert np.allclose(weights.sum(1), 1, atol=1e-5)
    assert memory != 'time' or inputs[0][1].shape[1] == 3              # the second frame's P5 sees those of the first


def test_picture_of_a_clip(tmp_path, monkeypatch, capsys):
    from benches import clip
    from prepare.clips import make_clips
    make_clips(str(tmp_path / 'clips'), train=1, val=2)
    model = small(memory='time', k=(0, 7, 3))
    model.names, model.imgsz = ['red behind', 'green behind', 'blue behind'], (64, 64)
    model.detect_head.cls[0][-1].bias.data.fill_(2.0)                                 # it always finds something
    model.save(tmp_path / 'a.pt')
    for name, value in dict(weights=str(tmp_path / 'a.pt'), data=str(tmp_path / 'clips' / 'val.json'), clips=(0, 1),
                            out=str(tmp_path / 'a.png')).items():
        monkeypatch.setattr(clip, name, value)
    seen = []
    hook = model.block4.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    dataset = DetectionDataset(str(tmp_path / 'clips' / 'val.json'), frames=2)
    watched = watch_blocks(model.eval(), dataset, [0], (64, 64))       # the report looks at clips, not at last frames
    hook.remove()
    assert [0 if m is None else m.shape[1] for m in seen] == [0, 7, 14] and watched['p4']['attention'].shape == (7,)
    clip.main()
    lines = [line.split(': ')[-1].split() for line in capsys.readouterr().out.splitlines() if line.startswith('clip ')]
    assert [abs(sum(map(float, shares)) - 1) < 0.02 and len(shares) == 3 for shares in lines] == [True, True]
    assert (tmp_path / 'a.png').stat().st_size > 1000
    small().save(tmp_path / 'a.pt')
    with pytest.raises(InputError, match='no memory of frames'):
        clip.main()


@pytest.mark.parametrize('letter, settings', [
    ('S', dict()), ('S', dict(keep='mass:0.3')), ('S', dict(keep='mass:0.3', heads=4, pos=True)),
    ('S', dict(keep='mass:0.1', select='learned')), ('S', dict(keep='mass:0.5', k=0)), ('S', dict(k=500, select='l2')),
    ('T', dict(keep='mass:0.3', heads=2)), ('T', dict(keep='mass:0.1', select='learned', pos=True)),
    ('P', dict(keep='mass:0.3', heads=2)), ('P', dict(k=7))], ids=str)
def test_fast_equals_reference_with_memory_and_masks(letter, settings):
    """Outputs and all gradients, float64; memory absent, whole, and with tokens that do not count."""
    block = block_of(letter, **settings).double()
    path = block.mixer if letter in 'TP' else block
    x, memory = torch.randn(2, 16, 9, 11, dtype=torch.double), torch.randn(2, 5, 16, dtype=torch.double)
    seen = torch.tensor([[True, False, True, True, False], [False] * 5])
    for elsewhere in ((), (memory,), (memory, seen)):
        results = []
        for run in (path.forward, path.forward_reference):
            given = [t.clone().requires_grad_(t.is_floating_point()) for t in (x, *elsewhere)]
            y = run(*given)
            y.sin().sum().backward()
            results.append([y, *(t.grad for t in given[:2])] + [p.grad for p in path.parameters() if p.requires_grad])
            path.zero_grad()
        for fast, slow in zip(*results, strict=True):
            assert (fast - slow).abs().max() <= 1e-12 * max(1, slow.abs().max())


def test_memory_that_does_not_count_is_as_if_it_were_not_there():
    block, x, memory = block_of().double(), torch.randn(2, 16, 9, 11).double(), torch.randn(2, 5, 16).double()
    seen = torch.tensor([[True, False, True, False, False]] * 2)
    torch.testing.assert_close(block(x, memory, seen), block(x, memory[:, [0, 2]]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block(x, memory, seen & False), block(x), rtol=1e-12, atol=1e-12)
    assert (block(x, memory) - block(x)).abs().max() > 1e-3


def test_mass_keeps_as_many_as_hold_the_share():
    """Against a loop; one dominant token is enough; equal ones are counted; k is the limit."""
    block, x = block_of(keep='mass:0.25', k=60), torch.randn(3, 16, 9, 11)
    x[1] *= 0.01
    x[1, :, 4, 5] = 10
    x[2] = 1
    selected, _, kept = block.select_tokens(x)
    for image, cells, mask in zip(x.double(), selected, kept, strict=True):
        mass = image.flatten(1).square().sum(0)
        n = next(n for n in range(1, 100) if mass.sort(descending=True).values[:n].sum() >= 0.25 * mass.sum() - 1e-6)
        assert mask.sum() == n and mask[:n].all() and (mass[cells[1:]] <= mass[cells[:-1]]).all()
    assert kept[1].sum() == 1 and kept[2].sum() == 25 and 2 < kept[0].sum() < 25
    full = block_of(keep='mass:1', k=60)
    assert full.select_tokens(x)[2].all()
    assert torch.equal(block_of(select='learned', keep='mass:0.25', k=60).select_tokens(x)[2].sum(1) > 0,
                       torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize('letter', 'ST')
def test_tokens_that_are_not_kept_are_not_selected(letter):
    """The result is that of a block whose k is the number kept."""
    x = torch.randn(1, 16, 9, 11, dtype=torch.double)
    block = block_of(letter, keep='mass:0.2').double()
    mixer = block.mixer if letter == 'T' else block
    n = int(mixer.select_tokens(x)[2].sum())
    assert 1 < n < 20
    fixed = block_of(letter, k=n).double()
    torch.testing.assert_close(block(x), fixed(x), rtol=1e-12, atol=1e-12)
    selected, weights = mixer.attention(x.float())
    assert (weights.sum((1, 3))[0] > 0).sum() == n and torch.allclose(weights[0, 0, :n].sum(1), torch.ones(n))


@pytest.mark.parametrize('letter', 'ST')
def test_finite_in_fp16(letter):
    block = block_of(letter, c=32, keep='mass:0.2', heads=2)
    x = (torch.randn(2, 32, 13, 16) * 1e3).half().requires_grad_()
    memory = (torch.randn(2, 7, 32) * 1e3).half().requires_grad_()
    seen = torch.rand(2, 7) > 0.5
    with torch.autocast('cpu', torch.float16):
        y = block(x, memory, seen)
    assert y.dtype == torch.float16 and y.isfinite().all()
    y.float().mean().backward()
    assert all(t.grad.isfinite().all() for t in (x, memory, *block.parameters()) if t.requires_grad)
    wide = block(x.detach().float(), memory.detach().float(), seen)
    assert (y.float() - wide).square().mean().sqrt() < 0.02 * wide.square().mean().sqrt()


# --- the network -----------------------------------------------------------------------------------------------------

EVERYTHING = dict(memory='scale,time', keep='mass:0.5', pos=True)


@pytest.mark.parametrize('settings', [dict(memory='scale'), dict(EVERYTHING), dict(EVERYTHING, attn='-TF', heads=2),
                                      dict(memory='scale:shuffled', keep='joint'), dict(memory='time', attn='-S-')],
                         ids=str)
def test_network_with_the_references_of_its_blocks(settings):
    """A clip through the network, its blocks fast and as defined: losses and all gradients, float64."""
    clips = torch.rand(2, 3, 3, 64, 96, dtype=torch.double)
    results = []
    for slow in (False, True):
        model = small(**settings).double()
        for block in model.blocks().values() if slow else ():
            part = block if isinstance(block, SparseGlobalBlockGated) else block.mixer
            part.forward = part.forward_reference
        losses = model(clips, TARGETS)[1]
        total_loss(losses).backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == len(list(small(**settings).parameters())) - 1, 'only the bins do not learn'
    for fast, slow in zip(*results, strict=True):
        assert (fast - slow).abs().max() <= 1e-9 * max(1e-3, slow.abs().max())


def test_gate_zero_is_yolov8_bit_for_bit(tmp_path):
    plain = small(attn='---')
    plain.save(tmp_path / 'plain.pt')
    x = torch.rand(2, 3, 3, 64, 96)
    want = plain(x[:, -1])[0]
    for settings in (dict(EVERYTHING), dict(memory='scale', keep='joint')):
        model = HSVDET.from_pretrained(tmp_path / 'plain.pt', attn='-SS', **settings).eval()
        assert all(torch.equal(a, b) for a, b in zip(model(x)[0], want, strict=True))


def test_checkpoints_go_both_ways(tmp_path):
    model = small(**EVERYTHING)
    model.save(tmp_path / 'm.pt')
    again = HSVDET.from_pretrained(tmp_path / 'm.pt').eval()
    x = torch.rand(1, 3, 3, 64, 96)
    assert again.cfg == model.cfg and torch.equal(again(x)[0][0], model(x)[0][0])
    assert HSVDET.from_pretrained(tmp_path / 'm.pt', memory='', keep='').block4_scale is None
    saved = torch.load(tmp_path / 'm.pt', weights_only=True)          # a file from before these settings
    for name in ('memory', 'keep', 'frames'):
        del saved['model_config'][name]
    saved['model'] = {name: t for name, t in saved['model'].items() if '_time' not in name and '_scale' not in name}
    torch.save(saved, tmp_path / 'old.pt')
    assert HSVDET.from_pretrained(tmp_path / 'old.pt').cfg.memory == ''


def test_levels_and_frames_are_seen():
    """The gradient of P4's answer with respect to what P5 and the earlier frame gave."""
    model = small(memory='scale,time', attn='-SS')
    x = torch.rand(1, 3, 64, 96)
    _, taken = model.image_features(x)
    p4, tokens = torch.randn(1, 128, 4, 6), model.block4_scale(taken['p5'].tokens).detach().requires_grad_()
    model.attend(model.block4, p4, [(tokens, None)])[0].sum().backward()
    assert tokens.grad.abs().max() > 0
    earlier = model.next_state(None, model.image_features(torch.rand(1, 3, 64, 96))[1])
    a, b = model.image_features(x, earlier)[0], model.image_features(x)[0]
    assert all((m - n).abs().max() > 1e-4 for m, n in zip(a, b, strict=True))


@pytest.mark.parametrize('settings', [dict(EVERYTHING), dict(keep='joint', memory='scale'), dict(keep='mass:0.7')],
                         ids=str)
def test_an_image_does_not_depend_on_its_batch(settings):
    model = small(**settings).double()
    x = torch.rand(3, 3, 64, 96, dtype=torch.double)
    x[1] *= 0.1                                                       # pictures of very different importance
    x[2, :, 20:40, 20:40] = 1
    with torch.no_grad():
        maps, taken = model.image_features(x)
        for i in range(3):
            alone, one = model.image_features(x[i:i + 1])
            for a, b in zip(maps, alone, strict=True):
                torch.testing.assert_close(a[i:i + 1], b, rtol=1e-10, atol=1e-10)
            assert all(torch.equal(count(taken[level])[i:i + 1], count(one[level])) for level in ('p4', 'p5'))


def test_shuffled_memory_is_that_of_another_image():
    mine, other = small(memory='scale').double(), small(memory='scale:shuffled').double()
    p4, tokens = torch.randn(2, 128, 4, 6, dtype=torch.double), torch.randn(2, 3, 128, dtype=torch.double)
    with torch.no_grad():
        swapped = other.attend(other.block4, p4, [(tokens, None)])[0]
        torch.testing.assert_close(swapped, mine.attend(mine.block4, p4, [(tokens.flip(0), None)])[0])
        assert (swapped - mine.attend(mine.block4, p4, [(tokens, None)])[0]).abs().max() > 1e-6


def test_joint_selection_shares_one_budget_whatever_the_norms():
    model = small(keep='joint', k=(0, 7, 3))
    p4, p5 = torch.randn(4, 128, 4, 6), torch.randn(4, 256, 2, 3)
    p4[2, :, 1, 1] = 9                                                # one token above all others
    n4, n5 = model.joint_counts(p4, p5)
    assert (n4 >= 1).all() and (n5 >= 1).all() and torch.equal(n4 + n5, torch.tensor([10] * 4)) and n4[0] != n4[1]
    louder, _ = model.joint_counts(p4 * 64, p5)
    assert torch.equal(n4, louder)
    _, taken = model.image_features(torch.rand(2, 3, 64, 96))
    assert ((count(taken['p4']) + count(taken['p5'])) == 10).all()


def test_a_block_taken_out_leaves_the_other_its_tokens():
    x = torch.rand(2, 3, 64, 96)
    counts = []
    for gone in ((), ('block4',), ('block5',), ('block4', 'block5')):
        model = small(keep='joint', k=(0, 7, 3), memory='scale', gate=0.0)
        remove_blocks(model, gone)
        counts.append({level: count(taken).tolist() for level, taken in model.image_features(x)[1].items()})
    assert counts[1:] == [dict(p5=counts[0]['p5']), dict(p4=counts[0]['p4']), {}]


def test_k_per_level():
    model = small(k=(0, 5, 0.5), attn='-SS', keep='mass:1')
    _, taken = model.image_features(torch.rand(1, 3, 64, 96))
    assert taken['p4'].tokens.shape == (1, 5, 128) and taken['p5'].tokens.shape[:2] == (1, 3)
    assert small(k=4).block4.k == small(k=4).block5.k == 4


# --- frames ----------------------------------------------------------------------------------------------------------

def test_a_clip_is_its_frames_one_by_one():
    """The state is all that passes from frame to frame: a clip, frames with a state, frames without."""
    model = small(memory='time', frames=2)
    clip = torch.rand(2, 4, 3, 64, 96)
    with torch.no_grad():
        state, maps = None, []
        for frame in clip.unbind(1):
            m, state = model.forward_frame(frame, state)
            maps.append(m)
        assert [len(state[level]) for level in ('p4', 'p5')] == [2, 2], 'no more frames than asked for'
        assert torch.equal(model(clip)[0][2], maps[3][2])
        for again, first in zip(model.forward_frame(clip[:, 0], None)[0], maps[0], strict=True):
            assert torch.equal(again, first), 'None starts anew, whatever ran before'
        assert torch.equal(model(clip[:, 0])[0][1], maps[0][1]), 'an image is a clip of one frame'
        lonely = model(clip[:, 3])[0]
        assert (lonely[1] - maps[3][1]).abs().max() > 1e-4
        old = model(torch.cat((torch.rand(2, 3, 3, 64, 96), clip[:, 1:]), 1))[0]
    # what P5 took three frames ago is enriched by older frames, so it reaches further back than `frames`
    assert (old[1] - maps[3][1]).abs().max() > 0


def test_a_clip_trains_with_gradients_through_its_frames():
    model = small(memory='time').train()
    clip = torch.rand(2, 3, 3, 64, 64).requires_grad_()
    total_loss(model(clip, TARGETS)[1]).backward()
    assert (clip.grad.abs().amax((0, 2, 3, 4)) > 0).all()
    assert model.block4_time.code.grad.abs().amin(1).min() > 0


def test_activation_checkpointing_of_a_clip_changes_nothing():
    clip, results = torch.rand(2, 2, 3, 64, 64), []
    for checkpointing in (False, True):
        model = small(**EVERYTHING).train()
        model.checkpointing = checkpointing
        total_loss(model(clip, TARGETS)[1]).backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None] + list(model.buffers()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# --- export ----------------------------------------------------------------------------------------------------------

def check_onnx(forward, parts, inputs, others, dynamic_shapes=None):
    """ONNX Runtime and eager agree on `inputs`, with which the file is made, and on `others`."""
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    logging.getLogger('torch.onnx._internal.exporter._registration').setLevel(logging.ERROR)
    network = torch.nn.ModuleList(parts).eval()
    network.forward = forward
    program = torch.onnx.export(network, inputs, dynamo=True, opset_version=18, verbose=False,
                                dynamic_shapes=dynamic_shapes)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for some in (inputs, others):
        got = session.run(None, {entry.name: t.numpy() for entry, t in zip(session.get_inputs(), some, strict=True)})
        for want, one in zip(network(*some), got, strict=True):
            assert (torch.from_numpy(one) - want).abs().max() < 1e-4 * want.abs().max()


def test_onnx_equals_eager():
    """The two blocks as the network runs them, on images that keep different numbers of tokens."""
    models = [small(memory='scale', keep=keep).fuse() for keep in ('joint', 'mass:0.5')]

    def blocks(p4, p5):
        outputs = []
        for model, (n4_count, n5_count) in zip(models, (models[0].joint_counts(p4, p5), (None, None)), strict=True):
            q5, taken = model.attend(model.block5, p5, (), n5_count)
            offered = [(model.block4_scale(taken.tokens), taken.kept)]
            outputs += [q5, model.attend(model.block4, p4, offered, n4_count)[0]]
        return outputs

    inputs, others = ((torch.randn(2, 128, 4, 6), torch.randn(2, 256, 2, 3)) for _ in range(2))
    others[0][1, :, 1, 1] = 9
    check_onnx(blocks, models, inputs, others)


@pytest.mark.slow
@pytest.mark.parametrize('keep', ['joint', 'mass:0.5'])
def test_onnx_of_any_size_equals_eager(keep):
    model = small(memory='scale', keep=keep).fuse()
    sides = ({0: torch.export.Dim('batch'), 2: 32 * torch.export.Dim('h'), 3: 32 * torch.export.Dim('w')},)
    images = torch.rand(3, 3, 64, 160)
    images[0, :, 40:60, 40:60] *= 3
    check_onnx(lambda images: model(images)[0], [model], (torch.rand(2, 3, 96, 128),), (images,), sides)


@pytest.mark.parametrize('letter', ['S', 'T'])
def test_keep_leaves_the_batch_free_in_an_export(letter):
    block = block_of(letter, keep='mass:0.5')
    program = torch.export.export(block, (torch.rand(2, 16, 8, 8),), dynamic_shapes=({0: torch.export.Dim('batch')},))
    x = torch.rand(5, 16, 8, 8)
    torch.testing.assert_close(program.module()(x), block(x))


def test_time_is_not_exported():
    model = small(memory='time')
    with pytest.raises(InputError, match='memory=time carries a state'):
        torch.export.export(model, (torch.rand(1, 3, 64, 64),))


@pytest.mark.parametrize('settings, word', [
    (dict(memory='space'), 'memory'), (dict(memory='scale', attn='-WS'), 'memory=scale needs'),
    (dict(memory='time', attn='S--'), 'memory=time needs'), (dict(keep='mass:0'), 'keep'),
    (dict(keep='mass:1.5'), 'keep'), (dict(keep='mass:0.5', attn='-FW'), 'keep=mass:0.5 needs attn'),
    (dict(keep='joint', k=0.5), 'keep=joint'), (dict(keep='joint', attn='--S'), 'keep=joint'),
    (dict(keep='mass:0.5', select='random'), 'keep=mass'), (dict(k=(1, 2)), 'three'), (dict(k=(1, 2, -3)), 'k must'),
    (dict(frames=0), 'frames')], ids=str)
def test_wrong_settings(settings, word):
    with pytest.raises(InputError, match=word):
        HSVDETConfig(**settings)

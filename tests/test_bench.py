"""benches/costs.py: every table at a tiny size, and the counters and clocks that the tables rest on."""
import csv
import json
import os

import pytest
import torch
from PIL import Image

from attention import HELP
from benches import costs
from configurator import InputError, configure
from model import HSVDET, HSVDETConfig, layer_table
from optimizers import Muon

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Small models, one timed run, csv to tmp_path -> a function that changes settings."""

    def change(**settings):
        for name, value in settings.items():
            monkeypatch.setattr(costs, name, value)
            monkeypatch.setitem(costs.config, name, value)

    monkeypatch.setattr(costs, 'OUT_DIR', str(tmp_path / 'bench'))
    change(device='cpu', repeats=1, sizes=((64, 64),), channels=8, onnx=False, imgsz=64, batch_size=2, k=6, hidden=32,
           ffn=32, decoder_layers=2, queries=9, denoising=2)
    return change


@pytest.fixture
def four_images(tiny, tmp_path):
    images = [dict(id=i, file_name=f'{i}.png', width=64, height=48) for i in range(4)]
    for i, image in enumerate(images):
        Image.new('RGB', (64, 48), (60 * i, 90, 30)).save(tmp_path / image['file_name'])
    objects = [dict(id=i + 1, image_id=i, category_id=1, bbox=[8, 8, 30, 20], area=600, iscrowd=0) for i in range(4)]
    path = tmp_path / 'labels.json'
    path.write_text(json.dumps(dict(images=images, annotations=objects, categories=[dict(id=1, name='box')])))
    tiny(train_data=str(path), cache_mb=1)


def rows_of(name):
    with open(os.path.join(costs.OUT_DIR, f'{name}.csv'), newline='') as f:
        return list(csv.DictReader(f))


def test_memory_counts_what_is_alive():
    x = torch.zeros(1000)                                                             # 4,000 bytes
    with costs.LiveMemory(x) as memory:
        y = x.view(10, 100) + 1                                                       # a view takes nothing
        assert (memory.live, memory.peak) == (4000, 4000)
        z = torch.cat((y, y))
        assert memory.live == 12000
        del y
        assert memory.live == 8000
        z.add_(1)                                                                     # nor does an operation in place
        z = z[:1].clone()
        assert (memory.live, memory.peak) == (400, 12000)
        torch.empty(10 ** 9, device='meta')                                           # counted without being there
    assert memory.peak == 4 * 10 ** 9 + 400


def test_ways_are_timed_in_turn():
    calls = []
    times = costs.time_interleaved({name: lambda name=name: calls.append(name) for name in 'ab'}, 3)
    assert ''.join(calls) == 'ab' * 5                                                 # two of them untimed
    assert list(times) == ['a', 'b'] and min(times.values()) >= 0


@pytest.mark.parametrize('name, expected', [
    ('-SS', dict(neck=5, backbone=1, attention=2, head=1)), ('---', dict(neck=3, backbone=1, head=1)),
    ('RT-DETR', dict(backbone=1, head=2, neck=2, attention=1))])
def test_time_belongs_to_the_innermost_part(tiny, monkeypatch, name, expected):
    """A clock that advances by a second whenever it is read: one second between two starts or ends of parts."""
    ticks = iter(range(1000))
    model = costs.make_model(name).eval()
    spent = costs.clock_parts(model)
    monkeypatch.setattr(costs.time, 'perf_counter', lambda: next(ticks))
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    assert spent == {part: 1000 * seconds for part, seconds in expected.items()}


def test_attention(tiny, capsys):
    pytest.importorskip('matplotlib')
    costs.bench_attention()
    p5, p4 = rows_of('attention')
    assert (p5['level'], p5['N'], p4['level'], p4['N']) == ('P5', '4', 'P4', '16')
    assert float(p4['fast GFLOPs']) < float(p4['plain GFLOPs'])
    assert os.path.exists(os.path.join(costs.OUT_DIR, 'attention.png'))
    line = capsys.readouterr().out.splitlines()[3]                                    # two of progress, a title
    assert 'float32' in line and costs.time.strftime('%Y-%m-%d') in line
    fused, bmm = rows_of('products')
    assert float(fused['forward ms']) > 0 and float(bmm['MiB']) == pytest.approx((2 * 36 + 48) * 4 / 2 ** 20)


def test_attention_by_bmm_is_attention():
    q, k, v = torch.randn(3, 2, 6, 8, dtype=torch.double).unbind()
    torch.testing.assert_close(costs.attend_by_bmm(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_letters(tiny):
    costs.bench_letters()
    rows = {row['letter']: row for row in rows_of('letters') if row['level'] == 'P4'}
    assert set(rows) == set(HELP) - {'-'}
    c, N, k = 8, 16, 6                                                                # the formulas of attention.HELP
    for letter, flops in dict(D=2 * N * c ** 2, F=6 * N * c ** 2 + 4 * N ** 2 * c, M=0,
                              S=2 * N * c ** 2 + 4 * k * c ** 2 + 4 * k ** 2 * c).items():
        assert float(rows[letter]['GFLOPs']) == pytest.approx(flops / 1e9), letter


def test_latency(tiny):
    costs.bench_latency()
    by_part = {row['detector']: row for row in rows_of('latency_n') if row['how'] == 'by part'}
    assert list(by_part) == ['---', '-SS', 'RT-DETR']
    assert [row['NMS'] for row in by_part.values()] == ['yes', 'yes', 'no']
    assert float(by_part['---']['attention ms']) == 0 < float(by_part['RT-DETR']['attention ms'])
    assert {row['how'] for row in rows_of('latency_n')} == {'by part', 'not fused', 'fused'}
    layers = layer_table(HSVDET(HSVDETConfig(attn='---')), 64, 64)
    assert float(by_part['---']['GFLOPs']) == pytest.approx(sum(row[5] for row in layers) / 1e9)
    assert float(by_part['---']['parameters M']) == pytest.approx(sum(row[4] for row in layers) / 1e6)


@pytest.mark.parametrize('dtype', ['auto', 'bfloat16', 'float16'])
def test_latency_respects_dtype(tiny, dtype):
    tiny(dtype=dtype, attn='---')
    seen, x = set(), torch.zeros(1, 3, 64, 64)
    conv = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.add(output.dtype) if isinstance(module, torch.nn.Conv2d) else None)
    try:
        with torch.no_grad():
            costs.time_parts(['---'], x)
            costs.time_passes(['---'], x)
    finally:
        conv.remove()
    assert seen == {torch.float32 if dtype == 'auto' else getattr(torch, dtype)}


def test_nms(tiny):
    costs.bench_nms((30, 600))
    few, many = rows_of('nms')
    assert few['candidates'] == '30' and 1 <= int(few['kept']) < int(many['kept']) <= 300


@pytest.mark.parametrize('arch, optimizer', [('hsvdet', 'adamw'), ('hsvdet', 'muon'), ('rtdetr', 'adamw')])
def test_train(four_images, tiny, arch, optimizer, monkeypatch):
    tiny(arch=arch, optimizer=optimizer)
    steps, step = [], Muon.step
    monkeypatch.setattr(Muon, 'step', lambda self: steps.append(1) or step(self))
    costs.bench_train()
    assert bool(steps) == (optimizer == 'muon')
    rows = rows_of('train')
    loss = ['assign + loss'] if arch == 'hsvdet' else []                              # else it is in the forward pass
    assert [r['part'] for r in rows[:-1]] == ['load', 'forward', *loss, 'backward', 'optimizer + EMA']
    assert sum(float(r['ms']) for r in rows[:-1]) == pytest.approx(float(rows[-1]['ms']))


def test_train_with_an_unknown_optimizer(four_images, tiny):
    tiny(optimizer='adam')
    with pytest.raises(InputError, match='--optimizer=adam: must be one of adamw sgd muon'):
        costs.bench_train()


def test_memory(tiny):
    costs.bench_memory()
    none, sparse, detr = ({name: float(value) for name, value in row.items() if name != 'detector'}
                          for row in rows_of('memory'))
    count = sum(p.numel() for p in HSVDET(HSVDETConfig(attn='---')).parameters())
    assert none['parameters'] == none['EMA'] == count * 4 / 2 ** 20
    kept = 'of which kept for backward'
    assert 0 < none[kept] < sparse[kept] and none['all'] < sparse['all']
    assert none['all'] == pytest.approx(sum(none.values()) - none['all'] - none[kept])
    count = sum(p.numel() for p in costs.make_model('RT-DETR').parameters())
    assert detr['parameters'] == count * 4 / 2 ** 20 and 0 < detr[kept]
    tiny(checkpointing=True)
    costs.bench_memory()
    assert float(rows_of('memory')[0][kept]) < none[kept] / 2


@pytest.mark.parametrize('name', ['---', '-SS', 'RT-DETR'])
def test_memory_on_the_meta_device_is_that_of_real_tensors(tiny, name):
    tiny(dtype='float32')
    model, images = costs.make_model(name).train(), torch.zeros(2, 3, 64, 64)
    with costs.LiveMemory(*model.parameters(), *model.buffers(), images) as memory:
        raw, _ = model(images)
        kept = memory.live / 2 ** 20
    assert len(raw) in (2, 3) and costs.meta_memory(name)['of which kept for backward'] / 2 ** 20 == pytest.approx(
        kept, rel=0.1), kept


def test_loader(four_images):
    costs.bench_loader(6)
    uncached, cached = rows_of('loader')
    assert (uncached['cache MiB'], cached['cache MiB']) == ('0', '1') and float(cached['samples/s']) > 0
    uncached, cached = rows_of('loader_parts')
    assert uncached['decode'] != '0%' == cached['decode']                             # four images fit into the cache


def test_reads_the_config_files_of_training(monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = configure(dict(vars(costs)), costs.Augment, costs.HSVDETConfig, costs.DETRConfig, positional='what',
                         lenient=True, argv=['memory', 'config/hsvdet_1080p_8gb.py', '--checkpointing=False'])
    expected = dict(what='memory', imgsz=(1088, 1920), scale='l', grad_accum=16, checkpointing=False, mosaic_block=64)
    assert {name: settings[name] for name in expected} == expected and 'lr' not in settings

"""video.py and `detect.py clip.mp4`: times, sizes, damage, interruption, memory. The clips are made here."""
import fractions
import json
import os
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import detect
import video
from configurator import InputError
from model import HSVDET, HSVDETConfig

av = pytest.importorskip('av')
RED, BLUE = (200, 30, 20), (10, 20, 220)


def make_clip(path, times, size=(64, 48), turn=0, codec='h264', sound=False, options=None, aspect=1):
    """A video whose upper half is red and whose left is blue, further each frame, shown at `times` (seconds)."""
    tick = fractions.Fraction(1, 1000)                               # coarser than video.TICKS, as in many files
    with av.open(str(path), 'w', options=options or {}) as container:
        stream = container.add_stream(codec, 25)
        stream.width, stream.height = size
        stream.pix_fmt = 'yuvj420p' if codec == 'mjpeg' else 'yuv420p'
        stream.codec_context.time_base = tick
        stream.codec_context.sample_aspect_ratio = fractions.Fraction(aspect)
        stream.codec_context.gop_size = 5
        if turn:
            stream.set_display_rotation(turn)
        voice = container.add_stream('aac', 48000) if sound else None
        for i, seconds in enumerate(times):
            pixels = np.zeros((size[1], size[0], 3), np.uint8)
            pixels[:size[1] // 2] = RED
            pixels[:, :size[0] * (i + 1) // (2 * len(times))] = BLUE
            frame = av.VideoFrame.from_ndarray(pixels, 'rgb24').reformat(format=stream.pix_fmt, threads=1)
            frame.pts, frame.time_base = round(seconds / tick), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if voice:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), 'fltp', 'mono')
            samples.sample_rate, samples.pts = 48000, 0
            container.mux(voice.encode(samples))
            container.mux(voice.encode(None))
    return str(path)


def read(path):
    with video.VideoReader(str(path)) as reader:
        return list(reader), reader


def steady(n):
    return [i / 25 for i in range(n)]


class Finder(torch.nn.Module):
    """Stands for a detector where the network does not matter: one object in each image, whose score the test knows."""
    names, imgsz, fixed_imgsz, rect, nms, best_f1, frames = ['cat', 'dog'], (64, 64), None, True, True, None, 0

    def blocks(self):
        return {}

    def forward(self, images):
        return images, {}

    def postprocess(self, raw, *settings):
        return [torch.tensor([[8.0, 8, 40, 30, 0.9, 1]])] * len(raw)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """detect.main() on a source with a Finder, or another model; its files are in tmp_path/out."""
    def run(source, model=None, **settings):
        monkeypatch.setattr(detect, 'load_model', lambda *a, **k: model or Finder())
        for name, value in dict(source=str(source), out_dir=str(tmp_path / 'out'), save_json=True, **settings).items():
            monkeypatch.setattr(detect, name, value)
        return detect.main()
    return run


def found(tmp_path):
    return json.loads((tmp_path / 'out' / 'detections.json').read_text())


def test_frames_boxes_and_times(run, tmp_path, capsys):
    """A variable frame rate and an odd width, from file to file: each frame at its time, its boxes, nothing else."""
    times = [0, 0.04, 0.25, 0.251, 1, 1.5, 3]
    clip = make_clip(tmp_path / 'clip.mkv', times, (66, 50), codec='ffv1')
    assert run(clip, batch_size=3, save_txt=True) == 0
    frames, _ = read(tmp_path / 'out' / 'clip.mp4')
    originals, _ = read(clip)
    assert [n for n, _, _ in frames] == list(range(7))
    assert np.allclose([seconds for _, seconds, _ in originals], times, atol=1e-6)
    assert np.allclose([seconds for _, seconds, _ in frames], times, atol=1 / video.TICKS)
    for (_, _, image), (_, _, original), d in zip(frames, originals, found(tmp_path), strict=True):
        x, y, w, h = d['bbox']
        drawn = detect.draw_detections(original, np.array([[x, y, x + w, y + h, d['score'], 1]]), Finder.names)
        error = np.abs(np.asarray(image, float) - np.asarray(drawn, float))
        assert error.mean() < 8 and np.abs(np.asarray(original, float) - np.asarray(drawn, float)).mean() > 15
        assert d['category'] == 'dog'
    assert [d['frame'] for d in found(tmp_path)] == list(range(7))
    assert np.allclose([d['seconds'] for d in found(tmp_path)], times, atol=1e-6)
    assert len(os.listdir(tmp_path / 'out' / 'labels')) == 7 and '7 frames, 7 objects' in capsys.readouterr().out


@pytest.mark.parametrize('size', [(33, 35), (64, 47), (16, 16)])
def test_odd_sizes_one_frame_and_colours(size, tmp_path):
    """4:2:0 needs even sides: a row or a column is added, none is lost. And red stays red, blue blue."""
    image = Image.new('RGB', size, RED)
    image.paste(BLUE, (0, 0, size[0] // 2, size[1]))
    image.paste('white', (size[0] - 1, 0, *size))
    with video.VideoWriter(str(tmp_path / 'one.mp4'), 30) as writer:
        writer.write(image, 0.0)
    ((_, seconds, again),), reader = read(tmp_path / 'one.mp4')
    with av.open(str(tmp_path / 'one.mp4')) as container:            # without duration it would never be seen
        assert abs(container.duration / 1e6 - 1 / 30) < 0.002
    assert seconds == 0 and again.size == tuple(n + n % 2 for n in size) and not reader.warning
    assert min(again.getpixel((size[0] - 1, 9))) > 150, 'the last column'
    for x, colour in ((2, BLUE), (size[0] - 5, RED)):
        assert np.abs(np.array(again.getpixel((x, 9))) - colour).max() < 12


def test_a_frame_an_hour(tmp_path):
    with video.VideoWriter(str(tmp_path / 'slow.mp4'), 1 / 3600) as writer:
        for hour in range(3):
            writer.write(Image.new('RGB', (16, 16), RED), 3600.0 * hour)
    frames, _ = read(tmp_path / 'slow.mp4')
    assert [seconds for _, seconds, _ in frames] == [0, 3600, 7200]


@pytest.mark.parametrize('turn', [90, 180, 270])
def test_rotation(turn, tmp_path):
    """What a telephone stores lying on its side is seen as people see it: turned counterclockwise."""
    clip = make_clip(tmp_path / 'a.mp4', steady(1), (64, 32), turn=turn)
    ((_, _, image),), _ = read(clip)
    ((_, _, stored),), _ = read(make_clip(tmp_path / 'b.mp4', steady(1), (64, 32)))
    assert np.array_equal(np.asarray(image), np.rot90(np.asarray(stored), turn // 90))


def test_pixels_that_are_not_square(tmp_path):
    """As in DV and DVDs: the picture is as wide as a player shows it."""
    clip = make_clip(tmp_path / 'a.mp4', steady(1), (48, 48), aspect='4/3')
    ((_, _, image),), _ = read(clip)
    assert image.size == (64, 48)


def test_truncated(run, tmp_path, capsys):
    """What was decoded is kept, one warning, exit status 1; without its index an mp4 is not readable at all."""
    whole = make_clip(tmp_path / 'whole.mp4', steady(60), options=dict(movflags='faststart'))
    data = open(whole, 'rb').read()
    (tmp_path / 'cut.mp4').write_bytes(data[:len(data) * 2 // 3])
    assert run(tmp_path / 'cut.mp4') == 1
    error = capsys.readouterr().err
    assert error.count('cut.mp4') == 1 and 'Traceback' not in error
    frames, _ = read(tmp_path / 'out' / 'cut.mp4')
    assert 5 < len(frames) < 60 and len(found(tmp_path)) == len(frames)
    make_clip(tmp_path / 'index_last.mp4', steady(10))
    data = (tmp_path / 'index_last.mp4').read_bytes()
    (tmp_path / 'index_last.mp4').write_bytes(data[:len(data) // 2])
    with pytest.raises(InputError, match='index_last.mp4 cannot be read as a video'):
        read(tmp_path / 'index_last.mp4')


def test_damage_in_the_middle(run, tmp_path, capsys):
    """A frame that cannot be decoded costs itself, not those after it, and is mentioned once."""
    clip = make_clip(tmp_path / 'a.avi', steady(9), codec='mjpeg')
    with av.open(clip) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(open(clip, 'rb').read())
    for start, size in packets[3:5]:
        data[start:start + size] = bytes(size)
    (tmp_path / 'a.avi').write_bytes(data)
    assert run(clip) == 1
    assert '2 packets cannot be decoded, 7 frames were' in capsys.readouterr().err
    frames, _ = read(tmp_path / 'out' / 'a.mp4')
    assert np.allclose([seconds for _, seconds, _ in frames], [i / 25 for i in (0, 1, 2, 5, 6, 7, 8)], atol=1e-4)


@pytest.mark.parametrize('content', [
    b'', b'not a video', bytes(np.random.default_rng(0).integers(0, 256, 5000, np.uint8)),
    b'ffconcat version 1.0\nfile other.mp4\n',
    b'#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n',
    b'<svg xmlns="http://www.w3.org/2000/svg"/>', b'RIFF\x00\x01\x00\x00AVI LIST'])
def test_garbage(content, run, tmp_path, capsys):
    """Named, skipped, nothing written; text that makes FFmpeg open other files is no video, whatever it is called."""
    make_clip(tmp_path / 'other.mp4', steady(3))
    (tmp_path / 'clip.mp4').write_bytes(content)
    assert run(tmp_path / 'clip.mp4') == 1
    assert 'skipped' in capsys.readouterr().err and os.listdir(tmp_path / 'out') == ['detections.json']
    assert found(tmp_path) == []


def test_sound_and_several_files(run, tmp_path, capsys):
    """Images and videos in one list; of the sound it is said that it is not there."""
    make_clip(tmp_path / 'a.mp4', steady(2), sound=True)
    Image.new('RGB', (40, 30)).save(tmp_path / 'b.png')
    (tmp_path / 'list.txt').write_text('b.png\na.mp4\n')
    assert run(tmp_path / 'list.txt') == 0
    assert 'sound' in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / 'out')) == ['a.mp4', 'b.jpg', 'detections.json']
    assert [(d['file_name'], d['image_id']) for d in found(tmp_path)] == [('b.png', 1), ('a.mp4', 0), ('a.mp4', 1)]


def test_without_pyav(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'av', None)
    (tmp_path / 'clip.mp4').touch()
    with pytest.raises(InputError, match='pip install'):
        run(tmp_path / 'clip.mp4')


def test_interrupted(run, tmp_path, monkeypatch):
    """Ctrl-C in the third batch: a playable mp4 of the frames before it, a complete json, exit status 130."""
    original, calls = detect.detect_images, []

    def third_time(*args, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **settings)

    monkeypatch.setattr(detect, 'detect_images', third_time)
    assert run(make_clip(tmp_path / 'clip.mp4', steady(30)), batch_size=4) == 130
    assert len(read(tmp_path / 'out' / 'clip.mp4')[0]) == len(found(tmp_path)) == 8


def test_memory_does_not_grow_with_length(run, tmp_path, monkeypatch):
    """Of 600 frames with 20 objects each: two batches of images live at most; objects are on the disk by the middle."""
    alive, on_disk = [], []

    def twenty(model, images, **settings):
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(image) for image in images]
        assert len(alive) <= 2 * detect.batch_size
        on_disk.append(os.path.getsize(tmp_path / 'out' / 'detections.json'))
        return [np.array([[1, 1, 20, 20, 0.5, 0]] * 20)] * len(images)

    monkeypatch.setattr(detect, 'detect_images', twenty)
    monkeypatch.setattr(detect, 'draw_detections', lambda image, rows, names: image)
    assert run(make_clip(tmp_path / 'clip.mp4', steady(600), (32, 32)), batch_size=8) == 0
    size = os.path.getsize(tmp_path / 'out' / 'detections.json')
    assert len(on_disk) == 75 and 0.4 * size < on_disk[37] < 0.6 * size and len(found(tmp_path)) == 12_000


def test_tokens(run, tmp_path):
    """A video for each block that selects; the cells that it left out are darker than in the clip."""
    model = HSVDET(HSVDETConfig('n', 2, '-SS', k=5)).eval()
    model.names, model.best_f1 = ['cat', 'dog'], None
    clip = make_clip(tmp_path / 'clip.mp4', steady(2), (96, 64))
    assert run(clip, model, imgsz=96, tokens=True, save_images=False) == 0
    assert sorted(os.listdir(tmp_path / 'out')) == ['clip_p4.mp4', 'clip_p5.mp4', 'detections.json']
    original = np.asarray(read(clip)[0][0][2].convert('L'), float)[:30] + 1
    for level, cells in (('p4', 24), ('p5', 6)):
        frames, _ = read(tmp_path / 'out' / f'clip_{level}.mp4')
        assert len(frames) == 2 and frames[0][2].size == (96, 64)
        light = np.asarray(frames[0][2].convert('L'), float)[:30] / original
        assert abs((light > 0.65).mean() - 5 / cells) < 0.25


@pytest.mark.slow
def test_4k(run, tmp_path):
    """The encoder of a 4K video holds frames too: 24 of them, and the resident memory stays below 2 GB more."""
    resource = pytest.importorskip('resource')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run(make_clip(tmp_path / 'clip.mp4', steady(24), (3840, 2160)), batch_size=4) == 0
    assert read(tmp_path / 'out' / 'clip.mp4')[0][23][2].size == (3840, 2160)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    assert sys.platform == 'darwin' or grown < 2, f'{grown:.2f} GB'


@pytest.mark.slow
def test_a_real_ctrl_c(tmp_path):
    """The script as a user stops it."""
    HSVDET(HSVDETConfig('n', 2, '---')).save(tmp_path / 'w.pt')
    clip, out = make_clip(tmp_path / 'clip.mp4', steady(3000), (320, 320)), tmp_path / 'out'
    root = os.path.dirname(os.path.abspath(detect.__file__))
    script = subprocess.Popen([sys.executable, 'detect.py', clip, f'--weights={tmp_path / "w.pt"}', f'--out_dir={out}',
                               '--imgsz=320', '--batch_size=2'], cwd=root, stderr=subprocess.PIPE, text=True)
    try:
        started = time.time()
        while not (out / 'clip.mp4').exists():                       # it is made for the first frame
            assert script.poll() is None and time.time() - started < 200
            time.sleep(0.5)
        script.send_signal(signal.SIGINT)
        _, error = script.communicate(timeout=100)
    finally:
        script.kill()
    assert script.returncode == 130 and 'stopped' in error and 'Traceback' not in error
    assert 0 < len(read(out / 'clip.mp4')[0]) < 3000

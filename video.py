"""
Video files for detect.py: upright frames with their times out of one, frames into an mp4. With PyAV (FFmpeg's
libraries), which is imported when first needed.

    with VideoReader('clip.mp4') as reader, VideoWriter('boxes.mp4', reader.rate) as writer:
        for number, seconds, image in reader:          # 0, 1, ...; from the start of the video; PIL RGB
            writer.write(image, seconds)

Both hold a few frames at a time, however long the video is. Times are those of the file, so that a variable frame rate
stays as it is. A damaged file gives what can be decoded of it, and reader.warning then says so.

What it does not do: sound, streams and webcams, playlists (a file that names other files is refused), HDR.
"""
import fractions

import numpy as np
from PIL import Image

from configurator import InputError

SUFFIXES = ('.mp4', '.mov', '.m4v', '.mkv', '.webm', '.avi', '.mpg', '.mpeg', '.ts', '.mts', '.wmv', '.flv', '.ogv')

# FFmpeg goes by content, not by name: without these lists a text file named .mp4 could make it open others, or the net
SAFE = dict(protocol_whitelist='file',
            format_whitelist='mov,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,h264,hevc,m4v,ivf')
TICKS = 90_000                                                       # per second, in the files written; MPEG's own unit
UPRIGHT = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


def import_av():
    try:
        import av
    except ImportError:
        raise InputError('videos are read and written by PyAV, which is not installed: pip install "av>=17"') from None
    # threads=1 where pixels are converted, below: PyAV starts its threads anew for each frame, by default one a core,
    # which for a small frame takes many times as long as its conversion. And its logging stays off, as it is: after
    # av.logging.set_level decoder threads wait for Python's lock, while whoever holds that may be waiting for them
    return av


class VideoReader:
    """
    An open video file; iterate once. Attributes: rate, frames per second, on average; count, how many frames to expect,
    or None; has_sound; warning, '' or, after the last frame, what could not be read. Raises InputError at the start.
    """

    def __init__(self, path):
        av = import_av()
        self.path, self.warning, self.decoded, self.broken = path, '', 0, 0
        self.error = av.error.FFmpegError
        try:
            self.container = av.open(f'file:{path}', options=SAFE, metadata_errors='ignore')
        except (self.error, OSError) as e:
            raise InputError(f'{path} cannot be read as a video ({e.strerror}): is it complete, and one? '
                             'Convert it with ffmpeg, or leave it out') from None
        if not self.container.streams.video:
            self.container.close()
            raise InputError(f'{path} has no video in it: give another file')
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = 'AUTO'
        self.rate = min(float(self.stream.average_rate or self.stream.guessed_rate or 25), 1000.0)
        self.has_sound = bool(self.container.streams.audio)
        self.aspect = float(self.stream.sample_aspect_ratio or 1)    # width of a pixel: 4/3 in DV, say
        self.duration = 0.0                                          # seconds, as far as the file says
        if self.stream.duration:
            self.duration = float(self.stream.duration * self.stream.time_base)
        elif self.container.duration and not self.has_sound:         # it is in microseconds, and the sound's too
            self.duration = self.container.duration / 1e6
        self.count = self.stream.frames or round(self.duration * self.rate) or None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.container.close()

    def decode(self):
        """FFmpeg's frames, in the order of display; broken packets are counted and passed over."""
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets)                               # the last one is empty: it asks for what is left
            except (StopIteration, self.error):
                return
            try:
                yield from packet.decode()
            except self.error:
                self.broken += 1

    def __iter__(self):
        """Yields (number, seconds, image): from 0; since the start, always rising; PIL RGB, upright, square pixels."""
        start = last = None
        for frame in self.decode():
            time = frame.time
            if start is None:
                start = time or 0.0
            seconds = 0.0 if last is None else last + 1 / self.rate if time is None else time - start
            if last is not None and seconds <= last:                 # a broken clock: no player could follow it
                seconds = last + 1 / TICKS
            image, turn = frame.to_image(threads=1), round(frame.rotation / 90) * 90 % 360
            if self.aspect != 1:
                image = image.resize((max(1, round(image.width * self.aspect)), image.height))
            number, last, self.decoded = self.decoded, seconds, self.decoded + 1
            yield number, seconds, image.transpose(UPRIGHT[turn]) if turn else image
        if last is None:
            raise InputError(f'{self.path}: not one frame can be decoded: convert it with ffmpeg, or leave it out')
        if self.broken:
            self.warning = f'{self.path}: {self.broken} packets cannot be decoded, {self.decoded} frames were'
        elif last + max(0.5, 3 / self.rate) < self.duration:
            self.warning = f'{self.path} ends early, after {last:.1f} of {self.duration:.1f} s: {self.decoded} frames'


class VideoWriter:
    """
    An mp4 (H.264, 4:2:0) of the frames given to write(); it is made, with the size of the first, when that one comes.
    Closed by `with` whatever happens inside, so that what was written can be played. rate: frames per second, a hint.
    """

    def __init__(self, path, rate):
        self.av, self.path, self.rate, self.container = import_av(), path, rate, None

    def open(self, size):
        try:
            self.container = self.av.open(f'file:{self.path}', 'w', format='mp4')
            rate = max(fractions.Fraction(self.rate).limit_denominator(1001), fractions.Fraction(1, 1001))
            self.stream = self.container.add_stream('h264', rate, options=dict(preset='veryfast', crf='20'))
        except (self.av.error.FFmpegError, OSError, ValueError) as e:
            raise InputError(f'{self.path} cannot be written ({e}): name another --out_dir=, or get an FFmpeg with an '
                             'H.264 encoder, pip install "av>=17"') from None
        self.size, coder = size, self.stream.codec_context
        coder.width, coder.height = (n + n % 2 for n in size)        # 4:2:0 wants even sides
        coder.pix_fmt, coder.time_base = 'yuv420p', fractions.Fraction(1, TICKS)
        coder.colorspace = coder.color_primaries = coder.color_trc = coder.color_range = 1   # BT.709, limited range

    def write(self, image, seconds):
        """A PIL image and when to show it; one of another size than the first is resized. Raises InputError."""
        if self.container is None:
            self.open(image.size)
        if image.size != self.size:
            image = image.resize(self.size)
        pixels = np.asarray(image.convert('RGB'))
        h, w, _ = pixels.shape
        pixels = np.pad(pixels, ((0, h % 2), (0, w % 2), (0, 0)), 'edge')
        frame = self.av.VideoFrame.from_ndarray(pixels, 'rgb24')
        frame = frame.reformat(format='yuv420p', dst_colorspace='ITU709', threads=1)
        frame.pts, frame.time_base = round(seconds * TICKS), fractions.Fraction(1, TICKS)
        frame.duration = round(TICKS / self.rate)                    # tells how long to show the last frame
        self.container.mux(self.stream.encode(frame))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.container is not None:
            try:
                self.container.mux(self.stream.encode(None))         # the frames that the encoder still holds
            finally:
                self.container.close()

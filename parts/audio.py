"""Recordings: audio files <-> mono waveforms (N,) at a sample rate of choice.

    wav = read_audio("in.mp3", 16000, start=1.5, end=4.0)    float32 in [-1, 1]
    write_audio("out.wav", wav, 16000)

- A file that breaks off is refused: libsndfile alone would read what is left and report nothing.
- Resampling is band-limited, between any two rates.
- Loudness is that of frames of 20 ms.
"""

import contextlib
import io
import math
import os
import re
import wave
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from torch import nn

from parts.files import whole

QUIET = 40.0  # dB below the loudest 20 ms; what is quieter is silence
MAX_RATE = 384_000  # Hz; a header with a higher sample rate is damaged
PIPE_SIZES = 0x7FF00000  # bytes; programs that write to a pipe do not know the size and write this or more
# what libsndfile logs of a file that is shorter than its header says
CUT_OFF = re.compile(r"^ *(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.M)

# ---------------------------------------------------------------------------------------------------------------------
# resampling


@lru_cache(maxsize=32)
def sinc_filter(up, down, block, zeros=48, rolloff=0.96, beta=9.0, size=256):
    """The filter that makes the outputs block, ..., block + size - 1 of every `up` from every `down` input samples.

    Returns the first input sample and a matrix (inputs, outputs) of Kaiser-windowed sincs with `zeros` zero crossings
    to each side, one column for each output. beta = 0: a Hann window and sums as they are, as in torchaudio.
    """
    cutoff = min(1.0, up / down) * rolloff  # of the input's Nyquist frequency; the filter's slope takes the rest
    width = math.ceil(zeros / cutoff)
    at = torch.arange(block, min(block + size, up), dtype=torch.float64) * down / up  # outputs, in input samples
    inputs = at.floor().long() - width + torch.arange(1, 2 * width + 1)[:, None]  # the samples under each sinc
    t = inputs - at
    if beta:
        sinc = torch.sinc(cutoff * t) * torch.special.i0(beta * (1 - (t / width) ** 2).clamp(min=0).sqrt())
        sinc *= t.abs() < width
        sinc /= sinc.sum(0)
    else:
        window = (math.pi / 2 * (cutoff * t / zeros).clamp(-1, 1)).cos().square()
        sinc = cutoff * torch.sinc(cutoff * t) * window
    first = int(inputs[0, 0])
    matrix = torch.zeros(int(inputs[-1, -1]) - first + 1, len(at))
    return first, matrix.scatter_(0, inputs - first, sinc.float())


def resample(wav, from_rate, to_rate, **filter):
    """Band-limited change of the sample rate: wav (..., N) -> (..., ceil(N * to_rate / from_rate)).

    filter: zeros, rolloff and beta of sinc_filter.
    """
    if from_rate == to_rate or wav.shape[-1] == 0:
        return wav
    common = math.gcd(from_rate, to_rate)
    n_out = -(-wav.shape[-1] * to_rate // from_rate)
    repeats = max(1, 128 * common // to_rate)  # several periods at once make the matrix large enough to be fast
    up, down = (rate // common * repeats for rate in (to_rate, from_rate))
    periods = -(-n_out // up)
    left = -sinc_filter(up, down, 0, **filter)[0]
    wav = nn.functional.pad(wav, (left, max(0, periods * down + left + 2 - wav.shape[-1])))
    out = []
    for block in range(0, min(up, n_out), 256):  # all matrices together would fill the memory at odd rates
        first, matrix = sinc_filter(up, down, block, **filter)
        windows = wav[..., first + left :].unfold(-1, len(matrix), down)[..., :periods, :]
        out.append(windows @ matrix.to(wav))
    return torch.cat(out, -1).flatten(-2)[..., :n_out]


# ---------------------------------------------------------------------------------------------------------------------
# files


class AudioHeader(NamedTuple):
    """The header of a recording: sample rate (Hz), frames, kind of file, and how many seconds are missing at its end
    (0: none; inf: an unknown number)."""

    rate: int
    frames: int
    kind: str
    missing: float

    @property
    def seconds(self):
        return self.frames / self.rate


@contextlib.contextmanager
def silent_stderr():
    """Discard what is written to standard error below Python: libmpg123 writes lines about every mp3 there."""
    try:
        kept = os.dup(2)
    except OSError:  # a service may have closed it
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def open_audio(source):
    """The soundfile.SoundFile of a path or an io.BytesIO. Raises FileNotFoundError, or ValueError of one line."""
    name = audio_name(source)
    if not isinstance(source, io.BytesIO) and not os.path.isfile(source):
        raise FileNotFoundError(f"{name}: no such audio file")
    try:
        if isinstance(source, io.BytesIO):
            source.seek(0)
        with silent_stderr(), soundfile.SoundFile(source) as file:
            yield file
    except Exception as error:  # soundfile raises TypeError, OverflowError, MemoryError and others beside its own
        cause = " ".join(str(getattr(error, "error_string", error)).split())
        if "regular file" in cause or "samplerate must" in cause:
            cause = "unknown kind of recording"
        raise ValueError(f"{name}: not readable as audio ({cause or type(error).__name__})") from error


def audio_name(source):
    return getattr(source, "name", "the recording") if isinstance(source, io.BytesIO) else os.fspath(source)


def file_version(source):
    """A key that changes when a file is replaced, for caches: another file may get the same name."""
    if isinstance(source, io.BytesIO) or not os.path.exists(source):
        return None
    return os.stat(source).st_mtime_ns, os.stat(source).st_size


def audio_header(source):
    """The AudioHeader of a path or an io.BytesIO. Raises FileNotFoundError, or ValueError of one line with its name."""
    return _audio_header(source, file_version(source))


@lru_cache(maxsize=8)  # opening a long mp3 means reading all of it
def _audio_header(source, version):
    with open_audio(source) as file:
        header = AudioHeader(file.samplerate, file.frames, file.format, 0.0)
        log = file.extra_info
    if header.kind == "RAW":  # libsndfile opens any file whose name ends in .vox as one
        raise ValueError(f"{audio_name(source)}: no header that names the kind of recording")
    if not 0 < header.rate <= MAX_RATE:
        raise ValueError(f"{audio_name(source)}: a sample rate of {header.rate:,} Hz is not possible")
    missing = 0.0
    if found := CUT_OFF.search(log):
        promised, present = map(int, found.groups())
        if 0 < present < promised < PIPE_SIZES:
            missing = header.seconds * (promised - present) / present
    elif header.kind == "OGG" and not last_page_is_whole(source):
        missing = math.inf
    return header._replace(missing=missing if missing > 0.1 else 0.0)


def last_page_is_whole(source):
    """Whether an Ogg file ends with a whole page: libsndfile stops before a broken one and does not report it."""
    with io.BytesIO(source.getvalue()) if isinstance(source, io.BytesIO) else open(source, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16 - 27))  # no page is longer
        page = file.read()
    page = page[page.rfind(b"OggS") :]  # its header: 26 bytes, the number of its segments, the length of each
    return len(page) > 26 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])


def read_audio(source, sample_rate, start=0.0, end=None, max_seconds=math.inf):
    """Read a recording (wav, flac, ogg, mp3, ...) as mono at `sample_rate`: float32 (N,) in [-1, 1].

    source: a path, or an io.BytesIO whose attribute `name` is its name in messages. start, end: seconds. Raises
    FileNotFoundError, or ValueError of one line with the name of the file; for one that is longer than `max_seconds`
    before it is read.
    """
    name = audio_name(source)
    header = audio_header(source)
    if header.frames <= 0:
        raise ValueError(f"{name}: the recording {'breaks off at once' if header.missing else 'is empty'}")
    first = round(start * header.rate) if 0 <= start < header.seconds else header.frames
    last = header.frames if end is None or end >= header.seconds else round(end * header.rate)
    if not first < last:
        raise ValueError(f"{name}: nothing from {start} to {end} s in a recording of {header.seconds:.2f} s")
    if last - first > max_seconds * header.rate:
        seconds = (last - first) / header.rate
        raise ValueError(f"{name}: {seconds:,.0f} s long, longer than the limit of {max_seconds:g} s")
    missing = header.missing if end is None or end > header.seconds else 0.0
    if not missing:
        wav = read_frames(source, header, first, last)
        missing = (last - first - len(wav)) / header.rate
    if missing > 0.1:
        raise ValueError(f"{name}: breaks off {f'{missing:.2f} s ' if missing < math.inf else ''}before its end")
    if len(wav) == 0:
        raise ValueError(f"{name}: the recording is empty")
    if not np.isfinite(wav).all():
        raise ValueError(f"{name}: the recording holds NaN or infinite samples")
    return resample(torch.from_numpy(wav), header.rate, sample_rate)


def read_frames(source, header, first, last):
    """Frames first, ..., last - 1 of a recording, mixed down to mono: float32 (N,), fewer if the file breaks off."""
    if header.kind == "MP3" and last - first < header.frames and not isinstance(source, io.BytesIO):
        size = 300 * header.rate  # opening a long mp3 for every cut would take too long: keep pieces of five minutes
        version = file_version(source)
        starts = range(first // size * size, last, size)
        pieces = [_mp3_piece(source, version, start, size)[max(0, first - start) : last - start] for start in starts]
        return np.concatenate(pieces)
    with open_audio(source) as file:
        if first:
            file.seek(first)
        return file.read(last - first, dtype="float32", always_2d=True).mean(1)


@lru_cache(maxsize=6)
def _mp3_piece(path, version, first, size):
    """`size` frames of an mp3 from `first` on, mixed down to mono: float32 (size,).

    Each piece opens the file anew: the last bits of a cut depend on what the same decoder read before.
    """
    with open_audio(path) as file:
        file.seek(first)
        return file.read(size, dtype="float32", always_2d=True).mean(1)


def write_audio(path, wav, sample_rate):
    """Write wav (N,) in [-1, 1] as a 16-bit mono WAV file. Raises OSError, which names the file."""
    samples = (wav.detach().cpu().flatten().clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
    with whole(path) as raw, wave.open(raw, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.astype("<i2").tobytes())


# ---------------------------------------------------------------------------------------------------------------------
# loudness


def frame_size(rate):
    """The samples of 20 ms."""
    return max(1, rate // 50)


def powers(wav, size):
    """The power of each `size` samples of wav (N,), an array or a tensor on the CPU: (N // size,). A constant part does
    not count, and power below that of the steps of 16 bits is 0."""
    wav = np.asarray(wav)
    power = wav[: len(wav) // size * size].reshape(-1, size).var(1)
    return np.where(power > 2**-30 / 12, power, 0)


def sounding(wav, frames):
    """Which of so many equal parts of wav (N,) have sound in them (frames,): more than -40 dB of the loudest one."""
    power = powers(wav, max(1, len(wav) // max(1, frames)))[:frames]
    return np.pad(power, (0, frames - len(power))) > power.max(initial=0.0) * 10 ** (-QUIET / 10)


def longest_silence(wav, rate):
    """Seconds of the longest silence in wav (N,), an array or a tensor on the CPU. A constant wav is all silence.

    Silence is 40 dB below what is loud: the 95th percentile of the frames that are not silent beside the loudest one,
    so that neither a click nor a long silence changes it.
    """
    size = frame_size(rate)
    power = powers(wav, size)
    least = 10 ** (-QUIET / 10)
    sounds = power[power > power.max(initial=0.0) * least]
    if not len(sounds):
        return len(wav) / rate
    places = np.flatnonzero(power > np.quantile(sounds, 0.95) * least)
    return float(np.diff(places, prepend=-1, append=len(power)).max() - 1) * size / rate


def clipped_share(wav):
    """The share of the samples of wav (N,), an array or a tensor on the CPU, at full scale."""
    wav = np.asarray(wav)
    return float((np.abs(wav) >= 0.99).mean()) if len(wav) else 0.0

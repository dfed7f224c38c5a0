"""
Waveform <-> codes: every codec of Parlando, and the reading, writing and resampling of audio files.

A codec turns a waveform into frames, and each frame into K small integers, one from each of K codebooks of V entries.
Notable features:
- one contract for all codecs, and tables that travel with the token files and inside checkpoints
- `mel` needs no weights from anywhere: patches of mel spectrogram, decorrelated by PCA, quantised by residual k-means
  fitted on the data at hand, decoded by mel inversion and fast Griffin-Lim
- codes are exact: `mel` encodes in float64, so that neither other recordings in the batch nor padding change them
- the codecs of the published models in plain torch: layers that they share, then each as the table of its architecture
- every layer streams: what it needs of the signal before stays in a Flow, so a file in pieces is the whole file
- padding ends where a row ends, so that a batch gives each row the codes that it gets alone
- weights are read, never run: pickles may hold tensors only, archives are not unpacked
- band-limited resampling between any two rates

B: batch   N: samples   T: frames   K: codebooks   V: entries of a codebook   M: mel bands   F: FFT bins
S: steps (spectra) in a frame   P = S * M: numbers in a patch   D: principal components kept of them
C: channels   L: steps of a layer's signal
"""

import argparse
import contextlib
import hashlib
import html
import inspect
import io
import json
import math
import os
import re
import sys
import tarfile
import wave
from functools import lru_cache, partial
from glob import escape, glob
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import soundfile
import torch
from torch import nn

from parts.files import need, whole
from parts.tensors import UNBUILT, fault, need_tensors, reason, undamaged, unpickle, what_is

# -----------------------------------------------------------------------------
# audio files


MOST_RATE = 384_000  # Hz; a header that says more is damaged
PIPED = 0x7FF00000  # bytes; sizes from here on are what writers to a pipe put, who do not know them
PROMISED = re.compile(r"^ *(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.M)


@lru_cache(maxsize=32)
def sinc_filter(up, down, block, zeros=48, rolloff=0.96, beta=9.0, size=256):
    """What turns every `down` samples into outputs block, ..., block + size - 1 of `up`: the first input sample and a
    matrix (inputs, at most `size` outputs). It holds Kaiser-windowed sincs, `zeros` zero crossings to each side,
    shifted from output to output. Where beta is 0 the window is Hann's, and sums are left as they are, as in
    torchaudio."""
    cutoff = min(1.0, up / down) * rolloff  # of the input's Nyquist frequency; the rest is the filter's slope
    width = math.ceil(zeros / cutoff)
    at = torch.arange(block, min(block + size, up), dtype=torch.float64) * down / up  # in input samples
    inputs = at.floor().long() - width + torch.arange(1, 2 * width + 1)[:, None]  # what each output hears
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
    """Band-limited change of sample rate: wav (..., N) -> (..., ceil(N * to_rate / from_rate)). `filter`: see
    sinc_filter."""
    if from_rate == to_rate or wav.shape[-1] == 0:
        return wav
    up, down = to_rate // math.gcd(from_rate, to_rate), from_rate // math.gcd(from_rate, to_rate)
    n_out = -(-wav.shape[-1] * up // down)
    many = max(1, 128 // up)  # periods at once, for a matrix worth multiplying with
    up, down = up * many, down * many
    periods = -(-n_out // up)
    left = -sinc_filter(up, down, 0, **filter)[0]
    wav = nn.functional.pad(wav, (left, max(0, periods * down + left + 2 - wav.shape[-1])))
    out = []
    for block in range(0, min(up, n_out), 256):  # one matrix at a time: of odd rates all of them would fill the memory
        first, matrix = sinc_filter(up, down, block, **filter)
        windows = wav[..., first + left :].unfold(-1, len(matrix), down)[..., :periods, :]
        out.append(windows @ matrix.to(wav))
    return torch.cat(out, -1).flatten(-2)[..., :n_out]


class AudioHeader(NamedTuple):
    """What a recording says of itself: sample rate (Hz), frames, kind of file, and the seconds it lacks at its end,
    where it is cut off (inf: nobody knows how many)."""

    rate: int
    frames: int
    kind: str
    lacks: float

    @property
    def seconds(self):
        return self.frames / self.rate


@contextlib.contextmanager
def hushed():
    """Nothing reaches standard error meanwhile: libmpg123 writes lines about each mp3 there, past Python."""
    try:
        kept = os.dup(2)
    except OSError:  # closed, as that of a service may be
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
    """The soundfile.SoundFile of a path or an io.BytesIO. Whatever goes wrong with it is a ValueError, one line."""
    name = audio_name(source)
    if not isinstance(source, io.BytesIO) and not os.path.isfile(source):
        raise FileNotFoundError(f"{name}: no such audio file")
    try:
        if isinstance(source, io.BytesIO):
            source.seek(0)
        with hushed(), soundfile.SoundFile(source) as file:
            yield file
    except Exception as error:  # soundfile raises TypeError, OverflowError, MemoryError and more beside its own
        says = " ".join(str(getattr(error, "error_string", error)).split())
        if "regular file" in says or "samplerate must" in says:
            says = "no kind of recording that is known here"
        raise ValueError(f"{name}: not readable as audio ({says or type(error).__name__})") from error


def audio_name(source):
    return getattr(source, "name", "the recording") if isinstance(source, io.BytesIO) else os.fspath(source)


def stamp(source):
    """What changes with a file, so that nothing is remembered of an older one of the same name."""
    if isinstance(source, io.BytesIO) or not os.path.exists(source):
        return None
    return os.stat(source).st_mtime_ns, os.stat(source).st_size


def audio_header(source):
    """The AudioHeader of a path or an io.BytesIO. Raises FileNotFoundError or ValueError, one line that names it."""
    return _audio_header(source, stamp(source))


@lru_cache(maxsize=8)  # to open a long mp3 means to go through all of it
def _audio_header(source, stamp):
    with open_audio(source) as file:
        rate, frames, kind, log = file.samplerate, file.frames, file.format, file.extra_info
    if kind == "RAW":  # libsndfile takes any file for one whose name ends in .vox
        raise ValueError(f"{audio_name(source)}: has no header that says what kind of recording it is")
    if not 0 < rate <= MOST_RATE:
        raise ValueError(f"{audio_name(source)}: a sample rate of {rate:,} Hz, at most {MOST_RATE:,} can be meant")
    lacks = 0.0
    if found := PROMISED.search(log):
        promised, there = map(int, found.groups())
        if 0 < there < promised < PIPED:
            lacks = frames / rate * (promised - there) / there
    elif kind == "OGG" and not last_page_is_whole(source):
        lacks = math.inf
    return AudioHeader(rate, frames, kind, lacks if lacks > 0.1 else 0.0)


def last_page_is_whole(source):
    """Does an Ogg file end with a whole page? libsndfile takes what comes before a broken one for all of it."""
    with io.BytesIO(source.getvalue()) if isinstance(source, io.BytesIO) else open(source, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16 - 27))  # no page is longer
        page = file.read()
    page = page[page.rfind(b"OggS") :]  # its header: 26 bytes, the number of its segments, the length of each
    return len(page) > 26 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])


def read_audio(source, sample_rate, start=0.0, end=None, most_seconds=math.inf):
    """Read what soundfile reads (wav, flac, ogg, mp3, ...) as mono at `sample_rate`: float32 (N,) in [-1, 1].

    source: a path, or an io.BytesIO, whose attribute `name` says in messages what it is. `start` and `end` are seconds.
    Raises FileNotFoundError or ValueError, one line that names the file; of more than `most_seconds` before it is read.
    """
    name, header = audio_name(source), audio_header(source)
    rate, total = header.rate, header.frames
    if total <= 0:
        raise ValueError(f"{name}: the recording {'breaks off at once' if header.lacks else 'is empty'}")
    first = round(start * rate) if 0 <= start < header.seconds else total
    last = total if end is None or end >= header.seconds else round(end * rate)
    if not first < last:
        raise ValueError(f"{name}: nothing from {start} to {end} s in a recording of {header.seconds:.2f} s")
    if last - first > most_seconds * rate:
        raise ValueError(f"{name}: {(last - first) / rate:,.0f} s long, at most {most_seconds:g} s are read")
    lacks, wav = header.lacks if end is None or end > header.seconds else 0.0, ()
    if not lacks:
        wav = read_frames(source, header, first, last)
        lacks = (last - first - len(wav)) / rate
    if lacks > 0.1:
        raise ValueError(f"{name}: breaks off {f'{lacks:.2f} s ' if lacks < math.inf else ''}before its end")
    if len(wav) == 0:
        raise ValueError(f"{name}: the recording is empty")
    if not np.isfinite(wav).all():
        raise ValueError(f"{name}: the recording holds NaN or infinite samples")
    return resample(torch.from_numpy(wav), rate, sample_rate)


def read_frames(source, header, first, last):
    """Frames first .. last - 1 of a recording, mixed down: float32 (N,), fewer where it breaks off."""
    if header.kind == "MP3" and last - first < header.frames and not isinstance(source, io.BytesIO):
        size = 300 * header.rate  # a long mp3 cannot be opened for each cut: pieces of five minutes are kept
        pieces = [_mp3_piece(source, stamp(source), n * size, size) for n in range(first // size, -(-last // size))]
        return np.concatenate(pieces)[first - first // size * size :][: last - first]
    with open_audio(source) as file:
        if first:
            file.seek(first)
        return file.read(last - first, dtype="float32", always_2d=True).mean(1)


@lru_cache(maxsize=6)
def _mp3_piece(path, stamp, first, size):
    """So many frames of an mp3, mixed down. It is opened anew for each piece: what a decoder that stays open makes of a
    cut depends, in the last bit, on the cut before."""
    with open_audio(path) as file:
        file.seek(first)
        return file.read(size, dtype="float32", always_2d=True).mean(1)


def write_audio(path, wav, sample_rate):
    """Write wav (N,) as a 16-bit mono WAV file, under a temporary name until it is whole."""
    samples = (wav.detach().cpu().flatten().clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
    with whole(path) as raw, wave.open(raw, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.astype("<i2").tobytes())


# -----------------------------------------------------------------------------
# the contract


class Codec(nn.Module):
    """What all codecs share. Each has a `name`, `sample_rate`, `frame_rate`, `samples_per_frame`, `n_codebooks`,
    `codebook_size`, and

        encode(wav (B, N), lengths=None) -> codes (B, K, T) int64
        decode(codes (B, K, T)) -> wav (B, T * samples_per_frame)

    wav is float32 in [-1, 1] and T = frames(N). `lengths` (B,) says how many samples of each row are its own: the first
    frames(length) codes of a row are what it would get alone. A codec that must be fitted says in `fitted` whether it
    is, and has fit(wavs, seed). One that `streams` has decode_stream(pieces of codes), which yields pieces of wav. Some
    have reference(wav (B, N)) -> (B, T * r, M), features of a recording off which a model reads its voice, r rows a
    frame. Where its codebooks are `residual`, the first of them are by themselves a coarser code. `options` are the
    arguments it was made with, its state dict holds its tables."""

    name, fitted, streams, residual = None, True, False, True

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def frames(self, n_samples):
        """How many frames so many samples are encoded to; the last may be part silence."""
        return -(-n_samples // self.samples_per_frame)

    def pack(self):
        """Everything needed to rebuild the codec with `load_codec(name, pack)`, as a plain dict."""
        tables = {name: table.detach().cpu().clone() for name, table in self.state_dict().items()}
        return {"name": self.name, "options": dict(self.options), "tables": tables}

    @classmethod
    def unpack(cls, pack, where):
        """The codec of a `pack()`. `where` it is from names it in the ValueError raised where it holds other tables, or
        numbers in them that are not finite."""
        need(pack, {"tables": dict}, where)
        codec = cls.made(where, pack["options"])
        need_tensors(pack["tables"], codec.state_dict(), f"{where}, tables of {cls.name}")
        codec.load_state_dict(pack["tables"])
        codec.fitted = True
        return codec

    @classmethod
    def made(cls, where, options):
        """The codec with these options, which `where` has. Raises ValueError for some that cannot be."""
        try:
            return cls(**options)
        except UNBUILT as error:
            raise ValueError(f"{where}: no codec {cls.name} has its options ({reason(error)})") from None

    def fingerprint(self):
        """16 hex digits that change when the name, an option, or any number in the tables does."""
        return self.digest(self.state_dict())

    def digest(self, tables):
        digest = hashlib.sha256(json.dumps([self.name, self.options], sort_keys=True).encode())
        for name, table in sorted(tables.items()):
            digest.update(f"{name}{tuple(table.shape)}{table.dtype}".encode())
            digest.update(table.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def save(self, folder):
        """Write folder/codec.pt, from which `load_codec(name, folder)` reads."""
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "codec.pt")
        torch.save(self.pack(), packed := io.BytesIO())  # not to the file: of a full disk torch.save makes no OSError
        with whole(path) as file:
            file.write(packed.getvalue())


def need_waves(wav):
    if wav.ndim != 2 or not wav.numel():
        raise ValueError(f"encode takes waveforms of shape (B, N), none of them empty, not {tuple(wav.shape)}")


# -----------------------------------------------------------------------------
# mel: patches of mel spectrogram, residual k-means, Griffin-Lim


def mel_filters(n_mels, n_fft, sample_rate, highest=None, area=False):
    """Triangular filters evenly spaced on the mel scale, up to `highest` Hz or half the sample rate:
    (n_fft // 2 + 1, n_mels), each of peak 1, or of area 1 Hz."""
    top = 2595 * math.log10(1 + (highest or sample_rate / 2) / 700)
    kind = {"dtype": torch.float64, "device": "cpu"}  # there also where a model takes shape on the meta device
    edges = 700 * (10 ** (torch.linspace(0, top, n_mels + 2, **kind) / 2595) - 1)
    hz = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, **kind)[:, None]
    rise = (hz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - hz) / (edges[2:] - edges[1:-1])
    filters = torch.minimum(rise, fall).clamp(min=0)
    return (filters * 2 / (edges[2:] - edges[:-2]) if area else filters).float()


def squares(x, codebook):
    """Squared distances of vectors (n, D) from the entries of a codebook (V, D): (n, V)."""
    return x.square().sum(1, keepdim=True) - 2 * x @ codebook.T + codebook.square().sum(1)


def quantise(x, codebooks, lengths=None):
    """Vectors (n, D) -> codes (n, K): each of the codebooks (K, V, D) codes what those before it left over (residual
    vector quantisation, as in SoundStream, Zeghidour et al. 2021). `lengths` (K, V): those of the entries, squared."""
    lengths, codes = codebooks.square().sum(2) if lengths is None else lengths, []
    for codebook, length in zip(codebooks, lengths, strict=True):
        codes.append(torch.addmm(length, x, codebook.T, alpha=-2).argmin(1))  # x's own length is the same for all
        x = x - codebook[codes[-1]]
    return torch.stack(codes, 1)


def dequantise(codes, codebooks):
    """Codes (..., K) -> vectors (..., D). There may be more codebooks than codes."""
    return sum(codebook[index] for codebook, index in zip(codebooks, codes.unbind(-1), strict=False))


def kmeans(x, size, generator, rounds=20):
    """Lloyd's algorithm from a random start: x (n, D) -> codebook (size, D). An entry that loses all its vectors goes
    to one drawn at random. Where vectors are drawn, a little noise keeps any two entries apart."""

    def draw(n):
        picked = x[torch.randperm(len(x), generator=generator)[:n] if n <= len(x)
                   else torch.randint(len(x), (n,), generator=generator)]  # fmt: skip
        return picked + 1e-3 * x.std() * torch.randn(picked.shape, generator=generator)

    codebook = draw(size)
    for _ in range(rounds):
        index = squares(x, codebook).argmin(1)
        count = torch.bincount(index, minlength=size)
        codebook = torch.zeros_like(codebook).index_add_(0, index, x) / count.clamp(min=1)[:, None]
        codebook[count == 0] = draw(int((count == 0).sum()))
    return codebook


class Mel(Codec):
    """A codec without network weights, fitted in seconds on the data that it will code.

    analysis    magnitude spectra, M mel bands, cube root (about how loudness grows, so that loud and quiet recordings
                are coded alike); a frame is a patch of S spectra; PCA turns it into D numbers, largest variance first
    codebooks   codebook 0 holds k-means centroids of these vectors, each further codebook the centroids of what those
                before it left over
    synthesis   the centroids of a frame add up; a linear map from a frame and its two neighbours to the patch undoes
                the PCA and smooths what quantisation roughened; then magnitudes that explain the mel bands, and phases
                that agree with each other (fast Griffin-Lim: Perraudin, Balazs and Soendergaard 2013)"""

    name = "mel"

    def __init__(self, n_codebooks=8, codebook_size=256, sample_rate=16000, frame_rate=12.5, n_mels=80, dims=64):
        super().__init__(n_codebooks=n_codebooks, codebook_size=codebook_size, sample_rate=sample_rate,
                         frame_rate=float(frame_rate), n_mels=n_mels, dims=dims)  # fmt: skip
        for key, value in self.options.items():
            number = isinstance(value, (int, float) if key == "frame_rate" else int)
            if not number or not 1 <= value <= {"frame_rate": 200, "codebook_size": 65536}.get(key, math.inf):
                raise ValueError(f"the mel codec cannot have {key} = {value!r}")
        self.n_codebooks, self.codebook_size, self.sample_rate = n_codebooks, codebook_size, sample_rate
        self.steps, self.hop = self.divide(sample_rate / frame_rate, sample_rate / 100)
        self.samples_per_frame = self.steps * self.hop
        self.frame_rate = sample_rate / self.samples_per_frame
        self.n_fft = 4 * self.hop
        self.fitted = False
        patch = self.steps * n_mels
        dims = min(dims, patch)
        self.register_buffer("mean", torch.zeros(patch))
        self.register_buffer("analysis", torch.zeros(patch, dims))
        self.register_buffer("codebooks", torch.zeros(n_codebooks, codebook_size, dims))
        self.register_buffer("synthesis", torch.zeros(patch, dims, 3))
        self.register_buffer("filters", mel_filters(n_mels, self.n_fft, sample_rate), persistent=False)
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)

    @staticmethod
    def divide(frame, hop):
        """(steps, samples in a step): near `hop` samples in a step, and all steps together, nearer yet, `frame`."""

        def misfit(steps):
            size = max(1, round(frame / steps))
            return abs(math.log(size / hop)) + 200 * abs(math.log(size * steps / frame))

        steps = min(range(1, 2 + round(2 * frame / hop)), key=misfit)
        return steps, max(1, round(frame / steps))

    def spectra(self, wav):
        """wav (B, (n + 3) * hop) -> complex spectra (B, n, n_fft // 2 + 1); the middle n * hop samples are theirs."""
        return torch.fft.rfft(wav.unfold(-1, self.n_fft, self.hop) * self.window.to(wav))

    def bands(self, wav, lengths=None, limit=512):
        """wav (B, N) -> mel bands (B, t * S, M) in float64, for stretches of at most about `limit` frames in turn.
        Samples past `lengths` count as silence."""
        n, size, edge = self.frames(wav.shape[1]), self.samples_per_frame, 3 * self.hop
        ends = torch.as_tensor([wav.shape[1]] if lengths is None else lengths, device=wav.device)[:, None]
        stretch = max(1, limit // len(wav))
        for first in range(0, n, stretch):
            start, end = first * size - edge // 2, min(first + stretch, n) * size + edge - edge // 2
            own = wav[:, max(0, start) : end].double()
            own *= torch.arange(max(0, start), max(0, start) + own.shape[1], device=wav.device) < ends
            left = max(0, -start)
            spectra = self.spectra(nn.functional.pad(own, (left, end - start - left - own.shape[1])))
            yield (spectra.abs() @ self.filters.double()).pow(1 / 3)

    def reference(self, wav):
        """The mel bands of wav (B, N): (B, T * S, M) float32."""
        return torch.cat(list(self.bands(wav)), 1).float()

    @torch.no_grad()
    def fit(self, wavs, seed=0):
        """Fit the tables on recordings, 1-D tensors at the codec's sample rate: 16384 patches drawn at random from all
        of them, more where codebooks are large. A patch may begin at any step, so that few recordings go a long way.
        Takes seconds, and about 30 kB for each second of audio. The same recordings and seed give the same tables.
        Raises ValueError where there are none."""
        generator, device = torch.Generator().manual_seed(seed), self.mean.device
        self.cpu()  # a GPU adds up in any order, and the tables would differ from run to run
        bands, starts, total, steps = [], [], 0, self.steps
        for wav in wavs:
            x = torch.cat([b[0].float() for b in self.bands(wav[None].cpu())])
            bands += [x[:1].expand(steps, -1), x, x[-1:].expand(steps, -1)]
            starts.append(torch.arange(total, total + len(x) - steps + 1))
            total += len(x) + 2 * steps
        if not bands:
            raise ValueError("the mel codec was given no recordings to be fitted on")
        starts = torch.cat(starts)
        starts = starts[torch.randperm(len(starts), generator=generator)[: max(16384, 32 * self.codebook_size)]]
        x = torch.cat(bands).unfold(0, 3 * steps, 1)[starts]  # (n, M, 3 S): patches with their neighbours
        x = x.transpose(1, 2).reshape(len(x), 3, -1)  # (n, 3, P)
        self.mean.copy_(x.mean((0, 1)))
        x -= self.mean

        patch = x[:, 1]
        components = torch.linalg.eigh((patch.T @ patch).double()).eigenvectors.flip(1)
        self.analysis.copy_(components[:, : self.analysis.shape[1]])
        rest = patch @ self.analysis
        for codebook in self.codebooks:
            codebook.copy_(kmeans(rest, self.codebook_size, generator))
            rest = rest - codebook[squares(rest, codebook).argmin(1)]

        # Ridge regression of patches on quantised patches and their neighbours, drawn towards undoing the PCA.
        near = dequantise(quantise((x @ self.analysis).flatten(0, 1), self.codebooks), self.codebooks)
        near = near.view(len(x), -1).double()  # (n, 3 D)
        undo = self.analysis.T.double()
        undo = torch.cat([0 * undo, undo, 0 * undo])  # (3 D, P)
        gram = near.T @ near
        ridge = (1e-2 * gram.diagonal().mean() + 1e-9) * torch.eye(len(gram))
        undo += torch.linalg.solve(gram + ridge, near.T @ (patch - near @ undo))
        self.synthesis.copy_(undo.view(3, -1, len(self.mean)).permute(2, 1, 0))
        self.fitted = True
        self.to(device)
        return self

    @torch.no_grad()
    def encode(self, wav, lengths=None):
        self.need_tables()
        need_waves(wav)
        codes = []
        for bands in self.bands(wav, lengths):
            patches = bands.reshape(len(wav), -1, len(self.mean))  # (B, t, P)
            x = (patches - self.mean) @ self.analysis.double()
            codes.append(quantise(x.flatten(0, 1), self.codebooks.to(x)).unflatten(0, x.shape[:2]))
        return torch.cat(codes, 1).transpose(1, 2)

    @torch.no_grad()
    def decode(self, codes):
        self.need_tables()
        x = dequantise(codes.transpose(1, 2), self.codebooks).transpose(1, 2)  # (B, D, T)
        patches = nn.functional.conv1d(nn.functional.pad(x, (1, 1), mode="replicate"), self.synthesis).transpose(1, 2)
        bands = (patches + self.mean).clamp(min=0.01).pow(3)
        x = magnitudes(bands.reshape(len(codes), -1, self.filters.shape[1]), self.filters)
        return griffin_lim(x, self.window, 3 * self.hop // 2)

    def need_tables(self):
        if not self.fitted:
            raise ValueError("the mel codec has no tables yet: fit it on recordings, or load it with a path")


def magnitudes(bands, filters, rounds=30):
    """Mel bands (B, n, M) -> magnitudes (B, n, F) that explain them: multiplicative updates keep these positive."""
    x = bands @ (filters / filters.sum(0).clamp(min=1e-9)).T + 1e-9
    for _ in range(rounds):
        x = x * (bands @ filters.T) / (x @ filters @ filters.T + 1e-9)
    return x


def griffin_lim(magnitudes, window, edge, rounds=32, momentum=0.99):
    """Magnitudes (B, n, F) of spectra a quarter of the window apart -> wav (B, n * hop) that has about these, `edge`
    samples after the start of the first window."""
    n, f, hop = *magnitudes.shape[1:], len(window) // 4

    def overlap_add(x):  # (B, n, 4 * hop) -> (B, (n + 3) * hop)
        out = x.new_zeros(len(x), n + 3, hop)
        for i, quarter in enumerate((x * window).unflatten(2, (4, hop)).unbind(2)):
            out[:, i : i + n] += quarter
        return out.flatten(1)

    weight = overlap_add(window.expand(1, n, -1)).clamp(min=1e-3)
    phase = 2 * math.pi * torch.rand(n, f, generator=torch.Generator().manual_seed(0)).to(magnitudes)
    phase, before = torch.polar(torch.ones_like(phase), phase), 0
    for _ in range(rounds):
        wav = overlap_add(torch.fft.irfft(magnitudes * phase, n=4 * hop)) / weight
        spectra = torch.fft.rfft(wav.unfold(-1, 4 * hop, hop) * window)
        phase = spectra - momentum / (1 + momentum) * before
        phase, before = phase / phase.abs().clamp(min=1e-9), spectra
    wav = overlap_add(torch.fft.irfft(magnitudes * phase, n=4 * hop)) / weight
    return wav[:, edge : edge + n * hop].clamp(-1, 1)


# -----------------------------------------------------------------------------
# layers of the published codecs


class Flow:
    """What goes through a network beside the signal: `memory`, what each layer keeps of it for the piece that follows,
    `lengths` (B,), where each row ends at the layer that is reached (None: where the tensor does), and `voice`."""

    def __init__(self, voice=None):
        self.memory, self.lengths, self.voice = {}, None, voice


def pad(x, left, right, edge, lengths=None):
    """x (B, C, L) -> (B, C, left + L + right). edge: "constant" (zeros), "replicate", or "reflect", which appends zeros
    to a row as short as what is to be mirrored. `lengths` (B,): the padding on the right begins where a row ends."""
    n, most = x.shape[2], max(left, right)
    if lengths is None:
        if edge == "reflect" and n <= most:
            x = nn.functional.pad(x, (0, most + 1 - n))
        return nn.functional.pad(x, (left, right), edge)[..., : left + n + right]
    ends, at = lengths[:, None], torch.arange(-left, n + right, device=x.device)[None]
    if edge == "constant":
        return nn.functional.pad(x * (at[:, left : left + n] < ends)[:, None], (left, right))
    if edge == "replicate":
        at = at.clamp(min=0).minimum(ends - 1)
    else:
        last = ends.clamp(min=most + 1) - 1
        at = last - (last - at.abs()).abs()
    own = (at >= 0) & (at < ends)
    return x.gather(2, at.clamp(0, n - 1)[:, None].expand(-1, x.shape[1], -1)) * own[:, None]


class Conv(nn.Conv1d):
    """L steps -> ceil(L / stride). It pads both sides alike; a causal one pads the left, and the right only where the
    signal ends within a stride: every piece but the last must be a multiple of it."""

    def __init__(self, c_in, c_out, kernel, stride=1, dilation=1, bias=True, causal=False, edge="constant"):
        self.causal, self.edge, self.reach = causal, edge, (kernel - 1) * dilation + 1 - stride
        zeros = 0 if causal or edge != "constant" else (self.reach + 1) // 2  # which torch adds without a copy
        super().__init__(c_in, c_out, kernel, stride, zeros, dilation, bias=bias)

    def forward(self, x, flow):
        n, stride, lengths = x.shape[2], self.stride[0], flow.lengths
        left, right = (self.reach, -n % stride) if self.causal else [(self.reach + 1) // 2 - self.padding[0]] * 2
        before = flow.memory.get(self)
        if before is None and self.causal and self.edge == "constant":
            before = x.new_zeros(*x.shape[:2], left)
        if before is not None and self.reach:
            x, left, lengths = torch.cat([before, x], 2), 0, None if lengths is None else lengths + self.reach
        if self.reach and (left or right or lengths is not None):
            x = pad(x, left, right, self.edge, lengths)
        if self.reach and self.causal:
            flow.memory[self] = x[..., n : n + self.reach].clone()
        if lengths is not None:
            flow.lengths = -(-flow.lengths // stride)
        if self.causal and self.dilation == (1,) and len(x) * n <= 128 * stride:
            return product(x.unfold(2, *self.kernel_size, stride).transpose(1, 2).flatten(2), self.weight, self.bias)
        return super().forward(x)


def product(x, weight, bias):
    """x (B, L, n) times weight (C, ...) of n numbers for each C -> (B, C, L). For few steps torch's convolutions spend
    most of their time on putting the weights into another order."""
    return nn.functional.linear(x, weight.flatten(1), bias).transpose(1, 2).contiguous()


class Transposed(nn.ConvTranspose1d):
    """L steps -> L * stride, with a kernel of two strides. A causal one looks at no step to come."""

    def __init__(self, c_in, c_out, stride, groups=1, bias=True, causal=False, rest=0):
        trim = {} if causal else {"padding": (stride + 1) // 2, "output_padding": rest}
        super().__init__(c_in, c_out, 2 * stride, stride, groups=groups, bias=bias, **trim)
        self.causal = causal

    def forward(self, x, flow):
        if not self.causal:
            return super().forward(x)
        n, stride = x.shape[2], *self.stride
        if self.groups > 1:
            before = flow.memory.get(self, x[..., :0])
            flow.memory[self] = x[..., -1:].clone()
            x = super().forward(torch.cat([before, x], 2))
            return x[..., before.shape[2] * stride :][..., : n * stride]
        # a product, and what it says of the step itself and of the next, added up: faster than torch's own way
        bias = nn.functional.pad(self.bias[:, None].expand(-1, stride), (0, stride)).flatten()
        x = nn.functional.linear(x.transpose(1, 2), self.weight.flatten(1).T, bias)
        own, after = x.unflatten(2, (-1, 2, stride)).permute(3, 0, 2, 1, 4)  # (B, C, L, stride)
        out = torch.empty_like(own, memory_format=torch.contiguous_format)
        torch.add(own[:, :, 1:], after[:, :, :-1], out=out[:, :, 1:])
        torch.add(own[:, :, 0], flow.memory.get(self, 0), out=out[:, :, 0])
        flow.memory[self] = after[:, :, -1].clone()
        return out.flatten(2)


class Snake(nn.Module):
    """x + sin(a x)^2 / a, a learnt for each channel (Ziyin, Hartwig and Ueda 2020)."""

    def __init__(self, c):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, c, 1))

    def forward(self, x, flow=None):
        wave = (self.alpha * x).sin_().square_()
        return torch.addcmul(x, wave, 1 / (self.alpha + 1e-9), out=wave)


class HalfSnake(Snake):
    """Snake for the first half of the channels, leaky ReLU for the others."""

    def __init__(self, c):
        super().__init__(c // 2)

    def forward(self, x, flow=None):
        half = self.alpha.shape[1]
        return torch.cat([super().forward(x[:, :half]), nn.functional.leaky_relu(x[:, half:])], 1)


class Chain(nn.Sequential):
    """Layers in a row: those of this file are called with the flow, torch's own without."""

    def forward(self, x, flow):
        for layer in self:
            x = layer(x) if type(layer).__module__.startswith("torch.") else layer(x, flow)
        return x


class Residual(Chain):
    """A chain whose answer is added to what it was asked."""

    def forward(self, x, flow):
        return super().forward(x, flow).add_(x)


class Sum(nn.ModuleList):
    """Layers side by side, all asked the same: their answers added up, times `share`."""

    def __init__(self, layers, share=1):
        super().__init__(layers)
        self.share = share

    def forward(self, x, flow):
        first, *others = self
        y = first(x, flow)
        for layer in others:
            y.add_(layer(x, flow))
        return y if self.share == 1 else y.mul_(self.share)


class LSTM(nn.LSTM):
    """Two layers, and what goes into them added to what comes out."""

    def __init__(self, c):
        super().__init__(c, c, num_layers=2)

    def forward(self, x, flow):
        x = x.permute(2, 0, 1)
        y, flow.memory[self] = super().forward(x, flow.memory.get(self))
        return (x + y).permute(1, 2, 0)


class Layer(nn.Module):
    """A layer of Mimi's transformers: attention and feed-forward, each normed before and scaled after."""

    def __init__(self, width, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.in_proj, self.out_proj = (nn.Linear(width, n * width, bias=False) for n in (3, 1))
        self.linear1, self.linear2 = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), 0.01)) for _ in range(2))

    def forward(self, x, flow, turn, mask):
        q, k, v = self.in_proj(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = turn(q), turn(k)  # (B, heads, L, width / heads)
        if self in flow.memory:
            k, v = (torch.cat(pair, 2) for pair in zip(flow.memory[self], (k, v), strict=True))
        flow.memory[self] = k[:, :, 1 - self.window :], v[:, :, 1 - self.window :]
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.scale1 * self.out_proj(y.transpose(1, 2).flatten(2))
        return x + self.scale2 * self.linear2(nn.functional.gelu(self.linear1(self.norm2(x))))


class Transformer(nn.ModuleList):
    """Causal attention to the last `window` steps, rotary positions, heads of 64: (B, C, L) -> the same."""

    def __init__(self, width, layers, window):
        self.half = min(width, 64) // 2
        super().__init__(Layer(width, width // (2 * self.half), window) for _ in range(layers))
        self.window = window

    def forward(self, x, flow):
        n, seen = x.shape[2], flow.memory.get(self, 0)
        flow.memory[self] = seen + n
        at = torch.arange(max(0, seen - self.window + 1), seen + n, device=x.device)
        distance = at[-n:, None] - at
        mask = (distance >= 0) & (distance < self.window)
        angle = at[-n:, None] / 10000 ** (torch.arange(self.half, device=x.device) / self.half)
        cos, sin = angle.cos(), angle.sin()

        def turn(x):
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        x = x.transpose(1, 2)
        for layer in self:
            x = layer(x, flow, turn, mask)
        return x.transpose(1, 2)


class RVQ(nn.Module):
    """K codebooks of V vectors (D,) for a signal (B, C, T), which is projected to D channels where C differs."""

    def __init__(self, n_codebooks, codebook_size, dims, width):
        super().__init__()
        self.register_buffer("codebooks", torch.zeros(n_codebooks, codebook_size, dims))
        self.register_buffer("lengths", self.codebooks.sum(2), persistent=False)  # of the entries, squared
        self.register_load_state_dict_post_hook(RVQ.measure)
        self.input_proj, self.output_proj = nn.Identity(), nn.Identity()
        if width != dims:
            self.input_proj = nn.Conv1d(width, dims, 1, bias=False)
            self.output_proj = nn.Conv1d(dims, width, 1, bias=False)

    def measure(self, _=None):
        self.lengths = self.codebooks.square().sum(2)

    def encode(self, x):
        """x (B, C, T) -> codes (B, K, T)."""
        x = self.input_proj(x).transpose(1, 2)
        codes = quantise(x.flatten(0, 1), self.codebooks, self.lengths)
        return codes.unflatten(0, x.shape[:2]).transpose(1, 2)

    def decode(self, codes):
        """Codes (B, K, T) -> x (B, C, T)."""
        return self.output_proj(dequantise(codes.transpose(1, 2), self.codebooks).transpose(1, 2))


# -----------------------------------------------------------------------------
# weights


def read_safetensors(path):
    """{name: tensor} of a safetensors file, mapped into memory."""
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
             "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
    data, tensors = np.memmap(path, np.uint8, "c"), {}
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    for name, entry in json.loads(data[8:start].tobytes()).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            tensor = torch.from_numpy(data[start + first : start + last])
            tensors[name] = tensor.view(types[entry["dtype"]]).view(entry["shape"])
    return tensors


def from_nemo(path):
    """The pickle in a NeMo archive, in memory: nothing is unpacked, so no name in it can lead anywhere."""
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and os.path.basename(member.name) == "model_weights.ckpt":
                return io.BytesIO(archive.extractfile(member).read())
    raise ValueError("no model_weights.ckpt in it")


def read_weights(path):
    """{name: tensor} of a file of weights. Of a pickle only tensors and plain containers are read, no code is run; the
    configuration objects in checkpoints of coqui-TTS are passed over. Raises ValueError."""
    try:
        if path.endswith(".safetensors"):
            return read_safetensors(path)
        weights = unpickle(from_nemo(path) if path.endswith(".nemo") else path, inert="TTS.")
        if isinstance(weights, torch.Tensor):
            return {os.path.basename(path).removesuffix(".pth"): weights}
        weights = weights.get("state_dict", weights.get("model", weights))
        return {name: x for name, x in weights.items() if isinstance(name, str) and isinstance(x, torch.Tensor)}
    except Exception as error:  # readers fail in many ways on files of other kinds
        raise ValueError(f"{path}: not readable as weights ({reason(error)})") from error


def tidy(weights):
    """Weights in float32, and weight normalisation in the older of its two spellings."""
    pattern = re.compile(r"parametrizations\.weight\.original([01])")
    return {pattern.sub(lambda m: f"weight_{'gv'[int(m[1])]}", name): x.float() if x.is_floating_point() else x
            for name, x in weights.items()}  # fmt: skip


def rename(weights, *names):
    """Weights under our names: for each (pattern, replacement) in turn, what matches is replaced; replacement None: the
    weights that match are not needed."""
    renamed = {}
    for name, weight in weights.items():
        for pattern, to in names:
            if to is not None:
                name = re.sub(pattern, to, name)
            elif re.search(pattern, name):
                break
        else:
            renamed[name] = weight
    return renamed


def fold(weights):
    """Directions v and magnitudes g (weight normalisation, Salimans and Kingma 2016) made one weight, v * g / ||v||."""
    folded = {name: x for name, x in weights.items() if not name.endswith(("weight_g", "weight_v"))}
    for name, v in weights.items():
        if name.endswith("weight_v"):
            folded[name[:-2]] = torch._weight_norm(v, weights[f"{name[:-1]}g"], 0)
    return folded


def need_sound(weights):
    """Raise ValueError, which begins with its name, for a tensor that is no plain one of finite numbers."""
    for name, tensor in weights.items():
        if words := fault(tensor):
            raise ValueError(f"{name} {words}")


def strides(weights, prefix):
    """The strides of the convolutions below a prefix, in order: their kernels are two strides, all others are odd."""
    kernels = {name: x.shape[2] for name, x in weights.items() if name.startswith(prefix) and x.ndim == 3}
    even = [name for name, kernel in kernels.items() if kernel % 2 == 0]
    return [kernels[name] // 2 for name in sorted(even, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])]


def hub_folders(repository):
    """Where the hub's cache folder has a repository, newest first."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    snapshots = glob(os.path.join(escape(cache), f"models--{repository.replace('/', '--')}", "snapshots", "*"))
    return sorted(snapshots, key=os.path.getmtime, reverse=True)


# -----------------------------------------------------------------------------
# what the published codecs share


UNKNOWN = "unknown"  # the fingerprint of weights that have not been seen yet


class Network(Codec):
    """A codec with published weights. It says how a piece of a waveform becomes codes and a piece of codes a waveform,

        analyse(wav (B, N), flow) -> codes (B, K, T or more)          synthesise(codes (B, K, T), flow) -> wav (B, N)

    and here long files become pieces. A half that is causal carries on from piece to piece; another is given
    `encoder_context` or `decoder_context` frames to both sides, and what these become is dropped.

    files: what its weights may be called, best first, as patterns that must all be there. convert(raw, n_codebooks):
    published tensors by name -> (state dict, what their shapes say of the codec's options)."""

    download, files = "", ("model*.safetensors",)
    encoder_context, decoder_context = 0, 0
    at_once = 10  # seconds of audio in a piece on a CPU; small blocks of memory are used again, large ones made anew
    lookahead = 1  # frames that a stream begins with

    def __init__(self, options, sample_rate, samples_per_frame, n_codebooks, codebook_size):
        super().__init__(**{key: value for key, value in options.items() if key not in ("self", "__class__")})
        self.sample_rate, self.samples_per_frame = sample_rate, samples_per_frame
        self.frame_rate = sample_rate / samples_per_frame
        self.n_codebooks, self.codebook_size = n_codebooks, codebook_size
        self.path = self.mark = ""  # where the weights are from, and their fingerprint

    @property
    def streams(self):
        return self.decoder_context == 0

    def pieces(self, n, x, context):
        """Spans of n frames to work on one by one, for a batch x: (start, end, first, last), where the frames first ..
        last are asked for, and start .. end needed for that."""
        seconds = self.at_once * (1 if x.device.type == "cpu" else 16) / len(x)
        step = max(self.lookahead, int(seconds * self.frame_rate))
        for first in range(0, n, step):
            last = min(first + step, n)
            yield max(0, first - context), min(n, last + context), first, last

    @torch.no_grad()
    def encode(self, wav, lengths=None):
        need_waves(wav)
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=wav.device)
            lengths = None if bool((lengths == wav.shape[1]).all()) else lengths
        flow, codes, size = Flow(), [], self.samples_per_frame
        for start, end, first, last in self.pieces(self.frames(wav.shape[1]), wav, self.encoder_context):
            piece = wav[:, start * size : end * size]
            if lengths is not None:
                flow.lengths = (lengths - start * size).clamp(1, piece.shape[1])
                piece = piece * (torch.arange(piece.shape[1], device=wav.device) < flow.lengths[:, None])
            codes.append(self.analyse(piece, flow)[..., first - start : last - start])
        return torch.cat(codes, 2)

    @torch.no_grad()
    def decode(self, codes):
        self.need_codes(codes)
        flow, size = Flow(), self.samples_per_frame
        wav = torch.empty(len(codes), codes.shape[2] * size, device=codes.device)
        for start, end, first, last in self.pieces(codes.shape[2], codes, self.decoder_context):
            piece = self.synthesise(codes[..., start:end], flow)
            wav[:, first * size : last * size] = piece[:, (first - start) * size : (last - start) * size]
        return wav

    @torch.no_grad()
    def encode_stream(self, wavs):
        """Pieces of a waveform (B, n), of any length, as they come -> pieces of codes (B, K, t), as soon as a frame is
        whole; the last, which may be part silence, when there are no more. Together what `encode` gives."""
        flow = Flow()
        for wav in regroup(wavs, self.samples_per_frame, self.lookahead):
            yield self.analyse(wav, flow)

    @torch.no_grad()
    def decode_stream(self, codes):
        """Pieces of codes (B, K, t) as they come -> pieces of waveform (B, n). Together what `decode` gives."""
        flow = Flow()
        for piece in regroup(codes, 1, self.lookahead):
            self.need_codes(piece)
            yield self.synthesise(piece, flow)

    def whole(self, wav, flow):
        """wav (B, N) with silence after it, up to the end of its last frame."""
        if flow.lengths is not None:
            flow.lengths = -(-flow.lengths // self.samples_per_frame) * self.samples_per_frame
        return nn.functional.pad(wav, (0, -wav.shape[1] % self.samples_per_frame))

    def need_codes(self, codes):
        if codes.ndim != 3 or not codes.numel() or codes.shape[1] > self.n_codebooks:
            raise ValueError(f"decode takes codes of shape (B, {self.n_codebooks}, T), not {tuple(codes.shape)}")
        low, high = codes.min(), codes.max()
        if not 0 <= low <= high < self.codebook_size:
            raise ValueError(f"decode takes codes from 0 to {self.codebook_size - 1}, not from {low} to {high}")

    @classmethod
    def source(cls, **options):
        """What to ask the hub for, repository first."""
        return cls.download

    @classmethod
    def find(cls, path, source):
        """The files of the weights: `path` itself, or in that folder, or (None) in the hub's cache folder."""
        if path is not None and os.path.isfile(path):
            return [os.fspath(path)]
        folders = hub_folders(source.split()[0]) if path is None else [os.fspath(path)]
        missing = cls.files[-1].split()[0]
        for folder in folders:
            for patterns in cls.files:
                found = {name: sorted(glob(os.path.join(escape(folder), name))) for name in patterns.split()}
                if all(found.values()):
                    return sum(found.values(), [])
                missing = min(found, key=lambda name: len(found[name]))
        place = "the hub's cache folder" if path is None else path
        raise FileNotFoundError(f"{place}: no {missing} of the codec {cls.name}; `hf download {source}` fetches it")

    @classmethod
    def load(cls, path=None, **options):
        """The codec with the weights at `path` (see find). Raises FileNotFoundError or ValueError, one line."""
        files = cls.find(path, cls.source(**options))
        where = files[0] if len(files) == 1 else os.path.dirname(files[0])
        raw = {name: weight for file in files for name, weight in read_weights(file).items()}
        try:
            weights, sizes = cls.convert(tidy(raw), options.get("n_codebooks"))
            need_sound(weights)
            folded = fold(weights)
            need_sound(folded)
        except KeyError as error:
            raise ValueError(f"{where}: not the weights of {cls.name}, they lack {error.args[0]}") from None
        except UNBUILT as error:  # tensors of other shapes
            raise ValueError(f"{where}: not the weights of {cls.name} ({reason(error)})") from None
        for key in sizes.keys() & options.keys():
            if sizes[key] != options[key]:
                raise ValueError(f"{where}: has {key} = {sizes[key]}, not {options[key]}")
        with torch.device("meta"):  # no memory for numbers that give way at once; files stay shared between processes
            codec = cls.made(where, {**sizes, **options})
        for name, own in codec.state_dict().items():
            if name in folded and folded[name].is_floating_point() != own.is_floating_point():
                raise ValueError(f"{where}: {name} is {folded[name].dtype}, not {own.dtype}")
        codec.path, codec.mark = os.path.abspath(where), codec.digest(weights)  # not folded: that may round either way
        try:
            missing, unknown = codec.load_state_dict(folded, strict=False, assign=True)
        except RuntimeError as error:
            says = " ".join(str(error).splitlines()[1:2]).strip()
            raise ValueError(f"{where}: not weights of the sizes of {cls.name}, {says}") from None
        if missing or unknown:
            says = f"lack {missing[0]}" if missing else f"have {unknown[0]}, which it has not"
            raise ValueError(f"{where}: not the weights of {cls.name}, they {says}")
        return codec.eval().requires_grad_(False)

    @classmethod
    def unseen(cls, **options):
        """The codec without its weights, for its sizes and for codes that somebody else has made."""
        with torch.device("meta"):
            codec = cls(**options)
        codec.options, codec.mark = options, UNKNOWN
        return codec

    def fingerprint(self):
        return self.mark or super().fingerprint()

    def pack(self):
        """Where the weights are and how to know them again, as a plain dict: they stay where they were found."""
        known = {"weights": self.path, "fingerprint": self.fingerprint()}
        return {"name": self.name, "options": dict(self.options), **known}

    @classmethod
    def unpack(cls, pack, where):
        """The codec of a `pack()`: its weights where they were, or else in the hub's cache folder. A pack made without
        them, of codes from elsewhere, takes those that are there."""
        need(pack, {"weights": str, "fingerprint": str}, where)
        try:
            codec = cls.load(pack["weights"] if os.path.exists(pack["weights"]) else None, **pack["options"])
        except FileNotFoundError as error:
            gone = f"{pack['weights']} is gone, and in " if pack["weights"] else ""
            raise FileNotFoundError(f"{where}: {gone}{error}") from None
        if pack["fingerprint"] not in (UNKNOWN, codec.fingerprint()):
            raise ValueError(f"{codec.path}: not the weights that the codes of {where} were made with")
        return codec


def regroup(pieces, unit, least):
    """Pieces cut anew along their last axis: whole units, at first at least so many, and at last what is left."""
    held = None
    for piece in pieces:
        held = piece if held is None else torch.cat([held, piece], -1)
        if (whole := held.shape[-1] // unit * unit) >= least * unit:
            yield held[..., :whole]
            held, least = held[..., whole:], 1
    if held is not None and held.shape[-1]:
        yield held


def how_many(wanted, there, usual=None):
    """How many codebooks to use: the number wanted, the usual one, or all that are there."""
    if not there:
        raise LookupError("codebooks")
    n = min(usual or there, there) if wanted is None else wanted
    if not 1 <= n <= there:
        raise ValueError(f"n_codebooks = {n}, but the weights have {there}")
    return n


CONTAINERS = (r"\.(layers|model|conv|convtr|lstm|transformer|vq|net|quantizers)(?=\.)", "")  # modules around modules


# -----------------------------------------------------------------------------
# Mimi and EnCodec


def seanet(width, c, strides, last, conv, residual, middle=None):
    """The convolutions of SEANet (Tagliasacchi et al. 2020), an encoder and the decoder that mirrors it. Each stride is
    a stage that doubles the channels c; `middle` stands between the stages and the code."""
    elu = partial(nn.ELU, inplace=True)
    encoder, decoder = [conv(1, c, 7)], [elu(), conv(c, 1, last)]
    for stride in strides:
        encoder += [residual(c), elu(), conv(c, 2 * c, 2 * stride, stride)]
        decoder = [elu(), Transposed(2 * c, c, stride, causal=True), residual(c), *decoder]
        c *= 2
    encoder += [middle(c)] if middle else []
    decoder = [middle(c), *decoder] if middle else decoder
    return Chain(*encoder, elu(), conv(c, width, last)), Chain(conv(width, c, 7), *decoder)


class Mimi(Network):
    """Mimi (Moshi, Defossez et al. 2024): 24 kHz, 12.5 frames/s, up to 32 codebooks of 2048 entries, all causal.

    encoder      conv 1 -> 64; strides 4, 5, 6, 8: residual unit, ELU, conv that doubles the channels; ELU, conv -> 512
    transformer  8 layers at 25 steps/s; conv of stride 2
    codebooks    a semantic one, and 31 acoustic ones that code the same 512 numbers anew, each in 256 of its own
    decoder      all this mirrored"""

    name, download, at_once = "mimi", "kyutai/mimi model.safetensors", 4
    files = ("tokenizer-*.safetensors", "model*.safetensors")
    names = (
        (r"^codec_model\.", ""), CONTAINERS, (r"\.block(?=\.)", ""),
        (r"quantizer\.(semantic_residual_vector_quantizer|rvq_first)", "quantizer.0"),
        (r"quantizer\.(acoustic_residual_vector_quantizer|rvq_rest)", "quantizer.1"),
        (r"codebook\._?initialized", None),
        (r"_?codebook\.(embed|embedding)_sum", "sum"), (r"_?codebook\.cluster_usage", "usage"),
        (r"self_attn\.", ""), (r"\bo_proj", "out_proj"), (r"\b(in|out)_proj(s\.0\.|_)weight", r"\1_proj.weight"),
        (r"mlp\.fc", "linear"), (r"input_layernorm", "norm1"), (r"post_attention_layernorm", "norm2"),
        (r"(self_attn_layer_scale|layer_scale_1)\.scale", "scale1"),
        (r"(mlp_layer_scale|layer_scale_2)\.scale", "scale2"),
    )  # fmt: skip

    def __init__(self, n_codebooks=32, codebook_size=2048, dims=256, width=512, channels=64, strides=(4, 5, 6, 8),
                 layers=8, window=250):  # fmt: skip
        super().__init__(locals(), 24000, 2 * math.prod(strides), n_codebooks, codebook_size)
        conv = partial(Conv, causal=True)

        def residual(c):
            return Residual(nn.ELU(), conv(c, c // 2, 3), nn.ELU(inplace=True), conv(c // 2, c, 1))

        self.encoder, self.decoder = seanet(width, channels, strides, 3, conv, residual)
        self.encoder_transformer, self.decoder_transformer = (Transformer(width, layers, window) for _ in range(2))
        self.downsample = conv(width, width, 4, 2, bias=False, edge="replicate")
        self.upsample = Transposed(width, width, 2, groups=width, bias=False, causal=True)
        books = (1, n_codebooks - 1)[:n_codebooks]
        self.quantizer = nn.ModuleList(RVQ(n, codebook_size, dims, width) for n in books)

    def analyse(self, wav, flow):
        x = self.encoder_transformer(self.encoder(wav[:, None], flow), flow)
        x = self.downsample(x, flow)
        return torch.cat([quantizer.encode(x) for quantizer in self.quantizer], 1)

    def synthesise(self, codes, flow):
        parts = zip(self.quantizer, (codes[:, :1], codes[:, 1:]), strict=False)
        x = sum(quantizer.decode(part) for quantizer, part in parts if part.shape[1])
        x = self.decoder_transformer(self.upsample(x, flow), flow)
        return self.decoder(x, flow)[:, 0]

    @classmethod
    def convert(cls, raw, n_codebooks=None):
        """Of transformers' layout or moshi's; of CSM, which holds a Mimi as its codec_model, only that."""
        w = rename({name: x for name, x in raw.items() if name.startswith("codec_model.")} or raw, *cls.names)
        n = how_many(n_codebooks, sum(name.endswith("usage") for name in w))
        for i, k in enumerate((1, n - 1)[:n]):
            sums, usages = (torch.stack([w[f"quantizer.{i}.{j}.{x}"] for j in range(k)]) for x in ("sum", "usage"))
            w[f"quantizer.{i}.codebooks"] = sums / usages.clamp(min=1e-5)[..., None]
        w = rename(w, (r"quantizer\.\d\.\d", None), (r"quantizer\.1" if n == 1 else "^$", None))
        for name in [name for name in w if name.endswith("in_proj.weight")]:  # moshi turns pairs, transformers halves
            pairs = w[name].unflatten(0, (3, -1, 32, 2))
            w[name] = torch.cat([pairs[:2].transpose(2, 3).flatten(0, 3), pairs[2].flatten(0, 2)])
        for name in [name for name in w if name.endswith("q_proj.weight")]:
            qkv = [w.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
            w[name.replace("q_proj", "in_proj")] = torch.cat(qkv)
        _, size, dims = w["quantizer.0.codebooks"].shape
        return w, dict(
            n_codebooks=n, codebook_size=size, dims=dims, width=len(w["downsample.weight"]),
            channels=len(w["encoder.0.bias"]), strides=strides(w, "encoder."),
            layers=sum(bool(re.fullmatch(r"encoder_transformer\.\d+\.scale1", name)) for name in w),
        )  # fmt: skip


class EnCodec(Network):
    """EnCodec (Defossez et al. 2022): 24 kHz, 75 frames/s, up to 32 codebooks of 1024 entries, all causal.

    encoder    conv 1 -> 32; strides 2, 4, 5, 8: residual unit, ELU, conv that doubles the channels; LSTM, ELU,
               conv -> 128
    codebooks  of 128 numbers each; 8 of them are 6 kbit/s
    decoder    all this mirrored"""

    name, download, at_once = "encodec", "facebook/encodec_24khz model.safetensors", 3
    lookahead = 7  # the first frames are mirrored before the first
    names = (CONTAINERS, (r"\.block(?=\.)", ".0"), (r"\.shortcut(?=\.)", ".1"),
             (r"codebook\.(inited|cluster_size|embed_avg)", None), (r"_?codebook\.embed", "embed"))  # fmt: skip

    def __init__(self, n_codebooks=8, codebook_size=1024, width=128, channels=32, strides=(2, 4, 5, 8)):
        super().__init__(locals(), 24000, math.prod(strides), n_codebooks, codebook_size)
        conv = partial(Conv, causal=True, edge="reflect")

        def residual(c):
            near = Chain(nn.ELU(), conv(c, c // 2, 3), nn.ELU(inplace=True), conv(c // 2, c, 1))
            return Sum([near, conv(c, c, 1)])

        self.encoder, self.decoder = seanet(width, channels, strides, 7, conv, residual, middle=LSTM)
        self.quantizer = RVQ(n_codebooks, codebook_size, width, width)

    def analyse(self, wav, flow):
        return self.quantizer.encode(self.encoder(wav[:, None], flow))

    def synthesise(self, codes, flow):
        return self.decoder(self.quantizer.decode(codes), flow)[:, 0]

    @classmethod
    def convert(cls, raw, n_codebooks=None):
        """Of transformers' layout or the original."""
        w = rename(raw, *cls.names)
        n = how_many(n_codebooks, sum(name.endswith("embed") for name in w), usual=8)
        books = torch.stack([w[f"quantizer.{i}.embed"] for i in range(n)])
        w = {**rename(w, (r"quantizer\.\d", None)), "quantizer.codebooks": books}
        return w, dict(n_codebooks=n, codebook_size=books.shape[1], width=books.shape[2],
                       channels=len(w["encoder.0.bias"]), strides=strides(w, "encoder."))  # fmt: skip


# -----------------------------------------------------------------------------
# DAC


class Level(nn.Module):
    """A codebook of DAC: entries of few numbers, found by their angle, for what the levels before left of a signal."""

    def __init__(self, width, codebook_size, dims):
        super().__init__()
        self.in_proj, self.out_proj = nn.Conv1d(width, dims, 1), nn.Conv1d(dims, width, 1)
        self.codebook = nn.Embedding(codebook_size, dims)

    def encode(self, x):
        """x (B, C, T) -> codes (B, T)."""
        x = nn.functional.normalize(self.in_proj(x).transpose(1, 2), dim=2)
        entries = nn.functional.normalize(self.codebook.weight)
        return squares(x.flatten(0, 1), entries).argmin(1).view(x.shape[:2])

    def decode(self, codes):
        """Codes (B, T) -> x (B, C, T)."""
        return self.out_proj(self.codebook(codes).transpose(1, 2))


class DAC(Network):
    """DAC (Kumar et al. 2023): 44.1 kHz, 86 frames/s, 9 codebooks of 1024 entries; or 24 kHz, 75 frames/s, up to 32.

    encoder    conv 1 -> 64; strides 2, 4, 8, 8 (24 kHz: 2, 4, 5, 8): three residual units of dilations 1, 3, 9, snake,
               conv that doubles the channels; snake, conv
    codebooks  of 8 numbers each
    decoder    conv -> 1536; all this mirrored, half the channels at each stride; tanh"""

    name, at_once = "dac", 5
    encoder_context, decoder_context = 8, 10
    rates = {(512, 9): 44100, (320, 32): 24000, (320, 12): 16000}  # of the published, by frame and codebooks

    def __init__(self, sample_rate=44100, n_codebooks=9, codebook_size=1024, dims=8, channels=64, decoder_channels=1536,
                 strides=(2, 4, 8, 8)):  # fmt: skip
        super().__init__(locals(), sample_rate, math.prod(strides), n_codebooks, codebook_size)

        def units(c):
            return [Residual(Snake(c), Conv(c, c, 7, dilation=d), Snake(c), Conv(c, c, 1)) for d in (1, 3, 9)]

        encoder, c = [Conv(1, channels, 7)], channels
        for stride in strides:
            encoder.append(Chain(*units(c), Snake(c), Conv(c, 2 * c, 2 * stride, stride)))
            c *= 2
        self.encoder = Chain(*encoder, Snake(c), Conv(c, c, 3))
        self.quantizer = nn.ModuleList(Level(c, codebook_size, dims) for _ in range(n_codebooks))
        decoder, c = [Conv(c, decoder_channels, 7)], decoder_channels
        for stride in reversed(strides):
            decoder.append(Chain(Snake(c), Transposed(c, c // 2, stride), *units(c // 2)))
            c //= 2
        self.decoder = Chain(*decoder, Snake(c), Conv(c, 1, 7), nn.Tanh())

    def analyse(self, wav, flow):
        x, codes = self.encoder(self.whole(wav, flow)[:, None], flow), []
        for level in self.quantizer:
            codes.append(level.encode(x))
            x = x - level.decode(codes[-1])
        return torch.stack(codes, 1)

    def synthesise(self, codes, flow):
        x = sum(level.decode(code) for level, code in zip(self.quantizer, codes.unbind(1), strict=False))
        wav = self.decoder(x, flow)[:, 0]  # some samples short, where a stride is odd
        return nn.functional.pad(wav, (0, codes.shape[2] * self.samples_per_frame - wav.shape[1]))

    @classmethod
    def source(cls, sample_rate=44100, **options):
        return f"descript/dac_{sample_rate // 1000}khz model.safetensors"

    @classmethod
    def convert(cls, raw, n_codebooks=None):
        """Of transformers' layout, or the original, in which all layers are numbered as they are here."""
        end = 1 + len({name.split(".")[2] for name in raw if name.startswith("encoder.block.")})
        names = (
            (r"coder\.conv1", "coder.0"), (r"coder\.snake1", f"coder.{end}"), (r"coder\.conv2", f"coder.{end + 1}"),
            (r"coder\.block\.(\d+)", lambda m: f"coder.{int(m[1]) + 1}"),
            (r"(encoder\.\d+)\.res_unit(\d)", lambda m: f"{m[1]}.{int(m[2]) - 1}"),
            (r"(decoder\.\d+)\.res_unit(\d)", lambda m: f"{m[1]}.{int(m[2]) + 1}"),
            (r"(\d+\.\d+)\.snake1", r"\1.0"), (r"(\d+\.\d+)\.conv1", r"\1.1"),
            (r"(\d+\.\d+)\.snake2", r"\1.2"), (r"(\d+\.\d+)\.conv2", r"\1.3"),
            (r"(encoder\.\d+)\.snake1", r"\1.3"), (r"(encoder\.\d+)\.conv1", r"\1.4"),
            (r"(decoder\.\d+)\.snake1", r"\1.0"), (r"(decoder\.\d+)\.conv_t1", r"\1.1"),
        )  # fmt: skip
        w = rename(raw, *names if "encoder.conv1.bias" in raw else [(r"\.block(?=\.)", "")], CONTAINERS)
        there = sum(name.endswith("codebook.weight") for name in w)
        n, hop = how_many(n_codebooks, there), strides(w, "encoder.")
        size, dims = w["quantizer.0.codebook.weight"].shape
        w = {name: x for name, x in w.items() if not name.startswith("quantizer") or int(name.split(".")[1]) < n}
        rate = cls.rates.get((math.prod(hop), there))
        return w, dict(
            **{"sample_rate": rate} if rate else {}, n_codebooks=n, codebook_size=size, dims=dims,
            channels=len(w["encoder.0.bias"]), decoder_channels=len(w["decoder.0.bias"]), strides=hop,
        )  # fmt: skip


# -----------------------------------------------------------------------------
# HiFi-GAN: the NeMo codecs, and what speaks for XTTS


def leaky(c, slope=0.01):
    return nn.LeakyReLU(slope)


def fusion(c, act, conv):
    """HiFi-GAN's fusion of receptive fields (Kong, Kim and Bae 2020): the mean of three chains of residual units."""

    def branch(kernel):
        return Chain(*(Residual(act(c), conv(c, c, kernel, dilation=d), act(c), conv(c, c, kernel)) for d in (1, 3, 5)))

    return Sum([branch(kernel) for kernel in (3, 7, 11)], share=1 / 3)


def hifigan(first, c, strides, act, conv, up, *last):
    """HiFi-GAN's generator: `first` gives c channels, each stride halves them, `last` makes a waveform of these."""
    stages = [Chain(act(c >> i), up(c >> i, c >> i + 1, stride), fusion(c >> i + 1, act, conv))
              for i, stride in enumerate(strides)]  # fmt: skip
    return Chain(first, Chain(*stages), *last)


class FSQ(nn.Module):
    """Finite scalar quantisation (Mentzer et al. 2023): each number of the latent is bounded and rounded to one of so
    many levels, and those of a codebook are the digits of its code."""

    def __init__(self, levels):
        super().__init__()
        levels = torch.tensor(levels, device="cpu")[:, None]  # (d, 1)
        bound, offset = (levels - 1) / 2 * (1 - 1e-3), 0.5 * (levels % 2 == 0)
        base = torch.cat([torch.ones_like(levels[:1]), levels[:-1].cumprod(0)])
        tables = {"levels": levels, "bound": bound, "offset": offset, "shift": (offset / bound).tan(), "base": base}
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def encode(self, x):
        """x (B, K * d, T) -> codes (B, K, T)."""
        x = x.unflatten(1, (-1, len(self.levels)))
        digits = (self.bound * (x + self.shift).tanh() - self.offset).round() + self.levels // 2
        return (digits * self.base).sum(2).long()

    def decode(self, codes):
        """Codes (B, K, T) -> x (B, K * d, T) in [-1, 1]."""
        middle = self.levels // 2
        return ((codes[:, :, None] // self.base % self.levels - middle) / middle).flatten(1, 2)


class NanoCodec(Network):
    """NVIDIA's NanoCodec (Casanova et al. 2025): 22.05 kHz, 12.5 frames/s, 4 codebooks of 9 x 8 x 8 x 7 = 4032 codes.

    encoder    conv 1 -> 24; strides 2, 3, 6, 7, 7: fusion, leaky ReLU, conv that doubles the channels; leaky ReLU,
               conv -> 16
    codebooks  of 4 numbers each, rounded
    decoder    causal. conv -> 864; strides 7, 7, 6, 3, 2: half snake, transposed conv of two channels to each, fusion;
               half snake, conv, cut at 1"""

    name, download = "nanocodec", "nvidia/nemo-nano-codec-22khz-0.6kbps-12.5fps"
    files, at_once, residual = ("*.nemo",), 20, False
    sample_rate, causal, edge = 22050, True, "replicate"
    names = (
        (r"^(?!audio_encoder|audio_decoder|vector_quantizer)", None),  # discriminators and losses
        (r"vector_quantizer.*dim_base_index", None), (r"^audio_", ""), (r"\.(conv|activation|snake_act)(?=\.)", ""),
        (r"pre_conv", "0"), (r"post_activation", "2"), (r"post_conv", "3"),
        (r"encoder\.res_layers\.(\d)", r"encoder.1.\1.0"), (r"down_sample_conv_layers\.(\d)", r"1.\1.2"),
        (r"\.activations\.(\d)", r".1.\1.0"), (r"up_sample_conv_layers\.(\d)", r"1.\1.1"),
        (r"decoder\.res_layers\.(\d)", r"decoder.1.\1.2"), (r"\.res_blocks\.(\d)", r".\1"),
        (r"input_activation", "0"), (r"input_conv", "1"), (r"skip_activation", "2"), (r"skip_conv", "3"),
    )  # fmt: skip

    def __init__(self, n_codebooks=4, levels=(9, 8, 8, 7), channels=24, decoder_channels=864, strides=(2, 3, 6, 7, 7)):
        super().__init__(locals(), self.sample_rate, math.prod(strides), n_codebooks, math.prod(levels))
        width, n, c = n_codebooks * len(levels), len(strides), decoder_channels
        reach = 62 * sum(math.prod(strides[:i]) for i in range(n))  # samples, of the fusions and strides to each side
        self.encoder_context = 4 + math.ceil(reach / self.samples_per_frame)
        self.decoder_context = 0 if self.causal else self.encoder_context
        conv = partial(Conv, edge=self.edge)
        stages = [Chain(fusion(channels << i, leaky, conv), leaky(channels << i),
                        conv(channels << i, channels << i + 1, 2 * stride, stride))
                  for i, stride in enumerate(strides)]  # fmt: skip
        self.encoder = Chain(conv(1, channels, 7), Chain(*stages), leaky(channels << n), conv(channels << n, width, 7))
        self.quantizer = FSQ(levels)
        conv = partial(Conv, causal=True) if self.causal else conv

        def up(c_in, c_out, stride):
            return Transposed(c_in, c_out, stride, c_out if self.causal else 1, causal=self.causal, rest=stride % 2)

        last = HalfSnake(c >> n), conv(c >> n, 1, 3), nn.Hardtanh()
        self.decoder = hifigan(conv(width, c, 7), c, strides[::-1], HalfSnake, conv, up, *last)

    def analyse(self, wav, flow):
        return self.quantizer.encode(self.encoder(self.whole(wav, flow)[:, None], flow))

    def synthesise(self, codes, flow):
        return self.decoder(self.quantizer.decode(codes), flow)[:, 0]

    @classmethod
    def convert(cls, raw, n_codebooks=None):
        w = rename(raw, *cls.names)
        levels = [w.pop(name).flatten().tolist() for name in list(w) if name.startswith("vector_quantizer")]
        return w, dict(n_codebooks=len(levels), levels=levels[0], channels=len(w["encoder.0.bias"]),
                       decoder_channels=len(w["decoder.0.bias"]), strides=strides(w, "encoder."))  # fmt: skip


class AudioCodec44k(NanoCodec):
    """NVIDIA's audio-codec-44khz: 44.1 kHz, 86 frames/s, 8 codebooks of 8 x 5 x 5 x 5 = 1000 codes; not causal.

    As above with strides 2, 4, 8, 8, 48 channels in the encoder and 768 in the decoder, where convs see them all."""

    name, download = "audiocodec44k", "nvidia/audio-codec-44khz"
    sample_rate, causal, edge, at_once = 44100, False, "reflect", 5

    def __init__(self, n_codebooks=8, levels=(8, 5, 5, 5), channels=48, decoder_channels=768, strides=(2, 4, 8, 8)):
        super().__init__(n_codebooks, levels, channels, decoder_channels, strides)


# -----------------------------------------------------------------------------
# XTTS


class Condition(nn.Conv1d):
    """Adds to each step what a 1x1 convolution makes of the voice."""

    def forward(self, x, flow):
        return x + super().forward(flow.voice)


class Doubled(Conv):
    """Each step twice, then a convolution."""

    def forward(self, x, flow):
        return super().forward(x.repeat_interleave(2, dim=2), flow)


def power(wav, n_fft, hop, window, lengths=None):
    """wav (B, N) -> squared magnitudes (B, F, 1 + N // hop) of spectra around every hop-th sample."""
    wav = pad(wav[:, None], n_fft // 2, n_fft // 2, "reflect", lengths)[:, 0]
    return torch.stft(wav, n_fft, hop, len(window), window, center=False, return_complex=True).abs().square()


class Excited(nn.Module):
    """A unit of the speaker encoder: two convolutions, and squeeze and excitation (Hu, Shen and Sun 2018)."""

    def __init__(self, c_in, c, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(c), nn.BatchNorm2d(c)
        self.se = nn.Sequential(nn.Linear(c, c // 8), nn.ReLU(), nn.Linear(c // 8, c), nn.Sigmoid())
        self.downsample = nn.Sequential()
        if stride > 1 or c_in != c:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c, 1, stride, bias=False), nn.BatchNorm2d(c))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x).relu())))
        return (y * self.se(y.mean((2, 3)))[:, :, None, None] + self.downsample(x)).relu()


class SpeakerEncoder(nn.Module):
    """A residual network with attentive statistics over time (Heo et al. 2020): wav (B, N) at 16 kHz -> (B, width)."""

    def __init__(self, units, attention, width):
        super().__init__()
        c, layers = units[0][0], []
        self.conv1, self.bn1 = nn.Conv2d(1, c, 3, padding=1), nn.BatchNorm2d(c)
        for i, (c_out, n) in enumerate(units):
            rest = [Excited(c_out, c_out) for _ in range(n - 1)]
            layers.append(nn.Sequential(Excited(c, c_out, min(2, i + 1)), *rest))
            c = c_out
        self.layers = nn.Sequential(*layers)
        self.attention = nn.Sequential(nn.Conv1d(8 * c, attention, 1), nn.ReLU(), nn.BatchNorm1d(attention),
                                       nn.Conv1d(attention, 8 * c, 1), nn.Softmax(2))  # fmt: skip
        self.fc = nn.Linear(16 * c, width)
        self.register_buffer("filters", mel_filters(64, 512, 16000), persistent=False)
        self.register_buffer("window", torch.hamming_window(400, device="cpu"), persistent=False)

    def forward(self, wav):
        before = nn.functional.pad(wav[:, None], (1, 0), "reflect")[:, 0, :-1]
        bands = self.filters.T @ power(wav - 0.97 * before, 512, 160, self.window)
        x = nn.functional.instance_norm((bands + 1e-6).log())
        x = self.layers(self.bn1(self.conv1(x[:, None]).relu())).flatten(1, 2)  # (B, 8 C, t)
        weight = self.attention(x)
        mean = (x * weight).sum(2)
        deviation = ((x.square() * weight).sum(2) - mean.square()).clamp(min=1e-5).sqrt()
        return self.fc(torch.cat([mean, deviation], 1))


class XTTS(Network):
    """What XTTS (Casanova et al. 2024) speaks in: 22.05 kHz, 21.5 frames/s, one codebook of 1024 entries.

    encoder    80 log-mel bands at a hop of 256, each divided by its usual size; conv -> 512 and -> 1024, both of stride
               2; three residual units; conv -> 512
    codebook   of 512 numbers
    decoder    all this mirrored
    vocoder    HiFi-GAN that speaks the GPT's hidden states (B, T, 1024) in a voice (B, 512): strides 8, 8, 2, 2
    speaker    a recording -> its voice

    The system speaks by `vocode`. Codes alone give mel bands, and `decode` what Griffin-Lim makes of these."""

    name, download = "xtts", "coqui/XTTS-v2 dvae.pth mel_stats.pth model.pth"
    files, at_once = ("dvae.pth mel_stats.pth model.pth",), 60
    encoder_context = decoder_context = 16
    vocoder_rate = 24000
    names = (
        (r"^(xtts\.)?hifigan_decoder\.waveform_decoder\.", "vocoder."),
        (r"^(xtts\.)?hifigan_decoder\.speaker_encoder\.", "speaker."),
        (r"^(?!mel_stats|encoder|decoder|codebook\.embed$|vocoder|speaker)", None),  # the GPT, what only training needs
        (r"torch_spec|num_batches_tracked", None), (r"\.(net|conv)(?=\.)", ""), (r"\.se\.fc\.", ".se."),
        (r"conv_pre", "0.0"), (r"cond_layer", "0.1"), (r"conv_post", "3"),
        (r"ups\.(\d)", r"1.\1.1.0"), (r"conds\.(\d)", r"1.\1.1.1"),
        (r"resblocks\.(\d+)", lambda m: f"1.{int(m[1]) // 3}.2.{int(m[1]) % 3}"),
        (r"convs1\.(\d)", r"\1.1"), (r"convs2\.(\d)", r"\1.3"),
        (r"speaker\.layer(\d)", lambda m: f"speaker.layers.{int(m[1]) - 1}"),
    )  # fmt: skip

    def __init__(self, codebook_size=1024, dims=512, hidden=512, latents=1024, voice=512, channels=512,
                 strides=(8, 8, 2, 2), units=((32, 3), (64, 4), (128, 6), (256, 3)), attention=128,
                 width=512):  # fmt: skip
        super().__init__(locals(), 22050, 1024, 1, codebook_size)

        def unit(c):
            return Residual(Conv(c, c, 3), nn.ReLU(), Conv(c, c, 3), nn.ReLU(), Conv(c, c, 1))

        def up(c_in, c_out, stride):
            return Chain(Transposed(c_in, c_out, stride), Condition(voice, c_out, 1))

        c = 2 * hidden
        self.encoder = Chain(
            Chain(Conv(80, hidden, 3, 2), nn.ReLU()), Chain(Conv(hidden, c, 3, 2), nn.ReLU()),
            unit(c), unit(c), unit(c), Conv(c, dims, 1),
        )  # fmt: skip
        self.quantizer = RVQ(1, codebook_size, dims, dims)
        self.decoder = Chain(
            Conv(dims, c, 1), unit(c), unit(c), unit(c),
            Chain(Doubled(c, c, 3), nn.ReLU()), Chain(Doubled(c, hidden, 3), nn.ReLU()), Conv(hidden, 80, 1),
        )  # fmt: skip
        first = Chain(Conv(latents, channels, 7), Condition(voice, channels, 1))
        last = nn.LeakyReLU(0.01), Conv(channels >> len(strides), 1, 7, bias=False), nn.Tanh()
        self.vocoder = hifigan(first, channels, strides, partial(leaky, slope=0.1), Conv, up, *last)
        self.speaker = SpeakerEncoder(units, attention, width)
        self.register_buffer("mel_stats", torch.ones(80))
        self.register_buffer("window", torch.hann_window(1024, device="cpu"), persistent=False)
        for n_fft in (1024, 2048):
            filters = mel_filters(80, n_fft, 22050, highest=8000, area=True)
            self.register_buffer(f"filters{n_fft}", filters, persistent=False)

    def mel(self, wav, n_fft, lengths=None):
        """wav (B, N) -> log-mel bands (B, 80, 1 + N // 256)."""
        bands = getattr(self, f"filters{n_fft}").T @ power(wav, n_fft, 256, self.window, lengths)
        return bands.clamp(min=1e-5).log() / self.mel_stats[:, None]

    @torch.no_grad()
    def reference(self, wav):
        """What the GPT reads a voice off, four rows a frame: wav (B, N) -> (B, 4 T, 80)."""
        return self.mel(self.whole(wav, Flow()), 2048)[..., :-1].transpose(1, 2)

    @torch.no_grad()
    def timbre(self, wav):
        """wav (B, N) -> the voice in it, (B, 512), of length 1. Of a long recording the first 30 s count."""
        wav = resample(wav[:, : 30 * self.sample_rate], self.sample_rate, 16000, zeros=6, rolloff=0.99, beta=0)
        return nn.functional.normalize(self.speaker(wav), dim=1)

    @torch.no_grad()
    def vocode(self, latents, voice):
        """The GPT's hidden states (B, T, C), one a frame, in a timbre (B, 512) -> wav (B, n) at `vocoder_rate`."""
        x = nn.functional.interpolate(latents.transpose(1, 2), scale_factor=4, mode="linear")
        x = nn.functional.interpolate(x, scale_factor=self.vocoder_rate / self.sample_rate, mode="linear")
        return self.vocoder(x, Flow(voice[:, :, None]))[:, 0]

    def analyse(self, wav, flow):
        x = self.mel(wav, 1024, flow.lengths)
        flow.lengths = None if flow.lengths is None else 1 + flow.lengths // 256
        return self.quantizer.encode(self.encoder(x, flow))

    def synthesise(self, codes, flow):
        x = self.decoder(self.quantizer.decode(codes), flow) * self.mel_stats[:, None]
        x = magnitudes(x.exp().transpose(1, 2), self.filters1024).sqrt()
        return griffin_lim(x, self.window, edge=512)

    @classmethod
    def convert(cls, raw, n_codebooks=None):
        w = rename(raw, *cls.names)
        books = w["quantizer.codebooks"] = w.pop("codebook.embed").T[None].contiguous()
        norms = [f"speaker.layers.{i}.{{}}.bn1.bias" for i in range(4)]
        return w, dict(
            codebook_size=books.shape[1], dims=books.shape[2], hidden=len(w["encoder.0.0.bias"]),
            latents=w["vocoder.0.0.weight"].shape[1], voice=w["vocoder.0.1.weight"].shape[1],
            channels=len(w["vocoder.0.0.bias"]), strides=strides(w, "vocoder."),
            units=[(len(w[norm.format(0)]), sum(norm.format(j) in w for j in range(99))) for norm in norms],
            attention=len(w["speaker.attention.0.bias"]), width=len(w["speaker.fc.bias"]),
        )  # fmt: skip


# -----------------------------------------------------------------------------
# by name


CODECS = {codec.name: codec for codec in (Mel, Mimi, EnCodec, DAC, NanoCodec, AudioCodec44k, XTTS)}
PUBLISHED = {  # their sizes, for models and batches that are planned without them
    name: dict(zip(("sample_rate", "frame_rate", "n_codebooks", "codebook_size"), numbers, strict=True))
    for name, numbers in {
        "mimi": (24000, 12.5, 32, 2048),
        "encodec": (24000, 75.0, 8, 1024),
        "dac": (44100, 44100 / 512, 9, 1024),
        "nanocodec": (22050, 12.5, 4, 4032),
        "audiocodec44k": (44100, 44100 / 512, 8, 1000),
        "xtts": (22050, 22050 / 1024, 1, 1024),
    }.items()
}
PUBLISHED["xtts"]["reference"] = {"rows_per_frame": 4, "silence": [0.0] * 80}


def load_codec(name, path=None, **options):
    """The codec called `name`, ready to use.

    `path`: a codec.pt, the folder that holds one, or the dict of `pack()`; for a published codec also the file or
    folder of its weights, as its authors published them. Without it `mel` comes unfitted, and the others from the hub's
    cache folder: nothing is fetched. `options` are the codec's own. Raises ValueError or FileNotFoundError, one line.
    """
    if name not in CODECS:
        raise ValueError(f"no codec is called {name!r}; there are: {', '.join(CODECS)}")
    cls = CODECS[name]
    published, known = issubclass(cls, Network), inspect.signature(cls).parameters
    if unknown := set(options) - set(known):
        raise ValueError(f"the codec {name} has no option {min(unknown)!r}; it has: {', '.join(known)}")
    if path is None:
        return cls.load(**options) if published else cls(**options)
    pack, where = path, "the pack"
    if not isinstance(path, dict):
        where = os.path.join(path, "codec.pt") if os.path.isdir(path) else os.fspath(path)
        if published and not (os.path.basename(where) == "codec.pt" and os.path.isfile(where)):
            return cls.load(path, **options)
        pack = read_pack(where)
    need(pack, {"name": str, "options": dict}, where)
    kinds = {int: int, float: (int, float), tuple: (tuple, list), str: str}
    defaults = {f"{key}?": kinds.get(type(p.default)) for key, p in known.items()}
    need(pack["options"], {key: kind for key, kind in defaults.items() if kind}, f"{where}, options,")
    if missing := known.keys() - pack["options"].keys() if not published else ():
        raise ValueError(f"{where} is damaged: its option {min(missing)} is missing")
    if pack["name"] != name:
        raise ValueError(f"{where}: holds the tables of {pack['name']!r}, not of {name!r}")
    for key, value in options.items():
        if (made := pack["options"].get(key)) != value:
            raise ValueError(f"{where}: made with {key} = {made!r:.60}, not {value!r:.60}")
    return cls.unpack(pack, where)


def read_pack(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such codec table")
    if not undamaged(path):
        raise ValueError(f"{path}: not a codec table, or damaged: it is {what_is(path)} without the checksums of one")
    try:
        return unpickle(path)
    except Exception as error:  # torch.load fails in many ways on files of other kinds
        raise ValueError(f"{path}: not a codec table") from error


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ border-bottom: 1px solid #ccc; padding: 0.4rem; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
</style>
<h1>{title}</h1>
<p>{about}</p>
<table>
{rows}
</table>
"""


def write_page(path, title, about, head, rows):
    """An HTML page with a table: cells are text or, as a Path from the page's folder, a recording with a player."""
    lines = ["<tr><th>" + "<th>".join(map(html.escape, head))]
    for row in rows:
        cells = [f'<audio controls src="{quote(str(cell))}"></audio>' if isinstance(cell, Path) else html.escape(cell)
                 for cell in row]  # fmt: skip
        lines.append("<tr><td>" + "<td>".join(cells))
    with whole(path, "w") as page:
        page.write(PAGE.format(title=html.escape(title), about=html.escape(about), rows="\n".join(lines)))


def round_trip(codec, source, target):
    """The recording `source` through the codec and back, into the wav file `target`. Returns what there is to tell."""
    wav = read_audio(source, codec.sample_rate)
    if not codec.fitted:
        print(f"no --codec_path: fitting {codec.name} on {source} itself")
        codec.fit([wav])
    codes = codec.encode(wav[None])
    write_audio(target, codec.decode(codes)[0, : len(wav)], codec.sample_rate)
    n, bits = codec.n_codebooks, codec.n_codebooks * math.log2(codec.codebook_size) * codec.frame_rate
    print(f"{codec.name}: {codes.shape[2]} frames of {n} codes, {codec.frame_rate:g} frames/s, {bits:.0f} bit/s")
    rate, codes = f"{codec.sample_rate / 1000:g}", f"{n} x {codec.codebook_size}"
    return codec.name, rate, codes, f"{codec.frame_rate:.4g}", f"{bits:.0f}"


def compare(source, target):
    """Round trips of a recording through each codec that is present, and a page to hear them side by side."""
    stem, end = os.path.splitext(target)
    write_audio(f"{stem}.recording{end}", read_audio(source, 44100), 44100)
    rows = [("recording", "", "", "", "")]
    for name in CODECS:
        try:
            rows.append(round_trip(load_codec(name), source, f"{stem}.{name}{end}"))
        except FileNotFoundError as error:
            print(error)
    rows = [[*row, Path(f"{stem}.{row[0]}{end}").relative_to(Path(stem).parent)] for row in rows]
    write_page(f"{stem}.html", os.path.basename(source), "The recording, and what each codec keeps of it.",
               ["codec", "kHz", "codes", "frames/s", "bit/s", ""], rows)  # fmt: skip
    print(f"{stem}.html: to listen to them")


def main():
    parser = argparse.ArgumentParser(description="Send a recording through a codec and back, to hear what it keeps.")
    parser.error = lambda message: sys.exit(f"error: {message}")
    parser.add_argument("input", help="what soundfile reads: wav, flac, ogg, mp3, ...")
    parser.add_argument("output", help="a wav file")
    names = f"one of: {', '.join(CODECS)} (default: mel); all: one file for each that is here, and a page to compare"
    parser.add_argument("--codec", default="mel", help=names)
    parser.add_argument("--codec_path", help="its tables or weights (a file, or the folder that holds them)")
    options = lambda text: dict(json.loads(text))  # noqa: E731
    parser.add_argument("--codec_args", type=options, default={}, help="its options, such as '{\"frame_rate\": 20}'")
    args = parser.parse_args()
    if args.codec != "all":
        round_trip(load_codec(args.codec, args.codec_path, **args.codec_args), args.input, args.output)
    elif args.codec_path or args.codec_args:
        raise ValueError("--codec_path and --codec_args are for one codec, not for --codec=all")
    else:
        compare(args.input, args.output)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

"""
Waveform <-> codes: every codec of Parlando, and the reading, writing and resampling of audio files.

A codec turns a waveform into frames, and each frame into K small integers, one from each of K codebooks of V entries.
Notable features:
- one contract for all codecs, and tables that travel with the token files and inside checkpoints
- `mel` needs no weights from anywhere: patches of mel spectrogram, decorrelated by PCA, quantised by residual k-means
  fitted on the data at hand, decoded by mel inversion and fast Griffin-Lim
- codes are exact: `mel` encodes in float64, so that neither other recordings in the batch nor padding change them
- band-limited resampling between any two rates

B: batch   N: samples   T: frames   K: codebooks   V: entries of a codebook   M: mel bands   F: FFT bins
S: steps (spectra) in a frame   P = S * M: numbers in a patch   D: principal components kept of them
"""

import argparse
import hashlib
import inspect
import io
import json
import math
import os
import sys
import wave
from functools import lru_cache

import numpy as np
import soundfile
import torch
from torch import nn

# -----------------------------------------------------------------------------
# audio files


@lru_cache(maxsize=16)
def sinc_filters(up, down, zeros=48, beta=9.0, block=256):
    """What turns every `down` samples into `up`: [(first input sample, matrix (inputs, at most `block` outputs)), ...].
    A matrix holds Kaiser-windowed sincs, `zeros` zero crossings to each side, shifted from output to output."""
    cutoff = min(1.0, up / down) * 0.96  # of the input's Nyquist frequency; the rest is the filter's slope
    width = math.ceil(zeros / cutoff)
    filters = []
    for outputs in torch.arange(up, dtype=torch.float64).split(block):
        at = outputs * down / up  # in input samples
        first, last = math.floor(at[0]) - width + 1, math.floor(at[-1]) + width
        t = torch.arange(first, last + 1, dtype=torch.float64)[:, None] - at
        sinc = torch.sinc(cutoff * t) * torch.special.i0(beta * (1 - (t / width) ** 2).clamp(min=0).sqrt())
        sinc *= t.abs() < width
        filters.append((first, (sinc / sinc.sum(0)).float()))
    return filters


def resample(wav, from_rate, to_rate):
    """Band-limited change of sample rate: wav (..., N) -> (..., ceil(N * to_rate / from_rate))."""
    if from_rate == to_rate or wav.shape[-1] == 0:
        return wav
    up, down = to_rate // math.gcd(from_rate, to_rate), from_rate // math.gcd(from_rate, to_rate)
    n_out = -(-wav.shape[-1] * up // down)
    many = max(1, 128 // up)  # periods at once, for a matrix worth multiplying with
    up, down = up * many, down * many
    periods = -(-n_out // up)
    filters = sinc_filters(up, down)
    left, right = -filters[0][0], periods * down + filters[-1][0] + len(filters[-1][1]) - wav.shape[-1]
    wav = nn.functional.pad(wav, (left, max(0, right)))
    out = [wav[..., first + left :].unfold(-1, len(matrix), down)[..., :periods, :] @ matrix.to(wav)
           for first, matrix in filters]  # fmt: skip
    return torch.cat(out, -1).flatten(-2)[..., :n_out]


def read_audio(path, sample_rate, start=0.0, end=None):
    """Read what soundfile reads (wav, flac, ogg, mp3, ...) as mono at `sample_rate`: float32 (N,) in [-1, 1].
    `start` and `end` are seconds. Raises FileNotFoundError or ValueError, one line that names the file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such audio file")
    try:
        with soundfile.SoundFile(path) as file:
            rate, total = file.samplerate, file.frames
            first = round(start * rate)
            last = total if end is None else min(round(end * rate), total)
            if total == 0:
                raise ValueError(f"{path}: the recording is empty")
            if not 0 <= first < last:
                raise ValueError(f"{path}: nothing from {start} to {end} s in a recording of {total / rate:.2f} s")
            file.seek(first)
            wav = file.read(last - first, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise ValueError(f"{path}: not readable as audio ({error})".replace("\n", " ")) from error
    if len(wav) == 0:
        raise ValueError(f"{path}: the recording is empty")
    if not np.isfinite(wav).all():
        raise ValueError(f"{path}: the recording holds NaN or infinite samples")
    return resample(torch.from_numpy(wav.mean(1)), rate, sample_rate)


def write_audio(path, wav, sample_rate):
    """Write wav (N,) as a 16-bit mono WAV file, under a temporary name until it is whole."""
    samples = (wav.detach().cpu().flatten().clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
    partial = f"{path}.partial"
    with open(partial, "wb") as raw, wave.open(raw) as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.astype("<i2").tobytes())
    os.replace(partial, path)


# -----------------------------------------------------------------------------
# the contract


class Codec(nn.Module):
    """What all codecs share. Each has a `name`, `sample_rate`, `frame_rate`, `samples_per_frame`, `n_codebooks`,
    `codebook_size`, and

        encode(wav (B, N), lengths=None) -> codes (B, K, T) int64
        decode(codes (B, K, T)) -> wav (B, T * samples_per_frame)

    wav is float32 in [-1, 1] and T = frames(N). `lengths` (B,) says how many samples of each row are its own: the first
    frames(length) codes of a row are what it would get alone. A codec that must be fitted also has `fitted` and
    fit(wavs, seed). Some have reference(wav (B, N)) -> (B, T * r, M), features of a recording off which a model reads
    its voice, r rows a frame. `options` are the arguments it was made with, its state dict holds its tables."""

    name = None

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

    def fingerprint(self):
        """16 hex digits that change when the name, an option, or any number in the tables does."""
        digest = hashlib.sha256(json.dumps([self.name, self.options], sort_keys=True).encode())
        for name, table in sorted(self.pack()["tables"].items()):
            digest.update(f"{name}{tuple(table.shape)}{table.dtype}".encode())
            digest.update(table.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder):
        """Write folder/codec.pt, from which `load_codec(name, folder)` reads."""
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "codec.pt")
        torch.save(self.pack(), packed := io.BytesIO())  # not to the file: of a full disk torch.save makes no OSError
        with open(f"{path}.partial", "wb") as file:
            file.write(packed.getvalue())
        os.replace(f"{path}.partial", path)


# -----------------------------------------------------------------------------
# mel: patches of mel spectrogram, residual k-means, Griffin-Lim


def mel_filters(n_mels, n_fft, sample_rate):
    """Triangular filters evenly spaced on the mel scale: (n_fft // 2 + 1, n_mels), each of peak 1."""
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, n_mels + 2, dtype=torch.float64) / 2595) - 1)
    hz = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)[:, None]
    rise = (hz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - hz) / (edges[2:] - edges[1:-1])
    return torch.minimum(rise, fall).clamp(min=0).float()


def nearest(x, codebook):
    """The index of the codebook entry nearest to each vector: x (n, D), codebook (V, D) -> (n,)."""
    return (codebook.square().sum(1) - 2 * x @ codebook.T).argmin(1)


def kmeans(x, size, generator, rounds=20):
    """Lloyd's algorithm from a random start: x (n, D) -> codebook (size, D). An entry that loses all its vectors goes
    to one drawn at random. Where vectors are drawn, a little noise keeps any two entries apart."""
    def draw(n):
        picked = x[torch.randperm(len(x), generator=generator)[:n] if n <= len(x)
                   else torch.randint(len(x), (n,), generator=generator)]  # fmt: skip
        return picked + 1e-3 * x.std() * torch.randn(picked.shape, generator=generator)

    codebook = draw(size)
    for _ in range(rounds):
        index = nearest(x, codebook)
        count = torch.bincount(index, minlength=size)
        codebook = torch.zeros_like(codebook).index_add_(0, index, x) / count.clamp(min=1)[:, None]
        codebook[count == 0] = draw(int((count == 0).sum()))
    return codebook


class Mel(Codec):
    """A codec without network weights, fitted in seconds on the data that it will code.

    analysis    magnitude spectra, M mel bands, cube root (about how loudness grows, so that loud and quiet recordings
                are coded alike); a frame is a patch of S spectra; PCA turns it into D numbers, largest variance first
    codebooks   codebook 0 holds k-means centroids of these vectors, each further codebook the centroids of what those
                before it left over (residual vector quantisation, as in SoundStream, Zeghidour et al. 2021)
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
        wav = wav.double()
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=wav.device)
            wav = wav * (torch.arange(wav.shape[1], device=wav.device) < lengths[:, None])
        n, size, edge = self.frames(wav.shape[1]), self.samples_per_frame, 3 * self.hop
        wav = nn.functional.pad(wav, (edge // 2, n * size - wav.shape[1] + edge - edge // 2))
        stretch = max(1, limit // len(wav))
        for first in range(0, n, stretch):
            spectra = self.spectra(wav[:, first * size : min(first + stretch, n) * size + edge])
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
            rest = rest - codebook[nearest(rest, codebook)]

        # Ridge regression of patches on quantised patches and their neighbours, drawn towards undoing the PCA.
        near = self.dequantise(self.quantise((x @ self.analysis).flatten(0, 1))).view(len(x), -1).double()  # (n, 3 D)
        undo = self.analysis.T.double()
        undo = torch.cat([0 * undo, undo, 0 * undo])  # (3 D, P)
        gram = near.T @ near
        ridge = (1e-2 * gram.diagonal().mean() + 1e-9) * torch.eye(len(gram))
        undo += torch.linalg.solve(gram + ridge, near.T @ (patch - near @ undo))
        self.synthesis.copy_(undo.view(3, -1, len(self.mean)).permute(2, 1, 0))
        self.fitted = True
        self.to(device)
        return self

    def quantise(self, x):
        """Vectors (n, D) -> codes (n, K)."""
        codes = []
        for codebook in self.codebooks.to(x):
            codes.append(nearest(x, codebook))
            x = x - codebook[codes[-1]]
        return torch.stack(codes, 1)

    def dequantise(self, codes):
        """Codes (..., K) -> vectors (..., D)."""
        return sum(codebook[codes[..., k]] for k, codebook in enumerate(self.codebooks))

    @torch.no_grad()
    def encode(self, wav, lengths=None):
        self.need_tables()
        if wav.ndim != 2 or not wav.numel():
            raise ValueError(f"encode takes waveforms of shape (B, N), none of them empty, not {tuple(wav.shape)}")
        codes = []
        for bands in self.bands(wav, lengths):
            patches = bands.reshape(len(wav), -1, len(self.mean))  # (B, t, P)
            x = (patches - self.mean) @ self.analysis.double()
            codes.append(self.quantise(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        return torch.cat(codes, 1).transpose(1, 2)

    @torch.no_grad()
    def decode(self, codes):
        self.need_tables()
        x = self.dequantise(codes.transpose(1, 2)).transpose(1, 2)  # (B, D, T)
        patches = nn.functional.conv1d(nn.functional.pad(x, (1, 1), mode="replicate"), self.synthesis).transpose(1, 2)
        bands = (patches + self.mean).clamp(min=0.01).pow(3)
        return self.griffin_lim(self.magnitudes(bands.reshape(len(codes), -1, self.filters.shape[1])))

    def need_tables(self):
        if not self.fitted:
            raise ValueError("the mel codec has no tables yet: fit it on recordings, or load it with a path")

    def magnitudes(self, bands, rounds=30):
        """Mel bands (B, n, M) -> magnitudes (B, n, F) that explain them: multiplicative updates keep these positive."""
        x = bands @ (self.filters / self.filters.sum(0).clamp(min=1e-9)).T + 1e-9
        for _ in range(rounds):
            x = x * (bands @ self.filters.T) / (x @ self.filters @ self.filters.T + 1e-9)
        return x

    def griffin_lim(self, magnitudes, rounds=32, momentum=0.99):
        """Magnitudes (B, n, F) -> wav (B, n * hop) whose spectra have about these magnitudes."""
        n, f = magnitudes.shape[1:]

        def overlap_add(x):  # (B, n, n_fft) -> (B, (n + 3) * hop)
            out = x.new_zeros(len(x), n + 3, self.hop)
            for i, quarter in enumerate((x * self.window).unflatten(2, (4, self.hop)).unbind(2)):
                out[:, i : i + n] += quarter
            return out.flatten(1)

        weight = overlap_add(self.window.expand(1, n, -1)).clamp(min=1e-3)
        phase = 2 * math.pi * torch.rand(n, f, generator=torch.Generator().manual_seed(0)).to(magnitudes)
        phase, before = torch.polar(torch.ones_like(phase), phase), 0
        for _ in range(rounds):
            wav = overlap_add(torch.fft.irfft(magnitudes * phase, n=self.n_fft)) / weight
            spectra = self.spectra(wav)
            phase = spectra - momentum / (1 + momentum) * before
            phase, before = phase / phase.abs().clamp(min=1e-9), spectra
        wav = overlap_add(torch.fft.irfft(magnitudes * phase, n=self.n_fft)) / weight
        edge = 3 * self.hop // 2
        return wav[:, edge : edge + n * self.hop].clamp(-1, 1)


# -----------------------------------------------------------------------------
# by name


CODECS = {"mel": Mel}
PUBLISHED = {  # the codecs of the published models, as far as the sizes of a model and its batches need them
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
    """The codec called `name`. `path`: its tables, as a codec.pt, the folder that holds one, or the dict of `pack()`;
    without it `mel` comes unfitted. `options` are the codec's own. Raises ValueError or FileNotFoundError, one line."""
    if name not in CODECS:
        raise ValueError(f"no codec is called {name!r}; there are: {', '.join(CODECS)}")
    known = inspect.signature(CODECS[name]).parameters
    if unknown := set(options) - set(known):
        raise ValueError(f"the codec {name} has no option {min(unknown)!r}; it has: {', '.join(known)}")
    if path is None:
        return CODECS[name](**options)
    pack, where = path, "the pack"
    if not isinstance(path, dict):
        where = os.path.join(path, "codec.pt") if os.path.isdir(path) else path
        if not os.path.isfile(where):
            raise FileNotFoundError(f"{where}: no such codec table")
        try:
            pack = torch.load(where, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load fails in many ways on files of other kinds
            raise ValueError(f"{where}: not a codec table") from error
    if not isinstance(pack, dict) or set(pack) != {"name", "options", "tables"}:
        raise ValueError(f"{where}: not a codec table")
    if pack["name"] != name:
        raise ValueError(f"{where}: holds the tables of {pack['name']!r}, not of {name!r}")
    for key, value in options.items():
        if pack["options"][key] != value:
            raise ValueError(f"{where}: made with {key} = {pack['options'][key]}, not {value}")
    codec = CODECS[name](**pack["options"])
    try:
        codec.load_state_dict(pack["tables"])
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"{where}: its tables are not those of {name} with its options") from error
    codec.fitted = True
    return codec


def main():
    parser = argparse.ArgumentParser(description="Send a recording through a codec and back, to hear what it keeps.")
    parser.error = lambda message: sys.exit(f"error: {message}")
    parser.add_argument("input", help="what soundfile reads: wav, flac, ogg, mp3, ...")
    parser.add_argument("output", help="a wav file")
    parser.add_argument("--codec", default="mel", help=f"one of: {', '.join(CODECS)} (default: mel)")
    parser.add_argument("--codec_path", help="a fitted codec.pt, or the folder that holds it")
    options = lambda text: dict(json.loads(text))  # noqa: E731
    parser.add_argument("--codec_args", type=options, default={}, help="its options, such as '{\"frame_rate\": 20}'")
    args = parser.parse_args()
    codec = load_codec(args.codec, args.codec_path, **args.codec_args)
    wav = read_audio(args.input, codec.sample_rate)
    if not getattr(codec, "fitted", True):
        print(f"no --codec_path: fitting {codec.name} on {args.input} itself")
        codec.fit([wav])
    codes = codec.encode(wav[None])
    write_audio(args.output, codec.decode(codes)[0, : len(wav)], codec.sample_rate)
    n, bits = codec.n_codebooks, codec.n_codebooks * math.log2(codec.codebook_size) * codec.frame_rate
    print(f"{codec.name}: {codes.shape[2]} frames of {n} codes, {codec.frame_rate:g} frames/s, {bits:.0f} bit/s")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

"""
Waveform <-> codes: every codec of Parlando.

    codec = load_codec("mimi")                     or mel, encodec, dac, nanocodec, audiocodec44k, xtts
    codes = codec.encode(wav)                      (B, N) -> (B, K, T)
    python codec.py in.wav out.wav --codec=mimi    what a codec keeps of a recording

A codec turns a waveform into frames, and each frame into K small integers, one from each of K codebooks of V entries.
Notable features:
- one contract for all codecs; their tables travel with the token files and inside checkpoints
- `mel` needs no published weights: patches of mel spectrogram, decorrelated by PCA, quantised by residual k-means that
  is fitted on the data at hand, decoded by mel inversion and fast Griffin-Lim
- codes are exact: `mel` encodes in float64, so that neither other recordings in the batch nor padding change them
- the codecs of the published models in plain torch: the layers that they share, then each as a table of its layers
- every layer streams: a StreamState keeps what it needs of earlier pieces, so that pieces give the same as the whole
- padding begins where a row ends, so that each row of a batch gets the codes that it gets alone
- weights are read, never run: pickles may hold tensors only, archives are not unpacked

B: batch   N: samples   T: frames   K: codebooks   V: entries of a codebook   M: mel bands   F: FFT bins
S: steps (spectra) in a frame   P = S * M: numbers in a patch   D: numbers that are quantised together
C: channels   L: steps of a layer's signal
"""

import argparse
import hashlib
import inspect
import io
import json
import math
import os
import re
import sys
from functools import lru_cache, partial
from glob import escape, glob

import torch
from torch import nn

from parts.audio import read_audio, resample, write_audio
from parts.files import need, whole
from parts.page import write_page
from parts.tensors import UNBUILT, fault, need_tensors, read_weights, reason, undamaged, unpickle, what_is

# -----------------------------------------------------------------------------
# the contract


class Codec(nn.Module):
    """The contract of all codecs. Each has a `name`, `sample_rate` (Hz), `frame_rate` (frames/s), `samples_per_frame`,
    `n_codebooks`, `codebook_size`, and

        encode(wav (B, N), lengths=None) -> codes (B, K, T) int64
        decode(codes (B, K, T)) -> wav (B, T * samples_per_frame)

    wav is float32 in [-1, 1], and T = frames(N). lengths (B,): samples of each row before its padding; the first
    frames(length) codes of a row are those that it gets alone.

    options: the arguments of the constructor; the state dict holds the tables
    fitted: False until fit(wavs, seed), for a codec that has to be fitted
    tuned_parts: prefixes of the tensors that fit(wavs, seed, epochs) fine-tunes, for a codec that can be fine-tuned
    residual: the first codebooks alone are a coarser code
    streams: decode_stream(pieces of codes) yields pieces of wav
    reference: None, or reference(wav (B, N)) -> (B, T * R, M), features from which a model reads a voice; padded=False:
        without the rows of the silence that completes the last frame
    timbre, vocode: None, or the two methods of a vocoder that speaks from a model's states, at `vocoder_rate`
    """

    name = None
    fitted = True
    tuned_parts = ()
    residual = True
    streams = False
    reference = timbre = vocode = None

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def frames(self, n_samples):
        """The number of frames of n_samples; the last may be part silence."""
        return -(-n_samples // self.samples_per_frame)

    def sizes(self, references=False):
        """What meta.json says of the codec's sizes; references: also of the features that `reference` makes."""
        sizes = {key: getattr(self, key) for key in ("sample_rate", "frame_rate", "n_codebooks", "codebook_size")}
        if references:
            silence = self.reference(torch.zeros(1, self.samples_per_frame))[0]
            sizes["reference"] = {"rows_per_frame": len(silence), "silence": silence[0].tolist()}
        return sizes

    def pack(self):
        """All that `load_codec(name, pack)` needs to make the codec again, as a plain dict."""
        tables = {name: table.detach().cpu().clone() for name, table in self.state_dict().items()}
        return {"name": self.name, "options": dict(self.options), "tables": tables}

    @classmethod
    def unpack(cls, pack, where, folder=""):
        """The codec of a `pack()`. Raises ValueError, which begins with `where`, for other or damaged tables. folder:
        in which the pack lies; a codec whose weights stay outside its pack looks there too."""
        need(pack, {"tables": dict}, where)
        codec = cls.build(where, pack["options"])
        need_tensors(pack["tables"], codec.state_dict(), f"{where}, tables of {cls.name}")
        codec.load_state_dict(pack["tables"])
        codec.fitted = True
        return codec

    @classmethod
    def build(cls, where, options):
        """The codec with the options that the file `where` holds. Raises ValueError for impossible ones."""
        try:
            return cls(**options)
        except UNBUILT as error:
            raise ValueError(f"{where}: impossible options of the codec {cls.name} ({reason(error)})") from None

    def fingerprint(self):
        """16 hex digits that change with the name, any option, and any number in the tables."""
        return self.digest(self.state_dict())

    def digest(self, tables):
        digest = hashlib.sha256(json.dumps([self.name, self.options], sort_keys=True).encode())
        for name, table in sorted(tables.items()):
            digest.update(f"{name}{tuple(table.shape)}{table.dtype}".encode())
            digest.update(table.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def save(self, folder):
        """Write folder/codec.pt, which `load_codec(name, folder)` reads. Raises OSError, which names the file."""
        os.makedirs(folder, exist_ok=True)
        packed = io.BytesIO()  # torch.save into the file itself would hide that the disk is full
        torch.save(self.pack(), packed)
        with whole(os.path.join(folder, "codec.pt")) as file:
            file.write(packed.getvalue())


def need_waves(wav):
    if wav.ndim != 2 or not wav.numel():
        raise ValueError(f"encode takes waveforms of shape (B, N), none of them empty, not {tuple(wav.shape)}")


# -----------------------------------------------------------------------------
# mel: patches of mel spectrogram, residual k-means, Griffin-Lim


def mel_filters(n_mels, n_fft, sample_rate, highest=None, area=False):
    """Triangular filters, evenly spaced on the mel scale: (n_fft // 2 + 1, n_mels).

    highest: their upper end in Hz, None: half the sample rate. Each has peak 1, or with `area` an area of 1 Hz.
    """
    top = 2595 * math.log10(1 + (highest or sample_rate / 2) / 700)
    kind = {"dtype": torch.float64, "device": "cpu"}  # real numbers also where a codec is built on the meta device
    edges = 700 * (10 ** (torch.linspace(0, top, n_mels + 2, **kind) / 2595) - 1)
    hz = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, **kind)[:, None]
    rise = (hz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - hz) / (edges[2:] - edges[1:-1])
    filters = torch.minimum(rise, fall).clamp(min=0)
    return (filters * 2 / (edges[2:] - edges[:-2]) if area else filters).float()


def squared_distances(x, codebook):
    """Squared distances between vectors (n, D) and the entries of a codebook (V, D): (n, V)."""
    return x.square().sum(1, keepdim=True) - 2 * x @ codebook.T + codebook.square().sum(1)


def quantise(x, codebooks, squared_norms=None):
    """Residual vector quantisation (SoundStream, Zeghidour et al. 2021): vectors (n, D) -> codes (n, K).

    Each of the codebooks (K, V, D) codes the rest that those before it left. squared_norms (K, V): of the entries.
    """
    codes = []
    squared_norms = codebooks.square().sum(2) if squared_norms is None else squared_norms
    for codebook, squared_norm in zip(codebooks, squared_norms, strict=True):
        codes.append(torch.addmm(squared_norm, x, codebook.T, alpha=-2).argmin(1))  # |x|^2 is the same for all entries
        x = x - codebook[codes[-1]]
    return torch.stack(codes, 1)


def dequantise(codes, codebooks):
    """Codes (..., K) -> vectors (..., D). There may be fewer codes than codebooks."""
    return sum(codebook[index] for codebook, index in zip(codebooks, codes.unbind(-1), strict=False))


def kmeans(x, size, generator, rounds=20):
    """Lloyd's algorithm from a random start: vectors x (n, D) -> codebook (size, D).

    An entry without vectors moves to a random one. A little noise keeps entries at the same vector apart.
    """
    def draw(n):
        if n <= len(x):
            picked = x[torch.randperm(len(x), generator=generator)[:n]]
        else:
            picked = x[torch.randint(len(x), (n,), generator=generator)]
        return picked + 1e-3 * x.std() * torch.randn(picked.shape, generator=generator)

    codebook = draw(size)
    for _ in range(rounds):
        index = squared_distances(x, codebook).argmin(1)
        count = torch.bincount(index, minlength=size)
        codebook = torch.zeros_like(codebook).index_add_(0, index, x) / count.clamp(min=1)[:, None]
        codebook[count == 0] = draw(int((count == 0).sum()))
    return codebook


class Mel(Codec):
    """A codec without network weights, fitted in seconds on the data that it will code.

    analysis    magnitude spectra, M mel bands, cube root (about how loudness grows, so that quiet recordings are coded
                as well as loud ones); a frame is a patch of S spectra; PCA turns it into D numbers
    codebooks   residual k-means: codebook 0 holds centroids of these vectors, each further codebook centroids of the
                rest that those before it left
    synthesis   the centroids of a frame add up; a linear map from a frame and its two neighbours to the patch undoes
                the PCA and smooths the quantisation; then magnitudes that explain the mel bands, and phases that agree
                with each other (fast Griffin-Lim: Perraudin, Balazs and Soendergaard 2013)
    """

    name = "mel"

    def __init__(self, n_codebooks=8, codebook_size=256, sample_rate=16000, frame_rate=12.5, n_mels=80, dims=64):
        super().__init__(n_codebooks=n_codebooks, codebook_size=codebook_size, sample_rate=sample_rate,
                         frame_rate=float(frame_rate), n_mels=n_mels, dims=dims)  # fmt: skip
        for key, value in self.options.items():
            number = isinstance(value, (int, float) if key == "frame_rate" else int)
            if not number or not 1 <= value <= {"frame_rate": 200, "codebook_size": 65536}.get(key, math.inf):
                raise ValueError(f"the mel codec cannot have {key} = {value!r}")
        self.n_codebooks = n_codebooks
        self.codebook_size = codebook_size
        self.sample_rate = sample_rate
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
        """(steps, samples of a step): a step has about `hop` samples, and all together, more exactly, `frame`."""
        def misfit(steps):
            size = max(1, round(frame / steps))
            return abs(math.log(size / hop)) + 200 * abs(math.log(size * steps / frame))

        steps = min(range(1, 2 + round(2 * frame / hop)), key=misfit)
        return steps, max(1, round(frame / steps))

    def spectra(self, wav):
        """wav (B, (n + 3) * hop) -> complex spectra (B, n, F) of its middle n * hop samples."""
        return torch.fft.rfft(wav.unfold(-1, self.n_fft, self.hop) * self.window.to(wav))

    def bands(self, wav, lengths=None, limit=512):
        """wav (B, N) -> mel bands (B, t * S, M) in float64, one stretch of at most about `limit` frames after another.
        Samples beyond `lengths` count as silence."""
        n = self.frames(wav.shape[1])
        before = 3 * self.hop // 2  # the first spectrum begins before the first step
        ends = torch.as_tensor([wav.shape[1]] if lengths is None else lengths, device=wav.device)[:, None]
        stretch = max(1, limit // len(wav))
        for first in range(0, n, stretch):
            start = first * self.samples_per_frame - before
            end = start + min(stretch, n - first) * self.samples_per_frame + 3 * self.hop
            piece = wav[:, max(0, start) : end].double()
            piece *= torch.arange(max(0, start), max(0, start) + piece.shape[1], device=wav.device) < ends
            left = max(0, -start)
            spectra = self.spectra(nn.functional.pad(piece, (left, end - start - left - piece.shape[1])))
            yield (spectra.abs() @ self.filters.double()).pow(1 / 3)

    def reference(self, wav, padded=True):
        """The mel bands of wav (B, N): (B, T * S, M) float32."""
        bands = torch.cat(list(self.bands(wav)), 1).float()
        return bands if padded else bands[:, : -(-wav.shape[1] // self.hop)]

    @torch.no_grad()
    def fit(self, wavs, seed=0):
        """Fit the tables on recordings, an iterable of (N,) at the codec's sample rate. Returns the codec.

        It learns from 16384 random patches of all recordings, more for large codebooks. A patch may begin at any step,
        so that a few recordings are enough. Takes seconds, and about 30 kB for each second of audio. The same
        recordings and seed give the same tables. Raises ValueError without recordings.
        """
        generator = torch.Generator().manual_seed(seed)
        device = self.mean.device
        self.cpu()  # a GPU adds up in any order: the tables would differ from run to run
        x = self.draw_patches(wavs, generator)
        self.mean.copy_(x.mean((0, 1)))
        x -= self.mean

        patch = x[:, 1]
        components = torch.linalg.eigh((patch.T @ patch).double()).eigenvectors.flip(1)
        self.analysis.copy_(components[:, : self.analysis.shape[1]])
        rest = patch @ self.analysis
        for codebook in self.codebooks:
            codebook.copy_(kmeans(rest, self.codebook_size, generator))
            rest = rest - codebook[squared_distances(rest, codebook).argmin(1)]

        # Ridge regression from quantised patches and their neighbours to patches. The penalty draws it towards undoing
        # the PCA, not towards zero, so that few recordings still give a sound decoder
        near = dequantise(quantise((x @ self.analysis).flatten(0, 1), self.codebooks), self.codebooks)
        near = near.view(len(x), -1).double()  # (n, 3 D)
        undo = self.analysis.T.double()
        undo = torch.cat([0 * undo, undo, 0 * undo])  # (3 D, P)
        gram = near.T @ near
        ridge = (1e-2 * gram.diagonal().mean() + 1e-9) * torch.eye(len(gram))
        undo += torch.linalg.solve(gram + ridge, near.T @ (patch - near @ undo))
        self.synthesis.copy_(undo.view(3, -1, len(self.mean)).permute(2, 1, 0))
        self.fitted = True
        return self.to(device)

    def draw_patches(self, wavs, generator):
        """Random patches of recordings, each between its neighbours: (n, 3, P)."""
        steps = self.steps
        bands, starts = [], []
        total = 0
        for wav in wavs:
            x = torch.cat([b[0].float() for b in self.bands(wav[None].cpu())])
            bands += [x[:1].expand(steps, -1), x, x[-1:].expand(steps, -1)]
            starts.append(torch.arange(total, total + len(x) - steps + 1))
            total += len(x) + 2 * steps
        if not bands:
            raise ValueError("the mel codec was given no recordings to be fitted on")
        starts = torch.cat(starts)
        starts = starts[torch.randperm(len(starts), generator=generator)[: max(16384, 32 * self.codebook_size)]]
        x = torch.cat(bands).unfold(0, 3 * steps, 1)[starts]  # (n, M, 3 S)
        return x.transpose(1, 2).reshape(len(x), 3, -1)

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
    """Mel bands (B, n, M) -> magnitudes (B, n, F) that explain them; multiplicative updates keep these positive."""
    x = bands @ (filters / filters.sum(0).clamp(min=1e-9)).T + 1e-9
    for _ in range(rounds):
        x = x * (bands @ filters.T) / (x @ filters @ filters.T + 1e-9)
    return x


def griffin_lim(magnitudes, window, edge, rounds=32, momentum=0.99):
    """Find phases: magnitudes (B, n, F) of spectra a quarter of the window apart -> wav (B, n * hop).

    edge: samples between the start of the first window and the start of wav.
    """
    n, f = magnitudes.shape[1:]
    hop = len(window) // 4

    def overlap_add(x):  # (B, n, 4 * hop) -> (B, (n + 3) * hop)
        out = x.new_zeros(len(x), n + 3, hop)
        for i, quarter in enumerate((x * window).unflatten(2, (4, hop)).unbind(2)):
            out[:, i : i + n] += quarter
        return out.flatten(1)

    weight = overlap_add(window.expand(1, n, -1)).clamp(min=1e-3)
    angle = 2 * math.pi * torch.rand(n, f, generator=torch.Generator().manual_seed(0)).to(magnitudes)
    phase = torch.polar(torch.ones_like(angle), angle)
    before = 0
    for _ in range(rounds):
        wav = overlap_add(torch.fft.irfft(magnitudes * phase, n=4 * hop)) / weight
        spectra = torch.fft.rfft(wav.unfold(-1, 4 * hop, hop) * window)
        phase = spectra - momentum / (1 + momentum) * before
        phase = phase / phase.abs().clamp(min=1e-9)
        before = spectra
    wav = overlap_add(torch.fft.irfft(magnitudes * phase, n=4 * hop)) / weight
    return wav[:, edge : edge + n * hop].clamp(-1, 1)


# -----------------------------------------------------------------------------
# layers of the published codecs: forward(x, state) -> x


class StreamState:
    """What passes through a network beside the signal.

    memory: {layer: what it keeps of a piece for the next one}
    lengths: (B,), where each row ends at the current layer; None: where the tensor ends
    voice: (B, C, 1), for layers that need one
    """

    def __init__(self, voice=None):
        self.memory = {}
        self.lengths = None
        self.voice = voice


def pad(x, left, right, edge, lengths=None):
    """x (B, C, L) -> (B, C, left + L + right).

    edge: "constant" (zeros), "replicate" or "reflect"; the last appends zeros to rows that are too short to mirror.
    lengths (B,): the padding on the right begins where a row ends.
    """
    n, longest = x.shape[2], max(left, right)
    if lengths is None:
        if edge == "reflect" and n <= longest:
            x = nn.functional.pad(x, (0, longest + 1 - n))
        return nn.functional.pad(x, (left, right), edge)[..., : left + n + right]
    ends = lengths[:, None]
    at = torch.arange(-left, n + right, device=x.device)[None]
    if edge == "constant":
        return nn.functional.pad(x * (at[:, left : left + n] < ends)[:, None], (left, right))
    if edge == "replicate":
        at = at.clamp(min=0).minimum(ends - 1)
    else:
        last = ends.clamp(min=longest + 1) - 1
        at = last - (last - at.abs()).abs()
    inside = (at >= 0) & (at < ends)
    return x.gather(2, at.clamp(0, n - 1)[:, None].expand(-1, x.shape[1], -1)) * inside[:, None]


class Conv(nn.Conv1d):
    """Convolution (B, C, L) -> (B, C', ceil(L / stride)), padded on both sides alike.

    A causal one is padded on the left, and on the right only where the signal ends within a stride: in a stream, the
    length of every piece but the last must be a multiple of the stride.
    """

    def __init__(self, c_in, c_out, kernel, stride=1, dilation=1, bias=True, causal=False, edge="constant"):
        self.causal = causal
        self.edge = edge
        self.reach = (kernel - 1) * dilation + 1 - stride  # steps beside its own stride that an output depends on
        zeros = 0 if causal or edge != "constant" else (self.reach + 1) // 2  # torch pads with zeros without a copy
        super().__init__(c_in, c_out, kernel, stride, zeros, dilation, bias=bias)

    def forward(self, x, state):
        n, stride = x.shape[2], self.stride[0]
        left = right = (self.reach + 1) // 2 - self.padding[0]
        if self.causal:
            left, right = self.reach, -n % stride
        lengths = state.lengths
        if self.reach:
            before = state.memory.get(self)
            if before is None and self.causal and self.edge == "constant":
                before = x.new_zeros(*x.shape[:2], left)
            if before is not None:
                x = torch.cat([before, x], 2)
                left = 0
                lengths = None if lengths is None else lengths + self.reach
            if left or right or lengths is not None:
                x = pad(x, left, right, self.edge, lengths)
            if self.causal:
                state.memory[self] = x[..., n : n + self.reach].clone()
        if lengths is not None:
            state.lengths = -(-state.lengths // stride)
        if self.causal and self.dilation == (1,) and len(x) * n <= 128 * stride:
            # for so few steps, torch's convolution spends most of its time on reordering the weights
            windows = x.unfold(2, *self.kernel_size, stride).transpose(1, 2).flatten(2)
            return nn.functional.linear(windows, self.weight.flatten(1), self.bias).transpose(1, 2).contiguous()
        return super().forward(x)


class ConvTranspose(nn.ConvTranspose1d):
    """Transposed convolution (B, C, L) -> (B, C', L * stride), its kernel two strides long. A causal one does not look
    ahead."""

    def __init__(self, c_in, c_out, stride, groups=1, bias=True, causal=False, output_padding=0):
        trim = {} if causal else {"padding": (stride + 1) // 2, "output_padding": output_padding}
        super().__init__(c_in, c_out, 2 * stride, stride, groups=groups, bias=bias, **trim)
        self.causal = causal

    def forward(self, x, state):
        if not self.causal:
            return super().forward(x)
        n, stride = x.shape[2], self.stride[0]
        if self.groups > 1:
            before = state.memory.get(self, x[..., :0])
            state.memory[self] = x[..., -1:].clone()
            x = super().forward(torch.cat([before, x], 2))
            return x[..., before.shape[2] * stride :][..., : n * stride]
        # A step adds to its own stride and to the next one. One product gives both parts, faster than torch's own way
        bias = nn.functional.pad(self.bias[:, None].expand(-1, stride), (0, stride)).flatten()
        x = nn.functional.linear(x.transpose(1, 2), self.weight.flatten(1).T, bias)
        first, second = x.unflatten(2, (-1, 2, stride)).permute(3, 0, 2, 1, 4)  # (B, C', L, stride)
        out = torch.empty_like(first, memory_format=torch.contiguous_format)
        torch.add(first[:, :, 1:], second[:, :, :-1], out=out[:, :, 1:])
        torch.add(first[:, :, 0], state.memory.get(self, 0), out=out[:, :, 0])
        state.memory[self] = second[:, :, -1].clone()
        return out.flatten(2)


class UpsampleConv(Conv):
    """Nearest-neighbour upsampling by two, then a convolution."""

    def forward(self, x, state):
        state.lengths = None if state.lengths is None else 2 * state.lengths
        return super().forward(x.repeat_interleave(2, dim=2), state)


class Snake(nn.Module):
    """x + sin(a x)^2 / a, with a learned a for each channel (Ziyin, Hartwig and Ueda 2020)."""

    def __init__(self, c):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, c, 1))

    def forward(self, x, state=None):
        wave = (self.alpha * x).sin_().square_()
        return torch.addcmul(x, wave, 1 / (self.alpha + 1e-9), out=wave)


class HalfSnake(Snake):
    """Snake for the first half of the channels, leaky ReLU for the others."""

    def __init__(self, c):
        super().__init__(c // 2)

    def forward(self, x, state=None):
        half = self.alpha.shape[1]
        return torch.cat([super().forward(x[:, :half]), nn.functional.leaky_relu(x[:, half:])], 1)


class Chain(nn.Sequential):
    """Layers one after another. Only those of this file take the state."""

    def forward(self, x, state):
        for layer in self:
            x = layer(x) if type(layer).__module__.startswith("torch.") else layer(x, state)
        return x


class Residual(Chain):
    """x + f(x), for a chain f."""

    def forward(self, x, state):
        return super().forward(x, state).add_(x)


class Sum(nn.ModuleList):
    """The sum of parallel layers, times `scale`."""

    def __init__(self, *layers, scale=1):
        super().__init__(layers)
        self.scale = scale

    def forward(self, x, state):
        first, *others = self
        y = first(x, state)
        for layer in others:
            y.add_(layer(x, state))
        return y if self.scale == 1 else y.mul_(self.scale)


class LSTM(nn.LSTM):
    """x + LSTM(x), with two layers: (B, C, L) -> the same."""

    def __init__(self, c):
        super().__init__(c, c, num_layers=2)

    def forward(self, x, state):
        x = x.permute(2, 0, 1)
        y, state.memory[self] = super().forward(x, state.memory.get(self))
        return (x + y).permute(1, 2, 0)


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each with a norm before and a learned scale after it."""

    def __init__(self, width, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.linear1 = nn.Linear(width, 4 * width, bias=False)
        self.linear2 = nn.Linear(4 * width, width, bias=False)
        self.scale1 = nn.Parameter(torch.full((width,), 0.01))
        self.scale2 = nn.Parameter(torch.full((width,), 0.01))

    def forward(self, x, state, rotate, mask):
        q, k, v = self.in_proj(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q), rotate(k)  # (B, heads, L, width / heads)
        if self in state.memory:
            k, v = (torch.cat(pair, 2) for pair in zip(state.memory[self], (k, v), strict=True))
        state.memory[self] = k[:, :, 1 - self.window :], v[:, :, 1 - self.window :]
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.scale1 * self.out_proj(y.transpose(1, 2).flatten(2))
        return x + self.scale2 * self.linear2(nn.functional.gelu(self.linear1(self.norm2(x))))


class Transformer(nn.ModuleList):
    """Causal attention to the last `window` steps, rotary positions, heads of 64: (B, C, L) -> the same."""

    def __init__(self, width, layers, window):
        self.half = min(width, 64) // 2  # of a head's width: rotary positions turn pairs of halves
        super().__init__(TransformerLayer(width, width // (2 * self.half), window) for _ in range(layers))
        self.window = window

    def forward(self, x, state):
        n, seen = x.shape[2], state.memory.get(self, 0)
        state.memory[self] = seen + n
        at = torch.arange(max(0, seen - self.window + 1), seen + n, device=x.device)
        distance = at[-n:, None] - at
        mask = (distance >= 0) & (distance < self.window)
        angle = at[-n:, None] / 10000 ** (torch.arange(self.half, device=x.device) / self.half)
        cos, sin = angle.cos(), angle.sin()

        def rotate(x):
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        x = x.transpose(1, 2)
        for layer in self:
            x = layer(x, state, rotate, mask)
        return x.transpose(1, 2)


class RVQ(nn.Module):
    """Residual vector quantisation of a signal (B, C, T) with K codebooks of V vectors (D,).

    The signal is projected to D channels if C differs.
    """

    def __init__(self, n_codebooks, codebook_size, dims, width):
        super().__init__()
        self.register_buffer("codebooks", torch.zeros(n_codebooks, codebook_size, dims))
        self.register_buffer("squared_norms", torch.zeros(n_codebooks, codebook_size), persistent=False)
        self.register_load_state_dict_post_hook(RVQ.measure)
        self.input_proj = nn.Identity()
        self.output_proj = nn.Identity()
        if width != dims:
            self.input_proj = nn.Conv1d(width, dims, 1, bias=False)
            self.output_proj = nn.Conv1d(dims, width, 1, bias=False)

    def measure(self, _=None):
        """Compute what `encode` needs of the codebooks, after these have changed."""
        self.squared_norms = self.codebooks.square().sum(2)

    def encode(self, x):
        """x (B, C, T) -> codes (B, K, T)."""
        x = self.input_proj(x).transpose(1, 2)
        codes = quantise(x.flatten(0, 1), self.codebooks, self.squared_norms)
        return codes.unflatten(0, x.shape[:2]).transpose(1, 2)

    def decode(self, codes):
        """Codes (B, K, T) -> x (B, C, T)."""
        return self.output_proj(dequantise(codes.transpose(1, 2), self.codebooks).transpose(1, 2))


# -----------------------------------------------------------------------------
# published weights


def plain(weights):
    """Weights in float32, with the older of the two namings of weight normalisation."""
    names = (r"parametrizations\.weight\.original0", "weight_g"), (r"parametrizations\.weight\.original1", "weight_v")
    return {name: x.float() if x.is_floating_point() else x for name, x in rename(weights, *names).items()}


def rename(weights, *names):
    """Weights under other names: each (pattern, replacement) in turn is applied to every name.

    A replacement None leaves out the weights whose names match.
    """
    renamed = {}
    for name, weight in weights.items():
        for pattern, replacement in names:
            if replacement is not None:
                name = re.sub(pattern, replacement, name)
            elif re.search(pattern, name):
                break
        else:
            renamed[name] = weight
    return renamed


def fold_weight_norm(weights):
    """Replace directions v and magnitudes g (Salimans and Kingma 2016) by one weight, v * g / ||v||."""
    folded = {name: x for name, x in weights.items() if not name.endswith(("weight_g", "weight_v"))}
    for name, v in weights.items():
        if name.endswith("weight_v"):
            folded[name[:-2]] = torch._weight_norm(v, weights[f"{name[:-1]}g"], 0)
    return folded


def need_finite(weights):
    """Raise ValueError, which begins with its name, for a tensor that is not plain or not finite."""
    for name, tensor in weights.items():
        if words := fault(tensor):
            raise ValueError(f"{name} {words}")


def strides_of(weights, prefix):
    """The strides of the convolutions below a prefix, in order: their kernels are two strides, all others are odd."""
    kernels = {name: x.shape[2] for name, x in weights.items() if name.startswith(prefix) and x.ndim == 3}
    even = [name for name, kernel in kernels.items() if kernel % 2 == 0]
    return [kernels[name] // 2 for name in sorted(even, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])]


def codebook_count(wanted, found, usual=None):
    """How many codebooks to use: `wanted`, or (None) the usual number, or all that the weights have.

    Raises LookupError for weights without codebooks, ValueError for more than they have.
    """
    if not found:
        raise LookupError("codebooks")
    n = min(usual or found, found) if wanted is None else wanted
    if not 1 <= n <= found:
        raise ValueError(f"n_codebooks = {n}, but the weights have {found}")
    return n


def hub_folders(repository):
    """The folders of a repository in the hub's cache, newest first."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    snapshots = glob(os.path.join(escape(cache), f"models--{repository.replace('/', '--')}", "snapshots", "*"))
    return sorted(snapshots, key=os.path.getmtime, reverse=True)


# -----------------------------------------------------------------------------
# what the published codecs share


UNKNOWN = "unknown"  # the fingerprint of weights that have not been seen yet


class NeuralCodec(Codec):
    """A codec with published weights: encoder, quantizer, decoder. `analyse` and `synthesise` code one piece of a file,
    and the other methods cut files into pieces. A causal half continues from piece to piece. Another half gets
    `encoder_context` or `decoder_context` frames more on both sides, whose results are dropped.

    convert(raw, n_codebooks): published tensors by name -> (state dict, the options that the tensors' shapes show).
    """

    download = ""  # what `hf download` gets: the repository, then files
    files = ("model*.safetensors",)  # patterns of the files of weights, best first; with spaces between: all of them
    encoder_context = 0
    decoder_context = 0
    piece_seconds = 10  # audio in a piece on a CPU; small pieces use the same memory again, large ones allocate it anew
    lookahead = 1  # frames that a stream begins with

    def __init__(self, options, sample_rate, samples_per_frame, n_codebooks, codebook_size):
        # options: the locals() of a constructor, so that defaults are part of the fingerprint too
        super().__init__(**{key: value for key, value in options.items() if key not in ("self", "__class__")})
        self.sample_rate = sample_rate
        self.samples_per_frame = samples_per_frame
        self.frame_rate = sample_rate / samples_per_frame
        self.n_codebooks = n_codebooks
        self.codebook_size = codebook_size
        self.path = ""  # the file or folder of the weights
        self.weights_digest = ""  # their fingerprint, with that of the tensors that were fine-tuned since
        self.tuned = False

    @property
    def streams(self):
        return self.decoder_context == 0

    def analyse(self, wav, state):
        """wav (B, N) -> codes (B, K, T), or a few frames more."""
        return self.quantizer.encode(self.encoder(wav[:, None], state))

    def synthesise(self, codes, state):
        """Codes (B, K, T) -> wav (B, T * samples_per_frame)."""
        return self.decoder(self.quantizer.decode(codes), state)[:, 0]

    def pieces(self, n, x, context):
        """Spans (start, end, first, last) that together cover n frames of a batch x: a piece gives the frames first,
        ..., last - 1 and needs the frames start, ..., end - 1."""
        # a GPU needs larger pieces to be busy, and a batch shares the memory of a piece
        seconds = self.piece_seconds * (1 if x.device.type == "cpu" else 16) / len(x)
        step = max(self.lookahead, int(seconds * self.frame_rate))
        for first in range(0, n, step):
            last = min(first + step, n)
            yield max(0, first - context), min(n, last + context), first, last

    @torch.no_grad()
    def encode(self, wav, lengths=None):
        need_waves(wav)
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=wav.device)
            if bool((lengths == wav.shape[1]).all()):
                lengths = None  # without padding, torch's own convolutions pad, which is faster
        state, size = StreamState(), self.samples_per_frame
        codes = []
        for start, end, first, last in self.pieces(self.frames(wav.shape[1]), wav, self.encoder_context):
            piece = wav[:, start * size : end * size]
            if lengths is not None:
                # a row that ended before this piece keeps one step, since padding cannot mirror an empty row
                state.lengths = (lengths - start * size).clamp(1, piece.shape[1])
                piece = piece * (torch.arange(piece.shape[1], device=wav.device) < state.lengths[:, None])
            codes.append(self.analyse(piece, state)[..., first - start : last - start])
        return torch.cat(codes, 2)

    @torch.no_grad()
    def decode(self, codes):
        self.need_codes(codes)
        state, size = StreamState(), self.samples_per_frame
        wav = torch.empty(len(codes), codes.shape[2] * size, device=codes.device)
        for start, end, first, last in self.pieces(codes.shape[2], codes, self.decoder_context):
            piece = self.synthesise(codes[..., start:end], state)
            wav[:, first * size : last * size] = piece[:, (first - start) * size : (last - start) * size]
        return wav

    @torch.no_grad()
    def encode_stream(self, wavs):
        """Pieces of a waveform (B, n) of any lengths -> pieces of codes (B, K, t), each frame as soon as it is whole, a
        last one that is part silence at the end. Together they are what `encode` gives."""
        state = StreamState()
        for wav in regroup(wavs, self.samples_per_frame, self.lookahead):
            yield self.analyse(wav, state)

    @torch.no_grad()
    def decode_stream(self, codes):
        """Pieces of codes (B, K, t) -> pieces of a waveform (B, n). Together they are what `decode` gives."""
        state = StreamState()
        for piece in regroup(codes, 1, self.lookahead):
            self.need_codes(piece)
            yield self.synthesise(piece, state)

    def pad_to_frame(self, wav, state):
        """wav (B, N) with silence up to the end of its last frame."""
        if state.lengths is not None:
            state.lengths = -(-state.lengths // self.samples_per_frame) * self.samples_per_frame
        return nn.functional.pad(wav, (0, -wav.shape[1] % self.samples_per_frame))

    def need_codes(self, codes):
        if codes.ndim != 3 or not codes.numel() or codes.shape[1] > self.n_codebooks:
            raise ValueError(f"decode takes codes of shape (B, {self.n_codebooks}, T), not {tuple(codes.shape)}")
        low, high = codes.aminmax()
        if not 0 <= low <= high < self.codebook_size:
            raise ValueError(f"decode takes codes from 0 to {self.codebook_size - 1}, not from {low} to {high}")

    @classmethod
    def source(cls, **options):
        """What `hf download` gets for these options: the repository, then files."""
        return cls.download

    @classmethod
    def find(cls, path, source):
        """The files of the weights: `path` itself, those in the folder `path`, or (None) those in the hub's cache.

        Raises FileNotFoundError, which says how to get them.
        """
        if path is not None and os.path.isfile(path):
            return [os.fspath(path)]
        # not hf_hub_download: nothing goes over the network, and the package need not be installed
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
        """The codec with the weights at `path` (see `find`). Raises FileNotFoundError, or ValueError of one line."""
        files = cls.find(path, cls.source(**options))
        where = files[0] if len(files) == 1 else os.path.dirname(files[0])
        raw = {}
        for file in files:
            raw |= read_weights(file, inert="TTS.")[0]  # checkpoints of coqui-TTS hold objects of its config classes
        raw = {name: x for name, x in raw.items() if name.startswith("codec_model.")} or raw  # CSM holds a Mimi
        try:
            weights, sizes = cls.convert(plain(raw), options.get("n_codebooks"))
            need_finite(weights)
            folded = fold_weight_norm(weights)
        except KeyError as error:
            raise ValueError(f"{where}: not the weights of {cls.name}, they lack {error.args[0]}") from None
        except UNBUILT as error:  # tensors of other shapes
            raise ValueError(f"{where}: not the weights of {cls.name} ({reason(error)})") from None
        for key in sizes.keys() & options.keys():
            if sizes[key] != options[key]:
                raise ValueError(f"{where}: has {key} = {sizes[key]}, not {options[key]}")
        with torch.device("meta"):  # no memory for numbers that are replaced at once: files stay shared by processes
            codec = cls.build(where, {**sizes, **options})
        wanted = {name: x for name, x in codec.state_dict().items() if not name.endswith("num_batches_tracked")}
        need_tensors(folded, wanted, f"{where} (for the codec {cls.name})")
        codec.load_state_dict(folded, assign=True)
        codec.path = os.path.abspath(where)
        codec.weights_digest = codec.digest(weights)  # before folding, whose rounding may differ between machines
        return codec.eval().requires_grad_(False)

    @classmethod
    def without_weights(cls, **options):
        """The codec on the meta device, for its sizes, and for codes that somebody else has made."""
        with torch.device("meta"):
            codec = cls(**options)
        codec.options = options
        codec.weights_digest = UNKNOWN
        return codec

    def fingerprint(self):
        return self.weights_digest or super().fingerprint()

    def pack(self):
        """The path of the weights, also as seen from the current folder, and their fingerprint, as a plain dict: the
        weights stay where they are. Tensors that were fine-tuned are in it."""
        known = {"weights": self.path, "fingerprint": self.fingerprint()}
        if self.path:
            known["from_here"] = os.path.relpath(self.path)
        tables = {name: table.detach().cpu().clone() for name, table in self.tuned_tensors().items()}
        return {"name": self.name, "options": dict(self.options), **known, **({"tables": tables} if self.tuned else {})}

    def tuned_tensors(self):
        """The tensors that fine-tuning changes, by name."""
        return {name: x for name, x in self.state_dict().items() if name.startswith(self.tuned_parts)}

    def become_tuned(self):
        """Note that the tensors were fine-tuned, in the fingerprint too."""
        self.tuned = True
        own = self.digest(self.tuned_tensors())
        self.weights_digest = hashlib.sha256(f"{self.weights_digest} {own}".encode()).hexdigest()[:16]

    @classmethod
    def unpack(cls, pack, where, folder=""):
        """The codec of a `pack()`, with its weights from their old place. Where that is gone, the first weights of the
        right fingerprint are taken: those at the old path as it was seen from the current folder, those of the same
        name in `folder`, those in it, those in the hub's cache.

        The pack of codes that somebody else has made fits any weights. Raises FileNotFoundError or ValueError.
        """
        need(pack, {"weights": str, "from_here?": str, "fingerprint": str, "tables?": dict}, where)
        old = pack["weights"]
        if os.path.exists(old):
            return cls.with_weights(old, pack, where)
        moved = [pack.get("from_here"), os.path.join(folder, os.path.basename(old)), folder] if old else []
        moved = list(dict.fromkeys(filter(None, moved)))
        for place in [*filter(os.path.exists, moved), None]:
            try:
                return cls.with_weights(place, pack, where)
            except (FileNotFoundError, ValueError) as error:
                last = error
        gone = f"{old} is gone, its weights are not at {' or '.join(moved)}, and in " if old else ""
        raise FileNotFoundError(f"{where}: {gone}{last}")

    @classmethod
    def with_weights(cls, place, pack, where):
        """The codec of a `pack()` with the weights at a place, None: in the hub's cache. Raises as unpack does."""
        codec = cls.load(place, **pack["options"])
        if pack.get("tables") is not None:
            need_tensors(pack["tables"], codec.tuned_tensors(), f"{where}, tables of {cls.name}")
            codec.load_state_dict(pack["tables"], strict=False, assign=True)
            codec.requires_grad_(False).become_tuned()
        if pack["fingerprint"] not in (UNKNOWN, codec.fingerprint()):
            raise ValueError(f"{codec.path}: not the weights that the codes of {where} were made with")
        return codec


def regroup(pieces, unit, least):
    """Cut pieces anew along their last axis into whole units: at least `least` at first, the rest at the end."""
    held = None
    for piece in pieces:
        held = piece if held is None else torch.cat([held, piece], -1)
        complete = held.shape[-1] // unit * unit
        if complete >= least * unit:
            yield held[..., :complete]
            held = held[..., complete:]
            least = 1
    if held is not None and held.shape[-1]:
        yield held


# -----------------------------------------------------------------------------
# Mimi and EnCodec


CONTAINERS = (r"\.(layers|model|conv|convtr|lstm|transformer|vq|net|quantizers)(?=\.)", "")  # modules around modules


def seanet(width, c, strides, last, conv, residual_unit, middle=None):
    """SEANet's convolutions (Tagliasacchi et al. 2020): an encoder, and the decoder that mirrors it.

    Each stride is a stage that doubles the channels c. `middle` makes a layer between the stages and the code.
    """
    elu = partial(nn.ELU, inplace=True)
    encoder = [conv(1, c, 7)]
    decoder = [elu(), conv(c, 1, last)]
    for stride in strides:
        encoder += [residual_unit(c), elu(), conv(c, 2 * c, 2 * stride, stride)]
        decoder = [elu(), ConvTranspose(2 * c, c, stride, causal=True), residual_unit(c), *decoder]
        c *= 2
    if middle:
        encoder = [*encoder, middle(c)]
        decoder = [middle(c), *decoder]
    return Chain(*encoder, elu(), conv(c, width, last)), Chain(conv(width, c, 7), *decoder)


class Mimi(NeuralCodec):
    """Mimi (Moshi, Defossez et al. 2024): 24 kHz, 12.5 frames/s, up to 32 codebooks of 2048 entries, all causal.

    encoder      conv 1 -> 64; strides 4, 5, 6, 8: residual unit, ELU, conv that doubles the channels; ELU, conv -> 512
    transformer  8 layers at 25 steps/s; conv of stride 2
    codebooks    a semantic one, and 31 acoustic ones that code the same 512 numbers again, each in 256 of its own
    decoder      all this mirrored
    """

    name = "mimi"
    download = "kyutai/mimi model.safetensors"
    files = ("tokenizer-*.safetensors", "model*.safetensors")
    piece_seconds = 4
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

        def residual_unit(c):
            return Residual(nn.ELU(), conv(c, c // 2, 3), nn.ELU(inplace=True), conv(c // 2, c, 1))

        self.encoder, self.decoder = seanet(width, channels, strides, 3, conv, residual_unit)
        self.encoder_transformer = Transformer(width, layers, window)
        self.decoder_transformer = Transformer(width, layers, window)
        self.downsample = conv(width, width, 4, 2, bias=False, edge="replicate")
        self.upsample = ConvTranspose(width, width, 2, groups=width, bias=False, causal=True)
        books = (1, n_codebooks - 1)[:n_codebooks]  # semantic, acoustic
        self.quantizer = nn.ModuleList(RVQ(n, codebook_size, dims, width) for n in books)

    def analyse(self, wav, state):
        x = self.encoder_transformer(self.encoder(wav[:, None], state), state)
        x = self.downsample(x, state)
        return torch.cat([quantizer.encode(x) for quantizer in self.quantizer], 1)

    def synthesise(self, codes, state):
        parts = zip(self.quantizer, (codes[:, :1], codes[:, 1:]), strict=False)
        x = sum(quantizer.decode(part) for quantizer, part in parts if part.shape[1])
        x = self.decoder_transformer(self.upsample(x, state), state)
        return self.decoder(x, state)[:, 0]

    @classmethod
    def convert(cls, raw, n_codebooks=None):
        """Takes transformers' layout and moshi's."""
        w = rename(raw, *cls.names)
        n = codebook_count(n_codebooks, sum(name.endswith("usage") for name in w))
        for i, k in enumerate((1, n - 1)[:n]):
            sums, usages = (torch.stack([w[f"quantizer.{i}.{j}.{x}"] for j in range(k)]) for x in ("sum", "usage"))
            w[f"quantizer.{i}.codebooks"] = sums / usages.clamp(min=1e-5)[..., None]
        w = rename(w, (r"quantizer\.\d\.\d", None), (r"quantizer\.1" if n == 1 else "^$", None))
        for name in [name for name in w if name.endswith("in_proj.weight")]:  # moshi rotates pairs, transformers halves
            pairs = w[name].unflatten(0, (3, -1, 32, 2))
            w[name] = torch.cat([pairs[:2].transpose(2, 3).flatten(0, 3), pairs[2].flatten(0, 2)])
        for name in [name for name in w if name.endswith("q_proj.weight")]:
            qkv = [w.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
            w[name.replace("q_proj", "in_proj")] = torch.cat(qkv)
        _, size, dims = w["quantizer.0.codebooks"].shape
        return w, dict(
            n_codebooks=n, codebook_size=size, dims=dims, width=len(w["downsample.weight"]),
            channels=len(w["encoder.0.bias"]), strides=strides_of(w, "encoder."),
            layers=sum(bool(re.fullmatch(r"encoder_transformer\.\d+\.scale1", name)) for name in w),
        )  # fmt: skip


class EnCodec(NeuralCodec):
    """EnCodec (Defossez et al. 2022): 24 kHz, 75 frames/s, up to 32 codebooks of 1024 entries, all causal.

    encoder    conv 1 -> 32; strides 2, 4, 5, 8: residual unit, ELU, conv that doubles the channels; LSTM, ELU,
               conv -> 128
    codebooks  of 128 numbers each; 8 of them are 6 kbit/s
    decoder    all this mirrored
    """

    name = "encodec"
    download = "facebook/encodec_24khz model.safetensors"
    piece_seconds = 3
    lookahead = 7  # the padding before the first frame mirrors the frames after it
    names = (CONTAINERS, (r"\.block(?=\.)", ".0"), (r"\.shortcut(?=\.)", ".1"),
             (r"codebook\.(inited|cluster_size|embed_avg)", None), (r"_?codebook\.embed", "embed"))  # fmt: skip

    def __init__(self, n_codebooks=8, codebook_size=1024, width=128, channels=32, strides=(2, 4, 5, 8)):
        super().__init__(locals(), 24000, math.prod(strides), n_codebooks, codebook_size)
        conv = partial(Conv, causal=True, edge="reflect")

        def residual_unit(c):
            unit = Chain(nn.ELU(), conv(c, c // 2, 3), nn.ELU(inplace=True), conv(c // 2, c, 1))
            return Sum(unit, conv(c, c, 1))

        self.encoder, self.decoder = seanet(width, channels, strides, 7, conv, residual_unit, middle=LSTM)
        self.quantizer = RVQ(n_codebooks, codebook_size, width, width)

    @classmethod
    def convert(cls, raw, n_codebooks=None):
        """Takes transformers' layout and the original."""
        w = rename(raw, *cls.names)
        n = codebook_count(n_codebooks, sum(name.endswith("embed") for name in w), usual=8)
        books = torch.stack([w[f"quantizer.{i}.embed"] for i in range(n)])
        w = {**rename(w, (r"quantizer\.\d", None)), "quantizer.codebooks": books}
        return w, dict(n_codebooks=n, codebook_size=books.shape[1], width=books.shape[2],
                       channels=len(w["encoder.0.bias"]), strides=strides_of(w, "encoder."))  # fmt: skip


# -----------------------------------------------------------------------------
# DAC


class VectorQuantizer(nn.Module):
    """One codebook of DAC: V entries of few numbers, the nearest found by its angle, for a signal (B, C, T)."""

    def __init__(self, width, codebook_size, dims):
        super().__init__()
        self.in_proj = nn.Conv1d(width, dims, 1)
        self.out_proj = nn.Conv1d(dims, width, 1)
        self.codebook = nn.Embedding(codebook_size, dims)

    def encode(self, x):
        """x (B, C, T) -> codes (B, T)."""
        x = nn.functional.normalize(self.in_proj(x).transpose(1, 2), dim=2)
        entries = nn.functional.normalize(self.codebook.weight)
        return squared_distances(x.flatten(0, 1), entries).argmin(1).view(x.shape[:2])

    def decode(self, codes):
        """Codes (B, T) -> x (B, C, T)."""
        return self.out_proj(self.codebook(codes).transpose(1, 2))


class DAC(NeuralCodec):
    """DAC (Kumar et al. 2023): 44.1 kHz, 86 frames/s, 9 codebooks of 1024 entries; or 24 kHz, 75 frames/s, up to 32.

    encoder    conv 1 -> 64; strides 2, 4, 8, 8 (24 kHz: 2, 4, 5, 8): three residual units of dilations 1, 3, 9, snake,
               conv that doubles the channels; snake, conv
    codebooks  of 8 numbers each
    decoder    conv -> 1536; all this mirrored, with half the channels after each stride; tanh
    """

    name = "dac"
    piece_seconds = 5
    encoder_context = 8
    decoder_context = 10
    rates = {(512, 9): 44100, (320, 32): 24000, (320, 12): 16000}  # published, by samples of a frame and codebooks

    def __init__(self, sample_rate=44100, n_codebooks=9, codebook_size=1024, dims=8, channels=64, decoder_channels=1536,
                 strides=(2, 4, 8, 8)):  # fmt: skip
        super().__init__(locals(), sample_rate, math.prod(strides), n_codebooks, codebook_size)

        def residual_unit(c, dilation):
            return Residual(Snake(c), Conv(c, c, 7, dilation=dilation), Snake(c), Conv(c, c, 1))

        def encoder_block(c, stride):
            units = [residual_unit(c, dilation) for dilation in (1, 3, 9)]
            return Chain(*units, Snake(c), Conv(c, 2 * c, 2 * stride, stride))

        def decoder_block(c, stride):
            units = [residual_unit(c // 2, dilation) for dilation in (1, 3, 9)]
            return Chain(Snake(c), ConvTranspose(c, c // 2, stride), *units)

        *c, width = [channels << i for i in range(len(strides) + 1)]
        blocks = map(encoder_block, c, strides)
        self.encoder = Chain(Conv(1, channels, 7), *blocks, Snake(width), Conv(width, width, 3))
        self.quantizer = nn.ModuleList(VectorQuantizer(width, codebook_size, dims) for _ in range(n_codebooks))
        *c, last = [decoder_channels >> i for i in range(len(strides) + 1)]
        blocks = map(decoder_block, c, reversed(strides))
        self.decoder = Chain(Conv(width, decoder_channels, 7), *blocks, Snake(last), Conv(last, 1, 7), nn.Tanh())

    def analyse(self, wav, state):
        x = self.encoder(self.pad_to_frame(wav, state)[:, None], state)
        codes = []
        for quantizer in self.quantizer:
            codes.append(quantizer.encode(x))
            x = x - quantizer.decode(codes[-1])
        return torch.stack(codes, 1)

    def synthesise(self, codes, state):
        x = sum(quantizer.decode(code) for quantizer, code in zip(self.quantizer, codes.unbind(1), strict=False))
        wav = self.decoder(x, state)[:, 0]  # some samples short if a stride is odd
        return nn.functional.pad(wav, (0, codes.shape[2] * self.samples_per_frame - wav.shape[1]))

    @classmethod
    def source(cls, sample_rate=44100, **options):
        return f"descript/dac_{sample_rate // 1000}khz model.safetensors"

    @classmethod
    def convert(cls, raw, n_codebooks=None):
        """Takes transformers' layout, and the original, which numbers all layers as this class does."""
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
        found = sum(name.endswith("codebook.weight") for name in w)
        n = codebook_count(n_codebooks, found)
        size, dims = w["quantizer.0.codebook.weight"].shape
        w = {name: x for name, x in w.items() if not name.startswith("quantizer") or int(name.split(".")[1]) < n}
        strides = strides_of(w, "encoder.")
        rate = cls.rates.get((math.prod(strides), found))
        return w, dict(
            **{"sample_rate": rate} if rate else {}, n_codebooks=n, codebook_size=size, dims=dims,
            channels=len(w["encoder.0.bias"]), decoder_channels=len(w["decoder.0.bias"]), strides=strides,
        )  # fmt: skip


# -----------------------------------------------------------------------------
# the NeMo codecs


def leaky_relu(c, slope=0.01):
    return nn.LeakyReLU(slope)


def receptive_field_fusion(c, activation, conv):
    """HiFi-GAN's multi-receptive-field fusion (Kong, Kim and Bae 2020): the mean of three chains of residual units."""
    def residual_unit(kernel, dilation):
        return Residual(activation(c), conv(c, c, kernel, dilation=dilation), activation(c), conv(c, c, kernel))

    chains = [Chain(*(residual_unit(kernel, dilation) for dilation in (1, 3, 5))) for kernel in (3, 7, 11)]
    return Sum(*chains, scale=1 / 3)


class FSQ(nn.Module):
    """Finite scalar quantisation (Mentzer et al. 2023): each of d numbers is bounded and rounded to one of its levels;
    the d levels are the digits of a code."""

    def __init__(self, levels):
        super().__init__()
        levels = torch.tensor(levels, device="cpu")[:, None]  # (d, 1)
        bound = (levels - 1) / 2 * (1 - 1e-3)
        offset = 0.5 * (levels % 2 == 0)
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


class NanoCodec(NeuralCodec):
    """NVIDIA's NanoCodec (Casanova et al. 2025): 22.05 kHz, 12.5 frames/s, 4 codebooks of 9 x 8 x 8 x 7 = 4032 codes.

    encoder    conv 1 -> 24; strides 2, 3, 6, 7, 7: fusion, leaky ReLU, conv that doubles the channels; leaky ReLU,
               conv -> 16
    codebooks  of 4 numbers each, rounded
    decoder    causal. conv -> 864; strides 7, 7, 6, 3, 2: half snake, transposed conv from two channels to one, fusion;
               half snake, conv, clipped at 1
    """

    name = "nanocodec"
    download = "nvidia/nemo-nano-codec-22khz-0.6kbps-12.5fps"
    files = ("*.nemo",)
    residual = False
    piece_seconds = 20
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
        # fusions and strides look 62 steps to each side, of all samples before them
        reach = 62 * sum(math.prod(strides[:i]) for i in range(len(strides)))
        self.encoder_context = 4 + math.ceil(reach / self.samples_per_frame)
        self.decoder_context = 0 if self.causal else self.encoder_context
        conv = partial(Conv, edge=self.edge)
        decoder_conv = partial(Conv, causal=True) if self.causal else conv

        def encoder_block(c, stride):
            fusion = receptive_field_fusion(c, leaky_relu, conv)
            return Chain(fusion, leaky_relu(c), conv(c, 2 * c, 2 * stride, stride))

        def decoder_block(c, stride):
            groups = c // 2 if self.causal else 1
            up = ConvTranspose(c, c // 2, stride, groups, causal=self.causal, output_padding=stride % 2)
            return Chain(HalfSnake(c), up, receptive_field_fusion(c // 2, HalfSnake, decoder_conv))

        width = n_codebooks * len(levels)
        *c, last = [channels << i for i in range(len(strides) + 1)]
        blocks = map(encoder_block, c, strides)
        self.encoder = Chain(conv(1, channels, 7), Chain(*blocks), leaky_relu(last), conv(last, width, 7))
        self.quantizer = FSQ(levels)
        *c, last = [decoder_channels >> i for i in range(len(strides) + 1)]
        blocks = map(decoder_block, c, reversed(strides))
        self.decoder = Chain(decoder_conv(width, decoder_channels, 7), Chain(*blocks),
                             HalfSnake(last), decoder_conv(last, 1, 3), nn.Hardtanh())  # fmt: skip

    def analyse(self, wav, state):
        return super().analyse(self.pad_to_frame(wav, state), state)

    @classmethod
    def convert(cls, raw, n_codebooks=None):
        w = rename(raw, *cls.names)
        levels = [w.pop(name).flatten().tolist() for name in list(w) if name.startswith("vector_quantizer")]
        return w, dict(n_codebooks=len(levels), levels=levels[0], channels=len(w["encoder.0.bias"]),
                       decoder_channels=len(w["decoder.0.bias"]), strides=strides_of(w, "encoder."))  # fmt: skip


class AudioCodec44k(NanoCodec):
    """NVIDIA's audio-codec-44khz: 44.1 kHz, 86 frames/s, 8 codebooks of 8 x 5 x 5 x 5 = 1000 codes; not causal.

    As NanoCodec, with strides 2, 4, 8, 8; the encoder begins with 48 channels, the decoder with 768, and its transposed
    convs see all channels.
    """

    name = "audiocodec44k"
    download = "nvidia/audio-codec-44khz"
    piece_seconds = 5
    sample_rate, causal, edge = 44100, False, "reflect"

    def __init__(self, n_codebooks=8, levels=(8, 5, 5, 5), channels=48, decoder_channels=768, strides=(2, 4, 8, 8)):
        super().__init__(n_codebooks, levels, channels, decoder_channels, strides)


# -----------------------------------------------------------------------------
# XTTS


class Condition(nn.Conv1d):
    """Adds a 1x1 convolution of the voice to every step."""

    def forward(self, x, state):
        return x + super().forward(state.voice)


def power(wav, n_fft, hop, window, lengths=None):
    """wav (B, N) -> power spectra (B, F, 1 + N // hop), each centred on a multiple of `hop`."""
    wav = pad(wav[:, None], n_fft // 2, n_fft // 2, "reflect", lengths)[:, 0]
    return torch.stft(wav, n_fft, hop, len(window), window, center=False, return_complex=True).abs().square()


class SEBlock(nn.Module):
    """A residual block with squeeze and excitation (Hu, Shen and Sun 2018): (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, c_in, c, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.bn2 = nn.BatchNorm2d(c)
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
        c = units[0][0]
        layers = []
        self.conv1 = nn.Conv2d(1, c, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(c)
        for i, (c_out, n) in enumerate(units):
            rest = [SEBlock(c_out, c_out) for _ in range(n - 1)]
            layers.append(nn.Sequential(SEBlock(c, c_out, min(2, i + 1)), *rest))
            c = c_out
        self.layers = nn.Sequential(*layers)
        self.attention = nn.Sequential(nn.Conv1d(8 * c, attention, 1), nn.ReLU(), nn.BatchNorm1d(attention),
                                       nn.Conv1d(attention, 8 * c, 1), nn.Softmax(2))  # fmt: skip
        self.fc = nn.Linear(16 * c, width)
        self.register_buffer("filters", mel_filters(64, 512, 16000), persistent=False)
        self.register_buffer("window", torch.hamming_window(400, device="cpu"), persistent=False)

    def forward(self, wav):
        before = nn.functional.pad(wav[:, None], (1, 0), "reflect")[:, 0, :-1]
        bands = self.filters.T @ power(wav - 0.97 * before, 512, 160, self.window)  # after pre-emphasis
        x = nn.functional.instance_norm((bands + 1e-6).log())
        x = self.layers(self.bn1(self.conv1(x[:, None]).relu())).flatten(1, 2)  # (B, 8 C, t)
        weight = self.attention(x)
        mean = (x * weight).sum(2)
        deviation = ((x.square() * weight).sum(2) - mean.square()).clamp(min=1e-5).sqrt()
        return self.fc(torch.cat([mean, deviation], 1))


class XTTS(NeuralCodec):
    """The codec of XTTS (Casanova et al. 2024): 22.05 kHz, 21.5 frames/s, one codebook of 1024 entries.

    encoder    80 log-mel bands at a hop of 256, each divided by its usual size; conv -> 512 and -> 1024, both of stride
               2; three residual units; conv -> 512
    codebook   of 512 numbers
    decoder    all this mirrored
    vocoder    HiFi-GAN with strides 8, 8, 2, 2: the GPT's hidden states (B, T, 1024) and a voice (B, 512) -> waveform
    speaker    a recording -> its voice

    The system speaks with `vocode`. Codes alone give mel bands, and `decode` makes a waveform of these by Griffin-Lim.
    `fit` adapts encoder, codebook and decoder to other recordings.
    """

    name = "xtts"
    download = "coqui/XTTS-v2 dvae.pth mel_stats.pth model.pth"
    files = ("dvae.pth mel_stats.pth model.pth",)
    piece_seconds = 60
    encoder_context = 16
    decoder_context = 16
    reference_shape = (4, 80)
    tuned_parts = ("encoder.", "quantizer.", "decoder.")
    fit_piece = 256  # mel frames, 3 s
    fit_batch = 32  # pieces
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
        leaky = partial(leaky_relu, slope=0.1)

        def residual_unit(c):
            return Residual(Conv(c, c, 3), nn.ReLU(), Conv(c, c, 3), nn.ReLU(), Conv(c, c, 1))

        def vocoder_block(c, stride):
            up = Chain(ConvTranspose(c, c // 2, stride), Condition(voice, c // 2, 1))
            return Chain(leaky(c), up, receptive_field_fusion(c // 2, leaky, Conv))

        c = 2 * hidden
        self.encoder = Chain(
            Chain(Conv(80, hidden, 3, 2), nn.ReLU()), Chain(Conv(hidden, c, 3, 2), nn.ReLU()),
            residual_unit(c), residual_unit(c), residual_unit(c), Conv(c, dims, 1),
        )  # fmt: skip
        self.quantizer = RVQ(1, codebook_size, dims, dims)
        self.decoder = Chain(
            Conv(dims, c, 1), residual_unit(c), residual_unit(c), residual_unit(c),
            Chain(UpsampleConv(c, c, 3), nn.ReLU()), Chain(UpsampleConv(c, hidden, 3), nn.ReLU()), Conv(hidden, 80, 1),
        )  # fmt: skip
        *c, last = [channels >> i for i in range(len(strides) + 1)]
        self.vocoder = Chain(
            Chain(Conv(latents, channels, 7), Condition(voice, channels, 1)), Chain(*map(vocoder_block, c, strides)),
            nn.LeakyReLU(0.01), Conv(last, 1, 7, bias=False), nn.Tanh(),
        )  # fmt: skip
        self.speaker = SpeakerEncoder(units, attention, width)
        self.register_buffer("mel_stats", torch.ones(80))
        self.register_buffer("window", torch.hann_window(1024, device="cpu"), persistent=False)
        for n_fft in (1024, 2048):
            filters = mel_filters(80, n_fft, 22050, highest=8000, area=True)
            self.register_buffer(f"filters{n_fft}", filters, persistent=False)

    def mel(self, wav, n_fft, lengths=None):
        """wav (B, N) -> log-mel bands (B, 80, 1 + N // 256), from spectra of n_fft = 1024 or 2048 samples."""
        filters = self.filters1024 if n_fft == 1024 else self.filters2048
        bands = filters.T @ power(wav, n_fft, 256, self.window, lengths)
        return bands.clamp(min=1e-5).log() / self.mel_stats[:, None]

    def fit(self, wavs, seed=0, epochs=5, learning_rate=5e-6, say=print):
        """Fine-tune encoder, codebook and decoder on recordings, an iterable of (N,). Returns the codec.

        As guides for new languages do it (train_dvae_xtts.py of XTTSv2-Finetuning-for-New-Languages): Adam, gradients
        clipped to a norm of 0.5, the squared error of the mel bands plus that between encoder and codebook, whose
        entries follow the means of the vectors that they code. Batches are smaller than there (512 recordings), so that
        there are more steps. say(line): is told the errors. Raises ValueError without recordings.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            pieces = [piece for wav in wavs for piece in self.mel_pieces(wav.to(self.mel_stats.device))]
        if not pieces:
            raise ValueError("the codec xtts was given no recordings to be fitted on")
        trained = [*self.encoder.parameters(), *self.decoder.parameters()]
        for p in trained:
            p.data = p.data.clone()  # the file may be mapped into memory
            p.requires_grad = True
        optimizer = torch.optim.Adam(trained, learning_rate)
        means = None
        for epoch in range(epochs + 1):  # the first one only measures
            errors = torch.zeros(2)
            for chosen in torch.randperm(len(pieces), generator=generator).split(self.fit_batch):
                with torch.set_grad_enabled(epoch > 0):
                    recon, commitment, vectors, codes = self.losses([pieces[i] for i in chosen])
                errors += len(chosen) / len(pieces) * torch.stack([recon, commitment]).detach().cpu()
                if epoch:
                    (recon + commitment).backward()
                    nn.utils.clip_grad_norm_(trained, 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
                means = self.follow(means, vectors, codes, self.fit_batch / len(pieces), move=epoch > 0)
            when = f"in epoch {epoch}" if epoch else "as published"
            say(f"{self.name} {when}: error of the mel bands {errors[0]:.4f}, of the codebook {errors[1]:.4f}")
        self.requires_grad_(False).become_tuned()
        return self

    def mel_pieces(self, wav):
        """The mel bands of wav (N,) as the encoder reads them, in pieces (l, 80) of whole frames."""
        mel = self.mel(wav[None], 1024)[0].T
        return [piece for piece in mel[: len(mel) // 4 * 4].split(self.fit_piece) if len(piece)]

    def losses(self, pieces):
        """Mean squared errors of the mel bands and of the codebook, vectors (n, D) that were coded, and codes (n,)."""
        mel = nn.utils.rnn.pad_sequence(pieces, batch_first=True)  # (B, L, 80)
        state = StreamState()
        state.lengths = lengths = torch.tensor([len(piece) for piece in pieces], device=mel.device)
        x = self.encoder(mel.mT, state)  # (B, D, T)
        with torch.no_grad():
            codes = self.quantizer.encode(x)
            quantised = self.quantizer.decode(codes)
        bands = self.decoder(x + (quantised - x).detach(), state).mT  # the gradient passes the codebook by
        heard = torch.arange(mel.shape[1], device=mel.device) < lengths[:, None]
        coded = heard[:, ::4]
        vectors = x.mT[coded]
        recon = (bands - mel)[heard].square().mean()
        return recon, (quantised.mT[coded] - vectors).square().mean(), vectors.detach(), codes[:, 0][coded]

    @torch.no_grad()
    def follow(self, means, vectors, codes, share, move):
        """Add vectors (n, D) of the entries `codes` (n,) to the running means of the codebook's entries, and `move` the
        codebook there. means: sizes (V, 1) and sums (V, D), None at first. Without `move` they are counted, where the
        batch is this share of all. An entry without vectors stays."""
        codebook = self.quantizer.codebooks[0]
        if means is None:
            sizes = torch.ones(len(codebook), 1, device=codebook.device)
            means = sizes, codebook.clone()
        hits = nn.functional.one_hot(codes, len(codebook)).to(vectors)
        new = hits.sum(0)[:, None], hits.T @ vectors
        if not move:
            return means[0] + share * new[0], means[1] + share * new[0] * codebook
        sizes, sums = (0.99 * old + 0.01 * x for old, x in zip(means, new, strict=True))
        self.quantizer.codebooks = torch.where(sizes > 1e-5, sums / sizes, codebook)[None]
        self.quantizer.measure()
        return sizes, sums

    @torch.no_grad()
    def reference(self, wav, padded=True):
        """The mel bands from which the GPT reads a voice, four rows a frame: wav (B, N) -> (B, 4 T, 80); not padded, as
        its authors read a recording, (B, 1 + N // 256, 80)."""
        if not padded:
            return self.mel(wav, 2048).transpose(1, 2)
        return self.mel(self.pad_to_frame(wav, StreamState()), 2048)[..., :-1].transpose(1, 2)

    @torch.no_grad()
    def timbre(self, wav):
        """The voice in the first 30 s of a recording: wav (B, N) -> (B, 512), of length 1."""
        wav = resample(wav[:, : 30 * self.sample_rate], self.sample_rate, 16000, zeros=6, rolloff=0.99, beta=0)
        return nn.functional.normalize(self.speaker(wav), dim=1)

    @torch.no_grad()
    def vocode(self, latents, voice):
        """The GPT's hidden states (B, T, C), one a frame, and a voice (B, 512) -> wav (B, n) at `vocoder_rate`."""
        x = nn.functional.interpolate(latents.transpose(1, 2), scale_factor=4, mode="linear")
        x = nn.functional.interpolate(x, scale_factor=self.vocoder_rate / self.sample_rate, mode="linear")
        return self.vocoder(x, StreamState(voice[:, :, None]))[:, 0]

    def analyse(self, wav, state):
        x = self.mel(wav, 1024, state.lengths)
        state.lengths = None if state.lengths is None else 1 + state.lengths // 256
        return self.quantizer.encode(self.encoder(x, state))

    def synthesise(self, codes, state):
        x = self.decoder(self.quantizer.decode(codes), state) * self.mel_stats[:, None]
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
            channels=len(w["vocoder.0.0.bias"]), strides=strides_of(w, "vocoder."),
            units=[(len(w[norm.format(0)]), sum(norm.format(j) in w for j in range(99))) for norm in norms],
            attention=len(w["speaker.attention.0.bias"]), width=len(w["speaker.fc.bias"]),
        )  # fmt: skip


# -----------------------------------------------------------------------------
# by name


CODECS = {codec.name: codec for codec in (Mel, Mimi, EnCodec, DAC, NanoCodec, AudioCodec44k, XTTS)}
PUBLISHED = [name for name, codec in CODECS.items() if issubclass(codec, NeuralCodec)]


@lru_cache
def published_sizes(name):
    """The sizes of a published codec, without its weights, as in meta.json: a dict that callers share and must not
    change. `reference`: only for a codec from whose features a model reads a voice."""
    codec = CODECS[name].without_weights()
    sizes = codec.sizes()
    if codec.reference:
        rows, bands = codec.reference_shape
        sizes["reference"] = {"rows_per_frame": rows, "silence": [0.0] * bands}
    return sizes


def load_codec(name, path=None, folder="", **options):
    """The codec called `name`, ready to use.

    path: a codec.pt, the folder that holds one, or the dict of `pack()`; for a published codec also the file or folder
    of its weights, as its authors published them. None: `mel` is not fitted yet, and the others take their weights
    from the hub's cache folder; nothing is fetched. folder: where such a dict was read. options: the codec's own.
    Raises ValueError or FileNotFoundError, one line.
    """
    if name not in CODECS:
        raise ValueError(f"no codec is called {name!r:.60}; choose from {', '.join(CODECS)}")
    cls = CODECS[name]
    published = name in PUBLISHED
    known = inspect.signature(cls).parameters
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
        folder = os.path.dirname(where)
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
    return cls.unpack(pack, where, folder)


def read_pack(path):
    """The dict of a codec.pt. Raises FileNotFoundError or ValueError, one line."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such codec table")
    if not undamaged(path):
        raise ValueError(f"{path}: not a codec table, or damaged: it is {what_is(path)} without the checksums of one")
    try:
        return unpickle(path)
    except Exception as error:  # torch.load fails in many ways on files of other kinds
        raise ValueError(f"{path}: not a codec table") from error


# -----------------------------------------------------------------------------
# the command

COLUMNS = [
    {"name": "kHz", "better": "", "meaning": "sample rate"},
    {"name": "codebooks", "better": "", "meaning": "codes in a frame"},
    {"name": "codebook size", "better": "", "meaning": "values of a code"},
    {"name": "frames/s", "better": "", "meaning": "frame rate"},
    {"name": "bit/s", "better": "", "meaning": "what the codes need"},
]


def round_trip(codec, source, target):
    """Write what a codec makes of the recording `source` to `target`, a wav file. Returns {column: its number}."""
    wav = read_audio(source, codec.sample_rate)
    if not codec.fitted:
        print(f"no --codec_path: fitting {codec.name} on {source} itself")
        codec.fit([wav])
    codes = codec.encode(wav[None])
    write_audio(target, codec.decode(codes)[0, : len(wav)], codec.sample_rate)
    n = codec.n_codebooks
    bits = n * math.log2(codec.codebook_size) * codec.frame_rate
    print(f"{codec.name}: {codes.shape[2]} frames of {n} codes, {codec.frame_rate:g} frames/s, {bits:.0f} bit/s")
    return {"kHz": codec.sample_rate / 1000, "codebooks": n, "codebook size": codec.codebook_size,
            "frames/s": codec.frame_rate, "bit/s": bits}  # fmt: skip


def compare(source, target):
    """A round trip of a recording through each codec whose weights are here, and a page to compare them by ear."""
    stem, end = os.path.splitext(target)
    write_audio(f"{stem}.recording{end}", read_audio(source, 44100), 44100)
    models = [{"name": "recording"}]
    for name in CODECS:
        try:
            numbers = round_trip(load_codec(name), source, f"{stem}.{name}{end}")
            models.append({"name": name, "numbers": numbers})
        except FileNotFoundError as error:
            print(error)
    audio = {model["name"]: os.path.basename(f"{stem}.{model['name']}{end}") for model in models}
    title = os.path.basename(source)
    write_page(f"{stem}.html", {"title": title, "columns": COLUMNS, "models": models,
                                "sentences": [{"id": title, "audio": audio}]})  # fmt: skip
    print(f"{stem}.html: to listen to them")


def main():
    parser = argparse.ArgumentParser(description="Send a recording through a codec and back, to hear what it keeps.")
    parser.error = lambda message: sys.exit(f"error: {message}")
    parser.add_argument("input", help="a recording that soundfile reads: wav, flac, ogg, mp3, ...")
    parser.add_argument("output", help="a wav file")
    names = f"one of: {', '.join(CODECS)} (default: mel); all: every codec whose weights are here, and a page"
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

"""The models: text ids and codec frames in, a loss or new frames out.

All families share one transformer. A family adds how the K codebooks of a frame are predicted:

    CSM    Sesame CSM, Marvis TTS: a backbone predicts codebook 0 of the next frame, a small depth decoder runs along
           the codebook axis for the other K - 1. The depth decoder trains on a random fraction of the frames.
    Kani   KaniTTS and KaniTTS-2: text and codes are one vocabulary, a frame is K tokens in a row, and one head, tied
           to the embedding, predicts the next token.
    XTTS   the GPT of XTTS-v2: K = 1. Latents of a recording of the voice come before text and codes.
    VallE  VALL-E v2: all K codebooks at once from one hidden state; either frame by frame, or all frames in a few
           rounds of demasking.

Notable features:
- pre-norm RMSNorm, grouped-query attention, rotary positions (with llama-3 frequency scaling), SwiGLU, no biases; where
  a published model differs (LFM2, GPT-2, VALL-E), a field of its config says so
- a static key/value cache sized up front; one code path for training, prefill and single steps
- `Family` is the contract of all four families; `layout` makes rows of an utterance for training and generation alike
- `contract_check` compares teacher forcing with cached generation before a model is trained or speaks
- `multi_codebook_cross_entropy`, last in the file, is the only loss: it never holds all logits or all their gradient

Letters in shapes: B batch, S rows, K codebooks, C columns, T frames, D width, H heads, V classes, N frames of a batch,
n of one chunk of it, L latents, R rows and M bands of a reference.
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from parts.configurator import check_fields
from parts.draw import mix, sample_code
from parts.segment import AUDIO, PAD, PROMPT, TEXT
from parts.tensors import fault

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this machine: the loss uses the kernel's PyTorch twin
    triton = None

IGNORE = -100


# ---------------------------------------------------------------------------------------------------------------------
# the transformer


def fixed(default, mode=None):
    """A field of a config that is a key of train.py. Trained weights fix it. mode: the only mode of the family in which
    it has an effect."""
    return field(default=default, kw_only=True, metadata={"key": "fixed", "mode": mode})


def free(default, mode=None, judges=False):
    """A field of a config that is a key of train.py and may change from run to run; `mode` as for `fixed`. judges:
    held-out losses before and after a change cannot be compared."""
    return field(default=default, kw_only=True, metadata={"key": "free", "mode": mode, "judges": judges})


@dataclass
class TransformerConfig:
    n_layer: "1 <= int <= 1000"
    n_head: "1 <= int <= 10000"
    n_kv_head: "1 <= int <= 10000"
    d_model: "1 <= int <= 100000"
    d_ff: "1 <= int <= 1000000"
    head_dim: "0 <= int <= 100000" = 0  # 0: d_model / n_head
    max_positions: "1 <= int <= 10000000" = 2048
    rope_theta: "float >= 0" = 500_000.0  # 0: no rotary positions
    rope_scaling: "tuple | None > 0" = None  # llama 3: factor, low and high frequency factor, original context
    norm_eps: "0 <= float < 1" = 1e-5
    layers: str = ""  # a letter each: "a" attention, "c" gated short convolution (LFM2); empty: attention throughout
    feed_forward: Literal["swiglu", "geglu", "gelu"] = "swiglu"  # geglu: VALL-E, gelu: GPT-2
    bias: bool = False  # biases throughout, and LayerNorm for RMSNorm (GPT-2)
    qk_norm: bool = False  # RMSNorm over each head of queries and keys, before they are rotated
    rotation_speed: "tuple | None > 0" = None  # each attention layer learns its speed between these two; None: 1
    final_norm: bool = True
    dropout: "0 <= float < 1" = 0.0  # on the output of attention and feed-forward layer
    recompute: bool = False  # gradient checkpointing of each block


LLAMA3_ROPE = (32.0, 1.0, 4.0, 8192)
LFM2 = dict(rope_theta=1_000_000.0, qk_norm=True)
GPT2 = dict(rope_theta=0.0, feed_forward="gelu", bias=True)
VALLE = dict(rope_theta=10_000.0, feed_forward="geglu", final_norm=False, norm_eps=1e-6)
LFM2_350M = dict(n_layer=16, n_head=16, n_kv_head=8, d_model=1024, d_ff=4608, layers="ccaccaccacacacac", **LFM2)
PRESETS = {
    "llama-1B": dict(n_layer=16, n_head=32, n_kv_head=8, d_model=2048, d_ff=8192, rope_scaling=LLAMA3_ROPE),
    "llama-250M": dict(n_layer=6, n_head=12, n_kv_head=3, d_model=1536, d_ff=8192, rope_scaling=LLAMA3_ROPE),
    "llama-100M": dict(n_layer=4, n_head=8, n_kv_head=2, d_model=1024, d_ff=8192, rope_scaling=LLAMA3_ROPE),
    "llama-60M": dict(n_layer=4, n_head=8, n_kv_head=2, d_model=1024, d_ff=4096, rope_scaling=LLAMA3_ROPE),
    "lfm2-350M": LFM2_350M,
    "lfm2-kani2": dict(rotation_speed=(0.1, 2.0), **LFM2_350M),
    "gpt2-xtts": dict(n_layer=30, n_head=16, n_kv_head=16, d_model=1024, d_ff=4096, **GPT2),
    "valle-60M": dict(n_layer=12, n_head=8, n_kv_head=8, d_model=512, d_ff=2048, **VALLE),
    "valle-400M": dict(n_layer=24, n_head=16, n_kv_head=16, d_model=1024, d_ff=4096, **VALLE),
}


def transformer_config(given, dropout=None, recompute=None, **overrides):
    """A TransformerConfig from a preset's name, a dict of its fields, or another TransformerConfig.

    overrides replace fields; so do dropout and recompute, unless they are None. Raises ValueError for an unknown preset
    and impossible sizes.
    """
    if dropout is not None:
        overrides["dropout"] = dropout
    if recompute is not None:
        overrides["recompute"] = recompute
    if isinstance(given, TransformerConfig):
        given = asdict(given)
    if isinstance(given, str):
        if given not in PRESETS:
            raise ValueError(f"unknown preset {given!r:.60}; choose from {', '.join(PRESETS)}, or give a dict of sizes")
        given = PRESETS[given]
    try:
        c = TransformerConfig(**{**given, **overrides})
    except TypeError as e:
        raise ValueError(f"transformer sizes {given!r:.200}: {str(e).split(') ')[-1]:.100}") from None
    check_fields(c)
    if not c.head_dim and c.d_model % c.n_head:
        raise ValueError(f"d_model = {c.d_model} is not a multiple of n_head = {c.n_head}: give head_dim")
    c.head_dim = c.head_dim or c.d_model // c.n_head
    c.rope_scaling = c.rope_scaling and tuple(c.rope_scaling)
    if c.rope_scaling and len(c.rope_scaling) != 4:
        raise ValueError(f"rope_scaling = {c.rope_scaling!r:.60} must have 4 numbers, as {LLAMA3_ROPE}")
    c.rotation_speed = c.rotation_speed and tuple(c.rotation_speed)
    if c.rotation_speed and (len(c.rotation_speed) != 2 or c.rotation_speed[0] > c.rotation_speed[1]):
        raise ValueError(f"rotation_speed = {c.rotation_speed!r:.60} must be the slowest and the fastest: (0.1, 2.0)")
    if c.rotation_speed and not c.rope_theta:
        raise ValueError(f"rotation_speed = {c.rotation_speed} needs rotary positions, not rope_theta = 0")
    c.layers = c.layers or "a" * c.n_layer
    if len(c.layers) != c.n_layer or set(c.layers) - set("ac"):
        raise ValueError(f"layers = {c.layers!r:.60} must have one letter, a or c, for each of {c.n_layer} layers")
    if c.n_head % c.n_kv_head or c.head_dim % 2:
        raise ValueError(f"{c.n_head} heads over {c.n_kv_head} key/value heads of width {c.head_dim}: "
                         "the first must be a multiple of the second, and the width must be even")
    return c


def rope_angles(c, positions):
    """Angles (..., head_dim / 2) float32 of rotary positions (...) (Su et al. 2021), with llama 3's scaling. A position
    may be a fraction.

    Wavelengths beyond the original context are stretched by `factor`, those well inside it stay, between them the two
    are blended (Llama 3.1).
    """
    # in float32, as the released models were trained: exact angles differ from these by 3e-4 at position 2047
    even = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device=positions.device)
    frequency = 1 / c.rope_theta ** (even / c.head_dim)
    if c.rope_scaling:
        factor, low, high, original = c.rope_scaling
        rounds = original * frequency / (2 * math.pi)  # full rotations within the original context
        blend = ((rounds - low) / (high - low)).clamp(0, 1)
        frequency = (1 - blend) * frequency / factor + blend * frequency
    return positions.float()[..., None] * frequency


def turns(angles):
    """What `rotate` multiplies by, (2, ..., head_dim), of angles (..., head_dim / 2)."""
    sines = angles.sin()
    return torch.stack([torch.cat([angles.cos()] * 2, -1), torch.cat([-sines, sines], -1)])


def rotate(x, table):
    """Rotate the pairs (j, j + head_dim / 2) of x (B, H, S, head_dim) by a table of two ([B, 1,] S, head_dim), see
    `turns`."""
    cosines, sines = table
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines)


TAPS = 3  # of the short convolution


class Cache:
    """Keys and values of the earlier rows of B sequences: static buffers, sized up front and written in place.

    `memory` holds for each attention layer its keys and values (2, B, n_kv_head, length, head_dim), for each short
    convolution its last inputs (1, B, D, TAPS - 1). `used` counts the stored rows of each sequence, (B,), or is one
    number for all. The transformer advances it when all layers have stored theirs.
    """

    def __init__(self, config, memory, used=0):
        self.config = config
        self.memory = memory
        self.used = used
        self.layers = [x.unbind() for x in memory]

    @classmethod
    def new(cls, config, batch, length, device, dtype):
        attention = (2, batch, config.n_kv_head, length, config.head_dim)
        convolution = (1, batch, config.d_model, TAPS - 1)
        shapes = [attention if letter == "a" else convolution for letter in config.layers]
        return cls(config, [zeros(shape, device, dtype) for shape in shapes])

    def part(self, places, used=None):
        """The cache of these sequences alone, a slice, on the same memory. used: None: its own part of `used`."""
        if used is None:
            used = self.used if isinstance(self.used, int) else self.used[places]
        return Cache(self.config, [x[:, places] for x in self.memory], used)

    def clear(self):
        """Forget all rows."""
        self.used = 0
        for letter, memory in zip(self.config.layers, self.memory, strict=True):
            if letter == "c":
                memory.zero_()

    def snapshot(self):
        """A copy of what is stored, for `restore`. All sequences must have as many rows."""
        return self.used, [x[..., : self.used, :].clone() if letter == "a" else x.clone()
                           for letter, x in zip(self.config.layers, self.memory, strict=True)]  # fmt: skip

    def restore(self, snapshot):
        self.used, kept = snapshot
        for letter, memory, x in zip(self.config.layers, self.memory, kept, strict=True):
            (memory[..., : self.used, :] if letter == "a" else memory).copy_(x)

    def next(self, S):
        """The numbers of the next S rows, and how many rows there are then to read. The numbers are a slice where all
        sequences have as many rows and the host can see that without waiting for a GPU, else (B, S)."""
        start = self.used
        if not isinstance(start, int) and _can_look(start):
            least, most = start.aminmax()
            start = int(most) if least == most else start
        if isinstance(start, int):
            return slice(start, start + S), start + S
        rows = start[:, None] + torch.arange(S, device=start.device)
        if _can_look(rows):
            return rows, int(rows.max()) + 1
        length = self.memory[self.config.layers.index("a")].shape[-2]
        return rows.clamp(max=length - 1), length  # all are read, and rows beyond the last are written there

    def extend(self, layer, k, v, rows, end):
        """Store the keys and values (B, H, S, head_dim) of new rows, whose numbers are a slice or (B, S); return those
        of the rows below `end`."""
        keys, values = self.layers[layer]
        if isinstance(rows, slice):
            keys[:, :, rows] = k
            values[:, :, rows] = v
        else:
            place = torch.arange(len(k), device=k.device)[:, None]
            keys[place, :, rows] = k.transpose(1, 2)
            values[place, :, rows] = v.transpose(1, 2)
        return keys[:, :, :end], values[:, :, :end]

    def lead(self, layer, x):
        """The new inputs x (B, D, S) of a convolution, with the TAPS - 1 inputs before them in front."""
        (before,) = self.layers[layer]
        x = torch.cat([before, x], -1)
        before.copy_(x[..., 1 - TAPS :])
        return x


def zeros(shape, device, dtype):
    """torch.zeros, on a CPU without touching the memory: a long cache costs nothing until it is written to."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


SMALL = 2**20  # elements: recomputing smaller tensors costs a tenth of a small model's step and saves little memory


def recompute(function, *inputs, least=0):
    """function(*inputs) with gradient checkpointing: only the inputs are kept, the backward pass recomputes the rest.

    Inputs with fewer than `least` elements are not worth it: then all is kept.
    """
    if torch.is_grad_enabled() and inputs[0].numel() >= least:
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


def in_chunks(function, size, inputs, parameters):
    """The sum of function(*chunk) over chunks of the rows of `inputs`, at most `size` rows each.

    function returns tensors that add up over rows. The first, a scalar, has a gradient to the inputs and to the trained
    `parameters`. It is formed in the forward pass, like that of the loss, so that the activations of a chunk are freed
    before the next one; the backward pass, which can run once, only multiplies by the gradient of the sum. Gradient
    checkpointing would bound the memory too, but runs each chunk forward twice. In float16 all rows are one chunk,
    because gradients must be scaled before they are formed.
    """
    rows = len(inputs[0])
    half = _product_type(inputs[0]) == torch.float16
    parameters = [p for p in parameters if p.requires_grad]
    trained = torch.is_grad_enabled() and (parameters or any(x.requires_grad for x in inputs))
    if rows <= size or (trained and half):
        return function(*inputs)
    size = math.ceil(rows / math.ceil(rows / size))  # chunks of nearly equal size
    if trained:
        return _InChunks.apply(function, size, len(inputs), *inputs, *parameters)
    chunks = zip(*(x.split(size) for x in inputs), strict=True)
    return [sum(numbers) for numbers in zip(*(function(*chunk) for chunk in chunks), strict=True)]


class _InChunks(torch.autograd.Function):
    """`in_chunks` for training: sums over chunks, and gradients to inputs and parameters."""

    @staticmethod
    def forward(ctx, function, size, n, *tensors):
        inputs, parameters = tensors[:n], tensors[n:]
        wanted = ctx.needs_input_grad[3:]
        sums = [torch.zeros_like(p) for p in parameters]
        totals = []
        by_chunk = []
        device = inputs[0].device.type if inputs[0].device.type != "meta" else "cpu"  # autocast knows no meta

        def add(grad, to):
            to += grad
            return grad.new_zeros(()).expand_as(grad)  # the gradient itself is freed at once, not at the chunk's end

        hooks = [p.register_hook(partial(add, to=to)) for p, to in zip(parameters, sums, strict=True)]
        try:
            for chunk in zip(*(x.split(size) for x in inputs), strict=True):
                with torch.enable_grad():
                    chunk = [x.detach().requires_grad_(w) for x, w in zip(chunk, wanted, strict=False)]
                    numbers = function(*chunk)
                    leaves = [x for x in chunk if x.requires_grad]
                    with torch.autocast(device, enabled=False):  # a backward pass takes the types of the forward pass
                        grads = torch.autograd.grad(numbers[0], [*leaves, *parameters])
                by_chunk.append(grads[: len(leaves)])
                totals = [total + x.detach() for total, x in zip(totals or [0] * len(numbers), numbers, strict=True)]
                del numbers, grads  # frees the chunk's graph before the next one is made
        finally:
            for hook in hooks:
                hook.remove()
        of_inputs = iter([torch.cat(grads) for grads in zip(*by_chunk, strict=True)])
        ctx.grads = [next(of_inputs) if w else None for w in wanted[:n]] + sums
        ctx.mark_non_differentiable(*totals[1:])
        return tuple(totals)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, factor, *_):
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("gradients in chunks allow only one backward pass: set decoder_chunk=0 for more")
        if not (_can_look(factor) and factor == 1):
            for grad in grads:
                _multiply(grad, factor.view(1), 0)
        return None, None, None, *grads


class RMSNorm(nn.RMSNorm):
    """torch's, in the type of x, for which a GPU has a kernel. On a CPU it is several operations, which would keep two
    more copies of x in float32; so a large x is recomputed there. A single row takes fewer operations."""

    def forward(self, x):
        D = x.shape[-1]
        if x.numel() == D and x.dtype == torch.float32 and _can_look(x) and not torch.is_grad_enabled():
            row = x.reshape(-1)
            return (x * self.weight).mul_((row.dot(row).item() / D + self.eps) ** -0.5)
        inputs = x, self.normalized_shape, self.weight.to(x.dtype), self.eps
        return F.rms_norm(*inputs) if x.is_cuda else recompute(F.rms_norm, *inputs, least=SMALL)


def norm(c):
    return (nn.LayerNorm if c.bias else RMSNorm)(c.d_model, c.norm_eps)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions: causal, or with a mask.

    rope: what `rotate` multiplies by, two ([B, 1,] S, head_dim); angles ([B, 1,] S, head_dim / 2) where the layer
    learns the speed at which it turns (KaniTTS-2).
    """

    together = ("q_proj", "k_proj", "v_proj")  # one product where weights are packed, see parts/packed.py
    watch = None  # a function of queries and keys (B, H, S, head_dim), while Family.attention looks

    def __init__(self, c):
        super().__init__()
        self.joined = None
        self.head_dim = c.head_dim
        self.grouped = c.n_kv_head != c.n_head
        self.q_proj = nn.Linear(c.d_model, c.n_head * c.head_dim, bias=c.bias)
        self.k_proj = nn.Linear(c.d_model, c.n_kv_head * c.head_dim, bias=c.bias)
        self.v_proj = nn.Linear(c.d_model, c.n_kv_head * c.head_dim, bias=c.bias)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.d_model, bias=c.bias)
        self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity() for _ in "qk")
        self.speeds = c.rotation_speed
        if c.rotation_speed:
            self.speed = nn.Parameter(torch.empty(()))  # between the two speeds by its sigmoid

    def forward(self, x, rope=None, mask=None, cache=None, layer=0, rows=None):
        B, S, _ = x.shape
        q, k, v = self.heads(x, rope)  # views, and so is y below: nothing is copied
        if self.watch is not None:
            self.watch(q, k)
        if cache is not None:
            k, v = cache.extend(layer, k, v, *rows)
        if S == 1:  # the heads that share keys become rows that read the same keys: none is repeated
            y = F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, self.head_dim), k, v, mask)
            return self.o_proj(y.reshape(B, 1, -1))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def heads(self, x, rope):
        """Queries, keys and values (B, H, S, head_dim), the first two rotated."""
        if rope is not None and self.speeds:
            slow, fast = self.speeds
            rope = turns(rope * (slow + (fast - slow) * self.speed.sigmoid())).to(x.dtype)
        if self.joined is None:
            q, k, v = (self.split(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        else:
            n, m, _ = (width // self.head_dim for width in self.widths)
            y = self.split(self.joined(x))
            if rope is not None and isinstance(self.q_norm, nn.Identity):
                return *rotate(y[:, : n + m], rope).split([n, m], 1), y[:, n + m :]
            q, k, v = y.split([n, m, m], 1)
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)

    def split(self, y):
        """y (B, S, H * head_dim) as heads (B, H, S, head_dim)."""
        return y.view(*y.shape[:2], y.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2)


def looks(q, k, rows, columns, causal):
    """The attention (H, N, n) float32 of queries q (H, S, head_dim) in these rows (N,) to those columns (n,) among keys
    k (H or fewer, S, head_dim). Rows and columns are counted from the end: the last one is -1."""
    S = k.shape[1]
    k = k.repeat_interleave(len(q) // len(k), 0).float()
    scores = q[:, rows].float() @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill((torch.arange(S) > (S + rows)[:, None]).to(q.device), -math.inf)
    return scores.softmax(-1)[..., columns]


class ShortConvolution(nn.Module):
    """Gated causal convolution of each channel over TAPS rows (LFM2, Liquid AI 2025). It takes the place of attention
    and uses neither mask nor positions."""

    def __init__(self, c):
        super().__init__()
        self.in_proj = nn.Linear(c.d_model, 3 * c.d_model, bias=False)
        self.taps = nn.Parameter(torch.empty(c.d_model, 1, TAPS))  # the last one is the row's own
        self.out_proj = nn.Linear(c.d_model, c.d_model, bias=False)

    def forward(self, x, rope=None, mask=None, cache=None, layer=0, rows=None):
        before, after, x = self.in_proj(x).chunk(3, -1)
        x = (before * x).mT  # (B, D, S)
        x = F.pad(x, (TAPS - 1, 0)) if cache is None else cache.lead(layer, x)
        return self.out_proj(after * F.conv1d(x, self.taps.to(x.dtype), groups=x.shape[1]).mT)


class FeedForward(nn.Module):
    """Two matrices with a GELU between them (GPT-2), or with a gate: SwiGLU, GEGLU (Shazeer 2020)."""

    together = ("gate_proj", "up_proj")  # as for Attention, where there is a gate

    def __init__(self, c):
        super().__init__()
        self.joined = None
        self.kind = c.feed_forward
        if self.kind != "gelu":
            self.gate_proj = nn.Linear(c.d_model, c.d_ff, bias=c.bias)
        self.up_proj = nn.Linear(c.d_model, c.d_ff, bias=c.bias)
        self.down_proj = nn.Linear(c.d_ff, c.d_model, bias=c.bias)

    def forward(self, x):
        if self.joined is not None:
            return self.narrow(*self.joined(x).chunk(2, -1))
        wide = [self.up_proj(x)] if self.kind == "gelu" else [self.gate_proj(x), self.up_proj(x)]
        return recompute(self.narrow, *wide, least=SMALL)  # the other tensors of width d_ff are cheap to recompute

    def narrow(self, x, up=None):
        if up is None:
            return self.down_proj(F.gelu(x, approximate="tanh"))
        gate = F.silu if self.kind == "swiglu" else F.gelu
        return self.down_proj(gate(x) * up)


class Block(nn.Module):
    def __init__(self, c, letter):
        super().__init__()
        self.attn_norm = norm(c)
        self.attn = Attention(c) if letter == "a" else ShortConvolution(c)
        self.mlp_norm = norm(c)
        self.mlp = FeedForward(c)
        self.dropout = c.dropout

    def forward(self, x, rope=None, mask=None, cache=None, layer=0, rows=None):
        x = x + self.drop(self.attn(self.attn_norm(x), rope, mask, cache, layer, rows))
        return x + self.drop(self.mlp(self.mlp_norm(x)))

    def drop(self, x):
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class Transformer(nn.Module):
    """Transformer over embeddings: x (B, S, D) -> (B, S, D), final norm included.

    Causal, or with a boolean mask (S, S) or (B, 1, S, S): true where a row sees another. Positions count from 0, or are
    given as positions (B, S), whole numbers or fractions. With a cache the rows continue those already in it. Raises
    ValueError for more than `max_positions` rows.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config, letter) for letter in config.layers)
        self.norm = norm(config) if config.final_norm else nn.Identity()
        table = None
        if config.rope_theta and not config.rotation_speed:
            table = turns(rope_angles(config, torch.arange(config.max_positions)))
        self.register_buffer("rope", table, persistent=False)

    def cache(self, batch, length):
        weight = self.layers[0].attn_norm.weight
        return Cache.new(self.config, batch, length, weight.device, weight.dtype)

    def forward(self, x, cache=None, mask=None, positions=None):
        S = x.shape[1]
        rows, end = (slice(0, S), S) if cache is None else cache.next(S)
        if end > self.config.max_positions:
            raise ValueError(f"{end} rows are more than the model's {self.config.max_positions} positions")
        rope = self.rotation(rows if positions is None else positions, x) if self.config.rope_theta else None
        alike = isinstance(rows, slice)
        if mask is None and (not alike or (rows.start and S > 1)):  # is_causal begins at the first key
            new = torch.arange(rows.start, end, device=x.device) if alike else rows
            mask = (torch.arange(end, device=x.device) <= new[..., None]).unsqueeze(-3)
        for i, block in enumerate(self.layers):
            if self.config.recompute and self.training:  # training has no cache
                x = recompute(block, x, rope, mask)
            else:
                x = block(x, rope, mask, cache, i, (rows, end))
        if cache is not None:
            cache.used += S
        return self.norm(x)

    def rotation(self, positions, x):
        """`rope` as Attention takes it, for positions ([B,] S) or a slice, in the type of x; angles where layers turn
        at speeds of their own."""
        if self.config.rotation_speed or not isinstance(positions, slice) and positions.is_floating_point():
            if isinstance(positions, slice):
                positions = torch.arange(positions.start, positions.stop, device=x.device)
            table = rope_angles(self.config, positions)
            if not self.config.rotation_speed:
                table = turns(table).to(x.dtype)
        else:
            table = self.rope[:, positions].to(x.dtype)
        if not isinstance(positions, slice) and positions.ndim == 2:  # for all heads
            table = table.unsqueeze(-3)
        return table if self.config.rotation_speed else table.unbind()


def init_weights(model):
    """Every initialisation: standard deviation 0.02, output layers scaled down by depth (GPT-2), norms 1, biases 0.

    Heads are so small that the loss starts at ln V. A short convolution keeps the variance of its input. A learned
    speed starts half way between the slowest and the fastest.
    """
    for name, p in model.named_parameters():
        if p.ndim < 2:
            nn.init.constant_(p, 0.0 if name.endswith(("bias", "speed")) else 1.0)
        elif name.endswith("taps"):
            nn.init.normal_(p, std=TAPS**-0.5)
        else:
            nn.init.normal_(p, std=1 / p.shape[-1] if "head" in name else 0.02)
    for transformer in (module for module in model.modules() if isinstance(module, Transformer)):
        for name, p in transformer.named_parameters():
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                p.data /= math.sqrt(2 * transformer.config.n_layer)


# ---------------------------------------------------------------------------------------------------------------------
# generation


class Stage:
    """B utterances in the making, each at a place of its own: all that `Family.step` reads and writes.

    Every tensor has the places as its first axis, has its size from the beginning, and is written in place. So a step
    can be captured as a CUDA graph, and an utterance can leave and another one take its place while the others go on.

        cache, x (B, 1, D)   the backbone's rows so far, and the row that the next step reads
        where (B,)           position of that row, in a family that gives its rows positions
        codes (B, T, K)      the frames so far, `made` (B,) of them
        states (B, T, D)     or, with `latents`, the states that predicted them
        ended (B,)           whether the model ended the utterance
        seed (B,)            its random numbers depend on that alone
        chosen (B, K, V)     when each class was chosen last, in frame n - 1; 0: never; None without a penalty
        sound (B,)           whether all logits so far were finite

    draw: settings of sample_code, in whose place `choose` may choose the codes.
    """

    def __init__(self, model, places, rows, frames, draw=None, choose=sample_code, latents=False):
        c = model.config
        self.draw = draw or {}
        self.choose_code = choose
        like = dict(device=model.device)
        whole = dict(dtype=torch.long, **like)
        self.cache = model.backbone.cache(places, rows)
        self.cache.used = torch.zeros(places, **whole)
        self.x = torch.zeros(places, 1, c.backbone.d_model, dtype=self.cache.memory[0].dtype, **like)
        self.where = torch.zeros(places, **like)
        self.codes = torch.zeros(places, frames, c.n_codebooks, **whole)
        self.states = torch.zeros(places, frames, c.backbone.d_model, dtype=self.x.dtype, **like) if latents else None
        self.made = torch.zeros(places, **whole)
        self.ended = torch.zeros(places, dtype=torch.bool, **like)
        self.sound = torch.ones(places, dtype=torch.bool, **like)
        self.seed = torch.zeros(places, **whole)
        self.keys = torch.zeros(places, c.n_codebooks, **whole)
        self.chosen = None
        if self.draw.get("repetition_penalty", 1) != 1:
            self.chosen = torch.zeros(places, c.n_codebooks, c.codebook_size + 2, **whole)

    def part(self, places):
        """The stage of these places alone, a slice, on the same memory."""
        return self.like({name: x[places] if isinstance(x, torch.Tensor) else x.part(places)
                          for name, x in self.buffers().items()})  # fmt: skip

    def like(self, buffers):
        stage = object.__new__(type(self))
        vars(stage).update(vars(self) | buffers)
        return stage

    def buffers(self):
        return {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor | Cache)}

    def move(self, here, there):
        """Let the utterance at one place go on at another."""
        for x in self.buffers().values():
            if isinstance(x, torch.Tensor):
                x[there] = x[here]
            else:
                for memory in x.memory:
                    memory[:, there] = memory[:, here]
                if not isinstance(x.used, int):
                    x.used[there] = x.used[here]

    def take(self, place, seed):
        """Make a place ready for a new utterance."""
        for x in (self.made, self.ended, self.where, self.chosen):
            if x is not None:
                x[place] = 0
        self.sound[place] = True
        self.seed[place] = seed
        return self.cache.part(slice(place, place + 1), used=0)

    def begin(self):
        """Begin a step: the keys of its draws."""
        codebook = torch.arange(self.keys.shape[1], device=self.keys.device)
        self.keys.copy_(mix(mix(self.seed ^ mix(self.made + 1))[:, None] ^ codebook))

    def choose(self, logits, k=slice(None), chosen=True):
        """Codes (B,) for the logits (B, V) of codebook k, or (B, K) for those (B, K, V) of all codebooks. With `chosen`
        they count as chosen."""
        if k == 0 or not isinstance(k, int):  # what is not finite stays in the cache and comes back to codebook 0
            self.sound &= logits.amax(-1).isfinite().view(len(logits), -1).all(-1)
        key = self.keys[:, k]
        if self.chosen is None:
            return self.choose_code(logits, key=key, **self.draw)
        now = (self.made + 1).view(-1, *[1] * (logits.ndim - 1))
        last = self.chosen[:, k, ..., : logits.shape[-1]]
        code = self.choose_code(logits, key=key, age=torch.where(last > 0, now - last, 0), **self.draw)
        if chosen:
            last.scatter_(-1, code[..., None], now.expand(*code.shape, 1))
        return code

    def commit(self, codes, ended, state=None, spoken=None):
        """End a step: the frame codes (B, K), or its state (B, D), belongs to the utterance where it has not `ended`
        (B,), or where it is `spoken` nevertheless."""
        place = torch.arange(len(codes), device=codes.device)
        frame = self.made.clamp(max=self.codes.shape[1] - 1)
        self.codes[place, frame] = codes
        if state is not None:
            self.states[place, frame] = state
        spoken = ~ended if spoken is None else spoken
        self.made += spoken & ~self.ended
        self.ended |= ended


# ---------------------------------------------------------------------------------------------------------------------
# the contract of a family


@dataclass
class FamilyConfig:
    """The fields that all families have. `text_bos` and `text_eos` (-1: none) are the marks around every text.

    Raises ValueError for a value out of range, and for values that do not fit together.
    """

    text_vocab_size: "1 <= int <= 10000000"
    n_codebooks: "1 <= int <= 1000"
    codebook_size: "1 <= int <= 10000000"
    backbone: TransformerConfig
    text_bos: "int >= -1" = -1
    text_eos: "int >= -1" = -1
    frame_dropout: "0 <= float <= 1" = free(0.0)  # share of the input frames blanked, so that the text has to be read
    dropout: "0 <= float | None < 1" = free(None)  # on the output of each layer; None: as backbone and decoder say
    recompute: bool | None = free(None)  # gradient checkpointing: less memory, more time; None: likewise

    mode = None  # a family with several modes makes this a field, and one with several kinds of prompts the next
    prompt_style = "segments"
    language_names = ()  # of the languages with an id

    def __post_init__(self):
        check_fields(self)
        for name in ("text_bos", "text_eos"):
            if (mark := getattr(self, name)) >= self.text_vocab_size:
                raise ValueError(f"{name} = {mark} is none of the {self.text_vocab_size} text ids")
        self.backbone = transformer_config(self.backbone, self.dropout, self.recompute)

    def idle(self):
        """{field: why} of the fields that have no effect beside the others."""
        return {}

    def language_ids(self, names):
        """The ids of languages by their names, a list; None for a family that tells languages by the text alone."""
        return None

    @property
    def n_marks(self):
        return (self.text_bos >= 0) + (self.text_eos >= 0)

    def stop_frame(self):
        """Class `codebook_size`, which is no code, in codebook 0: no speech looks like the end."""
        frame = np.zeros(self.n_codebooks, np.int64)
        frame[0] = self.codebook_size
        return frame

    def marked(self, text):
        """Text ids (n,) with the marks around them (n + n_marks,)."""
        marks = [[mark] if mark >= 0 else [] for mark in (self.text_bos, self.text_eos)]
        return np.concatenate([marks[0], text, marks[1]]).astype(np.int64)


def narrowed(name, mode):
    """The key `name` of FamilyConfig in a family where it has an effect in one mode only."""
    return free(getattr(FamilyConfig, name), mode)


def in_order(text, codes, prompt):
    """The parts of an utterance as (segment, text ids or codes), those of its prompts first."""
    before = [part for words, frames in as_list(prompt) for part in ((TEXT, words), (PROMPT, frames))]
    return [*before, (TEXT, text)] + ([] if codes is None else [(AUDIO, codes)])


def as_list(prompt):
    """A prompt (text ids, codes), several of them in a list, or None, as a list."""
    return [prompt] if isinstance(prompt, tuple) else prompt or []


class Family(nn.Module):
    """The contract of all families. A family adds how it predicts the K codebooks of a frame.

    layout(text, codes=None, prompt=None) -> tokens (S, C), segment (S,), both int64
        One utterance, text ids (n,) and codes (T, K), as rows. `segment` says what each row is (parts/segment.py). A
        prompt (text ids, codes) is another utterance of the same voice; a list holds several. It comes first, and no
        loss falls on its frames. Without codes the rows end where speech begins: generation starts from the rows that
        training sees.
    length(text, frames, prompt_text=0, prompt_frames=0) -> S
        The number of rows that `layout` makes of these numbers of text ids and frames (numbers or arrays).
        prompt_frames 0: no prompt.
    stop_frame() -> (K,)
        The frame that ends an utterance.
    forward(tokens (B, S, C), segment (B, S)) -> loss, stats {name: (sum, count)}
        The loss of a batch, a scalar. Sums and counts add up over batches and ranks. "weighted_loss" is that scalar,
        and counts all frames with their stops. The others are about speech alone, in which no stop counts:
        "c0_accuracy" is that of codebook 0; "loss_by_codebook" and "accuracy_by_codebook" are (K,); "stop_missed" (in
        eval mode) counts the stop frames that the model does not predict.
    teacher_forced_logits(text, codes, prompt=None) -> (T + 1, K, V)
        The logits of an utterance's frames and its stop frame, from one pass over all of its rows.
    opening(text, prompt=None, codes=None) -> x (1, S, D), positions (1, S) or None, lead
        The rows that the backbone reads before the first frame. The first `lead` rows belong to the voice: they are the
        same for all texts. With codes (T, K) the rows of these frames follow.
    head_weights() -> [(weight (V, D), bias (V,) or None)] * K
        What scores the classes that are allowed in each codebook.
    step(stage)
        Makes the next frame of every utterance on a Stage: reads `stage.x`, lets the backbone read it, calls
        `stage.choose`, writes the next `stage.x` and ends with `stage.commit`. It never looks at values, so that a GPU
        need not wait for the host.

    From these follows

    generate(text, prompt=None, max_frames=1125, draw=None, choose=sample_code, seed=0)
        A generator that yields frames (K,) int64 as they are made. It returns True where the model ended the utterance,
        False where max_frames or the last position cut it off. draw: settings of sample_code. Raises ValueError where
        text and prompt leave no position for a frame.

    A model with `reference` also takes what says the voice, `reference` (B, R, M): the last argument of forward, and a
    keyword of teacher_forced_logits, opening and generate. "recording": features of a recording; "vector": a speaker
    encoder's vector as a single row, which may be missing. voice_latents(reference (R, M)) -> (1, L, D) is all that it
    takes from that, and all but forward take those as well: voice=(L, D).

    A family whose config has `language_ids` also takes the id of a language: `language` is a keyword of layout,
    teacher_forced_logits, opening and generate.

    In training the batch lies on the host, and forward picks its rows there: the length of a selection depends on its
    values, so on a GPU each nonzero() would make the host wait. Row numbers and targets then follow by `to_device`.
    """

    causal = True  # frames are made one after the other
    modes = (None,)  # in which the model can work: `now` is one of them for a while, or None: as the config says
    now = None
    reference = ""  # what says the voice beside the text: "recording", "vector", or nothing
    reference_weights = "(?!)"  # regular expression: parameters that only a vector trains
    transcript = False  # a voice prompt needs its text
    fits_prompts = False  # a voice prompt is cut or repeated until it has one of the usual lengths
    rows_per_frame = 1
    rows_before = 0  # of the backbone, beside those of `layout`
    has_depth = False  # a depth decoder makes the codebooks of a frame one by one, see CSM.stage
    vocoder = False  # a vocoder is trained on this model's states, see XTTS.latents
    text_tables = ()  # names of the parameters with a row for each text id, where a tokenizer may bring more ids
    front_end = "plain"  # what its authors do to a text before a tokenizer reads it, see parts/frontend.py
    # how its authors sample, see sample_code; a setting that is not named here has no effect on the family
    draw = dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.packed_heads = None  # the scorers in a form that is fast, see speak.ready
        # methods of the config, not of the model: data.py sends them to worker processes
        self.layout = config.layout
        self.length = config.length
        self.stop_frame = config.stop_frame

    @property
    def mode(self):
        """The mode in which the model works now, None for a family that has one only."""
        return self.config.mode

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def max_rows(self):
        """The most rows that an utterance may have."""
        return self.config.backbone.max_positions

    def small_set_freeze(self, utterances):
        """Patterns for `freeze`: parameters to leave alone where a trained model continues on so few utterances."""
        return []

    def chunked_parameters(self):
        """Parameters whose gradients `in_chunks` forms, so that all of them are in memory at the same time."""
        return []

    def stacks(self):
        """The configs of the model's transformers."""
        return [module.config for module in self.modules() if isinstance(module, Transformer)]

    def to_device(self, x):
        """x on the model's device. The host does not wait for the copy: it comes from pinned memory."""
        device = self.device
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.is_cpu else x.to(device)

    def rows(self, *utterance, **options):
        """`layout` as tensors (1, S, C), (1, S) on the model's device."""
        return [torch.from_numpy(x)[None].to(self.device) for x in self.layout(*utterance, **options)]

    def blanked(self, x, spoken):
        """x (B, S, D) with a random share `frame_dropout` of the rows `spoken` (B, S) set to 0 in training."""
        if not (self.training and self.config.frame_dropout):
            return x
        blank = spoken & (torch.rand(spoken.shape, device=spoken.device) < self.config.frame_dropout)
        return x.masked_fill(self.to_device(blank)[..., None], 0)

    def stats(self, loss, n, losses, correct, counts):
        """The stats of all families. loss: mean over n frames; sums of cross-entropies, numbers ranked first and
        numbers of targets by codebook (K,), of codes alone."""
        return {
            "weighted_loss": (loss.detach() * n, n),
            "c0_accuracy": (correct[0], counts[0]),
            "loss_by_codebook": (losses.detach(), counts),
            "accuracy_by_codebook": (correct, counts),
        }

    def room(self, text, prompt=None, max_frames=1125):
        """The frames that can follow a text and its prompt, at most max_frames, and the rows of a cache that all take.
        Raises ValueError where none can follow."""
        taken = len(self.layout(text, None, prompt)[0])
        frames = min(max_frames, (self.max_rows - taken) // self.rows_per_frame)
        if frames < 1:
            raise ValueError(f"text and prompt take {taken} rows, the model has {self.max_rows} positions")
        return frames, self.rows_before + taken + frames * self.rows_per_frame

    def stage(self, places, rows, frames, **how):
        """A Stage for utterances of at most so many rows and frames; how: its other arguments."""
        stage = Stage(self, places, rows, frames, **how)
        stage.scorers = self.scorers()
        return stage

    def scorers(self):
        """For each codebook the function from states (B, D) to logits (B, V), as head_weights says."""
        return self.packed_heads or [partial(F.linear, weight=w, bias=bias) for w, bias in self.head_weights()]

    @torch.no_grad()
    def seat(self, stage, place, text, prompt=None, seed=0, most=1125, kept=None, **side):
        """Let a new utterance take a place of a stage: the backbone reads all rows before its first frame but the last,
        which is the next step's. Returns how many frames it will have at most, of the `most` that it may have. kept: a
        dict for the state behind the rows of a voice, which other texts then share.
        """
        x, positions, lead = self.opening(text, prompt, **side)
        cache = stage.take(place, seed)
        cache.clear()
        split = lead if kept is not None and lead > 1 else 0
        if split and "rows" in kept and torch.equal(kept["rows"], x[:, :split]):
            cache.restore(kept["cache"])
        elif split:
            self.backbone(x[:, :split], cache, positions=None if positions is None else positions[:, :split])
            kept.update(rows=x[:, :split].clone(), cache=cache.snapshot())
        if x.shape[1] - 1 > split:
            rows = slice(split, x.shape[1] - 1)
            self.backbone(x[:, rows], cache, positions=None if positions is None else positions[:, rows])
        stage.cache.used[place] = x.shape[1] - 1
        stage.x[place] = x[0, -1:]
        if positions is not None:
            stage.where[place] = positions[0, -1]
        return most

    def begun(self, text, prompt=None, codes=None, **options):
        """`rows` of an utterance that has come as far as the frames codes (T, K), without those that end it."""
        rows = self.rows(text, codes, prompt, **options)
        if codes is None:
            return rows
        end = len(self.layout(text, None, prompt)[0]) + len(codes) * self.rows_per_frame
        return [x[:, :end] for x in rows]

    def reread(self, text, codes, prompt=None, **side):
        """Let the backbone read an utterance with its frames, codes (T, K), at once."""
        x, positions, _ = self.opening(text, prompt, codes, **side)
        self.backbone(x, positions=positions)

    @torch.no_grad()
    def attention(self, text, codes, prompt=None, owner=None, **side):
        """Where the backbone looks in the text while it predicts the frames codes (T, K): the attention (H, T, n)
        float32 of its heads, those of all layers, to the text ids (n,). The rest to 1 is attention to other rows.

        owner (n,): the number of each id's word, -1: none; then it is (H, T, W), the attention to the words. side: what
        `opening` takes beside these.
        """
        text = np.asarray(text)
        owner = np.arange(len(text)) if owner is None else np.asarray(owner)
        members = torch.from_numpy(owner[:, None] == np.arange(owner.max(initial=-1) + 1)).float().to(self.device)
        before, _ = self.layout(text, None, prompt)
        other, _ = self.layout((text + 1) % self.config.text_vocab_size, None, prompt)
        words = torch.from_numpy((before != other).any(1).nonzero()[0])  # rows of the text
        # a frame is predicted by the row before its own; numbers from the end, because a voice may have rows in front
        frames = torch.arange(-len(codes) * self.rows_per_frame, 0) - int(self.causal)
        words = words - len(before) - len(codes) * self.rows_per_frame
        found = []
        layers = [module for module in self.backbone.modules() if isinstance(module, Attention)]
        for layer in layers:
            layer.watch = lambda q, k: found.append(looks(q[0], k[0], frames, words, self.causal) @ members)
        try:
            self.reread(text, codes, prompt, **side)
        finally:
            for layer in layers:
                del layer.watch
        return torch.cat(found).unflatten(1, (len(codes), self.rows_per_frame)).mean(2)

    @torch.no_grad()
    def generate(self, text, prompt=None, max_frames=1125, draw=None, choose=sample_code, seed=0, latents=False,
                 **side):  # fmt: skip
        """See above. With `latents` it yields in place of each frame the state (D,) that predicted it."""
        frames, rows = self.room(text, prompt, max_frames)
        stage = self.stage(1, rows, frames, draw=draw, choose=choose, latents=latents)
        frames = self.seat(stage, 0, text, prompt, seed, frames, **side)
        given = 0
        while given < frames and not stage.ended[0]:
            self.step(stage)
            made = int(stage.made[0])
            yield from (stage.states if latents else stage.codes)[0, given:made]
            given = made
        return bool(stage.ended[0])


# ---------------------------------------------------------------------------------------------------------------------
# CSM


@dataclass(kw_only=True)
class CSMConfig(FamilyConfig):
    """Sizes of a CSM and how it trains."""

    decoder: TransformerConfig
    stop: Literal["class", "zeros"] = "class"  # see stop_frame
    prompt_style: Literal["segments", "joined"] = free("segments")  # joined: as Marvis clones a voice, see layout
    loose_stop: bool = free(False)  # of released weights: the last codebook of a stop frame may be any, see generate
    decoder_fraction: "0 < float <= 1" = free(0.0625)  # share of the frames the depth decoder trains on
    decoder_chunk: "int >= 0" = free(96)  # frames per depth-decoder chunk (bounds memory); 0: all
    decoder_loss_weight: "float >= 0" = free(1.0, judges=True)  # of the depth decoder's loss beside the backbone's
    arch: str = field(default="csm", init=False)

    SPARE = 3  # classes per codebook beyond the codes, as in the released models

    def __post_init__(self):
        super().__post_init__()
        self.decoder = transformer_config(self.decoder, self.dropout, self.recompute)
        if self.n_codebooks < 2:
            raise ValueError("a CSM needs at least 2 codebooks: one for the backbone, the others for the depth decoder")
        if self.decoder.max_positions < self.n_codebooks:
            places = self.decoder.max_positions
            raise ValueError(f"the depth decoder's {places} positions are fewer than {self.n_codebooks} codebooks")

    @property
    def audio_vocab_size(self):
        return self.codebook_size + self.SPARE

    def idle(self):
        return {} if self.stop == "zeros" else {"loose_stop": "the model has a class to stop with"}

    def stop_frame(self):
        """See FamilyConfig. The released weights end with K zeros (stop = "zeros"), which speech may contain."""
        return super().stop_frame() if self.stop == "class" else np.zeros(self.n_codebooks, np.int64)

    def layout(self, text, codes=None, prompt=None):
        """See Family. tokens (S, K + 1): a row holds a text id in its last column, or a frame in the others.

        The text stands between its marks, and a stop frame follows the frames, in the prompt too. With prompt_style
        "joined" a prompt is the beginning of the utterance itself: its text and the other between one pair of marks,
        then its frames without a stop frame, which the other frames continue.
        """
        K = self.n_codebooks
        blocks = []
        segments = []
        parts = in_order(text, codes, prompt)
        joined = prompt is not None and self.prompt_style == "joined"
        if joined:
            words = np.concatenate([part for kind, part in parts if kind == TEXT])
            parts = [(TEXT, words), *(part for part in parts if part[0] != TEXT)]
        for kind, part in parts:
            if kind == TEXT:
                ids = self.marked(part)
            else:
                ids = part if kind == PROMPT and joined else np.concatenate([part, self.stop_frame()[None]])
            block = np.zeros((len(ids), K + 1), np.int64)
            block[:, K if kind == TEXT else slice(0, K)] = ids
            blocks.append(block)
            segments.append(np.full(len(ids), kind, np.int64))
        return np.concatenate(blocks), np.concatenate(segments)

    def length(self, text, frames, prompt_text=0, prompt_frames=0):
        around = 0 if self.prompt_style == "joined" else self.n_marks + 1
        prompt = np.where(np.asarray(prompt_frames) > 0, prompt_text + prompt_frames + around, 0)
        return text + self.n_marks + frames + 1 + prompt


class CSM(Family):
    """Conversational Speech Model (Sesame 2025), also Marvis TTS.

    Row s of the backbone predicts codebook 0 of row s + 1. For one frame the depth decoder reads K places: the
    backbone's state that predicted the frame, then the embeddings of codebooks 0 .. K - 2. Its place k >= 1 predicts
    codebook k.
    """

    transcript = True
    has_depth = True
    AHEAD = 1  # codebooks that the depth decoder foresees, where one utterance is spoken alone
    front_end = "none"
    draw = dict(temperature=0.9, top_k=50, top_p=1.0, min_p=0.0)

    def __init__(self, config):
        super().__init__(config)
        K, V, D = config.n_codebooks, config.audio_vocab_size, config.backbone.d_model
        self.text_embedding = nn.Embedding(config.text_vocab_size, D)
        self.audio_embedding = nn.Embedding(K * V, D)  # code v of codebook k is its row k * V + v
        self.backbone = Transformer(config.backbone)
        self.decoder = Transformer(config.decoder)
        self.projection = nn.Linear(D, config.decoder.d_model, bias=False)
        self.codebook0_head = nn.Parameter(torch.empty(V, D))
        self.decoder_heads = nn.Parameter(torch.empty(K - 1, V, config.decoder.d_model))
        self.register_buffer("offset", torch.arange(K) * V, persistent=False)
        init_weights(self)

    def look_up(self, tokens, segment):
        """Rows -> x (B, S, D): a text row's text embedding, the sum of a frame's K code embeddings, zero for padding.

        Also frames (F,), the flat numbers of the rows that hold a frame, and codes (F, K, D), the embeddings of their
        codes. Backbone and depth decoder share this look-up, so that the table gets one gradient.
        """
        K = self.config.n_codebooks
        kind = segment.flatten()
        text = (kind == TEXT).nonzero()[:, 0]
        frames = (kind >= PROMPT).nonzero()[:, 0]
        ids, text_rows, frame_rows = map(self.to_device, (tokens.flatten(0, 1), text, frames))
        words = self.text_embedding(ids[text_rows, K])
        codes = self.audio_embedding(ids[frame_rows, :K] + self.offset)
        x = codes.new_zeros(len(kind), codes.shape[-1])
        x = x.index_copy(0, text_rows, words).index_copy(0, frame_rows, codes.sum(1))
        return x.view(*segment.shape, -1), frames, codes

    def embed(self, tokens, segment):
        """The rows alone: (B, S, D)."""
        return self.look_up(tokens, segment)[0]

    def depth_inputs(self, state, codes):
        """state (N, D), codes (N, k) of codebooks 0 .. k - 1 -> depth decoder inputs (N, k + 1, D_decoder)."""
        codes = self.audio_embedding(codes + self.offset[: codes.shape[1]])
        return self.projection(torch.cat([state[:, None], codes], 1))

    def chunked_parameters(self):
        # all that the depth decoder computes with, but for the embeddings: these are looked up before
        decoder = [*self.projection.parameters(), *self.decoder.parameters(), self.decoder_heads]
        return decoder if self.config.decoder_chunk else []

    def forward(self, tokens, segment):
        """See Family. Codebook 0 is predicted at every frame, the others at a random `decoder_fraction` of the frames
        (in eval mode at all) and at every stop frame, `decoder_chunk` frames at a time.
        """
        c = self.config
        K, S = c.n_codebooks, segment.shape[1]
        x, frames, codes = self.look_up(tokens, segment)
        spoken = segment == AUDIO
        hidden = self.backbone(self.blanked(x, spoken))

        target = (spoken.flatten()[frames] & (frames % S > 0)).nonzero()[:, 0]  # (N,) which of the frames to predict
        rows = frames[target]
        frame = tokens.flatten(0, 1)[rows, :K]  # (N, K)
        stopping = (frame == torch.from_numpy(c.stop_frame()).to(frame.device)).all(-1)
        kept = torch.ones_like(stopping)
        if self.training and c.decoder_fraction < 1:
            kept = stopping | (torch.rand(len(frame), device=frame.device) < c.decoder_fraction)
        kept = kept.nonzero()[:, 0]  # (N',) which of those the depth decoder sees
        n, m = len(frame), len(kept)

        before = codes.index_select(0, self.to_device(target[kept]))[:, :-1]  # (N', K - 1, D)
        rows, frame, kept = map(self.to_device, (rows - 1, frame, kept))
        state = hidden.flatten(0, 1).index_select(0, rows)  # (N, D)
        loss0, correct0, each0 = multi_codebook_cross_entropy(state, self.codebook0_head, frame[:, :1], each=True)
        spoken = self.to_device(~stopping)[:, None]

        def depth(state, before, frame, spoken):
            """What a chunk of the frames adds to the loss, a mean, and to sums (K - 1,) over frames of speech."""
            x = self.decoder(self.projection(torch.cat([state[:, None], before], 1)))[:, 1:]
            losses, correct, each = multi_codebook_cross_entropy(x, self.decoder_heads, frame, each=True)
            return losses.mean() * (len(frame) / max(m, 1)), (each * spoken).sum(0), (correct * spoken).sum(0)

        inputs = state.index_select(0, kept), before, frame[kept, 1:], spoken[kept]
        decoder_loss, losses, correct = in_chunks(depth, c.decoder_chunk or m, inputs, self.chunked_parameters())
        loss = loss0[0] + c.decoder_loss_weight * decoder_loss

        with torch.no_grad():
            losses = torch.cat([(each0 * spoken).sum(0), losses])
            correct = torch.cat([(correct0 * spoken).sum(0), correct])
            counts = torch.cat([spoken.sum(0), spoken[kept].sum(0).expand(K - 1)])
            stats = self.stats(loss, n, losses, correct, counts)
            stats["backbone_loss"] = (loss0[0] * n, n)
            stats["decoder_loss"] = (decoder_loss * m, m)
            if not self.training:
                ends = state[self.to_device(stopping)]
                missed = (ends @ self.codebook0_head.T).argmax(-1) != c.stop_frame()[0]
                stats["stop_missed"] = (missed.sum(), len(missed))
        return loss, stats

    def teacher_forced_logits(self, text, codes, prompt=None):
        tokens, segment = self.rows(text, codes, prompt)
        hidden = self.backbone(self.embed(tokens, segment))
        spoken = segment[0, 1:] == AUDIO
        state = hidden[0, :-1][spoken]
        frame = tokens[0, 1:, : self.config.n_codebooks][spoken]
        depth = self.decoder(self.depth_inputs(state, frame[:, :-1]))[:, 1:]
        first = state @ self.codebook0_head.T
        others = torch.einsum("nkd,kvd->nkv", depth, self.decoder_heads)
        return torch.cat([first[:, None], others], 1)

    def head_weights(self):
        c = self.config
        first = self.codebook0_head[: c.codebook_size + (c.stop == "class")]
        return [(first, None), *((head[: c.codebook_size], None) for head in self.decoder_heads)]

    @torch.no_grad()
    def opening(self, text, prompt=None, codes=None):
        tokens, segment = self.begun(text, prompt, codes)
        lead = int((segment == PROMPT).nonzero()[-1, 1]) + 1 if prompt and self.config.prompt_style == "segments" else 0
        return self.embed(tokens, segment), None, lead

    def stage(self, places, rows, frames, ahead=None, n_codebooks=0, **how):
        """See Family. n_codebooks: speak in so many of the first codebooks; 0: in all. ahead: how many codebooks the
        depth decoder foresees, with a single place, see `foresee`; None: AHEAD with packed weights, else 0, because a
        plain product of several rows takes as long as one product for each of them."""
        stage = super().stage(places, rows, frames, **how)
        stage.codes = stage.codes[..., : n_codebooks or self.config.n_codebooks]
        stage.depth = self.decoder.cache(places, self.config.n_codebooks)
        stage.ahead = (self.AHEAD if places == 1 and self.packed_heads else 0) if ahead is None else ahead
        return stage

    @torch.no_grad()
    def step(self, stage):
        """See Family. The released weights end where all codebooks are 0; with `loose_stop`, as in transformers, where
        all but the last are, and that frame is spoken unless it is all 0."""
        c = self.config
        stage.begin()
        state = self.backbone(stage.x, stage.cache)[:, -1]
        first = stage.choose(stage.scorers[0](state), 0)
        stage.depth.clear()  # each frame is a sequence of its own
        complete = self.foresee if stage.ahead and len(first) == 1 else self.complete
        frame = complete(stage, state, first)
        codes = self.audio_embedding(frame + self.offset[: frame.shape[1]])
        stage.x.copy_(codes.sum(1, keepdim=True))
        if c.stop == "class":
            stage.commit(frame, first == c.codebook_size)
        else:
            stage.commit(frame, ~frame[:, : c.n_codebooks - c.loose_stop].any(1), spoken=frame.any(1))

    def complete(self, stage, state, code):
        """The frame (B, K) that begins with code (B,), after states (B, D) of the backbone."""
        frame = [code]
        x = self.depth_inputs(state, code[:, None])
        for k in range(1, stage.codes.shape[-1]):
            if k > 1:
                x = self.projection(self.audio_embedding(frame[-1] + self.offset[k - 1]))[:, None]
            depth = self.decoder(x, stage.depth)[:, -1]
            frame.append(stage.choose(stage.scorers[k](depth), k))
        return torch.stack(frame, 1)

    def foresee(self, stage, state, code):
        """`complete` for one utterance, in fewer passes (speculative sampling, Leviathan et al. 2023).

        The heads of the next codebooks guess their codes from the present state, which has not read the codes between.
        The next pass reads the guesses too, and up to the first wrong one its states are those of the codes themselves.
        A guess and the code that is then chosen have the same key: they mostly agree (see gumbel), and the frame is
        the one that `complete` makes.
        """
        K = stage.codes.shape[-1]
        frame = [code]
        guesses = []
        x = self.depth_inputs(state, code[:, None])
        while True:
            depth = self.decoder(x, stage.depth)[:, -1 - len(guesses) :]
            for i in range(depth.shape[1]):
                k = len(frame)
                frame.append(stage.choose(stage.scorers[k](depth[:, i]), k))
                if k + 1 == K or i == len(guesses) or frame[k] != guesses[i]:
                    break
            if len(frame) == K:
                return torch.stack(frame, 1)
            stage.depth.used = len(frame)  # the rows of wrong guesses are written over
            ahead = range(len(frame), min(len(frame) + stage.ahead, K - 1))
            guesses = [stage.choose(stage.scorers[k](depth[:, i]), k, chosen=False) for k in ahead]
            row = torch.stack([frame[-1], *guesses], 1)
            places = self.offset[len(frame) - 1 : len(frame) + len(guesses)]
            x = self.projection(self.audio_embedding(row + places))


# ---------------------------------------------------------------------------------------------------------------------
# Kani


@dataclass(kw_only=True)
class KaniConfig(FamilyConfig):
    """Sizes of a Kani, its vocabulary and how it trains.

    One vocabulary: text ids, then special tokens (start and end of speech, of the human's turn and of the AI's), then
    the codes, codebook after codebook. With 64,400 text ids these are the ids of the released models.

    KaniTTS-2 has an `audio_step`, speaker vectors, and in its backbone a `rotation_speed`.
    """

    first_special: "int >= 0" = 0  # the first of the special tokens; 0: text_vocab_size + 1, as in the released models
    vocab_size: "int >= 0" = 0  # rows of the embedding; 0: as many as tokens
    speaker_size: "0 <= int <= 100000" = 0  # numbers of a speaker's vector; 0: the model takes none
    audio_step: "0 <= float <= 1000" = fixed(0.0)  # positions from frame to frame, all of its tokens at one; 0: apart
    loss_on: Literal["all", "audio", "codebook"] = free("all", judges=True)  # codebook: against its own codebook
    drop_repeats: bool = free(False, judges=True)  # leave out frames equal to the one before; it loses timing
    arch: str = field(default="kani", init=False)

    CODES = 9  # from the first special token to the first code; the last three places are not used

    def __post_init__(self):
        super().__post_init__()
        self.first_special = self.first_special or self.text_vocab_size + 1
        self.speech, self.end_of_speech, self.human, self.end_of_human, self.ai, self.end_of_ai = (
            self.first_special + i for i in range(6))  # fmt: skip
        self.first_code = self.first_special + self.CODES
        tokens = self.first_code + self.n_codebooks * self.codebook_size
        self.vocab_size = self.vocab_size or tokens
        if self.first_special < self.text_vocab_size:
            raise ValueError(f"first_special = {self.first_special} is one of {self.text_vocab_size} text ids")
        if self.vocab_size < tokens:
            raise ValueError(f"vocab_size = {self.vocab_size}: text, special tokens and codes need {tokens}")

    def layout(self, text, codes=None, prompt=None, every=False):
        """See Family. tokens (S, 1): a row is one token.

        The text stands between the marks of the human's turn. In the AI's turn follow start of speech, the codes, all K
        of a frame and then those of the next, and end of speech.

        `drop_repeats` leaves out a frame equal to the one before it, unless `every` frame is asked for. The released
        models were trained so; continue them so. A new model should not be: nothing then says how long a sound lasts,
        so that pauses and long vowels come out too short.
        """
        offset = self.first_code + self.codebook_size * np.arange(self.n_codebooks)
        rows = []
        segments = []
        for kind, part in in_order(text, codes, prompt):
            if kind == TEXT:
                around = [self.human], [self.end_of_human, self.ai, self.speech]
                ids = np.concatenate([around[0], self.marked(part), around[1]])
            else:
                if self.drop_repeats and not every:
                    part = np.concatenate([part[:1], part[1:][(part[1:] != part[:-1]).any(1)]])
                ids = np.concatenate([(part + offset).ravel(), [self.end_of_speech, self.end_of_ai]])
            rows.append(ids.astype(np.int64))
            segments.append(np.full(len(ids), kind, np.int64))
        return np.concatenate(rows)[:, None], np.concatenate(segments)

    def length(self, text, frames, prompt_text=0, prompt_frames=0):
        """See Family. With drop_repeats `layout` may make fewer rows; this is an upper bound."""
        around = self.n_marks + 6
        prompt = np.where(np.asarray(prompt_frames) > 0, prompt_text + around + self.n_codebooks * prompt_frames, 0)
        return text + around + self.n_codebooks * frames + prompt


class Kani(Family):
    """KaniTTS (nineninesix 2025): a language model, LFM2 in the released ones, to which codes are words like any other.

    The row of a token predicts the next one. Its state scores the rows of the embedding, which is the head as well.

    KaniTTS-2 (nineninesix 2026) makes one row of a speaker's vector and puts it behind the first token, whatever the
    layout. No loss falls on that row; it predicts the second token in place of the first.
    """

    transcript = True
    rows_before = 1
    front_end = "none"
    reference_weights = r"^speaker_projection\."
    # top_k, which its authors do not name, is the default of transformers
    draw = dict(temperature=0.6, top_k=50, top_p=0.95, min_p=0.0, repetition_penalty=1.1, repetition_decay=0.0)

    def __init__(self, config):
        super().__init__(config)
        # no nn.Embedding, whose gradient could be sparse: as a head it has one everywhere
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.backbone.d_model))
        self.backbone = Transformer(config.backbone)
        if config.speaker_size:
            self.reference = "vector"
            self.speaker_projection = nn.Linear(config.speaker_size, config.backbone.d_model, bias=False)
        barred = torch.zeros(config.n_codebooks, config.codebook_size + 1)
        barred[1:, -1] = -math.inf  # speech ends between frames only
        self.register_buffer("barred", barred, persistent=False)
        init_weights(self)

    @property
    def max_rows(self):
        return self.config.backbone.max_positions - (self.config.speaker_size > 0)

    @property
    def rows_per_frame(self):
        return self.config.n_codebooks

    def embed(self, tokens):
        """tokens (B, S, 1) -> (B, S, D)."""
        return F.embedding(self.to_device(tokens[..., 0]), self.embedding)

    def voice_latents(self, reference):
        """The row (B, 1, D) of speakers' vectors (B, 1, E), or that (1, 1, D) of one (1, E)."""
        vectors = self.to_device(reference).to(self.embedding.dtype)
        return self.speaker_projection(vectors if vectors.ndim == 3 else vectors[None])

    def places(self, tokens):
        """Positions (B, S) of tokens (B, S, 1), on their device; None where they count themselves. A position counts
        what came before: 1 for a text id or mark, `audio_step` for a whole frame."""
        c = self.config
        if not c.audio_step:
            return None
        code = (tokens[..., 0] >= c.first_code).long()
        frames = (code.cumsum(1) - code) // c.n_codebooks
        return (1 - code).cumsum(1) - (1 - code) + frames * c.audio_step

    def with_voice(self, x, places, voice):
        """Rows x (B, S, D) and their positions (B, S), or None, with voice (B, 1, D), or None, behind the first row."""
        if voice is None:
            return x, places
        if places is not None:
            places = torch.cat([places[:, :1], places + 1], 1)
        return torch.cat([x[:, :1], voice.to(x.dtype), x[:, 1:]], 1), places

    def heard(self, reference=None, voice=None):
        """The row (1, 1, D) of a speaker's vector `reference` (1, E), or `voice` (1, D), which is that row; or None."""
        if voice is not None:
            return voice[None]
        return None if reference is None else self.voice_latents(reference)

    def states(self, x, places, voice=None):
        """Final states (B, S, D) of rows x (B, S, D): that of row s predicts row s + 1. See with_voice."""
        x, places = self.with_voice(x, places, voice)
        hidden = self.backbone(x, positions=places)
        return hidden if voice is None else hidden[:, 1:]

    def heads(self):
        """Rows of the embedding (K, V + 1, D): each codebook's V codes, and behind them end of speech."""
        c = self.config
        K = c.n_codebooks
        codes = self.embedding[c.first_code : c.first_code + K * c.codebook_size].unflatten(0, (K, -1))
        return torch.cat([codes, self.embedding[c.end_of_speech].expand(K, 1, -1)], 1)

    def forward(self, tokens, segment, reference=None):
        """See Family. The loss is a mean over tokens; `loss_on` chooses them:

            all       every one but the first, text included, against the whole vocabulary, as its authors train; of a
                      prompt only its text
            audio     codes, end of speech and of the turn, against the whole vocabulary
            codebook  codes against their own codebook, end of speech against codebook 0: the classes that `generate`
                      chooses from. The head then does a K-th of its work or less.

        The stats by codebook are about codes. Those of an evaluation are always against their own codebook, so that
        runs with another loss can be compared.
        """
        c = self.config
        token = tokens.flatten()
        spoken = segment == AUDIO
        codebook = torch.where(token >= c.first_code, (token - c.first_code) // c.codebook_size, -1)  # -1: no code
        places = self.places(tokens)
        places = None if places is None else self.to_device(places)
        voice = self.heard(reference)
        hidden = self.states(self.blanked(self.embed(tokens), spoken), places, voice).flatten(0, 1)

        spoken = spoken.flatten()
        first = (codebook == 0) | (token == c.end_of_speech)
        frames = (spoken & first).nonzero()[:, 0]  # (N,) rows of a first code, or of end of speech instead
        if c.loss_on == "codebook":
            loss, *sums = self._score_codes(hidden, token, frames)
        else:
            wanted = spoken | (segment.flatten() == TEXT) if c.loss_on == "all" else spoken
            rows = (wanted & (torch.arange(len(token), device=token.device) % segment.shape[1] > 0)).nonzero()[:, 0]
            loss, *sums = self._score_tokens(hidden, token[rows], rows, codebook[rows])
            if not self.training:
                _, *sums = self._score_codes(hidden, token, frames)
        stats = self.stats(loss, len(frames), *sums)
        if not self.training:
            ends = frames[token[frames] == c.end_of_speech]
            state = hidden.index_select(0, self.to_device(ends - 1))
            missed = (state @ self.heads()[0].T).argmax(-1) != c.codebook_size
            stats["stop_missed"] = (missed.sum(), len(missed))
        return loss, stats

    def _score_tokens(self, hidden, token, rows, codebook):
        """The loss of tokens (n,) in these rows against the whole vocabulary. Also sums of losses, numbers of tokens
        ranked first and numbers of tokens by codebook, each (K,). codebook (n,): -1 where a token is no code."""
        K = self.config.n_codebooks
        counts = torch.bincount(codebook + 1, minlength=K + 1)[1:]
        rows, token, group, counts = map(self.to_device, (rows - 1, token, codebook + 1, counts))
        state = hidden.index_select(0, rows)
        loss, correct, losses = multi_codebook_cross_entropy(state, self.embedding, token[:, None], each=True)
        losses, correct = (losses.new_zeros(K + 1).index_add(0, group, y[:, 0].to(losses.dtype))[1:]
                           for y in (losses, correct))  # fmt: skip
        return loss[0], losses, correct, counts

    def _score_codes(self, hidden, token, frames):
        """The loss of the frames (N,) that begin in these rows, each code against its own codebook; and the same three
        as `_score_tokens`."""
        c = self.config
        K = c.n_codebooks
        places = torch.arange(K, device=token.device)
        rows = (frames[:, None] + places).clamp(max=len(token) - 1)  # (N, K)
        target = token[rows] - c.first_code - c.codebook_size * places
        ends = token[frames] == c.end_of_speech
        target[ends] = IGNORE
        target[ends, 0] = c.codebook_size
        rows, target, counts = map(self.to_device, (rows - 1, target, (target != IGNORE).sum(0)))
        state = hidden.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        losses, correct, each = multi_codebook_cross_entropy(state, self.heads(), target, self.barred, each=True)
        loss = (losses * counts).sum() / counts.sum().clamp(min=1)
        spoken = self.to_device(~ends)[:, None]
        return loss, (each * spoken).sum(0), (correct * spoken).sum(0), spoken.sum(0).expand(K)

    def teacher_forced_logits(self, text, codes, reference=None, prompt=None, voice=None):
        """See Family. (T + 1, K, V + 1): the last class is end of speech."""
        T, K = codes.shape
        tokens, segment = self.rows(text, codes, prompt, every=True)
        first = int((segment[0] == AUDIO).long().argmax())
        voice = self.heard(reference, voice)
        hidden = self.states(self.embed(tokens), self.places(tokens), voice)[0, first - 1 : first + T * K]
        state = F.pad(hidden, (0, 0, 0, K - 1)).unflatten(0, (T + 1, K))
        return torch.einsum("tkd,kvd->tkv", state, self.heads()) + self.barred

    def head_weights(self):
        """See Family. Allowed are the codes of the next codebook, and before a frame end of speech: whatever is chosen
        can be decoded, and no other class is scored."""
        c = self.config
        end = c.first_code + c.n_codebooks * c.codebook_size
        codes = self.embedding[c.first_code : end].split(c.codebook_size)
        return [(torch.cat([codes[0], self.embedding[c.end_of_speech, None]]), None), *((x, None) for x in codes[1:])]

    @torch.no_grad()
    def opening(self, text, prompt=None, codes=None, *, reference=None, voice=None):
        tokens, segment = self.begun(text, prompt, codes, every=True)
        voice = self.heard(reference, voice)
        x, places = self.with_voice(self.embed(tokens), self.places(tokens), voice)
        lead = int((segment == PROMPT).nonzero()[-1, 1]) + 1 if prompt else 0
        return x, places, lead and lead + (voice is not None)

    def stage(self, places, rows, frames, **how):
        stage = super().stage(places, rows, frames, **how)
        stage.first = torch.zeros(places, device=self.device)  # position of the first frame
        return stage

    def seat(self, stage, place, *utterance, **how):
        most = super().seat(stage, place, *utterance, **how)
        stage.first[place] = stage.where[place] + 1
        return most

    @torch.no_grad()
    def step(self, stage):
        c = self.config
        stage.begin()
        frame = []
        for k, scorer in enumerate(stage.scorers):
            where = stage.where[:, None] if c.audio_step else None
            code = stage.choose(scorer(self.backbone(stage.x, stage.cache, positions=where)[:, -1]), k)
            frame.append(code)
            row = c.first_code + k * c.codebook_size + code.clamp(max=c.codebook_size - 1)  # no row for end of speech
            stage.x.copy_(self.embedding[row][:, None])
            if k == 0:
                stage.where.copy_(stage.first + stage.made * c.audio_step)
        stage.commit(torch.stack(frame, 1), frame[0] == c.codebook_size)


# ---------------------------------------------------------------------------------------------------------------------
# XTTS


@dataclass(kw_only=True)
class XTTSConfig(FamilyConfig):
    """Sizes of an XTTS and how it trains. The defaults are those of XTTS-v2."""

    n_codebooks: "1 <= int <= 1000" = 1
    reference_bands: "1 <= int <= 10000" = 80  # features of a row of the reference
    reference_rate: "0 < float <= 100000" = 22050 / 256  # its rows in a second
    n_latents: "1 <= int <= 10000" = fixed(32)  # vectors that describe the voice
    conditioning_layers: "0 <= int <= 1000" = fixed(6)  # of the encoder that reads a recording of the voice
    perceiver_layers: "1 <= int <= 1000" = fixed(2)  # of the perceiver that turns the encoder's output into latents
    perceiver_heads: "1 <= int <= 1000" = fixed(8)  # of the perceiver's attention
    recording_seconds: "0 < float <= 30" = free(30.0)  # of each recording of a voice that are heard when it speaks
    heard_seconds: "0 <= float <= 3600" = free(30.0)  # of all of them, one after the other, for the latents; 0: all
    chunk_seconds: "0 <= float <= 3600" = free(4.0, judges=True)  # longer recordings are read in chunks; 0: whole
    text_positions: "3 <= int <= 100000" = fixed(404)  # text ids, with 2 marks around them
    code_positions: "6 <= int <= 100000" = fixed(608)  # frames, with 5 marks around them
    text_loss_weight: "float >= 0" = free(0.01, judges=True)  # of the text's loss beside that of the codes
    hide_text_stop: bool = free(False, judges=True)  # train without attention to the mark behind the text, as published
    vocoder: bool = False  # a vocoder knows the model's states: that of XTTS-v2, for models that continue from XTTS-v2
    arch: str = field(default="xtts", init=False)

    STOPS = 4  # stop codes that a recording ends with

    def __post_init__(self):
        super().__post_init__()
        # the backbone itself counts latents, text and codes in one row
        positions = self.n_latents + self.text_positions + self.code_positions
        self.backbone = replace(self.backbone, max_positions=positions)
        self.start_code = self.codebook_size
        self.stop_code = self.codebook_size + 1
        if self.n_codebooks != 1:
            raise ValueError(f"an XTTS speaks in one codebook, the codec has {self.n_codebooks}: take n_codebooks = 1")
        if min(self.text_bos, self.text_eos) < 0:
            raise ValueError("an XTTS needs a tokenizer that has ids for the begin and the end of a text")

    @property
    def max_frames(self):
        return self.code_positions - 1 - self.STOPS

    def stop_frame(self):
        return np.array([self.stop_code])

    def layout(self, text, codes=None, prompt=None):
        """See Family. tokens (S, 1):

            text_bos  text  text_eos  start_code  codes  stop_code x 4
            TEXT      TEXT  TEXT      PROMPT      AUDIO  AUDIO

        A prompt adds no rows: the model gets its recording as the reference. Raises ValueError for more text ids or
        frames than positions.
        """
        frames = [] if codes is None else [*codes[:, 0], *[self.stop_code] * self.STOPS]
        self.length(len(text), max(0, len(frames) - self.STOPS))
        tokens = np.array([self.text_bos, *text, self.text_eos, self.start_code, *frames], np.int64)
        return tokens[:, None], np.repeat([TEXT, PROMPT, AUDIO], [len(text) + 2, 1, len(frames)])

    def length(self, text, frames, prompt_text=0, prompt_frames=0):
        """See Family. Raises ValueError as `layout` does."""
        for what, count, limit, key in (("text ids", text, self.text_positions - 2, "text_positions"),
                                       ("frames", frames, self.max_frames, "code_positions")):  # fmt: skip
            if (longest := int(np.max(count, initial=0))) > limit:
                raise ValueError(f"an utterance has {longest} {what}, the model has positions for {limit}: raise "
                                 f"{key}, or leave such out with prepare.py's max_seconds and max_text_tokens")
        return text + 3 + frames + self.STOPS


class ConditioningBlock(nn.Module):
    """Attention over a whole recording x (B, R, D) (Tortoise, Betker 2023). Its output is added to the normalised x."""

    def __init__(self, d_model, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm = nn.GroupNorm(math.gcd(32 if d_model > 64 else 16, d_model), d_model)  # groups as in Tortoise
        self.qkv_proj = nn.Linear(d_model, 3 * d_model)  # for each head its queries, keys and values
        self.o_proj = nn.Linear(d_model, d_model)

    def forward(self, x):
        x = self.norm(x.mT).mT
        q, k, v = self.qkv_proj(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2).chunk(3, -1)  # (B, H, R, D / H)
        return x + self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PerceiverBlock(nn.Module):
    """Latents x (B, L, D) attend to themselves and to a context (B, R, D), then go through a GEGLU."""

    HEAD_DIM = 64

    def __init__(self, d_model, n_head):
        super().__init__()
        d_ff = 4 * d_model * 2 // 3
        inner = n_head * self.HEAD_DIM
        self.q_proj = nn.Linear(d_model, inner, bias=False)
        self.kv_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.o_proj = nn.Linear(inner, d_model, bias=False)
        self.up_proj = nn.Linear(d_model, 2 * d_ff)
        self.down_proj = nn.Linear(d_ff, d_model)

    def forward(self, x, context):
        qkv = self.q_proj(x), *self.kv_proj(torch.cat([x, context], 1)).chunk(2, -1)
        y = F.scaled_dot_product_attention(*(y.unflatten(-1, (-1, self.HEAD_DIM)).transpose(1, 2) for y in qkv))
        x = x + self.o_proj(y.transpose(1, 2).flatten(2))
        y, gate = self.up_proj(x).chunk(2, -1)
        return x + self.down_proj(y * F.gelu(gate))


class Conditioning(nn.Module):
    """Features of recordings (B, R, M) -> latents (B, L, D), the same number for every length.

    An encoder as in Tortoise, then a perceiver resampler (Alayrac et al. 2022).
    """

    def __init__(self, c):
        super().__init__()
        D, H = c.backbone.d_model, c.backbone.n_head
        self.input = nn.Linear(c.reference_bands, D)
        self.encoder = nn.ModuleList(ConditioningBlock(D, H) for _ in range(c.conditioning_layers))
        self.latents = nn.Parameter(torch.empty(c.n_latents, D))
        self.perceiver = nn.ModuleList(PerceiverBlock(D, c.perceiver_heads) for _ in range(c.perceiver_layers))
        self.norm = nn.RMSNorm(D, 1e-12)

    def encode(self, reference):
        x = self.input(reference)
        for block in self.encoder:
            x = block(x)
        return x

    def forward(self, reference):
        context = self.encode(reference)
        x = self.latents.expand(len(context), -1, -1)
        for block in self.perceiver:
            x = block(x, context)
        return self.norm(x)


class XTTS(Family):
    """The GPT of XTTS-v2 (Casanova et al. 2024): a GPT-2 over 32 latents of a voice, a text, and the codes of one
    codebook.

    Row s predicts row s + 1, within the text by one head, within the codes by another. Text and codes have tables of
    positions of their own, each counted from 0; the latents, which come first, have none.

    The authors' length_penalty is no setting here: it weighs the beams of a beam search, and they speak with one beam.
    """

    reference = "recording"
    text_tables = ("text_embedding.weight", "text_head.weight", "text_head.bias")
    front_end = "xtts"
    draw = dict(temperature=0.75, top_k=50, top_p=0.85, min_p=0.0, repetition_penalty=5.0, repetition_decay=0.0)

    SHORTEST = 0.33  # seconds of its last chunk

    def __init__(self, config):
        super().__init__(config)
        D, V = config.backbone.d_model, config.codebook_size + 2
        self.conditioning = Conditioning(config)
        self.text_embedding = nn.Embedding(config.text_vocab_size, D)
        self.text_positions = nn.Embedding(config.text_positions, D)
        self.code_embedding = nn.Embedding(V, D)
        self.code_positions = nn.Embedding(config.code_positions, D)
        self.backbone = Transformer(config.backbone)
        self.final_norm = nn.LayerNorm(D)  # after the backbone's own
        self.text_head = nn.Linear(D, config.text_vocab_size)
        self.code_head = nn.Linear(D, V)
        self.vocoder = config.vocoder
        init_weights(self)

    @property
    def max_rows(self):
        return self.config.text_positions + self.config.code_positions

    def small_set_freeze(self, utterances):
        """See Family. Below 3,000 utterances only the tables and heads, the norms and the last two layers of the
        backbone are trained.

        That is the choice of public recipes for small sets of new languages (Amharic, Maltese), and that of Artetxe et
        al. (2020): the words of a new language are learnt for a body that stays as it is.
        """
        if utterances >= 3000:
            return []
        lower = "|".join(map(str, range(self.config.backbone.n_layer - 2)))
        return [r"^conditioning\.", *([rf"^backbone\.layers\.({lower})\."] if lower else [])]

    def embed(self, latents, tokens, segment):
        """latents (B, L, D), tokens (B, S, 1), segment (B, S) -> (B, L + S, D), zero for padding."""
        kind = segment.flatten()
        is_text = segment == TEXT
        place = torch.arange(segment.shape[1], device=segment.device).expand_as(segment)
        place = torch.where(is_text, place, place - is_text.sum(1, keepdim=True)).flatten()  # both count from 0
        text = is_text.flatten().nonzero()[:, 0]
        frames = (kind >= PROMPT).nonzero()[:, 0]
        token, place, text, frames = map(self.to_device, (tokens.flatten(), place, text, frames))
        words = self.text_embedding(token[text]) + self.text_positions(place[text])
        codes = self.code_embedding(token[frames])
        if self.training and self.config.frame_dropout:  # the codes alone, their positions stay
            codes = codes * (torch.rand(len(codes), 1, device=codes.device) >= self.config.frame_dropout)
        codes = codes + self.code_positions(place[frames])
        x = codes.new_zeros(len(kind), codes.shape[-1])
        x = x.index_copy(0, text, words).index_copy(0, frames, codes)
        return torch.cat([latents, x.view(*segment.shape, -1)], 1)

    def chunks(self, x, rate):
        """A recording or its features, x (n, ...) of which `rate` are a second, as [(m, ...)]: its first heard_seconds
        in chunks of chunk_seconds, as XTTS-v2 was trained on 3 to 6 s. A very short last chunk is left out."""
        c = self.config
        x = x[: math.ceil(c.heard_seconds * rate)] if c.heard_seconds else x
        chunks = x.split(max(1, round(c.chunk_seconds * rate)) if c.chunk_seconds else max(1, len(x)))
        return [chunk for chunk in chunks if len(chunk) >= self.SHORTEST * rate] or [x]

    def voice_latents(self, reference):
        """The latents (1, L, D) of one recording: the mean over its chunks. From its features (R, M), of which chunks
        of padding do not count, or from a list of the features of each chunk."""
        chunks = reference
        if not isinstance(reference, list):
            chunks = self.chunks(torch.as_tensor(reference), self.config.reference_rate)
            chunks = [x for x in chunks if (x != x[0]).any()] or chunks
        return torch.stack([self.conditioning(x[None].to(self.conditioning.latents)) for x in chunks]).mean(0)

    def forward(self, tokens, segment, reference):
        """See Family. The loss of the codes plus `text_loss_weight` times that of the text.

        "weighted_loss" counts the four stops of a recording as frames; "stop_missed" counts the first of them.

        XTTS-v2 was trained with the row of text_eos hidden from the rows after it, but generates with it in sight.
        `hide_text_stop` trains so too. Without, training sees what generation sees, and weights that are continued
        learn to read that row.
        """
        c = self.config
        L = c.n_latents
        latents = self.conditioning(self.to_device(reference).to(self.conditioning.latents.dtype))
        mask = None
        if c.hide_text_stop:
            text = segment == TEXT
            seen = F.pad(~text | F.pad(text[:, 1:], (0, 1)), (L, 0), value=True)
            mask = self.to_device((seen[:, None] & seen.new_ones(2 * seen.shape[1:]).tril())[:, None])
        hidden = self.backbone(self.embed(latents, tokens, segment), mask=mask)[:, L:].flatten(0, 1)

        kind = segment.flatten()
        token = tokens.flatten()
        first = torch.arange(len(kind), device=kind.device) % segment.shape[1] == 0  # no row predicts it
        words, codes = (((kind == part) & ~first).nonzero()[:, 0] for part in (TEXT, AUDIO))
        text_loss, text_correct, _ = self._score(hidden, token, words, self.text_head)
        loss, correct, each = self._score(hidden, token, codes, self.code_head)
        total = loss[0] + c.text_loss_weight * text_loss[0]
        m = len(words)
        spoken = self.to_device(token[codes, None] != c.stop_code)
        stats = self.stats(total, len(codes), (each * spoken).sum(0), (correct * spoken).sum(0), spoken.sum(0))
        stats["text_loss"] = (text_loss[0].detach() * m, m)
        stats["text_accuracy"] = (text_correct.sum(), m)
        if not self.training:
            ends = codes[(token[codes] == c.stop_code) & (token[codes - 1] != c.stop_code)]
            state = self.final_norm(hidden.index_select(0, self.to_device(ends - 1)))
            stats["stop_missed"] = ((self.code_head(state).argmax(-1) != c.stop_code).sum(), len(ends))
        return total, stats

    def _score(self, hidden, token, rows, head):
        """The loss (1,) of the tokens in these rows (n,) by one of the heads; whether each ranked first and its loss
        (n, 1)."""
        before, target = map(self.to_device, (rows - 1, token[rows, None]))
        state = self.final_norm(hidden.index_select(0, before))
        return multi_codebook_cross_entropy(state, head.weight, target, head.bias, each=True)

    def heard(self, reference=None, voice=None):
        """The latents (1, L, D) of a recording's features `reference` (R, M), or `voice` (L, D), which are those."""
        return self.voice_latents(reference) if voice is None else voice[None].to(self.conditioning.latents)

    def _states(self, text, codes, reference=None, voice=None):
        """Final states (T + 1, D) of the rows that predict the codes (T, 1) and the stop behind them."""
        tokens, segment = self.rows(text, codes)
        hidden = self.final_norm(self.backbone(self.embed(self.heard(reference, voice), tokens, segment)))[0]
        rows = (segment[0] == AUDIO).nonzero()[: len(codes) + 1, 0]
        return hidden[rows + self.config.n_latents - 1]

    def teacher_forced_logits(self, text, codes, reference=None, prompt=None, voice=None):
        """See Family. A prompt changes nothing."""
        return self.code_head(self._states(text, codes, reference, voice))[:, None]

    @torch.no_grad()
    def latents(self, text, codes, reference):
        """The input of XTTS's vocoder: for each code the state that predicted it, from one pass over all rows.

        text ids (n,), codes (T, 1) as an array or tensor, reference (R, M) -> (T, D).
        """
        return self._states(text, torch.as_tensor(codes).cpu().numpy(), reference)[:-1]

    @property
    def rows_before(self):
        return self.config.n_latents

    def room(self, text, prompt=None, max_frames=1125):
        """See Family. Raises ValueError for a text that is too long."""
        frames = min(max_frames, self.config.max_frames)
        return frames, self.rows_before + len(self.layout(text)[0]) + frames

    def head_weights(self):
        return []  # the head is a linear layer, which is packed as such

    def scorers(self):
        """See Family. All classes are allowed; a start code ends the utterance as a stop code does."""
        return [self.code_head]

    @torch.no_grad()
    def opening(self, text, prompt=None, codes=None, *, reference=None, voice=None):
        """See Family. voice: the latents (L, D) of a voice, in place of a `reference` to read them from. A prompt
        changes nothing."""
        return self.embed(self.heard(reference, voice), *self.begun(text, None, codes)), None, self.config.n_latents

    @torch.no_grad()
    def step(self, stage):
        stage.begin()
        state = self.final_norm(self.backbone(stage.x, stage.cache)[:, -1])
        code = stage.choose(stage.scorers[0](state), 0)
        place = self.code_positions((stage.made + 1).clamp(max=self.config.max_frames))
        stage.x.copy_((self.code_embedding(code) + place)[:, None])
        stage.commit(code[:, None], code >= self.config.codebook_size, state if stage.states is not None else None)


# ---------------------------------------------------------------------------------------------------------------------
# VALL-E


@dataclass(kw_only=True)
class VallEConfig(FamilyConfig):
    """Sizes of a VALL-E, how it trains and how it speaks.

    "ar" and "nar" before a field's meaning: it is for that mode alone. The published models are nar, with level_weights
    "normal" and without stretched_text, gray_length and whole_frames; they speak with guidance 2.5 and top_sigma 1.
    """

    # nar: all frames at once, out of masks; ar: one frame after the other; ar+nar: one model learns both
    mode: Literal["nar", "ar", "ar+nar"] = fixed("nar")
    nar_share: "0 < float < 1" = free(0.5, "ar+nar")  # ar+nar: share of the training batches that are nar
    speaks: Literal["nar", "ar"] = free("nar", "ar+nar")  # ar+nar: the mode in which it speaks
    languages: "1 <= int <= 10000" = 1  # how many languages have an id
    language: "int >= 0" = 0  # that of an utterance in a language without an id of its own
    language_names: "list[str]" = field(default_factory=lambda: ["en", "ja", "de", "fr", "zh", "ko"])  # in that order
    shared_heads: bool = fixed(False)  # one feed-forward layer before the heads of all codebooks, instead of one each
    level_attention: bool = fixed(False)  # for residual codecs: a frame's codebooks attend to each other
    segmented_mask: bool = fixed(False, "nar")  # nar: text does not see prompt and frames, nor the prompt the frames
    stretched_text: bool = fixed(True, "nar")  # nar: text positions run to the number of frames, see positions
    mask_ratio: "0 <= float <= 1" = free(0.8, "nar", judges=True)  # nar: share of masked frames; 0: drawn anew
    frame_dropout: "0 <= float <= 1" = narrowed("frame_dropout", "ar")  # ar: share of the input frames masked
    text_dropout: "0 <= float < 1" = free(0.0, "nar")  # nar: share of the utterances without text, for guidance
    level_weights: Literal["decreasing", "normal", "equal"] = free("decreasing", judges=True)  # normal: mid ones
    random_level: bool = free(False, judges=True)  # train each utterance on one random codebook
    length_loss_weight: "float >= 0" = free(0.1, "nar", judges=True)  # nar: of the loss of the lengths
    gray_length: bool = True  # nar: lengths are written in a Gray code, see length_digits
    rounds: "1 <= int <= 10000" = free(25, "nar")  # nar: of demasking, when it speaks
    whole_frames: bool = free(True, "nar")  # nar: whole frames are masked again, not each codebook by itself
    guidance: "float >= 0" = free(1.0, "nar")  # nar: classifier-free guidance scale; 1: off
    top_sigma: "float >= 0" = free(0.0)  # draw among logits at most so many deviations below the best; 0: among all
    arch: str = field(default="valle", init=False)

    LEVEL_WEIGHTS = {
        "equal": lambda k, K: 1.0,
        "decreasing": lambda k, K: 1 / (k + 1),
        "normal": lambda k, K: 1.5 - max(k + 1, K - k) / K,
    }

    def __post_init__(self):
        super().__post_init__()
        self.language_names = self.language_names[: self.languages]
        if not 0 <= self.language < self.languages:
            raise ValueError(f"language = {self.language} must be below languages = {self.languages}")
        if self.level_attention and self.shared_heads:
            raise ValueError("level_attention is between the heads' own layers: it cannot go with shared_heads")

    @property
    def separator(self):
        """The text id that ends a part; the next one asks for the length; those after it are the languages."""
        return self.text_vocab_size

    @property
    def mask_class(self):
        return self.codebook_size + 1

    def stop_frame(self):
        """Class `codebook_size` in every codebook. Mode nar has no stop frame."""
        return np.full(self.n_codebooks, self.codebook_size)

    def language_ids(self, names):
        """See FamilyConfig. "zh-cn" has the id of "zh" where it has none of its own."""
        known = {name: i for i, name in enumerate(self.language_names)}
        return [known.get(name, known.get(name.split("-")[0], self.language)) for name in names]

    def layout(self, text, codes=None, prompt=None, language=None, stop=None):
        """See Family. tokens (S, K + 1): a row holds a text id in its last column, or a frame in the others.

        The order is that of VALL-E v2, with a separator between the parts: the text between its marks, the language,
        the frames of a prompt, the frames of the utterance. The text of the prompt is not used. stop: whether the stop
        frame follows; None: as the mode says.
        """
        K = self.n_codebooks
        end = self.separator
        language = self.language if language is None else language
        text = np.concatenate([self.marked(text), [end, end + 2 + language, end]])
        prompt_frames = np.concatenate([np.zeros((0, K), np.int64), *(codes for _, codes in as_list(prompt))])
        frames = np.zeros((0, K)) if codes is None else codes
        if codes is not None and (self.mode != "nar" if stop is None else stop):
            frames = np.concatenate([codes, self.stop_frame()[None]])
        counts = [len(text), len(prompt_frames), prompt is not None, len(frames)]
        segment = np.repeat([TEXT, PROMPT, TEXT, AUDIO], counts)
        tokens = np.zeros((len(segment), K + 1), np.int64)
        tokens[segment == TEXT, K] = end
        tokens[: len(text), K] = text
        tokens[segment == PROMPT, :K] = prompt_frames
        tokens[segment == AUDIO, :K] = frames
        return tokens, segment

    def length(self, text, frames, prompt_text=0, prompt_frames=0):
        prompt = np.where(np.asarray(prompt_frames) > 0, prompt_frames + 1, 0)
        return text + self.n_marks + 3 + prompt + frames + (self.mode != "nar")


DIGITS = 5  # of a length


def length_digits(length, gray):
    """Lengths (N,) -> their decimal digits (N, DIGITS), the most significant one first.

    With `gray` a digit counts backwards where the number before it is odd (a reflected Gray code): neighbours differ in
    one digit, so that digits which are guessed one by one cannot turn 19 or 20 into 10 or 29.
    """
    upto = length[:, None] // 10 ** torch.arange(DIGITS - 1, -1, -1, device=length.device)
    return torch.where((upto // 10 % 2 == 1) & gray, 9 - upto % 10, upto % 10)


def read_length(digits, gray):
    """The inverse of `length_digits`: (N, DIGITS) -> lengths (N,)."""
    length = torch.zeros_like(digits[:, 0])
    for digit in digits.T:
        length = 10 * length + torch.where((length % 2 == 1) & gray, 9 - digit, digit)
    return length


class LevelAttention(nn.Module):
    """x + attention(x) across the K codebooks of each frame, x (N, K, D).

    VALL-E v2's variant for residual codecs, which its author later removed for working less well: an encoder and a
    decoder with this in place of the feed-forward layer.
    """

    def __init__(self, D, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, heads, batch_first=True)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


class AudioEncoder(nn.Module):
    """Frames (N, K) -> (N, D). Codes and their codebooks are embedded, normalised, and go through a residual
    feed-forward layer; then learned weights sum the codebooks. With `heads`, see LevelAttention.

    The result for a code depends only on the code and its codebook. So where there are more frames than classes, the
    table is encoded, and the frames are looked up in it.
    """

    table = None

    def __init__(self, K, V, D, heads=0):
        super().__init__()
        self.codes = nn.Parameter(torch.empty(V, K, D))
        self.places = nn.Parameter(torch.empty(K, D))
        self.attention = LevelAttention(D, heads) if heads else None
        if heads:
            self.out = nn.Linear(D, D)
        else:
            self.norm = nn.LayerNorm(D)
            self.level_weights = nn.Parameter(torch.empty(K))
            self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    @torch.no_grad()
    def tabulate(self):
        """Encode the table once, for weights that change no more."""
        if self.attention is None:
            self.table = self.encoded(self.codes + self.places).flatten(0, 1)

    def encoded(self, x):
        x = self.norm(x)
        return (x + self.mlp(x)) * self.level_weights.softmax(0)[:, None]

    def forward(self, frames):
        V, K, D = self.codes.shape
        rows = frames * K + torch.arange(K, device=frames.device)  # of the table as (V * K, D)
        if self.table is not None:
            return F.embedding(rows, self.table).sum(-2)
        few = len(frames) < V or self.attention is not None
        x = (F.embedding(rows, self.codes.view(V * K, D)) if few else self.codes) + self.places
        if self.attention is not None:
            return self.out(self.attention(x).mean(1))
        x = self.encoded(x)
        return x.sum(1) if few else F.embedding_bag(rows, x.view(V * K, D), mode="sum")


class AudioDecoder(nn.Module):
    """Hidden states (N, D) -> states for the heads of the codebooks: (N, K, D), or (N, D) where all share one."""

    def __init__(self, K, D, shared, heads=0):
        super().__init__()

        def level():
            if heads:
                return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D))
            return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

        self.levels = nn.ModuleList(level() for _ in range(1 if shared else K))
        self.attention = LevelAttention(D, heads) if heads else nn.Identity()

    def forward(self, x):
        x = [level(x) for level in self.levels]
        return x[0] if len(x) == 1 else self.attention(torch.stack(x, 1))


class VallE(Family):
    """VALL-E v2 of e-c-k-e-r (2024-2025): all K codebooks of a frame at once, from one hidden state.

    Mode nar is a masked transformer (MaskGIT, Chang et al. 2022) with attention in both directions. It learns to fill
    in masked frames. To speak, it first predicts the number of frames, digit by digit, and starts with all of them
    masked; in each round it fills in all masked frames and masks the least certain again, fewer in every round. In mode
    ar row s predicts the frame of row s + 1. Mode ar+nar shares all weights between the two.
    """

    fits_prompts = True

    RESCALE = 0.75  # share of the guided logits' spread that is set back to what it was
    MOST_SPREAD = 4.0  # the spread is widened by this factor at most
    ASKED = 4  # in training, one of this many utterances trains the length

    front_end = "phonemes"

    def __init__(self, config):
        super().__init__(config)
        K, V, D = config.n_codebooks, config.codebook_size, config.backbone.d_model
        heads = 8 * config.level_attention
        if config.mode == "ar+nar":
            self.modes = ("ar", "nar")
        self.text_embedding = nn.Embedding(config.text_vocab_size + 2 + config.languages, D)
        self.prompt_encoder = AudioEncoder(K, V, D, heads)
        self.frame_encoder = AudioEncoder(K, V + 2, D, heads)
        self.backbone = Transformer(config.backbone)
        self.decoder = AudioDecoder(K, D, config.shared_heads, heads)
        self.heads = nn.Parameter(torch.empty(K, V + 1, D))
        self.head_bias = nn.Parameter(torch.empty(K, V + 1))
        if config.mode != "ar":
            self.length_heads = nn.Parameter(torch.empty(DIGITS, 10, D))
            self.length_bias = nn.Parameter(torch.empty(DIGITS, 10))
        init_weights(self)
        for name, p in self.named_parameters():
            if name in ("head_bias", "length_bias"):
                nn.init.zeros_(p)
            elif name.endswith("encoder.norm.weight"):
                nn.init.constant_(p, 0.1)  # louder frames drown the text, and the model learns to read it much later

    @property
    def mode(self):
        c = self.config
        return self.now or (c.speaks if c.mode == "ar+nar" else c.mode)

    @property
    def causal(self):
        return self.mode == "ar"

    @property
    def draw(self):
        """See Family. The penalty is for frames that come one after the other."""
        return Family.draw | (dict(repetition_penalty=1.0, repetition_decay=0.0) if self.causal else {})

    def embed(self, tokens, segment):
        """Rows -> x (B, S, D): text embeddings, encoded frames, zero for padding."""
        K = self.config.n_codebooks
        kind = segment.flatten()
        ids = self.to_device(tokens.flatten(0, 1))
        x = self.heads.new_zeros(len(ids), self.heads.shape[-1])
        for part, columns, encode in ((TEXT, K, self.text_embedding), (PROMPT, slice(K), self.prompt_encoder),
                                      (AUDIO, slice(K), self.frame_encoder)):  # fmt: skip
            rows = self.to_device((kind == part).nonzero()[:, 0])
            x = x.index_copy(0, rows, encode(ids[rows, columns]).to(x.dtype))
        return x.view(*segment.shape, -1)

    def positions(self, tokens, segment):
        """Positions (B, S), which start again behind each separator; padding takes none.

        With stretched_text the positions of the text run to the number of frames, where frames follow (compare
        length-aware rotary embeddings, LARoPE, Kim et al. 2025). Attention then looks for a word about where it stands
        in the recording.
        """
        used = (segment != PAD).long()
        before = used.cumsum(1) - used
        begins = F.pad((segment == TEXT) & (tokens[..., -1] == self.config.separator), (1, -1))
        positions = before - torch.where(begins, before, 0).cummax(1).values
        if self.config.stretched_text and not self.causal:
            words = used * (begins.cumsum(1) == 0)
            frames = (segment == AUDIO).sum(1, keepdim=True)
            stretched = positions * frames // words.sum(1, keepdim=True).clamp(min=1)
            positions = torch.where((words > 0) & (frames > 0), stretched, positions)
        return self.to_device(positions)

    def mask(self, segment):
        """Which rows see which, (B, 1, 1 or S, S): all but padding; segmented, only parts up to their own."""
        seen = (segment != PAD)[:, None]
        if self.config.segmented_mask:
            part = segment.cummax(1).values  # a prompt's separator belongs to it
            seen = seen & (part[:, :, None] >= part[:, None])
        return self.to_device(seen[:, None])

    def states(self, tokens, segment):
        """Hidden states (B, S, D) of rows, with the mode's mask."""
        mask = None if self.causal else self.mask(segment)
        return self.backbone(self.embed(tokens, segment), mask=mask, positions=self.positions(tokens, segment))

    def logits(self, hidden):
        """Hidden states (N, D) -> logits (N, K, V + 1)."""
        state = self.decoder(hidden)
        state = state if state.ndim == 3 else state[:, None].expand(-1, len(self.heads), -1)
        return torch.einsum("nkd,kvd->nkv", state, self.heads) + self.head_bias

    def likely(self, logits):
        """Logits (..., V + 1), -inf where they are more than `top_sigma` standard deviations of all classes below the
        best one (top-n-sigma sampling, Tang et al. 2024)."""
        if not self.config.top_sigma:
            return logits
        least = logits.amax(-1, keepdim=True) - self.config.top_sigma * logits.std(-1, keepdim=True)
        return logits.masked_fill(logits < least, -math.inf)

    def masked(self, spoken):
        """Which of the frames, spoken (B, S), are masked: drawn anew in training, always the same in evaluation."""
        c = self.config
        device = spoken.device
        generator = None if self.training else torch.Generator(device).manual_seed(0)
        share = c.mask_ratio
        if self.causal:
            share = c.frame_dropout if self.training else 0.0
        elif share == 0:  # as many as in a random round of `_demask`
            share = torch.cos(math.pi / 2 * torch.rand(len(spoken), 1, generator=generator, device=device))
        return spoken & (torch.rand(spoken.shape, generator=generator, device=device) < share)

    def without_text(self, tokens, segment):
        """The segment (B, S) with the text, but not its marks, and the prompt turned into padding."""
        c = self.config
        ids = tokens[..., -1]
        words = (segment == TEXT) & (ids < c.separator) & (ids != c.text_bos) & (ids != c.text_eos)
        return segment.masked_fill(words | (segment.cummax(1).values == PROMPT), PAD)

    def forward(self, tokens, segment):
        """See Family. Mode nar predicts the masked frames, mode ar all frames.

        Mode ar+nar draws one of them for a training batch, because the two differ in their attention, and evaluates
        with both. The stats "ar_loss", "nar_loss" and the like are those of each.
        """
        c = self.config
        if c.mode != "ar+nar":
            return self.score(tokens, segment)
        stop = (segment == AUDIO) & (tokens[..., 0] == c.codebook_size)
        names = [f"{mode}_{name}" for mode in self.modes for name in ("loss", "c0_accuracy")]
        stats = dict.fromkeys(names, (0.0, 0.0))
        stats |= {"length_loss": (0.0, 0.0), "length_error": (0.0, 0.0)}  # all ranks must have the same names
        loss = 0 * (self.length_heads.sum() + self.length_bias.sum())  # and gradients of all parameters
        for mode in ["nar" if torch.rand(()) < c.nar_share else "ar"] if self.training else self.modes:
            self.now = mode
            part, found = self.score(tokens, segment if self.causal else segment.masked_fill(stop, PAD))
            loss = loss + part
            losses, counts = found["loss_by_codebook"]
            found |= {f"{mode}_loss": (losses.sum(), counts.sum()), f"{mode}_c0_accuracy": found["c0_accuracy"]}
            for name, (value, count) in found.items():
                before = stats.get(name, (0.0, 0.0))
                stats[name] = before[0] + value, before[1] + count
        self.now = None
        return loss, stats

    def score(self, tokens, segment):
        """Loss and stats of a batch in one mode.

        As published, an utterance's loss is a mean over all its frames, in which a frame that is not predicted counts
        as 0. All utterances have the same weight; level_weights gives the weights of the codebooks.
        """
        c = self.config
        K = c.n_codebooks
        B, S = segment.shape
        spoken = segment == AUDIO
        masked = self.masked(spoken)
        seen = segment
        drawn = torch.ones(B, K, device=segment.device)
        if self.training and c.text_dropout and not self.causal:
            dropped = torch.rand(B, 1, device=segment.device) < c.text_dropout
            seen = torch.where(dropped, self.without_text(tokens, segment), segment)
        if self.training and c.random_level:
            drawn = F.one_hot(torch.randint(K, (B,), device=segment.device), K).float()
        hidden = self.states(tokens.masked_fill(masked[..., None], c.mask_class), seen).flatten(0, 1)

        rows = (spoken if self.causal else masked).flatten().nonzero()[:, 0]  # (N,) of the frames that are predicted
        owner = rows // S
        frame = tokens.flatten(0, 1)[rows, :K]
        used = drawn[owner]
        weight = 1 / spoken.sum(1)[owner]
        factor = torch.tensor([c.LEVEL_WEIGHTS[c.level_weights](k, K) for k in range(K)], device=segment.device)
        share = factor * (weight[:, None] * used).sum(0) / (factor * drawn).sum()
        before, target, share, weight, counts = map(
            self.to_device, (rows - int(self.causal), frame.masked_fill(used == 0, IGNORE), share, weight, used.sum(0))
        )
        losses, correct, each = multi_codebook_cross_entropy(
            self.decoder(hidden.index_select(0, before)), self.heads, target, self.head_bias,
            codebook_weight=share, row_weight=weight, each=True,
        )  # fmt: skip
        loss = losses.sum()
        more = {}
        if not self.causal:
            length_loss, more = self.length_loss(tokens, segment)
            loss = loss + c.length_loss_weight * length_loss
        with torch.no_grad():
            stop = self.to_device((frame == c.codebook_size).all(-1, keepdim=True))
            spoken = ~stop & (target != IGNORE)
            sums = (each * spoken).sum(0), (correct * spoken).sum(0), spoken.sum(0)
            stats = {**self.stats(loss, len(frame), *sums), **more}
            if self.causal and not self.training:
                last = rows[(frame == c.codebook_size).all(-1)] - 1
                best = self.logits(hidden[self.to_device(last)]).argmax(-1)
                stats["stop_missed"] = ((best != c.codebook_size).all(-1).sum(), len(last))
        return loss, stats

    def length_state(self, tokens, segment):
        """Hidden states (B, D) at a mark in place of the first frame, which asks for the length. One frame is enough.

        It takes a pass of its own, because a row that sees the frames can count them.
        """
        first = (segment == AUDIO).long().argmax(1)  # (B,)
        S = int(first.max()) + 1
        tokens, segment = tokens[:, :S], segment[:, :S]
        mark = torch.arange(S, device=first.device) == first[:, None]
        segment = segment.masked_fill(segment == AUDIO, PAD).masked_fill(mark, TEXT)
        hidden = self.states(tokens.masked_fill(mark[..., None], self.config.separator + 1), segment)
        row = torch.arange(len(first), device=first.device) * S + first
        return hidden.flatten(0, 1).index_select(0, self.to_device(row))

    def guess_length(self, state):
        """The likeliest lengths (B,) in frames, by length_state's (B, D)."""
        logits = torch.einsum("bd,kvd->bkv", state, self.length_heads) + self.length_bias
        return read_length(logits.argmax(-1), self.config.gray_length)

    def length_loss(self, tokens, segment):
        """Mean cross-entropy of the lengths' digits, in training of one in ASKED utterances; and its stats."""
        step = self.ASKED if self.training else 1
        tokens, segment = tokens[::step], segment[::step]  # not the first ones: a batch may be sorted by length
        state = self.length_state(tokens, segment)
        length = self.to_device((segment == AUDIO).sum(1))
        target = length_digits(length, self.config.gray_length)
        loss = multi_codebook_cross_entropy(state, self.length_heads, target, self.length_bias)[0].mean()
        with torch.no_grad():
            error = (self.guess_length(state) - length).abs().sum()
        n = len(length)
        return loss, {"length_loss": (loss.detach() * n, n), "length_error": (error, n)}

    def frame_logits(self, tokens, segment):
        """Logits (N, K, V + 1) of all frames, in mode nar, of tokens (B, S, K + 1), segment (B, S).

        Classifier-free guidance (Ho and Salimans 2022) moves them away from the logits without text and prompt; then
        the spread over the frames of an utterance is set back in part (Lin et al. 2024).
        """
        if self.config.guidance == 1:
            return self.logits(self.states(tokens, segment)[segment == AUDIO])
        both = torch.cat([segment, self.without_text(tokens, segment)])
        logits, free = self.logits(self.states(tokens.repeat(2, 1, 1), both)[both == AUDIO]).chunk(2)
        guided = free + self.config.guidance * (logits - free)
        counts = (segment == AUDIO).sum(1).tolist()
        pairs = zip(guided.split(counts), logits.split(counts), strict=True)
        return torch.cat([self.respread(*pair) for pair in pairs])

    def respread(self, guided, logits):
        """Guided logits (T, K, V + 1) of an utterance with a part of the spread that they had before."""
        if len(logits) < 2:
            return guided
        # 1 where frames do not differ; bounded, as a class whose guided logits agree by chance would be blown up
        spread = (logits.std(0) / guided.std(0)).nan_to_num(1.0, 1.0).clamp(max=self.MOST_SPREAD)
        return guided * (self.RESCALE * spread + 1 - self.RESCALE)

    def teacher_forced_logits(self, text, codes, prompt=None, language=None):
        """See Family. Mode nar: (T, K, V + 1), from a pass in which all frames are masked."""
        tokens, segment = self.rows(text, codes, prompt, language=language, stop=self.causal)
        spoken = segment == AUDIO
        if self.causal:
            return self.logits(self.states(tokens, segment)[:, :-1][spoken[:, 1:]])
        return self.frame_logits(tokens.masked_fill(spoken[..., None], self.config.mask_class), segment)

    def head_weights(self):
        return list(zip(self.heads, self.head_bias, strict=True))

    @torch.no_grad()
    def opening(self, text, prompt=None, codes=None, *, language=None):
        tokens, segment = self.begun(text, prompt, codes, language=language)
        return self.embed(tokens, segment), self.positions(tokens, segment), 0

    def reread(self, text, codes, prompt=None, language=None):
        self.states(*self.begun(text, prompt, codes, language=language))

    def stage(self, places, rows, frames, **how):
        """See Family. Mode nar needs no cache. It keeps all rows, tokens (B, S, K + 1) and segment (B, S), of each
        frame the scores of its codes (B, T, K), and for each utterance the number of rounds, that of those done, the
        number of frames, and whether that is the number the model asked for."""
        K = self.config.n_codebooks
        stage = super().stage(places, rows if self.causal else 1, frames, **how)
        if not self.causal:
            stage.tokens = stage.codes.new_zeros(places, rows, K + 1)
            stage.segment = stage.codes.new_full((places, rows), PAD)
            stage.score = torch.ones(places, frames, K, device=self.device)
            stage.rounds, stage.done, stage.count = torch.zeros(3, places, dtype=torch.long)  # the host needs them
            stage.fits = torch.zeros(places, dtype=torch.bool, device=self.device)
        return stage

    @torch.no_grad()
    def seat(self, stage, place, text, prompt=None, seed=0, most=1125, kept=None, language=None, frames=None,
             rounds=None):  # fmt: skip
        """See Family. Mode nar predicts the number of `frames` where it is None. rounds: None: as the config says."""
        if self.causal:
            return super().seat(stage, place, text, prompt, seed, most, kept, language=language)
        c = self.config
        lay = partial(self.rows, text, prompt=prompt, language=language, stop=False)
        if frames is None:
            frames = int(self.guess_length(self.length_state(*lay(codes=np.zeros((1, c.n_codebooks))))))
        T = max(1, min(frames, most))
        tokens, segment = lay(codes=np.full((T, c.n_codebooks), c.mask_class))
        stage.take(place, seed)
        S = segment.shape[1]
        stage.segment[place] = PAD
        stage.segment[place, :S] = segment[0]
        stage.tokens[place, :S] = tokens[0]
        stage.score[place] = 1
        stage.rounds[place] = rounds or c.rounds
        stage.done[place] = 0
        stage.count[place] = T
        stage.fits[place] = frames == T
        return T

    def step(self, stage):
        return self.next_frame(stage) if self.causal else self.next_round(stage)

    @torch.no_grad()
    def next_frame(self, stage):
        stage.begin()
        hidden = self.backbone(stage.x, stage.cache, positions=stage.where.long()[:, None])[:, -1]
        state = self.decoder(hidden)
        states = state.unbind(1) if state.ndim == 3 else [state] * len(stage.scorers)
        logits = torch.stack([score(x) for score, x in zip(stage.scorers, states, strict=True)], 1)
        frame = stage.choose(self.likely(logits))
        stage.where.copy_(stage.made)
        stage.x.copy_(self.frame_encoder(frame)[:, None])
        stage.commit(frame, (frame == self.config.codebook_size).any(-1))

    @torch.no_grad()
    def next_round(self, stage):
        """Masks the least certain codes again and fills in all that are masked, of every utterance. A code's score is
        its probability in the last round, for codes that were kept too."""
        c = self.config
        counts = stage.count.tolist()
        S = int((stage.segment != PAD).sum(1).max())
        tokens, segment = stage.tokens[:, :S], stage.segment[:, :S]
        spoken = segment == AUDIO
        codes = tokens[spoken][:, :-1]  # (N, K), a copy
        time = stage.done / (stage.rounds - 1).clamp(min=1)
        for part, score, T, begun, at in zip(codes.split(counts), stage.score, counts, stage.done, time, strict=True):
            again = max(1, min(int(math.cos(math.pi / 2 * at) * T), T - int(begun)))
            if c.whole_frames:
                part[score[:T].mean(1).topk(again, largest=False).indices] = c.mask_class
            else:
                part.scatter_(0, score[:T].topk(again, 0, largest=False).indices, c.mask_class)
        tokens[..., :-1].masked_scatter_(spoken[..., None], codes)
        logits = self.likely(self.frame_logits(tokens, segment))
        stage.sound &= logits.amax(-1).isfinite().all()

        owner = self.to_device(torch.arange(len(counts)).repeat_interleave(stage.count))
        place = torch.cat([torch.arange(T * c.n_codebooks) for T in counts]).view(-1, c.n_codebooks)
        key = mix(mix(stage.seed ^ self.to_device(mix(stage.done + 1)))[owner, None] ^ self.to_device(place))
        # the temperature falls to 0 in the last round, as in MaskGIT
        left = self.to_device((1 - time).clamp(min=1e-6).float())[owner, None, None]
        chosen = stage.choose_code(logits / left, key=key, **stage.draw)
        codes = torch.where(codes == c.mask_class, chosen, codes)
        scores = logits.softmax(-1).gather(-1, chosen[..., None])[..., 0]
        tokens[..., :-1].masked_scatter_(spoken[..., None], codes)
        for i, (part, score) in enumerate(zip(codes.split(counts), scores.split(counts), strict=True)):
            stage.score[i, : counts[i]] = score
            stage.done[i] += 1
            if stage.done[i] == stage.rounds[i]:
                # the stop class has no meaning here
                stage.codes[i, : counts[i]] = part.where(part < c.codebook_size, 0)
                stage.made[i] = counts[i]
                stage.ended[i] = stage.fits[i]


# ---------------------------------------------------------------------------------------------------------------------
# build and check a model of any family


ARCHS = {"csm": (CSM, CSMConfig), "kani": (Kani, KaniConfig), "xtts": (XTTS, XTTSConfig), "valle": (VallE, VallEConfig)}


def build(arch, meta, options):
    """A fresh model for a token folder: `meta` its meta.json, `options` the run's keys, or an older model's config.

    Each family takes the options that it has. They win over meta, whose tokenizer may have fewer ids than published
    weights. Raises ValueError for an unknown family or sizes that do not fit.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r:.60}; choose from {', '.join(ARCHS)}")
    model, config = ARCHS[arch]
    known = {**facts(meta), **options}
    return model(config(**{k: known[k] for k in known.keys() & field_names(config) if known[k] is not None}))


def field_names(config):
    """The names of the fields that a config, or its class, takes."""
    return {f.name for f in fields(config) if f.init}


def contradiction(config, options):
    """The first of these options that contradicts the config of trained weights, or None.

    A backbone or decoder is a dict, or a preset's name; empty, it asks for nothing. Of a dict all sizes are compared
    except those that may change from run to run, of a preset only the shapes. Raises ValueError for impossible sizes.
    """
    for f in fields(config):
        if options.get(f.name, "") == "" or not f.init or f.metadata.get("key") == "free":
            continue
        asked = options[f.name]
        wanted = getattr(replace(config, **{f.name: asked}), f.name)
        named = asked if isinstance(asked, dict) else PRESETS.get(asked, ()) if isinstance(asked, str) else ()
        if isinstance(wanted, TransformerConfig):
            loose = {"dropout", "recompute"} | (set() if named is asked else {"rope_theta", "rope_scaling", "norm_eps"})
            same = all(getattr(wanted, x) == getattr(getattr(config, f.name), x) for x in {*named} - loose)
        else:
            same = wanted == getattr(config, f.name)
        if not same:
            return f.name
    return None


def facts(meta):
    """Fields of a config that a token folder's meta.json fixes, as a dict."""
    codec = meta["codec"]
    tokenizer = meta["tokenizer"]
    known = dict(
        text_vocab_size=tokenizer["vocab_size"], text_bos=tokenizer["bos_id"], text_eos=tokenizer["eos_id"],
        n_codebooks=codec["n_codebooks"], codebook_size=codec["codebook_size"],
    )  # fmt: skip
    if languages := meta.get("languages"):
        known |= dict(languages=len(languages), language_names=languages)
    if reference := codec.get("reference"):
        size = len(reference["silence"])
        rows = reference["rows_per_frame"]
        bands = dict(reference_bands=size, reference_rate=codec["frame_rate"] * rows)
        known |= bands if rows else {"speaker_size": size}
    return known


def check_finite(model):
    """Raise ValueError with the name of the first parameter that holds NaN or infinite numbers."""
    for name, p in model.named_parameters():
        if words := fault(p, p):
            raise ValueError(f"{name} {words}")


def contract_check(model, text, codes, **side):
    """Compare teacher forcing with generation on one utterance: text ids (n,), codes (T, K), `side` the model's other
    inputs, such as `reference`.

    Every logit of every codebook and frame must agree. Where training and generation disagree by one step, the loss
    falls but the audio is noise. Returns {"max_difference", "loss_at_shift", "ln_v"}, where loss_at_shift is the
    cross-entropy of codebook 0 against the frame before the one it is trained to predict (shift 0), that one (1), and
    the one after (2), or [] for fewer than 3 frames. Raises ValueError where the logits differ, where a trained model
    predicts another shift, or where weights or logits are not finite. A model with several modes is checked in each,
    and the report is that with the largest difference.
    """
    check_finite(model)
    reports = []
    try:
        for mode in model.modes:
            model.now = mode
            reports.append(check_mode(model, text, codes, **side))
    finally:
        model.now = None
    return max(reports, key=lambda report: report["max_difference"])


def check_mode(model, text, codes, **side):
    """contract_check in the mode in which the model works now."""
    T = len(codes)
    training = model.training
    model.eval()
    ends = model.stop_frame()[None] if model.causal else codes[:0]
    forced = iter(np.concatenate([codes, ends]).ravel().tolist())
    generated = []

    def choose(logits, key=None, age=None):
        generated.extend(logits.float().reshape(-1, logits.shape[-1]))
        chosen = [next(forced) for _ in range(logits[..., 0].numel())]
        return torch.tensor(chosen, device=logits.device).view(logits.shape[:-1])

    with torch.no_grad():
        length = {} if model.causal else {"frames": T, "rounds": 1}  # one round, in which all frames are masked
        for _ in model.generate(text, max_frames=T + 1, choose=choose, **side, **length):
            pass
        del generated[T * codes.shape[1] + 1 :]  # of a frame that ends the utterance, codebook 0 alone
        whole = model.teacher_forced_logits(text, codes, **side).float()
    flat = whole.flatten(0, 1)
    if flat.isnan().any() or not flat.isfinite().any():
        raise ValueError("contract check failed: the model's logits are not finite: its training diverged, or its "
                         "config is another model's")  # fmt: skip
    # generation may bar classes, with -inf
    difference = max(float((a - flat[i, : len(a)])[a != -math.inf].abs().max()) for i, a in enumerate(generated))
    scale = float(flat[flat.isfinite()].abs().max())  # a fresh model has small heads and small logits
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    model.train(training)
    if not difference <= (1e-3 if exact else 0.1) * scale:
        raise ValueError("contract check failed: generation and teacher forcing differ by "
                         f"{difference:.3g} in the logits (scale {scale:.3g}): "
                         "the model would generate from other rows than it was trained on")
    codebook0 = torch.as_tensor(codes, device=whole.device)[:, 0]
    shifts = range(3) if T > 2 else ()
    loss = [float(F.cross_entropy(whole[1 : T - 1, 0], codebook0[s : T - 2 + s])) for s in shifts]
    ln_v = math.log(whole.shape[-1])
    if loss and min(loss) < min(loss[1] - 0.5, ln_v - 0.5):
        raise ValueError(f"contract check failed: codebook 0 fits the frame at shift {loss.index(min(loss))} best, "
                         "it must be shift 1 (cross-entropy at shifts 0, 1, 2: "
                         f"{', '.join(f'{x:.2f}' for x in loss)}; ln V {ln_v:.2f})")
    return {"max_difference": difference, "loss_at_shift": loss, "ln_v": ln_v}


# ---------------------------------------------------------------------------------------------------------------------
# the loss
#
# For one row of one codebook, with logits x = W h + b, target t, label smoothing e and z-loss z:
#
#     lse = log sum_j exp(x_j)        loss = lse - (1 - e) x_t - e/V sum_j x_j + z lse^2
#     p_j = exp(x_j - lse)            dx_j = p_j (1 + 2 z lse) - (1 - e) [j = t] - e/V
#     dh  = W^T dx                    dW  += dx h^T         db += dx
#
# The gradient needs nothing but the logits. So the forward pass forms it at once, in the logits' own place, and both
# products with it follow while it is in the cache. That makes three matrix products, 6 N K V D operations, as many as a
# loss that holds all its logits; recomputing the logits in the backward pass, as cut cross-entropy does (Wijmans et al.
# 2024), makes four. The backward pass only multiplies by the gradient of the loss, which is not known before. The
# method is that of Liger's fused linear cross-entropy (Hsu et al. 2024); new here are K heads, each with a state of its
# own or all with one.
#
#                   V columns                 The tile is the only piece of the logits in memory. It moves down the rows
#            +---------------------+          of a codebook, then on to the next codebook:
#     N rows |      (not held)     |
#            +---------------------+            1  tile = h W^T              product, into the tile
#            | tile: x, then dx    | n rows     2  x -> loss, rank, dx       one kernel, in place
#            +---------------------+            3  dh  = tile W              product, into the gradient
#            |      (not held)     |            4  dW += tile^T h            product, summed in float32
#            +---------------------+
#               times K codebooks             In memory: the tile, loss and rank of each target, dh, dW.
#                                             Not in memory: N K V logits, their softmax, their gradient.
#
# A tile takes at most 1/18 of the memory of all N K V logits in float32 (1/30 in half precision): with its work space
# that stays at 1/16. It has at least 0.5 MB, and no more than 17 MB (4,096 rows of 2,051 columns in half precision) or
# 2,048 rows. It may always have D / 8 rows, an eighth of the memory of a head's weights: each tile reads all of these,
# and for few rows of many classes that takes most of the time (27 of Kani's 80,538: almost twice as long as 128). Each
# tile adds to all of dW, so a single head in half precision gets 1,024 rows if these alone are no more than 1/16. Where
# heads are small, a tile holds several of them. Where all heads read one state, they are, for the kernel and in half
# precision, one wide head of K V columns, so that the product itself sums their parts of dh.
# Weights in half precision, whose gradient several tiles sum, need a sum in float32 beside it. A loss per codebook that
# is not simply summed, over a shared state, costs a second pass: one state holds one dh, but each codebook has its own
# factor.


@torch.compiler.disable  # compiled, its tiles would be traced anew for every length of a batch
def multi_codebook_cross_entropy(
    hidden, weight, target, bias=None, ignore_index=IGNORE, codebook_weight=None, row_weight=None,
    label_smoothing=0.0, z_loss=0.0, buffer=None, kernel=None, each=False,
):  # fmt: skip
    """Cross-entropy of K classification heads at once, without ever holding their logits.

    hidden (N, K, D), or (N, D) where all heads read the same state; weight (K, V, D), or (V, D) where K = 1; target
    (N, K), `ignore_index` where a target is missing; bias (K, V) or None. Returns loss (K,), each codebook's mean over
    its targets that are not ignored (0 for a codebook without targets), in float32 or better, and correct (K,), how
    many of these targets ranked first. With `each`, correct is (N, K), whether each target ranked first, and every
    target's loss (N, K), 0 where it is ignored, comes third; it has no gradient.

    row_weight (N,) makes it a weighted mean, in which a row of weight 2 counts like two rows; codebook_weight (K,)
    multiplies the losses. `label_smoothing` e spreads a share e of the target evenly over all classes (Szegedy et al.
    2016); `z_loss` z adds z * lse^2, which keeps the scale of the logits in place (PaLM, Chowdhery et al. 2022).
    Neither the target nor the weights of rows and codebooks get a gradient.

    buffer: most elements of a tile; None: see above. kernel: True takes the Triton kernel, False its PyTorch twin, None
    the kernel where one exists for device and type.

    Raises ValueError for shapes that do not fit, and on the CPU for targets out of range; on a GPU, where the check
    would make the host wait, such a target makes its codebook's loss nan.
    """
    if weight.ndim == 2:
        weight = weight[None]
        bias = None if bias is None else bias.reshape(1, -1)
    _check_loss_inputs(hidden, weight, target, bias, ignore_index, codebook_weight, row_weight)
    dtype = _product_type(hidden)
    if kernel is None:
        kernel = hidden.is_cuda and triton is not None and dtype != torch.float64
    if kernel and triton is None:
        raise ValueError("kernel=True needs Triton: pip install triton")
    exact = torch.promote_types(dtype, torch.float32)

    # the share of each target in the sum of its codebook's loss: 1 / N where all weights are alike
    used = target != ignore_index
    scale = used.to(exact) if row_weight is None else used * row_weight[:, None].to(exact)
    total = scale.sum(0)
    scale = scale * torch.where(total > 0, (1 if codebook_weight is None else codebook_weight.to(exact)) / total, 0)
    unit = torch.ones_like(total)
    if len(target) and dtype == torch.float16:
        # 1 / N underflows in float16: it waits for the backward pass. Until then each share counts in units of the
        # largest one of its codebook, or with one dh of all codebooks.
        unit = scale.abs().amax(0) if hidden.ndim == 3 else scale.abs().amax().expand(len(weight))
        unit = torch.where(unit > 0, unit, 1)
    scale = scale / unit
    grads = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    options = dict(dtype=dtype, buffer=buffer, smoothing=label_smoothing, z_loss=z_loss, kernel=kernel)
    loss, correct, losses = _MultiCodebookCrossEntropy.apply(hidden, weight, bias, target, scale, unit, grads, options)
    correct = correct & used
    return (loss, correct, torch.where(used, losses, 0)) if each else (loss, correct.sum(0))


def _check_loss_inputs(hidden, weight, target, bias, ignore_index, codebook_weight, row_weight):
    """Raise ValueError for shapes that do not fit, and on the CPU for targets that are no class."""
    K, V, D = weight.shape
    N = len(target)
    if target.shape != (N, K) or hidden.shape not in ((N, K, D), (N, D)):
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and target {tuple(target.shape)}"
        raise ValueError(f"{shapes} do not fit: expected (N, K, D) or (N, D), (K, V, D), (N, K)")
    for name, x, shape in (("bias", bias, (K, V)), ("codebook_weight", codebook_weight, (K,)),
                           ("row_weight", row_weight, (N,))):  # fmt: skip
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} {tuple(x.shape)} does not fit: expected {shape}")
    if N and _can_look(target):
        wrong = (target != ignore_index) & ((target < 0) | (target >= V))
        if wrong.any():
            raise ValueError(f"target {int(target[wrong][0])} is outside 0..{V - 1}")


class _MultiCodebookCrossEntropy(torch.autograd.Function):
    """unit * sum(scale * loss of each target) by codebook (K,); correct and loss of each target (N, K)."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, scale, unit, wanted, options):
        loss, correct, ctx.grads = _cross_entropy_pass(hidden, weight, bias, target, scale, wanted, **options)
        ctx.save_for_backward(hidden, weight, bias, target, scale, unit)
        ctx.wanted = wanted
        ctx.options = options
        ctx.mark_non_differentiable(correct, loss)
        return torch.where(scale != 0, loss * scale, 0).sum(0) * unit, correct, loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        hidden, weight, bias, target, scale, unit = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None  # scaled in place below, so they serve once
        shared = hidden.ndim == 2
        # after sum() the gradients of all codebooks are one expanded value: its stride says so without a look at it
        alike = grad_loss.stride() == (0,) or len(grad_loss) == 1
        if grads is None or (shared and not alike):  # a second backward pass, or a dh summed with other factors
            largest = grad_loss.abs().max()
            scale = scale * torch.where(largest > 0, grad_loss / largest, 0)
            grad_loss = largest.expand(len(grad_loss))
            grads = _cross_entropy_pass(hidden, weight, bias, target, scale, ctx.wanted, **ctx.options)[2]
        factor = grad_loss * unit
        if not (_can_look(factor) and (factor == 1).all()):
            _multiply(grads[0], factor[:1] if shared else factor, -2)
            _multiply(grads[1], factor, 0)
            _multiply(grads[2], factor, 0)
        return *grads, None, None, None, None, None


def _product_type(x):
    """The type of a matrix product with x, which autocast may choose."""
    device = x.device.type if not x.is_meta else "cpu"  # autocast knows no meta
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _can_look(x):
    """Whether the host can read values of x without waiting for a GPU."""
    return x.device.type == "cpu"


def _multiply(grad, factor, axis):
    """grad *= factor, a number for each index of that axis (or one for all), rounded once."""
    if grad is None:
        return
    if grad.is_cuda or grad.dtype == factor.dtype:
        shape = [1] * grad.ndim
        shape[axis] = -1
        grad.mul_(factor.view(shape))
    else:  # on a CPU mixed types would copy the whole gradient; a scalar does not
        parts = grad.unbind(axis) if len(factor) > 1 else [grad]
        for part, number in zip(parts, factor, strict=True):
            part.mul_(number)


def _cross_entropy_pass(hidden, weight, bias, target, scale, wanted, dtype, buffer, smoothing, z_loss, kernel):
    """Loss and rank of every target, and the gradients of sum(scale * loss) that are `wanted` (hidden, weight, bias).

    hidden (N, K, D) or (N, D), weight (K, V, D), bias (K, V) or None, target and scale (N, K) -> loss and correct
    (N, K), [gradient or None] * 3. Products are made in `dtype`, sums in that of scale.
    """
    (N, K), (_, V, D) = target.shape, weight.shape
    exact = scale.dtype
    device = hidden.device
    shared = hidden.ndim == 2
    # H heads, each J codebooks wide: heads that share a state form one wide head, so dh is summed inside one product
    H, J = (1, K) if K == 1 or (shared and (kernel or dtype != exact)) else (K, 1)
    C = J * V
    target, scale = target.contiguous(), scale.contiguous()  # the kernel uses one stride for these, loss and correct
    make = torch.empty if N else torch.zeros
    grads = [make(x.shape, dtype=x.dtype, device=device) if wanted[i] else None for i, x in enumerate((hidden, weight))]
    bias_sum = torch.zeros(H, 1, C, dtype=exact, device=device) if wanted[2] else None
    loss = torch.empty_like(scale)
    correct = torch.empty_like(target, dtype=torch.bool)

    # the tile: n rows of g heads
    buffer = buffer or _tile_size(N, K, V, C, D, dtype, exact)
    n = max(1, min(N, buffer // C))
    if n < N:  # tiles of nearly equal size; a CPU takes a tenth longer for 1,725 rows of bfloat16 than for 1,728
        step = 64 if n >= 64 else 1
        n = step * math.ceil(N / math.ceil(N / (n - n % step)) / step)
    g = 1 if shared else max(1, min(H, min(buffer, 2**18) // (n * C)))
    # aligned rows: without, a product with 2,051 columns takes half as long again
    aligned = kernel or (J == 1 and (hidden.is_cuda or (dtype == torch.float32 and C > 640)))
    pitch = math.ceil(C / 64) * 64 if aligned else C
    memory = torch.empty(g * n * pitch, dtype=dtype, device=device)

    hidden, grad_hidden = (
        None if x is None else x.view(N, 1 if shared else H, D).expand(N, H, D).transpose(0, 1)
        for x in (hidden, grads[0])
    )
    weight, grad_weight = (None if x is None else x.reshape(H, C, D) for x in (weight, grads[1]))
    bias = None if bias is None else bias.reshape(H, 1, C)
    # sums over several tiles are rounded once, at the end
    narrow = grad_weight is not None and n < N and grad_weight.dtype != exact
    by_head = [x.reshape(N, H, J).transpose(0, 1) for x in (target, scale, loss, correct)]
    for head in range(0, H if N else 0, g):
        heads = slice(head, head + g)
        w = weight[heads].to(dtype)  # (g, C, D)
        dw = None if grad_weight is None else grad_weight[heads]
        if narrow:
            dw = torch.empty_like(dw, dtype=exact)
        for row in range(0, N, n):
            place = heads, slice(row, row + n)
            h = hidden[place].to(dtype)  # (g, n, D)
            size = *h.shape[:2], pitch
            padded = memory[: math.prod(size)].view(size)
            tile = padded[..., :C]
            if bias is not None:
                tile.copy_(bias[heads])
            _product(h, w.mT, tile, bias is None)
            rows = [x[place] for x in by_head]
            (_launch_softmax_kernel if kernel else _softmax_rows)(padded, *rows, V, smoothing, z_loss)
            if grad_hidden is not None:
                _product(tile, w, grad_hidden[place], not shared or head == 0)
            if dw is not None:
                _product(tile.mT, h, dw, row == 0)
            if bias_sum is not None:
                bias_sum[heads] += tile.sum(1, keepdim=True, dtype=exact)
        if narrow:
            grad_weight[heads] = dw
    grads.append(None if bias_sum is None else bias_sum.view(K, V).to(bias.dtype))
    return loss, correct, grads


def _tile_size(N, K, V, C, D, dtype, exact):
    """Elements of a tile whose rows have C columns, for weights (C, D); the comment above says why so many."""
    logits = N * K * V * 4  # bytes
    width = C * dtype.itemsize
    share = logits // (18 if dtype == exact else 30)
    if K == 1 and dtype != exact:
        share = max(share, min(logits // 16, 1024 * width))
    return min(max(share, 2**19, D // 8 * width), max(17_000_000, 2048 * width)) // dtype.itemsize


def _product(a, b, out, new):
    """out = a b, or out += a b where out is not `new`: (g, m, k) x (g, k, d) -> (g, m, d), in a's or a wider type."""
    if out.dtype != a.dtype:
        _, m, d = out.shape
        step = max(1, 2**19 // d, m // 40)  # rows per product: only they exist in the narrow type too
        for x, y, total in zip(a, b, out, strict=True):
            for rows, part in zip(x.split(step), total.split(step), strict=True):
                product = torch.mm(rows, y)
                part.copy_(product) if new else part.add_(product)
    elif len(a) == 1:  # bmm would copy strided matrices
        torch.mm(a[0], b[0], out=out[0]) if new else out[0].addmm_(a[0], b[0])
    else:
        torch.bmm(a, b, out=out) if new else out.baddbmm_(a, b)


def _softmax_rows(tile, target, scale, loss, correct, V, smoothing, z_loss):
    """Every row's loss and rank, and in the row's place the gradient of scale * loss: the PyTorch twin of the kernel.

    tile (g, n, J V) logits, overwritten, if J = 1 with padding columns behind them; target, scale, loss and correct
    (g, n, J). The loss is nan where the target is no class.
    """
    n, J = target.shape[1:]
    tile[..., J * V :] = -math.inf  # padding: with it whole rows are contiguous, which is faster
    # parts that stay in the cache, and whose float32 copies take at most half of the tile; an even number of rows
    n_parts = max(1 if tile.dtype == scale.dtype else 2, math.ceil(tile.numel() / 2**20))
    part_rows = 2 * math.ceil(n / n_parts / 2)
    whole = tile.unflatten(-1, (J, -1)), *(x[..., None] for x in (target, scale, loss, correct))
    minus = scale.new_full((), smoothing - 1)
    for part, goal, factor, value, first in zip(*(x.split(part_rows, 1) for x in whole), strict=True):
        x = part.to(scale.dtype).contiguous()  # (g, part_rows, J, V), no copy in float32
        place = goal.clamp(0, V - 1)
        picked = x.gather(-1, place)
        top = x.amax(-1, True)
        if _can_look(x):  # argmax is slow: it only settles ties, in rows where the target has the largest logit
            rows = torch.eq(picked, top, out=first).nonzero(as_tuple=True)[:3]
            first[rows] = x[rows].argmax(-1, True) == goal[rows]
        else:
            torch.eq(x.argmax(-1, True), goal, out=first)
        spread = smoothing * x[..., :V].mean(-1, True) if smoothing else 0
        torch.softmax(x, -1, out=x)
        lse = top - x.amax(-1, True).log()  # the largest probability is at least 1 / V: its logarithm is finite
        nll = lse - (1 - smoothing) * picked - spread
        if z_loss:
            nll += z_loss * lse**2
            x *= 1 + 2 * z_loss * lse
        if smoothing:
            x -= smoothing / V
        value.copy_(nll.masked_fill_(place != goal, math.nan))
        x.scatter_add_(-1, place, minus.expand_as(place))
        part.copy_(x.mul_(factor))


if triton:

    @triton.jit
    def _softmax_kernel(
        tile, target, scale, loss, correct, tile_stride, head_stride, row_stride, n, J, V, smoothing, z_loss,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program for each of J codebooks, n rows and g heads; the strides are in elements.

        A first pass over the row's logits finds loss and rank, a second leaves the gradient in their place.
        """
        program = tl.program_id(0).to(tl.int64)  # offsets may pass 2^31
        j, row, head = program % J, program // J % n, program // J // n
        tile += program // J * tile_stride + j * V
        place = head * head_stride + row * row_stride + j
        goal, factor = tl.load(target + place), tl.load(scale + place)
        columns = tl.arange(0, BLOCK)
        top, best = -float("inf"), V
        total, picked, sum_x = 0.0, 0.0, 0.0  # Triton has no chained assignment
        for start in range(0, V, BLOCK):
            column = start + columns
            x = tl.load(tile + column, column < V, -float("inf")).to(tl.float32)
            high = tl.max(x, 0)
            first = tl.min(tl.where(x == high, column, V), 0)
            best = tl.where(high > top, first, best)  # the first of equals, as in argmax
            higher = tl.maximum(top, high)
            level = tl.where(higher == -float("inf"), 0.0, higher)  # all logits so far are -inf
            total = total * tl.exp(top - level) + tl.sum(tl.exp(x - level), 0)
            top = higher
            picked += tl.sum(tl.where(column == goal, x, 0.0), 0)  # a load could race with warps that overwrite it
            sum_x += tl.sum(tl.where(column < V, x, 0.0), 0)
        lse = top + tl.log(total)
        spread = tl.where(smoothing > 0, smoothing * sum_x / V, 0.0)  # 0 even where a logit is -inf
        value = lse - (1 - smoothing) * picked - spread + z_loss * lse * lse
        tl.store(loss + place, tl.where((goal >= 0) & (goal < V), value, float("nan")))
        tl.store(correct + place, best == goal)
        for start in range(0, V, BLOCK):
            column = start + columns
            x = tl.load(tile + column, column < V, -float("inf")).to(tl.float32)
            gradient = tl.exp(x - lse) * (1 + 2 * z_loss * lse) - smoothing / V
            gradient = (gradient - tl.where(column == goal, 1 - smoothing, 0.0)) * factor
            tl.store(tile + column, gradient.to(tile.dtype.element_ty), column < V)


def _launch_softmax_kernel(tile, target, scale, loss, correct, V, smoothing, z_loss):
    """`_softmax_kernel` over tile (g, n, J V or more); the other tensors (g, n, J), all of one stride."""
    g, n, J = target.shape
    block = min(triton.next_power_of_2(V), 4096)
    _softmax_kernel[(g * n * J,)](
        tile, target, scale, loss, correct, tile.stride(1), *target.stride()[:2], n, J, V, smoothing, z_loss,
        BLOCK=block, num_warps=max(1, min(16, block // 256)),
    )  # fmt: skip

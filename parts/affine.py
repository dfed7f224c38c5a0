"""Affine quantisation: weights in few bits, as mlx packs them.

    packed, scales, biases = quantise(weight, bits=4)
    weight = dequantise(packed, scales, biases)                   within half a step (a scale) of the original

A row of a weight (O, I) is cut into groups of G numbers. A group has a scale s and a bias b, and a number of it is an
integer q of a few bits: s q + b. The integers of a row are one stream of bits, the lowest first, in words of 32.
"""

import torch

BITS = (2, 3, 4, 5, 6, 8)
GROUP = 64  # numbers in a group, unless config.json says so


def quantise(weight, bits, group=GROUP):
    """weight (O, I) -> packed (O, I * bits / 32) uint32, scales and biases (O, I / group) of the weight's type.

    The end of a group's range that is farther from zero is exact, and so is zero where the group's range holds it
    (mlx.core.quantize). I has to be a multiple of `group`, and `group` of 32.
    """
    x = weight.float().unflatten(1, (-1, group))
    low, high = x.aminmax(dim=2)
    positive = low.abs() <= high.abs()
    edge = torch.where(positive, high, low)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-7)
    scale = torch.where(positive, -scale, scale)
    steps = (edge / scale).round()
    scale = torch.where(steps == 0, scale, edge / steps)
    bias = torch.where(steps == 0, 0, edge)
    q = ((x - bias[..., None]) / scale[..., None]).round().clamp(0, 2**bits - 1)
    return pack(q.to(torch.uint8).flatten(1), bits), scale.to(weight.dtype), bias.to(weight.dtype)


def dequantise(packed, scales, biases, group=GROUP):
    """The weight (O, I), float32, of what `quantise` returns. Raises ValueError for shapes that do not belong together.
    """
    columns = scales.shape[1] * group
    bits, rest = divmod(packed.shape[1] * 32, columns)
    rows = len(packed) == len(scales) and scales.shape == biases.shape
    rows = rows and scales.is_floating_point() and biases.is_floating_point()
    if packed.dtype != torch.uint32 or rest or bits not in BITS or not rows:
        shapes = ", ".join(str(tuple(x.shape)) for x in (packed, scales, biases))
        raise ValueError(f"no weight in groups of {group} has words ({packed.dtype}), scales and biases of shapes "
                         f"{shapes}")  # fmt: skip
    q = unpack(packed, bits).unflatten(1, (-1, group)).float()
    return (q * scales.float()[..., None] + biases.float()[..., None]).flatten(1)


def places(bits):
    """(number, word, shift): where in `bits` words of 32 bits each of 32 numbers begins."""
    return [(i, *divmod(i * bits, 32)) for i in range(32)]


def pack(q, bits):
    """Integers (O, I) uint8 -> words (O, I * bits / 32) uint32."""
    q = q.unflatten(1, (-1, 32))
    words = torch.zeros(*q.shape[:2], bits, dtype=torch.int64, device=q.device)
    for i, word, shift in places(bits):
        number = q[..., i].to(torch.int64) << shift
        words[..., word] |= number & 0xFFFFFFFF
        if shift + bits > 32:
            words[..., word + 1] |= number >> 32
    low = words.flatten(1)
    return torch.where(low < 2**31, low, low - 2**32).to(torch.int32).view(torch.uint32)


def unpack(words, bits):
    """The inverse of `pack`."""
    words = (words.view(torch.int32).to(torch.int64) & 0xFFFFFFFF).unflatten(1, (-1, bits))
    q = torch.empty(*words.shape[:2], 32, dtype=torch.uint8, device=words.device)
    for i, word, shift in places(bits):
        number = words[..., word] >> shift
        if shift + bits > 32:
            number |= words[..., word + 1] << (32 - shift)
        q[..., i] = number & (2**bits - 1)
    return q.flatten(1)

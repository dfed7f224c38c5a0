"""Codes of two routes may differ where the two nearest entries tie within rounding, and nowhere else."""

from unittest import mock

import torch
from torch.nn.functional import normalize

from codec import FSQ, RVQ, VectorQuantizer, squared_distances

EPSILON = 2**-23  # what float32 rounds off, relative to a number
LATENTS = 64  # roundings of the encoder's output: by how much two routes differ at most, relative to its length
PRODUCT = 4  # roundings of a squared distance, relative to the lengths of the two vectors, squared


def near(x, entries, length):
    """Whether the two entries (V, D) nearest to x (n, D) are equally near within rounding: (n,). `length` (n,) is that
    of the latents, of which x is what the codebooks before left over."""
    x, entries = x.double(), entries.double()
    distances, nearest = squared_distances(x, entries).topk(2, largest=False)
    a, b = entries[nearest].unbind(1)
    latents = 2 * LATENTS * length * (a - b).norm(dim=1)
    product = PRODUCT * (x.norm(dim=1) + torch.maximum(a.norm(dim=1), b.norm(dim=1))) ** 2
    return distances[:, 1] - distances[:, 0] <= EPSILON * (latents + product)


def ties(codec, wav):
    """Where codec.encode(wav (B, N)) chooses between entries that tie: (B, K, T)."""
    seen = []

    def residual(self, x):
        codes, rest = encode[RVQ](self, x), self.input_proj(x).mT.flatten(0, 1)
        length = rest.norm(dim=1)
        for codebook, code in zip(self.codebooks, codes.transpose(0, 1).flatten(1), strict=True):
            seen.append(near(rest, codebook, length).view(len(x), 1, -1))
            rest = rest - codebook[code]
        return codes

    def level(self, x):
        projected = normalize(self.in_proj(x).mT.flatten(0, 1))
        seen.append(near(projected, normalize(self.codebook.weight), 1).view(len(x), 1, -1))
        return encode[VectorQuantizer](self, x)

    def scalar(self, x):
        y = self.bound * (x.unflatten(1, (-1, len(self.levels))) + self.shift).tanh() - self.offset
        border = (y - y.floor() - 0.5).abs()
        seen.append((border <= EPSILON * LATENTS * self.bound).any(2))
        return encode[FSQ](self, x)

    def analyse(wav, state):
        seen.clear()
        type(codec).analyse(codec, wav, state)
        return torch.cat(seen, 1)

    quantizers = {RVQ: residual, VectorQuantizer: level, FSQ: scalar}
    encode = {kind: kind.encode for kind in quantizers}
    patches = [mock.patch.object(kind, "encode", watched) for kind, watched in quantizers.items()]
    with patches[0], patches[1], patches[2], mock.patch.object(codec, "analyse", analyse):
        return codec.encode(wav)


def check_same(codec, wav, codes, expected):
    """Two routes made the same codes (B, K, T) of wav (B, N), but for ties, which are few. After the first code of a
    frame that differs, the others of this frame code something else."""
    assert codes.shape == expected.shape, f"{tuple(codes.shape)}, not {tuple(expected.shape)}"
    tied, differ = ties(codec, wav), codes != expected
    clear = (differ & (differ.cumsum(1) == 1) & ~tied).nonzero().tolist()
    assert not clear, f"codes differ where nothing ties, at {clear}"
    assert tied.sum() <= 1 + tied.numel() / 100, f"{tied.sum()} of {tied.numel()} codes tie"

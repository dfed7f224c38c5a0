"""Two implementations may give different codes where the two nearest entries tie within rounding, and only there."""

from unittest import mock

import torch
from torch.nn.functional import normalize

from codec import FSQ, RVQ, VectorQuantizer, squared_distances

EPSILON = 2**-23  # rounding error of float32, relative to the number
LATENTS = 64  # rounding errors in the encoder's output: the largest difference of two implementations
PRODUCT = 4  # rounding errors in a squared distance, relative to the squared lengths of the two vectors


def near(x, entries, length):
    """Whether the two entries (V, D) nearest to x (n, D) are equally near within rounding: (n,).

    length: (n,), of the latents; x is the rest of these that earlier codebooks left.
    """
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
    """Check that two implementations give the same codes (B, K, T) of wav (B, N), except for a few ties.

    After the first code of a frame that differs, the later ones of this frame code another rest.
    """
    assert codes.shape == expected.shape, f"{tuple(codes.shape)}, not {tuple(expected.shape)}"
    tied, differ = ties(codec, wav), codes != expected
    clear = (differ & (differ.cumsum(1) == 1) & ~tied).nonzero().tolist()
    assert not clear, f"codes differ where nothing ties, at {clear}"
    assert tied.sum() <= 1 + tied.numel() / 100, f"{tied.sum()} of {tied.numel()} codes tie"

"""parts/affine.py: against mlx, against what it wrote, and by itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from parts.affine import BITS, dequantise, pack, quantise, unpack


def weights():
    """Rows of noise, of one sign, of equal numbers, of zeros, and with one number that is far from the others."""
    x = torch.randn(8, 256)
    x[1] = x[1].abs() + 1
    x[2] = -x[1]
    x[3] = 0.7
    x[4] = 0
    x[5, 100] = 50
    return x


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_equals_mlx(bits, group):
    """Words, scales and biases are those of mlx bit for bit, and what it reads of ours is what we read."""
    mx = pytest.importorskip("mlx.core")
    x = weights()
    ours = quantise(x, bits, group)
    theirs = mx.quantize(mx.array(x.numpy()), group_size=group, bits=bits)
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a.numpy(), np.array(b))
    read = mx.dequantize(*(mx.array(part.numpy()) for part in ours), group_size=group, bits=bits)
    torch.testing.assert_close(dequantise(*ours, group), torch.from_numpy(np.array(read)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_equals_mlx_in_half_precision(dtype, bits):
    mx = pytest.importorskip("mlx.core")
    x = weights().to(getattr(torch, dtype))
    theirs = mx.quantize(mx.array(x.float().numpy()).astype(getattr(mx, dtype)), bits=bits)
    words, *rest = quantise(x, bits)
    assert np.array_equal(words.numpy(), np.array(theirs[0]))
    for a, b in zip(rest, theirs[1:], strict=True):
        assert a.dtype == x.dtype and np.array_equal(a.float().numpy(), np.array(b.astype(mx.float32)))


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_equals_what_mlx_wrote(bits):
    golden = load_file(Path(__file__).parent / "golden" / "mlx_affine.safetensors")
    parts = [golden[f"{bits}.{part}"] for part in ("words", "scales", "biases")]
    assert all(torch.equal(a, b) for a, b in zip(quantise(golden["x"], bits), parts, strict=True))
    torch.testing.assert_close(dequantise(*parts), golden[f"{bits}.dequantised"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_within_a_step(bits):
    x = weights()
    packed, scales, biases = quantise(x, bits)
    assert packed.dtype == torch.uint32 and packed.shape == (8, 256 * bits // 32) and scales.shape == (8, 4)
    error = (dequantise(packed, scales, biases) - x).unflatten(1, (-1, 64)).abs().amax(2)
    assert (error <= scales.abs() + 1e-6).all() and (error[0] > 0.1 * scales[0].abs()).all()
    half = quantise(x.bfloat16(), bits)
    assert half[1].dtype == half[2].dtype == torch.bfloat16 and half[0].dtype == torch.uint32


@pytest.mark.parametrize("bits", BITS)
def test_packing_keeps_all_integers(bits):
    q = torch.randint(2**bits, (3, 96)).to(torch.uint8)
    assert torch.equal(unpack(pack(q, bits), bits), q)
    assert unpack(pack(q, bits).to("meta"), bits).shape == q.shape


def test_shapes_that_do_not_belong_together():
    packed, scales, biases = quantise(weights(), 4)
    for parts in ((packed[:, :-1], scales, biases), (packed, scales[:, :-1], biases), (packed[1:], scales, biases),
                  (packed.view(torch.float32), scales, biases)):  # fmt: skip
        with pytest.raises(ValueError, match="no weight in groups of 64 has words .*, scales and biases of shapes"):
            dequantise(*parts)

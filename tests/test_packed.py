"""parts/packed.py: products of packed weights against F.linear."""

import gc
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from parts import packed
from parts.lora import LoRALinear
from parts.packed import Packed, fastest, missing, pack, pack_linears

needs_packed = pytest.mark.skipif(bool(missing("packed")), reason=missing("packed"))
needs_int8 = pytest.mark.skipif(bool(missing("int8")), reason=missing("int8"))
both = [pytest.param("packed", marks=needs_packed), pytest.param("int8", marks=needs_int8)]


def layer(outputs, inputs, bias=True, dtype=torch.float32):
    weight = torch.randn(outputs, inputs) * inputs**-0.5
    return weight.to(dtype), torch.randn(outputs).to(dtype) if bias else None


def error(ours, exact):
    """Of each row, relative to its length."""
    return ((ours - exact).norm(dim=-1) / exact.norm(dim=-1)).max()


@needs_packed
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 5), (64, 96), (2051, 33), (96, 1000)])
def test_packed_equals_plain(sizes, bias):
    weight, bias = layer(*sizes, bias)
    product = pack(weight, bias, "packed")
    for shape in [(0,), (1,), (3,), (8,), (300,), (), (2, 3), (1, 1), (2, 0), (2, 1, 4)]:
        x = torch.randn(*shape, sizes[1])
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        torch.testing.assert_close(product(x), exact.float(), rtol=1e-5, atol=1e-5)


@needs_int8
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 5), (64, 96), (2051, 33), (96, 1000)])
def test_int8_is_near_plain(sizes, bias):
    weight, bias = layer(*sizes, bias)
    product = pack(weight, bias, "int8")
    for shape in [(0,), (1,), (3,), (8,), (300,), (), (2, 3), (1, 1), (2, 0), (2, 1, 4)]:
        x = torch.randn(*shape, sizes[1])
        y = product(x)
        exact = F.linear(x, weight, bias)
        assert y.shape == exact.shape and y.dtype == exact.dtype
        # half a step of an activation at each input, half a step of a weight likewise
        steps = x.abs().amax(-1, keepdim=True) / 127 / 2 * weight.abs().sum(1)
        steps = steps + x.abs().sum(-1, keepdim=True) * weight.abs().amax(1) / 64 / 2
        assert ((y - exact).abs() <= 1.02 * steps + 1e-6).all()
    if sizes[1] > 30:
        x = torch.randn(300, sizes[1])
        assert error(pack(weight, None, "int8")(x), F.linear(x, weight)) < 0.03


@needs_int8
def test_int8_does_not_overflow():
    """The largest products of one sign are exact: 16 bits hold the sums of two of them."""
    x = torch.tensor([[127.0], [-127.0]]).expand(2, 1000)
    for sign in (1.0, -1.0):
        product = pack(torch.full((16, 1000), sign * 64), None, "int8")
        exact = (x.sum(1) * sign * 64)[:, None].expand(2, 16)
        torch.testing.assert_close(product(x), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(product(x[1:]), exact[1:], rtol=1e-6, atol=0)


@needs_int8
def test_a_row_of_int8_does_not_depend_on_its_neighbours():
    weight, bias = layer(40, 96)
    product = pack(weight, bias, "int8")
    quiet = torch.randn(64, 96)
    beside = torch.cat([quiet, 1e6 * torch.randn(64, 96)])
    assert torch.equal(product(beside)[:64], product(quiet))
    assert torch.equal(product(beside.view(2, 64, 96))[0], product(quiet))
    alone = torch.stack([product(x) for x in quiet])  # but for an activation in ten thousand that rounds differently
    assert error(alone, product(quiet)) < 0.01
    assert ((alone - product(quiet)).norm(dim=-1) < 1e-5 * alone.norm(dim=-1)).float().mean() > 0.9


@needs_int8
@pytest.mark.parametrize("rows", [1, 3])
def test_int8_of_zeros_and_of_rows_of_any_size(rows):
    weight, bias = layer(40, 96)
    assert torch.equal(pack(weight, bias, "int8")(torch.zeros(rows, 96)), bias.expand(rows, 40))
    assert torch.equal(pack(0 * weight, bias, "int8")(torch.randn(rows, 96)), bias.expand(rows, 40))
    weight[3] = 0
    product = pack(weight, None, "int8")
    x = torch.randn(rows, 96)
    for size in (1e-30, 1e-10, 1e10, 1e30):
        assert error(product(size * x) / size, F.linear(x, weight)) < 0.03
    x[0, 5] = torch.nan
    assert product(x)[0].isnan().all()
    assert not product(x)[1:].isnan().any()
    x[0, 5] = torch.inf
    assert not product(x)[0].isfinite().any()


@pytest.mark.parametrize("kind", both)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, kind):
    """The weight counts as float32, the result has the type of the input."""
    weight, bias = layer(50, 96, dtype=dtype)
    x = torch.randn(3, 96).to(dtype)
    y = pack(weight, bias, kind)(x)
    assert y.dtype == dtype
    assert error(y.float(), F.linear(x.float(), weight.float(), bias.float())) < (0.005 if kind == "packed" else 0.04)


@pytest.mark.parametrize("kind", both)
def test_an_input_need_not_be_contiguous(kind):
    weight, bias = layer(50, 96)
    product = pack(weight, bias, kind)
    inputs = [torch.randn(4, 7, 96)[:, -1], torch.randn(2, 96, 3).mT, torch.randn(3, 192)[:, ::2],
              torch.randn(192)[::2], torch.randn(96).expand(3, 96)]  # fmt: skip
    for x in inputs:
        assert torch.equal(product(x), product(x.clone(memory_format=torch.contiguous_format)))


class Together(nn.Module):
    together = ("a", "b", "c")

    def __init__(self, biases=(False, False, False), sizes=(24, 8, 9)):
        super().__init__()
        self.joined = None
        for name, size, bias in zip(self.together, sizes, biases, strict=True):
            setattr(self, name, nn.Linear(32, size, bias=bias))
        self.out = nn.Sequential(nn.Linear(sum(sizes), 5), nn.ReLU())

    def forward(self, x):
        if self.joined is None:
            return self.out(torch.cat([self.a(x), self.b(x), self.c(x)], -1))
        return self.out(torch.cat(self.joined(x).split(self.widths, -1), -1))


@pytest.mark.parametrize("biases", [(False,) * 3, (True,) * 3, (True, False, True)])
@pytest.mark.parametrize("kind", both)
def test_children_are_joined(kind, biases):
    model = nn.Sequential(Together(biases), nn.Linear(5, 4))
    x = torch.randn(2, 3, 32)
    exact = model(x).detach()
    pack_linears(model, kind)
    first = model[0]
    assert first.a is first.b is first.c is None and first.widths == [24, 8, 9]
    assert all(isinstance(m, Packed) for m in (first.joined, first.out[0], model[1])) and not list(model.parameters())
    assert error(model(x), exact) < (1e-5 if kind == "packed" else 0.1)


@needs_packed
def test_what_is_no_plain_linear_layer_stays():
    model = Together()
    model.b.__class__ = LoRALinear
    model.table = nn.Embedding(3, 32)
    head = model.table.weight
    pack_linears(model, "packed")
    assert model.joined is None and type(model.b) is LoRALinear and model.table.weight is head
    assert isinstance(model.a, Packed) and isinstance(model.c, Packed)
    model = Together()
    del model.c  # such as the gate of a layer that has none
    pack_linears(model, "packed")
    assert model.joined is None and isinstance(model.a, Packed)


@pytest.mark.parametrize("kind", both)
def test_old_weights_are_freed(kind):
    model = nn.Sequential(Together(), nn.Linear(5, 4))
    old = [weakref.ref(p) for p in model.parameters()]
    pack_linears(model, kind)
    gc.collect()
    assert len(old) == 7 and not any(ref() is not None for ref in old)


@pytest.mark.parametrize("kind, operator", [
    ("packed", "mkldnn._reorder_linear_weight"), ("packed", "mkldnn._linear_pointwise"),
    ("int8", "quantized.linear_prepack"), ("int8", "quantized.linear_with_input_q_dq_qweight_dq_output_fp32"),
])  # fmt: skip
def test_a_missing_operator_has_one_line(monkeypatch, kind, operator):
    space, name = operator.split(".")
    gone = type("Gone", (), {})()  # has no operator at all
    monkeypatch.setattr(torch.ops, space, gone)
    reason = missing(kind)
    assert kind in reason and "no attribute" in reason and "\n" not in reason
    assert fastest(nn.Linear(8, 8)) == "plain" or kind == "int8"


def test_a_wrong_operator_is_seen(monkeypatch):
    monkeypatch.setattr(packed.PackedFloat, "prepare", lambda self, weight: weight)
    monkeypatch.setattr(packed.PackedFloat, "product", lambda self, x: F.linear(x, -self.weight))
    assert "wrongly" in missing("packed")


@needs_packed
@pytest.mark.parametrize("faster", ["plain", "packed"])
def test_the_faster_kind_is_chosen(monkeypatch, faster):
    """By the clock alone: it says here how long each kind takes."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64, bias=False))
    seen = []

    def seconds(product, x):
        kind = "packed" if isinstance(product, Packed) else "plain"
        seen.append((kind, *x.shape, *product(x).shape))
        return 1.0 if kind == faster else 2.0

    monkeypatch.setattr(packed, "seconds", seconds)
    assert fastest(model, rows=3) == faster
    assert set(seen) == {(kind, 3, *sizes) for kind in ("plain", "packed") for sizes in ((64, 3, 32), (32, 3, 64))}
    assert all(type(m) is nn.Linear for m in (model[0], model[2]))  # nothing is packed yet


def test_fastest_measures():
    torch.manual_seed(0)
    assert fastest(nn.Linear(64, 48)) in ("plain", "packed")
    assert fastest(nn.ReLU()) == "plain"
    assert fastest(nn.Linear(8, 8, device="meta")) == "plain"

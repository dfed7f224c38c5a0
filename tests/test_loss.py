import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import model as models
from model import multi_codebook_cross_entropy

GPU = torch.cuda.is_available()  # the kernel runs there, and where there is none on the CPU, in Triton's interpreter
TRITON = pytest.mark.skipif(models.triton is None, reason="no Triton")
on_gpu = pytest.mark.skipif(not GPU or models.triton is None, reason="no GPU, or no Triton")
TWIN, KERNEL = pytest.param(False, id="twin"), pytest.param(True, id="kernel", marks=TRITON)
quiet = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter computes with numpy
ALL = pytest.param("all", id="kernel, all", marks=[TRITON, pytest.mark.slow])
both = pytest.mark.parametrize("kernel", [TWIN, KERNEL])
shared_or_own = pytest.mark.parametrize("shared", [pytest.param(False, id="own"), pytest.param(True, id="shared")])
of_each = pytest.mark.parametrize("kernel, shared", [  # of the kernel the usual run takes own states alone
    pytest.param(False, False, id="twin-own"), pytest.param(False, True, id="twin-shared"),
    pytest.param(True, False, id="kernel-own", marks=TRITON),
    pytest.param(True, True, id="kernel-shared", marks=[TRITON, pytest.mark.slow]),
])  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
EVERYTHING = dict(label_smoothing=0.1, z_loss=0.01)


def plain_loss(hidden, weight, target, bias=None, ignore_index=-100, codebook_weight=None, row_weight=None,
               label_smoothing=0.0, z_loss=0.0):  # fmt: skip
    """What multi_codebook_cross_entropy computes, by torch's own cross-entropy on whole logits."""
    hidden = hidden if hidden.ndim == 3 else hidden[:, None].expand(-1, target.shape[1], -1)
    logits = torch.einsum("nkd,kvd->nkv", hidden, weight)
    logits = logits if bias is None else logits + bias
    each = F.cross_entropy(logits.mT, target, ignore_index=ignore_index, label_smoothing=label_smoothing,
                           reduction="none") + z_loss * logits.logsumexp(-1) ** 2  # fmt: skip
    used = target != ignore_index
    share = used.to(each.dtype) if row_weight is None else used * row_weight[:, None].to(each.dtype)
    total = share.sum(0)
    loss = (each * share).sum(0) / torch.where(total > 0, total, 1)
    return loss if codebook_weight is None else loss * codebook_weight, ((logits.argmax(-1) == target) & used).sum(0)


def loss_inputs(N, K, D, V, shared=False, bias=False, dtype=torch.float64, seed=0, ignored=0.3, ignore_index=-100,
                kernel=False):  # fmt: skip
    """Hidden, weight, bias and target, for logits of about standard deviation 1, where the kernel or its twin runs."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*((N, D) if shared else (N, K, D)), generator=g, dtype=torch.float64)
    weight = torch.randn(K, V, D, generator=g, dtype=torch.float64) / D**0.5
    b = torch.randn(K, V, generator=g, dtype=torch.float64) / 2 if bias else None
    target = torch.randint(V, (N, K), generator=g)
    target[torch.rand(N, K, generator=g) < ignored] = ignore_index
    device = "cuda" if kernel and GPU else "cpu"
    return *(t if t is None else t.to(device, dtype).requires_grad_() for t in (hidden, weight, b)), target.to(device)


def weights_for(hidden, K, codebooks=True, rows=True):
    """Weights that half precision holds exactly, a row's may be 0."""
    device = hidden.device
    return dict(codebook_weight=torch.linspace(0.5, 2, K, device=device) if codebooks else None,
                row_weight=(torch.arange(len(hidden), device=device) + 1) % 3 / 2 if rows else None)  # fmt: skip


def loss_and_gradients(function, hidden, weight, bias, target, alike=False, **options):
    """With the same gradient for the loss of every codebook, or with another for each."""
    loss, correct = function(hidden, weight, target, bias, **options)
    share = torch.linspace(1, 2, len(loss), dtype=loss.dtype, device=loss.device)
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    return loss, correct, *torch.autograd.grad(loss.sum() if alike else (loss * share).sum(), leaves)


def exact(*inputs, **options):
    """What loss_and_gradients gives for the plain loss of the same numbers in float64."""
    inputs = [t.detach().double().requires_grad_(t.requires_grad) if torch.is_tensor(t) and t.is_floating_point() else t
              for t in inputs]  # fmt: skip
    return loss_and_gradients(plain_loss, *inputs, **options)


def assert_near(ours, theirs, tolerance, floor=0.0):
    """By the norm of the difference, relative to the norm of what is exact (or to `floor`, where that is larger)."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a, b = a.detach().double(), b.detach().double()
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * max(b.norm(), floor), f"{i}: {(a - b).norm() / b.norm():.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# value and gradients

COMBINATIONS = list(itertools.product([False, True], [0, 0.1], [0, 0.01], [False, True], [False, True], [1, None],
                                      [False, True]))  # fmt: skip


@pytest.mark.parametrize("kernel", [TWIN, KERNEL, ALL])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 2])
@shared_or_own
def test_every_combination_of_options(shared, K, dtype, kernel):
    """The interpreter takes milliseconds a row: each type tries another third of them there, and of these a seventh."""
    slow, step = kernel and not GPU, 3 if kernel == "all" else 21
    kernel = bool(kernel)
    for combination in COMBINATIONS[DTYPES.index(dtype) :: step] if slow else COMBINATIONS:
        bias, smoothing, z_loss, codebooks, rows, buffer, alike = combination
        ignore_index = 2 if bias != alike else -100
        inputs = loss_inputs(3 if slow else 7, K, 16, 20, shared, bias, dtype, ignore_index=ignore_index, kernel=kernel)
        options = dict(label_smoothing=smoothing, z_loss=z_loss, ignore_index=ignore_index, alike=alike,
                       **weights_for(inputs[0], K, codebooks, rows))  # fmt: skip
        loss, correct, *grads = loss_and_gradients(multi_codebook_cross_entropy, *inputs, buffer=buffer, kernel=kernel,
                                                   **options)  # fmt: skip
        theirs = exact(*inputs, **options)
        try:
            assert loss.dtype == torch.float32 and all(x.dtype == dtype for x in grads)
            assert_near([loss, *grads], [theirs[0], *theirs[2:]], TOLERANCE[dtype])
            assert dtype != torch.float32 or torch.equal(correct, theirs[1])
        except AssertionError as e:
            raise AssertionError(f"{combination}: {e}") from None


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_only_logits_and_their_gradient_are_rounded(dtype, kernel):
    """A loss is as near as in float32 to that of logits in half precision, though these are many, and far from 0."""
    hidden, weight, _, target = loss_inputs(2, 3, 16, 2000, False, False, dtype, ignored=0, kernel=kernel)
    loss, _ = multi_codebook_cross_entropy(8 * hidden, weight, target, kernel=kernel)
    logits = torch.bmm((8 * hidden).transpose(0, 1), weight.mT).double()
    expected = F.cross_entropy(logits.mT, target.T, reduction="none").mean(1)
    assert_near([loss], [expected], 1e-5)


@pytest.mark.parametrize("new", [True, False])
def test_product_into_a_wider_type(new):
    """In pieces of 2^19 elements at most, however large it is."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=g).bfloat16() for shape in ((2, 2500, 3), (2, 3, 512)))
    out = torch.full((2, 2500, 512), math.nan if new else 1.0)
    with LargestTensor() as ours:
        models._product(a, b, out, new)
    assert_near([out], [a.double() @ b.double() + (not new)], 1e-2)
    assert 2**18 < ours.largest[torch.bfloat16] <= 2**19


@of_each
def test_factors_are_no_matter_of_half_precision(shared, kernel):
    """Neither few targets beside many, nor row weights, nor a scaled loss drive a gradient out of float16's range."""
    N = 30 if kernel and not GPU else 400
    hidden, weight, _, target = loss_inputs(N, 2, 4, 6, shared, False, torch.float16, ignored=0, kernel=kernel)
    target[1:, 1] = -100  # one codebook's factor is N times the other's
    for row_weight in (1e-8, 1.0, 1e5):
        rows = torch.full((N,), row_weight, device=hidden.device)
        loss, _ = multi_codebook_cross_entropy(hidden, weight, target, row_weight=rows, kernel=kernel)
        scaled = 2**10 * (loss[0] + 2 * loss[1])
        x = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        expected = plain_loss(*x, target)[0]
        theirs = torch.autograd.grad(2**10 * (expected[0] + 2 * expected[1]), x)
        assert_near(torch.autograd.grad(scaled, (hidden, weight)), theirs, 1e-2)


@contextmanager
def poisoned_memory():
    """Where nothing was written yet, memory holds nan, the largest integer, or True."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_is_poisoned():
    with poisoned_memory():
        assert torch.empty(9).isnan().all() and torch.empty_like(torch.zeros(9, dtype=torch.bfloat16)).isnan().all()
        assert torch.empty(9, dtype=torch.bool).all()
        assert (torch.empty_like(torch.zeros(9, dtype=torch.long)) == 2**63 - 1).all()


@pytest.mark.hypothesis
@both
def test_random_shapes(kernel):
    slow = kernel and not GPU

    @given(N=st.integers(0, 4 if slow else 40), K=st.integers(1, 3 if slow else 5), D=st.integers(1, 9),
           V=st.integers(1, 30), shared=st.booleans(), bias=st.booleans(), buffer=st.integers(1, 200 if slow else 2000),
           ignored=st.sampled_from([0, 0.5, 1]), seed=st.integers(0, 99), everything=st.booleans(), alike=st.booleans(),
           dtype=st.sampled_from([torch.float32, torch.bfloat16] if kernel else list(TOLERANCE)))  # fmt: skip
    @settings(derandomize=True)
    def check(N, K, D, V, shared, bias, buffer, ignored, seed, everything, alike, dtype):
        inputs = loss_inputs(N, K, D, V, shared, bias, dtype, seed, ignored, kernel=kernel)
        options = {**EVERYTHING, **weights_for(inputs[0], K)} if everything else {}
        with poisoned_memory():
            loss, correct, *grads = loss_and_gradients(multi_codebook_cross_entropy, *inputs, alike=alike,
                                                       buffer=buffer, kernel=kernel, **options)  # fmt: skip
        theirs = exact(*inputs, alike=alike, **options)
        half = dtype.itemsize == 2
        assert_near([loss, *grads], [theirs[0], *theirs[2:]], (3 if half else 1) * TOLERANCE[dtype], floor=1)
        assert half or torch.equal(correct, theirs[1])

    check()


@shared_or_own
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_gradcheck(shared, options):
    hidden, weight, bias, target = loss_inputs(7, 3, 4, 5, shared, True)
    if options:
        options = {**options, **weights_for(hidden, 3)}
    assert torch.autograd.gradcheck(
        lambda *x: multi_codebook_cross_entropy(*x[:2], target, x[2], buffer=40, **options)[0], (hidden, weight, bias)
    )


@of_each
@pytest.mark.parametrize("alike", [False, True])
def test_second_backward(shared, alike, kernel):
    """Through a retained graph: the gradients of the first one are gone by then, the second computes them again."""
    inputs = loss_inputs(4, 2, 8, 20, shared, True, torch.float32, kernel=kernel)
    loss, _ = multi_codebook_cross_entropy(*inputs[:2], inputs[3], inputs[2], kernel=kernel, buffer=40, **EVERYTHING)
    out = loss.sum() if alike else (loss * loss.detach()).sum()
    first = torch.autograd.grad(out, inputs[:3], retain_graph=True)
    before = [x.clone() for x in first]
    assert_near(torch.autograd.grad(3 * out, inputs[:3], retain_graph=True), [3 * x for x in first], 1e-6)
    assert_near(torch.autograd.grad(out, inputs[:1]), first[:1], 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(first, before, strict=True))


@both
@pytest.mark.parametrize("ignore_index", [-100, -1, 0])
def test_ignore_index_and_a_codebook_without_targets(ignore_index, kernel):
    *inputs, target = loss_inputs(6, 3, 4, 6, dtype=torch.float32, ignore_index=ignore_index, kernel=kernel)
    target[:, 1] = ignore_index
    ours = loss_and_gradients(multi_codebook_cross_entropy, *inputs, target, ignore_index=ignore_index, buffer=50,
                              kernel=kernel, **EVERYTHING)  # fmt: skip
    assert_near(ours, exact(*inputs, target, ignore_index=ignore_index, **EVERYTHING), 1e-5)
    assert ours[0][1] == 0 and ours[1][1] == 0 and not ours[2][:, 1].any() and not ours[3][1].any()


def test_loss_of_one_head_takes_a_plain_matrix():
    hidden, weight, bias, target = loss_inputs(9, 1, 4, 6, True, True)
    loss = multi_codebook_cross_entropy(hidden, weight[0], target, bias[0])[0]
    torch.testing.assert_close(loss, plain_loss(hidden, weight, target, bias)[0])


# ---------------------------------------------------------------------------------------------------------------------
# the edges


@of_each
@pytest.mark.parametrize("N, upstream", [(0, 1), (1, 1), (3, 1), (0, 2.0**16), (3, 2.0**16)])
def test_no_target_at_all(N, upstream, shared, kernel):
    """Whatever the gradient of the loss is, such as the scale of a loss in half precision."""
    *inputs, target = loss_inputs(N, 2, 4, 6, shared, True, torch.float32, ignored=1, kernel=kernel)
    with poisoned_memory():
        loss, correct = multi_codebook_cross_entropy(*inputs[:2], target, inputs[2], kernel=kernel, **EVERYTHING)
        grads = torch.autograd.grad(upstream * loss.sum(), inputs)
    assert loss.tolist() == [0, 0] and correct.tolist() == [0, 0]
    assert all(x.shape == y.shape and (x == 0).all() for x, y in zip(grads, inputs, strict=True))


@of_each
@pytest.mark.parametrize("V", [1, 2, 2051, 4096, 4097, 5000, 9001])
def test_many_classes(V, shared, kernel):
    """The kernel takes 4096 of them at a time; J codebooks of odd V lie one behind the other in a row."""
    *inputs, target = loss_inputs(2, 2, 4, V, shared, True, torch.float32, ignored=0, kernel=kernel)
    target[0] = V - 1
    for options in ({}, EVERYTHING):
        ours = loss_and_gradients(multi_codebook_cross_entropy, *inputs, target, kernel=kernel, **options)
        assert_near(ours, exact(*inputs, target, **options), 1e-5, floor=1e-2)


@both
@pytest.mark.parametrize("classes", [(0, 1), (3, 6), (0, 4095), (4095, 4096), (100, 5000, 9000), (8191, 8192)])
def test_of_equal_logits_the_first_ranks_first(classes, kernel):
    V = max(9, max(classes) + 1)
    hidden, _, _, target = loss_inputs(len(classes) + 1, 1, 1, V, dtype=torch.float32, kernel=kernel)
    logits = torch.zeros(1, V, 1, device=hidden.device)
    logits[0, list(classes)] = 5
    target[:, 0] = torch.tensor([*classes, V // 2])
    for i in range(len(target)):
        correct = multi_codebook_cross_entropy(torch.ones_like(hidden[:1]), logits, target[i : i + 1], kernel=kernel)[1]
        assert correct.tolist() == [int(i == 0)]


@both
def test_all_logits_equal(kernel):
    hidden, weight, _, target = loss_inputs(5, 1, 2, 7, dtype=torch.float32, ignored=0, kernel=kernel)
    target[:, 0] = torch.arange(5)
    loss, correct = multi_codebook_cross_entropy(hidden, 0 * weight, target, kernel=kernel)
    assert correct.tolist() == [1] and abs(loss.item() - math.log(7)) < 1e-6


@both
@quiet
@pytest.mark.parametrize("barred", [(3, 7), (4096, 8192), (0, 4096)])
def test_classes_barred_by_the_bias(barred, kernel):
    *inputs, target = loss_inputs(2, 1, 4, 9000, False, True, torch.float32, ignored=0, kernel=kernel)
    inputs[2].data[:, slice(*barred)] = -math.inf
    target[:, 0] = torch.tensor([8999, 8500])
    ours = loss_and_gradients(multi_codebook_cross_entropy, *inputs, target, kernel=kernel, z_loss=0.01)
    assert_near(ours, exact(*inputs, target, z_loss=0.01), 1e-5)


@quiet
@both
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_is_infinite_where_the_target_is_barred(label_smoothing, kernel):
    hidden, weight, bias, target = loss_inputs(3, 1, 4, 6, False, True, torch.float32, ignored=0, kernel=kernel)
    bias.data[0, 2] = -math.inf
    target[:, 0] = 2
    loss, _ = multi_codebook_cross_entropy(hidden, weight, target, bias, label_smoothing=label_smoothing, kernel=kernel)
    assert loss.tolist() == [math.inf]


@quiet
@both
def test_loss_is_nan_where_the_hidden_state_is(kernel):
    hidden, weight, _, target = loss_inputs(3, 2, 4, 6, dtype=torch.float32, ignored=0, kernel=kernel)
    hidden.data[1, 0] = math.nan
    assert multi_codebook_cross_entropy(hidden, weight, target, kernel=kernel)[0].isnan().tolist() == [True, False]


@pytest.mark.parametrize("wrong", [6, 2**40, -1, -101])
def test_target_out_of_range(wrong):
    hidden, weight, _, target = loss_inputs(9, 2, 4, 6, True)
    target[4, 1] = wrong
    with pytest.raises(ValueError, match=f"target {wrong} is outside 0..5"):
        multi_codebook_cross_entropy(hidden, weight, target)


@pytest.mark.parametrize("hidden, weight, target", [((9, 4), (2, 6, 5), (9, 2)), ((8, 4), (2, 6, 4), (9, 2)),
                                                    ((9, 3, 4), (2, 6, 4), (9, 2)), ((9, 4), (2, 6, 4), (9, 3))])
def test_shapes_that_do_not_fit(hidden, weight, target):
    with pytest.raises(ValueError, match="do not fit"):
        multi_codebook_cross_entropy(torch.zeros(hidden), torch.zeros(weight), torch.zeros(target, dtype=torch.long))


@pytest.mark.parametrize("name, shape", [("bias", (2, 5)), ("bias", (6,)), ("codebook_weight", (6,)),
                                         ("codebook_weight", ()), ("row_weight", (2,)), ("row_weight", (9, 2))])
def test_weights_that_do_not_fit(name, shape):
    hidden, weight, _, target = loss_inputs(9, 2, 4, 6)
    with pytest.raises(ValueError, match=f"^{name} .* does not fit: expected"):
        multi_codebook_cross_entropy(hidden, weight, target, **{name: torch.ones(shape)})


@both
@pytest.mark.parametrize("V", [6, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_write_nothing_outside_their_tile(dtype, V, kernel):
    """Whatever the target is, the guards around every row, loss and rank stay as they are."""
    g, n, J = 2, 2, 2
    device, generator = "cuda" if kernel and GPU else "cpu", torch.Generator().manual_seed(0)

    def guarded(width, dtype):  # (g, n, width) in the midst of more
        memory = torch.full((g * n + 2, width + 5), 1, dtype=dtype, device=device)
        return memory, memory[1:-1].view(g, n, -1)[..., :width]

    around, tile = guarded(J * V, dtype)
    tile.copy_(torch.randn(g, n, J * V, generator=generator))
    logits = tile.double().unflatten(-1, (J, V))
    (_, target), (_, scale) = guarded(J, torch.long), guarded(J, torch.float32)
    (loss_around, loss), (correct_around, correct) = guarded(J, torch.float32), guarded(J, torch.bool)
    target.copy_(torch.tensor([[[V, 0], [-1, V - 1]], [[2**40, 3], [-101, -(2**40)]]]))
    scale.copy_(torch.rand(g, n, J, generator=generator))
    rows = models._launch_softmax_kernel if kernel else models._softmax_rows
    rows(tile, target, scale, loss, correct, V, 0.0, 0.0)
    inside = (target >= 0) & (target < V)
    assert torch.equal(loss.isnan(), ~inside) and not correct[~inside].any()
    expected = F.cross_entropy(logits[inside], target[inside], reduction="none")
    assert_near([loss[inside]], [expected], 1e-5)
    gradient = (logits[inside].softmax(-1) - F.one_hot(target[inside], V)) * scale[inside][:, None]
    assert_near([tile.unflatten(-1, (J, V))[inside]], [gradient], TOLERANCE[dtype])
    for memory, x in ((around, tile), (loss_around, loss), (correct_around, correct)):
        x.fill_(1)
        assert (memory == 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# how it is called


@of_each
def test_autocast(shared, kernel):
    inputs = loss_inputs(6, 3, 16, 40, shared, True, torch.float32, kernel=kernel)
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        loss, _ = multi_codebook_cross_entropy(*inputs[:2], inputs[3], inputs[2], buffer=100, kernel=kernel)
    ours = loss.detach(), *torch.autograd.grad(loss.sum(), inputs[:3])
    assert all(t.dtype == torch.float32 for t in ours)
    theirs = exact(*inputs, alike=True)
    assert_near(ours, theirs[:1] + theirs[2:], 1e-2)
    assert (ours[0] - theirs[0]).norm() > 1e-5 * theirs[0].norm()  # it did go through bfloat16


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.heads = nn.Linear(6, 8), nn.Parameter(torch.randn(3, 7, 8))

    def forward(self, x, target):
        return multi_codebook_cross_entropy(self.body(x).tanh(), self.heads, target, buffer=40)[0].sum()


def gradients_of_heads(wrap=lambda model: model):
    model, (x, _, _, target) = Heads(), loss_inputs(9, 3, 6, 7, True, dtype=torch.float32)
    loss = wrap(model)(x, target)
    loss.backward()
    return loss, x.grad, *(p.grad for p in model.parameters())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    torch._dynamo.reset()
    assert_near(gradients_of_heads(lambda model: torch.compile(model, backend=backend)), gradients_of_heads(), 1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    recomputed = gradients_of_heads(lambda model: lambda *x: checkpoint(model, *x, use_reentrant=reentrant))
    assert_near(recomputed, gradients_of_heads(), 1e-6)


def test_distributed(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert_near(gradients_of_heads(nn.parallel.DistributedDataParallel), gradients_of_heads(), 1e-6)
    finally:
        torch.distributed.destroy_process_group()


@both
def test_one_state_for_two_losses(kernel):
    hidden, weight, _, target = loss_inputs(4, 2, 8, 20, True, dtype=torch.float32, kernel=kernel)
    other = weight.detach().flip(0).requires_grad_()

    def both_losses(loss, *leaves):
        out = loss(*leaves[:2], target)[0].sum() + 2 * loss(leaves[0], leaves[2], target.flip(0))[0].sum()
        return torch.autograd.grad(out, leaves)

    ours = both_losses(lambda *x: multi_codebook_cross_entropy(*x, kernel=kernel), hidden, weight, other)
    assert_near(ours, both_losses(plain_loss, *(x.double() for x in (hidden, weight, other))), 1e-5)


@of_each
@pytest.mark.parametrize("frozen", range(3))
def test_frozen(frozen, shared, kernel):
    inputs = loss_inputs(4, 2, 8, 20, shared, True, torch.float32, kernel=kernel)
    inputs[frozen].requires_grad_(False)
    ours = loss_and_gradients(multi_codebook_cross_entropy, *inputs, kernel=kernel, buffer=40)
    assert len(ours) == 4
    assert_near(ours, exact(*inputs), 1e-5)


def forbidden(*_):
    raise AssertionError("not this one")


@pytest.fixture
def columns(monkeypatch):
    """How many columns each matrix product had that was made."""
    made, product = [], models._product

    def counted(a, b, out, new):
        made.append(out.shape[-1])
        product(a, b, out, new)

    monkeypatch.setattr(models, "_product", counted)
    return made


@both
def test_no_gradient_is_computed_of_what_needs_none(kernel, columns):
    inputs = loss_inputs(4, 2, 8, 20, False, True, torch.float32, kernel=kernel)
    hidden, weight, bias, target = (x.detach() for x in inputs)
    assert_near(multi_codebook_cross_entropy(hidden, weight, target, bias, kernel=kernel), exact(*inputs)[:2], 1e-5)
    assert set(columns) == {20}  # the logits alone


@both
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_computed_where_none_is_recorded(context, kernel, columns):
    hidden, weight, bias, target = inputs = loss_inputs(4, 2, 8, 20, False, True, torch.float32, kernel=kernel)
    with context():
        ours = multi_codebook_cross_entropy(hidden, weight, target, bias, kernel=kernel)
    assert_near(ours, exact(*inputs)[:2], 1e-5)
    assert set(columns) == {20}


def as_columns(x):
    """The same numbers with the last two axes swapped in memory."""
    return x.mT.contiguous().mT


def as_slice(x):
    """The same numbers in the midst of others."""
    wide = F.pad(x.detach(), [1] * (2 * x.ndim), value=3)
    return wide[tuple(slice(1, -1) for _ in x.shape)]


@of_each
@pytest.mark.parametrize("change", [as_columns, as_slice])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["hidden", "weight", "bias"])
def test_not_contiguous(which, change, shared, kernel):
    inputs = [*loss_inputs(4, 3, 8, 20, shared, True, torch.float32, kernel=kernel)]
    expected = exact(*inputs)
    inputs[which] = change(inputs[which].detach()).requires_grad_()
    assert not inputs[which].is_contiguous()
    assert_near(loss_and_gradients(multi_codebook_cross_entropy, *inputs, kernel=kernel, buffer=40), expected, 1e-5)


@both
def test_target_not_contiguous(kernel, monkeypatch):
    """Targets are columns of a table of codes, whose rows are longer."""
    launch = models._launch_softmax_kernel

    def careful(tile, *rows):  # it takes the strides of the target for all of them, and writes by these
        assert len({x.stride() for x in rows[:4]}) == 1 and (rows[0].shape[2] == 1 or rows[0].stride(2) == 1)
        launch(tile, *rows)

    monkeypatch.setattr(models, "_launch_softmax_kernel", careful)
    for change, shared in itertools.product([as_columns, as_slice], [False, True]):
        *inputs, target = loss_inputs(4, 3, 8, 20, shared, True, torch.float32, kernel=kernel)
        changed = change(target)
        assert not changed.is_contiguous()
        ours = loss_and_gradients(multi_codebook_cross_entropy, *inputs, changed, kernel=kernel, buffer=40)
        assert_near(ours, exact(*inputs, target), 1e-5)


@pytest.mark.parametrize("look", [False, True])
@both
def test_of_equals_the_first(kernel, look, monkeypatch):
    """Ranks are those of argmax, with a host that may read values and without."""
    monkeypatch.setattr(models, "_can_look", lambda x: look)
    hidden, weight, *_ = loss_inputs(6, 2, 8, 20, False, False, torch.float32, kernel=kernel)
    weight = weight.detach()[:, [0, 1, 2, 1, 0, 3, 3, 0]]  # classes that score alike
    best = torch.einsum("nkd,kvd->nkv", hidden, weight).argmax(-1)
    for target in (best, (best + 1) % 8, torch.full_like(best, 4)):
        correct = multi_codebook_cross_entropy(hidden, weight, target, kernel=kernel, each=True)[1]
        assert torch.equal(correct, target == best)


class ValuesRead(TorchDispatchMode):
    """How often an operation hands a value in a tensor to Python, or needs one to know the shape of what it returns."""

    times = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.times += function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return function(*args, **(kwargs or {}))


@shared_or_own
@pytest.mark.parametrize("alike", [False, True])
def test_no_value_is_read(alike, shared, monkeypatch):
    """Where the host would have to wait for it, as for a GPU; of a CPU's tensors some are."""
    monkeypatch.setattr(models, "_can_look", lambda x: False)
    inputs = loss_inputs(9, 3, 8, 20, shared, True, torch.bfloat16)
    options = {**EVERYTHING, **weights_for(inputs[0], 3)}
    with ValuesRead() as read:
        loss_and_gradients(multi_codebook_cross_entropy, *inputs, alike=alike, buffer=40, **options)
    assert read.times == 0


@shared_or_own
def test_one_state_expanded_over_codebooks(shared):
    """An expanded state is as good as a shared one, and its gradient arrives in it summed."""
    hidden, weight, bias, target = loss_inputs(9, 3, 8, 20, True, True)
    expanded = hidden[:, None].expand(-1, 3, -1)
    assert_near(loss_and_gradients(lambda h, *x: multi_codebook_cross_entropy(expanded, *x), hidden, weight, bias,
                                   target), exact(hidden, weight, bias, target), 1e-11)  # fmt: skip


def test_the_twin_runs_on_a_cpu(monkeypatch):
    monkeypatch.setattr(models, "_launch_softmax_kernel", forbidden)
    for dtype in TOLERANCE:
        hidden, weight, _, target = loss_inputs(9, 2, 4, 6, dtype=dtype)
        multi_codebook_cross_entropy(hidden, weight, target)


@TRITON
def test_the_kernel_runs_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(models, "_softmax_rows", forbidden)
    hidden, weight, _, target = loss_inputs(2, 2, 4, 6, dtype=torch.float32, kernel=True)
    multi_codebook_cross_entropy(hidden, weight, target, kernel=True)
    with pytest.raises(AssertionError, match="not this one"):
        multi_codebook_cross_entropy(hidden, weight, target, kernel=False)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(models, "triton", None)
    hidden, weight, _, target = loss_inputs(9, 2, 4, 6)
    multi_codebook_cross_entropy(hidden, weight, target)
    with pytest.raises(ValueError, match="^kernel=True needs Triton: pip install triton$"):
        multi_codebook_cross_entropy(hidden, weight, target, kernel=True)


# ---------------------------------------------------------------------------------------------------------------------
# memory


class LargestTensor(TorchDispatchMode):
    """How many elements the largest tensor of each type has that any operation gives back."""

    def __init__(self):
        super().__init__()
        self.largest = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.largest[t.dtype] = max(self.largest[t.dtype], t.untyped_storage().nbytes() // t.element_size())
        return out


@shared_or_own
def test_neither_logits_nor_their_gradient_are_ever_whole(shared):
    N, K, D, V, buffer = 512, 4, 16, 256, 2**13
    inputs = loss_inputs(N, K, D, V, shared, dtype=torch.float32)
    with LargestTensor() as plain:
        loss_and_gradients(plain_loss, *inputs)
    assert max(plain.largest.values()) >= N * K * V
    with LargestTensor() as ours:
        loss_and_gradients(multi_codebook_cross_entropy, *inputs, buffer=buffer)
    assert buffer <= max(ours.largest.values()) <= max(buffer, N * K * D, K * V * D)


@pytest.fixture
def rows_of_tiles(monkeypatch):
    """How many rows each tile had that was made."""
    seen, twin = [], models._softmax_rows

    def watched(tile, *rest):
        seen.append(tile.shape[1])
        twin(tile, *rest)

    monkeypatch.setattr(models, "_softmax_rows", watched)
    return seen


@pytest.mark.parametrize("N, most, rows", [(200, 70, [64, 64, 64, 8]), (260, 200, [192, 68]), (300, 299, [192, 108]),
                                           (300, 300, [300]), (13, 5, [5, 5, 3])], ids=str)  # fmt: skip
def test_tiles_have_a_multiple_of_64_rows(N, most, rows, rows_of_tiles):
    hidden, weight, _, target = loss_inputs(N, 1, 8, 10)
    multi_codebook_cross_entropy(hidden, weight, target, buffer=most * 10, kernel=False)
    assert rows_of_tiles == rows


def test_few_rows_of_many_classes(rows_of_tiles):
    """A tile then has D / 8 rows, so that the weights are not read for a handful of rows each time."""
    hidden, weight, _, target = loss_inputs(256, 1, 512, 5000, dtype=torch.float32)
    multi_codebook_cross_entropy(hidden, weight, target, kernel=False)
    assert rows_of_tiles == [64] * 4


PEAK = """
import sys, torch
from model import multi_codebook_cross_entropy

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

def inputs(N, K, D, V, shared, dtype):
    hidden, weight = torch.randn((N, D) if shared else (N, K, D)), torch.randn(K, V, D) / D**0.5
    return *(x.to(dtype).requires_grad_() for x in (hidden, weight)), torch.randint(V, (N, K))

N, K, D, V, shared, dtype = eval(sys.argv[1])
multi_codebook_cross_entropy(*inputs(N // 8, 2, D, V, shared, dtype))[0].sum().backward()  # libraries load themselves
hidden, weight, target = inputs(N, K, D, V, shared, dtype)
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
multi_codebook_cross_entropy(hidden, weight, target)[0].sum().backward()
print(resident("VmHWM") - before - hidden.grad.nbytes - weight.grad.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self/clear_refs")
@pytest.mark.parametrize("N, K, D, V, shared, dtype", [
    (512, 31, 256, 2051, False, torch.float32), (512, 31, 256, 2051, False, torch.bfloat16),
    (4096, 8, 256, 1025, True, torch.float32),
    (4096, 8, 256, 1025, True, torch.bfloat16), (512, 1, 512, 20000, True, torch.float32),
], ids=str)  # fmt: skip
def test_peak_of_resident_memory(N, K, D, V, shared, dtype):
    """Beside inputs and gradients, a step takes a sixteenth of the logits in float32, or an eighth of a head's weights,
    and little else.

    Only where heads in half precision share a state, all their gradients are summed in float32 at once.
    """
    sums = K * V * D * 4 if shared and dtype != torch.float32 else 0
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}  # what is freed is no longer resident
    done = subprocess.run([sys.executable, "-c", PEAK, str((N, K, D, V, shared, dtype))], capture_output=True,
                          text=True, check=True, cwd=Path(models.__file__).parent, env=env)  # fmt: skip
    tile = max(N * K * V * 4 / 16, V * D * dtype.itemsize / 8)
    assert int(done.stdout) <= tile + sums + 2 * 2**20, f"{int(done.stdout) / 2**20:.1f} MB"


# ---------------------------------------------------------------------------------------------------------------------
# on a GPU


@on_gpu
@shared_or_own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N, K, D, V", [(4096, 31, 1024, 2051), (2048, 1, 256, 80538)])
def test_real_sizes(N, K, D, V, dtype, shared):
    hidden, weight, _, target = loss_inputs(N, K, D, V, shared, dtype=dtype, kernel=True)
    loss, _, *grads = loss_and_gradients(multi_codebook_cross_entropy, hidden, weight, None, target, alike=True)
    theirs = [torch.zeros_like(x, dtype=torch.float64) for x in (loss, hidden, weight)]
    for k in range(K):  # whole logits of one codebook at a time
        at = slice(k, k + 1)
        state = hidden if shared else hidden[:, at]
        one = exact(state, weight[at], None, target[:, at])
        theirs[0][at] = one[0].detach()
        (theirs[1] if shared else theirs[1][:, at]).add_(one[2])
        theirs[2][at] = one[3]
    assert_near([loss, *grads], theirs, TOLERANCE[dtype])


@on_gpu
@pytest.mark.skipif(GPU and torch.cuda.mem_get_info()[0] < 8 * 2**30, reason="needs 8 GB on the GPU")
def test_offsets_beyond_32_bits():
    n, V = 33000, 65536 + 3
    tile = torch.empty(1, n, V, dtype=torch.bfloat16, device="cuda").normal_()
    assert tile.numel() > 2**31
    target = torch.randint(V, (1, n, 1), device="cuda")
    scale, loss = torch.ones(1, n, 1, device="cuda"), torch.empty(1, n, 1, device="cuda")
    correct = torch.empty(1, n, 1, device="cuda", dtype=torch.bool)
    rows = [0, 1, n // 2, n - 2, n - 1]
    logits, goal = tile[0, rows].double(), target[0, rows, 0]
    models._launch_softmax_kernel(tile, target, scale, loss, correct, V, 0.0, 0.0)
    assert_near([loss[0, rows, 0]], [F.cross_entropy(logits, goal, reduction="none")], 1e-5)
    assert_near([tile[0, rows]], [logits.softmax(-1) - F.one_hot(goal, V)], 1e-2)
    assert loss.isfinite().all() and torch.equal(correct[0, rows, 0], logits.argmax(-1) == goal)


@on_gpu
@shared_or_own
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_never_waits(dtype, alike, shared):
    inputs = loss_inputs(50, 3, 16, 40, shared, True, dtype, kernel=True)
    options = {**EVERYTHING, **weights_for(inputs[0], 3)}
    loss_and_gradients(multi_codebook_cross_entropy, *inputs, alike=alike, **options)  # compiles the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradients(multi_codebook_cross_entropy, *inputs, alike=alike, buffer=500, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_which_one_runs_on_a_gpu(monkeypatch):
    hidden, weight, _, target = loss_inputs(9, 2, 4, 6, dtype=torch.float32, kernel=True)
    with monkeypatch.context() as patch:
        patch.setattr(models, "_softmax_rows", forbidden)
        multi_codebook_cross_entropy(hidden, weight, target)
    monkeypatch.setattr(models, "_launch_softmax_kernel", forbidden)
    multi_codebook_cross_entropy(hidden.double(), weight.double(), target)
    monkeypatch.setattr(models, "triton", None)
    multi_codebook_cross_entropy(hidden, weight, target)


@on_gpu
@pytest.mark.parametrize("wrong", [6, 2**40, -1])
def test_target_out_of_range_on_a_gpu(wrong):
    hidden, weight, _, target = loss_inputs(9, 2, 4, 6, dtype=torch.float32, kernel=True)
    target[4, 1] = wrong
    assert multi_codebook_cross_entropy(hidden, weight, target)[0].isnan().tolist() == [False, True]


COMPILE = """
import model, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

types = dict(target="*i64", scale="*fp32", loss="*fp32", correct="*i1", smoothing="fp32", z_loss="fp32")
for tile in ("fp32", "bf16", "fp16"):
    for block, warps in ((32, 1), (4096, 16)):
        names = model._softmax_kernel.arg_names
        signature = {name: "constexpr" if name == "BLOCK" else types.get(name, "i32") for name in names}
        source = ASTSource(model._softmax_kernel, {**signature, "tile": "*" + tile}, {"BLOCK": block})
        target = GPUTarget("cuda", int(sys.argv[1]), 32)
        assert triton.compile(source, target=target, options={"num_warps": warps}).asm["cubin"]
"""


@pytest.mark.slow
@TRITON
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_becomes_machine_code(capability, tmp_path):
    """For GPUs that are not here, in every type: Triton's compiler needs none."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    process = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr

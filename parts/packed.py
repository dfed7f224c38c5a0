"""Linear layers in the form in which a CPU multiplies a few rows fast. For generation: they give no gradients.

    missing("int8")                        "" where this torch and this machine can, else the reason
    pack_linears(model, "int8")            every nn.Linear below the model, in place
    product = pack(weight, bias, "int8")   one weight, such as a head
    fastest(model)                         "packed" or "plain", as measured

The kinds:
- "packed": float32, the weight in blocks (oneDNN). The results are those of F.linear but for the order of the sums.
- "int8": a quarter of the bytes (fbgemm). Activations have 8 bits and a scale for each row, so that a row does not
  depend on its neighbours. Weights have 7 bits and a scale for each output. With one bit more the sums of two products
  overflow 16 bits on AVX2. Weights lose less by that than activations, which have outliers.
The operators are private to torch and may go: `missing` tries them.

Letters in shapes: O outputs, I inputs.
"""

import time
import warnings

import torch
import torch.nn as nn

LEVELS = 127  # of an activation on each side of zero
ZERO = 128  # the byte that stands for zero
WEIGHT_LEVELS = 64  # 2 * (ZERO + LEVELS) * WEIGHT_LEVELS < 2**15
TINY = torch.finfo(torch.float32).tiny
SAMPLE = 2**23  # numbers of the weights that `fastest` multiplies: more than a cache holds
TRIES = 5


class Packed(nn.Module):
    """x (..., I) -> x weight^T + bias (..., O), in the type of x. `pack` makes it."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight = self.prepare(weight.detach().float())
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, x):
        if x.dtype == torch.float32:  # to convert it to what it is would take time
            return self.product(x)
        return self.product(x.float()).to(x.dtype)


class PackedFloat(Packed):
    def prepare(self, weight):
        # given a number of rows of 1, oneDNN keeps the plain order: one row is a little faster, two take twice as long
        return torch.ops.mkldnn._reorder_linear_weight(weight)

    def product(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PackedInt8(Packed):
    def prepare(self, weight):
        scale = weight.abs().amax(1).div(WEIGHT_LEVELS).clamp(min=TINY)
        whole = (weight / scale[:, None]).round().to(torch.int8)
        zeros = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # quantised tensors will go: `missing` will see it
            whole = torch._make_per_channel_quantized_tensor(whole, scale.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(whole)

    def product(self, x):
        """The operator has one scale for all rows: it gets that of the only row, or rows that are scaled already. Few
        operations are needed: each costs a tenth of a small product."""
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32._op  # itself would first search x
        if x.ndim == 1:  # which the operator refuses
            return self.product(x[None])[0]
        if x.numel() == x.shape[-1]:
            y = multiply(x, max(x.abs().max().item() / LEVELS, TINY), ZERO, self.weight)
            return y if self.bias is None else y.add_(self.bias)
        most = x.abs().amax(-1, keepdim=True).clamp_(min=TINY)
        y = multiply(x / most, 1 / LEVELS, ZERO, self.weight)
        return y.mul_(most) if self.bias is None else torch.addcmul(self.bias, y, most)


KINDS = {"packed": PackedFloat, "int8": PackedInt8}


def pack(weight, bias=None, kind="packed"):
    """The Packed of a weight (O, I) and a bias (O,), which lie on a CPU, in any floating-point type."""
    return KINDS[kind](weight, bias)


@torch.no_grad()
def pack_linears(model, kind):
    """Replace every nn.Linear below the model, no subclass, by its Packed. The old weights are freed one by one.

    A module may name children that multiply the same input: `together = ("q_proj", "k_proj", "v_proj")`. If all of them
    are nn.Linear they become one product, `module.joined`, whose outputs are those of the children side by side, of
    widths `module.widths`; the children become None.
    """
    for module in [module for module in model.modules() if type(module) is not nn.Linear]:  # holds no old weight
        names = getattr(module, "together", ())
        if names and all(type(getattr(module, name, None)) is nn.Linear for name in names):
            join(module, names, kind)
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, pack(child.weight, child.bias, kind))


def join(module, names, kind):
    children = [getattr(module, name) for name in names]
    module.widths = [child.out_features for child in children]
    bias = None
    if any(child.bias is not None for child in children):
        zeros = [child.weight.new_zeros(child.out_features) for child in children]
        bias = torch.cat([z if child.bias is None else child.bias for z, child in zip(zeros, children, strict=True)])
    module.joined = pack(torch.cat([child.weight for child in children]), bias, kind)
    for name in names:
        setattr(module, name, None)


@torch.no_grad()
def missing(kind):
    """Why this torch cannot multiply by weights of a kind on this machine, in a line; "" if it can."""
    weight = torch.arange(24.0 * 64).sin().view(24, 64)
    x = torch.arange(3.0 * 64).cos().view(3, 64)
    try:
        error = torch.dist(pack(weight, kind=kind)(x), x @ weight.T) / torch.dist(x @ weight.T, torch.zeros(()))
    except (AttributeError, RuntimeError) as e:  # no such operator, or not for this machine
        return f"torch {torch.__version__} has no {kind} weights here: {str(e).splitlines()[0]:.120}"
    return "" if error < 0.05 else f"torch {torch.__version__} multiplies wrongly by {kind} weights here"


@torch.no_grad()
def fastest(model, rows=1):
    """Which multiplies so many rows by the largest linear layers of a model faster, "packed" or "plain". "plain" also
    where packed weights do not work and where the model lies on a GPU. It takes about a tenth of a second."""
    layers = sorted((m for m in model.modules() if type(m) is nn.Linear), key=lambda m: -m.weight.numel())
    if not layers or layers[0].weight.device.type != "cpu" or missing("packed"):
        return "plain"
    chosen = []
    while layers and sum(layer.weight.numel() for layer in chosen) < SAMPLE:
        chosen.append(layers.pop(0))
    contest = {"plain": chosen, "packed": [pack(layer.weight, layer.bias) for layer in chosen]}
    inputs = [layer.weight.new_ones(rows, layer.in_features) for layer in chosen]
    rounds = {kind: [] for kind in contest}
    for _ in range(TRIES):
        for kind, products in contest.items():
            rounds[kind].append([seconds(product, x) for product, x in zip(products, inputs, strict=True)])
    best = {kind: sum(map(min, zip(*times, strict=True))) for kind, times in rounds.items()}  # others use the CPU too
    return min(best, key=best.get)


def seconds(product, x):
    start = time.perf_counter()
    product(x)
    return time.perf_counter() - start

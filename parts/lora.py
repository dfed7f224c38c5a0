"""LoRA: a trained model learns a voice or a language by a small addition to its linear layers.

The base's weights W stay as they are; two thin matrices beside each chosen one are trained instead (Hu et al. 2021):

                  +---- W (O, I), frozen ------------------------+
        x (.., I) |                                              (+)  y (.., O)
                  +---- dropout -- A (R, I) -- scale -- B (O, R) +

- scale = alpha / R, or with rs alpha / sqrt(R), under which large ranks learn as fast as small ones (rsLoRA,
  Kalajdzievski 2023)
- A starts random, B at zero: a new adapter changes nothing
- no parameter of the base changes its name: beside `q_proj.weight` stand `q_proj.lora_<name>.a` and `.b`
- several adapters share one base; one at a time is active, and choosing it copies nothing
- an adapter is saved alone, with its base's fingerprint, and merged into the base's own weights

Letters in shapes: I inputs and O outputs of a linear layer, R rank.
"""

import hashlib
import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.files import need
from parts.tensors import need_tensors

SETTINGS = ("rank", "alpha", "dropout", "rs", "base")  # what an adapter is, besides its matrices
FIELDS = {
    "rank": lambda x: type(x) is int and 1 <= x <= 2**16, "rs": bool, "base": str,
    "alpha": lambda x: type(x) in (int, float) and 0 < x < math.inf,
    "dropout": lambda x: type(x) in (int, float) and 0 <= x < 1,
    "weights": lambda x: isinstance(x, dict) and all(isinstance(key, str) for key in x),
}  # fmt: skip


class Adapter(nn.Module):
    """What is added to one linear layer's output: x (.., I) -> (.., O), in float32 unless cast."""

    def __init__(self, linear, settings):
        super().__init__()
        weight, rank = linear.weight, settings["rank"]
        like = dict(device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
        self.a = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as in loralib and peft: uniform within 1 / sqrt(I)
        self.settings = settings
        self.scale = settings["alpha"] / (math.sqrt(rank) if settings["rs"] else rank)

    def forward(self, x):
        x = F.dropout(x.to(self.a.dtype), self.settings["dropout"], self.training)
        return F.linear(self.scale * F.linear(x, self.a), self.b)  # scaled where it is thinnest


class LoRALinear(nn.Linear):
    """A linear layer with adapters beside its weight; `active` is the name of the one that counts, or None."""

    active = None

    def forward(self, x):
        y = super().forward(x)
        if self.active is None:
            return y
        return (y + getattr(self, f"lora_{self.active}")(x)).to(y.dtype)


def add_lora(model, rank, alpha, dropout=0.0, rs=False, targets=(".",), name="default"):
    """Freeze a model and put a new adapter beside its linear layers: it is active, and alone is trained from now on.

    targets: regular expressions, searched in the names of nn.Linear modules and of their weights (nn.Linear itself, not
    what derives from it). dropout: share of x that the adapter does not see in training.

    Raises ValueError, and leaves the model alone, for numbers out of range, a name that is taken or no word, a pattern
    that finds nothing, or a weight that other modules share.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    if rank < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1:
        given = f"rank = {rank}, alpha = {alpha}, dropout = {dropout}"
        raise ValueError(f"lora: {given}: they must be at least 1, above 0, and at least 0 but below 1")
    linears = find_linears(model, targets)
    largest = max(min(linear.in_features, linear.out_features) for linear in linears.values())
    if rank > largest:
        raise ValueError(f"lora: rank = {rank} is above {largest}, at which any change to the largest layer fits in")
    settings = dict(rank=rank, alpha=alpha, dropout=dropout, rs=rs, base=base_fingerprint(model))
    attach(model, {path: Adapter(linear, settings) for path, linear in linears.items()}, name)


def cast_base(model, dtype):
    """Keep the base in this type, where float32 is too large: its parameters; buffers and adapters stay as they are."""
    for p in base_parameters(model).values():
        p.data = p.data.to(dtype)


def find_linears(model, patterns):
    """{name: module} of the linear layers that the patterns find, in the model's order. Raises ValueError."""
    linears = {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, LoRALinear)}
    found = set()
    if not patterns:
        raise ValueError("lora: no linear layer is named")
    for pattern in patterns:
        try:
            hits = {name for name in linears if any(re.search(pattern, x) for x in (name, f"{name}.weight"))}
        except (re.error, TypeError) as e:
            raise ValueError(f"lora: {pattern!r} is not a regular expression ({e})") from None
        if not hits:
            some = ", ".join(list(linears)[:: max(1, len(linears) // 4)])
            raise ValueError(f"lora: {pattern!r} finds no nn.Linear; there is {some or 'none'}")
        found |= hits
    holders = [id(p) for m in model.modules() for p in m.parameters(recurse=False)]
    for name in sorted(found):
        if holders.count(id(linears[name].weight)) > 1:
            raise ValueError(f"lora: {name}.weight is shared, merging would change another module: leave it out")
    return {name: m for name, m in linears.items() if name in found}


def attach(model, chosen, name):
    """Freeze the model, put {linear layer's name: Adapter} in place, and make it the active one. Raises ValueError."""
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"lora: an adapter's name is made of letters, digits, _ and -, not {name!r}")
    if name in adapters(model):
        raise ValueError(f"lora: there is an adapter {name!r} already")
    model.requires_grad_(False)
    for path, adapter in chosen.items():
        linear = model.get_submodule(path)
        linear.__class__ = LoRALinear  # not a new module in its place: whoever holds it keeps holding it
        linear.add_module(f"lora_{name}", adapter.train(linear.training))
    use_adapter(model, name)


def adapters(model):
    """{adapter's name: {linear layer's name: Adapter}} of all there are."""
    found = {}
    for path, module in model.named_modules():
        for child, adapter in module.named_children() if isinstance(module, LoRALinear) else ():
            found.setdefault(child.removeprefix("lora_"), {})[path] = adapter
    return found


def find_adapter(model, name):
    """{linear layer's name: Adapter} of one adapter. Raises ValueError where it is not there."""
    there = adapters(model)
    if name not in there:
        raise ValueError(f"lora: there is no adapter {name!r}, there is {', '.join(there) or 'none'}")
    return there[name]


def use_adapter(model, name):
    """Make this adapter the active one; None: the bare base. Raises ValueError for one that is not there."""
    if name is not None:
        find_adapter(model, name)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.active = name if hasattr(module, f"lora_{name}") else None


def matrices(chosen):
    """{linear layer's name + ".lora_a" or ".lora_b": parameter}: the adapter's own name is not in it."""
    return {f"{path}.lora_{key}": p for path, adapter in chosen.items() for key, p in adapter.named_parameters()}


def adapter_state(model, name="default"):
    """All that `load_adapter` needs: the SETTINGS, and "weights", the `matrices` on the CPU. Raises ValueError."""
    chosen = find_adapter(model, name)
    weights = {key: p.detach().to("cpu", copy=True) for key, p in matrices(chosen).items()}
    return {**next(iter(chosen.values())).settings, "weights": weights}


def load_adapter(model, state, name="default"):
    """Add an adapter from what `adapter_state` gave, under any name; otherwise as `add_lora`.

    Raises ValueError, and leaves the model alone, for one that is incomplete or was trained on another base.
    """
    if missing := [key for key in (*SETTINGS, "weights") if key not in state]:
        raise ValueError(f"lora: adapter {name!r} lacks {', '.join(missing)}: adapter_state makes whole ones")
    need(state, FIELDS, f"lora: adapter {name!r}")
    if state["base"] != (base := base_fingerprint(model)):
        raise ValueError(f"lora: adapter {name!r} was trained on base {state['base']}, this is {base}")
    settings, weights = {key: state[key] for key in SETTINGS}, state["weights"]
    linears = find_linears(model, [f"^{re.escape(key.rpartition('.lora_')[0])}$" for key in weights])
    chosen = {path: Adapter(linear, settings) for path, linear in linears.items()}
    fill(chosen, weights, name)
    attach(model, chosen, name)


def set_adapter(model, state, name="default"):
    """Give an adapter that is there the matrices of what `adapter_state` gave. Raises ValueError."""
    need(state, FIELDS, f"lora: adapter {name!r}")
    fill(find_adapter(model, name), state["weights"], name)


@torch.no_grad()
def fill(chosen, weights, name):
    need_tensors(weights, matrices(chosen), f"lora: adapter {name!r}")
    for key, p in matrices(chosen).items():
        p.copy_(weights[key])


@torch.no_grad()
def merge(model, name="default"):
    """Add an adapter to the base's weights and remove all adapters: the layers are plain nn.Linear again, frozen.

    Sums are made in float32 and rounded to the weight's own type; `model.float()` before it, and nothing is lost.
    Raises ValueError where the adapter is not there.
    """
    for path, adapter in find_adapter(model, name).items():
        weight = model.get_submodule(path).weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        parts = (p.to(exact) for p in (weight, adapter.b, adapter.a))
        weight.copy_(torch.addmm(*parts, alpha=adapter.scale))
    for module in [m for m in model.modules() if isinstance(m, LoRALinear)]:
        for child, _ in list(module.named_children()):
            delattr(module, child)
        del module.active
        module.__class__ = nn.Linear


def base_parameters(model):
    """{name: parameter} of the model without its adapters."""
    added = {id(p) for module in model.modules() if isinstance(module, Adapter) for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in added}


def base_fingerprint(model):
    """16 hex digits that change when a parameter of the base has another name, shape or value.

    Values are compared as bfloat16: a base is the same one in float32 and in bfloat16, but cast to float16 another one.
    On the meta device there are no values.
    """
    digest = hashlib.sha256()
    for name, p in sorted(base_parameters(model).items()):
        digest.update(f"{name} {tuple(p.shape)}\n".encode())
        if not p.is_meta:
            digest.update(p.detach().to(torch.bfloat16).reshape(-1).view(torch.int16).cpu().numpy())
    return digest.hexdigest()[:16]

"""LoRA: a trained model learns a voice or a language by small adapters beside its linear layers (Hu et al. 2021).

The weights W of the base are frozen; two thin matrices beside each chosen one are trained:

                  +---- W (O, I), frozen ------------------------+
        x (.., I) |                                              (+)  y (.., O)
                  +---- dropout -- A (R, I) -- scale -- B (O, R) +

- scale = alpha / R; with rs alpha / sqrt(R), so that large ranks learn as fast as small ones (rsLoRA, Kalajdzievski
  2023)
- A starts random and B at zero: a new adapter changes nothing
- the parameters of the base keep their names; `q_proj.weight` gets `q_proj.lora_<name>.a` and `.b` beside it
- several adapters share one base; one at a time is active, and switching copies nothing
- an adapter is saved alone, with the fingerprint of its base, and can be merged into the base's weights

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

SETTINGS = ("rank", "alpha", "dropout", "rs", "base")  # an adapter is these and its matrices
FIELDS = {
    "rank": lambda x: type(x) is int and 1 <= x <= 2**16, "rs": bool, "base": str,
    "alpha": lambda x: type(x) in (int, float) and 0 < x < math.inf,
    "dropout": lambda x: type(x) in (int, float) and 0 <= x < 1,
    "weights": lambda x: isinstance(x, dict) and all(isinstance(key, str) for key in x),
}  # fmt: skip


class Adapter(nn.Module):
    """The term added to the output of one linear layer: x (.., I) -> (.., O), in float32 unless cast."""

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
        return F.linear(self.scale * F.linear(x, self.a), self.b)  # scaled at the rank, where the tensor is smallest


class LoRALinear(nn.Linear):
    """A linear layer with adapters beside its weight; `active` is the name of the one in use, or None."""

    active = None

    def forward(self, x):
        y = super().forward(x)
        if self.active is None:
            return y
        return (y + getattr(self, f"lora_{self.active}")(x)).to(y.dtype)


def add_lora(model, rank, alpha, dropout=0.0, rs=False, targets=(".",), name="default"):
    """Freeze a model and put a new adapter beside its linear layers. It is active, and only it is trained.

    targets: regular expressions that match names of nn.Linear modules or of their weights (not of subclasses).
    dropout: on the adapter's input. Raises ValueError, and leaves the model unchanged, for numbers out of range, a name
    that is taken or invalid, a pattern without a match, or a weight that modules share.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    if rank < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1:
        given = f"rank = {rank}, alpha = {alpha}, dropout = {dropout}"
        raise ValueError(f"lora: {given}: need rank >= 1, alpha > 0, 0 <= dropout < 1")
    linears = find_linears(model, targets)
    largest = max(min(linear.in_features, linear.out_features) for linear in linears.values())
    if rank > largest:
        raise ValueError(f"lora: rank = {rank} is above {largest}, the full rank of the largest layer")
    settings = dict(rank=rank, alpha=alpha, dropout=dropout, rs=rs, base=base_fingerprint(model))
    attach(model, {path: Adapter(linear, settings) for path, linear in linears.items()}, name)


def cast_base(model, dtype):
    """Cast the parameters of the base to a smaller type; buffers and adapters keep theirs."""
    for p in base_parameters(model).values():
        p.data = p.data.to(dtype)


def find_linears(model, patterns):
    """{name: module} of the linear layers that match a pattern, in the model's order. Raises ValueError."""
    linears = {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, LoRALinear)}
    found = set()
    if not patterns:
        raise ValueError("lora: no linear layer is named: lora_targets, or the weights of an adapter, are empty")
    for pattern in patterns:
        try:
            hits = {name for name in linears if any(re.search(pattern, x) for x in (name, f"{name}.weight"))}
        except (re.error, TypeError) as e:
            raise ValueError(f"lora: {pattern!r} is not a regular expression ({e})") from None
        if not hits:
            some = ", ".join(list(linears)[:: max(1, len(linears) // 4)])
            raise ValueError(f"lora: {pattern!r} matches no nn.Linear; some are {some or 'none'}")
        found |= hits
    holders = [id(p) for m in model.modules() for p in m.parameters(recurse=False)]
    for name in sorted(found):
        if holders.count(id(linears[name].weight)) > 1:
            raise ValueError(f"lora: {name}.weight is shared with a module that merging would change: leave it out")
    return {name: m for name, m in linears.items() if name in found}


def attach(model, chosen, name):
    """Freeze the model, add {linear layer's name: Adapter}, and make it the active one. Raises ValueError."""
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"lora: adapter name {name!r}: use letters, digits, _ and - only")
    if name in adapters(model):
        raise ValueError(f"lora: the model has an adapter {name!r} already")
    model.requires_grad_(False)
    for path, adapter in chosen.items():
        linear = model.get_submodule(path)
        linear.__class__ = LoRALinear  # the module stays the same object, so that references to it stay valid
        linear.add_module(f"lora_{name}", adapter.train(linear.training))
    use_adapter(model, name)


def adapters(model):
    """{adapter's name: {linear layer's name: Adapter}} of a model."""
    found = {}
    for path, module in model.named_modules():
        for child, adapter in module.named_children() if isinstance(module, LoRALinear) else ():
            found.setdefault(child.removeprefix("lora_"), {})[path] = adapter
    return found


def find_adapter(model, name):
    """{linear layer's name: Adapter} of one adapter. Raises ValueError for an unknown name."""
    known = adapters(model)
    if name not in known:
        raise ValueError(f"lora: unknown adapter {name!r}; choose from {', '.join(known) or 'none'}")
    return known[name]


def use_adapter(model, name):
    """Make this adapter the active one; None: the base alone. Raises ValueError for an unknown name."""
    if name is not None:
        find_adapter(model, name)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.active = name if hasattr(module, f"lora_{name}") else None


def matrices(chosen):
    """{linear layer's name + ".lora_a" or ".lora_b": parameter}, without the name of the adapter."""
    return {f"{path}.lora_{key}": p for path, adapter in chosen.items() for key, p in adapter.named_parameters()}


def adapter_state(model, name="default"):
    """A dict for `load_adapter`: the SETTINGS, and "weights", the `matrices` on the CPU. Raises ValueError."""
    chosen = find_adapter(model, name)
    weights = {key: p.detach().to("cpu", copy=True) for key, p in matrices(chosen).items()}
    return {**next(iter(chosen.values())).settings, "weights": weights}


def load_adapter(model, state, name="default"):
    """Add the adapter in a dict of `adapter_state` under any name, and make it the active one.

    Raises ValueError, and leaves the model unchanged, if it is incomplete or was trained on another base.
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
    """Replace the matrices of an adapter by those of a dict of `adapter_state`. Raises ValueError."""
    need(state, FIELDS, f"lora: adapter {name!r}")
    fill(find_adapter(model, name), state["weights"], name)


@torch.no_grad()
def fill(chosen, weights, name):
    need_tensors(weights, matrices(chosen), f"lora: adapter {name!r}")
    for key, p in matrices(chosen).items():
        p.copy_(weights[key])


@torch.no_grad()
def merge(model, name="default"):
    """Add an adapter to the weights of the base and remove all adapters. The layers are plain nn.Linear again, frozen.

    The sum is float32, then rounded to the type of the weight; `model.float()` before it avoids that. Raises ValueError
    for an unknown name.
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
    """16 hex digits that change with the name, shape or value of any parameter of the base.

    Values count as bfloat16, so a base cast to bfloat16 keeps its fingerprint (cast to float16 it does not). On the
    meta device only names and shapes count.
    """
    digest = hashlib.sha256()
    for name, p in sorted(base_parameters(model).items()):
        digest.update(f"{name} {tuple(p.shape)}\n".encode())
        if not p.is_meta:
            digest.update(p.detach().to(torch.bfloat16).reshape(-1).view(torch.int16).cpu().numpy())
    return digest.hexdigest()[:16]

"""LoRA: a trained model learns a voice or a language by small adapters beside its linear layers (Hu et al. 2021).

The weights W of the base are frozen; two thin matrices beside each chosen one are trained:

                  +---- W (O, I), frozen ------------------------+
        x (.., I) |                                              (+)  y (.., O)
                  +---- dropout -- A (R, I) -- scale -- B (O, R) +

- scale = alpha / R; with rs alpha / sqrt(R), so that large ranks learn as fast as small ones (rsLoRA, Kalajdzievski
  2023)
- A starts random and B at zero: a new adapter changes nothing
- the parameters of the base keep their names; `q_proj.weight` gets `q_proj.lora_<name>.a` and `.b` beside it
- an adapter may also have a whole parameter of its own, such as a head, or rows of its own behind those of a table,
  such as the embeddings of new text ids: a `Table` then gives the module its parameter, and the base's stays as it is
- several adapters share one base; one at a time is active, and switching copies nothing
- an adapter is saved alone, with the fingerprint of its base, and can be merged into the base's weights

Letters in shapes: I inputs and O outputs of a linear layer, R rank.
"""

import hashlib
import math
import re
from functools import cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.files import need
from parts.targets import choose_layers, choose_parameters
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
        x, kept = dropped(x.to(self.a.dtype), self.settings["dropout"] if self.training else 0)
        return F.linear(self.scale / kept * F.linear(x, self.a), self.b)  # scaled where the tensor is smallest


def dropped(x, p):
    """x with a random share p of its elements set to 0, and the number by which the caller has to divide.

    On a CPU torch's dropout takes a tenth of a step: its random numbers are slow, and its mask is float32. Here 16 bits
    decide about an element, so p is rounded to a multiple of 1 / 65,536, and a byte holds what they decide.
    """
    if not p:
        return x, 1.0
    if x.device.type != "cpu":
        return F.dropout(x, p), 1.0
    limit = max(1, min(round(p * 2**16), 2**16 - 1))
    bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    out = bits[: x.numel()].view(x.shape) < limit - 2**15
    return torch.where(out, x.new_zeros(()), x), 1 - limit / 2**16


class LoRALinear(nn.Linear):
    """A linear layer with adapters beside its weight; `active` is the name of the one in use, or None."""

    active = None

    def forward(self, x):
        if self.active is None:
            return super().forward(x)
        added = getattr(self, f"lora_{self.active}")(x)
        y = super().forward(x)  # last: a frozen product keeps no activation, so checkpointing has no need to repeat it
        return (y + added).to(y.dtype)


class Table(nn.Module):
    """A parameter of the base, of which an adapter may have its own: the whole, or rows behind those of the base."""

    active = None  # the name of the adapter in use, if it has its own

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.behind = set()  # names of the adapters that have rows behind

    def forward(self):
        if self.active is None:
            return self.base
        own = getattr(self, f"lora_{self.active}").to(self.base.dtype)
        return torch.cat([self.base, own]) if self.active in self.behind else own


@cache
def with_tables(cls, leaves):
    """A subclass that takes the parameters of these names from the module's children "table_" + name."""
    read = {leaf: property(partial(read_table, leaf=leaf)) for leaf in leaves}
    return type(cls.__name__, (cls,), {"plain": cls, **read})


def read_table(module, leaf):
    return getattr(module, f"table_{leaf}")()


def add_lora(model, rank, alpha, dropout=0.0, rs=False, targets=("",), name="default", also=(), rows=None,
             published=None):  # fmt: skip
    """Freeze a model and put a new adapter beside its linear layers. It is active, and only it is trained.

    targets choose linear layers (nn.Linear, no subclasses), `also` parameters that are trained whole, see targets.py.
    rows: {name of a parameter: rows to put behind its own}, trained too. published: {name of a parameter: its published
    names}. dropout: on the adapter's input. Raises ValueError, and leaves the model unchanged, for numbers out of
    range, a name that is taken or invalid, what targets.py refuses, or a weight that modules share.
    """
    if rank < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1:
        given = f"rank = {rank}, alpha = {alpha}, dropout = {dropout}"
        raise ValueError(f"lora: {given}: need rank >= 1, alpha > 0, 0 <= dropout < 1")
    base = base_parameters(model)
    rows = rows or {}
    whole = choose_parameters(base, also, published or {})
    linears = find_linears(model, targets, published)
    linears = {path: linear for path, linear in linears.items() if f"{path}.weight" not in whole}
    largest = max((min(linear.in_features, linear.out_features) for linear in linears.values()), default=0)
    if rank > largest:
        raise ValueError(f"lora: rank = {rank} is above {largest}, the full rank of the largest layer")
    settings = dict(rank=rank, alpha=alpha, dropout=dropout, rs=rs, base=base_fingerprint(model))
    own = {f"{key}.lora_whole": torch.cat([base[key], rows[key]] if key in rows else [base[key]]) for key in whole}
    own |= {f"{key}.lora_rows": rows[key] for key in rows.keys() - whole}
    attach(model, {path: Adapter(linear, settings) for path, linear in linears.items()}, own, name)


def cast_base(model, dtype):
    """Cast the parameters of the base to a smaller type; buffers and adapters keep theirs."""
    for p in base_parameters(model).values():
        p.data = p.data.to(dtype)


def all_linears(model):
    return {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, LoRALinear)}


def find_linears(model, targets, published=None):
    """{name: module} of the linear layers that the targets choose, in the model's order. Raises ValueError, also for a
    weight that modules share."""
    linears = all_linears(model)
    found = choose_layers(linears, targets, published or {})
    holders = [id(p) for m in model.modules() for p in m.parameters(recurse=False)]
    for name in sorted(found):
        if holders.count(id(linears[name].weight)) > 1:
            raise ValueError(f"lora: {name}.weight is shared with a module that merging would change: leave it out")
    return {name: m for name, m in linears.items() if name in found}


def attach(model, chosen, own, name):
    """Freeze the model, add {linear layer's name: Adapter} and the tensors {parameter's name + ".lora_rows" or
    ".lora_whole": tensor}, and make the adapter the active one. Raises ValueError."""
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"lora: adapter name {name!r}: use letters, digits, _ and - only")
    if name in adapters(model):
        raise ValueError(f"lora: the model has an adapter {name!r} already")
    model.requires_grad_(False)
    for path, adapter in chosen.items():
        linear = model.get_submodule(path)
        linear.__class__ = LoRALinear  # the module stays the same object, so that references to it stay valid
        linear.add_module(f"lora_{name}", adapter.train(linear.training))
    for key in sorted(own):  # in an order that does not change from run to run
        parameter, _, kind = key.rpartition(".lora_")
        table = make_table(model, parameter)
        like = dict(device=table.base.device, dtype=torch.promote_types(table.base.dtype, torch.float32))
        table.register_parameter(f"lora_{name}", nn.Parameter(own[key].detach().to(**like, copy=True)))
        if kind == "rows":
            table.behind.add(name)
    use_adapter(model, name)


def make_table(model, parameter):
    """The Table of the parameter of this name. From now on its module takes the parameter from it."""
    path, _, leaf = parameter.rpartition(".")
    owner = model.get_submodule(path)
    if owner._parameters[leaf] is not None:
        owner.add_module(f"table_{leaf}", Table(owner._parameters[leaf]))
        owner._parameters[leaf] = None  # it keeps its place, and with it the order of the parameters
        leaves = [child.removeprefix("table_") for child, m in owner.named_children() if isinstance(m, Table)]
        owner.__class__ = with_tables(vars(type(owner)).get("plain", type(owner)), tuple(leaves))
    return owner.get_submodule(f"table_{leaf}")


def tables(model):
    """{parameter's name: Table} of a model."""
    found = {path.rpartition("table_"): m for path, m in model.named_modules() if isinstance(m, Table)}
    return {before + leaf: table for (before, _, leaf), table in found.items()}


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
        if isinstance(module, LoRALinear | Table):
            module.active = name if hasattr(module, f"lora_{name}") else None


def active_adapter(model):
    """The name of the adapter in use, or None."""
    return next((m.active for m in model.modules() if isinstance(m, LoRALinear | Table) and m.active), None)


def matrices(chosen):
    """{linear layer's name + ".lora_a" or ".lora_b": parameter}, without the name of the adapter."""
    return {f"{path}.lora_{key}": p for path, adapter in chosen.items() for key, p in adapter.named_parameters()}


def own_parameters(model, name):
    """All parameters of an adapter: its `matrices`, and {parameter's name + ".lora_rows" or ".lora_whole": parameter}.
    Raises ValueError for an unknown name."""
    own = matrices(find_adapter(model, name))
    for parameter, table in tables(model).items():
        if f"lora_{name}" in table._parameters:
            kind = "rows" if name in table.behind else "whole"
            own[f"{parameter}.lora_{kind}"] = table.get_parameter(f"lora_{name}")
    return own


def adapter_state(model, name="default"):
    """A dict for `load_adapter`: the SETTINGS, and "weights", its own_parameters on the CPU. Raises ValueError."""
    weights = {key: p.detach().to("cpu", copy=True) for key, p in own_parameters(model, name).items()}
    return {**next(iter(find_adapter(model, name).values())).settings, "weights": weights}


def load_adapter(model, state, name="default"):
    """Add the adapter in a dict of `adapter_state` under any name, and make it the active one.

    An empty "base" stands for any base. Raises ValueError, and leaves the model unchanged, if the adapter is incomplete
    or was trained on another base.
    """
    where = f"lora: adapter {name!r}"
    if missing := [key for key in (*SETTINGS, "weights") if key not in state]:
        raise ValueError(f"{where} lacks {', '.join(missing)}: adapter_state makes whole ones")
    need(state, FIELDS, where)
    base = base_fingerprint(model)
    if state["base"] not in ("", base):
        raise ValueError(f"{where} was trained on base {state['base']}, this is {base}")
    settings, weights = {**{key: state[key] for key in SETTINGS}, "base": base}, state["weights"]
    own = {key: weights[key] for key in weights if key.endswith((".lora_rows", ".lora_whole"))}
    names = {key.rpartition(".lora_")[0] for key in weights.keys() - own.keys()}
    linears = find_linears(model, [f"^{re.escape(path)}$" for path in sorted(names)])
    chosen = {path: Adapter(linear, settings) for path, linear in linears.items()}
    wanted = matrices(chosen)
    parameters = base_parameters(model)
    for key in own:
        parameter, _, kind = key.rpartition(".lora_")
        if parameter not in parameters:
            raise ValueError(f"{where} holds {key:.80}, which the model does not have")
        shape = parameters[parameter].shape
        least = 1 if kind == "rows" else shape[0]  # a whole table may have more rows than that of the base
        count = len(own[key]) if isinstance(own[key], torch.Tensor) and own[key].ndim == len(shape) else 0
        wanted[key] = torch.empty(max(count, least), *shape[1:], device="meta")
    fill(wanted, weights, where, own)
    attach(model, chosen, own, name)


def set_adapter(model, state, name="default"):
    """Replace the parameters of an adapter by those of a dict of `adapter_state`. Raises ValueError."""
    where = f"lora: adapter {name!r}"
    need(state, FIELDS, where)
    fill(own_parameters(model, name), state["weights"], where)


@torch.no_grad()
def fill(wanted, weights, where, later=()):
    """Copy weights {key: tensor} into the parameters `wanted`, but for those of the keys `later`. Raises ValueError."""
    need_tensors(weights, wanted, where)
    for key in wanted.keys() - set(later):
        wanted[key].copy_(weights[key])


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
    use_adapter(model, name)
    for parameter, table in tables(model).items():
        path, _, leaf = parameter.rpartition(".")
        owner = model.get_submodule(path)
        delattr(owner, f"table_{leaf}")
        owner.__class__ = vars(type(owner)).get("plain", type(owner))
        owner._parameters[leaf] = nn.Parameter(table().detach(), requires_grad=False)
    for module in [m for m in model.modules() if isinstance(m, LoRALinear)]:
        for child, _ in list(module.named_children()):
            delattr(module, child)
        del module.active
        module.__class__ = nn.Linear


def base_parameters(model):
    """{name: parameter} of the model without its adapters."""
    parts = [module for module in model.modules() if isinstance(module, Adapter | Table)]
    added = {id(p) for module in parts for name, p in module.named_parameters() if name != "base"}
    left = {name: p for name, p in model.named_parameters() if id(p) not in added}
    return {re.sub(r"table_(\w+)\.base$", r"\1", name): p for name, p in left.items()}


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

r"""Targets: which layers get an adapter, and which parameters are trained whole.

Layers have two names: ours, and the published ones, under which transformers and peft know them. Targets are given as

    ["q_proj", "w1"]               names as in peft: a published name, or what stands behind a dot in it
    ["attn", "mlp.up_proj"]        if no layer is published under one of them: parts of our names, from dot to dot
    [r"\.layers\.", "q_proj"]      if one of them is no name: regular expressions, searched in our names
    r".*\.(q|v)_proj"              a string, as in peft: a regular expression that matches whole published names
    "all-linear"                   as in peft: all linear layers but the heads
    "q_proj,w1"                    names

peft also puts adapters beside embeddings and heads. Here these are refused, and lora_also trains them whole: Kani reads
and predicts with one table, of which an adapter of peft's changes one use alone, and the loss takes a head as it is, so
that an adapter would have to be multiplied out to the size of the head at every step.
"""

import re

NAME = r"\w+(\.\w+)*"


def choose_layers(layers, targets, published):
    """The names of the layers that the targets choose, a set.

    layers: our names of the linear layers. published: {our name of a parameter: its published names}; {}: as ours.
    Raises ValueError where the targets match nothing, where a regular expression is none, and where they match
    something beside linear layers, which peft refuses too.
    """
    if isinstance(targets, str) and re.fullmatch(f"{NAME}(,{NAME})*", targets):
        targets = targets.split(",")
    if not targets:
        raise ValueError("lora: no linear layer is named: lora_targets, or the weights of an adapter, are empty")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return {name for name in layers if not name.endswith("head")}
    if isinstance(targets, str):
        return as_in_peft(layers, targets, published)
    if not all(map(is_name, targets)):
        return set().union(*(search(layers, target, target) for target in targets))
    if published and (found := as_in_peft(layers, targets, published)):
        return found
    return set().union(*(search(layers, target, between_dots(target)) for target in targets))


def choose_parameters(names, targets, published):
    """Our names of the parameters that the targets choose, a set.

    names: those of all parameters. A target is a part of our name or of the published one, from dot to dot, or a
    regular expression, searched in our name. Raises ValueError where one chooses nothing.
    """
    found = set()
    for target in targets:
        expression = between_dots(target) if is_name(target) else target
        hits = {name for name in names if is_name(target)
                and any(re.search(expression, key) for key in published.get(name, ()))}  # fmt: skip
        found |= hits or search(names, target, expression, "parameter")
    return found


def is_name(target):
    return isinstance(target, str) and bool(re.fullmatch(NAME, target))


def between_dots(name):
    return rf"(^|\.){re.escape(name)}(\.|$)"


def search(names, target, expression, kind="nn.Linear"):
    """The names in which a regular expression is found. Raises ValueError where it is none, or found nowhere."""
    try:
        found = {name for name in names if re.search(expression, name) or re.search(expression, f"{name}.weight")}
    except (re.error, TypeError) as error:
        raise ValueError(f"lora: {target!r} is not a regular expression ({error})") from None
    if not found:
        some = ", ".join(list(names)[:: max(1, len(names) // 4)])
        raise ValueError(f"lora: {target!r} matches no {kind}; some are {some or 'none'}")
    return found


def as_in_peft(layers, targets, published):
    """Our names of the layers that peft would choose; of a list of names, an empty set where it would find none."""
    ours = {}  # {published name of a module: our names of the modules that hold its parameters}
    for name, keys in (published or {f"{name}.weight": [f"{name}.weight"] for name in layers}).items():
        for key in keys:
            parts = key.split(".")[:-1]
            ours.setdefault(".".join(parts), set()).add(name.rpartition(".")[0])
            for n in range(len(parts)):
                ours.setdefault(".".join(parts[:n]), set())
    if isinstance(targets, str):
        hits = search(ours, targets, f"^(?:{targets})$")
    else:
        hits = {module for module in ours if any(f".{module}".endswith(f".{target}") for target in targets)}
    found = {name for module in hits for name in ours[module]} & set(layers)
    others = sorted(module for module in hits if not ours[module] & set(layers))
    if others and (found or isinstance(targets, str) or any(ours[module] for module in others)):
        raise ValueError(f"lora: {targets!r:.99} matches {others[0] or 'the whole model'!r}, which is no linear layer: "
                         "lora_also trains tables, heads and other parameters whole")  # fmt: skip
    return found

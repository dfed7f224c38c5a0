"""peft's files: adapter_config.json and adapter_model.safetensors, in and out.

A key of the file is "base_model.model." and a published name: of a layer, with ".lora_A.weight" or ".lora_B.weight"
behind it, or of a parameter that is saved whole (modules_to_save). y = W x + scale * B(A(x)), as in lora.py.

There a layer may have a rank and a scale of its own (rank_pattern, alpha_pattern), in lora.py all layers have the same:
zeros fill a smaller A and B up to the largest rank, and stay zero in training; B takes up what the scale differs by.
Queries, keys and values that are one matrix there (XTTS) share an A; three of ours become one of three times the rank.
"""

import json
import math
import os
import re

import torch
import torch.nn.functional as F

from parts.files import need, whole
from parts.tensors import UNBUILT, read_json, read_weights, reason, write_safetensors

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
BEFORE = "base_model.model."


def is_rank(x):
    return type(x) is int and 1 <= x <= 2**16


def is_alpha(x):
    return type(x) in (int, float) and 0 < x < math.inf


def is_pattern(x, is_value):
    """Whether x is {regular expression: value}."""
    try:
        return isinstance(x, dict) and all(re.compile(key) and is_value(value) for key, value in x.items())
    except re.error:
        return False


FIELDS = {
    "r": is_rank, "lora_alpha": is_alpha, "lora_dropout?": (int, float), "use_rslora?": bool,
    "rank_pattern?": lambda x: is_pattern(x, is_rank), "alpha_pattern?": lambda x: is_pattern(x, is_alpha),
}  # fmt: skip
# fields that change what an adapter computes, and those of their values that do not
FOREIGN = {
    "peft_type": ("LORA",), "bias": ("none", None), "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
    **dict.fromkeys(("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "target_parameters",
                     "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "megatron_config",
                     "kasa_config", "velora_config", "monteclora_config"), (False, None, {}, [])),
}  # fmt: skip


def is_adapter(path):
    """Whether a path is a folder with an adapter of peft's."""
    return os.path.isfile(os.path.join(path, CONFIG))


def read_settings(folder):
    """The adapter_config.json of a folder; also "rank", the largest of a layer. Raises ValueError for what lora.py
    cannot compute, such as DoRA.
    """
    path = os.path.join(folder, CONFIG)
    config = read_json(path)
    need(config, FIELDS, path)
    config["rank"] = max(config["r"], *(config.get("rank_pattern") or {}).values(), 0)
    for key, usual in FOREIGN.items():
        if config.get(key) not in (*usual, None):
            raise ValueError(f"{path}: {key} = {config[key]!r:.60} is not supported: merge the adapter by peft, then "
                             "take the whole model")  # fmt: skip
    return config


def read(folder, names, ignored="(?!)"):
    """The adapter in a folder as a dict for lora.load_adapter, for any base.

    names: {published name of a parameter: [(our name, function that makes our tensor of it, its inverse)]}, several for
    a layer that holds several of ours; ignored: regular expression of published names that are left out. Raises
    FileNotFoundError, and ValueError for files that are damaged or have parts that the model does not have.
    """
    config = read_settings(folder)
    files = [path for path in (os.path.join(folder, name) for name in WEIGHTS) if os.path.isfile(path)]
    if not files:
        raise FileNotFoundError(f"{folder} holds {CONFIG}, but no {WEIGHTS[0]}")
    weights = {}
    saved = set()
    for key, tensor in read_weights(files[0])[0].items():
        name = key.removeprefix(BEFORE).replace(".modules_to_save.", ".")
        if re.search(ignored, name):
            continue
        layer = re.fullmatch(r"(.*)\.lora_(?:embedding_)?([AB])(?:\.weight)?", name)
        name = f"{layer[1]}.weight" if layer else name
        if name not in names:
            raise ValueError(f"{files[0]} holds {key:.120}, for which the model has no {'layer' if layer else 'place'}")
        parts = names[name]
        if layer and ("_embedding_" in key or not parts[0][0].endswith(".weight")):
            raise ValueError(f"{files[0]} holds {key:.120}, but embeddings and heads get no adapter here: merge it by "
                             "peft, then take the whole model")  # fmt: skip
        try:
            pieces = split(tensor, layer, len(parts), config) if layer else [make(tensor) for _, make, _ in parts]
        except UNBUILT as error:
            raise ValueError(f"{files[0]}: {key:.120} has shape {tuple(tensor.shape)}: {reason(error)}") from None
        for (ours, *_), piece in zip(parts, pieces, strict=True):
            ours = f"{ours.removesuffix('.weight')}.lora_{layer[2].lower()}" if layer else f"{ours}.lora_whole"
            if not torch.equal(weights.setdefault(ours, piece), piece):
                raise ValueError(f"{files[0]}: {key:.120} differs from its twin, to which the model ties it")
        saved |= set() if layer else {name}
    for name, parts in names.items():
        if f"{parts[0][0]}.lora_whole" in weights and name not in saved:
            raise ValueError(f"{files[0]} lacks {name}, which the model ties to another parameter that it holds")
    settings = {"rank": config["rank"], "alpha": config["lora_alpha"], "dropout": config.get("lora_dropout") or 0.0}
    return {**settings, "rs": bool(config.get("use_rslora")), "base": "", "weights": weights}


def split(tensor, layer, n, config):
    """A or B of a layer of peft's, as those of n of our layers. layer: match of the layer's name and the letter."""
    tensor = tensor[..., 0] if tensor.ndim == 3 else tensor  # of a convolution over single rows
    tensor = alike(tensor, layer[2], layer[1], config)
    return [tensor] * n if layer[2] == "A" else tensor.unflatten(0, (n, -1)).unbind()


def join(parts, names):
    """The inverse of split. parts: {our name: {"a": A, "b": B}} of at least one of our layers; names: as in `read`, of
    all that the layer of peft's holds. Returns its A and B."""
    given = [parts.get(name.removesuffix(".weight")) for name, *_ in names]
    a = torch.cat([part["a"] for part in given if part])
    rows = next(len(part["b"]) for part in given if part)
    b = torch.block_diag(*(part["b"] if part else a.new_zeros(rows, 0) for part in given))
    back = names[0][2]
    return (a[..., None], b[..., None]) if back(a).ndim == 3 else (a, b)


def alike(tensor, letter, layer, config):
    """A or B of a layer, by its published name, as it is with the rank and scale that all layers share."""
    own = {}
    for field, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        given = config.get(pattern) or {}
        keys = [key for key in given if re.match(rf"(.*\.)?({key})$", layer)]  # as peft does; the first counts
        own[field] = given[keys[0]] if keys else config[field]
    less = config["rank"] - own["r"]
    factor = config["rank"] / own["r"]
    factor = (math.sqrt(factor) if config.get("use_rslora") else factor) * own["lora_alpha"] / config["lora_alpha"]
    if tensor.ndim != 2 or (less, factor) == (0, 1):  # what is no matrix is refused later, by its shape
        return tensor
    return F.pad(tensor, (0, 0, 0, less)) if letter == "A" else F.pad(factor * tensor.float(), (0, less))


def write(folder, state, names, base=None):
    """Write a dict of lora.adapter_state into a folder. names as in `read`. base: of base_model_name_or_path. Raises
    OSError, and ValueError for what peft cannot express, such as new rows of a table."""
    tensors = {}
    layers = {}
    saved = set()
    for ours, tensor in state["weights"].items():
        name, _, kind = ours.rpartition(".lora_")
        its = name if kind == "whole" else f"{name}.weight"
        places = {key: parts for key, parts in names.items() if its in (ours for ours, *_ in parts)}
        key, parts = next(iter(places.items()), ("", []))
        if kind == "rows" or kind == "whole" and len(parts) > 1:
            what = "new rows" if kind == "rows" else f"a part of {key} whole"
            raise ValueError(f"{name}: the adapter has {what}, which peft cannot express: export it merged, in another "
                             "layout")  # fmt: skip
        if kind == "whole":
            saved |= {key.rpartition(".")[0] for key in places}
            tensors |= {f"{BEFORE}{key}": back(tensor) for key, [(_, _, back)] in places.items()}
        else:
            layers.setdefault(key.removesuffix(".weight"), {}).setdefault(name, {})[kind] = tensor
    shared = {layer: len(parts) for layer, parts in layers.items() if len(parts) > 1}
    for layer, parts in layers.items():
        a, b = join(parts, names[f"{layer}.weight"])
        tensors |= {f"{BEFORE}{layer}.lora_A.weight": a, f"{BEFORE}{layer}.lora_B.weight": b}
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "inference_mode": True, "bias": "none",
        "r": state["rank"], "lora_alpha": state["alpha"], "lora_dropout": state["dropout"], "use_rslora": state["rs"],
        "target_modules": sorted(layers), "modules_to_save": sorted(saved) or None,
        "rank_pattern": {layer: n * state["rank"] for layer, n in shared.items()},
        "alpha_pattern": {layer: (math.sqrt(n) if state["rs"] else n) * state["alpha"] for layer, n in shared.items()},
    }  # fmt: skip
    os.makedirs(folder, exist_ok=True)
    with whole(os.path.join(folder, CONFIG), "w") as text, whole(os.path.join(folder, WEIGHTS[0])) as file:
        json.dump(config, text, indent=2)
        write_safetensors(file, tensors, {"format": "pt"})

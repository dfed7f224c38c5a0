"""peft's files: adapter_config.json and adapter_model.safetensors, in and out.

A key of the file is "base_model.model." and a published name: of a layer, with ".lora_A.weight" or ".lora_B.weight"
behind it, or of a parameter that is saved whole (modules_to_save). y = W x + scale * B(A(x)), as in lora.py.

There a layer may have a rank and a scale of its own (rank_pattern, alpha_pattern), in lora.py all layers have the same:
zeros fill a smaller A and B up to the largest rank, and stay zero in training; B takes up what the scale differs by.
"""

import json
import math
import os
import re

import torch
import torch.nn.functional as F

from parts.files import need, whole
from parts.tensors import read_json, read_weights, write_safetensors

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

    names: {published name of a parameter: (our name, function that makes our tensor of it)}; ignored: regular
    expression of published names that are left out. Raises FileNotFoundError, and ValueError for files that are damaged
    or have parts that the model does not have.
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
        if layer and ("_embedding_" in key or not names[name][0].endswith(".weight")):
            raise ValueError(f"{files[0]} holds {key:.120}, but embeddings and heads get no adapter here: merge it by "
                             "peft, then take the whole model")  # fmt: skip
        ours, make = names[name]
        ours = f"{ours.removesuffix('.weight')}.lora_{layer[2].lower()}" if layer else f"{ours}.lora_whole"
        tensor = alike(tensor, layer[2], layer[1], config) if layer else make(tensor)
        if not torch.equal(weights.setdefault(ours, tensor), tensor):
            raise ValueError(f"{files[0]}: {key:.120} differs from its twin, to which the model ties it")
        saved |= set() if layer else {name}
    for name, (ours, _) in names.items():
        if f"{ours}.lora_whole" in weights and name not in saved:
            raise ValueError(f"{files[0]} lacks {name}, which the model ties to another parameter that it holds")
    settings = {"rank": config["rank"], "alpha": config["lora_alpha"], "dropout": config.get("lora_dropout") or 0.0}
    return {**settings, "rs": bool(config.get("use_rslora")), "base": "", "weights": weights}


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
    """Write a dict of lora.adapter_state into a folder. names as in `read`; each function is its own inverse. base: of
    base_model_name_or_path. Raises OSError, and ValueError for new rows of a table, which peft does not have."""
    tensors = {}
    layers = set()
    saved = set()
    for ours, tensor in state["weights"].items():
        name, _, kind = ours.rpartition(".lora_")
        if kind == "rows":
            raise ValueError(f"{name} has new rows, which peft cannot express: export it merged, in another layout")
        if kind == "whole":
            keys = {key: make for key, (its, make) in names.items() if its == name}
            saved |= {key.rpartition(".")[0] for key in keys}
            tensors |= {f"{BEFORE}{key}": make(tensor) for key, make in keys.items()}
        else:
            layer = next(key for key, (its, _) in names.items() if its == f"{name}.weight").removesuffix(".weight")
            layers.add(layer)
            tensors[f"{BEFORE}{layer}.lora_{kind.upper()}.weight"] = tensor
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "inference_mode": True, "bias": "none",
        "r": state["rank"], "lora_alpha": state["alpha"], "lora_dropout": state["dropout"], "use_rslora": state["rs"],
        "target_modules": sorted(layers), "modules_to_save": sorted(saved) or None,
    }  # fmt: skip
    os.makedirs(folder, exist_ok=True)
    with whole(os.path.join(folder, CONFIG), "w") as text, whole(os.path.join(folder, WEIGHTS[0])) as file:
        json.dump(config, text, indent=2)
        write_safetensors(file, tensors, {"format": "pt"})

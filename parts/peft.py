"""peft's files: adapter_config.json and adapter_model.safetensors, in and out.

A key of the file is "base_model.model." and a published name: of a layer, with ".lora_A.weight" or ".lora_B.weight"
behind it, or of a parameter that is saved whole (modules_to_save). y = W x + scale * B(A(x)), as in lora.py.
"""

import json
import os
import re

import torch

from parts.files import need, whole
from parts.tensors import read_json, read_weights, write_safetensors

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
BEFORE = "base_model.model."
FIELDS = {"r": int, "lora_alpha": (int, float), "lora_dropout?": (int, float), "use_rslora?": bool}
# fields that change what an adapter computes, and those of their values that do not
FOREIGN = {
    "peft_type": ("LORA",), "bias": ("none", None), "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
    **dict.fromkeys(("use_dora", "use_qalora", "use_bdlora", "lora_bias", "rank_pattern", "alpha_pattern",
                     "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
                     "arrow_config", "megatron_config", "kasa_config", "velora_config", "monteclora_config"),
                    (False, None, {}, [])),
}  # fmt: skip


def is_adapter(path):
    """Whether a path is a folder with an adapter of peft's."""
    return os.path.isfile(os.path.join(path, CONFIG))


def read_settings(folder):
    """The adapter_config.json of a folder. Raises ValueError for what lora.py cannot compute, such as DoRA.
    """
    path = os.path.join(folder, CONFIG)
    config = read_json(path)
    need(config, FIELDS, path)
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
        layer = re.fullmatch(r"(.*)\.lora_([AB])\.weight", name)
        name = f"{layer[1]}.weight" if layer else name
        if name not in names or (layer and not names[name][0].endswith(".weight")):
            raise ValueError(f"{files[0]} holds {key:.120}, for which the model has no {'layer' if layer else 'place'}")
        ours, make = names[name]
        ours = f"{ours.removesuffix('.weight')}.lora_{layer[2].lower()}" if layer else f"{ours}.lora_whole"
        tensor = tensor if layer else make(tensor)
        if not torch.equal(weights.setdefault(ours, tensor), tensor):
            raise ValueError(f"{files[0]}: {key:.120} differs from its twin, to which the model ties it")
        saved |= set() if layer else {name}
    for name, (ours, _) in names.items():
        if f"{ours}.lora_whole" in weights and name not in saved:
            raise ValueError(f"{files[0]} lacks {name}, which the model ties to another parameter that it holds")
    settings = {"rank": config["r"], "alpha": config["lora_alpha"], "dropout": config.get("lora_dropout") or 0.0}
    return {**settings, "rs": bool(config.get("use_rslora")), "base": "", "weights": weights}


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

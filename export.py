"""Export: a model as its family's authors, or other software, publish it.

    python weights.py export --ckpt=out/x/best.pt --out_dir=hub/x --layout=transformers

The tensors' names and shapes come from the tables of layouts.py, which reads such files back.
"""

import contextlib
import json
import os

from layouts import LAYOUTS, WithoutMemory
from parts.files import whole
from parts.tensors import write_safetensors


def export(model, folder, layout=""):
    """Write a model into a folder, without codec and tokenizer. Returns a note for users, or "".

    layout: one of `layouts_of` its family, "": the first. All files are written under partial names and renamed when
    all are complete. Raises OSError, and ValueError for a family without such a layout, or for a model that the layout
    cannot express.
    """
    config = model.config
    known = layouts_of(config.arch)
    if not known:
        raise ValueError(f"the family {config.arch!r} cannot be exported; choose from "
                         f"{', '.join(sorted({layout.arch for layout in LAYOUTS if layout.write_config}))}")
    if layout and layout not in known:
        raise ValueError(f"layout = {layout!r:.60}: the family {config.arch!r} has {', '.join(known)}")
    layout = known[layout or next(iter(known))]
    state = model.state_dict()
    with WithoutMemory():
        plain = type(model)(config).state_dict()
    if further := state.keys() - plain.keys():
        raise ValueError(f"{min(further)} is no published tensor: merge adapters first")
    written = {**layout.write_config(config), "dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    tensors = {}
    for name, tensor in state.items():
        (key,), make = layout.source(name, config)
        tensors[key] = make(tensor)
    for twin, key in layout.tied.items():
        tensors[twin] = tensors[key]

    os.makedirs(folder, exist_ok=True)
    with contextlib.ExitStack() as files:
        json.dump(written, files.enter_context(whole(os.path.join(folder, "config.json"), "w")), indent=2)
        file = files.enter_context(whole(os.path.join(folder, "model.safetensors")))
        write_safetensors(file, tensors, {"format": "pt"})
    return layout.note


def layouts_of(arch):
    """{name: Layout} of the layouts in which a family's models can be exported."""
    return {layout.name: layout for layout in LAYOUTS if layout.arch == arch and layout.write_config}

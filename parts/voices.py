"""Voices in files: what a model heard of a voice, kept under a name with its texts and a note such as its licence.

    save_voice("anna", heard, ["what she says"], made_for, "CC BY 4.0, Anna")    voices/anna.pt
    heard, texts, note = load_voice("anna", made_for)

A file holds tensors and texts alone; reading it runs no code. It says for which family and codec it was made. Latents
fit the weights that made them and those that continue from these, which a file does not know.
"""

import os
from pathlib import Path

import torch

from parts.files import need, whole
from parts.tensors import fault, read_pickle, write_pickle

FORMAT = "parlando-voice-1"
FOLDER = "voices"


def are_texts(x):
    return isinstance(x, list) and all(isinstance(text, str) for text in x)


def are_codes(x):
    """Whether x is a list of codes (T, K), one for each recording."""
    return isinstance(x, list) and all(
        isinstance(codes, torch.Tensor) and codes.dtype == torch.int64 and codes.ndim == 2 and codes.numel() and
        not fault(codes) for codes in x)  # fmt: skip


def is_vector(ndim):
    return lambda x: isinstance(x, torch.Tensor) and x.ndim == ndim and x.is_floating_point() and not fault(x)


# latents (L, D) and timbre (E,) are of a model that reads a voice from recordings, codes of one that continues them
FIELDS = {
    "made_for": {"arch": str, "codec": str, "fingerprint": str}, "texts": are_texts, "codes": are_codes, "note": str,
    "latents?": is_vector(2), "timbre?": is_vector(1),
}  # fmt: skip


def voice_path(name):
    """The path of a voice: `name` if it is a path, else that of the name in the folder voices/."""
    if os.path.basename(name) != name or name.endswith(".pt"):
        return name
    return os.path.join(FOLDER, f"{name}.pt")


def save_voice(name, heard, texts, made_for, note=""):
    """Write a voice and return its path; the file is complete or absent.

    heard: codes [(T, K)], or (latents (L, D), timbre (E,) or None); texts: what is said in the recordings; made_for:
    {"arch", "codec", "fingerprint"} of the model and its codec. Raises OSError.
    """
    path = voice_path(name)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    latents, timbre = heard if isinstance(heard, tuple) else (None, None)
    codes = [] if isinstance(heard, tuple) else [torch.as_tensor(x, dtype=torch.int64) for x in heard]
    tensors = {key: None if x is None else x.detach().float().cpu() for key, x in
               (("latents", latents), ("timbre", timbre))}  # fmt: skip
    content = {"format": FORMAT, "made_for": made_for, "texts": list(texts), "codes": codes, "note": note, **tensors}
    with whole(path) as file:
        write_pickle(file, content, f"{path}: the voice")
    return path


def load_voice(name, made_for):
    """What was heard of a voice, its texts and its note, as save_voice took them.

    Raises FileNotFoundError, with the names of voices that exist, and ValueError for a file that is damaged, no voice,
    or made for another family or codec.
    """
    path = voice_path(name)
    if not os.path.isfile(path):
        known = ", ".join(sorted(file.stem for file in Path(FOLDER).glob("*.pt"))[:12])
        raise FileNotFoundError(f"{path}: no such voice{f'; {FOLDER}/ has {known}' if known else ''}")
    content = read_pickle(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no {FORMAT} file: sample.py's save_voice writes those")
    need(content, FIELDS, path)
    theirs = content["made_for"]
    for key, word in (("arch", "family"), ("codec", "codec"), ("fingerprint", "codec's fingerprint")):
        if theirs[key] != made_for[key]:
            raise ValueError(f"{path} is a voice for the {word} {theirs[key]!r:.80}, this model has "
                             f"{made_for[key]!r:.80}: save it with this model")  # fmt: skip
    if content.get("latents") is not None:
        return (content["latents"], content.get("timbre")), content["texts"], content["note"]
    if not content["codes"]:
        raise ValueError(f"{path} is damaged: it holds neither codes nor latents")
    return [codes.numpy() for codes in content["codes"]], content["texts"], content["note"]

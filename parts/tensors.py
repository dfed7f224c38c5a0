"""Tensors out of files that others wrote: no code is run, damage is noticed, and only finite numbers get in. Also the
device that they go to."""

import math
import os
import warnings
import zipfile

import torch

STARTS = {
    b"PK\3\4": "a zip archive", b"\x1f\x8b": "a gzip archive", b"\x93NUMPY": "an array of numpy's",
    b"RIFF": "a recording", b"fLaC": "a recording", b"OggS": "a recording", b"ID3": "a recording",
    b"GGUF": "a GGUF file", b"version https://git-lfs": "a pointer of Git LFS, not the file itself",
}  # fmt: skip
# what sizes that cannot be raise where a model is built of them
UNBUILT = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError)


class Inert(dict):
    """Stands for whatever else a pickle names, such as a config class of a package that is not here."""

    def __init__(self, *args):
        super().__init__()


def what_is(path):
    """What a path leads to, in a few words for a message."""
    if os.path.isdir(path):
        if os.path.exists(os.path.join(path, "meta.json")):
            return "a folder of token files"
        return "a folder"
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(64)
    if not size:
        return "empty"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "a safetensors file"
    for start, words in STARTS.items():
        if head.startswith(start):
            return words
    if head[:1] == b"\x80":
        return "a pickle"
    try:
        head[:60].decode()
    except UnicodeDecodeError:
        return "of another kind"
    return "of another kind" if b"\0" in head else "a text"


def undamaged(path):
    """Whether every record of a zip archive that torch.save wrote has the checksum it was written with.

    torch.load does not look at them. Reads the file once, about 1 s for each GB, and keeps nothing of it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = sum(record.file_size for record in archive.infolist()) > os.path.getsize(path)  # torch never does
            return not packed and archive.testzip() is None
    except Exception:  # zipfile fails in many ways on archives that are damaged
        return False


def unpickle(file, device="cpu", inert=None):
    """What torch.save wrote, a path's memory-mapped where it can be. Only tensors and plain containers are read.

    inert: classes that are none of torch's become Inert, if their names begin so. Raises an Exception of some kind for
    everything else, such as code.
    """
    mapped = not hasattr(file, "read") and zipfile.is_zipfile(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own words about pickles that it then refuses
        strange = torch.serialization.get_unsafe_globals_in_checkpoint(file) if mapped and inert is not None else []
        with torch.serialization.safe_globals([(Inert, name) for name in strange if name.startswith(inert)]):
            return torch.load(file, map_location=device, weights_only=True, mmap=mapped)


def reason(error):
    """The first line of an error, which may have none, short enough for a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def pick_device(name):
    """The name of a device that works; "auto": a GPU if this machine has one. Raises ValueError for a device that it
    lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device = {name!r} is not available: {reason(error)}") from None
    return name


def fault(tensor, like=None):
    """What is wrong with weights that were read from a file, in words to follow their name; "" where nothing is.

    like: a tensor whose shape and kind of numbers they have to have. Values are read once, 0.1 s for each GB.
    """
    if not isinstance(tensor, torch.Tensor):
        return f"is {tensor!r:.60}, not a tensor"
    if like is not None and tensor.shape != like.shape:
        return f"has shape {tuple(tensor.shape)}, not {tuple(like.shape)}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        return "is not a plain tensor: take weights that are neither sparse nor quantised"
    if like is not None and tensor.is_floating_point() != like.is_floating_point():
        return f"is {str(tensor.dtype).removeprefix('torch.')}, not {str(like.dtype).removeprefix('torch.')}"
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        return f"holds fewer numbers than its shape {tuple(tensor.shape)} has"
    if like is None and not tensor.numel():
        return "holds no numbers"
    if tensor.numel() and tensor.is_floating_point():
        tensor = tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()
        if not all(math.isfinite(x) for x in torch.stack(torch.aminmax(tensor)).tolist()):
            return "holds NaN or infinity: the run that made it diverged, or the file is damaged"
    return ""


def need_tensors(found, wanted, where):
    """Check that tensors {name: tensor} are those of another such dict, in names, shapes and kind, and all finite.

    Raises ValueError, one line that begins with `where` and names the first that is not.
    """
    for name, like in wanted.items():
        if name not in found:
            raise ValueError(f"{where} lacks {name}")
        if words := fault(found[name], like):
            raise ValueError(f"{where}: {name} {words}")
    if more := [name for name in found if name not in wanted]:
        raise ValueError(f"{where} holds {more[0]!s:.80}, which the model does not have")

"""Tensors out of files that others wrote: no code is run, damage is noticed, and only finite numbers get in. Also the
device that they go to.

    tensors, config = read_weights("model.safetensors")    or the index of its shards, a pickle, a NeMo archive
"""

import collections
import contextlib
import functools
import io
import json
import math
import os
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

STARTS = {
    b"PK\3\4": "a zip archive", b"\x1f\x8b": "a gzip archive", b"7z\xbc\xaf": "a 7z archive",
    b"\x93NUMPY": "an array of numpy's", b"RIFF": "a recording", b"fLaC": "a recording", b"OggS": "a recording",
    b"ID3": "a recording", b"\xff\xfb": "a recording", b"\xff\xd8\xff": "an image", b"\x89PNG": "an image",
    b"GIF8": "an image", b"%PDF": "a PDF", b"<!DOCTYPE": "a web page", b"<!doctype": "a web page",
    b"<html": "a web page", b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself",
}  # fmt: skip
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
MOST_KEPT = 8  # files that were read once for many runs
KEPT = {}  # {function and file: what it read}
keeping = False
# errors of building a model with impossible sizes
UNBUILT = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError)


class Inert(dict):
    """Replaces every other class in a pickle, such as a config class of a package that is not installed."""

    def __init__(self, *args):
        super().__init__()


def what_is(path):
    """The kind of a file or folder, in a few words for a message."""
    if os.path.isdir(path):
        if os.path.exists(os.path.join(path, "meta.json")):
            return "a folder of token files"
        return "a folder"
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(512)
    if not size:
        return "empty"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "a safetensors file"
    for start, words in STARTS.items():
        if head.startswith(start):
            return words
    if head[:1] == b"\x80":
        return "a pickle"
    if head[257:262] == b"ustar":
        return "a tar archive"
    head = head[:64]
    try:
        head[:60].decode()
    except UnicodeDecodeError:
        return "of another kind"
    return "of another kind" if b"\0" in head else "a text"


def undamaged(path):
    """Whether every record of a zip archive by torch.save still has its checksum, which torch.load does not compare.

    Reads the file once (about 1 s for each GB) and keeps nothing in memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = sum(record.file_size for record in archive.infolist()) > os.path.getsize(path)  # torch never does
            return not packed and archive.testzip() is None
    except Exception:  # zipfile fails in many ways on archives that are damaged
        return False


def why_unread(path, wanted="file of weights"):
    """Why a file cannot be read as one that torch.save wrote, as the end of a sentence that begins with its path."""
    kind = what_is(path)
    if kind == "a pickle":
        return f"is no {wanted} that can be read without running code, it is a pickle"
    if kind != "a zip archive":
        return f"is no {wanted}, it is {kind}"
    if not zipfile.is_zipfile(path):
        return "is truncated: it begins as torch.save begins a file, and has no end"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # see undamaged
        names = ["data.pkl"]
    if not any(os.path.basename(name) == "data.pkl" for name in names):
        return f"is no {wanted}, it is a zip archive with {(names or ['nothing'])[0]:.60} in it"
    if not undamaged(path):
        return "is damaged: it does not have the checksums it was written with; take another copy"
    return "cannot be read without running code"


def unpickle(file, device="cpu", inert=None):
    """Read what torch.save wrote: only tensors and plain containers, memory-mapped where the format allows it.

    file: a path or a binary file. inert: other classes whose names begin with this become Inert. Raises an Exception of
    some kind for everything else, such as code.
    """
    mapped = not hasattr(file, "read") and zipfile.is_zipfile(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own words about pickles that it then refuses
        strange = torch.serialization.get_unsafe_globals_in_checkpoint(file) if mapped and inert is not None else []
        with torch.serialization.safe_globals([(Inert, name) for name in strange if name.startswith(inert)]):
            return torch.load(file, map_location=device, weights_only=True, mmap=mapped)


def read_vector(path):
    """The speaker vector (E,) float32 in a .npy file, or in one that torch.save wrote; it may be (1, E) there. Raises
    FileNotFoundError, and ValueError, one line that names the file."""
    kind = what_is(path)
    if kind not in ("an array of numpy's", "a zip archive", "a pickle"):
        raise ValueError(f"{path} is {kind}, not a speaker vector: give a .npy or .pt file with the numbers that the "
                         "speaker encoder of these weights made")  # fmt: skip
    try:
        found = np.load(path, mmap_mode="r") if kind == "an array of numpy's" else unpickle(path).float().numpy()
        vector = np.array(found.reshape(found.shape[-1]), np.float32)
    except Exception:  # torch.load fails in many ways on files of other kinds
        raise ValueError(f"{path} is damaged, or holds no speaker vector (E,) or (1, E)") from None
    if not len(vector) or not np.isfinite(vector).all():
        raise ValueError(f"{path} holds no speaker vector, or one with NaN or infinite numbers")
    return vector


def write_pickle(file, content, where):
    """torch.save into an open file. Raises OSError, which begins with `where`."""
    try:
        torch.save(content, file)
    except RuntimeError as error:  # torch's zip writer reports a full disk so, without naming it
        raise OSError(f"{where} could not be written, the disk may be full ({reason(error)})") from None


# ---------------------------------------------------------------------------------------------------------------------
# one file for many runs


@contextlib.contextmanager
def reading_once():
    """While it lasts, functions that are `read_once` keep what they read, for the next time that it lasts too. A model
    must not share the memory of these tensors then: see `are_kept`."""
    global keeping
    before = keeping
    keeping = True
    try:
        yield
    finally:
        keeping = before


def are_kept():
    """Whether the tensors of a file serve other models too."""
    return keeping


def read_once(read):
    """A function read(path, ...) that reads a file once, as long as that does not change and `reading_once` lasts. Each
    caller gets dicts and lists of its own, with the same tensors."""
    @functools.wraps(read)
    def reader(path, *args, **options):
        if not keeping or not os.path.isfile(path):
            return read(path, *args, **options)
        found = os.stat(path)
        state = found.st_ino, found.st_size, found.st_mtime_ns
        key = read.__qualname__, os.path.abspath(path), args, *options.items(), *state
        content = KEPT.pop(key) if key in KEPT else read(path, *args, **options)
        while len(KEPT) >= MOST_KEPT:
            KEPT.pop(next(iter(KEPT)))
        KEPT[key] = content  # the last in use goes last
        return own_structure(content)

    return reader


def own_structure(x):
    if type(x) in (dict, collections.OrderedDict):
        return {key: own_structure(value) for key, value in x.items()}
    return type(x)(map(own_structure, x)) if type(x) in (list, tuple) else x


# ---------------------------------------------------------------------------------------------------------------------
# files of weights


def is_index(path):
    """Whether a path names the index of a model in several safetensors files."""
    return str(path).endswith(".safetensors.index.json")


def is_safetensors(path):
    """Whether a file begins as a safetensors file does. Raises FileNotFoundError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file or folder of weights (download first what is on a hub)")
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"  # 8 bytes with the length of the header, then the header, which is JSON


@read_once
def read_weights(path, inert=""):
    """Read a file of weights: safetensors, the index of shards, what torch.save wrote, or a NeMo archive.

    Returns the tensors {key: tensor}, memory-mapped where the format allows it, and the config in the file, or {}.
    inert: see `unpickle`. The checksums of a pickle are compared, safetensors have none. Raises FileNotFoundError, and
    ValueError for a file that is damaged or of another kind.
    """
    if is_index(path):
        shards = [read_safetensors(shard)[0] for shard in read_index(path)]
        return {key: tensor for shard in shards for key, tensor in shard.items()}, {}
    if is_safetensors(path):
        return read_safetensors(path)
    content = read_pickle(path, inert)
    if zipfile.is_zipfile(path) and not undamaged(path):
        raise ValueError(f"{path} {why_unread(path)}")
    if isinstance(content, torch.Tensor):  # as XTTS publishes mel_stats.pth: the file's name is the only one
        return {Path(path).stem: content}, {}
    config = content.get("config") if isinstance(content, dict) else None
    return weights_in(content), config if isinstance(config, dict) else {}


def read_safetensors(path):
    """The tensors {key: tensor} of a safetensors file, memory-mapped, and the config in its metadata, or {}.

    Tensors may be changed, the file stays as it is. The format: huggingface.co/docs/safetensors. Raises
    FileNotFoundError, and ValueError for a file that is damaged or of another kind.
    """
    if not is_safetensors(path):
        raise ValueError(f"{path} is no safetensors file, it is {what_is(path)}")
    try:
        data = np.memmap(path, np.uint8, "c")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        config = (header.pop("__metadata__", None) or {}).get("config") or ""
        tensors = {key: place(data[start:], **entry) for key, entry in header.items()}
        if sum(tensor.nbytes for tensor in tensors.values()) != len(data) - start:
            raise ValueError("its tensors do not fill it")
    except Exception as error:  # a header that is no JSON, or holds something else than it should
        raise ValueError(f"{path} is truncated or damaged ({reason(error)})") from None
    is_json = isinstance(config, str) and config.startswith("{")
    return tensors, parse(config, f"{path}, config") if is_json else {}


def read_metadata(path):
    """The metadata {str: str} of a safetensors file, {} without. Raises as `read_safetensors`."""
    read_safetensors(path)
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)).get("__metadata__") or {}


def place(data, dtype, shape, data_offsets):
    """One tensor of the bytes `data` (numpy, uint8), with the words of its entry in a safetensors header."""
    first, last = data_offsets
    if dtype not in TYPES:
        raise ValueError(f"unknown type {dtype!r:.20}")
    if not 0 <= first <= last <= len(data) or any(n < 0 for n in shape):
        raise ValueError(f"no place for shape {shape!r:.60} at {data_offsets!r:.60}")
    return torch.from_numpy(data[first:last]).view(TYPES[dtype]).view(shape)


def write_safetensors(file, tensors, metadata=None):
    """Write tensors {key: tensor} into a binary file, as safetensors. metadata: {str: str}, for its header.

    Larger types come first, so that each tensor begins at a multiple of its type's size. Raises OSError.
    """
    names = {kind: name for name, kind in TYPES.items()}
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key in order:
        start = end
        end += tensors[key].numel() * tensors[key].element_size()
        entry = {"dtype": names[tensors[key].dtype], "shape": list(tensors[key].shape), "data_offsets": [start, end]}
        header[key] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for key in order:
        file.write(tensors[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def read_pickle(path, inert=""):
    """Read what torch.save wrote, also inside a NeMo archive. No code is run: other classes become Inert.

    inert: only those whose names begin with this. Raises ValueError, one line that names the file.
    """
    nemo = str(path).endswith(".nemo")
    file = from_nemo(path) if nemo else path
    try:
        return unpickle(file, inert=inert)
    except Exception:  # torch.load fails in many ways on files of other kinds
        why = "is damaged, or holds weights that cannot be read without running code" if nemo else why_unread(path)
        raise ValueError(f"{path} {why}") from None


def from_nemo(path):
    """The pickle in a NeMo archive, in memory. Nothing is unpacked, so no name in the archive can lead anywhere.

    Raises ValueError, one line that names the file.
    """
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and os.path.basename(member.name) == "model_weights.ckpt":
                    return io.BytesIO(archive.extractfile(member).read())
    except Exception:  # tarfile and the decompressors fail in many ways on damaged archives
        raise ValueError(f"{path} is truncated, or no NeMo archive (it is {what_is(path)})") from None
    raise ValueError(f"{path} is no NeMo archive of a model: no model_weights.ckpt in it")


def weights_in(content):
    """The tensors {key: tensor} of a state dict, or of the one inside a training script's dict; {} if it has none."""
    for _ in range(4):  # a dict may hold itself
        inner = [content[name] for name in ("model_state", "model", "module", "state_dict")
                 if isinstance(content, dict) and isinstance(content.get(name), dict)]  # fmt: skip
        content = inner[0] if inner else content
    if not isinstance(content, dict):
        return {}
    return {key: x for key, x in content.items() if isinstance(key, str) and isinstance(x, torch.Tensor)}


def read_index(path):
    """The paths of the safetensors files that an index names; they lie beside it. Raises ValueError, one line."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{path} has no weight_map")
    for shard in shards.values():
        beside = isinstance(shard, str) and os.path.basename(shard) == shard
        if not beside or not shard.endswith((".safetensors", ".sft")):
            raise ValueError(f"{path} names {shard!r:.60}, which is no safetensors file beside it")
    return sorted({os.path.join(os.path.dirname(path), shard) for shard in shards.values()})


class Arrays(pickle.Unpickler):
    """Reads arrays of numpy's, numbers and plain containers out of a pickle, and nothing else."""

    NAMES = {"_reconstruct", "scalar", "ndarray", "dtype", "_frombuffer"}

    def find_class(self, module, name):
        if module.partition(".")[0] != "numpy" or name not in self.NAMES:
            raise ValueError(f"it names {module}.{name}, which is no array")
        return super().find_class(module, name)


def read_numpy(data):
    """What numpy.save wrote, from its bytes: an array, or the object inside. No code is run. Raises ValueError."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if not dtype.hasobject:
            return np.load(io.BytesIO(data), allow_pickle=False)
        found = Arrays(file).load()
    except Exception as error:  # pickles and headers fail in many ways
        raise ValueError(reason(error)) from None
    return found[()] if isinstance(found, np.ndarray) and found.shape == shape == () else found


def read_json(path):
    """The object in a JSON file, as a dict. Raises OSError, and ValueError, one line that names the file."""
    with open(path, "rb") as file:
        return parse(file.read(), path)


def parse(text, where):
    """The object in JSON (str or bytes), as a dict. Raises ValueError, one line that begins with `where`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({reason(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds no JSON object")
    return content


def reason(error):
    """The first line of an error, or its type if it has no text, short enough for a message."""
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
    """What is wrong with a tensor from a file, in words that follow its name in a message; "" if nothing is.

    like: a tensor with the required shape and kind of numbers. Reads the values once (0.1 s for each GB).
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
    """Check that `found` {name: tensor} has the names, shapes and kinds of `wanted`, and only finite numbers.

    Raises ValueError, one line that begins with `where` and names the first tensor that is wrong.
    """
    for name, like in wanted.items():
        if name not in found:
            raise ValueError(f"{where} lacks {name}")
        if words := fault(found[name], like):
            raise ValueError(f"{where}: {name} {words}")
    if more := [name for name in found if name not in wanted]:
        raise ValueError(f"{where} holds {more[0]!s:.80}, which the model does not have")

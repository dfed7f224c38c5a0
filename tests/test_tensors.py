import builtins
import importlib
import json
import os
import pickle
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import checkpoint_of, tiny
from safetensors.torch import load_file, save_file

import codec as codecs
import data
import weights
from parts.tensors import (
    TYPES,
    fault,
    need_tensors,
    read_safetensors,
    read_weights,
    reason,
    undamaged,
    what_is,
    write_safetensors,
)


class Call:
    """A pickle of it calls a function when it is read."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def evil(mark):
    """Ways to leave a file, if one of them is run."""
    code, path = f"open({str(mark)!r}, 'w').close()", str(mark)
    return [
        Call(os.system, f"touch {path}"), Call(os.mkdir, path), Call(os.mknod, path), Call(exec, code),
        Call(eval, code), Call(builtins.open, path, "w"), Call(subprocess.check_call, ["touch", path]),
        Call(os.popen, f"touch {path}"), Call(importlib.import_module, "antigravity"),
        Call(torch.save, torch.zeros(1), path), Call(np.save, path, np.zeros(1)),
    ]  # fmt: skip


READERS = {
    "checkpoint": weights.load_checkpoint,
    "published": weights.from_pretrained,
    "codec weights": lambda path: codecs.load_codec("dac", path),
    "codec pack": codecs.read_pack,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_run_no_code(read, zipped, protocol, tmp_path, recwarn):
    mark, path = tmp_path / "mark", tmp_path / "x.pth"
    for call in evil(mark):
        torch.save({"format": weights.FORMAT, "model": {"codebook0_head.weight": call}}, path,
                   pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)  # fmt: skip
        with pytest.raises(ValueError, match="x.pth") as error:
            read(str(path))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
        assert os.listdir(tmp_path) == ["x.pth"]
        if not zipped:
            path.write_bytes(pickle.dumps(call, protocol))
            with pytest.raises(ValueError, match="x.pth"):
                read(str(path))
            assert os.listdir(tmp_path) == ["x.pth"]
    assert "antigravity" not in sys.modules and not recwarn.list


def test_arrays_run_no_code(tmp_path):
    files = SimpleNamespace(folder=tmp_path, meta={"speakers": ["ann", "bob"]})
    files.parts = [files]
    for call in evil(tmp_path / "mark"):
        np.save(tmp_path / data.TIMBRES, np.array([call, call], object), allow_pickle=True)
        with pytest.raises(ValueError, match="timbres.npy is damaged .*make the folder again"):
            data.speaker_timbres(files)
    assert os.listdir(tmp_path) == [data.TIMBRES]


def same(a, b):
    """Whether two checkpoints are equal, number by number."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def test_one_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    path, rng = tmp_path / "x.pt", random.Random(0)
    weights.save_checkpoint(path, checkpoint_of(tiny(), iter=7))
    right, content = weights.load_checkpoint(path), path.read_bytes()
    assert undamaged(path)
    structure = content.index(b"PK\1\2")  # the directory at the end is small, and all of it is looked at
    places = [rng.randrange(8 * len(content)) for _ in range(150)]
    places += [8 * structure + rng.randrange(8 * (len(content) - structure)) for _ in range(50)]
    refused = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert same(weights.load_checkpoint(path), right)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 120


def test_a_codec_table_with_a_flipped_bit_is_refused(tmp_path):
    codec = codecs.load_codec("mel", n_codebooks=2, codebook_size=8, sample_rate=4000, n_mels=20)
    codec.fit([torch.randn(8000)]).save(tmp_path)
    damaged = bytearray((tmp_path / "codec.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "codec.pt").write_bytes(damaged)
    with pytest.raises(ValueError, match="codec.pt: not a codec table, or damaged"):
        codecs.load_codec("mel", tmp_path)


@pytest.mark.parametrize("tensor, words", [
    (torch.tensor([1.0, float("nan")]), "holds NaN or infinity"),
    (torch.tensor([1.0, -float("inf")]), "holds NaN or infinity"),
    (torch.tensor([1.0, float("inf")]).bfloat16(), "holds NaN or infinity"),
    (torch.tensor([1, 2]), "is int64, not float32"),
    (torch.zeros(2, dtype=torch.complex64), "is complex64, not float32"),
    (torch.zeros(2).to_sparse(), "is not a plain tensor"),
    (torch.zeros(2, device="meta"), "is not a plain tensor"),
    (torch.zeros(3), r"has shape \(3,\), not \(2,\)"),
    (torch.zeros(1).expand(2), "holds fewer numbers than its shape"),
    ([1.0, 2.0], r"is \[1.0, 2.0\], not a tensor"),
])  # fmt: skip
def test_tensors_that_no_model_takes(tensor, words):
    with pytest.raises(ValueError, match=f"^here: w {words}"):
        need_tensors({"w": tensor}, {"w": torch.zeros(2)}, "here")


def test_tensors_that_it_takes():
    for tensor in (torch.full((2,), 3e38), torch.zeros(2).half(), torch.zeros(2).double(), torch.ones(4)[::2]):
        assert not fault(tensor, torch.zeros(2))
    assert not fault(torch.zeros(0), torch.zeros(0)) and not fault(torch.tensor([5]), torch.tensor([6]))
    with pytest.raises(ValueError, match="here lacks w"):
        need_tensors({}, {"w": torch.zeros(2)}, "here")
    with pytest.raises(ValueError, match="here holds v, which the model does not have"):
        need_tensors({"w": torch.zeros(2), "v": torch.zeros(2)}, {"w": torch.zeros(2)}, "here")


def test_what_a_path_leads_to(tmp_path):
    (tmp_path / "meta.json").write_text("{}")
    assert what_is(tmp_path) == "a folder of token files"
    for content, words in (
        (b"", "empty"), (b"RIFF1234WAVE", "a recording"), (b"hello", "a text"), ("\u00e9" * 40, "a text"),
        (b"\x80\2}.", "a pickle"), (b"\x93NUMPY\1", "an array of numpy's"),
        (b"\3" + bytes(7) + b"{ }", "a safetensors file"),
        (b"\0\0", "of another kind"), (b"\xff\xfe", "of another kind"),
    ):  # fmt: skip
        (tmp_path / "x").write_bytes(content if isinstance(content, bytes) else content.encode())
        assert what_is(tmp_path / "x") == words
    assert reason(ValueError("")) == "ValueError" and reason(ValueError("\n a\nb")) == "a"


# ---------------------------------------------------------------------------------------------------------------------
# safetensors


def test_safetensors_are_read_as_by_their_package(tmp_path):
    path = tmp_path / "x.safetensors"
    numbers = torch.arange(6).view(2, 3)
    written = {str(dtype): numbers.to(dtype) for dtype in TYPES.values()}
    written |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "odd": torch.ones(3, dtype=torch.uint8)}
    save_file(written, path, {"config": '{"a": 1}', "format": "pt"})
    tensors, config = read_weights(path)
    expected, before = load_file(path), path.read_bytes()
    assert config == {"a": 1} and tensors.keys() == expected.keys() == written.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape
        assert tensor.view(torch.uint8).equal(expected[name].view(torch.uint8)) if tensor.ndim else tensor == 2.5
    tensors["torch.float32"].zero_()  # training changes the tensors, never the file
    assert path.read_bytes() == before
    save_file({"w": numbers}, path)
    assert read_weights(path)[1] == {}


@pytest.mark.parametrize("header", [
    {"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}},
    {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
    {"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}},
    {"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 8]}},
    {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
    {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    {"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
    {"w": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]}}, {"w": {"dtype": "F32"}}, {"w": 3},
    {"__metadata__": [], "w": [8]},
])  # fmt: skip
def test_headers_that_do_not_fit_the_file(header, tmp_path):
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match="x.safetensors is truncated or damaged") as error:
        read_safetensors(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_cut_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(5), "v": torch.ones(2)}, path)
    content = path.read_bytes()
    for n in range(10, len(content)):
        path.write_bytes(content[:n])
        with pytest.raises(ValueError, match="x.safetensors is truncated or damaged"):
            read_safetensors(path)


def test_a_bare_tensor_is_named_after_its_file(tmp_path):
    torch.save(torch.ones(3), tmp_path / "mel_stats.pth")
    tensors, config = read_weights(tmp_path / "mel_stats.pth")
    assert list(tensors) == ["mel_stats"] and tensors["mel_stats"].equal(torch.ones(3)) and config == {}


def test_written_safetensors_are_those_of_the_package(tmp_path):
    """All types, shapes and strides; what the package reads is what was written."""
    tensors = {kind: torch.arange(6).to(dtype).view(2, 3).mT for kind, dtype in TYPES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "after": torch.ones(3, dtype=torch.uint8)}
    with open(tmp_path / "a.safetensors", "wb") as file:
        write_safetensors(file, tensors, {"config": '{"a": 1}'})
    theirs = load_file(tmp_path / "a.safetensors")
    ours, config = read_safetensors(tmp_path / "a.safetensors")
    assert config == {"a": 1} and theirs.keys() == ours.keys() == tensors.keys()
    for key, x in tensors.items():
        for read in (theirs[key], ours[key]):
            assert read.dtype == x.dtype and read.shape == x.shape
            assert torch.equal(*(y.contiguous().flatten().view(torch.uint8) for y in (read, x)))

import errno
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
import unicodedata
from functools import lru_cache

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
from data import Batches, TokenFiles, TokenWriter
from parts import workers
from parts.files import locked
from parts.text import (
    SentencePiece,
    extend_tokenizer,
    fast_tokenizer,
    load_tokenizer,
    normalise,
    train_tokenizer,
    wording,
)

K = 3
META = {
    "codec": {"name": "mel", "fingerprint": "0", "sample_rate": 16000, "frame_rate": 12.5, "n_codebooks": K,
              "codebook_size": 2**16},
    "tokenizer": {"kind": "sentencepiece", "file": "tokenizer.model", "sha256": "0", "vocab_size": 2**32, "bos_id": 1,
                  "eos_id": 2},
    "speakers": ["ann", "bob"], "text_format": "{text}", "lowercase": False,
}  # fmt: skip


def utterances(n, seed=0, most=30):
    """n times (id, text ids, codes, speaker)."""
    rng = np.random.default_rng(seed)

    def one(i):
        text, codes = rng.integers(0, 60000, rng.integers(1, most)), rng.integers(0, 1024, (rng.integers(1, most), K))
        return f"utt-{i}", text, codes, int(rng.integers(0, 2))

    return [one(i) for i in range(n)]


def write(folder, train, val=(), meta=META, **options):
    with TokenWriter(folder, **options) as out:
        for split, part in (("train", train), ("val", val)):
            for u in part:
                out.add(split, *u)
        out.file("tokenizer.model", b"pieces")
        out.finish(meta)
    return str(folder)


def layout(text, codes, prompt=None):
    """Rows of one column each: the prompt's and the utterance's text ids and codebook 0; segment tells them apart."""
    parts = [*(prompt or ()), text, codes]
    rows = [np.asarray(p) if p.ndim == 1 else p[:, 0] for p in parts]
    kinds = ([3, 4] if prompt else []) + [1, 2]
    return np.concatenate(rows)[:, None], np.concatenate([np.full(len(r), k) for r, k in zip(rows, kinds, strict=True)])


def length(text, frames, prompt_text=0, prompt_frames=0):
    return text + frames + prompt_text + prompt_frames


class Lengths:
    """Stands in for a TokenFiles where only the lengths matter."""

    folder, split, weights = "lengths", "train", 1.0

    def __init__(self, text, frames, speaker=None):
        zeros = np.zeros_like(text)
        self.index = np.stack([zeros, text, zeros, frames, zeros if speaker is None else speaker], 1)
        self.parts = [self]

    def __len__(self):
        return len(self.index)

    def name(self, i):
        return f"utt-{i}"

    def text(self, i):
        return np.full(self.index[i, 1], i)

    def codes(self, i):
        return np.full((self.index[i, 3], K), i)


def lengths(n, seed=0, most=40):
    rng = np.random.default_rng(seed)
    return Lengths(rng.integers(1, most, n), rng.integers(1, most, n), rng.integers(0, 3, n))


def batches(files, max_tokens=300, max_batch=8, **options):
    return Batches(files, layout, length, max_tokens, max_batch, **options)


def listed(batch):
    return [t.tolist() for t in batch]


# ---------------------------------------------------------------------------------------------------------------------
# token folders


@given(n=st.integers(0, 20), m=st.integers(1, 5), seed=st.integers(0, 99), wide=st.booleans())
def test_what_was_written_is_read(n, m, seed, wide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "x"
    parts = {"train": utterances(n, seed), "val": utterances(m, seed + 1)}
    if wide:
        parts["val"][0] = ("long ids, and spaces: čaj", np.array([2**31, 5, 70000]), *parts["val"][0][2:])
    write(folder, *parts.values(), text_dtype=np.uint32 if wide else np.uint16)
    assert not os.path.exists(f"{folder}.partial")
    for split, expected in parts.items():
        files = TokenFiles(folder, split)
        assert len(files) == len(expected)
        assert files.meta["splits"][split]["frames"] == sum(len(u[2]) for u in expected)
        assert files.meta["splits"][split]["text_tokens"] == sum(len(u[1]) for u in expected)
        assert files.meta["splits"][split]["utterances"] == len(expected)
        for i, (name, text, codes, speaker) in enumerate(expected):
            assert files.name(i) == name and files.speaker(i) == speaker
            assert np.array_equal(files.text(i), text) and np.array_equal(files.codes(i), codes)
            assert files.text(i).dtype == files.codes(i).dtype == np.int64 and files.codes(i).shape == codes.shape
    width = 4 if wide else 2
    assert os.path.getsize(folder / "val.text.bin") == width * sum(len(u[1]) for u in parts["val"])
    assert os.path.getsize(folder / "val.codes.bin") == 2 * K * sum(len(u[2]) for u in parts["val"])


def test_the_files_are_what_the_design_says(tmp_path):
    """Read back with numpy alone, as anybody may."""
    train = utterances(4)
    write(tmp_path / "x", train, utterances(2))
    meta = json.loads((tmp_path / "x/meta.json").read_text())
    assert meta["version"] == data.VERSION and meta["text_dtype"] == "uint16" and meta["speakers"] == ["ann", "bob"]
    codes = np.fromfile(tmp_path / "x/train.codes.bin", np.uint16).reshape(-1, K)
    index = np.load(tmp_path / "x/train.index.npy")
    text_start, text_length, first_frame, frames, speaker, _ = index[2]
    assert np.array_equal(codes[first_frame : first_frame + frames], train[2][2]) and speaker == train[2][3]
    assert np.array_equal(np.fromfile(tmp_path / "x/train.text.bin", np.uint16)[text_start:][:text_length], train[2][1])
    assert (tmp_path / "x/tokenizer.model").read_bytes() == b"pieces"
    assert (tmp_path / "x/val.ids.txt").read_text() == "utt-0\nutt-1\n"


def test_a_folder_that_was_not_finished_cannot_be_opened(tmp_path):
    with pytest.raises(KeyError), TokenWriter(tmp_path / "x") as out:
        out.add("train", *utterances(1)[0])
        raise KeyError
    assert os.listdir(tmp_path) == []
    with TokenWriter(tmp_path / "x") as out:
        out.add("train", *utterances(1)[0])
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="x is not a finished token folder .* make it with prepare.py"):
        TokenFiles(tmp_path / "x", "train")


@pytest.mark.parametrize("again", [False, True])
def test_killed_at_any_moment_no_folder_looks_whole_that_is_not(again, tmp_path):
    """The writer dies at its n-th operation, for every n; there is then the old folder, the new one, or none."""
    folder, old, new = tmp_path / "x", utterances(3, 1), utterances(4, 2)
    operations = "fsync", "replace", "rmtree", "makedirs", "save", "add", "file"

    def die_at(n):
        calls = itertools.count()

        def mortal(function):
            return lambda *a, **k: os._exit(9) if next(calls) == n else function(*a, **k)

        for module in (os, data.shutil, data.np, TokenWriter):
            for name in filter(module.__dict__.get, operations):
                setattr(module, name, mortal(getattr(module, name)))
        write(folder, new, utterances(2, 3))
        os._exit(0)

    outcomes = set()
    for n in range(60):
        write(folder, old)  # whatever was left behind does not stop the next run, and goes with it
        assert os.listdir(tmp_path) == ["x"]
        if not again:
            data.shutil.rmtree(folder)
        child = os.fork()
        if not child:
            die_at(n)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            files = TokenFiles(folder, "train")
            found = [files.codes(i).tolist() for i in range(len(files))]
            assert found in ([u[2].tolist() for u in old], [u[2].tolist() for u in new])
            assert (tmp_path / "x/tokenizer.model").exists()
            outcomes.add("old" if len(files) == 3 else "new")
        except ValueError as error:
            assert "not a finished token folder" in str(error)
            outcomes.add("none")
        if code == 0:
            break
    assert code == 0 and n > 10 and "new" in outcomes and ("old" in outcomes) == again


@pytest.mark.parametrize("file", ["train.codes.bin", "train.text.bin", "train.index.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "gone", "folder"])
def test_damaged_files_are_noticed(file, damage, tmp_path):
    folder = write(tmp_path / "x", utterances(5))
    path = tmp_path / "x" / file
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes({"cut": content[:-1], "longer": content + b"\0\0", "empty": b""}[damage])
    if damage == "longer" and file == "train.index.npy":
        return  # numpy reads what its header says
    with pytest.raises((ValueError, OSError), match=str(tmp_path)) as error:
        TokenFiles(folder, "train")
    assert "\n" not in str(error.value) and ("prepare.py" in str(error.value) or damage == "folder")


@pytest.mark.parametrize("file, read", [("codes.bin", "codes"), ("text.bin", "text"), ("index.npy", "codes")])
def test_rubbish_of_the_right_size_is_noticed(file, read, tmp_path):
    sizes = {"codec": {**META["codec"], "codebook_size": 1024}, "tokenizer": {**META["tokenizer"], "vocab_size": 60000}}
    folder = write(tmp_path / "x", utterances(5), meta={**META, **sizes})
    assert len(getattr(TokenFiles(folder, "train"), read)(4))
    path = tmp_path / "x" / f"train.{file}"
    content = path.read_bytes()
    path.write_bytes(content[:-80] + b"\xff" * 80)
    with pytest.raises(ValueError, match="split is damaged .(in its utterance 4|train.index.npy has ).*prepare.py"):
        getattr(TokenFiles(folder, "train"), read)(4)


def test_an_index_of_other_files_is_noticed(tmp_path):
    folder = write(tmp_path / "x", utterances(5))
    index = np.load(tmp_path / "x/train.index.npy")
    for wrong in (index[:-1], index[:, :-2], np.concatenate([index, index[-1:]])):
        np.save(tmp_path / "x/train.index.npy", wrong)
        with pytest.raises(ValueError, match="train split is damaged"):
            TokenFiles(folder, "train")


@pytest.mark.parametrize("column, value, message", [
    ("speaker", -1, "numbers below 0"), ("speaker", 2, "a speaker whom meta.json does not name"),
    ("speaker", 10**9, "a speaker whom"), ("frames", 0, "an utterance without"), ("frames", 10**6, "frames beyond"),
    ("first_frame", 2**62, "frames beyond"), ("text_start", 2**63 - 1, "text beyond"),
    ("text_length", 999, "text beyond"), ("text_start", -5, "numbers below 0"),
])  # fmt: skip
def test_an_index_that_names_what_is_not_there(column, value, message, tmp_path):
    folder = write(tmp_path / "x", utterances(5))
    index = np.load(tmp_path / "x/train.index.npy")
    index[3, data.INDEX_COLUMNS.index(column)] = value
    np.save(tmp_path / "x/train.index.npy", index)
    with pytest.raises(ValueError, match=f"train split is damaged .train.index.npy has {message}.*prepare.py"):
        TokenFiles(folder, "train")
    np.save(tmp_path / "x/train.index.npy", np.zeros_like(index))  # it would train on nothing
    with pytest.raises(ValueError, match="an utterance without frames"):
        TokenFiles(folder, "train")


def every_field(x, path=()):
    """The paths of all fields of a dict."""
    for key in x if isinstance(x, dict) else ():
        yield (*path, key)
        yield from every_field(x[key], (*path, key))


def test_meta_json_with_a_field_missing_or_of_another_kind(tmp_path):
    """Each is one line of at most 400 characters when the folder is opened; only names may be any text."""
    meta = {**META, "codec": {**META["codec"], "reference": {"rows_per_frame": 1, "silence": [0.0]}}}
    train = [(*u, np.zeros((len(u[2]), 1))) for u in utterances(2)]
    folder = write(tmp_path / "x", train, meta=meta, references="recording")
    content = json.loads((tmp_path / "x/meta.json").read_text())
    taken = set()
    for path in every_field(content):
        for junk in ("gone", None, "x" * 5000, -1, 0.5, float("nan"), 10**30, [], {}, [1, "x"], True):
            changed = json.loads(json.dumps(content))
            place = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = junk
            if junk == "gone":
                del place[path[-1]]
            (tmp_path / "x/meta.json").write_text(json.dumps(changed))
            try:
                TokenFiles(folder, "train")
                TokenFiles(folder, "val")
                taken.add((path[-1], type(junk)))
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 400 + len(folder) and folder in str(error)
    texts = {(name, str) for name in ("name", "fingerprint", "kind", "sha256", "text_format")}
    rates = {(name, kind) for name in ("sample_rate", "frame_rate") for kind in (float,)}
    optional = {("reference", str), ("reference", type(None))}  # "gone" and None
    ids = {("bos_id", int), ("eos_id", int), ("vocab_size", int), ("codebook_size", int), ("lowercase", bool)}
    assert taken <= {*texts, *rates, *ids, *optional}
    for junk in ("[" * 100000, "[1]", "null", '"x"'):
        (tmp_path / "x/meta.json").write_text(junk)
        with pytest.raises(ValueError, match="meta.json is damaged.*prepare.py"):
            TokenFiles(folder, "train")


def test_the_tokenizer_of_a_folder(tmp_path):
    tokenizer = SentencePiece(train_tokenizer(["one two"] * 5, 280))
    files = TokenFiles(write(tmp_path / "x", utterances(1), meta={**META, "tokenizer": tokenizer.describe()}), "train")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        files.tokenizer()  # b"pieces"
    (tmp_path / "x/tokenizer.model").write_bytes(tokenizer.model)
    assert files.tokenizer().model == tokenizer.model
    (tmp_path / "x/tokenizer.model").write_bytes(train_tokenizer(["three four"] * 5, 280))
    with pytest.raises(ValueError, match="is not the tokenizer that meta.json describes .sha256 differs"):
        files.tokenizer()


def test_half_a_surrogate_pair_is_unknown():
    tokenizer = SentencePiece(train_tokenizer(["one two"] * 5, 280))
    assert tokenizer.unknown("one \ud83d") == {"\ud83d"}


def test_features_that_are_not_finite_are_noticed(tmp_path):
    meta = {**META, "codec": {**META["codec"], "reference": {"rows_per_frame": 2, "silence": [0.0, 0.0]}}}
    train = [(*u, np.ones((2 * len(u[2]), 2))) for u in utterances(2)]
    train[1][4][0] = np.nan
    files = TokenFiles(write(tmp_path / "x", train, meta=meta, references="recording"), "train")
    assert files.reference(0).shape == (2 * len(train[0][2]), 2)
    with pytest.raises(ValueError, match="the reference of its utterance 1, from 0 on, is not finite"):
        files.reference(1)


def test_another_version_or_no_folder_is_refused(tmp_path):
    folder = write(tmp_path / "x", utterances(1), meta={**META, "version": 99})
    with pytest.raises(ValueError, match="format version 99, this code reads 1: run prepare.py again"):
        TokenFiles(folder, "train")
    for path in (tmp_path / "none", tmp_path / "x/meta.json"):
        with pytest.raises(ValueError, match="not a finished token folder"):
            TokenFiles(path, "train")


@pytest.mark.parametrize("text, codes, name, message", [
    ([1], [[0, 1]], "b", r"utterance b: codes of shape \(1, 2\), expected \(frames, 3\)"),
    ([1], [1, 2], "b", r"utterance b: codes of shape \(2,\)"),
    ([1], [[0, 1, 65536]], "b", "utterance b: codes from 0 to 65536 do not fit uint16"),
    ([1], [[0, 1, -1]], "b", "utterance b: codes from -1 to 1 do not fit uint16"),
    ([1, 65536], [[0, 1, 2]], "b", "utterance b: text ids from 1 to 65536 do not fit uint16"),
    ([-1], [[0, 1, 2]], "b", "utterance b: text ids from -1 to -1 do not fit uint16"),
    ([1], [[0, 1, 2]], "b\nc", "line break"),
])  # fmt: skip
def test_writer_refuses(text, codes, name, message, tmp_path):
    with pytest.raises(ValueError, match=message), TokenWriter(tmp_path / "x") as out:
        out.add("train", "a", [1], [[1, 2, 3]])
        out.add("train", name, text, codes)
    assert os.listdir(tmp_path) == []


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(TokenWriter, "_open", lambda self, name: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "x", utterances(3))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("where", ["add", "finish"])
def test_a_full_disk_names_the_file(where, tmp_path, monkeypatch):
    """Every write does: of what is buffered, of a further file, of the index. Nothing is left of it."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    opened = TokenWriter._open

    def full(self, name):
        if name.startswith("train.codes" if where == "add" else "train.index"):
            os.symlink("/dev/full", os.path.join(self.partial, name))
        return opened(self, name)

    monkeypatch.setattr(TokenWriter, "_open", full)
    with pytest.raises(OSError, match="No space left") as error:
        write(tmp_path / "x", utterances(3))
    name = {"add": "train.codes.bin", "finish": "train.index.npy"}[where]
    assert error.value.filename == str(tmp_path / "x.partial" / name) and os.listdir(tmp_path) == []


def test_one_writer_at_a_time(tmp_path):
    """The second neither gets in nor removes what the first has written; after the first it may."""
    (tmp_path / "x.partial" / "old").mkdir(parents=True)
    with TokenWriter(tmp_path / "x") as out:
        out.add("train", "a", [1], [[1, 2, 3]])
        with pytest.raises(ValueError, match="x.partial is in use by another run"):
            TokenWriter(tmp_path / "x")
        out.finish(META)
        assert sorted(os.listdir(tmp_path)) == ["x"] and len(TokenFiles(tmp_path / "x", "train")) == 1
        with TokenWriter(tmp_path / "x") as again:  # the first has ended in all but name
            again.finish(META)
    assert os.listdir(tmp_path) == ["x"] and len(TokenFiles(tmp_path / "x", "train")) == 0


def test_everything_is_synchronised_before_it_is_named(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (done.append(os.readlink(f"/proc/self/fd/{f}")), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    with TokenWriter(tmp_path / "x") as out:
        out.file("codec.pt", b"codec")
        out.finish(META)
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    names = {os.path.basename(path) for path in before}
    assert names == {*os.listdir(tmp_path / "x"), "x.partial"} and after == [str(tmp_path)]


def test_a_last_utterance_that_shrank_and_a_damaged_header_are_refused(tmp_path):
    folder = write(tmp_path / "x", utterances(3))
    path = tmp_path / "x/train.index.npy"
    index, sound = np.load(path), path.read_bytes()
    for column in (1, 3):  # text ids and frames of the last one
        shorter = index.copy()
        shorter[-1, column] -= 1
        np.save(path, shorter)
        with pytest.raises(ValueError, match="fewer text ids or frames than meta.json"):
            TokenFiles(folder, "train")
    path.write_bytes(sound.replace(b"'shape': (", b"'shape': (("))
    with pytest.raises(ValueError, match="the train split is damaged"):
        TokenFiles(folder, "train")


def test_opening_reads_the_index_and_nothing_else(tmp_path):
    """200 million frames, of which the file system holds none (a sparse file) and this process reads five."""
    folder = write(tmp_path / "x", utterances(2))
    frames = 200_000_000
    os.truncate(tmp_path / "x/train.codes.bin", 2 * K * frames)
    np.save(tmp_path / "x/train.index.npy", [(0, 5, 0, 9, 0), (5, 5, 9, frames - 14, 1), (10, 5, frames - 5, 5, 1)])
    os.truncate(tmp_path / "x/train.text.bin", 30)
    meta = json.loads((tmp_path / "x/meta.json").read_text())
    meta["splits"]["train"].update(utterances=3, frames=frames, text_tokens=15)
    (tmp_path / "x/meta.json").write_text(json.dumps(meta))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files = TokenFiles(folder, "train")
    assert files.codes(2).tolist() == [[0] * K] * 5
    assert len(files.text(1)) == 5 and len(files.codes(0)) == 9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB, of 1.2 GB
    assert isinstance(files.index, np.memmap)


# ---------------------------------------------------------------------------------------------------------------------
# batches


@given(n=st.integers(1, 80), world=st.integers(1, 4), max_tokens=st.integers(78, 400), max_batch=st.integers(1, 9),
       seed=st.integers(0, 99), voice_prompt=st.sampled_from([0.0, 0.5]))  # fmt: skip
def test_ranks_divide_each_epoch(n, world, max_tokens, max_batch, seed, voice_prompt):
    """The steps of all ranks, put in order, are those of one process; in them every utterance occurs once an epoch."""
    files = lengths(n, seed)
    make = lambda **o: batches(files, max_tokens, max_batch, seed=seed, voice_prompt=voice_prompt, **o)  # noqa: E731
    alone = make()
    plans = [alone.plan(epoch)[0] for epoch in range(2)]
    for plan in plans:
        assert sorted(np.concatenate(plan)) == list(range(n))
        assert all(0 < len(batch) <= max_batch for batch in plan)
    steps = -(-sum(map(len, plans)) // world)
    ranks = [list(itertools.islice(make(rank=r, world=world), steps)) for r in range(world)]
    together = [listed(batch) for step in zip(*ranks, strict=True) for batch in step]
    assert together == [listed(batch) for batch in itertools.islice(alone, steps * world)]
    seen = [set(np.array(tokens)[..., 0][np.array(segment) == 2]) for tokens, segment in together]  # rows tell whose
    assert seen[: len(plans[0])] == [set(batch) for batch in plans[0]]
    assert all(len(segment) * len(segment[0]) <= max_tokens for _, segment in together)


def test_batch_is_padded_rows():
    files = Lengths(np.array([2, 1, 4]), np.array([3, 1, 1]))
    tokens, segment = batches(files).read([0, 1, 2])
    assert tokens.dtype == segment.dtype == torch.int64
    assert tokens[..., 0].tolist() == [[0] * 5, [1, 1, 0, 0, 0], [2] * 5]
    assert segment.tolist() == [[1, 1, 2, 2, 2], [1, 2, 0, 0, 0], [1, 1, 1, 1, 2]]
    tokens, segment = batches(files).read([0, 1], [1, -1])
    assert tokens[..., 0].tolist() == [[1, 1] + [0] * 5, [1, 1] + [0] * 5]
    assert segment.tolist() == [[3, 4, 1, 1, 2, 2, 2], [1, 2, 0, 0, 0, 0, 0]]


def test_budget_is_filled_to_the_last_row():
    files = Lengths(np.full(30, 4), np.full(30, 6))
    for max_tokens, size in ((100, 10), (99, 9), (109, 10), (10, 1)):
        assert max(len(b) for b in batches(files, max_tokens, 64).plan(0)[0]) == size


def test_epochs_differ_and_seeds_repeat():
    files = lengths(60)
    plan = lambda epoch, **o: [sorted(b.tolist()) for b in batches(files, **o).plan(epoch)[0]]  # noqa: E731
    assert plan(0) == plan(0) and plan(0, seed=1) == plan(0, seed=1)
    assert plan(0) != plan(1) and plan(0) != plan(0, seed=1)
    assert {tuple(b) for b in plan(0)} != {tuple(b) for b in plan(1)}  # other company, not only another order
    fixed = batches(files, shuffle=False)
    assert [b.tolist() for b in fixed.plan(0)[0]] == [b.tolist() for b in fixed.plan(1)[0]]
    sizes = [fixed.length(*files.index[i, [1, 3]]) for b in fixed.plan(0)[0] for i in b]
    assert sizes == sorted(sizes)


def ljspeech(n, seed=0):
    """As many utterances as LJSpeech has, of its lengths: 1.1 to 10.1 s, 6.6 s on average, leaning to the long side."""
    rng = np.random.default_rng(seed)
    seconds = np.clip(10.1 - rng.gamma(2.6, 1.35, n), 1.1, 10.1)
    assert 6.3 < seconds.mean() < 6.9
    return Lengths((seconds * 4 * rng.uniform(0.8, 1.2, n)).astype(int) + 3, (seconds * 12.5).astype(int) + 1)


@pytest.mark.parametrize("n, max_tokens, max_batch", [(13100, 8192, 64), (13100, 8192, 16), (13100, 2048, 1000),
                                                      (13100, 32768, 256), (2000, 4096, 64)])  # fmt: skip
def test_padding_on_lengths_like_ljspeech(n, max_tokens, max_batch):
    made = batches(ljspeech(n), max_tokens, max_batch)
    for epoch in range(2):
        assert 0 < made.padding(epoch) < 0.05
    plan = made.plan(0)[0]
    sizes = made._lengths()
    rows = [len(b) * sizes[b].max() for b in plan]
    assert max(rows) <= max_tokens and max(map(len, plan)) <= max_batch
    full = [r > 0.9 * max_tokens or len(b) == max_batch for r, b in zip(rows, plan, strict=True)]
    assert np.mean(full) > 0.95  # the budget is used
    used = sum(sizes) / sum(rows)
    assert abs(1 - used - made.padding()) < 1e-9


def test_padding_with_voice_prompts():
    files = ljspeech(5000)
    made = batches(files, 8192, 64, voice_prompt=0.5)
    assert made.padding() < 0.05


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_position_is_restored_exactly(workers, world):
    """From any step on, also in mid-epoch and over its end, and with loader processes that have read ahead."""
    files = lengths(40)
    options = dict(max_tokens=150, seed=3, world=world, rank=world - 1, voice_prompt=0.3)
    reference = batches(files, **options)
    per_epoch = len(reference.plan(0)[0]) // world
    assert per_epoch > 5
    expected, states = [], []
    for batch in itertools.islice(reference, 2 * per_epoch + 3):
        expected.append(listed(batch))
        states.append(json.loads(json.dumps(reference.state())))
    assert len({json.dumps(s) for s in states}) == len(states)
    for stop in [1, 3, per_epoch - 1, per_epoch, per_epoch + 1] if not workers else [3, per_epoch]:
        first = batches(files, **options, workers=workers)
        assert [listed(b) for b in itertools.islice(first, stop)] == expected[:stop]
        assert first.state() == states[stop - 1]
        second = batches(files, **options, workers=workers)
        second.restore(states[stop - 1])
        rest = [listed(b) for b in itertools.islice(second, len(expected) - stop)]
        assert rest == expected[stop:]


def with_workers(tmp_path, n=2, **options):
    """Batches of a real folder that two workers read, and how many batches an epoch has."""
    made = batches(TokenFiles(write(tmp_path / "x", utterances(60)), "train"), workers=n, **options)
    return made, len(made.plan(0)[0])


@pytest.mark.parametrize("error", [ValueError("a clear line"), FileNotFoundError(2, "No such", "x"), MemoryError()])
def test_an_error_of_a_worker_is_raised_as_it_is(tmp_path, error):
    made, n = with_workers(tmp_path)
    arrays, calls = made._arrays, itertools.count()

    def wrong(*task):
        if next(calls) == 2:
            raise error
        return arrays(*task)

    made._arrays = wrong
    seen = []
    with pytest.raises(type(error)) as raised:
        seen += map(listed, made)
    assert str(raised.value) == str(error) and len(seen) == 4  # two of each worker
    assert not multiprocessing.active_children()


def test_a_fault_of_a_worker_shows_where_it_is(tmp_path):
    made, _ = with_workers(tmp_path)
    made._arrays = lambda *task: {}["a fault of the program"]
    with pytest.raises(RuntimeError, match="(?s)Traceback.*KeyError: 'a fault of the program'"):
        next(iter(made))


def test_a_worker_that_dies_or_stands_still_is_one_line(tmp_path, monkeypatch):
    made, _ = with_workers(tmp_path)
    stream = iter(made)
    next(stream)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ValueError, match="a loader worker died .exit code -9.*fewer loader_workers") as error:
        list(stream)
    assert "\n" not in str(error.value) and not multiprocessing.active_children()
    monkeypatch.setattr(workers, "PATIENCE", 0.1)
    made._arrays = lambda *task: time.sleep(60)
    with pytest.raises(ValueError, match="a loader worker has sent nothing for 0.1 s.*loader_workers=0"):
        next(iter(made))
    assert not multiprocessing.active_children()


def runs(pid):
    """Is there such a process, and is it not dead and only waited for?"""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


LEFT = """
import multiprocessing, sys
from model import CSMConfig
from data import Batches, TokenFiles
csm = CSMConfig(60000, 3, 1024, "llama-60M", decoder="llama-60M")
stream = iter(Batches(TokenFiles(sys.argv[1], "train"), csm.layout, csm.length, 300, 8, workers=2))
next(stream)
print(*(w.pid for w in multiprocessing.active_children()), flush=True)
try:
    raise KeyError("has a traceback, which keeps the stream")
except KeyError as error:
    raise RuntimeError from error
"""


def test_workers_end_with_a_process_that_fails(tmp_path):
    folder = write(tmp_path / "x", utterances(60))
    done = subprocess.run([sys.executable, "-c", LEFT, folder], capture_output=True, text=True, timeout=60,
                          cwd=os.path.dirname(data.__file__))  # fmt: skip
    assert done.returncode == 1 and "RuntimeError" in done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2 and not any(map(runs, pids))


def test_workers_end_with_a_process_that_is_killed_and_keep_no_lock(tmp_path):
    made, _ = with_workers(tmp_path)
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        with locked(tmp_path / "out"):
            stream = iter(made)
            next(stream)
            os.write(theirs, " ".join(str(w.pid) for w in multiprocessing.active_children()).encode())
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path / "out"):  # at once
        pass
    pids = [int(pid) for pid in os.read(ours, 100).split()]
    while any(map(runs, pids)):
        time.sleep(0.01)
    assert len(pids) == 2


def test_workers_need_no_shared_memory_and_can_be_made_from_a_pickle(tmp_path, monkeypatch):
    """A container has 64 MB of /dev/shm. Systems that do not fork give the worker a pickle, without data or weights."""
    import model

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", full)
    monkeypatch.setattr("torch.UntypedStorage._share_filename_cpu_", full)
    monkeypatch.setattr("torch.UntypedStorage._share_fd_cpu_", full)
    csm = model.CSMConfig(60000, K, 1024, "llama-60M", decoder="llama-60M", text_bos=1, text_eos=2)
    files = TokenFiles(write(tmp_path / "x", utterances(60)), "train")
    alone = Batches(files, csm.layout, csm.length, 300, 8)
    made = Batches(files, csm.layout, csm.length, 300, 8, workers=2)
    expected = [listed(b) for b in itertools.islice(alone, 5)]
    assert [listed(b) for b in itertools.islice(made, 5)] == expected
    made.restore({"epoch": 0, "batch": 0})
    pickled = pickle.dumps(made)
    assert len(pickled) < 10_000
    made = pickle.loads(pickled)
    made.workers = 0
    assert [listed(b) for b in itertools.islice(made, 5)] == expected


def test_files_cut_short_meanwhile_are_one_line(tmp_path):
    folder, _ = with_references(tmp_path / "t")
    for name, read in (("codes", "codes"), ("text", "text"), ("reference", "reference")):
        files = TokenFiles(folder, "train")
        whole = getattr(files, read)(11)
        path = tmp_path / "t" / f"train.{name}.bin"
        size = path.stat().st_size
        for left in (0, size - 1):
            os.truncate(path, left)
            with pytest.raises(ValueError, match="train split is damaged .in its utterance 11"):
                getattr(files, read)(11)
        os.truncate(path, size)
        assert getattr(files, read)(11).shape == whole.shape


def test_a_fingerprint_tells_the_utterances_of_two_folders_apart(tmp_path):
    train, val = utterances(9), utterances(3, 1)
    prints = [data.fingerprint(write(tmp_path / str(i), *parts)) for i, parts in enumerate([
        (train, val), (train, val), (train[:-1], val), (train, val[:-1]), (val, train),
        ([("another", *train[0][1:]), *train[1:]], val), ([(*train[0][:3], 1 - train[0][3]), *train[1:]], val),
    ])]  # fmt: skip
    assert prints[0] == prints[1] and len(set(prints)) == 6


# ---------------------------------------------------------------------------------------------------------------------
# several token folders


def named(name, n, seed):
    return [(f"{name}{i}", *u[1:]) for i, u in enumerate(utterances(n, seed))]


def test_several_folders_are_read_as_one(tmp_path):
    content = {"new": named("n", 9, 0), "old": named("o", 5, 1)}
    for (name, train), speakers in zip(content.items(), (["ann", "bob"], ["cid", "ann"]), strict=True):
        write(tmp_path / name / "tokens", train, meta={**META, "speakers": speakers})
    folders = {str(tmp_path / name / "tokens"): weight for name, weight in (("new", 2.0), ("old", 1.0))}
    files = data.open_tokens(folders, "train")
    parts = [TokenFiles(folder, "train") for folder in folders]
    assert len(files) == 14 and files.meta["speakers"] == ["ann", "bob", "cid"]
    assert files.meta["splits"]["train"]["frames"] == sum(part.meta["splits"]["train"]["frames"] for part in parts)
    for read in (files, pickle.loads(pickle.dumps(files))):
        for i in range(14):
            part, j = (parts[0], i) if i < 9 else (parts[1], i - 9)
            assert read.name(i) == part.name(j)
            np.testing.assert_array_equal(read.text(i), part.text(j))
            np.testing.assert_array_equal(read.codes(i), part.codes(j))
            assert read.meta["speakers"][read.speaker(i)] == part.meta["speakers"][part.speaker(j)]
    assert data.part_names(files) == ["new", "old"]
    assert parts[1].index[:, 4].max() <= 1  # the part itself is left alone
    plan, _ = batches(files, shuffle=False).plan(0)
    assert sorted(np.concatenate(plan)) == list(range(14))
    assert all(b.max() < 9 or b.min() >= 9 for b in plan)


def test_weights_say_how_often_an_epoch_takes_an_utterance():
    files = lengths(400)
    files.weights = np.repeat([3.0, 1.0, 0.25], [100, 100, 200])
    made = batches(files, seed=5)
    counts = [np.bincount(np.concatenate(made.plan(epoch)[0]), minlength=400) for epoch in range(20)]
    for count in counts:
        assert (count[:100] == 3).all() and (count[100:200] == 1).all() and set(count[200:]) == {0, 1}
    assert np.mean([count[200:].sum() for count in counts]) == pytest.approx(50, abs=5)
    assert any((counts[0] != count).any() for count in counts)  # another quarter in each epoch
    again = batches(files, seed=5).plan(7)[0]
    assert all(np.array_equal(a, b) for a, b in zip(made.plan(7)[0], again, strict=True))
    once = batches(files, shuffle=False).plan(0)[0]
    assert sorted(np.concatenate(once)) == list(range(400))  # evaluation knows no weights


@pytest.mark.parametrize("data_dir, folders", [
    ("x/tokens", {"x/tokens": 1}), ("x:3, y", {"x": 3, "y": 1}), ("x:0.5,y:1.5", {"x": 0.5, "y": 1.5}),
    ({"x": 2, "y": 0.25}, {"x": 2, "y": 0.25}), ("C:/x", {"C:/x": 1}),
])  # fmt: skip
def test_how_folders_are_named(data_dir, folders):
    assert data.token_folders(data_dir) == folders


@pytest.mark.parametrize("data_dir", ["x:0.5", "x:0,y:0.9", {}, {"x": "much"}, {"x": -1, "y": 1}, "x:1.2.3"])
def test_weights_that_cannot_be(data_dir):
    with pytest.raises(ValueError, match="give each folder a weight, at least one of them 1 or more"):
        data.token_folders(data_dir)


def test_a_folder_is_named_once():
    with pytest.raises(ValueError, match="names 'x' twice: give it a weight, as x:2"):
        data.token_folders("x,y,x")


@pytest.mark.parametrize("field, key, value", [
    ("codec", "fingerprint", "1"), ("tokenizer", "sha256", "1"), ("lowercase", "", True), ("front_end", "", "none"),
])  # fmt: skip
def test_folders_that_do_not_go_together_are_refused_by_name(tmp_path, field, key, value):
    write(tmp_path / "a", utterances(3))
    other = {**META, field: {**META.get(field, {}), key: value} if key else value}
    write(tmp_path / "b", utterances(3), meta=other)
    with pytest.raises(ValueError, match=f"b and .*/a differ in {f'{field} {key}'.strip()}: prepare one of them again"):
        data.open_tokens(f"{tmp_path}/a,{tmp_path}/b", "train")


def test_the_fingerprint_of_several_folders_has_their_weights(tmp_path):
    for name in "ab":
        write(tmp_path / name, named(name, 5, 0))
    one, two = str(tmp_path / "a"), str(tmp_path / "b")
    kinds = [one, two, f"{one},{two}", f"{two},{one}", f"{one}:2,{two}", f"{one}:2"]
    assert len({data.fingerprint(kind) for kind in kinds}) == len(kinds)
    assert data.fingerprint(f"{one}:1") == data.fingerprint({one: 1}) == data.fingerprint(one)


def test_the_loader_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    list(itertools.islice(batches(lengths(20)), 5))
    assert torch.equal(before, torch.get_rng_state())


def test_too_long_and_empty(tmp_path):
    long = ("the long one", [1] * 50, [[1, 2, 3]] * 60, 0)
    files = TokenFiles(write(tmp_path / "x", [*utterances(3), long]), "train")
    with pytest.raises(ValueError, match="utterance the long one of .*x needs 110 rows, more than max_tokens = 109"):
        batches(files, max_tokens=109)
    batches(files, max_tokens=110, max_rows=110)
    with pytest.raises(ValueError, match="utterance the long one of .*x needs 110 rows, the model has 109 positions"):
        batches(files, max_rows=109)
    with pytest.raises(ValueError, match="x: the val split is empty"):
        batches(TokenFiles(tmp_path / "x", "val"))


def test_voice_prompts():
    files = lengths(200)
    made = batches(files, voice_prompt=0.5, seed=2)
    speaker = files.index[:, 4]
    for epoch in range(3):
        plan, prompts = made.plan(epoch)
        has = prompts >= 0
        assert 0.4 < has.mean() < 0.6
        assert (speaker[prompts[has]] == speaker[has]).all() and (prompts != np.arange(200)).all()
        again = batches(files, voice_prompt=0.5, seed=2).plan(epoch)
        assert np.array_equal(prompts, again[1])
    assert not np.array_equal(made.plan(0)[1], made.plan(1)[1])
    every = batches(files, voice_prompt=1.0)
    assert (every.plan(0)[1] >= 0).mean() > 0.9
    for tokens, segment in itertools.islice(every, 10):
        for row, kind in zip(tokens[..., 0], segment, strict=True):
            own, others = set(row[(kind == 1) | (kind == 2)].tolist()), set(row[kind >= 3].tolist())
            assert len(own) == 1 and len(others) <= 1 and not own & others
    assert (batches(files, voice_prompt=0.5, shuffle=False).plan(0)[1] == -1).all()
    alone = Lengths(np.full(5, 9), np.full(5, 9), np.arange(5))
    assert (batches(alone, voice_prompt=1.0).plan(0)[1] == -1).all()  # a speaker of one utterance has no prompt
    tight = batches(Lengths(np.full(9, 9), np.full(9, 9)), max_tokens=35, voice_prompt=1.0)
    assert (tight.plan(0)[1] == -1).all()  # none that would not fit
    tight = batches(Lengths(np.full(9, 9), np.full(9, 9)), max_rows=35, voice_prompt=1.0)
    assert (tight.plan(0)[1] == -1).all()


# ---------------------------------------------------------------------------------------------------------------------
# references


def with_references(folder, n=12, r=2, M=5):
    """A token folder whose features say where they come from: utterance, frame, row of the frame, speaker."""
    train = []
    for i, (name, text, codes, speaker) in enumerate(utterances(n, 3)):
        frame, row = np.divmod(np.arange(len(codes) * r), r)
        marks = np.stack([np.full(len(frame), i), frame, row, np.full(len(frame), speaker), 0 * frame], 1)
        train.append((name, text, codes, speaker, marks))
    codec = {**META["codec"], "reference": {"rows_per_frame": r, "silence": [-1.0] * M}}
    return write(folder, train, train[:4], {**META, "codec": codec}, references="recording"), train


def frames_layout(text, codes, prompt=None):
    """Rows as models have them: text, frames that are targets."""
    kinds = np.concatenate([np.full(len(text), 1), np.full(len(codes), data.AUDIO)])
    return np.concatenate([text, codes[:, 0]])[:, None], kinds


@pytest.mark.parametrize("voice_prompt", [0.0, 0.5, 1.0])
def test_references(tmp_path, voice_prompt):
    """A stretch of the prompt's recording, or of one's own, of which nothing is then a target."""
    folder, train = with_references(tmp_path / "t")
    files = TokenFiles(folder, "train")
    assert np.array_equal(files.reference(3), train[3][4])
    assert np.array_equal(files.reference(3, 1, 2), train[3][4][2:4])
    batches = Batches(files, frames_layout, length, 400, 8, seed=5, voice_prompt=voice_prompt, reference=(3, 6))
    own, sizes = [], set()
    for _, (tokens, segment, reference) in zip(range(40), batches, strict=False):
        assert reference.shape == (len(tokens), 12, 5) and reference.dtype == torch.float32
        for t, s, heard in zip(tokens, segment, reference, strict=True):
            heard = heard[heard[:, 4] == 0].int()  # the rest is silence
            if not len(heard):  # the half of one frame
                assert (s == data.AUDIO).sum() == 1
                continue
            i, first, n = int(heard[0, 0]), int(heard[0, 1]), len(heard) // 2
            assert torch.equal(heard[:, :3], torch.from_numpy(train[i][4][2 * first : 2 * (first + n), :3]).int())
            sizes.add(n)
            audio = (s == data.AUDIO) | (s == data.PROMPT)
            itself = audio.sum() == len(train[i][2]) and torch.equal(t[audio, 0], torch.from_numpy(train[i][2][:, 0]))
            most = len(train[i][2]) // (1 + itself)  # all of a prompt, half of itself
            assert 3 <= n <= min(6, most) or n == most < 6
            hidden = (s[audio] == data.PROMPT).nonzero()[:, 0].tolist()
            assert hidden == (list(range(first, first + n)) if itself else [])
            own.append(bool(itself))
    assert len(sizes) > 2
    low, high = {0.0: (1, 1), 0.5: (0.4, 0.8), 1.0: (0, 0.3)}[voice_prompt]  # who draws himself has no prompt
    assert low <= np.mean(own) <= high


def test_short_clips_are_learnt_too(tmp_path):
    """Clips of 0.7 to 2.5 s and stretches of 3 to 6 s, at 20 frames a second: at most half of a clip is only heard."""
    import model

    rng, marks = np.random.default_rng(0), np.zeros((1000, 5))
    codes = [rng.integers(0, 99, (n, 1)) for n in (1, 2, 3, *rng.integers(14, 51, 40))]
    codec = {**META["codec"], "n_codebooks": 1, "reference": {"rows_per_frame": 2, "silence": [-1.0] * 5}}
    train = [(f"u{i}", [1, 2], c, 0, marks[: 2 * len(c)]) for i, c in enumerate(codes)]
    files = TokenFiles(write(tmp_path / "t", train, meta={**META, "codec": codec}, references="recording"), "train")
    xtts = model.XTTSConfig(9, 99, "llama-60M", 1, 2)
    made = Batches(files, xtts.layout, xtts.length, 4000, 9, reference=(60, 120))
    stops = xtts.STOPS
    for b, batch in zip(made.plan(0)[0], made, strict=False):
        targets = (batch[1] == data.AUDIO).sum(1).numpy() - stops
        assert (2 * targets >= files.index[b, 3]).all() and (targets >= 1).all()
    assert 0.5 <= made.targets() < 0.55
    made._stretch = lambda i, p, epoch: (data.silence(files.meta, 120), slice(0, files.index[i, 3] - 1))
    assert made.targets() == pytest.approx(43 / files.index[:, 3].sum())
    plain = Batches(files, xtts.layout, xtts.length, 4000, 9, reference=(60, 120), voice_prompt=1.0)
    assert plain.targets() > 0.95  # but for who draws himself as his prompt


def test_frames_that_the_layout_leaves_out_are_no_targets(tmp_path):
    import model

    codes = np.repeat(np.arange(10), 4)[:, None] + np.arange(K)
    files = TokenFiles(write(tmp_path / "t", [("u", [1, 2], codes, 0)]), "train")
    for drop, share in ((False, 1.0), (True, 0.25)):
        kani = model.KaniConfig(9, K, 99, "llama-60M", drop_repeats=drop)
        assert Batches(files, kani.layout, kani.length, 4000, 9).targets() == share


def test_references_are_the_same_again_and_in_evaluation(tmp_path):
    folder, train = with_references(tmp_path / "t")
    files = TokenFiles(folder, "train")

    def some(epoch):
        batches = Batches(files, frames_layout, length, 400, 8, seed=5, reference=(3, 6))
        batches.restore({"epoch": epoch, "batch": 0})
        return next(iter(batches))

    assert all(torch.equal(a, b) for a, b in zip(some(0), some(0), strict=True))
    once = Batches(files, frames_layout, length, 400, 8, shuffle=False, reference=(3, 6))
    plan, _ = once.plan(0)
    for b in plan:
        _, segment, reference = once.read(b)
        assert not (segment == data.PROMPT).any()
        for i, heard in zip(b, reference, strict=True):
            j = int(heard[0, 0])
            assert j != i and train[j][3] == train[i][3] and heard[0, 1] == 0  # another one of the speaker


def test_a_speaker_reference_is_long_enough_or_the_longest(tmp_path):
    folder, train = with_references(tmp_path / "t")
    files = TokenFiles(folder, "train")
    for speaker in (0, 1):
        theirs = [u[2] for u in train if u[3] == speaker]
        for frames in (4, 500):
            reference = data.speaker_reference(files, speaker, frames)
            assert reference.shape == (2 * frames, 5)
            n = int((reference[:, 4] == 0).sum()) // 2
            assert n == min(frames, max(map(len, theirs))) and reference[0, 3] == speaker


def test_a_folder_without_references_is_refused(tmp_path):
    files = TokenFiles(write(tmp_path / "t", utterances(3)), "train")
    with pytest.raises(ValueError, match="make it again with prepare.py --references=True"):
        Batches(files, layout, length, 400, 8, reference=(3, 6))
    folder, _ = with_references(tmp_path / "r")
    with open(f"{folder}/train.reference.bin", "ab") as f:
        f.write(b"xx")
    with pytest.raises(ValueError, match="train.reference.bin has .* bytes"):
        TokenFiles(folder, "train")


def test_rows_of_the_model(tmp_path):
    """With the CSM's own layout and length: the number of rows is what was counted."""
    import model

    csm = model.CSMConfig(60000, K, 1024, "llama-60M", decoder="llama-60M", text_bos=1, text_eos=2)
    files = TokenFiles(write(tmp_path / "x", utterances(30)), "train")
    made = Batches(files, csm.layout, csm.length, 400, 8, voice_prompt=0.5)
    plan, prompts = made.plan(0)
    counted = made._lengths(prompts)
    for b, (tokens, segment) in zip(plan, made, strict=False):
        assert (segment != 0).sum(1).tolist() == counted[b].tolist() and tokens.shape == (*segment.shape, K + 1)


# ---------------------------------------------------------------------------------------------------------------------
# text


@pytest.fixture(scope="module")
def tokenizer():
    texts = [f"[{s}]{t}" for s in ("slt", "ann b.") for t in ("one two three", "three two one", "nine one one")]
    return load_tokenizer("sentencepiece", train_tokenizer(texts * 5, 300, symbols=["[slt]", "[ann b.]"]))


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="▁"), max_size=30).map(normalise))
def test_any_text_survives_in_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.unknown(text) == set()
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_what_a_text_format_fills_in():
    words = {"speaker": "{0}", "text": "a {text} b }", "language": "am"}
    assert wording("[{speaker}] {text}", **words) == "[{0}] a {text} b }"
    assert wording("{{x}}[{language}]{text}", **words) == "{x}[am]a {text} b }"
    with pytest.raises(ValueError, match="give the language"):
        wording("[{language}]{text}", text="x")


@pytest.mark.parametrize("text_format", [
    "", "no text", "{text}{text}", "{txt}{text}", "{text!r}", "{text:>2000000000}", "{text:{speaker}}", "{", "{text}}",
    "{}{text}", "{0}{text}", "{speaker.__class__.__mro__}{text}", "{speaker[0]}{text}", "{text}\0", None, ["{text}"],
])  # fmt: skip
def test_what_no_text_format_is(text_format):
    with pytest.raises(ValueError, match="text_format = .*takes {text} once") as error:
        wording(text_format, "s", "x", "en")
    assert len(str(error.value)) < 400


def test_speaker_tags_are_single_tokens(tokenizer):
    slt, ann = tokenizer.encode("[slt]"), tokenizer.encode("[ann b.]")
    assert len(slt) == len(ann) == 1
    ids = tokenizer.encode("[slt]one [ann b.]two")
    assert [i for i in ids if [i] in (slt, ann)] == slt + ann
    assert tokenizer.decode(ids) == "[slt]one [ann b.]two"
    assert len(tokenizer.encode("[slt]one two three")) < 10
    assert tokenizer.bos_id == 1 and tokenizer.eos_id == 2 and 1 not in ids and 2 not in ids


def test_tokenizer_training_is_deterministic_and_bounded():
    texts = ["one two three", "three four five"] * 20
    assert train_tokenizer(texts, 290) == train_tokenizer(texts, 290)
    assert load_tokenizer("sentencepiece", train_tokenizer(texts, 275)).vocab_size == 275
    assert load_tokenizer("sentencepiece", train_tokenizer(texts, 50_000)).vocab_size < 400
    with pytest.raises(ValueError, match="vocab_size = 20 is too small: bytes, characters and speaker tags alone need"):
        train_tokenizer(texts, 20)
    with pytest.raises(ValueError, match="no tokenizer could be trained") as error:
        train_tokenizer([], 300)
    assert "\n" not in str(error.value)


def test_tokenizer_without_bytes_names_what_it_lacks(tmp_path):
    import sentencepiece

    (tmp_path / "t").write_text("one two three\n" * 9)
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "t"), model_prefix=str(tmp_path / "m"),
                                             model_type="char", vocab_size=12, minloglevel=2)  # fmt: skip
    tokenizer = load_tokenizer("sentencepiece", (tmp_path / "m.model").read_bytes())
    assert tokenizer.unknown("one zq two!") == {"z", "q", "!"} and tokenizer.unknown("three") == set()


def test_tokenizers_that_are_none():
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        load_tokenizer("sentencepiece", b"hello")
    for junk in (b"hello", b"{}", b'{"a": 0, "b": 1}', b"\xff"):
        with pytest.raises(ValueError, match="not a tokenizer.json"):
            load_tokenizer("tokenizers", junk)
    with pytest.raises(ValueError, match="unknown tokenizer kind 'bpe'"):
        load_tokenizer("bpe", b"")


def test_a_tokenizer_json_of_a_tokenizer_trained_here():
    """Its ids are those of sentencepiece, also around symbols and for characters that are bytes, with the marks."""
    words = ["the", "three", "thieves", "threw", "two", "tomes", "into", "hello,", "there;", "ünïcode", "zero", "one"]
    tokenizer = SentencePiece(train_tokenizer([" ".join(words)] * 3 + ["[a][b]"], 400, ["[a]", "[b]", "[c d]"]))
    fast = tokenizers.Tokenizer.from_buffer(fast_tokenizer(tokenizer))
    assert fast.get_vocab_size() == tokenizer.vocab_size
    rng = random.Random(0)
    for i in range(300):
        letters = "".join(words) + "xyzß日😀[]"
        some = [rng.choice(words) if i % 2 else "".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(5)]
        text = rng.choice(["", "[a]", "[c d]", "[b] "]) + " ".join(some)
        ids = tokenizer.encode(text)
        assert fast.encode(text).ids == [tokenizer.bos_id, *ids, tokenizer.eos_id]
        assert fast.decode(ids, skip_special_tokens=False) == text
    with pytest.raises(ValueError, match="it is no BPE without normalisation"):
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(words), model_writer=out, vocab_size=30,
                                                 minloglevel=2)  # fmt: skip
        fast_tokenizer(SentencePiece(out.getvalue()))


def test_tokenizer_describes_itself(tokenizer, xtts):
    for made in (tokenizer, xtts):
        said = made.describe()
        assert said["vocab_size"] == made.vocab_size
        assert said["sha256"] == hashlib.sha256(made.model).hexdigest()
        assert set(said) == {"kind", "file", "sha256", "vocab_size", "bos_id", "eos_id"}
        assert load_tokenizer(said["kind"], made.model).encode("one") == made.encode("one")


LATIN = "abcdefghijklmnopqrstuvwxyz'.,!?"
ENGLISH = ["the other mother", "there, in the north!", "another one", "is this the thing? yes.", "'tis nothing"] * 3
AMHARIC = ["ሰላም ለዓለም ሁሉ", "ሰላም ነው፡ እንዴት ነህ", "ዓለም አቀፍ ቋንቋ ነው።", "እንዴት ነው ዓለም the one", "ቋንቋ ሰላም ነው"] * 3


def bpe(special, alphabet, **parts):
    """A tokenizer.json as a dict: a BPE trained on English, with special tokens first and the other parts as given."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]" if "[UNK]" in special else None))
    for name, part in parts.items():
        setattr(model, name, part)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet,
                                             show_progress=False)  # fmt: skip
    model.train_from_iterator(ENGLISH, trainer)
    return json.loads(model.to_str())


def xtts_like(merges=list):
    """A vocabulary laid out as XTTS's: [START] far from the others, spaces lost but for their token, no decoder."""
    special = ["[STOP]", "[UNK]", "[SPACE]", "[en]", "[START]"]
    spec = bpe(special, list(LATIN), pre_tokenizer=tokenizers.pre_tokenizers.Whitespace())
    spec["model"]["vocab"]["[START]"] = spec["added_tokens"][4]["id"] = 261
    spec["model"]["merges"] = [merges(pair) for pair in spec["model"]["merges"]]
    return json.dumps(spec).encode()


@pytest.fixture(scope="module")
def xtts():
    return load_tokenizer("tokenizers", xtts_like())


@pytest.fixture(scope="module", params=[list, " ".join], ids=["pairs", "strings"])
def amharic(request):
    """The extended vocabulary, where merges are stored as either way has it."""
    tokenizer = load_tokenizer("tokenizers", xtts_like(request.param))
    return load_tokenizer("tokenizers", extend_tokenizer(tokenizer, AMHARIC, 540, ["[am]", "[en]"]))


def test_xtts_vocabulary(xtts):
    ids = xtts.encode("[en]the other one")
    pieces = [xtts.processor.id_to_token(i) for i in ids]
    assert pieces[:4] == ["[en]", "the", "[SPACE]", "other"] and ids[:3:2] == [3, 2] and "".join(pieces[5:]) == "one"
    assert (xtts.bos_id, xtts.eos_id, xtts.unk_id, xtts.vocab_size) == (261, 0, 1, 262)
    assert xtts.decode(np.array(ids)) == "[en]the other one" and xtts.decode([200, 261]) == "[START]"
    assert xtts.unknown("One ☃ of [en]") == {"O", "☃", "[", "]"}


@given(st.text(LATIN + " ").map(normalise))
def test_extension_leaves_what_was_known(xtts, amharic, text):
    ids = xtts.encode(f"[en]{text}")
    assert amharic.encode(f"[en]{text}") == ids
    assert xtts.decode(ids) == amharic.decode(ids) == f"[en]{text}"


ETHIOPIC = "".join(chr(c) for c in range(0x1200, 0x1380) if unicodedata.category(chr(c)) != "Cn")


@given(st.text([*ETHIOPIC, *" abc"]).map(normalise))
def test_extension_knows_the_whole_script(xtts, amharic, text):
    ids = amharic.encode(f"[am]{text}")  # such as no text has, too
    assert not amharic.unknown(text) and amharic.unk_id not in ids and max(ids) < amharic.vocab_size
    assert ids[0] == xtts.vocab_size and amharic.decode(ids) == f"[am]{text}"


@pytest.mark.parametrize("text, first, last", [
    ("ሰላም", 0x1200, 0x1380), ("नमस्ते", 0x900, 0x980), ("გამარჯობა", 0x10A0, 0x1100),
])  # fmt: skip
def test_extension_knows_letters_marks_digits_and_punctuation(xtts, text, first, last):
    """All assigned characters of a block."""
    block = [chr(c) for c in range(first, last) if unicodedata.category(chr(c)) != "Cn"]
    new = load_tokenizer("tokenizers", extend_tokenizer(xtts, [text], 1000))
    assert len(block) > 80 and new.unknown("".join(block)) == set()
    assert xtts.unknown("".join(block)) == set(block)


def test_extension_is_learnt(xtts, amharic):
    assert {piece: i for piece, i in amharic.vocab.items() if i < 262} == xtts.vocab
    assert sorted(i for i in amharic.vocab.values() if i > 261) == list(range(262, amharic.vocab_size))
    ids = amharic.encode("ሰላም ነው።")
    assert [amharic.processor.id_to_token(i) for i in ids] == ["ሰላም", "[SPACE]", "ነው", "።"]
    for text in AMHARIC:
        assert amharic.decode(amharic.encode(text)) == text and xtts.unk_id in xtts.encode(text)
    again = load_tokenizer("tokenizers", xtts.model)
    model = extend_tokenizer(again, AMHARIC, 530, ["[am]"])
    assert model == extend_tokenizer(xtts, AMHARIC, 530, ["[am]"])
    assert load_tokenizer("tokenizers", model).vocab_size == 262 + 530
    han = load_tokenizer("tokenizers", extend_tokenizer(xtts, ["漢字 漢字 か"], 200))
    assert not han.unknown("漢字漢か") and len(han.encode("漢字")) == 1
    assert han.unknown("語きけ") == {"語"}  # of syllables all, of Han those seen alone
    russian = load_tokenizer("tokenizers", json.dumps(bpe(["[UNK]"], ["ж", "и"])).encode())
    assert load_tokenizer("tokenizers", extend_tokenizer(russian, ["є"], 50)).vocab_size == russian.vocab_size + 1


def test_extension_refuses(xtts, tokenizer):
    with pytest.raises(ValueError, match=r"extend_vocab = 100 is too small: (\d+) characters and 1 tags alone need"):
        extend_tokenizer(xtts, AMHARIC, 100, ["[am]", "[en]"])
    with pytest.raises(ValueError, match="knows all characters of the texts"):
        extend_tokenizer(xtts, ENGLISH, 100)


BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
BYTE_LEVEL = dict(pre_tokenizer=tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
                  decoder=tokenizers.decoders.ByteLevel())  # fmt: skip


@pytest.mark.parametrize("special, template, ends", [
    (["<|begin_of_text|>", "<|end_of_text|>"], "<|begin_of_text|> $A", (0, 1)),  # Llama 3
    (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "", (1, 2)),  # SmolLM2
    (["<p>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|startoftext|> $A", (1, 2)),  # LFM2
    (["<unk>", "<bos>", "</eos>"], "<bos> $A </eos>", (1, 2)),  # VALL-E
    (["<x>"], "", (-1, -1)),
])  # fmt: skip
def test_begin_and_end(special, template, ends):
    parts = dict(BYTE_LEVEL)
    if template:
        names = [(name, special.index(name)) for name in template.split() if name != "$A"]
        parts["post_processor"] = tokenizers.processors.TemplateProcessing(single=template, special_tokens=names)
    spec = bpe(special, BYTES, **parts)
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 1000, "content": "<late>"})
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                       "pad_type_id": 0, "pad_token": special[0]}  # fmt: skip
    made = load_tokenizer("tokenizers", json.dumps(spec).encode())
    assert (made.bos_id, made.eos_id) == ends
    ids = made.encode("is this the thing, mother?")
    assert not {0, 1, 2} & set(ids) and made.decode(ids) == "is this the thing, mother?"
    assert made.decode([0]) == special[0]
    assert made.vocab_size > max(made.encode("<late>")) and made.vocab_size == max(made.vocab.values()) + 1


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30).map(normalise))
def test_any_text_survives_byte_level(text):
    made = byte_level()
    assert made.decode(made.encode(text)) == text and made.unknown(text) == set() and made.unk_id == -1


@lru_cache
def byte_level():
    return load_tokenizer("tokenizers", json.dumps(bpe(["<x>"], BYTES, **BYTE_LEVEL)).encode())


def test_a_model_that_drops_what_it_does_not_know():
    made = load_tokenizer("tokenizers", json.dumps(bpe(["[PAD]"], list(LATIN))).encode())
    assert made.encode("☃") == [] and made.unknown("o☃e ") == {"☃"}


def test_pieces_that_share_an_id():
    spec = bpe(["<x>"], list(LATIN), decoder=BYTE_LEVEL["decoder"])  # as VALL-E's: its pieces are no bytes after all
    spec["model"]["vocab"] |= {c: spec["model"]["vocab"]["z"] for c in "žźżð"}
    for _ in range(5):  # the package would show any of them
        made = load_tokenizer("tokenizers", json.dumps(spec).encode())
        assert made.encode("ž") == made.encode("z") and made.decode(made.encode("žoð")) == "zoz"


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        load_tokenizer("tokenizers", b"{}")


@pytest.mark.parametrize("text, expected", [
    ("  a \t b\n\nc ", "a b c"), ("cafe\u0301", "caf\u00e9"), ("\ufeffone\0", "one"), ("a\u00a0\u2009b", "a b"),
    (" \u3000\n", ""), ("\ufeff a", "a"), ("Éa", "Éa"),
    ("a \ud83d b\ude00", "a b"), ("\ud83d\ude00", "\U0001f600"), ("\ud83d\ufeff\ude00a\ud83d", "\U0001f600a"),
])  # fmt: skip
def test_normalise(text, expected):
    assert normalise(text) == expected


@given(st.text(max_size=40) | st.text(st.characters(categories=["Cs", "L"]), max_size=9), st.booleans())
def test_normalise_is_stable(text, lowercase):
    once = normalise(text, lowercase)
    once.encode()
    assert normalise(once, lowercase) == once
    assert normalise(f" {text} ", lowercase) == once

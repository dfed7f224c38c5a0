"""Token files on disk <-> batches.

- Opening a token folder of millions of utterances costs nothing: its index is memory-mapped. It is written
  under a temporary name and renamed when whole, so a folder that can be opened is a folder that was finished.
- Batches are filled to a budget of rows from buckets of like length, shuffled anew each epoch by seed.
- The order of batches is one global list, a pure function of (seed, epoch): rank r of W takes every W-th of it, so any
  number of ranks sees the same epoch divided without overlap, and the whole position is two integers, epoch and batch.
- What a row means is the architecture's affair: its `layout` makes the rows, here they are only padded and stacked.

Letters in shapes: B batch, S rows (padded length), C columns, K codebooks, T frames, n text ids.
"""

import atexit
import contextlib
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tokenize
import traceback
from functools import partial

import numpy as np
import torch

from parts.files import let_go, locked, need
from parts.text import load_tokenizer

VERSION = 1
SPLITS = ("train", "val")
TIMBRES = "timbres.npy"
AUDIO, PROMPT = 3, 2  # of model.py's kinds of rows: frames to predict, frames that are only heard
INDEX_COLUMNS = ("text_start", "text_length", "first_frame", "frames", "speaker")
PATIENCE = 300  # seconds that a loader worker may take for a batch


def is_count(x, least=0):
    return type(x) is int and least <= x < 2**48


def is_rate(x):
    return type(x) in (int, float) and 0 < x < 10**9


def is_level(x):
    return type(x) in (int, float) and -(10**9) < x < 10**9


# What meta.json says, as `need` reads it: of a model's data (a checkpoint has that too), and of the files
COUNTS = dict.fromkeys(("utterances", "text_tokens", "frames"), is_count)
MODEL_META = {
    "codec": {
        "name": str, "fingerprint": str, "sample_rate": is_rate, "frame_rate": is_rate,
        "n_codebooks": lambda x: is_count(x, 1), "codebook_size": lambda x: is_count(x, 1),
        "reference?": {
            "rows_per_frame": lambda x: is_count(x, 1),
            "silence": lambda x: isinstance(x, list) and len(x) > 0 and all(map(is_level, x)),
        },
    },
    "tokenizer": {"kind": str, "sha256": str, "vocab_size": lambda x: is_count(x, 1), "bos_id": int, "eos_id": int,
                  "file": lambda x: x in ("tokenizer.model", "tokenizer.json")},
    "text_format": str, "lowercase": bool, "splits": {"train": COUNTS},
    "speakers": lambda x: isinstance(x, list) and len(x) > 0 and all(isinstance(name, str) for name in x),
}  # fmt: skip
META = {**MODEL_META, "text_dtype": lambda x: x in ("uint16", "uint32"), "splits": {"train": COUNTS, "val": COUNTS}}

# ---------------------------------------------------------------------------------------------------------------------
# token folders


class TokenWriter:
    """Writes a token folder under `folder + ".partial"` and gives it its name only in `finish`.

        with TokenWriter("data/x/tokens") as w:
            w.add("train", "utt1", text_ids, codes, speaker=0)      # codes (T, K)
            w.file("tokenizer.model", model_bytes)
            w.finish(meta)

    Leaving the block without `finish` (an error, Ctrl-C) removes the partial folder; a kill leaves it under its partial
    name, which the next run replaces. Two writers of one folder at a time are refused. `text_dtype` is uint16 unless
    the vocabulary needs uint32; it may be set until the first `add`. With `references` each utterance also brings the
    features of its recording, a fixed number of rows for each frame.
    Raises ValueError for codes or ids that do not fit their type and for a folder that another run writes, OSError,
    which names the file, when the disk refuses.
    """

    def __init__(self, folder, text_dtype=np.uint16, references=False):
        self.folder, self.partial = str(folder).rstrip("/"), str(folder).rstrip("/") + ".partial"
        self.text_dtype = text_dtype
        self.index = {s: [] for s in SPLITS}
        self.ends = {s: [0, 0] for s in SPLITS}  # text ids and frames written so far
        self.n_codebooks = None
        kinds = ("text.bin", "codes.bin", "ids.txt", *(["reference.bin"] if references else []))
        self.lock = contextlib.ExitStack()
        self.lock.enter_context(locked(self.partial))
        try:
            empty(self.partial)
            self.out = {s: [self._open(f"{s}.{kind}") for kind in kinds] for s in SPLITS}
        except BaseException:
            self.lock.close()
            raise

    def _open(self, name):
        return open(os.path.join(self.partial, name), "wb")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for file in itertools.chain(*self.out.values()):
            with contextlib.suppress(OSError):  # of a full disk, which was said before
                file.close()
        shutil.rmtree(self.partial, ignore_errors=True)  # already renamed away if finish was reached
        self.lock.close()

    def add(self, split, name, text, codes, speaker=0, reference=None):
        """Append one utterance: `name` its id, `text` (n,) ids, `codes` (T, K), `reference` (T * r, M) features."""
        text, codes = np.asarray(text), np.asarray(codes)
        if codes.ndim != 2 or self.n_codebooks not in (None, codes.shape[1]):
            K = self.n_codebooks or "K"
            raise ValueError(f"utterance {name}: codes of shape {codes.shape}, expected (frames, {K})")
        ranges = ("text ids", text, np.dtype(self.text_dtype)), ("codes", codes, np.dtype(np.uint16))
        for what, array, dtype in ranges:
            if array.size and not 0 <= array.min() <= array.max() <= np.iinfo(dtype).max:
                raise ValueError(f"utterance {name}: {what} from {array.min()} to {array.max()} do not fit {dtype}")
        if any(c in name for c in "\r\n"):
            raise ValueError(f"utterance id {name!r} contains a line break")
        self.n_codebooks = codes.shape[1]
        parts = [text.astype(self.text_dtype), codes.astype(np.uint16), f"{name}\n".encode()]
        parts += [np.asarray(reference, np.float16)] * (len(self.out[split]) - len(parts))
        for file, part in zip(self.out[split], parts, strict=True):
            with naming(file.name):
                file.write(part if isinstance(part, bytes) else part.tobytes())
        ends = self.ends[split]
        self.index[split].append((ends[0], len(text), ends[1], len(codes), speaker))
        ends[0] += len(text)
        ends[1] += len(codes)

    def file(self, name, content):
        """Put a further file (bytes) into the folder: the tokenizer, a report."""
        with naming(os.path.join(self.partial, name)), self._open(name) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, meta):
        """Write index and meta.json, flush to disk, and rename; an older folder of the same name is replaced."""
        for file in itertools.chain(*self.out.values()):
            with naming(file.name):
                file.flush()
                os.fsync(file.fileno())
                file.close()
        for split in SPLITS:
            np.save(index := io.BytesIO(), np.array(self.index[split], np.int64).reshape(-1, len(INDEX_COLUMNS)))
            self.file(f"{split}.index.npy", index.getvalue())
        splits = {
            s: {"utterances": len(self.index[s]), "text_tokens": self.ends[s][0], "frames": self.ends[s][1]}
            for s in SPLITS
        }
        meta = {"version": VERSION, "text_dtype": np.dtype(self.text_dtype).name, "splits": splits, **meta}
        self.file("meta.json", json.dumps(meta, indent=1, ensure_ascii=False).encode())
        sync(self.partial)
        old = self.folder + ".old"
        shutil.rmtree(old, ignore_errors=True)
        if os.path.lexists(self.folder):
            os.replace(self.folder, old)
        os.replace(self.partial, self.folder)
        sync(os.path.dirname(os.path.abspath(self.folder)))
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def naming(path):
    """The system's errors name the file: those of writing, of a full disk for example, do not by themselves."""
    try:
        yield
    except OSError as error:
        if error.filename or not error.strerror:
            raise
        raise OSError(error.errno, error.strerror, path) from None


def empty(folder):
    """Remove what a killed run left in a folder, and keep the folder itself, on which the lock is."""
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.remove(entry.path)


def sync(folder):
    """The names in a folder, too, survive a loss of power. Windows does that by itself."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_meta(folder):
    """A token folder's meta.json as a dict. Raises ValueError where it is missing, damaged or of another version."""
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} is not a finished token folder (no meta.json): make it with prepare.py") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{folder}/meta.json is damaged ({e}): make the folder again with prepare.py") from None
    try:
        need(meta, {"version": int}, f"{folder}/meta.json")
        if meta["version"] != VERSION:
            raise ValueError(f"{folder} has format version {meta['version']}, this code reads {VERSION}")
        need(meta, META, f"{folder}/meta.json")
    except ValueError as e:
        raise ValueError(f"{e}: run prepare.py again") from None
    return meta


class Rows:
    """A file of numbers as an array of that shape, of which each slice is read from the disk when it is asked for.

    It is not mapped into memory: the system kills a process (SIGBUS) that reads a mapped file somebody has cut short.
    A slice of such a file has fewer rows instead.
    """

    def __init__(self, path, dtype, shape):
        self.file, self.dtype, self.shape = open(path, "rb", buffering=0), np.dtype(dtype), shape  # noqa: SIM115

    def __getitem__(self, part):
        first, last, _ = part.indices(self.shape[0])
        size = self.dtype.itemsize * math.prod(self.shape[1:])  # of a row
        content = os.pread(self.file.fileno(), size * max(0, last - first), size * first)
        return np.frombuffer(content[: len(content) // size * size], self.dtype).reshape(-1, *self.shape[1:])


def fingerprint(folder):
    """A hash of what utterances a token folder has: their ids, lengths and speakers, in both splits. It takes a fifth
    of a second for a million."""
    total = hashlib.sha256()
    for name in (f"{split}.{kind}" for split in SPLITS for kind in ("index.npy", "ids.txt")):
        with open(os.path.join(folder, name), "rb") as f:
            while block := f.read(2**24):
                total.update(block)
    return total.hexdigest()


class TokenFiles:
    """One split of a token folder: its index is memory-mapped, the rest is read as it is asked for.

    `meta` is the folder's meta.json, `index` int64, a row of INDEX_COLUMNS for each utterance. Raises ValueError for a
    folder that is not finished, of another version, or damaged: files do not have the sizes its meta.json claims, or
    the index names what is not there.
    """

    def __init__(self, folder, split):
        self.folder, self.split, self.meta = str(folder), split, read_meta(folder)
        path = os.path.join(folder, split)
        K = self.meta["codec"]["n_codebooks"]
        try:
            self.index = np.load(path + ".index.npy", mmap_mode="r")
            n, n_text, n_frames = (self.meta["splits"][split][k] for k in ("utterances", "text_tokens", "frames"))
            if self.index.shape != (n, len(INDEX_COLUMNS)) or self.index.dtype != np.int64:
                found = f"{self.index.shape} of {self.index.dtype}"
                raise ValueError(f"{split}.index.npy has shape {found}, not {(n, len(INDEX_COLUMNS))} of int64")
            self._check_index(n_text, n_frames)
            self._text = self._map(path + ".text.bin", self.meta["text_dtype"], (n_text,))
            self._codes = self._map(path + ".codes.bin", "uint16", (n_frames, K))
            if reference := self.meta["codec"].get("reference"):
                shape = (n_frames, reference["rows_per_frame"], len(reference["silence"]))
                self._reference = self._map(path + ".reference.bin", "float16", shape)
        except (OSError, ValueError, EOFError, AttributeError, OverflowError, tokenize.TokenError) as e:
            raise ValueError(f"{folder}: the {split} split is damaged ({e}): make it again with prepare.py") from None

    def _check_index(self, n_text, n_frames):
        """Raise ValueError where the index names text, frames or a speaker that there cannot be."""
        text_start, text_length, first_frame, frames, speaker = self.index.T
        faults = {
            "numbers below 0": lambda: self.index.min(initial=0) < 0,
            "an utterance without frames": lambda: frames.min(initial=1) < 1,
            "a speaker whom meta.json does not name": lambda: speaker.max(initial=0) >= len(self.meta["speakers"]),
            "text beyond the end": lambda: (text_start > n_text - text_length).any(),
            "frames beyond the end": lambda: (first_frame > n_frames - frames).any(),
            "fewer text ids or frames than meta.json": lambda: (
                text_length.sum() != n_text or frames.sum() != n_frames
            ),
            "utterances that are not back to back": lambda: (
                (text_start[1:] != (text_start + text_length)[:-1]).any()
                or (first_frame[1:] != (first_frame + frames)[:-1]).any()
            ),
        }
        for words, there in faults.items():
            if there():
                raise ValueError(f"{self.split}.index.npy has {words}")

    @staticmethod
    def _map(path, dtype, shape):
        size, needed = os.path.getsize(path), int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size != needed:
            raise ValueError(f"{os.path.basename(path)} has {size} bytes, meta.json says {needed}")
        if not np.prod(shape):
            return np.zeros(shape, dtype)
        if not hasattr(os, "pread"):  # Windows, where nobody can cut a mapped file short
            return np.memmap(path, dtype, "r", shape=shape)
        return Rows(path, dtype, shape)

    def __reduce__(self):  # a process that is given this opens the files itself
        return TokenFiles, (self.folder, self.split)

    def __len__(self):
        return len(self.index)

    def text(self, i):
        """Text ids (n,) int64 of utterance i. Raises ValueError where they are damaged."""
        return self._piece(self._text, i, "text_start", self.meta["tokenizer"]["vocab_size"])

    def codes(self, i):
        """Codes (T, K) int64 of utterance i. Raises ValueError where they are damaged."""
        return self._piece(self._codes, i, "first_frame", self.meta["codec"]["codebook_size"])

    def _piece(self, array, i, first, limit):
        """Utterance i's part of an array of numbers below `limit`: the index has its place from column `first` on."""
        column = INDEX_COLUMNS.index(first)
        start, n = self.index[i, column : column + 2]
        piece = np.asarray(array[start : start + n], np.int64)
        if len(piece) != n or piece.max(initial=0) >= limit:
            raise self._damaged(i)
        return piece

    def _damaged(self, i):
        return ValueError(f"{self.folder}: the {self.split} split is damaged (in its utterance {i}, from 0 on): "
                          "make it again with prepare.py")  # fmt: skip

    def reference(self, i, first=0, last=None):
        """Features (rows, M) float32 of frames first .. last - 1 of the recording of utterance i. Raises ValueError
        where they are not finite."""
        start, n = self.index[i, 2:4]
        last = n if last is None else min(last, n)
        frames = self._reference[start + first : start + last]
        if len(frames) != max(0, last - first):
            raise self._damaged(i)
        frames = np.asarray(frames, np.float32).reshape(-1, frames.shape[-1])
        if not np.isfinite(frames).all():
            raise ValueError(f"{self.folder}: the {self.split} split is damaged (the reference of its utterance {i}, "
                             "from 0 on, is not finite): make it again with prepare.py")  # fmt: skip
        return frames

    def tokenizer(self):
        """The folder's tokenizer. Raises ValueError where it is not the one that made the text ids."""
        said, path = self.meta["tokenizer"], os.path.join(self.folder, self.meta["tokenizer"]["file"])
        with open(path, "rb") as f:
            tokenizer = load_tokenizer(said["kind"], f.read())
        if found := [key for key, value in tokenizer.describe().items() if said[key] != value]:
            raise ValueError(f"{path} is not the tokenizer that meta.json describes ({found[0]} differs): run "
                             "prepare.py again")  # fmt: skip
        return tokenizer

    def speaker(self, i):
        """Index of the speaker of utterance i in meta["speakers"]."""
        return int(self.index[i, 4])

    def name(self, i):
        """The id of utterance i. Reads through the list of ids, so meant for messages, not for loops."""
        with open(os.path.join(self.folder, f"{self.split}.ids.txt"), encoding="utf-8", newline="\n") as f:
            return next(line.rstrip("\n") for k, line in enumerate(f) if k == i)


# ---------------------------------------------------------------------------------------------------------------------
# batches


class Batches:
    """Endless batches (tokens (B, S, C) int64, segment (B, S) int64) of one split, filled to a token budget.

    For a model that reads a voice off a recording there is a third tensor, reference (B, R, M) float32: features of a
    stretch of the prompt's recording, or without a prompt of the utterance's own, whose frames there are then no target
    (PROMPT), as in XTTS.

    files: a TokenFiles. layout, length: the model's own: the rows of one utterance, and their number (for arrays too).
    max_tokens: most rows of a batch, padding included. max_batch: most utterances of a batch.
    rank, world: which share of the global list of batches is ours. workers: loader processes.
    voice_prompt: share of the utterances that get another one of the same speaker as a prompt before their text.
    shuffle: False gives one fixed order, sorted by length, without prompts (evaluation).
    max_rows: most rows of one utterance with its prompt, the positions of the model.
    reference: None, or the fewest and most frames of a stretch that is the reference; R are the rows of the most.

    `state()` after a batch, given to `restore` of a fresh object, continues with exactly the batch after it, in the
    middle of an epoch and with loader workers too. Raises ValueError for an empty split and for an utterance longer
    than max_tokens or max_rows.
    """

    BUCKET = 1.04  # lengths within 4% count as alike, so padding stays near 2%

    def __init__(self, files, layout, length, max_tokens, max_batch, seed=0, rank=0, world=1, workers=0,
                 voice_prompt=0.0, shuffle=True, max_rows=2**31, reference=None):
        self.files, self.layout, self.length = files, layout, length
        self.max_tokens, self.max_batch, self.seed = max_tokens, max_batch, seed
        self.rank, self.world, self.workers = rank, world, workers
        self.voice_prompt, self.shuffle, self.max_rows = voice_prompt, shuffle, min(max_rows, max_tokens)
        self.reference = reference
        self.epoch = self.batch = 0  # the next batch of the global list
        if reference and not files.meta["codec"].get("reference"):
            raise ValueError(f"{files.folder} has no features of recordings to take a voice from: make it again with "
                             "prepare.py --references=True")
        if not len(files):
            raise ValueError(f"{files.folder}: the {files.split} split is empty")
        lengths = self._lengths()
        worst = int(lengths.argmax())
        if lengths[worst] > self.max_rows:
            if lengths[worst] > max_tokens:
                limit, key = f"more than max_tokens = {max_tokens}", "max_tokens"
            else:
                limit, key = f"the model has {max_rows} positions", "max_positions of its backbone"
            raise ValueError(f"utterance {files.name(worst)} of {files.folder} needs {lengths[worst]} rows, {limit}: "
                             f"raise {key}, or leave it out with prepare.py's max_seconds")

    def _lengths(self, prompts=None):
        """Rows of every utterance (n,), with those of its prompt where `prompts` (n,), -1 for none, gives it one."""
        index = self.files.index
        text, frames = np.asarray(index[:, 1]), np.asarray(index[:, 3])
        if prompts is None:
            return self.length(text, frames)
        has = prompts >= 0
        return self.length(text, frames, np.where(has, text[prompts], 0), np.where(has, frames[prompts], 0))

    def _prompts(self, rng):
        """For each utterance another one of its speaker, or -1: (n,). One too long for max_rows is left out."""
        n, speaker = len(self.files), np.asarray(self.files.index[:, 4])
        by_speaker = np.argsort(speaker, kind="stable")
        first, count = np.searchsorted(speaker[by_speaker], speaker), np.bincount(speaker)[speaker]
        prompts = by_speaker[first + rng.integers(0, count)]
        prompts[(prompts == np.arange(n)) | (rng.random(n) >= self.voice_prompt)] = -1
        prompts[self._lengths(prompts) > self.max_rows] = -1
        return prompts

    def plan(self, epoch):
        """An epoch's global list of batches, each the numbers of its utterances, and prompts (n,) or None."""
        rng = np.random.default_rng((self.seed, epoch))
        prompts = self._prompts(rng) if self.shuffle and self.voice_prompt else None
        lengths = self._lengths(prompts)
        if self.shuffle:
            border = rng.random()  # moves from epoch to epoch
            bucket = (np.log(lengths) / np.log(self.BUCKET) + border).astype(int)
            order = np.lexsort((rng.random(len(lengths)), bucket))
        else:
            order = np.argsort(lengths, kind="stable")
        envelope = np.maximum.accumulate(lengths[order])  # never falls, as lengths in a bucket's random order do
        batches, i = [], 0
        while i < len(order):
            longest = envelope[i : i + self.max_batch]
            cost = longest * np.arange(1, len(longest) + 1)  # rows of a batch of 1, 2, 3, ... utterances, at most
            n = max(1, int(np.searchsorted(cost, self.max_tokens, side="right")))
            batches.append(order[i : i + n])
            i += n
        if self.shuffle:
            batches = [batches[j] for j in rng.permutation(len(batches))]
        return batches, prompts

    def padding(self, epoch=0):
        """Share of the rows of an epoch that are padding."""
        batches, prompts = self.plan(epoch)
        lengths = self._lengths(prompts)
        used = sum(int(lengths[b].sum()) for b in batches)
        return 1 - used / sum(len(b) * int(lengths[b].max()) for b in batches)

    def targets(self, most=16):
        """Share of the frames of an epoch's first batches that are targets. The others are only heard, in the stretch
        that is the reference, or left out by the layout."""
        batches, prompts = self.plan(0)
        text, codes = self.files.text(batches[0][0]), self.files.codes(batches[0][0])
        stops = int((self.layout(text, codes[:0])[1] == AUDIO).sum())  # rows of each utterance that are no frames
        rows = int(self.length(1, 2) - self.length(1, 1))  # of a frame
        learnt = frames = 0
        for b in batches[:most]:
            segment = self.read(b, None if prompts is None else prompts[b])[1]
            learnt += int((segment == AUDIO).sum()) - stops * len(b)
            frames += rows * int(self.files.index[b, 3].sum())
        return learnt / max(1, frames)

    def read(self, utterances, prompts=None, epoch=0):
        """Stack utterances and their prompts: tokens (B, S, C), segment (B, S), int64, zeros (PAD) on the right, and
        where the model takes one reference (B, R, M)."""
        return [torch.from_numpy(array) for array in self._arrays(utterances, prompts, epoch)]

    def _arrays(self, utterances, prompts=None, epoch=0):
        rows = []
        for j, i in enumerate(utterances):
            p = -1 if prompts is None else prompts[j]
            prompt = (self.files.text(p), self.files.codes(p)) if p >= 0 else None
            rows.append(self.layout(self.files.text(i), self.files.codes(i), prompt))
        S = max(len(segment) for _, segment in rows)
        tokens = np.zeros((len(rows), S, rows[0][0].shape[1]), np.int64)
        segment = np.zeros((len(rows), S), np.int64)
        for j, (t, s) in enumerate(rows):
            tokens[j, : len(s)], segment[j, : len(s)] = t, s
        batch = [tokens, segment]
        if self.reference:
            references = np.empty((len(rows), *self._silence().shape), np.float32)
            for j, i in enumerate(utterances):
                p = -1 if prompts is None else prompts[j]
                references[j], heard = self._stretch(i, p, epoch)
                audio = np.flatnonzero(segment[j] == AUDIO)
                segment[j, audio[heard]] = PROMPT
            batch.append(references)
        return batch

    def _silence(self):
        """The reference of a recording in which nothing is heard: (R, M)."""
        return silence(self.files.meta, self.reference[1])

    def _stretch(self, i, p, epoch):
        """The reference (R, M) of utterance i with prompt p (-1: none), and the slice of its own frames heard there.

        Of its own frames it hears at most half, so that the others are targets."""
        if not self.shuffle:  # evaluation hears another recording of the speaker, from its beginning
            return speaker_reference(self.files, self.files.speaker(i), self.reference[1], i), slice(0)
        rng = np.random.default_rng((self.seed, epoch, i, 1))
        source = i if p < 0 else p
        n, (fewest, most) = int(self.files.index[source, 3]), self.reference
        size = min(n if p >= 0 else n // 2, int(rng.integers(fewest, most + 1)))
        first = int(rng.integers(0, n - size + 1))
        reference, features = self._silence(), self.files.reference(source, first, first + size)
        reference[: len(features)] = features
        return reference, slice(first, first + size) if p < 0 else slice(0)

    def once(self):
        """This rank's share of epoch 0, once: what an evaluation reads. Leaves the position alone."""
        batches, prompts = self.plan(0)
        for b in batches[self.rank :: self.world]:
            yield self.read(b, None if prompts is None else prompts[b])

    def state(self):
        return {"epoch": self.epoch, "batch": self.batch}

    def restore(self, state):
        self.epoch, self.batch = state["epoch"], state["batch"]

    def _tasks(self):
        """From the current position on, without end: this rank's (utterances, prompts, position after the step).

        A step takes `world` batches of the global list, one for each rank, across the end of an epoch where they do not
        divide it.
        """
        epoch, batch, turn = self.epoch, self.batch, 0
        task = None
        while True:
            batches, prompts = self.plan(epoch)
            while batch < len(batches):
                if turn == self.rank:
                    b = batches[batch]
                    task = b, None if prompts is None else prompts[b], epoch
                batch, turn = batch + 1, turn + 1
                if turn == self.world:
                    yield *task, {"epoch": epoch, "batch": batch}
                    turn = 0
            epoch, batch = epoch + 1, 0

    def __iter__(self):
        if self.workers:
            yield from self._read_ahead()
        for *task, position in self._tasks():
            batch = self.read(*task)
            self.restore(position)
            yield batch

    def _read_ahead(self):
        """The same batches from worker processes. Each plans by itself, and reads every so many of them.

        Batches come through pipes, not through shared memory, of which a container has little. Raises what a worker
        raised, and ValueError where one died or stands still.
        """
        fork = sys.platform == "linux"  # it shares what is there; other systems make the worker from a pickle
        context = multiprocessing.get_context("fork" if fork else "spawn")
        workers, pipes = [], []
        end = partial(_kill, workers)
        atexit.register(end)  # however this process ends: multiprocessing would wait for them for ever
        try:
            for n in range(self.workers):
                ours, theirs = context.Pipe(duplex=False)
                pipes.append(ours)
                given = self, n, theirs, pipes if fork else ()
                workers.append(context.Process(target=_work, args=given, daemon=True))
                workers[-1].start()
                theirs.close()
            for worker, pipe in itertools.cycle(zip(workers, pipes, strict=True)):
                *batch, position = _receive(worker, pipe)
                self.restore(position)
                yield [torch.from_numpy(array) for array in batch]
        finally:
            end()
            atexit.unregister(end)


def _work(batches, n, pipe, inherited):
    """A loader worker: sends batch n and from then on every so many, until nobody takes them."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach a whole process group: training itself ends the workers
        signal.signal(number, signal.SIG_IGN)
    for ours in inherited:
        ours.close()  # or a worker would not notice that the training process is gone
    let_go()
    try:
        for *task, position in itertools.islice(batches._tasks(), n, None, batches.workers):
            pipe.send((*batches._arrays(*task), position))
    except BrokenPipeError:
        pass
    except (ValueError, OSError, MemoryError) as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))


def _receive(worker, pipe):
    """The next batch of a worker. Raises its error, and ValueError where it died or stands still."""
    try:
        if not pipe.poll(PATIENCE):
            raise ValueError(f"a loader worker has sent nothing for {PATIENCE} s: is the disk of the data there? "
                             "loader_workers=0 does without workers")  # fmt: skip
        found = pipe.recv()
    except (EOFError, OSError):
        worker.join(5)
        raise ValueError(f"a loader worker died (exit code {worker.exitcode}; -9 is what a system short of memory does)"
                         ": fewer loader_workers take less") from None  # fmt: skip
    if isinstance(found, Exception):
        raise found
    return found


def _kill(workers):
    """End processes at once; one that hangs in the system is not waited for."""
    for worker in workers:
        worker.kill()
        worker.join(1)


def silence(meta, frames):
    """The features (R, M) of so many silent frames, as the codec of a token folder's meta.json writes them."""
    reference = meta["codec"]["reference"]
    return np.tile(np.asarray(reference["silence"], np.float32), (frames * reference["rows_per_frame"], 1))


def speaker_reference(files, speaker, frames, without=-1):
    """A reference (R, M) of a speaker: the beginning of his first recording that has so many frames, or else of his
    longest, padded with silence. `without`: an utterance to do without, where there is another."""
    theirs = np.flatnonzero(files.index[:, 4] == speaker)
    theirs = theirs[theirs != without] if len(theirs) > 1 else theirs
    lengths = files.index[theirs, 3]
    enough = lengths >= frames
    best = theirs[int(enough.argmax() if enough.any() else lengths.argmax())]
    reference, features = silence(files.meta, frames), files.reference(best, 0, frames)
    reference[: len(features)] = features
    return reference


def speaker_timbres(folder):
    """What a vocoder speaks in, for each speaker of a token folder: (speakers, E), or None where nothing is known.
    Raises ValueError for a file that is damaged."""
    path = os.path.join(folder, TIMBRES)
    if not os.path.exists(path):
        return None
    try:
        timbres = np.load(path)
        if timbres.ndim != 2 or timbres.dtype.kind != "f" or not np.isfinite(timbres).all():
            raise ValueError(f"an array {timbres.shape} of {timbres.dtype}, not finite numbers (speakers, E)")
    except (OSError, ValueError, EOFError, AttributeError) as e:
        raise ValueError(f"{path} is damaged ({e}): make the folder again with prepare.py") from None
    return torch.from_numpy(timbres)

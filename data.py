"""Token files on disk <-> batches.

- Opening a token folder of millions of utterances costs nothing: its index is memory-mapped. The folder is written
  under a temporary name and renamed when it is complete, so a folder that can be opened is complete.
- Each batch has at most `max_tokens` rows and holds utterances of similar length, shuffled anew in each epoch.
- The order of the batches is one global list, a pure function of (seed, epoch). Rank r of W takes every W-th batch, so
  any number of ranks divides the same epoch without overlap. The position is two integers: epoch and batch.
- Several token folders of one codec and tokenizer can be read as one. Weights say how often an epoch repeats each, so
  that an old language or old voices stay in memory while new ones are learnt (replay).
- The model's `layout` makes the rows of an utterance; this file only pads and stacks them.

- A token folder may hold a reference for each utterance, from which a model takes the voice: features of the recording,
  a number of rows for each frame, or one speaker vector.

Letters in shapes: B batch, S rows (padded length), C columns, K codebooks, T frames, n text ids, R rows and M numbers
in a row of a reference, E size of a timbre.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tokenize
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from parts.files import empty, locked, naming, need, open_array, partial_name, sync, sync_folder
from parts.frontend import FRONT_ENDS
from parts.segment import AUDIO, PROMPT
from parts.text import load_tokenizer
from parts.workers import read_ahead

VERSION = 1
SPLITS = ("train", "val")
TIMBRES = "timbres.npy"
INDEX_COLUMNS = ("text_start", "text_length", "first_frame", "frames", "speaker", "language")
TEXT_START, TEXT_LENGTH, FIRST_FRAME, FRAMES, SPEAKER, LANGUAGE = range(len(INDEX_COLUMNS))


def between(low, high, *types):
    """A check for `need`: a number of one of these types above low and below high."""
    return lambda x: type(x) in types and low < x < high


COUNT = between(-1, 2**48, int)
SIZE = between(0, 2**48, int)
RATE = between(0, 10**9, int, float)
LEVEL = between(-(10**9), 10**9, int, float)


def are_names(x):
    return isinstance(x, list) and len(x) > 0 and all(isinstance(name, str) for name in x)


# The fields of meta.json, as `need` checks them: first those that a checkpoint has too, then those of a token folder
COUNTS = {"utterances": COUNT, "text_tokens": COUNT, "frames": COUNT}
MODEL_META = {
    "codec": {
        "name": str, "fingerprint": str, "sample_rate": RATE, "frame_rate": RATE, "n_codebooks": SIZE,
        "codebook_size": SIZE,
        "reference?": {"rows_per_frame": COUNT, "silence": lambda x: type(x) is list and x and all(map(LEVEL, x))},
    },
    "tokenizer": {"kind": str, "sha256": str, "vocab_size": SIZE, "bos_id": int, "eos_id": int,
                  "file": lambda x: x in ("tokenizer.model", "tokenizer.json")},
    "text_format": str, "front_end?": lambda x: x in FRONT_ENDS, "lowercase": bool, "splits": {"train": COUNTS},
    "speakers": are_names, "languages?": are_names,
}  # fmt: skip
REFERENCE_TYPE = {"recording": np.float16, "vector": np.float32}
META = {**MODEL_META, "text_dtype": lambda x: x in ("uint16", "uint32"), "splits": dict.fromkeys(SPLITS, COUNTS)}

# ---------------------------------------------------------------------------------------------------------------------
# token folders


def completed(meta):
    """A meta.json with the fields that older versions did not write."""
    return {"front_end": "plain", "languages": [meta.get("language") or ""], **meta}


class TokenWriter:
    """Writes a token folder under its partial name and renames it in `finish`.

        with TokenWriter("data/x/tokens") as w:
            w.add("train", "utt1", text_ids, codes, speaker=0)      # codes (T, K)
            w.file("tokenizer.model", model_bytes)
            w.finish(meta)

    Leaving the block without `finish` (an error, Ctrl-C) removes the partial folder. A kill leaves it, and the next run
    replaces it. text_dtype: uint16, or uint32 where the vocabulary needs it; it may be set until the first `add`.
    references: "recording" where each utterance brings the features of its recording too, a fixed number of rows for
    each frame; "vector" where it brings its speaker vector. Raises ValueError for codes or ids that do not fit their
    type and for a folder that another run writes, and OSError, which names the file, where the disk is full or fails.
    """

    def __init__(self, folder, text_dtype=np.uint16, references=""):
        self.folder = str(folder).rstrip("/")
        self.partial = partial_name(self.folder)
        self.text_dtype = text_dtype
        self.reference_type = REFERENCE_TYPE[references] if references else None
        self.n_codebooks = None
        self.index = {split: [] for split in SPLITS}
        self.ends = {split: [0, 0] for split in SPLITS}  # text ids and frames written so far
        kinds = ["text.bin", "codes.bin", "ids.txt"] + ["reference.bin"] * bool(references)
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.partial))
            empty(self.partial)
            self.out = {split: [self._open(f"{split}.{kind}") for kind in kinds] for split in SPLITS}
            self.lock = stack.pop_all()  # no error so far: the lock stays until __exit__

    def _open(self, name):
        return open(os.path.join(self.partial, name), "wb")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for file in itertools.chain(*self.out.values()):
            with contextlib.suppress(OSError):  # closing writes to the full disk once more
                file.close()
        shutil.rmtree(self.partial, ignore_errors=True)  # after `finish` it has its new name and is safe
        self.lock.close()

    def add(self, split, name, text, codes, speaker=0, reference=None, language=0):
        """Append one utterance: `name` its id, `text` (n,) ids, `codes` (T, K), `reference` (R, M) features, or (1, M)
        a speaker vector. speaker, language: their places in meta.json's lists."""
        codes = np.asarray(codes)
        if codes.ndim != 2 or self.n_codebooks not in (None, codes.shape[1]):
            expected = f"(frames, {self.n_codebooks or 'K'})"
            raise ValueError(f"utterance {name}: codes of shape {codes.shape}, expected {expected}")
        if any(c in name for c in "\r\n"):
            raise ValueError(f"utterance id {name!r} contains a line break")
        self.n_codebooks = codes.shape[1]
        content = [pack(text, self.text_dtype, f"utterance {name}: text ids"),
                   pack(codes, np.uint16, f"utterance {name}: codes"), f"{name}\n".encode()]  # fmt: skip
        if len(self.out[split]) > len(content):
            content.append(np.asarray(reference, self.reference_type).tobytes())
        for file, piece in zip(self.out[split], content, strict=True):
            with naming(file.name):  # a full disk shows here, as soon as the buffer of the file is full
                file.write(piece)
        ends = self.ends[split]
        self.index[split].append((ends[0], len(text), ends[1], len(codes), speaker, language))
        ends[0] += len(text)
        ends[1] += len(codes)

    def file(self, name, content):
        """Write a further file (bytes) into the folder, such as the tokenizer or a report."""
        with naming(os.path.join(self.partial, name)), self._open(name) as file:
            file.write(content)
            sync(file)

    def finish(self, meta):
        """Write index and meta.json, wait for the disk, and rename; an older folder of the same name is replaced."""
        splits = {}
        for split in SPLITS:
            for file in self.out[split]:
                with naming(file.name):
                    sync(file)
                    file.close()
            rows = np.array(self.index[split], np.int64).reshape(-1, len(INDEX_COLUMNS))
            self.file(f"{split}.index.npy", npy(rows))
            splits[split] = dict(zip(COUNTS, (len(rows), *self.ends[split]), strict=True))
        meta = {"version": VERSION, "text_dtype": np.dtype(self.text_dtype).name, "splits": splits, **meta}
        self.file("meta.json", json.dumps(meta, indent=1, ensure_ascii=False).encode())
        sync_folder(self.partial)
        old = self.folder + ".old"
        shutil.rmtree(old, ignore_errors=True)
        if os.path.lexists(self.folder):  # a rename cannot replace a folder that holds files
            os.replace(self.folder, old)
        os.replace(self.partial, self.folder)
        sync_folder(os.path.dirname(os.path.abspath(self.folder)))
        shutil.rmtree(old, ignore_errors=True)


def pack(numbers, dtype, where):
    """Integers as bytes of this type. Raises ValueError, which begins with `where`, for one that does not fit."""
    array = np.asarray(numbers)
    if array.size and not 0 <= array.min() <= array.max() <= np.iinfo(dtype).max:
        raise ValueError(f"{where} from {array.min()} to {array.max()} do not fit {np.dtype(dtype)}")
    return array.astype(dtype).tobytes()


def npy(array):
    """An array as the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def read_meta(folder):
    """A token folder's meta.json as a dict. Raises ValueError where it is missing, damaged or of another version."""
    path = os.path.join(folder, "meta.json")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} is not a finished token folder (no meta.json): make it with prepare.py") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): make the folder again with prepare.py") from None
    try:
        need(meta, {"version": int}, path)
        if meta["version"] != VERSION:
            raise ValueError(f"{folder} has format version {meta['version']}, this code reads {VERSION}")
        need(meta, META, path)
    except ValueError as error:
        raise ValueError(f"{error}: run prepare.py again") from None
    return completed(meta)


def fingerprint(data_dir):
    """A hash of the utterances in token folders: their ids, lengths, speakers and languages, in both splits, and the
    weights. It takes 0.2 s for a million utterances."""
    folders = token_folders(data_dir)
    if list(folders.values()) != [1]:
        parts = [[fingerprint({folder: 1}), weight] for folder, weight in folders.items()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    (folder,) = folders
    total = hashlib.sha256()
    for name in (f"{split}.{kind}" for split in SPLITS for kind in ("index.npy", "ids.txt")):
        with open(os.path.join(folder, name), "rb") as file:
            while block := file.read(2**24):
                total.update(block)
    return total.hexdigest()


class TokenFiles:
    """One split of a token folder. Its index is memory-mapped; text, codes and features are read as they are needed.

    meta: the folder's meta.json. index: (utterances, len(INDEX_COLUMNS)) int64; older folders have no language. parts:
    the folders in it, here one. weights: how often an epoch takes each utterance. Raises ValueError for a folder that
    is not finished, of another version, or damaged: a file does not have the size that follows from meta.json, or the
    index points to text, frames, speakers or languages that do not exist.
    """

    weights = 1.0

    def __init__(self, folder, split):
        self.folder = str(folder)
        self.split = split
        self.meta = read_meta(folder)
        path = os.path.join(folder, split)
        n, n_text, n_frames = (self.meta["splits"][split][count] for count in COUNTS)
        try:
            self.index = np.load(path + ".index.npy", mmap_mode="r")
            expected = (n, len(INDEX_COLUMNS))
            if self.index.shape not in (expected, (n, LANGUAGE)) or self.index.dtype != np.int64:
                found = f"{self.index.shape} of {self.index.dtype}"
                raise ValueError(f"{split}.index.npy has shape {found}, not {expected} of int64")
            self._check_index(n_text, n_frames)
            self._text = open_array(path + ".text.bin", self.meta["text_dtype"], (n_text,))
            self._codes = open_array(path + ".codes.bin", "uint16", (n_frames, self.meta["codec"]["n_codebooks"]))
            if kind := reference_kind(self.meta):
                reference = self.meta["codec"]["reference"]
                shape = (n_frames, reference["rows_per_frame"]) if kind == "recording" else (n, 1)
                shape = *shape, len(reference["silence"])
                self._reference = open_array(path + ".reference.bin", REFERENCE_TYPE[kind], shape)
        except (OSError, ValueError, EOFError, AttributeError, OverflowError, tokenize.TokenError) as error:
            raise self._damaged(error) from None

    def _check_index(self, n_text, n_frames):
        """Raise ValueError where the index points to text, frames or a speaker that cannot exist."""
        text_start, text_length, first_frame, frames, speaker, *language = self.index.T
        faults = {
            "numbers below 0": lambda: self.index.min(initial=0) < 0,
            "an utterance without frames": lambda: frames.min(initial=1) < 1,
            "a speaker whom meta.json does not name": lambda: speaker.max(initial=0) >= len(self.meta["speakers"]),
            "a language that meta.json does not name": lambda: (
                max((column.max(initial=0) for column in language), default=0) >= len(self.meta["languages"])
            ),
            "text beyond the end": lambda: (text_start > n_text - text_length).any(),
            "frames beyond the end": lambda: (first_frame > n_frames - frames).any(),
            "fewer text ids or frames than meta.json": lambda: (text_length.sum(), frames.sum()) != (n_text, n_frames),
            "utterances that are not back to back": lambda: (
                (text_start[1:] != (text_start + text_length)[:-1]).any()
                or (first_frame[1:] != (first_frame + frames)[:-1]).any()
            ),
        }
        for words, is_found in faults.items():
            if is_found():
                raise ValueError(f"{self.split}.index.npy has {words}")

    def _damaged(self, why):
        return ValueError(f"{self.folder}: the {self.split} split is damaged ({why}): make it again with prepare.py")

    @property
    def parts(self):
        return [self]

    def __reduce__(self):  # a pickle holds the name of the folder: the process that reads it opens the files itself
        return TokenFiles, (self.folder, self.split)

    def __len__(self):
        return len(self.index)

    def text(self, i):
        """Text ids (n,) int64 of utterance i. Raises ValueError where they are damaged."""
        return self._piece(self._text, i, TEXT_START, self.meta["tokenizer"]["vocab_size"])

    def codes(self, i):
        """Codes (T, K) int64 of utterance i. Raises ValueError where they are damaged."""
        return self._piece(self._codes, i, FIRST_FRAME, self.meta["codec"]["codebook_size"])

    def _piece(self, array, i, column, limit):
        """Utterance i's slice of an array of numbers below `limit`; the index has its start in `column`."""
        start, n = self.index[i, column : column + 2]
        piece = np.asarray(array[start : start + n], np.int64)
        if len(piece) != n or piece.max(initial=0) >= limit:
            raise self._damaged(f"in its utterance {i}, from 0 on")
        return piece

    def reference(self, i, first=0, last=None):
        """Features (rows, M) float32 of frames first .. last - 1 of the recording of utterance i; or its speaker vector
        (1, M), whatever the frames. Raises ValueError where they are damaged."""
        start, n = self.index[i, FIRST_FRAME : FIRST_FRAME + 2]
        last = n if last is None else min(last, n)
        if reference_kind(self.meta) == "vector":
            start, first, last = i, 0, 1
        frames = self._reference[start + first : start + last]
        if len(frames) != max(0, last - first):
            raise self._damaged(f"in its utterance {i}, from 0 on")
        rows = np.asarray(frames, np.float32).reshape(-1, frames.shape[-1])
        if not np.isfinite(rows).all():
            raise self._damaged(f"the reference of its utterance {i}, from 0 on, is not finite")
        return rows

    def tokenizer(self):
        """The folder's tokenizer. Raises ValueError where it is not the one that made the text ids."""
        described = self.meta["tokenizer"]
        path = os.path.join(self.folder, described["file"])
        with open(path, "rb") as file:
            tokenizer = load_tokenizer(described["kind"], file.read())
        if different := [key for key, value in tokenizer.describe().items() if described[key] != value]:
            raise ValueError(f"{path} is not the tokenizer that meta.json describes ({different[0]} differs): run "
                             "prepare.py again")  # fmt: skip
        return tokenizer

    def speaker(self, i):
        """Index of the speaker of utterance i in meta["speakers"]."""
        return int(self.index[i, SPEAKER])

    def language(self, i):
        """Index of the language of utterance i in meta["languages"]."""
        return int(self.index[i, LANGUAGE]) if self.index.shape[1] > LANGUAGE else 0

    def name(self, i):
        """The id of utterance i. It reads the list of ids from its start: for messages, not for loops."""
        with open(os.path.join(self.folder, f"{self.split}.ids.txt"), encoding="utf-8", newline="\n") as file:
            return next(itertools.islice(file, i, None)).rstrip("\n")


def reference_kind(meta):
    """What the references of a token folder are: "recording", features of it; "vector", a row for each utterance
    (rows_per_frame = 0); "" where it has none."""
    reference = meta["codec"].get("reference")
    return "" if not reference else "recording" if reference["rows_per_frame"] else "vector"


class Mixture:
    """The same split of several token folders, read as one TokenFiles: their utterances one folder after the other,
    their speakers and languages merged by name.

    folders: {folder: weight}. The first folder says in meta how a text is worded. weights: (utterances,). Raises
    ValueError where a folder is damaged, or of another codec, tokenizer or handling of text than the first one.
    """

    ONE = ("codec", "tokenizer", "lowercase", "front_end")  # fields of meta.json that must be the same
    NAMED = {"speakers": SPEAKER, "languages": LANGUAGE}  # lists in meta.json, into which columns of the index point

    def __init__(self, folders, split):
        self.folders = folders
        self.split = split
        self.parts = [TokenFiles(folder, split) for folder in folders]
        first = self.parts[0]
        self.folder = first.folder
        for part in self.parts[1:]:
            for field in self.ONE:
                if key := difference(first.meta.get(field), part.meta.get(field), field):
                    raise ValueError(f"{part.folder} and {first.folder} differ in {key}: prepare one of them again "
                                     "with the other's codec and tokenizer")  # fmt: skip
        metas = [part.meta for part in self.parts]
        named = {what: list(dict.fromkeys(name for meta in metas for name in meta[what])) for what in self.NAMED}
        counts = {s: {c: sum(meta["splits"][s][c] for meta in metas) for c in COUNTS} for s in SPLITS}
        self.meta = {**first.meta, **named, "splits": counts}
        sizes = [len(part) for part in self.parts]
        self.starts = np.cumsum([0, *sizes])
        self.weights = np.repeat(list(folders.values()), sizes)
        self.index = np.zeros((sum(sizes), len(INDEX_COLUMNS)), np.int64)
        for part, start in zip(self.parts, self.starts, strict=False):
            rows = self.index[start : start + len(part)]
            rows[:, : part.index.shape[1]] = part.index
            for what, column in self.NAMED.items():
                place = np.array([named[what].index(name) for name in part.meta[what]])
                rows[:, column] = place[rows[:, column]]

    def __reduce__(self):
        return Mixture, (self.folders, self.split)

    def __len__(self):
        return len(self.index)

    def find(self, i):
        """The part that has utterance i, and its number there."""
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.parts[part], i - self.starts[part]

    def text(self, i):
        part, i = self.find(i)
        return part.text(i)

    def codes(self, i):
        part, i = self.find(i)
        return part.codes(i)

    def reference(self, i, first=0, last=None):
        part, i = self.find(i)
        return part.reference(i, first, last)

    def name(self, i):
        part, i = self.find(i)
        return part.name(i)

    def speaker(self, i):
        return int(self.index[i, SPEAKER])

    def language(self, i):
        return int(self.index[i, LANGUAGE])

    def tokenizer(self):
        return self.parts[0].tokenizer()


def difference(a, b, name):
    """The name of the first entry in which two fields of meta.json differ, "" if none does."""
    if isinstance(a, dict) and isinstance(b, dict):
        return next((f"{name} {key}" for key in {**a, **b} if a.get(key) != b.get(key)), "")
    return name if a != b else ""


def token_folders(data_dir):
    """{folder: weight} of what data_dir names: a folder, "new:3,old" or {"new": 3, "old": 1}. A folder without a weight
    has 1. Raises ValueError for weights of which none is 1 or more, and for a folder that is named twice."""
    folders = data_dir
    if isinstance(data_dir, str):
        folders = {}
        for word in [data_dir] if os.path.isdir(data_dir) else data_dir.split(","):  # a path may have a comma in it
            folder, _, weight = word.strip().rpartition(":")
            if not folder or not re.fullmatch(r"[\d.]+", weight) or os.path.isdir(word):
                folder, weight = word.strip(), 1
            if folder in folders:
                raise ValueError(f"data_dir names {folder!r:.100} twice: give it a weight, as {folder:.100}:2")
            folders[folder] = weight
    try:
        folders = {folder: float(weight) for folder, weight in folders.items()}
    except (ValueError, TypeError):
        folders = {}
    if not all(0 <= weight < 1e6 for weight in folders.values()) or max(folders.values(), default=0) < 1:
        raise ValueError(f"data_dir = {data_dir!r:.150}: give each folder a weight, at least one of them 1 or more, as "
                         "new/tokens:3,old/tokens:0.5")  # fmt: skip
    return folders


def open_tokens(data_dir, split):
    """One split of the token folders that data_dir names (see token_folders)."""
    folders = token_folders(data_dir)
    if list(folders.values()) == [1]:
        return TokenFiles(*folders, split)
    return Mixture(folders, split)


def part_names(files):
    """A short name for each of the parts of `files`: what their paths do not share, or else the whole path."""
    paths = [part.folder.strip("/").split("/") for part in files.parts]
    shared = set.intersection(*map(set, paths))
    names = ["_".join(word for word in path if word not in shared) for path in paths]
    return names if len(set(names)) == len(names) and all(names) else [part.folder for part in files.parts]


def silence(meta, frames):
    """The features (R, M) of so many silent frames, as the codec of a token folder's meta.json writes them; of speaker
    vectors a row of zeros."""
    reference = meta["codec"]["reference"]
    rows = frames * reference["rows_per_frame"] or 1
    return np.tile(np.asarray(reference["silence"], np.float32), (rows, 1))


def speaker_reference(files, speaker, frames, without=-1):
    """A reference (R, M) of a speaker: the start of the first recording that has so many frames, or else of the longest
    one, padded with silence; with 0 frames the vector of the first one. without: an utterance to avoid where the
    speaker has another."""
    theirs = np.flatnonzero(files.index[:, SPEAKER] == speaker)
    if len(theirs) > 1:
        theirs = theirs[theirs != without]
    lengths = np.minimum(files.index[theirs, FRAMES], frames)
    best = theirs[int(lengths.argmax())]
    return padded(files.reference(best, 0, frames), silence(files.meta, frames))


def padded(features, reference):
    """A silent reference (R, M) that starts with these features (rows, M)."""
    reference[: len(features)] = features
    return reference


def speaker_timbres(files):
    """The timbres in which a vocoder speaks, one for each speaker of token folders: (speakers, E), or None where a
    folder has none. Raises ValueError for a damaged file."""
    timbres = {}
    for part in files.parts:
        path = os.path.join(part.folder, TIMBRES)
        if not os.path.exists(path):
            return None
        try:
            own = np.load(path)
            floats = own.ndim == 2 and len(own) == len(part.meta["speakers"]) and own.dtype.kind == "f"
            if not floats or not np.isfinite(own).all():
                raise ValueError(f"an array {own.shape} of {own.dtype}, not finite numbers (speakers, E)")
        except (OSError, ValueError, EOFError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): make the folder again with prepare.py") from None
        timbres = {**dict(zip(part.meta["speakers"], own, strict=False)), **timbres}
    return torch.from_numpy(np.stack([timbres[name] for name in files.meta["speakers"]]))


# ---------------------------------------------------------------------------------------------------------------------
# batches


@dataclass(eq=False)
class Batches:
    """Endless batches of one split: tokens (B, S, C) and segment (B, S), int64.

    A model that hears a voice in a recording gets a third tensor, reference (B, R, M) float32: features of a stretch of
    the prompt's recording or, without a prompt, of the utterance itself. The frames of that stretch are then PROMPT, no
    targets, as in XTTS. A model that takes a speaker vector gets that (B, 1, M): the stretch has no frames.

    `state()` after a batch, given to `restore` of a new object, continues with exactly the next batch, also in the
    middle of an epoch and with loader workers. Raises ValueError for an empty split and for an utterance longer than
    max_tokens or max_rows.
    """

    files: TokenFiles
    layout: Callable  # the model's: (text, codes, prompt) -> rows (S, C) and segment (S,) of one utterance
    length: Callable  # the model's: number of rows that layout makes, for numbers or arrays
    max_tokens: int  # rows of a batch, with padding
    max_batch: int  # utterances of a batch
    seed: int = 0
    rank: int = 0  # this process takes the batches rank, rank + world, ... of the global list
    world: int = 1
    workers: int = 0  # loader processes
    voice_prompt: float = 0.0  # share of the utterances that get another one of their speaker as a prompt
    shuffle: bool = True  # False: one fixed order, sorted by length, without prompts (for evaluation)
    max_rows: int = 2**31  # rows of an utterance with its prompt: the positions of the model
    reference: tuple | None = None  # fewest and most frames of the stretch that is the reference; 0, 0: a vector
    prompt_frames: tuple | None = None  # fewest and most to which a prompt is cut or repeated; None: whole prompts
    languages: list | None = None  # the model's id of each language of the files; None: its layout takes none

    BUCKET = 1.04  # lengths within 4% share a bucket, so about 2% of the rows are padding

    def __post_init__(self):
        self.epoch = 0
        self.batch = 0  # the next batch of the global list
        files = self.files
        if self.reference and self.reference[1] and reference_kind(files.meta) != "recording":
            raise ValueError(f"{files.folder} has no features of recordings to take a voice from: make it again with "
                             "prepare.py --references=True")
        if not len(files):
            raise ValueError(f"{files.folder}: the {files.split} split is empty")
        lengths = self._lengths()
        worst = int(lengths.argmax())
        for limit, words, key in (
            (self.max_tokens, f"more than max_tokens = {self.max_tokens}", "max_tokens"),
            (self.max_rows, f"the model has {self.max_rows} positions", "max_positions of its backbone"),
        ):
            if lengths[worst] > limit:
                raise ValueError(f"utterance {files.name(worst)} of {files.folder} needs {lengths[worst]} rows, "
                                 f"{words}: raise {key}, or leave it out with prepare.py's max_seconds")

    def _lengths(self, prompts=None):
        """Rows of every utterance (n,), with those of its prompt where `prompts` (n,) gives it one; -1: no prompt. With
        prompt_frames a prompt counts as long as it may become."""
        text = np.asarray(self.files.index[:, TEXT_LENGTH])
        frames = np.asarray(self.files.index[:, FRAMES])
        if prompts is None:
            return self.length(text, frames)
        has = prompts >= 0
        before = frames[prompts]
        if self.prompt_frames:
            before = np.where(before > 0, self.prompt_frames[1], 0)
        return self.length(text, frames, np.where(has, text[prompts], 0), np.where(has, before, 0))

    def _prompts(self, rng):
        """For each utterance another one of its speaker, or -1: (n,). One that is too long for max_rows is left out."""
        n = len(self.files)
        if not (self.shuffle and self.voice_prompt):
            return np.full(n, -1)
        speaker = np.asarray(self.files.index[:, SPEAKER])
        by_speaker = np.argsort(speaker, kind="stable")
        first = np.searchsorted(speaker[by_speaker], speaker)
        count = np.bincount(speaker)[speaker]
        prompts = by_speaker[first + rng.integers(0, count)]
        prompts[(prompts == np.arange(n)) | (rng.random(n) >= self.voice_prompt)] = -1
        prompts[self._lengths(prompts) > min(self.max_rows, self.max_tokens)] = -1
        return prompts

    def _drawn(self, epoch):
        """The utterances of an epoch (m,), each as often as its weight says; the part of a weight behind the point is
        the chance of one time more."""
        n = len(self.files)
        weights = np.broadcast_to(self.files.weights, n)
        chance = np.random.default_rng((self.seed, epoch, 1)).random(n) if (weights % 1).any() else 0
        return np.repeat(np.arange(n), np.floor(weights + chance).astype(int))

    def plan(self, epoch):
        """An epoch's global list of batches, each an array of utterance numbers, and the prompts (n,), -1 for none.
        Without `shuffle` each utterance comes once, and no batch has utterances of two folders."""
        rng = np.random.default_rng((self.seed, epoch))
        prompts = self._prompts(rng)
        lengths = self._lengths(prompts)
        if self.shuffle:
            drawn = self._drawn(epoch)
            border = rng.random()  # so that the buckets differ from epoch to epoch
            bucket = (np.log(lengths[drawn]) / np.log(self.BUCKET) + border).astype(int)
            orders = [drawn[np.lexsort((rng.random(len(drawn)), bucket))]]
        else:
            ends = np.cumsum([len(part) for part in self.files.parts])[:-1]
            parts = np.split(np.arange(len(lengths)), ends)
            orders = [part[np.argsort(lengths[part], kind="stable")] for part in parts]
        batches = [batch for order in orders for batch in self._cut(order, lengths[order])]
        if self.shuffle:
            batches = [batches[j] for j in rng.permutation(len(batches))]
        return batches, prompts

    def _cut(self, order, lengths):
        """Utterances in `order` (m,), of these lengths (m,), cut into batches."""
        # lengths in a bucket are in random order: their running maximum never falls, and bounds each batch
        envelope = np.maximum.accumulate(lengths)
        first = 0
        while first < len(order):
            longest = envelope[first : first + self.max_batch]
            cost = longest * np.arange(1, len(longest) + 1)  # rows of a batch of 1, 2, 3, ... utterances, at most
            n = max(1, int(np.searchsorted(cost, self.max_tokens, side="right")))
            yield order[first : first + n]
            first += n

    def rows(self, epoch=0):
        """Rows of an epoch, padding included, and how many of them are padding."""
        batches, prompts = self.plan(epoch)
        lengths = self._lengths(prompts)
        rows = sum(len(b) * int(lengths[b].max()) for b in batches)
        return rows, rows - sum(int(lengths[b].sum()) for b in batches)

    def padding(self, epoch=0):
        """Share of the rows of an epoch that are padding."""
        rows, padding = self.rows(epoch)
        return padding / rows

    def targets(self, n_batches=16):
        """Share of the frames in the first batches of an epoch that are targets. The others are in the stretch that is
        the reference, or the layout leaves them out."""
        batches, prompts = self.plan(0)
        some = batches[0][0]
        # stop frames are targets too, but not frames of the recording: an utterance without frames has only them
        stops = int((self.layout(self.files.text(some), self.files.codes(some)[:0])[1] == AUDIO).sum())
        rows_per_frame = int(self.length(1, 2) - self.length(1, 1))
        targets = frames = 0
        for b in batches[:n_batches]:
            segment = self.read(b, prompts[b])[1]
            targets += int((segment == AUDIO).sum()) - stops * len(b)
            frames += int(self.files.index[b, FRAMES].sum())
        return targets / max(1, rows_per_frame * frames)

    def read(self, utterances, prompts=None, epoch=0):
        """Stack utterances and their prompts: tokens (B, S, C) and segment (B, S), int64, zeros (PAD) on the right, and
        with a reference (B, R, M) float32."""
        return [torch.from_numpy(array) for array in self._arrays(utterances, prompts, epoch)]

    def _arrays(self, utterances, prompts=None, epoch=0):
        pairs = list(zip(utterances, [-1] * len(utterances) if prompts is None else prompts, strict=True))
        rows = [self._rows(i, p, epoch) for i, p in pairs]
        S = max(len(segment) for _, segment in rows)
        tokens = np.zeros((len(rows), S, rows[0][0].shape[1]), np.int64)
        segment = np.zeros((len(rows), S), np.int64)
        for j, (t, s) in enumerate(rows):
            tokens[j, : len(s)] = t
            segment[j, : len(s)] = s
        if not self.reference:
            return [tokens, segment]
        references = []
        for j, (i, p) in enumerate(pairs):
            reference, covered = self._stretch(i, p, epoch)
            references.append(reference)
            segment[j, np.flatnonzero(segment[j] == AUDIO)[covered]] = PROMPT
        return [tokens, segment, np.stack(references)]

    def _rows(self, i, p, epoch):
        """Rows (S, C) and segment (S,) of utterance i with prompt p, -1 for none."""
        more = {"language": self.languages[self.files.language(i)]} if self.languages else {}
        if p < 0:
            return self.layout(self.files.text(i), self.files.codes(i), **more)
        codes = self.files.codes(p)
        if self.prompt_frames and len(codes):
            least, most = self.prompt_frames
            n = np.random.default_rng((self.seed, epoch, i, 2)).integers(least, most + 1)
            codes = np.resize(codes, (n, codes.shape[1]))  # cuts or repeats
        return self.layout(self.files.text(i), self.files.codes(i), (self.files.text(p), codes), **more)

    def _stretch(self, i, p, epoch):
        """The reference (R, M) of utterance i with prompt p (-1: none), and the slice of i's own frames in it: at most
        half of them, so that the others are targets."""
        least, most = self.reference
        if not self.shuffle:  # evaluation takes another recording of the speaker, from its start
            return speaker_reference(self.files, self.files.speaker(i), most, i), slice(0)
        # its own generator for each utterance: the stretch does not depend on the worker that draws it
        rng = np.random.default_rng((self.seed, epoch, i, 1))
        source = i if p < 0 else p
        n = int(self.files.index[source, FRAMES])
        size = min(n if p >= 0 else n // 2, int(rng.integers(least, most + 1)))
        first = int(rng.integers(0, n - size + 1))
        reference = padded(self.files.reference(source, first, first + size), silence(self.files.meta, most))
        return reference, slice(first, first + size) if p < 0 else slice(0)

    def state(self):
        return {"epoch": self.epoch, "batch": self.batch}

    def restore(self, state):
        self.epoch = state["epoch"]
        self.batch = state["batch"]

    def _tasks(self):
        """From the current position on, without end: this rank's (utterances, prompts, epoch, position after the step).

        A step takes `world` batches of the global list, one for each rank. It may reach into the next epoch.
        """
        epoch = self.epoch
        batch = self.batch
        turn = 0
        while True:
            batches, prompts = self.plan(epoch)
            for number in range(batch, len(batches)):
                if turn == self.rank:
                    task = batches[number], prompts[batches[number]], epoch
                turn = (turn + 1) % self.world
                if turn == 0:
                    yield *task, {"epoch": epoch, "batch": number + 1}
            epoch += 1
            batch = 0

    def _make(self, first, step):
        """Every step-th batch from the first on, as arrays, each with the position after it."""
        for *task, position in itertools.islice(self._tasks(), first, None, step):
            yield self._arrays(*task), position

    def __iter__(self):
        for arrays, position in read_ahead(self._make, self.workers) if self.workers else self._make(0, 1):
            self.restore(position)
            yield [torch.from_numpy(array) for array in arrays]

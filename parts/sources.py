"""Sources -> utterances: metadata beside recordings, a folder with files for each clip, tables and tar shards that hold
recordings or codes.

- What lies inside a file stays there: an utterance only notes its row, and `load` reads the file once more, in step.
- A table, also the .json of a shard, may name any audio file that this user may read, even outside its own folder:
  look through the tables of people whom you do not trust.

Letters in shapes: K codebooks, T frames, E size of a speaker vector.
"""

import glob
import hashlib
import itertools
import math
import os
import re
import unicodedata
from dataclasses import dataclass, field, fields, replace

import numpy as np
from tqdm import tqdm

from parts.frontend import language_name
from parts.tables import COLUMNS, EXTENSIONS, clips, column_name, has_columns, read_rows
from parts.text import normalise, speakable, wording

PAIR = ["metadata_train.csv", "metadata_eval.csv"]  # as trainers of XTTS write them: the second is held out
METADATA = ["metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json", "metadata.txt"]
SHARDS = ["*.parquet", "*.tar", "*.tar.gz", "*.tgz", "*.jsonl", "*.jsonl.gz"]  # in a folder without metadata
SOMEBODY = "speaker"  # who speaks where nothing says it
LANGUAGE_FILE = "lang.txt"  # in a folder with metadata: the language of its texts, as trainers of XTTS write it
LONGEST = 1e9  # seconds, far beyond any recording


@dataclass(slots=True)
class Utterance:
    id: str
    source: str  # the file it is from
    audio: str  # as the source names it; the file's path once it is found
    text: str  # as its source has it, until prepare.py has read it
    speaker: str
    language: str = ""  # "": nobody says it
    text_format: str = ""  # of its source; "": that of the recipe
    heldout: bool = False  # whether its source says that it is never trained on
    script: str = ""  # of most of its letters
    start: float = 0.0  # seconds
    end: float | None = None
    seconds: float = 0.0
    silence: float = 0.0  # seconds, at the end that has more of it
    codes: tuple = ()  # where the source has codes: frames, codebooks, lowest and highest code
    row: int = -1  # in the source, where that holds the recording or the codes
    columns: dict | None = None  # {our name: its name there}, where the recipe says so
    content: bytes | np.ndarray | None = None  # that recording, or codes (T, K), while they are worked on
    vector: np.ndarray | None = None  # (E,) float32, a speaker encoder's
    reason: str = ""  # why it is not used; empty: it is used
    detail: str = ""


@dataclass
class Source:
    """What a recipe says of one source. Whatever it leaves out, the rows say."""

    path: str
    speaker: str = ""  # who speaks in all of it
    language: str = ""  # of all of it
    text_format: str = ""  # what the model reads of its texts; "": that of the recipe
    columns: dict = field(default_factory=dict)  # {our name of a column: its name in the files}
    filter: dict = field(default_factory=dict)  # {column: regular expression}: keep the rows that match
    split: str = ""  # read only the files of this split, such as train
    heldout: bool = False  # never train on it
    cap: int | None = None  # keep at most so many utterances
    name: str = ""  # put before the ids


# -----------------------------------------------------------------------------
# sources


def read_sources(sources):
    """For each of the sources, one or a list, the list of its utterances, as `read_source` reads them.

    Ids stay unique: where an utterance of another file has the same id and is another recording, all ids of the later
    file get a prefix, the part of its path that tells it from the earlier files."""
    owners = {}  # id: (file, whether the file holds the recording)
    for source in sources if isinstance(sources, list) else [sources]:
        found = read_source(source)
        for path, group in itertools.groupby(found, lambda u: u.source):
            utterances = list(group)
            path = os.path.realpath(path)
            owner = {held: (path, held) for held in (False, True)}
            used = [(u, owner[u.row >= 0]) for u in utterances if not u.reason]
            others = {owners[u.id][0] for u, mine in used if u.id in owners and differ(u.id, mine, owners[u.id])}
            prefix = own_part(path, others) + "/" if others else ""
            for u in utterances:
                u.id = prefix + u.id
            for u, mine in used:
                owners.setdefault(u.id, mine)
        yield found


def differ(name, *owners):
    """Whether an id means two recordings to two (file, whether it holds the recording): each file holds one, or the
    files are in two folders."""
    places = {os.path.normpath(os.path.join(os.path.dirname(path), name)) for path, _ in owners}
    return len({path for path, _ in owners}) > 1 and (all(held for _, held in owners) or len(places) > 1)


def own_part(path, others):
    """A path without the folders at its start and the names at its end that it shares with all others."""
    paths = [file.split(os.sep) for file in (path, *others)]
    start = len(os.path.commonprefix(paths))
    end = len(paths[0]) - len(os.path.commonprefix([parts[::-1] for parts in paths]))
    return "/".join(paths[0][start:end] or paths[0][start - 1 : end] or paths[0][1:])


def read_source(source):
    """One source -> its utterances in the order of its files. A row that does not pass the filter, or is beyond the
    cap, has that as its reason. Raises ValueError or FileNotFoundError, one line, for a wrong or unreadable source."""
    source = check_source(source)
    tests = [(column_name(column), re.compile(pattern)) for column, pattern in source.filter.items()]
    utterances = []
    passed = []
    for file in find_files(source.path, source.split):
        columns = {}
        usual = folder_language(file)
        its = replace(source, heldout=source.heldout or os.path.basename(file) == PAIR[1])
        rows = tqdm(read_rows(file, columns=source.columns), "reading", unit=" utt", leave=False, disable=None)
        for n, (place, row, problem) in enumerate(rows):
            u = read_row(row, n, place, problem, file, its, usual)
            utterances.append(u)
            columns |= dict.fromkeys(row)
            if all(pattern.fullmatch(cell(row, column)) for column, pattern in tests):
                passed.append(u)
            else:
                u.reason = "filtered out"
        need_columns(columns, file, source.columns)
        if "text_tokens" in columns:
            tqdm.write(f"{file}: its text_tokens are not used, the tokenizer reads the texts anew")
    if not passed:
        raise ValueError(f"{source.path}: none of its {len(utterances)} rows passes the filter {source.filter!r:.100}; "
                         f"columns: {', '.join(columns):.100}")
    # The hash draws a fair sample, always the same. Its own word "cap" keeps it apart from the hash that splits.
    sound = (u for u in passed if not u.reason)
    for u in sorted(sound, key=lambda u: fraction(f"cap {u.id}"))[source.cap or len(passed) :]:
        u.reason = "beyond the cap"
    return utterances


def check_source(given):
    """The Source that a recipe gives as a path or a dict. Raises ValueError, one line."""
    given = given if isinstance(given, dict) else {"path": given}
    known = {f.name for f in fields(Source)}
    where = f"source {given!r:.100}"
    if not isinstance(given.get("path"), str) or set(given) - known:
        raise ValueError(f"{where}: has a path and may have {', '.join(sorted(known - {'path'}))}, nothing else")
    source = Source(**{key: value for key, value in given.items() if value is not None})
    for key in ("speaker", "language", "text_format", "split", "name"):
        if not isinstance(getattr(source, key), str | int):
            raise ValueError(f"{where}: {key} is a text, not {getattr(source, key)!r:.60}")
        setattr(source, key, str(getattr(source, key)))
    if not isinstance(source.filter, dict) or not (source.cap is None or type(source.cap) is int and source.cap > 0):
        raise ValueError(f"{where}: filter is a dict {{column: regular expression}}, cap a number above 0")
    if type(source.heldout) is not bool:
        raise ValueError(f"{where}: heldout is True or False")
    if not isinstance(source.columns, dict) or not all(isinstance(x, str) for x in [*source.columns.values()]):
        raise ValueError(f"{where}: columns is a dict such as {{'text': 'script'}}: our name of a column, and its name "
                         "in the files")  # fmt: skip
    source.columns = {column_name(str(ours)): column_name(theirs) for ours, theirs in source.columns.items()}
    source.speaker = normalise(source.speaker)
    source.language = language_name(source.language)
    if source.text_format:
        wording(source.text_format, language="en")  # raises for a wrong one
    try:
        source.filter = {str(column): str(pattern) for column, pattern in source.filter.items()}
        for pattern in source.filter.values():
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"source {source.path}: its filter {source.filter!r:.100} is no regular expression "
                         f"({error})") from None  # fmt: skip
    return source


def folder_language(file):
    """The language that lang.txt in the folder of a file names; "" without one. Raises ValueError where it holds
    something else."""
    path = os.path.join(os.path.dirname(file), LANGUAGE_FILE)
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as text:
        name = language_name(text.read(100).decode("utf-8-sig", "replace"))
    if not re.fullmatch(r"[a-z0-9-]{1,40}", name):
        raise ValueError(f"{path}: names the language of the texts, as en or zh-cn, not {name!r:.60}")
    return name


def find_files(path, split=""):
    """The files that a source's path means: itself, what a pattern matches, a folder's metadata, its shards, or the
    folder itself, with a "/" behind it, where it holds files for each clip. split: only those whose name or folder
    has this name, as data/train-00000-of-00001.parquet. Raises ValueError or FileNotFoundError."""
    if os.path.isdir(path):
        found = list_folder(path)
    elif os.path.exists(path):
        found = [path]
    elif glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))
        if not found:
            raise ValueError(f"source {path}: no file matches this pattern")
    else:
        raise FileNotFoundError(f"source {path}: no such file or folder{hub_advice(path)}")
    if not split:
        return found
    word = re.compile(rf"(metadata[_-])?{re.escape(split)}([-_.]|$)")
    below = {file: os.path.relpath(file, path if os.path.isdir(path) else os.path.dirname(path)) for file in found}
    chosen = [file for file in found if any(word.match(name) for name in below[file].split(os.sep))]
    if not chosen:
        raise ValueError(f"source {path}: no file of the split {split!r:.60}; it has {', '.join(below.values()):.200}")
    return chosen


def list_folder(path):
    """The files of a folder; see find_files."""
    inside = glob.escape(path)
    for names in (METADATA[:1], PAIR, METADATA):
        if found := [file for name in names if os.path.isfile(file := os.path.join(path, name))]:
            return found if names is PAIR else found[:1]
    shards = [os.path.join(inside, "**", name) for name in SHARDS]
    if found := sorted(itertools.chain(*(glob.glob(shard, recursive=True) for shard in shards))):
        return found
    if any(True for _ in clips(path)):
        return [os.path.join(path, "")]
    script = os.path.join(path, "prepare.py")
    advice = f"run python {script} first" if os.path.isfile(script) else "name the file itself"
    raise ValueError(f"source {path}: none of {', '.join(METADATA + SHARDS)} in this folder, and no clips with a .json "
                     f"or .txt each; {advice}")  # fmt: skip


def hub_advice(path):
    """How to download a data set of the hub, where a path looks like the name of one; else ""."""
    name = re.fullmatch(r"[\w-][\w.-]*/([\w-][\w.-]*)", path)
    if not name or os.path.splitext(path)[1][1:].lower() in {*EXTENSIONS, "csv", "tsv", "txt", "json", "jsonl", "tar"}:
        return ""
    local = f"data/{name[1]}"
    return (f"; to fetch a data set of that name from the hub: hf download {path} --repo-type dataset --local-dir "
            f"{local}, then give {local}")  # fmt: skip


def need_columns(columns, path, renamed):
    """Raise ValueError for a file without rows, or without a column for the audio or the text.

    renamed: {our name of a column: its name in the file}, which the recipe gives."""
    if not columns:
        raise ValueError(f"{path}: no rows in it")
    if missing := [theirs for theirs in renamed.values() if theirs not in columns]:
        raise ValueError(f"{path}: columns names {missing[0]!r:.60}, but its columns are {', '.join(columns):.100}")
    if not has_columns(columns):
        raise ValueError(f"{path}: its columns are {', '.join(columns):.100}; it needs one for the audio (audio, path, "
                         f"file, id, ...) or its codes ({', '.join(COLUMNS['codes'])}) and one for the text (text, "
                         "sentence, ...); where they have other names, say so: {'path': ..., 'columns': {'text': "
                         "'script'}}")  # fmt: skip


# -----------------------------------------------------------------------------
# rows


def read_row(row, n, place, problem, path, source, usual):
    """Row n {column: value} of the file `path` -> an utterance, with a reason where the row is at fault.

    source: its Source, which counts more than the row. usual: the language of a row that names none."""
    problems = [problem] if problem else []

    def read(function, otherwise, *args):
        try:
            return function(*args)
        except ValueError as error:
            problems.append(str(error))
            return otherwise

    held = read(content, b"", row)
    vector = read(read_vector, None, row)
    audio = read(as_text, "", row, "audio")
    text = speakable(read(as_text, "", row, "text"))
    # Tables write a whole number as 1.0 where a field of its column is empty.
    speaker = source.speaker or normalise(re.sub(r"^(\d+)\.0$", r"\1", read(as_text, "", row, "speaker"))) or SOMEBODY
    language = source.language or language_name(read(as_text, "", row, "language")) or usual
    name = utterance_id(audio, path) or (place if held is None else f"{os.path.basename(path).partition('.')[0]}/{n}")
    name = plain(f"{source.name}/{name}" if source.name else name)
    u = Utterance(name, path, plain(audio), text, speaker, language, source.text_format, source.heldout,
                  columns=source.columns or None, vector=vector)  # fmt: skip
    if held is not None:  # its start and end say where the recording was cut out of another
        u.row = n
        if not isinstance(held, bytes):
            u.codes = (*held.shape, int(held.min()), int(held.max()))
    elif not problems:
        problems += filter(None, [cut(u, row)])
    if not problems and not audio and held is None:
        problems = ["no audio"]
    if problems:
        u.reason = "bad row"
        u.detail = plain(f"{place}: {problems[0]}")
    elif not u.text.strip():
        u.reason = "empty text"
    return u


def cell(row, column):
    """A field as text, "" where it is missing; of a recording its name."""
    value = row.get(column)
    value = value.get("path") if isinstance(value, dict) else value
    return "" if value is None else str(value).strip()


def as_text(row, kind):
    """The field of this kind of column, as text: NaN is empty, 1.0 is 1; of a recording its name. The texts keep spaces
    and line breaks around them. Raises ValueError where it is not a text or a number."""
    for name in COLUMNS[kind]:
        value = row.get(name)
        if kind == "audio" and isinstance(value, dict):
            value = value.get("path")
        if isinstance(value, float):
            value = None if not math.isfinite(value) else int(value) if value.is_integer() else value
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            raise ValueError(f"{name} is of the type {type(value).__name__}, not text")
        text = "" if value is None else str(value)
        if text.strip():
            return text if kind == "text" else text.strip()
    return ""


def plain(name):
    """A name with only characters that a file in UTF-8 can hold: halves of surrogate pairs become escapes."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def content(row):
    """What a row itself holds: codes (T, K), the bytes of a recording (empty where they are not read), or None."""
    if (codes := read_codes(row)) is not None:
        return codes
    sounds = (row[name] for name in COLUMNS["audio"] if isinstance(row.get(name), dict))
    sound = next((sound["bytes"] for sound in sounds if "bytes" in sound), None)
    if not isinstance(sound, bytes | None):
        raise ValueError(f"its recording is of the type {type(sound).__name__}, not bytes")
    return sound


def read_codes(row):
    """The codes (T, K) that a row holds, or None. Raises ValueError where they contradict each other."""
    layers = [name for name in row if name.startswith("nano_layer_")]
    if layers:
        books = [row.get(f"nano_layer_{k}") or [] for k in range(1, len(layers) + 1)]
    elif "audio_tokens" in row:
        books = row["audio_tokens"]
    else:
        return None
    if not isinstance(books, list) or not all(isinstance(book, list) for book in books):
        raise ValueError("its codes are no lists, one for each codebook")
    lengths = {len(book) for book in books}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"its codebooks have {', '.join(str(len(book)) for book in books) or 'no'} codes")
    codes = np.array(books)
    whole = all(set(map(type, book)) == {int} for book in books)  # numpy takes True for 1
    if codes.ndim != 2 or codes.dtype.kind != "i" or not whole:
        raise ValueError("its codes are not whole numbers")
    for name in COLUMNS["frames"]:
        frames = cell(row, name).strip("[]").removesuffix(".0")
        if frames and frames != str(codes.shape[1]):
            raise ValueError(f"{name} is {frames:.40}, but it has {codes.shape[1]} frames")
    return codes.T


def read_vector(row):
    """The speaker vector (E,) float32 that a row holds, or None. Raises ValueError where it is not finite numbers."""
    name = next((name for name in COLUMNS["vector"] if row.get(name) is not None), None)
    if name is None:
        return None
    numbers = row[name]
    if not isinstance(numbers, list) or not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
        raise ValueError(f"{name} is not a list of finite numbers")
    if not numbers:
        raise ValueError(f"{name} is empty")
    return np.array(numbers, np.float32)


def cut(u, row):
    """Give an utterance the stretch of its recording that its row names; returns what is wrong with it, or ""."""

    def time(kind):
        values = (str(row[name]).strip() for name in COLUMNS[kind] if row.get(name) is not None)
        return next(filter(None, values), "")

    start, end, duration = map(time, ("start", "end", "duration"))
    try:
        u.start = float(start or 0)
        if end or start and duration:
            u.end = float(end) if end else u.start + float(duration)
    except ValueError:
        return f"start {start!r:.60}, end {end or duration!r:.60}: not numbers of seconds"
    if start or end:
        u.id += f"_{start or 0}-{end or duration}"
    sound = 0 <= u.start < (LONGEST if u.end is None else u.end) <= LONGEST
    return "" if sound else f"from {u.start:g} s to {u.end} s"


def utterance_id(audio, metadata):
    """The id of an utterance: the path of its audio below its metadata, without wavs/ and without extension."""
    folder = os.path.dirname(os.path.abspath(metadata)) + os.sep
    name = " ".join(audio.removeprefix(folder).replace("\\", "/").split())
    name = re.sub(r"^(\./|wavs/|clips/|audio/)+", "", name)
    stem, _, extension = name.rpartition(".")
    return stem if extension.lower() in EXTENSIONS else name


def spellings(name):
    """A file's name and its spellings on other systems: / for the separators of Windows, an accent as a character of
    its own (macOS) or in one character with its letter."""
    path = name.replace("\\", "/")
    return list(dict.fromkeys([name, path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD"))]))


def fraction(name):
    """A number in [0, 1) that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def load(utterances):
    """The utterances one by one, with their content where their source holds it. In the order of the source that reads
    it once. Raises ValueError where the source has changed since."""
    source = None
    last = -1
    for u in utterances:
        if u.row >= 0 and u.content is None:
            if u.source != source or u.row <= last:
                source = u.source
                rows = enumerate(read_rows(source, whole=True, columns=u.columns))
            last = u.row
            row = next((row for n, (_, row, _) in rows if n == last), None)
            if row is None:
                raise ValueError(f"{source}: has changed while it was read")
            try:
                u = replace(u, content=content(row))
            except ValueError as error:
                raise ValueError(f"{source}: {u.id} cannot be read ({error})") from None
        yield u

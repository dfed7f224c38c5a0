"""Sources -> utterances: metadata beside recordings, tables and tar shards that hold recordings or codes.

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
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from parts.frontend import language_name
from parts.tables import COLUMNS, EXTENSIONS, column_name, has_columns, read_rows
from parts.text import normalise, speakable

METADATA = ["metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json", "metadata.txt"]
SHARDS = ["*.parquet", "*.tar", "*.tar.gz", "*.tgz", "*.jsonl", "*.jsonl.gz"]  # in a folder without metadata
SOMEBODY = "speaker"  # who speaks where nothing says it
KEYS = {"path", "speaker", "language", "filter", "cap", "name"}  # of a source
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
    script: str = ""  # of most of its letters
    start: float = 0.0  # seconds
    end: float | None = None
    seconds: float = 0.0
    silence: float = 0.0  # seconds, at the end that has more of it
    codes: tuple = ()  # where the source has codes: frames, codebooks, lowest and highest code
    row: int = -1  # in the source, where that holds the recording or the codes
    content: bytes | np.ndarray | None = None  # that recording, or codes (T, K), while they are worked on
    vector: np.ndarray | None = None  # (E,) float32, a speaker encoder's
    reason: str = ""  # why it is not used; empty: it is used
    detail: str = ""


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
    path, said, tests, cap, prefix = check_source(source)
    utterances = []
    passed = []
    for file in find_files(path):
        columns = {}
        usual = folder_language(file)
        rows = tqdm(read_rows(file), "reading", unit=" utt", leave=False, disable=None)
        for n, (place, row, problem) in enumerate(rows):
            u = read_row(row, n, place, problem, file, said, usual)
            u.id = prefix + u.id
            utterances.append(u)
            columns |= dict.fromkeys(row)
            if all(pattern.fullmatch(field(row, column)) for column, pattern in tests):
                passed.append(u)
            else:
                u.reason = "filtered out"
        need_columns(columns, file)
    if not passed:
        raise ValueError(f"{path}: none of its {len(utterances)} rows passes the filter {source['filter']!r:.100}; "
                         f"columns: {', '.join(columns):.100}")
    # The hash draws a fair sample, always the same. Its own word "cap" keeps it apart from the hash that splits.
    for u in sorted(passed, key=lambda u: fraction(f"cap {u.id}"))[cap or len(passed) :]:
        u.reason = "beyond the cap"
    return utterances


def check_source(source):
    """A source as (path, {"speaker", "language"} of all its rows, [(column, pattern)] of its filter, cap, prefix of its
    ids). Raises ValueError."""
    source = source if isinstance(source, dict) else {"path": source}
    path, cap = source.get("path"), source.get("cap")
    wanted = source.get("filter", {})
    said = {key: "" if source.get(key) is None else source[key] for key in ("speaker", "language")}
    if not isinstance(path, str) or set(source) - KEYS:
        raise ValueError(f"source {source!r:.100}: has a path and may have {', '.join(sorted(KEYS - {'path'}))}, "
                         "nothing else")  # fmt: skip
    if not isinstance(wanted, dict) or not (cap is None or type(cap) is int and cap > 0):
        raise ValueError(f"source {source!r:.100}: filter is a dict {{column: regular expression}}, cap a number above "
                         "0")  # fmt: skip
    for key, value in said.items():
        if not isinstance(value, str | int):
            raise ValueError(f"source {source!r:.100}: {key} is a text, not {value!r:.60}")
    said = {"speaker": normalise(str(said["speaker"])), "language": language_name(str(said["language"]))}
    try:
        tests = [(column_name(str(column)), re.compile(str(pattern))) for column, pattern in wanted.items()]
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"source {path}: its filter {wanted!r:.100} is no regular expression ({error})") from None
    return path, said, tests, cap, f"{source['name']}/" if source.get("name") else ""


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


def find_files(path):
    """The files that a source's path means: itself, what a pattern matches, a folder's metadata or else its shards."""
    if os.path.isdir(path):
        if found := [file for name in METADATA if os.path.isfile(file := os.path.join(path, name))]:
            return found[:1]
        shards = [os.path.join(glob.escape(path), "**", name) for name in SHARDS]
        if found := sorted(itertools.chain(*(glob.glob(shard, recursive=True) for shard in shards))):
            return found
        script = os.path.join(path, "prepare.py")
        advice = f"run python {script} first" if os.path.isfile(script) else "name the file itself"
        raise ValueError(f"source {path}: none of {', '.join(METADATA + SHARDS)} in this folder; {advice}")
    if os.path.exists(path) or not glob.has_magic(path):
        return [path]
    if found := sorted(glob.glob(path, recursive=True)):
        return found
    raise ValueError(f"source {path}: no file matches this pattern")


def need_columns(columns, path):
    """Raise ValueError for a file without rows, or without a column for the audio or the text."""
    if not columns:
        raise ValueError(f"{path}: no rows in it")
    if not has_columns(columns):
        raise ValueError(f"{path}: its columns are {', '.join(columns):.100}; it needs one for the audio (audio, path, "
                         f"file, id, ...) or its codes ({', '.join(COLUMNS['codes'])}) and one for the text (text, "
                         "sentence, transcription, ...): parts/tables.py has all names")


# -----------------------------------------------------------------------------
# rows


def read_row(row, n, place, problem, path, said, usual):
    """Row n {column: value} of the file `path` -> an utterance, with a reason where the row is at fault.

    said: {"speaker", "language"}, whatever the row says; "": the row says it. usual: the language of a row that does
    not."""
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
    speaker = said["speaker"] or normalise(re.sub(r"^(\d+)\.0$", r"\1", read(as_text, "", row, "speaker"))) or SOMEBODY
    language = said["language"] or language_name(read(as_text, "", row, "language")) or usual
    name = utterance_id(audio, path) or (place if held is None else f"{os.path.basename(path).partition('.')[0]}/{n}")
    u = Utterance(plain(name), path, plain(audio), text, speaker, language, vector=vector)
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


def field(row, column):
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
        frames = field(row, name).strip("[]").removesuffix(".0")
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
                rows = enumerate(read_rows(source, whole=True))
            last = u.row
            row = next((row for n, (_, row, _) in rows if n == last), None)
            if row is None:
                raise ValueError(f"{source}: has changed while it was read")
            try:
                u = replace(u, content=content(row))
            except ValueError as error:
                raise ValueError(f"{source}: {u.id} cannot be read ({error})") from None
        yield u

"""What people have -> utterances: metadata beside recordings, tables and tar shards that hold recordings or codes.

- Told apart by what a file is, not by its name: LJSpeech (`id|text|normalised`), csv or tsv with a header, json or
  jsonl, parquet, tar; text and tar also compressed.
- Every reader is a generator of the same rows, (place, {column: value}, problem), so that a file may be larger than
  memory; read_row makes an utterance of each.
- Recordings inside a file: an audio column of `bytes` and `path`, as Hugging Face's datasets write it; a member .wav,
  .flac, .mp3, ... of a WebDataset shard, beside .json or .txt.
- Codes inside a file: `audio_tokens`, codebooks x frames (Marvis TTS: preprocess_mimi.py, data.py); `nano_layer_1`,
  `nano_layer_2`, ... and `encoded_len` (KaniTTS: dataset_processor.py). No recording is read for these.
- What lies inside a file stays there: utterances only note its row, and `load` reads the file once more, in step.

Letters in shapes: K codebooks, T frames.
"""

import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import re
import tarfile
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from tqdm import tqdm

from data import normalise

# names of columns, the preferred first
AUDIO = ["audio", "audio_path", "audio_file", "audio_filepath", "path", "file", "file_name", "filename", "wav", "id"]
TEXT = ["normalised", "normalized", "normalised_text", "normalized_text", "normalized_transcription"]
TEXT += ["text", "sentence", "transcript", "transcription"]
SPEAKER = ["speaker", "speaker_name", "speaker_id", "spk", "voice", "client_id"]
START, END, DURATION = ["start", "start_time", "begin", "offset"], ["end", "end_time", "stop"], ["duration"]
CODES, FRAMES = ["audio_tokens", "nano_layer_1"], ["encoded_len", "audio_tokens_length"]
METADATA = ["metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json", "metadata.txt"]
SHARDS = ["*.parquet", "*.tar", "*.tar.gz", "*.tgz", "*.jsonl", "*.jsonl.gz"]  # in a folder without metadata
EXTENSIONS = ["wav", "flac", "ogg", "oga", "opus", "mp3", "aiff", "aif", "aifc", "au", "snd", "caf", "w64", "rf64"]


@dataclass(slots=True)
class Utterance:
    id: str
    source: str  # the file it is from
    audio: str  # as the source names it; the file's path once it is found
    text: str
    speaker: str
    start: float = 0.0  # seconds
    end: float | None = None
    seconds: float = 0.0
    silence: float = 0.0  # seconds of it at the end that has more
    codes: tuple = ()  # where the source has codes: frames, codebooks, lowest and highest code
    row: int = -1  # of the source, where it holds the recording or the codes
    content: bytes | np.ndarray | None = None  # that recording, or codes (T, K), while they are worked on
    reason: str = ""  # why it is not used; empty: it is
    detail: str = ""


# -----------------------------------------------------------------------------
# files -> rows


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


def read_rows(path, whole=False):
    """Rows of a file: (place, {column: value}, problem), `problem` empty for a sound row. Recordings in the file come
    only when it is read `whole`, else without their bytes. Raises ValueError, one line, where the file is broken."""
    try:
        with open(path, "rb") as file:
            head = file.read(4)
        if head == b"PAR1":
            rows = read_parquet(path, whole)
        else:
            rows = read_tar(path, whole) if tarfile.is_tarfile(path) else read_text(path, head)
        for place, row, problem in rows:
            yield place, {column_name(name): value for name, value in row.items()}, problem
    except UnicodeDecodeError:
        raise ValueError(f"{path}: neither parquet nor a tar, and not a text file in UTF-8") from None
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: is broken ({error})") from None


@lru_cache
def column_name(name):
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def read_text(path, head):
    """Rows of a text file: json where it begins so, else a table."""
    opener = gzip.open if head[:2] == b"\x1f\x8b" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        while (first := file.read(1)).isspace():
            pass
        file.seek(0)
        if first == "[":
            for n, row in enumerate(parse(file.read(), path), 1):
                yield f"row {n}", need_fields(row, path), ""
        elif first == "{":
            for n, line in enumerate(file, 1):
                where = f"{path}, line {n}"
                if line.strip():
                    yield f"line {n}", need_fields(parse(line, where), where), ""
        else:
            yield from read_table(path, file.read())


def read_table(path, text):
    """Rows of a csv, tsv or LJSpeech-like file."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = next((d for d in "|\t" if d in first), ";" if first.count(";") > first.count(",") else ",")
    # In LJSpeech's layout, and in some tsv files, quotation marks belong to the text.
    styles = {"|": [csv.QUOTE_NONE], "\t": [csv.QUOTE_MINIMAL, csv.QUOTE_NONE]}.get(delimiter, [csv.QUOTE_MINIMAL])
    for quoting in styles:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        try:
            rows = [(reader.line_num, row) for row in reader if any(field.strip() for field in row)]
            break
        except csv.Error as error:
            problem = f"{path}, line {reader.line_num}: {error}"
    else:
        raise ValueError(problem)
    header = [column_name(name) for name in rows[0][1]] if rows else []
    if delimiter == "|" and not has_columns(header):
        header = ["id", "text", "normalised"][: len(header)]
    else:
        rows = rows[1:]
    for n, row in rows:
        problem = "" if len(row) == len(header) else f"{len(row)} fields instead of {len(header)}"
        yield f"line {n}", dict(zip(header, row, strict=False)), problem


def parse(text, where, read=json.loads, kind="JSON"):
    try:
        return read(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not {kind} ({error})") from None


def need_fields(row, where):
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {row!r:.40} is not an object with the fields audio and text")
    return row


def read_tar(path, whole):
    """Rows of a WebDataset shard: members whose names agree up to the first dot are one row."""

    def key(member):
        folder, slash, name = member.name.removeprefix("./").rpartition("/")
        return folder + slash + name.partition(".")[0]

    with tarfile.open(path) as tar:
        for name, members in itertools.groupby((member for member in tar if member.isfile()), key):
            fields, more, kinds = {}, {}, set()
            for member in members:
                kind, where = member.name.rpartition(".")[2].lower(), f"{path}, {member.name}"
                if kind in kinds:
                    raise ValueError(f"{where}: a second .{kind} of {name}; names that agree up to a dot are one row")
                kinds.add(kind)
                if kind == "json":
                    fields = need_fields(parse(tar.extractfile(member).read(), where), where)
                elif kind == "txt":
                    more["text"] = parse(tar.extractfile(member).read(), where, bytes.decode, "UTF-8")
                elif kind in EXTENSIONS:
                    more["audio"] = {"path": member.name, "bytes": tar.extractfile(member).read() if whole else b""}
            if fields or more:
                yield name, {"id": name, **fields, **more}, ""
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) != bytes(512):  # tarfile takes whatever is no member for the end
            raise EOFError(f"breaks off after {tar.offset:,} bytes")


def read_parquet(path, whole):
    """Rows of a parquet file, one of its row groups in memory at a time."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: parquet files need the package pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            sounds = {leaf.removesuffix(".bytes") for leaf in leaves if leaf.endswith(".bytes")}
            columns = leaves if whole else [leaf for leaf in leaves if leaf.removesuffix(".bytes") not in sounds]
            groups = (file.iter_batches(64, [i], columns) for i in range(file.num_row_groups))
            batches = itertools.chain.from_iterable(groups)
            for n, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                yield f"row {n}", row | {name: {"bytes": b""} | (row.get(name) or {}) for name in sounds}, ""
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: is broken ({error})") from None


# -----------------------------------------------------------------------------
# rows -> utterances


def has_columns(columns):
    return bool(set(columns) & {*AUDIO, *CODES} and set(columns) & set(TEXT))


def field(row, column):
    """A field as text, empty where there is none; of a recording its name."""
    value = row.get(column)
    value = value.get("path") if isinstance(value, dict) else value
    return "" if value is None else str(value).strip()


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
    if codes.ndim != 2 or codes.dtype.kind != "i":
        raise ValueError("its codes are not whole numbers")
    for name in FRAMES:
        if (said := field(row, name).strip("[]").removesuffix(".0")) and said != str(codes.shape[1]):
            raise ValueError(f"{name} is {said}, but it has {codes.shape[1]} frames")
    return codes.T


def content(row):
    """What a row itself holds: codes (T, K), the bytes of a recording, empty where they are not read, or None."""
    if (codes := read_codes(row)) is not None:
        return codes
    sounds = (row[name] for name in AUDIO if isinstance(row.get(name), dict))
    return next((sound["bytes"] for sound in sounds if "bytes" in sound), None)


def read_source(source, lowercase=False):
    """One source -> its utterances in the order of its files, those it does not want with their reason.
    Raises ValueError or FileNotFoundError, one line, where it cannot be read or makes no sense."""
    source = source if isinstance(source, dict) else {"path": source}
    cap, wanted = source.get("cap"), source.get("filter", {})
    if not isinstance(source.get("path"), str) or set(source) - {"path", "speaker", "filter", "cap", "name"}:
        raise ValueError(f"source {source}: takes a path and, if need be, speaker, filter, cap, name")
    if not isinstance(wanted, dict) or not (cap is None or type(cap) is int and cap > 0):
        raise ValueError(f"source {source}: filter is a dict {{column: regular expression}}, cap a number above 0")
    path, prefix = source["path"], f"{source['name']}/" if source.get("name") else ""
    try:
        tests = [(column_name(column), re.compile(str(pattern))) for column, pattern in wanted.items()]
    except re.error as error:
        raise ValueError(f"source {path}: {error.pattern!r} in its filter is no regular expression ({error})") from None
    utterances, passed = [], []
    for file in find_files(path):
        speaker = source.get("speaker") or os.path.basename(os.path.dirname(os.path.abspath(file))) or "speaker"
        speaker, columns = normalise(str(speaker)), {}
        rows = tqdm(read_rows(file), "reading", unit=" utt", leave=False, disable=None)
        for n, (place, row, problem) in enumerate(rows):
            u = read_row(row, n, place, problem, file, speaker, lowercase)
            u.id = prefix + u.id
            utterances.append(u)
            columns |= dict.fromkeys(row)
            if all(pattern.fullmatch(field(row, column)) for column, pattern in tests):
                passed.append(u)
            else:
                u.reason = "filtered out"
        if not columns:
            raise ValueError(f"{file}: no rows in it")
        if not has_columns(columns):
            audio = f"one for the audio ({', '.join(AUDIO)}) or its codes ({', '.join(CODES)})"
            wants = f"it needs {audio} and one for the text ({', '.join(TEXT)})"
            raise ValueError(f"{file}: its columns are {', '.join(columns)}; {wants}")
    if not passed:
        columns = ", ".join(columns)
        raise ValueError(f"{path}: none of its {len(utterances)} rows passes the filter {wanted}; columns: {columns}")
    # A fair sample, the same each time, and not the utterances that the split by hash would hold out.
    for u in sorted(passed, key=lambda u: fraction(f"cap {u.id}"))[cap or len(passed) :]:
        u.reason = "beyond the cap"
    return utterances


def read_row(row, n, place, problem, path, speaker, lowercase):
    """Row n {column: value} of the file `path` -> an utterance, with a reason where the row is at fault."""

    def pick(names):
        return next((text for name in names if (text := field(row, name))), "")

    try:
        held = content(row)
    except ValueError as error:
        held, problem = b"", problem or str(error)
    audio = pick(AUDIO)
    name = utterance_id(audio, path) or (place if held is None else f"{os.path.basename(path).partition('.')[0]}/{n}")
    u = Utterance(name, path, audio, normalise(pick(TEXT), lowercase), normalise(pick(SPEAKER)) or speaker)
    if held is None:
        problem = problem or cut(u, pick(START), pick(END), pick(DURATION))
    else:  # start and end there say where it once was cut out
        u.row = n
        if not isinstance(held, bytes):
            u.codes = (*held.shape, int(held.min()), int(held.max()))
    if problem or not audio and held is None:
        u.reason, u.detail = "bad row", f"{place}: {problem or 'no audio'}"
    elif not u.text:
        u.reason = "empty text"
    return u


def cut(u, start, end, duration):
    """Give an utterance the stretch of its recording that its fields name; returns what is wrong with them, if any."""
    try:
        u.start = float(start or 0)
        if end or start and duration:
            u.end = float(end) if end else u.start + float(duration)
    except ValueError:
        return f"start {start!r}, end {end or duration!r}: not numbers of seconds"
    if start or end:
        u.id += f"_{start or 0}-{end or duration}"
    return "" if 0 <= u.start < (math.inf if u.end is None else u.end) else f"from {u.start:g} s to {u.end} s"


def utterance_id(audio, metadata):
    """What an utterance is called: its audio's path below the metadata, without wavs/ and without extension."""
    folder = os.path.dirname(os.path.abspath(metadata)) + os.sep
    name = re.sub(r"^(\./|wavs/|clips/|audio/)+", "", " ".join(audio.removeprefix(folder).split()))
    stem, _, extension = name.rpartition(".")
    return stem if extension.lower() in EXTENSIONS else name


def fraction(name):
    """A number in [0, 1) that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def load(utterances):
    """The utterances one by one, with their content where their source holds it. In the order of the source that reads
    it once. Raises ValueError where the source has changed meanwhile."""
    source, rows, last = None, None, -1
    for u in utterances:
        if u.row >= 0 and u.content is None:
            if u.source != source or u.row <= last:
                source, rows = u.source, enumerate(read_rows(u.source, whole=True))
            last, row = u.row, next((row for n, (_, row, _) in rows if n == u.row), None)
            if row is None:
                raise ValueError(f"{source}: has changed while it was read")
            u = replace(u, content=content(row))
        yield u

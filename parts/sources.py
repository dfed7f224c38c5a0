"""What people have -> utterances: metadata beside recordings, tables and tar shards that hold recordings or codes.

- Told apart by what a file is, not by its name: LJSpeech (`id|text|normalised`), csv or tsv with a header, json or
  jsonl, parquet, tar; text and tar also compressed. A table with | and without a header may name speakers too.
- Every reader is a generator of the same rows, (place, {column: value}, problem), so that a file may be larger than
  memory; read_row makes an utterance of each.
- Recordings inside a file: an audio column of `bytes` and `path`, as Hugging Face's datasets write it; a member .wav,
  .flac, .mp3, ... of a WebDataset shard, beside .json or .txt.
- Codes inside a file: `audio_tokens`, codebooks x frames (Marvis TTS: preprocess_mimi.py, data.py); `nano_layer_1`,
  `nano_layer_2`, ... and `encoded_len` (KaniTTS: dataset_processor.py). No recording is read for these.
- What lies inside a file stays there: utterances only note its row, and `load` reads the file once more, in step.
- A table, a shard's .json too, may name any audio file that this user may read, outside its own folder as well: look at
  those of people whom you do not trust.

Letters in shapes: K codebooks, T frames.
"""

import codecs
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
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from tqdm import tqdm

from parts.text import normalise

# names of columns, the preferred first
AUDIO = ["audio", "audio_path", "audio_file", "audio_filepath", "path", "file", "file_name", "filename", "wav", "id"]
TEXT = ["normalised", "normalized", "normalised_text", "normalized_text", "normalized_transcription"]
TEXT += ["text", "sentence", "transcript", "transcription"]
SPEAKER = ["speaker", "speaker_name", "speaker_id", "spk", "voice", "client_id"]
START, END, DURATION = ["start", "start_time", "begin", "offset"], ["end", "end_time", "stop"], ["duration"]
CODES, FRAMES = ["audio_tokens", "nano_layer_1"], ["encoded_len", "audio_tokens_length"]
METADATA = ["metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json", "metadata.txt"]
SHARDS = ["*.parquet", "*.tar", "*.tar.gz", "*.tgz", "*.jsonl", "*.jsonl.gz"]  # in a folder without metadata
SOMEBODY = "speaker"  # who speaks where nothing says it
EXTENSIONS = ["wav", "flac", "ogg", "oga", "opus", "mp3", "aiff", "aif", "aifc", "au", "snd", "caf", "w64", "rf64"]
ROW, FILE = 2**24, 2**30  # most bytes or characters of a row's text, and of what has to be read in one piece
LIMITS = {"json": ROW, "txt": ROW, **dict.fromkeys(EXTENSIONS, FILE)}  # of a shard's members


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
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: is not a file")
    try:
        with open(path, "rb") as file:
            head = file.read(4)
        if head == b"PAR1":
            rows = read_parquet(path, whole)
        else:
            rows = read_tar(path, whole) if tarfile.is_tarfile(path) else read_text(path, head)
        for place, row, problem in rows:
            yield place, {column_name(name): value for name, value in row.items()}, problem
    except MemoryError:
        raise ValueError(f"{path}: needs more memory than there is: split it") from None
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: is broken ({error!s:.200})") from None
    except OSError as error:  # bz2's errors do not name the file
        raise error if error.filename else ValueError(f"{path}: is broken ({error})") from None


@lru_cache
def column_name(name):
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def read_text(path, head):
    """Rows of a text file: json where it begins so, else a table."""
    opener = gzip.open if head[:2] == b"\x1f\x8b" else open
    with opener(path, "rb") as file:
        utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        with opener(path, "rt", encoding="utf-16" if utf16 else "utf-8-sig", newline="") as file:
            first = file.read(4096)
            file.seek(0)
            if "\0" in first:
                raise ValueError(f"{path}: neither parquet nor a tar, and not a text file, as it holds zeros")
            yield from read_json(file, path) if first.lstrip()[:1] in ("[", "{") else read_table(file, path)
    except UnicodeDecodeError as error:
        says = f"UTF-16 ({error.reason})" if utf16 else f"UTF-8 ({wrong_byte(path, opener)}): save it as UTF-8"
        raise ValueError(f"{path}: neither parquet nor a tar, and not a text file in {says}") from None


def wrong_byte(path, opener):
    """Where a file is not UTF-8, in words."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with opener(path, "rb") as file:
        try:
            while piece := file.read(2**20):
                decoder.decode(piece)
                line += piece.count(b"\n")
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            return f"byte 0x{error.object[error.start]:02x} in line {line}"
    return "its last character is cut off"


def need_room(size, most, where):
    if size > most:
        raise ValueError(f"{where}: larger than {most // 2**20:,} MB, which nothing of its kind should be")


def read_whole(file, path):
    """The text of an open file."""
    text = file.read(FILE + 1)
    need_room(len(text), FILE, path)
    return text


def read_json(file, path):
    """Rows of a list of objects, or of lines with an object each."""
    first = file.read(4096).lstrip()[0]
    file.seek(0)
    if first == "[":
        for n, row in enumerate(parse(read_whole(file, path), path), 1):
            yield f"row {n}", need_fields(row, path), ""
        return
    for n, line in enumerate(iter(lambda: file.readline(ROW + 1), ""), 1):
        where = f"{path}, line {n}"
        need_room(len(line), ROW, where)
        if line.strip():
            yield f"line {n}", need_fields(parse(line, where), where), ""


def read_table(file, path):
    """Rows of a csv, tsv or LJSpeech-like file."""
    text = read_whole(file, path)
    first = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
    delimiter = next((d for d in "|\t" if d in first), ";" if first.count(";") > first.count(",") else ",")
    if delimiter == "|" and not has_columns(names_of(first.split("|"))):
        rows, joined = split(path, text, delimiter, csv.QUOTE_NONE), set()
        header = name_columns(path, [fields for _, _, fields in rows])
    else:
        rows, joined = read_quoted(path, text, delimiter)
        header = names_of(rows[0][2]) if rows else []
        rows = rows[1:]
    if twice := [name for name, n in Counter(header).items() if n > 1 and name]:
        raise ValueError(f"{path}: two of its columns are named {twice[0]!r:.60}: which is meant?")
    for n, last, fields in rows:
        problem = "" if len(fields) == len(header) else f"{len(fields)} fields instead of {len(header)}"
        if n in joined:
            problem = f"a quotation mark opens here and closes in line {last}, after other rows"
        yield f"line {n}", dict(zip(header, fields, strict=False)), problem


def names_of(fields):
    return [column_name(field.strip(' "')) for field in fields]


def split(path, text, delimiter, quoting):
    """The rows of a table, as (first line, last line, fields). Raises ValueError where quotation marks contradict."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    rows, before = [], 0
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                rows.append((before + 1, reader.line_num, fields))
            before = reader.line_num
    except csv.Error as error:
        says = f"a quotation mark in the row that begins here does not close where it should ({error})"
        raise ValueError(f"{path}, line {before + 1}: {says}") from None
    return rows


def read_quoted(path, text, delimiter):
    """The rows of a table with a header, as `split` has them, and the first lines of those that took in other rows.
    Quotation marks are read as csv has them, or as part of the text where only so no row is lost."""
    tabular, rows, error = delimiter in "|\t", [], None
    try:
        rows = split(path, text, delimiter, csv.QUOTE_MINIMAL)
    except ValueError as contradiction:
        if not tabular:
            raise
        error = contradiction
    lines = list(io.StringIO(text, newline="")) if any(first < last for first, last, _ in rows) else []
    joined = {row[0] for row in rows[1:] if row[0] < row[1] and holds_rows(row, lines, delimiter, names_of(rows[0][2]))}
    if not error and not joined and (delimiter != "|" or is_even(rows)):
        return rows, joined
    bare = split(path, text, delimiter, csv.QUOTE_NONE)
    # Around a whole field marks are csv's own. With | and tabs the header alone tells: there, people quote speech.
    enclosed = any(re.fullmatch('".*"', field) for _, _, fields in bare[: 1 if tabular else None] for field in fields)
    if not enclosed and (tabular or is_even(bare)):
        return bare, set()
    if error:
        raise error
    return rows, joined


def is_even(rows):
    return len({len(fields) for _, _, fields in rows}) < 2


def holds_rows(row, lines, delimiter, header):
    """Whether a row of several lines took in other rows: a line of it has as many fields and names a recording."""
    first, last, fields = row
    column = next((header.index(name) for name in AUDIO if name in header), 0)
    own = shape(fields[column]) if column < len(fields) else ""
    for line in lines[first:last]:
        cells = [cell.strip(' "\r\n') for cell in line.split(delimiter)]
        if len(cells) < len(header):
            continue
        named = any(os.path.splitext(cell)[1][1:].lower() in EXTENSIONS for cell in cells)
        if named or delimiter in "|\t" or shape(cells[column]) == own:
            return True
    return False


def shape(name):
    """A name with its letters and its digits made alike: a1 of both c005 and LJ001."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "1", name))


def name_columns(path, rows):
    """The columns of a table with | and without a header, told by their content: `id|text`, `id|text|normalised` (the
    same sentence twice), `id|speaker|text`, `id|text|speaker` (few names). Raises ValueError where they may be else."""
    width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 2
    if width == 2:
        return ["id", "text"]
    second, third = ([row[k].strip() for row in rows if len(row) == width == 3] for k in (1, 2))
    both = [(a, b) for a, b in zip(second, third, strict=True) if a and b]
    both = both[:: len(both) // 1000 + 1]
    if width == 3 and agree(both):
        return ["id", "text", "normalised"]
    if are_names(second) != are_names(third):
        return ["id", "speaker", "text"] if are_names(second) else ["id", "text", "speaker"]
    # Numbers that are written out share no word: rows without digits decide.
    if width == 3 and not are_names(second) and agree([(a, b) for a, b in both if not re.search(r"\d", a)]):
        return ["id", "text", "normalised"]
    says = "id|text|normalised, id|text|speaker, id|speaker|text or id|text|phonemes"
    raise ValueError(f"{path}: has no header, and what its {width} columns are is not clear: add one, such as {says}")


def agree(pairs):
    """Whether at least half of the pairs (text, text) are the same sentence: half of the words of one, or more, are in
    the other, whatever their case and accents."""

    def words(text):
        letters = unicodedata.normalize("NFKD", text.casefold())
        return set(re.findall(r"\w+", "".join(c for c in letters if not unicodedata.combining(c))))

    return 2 * sum(2 * len(words(a) & words(b)) >= len(words(a)) for a, b in pairs) >= len(pairs)


def are_names(column):
    """Whether the fields of a column may be speakers: each a few words that come again."""
    values = set(column)
    return 2 * len(values) <= len(column) and all(v and len(v) <= 40 and len(v.split()) <= 3 for v in values)


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
        for name, members in itertools.groupby((member for member in tar if is_meant(member)), key):
            fields, more, kinds = {}, {}, set()
            for member in members:
                kind, where = member.name.rpartition(".")[2].lower(), f"{path}, {member.name:.100}"
                if kind in kinds:
                    says = f"a second .{kind} of {name:.100}; names that agree up to a dot are one row"
                    raise ValueError(f"{where}: {says}")
                kinds.add(kind)
                need_room(member.size, LIMITS.get(kind, math.inf), where)
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


def is_meant(member):
    """Whether a member of a tar is a file that somebody put there, and not what macOS adds to each."""
    return member.isfile() and not re.search(r"(^|/)(\._|__MACOSX/)", member.name)


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
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: is broken ({' '.join(str(error).split()):.200})") from None


# -----------------------------------------------------------------------------
# rows -> utterances


def has_columns(columns):
    return bool(set(columns) & {*AUDIO, *CODES} and set(columns) & set(TEXT))


def field(row, column):
    """A field as text, empty where there is none; of a recording its name."""
    value = row.get(column)
    value = value.get("path") if isinstance(value, dict) else value
    return "" if value is None else str(value).strip()


def as_text(row, names):
    """The first of these fields that is not empty, as text: NaN is empty, 1.0 is 1; of a recording its name. Raises
    ValueError where it is not a text or a number."""
    for name in names:
        value = row.get(name)
        if names is AUDIO and isinstance(value, dict):
            value = value.get("path")
        if isinstance(value, float):
            value = None if not math.isfinite(value) else int(value) if value.is_integer() else value
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            raise ValueError(f"{name} is of the type {type(value).__name__}, not text")
        if text := "" if value is None else str(value).strip():
            return text
    return ""


def plain(name):
    """A name with characters only that a file in UTF-8 can hold: no halves of surrogate pairs."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


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
    for name in FRAMES:
        if (said := field(row, name).strip("[]").removesuffix(".0")) and said != str(codes.shape[1]):
            raise ValueError(f"{name} is {said:.40}, but it has {codes.shape[1]} frames")
    return codes.T


def content(row):
    """What a row itself holds: codes (T, K), the bytes of a recording, empty where they are not read, or None."""
    if (codes := read_codes(row)) is not None:
        return codes
    sounds = (row[name] for name in AUDIO if isinstance(row.get(name), dict))
    sound = next((sound["bytes"] for sound in sounds if "bytes" in sound), None)
    if not isinstance(sound, bytes | None):
        raise ValueError(f"its recording is of the type {type(sound).__name__}, not bytes")
    return sound


def read_sources(sources, lowercase=False):
    """Sources, one or a list -> for each the list of its utterances, as `read_source` reads them. An id that another
    file's utterance has already, of another recording, would lose an utterance: then all ids of the later file get the
    part of its path in front that tells it from the earlier ones."""
    owners = {}  # id: the file, and whether it holds the recording
    for source in sources if isinstance(sources, list) else [sources]:
        found = read_source(source, lowercase)
        for path, group in itertools.groupby(found, lambda u: u.source):
            file, path = list(group), os.path.realpath(path)
            owner = {held: (path, held) for held in (False, True)}
            used = [(u, owner[u.row >= 0]) for u in file if not u.reason]
            others = {owners[u.id][0] for u, mine in used if u.id in owners and differ(u.id, mine, owners[u.id])}
            part = own_part(path, others) + "/" if others else ""
            for u in file:
                u.id = part + u.id
            for u, mine in used:
                owners.setdefault(u.id, mine)
        yield found


def differ(name, *owners):
    """Whether an id means two recordings to two (file, whether it holds the recording): one in each file, or of two
    folders."""
    places = {os.path.normpath(os.path.join(os.path.dirname(path), name)) for path, _ in owners}
    return len({path for path, _ in owners}) > 1 and (all(held for _, held in owners) or len(places) > 1)


def own_part(path, others):
    """A path without the folders at its start and the names at its end that it shares with all others."""
    paths = [file.split(os.sep) for file in (path, *others)]
    start = len(os.path.commonprefix(paths))
    end = len(paths[0]) - len(os.path.commonprefix([parts[::-1] for parts in paths]))
    return "/".join(paths[0][start:end] or paths[0][start - 1 : end] or paths[0][1:])


def read_source(source, lowercase=False):
    """One source -> its utterances in the order of its files, those it does not want with their reason.
    Raises ValueError or FileNotFoundError, one line, where it cannot be read or makes no sense."""
    source = source if isinstance(source, dict) else {"path": source}
    cap, wanted, speaker = source.get("cap"), source.get("filter", {}), source.get("speaker") or ""
    if not isinstance(source.get("path"), str) or set(source) - {"path", "speaker", "filter", "cap", "name"}:
        raise ValueError(f"source {source!r:.100}: takes a path and, if need be, speaker, filter, cap, name")
    if not isinstance(wanted, dict) or not (cap is None or type(cap) is int and cap > 0):
        raise ValueError(
            f"source {source!r:.100}: filter is a dict {{column: regular expression}}, cap a number above 0"
        )
    if not isinstance(speaker, str | int):
        raise ValueError(f"source {source!r:.100}: speaker is a text, not {speaker!r:.60}")
    path, prefix = source["path"], f"{source['name']}/" if source.get("name") else ""
    speaker = normalise(str(speaker))
    try:
        tests = [(column_name(str(column)), re.compile(str(pattern))) for column, pattern in wanted.items()]
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"source {path}: its filter {wanted!r:.100} is no regular expression ({error})") from None
    utterances, passed = [], []
    for file in find_files(path):
        columns = {}
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
            wants = f"it needs one for the audio (audio, path, file, id, ...) or its codes ({', '.join(CODES)})"
            wants += " and one for the text (text, sentence, transcription, ...): parts/sources.py has all names"
            raise ValueError(f"{file}: its columns are {', '.join(columns):.100}; {wants}")
    if not passed:
        says = f"passes the filter {wanted!r:.100}; columns: {', '.join(columns):.100}"
        raise ValueError(f"{path}: none of its {len(utterances)} rows {says}")
    # A fair sample, the same each time, and not the utterances that the split by hash would hold out.
    for u in sorted(passed, key=lambda u: fraction(f"cap {u.id}"))[cap or len(passed) :]:
        u.reason = "beyond the cap"
    return utterances


def read_row(row, n, place, problem, path, speaker, lowercase):
    """Row n {column: value} of the file `path` -> an utterance, with a reason where the row is at fault. `speaker`, if
    any, is who speaks, whatever the row says."""
    problems = [problem] if problem else []

    def read(function, otherwise, *args):
        try:
            return function(*args)
        except ValueError as error:
            problems.append(str(error))
            return otherwise

    def time(names):
        values = (row.get(name) for name in names)
        return next((text for value in values if value is not None and (text := str(value).strip())), "")

    held = read(content, b"", row)
    audio, text = (read(as_text, "", row, names) for names in (AUDIO, TEXT))
    # 1.0 is how tables write a whole number in whose column a field is empty
    speaker = speaker or normalise(re.sub(r"^(\d+)\.0$", r"\1", read(as_text, "", row, SPEAKER)))
    name = utterance_id(audio, path) or (place if held is None else f"{os.path.basename(path).partition('.')[0]}/{n}")
    u = Utterance(plain(name), path, plain(audio), normalise(text, lowercase), speaker or SOMEBODY)
    if held is not None:  # start and end there say where it once was cut out
        u.row = n
        if not isinstance(held, bytes):
            u.codes = (*held.shape, int(held.min()), int(held.max()))
    elif not problems:
        problems += filter(None, [cut(u, time(START), time(END), time(DURATION))])
    if problems or not audio and held is None:
        u.reason, u.detail = "bad row", plain(f"{place}: {problems[0] if problems else 'no audio'}")
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
        return f"start {start!r:.60}, end {end or duration!r:.60}: not numbers of seconds"
    if start or end:
        u.id += f"_{start or 0}-{end or duration}"
    most = 1e9  # seconds, far beyond any recording
    return "" if 0 <= u.start < (most if u.end is None else u.end) <= most else f"from {u.start:g} s to {u.end} s"


def utterance_id(audio, metadata):
    """What an utterance is called: its audio's path below the metadata, without wavs/ and without extension."""
    folder = os.path.dirname(os.path.abspath(metadata)) + os.sep
    name = " ".join(audio.removeprefix(folder).replace("\\", "/").split())
    name = re.sub(r"^(\./|wavs/|clips/|audio/)+", "", name)
    stem, _, extension = name.rpartition(".")
    return stem if extension.lower() in EXTENSIONS else name


def spellings(name):
    """A file's name, and how other systems may spell it: / for Windows' separators, an accent as a character of its own
    (macOS) or as one with its letter."""
    path = name.replace("\\", "/")
    return list(dict.fromkeys([name, path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD"))]))


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
            try:
                u = replace(u, content=content(row))
            except ValueError as error:
                raise ValueError(f"{source}: {u.id} cannot be read ({error})") from None
        yield u

"""Files of any common kind -> rows.

- The content of a file tells its kind, not its name: LJSpeech (`id|text|normalised`), csv or tsv with a header, json or
  jsonl, parquet, tar; text and tar also compressed. A table with | and without a header may have a speaker column.
- Every reader is a generator of the same rows, (place, {column: value}, problem), so a file may be larger than memory.
- Recordings inside a file: an audio column of `bytes` and `path`, as Hugging Face's datasets write it; a member .wav,
  .flac, .mp3, ... of a WebDataset shard, beside .json or .txt.
- Codes inside a file: `audio_tokens`, codebooks x frames (Marvis TTS: preprocess_mimi.py, data.py); `nano_layer_1`,
  `nano_layer_2`, ... and `encoded_len` (KaniTTS: dataset_processor.py), in KaniTTS-2 also a speaker vector
  `speaker_emb`.
- A folder is read as a shard that is not packed: files whose names agree up to the first dot are one row. A .enc, .dac
  or .nem of VALL-E's author (vall_e/emb/process.py) holds codes and text; its folder is named after the speaker.
"""

import codecs
import csv
import gzip
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
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parts.tensors import read_numpy

COLUMNS = {  # names of columns, the preferred first
    "audio": ["audio", "audio_path", "audio_file", "audio_filepath", "path", "file", "file_name", "filename", "wav",
              "id"],
    "text": ["normalised", "normalized", "normalised_text", "normalized_text", "normalized_transcription",
             "text", "sentence", "transcript", "transcription"],
    "speaker": ["speaker", "speaker_name", "speaker_id", "spk", "voice", "client_id"],
    "language": ["language", "lang", "locale"],
    "start": ["start", "start_time", "begin", "offset"],
    "end": ["end", "end_time", "stop"],
    "duration": ["duration"],
    "codes": ["audio_tokens", "nano_layer_1"],
    "frames": ["encoded_len", "audio_tokens_length"],
    "vector": ["speaker_emb", "grouped_sp_emb"],
}  # fmt: skip
EXTENSIONS = ["wav", "flac", "ogg", "oga", "opus", "mp3", "aiff", "aif", "aifc", "au", "snd", "caf", "w64", "rf64"]
ROW = 2**24  # bytes or characters: no text of a row needs more
FILE = 2**30  # bytes or characters of what has to be read in one piece
CODED = ["enc", "dac", "nem"]  # extensions of VALL-E's author: EnCodec, DAC, NeMo's codec
TEXTS = {"txt": "text", "normalized.txt": "normalized_text", "original.txt": "text"}  # LibriTTS has the last two
LIMITS = {"json": ROW, **dict.fromkeys([*TEXTS, *CODED], ROW), **dict.fromkeys(EXTENSIONS, FILE)}  # of members


def read_rows(path, whole=False, columns=None):
    """Rows of a file, or of a folder with files for each clip: (place, {column: value}, problem), `problem` empty for a
    sound row. The bytes of recordings in the file are read only with `whole`, else they are empty.

    columns: {our name of a column: its name in the file}. Raises ValueError, one line, for a broken file."""
    for place, row, problem in read_file(path, whole, columns):
        yield place, rename({column_name(name): value for name, value in row.items()}, columns), problem


def rename(row, columns):
    """A row with the columns that `columns` names under our names, in place of any other column of their kind."""
    given = {ours: row[theirs] for ours, theirs in (columns or {}).items() if theirs in row}
    taken = {name for names in COLUMNS.values() if given.keys() & {*names} for name in names}
    kept = {name: value for name, value in row.items() if name not in taken or name in columns.values()}
    return kept | given


def read_file(path, whole, columns):
    """The rows of read_rows, under the names of the file."""
    try:
        if os.path.isdir(path):
            yield from read_folder(path)
            return
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path}: is not a file")
        with open(path, "rb") as file:
            head = file.read(4)
        if head == b"PAR1":
            rows = read_parquet(path, whole)
        else:
            rows = read_tar(path, whole) if tarfile.is_tarfile(path) else read_text(path, head, columns)
        yield from rows
    except MemoryError:
        raise ValueError(f"{path}: needs more memory than this machine has: split it") from None
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: is broken ({error!s:.200})") from None
    except OSError as error:  # those of bz2 do not name the file
        raise error if error.filename else ValueError(f"{path}: is broken ({error})") from None


@lru_cache
def column_name(name):
    """A column's name in its normal form: "Normalised Text" -> "normalised_text"."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def has_columns(columns):
    """Whether these columns have audio or codes, and text."""
    return bool(set(columns) & {*COLUMNS["audio"], *COLUMNS["codes"]} and set(columns) & set(COLUMNS["text"]))


def need_room(size, limit, where):
    if size > limit:
        raise ValueError(f"{where}: larger than {limit // 2**20:,} MB, the limit for its kind")


def parse(text, where, read=json.loads, kind="JSON"):
    """read(text). Raises ValueError, which begins with `where`, where that fails."""
    try:
        return read(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not {kind} ({error})") from None


def need_fields(row, where):
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {row!r:.40} is not an object with the fields audio and text")
    return row


# -----------------------------------------------------------------------------
# text files: json and tables


def read_text(path, head, columns=None):
    """Rows of a text file; its first character tells json from a table. columns: see read_rows."""
    opener = gzip.open if head[:2] == b"\x1f\x8b" else open
    with opener(path, "rb") as file:
        utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        with opener(path, "rt", encoding="utf-16" if utf16 else "utf-8-sig", newline="") as file:
            first = file.read(4096)
            file.seek(0)
            if "\0" in first:
                raise ValueError(f"{path}: neither parquet nor a tar, and not a text file, as it contains zero bytes")
            if reader := {"[": read_list, "{": read_lines}.get(first.lstrip()[:1]):
                yield from reader(file, path)
            else:
                yield from read_table(file, path, columns)
    except UnicodeDecodeError as error:
        why = f"UTF-16 ({error.reason})" if utf16 else f"UTF-8 ({wrong_byte(path, opener)}): save it as UTF-8"
        raise ValueError(f"{path}: neither parquet nor a tar, and not a text file in {why}") from None


def wrong_byte(path, opener):
    """Where a file is not UTF-8, in words."""
    with opener(path, "rb") as file:
        for n, line in enumerate(iter(lambda: file.readline(FILE), b""), 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                if error.reason != "unexpected end of data":
                    return f"byte 0x{line[error.start]:02x} in line {n}"
    return "its last character is cut off"


def read_whole(file, path):
    """The text of an open file. Raises ValueError where it is too large."""
    text = file.read(FILE + 1)
    need_room(len(text), FILE, path)
    return text


def read_list(file, path):
    """Rows of a json file: a list of objects."""
    for n, row in enumerate(parse(read_whole(file, path), path), 1):
        yield f"row {n}", need_fields(row, path), ""


def read_lines(file, path):
    """Rows of a jsonl file: an object in each line."""
    for n, line in enumerate(iter(lambda: file.readline(ROW + 1), ""), 1):
        where = f"{path}, line {n}"
        need_room(len(line), ROW, where)
        if line.strip():
            yield f"line {n}", need_fields(parse(line, where), where), ""


class Record(NamedTuple):
    """A row of a table, and the lines that it takes: a field in quotation marks may go over several."""

    first: int
    last: int
    fields: list


def read_table(file, path, columns=None):
    """Rows of a csv, tsv or LJSpeech-like file. columns: see read_rows."""
    text = read_whole(file, path)
    first = next(filter(str.strip, io.StringIO(text, newline="")), "")
    delimiter = next((d for d in "|\t" if d in first), ";" if first.count(";") > first.count(",") else ",")
    joined = set()
    if delimiter == "|" and not has_columns(rename(dict.fromkeys(names_of(first.split("|"))), columns)):
        records = split(path, text, delimiter, csv.QUOTE_NONE)
        header = name_columns(path, [record.fields for record in records])
    else:
        records, joined = read_quoted(path, text, delimiter)
        header = names_of(records.pop(0).fields) if records else []
    if twice := [name for name, n in Counter(header).items() if n > 1 and name]:
        raise ValueError(f"{path}: two of its columns are named {twice[0]!r:.60}: rename one")
    for line, last, fields in records:
        problem = "" if len(fields) == len(header) else f"{len(fields)} fields instead of {len(header)}"
        if line in joined:
            problem = f"a quotation mark opens here and closes in line {last}, after other rows"
        yield f"line {line}", dict(zip(header, fields, strict=False)), problem


def names_of(fields):
    return [column_name(field.strip(' "')) for field in fields]


def split(path, text, delimiter, quoting):
    """The Records of a table. Raises ValueError where its quotation marks contradict each other."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    records = []
    before = 0
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                records.append(Record(before + 1, reader.line_num, fields))
            before = reader.line_num
    except csv.Error as error:
        raise ValueError(f"{path}, line {before + 1}: a quotation mark in the row that begins here does not close "
                         f"where it should ({error})") from None
    return records


def read_quoted(path, text, delimiter):
    """The Records of a table with a header, and the first lines of those that took in other rows.

    Quotation marks are read as csv reads them, or as part of the text where only that keeps every row."""
    tabular = delimiter in "|\t"
    records = []
    contradiction = None
    try:
        records = split(path, text, delimiter, csv.QUOTE_MINIMAL)
    except ValueError as error:
        if not tabular:
            raise
        contradiction = error
    joined = find_joined(records, text, delimiter)
    if not contradiction and not joined and (delimiter != "|" or is_even(records)):
        return records, joined
    bare = split(path, text, delimiter, csv.QUOTE_NONE)
    # Marks around a whole field belong to csv. With | and tabs only the header tells, as there people quote speech.
    told = bare[:1] if tabular else bare
    enclosed = any(re.fullmatch('".*"', field) for record in told for field in record.fields)
    if not enclosed and (tabular or is_even(bare)):
        return bare, set()
    if contradiction:
        raise contradiction
    return records, joined


def is_even(records):
    return len({len(record.fields) for record in records}) < 2


def find_joined(records, text, delimiter):
    """The first lines of the records that took in other rows: one of their lines has as many fields as the header and
    names a recording."""
    several = [record for record in records[1:] if record.first < record.last]
    if not several:
        return set()
    lines = list(io.StringIO(text, newline=""))
    header = names_of(records[0].fields)
    column = next((header.index(name) for name in COLUMNS["audio"] if name in header), 0)

    def is_row(line, record):
        cells = [cell.strip(' "\r\n') for cell in line.split(delimiter)]
        if len(cells) < len(header):
            return False
        named = any(os.path.splitext(cell)[1][1:].lower() in EXTENSIONS for cell in cells)
        alike = shape(cells[column]) == (shape(record.fields[column]) if column < len(record.fields) else "")
        return named or delimiter in "|\t" or alike

    return {r.first for r in several if any(is_row(line, r) for line in lines[r.first : r.last])}


def shape(name):
    """A name with its letters and its digits made alike: a1 for both c005 and LJ001."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "1", name))


def name_columns(path, rows):
    """The columns of a table with | and without a header, told by their content: `id|text`, `id|text|normalised` (the
    same sentence twice), `id|speaker|text`, `id|text|speaker` (few names). Raises ValueError where it is not clear."""
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
    # A number and its words have no word in common: only the rows without digits can tell.
    if width == 3 and not are_names(second) and agree([(a, b) for a, b in both if not re.search(r"\d", a)]):
        return ["id", "text", "normalised"]
    raise ValueError(f"{path}: has no header, and what its {width} columns are is not clear: add one, such as "
                     "id|text|normalised, id|text|speaker, id|speaker|text or id|text|phonemes")


def agree(pairs):
    """Whether at least half of the pairs (text, text) are the same sentence: half of the words of one, or more, are in
    the other, whatever their case and accents."""

    def words(text):
        letters = unicodedata.normalize("NFKD", text.casefold())
        return set(re.findall(r"\w+", "".join(c for c in letters if not unicodedata.combining(c))))

    return 2 * sum(2 * len(words(a) & words(b)) >= len(words(a)) for a, b in pairs) >= len(pairs)


def are_names(column):
    """Whether the fields of a column may be speakers: each a few words that occur again."""
    values = set(column)
    return 2 * len(values) <= len(column) and all(v and len(v) <= 40 and len(v.split()) <= 3 for v in values)


# -----------------------------------------------------------------------------
# tar and parquet


def stem_of(name):
    """A path up to the first dot of the file's name."""
    folder, slash, name = name.removeprefix("./").rpartition("/")
    return folder + slash + name.partition(".")[0]


def read_tar(path, whole):
    """Rows of a WebDataset shard: members whose names agree up to the first dot are one row."""
    with tarfile.open(path) as tar:
        for name, members in itertools.groupby(filter(is_meant, tar), lambda member: stem_of(member.name)):
            files = ((member.name, member.size, lambda of=member: tar.extractfile(of).read()) for member in members)
            row = read_members(files, name, path, whole)
            if row:
                yield name, {"id": name, **row}, ""
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) != bytes(512):  # tarfile takes anything that is not a member for the end
            raise EOFError(f"breaks off after {tar.offset:,} bytes")


def read_members(files, name, path, whole):
    """The fields of one row from the files (name, size, read) of one clip. Text and recording count more than the
    fields of a .json."""
    fields = {}
    content = {}
    kinds = set()
    for member, size, read in files:
        kind = member.rpartition("/")[2].partition(".")[2].lower()
        kind = kind if kind in TEXTS else kind.rpartition(".")[2]
        where = f"{path}, {member:.100}"
        if kind in kinds:
            raise ValueError(f"{where}: a second .{kind} of {name:.100}; names that agree up to a dot are one row")
        kinds.add(kind)
        need_room(size, LIMITS.get(kind, math.inf), where)
        if kind == "json":
            fields = need_fields(parse(read(), where), where)
        elif kind in TEXTS:
            content[TEXTS[kind]] = parse(read(), where, bytes.decode, "UTF-8")
        elif kind in CODED:
            content |= read_coded(read(), where)
        elif kind in EXTENSIONS:
            content["audio"] = {"path": member, "bytes": read() if whole else b""}
    return {**fields, **content}


def read_coded(data, where):
    """The fields of a file with VALL-E's codes: `codes` (1, K, T) or (K, T), and what its metadata say."""
    found = parse(data, where, read_numpy, "a file of VALL-E's codes")
    codes = found.get("codes") if isinstance(found, dict) else None
    if not isinstance(codes, np.ndarray) or codes.dtype.kind not in "iu" or codes.ndim not in (2, 3):
        raise ValueError(f"{where}: holds no codes")
    if codes.ndim == 3 and len(codes) != 1:
        raise ValueError(f"{where}: holds the codes of {len(codes)} clips")
    told = found.get("metadata")
    return {**(told if isinstance(told, dict) else {}), "audio_tokens": codes.reshape(codes.shape[-2:]).tolist()}


def clips(folder):
    """The clips of a folder that holds files for each: yields (stem below the folder, sorted names of its files). Where
    some files have VALL-E's codes, only these count."""
    names = sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))
    by_kind = {}
    for name in names:
        if not re.search(r"(^|/)[._]", name):
            by_kind.setdefault(name.rpartition(".")[2].lower(), []).append(name)
    coded = [kind for kind in CODED if kind in by_kind]
    wanted = coded or ["json", "txt", *EXTENSIONS]
    if coded or by_kind.keys() & {"json", "txt"}:
        named = sorted((stem_of(name), name) for kind in wanted for name in by_kind.get(kind, ()))
        for stem, pairs in itertools.groupby(named, lambda pair: pair[0]):
            yield stem, [name for _, name in pairs]


def read_folder(path):
    """Rows of a folder with files for each clip. Recordings stay where they are; a broken file is a problem of its row
    alone."""
    for stem, names in clips(path):
        sounds = [name for name in names if name.rpartition(".")[2].lower() in EXTENSIONS]
        others = [name for name in names if name not in sounds]
        files = ((name, os.path.getsize(os.path.join(path, name)), Path(path, name).read_bytes) for name in others)
        try:
            row = read_members(files, stem, path, whole=False)
        except ValueError as error:
            yield stem, {"id": stem}, str(error)
            continue
        if any(name.rpartition(".")[2].lower() in CODED for name in others):
            row = {"speaker": os.path.basename(os.path.dirname(stem)), **row}
        yield stem, {"id": stem, **row, **({"audio": sounds[0]} if sounds else {})}, ""


def is_meant(member):
    """Whether a member of a tar is a file that somebody put there: macOS adds others."""
    return member.isfile() and not re.search(r"(^|/)(\._|__MACOSX/)", member.name)


def read_parquet(path, whole):
    """Rows of a parquet file, with one of its row groups in memory at a time."""
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

"""Thousands of damaged inputs for every reader: none may end in a traceback or a hang, or be taken in silence.

The default run has a few hundred of them, `pytest -m slow tests/test_fuzz.py` thousands; FUZZ_SEED chooses others.
"""

import csv
import gzip
import io
import json
import math
import os
import random
import shutil
import struct
import sys
import tarfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fuzz
import numpy as np
import pytest
import soundfile
import torch
from fuzz import (
    BAD,
    GOOD,
    MAY,
    ODD,
    Case,
    at,
    branches,
    changed,
    damaged_bytes,
    damaged_tree,
    differs,
    dumps,
    odd,
    report,
    run,
    sift,
    table,
    unless_same,
    without,
)
from helpers import tiny, write_tokens

import codec as codecs
import data
import layouts as published
import model as models
import prepare
import sample
import train
import weights
from export import export
from parts import configurator
from parts.text import normalise

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="cases are called in a forked process")
SEED = int(os.environ.get("FUZZ_SEED", "17"))
GOLDEN = Path(__file__).parent / "golden"

# What may be taken in silence: the kind of damage, and why no reader can or should notice it.
ALLOWED = {
    "control characters": "a tokenizer with bytes reads any character, and some texts have them on purpose",
    "a letter in a table": "a text file has no checksum: another letter is another text",
    "a table's end": "a text file does not say how long it is: cut inside its last cell, it is a shorter text",
    "a bit in a recording": "wav and its like have no checksum: another sample is another sound",
    "a bit in published weights": "safetensors have no checksum: another number is another weight",
    "a bit in a codec's weights": "the same; the fingerprint in a token folder notices it from then on",
    "a bit in token files": "codes and texts are read as they are needed, millions of them: the index is checked",
    "a number in config.json": "it says what shapes cannot, and another number of the right kind is another model",
}


# ---------------------------------------------------------------------------------------------------------------------
# the sound inputs

RATE = 8000
WORDS = ["zero one two", "one two three four", "two three", "three one", "four zero one", "five two", "six three one",
         "seven one two"]  # fmt: skip
ROWS = [(f"wavs/u{i}.wav", text, "ab"[i % 2]) for i, text in enumerate(WORDS)]
STACK = "{'n_layer': 1, 'n_head': 2, 'n_kv_head': 2, 'd_model': 16, 'd_ff': 32}"
HYBRID = "{'n_layer': 2, 'n_head': 2, 'n_kv_head': 1, 'd_model': 16, 'd_ff': 24, 'layers': 'ca', 'qk_norm': True}"
FLAGS = ["--max_tokens=150", "--warmup_iters=1", "--log_interval=1", "--eval_interval=1", "--eval_samples=1",
         "--eval_iters=1", "--device=cpu", "--max_iters=1", "--lr_schedule=constant"]  # fmt: skip
FAMILIES = {
    "csm": ["--arch=csm", f"--backbone={STACK}", f"--decoder={STACK}", "--voice_prompt=0.5"],
    "kani": ["--arch=kani", f"--backbone={HYBRID}"],
    "xtts": ["--arch=xtts", f"--backbone={ {**eval(STACK), **models.GPT2} }", "--n_latents=3", "--perceiver_heads=1",
             "--conditioning_layers=1", "--perceiver_layers=1", "--reference_seconds=[0.2, 0.4]"],
    "valle ar": ["--arch=valle", "--mode=ar", f"--backbone={STACK}"],
    "valle nar": ["--arch=valle", "--mode=nar", f"--backbone={STACK}"],
}  # fmt: skip


class Now:
    """A pool whose work is done at once, in this process."""

    _max_workers = 1

    def submit(self, function, *args):
        result = function(*args)
        return SimpleNamespace(result=lambda: result)

    def shutdown(self, **_):
        pass


def voice_like(i, seconds=0.6):
    t = np.arange(int(seconds * RATE)) / RATE
    wav = sum(np.sin(2 * np.pi * k * (100 + 9 * i) * t) / k for k in range(1, 6)) * np.abs(np.sin(9 * t))
    return (0.3 * wav / np.abs(wav).max()).astype(np.float32)


class Yard:
    """Sound inputs of all kinds, made once; what a reader makes of them is read once too."""

    def __init__(self, folder):
        self.folder, self.known = folder, {}
        (folder / "wavs").mkdir(parents=True)
        for i in range(len(ROWS)):
            soundfile.write(folder / f"wavs/u{i}.wav", voice_like(i), RATE)
        self.utterances = []  # as prepare.py reported them last
        self.csm = Path(write_tokens(folder / "csm", 10, 4))
        self.xtts = Path(write_tokens(folder / "xtts", 10, 4, K=1, references=True))
        self.codec = codecs.load_codec("mel", str(self.csm))
        self.meta = json.loads((self.csm / "meta.json").read_text())
        self.checkpoints = {}
        for family in [*FAMILIES, "lora"]:  # here, not in a forked process, of which nothing comes back
            out, of = folder / "out" / family, "csm" if family == "lora" else family
            more = [f"--init_from={folder}/out/csm/best.pt", "--lora_rank=2"] if family == "lora" else []
            train_once(self.tokens(of), out, *FAMILIES[of], *more)
            self.checkpoints[family] = {
                which: weights.load_checkpoint(str(out / f"{which}.pt")) for which in ("best", "last")
            }  # fmt: skip

    def tokens(self, family):
        return self.xtts if family == "xtts" else self.csm

    def once(self, name, make):
        if name not in self.known:
            self.known[name] = make()
        return self.known[name]


@pytest.fixture(scope="session")
def yard(tmp_path_factory):
    torch.set_num_threads(1)
    report = prepare.report

    def watched(utterances):
        yard.utterances = utterances
        return report(utterances)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "start_pool", lambda _: Now())
        patch.setattr(prepare, "report", watched)
        yard = Yard(tmp_path_factory.mktemp("sound") / "yard")
        yield yard


def fresh(stem="x"):
    """A path that no other case has, in the folder of the cases."""
    fresh.n += 1
    return Path(f"{stem}{fresh.n}").resolve()


fresh.n = 0


def written(content, name, folder=None):
    """The path of a new file of that name, in a folder of its own."""
    folder = folder or fresh()
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return str(folder / name)


# ---------------------------------------------------------------------------------------------------------------------
# tables, json, codes, parquet, tar: the doctor's findings


def doctor(source, yard, **keys):
    """What prepare.py uses of a source, rows (audio, text, speaker, start, end), and what it names."""
    cfg = configurator.configure(prepare.__file__, [])
    given = {"codec_path": str(yard.csm), "tokenizer": str(yard.csm / "tokenizer.model")}
    easy = {"val_fraction": 0.5, "max_bad": 1.0, "min_chars_per_second": 0.1, "workers": 1}
    vars(cfg).update({"sources": source, "data_dir": str(fresh("tokens")), **given, **easy, **keys})
    prepare.main(cfg)
    found = yard.utterances
    rows = [("wavs/" + os.path.basename(u.audio), u.text, u.speaker, u.start, u.end) for u in found if not u.reason]
    return rows, [f"{u.reason}: {u.detail}" for u in found if u.reason]


def told(rows, allowed=()):
    """A judge of the doctor: each row it uses is one of the true ones, or one of those allowed besides, and where true
    ones are missing it names something."""

    def judge(result, output):
        used, named = result
        known = {*rows, *allowed}
        if strange := [row for row in used if row not in known]:
            return f"taken: {strange[0]!r:.200}"
        if max(map(len, named), default=0) > 1000:
            return f"a finding of {max(map(len, named))} characters"
        lost = len({name for name, *_ in rows} - {name for name, *_ in used})
        return f"{lost} rows are lost and nothing is named" if lost and not named else "named" if named else "accepted"

    return judge


def row(i, audio=None, text=None, speaker=None, start=0.0, end=None):
    """A true row as the doctor gives it."""
    of = ROWS[i]
    words = normalise(of[1] if text is None else text)
    return audio or of[0], words, of[2] if speaker is None else speaker, start, end


TRUTH = [row(i) for i in range(len(ROWS))]


def as_table(rows, delimiter, header=("audio", "text", "speaker"), end="\n"):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator=end).writerows(([header] if header else []) + rows)
    return out.getvalue()


def doctored(yard, name, content, label, truth=TRUTH, allowed=(), expect=MAY, kind=""):
    """A case: the doctor reads this content as a file beside the recordings."""

    def call():
        path = yard.folder / f"{fresh().name}{name}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        try:
            return doctor(str(path), yard)
        finally:
            path.unlink()

    return Case(f"{name}: {label}", call, expect, kind, told(truth, allowed))


class Sheet:
    """A table in one of the usual kinds, and a row of it in which something is to be wrong."""

    def __init__(self, rng):
        self.rng, self.rows, self.i = rng, [list(r) for r in ROWS], rng.randrange(len(ROWS))
        self.delimiter, self.ending = rng.choice([(",", ".csv"), ("\t", ".tsv"), ("|", ".txt"), (";", ".csv")])
        self.others = [r for j, r in enumerate(TRUTH) if j != self.i]

    def text(self, *more):
        return as_table(self.rows, self.delimiter, *more)


# Each of these is one way to spoil a table: Sheet -> arguments of `doctored` from `content` on.


def sheet_sound(t):
    end = t.rng.choice(["\n", "\r\n", "\n\n", " \n"])
    return t.rng.choice(["", "\ufeff", "\n\n"]) + t.text().replace("\n", end), f"lines end in {end!r}", TRUTH, (), GOOD


def sheet_cell(t):
    column, value = t.rng.randrange(3), t.rng.choice(["", " ", "nan", "None", "x" * 5000, "1", "\xe9" * 9, "../../x"])
    t.rows[t.i][column] = value
    known = [row(t.i, text=value)] if column == 1 else [row(t.i, speaker=value)] if column == 2 else []
    if column == 2 and value.lower() in ("", " ", "nan", "none"):
        known += [row(t.i, speaker=s) for s in ("speaker", "yard")]
    return t.text(), f"{('audio', 'text', 'speaker')[column]} of row {t.i} is {value!r:.20}", t.others, known


def sheet_character(t):
    c = t.rng.choice("\0\x01\x07\x1b\x7f\x85\u200b\u200e\u2028\ufeff\ufffd\U0001f600\ue000\u0301")
    t.rows[t.i][1] = f"one{c}two"
    return t.text(), f"text with {c!r}", t.others, [], BAD, "control characters"


def sheet_quote(t):
    """A quotation mark that opens and, maybe, closes in another row."""
    i, lines, mark = t.i, t.text().split("\n"), t.rng.choice(['"', "'", '""'])
    text = t.rng.choice([mark + t.rows[i][1], t.rows[i][1].replace(" ", mark + " ", 1), t.rows[i][1] + mark])
    lines[i + 1] = t.delimiter.join([t.rows[i][0], text, t.rows[i][2]])
    if t.rng.random() < 0.5 and i < len(ROWS) - 2:
        lines[i + 3] = lines[i + 3].replace(t.rows[i + 2][1], t.rows[i + 2][1] + mark)
    known = [row(j, text=said) for j in range(len(ROWS)) for said in (text, text.strip('"'), t.rows[j][1] + mark)]
    return "\n".join(lines), f"{text!r} in row {i}", TRUTH, known


def sheet_fields(t):
    lines, mark = t.text().split("\n"), t.delimiter
    line = lines[t.i + 1]
    lines[t.i + 1] = t.rng.choice([line + mark + "x", line.rsplit(mark, 1)[0], line.replace(mark, " "), line * 2])
    return "\n".join(lines), f"row {t.i} is {lines[t.i + 1]!r:.60}", t.others, [], BAD


def sheet_header(t):
    header = t.rng.choice([("audio", "words", "speaker"), ("x", "text", "speaker"), ("", "", ""), ("audio", "text"),
                           ("audio", "text", "text"), ("audio", "audio", "text"), ("text", "audio", "speaker"),
                           ("audio", "text", "speaker", "x"), ("AUDIO ", " Text", "Speaker")])  # fmt: skip
    return t.text(header), f"header {header}", TRUTH, [], GOOD if header[0] == "AUDIO " else BAD


def sheet_order(t):
    """No header, and columns in an order that others have."""
    order = t.rng.choice([(0, 2, 1), (0, 1, 2), (2, 0, 1), (1, 0, 2)])
    return as_table([[r[k] for k in order] for r in ROWS], t.delimiter, None), f"order {order}", TRUTH, [], BAD


def sheet_cut(t):
    plain = t.text()
    stop = t.rng.randrange(len(plain))
    whole, last = plain[:stop].count("\n"), plain[:stop].rpartition("\n")[2].split(t.delimiter)
    known = [row(whole - 1, text=last[1], speaker=s) for s in (last[-1], "")] if len(last) > 1 and whole else []
    return plain[:stop], f"cut at {stop}", TRUTH[: max(0, whole - 1)], known, BAD, "a table's end"


def sheet_bytes(t):
    label, made, how = damaged_bytes(t.rng, t.text().encode())
    kind = {"cut": "a table's end", "empty": "", "text": ""}.get(how, "a letter in a table")
    return made, label, [], [], BAD, kind


def sheet_time(t):
    column = t.rng.choice(["start", "end", "duration"])
    value = t.rng.choice(["inf", "nan", "1e400", "-1", "x", "9" * 400, "0x1", "1,5", "-inf", "99", "0.1"])
    cells = [r + [value if j == t.i else ""] for j, r in enumerate(t.rows)]
    known = [TRUTH[t.i]] if column == "duration" else []  # which counts beside a start only
    if value == "0.1" and column != "duration" or (column, value) == ("end", "99"):
        known = [row(t.i, **{column: float(value)})]
    content = as_table(cells, t.delimiter, ("audio", "text", "speaker", column))
    return content, f"{column} = {value:.20}", t.others, known


def sheet_junk(t):
    plain = t.text()
    if t.rng.random() < 0.1:
        return plain.encode("utf-16"), "UTF-16"
    content = t.rng.choice([b"", b"\n", b"\0" * 50, t.rng.randbytes(300), b"PK\x03\x04junk",
                            plain.replace("one", "\xf6n").encode("latin-1"), plain.split("\n")[0].encode(),
                            b"%PDF-1.4", b"a" * 300_000, b'"' + b"a" * 300_000, b"{" * 9, b"[" * 99_999])  # fmt: skip
    return content, f"{content[:20]!r}, {len(content)} bytes", [], [], BAD


def sheet_twice(t):
    lines = t.text().split("\n")
    lines.insert(t.rng.randrange(1, len(ROWS)), lines[t.i + 1])
    return "\n".join(lines), f"row {t.i} stands there twice", TRUTH, [], BAD


def sheet_doubled(t):
    """Quotation marks in a text, doubled, as pandas writes them."""
    t.rows[t.i][1] = 'one "two" three'
    return t.text(), "quotation marks, doubled", [*t.others, row(t.i, text='one "two" three')], (), GOOD


def sheet_packed(t):
    packed = gzip.compress(t.text().encode())
    packed = t.rng.choice([packed, packed[:-9], packed[:20], packed + b"junk", b"\x1f\x8b" + t.text().encode()])
    return packed, f"gzip of {len(packed)} bytes"


SHEETS = (sheet_sound, sheet_cell, sheet_character, sheet_quote, sheet_fields, sheet_header, sheet_order, sheet_cut,
          sheet_bytes, sheet_time, sheet_junk, sheet_twice, sheet_doubled, sheet_packed)  # fmt: skip


def tables(rng, yard):
    """csv, tsv and tables with bars, each with one thing wrong, or with a freedom that tables have."""
    while True:
        sheet = Sheet(rng)
        yield doctored(yard, sheet.ending, *rng.choice(SHEETS)(sheet))


def source_keys(rng, yard):
    """The key `sources` of prepare.py."""
    (yard.folder / "sound.csv").write_text(as_table(ROWS, ","))
    path = str(yard.folder / "sound.csv")
    while True:
        key, value = rng.choice(["path", "speaker", "filter", "cap", "name", "x"]), rng.choice(ODD)
        source = {"path": path, key: value}
        if rng.random() < 0.3:
            some = [{"text": "("}, {"x": ".*"}, {"speaker": "a|b"}, {3: "a"}]
            value = rng.choice([*some, *({"speaker": v} for v in ODD)])
            source = {"path": path, "filter": value}
        elif rng.random() < 0.2:
            source = value = rng.choice([v for v in ODD if v != "../x"])
        fine = [row(j, speaker=s) for j in range(len(ROWS)) for s in ("a", "b", normalise(str(value)))]
        yield Case(f"{source!r:.150}", partial(doctor, source, yard), MAY, "", told([], fine))


FIELDS = ("audio", "text", "speaker", "start", "end", "duration")


def known_rows(i, name, value):
    """What the doctor may make of row i where one of its fields has this value, beside naming it."""
    number = type(value) in (int, float) and math.isfinite(value)
    empty = value is None or type(value) is float and math.isnan(value) or value in ("", " ")
    halves = isinstance(value, str) and any(0xD800 <= ord(c) < 0xE000 for c in value)  # of an emoji: left out, or named
    words = isinstance(value, str) and not halves
    said = str(int(value)) if number and value == int(value) else str(value)
    if name == "duration" or name in ("start", "end") and (empty or value == 0 and type(value) is not bool):
        return [TRUTH[i]]
    if name in ("start", "end"):
        return [row(i, **{name: float(value)})] if number else []
    if name == "text" and (words or number):
        return [row(i, text=said), row(i, text=str(value))]
    if name == "speaker" and (words or number or empty or halves or type(value) is float):
        return [row(i, speaker=s) for s in (said, "speaker", "yard", normalise(said))]
    return []


def json_lines(rng, yard):
    """json and jsonl: values of all types in all fields, and broken syntax."""
    while True:
        rows = [dict(zip(FIELDS, r, strict=False)) for r in ROWS]
        i, as_lines = rng.randrange(len(rows)), rng.random() < 0.5
        truth, known, expect, kind, text = TRUTH, [], MAY, "", ""
        others = [r for j, r in enumerate(TRUTH) if j != i]
        how = rng.choice(["value", "value", "value", "value", "missing", "bytes", "deep", "whole", "twice", "row"])
        label = how
        if how == "value":
            name, value = rng.choice(FIELDS), rng.choice([*ODD, ["one", "two"], 3.0, {"bytes": "x", "path": "y.wav"}])
            rows[i][name] = value
            label, truth, known = f"{name} = {value!r:.40}", others, known_rows(i, name, value)
        elif how == "missing":
            del rows[i][name := rng.choice(FIELDS[:3])]
            label, truth, known = f"no {name}", others, [row(i, speaker="speaker"), row(i, speaker="yard")]
        elif how == "row":
            rows[i] = odd(rng, rows[i])
            label, truth, expect = f"a row is {rows[i]!r:.30}", others, BAD
        elif how == "twice":  # the last one counts
            text = "\n".join(map(dumps, rows)).replace('"text"', '"text": "zero", "text"')
        elif how == "deep":
            rows[i]["more"] = json.loads("[" * 900 + "]" * 900)
            if rng.random() < 0.5:
                text, expect, truth = rng.choice(["[", '{"a":']) * 100_000, BAD, []
        elif how == "whole":
            text, truth = dumps(rng.choice(ODD)), []
            label = f"all of it is {text:.30}"
        content = (text or ("\n".join(map(dumps, rows)) if as_lines else dumps(rows))).encode()
        if how == "bytes":
            label, content, of = damaged_bytes(rng, content)
            truth, expect, kind = [], BAD, "" if of in ("cut", "empty", "text") else "a letter in a table"
            kind = "a table's end" if of == "cut" and as_lines else kind
        yield doctored(yard, ".jsonl" if as_lines else ".json", content, label, truth, known, expect, kind)


def coded(rng, yard):
    """Rows that hold codes: one of them is not what a codec makes."""
    book = [1, 2, 3, 4] * 3
    kinds = [{"audio_tokens": [book] * 3}, {**{f"nano_layer_{k}": book for k in (1, 2, 3)}, "encoded_len": 12}]
    while True:
        fields = rng.choice(kinds)
        rows = [{"id": f"c{j}", "text": "one two", "speaker": "a", **fields} for j in range(6)]
        path = rng.choice(list(branches(fields)))
        odd_codes = [*ODD, 16, 65536, [1], [[1] * 12], [1] * 12, "1"]
        value = rng.choice([v for v in odd_codes if differs(v, at(fields, path))])
        fine = type(value) is int and 0 <= value < 16 and path[0] != "encoded_len" or value == [1] * 12
        fine = fine or path[0] == "encoded_len" and value in (None, "", " ", [], {}, {"x": 1})
        rows[1] = changed(rows[1], path, value)

        def call(rows=rows):
            used, named = doctor(written("\n".join(map(dumps, rows)).encode(), "codes.jsonl"), yard)
            return len(used), named

        def judge(result, output, fine=fine):
            return "named" if result[1] else "accepted" if fine or result[0] < 6 else "codes are taken"

        yield Case(f"{'.'.join(map(str, path))} = {value!r:.40}", call, MAY, "", judge)


def counted(fine, total):
    """A judge of the doctor: at most so many rows are used, and of those that are not something is named."""

    def judge(result, output):
        used, named = result
        if len(used) > fine:
            return f"{len(used)} rows are taken"
        return "named" if named else "accepted" if len(used) >= total else f"{total - len(used)} rows are lost"

    return judge


def wav_bytes(yard, i):
    return (yard.folder / f"wavs/u{i}.wav").read_bytes()


def parquet(rng, yard):
    """Parquet files with columns of all types, and broken ones."""
    import pyarrow
    from pyarrow.parquet import write_table

    n = len(ROWS)
    sounds = [{"bytes": wav_bytes(yard, i), "path": f"u{i}.wav"} for i in range(n)]
    column = {
        "integers": list(range(n)), "floats": [math.nan, 1.0, math.inf, *[2.5] * (n - 3)], "lists": [["a", "b"]] * n,
        "truths": [True] * n, "nothing": [None] * n, "bytes": [b"\xff\xfe"] * n, "objects": [{"x": 1}] * n,
        "empty": [""] * n, "words": pyarrow.array(WORDS).dictionary_encode(),
    }  # fmt: skip
    while True:
        fields = {"audio": sounds, "text": WORDS, "speaker": [r[2] for r in ROWS]}
        how, name, of, i = rng.choice("ttsnb"), rng.choice(list(fields)), rng.choice(list(column)), rng.randrange(n)
        label, fine, total = "bytes", n, 0
        if how == "t":
            fields[name], label = column[of], f"{name} of {of}"
            wrong = name == "audio" or of in ("lists", "truths", "objects", "bytes")
            fine = 0 if wrong or name == "text" and of in ("nothing", "empty") else n
        elif how == "s":
            value = rng.choice([None, {"bytes": None, "path": "x"}, {"bytes": b"", "path": "x.wav"},
                                {"bytes": b"junk", "path": None}, {"bytes": wav_bytes(yard, i)[:700], "path": "a.wav"}])
            fields["audio"] = [value if j == i else s for j, s in enumerate(sounds)]
            label, fine, total = f"a recording is {value!r:.60}", n - 1, n
        elif how == "n":
            del fields[name]
            label, fine = f"no {name}", n if name == "speaker" else 0
        write_table(pyarrow.table(fields), out := io.BytesIO(), row_group_size=5)
        content, expect = out.getvalue(), MAY
        if how == "b":
            label, content, way = damaged_bytes(rng, content)
            expect, fine = (BAD, 0) if way in ("cut", "empty", "text") else (MAY, n)

        def call(content=content):
            return doctor(written(content, "x.parquet"), yard)

        yield Case(label, call, expect, "", counted(fine, total))


def tar(rng, yard):
    """WebDataset shards with odd members, and broken ones."""
    n = 5
    while True:
        i, mode, how, expect, fine = rng.randrange(n), rng.choice(["w", "w", "w:gz"]), rng.choice("bbmmmt"), MAY, n
        members, kind, label = {}, "", "a member that is no file"
        for j in range(n):
            members[f"u{j}.wav"] = wav_bytes(yard, j)
            members[f"u{j}.json"] = dumps({"text": WORDS[j], "speaker": "a"}).encode()
        if how == "m":
            name, content, fine = rng.choice([
                (f"u{i}.json", b"{", n - 1), (f"u{i}.json", b"[1]", n - 1), (f"u{i}.json", b"\xff", n - 1),
                (f"u{i}.json", dumps({"text": odd(rng, "x"), "speaker": "a"}).encode(), n),
                (f"u{i}.wav", b"junk", n - 1), (f"u{i}.wav", b"", n - 1), (f"u{i}.wav", None, n - 1),
                (f"u{i}.wav", wav_bytes(yard, i)[:3000], n - 1),
                (f"u{i}.json", None, n - 1), (f"._u{i}.wav", b"\0\5\x16\7", n), (f"../u{i}.txt", b"x", n),
                (f"u{i}.txt", b"\xff\xfe", n), (f"u{i}.JSON", b"{}", n), ("a/b.c.d", b"x", n),
                ("x.json", b"[" * 99_999, n), (f"u{i}.wav", bytes(30 << 20), n - 1),
            ])  # fmt: skip
            members, label = {**members, name: content}, f"{name} is {content!r:.40}"
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode=mode) as archive:
            for name, content in members.items():
                if content is not None:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    if how == "t" and name == f"u{i}.wav":
                        info.type, info.linkname = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]), "/etc/passwd"
                        info.size, fine = 0, n - 1
                    archive.addfile(info, io.BytesIO(content))
        content = out.getvalue()
        if how == "b":
            ended = len(content.rstrip(b"\0"))  # zeros may follow, more or fewer
            label, content, way = damaged_bytes(rng, content)
            expect, fine = (BAD, n - 1) if way in ("cut", "empty", "text") and len(content) < ended else (MAY, n)
        elif how == "t" and mode == "w":  # a header that says more than there is
            info = tarfile.TarInfo("big.json")
            info.size = rng.choice([1 << 40, 8 << 30])
            content, label = content[:-1024] + info.tobuf() + bytes(2048), f"a member of {info.size} bytes"

        def call(content=content):
            return doctor(written(content, "x.tar"), yard)

        yield Case(f"{mode}: {label}", call, expect, kind, counted(fine, n))


# ---------------------------------------------------------------------------------------------------------------------
# recordings

FORMATS = [("wav", "WAV", "PCM_16"), ("wav", "WAV", "FLOAT"), ("wav", "WAV", "PCM_24"), ("wav", "WAV", "ULAW"),
           ("wav", "WAV", "MS_ADPCM"), ("flac", "FLAC", "PCM_16"), ("ogg", "OGG", "VORBIS"), ("opus", "OGG", "OPUS"),
           ("mp3", "MP3", "MPEG_LAYER_III"), ("aiff", "AIFF", "PCM_16"), ("au", "AU", "PCM_16"),
           ("w64", "W64", "PCM_16"), ("caf", "CAF", "PCM_16"), ("rf64", "RF64", "PCM_16")]  # fmt: skip
HEADER = [(24, "<I", "sample rate"), (22, "<H", "channels"), (40, "<I", "data size"), (4, "<I", "file size"),
          (34, "<H", "bits"), (32, "<H", "block"), (20, "<H", "format")]  # fmt: skip


def recorded(wav, form="WAV", subtype="FLOAT"):
    soundfile.write(out := io.BytesIO(), wav, RATE, subtype, format=form)
    return out.getvalue()


def recordings(rng, yard):
    """(label, file's name, bytes, expectation) of recordings of half a second and more."""
    sounds = {(ending, subtype): recorded(voice_like(1, 0.8), form, subtype) for ending, form, subtype in FORMATS
              if soundfile.check_format(form, subtype)}  # fmt: skip
    while True:
        (ending, subtype), content = rng.choice(list(sounds.items()))
        how, expect = rng.choice(["sound", "cut", "cut", "bytes", "field", "field", "samples", "name"]), MAY
        label = f"{ending} {subtype}: {how}"
        if how == "sound":
            expect = GOOD
        elif how == "cut":
            stop = int(len(content) * rng.choice([0.2, 0.4, 0.6, 0.8]))
            content, label, expect = content[:stop], f"{label} at byte {stop} of {len(content)}", BAD
        elif how == "bytes":
            label, content, of = damaged_bytes(rng, content)
            expect = BAD if of in ("empty", "text") else MAY
        elif how == "field":
            content, ending = bytearray(sounds["wav", "PCM_16"]), "wav"
            where, form, name = rng.choice(HEADER)
            value = rng.choice([0, 1, 2, 3, 8, 44100, 384_001, 655_351, 999_983, 2**31 - 1, 2**31, 2**32 - 1])
            struct.pack_into(form, content, where, value & (0xFFFF if form == "<H" else 2**32 - 1))
            label, content = f"{name} = {value}", bytes(content)
        elif how == "samples":
            wav, value = voice_like(1, 0.8), rng.choice([math.nan, math.inf, -math.inf, "none", "silence", "one"])
            if isinstance(value, float):
                wav[100:200] = value
            wav = {"none": wav[:0], "silence": 0 * wav, "one": wav[:1]}.get(value, wav)
            ending, label, content = "wav", f"samples: {value}", recorded(wav)
            expect = MAY if value == "silence" else BAD
        else:
            ending = rng.choice(["raw", "txt", "mp3", "flac", "wav", "WAV", "", "pcm", "vox"])
            content = rng.choice([content, b"junk" * 500, rng.randbytes(4000)])
            label, expect = f"{content[:4]!r} named .{ending}", BAD if content[:4] == b"junk" else MAY
        yield label, f"r.{ending}", content, expect


def audio_prepared(rng, yard):
    """Recordings that the doctor listens to, each beside sound ones."""
    sound = [(str(yard.folder / audio), text) for audio, text, _ in ROWS[2:]]
    for label, name, content, expect in recordings(rng, yard):

        def call(name=name, content=content):
            path = Path(written(content, name)).with_name("metadata.csv")
            path.write_text(as_table([(name, "one two three"), *sound], ",", ("audio", "text")))
            return doctor(str(path), yard, min_level=-200.0)

        def judge(result, output, name=name, expect=expect):
            rows, named = result
            taken = any(audio == f"wavs/{name}" for audio, *_ in rows)
            if taken:
                return "its text is used" if expect == BAD else "accepted"
            return "named" if named else "it is lost"

        yield Case(label, call, expect, "", judge)


def references(rng, yard):
    """Recordings of a voice to clone."""
    voices = {family: sample.Voice.from_checkpoint(speaking(yard, family)[0], "cpu") for family in ("csm", "xtts")}
    for label, name, content, expect in recordings(rng, yard):
        family = rng.choice(list(voices))

        def call(name=name, content=content, voice=voices[family]):
            path = written(content, name)
            return len(list(voice.frames("one", reference=path, reference_text="one two", cap_seconds=0.2)))

        yield Case(f"{family}: {label}", call, expect)


# ---------------------------------------------------------------------------------------------------------------------
# token folders and checkpoints


def train_once(tokens, out, *flags):
    """A run of train.py; what it measured, and what it said."""
    train.main(configurator.configure(train.__file__, [*FLAGS, f"--data_dir={tokens}", f"--out_dir={out}", *flags]))
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    wavs = {path.name: path.read_bytes() for path in sorted((Path(out) / "samples").glob("*.wav"))}
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines], wavs


HARMLESS = ("made_by", "report.json", "ids.txt")


def spoil_tokens(rng, tokens):
    """(label, {file: its new content, None: it is removed}, kind) of one thing that is wrong in a token folder."""
    how = rng.choice(["meta", "meta", "meta", "meta", "file", "bytes", "index", "index", "numbers"])
    if how == "meta":
        if rng.random() < 0.05:
            junk = rng.choice([b"[]", b"3", b"null", b'"x"', b"[" * 99_999])
            return f"meta.json is {junk[:9]!r}", {"meta.json": junk}, ""
        label, tree, _, _ = damaged_tree(rng, json.loads((tokens / "meta.json").read_text()))
        return label, {"meta.json": dumps(tree).encode()}, ""
    if how == "index":
        name = rng.choice(["train.index.npy", "val.index.npy"])
        label, index = odd_index(rng, np.load(tokens / name))
        np.save(out := io.BytesIO(), index)
        return f"{name}: {label}", {name: out.getvalue()}, ""
    if how == "numbers":
        voices = ["val.reference.bin"] * (tokens / "val.reference.bin").exists()
        name = rng.choice(["train.codes.bin", "val.codes.bin", "train.text.bin", *voices])
        value = rng.choice([math.nan, math.inf, 1.0] if name in voices else [16, 301, 60000, 65535, 3])
        numbers = np.fromfile(tokens / name, np.float16 if name in voices else np.uint16)
        numbers[rng.randrange(len(numbers))] = value
        kind = "a bit in token files" if value in (1, 3) or value == 16 and "text" in name else ""
        return f"{name}: a number is {value}", {name: numbers.tobytes()}, kind
    name = rng.choice(sorted(os.listdir(tokens)))
    if how == "file":
        return f"{name} is missing", {name: None}, ""
    label, content, of = damaged_bytes(rng, (tokens / name).read_bytes())
    kind = "a bit in token files" if name.endswith(".bin") and of in ("bit", "zeros", "noise") else ""
    return f"{name}: {label}", {name: content}, "a letter in a table" if name == "meta.json" and of == "bit" else kind


def token_folders(rng, yard):
    """Token folders with a field or a file that is wrong, and a run of one step on them."""
    while True:
        family = rng.choice(["csm", "csm", "xtts"])
        tokens = yard.tokens(family)
        label, changes, kind = spoil_tokens(rng, tokens)
        expect = MAY if any(word in label for word in HARMLESS) else BAD

        def call(changes=changes, tokens=tokens, family=family):
            folder = fresh("tokens")
            shutil.copytree(tokens, folder)
            for name, content in changes.items():
                (folder / name).unlink()
                if content is not None:
                    (folder / name).write_bytes(content)
            return train_once(folder, fresh("out"), *FAMILIES[family])

        unread = " at byte " in label or ".bin: " in label  # not all of a file is read in one step

        def judge(result, output, tokens=tokens, family=family, expect=expect, unread=unread):
            sound = yard.once(("tokens", family), lambda: train_once(tokens, fresh("base"), *FAMILIES[family]))
            same = unless_same(sound)(result, output)
            if unread or same == "named" or expect == MAY:
                return same if expect == BAD else "accepted"
            return "trained on it, with the same result" if same == "accepted" else "trained on it"

        yield Case(f"{family}: {label}", call, expect, kind, judge)


def odd_index(rng, index):
    """(what was done, an index with something wrong)."""
    i, column = rng.randrange(len(index)), rng.randrange(5)
    name = data.INDEX_COLUMNS[column]
    value = rng.choice([-1, 10**9, 2**62, -(2**62), 10**4, 0])
    if rng.random() < 0.6 and index[i, column] != value and (name, value) != ("speaker", 0):
        made = index.copy()
        made[i, column] = value
        return f"{name} of {i} = {value}", made
    how = rng.choice(["zeros", "floats", "flat", "short", "objects", "wide"])
    made = {"zeros": lambda: 0 * index, "floats": lambda: index + 0.5, "flat": lambda: index.ravel(),
            "short": lambda: index[:-1], "objects": lambda: np.array([{}]),
            "wide": lambda: index[:, :4]}[how]()  # fmt: skip
    return how, made


def speaking(yard, family, which="best"):
    """The path of a sound checkpoint, and its dict."""
    content = yard.checkpoints[family][which]
    return str(yard.folder / "out" / family / f"{which}.pt"), content


def heard(path):
    """What a checkpoint says: ids, logits and the wav of a text."""
    voice = sample.Voice.from_checkpoint(path, "cpu")
    wav = voice.say("one two", cap_seconds=0.3)
    side = {"reference": voice.references[0]} if voice.model.reference else {}
    codes = np.arange(6 * voice.codec.n_codebooks).reshape(6, -1) % 16
    logits = voice.model.teacher_forced_logits(np.array([5, 6, 7]), codes, **side)
    return voice.text_ids("one two", "b"), logits, wav, voice.sample_rate


def resumed(yard, family, folder):
    of = "csm" if family == "lora" else family
    more = [f"--init_from={yard.folder}/out/csm/best.pt", "--lora_rank=2"] if family == "lora" else []
    return train_once(yard.tokens(of), folder, *FAMILIES[of], *more, "--init_from=resume", "--max_iters=2")


def odd_tensor(rng, x):
    """(what was done, a tensor that is none of the model's)."""
    ways = {
        "nan": lambda: torch.where(torch.arange(x.numel()).view(x.shape) == 0, math.nan, x.float()),
        "infinite": lambda: torch.full_like(x.float(), math.inf), "empty": lambda: x[:0] if x.ndim else x[None][:0],
        "longer": lambda: torch.cat([x, x]) if x.ndim else x[None], "complex": lambda: x.to(torch.complex64),
        "whole numbers": lambda: x.to(torch.int8), "truths": lambda: x.bool(), "a list": lambda: x.flatten().tolist(),
        "flat": lambda: x[None], "sparse": lambda: x.to_sparse(), "nothing": lambda: None,
        "without memory": lambda: x.to("meta"), "text": lambda: "x",
    }  # fmt: skip
    how = rng.choice(list(ways) + ["nan", "nan"])
    return how, ways[how]()


def spoil_checkpoint(rng, path, content):
    """(label, dict of a checkpoint, or bytes of one) with one thing that is wrong."""
    how = rng.choice(["field", "field", "field", "tensor", "tensor", "bytes", "bytes"])
    content = {key: value for key, value in content.items() if key != "format"}
    if how == "field":
        top = [(key,) for key in content]
        return damaged_tree(rng, content, top if rng.random() < 0.3 else None)[:2]
    if how == "tensor":
        chosen = rng.choice([p for p in branches(content) if isinstance(at(content, p), torch.Tensor)])
        way, x = odd_tensor(rng, at(content, chosen))
        return f"{'.'.join(map(str, chosen))}: {way}", changed(content, chosen, x)
    return damaged_bytes(rng, Path(path).read_bytes())[:2]


def used(yard, family, use, path):
    """What comes of a checkpoint that speaks, goes on or is started from."""
    if use == "speak":
        return heard(str(path))
    if use == "resume":
        shutil.copy(yard.folder / "out" / family / "metrics.jsonl", Path(path).parent)
        return resumed(yard, family, Path(path).parent)
    of = "csm" if family == "lora" else family
    return train_once(yard.tokens(of), fresh("out"), *FAMILIES[of], f"--init_from={path}")


def checkpoints(rng, yard):
    """Checkpoints of all families that speak, go on or are started from, each with one thing wrong."""
    while True:
        family, use = rng.choice([*FAMILIES, "lora"]), rng.choice(["speak", "speak", "resume", "init"])
        name = "last.pt" if use == "resume" else "best.pt"
        path, content = speaking(yard, family, name.removesuffix(".pt"))
        label, made = spoil_checkpoint(rng, path, content)

        def call(family=family, use=use, name=name, made=made):
            (folder := fresh("ckpt")).mkdir()
            if isinstance(made, bytes):
                (folder / name).write_bytes(made)
            else:
                weights.save_checkpoint(str(folder / name), made)
            return used(yard, family, use, folder / name)

        def sound(family=family, use=use, name=name):
            shutil.copytree(yard.folder / "out" / family, folder := fresh("base"))
            return used(yard, family, use, folder / name)

        def judge(result, output, family=family, use=use, sound=sound):
            return "named" if "changed: " in output else unless_same(yard.once((use, family), sound))(result, output)

        yield Case(f"{use} {family}: {label}", call, BAD, "", judge)


# ---------------------------------------------------------------------------------------------------------------------
# published weights, tokenizers, codecs


def golden(name, prefix="weights."):
    from safetensors.torch import load_file

    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}


def publications(yard):
    """{layout: (tensors, config, whether it is inside the file)} of small models as their authors publish them."""
    from safetensors.torch import load_file

    heads = {"num_attention_heads": 4, "depth_decoder_config": {"num_attention_heads": 4}}
    found = {"csm": (golden("csm_original"), heads, False)}
    for family in ("csm", "kani"):
        checkpoint = yard.checkpoints[family]["best"]
        folder = yard.folder / "hub" / family
        export(weights.load_model(checkpoint), folder)
        given = json.loads((folder / "config.json").read_text())
        found[f"{family} exported"] = load_file(folder / "model.safetensors"), given, False
    found["kanitts-2"] = golden("kani2"), json.loads((GOLDEN / "kani2.json").read_text())["config_json"], False
    folder = yard.folder / "hub" / "few"
    export(tiny(backbone=dict(d_model=64, d_ff=128)), folder, "mlx-4bit")
    given = json.loads((folder / "config.json").read_text())
    found["csm in 4 bits"] = load_file(folder / "model.safetensors"), given, False
    args = {"gpt_n_heads": 2, "gpt_start_text_token": 37, "gpt_stop_text_token": None}
    found["xtts"] = {f"gpt.{key}": x for key, x in golden("xtts_gpt").items()}, {"model_args": args}, False
    facts = json.loads((GOLDEN / "valle2.json").read_text())["config"]
    said = {"experimental": facts["experimental"], "size": {"heads": facts["n_heads"]}}
    found["valle"] = golden("valle2"), said, True
    return found


def put_published(folder, tensors, config, within, form):
    """Write weights as safetensors, in shards of such, or as a pickle; returns the folder."""
    from safetensors.torch import save_file

    folder.mkdir()
    if not within:
        (folder / "config.json").write_text(dumps(config))
    if form == "pickle":
        torch.save({"module": tensors, "config": config if within else {}}, folder / "model.pth")
        return folder
    tensors = {key: x.contiguous().clone() for key, x in tensors.items()}
    if form == "safetensors":
        save_file(tensors, folder / "model.safetensors", {"config": dumps(config)} if within else None)
        return folder
    names = sorted(tensors)
    places = {key: "ab"[n % 2] + ".safetensors" for n, key in enumerate(names)}
    for part in set(places.values()):
        save_file({key: tensors[key] for key in names if places[key] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(dumps({"weight_map": places}))
    return folder


def sized(path):
    """The logits of an utterance by a published model."""
    model = published.load(str(path), "cpu")
    c, rng, side = model.config, np.random.default_rng(0), {}
    text, codes = np.array([5, 6, 7]), rng.integers(0, c.codebook_size, (4, c.n_codebooks))
    if model.reference:
        shape = (1, c.speaker_size) if model.reference == "vector" else (9, c.reference_bands)
        side["reference"] = torch.from_numpy(rng.standard_normal(shape)).float()
    models.contract_check(model, text, codes, **side)
    return model.teacher_forced_logits(text, codes, **side).detach()


# Each of these is one way to spoil published weights: (rng, tensors, config, form) -> what was done, the expectation,
# the kind of damage, tensors and config, and what is to be done in the folder that these are written into.


def publish_config(rng, tensors, config, form):
    if rng.random() < 0.1:
        junk = rng.choice([b"", b"[]", b"3", b"{", b"\xff", b"[" * 99_999, b'{"a":' * 99_999])
        spoil = lambda folder: (folder / "config.json").write_bytes(junk)  # noqa: E731
        return f"config.json is {junk[:9]!r}", BAD, "", tensors, config, spoil
    label, config, _, way = damaged_tree(rng, config)
    return f"config: {label}", MAY if way == "missing" else BAD, "a number in config.json", tensors, config, None


def publish_tensor(rng, tensors, config, form):
    name = rng.choice(sorted(tensors))
    way, x = odd_tensor(rng, tensors[name])
    if form == "pickle" or isinstance(x, torch.Tensor) and not x.is_sparse and not x.is_meta:
        return f"{name}: {way}", BAD, "", {**tensors, name: x}, config, None
    return f"{name} is missing", BAD, "", without(tensors, (name,)), config, None


def publish_bytes(rng, tensors, config, form):
    seed = rng.getrandbits(32)

    def spoil(folder):
        dice = random.Random(seed)
        path = dice.choice(sorted(p for p in folder.iterdir() if p.name != "config.json"))
        path.write_bytes(damaged_bytes(dice, path.read_bytes())[1])

    return f"bytes by {seed}", BAD, "" if form == "pickle" else "a bit in published weights", tensors, config, spoil


def publish_header(rng, tensors, config, form):
    """Of a safetensors file, or the index of several."""
    name = rng.choice(sorted(tensors))
    if form == "shards":
        value = rng.choice([*ODD, "model.safetensors.index.json", "/etc/passwd", "b.safetensors/x", "no.safetensors"])

        def spoil(folder):
            path = folder / "model.safetensors.index.json"
            path.write_text(dumps({"weight_map": {**json.loads(path.read_text())["weight_map"], name: value}}))

        return f"index: a shard is {value!r:.40}", BAD, "", tensors, config, spoil
    where = rng.choice(["dtype", "shape", "data_offsets"])
    value = rng.choice([*ODD, "F8", "I64", [1], [0, 10**12], [-1]])

    def spoil(folder):
        for path in folder.glob("*.safetensors"):
            content = path.read_bytes()
            size = struct.unpack("<Q", content[:8])[0]
            header = json.loads(content[8 : 8 + size])
            header[name][where] = value
            text = dumps(header).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return f"header: {where} = {value!r:.30}", MAY if form == "pickle" else BAD, "", tensors, config, spoil


def publish_folder(rng, tensors, config, form):
    way = rng.choice(["empty", "two", "a folder", "itself", "code"])
    return f"folder: {way}", MAY if way == "two" else BAD, "", tensors, config, lambda folder: spoil_folder(folder, way)


def publish_sound(rng, tensors, config, form):
    return "sound", GOOD, "", tensors, config, None


PUBLISH = (publish_config, publish_config, publish_tensor, publish_tensor, publish_bytes, publish_bytes, publish_header,
           publish_folder, publish_sound)  # fmt: skip


def published_folders(rng, yard):
    """Folders of published weights with one thing wrong."""
    found = yard.once("publications", lambda: publications(yard))
    while True:
        layout = rng.choice(list(found))
        tensors, config, within = found[layout]  # within: VALL-E's config is a part of the file
        form = rng.choice(["safetensors", "pickle"] + ["shards"] * (not within))
        label, expect, kind, tensors, config, spoil = rng.choice(PUBLISH)(rng, tensors, config, form)

        def call(tensors=tensors, config=config, within=within, form=form, spoil=spoil):
            folder = put_published(fresh("hub"), tensors, config, within, form)
            if spoil:
                spoil(folder)
            result = sized(folder)
            assert not os.path.exists("executed"), "a pickle's code was run"
            return result

        def judge(result, output, layout=layout):
            sound = lambda: sized(put_published(fresh("hub"), *found[layout], "safetensors"))  # noqa: E731
            # where a tensor begins in memory changes how its products are rounded
            return unless_same(yard.once(("sized", layout), sound), within=1e-4)(result, output)

        yield Case(f"{layout}, {form}: {label}", call, expect, kind, judge)


class Runs:
    """A pickle of it would run a command."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def spoil_folder(folder, way):
    files = [p for p in folder.iterdir() if p.name != "config.json"]
    if way == "two":
        shutil.copy(files[0], files[0].with_name(f"z{files[0].name}"))
        return
    for path in files:
        os.remove(path)
    if way == "a folder":
        (folder / "model.safetensors").mkdir()
    elif way == "itself":
        content = {}
        content["model"] = content
        torch.save(content, folder / "model.pt")
    elif way == "code":
        torch.save({"model": Runs()}, folder / "model.pt")


def tokenizer_files(rng, yard):
    """sentencepiece models, tokenizer.json and XTTS's vocab.json, and what they make of texts."""
    import tokenizers

    learner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    special = ["[STOP]", "[UNK]", "[SPACE]", "[START]", "[en]"]
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    learner.train_from_iterator(WORDS * 3, trainer)
    kinds = {"sentencepiece": (yard.csm / "tokenizer.model").read_bytes(), "tokenizer.json": learner.to_str().encode()}
    texts = ["one two", "seven", "čaj 茶", "[en]one"]

    def read(content):
        cfg = SimpleNamespace(tokenizer=written(content, "tokenizer"), extend_vocab=0)
        tokenizer = prepare.read_tokenizer(cfg)
        ids = [tokenizer.encode(text) for text in texts]
        words = [tokenizer.decode(i) for i in ids]
        return ids, words, sorted(tokenizer.unknown("one茶")), tokenizer.describe()

    while True:
        kind, content = rng.choice(list(kinds.items()))
        if kind == "tokenizer.json" and rng.random() < 0.6:
            label, tree, _, _ = damaged_tree(rng, json.loads(content))
            made, expect = dumps(tree).encode(), MAY
            if rng.random() < 0.1:
                made = rng.choice([b"{}", b'{"model": 3}', b'{"model": {}}', b"{" * 99_999, b'{"model": null}'])
                label, expect = f"it is {made[:20]}", BAD
        else:
            label, made, how = damaged_bytes(rng, content)
            expect = BAD if how in ("empty", "text") else MAY
        yield Case(f"{kind}: {label}", partial(read, made), expect)


def nemo(name):
    """A NeMo archive with golden weights."""
    torch.save(golden(name), out := io.BytesIO())
    with tarfile.open(fileobj=(archive := io.BytesIO()), mode="w") as tar:
        info = tarfile.TarInfo("./model_weights.ckpt")
        info.size = len(out.getvalue())
        tar.addfile(info, io.BytesIO(out.getvalue()))
    return {"x.nemo": archive.getvalue()}


def coqui():
    """The files of XTTS-v2 that hold its codec."""
    parts = {"waveform_decoder": golden("xtts_hifigan"), "speaker_encoder": golden("xtts_speaker_encoder")}
    model = {f"hifigan_decoder.{part}.{key}": x for part, weights in parts.items() for key, x in weights.items()}
    model["mel_stats"] = stats = golden("xtts_mels", "in.")["mel_norms"]
    return {"dvae.pth": golden("xtts_dvae"), "mel_stats.pth": stats, "model.pth": {"model": model}}


def packed(content):
    if isinstance(content, bytes):
        return content
    torch.save(content, out := io.BytesIO())
    return out.getvalue()


def coded_noise(name, files):
    """The codes and the sound that a codec with these files makes of noise."""
    folder = fresh("codec")
    for file, content in files.items():
        written(packed(content), file, folder)
    codec = codecs.load_codec(name, str(folder))
    codes = codec.encode(0.1 * torch.randn(1, codec.sample_rate // 5, generator=torch.Generator().manual_seed(0)))
    return codes, codec.decode(codes)


def spoil_codec(rng, files):
    """(label, files, kind) of a codec in which one thing is wrong."""
    file = rng.choice(sorted(files))
    how, tree = rng.choice(["field", "tensor", "bytes", "bytes", "missing"]), {"all": files[file]}
    if how == "missing":
        return f"{file} is missing", {key: x for key, x in files.items() if key != file}, ""
    if how == "bytes" or isinstance(files[file], bytes):
        label, content, of = damaged_bytes(rng, packed(files[file]))
        kind = "" if of in ("cut", "empty", "text") else "a bit in a codec's weights"
        return f"{file}: {label}", {**files, file: content}, kind
    paths = [p for p in branches(tree) if isinstance(at(tree, p), torch.Tensor) == (how == "tensor")]
    if how == "tensor" or not paths:
        path = rng.choice(paths or [("all",)])
        way, x = odd_tensor(rng, at(tree, path))
        return f"{file} {'.'.join(map(str, path))}: {way}", {**files, file: changed(tree, path, x)["all"]}, ""
    label, tree, _, _ = damaged_tree(rng, tree, paths)
    return f"{file} {label}", {**files, file: tree.get("all", {})}, ""


def codec_files(rng, yard):
    """Weights of codecs and codec.pt with one thing wrong, and what they make of noise."""
    sets = {"mel": {"codec.pt": yard.codec.pack()}, "nanocodec": nemo("nemo_nanocodec"), "xtts": coqui()}
    while True:
        name = rng.choice(["mel", "mel", "mel", *sets])
        label, files, kind = spoil_codec(rng, sets[name])

        def judge(result, output, name=name):
            return unless_same(yard.once(("codec", name), partial(coded_noise, name, sets[name])))(result, output)

        yield Case(f"{name}: {label}", partial(coded_noise, name, files), BAD, kind, judge)


# ---------------------------------------------------------------------------------------------------------------------
# recipes, keys, texts

RECIPES = [
    "learning_rate = ", "learning_rate = 1 +", "raise ValueError('no')", "import sys\nsys.exit(0)", "raise SystemExit",
    "import nothing_of_that_name", "learning_rte = 1", "learning_rate = 'x'", "1 / 0", "lora_targets = [len]",
    "milestones = ['x']", "milestones = [None]", "freeze = {3: 4}", "backbone = len", "def f(): return f()\nf()",
    "x = 'a' * 3", "learning_rate = [1]", "freeze = [3]", "freeze = ['(']", "freeze = [len]", "lora_targets = [3]",
    "reference_seconds = ['a', 'b']", "reference_seconds = [1]", "reference_seconds = [float('nan'), 1.0]",
    "raise Exception('x' * 5000)", "raise MemoryError", "assert False", "import os\nos.chdir('/nowhere')", "\tx = 1",
    "raise ValueError('a\\nb')", "reference_seconds = [[1], 2]", "lr_schedule = 'x' * 5000", "learning_rate = True",
    "class arch: pass\nmax_iters = arch", "text = 3", "max_iters = 1.0", "max_iters = 10 ** 5000", "data_dir = None",
    "out_dir = b'x'", "lora_targets = []", "sources = {}", "learning_rate = 1j",
]  # fmt: skip
BYTES = [
    b"\xff\xfe", b"\0", b"learning_rate = 1\0", "x = '\xe9'".encode("latin-1"), b"\xef\xbb\xbflearning_rate = 'x'",
    b"(" * 5000, b"learning_rate = " + b"-" * 99_999 + b"1", b"x = " + b"[" * 300,
    b"learning_rate = " + b"9" * 9000,
]  # fmt: skip
ARGUMENTS = [
    "-x", "--=", "--", "---", "--learning_rate", "--learning_rate=", "--learning_rte=1", "-", "", "x", "x.py",
    "\xe9.py",
    "--max_iters=1=2", "--data_dir", "--muon=2", "--muon x", "--\udcff=1", "--max_iters=\udcff", "--" + "x" * 5000,
    "--max_iters=" + "x" * 5000, "--max_iters=" + "9" * 5000, "--max_iters=" + "[" * 5000, "--backbone={", "--help=3x",
    "--backbone={'n_layer': 1, 'n_layer': 2}", "--backbone=" + "(" * 3000, "/", ".py", "--max_iters=1_0", "\0.py",
    "--milestones=[1,2", "--freeze=x", "--learning_rate=1e-3x", "--out_dir=\0", "x" * 5000 + ".py",
    "--data_dir=" + "x" * 5000,
]  # fmt: skip


def trained(yard, flags, family="csm"):
    return train_once(yard.tokens(family), fresh("out"), *FAMILIES[family], *flags)


def recipes(rng, yard):
    """Recipes with mistakes and odd command lines, for a run of one step."""
    while True:
        if rng.random() < 0.6:
            content = rng.choice([*(r.encode() for r in RECIPES), *BYTES])
            harmless = content in (b"x = 'a' * 3", b"text = 3", b"sources = {}", b"\tx = 1")  # sources: not its key

            def call(content=content):
                return trained(yard, [written(content, "recipe.py")])

            yield Case(f"recipe {content!r:.120}", call, MAY if harmless else BAD)
        else:
            words = rng.choice(ARGUMENTS)
            yield Case(f"arguments {words!r:.120}", partial(trained, yard, words.split(" ")), MAY)


VALUES = [
    "nan", "inf", "-inf", "-1", "0", "0.5", "-0.5", "1e999", "1e20", "x", "", "None", "[]", "{}", "[None]", "{'x': 1}",
    "True", "\xe9", str(10**30), str(-(10**30)), "1" * 5000, "x" * 5000, "\udcff", "a\nb",
]  # fmt: skip
LEFT_OUT = ("compile", "wandb_project")  # the one builds for minutes, the other asks the network
OWN = {
    "xtts": ("n_latents", "conditioning_layers", "perceiver_layers", "perceiver_heads", "chunk_seconds",
             "text_positions", "code_positions", "text_loss_weight", "hide_text_stop", "reference_seconds"),
    "kani": ("loss_on", "drop_repeats"),
    "valle nar": ("mode", "shared_heads", "level_attention", "segmented_mask", "stretched_text", "mask_ratio",
                  "text_dropout", "random_level", "length_loss_weight", "level_weights", "rounds", "whole_frames",
                  "guidance"),
}  # fmt: skip


IDLE = {  # sound values that have no effect there
    "csm": ("n_latents = 3", "mask_ratio = 0.5", "loss_on = 'audio'", "reference_seconds = [1.0, 2.0]", "rounds = 3",
            "milestones = [5, 6]", "lora_alpha = 2.0", "min_lr = 1e-4"),
    "kani": ("decoder_fraction = 0.5", "decoder = 'llama-60M'", "text_positions = 90"),
    "valle ar": ("mask_ratio = 0.5", "rounds = 3", "guidance = 2.0", "drop_repeats = True"),
}  # fmt: skip


def expected(types, text):
    """Whether a value has to be refused for a key of these types."""
    numbers = int in types or float in types
    no_numbers = ("x", "\xe9", "[]", "{}", "[None]", "{'x': 1}", "\udcff", "a\nb", "x" * 5000)
    if numbers and text in ("nan", "inf", "-inf", "1e999", "-1", "-0.5", str(-(10**30))):
        return BAD
    return BAD if numbers and text in no_numbers and str not in types else MAY


def keys_of_train(rng, yard):
    """One key of train.py with an odd value, in a family that has it, for a run of one step."""
    defaults = configurator.read_defaults(train.__file__)
    owner = {key: family for family, keys in OWN.items() for key in keys}
    while True:
        if rng.random() < 0.1:
            family, as_flag = rng.choice(list(IDLE)), rng.random() < 0.5
            line = rng.choice(IDLE[family])

            def call(family=family, as_flag=as_flag, line=line):
                flag = "--" + line.replace(" = ", "=", 1).replace("'", "")
                return trained(yard, [flag if as_flag else written(line.encode(), "recipe.py")], family)

            yield Case(f"{family} {'flag' if as_flag else 'recipe'}: {line} has no effect", call, BAD)
        key = rng.choice([key for key in defaults if key not in LEFT_OUT])
        family, value = owner.get(key, rng.choice(["csm", "csm", "valle ar"])), rng.choice(VALUES)
        if key in ("backbone", "decoder") and rng.random() < 0.8:
            sizes = eval(next(flag for flag in FAMILIES[family] if flag.startswith("--backbone=")).partition("=")[2])
            more = ("dropout", "norm_eps", "rope_theta", "max_positions", "head_dim", "rope_scaling", "layers")
            field = rng.choice([*sizes, *more])
            sizes[field] = rng.choice([v for v in ODD if v != 10**30])
            value, expect = repr(sizes).replace("nan", "1e999 - 1e999").replace("inf", "1e999"), MAY
        elif key == "max_iters" and value in (str(10**30), "1" * 5000):
            continue
        else:
            expect = MAY if key == "seed" else expected(defaults[key][1], value)
        flags = [f"--{key}={value}"] + ([] if key == "max_iters" else ["--max_iters=1"])
        if key.startswith("lora_"):
            flags += [f"--init_from={yard.folder}/out/csm/best.pt"] + ([] if key == "lora_rank" else ["--lora_rank=2"])
            family = "csm"
        yield Case(f"{family}: --{key}={value!r:.80}", partial(trained, yard, flags, family), expect)


def keys_of_prepare(rng, yard):
    """One key of prepare.py with an odd value, for a small set."""
    (yard.folder / "sound.csv").write_text(as_table(ROWS, ","))
    defaults = configurator.read_defaults(prepare.__file__)
    small = {"n_codebooks": 2, "codebook_size": 16, "sample_rate": RATE, "n_mels": 20, "dims": 16}
    formats = ["{text!r}{speaker}", "{text:>9}", "{text:d}", "{text}{text}", "{speaker.x}{text}", "{text[0]}", "{", "x",
               "{{text}}", "{text:>2000000000}", "{speaker!s}{text}", "{0}", "{}{text}", "[{speaker}]{text}\xe9"]
    while True:
        key, value, expect = rng.choice(list(defaults)), rng.choice(VALUES), MAY
        if key == "text_format" and rng.random() < 0.8:
            value = rng.choice(formats)
            expect = MAY if value.endswith("\xe9") else BAD
        elif key == "codec_args" and rng.random() < 0.8:
            field = rng.choice([*small, "frame_rate", "x"])
            args = {**small, field: rng.choice([v for v in ODD if v not in ("x" * 5000,)])}
            value = repr(args).replace("nan", "1e999 - 1e999").replace("inf", "1e999")
        elif key in ("device", "overwrite", "data_dir"):
            pass
        else:
            expect = expected(defaults[key][1], value)
        expect = MAY if key in ("seed", "min_level") else expect

        def call(key=key, value=value):
            out = fresh("tokens")
            flags = [f"--sources={yard.folder}/sound.csv", f"--data_dir={out}", f"--codec_args={small}",
                     "--val_fraction=0.4", "--vocab_size=300", "--min_chars_per_second=0.1", "--fit_seconds=2",
                     f"--{key}={value}"]  # fmt: skip
            prepare.main(configurator.configure(prepare.__file__, flags))
            return train_once(out, fresh("out"), *FAMILIES["csm"]) if out.exists() and key == "text_format" else None

        yield Case(f"--{key}={value!r:.80}", call, expect)


def keys_of_sample(rng, yard):
    """One key of sample.py with an odd value."""
    defaults = configurator.read_defaults(sample.__file__)
    while True:
        family = rng.choice(["csm", "valle nar", "xtts"])
        path, _ = speaking(yard, family)
        key, value = rng.choice(list(defaults)), rng.choice(VALUES)
        expect = MAY if key in ("seed", "text", "out_dir", "rounds") else expected(defaults[key][1], value)

        def call(key=key, value=value, path=path):
            flags = [f"--ckpt={path}", "--text=one", f"--out_dir={fresh('spoken')}", "--cap_seconds=0.2"]
            sample.main(configurator.configure(sample.__file__, [*flags, f"--{key}={value}"]))

        yield Case(f"{family}: --{key}={value!r:.80}", call, expect)


def texts(rng, yard):
    """Texts to speak, and files of them."""
    voices = [sample.Voice.from_checkpoint(speaking(yard, family)[0], "cpu") for family in ("csm", "kani", "valle nar")]
    parts = ["one", "two", " ", "\n", "\0", "\x1b[31m", "\ud800", "\udcff", "\u200b", "\u2028", "\x85", "\ufeff", "[a]",
             "{speaker}", "<s>", "\u202e", "\xe9", "e\u0301", "\u0301", "\ufb01", "\u8336", "\ufffd", "\uffff", "\r",
             "%s", "\\n", "\x7f", "\U0001f600"]  # fmt: skip
    while True:
        text = "".join(rng.choices(parts, k=rng.choice([0, 1, 2, 3, 8])))
        text = rng.choice([text, text, text * 50, "one " * rng.choice([100, 1000])])
        voice, as_file = rng.choice(voices), rng.random() < 0.3
        halves = any(0xD800 <= ord(c) < 0xE000 for c in text)

        def call(text=text, voice=voice, as_file=as_file):
            lines = [text]
            if as_file:
                lines = sample.read_lines("", written(text.encode("utf-8", "surrogatepass"), "lines.txt"))
            return [len(voice.say(line, cap_seconds=0.1)) for line in lines]

        plain = not text.isprintable() or any(c in text for c in "\ufffd\uffff")
        blank = not text.replace("\0", "").replace("\ufeff", "").strip()
        expect = BAD if blank else MAY
        yield Case(f"{'file' if as_file else 'text'} {text!r:.80}, {len(text)} characters", call, expect,
                   "control characters" if plain and not halves and not blank else "")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# the tests

READERS = {  # name: (generator, cases in the default run, cases in the slow one)
    "tables": (tables, 40, 700), "sources key": (source_keys, 12, 120), "json": (json_lines, 30, 400),
    "codes rows": (coded, 15, 150), "parquet": (parquet, 15, 200), "tar": (tar, 20, 250),
    "audio: prepare": (audio_prepared, 30, 350), "audio: reference": (references, 20, 250),
    "token folders": (token_folders, 30, 450), "checkpoints": (checkpoints, 26, 800),
    "published": (published_folders, 32, 600), "tokenizers": (tokenizer_files, 20, 200),
    "codec files": (codec_files, 15, 200), "recipes": (recipes, 25, 200), "train keys": (keys_of_train, 35, 600),
    "prepare keys": (keys_of_prepare, 25, 300), "sample keys": (keys_of_sample, 25, 300), "texts": (texts, 12, 200),
}  # fmt: skip


NEEDS = {"parquet": "pyarrow.parquet", "published": "safetensors.torch", "tokenizers": "tokenizers",
         "codec files": "safetensors.torch"}  # fmt: skip


def tried(name, seed, count, yard, folder):
    """The outcomes of a reader's cases; prints them, and fails where one is a fault."""
    reader = READERS[name][0]
    pytest.importorskip(NEEDS.get(name, "torch"))
    outcomes = run(lambda rng: reader(rng, yard), seed, count, folder)
    faults = sift(outcomes, ALLOWED)
    if log := os.environ.get("FUZZ_LOG"):
        with open(log, "a", encoding="utf-8") as file:
            file.writelines(dumps({"reader": name, "seed": seed, **asdict(o)}) + "\n" for o in outcomes)
    print(table({name: outcomes}))
    assert not faults, "\n" + report({name: outcomes}, seed)
    assert len(outcomes) == count


def test_the_verdicts(tmp_path, monkeypatch):
    """The instrument itself: what a reader does is told as what it is, and the cases after it are called."""

    def fail(error):
        raise error

    def busy():
        while True:
            pass

    calls = [
        ("accepted", lambda: 3, MAY), ("silent", lambda: 3, BAD), ("named", lambda: print("warning: odd"), BAD),
        ("clear", lambda: fail(ValueError("x is odd")), BAD), ("refused", lambda: fail(ValueError("x is odd")), GOOD),
        ("clear", lambda: fail(FileNotFoundError(2, "No such file", "x")), MAY),
        ("silent", lambda: fail(SystemExit(0)), BAD),
        ("unclear", lambda: (print("more", file=sys.stderr), fail(ValueError("x"))), BAD),
        ("traceback", lambda: fail(KeyError("x")), MAY), ("traceback", lambda: fail(RecursionError()), MAY),
        ("hang", busy, MAY), ("hang", lambda: time.sleep(99), MAY), ("crash", os.abort, MAY),
        ("accepted", lambda: 3, GOOD),
    ]  # fmt: skip
    monkeypatch.setattr(fuzz, "CPU_LIMIT", 0.2)
    monkeypatch.setattr(fuzz, "WALL_LIMIT", 2)
    cases = [Case(str(i), call, expect, "odd" * (i == 1)) for i, (_, call, expect) in enumerate(calls)]
    outcomes = run(lambda rng: iter(cases), 0, len(cases), tmp_path)
    assert [(o.number, o.label, o.verdict) for o in outcomes] == [(i, str(i), c[0]) for i, c in enumerate(calls)]
    assert len(sift(outcomes, {"odd": "known"})) == 8 and outcomes[1].verdict == "allowed"
    assert "KeyError" in outcomes[8].what and outcomes[12].what == "signal 6"


@pytest.mark.parametrize("name", READERS)
def test_a_few_damaged_inputs(name, yard, tmp_path):
    tried(name, SEED, READERS[name][1], yard, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_thousands_of_damaged_inputs(name, yard, tmp_path):
    tried(name, SEED + 1, READERS[name][2], yard, tmp_path)


def test_the_kinds_that_may_be_silent():
    assert len(ALLOWED) <= 20 and all(ALLOWED.values())

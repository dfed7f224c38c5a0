import bz2
import gzip
import io
import itertools
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import LFM2_STACK, Evil
from helpers import run as train_on
from safetensors.torch import load_file
from test_prepare import RATE, config, contents, listened, make_set, run, words, write_csv

import prepare
from codec import load_codec, published_sizes
from data import TokenFiles
from model import KaniConfig
from parts import configurator, tables
from parts.audio import resample
from parts.sources import load, read_source, read_sources, utterance_id
from parts.tables import read_rows
from parts.text import load_tokenizer
from voice import Voice

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def no_weights(monkeypatch, tmp_path):
    """A hub's cache folder without anything in it."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


# -----------------------------------------------------------------------------
# metadata

QUOTED = '"Well," she said,\nand left.'
LAYOUTS = {
    "ljspeech": ("metadata.csv", 'a|He said "no.|He said "no.\nb|10 %|ten percent\nc|three|\n'),
    "ljspeech, two columns": ("metadata.csv", 'a|He said "no.\nb|ten percent\nc|three\n'),
    "ljspeech, header and extension": (
        "metadata.csv", 'ID|Text|Normalised Text\na.wav|x|He said "no.\nb.wav|x|ten percent\nc.wav|x|three\n'),
    "pipes with a header": ("list.txt", 'audio_file|text\nwavs/a.wav|He said "no.\nb.wav|ten percent\nc.wav|three\n'),
    "pipes, as pandas writes them": ("list.txt", 'audio_file|text\na.wav|"He said ""no."\nb|ten percent\n"c"|three\n'),
    "csv": ("metadata.csv", 'Audio,text,other\na.wav,"He said ""no.",1\nwavs/b.wav,ten percent,2\n./c.wav,three,3\n'),
    "csv, semicolons": ("metadata.csv", 'audio;text\na.wav;"He said ""no."\nb.wav;ten percent\nc.wav;three\n'),
    "tsv": ("x.tsv", 'path\tsentence\na.wav\t"He said ""no."\nb.wav\tten percent\nc.wav\tthree\n'),
    "tsv with stray quotes": ("x.tsv", 'path\tsentence\na.wav\tHe said "no.\nb.wav\tten percent\nc.wav\tthree\n'),
    "json": ("x.json", json.dumps([{"audio": {"path": "a.wav"}, "text": 'He said "no.'},
                                   {"file": "b.wav", "text": "ten percent", "speaker": None},
                                   {"audio": "c.wav", "text": "three"}], indent=1)),
    "jsonl": ("x.jsonl", '{"audio_filepath": "a.wav", "text": "He said \\"no."}\n\n'
                         '{"file_name": "b.wav", "text": "ten percent"}\n{"path": "c.wav", "text": "three"}'),
}  # fmt: skip


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_the_same(tmp_path, layout, newline, bom):
    name, text = LAYOUTS[layout]
    (tmp_path / name).write_bytes(bom + text.replace("\n", newline).encode())
    got = read_source(str(tmp_path / name))
    assert [(u.id, u.text) for u in got] == [("a", 'He said "no.'), ("b", "ten percent"), ("c", "three")]
    assert not any(u.reason for u in got)
    assert {u.speaker for u in got} == {"speaker"}  # not the folder's name


def test_quoted_fields_with_commas_and_line_breaks(tmp_path):
    write_csv(tmp_path / "metadata.csv", [("a.wav", QUOTED, "x"), ("b.wav", "b", "y")])
    got = read_source(str(tmp_path))
    assert [(u.id, u.text, u.speaker) for u in got] == [("a", '"Well," she said,\nand left.', "x"), ("b", "b", "y")]


def quoted(rows, delimiter, opened, closed, ways=()):
    """A table of so many rows; a quotation mark opens in one row and closes in another, some have others of csv."""
    texts = {i: f"{words(i)} row {i}" for i in range(rows)} | {i: f'"{words(i)}, row {i}"' for i in ways}
    texts[opened] = '"' + texts[opened]
    texts[closed] = texts.get(closed, "") + '"'
    return f"audio{delimiter}text\n" + "".join(f"c{i:03d}.wav{delimiter}{texts[i]}\n" for i in range(rows))


@pytest.mark.parametrize("closed", [7, 99], ids=["closed later", "never closed"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"], ids=["comma", "semicolon", "tab", "pipe"])
def test_a_stray_quotation_mark_takes_no_rows(tmp_path, delimiter, closed):
    (tmp_path / "m.csv").write_text(quoted(24, delimiter, 5, closed))
    if closed == 99 and delimiter in ",;":
        with pytest.raises(ValueError, match="m.csv, line 7: a quotation mark in the row that begins here"):
            read_source(str(tmp_path / "m.csv"))
        return
    got = read_source(str(tmp_path / "m.csv"))
    assert [u.id for u in got if not u.reason] == [f"c{i:03d}" for i in range(24)]
    assert [u.id for u in got if '"' in u.text] == ["c005", "c007"][: 2 if closed == 7 else 1]
    assert all(u.text.count("row") == 1 for u in got)


def test_a_stray_quotation_mark_where_others_are_meant(tmp_path):
    (tmp_path / "m.csv").write_text(quoted(24, ",", 5, 7, ways=[2, 20]))
    got = read_source(str(tmp_path / "m.csv"))
    assert len(got) == 22 and got[2].text == f"{words(2)}, row 2" and got[-4].text == f"{words(20)}, row 20"
    says = "line 7: a quotation mark opens here and closes in line 9, after other rows"
    assert [(u.id, u.reason, u.detail) for u in got if u.reason] == [("c005", "bad row", says)]
    for ways, of_csv in (([2, 20], "',' expected"), ([2], "unexpected end")):
        (tmp_path / "m.csv").write_text(quoted(24, ",", 5, 99, ways=ways))
        says = f"m.csv, line 7: a quotation mark in the row that begins here does not close where it should .{of_csv}"
        with pytest.raises(ValueError, match=says):
            read_source(str(tmp_path / "m.csv"))
    everywhere = "".join(f'"{name}"\t"{words(i)}"\n' for i, name in enumerate(["audio", "a.wav", "b.wav", "c.wav"]))
    (tmp_path / "m.csv").write_text(everywhere.replace(words(0), "text").replace(f'{words(2)}"', words(2)))
    with pytest.raises(ValueError, match="m.csv, line 3: a quotation mark"):
        read_source(str(tmp_path / "m.csv"))


def test_what_the_columns_without_a_header_are(tmp_path):
    texts = [f"{words(i)} and {words(i + 1)}" for i in range(12)]

    def read(second, third):
        rows = zip(range(12), second, third, strict=True)
        (tmp_path / "m.csv").write_text("".join(f"{i}.wav|{a}|{b}\n" for i, a, b in rows))
        got = read_source(str(tmp_path / "m.csv"))
        assert not any(u.reason for u in got)
        return [u.text for u in got], [u.speaker for u in got]

    for names in (["ann", "bob"] * 6, ["p225"] * 12, [*"000111222333"]):
        assert read(names, texts) == read(texts, names) == (texts, names)
    for written in ([f"{text.title()}." for text in texts], [f"{i} + {i}" for i in range(12)]):
        assert read(written, texts) == (texts, ["speaker"] * 12)
    assert read(texts, [""] * 12)[0] == texts
    phonemes = [text.translate(str.maketrans("eoinu", "ɛəɪŋʌ")) for text in texts]
    for third in (phonemes, [f"spk{i}" for i in range(12)]):
        with pytest.raises(ValueError, match="m.csv: has no header, and what its 3 columns are is not clear: add one"):
            read(texts, third)
    with pytest.raises(ValueError, match="its 4 columns"):
        read(texts, [f"{text}|ann" for text in texts])


def test_values_that_are_no_text(tmp_path):
    rows = [  # fields, what becomes of them
        ({"text": float("nan")}, "empty text"),
        ({"text": ["one"]}, "text is of the type list, not text"),
        ({"text": True}, "text is of the type bool, not text"),
        ({"text": {"path": "x"}}, "text is of the type dict, not text"),
        ({"text": "a", "speaker": [1]}, "speaker is of the type list, not text"),
        ({"text": "a", "audio": ["x.wav"]}, "audio is of the type list, not text"),
        ({"text": "a", "audio": float("nan")}, "no audio"),
        ({"text": "a", "audio": {"bytes": "abc"}}, "its recording is of the type str, not bytes"),
        ({"text": "a", "end": float("inf")}, "from 0 s to inf s"),
        ({"text": "a", "end": "1e400"}, "from 0 s to inf s"),
        ({"text": "a", "end": 1e300}, "from 0 s to 1e+300 s"),
        ({"text": "a", "start": 1, "duration": float("nan")}, "from 1 s to nan s"),
        ({"text": "a", "start": 1e300}, "from 1e+300 s to None s"),
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps({"audio": "x.wav", **row}) for row, _ in rows))
    for u, (row, says) in zip(read_source(str(tmp_path / "m.jsonl")), rows, strict=True):
        assert u.reason and (u.reason, u.detail.partition(": ")[2])[u.reason == "bad row"] == says, row
    numbers = [{"audio": "x.wav", "text": 1.0, "speaker": s} for s in (1, 1.0, "1.0", " 1", float("nan"), None)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, numbers)))
    got = read_source(str(tmp_path / "m.jsonl"))
    assert [(u.text, u.speaker) for u in got] == [("1", "1")] * 4 + [("1", "speaker")] * 2


def test_half_a_character(tmp_path):
    row = {"audio": "x\ud83d.wav", "text": "one \ud83d two \ud83d\ude00", "speaker": "a\ude00"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    with tarfile.open(tmp_path / "m.tar", "w") as tar:
        add(tar, "y\udcff.json", b'{"text": "a", "audio_tokens": [[1]], "audio_tokens_length": "\\ud83d"}')
    got = [u for name in ("m.jsonl", "m.tar") for u in read_source(str(tmp_path / name))]
    assert [(u.id, u.text, u.speaker) for u in got] == [
        ("x\\ud83d", "one  two \U0001f600", "a"), ("y\\udcff", "a", "speaker")]  # fmt: skip
    json.dumps([[u.id, u.audio, u.text, u.speaker, u.detail] for u in got], ensure_ascii=False).encode()
    assert all(0 <= prepare.fraction(u.id) < 1 for u in got)


def test_ids_are_unlike_in_all_sources(tmp_path):
    rows = [{"text": words(i), **codes} for i, codes in enumerate(kani(coded(4, 2)))]
    for folder, speaker in (("ann/data", "ann"), ("bob/data", "bob"), ("cy/data", "cy")):
        (tmp_path / folder).mkdir(parents=True)
        jsonl([{**row, "speaker": speaker} for row in rows], tmp_path / folder / "train-00000-of-00001.jsonl")
        write_csv(tmp_path / folder / "m.csv", [(f"wavs/{i}.wav", "x", speaker) for i in range(4)])

    def ids(given):
        return [[u.id for u in found] for found in read_sources(given)]

    shards = [str(tmp_path / name / "data" / "train-00000-of-00001.jsonl") for name in ("ann", "bob", "cy")]
    names = [[f"{folder}train-00000-of-00001/{i}" for i in range(4)] for folder in ("", "bob/", "cy/")]
    assert ids(shards) == names and ids(shards[:2]) == names[:2]
    assert ids(shards[1]) == names[:1]  # as by itself
    assert ids(str(tmp_path / "*" / "data" / "*.jsonl")) == [sum(names, [])]
    tables = [str(tmp_path / name / "data" / "m.csv") for name in ("ann", "bob")]
    assert ids(tables) == [[*"0123"], [f"bob/{i}" for i in range(4)]]
    write_csv(tmp_path / "ann/data/m2.csv", [("1.wav", "the same recording", "ann"), ("4.wav", "x", "ann")])
    assert ids([tables[0], str(tmp_path / "ann/data/m2.csv")]) == [[*"0123"], ["1", "4"]]
    assert ids([tables[0], {"path": tables[0], "cap": 2}]) == [[*"0123"]] * 2


def test_a_name_as_another_system_spells_it(tmp_path):
    (tmp_path / "wavs").mkdir()
    for name in ("a", "caf\u00e9", "cafe\u0301s"):
        soundfile.write(tmp_path / "wavs" / f"{name}.wav", np.full(RATE, 0.5), RATE)
    names = ["wavs\\a.wav", "cafe\u0301.wav", "wavs\\caf\u00e9s", "b.wav"]
    write_csv(tmp_path / "m.csv", [(name, "one two three", "ann") for name in names])
    got = prepare.check_each(read_source(str(tmp_path / "m.csv")), prepare.find)
    assert [(u.id, u.reason) for u in got] == [
        ("a", ""), ("cafe\u0301", ""), ("caf\u00e9s", ""), ("b", "missing file")]  # fmt: skip


def test_ids(tmp_path):
    at = str(tmp_path / "metadata.csv")
    names = ["wavs/a.wav", "a.FLAC", "x/a.wav", str(tmp_path / "x" / "a.ogg"), "v1.2", "v1.2.mp3", "/elsewhere/a.wav"]
    assert [utterance_id(n, at) for n in names] == ["a", "a", "x/a", "x/a", "v1.2", "v1.2", "/elsewhere/a"]


def test_cuts(tmp_path):
    lines = [{"audio": "talk.wav", "text": "t", **extra} for extra in (
        {"start": 0.5, "end": 1.25}, {"offset": 2, "duration": 1.5}, {"duration": 9}, {"end": "3"}, {"start": 4},
        {"start": 3, "end": 2}, {"start": "soon"}, {"start": float("nan")}, {"start": -1},
    )]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    got = read_source(str(tmp_path / "m.jsonl"))
    assert [(u.start, u.end) for u in got[:5]] == [(0.5, 1.25), (2.0, 3.5), (0.0, None), (0.0, 3.0), (4.0, None)]
    assert [u.id for u in got[:5]] == ["talk_0.5-1.25", "talk_2-1.5", "talk", "talk_0-3", "talk_4-"]
    assert [u.reason for u in got] == [""] * 5 + ["bad row"] * 4


def test_source_options(tmp_path):
    rows = [(f"{i}.wav", f"text {i}", "us" if i % 2 else "england", "x" if i == 1 else "") for i in range(10)]
    write_csv(tmp_path / "m.csv", rows, ("audio", "text", "Accent", "speaker"))
    wanted = {"accent": "u.", "text": r"\D+[1-7]"}
    source = {"path": str(tmp_path / "m.csv"), "speaker": "anna", "name": "set", "filter": wanted}
    got = read_source(source)
    used = [u for u in got if not u.reason]
    assert [u.id for u in used] == ["set/1", "set/3", "set/5", "set/7"]
    assert [u.speaker for u in used] == ["anna"] * 4  # the source says more than a column
    assert [u.speaker for u in read_source({**source, "speaker": ""}) if not u.reason] == ["x"] + ["speaker"] * 3
    assert [u.reason for u in got if u not in used] == ["filtered out"] * 6
    capped = [u.id for u in read_source({**source, "cap": 2}) if not u.reason]
    assert len(capped) == 2 and set(capped) < {u.id for u in used}
    assert capped == [u.id for u in read_source({**source, "cap": 2}) if not u.reason]


def test_a_cap_leaves_both_splits_their_share(tmp_path):
    write_csv(tmp_path / "m.csv", [(f"{i}.wav", "text", "s") for i in range(2000)])
    capped = [u for u in read_source({"path": str(tmp_path / "m.csv"), "cap": 200}) if not u.reason]
    assert 5 < len(prepare.held_out(capped, None, 0.1)) < 40


def test_rows_at_fault(tmp_path):
    (tmp_path / "m.csv").write_text("audio,text\na.wav,one\nb.wav,two, and three\nc.wav\n,no audio\nd.wav,  \n")
    got = read_source(str(tmp_path / "m.csv"))
    assert [(u.id, u.reason) for u in got] == [
        ("a", ""), ("b", "bad row"), ("c", "bad row"), ("line 5", "bad row"), ("d", "empty text")]  # fmt: skip
    assert got[1].detail == "line 3: 3 fields instead of 2"


# -----------------------------------------------------------------------------
# codes that are there already


def coded(n=24, books=32, size=2048, seed=0):
    """Rows (text, speaker, codes (K, T)) as somebody's encoder left them."""
    draw = np.random.default_rng(seed)
    return [(words(i), "ann" if i % 2 else "bob", draw.integers(0, size, (books, 9 + i % 5))) for i in range(n)]


def marvis(rows, path, compressed=""):
    """A shard as Marvis' preprocess_mimi.py and create_shards_from_directory.py write it."""
    with tarfile.open(path, f"w:{compressed}") as tar:
        for i, (text, speaker, codes) in enumerate(rows):
            fields = {"duration": 1.0, "speaker_id": speaker, "text": text, "audio_tokens": codes.tolist()}
            fields |= {"audio_tokens_length": codes.shape[1], "text_tokens": [1, 9, 2], "text_tokens_length": 3}
            add(tar, f"{path.name.partition('.')[0]}-{i:03d}.json", json.dumps(fields).encode())


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def kani(rows):
    """Rows as nineninesix's pipeline writes them."""
    layers = ({f"nano_layer_{k}": book for k, book in enumerate(codes.tolist(), 1)} for _, _, codes in rows)
    return [{"text": text, **books, "encoded_len": codes.shape[1], "speaker": speaker}
            for (text, speaker, codes), books in zip(rows, layers, strict=True)]  # fmt: skip


def jsonl(rows, path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def parquet(rows, path, **how):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(rows), path, **how)


HELD = {  # what is written, what is asked for, of which codec
    "marvis": (marvis, "{}.tar", "*.tar", "mimi"),
    "marvis, compressed": (lambda rows, path: marvis(rows, path, "gz"), "{}.tar.gz", "", "mimi"),
    "kani, jsonl": (lambda rows, path: jsonl(kani(rows), path), "{}.jsonl", "", "nanocodec"),
    "kani, compressed": (lambda rows, path: jsonl(kani(rows), path), "train-{}.jsonl.gz", "", "nanocodec"),
    "kani, json": (lambda rows, path: path.write_text(json.dumps(kani(rows))), "{}.json", "*.json", "nanocodec"),
    "kani, parquet": (lambda rows, path: parquet(kani(rows), path), "data/{}.parquet", "", "nanocodec"),
}


def command(monkeypatch, *argv):
    """prepare.py as it is called."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--val_fraction=0.2", "--workers=1", "--vocab_size=400", *argv])
    configurator.run(prepare.main, prepare.__file__)


def read_back(folder):
    """{text: (codes (T, K), speaker)} of a token folder, and its meta.json."""
    found = {}
    for split in ("train", "val"):
        files = TokenFiles(folder, split)
        tokenizer = load_tokenizer(files.meta["tokenizer"]["kind"], (folder / "tokenizer.model").read_bytes())
        for i in range(len(files)):
            assert (prepare.fraction(files.name(i)) < 0.2) == (split == "val")
            speaker = files.meta["speakers"][files.speaker(i)]
            found[tokenizer.decode(files.text(i)).removeprefix(f"[{speaker}]")] = files.codes(i), speaker
    return found, files.meta


@pytest.mark.parametrize("layout", HELD)
def test_codes_become_token_files(layout, tmp_path, monkeypatch, capsys):
    save, name, asked, codec = HELD[layout]
    books, size = published_sizes(codec)["n_codebooks"], published_sizes(codec)["codebook_size"]
    rows, wanted = coded(24, books, size), 8 if codec == "mimi" else books
    (tmp_path / "x" / name).parent.mkdir(parents=True)
    for i, part in enumerate((rows[:13], rows[13:])):
        save(part, tmp_path / "x" / name.format(f"part{i}"))
    argv = (f"--sources={tmp_path / 'x' / asked}", f"--codec={codec}", f"--codec_args={{'n_codebooks': {wanted}}}")
    command(monkeypatch, *argv, f"--data_dir={tmp_path / 't'}")
    assert "24 of 24 utterances are used" in (screen := capsys.readouterr().out) and "2 files like" in screen
    assert f"hf download {'kyutai' if codec == 'mimi' else 'nvidia'}" in screen
    found, meta = read_back(tmp_path / "t")
    assert len(found) == 24
    for text, speaker, codes in rows:
        assert np.array_equal(found[text][0], codes.T[:, :wanted]) and found[text][1] == speaker
    assert meta["codec"] == {"name": codec, "fingerprint": "unknown", **published_sizes(codec), "n_codebooks": wanted}
    pack = torch.load(tmp_path / "t" / "codec.pt", weights_only=True)
    assert pack == {"name": codec, "options": {"n_codebooks": wanted}, "weights": "", "fingerprint": "unknown"}
    command(monkeypatch, *argv, f"--data_dir={tmp_path / 'again'}")
    assert contents(tmp_path / "again") == contents(tmp_path / "t")


def test_ids_and_speakers_of_rows(tmp_path):
    rows = coded(3)
    for name in ("a", "b"):
        marvis(rows, tmp_path / f"{name}-01.tar")
        jsonl([{**row, "speaker": None} for row in kani(rows)], tmp_path / f"{name}-01.jsonl.gz")
    jsonl([{"id": f"wavs/{i}.wav", **row} for i, row in enumerate(kani(rows))], tmp_path / "c.txt")
    tars, tables = (read_source(str(tmp_path / f"*.{kind}")) for kind in ("tar", "jsonl.gz"))
    assert [u.id for u in tars] == [f"{name}-01-{i:03d}" for name in "ab" for i in range(3)]
    assert [u.id for u in tables] == ["a-01/0", "a-01/1", "a-01/2", "b-01/0", "b-01/1", "b-01/2"]
    assert [u.id for u in read_source(str(tmp_path / "c.txt"))] == ["0", "1", "2"]
    assert [u.speaker for u in tars[:3]] == ["bob", "ann", "bob"] and {u.speaker for u in tables} == {"speaker"}
    source = {"path": str(tmp_path / "*.tar"), "cap": 1, "filter": {"speaker_id": "ann"}, "name": "s"}
    passed = {u.id: u.reason for u in read_source(source) if u.reason != "filtered out"}
    assert set(passed) == {"s/a-01-001", "s/b-01-001"} and set(passed.values()) == {"", "beyond the cap"}
    assert len(read_source(str(tmp_path))) == 12  # a folder's shards, and not a text that may be anything


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mel")
    make_set(folder / "raw", 12)
    run(folder / "raw", folder / "tokens")
    return folder


def test_codes_and_recordings_together(tokens, tmp_path):
    """The codes of a set, taken out of its token files, are worth as much as its recordings."""
    found, meta = read_back(tokens / "tokens")
    rows = [{"text": text, "speaker": speaker, "audio_tokens": codes.T.tolist()}
            for text, (codes, speaker) in sorted(found.items())]  # fmt: skip
    jsonl(rows, tmp_path / "codes.jsonl")
    both = [str(tmp_path / "codes.jsonl"), {"path": str(tokens / "raw"), "name": "again"}]
    given = dict(data_dir=str(tmp_path / "t"), codec_args={}, codec_path=str(tokens / "tokens"))
    prepare.main(config(sources=both, **given))
    files = [TokenFiles(tmp_path / "t", split) for split in ("train", "val")]
    assert files[0].meta["codec"] == meta["codec"] and sum(map(len, files)) == 24
    for f in files:
        for i in range(len(f)):
            text = load_tokenizer("sentencepiece", (tmp_path / "t/tokenizer.model").read_bytes()).decode(f.text(i))
            assert np.array_equal(f.codes(i), found[text[5:]][0])
    prepare.main(config(sources=both[0], **given))
    assert load_codec("mel", str(tmp_path / "t")).fingerprint() == meta["codec"]["fingerprint"]


def nano(path):
    weights = load_file(GOLDEN / "nemo_nanocodec.safetensors")
    torch.save({name[8:]: x for name, x in weights.items() if name[:8] == "weights."}, packed := io.BytesIO())
    with tarfile.open(path, "w") as tar:
        add(tar, "model_weights.ckpt", packed.getvalue())


def test_codes_with_the_weights_at_hand(tmp_path):
    nano(tmp_path / "nano.nemo")
    codec = load_codec("nanocodec", tmp_path / "nano.nemo")
    rows = coded(12, codec.n_codebooks, codec.codebook_size)
    jsonl(kani(rows), tmp_path / "x.jsonl")
    run(tmp_path / "x.jsonl", tmp_path / "t", codec="nanocodec", codec_path=str(tmp_path / "nano.nemo"), codec_args={},
        min_seconds=0.0, max_chars_per_second=1e9)  # fmt: skip
    found, meta = read_back(tmp_path / "t")
    again = load_codec(meta["codec"]["name"], tmp_path / "t")  # as train.py does
    assert again.fingerprint() == codec.fingerprint() == meta["codec"]["fingerprint"]
    for text, _, codes in rows:
        assert np.array_equal(found[text][0], codes.T)
    assert torch.equal(again.decode(torch.from_numpy(codes)[None]), codec.decode(torch.from_numpy(codes)[None]))


def test_weights_that_come_later(tmp_path, monkeypatch):
    nano(tmp_path / "nano.nemo")
    codec = load_codec("nanocodec", tmp_path / "nano.nemo")
    jsonl(kani(coded(24, codec.n_codebooks, codec.codebook_size)), tmp_path / "x.jsonl")
    run(tmp_path / "x.jsonl", tmp_path / "t", codec="nanocodec", codec_args={"n_codebooks": 2})
    with pytest.raises(FileNotFoundError, match="t/codec.pt: the hub's cache folder: no .*`hf download"):
        train_on(tmp_path / "t", tmp_path / "run")
    snapshot = tmp_path / "hub" / "models--nvidia--nemo-nano-codec-22khz-0.6kbps-12.5fps" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "nano.nemo").rename(snapshot / "nano.nemo")
    train_on(tmp_path / "t", tmp_path / "run", "--max_iters=4")
    voice = Voice.from_checkpoint(tmp_path / "run" / "last.pt")
    assert voice.codec.fingerprint() == codec.fingerprint()
    frames = list(torch.from_numpy(TokenFiles(tmp_path / "t", "val").codes(0)))
    assert torch.equal(voice.decode(torch.stack(frames)), codec.decode(torch.stack(frames, 1)[None])[0])


def test_rows_that_contradict(tmp_path):
    rows = kani(coded(30, 4, 4032))
    book = rows[0]["nano_layer_2"]
    says = "is among them, and those of nanocodec are 0 to 4031"
    wrong = {  # what a row has instead, and what is said of it
        20: ({"nano_layer_2": [*book[1:], 4032]}, "bad codes", f"4032 {says}"),
        21: ({"nano_layer_2": [*book[1:], -1]}, "bad codes", f"-1 {says}"),
        22: ({"nano_layer_2": book[1:]}, "bad row", "row 23: its codebooks have 9, 8, 9, 9 codes"),
        23: ({"encoded_len": 10}, "bad row", "row 24: encoded_len is 10, but it has 9 frames"),
        24: ({"nano_layer_2": [x / 2 for x in book]}, "bad row", "row 25: its codes are not whole numbers"),
        25: ({"nano_layer_2": None}, "bad row", "row 26: its codebooks have 9, 0, 9, 9 codes"),
        26: ({"nano_layer_2": "1 2 3"}, "bad row", "row 27: its codes are no lists, one for each codebook"),
        27: ({"text": " "}, "empty text", ""),
        28: ({"nano_layer_4": ...}, "bad codes", "9 frames of 3 codebooks, and nanocodec has 4"),
        29: ({f"nano_layer_{k}": book[:1] for k in range(1, 5)} | {"encoded_len": [1]}, "too short", "0.08 s"),
    }  # fmt: skip
    for i, (change, _, _) in wrong.items():
        row = {**rows[0], "text": words(i), **change}
        rows[i] = {name: value for name, value in row.items() if value is not ...}
    (tmp_path / "x.json").write_text(json.dumps(rows))
    report = run(tmp_path / "x.json", tmp_path / "t", codec="nanocodec", codec_args={}, max_bad=0.9, val_fraction=0.3)
    assert [(x["id"], x["reason"], x["detail"]) for x in report["not_used"]] == [
        (f"x/{i}", reason, detail) for i, (_, reason, detail) in wrong.items()]  # fmt: skip
    assert report["used"] == 20


def test_shards_that_are_another_codecs(tmp_path):
    marvis([(text, speaker, codes.T) for text, speaker, codes in coded()], tmp_path / "x.tar")
    says = "24 bad codes.*, none is left; for example x-000: bad codes 32 frames of 9 codebooks, and mimi has 32"
    with pytest.raises(ValueError, match=says):
        run(tmp_path / "x.tar", tmp_path / "t", codec="mimi", codec_args={})
    marvis([(text, speaker, codes[:, [0] * 99].T) for text, speaker, codes in coded()], tmp_path / "x.tar")
    with pytest.raises(ValueError, match="bad codes 32 frames of 99 codebooks, and mimi has 8 to 32"):  # frames x books
        run(tmp_path / "x.tar", tmp_path / "t", codec="mimi", codec_args={"n_codebooks": 8})


# -----------------------------------------------------------------------------
# recordings inside a file


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Recordings of several kinds and rates, with their metadata, their fields and their bytes."""
    folder, rows = tmp_path_factory.mktemp("mixed"), []
    make_set(folder, 16)
    (folder / "metadata.csv").unlink()
    for i, kind in zip(range(16), itertools.cycle(["wav", "flac", "ogg", "mp3"])):
        rate = (8000, 16000, 22050, 44100)[i % 3]
        wav, _ = soundfile.read(path := folder / "wavs" / f"u{i:02d}.wav", dtype="float32")
        path.unlink()
        soundfile.write(path.with_suffix(f".{kind}"), resample(torch.from_numpy(wav), RATE, rate).numpy(), rate)
        rows.append((f"u{i:02d}.{kind}", words(i), "ann" if i % 2 else "bob"))
    (folder / "wavs" / "u05.flac").write_bytes(b"rubbish" * 99)
    write_csv(folder / "metadata.csv", rows)
    inside = [{"audio": {"bytes": (folder / "wavs" / name).read_bytes(), "path": name}, "sentence": text,
               "speaker": speaker, "start": 3.5} for name, text, speaker in rows]  # fmt: skip
    return folder, inside


def same(a, b):
    """Two token folders, but for where they are from."""
    a, b = contents(a), contents(b)
    for folder in (a, b):
        folder["report.json"] = {**json.loads(folder["report.json"]), "not_used": 0}
        made = folder["meta.json"] = json.loads(folder["meta.json"])
        made["made_by"].pop("sources")
    return a == b


def test_recordings_in_tables_and_shards(mixed, tmp_path):
    folder, rows = mixed
    reports = {"csv": run(folder, tmp_path / "csv")}
    parquet(rows[:9], tmp_path / "a.parquet", row_group_size=2)
    parquet(rows[9:], tmp_path / "b.parquet")
    for name, part in (("a", rows[:5]), ("b", rows[5:])):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for row in part:
                key, _, kind = row["audio"]["path"].partition(".")
                add(tar, f"./{key}.{kind}", row["audio"]["bytes"])
                add(tar, f"./{key}.json", json.dumps({"speaker": row["speaker"], "duration": 1.5}).encode())
                add(tar, f"./{key}.txt", row["sentence"].encode())
    for kind in ("parquet", "tar"):
        reports[kind] = run(tmp_path / f"*.{kind}", tmp_path / kind)
        assert same(tmp_path / "csv", tmp_path / kind)
    for report in reports.values():
        assert [(x["id"], x["reason"]) for x in report["not_used"]] == [("u05", "unreadable file")]
    assert reports["parquet"]["not_used"][0]["detail"] == "u05.flac: not readable as audio (Format not recognised.)"
    assert reports["parquet"]["not_used"][0]["source"] == str(tmp_path / "a.parquet")


def test_a_table_may_name_recordings_too(mixed, tmp_path):
    """datasets writes paths without bytes where it was told not to embed them."""
    folder, rows = mixed
    rows = [{**row, "audio": {"bytes": None, "path": str(folder / "wavs" / row["audio"]["path"])}} for row in rows]
    parquet([*rows, {**rows[0], "audio": None}], tmp_path / "x.parquet")
    utterances = listened(list(load(read_source(str(tmp_path / "x.parquet")))))
    assert [u.reason for u in utterances] == [
        "unreadable file" if i == 5 else "missing file" if i == 16 else "" for i in range(17)]  # fmt: skip


def test_a_table_is_read_a_part_at_a_time(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    noise = np.random.default_rng(0)
    rows = [{"audio": {"bytes": noise.bytes(2**16), "path": f"{i}.wav"}, "text": "x"} for i in range(500)]
    parquet(rows, tmp_path / "x.parquet", row_group_size=16)
    del rows
    before, most = pyarrow.total_allocated_bytes(), 0
    for _, row, _ in read_rows(str(tmp_path / "x.parquet"), whole=True):
        assert len(row["audio"]["bytes"]) == 2**16
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert 2**20 < most < 12 * 2**20  # of 32 MB
    assert all(row["audio"]["bytes"] == b"" for _, row, _ in read_rows(str(tmp_path / "x.parquet")))


def test_load_follows_any_order(tmp_path):
    rows = coded(9, 2)
    for name, part in (("a", rows[:5]), ("b", rows[5:])):
        jsonl(kani(part), tmp_path / f"{name}.jsonl")
    utterances = read_source(str(tmp_path))
    for order in (range(9), [8, 0, 3, 3, 1, 7, 2]):
        for i, u in zip(order, load([utterances[i] for i in order]), strict=True):
            assert u.id == utterances[i].id and np.array_equal(u.content, rows[i][2].T)
    assert all(u.content is None for u in utterances)


# -----------------------------------------------------------------------------
# bad input


def test_a_source_that_changes_leaves_nothing_behind(tmp_path, monkeypatch):
    jsonl(kani(coded(24, 4, 4032)), tmp_path / "x.jsonl")
    monkeypatch.setattr(prepare, "show", lambda findings: jsonl(kani(coded(9, 4)), tmp_path / "x.jsonl"))
    with pytest.raises(ValueError, match="x.jsonl: has changed while it was read"):
        run(tmp_path / "x.jsonl", tmp_path / "t", codec="nanocodec", codec_args={})
    assert os.listdir(tmp_path) == ["x.jsonl"]


WRONG = {
    "broken tar": (["--sources=cut.tar"], "cut.tar: is broken"),
    "tar cut between members": (["--sources=short.tar"], "short.tar: is broken (breaks off after 2,048 bytes)"),
    "broken gz": (["--sources=cut.gz"], "cut.gz: is broken"),
    "tar that is none": (["--sources=rubbish.tar"], "rubbish.tar: neither parquet nor a tar, and not a text file"),
    "rubbish in a tar": (["--sources=rubbish_inside.tar"], "rubbish_inside.tar, x.json: not JSON"),
    "a text in a tar": (["--sources=latin.tar"], "latin.tar, x.txt: not UTF-8"),
    "a list in a tar": (["--sources=list.tar"], "list.tar, x.json: [1, 2] is not an object"),
    "rubbish in jsonl": (["--sources=rubbish.jsonl"], "rubbish.jsonl, line 2: not JSON"),
    "deep rubbish": (["--sources=deep.json"], "deep.json: not JSON"),
    "broken parquet": (["--sources=cut.parquet"], "cut.parquet: is broken"),
    "no codes": (["--sources=text.jsonl"], "its columns are text, speaker; it needs one for the audio"),
    "no text": (["--sources=codes.jsonl"], "its columns are audio_tokens; it needs one for the audio"),
    "two rows of a name": (["--sources=twice.tar"], "twice.tar, x.2.json: a second .json of x;"),
    "empty shard": (["--sources=empty.tar"], "empty.tar: no rows in it"),
    "no match": (["--sources=*.tgz"], "source *.tgz: no file matches this pattern"),
    "references": (["--codec=xtts", "--references=True"], "references = True: good.jsonl has codes, and no recordings"),
    "codes of nobody": (["--codec=mel"], "good.jsonl has codes: which mel made them? Name its tables with codec_path"),
    "no such weights": (["--codec_path=nowhere"], "nowhere: no *.nemo of the codec nanocodec"),
    "recordings without weights": (["--sources=raw"], "error: the hub's cache folder: no *.nemo"),
    "both without weights": (["--sources=['good.jsonl', 'raw']"], "error: the hub's cache folder: no *.nemo"),
    "fewer of what cannot be cut": (["--codec_args={'n_codebooks': 2}"], "of 4 codebooks, and nanocodec has 2"),
    "another codec": (["--codec=encodec"], "of 4 codebooks, and encodec has 8"),
    "codec option": (["--codec_args={'books': 3}"], "nanocodec has no option 'books'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def yard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("yard")
    make_set(folder / "raw", 12)
    jsonl(kani(coded(24, 4, 4032)), folder / "good.jsonl")
    jsonl([{"text": "a", "speaker": "b"}], folder / "text.jsonl")
    jsonl([{"audio_tokens": [[1]]}], folder / "codes.jsonl")
    jsonl(kani(coded(24, 4, 4032)), folder / "whole.gz")
    marvis(coded(), folder / "whole.tar")
    for name, source, size in (("cut.tar", "whole.tar", 3000), ("cut.gz", "whole.gz", 900)):
        (folder / name).write_bytes((folder / source).read_bytes()[:size])
    with tarfile.open(folder / "short.tar", "w") as tar:
        add(tar, "x.json", b'{"text": "a", "audio_tokens": [[1]]}')
        add(tar, "y.json", b'{"text": "a", "audio_tokens": [[1]]}')
    (folder / "short.tar").write_bytes((folder / "short.tar").read_bytes()[:2048])
    with tarfile.open(folder / "twice.tar", "w") as tar:
        add(tar, "x.1.json", b'{"text": "a", "audio_tokens": [[1]]}')
        add(tar, "x.2.json", b'{"text": "a", "audio_tokens": [[1]]}')
    with tarfile.open(folder / "latin.tar", "w") as tar:
        add(tar, "x.txt", "café".encode("latin-1"))
    for name, text in (("rubbish_inside", b'{"text": '), ("list", b"[1, 2]")):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            add(tar, "x.json", text)
    tarfile.open(folder / "empty.tar", "w").close()
    (folder / "rubbish.tar").write_bytes(bytes(range(256)) * 9)
    (folder / "rubbish.jsonl").write_text('{"text": "a", "audio_tokens": [[1]]}\n{"text": \n')
    (folder / "deep.json").write_text("[" * 99999)
    (folder / "cut.parquet").write_bytes(b"PAR1" + bytes(range(99)))
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_wrong_sources_get_one_line(case, yard, monkeypatch, capsys):
    argv, message = WRONG[case]
    monkeypatch.chdir(yard)
    if case == "broken parquet":
        pytest.importorskip("pyarrow")
    before = set(os.listdir(yard))
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "--sources=good.jsonl", "--data_dir=t", "--codec=nanocodec", *argv)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert set(os.listdir(yard)) - before <= {"t.report.json"}


def read_error(path):
    with pytest.raises(ValueError) as error:
        list(load(read_source(str(path))))
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) <= 400
    return str(error.value)


def test_encodings(tmp_path):
    table = "audio,text\n" + "".join(f"{i}.wav,café {i}\n" for i in range(3000))
    path = tmp_path / "m.csv"
    for encoding in ("utf-8", "utf-16"):
        path.write_bytes(table.encode(encoding))
        assert [u.text for u in read_source(str(path))][2000] == "café 2000"
    path.write_bytes(table.replace("é", "e").encode() + "x.wav,café\n".encode("cp1252"))
    assert "not a text file in UTF-8 (byte 0xe9 in line 3002)" in read_error(path)
    path.write_bytes(table.encode()[:14] + "é".encode()[:1])
    assert "UTF-8 (its last character is cut off)" in read_error(path)
    path.write_bytes(table.encode("utf-16")[:-1])
    assert "not a text file in UTF-16 (truncated data)" in read_error(path)
    path.write_bytes(b"a\0,\0")
    assert "not a text file, as it contains zero bytes" in read_error(path)


def test_what_unpacks_to_more_than_a_row_can_be(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FILE", 2**20)
    big = b" " * (tables.ROW + 1)
    for name, text in (("table", b"audio,text\n"), ("list", b'[{"text": "a"}]'), ("line", b'{"a": 1}')):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text + big))
        assert f"larger than {16 if name == 'line' else 1} MB" in read_error(tmp_path / f"{name}.gz")
    for kind, size in (("json", tables.ROW), ("txt", tables.ROW), ("wav", tables.LIMITS["wav"])):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            member = tarfile.TarInfo(f"x.{kind}")
            member.size = size + 1
            tar.fileobj.write(member.tobuf())  # its content would follow
        assert f"x.{kind}: larger than {size >> 20:,} MB" in read_error(tmp_path / "x.tar")
    (tmp_path / "m.csv").write_text("audio,text\na.wav,b\n")

    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(tables, "split", no_memory)
    assert "needs more memory than this machine has" in read_error(tmp_path / "m.csv")


def test_what_macos_adds_to_a_tar(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("set/._a.json", "set/a.json", "__MACOSX/set/a.json", "./._b.json", "./b.json", "._c.wav"):
            add(tar, name, b"rubbish" if "_" in name else b'{"text": "a", "audio_tokens": [[1]]}')
    assert [(u.id, u.reason) for u in read_source(str(tmp_path / "x.tar"))] == [("set/a", ""), ("b", "")]


def test_parquet_with_columns_of_other_types(tmp_path):
    parquet([{"audio": {"bytes": "abc", "path": "x.wav"}, "text": "a"}], tmp_path / "x.parquet")
    assert "its recording is of the type str, not bytes" in read_error(tmp_path / "x.parquet")
    pyarrow, parts = sys.modules["pyarrow"], [None, b"\0\0\0\0\1\0\0\0", b"\xff"]
    no_utf8 = pyarrow.Array.from_buffers(pyarrow.string(), 1, [part and pyarrow.py_buffer(part) for part in parts])
    table = pyarrow.Table.from_arrays([pyarrow.array(["x.wav"]), no_utf8], ["audio", "text"])
    sys.modules["pyarrow.parquet"].write_table(table, tmp_path / "x.parquet")
    assert "x.parquet: is broken ('utf-8' codec can't decode" in read_error(tmp_path / "x.parquet")
    for text in (b"a", {"a": 1}, [1]):
        parquet([{"audio": "x.wav", "text": text}], tmp_path / "x.parquet")
        assert [u.reason for u in read_source(str(tmp_path / "x.parquet"))] == ["bad row"]


def test_sources_that_make_no_sense(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "pipe: is not a file" in read_error(tmp_path / "pipe")
    (tmp_path / "x.tar.bz2").write_bytes(bz2.compress(bytes(10240))[:-20] + bytes(20))
    assert "x.tar.bz2: " in read_error(tmp_path / "x.tar.bz2")
    (tmp_path / "m.csv").write_text("|\n")
    assert "m.csv: no rows in it" in read_error(tmp_path / "m.csv")
    for more in ({"speaker": ["a"]}, {"filter": {"text": "("}}, {"filter": "x" * 999}, {"x" * 999: 1}):
        with pytest.raises(ValueError, match="^source .{10,390}$"):
            read_source({"path": str(tmp_path / "m.csv"), **more})


def test_parquet_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1" * 9)
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="x.parquet: parquet files need the package pyarrow: pip install pyarrow"):
        run(tmp_path / "x.parquet", tmp_path / "t")


# ---------------------------------------------------------------------------------------------------------------------
# data as they lie on hubs


def test_columns_with_other_names(tmp_path):
    rows = [{"script": "one", "text": "not this", "l1": [1, 2], "l2": [3, 4], "frames": 2, "who": "anna"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": str(tmp_path / "m.jsonl"), "name": "x", "columns": {
        "text": "script", "nano_layer_1": "l1", "nano_layer_2": "L2", "encoded_len": "frames", "speaker": "who",
    }}  # fmt: skip
    (u,) = read_source(source)
    assert (u.id, u.text, u.speaker, u.codes, u.reason) == ("x/m/0", "one", "anna", (2, 2, 1, 4), "")
    assert next(load([u])).content.tolist() == [[1, 3], [2, 4]]  # it is read once more under the same names
    with pytest.raises(ValueError, match="columns names 'words', but its columns are script, text, l1"):
        read_source({**source, "columns": {"text": "words"}})
    with pytest.raises(ValueError, match=r"its columns are l1.*say so: .*'columns': \{'text': 'script'\}\}"):
        (tmp_path / "n.jsonl").write_text('{"l1": [1]}')
        read_source(str(tmp_path / "n.jsonl"))
    with pytest.raises(ValueError, match="columns is a dict"):
        read_source({**source, "columns": ["text"]})
    (tmp_path / "m.csv").write_text("clip|satz\na.wav|eins\n")  # without its columns it has no header that is known
    (u,) = read_source({"path": str(tmp_path / "m.csv"), "columns": {"audio": "clip", "text": "satz"}})
    assert (u.audio, u.text) == ("a.wav", "eins")


def test_splits(tmp_path):
    for name in ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"audio": f"{name}.wav", "text": "one"}))
    assert len(read_source(str(tmp_path))) == 3
    assert len(read_source({"path": str(tmp_path), "split": "train"})) == 2
    assert len(read_source({"path": str(tmp_path / "data/*.jsonl"), "split": "test"})) == 1
    with pytest.raises(ValueError, match="no file of the split 'validation'; it has data/test-00000-of-00001.jsonl, "):
        read_source({"path": str(tmp_path), "split": "validation"})
    (tmp_path / "more/train").mkdir(parents=True)
    (tmp_path / "more/train/x.jsonl").write_text(json.dumps({"audio": "x.wav", "text": "one"}))
    assert len(read_source({"path": str(tmp_path / "more"), "split": "train"})) == 1


def test_a_pair_of_tables_is_train_and_held_out(tmp_path):
    for name, clips in (("train", "abc"), ("eval", "de")):
        lines = ["audio_file|text|speaker_name", *(f"wavs/{c}.wav|words of {c}|x" for c in clips)]
        (tmp_path / f"metadata_{name}.csv").write_text("\n".join(lines))
    got = read_source(str(tmp_path))
    assert [(u.id, u.heldout) for u in got] == [*((c, False) for c in "abc"), *((c, True) for c in "de")]
    assert prepare.read_heldout("", got) == {"d", "e"}
    (tmp_path / "held.txt").write_text("a\n")
    assert prepare.read_heldout(str(tmp_path / "held.txt"), got) == {"a", "d", "e"}
    assert [u.heldout for u in read_source({"path": str(tmp_path / "metadata_eval.csv")})] == [True, True]
    assert all(u.heldout for u in read_source({"path": str(tmp_path / "metadata_train.csv"), "heldout": True}))
    assert prepare.read_heldout("", read_source(str(tmp_path / "metadata_train.csv"))) is None


def test_a_folder_with_files_for_each_clip(tmp_path):
    (tmp_path / "set/b").mkdir(parents=True)
    (tmp_path / "set/a.json").write_text(json.dumps({"text": "from json", "speaker": "anna", "duration": 3}))
    (tmp_path / "set/a.wav").touch()
    (tmp_path / "set/b/c.normalized.txt").write_text("a normal form\n")
    (tmp_path / "set/b/c.original.txt").write_text("as written")
    (tmp_path / "set/b/c.flac").touch()
    (tmp_path / "set/d.wav").touch()
    (tmp_path / "set/.hidden.json").write_text("{")
    got = read_source(str(tmp_path / "set"))
    assert [(u.id, u.audio, u.text.strip(), u.speaker, u.reason) for u in got] == [
        ("a", "a.wav", "from json", "anna", ""), ("b/c", "b/c.flac", "a normal form", "speaker", ""),
        ("d", "d.wav", "", "speaker", "empty text"),
    ]  # fmt: skip
    assert [u.audio for u in prepare.check_each(got, prepare.find)][:2] == [
        str(tmp_path / "set/a.wav"), str(tmp_path / "set/b/c.flac")]  # fmt: skip
    (tmp_path / "set/b/e.json").write_text("[1]")
    broken = [u for u in read_source(str(tmp_path / "set")) if u.reason == "bad row"]
    assert [u.id for u in broken] == ["b/e"] and "set/, b/e.json: [1] is not an object" in broken[0].detail


def valle_file(path, codes, **metadata):
    """As vall_e/emb/process.py writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.save(file, {"codes": np.array(codes, np.uint16)[None], "metadata": {"sample_rate": 24000, **metadata}})


def test_the_files_of_valles_author(tmp_path):
    valle_file(tmp_path / "24KHz-encodec/books/anna/x_0001.enc", [[1, 2, 3], [4, 5, 6]], text="one two",
               phonemes="wˈʌn tˈuː", language="en")  # fmt: skip
    valle_file(tmp_path / "24KHz-encodec/books/bert/y.enc", [[7], [8]], text="drei", language="de")
    (tmp_path / "24KHz-encodec/missing.json").write_text("[]")
    got = read_source(str(tmp_path / "24KHz-encodec"))
    assert [(u.id, u.text, u.speaker, u.language, u.codes) for u in got] == [
        ("books/anna/x_0001", "one two", "anna", "en", (3, 2, 1, 6)),
        ("books/bert/y", "drei", "bert", "de", (1, 2, 7, 8)),
    ]  # fmt: skip
    assert [u.content.tolist() for u in load(got)] == [[[1, 4], [2, 5], [3, 6]], [[7, 8]]]
    (u, _) = read_source({"path": str(tmp_path / "24KHz-encodec"), "columns": {"text": "phonemes"}})
    assert u.text == "wˈʌn tˈuː"
    with open(tmp_path / "24KHz-encodec/books/bert/y.enc", "wb") as file:
        np.save(file, np.array({"codes": Evil(str(tmp_path / "made"))}, object), allow_pickle=True)
    sound, broken = read_source(str(tmp_path / "24KHz-encodec"))
    assert (sound.reason, broken.reason) == ("", "bad row")
    assert "y.enc: not a file of VALL-E's codes (it names posix.mkdir" in broken.detail
    assert not (tmp_path / "made").exists()


def test_what_is_not_used_and_what_has_to_be_fetched_is_said(tmp_path, capsys):
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio_tokens": [[1], [2]], "text": "a", "text_tokens": [5, 6]}))
    read_source(str(tmp_path / "m.jsonl"))
    assert "m.jsonl: its text_tokens are not used, the tokenizer reads the texts anew" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="hf download nobody/nothing --repo-type dataset --local-dir data/n"):
        read_source("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="source nobody/nothing.csv: no such file or folder$"):
        read_source("nobody/nothing.csv")


def test_a_source_has_a_text_format_of_its_own(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "one"}))
    plain, named = (read_source({"path": str(tmp_path / "m.jsonl"), "speaker": "x", **more})[0]
                    for more in ({"text_format": "{text}"}, {"text_format": "{speaker}: {text}"}))  # fmt: skip
    assert (prepare.tagged(plain), prepare.tagged(named)) == ("one", "x: one")
    with pytest.raises(ValueError, match="takes {text} once"):
        read_source({"path": str(tmp_path / "m.jsonl"), "text_format": "{speaker}"})


KANI = json.loads((GOLDEN / "kani_rows.json").read_text()) if (GOLDEN / "kani_rows.json").exists() else {"finetune": []}


def translated(n, dataset, folder):
    """An entry of hf_datasets in the authors' configuration as a source of ours."""
    names = ("nano_layer_1", "nano_layer_2", "nano_layer_3", "nano_layer_4", "encoded_len")
    tag, wanted = dataset.get("speaker_id"), dataset.get("categorical_filter")
    return {
        "path": str(folder / dataset["reponame"]), "split": dataset["split"], "name": str(n),
        "columns": {"text": dataset["text_col_name"], **{name: dataset[name] for name in names}},
        "speaker": tag.lower() if tag else None, "text_format": "{speaker}: {text}" if tag else "{text}",
        "filter": {wanted["column_name"]: wanted["value"]} if wanted else None, "cap": dataset.get("max_len"),
    }  # fmt: skip


@pytest.mark.parametrize("setup", KANI["finetune"], ids=lambda setup: setup["name"])
def test_the_authors_data_sets_of_kani_give_their_rows(tmp_path, setup):
    """All but the row without a text, which we leave out; which rows max_len keeps is another draw."""
    for name, rows in KANI["sets"].items():
        (tmp_path / "sets" / name / "data").mkdir(parents=True)
        jsonl(rows, tmp_path / "sets" / name / "data/train-00000-of-00001.jsonl")
        jsonl(rows[:1], tmp_path / "sets" / name / "data/test-00000-of-00001.jsonl")
    datasets = setup["config"]["hf_datasets"]
    sources = [translated(n, dataset, tmp_path) for n, dataset in enumerate(datasets)]
    prepare.main(config(
        sources=sources, data_dir=str(tmp_path / "t"), codec="nanocodec", codec_args={}, front_end="none",
        text_format="{text}", tokenizer=str(GOLDEN / "kani_rows.tokenizer.json"), val_fraction=0.0, max_bad=1.0,
        max_seconds=setup["config"]["max_duration_sec"] or 1e6, min_seconds=0.0, min_chars_per_second=0.0,
        max_chars_per_second=1e6,
    ))  # fmt: skip
    files = TokenFiles(str(tmp_path / "t"), "train")
    marks = files.meta["tokenizer"]["bos_id"], files.meta["tokenizer"]["eos_id"]
    c = KaniConfig(KANI["constants"]["text_vocab_size"], 4, 4032, LFM2_STACK, *marks, drop_repeats=True)
    ours = [c.layout(files.text(i), files.codes(i))[0][:, 0].tolist() for i in range(len(files))]
    theirs = [row["input_ids"] for row in setup["rows"] if KANI["sets"][row["set"]][row["row"]].get("text") != ""]
    if any(dataset.get("max_len") for dataset in datasets):
        assert len(ours) == len(theirs)
    else:
        assert sorted(ours) == sorted(theirs)


def test_damaged_codes_of_valles_author_are_named_or_read(tmp_path):
    path = tmp_path / "set/anna/x.enc"
    valle_file(tmp_path / "set/anna/sound.enc", [[1], [2]], text="one", language="en")
    valle_file(path, np.arange(40).reshape(4, 10), text="one two", language="en")
    content, rng = path.read_bytes(), np.random.default_rng(0)
    named = 0
    for i in range(200):
        damaged = bytearray(content[: rng.integers(len(content))] if i % 4 == 0 else content)
        for at in rng.integers(0, len(damaged), rng.integers(1, 4)) if damaged else ():
            damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        sound, u = read_source(str(tmp_path / "set"))
        assert sound.reason == "" and len(u.detail) < 400 and "\n" not in u.detail
        named += bool(u.reason)
    assert named > 100

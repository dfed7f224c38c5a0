import contextlib
import csv
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import soundfile
import tokenizers
import torch
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

import prepare
from codec import load_codec
from data import TokenFiles
from parts import configurator
from parts.audio import read_audio
from parts.sources import Utterance, read_source
from parts.text import load_tokenizer, normalise, train_tokenizer

RATE = 16000
TINY = {"n_codebooks": 2, "codebook_size": 16}


def clip(i, seconds=0.8, level=0.3):
    """Something like a voice: harmonics of a gliding pitch, in syllables."""
    t = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * (90 + 7 * i + 20 * np.sin(3 * t)) * t
    wav = sum(np.sin(k * phase) / k for k in range(1, 8)) * np.abs(np.sin(np.pi * (3 + i % 3) * t))
    return (level * wav / np.abs(wav).max()).astype(np.float32)


def words(i):
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    return " ".join(digits[int(d)] for d in f"{i * 37 % 1000:03d}")


def make_set(folder, n=24, speakers=("ann", "bob")):
    """A small csv data set; returns its rows (audio, text, speaker)."""
    (folder / "wavs").mkdir(parents=True)
    rows = [(f"wavs/u{i:02d}.wav", words(i), speakers[i % len(speakers)]) for i in range(n)]
    for i, (audio, _, _) in enumerate(rows):
        soundfile.write(folder / audio, clip(i, 0.6 + 0.05 * (i % 7)), RATE)
    write_csv(folder / "metadata.csv", rows)
    return rows


def write_csv(path, rows, header=("audio", "text", "speaker")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def config(**keys):
    cfg = configurator.configure(ROOT / "prepare.py", [])
    vars(cfg).update({"codec_args": TINY, "val_fraction": 0.2, "workers": 1, "vocab_size": 400, **keys})
    return cfg


def run(source, data_dir, **keys):
    prepare.main(config(sources=str(source) if isinstance(source, Path) else source, data_dir=str(data_dir), **keys))
    return json.loads((data_dir / "report.json").read_text())


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def listened(utterances):
    """The utterances, found and listened to."""
    return prepare.check_each(prepare.check_each(utterances, prepare.find), prepare.examine, vars(config()))


@pytest.fixture(autouse=True)
def start_pool(request, monkeypatch):
    """The worker is a thread, which starts at once; processes where a test asks for them."""

    def start(n):
        prepare.worker_codec.cache_clear()
        return ThreadPoolExecutor(1)

    if "processes" not in request.fixturenames:
        monkeypatch.setattr(prepare, "start_pool", start)


@pytest.fixture
def processes():
    """Worker processes, as users have them."""


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw") / "voices"
    make_set(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(raw):
    run(raw, raw.parent / "tokens")
    return raw.parent / "tokens"


# -----------------------------------------------------------------------------
# the split


def utterances(ids):
    return [Utterance(name, "", "", "", "") for name in ids]


def test_adding_data_moves_nobody():
    few, many = utterances(f"a{i}" for i in range(0, 5000, 7)), utterances(f"a{i}" for i in range(5000))
    small, large = (prepare.held_out(u, None, 0.1) for u in (few, many))
    assert small == large & {u.id for u in few}
    assert 0.08 < len(large) / 5000 < 0.12
    assert large < prepare.held_out(many, None, 0.2)


def test_held_out_list(tmp_path):
    path = tmp_path / "heldout.txt"
    rows = [Utterance(f"a{i}", "/data/x/metadata.csv", "", "", "") for i in range(9)]
    path.write_text("\ufeffa3\r\n\r\nwavs/a5.wav \na6.FLAC\n/data/x/wavs/a7.wav\n./a3.wav\n", encoding="utf-8")
    listed = prepare.read_heldout(str(path), rows)
    assert listed == {"a3", "a5", "a6", "a7"} and prepare.held_out(rows, listed, 0.5) == listed
    assert prepare.held_out(rows[:4], listed, 0.5) == {"a3"}
    path.write_text("a3\nA5\na55\nwavs/a6.mid\nb1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="4 of its 5 ids belong to no utterance: 'A5', 'a55', .* and others"):
        prepare.read_heldout(str(path), rows)


def test_the_advice_of_an_empty_split_is_right():
    some = utterances(f"a{i}" for i in range(20))
    for few in (some, some[:1]):
        with pytest.raises(ValueError, match="val split is empty") as error:
            prepare.held_out(few, None, 1e-9)
        nothing, *one = (float(f.split()[0].strip(",")) for f in str(error.value).split("--val_fraction=")[1:])
        assert nothing == 0 and prepare.held_out(few, None, nothing) == set()
        assert [len(prepare.held_out(few, None, fraction)) for fraction in one] == [1] * (len(few) > 1)
        with pytest.raises(ValueError, match="train split is empty"):
            prepare.held_out(few, None, 1.0)


def test_without_a_val_split(raw, tmp_path, capsys):
    one = {"path": str(raw), "filter": {"audio": ".*u03.wav"}}
    prepare.main(config(sources=one, data_dir=str(tmp_path / "t"), val_fraction=0.0))
    assert [len(TokenFiles(tmp_path / "t", split)) for split in ("train", "val")] == [1, 0]


def test_what_the_split_leaves_out_is_said(raw, tmp_path, capsys):
    rows = [(f"wavs/u{i:02d}.wav", words(i), "ann") for i in range(24)]
    rows[5:7] = (rows[5][0], words(5), "carl"), (rows[6][0], "", "ann")
    write_csv(raw / "odd.csv", rows)
    (tmp_path / "val").write_text("u05\nu06\nu07\n")
    run(raw / "odd.csv", tmp_path / "t", heldout=str(tmp_path / "val"))
    said = capsys.readouterr().out
    assert "1 of the 3 ids of heldout cannot be used: u06 (empty text)\n" in said
    assert "1 speakers of the val split are not in the train split: carl\n" in said


# -----------------------------------------------------------------------------
# the whole road


def test_what_is_written(raw, tokens):
    with open(raw / "metadata.csv", newline="") as file:
        rows = {Path(row[0]).stem: row for row in list(csv.reader(file))[1:]}
    codec = load_codec("mel", str(tokens))
    names = []
    for split in ("train", "val"):
        files = TokenFiles(tokens, split)
        tokenizer = load_tokenizer("sentencepiece", (tokens / files.meta["tokenizer"]["file"]).read_bytes())
        for i in range(len(files)):
            names.append(files.name(i))
            audio, text, speaker = rows[files.name(i)]
            assert (prepare.fraction(files.name(i)) < 0.2) == (split == "val")
            assert files.meta["speakers"][files.speaker(i)] == speaker
            assert tokenizer.decode(files.text(i)) == f"[{speaker}]{text}"
            assert len(tokenizer.encode(f"[{speaker}]")) == 1
            wav = read_audio(raw / audio, codec.sample_rate)
            assert torch.equal(torch.from_numpy(files.codes(i)), codec.encode(wav[None])[0].T)
    assert sorted(names) == sorted(rows)
    meta = files.meta
    assert meta["codec"] == {
        "name": "mel", "fingerprint": codec.fingerprint(), "sample_rate": 16000, "frame_rate": 12.5,
        "n_codebooks": 2, "codebook_size": 16,
    }  # fmt: skip
    assert meta["text_format"] == "[{speaker}]{text}" and meta["lowercase"] is False
    report = json.loads((tokens / "report.json").read_text())
    assert report["used"] == 24 and report["not_used"] == [] and list(report["speakers"]) == meta["speakers"]
    assert sum(b["utterances"] for b in report["durations"]) == 24
    train = meta["splits"]["train"]
    assert report["cost"]["rows"] == train["frames"] + train["text_tokens"]


def test_workers_do_not_change_a_byte(raw, tokens, processes, tmp_path):
    run(raw, tmp_path / "again", workers=2)
    assert contents(tmp_path / "again") == contents(tokens)
    run(raw, tmp_path / "seed", seed=5)
    assert contents(tmp_path / "seed")["codec.pt"] != contents(tokens)["codec.pt"]


def test_references_are_the_codecs_features(raw, tokens, tmp_path):
    run(raw, tmp_path / "r", references=True)
    with open(raw / "metadata.csv", newline="") as file:
        audio = {Path(row[0]).stem: row[0] for row in list(csv.reader(file))[1:]}
    codec, files = load_codec("mel", str(tmp_path / "r")), TokenFiles(tmp_path / "r", "train")
    said = files.meta["codec"]["reference"]
    assert said["rows_per_frame"] == codec.steps and len(said["silence"]) == 80 and set(said["silence"]) == {0.0}
    for i in range(len(files)):
        wav = read_audio(raw / audio[files.name(i)], codec.sample_rate)
        expected = codec.reference(wav[None])[0]
        assert expected.shape == (len(files.codes(i)) * codec.steps, 80)
        torch.testing.assert_close(torch.from_numpy(files.reference(i)), expected, rtol=1e-3, atol=1e-3)  # float16
    rest = {name: content for name, content in contents(tokens).items() if name not in ("meta.json", "report.json")}
    assert rest.items() <= contents(tmp_path / "r").items()


def test_given_codec_and_tokenizer(raw, tokens, tmp_path):
    given = {"codec_args": {}, "codec_path": str(tokens), "tokenizer": str(tokens / "tokenizer.model")}
    run(raw, tmp_path / "b", text_format="{text}", **given)
    a, b = TokenFiles(tokens, "train"), TokenFiles(tmp_path / "b", "train")
    assert a.meta["codec"] == b.meta["codec"] and a.meta["tokenizer"] == b.meta["tokenizer"]
    assert np.array_equal(a.codes(3), b.codes(3)) and len(a.text(3)) == len(b.text(3)) + 1


def test_cuts_are_cut(tmp_path):
    wav = np.concatenate([clip(1, 2.0), clip(2, 2.0, 0.1)])
    soundfile.write(tmp_path / "talk.flac", wav, RATE)
    cuts = [(0, 1), (1, 2), (2, 3.5), (3, 9)]
    rows = [("talk", "some words", *cut) for cut in cuts]
    write_csv(tmp_path / "metadata.csv", rows, ("audio", "text", "start", "end"))
    (tmp_path / "heldout.txt").write_text("talk_1-2\n")
    run(tmp_path, tmp_path / "t", heldout=str(tmp_path / "heldout.txt"))
    files, codec = TokenFiles(tmp_path / "t", "train"), load_codec("mel", str(tmp_path / "t"))
    assert [files.name(i) for i in range(3)] == ["talk_0-1", "talk_2-3.5", "talk_3-9"]
    seconds = [1, 1.5, 1]  # the last one ends with the recording
    assert [len(files.codes(i)) for i in range(3)] == [codec.frames(int(s * RATE)) for s in seconds]
    assert np.array_equal(files.codes(1), codec.encode(read_audio(tmp_path / "talk.flac", RATE, 2, 3.5)[None])[0].T)


def test_the_fit_hears_a_part_of_the_training_split(raw):
    class Listener:
        sample_rate = RATE

        def fit(self, wavs, seed):
            self.heard = [len(wav) / RATE for wav in wavs]

    train, listener, pool = read_source(str(raw))[:20], Listener(), ThreadPoolExecutor(1)
    train = listened(train)
    prepare.fit_codec(listener, config(fit_seconds=3.0), train, pool)
    assert 3.0 <= sum(listener.heard) < 4.0 and set(listener.heard) <= {u.seconds for u in train}
    prepare.fit_codec(listener, config(), train, pool)
    drawn = sorted(train, key=lambda u: prepare.fraction(f"{config().seed} {u.id}"))
    assert listener.heard == [u.seconds for u in drawn]


def test_batches_on_a_device_give_the_same_codes(tokens):
    codec = load_codec("mel", str(tokens))
    wavs = [clip(i, 0.5 + 0.13 * (i * 5 % 11)) for i in range(23)]
    for batch_seconds in (0.1, 3.0, 100.0):
        got = list(prepare.encode_batches(codec, iter(wavs), torch.device("cpu"), batch_seconds))
        assert len(got) == len(wavs)
        for wav, codes in zip(wavs, got, strict=True):
            assert np.array_equal(codes, codec.encode(torch.from_numpy(wav)[None])[0].T)


def test_batches_keep_to_their_size():
    wavs = [np.zeros(n, np.float32) for n in (9, 8, 8, 3, 2, 1, 30, 7, 7, 1)]
    sizes = [[len(wav) for wav in batch] for batch in prepare.batches(iter(wavs), 20)]
    assert sizes == [[9, 8], [8, 3], [2, 1], [30], [7, 7], [1]]
    assert list(prepare.batches(iter([]), 20)) == []


def test_the_longest_of_a_window_go_first():
    """Codes come back in the order of the utterances, and none waits for another window than its own."""
    lengths = [1, 3, 2, 5, 4, 9, 8, 7, 6, 10]
    order = prepare.longest_first([SimpleNamespace(seconds=n) for n in lengths], window=4)
    assert [lengths[i] for i in order] == [5, 3, 2, 1, 9, 8, 7, 4, 10, 6]
    taken, asked = iter(order), []
    results = prepare.put_back(order, (asked.append(i) or lengths[i] for i in taken))
    assert [next(results) for _ in range(4)] == lengths[:4] and len(asked) == 4
    assert list(results) == lengths[4:]


def test_which_codecs_go_to_the_device():
    assert prepare.encode_device(load_codec("mel"), "cuda:99").type == "cpu"
    network = torch.nn.Linear(1, 1)
    assert prepare.encode_device(network, "cpu").type == "cpu" and prepare.encode_device(network, "meta").type == "meta"
    for wrong in ("gpuu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device = '{wrong}' is not available"):
            prepare.encode_device(network, wrong)


# -----------------------------------------------------------------------------
# the doctor


@pytest.fixture(scope="module")
def sick(tmp_path_factory):
    """A set with one utterance for each thing that can be wrong, and some sound ones."""
    folder = tmp_path_factory.mktemp("sick")
    rows = [(f"ok{i}.wav", words(i), "s") for i in range(8)]
    wavs = {f"ok{i}.wav": clip(i) for i in range(8)}
    nan = clip(1)
    nan[500] = np.nan
    for name, text, wav in [
        ("missing.wav", "one two", None),
        ("rubbish.wav", "one two", None),
        ("empty.wav", "", clip(1)),
        ("short.wav", "one", clip(1, 0.1)),
        ("nothing.wav", "one", clip(1)[:0]),
        ("long.wav", "one two three", clip(1, 5.0)),
        ("silent.wav", "one two", np.zeros(RATE, np.float32)),
        ("hiss.wav", "one two", clip(1, level=0.001)),
        ("clipped.wav", "one two", np.clip(clip(1) * 8, -1, 1)),
        ("nan.wav", "one two", nan),
        ("fast.wav", "one two three four five six seven eight nine zero", clip(1, 0.5)),
        ("slow.wav", "i", clip(1, 2.5)),
        ("strange.wav", "one ☃ two", clip(1)),
        ("ok3.wav", "one two", None),
        ("broken.flac", "one two three", np.random.default_rng(0).normal(0, 0.1, 2 * RATE)),
        ("cut.wav", "one two", clip(1)),
    ]:
        rows.append((name, text, "s"))
        if wav is not None:
            wavs[name] = wav
    for name, wav in wavs.items():
        soundfile.write(folder / name, wav, RATE, subtype="FLOAT" if name == "nan.wav" else None)
    (folder / "rubbish.wav").write_bytes(b"this is no audio" * 99)
    data = (folder / "broken.flac").read_bytes()
    (folder / "broken.flac").write_bytes(data[: len(data) // 2])
    write_csv(folder / "metadata.csv", [(*row, "9" if row[0] == "cut.wav" else "") for row in rows],
              ("audio", "text", "speaker", "start"))  # fmt: skip
    return folder


def test_every_reason_is_named(sick, tmp_path, capsys):
    sentencepiece.SentencePieceTrainer.train(  # without byte fallback, so that it does not know the snowman
        sentence_iterator=iter([words(i) for i in range(99)]), model_prefix=str(tmp_path / "plain"), vocab_size=30,
        model_type="bpe", minloglevel=2, user_defined_symbols=["[s]"], normalization_rule_name="identity",
    )  # fmt: skip
    plain = str(tmp_path / "plain.model")
    report = run(sick, tmp_path / "t", tokenizer=plain, max_bad=0.9, max_seconds=4.0, val_fraction=0.3)
    assert {x["id"]: x["reason"] for x in report["not_used"]} == {
        "missing": "missing file", "rubbish": "unreadable file", "empty": "empty text", "short": "too short",
        "nothing": "empty audio", "long": "too long", "silent": "silence", "hiss": "silence", "clipped": "clipping",
        "nan": "NaN", "fast": "impossible speed", "slow": "impossible speed", "strange": "unknown characters",
        "ok3": "duplicate id", "broken": "unreadable file", "cut_9-": "empty audio",
    }  # fmt: skip
    assert report["used"] == 8 and report["utterances"] == 24
    assert all(x["source"] == str(sick / "metadata.csv") for x in report["not_used"])
    screen = capsys.readouterr().out
    for reason in set(report["reasons"]) | {"8 of 24 utterances are used", "☃", "nan.wav", "duration", "speaker"}:
        assert reason in screen
    files = [TokenFiles(tmp_path / "t", split) for split in ("train", "val")]
    assert sum(map(len, files)) == 8


def test_too_many_bad_ones(sick, tmp_path):
    message = "13 of 22 utterances cannot be used .*max_bad = 0.5 allows fewer; for example"  # two are beyond limits
    with pytest.raises(ValueError, match=message) as error:
        run(sick, tmp_path / "t", max_seconds=4.0, max_bad=0.5)
    report = tmp_path / "t.report.json"
    assert str(report) in str(error.value) and len(json.loads(report.read_text())["not_used"]) == 15
    assert os.listdir(tmp_path) == ["t.report.json"]
    run(sick, tmp_path / "t", max_seconds=4.0, max_bad=0.7)
    assert os.listdir(tmp_path) == ["t"]


def test_limits_are_a_choice(tmp_path):
    """Clips beyond the user's own limits are reported, and do not count as faults."""
    rows = make_set(tmp_path)
    report = run(tmp_path, tmp_path / "t", max_seconds=0.72, max_bad=0.0)  # of 24 clips, of 7 lengths
    assert report["reasons"] == {"too long": 12} and report["used"] == len(rows) - 12
    with pytest.raises(ValueError, match="24 of 24 utterances cannot be used .24 too short., none is left"):
        run(tmp_path, tmp_path / "u", min_seconds=5.0)


def test_a_speaker_that_is_lost(tmp_path):
    """One of twelve with all clips at fault is refused, whatever share max_bad lets pass."""
    rows = make_set(tmp_path, 36, [f"s{i:02d}" for i in range(12)])
    lost = [i for i, row in enumerate(rows) if row[2] == "s04"]
    write_csv(tmp_path / "metadata.csv", [*rows, *(rows[i - 1][:2] + ("again",) for i in lost)])
    with pytest.raises(ValueError, match="speaker 'again' is lost, all of 3 .* cannot be used .3 duplicate id."):
        run(tmp_path, tmp_path / "t", max_bad=0.9)
    (tmp_path / "t.report.json").unlink()
    write_csv(tmp_path / "metadata.csv", rows)
    for i in lost:
        soundfile.write(tmp_path / rows[i][0], np.zeros(RATE), RATE)
    with pytest.raises(ValueError, match="speaker 's04' is lost, all of 3 .* cannot be used .3 silence.*--max_bad=1"):
        run(tmp_path, tmp_path / "t", max_bad=0.9)
    assert "s04" not in run(tmp_path, tmp_path / "t", max_bad=1.0)["speakers"]
    without = {"path": str(tmp_path), "filter": {"speaker": "(?!s04).*"}}
    prepare.main(config(sources=without, data_dir=str(tmp_path / "u")))
    assert contents(tmp_path / "u")["train.codes.bin"] == contents(tmp_path / "t")["train.codes.bin"]


def test_silence_at_the_ends(tmp_path, capsys):
    """It is counted, and what trim_silence leaves is what is encoded."""
    noise = np.random.default_rng(0).normal(0, 1e-4, 2 * RATE).astype(np.float32)
    rows = make_set(tmp_path, 12)
    for i in (2, 3, 4):
        wav = np.concatenate([noise[: i * RATE // 2], clip(i, 1.0), noise[: RATE // 2]])
        soundfile.write(tmp_path / rows[i][0], wav, RATE)
    assert run(tmp_path, tmp_path / "all", val_fraction=0.0)["silent_ends"] == 2
    assert "\n  2 utterances have more than 1 s of silence at an end; --trim_silence" in capsys.readouterr().out
    assert run(tmp_path, tmp_path / "t", trim_silence=0.2, val_fraction=0.0)["silent_ends"] == 0
    files, codec = TokenFiles(tmp_path / "t", "train"), load_codec("mel", str(tmp_path / "t"))
    for i in range(12):
        wav = read_audio(tmp_path / rows[i][0], RATE)
        if i in (2, 3, 4):  # the clip itself begins and ends quietly, by some hundredths of a second
            u = Utterance("", "", str(tmp_path / rows[i][0]), words(i), "")
            prepare.listen(u, vars(config(trim_silence=0.2)))
            assert u.start == pytest.approx(i / 2 - 0.2, abs=0.05) and u.seconds == pytest.approx(1.4, abs=0.1)
            wav = read_audio(tmp_path / rows[i][0], RATE, u.start, u.end)
        assert np.array_equal(files.codes(i), codec.encode(wav[None])[0].T.numpy())


def test_the_stretch_that_trimming_leaves():
    u = Utterance("a", "", "", "", "", start=10.0, end=15.0, seconds=5.0)
    prepare.trim(u, 2.0, 0.1, 0.5)
    assert (u.start, u.end, u.seconds, u.silence) == (11.5, 15.0, 3.5, 0.5)
    v = Utterance("a", "", "", "", "", seconds=5.0)
    prepare.trim(v, 2.0, 1.0, 0.0)
    assert (v.start, v.end, v.seconds, v.silence) == (0.0, None, 5.0, 2.0)


def test_what_no_audio_file_is(tmp_path):
    """Whatever soundfile makes of a file, it is one reason, and the run goes on."""
    for name, content in {"a.raw": b"abcd" * 999, "b.mp3": b"junk" * 999, "c.wav": b"", "d.flac": b"fLaC"}.items():
        (tmp_path / name).write_bytes(content)
    rate = bytearray(wav_bytes(clip(1)))
    rate[24:28] = (655_351).to_bytes(4, "little")
    (tmp_path / "e.wav").write_bytes(rate)
    (tmp_path / "f.wav").write_bytes(wav_bytes(clip(1))[:9000])
    (tmp_path / "metadata.csv").touch()
    names = sorted(path.name for path in tmp_path.glob("?.*"))
    us = [Utterance(name[0], str(tmp_path / "metadata.csv"), name, "one two", "") for name in names]
    us.append(Utterance("g", "", "g.wav", "one two", "", row=0, content=b"RIFF"))
    us = listened(us)
    assert {u.reason for u in us} == {"unreadable file"} and len(us) == 7
    details = {u.id: u.detail for u in us}
    assert "Hz" in details["e"] and "breaks off" in details["f"] and "g.wav: not readable" in details["g"]
    assert details["a"].endswith("a.raw: not readable as audio (unknown kind of recording)"), details


def wav_bytes(wav):
    soundfile.write(held := io.BytesIO(), wav, RATE, format="WAV", subtype="PCM_16")
    return held.getvalue()


# -----------------------------------------------------------------------------
# text


@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=30))
def test_unseen_characters_survive_the_tokenizer(text):
    tokenizer = given_tokenizer()
    text = normalise(text)
    assert unicodedata.is_normalized("NFC", text) and text == text.strip()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and not tokenizer.unknown(text)
    assert max(ids, default=0) < tokenizer.vocab_size


@prepare.lru_cache
def given_tokenizer():
    return load_tokenizer("sentencepiece", train_tokenizer([f"[s]{words(i)}" for i in range(40)], 320, ["[s]"]))


def xtts_like(path):
    """A file like XTTS's vocab.json: Latin letters only, [SPACE] for a space."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["[STOP]", "[UNK]", "[SPACE]", "[en]", "[START]"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    model.train_from_iterator([words(i) for i in range(99)] + ["[a-z]"], trainer)
    path.write_text(model.to_str())
    return str(path)


def test_a_published_vocabulary_is_extended(tmp_path):
    """A set in a script that the vocabulary lacks, with some texts that no vocabulary makes readable."""
    given = xtts_like(tmp_path / "vocab.json")
    texts = ["ሰላም ነው", "ዓለም ነው three", "ሰላም ዓለም", "ቋንቋ ሰላም", "ነው one"] * 4
    texts += ["ሰላም [STOP]", "ሰላም ዓለም ቋንቋ ነው one", "ነው Ω"]
    (tmp_path / "set").mkdir()
    for i in range(len(texts)):
        soundfile.write(tmp_path / "set" / f"u{i:02d}.wav", clip(i), RATE)
    write_csv(tmp_path / "set" / "metadata.csv", [(f"u{i:02d}.wav", text, "s") for i, text in enumerate(texts)])
    (tmp_path / "val").write_text("u03\nu22\n")  # so that nobody has taught it what stands in the last
    keys = dict(tokenizer=given, text_format="[am]{text}", heldout=str(tmp_path / "val"), max_text_tokens=9)

    report = run(tmp_path / "set", tmp_path / "t", extend_vocab=600, max_bad=0.2, **keys)
    assert {x["id"]: (x["reason"], x["detail"]) for x in report["not_used"]} == {
        "u20": ("begin or end in text", "[STOP]"), "u21": ("too much text", "10 tokens"),
        "u22": ("unknown characters", "Ω"),
    }  # fmt: skip
    files = TokenFiles(tmp_path / "t", "train")
    meta = files.meta["tokenizer"]
    tokenizer = load_tokenizer(meta["kind"], (tmp_path / "t" / meta["file"]).read_bytes())
    assert tokenizer.describe() == meta and (meta["kind"], meta["eos_id"]) == ("tokenizers", 0)
    for i in range(len(files)):
        assert tokenizer.decode(files.text(i)) == f"[am]{texts[int(files.name(i)[1:])]}"
    assert [tokenizer.processor.id_to_token(i) for i in files.text(0)] == ["[am]", "ሰላም", "[SPACE]", "ነው"]

    with pytest.raises(ValueError, match="23 unknown characters.*, none is left; for example u00: unknown .* ሰ ነ ው;"):
        run(tmp_path / "set", tmp_path / "u", **keys)


def test_a_tag_that_the_vocabulary_does_not_know(raw, tmp_path):
    given = xtts_like(tmp_path / "vocab.json")
    with pytest.raises(ValueError, match="12 unknown characters.*; for example u01: unknown characters b;"):
        run(raw, tmp_path / "t", tokenizer=given, text_format="{speaker} {text}")  # ann is known, bob is not


def test_text_is_composed_and_lowered(tmp_path):
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", clip(i), RATE)
    write_csv(tmp_path / "metadata.csv", [(f"{i}.wav", "  CAFE\u0301  \t ÉTÉ ", "s") for i in range(4)])
    (tmp_path / "heldout.txt").write_text("0\n")
    run(tmp_path, tmp_path / "t", lowercase=True, heldout=str(tmp_path / "heldout.txt"), text_format="{text}")
    tokenizer = load_tokenizer("sentencepiece", (tmp_path / "t" / "tokenizer.model").read_bytes())
    assert tokenizer.decode(TokenFiles(tmp_path / "t", "val").text(0)) == "café été"


def test_text_as_it_is(tmp_path):
    texts = ["  two  spaces ", "first line\nsecond line", "cafe\u0301 \u201cÉTÉ\u201d", "Three\r\n\tfour"]
    for i in range(len(texts)):
        soundfile.write(tmp_path / f"{i}.wav", clip(i), RATE)
    write_csv(tmp_path / "metadata.csv", [(f"{i}.wav", text, "s") for i, text in enumerate(texts)])
    run(tmp_path, tmp_path / "t", front_end="none", text_format="{text}", val_fraction=0.0)
    files = TokenFiles(tmp_path / "t", "train")
    assert files.meta["front_end"] == "none"
    assert [files.tokenizer().decode(files.text(i)) for i in range(4)] == texts


# -----------------------------------------------------------------------------
# languages


def make_languages(folder):
    """Texts in two languages, which a column names, except where a source or a lang.txt does."""
    for name in ("a", "b", "c"):
        make_set(folder / name, 8, ("s",))
    rows = [(f"wavs/u{i:02d}.wav", words(i), "de_DE" if i % 2 else "EN") for i in range(6)]
    write_csv(folder / "a" / "metadata.csv", rows, ("audio", "text", "Locale"))
    (folder / "b" / "lang.txt").write_text("am\n")
    return [str(folder / "a"), str(folder / "b"), {"path": str(folder / "c"), "language": "zh-CN"}]


def test_the_language_of_each_row(tmp_path):
    sources = make_languages(tmp_path)
    report = run(sources, tmp_path / "t", text_format="[{language}]{text}", val_fraction=0.0)
    counts = {name: x["utterances"] for name, x in report["languages"].items()}
    assert counts == {"am": 8, "zh-cn": 8, "en": 3, "de-de": 3}
    files = TokenFiles(tmp_path / "t", "train")
    meta = files.meta
    assert sorted(meta["languages"][:2]) == ["am", "zh-cn"] and meta["languages"] == list(report["languages"])
    for i in range(len(files)):
        name = meta["languages"][files.language(i)]
        assert files.tokenizer().decode(files.text(i)) == f"[{name}]{words(int(files.name(i)[-2:]))}"
    tags = [files.tokenizer().encode(f"[{name}]") for name in meta["languages"]]
    assert sorted(map(len, tags)) == [1] * 4  # each tag is a token of its own


def test_a_language_that_nobody_names(tmp_path):
    sources = make_languages(tmp_path)
    rows = [(f"wavs/u{i:02d}.wav", words(i), "" if i else "en") for i in range(8)]
    write_csv(tmp_path / "a" / "metadata.csv", rows, ("audio", "text", "lang"))
    said = run(sources, tmp_path / "t", text_format="[{language}]{text}", max_bad=0.5, val_fraction=0.0)["not_used"]
    assert {x["source"] for x in said} == {f"{tmp_path}/a/metadata.csv"} and len(said) == 7
    assert {x["reason"] for x in said} == {"no language"}
    run(sources, tmp_path / "u", text_format="[{language}]{text}", language="de", val_fraction=0.0)
    files = TokenFiles(tmp_path / "u", "train")
    assert [files.meta["languages"][files.language(i)] for i in range(8)] == ["en"] + ["de"] * 7
    (tmp_path / "b" / "lang.txt").write_text("English, mostly")
    with pytest.raises(ValueError, match="lang.txt: names the language of the texts, as en or zh-cn, not 'english, "):
        run(sources, tmp_path / "v")


def test_a_few_texts_in_another_script_are_pointed_out(tmp_path, capsys):
    texts = ["ሰላም ነው", "ዓለም ነው, ok", "selam new", "ቋንቋ ሰላም"] + ["ሰላም ዓለም"] * 6
    for i in range(len(texts)):
        soundfile.write(tmp_path / f"{i}.wav", clip(i), RATE)
    write_csv(tmp_path / "metadata.csv", [(f"{i}.wav", text, "s") for i, text in enumerate(texts)])
    report = run(tmp_path, tmp_path / "t", val_fraction=0.0)
    assert report["other_script"] == [{"id": "2", "script": "LATIN", "text": "selam new"}]
    said = capsys.readouterr().out
    assert "1 utterances are in another script than the rest (latin), for example 2 'selam new'" in said
    rows = [(f"{i}.wav", text, "en" if i == 2 else "am") for i, text in enumerate(texts)]
    write_csv(tmp_path / "metadata.csv", rows, ("audio", "text", "language"))
    assert run(tmp_path, tmp_path / "t", val_fraction=0.0)["other_script"] == []


def test_letters_are_no_phonemes(raw, tmp_path):
    said = ["həlˈoʊ wˈɜːld", "ðə ɹˈɪvɚ ɹˈoʊz", "aɪ ɹˈiːd ðə ɹˈɛkɚd", "twˈɛlv ˈaʊɚz"]
    tags = ["[ann]", "[bob]"]
    (tmp_path / "ipa.model").write_bytes(train_tokenizer([f"[ann][bob]{text}" for text in said], 330, tags))
    keys = dict(tokenizer=str(tmp_path / "ipa.model"), max_chars_per_second=99.0)
    with pytest.raises(ValueError, match="ipa.model reads phonemes, and the texts are letters, such as 'zero zero zer"):
        run(raw, tmp_path / "t", **keys)
    write_csv(raw / "ipa.csv", [(f"wavs/u{i:02d}.wav", said[i % 4], "ann") for i in range(24)])
    assert run(raw / "ipa.csv", tmp_path / "t", **keys)["used"] == 24


# -----------------------------------------------------------------------------
# accidents


def test_killed_in_mid_run(raw, tokens, tmp_path):
    out = tmp_path / "t"
    sources = [{"path": str(raw), "name": f"copy {i}"} for i in range(30)]  # so much that the kill comes in time
    args = [sys.executable, ROOT / "prepare.py", f"--sources={sources}", f"--data_dir={out}", f"--codec_args={TINY}",
            "--val_fraction=0.2", "--workers=1"]  # fmt: skip
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, start_new_session=True)
    partial, end = Path(f"{out}.partial"), time.time() + 300
    while not (partial / "codec.pt").exists():  # the codec is fitted, the encoding begins
        assert process.poll() is None and time.time() < end
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists() and partial.exists()
    while alive(process.pid):  # the workers go with their parent
        assert time.time() < end
        time.sleep(0.05)
    with pytest.raises(ValueError, match="not a finished token folder"):
        TokenFiles(partial, "train")
    run(raw, out)
    assert contents(out) == contents(tokens) and not partial.exists()


def alive(session):
    """Is a process of this session left?"""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z" and int(fields[3]) == session:
                return True
    return False


def die(chunk):
    os._exit(1)


def test_two_runs_into_one_folder(raw, tokens, tmp_path, monkeypatch):
    """The second is refused in one line, before it touches anything of the first; the first ends as if alone."""
    out, fit = tmp_path / "t", prepare.fit_codec

    def meanwhile(*args):
        before = contents(Path(f"{out}.partial"))
        with pytest.raises(ValueError, match="t.partial is in use by another run"):
            run(raw, out)
        assert contents(Path(f"{out}.partial")) == before
        return fit(*args)

    monkeypatch.setattr(prepare, "fit_codec", meanwhile)
    run(raw, out)
    assert contents(out) == contents(tokens) and os.listdir(tmp_path) == ["t"]


def test_refused_before_listening(raw, yard, tmp_path, monkeypatch):
    """What the rows alone tell is said before hours of work."""
    monkeypatch.setattr(prepare, "examine", None)  # so that listening would fail otherwise
    few = {"path": str(raw), "filter": {"audio": ".*u0[0-3].wav"}}
    for wrong, message in [
        ({"vocab_size": 261}, "vocab_size = 261 is too small"), ({"val_fraction": 1.0}, "train split is empty"),
        ({"sources": [few, "lost.csv"]}, "3 of 7 utterances cannot be used .3 missing file.*max_bad"),
        ({"heldout": "prose.csv"}, "belong to no utterance"),
    ]:  # fmt: skip
        monkeypatch.chdir(yard)
        with pytest.raises(ValueError, match=message):
            prepare.main(config(**{"sources": str(raw), "data_dir": str(tmp_path / "t"), **wrong}))
    assert os.listdir(tmp_path) == ["t.report.json"]


def test_a_worker_that_dies(processes):
    with pytest.raises(OSError, match="a worker process was killed"):
        list(prepare.in_order("dying", prepare.start_pool(1), die, utterances("ab")))


def test_disk_full(raw, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    args = [sys.executable, "-B", ROOT / "prepare.py", f"--sources={raw}", f"--data_dir={tmp_path / 't'}",
            f"--codec_args={TINY}", "--val_fraction=0.2", "--workers=1"]  # fmt: skip
    done = subprocess.run(args, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: File too large: ") and "t.partial/" in done.stderr
    assert done.stderr.count("\n") == 1 and os.listdir(tmp_path) == []


def test_an_old_folder_is_replaced_when_the_new_one_is_whole(raw, tokens, tmp_path):
    out = tmp_path / "t"
    run(raw, out, seed=5)
    before = contents(out)
    with pytest.raises(ValueError):
        run(raw, out, val_fraction=1.0)
    with pytest.raises(ValueError, match="holds token files already"):
        run(raw, out, overwrite=False)
    assert contents(out) == before
    run(raw, out)
    assert contents(out) == contents(tokens) and os.listdir(tmp_path) == ["t"]


BAD = {
    "missing metadata": (["--sources=nowhere.csv"], "nowhere.csv"),
    "folder without metadata": (["--sources=bare"], "none of metadata.csv"),
    "data set not made yet": (["--sources=unmade"], "run python unmade/prepare.py first"),
    "empty metadata": (["--sources=empty.csv"], "no rows"),
    "header only": (["--sources=header.csv"], "no rows"),
    "wrong columns": (["--sources=columns.csv"], "its columns are name, words"),
    "no columns": (["--sources=prose.csv"], "its columns are"),
    "metadata that is audio": (["--sources=raw/wavs/u00.wav"], "not a text file"),
    "broken json": (["--sources=broken.jsonl"], "line 2: not JSON"),
    "json of strings": (["--sources=strings.json"], "is not an object"),
    "open quotation mark": (["--sources=open.csv"], "open.csv, line"),
    "unknown source key": (["--sources={'path': 'raw', 'spaeker': 'x'}"], "has a path"),
    "filter that is no pattern": (["--sources={'path': 'raw', 'filter': {'text': '('}}"], "no regular expression"),
    "filter that lets nobody pass": (["--sources={'path': 'raw', 'filter': {'txt': 'one'}}"], "columns: audio, text"),
    "cap of nothing": (["--sources={'path': 'raw', 'cap': 0}"], "cap"),
    "no sources": (["--sources=[]"], "--sources="),
    "no data_dir": (["--data_dir="], "--data_dir="),
    "data_dir in a file": (["--data_dir=prose.csv/t"], "prose.csv"),
    "data_dir with other things": (["--data_dir=raw"], "is not a token folder"),
    "data_dir that is a file": (["--data_dir=prose.csv"], "is not a token folder"),
    "unknown codec": (["--codec=mle"], "mle"),
    "codec option": (["--codec_args={'codebooks': 3}"], "codebooks"),
    "codec path": (["--codec_path=nowhere.pt"], "nowhere.pt"),
    "codec that is none": (["--codec_path=prose.csv", "--codec_args={}"], "prose.csv"),
    "tokenizer that is none": (["--tokenizer=prose.csv"], "prose.csv: the tokenizer is not"),
    "missing tokenizer": (["--tokenizer=nowhere.model"], "nowhere.model"),
    "json that is no tokenizer": (["--tokenizer=broken.jsonl"], "broken.jsonl: the tokenizer is not a tokenizer.json"),
    "nothing to extend": (["--extend_vocab=9"], "needs a tokenizer to extend"),
    "no way to extend": (["--extend_vocab=9", "--tokenizer=prose.csv"], "prose.csv: the tokenizer is not a sentence"),
    "limit below 0": (["--max_text_tokens=-1"], "max_text_tokens = -1 must be >= 0"),
    "text_format": (["--text_format={txt}"], "text_format"),
    "workers": (["--workers=-1"], "workers = -1 must be >= 0 and <= 1024"),
    "too many workers": (["--workers=1000000"], "workers = 1000000 must be >= 0 and <= 1024"),
    "max_bad below 0": (["--max_bad=-1"], "max_bad = -1.0 must be >= 0 and <= 1"),
    "max_bad without end": (["--max_bad=1e999"], "max_bad = inf must be finite"),
    "max_tokens of nothing": (["--max_tokens=0"], "max_tokens = 0 must be >= 1"),
    "batches below 0": (["--batch_seconds=-1"], "batch_seconds = -1.0 must be > 0"),
    "codec option without end": (["--codec_args={'frame_rate': 1e999}"], "must be finite"),
    "batches of a codec without": (["--batch_seconds=9"], "batch_seconds = 9.0 has no effect: the codec mel encodes"),
    "fit of a published codec": (["--codec=xtts", "--codec_args={}", "--fit_seconds=9"], "codec xtts is not fitted"),
    "fine-tuning of another codec": (["--fit_epochs=9"], "fit_epochs = 9 has no effect: the codec mel cannot be"),
    "two vocabularies": (["--tokenizer=prose.csv", "--vocab_size=9"], "vocab_size = 9 has no effect: tokenizer = "),
    "two ways to split": (["--heldout=prose.csv", "--val_fraction=0.3"], "val_fraction = 0.3 has no effect: heldout"),
    "key of train.py": (["--max_iters=9"], "--max_iters: max_iters is a key of train.py and has no effect here"),
    "no language": (["--text_format=[{language}]{text}"], "give the language"),
    "missing held-out list": (["--heldout=nowhere.txt"], "nowhere.txt"),
    "held-out list of others": (["--heldout=prose.csv"], "2 of its 2 ids belong to no utterance: 'Dear', 'you'"),
    "all held out": (["--val_fraction=1"], "the train split is empty"),
    "vocabulary too small": (["--vocab_size=200"], "vocab_size = 200 is too small"),
    "all audio missing": (["--sources=lost.csv"], "3 of 3 utterances cannot be used (3 missing file), none is left"),
    "wrong type": (["--vocab_size=many"], "not of type int"),
    "unknown key": (["--source=raw"], "did you mean 'sources'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def yard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("yard")
    make_set(folder / "raw", 12)
    (folder / "bare").mkdir()
    (folder / "unmade").mkdir()
    (folder / "unmade" / "prepare.py").touch()
    for name, text in {
        "empty.csv": "", "header.csv": "audio,text\n", "columns.csv": "name,words\na,b\n", "prose.csv": "Dear\nyou\n",
        "broken.jsonl": '{"audio": "a", "text": "b"}\n{"audio": \n', "strings.json": '["a", "b"]',
        "open.csv": 'audio,text\na.wav,"b\n', "lost.csv": "audio,text\na.wav,a\nb.wav,b\nc.wav,c\n",
    }.items():  # fmt: skip
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case, yard, monkeypatch, capsys):
    argv, message = BAD[case]
    monkeypatch.chdir(yard)
    defaults = ["--sources=raw", "--data_dir=t", f"--codec_args={TINY}", "--workers=1"]
    defaults += [] if any("--heldout" in arg for arg in argv) else ["--val_fraction=0.3"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *defaults, *argv])
    before = set(os.listdir(yard))
    with pytest.raises(SystemExit) as stop:
        configurator.run(prepare.main, prepare.__file__)
    err = capsys.readouterr().err
    assert stop.value.code == 1
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert set(os.listdir(yard)) - before <= {"t.report.json"}


def test_the_two_scripts_agree_on_shared_keys():
    mine = configurator.read_defaults(ROOT / "prepare.py")
    for name in ("train.py", "sample.py"):
        if (ROOT / name).exists():
            other = configurator.read_defaults(ROOT / name)
            for key in ("max_tokens", "data_dir", "device"):
                assert key not in other or other[key].default == mine[key].default, key

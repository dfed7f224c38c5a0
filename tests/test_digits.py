import csv
import importlib.util
import itertools
import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from helpers import ROOT

import bench
import codec
from parts import configurator, ears

DIGITS = ROOT / "data" / "digits"

spec = importlib.util.spec_from_file_location("digits_prepare", DIGITS / "prepare.py")
digits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(digits)


@pytest.fixture(scope="module")
def recordings():
    return digits.load_recordings()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    digits.make(str(folder), 30, 0)
    return folder


def rows(folder):
    with open(folder / "metadata.csv", newline="") as file:
        return list(csv.DictReader(file))


def blocks(groups):
    """Recordings in which the digit d is ten samples of value d + 1, so that a composition can be read off."""
    edge = np.zeros(digits.MARGIN, np.int16)
    return [(g, np.concatenate([edge, np.repeat([int(d) + 1 for d in g], 10).astype(np.int16), edge])) for g in groups]


# -----------------------------------------------------------------------------
# what the repository holds


def test_the_committed_files_are_small():
    kept = [p for p in DIGITS.iterdir() if p.suffix in (".ogg", ".py", ".md") or p.name == "recordings.csv"]
    assert sum(p.stat().st_size for p in kept) < 6_000_000
    assert len([p for p in kept if p.suffix == ".ogg"]) == 4


def test_slt_reads_every_group_and_recordings_fill_the_files():
    ends, groups = defaultdict(int), defaultdict(set)
    with open(DIGITS / "recordings.csv", newline="") as file:
        for row in csv.DictReader(file):
            assert int(row["start"]) == ends[row["voice"]]
            ends[row["voice"]] += int(row["length"])
            groups[row["voice"]].add(row["digits"])
    for voice, end in ends.items():
        assert soundfile.info(str(DIGITS / f"{voice}.ogg")).frames == end
    everything = {"".join(g) for n in (1, 2, 3) for g in itertools.product("0123456789", repeat=n)}
    assert everything <= groups["slt"]


@pytest.mark.parametrize("voice", digits.VOICES)
def test_speech_begins_and_ends_where_the_table_says(recordings, voice):
    """The lossy files keep the places from beginning to end: background up to the margin, speech right behind it, and
    the same the other way round. Weak fricatives and Opus blur single recordings by a few tens of ms."""
    before, after = [], []  # how late speech begins and how late it ends, in 10 ms
    for _, wav in itertools.chain(*recordings[voice].values()):
        peaks = np.abs(wav.astype(float)[: len(wav) // 160 * 160]).reshape(-1, 160).max(1)
        loud = np.flatnonzero(peaks > 10 ** (-36 / 20) * peaks.max())
        before.append(loud[0] - digits.MARGIN // 160)
        after.append(loud[-1] + 1 - (len(wav) - digits.MARGIN) // 160)
    for late in (np.array(before), np.array(after)):
        assert np.mean(np.abs(late) <= 3) > 0.85
        assert all(abs(np.median(part)) <= 1 for part in np.array_split(late, 5))


# -----------------------------------------------------------------------------
# composing


@pytest.mark.parametrize("length", digits.LENGTHS)
def test_what_is_composed_is_what_the_text_says(length):
    rng = random.Random(1)
    recorded = {"slt": {n: blocks([f"{i:0{n}d}" for i in range(10**n)]) for n in (1, 2, 3)}}
    for n in (4, 5, 6):
        recorded["slt"][n] = blocks(["".join(rng.choices("0123456789", k=n)) for _ in range(20)])
    for _ in range(50):
        groups = digits.draw(recorded, "slt", length, rng)
        text = "".join(group for group, _ in groups)
        wav = digits.compose(groups, rng)
        assert len(text) == length
        spoken = wav[wav > 0] - 1
        assert "".join(map(str, spoken[::10])) == text and len(spoken) == 10 * length


def test_pauses_and_edges():
    rng, seen = random.Random(0), set()
    for _ in range(200):
        wav = digits.compose(blocks(["1", "22", "3"]), rng)
        edges = np.flatnonzero(np.diff((wav > 0).astype(int)))
        gaps = np.diff(edges)[1::2]
        assert edges[0] + 1 == digits.LEAD and len(wav) - 1 - edges[-1] == digits.TAIL
        assert len(gaps) == 2 and gaps.min() >= digits.PAUSE[0] and gaps.max() <= digits.PAUSE[1]
        seen |= set(gaps.tolist())
    assert len(seen) > 100


def test_no_held_out_string_is_heard_in_training(recordings):
    everything = [u[1:4] for u in digits.utterances(recordings, 4000, 0)]
    held_out = [d for held, _, d in everything if held]
    training = [(v, d) for held, v, d in everything if not held]
    assert len(held_out) == len(set(held_out)) == sum(digits.HELD_OUT.values())
    assert len([1 for held, v, _ in everything if held and v == "slt"]) >= 64
    assert {len(d) for d in held_out} == {3, 4, 5, 6}
    assert not [(d, h) for _, d in training for h in held_out if h in d]
    assert len(training) == 4000 and len({d for _, d in training}) > 3000
    assert 0.48 < np.mean([v == "slt" for v, _ in training]) < 0.56
    assert {len(d) for _, d in training} == {2, 3, 4, 5, 6}
    assert np.mean([len(d) <= 3 for _, d in training]) > 0.25


# -----------------------------------------------------------------------------
# the files


def test_the_same_seed_gives_the_same_bytes(made, tmp_path):
    digits.make(str(tmp_path), 30, 0)
    files = sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file())
    assert len(files) == 30 + sum(digits.HELD_OUT.values()) + 2
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert all((made / p).read_bytes() == (tmp_path / p).read_bytes() for p in files)


def test_another_seed_changes_training_alone_and_a_larger_n_adds(recordings):
    def listed(n, seed):
        everything = [(u[0], u[1], u[4].tobytes()) for u in digits.utterances(recordings, n, seed)]
        return [u for u in everything if u[1]], [u for u in everything if not u[1]]

    held, training = listed(20, 0)
    assert listed(20, 1)[0] == held and listed(20, 1)[1] != training
    assert listed(40, 0)[1][:20] == training


def test_metadata_and_held_out_list(made):
    table = rows(made)
    assert list(table[0]) == ["audio", "text", "speaker"]
    assert {made / row["audio"] for row in table} == set((made / "wavs").iterdir())
    names = {Path(row["audio"]).stem for row in table}
    held_out = (made / "heldout.txt").read_text().split()
    assert len(names) == len(table) and set(held_out) < names and len(held_out) == len(names) - 30
    for row in table:
        info = soundfile.info(str(made / row["audio"]))
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        number = Path(row["audio"]).stem.rsplit("_", 1)[1]
        assert row["text"] == " ".join(digits.WORDS[int(d)] for d in number)
        assert 0.3 < info.duration < 0.6 * len(number) + 0.4


def test_a_run_that_stops_half_way_never_looks_finished(made, tmp_path, monkeypatch):
    digits.make(str(tmp_path), 5, 1)
    write, count = soundfile.write, itertools.count()

    def full_disk(*args, **kwargs):
        if next(count) == 10:
            raise OSError("No space left on device")
        write(*args, **kwargs)

    monkeypatch.setattr(digits.soundfile, "write", full_disk)
    with pytest.raises(OSError, match="No space"):
        digits.make(str(tmp_path), 30, 0)
    assert not (tmp_path / "metadata.csv").exists()
    monkeypatch.undo()
    digits.make(str(tmp_path), 30, 0)
    assert rows(tmp_path) == rows(made) and len(list((tmp_path / "wavs").iterdir())) == len(rows(made))


def test_command_line(tmp_path, monkeypatch, capsys):
    command = ["prepare.py", f"--folder={tmp_path}"]
    monkeypatch.setattr(sys, "argv", [*command, "--n=3", "--seed", "5"])
    digits.main()
    assert len(rows(tmp_path)) == 3 + sum(digits.HELD_OUT.values())
    out = capsys.readouterr().out
    assert "held out" in out and "longest" in out
    for bad in ("--count=3", "--n=0"):
        monkeypatch.setattr(sys, "argv", [*command, bad])
        with pytest.raises(SystemExit) as stop:
            digits.main()
        assert stop.value.code == 2 and "error:" in capsys.readouterr().err.splitlines()[-1]


# -----------------------------------------------------------------------------
# bench.py: the recogniser


def test_held_out_recordings_are_understood(made):
    heard = []
    for path, text, speaker in bench.read_raw(str(made)):
        if speaker == "slt" and len(heard) < 32 or speaker != "slt" and path.count("_00"):
            heard.append((speaker, text, ears.recognise(codec.read_audio(path, 16000), 16000)))
    counts = bench.error_rates(heard)
    assert list(counts) == ["awb", "kal16", "rms", "slt", "all"]
    for _, words, errors in counts.values():
        assert errors <= 0.03 * words


def test_the_recogniser_hears_what_is_there(made):
    path, text, _ = bench.read_raw(str(made))[1]
    wav = codec.read_audio(path, 16000)
    heard = ears.recognise(wav, 16000)
    assert heard == text
    backwards = ears.recognise(wav.flip(0), 16000)
    assert ears.word_errors(text, backwards) > 0
    assert ears.recognise(wav.numpy(), 16000) == heard  # nothing is carried over from what was heard before
    assert ears.recognise(0.1 * wav, 16000) == heard
    assert ears.recognise(codec.resample(wav, 16000, 24000), 24000) == heard
    for nothing in (torch.zeros(0), torch.zeros(16000), torch.full((16000,), float("nan"))):
        assert ears.recognise(nothing, 16000) == ""
    with pytest.raises(ValueError, match="one waveform"):
        ears.recognise(wav[None], 16000)


def test_error_rates_pool_words_not_utterances():
    heard = [("a", "one two three", "one two three"), ("a", "one", "two"), ("b", "one two", "")]
    assert bench.error_rates(heard) == {"a": (2, 4, 1), "b": (1, 2, 2), "all": (3, 6, 3)}
    assert bench.error_percent(heard) == {"a": 25.0, "b": 100.0, "all": 50.0}


def test_bench_from_the_command_line(made, tmp_path, capsys):
    results = tmp_path / "rows.jsonl"
    argv = ["data", f"--raw={made}", "--limit=4", f"--results={results}"]
    bench.main(configurator.configure(bench.__file__, argv, ["name"]))
    assert capsys.readouterr().out.splitlines()[-1].startswith("case all  utterances 4  words 18")
    assert json.loads(results.read_text().splitlines()[-1])["values"]["words"] == 18
    with pytest.raises(ValueError, match="data.*'dta'"):
        bench.main(SimpleNamespace(name="dta"))
    with pytest.raises(FileNotFoundError, match=r"metadata\.csv: no such file"):
        bench.main(SimpleNamespace(name="data", raw=str(tmp_path), limit=0))

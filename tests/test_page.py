import errno
import io
import json
import os
import shutil
import struct
import subprocess
import time
import zlib
from base64 import b64decode
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import soundfile
import torch
from helpers import read_page, voice

from parts import page
from parts.audio import write_audio

RATE = 16000


class Tags(HTMLParser):
    """The names of all tags of a page, and its text outside of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.texts = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts += [data] if self.tags[-1:] != ["script"] else []


def model(name, loss=None, config=None, **curves):
    return {"name": name, "config": config or {}, "numbers": {"val_loss": loss}, "curves": curves}


def example(folder, names=("one", "two", "three"), seconds=1.5):
    """A page's data with a recording of each of two sentences by each model, which are written into the folder."""
    models = []
    for i, name in enumerate(names):
        config = {"learning_rate": 10.0 ** -(i + 2), "seed": 1337, "data_dir": "/home/me/tokens", "out_dir": f"out/{i}",
                  "backbone": {"n_layer": 4, "d_model": 64 * (i + 1)}}  # fmt: skip
        loss = [[step, 6.0 + i - step / 300] for step in range(10, 1510, 10)]
        held_out = [[step, 6.2 + i - step / 300] for step in range(250, 1510, 250)]
        numbers = {"val_loss": held_out[-1][1], "text_margin": 0.5 - i / 7, "missed": None if i else 2.5}
        curves = {"loss": loss, "val_loss": held_out}
        models.append({"name": name, "config": config, "curves": curves, "numbers": numbers})
    columns = [{"name": "missed", "better": "low", "meaning": "lines without an end, per hundred"},
               {"name": "val_loss", "better": "low", "meaning": "held-out loss"},
               {"name": "text_margin", "better": "high", "meaning": "by how much the text fits better, nats"}]
    sentences = []
    for j, text in enumerate(("one two three", "<i>four & five</i>")):
        audio = {}
        for i, name in enumerate(names):
            audio[name] = f"audio {i}/{j}.wav"
            (folder / f"audio {i}").mkdir(exist_ok=True)
            write_audio(folder / audio[name], voice(seconds - 0.3 * i, seed=3 * j + i), RATE)
        sentences.append({"id": f"s{j}", "text": text, "audio": audio,
                          "numbers": {name: {"text_margin": 0.1 * j} for name in names}})  # fmt: skip
    return {"title": "A comparison", "rank_by": "val_loss", "columns": columns, "models": models,
            "sentences": sentences}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# what stands in the file


def test_a_run_becomes_a_page_of_curves(tmp_path):
    lines = [{"iter": i, "loss": 5.0 - i / 1000, "lr": 1e-3, "c0_accuracy": None, "timing": {"seconds": 2.0},
              "loss_by_codebook": [1.0, 2.0]} for i in range(1, 4001)]  # fmt: skip
    lines[-1]["val_loss"] = 2.125
    path = tmp_path / "a <run>" / "loss.html"
    path.parent.mkdir()
    page.draw(lines, str(path))
    found = read_page(path)
    curves = found["models"][0]["curves"]
    assert found["title"] == found["models"][0]["name"] == "a <run>"
    assert set(curves) == {"loss", "lr", "val_loss"} and curves["val_loss"] == [[4000, 2.125]]
    assert len(curves["loss"]) <= page.POINTS + 1
    assert curves["loss"][0] == [1, 4.999] and curves["loss"][-1] == [4000, 1.0]
    broken = {"loss": [[1, None], [2, float("nan")], [3, 2.5]], "lr": []}
    page.write_page(path, {"title": "", "models": [{"name": "a", "curves": broken}]})
    assert read_page(path)["models"][0]["curves"] == {"loss": [[3, 2.5]], "lr": []}
    page.draw([], str(path))  # before the first line
    assert read_page(path)["models"][0]["curves"] == {}


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page.write_page(tmp_path / "x.html", example(tmp_path))
    text = (tmp_path / "x.html").read_text()
    without = text.replace("http://www.w3.org/", "")
    assert "http" not in without and "link" not in Tags(text).tags and "@import" not in text


def test_texts_cannot_become_tags(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--"
    for name, word in (("evil", evil), ("good", "good")):
        (tmp_path / name).mkdir()
        data = example(tmp_path / name, names=(word, "__page__", "__title__"))
        data["title"] = word
        data["models"][0]["config"][word] = word
        data["columns"][0]["meaning"] = data["sentences"][0]["text"] = word
        page.write_page(tmp_path / name / "x.html", data)
    evil_page, good_page = (Tags((tmp_path / name / "x.html").read_text()) for name in ("evil", "good"))
    assert evil_page.tags == good_page.tags and evil_page.texts.count(evil) == good_page.texts.count("good") == 2
    found = read_page(tmp_path / "evil/x.html")
    assert [m["name"] for m in found["models"]] == [evil, "__page__", "__title__"]
    assert found["title"] == found["sentences"][0]["text"] == found["models"][0]["config"][evil] == evil


def test_settings_are_flat_and_name_no_folder_of_the_machine(tmp_path):
    config = {
        "data_dir": "/home/me/a b/tokens", "init_from": "out/base/best.pt", "out_dir": "/home/me/out/x", "root": "/",
        "codec_path": r"C:\weights\mimi", "sources": ["/data/x.csv,/data/y.csv", "z.csv"], "freeze": [],
        "backbone": {"n_layer": 4}, "lr": float("nan"), "steps": np.int64(3), "empty": None,
    }  # fmt: skip
    page.write_page(tmp_path / "x.html", {"title": "", "models": [{"name": "a", "config": config}]})
    assert read_page(tmp_path / "x.html")["models"][0]["config"] == {
        "data_dir": "tokens", "init_from": "out/base/best.pt", "root": "/", "codec_path": "mimi",
        "sources": ["x.csv,y.csv", "z.csv"], "freeze": [], "backbone.n_layer": 4, "lr": None, "steps": 3, "empty": None,
    }  # fmt: skip


def test_a_page_holds_its_recordings_or_names_them(tmp_path, monkeypatch):
    data = example(tmp_path)
    page.write_page(tmp_path / "x.html", data)
    inside = read_page(tmp_path / "x.html")["sentences"]
    monkeypatch.setattr(page, "EMBEDDED", 1000)
    page.write_page(tmp_path / "y.html", data)
    beside = read_page(tmp_path / "y.html")["sentences"]
    for j, sentence in enumerate(inside):
        for name, path in data["sentences"][j]["audio"].items():
            about, linked = sentence["audio"][name], beside[j]["audio"][name]
            kind, _, content = about["src"].partition(",")
            wav, rate = soundfile.read(io.BytesIO(b64decode(content)), dtype="int16")
            expected = soundfile.read(tmp_path / path, dtype="int16")[0]
            assert kind == "data:audio/flac;base64" and rate == about["rate"] == RATE and np.array_equal(wav, expected)
            assert about["seconds"] == len(expected) / RATE and about["picture"] == linked["picture"]
            assert linked["src"] == path.replace(" ", "%20")
    assert inside[0]["numbers"] == {name: {"text_margin": 0} for name in ("one", "two", "three")}


def test_a_recording_without_samples_and_none(tmp_path):
    write_audio(tmp_path / "empty.wav", torch.zeros(0), RATE)
    sentences = [{"id": "0", "audio": {"a": "empty.wav"}}]
    data = {"title": "x", "models": [{"name": "a"}, {"name": "b"}], "sentences": sentences}
    page.write_page(tmp_path / "x.html", data)
    assert read_page(tmp_path / "x.html")["sentences"][0]["audio"] == {"a": {"src": "empty.wav", "seconds": 0}}
    (tmp_path / "empty.wav").write_text("no sound")
    with pytest.raises(ValueError, match="empty.wav: not readable as audio"):
        page.write_page(tmp_path / "x.html", data)
    (tmp_path / "empty.wav").unlink()
    with pytest.raises(FileNotFoundError) as error:
        page.write_page(tmp_path / "x.html", data)
    assert error.value.filename == str(tmp_path / "empty.wav") and os.listdir(tmp_path) == ["x.html"]


def test_a_picture_shows_pitch_and_time():
    rows, columns = page.PICTURE
    t = np.arange(2 * RATE) / RATE
    tone = np.where(t < 1, np.sin(2 * np.pi * 2000 * t), np.sin(2 * np.pi * 6000 * t)).astype(np.float32)
    grey = page.spectrogram(tone, RATE)
    assert grey.shape == (rows, columns) and grey.dtype == np.uint8 and 0 == grey.min() < grey.max() == 15
    darkest = grey.argmin(0)
    assert set(darkest[5 : columns // 2 - 5]) <= {47, 48} and set(darkest[columns // 2 + 5 : -5]) <= {15, 16}
    for few, rate in ((1, 8000), (50, 48000), (4000, 4000)):
        assert page.spectrogram(tone[:few], rate).shape == (rows, columns)
    assert (page.spectrogram(np.zeros(RATE, np.float32), RATE) == 15).sum() == rows * columns


def test_a_picture_is_a_png():
    grey = np.random.default_rng(0).integers(0, 16, (5, 8), dtype=np.uint8)
    content = page.png(grey)
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    chunks = {}
    place = 8
    while place < len(content):
        (size,) = struct.unpack_from(">I", content, place)
        kind, inner = content[place + 4 : place + 8], content[place + 8 : place + 8 + size]
        assert struct.unpack_from(">I", content, place + 8 + size) == (zlib.crc32(kind + inner),)
        chunks[kind] = inner
        place += 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (8, 5, 4, 0, 0, 0, 0)
    pixels = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(5, 5)
    levels = np.stack([pixels[:, 1:] >> 4, pixels[:, 1:] & 15], 2).reshape(5, 8)
    assert not pixels[:, 0].any() and np.array_equal(levels, grey)


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        page.write_page(tmp_path / "x.html", {"title": "", "models": []})
    assert error.value.filename == str(tmp_path / "x.html") and os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# what a browser makes of it

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
browser = pytest.mark.skipif(not BROWSER, reason="needs chromium")


FRAME = """<!doctype html><meta charset="utf-8"><body><script>
const all = (inside, query) => [...inside.querySelectorAll(query)]
const page_of = width => new Promise(done => {
  const frame = document.createElement("iframe")
  frame.onload = () => requestAnimationFrame(() => requestAnimationFrame(() => done(frame.contentWindow)))
  document.body.append(Object.assign(frame, { src: PAGE, width, height: 900 }))
})
const test = async () => { SCRIPT }
test().catch(error => String(error.stack)).then(result =>
  fetch(ADDRESS, { method: "POST", mode: "no-cors", body: JSON.stringify(result) }))
</script>"""


class Answer(BaseHTTPRequestHandler):
    """Keeps what is posted."""

    def do_POST(self):
        self.server.answer = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *words):
        pass


def browse(path, script, dark=False):
    """What `script` returns in the page `path`, as JSON knows it. It is the body of an asynchronous function, in which
    `page_of(width)` gives the window of the page, so many pixels wide, and `all` the elements of a query."""
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        server.timeout = 1
        server.answer = None
        address = f"http://127.0.0.1:{server.server_port}/"
        frame = FRAME.replace("SCRIPT", script).replace("PAGE", json.dumps(path.name))
        place = path.with_name("frame.html")
        place.write_text(frame.replace("ADDRESS", json.dumps(address)))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1600,1000", "--hide-scrollbars",
                 "--allow-file-access-from-files",
                 "--autoplay-policy=no-user-gesture-required", "--mute-audio",
                 f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                 f"--user-data-dir={path.parent}/browser", "--remote-debugging-port=0"]  # fmt: skip
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen([BROWSER, *flags, place.as_uri()], **quiet)
        try:
            end = time.monotonic() + 60
            while server.answer is None and time.monotonic() < end:
                server.handle_request()
        finally:
            process.terminate()
            process.wait(20)
    return server.answer


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    names = "one", "<b>two</b>", "a third model with a long name"
    page.write_page(folder / "index.html", example(folder, names))
    return folder / "index.html"


@browser
def test_the_table_sorts_and_marks_the_best(compared):
    found = browse(compared, """
        const { document } = await page_of(1400)
        const names = () => all(document, "#table tbody th").map(x => x.innerText.trim())
        const head = text => all(document, "#table thead button").find(x => x.textContent === text)
        const heads = all(document, "#table thead th").map(x => x.innerText.trim().split("\\n").join(" "))
        const found = { heads, start: names(), sorted: {} }
        for (const text of ["text_margin", "text_margin", "model", "missed", "missed", "learning_rate"]) {
            head(text).click()
            found.sorted[text + " " + head(text).parentNode.ariaSort] = names()
        }
        found.best = all(document, ".best").map(x => x.textContent)
        found.settings = all(document, "#table .settings div").map(x => x.innerText.replace(/\\s+/g, " ").trim())
        found.same = document.querySelector("#same summary").innerText
        found.tinted = all(document, "thead .setting").map(x => x.innerText)
        return found
    """)
    one, two, three = "one", "<b>two</b>", "a third model with a long name"
    settings = ["learning_rate", "backbone.d_model"]
    assert found["heads"] == ["model", "ranked by val_loss", *settings, "missed", "text_margin"]
    assert found["start"] == [one, two, three]
    assert found["sorted"] == {
        "text_margin descending": [one, two, three], "text_margin ascending": [three, two, one],
        "model ascending": [two, three, one], "missed ascending": [one, two, three],
        "missed descending": [one, two, three], "learning_rate ascending": [three, two, one],
    }  # fmt: skip
    assert found["best"] == ["1.200 best", "0.500 best"]  # one number alone is not the best
    assert found["same"] == "3 settings that are the same" and found["tinted"] == settings


@browser
@pytest.mark.parametrize("dark", (False, True))
def test_all_is_on_the_screen(compared, dark):
    """Neither the page nor a label of the plot is wider than its place, and text stands out from the paper."""
    script = """
        const look = async width => {
            const view = await page_of(width)
            const { document } = view
            const plot = document.querySelector(".plot svg").getBoundingClientRect()
            const texts = all(document, ".plot svg text").map(x => x.getBoundingClientRect())
            const style = view.getComputedStyle(document.body)
            const light = colour => colour.match(/\\d+/g).slice(0, 3).reduce((sum, x) => sum + Number(x), 0) / 765
            const outside = x =>
                x.left < plot.left || x.right > plot.right || x.top < plot.top || x.bottom > plot.bottom
            const legend = all(document, ".legend li").map(x => x.getBoundingClientRect())
            return {
                wide: document.documentElement.scrollWidth - view.innerWidth, clipped: texts.filter(outside).length,
                ticks: all(document, ".plot svg text").map(x => x.textContent),
                players: all(document, ".player").length,
                overlaps: legend.filter((x, i) => i && x.top < legend[i - 1].bottom - 1).length,
                paper: light(style.backgroundColor), ink: light(style.color),
                small: all(document, "button").filter(x => x.offsetHeight && x.offsetHeight < 24).map(x => x.innerText),
            }
        }
        return [await look(1400), await look(400)]
    """
    for found in browse(compared, script, dark):
        assert found["wide"] <= 0 and found["clipped"] == 0 and found["overlaps"] == 0 and found["small"] == []
        assert {"2", "4", "6", "0", "1,000", "step"} <= set(found["ticks"]) and found["players"] == 6
        assert (found["ink"] - found["paper"]) * (1 if dark else -1) > 0.6


@browser
def test_models_and_series_of_the_plot_are_chosen(compared):
    found = browse(compared, """
        const { document } = await page_of(1400)
        const lines = () => all(document, ".plot svg .curve[data-line]").map(x => x.dataset.line)
        const players = () => all(document, "#sentences .player").filter(x => !x.hidden).length
        const found = { all: lines(), legend: all(document, ".legend button").map(x => x.innerText) }
        all(document, ".legend button").find(x => x.innerText.includes("one")).click()
        found.without = [lines(), players(), all(document, "tbody input").map(x => x.checked)]
        document.querySelector("#training").click()
        found.held = lines()
        all(document, "tbody input")[0].click()
        found.again = [lines().length, players()]
        document.querySelector("#log").click()
        found.log = all(document, ".plot svg text").map(x => x.textContent)
        return found
    """)
    assert len(found["all"]) == 6 and found["legend"][-1] == "one\ntraining 1.000, held out 1.200"
    assert found["without"] == [found["all"][2:], 4, [False, True, True]]
    assert found["held"] == [line for line in found["all"][2:] if line.endswith("val_loss")]
    assert found["again"] == [3, 6] and {"2", "5"} <= set(found["log"])


@browser
def test_ticks_are_round(compared):
    found = browse(compared, """
        const { ticks } = await page_of(400)
        return [[0, 1, 5], [1.03, 8, 6], [0, 2250, 4], [0.93, 0.97, 5], [-3e-5, 2e-4, 5],
                [1, 900, 6, true], [0.02, 4, 9, true], [5, 6, 4, true]].map(x => ticks(...x))
    """)
    assert found == [
        [0, 0.2, 0.4, 0.6, 0.8, 1], [2, 4, 6, 8], [0, 1000, 2000], [0.93, 0.94, 0.95, 0.96, 0.97],
        [0, 5e-5, 1e-4, 1.5e-4, 2e-4], [1, 10, 100],
        [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2], [5, 5.5, 6],
    ]  # fmt: skip


@browser
def test_a_blind_test_hides_names_and_counts_preferences(compared):
    found = browse(compared, """
        const view = await page_of(1000)
        const { document } = view
        const names = ["one", "<b>two</b>", "a third model with a long name"]
        const button = text => all(document, "#blind button").find(x => x.textContent === text)
        const sources = new Map()
        for (const sentence of view.eval("sentences"))
            for (const name of names) sources.set(await view.playable(sentence.audio[name]), name)
        document.querySelector("#test").click()
        const found = { pairs: [], shown: [], first: 0 }
        while (button("A is better")) {
            await new Promise(done => setTimeout(done))
            const [a, b] = all(document, "#blind audio").map(x => sources.get(x.src))
            const text = document.querySelector("#blind .spoken").textContent
            found.pairs.push([text, a, b])
            found.shown.push(...names.filter(name => document.body.innerText.replace(text, "").includes(name)))
            const best = names.find(name => name === a || name === b)
            button(best !== "one" ? "No difference" : best === a ? "A is better" : "B is better").click()
        }
        found.result = all(document, "#blind tbody tr").map(x => x.innerText.trim().split(/\\s*\\t\\s*/))
        let blob
        view.URL.createObjectURL = x => { blob = x; return "data:," }
        button("Save the preferences").click()
        found.saved = JSON.parse(await blob.text())
        button("Back to the page").click()
        found.back = document.querySelector("#table").offsetHeight > 0
        return found
    """)
    one, two, three = "one", "<b>two</b>", "a third model with a long name"
    assert not found["shown"] and found["back"]
    assert len({(text, *sorted(pair)) for text, *pair in found["pairs"]}) == len(found["pairs"]) == 6
    assert found["result"] == [[one, "4", "4", "0"], [two, "4", "0", "2"], [three, "4", "0", "2"]]
    saved = found["saved"]
    assert saved["models"][two] == {"compared": 4, "preferred": 0, "no_difference": 2} and saved["pairs"] == 6
    assert [[vote["text"], *vote["pair"]] for vote in saved["votes"]] == found["pairs"]
    assert all(vote["preferred"] == (one if one in vote["pair"] else None) for vote in saved["votes"])


@browser
def test_recordings_play(compared):
    """A click on a picture plays from there, one recording plays at a time, and the browser decodes all of them."""
    found = browse(compared, """
        const { document } = await page_of(1000)
        const players = all(document, "#sentences audio")
        const pictures = all(document, ".picture")
        while (!players.every(x => x.src)) await new Promise(done => setTimeout(done, 10))
        const sound = await (await fetch(players[4].src)).arrayBuffer()
        const samples = [...new Int16Array(sound).slice(22)]
        const places = []
        for (const i of [0, 1]) {
            const playing = new Promise(done => players[i].onplaying = done)
            const box = pictures[i].getBoundingClientRect()
            pictures[i].dispatchEvent(new MouseEvent("click", { detail: 1, clientX: box.left + box.width / 2 }))
            await playing
            places.push(players[i].currentTime)
        }
        const paused = players.map(x => x.paused)
        const loaded = await Promise.all(players.map(x => new Promise(done => {
            x.onloadedmetadata = () => done(x.duration)
            x.onerror = () => done(x.error.message)
            x.preload = "metadata"
            x.load()
        })))
        const sizes = await Promise.all(all(document, ".picture img").map(x => x.decode().then(() => x.naturalWidth)))
        return { samples, places, paused, loaded, sizes, widths: pictures.map(x => x.style.width) }
    """)
    expected = soundfile.read(compared.parent / "audio 1/1.wav", dtype="int16")[0]
    assert found["samples"] == expected.tolist()
    assert found["places"] == pytest.approx([0.75, 0.6], abs=0.2)
    assert found["paused"] == [True, False, True, True, True, True]
    assert found["loaded"] == pytest.approx([1.5, 1.2, 0.9] * 2, abs=1e-3) and found["sizes"] == [240] * 6
    assert [float(x.rstrip("%")) for x in found["widths"]] == pytest.approx([100, 80, 60] * 2)

"""HTML pages: models side by side, with their numbers, settings, curves and recordings; the curves of a run.

A page is one file. page.html has its style and its script; the data go into it as JSON, and the script puts every text
on the screen as text, never as HTML. Nothing is loaded from elsewhere, and the page opens from a disk.
"""

import base64
import html
import io
import json
import math
import os
import re
import struct
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.parse import quote

import numpy as np
import soundfile
import torch

from parts.audio import open_audio
from parts.files import NUMBER, whole

TEMPLATE = Path(__file__).with_suffix(".html")
POINTS = 1000  # of a curve: no screen shows more
EMBEDDED = 64 * 2**20  # bytes of recordings; more than these stay beside the page
PICTURE = 64, 240  # of a recording: frequencies, times
HIGHEST = 8000  # Hz, at the top of the picture
LOUDNESS = 70.0  # dB between black and white
FILING = {"out_dir", "overwrite"}  # keys that say where a run is kept, nothing of its model


def write_page(path, page):
    """Write a page about models: one file of HTML.

    page: {"title": text, "rank_by": the name of a column or "",
    "columns": [{"name", "better": "low" | "high" | "", "meaning"}],
    "models": [{"name", "config": {key: value}, "numbers": {column: number or None}, "curves": {name: [[iter, y]]}}],
    "sentences": [{"id", "text", "audio": {model: path of a recording, relative to the page's folder},
    "numbers": {model: {column: number}}}]}; all but the title and the models' names may be missing.

    Recordings are part of the page while all of them are below 64 MB; else the page links to them. Raises OSError,
    which names the file, and ValueError for a file that is no recording.
    """
    folder = Path(path).parent
    files = {name for sentence in page.get("sentences", []) for name in sentence.get("audio", {}).values()}
    inside = sum(os.path.getsize(folder / name) for name in files) < EMBEDDED
    models = [
        {**model, "config": settings(model.get("config", {})),
         "curves": {name: thinned(points) for name, points in model.get("curves", {}).items()}}
        for model in page["models"]
    ]  # fmt: skip
    sentences = [
        {**sentence, "audio": {model: recording(folder, name, inside) for model, name in sentence["audio"].items()}}
        for sentence in page.get("sentences", []) if sentence.get("audio")
    ]  # fmt: skip
    content = json.dumps(plain({**page, "models": models, "sentences": sentences}), separators=(",", ":"))
    parts = {"title": html.escape(page["title"]), "page": content.replace("<", "\\u003c")}  # "</script>" ends a script
    text = re.sub("__(title|page)__", lambda found: parts[found[1]], TEMPLATE.read_text(encoding="utf-8"))
    with whole(path, "w") as file:
        file.write(text)


def draw(lines, path):
    """Write the curves of lines of metrics.jsonl as a page. Raises OSError, which names the file."""
    run = os.path.basename(os.path.dirname(os.path.abspath(path)))
    write_page(path, {"title": run, "models": [{"name": run, "curves": curves(lines)}]})


# ---------------------------------------------------------------------------------------------------------------------
# numbers and settings


def curves(lines):
    """The curves in lines of metrics.jsonl, {name: [[iter, y]]}, without those of single codebooks and of the machine's
    speed."""
    found = {}
    for line in lines:
        for name, y in line.items():
            if type(y) in NUMBER and name != "iter":
                found.setdefault(name, []).append([line["iter"], y])
    return found


def thinned(points):
    """At most POINTS + 1 points of a curve [[iter, y]], evenly, and the last; none without a finite y."""
    points = [point for point in points if point[1] is not None and math.isfinite(point[1])]
    kept = points[:: max(1, -(-len(points) // POINTS))]
    return kept if kept[-1:] == points[-1:] else kept + points[-1:]


def settings(config):
    """The keys of a run as one level, {"backbone.n_layer": 4}, without the folders of this machine."""
    flat = {}
    for key, value in config.items():
        flat |= {f"{key}.{inner}": x for inner, x in value.items()} if isinstance(value, dict) else {key: value}
    return {key: without_folder(value) for key, value in flat.items() if key not in FILING}


def without_folder(value):
    """A value of a key with absolute paths, alone, in a list or with commas between them, cut to their last part."""
    if isinstance(value, list | tuple):
        return [without_folder(x) for x in value]
    if not isinstance(value, str):
        return value
    kinds = PurePosixPath, PureWindowsPath
    names = [next((kind(x).name or x for kind in kinds if kind(x).is_absolute()), x) for x in value.split(",")]
    return ",".join(names)


def plain(x):
    """A nested value as JSON knows it: NaN and infinity are None, NumPy's numbers are Python's."""
    if isinstance(x, dict):
        return {str(key): plain(y) for key, y in x.items()}
    if isinstance(x, list | tuple):
        return [plain(y) for y in x]
    if isinstance(x, np.generic):
        return plain(x.item())
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    return x if x is None or isinstance(x, str | int) else str(x)


# ---------------------------------------------------------------------------------------------------------------------
# recordings


def recording(folder, name, inside):
    """What a page needs of the recording `name` in its folder: {"src", "seconds", "picture"}, addresses of the sound
    and of a picture. inside: the sound is part of the page, as FLAC of this "rate". Raises FileNotFoundError or
    ValueError."""
    with open_audio(folder / name) as file:
        rate = file.samplerate
        wav = file.read(dtype="float32", always_2d=True).mean(1)
    about = {"src": quote(Path(name).as_posix()), "seconds": len(wav) / rate}
    if not len(wav):
        return about
    if inside:
        sound = io.BytesIO()
        soundfile.write(sound, wav, rate, format="FLAC", subtype="PCM_16")
        about |= {"src": address("audio/flac", sound.getvalue()), "rate": rate}
    return {**about, "picture": address("image/png", png(spectrogram(wav, rate)))}


def address(kind, content):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def spectrogram(wav, rate):
    """Grey levels (rows, columns) of wav (N,), 0, black, to 15, white: power over time, to the right, and frequency,
    upwards."""
    rows, columns = PICTURE
    window = 2 ** round(math.log2(max(2 * rows, rate * 0.032)))
    step = max(1, -(-len(wav) // columns))
    power = torch.stft(torch.from_numpy(wav), window, step, window=torch.hann_window(window), pad_mode="constant",
                       return_complex=True).abs().square()  # fmt: skip
    power = power[: max(rows, round(window * min(HIGHEST, rate / 2) / rate))]
    power = torch.nn.functional.adaptive_avg_pool2d(power[None], PICTURE)[0].flip(0)
    level = 10 * (power / power.max().clamp(min=1e-9) + 1e-12).log10()  # dB below the loudest
    return (-level / LOUDNESS * 15).clamp(0, 15).round().byte().numpy()


def png(grey):
    """The file of a picture: grey levels (rows, columns), 0 to 15, an even number of columns."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows, columns = grey.shape
    pixels = np.pad(grey[:, ::2] << 4 | grey[:, 1::2], ((0, 0), (1, 0)))  # each row begins with its filter, 0: none
    header = struct.pack(">IIBBBBB", columns, rows, 4, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(pixels.tobytes(), 9)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)

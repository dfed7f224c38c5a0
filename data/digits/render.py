"""Render the recordings that this folder holds: groups of spoken digits, by the voices of flite.

    python data/digits/render.py

Run once, by whoever changes the recordings; nobody else needs it (prepare.py reads what it wrote). Needs `flite` 2.2
(`apt install flite`) beside numpy, soundfile and tqdm. The samples are the same every time; the Ogg files differ in
their serial numbers.

- A group of one to three digits is rendered as a whole, so that the digits run into one another as in speech. Cutting
  single digits out of longer recordings and glueing them would eat the fricatives: two thirds of "six" is an s.
- Every recording keeps MARGIN of its voice's background before and after the speech; prepare.py makes pauses of it.
- One Ogg Opus file per voice, and recordings.csv, which says where in the file each recording lies, in samples. Opus
  keeps the number of samples and their places exactly.
"""

import csv
import os
import random
import subprocess
import tempfile

import numpy as np
import soundfile
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SAMPLE_RATE = 16000
MARGIN = 1280  # samples of background kept on each side of the speech, 80 ms
THRESHOLD = 10 ** (-38 / 20)  # speech begins and ends where 10 ms reach this share of the recording's peak
LEVEL = 0.07  # root mean square that every voice is brought to
COMPRESSION = 0.97  # of Opus, as libsndfile counts: about 14 kbit/s

# Of the 10 + 100 + 1000 groups and the strings of four to six digits: how many each voice reads, and at which paces
# (flite's duration_stretch, less is faster). Pairs are few and much used, so slt reads each of them at every pace. The
# single digits of kal16 are drawn out so much that a recogniser hears "three" as "three eight": there are none.
VOICES = {
    "slt": {"paces": [0.85, 0.9, 0.95], "singles_at": 3, "pairs_at": 3, "triples": 1000, "strings": 200},
    "rms": {"paces": [0.8, 0.85, 0.9], "singles_at": 3, "pairs_at": 1, "triples": 150, "strings": 20},
    "awb": {"paces": [0.85, 0.9, 0.95], "singles_at": 3, "pairs_at": 1, "triples": 150, "strings": 20},
    "kal16": {"paces": [0.85, 0.9, 0.95], "singles_at": 0, "pairs_at": 1, "triples": 150, "strings": 20},
}


def flite(voice, digits, pace, path):
    """One recording by flite, as float64 samples in [-1, 1], as flite gives it."""
    text = " ".join(WORDS[int(d)] for d in digits)
    command = ["flite", "-voice", voice, "--setf", f"duration_stretch={pace}", "-t", text, path]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wav, rate = soundfile.read(path)
    assert rate == SAMPLE_RATE, f"flite's voice {voice} speaks at {rate} Hz"
    return wav


def trim(wav):
    """Cut to the speech and MARGIN samples of background on each side."""
    peaks = np.abs(wav[: len(wav) // 160 * 160]).reshape(-1, 160).max(axis=1)
    loud = np.flatnonzero(peaks > THRESHOLD * peaks.max())
    first, last = loud[0] * 160, (loud[-1] + 1) * 160
    missing = max(0, MARGIN - first), max(0, last + MARGIN - len(wav))
    return np.pad(wav, missing, mode="reflect")[first + missing[0] - MARGIN : last + missing[0] + MARGIN]


def plan(voice, rng):
    """(digits, pace) of every recording of a voice, in the order of the file."""
    want = VOICES[voice]
    pace = lambda: rng.choice(want["paces"])  # noqa: E731
    singles = [(f"{i}", p) for i in range(10) for p in want["paces"][: want["singles_at"]]]
    pairs = [(f"{i:02d}", p) for i in range(100) for p in rng.sample(want["paces"], want["pairs_at"])]
    triples = [(f"{i:03d}", pace()) for i in sorted(rng.sample(range(1000), want["triples"]))]
    lengths = [4 + i % 3 for i in range(want["strings"])]
    strings = [("".join(rng.choices("0123456789", k=n)), pace()) for n in lengths]
    return singles + pairs + triples + strings


def main():
    rows = []
    for voice in VOICES:
        todo = plan(voice, random.Random(voice))
        with tempfile.TemporaryDirectory() as scratch:
            path = os.path.join(scratch, "flite.wav")
            wavs = [trim(flite(voice, digits, pace, path)) for digits, pace in tqdm(todo, voice)]
        whole = np.concatenate(wavs)
        whole *= LEVEL / np.sqrt(np.mean(whole**2))
        ogg = os.path.join(HERE, f"{voice}.ogg")
        soundfile.write(ogg, whole, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=COMPRESSION)
        start = 0
        for (digits, pace), wav in zip(todo, wavs, strict=True):
            rows.append([voice, digits, pace, start, len(wav)])
            start += len(wav)
        print(f"{voice}: {len(wavs)} recordings, {start / SAMPLE_RATE:.0f} s, {os.path.getsize(ogg):,} bytes")
    with open(os.path.join(HERE, "recordings.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["voice", "digits", "pace", "start", "length"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()

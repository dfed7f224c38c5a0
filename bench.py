"""Bench: every number that the README quotes, from one command.

    python bench.py data     word error rate of a raw data set: are the recordings themselves understood?
    python bench.py sample   word error rate, stops and speed of a model that speaks held-out strings of digits

- `recognise` hears strings of digits: pocketsphinx, whose acoustic model comes inside its wheel, with a grammar of the
  ten digits. It is a weak recogniser, so that what it understands is spoken clearly.
- `word_errors` counts substitutions, insertions and deletions (Levenshtein), the numerator of a word error rate.
"""

import csv
import os
import time
from functools import lru_cache

import numpy as np
import torch
from tqdm import tqdm

import codec as codecs
import configurator
from sample import Voice

name = "data"  # what to measure: data, sample
raw = "data/digits"  # raw data set of spoken digits: a folder with metadata.csv (audio, text, speaker) and heldout.txt
limit = 0  # most utterances to listen to; 0: all of a data set, 60 of a model
show_errors = False  # print every utterance that was misheard
ckpt = "out/digits/best.pt"  # sample: the model that speaks
speaker = "slt"  # sample: whose held-out strings it speaks
temperature: float | None = None  # sample: of the draw; None: as the checkpoint's recipe says
seed = 1337  # sample: of the draw

GRAMMAR = """#JSGF V1.0;
grammar digits;
public <string> = ( zero | one | two | three | four | five | six | seven | eight | nine )+ ;
"""
RATE = 16000  # of pocketsphinx's acoustic model


# -----------------------------------------------------------------------------
# what the other numbers stand on


@lru_cache(maxsize=1)
def decoder():
    """The recogniser. The chance of a silence between words, and that of a word, are set for speech in groups with
    pauses, chosen on training recordings: with pocketsphinx's own, pauses are heard as "eight"."""
    try:
        import pocketsphinx
    except ImportError as error:
        raise ValueError("the recogniser needs pocketsphinx: pip install pocketsphinx") from error
    made = pocketsphinx.Decoder(samprate=RATE, lm=None, loglevel="FATAL", silprob=0.6, wip=0.1)
    made.add_jsgf_string("digits", GRAMMAR)
    made.activate_search("digits")
    return made


def recognise(wav, sample_rate):
    """The digits heard in wav (N,), float in [-1, 1]: a string such as "three one four", empty where none is heard.
    The same wav gives the same answer, whatever was heard before. Raises ValueError if wav has another shape."""
    wav = torch.as_tensor(wav, dtype=torch.float32).detach().cpu()
    if wav.ndim != 1:
        raise ValueError(f"recognise takes one waveform of shape (N,), not {tuple(wav.shape)}")
    wav = codecs.resample(wav, sample_rate, RATE).double().numpy()
    level = np.sqrt(np.mean(wav**2)) if len(wav) else 0.0
    if not np.isfinite(level) or level < 1e-5:
        return ""
    # The acoustic model knows speech in quiet rooms: of one level, with silence around it that is not digital.
    padded = np.pad(wav * 0.07 / level, RATE // 5)
    padded += 5e-4 * np.random.default_rng(0).standard_normal(len(padded))
    listener = decoder()
    listener.start_utt()
    listener.process_raw((padded.clip(-1, 1) * 32767).astype("<i2").tobytes(), full_utt=True)
    listener.end_utt()
    best = listener.hyp()
    return best.hypstr if best else ""


def word_errors(ref, hyp):
    """Fewest words to substitute, insert and delete that turn `hyp` into `ref` (both strings of words)."""
    ref, hyp = ref.split(), hyp.split()
    row = list(range(len(hyp) + 1))  # errors between the words of ref so far and each beginning of hyp
    for i, word in enumerate(ref, 1):
        diagonal, row[0] = row[0], i
        for j, heard in enumerate(hyp, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != heard))
    return row[-1]


def table(rows, head):
    """rows and head as aligned columns of text."""
    rows = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def error_rates(heard):
    """heard: (group, reference, hypothesis) of each utterance -> {group: (utterances, words, errors)}, and "all"."""
    counts = {}
    for group, ref, hyp in heard:
        for key in (group, "all"):
            old = counts.get(key, (0, 0, 0))
            counts[key] = old[0] + 1, old[1] + len(ref.split()), old[2] + word_errors(ref, hyp)
    return {key: counts[key] for key in sorted(counts, key=lambda key: (key == "all", key))}


def report(heard):
    """The table of `error_rates`."""
    rates = error_rates(heard).items()
    rows = [(key, n, words, errors, f"{errors / max(words, 1):.1%}") for key, (n, words, errors) in rates]
    return table(rows, ["", "utterances", "words", "errors", "word error rate"])


def read_raw(folder):
    """The held-out utterances of a raw data set: [(path, text, speaker), ...]; all of them where none is held out."""
    path = os.path.join(folder, "metadata.csv")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; python data/digits/prepare.py makes the built-in data set")
    with open(path, newline="", encoding="utf-8") as file:
        rows = [(row["audio"], row["text"], row["speaker"]) for row in csv.DictReader(file)]
    listed = os.path.join(folder, "heldout.txt")
    if os.path.exists(listed):
        with open(listed, encoding="utf-8") as file:
            names = set(file.read().split())
        rows = [row for row in rows if os.path.splitext(os.path.basename(row[0]))[0] in names]
    return [(os.path.join(folder, audio), text, speaker) for audio, text, speaker in rows]


# -----------------------------------------------------------------------------
# the numbers


def bench_data(cfg):
    """Word error rate of the held-out recordings, by voice."""
    rows = read_raw(cfg.raw)
    rows = rows[: cfg.limit or len(rows)]
    heard = []
    for path, text, speaker in tqdm(rows, "listening", unit="wav"):
        hypothesis = recognise(codecs.read_audio(path, RATE), RATE)
        heard.append((speaker, text, hypothesis))
        if cfg.show_errors and hypothesis != text:
            tqdm.write(f"{os.path.basename(path)}: {text!r} heard as {hypothesis!r}")
    print(report(heard))


def bench_sample(cfg):
    """Held-out strings, spoken: word error rate, utterances that ended by themselves, real-time factor."""
    voice = Voice.from_checkpoint(cfg.ckpt)
    how = {} if cfg.temperature is None else {"temperature": cfg.temperature}
    texts = [text for _, text, speaker in read_raw(cfg.raw) if speaker == cfg.speaker]
    heard, stopped, seconds, took = [], 0, 0.0, 0.0
    for text in tqdm(texts[: cfg.limit or 60], "speaking", unit="wav"):
        start = time.perf_counter()
        wav = voice.say(text, speaker=cfg.speaker, seed=cfg.seed, **how)
        took += time.perf_counter() - start
        seconds += len(wav) / voice.codec.sample_rate
        stopped += voice.stopped
        heard.append((cfg.speaker, text, recognise(wav, voice.codec.sample_rate)))
        if cfg.show_errors and heard[-1][1] != heard[-1][2]:
            tqdm.write(f"{text!r} heard as {heard[-1][2]!r}")
    print(report(heard))
    print(f"{stopped} of {len(heard)} ended by themselves; real-time factor {took / max(seconds, 1e-9):.2f}")


BENCHES = {"data": bench_data, "sample": bench_sample}


def main(cfg):
    if cfg.name not in BENCHES:
        raise ValueError(f"bench.py measures {', '.join(BENCHES)}, not {cfg.name!r}")
    BENCHES[cfg.name](cfg)


if __name__ == "__main__":
    configurator.run(main, __file__, positional=("name",))

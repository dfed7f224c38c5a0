"""Bench: every number that the README quotes, from one command.

    python bench.py data     word error rate of a raw data set: are the recordings themselves understood?
    python bench.py codec    what mel keeps of digits (word error rate) and of real speech (STOI); how fast it is
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

name = "data"  # what to measure: data, codec, sample
raw = "data/digits"  # raw data set of spoken digits: a folder with metadata.csv (audio, text, speaker) and heldout.txt
limit = 0  # most utterances to listen to; 0: all of a data set, 60 of a model
show_errors = False  # print every utterance that was misheard
speech = ""  # codec: folder of recordings in LJSpeech's layout, 16 to fit on, then 8; empty: none
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


def read_raw(folder, every=False):
    """The held-out utterances of a raw data set: [(path, text, speaker), ...]; all of them where none is held out, or
    `every` one is asked for."""
    path = os.path.join(folder, "metadata.csv")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; python data/digits/prepare.py makes the built-in data set")
    with open(path, newline="", encoding="utf-8") as file:
        rows = [(row["audio"], row["text"], row["speaker"]) for row in csv.DictReader(file)]
    listed = os.path.join(folder, "heldout.txt")
    if os.path.exists(listed) and not every:
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


def round_trip(codec, wavs):
    """wavs through the codec and back, and how many times faster than real time it encoded and decoded them."""
    start = time.perf_counter()
    codes = [codec.encode(wav[None]) for wav in wavs]
    middle = time.perf_counter()
    out = [codec.decode(c)[0, : len(wav)] for c, wav in zip(codes, wavs, strict=True)]
    seconds, end = sum(map(len, wavs)) / codec.sample_rate, time.perf_counter()
    return out, f"{seconds / (middle - start):.0f} x", f"{seconds / (end - middle):.0f} x"


def bench_codec(cfg):
    """mel: word error rate of held-out digits through it, STOI of real speech it was not fitted on."""
    rows = read_raw(cfg.raw)
    held_out = {path for path, _, _ in rows}
    rows = rows[: cfg.limit or len(rows)]
    wavs = [codecs.read_audio(path, RATE) for path, _, _ in rows]
    training = [path for path, _, _ in read_raw(cfg.raw, every=True) if path not in held_out]
    training = [codecs.read_audio(training[i], RATE) for i in np.random.default_rng(0).permutation(len(training))[:800]]

    def error_rate(wavs):
        heard = [("", text, recognise(wav, RATE)) for (_, text, _), wav in zip(rows, wavs, strict=True)]
        _, words, errors = error_rates(heard)["all"]
        return f"{errors / max(words, 1):.1%}"

    print(f"{len(rows)} held-out recordings of digits; fitted on {sum(map(len, training)) / RATE:.0f} s of others")
    print(f"word error rate of the recordings: {error_rate(wavs)}")
    table_rows = []
    for frame_rate in tqdm((10, 12.5, 16, 20), "frame rates", leave=False):
        start = time.perf_counter()
        codec = codecs.load_codec("mel", sample_rate=RATE, frame_rate=frame_rate).fit(training)
        fitted = time.perf_counter() - start
        out, *speeds = round_trip(codec, wavs)
        table_rows.append((frame_rate, bit_rate(codec), error_rate(out), f"{fitted:.0f} s", *speeds))
    print(table(table_rows, ["frames/s", "bit/s", "word error rate", "fit", "encode", "decode"]))

    metadata = os.path.join(cfg.speech, "metadata.csv")
    if not cfg.speech or not os.path.exists(metadata):
        print("no real speech: --speech=folder names recordings in LJSpeech's layout")
        return
    try:
        from pystoi import stoi
    except ImportError as error:
        raise ValueError("STOI needs pystoi: pip install pystoi") from error

    with open(metadata, encoding="utf-8") as file:
        names = [line.split("|")[0] for line in file][:24]
    files = {os.path.splitext(name)[0]: name for name in os.listdir(os.path.join(cfg.speech, "wavs"))}
    wavs = [codecs.read_audio(os.path.join(cfg.speech, "wavs", files[name]), 24000) for name in names]
    table_rows = []
    for frame_rate, size in ((12.5, 256), (12.5, 1024), (20, 256), (25, 256), (50, 256)):
        codec = codecs.load_codec("mel", sample_rate=24000, frame_rate=frame_rate, codebook_size=size).fit(wavs[:16])
        out, *speeds = round_trip(codec, wavs[16:])
        scores = [stoi(wav.numpy(), o.numpy(), 24000) for wav, o in zip(wavs[16:], out, strict=True)]
        table_rows.append((frame_rate, size, bit_rate(codec), f"{np.mean(scores):.3f}", f"{min(scores):.3f}", *speeds))
    seconds = sum(map(len, wavs[:16])) / 24000
    print(f"\nreal speech at 24 kHz: fitted on {seconds:.0f} s of 16 recordings, measured on 8 others")
    print(table(table_rows, ["frames/s", "entries", "bit/s", "STOI", "least", "encode", "decode"]))


def bit_rate(codec):
    return round(codec.n_codebooks * np.log2(codec.codebook_size) * codec.frame_rate)


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


BENCHES = {"data": bench_data, "codec": bench_codec, "sample": bench_sample}


def main(cfg):
    if cfg.name not in BENCHES:
        raise ValueError(f"bench.py measures {', '.join(BENCHES)}, not {cfg.name!r}")
    BENCHES[cfg.name](cfg)


if __name__ == "__main__":
    configurator.run(main, __file__, positional=("name",))

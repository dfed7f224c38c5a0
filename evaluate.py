"""Numbers that judge a model: of held-out recordings and of speech. train.py calls it.

Letters in shapes: K codebooks, T frames, N samples.
"""

import contextlib
import math
import os
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import open_tokens, part_names
from parts import configurator, ears, judge
from parts.audio import clipped_share, longest_silence, write_audio
from parts.metrics import Window, means
from parts.text import wording
from plan import make_batches
from sample import HOW


class Number(NamedTuple):
    """A number of an evaluation: whether a "low" or "high" one is better, "" for neither; and what it means."""

    better: str
    meaning: str


NUMBERS = {
    "val_loss": Number("low", "cross-entropy of held-out speech, nats a code"),
    "text_margin": Number("high", "how much better speech fits its text than other texts, nats a frame"),
    "voice_margin": Number("high", "how much better speech fits its voice than other voices, nats a frame"),
    "wer": Number("low", "word errors of a recogniser, as a share of the words"),
    "cer": Number("low", "likewise of the characters"),
    "similarity": Number("high", "cosine of the voice's embedding and that of its recordings"),
    "mos": Number("high", "predicted opinion of listeners, 1 to 5"),
    "rate": Number("", "speech rate beside that of the training data"),
    "silence": Number("low", "longest silence, in seconds"),
    "clipping": Number("low", "share of samples at full scale"),
    "repeats": Number("low", "share of frames equal to the one before"),
    "missed": Number("low", "utterances in a hundred that do not end by themselves"),
    "retries": Number("low", "more tries in a hundred utterances"),
    "rtf": Number("low", "seconds of work for a second of speech"),
}  # fmt: skip
OF_SPEECH = [name for name in NUMBERS if name not in ("val_loss", "wer", "cer", "similarity", "mos")]  # without ears
RIVALS = 4  # other texts, or voices, with which the own one is compared
SETTINGS = ("speaker", "language", "reference", "reference_text", "cap_seconds")  # of a line, for Voice.plan


def better(name):
    """Whether a number is "low" or "high" in a good model, "" for neither."""
    if name in NUMBERS:
        return NUMBERS[name].better
    return "high" if name.endswith("accuracy") else "low"


# ---------------------------------------------------------------------------------------------------------------------
# held-out recordings


@torch.no_grad()
def evaluate(model, val, autocast, batches=0, rank=0, world=1):
    """Means of the model's stats over the val split {name: number or list}, or over so many `batches`, spread evenly
    over its lengths (0: all). Several token folders have a loss each too, "loss_NAME". Ranks share the batches, and all
    get the means."""
    plan, _ = val.plan(0)
    ends = np.cumsum([len(part) for part in val.files.parts])
    losses = [f"loss_{name}" for name in part_names(val.files)] if len(ends) > 1 else []
    plan = plan[:: math.ceil(len(plan) / batches)] if batches else plan
    training = model.training
    model.eval()
    window = Window(next(model.parameters()).device)
    for i in range(rank, max(len(plan), world), world):
        batch = plan[i % len(plan)]
        with autocast:
            _, stats = model(*val.read(batch))
        own = np.searchsorted(ends, batch[0], side="right")
        value, count = stats["loss_by_codebook"]
        stats |= {name: (value.sum() * (n == own), count.sum() * (n == own)) for n, name in enumerate(losses)}
        share = i < len(plan)  # a rank without a batch joins with weight 0: all ranks must add up the same names
        window.add({name: (value * share, count * share) for name, (value, count) in stats.items()})
    window.close_step()
    model.train(training)
    return means(window.collect(world))


def held_out_files(voice, data_dir=""):
    """The val split of a voice's own data_dir, or of the one that is given. Raises ValueError or OSError where it
    cannot be read or has no utterance, and where its codes or text ids are not those of the model."""
    data_dir = data_dir or voice.trained_with.get("data_dir", "")
    if not data_dir:
        raise ValueError("published weights have no held-out data of their own: name them by --data_dir")
    files = open_tokens(data_dir, "val")
    if not len(files):
        raise ValueError(f"{files.folder}: the val split is empty")
    own, meta = voice.meta, files.meta
    if meta["codec"]["fingerprint"] != own["codec"]["fingerprint"]:
        raise ValueError(f"{files.folder} has the codes of another codec than the model's")
    if meta["tokenizer"]["sha256"] != own["tokenizer"]["sha256"]:
        raise ValueError(f"{files.folder} has the text ids of another tokenizer than the model's")
    return files


def held_out_loss(voice, files):
    """The loss of each codebook {"val_loss_by_codebook": [K numbers]} over these files, and its mean, "val_loss"."""
    usual = configurator.read_defaults(configurator.ROOT / "train.py")
    cfg = SimpleNamespace(**{key: of.default for key, of in usual.items()} | voice.trained_with)
    cfg.reference_seconds = voice.reference_seconds
    _, val = make_batches(cfg, voice.model, files, files)
    losses = evaluate(voice.model, val, contextlib.nullcontext())["loss_by_codebook"]
    known = [loss for loss in losses if loss is not None]
    return {"val_loss": sum(known) / len(known) if known else None, "val_loss_by_codebook": losses}


def held_out_line(voice, files, i):
    """The i-th text of token files as Voice.speak takes it, and its words. The text is ids where the tokenizer would
    not make the same ids of the words."""
    meta = files.meta
    line = {"speaker": meta["speakers"][files.speaker(i)], "language": meta["languages"][files.language(i)]}
    before, after = wording(meta["text_format"], line["speaker"], "\0", line["language"]).split("\0")
    ids = files.text(i)
    words = voice.tokenizer.decode(ids).removeprefix(before).removesuffix(after)
    try:
        same = np.array_equal(voice.text_ids(words, **line), ids)
    except ValueError:
        same = False
    return {**line, "text": words if same else ids}, words


def held_out_prompts(voice, files, n):
    """At most n texts of token files, evenly spread, as prompts of `measure`."""
    n = min(n, len(files))
    lines = (held_out_line(voice, files, i * len(files) // n) for i in range(n))
    return [{**line, "words": words} for line, words in lines]


# ---------------------------------------------------------------------------------------------------------------------
# speech


class Ears(NamedTuple):
    """Other models that listen, see parts/ears.py; None: not asked. voices {speaker: embedding}: how they should sound,
    "" for those that are not in it."""

    recogniser: object = None
    encoder: object = None
    naturalness: object = None
    voices: dict = {}


def as_line(voice, prompt, language=""):
    """A prompt as Voice.speak takes it, a dict, and its words. A text may begin with a voice as the model reads it."""
    if isinstance(prompt, dict):
        line = {key: value for key, value in prompt.items() if key != "words"}
        return line, prompt.get("words", prompt["text"])
    language = language or voice.meta["languages"][0]
    for speaker in voice.meta["speakers"]:
        begin = wording(voice.meta["text_format"], speaker, "\0", language or "?").split("\0")[0].strip()
        text = prompt.removeprefix(begin).strip()
        if speaker in begin and prompt.startswith(begin) and text:
            return {"text": text, "speaker": speaker}, text
    return {"text": prompt}, prompt


def measure(voice, prompts, cfg, listening=None, judging=None, folder=None, **given):
    """Let a voice speak prompts. Returns {name: number}, means over all of them, None where one cannot be told; and a
    row for each: {"id", "text", "numbers", "file": its recording in `folder`, if there is one, "heard": what the
    recogniser heard}.

    prompts: texts, or dicts of a "text" and settings of Voice.speak beside, with "words" where the text is ids. cfg:
    has the keys by which sample.py speaks; those that are missing have their usual value. listening: Ears. judging: the
    Voice that judges; None: the same. given: further settings of Voice.speak, such as a reference. Raises ValueError as
    Voice.speak does.
    """
    listening = listening or Ears()
    pairs = [as_line(voice, prompt, vars(cfg).get("language", "")) for prompt in prompts]
    how = {key: vars(cfg)[key] for key in (*HOW, "batch", "tries") if key in vars(cfg)} | given
    lines = [{key: how[key] for key in SETTINGS if key in how} | line for line, _ in pairs]
    start = time.perf_counter()
    said = {}
    with tqdm(desc="speaking", total=len(lines), unit=" prompts", leave=False, delay=2) as bar:
        for i, spoken in voice.speak([line for line, _ in pairs], **how):
            said[i] = spoken
            bar.update()
    seconds = sum(len(spoken.wav) for spoken in said.values()) / voice.sample_rate
    totals = {"rtf": (time.perf_counter() - start, seconds)}
    rows = []
    for i, (line, (_, words)) in enumerate(zip(lines, pairs, strict=True)):
        row = {"id": i, "text": words}
        sums = {**sound(voice, said[i]), **margins(judging or voice, voice, said[i], line, lines)}
        if listening.recogniser:
            row["heard"] = listening.recogniser(said[i].wav, voice.sample_rate)
            sums |= errors(words, row["heard"])
        speaker = line.get("speaker") or voice.known_speaker("")
        sums |= impressions(listening, said[i].wav, voice.sample_rate, speaker)
        if folder:
            row["file"] = f"{i:03d}.wav"
            write_audio(os.path.join(folder, row["file"]), said[i].wav, voice.sample_rate)
        rows.append({**row, "numbers": quotients(sums)})
        for name, (value, count) in sums.items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = before[0] + value, before[1] + count
    return quotients(totals), rows


def quotients(sums):
    """{name: (sum, count)} -> {name: mean}, in the order of NUMBERS; None where nothing was counted."""
    return {name: float(f"{sums[name][0] / sums[name][1]:.6g}") if sums[name][1] else None
            for name in NUMBERS if name in sums}  # fmt: skip


def sound(voice, said):
    """What can be told of an utterance, a Said, without other models: {name: (sum, count)}."""
    codes = [spoken.codes for spoken in said.spoken]
    same = sum(int((x[1:] == x[:-1]).all(1).sum()) for x in codes)
    usual = voice.frames_per_id * sum(len(spoken.utterance.text) for spoken in said.spoken)
    n = len(said.wav)
    return {
        "rate": (usual, sum(map(len, codes))), "silence": (longest_silence(said.wav, voice.sample_rate), 1),
        "clipping": (n * clipped_share(said.wav), n), "repeats": (same, sum(max(0, len(x) - 1) for x in codes)),
        "missed": (100 * (not said.ended), 1), "retries": (100 * (len(said.tries) - len(said.pieces)), 1),
    }  # fmt: skip


def margins(judging, voice, said, line, lines):
    """The margins of an utterance, a Said, by a Voice that judges: {name: (sum, frames)}, see parts/judge.py. The
    rivals of a text are those of `lines` that are about as long, those of a voice the next speakers that the model
    knows."""
    sums = {"text_margin": (0.0, 0), "voice_margin": (0.0, 0)}
    speakers = judging.meta["speakers"]
    own = speakers.index(judging.known_speaker(line.get("speaker", "")))
    heard = {} if judging.model.reference else {"reference": line.get("reference")}
    others = [{"speaker": name, "reference": None, **heard} for name in (speakers[own + 1 :] + speakers[:own])[:RIVALS]]
    for piece, spoken in zip(said.pieces, said.spoken, strict=True):
        codes = spoken.codes
        if not len(codes) or codes.shape[1] != judging.model.config.n_codebooks:
            continue
        settings = {**line, "text": piece}
        true = spoken.utterance if judging is voice else judging.plan(**settings)[0]
        texts = {str(other["text"]): other["text"] for other in lines if str(other["text"]) != str(line["text"])}
        texts = sorted(texts.values(), key=lambda text: abs(len(text) - len(piece)))[:RIVALS]
        loss = judge.frame_losses(judging.model, codes, true.text, **true.side)
        for name, changes in (("text_margin", [{"text": text} for text in texts]), ("voice_margin", others)):
            rivals = [rival(judging, true, len(codes), {**settings, **change}) for change in changes]
            rivals = [judge.frame_losses(judging.model, codes, x.text, **x.side) for x in rivals if x]
            if rivals:
                value, count = sums[name]
                sums[name] = value + float(judge.margin(loss, rivals).sum()), count + len(codes)
    return sums


def rival(judging, true, frames, settings):
    """The Utterance of a line with another text or voice than the true one's; None where it is the same to the model,
    or has no room for so many frames."""
    try:
        other, _ = judging.plan(**settings)
        room, _ = judging.model.room(other.text, other.side.get("prompt"), frames)
    except ValueError:
        return None
    if judging.continues:  # the piece of the text before, in the same voice
        other = replace(other, side=true.side)
    same = np.array_equal(other.text, true.text)
    if same and ("voice" not in true.side or torch.equal(other.side["voice"], true.side["voice"])):
        return None
    return other if room == frames else None


def errors(words, heard):
    """The errors of a recogniser: {name: (errors, number)}."""
    words, heard = map(ears.plain_words, (words, heard))
    return {"wer": (ears.word_errors(words, heard), len(words.split())), "cer": (ears.edits(words, heard), len(words))}


def impressions(listening, wav, rate, speaker):
    """What listeners think of a wav (N,): {name: (number, 1)}."""
    found = {}
    if not len(wav):
        return found
    target = listening.voices.get(speaker, listening.voices.get(""))
    if listening.encoder and target is not None:
        found["similarity"] = float(listening.encoder(wav, rate) @ target), 1
    if listening.naturalness:
        found["mos"] = listening.naturalness(wav, rate), 1
    return found

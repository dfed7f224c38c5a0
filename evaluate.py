"""Numbers that rank models, and a page to compare them by ear. train.py and sweep.py call its functions.

    python evaluate.py --ckpt="out/*" --prompts=config/eval_prompts.txt --out_dir=compared    compared/index.html
    python evaluate.py --ckpt="out/x/ckpt_*.pt"                the prompts are held-out texts of the data
    python evaluate.py --ckpt=out/x/best.pt --asr=tiny.en      also word errors, by faster-whisper
    python evaluate.py --ckpt=out/x/best.pt --asr=digits --threshold=wer=0.05,missed=1
                                                               exit code 1 where a number is worse than that

- All models speak the same prompts, many at a time. A prompt may begin with a voice, as the model's own text_format
  writes it: "andrew: Hello". A model that does not know the voice reads it aloud.
- Without other packages a model is the judge, see parts/judge.py: of several models of one codec that with the lowest
  held-out loss. Losses and margins compare models of one codec.
- out_dir has the recordings, metadata.jsonl (a data set in the layout "audiofolder"), results.csv and index.html.
- Whatever can be refused is refused before the first prompt is spoken.

Letters in shapes: K codebooks, T frames, N samples.
"""

import contextlib
import csv
import difflib
import json
import math
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import open_tokens, part_names
from parts import configurator, ears, judge
from parts.audio import clipped_share, longest_silence, read_audio, write_audio
from parts.files import whole
from parts.metrics import Window, means, read_metrics
from parts.page import curves, settings, write_page
from parts.text import package, wording
from plan import make_batches
from sample import HOW, column_names, find_checkpoints, folder_of, get_ready, named, read_lines

prompts = ""  # text file, one prompt a line, such as config/eval_prompts.txt; empty: held-out texts of data_dir
n_prompts: "int >= 1" = 24  # of these
out_dir = "evaluation"  # for index.html, results.csv, metadata.jsonl, a folder of recordings for each model
rank_by = ""  # the number that ranks; empty: wer with a recogniser, else text_margin
threshold = ""  # what each model must reach, such as wer=0.05,missed=1; exit code 1 where one does not
judged_by = ""  # a checkpoint of the same codec, which judges the speech of all; empty: that with the lowest loss
# a recogniser: digits (pocketsphinx), a model of faster-whisper by name or folder, or a command with {wav} in it
asr = ""
similarity: Literal["", "resemblyzer"] = ""  # compare the voice with its reference, or its recordings in data_dir
mos: Literal["", "distillmos", "dnsmos"] = ""  # predict how natural listeners find it
upload = ""  # user/name: upload out_dir to the hub as a data set, a private one where it is new

SHARED = {
    "sample.py": ["ckpt", "text", "speaker", "reference", "reference_text", "voice", "seed", "batch", "tries",
                  "n_codebooks", "quantize", "linear", "device", "adapter"],
    "voice.py": ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "repetition_decay", "speed",
                 "cap_seconds", "dtype"],
    "prepare.py": ["codec", "codec_path", "tokenizer", "text_format", "front_end", "language"],
    "weights.py": ["base"],
    "train.py": ["reference_seconds", "data_dir"],
    "model.py": ["speaks", "rounds", "guidance", "top_sigma", "whole_frames", "prompt_style", "loose_stop",
                 "recording_seconds", "heard_seconds", "chunk_seconds"],
}  # fmt: skip


class Number(NamedTuple):
    """A number of an evaluation: whether a "low" or "high" one is better, "" for neither; and what it means."""

    better: str
    meaning: str


NUMBERS = {
    "val_loss": Number("low", "cross-entropy of held-out speech, nats a code"),
    "text_margin": Number("high", "how well its frames tell a text from others, nats a frame"),
    "voice_margin": Number("high", "how well its frames tell a voice from others, nats a frame"),
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
RECORDINGS = 4  # of a voice, that say how it sounds
SETTINGS = ("speaker", "language", "reference", "reference_text", "cap_seconds")  # of a line, for Voice.plan
SPLIT_WORDS = "train|training|validation|valid|dev|val|test|testing|eval|evaluation"  # of the hub's libraries
OWN_RECORDING = r"(?!\.\./)[^/\\]+/\d{3,}\.wav"  # in the folder of a model
COLUMNS = ("file_name", "model", "config", "sentence_id", "sentence")  # of metadata.jsonl, before the numbers


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
    found = evaluate(voice.model, val, contextlib.nullcontext())
    return {f"val_{name}": found[name] for name in ("loss", "loss_by_codebook")}


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


class Judge(NamedTuple):
    """A Voice that judges speech, and settings of all lines for it: a reference as it hears it."""

    voice: object
    given: dict


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
    has the keys by which sample.py speaks; those that are missing have their usual value. listening: Ears. judging: a
    Judge; None: the voice itself. given: further settings of Voice.speak, such as a reference. Raises ValueError as
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
        sums = {**sound(voice, said[i]), **margins(judging or Judge(voice, {}), voice, said[i], line, lines)}
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
    """The margins of an utterance, a Said, by a Judge: {name: (sum, frames)}, see parts/judge.py. The rivals of a text
    are those of `lines` that are about as long, those of a voice the next speakers that the model knows."""
    judging, given = judging
    line = line | given
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


def recorded_voices(cfg, voice, files, encoder):
    """Embeddings of how speakers should sound, {speaker: (E,)}: that of the reference, for all; or those of the
    held-out recordings of each one, as the codec reproduces them. files: may be None."""
    if cfg.reference:
        wavs = [read_audio(path, ears.RATE) for _, path in named(cfg.reference, "recording")]
        return {"": encoder(torch.cat(wavs), ears.RATE)}
    found = {}
    for i in range(len(files) if files else 0):
        codes = torch.from_numpy(files.codes(i).T[None]).to(voice.device)
        wavs = found.setdefault(files.meta["speakers"][files.speaker(i)], [])
        if len(wavs) < RECORDINGS:
            wavs.append(voice.codec.decode(codes)[0].float().cpu())
    return {speaker: encoder(torch.cat(wavs), voice.codec.sample_rate) for speaker, wavs in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# the command


def limits(cfg):
    """What `threshold` asks for, {name: number}. Raises ValueError for a number that does not exist, that has no better
    side, or that nothing measures."""
    asked = {}
    for word in filter(None, cfg.threshold.split(",")):
        name, _, text = map(str.strip, word.partition("="))
        known_number(cfg, name, f"threshold = {cfg.threshold!r:.60}")
        try:
            asked[name] = float(text)
        except ValueError:
            raise ValueError(f"threshold = {cfg.threshold!r:.60}: {name} needs a number: {name}=0.05") from None
    return asked


def known_number(cfg, name, where):
    """Raise ValueError, one line that begins with `where`, for a name that is no number by which models are ranked."""
    if name not in NUMBERS:
        near = difflib.get_close_matches(name, NUMBERS, 1)
        raise ValueError(f"{where}: {name!r:.60} is none of the numbers" + (f", did you mean {near[0]}?" if near else
                         f": {', '.join(NUMBERS)}"))  # fmt: skip
    if not NUMBERS[name].better:
        raise ValueError(f"{where}: neither a low nor a high {name} is better")
    for key, names in (("asr", ("wer", "cer")), ("similarity", ("similarity",)), ("mos", ("mos",))):
        if name in names and not vars(cfg)[key]:
            raise ValueError(f"{where}: {name} needs --{key}")


def reaches(name, value, limit):
    """Whether a number of a model, or None, is as good as a limit."""
    return value is not None and (value <= limit if NUMBERS[name].better == "low" else value >= limit)


def try_files(cfg, voice, path, say):
    """The held-out files of a voice; None where its own are gone, which it says. Raises ValueError where those that
    --data_dir names cannot be used."""
    given = cfg.data_dir if "data_dir" in cfg.given else ""
    try:
        return held_out_files(voice, given)
    except (ValueError, OSError) as error:
        if given:
            raise ValueError(f"{path}: {error}") from None
        say(f"{path}: no val_loss: {error}")
        return None


def open_model(cfg, path, say=lambda line: None):
    """The voice of a checkpoint, its held-out files or None, settings of its lines. Raises ValueError or OSError."""
    voice, reference, texts, _ = get_ready(cfg, path, [], cfg.out_dir)
    given = {"reference": reference, "reference_text": texts} if cfg.reference or cfg.voice else {}
    return voice, try_files(cfg, voice, path, say), given


def read_prompts(cfg, voice, files):
    """The prompts: a text, lines of a file, or held-out texts. Raises ValueError where neither exists."""
    if cfg.text and cfg.prompts:
        raise ValueError("give either --text or --prompts")
    if cfg.text or cfg.prompts:
        return read_lines(cfg.text, cfg.prompts)
    if not files:
        raise ValueError("no held-out texts to speak: give --prompts=config/eval_prompts.txt, or --data_dir")
    lines = held_out_prompts(voice, files, cfg.n_prompts)
    return [{**line, "text": line["words"], "speaker": cfg.speaker} for line in lines] if cfg.speaker else lines


def check_prompts(cfg, voice, prompts, given):
    """Raise ValueError, which names the prompt, where a voice cannot speak one."""
    for i, prompt in enumerate(prompts, 1):
        line, words = as_line(voice, prompt, cfg.language)
        try:
            voice.pieces(**{key: getattr(cfg, key) for key in ("speaker", "language", "cap_seconds")} | given | line)
        except ValueError as error:
            where = f"{cfg.prompts}: line {i}" if cfg.prompts else f"prompt {words!r:.60}"
            raise ValueError(f"{where}: {error}") from None


def best_judge(cfg, losses, codecs):
    """The path of the model that judges all, "" where each judges itself. losses {path: its held-out numbers}, codecs
    {path: fingerprint}. Raises ValueError where `judged_by` cannot."""
    if cfg.judged_by:
        return cfg.judged_by
    if len(losses) < 2:
        return ""
    known = [path for path in losses if losses[path]]
    if known and len({*codecs.values()}) == 1:
        return min(known, key=lambda path: losses[path]["val_loss"])
    print("each model judges its own speech, as they have several codecs, or none a held-out loss: do not compare "
          "their margins, or name a judge of the same codec (--judged_by)")  # fmt: skip
    return ""


def open_judge(cfg, path, prompts, codecs):
    """The Judge at a path. Raises ValueError where it cannot speak the prompts, or not in the codecs of the models
    {path: fingerprint}."""
    voice, _, given = open_model(cfg, path)
    check_prompts(cfg, voice, prompts, given)
    for model, codec in codecs.items():
        if codec != voice.codec.fingerprint():
            raise ValueError(f"{path} cannot judge {model}, which speaks in the codes of another codec")
    return Judge(voice, given)


def evaluate_model(cfg, path, name, prompts, listening, judging, losses):
    """One model: {"name", "config", "numbers", "rows", "curves"}; its recordings are in a folder of its own in out_dir.
    losses: its held-out numbers."""
    voice, files, given = open_model(cfg, path)
    numbers = {**dict.fromkeys(NUMBERS), **losses}
    if listening.encoder:
        listening = listening._replace(voices=recorded_voices(cfg, voice, files, listening.encoder))
    voice.ready(cfg.quantize, cfg.linear)
    folder = os.path.join(cfg.out_dir, folder_name(name))
    os.makedirs(folder, exist_ok=True)
    found, rows = measure(voice, prompts, cfg, listening, judging, folder, **given)
    config = {"iter": voice.report["iter"], **settings(voice.trained_with)}
    log = curves(read_metrics(folder_of(path) / "metrics.jsonl"))
    return {"name": name, "config": config, "numbers": numbers | found, "rows": rows, "curves": log}


def folder_name(name):
    """A folder for a model's recordings. datasets.load_dataset would make splits of names with words such as "test"."""
    return re.sub(rf"(?<![A-Za-z])({SPLIT_WORDS})(?![A-Za-z])", r"x\1x", name)


def ranked(models, name):
    """Models in the order of a number, the best first; those without it last."""
    sign = -1 if NUMBERS[name].better == "high" else 1
    known = [model for model in models if model["numbers"][name] is not None]
    return sorted(known, key=lambda model: sign * model["numbers"][name]) + [m for m in models if m not in known]


def write_results(cfg, models, rank_by):
    """Write metadata.jsonl, results.csv and index.html about the models so far, which are ranked. Returns the names of
    all files of the evaluation, relative to out_dir."""
    columns = [name for name in NUMBERS if any(model["numbers"][name] is not None for model in models)]
    files = ["metadata.jsonl", "results.csv", "index.html"]
    with whole(os.path.join(cfg.out_dir, files[0]), "w") as out:
        for model in models:
            config = json.dumps(model["config"])
            for row in model["rows"]:
                files.append(f"{folder_name(model['name'])}/{row['file']}")
                start = dict(zip(COLUMNS, (files[-1], model["name"], config, row["id"], row["text"]), strict=True))
                own = {"heard": row["heard"]} if "heard" in row else {}
                numbers = {name: row["numbers"][name] for name in NUMBERS if name in row["numbers"]}
                out.write(json.dumps({**start, **own, **numbers}, ensure_ascii=False) + "\n")
    with whole(os.path.join(cfg.out_dir, files[1]), "w", newline="") as out:
        table = csv.writer(out)
        K = max(len(model["numbers"].get("val_loss_by_codebook", [])) for model in models)
        table.writerow(["rank", "model", "iter", *columns, *(f"val_loss_by_codebook/{k}" for k in range(K))])
        for rank, model in enumerate(models, 1):
            numbers = model["numbers"]
            table.writerow([rank, model["name"], model["config"]["iter"], *(numbers[name] for name in columns),
                            *numbers.get("val_loss_by_codebook", [])])  # fmt: skip
    sentences = [
        {"id": row["id"], "text": row["text"],
         "audio": {model["name"]: f"{folder_name(model['name'])}/{model['rows'][i]['file']}" for model in models},
         "numbers": {model["name"]: model["rows"][i]["numbers"] for model in models}}
        for i, row in enumerate(models[0]["rows"])
    ]  # fmt: skip
    write_page(os.path.join(cfg.out_dir, files[2]), {
        "title": "Side by side", "rank_by": rank_by, "sentences": sentences,
        "columns": [{"name": name, **NUMBERS[name]._asdict()} for name in columns],
        "models": [{**{key: model[key] for key in ("name", "config", "curves")},
                    "numbers": {name: model["numbers"][name] for name in columns}} for model in models],
    })  # fmt: skip
    return files


def older_files(out_dir):
    """The recordings of an earlier evaluation in out_dir. Raises ValueError where metadata.jsonl there is that of
    another data set, or damaged."""
    listed = Path(out_dir) / "metadata.jsonl"
    if not listed.exists():
        return []
    try:
        lines = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
        names = [line["file_name"] for line in lines if all(key in line for key in COLUMNS)]
        ours = len(names) == len(lines) and all(re.fullmatch(OWN_RECORDING, name) for name in names)
    except (ValueError, TypeError, KeyError, RecursionError):
        ours = False
    if not ours:
        raise ValueError(f"{listed} is not of an evaluation: take another out_dir, or remove the file")
    return [listed.parent / name for name in names]


def remove_older(out_dir):
    """Remove the recordings of an earlier evaluation in out_dir: a data set may not have files without a line."""
    for path in older_files(out_dir):
        with contextlib.suppress(OSError):
            path.unlink()
            path.parent.rmdir()  # which fails while it holds others
    (Path(out_dir) / "metadata.jsonl").unlink(missing_ok=True)


def hub(name):
    """A client of the hub that may write to the data set user/name. Raises ValueError where it cannot."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"upload = {name!r:.60}: give user/name")
    api = package("huggingface_hub", "upload", "huggingface_hub").HfApi()
    try:
        api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
    except Exception as error:  # of the network, of the hub, of a missing token
        raise ValueError(f"upload = {name!r:.60}: {' '.join(str(error).split()):.200}") from None
    return api


def print_table(models, rank_by):
    """Print all numbers that some model has, a line for each model."""
    columns = [name for name in NUMBERS if any(model["numbers"][name] is not None for model in models)]
    columns = sorted(columns, key=lambda name: name != rank_by)
    table = [["", *columns]]
    for model in models:
        values = (model["numbers"][name] for name in columns)
        table.append([model["name"], *("" if value is None else f"{value:.4g}" for value in values)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *rest in table:
        print(first.ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(rest, widths[1:], strict=True)), sep="  ")


def main(cfg):
    cfg.save_voice = ""  # sample.py's functions know it
    asked = limits(cfg)
    rank_by = cfg.rank_by or ("wer" if cfg.asr else "text_margin")
    known_number(cfg, rank_by, f"rank_by = {cfg.rank_by!r:.60}")
    paths = find_checkpoints(cfg.ckpt, cfg.recipe.get("out_dir", "out"))
    if "out_dir" in cfg.recipe and "out_dir" not in cfg.flags:
        cfg.out_dir = os.path.join(cfg.out_dir, "evaluation")  # the recipe's own holds the run
    names = column_names(paths)
    listening = Ears(ears.recogniser(cfg.asr, cfg.language, in_words=True) if cfg.asr else None,
                     ears.speaker_encoder(cfg.similarity) if cfg.similarity else None,
                     ears.naturalness(cfg.mos) if cfg.mos else None)  # fmt: skip
    older_files(cfg.out_dir)  # which may be another's
    prompts = None
    losses = {}
    codecs = {}
    for path in paths:  # twice, so that the last one is not refused after hours
        voice, files, given = open_model(cfg, path, print)
        prompts = prompts or read_prompts(cfg, voice, files)
        check_prompts(cfg, voice, prompts, given)
        losses[path] = held_out_loss(voice, files) if files else {}
        codecs[path] = voice.codec.fingerprint()
    judge_path = best_judge(cfg, losses, codecs)
    judging = open_judge(cfg, judge_path, prompts, codecs) if judge_path else None
    if judging:
        print(f"{judge_path} judges the speech of all")
    api = hub(cfg.upload) if cfg.upload else None
    os.makedirs(cfg.out_dir, exist_ok=True)
    remove_older(cfg.out_dir)
    models = []
    for path, name in zip(paths, names, strict=True):
        models = ranked([*models, evaluate_model(cfg, path, name, prompts, listening, judging, losses[path])], rank_by)
        files = write_results(cfg, models, rank_by)
    print_table(models, rank_by)
    print(f"{os.path.join(cfg.out_dir, 'index.html')}: to compare and listen")
    if api:
        api.upload_folder(repo_id=cfg.upload, repo_type="dataset", folder_path=cfg.out_dir, allow_patterns=files)
        print(f"uploaded to {cfg.upload}")
    failed = [f"{model['name']}: {name} is {model['numbers'][name]}, not {limit:g}" for model in models
              for name, limit in asked.items() if not reaches(name, model["numbers"][name], limit)]  # fmt: skip
    if failed:
        print(*failed, sep="\n", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    configurator.run(main, __file__)

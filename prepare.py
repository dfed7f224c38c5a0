"""
Audio and transcripts -> token files, the folder that train.py reads.

    python prepare.py config/digits.py
    python prepare.py --sources=my/metadata.csv --data_dir=my/tokens

- Metadata of any common kind, told apart by content: LJSpeech (`id|text|normalised`), csv or tsv with a header, json or
  jsonl with the same fields.
- The doctor: every utterance is listened to before anything is computed, and each one that is not used is named with
  its reason, on the screen and in report.json. A set with more than a share `max_bad` of such ones is refused.
- The split is a hash of the utterance's id: adding data never moves an utterance from train to val or back.
- All cores work, each on one utterance at a time, so that the files do not depend on how many cores there are; a codec
  with network weights encodes on a GPU in batches of like length, while the cores read ahead.
- The folder gets its name when it is whole. After a kill the next run starts over.
"""

import csv
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import string
import threading
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import soundfile
import torch
from tqdm import tqdm

import configurator
from codec import load_codec, read_audio
from data import (
    HuggingFace,
    SentencePiece,
    TokenWriter,
    extend_tokenizer,
    load_tokenizer,
    normalise,
    read_meta,
    train_tokenizer,
)

# from where to where
# A source is a metadata file, a folder that holds one, or a dict with the path and any of these:
# {"path": "x/metadata.csv", "speaker": "anna", "filter": {"accent": "us|england"}, "cap": 1000, "name": "x"}.
# speaker: where no column says who speaks; filter: for each column a regular expression that has to match the whole
# field; cap: how many utterances at most; name: put before the ids, where two sources would have the same ones.
sources: str | dict | list = "data/digits"  # one source or a list of them
data_dir = "data/digits/tokens"  # token folder to write
overwrite = True  # replace an existing token folder, once the new one is whole
# codec
codec = "mel"  # which codec
codec_path = ""  # its tables or weights; empty: fit it on the training split (mel only)
codec_args: dict = {}  # options of the codec, such as {"n_codebooks": 8, "codebook_size": 256, "frame_rate": 12.5}
fit_seconds = 3600.0  # how much audio the fit listens to
references = False  # write the features of the recordings too, for models that read a voice off them (XTTS)
# text
tokenizer = ""  # a sentencepiece .model, a tokenizer.json, XTTS's vocab.json; empty: train one on the training split
extend_vocab = 0  # further pieces for a tokenizer.json, learnt from the training split where it meets a new script
vocab_size = 1024  # of the tokenizer trained here; fewer where the texts do not support so many
lowercase = False  # lower-case the text
text_format = "[{speaker}]{text}"  # what the model reads; XTTS: "[en]{text}"
# split
heldout = ""  # file with the ids of the val split, one a line; empty: a share val_fraction by hash of the id
val_fraction = 0.02  # share of the utterances held out
# what the doctor lets pass
min_seconds = 0.3  # shorter is too short
max_seconds = 30.0  # longer is too long
min_level = -50.0  # dB of full scale that the loudest 20 ms have to reach, else it is silence
max_clipped = 0.01  # share of samples at full scale, above which it is clipping
min_chars_per_second = 1.0  # slower than anybody reads: audio and text do not belong together
max_chars_per_second = 40.0  # faster than anybody reads
max_text_tokens = 0  # more is too much text; 0: no limit
max_bad = 0.1  # share of the utterances that may be unusable before the whole set is refused
# the run
workers = 0  # processes; 0: one for each core
device = "auto"  # where codecs with network weights encode: cpu, cuda, cuda:1, mps, ...; auto: a GPU if there is one
batch_seconds = 240.0  # audio in a batch there
seed = 1337  # of the codec's fit
max_tokens = 8192  # train.py's batch: only to say how many steps an epoch will take

# names of columns, the preferred first
AUDIO = ["audio", "audio_path", "audio_file", "audio_filepath", "path", "file", "file_name", "filename", "wav", "id"]
TEXT = ["normalised", "normalized", "normalised_text", "normalized_text", "normalized_transcription"]
TEXT += ["text", "sentence", "transcript", "transcription"]
SPEAKER = ["speaker", "speaker_name", "speaker_id", "spk", "voice", "client_id"]
START, END, DURATION = ["start", "start_time", "begin", "offset"], ["end", "end_time", "stop"], ["duration"]
METADATA = ["metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json", "metadata.txt"]
FOLDERS = ["", "wavs", "clips", "audio"]  # where the audio lies, seen from its metadata
EXTENSIONS = ["wav", "flac", "ogg", "oga", "opus", "mp3", "aiff", "aif", "aifc", "au", "snd", "caf", "w64", "rf64"]
BY_CHOICE = ["filtered out", "beyond the cap"]  # reasons that say nothing against an utterance


@dataclass(slots=True)
class Utterance:
    id: str
    source: str  # metadata file
    audio: str  # as the metadata names it; the file's path once it is found
    text: str
    speaker: str
    start: float = 0.0  # seconds
    end: float | None = None
    seconds: float = 0.0
    reason: str = ""  # why it is not used; empty: it is
    detail: str = ""


# -----------------------------------------------------------------------------
# metadata -> utterances


def read_table(path, text):
    """Rows of a csv, tsv or LJSpeech-like file: [(line, {column: field}, problem)], `problem` empty for a sound row."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = next((d for d in "|\t" if d in first), ";" if first.count(";") > first.count(",") else ",")
    # In LJSpeech's layout, and in some tsv files, quotation marks belong to the text.
    styles = {"|": [csv.QUOTE_NONE], "\t": [csv.QUOTE_MINIMAL, csv.QUOTE_NONE]}.get(delimiter, [csv.QUOTE_MINIMAL])
    for quoting in styles:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        try:
            rows = [(reader.line_num, row) for row in reader if any(field.strip() for field in row)]
            break
        except csv.Error as error:
            problem = f"{path}, line {reader.line_num}: {error}"
    else:
        raise ValueError(problem)
    header = [column_name(name) for name in rows[0][1]] if rows else []
    if delimiter == "|" and not has_columns(header):
        header = ["id", "text", "normalised"][: len(header)]
    else:
        rows = rows[1:]
    problems = ["" if len(row) == len(header) else f"{len(row)} fields instead of {len(header)}" for _, row in rows]
    return [(n, dict(zip(header, row, strict=False)), p) for (n, row), p in zip(rows, problems, strict=True)]


def read_json(path, text):
    """Rows of a json (one list of objects) or jsonl file (one object a line), as read_table gives them."""
    table = []
    for line, chunk in [(1, text)] if text.lstrip()[:1] == "[" else enumerate(text.split("\n"), 1):
        try:
            value = json.loads(chunk) if chunk.strip() else []
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: not JSON ({error})") from None
        for row in value if isinstance(value, list) else [value]:
            if not isinstance(row, dict):
                raise ValueError(f"{path}: {row!r:.40} is not an object with the fields audio and text")
            row = {column_name(k): v.get("path") if isinstance(v, dict) else v for k, v in row.items()}
            table.append((max(line, len(table) + 1), {k: "" if v is None else str(v) for k, v in row.items()}, ""))
    return table


def column_name(name):
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def has_columns(columns):
    return bool(set(columns) & set(AUDIO) and set(columns) & set(TEXT))


def read_metadata(path):
    """The metadata file that `path` means, itself or in the folder, and its rows as read_table gives them."""
    if os.path.isdir(path):
        found = [file for name in METADATA if os.path.isfile(file := os.path.join(path, name))]
        if not found:
            script = os.path.join(path, "prepare.py")
            advice = f"run python {script} first" if os.path.isfile(script) else "name the file itself"
            raise ValueError(f"source {path}: none of {', '.join(METADATA)} in this folder; {advice}")
        path = found[0]
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 (byte {error.start})") from None
    table = (read_json if text.lstrip()[:1] in ("[", "{") else read_table)(path, text)
    columns = {column: None for _, row, _ in table for column in row}
    if not table:
        raise ValueError(f"{path}: no rows in it")
    if not has_columns(columns):
        wanted = f"one for the audio ({', '.join(AUDIO)}) and one for the text ({', '.join(TEXT)})"
        raise ValueError(f"{path}: its columns are {', '.join(columns)}; it needs {wanted}")
    return path, table


def read_source(source, lowercase=False):
    """One source -> its utterances in the order of the file, those it does not want with their reason.
    Raises ValueError or FileNotFoundError, one line, where it cannot be read or makes no sense."""
    source = source if isinstance(source, dict) else {"path": source}
    cap, wanted = source.get("cap"), source.get("filter", {})
    if not isinstance(source.get("path"), str) or set(source) - {"path", "speaker", "filter", "cap", "name"}:
        raise ValueError(f"source {source}: takes a path and, if need be, speaker, filter, cap, name")
    if not isinstance(wanted, dict) or not (cap is None or type(cap) is int and cap > 0):
        raise ValueError(f"source {source}: filter is a dict {{column: regular expression}}, cap a number above 0")
    path, table = read_metadata(source["path"])
    try:
        tests = [(column_name(column), re.compile(str(pattern))) for column, pattern in wanted.items()]
    except re.error as error:
        raise ValueError(f"source {path}: {error.pattern!r} in its filter is no regular expression ({error})") from None
    speaker = source.get("speaker") or os.path.basename(os.path.dirname(os.path.abspath(path))) or "speaker"
    prefix = f"{source['name']}/" if source.get("name") else ""
    utterances, passed = [], []
    for line, row, problem in table:
        u = read_row(row, f"line {line}", problem, path, normalise(str(speaker)), lowercase)
        u.id = prefix + u.id
        utterances.append(u)
        if all(pattern.fullmatch(row.get(column, "").strip()) for column, pattern in tests):
            passed.append(u)
        else:
            u.reason = "filtered out"
    if not passed:
        raise ValueError(f"{path}: none of its {len(table)} rows passes the filter {wanted}; columns: {', '.join(row)}")
    # A fair sample, the same each time, and not the utterances that the split by hash would hold out.
    for u in sorted(passed, key=lambda u: fraction(f"cap {u.id}"))[cap or len(passed) :]:
        u.reason = "beyond the cap"
    return utterances


def read_row(row, line, problem, path, speaker, lowercase):
    """One row {column: field} of the metadata file `path` -> an utterance, with a reason where the row is at fault."""

    def pick(names):
        return next((row[name].strip() for name in names if row.get(name, "").strip()), "")

    audio, start, end, duration = pick(AUDIO), pick(START), pick(END), pick(DURATION)
    u = Utterance(utterance_id(audio, path) or line, path, audio, normalise(pick(TEXT), lowercase), speaker)
    u.speaker = normalise(pick(SPEAKER)) or speaker
    try:
        u.start = float(start or 0)
        if end or start and duration:
            u.end = float(end) if end else u.start + float(duration)
        if not 0 <= u.start < (math.inf if u.end is None else u.end):
            problem = problem or f"from {u.start:g} s to {u.end} s"
    except ValueError:
        problem = problem or f"start {start!r}, end {end or duration!r}: not numbers of seconds"
    if start or end:
        u.id += f"_{start or 0}-{end or duration}"
    if problem or not audio:
        u.reason, u.detail = "bad row", f"{line}: {problem or 'no audio'}"
    elif not u.text:
        u.reason = "empty text"
    return u


def utterance_id(audio, metadata):
    """What an utterance is called: its audio's path below the metadata, without wavs/ and without extension."""
    folder = os.path.dirname(os.path.abspath(metadata)) + os.sep
    name = re.sub(r"^(\./|wavs/|clips/|audio/)+", "", " ".join(audio.removeprefix(folder).split()))
    stem, _, extension = name.rpartition(".")
    return stem if extension.lower() in EXTENSIONS else name


# -----------------------------------------------------------------------------
# the split


def fraction(name):
    """A number in [0, 1) that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def divide(utterances, cfg):
    """The utterances in use, those of them to train on, and the ids of the others."""
    used = [u for u in utterances if not u.reason]
    val = held_out(used, cfg.heldout, cfg.val_fraction)
    return used, [u for u in used if u.id not in val], val


def held_out(utterances, heldout, val_fraction):
    """The ids of the val split: those listed in the file `heldout`, else those that hash below val_fraction.
    Raises ValueError where that leaves one of the two splits empty."""
    if heldout:
        with open(heldout, encoding="utf-8-sig") as file:
            listed = {name for line in file if (name := line.strip())}
        val = {u.id for u in utterances if u.id in listed}
        advice = f"none of the {len(listed)} ids in {heldout} is among the utterances, such as {utterances[0].id!r}"
    else:
        val = {u.id for u in utterances if fraction(u.id) < val_fraction}
        enough = math.ceil(1000 * min(fraction(u.id) for u in utterances) + 1e-6) / 1000
        advice = f"val_fraction = {val_fraction} holds out none of {len(utterances)}; --val_fraction={enough} would"
    if not val:
        raise ValueError(f"the val split is empty: {advice}")
    if len(val) == len(utterances):
        raise ValueError(f"the train split is empty: all of the {len(val)} usable utterances are held out")
    return val


# -----------------------------------------------------------------------------
# the worker processes


def start_pool(n):
    n = n or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["torch", "soundfile"])  # imported once, not by each worker
    return ProcessPoolExecutor(n, context, start_worker)


def start_worker():
    """One thread each; leave Ctrl-C to the parent, and do not outlive a parent that is killed."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def in_order(what, pool, function, items, *args, chunk=8):
    """function(some of the items, *args) -> list, called in the pool; yields the results one by one in the order of
    the items, behind a progress bar. A bounded number of calls is under way, so a long list costs no memory."""
    rest, waiting = iter(items), deque()
    try:
        with tqdm(desc=what.ljust(14), total=len(items), unit=" utt", disable=None) as bar:
            while True:
                while len(waiting) < 4 * pool._max_workers and (some := list(itertools.islice(rest, chunk))):
                    waiting.append(pool.submit(function, some, *args))
                if not waiting:
                    return
                for result in waiting.popleft().result():
                    yield result
                    bar.update()
    except BrokenProcessPool:
        raise OSError("a worker process was killed, perhaps for want of memory: try fewer --workers") from None


# -----------------------------------------------------------------------------
# the doctor


def examine(utterances, limits):
    """Listen to utterances: the same, with their audio's path and length, and a reason where one is unfit."""
    for u in utterances:
        u.reason, u.detail = fault(u, limits)
    return utterances


def fault(u, limits):
    """What is wrong with an utterance, as (reason, detail), or two empty strings. Sets its `audio` and `seconds`."""
    places = [os.path.join(os.path.dirname(u.source), sub, u.audio) for sub in FOLDERS]
    endings = ["", *(f".{e}" for extension in EXTENSIONS for e in (extension, extension.upper()))]
    path = next((place + e for place in places for e in endings if os.path.isfile(place + e)), None)
    if path is None:
        return "missing file", places[0]
    u.audio = path
    try:
        info = soundfile.info(path)
        total = info.frames / info.samplerate
        u.seconds = max(0.0, (total if u.end is None else min(u.end, total)) - u.start)
        if u.seconds > limits["max_seconds"]:  # said before it is read, which may take hours
            return "too long", f"{u.seconds:.1f} s"
        if u.seconds < max(limits["min_seconds"], 1 / info.samplerate):
            return "too short", f"{u.seconds:.2f} s"
        wav = read_audio(path, info.samplerate, u.start, u.end).numpy()
    except (soundfile.SoundFileError, ValueError, OSError) as error:
        return "NaN" if "NaN or infinite" in str(error) else "unreadable file", " ".join(str(error).split())
    if len(wav) < (u.seconds - 0.1) * info.samplerate:
        return "unreadable file", f"{path}: breaks off {u.seconds - len(wav) / info.samplerate:.2f} s before its end"
    step = min(len(wav), max(1, info.samplerate // 50))
    power = np.square(wav[: len(wav) // step * step].reshape(-1, step)).mean(1).max()
    level, clipped, speed = 10 * math.log10(power + 1e-20), (np.abs(wav) >= 0.99).mean(), len(u.text) / u.seconds
    if level < limits["min_level"]:
        return "silence", f"{level:.0f} dB at its loudest"
    if clipped > limits["max_clipped"]:
        return "clipping", f"{clipped:.1%} of its samples"
    if not limits["min_chars_per_second"] <= speed <= limits["max_chars_per_second"]:
        return "impossible speed", f"{speed:.1f} characters a second"
    return "", ""


def diagnose(utterances, cfg, pool, tokenizer):
    """The utterances with file and length, or with the reason why they cannot be used. `tokenizer` may be None yet."""
    seen = set()
    for u in utterances:
        if not u.reason:
            u.reason = "duplicate id" if u.id in seen else ""
            seen.add(u.id)
    if tokenizer:
        proofread(utterances, cfg, tokenizer)
    examined = iter(list(in_order("listening", pool, examine, [u for u in utterances if not u.reason], vars(cfg))))
    return [u if u.reason else next(examined) for u in utterances]


def proofread(utterances, cfg, tokenizer):
    """Give each utterance a reason whose text the tokenizer does not know, or makes too much or an early end of."""
    strange = tokenizer.unknown("".join({character for u in utterances for character in u.text}))
    for u in utterances:
        if u.reason:
            continue
        ids = tokenizer.encode(wording(u, cfg))
        unknown = strange.intersection(u.text)
        if unknown or tokenizer.unk_id in ids:  # the second where a speaker's tag is what it does not know
            unknown = unknown or tokenizer.unknown(wording(u, cfg))
            u.reason, u.detail = "unknown characters", " ".join(sorted(unknown))
        elif ends := {tokenizer.bos_id, tokenizer.eos_id}.intersection(ids):
            u.reason, u.detail = "begin or end in text", tokenizer.decode(sorted(ends))
        elif 0 < cfg.max_text_tokens < len(ids):
            u.reason, u.detail = "too much text", f"{len(ids)} tokens"


def report(utterances):
    """The findings: what is used, and each utterance that is not, with its reason."""
    used, speakers = [u for u in utterances if not u.reason], defaultdict(lambda: {"utterances": 0, "hours": 0.0})
    for u in used:
        speakers[u.speaker]["utterances"] += 1
        speakers[u.speaker]["hours"] += u.seconds / 3600
    longest = max((u.seconds for u in used), default=1.0)
    width = next(w for w in (m * 10.0**e for e in range(-2, 9) for m in (1, 2, 5)) if longest / w <= 12)
    bins = Counter(int(u.seconds / width) for u in used)
    return {
        "utterances": len(utterances),
        "used": len(used),
        "hours": sum(u.seconds for u in used) / 3600,
        "speakers": dict(sorted(speakers.items(), key=lambda s: (-s[1]["hours"], s[0]))),
        "durations": [{"from": round(b * width, 2), "to": round((b + 1) * width, 2), "utterances": bins[b]}
                      for b in range(min(bins, default=0), max(bins, default=-1) + 1)],
        "reasons": dict(Counter(u.reason for u in utterances if u.reason).most_common()),
        "not_used": [{k: getattr(u, k) for k in ("id", "source", "reason", "detail")} for u in utterances if u.reason],
    }  # fmt: skip


def show(findings):
    """The findings as a page of text."""
    lines = [f"\n{findings['used']:,} of {findings['utterances']:,} utterances are used, {findings['hours']:.2f} hours"]
    if findings["reasons"]:
        lines.append("\n  not used            utterances  for example")
    for reason, n in findings["reasons"].items():
        some = [f"{x['id']} {x['detail']}".rstrip() for x in findings["not_used"] if x["reason"] == reason]
        lines.append(f"  {reason:20}{n:10,}  {', '.join(some[:3]):.80}")
    lines.append("\n  duration            utterances")
    most = max(b["utterances"] for b in findings["durations"])
    for b in findings["durations"]:
        span = f"{b['from']:g} to {b['to']:g} s"
        lines.append(f"  {span:20}{b['utterances']:10,}  {'#' * math.ceil(40 * b['utterances'] / most)}")
    lines.append("\n  speaker             utterances     hours")
    for i, (name, s) in enumerate(findings["speakers"].items()):
        if i < 20:
            lines.append(f"  {name:20.20}{s['utterances']:10,}{s['hours']:10.2f}")
    if (more := len(findings["speakers"]) - 20) > 0:
        lines.append(f"  and {more:,} more")
    return "\n".join(lines)


def judge(utterances, cfg, report_path):
    """Raise ValueError when too many utterances are bad, and leave the report where one can read which."""
    judged = [u for u in utterances if u.reason not in BY_CHOICE]
    bad = [u for u in judged if u.reason]
    if len(bad) < len(judged) and len(bad) <= cfg.max_bad * len(judged):
        return
    with open(report_path, "w", encoding="utf-8") as file:
        json.dump(report(utterances), file, indent=1, ensure_ascii=False)
    counts = ", ".join(f"{n} {reason}" for reason, n in Counter(u.reason for u in bad).most_common(4))
    example = f"for example {bad[0].id}: {bad[0].reason} {bad[0].detail}".rstrip()
    limit = f"max_bad = {cfg.max_bad} allows fewer" if len(bad) < len(judged) else "none is left"
    some = f"{len(bad)} of {len(judged)} utterances cannot be used"
    raise ValueError(f"{some} ({counts}), {limit}; {example}; see {report_path}")


# -----------------------------------------------------------------------------
# text and codes


def wording(u, cfg):
    return cfg.text_format.format(speaker=u.speaker, text=u.text)


def read_tokenizer(cfg):
    """The tokenizer given, its kind told by its content."""
    with open(cfg.tokenizer, "rb") as file:
        model = file.read()
    kind = HuggingFace.kind if model.lstrip()[:1] == b"{" else SentencePiece.kind
    if cfg.extend_vocab and kind != HuggingFace.kind:
        raise ValueError(f"extend_vocab = {cfg.extend_vocab}: {cfg.tokenizer} is no tokenizer.json, as it takes")
    try:
        return load_tokenizer(kind, model)
    except ValueError as error:
        raise ValueError(f"{cfg.tokenizer}: {error}") from None


def make_tokenizer(cfg, train, given=None):
    """A tokenizer trained on the training texts, or one given and extended by them, in which what text_format puts
    around a text, such as each speaker's tag, is one token."""
    around = cfg.text_format.split("{text}")
    tags = sorted({part.format(speaker=u.speaker).strip() for u in train for part in around} - {""})
    if given is None:
        model = train_tokenizer([wording(u, cfg) for u in train], cfg.vocab_size, tags)
        return load_tokenizer(SentencePiece.kind, model)
    tokenizer = load_tokenizer(given.kind, extend_tokenizer(given, [u.text for u in train], cfg.extend_vocab, tags))
    new = given.unknown("".join({character for u in train for character in u.text}))
    print(f"{cfg.tokenizer}: {tokenizer.vocab_size - given.vocab_size} pieces more; new to it: {' '.join(sorted(new))}")
    return tokenizer


def open_codec(cfg):
    try:
        return load_codec(cfg.codec, cfg.codec_path or None, **cfg.codec_args)
    except TypeError as error:
        raise ValueError(f"codec_args = {cfg.codec_args}: {error}") from None


def fit_codec(codec, cfg, train, pool):
    """Fit a codec that needs it on `fit_seconds` of the training split."""
    seconds, heard = 0.0, []
    for u in sorted(train, key=lambda u: fraction(f"{cfg.seed} {u.id}")):  # drawn from everywhere in the set
        if seconds < cfg.fit_seconds:
            heard.append(u)
            seconds += u.seconds
    wavs = in_order(f"fitting {cfg.codec}", pool, read, heard, codec.sample_rate)
    codec.fit(map(torch.from_numpy, wavs), seed=cfg.seed)


def read(utterances, sample_rate):
    return [read_audio(u.audio, sample_rate, u.start, u.end).numpy() for u in utterances]


worker_codec = lru_cache(maxsize=1)(load_codec)


def encode(utterances, name, path):
    """Codes (T, K) of each utterance, one at a time, so that none depends on its neighbours."""
    codec = worker_codec(name, path)
    wavs = read(utterances, codec.sample_rate)
    return [codec.encode(torch.from_numpy(wav)[None])[0].T.numpy().astype(np.int32) for wav in wavs]


def features(utterances, name, path):
    """What the codec lets a model read of each recording's voice: (T * r, M)."""
    codec = worker_codec(name, path)
    wavs = read(utterances, codec.sample_rate)
    return [codec.reference(torch.from_numpy(wav)[None])[0].numpy().astype(np.float16) for wav in wavs]


def longest_first(utterances, window=1024):
    """The order to encode in: by length, so that batches hold little padding and no core ends with a long one alone;
    in windows, so that few codes wait for their turn."""
    n = len(utterances)
    windows = [range(first, min(first + window, n)) for first in range(0, n, window)]
    return [i for these in windows for i in sorted(these, key=lambda i: -utterances[i].seconds)]


def put_back(order, results):
    """The results, which come in this order of their indices, in the order of the indices."""
    waiting, n = {}, 0
    for i, result in zip(order, results, strict=True):
        waiting[i] = result
        while n in waiting:
            yield waiting.pop(n)
            n += 1


def encode_all(codec, utterances, pool, device, folder, batch_seconds):
    """Codes (T, K) of each utterance, in order. `folder` holds the codec: on a CPU each core encodes with its own, one
    utterance at a time; on another `device` it encodes batches, which the cores read ahead."""
    order, what = longest_first(utterances), f"encoding {codec.name}"
    utterances = [utterances[i] for i in order]
    if device.type == "cpu":
        chunk = 1 if list(codec.parameters()) else 8
        return put_back(order, in_order(what, pool, encode, utterances, codec.name, folder, chunk=chunk))
    wavs = in_order(what, pool, read, utterances, codec.sample_rate)
    return put_back(order, encode_batches(codec.to(device), wavs, device, batch_seconds))


def batches(wavs, most):
    """The recordings (N,), in lists that padding makes no more than so many samples, or one recording."""
    batch = []
    for wav in wavs:
        if batch and (len(batch) + 1) * max(len(wav), *map(len, batch)) > most:
            yield batch
            batch = []
        batch.append(wav)
    if batch:
        yield batch


def encode_batches(codec, wavs, device, batch_seconds):
    """Codes (T, K) of each recording in turn, encoded on `device` in batches of so much audio."""
    for batch in batches(wavs, batch_seconds * codec.sample_rate):
        lengths = [len(wav) for wav in batch]
        x = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(wav) for wav in batch], batch_first=True)
        codes = codec.encode(x.to(device), torch.tensor(lengths, device=device)).cpu().numpy()
        yield from (c[:, : codec.frames(n)].T for c, n in zip(codes, lengths, strict=True))


def encode_device(codec, name):
    """Where to encode: codecs with network weights on the device asked for, the others on the cores."""
    if not list(codec.parameters()):
        return torch.device("cpu")
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device = {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


# -----------------------------------------------------------------------------
# the run


def check(cfg, folder, codec):
    """Refuse, before hours of work, settings that cannot be meant and a folder that cannot be written."""
    fields = {field for _, field, _, _ in string.Formatter().parse(cfg.text_format) if field is not None}
    if not {"text"} <= fields <= {"text", "speaker"}:
        raise ValueError(f"text_format = {cfg.text_format!r}: needs {{text}}, may have {{speaker}}, no other braces")
    if not cfg.sources or not cfg.data_dir:
        raise ValueError("what to read and where to write? --sources=my/metadata.csv --data_dir=my/tokens")
    if cfg.references and not hasattr(codec, "reference"):
        raise ValueError(f"references = True: the codec {codec.name} has no features to read a voice off")
    for key in ("workers", "extend_vocab", "max_text_tokens"):
        if getattr(cfg, key) < 0:
            raise ValueError(f"{key} = {getattr(cfg, key)} is below 0")
    if cfg.extend_vocab and not cfg.tokenizer:
        raise ValueError(f"extend_vocab = {cfg.extend_vocab}: there is no tokenizer to extend, name its tokenizer.json")
    present = os.listdir(folder) if os.path.isdir(folder) else ["a file"] * os.path.lexists(folder)
    if present and not {"meta.json", "train.index.npy"} <= set(present):
        raise ValueError(f"data_dir {folder} is no token folder, and would be replaced by one: choose another")
    if present and not cfg.overwrite:
        raise ValueError(f"data_dir {folder} holds token files already: --overwrite replaces them")
    shutil.rmtree(folder + ".partial", ignore_errors=True)
    os.makedirs(folder + ".partial")
    os.rmdir(folder + ".partial")


def main(cfg):
    folder = os.path.realpath(cfg.data_dir)
    codec = open_codec(cfg)
    check(cfg, folder, codec)
    given, utterances = read_tokenizer(cfg) if cfg.tokenizer else None, []
    tokenizer = None if cfg.extend_vocab else given
    for source in cfg.sources if isinstance(cfg.sources, list) else [cfg.sources]:
        found = read_source(source, cfg.lowercase)
        print(f"{found[0].source}: {len(found):,} utterances")
        utterances += found
    pool = start_pool(cfg.workers)
    try:
        utterances = diagnose(utterances, cfg, pool, tokenizer)
        judge(utterances, cfg, folder + ".report.json")
        if tokenizer is None:
            tokenizer = make_tokenizer(cfg, divide(utterances, cfg)[1], given)
            proofread(utterances, cfg, tokenizer)
            judge(utterances, cfg, folder + ".report.json")
        findings = report(utterances)
        print(show(findings))
        used, train, val = divide(utterances, cfg)
        if not getattr(codec, "fitted", True):
            fit_codec(codec, cfg, train, pool)
        write(cfg, folder, pool, used, val, tokenizer, codec, findings)
    finally:
        pool.shutdown(cancel_futures=True)
    if os.path.exists(folder + ".report.json"):
        os.remove(folder + ".report.json")
    print(show_cost(cfg, folder, findings["cost"]))


def write(cfg, folder, pool, used, val, tokenizer, codec, findings):
    """Encode everything into the token folder, in the order of the metadata."""
    speakers, device = list(findings["speakers"]), encode_device(codec, cfg.device)  # most heard first
    with TokenWriter(folder, np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32, cfg.references) as out:
        torch.save(codec.pack(), packed := io.BytesIO())
        out.file("codec.pt", packed.getvalue())  # torch.save itself has no plain error for a full disk
        out.file(tokenizer.file, tokenizer.model)
        codes = encode_all(codec, used, pool, device, out.partial, cfg.batch_seconds)
        heard = itertools.repeat(None, len(used))
        if cfg.references:
            heard = in_order("listening to the voices", pool, features, used, codec.name, out.partial)
        for u, c, reference in zip(used, codes, heard, strict=True):
            split, text = "val" if u.id in val else "train", tokenizer.encode(wording(u, cfg))
            out.add(split, u.id, text, c, speakers.index(u.speaker), reference)
        rows = sum(out.ends["train"])
        findings["cost"] = {"rows": rows, "max_tokens": cfg.max_tokens, "steps": math.ceil(rows / cfg.max_tokens)}
        out.file("report.json", json.dumps(findings, indent=1, ensure_ascii=False).encode())
        more = {}
        if cfg.references:
            silence = codec.reference(torch.zeros(1, codec.samples_per_frame))[0]
            more = {"reference": {"rows_per_frame": len(silence), "silence": silence[0].tolist()}}
        of_codec = ("name", "sample_rate", "frame_rate", "n_codebooks", "codebook_size")
        of_place = ("data_dir", "overwrite", "workers", "max_tokens")  # keys that change nothing in the files
        out.finish({
            "codec": {"fingerprint": codec.fingerprint(), **{key: getattr(codec, key) for key in of_codec}, **more},
            "tokenizer": tokenizer.describe(),
            "text_format": cfg.text_format,
            "lowercase": cfg.lowercase,
            "speakers": speakers,
            "made_by": {"torch": torch.__version__, **{k: v for k, v in vars(cfg).items() if k not in of_place}},
        })  # fmt: skip


def show_cost(cfg, folder, cost):
    """What was written, and what it will cost to train on, as text."""
    meta = read_meta(folder)
    codec, pieces = meta["codec"], meta["tokenizer"]["vocab_size"]
    bits = codec["n_codebooks"] * math.log2(codec["codebook_size"]) * codec["frame_rate"]
    fewer = ", all that the texts support" if not cfg.tokenizer and pieces < cfg.vocab_size else ""
    size = sum(entry.stat().st_size for entry in os.scandir(folder)) / 1e6
    row = "  {:20}{utterances:10,}{frames:10,}{text_tokens:14,}"
    splits = [row.format(split, **counts) for split, counts in meta["splits"].items()]
    return "\n".join([
        "\n  split               utterances    frames   text tokens", *splits,
        f"\n  codec      {codec['name']}: {codec['n_codebooks']} codebooks of {codec['codebook_size']}, "
        f"{codec['frame_rate']:g} frames/s, {bits:,.0f} bit/s",
        f"  tokenizer  {pieces:,} pieces{fewer}",
        f"  an epoch   {cost['rows']:,} rows (frames and text tokens), about {cost['steps']:,} batches of max_tokens = "
        f"{cost['max_tokens']:,}",
        f"  disk       {size:.1f} MB in {cfg.data_dir}",
    ])  # fmt: skip


if __name__ == "__main__":
    configurator.run(main, __file__)

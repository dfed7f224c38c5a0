"""
Audio and transcripts -> token files, the folder that train.py reads.

    python prepare.py config/digits.py
    python prepare.py --sources=my/metadata.csv --data_dir=my/tokens

- Metadata of any common kind, tables and shards that hold the recordings, or codes that somebody made of them already:
  see parts/sources.py.
- The doctor: every utterance is listened to before anything is computed, and each one that is not used is named with
  its reason, on the screen and in report.json. A set with more than a share `max_bad` of such ones is refused.
- The split is a hash of the utterance's id: adding data never moves an utterance from train to val or back.
- All cores work, each on one utterance at a time, so that the files do not depend on how many cores there are; a codec
  with network weights encodes on a GPU in batches of like length, while the cores read ahead.
- The folder gets its name when it is whole. After a kill the next run starts over.
"""

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache

import numpy as np
import torch
from tqdm import tqdm

from codec import CODECS, PUBLISHED, load_codec, published_sizes
from data import TIMBRES, TokenWriter, read_meta
from parts import configurator
from parts.audio import audio_header, read_audio
from parts.files import locked, whole
from parts.sources import EXTENSIONS, SOMEBODY, fraction, load, read_sources, spellings, utterance_id
from parts.text import HuggingFace, SentencePiece, extend_tokenizer, load_tokenizer, normalise, train_tokenizer, wording

# from where to where
# A source is a metadata file, a table or tar shard that holds recordings or codes, a pattern such as "x/*.tar", a
# folder of the one or the others, or a dict with the path and any of these:
# {"path": "x/metadata.csv", "speaker": "anna", "filter": {"accent": "us|england"}, "cap": 1000, "name": "x"}.
# speaker: who speaks, whatever a column says, "speaker" where nothing says it; filter: for each column a regular
# expression that has to match the whole field; cap: how many utterances at most; name: put before the ids.
sources: str | dict | list = "data/digits"  # one source or a list of them
data_dir = "data/digits/tokens"  # token folder to write
overwrite = True  # replace an existing token folder, once the new one is whole
# codec
codec = "mel"  # which codec
codec_path = ""  # its tables or weights; empty: fit it on the training split (mel only)
codec_args: dict = {}  # options of the codec, such as {"n_codebooks": 8, "codebook_size": 256, "frame_rate": 12.5}
fit_seconds: "float > 0" = 3600.0  # how much audio the fit listens to
references = False  # write the features of the recordings too, for models that read a voice off them (XTTS)
# text
tokenizer = ""  # a sentencepiece .model, a tokenizer.json, XTTS's vocab.json; empty: train one on the training split
extend_vocab: "0 <= int <= 1000000" = 0  # further pieces for a tokenizer.json, learnt where it meets a new script
vocab_size: "1 <= int <= 1000000" = 1024  # of the tokenizer trained here; fewer where the texts do not support so many
lowercase = False  # lower-case the text
text_format = "[{speaker}]{text}"  # what the model reads: {text}, {speaker}, {language}; XTTS: "[en]{text}"
language = ""  # what stands for {language}
# split
heldout = ""  # file with the ids of the val split, one a line; empty: a share val_fraction by hash of the id
val_fraction: "0 <= float <= 1" = 0.02  # share of the utterances held out; 0: no val split
# what the doctor lets pass
min_seconds: "float >= 0" = 0.3  # shorter is too short
max_seconds: "float > 0" = 30.0  # longer is too long
min_level = -50.0  # dB of full scale that the loudest 20 ms have to reach, else it is silence
max_clipped: "0 <= float <= 1" = 0.01  # share of samples at full scale, above which it is clipping
min_chars_per_second: "float >= 0" = 1.0  # slower than anybody reads: audio and text do not belong together
max_chars_per_second: "float > 0" = 40.0  # faster than anybody reads
max_text_tokens: "int >= 0" = 0  # more is too much text; 0: no limit
max_bad: "0 <= float <= 1" = 0.1  # share of the utterances that may be at fault, else the set is refused; 1: never
trim_silence: "float >= 0" = 0.0  # seconds of silence to keep at each end; 0: all
# the run
workers: "0 <= int <= 1024" = 0  # processes; 0: one for each core
device = "auto"  # where codecs with network weights encode: cpu, cuda, cuda:1, mps, ...; auto: a GPU if there is one
batch_seconds: "float > 0" = 240.0  # audio in a batch there
seed: "0 <= int <= 4294967295" = 1337  # of the codec's fit
max_tokens: "int >= 1" = 8192  # train.py's batch: only to say how many steps an epoch will take

FOLDERS = ["", "wavs", "clips", "audio"]  # where the audio lies, seen from its metadata
NOT_WANTED = ("filtered out", "beyond the cap")  # what the sources' own keys leave out
BY_CHOICE = (*NOT_WANTED, "too long", "too short", "too much text")  # reasons that are no fault of an utterance
QUIET = 40.0  # dB below the loudest 20 ms: from there on it is silence at an end
LONG_SILENCE = 1.0  # seconds of it that are worth a word


# -----------------------------------------------------------------------------
# the split


def read_heldout(path, utterances):
    """The ids listed in the file `path`, written as in the sources or as in reports, or None where there is no file.
    Raises ValueError, before anything is trained on by mistake, where one of them is of no utterance."""
    if not path:
        return None
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = list(dict.fromkeys(name for line in file if (name := line.strip())))
    except UnicodeDecodeError:
        raise ValueError(f"heldout = {path} is not text in UTF-8") from None
    ids, folders = {u.id for u in utterances}, {os.path.dirname(u.source): u.source for u in utterances}
    places = [path, *folders.values()]
    found = {n: next((i for i in (n, *(utterance_id(n, place) for place in places)) if i in ids), None) for n in names}
    if unknown := [name for name in names if found[name] is None]:
        some = ", ".join(f"{name!r:.60}" for name in unknown[:3])
        more = " and others" if len(unknown) > 3 else ""
        raise ValueError(f"heldout = {path}: {len(unknown)} of its {len(names)} ids are of no utterance: {some}{more}; "
                         f"an id is {utterances[0].id!r:.60}, for example")  # fmt: skip
    return set(found.values())


def divide(utterances, cfg, listed):
    """The utterances in use, those of them to train on, and the ids of the others."""
    used = [u for u in utterances if not u.reason]
    val = held_out(used, listed, cfg.val_fraction)
    return used, [u for u in used if u.id not in val], val


def held_out(utterances, listed, val_fraction):
    """The ids of the val split: those `listed`, where that is not None, else those that hash below val_fraction.
    Raises ValueError where that leaves a split empty, but for the val split of a val_fraction of 0."""
    if listed is not None:
        val = {u.id for u in utterances if u.id in listed}
        advice = f"none of the {len(listed)} ids of heldout is of an utterance that can be used"
    else:
        val = {u.id for u in utterances if fraction(u.id) < val_fraction}
        enough = math.ceil(1000 * min(fraction(u.id) for u in utterances) + 1e-6) / 1000
        advice = f"val_fraction = {val_fraction} holds out none of {len(utterances)}; --val_fraction=0 does without"
        if any(fraction(u.id) >= enough for u in utterances):
            advice += f", --val_fraction={enough} would hold out one"
    if not val and (val_fraction or listed is not None):
        raise ValueError(f"the val split is empty: {advice}")
    if len(val) == len(utterances):
        raise ValueError(f"the train split is empty: all of the {len(val)} usable utterances are held out")
    return val


def tell_split(utterances, cfg, listed):
    """What one may want to know about the split, as lines."""
    used, train, val = divide(utterances, cfg, listed)
    if lost := (listed or set()) - {u.id for u in used}:
        some = ", ".join(f"{u.id} ({u.reason})" for u in utterances if u.id in lost and u.reason)
        yield f"{len(lost)} of the {len(listed)} ids of heldout cannot be used: {some:.200}"
    if strange := sorted({u.speaker for u in used if u.id in val} - {u.speaker for u in train}):
        some = ", ".join(strange[:5])
        yield f"{len(strange)} speakers of the val split are not in the train split: {some:.200}"


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


def in_order(what, pool, function, utterances, *args, chunk=8, order=None):
    """function(some of the utterances, *args) -> list, called in the pool; yields the results one by one in their
    order, or in another, given as indices, behind a progress bar. A bounded number of calls is under way, so a long
    list costs no memory."""
    rest, waiting = load(utterances), deque()
    if order:
        rest = put_back(np.argsort(order).tolist(), rest)
    try:
        with tqdm(desc=what.ljust(14), total=len(utterances), unit=" utt", disable=None) as bar:
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


def recording(u):
    """What read_audio takes for an utterance: a path, or the bytes that its source holds."""
    if not u.content:
        return u.audio
    held = io.BytesIO(u.content)
    held.name = u.audio or u.id
    return held


def examine(utterances, limits):
    """Listen to utterances: the same, with their length, and a reason where one is unfit."""
    for u in utterances:
        u.reason, u.detail = (u.row >= 0 and find(u)) or listen(u, limits)
        u.content = None
    return utterances


def locate(utterances):
    """The utterances with the paths of their recordings, and a reason where one has none."""
    for u in utterances:
        u.reason, u.detail = find(u) or ("", "")
    return utterances


def find(u):
    """Set `audio` to the path of the recording, where that is a file; returns what is wrong if there is none."""
    places = [os.path.join(os.path.dirname(u.source), sub, name) for name in spellings(u.audio) for sub in FOLDERS]
    endings = ["", *(f".{e}" for extension in EXTENSIONS for e in (extension, extension.upper()))]
    path = u.audio if u.content else next((p + e for p in places for e in endings if os.path.isfile(p + e)), None)
    if path is None:
        return "missing file", f"{places[0]:.200}"
    u.audio = path


def listen(u, limits):
    """What is wrong with a recording, as (reason, detail), or two empty strings. Sets its `seconds`, the `silence` at
    its ends and, where that is to be trimmed, `start` and `end`."""
    source = recording(u)
    try:
        header = audio_header(source)
        u.seconds = max(0.0, (header.seconds if u.end is None else min(u.end, header.seconds)) - u.start)
        unfit = misfit(u, limits)
        if unfit[0] in ("too long", "too short", "empty audio") and not header.missing:  # before hours of it are read
            return unfit
        wav = read_audio(source, header.rate, u.start, u.end).numpy()
    except (ValueError, OSError) as error:
        says = " ".join(str(error).split())
        return "NaN" if "NaN or infinite" in says else "unreadable file", says
    step = min(len(wav), max(1, header.rate // 50))
    power = np.square(wav[: len(wav) // step * step].reshape(-1, step)).mean(1)
    level, clipped = 10 * math.log10(power.max() + 1e-20), (np.abs(wav) >= 0.99).mean()
    if level < limits["min_level"]:
        return "silence", f"{level:.0f} dB at its loudest"
    if clipped > limits["max_clipped"]:
        return "clipping", f"{clipped:.1%} of its samples"
    loud = np.flatnonzero(power >= power.max() * 10 ** (-QUIET / 10))
    trim(u, loud[0] * step / header.rate, (len(wav) - (loud[-1] + 1) * step) / header.rate, limits["trim_silence"])
    return misfit(u, limits)


def trim(u, before, after, keep):
    """Note the seconds of silence before and after an utterance; where `keep` is not 0, leave so many at each end."""
    if keep:
        u.end = u.start + u.seconds - max(0.0, after - keep)
        u.start += max(0.0, before - keep)
        u.seconds = u.end - u.start
        before, after = min(before, keep), min(after, keep)
    u.silence = float(max(before, after))


def misfit(u, limits):
    """What the length of an utterance says against it, as (reason, detail), or two empty strings."""
    if u.seconds < 1e-4:  # which is a sample or two
        return "empty audio", f"nothing after {u.start:g} s"
    if u.seconds > limits["max_seconds"]:
        return "too long", f"{u.seconds:.1f} s"
    if u.seconds < limits["min_seconds"]:
        return "too short", f"{u.seconds:.2f} s"
    speed = len(u.text) / u.seconds
    if not limits["min_chars_per_second"] <= speed <= limits["max_chars_per_second"]:
        return "impossible speed", f"{speed:.1f} characters a second"
    return "", ""


def compare(u, codec):
    """What says that the codes of an utterance are not the codec's, as (reason, detail), or None. Sets its `seconds`.
    Residual codebooks may be more than the codec is to have, as the first of them say the most; others may not."""
    frames, books, low, high = u.codes
    u.seconds = frames / codec.frame_rate
    least = most = codec.n_codebooks
    if codec.residual and codec.name in PUBLISHED:
        most = max(least, published_sizes(codec.name)["n_codebooks"])
    if not least <= books <= most:
        wanted = least if least == most else f"{least} to {most}"
        return "bad codes", f"{frames} frames of {books} codebooks, and {codec.name} has {wanted}"
    if not 0 <= low <= high < codec.codebook_size:
        wrong = low if low < 0 else high
        return "bad codes", f"{wrong} is among them, and those of {codec.name} are 0 to {codec.codebook_size - 1}"


def look_over(utterances, cfg, pool, tokenizer, codec):
    """Give each utterance the path of its recording, or the reason that can be told without listening to it.
    `tokenizer` may be None yet."""
    seen = set()
    for u in utterances:
        if not u.reason:
            u.reason = "duplicate id" if u.id in seen else ""
            seen.add(u.id)
        if not u.reason and not sound_id(u.id):
            u.reason, u.detail = "bad row", f"its id {u.id!r:.60} cannot be written to a line of a text file"
    if tokenizer:
        proofread(utterances, cfg, tokenizer)
    for u in utterances:
        if u.codes and not u.reason:
            u.reason, u.detail = compare(u, codec) or misfit(u, vars(cfg))
    outside = [i for i, u in enumerate(utterances) if not u.codes and u.row < 0 and not u.reason]
    update(utterances, outside, "finding files", pool, locate, chunk=256)


def sound_id(name):
    return not any(c in name for c in "\r\n") and name.encode(errors="replace").decode() == name


def diagnose(utterances, cfg, pool):
    """Listen to the utterances: each gets its length, or the reason why it cannot be used."""
    recorded = [i for i, u in enumerate(utterances) if not u.codes and not u.reason]
    update(utterances, recorded, "listening", pool, examine, vars(cfg))


def update(utterances, which, what, pool, function, *args, chunk=8):
    """Replace the utterances of the indices `which` by what in_order makes of them."""
    made = in_order(what, pool, function, [utterances[i] for i in which], *args, chunk=chunk)
    for i, u in zip(which, made, strict=True):
        utterances[i] = u


def proofread(utterances, cfg, tokenizer):
    """Give each utterance a reason whose text the tokenizer does not know, or makes too much or an early end of."""
    strange = tokenizer.unknown("".join({character for u in utterances for character in u.text}))
    for u in utterances:
        if u.reason:
            continue
        ids = tokenizer.encode(said(u, cfg))
        unknown = strange.intersection(u.text)
        if unknown or tokenizer.unk_id in ids:  # the second where a speaker's tag is what it does not know
            unknown = unknown or tokenizer.unknown(said(u, cfg))
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
        "silent_ends": sum(u.silence > LONG_SILENCE for u in used),
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
    if findings["silent_ends"]:
        some = f"{findings['silent_ends']:,} utterances have more than {LONG_SILENCE:g} s of silence at an end"
        lines.append(f"\n  {some}; --trim_silence=0.3 would leave 0.3 s")
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
    """Raise ValueError where too many utterances are at fault, or all of a speaker are, or none is left. The report
    then says which."""
    judged = [u for u in utterances if u.reason not in BY_CHOICE]
    bad = [u for u in judged if u.reason]
    if len(bad) == len(judged):
        bad = [u for u in utterances if u.reason not in NOT_WANTED] or utterances
        problem, limit = f"{len(bad)} of {len(bad)} utterances cannot be used", "none is left"
    elif len(bad) > cfg.max_bad * len(judged):
        problem = f"{len(bad)} of {len(judged)} utterances cannot be used"
        limit = f"max_bad = {cfg.max_bad} allows fewer"
    elif cfg.max_bad < 1 and (lost := lost_speaker(utterances)):
        problem = f"speaker {lost[0].speaker!r:.60} is lost, all of {len(lost)} utterances cannot be used"
        bad, limit = lost, "leave the speaker out by a filter, or let it go with --max_bad=1"
    else:
        return
    with whole(report_path, "w") as file:
        json.dump(report(utterances), file, indent=1, ensure_ascii=False)
    counts = ", ".join(f"{n} {reason}" for reason, n in Counter(u.reason for u in bad).most_common(4))
    example = f"for example {bad[0].id:.60}: {bad[0].reason} {bad[0].detail:.120}".rstrip()
    raise ValueError(f"{problem} ({counts}), {limit}; {example}; see {report_path}")


def lost_speaker(utterances):
    """The utterances of a speaker of whom none is left, because all that were wanted are at fault; else None."""
    of_speaker = defaultdict(list)
    for u in utterances:
        if u.reason not in NOT_WANTED:
            of_speaker[u.speaker].append(u)
    faulty = (us for us in of_speaker.values() if all(u.reason and u.reason not in BY_CHOICE for u in us))
    return next(faulty, None)


# -----------------------------------------------------------------------------
# text and codes


def said(u, cfg):
    return wording(cfg.text_format, u.speaker, u.text, cfg.language)


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


def find_tags(cfg, utterances):
    """What text_format puts around the texts, each speaker's tag for example."""
    around = {wording(cfg.text_format, name, "\0", cfg.language) for name in {u.speaker for u in utterances}}
    return sorted({part.strip() for both in around for part in both.split("\0")} - {""})


def need_pieces(cfg, train, given):
    """Refuse, before hours of listening, a vocabulary too small for the texts, or one that cannot grow by them."""
    characters = set().union(*(u.text for u in train))
    least = 259 + len(find_tags(cfg, train)) + len(characters)  # 256 bytes, <unk>, <s>, </s>
    if given is None and cfg.vocab_size < least:
        raise ValueError(f"vocab_size = {cfg.vocab_size} is too small: bytes, characters and speaker tags alone need "
                         f"{least}")  # fmt: skip
    if cfg.extend_vocab and not given.unknown("".join(characters)):
        raise ValueError(f"extend_vocab = {cfg.extend_vocab}: {cfg.tokenizer} knows all characters of the texts")


def make_tokenizer(cfg, train, given=None):
    """A tokenizer trained on the training texts, or one given and extended by them, in which what text_format puts
    around a text, such as each speaker's tag, is one token."""
    tags = find_tags(cfg, train)
    if given is None:
        model = train_tokenizer([said(u, cfg) for u in train], cfg.vocab_size, tags)
        return load_tokenizer(SentencePiece.kind, model)
    tokenizer = load_tokenizer(given.kind, extend_tokenizer(given, [u.text for u in train], cfg.extend_vocab, tags))
    new = given.unknown("".join({character for u in train for character in u.text}))
    print(f"{cfg.tokenizer}: {tokenizer.vocab_size - given.vocab_size} pieces more; new to it: {' '.join(sorted(new))}")
    return tokenizer


def open_codec(cfg):
    """The codec, and None or the error that says where to get its weights: codes made elsewhere need only its sizes."""
    try:
        return load_codec(cfg.codec, cfg.codec_path or None, **cfg.codec_args), None
    except TypeError as error:
        raise ValueError(f"codec_args = {cfg.codec_args}: {error}") from None
    except FileNotFoundError as error:
        if cfg.codec_path or cfg.codec not in PUBLISHED:
            raise
        return CODECS[cfg.codec].without_weights(**cfg.codec_args), error


def need_sound(utterances, cfg, codec, missing):
    """Refuse what needs recordings where there are codes, and what needs the codec where there are recordings."""
    coded = next((u.source for u in utterances if u.codes), None)
    if coded and cfg.references:
        raise ValueError(f"references = True: {coded} has codes, and no recordings to hear a voice in")
    if coded and not codec.fitted:
        raise ValueError(f"{coded} has codes: which {cfg.codec} made them? Name its tables with codec_path")
    if missing and any(not u.codes and not u.reason for u in utterances):
        raise missing
    if missing:
        print(f"the codes are taken as they are; for training, fetch the codec ({missing})")


def fit_codec(codec, cfg, train, pool):
    """Fit a codec that needs it on `fit_seconds` of the training split."""
    seconds, heard = 0.0, {}
    for u in sorted(train, key=lambda u: fraction(f"{cfg.seed} {u.id}")):  # drawn from everywhere in the set
        if seconds < cfg.fit_seconds:
            heard[u.id] = u
            seconds += u.seconds
    heard |= {u.id: u for u in load([u for u in train if u.id in heard])}  # in the order of the sources
    wavs = in_order(f"fitting {cfg.codec}", pool, read, list(heard.values()), codec.sample_rate)
    codec.fit(map(torch.from_numpy, wavs), seed=cfg.seed)


def read(utterances, sample_rate):
    return [read_audio(recording(u), sample_rate, u.start, u.end).numpy() for u in utterances]


worker_codec = lru_cache(maxsize=1)(load_codec)


def encode(utterances, name, path):
    """Codes (T, K) of each utterance, one at a time, so that none depends on its neighbours."""
    codec = worker_codec(name, path)
    wavs = read(utterances, codec.sample_rate)
    return [codec.encode(torch.from_numpy(wav)[None])[0].T.numpy().astype(np.int32) for wav in wavs]


def features(utterances, name, path):
    """What the codec lets a model read of each recording's voice: (T * r, M), and its vocoder, if any: (E,)."""
    codec, heard = worker_codec(name, path), []
    for wav in read(utterances, codec.sample_rate):
        wav = torch.from_numpy(wav)[None]
        timbre = codec.timbre(wav)[0].numpy() if hasattr(codec, "timbre") else None
        heard.append((codec.reference(wav)[0].numpy().astype(np.float16), timbre))
    return heard


def longest_first(utterances, window=256):
    """The order to encode in: by length, so that batches hold little padding and no core ends with a long one alone;
    in windows, so that few wait for their turn."""
    n = len(utterances)
    windows = [range(first, min(first + window, n)) for first in range(0, n, window)]
    return [i for these in windows for i in sorted(these, key=lambda i: -utterances[i].seconds)]


def put_back(order, things):
    """Things that come in this order of their indices, in the order of the indices."""
    waiting, n = {}, 0
    for i, thing in zip(order, things, strict=True):
        waiting[i] = thing
        while n in waiting:
            yield waiting.pop(n)
            n += 1


def encode_all(codec, utterances, pool, device, folder, batch_seconds):
    """Codes (T, K) of each utterance, in order. `folder` holds the codec: on a CPU each core encodes with its own, one
    utterance at a time; on another `device` it encodes batches, which the cores read ahead."""
    order, what = longest_first(utterances), f"encoding {codec.name}"
    if device.type == "cpu":
        chunk = 1 if list(codec.parameters()) else 8
        return put_back(order, in_order(what, pool, encode, utterances, codec.name, folder, chunk=chunk, order=order))
    wavs = in_order(what, pool, read, utterances, codec.sample_rate, order=order)
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
        raise ValueError(f"device = {name!r} cannot be used: {(str(error).splitlines() or ['?'])[0]}") from None
    return device


# -----------------------------------------------------------------------------
# the run


def check(cfg, folder, codec):
    """Refuse, before hours of work, settings that cannot be meant and a folder that cannot be written."""
    cfg.language = normalise(cfg.language)
    wording(cfg.text_format, language=cfg.language)  # refuses what is no text_format
    if cfg.language and wording(cfg.text_format, language="a") == wording(cfg.text_format, language="b"):
        raise ValueError(f"language = {cfg.language!r:.60}: text_format = {cfg.text_format!r:.60} has no {{language}}")
    if not cfg.sources or not cfg.data_dir:
        raise ValueError("what to read and where to write? --sources=my/metadata.csv --data_dir=my/tokens")
    if cfg.references and not hasattr(codec, "reference"):
        raise ValueError(f"references = True: the codec {codec.name} has no features to read a voice off")
    if cfg.extend_vocab and not cfg.tokenizer:
        raise ValueError(f"extend_vocab = {cfg.extend_vocab}: there is no tokenizer to extend, name its tokenizer.json")
    present = os.listdir(folder) if os.path.isdir(folder) else ["a file"] * os.path.lexists(folder)
    if present and not {"meta.json", "train.index.npy"} <= set(present):
        raise ValueError(f"data_dir {folder} is no token folder, and would be replaced by one: choose another")
    if present and not cfg.overwrite:
        raise ValueError(f"data_dir {folder} holds token files already: --overwrite replaces them")
    with locked(folder + ".partial"), contextlib.suppress(OSError):  # of leftovers, which stay until there are others
        os.rmdir(folder + ".partial")


def idle_keys(cfg, codec):
    """{key: why} of the keys that have no effect with this codec and these settings."""
    idle = {}
    if getattr(codec, "fitted", True):
        idle["fit_seconds"] = f"the codec {codec.name} is not fitted here"
    if not list(codec.parameters()):
        idle["batch_seconds"] = f"the codec {codec.name} encodes without batches"
    if cfg.heldout:
        idle["val_fraction"] = f"heldout = {cfg.heldout!r:.60} names the val split"
    if cfg.tokenizer and cfg.given.get("vocab_size") not in cfg.files:  # a recipe may say it for dry runs
        idle["vocab_size"] = f"tokenizer = {cfg.tokenizer!r:.60} has a vocabulary of its own"
    return idle


def main(cfg):
    folder = os.path.realpath(cfg.data_dir)
    codec, missing = open_codec(cfg)
    configurator.refuse_idle(cfg, idle_keys(cfg, codec))
    check(cfg, folder, codec)
    given, utterances, nameless = read_tokenizer(cfg) if cfg.tokenizer else None, [], []
    tokenizer = None if cfg.extend_vocab else given
    for found in read_sources(cfg.sources, cfg.lowercase):
        files = len({u.source for u in found})
        print(f"{f'{files:,} files like ' if files > 1 else ''}{found[0].source}: {len(found):,} utterances")
        utterances += found
        nameless += [found[0].source] if any(u.speaker == SOMEBODY for u in found) else []
    if len(nameless) > 1:
        print(f"one voice, as no speaker is named: {', '.join(nameless):.300}; a source's speaker tells them apart")
    need_sound(utterances, cfg, codec, missing)
    listed, problems = read_heldout(cfg.heldout, utterances), folder + ".report.json"
    if any(not u.codes for u in utterances):
        encode_device(codec, cfg.device)  # refuses one that cannot be used
    pool = start_pool(cfg.workers)
    try:
        with TokenWriter(folder, references=cfg.references) as out:
            look_over(utterances, cfg, pool, tokenizer, codec)
            judge(utterances, cfg, problems)  # what can be refused is refused before hours of listening
            train = divide(utterances, cfg, listed)[1]
            if tokenizer is None:
                need_pieces(cfg, train, given)
            diagnose(utterances, cfg, pool)
            judge(utterances, cfg, problems)
            if tokenizer is None:
                tokenizer = make_tokenizer(cfg, divide(utterances, cfg, listed)[1], given)
                proofread(utterances, cfg, tokenizer)
                judge(utterances, cfg, problems)
            findings = report(utterances)
            print(show(findings))
            used, train, val = divide(utterances, cfg, listed)
            for line in tell_split(utterances, cfg, listed):
                print(line)
            if not getattr(codec, "fitted", True):
                fit_codec(codec, cfg, train, pool)
            write(cfg, out, pool, used, val, tokenizer, codec, findings)
    finally:
        pool.shutdown(cancel_futures=True)
    if os.path.exists(problems):
        os.remove(problems)
    print(show_cost(cfg, folder, findings["cost"]))


def get_codes(cfg, pool, used, codec, folder):
    """Codes (T, K) of each utterance: those that its source holds, or what the codec in `folder` makes of it."""
    recorded, coded = [u for u in used if not u.codes], [u for u in used if u.codes]
    held = load(tqdm(coded, "reading codes ", unit=" utt", disable=None if coded else True))
    made = iter(())
    if recorded:
        made = encode_all(codec, recorded, pool, encode_device(codec, cfg.device), folder, cfg.batch_seconds)
    return (next(held).content[:, : codec.n_codebooks] if u.codes else next(made) for u in used)


def write(cfg, out, pool, used, val, tokenizer, codec, findings):
    """Encode everything into the token folder `out`, in the order of the metadata."""
    speakers = list(findings["speakers"])  # most heard first
    out.text_dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    torch.save(codec.pack(), packed := io.BytesIO())
    out.file("codec.pt", packed.getvalue())  # torch.save itself has no plain error for a full disk
    out.file(tokenizer.file, tokenizer.model)
    codes = get_codes(cfg, pool, used, codec, out.partial)
    heard, timbres = itertools.repeat((None, None), len(used)), [[] for _ in speakers]
    if cfg.references:
        heard = in_order("listening to the voices", pool, features, used, codec.name, out.partial)
    for u, c, (reference, timbre) in zip(used, codes, heard, strict=True):
        split, text = "val" if u.id in val else "train", tokenizer.encode(said(u, cfg))
        out.add(split, u.id, text, c, speakers.index(u.speaker), reference)
        if timbre is not None:
            timbres[speakers.index(u.speaker)].append(timbre)
    if any(timbres):  # of each speaker the mean, as XTTS takes it of several recordings
        np.save(packed := io.BytesIO(), np.stack([np.mean(of_one, 0) for of_one in timbres]))
        out.file(TIMBRES, packed.getvalue())
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
        "language": cfg.language,
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

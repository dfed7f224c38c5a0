"""A model with all it needs to speak: `Voice`, from a checkpoint or from published weights.

    voice = Voice.from_checkpoint("out/digits/best.pt").ready()
    wav = voice.say("three one four", speaker="slt")                  float32 (N,) at voice.sample_rate
    for i, said in voice.speak(["three one", "four"]): said.wav       several at a time, in the order they are done
    heard = voice.listen("me.wav")                                    once, for any number of texts
    for piece in voice.stream("my clone", reference=heard, reference_text="what I say in it"): ...

- Before it speaks, a model is checked: cached generation must equal teacher forcing on an utterance that its checkpoint
  holds, for published weights on a made-up one.
- `frames` yields frames as the model makes them. Streaming decodes them block by block, with context on both sides;
  without streaming all are decoded at once. Both ways decode the same codes.
- A frame is K codes for a codec to decode. For XTTS-v2's vocoder it is the hidden state (D,) that predicted the code,
  and the timbre comes from the reference recording.

Letters in shapes: n text ids or samples, K codebooks, T frames, N samples.
"""

import difflib
import hashlib
import itertools
import math
import os
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
import torch

from codec import load_codec
from data import MODEL_META, completed
from model import contract_check, field_names
from parts import configurator, lora, peft
from parts.align import align
from parts.audio import longest_silence, read_audio, sounding
from parts.files import NUMBER, need
from parts.frontend import language_name, read_text
from parts.joining import joined
from parts.sentences import split_text
from parts.tensors import UNBUILT, fault, pick_device, read_vector, reason
from parts.text import is_phonemic, load_tokenizer, wording, words_of
from parts.voices import load_voice
from released import made_up, open_release, with_tags
from speak import ENDED, Engine, Utterance, ready
from weights import WHOLE, add_peft, load_checkpoint, load_model

# how a text is spoken
temperature: "float | None >= 0" = None  # 0: likeliest code; None, here and below: as in training, or the family's
top_k: "int | None >= 0" = None  # draw among the k likeliest codes; 0: all
top_p: "0 < float | None <= 1" = None  # draw among the likeliest codes that make up this share of the probability
min_p: "0 <= float | None <= 1" = None  # draw among codes at least so many times as likely as the likeliest; 0: all
repetition_penalty: "float | None > 0" = None  # makes codes spoken before less likely; 1: off
repetition_decay: "float | None >= 0" = None  # weakens the penalty of a code last spoken n frames ago to 1 / n ** decay
speed: "0.05 <= float <= 20" = 1.0  # of speech by XTTS-v2's vocoder; 2: in half the time
cap_seconds: "0 <= float <= 86400" = 0.0  # longest utterance; 0: 1 s plus three times the usual for the text
dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights; in training of the arithmetic

LONGEST = 20.0  # seconds of speech that a model makes well at a time; a longer text is divided
LONGEST_AT_ONCE = 3.0  # likewise, of a stream by a model that makes all frames of a piece at once
SKIPPED = "skipped text"  # faults that attention tells, see parts/align.py
TWICE = "repeated text"
SILENT = "silence"  # a fault: within an utterance, longer than
SILENCE = 2.0  # seconds
LEAST_REFERENCE = 0.1  # seconds
MOST_REFERENCE = 300.0
DRAWS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "repetition_decay")


@dataclass
class Said:
    """A text that was spoken: wav (N,) float32 on the CPU, its number of frames, whether the model ended it by itself,
    and what is wrong with it; `tries` has the faults of every try; the pieces of the text, the Spoken of each; and the
    words with their times, [(word, start, end)] in seconds."""

    wav: torch.Tensor
    frames: int
    ended: bool
    faults: list
    tries: list
    pieces: list
    spoken: list
    words: list


@dataclass
class Text:
    """A text that is being spoken: its pieces, the settings of `plan`, the Spoken of each complete piece."""

    pieces: list
    settings: dict
    spoken: dict = field(default_factory=dict)


class Voice:
    """A model with all it needs to speak: `frames` yields codes, `say` returns the wav, `stream` yields it in pieces.

    meta: the meta.json of the token folder that the model was trained on. config: the keys of the training run, the
    defaults of temperature and the like. references (speakers, R, M) and timbres (speakers, E): each speaker's own, for
    a model that reads the voice from a recording and for its vocoder; or voices {speaker: (latents (L, D), timbre)},
    already read. The wav has `sample_rate`. After an utterance, `stopped` tells whether the model ended it by itself.
    """

    def __init__(self, model, codec, tokenizer, meta, config=None, references=None, timbres=None, voices=None):
        self.model = model
        self.codec = codec
        self.vocoder = model.vocoder and codec.vocode is not None
        self.sample_rate = codec.vocoder_rate if self.vocoder else codec.sample_rate
        self.device = next(model.parameters()).device
        self.stopped = None
        self.adapted = {}
        self.engine = None
        self.n_codebooks = 0
        self.fixed = False
        self.take(tokenizer, meta, config, references, timbres, voices)

    def take(self, tokenizer, meta, config=None, references=None, timbres=None, voices=None):
        """Take over what belongs to a run of training: the voice's own, or that of an adapter."""
        self.own = tokenizer, meta, config, references, timbres, voices
        self.tokenizer = tokenizer
        self.meta = completed(meta)
        self.references = references
        self.timbres = timbres
        self.voices = voices or {}
        self.trained_with = {key: value for key, value in (config or {}).items() if value is not None}
        self.reference_seconds = self.trained_with.get("reference_seconds", [3.0, 6.0])
        self.prompted = self.trained_with.get("voice_prompt", 1) > 0  # whether training had prompts

    @property
    def draw(self):
        """How the model draws unless it is told otherwise: as in training, or as its authors do."""
        return {key: self.trained_with.get(key, usual) for key, usual in self.model.draw.items()}

    @classmethod
    def from_checkpoint(cls, path, device="auto", codec_path="", dtype="float32", **changes):
        """The voice of a checkpoint, after its contract check, whose result is `report`. changes: fields of the model's
        config to set, such as the rounds of demasking; None leaves them; also `base`, see weights.load_model. Raises
        ValueError or OSError."""
        check_settings(dtype=dtype)
        device = pick_device(device)
        checkpoint = load_checkpoint(path, needed=WHOLE)
        codec, *own = read_run(checkpoint, codec_path)
        model = load_model(checkpoint, device, getattr(torch, dtype), **changes)
        voice = cls(model, codec.to(device), *own)
        voice.check(path, checkpoint)
        return voice

    @classmethod
    def from_published(cls, path, device="auto", codec_path="", dtype="float32", **given):
        """The voice of published weights, a file or folder, after a contract check, whose result is `report`. given:
        further arguments of released.open_release. Raises ValueError or OSError."""
        check_settings(dtype=dtype)
        device = pick_device(device)
        dtype = getattr(torch, dtype)
        model, codec, tokenizer, meta, voices = open_release(path, device, dtype, codec_path=codec_path, **given)
        voice = cls(model, codec.to(device), tokenizer, meta, voices=voices)
        voice.check(path)
        return voice

    def check(self, path, checkpoint=None):
        """Check the parts of a checkpoint, and the contract, whose result is `report`: on the probe of the checkpoint,
        without one on a made-up utterance. Raises ValueError."""
        try:
            self.check_parts()
            probe = read_probe(checkpoint["probe"], self.model) if checkpoint else made_up(self.model)
        except UNBUILT as error:
            raise ValueError(f"{path} is damaged: {reason(error)}") from None
        try:
            self.report = {**contract_check(self.model, **probe), "iter": checkpoint and checkpoint["iter"]}
        except UNBUILT as error:
            raise ValueError(f"{path}: {reason(error)}") from None

    def check_parts(self):
        """Raise ValueError where model, codec, tokenizer and the speakers' voices do not belong together."""
        c = self.model.config
        speakers = len(self.meta["speakers"])
        if (self.codec.n_codebooks, self.codec.codebook_size) != (c.n_codebooks, c.codebook_size):
            raise ValueError(f"the model speaks in {c.n_codebooks} codebooks of {c.codebook_size}, its codec in "
                             f"{self.codec.n_codebooks} of {self.codec.codebook_size}")  # fmt: skip
        if self.tokenizer.vocab_size > c.text_vocab_size:
            raise ValueError(f"the model knows {c.text_vocab_size} text ids, its tokenizer {self.tokenizer.vocab_size}")
        for name, voices, ndim in (("references", self.references, 3), ("timbres", self.timbres, 2)):
            if voices is None or not self.model.reference:
                continue
            if voices.ndim != ndim or len(voices) < speakers or not voices.is_floating_point():
                raise ValueError(f"{name} of shape {tuple(voices.shape)} are not those of {speakers} speakers")
            if words := fault(voices):
                raise ValueError(f"{name} {words}")

    def adapt(self, path):
        """Speak with another adapter on the same base from now on: that of a LoRA checkpoint, with the settings,
        tokenizer and speakers of its run, or one in a folder of peft's.

        Each file is read once; switching back costs nothing. Raises ValueError or FileNotFoundError.
        """
        new = path not in self.adapted
        if self.fixed:
            raise ValueError(f"{path}: the model has been made ready to speak fast: take the adapter before")
        self.engine = None  # what it keeps of a voice is the other adapter's
        if new:
            checkpoint = None if peft.is_adapter(path) else load_checkpoint(path, needed=WHOLE)
            self.adapted[path] = self.read_adapter(path, checkpoint)
        name, settings, own = self.adapted[path]
        lora.use_adapter(self.model, name)
        vars(self.model.config).update(settings)  # the same object, to which the model's layout belongs
        self.take(*own)
        if new:
            self.check(path, checkpoint)

    def read_adapter(self, path, checkpoint):
        """Add the adapter of a checkpoint, None: in a folder of peft's. Returns its name in the model, the fields of
        the model's config with it, and the arguments of `take`. Raises ValueError or FileNotFoundError."""
        config = self.model.config
        name = f"adapter-{len(self.adapted)}"
        if checkpoint is None:
            add_peft(self.model, path, name)
            return name, dict(vars(config)), self.own
        if not checkpoint["base"]:
            raise ValueError(f"{path} holds no adapter, but a whole model: give it as ckpt")
        if checkpoint["codec_fingerprint"] != self.codec.fingerprint():
            raise ValueError(f"{path} speaks in the codes of another codec: give it as ckpt")
        _, *own = read_run(checkpoint, codec=self.codec)
        try:
            known = field_names(config) & checkpoint["model_config"].keys()
            settings = replace(config, **{key: checkpoint["model_config"][key] for key in known})
            lora.load_adapter(self.model, checkpoint["ema"] or checkpoint["model"], name)
        except UNBUILT as error:
            raise ValueError(f"{path}, an adapter on {checkpoint['base']}: {reason(error)}") from None
        return name, vars(settings), own

    def text_ids(self, text, speaker="", language=""):
        """Ids (n,) of a text as token files hold them. Raises ValueError for a text that is empty, has characters the
        tokenizer lacks, or has letters where it reads phonemes, and for an unknown speaker or language."""
        return np.array(self.tokenizer.encode(self.worded(text, speaker, language)[0]))

    def worded(self, text, speaker="", language=""):
        """What the model reads for a text, the words and all, and where the words stand in it, (begin, end). Raises
        ValueError as text_ids does."""
        language = self.known_language(language)
        words = read_text(text, self.meta["front_end"], language, self.meta["lowercase"])
        if not words.strip():
            raise ValueError("the text is empty")
        speaker = self.known_speaker(speaker)
        if self.tokenizer.phonemic and self.meta["front_end"] != "phonemes" and not is_phonemic(words):
            raise ValueError(f"the tokenizer reads phonemes, and the text {words!r:.60} has letters: write it in "
                             "phonemes, or prepare the data with --front_end=phonemes")  # fmt: skip
        if unknown := self.tokenizer.unknown(words):
            some = " ".join(sorted(unknown)[:12])
            raise ValueError(f"{words!r:.60} has characters the tokenizer does not know: {some}")
        begin = wording(self.meta["text_format"], speaker, "\0", language).index("\0")  # no text has it
        return wording(self.meta["text_format"], speaker, words, language), (begin, begin + len(words))

    def owned(self, text, n, speaker="", before="", language=""):
        """The words of a text that have ids, and for each of its n ids the number of its word (n,), -1: none. They are
        spelt as in the text, or as the model reads them where these are another number. before: a text that is read
        with it."""
        whole, part = self.worded(f"{before} {text.strip()}" if before else text, speaker, language)
        places = words_of(whole, *part)
        if before:
            said, part = self.worded(before, speaker, language)
            places = places[len(words_of(said, *part)) :]
        owner = self.tokenizer.owners(whole, places)[-n:]
        read, spelt = ([y[i:j] for i, j in at] for y, at in ((whole, places), (text, words_of(text))))
        known = np.unique(owner[owner >= 0])
        words = spelt if len(spelt) == len(read) else read
        return [words[i] for i in known], np.where(owner >= 0, np.searchsorted(known, owner), -1)

    def known_language(self, language):
        """A language that the model knows, as the training data spell it, the first one of them where it is empty.
        Raises ValueError for an unknown one."""
        known = {language_name(name): name for name in [*self.model.config.language_names, *self.meta["languages"]]}
        if language and language_name(language) not in known:
            choices = f"choose from {', '.join(known)}" if any(known) else "the training data name none"
            raise ValueError(f"unknown language {language!r:.60}; {choices}")
        return known[language_name(language)] if language else self.meta["languages"][0]

    def known_speaker(self, speaker):
        """The speaker of that name, the first one where it is empty. Raises ValueError for an unknown one."""
        speakers = self.meta["speakers"]
        if speaker and speaker not in speakers:
            near = difflib.get_close_matches(speaker, speakers, len(speakers), 0)[:12]  # the most similar first
            more = f" and {len(speakers) - len(near)} more" if len(speakers) > len(near) else ""
            raise ValueError(f"unknown speaker {speaker!r}; choose from {', '.join(near)}{more}")
        return speaker or speakers[0]

    def read(self, path):
        """A recording of a voice, wav (1, N) at the codec's rate. Raises ValueError for one too short or too long."""
        wav = read_audio(path, self.codec.sample_rate, max_seconds=MOST_REFERENCE)[None].to(self.device)
        if wav.shape[1] < LEAST_REFERENCE * self.codec.sample_rate:
            raise ValueError(f"{path}: shorter than {LEAST_REFERENCE} s, too short to clone a voice from")
        return wav

    def read_speaker(self, path):
        """The speaker vector (E,) in a file. Raises ValueError for a recording, and for one of another size."""
        vector = read_vector(path)
        if len(vector) != (size := self.model.config.speaker_size):
            raise ValueError(f"{path} holds {len(vector)} numbers, the model takes speaker vectors of {size}")
        return vector

    @torch.no_grad()
    def listen(self, paths):
        """What the model needs of a recording, or of several of one voice: their codes [(T, K)]; or, for a model that
        reads the voice from them, the voice: its latents (L, D) and the timbre (E,) for a vocoder, None without one.
        For a model that takes a speaker vector each file holds one; of several it takes the mean, as its authors."""
        if self.model.reference == "vector":
            files = [paths] if isinstance(paths, str | os.PathLike) else paths
            vector = np.mean([self.read_speaker(path) for path in files], 0)
            return self.model.voice_latents(torch.from_numpy(vector)[None])[0], None
        wavs = [self.read(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
        if not self.model.reference:
            return [self.codec.encode(wav)[0].T.cpu().numpy() for wav in wavs]
        rate = self.codec.sample_rate
        wavs = [wav[:, : round(self.model.config.recording_seconds * rate)] for wav in wavs]
        chunks = self.model.chunks(torch.cat(wavs, 1)[0], rate)
        latents = self.model.voice_latents([self.codec.reference(x[None], padded=False)[0] for x in chunks])[0]
        timbre = torch.stack([self.codec.timbre(wav)[0] for wav in wavs]).mean(0) if self.vocoder else None
        return latents, timbre

    def made_for(self):
        """What a saved voice has to have in common with this model: family and codec."""
        return {"arch": self.model.config.arch, "codec": self.codec.name, "fingerprint": self.codec.fingerprint()}

    def recall(self, name):
        """What `listen` returned for a saved voice, its texts and its note. Raises FileNotFoundError and ValueError."""
        heard, texts, note = load_voice(name, self.made_for())
        c = self.model.config
        if isinstance(heard, tuple):
            latents, timbre = heard
            fits = latents.shape[1] == c.backbone.d_model and (timbre is not None or not self.vocoder)
        else:
            fits = all(x.shape[1] == c.n_codebooks and 0 <= x.min() <= x.max() < c.codebook_size for x in heard)
        if not fits or bool(self.model.reference) != isinstance(heard, tuple):
            raise ValueError(f"{name} is damaged, or a voice of a model with other sizes: save it with this model")
        return heard, texts, note

    @torch.no_grad()
    def own_voice(self, speaker=""):
        """The voice of a speaker as `listen` gives it; where `speaker` is empty, that of the first one in the training
        data. Raises ValueError where none is known."""
        if self.voices and speaker:
            return self.voices[self.known_speaker(speaker)]
        if self.references is None or self.vocoder and self.timbres is None:
            some = f", or a speaker: {', '.join(list(self.voices)[:5])}, ..." if self.voices else ""
            raise ValueError(f"the model reads the voice from a recording: give a reference{some}")
        own = self.meta["speakers"].index(self.known_speaker(speaker))
        latents = self.model.voice_latents(self.references[own])[0]
        return latents, self.timbres[own] if self.vocoder else None

    def prompt(self, reference, reference_text, speaker="", language=""):
        """What `generate` takes beside the text.

        reference: path of a recording, a list of such, or what `listen` returned for them; reference_text: the
        transcript, or a list of them. Without both: {}. With them: {"prompt": [(ids, codes (T, K))]}; for a model that
        fits prompts one prompt of all, cut or repeated to one of the `reference_seconds`, from and to. A model that
        reads the voice from a recording takes {"voice": latents (L, D)}, by default that of the speaker; with a vocoder
        also {"latents": True, "timbre": (E,)}. A model that takes a speaker vector may know none, and speaks without.
        Raises ValueError where one is missing or cannot be read.
        """
        if isinstance(reference, str | os.PathLike) or reference and isinstance(reference[0], str | os.PathLike):
            reference = self.listen(reference)
        if self.model.reference == "vector" and reference is None and self.references is None:
            return {}
        if self.model.reference:
            latents, timbre = self.own_voice(speaker) if reference is None else reference
            return {"voice": latents, **({"latents": True, "timbre": timbre} if self.vocoder else {})}
        texts = [text for text in as_texts(reference_text) if text.strip()]
        if reference is None and not texts:
            return {}
        if reference is None or self.model.transcript and not texts:
            raise ValueError("cloning takes a recording and its transcript: give both reference and reference_text")
        if len(texts) != len(reference) and (texts or self.model.transcript):
            raise ValueError(f"reference_text has {len(texts)} transcripts for {len(reference)} recordings: give one "
                             "for each, with | between them")  # fmt: skip
        ids = [self.text_ids(text, speaker, language) for text in texts] or [np.zeros(0, int)] * len(reference)
        if self.model.fits_prompts:
            ids, codes = np.concatenate(ids), np.concatenate(reference)
            least, most = (max(1, round(x * self.codec.frame_rate)) for x in self.reference_seconds)
            fitted = np.resize(codes, (min(max(len(codes), least), most), codes.shape[1]))  # cuts or repeats
            return {"prompt": [(ids, fitted)]}
        return {"prompt": list(zip(ids, reference, strict=True))}

    def utterance(self, text, speaker="", reference=None, reference_text="", language=""):
        """Ids (n,) of a text and what `prompt` returns, as `generate` takes them, and for a family that takes it the id
        of the language. The text may be ids already. Raises ValueError as text_ids and prompt do.

        Where a prompt and the text are one segment, their words are one text to the tokenizer.
        """
        ids = self.text_ids(text, speaker, language) if isinstance(text, str) else text
        given = self.prompt(reference, reference_text, speaker, language)
        if of_language := self.model.config.language_ids([self.known_language(language)]):
            given["language"] = of_language[0]
        if "prompt" in given and self.model.config.prompt_style == "joined" and isinstance(text, str):
            said = one_text(reference_text)
            both = self.text_ids(f"{said} {text.strip()}", speaker, language)
            first = min(len(self.text_ids(said, speaker, language)), len(both) - 1)
            ids = both[first:]
            given["prompt"] = [(both[:first], np.concatenate([codes for _, codes in given["prompt"]]))]
        return ids, given

    def need_room(self, ids, given):
        """Raise ValueError where what `utterance` returned leaves the model no position to speak at."""
        prompt = given.get("prompt")
        try:
            rows = len(self.model.layout(ids, np.zeros((1, self.codec.n_codebooks), int), prompt)[0])
        except ValueError:  # XTTS raises it itself, in words for those who prepare data
            rows = math.inf
        if rows > self.model.max_rows:
            words, frames = (sum(map(len, part)) for part in zip(*prompt, strict=True)) if prompt else (0, 0)
            more = f", {words} of the reference's text and {frames} frames of it" if frames else ""
            raise ValueError(f"the text is too long: its {len(ids)} text ids{more} leave none of the model's "
                             f"{self.model.max_rows} positions: split it, or take a shorter reference")  # fmt: skip

    def cap(self, ids, cap_seconds=0.0):
        """The largest number of frames of an utterance: `cap_seconds`, or 1 s plus three times the mean duration of so
        many text ids in the training data."""
        rate = self.codec.frame_rate
        return math.ceil(cap_seconds * rate or rate + 3 * len(ids) * self.frames_per_id)

    @property
    def frames_per_id(self):
        """The mean number of frames of a text id in the training data."""
        train = self.meta["splits"]["train"]
        return train["frames"] / max(1, train["text_tokens"])

    def ready(self, quantize="", linear="auto", say=lambda line: None):
        """The same voice, from now on in the form that speaks fast, see speak.ready. It can no longer be adapted."""
        self.model = ready(self.model, quantize, linear, say)
        self.engine = None
        self.fixed = True
        return self

    def use_codebooks(self, n):
        """Speak in the first n codebooks from now on, 0: in all. Raises ValueError where these alone are no speech."""
        if n and not (self.model.has_depth and self.codec.residual and 2 <= n <= self.codec.n_codebooks):
            raise ValueError(f"n_codebooks = {n}: only a CSM with a residual codec can speak in its first codebooks, "
                             f"2 or more of {self.codec.n_codebooks}")  # fmt: skip
        self.n_codebooks = n
        self.engine = None

    def plan(self, text, speaker="", reference=None, reference_text="", seed=1337, cap_seconds=0.0, language=""):
        """What the engine is to speak, an Utterance, and the timbre (E,) for a vocoder, or None.

        reference and reference_text: of the voice to clone, see prompt. cap_seconds: see cap. Raises ValueError as
        `utterance` does, and for a text that is too long.
        """
        check_settings(cap_seconds=cap_seconds)
        ids, side = self.utterance(text, speaker, reference, reference_text, language)
        self.need_room(ids, side)
        timbre = side.pop("timbre", None)
        side.pop("latents", None)
        key = hashlib.sha256(f"{seed} {ids.tolist()}".encode()).digest()
        made = Utterance(ids, self.cap(ids, cap_seconds), int.from_bytes(key[:4], "little"), side)
        if isinstance(text, str):
            joint = "prompt" in side and self.model.config.prompt_style == "joined"
            before = one_text(reference_text) if joint else ""
            made.words, made.owner = self.owned(text, len(ids), speaker, before, language)
        return made, timbre

    def prepare(self, batch, draw):
        """The engine for so many utterances at a time, drawn with these settings; None takes the usual value. Raises
        ValueError for settings out of range."""
        check_settings(**draw)
        given = {key: value for key, value in draw.items() if key in self.draw and value is not None}
        settings = {**self.draw, **given}
        if self.engine is None or (self.engine.places, self.engine.draw) != (batch, settings):
            how = {"n_codebooks": self.n_codebooks} if self.n_codebooks else {}
            self.engine = Engine(self.model, batch, settings, self.vocoder, self.codec.frame_rate, **how)
        return self.engine

    def frames(self, text, **how):
        """Speak a text, or its ids (n,): yields frames (K,) int64 as the model makes them, or states (D,) for a
        vocoder; then `stopped` tells whether the model ended it.

        how: the settings of `plan`, and the DRAWS, see parts/draw.py; None takes the usual value. The random
        numbers depend on seed and text only. Raises ValueError for settings out of range, for logits that are not
        finite, and as utterance does.
        """
        draw, how = divided(how)
        utterance, _ = self.plan(text, **how)
        yield from self.made(utterance, draw)

    def made(self, utterance, draw):
        self.stopped = None
        with evaluating(self.model):
            for _, _, frames, over in self.prepare(1, draw).run(deque([(0, utterance)])):
                yield from frames
                self.stopped = over == ENDED

    def heard(self, how):
        """Settings `how` in which all that is read of a recording has been read, for any number of texts."""
        reference = how.get("reference")
        if reference is None and self.model.reference == "recording":
            return {**how, "reference": self.own_voice(how.get("speaker", ""))}
        if isinstance(reference, str | os.PathLike) or reference and isinstance(reference[0], str | os.PathLike):
            return {**how, "reference": self.listen(reference)}
        return how

    def fits(self, text, speaker="", reference=None, reference_text="", language="", cap_seconds=0.0, longest=LONGEST,
             **_):  # fmt: skip
        """Whether the model can speak a text at once: in its positions, and in about `longest` seconds."""
        ids, side = self.utterance(text, speaker, reference, reference_text, language)
        usual = len(ids) * self.frames_per_id
        try:
            room, _ = self.model.room(ids, side.get("prompt"), 2**30)
        except ValueError:
            return False
        return usual <= longest * self.codec.frame_rate and min(1.5 * usual, self.cap(ids, cap_seconds)) <= room

    def pieces(self, text, longest=LONGEST, **how):
        """A text in pieces that the model can speak, each of at most about `longest` seconds, see parts/sentences.py;
        text ids are one piece. Raises ValueError."""
        fits = partial(self.fits, longest=longest, **how)
        if not isinstance(text, str) or fits(text):
            return [text]
        try:
            return split_text(text, fits)
        except ValueError:  # a letter is too long already: the positions are few, or the reference takes them
            self.plan(text, **how)
            return [text]

    @property
    def continues(self):
        """Whether the model takes what it said before as a prompt, so that the voice stays the same in a long text."""
        return not self.model.reference and self.prompted and self.model.config.prompt_style == "segments"

    def behind(self, utterance, before, codes):
        """An utterance that goes on after another one, `before`, and its codes (T, K): these become a prompt, unless
        there is one already that fits, or no room."""
        prompt = utterance.side.get("prompt", [])
        codes = codes.cpu().numpy()
        if self.model.fits_prompts:
            most = round(self.reference_seconds[1] * self.codec.frame_rate)
            longer = prompt or [(before.text, codes[-most:])]
        else:
            longer = [*prompt, (before.text, codes)]
        try:
            room, _ = self.model.room(utterance.text, longer, utterance.cap)
        except ValueError:
            return utterance
        return replace(utterance, side={**utterance.side, "prompt": longer}) if room == utterance.cap else utterance

    def speak(self, lines, batch=8, tries=3, speed=1.0, tick=None, **how):
        """Speak several texts, `batch` of them at a time: yields (number, Said) when one is complete, in any order.

        lines: texts, or dicts of a text and settings of its own beside `how`, see `frames`. speed: of a vocoder. A text
        too long for the model is spoken in pieces. What is faulty is spoken again, see Engine.follow. tick(n) is told
        of n more frames. Raises ValueError as `frames` does.
        """
        draw, how = divided(how)
        check_settings(speed=speed)
        how = self.heard(how)
        texts = [self.heard(how | (line if isinstance(line, dict) else {"text": line})) for line in lines]
        texts = [Text(self.pieces(**settings), settings) for settings in texts]
        plans = {(n, k): self.plan(**{**text.settings, "text": piece})
                 for n, text in enumerate(texts) for k, piece in enumerate(text.pieces)}  # fmt: skip
        queue = deque((place, plan[0]) for place, plan in plans.items() if place[1] == 0 or not self.continues)
        engine = self.prepare(min(batch, max(1, len(queue))), draw)
        with evaluating(self.model):
            for (n, k), spoken in engine.follow(queue, partial(self.judge, plans, speed), tries, tick):
                text = texts[n]
                text.spoken[k] = spoken
                if self.continues and k + 1 < len(text.pieces):
                    queue.append(((n, k + 1), self.behind(plans[n, k + 1][0], plans[n, k][0], spoken.frames)))
                if len(text.spoken) == len(text.pieces):
                    yield n, self.said(text)

    def judge(self, plans, speed, place, spoken):
        """Decode what was spoken, and add the faults that can be heard."""
        spoken.wav = self.decode(spoken.frames, plans[place][1], speed)
        if longest_silence(spoken.wav, self.sample_rate) > SILENCE:
            spoken.faults.append(SILENT)
        spoken.track = self.track(spoken.utterance, spoken.codes)
        if spoken.track:
            usual = self.usual(spoken.utterance)
            if spoken.track.skipped(usual):
                spoken.faults.append(SKIPPED)
            if spoken.track.repeated(usual, sounding(spoken.wav, len(spoken.codes))):
                spoken.faults.append(TWICE)

    def usual(self, utterance):
        """The usual numbers of frames (W,) of an Utterance's words, by those of their ids in the training data. Those
        of ids in no word, such as a tag, are spread over all."""
        of_word = np.bincount(utterance.owner + 1, minlength=len(utterance.words) + 1)[1:]
        return of_word * len(utterance.text) / max(1, of_word.sum()) * self.frames_per_id

    def track(self, utterance, codes):
        """The Track of an Utterance and its codes (T, K), see parts/align.py; None without words or frames, and where
        the codes are not of all codebooks."""
        if not len(codes) or not utterance.words or codes.shape[1] != self.model.config.n_codebooks:
            return None
        found = self.model.attention(utterance.text, codes.cpu().numpy(), owner=utterance.owner, **utterance.side)
        return align(found.cpu().numpy())

    def words(self, text, codes, offset=0.0, speed=1.0, **how):
        """The words of a text and when they are spoken in its codes (T, K): [(word, start, end)], in seconds.

        offset: seconds before the first frame. speed: of a vocoder. how: the settings of `plan`, as it was spoken.
        Raises ValueError as `plan` does."""
        utterance, _ = self.plan(text, **how)
        with evaluating(self.model):
            track = self.track(utterance, torch.as_tensor(codes))
        return timed(utterance.words, track, 1 / self.codec.frame_rate / speed, offset)

    def said(self, text):
        """The Said of a Text, whose pieces have been spoken."""
        spoken = [text.spoken[k] for k in range(len(text.pieces))]
        wav = spoken[0].wav
        starts = [0]
        if len(spoken) > 1:
            parts = ((piece, [x.wav]) for piece, x in zip(text.pieces, spoken, strict=True))
            starts = []
            wav = torch.cat(list(joined(parts, self.sample_rate, starts=starts)))
        faults = list(dict.fromkeys(fault for x in spoken for fault in x.faults))
        words = []
        for x, start in zip(spoken, starts, strict=True):
            frame = len(x.wav) / self.sample_rate / max(1, len(x.codes))
            words += timed(x.utterance.words, x.track, frame, start / self.sample_rate, words[-1][1] if words else 0.0)
        return Said(wav, sum(len(x.frames) for x in spoken), all(x.ended for x in spoken), faults,
                    [fault for x in spoken for fault in x.tries], text.pieces, spoken, words)  # fmt: skip

    def say(self, text, **how):
        """The wav (N,) of a text, float32 on the CPU; how: the settings of `speak`."""
        ((_, said),) = self.speak([text], **how)
        self.stopped = said.ended
        return said.wav

    def stream(self, text, speed=1.0, **how):
        """Yields the wav of a text in pieces (n,) while it is generated; how: the settings of `frames`."""
        draw, how = divided(how)
        check_settings(speed=speed)
        how = self.heard(how)
        # where all frames of an utterance come at once, the first ones come early only if it is short
        pieces = self.pieces(text, LONGEST if self.model.causal else LONGEST_AT_ONCE, **how)
        plans = [self.plan(piece, **how) for piece in pieces]
        parts = self.parts(plans, draw, speed)
        if len(pieces) == 1:
            yield from next(parts)
        else:
            yield from joined(zip(pieces, parts, strict=True), self.sample_rate)

    def parts(self, plans, draw, speed):
        """For each plan of a text, one after the other, the pieces of its wav while it is made."""
        before = None
        stopped = True
        for utterance, timbre in plans:
            if before and self.continues:
                utterance = self.behind(utterance, *before)
            frames = []
            yield self.join(kept(self.made(utterance, draw), frames), timbre, speed)
            stopped &= bool(self.stopped)
            self.stopped = stopped
            before = (utterance, torch.stack(frames)) if frames else None

    @torch.no_grad()
    def decode(self, frames, timbre=None, speed=1.0):
        """Frames (T, K), or a vocoder's states (T, D) with the timbre (E,), at once -> wav (N,) float32 on the CPU."""
        if not len(frames):
            return torch.zeros(0)
        frames = frames[None].to(self.device)
        if timbre is None:
            return self.codec.decode(frames.mT)[0].float().cpu()
        states = frames.float()
        if speed != 1:  # as XTTS' authors change it
            factor = max(1 / speed, 1 / states.shape[1])
            states = torch.nn.functional.interpolate(states.mT, scale_factor=factor, mode="linear").mT
        return self.codec.vocode(states, timbre[None].to(states))[0].cpu()

    def block_sizes(self, longest):
        """Numbers of frames: of 80 ms, then twice as many each time, up to those of `longest` seconds."""
        size = max(1, round(0.08 * self.codec.frame_rate))
        most = max(size, math.ceil(longest * self.codec.frame_rate))
        while True:
            yield min(size, most)
            size = min(2 * size, most)

    def join(self, frames, timbre=None, speed=1.0, block=0.4, context=0.4, ahead=0.15):
        """Decode frames while they come: yields pieces of wav (n,), together as long as the frames.

        The first block has at least 80 ms, each one after it twice as much as the one before, up to `block` seconds. A
        causal decoder continues from block to block. Any other decoder needs neighbours: each block is decoded with
        `context` seconds before and `ahead` seconds after it. The phases of two blocks may differ where they meet. So
        the new block slides by up to 5 ms to the best match (WSOLA, Verhelst and Roelands 1993) and is faded in over
        10 ms.
        """
        if self.codec.streams and not self.vocoder:
            blocks = blocks_of(iter(frames), self.block_sizes(block))
            codes = (torch.stack(x, 1)[None].to(self.device) for x in blocks)
            yield from (wav[0].float().cpu() for wav in self.codec.decode_stream(codes))
            return
        rate = self.sample_rate
        frame_rate = self.codec.frame_rate
        sizes = self.block_sizes(block)
        context, ahead = (math.ceil(seconds * frame_rate) for seconds in (context, ahead))
        reach = rate // 200  # 5 ms, in samples
        fade = rate // 100
        up = torch.linspace(0, 1, fade)
        slides = torch.arange(-reach, reach + 1)
        speed = speed if self.vocoder else 1.0
        frames = iter(frames)
        seen = []
        done = 0
        tail = None
        ended = False
        while not ended:
            block = next(sizes)
            seen += itertools.islice(frames, done + block + ahead - len(seen))
            ended = len(seen) < done + block + ahead
            end = len(seen) if ended else done + block
            size = rate / frame_rate / speed  # samples of a frame
            first = max(0, done - context)
            near = torch.stack(seen[first : end + ahead]) if len(seen) > first else torch.zeros(0)
            wav = torch.cat([self.decode(near, timbre, speed), torch.zeros(math.ceil(size) + reach + fade)])
            at = round((done - first) * size)
            if tail is not None:
                places = wav[at - reach : at + reach + fade].unfold(0, fade, 1)  # (2 * reach + 1, fade)
                likeness = places @ tail / (places.norm(dim=1) * tail.norm() + 1e-6)
                at += int(slides[(likeness - 1e-6 * slides.abs()).argmax()])  # in silence it stays
                wav[at : at + fade] = up * wav[at : at + fade] + (1 - up) * tail
            stop = at + round(end * size) - round(done * size)
            yield wav[at:stop]
            tail = wav[stop : stop + fade]
            done = end


def as_texts(text):
    """A text in which | divides several, or a list of texts, as a list."""
    return text.split("|") if isinstance(text, str) else text


def blocks_of(frames, sizes):
    """Frames in lists of these sizes, the last one shorter."""
    for size in sizes:
        block = list(itertools.islice(frames, size))
        if not block:
            return
        yield block


def timed(words, track, frame, offset=0.0, least=0.0):
    """[(word, start, end)] in seconds of words by their Track, with `frame` seconds a frame; none without a track.
    least: none starts before that."""
    if track is None:
        return []
    return [(word, max(start, least), max(end, least))
            for word, (start, end) in zip(words, (offset + frame * track.spans()).tolist(), strict=True)]


def one_text(text):
    """The texts of several recordings as one."""
    return " ".join(words.strip() for words in as_texts(text))


def kept(frames, into):
    """Yields frames and keeps them in a list."""
    for frame in frames:
        into.append(frame)
        yield frame


def divided(how):
    """The DRAWS among settings, and the others, two dicts."""
    draw = {key: value for key, value in how.items() if key in DRAWS}
    return draw, {key: value for key, value in how.items() if key not in DRAWS}


@contextmanager
def evaluating(model):
    """In eval mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def is_stretch(x):
    """Whether x is two lengths in seconds, from and to."""
    return isinstance(x, list) and len(x) == 2 and all(type(y) in NUMBER for y in x) and 0 < x[0] <= x[1] <= 3600


def need_stretch(reference_seconds):
    """Raise ValueError for a value of that key which is_stretch refuses."""
    if not is_stretch(reference_seconds):
        raise ValueError(f"reference_seconds = {reference_seconds!r:.60}: give the shortest and the longest, as "
                         "[3.0, 6.0]")  # fmt: skip


def read_run(checkpoint, codec_path="", codec=None):
    """The codec of a checkpoint, or the one at codec_path, or `codec`, which is open already; and the arguments of
    Voice.take. Raises ValueError, and FileNotFoundError where the codec's weights are gone."""
    path = checkpoint.path
    pack = checkpoint["codec"]
    meta = checkpoint["meta"]
    try:
        need(meta, MODEL_META, "meta")
        wanted = {f"{key}?": NUMBER for key in (*DRAWS, "voice_prompt")} | {"reference_seconds?": is_stretch}
        need(checkpoint["config"], wanted, "config")
        codec = codec or load_codec(pack["name"], codec_path or pack, os.path.dirname(path), **pack["options"])
        tokenizer = load_tokenizer(checkpoint["tokenizer"]["kind"], checkpoint["tokenizer"]["model"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error}, or --codec_path names it") from None
    if codec.fingerprint() != checkpoint["codec_fingerprint"]:
        raise ValueError(f"{codec_path or path}: the codec's fingerprint is {codec.fingerprint()}, but the model "
                         f"was trained on the codes of {checkpoint['codec_fingerprint']:.60}")  # fmt: skip
    if tokenizer.fingerprint() != meta["tokenizer"]["sha256"]:
        raise ValueError(f"{path} is damaged: its tokenizer is not the one that the model was trained with")
    if checkpoint["origin"]:
        meta = with_tags(completed(meta), tokenizer)
    return codec, tokenizer, meta, *(checkpoint[key] for key in ("config", "references", "timbres"))


def read_probe(probe, model):
    """The arguments of contract_check from a checkpoint's probe: text, codes, perhaps a reference. Raises ValueError
    where the model cannot have such an utterance."""
    c = model.config
    text, codes = (np.asarray(probe.get(name)) for name in ("text", "codes"))
    sound = text.dtype.kind == codes.dtype.kind == "i" and text.ndim == 1 and codes.shape[1:] == (c.n_codebooks,)
    if not sound or not len(codes) or min(text.min(initial=0), codes.min()) < 0:
        raise ValueError("its probe is no utterance")
    if text.max(initial=0) >= c.text_vocab_size or codes.max() >= c.codebook_size:
        raise ValueError("its probe has text ids or codes that the model lacks")
    if not model.reference or (model.reference == "vector" and "reference" not in probe):
        return {"text": text, "codes": codes}
    reference = probe.get("reference")
    if words := fault(reference):
        raise ValueError(f"the reference of its probe {words}")
    return {"text": text, "codes": codes, "reference": reference}


def check_settings(**settings):
    """Check values of the keys above. Raises ValueError with one line."""
    for key, value in settings.items():
        configurator.check_value(key, value, globals()["__annotations__"][key])

"""A checkpoint or published weights speak: text in, wav files out.

    python sample.py --ckpt out/digits/best.pt --text "three one four"
    python sample.py --ckpt out/digits/best.pt --file lines.txt --out_dir spoken   spoken/000.wav, 001.wav, ...
    python sample.py config/digits.py --text "three one four"                      the recipe's out_dir/best.pt speaks
    python sample.py --ckpt out/x/best.pt --reference me.wav --reference_text "its transcript" --text "my clone"
    python sample.py --ckpt out/x/best.pt --reference me.wav --reference_text "its transcript" --save_voice me
    python sample.py --ckpt out/x/best.pt --voice me --text "my clone"             the voice that was saved
    python sample.py --ckpt weights/csm-1b --text "..."                            as published, before any training
    python sample.py --ckpt "weights/csm-1b,out/*" --file lines.txt --out_dir all  all/index.html: side by side
    python sample.py --ckpt out/x/best.pt --text "..." --out_dir - | aplay -f S16_LE -r 16000

- Before it speaks, a model is checked: cached generation must equal teacher forcing on an utterance that its checkpoint
  holds, for published weights on a made-up one.
- Published weights lack codec, tokenizer and the form of a text. Those of their authors are taken (released.py) unless
  `codec`, `codec_path`, `tokenizer` and `text_format` name others.
- The same seed and text give the same audio, whatever other lines are spoken beside it.
- `Voice.frames` yields frames as the model makes them. Streaming decodes them block by block, with context on both
  sides; without streaming all are decoded at once. Both ways decode the same codes.
- A frame is K codes for a codec to decode. For XTTS-v2's vocoder it is the hidden state (D,) that predicted the code,
  and the timbre comes from the reference recording.

Letters in shapes: n text ids or samples, K codebooks, T frames, N samples.
"""

import contextlib
import difflib
import hashlib
import itertools
import math
import os
import signal
import sys
import time
import wave
from dataclasses import fields, replace
from functools import partial
from glob import glob
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from codec import load_codec
from data import MODEL_META, completed
from layouts import is_published
from model import contract_check, sampler
from parts import configurator, lora, peft
from parts.audio import read_audio
from parts.files import NUMBER, need, whole
from parts.frontend import language_name, needs_language, read_text
from parts.metrics import lowest_loss, read_metrics
from parts.page import write_page
from parts.tensors import UNBUILT, fault, pick_device, read_vector, reason
from parts.text import is_phonemic, load_tokenizer, wording
from parts.voices import load_voice
from parts.voices import save_voice as write_voice
from released import made_up, open_release
from weights import WHOLE, add_peft, load_checkpoint, load_model, peft_base

# a checkpoint, a folder with best.pt, published weights (a file or folder), a pattern such as "out/*", or several of
# these separated by commas; empty: best.pt in out_dir, so that a recipe alone is enough
ckpt = ""
text = ""  # the text to speak
file = ""  # or a text file, one utterance per line
out_dir = "samples"  # folder for 000.wav, ..., with one folder per checkpoint; "-": raw 16-bit mono samples to stdout
speaker = ""  # one of the speakers in the training data, or that published weights know; empty: the main one
# recording of a voice to clone, several with commas between them, or a pattern such as "me/*.wav"; KaniTTS-2: a speaker
# vector, .npy or .pt, in place of each
reference = ""
# its transcript, word for word; those of several with | between them; XTTS, VALL-E and KaniTTS-2 need none
reference_text = ""
voice = ""  # a saved voice in place of a reference: its file, or its name in voices/
save_voice = ""  # save the voice of the reference, or of the speaker, to speak with as `voice`; needs no text
voice_note = ""  # licence or origin of that voice; it is shown wherever the voice speaks
temperature: "float | None >= 0" = None  # 0: likeliest code; None, here and below: as in training, or the family's
top_k: "int | None >= 0" = None  # draw among the k likeliest codes; 0: all
top_p: "0 < float | None <= 1" = None  # draw among the likeliest codes that make up this share of the probability
min_p: "0 <= float | None <= 1" = None  # draw among codes at least so many times as likely as the likeliest; 0: all
repetition_penalty: "float | None > 0" = None  # makes codes spoken before less likely; 1: off
repetition_decay: "float | None >= 0" = None  # weakens the penalty of a code last spoken n frames ago to 1 / n ** decay
seed: "0 <= int <= 4294967295" = 1337
speed: "0.05 <= float <= 20" = 1.0  # of speech by XTTS-v2's vocoder; 2: in half the time
cap_seconds: "0 <= float <= 86400" = 0.0  # longest utterance; 0: 1 s plus three times the usual for the text
stream = False  # write audio while it is generated
device = "auto"  # cpu, cuda, cuda:1, mps, ...; auto: a GPU if available
dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights; in training of the arithmetic
adapter = ""  # another LoRA checkpoint, or folder of peft's, on the same base, to speak with instead of ckpt's

SHARED = {
    "prepare.py": ["codec", "codec_path", "tokenizer", "text_format", "front_end", "language"],
    "weights.py": ["base"],
    "train.py": ["reference_seconds"],
    "model.py": ["speaks", "rounds", "guidance", "top_sigma", "whole_frames", "prompt_style", "loose_stop",
                 "recording_seconds", "heard_seconds", "chunk_seconds"],
}  # fmt: skip
LEAST_REFERENCE = 0.1  # seconds
MOST_REFERENCE = 300.0
DRAWS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "repetition_decay")
HOW = ("speaker", "language", *DRAWS, "seed", "speed", "cap_seconds")  # keys that say how a line is spoken
# keys that name what a checkpoint holds, and published weights do not
PARTS = ("codec", "tokenizer", "text_format", "front_end")


class Voice:
    """A model with all it needs to speak: `frames` yields codes, `say` returns the wav, `stream` yields it in pieces.

    meta: the meta.json of the token folder that the model was trained on. config: the keys of the training run, the
    defaults of temperature and the like. references (speakers, R, M) and timbres (speakers, E): each speaker's own, for
    a model that reads the voice from a recording and for its vocoder; or voices {speaker: (latents (L, D), timbre)},
    already read. The wav has `sample_rate`. After an utterance, `stopped` tells whether the model ended it by itself,
    and `timbre` (E,) is that of the vocoder.
    """

    def __init__(self, model, codec, tokenizer, meta, config=None, references=None, timbres=None, voices=None):
        self.model = model
        self.codec = codec
        self.vocoder = model.vocoder and codec.vocode is not None
        self.sample_rate = codec.vocoder_rate if self.vocoder else codec.sample_rate
        self.device = next(model.parameters()).device
        self.stopped = None
        self.timbre = None
        self.speed = 1.0
        self.adapted = {}
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
        codec, *own = read_run(checkpoint)
        if codec.fingerprint() != self.codec.fingerprint():
            raise ValueError(f"{path} speaks in the codes of another codec: give it as ckpt")
        try:
            known = {f.name for f in fields(config) if f.init} & checkpoint["model_config"].keys()
            settings = replace(config, **{key: checkpoint["model_config"][key] for key in known})
            lora.load_adapter(self.model, checkpoint["ema"] or checkpoint["model"], name)
        except UNBUILT as error:
            raise ValueError(f"{path}, an adapter on {checkpoint['base']}: {reason(error)}") from None
        return name, vars(settings), own

    def text_ids(self, text, speaker="", language=""):
        """Ids (n,) of a text as token files hold them. Raises ValueError for a text that is empty, has characters the
        tokenizer lacks, or has letters where it reads phonemes, and for an unknown speaker or language."""
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
        return np.array(self.tokenizer.encode(wording(self.meta["text_format"], speaker, words, language)))

    def known_language(self, language):
        """A language of the training data as they spell it, the first one where it is empty. Raises ValueError for an
        unknown one."""
        known = {language_name(name): name for name in self.meta["languages"]}
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
        if "prompt" in given and self.model.config.prompt_style == "joined":
            said = " ".join(as_texts(reference_text))
            both = self.text_ids(f"{said} {text}", speaker, language)
            first = min(len(self.text_ids(said, speaker, language)), len(both) - 1)
            ids = both[first:]
            given = {"prompt": [(both[:first], np.concatenate([codes for _, codes in given["prompt"]]))]}
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
        train = self.meta["splits"]["train"]
        rate = self.codec.frame_rate
        return math.ceil(cap_seconds * rate or rate + 3 * len(ids) * train["frames"] / max(1, train["text_tokens"]))

    def frames(self, text, speaker="", reference=None, reference_text="", seed=1337, speed=1.0, cap_seconds=0.0,
               language="", **draw):  # fmt: skip
        """Speak a text, or its ids (n,): yields frames (K,) int64 as the model makes them, or states (D,) for a
        vocoder.

        reference and reference_text: of the voice to clone, see prompt. draw: the DRAWS, see model.sample_code; None
        takes the usual value. The random numbers depend on seed and text only. speed: of a vocoder. cap_seconds: see
        cap. Raises ValueError for settings out of range, for logits that are not finite, and as utterance does.
        """
        check_settings(**draw, speed=speed, cap_seconds=cap_seconds)
        given = {key: value for key, value in draw.items() if key in self.draw and value is not None}
        ids, prompt = self.utterance(text, speaker, reference, reference_text, language)
        key = hashlib.sha256(f"{seed} {ids.tolist()}".encode()).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(key[:8], "little"))
        training = self.model.training
        self.stopped = None
        self.timbre = prompt.pop("timbre", None)
        self.speed = speed if self.vocoder else 1.0
        self.model.eval()
        latest = []  # the logits of the last draw

        def choose(logits, seen=None):
            if not latest:  # looking waits for a GPU, so only at the first and the last: NaN stays in the cache
                need_logits(logits)
            latest[:] = [logits]
            return draw_code(logits, seen)

        try:
            draw_code = sampler(**{**self.draw, **given}, generator=generator)
            cap = self.cap(ids, cap_seconds)
            self.stopped = yield from self.model.generate(ids, max_frames=cap, choose=choose, **prompt)
            if latest:
                need_logits(latest[0])
        except RuntimeError as error:
            if "probability tensor" in str(error):  # torch's error for a draw from NaN
                raise ValueError(DIVERGED) from None
            raise
        finally:
            self.model.train(training)

    def decode(self, frames):
        """Frames of the last utterance, a list of (K,) or (D,), at once -> wav (N,) float32 on the CPU."""
        if not frames:
            return torch.zeros(0)
        frames = torch.stack(frames)[None].to(self.device)
        if self.timbre is not None:
            states = frames.float()
            if self.speed != 1:  # as XTTS' authors change it
                factor = max(1 / self.speed, 1 / len(frames[0]))
                states = torch.nn.functional.interpolate(states.mT, scale_factor=factor, mode="linear").mT
            return self.codec.vocode(states, self.timbre[None].to(states))[0].cpu()
        return self.codec.decode(frames.mT)[0].float().cpu()

    def say(self, text, **how):
        """The wav (N,) of a text, float32 on the CPU; `how`: the settings of `frames`."""
        return self.decode(list(self.frames(text, **how)))

    def stream(self, text, **how):
        """Yields the wav of a text in pieces (n,) while it is generated; `how`: the settings of `frames`."""
        return self.join(self.frames(text, **how))

    def join(self, frames, block=0.4, context=0.4, ahead=0.15):
        """Decode frames while they come: yields pieces of wav (n,), together as long as the frames.

        A causal decoder continues from frame to frame, at least 80 ms at a time. Any other decoder needs neighbours:
        each block of `block` seconds is decoded with `context` seconds before and `ahead` seconds after it. The phases
        of two blocks may differ where they meet. So the new block slides by up to 5 ms to the best match (WSOLA,
        Verhelst and Roelands 1993) and is faded in over 10 ms.
        """
        if self.codec.streams and not self.vocoder:
            frames = iter(frames)
            size = max(1, round(0.08 * self.codec.frame_rate))
            blocks = iter(lambda: list(itertools.islice(frames, size)), [])
            codes = (torch.stack(block, 1)[None].to(self.device) for block in blocks)
            yield from (wav[0].float().cpu() for wav in self.codec.decode_stream(codes))
            return
        rate = self.sample_rate
        frame_rate = self.codec.frame_rate
        block, context, ahead = (math.ceil(seconds * frame_rate) for seconds in (block, context, ahead))
        reach = rate // 200  # 5 ms, in samples
        fade = rate // 100
        up = torch.linspace(0, 1, fade)
        slides = torch.arange(-reach, reach + 1)
        frames = iter(frames)
        seen = []
        done = 0
        tail = None
        ended = False
        while not ended:
            seen += itertools.islice(frames, done + block + ahead - len(seen))
            ended = len(seen) < done + block + ahead
            end = len(seen) if ended else done + block
            size = rate / frame_rate / self.speed  # samples of a frame; the speed is known with the first one
            first = max(0, done - context)
            wav = torch.cat([self.decode(seen[first : end + ahead]), torch.zeros(math.ceil(size) + reach + fade)])
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


DIVERGED = "the model's logits are not finite: its training run diverged, or dtype is too narrow for its weights"


def need_logits(logits):
    if not math.isfinite(logits.max()):
        raise ValueError(DIVERGED)


def is_stretch(x):
    """Whether x is two lengths in seconds, from and to."""
    return isinstance(x, list) and len(x) == 2 and all(type(y) in NUMBER for y in x) and 0 < x[0] <= x[1] <= 3600


def read_run(checkpoint, codec_path=""):
    """The codec of a checkpoint, or the one at codec_path, and the arguments of Voice.take. Raises ValueError."""
    path = checkpoint.path
    pack = checkpoint["codec"]
    meta = checkpoint["meta"]
    try:
        need(meta, MODEL_META, "meta")
        wanted = {f"{key}?": NUMBER for key in (*DRAWS, "voice_prompt")} | {"reference_seconds?": is_stretch}
        need(checkpoint["config"], wanted, "config")
        codec = load_codec(pack["name"], codec_path or pack, **pack["options"])
        tokenizer = load_tokenizer(checkpoint["tokenizer"]["kind"], checkpoint["tokenizer"]["model"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if codec.fingerprint() != checkpoint["codec_fingerprint"]:
        raise ValueError(f"{codec_path or path}: the codec's fingerprint is {codec.fingerprint()}, but the model "
                         f"was trained on the codes of {checkpoint['codec_fingerprint']:.60}")  # fmt: skip
    if tokenizer.fingerprint() != meta["tokenizer"]["sha256"]:
        raise ValueError(f"{path} is damaged: its tokenizer is not the one that the model was trained with")
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


def slow_type(device, dtype):
    """A warning where a CPU emulates products in `dtype`, a name such as "bfloat16"; "" elsewhere.

    The cost of a product is measured, in a few milliseconds, because the name of a CPU does not tell it.
    """
    if torch.device(device).type != "cpu" or dtype == "float32":
        return ""

    def seconds(kind):
        x = torch.ones(256, 1024, dtype=kind)
        took = []
        for _ in range(3):
            start = time.perf_counter()
            torch.nn.functional.linear(x, x)
            took.append(time.perf_counter() - start)
        return min(took)

    factor = seconds(getattr(torch, dtype)) / seconds(torch.float32)
    if factor < 1.2:
        return ""
    return f"warning: dtype = {dtype!r}: on this CPU a product takes {factor:.1f} times as long as in float32"


def check_settings(**settings):
    """Check values of this script's keys. Raises ValueError with one line."""
    for key, value in settings.items():
        configurator.check_value(key, value, globals()["__annotations__"][key])


def read_lines(text, file):
    """The utterances to speak. Raises ValueError for none, or an empty one."""
    if bool(text) == bool(file):
        raise ValueError('give either --text="what to say" or --file=lines.txt')
    if text:
        return [text]
    try:
        with open(file, encoding="utf-8-sig") as f:  # \n, \r\n and \r end a line; str.splitlines would split at more
            lines = f.read().rstrip().split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not text in UTF-8") from None
    if lines == [""]:
        raise ValueError(f"{file} is empty")
    if "" in (stripped := [line.strip() for line in lines]):
        raise ValueError(f"{file}: line {stripped.index('') + 1} is empty")
    return lines


@contextlib.contextmanager
def wav_file(path, rate, growing):
    """Yields a function that appends a piece (n,) to a 16-bit wav file. A `growing` file can be played after each piece
    and is removed on an error; any other appears when it is whole. "-": standard output, without a header."""
    if path == "-":
        yield lambda piece: (sys.stdout.buffer.write(pcm(piece)), sys.stdout.buffer.flush())
        return
    if not growing:  # the file is opened last, so that a kill leaves none
        pieces = []
        yield pieces.append
        with whole(path) as raw, wave.open(raw) as out:
            out.setparams((1, 2, rate, 0, "NONE", "not compressed"))
            out.writeframes(b"".join(map(pcm, pieces)))
        return
    try:
        with open(path, "wb") as raw, wave.open(raw) as out:
            out.setparams((1, 2, rate, 0, "NONE", "not compressed"))
            yield lambda piece: (out.writeframes(pcm(piece)), raw.flush())  # the first corrects the header's length
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(path)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def pcm(wav):
    return (wav.clamp(-1, 1) * 32767).round().numpy().astype("<i2").tobytes()


def speak(voice, line, path, stream, **how):
    """Speak one line into `path`; `how`: the settings of Voice.frames. Returns a line about it for the terminal, the
    seconds it took, and its seconds of audio."""
    frames = []
    samples = 0
    first = 0.0
    start = time.perf_counter()

    def counted():
        for frame in voice.frames(line, **how):
            frames.append(frame)
            yield frame

    with wav_file(path, voice.sample_rate, stream) as write:
        for piece in voice.join(counted()) if stream else map(voice.decode, [list(counted())]):
            first = first or time.perf_counter() - start
            samples += len(piece)
            write(piece)
    took = time.perf_counter() - start
    seconds = samples / voice.sample_rate
    message = f"{path}  {line!r}: {seconds:.2f} s of audio, {len(frames)} frames"
    if not frames:
        message += "; warning: the model stopped at once"
    else:
        message += f", real-time factor {took / seconds:.2f}, first audio after {first:.2f} s"
        message += "" if voice.stopped else "; warning: cut off at the cap, it did not stop by itself"
    return message, took, seconds


def open_voice(cfg, path):
    """The voice of a checkpoint, of published weights, or of an adapter of peft's on either. Raises ValueError or
    OSError."""
    how = cfg.device, cfg.codec_path, cfg.dtype
    if peft.is_adapter(path):
        voice = open_voice(cfg, peft_base(path, cfg.base))
        voice.adapt(path)
        return voice
    if not is_published(path):
        return Voice.from_checkpoint(path, *how, base=cfg.base)
    # a recipe may say where codec and tokenizer are, but how it reads texts is that of its own model
    given = {key: getattr(cfg, key) for key in PARTS if key in (cfg.given if key in PARTS[:2] else cfg.flags)}
    return Voice.from_published(path, *how, speaker=cfg.speaker, language=cfg.language, **given)


def get_ready(cfg, path, lines, out_dir):
    """The voice of the checkpoint `path`, what the model heard of the voice to clone, the texts of that, and the
    prompt. All errors that can be found before the first line is spoken are raised here: ValueError or OSError."""
    voice = open_voice(cfg, path)
    messages = sys.stderr if out_dir == "-" else sys.stdout
    if warning := slow_type(voice.device, cfg.dtype):
        print(warning, file=messages)
    if cfg.adapter:
        voice.adapt(cfg.adapter)
    for key in {*SHARED["model.py"]} & cfg.given.keys() & vars(voice.model.config).keys():
        setattr(voice.model.config, key, getattr(cfg, key))
    configurator.refuse_idle(cfg, idle_keys(cfg, voice), partial(print, file=messages))
    if "reference_seconds" in cfg.given:
        if not is_stretch(cfg.reference_seconds):
            raise ValueError(f"reference_seconds = {cfg.reference_seconds!r:.60}: give the shortest and the longest")
        voice.reference_seconds = cfg.reference_seconds
    reference, texts = heard_voice(cfg, voice, partial(print, file=messages))
    prompt = voice.prompt(reference, texts, cfg.speaker, cfg.language)
    for i, line in enumerate(lines, 1):
        try:
            voice.need_room(*voice.utterance(line, cfg.speaker, reference, texts, cfg.language))
        except ValueError as error:
            raise ValueError(f"{cfg.file}: line {i}: {error}" if cfg.file else str(error)) from None
    if out_dir != "-" and lines:
        os.makedirs(out_dir, exist_ok=True)
        if not os.access(out_dir, os.W_OK):
            raise OSError(f"{out_dir}: no permission to write")
    return voice, reference, texts, prompt


def heard_voice(cfg, voice, say):
    """What the model hears of the voice that `voice`, `reference` or, to save it, `speaker` names, and its texts; None
    and [] without one. Raises ValueError or OSError."""
    if cfg.voice:
        heard, texts, note = voice.recall(cfg.voice)
        if note:
            say(f"voice {cfg.voice}: {note}")
        return heard, texts
    texts = as_texts(cfg.reference_text) if cfg.reference_text else []
    if cfg.reference:
        return voice.listen([path for _, path in named(cfg.reference, "recording")]), texts
    if not cfg.save_voice:
        return None, texts
    if not voice.model.reference:
        raise ValueError(f"save_voice = {cfg.save_voice!r:.60}: give the reference whose voice is to be saved")
    return voice.own_voice(cfg.speaker), texts


def read_out(cfg, path, lines, out_dir):
    """Speak all lines with the checkpoint `path` into out_dir. Returns its column of the page that compares several:
    step, number of lines that ended by themselves, real-time factor, and the wav files."""
    piped = out_dir == "-"
    messages = sys.stderr if piped else sys.stdout
    voice, reference, texts, prompt = get_ready(cfg, path, lines, out_dir)
    how = {key: getattr(cfg, key) for key in HOW}
    how.update(reference=reference, reference_text=texts)
    difference = voice.report["max_difference"]
    ln_v = voice.report["ln_v"]
    step = voice.report["iter"]
    shifts = ", ".join(f"{loss:.2f}" for loss in voice.report["loss_at_shift"])
    shifts = "" if step is None else f"; cross-entropy at shifts 0, 1, 2: {shifts}, ln V {ln_v:.2f}"
    print(f"{path}: the contract holds, cached and teacher-forced logits differ by {difference:.1e}{shifts}",
          file=messages)  # fmt: skip
    if cfg.save_voice:
        saved = write_voice(cfg.save_voice, reference, texts, voice.made_for(), cfg.voice_note)
        print(f"{saved}: the voice is saved", file=messages)
    if "prompt" in prompt and not voice.prompted and voice.model.config.prompt_style == "segments":
        print(f"{path}: trained without voice prompts (voice_prompt = 0), it may not follow the reference",
              file=messages)  # fmt: skip
    ended = 0
    took = 0.0
    seconds = 0.0
    spoken = []
    for i, line in enumerate(tqdm(lines, "speaking", disable=len(lines) < 2)):
        target = "-" if piped else os.path.join(out_dir, f"{i:03d}.wav")
        message, *times = speak(voice, line, target, cfg.stream or piped, **how)
        spoken.append(Path(target).relative_to(cfg.out_dir))
        tqdm.write(message, file=messages)
        ended += bool(voice.stopped)
        took += times[0]
        seconds += times[1]
    factor = f"{took / seconds:.2f}" if seconds else ""
    return ["published" if step is None else f"{step:,}", f"{ended} of {len(lines)}", factor, *spoken]


def find_checkpoints(ckpt, out_dir):
    """The paths that `ckpt` names, separated by commas, out_dir's best.pt if it is empty. A pattern stands for what it
    matches, and a run's folder for its best.pt, or last.pt. Raises ValueError if there is no best.pt in out_dir, and
    FileNotFoundError for any other path that does not exist."""
    if not ckpt:
        path = os.path.join(out_dir, "best.pt")
        if not os.path.isfile(path):
            raise ValueError(f"no checkpoint given (--ckpt=out/x/best.pt), and {path} does not exist")
        return [path]
    paths = []
    for name, path in named(ckpt, "checkpoint"):
        inside = [os.path.join(path, kept) for kept in ("best.pt", "last.pt")]
        path = next(filter(os.path.isfile, inside), path)
        if path == name or path not in paths:  # a pattern may match what was named before
            paths.append(path)
    return paths


def named(names, what):
    """Yields (name, path) for the paths that exist of names or patterns, separated by commas. Raises FileNotFoundError
    for a name without one."""
    names = [names] if os.path.exists(names) else names.split(",")  # a path may have a comma in it
    for name in names:
        found = [name] if os.path.exists(name) else sorted(glob(name))
        if not found:
            among = f", one of {len(names)} separated by commas" if len(names) > 1 else ""
            raise FileNotFoundError(f"{name or repr(name)}: no such {what}{among}")
        yield from ((name, path) for path in found)


def folder_of(path):
    """The folder of a checkpoint or of published weights, which may themselves be a folder."""
    return Path(path) if os.path.isdir(path) else Path(path).parent


def column_names(paths):
    """Names for these paths, each another: those of their folders, or as many parts of the paths as that takes. Raises
    ValueError where one path is there twice."""
    places = [Path(path).resolve() for path in paths]  # "a/../best.pt" is not in a folder named ".."
    names = [folder_of(place).name for place in places]
    parts = [place.parts[1:] if place.is_dir() else place.with_suffix("").parts[1:] for place in places]
    for n in range(2, 2 + max(map(len, parts))):
        if len({*names, ""}) == len(names) + 1:
            return names
        names = ["_".join(part[-n:]) for part in parts]
    raise ValueError(f"ckpt = {','.join(paths)}: several checkpoints need folders of their own, and files to write to")


def idle_keys(cfg, voice):
    """{key: why} of the keys that have no effect on this voice."""
    c, idle = voice.model.config, {}
    known = {f.name: f.metadata.get("mode") for f in fields(c)}
    mode = voice.model.mode
    which = f"mode = {mode!r}" if mode else f"arch = {c.arch!r}"
    idle.update({key: f"{which} does not use it" for key in DRAWS if key not in voice.draw})
    for key in SHARED["model.py"]:
        if key not in known:
            idle[key] = f"arch = {c.arch!r} has no such key"
        elif known[key] not in (None, c.mode, mode):
            idle[key] = f"{which} does not use it"
    if not voice.model.fits_prompts:
        idle["reference_seconds"] = f"arch = {c.arch!r} takes a reference as long as it is"
    if not voice.vocoder:
        idle["speed"] = "only the vocoder of XTTS-v2 changes it"
    if c.arch == "csm" and c.stop != "zeros":
        idle["loose_stop"] = "the model has a class to stop with"
    if not lora.adapters(voice.model):
        idle["base"] = "the model is no adapter"
    if not cfg.reference:
        idle["reference_text"] = "no reference is given"
    if not cfg.save_voice:
        idle["voice_note"] = "no voice is saved (save_voice)"
    if not needs_language(voice.meta["front_end"], voice.meta["text_format"]) and c.language_ids([""]) is None:
        idle["language"] = "the model reads all languages alike"
    nameless = voice.references is None and not voice.voices
    if "{speaker}" not in voice.meta["text_format"] and (cfg.reference or cfg.voice or nameless):
        idle["speaker"] = f"text_format = {voice.meta['text_format']!r} does not name one"
    return idle


def refuse_parts(cfg, paths):
    """Raise ValueError for flags that name the parts of published weights, where all paths are checkpoints."""
    flags = [key for key in PARTS if key in cfg.flags]
    if flags and not any(map(is_published, paths)):
        raise ValueError(f"--{flags[0]} is for published weights, {paths[0]:.200} holds its own")


def main(cfg):
    if cfg.voice and (cfg.reference or cfg.save_voice):
        raise ValueError(f"voice = {cfg.voice!r:.60}: it is saved already, leave out reference and save_voice")
    lines = [] if cfg.save_voice and not cfg.text and not cfg.file else read_lines(cfg.text, cfg.file)
    paths = find_checkpoints(cfg.ckpt, cfg.out_dir)
    refuse_parts(cfg, paths)
    if len(paths) == 1:
        read_out(cfg, paths[0], lines, cfg.out_dir)
        return
    if cfg.save_voice:
        raise ValueError(f"save_voice = {cfg.save_voice!r:.60}: name one checkpoint, whose voice it becomes")
    if cfg.out_dir == "-":
        raise ValueError(f"ckpt = {cfg.ckpt}: several checkpoints need folders of their own, and files to write to")
    names = column_names(paths)
    losses = [lowest_loss(read_metrics(folder_of(path) / "metrics.jsonl")) for path in paths]
    losses = ["" if loss is None else f"{loss:.3f}" for loss in losses]
    for path, name in zip(paths, names, strict=True):  # twice, so that the last one is not refused after hours
        get_ready(cfg, path, lines, Path(cfg.out_dir) / name)
    columns = [read_out(cfg, path, lines, Path(cfg.out_dir) / name) for path, name in zip(paths, names, strict=True)]
    columns = [[step, loss, *rest] for loss, (step, *rest) in zip(losses, columns, strict=True)]
    page = os.path.join(cfg.out_dir, "index.html")
    first = ["step", "lowest held-out loss", "ended", "real-time factor"]
    about = f"The same {len(lines)} lines, spoken by {', '.join(paths)}."
    write_page(page, "Side by side", about, ["", *names], zip([*first, *lines], *columns, strict=True))
    print(f"{page}: to listen to them")


def command(cfg):
    """main for the command line. A closed pipe (`| head`) ends it quietly; SIGTERM ends it as an error does, so that no
    half-written file stays."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        main(cfg)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
        sys.exit(1)


if __name__ == "__main__":
    configurator.run(command, __file__)

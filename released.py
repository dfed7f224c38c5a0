"""Published weights with all that they need to speak as their authors let them: codec, tokenizer, form of the text.

    model, codec, tokenizer, meta, voices = open_release("weights/csm-1b")

- The tokenizer lies beside the weights, under the name that its authors gave it.
- The codec is in the file of the weights, in their folder, in a folder beside them, or in the hub's cache folder.
- Nothing is downloaded; what is missing is named, with the command that fetches it.

Letters in shapes: L latents, D width, E size of a timbre.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from codec import CODECS, PUBLISHED, load_codec
from layouts import assemble, find, holds_codec, outer_fields, read_sizes, recognise
from model import ARCHS, facts
from parts.frontend import language_name
from parts.tensors import fault, is_index, read_json, read_pickle
from parts.text import open_tokenizer


@dataclass
class Release:
    """How the authors of a family's weights let them speak.

    codec(n_codebooks, codebook_size) -> its name.
    tokenizer: the name of its file beside the weights; origin: where it comes from.
    text_format: what the model reads of a text; named: likewise, where a speaker is named; tagged: a language.
    speaker, language: without another one.
    seconds: of speech for each text id, roughly, where no training data tell them.
    speakers: the name of a file of voices beside the weights.
    """

    codec: Callable
    tokenizer: str = "tokenizer.json"
    origin: str = "the repository of the weights has it"
    text_format: str = "{text}"
    named: str = ""
    tagged: str = ""
    speaker: str = ""
    language: str = ""
    seconds: float = 0.3
    speakers: str = ""


def codec_of_valle(n_codebooks, codebook_size):
    """As the loader of its author tells them apart."""
    if n_codebooks == 9:
        return "dac"
    return "audiocodec44k" if codebook_size == 1000 else "encodec"


RELEASES = {
    # the authors number speakers from 0
    "csm": Release(lambda K, V: "mimi", text_format="[{speaker}]{text}", speaker="0"),
    "kani": Release(lambda K, V: "nanocodec", named="{speaker}: {text}", tagged="{language}: {text}"),
    "xtts": Release(
        lambda K, V: "xtts", "vocab.json", text_format="[{language}]{text}", language="en", seconds=0.2,
        speakers="speakers_xtts.pth",
    ),
    "valle": Release(
        codec_of_valle, origin="github.com/e-c-k-e-r/vall-e has it as data/tokenizer.json", language="en", seconds=0.1,
    ),
}  # fmt: skip


def open_release(path, device="cpu", dtype=torch.float32, codec="", codec_path="", tokenizer="", text_format="",
                 front_end="", speaker="", language=""):  # fmt: skip
    """The model of a published file or folder, in eval mode, its codec and tokenizer, what meta.json would say of it
    (see data.MODEL_META), and voices {name: (latents (L, D), timbre (E,))} that were published with it.

    codec, codec_path, tokenizer (a file), text_format, front_end, speaker and language: in place of the authors'.
    Raises FileNotFoundError, which says what to fetch, and ValueError for files that are damaged or do not match.
    """
    layout, tensors, given, file = find(path)
    release = RELEASES[layout.arch]
    sizes = read_sizes(layout, dict(tensors), given, file)
    tokenizer = find_tokenizer(tokenizer, file, release)
    if tokenizer.vocab_size > sizes["text_vocab_size"]:
        raise ValueError(f"{file} knows {sizes['text_vocab_size']} text ids, the tokenizer {tokenizer.vocab_size}: "
                         "name that of these weights by --tokenizer")  # fmt: skip
    if language and not text_format and "[{language}]" in release.text_format:
        need_tag(f"[{language_name(language)}]", tokenizer, file)
    K, V = (sizes.get(key, 1) for key in ("n_codebooks", "codebook_size"))
    codec = find_codec(codec or release.codec(K, V), codec_path, file, holds_codec(tensors))
    if (codec.n_codebooks, codec.codebook_size) != (K, V):
        raise ValueError(f"{file} speaks in {K} codebooks of {V}, the codec {codec.name} in {codec.n_codebooks} of "
                         f"{codec.codebook_size}: name that of these weights by --codec and --codec_path")  # fmt: skip
    usual = (release.named if speaker else "") or (release.tagged if language else "") or release.text_format
    frames = round(1000 * release.seconds * codec.frame_rate)
    meta = {
        "codec": {"name": codec.name, "fingerprint": codec.fingerprint(),
                  **codec.sizes(references=bool(release.speakers and codec.reference))},
        "tokenizer": tokenizer.describe(), "text_format": text_format or usual,
        "front_end": front_end or ARCHS[layout.arch][0].front_end, "lowercase": False,
        "languages": [language_name(language) or release.language], "speakers": [speaker or release.speaker],
        "splits": {"train": {"utterances": 0, "text_tokens": 1000, "frames": frames}},
    }  # fmt: skip
    meta = with_tags(meta, tokenizer)
    model = assemble(layout, tensors, given, file, device, dtype, **outer_fields(layout.arch, facts(meta)))
    voices = read_voices(os.path.join(os.path.dirname(file), release.speakers), model, codec) if model.reference else {}
    if voices:
        meta["speakers"] = list(voices)
    return model, codec, tokenizer, meta, voices


def find_tokenizer(path, file, release):
    """The tokenizer at `path`, or beside the weights `file`. Raises FileNotFoundError, ValueError."""
    beside = os.path.join(os.path.dirname(file), release.tokenizer)
    if not path and not os.path.exists(beside):
        raise FileNotFoundError(f"{file}: no {release.tokenizer} beside it: {release.origin}; put it there, or name it "
                                "by --tokenizer")  # fmt: skip
    return open_tokenizer(path or beside)


def need_tag(tag, tokenizer, file):
    """Raise ValueError where the tag of a language, such as [en], is not one token."""
    if len(tokenizer.encode(tag)) != 1:
        known = ", ".join(f"[{name}]" for name in tokenizer.tags)
        raise ValueError(f"{file} does not know the language {tag}; choose from {known}")


def with_tags(meta, tokenizer):
    """A meta.json, for published weights or what descends from them: where its texts begin with the tag of their
    language, with all languages for which the tokenizer has one."""
    own = [language_name(name) for name in meta["languages"]]
    tags = tokenizer.tags if "[{language}]" in meta["text_format"] else []
    return {**meta, "languages": [*meta["languages"], *(name for name in tags if name not in own)]}


def find_codec(name, path, file, inside):
    """The codec of that name at `path`; without a path that of the weights `file`.

    It may be in the file itself (`inside`), in shards beside it, in its folder, in a folder called as the codec, in
    that one or beside it, or in the hub's cache folder. Raises FileNotFoundError, which says how to fetch it, and
    ValueError.
    """
    if path or name not in PUBLISHED:
        codec = load_codec(name, path or None)
        if not codec.fitted:
            raise ValueError(f"the codec {name} has to be fitted: name its tables by --codec_path")
        return codec
    folder = os.path.dirname(file) or "."
    source = CODECS[name].source()
    names = name, source.split()[0].split("/")[1]
    places = [file] * inside + shards_with_codec(folder) + [folder]
    places += [os.path.join(folder, *up, n) for up in ((), ("..",)) for n in names]
    for place in places:
        try:
            files = CODECS[name].find(place, source)
            if place != folder or not (files[0] == file or recognise(files[0])):  # it may be the model
                return load_codec(name, place)
        except FileNotFoundError:
            continue
    try:
        return load_codec(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} speaks in codes of the codec {name}: {error}, or name it by "
                                "--codec_path") from None  # fmt: skip


def shards_with_codec(folder):
    """The indexes of shards in a folder that hold a codec too: CSM-1B lies there twice, once with its codec."""
    indexes = sorted(os.path.join(folder, name) for name in os.listdir(folder) if is_index(name))
    return [path for path in indexes if holds_codec(read_json(path)["weight_map"])]


def read_voices(path, model, codec):
    """The voices {name: (latents (L, D), timbre (E,))} in a file as speakers_xtts.pth; {} where it does not exist.
    Raises ValueError for another file, or voices of another model."""
    if not os.path.isfile(path) or not codec.timbre:
        return {}
    content = read_pickle(path)
    L, D = model.config.n_latents, model.config.backbone.d_model
    wanted = {"gpt_cond_latent": torch.empty(1, L, D), "speaker_embedding": torch.empty(1, codec.options["voice"], 1)}
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no voices")
    voices = {}
    for name, voice in content.items():
        for key, like in wanted.items():
            if words := fault(voice.get(key) if isinstance(voice, dict) else voice, like):
                raise ValueError(f"{path}: {key} of {name!s:.60} {words}")
        voices[str(name)] = voice["gpt_cond_latent"][0].float(), voice["speaker_embedding"][0, :, 0].float()
    return voices


def made_up(model):
    """An utterance of no meaning, on which contract_check compares a model with itself."""
    c = model.config
    rng = np.random.default_rng(0)
    codes = rng.integers(0, c.codebook_size, (8, c.n_codebooks))
    utterance = {"text": rng.integers(0, c.text_vocab_size, 8), "codes": codes}
    if model.reference:
        shape = (100, c.reference_bands) if model.reference == "recording" else (1, c.speaker_size)
        utterance["reference"] = torch.from_numpy(rng.standard_normal(shape))
    return utterance

"""Layouts: how each family's weights are published. This file reads them, export.py writes them.

- The names of its tensors tell what a published file holds, not its own name. Every tensor is used, or ignored for a
  reason stated here; the first one that is missing, unknown or of another shape is named.
- Sizes come from the shapes of the tensors; config.json tells what shapes cannot, such as the number of heads.
- Nothing is copied twice: tensors stay in the memory-mapped file until they are needed, and the model is built without
  memory. On a CPU, weights that need no change stay mapped; training copies the pages that it writes.

Each family has a section below, with a `Layout` in LAYOUTS for each way in which it is published.
"""

import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter

import torch
from torch.overrides import TorchFunctionMode

from model import ARCHS, LLAMA3_ROPE, PRESETS, CSMConfig, KaniConfig, PerceiverBlock, facts, field_names
from parts import lora
from parts.affine import GROUP, dequantise
from parts.files import need
from parts.tensors import (
    UNBUILT,
    are_kept,
    fault,
    is_index,
    is_safetensors,
    read_index,
    read_json,
    read_pickle,
    read_weights,
    reason,
)

INSIDE = "codec_model."  # begins the published names of the tensors of a codec inside a model
ENDINGS = (".safetensors", ".sft", ".pt", ".pth", ".bin")  # of files of weights; the last three are pickles


@dataclass
class Layout:
    """One way in which a family's weights are published.

    name: of the layout among those of its family, the key `layout` of `weights.py export`.
    arch: the family, a key of model.ARCHS.
    mark: a key that no layout after this one has. A prefix before it in a file, such as "model.", is removed from all
        keys.
    source(name, config) -> keys, make: the published tensors of which our tensor `name` is made, and the function that
        makes it. It may ignore device, type and memory layout, and must work on the meta device.
    sizes(shapes, given) -> the fields of our config, as a dict. shapes: {key: shape}; given: config.json, or {}.
    ignored: regular expression of the keys that are not used.
    tied: {key: other key} of one tensor with two names; a file has one or both, `source` uses the second.
    split(name, tensor, config) -> the published tensors that our tensor is made of, one for each of `keys`. Where
        several of ours share a key, their parts stand in one tensor, along its last axis. None: `make` is its own
        inverse.
    copies: those keys of `tied` that a published file holds too.
    prefix: what export.py writes before each key.
    in_peft: whether adapters of peft's are beside the modules of these names.
    """

    name: str
    arch: str
    mark: str
    source: Callable
    sizes: Callable
    ignored: str = "(?!)"
    tied: dict = field(default_factory=dict)
    split: Callable | None = None
    copies: tuple = ()
    prefix: str = ""
    in_peft: bool = False


def translate(name, words):
    """Translate a name by {regular expression: replacement}, applied one after the other."""
    for pattern, word in words.items():
        name = re.sub(pattern, word, name)
    return name


def same(x):
    return x


def transpose(x):
    return x.mT


# ---------------------------------------------------------------------------------------------------------------------
# published weights, in


def load(path, device="cpu", dtype=torch.float32, **changes):
    """The model of a published file (.safetensors, .sft, .index.json of shards, .pt, .pth, .bin) or folder, in eval
    mode.

    A folder's safetensors come before its pickles, and whole files before shards. changes: fields of its config to set;
    None leaves them. Raises FileNotFoundError, and ValueError for files that are damaged, unknown or ambiguous, tensors
    that are missing, unknown or of another shape, and sizes that neither shapes nor config.json tell.
    """
    return assemble(*find(path), device, dtype, **changes)


def start(path, arch, meta, habits, say=print, grown=True):
    """A model to train further, with published sizes and weights.

    meta: a token folder's meta.json, which tells how a text begins and ends; habits: {field of the config: value} that
    is no size, unknown ones are ignored; say(line): is told when the vocabulary grows to the tokenizer's. grown: False
    leaves the `new_rows` of the tables to the caller; text_vocab_size counts them already. Raises what `load` raises,
    and ValueError where the weights are of another family, codec or reference, or their text ids do not fit the
    tokenizer's.
    """
    layout, *found = find(path)
    if layout.arch != arch:
        raise ValueError(f"arch = {arch!r}, but {path} is of the family {layout.arch!r}")
    own = facts(meta)
    habits = {key: habits[key] for key in habits.keys() & field_names(ARCHS[arch][1])}
    model = assemble(layout, *found, **{**habits, **outer_fields(arch, own)}).train()
    c = model.config
    K, V, most = (own[key] for key in ("n_codebooks", "codebook_size", "text_vocab_size"))
    if (c.n_codebooks, c.codebook_size) != (K, V):
        raise ValueError(f"{path} speaks in {c.n_codebooks} codebooks of {c.codebook_size}, the data in {K} of {V}: "
                         "prepare them with the codec of these weights")  # fmt: skip
    if model.reference == "recording" and own.get("reference_bands", c.reference_bands) != c.reference_bands:
        raise ValueError(f"{path} reads {c.reference_bands} features of a recording, the data have "
                         f"{own['reference_bands']}: prepare them with the codec of these weights")  # fmt: skip
    if model.reference == "vector" and own.get("speaker_size", c.speaker_size) != c.speaker_size:
        raise ValueError(f"{path} takes speaker vectors of {c.speaker_size} numbers, those of the data have "
                         f"{own['speaker_size']}: make them with the encoder of these weights")  # fmt: skip
    more = most - c.text_vocab_size
    if more < 0 if model.text_tables else more > 0:
        raise ValueError(f"{path} knows {c.text_vocab_size} text ids, the data have {most}: prepare them with the "
                         f"tokenizer of these weights{', or one that extends it' if model.text_tables else ''}")
    if more <= 0:
        return model
    say(f"{path}: {more:,} new text ids beside its {c.text_vocab_size:,}; their embeddings start at the mean of the "
        "others plus a little noise")  # fmt: skip
    model.config.text_vocab_size = most
    return grow(model) if grown else model


def outer_fields(arch, own):
    """Those of the facts of a meta.json, own, that are fields of a family's config and in no weights: the marks around
    a text, and how many features of a recording a second has."""
    names = field_names(ARCHS[arch][1]) & own.keys()
    return {key: own[key] for key in ("text_bos", "text_eos", "reference_rate") if key in names}


def new_rows(model):
    """{name: rows} that the model's text tables lack for the text_vocab_size of its config. They are the mean of the
    old ones, which makes a new id as likely as the others on average (Hewitt 2021), plus a hundredth of their standard
    deviation as noise."""
    rows = {}
    for name in model.text_tables:
        old = attrgetter(name)(model).detach()
        if (more := model.config.text_vocab_size - len(old)) > 0:
            rows[name] = old.mean(0) + 0.01 * old.std(0) * torch.randn(more, *old.shape[1:])
    return rows


def grow(model):
    """The same model with the `new_rows` in its tables."""
    state = model.state_dict()
    state |= {name: torch.cat([state[name], rows]) for name, rows in new_rows(model).items()}
    with WithoutMemory():
        larger = type(model)(model.config)
    larger.load_state_dict(state, assign=True)
    return larger


def known_fields(arch, changes):
    """The changes that are not None. Raises ValueError for one that is no field of the family's config."""
    changes = {key: value for key, value in changes.items() if value is not None}
    if foreign := changes.keys() - field_names(ARCHS[arch][1]):
        name = min(foreign)
        raise ValueError(f"{name} = {changes[name]!r}: the family {arch!r} has no such setting")
    return changes


def published_names(model):
    """{name: [published names]} of the model's parameters, in transformers' layout if the family has one."""
    of_family = [layout for layout in LAYOUTS if layout.arch == model.config.arch]
    names = {}
    for layout in sorted(of_family, key=lambda layout: layout.name != "transformers")[:1]:
        for name in lora.base_parameters(model):
            keys = layout.source(name, model.config)[0]
            names[name] = [*keys, *(twin for twin, key in layout.tied.items() if key in keys)]
    return names


def peft_names(model):
    """{published name: [(our name, function that makes our tensor of it, its inverse)]} of a model's parameters in the
    layout whose modules get peft's adapters, and the regular expression of what that layout leaves out. Several of ours
    in a list are one matrix there, one behind the other. Raises ValueError for a family without such a layout."""
    c = model.config
    for layout in LAYOUTS:
        if layout.arch == c.arch and layout.in_peft:
            names = {}
            for name, keys in published_names(model).items():
                for key in keys:
                    back = partial(first_part, layout=layout, name=name, config=c)
                    names.setdefault(key, []).append((name, layout.source(name, c)[1], back))
            return names, layout.ignored
    raise ValueError(f"no code adds adapters of peft's to the family {c.arch!r}: export its weights whole, with the "
                     "adapter merged")  # fmt: skip


def first_part(tensor, layout, name, config):
    """The first of the published tensors that our tensor of this name is made of."""
    return layout.split(name, tensor, config)[0] if layout.split else layout.source(name, config)[1](tensor)


def is_published(path):
    """Whether a file or folder is anything but a checkpoint of train.py. Raises FileNotFoundError, ValueError."""
    if os.path.isdir(path) or is_index(path) or is_safetensors(path):
        return True
    content = read_pickle(path)
    return not (isinstance(content, dict) and str(content.get("format")).startswith("parlando"))


def find(path, device="cpu"):
    """Layout, tensors {key: tensor}, config.json and path of a file, or of the first choice in a folder. Where the
    folder itself has no weights, they may be in one of its subfolders: VALL-E's are in models/ckpt/NAME."""
    if not os.path.isdir(path):
        found = [known for known in [recognise(path, device)] if known]
    else:
        inside = (folder for folder, _, _ in sorted(os.walk(path)) if "/." not in folder.removeprefix(str(path)))
        first = next(inside)
        found = in_folder(first, device) or [known for folder in inside for known in in_folder(folder, device)]
    if len(found) > 1:
        raise ValueError(f"{path} holds several models: {', '.join(file for *_, file in found)}; name one of them")
    if not found:
        marks = ", ".join(f"{layout.arch} with {layout.mark}" for layout in LAYOUTS)
        raise ValueError(f"{path} holds no weights of a known layout, but {contents(path)}; known are {marks}")
    return found[0]


def in_folder(folder, device):
    """What `find` returns, for each file of the first group in a folder that holds weights of a known layout."""
    for group in candidates(folder):
        if found := [known for file in group if (known := recognise(file, device))]:
            return found
    return []


def contents(path):
    """What a file or folder without known weights holds, in a few words for a message."""
    if os.path.isdir(path):
        own = (os.path.relpath(file, path) for folder, _, _ in os.walk(path) for file in sum(candidates(folder), []))
        return ", ".join(itertools.islice(own, 3)) or f"no file that ends in {', '.join(ENDINGS)}"
    tensors, _ = read_weights(path)
    if tensors:
        return f"tensors such as {min(tensors):.60}"
    content = {} if is_safetensors(path) else read_pickle(path)
    return "the state of an optimizer" if "param_groups" in content else "no tensors"


def candidates(folder):
    """A folder's files that may hold weights, in groups [[path]], the preferred group first; an index stands for its
    shards."""
    names = sorted(os.listdir(folder))
    indexes = [name for name in names if is_index(name)]
    shards = {shard for name in indexes for shard in read_index(os.path.join(folder, name))}
    whole = [name for name in names if name.endswith(ENDINGS[:2])]
    whole = [name for name in whole if os.path.join(folder, name) not in shards]
    pickles = [name for name in names if name.endswith(ENDINGS[2:])]
    return [[os.path.join(folder, name) for name in group] for group in (whole, indexes, pickles)]


def recognise(path, device="cpu"):
    """What `find` returns, for one file; None if its keys contain the mark of no layout."""
    tensors, inside = read_weights(path)
    for layout in LAYOUTS:
        for key in tensors:
            if f".{key}".endswith(f".{layout.mark}"):
                before = key.removesuffix(layout.mark)
                config = os.path.join(os.path.dirname(path), "config.json")
                given = {**inside, **(read_json(config) if os.path.exists(config) else {})}
                # a tensor without memory cannot move; `assemble` names it
                tensors = {key.removeprefix(before): x if x.is_meta else x.to(device) for key, x in tensors.items()}
                return layout, dequantised(tensors, given, path), given, path
    return None


def dequantised(tensors, given, path):
    """The tensors with those that mlx has quantised as floating-point numbers, under the names of the unquantised."""
    settings = given.get("quantization") or given.get("quantization_config") or {}
    need(settings, {"group_size?": lambda x: type(x) is int and x > 0}, f"{path}: quantization in its config.json")
    for stem in [key.removesuffix(".scales") for key in tensors if key.endswith(".scales")]:
        try:
            own = settings.get(f"model.{stem}", settings)  # a layer may have settings of its own
            parts = [tensors.pop(f"{stem}.{part}") for part in ("weight", "scales", "biases")]
            tensors[f"{stem}.weight"] = dequantise(*parts, own.get("group_size", GROUP))
        except KeyError as error:
            raise ValueError(f"{path} lacks {error.args[0]}: only affine quantisation is known") from None
        except UNBUILT as error:
            raise ValueError(f"{path}: {stem}: {reason(error)}") from None
    return tensors


def holds_codec(names):
    """Whether a model with tensors of these published names has its codec inside."""
    return any(name.startswith(INSIDE) for name in names)


class WithoutMemory(TorchFunctionMode):
    """Inside this, torch.empty, which makes parameters, gives tensors with a shape and no memory.

    Buffers are computed as usual: rotary tables and the like are in no file.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        meta = {"device": "meta"} if function is torch.empty else {}
        return function(*args, **{**(kwargs or {}), **meta})


def assemble(layout, tensors, given, path, device="cpu", dtype=torch.float32, **changes):
    """The model of a layout's tensors, in eval mode; arguments and errors as in `find` and `load`.

    dtype None: each tensor keeps its type.
    """
    model, its_config = ARCHS[layout.arch]
    changes = known_fields(layout.arch, changes)
    tensors = dict(tensors)
    sizes = read_sizes(layout, tensors, given, path)
    try:
        config = its_config(**{**sizes, **changes})
        with WithoutMemory():
            model = model(config)
    except UNBUILT as error:  # impossible shapes, or a damaged config.json
        raise ValueError(f"{path}: {reason(error)}") from None
    own = model.state_dict()
    plan = {name: layout.source(name, config) for name in own}
    check(plan, own, tensors, layout, path)

    def there(key):
        tensor = tensors[key]
        if str(device) != "meta" and (words := fault(tensor)):
            raise ValueError(f"{path}: {key} {words}")
        wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        return tensor.to(device, wanted, copy=are_kept())

    state = {name: make(*map(there, keys)).contiguous() for name, (keys, make) in plan.items()}
    model.load_state_dict(state, assign=True)
    return model.to(device=device, dtype=dtype).eval()


def read_sizes(layout, tensors, given, path):
    """The fields of our config that a layout's tensors and config.json tell. Where a tensor has two names, `tensors`
    keeps the second."""
    try:
        for twin, key in layout.tied.items():
            if twin in tensors:
                tensor = tensors.pop(twin)
                other = tensors.setdefault(key, tensor)
                if not tensor.is_meta and not torch.equal(other, tensor):
                    raise ValueError(f"{twin} and {key} differ, but the family {layout.arch!r} ties them")
        return layout.sizes({key: tuple(tensor.shape) for key, tensor in tensors.items()}, given)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error.args[0]}") from None
    except UNBUILT as error:
        raise ValueError(f"{path}: {reason(error)}") from None


def check(plan, own, tensors, layout, path):
    """Raise ValueError if the tensors are not exactly those in the plan {our name: (keys, make)}."""
    for name, (keys, make) in plan.items():
        for key in keys:
            if key not in tensors:
                raise ValueError(f"{path} lacks {key}")
            if own[name].is_floating_point() != tensors[key].is_floating_point():
                raise ValueError(f"{path}: {key} is {tensors[key].dtype}: take weights that are not quantised")
        try:
            made = make(*(tensors[key].to("meta") for key in keys)).shape
        except (RuntimeError, IndexError):
            made = None
        if made != own[name].shape:
            there = " and ".join(f"{key} {tuple(tensors[key].shape)}" for key in keys)
            raise ValueError(f"{path}: {there} does not give {name} {tuple(own[name].shape)}")
    used = {key for keys, _ in plan.values() for key in keys}
    for key in tensors:
        if key not in used and not re.search(layout.ignored, key):
            raise ValueError(f"{path} holds {key}, which the family {layout.arch!r} does not have")


# ---------------------------------------------------------------------------------------------------------------------
# CSM and Marvis: the layout of their authors (torchtune), and that of transformers

ORIGINAL = {
    "^text_embedding": "text_embeddings", "^audio_embedding": "audio_embeddings",
    "^codebook0_head$": "codebook0_head.weight", "^decoder_heads$": "audio_head", "o_proj": "output_proj",
    "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3", "attn_norm": "sa_norm", r"norm\.weight": "norm.scale",
}  # fmt: skip
TRANSFORMERS = {
    "^text_embedding": "embed_text_tokens", "^audio_embedding": "depth_decoder.model.embed_tokens",
    "^codebook0_head$": "lm_head.weight", "^decoder_heads$": "depth_decoder.codebooks_head.weight",
    "^projection": "depth_decoder.model.inputs_embeds_projector", "^backbone": "backbone_model",
    r"^decoder\.": "depth_decoder.model.", r"attn\.": "self_attn.", "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}  # fmt: skip
MLX = {
    "^text_embedding": "text_embeddings", "^audio_embedding": "audio_embeddings",
    "^codebook0_head$": "codebook0_head.weight", "^decoder_heads$": "audio_head", r"attn\.": "self_attn.",
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
}  # fmt: skip
LLAMA = {
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
    "d_model": "hidden_size", "d_ff": "intermediate_size", "head_dim": "head_dim",
    "max_positions": "max_position_embeddings", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
}  # fmt: skip
ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SMOLLM2 = 49152  # text ids of the tokenizer that Marvis has
ENDS = {128256: (128000, 128001), SMOLLM2: (1, 2)}  # begin and end of text, by vocabulary: Llama 3.2, SmolLM2


def half_split(weight, heads):
    """Rows of q or k (heads * d, D) that rotate in pairs (2j, 2j + 1), reordered for our pairs (j, j + d / 2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def in_pairs(weight, heads):
    """The inverse of half_split."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def rotating(name, config):
    """The number of heads of q or k; 0 for other tensors."""
    stack = config.backbone if name.startswith("backbone") else config.decoder
    return {"q_proj.weight": stack.n_head, "k_proj.weight": stack.n_kv_head}.get(".".join(name.split(".")[-2:]), 0)


def csm_original(name, config, words=ORIGINAL):
    make = transpose if name == "decoder_heads" else same
    if heads := rotating(name, config):
        make = partial(half_split, heads=heads)
    return [translate(name, words)], make


def csm_original_split(name, tensor, config):
    if heads := rotating(name, config):
        return [in_pairs(tensor, heads)]
    return [tensor.mT if name == "decoder_heads" else tensor]


def csm_transformers(name, config):
    return [translate(name, TRANSFORMERS)], transpose if name == "decoder_heads" else same


def csm_sizes(words, shapes, given):
    """Fields of CSMConfig. Number of heads and rotary positions come from config.json, in transformers' names; without
    it from the preset with the same other sizes. Released weights stop at a frame of zeros; Marvis, known by the
    vocabulary of SmolLM2, clones a voice in one segment."""

    def rows(name):
        return shapes[translate(name, words)][0]

    def stack(part, given):
        first, attn = translate(f"{part}.layers.", words), f"{part}.layers.0.attn"
        layers = {key.removeprefix(first).split(".")[0] for key in shapes if key.startswith(first)}
        width, inner = rows(f"{part}.norm.weight"), rows(f"{part}.layers.0.mlp.up_proj.weight")
        sizes = dict(n_layer=len(layers), d_model=width, d_ff=inner)
        preset = [preset for preset in PRESETS.values() if sizes.items() <= preset.items()] or [{}]
        known = {ours: given[theirs] for ours, theirs in LLAMA.items() if given.get(theirs) is not None}
        known = {"rope_scaling": LLAMA3_ROPE, **preset[0], **known, **llama_rope(given), **sizes}
        q, k, heads = rows(f"{attn}.q_proj.weight"), rows(f"{attn}.k_proj.weight"), known.get("n_head")
        if not heads:
            raise ValueError(f"the number of heads of the {part} of width {width} is unknown: put a config.json with "
                             "num_attention_heads (also inside depth_decoder_config) beside the weights")  # fmt: skip
        if q % heads or k % (q // heads):
            raise ValueError(f"the {part} cannot have {heads} heads: its queries have width {q}, its keys {k}")
        return {**known, "head_dim": q // heads, "n_kv_head": k // (q // heads)}

    text_vocab_size = rows("text_embedding.weight")
    text_bos, text_eos = ENDS.get(text_vocab_size, (-1, -1))
    return {
        "text_vocab_size": text_vocab_size, "n_codebooks": rows("decoder_heads") + 1,
        "codebook_size": rows("codebook0_head") - CSMConfig.SPARE, "text_bos": text_bos, "text_eos": text_eos,
        "backbone": stack("backbone", given), "decoder": stack("decoder", given.get("depth_decoder_config") or {}),
        "stop": "zeros", "prompt_style": "joined" if text_vocab_size == SMOLLM2 else "segments",
        **given.get("parlando", {}),
    }  # fmt: skip


def llama_rope(given):
    """rope_theta and rope_scaling of a config.json, in the newer or the older names of transformers."""
    rope = given.get("rope_parameters") or given.get("rope_scaling", {})
    if rope == {}:
        return {}
    rope = rope or {"rope_type": "default"}
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type = {kind!r} in config.json; choose from default, llama3")
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    return {**theta, "rope_scaling": tuple(rope[word] for word in ROPE) if kind == "llama3" else None}


CSM_MLX = Layout(
    "mlx", "csm", "backbone.layers.0.self_attn.q_proj.weight", partial(csm_original, words=MLX),
    partial(csm_sizes, MLX), split=csm_original_split, prefix="model.",
)  # fmt: skip
CSM_ORIGINAL = Layout(
    "original", "csm", "codebook0_head.weight", csm_original, partial(csm_sizes, ORIGINAL),
    ignored=r"_causal_mask$|\.kv_cache\.", split=csm_original_split,
)  # fmt: skip
CSM_TRANSFORMERS = Layout(
    "transformers", "csm", "depth_decoder.codebooks_head.weight", csm_transformers, partial(csm_sizes, TRANSFORMERS),
    ignored=r"^codec_model\.",  # Mimi, which codec.py reads
    tied={"backbone_model.embed_tokens.embed_audio_tokens.weight": "depth_decoder.model.embed_tokens.weight"},
    copies=("backbone_model.embed_tokens.embed_audio_tokens.weight",), in_peft=True,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Kani: an Lfm2ForCausalLM of transformers. KaniTTS-2: a KaniTTS2ForCausalLM of the package kani-tts-2, the same with
# tensors for the learned rotation speeds and for the speaker's vector

LFM2 = {
    r"^backbone\.layers\.(\d+)\.attn\.speed": r"model.learnable_rope_layers.\1.alpha_weight",
    "^speaker_projection": "model.speaker_emb_projection",
    "^embedding$": "model.embed_tokens.weight", r"^backbone\.norm": "model.embedding_norm", "^backbone": "model",
    "attn_norm": "operator_norm", "mlp_norm": "ffn_norm", r"\.attn\.taps": ".conv.conv.weight",
    r"\.attn\.(in|out)_proj": r".conv.\1_proj", r"\.attn\.o_proj": ".self_attn.out_proj",
    r"\.attn\.([qk])_norm": r".self_attn.\1_layernorm", r"\.attn\.": ".self_attn.",
    r"mlp\.gate_proj": "feed_forward.w1", r"mlp\.up_proj": "feed_forward.w3", r"mlp\.down_proj": "feed_forward.w2",
}  # fmt: skip


def kani_lfm2(name, config):
    return [translate(name, LFM2)], same


def kani_sizes(shapes, given):
    """Fields of KaniConfig. Kinds of layers come from the keys and widths from the shapes, for which the names in
    config.json changed over time. Text ids and codes are those of the released models unless config.json says so.

    The keys tell a KaniTTS-2 too: its authors' training code writes nothing of it into config.json. What that lacks is
    as in the released ones."""

    def rows(name):
        return shapes[translate(name, LFM2)][0]

    kinds = dict(re.findall(r"^model\.layers\.(\d+)\.(conv|self_attn)\.", "\n".join(shapes), re.M))
    layers = "".join("a" if kinds.get(str(i)) == "self_attn" else "c" for i in range(len(kinds)))
    attn = f"backbone.layers.{max(0, layers.find('a'))}.attn"
    head_dim = rows(f"{attn}.q_norm.weight")
    slow = given.get("alpha_min", 0.1)
    return {
        "text_vocab_size": 64400, "n_codebooks": 4, "codebook_size": 4032, "text_bos": 1, "text_eos": 2,
        "vocab_size": rows("embedding"), **kani2_sizes(shapes, given), **given.get("parlando", {}),
        "backbone": dict(
            n_layer=len(layers), layers=layers, d_model=rows("backbone.norm.weight"), head_dim=head_dim, qk_norm=True,
            n_head=rows(f"{attn}.q_proj.weight") // head_dim, n_kv_head=rows(f"{attn}.k_proj.weight") // head_dim,
            d_ff=rows("backbone.layers.0.mlp.up_proj.weight"), norm_eps=given.get("norm_eps", 1e-5),
            max_positions=given.get("max_position_embeddings", 128_000),
            rotation_speed=(slow, given.get("alpha_max", 2.0)) if learns_speeds(shapes) else None,
            **{"rope_theta": given.get("rope_theta") or given.get("theta") or 1e6, **llama_rope(given)},
        ),
    }  # fmt: skip


def learns_speeds(shapes):
    return any(key.startswith("model.learnable_rope_layers.") for key in shapes)


def kani2_sizes(shapes, given):
    """Fields of KaniConfig that only a KaniTTS-2 has, or tells in words of its own; {} for a KaniTTS-1."""
    speaker = shapes.get("model.speaker_emb_projection.weight")
    if not (speaker or learns_speeds(shapes) or {"audio_step", "tokens_per_frame"} & given.keys()):
        return {}
    sizes = {"audio_step": given.get("audio_step", 1.0), "speaker_size": speaker[1] if speaker else 0}
    if "tokens_per_frame" in given:
        sizes["n_codebooks"] = given["tokens_per_frame"]
    if first := given.get("audio_tokens_start"):
        codes = (shapes["model.embed_tokens.weight"][0] - first) // given.get("tokens_per_frame", 4)
        sizes |= {"text_vocab_size": first - KaniConfig.CODES - 1, "codebook_size": min(codes, 4032)}
    return sizes


KANI_LFM2 = Layout(
    "transformers", "kani", "model.embedding_norm.weight", kani_lfm2, kani_sizes,
    tied={"lm_head.weight": "model.embed_tokens.weight"}, in_peft=True,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# XTTS-v2: model.pth, or a checkpoint of its training script. codec.py reads codec, vocoder and speaker encoder

XTTS = {
    "^text_positions": "text_pos_embedding.emb", "^code_positions": "mel_pos_embedding.emb", "^code_": "mel_",
    r"^backbone\.layers": "gpt.h", r"^backbone\.norm": "gpt.ln_f", "attn_norm": "ln_1", "mlp_norm": "ln_2",
    r"attn\.[qkv]_proj": "attn.c_attn", r"attn\.o_proj": "attn.c_proj", r"mlp\.up_proj": "mlp.c_fc",
    r"mlp\.down_proj": "mlp.c_proj", r"^conditioning\.input": "conditioning_encoder.init",
    r"^conditioning\.encoder": "conditioning_encoder.attn", "qkv_proj": "qkv", r"(encoder.*)o_proj": r"\1proj_out",
    r"^conditioning\.norm\.weight": "conditioning_perceiver.norm.gamma",
    r"^conditioning\.perceiver": "conditioning_perceiver.layers", r"^conditioning\.": "conditioning_perceiver.",
    "q_proj": "0.to_q", "kv_proj": "0.to_kv", "o_proj": "0.to_out", "up_proj": "1.0", "down_proj": "1.2",
}  # fmt: skip


def third(x, part):
    """Queries, keys or values (0, 1, 2) out of a weight (D, 3 D) or bias (3 D) of all."""
    return x.mT.chunk(3)[part] if x.ndim == 2 else x.chunk(3)[part]


def squeeze(x):
    """A convolution over single rows, (O, I, 1), as a linear layer."""
    return x[..., 0]


def xtts(name, config):
    make = same
    if part := re.search(r"^backbone.*\.([qkv])_proj", name):
        make = partial(third, part="qkv".index(part[1]))
    elif re.search(r"^backbone.*_proj\.weight", name):
        make = transpose
    elif re.search(r"^conditioning\.(input|encoder.*_proj)\.weight", name):
        make = squeeze
    return [translate(name, XTTS)], make


def xtts_split(name, tensor, config):
    make = xtts(name, config)[1]
    if make is squeeze:
        return [tensor[..., None]]
    return [tensor if make is same or tensor.ndim == 1 else tensor.mT]


def xtts_sizes(shapes, given):
    """Fields of XTTSConfig. Number of heads and text marks come from config.json, without it from XTTS-v2."""
    args = given.get("model_args") or {}

    def count(stem):
        return len({key.removeprefix(stem).split(".")[0] for key in shapes if key.startswith(stem)})

    ids, width = shapes["text_embedding.weight"]
    heads = args.get("gpt_n_heads") or width // 64
    stack = dict(n_layer=count("gpt.h."), n_head=heads, n_kv_head=heads, d_model=width)
    return {
        "text_vocab_size": ids, "codebook_size": shapes["mel_embedding.weight"][0] - 2,
        "text_bos": args.get("gpt_start_text_token") or 261, "text_eos": args.get("gpt_stop_text_token") or 0,
        "backbone": {**PRESETS["gpt2-xtts"], **stack, "d_ff": shapes["gpt.h.0.mlp.c_fc.weight"][1]},
        "reference_bands": shapes["conditioning_encoder.init.weight"][1],
        "text_positions": shapes["text_pos_embedding.emb.weight"][0],
        "code_positions": shapes["mel_pos_embedding.emb.weight"][0],
        "n_latents": shapes["conditioning_perceiver.latents"][0],
        "conditioning_layers": count("conditioning_encoder.attn."),
        "perceiver_layers": count("conditioning_perceiver.layers."),
        "perceiver_heads": shapes["conditioning_perceiver.layers.0.0.to_q.weight"][0] // PerceiverBlock.HEAD_DIM,
        "vocoder": True,
    }  # fmt: skip


XTTS_V2 = Layout(
    "original", "xtts", "mel_head.weight", xtts, xtts_sizes,
    ignored=r"^(xtts\.)?(hifigan_decoder\.|mel_stats$)|^(dvae|torch_mel_spectrogram_\w+|gpt_inference|gpt\.wte)\.",
    split=xtts_split, prefix="gpt.", in_peft=True,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# VALL-E v2: fp32.sft or fp32.pth. Tensors for written text, tones and other tasks than speech are ignored: the author
# speaks from phonemes, without a mark for task or tone

VALLE = {
    "^prompt_encoder": "proms_emb", "^frame_encoder": "resps_emb", r"emb\.mlp": "emb.proj", "places$": "pos_embedding",
    r"^decoder\.levels": "audio_decoder.head", "^backbone": "model", r"attn\.": "self_attn.",
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
}  # fmt: skip


def valle(name, config):
    levels = range(config.n_codebooks)
    if name == "text_embedding.weight":
        keys = ["phn_emb.weight", "sep", "len_emb", "langs_emb.weight"]
        return keys, lambda *tables: torch.cat([x if x.ndim == 2 else x[None] for x in tables])
    if name.endswith(".codes"):
        table = translate(name.removesuffix(".codes"), VALLE)
        return [f"{table}.embs.{k}.weight" for k in levels], lambda *tables: torch.stack(tables, 1)
    if name in ("heads", "head_bias"):
        kind = "weight" if name == "heads" else "bias"
        return [f"audio_decoder.head.{k}.4.{kind}" for k in levels], lambda *heads: torch.stack(heads)
    if name in ("length_heads", "length_bias"):
        kind = "weight" if name == "length_heads" else "bias"
        return [f"len_decoder.head.{kind}"], lambda x: x.unflatten(0, (-1, 10))
    return [translate(name, VALLE)], (lambda x: x[0]) if name.endswith(".places") else same


def valle_split(name, tensor, config):
    if name == "text_embedding.weight":
        phonemes, sep, length, languages = tensor.split([config.text_vocab_size, 1, 1, config.languages])
        return [phonemes, sep[0], length[0], languages]
    if name.endswith(".codes"):
        return tensor.unbind(1)
    if name in ("heads", "head_bias"):
        return tensor.unbind(0)
    if name in ("length_heads", "length_bias"):
        return [tensor.flatten(0, 1)]
    return [tensor[None] if name.endswith(".places") else tensor]


def valle_sizes(shapes, given):
    """Fields of VallEConfig. The number of heads comes from the config inside the file; without it heads are 64 wide,
    as in all published models. How it trains and speaks is the author's choice."""
    trained = given.get("experimental") or {}
    size = given.get("size")
    if trained.get("unified_position_ids"):
        raise ValueError("its positions run through all parts (unified_position_ids), here they begin anew in each")
    K = sum(bool(re.fullmatch(r"resps_emb\.embs\.\d+\.weight", key)) for key in shapes)
    V, D = shapes["proms_emb.embs.0.weight"]
    heads = (size.get("heads") if isinstance(size, dict) else None) or D // 64
    layers = {key.split(".")[2] for key in shapes if key.startswith("model.layers.")}
    stack = dict(n_layer=len(layers), n_head=heads, n_kv_head=heads, d_model=D)
    weights = trained.get("audio_level_loss_factors", "auto")
    ratio = trained.get("masking_ratio")
    if weights == "auto":
        weights = "normal" if V == 1000 else "decreasing"
    return {
        "text_vocab_size": shapes["phn_emb.weight"][0], "n_codebooks": K, "codebook_size": V, "text_bos": 1,
        "text_eos": 2, "languages": shapes["langs_emb.weight"][0], "level_weights": weights,
        "backbone": {**PRESETS["valle-60M"], **stack, "d_ff": shapes["model.layers.0.mlp.up_proj.weight"][0]},
        "segmented_mask": bool(trained.get("use_segmented_attention_mask")), "stretched_text": False,
        "mask_ratio": ratio if isinstance(ratio, float) else 0.8,
        "text_dropout": trained.get("cfg_cond_dropout_p", 0.02),
        "random_level": not trained.get("resp_parallel_training", True), "gray_length": False, "whole_frames": False,
        "guidance": 2.5, "top_sigma": 1.0,
    }  # fmt: skip


VALLE_V2 = Layout(
    "original", "valle", "len_emb", valle, valle_sizes,
    ignored=r"^(text_emb|tasks_emb|tones_emb|phn_decoder|text_decoder)\.", split=valle_split,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------

LAYOUTS = [CSM_MLX, CSM_ORIGINAL, CSM_TRANSFORMERS, KANI_LFM2, XTTS_V2, VALLE_V2]


"""Export: a model as its family's authors, or other software, publish it.

    python weights.py export --ckpt=out/x/best.pt --out_dir=hub/x --layout=transformers

| family | layout | who reads it |
|---|---|---|
| csm | transformers | CsmForConditionalGeneration, AutoProcessor |
| csm | original, original-pickle | Sesame's and Marvis' own code: model.safetensors, or ckpt.pt with `model_state` |
| csm | mlx, mlx-8bit, mlx-4bit | mlx-audio |
| kani | transformers | AutoModelForCausalLM; a KaniTTS-2, one with an audio_step: the package kani-tts-2 |
| xtts | original | coqui's TTS: model.pth, config.json, vocab.json, dvae.pth, mel_stats.pth |
| valle | original | vall_e: fp32.sft |
| csm, kani, xtts | peft | peft: the adapter alone |

- The tensors' names and shapes come from the tables of layouts.py, which reads all of this back.
- A tensor that training did not change is written as it was read, bit for bit.
- What the model does not use but the layout has, such as the codec inside a CSM, comes from the published weights that
  the model descends from, or from the codec's own files.
"""

import contextlib
import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from codec import rename, strides_of
from layouts import (
    CSM_MLX,
    CSM_ORIGINAL,
    CSM_TRANSFORMERS,
    INSIDE,
    KANI_LFM2,
    LLAMA,
    ROPE,
    VALLE_V2,
    XTTS_V2,
    WithoutMemory,
)
from model import LLAMA3_ROPE, PRESETS, TAPS, transformer_config
from parts.affine import GROUP, quantise
from parts.files import whole
from parts.tensors import read_metadata, read_weights, write_pickle, write_safetensors
from parts.text import Tokenizer, around, fast_tokenizer, wording


@dataclass
class Source:
    """What an export is made from.

    model: its adapters merged. tokenizer, codec: the model's, None: unknown. text_format: of the texts that it was
    trained on, "": unknown. tensors, given, file: the published weights that it descends from, as layouts.find returns
    them; {}, {}, "": no such. dtype: of the floating-point tensors, None: as they are. folder: where the export is
    written. notes: lines for the user.
    """

    model: torch.nn.Module
    tokenizer: Tokenizer | None = None
    codec: torch.nn.Module | None = None
    text_format: str = ""
    tensors: dict = field(default_factory=dict)
    given: dict = field(default_factory=dict)
    file: str = ""
    dtype: torch.dtype | None = None
    folder: str = ""
    notes: list = field(default_factory=list)

    def typed(self, tensors):
        """The tensors, floating-point ones in the type asked for."""
        return {key: x.to(self.dtype) if self.dtype and x.is_floating_point() else x for key, x in tensors.items()}


def export(model, folder, layout="", **known):
    """Write a model into a folder. Returns notes for its users, a list of lines.

    layout: a key of EXPORTS[family], "": the first. known: fields of Source. All files get partial names, and their own
    when all are complete. Raises OSError, and ValueError for an unknown layout and for a model that the layout cannot
    express.
    """
    exports = EXPORTS.get(model.config.arch)
    if not exports:
        raise ValueError(f"the family {model.config.arch!r} cannot be exported; choose from {', '.join(EXPORTS)}")
    if layout and layout not in exports:
        raise ValueError(f"layout = {layout!r:.60}: the family {model.config.arch!r} has {', '.join(exports)}")
    source = Source(model, folder=str(folder), **known)
    files = exports[layout or next(iter(exports))](source)
    os.makedirs(folder, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for name, content in files.items():
            file = stack.enter_context(whole(os.path.join(folder, name)))
            if isinstance(content, dict):
                content = json.dumps(content, indent=2, ensure_ascii=False)
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
    return source.notes


def published(layout, source):
    """The model's tensors by their names in a layout. Raises ValueError for a tensor that no layout has."""
    model = source.model
    state = model.state_dict()
    with WithoutMemory():
        plain = type(model)(model.config).state_dict()
    if further := state.keys() - plain.keys():
        raise ValueError(f"{min(further)} is no published tensor: merge adapters first")
    parts = defaultdict(list)
    for name, tensor in state.items():
        keys, make = layout.source(name, model.config)
        split = layout.split(name, tensor, model.config) if layout.split else [make(tensor)]
        for key, part in zip(keys, split, strict=True):
            parts[key].append(part)
    tensors = {key: torch.cat(found, -1) if len(found) > 1 else found[0] for key, found in parts.items()}
    tensors |= {twin: tensors[layout.tied[twin]] for twin in layout.copies}
    return source.typed({f"{layout.prefix}{key}": tensor for key, tensor in tensors.items()})


def safetensors(tensors, **metadata):
    """The content of a safetensors file, for `export`."""
    return partial(write_safetensors, tensors=tensors, metadata=metadata or {"format": "pt"})


def pickled(content):
    """The content of a file by torch.save, for `export`."""
    return lambda file: write_pickle(file, alone(content), file.name)


def alone(x):
    """A tensor, or a dict of such, without the rest of the storage that a view belongs to: torch.save would save it."""
    if isinstance(x, dict):
        return {key: alone(value) for key, value in x.items()}
    if x.untyped_storage().nbytes() == x.numel() * x.element_size():
        return x.detach().contiguous()
    return x.detach().clone(memory_format=torch.contiguous_format)


def type_name(tensors):
    """The type of most of the numbers, as config.json names it."""
    sizes = defaultdict(int)
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.numel()
    return str(max(sizes, key=sizes.get)).removeprefix("torch.")


def tokenizer_json(source):
    """The bytes of a tokenizer.json, None where it is unknown, which a note says."""
    if source.tokenizer is None:
        source.notes.append("no tokenizer is known: put its tokenizer.json and tokenizer_config.json there")
        return None
    try:
        return fast_tokenizer(source.tokenizer)
    except ValueError as error:
        source.notes.append(str(error))
        return None


def tokenizer_files(source, model, **config):
    """tokenizer.json with the content `model`, and what transformers reads beside it; {} for None. config: further keys
    of tokenizer_config.json. What lies beside the same tokenizer.json where the model came from is copied."""
    if model is None:
        return {}
    c = source.model.config
    marks = {"bos_token": source.tokenizer.piece(c.text_bos), "eos_token": source.tokenizer.piece(c.text_eos)}
    marks["pad_token"] = marks["eos_token"] or marks["bos_token"]
    made = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "model_max_length": c.backbone.max_positions, **marks, **config}  # fmt: skip
    files = {"tokenizer_config.json": {key: value for key, value in made.items() if value is not None}}
    beside = Path(source.file).parent
    if source.file and (beside / "tokenizer.json").exists() and (beside / "tokenizer.json").read_bytes() == model:
        names = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
        files |= {name: (beside / name).read_bytes() for name in names if (beside / name).exists()}
    return {"tokenizer.json": model, **files}


# ---------------------------------------------------------------------------------------------------------------------
# CSM and Marvis

AUDIO_TOKENS = ("<|AUDIO|>", "<|audio_eos|>")  # texts in transformers' inputs that stand for a frame, the stop frame
AUDIO_IDS = {128256: (128002, 128003)}  # their ids in the released CSM, by vocabulary
FLAVORS = ("llama-1B", "llama-250M", "llama-100M", "llama-60M")


def csm_config(c):
    """config.json for transformers' CsmForConditionalGeneration. Stop class and text marks, which it does not know,
    stand under "parlando"."""

    def stack(s, positions):
        known = {key: getattr(s, key) for key in (*LLAMA, "rope_scaling", "dropout", "recompute")}
        if transformer_config(known) != s or not s.rope_theta:
            raise ValueError("transformers' CSM has plain Llama layers, this model has others")
        config = {theirs: getattr(s, ours) for ours, theirs in LLAMA.items()}
        config |= {"max_position_embeddings": positions, "rope_scaling": None}
        if s.rope_scaling:
            # transformers wants the original context below the positions: halved with its factors it means the same
            factor, low, high, original = s.rope_scaling
            less = original
            while less > positions / 2:
                less //= 2
            numbers = factor, low * less / original, high * less / original, less
            config["rope_scaling"] = {"rope_type": "llama3", **dict(zip(ROPE, numbers, strict=True))}
        return {**config, "num_codebooks": c.n_codebooks, "vocab_size": c.audio_vocab_size}

    audio, audio_eos = AUDIO_IDS.get(c.text_vocab_size, (None, None))
    return {
        "architectures": ["CsmForConditionalGeneration"], "model_type": "csm",
        **stack(c.backbone, c.backbone.max_positions), "text_vocab_size": c.text_vocab_size,
        "depth_decoder_config": {**stack(c.decoder, c.n_codebooks + 1), "backbone_hidden_size": c.backbone.d_model},
        "bos_token_id": c.text_bos if c.text_bos >= 0 else None, "pad_token_id": audio, "audio_token_id": audio,
        "audio_eos_token_id": audio_eos, "codebook_pad_token_id": c.audio_vocab_size - 1, "codebook_eos_token_id": 0,
        "parlando": {key: getattr(c, key) for key in ("stop", "prompt_style", "text_bos", "text_eos")},
    }  # fmt: skip


def csm_transformers(source):
    """A folder for CsmForConditionalGeneration and AutoProcessor, with the codec where its weights are at hand."""
    model = source.model
    c = model.config
    tensors = published(CSM_TRANSFORMERS, source)
    config = {**csm_config(c), "dtype": type_name(tensors)}
    codec = mimi(source)
    if codec:
        config["codec_config"] = mimi_config(codec)
        tensors |= {f"codec_model.{key}": tensor for key, tensor in codec.items()}
    elif source.codec is not None and source.codec.name != "mimi":
        source.notes.append(f"its codec is {source.codec.name}, which transformers does not know: there it generates "
                            "codes, which the codec_model that transformers initialises cannot decode")  # fmt: skip
    else:
        source.notes.append("it holds no codec_model, which transformers initialises at random: replace it by "
                            "MimiModel.from_pretrained('kyutai/mimi')")  # fmt: skip
    if c.stop == "class":
        source.notes.append("transformers' generate stops at a frame of zeros, not at the stop class of this model: it "
                            "speaks on to max_new_tokens")  # fmt: skip
    files = csm_processor(source, config)
    draw = {"do_sample": True, "temperature": model.draw["temperature"], "top_k": model.draw["top_k"],
            "suppress_tokens": list(range(c.codebook_size, c.audio_vocab_size))}  # fmt: skip
    steps = {"depth_decoder_min_new_tokens": c.n_codebooks - 1, "depth_decoder_max_new_tokens": c.n_codebooks - 1}
    ids = {key: config[key] for key in ("bos_token_id", "pad_token_id")}
    generation = {**draw, **{f"depth_decoder_{key}": value for key, value in draw.items()}, **steps, **ids}
    files |= {"config.json": config, "generation_config.json": {**generation, "max_new_tokens": 125}}
    return {**files, "model.safetensors": safetensors(tensors)}


def csm_processor(source, config):
    """Tokenizer, and what AutoProcessor reads beside it. config gets the text ids of a frame and the stop frame."""
    c = source.model.config
    model = tokenizer_json(source)
    if model is None:
        return {}
    model, ids = audio_tokens(source, model)
    names = {"processor_class": "CsmProcessor"}
    processor = {"processor_config.json": {**names, "feature_extractor": features(c)}}
    if not ids:
        source.notes.append("its tokenizer has no place for <|AUDIO|>: AutoProcessor takes text, but no recordings")
        return {**processor, **tokenizer_files(source, model, **names)}
    config |= {"audio_token_id": ids[0], "audio_eos_token_id": ids[1], "pad_token_id": ids[0]}
    bos, eos = (source.tokenizer.piece(mark) or "" for mark in (c.text_bos, c.text_eos))
    text = (f"{{{{ {word} }}}}" for word in ("message['role']", "item['text']", "message['language']"))
    said = wording(source.text_format or "[{speaker}]{text}", *text)
    template = ("{% for message in messages %}{% for item in message['content'] %}{% if item['type'] == 'text' %}"
                f"{bos}{said}{eos}{{% else %}}{''.join(AUDIO_TOKENS)}{{% endif %}}{{% endfor %}}{{% endfor %}}")
    made = {"chat_template.jinja": template, "preprocessor_config.json": features(c), **processor}
    return {**made, **tokenizer_files(source, model, pad_token=AUDIO_TOKENS[0], **names)}


def audio_tokens(source, model):
    """A tokenizer.json in which AUDIO_TOKENS are names of special tokens, and their ids; where it has no place for
    them, `model` as it is, and None.

    They are those that have these names, or that the published config.json or Llama's vocabulary give; else free rows
    of the text embedding; else its last two special tokens, which lose their names.
    """
    c = source.model.config
    spec = json.loads(model)
    named = {token["content"]: token["id"] for token in spec["added_tokens"]}
    if set(AUDIO_TOKENS) <= named.keys():
        return model, [named[name] for name in AUDIO_TOKENS]
    free = {token["id"]: token for token in spec["added_tokens"]
            if token["special"] and token["id"] not in (c.text_bos, c.text_eos)}  # fmt: skip
    given = (source.given.get("audio_token_id"), source.given.get("audio_eos_token_id"))
    ids = next((ids for ids in (given, AUDIO_IDS.get(c.text_vocab_size, ())) if ids and set(ids) <= free.keys()), None)
    if not ids and c.text_vocab_size >= source.tokenizer.vocab_size + 2:
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        ids = [source.tokenizer.vocab_size + i for i in range(2)]
        free = {i: {"id": i, "content": "", **plain} for i in ids}
        spec["added_tokens"] += free.values()
    ids = ids or list(free)[-2:]
    if len(ids) < 2:
        return model, None
    for i, name in zip(ids, AUDIO_TOKENS, strict=True):
        spec["model"]["vocab"].pop(free[i]["content"], None)
        free[i]["content"] = name
    return json.dumps(spec, ensure_ascii=False).encode(), list(ids)


def features(c):
    """The feature extractor of Mimi: a waveform as it is."""
    return {"feature_extractor_type": "EncodecFeatureExtractor", "feature_size": 1, "sampling_rate": 24000,
            "padding_value": 0.0, "padding_side": "right", "return_attention_mask": True}  # fmt: skip


def mimi(source):
    """The tensors of the codec Mimi, as transformers names them: those of the published weights that the model descends
    from, of the codec's file, or made from the codec; {} without Mimi."""
    inside = codec_model(source.tensors)
    if inside or source.codec is None or source.codec.name != "mimi":
        return inside
    raw = read_weights(source.codec.path)[0]
    raw = codec_model(raw) or raw
    if "downsample.conv.weight" in raw:
        return raw
    state = source.codec.state_dict()
    for key in [key for key in state if key.endswith("in_proj.weight")]:
        parts = zip("qkv", state.pop(key).chunk(3), strict=True)
        state |= {key.replace("in_proj", f"{part}_proj"): x for part, x in parts}
    for i, name in enumerate(("semantic", "acoustic")):
        for j, table in enumerate(state.pop(f"quantizer.{i}.codebooks", ())):
            book = f"quantizer.{name}_residual_vector_quantizer.layers.{j}.codebook"
            # a table is these sums divided by these counts
            state |= {f"{book}.embed_sum": table, f"{book}.cluster_usage": torch.ones(len(table)),
                      f"{book}.initialized": torch.ones(1)}  # fmt: skip
    return rename(
        state, (r"^((en|de)coder)\.(\d+)\.(\d+)\.", r"\1.layers.\3.block.\4.conv."),
        (r"^((en|de)coder)\.(\d+)\.", r"\1.layers.\3.conv."), (r"^(down|up)sample\.", r"\1sample.conv."),
        (r"quantizer\.0\.", "quantizer.semantic_residual_vector_quantizer."),
        (r"quantizer\.1\.", "quantizer.acoustic_residual_vector_quantizer."),
        (r"transformer\.(\d+)\.", r"transformer.layers.\1."), (r"(layers\.\d+\.)([qkv]_proj)", r"\1self_attn.\2"),
        (r"(layers\.\d+\.)out_proj", r"\1self_attn.o_proj"), (r"\.linear(\d)", r".mlp.fc\1"),
        (r"\.norm1", ".input_layernorm"), (r"\.norm2", ".post_attention_layernorm"),
        (r"\.scale1", ".self_attn_layer_scale.scale"), (r"\.scale2", ".mlp_layer_scale.scale"),
    )  # fmt: skip


def codec_model(tensors):
    """The tensors of the codec inside a CSM."""
    return {key.removeprefix(INSIDE): x for key, x in tensors.items() if key.startswith(INSIDE)}


def mimi_config(tensors):
    """The sizes of a Mimi for transformers, from the shapes of its tensors."""
    width, inner = tensors["downsample.conv.weight"].shape[0], "encoder_transformer.layers.{}.mlp.fc1.weight"
    books = [key for key in tensors if key.endswith("codebook.embed_sum")]
    size, dims = tensors[books[0]].shape
    heads = width // min(width, 64)
    semantic = "quantizer.semantic_residual_vector_quantizer.input_proj.weight"
    return {
        "model_type": "mimi", "hidden_size": width, "num_filters": tensors["encoder.layers.0.conv.weight"].shape[0],
        "upsampling_ratios": strides_of(tensors, "encoder.layers.")[::-1], "num_quantizers": len(books),
        "codebook_size": size, "codebook_dim": dims,
        "vector_quantization_hidden_dimension": tensors[semantic].shape[0] if semantic in tensors else width,
        "upsample_groups": width // tensors["upsample.conv.weight"].shape[1],
        "num_hidden_layers": sum(inner.format(i) in tensors for i in range(99)),
        "intermediate_size": tensors[inner.format(0)].shape[0], "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": width // heads,
    }  # fmt: skip


def csm_original(source, pickle=False):
    """The layout of the authors, with torchtune's names."""
    tensors = published(CSM_ORIGINAL, source)
    config = {**own_config(source), "dtype": type_name(tensors)}
    files = {"config.json": config, **tokenizer_files(source, tokenizer_json(source))}
    if pickle:
        return {**files, "ckpt.pt": pickled({"model_state": tensors})}
    return {**files, "model.safetensors": safetensors(tensors)}


def own_config(source):
    """config.json in the words of Sesame, Marvis and mlx-audio, beside those of transformers."""
    c = source.model.config
    config = csm_config(c)
    plain = {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "hidden_act": "silu",
             "initializer_range": 0.02, "use_cache": True}  # fmt: skip
    for part, stack, name in ((config, c.backbone, "backbone"), (config["depth_decoder_config"], c.decoder, "decoder")):
        sizes = ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "rope_scaling")
        flavor = [flavor for flavor in FLAVORS if all(PRESETS[flavor][key] == getattr(stack, key) for key in sizes)]
        config |= {f"{name}_flavor": flavor[0]} if flavor else {}
        part |= plain
        part["rope_scaling"] = part["rope_scaling"] or {"rope_type": "default", "factor": 1.0}
    config["depth_decoder_config"]["model_type"] = "csm_depth_decoder_model"
    config |= {"audio_vocab_size": c.audio_vocab_size, "audio_num_codebooks": c.n_codebooks,
               "tie_codebooks_embeddings": True, "tie_word_embeddings": False}  # fmt: skip
    kept = ("text_tokenizer", "speaker_prefix_space")
    return config | {key: source.given[key] for key in kept if key in source.given}


def csm_mlx(source, bits=0):
    """The layout of mlx-audio: the authors' tensors under other names, with `bits` in few bits. As in mlx.nn.quantize
    these are the linear layers and embeddings whose rows divide into groups."""
    c = source.model.config
    for stack in (c.backbone, c.decoder):
        factor, low, high, original = stack.rope_scaling or LLAMA3_ROPE
        if (original / low, original / high) != (8192, 2048) or stack.rope_theta != 5e5:
            raise ValueError(f"mlx-audio turns positions by rope_theta = 500000 and rope_scaling = {LLAMA3_ROPE} or "
                             "none, this model by others")  # fmt: skip
    tensors = published(CSM_MLX, source)
    config = {**own_config(source), "dtype": type_name(tensors)}
    if bits:
        config["quantization"] = config["quantization_config"] = {"group_size": GROUP, "bits": bits, "mode": "affine"}
        for key in [key for key, x in tensors.items() if key.endswith(".weight") and x.ndim == 2]:
            if tensors[key].shape[1] % GROUP == 0:
                stem = key.removesuffix(".weight")
                parts = quantise(tensors.pop(key), bits)
                tensors |= dict(zip((key, f"{stem}.scales", f"{stem}.biases"), parts, strict=True))
    tokenizer = tokenizer_json(source)
    if tokenizer and "text_tokenizer" not in config and c.text_vocab_size not in AUDIO_IDS:  # it brings that of Llama
        spec = {**json.loads(tokenizer), "post_processor": around(source.tokenizer)}
        tokenizer = json.dumps(spec, ensure_ascii=False).encode()
        config["text_tokenizer"] = os.path.abspath(source.folder)
        source.notes.append("text_tokenizer in its config.json is this folder: change it to the name that you publish "
                            "it under")  # fmt: skip
    if c.stop == "class":
        source.notes.append("mlx-audio stops at a frame of zeros, not at the stop class of this model: it speaks on to "
                            "max_audio_length_ms")  # fmt: skip
    return {**tokenizer_files(source, tokenizer), "config.json": config,
            "model.safetensors": safetensors(tensors, format="mlx")}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Kani

LFM2_SIZES = {**LLAMA, "norm_eps": "norm_eps"}
KANI_TOKENS = ("text_vocab_size", "n_codebooks", "codebook_size", "text_bos", "text_eos", "first_special")


def kani_config(c):
    """config.json for transformers' Lfm2ForCausalLM, or for KaniTTS2ForCausalLM of the package kani-tts-2. The meaning
    of our tokens stands under "parlando"."""
    s = c.backbone
    known = {key: getattr(s, key) for key in (*LFM2_SIZES, "layers", "dropout", "recompute", "rotation_speed")}
    if transformer_config({**known, "qk_norm": True}) != s or not s.rope_theta:
        raise ValueError("transformers' LFM2 has the layers of the released models, this model has others")
    if not c.audio_step and (s.rotation_speed or c.speaker_size):
        raise ValueError("KaniTTS-1 has neither learned rotation speeds nor speaker vectors, and KaniTTS-2 has an "
                         "audio_step: this model is neither")  # fmt: skip
    return {
        "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "vocab_size": c.vocab_size,
        **{theirs: getattr(s, ours) for ours, theirs in LFM2_SIZES.items()},
        "layer_types": ["full_attention" if letter == "a" else "conv" for letter in s.layers],
        "full_attn_idxs": [i for i, letter in enumerate(s.layers) if letter == "a"],
        "block_auto_adjust_ff_dim": False, "conv_L_cache": TAPS, "conv_bias": False, "tie_word_embeddings": True,
        "bos_token_id": c.human, "eos_token_id": c.end_of_speech, "pad_token_id": c.first_special + 6,
        "parlando": {key: getattr(c, key) for key in KANI_TOKENS}, **(kani2_config(c) if c.audio_step else {}),
    }  # fmt: skip


def kani2_config(c):
    """What config.json of a KaniTTS-2 has beside that of a KaniTTS-1, or in its place."""
    slow, fast = c.backbone.rotation_speed or (0.1, 2.0)
    return {
        "architectures": ["KaniTTS2ForCausalLM"], "audio_tokens_start": c.first_code,
        "tokens_per_frame": c.n_codebooks, "audio_step": c.audio_step, "alpha_min": slow, "alpha_max": fast,
        "use_learnable_rope": c.backbone.rotation_speed is not None, "speaker_emb_dim": c.speaker_size or 128,
    }  # fmt: skip


def kani_transformers(source):
    """A folder for AutoModelForCausalLM, or for the package kani-tts-2. The embedding, which is the head too, stands in
    it once."""
    model = source.model
    c = model.config
    tensors = published(KANI_LFM2, source)
    config = {**kani_config(c), "dtype": type_name(tensors)}
    if languages := source.given.get("language_settings"):  # the tags that its authors list
        config["language_settings"] = languages
    draw = {key: model.draw[key] for key in ("temperature", "top_k", "top_p", "repetition_penalty")}
    generation = {"do_sample": True, **draw, "max_new_tokens": 1200, "bos_token_id": config["bos_token_id"],
                  "eos_token_id": [c.end_of_speech, c.end_of_ai], "pad_token_id": config["pad_token_id"]}  # fmt: skip
    files = tokenizer_files(source, tokenizer_json(source))
    return {**files, "config.json": config, "generation_config.json": generation,
            "model.safetensors": safetensors(tensors)}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# XTTS


def xtts_original(source):
    """The five files of XTTS-v2: of the GPT those of the model, all else from the folder of the codec."""
    c = source.model.config
    folder = source.codec.path if source.codec is not None and source.codec.name == "xtts" else ""
    if not folder or source.tokenizer is None:
        raise ValueError("XTTS's files hold its codec xtts, its vocoder and its tokenizer: they are not at hand")
    folder = Path(folder)
    parts = read_weights(folder / "model.pth", inert="TTS.")[0]
    parts = {key.removeprefix("xtts."): x for key, x in parts.items()}
    kept = {key: x for key, x in parts.items() if key.startswith(("hifigan_decoder.", "mel_stats"))}
    kept.setdefault("mel_stats", read_weights(folder / "mel_stats.pth")[0].popitem()[1])
    if not c.vocoder:
        source.notes.append("its vocoder was trained on the states of another model: decode its codes by dvae.pth")
    return {
        "model.pth": pickled({"model": {**published(XTTS_V2, source), **kept}}),
        "config.json": xtts_config(c, source.given or XTTS_CONFIG), "vocab.json": fast_tokenizer(source.tokenizer),
        "dvae.pth": pickled(dvae(source.codec)) if source.codec.tuned else (folder / "dvae.pth").read_bytes(),
        "mel_stats.pth": (folder / "mel_stats.pth").read_bytes(),
    }  # fmt: skip


def dvae(codec):
    """The tensors of dvae.pth with those that were fine-tuned since it was read."""
    raw = read_weights(Path(codec.path) / "dvae.pth")[0]
    tuned = codec.tuned_tensors()
    keys = rename({key: key for key in raw}, *codec.names)  # {our name: published name}
    new = {key: tuned[name] for name, key in keys.items() if name in tuned}
    new["codebook.embed"] = tuned["quantizer.codebooks"][0].T
    if {"codebook.embed_avg", "codebook.cluster_size"} <= raw.keys():  # of which training would make the entries
        new["codebook.embed_avg"] = new["codebook.embed"] * raw["codebook.cluster_size"]
    return {**raw, **{key: x.to(raw[key].dtype) for key, x in new.items()}}


# what XTTS-v2's config.json says beside the sizes of the GPT, for a model that does not descend from it
XTTS_CONFIG = {
    "model": "xtts", "temperature": 0.75, "length_penalty": 1.0, "repetition_penalty": 5.0, "top_k": 50, "top_p": 0.85,
    "num_gpt_outputs": 1, "gpt_cond_len": 30, "gpt_cond_chunk_len": 4, "max_ref_len": 30, "sound_norm_refs": False,
    "audio": {"sample_rate": 22050, "output_sample_rate": 24000},
    "model_args": {
        "gpt_use_masking_gt_prompt_approach": True, "gpt_use_perceiver_resampler": True, "gpt_code_stride_len": 1024,
        "input_sample_rate": 22050, "output_sample_rate": 24000, "output_hop_length": 256, "kv_cache": True,
        "cond_d_vector_in_each_upsampling_layer": True, "duration_const": 102400, "gpt_max_prompt_tokens": 70,
    },
}  # fmt: skip


def xtts_config(c, given):
    """config.json of XTTS: the published one with the sizes of this model."""
    args = dict(given.get("model_args") or {})
    sizes = {
        "gpt_layers": c.backbone.n_layer, "gpt_n_model_channels": c.backbone.d_model, "gpt_n_heads": c.backbone.n_head,
        "gpt_number_text_tokens": c.text_vocab_size, "gpt_max_text_tokens": c.text_positions - 2,
        "gpt_max_audio_tokens": c.code_positions - 3, "gpt_num_audio_tokens": c.codebook_size + 2,
        "gpt_start_audio_token": c.codebook_size, "gpt_stop_audio_token": c.codebook_size + 1,
        "decoder_input_dim": c.backbone.d_model,
    }  # fmt: skip
    if ((args.get("gpt_start_text_token") or 261), args.get("gpt_stop_text_token") or 0) != (c.text_bos, c.text_eos):
        sizes |= {"gpt_start_text_token": c.text_bos, "gpt_stop_text_token": c.text_eos}
    return {**given, "model_args": {**args, **sizes}}


# ---------------------------------------------------------------------------------------------------------------------
# VALL-E


def valle_original(source):
    """fp32.sft. Tensors for tasks that the model does not have come from the published weights."""
    tensors = published(VALLE_V2, source)
    others = {key: x for key, x in source.tensors.items() if key not in tensors}
    if not others:
        source.notes.append("it lacks text_emb, tasks_emb, tones_emb, phn_decoder and text_decoder, which serve other "
                            "tasks than speech: no published weights to take them from are at hand")  # fmt: skip
    metadata = read_metadata(source.file) if source.file.endswith(".sft") else {}
    metadata.setdefault("config", json.dumps(source.given or valle_config(source.model.config)))
    files = {} if source.tokenizer is None else {"tokenizer.json": fast_tokenizer(source.tokenizer)}
    return {**files, "fp32.sft": safetensors({**tensors, **source.typed(others)}, **metadata)}


def valle_config(c):
    """The config inside a fp32.sft, for a model that does not descend from a published one."""
    s = c.backbone
    size = {"dim": s.d_model, "heads": s.n_head, "layers": s.n_layer, "resp_levels": c.n_codebooks,
            "prom_levels": c.n_codebooks, "audio_tokens": c.codebook_size, "phoneme_tokens": c.text_vocab_size}
    trained = {"unified_position_ids": False, "noncausal_masks": True, "masking_train_p": float(c.mode == "nar"),
               "masking_ratio": c.mask_ratio, "cfg_cond_dropout_p": c.text_dropout,
               "resp_parallel_training": not c.random_level, "len_parallel_training": False,
               "audio_level_loss_factors": c.level_weights, "per_level_normalization": True,
               "use_segmented_attention_mask": c.segmented_mask, "max_position_embeddings": s.max_positions}
    return {"version": 7, "arch_type": "llama", "size": size, "langs": c.languages, "experimental": trained,
            "capabilities": ["ar"] if c.mode == "ar" else ["nar", "len"]}  # fmt: skip


WITH_CODEC = ("csm", "xtts")  # the families whose exports hold the codec
EXPORTS = {
    "csm": {
        "transformers": csm_transformers, "original": csm_original,
        "original-pickle": partial(csm_original, pickle=True), "mlx": csm_mlx,
        "mlx-8bit": partial(csm_mlx, bits=8), "mlx-4bit": partial(csm_mlx, bits=4),
    },
    "kani": {"transformers": kani_transformers},
    "xtts": {"original": xtts_original},
    "valle": {"original": valle_original},
}  # fmt: skip

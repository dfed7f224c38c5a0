"""Published weights: others' files under our names, and ours under theirs.

KaniTTS is an Lfm2ForCausalLM of transformers (LFM2, Liquid AI 2025) with a larger vocabulary: a folder with config.json
and its weights in model.safetensors, or in several files and an index. `read_kani` makes a model's config and weights of
such a folder, `write_kani` such a folder of a model: transformers loads it, and with it the authors' own programs.
"""

import json
import os
import re

import torch

from model import TAPS, Kani, KaniConfig

LFM2 = [  # parts of our names -> of transformers'
    (r"^embedding$", "model.embed_tokens.weight"), (r"^backbone\.norm", "model.embedding_norm"),
    (r"^backbone", "model"), (r"attn_norm", "operator_norm"), (r"mlp_norm", "ffn_norm"),
    (r"\.attn\.([qkv])_proj", r".self_attn.\1_proj"), (r"\.attn\.o_proj", ".self_attn.out_proj"),
    (r"\.attn\.([qk])_norm", r".self_attn.\1_layernorm"), (r"\.attn\.(in|out)_proj", r".conv.\1_proj"),
    (r"\.attn\.taps", ".conv.conv.weight"), (r"\.mlp\.gate_proj", ".feed_forward.w1"),
    (r"\.mlp\.up_proj", ".feed_forward.w3"), (r"\.mlp\.down_proj", ".feed_forward.w2"),
]  # fmt: skip


def lfm2_name(name):
    """What Lfm2ForCausalLM calls a parameter of a Kani."""
    for ours, theirs in LFM2:
        name = re.sub(ours, theirs, name)
    return name


def lfm2_sizes(c):
    """The sizes of a backbone from the config.json of an Lfm2ForCausalLM, in any of its spellings. Raises ValueError for
    what a Kani does not have."""
    rope = c.get("rope_parameters") or {}
    given = {**c, "rope_type": rope.get("rope_type", "default")}
    for key, only in (("model_type", "lfm2"), ("conv_L_cache", TAPS), ("conv_bias", False), ("rope_type", "default"),
                      ("tie_word_embeddings", True), ("tie_embedding", True)):  # fmt: skip
        if given.get(key, only) != only:
            raise ValueError(f"{key} = {given[key]!r}, where a Kani has {only!r}")
    n, attention = c["num_hidden_layers"], c.get("full_attn_idxs")
    kinds = c.get("layer_types") or ["full_attention" if attention is None or i in attention else "conv"
                                     for i in range(n)]  # fmt: skip
    width = c.get("block_ff_dim") or c["intermediate_size"]
    if c.get("block_auto_adjust_ff_dim", True):  # two thirds, as a gated layer has three matrices for two, rounded up
        width, multiple = int(2 * width / 3), c.get("block_multiple_of", 256)
        if (factor := c.get("block_ffn_dim_multiplier", 1.0)) is not None:
            width = -(-int(factor * width) // multiple) * multiple
    return dict(
        n_layer=n, n_head=c["num_attention_heads"], n_kv_head=c["num_key_value_heads"], d_model=c["hidden_size"],
        d_ff=width, head_dim=c.get("head_dim") or 0, max_positions=c["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or c.get("theta") or 1e6), qk_norm=True,
        norm_eps=c.get("norm_eps", 1e-5), layers="".join("c" if kind == "conv" else "a" for kind in kinds),
    )  # fmt: skip


def read_kani(folder, text_vocab_size=64400, n_codebooks=4, codebook_size=4032, text_bos=1, text_eos=2):
    """A folder as transformers saves an Lfm2ForCausalLM -> KaniConfig, weights {name: tensor}, checked against it.

    What config.json does not know are the numbers of text ids and codes: those of KaniTTS with NanoCodec. Raises
    ValueError or FileNotFoundError for a folder that is damaged or holds another model, such as KaniTTS-2.
    """
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError("published weights need safetensors: pip install safetensors") from None
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            given = json.load(f)
        config = KaniConfig(text_vocab_size, n_codebooks, codebook_size, lfm2_sizes(given), text_bos, text_eos,
                            vocab_size=given["vocab_size"])  # fmt: skip
        index = os.path.join(folder, "model.safetensors.index.json")
        files = ["model.safetensors"]
        if os.path.exists(index):
            with open(index, encoding="utf-8") as f:
                files = sorted(set(json.load(f)["weight_map"].values()))
    except KeyError as e:
        raise ValueError(f"{folder}: its json files lack {e}") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{folder}: a json file is damaged ({e})") from None
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    weights = {name: w for file in files for name, w in load_file(os.path.join(folder, file)).items()}
    weights.pop("lm_head.weight", None)  # the embedding once more
    with torch.device("meta"):
        model = Kani(config)
    names = {lfm2_name(name): name for name in model.state_dict()}
    return config, {names.get(name, name): w for name, w in weights.items()}


def write_kani(folder, model):
    """Write a Kani as a folder that Lfm2ForCausalLM.from_pretrained loads: config.json and model.safetensors, in the type
    its weights have. What it is called in the folder is written whole or not at all."""
    from safetensors.torch import save_file

    c = model.config
    b = c.backbone
    kinds = ["full_attention" if letter == "a" else "conv" for letter in b.layers]
    described = {
        "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "vocab_size": c.vocab_size, "conv_bias": False,
        "hidden_size": b.d_model, "num_hidden_layers": b.n_layer, "num_attention_heads": b.n_head,
        "num_key_value_heads": b.n_kv_head, "head_dim": b.head_dim, "intermediate_size": b.d_ff,
        "block_auto_adjust_ff_dim": False, "layer_types": kinds, "conv_L_cache": TAPS, "norm_eps": b.norm_eps,
        "full_attn_idxs": [i for i, kind in enumerate(kinds) if kind == "full_attention"],
        "max_position_embeddings": b.max_positions, "rope_theta": b.rope_theta, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": b.rope_theta},
        "bos_token_id": c.human, "eos_token_id": c.end_of_ai, "pad_token_id": c.first_special + 6,
        "torch_dtype": str(model.embedding.dtype).removeprefix("torch."),
    }  # fmt: skip
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "model.safetensors")
    weights = {lfm2_name(name): w.contiguous() for name, w in model.state_dict().items()}
    save_file(weights, f"{path}.partial", {"format": "pt"})
    os.replace(f"{path}.partial", path)
    path = os.path.join(folder, "config.json")
    with open(f"{path}.partial", "w", encoding="utf-8") as f:
        json.dump(described, f, indent=2)
    os.replace(f"{path}.partial", path)

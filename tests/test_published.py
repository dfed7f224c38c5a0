import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GREEDY, ROOT, Evil, assert_same, batch_of, checkpoint_of, tiny, utterance
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import layouts as published
import model as models
import train
import weights
from export import EXPORTS, csm_config, export
from model import AUDIO, CSM, TEXT, CSMConfig, contract_check
from parts import configurator, lora
from parts.tensors import Inert
from weights import from_pretrained

ORIGINAL, PORT = published.CSM_ORIGINAL, published.CSM_TRANSFORMERS
HEADS = {"num_attention_heads": 4, "depth_decoder_config": {"num_attention_heads": 4}}
TABLES = "backbone_model.embed_tokens.embed_audio_tokens.weight", "depth_decoder.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def original():
    """Weights by the original's names, as its code made them."""
    golden = load_file(Path(__file__).parent / "golden" / "csm_original.safetensors")
    return {key.removeprefix("weights."): w for key, w in golden.items() if key.startswith("weights.")}


def write(folder, tensors, config=HEADS, name="model.safetensors"):
    """Put weights and config.json into a folder; returns it."""
    os.makedirs(folder, exist_ok=True)
    if name.endswith((".safetensors", ".sft")):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def same_weights(a, b):
    assert a.config == b.config and a.state_dict().keys() == b.state_dict().keys()
    assert_same(a.state_dict().values(), b.state_dict().values(), rtol=0, atol=0)
    assert_same(a.buffers(), b.buffers(), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# against transformers


SMALL_MIMI = dict(model_type="mimi", hidden_size=16, num_filters=2, num_hidden_layers=1, num_attention_heads=1,
                  num_key_value_heads=1, intermediate_size=8, codebook_size=8, codebook_dim=4,
                  vector_quantization_hidden_dimension=4, upsample_groups=4)  # fmt: skip


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """transformers' CSM with small random weights, and the folder it saved itself in."""
    from transformers import CsmConfig, CsmForConditionalGeneration

    def rope(factor, original):
        return {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": factor,
                "high_freq_factor": 4 * factor, "original_max_position_embeddings": original}  # fmt: skip

    torch.manual_seed(3)
    sizes = dict(intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 num_codebooks=4, vocab_size=19, initializer_range=0.2)  # fmt: skip
    theirs = CsmForConditionalGeneration(CsmConfig(
        **sizes, hidden_size=32, text_vocab_size=30, max_position_embeddings=2048, rope_parameters=rope(0.125, 1024),
        pad_token_id=0, codebook_pad_token_id=18, bos_token_id=1, audio_token_id=28, audio_eos_token_id=29,
        depth_decoder_config=dict(**sizes, hidden_size=16, backbone_hidden_size=32, max_position_embeddings=5,
                                  rope_parameters=rope(1 / 4096, 2)),
        codec_config=SMALL_MIMI,
    )).eval()  # fmt: skip
    torch.nn.init.normal_(theirs.depth_decoder.codebooks_head.weight, std=0.2)
    folder = tmp_path_factory.mktemp("port")
    theirs.save_pretrained(folder)
    return theirs, folder


def port_of(folder):
    """An export as transformers reads it, with a codec that is quickly made."""
    from transformers import CsmForConditionalGeneration

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "codec_config": SMALL_MIMI}))
    theirs, report = CsmForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all(key.startswith("codec_model.") for key in report["missing_keys"])
    return theirs.eval()


@torch.no_grad()
def same_outputs(theirs, ours):
    """Embeddings, logits and losses of two utterances."""
    K = ours.config.n_codebooks
    tokens, segment = batch_of(ours, utterance(5, 9, K), utterance(3, 6, K, seed=1))
    labels = torch.where((segment == AUDIO)[..., None], tokens[..., :K], -100)
    embedded = theirs.embed_text_tokens(tokens[..., K]) * (segment == TEXT)[..., None]
    embedded = embedded + theirs.backbone_model.embed_tokens(tokens[..., :K]) * (segment == AUDIO)[..., None]
    torch.testing.assert_close(ours.embed(tokens, segment), embedded, rtol=0, atol=1e-5)
    expected = theirs(inputs_embeds=embedded, labels=labels)
    loss, stats = ours(tokens, segment)
    state = ours.backbone(ours.embed(tokens, segment))
    torch.testing.assert_close(state @ ours.codebook0_head.T, expected.logits, rtol=1e-4, atol=1e-4)
    kept = segment[:, 1:] == AUDIO
    depth = ours.decoder(ours.depth_inputs(state[:, :-1][kept], tokens[:, 1:, : K - 1][kept]))[:, 1:]
    logits = torch.einsum("nkd,kvd->nkv", depth, ours.decoder_heads)
    torch.testing.assert_close(logits, expected.depth_decoder_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    for name, value in (("backbone_loss", expected.backbone_loss), ("decoder_loss", expected.depth_decoder_loss)):
        torch.testing.assert_close(stats[name][0] / stats[name][1], value, rtol=1e-5, atol=1e-5)


def test_losses_and_logits_equal_those_of_transformers(port):
    theirs, folder = port
    ours = from_pretrained(folder, decoder_fraction=1.0)
    assert not ours.training and ours.config.stop == "zeros" and ours.config.codebook_size == 16
    same_outputs(theirs, ours)


def test_an_export_is_the_same_model_in_transformers(port, tmp_path):
    theirs, folder = port
    ours = from_pretrained(folder)
    export(ours, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "generation_config.json", "model.safetensors"]
    same_weights(from_pretrained(tmp_path / "out"), ours)
    same_outputs(port_of(tmp_path / "out"), ours)


@pytest.mark.parametrize("options", [
    dict(backbone=dict(rope_scaling=(32.0, 1.0, 4.0, 8192)), decoder=dict(rope_scaling=(8.0, 1.0, 4.0, 100))),
    dict(backbone=dict(rope_theta=1e4, norm_eps=1e-3, head_dim=12), decoder=dict(n_kv_head=1, n_layer=3), K=6),
])  # fmt: skip
def test_a_model_trained_here_is_the_same_in_transformers(options, tmp_path):
    model = tiny(prompt_style="joined", **options).eval()
    notes = " ".join(export(model, tmp_path))
    assert "codec_model" in notes and "not at the stop class" in notes and "no tokenizer" in notes
    again = from_pretrained(tmp_path)
    assert again.config.prompt_style == "joined"
    assert (again.config.stop, again.config.text_bos, again.config.text_eos) == ("class", 1, 2)
    assert_same(again.state_dict().values(), model.state_dict().values(), rtol=0, atol=0)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["head_dim"], config["depth_decoder_config"]["head_dim"]  # shapes say it as well
    tensors = load_file(tmp_path / "model.safetensors")
    assert published.assemble(PORT, tensors, config, "weights").config == again.config
    batch = batch_of(model, utterance(5, 9, model.config.n_codebooks))
    torch.testing.assert_close(again(*batch)[0], model(*batch)[0], rtol=1e-6, atol=1e-6)
    same_outputs(port_of(tmp_path), model)


@pytest.mark.parametrize("exported", [False, True])
def test_greedy_generation_equals_that_of_transformers(port, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(CSMConfig, "SPARE", 0)  # transformers may choose the spare classes as well
    theirs, folder = port
    ours = from_pretrained(folder)
    if exported:
        export(ours, tmp_path)
        theirs, ours = port_of(tmp_path), from_pretrained(tmp_path)
    text, _ = utterance(7, 1)
    ids = torch.from_numpy(text)[None]
    how = dict(max_new_tokens=50, do_sample=False, depth_decoder_do_sample=False)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)[0]
    spoken = torch.stack(list(ours.generate(text, max_frames=50, draw=GREEDY)))
    assert spoken.shape == (50, 4) and len(spoken.unique(dim=0)) > 10
    assert torch.equal(spoken, expected)
    whole = ours.teacher_forced_logits(text, spoken.numpy())  # the same in one pass, without a cache
    assert torch.equal(whole.argmax(-1)[:-1], spoken)
    assert contract_check(ours, text, spoken.numpy())["max_difference"] < 1e-4


def test_exported_config_has_the_released_numbers():
    """Positions and rotary numbers as in sesame/csm-1b's config.json; the codec is Mimi by default."""
    from transformers import CsmConfig

    released = CSMConfig(128256, 32, 2048, "llama-1B", 128000, 128001, decoder="llama-100M", stop="zeros")
    config = csm_config(released)
    depth, scaling = config["depth_decoder_config"], ("low_freq_factor", "high_freq_factor", published.ROPE[-1])
    assert [config["rope_scaling"][key] for key in scaling] == [0.125, 0.5, 1024]
    assert [depth["rope_scaling"][key] for key in scaling] == [0.001953125, 0.0078125, 16]
    assert (config["max_position_embeddings"], depth["max_position_embeddings"]) == (2048, 33)
    theirs, released = CsmConfig(**config), CsmConfig()  # whose defaults are the released model's, but for the scaling
    for key in ("audio_token_id", "audio_eos_token_id", "pad_token_id", "bos_token_id", "codebook_pad_token_id",
                "codebook_eos_token_id", *published.LLAMA.values()):  # fmt: skip
        assert getattr(theirs, key, None) == getattr(released, key, None), key
    assert theirs.codec_config.to_dict() == released.codec_config.to_dict()


# ---------------------------------------------------------------------------------------------------------------------
# published sizes


def stack_table(prefix, n_layer, D, inner, kv):
    shapes = {"attn.q_proj.weight": (D, D), "attn.k_proj.weight": (kv, D), "attn.v_proj.weight": (kv, D),
              "attn.output_proj.weight": (D, D), "mlp.w1.weight": (inner, D), "mlp.w3.weight": (inner, D),
              "mlp.w2.weight": (D, inner), "sa_norm.scale": (D,), "mlp_norm.scale": (D,)}  # fmt: skip
    table = {f"{prefix}.layers.{i}.{key}": shape for i in range(n_layer) for key, shape in shapes.items()}
    return {**table, f"{prefix}.norm.scale": (D,)}


def original_table(text, D, n_layer, inner, kv, depth_inner):
    """Keys and shapes of the original layout at a published size."""
    return {
        "text_embeddings.weight": (text, D), "audio_embeddings.weight": (65632, D), "projection.weight": (1024, D),
        "codebook0_head.weight": (2051, D), "audio_head": (31, 1024, 2051),
        **stack_table("backbone", n_layer, D, inner, kv), **stack_table("decoder", 4, 1024, depth_inner, 256),
    }  # fmt: skip


def port_table(**sizes):
    """Keys and shapes of transformers' model, and whether each is the codec's."""
    from transformers import CsmConfig, CsmForConditionalGeneration

    with torch.device("meta"):
        theirs = CsmForConditionalGeneration(CsmConfig(**sizes))
    return {key: tuple(w.shape) for key, w in theirs.state_dict().items()}


MARVIS = dict(hidden_size=1536, intermediate_size=8192, num_hidden_layers=6, num_attention_heads=12,
              num_key_value_heads=3, head_dim=128, text_vocab_size=49152,
              depth_decoder_config=dict(backbone_hidden_size=1536, intermediate_size=4096))  # fmt: skip
CSM_TABLE, MARVIS_TABLE = (128256, 2048, 16, 8192, 512, 8192), (49152, 1536, 6, 8192, 384, 4096)


@pytest.mark.parametrize("table, sizes, stacks, elements, ends", [
    (CSM_TABLE, {}, ("llama-1B", "llama-100M"), 1_783_357_281, (128000, 128001)),
    (MARVIS_TABLE, MARVIS, ("llama-250M", "llama-60M"), None, (1, 2)),
])  # fmt: skip
def test_published_sizes(table, sizes, stacks, elements, ends):
    """Every key and shape of both layouts is used, without a config.json; the numbers are those of the format sheet."""
    table, port = original_table(*table), port_table(**sizes)
    assert len(port) == 350 + len(table) + 1  # Mimi's, and the audio table is there twice
    codec = sum(np.prod(shape) for key, shape in port.items() if key.startswith("codec_model."))
    assert codec == 96_151_393
    assert elements in (None, sum(np.prod(shape) for shape in port.values()))
    configs = []
    for layout, shapes in ((ORIGINAL, table), (PORT, port)):
        tensors = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}  # shapes without memory
        model = published.assemble(layout, tensors, {}, "weights", device="meta")
        c = model.config
        assert (c.text_bos, c.text_eos, c.n_codebooks, c.codebook_size, c.stop) == (*ends, 32, 2048, "zeros")
        assert c.prompt_style == ("joined" if c.text_vocab_size == 49152 else "segments")  # Marvis
        assert (c.backbone, c.decoder) == tuple(models.transformer_config(name) for name in stacks)
        numbers = sum(p.numel() for p in model.parameters())
        assert numbers == sum(np.prod(shape) for shape in table.values())
        assert numbers == sum(np.prod(shape) for shape in port.values()) - codec - 65632 * c.backbone.d_model
        configs.append(c)
    assert configs[0] == configs[1]
    named = {key for name in model.state_dict() for key in published.csm_transformers(name, c)[0]}
    assert named | set(PORT.tied) == {key for key in port if not key.startswith("codec_model.")}


# ---------------------------------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("name, wrap", [
    ("model.safetensors", lambda w: w),
    ("any.sft", lambda w: {f"model.{key}": x for key, x in w.items()}),
    ("ckpt.pt", lambda w: w),
    ("ckpt.pt", lambda w: {"model_state": w, "optimizer_state": {"state": {0: {"step": torch.ones(3)}}}, "epoch": 1}),
    ("a.pth", lambda w: {"model": {f"module.model.{key}": x for key, x in w.items()}, "config": {"x": 1}}),
    ("b.bin", lambda w: {"module": {"state_dict": w}}),
    ("c.pt", lambda w: {**w, "a_causal_mask": torch.ones(4, 4), "decoder.layers.0.attn.kv_cache.k": torch.ones(2)}),
])  # fmt: skip
def test_containers(original, tmp_path, name, wrap):
    expected = published.assemble(ORIGINAL, original, HEADS, "weights")
    write(tmp_path, wrap(original), name=name)
    same_weights(from_pretrained(tmp_path), expected)
    same_weights(from_pretrained(tmp_path / name), expected)


def test_old_pickles_and_half_precision(original, tmp_path):
    half = {key: w.bfloat16() for key, w in original.items()}
    torch.save(half, write(tmp_path, half) / "old.pt", _use_new_zipfile_serialization=False)
    expected = published.assemble(ORIGINAL, {key: w.float() for key, w in half.items()}, HEADS, "weights")
    same_weights(from_pretrained(tmp_path / "model.safetensors"), expected)
    same_weights(from_pretrained(tmp_path / "old.pt"), expected)
    assert {p.dtype for p in from_pretrained(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def as_original(model):
    """The weights of a model with 4 heads over 2 in the original layout, the rows of q and k in its order."""
    weights = {}
    for name, w in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            w = w.unflatten(0, (4 if "q_proj" in name else 2, 2, -1)).transpose(1, 2).flatten(0, 2)
        (key,), _ = published.csm_original(name, model.config)
        weights[key] = (w.mT if name == "decoder_heads" else w).contiguous()
    return weights


@pytest.mark.parametrize("both", [False, True])
def test_shards_and_layouts_side_by_side(port, tmp_path, both):
    """As in the folder of sesame/csm-1b, where model.safetensors is the original layout."""
    theirs, folder = port
    ours = from_pretrained(folder)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    for path in tmp_path.glob("model*safetensors*"):
        content = path.read_text().replace("model-0", "transformers-0") if path.suffix == ".json" else None
        path.rename(tmp_path / path.name.replace("model", "transformers", 1))
        if content:
            (tmp_path / "transformers.safetensors.index.json").write_text(content)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    if both:
        save_file(as_original(ours), tmp_path / "model.safetensors")
        torch.save({}, tmp_path / "training_args.bin")
    path = published.find(tmp_path)[-1]
    assert os.path.basename(path) == ("model.safetensors" if both else "transformers.safetensors.index.json")
    same_weights(from_pretrained(tmp_path), ours)
    if both:  # without its shards the index does no harm
        for path in tmp_path.glob("transformers-0*"):
            path.unlink()
        same_weights(from_pretrained(tmp_path), ours)
        shutil.copy(tmp_path / "model.safetensors", tmp_path / "another.safetensors")
        with pytest.raises(ValueError, match="several models: .*another.safetensors, .*model.safetensors; name one"):
            from_pretrained(tmp_path)
    else:
        os.remove(tmp_path / "transformers-00002-of-00013.safetensors")
        with pytest.raises(FileNotFoundError, match="transformers-00002-of-00013.safetensors: no such file"):
            from_pretrained(tmp_path)


def test_the_audio_table_may_be_there_once_or_twice(port, tmp_path):
    ours = from_pretrained(port[1])
    export(ours, tmp_path)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    assert set(TABLES) <= tensors.keys() and torch.equal(*(tensors[key] for key in TABLES))
    for leave in TABLES:
        model = published.assemble(PORT, {key: w for key, w in tensors.items() if key != leave}, config, "weights")
        same_weights(model, ours)
    tensors[TABLES[0]] = tensors[TABLES[0]] + 1
    with pytest.raises(ValueError, match="embed_audio_tokens.weight and .*embed_tokens.weight differ"):
        published.assemble(PORT, tensors, config, "weights")


class Stranger:
    """A class that nobody who reads the file has."""

    def __init__(self):
        self.rate = 24000


def test_pickles_run_no_code(original, tmp_path):
    write(tmp_path, {"model": original, "config": Stranger()}, name="x.pt")
    same_weights(from_pretrained(tmp_path), published.assemble(ORIGINAL, original, HEADS, "weights"))
    assert type(published.read_pickle(tmp_path / "x.pt")["config"]) is Inert
    for zipped in (True, False):
        torch.save({"model": original, "evil": Evil(str(tmp_path / "made"))}, tmp_path / "x.pt",
                   _use_new_zipfile_serialization=zipped)  # fmt: skip
        with pytest.raises(ValueError, match="read without running code"):
            from_pretrained(tmp_path / "x.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="counts memory as Linux does")
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_weights_stay_in_their_file(original, tmp_path, name, monkeypatch):
    def own_memory():
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) // 1024

    rows = torch.ones(300_000, 64)  # 77 MB
    write(tmp_path, {**original, "text_embeddings.weight": rows}, name=name)
    del rows
    before, initialised = own_memory(), []
    monkeypatch.setattr(models, "init_weights", lambda model: initialised.extend(model.parameters()))
    model = from_pretrained(tmp_path)
    assert own_memory() - before < 20
    assert all(p.is_meta for p in initialised) and len(initialised) == len(list(model.parameters()))
    whole = (tmp_path / name).read_bytes()
    with torch.no_grad():
        model.text_embedding.weight.zero_()  # on a page of its own
    assert own_memory() - before > 60 and (tmp_path / name).read_bytes() == whole


def test_a_checkpoint_of_ours_is_one_too(tmp_path):
    model, path = tiny(), tmp_path / "best.pt"
    weights.save_checkpoint(path, checkpoint_of(model))
    again = from_pretrained(path, dtype=torch.bfloat16, decoder_fraction=0.5)
    assert again.config.decoder_fraction == 0.5 and torch.equal(again.codebook0_head, model.codebook0_head.bfloat16())


# ---------------------------------------------------------------------------------------------------------------------
# sizes


def test_config_json_says_what_shapes_cannot(original):
    def config_of(**given):
        return published.assemble(ORIGINAL, original, {**HEADS, **given}, "weights").config

    usual = config_of()
    assert (usual.backbone.n_head, usual.backbone.n_kv_head, usual.backbone.head_dim) == (4, 2, 16)
    assert (usual.decoder.n_head, usual.decoder.n_kv_head, usual.decoder.head_dim) == (4, 2, 8)
    assert usual.backbone.rope_scaling == usual.decoder.rope_scaling == models.LLAMA3_ROPE
    c = config_of(num_attention_heads=8, rms_norm_eps=1e-3, max_position_embeddings=77, rope_theta=9.0)
    assert (c.backbone.n_head, c.backbone.n_kv_head, c.backbone.head_dim) == (8, 4, 8)
    assert (c.backbone.norm_eps, c.backbone.max_positions, c.backbone.rope_theta) == (1e-3, 77, 9.0)
    assert c.backbone.rope_scaling == models.LLAMA3_ROPE and c.decoder == usual.decoder
    numbers = dict(zip(published.ROPE, (8.0, 1.0, 4.0, 100), strict=True))
    for said in ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 7.0, **numbers}},
                 {"rope_scaling": {"rope_type": "llama3", **numbers}, "rope_theta": 7.0}):  # fmt: skip
        c = config_of(**said).backbone
        assert (c.rope_theta, c.rope_scaling) == (7.0, (8.0, 1.0, 4.0, 100))
    for said in ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
                 {"rope_scaling": None, "rope_theta": 7.0}):  # fmt: skip
        c = config_of(**said).backbone
        assert (c.rope_theta, c.rope_scaling) == (7.0, None)


def test_changes(original):
    model = published.assemble(ORIGINAL, original, HEADS, "weights", stop="class", text_bos=3, dropout=None)
    assert (model.config.stop, model.config.text_bos, model.config.dropout) == ("class", 3, None)
    with pytest.raises(ValueError, match="stopp = 3: the family 'csm' has no such setting"):
        published.assemble(ORIGINAL, original, HEADS, "weights", stopp=3)


@pytest.mark.parametrize("given, message", [
    ({}, "number of heads of the backbone of width 64 is unknown: put a config.json with num_attention_heads"),
    ({"num_attention_heads": 4}, "number of heads of the decoder of width 32 is unknown"),
    ({**HEADS, "num_attention_heads": 5}, "the backbone cannot have 5 heads: its queries have width 64, its keys 32"),
    ({**HEADS, "num_attention_heads": "four"}, "weights: "),
    ({**HEADS, "rope_scaling": {"rope_type": "yarn"}}, "rope_type = 'yarn' in config.json; choose from default"),
    ({**HEADS, "max_position_embeddings": "many"}, "weights: "),
])  # fmt: skip
def test_configs_that_cannot_be(original, given, message):
    with pytest.raises(ValueError, match=message) as error:
        published.assemble(ORIGINAL, original, given, "weights")
    assert "\n" not in str(error.value)


NORM = "backbone.layers.1.mlp_norm.scale"


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop(NORM), f"lacks {NORM}$"),
    (lambda w: w.pop("projection.weight"), "lacks projection.weight$"),
    (lambda w: w.pop("backbone.norm.scale"), "lacks backbone.norm.scale$"),
    (lambda w: w.pop("audio_head"), "lacks audio_head$"),
    (lambda w: w.update(extra=torch.ones(1)), "holds extra, which the family 'csm' does not have"),
    (lambda w: w.update({"codec_model.x": torch.ones(1)}), "holds codec_model.x, which"),
    (lambda w: w.update({"backbone.layers.2.mlp_norm.scale": torch.ones(64)}), "lacks backbone.layers.2.sa_norm.scale"),
    (lambda w: w.update({NORM: torch.ones(63)}), rf"{NORM} \(63,\) does not give .*layers.1.mlp_norm.weight \(64,\)"),
    (lambda w: w.update(audio_head=torch.ones(4, 19, 32)), r"audio_head \(4, 19, 32\) does not give .* \(4, 19, 32\)"),
    (lambda w: w.update({"decoder.layers.0.attn.q_proj.weight": torch.ones(33, 32)}), "have 4 heads: its queries"),
    (lambda w: w.update({"backbone.layers.1.attn.k_proj.weight": torch.ones(31, 64)}), r"k_proj.weight \(31, 64\)"),
    (lambda w: w.update({"projection.weight": torch.ones(32, 64).int()}), "projection.weight is torch.int32: take"),
])  # fmt: skip
def test_tensors_that_do_not_fit(original, tmp_path, change, message):
    weights = dict(original)
    change(weights)
    path = write(tmp_path, weights) / "model.safetensors"
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@given(st.data())
def test_any_other_shape_is_refused_in_one_line(original, data):
    key = data.draw(st.sampled_from(sorted(original)))
    shape = data.draw(st.lists(st.integers(0, 99), max_size=3).filter(lambda s: tuple(s) != original[key].shape))
    with pytest.raises(ValueError) as error:
        published.assemble(ORIGINAL, {**original, key: torch.zeros(shape)}, HEADS, "weights")
    assert str(error.value).startswith("weights: ") and "\n" not in str(error.value)


def test_files_that_are_no_weights(original, tmp_path):
    whole = (write(tmp_path, original) / "model.safetensors").read_bytes()
    torch.save(original, tmp_path / "good.pt")
    zipped = (tmp_path / "good.pt").read_bytes()
    torch.save({"a": torch.ones(3)}, tmp_path / "foreign.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    for name, content, message in (
        ("a.safetensors", whole[: len(whole) // 2], "a.safetensors is truncated or damaged"),
        ("b.safetensors", b"", "b.safetensors is no file of weights, it is empty"),
        ("c.pt", zipped[: len(zipped) // 2], "c.pt is truncated"),
        ("d.txt", b"hello " * 99, "d.txt is no file of weights, it is a text"),
        ("e.safetensors.index.json", b"{", "index.json is not JSON"),
        ("f.safetensors.index.json", b"{}", "has no weight_map"),
        ("g.safetensors.index.json", b"[]", "holds no JSON object"),
        ("foreign.pt", None, "known layout, but tensors such as a; known are csm with backbone.layers.0.self_attn"),
        ("tensor.pt", None, "tensor.pt holds no weights of a known layout"),
        ("config.json", b"{", "config.json is not JSON"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            from_pretrained(tmp_path / (name if name != "config.json" else "model.safetensors"))
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="none.pt: no such file or folder of weights"):
        from_pretrained(tmp_path / "none.pt")
    os.mkdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="empty holds no weights"):
        from_pretrained(tmp_path / "empty")


def test_pickles_and_indexes_that_lead_in_circles(original, tmp_path):
    circle = {}
    circle["model"] = circle
    torch.save(circle, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt holds no weights of a known layout"):
        from_pretrained(tmp_path / "x.pt")
    index = tmp_path / "m.safetensors.index.json"
    for shard in (index.name, 5, ["a"], "../m.safetensors", "/etc/passwd", "config.json"):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(ValueError, match="index.json names .* which is no safetensors file beside it"):
            from_pretrained(index)
    write(tmp_path, original)
    for junk, message in (
        ("[" * 100_000, "config.json is not JSON"),
        ('{"depth_decoder_config": 5}', "safetensors: "),
        (json.dumps({**HEADS, "rms_norm_eps": "x"}), "norm_eps = 'x' is not of type float"),
        (json.dumps({**HEADS, "parlando": {"text_bos": "x"}}), "text_bos = 'x' is not of type int"),
    ):
        (tmp_path / "config.json").write_text(junk)
        with pytest.raises(ValueError, match=message) as error:
            from_pretrained(tmp_path / "model.safetensors")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(original, tmp_path, name, value):
    weights = {key: w.clone() for key, w in original.items()}
    weights["projection.weight"][1, 2] = value
    with pytest.raises(ValueError, match=f"{name}: projection.weight holds NaN or infinity"):
        from_pretrained(write(tmp_path, weights, name=name))


def test_the_package_safetensors_is_not_needed(original, tmp_path, monkeypatch):
    write(tmp_path, original)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    model = from_pretrained(tmp_path)
    export(model, tmp_path / "out")
    again = from_pretrained(tmp_path / "out")
    assert_same(again.state_dict().values(), model.state_dict().values(), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# export


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    for odd in (dict(qk_norm=True), dict(layers="ca"), dict(feed_forward="geglu"), dict(rope_theta=0.0)):
        with pytest.raises(ValueError, match="plain Llama layers"):
            export(tiny(backbone=odd), tmp_path / "out")
    model = tiny()
    lora.add_lora(model, rank=2, alpha=2)
    with pytest.raises(ValueError, match="lora_default.a is no published tensor: merge adapters first"):
        export(model, tmp_path / "out")
    with pytest.raises(ValueError, match="layout = 'gguf': the family 'csm' has transformers"):
        export(tiny(), tmp_path / "out", "gguf")
    monkeypatch.delitem(EXPORTS, "csm")
    with pytest.raises(ValueError, match="the family 'csm' cannot be exported"):
        export(tiny(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_fails_leaves_the_old_one(tmp_path):
    export(tiny(), tmp_path)
    old = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    os.symlink("/dev/full", tmp_path / "config.json.partial")
    with pytest.raises(OSError):
        export(tiny(stop="zeros"), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == old


def test_the_command(tmp_path):
    model = tiny(backbone=dict(rope_scaling=(32.0, 1.0, 4.0, 8192)))
    weights.save_checkpoint(tmp_path / "best.pt", checkpoint_of(model))
    flags = [f"--ckpt={tmp_path / 'best.pt'}", "--out_dir", str(tmp_path / "out")]
    said = subprocess.run([sys.executable, "weights.py", "export", *flags], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert said.returncode == 0 and "kyutai/mimi" in said.stdout, said.stderr
    again = from_pretrained(tmp_path / "out")
    assert_same(again.state_dict().values(), model.state_dict().values(), rtol=0, atol=0)
    for words in (["export"], ["export", flags[0]], ["import", *flags]):
        with pytest.raises(ValueError, match="give what to export, and where to"):
            weights.main(configurator.configure(weights.__file__, words, ["command"]))


# ---------------------------------------------------------------------------------------------------------------------
# training goes on from them


@pytest.fixture
def released(tokens, tmp_path):
    """A folder of published weights that fit the tokens and know five text ids more."""
    vocab = json.loads((Path(tokens) / "meta.json").read_text())["tokenizer"]["vocab_size"]
    torch.manual_seed(1)
    stack = dict(n_layer=1, n_head=2, n_kv_head=1, d_model=24, d_ff=32, rope_scaling=models.LLAMA3_ROPE)
    model = CSM(CSMConfig(vocab + 5, 3, 16, stack, 0, 0, decoder={**stack, "d_model": 12}, stop="zeros"))
    export(model, tmp_path / "released")
    return tmp_path / "released", model


def test_training_starts_from_them_and_goes_on(tokens, released, tmp_path):
    from helpers import TINY, exact
    from helpers import run as run_tiny

    from voice import Voice

    run = partial(run_tiny, usual=[flag for flag in TINY if not flag.startswith(("--backbone", "--decoder="))])
    folder, model = released
    flags = [f"--init_from={folder}", "--lr_schedule=constant", "--warmup_iters=0", "--dropout=0.1"]
    begun, _ = run(tokens, tmp_path / "still", *flags, "--max_iters=1", "--learning_rate=1e-12", "--weight_decay=0")
    assert_same(begun["model"].values(), model.state_dict().values(), rtol=0, atol=1e-6)
    config, rows = begun["model_config"], model.config.text_vocab_size
    assert config["backbone"]["d_model"] == 24 and config["backbone"]["rope_scaling"] == (32.0, 0.125, 0.5, 1024)
    assert (config["stop"], config["text_vocab_size"], config["dropout"]) == ("zeros", rows, 0.1)
    assert config["text_bos"] == begun["meta"]["tokenizer"]["bos_id"] != 0

    flags[1] = "--decoder_fraction=0.5"
    whole, lines = run(tokens, tmp_path / "whole", *flags, "--max_iters=6")
    run(tokens, tmp_path / "parts", *flags, "--max_iters=3", "--lr_decay_iters=6")
    flags[0] = "--init_from=resume"
    parts, more = run(tokens, tmp_path / "parts", *flags, "--max_iters=6")
    assert_same(whole["model"].values(), parts["model"].values(), rtol=0, atol=0)
    assert exact(lines)[-1]["loss"] == exact(more)[-1]["loss"] < exact(lines)[0]["loss"] + 1
    voice = Voice.from_checkpoint(str(tmp_path / "parts" / "last.pt"))
    assert len(voice.say("one two", cap_seconds=1)) >= 0
    flags[0] = f"--init_from={tmp_path}/parts/last.pt"
    assert run(tokens, tmp_path / "again", *flags, "--max_iters=1")[0]["model_config"]["text_vocab_size"] == rows


def test_training_refuses_what_does_not_fit(tokens, released):
    folder, model = released
    meta = json.loads((Path(tokens) / "meta.json").read_text())
    cfg = configurator.configure(train.__file__, [f"--init_from={folder}", f"--out_dir={folder}/none"])
    started, checkpoint = train.starting_point(cfg, None, meta)
    assert started.training and checkpoint is None
    assert started.config.decoder_fraction == cfg.decoder_fraction == 0.0625
    vocab = model.config.text_vocab_size
    for part, key, value, message in (
        ("tokenizer", "vocab_size", vocab + 1, f"knows {vocab} text ids, the data have {vocab + 1}: prepare them with"),
        ("codec", "n_codebooks", 2, "speaks in 3 codebooks of 16, the data in 2 of 16"),
        ("codec", "codebook_size", 15, "speaks in 3 codebooks of 16, the data in 3 of 15"),
    ):
        with pytest.raises(ValueError, match=message):
            train.starting_point(cfg, None, {**meta, part: {**meta[part], key: value}})
    cfg.arch = "kani"
    with pytest.raises(ValueError, match="arch = 'kani', but .*released is of the family 'csm'"):
        train.starting_point(cfg, None, meta)

"""export.py: each layout against the lists of its authors, against the software that reads it, and read back.

The names and shapes that are expected stand here, not in the tables of layouts.py.
"""

import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GREEDY, assert_same, batch_of, run, tiny, utterance
from helpers import TINY as HELPERS_TINY
from safetensors.torch import load_file
from test_codec_networks import TINY, mimi, moshi
from test_valle import published_table
from test_xtts import download
from test_xtts import sheet as xtts_sheet

import model as models
import weights
from codec import load_codec
from export import EXPORTS, Source, export, published
from layouts import CSM_MLX, CSM_ORIGINAL, CSM_TRANSFORMERS, VALLE_V2, XTTS_V2, WithoutMemory, grow
from model import CSM, CSMConfig, Kani, KaniConfig
from parts import configurator
from parts.affine import dequantise, quantise
from parts.files import whole
from parts.tensors import read_metadata, write_safetensors
from parts.text import HuggingFace, SentencePiece, train_tokenizer
from weights import from_pretrained, save_checkpoint, source_of

WORDS = ["zero", "one", "two", "three"]


def state_of(path, **options):
    return from_pretrained(path, **options).state_dict()


def same_state(a, b):
    assert a.keys() == b.keys()
    assert_same(a.values(), b.values(), rtol=0, atol=0)


def shapes_of(tensors):
    return {key: tuple(x.shape) for key, x in tensors.items()}


# ---------------------------------------------------------------------------------------------------------------------
# CSM: names and shapes


def llama(prefix, words, layers, D, q, kv, inner):
    """The tensors of a stack of Llama layers. words: the names of q, k, v, o; gate, up, down; both norms; last norm."""
    shapes = [(q, D), (kv, D), (kv, D), (D, q), (inner, D), (inner, D), (D, inner), (D,), (D,)]
    *inside, last = words
    table = {f"{prefix}.layers.{i}.{word}": shape for i in range(layers)
             for word, shape in zip(inside, shapes, strict=True)}  # fmt: skip
    return {**table, f"{prefix}.{last}": (D,)}


TORCHTUNE = ["attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight", "attn.output_proj.weight",
             "mlp.w1.weight", "mlp.w3.weight", "mlp.w2.weight", "sa_norm.scale", "mlp_norm.scale", "norm.scale"]
LLAMA = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
         "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight",
         "post_attention_layernorm.weight", "norm.weight"]  # fmt: skip


def sheet(layout, text, K, V, backbone, depth):
    """Names and shapes of a CSM with `text` ids and K codebooks of V classes. backbone, depth: layers, D, q, kv, inner.
    """
    D, d = backbone[1], depth[1]
    if layout == "transformers":
        return {
            "embed_text_tokens.weight": (text, D), "lm_head.weight": (V, D),
            "backbone_model.embed_tokens.embed_audio_tokens.weight": (K * V, D),
            "depth_decoder.model.embed_tokens.weight": (K * V, D),
            "depth_decoder.model.inputs_embeds_projector.weight": (d, D),
            "depth_decoder.codebooks_head.weight": (K - 1, d, V),
            **llama("backbone_model", LLAMA, *backbone), **llama("depth_decoder.model", LLAMA, *depth),
        }  # fmt: skip
    words, prefix = (TORCHTUNE, "") if layout == "original" else (LLAMA, "model.")
    table = {"text_embeddings.weight": (text, D), "audio_embeddings.weight": (K * V, D), "projection.weight": (d, D),
             "codebook0_head.weight": (V, D), "audio_head": (K - 1, d, V), **llama("backbone", words, *backbone),
             **llama("decoder", words, *depth)}  # fmt: skip
    return {f"{prefix}{key}": shape for key, shape in table.items()}


CSM_1B = (128256, 32, 2051, (16, 2048, 2048, 512, 8192), (4, 1024, 1024, 256, 8192))
MARVIS = (49152, 32, 2051, (6, 1536, 1536, 384, 8192), (4, 1024, 1024, 256, 4096))
SMALL = (30, 4, 19, (2, 32, 32, 16, 48), (2, 16, 16, 8, 48))  # helpers.tiny


@pytest.mark.parametrize("sizes, stacks", [(CSM_1B, ("llama-1B", "llama-100M")), (MARVIS, ("llama-250M", "llama-60M"))])
def test_names_and_shapes_at_published_sizes(sizes, stacks):
    with WithoutMemory():
        model = CSM(CSMConfig(sizes[0], 32, 2048, stacks[0], decoder=stacks[1]))
    for layout in (CSM_ORIGINAL, CSM_TRANSFORMERS, CSM_MLX):
        tensors = published(layout, Source(model))
        assert shapes_of(tensors) == sheet(layout.name, *sizes)
        assert {x.dtype for x in tensors.values()} == {torch.float32}
    assert len(sheet("transformers", *sizes)) == len(sheet("original", *sizes)) + 1


@pytest.mark.parametrize("layout, file", [
    ("transformers", "model.safetensors"), ("original", "model.safetensors"), ("original-pickle", "ckpt.pt"),
    ("mlx", "model.safetensors"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_csm_is_read_back_bit_by_bit(layout, file, dtype, tmp_path):
    model = tiny(backbone=dict(rope_scaling=models.LLAMA3_ROPE, max_positions=2048), decoder=dict(max_positions=2048))
    export(model, tmp_path, layout, dtype=dtype)
    tensors = load_file(tmp_path / file) if file.endswith("safetensors") else torch.load(tmp_path / file)["model_state"]
    assert shapes_of(tensors) == sheet(layout.removesuffix("-pickle"), *SMALL)
    assert {x.dtype for x in tensors.values()} == {dtype or torch.float32}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype or torch.float32)[6:]
    again = from_pretrained(tmp_path)
    same_state({key: x.to(dtype or x.dtype).float() for key, x in model.state_dict().items()}, again.state_dict())
    assert (again.config.stop, again.config.text_bos, again.config.text_eos) == ("class", 1, 2)
    batch = batch_of(model, utterance(5, 9))
    if dtype is None:
        torch.testing.assert_close(again(*batch)[0], model.eval()(*batch)[0], rtol=1e-6, atol=1e-6)


def test_every_layout_is_the_same_model(tmp_path):
    """From one published layout into all others and back, without a rounding."""
    first = tiny(stop="zeros").eval()
    export(first, tmp_path / "0", "original")
    for i, layout in enumerate(["mlx", "transformers", "original-pickle", "transformers", "original"]):
        model, known = source_of(tmp_path / str(i))
        export(model, tmp_path / str(i + 1), layout, **known)
        same_state(state_of(tmp_path / str(i + 1)), first.state_dict())
    before, after = (load_file(tmp_path / i / "model.safetensors") for i in "05")
    same_state(before, after)


# ---------------------------------------------------------------------------------------------------------------------
# CSM: few bits


def wide(**options):
    """A small CSM whose rows divide into groups, but for the depth decoder's."""
    return tiny(backbone=dict(d_model=64, d_ff=128, rope_scaling=models.LLAMA3_ROPE),
                decoder=dict(rope_scaling=models.LLAMA3_ROPE), **options)  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
def test_few_bits(bits, tmp_path):
    model = wide()
    export(model, tmp_path, f"mlx-{bits}bit")
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == {"group_size": 64, "bits": bits, "mode": "affine"}
    plain = published(CSM_MLX, Source(model))
    packed = {key for key, x in plain.items() if x.ndim == 2 and x.shape[1] % 64 == 0}
    assert {"model.text_embeddings.weight", "model.audio_embeddings.weight", "model.codebook0_head.weight",
            "model.projection.weight", "model.backbone.layers.1.mlp.down_proj.weight"} <= packed  # fmt: skip
    assert "model.decoder.layers.0.self_attn.q_proj.weight" not in packed
    again = published(CSM_MLX, Source(from_pretrained(tmp_path)))
    for key, x in plain.items():
        if key not in packed:
            assert torch.equal(tensors[key], x) and torch.equal(again[key], x)
            continue
        stem = key.removesuffix(".weight")
        parts = [tensors[f"{stem}.{part}"] for part in ("weight", "scales", "biases")]
        assert parts[0].dtype == torch.uint32 and parts[0].shape == (len(x), x.shape[1] * bits // 32)
        assert parts[1].dtype == torch.float32 and parts[1].shape == (len(x), x.shape[1] // 64)
        for part, expected in zip(parts, quantise(x, bits), strict=True):
            assert torch.equal(part, expected)
        torch.testing.assert_close(again[key], dequantise(*parts), rtol=0, atol=0)
        assert (again[key] - x).abs().max() <= parts[1].abs().max()
    count = sum(f"{key.removesuffix('.weight')}.scales" in tensors for key in packed)
    assert count == len(packed) and len(tensors) == len(plain) + 2 * count


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_files_that_mlx_wrote(bits, tmp_path):
    """Its own quantised layers and embeddings, in half precision, are the same numbers here."""
    mx, nn = pytest.importorskip("mlx.core"), pytest.importorskip("mlx.nn")
    model = wide()
    export(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = {key: mx.array(x.numpy()).astype(mx.bfloat16) for key, x in published(CSM_MLX, Source(model)).items()}
    for key in [key for key, x in weights.items() if x.ndim == 2 and x.shape[1] % 64 == 0]:
        layer = nn.Embedding(1, 64) if "embeddings" in key else nn.Linear(64, 1, bias=False)
        layer.weight = weights.pop(key)
        for name, x in layer.to_quantized(64, bits).parameters().items():
            weights[key.replace("weight", name)] = x
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, {"format": "mlx"})
    config["quantization"] = {"group_size": 64, "bits": bits}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = published(CSM_MLX, Source(from_pretrained(tmp_path)))
    for key, x in read.items():
        scales = weights.get(key.replace(".weight", ".scales"))
        if scales is None or key == "model.audio_head":
            expected = weights[key]
        else:
            parts = (weights[key], scales, weights[key.replace("weight", "biases")])
            expected = mx.dequantize(parts[0], *(part.astype(mx.float32) for part in parts[1:]), 64, bits)
        assert np.allclose(x.numpy(), np.array(expected.astype(mx.float32)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [0, 4])
def test_mlx_reads_it(bits, tmp_path):
    """mlx' own layers load the file and compute what ours compute."""
    mx, nn = pytest.importorskip("mlx.core"), pytest.importorskip("mlx.nn")
    model = wide().eval()
    export(model, tmp_path, f"mlx-{bits}bit" if bits else "mlx")
    weights = mx.load(str(tmp_path / "model.safetensors"))
    table, head = nn.Embedding(*model.text_embedding.weight.shape), nn.Linear(64, 19, bias=False)
    for layer, name in ((table, "text_embeddings"), (head, "codebook0_head")):
        layer = layer.to_quantized(64, bits) if bits else layer
        layer.load_weights([(key.split(".")[-1], x) for key, x in weights.items() if f".{name}." in key], strict=True)
        x = mx.array(np.arange(19) if name == "text_embeddings" else np.eye(64, dtype=np.float32))
        ours = from_pretrained(tmp_path)
        expected = ours.text_embedding.weight[:19] if name == "text_embeddings" else ours.codebook0_head.T
        assert np.allclose(np.array(layer(x)), expected.detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part, change, message", [
    ("biases", lambda x: None, "lacks text_embeddings.biases: only affine quantisation is known"),
    ("scales", lambda x: None, "text_embeddings.weight is torch.uint32: take weights that are not quantised"),
    ("weight", lambda x: x.view(torch.float32), r"no weight in groups of 64 has words \(torch.float32\)"),
    ("scales", lambda x: x * math.nan, "text_embeddings.weight holds NaN or infinity"),
    ("", "affine", "quantization in its config.json is damaged: it holds 'affine', not an object"),
    ("", {"group_size": 0}, "quantization in its config.json is damaged: group_size is 0"),
    ("", {"group_size": 32}, "codebook0_head.weight .* does not give codebook0_head"),
])  # fmt: skip
def test_few_bits_that_are_damaged(part, change, message, tmp_path):
    export(wide(), tmp_path, "mlx-4bit")
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    if part:
        key = f"model.text_embeddings.{part}"
        tensors[key] = change(tensors[key])
        tensors = {key: x for key, x in tensors.items() if x is not None}
    else:
        config["quantization"] = change
    with whole(tmp_path / "model.safetensors") as file:  # the tensors are mapped from the old one
        write_safetensors(file, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_the_tokenizer_that_mlx_audio_is_told(kind, tmp_path):
    """The folder's own, which puts the marks around a text: mlx-audio asks for no more."""
    import tokenizers

    tokenizer = own_tokenizer() if kind == "own" else bpe(300, "<|begin_of_text|>", "<|end_of_text|>")
    model = wide()
    model.config.text_bos, model.config.text_eos = tokenizer.bos_id, tokenizer.eos_id
    notes = export(model, tmp_path, "mlx", tokenizer=tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text_tokenizer"] == str(tmp_path) and any("text_tokenizer" in note for note in notes)
    ids = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("one two").ids
    assert ids == [tokenizer.bos_id, *tokenizer.encode("one two"), tokenizer.eos_id]
    export(model, tmp_path / "b", "mlx", tokenizer=tokenizer, given={"text_tokenizer": "its/own"})
    assert json.loads((tmp_path / "b/config.json").read_text())["text_tokenizer"] == "its/own"


def test_what_mlx_cannot_turn(tmp_path):
    with pytest.raises(ValueError, match="mlx-audio turns positions by rope_theta = 500000"):
        export(tiny(backbone=dict(rope_theta=1e4)), tmp_path, "mlx")
    with pytest.raises(ValueError, match="mlx-audio turns positions"):
        export(tiny(decoder=dict(rope_scaling=(32.0, 1.0, 4.0, 4096))), tmp_path, "mlx-4bit")


# ---------------------------------------------------------------------------------------------------------------------
# CSM in transformers


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mimi")
    mimi(folder, **TINY["mimi"])
    return load_codec("mimi", folder)


def bpe(size, *special):
    """A byte-level tokenizer.json such as Llama's: pieces, then special tokens."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    made.add_special_tokens(list(special))
    return HuggingFace(made.to_str().encode())


def own_tokenizer():
    return SentencePiece(train_tokenizer(["[a][b]" + " ".join(WORDS)], 300, ["[a]", "[b]"]))


def speaking(tokenizer, codec, rows=0, **options):
    torch.manual_seed(0)
    stack = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, max_positions=512)
    model = CSM(CSMConfig(max(rows, tokenizer.vocab_size), 4, codec.codebook_size, stack, tokenizer.bos_id,
                          tokenizer.eos_id, decoder={**stack, "d_model": 16}, **options)).eval()  # fmt: skip
    for p in model.parameters():
        if p.ndim > 1:
            p.data.normal_(std=0.3)
    return model


@pytest.mark.parametrize("kind", ["own", "llama", "free rows"])
def test_transformers_reads_the_text_and_speaks(kind, codec, tmp_path):
    """Tokenizer, processor, generation and codec of the folder give the ids, codes and waveform of ours."""
    from transformers import AutoProcessor, AutoTokenizer, CsmForConditionalGeneration

    marks = ("<|begin_of_text|>", "<|end_of_text|>")
    tokenizer = own_tokenizer() if kind == "own" else bpe(300, *marks, *(["<|x|>", "<|y|>"] if kind == "llama" else []))
    model = speaking(tokenizer, codec, rows=0 if kind != "free rows" else tokenizer.vocab_size + 2)
    notes = export(model, tmp_path, tokenizer=tokenizer, codec=codec, text_format="[{speaker}]{text}")
    assert ("no place for <|AUDIO|>" in " ".join(notes)) == (kind == "own")
    assert any("not at the stop class of this model" in note for note in notes)
    theirs, report = CsmForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    ids = tokenizer.encode("[a]one two three")
    expected = model.config.marked(ids).tolist()
    bos, eos = (tokenizer.piece(i) for i in (tokenizer.bos_id, tokenizer.eos_id))
    fast = AutoTokenizer.from_pretrained(tmp_path)
    assert fast("[a]one two three", add_special_tokens=False).input_ids == ids
    assert (fast.bos_token, fast.eos_token) == (bos, eos) and fast.pad_token is not None
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor).__name__ == "CsmProcessor"
    inputs = processor(f"{bos}[a]one two three{eos}")
    assert inputs["input_ids"].tolist() == [expected]
    greedy = dict(do_sample=False, depth_decoder_do_sample=False, max_new_tokens=12)
    audio = theirs.generate(**inputs, **greedy, output_audio=True)[0]
    ours = torch.stack(list(model.generate(np.array(ids), max_frames=12, draw=GREEDY)))
    torch.testing.assert_close(audio, codec.decode(ours.T[None])[0], rtol=0, atol=1e-4)
    assert len(theirs.generate(**inputs, max_new_tokens=5)[0]) == 5  # as generation_config.json says
    if kind == "own":
        return
    talk = [{"role": "a", "content": [{"type": "text", "text": "one two three"}]}]
    inputs = processor.apply_chat_template(talk, tokenize=True, return_dict=True)
    assert inputs["input_ids"].tolist() == [expected]
    wav = 0.1 * torch.randn(5 * codec.samples_per_frame).numpy()
    talk = [{"role": "a", "content": [{"type": "text", "text": "one"}, {"type": "audio"}]}, *talk]
    text = processor.apply_chat_template(talk, tokenize=False)
    ids = processor(text, wav)["input_ids"][0].tolist()
    audio, end = theirs.config.audio_token_id, theirs.config.audio_eos_token_id
    prompt = model.config.marked(tokenizer.encode("[a]one")).tolist()
    assert ids[: len(prompt)] == prompt and ids[-len(expected) :] == expected
    assert set(ids[len(prompt) : -len(expected)]) == {audio, end} and ids[-len(expected) - 1] == end


def test_a_folder_like_that_of_csm_1b(codec, tmp_path):
    """It holds the model twice: by its authors' names, and with tokenizer and codec for transformers, in shards."""
    marks = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|a|>", "<|b|>", "<|c|>")
    tokenizer = bpe(300, *marks)
    ids = [tokenizer.vocab[mark] for mark in marks[2:4]]
    model = speaking(tokenizer, codec, stop="zeros")
    folder = tmp_path / "csm-1b"
    export(model, folder, tokenizer=tokenizer, codec=codec)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    export(model, folder, "original", tokenizer=tokenizer)
    names, halves = {}, (dict(list(tensors.items())[:99]), dict(list(tensors.items())[99:]))
    for i, half in enumerate(halves):
        names |= dict.fromkeys(half, f"transformers-0000{i + 1}-of-00002.safetensors")
        with open(folder / f"transformers-0000{i + 1}-of-00002.safetensors", "wb") as file:
            write_safetensors(file, half)
    (folder / "transformers.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    config = json.loads((folder / "config.json").read_text())
    config |= {"audio_token_id": ids[0], "audio_eos_token_id": ids[1]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("of the authors")
    (folder / "tokenizer.json").write_bytes(tokenizer.model)
    again, known = source_of(folder)
    assert known["file"].endswith("model.safetensors") and known["codec"].path.endswith("index.json")
    export(again, tmp_path / "out", **known)
    same_state(load_file(tmp_path / "out/model.safetensors"), tensors)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert [config["audio_token_id"], config["audio_eos_token_id"]] == ids
    export(again, tmp_path / "b", "original", **known)
    assert (tmp_path / "b/chat_template.jinja").read_text() == "of the authors"  # beside the same tokenizer.json
    assert (tmp_path / "b/tokenizer.json").read_bytes() == tokenizer.model


@pytest.mark.parametrize("layout", ["transformers", "moshi", "inside"])
def test_the_codec_goes_along(layout, codec, tmp_path):
    """Bit by bit where its file has transformers' names, else as tables that give the same codes."""
    from transformers import CsmForConditionalGeneration

    original = load_file(Path(codec.path).parent / "model.safetensors")
    source = codec
    if layout == "moshi":
        os.makedirs(tmp_path / "moshi")
        import safetensors.torch

        path = tmp_path / "moshi" / "tokenizer-e351c8d8-checkpoint125.safetensors"
        safetensors.torch.save_file({key: x.contiguous() for key, x in moshi(original).items()}, path)
        source = load_codec("mimi", path)
    model = speaking(own_tokenizer(), codec)
    export(model, tmp_path / "a", codec=source)
    if layout == "inside":  # as in the released CSM
        model, known = source_of(tmp_path / "a")
        export(model, tmp_path / "b", **known)
    written = load_file(tmp_path / ("b" if layout == "inside" else "a") / "model.safetensors")
    inside = {key.removeprefix("codec_model."): x for key, x in written.items() if key.startswith("codec_model.")}
    assert shapes_of(inside) == shapes_of(original)
    if layout != "moshi":
        return same_state(inside, original)
    theirs = CsmForConditionalGeneration.from_pretrained(tmp_path / "a").codec_model
    wav = 0.1 * torch.randn(1, 1, 9600)
    with torch.no_grad():
        assert torch.equal(theirs.encode(wav).audio_codes, codec.encode(wav[0]))


# ---------------------------------------------------------------------------------------------------------------------
# Kani


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["own", "lfm2"])
def test_kani_starts_in_transformers(kind, dtype, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = own_tokenizer() if kind == "own" else bpe(300, "<|startoftext|>", "<|im_end|>")
    torch.manual_seed(0)
    stack = dict(n_layer=3, n_head=4, n_kv_head=2, d_model=32, d_ff=48, layers="cac", qk_norm=True, max_positions=512)
    c = KaniConfig(tokenizer.vocab_size, 3, 16, stack, tokenizer.bos_id, tokenizer.eos_id)
    model = Kani(c).eval()
    export(model, tmp_path, tokenizer=tokenizer, dtype=dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    expected = {"model.embed_tokens.weight": (c.vocab_size, 32), "model.embedding_norm.weight": (32,)}
    for i, letter in enumerate("cac"):
        layer = f"model.layers.{i}"
        expected |= {f"{layer}.{norm}.weight": (32,) for norm in ("operator_norm", "ffn_norm")}
        expected |= {f"{layer}.feed_forward.w1.weight": (48, 32), f"{layer}.feed_forward.w3.weight": (48, 32),
                     f"{layer}.feed_forward.w2.weight": (32, 48)}  # fmt: skip
        if letter == "c":
            expected |= {f"{layer}.conv.in_proj.weight": (96, 32), f"{layer}.conv.conv.weight": (32, 1, 3),
                         f"{layer}.conv.out_proj.weight": (32, 32)}  # fmt: skip
        else:
            expected |= {f"{layer}.self_attn.{x}_proj.weight": (32 if x in ("q", "out") else 16, 32)
                         for x in ("q", "k", "v", "out")}  # fmt: skip
            expected |= {f"{layer}.self_attn.{x}_layernorm.weight": (8,) for x in "qk"}
    assert shapes_of(tensors) == expected and {x.dtype for x in tensors.values()} == {dtype or torch.float32}
    same_state(state_of(tmp_path, dtype=dtype or torch.float32), model.to(dtype or torch.float32).state_dict())
    theirs, fast = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.dtype == (dtype or torch.float32) and theirs.lm_head.weight is theirs.model.embed_tokens.weight
    ids = fast("one two three", add_special_tokens=False).input_ids
    assert ids == tokenizer.encode("one two three")
    how = theirs.generation_config
    assert (how.temperature, how.top_p, how.repetition_penalty, how.max_new_tokens) == (0.6, 0.95, 1.1, 1200)
    assert how.eos_token_id == [c.end_of_speech, c.end_of_ai] and how.pad_token_id == c.first_special + 6
    prompt = torch.from_numpy(model.layout(np.array(ids))[0]).T
    made = theirs.generate(prompt, max_new_tokens=9)
    assert prompt.shape[1] < made.shape[1] <= prompt.shape[1] + 9


def test_layouts_that_a_family_does_not_have(tmp_path):
    model = Kani(KaniConfig(30, 3, 16, dict(n_layer=1, n_head=2, n_kv_head=1, d_model=16, d_ff=24)))
    with pytest.raises(ValueError, match="layout = 'mlx': the family 'kani' has transformers"):
        export(model, tmp_path, "mlx")
    assert set(EXPORTS) == {"csm", "kani", "xtts", "valle"} and not os.listdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# XTTS

def test_xtts_names_and_shapes_at_the_published_size():
    with WithoutMemory():
        model = models.XTTS(models.XTTSConfig(6681, 1024, "gpt2-xtts", 261, 0, vocoder=True))
    expected = {f"gpt.{key}": shape for key, shape in xtts_sheet().items()}
    assert shapes_of(published(XTTS_V2, Source(model))) == expected and len(expected) == 426


FIVE = ["config.json", "dvae.pth", "mel_stats.pth", "model.pth", "vocab.json"]


@pytest.fixture(scope="module")
def xtts(tmp_path_factory):
    """A folder as XTTS-v2 is downloaded, with what other software may have put there."""
    folder = tmp_path_factory.mktemp("xtts-v2")
    download(folder)
    content = torch.load(folder / "model.pth")
    content["model"]["mel_stats"] = torch.full((80,), 2.0)
    torch.save(content, folder / "model.pth")
    dvae = torch.load(folder / "dvae.pth")
    for key in ("codebook.embed_avg", "codebook.cluster_size"):
        dvae[key] = dvae[key][..., :32].clone()  # as many as codebook.embed has
    torch.save(dvae, folder / "dvae.pth")
    return folder


def same_five(a, b, but=()):
    """Check that two folders of XTTS hold the same: files, keys, types and numbers, but for these keys."""
    assert sorted(os.listdir(a)) == sorted(os.listdir(b)) == FIVE
    for name in ("dvae.pth", "mel_stats.pth", "vocab.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    before, after = (torch.load(folder / "model.pth")["model"] for folder in (a, b))
    assert before.keys() == after.keys()
    assert {key for key, x in before.items() if x.dtype != after[key].dtype or not torch.equal(x, after[key])} == {*but}


def test_xtts_comes_out_as_it_went_in(xtts, tmp_path):
    model, known = source_of(xtts)
    assert export(model, tmp_path, **known) == []
    same_five(xtts, tmp_path)
    given, config = (json.loads((folder / "config.json").read_text())["model_args"] for folder in (xtts, tmp_path))
    assert given.items() <= config.items()
    sizes = dict(gpt_layers=2, gpt_n_model_channels=32, gpt_n_heads=2, gpt_number_text_tokens=40, decoder_input_dim=32,
                 gpt_num_audio_tokens=34, gpt_start_audio_token=32, gpt_stop_audio_token=33)  # fmt: skip
    assert sizes.items() <= config.items()
    again = from_pretrained(tmp_path)
    assert again.config == model.config
    heard = torch.randn(50, 80)
    given = dict(reference=heard, max_frames=9, draw=GREEDY)
    first, second = ([int(code) for code in speaker.generate(np.array([5, 6, 7]), **given)]
                     for speaker in (model, again))  # fmt: skip
    assert first == second and load_codec("xtts", tmp_path).fingerprint() == load_codec("xtts", xtts).fingerprint()


def test_xtts_that_learned_more_words(xtts, tmp_path):
    """A checkpoint, whose GPT alone differs from what it descends from: in one tensor, and in rows of its own."""
    model, known = source_of(xtts)
    model.config.text_vocab_size = 45
    larger = grow(model)
    larger.final_norm.bias.data += 1
    spec = json.loads(known["tokenizer"].model)
    spec["added_tokens"] += [{**spec["added_tokens"][0], "id": 40 + i, "content": f"[new{i}]"} for i in range(5)]
    words = json.dumps(spec).encode()
    meta = {"tokenizer": {"sha256": ""}, "text_format": "[{language}]{text}"}
    save_checkpoint(tmp_path / "best.pt", {
        "arch": "xtts", "model_config": asdict(larger.config), "model": larger.state_dict(), "meta": meta,
        "codec": known["codec"].pack(), "tokenizer": {"kind": "tokenizers", "model": words}, "origin": str(xtts),
    })  # fmt: skip
    main("export", tmp_path / "best.pt", f"--out_dir={tmp_path / 'out'}")
    before, after = (torch.load(folder / "model.pth")["model"] for folder in (xtts, tmp_path / "out"))
    tables = {"gpt.text_embedding.weight", "gpt.text_head.weight", "gpt.text_head.bias"}
    assert before.keys() == after.keys()
    assert {key for key, x in before.items() if not torch.equal(x, after[key])} == {*tables, "gpt.final_norm.bias"}
    assert all(len(after[key]) == 45 and torch.equal(after[key][:40], before[key]) for key in tables)
    assert (tmp_path / "out/vocab.json").read_bytes() == words
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_args"]["gpt_number_text_tokens"] == 45
    same_state(state_of(tmp_path / "out"), larger.state_dict())


def test_a_codec_that_was_fine_tuned(xtts, tmp_path):
    """Its dvae.pth holds the tensors of now, and all others bit for bit."""
    model, known = source_of(xtts)
    codec = known["codec"]
    tuned = ("encoder.0.0.weight", "quantizer.codebooks", "decoder.4.0.bias")
    codec.load_state_dict({name: codec.state_dict()[name] + 0.01 for name in tuned}, strict=False, assign=True)
    codec.become_tuned()
    export(model, tmp_path, **known)
    before, after = (torch.load(folder / "dvae.pth") for folder in (xtts, tmp_path))
    changed = {key for key, x in before.items() if not torch.equal(x, after[key])}
    assert before.keys() == after.keys()
    assert changed == {"encoder.0.0.weight", "codebook.embed", "codebook.embed_avg", "decoder.4.0.conv.bias"}
    again = load_codec("xtts", tmp_path)
    same_state(again.state_dict(), codec.state_dict())
    wav = 0.1 * torch.randn(1, 9000)
    assert torch.equal(again.encode(wav), codec.encode(wav))


def test_what_xtts_needs(xtts, tmp_path):
    model, known = source_of(xtts)
    for missing in ("codec", "tokenizer"):
        with pytest.raises(ValueError, match="its vocoder and its tokenizer: they are not at hand"):
            export(model, tmp_path, **{**known, missing: None})
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# VALL-E


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """A hub's folder of VALL-E, with the tensors for other tasks."""
    folder = tmp_path_factory.mktemp("vall-e") / "models" / "ckpt" / "nemo-smaller-44khz-llama-8"
    folder.mkdir(parents=True)
    golden = load_file(Path(__file__).parent / "golden" / "valle2.safetensors")
    facts = json.loads((Path(__file__).parent / "golden" / "valle2.json").read_text())["config"]
    weights = {key.removeprefix("weights."): x for key, x in golden.items() if key.startswith("weights.")}
    assert {"text_emb.weight", "tasks_emb.weight", "tones_emb.weight"} <= weights.keys()
    said = {"experimental": facts["experimental"], "size": {"heads": facts["n_heads"]}, "version": 7}
    with open(folder / "fp32.sft", "wb") as file:
        write_safetensors(file, weights, {"config": json.dumps(said), "stats": '{"global_step": 3}', "userdata": "{}"})
    return folder / "fp32.sft"


def test_valle_names_and_shapes_at_the_published_size():
    with WithoutMemory():
        model = models.VallE(models.VallEConfig(256, 8, 1000, "valle-60M", 1, 2, mode="nar", languages=6))
    others = {"text_emb", "tasks_emb", "tones_emb", "phn_decoder", "text_decoder"}
    table = {key: shape for key, shape in published_table(512, 12, 2048).items() if key.split(".")[0] not in others}
    assert shapes_of(published(VALLE_V2, Source(model))) == table


def test_valle_comes_out_as_it_went_in(sft, tmp_path):
    model, known = source_of(sft.parents[3])  # of the whole hub's folder
    export(model, tmp_path, **known)
    assert sorted(os.listdir(tmp_path)) == ["fp32.sft"]
    before, after = load_file(sft), load_file(tmp_path / "fp32.sft")
    assert list(before) == list(after) and {x.dtype for x in after.values()} == {torch.float32}
    same_state(before, after)
    assert read_metadata(sft) == read_metadata(tmp_path / "fp32.sft")
    assert from_pretrained(tmp_path).config == model.config


@pytest.mark.parametrize("mode", ["nar", "ar"])
def test_valle_that_learned(sft, mode, tmp_path):
    """Of a checkpoint, the tensors for other tasks come from what it descends from; without that a note says so."""
    origin = from_pretrained(sft)
    options = {key: x for key, x in asdict(origin.config).items() if key != "arch"}
    model = models.VallE(models.VallEConfig(**{**options, "mode": mode}))
    model.load_state_dict({key: x for key, x in origin.state_dict().items() if key in model.state_dict()})
    model.text_embedding.weight.data[3] += 1
    checkpoint = {"arch": "valle", "model_config": asdict(model.config), "model": model.state_dict()}
    save_checkpoint(tmp_path / "best.pt", {**checkpoint, "origin": str(sft)})
    main("export", tmp_path / "best.pt", f"--out_dir={tmp_path / 'out'}")
    before, after = load_file(sft), load_file(tmp_path / "out/fp32.sft")
    assert before.keys() == after.keys() and read_metadata(sft) == read_metadata(tmp_path / "out/fp32.sft")
    assert {key for key, x in before.items() if not torch.equal(x, after[key])} == {"phn_emb.weight"}
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    model, known = source_of(tmp_path / "best.pt")
    notes = export(model, tmp_path / "alone", **known)
    assert any("lacks text_emb, tasks_emb" in note for note in notes)
    missing = {key.split(".")[0] for key in before.keys() - load_file(tmp_path / "alone/fp32.sft").keys()}
    others = {"text_emb", "tasks_emb", "tones_emb", "phn_decoder", "text_decoder"}
    assert missing == {key.split(".")[0] for key in before} & (others | ({"len_decoder"} if mode == "ar" else set()))
    if mode == "nar":
        again = from_pretrained(tmp_path / "alone")
        same_state(again.state_dict(), model.state_dict())
        assert again.config.backbone == model.config.backbone and again.config.mask_ratio == model.config.mask_ratio


def test_a_folder_of_several_names_them(sft, tmp_path):
    for name in ("small", "large"):
        (tmp_path / "models/ckpt" / name).mkdir(parents=True)
        shutil.copy(sft, tmp_path / "models/ckpt" / name)
    with pytest.raises(ValueError, match="holds several models: .*large/fp32.sft, .*small/fp32.sft; name one of them"):
        from_pretrained(tmp_path)
    assert from_pretrained(tmp_path / "models/ckpt/small").config.arch == "valle"
    (tmp_path / ".cache").mkdir()
    shutil.rmtree(tmp_path / "models/ckpt/small")
    shutil.copy(sft, tmp_path / ".cache/fp32.sft")
    assert from_pretrained(tmp_path).config.arch == "valle"


# ---------------------------------------------------------------------------------------------------------------------
# the command


def main(*words):
    weights.main(configurator.configure(weights.__file__, list(map(str, words)), ["command", "ckpt"]))


def test_inspect_published_weights(codec, xtts, sft, tmp_path, capsys):
    export(wide(), tmp_path / "few", "mlx-4bit", tokenizer=own_tokenizer())
    (tmp_path / "few/README.md").write_text("---\nlicense: apache-2.0\n---\nHello.\nDo **not** clone without consent.")
    (tmp_path / "few/LICENSE").write_text("\n  Apache License\nVersion 2.0\nmore")
    main("inspect", tmp_path / "few")
    said = capsys.readouterr().out
    assert f"parameters: {sum(p.numel() for p in wide().parameters()):,}" in said
    for words in ("family csm, quantised by mlx, in its layout 'mlx'", "text_vocab_size 30, n_codebooks 4",
                  "backbone: n_layer 2, d_model 64", "decoder: n_layer 2, d_model 16", "numbers in uint32",
                  f"tokenizer: {own_tokenizer().vocab_size} ids", "codec: none beside it",
                  "README.md: license: apache-2.0", "README.md: Do **not** clone without consent.",
                  "LICENSE: Apache License", "LICENSE: Version 2.0"):
        assert words in said, words  # fmt: skip
    assert "Hello" not in said and "more" not in said
    export(speaking(own_tokenizer(), codec), tmp_path / "csm", codec=codec)
    for path, words in (
        (tmp_path / "csm", ("in its layout 'transformers'", "codec: inside (codec_model)", "no tokenizer.json beside",
                            "no model card and no licence beside it")),
        (xtts, ("family xtts", "codec: dvae.pth", "tokenizer: 40 ids")),
        (sft, ("family valle", "mode nar", "in float32")),
    ):  # fmt: skip
        main("inspect", path)
        said = capsys.readouterr().out
        assert all(word in said for word in words), said


def test_inspect_checkpoints(tokens, tmp_path, capsys):
    run(tokens, tmp_path / "a", "--max_iters=1")
    main("inspect", tmp_path / "a/last.pt")
    said = capsys.readouterr().out
    for words in ("last.pt: a checkpoint of the family csm, made at iter 1 and can resume", f"data: {tokens}; speakers",
                  "codec: mel ", "tokenizer: sentencepiece", "numbers in float32", "backbone: n_layer 1"):
        assert words in said, words  # fmt: skip
    run(tokens, tmp_path / "b", "--max_iters=1", f"--init_from={tmp_path}/a/last.pt", "--lora_rank=2")
    main("inspect", tmp_path / "b/best.pt")
    said = capsys.readouterr().out
    assert f"an adapter of rank 2 on {tmp_path}/a/last.pt" in said and "holds weights only" in said
    shutil.rmtree(tmp_path / "a")
    main("inspect", tmp_path / "b/best.pt")
    assert "which does not exist" in capsys.readouterr().out
    with pytest.raises(ValueError, match="or what to look at"):
        main("inspect")


def test_a_run_remembers_what_it_descends_from(tokens, tmp_path, capsys):
    """Over a resumed run, a second run and an adapter, whose export merges it; and where it is gone, a line says so."""
    run(tokens, tmp_path / "first", "--max_iters=1")
    model, known = source_of(tmp_path / "first/last.pt")
    export(model, tmp_path / "hub", "original", **known)
    usual = [flag for flag in HELPERS_TINY if not flag.startswith(("--backbone", "--decoder="))]
    a, _ = run(tokens, tmp_path / "a", "--max_iters=1", f"--init_from={tmp_path / 'hub'}", usual=usual)
    assert a["origin"] == str(tmp_path / "hub")
    run(tokens, tmp_path / "a", "--max_iters=2", "--init_from=resume", usual=usual)
    flags = [f"--init_from={tmp_path}/a/last.pt", "--lora_rank=2", "--learning_rate=0.1"]
    b, _ = run(tokens, tmp_path / "b", "--max_iters=3", *flags, usual=usual)
    assert b["origin"] == str(tmp_path / "hub") and b["base"]
    main("export", tmp_path / "b/last.pt", f"--out_dir={tmp_path / 'out'}", "--layout=original", "--dtype=bfloat16")
    merged, base = state_of(tmp_path / "out"), state_of(tmp_path / "a/last.pt")
    moved = {key for key in base if not torch.equal(base[key].bfloat16().float(), merged[key])}
    assert moved and all("proj" in key for key in moved)  # LoRA changes linear layers alone
    capsys.readouterr()
    shutil.rmtree(tmp_path / "hub")
    main("export", tmp_path / "b/last.pt", f"--out_dir={tmp_path / 'out'}")
    assert f"{tmp_path / 'hub'}, from which it descends, is gone" in capsys.readouterr().out

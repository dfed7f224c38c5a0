import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    GREEDY,
    STACK,
    Evil,
    always,
    assert_same,
    batch_of,
    checkpoint_of,
    choices,
    gradients,
    spoken_by,
    tiny,
    utterance,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import layouts as published
import model as models
import weights
from model import AUDIO, CSM, PAD, PROMPT, TEXT, CSMConfig, Transformer, contract_check
from parts.text import HuggingFace

GOLDEN = Path(__file__).parent / "golden"
# ---------------------------------------------------------------------------------------------------------------------
# the transformer

LLAMA3 = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("n_kv_head, head_dim", [(4, 0), (2, 0), (1, 20)])
def test_transformer_equals_transformers_llama(scaled, n_kv_head, head_dim):
    from transformers import LlamaConfig, LlamaModel

    c = models.transformer_config({**STACK, "n_kv_head": n_kv_head, "head_dim": head_dim, "rope_theta": 1e4},
                                  rope_scaling=(32.0, 1.0, 4.0, 64) if scaled else None)  # fmt: skip
    torch.manual_seed(0)
    theirs = LlamaModel(LlamaConfig(
        vocab_size=1, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
        max_position_embeddings=128,
        rope_parameters={"rope_theta": c.rope_theta, **(LLAMA3 if scaled else {"rope_type": "default"})},
        initializer_range=0.2,
    )).eval()  # fmt: skip
    ours = Transformer(c).eval()
    names = {r"attn\.": "self_attn.", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    tensors = theirs.state_dict()
    weights.load_weights(ours, {name: tensors[published.translate(name, names)] for name in ours.state_dict()})
    x = torch.randn(2, 100, c.d_model)
    with torch.no_grad():
        expected = theirs(inputs_embeds=x).last_hidden_state
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


KINDS = [
    {"n_kv_head": 1}, {"n_kv_head": 4}, {"layers": "ca", "qk_norm": True}, {"layers": "cc"},
    {"bias": True, "feed_forward": "gelu", "rope_theta": 0.0}, {"feed_forward": "geglu", "final_norm": False},
]  # fmt: skip


@given(cuts=st.lists(st.integers(1, 23), max_size=8), kind=st.sampled_from(KINDS))
@torch.no_grad()
def test_cached_blocks_equal_the_whole(cuts, kind):
    """Rows fed in any division, single steps and blocks of many, give what one pass over all gives."""
    torch.manual_seed(0)
    model = Transformer(models.transformer_config(STACK, **kind)).double().eval()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    x = torch.randn(3, 24, 32, dtype=torch.float64)
    cache = model.cache(3, 24)
    pieces = [model(piece, cache) for piece in x.tensor_split(sorted(set(cuts)), 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(x), rtol=1e-9, atol=1e-9)
    assert cache.used == 24


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_cached_single_steps_equal_the_whole(kind):
    model = Transformer(models.transformer_config(STACK, **kind)).eval()
    models.init_weights(model)
    x, cache = torch.randn(2, 40, 32), model.cache(2, 40)
    steps = torch.cat([model(x[:, s : s + 1], cache) for s in range(40)], 1)
    torch.testing.assert_close(steps, model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_transformer_equals_transformers_gpt2():
    from transformers import GPT2Config, GPT2Model

    c = models.transformer_config({**STACK, "n_kv_head": 4}, rope_theta=0.0, feed_forward="gelu", bias=True)
    torch.manual_seed(0)
    theirs = GPT2Model(GPT2Config(
        vocab_size=1, n_positions=64, n_embd=c.d_model, n_layer=c.n_layer, n_head=c.n_head, n_inner=c.d_ff,
        layer_norm_epsilon=c.norm_eps, initializer_range=0.2,
    )).eval()  # fmt: skip
    theirs.wpe.weight.data.zero_()
    names = {"o_proj": "c_proj", "up_proj": "c_fc", "down_proj": "c_proj", "attn_norm": "ln_1", "mlp_norm": "ln_2",
             "layers": "h"}  # fmt: skip
    tensors, ours = theirs.state_dict(), Transformer(c).eval()
    state = {}
    for name in ours.state_dict():
        if name.startswith("norm."):
            state[name] = tensors[f"ln_f.{name[5:]}"]
        elif (part := name.split(".")[-2]) in ("q_proj", "k_proj", "v_proj"):
            whole = tensors[published.translate(name, {"layers": "h", part: "c_attn"})]
            state[name] = whole.chunk(3, -1)["qkv".index(part[0])]
        else:
            state[name] = tensors[published.translate(name, names)]
    state = {name: w.T if w.ndim == 2 else w for name, w in state.items()}  # GPT-2's are (in, out)
    weights.load_weights(ours, state)
    x = torch.randn(2, 40, c.d_model)
    torch.testing.assert_close(ours(x), theirs(inputs_embeds=x).last_hidden_state, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_masks_and_positions():
    """A row sees what the mask lets it see; parts that restart their positions and see no other stand alone."""
    torch.manual_seed(0)
    model = Transformer(models.transformer_config(STACK)).eval()
    x, parts = torch.randn(2, 20, 32), torch.arange(20) >= 8
    apart = parts[:, None] == parts
    positions = torch.where(parts, torch.arange(20) - 8, torch.arange(20)).expand(2, -1)
    together = model(x, mask=apart & apart.tril(), positions=positions)
    torch.testing.assert_close(together, torch.cat([model(x[:, :8]), model(x[:, 8:])], 1), rtol=1e-4, atol=1e-5)
    both_ways = model(x, mask=apart[None, None].expand(2, 1, -1, -1))
    moved = torch.cat([x[:, :8], x[:, 8:].flip(1)], 1)
    assert (both_ways[:, 0] - together[:, 0]).abs().max() > 1e-3  # the first row sees its part's last
    torch.testing.assert_close(both_ways[:, :8], model(moved, mask=apart)[:, :8], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_transformer_is_causal():
    model = Transformer(models.transformer_config(STACK)).eval()
    x = torch.randn(1, 20, 32)
    y = x.clone()
    y[:, 12:] = torch.randn(1, 8, 32)
    torch.testing.assert_close(model(x)[:, :12], model(y)[:, :12])
    assert (model(x)[:, 12] - model(y)[:, 12]).abs().max() > 1e-3


@torch.no_grad()
def test_positions_end():
    model = Transformer(models.transformer_config(STACK, max_positions=16))
    cache = model.cache(1, 20)
    model(torch.randn(1, 16, 32), cache)
    for x, c in ((torch.randn(1, 17, 32), None), (torch.randn(1, 1, 32), cache)):
        with pytest.raises(ValueError, match="17 rows are more than the model's 16 positions"):
            model(x, c)


def test_recompute_gives_the_same_gradients():
    x, results = torch.randn(2, 9, 32), []
    for recompute in (False, True):
        torch.manual_seed(1)
        model = Transformer(models.transformer_config(STACK, recompute=recompute, dropout=0.2))
        torch.manual_seed(2)
        loss = model(x).square().sum()
        loss.backward()
        results.append((loss, *gradients(model).values()))
    assert_same(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given, message", [
    ("llama-2B", "unknown preset 'llama-2B'; choose from llama-1B"),
    ({**STACK, "d_modle": 3}, "unexpected keyword argument 'd_modle'"),
    ({"n_layer": 1}, "missing .* required positional arguments"),
    ({**STACK, "n_kv_head": 3}, "must be a multiple"),
    ({**STACK, "head_dim": 5}, "the width must be even"),
    ({**STACK, "layers": "a"}, "one letter, a or c, for each of 2 layers"),
    ({**STACK, "layers": "ab"}, "one letter, a or c"),
    ({**STACK, "feed_forward": "relu"}, "feed_forward = 'relu' must be swiglu, geglu or gelu"),
    ({**STACK, "n_layer": "x"}, "n_layer = 'x' is not of type int"),
    ({**STACK, "n_layer": 10**30}, "n_layer = 10+ is too large a number"),
    ({**STACK, "n_head": 0}, "n_head = 0 must be >= 1"),
    ({**STACK, "d_model": -8}, "d_model = -8 must be >= 1"),
    ({**STACK, "d_model": 18, "n_head": 4}, "d_model = 18 is not a multiple of n_head = 4"),
    ({**STACK, "d_ff": 0}, "d_ff = 0 must be >= 1"),
    ({**STACK, "dropout": 1.0}, "dropout = 1.0 must be >= 0 and < 1"),
    ({**STACK, "norm_eps": -1}, "norm_eps = -1 must be >= 0"),
    ({**STACK, "rope_scaling": (32.0, 1.0)}, "rope_scaling = .*4 numbers"),
    ({**STACK, "rope_theta": math.nan}, "rope_theta = nan must be finite"),
])  # fmt: skip
def test_transformer_config_refuses(given, message):
    with pytest.raises(ValueError, match=message) as error:
        models.transformer_config(given)
    assert "\n" not in str(error.value)


def test_presets_have_the_published_sizes():
    def count(name):
        with torch.device("meta"):
            return sum(p.numel() for p in Transformer(models.transformer_config(name)).parameters())

    # layers, width, inner width, width of keys and values, from the released files
    sizes = {"llama-1B": (16, 2048, 8192, 512), "llama-100M": (4, 1024, 8192, 256),
             "llama-250M": (6, 1536, 8192, 384), "llama-60M": (4, 1024, 4096, 256)}  # fmt: skip
    for name, (L, D, inner, kv) in sizes.items():
        assert count(name) == L * (2 * D * D + 2 * D * kv + 3 * D * inner + 2 * D) + D


# ---------------------------------------------------------------------------------------------------------------------
# CSM against others


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "csm_original.safetensors")


@pytest.fixture
def original(golden, monkeypatch):
    """Our CSM with the weights of the golden file, which was made by the original code."""
    monkeypatch.setattr(CSMConfig, "SPARE", 0)  # its greedy decoding may choose the spare classes as well
    c = json.loads((GOLDEN / "csm_original.json").read_text())["config"]
    heads = {"num_attention_heads": c["backbone"]["num_heads"]}
    weights = {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}
    given = {**heads, "depth_decoder_config": heads}
    return published.assemble(published.CSM_ORIGINAL, weights, given, "golden", decoder_fraction=1.0)


def rows_of(tokens, mask):
    """tokens, segment as ours from the original's tokens and mask (B, S, K + 1)."""
    kind = torch.tensor([PAD, TEXT] + [AUDIO] * 4)
    return tokens, kind[mask.sum(-1).long()]


def test_golden_states_losses_and_gradients(original, golden):
    tokens, segment = rows_of(golden["in.tokens"], golden["in.tokens_mask"])
    used = segment[:, :-1] != PAD
    hidden = original.backbone(original.embed(tokens, segment))[:, :-1]
    torch.testing.assert_close(hidden[used], golden["out.backbone_hidden"][used], rtol=0, atol=1e-5)
    target = segment[:, 1:] == AUDIO
    state, frame = hidden[target], tokens[:, 1:, :5][target]
    torch.testing.assert_close(state @ original.codebook0_head.T, golden["out.c0_logits"], rtol=0, atol=1e-5)
    inputs = original.depth_inputs(state, frame[:, :-1])
    torch.testing.assert_close(inputs, golden["out.decoder_in"], rtol=0, atol=1e-5)
    torch.testing.assert_close(original.decoder(inputs), golden["out.decoder_hidden"], rtol=0, atol=2e-5)

    loss, stats = original(tokens, segment)
    torch.testing.assert_close(loss, golden["out.loss"], rtol=0, atol=1e-5)
    for name in ("backbone_loss", "decoder_loss"):
        total, count = stats[name]
        expected = golden[f"out.{name}".replace("backbone", "c0")]
        torch.testing.assert_close(total / count, expected, rtol=0, atol=1e-5)
    speech = frame.any(1)  # the stats leave out the stop, a frame of zeros
    others = torch.einsum("nkd,kvd->nkv", golden["out.decoder_hidden"][:, 1:], original.decoder_heads)
    logits = torch.cat([golden["out.c0_logits"][:, None], others], 1)
    each = F.cross_entropy(logits[speech].mT, frame[speech], reduction="none")
    torch.testing.assert_close(stats["loss_by_codebook"][0], each.sum(0), rtol=1e-5, atol=1e-4)
    ranked_first = (logits[:, 0].argmax(-1) == frame[:, 0])[speech].sum()
    assert stats["c0_accuracy"] == (ranked_first, speech.sum()) and 0 < speech.sum() < len(frame)

    loss.backward()
    expected = {k.removeprefix("grad."): v for k, v in golden.items() if k.startswith("grad.")}
    compared = 0
    for name, p in original.named_parameters():
        (key,), make = published.csm_original(name, original.config)
        if key in expected:
            gradient, compared = make(expected[key]), compared + 1
            torch.testing.assert_close(p.grad, gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))
    assert compared == len(expected) == 7


def test_golden_row_alone(original, golden):
    loss, _ = original(*rows_of(golden["in.tokens"][:1], golden["in.tokens_mask"][:1]))
    torch.testing.assert_close(loss, golden["row0.loss"], rtol=0, atol=1e-5)


def test_golden_generation(original, golden):
    tokens, segment = rows_of(golden["gen.prompt_tokens"], golden["gen.prompt_mask"])
    frames = (segment[0] == AUDIO).nonzero()[:, 0].tolist()
    first, stop = frames[0], frames[-1]
    text = tokens[0, :, -1].numpy()
    prompt = text[:first], tokens[0, first:stop, :-1].numpy()
    rows, _ = original.layout(text[stop + 1 :], None, prompt)
    assert np.array_equal(rows, tokens[0])
    spoken = list(original.generate(text[stop + 1 :], prompt, max_frames=8, draw=GREEDY))
    assert torch.equal(torch.stack(spoken), golden["gen.frames"])


def test_golden_rotary(golden):
    for dim in (64, 128):
        c = models.transformer_config("llama-1B", head_dim=dim)
        table = models.turns(models.rope_angles(c, golden["rope.positions"]))
        x, expected = (golden[f"rope{dim}.{end}"].transpose(1, 2) for end in ("in", "out"))  # (1, H, S, dim)
        split = lambda t: t.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)  # noqa: E731
        torch.testing.assert_close(models.rotate(split(x), table), split(expected), rtol=0, atol=1e-5)


def test_golden_permutation(golden):
    for name, heads in (("q_proj", 4), ("k_proj", 2)):
        key = f"backbone.layers.0.attn.{name}.weight"
        assert torch.equal(published.half_split(golden[f"weights.{key}"], heads), golden[f"hf.{key}"])


def authors_rows():
    return json.loads((GOLDEN / "csm_rows.json").read_text())


def narrow_csm(tokenizer="csm_rows.smollm2.json", **options):
    """A CSM of the authors' 32 codebooks of 2,048, and one of their tokenizers with its marks around a text."""
    pytest.importorskip("tokenizers")
    tokenizer = HuggingFace((GOLDEN / tokenizer).read_bytes())
    stack = dict(n_layer=1, n_head=1, n_kv_head=1, d_model=4, d_ff=4, max_positions=64)
    ids = dict(text_vocab_size=tokenizer.vocab_size, text_bos=tokenizer.bos_id, text_eos=tokenizer.eos_id)
    sizes = dict(n_codebooks=32, codebook_size=2048, backbone=stack, decoder=stack)
    return CSM(CSMConfig(**ids, **sizes, stop="zeros", **options)).eval(), tokenizer


def spoken_rows(model, text, prompt, frames, cap):
    """When these frames are drawn: the rows (S, D) that generate gives the backbone, and their positions (S,); the
    frames that it yields, and whether it ended by itself."""
    rows, places = [], []
    backbone = model.backbone.forward

    def watched(x, cache, positions=None):
        assert positions is None
        rows.extend(x[0].clone())
        places.extend(int(cache.used) + i for i in range(x.shape[1]))
        return backbone(x, cache)

    model.backbone.forward = watched
    spoken, ended = spoken_by(model, text, prompt, cap, choose=choices(*np.ravel(frames)))
    return torch.stack(rows), places, spoken, ended


ZEROS = [0] * 32


def masks(segment):
    """The authors' masks of our rows: of text the last column, of frames all others."""
    return ["0" * 33 if kind == PAD else "0" * 32 + "1" if kind == TEXT else "1" * 32 + "0" for kind in segment]


@pytest.mark.parametrize("case", authors_rows()["generation"], ids=lambda x: f"{x['reference']}-{x['name']}")
def test_the_authors_rows_in_generation(case):
    """Prompts of no, one and two segments and of one joined segment; what follows each drawn frame, and where."""
    joined = case["name"].startswith("voice_match")
    model, tokenizer = narrow_csm(case["tokenizer"], prompt_style="joined" if joined else "segments")
    context = [(c["text"], c["speaker"], np.array(c["codes"])[:32].T) for c in case["context"]]
    if joined:  # text ids of a joined prompt may be divided anywhere between it and the text
        (before, speaker, codes), = context
        words = f"[{speaker}]{before.strip()} {case['text'].strip()}".strip()
        ids = np.array(tokenizer.encode(words))
        text, prompt = ids[7:], (ids[:7], codes)
    else:
        text = np.array(tokenizer.encode(f"[{case['speaker']}]{case['text']}"))
        prompt = [(np.array(tokenizer.encode(f"[{s}]{words}")), codes) for words, s, codes in context] or None
    frames = case["decoded_frames"]
    rows, places, spoken, ended = spoken_rows(model, text, prompt, [*frames, ZEROS], len(frames) + 1)
    laid_out, kinds = model.layout(text, None, prompt)
    assert (laid_out.tolist(), masks(kinds)) == (case["tokens"], case["mask"])
    assert places == [*range(len(laid_out)), *(place for step in case["next"] for place in step["position"])]
    tokens = torch.tensor([*case["tokens"], *(row for step in case["next"] for row in step["tokens"])])
    segment = torch.tensor([*kinds, *(AUDIO for step in case["next"] for mask in step["mask"])])
    assert all(mask == "1" * 32 + "0" for step in case["next"] for mask in step["mask"])
    torch.testing.assert_close(rows, model.embed(tokens[None], segment[None])[0], rtol=0, atol=1e-6)
    assert spoken == frames and ended
    if len(context) == 1:
        words, codes = prompt if joined else prompt[0]
        assert model.length(len(text), 0, len(words), len(codes)) == len(case["tokens"]) + 1  # and the stop frame


@pytest.mark.parametrize("case", authors_rows()["stops"], ids=lambda x: x["name"])
def test_the_authors_stops(case):
    """Two frames around the one in question, which the authors' code speaks or ends at."""
    plain = authors_rows()["stops"][-1]["frame"]
    for rule, count in (("marvis", "decoded_frames"), ("sesame", "decoded_frames"), ("transformers", "frames_decoded")):
        model, _ = narrow_csm(loose_stop=rule == "transformers")
        *_, spoken, ended = spoken_rows(model, np.array([5]), None, [plain, case["frame"], plain], 3)
        assert (ended, len(spoken)) == (case[rule]["stops"], case[rule][count])
        assert spoken == [plain, case["frame"], plain][: len(spoken)]


@pytest.mark.parametrize("case", authors_rows()["training"], ids=lambda x: x["name"])
def test_the_authors_rows_in_training(case):
    model, tokenizer = narrow_csm()
    laid_out = []
    for clip in case["batch"]:
        ids = clip.get("text_tokens", [None])[1:-1]  # theirs have the marks
        ids = ids or tokenizer.encode(f"[{clip.get('speaker', 0)}]{clip['text']}")  # speaker_id is not read
        laid_out.append((np.array(ids), np.array(clip["audio_tokens"])[:32].T))
    tokens, segment = batch_of(model, *laid_out, width=max(len(row["tokens"]) for row in case["rows"]))
    assert tokens.tolist() == [row["tokens"] for row in case["rows"]]
    for kinds, row in zip(segment.tolist(), case["rows"], strict=True):
        assert masks(kinds) == row["mask"]
        assert [i for i, kind in enumerate(kinds) if kind == AUDIO] == row["loss_on_row"]  # forward predicts those
    model.train()
    targets = sum(len(row["loss_on_row"]) for row in case["rows"])
    assert int(model(tokens, segment)[1]["backbone_loss"][1]) == targets


# ---------------------------------------------------------------------------------------------------------------------
# CSM by itself


DIGITS = dict(n_layer=4, n_head=4, n_kv_head=4, d_model=128, d_ff=384, rope_theta=10_000.0)
META = dict(codec=dict(n_codebooks=8, codebook_size=256), tokenizer=dict(vocab_size=300, bos_id=1, eos_id=2))


@pytest.mark.parametrize("options", [
    dict(backbone=DIGITS, decoder=DIGITS),
    dict(backbone=DIGITS, decoder=DIGITS, decoder_fraction=1.0, dropout=0.1),
])  # fmt: skip
def test_initial_loss_is_near_2_ln_v(options):
    for seed in range(3):
        torch.manual_seed(seed)
        model = models.build("csm", META, {**options, "learning_rate": 1.0})
        batch = batch_of(model, *(utterance(9, 40, 8, 256, seed=s) for s in range(4)))
        assert abs(model(*batch)[0].item() - 2 * math.log(259)) < 0.1


def test_build_refuses_what_does_not_fit():
    meta = json.loads(json.dumps(META))
    options = dict(backbone=DIGITS, decoder=DIGITS)
    for change, message in (
        ({"decoder_fraction": 0.0}, "decoder_fraction = 0.0 must be > 0 and <= 1"),
        ({"decoder_chunk": -1}, "decoder_chunk = -1 must be >= 0"),
        ({"decoder_loss_weight": math.inf}, "decoder_loss_weight = inf must be finite"),
        ({"dropout": 1.0}, "dropout = 1.0 must be >= 0 and < 1"),
        ({"stop": "never"}, "stop = 'never' must be class or zeros"),
        ({"backbone": "big"}, "unknown preset 'big'"),
        ({"decoder": {**STACK, "max_positions": 4}}, "positions are fewer"),
    ):
        with pytest.raises(ValueError, match=message):
            models.build("csm", meta, {**options, **change})
    with pytest.raises(ValueError, match="unknown arch 'tacotron'; choose from csm"):
        models.build("tacotron", meta, options)
    meta["codec"]["n_codebooks"] = 1
    with pytest.raises(ValueError, match="at least 2 codebooks"):
        models.build("csm", meta, options)


@given(n=st.integers(1, 20), T=st.integers(1, 20), prompt=st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9)),
       bos=st.sampled_from([-1, 1]), eos=st.sampled_from([-1, 2]), stop=st.sampled_from(["class", "zeros"]))
def test_layout(n, T, prompt, bos, eos, stop):
    config = CSMConfig(30, 4, 16, STACK, bos, eos, decoder=STACK, stop=stop)
    text, codes = utterance(n, T)
    before = utterance(*prompt, seed=1) if prompt else None
    tokens, segment = config.layout(text, codes, before)
    assert tokens.dtype == np.int64 and tokens.shape == (len(segment), 5)
    assert len(segment) == config.length(n, T, *(prompt or ()))
    before_too = [np.array([x, 0]) for x in prompt or (0, 0)]  # on arrays; the second utterance has no prompt
    lengths = config.length(np.array([n, 3]), np.array([T, 4]), *before_too)
    assert lengths.tolist() == [len(segment), config.length(3, 4)]

    marked = [m for m in (bos,) if m >= 0] + text.tolist() + [m for m in (eos,) if m >= 0]
    assert tokens[segment == AUDIO][:, :4].tolist() == codes.tolist() + [config.stop_frame().tolist()]
    assert tokens[segment == TEXT][-len(marked) :, 4].tolist() == marked
    assert not tokens[segment == TEXT][:, :4].any() and not tokens[segment != TEXT][:, 4].any()
    assert (np.diff((segment == AUDIO).astype(int)) >= 0).all() and segment[-1] == AUDIO  # the frames come last
    if before:
        assert tokens[segment == PROMPT][:, :4].tolist() == before[1].tolist() + [config.stop_frame().tolist()]
        own = len(config.layout(*before)[0])
        assert np.array_equal(tokens[:own], config.layout(*before)[0]) and PROMPT not in segment[own:]
    asked, kinds = config.layout(text, None, before)  # generation starts from what training saw before the frames
    assert np.array_equal(asked, tokens[: -T - 1]) and np.array_equal(kinds, segment[: -T - 1])


def test_no_loss_on_prompts():
    """The frames of a prompt are read, but never a target."""
    model, text, codes = tiny(), *utterance()
    prompt = utterance(3, 4, seed=1)
    tokens, segment = batch_of(model, (text, codes, prompt))
    loss, stats = model(tokens, segment)
    hidden = model.backbone(model.embed(tokens, segment))
    first = int((segment[0] == AUDIO).nonzero()[0])
    expected = F.cross_entropy(hidden[0, first - 1 : -1] @ model.codebook0_head.T, tokens[0, first:, 0])
    torch.testing.assert_close(stats["backbone_loss"][0] / stats["backbone_loss"][1], expected)
    assert stats["backbone_loss"][1] == stats["decoder_loss"][1] == len(codes) + 1
    other = (prompt[0], (prompt[1] + 1) % 16)
    assert abs(model(*batch_of(model, (text, codes, other)))[0] - loss) > 1e-4  # but it is heard


def test_stop_frames_are_always_among_the_depth_decoders():
    model = tiny(decoder_fraction=1e-6).train()
    seen, loss = [], models.multi_codebook_cross_entropy

    def spy(hidden, weight, target, **options):
        seen.append(target)
        return loss(hidden, weight, target, **options)

    batch = batch_of(model, utterance(5, 9), utterance(4, 7, seed=1), utterance(2, 3, seed=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "multi_codebook_cross_entropy", spy)
        _, stats = model(*batch)
    backbone, depth = seen
    assert backbone.shape == (22, 1) and (backbone == 16).sum() == 3
    assert depth.tolist() == [[0, 0, 0]] * 3  # the three stop frames, and by chance of one in a million nothing else
    assert stats["decoder_loss"][1] == 3 and stats["backbone_loss"][1] == 22


def test_decoder_fraction_keeps_its_share():
    model = tiny(decoder_fraction=0.25).train()
    batch = batch_of(model, *(utterance(5, 50, seed=s) for s in range(4)))
    torch.manual_seed(0)
    kept = np.mean([model(*batch)[1]["decoder_loss"][1] for _ in range(20)])
    assert abs(kept - (4 + 0.25 * 200)) < 6


def test_whole_decoder_fraction_and_eval_are_the_same():
    model = tiny(decoder_fraction=1.0)
    batch = batch_of(model, utterance(5, 9), utterance(4, 7, seed=1))
    trained, evaluated = model.train()(*batch), model.eval()(*batch)
    assert torch.equal(trained[0], evaluated[0])
    model.config.decoder_fraction = 0.1
    assert torch.equal(model(*batch)[0], evaluated[0])  # evaluation looks at all frames whatever training does
    assert "stop_missed" in evaluated[1] and "stop_missed" not in trained[1]
    assert evaluated[1]["stop_missed"][1] == 2


@torch.no_grad()
def test_frame_dropout_blanks_input_frames_in_training_only():
    model, (text, codes), prompt = tiny(frame_dropout=1.0), utterance(), utterance(seed=1)
    other = codes.copy()
    other[:, 1:] += 1  # an input of the backbone, not its target
    other %= 16

    def loss(codes, prompt):
        return model(*batch_of(model, (text, codes, prompt)))[1]["backbone_loss"][0]

    model.train()
    assert loss(codes, prompt) == loss(other, prompt)
    assert loss(codes, prompt) != loss(codes, (prompt[0], other))  # a prompt is never blanked
    model.eval()
    assert loss(codes, prompt) != loss(other, prompt)
    model.train().config.frame_dropout = 0.5
    assert len({float(loss(codes, prompt)) for _ in range(9)}) > 1


def test_decoder_loss_weight():
    batch = batch_of(tiny(), utterance())
    whole, stats = tiny()(*batch)
    parts = [stats[k][0] / stats[k][1] for k in ("backbone_loss", "decoder_loss")]
    torch.testing.assert_close(whole, parts[0] + parts[1])
    torch.testing.assert_close(tiny(decoder_loss_weight=0.3)(*batch)[0], parts[0] + 0.3 * parts[1])


def test_recompute_gives_csm_the_same_gradients():
    results = []
    for recompute in (False, True):
        model = tiny(backbone=dict(recompute=recompute), decoder=dict(recompute=recompute)).train()
        loss, _ = model(*batch_of(model, utterance()))
        loss.backward()
        results.append((loss, *gradients(model).values()))
    assert len(results[0]) == 1 + len(list(model.parameters()))
    assert_same(*results, rtol=1e-5, atol=1e-6)


def in_chunks_of(chunk, *frozen, dtype=None, **options):
    """Loss, stats and gradients of a CSM whose depth decoder takes so many of 22 frames at a time."""
    model = tiny(decoder_chunk=chunk, decoder_loss_weight=0.3, **options).train()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss, stats = model(*batch_of(model, utterance(5, 9), utterance(4, 7, seed=1), utterance(2, 3, seed=2)))
    loss.backward()
    return loss, stats, gradients(model)


@pytest.mark.parametrize("frozen", [(), ("decoder", "projection"), ("backbone", "audio", "text"), ("decoder.layers",)])
@pytest.mark.parametrize("recompute", [False, True])
def test_chunks_of_frames_are_the_whole(frozen, recompute):
    loss, stats, grads = in_chunks_of(0, *frozen)
    for chunk in (1, 7, 21, 22):
        again, stats_again, grads_again = in_chunks_of(chunk, *frozen, recompute=recompute)
        torch.testing.assert_close(loss, again, rtol=1e-6, atol=0)
        assert grads.keys() == grads_again.keys()
        assert_same(grads_again.values(), grads.values(), rtol=1e-4, atol=1e-6)
        assert stats.keys() == stats_again.keys()
        for name, (total, count) in stats.items():
            torch.testing.assert_close(torch.as_tensor(total), torch.as_tensor(stats_again[name][0]))
            assert torch.equal(torch.as_tensor(count), torch.as_tensor(stats_again[name][1]))


def test_chunks_under_autocast():
    exact = in_chunks_of(0)[2]
    for dtype in (torch.bfloat16, torch.float16):
        whole, parts = in_chunks_of(0, dtype=dtype)[2], in_chunks_of(5, dtype=dtype)[2]
        for name, grad in exact.items():
            off = (whole[name] - grad).norm() / grad.norm()
            assert (parts[name] - grad).norm() / grad.norm() < 1.5 * off + 1e-3, name


def test_chunks_in_evaluation_and_what_is_run_how_often(monkeypatch):
    rows, run = [], Transformer.forward

    def spy(self, x, *more):
        rows.append(x.shape[:2])
        return run(self, x, *more)

    monkeypatch.setattr(Transformer, "forward", spy)
    model = tiny(decoder_chunk=10)
    batch = batch_of(model, utterance(5, 9), utterance(4, 7, seed=1), utterance(2, 3, seed=2))
    losses = [model.train()(*batch)[0]]
    with torch.no_grad():
        losses.append(model.eval()(*batch)[0])
    assert rows == 2 * [(3, 17), (8, 4), (8, 4), (6, 4)]  # as equal as can be, each once
    torch.testing.assert_close(*losses)
    rows.clear()
    with torch.autocast("cpu", torch.float16):
        model.train()(*batch)
    assert rows[1:] == [(22, 4)]
    model.config.decoder_chunk = 22
    model(*batch)
    assert rows[3:] == [(22, 4)]


def test_a_second_backward_through_chunks_is_refused():
    model = tiny(decoder_chunk=5).train()
    loss, _ = model(*batch_of(model, utterance()))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradients in chunks allow only one backward pass"):
        loss.backward()


def test_every_parameter_gets_a_gradient_even_without_depth_frames():
    """So that DistributedDataParallel finds all of them in use in every step."""
    model = tiny(decoder_fraction=1e-6, stop="class").train()
    tokens, segment = batch_of(model, utterance())
    loss, _ = model(tokens[:, :-1], segment[:, :-1])  # without its stop frame: none for the depth decoder
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# generation


def test_generation_ends_at_the_stop_class():
    model, (text, codes) = tiny(), utterance(T=3)
    spoken = model.generate(text, max_frames=10, choose=choices(*codes.ravel(), 16, 0, 0, 0))
    frames = []
    with pytest.raises(StopIteration) as end:
        while True:
            frames.append(next(spoken).tolist())
    assert frames == codes.tolist() and end.value.value is True


@pytest.mark.parametrize("stop", ["class", "zeros"])
def test_generation_never_speaks_spare_classes_and_ends_at_the_cap(stop):
    model, (text, _) = tiny(stop=stop), utterance()
    widths = []
    spoken = model.generate(text, max_frames=4, choose=lambda x, key: widths.append(x.shape[-1]) or torch.tensor([5]))
    assert [frame.tolist() for frame in spoken] == [[5] * 4] * 4
    assert widths == ([17 if stop == "class" else 16] + [16] * 3) * 4


def test_generation_ends_at_zeros():
    model, (text, codes) = tiny(stop="zeros"), utterance(T=3)
    forced = choices(*codes.ravel(), 0, 0, 0, 1, 0, 0, 0, 0)
    spoken = list(model.generate(text, max_frames=10, choose=forced))
    assert torch.stack(spoken).tolist() == [*codes.tolist(), [0, 0, 0, 1]]


def test_generation_within_the_positions():
    model, (text, codes) = tiny(backbone=dict(max_positions=12)), utterance(n=5)
    spoken = model.generate(text, max_frames=50, choose=always(3))
    assert len(list(spoken)) == 12 - 7
    with pytest.raises(ValueError, match="text and prompt take 19 rows, the model has 12 positions"):
        next(model.generate(text, (text[:3], codes)))


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_contract_check_refuses_a_model_of_another_shift(shift):
    """Logits agree, but the model has learnt to repeat the frame it hears (0), or to leave one out (2)."""
    model, (text, codes) = tiny(), utterance(7, 12)
    codes[:, 0] = np.arange(12)  # no frame is like another
    learnt = torch.from_numpy(np.concatenate([[0], codes[:, 0], [0, 0]])[shift : shift + 13])
    logits = 9.0 * F.one_hot(learnt, 19)[:, None].expand(-1, 4, -1).float()  # (T + 1, K, V)
    model.teacher_forced_logits = lambda text, codes: logits

    def generate(text, prompt=None, max_frames=0, choose=None):
        for row in logits:
            yield [choose(x) for x in row]

    model.generate = generate
    if shift == 1:
        assert np.argmin(contract_check(model, text, codes)["loss_at_shift"]) == 1
        return
    with pytest.raises(ValueError, match=f"fits the frame at shift {shift} best"):
        contract_check(model, text, codes)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def test_checkpoint_round_trip(tmp_path):
    model, path = tiny(stop="zeros", backbone=dict(rope_scaling=(32.0, 1.0, 4.0, 8192))), tmp_path / "x.pt"
    weights.save_checkpoint(path, checkpoint_of(model, iter=7, tokenizer={"kind": "x", "model": b"bytes"}))
    assert os.listdir(tmp_path) == ["x.pt"]
    checkpoint = weights.load_checkpoint(path)
    again = weights.load_model(checkpoint)
    assert checkpoint["iter"] == 7 and checkpoint["tokenizer"]["model"] == b"bytes"
    assert again.config == model.config and not again.training
    batch = batch_of(model, utterance())
    assert torch.equal(again(*batch)[0], model.eval()(*batch)[0])
    assert weights.load_model(checkpoint, dtype=torch.bfloat16).codebook0_head.dtype == torch.bfloat16


def test_averaged_weights_speak():
    model = tiny()
    averaged = {k: v * 0.5 for k, v in model.state_dict().items()}
    loaded = weights.load_model({**checkpoint_of(model), "ema": averaged})
    assert torch.equal(loaded.codebook0_head, 0.5 * model.codebook0_head)


def test_a_save_that_fails_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / "x.pt"
    weights.save_checkpoint(path, {"iter": 1})

    class Bad:
        def __reduce__(self):
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        weights.save_checkpoint(path, {"iter": 2, "bad": Bad()})
    assert weights.load_checkpoint(path)["iter"] == 1 and os.listdir(tmp_path) == ["x.pt"]
    os.symlink("/dev/full", tmp_path / "x.pt.partial")
    with pytest.raises(OSError) as error:
        weights.save_checkpoint(path, {"iter": 2, "weights": torch.zeros(10**6)})
    assert "\n" not in str(error.value)
    assert weights.load_checkpoint(path)["iter"] == 1 and os.listdir(tmp_path) == ["x.pt"]


def test_files_that_are_no_checkpoint(tmp_path):
    model, good = tiny(), tmp_path / "good.pt"
    weights.save_checkpoint(good, checkpoint_of(model))
    whole = good.read_bytes()
    bad = {
        "empty.pt": b"", "half.pt": whole[: len(whole) // 2], "short.pt": whole[:-1], "text.pt": b"hello " * 99,
        "pickle.pt": pickle.dumps({"format": "parlando-1"}, 2), "zeros.pt": b"\0" * 999,
    }  # fmt: skip
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is (truncated|no checkpoint)") as e:
            weights.load_checkpoint(tmp_path / name)
        assert "\n" not in str(e.value)
    torch.save({"evil": Evil(str(tmp_path / "made"))}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt cannot be read without running code"):
        weights.load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "made").exists()
    for foreign in ({"model_state": {}}, [1, 2], torch.zeros(3), {"format": "parlando-0"}):
        torch.save(foreign, tmp_path / "foreign.pt")
        with pytest.raises(ValueError, match="is not a parlando-1 checkpoint"):
            weights.load_checkpoint(tmp_path / "foreign.pt")
    for name in ("none.pt", ""):
        with pytest.raises(FileNotFoundError, match="no such checkpoint"):
            weights.load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("projection.weight"), "the checkpoint lacks projection.weight"),
    (lambda w: w.update(extra=torch.zeros(1)), "the checkpoint holds extra, which the model does not have"),
    (lambda w: w.update(codebook0_head=torch.zeros(5, 32)), r"_head has shape \(5, 32\), not \(19, 32\)"),
])  # fmt: skip
def test_weights_that_do_not_fit(change, message):
    checkpoint = checkpoint_of(tiny())
    change(checkpoint["model"])
    with pytest.raises(ValueError, match=message):
        weights.load_model(checkpoint)
    with pytest.raises(ValueError, match="unknown family 'tacotron'; this code has csm"):
        weights.load_model({**checkpoint, "arch": "tacotron"})


@pytest.mark.parametrize("change, message", [
    (lambda w: w["projection.weight"].view(-1)[3:4].fill_(math.nan), "projection.weight holds NaN or infinity"),
    (lambda w: w["codebook0_head"].view(-1)[-1:].fill_(-math.inf), "codebook0_head holds NaN or infinity"),
    (lambda w: w.update({"projection.weight": w["projection.weight"].long()}), "projection.weight is int64, not f"),
    (lambda w: w.update({"projection.weight": w["projection.weight"] + 0j}), "projection.weight is complex64"),
    (lambda w: w.update({"projection.weight": None}), "projection.weight is None, not a tensor"),
])  # fmt: skip
def test_weights_that_are_no_numbers_are_named(change, message, tmp_path):
    checkpoint = checkpoint_of(tiny())
    checkpoint["model"] = {name: w.clone() for name, w in checkpoint["model"].items()}
    change(checkpoint["model"])
    weights.save_checkpoint(tmp_path / "x.pt", checkpoint)
    with pytest.raises(ValueError, match=f"x.pt: {message}"):
        weights.from_pretrained(tmp_path / "x.pt")


def test_a_model_that_diverged_fails_the_contract_in_one_line():
    model = tiny()
    for number, message in ((math.nan, "backbone.norm.weight holds NaN or infinity"),
                            (3e38, "contract check failed: the model's logits are not finite")):  # fmt: skip
        model.backbone.norm.weight.data.fill_(number)
        with pytest.raises(ValueError, match=message):
            models.contract_check(model, *utterance())


@pytest.mark.parametrize("name, change, message", [
    ("model_config", [1], r"x.pt is damaged: model_config is \[1\]"),
    ("train", {"batches": {"epoch": 0}}, "x.pt, train, is damaged: optimizers is missing"),
    ("tokenizer", {"kind": "x", "model": "text"}, "x.pt, tokenizer, is damaged: model is 'text', not bytes"),
    ("codec", {"name": "mel", "options": {5: 6}}, "x.pt, codec, is damaged: options is"),
    ("meta", {"tokenizer": 5}, "x.pt, meta, tokenizer, is damaged: it holds 5"),
    ("iter", None, None),
])  # fmt: skip
def test_fields_of_another_kind(name, change, message, tmp_path):
    checkpoint = checkpoint_of(tiny())
    changed = {**(checkpoint.get(name) or {}), **change} if isinstance(change, dict) else change
    weights.save_checkpoint(tmp_path / "x.pt", {**checkpoint, name: changed})
    if message is None:
        with pytest.raises(ValueError, match="x.pt lacks .*iter.*: train.py writes whole ones"):
            weights.load_checkpoint(tmp_path / "x.pt", needed=weights.WHOLE)
        return
    with pytest.raises(ValueError, match=message):
        weights.load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("change, message", [
    ({"n_codebooks": "x"}, "x.pt: no model has the config in it: n_codebooks = 'x'"),
    ({"backbone": [1]}, "x.pt: no model has the config in it: "),
    ({"decoder_fraction": math.nan}, "x.pt: no model has the config in it: decoder_fraction = nan"),
])  # fmt: skip
def test_configs_that_no_model_has(change, message, tmp_path):
    checkpoint = checkpoint_of(tiny())
    config = {**checkpoint["model_config"], **change}
    weights.save_checkpoint(tmp_path / "x.pt", {**checkpoint, "model_config": config})
    with pytest.raises(ValueError, match=message):
        weights.load_model(weights.load_checkpoint(tmp_path / "x.pt"))


def test_an_adapter_without_its_base(tmp_path):
    for base, error, message in (("gone.pt", FileNotFoundError, "x.pt is an adapter on .*gone.pt, but .* does not"),
                                 ("x.pt", ValueError, "x.pt is damaged: its base .*x.pt is an adapter")):  # fmt: skip
        weights.save_checkpoint(tmp_path / "x.pt", {**checkpoint_of(tiny()), "base": str(tmp_path / base)})
        with pytest.raises(error, match=message):
            weights.from_pretrained(tmp_path / "x.pt")


def test_another_file_in_place_of_a_checkpoint(tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/meta.json").write_text("{}")
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    (tmp_path / "a.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}  ")
    for name, message in (("tokens", "no such checkpoint, it is a folder of token"), ("a.wav", "it is a recording"),
                          ("a.safetensors", "it is a safetensors file")):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            weights.load_checkpoint(tmp_path / name)

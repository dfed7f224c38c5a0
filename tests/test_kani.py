"""model.py's Kani: against transformers' LFM2, by itself, and on the road from train.py to sample.py."""

import itertools
import json
import math
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GREEDY, LFM2_STACK, ROOT, always, batch_of, choices, exact, same, spoken_by, utterance
from helpers import tiny_kani as tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import layouts as published
import model as models
import train
import weights
from codec import published_sizes
from data import Batches, TokenFiles
from export import export
from model import AUDIO, IGNORE, PROMPT, TEXT, Kani, KaniConfig, contract_check
from parts import budget, configurator, lora
from parts.frontend import read_text
from parts.metrics import read_metrics
from parts.text import load_tokenizer, wording
from voice import Voice

LOSSES = ("all", "audio", "codebook")



# ---------------------------------------------------------------------------------------------------------------------
# against the authors' preparation of data


ROWS = json.loads((ROOT / "tests/golden/kani_rows.json").read_text())


@pytest.mark.parametrize("part, dataset", [(part, x) for part in ("finetune", "kani2") for x in ROWS[part]],
                         ids=lambda x: x if isinstance(x, str) else x["name"])  # fmt: skip
def test_rows_are_those_of_the_authors(part, dataset):
    """Text as it is, with its spaces, accents and line breaks; a tag before it; no frame twice in a row."""
    tokenizer = load_tokenizer("tokenizers", (ROOT / "tests/golden/kani_rows.tokenizer.json").read_bytes())
    c = ROWS["constants" if part == "finetune" else "constants_published"]
    marks = tokenizer.bos_id, tokenizer.eos_id
    config = KaniConfig(c["text_vocab_size"], 4, 4032, LFM2_STACK, *marks, drop_repeats=True)
    assert Kani.front_end == "none" and dataset["rows"]
    for row in dataset["rows"]:
        said, source = dataset["config"]["hf_datasets"][row["dataset"]], ROWS["sets"][row["set"]][row["row"]]
        text = read_text(source[said["text_col_name"]], Kani.front_end)
        if tag := said.get("speaker_id") or said.get("language_tag"):
            text = wording("{speaker}: {text}", tag.lower(), text)
        codes = np.array([source[said[f"nano_layer_{k}"]] for k in (1, 2, 3, 4)]).T
        tokens, _ = config.layout(tokenizer.encode(text), codes)
        assert tokens[:, 0].tolist() == row["input_ids"], (row["set"], row["row"])


# ---------------------------------------------------------------------------------------------------------------------
# against transformers


@pytest.fixture(scope="module")
def port():
    """transformers' LFM2 with small random weights, and ours with the same."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(3)
    c = KaniConfig(30, 4, 16, {**LFM2_STACK, "rope_theta": 1e6}, text_bos=1, text_eos=2)
    theirs = Lfm2ForCausalLM(Lfm2Config(
        vocab_size=c.vocab_size, hidden_size=32, intermediate_size=48, block_auto_adjust_ff_dim=False,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        layer_types=["conv", "full_attention"] * 2, initializer_range=0.3, eos_token_id=c.end_of_speech,
    )).eval()  # fmt: skip
    for name, p in theirs.named_parameters():
        if name.endswith("norm.weight"):
            p.data += 0.1 * torch.randn_like(p)  # made as ones
    theirs.model.embed_tokens.weight.data[c.end_of_speech] = 0  # likelier than none of 16 codes: it speaks on
    ours = Kani(c)
    tensors = theirs.state_dict()
    state = {name: tensors[published.translate(name, published.LFM2)] for name in ours.state_dict()}
    weights.load_weights(ours, state)
    return theirs, ours.eval()


def test_logits_and_loss_equal_those_of_transformers(port):
    theirs, ours = port
    tokens, segment = batch_of(ours, utterance(5, 9), utterance(3, 6, seed=1), utterance(9, 2, seed=2))
    with torch.no_grad():
        labels = torch.where(segment > 0, tokens[..., 0], IGNORE)
        expected = theirs(tokens[..., 0], attention_mask=(segment > 0).long(), labels=labels)
        loss, _ = ours(tokens, segment)
        logits = ours.backbone(ours.embed(tokens)) @ ours.embedding.T
        here = segment > 0
        torch.testing.assert_close(logits[here], expected.logits[here], rtol=0, atol=1e-4)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_fifty_frames_equal_those_of_transformers(port, penalty, use_cache):
    theirs, ours = port
    c, (text, _) = ours.config, utterance(7)
    prompt = torch.from_numpy(ours.layout(text)[0]).T

    def grammar(ids, scores):
        k = (ids.shape[1] - prompt.shape[1]) % 4
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        allowed[:, c.first_code + 16 * k :][:, :16] = True
        allowed[:, c.end_of_speech] = k == 0
        return scores.masked_fill(~allowed, -math.inf)

    expected = theirs.generate(prompt, max_new_tokens=200, do_sample=False, use_cache=use_cache, pad_token_id=0,
                               repetition_penalty=penalty, logits_processor=[grammar])  # fmt: skip
    draw = dict(temperature=0.0, repetition_penalty=penalty)
    frames, stopped = spoken_by(ours, text, max_frames=50, draw=draw)
    codes = (expected[0, prompt.shape[1] :] - c.first_code).view(50, 4) - 16 * torch.arange(4)
    assert frames == codes.tolist() and stopped is False
    assert len({tuple(frame) for frame in frames}) > 10  # it says something


# ---------------------------------------------------------------------------------------------------------------------
# published weights

OURS = dict(text_vocab_size=30, codebook_size=16)  # what config.json does not say: the released models have more


def rewrite(folder, change):
    """Let `change` work on the dict of a folder's config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("age", ["new", "old", "none"])
def test_a_folder_that_transformers_saved(port, tmp_path, age):
    """config.json in the words of newer and of older releases, the tied head stored or not."""
    theirs, ours = port
    theirs.save_pretrained(tmp_path)

    def older(config):
        for key in ("layer_types", "rope_parameters", "intermediate_size"):
            del config[key]
        config.update(full_attn_idxs=[1, 3], theta=1e6, block_ff_dim=70, block_auto_adjust_ff_dim=True,
                      block_multiple_of=16, block_ffn_dim_multiplier=1.0, tie_embedding=True)  # fmt: skip

    if age == "old":
        rewrite(tmp_path, older)
        tensors = load_file(tmp_path / "model.safetensors")
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
                  tmp_path / "model.safetensors")  # fmt: skip
        assert type(theirs).from_pretrained(tmp_path).model.layers[0].feed_forward.w1.weight.shape == (48, 32)
    if age == "none":
        (tmp_path / "config.json").unlink()
    model = weights.from_pretrained(tmp_path, **OURS)
    assert model.config.backbone.max_positions == (128_000 if age == "none" else 512)
    model.config.backbone.max_positions = 512
    assert model.config == ours.config and not model.training
    torch.testing.assert_close(model.state_dict(), ours.state_dict(), rtol=0, atol=0)
    contract_check(model, *utterance())


def test_where_config_json_is_heeded(port, tmp_path):
    port[0].save_pretrained(tmp_path)
    newer = dict(rope_parameters={"rope_type": "default", "rope_theta": 5e4})
    older = dict(rope_parameters=None, rope_theta=3e4)
    for change, theta in ((newer, 5e4), (older, 3e4), (dict(rope_theta=None, theta=2e4), 2e4)):
        rewrite(tmp_path, lambda config, change=change: config.update(change, norm_eps=1e-3))
        backbone = weights.from_pretrained(tmp_path, **OURS).config.backbone
        assert backbone.rope_theta == theta and backbone.norm_eps == 1e-3
    rewrite(tmp_path, lambda config: config.update(rope_parameters={"rope_type": "yarn", "rope_theta": 1.0}))
    with pytest.raises(ValueError, match="rope_type = 'yarn'"):
        weights.from_pretrained(tmp_path, **OURS)


@torch.no_grad()
def test_an_export_is_the_same_model_in_transformers(tmp_path):
    from transformers import Lfm2ForCausalLM

    model = tiny(K=3, V=20, first_special=40, vocab_size=120, text_eos=-1, backbone=dict(rope_theta=1e5)).eval()
    export(model, tmp_path)
    theirs, report = Lfm2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    tokens, segment = batch_of(model, utterance(5, 9, 3, 20))
    expected = theirs.eval()(tokens[..., 0], labels=tokens[..., 0])
    logits = model.backbone(model.embed(tokens)) @ model.embedding.T
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(tokens, segment)[0], expected.loss)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    again = weights.from_pretrained(tmp_path)
    assert again.config == model.config
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="this model has others"):
        export(tiny(backbone=dict(qk_norm=False)), tmp_path)


def test_the_released_sizes():
    """On the meta device: names, shapes and numbers of parameters are those of transformers' LFM2-350M."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    for rows, numbers in ((65536, 354_483_968), (80538, 369_846_016)):
        with torch.device("meta"):
            model = Kani(KaniConfig(rows - 10 - 4 * 4032, 4, 4032, "lfm2-350M"))
            theirs = Lfm2ForCausalLM(Lfm2Config(
                vocab_size=rows, hidden_size=1024, block_ff_dim=6656, num_hidden_layers=16, num_attention_heads=16,
                num_key_value_heads=8, full_attn_idxs=[2, 5, 8, 10, 12, 14],
            ))  # fmt: skip
        assert model.config.vocab_size == rows and sum(p.numel() for p in model.parameters()) == numbers
        shapes = {published.translate(name, published.LFM2): w.shape for name, w in model.state_dict().items()}
        expected = {name: w.shape for name, w in theirs.state_dict().items()}
        assert len(expected) == 149 and expected.pop("lm_head.weight") == expected["model.embed_tokens.weight"]
        assert shapes == expected
        sizes = published.kani_sizes(shapes, {})
        read = models.transformer_config(sizes.pop("backbone"), max_positions=2048)
        assert read == model.config.backbone and sizes["vocab_size"] == rows


@pytest.mark.parametrize("change, message", [
    (lambda w: w.update({"model.pos_emb.weight": torch.zeros(32, 8)}),
     "holds model.pos_emb.weight, which the family 'kani' does not have"),
    (lambda w: w.update({"lm_head.weight": torch.zeros(104, 32)}), "differ, but the family 'kani' ties them"),
    (lambda w: w.update({"model.embed_tokens.weight": torch.zeros(90, 32)}), "vocab_size = 90: .* need 104"),
    (lambda w: w.update({"model.layers.2.conv.conv.weight": torch.zeros(32, 1, 4)}), "does not give .*2.attn.taps"),
    (lambda w: w.pop("model.layers.2.conv.in_proj.weight"), "lacks model.layers.2.conv.in_proj.weight"),
    (lambda w: w.pop("model.layers.1.self_attn.q_layernorm.weight"), "lacks model.layers.1.self_attn.q_layernorm"),
    (lambda w: [w.pop(key) for key in list(w) if ".2." in key], "lacks model.layers.2"),
])  # fmt: skip
def test_weights_that_are_no_kani(port, tmp_path, change, message):
    tensors = {key: w.clone() for key, w in port[0].state_dict().items() if key != "lm_head.weight"}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        weights.from_pretrained(tmp_path, **OURS)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# layout


def test_the_layout_of_the_released_models():
    c = KaniConfig(64400, 4, 4032, "lfm2-350M", text_bos=1, text_eos=2)
    codes = np.array([[0, 1, 2, 3], [4031] * 4])
    tokens, segment = c.layout(np.array([500, 600]), codes)
    speech = [64410, 64410 + 4033, 64410 + 2 * 4032 + 2, 64410 + 3 * 4032 + 3, 68441, 72473, 76505, 80537]
    assert tokens[:, 0].tolist() == [64403, 1, 500, 600, 2, 64404, 64405, 64401, *speech, 64402, 64406]
    assert segment.tolist() == [TEXT] * 8 + [AUDIO] * 10 and c.vocab_size == 80538


@given(n=st.integers(1, 20), T=st.integers(0, 20), prompt=st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9)),
       bos=st.sampled_from([-1, 1]), eos=st.sampled_from([-1, 2]), K=st.integers(1, 4))  # fmt: skip
def test_layout(n, T, prompt, bos, eos, K):
    c = KaniConfig(30, K, 16, LFM2_STACK, bos, eos)
    (text, codes), before = utterance(n, T, K), utterance(*prompt, K, seed=1) if prompt else None
    tokens, segment = c.layout(text, codes, before)
    assert tokens.dtype == segment.dtype == np.int64 and tokens.shape == (len(segment), 1)
    assert len(segment) == c.length(n, T, *(prompt or ()))
    before_too = [np.array([x, 0]) for x in prompt or (0, 0)]  # on arrays; the second utterance has no prompt
    lengths = c.length(np.array([n, 3]), np.array([T, 4]), *before_too)
    assert lengths.tolist() == [len(segment), c.length(3, 4)]

    assert tokens.min() >= 0 and tokens.max() < c.vocab_size
    spoken = tokens[segment == AUDIO, 0]
    assert spoken[-2:].tolist() == [c.end_of_speech, c.end_of_ai]
    of_frames = (spoken[:-2] - c.first_code).reshape(T, K)
    assert np.array_equal(of_frames // 16, np.tile(np.arange(K), (T, 1))) and np.array_equal(of_frames % 16, codes)
    marked = [m for m in (bos,) if m >= 0] + text.tolist() + [m for m in (eos,) if m >= 0]
    written = [c.human, *marked, c.end_of_human, c.ai, c.speech]
    own = c.length(*prompt) if prompt else 0
    assert tokens[own:][segment[own:] == TEXT, 0].tolist() == written
    assert (np.diff(segment[own:]) >= 0).all() and segment[-1] == AUDIO and PROMPT not in segment[own:]
    if before:  # it stands before as the utterance that it is, but none of its speech is to be predicted
        alone, kinds = c.layout(*before)
        assert np.array_equal(tokens[:own], alone)
        assert np.array_equal(segment[:own], np.where(kinds == AUDIO, PROMPT, kinds))
    asked, kinds = c.layout(text, None, before)  # generation starts from what training saw before the frames
    rest = T * K + 2
    assert np.array_equal(asked, tokens[:-rest]) and np.array_equal(kinds, segment[:-rest])


@given(st.lists(st.integers(0, 2), min_size=0, max_size=12), st.lists(st.integers(0, 1), max_size=6))
def test_dropped_repeats(first, second):
    """Of frames that are alike in every codebook the first of a run is kept; `length` never says too little."""
    c = KaniConfig(30, 2, 16, LFM2_STACK, drop_repeats=True)
    table = np.array([[3, 4], [3, 5], [7, 4]])  # alike in one codebook is not alike
    text, codes, before = utterance()[0], table[first], (utterance()[0], table[second])
    kept = table[[i for i, _ in itertools.groupby(first)]]
    short = KaniConfig(30, 2, 16, LFM2_STACK)
    for prompt, kept_before in ((None, None), (before, table[[i for i, _ in itertools.groupby(second)]])):
        tokens, segment = c.layout(text, codes, prompt)
        expected = short.layout(text, kept, prompt and (prompt[0], kept_before))
        assert np.array_equal(tokens, expected[0]) and np.array_equal(segment, expected[1])
        sizes = (len(prompt[0]), len(prompt[1])) if prompt and second else ()
        if not prompt or second:
            assert len(tokens) <= c.length(len(text), len(codes), *sizes) == short.length(len(text), len(codes), *sizes)
    assert np.array_equal(c.layout(text, codes, every=True)[0], short.layout(text, codes)[0])


def test_ids_that_cannot_be():
    for options, message in (
        (dict(first_special=29), "first_special = 29 is one of 30 text ids"),
        (dict(vocab_size=103), "vocab_size = 103: text, special tokens and codes need 104"),
        (dict(loss_on="text"), "loss_on = 'text' must be all, audio or codebook"),
        (dict(backbone="lfm3"), "unknown preset 'lfm3'"),
    ):
        with pytest.raises(ValueError, match=message):
            KaniConfig(30, 4, 16, **{"backbone": LFM2_STACK, **options})
    c = KaniConfig(30, 4, 16, LFM2_STACK, first_special=40, vocab_size=120)
    assert (c.speech, c.end_of_ai, c.first_code, c.vocab_size) == (40, 45, 49, 120)
    assert KaniConfig(**{k: v for k, v in asdict(c).items() if k != "arch"}) == c


# ---------------------------------------------------------------------------------------------------------------------
# loss


def by_hand(model, tokens, segment, loss_on):
    """Losses [(codebook or None, loss, ranked first)] of every token that is learnt, one by one."""
    c = model.config
    logits = model.backbone(model.embed(tokens)) @ model.embedding.T
    out = []
    for b, s in itertools.product(range(tokens.shape[0]), range(1, tokens.shape[1])):
        kind, token, x = segment[b, s], int(tokens[b, s, 0]), logits[b, s - 1]
        codebook = (token - c.first_code) // c.codebook_size if token >= c.first_code else None
        codebook = "end" if token == c.end_of_speech else codebook
        if kind != AUDIO and not (loss_on == "all" and kind == TEXT):
            continue
        if loss_on == "codebook":
            if codebook is None:
                continue
            number = 0 if codebook == "end" else codebook
            first = c.first_code + number * c.codebook_size
            classes = [*range(first, first + c.codebook_size), *([c.end_of_speech] if number == 0 else [])]
            x, token = x[classes], classes.index(token)
        out.append((codebook, F.cross_entropy(x, torch.tensor(token)), bool(x.argmax() == token)))
    return out


@pytest.mark.parametrize("loss_on", LOSSES)
@pytest.mark.parametrize("K", [1, 4])
def test_loss_by_hand(loss_on, K):
    model = tiny(K=K, loss_on=loss_on).double()
    utterances = [utterance(5, 9, K), (*utterance(3, 5, K, seed=1), utterance(4, 6, K, seed=2))]
    batch = batch_of(model, *utterances, width=90)
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(10):  # so that some are ranked first
        optimizer.zero_grad()
        model(*batch)[0].backward()
        optimizer.step()
    with torch.no_grad():
        loss, stats = model.train()(*batch)
        expected = by_hand(model, *batch, loss_on)
    torch.testing.assert_close(loss, torch.stack([x for _, x, _ in expected]).mean())
    assert stats["weighted_loss"][1] == 9 + 1 + 5 + 1 and stats["c0_accuracy"][1] == 9 + 5
    torch.testing.assert_close(stats["weighted_loss"][0], loss * 16)
    for k in range(K):
        of = [(x, first) for codebook, x, first in expected if codebook == k]
        torch.testing.assert_close(stats["loss_by_codebook"][0][k], sum(x for x, _ in of))
        assert stats["accuracy_by_codebook"][0][k] == sum(first for _, first in of)
        assert stats["loss_by_codebook"][1][k] == stats["accuracy_by_codebook"][1][k] == len(of) == 14
    assert stats["c0_accuracy"][0] == stats["accuracy_by_codebook"][0][0] > 0
    others = {codebook for codebook, _, _ in expected} - set(range(K))
    assert others == ({"end"} if loss_on == "codebook" else {None, "end"})
    if loss_on != "codebook":  # evaluations can be compared: each code against its own codebook
        own = tiny(K=K, loss_on="codebook").double().eval()
        own.load_state_dict(model.state_dict())
        for name in ("loss_by_codebook", "accuracy_by_codebook"):
            torch.testing.assert_close(model.eval()(*batch)[1][name], own(*batch)[1][name])


@pytest.mark.parametrize("loss_on", LOSSES)
def test_gradients_by_hand(loss_on):
    model = tiny(loss_on=loss_on).double()
    batch = batch_of(model, utterance(5, 6), utterance(3, 4, seed=1))
    expected = torch.autograd.grad(torch.stack([x for _, x, _ in by_hand(model, *batch, loss_on)]).mean(),
                                   list(model.parameters()))  # fmt: skip
    loss, _ = model(*batch)
    loss.backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
        assert gradient.any()
    untouched = ~model.embedding.grad.any(1)
    tokens = set(batch[0].flatten().tolist())
    c = model.config
    if loss_on == "codebook":  # as a head it moves codes and end of speech, as an embedding what is read
        learnt = {c.end_of_speech, *range(c.first_code, c.vocab_size)}
        unread = {c.end_of_ai, 0}  # the last of a row, and padding
        assert {i for i in range(c.vocab_size) if not untouched[i]} == learnt | tokens - unread
    else:
        assert not untouched.any()


def test_prompts_are_heard_but_not_predicted():
    model, (text, codes), (before, said) = tiny(loss_on="audio"), utterance(), utterance(3, 4, seed=1)
    loss, stats = model(*batch_of(model, (text, codes, (before, said))))
    assert stats["weighted_loss"][1] == len(codes) + 1 and stats["loss_by_codebook"][1].tolist() == [6, 6, 6, 6]
    other, _ = model(*batch_of(model, (text, codes, (before, (said + 1) % 16))))
    assert abs(loss - other) > 1e-4


@torch.no_grad()
def test_stops_that_are_missed():
    model = tiny().eval()
    batch = batch_of(model, utterance(), utterance(4, 3, seed=1))
    c = model.config
    states = model.backbone(model.embed(batch[0]))[:, :-1][batch[0][:, 1:, 0] == c.end_of_speech]
    head = torch.cat([model.embedding[c.first_code :][:16], model.embedding[c.end_of_speech][None]])
    for change, expected in ((0, int(((states @ head.T).argmax(-1) != 16).sum())), (states.mean(0) * 9, None)):
        model.embedding[c.end_of_speech] += change
        missed, count = model(*batch)[1]["stop_missed"]
        assert count == 2 and (missed == expected or expected is None and missed < 2)
    assert "stop_missed" not in model.train()(*batch)[1]


@torch.no_grad()
def test_frame_dropout_blanks_codes_in_training_only():
    model, (text, codes), prompt = tiny(frame_dropout=1.0, loss_on="codebook"), utterance(), utterance(seed=1)

    def loss_of_codebook_0(codes, prompt):
        losses, counts = model(*batch_of(model, (text, codes, prompt)))[1]["loss_by_codebook"]
        return losses[0]

    other = codes.copy()
    other[:, 1:] = (other[:, 1:] + 1) % 16
    model.train()
    assert loss_of_codebook_0(codes, prompt) == loss_of_codebook_0(other, prompt)
    assert loss_of_codebook_0(codes, prompt) != loss_of_codebook_0(codes, (prompt[0], other))  # no prompt is blanked
    model.eval()
    assert loss_of_codebook_0(codes, prompt) != loss_of_codebook_0(other, prompt)
    model.train().config.frame_dropout = 0.5
    assert len({float(loss_of_codebook_0(codes, prompt)) for _ in range(9)}) > 1


@pytest.mark.parametrize("loss_on", LOSSES)
def test_nothing_to_learn(loss_on):
    """A prompt alone: no target, but every parameter has a gradient, as DistributedDataParallel needs it."""
    model = tiny(loss_on=loss_on).train()
    tokens, segment = batch_of(model, utterance())
    loss, stats = model(tokens, torch.where(segment == AUDIO, PROMPT, 0))
    loss.backward()
    assert loss == 0 and stats["weighted_loss"][1] == 0 and all(p.grad.isfinite().all() for p in model.parameters())


def test_the_loss_of_every_target():
    """What by-codebook statistics are made of: losses and ranks of multi_codebook_cross_entropy, before the mean."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 3, 8, requires_grad=True), torch.randn(3, 11, 8)
    target = torch.randint(0, 11, (40, 3))
    target[::5, 1] = IGNORE
    loss, correct, each = models.multi_codebook_cross_entropy(hidden, weight, target, each=True)
    logits = torch.einsum("nkd,kvd->nvk", hidden, weight)
    torch.testing.assert_close(each, F.cross_entropy(logits, target, reduction="none", ignore_index=IGNORE))
    assert torch.equal(correct, logits.argmax(1) == target) and not each.requires_grad
    plain, count = models.multi_codebook_cross_entropy(hidden, weight, target)
    assert torch.equal(plain, loss) and torch.equal(count, correct.sum(0))


def test_initial_loss_is_near_ln_v():
    meta = dict(codec=dict(n_codebooks=4, codebook_size=256), tokenizer=dict(vocab_size=300, bos_id=1, eos_id=2))
    for loss_on, classes in (("all", 1334), ("audio", 1334), ("codebook", 256)):
        torch.manual_seed(0)
        options = dict(backbone={**LFM2_STACK, "d_model": 128}, loss_on=loss_on, learning_rate=1.0, decoder="none")
        model = models.build("kani", meta, options)
        assert model.config.vocab_size == 1334 and model.config.text_bos == 1
        loss, _ = model(*batch_of(model, utterance(9, 40, 4, 256), utterance(9, 40, 4, 256, seed=1)))
        assert abs(loss.item() - math.log(classes)) < 0.2


# ---------------------------------------------------------------------------------------------------------------------
# generation


def test_generation_keeps_to_the_grammar():
    """Whatever is chosen: each codebook's turn offers its own codes, and end of speech where a frame would begin."""
    model, (text, _) = tiny(), utterance()
    for worst in (torch.argmax, torch.argmin):
        offered = []

        def choose(logits, key, worst=worst, offered=offered):
            offered.append(logits.shape[-1])
            return worst(logits[:, :16], -1)

        frames, stopped = spoken_by(model, text, max_frames=5, choose=choose)
        assert offered == [17, 16, 16, 16] * 5 and len(frames) == 5 and stopped is False
        assert all(0 <= code < 16 for frame in frames for code in frame)


def test_generation_ends_at_end_of_speech():
    model, (text, codes) = tiny(), utterance(T=3)
    assert spoken_by(model, text, max_frames=9, choose=choices(*codes.ravel(), 16, 0, 0, 0)) == (codes.tolist(), True)
    assert spoken_by(model, text, max_frames=3, choose=choices(*codes.ravel())) == (codes.tolist(), False)
    assert spoken_by(model, text, choose=choices(16, 0, 0, 0)) == ([], True)


def test_what_was_spoken_is_told_by_codebook():
    model, (text, codes), heard = tiny(), utterance(T=4), []
    forced = choices(*codes.ravel(), 16, 0, 0, 0)

    def choose(logits, key, age=None, **settings):
        heard.append((age is not None and age[0].tolist(), settings))
        return forced(logits)

    before = utterance(4, 5, seed=3)  # what a prompt says has not been spoken
    draw = dict(repetition_penalty=1.5)
    spoken_by(model, text, before, choose=choose, draw=draw)
    ages = [({code: t - i for i, code in enumerate(codes[:t, k])}, 16 + (k == 0)) for t in range(5) for k in range(4)]
    assert heard == [([age.get(code, 0) for code in range(V)], draw) for age, V in ages]
    forced = choices(16, 0, 0, 0)
    heard.clear()
    spoken_by(model, text, before, choose=choose, draw=dict(repetition_penalty=1.0))
    assert heard == [(False, dict(repetition_penalty=1.0))] * 4  # not needed


def test_repetition_penalty_reaches_the_draw():
    model, (text, _) = tiny(), utterance()
    plain, _ = spoken_by(model, text, max_frames=40, draw=GREEDY)
    varied, _ = spoken_by(model, text, max_frames=40, draw=dict(GREEDY, repetition_penalty=5.0))
    assert plain[0] == varied[0]
    assert sum(len(set(c)) for c in zip(*varied, strict=True)) > sum(len(set(c)) for c in zip(*plain, strict=True))


def test_generation_within_the_positions():
    model, (text, codes) = tiny(backbone=dict(max_positions=30)), utterance(n=5)
    frames, stopped = spoken_by(model, text, choose=always(3))
    assert len(frames) == (30 - 11) // 4 and stopped is False
    assert len(spoken_by(model, np.arange(20), draw=GREEDY)[0]) == 1  # 26 rows and one frame of 4
    for said, rows in (((np.arange(21),), 27), ((text, (text, codes)), 48)):
        with pytest.raises(ValueError, match=f"text and prompt take {rows} rows, the model has 30 positions"):
            next(model.generate(*said))


@torch.no_grad()
def test_a_prompt_changes_the_voice():
    model, (text, codes), (before, said) = tiny(), utterance(), utterance(3, 4, seed=1)
    first = [spoken_by(model, text, p, max_frames=20, draw=GREEDY)[0]
             for p in (None, (before, said), (before, (said + 1) % 16))]  # fmt: skip
    assert first[0] != first[1] != first[2]
    logits = []
    model.layout = lambda *given, **how: model.config.layout(text, codes, (before, said), **how)
    whole = model.teacher_forced_logits(text, codes)
    model.layout = model.config.layout
    forced = choices(*codes.ravel(), 16, 0, 0, 0)
    spoken_by(model, text, (before, said), choose=lambda x, key: logits.append(x[0]) or forced(x))
    assert len(logits) == whole[..., 0].numel()
    for x, y in zip(logits[:-3], whole.flatten(0, 1), strict=False):
        torch.testing.assert_close(x, y[: len(x)], rtol=1e-4, atol=1e-4)


def test_contract_holds_where_repeats_are_dropped():
    """Generation may say a frame twice whatever training left out."""
    text, codes = utterance(T=4)
    contract_check(tiny(drop_repeats=True), text, np.repeat(codes, 3, 0))


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints, training, speaking


RUN = [
    "--arch=kani", "--backbone={'n_layer': 2, 'n_head': 2, 'n_kv_head': 1, 'd_model': 32, 'd_ff': 48, 'layers': 'ca'}",
    "--max_tokens=400", "--warmup_iters=2", "--log_interval=1", "--eval_interval=4", "--eval_samples=0", "--device=cpu",
    "--lr_schedule=constant", "--learning_rate=0.01",
]  # fmt: skip


def run(data_dir, out_dir, *flags, usual=RUN):
    """Train in this process, give back last.pt and the lines of metrics.jsonl."""
    flags = [*usual, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *flags]
    train.main(configurator.configure(train.__file__, flags))
    return weights.load_checkpoint(f"{out_dir}/last.pt"), read_metrics(f"{out_dir}/metrics.jsonl")


@pytest.mark.parametrize("flags", [
    ["--loss_on=all"],
    ["--loss_on=codebook", "--drop_repeats=True", "--frame_dropout=0.3", "--voice_prompt=0.5", "--muon=True",
     "--dropout=0.1", "--sparse_embeddings=True", "--ema=0.9", "--gradient_accumulation_steps=2"],
], ids=["plain", "everything"])  # fmt: skip
def test_training_goes_on_bit_for_bit(tokens, tmp_path, flags):
    whole, lines = run(tokens, tmp_path / "whole", "--max_iters=8", *flags)
    run(tokens, tmp_path / "halves", "--max_iters=4", *flags)
    again, lines_again = run(tokens, tmp_path / "halves", "--max_iters=8", "--init_from=resume", *flags)
    same(whole, again)
    assert exact(lines) == exact(lines_again) and len(lines) == 8
    assert lines[-1]["val_loss"] < lines[3]["val_loss"] and len(lines[-1]["val_loss_by_codebook"]) == 3


def test_it_learns_and_speaks(tokens, tmp_path):
    _, lines = run(tokens, tmp_path, "--max_iters=80", "--eval_interval=40", "--loss_on=codebook", "--max_tokens=1500")
    assert lines[-1]["val_loss"] < 1.0 and lines[-1]["val_stop_missed"] < 0.5
    voice, files = Voice.from_checkpoint(tmp_path / "best.pt", "cpu"), TokenFiles(tokens, "train")
    for i in range(3):
        assert spoken_by(voice.model, files.text(i), draw=GREEDY) == (files.codes(i).tolist(), True)
    wav = voice.say("one", temperature=0.0)
    assert len(wav) == 4 * voice.codec.sample_rate / voice.codec.frame_rate and voice.stopped


def test_training_starts_from_published_weights(tokens, tmp_path):
    meta = TokenFiles(tokens, "train").meta
    model = models.build("kani", meta, dict(backbone={**LFM2_STACK, "rope_theta": 1e6}))
    export(model, tmp_path / "weights")
    flags = [f"--init_from={tmp_path / 'weights'}", "--max_iters=4"]
    with pytest.raises(ValueError, match="--backbone: backbone = .* but .*weights was trained with {'n_layer': 4"):
        run(tokens, tmp_path / "out", *flags)
    usual = [flag for flag in RUN if not flag.startswith("--backbone")]
    checkpoint, lines = run(tokens, tmp_path / "out", *flags, usual=usual)
    started = weights.load_model({**checkpoint, "model": model.state_dict()}).config
    assert started == model.config and lines[-1]["loss"] < lines[0]["loss"]
    assert Voice.from_checkpoint(tmp_path / "out/best.pt", "cpu").say("one", cap_seconds=1.0).isfinite().all()


def test_dropped_repeats_stay_within_the_batch(tokens):
    """Batches are planned by `length`, which counts what is dropped."""
    files = TokenFiles(tokens, "train")
    files._codes = np.repeat(files._codes[:][::2], 2, 0)  # every frame twice
    model = models.build("kani", files.meta, dict(backbone=LFM2_STACK, drop_repeats=True))
    batches = Batches(files, model.layout, model.length, 200, 64, voice_prompt=0.5, max_rows=model.max_rows)
    assert all(math.prod(segment.shape) <= 200 and model(tokens, segment)[0].isfinite()
               for tokens, segment in itertools.islice(iter(batches), 8))  # fmt: skip


def test_the_lora_recipe():
    """Its patterns find what its authors name; a dry run supposes frames of which none is dropped."""
    cfg = configurator.configure(train.__file__, [str(ROOT / "config/kani_lora.py")])
    meta = dict(codec=published_sizes("nanocodec"), tokenizer=dict(vocab_size=64400, bos_id=1, eos_id=2))
    with torch.device("meta"):
        model = models.build("kani", meta, vars(cfg))
    found = Counter(name.split(".")[-1] for name in lora.find_linears(model, cfg.lora_targets))
    assert found == {"q_proj": 6, "v_proj": 6, "gate_proj": 16, "up_proj": 16, "down_proj": 16}
    assert model.config.drop_repeats
    (tokens, segment), seconds = budget.supposed_batch(cfg, meta["codec"], model)
    assert tokens.shape[:2] == segment.shape == (4, model.length(40, 125)) and seconds == 40

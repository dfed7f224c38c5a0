"""model.py's VALL-E: against golden vectors of the original, by itself, and on the road from train.py to sample.py."""

import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from helpers import (
    GREEDY,
    ROOT,
    VALLE_STACK,
    always,
    batch_of,
    choices,
    command,
    exact,
    gradients,
    same,
    spoken_by,
    utterance,
    write_tokens,
)
from helpers import tiny_valle as tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import layouts as published
import model as models
import sample
import train
import weights
from data import Batches, TokenFiles
from model import AUDIO, PAD, PROMPT, TEXT, AudioEncoder, VallE, VallEConfig, length_digits, read_length
from parts import configurator
from parts.metrics import read_metrics
from voice import Voice

GOLDEN = ROOT / "tests/golden/valle2"
MODES = ("ar", "nar")


def close(ours, theirs, atol=1e-4):
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=0, atol=atol)


# ---------------------------------------------------------------------------------------------------------------------
# against the original


@pytest.fixture(scope="module")
def golden():
    return load_file(f"{GOLDEN}.safetensors")


@pytest.fixture(scope="module")
def facts():
    return json.loads(Path(f"{GOLDEN}.json").read_text())["config"]


@pytest.fixture(scope="module")
def sft(golden, facts, tmp_path_factory):
    """The golden weights as their author publishes such: a safetensors file with its config inside."""
    path = tmp_path_factory.mktemp("valle") / "fp32.sft"
    said = {"experimental": facts["experimental"], "size": {"heads": facts["n_heads"]}, "version": 7}
    weights = {key.removeprefix("weights."): x for key, x in golden.items() if key.startswith("weights.")}
    save_file(weights, path, {"config": json.dumps(said), "stats": "{}"})
    return path


def original(sft, mode="nar", **options):
    """Our model with the golden weights. No model was published in mode ar: there the heads of the length go unused."""
    model = published.load(sft, **{"top_sigma": 0.0, **options})
    if mode == "ar":
        given = {key: x for key, x in asdict(model.config).items() if key != "arch"}
        tensors = {name: x for name, x in model.state_dict().items() if not name.startswith("length_")}
        weights.load_weights(model := VallE(VallEConfig(**{**given, "mode": "ar"})), tensors)
    return model.eval()


def golden_utterance(model, golden, i):
    """Text, codes and prompt of golden utterance i, whose language the model then speaks."""
    model.config.language = int(golden[f"in.{i}.lang"])
    assert golden[f"in.{i}.phn"][[0, -1]].tolist() == [model.config.text_bos, model.config.text_eos]
    text, codes, prompt = (golden[f"in.{i}.{part}"].numpy() for part in ("phn", "resp", "prom"))
    return text[1:-1], codes, (None, prompt)


def golden_batch(model, golden):
    """tokens, segment of both golden utterances; and which frames are masked there (B, S)."""
    laid_out = [model.layout(*golden_utterance(model, golden, i)) for i in (0, 1)]
    S = max(len(segment) for _, segment in laid_out)
    tokens, segment = (torch.from_numpy(np.stack([np.pad(x, [(0, S - len(x)), (0, 0)][: x.ndim]) for x in part]))
                       for part in zip(*laid_out, strict=True))  # fmt: skip
    masked = torch.zeros(segment.shape, dtype=torch.bool)
    if model.config.mode == "nar":
        for i in (0, 1):
            masked[i][segment[i] == AUDIO] = golden[f"nar.{i}.dropout_mask"].bool()
    return tokens, segment, masked


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_golden_states_and_logits(sft, golden, mode):
    model = original(sft, mode)
    tokens, segment, masked = golden_batch(model, golden)
    tokens, used = tokens.masked_fill(masked[..., None], model.config.mask_class), segment != PAD
    if mode == "nar":
        close(model.embed(tokens, segment), golden["nar.inputs_embeds"])
        for i, (part, kind) in itertools.product((0, 1), (("prom", PROMPT), ("resp", AUDIO))):
            close(model.embed(tokens, segment)[i][segment[i] == kind], golden[f"nar.{i}.{part}_emb"])
    assert torch.equal(model.positions(tokens, segment)[used], golden[f"{mode}.position_ids"][used])
    hidden = model.states(tokens, segment)
    close(hidden[used], golden[f"{mode}.hidden"][used])
    for i in (0, 1):
        close(model.logits(hidden[i][used[i]]).transpose(0, 1), golden[f"{mode}.{i}.logits"])


def test_golden_losses_and_gradients(sft, golden):
    for factors, name in (("decreasing", "_decreasing"), ("equal", "_equal"), ("normal", "")):
        model = original(sft, level_weights=factors, length_loss_weight=0.0)
        tokens, segment, masked = golden_batch(model, golden)
        model.masked = lambda spoken: masked  # noqa: B023
        loss, stats = model(tokens, segment)
        close(loss, golden[f"nar.loss{name}"], 1e-5)
        right, count = stats["accuracy_by_codebook"]
        close(right.sum() / count.sum(), golden["nar.acc_top1"], 1e-5)
    loss.backward()
    ours, theirs = dict(model.named_parameters()), {k.removeprefix("grad.nar."): g for k, g in golden.items()}
    separator = model.config.separator
    for name, key, part in (
        ("text_embedding.weight", "sep", separator),
        ("frame_encoder.level_weights", "resps_emb.level_weights", slice(None)),
        ("frame_encoder.codes", "resps_emb.embs.3.weight", (slice(None), 3)),
        ("head_bias", "audio_decoder.head.5.4.bias", 5),
        ("backbone.layers.0.attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight", slice(None)),
    ):
        close(ours[name].grad[part], theirs[key], 1e-4 * float(theirs[key].abs().max()))


def test_golden_segmented_mask(sft, golden):
    model = original(sft, segmented_mask=True, length_loss_weight=0.0)
    tokens, segment, masked = golden_batch(model, golden)
    model.masked = lambda spoken: masked
    used = segment != PAD
    both = used[:, None, :, None] & used[:, None, None]
    assert torch.equal(model.mask(segment)[both], golden["seg.mask"].bool()[both])
    close(model(tokens, segment)[0], golden["seg.loss"], 1e-5)


def test_golden_loss_frame_by_frame(sft, golden):
    """The original never learns the first frame: its targets are the frames behind others. We learn it too."""
    model, expected = original(sft, "ar"), 0.0
    factor = torch.tensor([0.5, 0.625, 0.75, 0.875, 0.875, 0.75, 0.625, 0.5])
    for i in (0, 1):
        text, codes, prompt = golden_utterance(model, golden, i)
        whole = model(*batch_of(model, (text, codes, prompt)))[0] * (len(codes) + 1)
        logits = golden[f"ar.{i}.logits"]  # (K, S, V + 1)
        before = logits[:, logits.shape[1] - len(codes) - 2]  # at the separator
        first = F.cross_entropy(before, torch.from_numpy(codes[0]), reduction="none")
        expected += (whole - (factor * first).sum() / factor.sum()) / len(codes) / 2
    close(expected.detach(), golden["ar.loss"], 1e-5)


@torch.no_grad()
def test_golden_length(sft, golden):
    model = original(sft)
    tokens, segment, _ = golden_batch(model, golden)
    _, stats = model(tokens, segment)
    total, count = stats["length_loss"]
    close(total / count, golden["len.loss"], 1e-5)
    state = model.length_state(tokens, segment)
    logits = torch.einsum("bd,kvd->bkv", state, model.length_heads) + model.length_bias
    close(logits, torch.stack([golden["len.0.logits"], golden["len.1.logits"]]))
    # as the original turns frames into seconds and back; of a batch, it reads the shorter one's length off its padding
    lengths = [int(x / 86.1 * 86.1) for x in model.guess_length(state).tolist()]
    assert lengths[0] == golden["gen.len"][0]
    frames, _ = spoken_by(model, *golden_utterance(model, golden, 0)[::2], 7, GREEDY)
    assert len(frames) == 7 < lengths[0]


@pytest.mark.parametrize("top", [0.0, 1.0])
@pytest.mark.parametrize("i", [0, 1])
@torch.no_grad()
def test_golden_demasking(sft, golden, facts, i, top):
    model, name = original(sft, top_sigma=top), f"demask{'_topno' if top else ''}.{i}"
    text, _, prompt = golden_utterance(model, golden, i)
    inputs, chosen, frame_logits = [], [], model.frame_logits

    def watched(tokens, segment):
        codes = tokens[0, -T:, :-1]
        inputs.append(codes.clone())
        if top:  # many scores are equal: which of them is masked again is chance, so every round starts from theirs
            codes.copy_(golden[f"{name}.step_inputs"][len(inputs) - 1])
        return frame_logits(tokens, segment)

    def choose(logits, key):
        chosen.append(logits.argmax(-1))
        return chosen[-1]

    model.frame_logits = watched
    steps, T = facts["demask"]["max_steps"], facts["demask"]["lens"][i]
    frames, stopped = spoken_by(model, text, prompt, 99, choose=choose, frames=T, rounds=steps)
    assert stopped and torch.equal(torch.stack(chosen), golden[f"{name}.step_ids"])
    expected = golden[f"{name}.result"]
    assert frames == expected.where(expected < facts["stop_token"], 0).tolist()
    if not top:
        assert torch.equal(torch.stack(inputs), golden[f"{name}.step_inputs"])
    for ours, score in zip(inputs[1:], golden[f"{name}.step_scores"], strict=False):
        masked = ours == facts["mask_token"]
        least = score.where(~masked, 1.0).amin(0)  # of what is kept in each codebook
        assert (score[masked] <= (least + 1e-5).expand_as(score)[masked]).all()


@torch.no_grad()
def test_golden_guidance(sft, golden):
    model = original(sft)
    text, _, prompt = golden_utterance(model, golden, 0)
    codes = golden["demask.0.step_inputs"][1].numpy()
    for guidance, rows, name in ((2.5, (text, codes, prompt), "cfg_"), (1.0, (text, codes, prompt), ""),
                                 (1.0, (text[:0], codes), "null_")):  # fmt: skip
        model.config.guidance = guidance
        close(model.frame_logits(*model.rows(*rows)).transpose(0, 1), golden[f"demask.0.step1_{name}logits"])


def test_golden_generation_frame_by_frame(sft, golden):
    model = original(sft, "ar")
    text, _, prompt = golden_utterance(model, golden, 0)
    frames, _ = spoken_by(model, text, prompt, 6, GREEDY)
    assert frames == golden["ar.generated"].tolist()


def published_table(D, layers, inner, languages=6):
    """Keys and shapes of the published file of that width."""
    linear = lambda key, *shape: {f"{key}.weight": shape, f"{key}.bias": shape[:1]}  # noqa: E731
    table = {"sep": (D,), "len_emb": (D,), "phn_emb.weight": (256, D), "text_emb.weight": (8575, D),
             "langs_emb.weight": (languages, D), "tasks_emb.weight": (9, D), "tones_emb.weight": (1, D),
             **linear("len_decoder.head", 50, D), **linear("phn_decoder.head", 256, D),
             **linear("text_decoder.head", 8575, D)}  # fmt: skip
    for name, rows in (("proms_emb", 1000), ("resps_emb", 1002)):
        table |= {f"{name}.embs.{k}.weight": (rows, D) for k in range(8)}
        table |= {f"{name}.pos_embedding": (1, 8, D), f"{name}.level_weights": (8,), **linear(f"{name}.norm", D),
                  **linear(f"{name}.proj.0", 2 * D, D), **linear(f"{name}.proj.2", D, 2 * D)}  # fmt: skip
        table[f"{name}.norm.weight"] = (D,)
    for k in range(8):
        head = f"audio_decoder.head.{k}"
        table |= {**linear(f"{head}.0", D), **linear(f"{head}.1", 2 * D, D), **linear(f"{head}.3", D, 2 * D),
                  **linear(f"{head}.4", 1001, D)}  # fmt: skip
    for i in range(layers):
        layer = f"model.layers.{i}"
        table |= {f"{layer}.self_attn.{x}_proj.weight": (D, D) for x in "qkvo"}
        table |= {f"{layer}.mlp.{x}_proj.weight": (inner, D) for x in ("gate", "up")}
        table |= {f"{layer}.mlp.down_proj.weight": (D, inner), f"{layer}.input_layernorm.weight": (D,),
                  f"{layer}.post_attention_layernorm.weight": (D,)}  # fmt: skip
    return table


@pytest.mark.parametrize("preset, D, layers, elements", [
    ("valle-60M", 512, 12, 82_258_441), ("valle-400M", 1024, 24, 487_485_961),
])  # fmt: skip
def test_published_sizes(preset, D, layers, elements):
    table = published_table(D, layers, 4 * D)
    assert sum(map(math.prod, table.values())) == elements
    tensors = {key: torch.zeros(1).expand(shape) for key, shape in table.items()}  # shapes without memory
    layout = next(layout for layout in published.LAYOUTS if layout.arch == "valle")
    c = (model := published.assemble(layout, tensors, {}, "weights", device="meta")).config
    assert c.backbone == models.transformer_config(preset)
    assert (c.text_vocab_size, c.n_codebooks, c.codebook_size, c.languages) == (256, 8, 1000, 6)
    assert (c.mode, c.level_weights, c.mask_ratio, c.text_dropout, c.guidance) == ("nar", "normal", 0.8, 0.02, 2.5)
    assert not (c.segmented_mask or c.stretched_text or c.gray_length or c.whole_frames or c.random_level)
    unused = {key for key in table if key.split(".")[0] in
              ("text_emb", "tasks_emb", "tones_emb", "phn_decoder", "text_decoder")}  # fmt: skip
    used = {key for name in model.state_dict() for key in layout.source(name, c)[0]}
    assert used == set(table) - unused
    ours = sum(p.numel() for p in model.parameters())
    assert ours == elements - sum(math.prod(table[key]) for key in unused)


def test_published_files(sft, golden, tmp_path):
    """A folder with the .sft, and a .pth whose weights stand under `module`."""
    model, weights = published.load(sft), load_file(sft)
    said = {"experimental": {"audio_level_loss_factors": "auto", "masking_ratio": 0.5, "cfg_cond_dropout_p": 0.1},
            "size": {"heads": 4}}  # fmt: skip
    torch.save({"module": weights, "config": said}, tmp_path / "fp32.pth")
    for other in (published.load(sft.parent), published.load(tmp_path / "fp32.pth")):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    c = other.config  # of the .pth; these codebooks are not those of the FSQ codec
    assert (c.level_weights, c.mask_ratio, c.text_dropout) == ("decreasing", 0.5, 0.1)
    said["experimental"]["unified_position_ids"] = True
    torch.save({"module": weights, "config": said}, tmp_path / "fp32.pth")
    with pytest.raises(ValueError, match="unified_position_ids"):
        published.load(tmp_path / "fp32.pth")
    more = {**weights, "audio_emb.x": torch.ones(1)}
    torch.save({"module": more, "config": {"size": {"heads": 4}}}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="audio_emb.x, which the family 'valle' does not have"):
        published.load(tmp_path / "b.pth")


# ---------------------------------------------------------------------------------------------------------------------
# rows


@given(n=st.integers(0, 20), T=st.integers(1, 20), prompt=st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9)),
       bos=st.sampled_from([-1, 1]), eos=st.sampled_from([-1, 2]), mode=st.sampled_from(MODES))
def test_layout(n, T, prompt, bos, eos, mode):
    config = VallEConfig(30, 4, 16, VALLE_STACK, bos, eos, mode=mode, languages=3, language=1)
    text, codes = utterance(n, T)
    before = utterance(*prompt, seed=1) if prompt else None
    tokens, segment = config.layout(text, codes, before)
    assert tokens.dtype == segment.dtype == np.int64 and tokens.shape == (len(segment), 5)
    assert len(segment) == config.length(n, T, *(prompt or ()))
    before_too = [np.array([x, 0]) for x in prompt or (0, 0)]  # on arrays; the second utterance has no prompt
    lengths = config.length(np.array([n, 3]), np.array([T, 4]), *before_too)
    assert lengths.tolist() == [len(segment), config.length(3, 4)]

    ends = [config.stop_frame().tolist()] if mode == "ar" else []
    assert tokens[segment == AUDIO][:, :4].tolist() == codes.tolist() + ends
    words = [m for m in (bos,) if m >= 0] + text.tolist() + [m for m in (eos,) if m >= 0]
    assert tokens[segment == TEXT][:, 4].tolist() == words + [30, 33, 30] + [30] * bool(prompt)
    assert not tokens[segment == TEXT][:, :4].any() and not tokens[segment != TEXT][:, 4].any()
    kinds = [TEXT] * (len(words) + 3) + ([PROMPT] * prompt[1] + [TEXT] if prompt else []) + [AUDIO] * (T + len(ends))
    assert segment.tolist() == kinds
    if before:
        assert tokens[segment == PROMPT][:, :4].tolist() == before[1].tolist()
    asked, kinds = config.layout(text, None, before)  # generation starts from what training saw before the frames
    assert np.array_equal(asked, tokens[segment.cumsum() <= kinds.sum()]) and len(asked) == len(segment) - T - len(ends)


def test_layout_leaves_the_text_of_a_prompt_alone():
    config, (text, codes), before = tiny().config, utterance(), utterance(seed=1)
    for other in (None, before[0][:2]):
        again = config.layout(text, codes, (other, before[1]))
        assert all(np.array_equal(a, b) for a, b in zip(config.layout(text, codes, before), again, strict=True))


def test_positions_begin_anew_in_each_part():
    model = tiny(stretched_text=False)
    tokens, segment = batch_of(model, (*utterance(3, 4), utterance(1, 2, seed=1)), utterance(2, 2), width=20)
    assert model.positions(tokens, segment).tolist() == [
        [0, 1, 2, 3, 4, 5, 0, 1, 0, 1, 2, 0, 1, 2, 3, 4, 4, 4, 4, 4],
        [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2],
    ]


def test_stretched_text_runs_as_far_as_the_frames():
    tokens, segment = batch_of(tiny(stretched_text=True), utterance(3, 13), utterance(3, 6), width=24)
    positions = tiny(stretched_text=True).positions(tokens, segment)
    assert positions[0, :6].tolist() == [0, 2, 4, 6, 8, 10] and positions[1, :6].tolist() == [0, 1, 2, 3, 4, 5]
    plain = tiny(stretched_text=False).positions(tokens, segment)
    assert torch.equal(positions[:, 6:], plain[:, 6:])
    prefix = tokens[:, :8], segment[:, :8]  # without frames nothing says how far
    assert torch.equal(tiny(stretched_text=True).positions(*prefix), plain[:, :8])
    assert torch.equal(tiny(mode="ar").positions(tokens, segment), plain)  # frame by frame nobody knows the end


@pytest.mark.parametrize("options, moved", [
    (dict(mode="ar"), [[1, 1, 1], [0, 1, 1], [0, 0, 1]]),
    ({}, [[1, 1, 1], [1, 1, 1], [1, 1, 1]]),
    (dict(segmented_mask=True), [[1, 1, 1], [0, 1, 1], [0, 0, 1]]),
], ids=["ar", "nar", "segmented"])  # fmt: skip
@torch.no_grad()
def test_which_parts_see_which(options, moved):
    """moved[i][j]: does another first row of part i (text, prompt, frames) move the states of the rest of part j?"""
    model = tiny(stretched_text=False, **options).eval()
    tokens, segment = batch_of(model, (*utterance(5, 9), utterance(2, 3, seed=4)), width=30)
    part, before = segment[0].cummax(0).values.where(segment[0] != PAD, PAD), model.states(tokens, segment)
    for i, kind in enumerate((TEXT, PROMPT, AUDIO)):
        first = int((part == kind).long().argmax())
        other = tokens.clone()
        other[0, first] = (other[0, first] + 1) % 16
        change = (model.states(other, segment) - before)[0].abs().amax(-1)
        change[first] = 0
        assert [bool((change[part == k] > 1e-6).any()) for k in (TEXT, PROMPT, AUDIO)] == list(map(bool, moved[i]))
        other = tokens.clone()
        last = int((part == kind).nonzero()[-1])
        other[0, last] = (other[0, last] + 1) % 16
        earlier = (model.states(other, segment) - before)[0, first:last].abs().max() > 1e-6
        assert earlier == (not model.causal)  # within a part


@torch.no_grad()
def test_what_stands_in_padding_is_not_seen():
    model = tiny().eval()
    tokens, segment = batch_of(model, utterance(5, 9), width=30)
    other = tokens.masked_fill((segment == PAD)[..., None], 3)
    assert torch.equal(model.states(tokens, segment)[segment != PAD], model.states(other, segment)[segment != PAD])


def test_the_encoded_table_is_every_frame_encoded():
    """Many frames are looked up in a table that was encoded once, few are encoded themselves."""
    torch.manual_seed(0)
    encoder = AudioEncoder(4, 16, 8).double()
    for p in encoder.parameters():
        p.data.normal_(std=0.5)
    frames, results = torch.randint(0, 16, (40, 4)), []
    for pieces in ([frames], frames.split(3)):
        encoder.zero_grad()
        x = torch.cat([encoder(piece) for piece in pieces])
        x.square().sum().backward()
        results.append((x, *gradients(encoder).values()))
    assert len(results[0]) == 1 + 9
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_level_attention_by_hand():
    """Codes and places, what attention adds to them, their mean over the codebooks, a matrix."""
    torch.manual_seed(0)
    encoder, frames = AudioEncoder(4, 16, 8, heads=8), torch.randint(0, 16, (5, 4))
    for p in encoder.parameters():
        p.data.normal_(std=0.5)
    x = encoder.codes[frames, torch.arange(4)] + encoder.places
    own = encoder.attention.attention
    q, k, v = F.linear(x, own.in_proj_weight, own.in_proj_bias).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (8, 1)).transpose(1, 2) for y in (q, k, v))  # (N, heads, K, 1)
    each = own.out_proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
    close(encoder(frames), encoder.out((x + each).mean(1)), 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# loss


@pytest.mark.parametrize("options", [
    dict(mode="ar", frame_dropout=0.5), dict(mask_ratio=0.7), dict(mask_ratio=0.0, level_weights="normal"),
    dict(shared_heads=True, level_weights="equal"), dict(random_level=True), dict(mode="ar", random_level=True),
])  # fmt: skip
def test_loss_by_hand(options, monkeypatch):
    """Each utterance's mean over all its frames, of the cross-entropy of those that are predicted."""
    model = tiny(length_loss_weight=0.0, **options).double().train()
    batch = [(*utterance(5, 9), utterance(2, 3, seed=4)), utterance(3, 5, seed=1), utterance(8, 12, seed=2)]
    tokens, segment = batch_of(model, *batch)
    masked = model.masked(segment == AUDIO)
    level = torch.tensor([2, 0, 2])
    monkeypatch.setattr(model, "masked", lambda spoken: masked)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: level)
    loss, stats = model(tokens, segment)

    hidden = model.states(tokens.masked_fill(masked[..., None], 17), segment)
    factors = {"decreasing": [1, 1 / 2, 1 / 3, 1 / 4], "equal": [1] * 4, "normal": [0.5, 0.75, 0.75, 0.5]}
    factor = torch.tensor(factors[model.config.level_weights]).double()
    total, weights, sums, counts = 0.0, 0.0, torch.zeros(4).double(), torch.zeros(4)
    for i in range(3):
        for s in (segment[i] == AUDIO).nonzero()[:, 0].tolist():
            if model.causal or masked[i, s]:
                logits = model.logits(hidden[i, [s - 1 if model.causal else s]])[0]
                each = F.cross_entropy(logits, tokens[i, s, :4], reduction="none")
                kept = torch.arange(4) == level[i] if model.config.random_level else torch.ones(4)
                total = total + (factor * each * kept).sum() / (segment[i] == AUDIO).sum()
                kept = kept * (tokens[i, s, 0] != 16)  # the stop is in the loss, not in the stats
                sums, counts = sums + each * kept, counts + kept
        weights += factor[level[i]] if model.config.random_level else factor.sum()
    torch.testing.assert_close(loss, total / weights)
    torch.testing.assert_close(stats["loss_by_codebook"][0], sums.detach())
    assert torch.equal(stats["loss_by_codebook"][1], counts) and torch.equal(stats["accuracy_by_codebook"][1], counts)
    n = int((segment == AUDIO).sum() if model.causal else masked.sum())
    assert stats["weighted_loss"][1] == n and torch.equal(stats["c0_accuracy"][1], counts[0])


def test_both_modes_are_those_of_a_model_that_has_one():
    """In evaluation and, as drawn, in training; the stop frame is a row of mode ar alone."""
    both = tiny(mode="ar+nar", text_dropout=0.3, frame_dropout=0.3)
    batch = [(*utterance(5, 9), utterance(2, 3, seed=4)), utterance(3, 5, seed=1), utterance(8, 12, seed=2)]
    single = {}
    for mode in MODES:
        model = tiny(mode=mode, **{"ar": dict(frame_dropout=0.3), "nar": dict(text_dropout=0.3)}[mode])
        weights.load_weights(model, {name: x for name, x in both.state_dict().items() if name in model.state_dict()})
        single[mode] = model, batch_of(model, *batch, width=30)  # masks are drawn for as many rows
    rows = batch_of(both, *batch, width=30)
    _, stats = both.eval()(*rows)
    for mode, (model, own) in single.items():
        _, expected = model.eval()(*own)
        for name, own in (("loss", "loss_by_codebook"), ("c0_accuracy", "c0_accuracy")):
            found = [float(x.sum()) for x in expected[own]]
            assert [float(x) for x in stats[f"{mode}_{name}"]] == pytest.approx(found)
    assert float(stats["length_loss"][0]) == pytest.approx(float(expected["length_loss"][0]))

    drawn = []
    for seed in range(12):
        torch.manual_seed(seed)
        both.train().zero_grad()
        loss, stats = both(*rows)
        loss.backward()
        mode = "ar" if stats["nar_loss"][1] == 0 else "nar"
        drawn.append(mode)
        model, own = single[mode]
        torch.manual_seed(seed)
        torch.rand(())  # the draw of the mode
        model.train().zero_grad()
        expected, _ = model(*own)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for name, p in model.named_parameters():
            torch.testing.assert_close(both.get_parameter(name).grad, p.grad)
        assert all(p.grad is not None for p in both.parameters())  # all ranks have the same gradients
        assert both.length_heads.grad.any() == (mode == "nar")
    assert set(drawn) == set(MODES) and both.now is None


def test_initial_loss_is_near_ln_v():
    torch.manual_seed(0)
    for mode in MODES:
        model = VallE(VallEConfig(30, 4, 16, VALLE_STACK, mode=mode))
        _, stats = model(*batch_of(model, *(utterance(seed=s) for s in range(20))))
        for name, classes in (("loss_by_codebook", 17), ("length_loss", 10)):
            total, count = stats.get(name, (torch.tensor([math.log(classes)]), 1))
            assert (total / count - math.log(classes)).abs().max() < 0.02


def test_masks_are_drawn_in_training_and_fixed_in_evaluation():
    spoken = torch.ones(2000, 50, dtype=torch.bool)
    spoken[:, :10] = False
    for ratio, low, high in ((0.8, 0.79, 0.81), (0.0, 2 / math.pi - 0.02, 2 / math.pi + 0.02), (1.0, 1, 1)):
        model = tiny(mask_ratio=ratio)
        a = model.masked(spoken)
        assert low <= a[spoken].float().mean() <= high and not a[~spoken].any()
        share = a[:, 10:].float().mean(1)
        assert (share.std() > 0.25) == (ratio == 0)  # for each utterance another
        assert torch.equal(a, model.masked(spoken)) == (ratio == 1)
        model.eval()
        assert torch.equal(model.masked(spoken), model.masked(spoken))
    model = tiny(mode="ar", frame_dropout=0.3)
    assert 0.28 < model.masked(spoken)[spoken].float().mean() < 0.32
    assert not model.eval().masked(spoken).any()


@torch.no_grad()
def test_masked_frames_are_not_seen():
    for mode in MODES:
        model = tiny(mode=mode, length_loss_weight=0.0)
        (text, codes), other = utterance(), utterance(seed=5)[1]
        batch, changed = batch_of(model, (text, codes)), batch_of(model, (text, other))
        masked = (batch[1] == AUDIO) & (torch.arange(batch[1].shape[1]) % 3 > 0)
        keep = masked[0][batch[1][0] == AUDIO][: len(codes)]
        states = []
        for tokens, segment in (batch, changed):
            tokens[0, -len(codes) - (mode == "ar") :, :4][: len(codes)][~keep] = 5
            states.append(model.states(tokens.masked_fill(masked[..., None], 17), segment))
        assert torch.equal(*states)
        assert not torch.equal(model.states(*batch), model.states(*changed))


def test_evaluation_scores_all_codebooks_of_whole_utterances():
    for mode in MODES:
        model = tiny(mode=mode, random_level=True, text_dropout=0.9, frame_dropout=0.9, mask_ratio=1.0).eval()
        counts = model(*batch_of(model, utterance(), utterance(T=9)))[1]["loss_by_codebook"][1]
        assert counts.tolist() == [15] * 4


def test_stops_that_are_missed():
    model = tiny(mode="ar").eval()
    batch = batch_of(model, *(utterance(n, T, seed=n) for n, T in ((5, 9), (3, 4), (8, 2))))
    for bias, missed in ((-99, 3), (99, 0)):  # one codebook that says stop is enough
        model.head_bias.data[:, 16] = -99
        model.head_bias.data[2, 16] = bias
        total, count = model(*batch)[1]["stop_missed"]
        assert (total, count) == (missed, 3)
    assert "stop_missed" not in model.train()(*batch)[1] and "stop_missed" not in tiny().eval()(*batch)[1]


def test_prompts_are_heard_but_not_predicted():
    for mode in MODES:
        model, text, codes = tiny(mode=mode, mask_ratio=1.0), *utterance()
        prompt = utterance(3, 4, seed=1)
        loss, stats = model(*batch_of(model, (text, codes, prompt)))
        assert stats["weighted_loss"][1] == len(codes) + (mode == "ar")
        other = (prompt[0], (prompt[1] + 1) % 16)
        assert abs(model(*batch_of(model, (text, codes, other)))[0] - loss) > 1e-4


def test_every_parameter_gets_a_gradient():
    """Prompts or not, so that DistributedDataParallel finds all of them in use in every step."""
    for mode, extra in itertools.product(MODES, ({}, dict(random_level=True), dict(shared_heads=True), dict(
            level_attention=True, backbone=dict(n_head=8, n_kv_head=8)))):  # fmt: skip
        model = tiny(mode=mode, **extra).train()
        for prompt in (None, utterance(3, 4, seed=1)):
            model.zero_grad()
            model(*batch_of(model, (*utterance(), prompt), utterance(seed=2)))[0].backward()
            missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
            assert not missing
            silent = [name for name, p in model.named_parameters() if not p.grad.any()]
            assert not silent or not prompt or model.config.random_level


def test_nothing_is_masked():
    model = tiny().train()
    model.masked = torch.zeros_like
    loss, stats = model(*batch_of(model, utterance()))
    loss.backward()
    assert stats["weighted_loss"][1] == 0 and loss == model.config.length_loss_weight * stats["length_loss"][0]


def test_recompute_and_autocast():
    results = []
    for recompute in (False, True):
        model = tiny(backbone=dict(recompute=recompute), mask_ratio=1.0).train()
        loss, _ = model(*batch_of(model, utterance(), utterance(3, 4, seed=2)))
        loss.backward()
        results.append((loss, *gradients(model).values()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        close(model(*batch_of(model, utterance(), utterance(3, 4, seed=2)))[0].detach(), loss.detach(), 0.2)


def test_text_dropout_is_the_layout_without_text():
    model = tiny(mask_ratio=1.0, length_loss_weight=0.0, text_dropout=0.999999).train()
    (text, codes), prompt = utterance(), utterance(3, 4, seed=1)
    for stretched in (True, False):
        model.config.stretched_text = stretched
        dropped, _ = model(*batch_of(model, (text, codes, prompt)))
        bare, _ = model.eval()(*batch_of(model, (text[:0], codes)))
        whole, _ = model(*batch_of(model, (text, codes, prompt)))
        torch.testing.assert_close(dropped, bare)
        assert abs(whole - bare) > 1e-3
        model.train()
    model.config.text_dropout, losses = 0.5, set()
    for _ in range(9):
        losses.add(round(model(*batch_of(model, (text, codes, prompt)))[0].item(), 4))
    assert losses == {round(bare.item(), 4), round(whole.item(), 4)}


# ---------------------------------------------------------------------------------------------------------------------
# lengths


@given(st.integers(0, 99_999))
def test_lengths_in_digits(length):
    n = torch.tensor([length, 0, 99_999])
    for gray in (False, True):
        digits = length_digits(n, gray)
        assert digits.shape == (3, 5) and digits.min() >= 0 and digits.max() <= 9
        assert torch.equal(read_length(digits, gray), n)
    assert length_digits(n, False)[0].tolist() == [int(c) for c in f"{length:05d}"]


def test_neighbours_in_gray_code_differ_in_one_digit():
    digits = length_digits(torch.arange(10_001), True)
    assert torch.equal((digits[1:] - digits[:-1]).abs().sum(1), torch.ones(10_000, dtype=torch.long))


def test_the_length_is_asked_without_seeing_the_frames():
    model = tiny().eval()
    prompt = utterance(3, 4, seed=1)
    states = [model.length_state(*batch_of(model, (utterance()[0], utterance(T=T)[1], prompt), width=w))
              for T, w in ((3, 0), (9, 0), (9, 50))]  # fmt: skip
    torch.testing.assert_close(states[0], states[1])
    torch.testing.assert_close(states[0], states[2])
    both = model.length_state(*batch_of(model, utterance(9, 3), (utterance()[0], utterance(T=9)[1], prompt)))
    torch.testing.assert_close(both[1:], states[0])
    assert (model.length_state(*batch_of(model, utterance())) - states[0]).abs().max() > 1e-3


def test_length_loss_by_hand():
    batch = [utterance(5, 9), utterance(3, 120, seed=1), utterance(8, 2, seed=2)]
    for gray in (True, False):
        model = tiny(gray_length=gray, mask_ratio=1.0).eval()
        tokens, segment = batch_of(model, *batch)
        loss, stats = model(tokens, segment)
        state = model.length_state(tokens, segment)
        logits = torch.einsum("bd,kvd->bkv", state, model.length_heads) + model.length_bias
        target = length_digits(torch.tensor([9, 120, 2]), gray)
        expected = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        torch.testing.assert_close(stats["length_loss"][0] / 3, expected.detach())
        error = sum(abs(int(x) - n) for x, n in zip(model.guess_length(state), (9, 120, 2), strict=True))
        assert stats["length_error"] == (error, 3)
        model.config.length_loss_weight = 0.0
        torch.testing.assert_close(loss, model(tokens, segment)[0] + 0.1 * expected)


def test_in_training_every_fourth_is_asked_for_its_length():
    """Not the first ones: a batch may be sorted by length."""
    model = tiny(mask_ratio=1.0)
    tokens, segment = batch_of(model, *(utterance(4, 3 + s, seed=s) for s in range(9)))
    asked = model.train()(tokens, segment)[1]["length_loss"]
    some = model.eval()(tokens[[0, 4, 8]], segment[[0, 4, 8]])[1]["length_loss"]
    assert asked[1] == some[1] == 3
    torch.testing.assert_close(asked[0], some[0])


# ---------------------------------------------------------------------------------------------------------------------
# generation


def test_generation_ends_where_any_codebook_says_stop():
    model, (text, codes) = tiny(mode="ar"), utterance(T=3)
    for k in range(4):
        last = codes[0].copy()
        last[k] = 16
        frames, stopped = spoken_by(model, text, max_frames=10, choose=choices(*codes.ravel(), *last))
        assert frames == codes.tolist() and stopped is True


def test_caps_and_positions():
    text, codes = utterance(n=5)
    for mode in MODES:
        model = tiny(mode=mode)
        given = {} if mode == "ar" else {"frames": 40, "rounds": 1}
        assert spoken_by(model, text, max_frames=4, choose=always(3), **given) == ([[3] * 4] * 4, False)
        tight = tiny(mode=mode, backbone=dict(max_positions=20))
        assert spoken_by(tight, text, max_frames=50, choose=always(3), **given) == ([[3] * 4] * 10, False)
        with pytest.raises(ValueError, match="text and prompt take 27 rows, the model has 20 positions"):
            next(tight.generate(text, utterance(2, 16)))
    assert spoken_by(model, text, max_frames=40, choose=always(3), **given)[1] is True


def test_demasking_masks_fewer_frames_in_every_round():
    (text, _), T = utterance(), 12
    for whole in (True, False):
        model, counts = tiny(whole_frames=whole), []
        frame_logits = model.frame_logits

        def watched(tokens, segment):
            codes = tokens[0, -T:, :-1]
            counts.append((codes == 17).sum(0).tolist())  # noqa: B023
            masked = (codes == 17).float().mean(1)
            assert not whole or ((masked == 0) | (masked == 1)).all()  # noqa: B023
            return frame_logits(tokens, segment)  # noqa: B023

        model.frame_logits = watched
        frames, stopped = spoken_by(model, text, draw=GREEDY, frames=T, rounds=5)
        assert stopped and len(frames) == T
        assert counts == [[n] * 4 for n in (12, 11, 8, 4, 1)]


def test_more_rounds_than_frames():
    model, counts = tiny(), []

    def count(tokens, segment):
        counts.append(int((tokens[0, -3:, 0] == 17).sum()))
        return torch.rand(3, 4, 17)

    model.frame_logits = count
    frames, stopped = spoken_by(model, utterance()[0], draw=GREEDY, frames=3, rounds=6)
    assert stopped and len(frames) == 3 and counts == [3, 2, 1, 1, 1, 1]


def test_what_is_certain_stays():
    """A frame whose codes have the highest scores is never masked again, and no code changes that was not masked."""
    model, (text, _) = tiny(), utterance()
    kept, frame_logits = [], model.frame_logits

    def watched(tokens, segment):
        kept.append(tokens[0, -8:, :-1].clone())
        logits = frame_logits(tokens, segment)
        logits[3, :, 7] = 99
        return logits

    model.frame_logits = watched
    spoken_by(model, text, draw=GREEDY, frames=8, rounds=6)
    assert (kept[0] == 17).all() and all(codes[3].tolist() == [7] * 4 for codes in kept[1:])
    for before, after in itertools.pairwise(kept[1:]):
        changed = before != after
        assert ((before == 17) | (after == 17))[changed].all()


def test_draws_become_less_daring():
    model, (text, _), scales = tiny(whole_frames=False), utterance(), []
    model.frame_logits = lambda tokens, segment: torch.ones(4, 4, 17).index_fill_(-1, torch.tensor(5), 2.0)

    def choose(logits, key):
        scales.append(float(logits.max()) / 2)
        return torch.full(logits.shape[:-1], 7) if len(scales) < 5 else models.sample_code(logits, key)

    frames, _ = spoken_by(model, text, choose=choose, frames=4, rounds=5)
    assert np.allclose(scales[:-1], [1, 4 / 3, 2, 4]) and scales[-1] > 1e5  # the last round takes the likeliest
    assert sum(frame.count(5) for frame in frames) == 4 and sum(frame.count(7) for frame in frames) == 12


@pytest.mark.parametrize("mode", ["nar", "ar"])
def test_top_sigma_bars_what_is_unlikely(mode):
    """In both modes; the likeliest codes stay, and the contract check does not mind."""
    text, codes = utterance()
    length = dict(frames=9, rounds=1) if mode == "nar" else dict(max_frames=9)
    plain = spoken_by(tiny(mode=mode), text, draw=GREEDY, **length)
    model = tiny(mode=mode, top_sigma=0.5)
    assert plain == spoken_by(model, text, draw=GREEDY, **length)
    asked = []
    spoken_by(model, text, choose=lambda logits, key: asked.append(logits) or logits.argmax(-1), **length)
    logits = model.teacher_forced_logits(text, np.zeros((9, 4), int))[: 9 if mode == "nar" else 1]
    least = logits.amax(-1, keepdim=True) - 0.5 * logits.std(-1, keepdim=True)
    assert torch.equal(asked[0] == -math.inf, (logits < least).view(asked[0].shape))
    assert models.contract_check(model, text, codes)["max_difference"] < 1e-4


def test_the_penalty_of_mode_ar_counts_each_codebook():
    model, (text, _) = tiny(mode="ar"), utterance()
    earlier = []

    def choose(logits, key, age, repetition_penalty):
        earlier.append(age[0])
        return torch.tensor([[len(earlier), 2, 3, 4]])

    frames, _ = spoken_by(model, text, draw=dict(repetition_penalty=2.0), choose=choose, max_frames=3)
    assert frames == [[n, 2, 3, 4] for n in (1, 2, 3)]
    for n, age in enumerate(earlier):
        expected = torch.zeros(4, 17, dtype=torch.long)
        expected[0, 1 : n + 1] = torch.arange(n, 0, -1)
        expected[[1, 2, 3], [2, 3, 4]] = int(n > 0)
        assert torch.equal(age, expected)
    assert {"repetition_penalty", "repetition_decay"} <= model.draw.keys()
    assert "repetition_penalty" not in tiny().draw  # all frames at once: nothing was seen before


@torch.no_grad()
def test_guidance():
    model, (text, codes), prompt = tiny(), utterance(), utterance(seed=1)
    one, free = model.frame_logits(*model.rows(text, codes, prompt)), model.frame_logits(*model.rows(text[:0], codes))
    model.config.guidance = 3.0
    pushed = free + 3 * (one - free)
    expected = pushed * (0.75 * one.std(0) / pushed.std(0) + 0.25)
    torch.testing.assert_close(model.frame_logits(*model.rows(text, codes, prompt)), expected)
    for few in (codes[:1], codes[[0, 0]]):  # no spread
        assert model.frame_logits(*model.rows(text, few, prompt)).isfinite().all()
    frames = torch.tensor([[0.0, 1.0], [1.0, 2.0]])[:, None]  # guided logits of class 0 agree by chance
    guided = torch.tensor([[1.0, 1.0], [1.0 + 1e-6, 5.0]])[:, None]
    spread = torch.tensor([0.75 * 4 + 0.25, 0.75 / 4 + 0.25])
    torch.testing.assert_close(model.respread(guided, frames), guided * spread)


def test_prompts_change_what_is_said():
    text, _ = utterance()
    for mode in MODES:
        model, given = tiny(mode=mode), {} if mode == "ar" else {"frames": 5}
        said = [spoken_by(model, text, prompt, 5, GREEDY, **given)[0]
                for prompt in (None, utterance(3, 4, seed=1), utterance(3, 4, seed=2))]  # fmt: skip
        assert said[0] != said[1] != said[2]


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints, training, speaking


@pytest.mark.parametrize("change, message", [
    (dict(mode="both"), r"mode = 'both' must be nar, ar or ar\+nar"),
    (dict(nar_share=1.0), "nar_share = 1.0 must be > 0 and < 1"),
    (dict(level_weights="auto"), "level_weights = 'auto' must be decreasing, normal or equal"),
    (dict(rounds=0), "rounds = 0 must be >= 1"),
    (dict(guidance=math.inf), "guidance = inf must be finite"),
    (dict(language=1), "language = 1 must be below languages = 1"),
    (dict(level_attention=True, shared_heads=True), "level_attention"),
])  # fmt: skip
def test_configs_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        tiny(**change)


RUN = [
    "--arch=valle", "--backbone={'n_layer': 2, 'n_head': 2, 'n_kv_head': 2, 'd_model': 32, 'd_ff': 48}",
    "--max_tokens=400", "--warmup_iters=2", "--log_interval=1", "--eval_interval=4", "--eval_samples=0", "--device=cpu",
    "--lr_schedule=constant", "--learning_rate=0.01",
]  # fmt: skip


def run(data_dir, out_dir, *flags):
    """Train in this process, give back last.pt and the lines of metrics.jsonl."""
    flags = [*RUN, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *flags]
    train.main(configurator.configure(train.__file__, flags))
    return weights.load_checkpoint(f"{out_dir}/last.pt"), read_metrics(f"{out_dir}/metrics.jsonl")


def test_languages_have_the_ids_of_the_author():
    ids = {"en": 0, "ja": 1, "de": 2, "fr": 3, "zh": 4, "ko": 5}
    config = VallEConfig(30, 4, 16, VALLE_STACK, languages=6)
    assert dict(zip(ids, config.language_ids(ids), strict=True)) == ids
    assert config.language_ids(["zh-cn", "en-us", "es", ""]) == [4, 0, 0, 0]  # as his encode_lang, but for the regions


def test_one_model_speaks_two_languages(tmp_path):
    """In the second one each word sounds as the next word of the first one does."""
    tokens = write_tokens(tmp_path / "t", n_train=120, languages=("de", "en-gb"))
    flags = ["--mode=ar", "--max_iters=120", "--eval_interval=60", "--frame_dropout=0.5", "--muon=True"]
    checkpoint, _ = run(tokens, tmp_path / "out", *flags)
    c = checkpoint["model_config"]
    assert (c["languages"], c["language_names"]) == (2, ["de", "en-gb"])
    voice = Voice.from_checkpoint(f"{tmp_path}/out/last.pt")
    assert voice.model.config.language_ids(["en-gb", "de", "fr", ""]) == [1, 0, 0, 0]
    rows = [voice.model.layout(np.arange(3), language=i)[0][:, -1].tolist() for i in (0, 1)]
    first_id = c["text_vocab_size"] + 2
    assert [(a, b) for a, b in zip(*rows, strict=True) if a != b] == [(first_id, first_id + 1)]
    for language, sound in (("de", 2), ("EN_GB", 3), ("", 2)):  # without one the first speaks
        codes = torch.stack(list(voice.frames("two", language=language, temperature=0, cap_seconds=1)))
        assert codes[:4].tolist() == (3 * sound + np.arange(3) + np.arange(4)[:, None]).tolist()
    with pytest.raises(ValueError, match="unknown language 'fr'; choose from de, en-gb"):
        voice.text_ids("one", language="fr")


EVERYTHING = ["--random_level=True", "--voice_prompt=0.5", "--muon=True", "--dropout=0.1", "--sparse_embeddings=True",
              "--ema=0.9", "--gradient_accumulation_steps=2", "--reference_seconds=[0.4,0.8]"]  # fmt: skip


@pytest.mark.parametrize("flags", [
    ["--mode=ar", "--frame_dropout=0.3", *EVERYTHING],
    ["--mode=nar", "--text_dropout=0.2", "--mask_ratio=0", *EVERYTHING],
    ["--mode=ar+nar", "--text_dropout=0.2", "--frame_dropout=0.3", "--nar_share=0.6", *EVERYTHING],
], ids=(*MODES, "ar+nar"))  # fmt: skip
def test_training_goes_on_bit_for_bit(tokens, tmp_path, flags):
    whole, lines = run(tokens, tmp_path / "whole", "--max_iters=8", *flags)
    run(tokens, tmp_path / "halves", "--max_iters=4", *flags)
    again, lines_again = run(tokens, tmp_path / "halves", "--max_iters=8", "--init_from=resume", *flags)
    same(whole, again)
    assert exact(lines) == exact(lines_again) and len(lines) == 8
    assert lines[-1]["val_loss"] < lines[3]["val_loss"] and len(lines[-1]["val_loss_by_codebook"]) == 3
    with pytest.raises(ValueError, match="mode = "):
        other = "--mode=ar" if flags[0] != "--mode=ar" else "--mode=nar"
        run(tokens, tmp_path / "halves", "--max_iters=9", "--init_from=resume", *flags, other)


@pytest.mark.parametrize("mode, steps", [("ar", 60), ("nar", 160)])
def test_it_learns_and_speaks(tokens, tmp_path, mode, steps):
    """A few utterances are learnt by heart, and then spoken from their text."""
    run(tokens, tmp_path, f"--mode={mode}", f"--max_iters={steps}", f"--eval_interval={steps}", "--muon=True",
        "--learning_rate=0.02", "--shared_heads=True", *(["--rounds=3"] if mode == "nar" else []))  # fmt: skip
    voice, files, right = Voice.from_checkpoint(tmp_path / "last.pt", "cpu"), TokenFiles(tokens, "train"), []
    for i in range(10):
        frames, stopped = spoken_by(voice.model, files.text(i), draw=GREEDY)
        said = files.codes(i).tolist()
        right.append((stopped and len(frames) == len(said), np.mean([a == b for a, b in zip(frames, said)])))  # noqa: B905
    assert (np.mean(right, 0) > 0.65).all()  # by chance 0.33 and 0.06
    wav = voice.say("one", temperature=0.0)
    assert len(wav) == 4 * voice.codec.sample_rate / voice.codec.frame_rate and voice.stopped
    voice.reference_seconds = [0.1, 0.2]
    ((ids, codes),) = voice.prompt([files.codes(3)], "")["prompt"]  # nobody asks what is said in it
    rate = voice.codec.frame_rate
    assert len(ids) == 0 and np.array_equal(codes, files.codes(3)[: round(0.2 * rate)])
    voice.reference_seconds = [1.0, 2.0]  # repeated until it is as long; several are one after the other
    both = np.concatenate([files.codes(3), files.codes(4)])
    ((_, codes),) = voice.prompt([files.codes(3), files.codes(4)], "")["prompt"]
    assert np.array_equal(codes, np.concatenate([both] * 9)[: len(codes)])
    assert len(codes) == min(max(len(both), round(rate)), round(2 * rate))
    assert len(voice.say("one", temperature=0.0, reference=[codes])) > 0
    with pytest.raises(ValueError, match="give both"):
        voice.say("one", reference_text="two")


def test_one_model_learns_both_modes(tokens, tmp_path):
    """In one run, and speaks in either; a loss of each is logged."""
    flags = ["--mode=ar+nar", "--max_iters=240", "--eval_interval=240", "--muon=True", "--learning_rate=0.02",
             "--lr_schedule=cosine", "--shared_heads=True", "--rounds=3"]  # fmt: skip
    _, lines = run(tokens, tmp_path, *flags)
    drawn = [next(mode for mode in MODES if line[f"{mode}_loss"] is not None) for line in lines]
    assert drawn.count("ar") + drawn.count("nar") == 240 and 90 < drawn.count("nar") < 150
    for line, mode in zip(lines, drawn, strict=True):
        assert line["loss"] == pytest.approx(line[f"{mode}_loss"]) and (line["length_loss"] is None) == (mode == "ar")
        assert sum(line[f"{mode}_loss"] is None for mode in MODES) == 1
    for name in ("ar_loss", "nar_loss", "ar_c0_accuracy", "nar_c0_accuracy", "length_loss", "stop_missed"):
        assert lines[-1][f"val_{name}"] is not None
    files = TokenFiles(tokens, "train")
    for mode in MODES:
        voice, right = Voice.from_checkpoint(tmp_path / "last.pt", "cpu", speaks=mode), []
        assert voice.model.causal == (mode == "ar")
        for i in range(10):
            frames, stopped = spoken_by(voice.model, files.text(i), draw=GREEDY)
            said = files.codes(i).tolist()
            matches = np.mean([a == b for a, b in zip(frames, said)])  # noqa: B905
            right.append((stopped and len(frames) == len(said), matches))
        assert (np.mean(right, 0) > 0.5).all(), (mode, np.mean(right, 0))  # by chance 0.33 and 0.06
    voice.prompted = True
    voice.model.config.speaks = "nar"  # all frames at once: a stream is made of short pieces, each after the one before
    text, prompts, seat = "one two. three four. five six.", [], voice.model.seat
    voice.model.seat = lambda *args, **how: prompts.append(how.get("prompt")) or seat(*args, **how)
    pieces = voice.pieces(text, 0.01 + 2 * voice.frames_per_id * 7 / voice.codec.frame_rate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("voice.LONGEST_AT_ONCE", 0.01 + 2 * voice.frames_per_id * 7 / voice.codec.frame_rate)
        blocks = list(voice.stream(text))
    assert len(prompts) == len(pieces) > 1 and len(blocks) >= len(pieces) and prompts[0] is None
    assert all(prompt[-1][1].shape[1] == voice.codec.n_codebooks for prompt in prompts[1:])


@pytest.mark.slow
def test_two_ranks_draw_the_modes_that_one_process_draws(tokens, tmp_path):
    flags = [*RUN, f"--data_dir={tokens}", "--mode=ar+nar", "--max_iters=6", "--gradient_accumulation_steps=2",
             "--log_interval=1", "--eval_interval=6"]  # fmt: skip
    run(tokens, tmp_path / "one", *flags)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    command(ROOT, *launcher, *flags, f"--out_dir={tmp_path / 'two'}")
    one, two = (exact(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_allclose(np.float64(a[key]), np.float64(b[key]), rtol=1e-3, atol=1e-5, err_msg=key)


def test_sample_picks_the_mode(tokens, tmp_path, capsys):
    run(tokens, tmp_path, "--mode=ar+nar", "--max_iters=4", "--speaks=ar")
    flags = [f"--ckpt={tmp_path}/last.pt", "--text=one two", "--device=cpu", "--cap_seconds=2"]
    spoken = {}
    for more in ([], ["--speaks=ar"], ["--speaks=nar", "--rounds=2"]):
        out = tmp_path / ("_".join(more) or "usual")
        sample.main(configurator.configure(sample.__file__, [*flags, f"--out_dir={out}", *more]))
        spoken[len(spoken)] = (out / "000.wav").read_bytes()
    assert spoken[0] == spoken[1] != spoken[2]
    with pytest.raises(ValueError, match="rounds = 2 has no effect: mode = 'ar' does not use it"):
        sample.main(configurator.configure(sample.__file__, [*flags, f"--out_dir={tmp_path}/x", "--rounds=2"]))


def test_length_and_batches_agree(tokens):
    files = TokenFiles(tokens, "train")
    for mode in (*MODES, "ar+nar"):
        model = models.build("valle", files.meta, {"mode": mode, "backbone": VALLE_STACK, "guidance": None})
        assert model.config.guidance == 1.0
        for fitted in (None, (3, 20)):
            batches = Batches(files, model.layout, model.length, 200, 8, voice_prompt=0.7, max_rows=model.max_rows,
                              prompt_frames=fitted)  # fmt: skip
            lengths = set()
            for tokens_, segment in itertools.islice(batches, 6):
                assert segment.numel() <= 200 and (segment == AUDIO).any(1).all() and len(tokens_) == len(segment)
                lengths |= set((segment == PROMPT).sum(1).tolist())
            assert fitted is None or lengths <= {0, *range(3, 21)} and len(lengths) > 5


def test_prompts_are_cut_or_repeated_in_training(tokens):
    files = TokenFiles(tokens, "train")
    model = models.build("valle", files.meta, {"backbone": VALLE_STACK})
    options = dict(voice_prompt=1.0, max_rows=model.max_rows, seed=3)
    batches = Batches(files, model.layout, model.length, 400, 8, prompt_frames=(2, 30), **options)
    plan, prompts = batches.plan(1)
    heard = []
    for batch in plan:
        tokens_, segment = batches.read(batch, prompts[batch], 1)
        for row, kinds, p in zip(tokens_, segment, prompts[batch], strict=True):
            prompt = row[kinds == PROMPT, :-1].numpy()
            if p < 0:  # nobody prompts itself
                assert not len(prompt)
                continue
            heard.append((len(files.codes(p)), len(prompt)))
            assert np.array_equal(prompt, np.concatenate([files.codes(p)] * 30)[: len(prompt)])
    assert any(was > now for was, now in heard) and any(was < now for was, now in heard)
    assert {now for _, now in heard} <= set(range(2, 31)) and len({now for _, now in heard}) > 8
    again = batches.read(plan[0], prompts[plan[0]], 1)
    assert all(map(torch.equal, again, batches.read(plan[0], prompts[plan[0]], 1)))
    assert not torch.equal(again[0], batches.read(plan[0], prompts[plan[0]], 2)[0][..., : again[0].shape[1], :])


def test_a_reference_of_another_length(tokens, tmp_path, capsys):
    """The script takes the length as a key; other families refuse it."""
    run(tokens, tmp_path, "--arch=valle", "--max_iters=1", "--voice_prompt=1.0", "--reference_seconds=[0.5,1.0]")
    voice = Voice.from_checkpoint(tmp_path / "last.pt", "cpu")
    assert voice.reference_seconds == [0.5, 1.0]
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(1200), 4000)
    seen, layout = [], models.VallEConfig.layout
    flags = ["--ckpt", f"{tmp_path}/last.pt", "--text=one", "--device=cpu", f"--out_dir={tmp_path}"]
    flags += [f"--reference={tmp_path}/a.wav", "--cap_seconds=0.5"]

    def watched(self, text, codes=None, prompt=None, **more):
        seen.append(len(prompt[0][1]))
        return layout(self, text, codes, prompt, **more)

    for keys, seconds in (([], 0.5), (["--reference_seconds=[2,3]"], 2.0)):
        with pytest.MonkeyPatch.context() as patch:
            report = dict(max_difference=0.0, loss_at_shift=[], ln_v=0.0)
            patch.setattr("voice.contract_check", lambda *a, **k: report)  # noqa: B023
            patch.setattr(models.VallEConfig, "layout", watched)
            sample.main(configurator.configure(sample.__file__, flags + keys))
        assert set(seen) == {round(seconds * voice.codec.frame_rate)}
        seen.clear()
    with pytest.raises(ValueError, match=r"reference_seconds = \[2\]: give the shortest and the longest"):
        sample.main(configurator.configure(sample.__file__, [*flags, "--reference_seconds=[2]"]))


def test_rounds_and_guidance_are_refused_elsewhere():
    checkpoint = {"arch": "csm", "model_config": {}, "model": {}, "ema": None}
    with pytest.raises(ValueError, match="rounds = 3: the family 'csm' has no such setting"):
        weights.load_model(checkpoint, rounds=3, guidance=None)


@pytest.mark.parametrize("name", ["digits_valle_ar", "digits_valle_nar", "valle_small", "valle_large"])
def test_recipes(name):
    cfg = configurator.configure(train.__file__, [str(ROOT / "config" / f"{name}.py")])
    meta = {"codec": {"n_codebooks": 8, "codebook_size": 1000},
            "tokenizer": {"vocab_size": 256, "bos_id": 1, "eos_id": 2}}  # fmt: skip
    with torch.device("meta"):
        model = models.build(cfg.arch, meta, vars(cfg))
    train.check(cfg, 1, torch.device("cuda"))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    low, high = {"valle_small": (65, 85), "valle_large": (430, 490)}.get(name, (0.9, 6))
    assert low < millions < high

import json
import math
import re
import shutil
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tokenizers
import torch
import torch.nn.functional as F
from helpers import GPT2_STACK, GREEDY, WORDS, choices, exact, same, write_tokens
from helpers import tiny_xtts as tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import layouts as published
import model as models
import prepare
import sample
import train
import weights
from codec import load_codec
from data import Batches, TokenFiles
from model import AUDIO, PROMPT, TEXT, XTTS, XTTSConfig, contract_check
from parts import configurator, lora
from parts.audio import read_audio
from parts.metrics import read_metrics
from voice import Voice
from weights import from_pretrained, load_checkpoint, load_model, save_checkpoint

EARS = dict(n_latents=5, conditioning_layers=2, perceiver_layers=2, perceiver_heads=2)


def utterance(n=5, T=6, R=9, seed=0):
    """Text ids (n,), codes (T, 1), features (R, 6) of a recording."""
    rng = np.random.default_rng(seed)
    heard = torch.from_numpy(rng.standard_normal((R, 6))).float()
    return rng.integers(3, 30, n), rng.integers(0, 16, (T, 1)), heard


def batch_of(model, *utterances, width=0):
    """Laid out and padded on the right, as data.py does: tokens (B, S, 1), segment (B, S), reference (B, R, M)."""
    rows = [model.layout(text, codes) for text, codes, _ in utterances]
    S = max(width, *(len(s) for _, s in rows))
    tokens = np.stack([np.pad(t, ((0, S - len(t)), (0, 0))) for t, _ in rows])
    segment = np.stack([np.pad(s, (0, S - len(s))) for _, s in rows])
    return torch.from_numpy(tokens), torch.from_numpy(segment), torch.stack([heard for *_, heard in utterances])


def means(stats):
    return {name: value / count for name, (value, count) in stats.items()}


# ---------------------------------------------------------------------------------------------------------------------
# rows


@given(n=st.integers(0, 18), T=st.integers(0, 25), prompt=st.booleans())
def test_layout(n, T, prompt):
    config = tiny().config
    text, codes, _ = utterance(n, T)
    tokens, segment = config.layout(text, codes, utterance(3, 4)[:2] if prompt else None)
    assert tokens.dtype == segment.dtype == np.int64 and tokens.shape == (len(segment), 1)
    assert tokens[segment == TEXT, 0].tolist() == [1, *text, 2]
    assert tokens[segment == PROMPT, 0].tolist() == [16]
    assert tokens[segment == AUDIO, 0].tolist() == [*codes[:, 0], 17, 17, 17, 17]
    assert (np.diff(segment) >= 0).all() and config.stop_frame().tolist() == [17]
    asked, kinds = config.layout(text)  # generation starts from what training saw before the frames
    assert np.array_equal(asked, tokens[: len(asked)]) and np.array_equal(kinds, segment[segment < AUDIO])
    lengths = config.length(np.array([n, 3]), np.array([T, 4]), np.array([7, 0]), np.array([9, 0]))
    assert lengths.tolist() == [len(segment), config.length(3, 4)]


def test_what_has_no_positions_is_refused():
    model, heard = tiny(), utterance()[2]
    for text, frames, message in (
        (19, 3, "has 19 text ids, the model has positions for 18: raise text_positions"),
        (3, 26, "has 26 frames, the model has positions for 25: raise code_positions"),
    ):
        with pytest.raises(ValueError, match=message):
            model.length(np.array([3, text]), np.array([3, frames]))
        with pytest.raises(ValueError, match=message):
            model.layout(*utterance(text, frames)[:2])
    with pytest.raises(ValueError, match="19 text ids"):
        next(model.generate(np.arange(19), reference=heard))
    longest = utterance(18, 25)
    assert model(*batch_of(model, longest))[0].isfinite() and len(longest[1]) == model.config.max_frames
    contract_check(model, *longest[:2], reference=longest[2])


def by_hand(model, text, codes, heard, text_stop=True):
    """Losses of text and codes, row by row, as the sheet of XTTS-v2 says; text_stop: its row is there."""
    c = model.config
    words, frames = [1, *text, 2], [16, *codes[:, 0], 17, 17, 17, 17]
    rows = [*model.conditioning(heard[None])[0]]
    rows += [model.text_embedding.weight[i] + model.text_positions.weight[p] for p, i in enumerate(words)]
    rows = rows if text_stop else rows[:-1]
    rows += [model.code_embedding.weight[i] + model.code_positions.weight[p] for p, i in enumerate(frames)]
    hidden = model.final_norm(model.backbone(torch.stack(rows)[None]))[0]
    first, speech = c.n_latents, len(rows) - len(frames)
    said, spoken = hidden[first : first + len(text) + 1], hidden[speech:-1]
    return (F.cross_entropy(model.text_head(said), torch.tensor([*text, 2])),
            F.cross_entropy(model.code_head(spoken), torch.tensor(frames[1:])),
            F.cross_entropy(model.code_head(spoken[:-4]), torch.tensor(frames[1:-4])))  # fmt: skip


@pytest.mark.parametrize("hidden", [False, True])
def test_loss_is_the_one_by_hand(hidden):
    """Also in a batch with padding, in which the row that is hidden from the codes is as though it were not there."""
    model, both = tiny(hide_text_stop=hidden).double(), [utterance(5, 9), utterance(3, 4, seed=1)]
    both = [(text, codes, heard.double()) for text, codes, heard in both]
    words, frames, alone = zip(*(by_hand(model, *u, text_stop=not hidden) for u in both), strict=True)
    text = (6 * words[0] + 4 * words[1]) / 10
    codes = (13 * frames[0] + 8 * frames[1]) / 21
    speech = (9 * alone[0] + 4 * alone[1]) / 13  # without the four stops
    for width in (0, 40):
        loss, stats = model(*batch_of(model, *both, width=width))
        torch.testing.assert_close(loss, codes + 0.01 * text, rtol=1e-9, atol=1e-9)
        for name, value in (("text_loss", text), ("loss_by_codebook", speech[None]), ("weighted_loss", loss)):
            torch.testing.assert_close(means(stats)[name], value, rtol=1e-9, atol=1e-9)
        assert stats["weighted_loss"][1] == 21 and stats["text_loss"][1] == 10


def test_stats():
    """Accuracies, and the stops that were missed, are those of the logits."""
    model = tiny().eval()
    text, codes, heard = utterance(5, 9)
    tokens, segment, reference = batch_of(model, (text, codes, heard), utterance(4, 5, seed=1))
    with torch.no_grad():
        picked = model.teacher_forced_logits(text, codes, heard)[:, 0].argmax(-1)
        assert picked[-1] != 17
        stats = model(tokens, segment, reference)[1]
        assert stats["stop_missed"][1] == 2 and stats["stop_missed"][0] >= 1
        model.code_head.bias[17] += 100
        stats = model(tokens, segment, reference)[1]
    # the stops are found, and nothing else; they are no codes
    assert stats["stop_missed"][0] == stats["c0_accuracy"][0] == stats["accuracy_by_codebook"][0] == 0
    assert "stop_missed" not in model.train()(tokens, segment, reference)[1]


def test_no_loss_on_frames_that_the_reference_holds():
    model = tiny().double()
    text, codes, heard = utterance(5, 9)
    tokens, segment, reference = batch_of(model, (text, codes, heard.double()))
    whole = model(tokens, segment, reference)[1]["loss_by_codebook"][0]
    segment[0, (segment[0] == AUDIO).nonzero()[2:6, 0]] = PROMPT
    logits = model.teacher_forced_logits(text, codes, heard.double())[2:6, 0]
    part = F.cross_entropy(logits, torch.from_numpy(codes[2:6, 0]), reduction="sum")
    rest = model(tokens, segment, reference)[1]["loss_by_codebook"]
    torch.testing.assert_close(rest[0], whole - part, rtol=1e-9, atol=1e-9)
    assert rest[1] == 5  # of nine


def test_frame_dropout_blanks_codes_in_training_only():
    model = tiny(frame_dropout=0.5)
    batch = batch_of(model, utterance(5, 20))
    assert len({model(*batch)[0].item() for _ in range(4)}) == 4
    tokens, segment, _ = batch
    latents = model.conditioning(batch[2])
    with torch.no_grad():
        x, dropped = model.eval().embed(latents, tokens, segment), model.train().embed(latents, tokens, segment)
    changed = (x != dropped).any(-1)[0, 5:]
    assert not changed[segment[0] == TEXT].any() and 5 < changed.sum() < 20
    torch.testing.assert_close(dropped[0, 5:][changed], model.code_positions.weight[:25][changed[7:]])
    assert model.eval()(*batch)[0] == model.eval()(*batch)[0]


def test_every_parameter_gets_a_gradient_and_recompute_the_same():
    grads = []
    for recompute in (False, True):
        model = tiny(recompute=recompute, dropout=0.1)
        torch.manual_seed(3)
        model(*batch_of(model, utterance(18, 25, 40)))[0].backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        assert all(g.abs().max() > 0 for g in grads[-1].values())
    for name, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][name], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# the recording


@torch.no_grad()
def test_a_long_reference_is_heard_in_chunks():
    model = tiny(chunk_seconds=2.0)  # 20 rows
    x = utterance(R=400)[2]
    first, second = model.conditioning(x[None, :20]), model.conditioning(x[None, 20:40])
    torch.testing.assert_close(model.voice_latents(x[:20]), first)
    torch.testing.assert_close(model.voice_latents(x[:40]), (first + second) / 2)
    torch.testing.assert_close(model.voice_latents(x[:43]), (first + second) / 2)  # 0.3 s are too short
    rest = model.conditioning(x[None, 40:44])
    torch.testing.assert_close(model.voice_latents(x[:44]), (first + second + rest) / 3)
    torch.testing.assert_close(model.voice_latents(x[:300]), model.voice_latents(x))  # no more than 30 s
    pieces = [x[:20], x[20:40], x[40:44]]
    torch.testing.assert_close(model.voice_latents(pieces), model.voice_latents(x[:44]))
    model.config.heard_seconds = 2.0
    torch.testing.assert_close(model.voice_latents(x), first)
    model.config.heard_seconds = 0.0
    assert (model.voice_latents(x[:300]) - model.voice_latents(x)).abs().max() > 1e-4
    model.config.heard_seconds = 30.0
    assert (model.voice_latents(x[:280]) - model.voice_latents(x)).abs().max() > 1e-3
    padded = torch.cat([x[:20], torch.full((20, 6), -3.0)])
    torch.testing.assert_close(model.voice_latents(padded), first)
    assert model.voice_latents(padded[20:]).isfinite().all()
    assert model.voice_latents(x[:2].half().numpy()).shape == (1, 5, 32)
    model.config.chunk_seconds = 0.0
    torch.testing.assert_close(model.voice_latents(x[:44]), model.conditioning(x[None, :44]))


@torch.no_grad()
def test_the_reference_counts():
    model, (text, codes, heard) = tiny(), utterance()
    one, other = (model.teacher_forced_logits(text, codes, x) for x in (heard, heard.flip(1)))
    assert (one - other).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# generation


def speak(model, text, heard, **options):
    """Codes, and whether the model ended by itself."""
    frames, made = [], model.generate(text, reference=heard, **options)
    while True:
        try:
            frames.append(next(made).clone())
        except StopIteration as end:
            return [int(frame) for frame in frames], end.value


@given(seed=st.integers(0, 50), n=st.integers(0, 18), most=st.integers(0, 40))
def test_generation_speaks_only_codes(seed, n, most):
    model, (text, _, heard) = tiny(), utterance(n, seed=seed)
    kinds = []

    def choose(logits, key, age, **settings):
        kinds.append((logits.shape[-1], age[0].tolist()))
        return models.sample_code(logits, key, age, **settings)

    draw = dict(repetition_penalty=1.5)
    codes, ended = speak(model, text, heard, max_frames=most, draw=draw, choose=choose, seed=seed)
    assert all(0 <= code < 16 for code in codes) and len(codes) <= min(most, 25)
    assert ended == (len(kinds) > len(codes)) and (ended or len(codes) == min(most, 25))
    ages = [{code: n - i for i, code in enumerate(codes[:n])} for n in range(len(kinds))]
    assert kinds == [(18, [age.get(code, 0) for code in range(18)]) for age in ages]


@pytest.mark.parametrize("end", [16, 17])
def test_generation_ends(end):
    model, (text, _, heard) = tiny(), utterance()
    assert speak(model, text, heard, choose=choices(3, 3, end)) == ([3, 3], True)
    model.code_head.bias.data[end] = 1e4
    assert speak(model, text, heard, draw=GREEDY) == ([], True)
    model.code_head.bias.data[end] = -1e4
    model.code_head.bias.data[33 - end] = -1e4
    assert [len(codes) for codes, ended in (speak(model, text, heard, draw=GREEDY, max_frames=n) for n in (7, 99))
            if not ended] == [7, 25]  # fmt: skip


def test_a_prompt_changes_nothing():
    model, (text, _, heard) = tiny(), utterance()
    assert speak(model, text, heard, draw=GREEDY) == speak(model, text, heard, draw=GREEDY, prompt=utterance()[:2])


def test_latents_are_the_states_the_codes_came_from():
    model, (text, codes, heard) = tiny().eval(), utterance(5, 9)
    states = []
    model.code_head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    said, _ = speak(model, text, heard, choose=choices(*codes[:, 0], 17))
    latents, expected = model.latents(text, torch.tensor(said)[:, None], heard), torch.cat(states[:-1])
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    assert latents.shape == (9, 32)
    made = model.generate(text, choose=choices(*said, 17), reference=heard, latents=True)
    assert torch.equal(torch.stack(list(made)), expected)


# ---------------------------------------------------------------------------------------------------------------------
# from data to speech


META = dict(
    codec=dict(n_codebooks=1, codebook_size=256, frame_rate=20.0,
               reference=dict(rows_per_frame=5, silence=[0.0] * 40)),
    tokenizer=dict(vocab_size=300, bos_id=1, eos_id=2),
)  # fmt: skip


def test_build():
    stack = {**GPT2_STACK, "d_model": 128}
    options = dict(backbone=stack, text_loss_weight=0.1, code_positions=99, learning_rate=1.0, **EARS)
    model = models.build("xtts", META, options)
    c = model.config
    assert (c.reference_bands, c.reference_rate, c.text_vocab_size, c.text_bos, c.text_eos) == (40, 100.0, 300, 1, 2)
    assert c.backbone.max_positions == 5 + 404 + 99 and c.text_loss_weight == 0.1
    batch = batch_of(model, (*utterance(9, 40)[:2], torch.zeros(50, 40)))
    stats = means(model(*batch)[1])
    assert abs(stats["loss_by_codebook"] - math.log(258)) < 0.1 and abs(stats["text_loss"] - math.log(300)) < 0.1
    again = XTTSConfig(**{k: v for k, v in asdict(c).items() if k != "arch"})
    assert again == c


@pytest.mark.parametrize("change, message", [
    (dict(codec=dict(n_codebooks=2)), "speaks in one codebook, the codec has 2"),
    (dict(tokenizer=dict(eos_id=-1)), "needs a tokenizer that has ids for the begin and the end"),
])  # fmt: skip
def test_build_refuses(change, message):
    meta = {part: {**META[part], **change.get(part, {})} for part in META}
    with pytest.raises(ValueError, match=message):
        models.build("xtts", meta, dict(backbone=GPT2_STACK))


@pytest.mark.parametrize("key, value, message", [
    ("n_latents", 0, ">= 1"), ("n_latents", -1, ">= 1"), ("perceiver_heads", 0, ">= 1"),
    ("perceiver_layers", -1, ">= 1"),
    ("conditioning_layers", -1, ">= 0"), ("conditioning_layers", 10**30, "is too large"),
    ("chunk_seconds", -1.0, ">= 0"), ("chunk_seconds", math.inf, "must be finite"),
    ("text_loss_weight", -1.0, ">= 0"), ("text_loss_weight", math.inf, "must be finite"),
    ("text_positions", -1, ">= 3"), ("text_positions", 10**9, "<= 100,000"),
])  # fmt: skip
def test_sizes_that_cannot_be(key, value, message):
    with pytest.raises(ValueError, match=f"^{key} = .*{message}"):
        models.build("xtts", META, {"backbone": GPT2_STACK, **EARS, key: value})


SMALL = [
    "--arch=xtts", f"--backbone={dict(n_layer=3, n_head=2, n_kv_head=2, d_model=16, d_ff=32, **models.GPT2)}",
    "--n_latents=3", "--conditioning_layers=1", "--perceiver_layers=1", "--perceiver_heads=1", "--max_tokens=150",
    "--warmup_iters=2", "--log_interval=1", "--eval_interval=4", "--eval_samples=0", "--device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("xtts") / "tokens", K=1, references=True)


def run(data_dir, out_dir, *flags, usual=SMALL):
    """Train in this process, give back last.pt and the lines of metrics.jsonl without what depends on speed."""
    flags = [*usual, "--reference_seconds=[0.2,0.4]", f"--data_dir={data_dir}", f"--out_dir={out_dir}", *flags]
    train.main(configurator.configure(train.__file__, flags))
    lines = [{k: v for k, v in line.items() if k != "timing"} for line in read_metrics(f"{out_dir}/metrics.jsonl")]
    return load_checkpoint(f"{out_dir}/last.pt"), lines


def same_weights(a, b):
    return {name for name in a["model"] if torch.equal(a["model"][name], b["model"][name])}


def test_a_run_goes_on_as_if_it_had_not_stopped_and_speaks(tokens, tmp_path):
    flags = ["--voice_prompt=0.5", "--frame_dropout=0.3", "--dropout=0.1", "--muon=True", "--ema=0.9"]
    whole, lines = run(tokens, tmp_path / "whole", "--max_iters=6", *flags)
    run(tokens, tmp_path / "half", "--max_iters=4", "--lr_decay_iters=6", *flags)
    again, rest = run(tokens, tmp_path / "half", "--max_iters=6", "--lr_decay_iters=6", "--init_from=resume", *flags)
    assert same_weights(whole, again) == set(whole["model"])
    assert lines[4:] == rest[4:] and rest[-1]["val_stop_missed"] is not None
    voice = Voice.from_checkpoint(tmp_path / "half/best.pt", "cpu")
    assert voice.report["max_difference"] < 1e-3
    for speaker in "ab":
        assert all(0 <= int(frame) < 16 for frame in voice.frames("one two", speaker=speaker))
    heard = voice.model.voice_latents(torch.randn(30, 20))[0]
    frames = list(voice.frames("one two", reference=(heard, None), temperature=0))
    assert len(frames) <= voice.cap(voice.text_ids("one two"))


def test_it_learns(tokens, tmp_path):
    _, lines = run(tokens, tmp_path, "--max_iters=60", "--learning_rate=1e-2", "--eval_interval=60", "--muon=True")
    assert lines[0]["loss"] > 2.5 and lines[-1]["c0_accuracy"] > 0.6 and lines[-1]["val_loss"] < 1.5


def test_small_sets_leave_most_of_trained_weights_alone(tokens, tmp_path, capsys):
    """The family says what; that of 30 utterances is said in one line, kept by a resumed run, and can be overruled."""
    base, _ = run(tokens, tmp_path / "base", "--max_iters=2")
    assert "are few" not in capsys.readouterr().out and base["config"]["freeze"] == []
    init = f"--init_from={tmp_path / 'base/last.pt'}"
    tuned, _ = run(tokens, tmp_path / "tuned", "--max_iters=3", init)
    said = [line for line in capsys.readouterr().out.splitlines() if "are few" in line]
    assert len(said) == 1 and said[0].startswith("30 utterances") and "'^conditioning" in said[0]
    left = {name for name in base["model"] if name.startswith(("conditioning.", "backbone.layers.0."))}
    assert same_weights(base, tuned) == left
    resumed, _ = run(tokens, tmp_path / "tuned", "--max_iters=5", "--init_from=resume")
    assert same_weights(base, resumed) == left
    whole, _ = run(tokens, tmp_path / "whole", "--max_iters=3", init, "--freeze=[]")
    assert not same_weights(base, whole)


def test_large_sets_and_shallow_models_freeze_less():
    model = tiny(backbone=dict(n_layer=4))
    assert model.small_set_freeze(3000) == []
    weights.freeze_parameters(model, model.small_set_freeze(2999))
    trained = {".".join(name.split(".")[:3]) for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "layers" in name} == {"backbone.layers.2", "backbone.layers.3"}
    assert {"text_embedding.weight", "text_head.weight", "code_head.weight", "backbone.norm.weight"} <= trained
    assert not any(name.startswith("conditioning") for name in trained)
    assert tiny(backbone=dict(n_layer=2)).small_set_freeze(10) == [r"^conditioning\."]


def test_data_without_recordings_is_refused(tokens, tmp_path):
    files = TokenFiles(tokens, "train")
    meta = json.loads(json.dumps(files.meta))
    model = models.build("xtts", meta, dict(backbone=GPT2_STACK, **EARS))
    del files.meta["codec"]["reference"]
    with pytest.raises(ValueError, match="make it again with prepare.py --references=True"):
        Batches(files, model.layout, model.length, 400, 8, reference=(3, 6))


# ---------------------------------------------------------------------------------------------------------------------
# the released model

GOLDEN = load_file(Path(__file__).parent / "golden" / "xtts_gpt.safetensors")
WEIGHTS = {key.removeprefix("weights."): w for key, w in GOLDEN.items() if key.startswith("weights.")}
LAYOUT = next(layout for layout in published.LAYOUTS if layout.arch == "xtts")


def write(folder, before="gpt.", more=(), **args):
    """The golden weights as model.pth and config.json have them; returns the folder."""
    tensors = {**{before + key: w for key, w in WEIGHTS.items()}, **dict(more)}
    torch.save({"model": tensors, "config": {}, "step": 3}, folder / "model.pth")
    args = {"gpt_n_heads": 2, "gpt_start_text_token": 37, "gpt_stop_text_token": None, **args}
    (folder / "config.json").write_text(json.dumps({"model_args": args}))
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The golden model, in double precision: one part in 10^7 of its input moves its conditioning by 1e-4."""
    return from_pretrained(write(tmp_path_factory.mktemp("released")), hide_text_stop=True).double()


@pytest.fixture
def conditioned(released, monkeypatch):
    """It, with what the original's conditioning gave, whose rounding need not be compared again."""
    monkeypatch.setattr(released.conditioning, "forward", lambda reference: golden("out.cond_latents"))
    return released


def golden(name):
    x = GOLDEN[name]
    return x.double() if x.is_floating_point() else x


def golden_batch(model):
    """in.* laid out: tokens, segment, reference."""
    rows = []
    for text, n, codes, samples in zip(*(GOLDEN[f"in.{name}"] for name in (
        "text", "text_lengths", "audio_codes", "wav_lengths")), strict=True):  # fmt: skip
        rows.append((text[:n].numpy(), codes[: math.ceil(samples / 1024), None].numpy(), torch.zeros(1)))
    return *batch_of(model, *rows)[:2], golden("in.cond_mels")[:, 0].mT


def close(ours, theirs):
    """Within 1e-4 of the largest entry."""
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-4 * max(1, theirs.abs().max())


def test_conditioning_equals_the_original(released):
    reference = golden("in.cond_mels")[:, 0].mT
    close(released.conditioning.encode(reference).mT, golden("out.cond_encoder"))
    close(released.conditioning(reference), golden("out.cond_latents"))


def code_loss(model, stats):
    """The loss of the codes with their stops, as the original has it."""
    found = means(stats)
    return float(found["weighted_loss"] - model.config.text_loss_weight * found["text_loss"])


def test_training_equals_the_original(released):
    """Losses, and gradients: of these two have to go through the ill-conditioned encoder, and those of the original, in
    single precision, are right to half a percent."""
    released.zero_grad()
    loss, stats = released(*golden_batch(released))
    loss.backward()
    assert means(stats)["text_loss"].item() == pytest.approx(GOLDEN["out.loss_text"].item(), abs=1e-5)
    assert code_loss(released, stats) == pytest.approx(GOLDEN["out.loss_mel"].item(), abs=1e-5)
    theirs, met = {key.removeprefix("grad."): golden(key) for key in GOLDEN if key.startswith("grad.")}, set()
    for name, p in released.named_parameters():
        (key,), make = LAYOUT.source(name, released.config)
        if key in theirs:
            expected = make(theirs[key])
            far = 1e-2 if key.startswith("conditioning") else 1e-4
            assert (p.grad - expected).abs().max() < far * expected.abs().max(), name
            met.add(key)
    assert met == set(theirs)


@torch.no_grad()
def test_training_sees_what_the_original_sees(conditioned):
    """Embeddings of the rows that are not hidden, targets, and the logits at each of them."""
    states, (tokens, segment, reference) = [], golden_batch(conditioned)
    hook = conditioned.final_norm.register_forward_hook(lambda module, inputs, output: states.append(output))
    conditioned(tokens, segment, reference)
    hook.remove()
    for part, kind, state, head in (("text", TEXT, states[0], conditioned.text_head),
                                    ("mel", AUDIO, states[1], conditioned.code_head)):  # fmt: skip
        targets, logits = golden(f"out.{part}_targets"), golden(f"out.{part}_logits").mT
        first = int(part == "text")  # the start of a text is no target
        ours = torch.cat([t[k == kind][first:, 0] for t, k in zip(tokens, segment, strict=True)])
        assert torch.equal(ours, targets[targets >= 0])
        close(head(state), logits[targets >= 0])
    rows = conditioned.embed(golden("out.cond_latents"), tokens, segment)
    for row, kind, theirs, seen in zip(
        rows, segment, golden("out.inputs_embeds"), GOLDEN["out.attention_mask"], strict=True
    ):
        stop, last = 32 + int((kind == TEXT).sum()) - 1, 32 + int((kind > 0).sum()) - 1  # rows that only we have
        close(torch.cat([row[:stop], row[stop + 1 : last]]), theirs[seen.bool()])


@torch.no_grad()
def test_the_span_that_was_heard_is_ignored_as_in_the_original(conditioned):
    """There in the last row only, and in units of 256 samples; here it is whatever data.py says."""
    tokens, segment, reference = golden_batch(conditioned)
    for row, kind, theirs in zip(tokens, segment, golden("cidx.mel_targets"), strict=True):
        frames = (kind == AUDIO).nonzero()[:, 0]
        kind[frames[theirs[: len(frames)] < 0]] = PROMPT
        assert row[kind == AUDIO, 0].tolist() == theirs[theirs >= 0].tolist()
    stats = conditioned(tokens, segment, reference)[1]
    assert means(stats)["text_loss"].item() == pytest.approx(GOLDEN["cidx.loss_text"].item(), abs=1e-5)
    assert code_loss(conditioned, stats) == pytest.approx(GOLDEN["cidx.loss_mel"].item(), abs=1e-5)


def test_latents_equal_the_original(released):
    text, heard = GOLDEN["in.text"][0].numpy(), golden("in.cond_mels")[0, 0].mT
    close(released.latents(text, GOLDEN["latent.codes"].mT, heard), golden("latent.out")[0])


@torch.no_grad()
def test_greedy_generation_equals_the_original(released):
    """The original did not stop, so that its marks count as codes here: ours are two classes behind them."""
    text, heard = GOLDEN["in.text"][0].numpy(), golden("in.cond_mels")[0, 0].mT
    codes, logits = GOLDEN["gen.codes"][0].tolist(), golden("gen.logits")[0]
    state, config = released.state_dict(), {**asdict(released.config), "codebook_size": 34}
    for name, value in (("code_head.weight", 0.0), ("code_head.bias", -1e4)):
        more = torch.full_like(state[name][:2], value)
        state[name] = torch.cat([state[name], more])
    state["code_embedding.weight"] = torch.cat([state["code_embedding.weight"], state["code_embedding.weight"][32:]])
    model = XTTS(XTTSConfig(**{k: v for k, v in config.items() if k != "arch"})).double()
    weights.load_weights(model, state)
    heads = []

    def choose(scores, key):
        heads.append(scores[0, :34])
        return scores.argmax(-1)

    assert speak(model, text, heard, choose=choose, max_frames=12) == (codes, False)
    close(torch.stack(heads), logits)
    close(released.teacher_forced_logits(text, GOLDEN["gen.codes"].mT.numpy(), heard)[:-1, 0], logits)


def sheet():
    """The tensors of model.pth's GPT, {key: shape}, as the published model has them."""
    D = 1024
    vector, dense = {"weight": (D,), "bias": (D,)}, {"weight": (D, D), "bias": (D,)}
    parts = {
        "text_embedding": {"weight": (6681, D)}, "text_head": {"weight": (6681, D), "bias": (6681,)},
        "mel_embedding": {"weight": (1026, D)}, "mel_head": {"weight": (1026, D), "bias": (1026,)},
        "text_pos_embedding.emb": {"weight": (404, D)}, "mel_pos_embedding.emb": {"weight": (608, D)},
        "gpt.ln_f": vector, "final_norm": vector,
        "conditioning_encoder.init": {"weight": (D, 80, 1), "bias": (D,)},
        "conditioning_perceiver": {"latents": (32, D), "norm.gamma": (D,)},
    }  # fmt: skip
    for i in range(30):
        parts |= {f"gpt.h.{i}.ln_1": vector, f"gpt.h.{i}.ln_2": vector, f"gpt.h.{i}.attn.c_proj": dense}
        parts[f"gpt.h.{i}.attn.c_attn"] = {"weight": (D, 3 * D), "bias": (3 * D,)}
        parts[f"gpt.h.{i}.mlp.c_fc"] = {"weight": (D, 4 * D), "bias": (4 * D,)}
        parts[f"gpt.h.{i}.mlp.c_proj"] = {"weight": (4 * D, D), "bias": (D,)}
    for i in range(6):
        parts |= {f"conditioning_encoder.attn.{i}.norm": vector}
        parts[f"conditioning_encoder.attn.{i}.qkv"] = {"weight": (3 * D, D, 1), "bias": (3 * D,)}
        parts[f"conditioning_encoder.attn.{i}.proj_out"] = {"weight": (D, D, 1), "bias": (D,)}
    for i in range(2):
        parts[f"conditioning_perceiver.layers.{i}.0"] = {
            "to_q.weight": (512, D), "to_kv.weight": (1024, D), "to_out.weight": (D, 512)}  # fmt: skip
        parts[f"conditioning_perceiver.layers.{i}.1.0"] = {"weight": (5460, D), "bias": (5460,)}
        parts[f"conditioning_perceiver.layers.{i}.1.2"] = {"weight": (D, 2730), "bias": (D,)}
    return {f"{part}.{name}": shape for part, names in parts.items() for name, shape in names.items()}


def test_published_sizes():
    shapes = sheet()
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (426, 441_018_563)
    config = XTTSConfig(**LAYOUT.sizes(shapes, {}))
    assert config == XTTSConfig(6681, 1024, "gpt2-xtts", 261, 0, vocoder=True) and config.max_frames == 603
    with torch.device("meta"):
        own = XTTS(config).state_dict()
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    plan = {name: LAYOUT.source(name, config) for name in own}
    published.check(plan, own, tensors, LAYOUT, "model.pth")
    assert sum(w.numel() for w in own.values()) == 441_018_563


OTHERS = {"hifigan_decoder.waveform_decoder.conv_pre.weight": torch.zeros(2), "mel_stats": torch.zeros(80)}


@pytest.mark.parametrize("before, more", [
    ("gpt.", OTHERS),
    ("gpt.", {"gpt.gpt_inference.transformer.h.0.ln_1.weight": torch.zeros(32), "gpt.gpt.wte.weight": torch.zeros(40)}),
    ("xtts.gpt.", {**{f"xtts.{key}": w for key, w in OTHERS.items()}, "dvae.decoder.0.weight": torch.zeros(3),
                   "torch_mel_spectrogram_style_encoder.mel_norms": torch.zeros(80)}),
])  # fmt: skip
def test_files_of_all_kinds(released, tmp_path, before, more):
    model = from_pretrained(write(tmp_path, before, more))
    assert not model.config.hide_text_stop and model.config.text_bos == 37 and model.config.text_eos == 0
    for name, w in model.state_dict().items():
        assert torch.equal(w, released.state_dict()[name].float()), name


def test_what_the_file_has_too_much_or_too_little(tmp_path):
    with pytest.raises(ValueError, match="model.pth holds clvp.weight, which the family 'xtts' does not have"):
        from_pretrained(write(tmp_path, more={"clvp.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"conditioning_encoder.init.weight \(32, 80\) does not give"):
        from_pretrained(write(tmp_path, more={"gpt.conditioning_encoder.init.weight": torch.zeros(32, 80)}))


def released_meta(ids=40, bands=80):
    codec = dict(n_codebooks=1, codebook_size=32, frame_rate=22050 / 1024,
                 reference=dict(rows_per_frame=4, silence=[0.0] * bands))  # fmt: skip
    return dict(codec=codec, tokenizer=dict(vocab_size=ids, bos_id=37, eos_id=0))


def test_a_larger_vocabulary_grows_the_tables(tmp_path):
    """Old rows stay; new ones are near their mean, none like another, and everything else is as it was."""
    said = []
    torch.manual_seed(0)
    old = published.start(write(tmp_path), "xtts", released_meta(), {}, said.append)
    new = published.start(tmp_path, "xtts", released_meta(45), {"dropout": 0.1}, said.append)
    assert len(said) == 1 and "5 new text ids beside its 40" in said[0]
    assert new.training and new.config.text_vocab_size == 45 and new.config.backbone.dropout == 0.1
    for name, w in new.state_dict().items():
        before = old.state_dict()[name]
        assert torch.equal(w[: len(before)], before)
        if name in new.text_tables:
            assert len(w) == 45 and len(w[40:].unique(dim=0)) == 5
            assert ((w[40:] - before.mean(0)).abs() < 0.05 * before.std(0)).all()
        else:
            assert len(w) == len(before)
    text, codes, _ = utterance(5, 9)
    heard = golden("in.cond_mels")[0, 0].mT.float()
    assert torch.equal(new.eval().latents(text, codes, heard), old.eval().latents(text, codes, heard))
    contract_check(new, np.array([44, 3]), codes, reference=heard)


@pytest.mark.parametrize("meta, message", [
    (released_meta(39), "knows 40 text ids, the data have 39"),
    (released_meta(bands=64), "reads 80 features of a recording, the data have 64"),
])  # fmt: skip
def test_data_that_do_not_fit_the_weights(tmp_path, meta, message):
    with pytest.raises(ValueError, match=message):
        published.start(write(tmp_path), "xtts", meta, {}, print)


def test_the_released_model_learns_new_words(tmp_path, capsys):
    """train.py goes on from a folder as it was downloaded, with a larger vocabulary and the freeze of small sets."""
    folder = tmp_path / "xtts-v2"
    folder.mkdir()
    write(folder)
    torch.save(torch.ones(80), folder / "mel_stats.pth")
    torch.save({"anna": {"gpt_cond_latent": torch.zeros(1, 32, 32)}}, folder / "speakers_xtts.pth")
    torch.save({"decoder.0.weight": torch.zeros(2)}, folder / "dvae.pth")
    data = write_tokens(tmp_path / "tokens", K=1, V=32, n_mels=80, references=True)
    usual = [flag for flag in SMALL if flag.split("=")[0][2:] not in {"backbone", *weights.family_keys()}]
    flags = [f"--init_from={folder}", "--text_loss_weight=0.5"]
    with pytest.raises(ValueError, match="--n_latents: n_latents = 7, but .*xtts-v2 was trained with"):
        run(data, tmp_path / "out", "--max_iters=2", *flags, "--n_latents=7", usual=usual)
    last, lines = run(data, tmp_path / "out", "--max_iters=2", *flags, usual=usual)
    said = capsys.readouterr().out
    ids = TokenFiles(data, "train").meta["tokenizer"]["vocab_size"]
    assert f"{ids - 40} new text ids beside its 40" in said and "30 utterances are few" in said
    assert len(last["model"]["text_head.bias"]) == last["model_config"]["text_vocab_size"] == ids
    assert last["model_config"]["text_bos"] == 1 and last["model_config"]["text_loss_weight"] == 0.5
    fresh = from_pretrained(folder).state_dict()
    left = {name for name, w in fresh.items() if torch.equal(w, last["model"][name][: len(w)])}
    assert left == {name for name in fresh if name.startswith("conditioning.")}
    flags[0] = "--init_from=resume"
    again, more = run(data, tmp_path / "out", "--max_iters=3", *flags, usual=usual)
    assert len(more) == 3 and more[:2] == lines


def test_an_adapter_brings_the_new_words(tmp_path):
    """LoRA on a larger vocabulary: of the tables only the new rows move, and they travel in the adapter."""
    folder = tmp_path / "xtts-v2"
    folder.mkdir()
    write(folder)
    torch.save(torch.ones(80), folder / "mel_stats.pth")
    data = write_tokens(tmp_path / "tokens", K=1, V=32, n_mels=80, references=True)
    ids = TokenFiles(data, "train").meta["tokenizer"]["vocab_size"]
    usual = [flag for flag in SMALL if flag.split("=")[0][2:] not in {"backbone", *weights.family_keys()}]
    flags = [f"--init_from={folder}", "--lora_rank=2", "--weight_decay=0.5", "--learning_rate=0.01",
             "--text_loss_weight=0.5", "--sparse_embeddings=True", "--lora_targets=c_attn"]  # fmt: skip
    whole, lines = run(data, tmp_path / "whole", "--max_iters=8", *flags, usual=usual)
    names = {name for name in whole["model"]["weights"] if ".lora_rows" in name}
    assert names == {f"{name}.lora_rows" for name in models.XTTS.text_tables}
    assert whole["model"]["weights"]["text_embedding.weight.lora_rows"].shape == (ids - 40, 32)
    assert sum(name.endswith("_proj.lora_a") for name in whole["model"]["weights"]) == 6  # two layers of q, k and v
    model, base = load_model(whole), from_pretrained(folder)
    assert asdict(model.config) == whole["model_config"] and model.config.text_vocab_size == ids
    first = run(data, tmp_path / "first", "--max_iters=1", "--learning_rate=0.0", *flags[:3], usual=usual)[0]
    for name in models.XTTS.text_tables:
        new, old = attrgetter(name)(model), base.get_parameter(name)
        assert torch.equal(new[:40], old) and len(new) == ids
        assert not torch.equal(new[40:], first["model"]["weights"][f"{name}.lora_rows"])
    voice = Voice.from_checkpoint(tmp_path / "whole/best.pt", "cpu")
    spoken = [frame.tolist() for frame in voice.frames("one two", cap_seconds=1.0)]
    voice = Voice.from_checkpoint(tmp_path / "first/best.pt", "cpu")
    voice.adapt(str(tmp_path / "whole/best.pt"))
    assert spoken and [frame.tolist() for frame in voice.frames("one two", cap_seconds=1.0)] == spoken
    run(data, tmp_path / "parts", "--max_iters=4", "--lr_decay_iters=8", *flags, usual=usual)
    parts, again = run(data, tmp_path / "parts", "--max_iters=8", "--init_from=resume", *flags[1:], usual=usual)
    same(whole, parts)
    assert exact(again) == exact(lines)
    text, codes, _ = utterance(5, 9)
    heard = golden("in.cond_mels")[0, 0].mT.float()
    text = np.array([*text, ids - 1])
    expected = model.latents(text, codes, heard)
    flags[:2] = [f"--init_from={tmp_path}/whole/last.pt", "--freeze=[]"]
    merged, _ = run(data, tmp_path / "merged", "--max_iters=1", *flags[:2], "--learning_rate=0.0", usual=usual)
    assert merged["base"] is None and len(merged["model"]["text_head.bias"]) == ids
    torch.testing.assert_close(load_model(merged).latents(text, codes, heard), expected, rtol=0, atol=1e-5)
    lora.merge(model)
    torch.testing.assert_close(model.latents(text, codes, heard), expected, rtol=0, atol=1e-5)
    assert {name: w.shape for name, w in model.state_dict().items()} == {
        name: w.shape for name, w in merged["model"].items()}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# the whole system: recordings, a folder as it was downloaded, speech out of the vocoder


def download(folder, codes=32):
    """All files of XTTS-v2, small: the golden parts, made to fit each other."""
    parts = {part: load_file(Path(__file__).parent / "golden" / f"xtts_{part}.safetensors")
             for part in ("dvae", "hifigan", "speaker_encoder")}  # fmt: skip
    dvae, vocoder, speaker = ({key.removeprefix("weights."): w.float() for key, w in part.items()
                               if key.startswith("weights.")} for part in parts.values())  # fmt: skip
    dvae["codebook.embed"] = dvae["codebook.embed"][:, :codes]  # as many as the GPT knows
    for key in ("fc.weight", "fc.bias"):
        speaker[key] = speaker[key][: vocoder["cond_layer.weight"].shape[1]]
    torch.save(dvae, folder / "dvae.pth")
    torch.save(torch.full((80,), 2.0), folder / "mel_stats.pth")
    more = {**{f"hifigan_decoder.waveform_decoder.{key}": w for key, w in vocoder.items()},
            **{f"hifigan_decoder.speaker_encoder.{key}": w for key, w in speaker.items()}}  # fmt: skip
    write(folder, more=more, gpt_start_text_token=4)
    vocabulary = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    vocabulary.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["[STOP]", "[UNK]", "[SPACE]", "[en]", "[START]"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=40, special_tokens=special, show_progress=False)
    vocabulary.train_from_iterator([" ".join(WORDS)] * 9 + ["abcdefghijklmnopqrstuvwxyz"], trainer)
    (folder / "vocab.json").write_text(vocabulary.to_str())


def cli(script, *flags):
    script.main(configurator.configure(script.__file__, list(flags)))


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """The folder of a run from recordings and a download to a checkpoint."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("system")
    (place / "xtts-v2").mkdir()
    download(place / "xtts-v2")
    rng, lines = np.random.default_rng(0), ["audio|text|speaker"]
    for i in range(12):
        wav = 0.1 * rng.standard_normal(22050 * (6 + i % 4) // 10) * np.linspace(0.2, 1, 22050 * (6 + i % 4) // 10)
        soundfile.write(place / f"{i}.wav", wav, 22050)
        lines.append(f"{i}.wav|{WORDS[i % 4]} {WORDS[i % 3]}|{'ab'[i % 2]}")
    (place / "metadata.csv").write_text("\n".join(lines))
    cli(prepare, f"--sources={place}", f"--data_dir={place}/tokens", "--codec=xtts", f"--codec_path={place}/xtts-v2",
        f"--tokenizer={place}/xtts-v2/vocab.json", "--text_format=[en]{text}", "--references=True", "--workers=1",
        "--val_fraction=0.2")  # fmt: skip
    cli(train, "--arch=xtts", f"--init_from={place}/xtts-v2", f"--data_dir={place}/tokens", f"--out_dir={place}/out",
        "--max_iters=2", "--eval_interval=1", "--eval_samples=1", "--reference_seconds=[0.2,0.5]", "--device=cpu",
        "--max_tokens=200", "--warmup_iters=0", "--learning_rate=1e-5")  # fmt: skip
    return place


def test_a_replay_of_old_voices_beside_the_new(spoken, tmp_path):
    """Two folders with references and timbres, of which one has another speaker beside a shared one."""
    shutil.copytree(spoken / "tokens", tmp_path / "old")
    meta = json.loads((tmp_path / "old/meta.json").read_text())
    names = meta["speakers"]
    (tmp_path / "old/meta.json").write_text(json.dumps({**meta, "speakers": [names[1], "cid"]}))
    cli(train, "--arch=xtts", f"--init_from={spoken}/xtts-v2", f"--data_dir={spoken}/tokens:2,{tmp_path}/old",
        f"--out_dir={tmp_path}/out", "--max_iters=2", "--eval_samples=1", "--reference_seconds=[0.2,0.5]",
        "--device=cpu", "--max_tokens=200", "--warmup_iters=0", "--voice_prompt=0.5")  # fmt: skip
    voice = Voice.from_checkpoint(tmp_path / "out/best.pt", "cpu")
    assert voice.meta["speakers"] == [*names, "cid"]
    own = np.load(spoken / "tokens/timbres.npy")
    np.testing.assert_allclose(voice.timbres, [*own, own[1]], atol=1e-3)
    assert voice.say("one", speaker="cid", cap_seconds=1).isfinite().all()


def test_a_fine_tuned_codec_goes_from_the_recordings_to_speech(spoken, tmp_path, capsys):
    flags = [f"--sources={spoken}", "--codec=xtts", f"--codec_path={spoken}/xtts-v2", "--text_format=[en]{text}",
             f"--tokenizer={spoken}/xtts-v2/vocab.json", "--references=True", "--workers=1", "--val_fraction=0.2",
             "--device=cpu"]  # fmt: skip
    cli(prepare, *flags, f"--data_dir={tmp_path}/tokens", "--fit_epochs=2", "--fit_seconds=4")
    assert re.search(r"xtts as published: error .*\nxtts in epoch 1: .*\nxtts in epoch 2: ", capsys.readouterr().out)
    before, after = (load_codec("xtts", f"{place}/tokens") for place in (spoken, tmp_path))
    meta = TokenFiles(f"{tmp_path}/tokens", "train").meta
    assert before.fingerprint() != after.fingerprint() == meta["codec"]["fingerprint"]
    cli(train, "--arch=xtts", f"--init_from={spoken}/xtts-v2", f"--data_dir={tmp_path}/tokens",
        f"--out_dir={tmp_path}/out", "--max_iters=1", "--eval_samples=0", "--reference_seconds=[0.2,0.5]",
        "--device=cpu", "--max_tokens=200", "--warmup_iters=0")  # fmt: skip
    voice = Voice.from_checkpoint(tmp_path / "out/best.pt", "cpu")
    assert voice.codec.fingerprint() == after.fingerprint() and len(voice.say("one", cap_seconds=1)) > 0
    with pytest.raises(ValueError, match="are of two codecs"):
        cli(train, "--arch=xtts", f"--init_from={tmp_path}/out/best.pt", f"--data_dir={spoken}/tokens",
            f"--out_dir={tmp_path}/other")  # fmt: skip


def test_an_adapter_with_new_words_is_exported(spoken):
    """In the authors' layout: merged, with the larger tokenizer. It still speaks the languages of its base."""
    georgian = ["ერთი", "ორი", "სამი"]
    lines = ["audio|text|speaker", *(f"{i}.wav|{georgian[i % 3]}|{'ab'[i % 2]}" for i in range(12))]
    (spoken / "georgian.csv").write_text("\n".join(lines))
    cli(prepare, f"--sources={spoken}/georgian.csv", f"--data_dir={spoken}/more", "--codec=xtts",
        f"--codec_path={spoken}/xtts-v2", f"--tokenizer={spoken}/xtts-v2/vocab.json", "--extend_vocab=400",
        "--text_format=[{language}]{text}", "--language=ka", "--references=True", "--workers=1",
        "--val_fraction=0.2")  # fmt: skip
    cli(train, "--arch=xtts", f"--init_from={spoken}/xtts-v2", f"--data_dir={spoken}/more", f"--out_dir={spoken}/lora",
        "--max_iters=2", "--eval_samples=0", "--reference_seconds=[0.2,0.5]", "--device=cpu", "--max_tokens=200",
        "--warmup_iters=0", "--lora_rank=2", "--lora_also=['code_head']")  # fmt: skip
    cli(weights, "--command=export", f"--ckpt={spoken}/lora/last.pt", f"--out_dir={spoken}/hub")
    expected, out = load_model(load_checkpoint(spoken / "lora/last.pt")), from_pretrained(spoken / "hub")
    own = Voice.from_checkpoint(spoken / "lora/last.pt", "cpu")
    ids = own.text_ids("one two", language="en").tolist()
    assert ids == Voice.from_published(spoken / "xtts-v2", "cpu").text_ids("one two").tolist()
    assert own.tokenizer.decode(own.text_ids(georgian[0])[:1]) == "[ka]"
    with pytest.raises(ValueError, match="unknown language 'de'; choose from ka, en"):
        own.text_ids("eins", language="de")
    checkpoint = load_checkpoint(spoken / "lora/last.pt")
    save_checkpoint(spoken / "lora/scratch.pt", {**checkpoint, "origin": None})  # weights that never learnt its tags
    with pytest.raises(ValueError, match="unknown language 'en'; choose from ka"):
        Voice.from_checkpoint(spoken / "lora/scratch.pt", "cpu").text_ids("one", language="en")
    ids = TokenFiles(spoken / "more", "train").meta["tokenizer"]["vocab_size"]
    assert out.config.text_vocab_size == expected.config.text_vocab_size == ids > 40
    lora.merge(expected)
    for name, p in expected.named_parameters():
        torch.testing.assert_close(out.get_parameter(name).data, p.data)


def test_the_vocoder_speaks_in_the_timbre_of_the_reference(spoken):
    """What sample.py writes is what vocoder and GPT say of the codes and the recording, at the vocoder's rate."""
    flags = (f"--ckpt={spoken}/out/best.pt", f"--out_dir={spoken}/said", "--text=one two", "--device=cpu")
    cli(sample, *flags, f"--reference={spoken}/3.wav")
    wav, rate = soundfile.read(spoken / "said" / "000.wav", dtype="float32")
    voice = Voice.from_checkpoint(spoken / "out/best.pt", "cpu")
    assert rate == voice.sample_rate == 24000 and voice.vocoder and voice.codec.name == "xtts"
    heard, timbre = voice.listen(spoken / "3.wav")
    recording = read_audio(spoken / "3.wav", 22050)[None]
    features = [voice.codec.reference(recording, padded=False)[0]]
    assert torch.equal(heard, voice.model.voice_latents(features)[0]) and timbre.shape == (16,)
    key = voice.prompt((heard, timbre), "")
    assert key["latents"] is True and key["voice"] is heard
    voice.vocoder = False
    codes = torch.stack(list(voice.frames("one two", reference=(heard, timbre))))
    latents = voice.model.latents(voice.text_ids("one two"), codes, features)
    expected = voice.codec.vocode(latents[None], voice.codec.timbre(recording))[0]
    assert len(wav) == len(expected) == int(len(codes) * 4 * 24000 / 22050) * 256
    assert np.abs(wav - expected.clamp(-1, 1).numpy()).max() < 1e-3 and np.abs(wav).max() > 0.01


def authors_voice(voice, paths, max_ref_length, gpt_cond_len, gpt_cond_chunk_len):
    """Latents and timbre of recordings, step by step as in get_conditioning_latents of XTTS' authors."""
    audios, embeddings, styles = [], [], []
    for path in paths:
        audios.append(read_audio(path, 22050)[None, : round(22050 * max_ref_length)])
        embeddings.append(voice.codec.timbre(audios[-1]))
    audio = torch.cat(audios, 1)[:, : round(22050 * gpt_cond_len)]
    for i in range(0, audio.shape[1], round(22050 * gpt_cond_chunk_len)):
        chunk = audio[:, i : i + round(22050 * gpt_cond_chunk_len)]
        if chunk.shape[1] >= 22050 * 0.33:
            styles.append(voice.model.conditioning(voice.codec.mel(chunk, 2048).mT))
    return torch.stack(styles).mean(0)[0], torch.stack(embeddings).mean(0)[0], len(styles)


@torch.no_grad()
def test_several_recordings_are_heard_as_the_authors_hear_them(spoken):
    """Each is cut, all are joined, cut again and read in chunks, of which the last may be too short; the timbre is the
    mean of the recordings'. The script takes the settings as keys."""
    voice, paths = Voice.from_checkpoint(spoken / "out/best.pt", "cpu"), [spoken / f"{i}.wav" for i in (0, 2, 3)]
    config = voice.model.config
    for keys, n in ((dict(recording_seconds=30.0, heard_seconds=30.0, chunk_seconds=4.0), 1),
                    (dict(recording_seconds=0.7, heard_seconds=1.5, chunk_seconds=0.4), 3),
                    (dict(recording_seconds=0.5, heard_seconds=30.0, chunk_seconds=0.6), 2)):  # fmt: skip
        vars(config).update(keys)
        latents, timbre, count = authors_voice(voice, paths, *keys.values())
        heard, sound = voice.listen(paths)
        assert count == n and torch.equal(heard, latents) and torch.equal(sound, timbre)
    flags = ["--ckpt", f"{spoken}/out/best.pt", "--text=one two", "--device=cpu", "--cap_seconds=1"]
    cli(sample, *flags, f"--reference={paths[0]},{paths[1]},{paths[2]}", f"--out_dir={spoken}/three",
        *(f"--{key}={value}" for key, value in keys.items()))  # fmt: skip
    wav, _ = soundfile.read(spoken / "three/000.wav", dtype="float32")
    assert np.abs(wav - voice.say("one two", reference=paths, cap_seconds=1).clamp(-1, 1).numpy()).max() < 1e-3


def test_a_saved_voice_is_heard_once(spoken, monkeypatch):
    """Of a recording or of a speaker of the training data; with its timbre."""
    monkeypatch.chdir(spoken)
    flags = ["--ckpt", f"{spoken}/out/best.pt", "--device=cpu", "--cap_seconds=1"]
    cli(sample, *flags, "--reference=3.wav", "--save_voice=three", "--text=one two", "--out_dir=first")
    cli(sample, *flags, "--speaker=b", "--save_voice=b", "--text=one two", "--out_dir=second")
    monkeypatch.setattr(Voice, "listen", None)
    monkeypatch.setattr(XTTS, "voice_latents", None)
    monkeypatch.setattr("voice.contract_check", lambda *args, **side: {"max_difference": 0.0, "loss_at_shift": [],
                                                                         "ln_v": 0.0})  # fmt: skip
    for name, folder in (("three", "first"), ("b", "second")):
        cli(sample, *flags, f"--voice={name}", "--text=one two", f"--out_dir={name}")
        assert (spoken / name / "000.wav").read_bytes() == (spoken / folder / "000.wav").read_bytes()


@torch.no_grad()
def test_speed(spoken):
    """The states are interpolated before the vocoder, as its authors do it; pieces have the length of the whole."""
    voice = Voice.from_checkpoint(spoken / "out/best.pt", "cpu")
    how = dict(reference=spoken / "3.wav", temperature=0, cap_seconds=1.0)
    voice.model.code_head.bias.data[32:] = -1e4  # it never stops
    states = torch.stack(list(voice.frames("one two", **how)))
    timbre = voice.listen(spoken / "3.wav")[1][None]
    plain = voice.say("one two", **how)
    torch.testing.assert_close(plain, voice.codec.vocode(states[None], timbre)[0])
    for speed in (2.0, 0.8):
        slow = torch.nn.functional.interpolate(states.T[None], scale_factor=1 / speed, mode="linear").mT
        wav = voice.say("one two", **how, speed=speed)
        torch.testing.assert_close(wav, voice.codec.vocode(slow, timbre)[0])
        assert abs(len(wav) / len(plain) - 1 / speed) < 0.05
        pieces = list(voice.stream("one two", **how, speed=speed))
        assert len(pieces) > 1 and abs(sum(map(len, pieces)) - len(wav)) <= 2 * 24000 * 1024 / 22050 / speed
    cli(sample, "--ckpt", f"{spoken}/out/best.pt", "--text=one two", "--device=cpu", f"--reference={spoken}/3.wav",
        "--temperature=0", "--cap_seconds=1", "--speed=2", f"--out_dir={spoken}/fast")  # fmt: skip
    assert 0 < soundfile.info(spoken / "fast/000.wav").frames < 0.6 * len(plain)
    assert len(voice.decode(states[:1], timbre[0], 2.0)) > 0  # not even a single state vanishes


def test_each_speaker_has_a_timbre_of_its_own(spoken):
    """Without a recording the speaker's own reference is heard, and the mean of what the vocoder takes of all."""
    voice = Voice.from_checkpoint(spoken / "out/last.pt", "cpu")
    own = [voice.codec.timbre(read_audio(spoken / f"{i}.wav", 22050)[None])[0] for i in range(0, 12, 2)]
    torch.testing.assert_close(voice.timbres[voice.meta["speakers"].index("a")], torch.stack(own).mean(0))
    wavs = [voice.say("one two", speaker=speaker, temperature=0) for speaker in "ab"]
    assert len(wavs[0]) != len(wavs[1]) or not torch.allclose(*wavs)
    samples = sorted(path.name for path in (spoken / "out/samples").glob("*.wav"))
    assert samples == ["000001_0.wav", "000002_0.wav", "original_0.wav"]
    rates = [soundfile.info(spoken / "out/samples" / name).samplerate for name in samples]
    assert rates == [24000, 24000, 22050]
    voice.timbres = None
    with pytest.raises(ValueError, match="reads the voice from a recording: give a reference"):
        voice.say("one two")


def test_a_vocoder_that_streams(spoken):
    """Pieces come before the last state, are in all as long as the frames, and up to the first seam equal the whole."""
    voice = Voice.from_checkpoint(spoken / "out/best.pt", "cpu")
    voice.model.code_head.bias.data[32:] = -1e4  # it never stops
    states, drawn = list(voice.frames("one two three", speaker="a", cap_seconds=1.1)), []
    timbre = voice.plan("one two three", speaker="a")[1]
    whole = voice.decode(torch.stack(states), timbre)
    pieces = voice.join((drawn.append(1) or state for state in states), timbre, block=0.2, context=0.4, ahead=0.2)
    first = next(pieces)
    assert len(drawn) == 7 < len(states) == 24  # the first block has 80 ms
    joined = torch.cat([first, *pieces])
    assert len(joined) == round(len(states) * 24000 * 1024 / 22050) >= len(whole)
    torch.testing.assert_close(first, whole[: len(first)], atol=1e-4, rtol=0)


def test_a_model_of_its_own_speaks_by_its_codes(spoken):
    """The vocoder knows the states of the published weights and of what descends from them, and no others."""
    cli(train, "--arch=xtts", f"--data_dir={spoken}/tokens", f"--out_dir={spoken}/fresh", *SMALL[1:],
        "--max_iters=1", "--reference_seconds=[0.2,0.5]")  # fmt: skip
    voice = Voice.from_checkpoint(spoken / "fresh/last.pt", "cpu")
    assert not voice.vocoder and voice.sample_rate == 22050
    assert load_checkpoint(spoken / "out/last.pt")["model_config"]["vocoder"]
    cli(train, "--arch=xtts", f"--data_dir={spoken}/tokens", f"--out_dir={spoken}/further", "--max_tokens=200",
        f"--init_from={spoken}/out/last.pt", "--max_iters=1", "--reference_seconds=[0.2,0.5]", "--device=cpu")
    assert Voice.from_checkpoint(spoken / "further/last.pt", "cpu").vocoder


def test_other_sizes_are_refused_when_it_goes_on(tokens, tmp_path, capsys):
    run(tokens, tmp_path / "a", "--max_iters=2", "--chunk_seconds=2")
    for key in ("n_latents", "conditioning_layers", "perceiver_layers", "perceiver_heads", "text_positions"):
        for start in ("resume", tmp_path / "a/best.pt"):
            with pytest.raises(ValueError, match=f"--{key}: {key} = 7, but .*.pt was trained with"):
                out = tmp_path / ("a" if start == "resume" else "b")
                run(tokens, out, "--max_iters=3", f"--init_from={start}", f"--{key}=7")
    given = [flag for flag in SMALL if flag.split("=")[0][2:] not in {"backbone", *weights.family_keys()}]
    given += ["--reference_seconds=[0.2,0.4]", f"--data_dir={tokens}", f"--out_dir={tmp_path}/a"]
    checkpoint = load_checkpoint(tmp_path / "a/last.pt")
    checkpoint["config"]["n_latents"] = 99  # as older versions recorded what was asked for
    weights.save_checkpoint(tmp_path / "a/last.pt", checkpoint)
    capsys.readouterr()
    train.main(configurator.configure(train.__file__, [*given, "--init_from=resume", "--max_iters=3"]))
    assert "resuming" in (out := capsys.readouterr().out) and "n_latents" not in out.split("iter 2")[1].split("\n")[0]
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert (config["n_latents"], config["perceiver_heads"], config["chunk_seconds"]) == (3, 1, 2.0)

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import configurator
import model as models
import train
from codec import load_codec
from data import Batches, SentencePiece, TokenFiles, TokenWriter, train_tokenizer
from metrics import read_metrics
from model import AUDIO, PROMPT, TEXT, XTTS, XTTSConfig, contract_check, load_checkpoint
from sample import Voice

GPT2 = dict(n_layer=2, n_head=4, n_kv_head=4, d_model=32, d_ff=48, **models.GPT2)
EARS = dict(n_latents=5, conditioning_layers=2, perceiver_layers=2, perceiver_heads=2)
FEW = settings(max_examples=25, deadline=None)


def tiny(cls=XTTS, backbone=None, **options):
    """A small XTTS of 16 codes with weights wide enough for logits that differ."""
    torch.manual_seed(0)
    sizes = dict(reference_bands=6, reference_rate=10.0, text_positions=20, code_positions=30)
    model = cls(XTTSConfig(30, 16, {**GPT2, **(backbone or {})}, 1, 2, **{**EARS, **sizes, **options}))
    for p in model.parameters():
        if p.ndim > 1:
            p.data.normal_(std=0.3)
    return model


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
@FEW
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
            F.cross_entropy(model.code_head(spoken), torch.tensor(frames[1:])))  # fmt: skip


@pytest.mark.parametrize("hidden", [False, True])
def test_loss_is_the_one_by_hand(hidden):
    """Also in a batch with padding, in which the row that is hidden from the codes is as though it were not there."""
    model, both = tiny(hide_text_stop=hidden).double(), [utterance(5, 9), utterance(3, 4, seed=1)]
    both = [(text, codes, heard.double()) for text, codes, heard in both]
    words, frames = zip(*(by_hand(model, *u, text_stop=not hidden) for u in both), strict=True)
    text = (6 * words[0] + 4 * words[1]) / 10
    codes = (13 * frames[0] + 8 * frames[1]) / 21
    for width in (0, 40):
        loss, stats = model(*batch_of(model, *both, width=width))
        torch.testing.assert_close(loss, codes + 0.01 * text, rtol=1e-9, atol=1e-9)
        for name, value in (("text_loss", text), ("loss_by_codebook", codes[None]), ("loss", loss)):
            torch.testing.assert_close(means(stats)[name], value, rtol=1e-9, atol=1e-9)
        assert stats["loss"][1] == 21 and stats["text_loss"][1] == 10


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
    assert stats["stop_missed"][0] == 0 and stats["c0_accuracy"][0] == 8 == stats["accuracy_by_codebook"][0]
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
    assert rest[1] == 9


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
    torch.testing.assert_close(model.hear(x[:20]), first)
    torch.testing.assert_close(model.hear(x[:40]), (first + second) / 2)
    torch.testing.assert_close(model.hear(x[:43]), (first + second) / 2)  # 0.3 s are too short
    rest = model.conditioning(x[None, 40:44])
    torch.testing.assert_close(model.hear(x[:44]), (first + second + rest) / 3)
    torch.testing.assert_close(model.hear(x[:300]), model.hear(x))  # no more than 30 s
    assert (model.hear(x[:280]) - model.hear(x)).abs().max() > 1e-3
    padded = torch.cat([x[:20], torch.full((20, 6), -3.0)])
    torch.testing.assert_close(model.hear(padded), first)
    assert model.hear(padded[20:]).isfinite().all() and model.hear(x[:2].half().numpy()).shape == (1, 5, 32)
    model.config.chunk_seconds = 0.0
    torch.testing.assert_close(model.hear(x[:44]), model.conditioning(x[None, :44]))


@torch.no_grad()
def test_the_reference_counts():
    model, (text, codes, heard) = tiny(), utterance()
    one, other = (model.teacher_forced_logits(text, codes, x) for x in (heard, heard.flip(1)))
    assert (one - other).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# generation


def greedy(logits, seen=None):
    return logits.argmax(-1)


def speak(model, text, heard, **options):
    """Codes, and whether the model ended by itself."""
    frames, made = [], model.generate(text, reference=heard, **options)
    while True:
        try:
            frames.append(next(made).clone())
        except StopIteration as end:
            return [int(frame) for frame in frames], end.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_contract_holds(dtype):
    model = tiny(dropout=0.5, hide_text_stop=True).to(dtype).train()
    text, codes, heard = utterance(7, 12, 40)
    report = contract_check(model, text, codes, reference=heard.half())
    assert model.training and report["ln_v"] == math.log(18) and len(report["loss_at_shift"]) == 3
    assert report["max_difference"] < {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 1}[dtype]
    for T in (1, 2, 3, 25):
        contract_check(model, text, utterance(T=T)[1], reference=heard)


class ShiftedLayout(XTTS):
    """Generation starts without the start code."""

    def __init__(self, config):
        super().__init__(config)
        self.layout = self.shifted

    def shifted(self, text, codes=None):
        tokens, segment = self.config.layout(text, codes)
        return (tokens, segment) if codes is not None else (tokens[:-1], segment[:-1])


class TrainedWithout(XTTS):
    """Training lays out a text without its end."""

    def __init__(self, config):
        super().__init__(config)
        self.layout = self.without

    def without(self, text, codes=None):
        tokens, segment = self.config.layout(text, codes)
        kept = np.arange(len(tokens)) != (len(text) + 1 if codes is not None else -1)
        return tokens[kept], segment[kept]


class Deaf(XTTS):
    """Generation takes no notice of the recording."""

    def generate(self, *args, reference, **options):
        return super().generate(*args, reference=torch.zeros_like(reference), **options)


class LatePositions(XTTS):
    """Generation counts the codes from 0 on again after the start code."""

    def generate(self, *args, **options):
        table = self.code_positions.weight.data
        for n, frame in enumerate(super().generate(*args, **options)):
            yield frame
            self.code_positions.weight.data = torch.cat([table[:1], table[:-1]]) if n < 99 else table
        self.code_positions.weight.data = table


@pytest.mark.parametrize("broken", [ShiftedLayout, TrainedWithout, Deaf, LatePositions])
def test_contract_check_refuses(broken):
    text, codes, heard = utterance(7, 12)
    with pytest.raises(ValueError, match="check failed: generation and teacher forcing differ"):
        contract_check(tiny(broken), text, codes, reference=heard)


@given(seed=st.integers(0, 50), n=st.integers(0, 18), most=st.integers(0, 40))
@FEW
def test_generation_speaks_only_codes(seed, n, most):
    model, (text, _, heard) = tiny(), utterance(n, seed=seed)
    generator, kinds = torch.Generator().manual_seed(seed), []

    def choose(logits, seen=None):
        kinds.append((len(logits), seen.tolist()))
        return models.sample_code(logits, generator=generator)

    codes, ended = speak(model, text, heard, max_frames=most, choose=choose)
    assert all(0 <= code < 16 for code in codes) and len(codes) <= min(most, 25)
    assert ended == (len(kinds) > len(codes)) and (ended or len(codes) == min(most, 25))
    assert kinds == [(18, codes[:i]) for i in range(len(kinds))]


@pytest.mark.parametrize("end", [16, 17])
def test_generation_ends(end):
    model, (text, _, heard) = tiny(), utterance()
    ending = iter([3, 3, end])
    assert speak(model, text, heard, choose=lambda logits, seen: torch.tensor(next(ending))) == ([3, 3], True)
    model.code_head.bias.data[end] = 1e4
    assert speak(model, text, heard, choose=greedy) == ([], True)
    model.code_head.bias.data[end] = -1e4
    model.code_head.bias.data[33 - end] = -1e4
    assert [len(codes) for codes, ended in (speak(model, text, heard, choose=greedy, max_frames=n) for n in (7, 99))
            if not ended] == [7, 25]  # fmt: skip


def test_a_prompt_changes_nothing():
    model, (text, _, heard) = tiny(), utterance()
    assert speak(model, text, heard, choose=greedy) == speak(model, text, heard, choose=greedy, prompt=utterance()[:2])


def test_latents_are_the_states_the_codes_came_from():
    model, (text, codes, heard) = tiny().eval(), utterance(5, 9)
    states = []
    model.code_head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    ending = iter([*codes[:, 0].tolist(), 17])
    said, _ = speak(model, text, heard, choose=lambda logits, seen: torch.tensor(next(ending)))
    latents = model.latents(text, torch.tensor(said)[:, None], heard)
    torch.testing.assert_close(latents, torch.stack(states[:-1]), rtol=1e-4, atol=1e-5)
    assert latents.shape == (9, 32)


# ---------------------------------------------------------------------------------------------------------------------
# from data to speech


META = dict(
    codec=dict(n_codebooks=1, codebook_size=256, frame_rate=20.0,
               reference=dict(rows_per_frame=5, silence=[0.0] * 40)),
    tokenizer=dict(vocab_size=300, bos_id=1, eos_id=2),
)  # fmt: skip


def test_build():
    options = dict(backbone="gpt2-1M", text_loss_weight=0.1, code_positions=99, learning_rate=1.0, **EARS)
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
        models.build("xtts", meta, dict(backbone="gpt2-1M"))


WORDS = ["zero", "one", "two", "three"]
SMALL = [
    "--arch=xtts", f"--backbone={dict(n_layer=3, n_head=2, n_kv_head=2, d_model=16, d_ff=32, **models.GPT2)}",
    "--n_latents=3", "--conditioning_layers=1", "--perceiver_layers=1", "--perceiver_heads=1", "--max_tokens=150",
    "--warmup_iters=2", "--log_interval=1", "--eval_interval=4", "--eval_samples=0", "--device=cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A token folder of two voices: each word is four codes that follow from it, its features the voice's own."""
    folder, rng = tmp_path_factory.mktemp("xtts") / "tokens", np.random.default_rng(0)
    tokenizer = SentencePiece(train_tokenizer(["[a][b]" + " ".join(WORDS)], 300, ["[a]", "[b]"]))
    codec = load_codec("mel", n_codebooks=1, codebook_size=16, sample_rate=4000, n_mels=20, dims=16)
    codec.fit([0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(0))])
    silence = codec.reference(torch.zeros(1, codec.samples_per_frame))[0]
    with TokenWriter(folder, references=True) as w:
        for i in range(35):
            spoken = rng.integers(0, 4, rng.integers(1, 4))
            codes = 4 * np.repeat(spoken, 4)[:, None] + np.tile(np.arange(4), len(spoken))[:, None]
            text = f"[{'ab'[i % 2]}]" + " ".join(WORDS[j] for j in spoken)
            heard = rng.standard_normal((len(codes) * len(silence), 20)) + i % 2
            w.add("train" if i < 30 else "val", f"u{i}", tokenizer.encode(text), codes, i % 2, heard)
        w.file("tokenizer.model", tokenizer.model)
        codec.save(w.partial)
        keys = ["name", "sample_rate", "frame_rate", "n_codebooks", "codebook_size"]
        reference = {"rows_per_frame": len(silence), "silence": silence[0].tolist()}
        described = {**{key: getattr(codec, key) for key in keys}, "fingerprint": codec.fingerprint()}
        w.finish({"codec": {**described, "reference": reference}, "tokenizer": tokenizer.describe(),
                  "text_format": "[{speaker}]{text}", "lowercase": False, "speakers": ["a", "b"]})  # fmt: skip
    return str(folder)


def run(data_dir, out_dir, *flags):
    """Train in this process, give back last.pt and the lines of metrics.jsonl without what depends on speed."""
    flags = [*SMALL, "--reference_seconds=[0.2,0.4]", f"--data_dir={data_dir}", f"--out_dir={out_dir}", *flags]
    train.main(configurator.configure(train.__file__, flags))
    lines = [{k: v for k, v in line.items() if k != "timing"} for line in read_metrics(f"{out_dir}/metrics.jsonl")]
    return load_checkpoint(f"{out_dir}/last.pt"), lines


def same_weights(a, b):
    return {name for name in a["model"] if torch.equal(a["model"][name], b["model"][name])}


@pytest.mark.parametrize("flags", [(), ("--voice_prompt=0.5", "--frame_dropout=0.3", "--muon=True", "--ema=0.9")])
def test_a_run_goes_on_as_if_it_had_not_stopped_and_speaks(tokens, tmp_path, flags):
    whole, lines = run(tokens, tmp_path / "whole", "--max_iters=6", *flags)
    run(tokens, tmp_path / "half", "--max_iters=4", "--lr_decay_iters=6", *flags)
    again, rest = run(tokens, tmp_path / "half", "--max_iters=6", "--lr_decay_iters=6", "--init_from=resume", *flags)
    assert same_weights(whole, again) == set(whole["model"])
    assert lines[4:] == rest[4:] and rest[-1]["val_stop_missed"] is not None
    voice = Voice.from_checkpoint(tmp_path / "half/best.pt", "cpu")
    assert voice.report["max_difference"] < 1e-3
    for speaker in "ab":
        assert all(0 <= int(frame) < 16 for frame in voice.frames("one two", speaker=speaker))
    heard = torch.randn(30, 20)
    assert len(list(voice.frames("one two", reference=heard, temperature=0))) <= voice.cap(voice.text_ids("one two"))


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
    train.freeze_parameters(model, model.small_set_freeze(2999))
    trained = {".".join(name.split(".")[:3]) for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "layers" in name} == {"backbone.layers.2", "backbone.layers.3"}
    assert {"text_embedding.weight", "text_head.weight", "code_head.weight", "backbone.norm.weight"} <= trained
    assert not any(name.startswith("conditioning") for name in trained)
    assert tiny(backbone=dict(n_layer=2)).small_set_freeze(10) == [r"^conditioning\."]


def test_data_without_recordings_is_refused(tokens, tmp_path):
    files = TokenFiles(tokens, "train")
    meta = json.loads(json.dumps(files.meta))
    model = models.build("xtts", meta, dict(backbone=GPT2, **EARS))
    del files.meta["codec"]["reference"]
    with pytest.raises(ValueError, match="make it again with prepare.py --references=True"):
        Batches(files, model.layout, model.length, 400, 8, reference=(3, 6))

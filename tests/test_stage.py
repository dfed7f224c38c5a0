"""Generation, step by step: utterances on one stage depend on no other, and a step never looks at values."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import GREEDY, noise, spoken_by, tiny, tiny_kani, tiny_valle, tiny_xtts, utterance
from hypothesis import given, settings
from hypothesis import strategies as st

import model as models
from model import Cache, Transformer
from parts.draw import sample_code

KANI2 = dict(audio_step=0.3, speaker_size=6, backbone=dict(rotation_speed=(0.1, 2.0)))
FAMILIES = {
    "csm": tiny, "csm-joined": partial(tiny, prompt_style="joined"), "csm-zeros": partial(tiny, stop="zeros"),
    "kani": tiny_kani, "kani-1": partial(tiny_kani, K=1), "kani2": partial(tiny_kani, **KANI2), "xtts": tiny_xtts,
    "ar": partial(tiny_valle, "ar"), "nar": tiny_valle,
    "nar-guided": partial(tiny_valle, guidance=2.0, whole_frames=False),
}  # fmt: skip
DRAW = dict(temperature=1.0, top_k=8)
PENALTY = dict(DRAW, repetition_penalty=1.5, repetition_decay=0.5)

# ---------------------------------------------------------------------------------------------------------------------
# utterances on one stage


def lines_of(family, model, sizes):
    """What `seat` takes, dicts, for utterances of these (text ids, frames of a prompt or 0, frames, seed)."""
    lines = []
    for i, (n, before, frames, seed) in enumerate(sizes):
        text, _ = utterance(n, seed=100 + i)
        line = dict(text=text, prompt=None, seed=97 * i + seed + 1, most=frames)
        K = model.config.n_codebooks
        if before and family != "xtts":
            line["prompt"] = [utterance(3, before, K, seed=i), utterance(2, 2, K, seed=i)][: 1 + i % 2]
        if model.reference == "vector" and i % 2 == 0:
            line["reference"] = noise(1, 6, seed=i)
        if model.reference == "recording":
            line["reference"] = noise(9, 6, seed=i)
        if not model.causal:
            line |= dict(frames=frames, rounds=1 + i % 4)
        lines.append(line)
    return lines


def alone(model, line, **how):
    line = dict(line)
    return spoken_by(model, line.pop("text"), max_frames=line.pop("most"), **line, **how)


def together(model, lines, places, rng, **how):
    """(frames, whether it ended) of each, seated, moved and stepped as rng says, with a spare place at the end."""
    rooms = [model.room(line["text"], line["prompt"], line["most"]) for line in lines]
    stage = model.stage(places + 1, max(rows for _, rows in rooms), max(frames for frames, _ in rooms), **how)
    waiting, seated, said = list(rng.permutation(len(lines))), [], {}
    while waiting or seated:
        while waiting and len(seated) < places and (not seated or rng.random() < 0.5):
            line = dict(lines[waiting[-1]], most=rooms[waiting[-1]][0])
            most = model.seat(stage, len(seated), **line)
            seated.append((waiting.pop(), most))
        if rng.random() < 0.3:  # two change places
            i, j = rng.integers(len(seated), size=2)
            for here, there in ((i, places), (j, i), (places, j)):
                stage.move(int(here), int(there))
            seated[i], seated[j] = seated[j], seated[i]
        stage.cache.used[len(seated) :] = 0  # so that the free places have room; what happens there does no harm
        model.step(stage if model.causal and rng.random() < 0.2 else stage.part(slice(0, len(seated))))
        for place in reversed(range(len(seated))):
            number, most = seated[place]
            made, ended = int(stage.made[place]), bool(stage.ended[place])
            if not ended and made < most:
                continue
            said[number] = stage.codes[place, :made].tolist(), ended
            assert stage.sound[place] and made <= most
            stage.move(len(seated) - 1, place)
            seated[place] = seated[-1]
            seated.pop()
    return [said[i] for i in range(len(lines))]


def test_sampling_by_seed():
    model, (text, _) = tiny(), utterance()
    one, again, two = (spoken_by(model, text, max_frames=5, draw=dict(temperature=2.0), seed=s) for s in (1, 1, 2))
    assert one == again != two


SIZES = st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0, 0, 2, 5]), st.integers(1, 6), st.integers(0, 9)),
                 min_size=2, max_size=4)  # fmt: skip
few = settings(max_examples=max(5, settings.default.max_examples // 3))  # of each family
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@few
@given(sizes=SIZES, places=st.integers(1, 4), order=st.integers(0, 2**32 - 1), draw=st.sampled_from([GREEDY, PENALTY]))
def test_an_utterance_does_not_depend_on_where_and_beside_what_it_is_spoken(family, sizes, places, order, draw):
    """In float64, where no rounding tips a choice."""
    model = FAMILIES[family]().double().eval()
    draw = draw if model.causal or draw is GREEDY else DRAW
    lines = lines_of(family, model, sizes)
    found = together(model, lines, places, np.random.default_rng(order), draw=draw)
    assert found == [alone(model, line, draw=draw) for line in lines]


@every_family
@few
@given(sizes=SIZES, places=st.integers(1, 4), order=st.integers(0, 2**32 - 1))
def test_logits_do_not_depend_on_it_either(family, sizes, places, order):
    """In float32, along the same codes; a key tells which draw it is. The ages of the classes are equal."""
    model = FAMILIES[family]().eval()
    if family == "nar-guided":  # a quotient of small differences: in float64 above
        model.respread = lambda guided, logits: guided
    lines, known = lines_of(family, model, sizes), {}

    def record(logits, key, age=None, **draw):
        codes = sample_code(logits, key, age, **draw)
        ages = age if age is not None else torch.zeros_like(logits)
        for k, x, a, code in zip(key.ravel(), logits.flatten(0, -2), ages.flatten(0, -2), codes.ravel(), strict=True):
            assert int(k) not in known
            known[int(k)] = x, a, int(code)
        return codes

    met = set()

    def repeat(logits, key, age=None, **draw):
        ages = age if age is not None else torch.zeros_like(logits)
        for k, x, a in zip(key.ravel().tolist(), logits.flatten(0, -2), ages.flatten(0, -2), strict=True):
            if k in known and k not in met:  # not that of a free place
                torch.testing.assert_close(x, known[k][0], rtol=1e-4, atol=1e-4 * float(known[k][0].abs().max()))
                assert torch.equal(a, known[k][1])
                met.add(k)
        return torch.tensor([known[k][2] if k in known else 0 for k in key.ravel().tolist()]).view(key.shape)

    draw = PENALTY if model.causal else DRAW
    expected = [alone(model, line, draw=draw, choose=record) for line in lines]
    assert together(model, lines, places, np.random.default_rng(order), draw=draw, choose=repeat) == expected
    assert met == known.keys()


@pytest.mark.parametrize("family", ["csm", "kani", "kani2", "xtts"])
@pytest.mark.parametrize("draw", [GREEDY, DRAW])
def test_a_voice_is_read_once(family, draw):
    """A text in a voice that is known gives the backbone its own rows alone, at whatever place, and sounds the same."""
    model, kept, rows = FAMILIES[family]().double().eval(), {}, []
    first, second, other = lines_of(family, model, [(5, 4, 6, 1), (8, 4, 6, 2), (3, 4, 6, 3)])
    for name in ("prompt", "reference"):
        if name in first:
            second[name] = first[name]
    lead = model.opening(first["text"], first["prompt"], **{k: first[k] for k in ("reference",) if k in first})[2]
    assert lead > 2
    stage = model.stage(2, 200, 6, draw=draw)
    run = model.backbone.forward
    model.backbone.forward = lambda x, *more, **how: rows.append(x.shape[1]) or run(x, *more, **how)
    for place, line, count in ((0, first, 2), (1, second, 1), (0, other, 2), (1, first, 2), (0, second, 1)):
        rows.clear()
        most = model.seat(stage, place, **line, kept=kept)
        whole = model.rows_before * ("reference" in line) + len(model.layout(line["text"], None, line["prompt"])[0])
        assert len(rows) == count and sum(rows) == whole - 1 - (lead if count == 1 else 0)
        while stage.made[place] < most and not stage.ended[place]:
            model.step(stage.part(slice(place, place + 1)))
        assert stage.codes[place, : stage.made[place]].tolist() == alone(model, line, draw=draw)[0]


def test_a_part_of_a_stage_is_the_stage():
    """All of its memory is shared; what is done to a part happens to those places alone."""
    model = tiny_kani(**KANI2)
    stage = model.stage(4, 50, 6, draw=PENALTY)
    for place in range(4):
        model.seat(stage, place, utterance(3 + place, seed=place)[0], seed=place)
    before = {name: x.clone() for name, x in stage.buffers().items() if isinstance(x, torch.Tensor)}
    model.step(stage.part(slice(1, 3)))
    assert stage.made.tolist() == [0, 1, 1, 0] and stage.cache.used.tolist() == [8, 10 + 3, 11 + 3, 11]
    for name, x in before.items():
        assert torch.equal(stage.buffers()[name][[0, 3]], x[[0, 3]]), name
        assert stage.part(slice(1, 3)).buffers()[name].data_ptr() == stage.buffers()[name][1:].data_ptr(), name


# ---------------------------------------------------------------------------------------------------------------------
# CSM: codes that are foreseen


@pytest.mark.parametrize("n_codebooks", [0, 6])
@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("draw", [GREEDY, DRAW, PENALTY], ids=",".join)
def test_frames_with_guesses_are_those_without(ahead, draw, n_codebooks):
    model = tiny(K=8).double().eval()
    model.decoder_heads.data *= 0.3  # some guesses are right
    for seed in range(3):
        said = []
        for guessed in (0, ahead):
            stage = model.stage(1, 40, 10, draw=draw, ahead=guessed, n_codebooks=n_codebooks)
            model.seat(stage, 0, utterance(6, seed=seed)[0], seed=seed)
            for _ in range(10):
                model.step(stage)
            said.append((stage.codes, stage.made, stage.ended, stage.x))
        assert all(map(torch.equal, *(x[:3] for x in said)))
        torch.testing.assert_close(said[0][3], said[1][3])


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("ahead", [1, 2, 5, 20])
def test_right_guesses_spare_passes(ahead, right):
    """A depth decoder whose states are all alike guesses right; one whose guesses are wrong loses nothing."""
    model, passes = tiny(K=8, stop="zeros").double().eval(), []
    if right:
        model.decoder.norm.weight.data.zero_()
    run = model.decoder.forward
    model.decoder.forward = lambda x, cache: passes.append(x.shape[1]) or run(x, cache)
    stage = model.stage(1, 40, 5, draw=DRAW, ahead=ahead)
    model.seat(stage, 0, utterance(6)[0], seed=1)
    choose = stage.choose
    if not right:  # a class that is no code
        stage.choose = lambda logits, k, chosen=True: choose(logits, k) if chosen else torch.full((1,), 17)
    for _ in range(5):
        model.step(stage)
    assert len(passes) == 5 * (1 + math.ceil(6 / (1 + ahead)) if right else 7)
    line = dict(text=utterance(6)[0], most=5, seed=1)
    assert stage.codes[0].tolist() == alone(model, line, draw=DRAW)[0]


# ---------------------------------------------------------------------------------------------------------------------
# caches


KINDS = [
    {}, {"n_kv_head": 1}, {"n_layer": 3, "layers": "aca", "qk_norm": True}, {"n_layer": 3, "layers": "cca"},
    {"rotation_speed": (0.1, 2.0)}, {"n_layer": 3, "layers": "cac", "rotation_speed": (0.1, 2.0), "n_kv_head": 1},
    {"bias": True, "feed_forward": "gelu", "rope_theta": 0.0}, {"rope_scaling": (32.0, 1.0, 4.0, 64)},
]  # fmt: skip


@given(starts=st.lists(st.integers(0, 12), min_size=1, max_size=4),
       blocks=st.lists(st.integers(1, 4), min_size=1, max_size=5), kind=st.sampled_from(KINDS))  # fmt: skip
@torch.no_grad()
def test_a_cache_of_sequences_of_different_lengths_is_a_cache_of_each(starts, blocks, kind):
    model = Transformer(models.transformer_config({**models.PRESETS["llama-60M"], "n_layer": 2, "n_head": 4,
                                                   "n_kv_head": 2, "d_model": 32, "d_ff": 48, "max_positions": 64,
                                                   **kind})).double().eval()  # fmt: skip
    for p in model.parameters():
        p.data.normal_(std=0.3)
    B = len(starts)
    x = torch.randn(B, 12 + sum(blocks), 32, dtype=torch.float64)
    together = model.cache(B, 32)
    together.used = torch.zeros(B, dtype=torch.long)
    for row, start in enumerate(starts):
        part = together.part(slice(row, row + 1), used=0)
        if start:
            model(x[row : row + 1, :start], part)
        together.used[row] = start
    outputs = []
    for size in blocks:
        rows = together.used[:, None] + torch.arange(size)
        outputs.append(model(x[torch.arange(B)[:, None], rows], together))
    assert together.used.tolist() == [start + sum(blocks) for start in starts]
    for row, start in enumerate(starts):
        expected = model(x[row : row + 1, : start + sum(blocks)])[0, start:]
        torch.testing.assert_close(torch.cat(outputs, 1)[row], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_snapshot_goes_on_in_another_place():
    model = Transformer(models.transformer_config(KINDS[2] | dict(n_head=4, n_kv_head=2, d_model=32, d_ff=48))).double()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    one, two = model.cache(1, 9), model.cache(3, 12)
    for memory in two.memory:
        memory.normal_()  # of an utterance before
    model(x[:, :5], one)
    kept = one.snapshot()
    expected = model(x[:, 5:], one)
    place = two.part(slice(1, 2), used=0)
    place.restore(kept)
    assert place.used == 5 and isinstance(place, Cache)
    torch.testing.assert_close(model(x[:, 5:], place), expected, rtol=1e-9, atol=1e-9)
    place.clear()
    torch.testing.assert_close(model(x, place), model(x), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# a step does not look


def steps_without_values(family, draw, **how):
    """Three steps on the meta device, whose tensors have shapes and no values."""
    model = FAMILIES[family]().eval().to("meta")
    stage = model.stage(2 - bool(how), 40, 5, draw=draw, **how)
    stage.cache.used += 7
    for _ in range(3):
        model.step(stage)


@pytest.mark.parametrize("family", [name for name in FAMILIES if "nar" not in name])
@pytest.mark.parametrize("draw", [GREEDY, PENALTY, dict(top_p=0.8, min_p=0.1)], ids=",".join)
def test_a_step_never_looks_at_values(family, draw):
    """So that it can be a CUDA graph: any .item() and any size that depends on values would raise here."""
    steps_without_values(family, draw)


def test_a_look_at_values_is_found():
    """Guesses are compared with the codes by the host."""
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
        steps_without_values("csm", DRAW, ahead=2)

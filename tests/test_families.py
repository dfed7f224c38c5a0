"""What every family of model.py promises, tested on all of them alike; and that the contract check finds each fault."""

from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from helpers import batch_of, gradients, tiny, tiny_kani, tiny_valle, tiny_xtts

import model as models
import weights
from model import ARCHS, contract_check

SMALL = {
    "csm": tiny, "kani": tiny_kani, "xtts": tiny_xtts, "valle-ar": partial(tiny_valle, mode="ar"),
    "valle-nar": partial(tiny_valle, mode="nar"), "valle-ar+nar": partial(tiny_valle, mode="ar+nar"),
}  # fmt: skip
SPARE = {"csm": 3, "kani": 1, "xtts": 2, "valle": 1}  # classes beyond the codes
# a field of each config that may differ from the checkpoint's
FREE = {
    "csm": ("decoder_fraction", 0.5), "kani": ("frame_dropout", 0.5), "xtts": ("text_loss_weight", 0.5),
    "valle": ("rounds", 3),
}  # fmt: skip
WIDE = dict(n_head=8, n_kv_head=8)
VARIANTS = [
    ("csm", {}), ("csm", dict(stop="zeros", backbone=dict(dropout=0.5))),
    ("kani", dict(K=1)), ("kani", dict(K=3, drop_repeats=True)),
    ("kani", dict(K=3, loss_on="codebook", backbone=dict(dropout=0.5))),
    ("kani", dict(K=3, loss_on="audio", first_special=33, vocab_size=120)),
    ("kani", dict(K=3, audio_step=0.3, speaker_size=6, backbone=dict(rotation_speed=(0.1, 2.0)))),
    ("xtts", {}), ("xtts", dict(dropout=0.5, hide_text_stop=True)),
    ("valle-ar", {}), ("valle-ar", dict(text_bos=-1, text_eos=-1, backbone=dict(dropout=0.5))),
    ("valle-nar", {}), ("valle-nar", dict(segmented_mask=True, shared_heads=True)), ("valle-nar", dict(guidance=2.0)),
    ("valle-nar", dict(level_attention=True, backbone=WIDE)),
    ("valle-ar+nar", dict(speaks="ar")), ("valle-ar+nar", dict(speaks="nar", guidance=2.0)),
]  # fmt: skip
variants = pytest.mark.parametrize("family, options", VARIANTS, ids=lambda x: x if isinstance(x, str) else ",".join(x))


def utterance(model, n=7, T=12, seed=0):
    """text ids (n,), codes (T, K), and {"reference": (R, M)} where the model takes a voice."""
    rng = np.random.default_rng(seed)
    c = model.config
    side = {}
    if model.reference:
        shape = (1, c.speaker_size) if model.reference == "vector" else (9, c.reference_bands)
        side["reference"] = torch.from_numpy(rng.standard_normal(shape)).float()
    return rng.integers(3, 30, n), rng.integers(0, c.codebook_size, (T, c.n_codebooks)), side


def batch(model, *utterances, width=0):
    """The arguments of forward for some utterances, with at least `width` rows."""
    rows = batch_of(model, *((text, codes) for text, codes, _ in utterances), width=width)
    return *rows, *([torch.stack([side["reference"] for *_, side in utterances])] if model.reference else [])


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_contract_holds(family, options, dtype):
    model = SMALL[family](**options).to(dtype).train()
    c = model.config
    text, codes, side = utterance(model)
    report = contract_check(model, text, codes, **side)
    assert model.training and len(report["loss_at_shift"]) == 3
    assert report["ln_v"] == pytest.approx(np.log(c.codebook_size + SPARE[c.arch]))
    if not (dtype == torch.bfloat16 and family.endswith("nar")):  # guidance subtracts what is rounded
        assert report["max_difference"] < {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 1}[dtype]
    for T in (1, 2, 3):
        contract_check(model, text[:2], codes[:T], **side)


@variants
def test_right_padding_changes_nothing(family, options):
    model = SMALL[family](**options).double().eval()
    drawn = torch.rand(80) < 0.6
    if family.endswith("nar"):
        model.masked = lambda spoken: spoken & drawn[: spoken.shape[1]]
    utterances = [utterance(model, *size) for size in ((5, 9, 0), (3, 4, 1), (8, 2, 2))]
    results = []
    for width in (0, min(model.max_rows, 80)):
        model.zero_grad()
        loss, stats = model(*batch(model, *utterances, width=width))
        loss.backward()
        results.append([loss, *gradients(model).values()])
    torch.testing.assert_close(*results)
    each = [model(*batch(model, alone))[1] for alone in utterances]
    for name in ("loss_by_codebook", "accuracy_by_codebook", "c0_accuracy"):  # they add up over batches
        whole = stats[name]
        parts = zip(*(stats[name] for stats in each), strict=True)
        torch.testing.assert_close([torch.as_tensor(sum(part), dtype=torch.float64) for part in parts],
                                   [torch.as_tensor(x, dtype=torch.float64) for x in whole])  # fmt: skip


@variants
def test_checkpoint_round_trip(family, options, tmp_path):
    model = SMALL[family](**options)
    checkpoint = {"arch": model.config.arch, "model_config": asdict(model.config), "model": model.state_dict()}
    weights.save_checkpoint(tmp_path / "x.pt", checkpoint)
    again = weights.from_pretrained(tmp_path / "x.pt")
    assert type(again) is type(model) and again.config == model.config and not again.training
    given = batch(model.eval(), utterance(model))
    assert torch.equal(again(*given)[0], model(*given)[0])
    key, value = FREE[model.config.arch]
    assert getattr(weights.from_pretrained(tmp_path / "x.pt", **{key: value}).config, key) == value


# ---------------------------------------------------------------------------------------------------------------------
# faults, each of which the contract check must find


def while_speaking(model, owner, name, change):
    """Replace the method owner.name by change(method) while the model generates, and only then."""
    whole, generate = getattr(owner, name), model.generate

    def speak(*given, **options):
        setattr(owner, name, change(whole))
        try:
            return (yield from generate(*given, **options))
        finally:
            setattr(owner, name, whole)

    model.generate = speak


def starts_a_row_early(model):
    """Training begins to speak one row later than generation."""
    whole = model.layout

    def layout(text, codes=None, *more, **options):
        tokens, segment = whole(text, codes, *more, **options)
        return (tokens, segment) if codes is not None else (tokens[:-1], segment[:-1])

    model.layout = layout


def forgets_a_text_id(model):
    """Generation drops the last text id."""
    while_speaking(model, model, "layout", lambda whole: lambda text, *more, **how: whole(text[:-1], *more, **how))


def leaves_out_the_end_of_text(model):
    """Training lays out a text without its end."""
    whole = model.layout

    def layout(text, codes=None, *more, **options):
        tokens, segment = whole(text, codes, *more, **options)
        kept = np.arange(len(tokens)) != (len(text) + 1 if codes is not None else -1)
        return tokens[kept], segment[kept]

    model.layout = layout


def takes_each_row_for_the_first(model):
    """The cache does not grow."""
    def change(forward):
        def first(x, cache=None, *more, **options):
            if cache is not None and x.shape[1] == 1:
                cache.used = 0
            return forward(x, cache, *more, **options)

        return first

    while_speaking(model, model.backbone, "forward", change)


def forgets_what_came_in_last(model):
    """The cache keeps keys and values, but not the inputs of short convolutions."""
    def change(forward):
        def forget(x, cache=None, *more, **options):
            if cache is not None and x.shape[1] == 1:
                for letter, memory in zip(model.config.backbone.layers, cache.memory, strict=True):
                    if letter == "c":
                        memory.zero_()
            return forward(x, cache, *more, **options)

        return forget

    while_speaking(model, model.backbone, "forward", change)


def keeps_the_last_frame_in_the_depth_cache(model):
    """The depth decoder's cache is not emptied between frames."""
    kept = []

    def change(forward):
        def stale(x, cache):
            if x.shape[1] > 1:  # the first codes of a frame
                cache.used = min(len(kept), 1)
                kept.append(x)
            return forward(x, cache)

        return stale

    while_speaking(model, model.decoder, "forward", change)


def embeds_in_another_table(model):
    """Generation embeds the codes it chose in another codebook's table."""
    other = model.offset.roll(1) - model.offset

    def change(embed):
        return lambda rows: embed(rows + other if rows.shape == (1, len(other)) else rows)

    while_speaking(model, model.audio_embedding, "forward", change)


def offers_the_next_codebook(model):
    while_speaking(model, model, "head_weights", lambda whole: lambda: [*whole()[1:], whole()[0]])


def hears_nothing(model):
    """Generation takes no notice of the recording."""
    while_speaking(model, model, "voice_latents", lambda whole: lambda heard: whole(torch.zeros_like(heard)))


def counts_codes_anew(model):
    """Generation counts the codes from 0 on again after the start code."""
    while_speaking(model, model.code_positions, "forward", lambda look: lambda place: look((place - 1).clamp(min=0)))


def counts_frames_from_one(model):
    def change(step):
        def late(stage):
            step(stage)
            stage.where += 1

        return late

    while_speaking(model, model, "step", change)


def knows_the_end(model):
    """Frame by frame, the positions of the text depend on a length that only training knows."""
    whole = model.positions

    def positions(tokens, segment):
        model.now = "nar"
        places = whole(tokens, segment)
        model.now = None
        return places

    model.positions = positions


def masks_with_the_stop(model):
    """Generation begins from frames of the stop class instead of masks."""
    def change(whole):
        V = model.config.codebook_size
        return lambda tokens, segment: whole(tokens.where(tokens != V + 1, V), segment)

    while_speaking(model, model, "frame_logits", change)


def mixes_levels(model):
    while_speaking(model, model, "frame_logits", lambda whole: lambda *rows: whole(*rows).roll(1, 1))


def leaves_out_a_frame(model):
    def change(seat):
        return lambda *given, frames, **options: seat(*given, frames=frames - 1, **options)

    while_speaking(model, model, "seat", change)


CAUSAL = ("csm", "kani", "xtts", "valle-ar")
FAULTS = [
    *((starts_a_row_early, family) for family in CAUSAL), *((forgets_a_text_id, family) for family in SMALL),
    *((takes_each_row_for_the_first, family) for family in CAUSAL), (leaves_out_the_end_of_text, "xtts"),
    (forgets_what_came_in_last, "kani"), (offers_the_next_codebook, "kani"),
    (keeps_the_last_frame_in_the_depth_cache, "csm"), (embeds_in_another_table, "csm"),
    (hears_nothing, "xtts"), (counts_codes_anew, "xtts"), (counts_frames_from_one, "valle-ar"),
    (knows_the_end, "valle-ar"), (masks_with_the_stop, "valle-nar"), (mixes_levels, "valle-nar"),
    (leaves_out_a_frame, "valle-nar"), (counts_frames_from_one, "valle-ar+nar"), (masks_with_the_stop, "valle-ar+nar"),
]  # fmt: skip


FRESH = [case for case in FAULTS if not case[1].startswith("valle")]  # whose fresh logits hardly need other rows


@pytest.mark.parametrize("fault, family, fresh", [
    *((*case, False) for case in FAULTS), *((*case, True) for case in FRESH),
])  # fmt: skip
def test_contract_check_finds(fault, family, fresh):
    model = SMALL[family](**({"stretched_text": True} if fault is knows_the_end else {}))
    if fresh:
        models.init_weights(model)
    fault(model)
    text, codes, side = utterance(model)
    with pytest.raises(ValueError, match="check failed: generation and teacher forcing differ") as error:
        contract_check(model, text, codes, **side)
    assert "\n" not in str(error.value)


def test_every_family_is_tested():
    assert {family.split("-")[0] for family in SMALL} == set(ARCHS) == set(SPARE)
    assert all(SMALL[family]().causal == (family in CAUSAL) for family in SMALL)

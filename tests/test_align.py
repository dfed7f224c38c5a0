"""Words of frames, from attention: made by hand, of any shape, and that of small models."""

import numpy as np
import pytest
import torch
from helpers import noise, tiny, tiny_kani, tiny_valle, tiny_xtts, utterance
from hypothesis import given
from hypothesis import strategies as st

from parts.align import align, clarity, shares, timeliness, walk

USUAL = 4.0  # frames of a word


def looking(durations, sharp=0.9, ahead=0, heads=6, seed=0):
    """Attention (heads, T, W) to words of these durations in frames: head 2 looks at the spoken word, or so many words
    ahead, the others at random."""
    rng = np.random.default_rng(seed)
    W = len(durations)
    word = np.minimum(np.repeat(np.arange(W), durations) + ahead, W - 1)
    attention = rng.dirichlet(np.ones(W), (heads, len(word)))
    attention[2] = (1 - sharp) / W
    attention[2, np.arange(len(word)), word] += sharp
    return attention


def faults(attention, **how):
    track = align(attention)
    usual = np.full(attention.shape[2], USUAL)
    return track.skipped(usual), track.repeated(usual, **how)


def test_words_have_their_frames():
    track = align(looking([3, 5, 4, 6]))
    assert track.path.tolist() == [0] * 3 + [1] * 5 + [2] * 4 + [3] * 6
    assert track.spans().tolist() == [[0.5, 3.5], [3.5, 8.5], [8.5, 12.5], [12.5, 18]]
    assert track.clarity > 0.7
    assert align(np.ones((1, 5, 1))).path.tolist() == [0] * 5
    assert align(np.ones((1, 1, 1))).spans().tolist() == [[0.5, 1]]


def test_a_frame_that_looks_elsewhere_changes_nothing():
    attention = looking([4, 4, 4, 4, 4])
    attention[2, 6] = [0, 0, 0, 1, 0]  # in the midst of the second word
    assert align(attention).path.tolist() == np.repeat(range(5), 4).tolist()


def test_a_head_that_looks_ahead_is_not_taken():
    attention = looking([4, 4, 4, 4, 4])
    attention[4] = looking([4, 4, 4, 4, 4], sharp=1.0, ahead=1)[2]
    assert align(attention).path.tolist() == np.repeat(range(5), 4).tolist()
    assert timeliness(np.repeat(range(5), 4), 5) == 1 and timeliness(walk(shares(attention[4:5]))[0], 5) < 0.5


def test_a_head_at_one_word_alone_is_not_clear():
    attention = np.full((1, 12, 3), 0.01)
    attention[0, :, 1] = 0.98
    assert align(attention).clarity < 0.4 and align(np.full((1, 12, 3), 1 / 3)).clarity < 0.2
    assert faults(attention) == ([], []) or align(attention).clarity >= 0.2


def test_skipped_words_are_told():
    assert faults(looking([4] * 6)) == ([], [])
    assert faults(looking([4, 4, 0, 4, 4, 4])) == ([2], [])
    assert faults(looking([4, 4, 4, 4, 4, 0])) == ([5], [])
    assert faults(looking([4, 0, 0, 4, 4, 4])) == ([1, 2], [])
    assert faults(looking([4, 4, 0, 4, 4, 4], sharp=0.2)) == ([], [])  # not clear: nothing is said
    track = align(looking([4, 4, 0, 4]))
    assert track.skipped([4, 4, 1, 4]) == []  # so short a word may go unnoticed
    assert track.spans()[2].tolist() == [8.5, 8.5]


def test_words_that_take_too_long_are_told():
    attention = looking([4, 4, 9, 4])
    assert faults(attention) == ([], [2])
    assert faults(attention, sounding=np.arange(21) < 15) == ([], [])  # half of it is a pause


def test_what_is_no_attention_is_refused():
    for shape in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        with pytest.raises(ValueError, match="has no heads, frames or words"):
            align(np.zeros(shape))


def slow_walk(weights, skip):
    """`walk` of one head, step by step."""
    T, W = weights.shape
    gain = np.log(np.maximum(weights, 0.01))
    best = {(0, j): (gain[0, j] - skip * j, [j]) for j in range(W)}
    for t in range(1, T):
        for j in range(W):
            ways = [(best[t - 1, i][0] - skip * max(0, j - i - 1), best[t - 1, i][1]) for i in range(j + 1)]
            score, path = max(ways, key=lambda way: way[0])
            best[t, j] = score + gain[t, j], [*path, j]
    return max(best[T - 1, j][0] - skip * (W - 1 - j) for j in range(W))


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 12), st.integers(1, 6), st.floats(0, 5))
def test_a_path_is_the_best_one(seed, H, T, W, skip):
    weights = np.random.default_rng(seed).dirichlet(np.full(W, 0.3), (H, T))
    for x, path in zip(weights, walk(weights, skip), strict=True):
        assert (np.diff(path) >= 0).all()
        left_out = np.diff([-1, *path, W]) - 1
        score = np.log(np.maximum(x[np.arange(T), path], 0.01)).sum() - skip * left_out.clip(0).sum()
        assert score == pytest.approx(slow_walk(x, skip))


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 30), st.integers(1, 9))
def test_any_attention_has_a_track(seed, H, T, W):
    rng = np.random.default_rng(seed)
    attention = rng.dirichlet(np.full(W, 0.3), (H, T)).astype(np.float32) * rng.random((H, T, 1), np.float32)
    track = align(attention)
    spans = track.spans()
    assert len(track.path) == T and (np.diff(track.path) >= 0).all() and 0 <= track.clarity <= 1
    assert (np.diff(spans.ravel()) >= 0).all() and spans.min() >= 0.5 and spans.max() <= T
    assert np.array_equal(align(0.5 * attention).path, track.path)  # a power of two: the same digits
    assert np.array_equal(align(np.concatenate([attention, np.zeros_like(attention)])).path, track.path)
    assert clarity(attention[0], track.path) <= 1 + 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# the attention of a model

FAMILIES = {
    "csm": tiny, "joined": lambda: tiny(prompt_style="joined"), "kani": tiny_kani,
    "kani1": lambda: tiny_kani(1, backbone={"layers": "aaaa"}), "xtts": tiny_xtts, "ar": lambda: tiny_valle("ar"),
    "kani2": lambda: tiny_kani(speaker_size=7, audio_step=0.25), "nar": lambda: tiny_valle("nar"),
}  # fmt: skip


def attended(family, text, codes, prompted=False, **options):
    model = FAMILIES[family]().eval()
    codes = codes[:, : model.config.n_codebooks]
    side = {}
    if family == "xtts":
        side = {"voice": noise(5, 32)}
    elif family == "kani2":
        side = {"reference": noise(1, 7)}
    if prompted:
        side["prompt"] = [utterance(4, 3, codes.shape[1], seed=9)]
    return model.attention(text, codes, **side, **options)


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_columns_are_those_of_frames_and_words(family, prompted):
    text, codes = utterance(6, 7)
    found = attended(family, text, codes, prompted)
    assert found.shape[1:] == (7, 6) and (found > 0).all() and (found.sum(-1) <= 1 + 1e-5).all()
    if family != "nar":  # a frame is predicted from those before it
        torch.testing.assert_close(attended(family, text, codes[:4], prompted), found[:, :4], atol=1e-5, rtol=1e-4)
        other = codes.copy()
        other[4] = (other[4] + 1) % 16
        changed = (attended(family, text, other, prompted) - found).abs().amax((0, 2))
        assert changed[:4].max() < 1e-5 < changed[5:].min()  # of Kani frame 4 too: its second code reads the first
    if family in ("kani", "kani2"):  # several rows a frame, and a convolution before the first attention
        return
    first = attended(family, np.where(np.arange(6) == 2, text % 20 + 5, text), codes, prompted)[0] / found[0]
    others = first[:, [0, 1, 3, 4, 5]]  # the first layer's keys are those of the words themselves
    torch.testing.assert_close(others, others[:, :1].expand_as(others), atol=1e-3, rtol=1e-3)
    assert (first[:, 2] / others[:, 0] - 1).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_to_words_is_that_to_their_ids(family):
    text, codes = utterance(6, 7)
    ids = attended(family, text, codes)
    words = attended(family, text, codes, owner=[-1, 0, 0, 1, -1, 1])
    torch.testing.assert_close(words, torch.stack([ids[..., 1] + ids[..., 2], ids[..., 3] + ids[..., 5]], -1))


def test_a_model_is_left_as_it_was():
    model = tiny().eval()
    before = set(vars(model.backbone.layers[0].attn))
    with pytest.raises(IndexError):
        model.attention([1, 2], np.full((3, 4), 99))
    assert set(vars(model.backbone.layers[0].attn)) == before and model.backbone.layers[0].attn.watch is None

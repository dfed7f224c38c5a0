"""parts/draw.py: draws follow the softmax of the logits, and depend on these and their key alone."""

import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GREEDY, noise, tiny

from parts.draw import gumbel, mix, penalised, sample_code


def keys(*shape):
    return mix(torch.arange(math.prod(shape)).view(shape))


def draws(logits, n=4000, age=None, **settings):
    age = None if age is None else age.expand(n, -1)
    picked = sample_code(logits.expand(n, -1), keys(n), age, **settings)
    return np.bincount(picked, minlength=len(logits)) / n


def test_temperature():
    logits = torch.tensor([0.5, 2.0, 1.0, -1.0])
    assert sample_code(logits, temperature=0) == 1
    for temperature in (0.5, 1.0, 2.0):
        assert np.allclose(draws(logits, temperature=temperature), (logits / temperature).softmax(0), atol=0.03)


def test_top_k_and_top_p():
    p = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert np.allclose(draws(p.log(), top_k=2), [0, 0.4 / 0.7, 0, 0.3 / 0.7], atol=0.03)
    assert np.allclose(draws(p.log(), top_k=9), p, atol=0.03)
    assert np.allclose(draws(p.log(), top_p=0.65), [0, 0.4 / 0.7, 0, 0.3 / 0.7], atol=0.03)
    assert np.allclose(draws(p.log(), top_p=0.75), [0, 0.4 / 0.9, 0.2 / 0.9, 0.3 / 0.9], atol=0.03)
    assert draws(p.log(), 50, top_p=1e-6)[1] == 1  # at least the likeliest
    assert np.allclose(draws(p.log(), top_k=3, top_p=0.5), [0, 0.4 / 0.7, 0, 0.3 / 0.7], atol=0.03)
    logits = p.log()
    sample_code(logits, top_k=2, top_p=0.5)
    assert torch.equal(logits, p.log())  # what was given stays as it was


def test_many_draws_at_once():
    p = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])
    logits = p.log().expand(4000, 2, 3)
    picked = sample_code(logits, keys(4000, 2))
    assert picked.shape == (4000, 2)
    assert np.allclose(F.one_hot(picked, 3).double().mean(0), p, atol=0.03)
    cut = sample_code(logits, keys(4000, 2), top_p=0.7)
    assert np.allclose(F.one_hot(cut, 3).double().mean(0), [[0, 2 / 3, 1 / 3], [0.625, 0, 0.375]], atol=0.03)
    few = sample_code(logits, keys(4000, 2), top_k=1)
    assert torch.equal(few, logits.argmax(-1)) and torch.equal(few, sample_code(logits, temperature=0))


def test_repetition_penalty():
    logits = torch.tensor([2.0, 1.5, -1.0, -1.1])
    age = torch.tensor([1, 0, 2, 0])
    for penalty in (1.0, 1.2, 2.0):
        expected = torch.tensor([2.0 / penalty, 1.5, -1.0 * penalty, -1.1])
        assert sample_code(logits, None, age, temperature=0, repetition_penalty=penalty) == expected.argmax()
        share = draws(logits, age=age, repetition_penalty=penalty)
        assert np.allclose(share, expected.softmax(0), atol=0.03)
    assert sample_code(logits, temperature=0, repetition_penalty=2.0) == 0
    assert logits[0] == 2.0


def test_a_penalty_that_decays():
    """By the age of a class, which is its own in each row of logits."""
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.1], [4.0, 3.0, 2.0, 1.0]])
    age = torch.tensor([[2, 1, 3, 0], [0, 3, 0, 1]])
    for decay in (0.0, 0.5, 1.0):
        near, two, three = (1 + 2 / n**decay for n in (1, 2, 3))
        expected = torch.tensor([[2 / two, 1.5 / near, -1.0 * three, -1.1], [4, 3 / three, 2, 1 / near]])
        torch.testing.assert_close(penalised(logits, age, 3.0, decay), expected)
        picked = sample_code(logits, None, age, temperature=0, repetition_penalty=3.0, repetition_decay=decay)
        assert torch.equal(picked, expected.argmax(-1))
    assert torch.equal(penalised(logits, 0 * age, 3.0, 1.0), logits)
    assert logits[0, 0] == 2


def test_min_p():
    p = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert np.allclose(draws(p.log(), min_p=0.6), [0, 0.4 / 0.7, 0, 0.3 / 0.7], atol=0.03)
    assert np.allclose(draws(p.log(), min_p=0.4), [0, 0.4 / 0.9, 0.2 / 0.9, 0.3 / 0.9], atol=0.03)
    assert np.allclose(draws(p.log(), min_p=0.2, top_k=2), [0, 0.4 / 0.7, 0, 0.3 / 0.7], atol=0.03)
    assert draws(p.log(), 50, min_p=1.0)[1] == 1
    theirs = pytest.importorskip("transformers").MinPLogitsWarper(min_p=0.4)(None, p.log()[None])[0]
    assert np.allclose(draws(p.log(), min_p=0.4), theirs.softmax(-1), atol=0.03)


@cache
def keys_of(seeds, frames):
    """The keys (S, T, K) of the draws in each of so many frames, of utterances with the seeds 0, 1, ..."""
    stage = tiny().stage(seeds, 1, 1)
    stage.seed.copy_(torch.arange(seeds))
    keys = []
    for frame in range(frames):
        stage.made.fill_(frame)
        stage.begin()
        keys.append(stage.keys.clone())
    return torch.stack(keys, 1)


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """What sample_code draws from, class by class, in float64."""
    x = logits.double().numpy() / temperature
    order = np.argsort(-x)[: top_k or len(x)]
    p = np.exp(x[order] - x[order[0]])
    p /= p.sum()
    kept, total = [], 0.0
    for share in p:
        if total < top_p and share >= min_p * p[0]:
            kept.append(share)
        total += share
    result = np.zeros(len(x))
    result[order[: len(kept)]] = kept / np.sum(kept)
    return result


LOGITS = {
    "steps": torch.arange(16) / 4.0, "normal": 2 * noise(40), "peaked": 8 * noise(40),
    "many": noise(300), "two": torch.tensor([0.0, -3.0]), "barred": torch.tensor([1.0, -math.inf, 0.5, 0.0]),
}  # fmt: skip


@pytest.mark.parametrize("how", [
    dict(), dict(temperature=0.5), dict(temperature=2.0), dict(top_k=5), dict(top_p=0.7), dict(min_p=0.2),
    dict(temperature=0.8, top_k=10, top_p=0.9, min_p=0.05),
], ids=lambda how: ",".join(how) or "plain")  # fmt: skip
@pytest.mark.parametrize("name", LOGITS)
def test_draws_follow_the_softmax(name, how):
    """Pearson's chi-square over 20,000 draws, with the keys of 50 utterances, 100 frames and 4 codebooks."""
    logits, keys = LOGITS[name], keys_of(50, 100).flatten()
    drawn = np.bincount(sample_code(logits.expand(len(keys), -1), keys, **how), minlength=len(logits))
    expected = len(keys) * probabilities(logits, **how)
    assert not drawn[expected == 0].any()
    rare = expected < 5
    counts = np.array([[x[rare].sum(), *x[~rare]] for x in (drawn, expected)])
    counts = counts[:, counts[1] > 0]
    square = ((counts[0] - counts[1]) ** 2 / counts[1]).sum()
    freedom = counts.shape[1] - 1
    assert square <= freedom + 5 * math.sqrt(2 * freedom)


def test_the_numbers_of_two_draws_have_nothing_to_do_with_each_other():
    """Neither in neighbouring seeds, frames, codebooks and classes, nor along the diagonals between them."""
    numbers = gumbel(keys_of(40, 30), torch.arange(20)).double()  # (S, T, K, V)
    assert numbers.isfinite().all() and len(numbers.unique()) > 0.95 * numbers.numel()
    assert abs(numbers.mean() - 0.57722) < 0.02 and abs(numbers.var() - math.pi**2 / 6) < 0.03
    steps = torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * 4).tolist()
    for shift in [step for step in steps if step > [0, 0, 0, 0]] + [[0, 0, 2, 0], [0, 2, 0, 0], [2, 0, 0, 0]]:
        a = numbers[tuple(slice(max(0, s), n + min(0, s)) for s, n in zip(shift, numbers.shape, strict=True))]
        b = numbers[tuple(slice(max(0, -s), n + min(0, -s)) for s, n in zip(shift, numbers.shape, strict=True))]
        likeness = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(likeness) < 4.5 / math.sqrt(a.numel()), shift


def test_a_hash_changes_half_of_the_bits():
    x = torch.arange(2000)
    for bit in range(63):
        changed = mix(x) ^ mix(x ^ (1 << bit))
        counts = torch.stack([(changed >> i) & 1 for i in range(64)]).double().mean(1)  # of each bit of the result
        assert (counts[:63] - 0.5).abs().max() < 0.07 and mix(x).min() >= 0, bit
    keys = keys_of(100, 200)
    assert len(keys.unique()) == keys.numel()


@pytest.mark.parametrize("how", [GREEDY, dict(temperature=0.7), dict(top_k=8), dict(top_p=0.8), dict(min_p=0.1)])
def test_draws_do_not_depend_on_the_type_of_the_logits(how):
    keys = mix(torch.arange(2000))
    exact = (torch.stack([torch.randperm(64) for _ in keys]) - 32) / 8.0  # bfloat16 holds them
    drawn = sample_code(exact, keys, **how)
    assert torch.equal(drawn, sample_code(exact.bfloat16(), keys, **how))
    assert torch.equal(drawn, sample_code(exact.double(), keys, **how))
    if how.keys() - {"temperature"}:
        return  # else rounding may move the border of what is cut
    logits = 2 * noise(2000, 64)
    sums = logits / (how["temperature"] or 1) + (gumbel(keys, torch.arange(64)) if how["temperature"] else 0)
    best = sums.topk(2).values
    clear = best[:, 0] - best[:, 1] > 2 * (logits - logits.bfloat16().float()).abs().amax(1) / (how["temperature"] or 1)
    assert clear.double().mean() > 0.9
    assert torch.equal(sample_code(logits.bfloat16(), keys, **how)[clear], sample_code(logits, keys, **how)[clear])


def test_a_draw_does_not_depend_on_those_beside_it():
    logits, keys = noise(50, 3, 40), mix(torch.arange(150)).view(50, 3)
    drawn = sample_code(logits, keys, top_k=8)
    for i, k in ((0, 0), (17, 2), (49, 1)):
        assert sample_code(logits[i, k], keys[i, k], top_k=8) == drawn[i, k]

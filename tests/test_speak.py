"""The engine: utterances beside each other equal utterances alone, faulty ones are spoken again."""

from collections import deque

import numpy as np
import pytest
import torch
from helpers import noise, tiny, tiny_kani, tiny_valle, tiny_xtts, utterance

import model as models
import speak
from parts.draw import sample_code
from speak import CUT, ENDED, REPEATS, Engine, Utterance

FAMILIES = {
    "csm": tiny, "kani": tiny_kani, "xtts": tiny_xtts,
    "ar": lambda: tiny_valle("ar"), "nar": lambda: tiny_valle("nar"),
}  # fmt: skip
DRAW = dict(temperature=1.0, top_k=8)


def utterances(family, n=7, cap=9):
    side = {"voice": noise(5, 32)} if family == "xtts" else {}
    made = [Utterance(utterance(3 + i % 4, seed=i)[0], cap - i % 3, seed=i, side=dict(side)) for i in range(n)]
    if family not in ("xtts", "nar"):
        for x in made[::2]:
            x.side["prompt"] = [utterance(4, 5, seed=len(x.text))]
    return made


def spoken(engine, lines, **how):
    found = dict(engine.speak(lines, **how))
    return [found[i].frames.tolist() for i in range(len(lines))], found


@pytest.mark.parametrize("family", FAMILIES)
def test_an_utterance_does_not_depend_on_those_beside_it(family):
    model = FAMILIES[family]().eval()
    lines = utterances(family)
    alone = [spoken(Engine(model, 1, DRAW), [x], tries=1)[0][0] for x in lines]
    assert len({str(x) for x in alone}) > 3
    for places in (2, 3, 8):
        assert spoken(Engine(model, places, DRAW), lines, tries=1)[0] == alone
    order = [4, 0, 6, 2, 5, 1, 3]
    assert spoken(Engine(model, 3, DRAW), [lines[i] for i in order], tries=1)[0] == [alone[i] for i in order]


def test_frames_come_as_they_are_made_and_others_follow():
    """Two places, five utterances: never more than two at a time, and each is given out frame by frame."""
    model = tiny(stop="zeros").eval()
    lines = utterances("csm", 5)
    under_way, counts, seen = set(), dict.fromkeys(range(5), 0), []
    for number, _, frames, over in Engine(model, 2, DRAW).run(deque(enumerate(lines))):
        under_way.add(number)
        counts[number] += len(frames)
        assert len(frames) <= 1 and len(under_way) <= 2
        if over:
            under_way.remove(number)
            seen.append(number)
    assert sorted(seen) == list(range(5)) and [counts[i] for i in range(5)] == [x.cap for x in lines]


def test_the_queue_may_grow_while_it_runs():
    """Also by an utterance that needs more room than the stage has."""
    model = tiny(stop="zeros").eval()
    lines = utterances("csm", 4)
    long = Utterance(utterance(20, seed=5)[0], 70, 3)
    queue = deque(enumerate(lines[:2]))
    found = {}
    for number, said in Engine(model, 2, DRAW).follow(queue, tries=1):
        found[number] = said.frames.tolist()
        if number == 0:
            queue += [(2, long), (3, lines[3])]
    assert found[2] == spoken(Engine(model, 1, DRAW), [long], tries=1)[0][0] and len(found[2]) == 70
    assert found[3] == spoken(Engine(model, 1, DRAW), [lines[3]], tries=1)[0][0]


def test_a_voice_is_read_once(monkeypatch):
    model = tiny(stop="zeros").eval()
    prompt = [utterance(6, 9)]
    lines = [Utterance(utterance(4, seed=i)[0], 3, i, {"prompt": prompt}) for i in range(4)]
    expected = [spoken(Engine(model, 1, DRAW), [x], tries=1)[0][0] for x in lines]
    forward, rows = models.Transformer.forward, []
    monkeypatch.setattr(models.Transformer, "forward",
                        lambda self, x, *a, **k: (self is model.backbone and rows.append(x.shape[1])) or forward(self, x, *a, **k))  # fmt: skip # noqa: E501
    engine = Engine(model, 1, DRAW)
    assert [spoken(engine, [x], tries=1)[0][0] for x in lines] == expected
    own = 4 + 2 - 1  # text ids and their marks; the last row is the first step's
    lead = 6 + 2 + 9 + 1
    assert [n for n in rows if n > 1] == [lead, own, own, own, own]


class Stubborn:
    """A model that never ends an utterance with an odd seed."""

    def __init__(self, model):
        self.model = model

    def __call__(self, logits, key, age=None, **draw):
        code = sample_code(logits, key, age, **draw)
        if logits.shape[-1] == 17:  # codebook 0
            stage = self.stage
            code = torch.where((stage.seed[: len(code)] % 2 == 0) & (stage.made[: len(code)] >= 3), 16, code % 16)
        return code


def test_a_missed_stop_is_spoken_again():
    model = tiny().eval()
    engine = Engine(model, 2, DRAW, frame_rate=100)
    stubborn = Stubborn(model)
    engine.how["choose"] = stubborn
    make = model.stage
    model.stage = lambda *a, **k: vars(stubborn).update(stage=make(*a, **k)) or stubborn.stage
    lines = [Utterance(utterance(4, seed=i)[0], 8, i) for i in range(3)]
    found = dict(engine.speak(lines))
    assert [found[i].tries for i in range(3)] == [[[]], [[CUT], []], [[]]]
    assert all(found[i].ended and not found[i].faults and len(found[i].frames) == 3 for i in range(3))
    lines[1].seed = 1
    (said,) = dict(engine.speak(lines[1:2], tries=1)).values()
    assert said.faults == [CUT] and not said.ended and len(said.frames) == 8


def test_the_best_of_all_tries_counts():
    model = tiny(stop="zeros").eval()
    words = iter([["silence", "x"], ["x"], ["x", "y"]])
    asked = []
    judge = lambda number, said: asked.append(said.frames.tolist()) or said.faults.extend(next(words))  # noqa: E731
    (said,) = dict(Engine(model, 1, DRAW).speak([Utterance(utterance(4)[0], 5, 1)], judge, tries=3)).values()
    assert said.faults == [CUT, "x"] and len(said.tries) == 3 and said.frames.tolist() == asked[1]
    assert len({str(x) for x in asked}) == 3
    greedy = Engine(model, 1, dict(temperature=0.0))
    (said,) = dict(greedy.speak([Utterance(utterance(4)[0], 5, 1)], tries=3)).values()
    assert said.tries == [[CUT]]  # another seed would change nothing


@pytest.mark.parametrize("period", [1, 2, 5])
def test_what_repeats_itself_is_stopped_and_cut(period):
    model = tiny(stop="zeros").eval()
    cycle = torch.arange(1, period + 1)

    def choose(logits, key, **draw):
        made = engine.stage.made[: len(logits)]
        return torch.where(made < 7, 1 + made, cycle[made % period])

    engine = Engine(model, 2, DRAW, frame_rate=5.0, choose=choose)
    (said,) = dict(engine.speak([Utterance(utterance(4)[0], 200)], tries=1)).values()
    assert said.faults == [REPEATS] and not said.ended and 7 < len(said.frames) < 30
    engine.how["choose"] = lambda logits, key, **draw: 1 + (engine.stage.made[: len(logits)] * 7 // 3) % 15
    engine.stage = None
    (said,) = dict(engine.speak([Utterance(utterance(4)[0], 30)], tries=1)).values()
    assert said.faults == [CUT]


def test_logits_that_are_not_finite():
    model = tiny().eval()
    model.codebook0_head.data[3] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite"):
        list(Engine(model, 2, DRAW).speak(utterances("csm", 3)))


def test_fewer_codebooks():
    """The first codebooks alone are drawn and fed back; without all of them it is another utterance."""
    model = tiny(stop="zeros").eval()
    line = Utterance(utterance(4)[0], 6, 1)
    few, _ = spoken(Engine(model, 1, DRAW, n_codebooks=2), [line], tries=1)
    all_of_them, _ = spoken(Engine(model, 1, DRAW), [line], tries=1)
    assert np.array(few).shape == (1, 6, 2) and few[0][0] == all_of_them[0][0][:2]
    assert few == spoken(Engine(model, 1, DRAW, n_codebooks=2, ahead=2), [line], tries=1)[0]


def test_over_is_told_once():
    model = tiny(stop="zeros").eval()
    told = [over for *_, over in Engine(model, 3, DRAW).run(deque(enumerate(utterances("csm", 5))))]
    assert [x for x in told if x] == [CUT] * 5 and ENDED not in told
    assert speak.CYCLE < speak.REPETITION

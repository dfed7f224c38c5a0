"""parts/joining.py: pieces of speech as one recording."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import voice
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from parts.audio import longest_silence, read_audio
from parts.joining import join_pieces, joined
from parts.sentences import pause_after

DIGITS = Path(__file__).parents[1] / "data" / "digits"
RATE = 16000
LEAST, MOST = 0.16, 0.2  # seconds of silence at a join beside the pause: 80 ms at each side and the frames at a border


def hiss(seconds, level=0.0003):
    return level * torch.randn(round(seconds * RATE))


def tone(seconds, hertz=200, level=0.3):
    return level * torch.sin(2 * np.pi * hertz * torch.arange(round(seconds * RATE)) / RATE)


def whole(pieces, rate=RATE, **options):
    return torch.cat([*joined(pieces, rate, **options)])


def cut(wav, sizes):
    return wav.split([*sizes, len(wav) - sum(sizes)])


@given(st.data())
def test_blocks_of_any_size_give_the_same_recording(data):
    pieces = []
    for n in range(data.draw(st.integers(1, 3))):
        silences = [hiss(data.draw(st.sampled_from([0, 0.003, 0.1, 0.8, 2]))) for _ in range(3)]
        sounds = [tone(data.draw(st.sampled_from([0, 0.01, 0.3, 1.1])), level=0.3 + 0.1 * n) for _ in range(2)]
        wav = torch.cat([silences[0], sounds[0], silences[1], sounds[1], silences[2]])
        pieces.append((data.draw(st.sampled_from(["a.", "b,", "c\n", "d"])), wav))
    once = [*joined([(text, [wav]) for text, wav in pieces], RATE)]
    expected = torch.cat(once) if once else torch.zeros(0)
    sizes = data.draw(st.lists(st.integers(0, 700), max_size=30))
    blocks = [(text, wav.split(max(1, sizes[0]) if sizes else 5000)) for text, wav in pieces]
    streamed = [*joined(blocks, RATE)]
    assert torch.equal(torch.cat(streamed) if streamed else torch.zeros(0), expected)
    assert all(len(block) for block in streamed)


@given(st.integers(0, 9), st.lists(st.sampled_from([0.0, 0.02, 0.5, 3.0]), min_size=3, max_size=3))
def test_one_piece_stays_as_it_is(seed, silences):
    wav = torch.cat([hiss(silences[0]), voice(0.7, seed), hiss(silences[1]), voice(0.4, seed), hiss(silences[2])])
    assert torch.equal(whole([("One.", [wav])]), wav)


@pytest.mark.parametrize("before, after", [(0, 0), (0.03, 0.3), (0.3, 0.03), (1.5, 1.5), (0.5, 5)])
@pytest.mark.parametrize("text, pause", [("One.", 0.35), ("one,", 0.15), ("One.\n", 0.7)])
def test_silence_becomes_a_pause(before, after, text, pause):
    """Whatever silence the model left: too much, too little, none."""
    wav = whole([(text, [torch.cat([tone(0.5), hiss(before)])]), ("Two.", [torch.cat([hiss(after), tone(0.5, 210)])])])
    assert pause + LEAST / 2 - 0.02 <= longest_silence(wav, RATE) <= pause + MOST
    assert torch.equal(wav[: RATE // 2 - 80], tone(0.5)[:-80])
    assert torch.equal(wav[80 - RATE // 2 :], tone(0.5, 210)[80:])


def test_silence_within_a_piece_stays():
    inner = torch.cat([tone(0.5), hiss(2), tone(0.5)])
    wav = whole([("One.", [hiss(1), inner]), ("Two.", [hiss(1), inner, hiss(1)])])
    assert len(wav) == pytest.approx(RATE * (1 + 3 + 0.35 + 0.16 + 3 + 1), abs=640)
    assert torch.equal(wav[RATE : 4 * RATE - 80], inner[:-80])
    assert torch.equal(wav[-4 * RATE : -RATE], inner)


@pytest.mark.parametrize("kind", ["tones", "voices", "constant"])
def test_joins_do_not_click(kind):
    """No step from sample to sample is larger than within the pieces."""
    pieces = [voice(0.6, n) + 0.2 * (kind == "constant") for n in range(3)]  # a codec may leave a constant
    if kind == "tones":
        pieces = [tone(0.5, hertz).roll(RATE // hertz // 4) for hertz in (150, 333, 700)]  # cut at their peaks
    wav = join_pieces(pieces, RATE, [0.3, 0.1])
    largest = max(piece.diff().abs().max() for piece in pieces)
    assert wav.diff().abs().max() <= 1.02 * largest


def test_a_soft_sound_at_a_border_stays():
    """An f of 150 ms, 42 dB below the vowel: as soft as any in data/digits."""
    f = 10 ** (-42 / 20) * 0.3 / 2**0.5 * torch.randn(round(0.15 * RATE))
    word = torch.cat([f, tone(0.4), f])
    wav = join_pieces([torch.cat([hiss(0.5, 1e-4), word, hiss(0.5, 1e-4)])] * 2, RATE, [0.2])
    places = [n for n in range(len(wav) - len(word)) if wav[n] == word[0] and torch.equal(wav[n : n + len(word)], word)]
    assert len(places) == 2


@pytest.mark.parametrize("name", ["slt", "awb", "rms", "kal16"])
def test_a_join_cuts_nothing_that_is_heard(name):
    """Recorded digits, each between half seconds of nothing: what a join takes of all is 45 dB below them."""
    with open(DIGITS / "recordings.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["voice"] == name][:100:5]
    places = [(int(row["start"]), int(row["start"]) + int(row["length"])) for row in rows]
    digits = [read_audio(DIGITS / f"{name}.ogg", RATE, a / RATE, b / RATE) for a, b in places]
    wav = join_pieces([nn.functional.pad(digit, (RATE // 2, RATE // 2)) for digit in digits], RATE, [0.0] * 19)
    assert longest_silence(wav[RATE // 2 : -RATE // 2], RATE) < 0.3
    assert wav.square().sum() > (1 - 10**-4.5) * sum(digit.square().sum() for digit in digits)


@pytest.mark.parametrize("level", [1.0, 0.01])
def test_the_level_of_a_piece_decides_what_is_silent_in_it(level):
    loud = torch.cat([hiss(0.5), tone(0.5), hiss(0.5)])
    wav = join_pieces([loud, level * loud], RATE, [0.2])
    assert len(wav) == pytest.approx(RATE * (2 + 0.2 + 0.16), abs=640)


def test_long_silence_at_the_start_of_a_piece_goes():
    wav = join_pieces([tone(0.5), torch.cat([hiss(4, 1e-5), tone(0.5)])], RATE, [0.2])
    assert len(wav) == pytest.approx(RATE * (1 + 0.2 + 0.16), abs=640)


def test_pieces_without_sound():
    nothing = torch.zeros(3 * RATE)
    assert torch.equal(join_pieces([nothing], RATE, []), nothing)
    assert len(join_pieces([], RATE, [])) == len(join_pieces([torch.zeros(0)], RATE, [])) == 0
    wav = join_pieces([tone(0.5), nothing, torch.zeros(0), tone(0.5)], RATE, [0.2, 0.2, 0.2])
    assert len(wav) == pytest.approx(RATE * (1 + 3 * (0.2 + 0.08)), abs=1)


def test_a_stream_hands_on_what_it_knows():
    """What has come of the first piece is out at once but for 25 ms; the second piece is not asked for before."""
    asked = []

    def blocks(name):
        for n in range(10):
            asked.append((name, n))
            yield tone(0.1)

    out = 0
    stream = joined(((name, blocks(name)) for name in ("One.", "Two.")), RATE)
    while ("Two.", 0) not in asked:
        out += len(next(stream))
        come = sum(name == "One." for name, _ in asked) * RATE // 10
        assert come == RATE or come - 0.1 * RATE - 0.025 * RATE <= out <= come


@pytest.mark.parametrize("text, seconds", [
    ("One.", 0.35), ("One.\n", 0.7), ("「はい。」", 0.35), ('"Why?"', 0.35), ("(one,)", 0.15), ("one、", 0.15),
    ("እና፣", 0.15), ("that is:", 0.25), ("and —", 0.25), ("نعم؛", 0.35), ("word", 0.05), ("", 0.0), ("« Non. »", 0.35),
])  # fmt: skip
def test_pause_after(text, seconds):
    assert pause_after(text) == seconds


def test_starts_tell_where_the_pieces_are():
    """Each is the place of a whole piece, so that a sound in it is found there, whatever a join cut before it."""
    pieces = [torch.cat([hiss(before, 1e-5), tone(0.4, hertz), hiss(after, 1e-5)])
              for before, hertz, after in ((0.3, 200, 0.5), (0.6, 300, 0.0), (0.0, 400, 0.9))]  # fmt: skip
    starts = []
    wav = whole([("a.", [x]) for x in pieces], starts=starts)
    assert starts[0] == 0 and len(starts) == 3
    for start, (begin, piece) in zip(starts, zip((0.3, 0.6, 0.0), pieces, strict=True), strict=True):
        inside = slice(round((begin + 0.05) * RATE), round((begin + 0.3) * RATE))
        assert torch.equal(wav[start + inside.start : start + inside.stop], piece[inside])
    assert starts[1] != len(pieces[0])

"""parts/captions.py: the times of words as files."""

import json
import os
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parts.captions import captions, clock, spaced, write_json, write_srt


def timed(text, pace=0.3, start=0.0, gap=0.0):
    """The words of a text, one each `pace` seconds, with so much silence at a |."""
    words = []
    for part in text.split("|"):
        for word in part.split():
            words.append((word, round(start, 3), round(start + pace, 3)))
            start += pace
        start += gap
    return words


def lines(words):
    return ["".join(spaced(caption)).strip() for caption in captions(words)]


def read_srt(path):
    """[(start in ms, end in ms, text)] of an SRT file, by its definition."""
    found = []
    for n, block in enumerate(path.read_text(encoding="utf-8").split("\n\n")[:-1], 1):
        number, times, text = block.split("\n")
        assert number == str(n)
        numbers = re.fullmatch(r"(\d\d+):([0-5]\d):([0-5]\d),(\d{3}) --> (\d\d+):([0-5]\d):([0-5]\d),(\d{3})", times)
        a, b, c, d, e, f, g, h = map(int, numbers.groups())
        found.append((((a * 60 + b) * 60 + c) * 1000 + d, ((e * 60 + f) * 60 + g) * 1000 + h, text))
    return found


def test_files(tmp_path):
    words = [("Hello", np.float32(0), 0.31234), ("Dr.", 0.4, 0.5), ("Ruß!", 0.5, 1.0), ("Bye.", 3601.5, 3602)]
    write_srt(tmp_path / "a.srt", words)
    assert (tmp_path / "a.srt").read_text(encoding="utf-8") == (
        "1\n00:00:00,000 --> 00:00:01,000\nHello Dr. Ruß!\n\n2\n01:00:01,500 --> 01:00:02,000\nBye.\n\n"
    )
    write_json(tmp_path / "a.json", words)
    rows = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert rows[0] == {"word": "Hello", "start": 0.0, "end": 0.312}
    assert [row["word"] for row in rows] == ["Hello", "Dr.", "Ruß!", "Bye."]
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.srt"]


WORDS = st.lists(st.tuples(st.text(st.sampled_from("abé.,!? \n一。"), max_size=60), st.floats(0, 3), st.floats(0, 9)))


@given(WORDS)
def test_captions_show_every_word_in_time(tmp_path_factory, drawn):
    words = []
    start = 0.0
    for word, wait, length in drawn:
        start += wait
        words.append((word, start, start + length))
    path = tmp_path_factory.mktemp("srt") / "a.srt"
    write_srt(path, words)
    shown = read_srt(path)
    spoken = [word for word in words if word[0].strip()]
    assert "".join("".join(text for _, _, text in shown).split()) == "".join("".join(w for w, _, _ in spoken).split())
    for (_, end, _), (start, _, _) in zip(shown, shown[1:], strict=False):
        assert end <= start
    for caption in captions(spoken):
        single = len(caption) == 1
        assert single or len("".join(spaced(caption)).strip()) <= 42 and caption[-1][2] - caption[0][1] <= 5


def test_captions_end_with_sentences_and_at_pauses():
    assert lines(timed("We saw Dr. Smith at 5 p.m. there. He left the house at once.")) == [
        "We saw Dr. Smith at 5 p.m. there.", "He left the house at once.",
    ]  # fmt: skip
    assert lines(timed("Yes. No. He left.")) == ["Yes. No. He left."]
    assert lines(timed("Yes. | No. He left.", gap=1.0)) == ["Yes.", "No. He left."]
    assert lines(timed("one two | three four", gap=1.0)) == ["one two", "three four"]
    assert lines(timed("one two | three four", gap=0.3)) == ["one two three four"]


def test_a_long_sentence_is_divided_at_marks_and_pauses():
    assert lines(timed("the quick brown fox, which was old, jumps over the dog")) == [
        "the quick brown fox,", "which was old, jumps over the dog",
    ]  # fmt: skip
    assert lines(timed("nine eight seven six | five four three two one zero one two", gap=0.2)) == [
        "nine eight seven six", "five four three two one zero one two",
    ]  # fmt: skip
    assert lines(timed("one two three four five six", pace=1.2)) == ["one two three", "four five six"]
    assert lines(timed("a" * 50 + " b")) == ["a" * 50, "b"]


def test_scripts_without_spaces_have_none():
    assert lines(timed("他 说 ： 好 。 3 ok")) == ["他说：好。 3 ok"]


@pytest.mark.parametrize("words", [
    [("a", 1.0, 0.5)], [("a", 1, 2), ("b", 0.5, 3)], [("a", -0.1, 1)], [("a", 0, float("inf"))],
    [("a", float("nan"), 1)],
])  # fmt: skip
@pytest.mark.parametrize("write", [write_json, write_srt])
def test_times_out_of_order_are_refused(write, words, tmp_path):
    with pytest.raises(ValueError, match=f"the word '{words[-1][0]}' cannot last from"):
        write(tmp_path / "a", words)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("seconds, text", [
    (0, "00:00:00,000"), (59.9996, "00:01:00,000"), (3599.9994, "00:59:59,999"), (360000.0, "100:00:00,000"),
])  # fmt: skip
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_no_words(tmp_path):
    write_srt(tmp_path / "a.srt", [(" ", 0, 1)])
    write_json(tmp_path / "a.json", [])
    assert (tmp_path / "a.srt").read_text() == ""
    assert json.loads((tmp_path / "a.json").read_text()) == []


def test_thousands_of_words_without_a_mark():
    assert sum(map(len, captions(timed("one " * 20_000)))) == 20_000

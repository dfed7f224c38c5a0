"""Words of a text, and the words of a tokenizer's ids."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parts.text import HuggingFace, SentencePiece, train_tokenizer, words_of

TEXTS = ["[slt] one two three, four", "oné  two", "one—two \u65e5\u672c\u8a9e", " one", "", "...", "two "]


def tokenizers():
    tokens = pytest.importorskip("tokenizers")
    pieces = ["[UNK]", "[SPACE]", *map(chr, range(33, 127)), "one", "tw", "thr", "\u00e9", "\u2014"]
    spec = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "", "max_input_chars_per_word": 99,
            "vocab": {piece: i for i, piece in enumerate(pieces)}}  # fmt: skip
    added = {"content": "[SPACE]", "id": 1, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}  # fmt: skip
    blank = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None,
             "post_processor": None, "decoder": None}  # fmt: skip
    made = json.dumps({**blank, "added_tokens": [added], "model": spec}).encode()
    assert tokens.Tokenizer.from_buffer(made)
    return [SentencePiece(train_tokenizer(["[slt] one two three four"] * 3, 290, ["[slt]"])), HuggingFace(made)]


def test_words_have_the_marks_that_follow_them():
    text = 'Hello , world! (no) "a-b" 3.5 ... it\'s end'
    assert [text[i:j] for i, j in words_of(text)] == ["Hello ,", "world!", "(no)", '"a-b"', "3.5 ...", "it's", "end"]
    text = "\u65e5\u672c\u3001\u8a9e ab\u3067\u3059\u3002"
    found = ["\u65e5", "\u672c\u3001", "\u8a9e", "ab", "\u3067", "\u3059\u3002"]
    assert [text[i:j] for i, j in words_of(text)] == found
    assert words_of("one two three", 3, 8) == [(4, 7)] and words_of(" ") == []


@given(st.text(alphabet="ab \u00e9\u65e5\u0e01,.!-\u2014\n"))
def test_every_letter_is_in_one_word(text):
    words = words_of(text)
    inside = [i for begin, end in words for i in range(begin, end)]
    assert len(set(inside)) == len(inside) and {i for i, c in enumerate(text) if not c.isspace()} <= set(inside)
    assert all(not text[begin].isspace() and not text[end - 1].isspace() for begin, end in words)


@pytest.mark.parametrize("text", TEXTS)
def test_spans_are_the_characters_of_the_ids(text):
    for tokenizer in tokenizers():
        ids = tokenizer.encode(text)
        spans = tokenizer.spans(text)
        assert len(spans) == len(ids) and all(0 <= i <= j <= len(text) for i, j in spans)
        assert all(a[0] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
        pieces = {tokenizer.piece(n): text[i:j] for n, (i, j) in zip(ids, spans, strict=True)}
        for piece in ("one", "\u2581one", "[slt]"):
            assert pieces.get(piece, piece.replace("\u2581", " ")) == piece.replace("\u2581", " ")


def test_ids_belong_to_words():
    text = "[slt] one three two"
    for tokenizer in tokenizers():
        owner = tokenizer.owners(text, words_of(text, 6)).tolist()
        assert [n for n in dict.fromkeys(owner) if n >= 0] == [0, 1, 2] and owner[0] == -1
        for n, word in enumerate(("one", "three", "two")):
            ids = [i for i, own in zip(tokenizer.encode(text), owner, strict=True) if own == n]
            assert tokenizer.decode(ids).strip() == word
    assert tokenizer.owners("", []).tolist() == []

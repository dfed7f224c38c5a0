"""parts/phonemes.py against results of the authors' code. phonemizer, pykakasi and espeak-ng are optional."""

import json
import sys
from pathlib import Path

import pytest

from parts.phonemes import backend, phonemes
from parts.text import HuggingFace

GOLDEN = json.loads((Path(__file__).parent / "golden" / "valle_text.json").read_text(encoding="utf-8"))["texts"]


@pytest.mark.parametrize("language", GOLDEN)
def test_phonemes_are_those_of_the_authors_code(language, espeak):
    if espeak.version()[:2] != (1, 51):
        pytest.skip(f"espeak-ng {espeak.version()}; the results are of 1.51")
    if language == "ja":
        pytest.importorskip("pykakasi")
    for text, expected, _ in GOLDEN[language]:
        assert phonemes(text, language) == expected, text


def test_an_empty_text_has_no_phonemes(espeak):
    assert phonemes("", "en") == ""


def test_every_chinese_is_mandarin(espeak):
    assert phonemes("你好", "zh-cn") == phonemes("你好", "zh")


def test_an_unknown_language_is_named(espeak):
    with pytest.raises(ValueError, match="does not speak language = 'xx'"):
        phonemes("a", "xx")


def test_a_missing_package_is_named(monkeypatch):
    backend.cache_clear()
    monkeypatch.setitem(sys.modules, "phonemizer", None)
    monkeypatch.setitem(sys.modules, "pykakasi", None)
    with pytest.raises(ValueError, match="needs the package phonemizer==3.3.0: pip install phonemizer==3.3.0"):
        phonemes("a", "en")
    with pytest.raises(ValueError, match="needs the package pykakasi: pip install pykakasi"):
        phonemes("a", "ja")


def test_missing_espeak_is_named(monkeypatch):
    phonemizer = pytest.importorskip("phonemizer")
    backend.cache_clear()
    monkeypatch.setattr("phonemizer.backend.EspeakBackend.is_available", classmethod(lambda cls: False))
    with pytest.raises(ValueError, match="needs espeak-ng: apt-get install espeak-ng"):
        phonemes("a", "en")
    monkeypatch.setattr(phonemizer, "__version__", "3.4.0")
    with pytest.raises(ValueError, match="loses text after a decimal number: pip install phonemizer==3.3.0"):
        phonemes("a", "en")


# -----------------------------------------------------------------------------
# the tokenizer

SYMBOLS = {
    "<unk>": 0, "<bos>": 1, "</eos>": 2, "<mask>": 3, " ": 4, "!": 5, '"': 6, "ˇ": 6, ".": 11, "ˉ": 12, "?": 15,
    "i": 23, "k": 25, "h": 22, "m": 27, "o": 29, "\u031e": 29, "p": 30, "q": 31, "ɽ": 32, "s": 33, "u": 35, "w": 37,
    "¿": 43, "ŋ": 47, "ɐ": 48, "ɑ": 49, "ɚ": 53, "ɛ": 54, "ɜ": 55, "ɡ": 57, "ʒ": 69, "ˈ": 72, "_": 81, "”": 81,
    "ˈɛ": 83,
}  # fmt: skip


def test_a_tokenizer_of_phonemes_gives_the_authors_ids():
    """In the form of the authors' file: several symbols have one id, and the template says <eos> for a token </eos>."""
    pytest.importorskip("tokenizers")
    special = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in [("<bos>", 1), ("<eos>", 2)]}
    around = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
              {"SpecialToken": {"id": "<eos>", "type_id": 0}}]  # fmt: skip
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = HuggingFace(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None,
        "decoder": None, "added_tokens": [{"id": i, "content": name, **plain} for name, i in list(SYMBOLS.items())[:4]],
        "post_processor": {"type": "TemplateProcessing", "single": around, "pair": around, "special_tokens": special},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": SYMBOLS, "merges": [["ˈ", "ɛ"]]},
    }, ensure_ascii=False).encode())  # fmt: skip
    known = [(said, ids) for texts in GOLDEN.values() for _, said, ids in texts if not tokenizer.unknown(said)]
    assert len(known) >= 8
    for said, ids in known:
        assert [tokenizer.bos_id, *tokenizer.encode(said), tokenizer.eos_id] == ids  # the layout adds both ends

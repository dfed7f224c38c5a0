"""parts/xtts_text.py against results of the authors' code: all of them equal."""

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parts.xtts_text import RULES, clean, katsu, sentences, split

GOLDEN = json.loads((Path(__file__).parent / "golden" / "xtts_text.json").read_text(encoding="utf-8"))
PACKAGES = {"zh-cn": ["pypinyin"], "ja": ["cutlet", "unidic_lite"], "ko": ["num2words", "hangul_romanize"], "hi": []}


@pytest.mark.parametrize("kind", ["cleaned", "edge"])
@pytest.mark.parametrize("language", GOLDEN["cleaned"])
def test_clean_is_what_the_authors_code_makes_of_a_text(language, kind):
    for package in PACKAGES.get(language, ["num2words"]):
        pytest.importorskip(package)
    for text, expected in GOLDEN[kind][language]:
        assert clean(text, language) == expected, text


@pytest.mark.parametrize("language", GOLDEN["split"])
def test_pieces_are_those_of_the_authors_code(language):
    for case in GOLDEN["split"][language]:
        assert split(case["text"], language, case["limit"]) == case["pieces"]


# what follows are texts for which the authors' code raises


def test_czech_ordinals_are_cardinals():
    pytest.importorskip("num2words")
    assert clean("Skončila 3. v závodě.", "cs") == "skončila tři. v závodě."
    assert clean("Dluží mi 20€.", "cs") == "dluží mi dvacet euro."


@pytest.mark.parametrize("text, words", [
    ("मेरे पास 3 किताबें हैं।", "मेरे पास तीन किताबें हैं।"), ("$20", "डॉलर बीस"), ("12.5%", "बारह दशमलव पाँच प्रतिशत"),
    ("1,25,000", "एक लाख पच्चीस हज़ार"), ("0 000", "शून्य शून्य"), ("15 अगस्त 1947", "पंद्रह अगस्त एक हज़ार नौ सौ सैंतालीस"),
])  # fmt: skip
def test_hindi_numbers(text, words):
    pytest.importorskip("indic_numtowords")
    assert clean(text, "hi") == words


@pytest.mark.parametrize("language", ["en", "de", "pl", "hu", "ar"])
def test_a_number_too_long_is_read_digit_by_digit(language):
    pytest.importorskip("num2words")
    three = clean("3", language)
    assert clean("3" * 5000, language).split() == three.split() * 5000
    assert clean("3" * 400 + ",3", language).split() == three.split() * 401


def test_another_language_has_lower_case_and_single_spaces():
    assert clean(' ሰላም\t"ዓለም"  ABC 5%\n', "am") == "ሰላም ዓለም abc 5%"


# rules of which one language or one text shows little


@pytest.mark.parametrize("language", ["en", "EN", "en-gb"])
def test_a_language_has_no_region(language):
    assert clean("Dr. Who & Co.", language) == "doctor who and company"


def test_an_amount_that_is_no_number_keeps_its_sign():
    pytest.importorskip("num2words")
    assert clean("£5 and 1.2.3€", "en") == "five pounds sterling and one point two.three€"


@pytest.mark.parametrize("number, characters", [
    ("0个", "ling2ge4"), ("10个", "shi2ge4"), ("15个", "shi2wu3ge4"), ("22个", "er4shi2er4ge4"),
    ("105个", "yi4bai3ling2wu3ge4"), ("2000个", "liang3qian1ge4"), ("2000", "er4ling2ling2ling2"),
    ("12000个", "yi1wan4liang3qian1ge4"), ("100000000年", "yi1yi4nian2"), ("1/4", "si4fen1zhi1yi1"),
    ("5％", "bai3fen1zhi1wu3"), ("0.5", "ling2dian3wu3"), ("b2b", "b2b"),
    ("010-62345678", "ling2yi1ling2liu4er4san1si4wu3liu4qi1ba1"),
])  # fmt: skip
def test_chinese_numbers(number, characters):
    pytest.importorskip("pypinyin")
    assert clean(number, "zh") == characters


@pytest.mark.parametrize("language, text, package", [
    ("en", "5", "num2words"), ("en", "$5", "num2words"), ("hi", "5", "indic_numtowords"), ("zh", "你好", "pypinyin"),
    ("ko", "안녕", "hangul_romanize"), ("ja", "こんにちは", "cutlet"),
])  # fmt: skip
def test_a_missing_package_is_named(language, text, package, monkeypatch):
    name = package.replace("_", "-")
    katsu.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"needs the package {name}: pip install {name}"):
        clean(text, language)


def test_no_package_is_needed_without_numbers(monkeypatch):
    for package in ("num2words", "indic_numtowords"):
        monkeypatch.setitem(sys.modules, package, None)
    for language in RULES.keys() - {"zh", "ja", "ko"}:
        assert clean("A  & B", language) != "a & b"


# pieces


@pytest.mark.parametrize("language, text, pieces", [
    ("en", "Mr. Hale left at 3 p.m. by train. He paid $3.50. Why?",
     ["Mr. Hale left at 3 p.m. by train.", "He paid $3.50.", "Why?"]),
    ("en", "Wait... no (really?), yes! It cost 5€. So.", ["Wait... no (really?),", "yes!", "It cost 5€. So."]),
    ("en", "One.Two U.S. three example.com", ["One.", "Two U.S. three example.com"]),
    ("nl", "Goed zo. 's Avonds niet.", ["Goed zo.", "'s Avonds niet."]),
    ("es", "El Sr. Ruiz vino. Se fue.", ["El Sr. Ruiz vino.", "Se fue."]),
    ("zh", "涨了3.75米。好！", ["涨了3.75米。", "好！"]),
    ("am", "ሰላም። እንዴት ነህ?", ["ሰላም።", "እንዴት ነህ?"]),
])  # fmt: skip
def test_sentences(language, text, pieces):
    assert list(sentences(text, language)) == pieces


def test_a_text_shorter_than_the_limit_stays_whole():
    text = "One. Two. " * 10
    assert split(text, "en") == split(text, "am") == [text]
    assert split(text, "zh") == [text[:79], text[80:].strip()]


@given(st.text(st.sampled_from("ab Zß.?!。…\"'«»,-5 \n"), max_size=200), st.sampled_from(["en", "ar", "zh", "am"]),
       st.integers(1, 40))  # fmt: skip
def test_pieces_lose_nothing_and_keep_to_the_limit(text, language, limit):
    pieces = split(text, language, limit)
    assert "".join(re.findall(r"\S", "".join(pieces))) == "".join(re.findall(r"\S", text))
    assert len(text) < limit or all(len(piece.replace(" ", "")) <= limit for piece in pieces)

"""parts/sentences.py: long texts in pieces."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parts.sentences import letters, sentences, split_text

# each text with a | at every place where a sentence ends
HARD = {
    "am": ["ሰላም።| እንዴት ነህ፧| ደህና ነኝ።|አመሰግናለሁ፡፡| ቁጥሩ 3.5 ነው።", "ዶ.ር አበበ መጣ።| ት. በላይ (አዎ።) አለ።"],
    "ar": ["مرحبا.| كيف حالك؟| أنا بخير۔| نعم؛| شكرا!", "وصل د. أحمد.| ثم ذهب (سريعا. جدا.) الى البيت."],
    "de": [
        "Das ist z.B. am 3. Oktober um 10.30 Uhr.| Danach ca. 5 Min. später, d.h. um elf.",
        "Prof. Dr. Müller zahlte 1.000,5 Euro.| Die Nr. 5 usw. blieb.| Ludwig XIV. war da.| Das war's.| „Gut.“",
        "Er wohnt Hauptstr. 5 in Köln.| Am 1. Mai.| Vgl. S. 12.",
        "z. B. Äpfel u. a. Obst.| „Nein.“| Er ging.| Im 19. Jahrhundert.| Es war 1990.| Dann kam er.",
    ],
    "en": [
        'He said "No."| Then left.',
        '"Why?" he asked.| "No!" she said.| (He left.)| Then… rain.',
        "Dr. Smith met J. R. R. Tolkien and George W. Bush at 5 p.m. on Main St. in Boston.| They ate, e.g., fish.",
        "Version v2.0 costs $3.14.| Buy No. 5 at Acme Inc. today!| I said no.| Mr. No. 5 left at 5 p.m.| She stayed.",
        "Wait... what?!| Really?!| Yes...| It was (late. Very late.) and dark.| See fig. 3 in vol. 2, pp. 10.",
        "The U.S. Army came.| He left the U.S.| The end.| So did I.| He lives on Main St.| The house is red.",
        "'Dr. No' (Mr. T. or (vs. B) too).| Mail a.b@c.de.| Thanks!",
        "Visit example.com.| Then see a.b/c?d now.| Yahoo! is big.| MR. SMITH CAME.| Wow!| 😀 Great.",
    ],
    "it, pt, pl": [
        "Il Sig. Rossi, ecc.| Poi no.| A Av. Paulista, 3.| O Sr. Silva.",
        "Pan dr. Nowak, ur. w 1990 r. w Łodzi.| Itd.| On.",
    ],
    "ko": ['안녕하세요.| 3.5점.| "네."| 그래요.'],
    "lower case": ["hello there.| this is dr. smith, e.g. the one.| is it?| yes."],
    "es": ["El Sr. García vive en la Av. 5 de Mayo.| ¿Qué?| ¡No!| Ud. y la Dra. Ruiz pagan 3 EE.UU. hoy.| EE. UU. no."],
    "fr": ["M. Dupont est là.| Mme. Durand aussi.| « Non. »| Puis rien.| Quoi ?| Non !| J.-C. Petit, env. 3 m."],
    "hi": ["नमस्ते।| आप कैसे हैं?| डॉ. शर्मा यहाँ हैं।| अ. ब. वर्मा नहीं॥"],
    "hy": ["Բարեւ։| Ինչպե՞ս ես։"],
    "ja": ["「はい。」と彼は言った。| そして去った！| 3.14です。|本当（多分。）ですか？|ええ……そうです。"],
    "km, my, bo": ["សួស្តី។| អរគុណ៕", "မင်္ဂလာပါ။| ကျေးဇူး။", "བཀྲ་ཤིས།| བདེ་ལེགས།"],
    "ru": ["Он родился в 1990 г. в Москве.| И т.д. и т.п.| Ул. Ленина, д. 5, т.е. там.| А. С. Пушкин и др. поэты."],
    "zh": ['他说：“不。”|然后离开了。|真的吗？！|是的……好（好。）吧！|他说："好。"|她说：3.5。'],
}
TEXTS = [pytest.param(text, id=f"{language}{n}") for language in HARD for n, text in enumerate(HARD[language])]


@pytest.mark.parametrize("text", TEXTS)
def test_sentences(text):
    assert [sentence.strip() for sentence in sentences(text.replace("|", ""))] == [s.strip() for s in text.split("|")]


def squeezed(text):
    return "".join(text.split())


CHARACTERS = [*"abIéZ5.,;:!?…—\"'()«»。，「」እ።፣م؟،।각\n\t\xa0  ", "e\u0301", "क्षि", "👩\u200d👩🏽", "🇪🇹a", "ᄀ\u1161"]
SAMPLE = st.lists(st.sampled_from(CHARACTERS), max_size=120).map("".join)


@given(SAMPLE, st.integers(1, 60), st.integers(1, 100), st.integers(0, 30))
def test_pieces_are_the_whole_text_and_fit(text, most, pleasant, short):
    def fits(piece):
        assert piece == piece.strip() != ""
        return len(piece) <= most + 8  # the longest of these characters has parts

    pieces = split_text(text, fits, pleasant, short)
    assert squeezed("".join(pieces)) == squeezed(text)
    assert all(fits(piece.removesuffix("\n")) for piece in pieces)
    divided = len(text) > most + 8 or letters(text) > pleasant or re.search(r"\n\s*\n|[.!?。።؟।…]", text)
    assert divided or len(pieces) <= 1


@given(SAMPLE)
def test_no_piece_ends_within_a_character(text):
    regex = pytest.importorskip("regex")
    text = squeezed(text)
    pieces = split_text(text, lambda piece: len(regex.findall(r"\X", piece)) <= 2, pleasant=0)
    borders = set(itertools.accumulate(map(len, regex.findall(r"\X", text))))
    assert borders.issuperset(itertools.accumulate(map(len, pieces)))


def test_a_character_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="'e\u0301' alone is too long"):
        split_text("e\u0301e", lambda piece: piece == "e")


def test_a_text_without_words_has_no_pieces():
    assert split_text("", len) == split_text(" \n\n\t\n ", len) == []


def test_paragraphs_are_pieces_and_end_in_a_line_break():
    text = "Chapter 1\n\nHe came,\nhe saw.\r\n \r\nHe  left.\n\n"
    assert split_text(text, lambda piece: True) == ["Chapter 1\n", "He came, he saw.\n", "He left."]


def test_short_sentences_are_put_together():
    assert split_text("One. " * 100, lambda piece: True) == [("One. " * n).strip() for n in (44, 44, 12)]
    assert split_text("Yes. " + "a" * 198 + ". No.", lambda piece: True) == ["Yes. " + "a" * 198 + ". No."]
    assert split_text("Yes. " + "a" * 198 + ".", lambda piece: len(piece) < 201) == ["Yes.", "a" * 198 + "."]
    assert [len(piece) for piece in split_text("一二三四五六七八九。" * 20, lambda piece: True)] == [60, 60, 60, 20]


@pytest.mark.parametrize("most, pieces", [
    (100, ["A long sentence, with commas, and more; it goes on and on:",
           "nobody knows why — and it continues, says Mr. Smith"]),
    (45, ["A long sentence, with commas, and more;", "it goes on and on: nobody knows why —",
          "and it continues, says Mr. Smith"]),
    (25, ["A long sentence,", "with commas, and more;", "it goes on and on:", "nobody knows why —", "and it continues,",
          "says Mr. Smith"]),
    (12, ["A long", "sentence,", "with commas,", "and more;", "it goes", "on and on:", "nobody", "knows why —",
          "and it", "continues,", "says", "Mr. Smith"]),
])  # fmt: skip
def test_a_long_sentence_is_divided_at_the_best_marks(most, pieces):
    assert split_text(" ".join(pieces), lambda piece: len(piece) <= most) == pieces


def test_an_ethiopic_sentence_is_divided_at_its_own_marks():
    text = "ሰላም፡ለዓለም፡ሁሉ፣እንዴት፡ነህ፤ደህና፡ነኝ"
    assert split_text(text, lambda piece: len(piece) <= 20) == ["ሰላም፡ለዓለም፡ሁሉ፣እንዴት፡ነህ፤", "ደህና፡ነኝ"]


@pytest.mark.parametrize("text", [
    "A sentence of some length, as books have them. " * 2000, "." * 10_000, '。"啊' * 3000, "(" * 10_000, "a" * 20_000,
    "( a." * 5000, "a\n " * 20_000, " \n" * 20_000,
], ids=lambda text: text[:5])  # fmt: skip
def test_a_book_is_split_fast(text):
    """What takes longer with the square of the length would take minutes here."""
    pieces = split_text(text, lambda piece: len(piece) <= 300)
    assert squeezed("".join(pieces)) == squeezed(text)

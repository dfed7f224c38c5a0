"""Front ends: from the text that somebody writes to the text that a tokenizer reads.

    none      the text as it is, with its spaces and line breaks, as CSM and Kani read it
    plain     its normal form: Unicode NFC, single spaces
    xtts      numbers, symbols and abbreviations in words, lower case, as XTTS reads it (parts/xtts_text.py)
    phonemes  its sounds, as VALL-E reads it (parts/phonemes.py)

A model speaks with the front end of its training data; one that its authors trained, with that of its family.
"""

from parts.phonemes import phonemes
from parts.text import normalise, parse_format, speakable
from parts.xtts_text import clean

FRONT_ENDS = ("none", "plain", "xtts", "phonemes")


def read_text(text, front_end, language="", lowercase=False):
    """What the tokenizer reads of a text. language: that of the text, such as "en"; xtts and phonemes need it.
    lowercase: "plain" converts to lower case. Characters that no tokenizer takes are dropped, whatever the front end.
    Raises ValueError where a package is missing, and for a language that is unknown."""
    text = speakable(text)
    if front_end == "plain":
        return normalise(text, lowercase)
    if front_end == "xtts":
        return clean(text, language)
    return phonemes(text, language) if front_end == "phonemes" else text


def needs_language(front_end, text_format):
    """Whether the ids of a text depend on its language."""
    return front_end in ("xtts", "phonemes") or any(field == "language" for _, field in parse_format(text_format))


def language_name(text):
    """The name of a language in one spelling: "zh_CN" -> "zh-cn"."""
    return normalise(text, lowercase=True).replace("_", "-")

"""Front ends: from the text that somebody writes to the text that a tokenizer reads.

    none    the text as it is, with its spaces and line breaks
    plain   its normal form: Unicode NFC, single spaces

A model speaks with the front end of its training data; one that its authors trained, with that of its family.
"""

from parts.text import normalise, speakable

FRONT_ENDS = ("none", "plain")


def read_text(text, front_end, language="", lowercase=False):
    """What the tokenizer reads of a text. language: that of the text, such as "en". lowercase: "plain" converts to
    lower case. Characters that no tokenizer takes are dropped, whatever the front end."""
    if front_end == "plain":
        return normalise(text, lowercase)
    return speakable(text)

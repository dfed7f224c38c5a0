"""Text as phonemes, as VALL-E's authors hand it to the tokenizer.

`phonemes` does what emb/g2p.py of e-c-k-e-r/vall-e does, with the same packages: phonemizer lets espeak-ng read the
text, numbers and abbreviations included. Japanese becomes hiragana before, through pykakasi.

The published weights learnt from phonemizer 3.3.0, and espeak-ng 1.51 is the version of that time, as Debian 12 has it.
espeak-ng 1.52 writes fˈɔːɹ for fˈoːɹ in English, fˈʏnf for fˈynf in German, and most Chinese sentences differently.
phonemizer 3.4.0 loses what follows a decimal number, and is refused.
"""

import logging
from functools import lru_cache

from parts.text import package

VOICES = {"en": "en-us", "fr": "fr-fr", "zh": "cmn-latn-pinyin"}  # languages under another name in espeak-ng
TONES = str.maketrans("12345", "ˇˉˊˋ_")  # of Chinese
PHONEMIZER = "phonemizer==3.3.0"


def phonemes(text, language):
    """The phonemes of a text in the International Phonetic Alphabet, with its marks of punctuation.

    language: one of espeak-ng's, such as "en", "en-gb", "de", "ja", "ko"; everything that begins with zh is Mandarin.
    Raises ValueError for an unknown language, and where espeak-ng or a package is missing.
    """
    language = "zh" if language.startswith("zh") else language
    if language == "ja":
        words = package("pykakasi", "Japanese").kakasi().convert(text)
        text = "".join(word["hira"] for word in words)
    said = backend(VOICES.get(language, language)).phonemize([text], strip=True)
    said = said[0] if said else ""  # of an empty text phonemizer gives nothing
    return said.translate(TONES) if language == "zh" else said


@lru_cache
def backend(voice):
    """What reads aloud in a voice of espeak-ng."""
    version = package("phonemizer", "text as phonemes", PHONEMIZER).__version__
    if version == "3.4.0":
        raise ValueError(f"phonemizer {version} loses text after a decimal number: pip install {PHONEMIZER}")
    Espeak = package("phonemizer.backend", "text as phonemes", PHONEMIZER).EspeakBackend
    quiet = logging.getLogger("parts.phonemes")
    quiet.setLevel(logging.ERROR)  # else a warning for each word of another language
    if not Espeak.is_available():
        raise ValueError("text as phonemes needs espeak-ng: apt-get install espeak-ng, or brew install espeak-ng")
    if not Espeak.is_supported_language(voice):
        raise ValueError(f"espeak-ng does not speak language = {voice!r:.60}: espeak-ng --voices lists what it speaks")
    return Espeak(voice, preserve_punctuation=True, with_stress=True, logger=quiet)

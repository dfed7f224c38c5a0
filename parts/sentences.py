"""A long text in pieces of whole sentences that a model can speak.

    for piece in split_text(text, fits):        fits(piece) -> bool: whether the model can take it
        speak(piece.strip())                    the last piece of a paragraph ends in a line break

The rules are the same for all languages, because a text does not say which one it is in. They know the full stops of
the Arabic, Armenian, Burmese, Chinese, Devanagari, Ethiopic, Khmer, Latin and Tibetan scripts, and abbreviations of ten
languages. Where a full stop may belong to an abbreviation, no sentence ends: two sentences in one piece sound right,
half a sentence does not.

These rules are our own. sentencex 1.0 has to know the language, and ends a sentence after "M." in "M. Dupont", after
"Mr." in "Mr. No. 5" and between 「はい。」 and と. pysbd has had no release since 2021, and moves the quotation mark of
。” to the next sentence.
"""

import re
from unicodedata import category, combining

PLEASANT = 200  # letters; sentences are not put together beyond
SHORT = 20  # letters; a model speaks shorter texts badly
LONG_SIGNS = re.compile("[ሀ-፼⺀-鿿가-힣]")  # syllables and words: one takes as long to say as three letters

STOPS = "。｡！？؟۔؛।॥።፧፨։။។៕།༎"  # end a sentence wherever they stand
MARKS = ".!?…‽‼⁇⁈⁉"  # end a sentence before a space
COLONS = "؛፤፥፦；"  # beside ASCII's, here and below
COMMAS = "،、，፣၊"
CLOSING = r"\"'”’»›)\]}）】」』〉》〕"
END = re.compile(rf"(?<![{MARKS}])[{MARKS}]*(?:[{STOPS}]|፡፡|．(?!\d))[{STOPS}{MARKS}]*[{CLOSING}]*(?![、，,])"
                 rf"|(?<![{MARKS}])[{MARKS}]+[{CLOSING}“‘«]*(?= |$)(?: »(?= |$))?")  # fmt: skip
WITHIN = rf"[(（\[][^][()（）]{{,{PLEASANT}}}"  # brackets; a sentence may end with those that it begins with
IN_BRACKETS = re.compile(rf"(?:(?<=[^{STOPS}{MARKS}{CLOSING} ])|(?<=[^{STOPS}{MARKS}{CLOSING} ] )){WITHIN}[])）]"
                         rf"|{WITHIN}?(?=[{STOPS}{MARKS}]*[])）])")  # fmt: skip
LEVELS = [re.compile(level) for level in (  # where a sentence is divided that is too long, from best to worst
    rf"[!?‽]+[{CLOSING}]* |[…{STOPS}]+[{CLOSING}]* ?",
    rf"[;:] |[{COLONS}] ?|：(?!\d) ?| [—–-]+ |— ?|(?<!\d)–(?!\d) ?",
    rf", |[{COMMAS}](?!\d) ?",
    r"(?<![.\d]) (?=[^\W\d])|[\u200b፡་]+ ?",
    " ",
)]  # fmt: skip

ABBREVIATIONS, NUMBERED, FINAL, STARTERS = (set(words.split()) for words in (
    # no sentence ends after one of these and a full stop
    """
    mr mrs ms mx messrs dr drs prof rev fr hon mt ft gen adm col capt lt sgt maj cmdr gov sen rep supt insp univ dept
    approx cf est viz vs ext ca bzw vgl evtl ggf inkl exkl sog geb gest bspw zzgl hr hrn frl dipl ing mag std mio mrd mm
    mme mmes mlle mlles mgr cie env sr sra srta sres dña ud uds vd vds lic gral avda cía aprox ej dra profa exmo exma
    sig dott avv geom egr dhr mevr mw bijv np tzn tzw tj ul inż św ул пер им проф акад тыс млн млрд руб коп см ср гр
    обл вул doç sn bkz डॉ प्रो श्री ur av
    """,
    # nor after one of these before a number
    """
    no nos nr n º num núm núms pp p s art fig figs eq abb kap bd vol sec ch pt av str tel pos ziff abs lv pág págs blz
    стр рис гл кв тел jan feb mar apr jun jul aug sep sept oct nov dec min
    """,
    # but one may end after one of these before a capital
    "etc ecc a.m p.m usw usf itd itp osv enz т.д т.п др пр inc ltd corp jr bros esq ave blvd rd sq",
    # and after initials before one of these
    """
    A After An And As At But By For From He Her His How I If In It Its My Now On Our She So That The Their Then There
    These They This Those To We What When Where While Why With You Your Aber Das Dann Der Die Doch Er Es Ich Im Sie Und
    Wir Elle Elles Et Il Ils Je Mais Nous Puis Vous Ella Luego Pero Una Él А В Вы И Мы На Но Он Она Они Это Я
    """,
))  # fmt: skip
# J., z.B., EE. UU.
INITIALS = re.compile(r"[^\W\d⺀-鿿가-힣]|(?:[^\s.\d@]{1,3}\.)+[^\s.\d@]{1,3}|([A-Z])\1|[Ss]t|[Cc]o")
TAIL = re.compile("[ﾞﾟำຳ\u1160-\u11ff\U0001f3fb-\U0001f3ff]")  # what belongs to the character before it
FLAG = re.compile("[\U0001f1e6-\U0001f1ff]")  # one half
VIRAMA = 9  # the sign between consonants of one syllable
ORDINAL = re.compile(r"(?:^|\b(?:am|ab|beim|bis|das|dem|den|der|des|die|ihr|im|sein|seit|vom|zum|zur) )\W*$", re.I)


def split_text(text, fits, pleasant=PLEASANT, short=SHORT):
    """Pieces of a text in its order: all of it, with single spaces. A piece that ends a paragraph ends in "\\n".

    fits(piece) -> bool: whether a piece can be spoken at once. Sentences that follow each other are one piece while it
    fits and has at most `pleasant` letters; one with fewer than `short` joins its neighbour where that fits. A sentence
    that does not fit is divided in the middle, at a mark, a space or, last, between two characters. Raises ValueError
    where one character does not fit.
    """
    pieces = []
    for paragraph in re.split(r"\n[^\S\n]*\n|\u2029", text):
        paragraph = " ".join(paragraph.split())
        parts = [part for sentence in sentences(paragraph) for part in divide(sentence, fits, short)]
        joined = [piece.strip() for piece in join(parts, fits, pleasant, short)]
        if pieces and joined:
            pieces[-1] += "\n"
        pieces += joined
    return pieces


def pause_after(piece):
    """The seconds of silence that belong between a piece of a text and the next one, by its end."""
    if piece.endswith("\n"):
        return 0.7  # a paragraph ends
    end = piece.rstrip(f"{CLOSING}“‘« ")[-1:]
    if not end:
        return 0.0
    if end in STOPS + MARKS:
        return 0.35
    return 0.25 if end in ";:：—–-" + COLONS else 0.15 if end in "," + COMMAS else 0.05


def letters(text):
    """The length of a text, as far as speech is concerned."""
    return len(text) + 2 * len(LONG_SIGNS.findall(text))


def join(parts, fits, pleasant, short):
    """Put neighbouring parts of a paragraph together."""
    pieces = []
    for part in parts:
        if pieces:
            scrap = min(letters(pieces[-1]), letters(part)) < short
            both = pieces[-1] + part
            if letters(both) <= pleasant + short * scrap and fits(both.strip()):
                pieces[-1] = both
                continue
        pieces.append(part)
    return pieces


def sentences(text):
    """The sentences of a paragraph with single spaces, each with the space that follows it. None ends in brackets."""
    cased = text != text.lower()
    start = 0
    for found in END.finditer(IN_BRACKETS.sub(lambda inside: "x" * len(inside[0]), text)):
        end = found.end()
        if text[end - 1] == '"' and text[end : end + 1].strip() and text.count('"', 0, end) % 2:
            end -= 1  # this mark opens the next sentence
        before = text[max(start, found.start() - 60) : found.start()]
        if ends(before, text[found.start() : end], text[end : end + 60], cased):
            end += text.startswith(" ", end)
            yield text[start:end]
            start = end
    if start < len(text):
        yield text[start:]


def ends(before, stop, after, cased):
    """Whether a sentence ends at a stop between two texts. cased: whether sentences begin with capitals."""
    following = re.match(r"\W*(\w+\.?)|", after)[1] or ""
    if cased and following[:1].islower() or stop[-1] in "」』" and re.match("[ぁ-ゖ]", after):
        return False
    if stop.rstrip(f"{CLOSING}“‘« ") != ".":
        return True
    word = re.search(r"(?:(?!\W)[^\s/–—-]+)?$", before)[0]
    if re.fullmatch(r"\d{1,2}|[IVX]{2,}", word):
        return not ORDINAL.search(before.removesuffix(word))
    initials = INITIALS.fullmatch(word)
    short = word.lower()
    if following[:1].isdigit():
        return not initials and short not in ABBREVIATIONS | NUMBERED and not short.endswith("str")
    if short in FINAL:
        return True
    return word[0].isupper() and following in STARTERS if initials else short not in ABBREVIATIONS


def divide(text, fits, short):
    """A sentence in parts that fit, about as long as each other. Raises ValueError where one character does not fit."""
    if fits(text.strip()):
        return [text]
    for least in (max(1, min(short, len(text) // 4)), 1):
        for level in LEVELS:
            found = [mark.end() for mark in level.finditer(text) if least <= mark.end() <= len(text) - least]
            if found:
                return halves(text, found, fits, short)
    found = [n for n in range(1, len(text)) if separable(text[n - 1], text[n])]
    if not found:
        raise ValueError(f"the text cannot be spoken in pieces: {text.strip()!r:.60} alone is too long")
    return halves(text, found, fits, short)


def halves(text, places, fits, short):
    """Divide a text at the one of these places that is nearest to its middle, and what does not fit again."""
    middle = min(places, key=lambda place: abs(2 * place - len(text)))
    return divide(text[:middle], fits, short) + divide(text[middle:], fits, short)


def separable(before, after):
    """Whether a text may be divided between two characters: no space follows, and they are not one for the reader."""
    if category(after)[0] == "M" or combining(before) == VIRAMA or "Cf" in (category(before), category(after)):
        return False
    return after != " " and not TAIL.match(after) and not (FLAG.match(before) and FLAG.match(after))

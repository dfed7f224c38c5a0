"""Text as XTTS-v2's authors hand it to the tokenizer, and long texts in pieces that the model can speak.

`clean` and `split` do what VoiceBpeTokenizer.preprocess_text and split_sentence do in idiap/coqui-ai-TTS 0.27.2, with
the same packages, because the published weights learnt from such text. Some of its rules surprise a speaker:

- Every ordinal is masculine and in the base case. A number and a full stop make an ordinal in German, even at the end
  of a sentence, in Turkish and in Hungarian. What num2words writes with a capital ("Komma", "Euro") keeps it.
- Portuguese loses the last "e ..." of a whole amount: 45€ is "quarenta". In Arabic every currency is the riyal.
- Thousands are 1,000 in English and Russian and 1.000 in all other languages. 1 000 is two numbers, 1 and 0.
- Of quotes only " is removed. Dates and times have no rules but in Chinese. Japanese keeps its digits and symbols.

It differs where the authors' code raises. Czech "3." is the cardinal number, since num2words has no Czech ordinals.
Hindi numbers come from indic-numtowords, since num2words has none. A number that is too long is read digit by digit.
Text in a language without rules here, such as Amharic, becomes lower case, loses its " and gets single spaces. It also
differs in that `split` cuts no Chinese number at its decimal point.
"""

import re
import textwrap
from dataclasses import dataclass, field
from functools import lru_cache, partial

from parts.text import package


@dataclass(frozen=True)
class Rules:
    """What a language says for what is not a word."""

    limit: int  # characters of a piece of text
    symbols: str = ""  # the words for & @ % # $ £ °
    ordinal: str = ""  # a regular expression for what makes an ordinal of the digits before it
    cents: str = ", "  # what num2words puts between whole units and cents
    thousands: str = "."  # the mark between groups of three digits
    decimals: bool = True  # whether 1.5 or 1,5 is one number
    short: dict = field(default_factory=dict)  # abbreviation -> word
    short_end: str = r"\."  # what has to follow an abbreviation


RULES = {
    "en": Rules(250, "and|at|percent|hash|dollar|pound|degree", "st|nd|rd|th", thousands=",", short=dict(
        mrs="misess", mr="mister", dr="doctor", st="saint", co="company", jr="junior", maj="major", gen="general",
        drs="doctors", rev="reverend", lt="lieutenant", hon="honorable", sgt="sergeant", capt="captain", esq="esquire",
        ltd="limited", col="colonel", ft="fort")),
    "es": Rules(239, "y|arroba|por ciento|numeral|dolar|libra|grados", "[ºªoa]|er", " con ", short=dict(
        sra="señora", sr="señor", dr="doctor", dra="doctora", st="santo", co="compañía", jr="junior", ltd="limitada")),
    "fr": Rules(273, "et|arobase|pour cent|dièse|dollar|livre|degrés", "[ºª]|er|re|e|ème", " et ", short=dict(
        mme="madame", mr="monsieur", dr="docteur", st="saint", co="compagnie", jr="junior", ltd="limitée")),
    "de": Rules(253, "und|at|prozent|raute|dollar|pfund|grad", r"st|nd|rd|th|[ºª]|\.(?=\s|$)", " und ", short=dict(
        fr="frau", dr="doktor", st="sankt", co="firma", jr="junior")),
    "pt": Rules(203, "e|arroba|por cento|cardinal|dólar|libra|graus", "[ºªoa]", " e ", short=dict(
        sra="senhora", sr="senhor", dr="doutor", dra="doutora", st="santo", co="companhia", jr="júnior",
        ltd="limitada")),
    "it": Rules(213, "e|chiocciola|per cento|cancelletto|dollaro|sterlina|gradi", "[º°ªoaie]", " e ", short=dict(
        sig="signore", dr="dottore", st="santo", co="compagnia", jr="junior", ltd="limitata")),
    "pl": Rules(224, "i|małpa|procent|krzyżyk|dolar|funt|stopnie", "[ºª]|st|nd|rd|th", short=dict(
        p="pani", m="pan", dr="doktor", sw="święty", jr="junior")),
    "tr": Rules(226, "ve|at|yüzde|diyez|dolar|sterlin|derece", r"\.|inci|nci|uncu|üncü", decimals=False, short=dict(
        b="bay", byk="büyük", dr="doktor")),
    "ru": Rules(182, "и|собака|процентов|номер|доллар|фунт|градус", "-(?:[йяе]|ое|ье|го)", thousands=",", short={
        "г-жа": "госпожа", "г-н": "господин", "д-р": "доктор"}, short_end=r"\b"),
    "nl": Rules(251, "en|bij|procent|hekje|dollar|pond|graden", "de|ste|e", short=dict(
        dhr="de heer", mevr="mevrouw", dr="dokter", jhr="jonkheer")),
    "cs": Rules(186, "a|na|procento|křížek|dolar|libra|stupně", short=dict(dr="doktor", ing="inženýr", p="pan")),
    "ar": Rules(166, "و|على|في المئة|رقم|دولار|جنيه|درجة", "ون|ين|[ثرى]"),
    "zh": Rules(82, "和|在|百分之|号|美元|英镑|度"),
    "hu": Rules(224, "és|kukac|százalék|kettőskereszt|dollár|font|fok", r"\.|[aeoö]dik|ik", short=dict(
        dr="doktor", b="bácsi", nőv="nővér")),
    "ko": Rules(95, "그리고|에|퍼센트|번호|달러|파운드|도", "번째|[번차째]"),
    "ja": Rules(71),
    "hi": Rules(150, "और|ऐट दी रेट|प्रतिशत|हैश|डॉलर|पाउंड|डिग्री"),
}  # fmt: skip
CURRENCIES = {"£": "GBP", "$": "USD", "€": "EUR"}  # in the order of the authors


def clean(text, language):
    """What the tokenizer of XTTS-v2 reads of a text, without the tag of the language. Of "pt-br" only "pt" counts.

    Raises ValueError where the text needs a package that is not installed: num2words for digits (indic-numtowords in
    Hindi), pypinyin for Chinese, cutlet for Japanese, hangul-romanize for Korean.
    """
    language = base(language)
    if language == "ja":
        return katsu().romaji(text).lower()
    text = text.replace('"', "")
    text = (text.replace("İ", "i") if language == "tr" else text).lower()
    if language in RULES:
        text = chinese_numbers(text) if language == "zh" else numbers(text, language)
        for short, word in RULES[language].short.items():
            text = re.sub(rf"\b{short}{RULES[language].short_end}", word, text)
        words = (f" {word} " for word in RULES[language].symbols.split("|"))
        text = text.translate(dict(zip(map(ord, "&@%#$£°"), words, strict=True)))
    text = " ".join(text.split())
    if language == "zh":
        pypinyin = package("pypinyin", "Chinese")
        return "".join(pypinyin.lazy_pinyin(text, pypinyin.Style.TONE3, neutral_tone_with_five=True))
    if language == "ko":
        rule = package("hangul_romanize.rule", "Korean", "hangul-romanize").academic
        return package("hangul_romanize", "Korean").Transliter(rule).translit(text)
    return text


def base(language):
    """The language without its region: "zh" for "zh-cn"."""
    return language.lower().split("-")[0]


@lru_cache
def katsu():
    """The romaniser of Japanese. It takes seconds to load."""
    return package("cutlet", "Japanese", "cutlet unidic-lite").Cutlet()


# -----------------------------------------------------------------------------
# numbers


def numbers(text, language):
    """A text with amounts, decimals, ordinals and numbers in words."""
    rules = RULES[language]
    # between groups of digits the authors' pattern takes any character for the dot, and removes dots alone
    mark, point = (",", r"\.") if rules.thousands == "," else (".", ",")
    grouped = rf"\b\d{{1,3}}(?:{mark}\d{{3}})*(?:{point}\d+)?\b"
    text = re.sub(grouped, lambda m: m[0].replace(rules.thousands, ""), text)
    lakhs = r"(?<=[0-9]),(?=[0-9]{2,3}(?![0-9]))"  # 1,25,000 in Hindi, which num2words does not know
    text = re.sub(lakhs, "", text) if language == "hi" else amounts(text, language)
    if rules.decimals:
        text = re.sub(r"(?<![0-9])[0-9]+[.,][0-9]+", lambda m: say(m[0].replace(",", "."), language), text)
    if rules.ordinal:
        text = re.sub(rf"(?<![0-9])([0-9]+)(?:{rules.ordinal})", lambda m: say(m[1], language, ordinal=True), text)
    return re.sub("[0-9]+", lambda m: say(m[0], language), text)


def say(number, language, **how):
    """A number, given as digits with at most one point, in words."""
    if language == "hi":
        words = partial(package("indic_numtowords", "a number in Hindi").num2words, lang="hi")
        whole, point, rest = number.partition(".")
        return " ".join([words(whole.lstrip("0") or "0"), *["दशमलव"] * len(point), *map(words, rest)])
    words = partial(package("num2words", "a number").num2words, lang=language)
    try:
        return words(float(number) if "." in number else int(number), **how)
    except Exception:  # what it raises for a number that is too long differs from language to language
        digits = {digit: words(int(digit)) for digit in set(number) - {"."}}
        return " ".join(digits[digit] for digit in number if digit != ".")


def amounts(text, language):
    """A text with amounts of money in words. A currency that num2words does not know in the language, or an amount with
    two points, ends it: the signs of this and the following currencies stay, as with the authors."""
    for sign, currency in CURRENCIES.items():
        found = rf"\{sign}[0-9.,]*[0-9]|(?<![0-9.,])[0-9.,]*[0-9]\{sign}"
        if re.search(found, text):
            num2words = package("num2words", "a number").num2words
            words = partial(num2words, to="currency", currency=currency, lang=language)
            try:
                text = re.sub(found, partial(amount, words=words, cents=RULES[language].cents), text)
            except Exception:  # NotImplementedError, and others from deep inside num2words
                return text
    return text


def amount(found, words, cents):
    """An amount such as $2.50 in words; a whole amount without its cents."""
    value = float(re.sub(r"[^\d.]", "", found[0].replace(",", ".")))
    said = words(value)
    return said.rpartition(cents)[0] or said if value.is_integer() else said


# -----------------------------------------------------------------------------
# Chinese numbers

DIGITS = "零一二三四五六七八九"
UNITS = dict(zip([1, 2, 3, *range(4, 48, 4)], "十百千万亿兆京垓秭穰沟涧正载", strict=True))  # power of ten -> unit
NUMBER = r"\d+(?:\.\d+)?"
MONEY = "亿|千万|百万|[万千百元块角毛分]"
COUNTED = (  # words for what is counted or measured: a long number before one of them is a quantity, else a code
    "[丈世丘丝两个丸代令件伏位冬出刀分刻勺匹升单卮厘双叠口只合名周啖回场块坡堂堆墙壳壶夏夜天头季客家寸对寻尺尾层山岁岭常幢年座张忽户手扎打担"
    "挑捆撮支斗斛斤日旬时春曲更月本条杯板枝根桶棵毫江泡溪炮煲片瓶盆盏盒盘石砣碗碟秋秒程窠笼管箩箱篮簋粒纪线罐网罗群脚腔袋袭课贯贴跳身辆辈道"
    "里针钟钧钱钵铢铺锅锱阙队阵面页顶颗首]|[千微][克米]"
)
PUNCTUATION = r"[!-/:-@\[-`{-~·–—‘’‛-‟…‧、-〃〈-】〔-〟〰〾〿﹏！-－／：-＠［-｀｛-､]"


def chinese_numbers(text):
    """A text with numbers as Chinese characters, and a comma for each mark of punctuation.

    Years, telephone numbers and numbers of four digits and more that count nothing are read digit by digit.
    """
    passes = [
        (r"\D+((?:(?:[089]\d|(?:19|20)\d\d)年)?(?:\d{1,2}月(?:\d{1,2}[日号])?)?)", chinese_date),
        (rf"\D+({NUMBER}[多余几]?(?:{MONEY})(?:\d(?:{MONEY})?)?)", partial(re.sub, NUMBER, lambda m: chinese(m[0]))),
        (r"\D((?:\+?86 ?)?1(?:[38]\d|5[0-35-9]|7[678]|9[89])\d{8})\D", one_by_one),  # mobile
        (r"\D((?:0(?:10|2[1-3]|[3-9]\d{2})-?)?[1-9]\d{6,7})\D", one_by_one),  # fixed line
        (r"(\d+/\d+)", lambda found: "分之".join(map(chinese, reversed(found.split("/"))))),
        (rf"({NUMBER}%)", lambda found: "百分之" + chinese(found[:-1])),
        (rf"({NUMBER})[多余几]?(?:{COUNTED})", chinese),
        (r"(\d{4,32})", one_by_one),
        (rf"({NUMBER})", chinese),
    ]
    text = f"^{text}$".replace("％", "%")
    for pattern, convert in passes:
        for found in re.finditer(pattern, text):
            text = text.replace(found[1], convert(found[1]), 1)  # the first such string, as with the authors
    text = re.sub("([a-zA-Z]+)二([a-zA-Z]+)", r"\g<1>2\2", text)  # b2b
    return re.sub(PUNCTUATION, ",", text.lstrip("^").rstrip("$"))


def one_by_one(number):
    return "".join(DIGITS[int(digit)] for digit in number if digit.isdecimal())


def chinese_date(date):
    return re.sub(r"(\d+)(\D)", lambda m: (one_by_one if m[2] == "年" else chinese)(m[1]) + m[2], date)


def chinese(number):
    """A number in Chinese characters: 120 is 一百二十, 2000 is 两千, 15 is 十五."""
    whole, point, rest = number.partition(".")
    said = by_units(whole) if len(whole) > 1 else one_by_one(whole)
    said = (said or "零") + "点" + one_by_one(rest) if point else said
    said = re.sub(f"(?<![{DIGITS}十点])二(?=[{''.join(UNITS.values())[1:]}])", "两", said)
    return re.sub("^一十", "十", said)


def by_units(number):
    """Digits with their units, and a 零 for zeros left out between them. Zeros alone are nothing."""
    digits = number.lstrip("0")
    if len(digits) <= 1:
        return "零" * bool(digits and digits != number) + one_by_one(digits)
    power = max(power for power in UNITS if power < len(digits))
    return by_units(number[:-power]) + UNITS[power] + by_units(digits[-power:])


# -----------------------------------------------------------------------------
# pieces of a long text

STOPS = "!?‼‽⁇⁈⁉؟۔।॥።፧။၊﹗﹖！？．｡。"  # what ends a sentence beside the full stop
AROUND = r"\"#%&'()*,:;\[\]_{}¡¿§«»‘’‚‛“”„‟–—…·،؛٪〃、〈-】〔-〟〰＂-＇（），：；［］｛｝｟-､"  # marks around a word
MARK = rf"[{STOPS}{AROUND}.\-/@\\‐-―†-‧‰-⁞﹏－／＠]"
OPENING = rf"(?: (?:(?:(?!'s\b)[{STOPS}{AROUND}]|\.\.+)+|{MARK}+(?=\s|$)))*"  # marks before the next word
END = re.compile(rf"(?:[{STOPS}]|(?<!\.)\.(?!\.)){MARK}*(?=\s|$){OPENING}|(?<=\w)\.(?=[^\W\d_])")
END_WITHOUT_SPACES = re.compile(rf"(?:[{STOPS}]|\.(?!(?<=\d\.)\d)){MARK}*(?: {MARK}+)*")
ABBREVIATED = {  # no sentence ends at the full stop after one of these
    "en": "Mt Ak Ala Apr Ariz Ark Aug Calif Colo Conn Dec Del Feb Fla Ga Ia Id Ill Ind Jan Jul Jun Kan Kans Ky La Mar "
          "Mass Mich Minn Miss Neb Nebr Nev Nov Oct Okla Ore Pa Sep Sept Tenn Va Wash Wis Adm Bros co Co Corp Dr Gen "
          "Gov Inc Jr Ltd Md Messrs Mo Mont Mr Mrs Ms Prof Rep Rev Sen St vs a.m p.m e.g E.g i.e I.e Ph.D v.s",
    "es": "aprox dna dpto ej esq pág p.ej Ud Vd Uds Vds vol a.m p.m apdo Av Avda Cía Dr Dra EE.UU Ee.Uu etc fig Gob "
          "Gral Ing Lic m.n núm Prof Profa q.e.p.d s.s.s Sr Sra Srta",
    "ar": "د أ ب ت",
    "hi": "",
}  # fmt: skip


def split(text, language, limit=None):
    """A text in pieces of whole sentences: a list of texts of about `limit` characters at most, XTTS's if None.

    A text shorter than that stays whole. A sentence longer than that is cut between words. Sentences that fit are put
    together again with a space between them, which the limit does not count, as with the authors.
    """
    language = base(language)
    limit = limit or (RULES[language].limit if language in RULES else 250)
    if len(text) < limit:
        return [text.lstrip()]
    pieces = []
    for sentence in sentences(text, language):
        if len(sentence) > limit:
            pieces += textwrap.wrap(sentence, limit, break_on_hyphens=False, tabsize=1)
        elif pieces and len(pieces[-1]) + len(sentence) <= limit:
            pieces[-1] = f"{pieces[-1]} {sentence}".lstrip()
        else:
            pieces.append(sentence if pieces else sentence.lstrip())
    return pieces


def sentences(text, language):
    """The sentences of a text, as spacy's sentencizer finds them, on which the authors rely.

    A sentence ends at a stop that closes a word. It takes along all marks up to the next word, opening quotes too. None
    ends at "...", at an abbreviation, at a capital before a full stop, or at the end of a line.
    """
    spaced = language not in ("zh", "ja")
    start = 0
    at = 0
    while end := (END if spaced else END_WITHOUT_SPACES).search(text, at):
        at = end.start() + 1
        if not spaced or end[0][0] != "." or closes(text[max(start, at - 40) : at - 1], text[at : at + 1], language):
            yield text[start : end.end()]
            start = at = end.end() + text.startswith(" ", end.end())
    if start < len(text):
        yield text[start:].removesuffix(" ")


def closes(before, after, language):
    """Whether a full stop between these texts ends a sentence. Letters without case count as small and as capitals."""
    word = re.search(rf"[^\s{STOPS}{AROUND}]*$", before)[0].lstrip("0123456789")
    if word in ABBREVIATED.get(language, ABBREVIATED["en"]).split() or re.search("^[a-zäöü]$|[$£€¥ºª=|^~]$", word):
        return False
    last = before[-1:]
    if after.isalpha():  # end.Next
        return last.isalpha() and not last.isupper() and not after.islower()
    capitals = re.search(r"[^\W\d_]{2}$", before) and before[-2:].upper() == before[-2:]
    return bool(capitals or language != "ar" and (not last.isupper() or before[-2:-1] == "°"))

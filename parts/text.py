"""Text: its normal form, what the model reads of it, and its tokenizers.

Letter in shapes: n text ids.
"""

import hashlib
import importlib
import io
import json
import re
import string
import sys
import unicodedata
from collections import Counter
from functools import cached_property, lru_cache

import numpy as np
import sentencepiece

# a word, with the marks that follow it; in scripts without spaces a character is one
ALONE = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"(?:[{ALONE}]|[^\s{ALONE}]+)[^\w\s]*(?:\s+[^\w\s]+(?!\S))*")


def speakable(text):
    """Text without what no tokenizer takes: zero bytes, and halves of surrogate pairs that stand alone, which are no
    characters."""
    return text.replace("\0", "").encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")


def normalise(text, lowercase=False):
    """Text in its normal form: `speakable`, Unicode NFC, single spaces, lower case on request."""
    text = speakable(text.replace("\ufeff", ""))  # else half a pair on each side of a mark would be lost
    return " ".join(unicodedata.normalize("NFC", text.lower() if lowercase else text).split())


def wording(text_format, speaker="", text="", language=""):
    """What the model reads of a text: the text_format with {speaker}, {text} and {language} filled in.

    {text} has to occur once, and other fields may not; {{ and }} are plain braces. The values may hold braces. Raises
    ValueError for another text_format, and where it has a {language} and none is given.
    """
    values = {"speaker": speaker, "text": text, "language": language}
    parts = parse_format(text_format if isinstance(text_format, str) else "")
    if not language and any(field == "language" for _, field in parts):
        raise ValueError(f"text_format = {text_format!r:.60} has {{language}}: give the language")
    return "".join(before + values.get(field, "") for before, field in parts)


def words_of(text, begin=0, end=sys.maxsize):
    """Where the words of a text, or of a part of it, stand in it, [(begin, end)]."""
    return [found.span() for found in WORD.finditer(text, begin, end)]


@lru_cache
def parse_format(text_format):
    """A text_format as [(text, name of the field after it or None), ...]. Raises ValueError where it is wrong."""
    wrong = f"text_format = {text_format!r:.60}: takes {{text}} once, {{speaker}}, {{language}}, and no other braces"
    try:
        parts = list(string.Formatter().parse(text_format))
    except ValueError:
        raise ValueError(wrong) from None
    fields = [field for _, field, _, _ in parts if field is not None]
    sound = fields.count("text") == 1 and {"text", "speaker", "language"}.issuperset(fields) and "\0" not in text_format
    if not sound or any(extra or conversion for _, _, extra, conversion in parts):
        raise ValueError(wrong)
    return [(before, field) for before, field, _, _ in parts]


def package(module, use, install=None):
    """An optional package, imported. Raises ValueError with what needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        install = install or module.replace("_", "-")
        raise ValueError(f"{use} needs the package {install.split()[0]}: pip install {install}") from None


def is_phonemic(text):
    """Whether a text is written in the International Phonetic Alphabet: it has symbols that only phonemes have."""
    return any("\u0250" <= c <= "\u02d1" for c in text)


class Tokenizer:
    """What both kinds share. Each has a `kind`, the name of its `file` in a token folder, its bytes `model`, and

        encode(text) -> ids, without those of begin and end      decode(ids) -> text, for display
        spans(text) -> [(begin, end)]: the characters of the text behind each id

    `piece(id)` is the text of an id, None where it has none. `vocab_size` is larger than every id. `bos_id` and
    `eos_id` are begin and end of text, which the model's layout adds; `unk_id` stands for unknown characters. Each is
    -1 where the tokenizer has none."""

    def owners(self, text, words):
        """For each id of a text the number of the word in which its first character stands that is no space, -1: in
        none. words: [(begin, end)], where they stand in the text."""
        place = np.full(len(text) + 1, -1)
        for number, (begin, end) in enumerate(words):
            place[begin:end] = number
        spans = ((begin, max(end, begin + 1)) for begin, end in self.spans(text))
        first = (next((i for i in range(begin, end) if not text[i : i + 1].isspace()), begin) for begin, end in spans)
        return place[list(first)]

    def unknown(self, text):
        """The characters of a text for which the tokenizer has no piece and no bytes, such as half of a surrogate
        pair."""
        halves = {c for c in set(text) if "\ud800" <= c <= "\udfff"}
        ids = {c: self.encode(c) for c in set(text) - halves if not c.isspace()}
        return halves | {c for c in ids if (self.unk_id in ids[c] if self.unk_id >= 0 else not ids[c])}

    @cached_property  # every text asks, and a vocabulary may have 100,000 pieces
    def phonemic(self):
        """Whether it reads phonemes: one in eight of its pieces, or more, has a symbol that only they have."""
        pieces = [piece for i in range(self.vocab_size) if (piece := self.piece(i)) and not piece.startswith("<0x")]
        return 8 * sum(map(is_phonemic, pieces)) >= len(pieces)

    @cached_property
    def tags(self):
        """The languages that it knows by a tag, such as [en]: their names, sorted."""
        pieces = [self.piece(i) or "" for i in range(self.vocab_size)]
        return sorted(piece[1:-1] for piece in pieces if re.fullmatch(r"\[[a-z]{2}(-[a-z]{2})?\]", piece))

    def fingerprint(self):
        return hashlib.sha256(self.model).hexdigest()

    def describe(self):
        """The fields that meta.json has for it."""
        return {"kind": self.kind, "file": self.file, "sha256": self.fingerprint(),
                "vocab_size": self.vocab_size, "bos_id": self.bos_id, "eos_id": self.eos_id}


class SentencePiece(Tokenizer):
    """A sentencepiece model (Kudo and Richardson 2018) from its bytes. Raises ValueError for other bytes."""

    kind = "sentencepiece"
    file = "tokenizer.model"

    def __init__(self, model):
        self.model = model
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.processor.encode("a")  # an empty model only fails here
        except RuntimeError:
            raise ValueError("the tokenizer is not a sentencepiece model (a .model file)") from None
        self.vocab_size = self.processor.vocab_size()
        self.unk_id = self.processor.unk_id()
        self.bos_id = self.processor.bos_id()
        self.eos_id = self.processor.eos_id()

    def encode(self, text):
        return self.processor.encode(text)

    def decode(self, ids):
        return self.processor.decode([int(i) for i in ids])

    def spans(self, text):
        place = [i for i, c in enumerate(text) for _ in c.encode()] + [len(text)]  # of the character of each byte
        message = self.processor.encode(text, out_type="serialized_proto")
        pieces = (dict(protobuf(value)) for number, value in protobuf(message) if number == 2)
        ends = ((piece.get(4, 0), piece.get(5, 0)) for piece in pieces)  # in bytes
        return [(place[begin], place[end - 1] + 1 if end > begin else place[begin]) for begin, end in ends]

    def piece(self, i):
        return self.processor.id_to_piece(i) if 0 <= i < self.vocab_size else None


class HuggingFace(Tokenizer):
    """A tokenizer.json of the package `tokenizers`, as Llama, SmolLM2, LFM2 and VALL-E have it, and XTTS's vocab.json.

    Begin and end of text are the tokens that the file itself puts around a text, else a known pair of names. A token
    [SPACE], as in XTTS, stands for spaces. A text may contain tokens such as [en]. Raises ValueError for bytes of
    another kind, and where the package is missing.
    """

    kind = "tokenizers"
    file = "tokenizer.json"
    ENDS = [("<|begin_of_text|>", "<|end_of_text|>"), ("<|startoftext|>", "<|endoftext|>"),
            ("<|im_start|>", "<|im_end|>"), ("<s>", "</s>"), ("[START]", "[STOP]")]  # fmt: skip

    def __init__(self, model):
        tokenizers = package("tokenizers", "a tokenizer.json")
        self.model = model
        try:
            self.processor = tokenizers.Tokenizer.from_buffer(model)
            self.processor.no_truncation()
            self.processor.no_padding()
            around_a = self.processor.encode("a")  # fails where a piece that the file names is missing
            self.vocab = self.processor.get_vocab(with_added_tokens=True)
            self.vocab_size = max(self.vocab.values()) + 1
            spec = json.loads(model)["model"]
        except Exception:  # the package raises nothing narrower
            raise ValueError("the tokenizer is not a tokenizer.json of the package tokenizers") from None
        self.pieces = {i: piece for piece, i in sorted(self.vocab.items(), reverse=True)}  # VALL-E: several with one id
        self.space = "[SPACE]" if "[SPACE]" in self.vocab else " "
        unknown = spec.get("unk_id", self.vocab.get(spec.get("unk_token")))
        self.unk_id = -1 if unknown is None else unknown
        first, last = next((pair for pair in self.ENDS if set(pair) <= set(self.vocab)), (None, None))
        marks = around_a.special_tokens_mask
        self.bos_id = around_a.ids[0] if marks[:1] == [1] else self.vocab.get(first, -1)
        self.eos_id = around_a.ids[-1] if marks[-1:] == [1] else self.vocab.get(last, -1)

    def encode(self, text):
        return self.processor.encode(text.replace(" ", self.space), add_special_tokens=False).ids

    def decode(self, ids):
        ids = [int(i) for i in ids]
        text = "".join(self.pieces.get(i, "") for i in ids).replace(self.space, " ")
        if self.encode(text) == ids:
            return text
        return self.processor.decode(ids, skip_special_tokens=False)  # the pieces are not characters, but bytes

    def spans(self, text):
        place = [i for i, c in enumerate(text) for _ in (self.space if c == " " else c)] + [len(text)]
        ends = self.processor.encode(text.replace(" ", self.space), add_special_tokens=False).offsets
        return [(place[begin], place[end - 1] + 1 if end > begin else place[begin]) for begin, end in ends]

    def piece(self, i):
        return self.pieces.get(i)


def load_tokenizer(kind, model):
    """A tokenizer of that kind from its file's bytes. Raises ValueError for an unknown kind or a damaged file."""
    kinds = {tokenizer.kind: tokenizer for tokenizer in (SentencePiece, HuggingFace)}
    if kind not in kinds:
        raise ValueError(f"unknown tokenizer kind {kind!r:.60}; choose from {', '.join(kinds)}")
    return kinds[kind](model)


def open_tokenizer(path):
    """The tokenizer in a file; its content tells the kind. Raises OSError, and ValueError that names the file."""
    with open(path, "rb") as file:
        model = file.read()
    kind = HuggingFace.kind if model.lstrip()[:1] == b"{" else SentencePiece.kind
    try:
        return load_tokenizer(kind, model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def fast_tokenizer(tokenizer):
    """The bytes of a tokenizer.json that gives the same ids as a tokenizer.

    That of a sentencepiece model puts begin and end around a text, as the models do. Raises ValueError for one that is
    no BPE, or changes texts before it cuts them, as those trained elsewhere may.
    """
    if tokenizer.kind == HuggingFace.kind:
        return tokenizer.model
    fields = list(protobuf(tokenizer.model))
    trainer, normaliser = (dict(protobuf(dict(fields)[number])) for number in (2, 3))
    plain = {1: b"identity", 2: b"", 3: 0}  # no rules, and no space put before a text
    if trainer.get(3) != 2 or {key: normaliser.get(key) for key in plain} != plain:
        raise ValueError("no tokenizer.json gives the ids of this sentencepiece model: it is no BPE without "
                         "normalisation, such as prepare.py trains")  # fmt: skip
    pieces = [{3: 1, **dict(protobuf(value))} for number, value in fields if number == 1]  # 1: text, 3: its kind
    kinds = [piece[3] for piece in pieces]
    names = [piece[1].decode() for piece in pieces]
    names = [name.replace("\u2581", " ") if kind == 4 else name for name, kind in zip(names, kinds, strict=True)]
    vocab = {name: i for i, name in enumerate(names)}
    learned = [name for name, kind in zip(names, kinds, strict=True) if kind == 1]  # the best scores first
    merges = [[name[:n], name[n:]] for name in learned for n in range(1, len(name))
              if name[:n] in vocab and name[n:] in vocab]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": name, "special": kind != 4, **plain}
             for i, (name, kind) in enumerate(zip(names, kinds, strict=True)) if kind in (2, 3, 4)]  # 4: symbols
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": space,
        "pre_tokenizer": None, "post_processor": around(tokenizer),
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": names[tokenizer.unk_id], "byte_fallback": True,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                  "ignore_merges": False, "vocab": vocab, "merges": merges},
    }  # fmt: skip
    return json.dumps(spec, ensure_ascii=False).encode()


def around(tokenizer):
    """The post_processor of a tokenizer.json that puts a tokenizer's begin and end, where it has them, around a text.
    """
    first, last = ([tokenizer.piece(i)] if i >= 0 else [] for i in (tokenizer.bos_id, tokenizer.eos_id))
    ids = dict(zip(first + last, [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i >= 0], strict=True))
    words = [*first, "A", *last]
    return {
        "type": "TemplateProcessing",
        "single": [{"Sequence" if word == "A" else "SpecialToken": {"id": word, "type_id": 0}} for word in words],
        "pair": [{"Sequence": {"id": word, "type_id": 0}} for word in "AB"],
        "special_tokens": {word: {"id": word, "ids": [i], "tokens": [word]} for word, i in ids.items()},
    }


def protobuf(message):
    """The fields of a message (number, value), in order: numbers as int, texts and inner messages as bytes."""
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        size = {1: 8, 5: 4}.get(tag & 7)
        if size is None:  # a number, or how many bytes follow
            value, at = varint(message, at)
            size = value if tag & 7 else 0
        if tag & 7:
            value = message[at : at + size]
        yield tag >> 3, value
        at += size


def varint(message, at):
    """The number that begins at a place of a message, 7 bits in a byte, the lowest first; and the place behind it."""
    value = shift = 0
    while message[at] > 127:
        value |= (message[at] & 127) << shift
        shift += 7
        at += 1
    return value | message[at] << shift, at + 1


def train_tokenizer(texts, vocab_size, symbols=()):
    """The bytes of a sentencepiece BPE model trained on texts. It knows all their characters, and others as bytes.

    symbols: strings that always stay one token, such as speaker tags. The model has fewer pieces than vocab_size where
    the texts support no more. Raises ValueError where vocab_size is too small for the bytes and characters.
    """
    symbols = [s.replace(" ", "\u2581") for s in symbols]  # sentencepiece's own mark for a space

    def train(size):
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=out, model_type="bpe", vocab_size=size, character_coverage=1.0,
            byte_fallback=True, user_defined_symbols=symbols, normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            num_threads=1, minloglevel=2,
        )  # fmt: skip
        return out.getvalue()

    texts = list(texts)
    try:
        return train(vocab_size)
    except RuntimeError as error:
        message = str(error)
        if most := re.search(r"Vocabulary size too high.*<= (\d+)", message, re.S):
            return train(int(most[1]))
        if least := re.search(r"smaller than required_chars\D*\d+ vs (\d+)", message, re.S):
            raise ValueError(f"vocab_size = {vocab_size} is too small: bytes, characters and speaker tags alone need "
                             f"{least[1]}") from None
        raise ValueError(f"no tokenizer could be trained on the texts: {(message.splitlines() or ['?'])[-1]}") from None


def extend_tokenizer(tokenizer, texts, size, symbols=()):
    """The bytes of a HuggingFace tokenizer with up to `size` further pieces, so that it knows all of `texts`.

    symbols: strings that become one token each, such as [am]. After them come the unknown characters of the texts, with
    all characters of scripts that are new to the vocabulary, then the pieces of a BPE (Sennrich, Haddow and Birch 2016)
    trained on the runs of such characters in the texts. No new piece has a known character in it: all old ids stay, and
    a text that was known before, without a symbol in it, keeps its ids.
    Raises ValueError where the texts have nothing unknown, and where size is too small for symbols and characters.
    """
    import tokenizers

    texts = list(texts)
    strange = tokenizer.unknown("".join(set().union(*texts)))
    if not strange or not isinstance(tokenizer.processor.model, tokenizers.models.BPE):
        raise ValueError("the tokenizer is no BPE, or knows all characters of the texts: it cannot be extended by them")
    strange |= alphabets(scripts(strange) - scripts("".join(tokenizer.vocab)))
    clean = tokenizer.processor.normalizer.normalize_str if tokenizer.processor.normalizer else str
    characters = sorted(set().union(*map(clean, strange)) - set(tokenizer.vocab))
    symbols = [s for s in symbols if s not in tokenizer.vocab]
    if len(symbols) + len(characters) > size:
        raise ValueError(f"extend_vocab = {size} is too small: {len(characters)} characters and {len(symbols)} tags "
                         f"alone need {len(symbols) + len(characters)}")

    runs = re.compile(f"[{re.escape(''.join(strange))}]+")
    pieces = (piece for text in texts for piece in runs.findall(text))
    spec = json.loads(tokenizer.model)
    merges = learn_merges(spec, pieces, size - len(symbols), characters)
    new = dict.fromkeys([*symbols, *characters, *map("".join, merges)])  # two merges may lead to one piece
    ids = {piece: tokenizer.vocab_size + i for i, piece in enumerate(new)}
    model = spec["model"]
    model["vocab"] |= ids
    model["merges"] += map(" ".join, merges) if model["merges"] and isinstance(model["merges"][0], str) else merges
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] += [{"id": ids[s], "content": s, **plain} for s in symbols]
    return json.dumps(spec, ensure_ascii=False).encode()


def learn_merges(spec, texts, size, characters):
    """The merges (left, right) of a BPE of that size trained on texts, with all else as in a tokenizer.json `spec`."""
    import tokenizers

    model = {**spec["model"], "vocab": {}, "merges": [], "unk_token": None}
    blank = {**spec, "model": model, "added_tokens": [], "post_processor": None}
    learner = tokenizers.Tokenizer.from_str(json.dumps(blank))
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=characters, min_frequency=2,
                                             show_progress=False)  # fmt: skip
    learner.train_from_iterator(texts, trainer)
    return json.loads(learner.to_str())["model"]["merges"]


def scripts(characters):
    """The scripts of the letters among characters, by the first word of their Unicode names: {"LATIN", "ETHIOPIC"}."""
    return {unicodedata.name(c, "?").split()[0] for c in characters
            if unicodedata.category(c) in ("Lu", "Ll", "Lo") and unicodedata.is_normalized("NFKC", c)}


def script(text):
    """The script of most letters of a text, as in `scripts`, "" without letters. Kana and Han are one."""
    counts = Counter(map(script_of, text))
    del counts[""]
    return counts.most_common(1)[0][0] if counts else ""


@lru_cache(maxsize=10000)
def script_of(character):
    found = "".join(scripts(character))
    return "CJK" if found in ("HIRAGANA", "KATAKANA") else found


def alphabets(wanted, most=1000):
    """All characters of these scripts: letters, marks, digits, punctuation, symbols; without forms that only a font
    knows, such as those of Arabic letters within a word, and without scripts of more than `most`, such as Han."""
    found = {script: set() for script in wanted}
    for c in map(chr, range(0x20000)):
        form = unicodedata.decomposition(c).startswith(("<isolated", "<initial", "<medial", "<final", "<font"))
        if unicodedata.category(c)[0] in "LMNPS" and not form:
            name = unicodedata.name(c, "?").removeprefix("MODIFIER LETTER ")
            found.get(name.split()[0], set()).add(c)
    return set().union(*(letters for letters in found.values() if len(letters) <= most))

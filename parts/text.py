"""Text: its normal form, what the model reads of it, and its tokenizers.

Letter in shapes: n text ids.
"""

import hashlib
import io
import json
import re
import string
import unicodedata
from functools import lru_cache


def normalise(text, lowercase=False):
    """Text as prepare.py stores and sample.py speaks it: Unicode NFC, single spaces, lower case on request. Of a
    surrogate pair, halves that stand alone are dropped: they are no character, and no tokenizer takes them."""
    text = text.replace("\ufeff", "").replace("\0", "")
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")
    return " ".join(unicodedata.normalize("NFC", text.lower() if lowercase else text).split())


def wording(text_format, speaker="", text="", language=""):
    """What the model reads of a text: the text_format with {speaker}, {text} and {language} filled in.

    Nothing else may stand in braces, and {text} stands there once; {{ and }} are braces themselves. The values may hold
    whatever they like. Raises ValueError for another text_format, and where it has a {language} and none is given.
    """
    values = {"speaker": speaker, "text": text, "language": language}
    parts = parse_format(text_format if isinstance(text_format, str) else "")
    if not language and any(field == "language" for _, field in parts):
        raise ValueError(f"text_format = {text_format!r:.60} has {{language}}: give the language")
    return "".join(before + values.get(field, "") for before, field in parts)


@lru_cache
def parse_format(text_format):
    """A text_format as [(text, name of the field after it or None), ...]. Raises ValueError where it is none."""
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


class Tokenizer:
    """What both kinds share. Each has a `kind`, the name of its `file` in a token folder, its bytes `model`, and

        encode(text) -> ids, plain ones      decode(ids) -> text, for display

    `vocab_size` is above every id. Begin and end of text (`bos_id`, `eos_id`) are the layout's affair, `unk_id` stands
    for what no piece does; each is -1 where the model has none."""

    def unknown(self, text):
        """The characters of text that the model has no piece and no bytes for, such as half of a surrogate pair."""
        halves = {c for c in set(text) if "\ud800" <= c <= "\udfff"}
        ids = {c: self.encode(c) for c in set(text) - halves if not c.isspace()}
        return halves | {c for c in ids if (self.unk_id in ids[c] if self.unk_id >= 0 else not ids[c])}

    def fingerprint(self):
        return hashlib.sha256(self.model).hexdigest()

    def describe(self):
        """What meta.json says of it."""
        return {"kind": self.kind, "file": self.file, "sha256": self.fingerprint(),
                "vocab_size": self.vocab_size, "bos_id": self.bos_id, "eos_id": self.eos_id}


class SentencePiece(Tokenizer):
    """A sentencepiece model (Kudo and Richardson 2018) from its bytes. Raises ValueError where they are none."""

    kind, file = "sentencepiece", "tokenizer.model"

    def __init__(self, model):
        import sentencepiece

        self.model = model
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.processor.encode("a")  # an empty model says only now that it is none
        except RuntimeError:
            raise ValueError("the tokenizer is not a sentencepiece model (a .model file)") from None
        self.vocab_size, self.unk_id = self.processor.vocab_size(), self.processor.unk_id()
        self.bos_id, self.eos_id = self.processor.bos_id(), self.processor.eos_id()

    def encode(self, text):
        return self.processor.encode(text)

    def decode(self, ids):
        return self.processor.decode([int(i) for i in ids])


class HuggingFace(Tokenizer):
    """A tokenizer.json of the package `tokenizers`, as Llama, SmolLM2, LFM2 and VALL-E have it, and XTTS's vocab.json.

    Begin and end of text are what the file itself puts around a text, else a pair known by its names. Where there is a
    token [SPACE], as XTTS has it, it stands for spaces. Tokens such as [en] may be written in a text. Raises ValueError
    where the bytes are no such file, and where the package is missing.
    """

    kind, file = "tokenizers", "tokenizer.json"
    ENDS = [("<|begin_of_text|>", "<|end_of_text|>"), ("<|startoftext|>", "<|endoftext|>"),
            ("<|im_start|>", "<|im_end|>"), ("<s>", "</s>"), ("[START]", "[STOP]")]  # fmt: skip

    def __init__(self, model):
        try:
            import tokenizers
        except ImportError:
            raise ValueError("a tokenizer.json needs the package tokenizers: pip install tokenizers") from None

        self.model = model
        try:
            self.processor, spec = tokenizers.Tokenizer.from_buffer(model), json.loads(model)["model"]
            self.processor.no_truncation()
            self.processor.no_padding()
            self.processor.encode("a")  # a piece that it names may be missing
            if not self.processor.get_vocab(with_added_tokens=True):
                raise ValueError
        except Exception:  # the package raises nothing narrower
            raise ValueError("the tokenizer is not a tokenizer.json of the package tokenizers") from None
        vocab = self.vocab = self.processor.get_vocab(with_added_tokens=True)
        self.pieces = {i: piece for piece, i in sorted(vocab.items(), reverse=True)}  # VALL-E: several with one id
        self.vocab_size, self.space = max(vocab.values()) + 1, "[SPACE]" if "[SPACE]" in vocab else " "
        unknown = spec.get("unk_id", vocab.get(spec.get("unk_token")))
        self.unk_id = -1 if unknown is None else unknown
        whole, ends = self.processor.encode("a"), [pair for pair in self.ENDS if set(pair) <= set(vocab)]
        first, last = ((vocab[name] for name in ends[0]) if ends else (-1, -1))
        self.bos_id = whole.ids[0] if whole.special_tokens_mask[:1] == [1] else first
        self.eos_id = whole.ids[-1] if whole.special_tokens_mask[-1:] == [1] else last

    def encode(self, text):
        return self.processor.encode(text.replace(" ", self.space), add_special_tokens=False).ids

    def decode(self, ids):
        ids = [int(i) for i in ids]
        text = "".join(self.pieces.get(i, "") for i in ids).replace(self.space, " ")
        return text if self.encode(text) == ids else self.processor.decode(ids, skip_special_tokens=False)  # of bytes


def load_tokenizer(kind, model):
    """A tokenizer of that kind from its file's bytes. Raises ValueError for an unknown kind or a damaged file."""
    kinds = {made.kind: made for made in (SentencePiece, HuggingFace)}
    if kind not in kinds:
        raise ValueError(f"unknown tokenizer kind {kind!r:.60}: this code reads {', '.join(kinds)}")
    return kinds[kind](model)


def train_tokenizer(texts, vocab_size, symbols=()):
    """The bytes of a sentencepiece BPE model trained on texts: full character coverage, bytes for what it never saw.

    symbols: strings that always stay one token, such as speaker tags. A corpus too small for vocab_size gives as many
    pieces as it supports. Raises ValueError where vocab_size leaves no room for the bytes and characters.
    """
    import sentencepiece

    whole = [s.replace(" ", "\u2581") for s in symbols]  # sentencepiece's own mark for a space

    def train(size):
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=out, model_type="bpe", vocab_size=size, character_coverage=1.0,
            byte_fallback=True, user_defined_symbols=whole, normalization_rule_name="identity", add_dummy_prefix=False,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
        )  # fmt: skip
        return out.getvalue()

    texts = list(texts)
    try:
        return train(vocab_size)
    except RuntimeError as e:
        if most := re.search(r"Vocabulary size too high.*<= (\d+)", str(e), re.S):
            return train(int(most[1]))
        if least := re.search(r"smaller than required_chars\D*\d+ vs (\d+)", str(e), re.S):
            raise ValueError(f"vocab_size = {vocab_size} is too small: bytes, characters and speaker tags alone need "
                             f"{least[1]}") from None
        raise ValueError(f"no tokenizer could be trained on the texts: {(str(e).splitlines() or ['?'])[-1]}") from None


def extend_tokenizer(tokenizer, texts, size, symbols=()):
    """The bytes of a HuggingFace tokenizer with up to `size` further pieces, so that it knows all of `texts`.

    symbols: strings that become one token each, such as [am]. After them come the characters of texts that were unknown
    and all letters of scripts that the vocabulary had none of, then the pieces of a BPE (Sennrich, Haddow and Birch
    2016) trained on what the texts say in such characters. No new piece has a known character in it: every old id
    stays, and a text that was known before, and has no symbol in it, keeps its ids.
    Raises ValueError where the texts have nothing unknown, and where size leaves no room for symbols and characters.
    """
    import tokenizers

    texts, spec = list(texts), json.loads(tokenizer.model)
    model, strange = spec["model"], tokenizer.unknown("".join(set().union(*texts)))
    if not strange or not isinstance(tokenizer.processor.model, tokenizers.models.BPE):
        raise ValueError("the tokenizer is no BPE, or knows all characters of the texts: it cannot be extended by them")
    strange |= alphabets(scripts(strange) - scripts("".join(tokenizer.vocab)))
    clean = tokenizer.processor.normalizer.normalize_str if tokenizer.processor.normalizer else str
    characters = sorted(set().union(*map(clean, strange)) - set(tokenizer.vocab))
    symbols = [s for s in symbols if s not in tokenizer.vocab]
    if len(symbols) + len(characters) > size:
        raise ValueError(f"extend_vocab = {size} is too small: {len(characters)} characters and {len(symbols)} tags "
                         f"alone need {len(symbols) + len(characters)}")

    blank = {**spec, "model": {**model, "vocab": {}, "merges": [], "unk_token": None}, "added_tokens": []}
    learner = tokenizers.Tokenizer.from_str(json.dumps({**blank, "post_processor": None}))
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size - len(symbols), initial_alphabet=characters,
                                             min_frequency=2, show_progress=False)  # fmt: skip
    run = re.compile(f"[{re.escape(''.join(strange))}]+")
    learner.train_from_iterator((part for text in texts for part in run.findall(text)), trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]

    pieces = dict.fromkeys([*symbols, *characters, *map("".join, merges)])  # two merges may lead to one piece
    ids = {piece: tokenizer.vocab_size + i for i, piece in enumerate(pieces)}
    model["vocab"] |= ids
    model["merges"] += map(" ".join, merges) if model["merges"] and isinstance(model["merges"][0], str) else merges
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] += [{"id": ids[s], "content": s, **plain} for s in symbols]
    return json.dumps(spec, ensure_ascii=False).encode()


def scripts(characters):
    """The scripts of the letters among characters, by the first word of their Unicode names: {"LATIN", "ETHIOPIC"}."""
    return {unicodedata.name(c).split()[0] for c in characters
            if unicodedata.category(c) in ("Lu", "Ll", "Lo") and unicodedata.is_normalized("NFKC", c)}


def alphabets(wanted, most=1000):
    """All letters and marks of the scripts wanted; none of scripts that have above `most`, such as Han and Hangul."""
    found = {script: set() for script in wanted}
    for c in map(chr, range(0x10000)):
        if unicodedata.category(c)[0] in "LM" and unicodedata.is_normalized("NFKC", c):
            found.get(unicodedata.name(c).split()[0], set()).add(c)
    return set().union(*(letters for letters in found.values() if len(letters) <= most))

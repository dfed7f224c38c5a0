"""parts/frontend.py: what is done to a text before the tokenizer reads it; and that data and models agree on it."""

import json

import numpy as np
import pytest
import soundfile
from helpers import ROOT, run

import prepare
import sample
from data import TokenFiles
from parts import configurator, frontend
from parts.frontend import language_name, needs_language, read_text
from parts.phonemes import phonemes
from sample import Voice


@pytest.mark.parametrize("front_end, expected", [
    ("none", "  Cafe\u0301 \u201cA\u201d\r\n 7 "), ("plain", "Caf\u00e9 \u201cA\u201d 7"),
    ("xtts", "cafe\u0301 \u201ca\u201d 7"),
])  # fmt: skip
def test_what_a_front_end_does(front_end, expected):
    assert read_text("  Cafe\u0301 \0\u201cA\u201d\r\n 7\ud83d ", front_end, "am") == expected
    assert read_text("  Cafe\u0301 ", "plain", lowercase=True) == "caf\u00e9"


def test_phonemes_are_asked_for_in_the_language(monkeypatch):
    monkeypatch.setattr(frontend, "phonemes", lambda text, language: f"{language}/{text}")
    assert read_text("a\0b", "phonemes", "de") == "de/ab"


def test_which_texts_need_a_language():
    assert needs_language("xtts", "{text}") and needs_language("phonemes", "{text}")
    assert needs_language("none", "[{language}]{text}") and not needs_language("plain", "{{language}}{text}")
    assert [language_name(name) for name in (" zh_CN", "EN", "am\n")] == ["zh-cn", "en", "am"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Recordings with English and Amharic texts, which lang.txt and a column name."""
    folder = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    texts = ["Ab  Cd, \u201cab\u201d", "SELAM", '"', "\u1230\u120b\u121d"]
    lines = ["audio\ttext\tlanguage"]
    for i in range(12):
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(4000), 4000)
        lines.append(f"{i}.wav\t{texts[i % 4]}\t{'am' if i % 4 == 3 else ''}")
    (folder / "metadata.tsv").write_text("\n".join(lines), encoding="utf-8")
    (folder / "lang.txt").write_text("en")
    return folder


def prepared(raw, folder, *flags):
    """The report of prepare.py with these flags."""
    codec = {"n_codebooks": 2, "codebook_size": 4, "sample_rate": 4000, "n_mels": 20, "dims": 8}
    usual = [f"--sources={raw}", f"--data_dir={folder}", f"--codec_args={codec}", "--val_fraction=0", "--workers=1"]
    prepare.main(configurator.configure(ROOT / "prepare.py", [*usual, "--max_bad=0.5", *flags]))
    return json.loads((folder / "report.json").read_text())


def test_a_model_reads_as_its_data_were_read(raw, tmp_path):
    report = prepared(raw, tmp_path / "t", "--front_end=xtts", "--text_format=[{language}]{text}")
    empty = {x["id"]: (x["reason"], x["detail"]) for x in report["not_used"]}
    assert empty == dict.fromkeys(["2", "6", "10"], ("empty text", "front_end = 'xtts' leaves nothing of '\"'"))
    assert {name: x["utterances"] for name, x in report["languages"].items()} == {"en": 6, "am": 3}
    files = TokenFiles(tmp_path / "t", "train")
    said = {files.name(i): files.tokenizer().decode(files.text(i)) for i in range(len(files))}
    assert [said[name] for name in "013"] == ["[en]ab cd, \u201cab\u201d", "[en]selam", "[am]\u1230\u120b\u121d"]

    run(tmp_path / "t", tmp_path / "out", "--max_iters=1")
    voice = Voice.from_checkpoint(f"{tmp_path}/out/last.pt")
    assert voice.meta["front_end"] == "xtts" and voice.meta["languages"] == ["en", "am"]
    ids = {files.name(i): files.text(i).tolist() for i in range(len(files))}
    assert voice.text_ids("AB  cd, \u201cAB\u201d").tolist() == ids["0"]
    assert voice.text_ids("\u1230\u120b\u121d", language="AM").tolist() == ids["3"]
    flags = [f"--ckpt={tmp_path}/out/last.pt", "--text=selam", f"--out_dir={tmp_path}/said", "--cap_seconds=0.2"]
    sample.main(configurator.configure(sample.__file__, [*flags, "--language=am"]))
    with pytest.raises(ValueError, match="unknown language 'fr'; choose from en, am"):
        sample.main(configurator.configure(sample.__file__, [*flags, "--language=fr"]))


def test_a_language_without_effect_is_refused(raw, tmp_path):
    prepared(raw, tmp_path / "t", "--front_end=none")
    run(tmp_path / "t", tmp_path / "out", "--max_iters=1")
    flags = [f"--ckpt={tmp_path}/out/last.pt", "--text=selam", f"--out_dir={tmp_path}/said", "--language=am"]
    with pytest.raises(ValueError, match="language = 'am' has no effect: the model reads all languages alike"):
        sample.main(configurator.configure(sample.__file__, flags))


def test_phonemes_from_the_recordings_to_speech(espeak, raw, tmp_path):
    """Words in, phonemes of their language to the model: in prepare.py, in training and in sample.py alike."""
    texts = {"en": ["Seven houses", "One, two!", "Dr. Who has 3"], "de": ["Sieben Häuser", "Eins, zwei!", "Er hat 3"]}
    said = {f"{i}.wav": (("en", "de")[i % 2], texts[("en", "de")[i % 2]][i // 2 % 3]) for i in range(12)}
    rows = [f"{file}\t{text}\t{language}" for file, (language, text) in said.items()]
    (raw / "two.tsv").write_text("audio\ttext\tlanguage\n" + "\n".join(rows), encoding="utf-8")
    prepared(raw / "two.tsv", tmp_path / "t", "--front_end=phonemes", "--text_format={text}")
    files = TokenFiles(tmp_path / "t", "train")
    for i in range(len(files)):
        language, text = said[f"{files.name(i)}.wav"]
        assert files.tokenizer().decode(files.text(i)) == phonemes(text, language) != text
    backbone = {"n_layer": 1, "n_head": 2, "n_kv_head": 2, "d_model": 16, "d_ff": 32}
    flags = ["--arch=valle", "--mode=ar", f"--backbone={backbone}", "--max_tokens=200", "--max_iters=2",
             "--warmup_iters=0", "--eval_samples=1", "--device=cpu"]  # fmt: skip
    run(tmp_path / "t", tmp_path / "out", usual=flags)
    assert list((tmp_path / "out/samples").glob("000002_0.wav"))
    voice = Voice.from_checkpoint(tmp_path / "out/last.pt", "cpu")
    words = {name: voice.tokenizer.decode(voice.text_ids("Hat 3", language=name)) for name in ("en", "de")}
    assert words == {name: phonemes("Hat 3", name) for name in words} and words["en"] != words["de"]
    assert [voice.utterance("Hat 3", language=name)[1]["language"] for name in words] == [1, 0]
    flags = [f"--ckpt={tmp_path}/out", "--text=Hat 3", f"--out_dir={tmp_path}/said", "--cap_seconds=0.2"]
    sample.main(configurator.configure(sample.__file__, [*flags, "--language=de"]))
    assert soundfile.info(tmp_path / "said/000.wav").frames
    with pytest.raises(ValueError, match="unknown language 'fr'; choose from de, en"):
        sample.main(configurator.configure(sample.__file__, [*flags, "--language=fr"]))


def test_words_for_a_tokenizer_of_phonemes(raw, tmp_path):
    texts = ["h\u0259l\u02c8o\u028a", "\u00f0\u0259 \u0279\u02c8\u026av\u025a", "tw\u02c8\u025blv"]
    rows = [f"{i}.wav\t{texts[i % 3]}" for i in range(12)]
    (raw / "ipa.tsv").write_text("audio\ttext\n" + "\n".join(rows), encoding="utf-8")
    prepared(raw / "ipa.tsv", tmp_path / "t", "--front_end=none", "--text_format={text}")
    run(tmp_path / "t", tmp_path / "out", "--max_iters=1")
    voice = Voice.from_checkpoint(f"{tmp_path}/out/last.pt")
    assert voice.tokenizer.phonemic and len(voice.text_ids(texts[0]))
    with pytest.raises(ValueError, match="the tokenizer reads phonemes, and the text 'hello' has letters"):
        voice.text_ids("hello")

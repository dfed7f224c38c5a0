import sys

import pytest
import torch
from helpers import voice

from parts import ears


def test_word_errors():
    assert ears.word_errors("three one four", "three one four") == 0
    assert ears.word_errors("three one four", "three four") == 1
    assert ears.word_errors("three one four", "three one one four") == 1
    assert ears.word_errors("three one four", "three nine four") == 1
    assert ears.word_errors("three one four", "four three one") == 2
    assert ears.word_errors("three one four", "") == 3
    assert ears.word_errors("", "three one") == 2
    assert ears.edits("kitten", "sitting") == 3


@pytest.mark.parametrize("text, words", [
    ("Hello, World!", "hello world"), ("It’s 'quoted' -- don't.", "it's quoted don't"), ("well-known", "well known"),
    ("ΣΊΣΥΦΟΣ", "σίσυφοσ"), ("ｆｕｌｌ", "full"), ("ሰላም፣ ዓለም።", "ሰላም ዓለም"), ("हिन्दी!", "हिन्दी"), ("...", ""),
])  # fmt: skip
def test_words_are_compared_without_case_and_punctuation(text, words):
    assert ears.plain_words(text) == words


LISTENER = """
import sys, wave
with wave.open(sys.argv[2]) as file:
    print(f"{sys.argv[1]}  {file.getframerate()}\\n{file.getnframes()} {file.getnchannels()}")
"""


def test_a_command_hears_a_wav_file(tmp_path):
    (tmp_path / "my asr.py").write_text(LISTENER)
    hear = ears.recogniser(f"{sys.executable} '{tmp_path}/my asr.py' 'a b' {{wav}}")
    assert hear(voice(1.0), 16000) == "a b 16000 16000 1"
    assert hear(voice(1.0, rate=8000), 8000) == "a b 16000 16000 1"


@pytest.mark.parametrize("command, message", [
    ("false {wav}", "false ended with exit code 1: no message"),
    ("sh -c 'echo one >&2; echo two words >&2; exit 3' {wav}", "sh ended with exit code 3: two words"),
    ("/no/such/program {wav}", "/no/such/program: No such file"),
])  # fmt: skip
def test_a_command_that_fails_is_one_line(command, message):
    with pytest.raises(ValueError, match=message) as error:
        ears.recogniser(command)(torch.zeros(100), 16000)
    assert "\n" not in str(error.value)


def test_a_command_needs_a_place_for_the_file():
    with pytest.raises(ValueError, match="needs {wav}"):
        ears.recogniser("my_asr --fast")


@pytest.mark.parametrize("package, listen", [
    ("pocketsphinx", lambda: ears.recogniser("digits")), ("faster-whisper", lambda: ears.recogniser("tiny.en")),
    ("resemblyzer", lambda: ears.speaker_encoder("resemblyzer")),
    ("distillmos", lambda: ears.naturalness("distillmos")), ("speechmos", lambda: ears.naturalness("dnsmos")),
])  # fmt: skip
def test_a_missing_package_is_named(package, listen, monkeypatch):
    ears.decoder.cache_clear()
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        listen()


def speech(seconds=3.0):
    return voice(seconds)


@pytest.mark.slow
def test_a_voice_is_like_itself():
    pytest.importorskip("resemblyzer")
    embed = ears.speaker_encoder("resemblyzer")
    own, same, other = (embed(wav, 16000) for wav in (speech(), speech(4.0), torch.randn(48000)))
    assert abs(float(own @ own) - 1) < 1e-3 and own @ same > own @ other


@pytest.mark.slow
@pytest.mark.parametrize("name, package", [("distillmos", "distillmos"), ("dnsmos", "speechmos")])
def test_a_predicted_opinion(name, package):
    pytest.importorskip(package)
    score = ears.naturalness(name)
    assert 0.5 < score(speech(), 16000) < 5.5


def test_one_waveform_is_heard_at_16_kilohertz():
    wav = voice(0.5, rate=8000)
    assert ears.heard_at(wav, 8000).shape == (8000,)
    assert ears.heard_at(wav.double().numpy(), 16000).dtype == torch.float32
    with pytest.raises(ValueError, match="one waveform"):
        ears.heard_at(wav[None], 8000)

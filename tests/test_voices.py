"""parts/voices.py: saved voices."""

import os

import numpy as np
import pytest
import torch
from helpers import Evil

from parts import voices
from parts.voices import load_voice, save_voice

MADE_FOR = {"arch": "csm", "codec": "mel", "fingerprint": "abc"}
CODES = [np.arange(15).reshape(5, 3), np.arange(6).reshape(2, 3)]


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_voice_by_name_and_by_path():
    assert save_voice("anna", CODES, ["one", "two"], MADE_FOR, "CC BY 4.0") == os.path.join("voices", "anna.pt")
    assert save_voice("my/anna.pt", CODES[:1], ["one"], MADE_FOR) == "my/anna.pt"
    assert save_voice("anna.pt", CODES[:1], [], MADE_FOR) == "anna.pt"
    codes, texts, note = load_voice("anna", MADE_FOR)
    assert all(map(np.array_equal, codes, CODES)) and (texts, note) == (["one", "two"], "CC BY 4.0")
    assert load_voice("my/anna.pt", MADE_FOR)[1:] == (["one"], "") and load_voice("anna.pt", MADE_FOR)[1] == []
    assert sorted(os.listdir()) == ["anna.pt", "my", "voices"] and os.listdir("voices") == ["anna.pt"]
    with pytest.raises(FileNotFoundError, match="voices/bob.pt: no such voice; voices/ has anna"):
        load_voice("bob", MADE_FOR)


@pytest.mark.parametrize("timbre", [None, torch.ones(4)])
def test_latents_and_timbre(timbre):
    latents = torch.randn(5, 8, dtype=torch.bfloat16)
    save_voice("x", (latents, timbre), [], MADE_FOR)
    (again, sound), _, _ = load_voice("x", MADE_FOR)
    assert torch.equal(again, latents.float()) and (sound is None if timbre is None else torch.equal(sound, timbre))


def test_an_older_voice_stays_where_a_new_one_cannot_be_written(monkeypatch):
    save_voice("x", CODES, [], MADE_FOR, "old")
    os.symlink("/dev/full", "voices/x.pt.partial")
    with pytest.raises(OSError, match="x.pt"):
        save_voice("x", CODES, [], MADE_FOR, "new")
    assert load_voice("x", MADE_FOR)[2] == "old" and os.listdir("voices") == ["x.pt"]


@pytest.mark.parametrize("key, words", [
    ("arch", "is a voice for the family 'csm', this model has 'kani': save it with this model"),
    ("codec", "is a voice for the codec 'mel', this model has 'kani'"),
    ("fingerprint", "is a voice for the codec's fingerprint 'abc', this model has 'kani'"),
])  # fmt: skip
def test_a_voice_for_another_model_is_refused(key, words):
    save_voice("x", CODES, [], MADE_FOR)
    with pytest.raises(ValueError, match=words):
        load_voice("x", {**MADE_FOR, key: "kani"})


@pytest.mark.parametrize("change, words", [
    ({"format": "x"}, "is no parlando-voice-1 file"),
    ({"made_for": None}, "made_for"),
    ({"made_for": {"arch": 3, "codec": "", "fingerprint": ""}}, "arch is 3, not a text"),
    ({"texts": [3]}, r"texts is \[3\]"), ({"note": None}, "note is None, not a text"),
    ({"codes": [torch.zeros(2, 3)]}, "codes is"), ({"codes": [torch.zeros(3).long()]}, "codes is"),
    ({"codes": [torch.zeros(0, 3).long()]}, "codes is"), ({"codes": []}, "holds neither codes nor latents"),
    ({"latents": torch.full((2, 3), torch.nan)}, "latents is"), ({"latents": torch.zeros(3)}, "latents is"),
    ({"timbre": torch.zeros(2, 3)}, "timbre is"), ({"timbre": torch.ones(3).long()}, "timbre is"),
])  # fmt: skip
def test_damaged_files_are_one_line(change, words):
    save_voice("x", CODES, ["one", "two"], MADE_FOR)
    torch.save({**torch.load("voices/x.pt"), **change}, "x.pt")
    with pytest.raises(ValueError, match=words) as error:
        load_voice("x.pt", MADE_FOR)
    assert "\n" not in str(error.value) and str(error.value).startswith("x.pt")


def test_no_code_in_a_file_is_run(tmp_path):
    torch.save(Evil(str(tmp_path / "made")), "evil.pt")
    (tmp_path / "text.pt").write_text("no voice")
    (tmp_path / "cut.pt").write_bytes((tmp_path / save_voice("x", CODES, [], MADE_FOR)).read_bytes()[:-200])
    for name in ("evil.pt", "text.pt", "cut.pt"):
        with pytest.raises(ValueError, match=name):
            load_voice(name, MADE_FOR)
    assert not (tmp_path / "made").exists() and voices.voice_path("a/b") == "a/b"

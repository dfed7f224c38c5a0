import errno
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from parts import page


def test_the_page_of_curves_is_well_formed_and_shows_the_values(tmp_path):
    lines = [{"iter": i, "loss": 5.0 - i / 1000, "lr": 1e-3, "c0_accuracy": None} for i in range(1, 4001)]
    lines[-1]["val_loss"] = 2.125
    path = tmp_path / "a <run>" / "loss.html"
    path.parent.mkdir()
    page.draw(lines, str(path))
    text = path.read_text()
    html = ElementTree.fromstring(text.removeprefix("<!doctype html>"))
    curves = {e.get("class"): e.get("points").split() for e in html.iter("polyline")}
    assert [e.text for e in html.iter("h2")] == ["Loss", "Learning rate"]  # no accuracy, so no picture of one
    labels = [e.text for e in html.iter("text")]
    assert "training 1" in labels and "held out 2.125" in labels and html.find("head/title").text == "a <run>"
    assert len(curves["c1"]) == 2 and len(max(curves.values(), key=len)) <= page.POINTS + 1
    assert "http" not in text and "src=" not in text


def test_a_table_shows_texts_as_they_are_and_plays_recordings(tmp_path):
    page.write_page(tmp_path / "x.html", "a & b", "<i>", ["", "c"], [["<d>", Path("e f") / "g.wav"]])
    assert os.listdir(tmp_path) == ["x.html"]
    text = (tmp_path / "x.html").read_text()
    assert "<h1>a &amp; b</h1>" in text and "<p>&lt;i&gt;</p>" in text and "<tr><th><th>c\n" in text
    assert '<tr><td>&lt;d&gt;<td><audio controls src="e%20f/g.wav"></audio>\n' in text


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        page.write_page(tmp_path / "x.html", "", "", [], [])
    assert error.value.filename == str(tmp_path / "x.html") and os.listdir(tmp_path) == []

"""A family of one's own is one piece of model.py, shorter than 100 lines, and a recipe; every command then knows it."""

import ast
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import soundfile
from helpers import ROOT, command

OWN = Path(__file__).parent / "own"


def family():
    """The source of the family, from its heading on."""
    source = (OWN / "chain.py").read_text(encoding="utf-8")
    return source[source.index("# -----") :]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with the family in model.py and its recipe in config/, and a token folder of spoken digits."""
    folder = tmp_path_factory.mktemp("copy") / "parlando"
    for pattern in ("*.py", "parts/*.py", "parts/*.html", "config/*.py"):
        for path in ROOT.glob(pattern):
            place = folder / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    source = (folder / "model.py").read_text(encoding="utf-8")
    before, archs, after = source.partition("\nARCHS = {")
    assert archs
    own = f'{family()}\n\nARCHS = {{"chain": (Chain, ChainConfig), '
    (folder / "model.py").write_text(before + "\n" + own + after, encoding="utf-8")
    shutil.copy(OWN / "digits_chain.py", folder / "config")
    with tarfile.open(Path(__file__).parent / "old/written.tar.xz") as archive:
        archive.extractall(folder, [m for m in archive if m.name.startswith("tokens_csm")], filter="data")
    (folder / "tokens_csm").rename(folder / "tokens")
    return folder


def test_it_is_short():
    assert family().count("\n") < 100 and {node.name for node in ast.parse(family()).body} == {"ChainConfig", "Chain"}


def test_it_trains_and_speaks(copy):
    said = command(copy, "train.py", "config/digits_chain.py")
    assert "contract check: generation and teacher forcing agree" in said
    lines = [json.loads(line) for line in (copy / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in lines] == list(range(1, 21))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"] and lines[-1]["val_stop_missed"] is not None
    command(copy, "sample.py", "--ckpt=out/best.pt", "--text=three one four", "--out_dir=spoken", "--cap_seconds=1")
    wav, rate = soundfile.read(copy / "spoken/000.wav")
    assert rate == 16000 and len(wav) >= rate / 12.5


@pytest.mark.slow
def test_it_resumes_takes_an_adapter_and_a_dry_run(copy):
    assert "--loss_decay=1.0" in command(copy, "train.py", "--help")
    assert "parameters" in command(copy, "train.py", "config/digits_chain.py", "--dry_run=True")
    for more in (["--max_iters=2"], ["--max_iters=4", "--init_from=resume"]):
        command(copy, "train.py", "config/digits_chain.py", "--out_dir=base", "--lr_decay_iters=20", *more)
    command(copy, "train.py", "config/digits_chain.py", "--init_from=base/best.pt", "--out_dir=adapted",
            "--lora_rank=2", "--max_iters=2")  # fmt: skip
    assert (copy / "adapted/best.pt").stat().st_size < (copy / "base/best.pt").stat().st_size

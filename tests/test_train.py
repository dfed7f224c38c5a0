import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, exact, run, same, write_tokens

import sample
import train
import weights
from data import Batches, TokenFiles
from evaluate import evaluate
from model import build
from parts import configurator, lora, optim, schedule
from parts.files import locked
from parts.metrics import read_metrics
from voice import Voice
from weights import from_pretrained, load_checkpoint, load_model, save_checkpoint


def start(code, data_dir, out_dir, *flags, launcher=(), **more):
    flags = [*TINY, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *flags]
    program = ["-c", code] if code else ["train.py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen([sys.executable, *launcher, *program, *flags], cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def at_batch(monkeypatch, number, act):
    """Call act when the training asks for micro-batch `number` (from 0 on)."""
    stream = Batches.__iter__

    def watched(self):
        for n, batch in enumerate(stream(self)):
            if n == number:
                act()
            yield batch

    monkeypatch.setattr(Batches, "__iter__", watched)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA

LORA = ["--lora_rank=2", "--lora_alpha=4", "--lora_dropout=0.2", "--lora_rs=True", "--lora_targets=['attn', 'mlp']",
        "--learning_rate=0.01"]  # fmt: skip


@pytest.fixture(scope="module")
def base(tokens, tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    run(tokens, out, "--max_iters=4")
    return str(out / "best.pt")


@pytest.mark.parametrize("more", [[], ["--ema=0.5", "--muon=True", "--lora_base_dtype=bfloat16", "--keep_last=3"]])
def test_lora_goes_on_bit_for_bit_and_is_saved_alone(tokens, base, tmp_path, more):
    flags = [f"--init_from={base}", *LORA, *more]
    whole, lines = run(tokens, tmp_path / "whole", *flags, "--max_iters=8")
    run(tokens, tmp_path / "parts", *flags, "--max_iters=4", "--lr_decay_iters=8")
    parts, again = run(tokens, tmp_path / "parts", "--init_from=resume", *LORA, *more, "--max_iters=8")
    same(whole, parts)
    assert exact(lines) == exact(again) and parts["base"] == base
    best = load_checkpoint(tmp_path / "whole" / "best.pt")
    weights = best["model"]["weights"]
    assert weights and all("lora" in name for name in weights)
    model = load_model(best)  # what it is added to is found by its path
    frozen = load_checkpoint(base)["model"]
    for name, p in model.state_dict().items():
        if "lora" not in name:
            kept = frozen[name].to(torch.bfloat16 if "bfloat16" in str(more) else p.dtype)
            assert torch.equal(p.to(kept.dtype), kept)
    assert any(weight.any() for name, weight in weights.items() if name.endswith("lora_b"))


def test_an_adapter_is_merged_into_what_is_trained_further_or_trained_further_itself(tokens, base, tmp_path):
    run(tokens, tmp_path / "a", f"--init_from={base}", *LORA, "--max_iters=4")
    adapted = str(tmp_path / "a" / "best.pt")
    merged, _ = run(tokens, tmp_path / "b", f"--init_from={adapted}", "--max_iters=1", "--learning_rate=0.0")
    assert merged["base"] is None
    expected = load_model(load_checkpoint(adapted))
    lora.merge(expected)
    for name, p in expected.state_dict().items():
        torch.testing.assert_close(merged["model"][name], p)
    further, _ = run(tokens, tmp_path / "c", f"--init_from={adapted}", *LORA, "--max_iters=1", "--learning_rate=0.0")
    with pytest.raises(ValueError, match="--lora_rank: lora_rank = 7, but .*best.pt was trained with"):
        run(tokens, tmp_path / "d", f"--init_from={adapted}", *LORA, "--max_iters=1", "--lora_rank=7")
    assert further["base"] == base
    same(further["model"], load_checkpoint(adapted)["model"])


def test_an_export_holds_the_adapter(tokens, base, tmp_path):
    run(tokens, tmp_path / "a", f"--init_from={base}", *LORA, "--max_iters=4")
    ckpt, hub = str(tmp_path / "a" / "best.pt"), str(tmp_path / "hub")
    flags = ["export", f"--ckpt={ckpt}", f"--out_dir={hub}"]
    weights.main(configurator.configure(weights.__file__, flags, ["command"]))
    expected, found = load_model(load_checkpoint(ckpt)), from_pretrained(hub)
    lora.merge(expected)
    bare = from_pretrained(base).parameters()
    assert any(not torch.equal(p, q) for p, q in zip(found.parameters(), bare, strict=True))
    for name, p in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], p)


def test_several_adapters_are_chosen_when_speaking(tokens, base, tmp_path):
    paths = []
    for seed, more in ((1, []), (2, ["--decoder_fraction=0.5", "--temperature=0.3"])):
        run(tokens, tmp_path / str(seed), f"--init_from={base}", *LORA, "--max_iters=8", f"--seed={seed}", *more)
        paths.append(str(tmp_path / str(seed) / "last.pt"))

    def heard(voice):
        return [frame.tolist() for frame in voice.frames("one two", temperature=0, cap_seconds=3)]

    alone = [heard(Voice.from_checkpoint(path, "cpu")) for path in paths]
    voice = Voice.from_checkpoint(paths[0], "cpu")
    voice.adapt(paths[1])
    second = heard(voice)
    assert (voice.model.config.decoder_fraction, voice.draw["temperature"]) == (0.5, 0.3)
    voice.adapt(paths[0])
    assert asdict(voice.model.config) == load_checkpoint(paths[0])["model_config"]
    assert [heard(voice), second] == alone and voice.draw["temperature"] == 0.9
    with pytest.raises(ValueError, match="holds no adapter, but a whole model"):
        voice.adapt(base)
    checkpoint = {**load_checkpoint(paths[1]), "codec": {"name": "mel", "options": {}}}  # it needs no codec of its own
    save_checkpoint(tmp_path / "bare.pt", checkpoint)
    voice.adapt(str(tmp_path / "bare.pt"))
    assert heard(voice) == second
    save_checkpoint(tmp_path / "other.pt", {**checkpoint, "codec_fingerprint": "0" * 16})
    with pytest.raises(ValueError, match="other.pt speaks in the codes of another codec: give it as ckpt"):
        voice.adapt(str(tmp_path / "other.pt"))


def test_a_run_goes_on_where_its_base_has_moved(tokens, base, tmp_path):
    moved = tmp_path / "moved/best.pt"
    (tmp_path / "moved").mkdir()
    (tmp_path / "other").mkdir()
    there = tmp_path / "other/x.pt"
    there.write_bytes(Path(base).read_bytes())
    run(tokens, tmp_path / "a", f"--init_from={there}", *LORA, "--max_iters=1")
    os.rename(there, moved)
    resume = ["--init_from=resume", *LORA, "--max_iters=2"]
    message = "a/last.pt is an adapter on .*other/x.pt, but .* does not exist: .*--base"
    with pytest.raises(FileNotFoundError, match=message):
        run(tokens, tmp_path / "a", *resume)
    assert run(tokens, tmp_path / "a", *resume, f"--base={moved}")[0]["base"] == str(moved)
    run(tokens, tmp_path / "a", *resume, "--max_iters=3")  # it is known from now on
    with pytest.raises(ValueError, match="base = .* has no effect: init_from = .* is no adapter"):
        run(tokens, tmp_path / "b", f"--init_from={base}", f"--base={moved}")


def test_an_adapter_goes_through_peft(tokens, base, tmp_path, capsys):
    """Out of a run, into others and into sample.py; its base is named by --base."""
    run(tokens, tmp_path / "a", f"--init_from={base}", *LORA, "--lora_also=['lm_head']", "--max_iters=4")
    ckpt, folder = str(tmp_path / "a/last.pt"), str(tmp_path / "peft")
    flags = ["export", f"--ckpt={ckpt}", f"--out_dir={folder}", "--layout=peft"]
    weights.main(configurator.configure(weights.__file__, flags, ["command"]))
    start = [f"--init_from={folder}", f"--base={base}", "--max_iters=1", "--learning_rate=0.0"]
    further, _ = run(tokens, tmp_path / "b", *start, "--lora_rank=2")
    same(further["model"]["weights"], load_checkpoint(ckpt)["model"]["weights"])
    assert (further["base"], further["config"]["lora_rs"], further["config"]["lora_also"]) == (base, True, ["lm_head"])
    resume = ["--init_from=resume", "--max_iters=2", "--learning_rate=0.0"]
    same(run(tokens, tmp_path / "b", *resume)[0]["model"], further["model"])
    merged, _ = run(tokens, tmp_path / "c", *start)
    expected = load_model(load_checkpoint(ckpt))
    lora.merge(expected)
    for name, p in expected.state_dict().items():
        torch.testing.assert_close(merged["model"][name], p)
    flags = ["export", f"--ckpt={folder}", f"--base={base}", f"--out_dir={tmp_path}/whole"]
    weights.main(configurator.configure(weights.__file__, flags, ["command"]))
    for name, p in from_pretrained(tmp_path / "whole").named_parameters():
        torch.testing.assert_close(merged["model"][name], p.data)
    capsys.readouterr()
    weights.main(configurator.configure(weights.__file__, ["inspect", folder], ["command", "ckpt"]))
    assert "an adapter of peft's, of rank 2, on a base without a name" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--lora_rank: lora_rank = 7, but .*peft was trained with 2"):
        run(tokens, tmp_path / "d", *start, "--lora_rank=7")
    said = ["--text=one two", "--temperature=0", "--cap_seconds=3", "--device=cpu"]
    wavs = []
    for i, words in enumerate(([f"--ckpt={ckpt}"], [f"--ckpt={folder}", f"--base={base}"],
                               [f"--ckpt={base}", f"--adapter={folder}"], [f"--ckpt={base}"])):  # fmt: skip
        sample.main(configurator.configure(sample.__file__, [*said, *words, f"--out_dir={tmp_path}/said{i}"]))
        wavs.append((tmp_path / f"said{i}/000.wav").read_bytes())
    assert wavs[0] == wavs[1] == wavs[2] != wavs[3]


@pytest.mark.parametrize("flags, message", [
    (["--lora_rank=2"], "name them by init_from"),
    (["--init_from={base}", "--lora_rank=2", "--freeze=['backbone']"], "freeze and lora_rank"),
    (["--init_from={base}", "--lora_rank=2", "--lora_targets=['nowhere']"], "'nowhere' matches no nn.Linear"),
    (["--init_from={base}", "--lora_rank=9000"], "rank = 9000 is above"),
    (["--init_from={base}", "--lora_alpha=2"], "lora_alpha = 2.0 has no effect: lora_rank = 0"),
    (["--init_from={base}", "--lora_rank=2", "--lora_base_dtype=float16"], "must be float32 or bfloat16"),
])  # fmt: skip
def test_lora_refuses(tokens, base, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(tokens, tmp_path / "out", *(flag.format(base=base) for flag in flags))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# going on after a stop

KILLED = """
import os, signal, sys, data, train
from parts import configurator
stream = data.Batches.__iter__
def killed(self):
    for n, batch in enumerate(stream(self)):
        if n == {number}:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
data.Batches.__iter__ = killed
train.main(configurator.configure(train.__file__, sys.argv[1:]))
"""


@pytest.mark.parametrize("flags, number", [
    ([], 5),
    (["--gradient_accumulation_steps=3", "--ema=0.9", "--dropout=0.1", "--frame_dropout=0.3", "--decoder_fraction=0.5",
      "--loader_workers=1", "--voice_prompt=0.5", "--keep_last=1", "--muon=True", "--sparse_embeddings=True",
      "--decoder_chunk=5"], 19),
], ids=["plain", "everything"])  # fmt: skip
def test_a_killed_run_goes_on_bit_for_bit(tokens, tmp_path, flags, number):
    whole, lines = run(tokens, tmp_path / "whole", "--max_iters=10", *flags)
    killed = start(KILLED.format(number=number), tokens, tmp_path / "killed", "--max_iters=10", *flags)
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    before = load_checkpoint(tmp_path / "killed/last.pt")
    assert before["iter"] == 4
    position, files, prompts = before["train"]["batches"], TokenFiles(tokens, "train"), whole["config"]["voice_prompt"]
    epoch, _ = Batches(files, *sizes(whole), seed=1337, voice_prompt=prompts).plan(position["epoch"])
    assert 0 < position["batch"] < len(epoch)
    assert read_metrics(tmp_path / "killed/metrics.jsonl")[-1]["iter"] > 4 or number == 5
    again, lines_again = run(tokens, tmp_path / "killed", "--max_iters=10", "--init_from=resume", *flags)
    same(whole, again)
    assert exact(lines) == exact(lines_again)
    assert [line["iter"] for line in lines] == list(range(1, 11))


def sizes(checkpoint):
    model = load_model(checkpoint)
    return model.layout, model.length, 120, 64


@pytest.mark.parametrize("key, value", [("eval_interval", "x"), ("lora_rank", 1.5), ("milestones", 7), ("seed", None)])
def test_recorded_keys_of_another_type_are_named(tokens, tmp_path, key, value):
    run(tokens, tmp_path, "--max_iters=4")
    checkpoint = dict(load_checkpoint(tmp_path / "last.pt"))
    save_checkpoint(tmp_path / "last.pt", {**checkpoint, "config": {**checkpoint["config"], key: value}})
    with pytest.raises(ValueError, match=f"last.pt is damaged: config: {key} = .* is not of type"):
        run(tokens, tmp_path, "--max_iters=8", "--init_from=resume")
    train_state = {**checkpoint["train"], "history": [(4, "1.0", 2.0)]}
    save_checkpoint(tmp_path / "last.pt", {**checkpoint, "train": train_state})
    with pytest.raises(ValueError, match="last.pt, train, is damaged: history is"):
        run(tokens, tmp_path, "--max_iters=8", "--init_from=resume")


def test_adapters_that_name_each_other_as_base(tokens, base, tmp_path):
    for name in ("a", "b"):
        run(tokens, tmp_path / name, f"--init_from={base}", *LORA, "--max_iters=1")
    paths = [str(tmp_path / name / "last.pt") for name in ("a", "b")]
    for path, other in (paths, paths[::-1]):
        save_checkpoint(path, {**load_checkpoint(path), "base": other})
    with pytest.raises(ValueError, match="a/last.pt is damaged: its base .*b/last.pt is an adapter itself"):
        from_pretrained(paths[0])
    with pytest.raises(ValueError, match="a/last.pt is damaged: its base .*b/last.pt is an adapter itself"):
        run(tokens, tmp_path / "c", f"--init_from={paths[0]}", "--max_iters=1")


def test_a_line_half_written_by_a_kill_is_dropped(tokens, tmp_path):
    run(tokens, tmp_path, "--max_iters=4")
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"iter": 5, "loss": 2.0}\n{"iter": 6, "lo')
    _, lines = run(tokens, tmp_path, "--max_iters=6", "--init_from=resume", "--lr_schedule=constant")
    assert [line["iter"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[4]["loss"] != 2.0


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(tokens, tmp_path, monkeypatch, capsys, number, code):
    flags = ["--max_iters=10", "--log_interval=4", "--gradient_accumulation_steps=2", "--frame_dropout=0.3"]
    whole, lines = run(tokens, tmp_path / "whole", *flags)
    with monkeypatch.context() as m:
        at_batch(m, 12, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as left:
            run(tokens, tmp_path / "left", *flags)
    assert left.value.code == code
    assert load_checkpoint(tmp_path / "left/last.pt")["iter"] == 7  # the step is finished; no log was due
    assert "--init_from=resume goes on" in capsys.readouterr().out
    again, lines_again = run(tokens, tmp_path / "left", "--init_from=resume", *flags)
    same(whole, again)
    assert exact(lines) == exact(lines_again)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ctrl_c_of_the_command_with_loader_workers(tokens, tmp_path):
    process = start("", tokens, tmp_path, "--max_iters=100000", "--loader_workers=1", "--eval_interval=100000")
    while process.poll() is None and len(read_metrics(tmp_path / "metrics.jsonl")) < 3:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [process.pid, *map(int, children)]:  # as a terminal does: to the whole group
        os.kill(pid, signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert children and "SIGINT at iter" in out and "Traceback" not in err
    assert load_checkpoint(tmp_path / "last.pt")["iter"] >= 3


def test_a_finished_run_has_nothing_left_to_do(tokens, tmp_path, capsys):
    first, _ = run(tokens, tmp_path, "--max_iters=4")
    second, _ = run(tokens, tmp_path, "--max_iters=4", "--init_from=resume")
    same(first, second)
    assert "nothing left to do" in capsys.readouterr().out


def test_what_a_kill_left_out_is_made_up_for(tokens, tmp_path):
    """Samples and curves after last.pt, in the last evaluation and in one before; what was half written goes."""
    flags = ["--eval_samples=2", "--lr_decay_iters=8"]
    for iters in (4, 8):
        resume = [] if iters == 4 else ["--init_from=resume"]
        run(tokens, tmp_path, f"--max_iters={iters}", *flags, *resume)
        spoken = sorted(tmp_path.glob(f"samples/{iters:06d}_*.wav"))
        before = {path: path.read_bytes() for path in (*spoken, tmp_path / "loss.html")}
        spoken[1].unlink()
        (tmp_path / "loss.html").unlink()
        for name in ("last.pt.partial", "loss.html.partial", "samples/x.wav.partial"):
            (tmp_path / name).write_bytes(b"half")
        run(tokens, tmp_path, f"--max_iters={iters}", "--init_from=resume", *flags)
        assert {path: path.read_bytes() for path in before} == before and len(spoken) == 2
        assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_without_last_the_newest_weights_are_named(tokens, tmp_path, damage):
    """Only last.pt has what resuming needs: the others would be a terabyte of optimizer states."""
    flags = ["--keep_last=9", "--max_iters=8"]
    run(tokens, tmp_path, *flags)
    assert load_checkpoint(tmp_path / "last.pt")["train"] and load_checkpoint(tmp_path / "ckpt_8.pt")["train"] is None
    assert (tmp_path / "ckpt_8.pt").stat().st_size < 0.6 * (tmp_path / "last.pt").stat().st_size
    last = tmp_path / "last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    problem = "last.pt is truncated"
    if damage == "gone":
        last.unlink()
        problem = "last.pt does not exist"
    with pytest.raises(ValueError, match="holds a run: init_from=resume goes on"):
        run(tokens, tmp_path, *flags)
    with pytest.raises((ValueError, OSError), match=rf"{problem}.*; start from \S+ckpt_8.pt with init_from, in"):
        run(tokens, tmp_path, "--init_from=resume", *flags)
    run(tokens, tmp_path / "more", f"--init_from={tmp_path / 'ckpt_8.pt'}", *flags)
    for path in tmp_path.glob("*.pt"):
        path.unlink()
    last.write_bytes(b"")
    with pytest.raises(ValueError, match="last.pt is no checkpoint, it is empty"):
        run(tokens, tmp_path, "--init_from=resume", *flags)


def test_the_same_command_starts_and_goes_on(tokens, tmp_path, capsys):
    recipe = tmp_path / "recipe.py"
    base, out = tmp_path / "base", tmp_path / "out"
    run(tokens, base, "--max_iters=4")
    whole, lines = run(tokens, tmp_path / "whole", f"--init_from={base / 'last.pt'}", "--max_iters=8")
    recipe.write_text(f"init_from = {str(base / 'last.pt')!r}\n")
    for most in (4, 8, 8):
        flags = [str(recipe), "--init_from=auto", f"--max_iters={most}", "--lr_decay_iters=8"]
        again, lines_again = run(tokens, out, *flags)
    same(whole, again)
    assert exact(lines) == exact(lines_again)
    assert "nothing left to do" in capsys.readouterr().out
    run(tokens, tmp_path / "fresh", "--init_from=auto", "--max_iters=2")  # without a recipe: from scratch
    assert load_checkpoint(tmp_path / "fresh/last.pt")["config"]["init_from"] == "scratch"


def test_best_follows_the_number_that_is_selected(tokens, tmp_path):
    _, lines = run(tokens, tmp_path, "--select_by=val_c0_accuracy", "--max_iters=10", "--eval_interval=2")
    found = [(line["val_c0_accuracy"], -line["iter"]) for line in lines if "val_loss" in line]
    assert load_checkpoint(tmp_path / "best.pt")["iter"] == -max(found)[1]
    _, lines = run(tokens, tmp_path / "spoken", "--select_by=repeats", "--eval_samples=3", "--max_iters=4")
    found = [(line["repeats"], line["iter"]) for line in lines if "val_loss" in line]
    assert load_checkpoint(tmp_path / "spoken/best.pt")["iter"] == min(found)[1] and "text_margin" in lines[-1]
    with pytest.raises(ValueError, match="select_by = 'val_lost' is none of the numbers of an evaluation: .*val_loss"):
        run(tokens, tmp_path / "b", "--select_by=val_lost")


def test_what_was_heard_adds_up(tokens, tmp_path):
    """Tokens and hours so far, over a resume too."""
    _, lines = run(tokens, tmp_path, "--max_iters=6", "--lr_decay_iters=12")
    _, more = run(tokens, tmp_path, "--max_iters=12", "--lr_decay_iters=12", "--init_from=resume")
    totals = [(line["total_tokens"], line["total_hours"]) for line in more]
    assert totals == sorted(totals) and totals[0][0] > 0 and totals[: len(lines)] == [
        (line["total_tokens"], line["total_hours"]) for line in lines]  # fmt: skip
    step = more[-1]["timing"]
    assert step["tokens_per_second"] * step["seconds"] == pytest.approx(totals[-1][0] - totals[-2][0], abs=1)
    hours = step["audio_seconds_per_second"] * step["seconds"] / 3600
    assert hours == pytest.approx(totals[-1][1] - totals[-2][1])


def test_a_run_does_not_remove_what_it_starts_from(tokens, base, tmp_path):
    out = tmp_path / "out"
    run(tokens, out, "--max_iters=4", "--keep_last=1")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for name in ("ckpt_4.pt", "best.pt", "../out/last.pt"):
        with pytest.raises(ValueError, match="is of the run in out_dir.*init_from=resume goes on with last.pt"):
            run(tokens, out, f"--init_from={out}/{name}", "--overwrite=True", "--max_iters=1")
    run(tokens, tmp_path / "lora", f"--init_from={out}/best.pt", *LORA, "--max_iters=1")
    with pytest.raises(ValueError, match="out/best.pt' is of the run in out_dir"):  # what the adapter is added to
        run(tokens, out, f"--init_from={tmp_path}/lora/last.pt", *LORA, "--overwrite=True", "--max_iters=1")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_best_without_a_last_is_no_run_and_is_kept(tokens, tmp_path, capsys):
    """As a kill in the first evaluation leaves it."""
    out = tmp_path / "[out]"  # a pattern, to those who take names for patterns
    run(tokens, out, "--max_iters=4")
    (out / "last.pt").unlink()
    best = (out / "best.pt").read_bytes()
    with pytest.raises(FileNotFoundError, match="last.pt does not exist: init_from is scratch"):
        run(tokens, out, "--max_iters=4", "--init_from=resume")
    for kept in ("best_1.pt", "best_2.pt"):
        last, lines = run(tokens, out, "--max_iters=4")
        assert (out / kept).read_bytes() == best and last["iter"] == 4 and len(lines) == 4
        assert f"it is kept as {out}/{kept}" in capsys.readouterr().out
        best = (out / "best.pt").read_bytes()
        (out / "last.pt").unlink()


def test_two_runs_do_not_share_a_folder(tokens, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def intrude():
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for flag in ("--init_from=resume", "--overwrite=True"):
            with pytest.raises(ValueError, match="out is in use by another run"):
                run(tokens, out, "--max_iters=9", flag)
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    with monkeypatch.context() as m:
        at_batch(m, 5, intrude)
        _, lines = run(tokens, out, "--max_iters=6")
    assert [line["iter"] for line in lines] == [1, 2, 3, 4, 5, 6]
    with locked(out):  # it has let go
        pass


def test_data_prepared_anew_are_noticed(tmp_path, monkeypatch, capsys):
    folder, out = write_tokens(tmp_path / "tokens"), tmp_path / "out"
    run(folder, out, "--max_iters=10")
    last = load_checkpoint(out / "last.pt")
    state = dict(last["train"])
    assert state.pop("data") and state["batches"]["batch"] > 0
    (tmp_path / "old").mkdir()
    save_checkpoint(tmp_path / "old/last.pt", {**last, "train": state})  # as older code wrote it
    write_tokens(folder, n_train=20, n_val=3)
    monkeypatch.setattr(train, "evaluate", lambda *_: {"loss": 99.0, "c0_accuracy": 0.0})
    capsys.readouterr()
    _, lines = run(folder, out, "--max_iters=11", "--init_from=resume")
    assert f"{folder} has other utterances than before" in capsys.readouterr().out
    history = load_checkpoint(out / "last.pt")["train"]["history"]
    assert lines[-1]["epoch"] == 0 and history == [(11, lines[-1]["loss"], 99)]
    assert load_checkpoint(out / "best.pt")["iter"] == 11  # the best of the new data, if worse
    again, _ = run(folder, tmp_path / "old", "--max_iters=11", "--init_from=resume")
    assert "other utterances" not in capsys.readouterr().out
    assert again["train"]["best"] == state["best"] and again["train"]["data"]


def test_a_best_of_another_loss_is_forgotten_and_a_jump_of_the_rate_said(tokens, tmp_path, monkeypatch, capsys):
    run(tokens, tmp_path, "--max_iters=4")
    capsys.readouterr()
    monkeypatch.setattr(train, "evaluate", lambda *_: {"loss": 99.0, "c0_accuracy": 0.0})
    run(tokens, tmp_path, "--max_iters=8", "--init_from=resume", "--frame_dropout=0.1")  # of training alone
    said = capsys.readouterr().out
    assert "forgotten" not in said and load_checkpoint(tmp_path / "best.pt")["iter"] == 4
    assert "so that the learning rate goes on at 0.00075 instead of 0\n" in said
    run(tokens, tmp_path, "--max_iters=12", "--init_from=resume", "--lr_schedule=constant", "--decoder_loss_weight=0.5",
        "--eval_iters=1", "--frame_dropout=0.1")  # fmt: skip
    assert "decoder_loss_weight, eval_iters changed, and with it what" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "best.pt")["iter"] == 12


def test_errors_of_loader_workers_and_of_steps_end_the_run(tokens, tmp_path, monkeypatch):
    arrays, calls = Batches._arrays, itertools.count()

    def wrong(self, *task):
        if self.shuffle and next(calls) > 20:
            raise ValueError("a clear line")
        return arrays(self, *task)

    with monkeypatch.context() as m:
        m.setattr(Batches, "_arrays", wrong)
        with pytest.raises(ValueError, match="^a clear line$"):
            run(tokens, tmp_path / "a", "--max_iters=99", "--loader_workers=2", "--eval_interval=99")
    for error in (torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
                  RuntimeError("[enforce fail at alloc_cpu.cpp:117]\n DefaultCPUAllocator: can't allocate memory")):
        def fail(error=error):
            raise error

        with monkeypatch.context() as m:
            at_batch(m, 2, fail)
            with pytest.raises(ValueError, match="out of memory: lower max_tokens = 120") as said:
                run(tokens, tmp_path / "b", "--max_iters=99", "--loader_workers=1", "--overwrite=True")
        assert "\n" not in str(said.value)


def test_a_rank_does_not_outlive_the_other(tokens, tmp_path):
    flags = ["--max_iters=100000", "--eval_interval=100000", "--loader_workers=1", "--gradient_accumulation_steps=2"]
    group = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    code = KILLED.format(number=5).replace("train.main(configurator.configure(train.__file__, sys.argv[1:]))",
                                           "configurator.run(train.main, train.__file__)")  # fmt: skip
    ranks = [start(code if rank else "", tokens, tmp_path, *flags, RANK=str(rank), LOCAL_RANK=str(rank), **group)
             for rank in (0, 1)]  # fmt: skip
    assert ranks[1].wait() == -signal.SIGKILL
    _, err = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 1
    assert "error: another process of this run has ended" in err.splitlines()[-1] and "Traceback" not in err


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("optimizers", [[], ["--muon=True", "--sparse_embeddings=True"]], ids=["adamw", "shared out"])
def test_two_ranks_are_one_process(tokens, tmp_path, optimizers):
    flags = [*optimizers, "--max_iters=6", "--gradient_accumulation_steps=4", "--dropout=0.2", "--frame_dropout=0.3",
             "--eval_iters=1", "--decoder_fraction=0.5", "--decoder_chunk=5", "--lr_schedule=constant",
             "--log_interval=2"]  # fmt: skip
    one, lines = run(tokens, tmp_path / "one", *flags)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = start("", tokens, tmp_path / "two", *flags, launcher=launcher)
    _, err = process.communicate()
    assert process.returncode == 0, err
    lines_two = read_metrics(tmp_path / "two/metrics.jsonl")
    assert [line["iter"] for line in lines_two] == [line["iter"] for line in lines] == [2, 4, 6]
    for a, b in zip(exact(lines), exact(lines_two), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-6, err_msg=key)
    two = load_checkpoint(tmp_path / "two/last.pt")
    assert one["train"]["batches"] == two["train"]["batches"]
    for name, weight in one["model"].items():
        torch.testing.assert_close(weight, two["model"][name], rtol=1e-3, atol=1e-5)
    assert not torch.equal(run(tokens, tmp_path / "other", *flags, "--seed=7")[0]["model"][name], weight)


# ---------------------------------------------------------------------------------------------------------------------
# a step


def config(*flags):
    return configurator.configure(train.__file__, list(flags))


def test_the_schedule_reaches_the_log_and_a_drop_is_said(tokens, tmp_path, capsys):
    flags = ["--lr_schedule=multistep", "--milestones=[3]", "--gamma=0.25", "--learning_rate=0.01", "--max_iters=4"]
    _, lines = run(tokens, tmp_path, *flags)
    assert [line["lr"] for line in lines] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.0025])
    assert "iter 3: the learning rate changes from 0.01 to 0.0025" in capsys.readouterr().out


def test_frozen_parameters_stay(tokens, tmp_path):
    cfg = config(*TINY)
    torch.manual_seed(cfg.seed)
    initial = build("csm", TokenFiles(tokens, "train").meta, vars(cfg)).state_dict()
    frozen, _ = run(tokens, tmp_path, "--max_iters=3", "--freeze=['^backbone', 'text_embedding']")
    for name, weight in frozen["model"].items():
        assert torch.equal(weight, initial[name]) == name.startswith(("backbone", "text_embedding")), name


@pytest.mark.parametrize("patterns, message", [
    ("['backbone', 'bakcbone']", "'bakcbone' finds no parameter"),
    ("['(']", "'\\(' is not a regular expression"),
    ("['.']", "leaves nothing to train"),
])  # fmt: skip
def test_freezing_what_cannot_be(tokens, tmp_path, patterns, message):
    with pytest.raises(ValueError, match=message):
        run(tokens, tmp_path / "x", f"--freeze={patterns}")
    assert not (tmp_path / "x").exists()


def test_only_matrices_decay(tokens, tmp_path):
    checkpoint, _ = run(tokens, tmp_path, "--max_iters=1", "--weight_decay=0.3")
    decayed, others = checkpoint["train"]["optimizers"][0]["param_groups"]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0)
    vectors = [name for name, weight in checkpoint["model"].items() if weight.ndim < 2]
    assert len(others["params"]) == len(vectors) > 0
    assert len(decayed["params"]) + len(vectors) == len(checkpoint["model"])


def test_optimizers_share_out_the_parameters(tokens):
    meta = TokenFiles(tokens, "train").meta
    for flags, kinds in (([], ["AdamW"]), (["--muon=True"], ["AdamW", "Muon"]),
                         (["--sparse_embeddings=True", "--muon=True"], ["AdamW", "Muon", "SparseAdam"])):  # fmt: skip
        cfg = config(*TINY, *flags)
        model = build("csm", meta, vars(cfg))
        model.projection.requires_grad_(False)
        optimizers = optim.share_out(model, cfg)
        assert [type(optimizer).__name__ for optimizer in optimizers] == kinds
        names = {id(p): name for name, p in model.named_parameters()}
        shares = {type(optimizer).__name__: {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
                  for optimizer in optimizers}  # fmt: skip
        assert sum(map(len, shares.values())) == len(set.union(*shares.values())) == len(names) - 1
        assert all("_proj.weight" in name for name in shares.get("Muon", ()))
        assert shares.get("SparseAdam", {"text_embedding.weight", "audio_embedding.weight"}) == {
            "text_embedding.weight", "audio_embedding.weight"}  # fmt: skip
    model.text_embedding.requires_grad_(False), model.audio_embedding.requires_grad_(False)
    assert [type(optimizer).__name__ for optimizer in optim.share_out(model, cfg)] == ["AdamW", "Muon"]


def test_sparse_embeddings_have_the_same_gradient_and_move_only_where_it_is(tokens):
    files = TokenFiles(tokens, "train")
    models, norms, grads = [], [], []
    for sparse in (False, True):
        cfg = config(*TINY, f"--sparse_embeddings={sparse}")
        torch.manual_seed(0)
        model = build("csm", files.meta, vars(cfg))
        before = model.audio_embedding.weight.detach().clone()
        optimizers = optim.share_out(model, cfg)
        batch = next(iter(Batches(files, model.layout, model.length, 60, 4)))
        torch.manual_seed(1)
        model(*batch)[0].backward()
        norms.append(optim.clip_gradients(list(model.parameters()), 0.01))
        grads.append({name: p.grad.to_dense() if p.grad.is_sparse else p.grad for name, p in model.named_parameters()})
        for optimizer in optimizers:
            optimizer.step()
        models.append(model)
    assert models[1].audio_embedding.weight.grad.is_sparse and not models[0].audio_embedding.weight.grad.is_sparse
    torch.testing.assert_close(*norms)
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-5, atol=1e-9)
    assert float(torch.cat([g.flatten() for g in grads[0].values()]).norm()) == pytest.approx(0.01, rel=1e-3)
    touched = grads[1]["audio_embedding.weight"].any(1)
    moved = (models[1].audio_embedding.weight != before).any(1)
    assert 0 < touched.sum() < len(touched) and torch.equal(moved, touched)
    assert (models[0].audio_embedding.weight != before).any(1).all()  # where AdamW's decay moves every row


def test_averaged_weights_are_kept_and_evaluated(tokens, tmp_path, monkeypatch):
    flags = ["--max_iters=4", "--eval_interval=1", "--ema=0.2", "--keep_last=9", "--learning_rate=0.03"]
    evaluated = []
    monkeypatch.setattr(train, "evaluate", lambda model, *args: evaluated.append(model) or evaluate(model, *args))
    last, lines = run(tokens, tmp_path, *flags)
    assert len(evaluated) == 4 and not any(p.requires_grad or p.grad_fn for p in evaluated[-1].parameters())
    cfg = config(*TINY)
    torch.manual_seed(cfg.seed)
    mean = build("csm", last["meta"], vars(cfg)).state_dict()
    for i in range(4):
        checkpoint = load_checkpoint(tmp_path / f"ckpt_{i + 1}.pt")
        decay = min(0.2, (1 + i) / (10 + i))
        mean = {name: decay * mean[name] + (1 - decay) * weight for name, weight in checkpoint["model"].items()}
        for name in mean:
            torch.testing.assert_close(mean[name], checkpoint["ema"][name])
    val = Batches(TokenFiles(tokens, "val"), *sizes(last), shuffle=False)
    off = torch.autocast("cpu", enabled=False)
    averaged = load_model(last)
    torch.testing.assert_close(averaged.state_dict(), last["ema"])
    assert evaluate(averaged, val, off)["loss"] == pytest.approx(lines[-1]["val_loss"], rel=1e-6)
    plain = load_model({**last, "ema": None})
    assert evaluate(plain, val, off)["loss"] != pytest.approx(lines[-1]["val_loss"], rel=1e-3)


def test_accumulation_averages_micro_batches(tokens, tmp_path):
    """With plain gradient descent in mind: the gradient norm logged is that of the mean over the micro-batches."""
    flags = ["--max_iters=1", "--gradient_accumulation_steps=3", "--decoder_fraction=1.0"]
    last, lines = run(tokens, tmp_path, *flags)
    cfg = config(*TINY, *flags)
    torch.manual_seed(cfg.seed)
    model = build("csm", last["meta"], vars(cfg))
    batches = Batches(TokenFiles(tokens, "train"), model.layout, model.length, 120, 64, cfg.seed)
    loss = sum(model(*batch)[0] for batch in itertools.islice(batches, 3)) / 3
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert lines[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_bfloat16_stays_near_float32(tokens, tmp_path):
    _, exact_lines = run(tokens, tmp_path / "a", "--max_iters=4")
    last, lines = run(tokens, tmp_path / "b", "--max_iters=4", "--dtype=bfloat16")
    assert all(weight.dtype == torch.float32 for weight in last["model"].values())
    for a, b in zip(exact_lines, lines, strict=True):
        assert b["loss"] != a["loss"] and b["loss"] == pytest.approx(a["loss"], rel=0.02)


def test_float16_with_its_scaler_goes_on_bit_for_bit(tokens, tmp_path, monkeypatch):
    """On a CPU it is refused as useless, not because it would not work, so the path can be tried here."""
    monkeypatch.setattr(train, "check", lambda *_: None)
    flags = ["--dtype=float16", "--max_iters=8"]
    whole, lines = run(tokens, tmp_path / "whole", *flags)
    _, exact_lines = run(tokens, tmp_path / "exact", "--max_iters=8")
    assert lines[-1]["loss"] == pytest.approx(exact_lines[-1]["loss"], rel=0.05)
    assert lines[-1]["grad_norm"] == pytest.approx(exact_lines[-1]["grad_norm"], rel=0.3)  # the scale is taken out
    tries = lines[-1]["skipped"]  # until the scale is low enough
    assert [line["skipped"] for line in lines] == [min(i, tries) for i in range(1, 9)] and tries < 5
    with monkeypatch.context() as m:
        at_batch(m, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run(tokens, tmp_path / "left", *flags)
    again, lines_again = run(tokens, tmp_path / "left", "--init_from=resume", *flags)
    same(whole, again)
    assert exact(lines) == exact(lines_again) and whole["train"]["scaler"]["_growth_tracker"] == 8 - tries


# ---------------------------------------------------------------------------------------------------------------------
# steps that go wrong


def poison(monkeypatch, when, what=float("nan")):
    """Multiply the loss of the training's calls `when` (from 0 on) by `what`."""
    def poisoned(*args):
        model, calls = build(*args), itertools.count()
        forward = model.forward

        def wrong(tokens, segment):
            loss, stats = forward(tokens, segment)
            return (loss * what if model.training and next(calls) in when else loss), stats

        model.forward = wrong
        return model

    monkeypatch.setattr(weights, "build", poisoned)


@pytest.mark.parametrize("optimizers", [[], ["--muon=True", "--sparse_embeddings=True"],
                                        ["--step_in_backward=True", "--grad_clip=0"]],
                         ids=["adamw", "shared out", "in backward"])  # fmt: skip
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_a_non_finite_step_changes_nothing_and_is_counted(tokens, tmp_path, monkeypatch, what, optimizers):
    cfg = config(*TINY)
    torch.manual_seed(cfg.seed)
    initial = build("csm", TokenFiles(tokens, "train").meta, vars(cfg)).state_dict()
    poison(monkeypatch, {0, 1}, what)
    skipped, lines = run(tokens, tmp_path / "a", "--max_iters=2", *optimizers)
    same(dict(initial), dict(skipped["model"]))
    assert [line["skipped"] for line in lines] == [1, 2] and lines[-1]["loss"] is None
    poison(monkeypatch, {1}, what)
    last, lines = run(tokens, tmp_path / "b", "--max_iters=4", "--log_interval=2", *optimizers)
    assert lines[-1]["skipped"] == 1 and np.isfinite(lines[0]["loss"]) and np.isfinite(lines[0]["grad_norm"])
    assert {float(state["step"]) for state in last["train"]["optimizers"][0]["state"].values()} == {3.0}
    assert all(weight.isfinite().all() for weight in last["model"].values())


def test_too_many_in_a_row_stop_the_run_and_keep_the_checkpoint(tokens, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(5, 99)))
    with pytest.raises(ValueError, match="3 steps in a row up to iter 8 had a non-finite loss or gradient"):
        run(tokens, tmp_path, "--max_iters=50", "--max_skipped=3")
    last = load_checkpoint(tmp_path / "last.pt")
    assert last["iter"] == 4 and all(weight.isfinite().all() for weight in last["model"].values())


def test_weights_that_are_not_finite_are_not_saved(tokens, tmp_path, monkeypatch):
    real = schedule.get_lr
    monkeypatch.setattr(schedule, "get_lr", lambda step, cfg: 1e39 if step == 7 else real(step, cfg))
    with pytest.raises(ValueError, match="weights at iter 8 are not finite"):
        run(tokens, tmp_path, "--max_iters=20")
    assert load_checkpoint(tmp_path / "last.pt")["iter"] == 4


def test_weights_that_are_not_finite_are_named(tokens, base, tmp_path):
    checkpoint = load_checkpoint(base)
    for what in (float("nan"), float("inf")):
        weight = checkpoint["model"]["backbone.layers.0.attn.q_proj.weight"].clone()
        weight[3, 5] = what
        damaged = {**checkpoint, "model": {**checkpoint["model"], "backbone.layers.0.attn.q_proj.weight": weight}}
        save_checkpoint(tmp_path / "x.pt", damaged)
        for act in (lambda: run(tokens, tmp_path / "out", f"--init_from={tmp_path}/x.pt"),
                    lambda: Voice.from_checkpoint(tmp_path / "x.pt", "cpu")):  # fmt: skip
            with pytest.raises(ValueError, match="x.pt: backbone.layers.0.attn.q_proj.weight holds NaN or infinity"):
                act()
    assert not (tmp_path / "out").exists()
    save_checkpoint(tmp_path / "x.pt", {**checkpoint, "model": {k: 1e20 * w for k, w in checkpoint["model"].items()}})
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        Voice.from_checkpoint(tmp_path / "x.pt", "cpu")


def test_what_cannot_be_spoken_does_not_end_the_run(tokens, tmp_path, monkeypatch, capsys):
    def diverged(*_, **__):
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0\nand more")

    monkeypatch.setattr(Voice, "speak", diverged)
    run(tokens, tmp_path, "--max_iters=4", "--eval_samples=1")
    assert "samples: probability tensor contains either `inf`, `nan` or element < 0\n" in capsys.readouterr().out
    monkeypatch.setattr(train, "evaluate", lambda *_: {"loss": None, "c0_accuracy": 0.0})
    run(tokens, tmp_path, "--max_iters=8", "--eval_samples=1", "--init_from=resume")
    assert "iter 8: no samples, as the loss is not finite" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# what a run leaves behind


def test_files_of_a_run(tokens, tmp_path, capsys):
    out = tmp_path / "out"
    last, lines = run(tokens, out, "--max_iters=10", "--keep_last=2", "--eval_samples=2", "--learning_rate=0.01")
    checkpoints = {"best.pt", "last.pt", "ckpt_8.pt", "ckpt_10.pt"}
    others = {"metrics.jsonl", "config.json", "loss.html", "samples"}
    assert {path.name for path in out.iterdir()} == checkpoints | others
    spoken = {f"{i:06d}_{n}.wav" for i in (4, 8, 10) for n in (0, 1)}
    assert {path.name for path in (out / "samples").iterdir()} == spoken | {"original_0.wav", "original_1.wav"}
    assert json.loads((out / "config.json").read_text()) == last["config"]
    assert last["config"]["learning_rate"] == 0.01 and last["iter"] == 10

    means = ["loss", "backbone_loss", "decoder_loss", "c0_accuracy", "loss_by_codebook", "accuracy_by_codebook"]
    for line in lines:
        assert {"iter", "lr", "grad_norm", "padding", "skipped", "epoch", "timing", *means} <= line.keys()
        assert len(line["loss_by_codebook"]) == 3 and 0 <= line["padding"] < 0.5
        assert line["timing"]["tokens_per_second"] > line["timing"]["audio_seconds_per_second"] > 0
        evaluated = {f"val_{name}" for name in (*means, "stop_missed")}
        assert evaluated <= line.keys() if line["iter"] in (4, 8, 10) else not evaluated & line.keys()
    assert lines[-1]["loss"] < lines[0]["loss"]

    best = load_checkpoint(out / "best.pt")
    evaluations = [line for line in lines if "val_loss" in line]
    assert best["iter"] == min(evaluations, key=lambda line: line["val_loss"])["iter"]
    assert best["train"] is None and last["train"]["best"] == min(line["val_loss"] for line in evaluations)

    printed = capsys.readouterr().out
    assert "learning_rate=0.01" in printed and "contract check" in printed and "(ln V = 2.9" in printed
    for part in ("backbone 0.00", "decoder_heads", "padding, 100% of the frames are targets", "held out: loss"):
        assert part in printed


def test_the_checkpoint_alone_speaks(tokens, tmp_path):
    run(tokens, tmp_path, "--max_iters=4")
    voice = Voice.from_checkpoint(str(tmp_path / "best.pt"), device="cpu")
    wav = voice.say("one two", speaker="b", temperature=1.0, seed=3)
    assert wav.ndim == 1 and wav.isfinite().all()
    assert voice.report["max_difference"] < 1e-4


def test_speaking_does_not_touch_the_training(tokens, tmp_path):
    flags = ["--max_iters=6", "--eval_interval=2", "--frame_dropout=0.5"]
    quiet, _ = run(tokens, tmp_path / "a", *flags)
    loud, _ = run(tokens, tmp_path / "b", *flags, "--eval_samples=1")
    same(quiet["model"], loud["model"])


def test_best_stays_and_overfitting_is_said(tokens, tmp_path, monkeypatch, capsys):
    losses = itertools.chain([3.0, 2.0], itertools.count(2.1, 0.1))
    monkeypatch.setattr(train, "evaluate", lambda *_: {"loss": next(losses), "c0_accuracy": 0.0})
    flags = ["--eval_interval=3", "--learning_rate=0.02"]
    run(tokens, tmp_path, "--max_iters=12", *flags)
    assert "overfitting" not in capsys.readouterr().out
    run(tokens, tmp_path, "--max_iters=15", "--init_from=resume", *flags)  # the count goes on in a resumed run
    assert "overfitting: held-out loss has risen for 3 evaluations" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "best.pt")["iter"] == 6


def test_without_a_val_split(tmp_path, capsys):
    folder = write_tokens(tmp_path / "tokens", n_val=0)
    last, lines = run(folder, tmp_path / "out", "--max_iters=4")
    assert last["iter"] == 4 and not (tmp_path / "out/best.pt").exists()
    assert not any("val_loss" in line for line in lines)
    assert "the val split is empty" in capsys.readouterr().out


def test_evaluation_is_the_mean_over_the_whole_split(tokens):
    cfg = config(*TINY)
    model = build("csm", TokenFiles(tokens, "val").meta, vars(cfg))
    files, off = TokenFiles(tokens, "val"), torch.autocast("cpu", enabled=False)

    def measure(max_tokens, most=0):
        val = Batches(files, model.layout, model.length, max_tokens, 64, shuffle=False)
        return evaluate(model, val, off, most), len(val.plan(0)[0])

    (whole, one), (parts, many), (some, _) = measure(10_000), measure(30), measure(30, 2)
    assert one == 1 and many > 2
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5, err_msg=name)
    assert whole["loss"] != pytest.approx(some["loss"], rel=1e-7)
    assert whole["loss"] == pytest.approx(some["loss"], rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# several token folders


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("two")
    sizes = {"new": (8, 2), "old": (24, 4)}
    folders = [write_tokens(place / name / "tokens", *counts) for name, counts in sizes.items()]
    return f"{folders[0]}:2.5,{folders[1]}:0.5"


def test_several_folders_have_losses_of_their_own(two_folders, tmp_path, capsys):
    last, lines = run(two_folders, tmp_path / "out", "--max_iters=4")
    assert "new/tokens: 8 utterances, each 2.5 times an epoch" in capsys.readouterr().out
    found = {name: lines[-1][f"val_loss{name}"] for name in ("", "_new", "_old")}
    model, off = load_model(last), torch.autocast("cpu", enabled=False)
    frames = []
    for name, word in zip(("_new", "_old"), two_folders.split(","), strict=True):
        part = TokenFiles(word.rpartition(":")[0], "val")
        frames.append(int(part.index[:, 3].sum()))
        assert evaluate(model, Batches(part, *sizes(last), shuffle=False), off)["loss"] == pytest.approx(found[name])
    assert found["_new"] != found["_old"]
    assert found[""] == pytest.approx((frames[0] * found["_new"] + frames[1] * found["_old"]) / sum(frames))


def test_samples_come_from_each_folder_in_turn(two_folders, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(Voice, "speak", lambda self, lines, **_: said.extend(lines) or ())
    monkeypatch.setattr(Voice, "text_ids", lambda *_, **__: [])  # unlike the ids in the files, which are then spoken
    new, old = (word.rpartition(":")[0] for word in two_folders.split(","))
    copy = shutil.copytree(old, tmp_path / "copy")
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**meta, "text_format": "{text}", "speakers": ["cid", "dan"]}))
    run(f"{new}:2,{copy}", tmp_path / "out", "--max_iters=1", "--eval_samples=5")
    files = {"ab": TokenFiles(new, "val"), ("cid", "dan"): TokenFiles(copy, "val")}
    expected = [("ab", 0), (("cid", "dan"), 0), ("ab", 1), (("cid", "dan"), 1), (("cid", "dan"), 2)]
    said = [(line["text"].tolist(), line["speaker"]) for line in said]
    assert said == [(files[names].text(i).tolist(), names[files[names].speaker(i)]) for names, i in expected]
    assert len(list((tmp_path / "out/samples").glob("original_*.wav"))) == 5


def test_a_mixture_goes_on_bit_for_bit_and_new_weights_are_noticed(two_folders, tmp_path, capsys):
    flags = ["--loader_workers=1", "--gradient_accumulation_steps=2", "--voice_prompt=0.5", "--lr_schedule=constant"]
    whole, lines = run(two_folders, tmp_path / "whole", *flags, "--max_iters=8")
    run(two_folders, tmp_path / "parts", *flags, "--max_iters=4")
    parts, again = run(two_folders, tmp_path / "parts", *flags, "--max_iters=8", "--init_from=resume")
    same(whole, parts)
    assert exact(lines) == exact(again)
    assert "other utterances" not in capsys.readouterr().out
    other = two_folders.replace(":0.5", ":1")
    _, lines = run(other, tmp_path / "parts", *flags, "--max_iters=9", "--init_from=resume")
    assert "has other utterances than before" in capsys.readouterr().out and lines[-1]["epoch"] == 0


def test_two_ranks_share_a_mixture(two_folders, tmp_path):
    flags = ["--max_iters=3", "--gradient_accumulation_steps=2", "--lr_schedule=constant", "--eval_interval=3"]
    _, lines = run(two_folders, tmp_path / "one", *flags)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = start("", two_folders, tmp_path / "two", *flags, launcher=launcher)
    _, err = process.communicate()
    assert process.returncode == 0, err
    for a, b in zip(exact(lines), exact(read_metrics(tmp_path / "two/metrics.jsonl")), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-6, err_msg=key)


# ---------------------------------------------------------------------------------------------------------------------
# where a run starts


def test_a_run_is_not_overwritten_by_accident(tokens, tmp_path):
    run(tokens, tmp_path, "--max_iters=8", "--keep_last=2", "--eval_samples=1")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match="holds a run: init_from=resume goes on with it"):
        run(tokens, tmp_path, "--max_iters=4")
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    _, lines = run(tokens, tmp_path, "--max_iters=4", "--overwrite=True")
    assert len(lines) == 4 and not list(tmp_path.glob("ckpt_*")) and not list(tmp_path.glob("samples/*"))


def test_fine_tuning_starts_from_the_weights(tokens, tmp_path):
    run(tokens, tmp_path / "a", "--max_iters=4", "--ema=0.5")
    best = load_checkpoint(tmp_path / "a/best.pt")
    flags = ["--max_iters=1", "--learning_rate=0.0", "--dropout=0.3", "--decoder_fraction=0.5"]
    tuned, lines = run(tokens, tmp_path / "b", f"--init_from={tmp_path}/a/best.pt", *flags)
    same(dict(best["ema"]), dict(tuned["model"]))
    with pytest.raises(ValueError, match="backbone = 'llama-1B', but .*best.pt was trained with {'n_layer': 1"):
        run(tokens, tmp_path / "c", f"--init_from={tmp_path}/a/best.pt", *flags, "--backbone=llama-1B")
    assert lines[0]["iter"] == 1
    assert tuned["model_config"]["backbone"] == {**best["model_config"]["backbone"], "dropout": 0.3}
    assert tuned["model_config"]["decoder_fraction"] == 0.5


@pytest.fixture(scope="module")
def trained(tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(tokens, folder, "--max_iters=4")
    return folder


@pytest.mark.parametrize("flags, message", [
    (["--dtype=float16"], "float16' needs a GPU, not cpu"),
    (["--dtype=float8"], "dtype = 'float8' must be float32, bfloat16 or float16"),
    (["--lr_schedule=cosin"], "lr_schedule = 'cosin' must be multistep, cosine"),
    (["--lr_schedule=multistep"], "multistep needs ascending steps"),
    (["--lr_schedule=multistep", "--milestones=[20, 10]"], "multistep needs ascending steps"),
    (["--lr_schedule=multistep", "--milestones=[1, 10]"], "ascending steps from 2 on"),
    (["--lr_schedule=multistep", "--milestones=['10']"], "must hold float only"),
    (["--lr_decay_iters=1"], "lr_decay_iters = 1 comes before warmup_iters = 2"),
    (["--min_lr=0.1"], "min_lr = 0.1 is above learning_rate"),
    (["--ema=1.0"], "ema = 1.0 must be >= 0 and < 1"),
    (["--learning_rate=nan"], "learning_rate"),
    (["--learning_rate=-0.1"], "learning_rate = -0.1 must be >= 0"),
    (["--max_iters=-1"], "max_iters = -1 must be >= 0"),
    (["--voice_prompt=1.5"], "voice_prompt = 1.5 must be >= 0 and <= 1"),
    (["--backbone=llama-2M"], "unknown preset 'llama-2M'"),
    (["--arch=gpt"], "unknown arch 'gpt'"),
    (["--max_tokens=8"], "more than max_tokens = 8"),
    ([TINY[0].replace("}", ", 'max_positions': 8}")], "has 8 positions"),
    (["--device=tpu"], "device = 'tpu' is not available"),
    (["--data_dir=nowhere"], "nowhere is not a finished token folder"),
    (["--init_from=resume"], "last.pt does not exist"),
    (["--init_from=scrach"], "scrach does not exist: init_from is scratch, auto, resume"),
    (["--wandb_project=x"], "wandb is not installed: pip install wandb"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(tokens, tmp_path, flags, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises((ValueError, OSError), match=message) as error:
        run(tokens, tmp_path / "out", *flags)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out/last.pt").exists() and not (tmp_path / "out/metrics.jsonl").exists()


@pytest.mark.parametrize("flags, message", [
    (["--arch=kani"], "--decoder: decoder = .* has no effect: arch = 'kani' has no such key"),
    (["--n_latents=4"], "--n_latents: n_latents = 4 has no effect: arch = 'csm' has no such key"),
    (["--guidance=2"], "guidance = 2.0 has no effect: arch = 'csm'"),
    (["--reference_seconds=[1,2]"], "reference_seconds = .* arch = 'csm' reads no voice off a recording"),
    (["--gamma=0.1"], "gamma = 0.1 has no effect: lr_schedule = 'cosine', not 'multistep'"),
    (["--milestones=[5]"], "milestones = .* has no effect: lr_schedule = 'cosine'"),
    (["--lr_schedule=multistep", "--milestones=[50]", "--max_iters=50"], "milestones = .* max_iters = 50 comes first"),
    (["--lr_schedule=constant", "--min_lr=0.0001"], "min_lr = 0.0001 has no effect: lr_schedule = 'constant'"),
    (["--lora_dropout=0.1"], "lora_dropout = 0.1 has no effect: lora_rank = 0"),
    (["--voice_prompt=0.5", "--prompt_style=joined"], "voice_prompt = 0.5: prompts in training need prompt_style="),
    (["--text_format={text}"], "text_format is a key of prepare.py and has no effect here"),
])  # fmt: skip
def test_flags_without_effect_are_refused(tokens, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(tokens, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_keys_of_a_recipe_without_effect_are_named(tokens, tmp_path, capsys):
    (tmp_path / "recipe.py").write_text("n_latents = 4\ngamma = 0.1\nvocab_size = 9\nrounds = 3\n")
    run(tokens, tmp_path / "out", str(tmp_path / "recipe.py"), "--max_iters=1")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert said == [f"warning: {tmp_path}/recipe.py:{key} has no effect: {why}" for key, why in (
        ("1: n_latents = 4", "arch = 'csm' has no such key"),
        ("2: gamma = 0.1", "lr_schedule = 'cosine', not 'multistep'"),
        ("4: rounds = 3", "arch = 'csm' has no such key"),
    )]  # fmt: skip


def test_what_a_checkpoint_fixes_comes_from_it(tokens, trained, tmp_path):
    flags = [f"--data_dir={tokens}", "--eval_samples=0", "--device=cpu", "--max_tokens=120"]
    flags += [f"--init_from={trained}/best.pt", f"--out_dir={tmp_path}", "--max_iters=1"]
    train.main(configurator.configure(train.__file__, flags))
    recorded = json.loads((tmp_path / "config.json").read_text())
    for part, sizes in (("backbone", "{'n_layer': 1"), ("decoder", "{'n_layer': 1")):
        assert str(recorded[part]).startswith(sizes)
        with pytest.raises(ValueError, match=f"--{part}: {part} = 'llama-60M', but .*best.pt was trained with {sizes}"
                           f".*: --{part}= takes these sizes"):  # fmt: skip
            train.main(configurator.configure(train.__file__, [*flags, "--overwrite=True", f"--{part}=llama-60M"]))
    (tmp_path / "recipe.py").write_text("backbone = decoder = 'llama-60M'\n")
    empty = [str(tmp_path / "recipe.py"), "--overwrite=True", "--backbone=", "--decoder="]
    train.main(configurator.configure(train.__file__, [*flags, *empty]))
    again = json.loads((tmp_path / "config.json").read_text())
    assert all(again[part] == recorded[part] for part in ("backbone", "decoder"))
    flags += ["--init_from=resume", "--max_iters=2"]
    train.main(configurator.configure(train.__file__, flags))  # its config holds sizes, as those of an older run
    assert json.loads((tmp_path / "config.json").read_text())["backbone"] == recorded["backbone"]


def test_data_of_which_hardly_anything_is_learnt_are_refused(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(Batches, "targets", lambda _: 0.19)
    with pytest.raises(ValueError, match="only 19% of the frames are targets.*set drop_repeats=False"):
        run(tokens, tmp_path / "out", "--max_iters=1")
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_do_not_fit(tokens, trained, tmp_path):
    codec = write_tokens(tmp_path / "codec", noise=1)
    with pytest.raises(ValueError, match="two codecs"):
        run(codec, tmp_path / "out", f"--init_from={trained}/best.pt")
    words = write_tokens(tmp_path / "words", words=["four", "five", "six"])
    with pytest.raises(ValueError, match="two tokenizers"):
        run(words, tmp_path / "out", f"--init_from={trained}/best.pt")
    with pytest.raises(ValueError, match="backbone = 'llama-60M', but .* was trained with"):
        run(tokens, trained, "--init_from=resume", "--max_iters=9", "--backbone=llama-60M")
    for key in ("muon", "sparse_embeddings"):
        with pytest.raises(ValueError, match=f"{key} = True, but .* was trained with False"):
            run(tokens, trained, "--init_from=resume", "--max_iters=9", f"--{key}=True")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/last.pt").write_bytes((trained / "best.pt").read_bytes())
    with pytest.raises(ValueError, match="holds weights only"):
        run(tokens, tmp_path / "copy", "--init_from=resume", "--max_iters=9")
    (tmp_path / "copy/last.pt").write_bytes((trained / "last.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="truncated"):
        run(tokens, tmp_path / "copy", "--init_from=resume", "--max_iters=9")


def test_a_codec_that_is_not_the_codes_is_refused(tmp_path):
    folder = write_tokens(tmp_path / "a")
    os.replace(Path(write_tokens(tmp_path / "b", noise=1)) / "codec.pt", Path(folder) / "codec.pt")
    with pytest.raises(ValueError, match="codec.pt is not the codec its codes were made with"):
        run(folder, tmp_path / "out")


@pytest.mark.parametrize("flags", [[], ["--muon=True", "--sparse_embeddings=True", "--decoder_chunk=3"]],
                         ids=["adamw", "shared out"])  # fmt: skip
def test_steps_in_backward_are_those_after_it(tokens, tmp_path, flags):
    """Weights and optimizers to the last bit, and what is resumed goes either way."""
    flags = ["--grad_clip=0", "--dropout=0.1", "--ema=0.9", "--lr_schedule=constant", *flags]
    after, lines = run(tokens, tmp_path / "after", "--max_iters=8", *flags)
    within, lines_within = run(tokens, tmp_path / "within", "--max_iters=8", "--step_in_backward=True", *flags)
    for key in ("model", "ema"):
        same(dict(after[key]), dict(within[key]))
    same(after["train"]["optimizers"], within["train"]["optimizers"])
    for a, b in zip(lines, lines_within, strict=True):
        assert a["loss"] == b["loss"] and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    on, _ = run(tokens, tmp_path / "within", "--max_iters=12", "--init_from=resume", *flags)
    whole, _ = run(tokens, tmp_path / "whole", "--max_iters=12", "--step_in_backward=True", *flags)
    same(dict(on["model"]), dict(whole["model"]))


def test_steps_in_backward_leave_one_gradient_at_a_time(tokens, monkeypatch):
    files, cfg = TokenFiles(tokens, "train"), config(*TINY, "--step_in_backward=True", "--sparse_embeddings=True")
    model = build("csm", files.meta, vars(cfg))
    moved = []

    def clip(parameters, most):
        assert [id(p) for p in model.parameters() if p.grad is not None] == [id(parameters[0])]
        moved.extend(parameters)
        return torch.zeros(())

    monkeypatch.setattr(optim, "clip_gradients", clip)
    optimizer = optim.Optimizer(model, cfg, torch.device("cpu"))
    optimizer.backward(model(*next(iter(Batches(files, model.layout, model.length, 60, 4))))[0])
    assert {id(p) for p in moved} == {id(p) for p in model.parameters()} and len(moved) == len({*map(id, moved)})
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("flag, said", [
    ("--grad_clip=1.0", "grad_clip = 1.0"), ("--gradient_accumulation_steps=2", "gradient_accumulation_steps = 2"),
    ("--dtype=float16", "dtype = 'float16'"),
])  # fmt: skip
def test_steps_in_backward_wait_for_nothing(flag, said):
    cfg = config("--step_in_backward=True", "--grad_clip=0", flag)
    with pytest.raises(ValueError, match=f"step_in_backward and {re.escape(said)}: no gradient waits for others"):
        train.check(cfg, 1, torch.device("cuda"))


def test_nccl_cannot_add_sparse_gradients():
    cfg = config("--sparse_embeddings=True", "--gradient_accumulation_steps=2")
    train.check(cfg, 1, torch.device("cuda"))
    train.check(cfg, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="sparse_embeddings: nccl cannot add up sparse gradients"):
        train.check(cfg, 2, torch.device("cuda"))


def test_ranks_must_divide_the_accumulation():
    with pytest.raises(ValueError, match="must be a multiple of their number, 2"):
        train.check(config("--gradient_accumulation_steps=3"), 2, torch.device("cpu"))


def test_the_command_refuses_in_one_line(tokens, tmp_path):
    process = start("", tokens, tmp_path / "out", "--learing_rate=1e-3")
    out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert err == "error: --learing_rate: unknown key 'learing_rate', did you mean 'learning_rate'?\n"
    assert not (tmp_path / "out").exists()

"""Sweeps of a tiny model: which trials they make, that each is an ordinary run, stops of all kinds, and the ranking."""

import csv
import os
import signal
import statistics
import subprocess
import sys
import time

import pytest
import soundfile
import torch
from helpers import ROOT, TINY, exact, run, same
from helpers import voice as recording

import sweep
import train
import weights
from evaluate import held_out_files, held_out_loss
from parts import configurator, tensors
from parts.files import locked
from parts.metrics import read_metrics
from voice import Voice
from weights import load_checkpoint, save_checkpoint

AXES = ["--learning_rate=1e-2,1e-3", "--decoder_fraction=0.5,1"]
NAMES = [f"learning_rate={rate},decoder_fraction={share}" for rate in ("0.01", "0.001") for share in ("0.5", "1")]


def start(*flags):
    """A sweep in this process."""
    sweep.main(configured(*flags))


def configured(*flags):
    return configurator.configure(sweep.__file__, list(map(str, flags)), passes="train.py")


@pytest.fixture
def flags(tokens, tmp_path):
    """Those of a sweep in tmp_path/"all", of trials of 8 steps."""
    return [*TINY, f"--data_dir={tokens}", f"--out_dir={tmp_path}/all", "--max_iters=8"]


def write(path, text):
    path.write_text(text)
    return path


def table(folder):
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tokens, tmp_path_factory):
    """The folder of a sweep of two by two trials."""
    folder = tmp_path_factory.mktemp("sweep") / "all"
    start(*TINY, f"--data_dir={tokens}", f"--out_dir={folder}", "--max_iters=8", *AXES)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# which trials


def trials_of(*more):
    return [(x.name, x.keys) for x in sweep.Sweep(configured("--data_dir=x", "--out_dir=y", *more)).trials]


def test_every_combination_is_a_trial():
    trials = trials_of("--learning_rate", "5e-5,1e-4,2e-4", "--decoder_fraction=0.0625,0.125",
                       "--decoder_loss_weight=0.5,1.0,1.5", "--max_iters=60")  # fmt: skip
    assert len(trials) == len({name for name, _ in trials}) == 18
    name, keys = trials[0]
    assert name == "learning_rate=5e-05,decoder_fraction=0.0625,decoder_loss_weight=0.5"
    assert (keys["learning_rate"], keys["decoder_fraction"], keys["max_iters"]) == (5e-5, 0.0625, 60)
    assert {keys["eval_samples"] for _, keys in trials} == {0}
    by_speech = trials_of("--seed=1,2", "--select_by=text_margin")  # which samples tell
    assert {keys["eval_samples"] for _, keys in by_speech} == {2}


def test_values_of_lists_and_dicts_have_semicolons_between():
    trials = trials_of("--lora_targets=q_proj,v_proj;all-linear", "--reference_seconds=3,6; 2,4",
                       "--backbone={'n_layer': 1};{'n_layer': 2}", "--lr_schedule=cosine,linear", "--muon=True,False",
                       "--eval_samples=1")  # fmt: skip
    assert len(trials) == 32 and all(keys["eval_samples"] == 1 for _, keys in trials)
    name, keys = trials[-1]
    wanted = {"lora_targets": "all-linear", "reference_seconds": [2, 4], "backbone": {"n_layer": 2},
              "lr_schedule": "linear", "muon": False}  # fmt: skip
    assert {key: keys[key] for key in wanted} == wanted
    assert name == "lora_targets=all-linear,reference_seconds=2-4,backbone=n_layer-2,lr_schedule=linear,muon=False"


def test_names_stay_short_and_differ():
    paths = f"x/{'a' * 300}1,x/{'a' * 300}2,x y,x/y"
    trials = trials_of(f"--init_from={paths}", "--seed=1,2", "--learning_rate=0.12345671,0.12345672")
    assert len({name for name, _ in trials}) == 16
    assert all(len(name.encode()) <= 200 and not set(name) & set("/ *[]?;'") for name, _ in trials)


def test_experiments_have_names(tmp_path):
    path = tmp_path / "named.py"
    path.write_text("experiments = {'small': {'learning_rate': 1e-4, 'lora_targets': ['w1', 'q_proj']},\n"
                    "               'large': {'learning_rate': 2e-4, 'lora_rank': 8, 'arch': 'kani'}}\n")  # fmt: skip
    trials = trials_of(path, "--max_iters=5,6", "--learning_rate=3e-4")
    assert [name for name, _ in trials] == [f"{name},max_iters={n}" for name in ("small", "large") for n in (5, 6)]
    assert trials[0][1]["lora_targets"] == ["w1", "q_proj"] and trials[2][1]["lora_rank"] == 8
    assert {keys["learning_rate"] for _, keys in trials} == {3e-4}  # flags win
    for script in (train, sys.modules["prepare"]):  # the file may stand beside a recipe for any script
        configurator.configure(script.__file__, [str(path)])


def test_the_experiments_of_kani():
    files = [ROOT / "config/kani_lora.py", ROOT / "config/kani_experiments.py"]
    trials = dict(trials_of(*files))
    assert list(trials) == ["conservative", "balanced", "aggressive", "heavy"]
    ranks = {name: (keys["lora_rank"], keys["lora_alpha"], keys["epochs"]) for name, keys in trials.items()}
    assert ranks == {"conservative": (8, 8.0, 1.0), "balanced": (16, 16.0, 2.0), "aggressive": (32, 32.0, 3.0),
                     "heavy": (32, 32.0, 1.0)}  # fmt: skip
    assert {keys["init_from"] for keys in trials.values()} == {"weights/kani-tts-450m-0.2-pt"}


@pytest.mark.parametrize("more, message", [
    (["--learning_rate=1e-3,x"], "--learning_rate: learning_rate = 'x' is not of type float"),
    (["--learning_rate=1e-3,-1"], "--learning_rate: learning_rate = -1.0 must be >= 0"),
    (["--learning_rate=1e-3,0.001"], "--learning_rate: 0.001 is there twice"),
    (["--learning_rate=1e-3,"], "learning_rate = '' is not of type float"),
    (["--learning_rate=1e-4..1e-3"], "a range needs --sampler=tpe"),
    (["--learning_rate=1e-3..1e-4", "--sampler=tpe"], "1e-3..1e-4 is no range from a lower to a higher number"),
    (["--lr_schedule=cosine,cosin"], "lr_schedule = 'cosin' must be multistep, cosine, linear or constant"),
    (["--learning_rat=1,2"], "unknown key 'learning_rat', did you mean 'learning_rate'"),
    (["--max_iters=5"], "give a key several values"),
    (["--out_dir=a,b"], "out_dir cannot differ among the trials"),
    (["--select_by=val_loss,val_c0_accuracy"], "select_by cannot differ among the trials"),
    (["--seed=1,2", "--select_by=rate"], "select_by = 'rate': neither low nor high is better"),
    (["--seed=1,2", "--overwrite=True"], "overwrite: remove the sweep's folder to start over"),
    (["--seed=1,2", "--trials=5"], "trials = 5 has no effect: sampler = 'grid'"),
    (["--seed=1,2", "--text=hello"], "text is a key of sample.py and has no effect here"),
    (["--experiments={'a b': {'seed': 1}}"], "'a b' is no name"),
    (["--experiments={'a': 5}"], "experiments: a is 5, not a dict of keys"),
    (["--experiments={'a': {'sead': 5}}"], "unknown key 'sead', did you mean 'seed'"),
    (["--experiments={'a': {'seed': 'x'}}"], "seed = 'x' is not of type int"),
    (["--seed=1,2", "--lora_alpha=3"], "seed=1: --lora_alpha: lora_alpha = 3.0 has no effect: lora_rank = 0"),
    (["--arch=csm,csn"], "arch=csn: unknown arch 'csn'"),
    (["--seed=1,2", "--backbone={'n_layer': 1, 'n_head': 3, 'd_model': 16}"], "seed=1: .*head"),
])  # fmt: skip
def test_what_is_wrong_is_refused_before_the_first_trial(flags, tmp_path, more, message):
    with pytest.raises((ValueError, OSError), match=message):
        start(*[flag for flag in flags if flag.split("=")[0] not in [x.split("=")[0] for x in more]], *more)
    assert not (tmp_path / "all").exists()


def test_a_sweep_is_alone_in_its_folder(flags, tmp_path):
    with locked(tmp_path / "all"), pytest.raises(ValueError, match="all is in use by another run"):
        start(*flags, *AXES)
    assert os.listdir(tmp_path / "all") == []


def test_it_is_not_for_torchrun(flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it without torchrun"):
        start(*flags, *AXES)


# ---------------------------------------------------------------------------------------------------------------------
# trials and their ranking


def test_a_trial_is_an_ordinary_run(finished, tokens, tmp_path):
    assert sorted(p.name for p in finished.iterdir()) == sorted([*NAMES, "index.html", "results.csv"])
    for name, rate, share in ((NAMES[1], 1e-2, 1.0), (NAMES[2], 1e-3, 0.5)):
        flags = [f"--learning_rate={rate}", f"--decoder_fraction={share}", "--max_iters=8", "--eval_samples=0"]
        alone, lines = run(tokens, tmp_path / name, *flags)
        same(alone, load_checkpoint(finished / name / "last.pt"))
        assert exact(lines) == exact(read_metrics(finished / name / "metrics.jsonl"))
        assert "contract check" in (finished / name / "log.txt").read_text()


def test_the_ranking_is_that_of_the_best_checkpoints(finished):
    """As evaluate.py measures them."""
    losses = {}
    for name in NAMES:
        voice = Voice.from_checkpoint(str(finished / name / "best.pt"), "cpu")
        losses[name] = held_out_loss(voice, held_out_files(voice))["val_loss"]
    rows = table(finished)
    assert [row["name"] for row in rows] == sorted(NAMES, key=losses.get)
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    for row in rows:
        assert float(row["val_loss"]) == pytest.approx(losses[row["name"]], rel=1e-5)
        assert (row["steps"], row["state"], row["why"]) == ("8", "done", "") and float(row["seconds"]) > 0
        values = {key: float(row[key]) for key in ("learning_rate", "decoder_fraction")}
        assert row["name"] == ",".join(f"{key}={value:g}" for key, value in values.items())
    page = (finished / "index.html").read_text()
    assert all(name in page for name in NAMES) and str(finished) not in page


def test_a_finished_sweep_trains_nothing(finished, tokens, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*/*.pt")}
    start(*TINY, f"--data_dir={tokens}", f"--out_dir={finished}", "--max_iters=8", *AXES)
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*/*.pt")} == before
    out = capsys.readouterr().out
    assert "to come" not in out and out.index(table(finished)[0]["name"]) < out.index(table(finished)[1]["name"])


def test_other_keys_are_another_sweep(finished, tokens):
    with pytest.raises(ValueError, match="was made with max_iters = 8, now it is 9: take another out_dir"):
        start(*TINY, f"--data_dir={tokens}", f"--out_dir={finished}", "--max_iters=9", *AXES)


def test_trials_of_different_lengths_are_compared_at_the_same_step(flags, tmp_path, capsys):
    start(*flags[:-1], "--max_iters=4,8", "--lr_schedule=constant", "--learning_rate=1e-2,1e-3")
    assert "the best up to step 4, which" in capsys.readouterr().out
    rows = {row["name"]: row for row in table(tmp_path / "all")}
    for rate in ("0.01", "0.001"):
        short, long = (rows[f"max_iters={n},learning_rate={rate}"] for n in (4, 8))
        assert short["val_loss"] == long["val_loss"] and (short["steps"], long["steps"]) == ("4", "8")


def test_select_by_ranks(flags, tmp_path):
    start(*flags, "--learning_rate=1e-4,3e-2,1e-2", "--select_by=val_c0_accuracy")
    rows = table(tmp_path / "all")
    found = [float(row["val_c0_accuracy"]) for row in rows]
    assert found == sorted(found, reverse=True) and found[0] > found[-1] and rows[-1]["learning_rate"] == "0.0001"
    assert list(rows[0])[2:5] == ["learning_rate", "val_c0_accuracy", "val_loss"]


def test_a_number_of_speech_ranks(flags, tmp_path):
    start(*[flag for flag in flags if "eval_samples" not in flag], "--seed=1,2", "--select_by=silence", "--max_iters=4")
    rows = table(tmp_path / "all")
    found = [float(row["silence"]) for row in rows]
    assert found == sorted(found) and all(row["text_margin"] and row["val_loss"] for row in rows)


def test_time_and_price_are_said_before(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "time_steps", lambda cfg, *_: (90.0 * (1 + (cfg.learning_rate > 5e-3)), 4))
    start(*flags, *AXES, "--price=2.5", "--dry_run=True")
    # 4 trials of 8 steps of 135 s on average
    assert "4 trials to come, a step takes 90 s to 180 s on cpu: 72 minutes, evaluations aside; at 2.5 an hour that " \
        "costs 3.00" in capsys.readouterr().out
    assert not (tmp_path / "all").exists()


def test_data_are_prepared_once_by_the_recipe(tmp_path, capsys):
    (tmp_path / "wavs").mkdir()
    for i in range(12):
        soundfile.write(tmp_path / f"wavs/{i}.wav", recording(1.5, i, 8000).numpy(), 8000)
    (tmp_path / "metadata.csv").write_text("".join(f"{i}|one two {'three ' * (i % 3)}\n" for i in range(12)))
    recipe = tmp_path / "recipe.py"
    codec = "{'n_codebooks': 2, 'codebook_size': 16, 'sample_rate': 8000, 'n_mels': 20, 'dims': 16}"
    recipe.write_text(f"sources = {str(tmp_path / 'metadata.csv')!r}\ndata_dir = {str(tmp_path / 'tokens')!r}\n"
                      f"codec_args = {codec}\nval_fraction = 0.3\nvocab_size = 300\nworkers = 1\n")  # fmt: skip
    more = [*TINY, recipe, "--seed=1,2", "--max_iters=2", "--warmup_iters=1", f"--out_dir={tmp_path}/all"]
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        start(*more, write(tmp_path / "wrong.py", "sources = 'elsewhere.csv'\n"))
    capsys.readouterr()
    start(*more)
    assert "tokens does not exist: preparing the data" in capsys.readouterr().out
    assert len(table(tmp_path / "all")) == 2
    (tmp_path / "metadata.csv").unlink()
    start(*more)
    assert "preparing" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# trials that end early


def test_a_trial_that_fails_is_reported_and_the_others_go_on(flags, tmp_path, capsys):
    more = ["--learning_rate=1e-2,1e30,1e-3", "--max_skipped=1", "--grad_clip=0"]
    for _ in range(2):  # the same command tries it again
        with pytest.raises(SystemExit) as left:
            start(*flags, *more)
        assert left.value.code == 1
        rows = table(tmp_path / "all")
        assert [(row["name"], row["state"]) for row in rows] == [
            ("learning_rate=0.01", "done"), ("learning_rate=0.001", "done"), ("learning_rate=1e+30", "failed"),
        ]  # fmt: skip
        assert "lower learning_rate" in rows[2]["why"] and "\n" not in rows[2]["why"]
        assert rows[2]["why"] in capsys.readouterr().out
    assert "Traceback" in (tmp_path / "all/learning_rate=1e+30/log.txt").read_text()


def test_a_hopeless_trial_ends(flags, tmp_path, capsys):
    """Against the median of three others, at its first evaluation; it stays so when the sweep goes on."""
    rates = "1e-2,9e-3,8e-3,0.0"
    start(*flags, f"--learning_rate={rates}", "--stop_hopeless=True")
    rows = table(tmp_path / "all")
    lines = {row["name"]: read_metrics(tmp_path / "all" / row["name"] / "metrics.jsonl") for row in rows}
    assert [row["state"] for row in rows] == ["done"] * 3 + ["stopped"] and rows[3]["learning_rate"] == "0.0"
    assert [x["iter"] for x in lines["learning_rate=0"]] == [1, 2, 3, 4] and rows[3]["steps"] == "4"
    others = [lines[row["name"]][3]["val_loss"] for row in rows[:3]]
    assert f"the median of the others is {statistics.median(others):.4g}" in rows[3]["why"]
    start(*flags, f"--learning_rate={rates}", "--stop_hopeless=True")
    assert table(tmp_path / "all") == rows
    whole = tmp_path / "without"
    start(*[flag for flag in flags if "out_dir" not in flag], f"--out_dir={whole}", f"--learning_rate={rates}")
    assert [row["state"] for row in table(whole)] == ["done"] * 4


KILLED = """
import os, signal, sys, data, sweep
from parts import configurator, tensors
stream = data.Batches.__iter__
seen = 0
def counted(self):
    global seen
    for batch in stream(self):
        if seen == {number}:
            os.kill(os.getpid(), signal.{signal})
        seen += 1
        yield batch
data.Batches.__iter__ = counted
sweep.time_steps = lambda *_: (1.0, 1)
configurator.run(sweep.main, sweep.__file__, passes="train.py")
"""


def process(code, *flags):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, flags)], cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


@pytest.mark.parametrize("name, code, iters", [
    ("SIGKILL", -9, 4), ("SIGTERM", 143, 6), pytest.param("SIGINT", 130, 6, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_sweep_goes_on_in_the_middle_of_a_trial(finished, flags, tmp_path, name, code, iters):
    """In the second trial, at its sixth step: the result is that of a sweep without a stop."""
    killed = process(KILLED.format(number=8 + 5, signal=name), *flags, *AXES)
    out, err = killed.communicate()
    assert killed.returncode == code, err
    folder = tmp_path / "all"
    assert load_checkpoint(folder / NAMES[1] / "last.pt")["iter"] == iters and not (folder / NAMES[2]).exists()
    if code > 0:
        states = {row["name"]: row["state"] for row in table(folder)}
        assert [states[x] for x in NAMES] == ["done", "unfinished", "waiting", "waiting"]
        assert "the same command goes on" in out and "Traceback" not in err
    first = (folder / NAMES[0] / "best.pt").stat().st_mtime_ns
    start(*flags, *AXES)
    assert (folder / NAMES[0] / "best.pt").stat().st_mtime_ns == first
    assert f"resuming {folder / NAMES[1]} at iter {iters}" in (folder / NAMES[1] / "log.txt").read_text()
    for trial in NAMES:
        same(*(load_checkpoint(place / trial / "last.pt") for place in (finished, folder)))
        straight, stopped = (exact(read_metrics(place / trial / "metrics.jsonl")) for place in (finished, folder))
        assert straight == stopped
    assert [row["name"] for row in table(folder)] == [row["name"] for row in table(finished)]


def test_damaged_notes_are_named(flags, tmp_path):
    folder = tmp_path / "all" / NAMES[0]
    folder.mkdir(parents=True)
    (folder / "trial.json").write_text('{"state": "done"')
    with pytest.raises(ValueError, match="trial.json is damaged: remove .*all/learning_rate"):
        start(*flags, *AXES)


# ---------------------------------------------------------------------------------------------------------------------
# a process for each device


@pytest.mark.slow
def test_several_processes_share_the_trials(finished, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "visible_gpus", lambda device: ["0", "1"])  # which a CPU does not mind
    start(*flags, *AXES)
    folder = tmp_path / "all"
    for name in NAMES:
        same(load_checkpoint(finished / name / "last.pt"), load_checkpoint(folder / name / "last.pt"))
    assert [row["name"] for row in table(folder)] == [row["name"] for row in table(finished)]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


SHARED_OUT = """
import sweep
from parts import configurator, tensors
if __name__ == "__main__":
    sweep.visible_gpus = lambda device: ["0", "1"]
    sweep.time_steps = lambda *_: (1.0, 1)
    configurator.run(sweep.main, sweep.__file__, passes="train.py")
"""


@pytest.mark.slow
def test_a_signal_reaches_all_processes(flags, tmp_path):
    folder = tmp_path / "all"
    both = process(SHARED_OUT, *flags[:-1], "--max_iters=100000", "--eval_interval=100000", "--seed=1,2")
    lines = [folder / f"seed={n}" / "metrics.jsonl" for n in (1, 2)]
    while both.poll() is None and not all(len(read_metrics(path)) > 2 for path in lines):
        time.sleep(0.1)
    both.send_signal(signal.SIGTERM)
    out, err = both.communicate()
    assert both.returncode == 143, err
    assert all(load_checkpoint(folder / f"seed={n}" / "last.pt")["iter"] > 2 for n in (1, 2))
    assert "Traceback" not in err and out.count(", saved") == 2


def dies_once(trial, median):
    """In place of carry_out."""
    if trial.name == "seed=1":
        os.kill(os.getpid(), signal.SIGKILL)
    sweep.write_state(trial, sweep.DONE)
    return sweep.Outcome(sweep.DONE)


def test_a_killed_process_costs_its_trial_alone(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "visible_gpus", lambda device: ["0"])
    monkeypatch.setattr(sweep, "carry_out", dies_once)
    with pytest.raises(SystemExit) as left:
        start(*flags, "--seed=1,2,3")
    assert left.value.code == 1
    rows = {row["name"]: row for row in table(tmp_path / "all")}
    assert [rows[f"seed={n}"]["state"] for n in (1, 2, 3)] == ["failed", "done", "done"]
    assert "its process was killed" in rows["seed=1"]["why"]


def test_a_gpu_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep.visible_gpus("auto") == ["0", "1", "2"]
    assert sweep.visible_gpus("cuda:1") == sweep.visible_gpus("cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7a,6")
    assert sweep.visible_gpus("cuda") == ["5", "GPU-7a", "6"]


# ---------------------------------------------------------------------------------------------------------------------
# a search


def test_optuna_searches(flags, tmp_path, capsys):
    pytest.importorskip("optuna")
    more = ["--learning_rate=1e-5..1e-1", "--decoder_fraction=0.5,1", "--seed=3..5", "--sampler=tpe", "--max_iters=4"]
    start(*flags[:-1], *more, "--trials=4")
    folder = tmp_path / "all"
    first = table(folder)
    assert len(first) == 4 and all(1e-5 <= float(row["learning_rate"]) <= 1e-1 for row in first)
    assert {row["seed"] for row in first} <= {"3", "4", "5"} and len({row["learning_rate"] for row in first}) == 4
    start(*flags[:-1], *more, "--trials=7")  # goes on with what it knows
    rows = table(folder)
    assert {row["name"] for row in first} < {row["name"] for row in rows} and len(rows) == 7
    found = [float(row["val_loss"]) for row in rows]
    assert found == sorted(found)
    (folder / "trials.json").write_text("[{}]")
    with pytest.raises(ValueError, match="trials.json is damaged, or of other axes"):
        start(*flags[:-1], *more)


def test_a_search_among_few_values_ends_with_them(flags, tmp_path):
    pytest.importorskip("optuna")
    start(*flags[:-1], "--max_iters=2", "--warmup_iters=1", "--seed=1,2", "--sampler=tpe", "--trials=9")
    assert sorted(row["name"] for row in table(tmp_path / "all")) == ["seed=1", "seed=2"]


def test_optuna_is_asked_for(flags, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match="pip install optuna"):
        start(*flags, "--seed=1,2", "--sampler=tpe")


# ---------------------------------------------------------------------------------------------------------------------
# what trials start from


@pytest.fixture
def base(tokens, tmp_path):
    """A checkpoint, and published weights of the same model, in float32: {kind: path}."""
    run(tokens, tmp_path / "base", "--max_iters=4")
    hub = tmp_path / "hub"
    flags = ["export", f"--ckpt={tmp_path}/base/best.pt", f"--out_dir={hub}"]
    weights.main(configurator.configure(weights.__file__, flags, ["command"]))
    return {"checkpoint": str(tmp_path / "base/best.pt"), "published": str(hub)}


@pytest.mark.parametrize("kind, more", [
    ("checkpoint", []), ("published", []), ("checkpoint", ["--lora_rank=2", "--learning_rate=0.1"]),
])  # fmt: skip
def test_the_base_is_read_once_and_stays_as_it_is(base, flags, tokens, tmp_path, monkeypatch, kind, more):
    opened = []
    read = {"unpickle": tensors.unpickle, "read_safetensors": tensors.read_safetensors}
    monkeypatch.setattr(weights, "unpickle", lambda path, *args: opened.append(path) or read["unpickle"](path, *args))
    monkeypatch.setattr(tensors, "read_safetensors", lambda path: opened.append(path) or read["read_safetensors"](path))
    monkeypatch.setattr(sweep, "time_steps", lambda *_: (1.0, 1))
    start(*flags, f"--init_from={base[kind]}", "--seed=1,2,3", *more)
    assert len([path for path in opened if str(path).startswith(base[kind])]) == 1
    alone, _ = run(tokens, tmp_path / "alone", f"--init_from={base[kind]}", "--seed=3", "--max_iters=8", *more)
    same(alone, load_checkpoint(tmp_path / "all/seed=3/last.pt"))
    assert len([path for path in opened if str(path).startswith(base[kind])]) > 1  # alone it is read again


def test_a_base_that_changes_is_read_again(tmp_path):
    for n in (1, 2):
        save_checkpoint(tmp_path / "x.pt", {"iter": n, "config": {"seed": n}})
        with tensors.reading_once():
            found = [load_checkpoint(tmp_path / "x.pt") for _ in range(2)]
        assert [x["iter"] for x in found] == [n, n] and found[0]["config"] is not found[1]["config"]

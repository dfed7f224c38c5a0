"""The dry run: what it says of a run is what the run would take."""

import itertools
import re
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, batch_of, run, same, tiny, tiny_kani, tiny_valle, tiny_xtts, utterance
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import plan
import train
from data import open_tokens
from parts import budget, configurator
from weights import load_checkpoint, load_model

SLOW = ("elise.py", "kani2.py", "kani_lora.py", "valle_large.py", "valle_small.py", "xtts_amharic.py")
# experiments are keys that sweep.py puts on top of a recipe
RECIPES = sorted(path.name for path in (ROOT / "config").glob("*.py") if "experiments" not in path.name)


@pytest.fixture
def dry(capsys):
    """A dry run of a recipe with flags: what it says."""

    def dry(recipe, *flags):
        argv = [str(ROOT / "config" / recipe), "--dry_run=True", *map(str, flags)]
        train.main(configurator.configure(train.__file__, argv))
        said = capsys.readouterr()
        assert said.err == ""
        return said.out

    return dry


@pytest.mark.parametrize("recipe", [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in RECIPES
])  # fmt: skip
def test_every_recipe_passes_a_dry_run_without_its_data(recipe, dry, tmp_path):
    out = dry(recipe, f"--data_dir={tmp_path / 'none'}", f"--out_dir={tmp_path / 'out'}")
    for said in ("in all", "a micro-batch:", "hours of audio", "memory of each GPU or process:", "disk: "):
        assert said in out
    assert not (tmp_path / "out").exists()
    # what stands in the recipe's head; Python and torch take as much as has been imported
    words = (r"process: (\S+) GB", r"Python and torch (\S+?)[,\n]", r"checkpoints (\S+) GB")
    memory, python, disk = (float(re.search(pattern, out)[1]) for pattern in words)
    said = re.search(r"([\d.]+) GB of memory.*\s.*?([\d.]+) GB of disk", (ROOT / "config" / recipe).read_text())
    assert float(said[1]) == pytest.approx(memory - python, rel=0.06, abs=0.06)
    assert float(said[2]) == pytest.approx(disk, rel=0.06, abs=0.02)


def test_the_command(tmp_path):
    command = [sys.executable, ROOT / "train.py", ROOT / "config/digits.py", "--dry_run=True"]
    run = subprocess.run([*command, f"--data_dir={tmp_path}"], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "") and "memory of each GPU or process:" in run.stdout


def test_published_sizes(dry):
    numbers = re.search(r"in all +([\d,]+) +([\d,]+)", dry("csm_1b.py"))
    assert numbers[1] == numbers[2] == "1,552,791,552"  # the published file's, less Mimi's and the table's copy


def test_freezing_counts(dry):
    said = [dry("elise.py", "--max_tokens=400", *more) for more in ((), ("--freeze=[]",))]
    trained = [re.search(r"in all +[\d,]+ +([\d,]+)", out)[1] for out in said]
    assert trained == ["306,964,992", "568,866,816"]


def test_gradients_that_do_not_wait_do_not_count(dry):
    def counted(within, chunk):
        flags = f"--max_tokens=400 --freeze=[] --grad_clip=0 --step_in_backward={within} --decoder_chunk={chunk}"
        out = dry("elise.py", *flags.split())
        table = re.search(r"in all(?: +\S+){3} +(\S+)", out)[1]
        depth = [int(n.replace(",", "")) for n in re.findall(r"^  (?:decoder\S*|projection) +([\d,]+)", out, re.M)]
        return table, float(re.search(r"process: (\S+) GB", out)[1]), [4 * n / 2**30 for n in depth]

    gradients, waiting, depth = counted(False, 2048)
    assert gradients == "2.12" and len(depth) == 3
    for chunk in (0, 2048):  # formed in chunks, the depth decoder's come together
        gradients, within, _ = counted(True, chunk)
        assert gradients == "0.00" and within < waiting  # at the fullest moment few of them were there


class Counted(TorchDispatchMode):
    """The most bytes of a real pass on a CPU that exist at the same time, those of `known` tensors aside."""

    def __init__(self, known):
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known}
        self.alive = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known | self.alive.keys():
                storage = x.untyped_storage()
                key = storage._cdata
                self.alive[key] = storage.nbytes(), weakref.ref(storage, lambda _, key=key: self.alive.pop(key))
                self.most = max(self.most, sum(size for size, _ in self.alive.values()))
        return made


def small(family, recompute=False):
    torch.manual_seed(0)
    more = {"references": True} if family is tiny_xtts else {}
    model = family(recompute=recompute).train()
    rows = [utterance(5, 12, seed=i) if family is not tiny_xtts else utterance(5, 12, 1, 16, i) for i in range(4)]
    batch = list(batch_of(model, *rows))
    return model, batch + ([torch.randn(4, 20, 6)] if more else [])


@pytest.mark.parametrize("family", [tiny, tiny_kani, tiny_xtts, tiny_valle])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_forecast_is_what_a_real_step_takes(family, recompute):
    cfg = configurator.configure(train.__file__, ["--gradient_accumulation_steps=2"])
    model, batch = small(family, recompute)
    kinds = budget.forecast(budget.twin(model), cfg, batch)
    assert kinds["weights"] == sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), *batch]
    torch.manual_seed(0)
    with Counted(known) as counted:
        loss, _ = model(*batch)
        torch.autograd.backward(loss)
    foreseen = kinds["activations"] + kinds["temporaries"]
    assert foreseen == pytest.approx(counted.most, rel=0.1)


def test_what_the_forecast_knows_besides(monkeypatch):
    def counted(*flags, world=1):
        cfg = configurator.configure(train.__file__, list(flags))
        return budget.forecast(budget.twin(model), cfg, batch, world)

    model, batch = small(tiny_kani)
    whole = sum(p.nbytes for p in model.parameters())
    plain = counted()
    assert plain["optimizer"] == 2 * whole and "averaged weights" not in plain
    assert counted("--ema=0.9")["averaged weights"] == whole
    assert counted("--gradient_accumulation_steps=2", world=2)["gradients to add up over GPUs"] == whole
    assert counted("--muon=True")["optimizer"] < 2 * whole
    assert counted("--dtype=bfloat16")["half-precision copies"] > 0
    sparse, dense = (budget.forecast(budget.twin(small(tiny)[0]), configurator.configure(train.__file__, flags), batch_)
                     for batch_ in [small(tiny)[1]] for flags in (["--sparse_embeddings=True"], []))  # fmt: skip
    assert sparse["optimizer"] == dense["optimizer"]


def test_of_chunks_only_the_largest_counts():
    def counted(chunk):
        cfg = configurator.configure(train.__file__, [])
        torch.manual_seed(0)
        with torch.device("meta"):
            model = tiny(decoder_chunk=chunk).train()
        return sum(budget.forecast(model, cfg, batch_of(model, *(utterance(5, 12, seed=i) for i in range(4)))).values())

    few, half, whole = (counted(chunk) for chunk in (13, 26, 0))
    assert few < half < whole


# ---------------------------------------------------------------------------------------------------------------------
# memory: keys that fit

WIDE = ["--backbone={'n_layer': 2, 'n_head': 2, 'n_kv_head': 1, 'd_model': 64, 'd_ff': 2048}", "--max_tokens=600"]


@pytest.fixture
def little(monkeypatch):
    """A process in which Python takes nothing: what is small here still counts."""
    monkeypatch.setattr(budget, "besides", lambda *_: {})
    monkeypatch.setattr(budget, "peak", lambda device: None)
    monkeypatch.setattr(plan, "FEW_ROWS", 1)


def chosen(checkpoint):
    return {key: checkpoint["config"][key] for key in plan.Fit.KEYS}


def test_memory_that_suffices_changes_nothing(tokens, tmp_path, little):
    plain, lines = run(tokens, tmp_path / "a", *WIDE, "--max_iters=4")
    fitted, again = run(tokens, tmp_path / "b", *WIDE, "--max_iters=4", "--memory=100")
    same(plain["model"], fitted["model"])  # the trial moves neither weights nor random numbers
    assert [line["loss"] for line in lines] == [line["loss"] for line in again]
    assert chosen(fitted)["max_tokens"] == 600


def test_little_memory_keeps_the_rows_of_a_step(tokens, tmp_path, little, capsys):
    fits = plan.Fit.fits
    limits = []

    def fits_noting(self, *choice):
        answer = fits(self, *choice)
        limits.append(sum(self.kinds.values()))
        return answer

    plan.Fit.fits = fits_noting
    try:
        run(tokens, tmp_path / "a", *WIDE, "--max_iters=2", "--memory=100", "--max_batch=16")
        whole = limits[0]
        with pytest.raises(ValueError, match="memory = 0.001: one utterance of the longest needs .*memory_lora=16"):
            run(tokens, tmp_path / "b", *WIDE, "--max_batch=16", "--memory=0.001")
    finally:
        plan.Fit.fits = fits
    memory = 0.8 * whole / 2**30
    flags = [*WIDE, "--max_batch=16", "--epochs=4", "--eval_interval=2", f"--memory={memory}"]
    capsys.readouterr()
    checkpoint, _ = run(tokens, tmp_path / "c", *flags)
    assert "max_tokens 600 -> " in capsys.readouterr().out
    plain, _ = run(tokens, tmp_path / "d", *flags[:-1])
    keys = chosen(checkpoint)
    assert keys["max_tokens"] < 600 and keys["gradient_accumulation_steps"] > 1
    assert checkpoint["iter"] == plain["iter"] and checkpoint["config"]["max_iters"] == plain["config"]["max_iters"]
    micro = [len(open_batches(tokens, x).plan(0)[0]) / x["config"]["gradient_accumulation_steps"]
             for x in (checkpoint, plain)]  # fmt: skip
    assert micro[0] == pytest.approx(micro[1], rel=0.35)  # an epoch is five steps: the rounding is coarse
    resumed, _ = run(tokens, tmp_path / "c", *flags[:-1], "--init_from=resume", "--epochs=5")
    assert chosen(resumed) == keys and resumed["config"]["memory"] == memory
    again, _ = run(tokens, tmp_path / "c", *flags[:-1], "--init_from=resume", "--epochs=6", "--memory=100")
    assert chosen(again)["max_tokens"] == 600 and chosen(again)["gradient_accumulation_steps"] == 1


def open_batches(data_dir, checkpoint):
    cfg = SimpleNamespace(**checkpoint["config"])
    return plan.make_batches(cfg, load_model(checkpoint), open_tokens(data_dir, "train"), ())[0]


def test_a_forecast_that_was_too_low_halves_the_micro_batch(tokens, tmp_path, little, capsys, monkeypatch):
    peaks = iter([2**50, None])
    monkeypatch.setattr(budget, "peak", lambda device: next(peaks))
    checkpoint, _ = run(tokens, tmp_path / "a", *WIDE, "--max_iters=2", "--max_batch=16", "--memory=100")
    assert "it is halved: max_tokens = 300, max_batch = 8" in capsys.readouterr().out
    assert chosen(checkpoint)["max_tokens"] == 300 and chosen(checkpoint)["max_batch"] == 8


def test_memory_takes_a_number_or_auto(tokens, tmp_path):
    with pytest.raises(ValueError, match="memory = 'much' must be >= 0 or auto"):
        run(tokens, tmp_path / "a", "--memory=much")
    with pytest.raises(ValueError, match="memory_lora = 4 has no effect: memory = 0"):
        run(tokens, tmp_path / "a", "--memory_lora=4")


def test_a_token_folder_is_counted(dry, tokens):
    out = dry("digits.py", f"--data_dir={tokens}", "--max_iters=10", "--gradient_accumulation_steps=2")
    assert "30 utterances" in out
    micro = int(re.search(r"an epoch of ([\d,]+) micro-batches is", out)[1])
    epochs = float(re.search(r"([\d.]+) epochs", out)[1])
    assert epochs == pytest.approx(20 / micro, abs=0.06)


def test_several_token_folders_are_counted_with_their_weights(dry, tokens):
    once, often = (dry("digits.py", f"--data_dir={tokens}:{n}", "--max_batch=2") for n in (1, 5))
    micro = [int(re.search(r"an epoch of ([\d,]+) micro-batches", out)[1]) for out in (once, often)]
    assert micro[1] == pytest.approx(5 * micro[0], rel=0.1)


def test_steps_are_timed(dry, tokens, monkeypatch, tmp_path):
    """With a clock that every look moves on by a second: forward and backward take one, and the step takes another."""
    seconds = itertools.count()
    monkeypatch.setattr(budget.time, "perf_counter", lambda: float(next(seconds)))
    flags = (f"--data_dir={tokens}", f"--out_dir={tmp_path / 'out'}", "--gradient_accumulation_steps=3")
    out = dry("digits.py", *flags, "--max_iters=1800")
    assert "a step takes 4 s on cpu by 2 micro-batches; an epoch takes " in out
    assert "1,800 steps take 2 hours, evaluations aside" in out
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit_is_not_timed(dry, tokens, monkeypatch):
    monkeypatch.setattr(budget, "free_memory", lambda device: 2.0**20)
    out = dry("digits.py", f"--data_dir={tokens}")
    assert "not timed: cpu has 0.00 GB free" in out and "a step takes" not in out
    monkeypatch.undo()
    assert budget.free_memory(torch.device("cpu")) > 2**20

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(budget, "time_step", fail)
    assert "not timed: cpu is out of memory" in dry("digits.py", f"--data_dir={tokens}")


def test_thousands_of_epochs_are_warned_of(dry, tokens):
    out = dry("digits.py", f"--data_dir={tokens}", "--epochs=5000")
    assert "warning: that is 5,000 epochs" in out


@pytest.mark.parametrize("there", [True, False], ids=["data", "no data"])
def test_the_sizes_are_those_of_the_weights_that_are_continued(dry, tokens, tmp_path, there):
    """Not those of the keys, which a checkpoint would contradict; and they are trained as the run would."""
    run(tokens, tmp_path / "a", "--max_iters=1")
    n = sum(x.numel() for x in load_checkpoint(tmp_path / "a/best.pt")["model"].values())
    data_dir = tokens if there else tmp_path / "none"
    (tmp_path / "recipe.py").write_text(f"codec_args = {{'n_codebooks': 3}}\ninit_from = '{tmp_path}/a/best.pt'\n")
    out = dry(tmp_path / "recipe.py", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/b", "--device=cpu")
    assert re.search(r"in all +([\d,]+) +([\d,]+)", out).groups() == (f"{n:,}", f"{n:,}")
    assert ("a step takes" in out) == there and not (tmp_path / "b").exists()
    out = dry(tmp_path / "recipe.py", f"--data_dir={data_dir}", "--lora_rank=1", "--device=cpu")
    every, trained = re.search(r"in all +([\d,]+) +([\d,]+)", out).groups()
    assert int(trained.replace(",", "")) < n < int(every.replace(",", ""))
    assert ("a step takes" in out) == there
    out = dry(tmp_path / "recipe.py", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/a", "--init_from=resume")
    assert f"{n:,}" in out
    out = dry(tmp_path / "recipe.py", f"--data_dir={data_dir}", "--init_from=nowhere.pt")
    assert "nowhere.pt does not exist yet: supposing the sizes that the keys say" in out


def test_refused(dry):
    with pytest.raises(ValueError, match="^unknown arch 'none'; choose from csm, kani"):
        dry("digits.py", "--arch=none")

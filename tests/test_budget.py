"""The dry run: what it says of a run is what the run would take."""

import itertools
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, batch_of, run, tiny, utterance

import train
from parts import budget, configurator
from weights import load_checkpoint

RECIPES = sorted(path.name for path in (ROOT / "config").glob("*.py"))


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
    pytest.param(name, marks=pytest.mark.slow) if name == "elise.py" else name for name in RECIPES
])  # fmt: skip
def test_every_recipe_passes_a_dry_run_without_its_data(recipe, dry, tmp_path):
    out = dry(recipe, f"--data_dir={tmp_path / 'none'}", f"--out_dir={tmp_path / 'out'}")
    for said in ("in all", "a micro-batch:", "hours of audio", "memory of each GPU:"):
        assert said in out
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path):
    command = [sys.executable, ROOT / "train.py", ROOT / "config/digits.py", "--dry_run=True"]
    run = subprocess.run([*command, f"--data_dir={tmp_path}"], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "") and "memory of each GPU:" in run.stdout


def test_published_sizes(dry):
    numbers = re.search(r"in all +([\d,]+) +([\d,]+)", dry("csm_1b.py"))
    assert numbers[1] == numbers[2] == "1,552,791,552"  # the published file's, less Mimi's and the table's copy


def test_freezing_counts(dry):
    said = [dry("elise.py", "--max_tokens=400", *more) for more in ((), ("--freeze=[]",))]
    trained = [re.search(r"in all +[\d,]+ +([\d,]+)", out)[1] for out in said]
    assert trained == ["306,964,992", "568,866,816"]


def test_of_gradients_that_do_not_wait_the_largest_counts(dry):
    def counted(within, chunk):
        flags = f"--max_tokens=400 --freeze=[] --grad_clip=0 --step_in_backward={within} --decoder_chunk={chunk}"
        out = dry("elise.py", *flags.split())
        gradients, activations, total = re.search(
            r"in all(?: +\S+){3} +(\S+).*each GPU: (\S+) GB.*about (\S+) GB in all", out, re.DOTALL
        ).groups()
        depth = [int(n.replace(",", "")) for n in re.findall(r"^  (?:decoder\S*|projection) +([\d,]+)", out, re.M)]
        return gradients, float(total) - float(activations), [4 * n / 2**30 for n in depth]

    gradients, waiting, depth = counted(False, 2048)
    assert gradients == "2.12" and len(depth) == 3
    table = 65632 * 1536 * 4 / 2**30  # of audio codes
    for chunk, largest in ((0, table), (2048, sum(depth))):  # formed in chunks, the depth decoder's come together
        gradients, within, _ = counted(True, chunk)
        assert gradients == "0.00" and waiting - within == pytest.approx(2.12 - largest, abs=0.02)


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_those_of_a_real_pass(recompute):
    utterances = [utterance(5, 12, seed=i) for i in range(4)]

    def pass_(device, recompute):
        torch.manual_seed(0)
        with torch.device(device):
            model = tiny(decoder_fraction=1.0, recompute=recompute).train()
        return model, batch_of(model, *utterances)

    everything = budget.kept_by_autograd(*pass_("meta", False))
    model, batch = pass_("meta", recompute)
    counted = budget.kept_by_autograd(model, batch)
    model, batch = pass_("cpu", recompute)
    own = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x) is None or x, lambda x: x
    ):
        model(*batch)
    real = sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in own)
    assert counted == pytest.approx(real, rel=0.01) if not recompute else real < counted < 0.8 * everything


def test_of_chunks_only_the_largest_counts():
    def counted(chunk, **options):
        torch.manual_seed(0)
        with torch.device("meta"):
            model = tiny(decoder_chunk=chunk, **options).train()
        return budget.kept_by_autograd(model, batch_of(model, *(utterance(5, 12, seed=i) for i in range(4))))

    few, thirteen, half, whole = (counted(chunk) for chunk in (1, 13, 26, 0))
    assert few < thirteen < half < whole
    assert thirteen - few == pytest.approx((half - few) * 12 / 25, rel=0.02)
    assert half - few == pytest.approx((whole - few) * 25 / 51, rel=0.05)


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
    assert "a step takes 4 s on cpu by 2 micro-batches; 1,800 steps take 2 hours, evaluations aside" in out
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

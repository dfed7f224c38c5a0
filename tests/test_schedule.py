"""How long a run is and how its learning rate changes."""

import math
import re

import pytest
import torch
from helpers import exact, run, same

import train
from parts import configurator, schedule


def config(*flags):
    return configurator.configure(train.__file__, list(flags))


def counted(epoch, *flags):
    cfg = config(*flags)
    said = []
    schedule.count_steps(cfg, epoch, said.append)
    assert not said
    return cfg


def test_schedules():
    flags = ["--milestones=[10,20]", "--gamma=0.1", "--learning_rate=2.0", "--warmup_iters=4"]
    cfg = config("--lr_schedule=multistep", *flags)
    assert [schedule.get_lr(i, cfg) for i in range(4)] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert [schedule.get_lr(i, cfg) for i in (4, 9, 10, 19, 20, 99)] == pytest.approx([2, 2, 0.2, 0.2, 0.02, 0.02])
    cfg = config("--lr_schedule=cosine", "--learning_rate=1.0", "--min_lr=0.2", "--warmup_iters=0", "--max_iters=100")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=0.2)
    for i in range(100):
        assert schedule.get_lr(i, cfg) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    flags = ["--learning_rate=1.0", "--min_lr=0.5", "--warmup_iters=10", "--lr_decay_iters=20"]
    cfg = config("--lr_schedule=linear", *flags)
    assert [schedule.get_lr(i, cfg) for i in (10, 15, 20, 500)] == pytest.approx([1, 0.75, 0.5, 0.5])
    cfg = config("--lr_schedule=constant", "--learning_rate=0.3", "--warmup_iters=1")
    assert [schedule.get_lr(i, cfg) for i in (0, 1, 10**6)] == pytest.approx([0.15, 0.3, 0.3])


def test_milestones_of_a_guide_count_batches():
    """The rate changes with the first step that begins after so many batches, as a scheduler moved by each changes."""
    flags = ["--lr_schedule=multistep", "--gradient_accumulation_steps=128", "--warmup_iters=0", "--learning_rate=1"]
    cfg = counted(5.9, *flags, "--milestones=[50000, 150000, 300000]", "--milestones_in=batches")
    assert cfg.milestones == [391, 1172, 2344] and cfg.milestones_in == "steps"
    schedule.count_steps(cfg, 5.9)  # once more, as in a resumed run
    assert cfg.milestones == [391, 1172, 2344]
    cfg = counted(5.9, *flags, "--milestones=[1000, 1280]", "--milestones_in=batches")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1000, 1280], cfg.gamma)
    for batch in range(2000):
        if batch % 128 == 0:
            assert schedule.get_lr(batch // 128, cfg) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


def test_epochs_and_shares_become_steps():
    cfg = counted(12.25, "--epochs=2", "--warmup_share=0.1")
    assert (cfg.max_iters, cfg.warmup_iters) == (25, 3)
    assert counted(10.0, "--epochs=3", "--warmup_share=0.1").warmup_iters == 3  # not 4: 0.1 * 30 is above 3 in floats
    assert counted(1000.0, "--epochs=0.0001").max_iters == 1
    flags = ["--lr_schedule=multistep", "--milestones=[1, 2.5]", "--milestones_in=epochs", "--warmup_iters=0"]
    assert counted(12.25, *flags).milestones == [13, 31]
    without_data = counted(None, "--epochs=2", *flags)
    assert (without_data.max_iters, without_data.milestones, without_data.milestones_in) == (2000, [1, 2.5], "epochs")


@pytest.mark.parametrize("flags, message", [
    (["--epochs=2", "--max_iters=9"], "--max_iters: max_iters = 9 has no effect: epochs = 2 says how long the run is"),
    (["--warmup_share=0.1", "--warmup_iters=9"], "warmup_iters = 9 has no effect: warmup_share = 0.1 says it"),
    (["--lr_schedule=multistep", "--milestones=[1, 2]", "--milestones_in=batches", "--gradient_accumulation_steps=9"],
     r"milestones = \[1, 1\]: multistep needs ascending steps"),
])  # fmt: skip
def test_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        counted(10.0, *flags)


def test_a_recipe_with_both_is_told(tmp_path):
    (tmp_path / "recipe.py").write_text("epochs = 2\nmax_iters = 9\n")
    said = []
    cfg = config(str(tmp_path / "recipe.py"))
    schedule.count_steps(cfg, 10.0, said.append)
    assert cfg.max_iters == 20 and len(said) == 1 and "max_iters = 9 has no effect" in said[0]


@pytest.mark.parametrize("flags, line", [
    (["--lr_schedule=multistep", "--milestones=[30, 60, 90]", "--warmup_iters=0", "--max_iters=70"],
     "the learning rate is 0.001, 0.0005 at step 30 (epoch 2.5), 0.00025 at step 60 (epoch 5); the run ends at step 70 "
     "(epoch 5.83), before the change at step 90 (epoch 7.5)"),
    (["--max_iters=1200", "--min_lr=0.0001"],
     "the learning rate is 0.001 after 100 steps of warm-up, 0.0001 (cosine) at step 1,200 (epoch 100); the run ends "
     "at step 1,200 (epoch 100)"),
    (["--lr_schedule=constant", "--max_iters=6"],
     "the learning rate is 0.001 after 100 steps of warm-up; the run ends at step 6 (epoch 0.5)"),
])  # fmt: skip
def test_the_timetable(flags, line):
    assert list(schedule.timetable(counted(12.0, *flags), 12.0)) == [line]


def test_thousands_of_epochs_are_warned_of():
    few, many = (list(schedule.timetable(counted(4.0, f"--max_iters={n}"), 4.0)) for n in (3999, 20_000))
    assert len(few) == 1 and "warning: that is 5,000 epochs" in many[1]


def test_a_run_counted_in_epochs_is_the_one_counted_in_steps_and_goes_on(tokens, tmp_path, capsys):
    flags = ["--gradient_accumulation_steps=2", "--warmup_iters=0", "--lr_schedule=multistep", "--gamma=0.3"]
    by_epoch = ["--milestones=[1]", "--milestones_in=epochs", *flags]
    whole, lines = run(tokens, tmp_path / "whole", "--epochs=2", *by_epoch)
    micro_batches = int(re.search(r"utterances, (\d+) micro-batches an epoch", capsys.readouterr().out)[1])
    end, change = micro_batches, math.ceil(micro_batches / 2)
    assert whole["iter"] == whole["config"]["max_iters"] == end and whole["config"]["milestones"] == [change]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3] * change + [3e-4] * (end - change))
    plain, lines_plain = run(tokens, tmp_path / "plain", f"--max_iters={end}", f"--milestones=[{change}]", *flags)
    same(whole, plain)
    run(tokens, tmp_path / "parts", "--epochs=1.5", *by_epoch)
    parts, lines_parts = run(tokens, tmp_path / "parts", "--epochs=2", "--init_from=resume", *by_epoch)
    assert exact(lines) == exact(lines_plain)
    assert [line["loss"] for line in lines_parts] == [line["loss"] for line in lines]
    same(dict(whole["model"]), dict(parts["model"]))
    assert "milestones" not in capsys.readouterr().out.split("resuming")[1].splitlines()[0]

import errno
import json
import math
import os

import pytest
import torch

from parts import metrics

CPU = torch.device("cpu")


def test_pairs_add_up_and_are_divided_at_the_end():
    window = metrics.Window(CPU)
    assert window.collect() == {}
    window.add({"loss": (torch.tensor(6.0), 2), "by": (torch.tensor([1.0, 2.0]), torch.tensor([1, 4]))})
    window.add({"loss": (torch.tensor(1.0), 5), "by": (torch.tensor([3.0, 2.0]), torch.tensor([1, 4]))})
    assert window.collect() == {}  # the step is not over
    window.close_step(torch.tensor(0.0))
    assert metrics.means(window.collect()) == {"loss": 1.0, "by": [2.0, 0.5]}
    window.add({"loss": (torch.tensor(math.nan), 1)})
    window.close_step(torch.tensor(1.0))  # skipped
    assert metrics.means(window.collect()) == {"loss": 1.0, "by": [2.0, 0.5]}


def test_what_is_not_finite_is_null():
    window = metrics.Window(CPU)
    window.add({"a": (math.nan, 1), "b": (1.0, 0), "c": (torch.tensor([0.0, 1.0]), 0)})
    window.close_step()
    assert json.dumps(metrics.means(window.collect())) == '{"a": null, "b": null, "c": [null, null]}'


def test_lines_are_read_back_up_to_an_iter(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert metrics.read_metrics(path) == []
    metrics.write_metrics(path, [{"iter": i, "loss": 1 / i} for i in (10, 20, 30)])
    with open(path, "a") as f:
        f.write('{"iter": 40')
    assert [line["iter"] for line in metrics.read_metrics(path)] == [10, 20, 30]
    assert metrics.read_metrics(path, 20)[-1] == {"iter": 20, "loss": 0.05}


@pytest.mark.parametrize("line, fault", [
    (b"junk", "it is 'junk"), (b"[" * 100_000, "no JSON; remove the line"), (b"\xff\xfe", "no JSON"),
    (b"[1]", "not an object"), (b'{"loss": 2.0}', "iter is missing"), (b'{"iter": 3, "loss": "x"}', "loss is 'x'"),
])  # fmt: skip
def test_a_damaged_line_is_named(tmp_path, line, fault):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iter": 1, "loss": null}\n' + line + b'\n{"iter": 4}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2, is damaged") as error:
        metrics.read_metrics(path)
    assert fault in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_the_held_out_loss_of_each_folder_is_shown():
    line = {"iter": 4, "loss": 1.0, "c0_accuracy": 0.5, "lr": 1e-3, "grad_norm": 1.0, "padding": 0.1, "skipped": 0,
            "val_loss": 2.0, "val_c0_accuracy": 0.25, "val_loss_by_codebook": [2.0, 2.0], "val_loss_new": 1.5,
            "val_loss_old": None, "timing": {"tokens_per_second": 1, "audio_seconds_per_second": 1, "memory_gb": 1}}
    assert metrics.summary(line).endswith(" | held out: loss 2.000 c0 0.250 new 1.500 old nan")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full, as Linux has it")
def test_a_full_disk_names_the_file():
    with pytest.raises(OSError) as error:
        metrics.append_metrics("/dev/full", {"iter": 1})
    assert error.value.filename == "/dev/full" and error.value.errno == errno.ENOSPC


def test_memory_is_not_known_everywhere(monkeypatch):
    totals = {"padding": torch.tensor([1.0, 4.0]), "weighted_loss": torch.tensor([2.0, 3.0])}
    assert metrics.timing(totals, 12.5, 2.0, CPU)["memory_gb"] > 0
    monkeypatch.setattr(metrics, "resource", None)
    line = {"iter": 1, "loss": 1.0, "c0_accuracy": 0.5, "lr": 0.1, "grad_norm": 1.0, "padding": 0.1, "skipped": 0}
    line["timing"] = metrics.timing(totals, 12.5, 2.0, CPU)
    assert line["timing"]["memory_gb"] is None and "nan GB" in metrics.summary(line)


@pytest.mark.parametrize("training, held_out, warned", [
    ([5, 4, 3, 2, 1], [5, 4, 4.1, 4.2, 4.3], True),
    ([5, 4, 3, 2, 1], [5, 4, 4.5, 4.2, 4.1], True),  # above its best, if not ever higher
    ([5, 4, 3, 2], [5, 4, 4.1, 4.2], False),  # two evaluations are not three
    ([5, 4, 4.1, 4.2, 4.3], [5, 4, 4.1, 4.2, 4.3], False),  # both rise: that is something else
    ([5, 4, 3, 2, 1], [5, 4, 3, 2, 1], False),
    ([5, 4, 3, 2, math.nan], [5, 4, 4.1, 4.2, 4.3], False),  # every step was skipped
])  # fmt: skip
def test_overfitting(training, held_out, warned):
    history = [(10 * i, a, b) for i, (a, b) in enumerate(zip(training, held_out, strict=True))]
    warning = metrics.overfitting(history, 3)
    assert ("overfitting: held-out loss has risen for 3 evaluations (best 4.000 at iter 10" in warning) == warned
    assert warned or not warning
    assert metrics.overfitting(history, 0) == metrics.overfitting([], 3) == ""


def test_scalars_of_a_line():
    line = {"iter": 3, "loss": 1.5, "val_loss": None, "loss_by_codebook": [1.0, None, 2.0], "timing": {"seconds": 2.5}}
    assert metrics.scalars(line) == {"iter": 3, "loss": 1.5, "loss_by_codebook/0": 1.0, "loss_by_codebook/2": 2.0,
                                     "timing/seconds": 2.5}  # fmt: skip


def test_the_loss_is_the_mean_over_codebooks():
    """However many codes of each were looked at; a codebook without any does not count."""
    pair = torch.tensor([[6.0, 2.0, 0.0], [2.0, 1.0, 0.0]])
    assert metrics.means({"loss_by_codebook": pair}) == {"loss_by_codebook": [3.0, 2.0, None], "loss": 2.5}

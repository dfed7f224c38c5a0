"""What a run measures: sums on the device, lines of metrics.jsonl, loggers.

- A statistic is a pair (sum, count). Pairs add up over micro-batches and ranks, and are divided only when looked at.
- metrics.jsonl has one JSON object a line; what depends on the machine's speed is apart from the rest, under "timing".

Letter in shapes: K codebooks.
"""

import json
import math
import os
import sys

import torch
import torch.distributed as dist

from parts.files import NUMBER, need, whole

try:
    import resource
except ImportError:  # Windows does not say how much memory a process has used
    resource = None

LINE = {"iter": int, **dict.fromkeys(("loss?", "val_loss?", "c0_accuracy?", "val_c0_accuracy?", "lr?"), NUMBER)}

# ---------------------------------------------------------------------------------------------------------------------
# sums


class Window:
    """Sums of the stats since the last log line: {name: (2,) or (2, K)}, sum and count. They stay on the device.

    What is added belongs to the current step until `close_step`.
    """

    def __init__(self, device):
        self.device = device
        self.totals, self.step = {}, {}

    def add(self, stats):
        """Add stats {name: (sum, count)}, numbers or tensors () or (K,)."""
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        for name, pair in stats.items():
            pair = [x.to(kind) if torch.is_tensor(x) else torch.full((), x, dtype=kind, device=self.device)
                    for x in pair]  # fmt: skip
            pair = torch.stack(torch.broadcast_tensors(*pair))
            self.step[name] = self.step[name] + pair if name in self.step else pair

    def close_step(self, skipped=None):
        """Count the step, unless `skipped`, a tensor (), is above 0."""
        for name, pair in self.step.items():
            pair = pair if skipped is None else torch.where(skipped > 0, 0, pair)
            self.totals[name] = self.totals[name] + pair if name in self.totals else pair
        self.step = {}

    def collect(self, world=1):
        """The totals over all ranks, on the CPU: the host waits for the device."""
        if not self.totals:
            return {}
        flat = torch.cat([pair.flatten() for pair in self.totals.values()])
        if world > 1:
            dist.all_reduce(flat)
        parts = flat.cpu().split([pair.numel() for pair in self.totals.values()])
        return {name: part.view(pair.shape) for (name, pair), part in zip(self.totals.items(), parts, strict=True)}


def means(totals):
    """{name: (2,) or (2, K)} -> {name: mean or list of K means}; None for NaN and infinity, which JSON lacks. "loss" is
    the mean of "loss_by_codebook": each codebook counts as much, however many of its codes were looked at."""
    def tidy(x):
        return [tidy(y) for y in x] if isinstance(x, list) else float(f"{x:.8g}") if math.isfinite(x) else None

    found = {name: tidy((pair[0] / pair[1]).tolist()) for name, pair in totals.items()}
    if "loss_by_codebook" in found:
        losses = [x for x in found["loss_by_codebook"] if x is not None]
        found["loss"] = tidy(sum(losses) / len(losses)) if losses else None
    return found


def timing(totals, frame_rate, seconds, device):
    """What depends on the machine: throughput of `totals`, which took so many seconds, and the peak memory in GB."""
    memory = None
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**30
    elif resource:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    padding, rows = totals["padding"].tolist()
    audio = totals["weighted_loss"][1].item() / frame_rate
    speed = {"tokens_per_second": (rows - padding) / seconds, "audio_seconds_per_second": audio / seconds}
    return {**speed, "seconds": seconds, "memory_gb": memory}


# ---------------------------------------------------------------------------------------------------------------------
# lines


def read_metrics(path, until=math.inf):
    """The lines of metrics.jsonl up to an iter, as dicts; one that a kill left half written is left out.

    Raises ValueError, which names file and line, for a line that is none of ours."""
    if not os.path.exists(path):
        return []
    lines = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for number, text in enumerate(f, 1):
            if not text.endswith("\n"):
                break
            where = f"{path}, line {number},"
            try:
                lines.append(json.loads(text))
            except (ValueError, RecursionError):
                raise ValueError(f"{where} is damaged: it is {text!r:.60}, no JSON; remove the line") from None
            need(lines[-1], LINE, where)
    return [line for line in lines if line["iter"] <= until]


def append_metrics(path, line):
    """Add a line to metrics.jsonl. Raises OSError, which names the file."""
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def lowest_loss(lines):
    """The lowest held-out loss in lines of metrics.jsonl, None where nothing was evaluated."""
    return min((line["val_loss"] for line in lines if line.get("val_loss") is not None), default=None)


def write_metrics(path, lines):
    """Replace metrics.jsonl by these lines."""
    with whole(path, "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)


def summary(line):
    """One log line for the terminal."""
    shown = {key: math.nan if value is None else value for key, value in {**line, **line["timing"]}.items()}
    text = ("loss {loss:.3f} c0 {c0_accuracy:.3f} lr {lr:.1e} gnorm {grad_norm:.2f} {tokens_per_second:.0f} tok/s "
            "{audio_seconds_per_second:.0f} audio s/s pad {padding:.1%} {memory_gb:.1f} GB")  # fmt: skip
    text = text.format(**shown) if line["iter"] else "before the first step"
    if "val_loss" in line:
        text += " | held out: loss {val_loss:.3f} c0 {val_c0_accuracy:.3f}".format(**shown)
        folders = {key.removeprefix("val_loss_"): x for key, x in shown.items() if key.startswith("val_loss_")}
        text += "".join(f" {name} {x:.3f}" for name, x in folders.items() if not isinstance(x, list))
    return text + (f" | {line['skipped']} steps skipped" if line["skipped"] else "")


def overfitting(history, patience):
    """A warning where held-out loss has been above its best for `patience` evaluations while training loss fell.

    history: [(iter, training loss, held-out loss)] of the evaluations so far. Returns "" where there is nothing to say.
    """
    best = min(range(len(history)), key=lambda i: history[i][2], default=0)
    since = len(history) - 1 - best
    if not patience or since < patience or not history[-1][1] < history[best][1]:
        return ""
    return (f"overfitting: held-out loss has risen for {since} evaluations (best {history[best][2]:.3f} at iter "
            f"{history[best][0]}, now {history[-1][2]:.3f}) while the training loss fell")  # fmt: skip


def scalars(line):
    """The numbers in a line of metrics.jsonl, {name: number}: those of codebook 2 under "loss_by_codebook/2", what
    depends on the machine under "timing/seconds"."""
    found = {}
    for name, value in line.items():
        inside = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
        found |= {f"{name}/{key}": x for key, x in inside} or {name: value}
    return {name: x for name, x in found.items() if type(x) in NUMBER}


def other_loggers(wandb_project, tensorboard, out_dir, config):
    """Functions (line) -> None that log to Weights & Biases, to TensorBoard. ValueError: not installed."""
    loggers = []
    try:
        if wandb_project:
            import wandb

            run = wandb.init(project=wandb_project, name=os.path.basename(out_dir), config=config)
            loggers.append(lambda line: run.log(scalars(line), step=line["iter"]))
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(out_dir)
            loggers.append(lambda line: [board.add_scalar(k, v, line["iter"]) for k, v in scalars(line).items()])
    except ImportError as e:
        raise ValueError(f"{e.name} is not installed: pip install {e.name}, or do without that logger") from None
    return loggers

"""How long a run is and how its learning rate changes, in steps.

- Guides count in steps, in batches or in epochs. `count_steps` turns all of it into steps as soon as the batches are
  known, so that the loop and the checkpoints know steps only.
- An epoch has as many batches as the first one; the number differs a little from epoch to epoch.
"""

import math

from parts.configurator import refuse_idle

MANY_EPOCHS = 1000  # worth a warning


def get_lr(step, cfg):
    """The learning rate of step 0, 1, ...: linear warm-up over `warmup_iters`, then the lr_schedule."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if cfg.lr_schedule == "constant":
        return cfg.learning_rate
    if cfg.lr_schedule == "multistep":
        return cfg.learning_rate * cfg.gamma ** sum(step >= m for m in cfg.milestones)
    end = cfg.lr_decay_iters or cfg.max_iters
    done = min(1.0, (step - cfg.warmup_iters) / max(1, end - cfg.warmup_iters))
    left = 0.5 * (1 + math.cos(math.pi * done)) if cfg.lr_schedule == "cosine" else 1 - done
    return cfg.min_lr + left * (cfg.learning_rate - cfg.min_lr)


def count_steps(cfg, epoch=None, say=print):
    """Set the keys that count steps (max_iters, warmup_iters, milestones) from those that count otherwise.

    epoch: steps in an epoch, None where no data tell it; what depends on it then stays. A part of a step is one more
    step. say(line): is told of keys in a recipe that others replace. Raises ValueError for such flags, and for a
    schedule that cannot be.
    """
    replaced = {}
    if cfg.epochs:
        replaced["max_iters"] = f"epochs = {cfg.epochs:g} says how long the run is, --epochs=0 leaves it to max_iters"
    if cfg.warmup_share:
        replaced["warmup_iters"] = f"warmup_share = {cfg.warmup_share:g} says it, --warmup_share=0 leaves it to this"
    refuse_idle(cfg, replaced, say)
    if cfg.epochs and epoch:
        cfg.max_iters = whole_steps(cfg.epochs * epoch)
    if cfg.warmup_share:
        cfg.warmup_iters = whole_steps(cfg.warmup_share * cfg.max_iters)
    unit = {"steps": 1, "batches": 1 / cfg.gradient_accumulation_steps, "epochs": epoch}[cfg.milestones_in]
    if unit:
        cfg.milestones = [whole_steps(m * unit) for m in cfg.milestones]
        cfg.milestones_in = "steps"
    check_schedule(cfg)


def whole_steps(n):
    return max(1, math.ceil(n - 1e-6))  # 0.1 * 30 is a little more than 3


def check_schedule(cfg):
    """Raise ValueError for milestones and ends that do not follow each other, in steps."""
    steps = cfg.milestones
    first = max(1, cfg.warmup_iters)
    if cfg.lr_schedule == "multistep":
        if not steps or sorted({*steps, first})[-len(steps) :] != steps:
            raise ValueError(f"milestones = {steps!r:.60}: multistep needs ascending steps from {first} on, as "
                             "[1000, 2000]")  # fmt: skip
    elif cfg.lr_schedule != "constant":
        if 0 < cfg.lr_decay_iters < cfg.warmup_iters:
            raise ValueError(f"lr_decay_iters = {cfg.lr_decay_iters} comes before warmup_iters = {cfg.warmup_iters}")
        if cfg.min_lr > cfg.learning_rate:
            raise ValueError(f"min_lr = {cfg.min_lr} is above learning_rate = {cfg.learning_rate}")


def idle_keys(cfg):
    """{key: why} of the keys of length and learning rate that have no effect, after `count_steps`."""
    idle = {}
    if cfg.lr_schedule != "multistep":
        why = f"lr_schedule = {cfg.lr_schedule!r}, not 'multistep'"
        idle |= dict.fromkeys(("milestones", "milestones_in", "gamma"), why)
    elif cfg.milestones[0] >= cfg.max_iters:
        idle |= dict.fromkeys(("milestones", "gamma"), f"max_iters = {cfg.max_iters} comes first")
    if cfg.lr_schedule in ("multistep", "constant"):
        idle |= dict.fromkeys(("min_lr", "lr_decay_iters"), f"lr_schedule = {cfg.lr_schedule!r} has no use for it")
    return idle


def timetable(cfg, epoch):
    """Lines for the screen: when the learning rate changes, and when the run ends. epoch: steps in an epoch."""
    end = cfg.max_iters
    rate = f"{cfg.learning_rate:.3g}" + (f" after {cfg.warmup_iters:,} steps of warm-up" if cfg.warmup_iters else "")
    changes = []
    if cfg.lr_schedule == "multistep":
        changes = [(m, f"{get_lr(m, cfg):.3g}") for m in cfg.milestones]
    elif cfg.lr_schedule != "constant":
        changes = [(cfg.lr_decay_iters or end, f"{cfg.min_lr:.3g} ({cfg.lr_schedule})")]
    plan = [f"{lr} at {place(step, epoch)}" for step, lr in changes if step <= end]
    line = f"the learning rate is {', '.join([rate, *plan])}; the run ends at {place(end, epoch)}"
    if late := [place(step, epoch) for step, _ in changes if step > end]:
        line += f", before the change at {late[0]}"
    yield line
    if end >= MANY_EPOCHS * epoch:
        yield (f"warning: that is {end / epoch:,.0f} epochs: the model hears every utterance so often; lower max_iters "
               "unless you mean it")  # fmt: skip


def place(step, epoch):
    return f"step {step:,} (epoch {step / epoch:.3g})"

"""Numbers that judge a model, for train.py."""

import math

import numpy as np
import torch

from data import part_names
from parts.metrics import Window, means


@torch.no_grad()
def evaluate(model, val, autocast, batches=0, rank=0, world=1):
    """Means of the model's stats over the val split {name: number or list}, or over so many `batches`, spread evenly
    over its lengths (0: all). Several token folders have a loss each too, "loss_NAME". Ranks share the batches, and all
    get the means."""
    plan, _ = val.plan(0)
    ends = np.cumsum([len(part) for part in val.files.parts])
    losses = [f"loss_{name}" for name in part_names(val.files)] if len(ends) > 1 else []
    plan = plan[:: math.ceil(len(plan) / batches)] if batches else plan
    training = model.training
    model.eval()
    window = Window(next(model.parameters()).device)
    for i in range(rank, max(len(plan), world), world):
        batch = plan[i % len(plan)]
        with autocast:
            _, stats = model(*val.read(batch))
        own = np.searchsorted(ends, batch[0], side="right")
        value, count = stats["loss"]
        stats |= {name: (value * (n == own), count * (n == own)) for n, name in enumerate(losses)}
        share = i < len(plan)  # a rank without a batch joins with weight 0: all ranks must add up the same names
        window.add({name: (value * share, count * share) for name, (value, count) in stats.items()})
    window.close_step()
    model.train(training)
    return means(window.collect(world))

"""Numbers that judge a model, for train.py."""

import math

import torch

from parts.metrics import Window, means


@torch.no_grad()
def evaluate(model, val, autocast, batches=0, rank=0, world=1):
    """Means of the model's stats over the val split {name: number or list}, or over so many `batches`, spread evenly
    over its lengths (0: all). Ranks share the batches, and all get the means."""
    plan, _ = val.plan(0)
    plan = plan[:: math.ceil(len(plan) / batches)] if batches else plan
    training = model.training
    model.eval()
    window = Window(next(model.parameters()).device)
    for i in range(rank, max(len(plan), world), world):
        batch = val.read(plan[i % len(plan)])
        with autocast:
            _, stats = model(*batch)
        share = i < len(plan)  # a rank without a batch joins with weight 0: all ranks must add up the same names
        window.add({name: (value * share, count * share) for name, (value, count) in stats.items()})
    window.close_step()
    model.train(training)
    return means(window.collect(world))

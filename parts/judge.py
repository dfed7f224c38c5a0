"""A speech model as a judge: how much better frames fit their own text, or voice, than others.

Frames that follow a text are much likelier with that text than with another. A frame that could belong to any text,
noise or a mumble, counts nothing. A model that judges its own speech is easily satisfied: where it has become too sure,
or its weights are damaged, the margins even grow. Several models need one judge.

Letters in shapes: K codebooks, T frames.
"""

import math

import torch
import torch.nn.functional as F


@torch.no_grad()
def frame_losses(model, codes, text, **side):
    """The cross-entropy of each frame of codes (T, K), the sum over its codebooks, in nats: (T,) on the CPU.

    text: ids (n,). side: what the model's teacher_forced_logits takes beside these, such as prompt and voice.
    """
    logits = model.teacher_forced_logits(text, codes.cpu().numpy(), **side)[: len(codes)].float()  # (T, K, V)
    return F.cross_entropy(logits.mT, codes.to(logits.device), reduction="none").sum(1).cpu()


def margin(own, others):
    """How well each frame tells its own text from M others, in nats: (T,), from the losses own (T,) and others, M times
    (T,). It is the log of how much likelier the frame is with its own text than with one drawn from all M + 1: 0 where
    all are equal, at most log(M + 1). Its mean is a lower bound of what frames tell about the text (InfoNCE, van den
    Oord et al. 2018). Single frames of a loss beyond measure do not decide."""
    likely = -torch.stack([own, *others])
    return likely[0] - likely.logsumexp(0) + math.log(len(likely))

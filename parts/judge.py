"""A speech model as a judge: how much better its frames fit their own text, or voice, than another one.

Where a model follows the text, the frames that it speaks are much likelier with that text than with another. A frame
that the model would speak whatever the text, noise or a mumble, counts nothing.

Letters in shapes: K codebooks, T frames.
"""

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
    """By how many nats each frame fits its own text better than others: (T,), from the losses own (T,) and those of M
    others (M, T). It is the mean over the others."""
    return torch.stack(list(others)).mean(0) - own

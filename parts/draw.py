"""Drawing a class from logits: `sample_code`, and its random numbers.

A hash of a number makes them, no generator: a draw depends on its logits and its own number alone. So an utterance is
the same whatever is drawn beside it, on any device, and nothing has to be kept between draws.

Letters in shapes: V classes.
"""

import math

import torch


def sample_code(logits, key=None, age=None, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
                repetition_decay=0.0):  # fmt: skip
    """Draw classes (...) from logits (..., V): temperature 0 takes the likeliest; top_k, top_p and min_p cut the tail.

    top_k 0, top_p 1 and min_p 0 cut nothing. top_p (Holtzman et al. 2019) keeps the likeliest classes that together
    reach it, min_p (Nguyen et al. 2024) those at least min_p times as likely as the likeliest. repetition_penalty and
    repetition_decay make earlier classes, of this `age` (..., V), less likely, see `penalised`. key (...): a number for
    each draw, on which its random numbers depend, see `gumbel`; None: 0.
    """
    if age is not None and repetition_penalty != 1:
        logits = penalised(logits.float(), age, repetition_penalty, repetition_decay)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    V = logits.shape[-1]
    cut = 0 < top_k < V
    classes = None
    if cut or top_p < 1:
        logits, classes = logits.topk(top_k if cut else V)  # the likeliest first
    if top_p < 1 or min_p:
        p = logits.softmax(-1)
        tail = p < min_p * p.amax(-1, keepdim=True)
        if top_p < 1:
            tail = tail | (p.cumsum(-1) - p >= top_p)
        logits = logits.masked_fill(tail, -math.inf)
    if key is None:
        key = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    noise = gumbel(key, torch.arange(V, device=logits.device) if classes is None else classes)
    drawn = (logits + noise).argmax(-1, keepdim=True)
    return (drawn if classes is None else classes.gather(-1, drawn))[..., 0]


def mix(x):
    """A hash of whole numbers (...): each bit of a number changes half of the bits of the result, which is not
    negative. The constants are those of splitmix64 (Steele et al. 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift)) * factor  # modulo 2 ** 64
    return x ^ (x >> 31)


def gumbel(key, classes):
    """Standard Gumbel numbers (..., V) of these classes (..., V) or (V,): the largest sum of a logit and its number is
    a draw from the softmax of the logits (Gumbel 1954).

    A hash of key (...), itself a hash, and of the class makes them. So a draw depends on nothing but its logits and
    key, neither on the device nor on what is drawn beside it; and draws from similar logits by one key are mostly equal
    (see CSM.foresee).
    """
    x = classes * -0x61C8864680B583EB + key[..., None]
    bits = ((x ^ (x >> 30)) * -0x40A7B892E31B1A47 >> 41) & 0x7FFFFF
    return -torch.log(-torch.log((bits + 0.5) * 2**-23))


def penalised(logits, age, penalty, decay):
    """Logits (..., V) in which the classes with an age (..., V) are less likely: the positive ones are divided by the
    penalty (Keskar et al. 2019), the negative ones multiplied by it; 1: off. The age counts the codes since a class was
    last chosen, 1 for the latest one; 0: never.

    With a decay the penalty of a class of age m is 1 + (penalty - 1) / m ** decay; 0: all have the same. The code of
    VALL-E's author names such a decay, but applies the penalty once more for each repetition, and divides negative
    logits too, which makes them likelier.
    """
    factor = torch.where(age > 0, 1 + (penalty - 1) * age.clamp(min=1) ** -float(decay), 1)
    return torch.where(logits > 0, logits / factor, logits * factor)

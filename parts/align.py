"""Which word each frame speaks, read off the attention of a speech model: word times, and words skipped or repeated.

    track = align(attention)     attention (H, T, W) of H heads, from T frames to W words -> Track
    track.spans()                where each word begins and ends, in frames (W, 2)
    track.skipped(usual), track.repeated(usual)      numbers of words, by how many frames words usually have (W,)

- Some heads look at the word that is being spoken, some at the next one, most at neither. Those of the first kind are
  found in each utterance: their attention walks along the text, and it does not leave the first word early.
- The best path through their mean attention (Viterbi 1967) says the word of each frame. It may leave words out, at a
  price: so it does only where the attention says it clearly.

Letters in shapes: H heads, T frames, W words.
"""

from dataclasses import dataclass

import numpy as np

FLOOR = 0.01  # least weight of a frame: no single frame decides
SKIP = 1.5  # nats that a path pays for each word that it leaves out
CANDIDATES = 16  # heads whose paths are compared
BEST = 3  # heads whose mean is taken, where they are nearly as good as the best one

# chosen on the digits, see docs/guide.md
CLEAR = 0.2  # clarity from which on the attention tells something
FAINT = 0.5, 0.3  # a word is skipped: no frame gives it such a share, all frames not such a part of the usual time
SHORT = 2.0  # frames of a word that may go unnoticed
HELD = 2.0  # a word is spoken twice: it takes so many times its usual frames


@dataclass
class Track:
    """The share of each word in the attention of each frame (T, W); the word (T,) of each frame, never one before the
    last; `clarity`: how much of the attention lies there, 0 to 1."""

    weights: np.ndarray
    path: np.ndarray
    clarity: float

    def spans(self):
        """Where each word begins and ends, in frames (W, 2): in the middle of its first frame, and of the first one of
        the next word. The two are equal where no frame speaks the word."""
        words = range(self.weights.shape[1])
        ends = [np.searchsorted(self.path, words, side) for side in ("left", "right")]
        return np.minimum(np.stack(ends, 1) + 0.5, len(self.path))

    def skipped(self, usual):
        """The words that no frame speaks, by their usual numbers of frames (W,). A very short word may go unnoticed;
        nothing is skipped where the attention is not clear."""
        usual = np.asarray(usual)
        share = usual * len(self.path) / usual.sum()
        peak, part = FAINT
        faint = (self.weights.max(0) < peak) & (self.weights.sum(0) < part * share)
        return np.flatnonzero(faint & (usual >= SHORT) & (self.clarity >= CLEAR)).tolist()

    def repeated(self, usual, sounding=None):
        """The words that take as long as two, likewise. sounding (T,): the frames with sound, which alone count."""
        spent = np.bincount(self.path, sounding, len(usual))
        return np.flatnonzero((spent > HELD * np.maximum(usual, SHORT)) & (self.clarity >= CLEAR)).tolist()


def align(attention):
    """The Track of attention (H, T, W), whose rows (W,) sum to 1 or less. Raises ValueError without words or frames."""
    attention = np.asarray(attention, np.float32)
    if not attention.size:
        raise ValueError(f"attention of shape {attention.shape} has no heads, frames or words")
    heads = attention[promise(attention).argsort(kind="stable")[::-1][:CANDIDATES]]
    paths = walk(shares(heads))
    scores = np.array([clarity(*pair) * timeliness(pair[1], heads.shape[2]) for pair in zip(heads, paths, strict=True)])
    best = scores.argsort(kind="stable")[::-1][:BEST]
    mean = heads[best[scores[best] >= 0.7 * scores[best[0]]]].mean(0)
    weights = shares(mean)
    path = walk(weights[None])[0]
    return Track(weights, path, clarity(mean, path))


def shares(attention):
    """Attention (..., T, W) with rows that sum to 1."""
    total = attention.sum(-1, keepdims=True)
    return np.where(total > 0, attention / np.where(total > 0, total, 1), 1 / attention.shape[-1])


def promise(attention):
    """How far the attention (H, T, W) of each head moves along the text with time: the correlation of its mean place
    with time, times its sum. Cheap: a large model has hundreds of heads."""
    T, W = attention.shape[1:]
    place = shares(attention) @ np.arange(W)
    place = place - place.mean(1, keepdims=True)
    time = np.arange(T) - (T - 1) / 2
    size = np.sqrt((place**2).sum(1) * (time**2).sum())
    return np.where(size > 0, place @ time / np.where(size > 0, size, 1), 0.5) * attention.sum((1, 2)) / T


def walk(weights, skip=SKIP):
    """The best path (H, T) of T frames through W words for each of weights (H, T, W): the largest sum of the logarithms
    of its weights, less `skip` for each word that it leaves out, also before the first frame and behind the last. It
    never goes back."""
    H, T, W = weights.shape
    place = np.arange(W)
    gain = np.log(np.maximum(weights, FLOOR))
    score = gain[:, 0] - skip * place
    came = np.zeros((T, H, W), int)  # from which word
    for t in range(1, T):
        ahead = score + skip * place  # a step from i to j costs skip * (j - i - 1)
        most = np.maximum.accumulate(ahead, 1)
        source = np.maximum.accumulate(np.where(ahead == most, place, 0), 1)
        onward = np.pad((most - skip * place)[:, :-1], ((0, 0), (1, 0)), constant_values=-np.inf)
        moves = onward > score
        came[t] = np.where(moves, np.pad(source[:, :-1], ((0, 0), (1, 0))), place)
        score = np.where(moves, onward, score) + gain[:, t]
    path = np.zeros((H, T), int)
    path[:, -1] = (score - skip * (W - 1 - place)).argmax(1)
    for t in range(T - 1, 0, -1):
        path[:, t - 1] = np.take_along_axis(came[t], path[:, t : t + 1], 1)[:, 0]
    return path


def clarity(weights, path):
    """How much of weights (T, W) lies on a path (T,), 0 to 1: the mean over frames, times the mean share of a word's
    weight. Weights that are everywhere alike, or at one word alone, have little on any path."""
    on = weights[np.arange(len(path)), path]
    total = weights.sum(0)
    own = np.bincount(path, on, weights.shape[1])
    return float(on.mean() * (own / np.maximum(total, 1e-9)).mean())


def timeliness(path, words):
    """1 for a path (T,) that leaves the first word, and comes to the last, as late as its pace between them tells; 0
    for one that is a word ahead. Heads look ahead, hardly ever behind."""
    frames = np.bincount(path, minlength=words)
    inner = frames[1:-1][frames[1:-1] > 0]
    usual = inner.mean() if len(inner) else len(path) / words
    return 1 - min(1.0, max(0.0, 1 - frames[0] / usual, (frames[-1] / usual - 1) / 2))

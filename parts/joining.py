"""Spoken pieces of a long text as one recording, block by block.

    for block in joined([(text, blocks of its wav), ...], rate): ...

At a join the silence at the end of one piece and at the start of the next becomes a pause of natural length. All else
stays as it is: the start of the first piece, the end of the last one, and the silence between sounds. What is cut is
faded, so that nothing clicks.

Letters in shapes: n samples of a block or a piece, N of the recording.
"""

import math

import numpy as np
import torch

from parts.audio import frame_size, powers
from parts.sentences import pause_after

SILENT = 10**-4.5  # of the power of the loudest frame; an f in data/digits has 10**-4.2, noise 10**-7 to 10**-4.3
MARGIN = 4  # frames of 20 ms that stay at each side of a pause: sounds begin and end softly
HEARD = 50  # frames of the start of a piece that tell how loud it is
FADE = 0.005  # seconds


def join_pieces(pieces, rate, pauses):
    """One recording (N,) of wavs (n,), as `joined` makes it. pauses: seconds after each wav but the last."""
    pauses = [*pauses, 0.0][: len(pieces)]
    blocks = [*joined(zip(pauses, ([piece] for piece in pieces), strict=True), rate, pause=float)]
    return torch.cat(blocks) if blocks else torch.zeros(0)


def joined(pieces, rate, pause=pause_after, starts=None):
    """Yield one recording at `rate` as blocks (n,): the same recording whatever the size of the blocks that come in.

    pieces: (text, blocks (n,) of its wav, on the CPU), one after another; the next piece is asked for when all blocks
    of one have come. pause(text): seconds between a piece and the next one, beside 80 ms or less at each side. The
    last 25 ms wait for the next block; a silence that is longer than its pause waits for the next sound; and a piece
    that is not the first waits until one second of it has come, by which its silence is told from its sounds.

    starts: a list, to which the sample of the recording is added where each piece begins, with what is cut of it.
    """
    end = None  # of the piece before
    done = 0
    for text, blocks in pieces:
        sound = framed(blocks, frame_size(rate))
        if end:
            closing = end.closed()
            done += len(closing)
            yield closing
            sound = opened(sound, end)
        begin, before = done, end
        end = End(frame_size(rate), MARGIN * frame_size(rate) + round(pause(text) * rate), round(FADE * rate))
        for block in sound:
            if len(ready := end.take(block)):
                done += len(ready)
                yield ready
        if starts is not None:
            starts.append(begin - (before.cut if before else 0))
    if end and len(rest := torch.cat([end.tail, *end.silence])):
        yield rest


class End:
    """The end of a piece as far as it is known: it may turn out to be the silence before a join.

    size: samples of a frame. gap: samples of silence that a join leaves. fade: samples that a join fades. tail (n,):
    what may be faded, at most `room` samples, the length that a join gives it. silence: blocks (n,) that a join cuts.
    loudest: the power of the loudest frame. cut: samples that the join takes off the start of the next piece.
    """

    def __init__(self, size, gap, fade):
        self.size = size
        self.gap = self.room = gap
        self.fade = fade
        self.tail = torch.zeros(0)
        self.silence = []
        self.loudest = 0.0
        self.cut = 0

    def take(self, block):
        """Take whole frames, or the last one (n,). Returns what no join changes any more (n,)."""
        power = frame_powers(block, self.size)
        loudest = np.maximum.accumulate(np.maximum(power, self.loudest))
        sounds = np.flatnonzero(power > loudest * SILENT)
        self.loudest = loudest[-1]
        if len(sounds):
            n = min(len(block), (sounds[-1] + 1) * self.size)
            self.tail = torch.cat([self.tail, *self.silence, block[:n]])
            self.silence = []
            self.room = len(self.tail) + self.gap
            block = block[n:]
        n = min(len(block), self.room - len(self.tail))
        self.tail = torch.cat([self.tail, block[:n]])
        if n < len(block):
            self.silence.append(block[n:])
        ready = max(0, len(self.tail) - self.fade)
        self.room -= ready
        done, self.tail = self.tail[:ready], self.tail[ready:]
        return done

    def closed(self):
        """What a join leaves of the tail: (room,), faded out, and silent after it."""
        n = min(self.fade, len(self.tail))
        out = torch.zeros(self.room)
        out[: len(self.tail)] = self.tail
        out[len(self.tail) - n : len(self.tail)] *= ramp(n).flip(0)
        return out


def opened(blocks, before):
    """Whole frames of a piece after a join: without the silence at its start, and faded in. before: the End of the
    piece before."""
    held = torch.zeros(0)
    for block in blocks:
        held = torch.cat([held, block])
        loudest = np.maximum.accumulate(frame_powers(held, before.size))
        enough = np.flatnonzero(loudest[HEARD - 1 :] > before.loudest * SILENT)
        if len(enough):
            loudest = loudest[: HEARD + enough[0]]
            break
    if len(held):
        power = frame_powers(held, before.size)[: len(loudest)]
        sounds = np.flatnonzero(power > loudest[-1] * SILENT)
        first = sounds[0] if len(sounds) else len(power)
        before.cut = max(0, first - MARGIN) * before.size
        held = held[before.cut :].clone()
        n = min(before.fade, len(held))
        held[:n] *= ramp(n)
        yield held
    yield from blocks


def framed(blocks, size):
    """The same wav in blocks of whole frames of `size` samples, and what is left of it."""
    rest = torch.zeros(0)
    for block in blocks:
        rest = torch.cat([rest, block])
        n = len(rest) // size * size
        if n:
            yield rest[:n]
            rest = rest[n:]
    if len(rest):
        yield rest


def frame_powers(block, size):
    """The power of each frame of a block (n,), the last one whole or not."""
    whole = len(block) // size * size
    rest = powers(block[whole:], len(block) - whole) if whole < len(block) else []
    return np.concatenate([powers(block[:whole], size), rest])


def ramp(n):
    """Factors (n,) that rise from 0 to 1."""
    return 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(n) + 0.5) / n)

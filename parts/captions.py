"""The times of spoken words as files: captions (SRT) and a list (JSON).

words: (word, start, end) in the order of time, in seconds; marks belong to the word before them.
"""

import json
import math
import re
from itertools import accumulate, pairwise

from parts.files import whole
from parts.sentences import pause_after, sentences

WIDEST = 42  # characters of a caption
LONGEST = 5.0  # seconds
PAUSE = 0.7  # seconds of silence that no caption spans
UNSPACED = re.compile("[⺀-鿿！-～]{2}")  # characters of scripts without spaces between words


def write_json(path, words):
    """Write words as a list of objects with `word`, `start` and `end`. Raises ValueError for times out of order, and
    OSError that names the file."""
    rows = [{"word": word, "start": start, "end": end} for word, start, end in in_order(words)]
    with whole(path, "w") as file:
        json.dump(rows, file, ensure_ascii=False, indent=1)
        file.write("\n")


def write_srt(path, words):
    """Write words as captions of at most 42 characters and 5 s; a single word may have more. Raises as write_json."""
    shown = captions(in_order(words))
    starts = [caption[0][1] for caption in shown]
    ends = [min(caption[-1][2], after) for caption, after in zip(shown, [*starts, math.inf][1:], strict=True)]
    with whole(path, "w") as file:
        for n, (caption, start, end) in enumerate(zip(shown, starts, ends, strict=True), 1):
            file.write(f"{n}\n{clock(start)} --> {clock(end)}\n{''.join(spaced(caption)).rstrip()}\n\n")


def in_order(words):
    """Words with single spaces, without empty ones, and their times in thousandths. Raises ValueError, one line, for
    times that are out of order."""
    last = 0.0
    for word, start, end in words:
        if not last <= start <= end < math.inf:
            raise ValueError(f"the word {word!r:.60} cannot last from {start} to {end} s after one from {last} s on")
        last = start
    times = [(" ".join(word.split()), round(float(start), 3), round(float(end), 3)) for word, start, end in words]
    return [spoken for spoken in times if spoken[0]]


def captions(words):
    """The captions of words, each a list of words: whole sentences where they fit, and no pause within one."""
    texts = spaced(words)
    borders = set(accumulate(map(len, sentences("".join(texts)))))
    starts = [start for _, start, _ in words]
    parts = []
    part = []
    for word, place, after in zip(words, accumulate(map(len, texts)), [*starts, math.inf][1:], strict=True):
        part.append(word)
        if place in borders or after - word[2] > PAUSE:
            parts += divide(part)
            part = []
    found = []
    for part in parts:
        if found and part[0][1] - found[-1][-1][2] <= PAUSE and fits(found[-1] + part):
            found[-1] += part
        else:
            found.append(part)
    return found


def divide(words):
    """Words in captions that fit, about as long as each other, divided at pauses and at marks."""
    if fits(words) or len(words) == 1:
        return [words]
    size = len(words)
    quarter = size // 4
    places = range(max(1, quarter), size - quarter)
    pauses = [words[n][1] - words[n - 1][2] + pause_after(words[n - 1][0]) - abs(n / size - 0.5) / 2 for n in places]
    best = places[pauses.index(max(pauses))]
    return divide(words[:best]) + divide(words[best:])


def fits(words):
    """Whether a caption may show so many words."""
    return len("".join(spaced(words)).rstrip()) <= WIDEST and words[-1][2] - words[0][1] <= LONGEST


def spaced(words):
    """The text of each word with the space after it."""
    texts = [word for word, _, _ in words]
    return [text if UNSPACED.match(text[-1:] + after[:1]) else f"{text} " for text, after in pairwise([*texts, ""])]


def clock(seconds):
    """A time as captions write it: hours, minutes, seconds and their thousandths."""
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02},{milliseconds % 1000:03}"

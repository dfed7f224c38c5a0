"""The folder of a training run: what it holds, and who may write there."""

import contextlib
import glob
import itertools
import os
import re

from parts.files import locked

CHECKPOINTS = ("last.pt", "ckpt_*.pt", "best.pt")
PARTIAL = ("*.partial", "samples/*.partial")  # what a kill leaves behind
RUN_FILES = (*CHECKPOINTS, *PARTIAL, "metrics.jsonl", "samples/*.wav")


def left_in(out_dir, patterns):
    """Paths of the files in out_dir that one of the patterns matches."""
    return [path for p in patterns for path in sorted(glob.glob(os.path.join(glob.escape(out_dir), p)))]


def kept_checkpoints(out_dir):
    """Paths of ckpt_{iter}.pt in out_dir, the oldest first."""
    numbered = [(re.search(r"ckpt_(\d+)\.pt$", path), path) for path in left_in(out_dir, ["ckpt_*.pt"])]
    return [path for _, path in sorted((int(found[1]), path) for found, path in numbered if found)]


@contextlib.contextmanager
def alone_in(out_dir):
    """Hold out_dir for one run. If this makes the folder and it stays empty, it is removed. ValueError: another run
    holds it."""
    existed = os.path.exists(out_dir)
    with locked(out_dir):
        try:
            yield
        finally:
            if not existed:
                with contextlib.suppress(OSError):  # it is not empty
                    os.rmdir(out_dir)


def check_out_dir(out_dir, source, overwrite):
    """Raise ValueError where a new run would destroy the run in out_dir, or the checkpoint `source` it starts from."""
    for path in left_in(out_dir, CHECKPOINTS) if os.path.exists(source) else ():
        if os.path.samefile(path, source):
            raise ValueError(f"{source!r:.150} is of the run in out_dir = {out_dir!r:.100}: take another out_dir to "
                             "start from it; init_from=resume goes on with last.pt")  # fmt: skip
    if not overwrite and left_in(out_dir, CHECKPOINTS[:2]):  # nothing can go on from a best.pt alone
        raise ValueError(f"{out_dir} holds a run: init_from=resume goes on with it, overwrite=True removes it, or "
                         "take another out_dir")  # fmt: skip


def clear(out_dir, resume, overwrite, say):
    """Make out_dir ready. A new run removes the files of an older one, but keeps a best.pt that has no last.pt; a
    resumed run removes what a kill left half written."""
    best = os.path.join(out_dir, "best.pt")
    if not resume and not overwrite and os.path.exists(best):
        free = (os.path.join(out_dir, f"best_{n}.pt") for n in itertools.count(1))
        kept = next(path for path in free if not os.path.exists(path))
        os.replace(best, kept)
        say(f"{best} has no last.pt beside it to go on with: the run starts over, and it is kept as {kept}")
    for path in left_in(out_dir, PARTIAL if resume else RUN_FILES):
        os.remove(path)

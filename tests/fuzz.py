"""The driver of test_fuzz.py: damaged inputs go into readers, and what comes of each is one of a few verdicts.

A reader is a generator function (rng, ...) of cases without end; the same seed makes the same cases. They are called in
a forked process, so that a crash or a hang ends one case and not the test.
"""

import contextlib
import copy
import faulthandler
import functools
import gc
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from helpers import ROOT
from tqdm import tqdm

from parts import configurator

CPU_LIMIT = 10  # seconds of work for one case
WALL_LIMIT = 120  # seconds until a case that does not even work is given up
MEMORY = 6 << 30  # bytes that a case may have
LONGEST = 400  # characters of a line
GOOD, MAY, BAD = "good", "may", "bad"  # has to be taken; may be refused or taken; has to be refused or named
VERDICTS = ("clear", "named", "accepted", "allowed", "refused", "traceback", "hang", "crash", "silent", "unclear")
FAULTS = VERDICTS[4:]


@dataclass
class Case:
    """label: what was done. call() -> what the reader made of it. kind: of the damage, for the list of kinds that may
    be silent. judge(result, output) -> "named", "accepted" or what was taken in silence; without it, a bad case has to
    be refused, or warned of in the output."""

    label: str
    call: Callable
    expect: str = MAY
    kind: str = ""
    judge: Callable | None = None


@dataclass
class Outcome:
    number: int
    label: str
    verdict: str
    kind: str = ""
    what: str = ""  # the error's line, or the place of a traceback, or what was silent


class Hang(BaseException):
    """Raised in a case that works for too long; no `except Exception` stops it."""


# ---------------------------------------------------------------------------------------------------------------------
# the verdict on one case


def place(error):
    """Exception and innermost line of the repository that it went through, outside of tests."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [(Path(f.filename).resolve(), f.lineno) for f in frames]
    ours = [(f, n) for f, n in files if ROOT in f.parents and (ROOT / "tests") not in f.parents]
    file, line = (ours or files)[-1]
    name = file.relative_to(ROOT) if ROOT in file.parents else file.name
    return f"{name}:{line} {type(error).__name__}: {' '.join(str(error).split()):.120}"


def attempt(case, number, outputs):
    """Call a case as configurator.run calls a script's main, and say what came of it."""
    for file in outputs:
        os.ftruncate(file, 0)
    result, code, error = [], 0, None
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT)
    try:
        configurator.run(lambda _: result.append(case.call()), str(ROOT / "prepare.py"))
    except SystemExit as stop:
        code = stop.code
    except BaseException as failure:
        error = failure
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = (os.pread(file, 1 << 20, 0).decode("utf-8", "replace") for file in outputs)
    verdict, what = judge(case, result, code, error, out, err)
    return Outcome(number, case.label[:200], verdict, case.kind, what)


def warned(output):
    """Whether there is a warning; that a random model does not stop by itself is none."""
    return re.search(r"(?<!; )\bwarning: |has no effect", output, re.I)


def judge(case, result, code, error, out, err):
    """(verdict, what there is to say of it)."""
    if isinstance(error, Hang):
        return "hang", place(error)
    if error is not None:
        return "traceback", place(error)
    if code:
        lines = [line for line in err.split("\n") if line.strip()]
        if code != 1 or len(lines) != 1 or not lines[0].startswith("error: ") or not len(lines[0]) <= LONGEST:
            return "unclear", f"exit code {code}, {len(lines)} lines, {max(map(len, lines), default=0)} characters: " \
                              f"{err:.200}"  # fmt: skip
        return "refused" if case.expect == GOOD else "clear", lines[0]
    if not result:  # a SystemExit of code 0
        return ("silent" if case.expect == BAD else "accepted"), "ended as if it had been done"
    if case.judge:
        said = case.judge(result[0], out + err)
    elif case.expect == BAD:
        said = "named" if warned(out + err) else "taken"
    else:
        said = "accepted"
    if said in ("named", "accepted"):
        return ("refused" if case.expect == GOOD and said == "named" else said), ""
    return "silent", said


# ---------------------------------------------------------------------------------------------------------------------
# many cases


def child(reader, seed, first, count, pipe):
    """Call cases first .. count - 1 of a reader, and send each one's label before and its outcome after it."""
    os.setsid()
    faulthandler.disable()
    stack = open("stack", "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR2, stack)  # so that one that waits can be asked where
    tqdm.set_lock(threading.RLock())  # its own is shared with the parent, and a killed child would keep it

    def stop(*_):
        raise Hang

    signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    os.environ.pop("PARLANDO_DEBUG", None)
    how = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND  # whoever writes, python or a C library
    outputs = [os.open(f"output{fd}", how) for fd in (1, 2)]
    for file, fd, name in zip(outputs, (1, 2), ("stdout", "stderr"), strict=True):
        os.dup2(file, fd)
        setattr(sys, name, open(fd, "w", encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115
    sys.argv = ["fuzz"]
    read = functools.lru_cache(configurator.read_defaults)  # once, not for each case
    configurator.read_defaults = lambda script: copy.copy(read(str(script)))
    configurator.configure(ROOT / "prepare.py", [])  # now, and not at the cost of the first case
    os.fsync = lambda _: None
    start, started = multiprocessing.process.BaseProcess.start, []

    def few(process):
        started.append(process)
        if len(started) > 20:
            raise RuntimeError("too many processes are started")
        start(process)

    multiprocessing.process.BaseProcess.start = few
    gc.freeze()
    for number, case in enumerate(itertools.islice(reader(random.Random(seed)), count)):
        if number >= first:
            started.clear()
            pipe.send(case.label[:200])
            outcome = attempt(case, number, outputs)
            pipe.send(outcome)
            if outcome.verdict == "hang":  # it may have left anything behind
                return
    pipe.send(None)


def asked(pid, folder):
    """Where a child waits: the innermost lines of its stack."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR2)
        time.sleep(1)
    lines = re.findall(r'File "(?:.*/)?(.+?)", line (\d+)', (Path(folder) / "stack").read_text())
    return ", ".join(f"{name}:{line}" for name, line in lines[:6])


def run(reader, seed, count, folder):
    """The outcomes of `count` cases of a reader. `folder`: where its cases may write."""
    outcomes, ended = [], False
    os.makedirs(folder, exist_ok=True)
    while not ended:
        receive, send = multiprocessing.Pipe(False)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            try:
                os.chdir(folder)
                child(reader, seed, len(outcomes), count, send)
            except BaseException as error:
                send.send(Outcome(-1, "the fuzzer itself", "crash", what=place(error)))
            os._exit(0)
        send.close()
        label, waiting, begun = "", True, len(outcomes)
        with contextlib.suppress(EOFError):
            while waiting and (waiting := receive.poll(WALL_LIMIT)):
                message = receive.recv()
                if message is None:
                    ended = True
                elif isinstance(message, str):
                    label = message
                else:
                    label = ""
                    outcomes.append(message)
                    ended = ended or message.number < 0
        where = "" if waiting else asked(pid, folder)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if label or not ended and len(outcomes) == begun:  # it was begun and has no outcome
            ended = not label
            what = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit code {status}"
            verdict, what = ("crash", what) if waiting else ("hang", f"waits in {where}")
            outcomes.append(Outcome(len(outcomes), label or "the fuzzer itself", verdict, what=what))
        ended = ended or len(outcomes) >= count
    return outcomes


def sift(outcomes, allowed):
    """What is silent by design, as a table {kind: reason} allows it, is no fault."""
    for outcome in outcomes:
        if outcome.verdict == "silent" and outcome.kind in allowed:
            outcome.verdict = "allowed"
    return [outcome for outcome in outcomes if outcome.verdict in FAULTS]


def table(results):
    """{reader: outcomes} as lines of text."""
    head = ["reader", "tried", *VERDICTS]
    rows = [[name, len(found), *(Counter(o.verdict for o in found)[v] or "" for v in VERDICTS)]
            for name, found in results.items()]  # fmt: skip
    return "\n".join("".join(f"{cell!s:>10}" if i else f"{cell:20}" for i, cell in enumerate(row))
                     for row in [head, *rows])  # fmt: skip


def report(results, seed, most=6):
    """The table, and the first faults of each reader with what makes them again."""
    lines = [table(results), ""]
    for name, found in results.items():
        groups = {}
        for o in found:
            if o.verdict in FAULTS:
                groups.setdefault((o.verdict, re.sub(r"['\"(].*", "", o.what)), []).append(o)
        for (verdict, _), some in sorted(groups.items(), key=lambda item: -len(item[1]))[:most]:
            o = some[0]
            lines.append(f"{name}, seed {seed}, case {o.number}, and {len(some) - 1} like it: {verdict}: {o.label}\n"
                         f"    {o.what:.300}")  # fmt: skip
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# damage

ODD = [None, True, False, 0, 1, -1, 7, 0.5, -0.5, math.nan, math.inf, -math.inf, 10**30, -(10**30), "", " ", "x", "nan",
       "x" * 5000, "\ud800", "\0", "a\nb", "../x", [], [[]], ["x"], [None], {}, {"x": 1}, {"path": 3}]  # fmt: skip


def alike(a, b, within=0.0):
    """Whether two nested results are the same, arrays number by number, up to a difference `within`."""
    if isinstance(a, torch.Tensor | np.ndarray) and isinstance(b, torch.Tensor | np.ndarray):
        a, b = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in (a, b))
        return a.shape == b.shape and (bool((a == b).all()) or within > 0 and np.allclose(a, b, 0, within))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key], within) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(alike(x, y, within) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def unless_same(baseline, otherwise="its result is another one", within=0.0):
    """A judge: what gives the same result as the sound input is harmless."""
    return lambda result, output: ("accepted" if alike(result, baseline, within) else
                                   "named" if warned(output) else otherwise)  # fmt: skip


def branches(tree, at=()):
    """The paths of all that is in nested dicts and lists; of a long list its first and last only."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    items = list(items)
    for key, value in items if isinstance(tree, dict) or len(items) < 5 else [items[0], items[-1]]:
        yield (*at, key)
        yield from branches(value, (*at, key))


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def without(tree, path):
    """A nested dict without what is at a path; nothing of the old one changes."""
    return changed(tree, path, None, gone=True)


def changed(tree, path, value, gone=False):
    """A nested dict with another value at a path; nothing of the old one changes."""
    key, *rest = path
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    if rest:
        tree[key] = changed(tree[key], rest, value, gone)
    elif gone:
        del tree[key]
    else:
        tree[key] = value
    return tree


def differs(a, b):
    """Whether an odd value is another one than the old, and not the same number of another type."""
    try:
        return a is not b and not bool(a == b)
    except (RuntimeError, ValueError, TypeError, OverflowError):
        return True


def mistyped(rng, old):
    """An odd value of another type than the old one, or a number that is none."""
    kinds = (int, float) if type(old) in (int, float) else (tuple, list) if type(old) in (tuple, list) else (type(old),)
    wrong = [v for v in ODD if type(v) not in kinds or (isinstance(v, float) and not math.isfinite(v))]
    return rng.choice([v for v in wrong if differs(v, old)])


def odd(rng, old):
    return rng.choice([v for v in ODD if differs(v, old)])


def damaged_tree(rng, tree, paths=None):
    """(label, tree, path, how) of a nested dict in which one thing is missing or mistyped."""
    path = rng.choice(paths or list(branches(tree)))
    name = ".".join(map(str, path))
    if rng.random() < 0.4:
        return f"{name} is missing", without(tree, path), path, "missing"
    value = mistyped(rng, at(tree, path))
    return f"{name} = {value!r:.40}", changed(tree, path, value), path, "mistyped"


def damaged_bytes(rng, data):
    """(label, bytes, how): cut, grown, overwritten or with a bit turned."""
    how = rng.choice(["cut", "cut", "bit", "bit", "bit", "zeros", "noise", "twice", "grown", "empty", "text"])
    n, where = len(data), rng.randrange(max(1, len(data)))
    if rng.random() < 0.4:  # where a header is
        where = min(where, rng.randrange(200))
    size = min(rng.choice([1, 4, 64, 1000]), max(0, n - where))
    made = {
        "cut": lambda: data[:where],
        "bit": lambda: data[:where] + bytes([data[where] ^ 1 << rng.randrange(8)]) + data[where + 1 :],
        "zeros": lambda: data[:where] + bytes(size) + data[where + size :],
        "noise": lambda: data[:where] + rng.randbytes(size) + data[where + size :],
        "twice": lambda: data[: where + size] + data[where:],
        "grown": lambda: data + rng.randbytes(size),
        "empty": lambda: b"",
        "text": lambda: b"<html>404: not found</html>\n",
    }[how]()
    return f"{how} at byte {where} of {n}, {size}", made, "same" if made == data else how


def dumps(value):
    """JSON as python writes it, with NaN and halves of emoji."""
    return json.dumps(value, ensure_ascii=True)

"""Worker processes that do part of the work ahead of time. They end with the process that started them, however that
ends, and leave Ctrl-C to it."""

import atexit
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import torch

from parts.files import let_go

PATIENCE = 300  # seconds that a loader worker may take for an item

# -----------------------------------------------------------------------------
# a pool, for functions that are called on parts of a list


def start_pool(n):
    """A pool of n processes, or of one for each core where n is 0."""
    n = n or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["torch", "soundfile"])  # imported once, not by each worker
    return ProcessPoolExecutor(n, context, start_worker)


def start_worker():
    """Use one thread, and follow the parent."""
    torch.set_num_threads(1)
    follow_parent()


def follow_parent():
    """Leave Ctrl-C to the parent, and end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def map_chunks(pool, function, items, *args, chunk=8):
    """function(list of items, *args) -> list of results, called in the pool on `chunk` items at a time; yields the
    results in order. The number of calls under way is bounded, so a long list costs no memory. Raises OSError where a
    worker is killed."""
    items = iter(items)
    waiting = deque()
    try:
        while True:
            while len(waiting) < 4 * pool._max_workers and (some := list(itertools.islice(items, chunk))):
                waiting.append(pool.submit(function, some, *args))
            if not waiting:
                return
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise OSError("a worker process was killed, perhaps for lack of memory: try fewer --workers") from None


def put_back(order, things):
    """Things that come in this order of their indices, in the order of the indices."""
    waiting = {}
    n = 0
    for i, thing in zip(order, things, strict=True):
        waiting[i] = thing
        while n in waiting:
            yield waiting.pop(n)
            n += 1


# -----------------------------------------------------------------------------
# a stream of items, made ahead


def read_ahead(make, workers):
    """The items of make(0, 1), an endless iterator, made ahead by processes: the n-th makes those of make(n, workers).

    Items come through pipes, not through shared memory, which is small in a container. Raises the error of a worker as
    it is, and ValueError where a worker dies or stands still.
    """
    fork = sys.platform == "linux"  # the worker shares our memory; other systems make it from a pickle
    context = multiprocessing.get_context("fork" if fork else "spawn")
    processes, pipes = [], []
    end = partial(kill, processes)
    atexit.register(end)  # multiprocessing would wait for the workers for ever
    try:
        for n in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            pipes.append(ours)
            args = (partial(make, n, workers), theirs, pipes if fork else ())
            processes.append(context.Process(target=send_items, args=args, daemon=True))
            processes[-1].start()
            theirs.close()
        for process, pipe in itertools.cycle(zip(processes, pipes, strict=True)):
            yield receive(process, pipe)
    finally:
        end()
        atexit.unregister(end)


def send_items(make, pipe, inherited):
    """The work of a loader worker: send the items of make() until nobody takes them."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group: the parent ends the workers
        signal.signal(number, signal.SIG_IGN)
    for parents in inherited:
        parents.close()  # else the worker does not notice the end of the parent
    let_go()
    try:
        for item in make():
            pipe.send(item)
    except BrokenPipeError:
        pass
    except (ValueError, OSError, MemoryError) as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))


def receive(process, pipe):
    """The next item of a worker. Raises its error, and ValueError where it has died or stands still."""
    try:
        if not pipe.poll(PATIENCE):
            raise ValueError(f"a loader worker has sent nothing for {PATIENCE} s: is the disk with the data available? "
                             "loader_workers=0 works without workers")  # fmt: skip
        item = pipe.recv()
    except (EOFError, OSError):
        process.join(5)
        raise ValueError(f"a loader worker died (exit code {process.exitcode}; -9 usually means too little memory): "
                         "fewer loader_workers need less memory") from None  # fmt: skip
    if isinstance(item, Exception):
        raise item
    return item


def kill(processes):
    """End processes at once, without waiting for one that hangs in the system."""
    for process in processes:
        process.kill()
        process.join(1)

"""What a run will need: parameters, memory, batches, steps, hours of audio, and where the data are there, time.

    python train.py config/elise.py --dry_run=True

- The model is on the meta device, where tensors have shapes and no memory, so a laptop can plan for any GPU.
- Memory is counted, not estimated by formula: a step of the fullest micro-batch runs forward and backward there, and
  each tensor counts while it exists. What torch takes inside one operation is not seen; `SLACK` stands for it.
- If the token folder does not exist yet, utterances of ten seconds take its place.
- If it does and the model fits into memory, a few steps are taken and timed.

Letters in shapes: B batch, S rows, C columns.
"""

import contextlib
import copy
import ctypes
import gc
import time
import weakref
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parts.optim import Muon, share_out

USUAL_SECONDS = 10.0  # of an utterance, where no data exist
USUAL_TEXT = 40  # its text ids
MOST_TIMED = 20  # micro-batches
TIMED_SECONDS = 10.0  # after so long no further one is timed
SEEDS = 4  # passes of a model with several modes, each of which takes one by chance
SLACK = 0.03  # of what comes and goes: what the allocator and single operations take besides, measured on a CPU
FIRST_STEP = 60 * 2**20  # bytes that torch loads with the first step on a CPU


def usual_frames(codec):
    return round(USUAL_SECONDS * codec["frame_rate"])


def supposed_batch(cfg, codec, model):
    """A micro-batch of usual utterances, as full as max_tokens and max_batch allow: its tensors, seconds of audio.
    codec: what meta.json says of the codec."""
    frames = usual_frames(codec)
    rows = int(model.length(USUAL_TEXT, frames))
    limit = min(model.max_rows, cfg.max_tokens)
    if rows > limit:
        frames = max(1, frames * limit // rows - USUAL_TEXT)
    count = max(1, min(cfg.max_batch, cfg.max_tokens // int(model.length(USUAL_TEXT, frames))))
    codes = np.arange(frames)[:, None].repeat(codec["n_codebooks"], 1) % 2  # neighbouring frames differ
    tokens, segment = model.layout(np.ones(USUAL_TEXT, np.int64), codes)
    batch = [torch.from_numpy(a)[None].repeat(count, *[1] * a.ndim) for a in (tokens, segment)]
    if model.reference and "reference" in codec:
        reference = codec["reference"]
        longest = round(cfg.reference_seconds[1] * codec["frame_rate"]) * reference["rows_per_frame"] or 1
        batch.append(torch.zeros(count, longest, len(reference["silence"])))
    return batch, count * frames / codec["frame_rate"]


def mean_seconds(batches, codec):
    """Of audio in a micro-batch of the first epoch."""
    plan, _ = batches.plan(0)
    return sum(int(batches.files.index[b, 3].sum()) for b in plan) / codec["frame_rate"] / len(plan)


def extreme_batches(batches):
    """The micro-batches of the first epoch that may need most memory: with most rows, frames, or utterances."""
    plan, prompts = batches.plan(0)
    lengths = batches._lengths(prompts)
    sizes = (lambda b: len(b) * lengths[b].max(), lambda b: batches.files.index[b, 3].sum(), len)
    found = {max(range(len(plan)), key=lambda i, size=size: size(plan[i])) for size in sizes}
    return [batches.read(plan[i], prompts[plan[i]]) for i in sorted(found)]


class Ledger(TorchDispatchMode):
    """Counts the bytes of what is on the meta device, by kind: `now`, and `most`, as they were at the fullest moment.

    fixed: bytes that are there all the time.
    """

    def __init__(self, fixed):
        super().__init__()
        self.now = Counter(fixed)
        self.most = Counter(fixed)
        self.storages = {}  # {address: (weak reference, kind, bytes)}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.is_meta and x.untyped_storage()._cdata not in self.storages:
                self.note(x, "temporaries")
        return made

    def note(self, x, kind):
        """A tensor is of this kind from now on, unless it is of another kind than temporaries already."""
        storage = x.untyped_storage()
        key = storage._cdata
        reference, before, size = self.storages.get(key, (None, "temporaries", storage.nbytes()))
        if before != "temporaries" or not x.is_meta:
            return
        if reference:
            self.now[before] -= size
        self.storages[key] = reference or weakref.ref(storage, partial(self.forget, key)), kind, size
        self.now[kind] += size
        if self.now.total() > self.most.total():
            self.most = Counter(self.now)

    def forget(self, key, _):
        _, kind, size = self.storages.pop(key)
        self.now[kind] -= size


class OnDevice:
    """What every device has and meta lacks, in place of functions of torch.nn.functional: attention that keeps no
    weights (B, H, S, S), autocast, and gradients of embeddings that have only the rows that occur."""

    def __init__(self, ledger):
        self.ledger = ledger
        self.copies = {}  # of weights, which autocast keeps until the end of the forward pass
        self.rows = []  # of embeddings whose gradients have only these
        self.plain = {name: getattr(F, name) for name in ("linear", "conv1d", "embedding")}

    def __enter__(self):
        replaced = {name: getattr(self, name) for name in ("linear", "conv1d", "embedding")}
        self.patch = mock.patch.multiple(F, scaled_dot_product_attention=self.attention, **replaced)
        self.patch.start()
        return self

    def __exit__(self, *_):
        self.patch.stop()

    def attention(self, q, k, v, *_, **__):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*map(self.cast, (q, k, v)))[0]

    def linear(self, input, weight, bias=None):
        return self.plain["linear"](*map(self.cast, (input, weight, bias)))

    def conv1d(self, input, weight, bias=None, *rest, **more):
        return self.plain["conv1d"](*map(self.cast, (input, weight, bias)), *rest, **more)

    def embedding(self, ids, weight, *rest, **more):
        if not (rest and rest[-1] and weight.requires_grad):  # the last one says that its gradient is sparse
            return self.plain["embedding"](ids, weight, *rest, **more)
        self.rows.append(self.plain["embedding"](ids, weight.detach()).requires_grad_())
        return self.rows[-1]

    def cast(self, x):
        """A float32 tensor in the type of autocast."""
        if x is None or x.dtype != torch.float32 or not torch.is_autocast_enabled("cpu"):
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(torch.get_autocast_dtype("cpu"))
        if id(x) not in self.copies:
            self.copies[id(x)] = x.to(torch.get_autocast_dtype("cpu"))
            self.ledger.note(self.copies[id(x)], "half-precision copies")
        return self.copies[id(x)]


def twin(model):
    """A copy of a model on the meta device, which takes no memory."""
    tensors = [*model.parameters(), *model.buffers()]
    empty = {id(x): torch.empty_like(x, device="meta") for x in tensors}
    empty |= {id(p): torch.nn.Parameter(empty[id(p)], p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)


def forecast(model, cfg, batch, world=1, **more):
    """{kind: bytes} of what a process holds at the fullest moment of a step.

    model: a `twin` of its own, as it is trained; batch: the tensors of a micro-batch. A step runs on the meta device,
    and all that it makes is counted while it exists. more: bytes of what else is there.
    """
    parts = weigh(model, cfg, world)
    weights, gradients, optimizer = sum(parts.values())[2:]
    micro_steps = cfg.gradient_accumulation_steps // world
    fixed = {"optimizer": optimizer, "averaged weights": weights * (cfg.ema > 0),
             "gradients to add up over GPUs": gradients * (world > 1), **more}  # fmt: skip
    most = Counter()
    for seed in range(SEEDS if "+" in (model.config.mode or "") else 1):
        ledger = Ledger(fixed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            supposed_step(model, cfg, batch, micro_steps, ledger)
        most = max(most, ledger.most, key=Counter.total)
    moving = sum(most[kind] for kind in ("activations", "temporaries", "gradients", "half-precision copies"))
    most["allocator"] = SLACK * moving
    return {kind: int(size) for kind, size in most.items() if size}


def supposed_step(model, cfg, batch, micro_steps, ledger):
    """Forward, backward and update of a model on the meta device, under a ledger."""
    muon = [optimizer for optimizer in share_out(model, cfg) if isinstance(optimizer, Muon)]
    trained = [p for p in model.parameters() if p.requires_grad]
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.sparse}
    for x in (*model.parameters(), *model.buffers()):
        ledger.note(x, "weights")

    def formed(p):
        ledger.note(p.grad, "gradients")
        if cfg.step_in_backward:
            for optimizer in muon:
                optimizer.step()
            p.grad = None

    def kept(x):
        ledger.note(x, "activations")
        return x

    hooks = [p.register_post_accumulate_grad_hook(formed) for p in trained]
    batch = [x.to("meta") if x.is_floating_point() else x for x in batch]
    autocast = torch.autocast("cpu", getattr(torch, cfg.dtype), enabled=cfg.dtype != "float32")
    for optimizer in muon:
        for p in optimizer.param_groups[0]["params"]:
            optimizer.state[p]["momentum_buffer"] = torch.empty_like(p)
            ledger.now["optimizer"] -= p.nbytes  # it is in there already
            ledger.note(optimizer.state[p]["momentum_buffer"], "optimizer")
    for p in trained if micro_steps > 1 else ():  # the gradients of other micro-batches wait
        if id(p) not in tables:
            p.grad = torch.empty_like(p)
            ledger.note(p.grad, "gradients")
    with ledger, OnDevice(ledger) as device, torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
        with autocast:
            loss, _ = model(*batch)
        device.copies.clear()
        torch.autograd.backward(loss)
        # rows of several micro-batches are added up behind each other, and once more when they are put together
        waiting = [torch.empty(micro_steps * x.nbytes, dtype=torch.uint8, device="meta") for x in device.rows]
        for x in waiting:
            ledger.note(x, "gradients")
        for optimizer in muon if not cfg.step_in_backward else ():
            optimizer.step()
    for hook in hooks:
        hook.remove()
    for p in trained:
        p.grad = None


def gigabytes(n):
    return f"{n / 2**30:.2f}"


def weigh(model, cfg, world):
    """{part of the model: [parameters, trained ones, bytes of weights, gradients, optimizer]}. Gradients that are freed
    in the backward pass and those with few rows do not count."""
    parts = defaultdict(lambda: np.zeros(5))
    tables = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    for name, p in model.named_parameters():
        n, trained = p.numel(), p.numel() * p.requires_grad
        passing = cfg.step_in_backward or (cfg.sparse_embeddings and name in tables)
        muon = cfg.muon and ".layers." in name and ".lora_" not in name and p.ndim == 2
        gradient = 0 if passing else 4 * trained
        parts[name.split(".")[0]] += n, trained, n * p.element_size(), gradient, trained * (8 - 4 * muon)
    return parts


def heaviest(model, cfg, candidates, world=1):
    """The `forecast` of the micro-batch that takes most memory, and this one. model: it stays as it is."""
    found = [(forecast(twin(model), cfg, batch, world), batch) for batch in candidates]
    return max(found, key=lambda pair: sum(pair[0].values()))


def report(cfg, model, codec, vocabulary, batches=None, other=None, world=1):
    """Print what the run of `cfg` will need. model: on the meta device; codec: what meta.json says of the codec;
    batches: those of the training split, or None; other: {name: bytes} of what else is in memory. Returns the bytes of
    memory of each GPU."""
    parts = weigh(model, cfg, world)
    print(f"{'':22}{'parameters':>14}{'trained':>14}{'weights':>10}{'gradients':>11}{'optimizer':>11}   (GB)")
    for name, row in [*parts.items(), ("in all", sum(parts.values()))]:
        print(f"  {name:20}{int(row[0]):14,}{int(row[1]):14,}{gigabytes(row[2]):>10}{gigabytes(row[3]):>11}"
              f"{gigabytes(row[4]):>11}")  # fmt: skip

    per_step, epochs = cfg.gradient_accumulation_steps, ""
    if batches:
        seconds = mean_seconds(batches, codec)
        candidates = extreme_batches(batches)
        utterances, count = len(batches.files), len(batches.plan(0)[0])
        steps = count / per_step
        print(f"{cfg.data_dir}: {utterances:,} utterances, {seconds * count / 3600:.2f} hours of audio, an epoch of "
              f"{count:,} micro-batches is {steps:,.1f} steps")  # fmt: skip
        epochs = f", {cfg.max_iters / steps:,.1f} epochs"
    else:
        batch, seconds = supposed_batch(cfg, codec, model)
        candidates = [batch]
        print(f"{cfg.data_dir} does not exist yet: supposing utterances of {USUAL_SECONDS:g} s and {USUAL_TEXT} text "
              f"ids, a vocabulary of {vocabulary:,}")  # fmt: skip
    kinds, batch = heaviest(model, cfg, candidates, world)
    count, rows = batch[1].shape
    print(f"a micro-batch: {count} utterances of up to {rows} rows, {seconds:.1f} s of audio; a step: {per_step} such")
    if cfg.epochs and not batches:
        print(f"{cfg.epochs:g} epochs: how many steps and hours of audio these are, the data will tell")
    else:
        hours = cfg.max_iters * per_step * seconds / 3600
        print(f"{cfg.max_iters:,} steps hear {hours:,.1f} hours of audio{epochs}")
    print(memory_line({**kinds, **(other or {})}))
    return sum({**kinds, **(other or {})}.values())


def memory_line(kinds):
    """A line that says how much memory a step takes. kinds: {kind: bytes}."""
    listed = sorted(kinds.items(), key=lambda pair: -pair[1])
    return (f"memory of each GPU or process: {gigabytes(sum(kinds.values()))} GB in all (on a GPU not yet measured): "
            + ", ".join(f"{kind} {gigabytes(size)}" for kind, size in listed))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# the memory of this machine


def glibc(name, *numbers):
    """Call a function of the GNU C library; without that library nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        getattr(ctypes.CDLL("libc.so.6"), name)(*numbers)


def give_back_at_once(device):
    """On a CPU: freed memory goes back to the system at once, so that no gaps between tensors add to the forecast. It
    costs a little time."""
    if device.type == "cpu":
        glibc("mallopt", -3, 2**20)  # M_MMAP_THRESHOLD


def system_field(path, field):
    """A field of /proc/self/status or /proc/meminfo in bytes; None on a system without such files."""
    with contextlib.suppress(OSError), open(path, encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def forget_peak(device):
    """From now on `peak` counts anew. Returns the bytes in use now, None if the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    glibc("malloc_trim", 0)  # freed memory that the C library keeps would hide its next use
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return system_field("/proc/self/status", "VmRSS")


def peak(device):
    """Bytes at most in use since `forget_peak`: torch's on a GPU, else the process's."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else system_field("/proc/self/status", "VmHWM")


def free_memory(device):
    """Bytes that are free on a device, infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return system_field("/proc/meminfo", "MemAvailable") or float("inf")


def besides(device, model, codec=None):
    """{name: bytes} of what a process holds beside its model and the work on it: on a GPU the codec, else Python, torch
    and all that it has loaded."""
    if device.type == "cuda":
        return {"codec": sum(x.nbytes for x in codec.state_dict().values()) if codec else 0}
    used = system_field("/proc/self/status", "VmRSS") or 0
    own = sum(x.nbytes for x in [*model.parameters(), *model.buffers()] if not x.is_meta)
    return {"Python and torch": max(0, used - own) + FIRST_STEP}


def try_step(model, cfg, batch, device, autocast, rest, again):
    """Forward and backward of a micro-batch, twice; neither weights nor random state change. rest: bytes that a step
    needs besides, and which are not there yet; again: gradients of other micro-batches wait. Returns the seconds of the
    second one, and the bytes at most in use (None if the system does not tell)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    hooks = []
    if cfg.step_in_backward:
        hooks = [p.register_post_accumulate_grad_hook(drop_gradient) for p in trained]
    held = None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(cfg.seed)
            forget_peak(device.type)
            held = torch.empty(int(rest), dtype=torch.uint8, device=device)  # on a CPU it takes no memory
            for _ in range(2):
                start = time.perf_counter()
                with autocast:
                    loss, _ = model(*batch)
                loss.backward()
                wait(device)
                seconds = time.perf_counter() - start
                for p in trained if not again else ():
                    drop_gradient(p)
            most = peak(device.type)
    finally:
        for hook in hooks:
            hook.remove()
        for p in trained:
            drop_gradient(p)
        del held
    return seconds, most if most is None or device.type == "cuda" else most + rest


def drop_gradient(p):
    p.grad = None


def time_step(cfg, model, batches, optimizer, device, world=1, most=MOST_TIMED):
    """Seconds of a step, and how many micro-batches were timed after a first one, which allocates memory: at most
    `most`. The model is trained by these."""
    autocast = torch.autocast(device.type, getattr(torch, cfg.dtype), enabled=cfg.dtype != "float32")
    batches.workers = 0
    times = []
    begin = time.perf_counter()
    for batch in batches:
        start = time.perf_counter()
        with autocast:
            loss, _ = model(*batch)
        optimizer.backward(loss)
        wait(device)
        middle = time.perf_counter()
        optimizer.step()
        wait(device)
        times.append((middle - start, time.perf_counter() - middle))
        if len(times) > most or len(times) > 1 and time.perf_counter() - begin > TIMED_SECONDS:
            break
    forward_backward, step = np.mean(times[1:], 0)
    return cfg.gradient_accumulation_steps / world * forward_backward + step, len(times) - 1


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)

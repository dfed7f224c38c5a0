"""What a run will need: parameters, memory, batches, steps, hours of audio, and where the data are there, time.

    python train.py config/elise.py --dry_run=True

- The model is on the meta device, where tensors have shapes and no memory, so a laptop can plan for any GPU.
- Activations are counted, not estimated by formula: one micro-batch runs forward, and the tensors that autograd keeps
  are added up.
- If the token folder does not exist yet, utterances of ten seconds take its place.
- If it does and the model fits into memory, a few steps are taken and timed.

Letters in shapes: B batch, S rows, C columns.
"""

import os
import time
from collections import Counter, defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

USUAL_SECONDS = 10.0  # of an utterance, where no data exist
USUAL_TEXT = 40  # its text ids
MOST_TIMED = 20  # micro-batches
TIMED_SECONDS = 10.0  # after so long no further one is timed


def supposed_batch(cfg, codec, model):
    """A micro-batch of usual utterances, as full as max_tokens and max_batch allow: its tensors, seconds of audio.
    codec: what meta.json says of the codec."""
    frames = round(USUAL_SECONDS * codec["frame_rate"])
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


def fullest_batch(batches, codec):
    """The micro-batch with most rows of the first epoch, and the mean seconds of audio in one."""
    plan, prompts = batches.plan(0)
    lengths = batches._lengths(prompts)
    fullest = max(plan, key=lambda b: len(b) * lengths[b].max())
    frames = sum(int(batches.files.index[b, 3].sum()) for b in plan)
    batch = batches.read(fullest, prompts[fullest])
    return batch, frames / codec["frame_rate"] / len(plan)


class FlashAttention(TorchFunctionMode):
    """Attention as every device has it but meta, which would keep its weights (B, H, S, S)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v, *_ = args
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


def kept_by_autograd(model, batch):
    """Most bytes that a forward pass of a model on the meta device keeps at a time for the backward pass, parameters
    not counted."""
    # of each storage, how many saved tensors lie in it; the model's own have one user more, which stays
    users = Counter({p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]})
    total = most = 0

    class Saved:
        def __init__(self, x):
            nonlocal total, most
            self.x, self.storage = x, x.untyped_storage()  # held, so that no other storage gets its address
            users[self.storage._cdata] += 1
            if users[self.storage._cdata] == 1:
                total += self.storage.nbytes()
                most = max(most, total)

        def __del__(self):
            nonlocal total
            users[self.storage._cdata] -= 1
            if not users[self.storage._cdata]:
                total -= self.storage.nbytes()

    with FlashAttention(), torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.x):
        model(*[x.to("meta") if x.is_floating_point() else x for x in batch])
    stacks = [stack for stack in model.stacks() if stack.recompute]
    if not stacks:
        return most
    for c in stacks:  # with gradient checkpointing a block's own share comes back while its turn lasts
        c.recompute = False
    return most + (kept_by_autograd(model, batch) - most) / min(c.n_layer for c in stacks)


def gigabytes(n):
    return f"{n / 2**30:.2f}"


def weigh(model, cfg, dtype, world):
    """{part of the model: [parameters, trained ones, bytes of weights, gradients, optimizer]}, and the bytes of the
    largest gradient that is alone in memory (step_in_backward)."""
    parts = defaultdict(lambda: np.zeros(5))
    largest = 0
    tables = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    for name, p in model.named_parameters():
        n, trained = p.numel(), p.numel() * p.requires_grad
        gradient = 0 if cfg.sparse_embeddings and name in tables else 4 * trained * (1 + (world > 1))
        if cfg.step_in_backward:
            largest, gradient = max(largest, gradient), 0
        muon = cfg.muon and ".layers." in name and p.ndim == 2
        copies = p.element_size() + 2 * (dtype != torch.float32 and p.ndim >= 2) + 4 * (cfg.ema > 0)
        parts[name.split(".")[0]] += n, trained, n * copies, gradient, trained * (8 - 4 * muon)
    if cfg.step_in_backward:  # gradients that are formed in chunks are complete at the same moment
        together = [p.numel() for p in model.chunked_parameters() if p.requires_grad]
        largest = max(largest, 4 * sum(together))
    return parts, largest


def report(cfg, model, codec, vocabulary, batches=None):
    """Print what the run of `cfg` will need. model: on the meta device; codec: what meta.json says of the codec;
    batches: those of the training split, or None. Returns the bytes of memory of each GPU."""
    dtype = getattr(torch, cfg.dtype)
    parts, largest = weigh(model, cfg, dtype, int(os.environ.get("WORLD_SIZE", 1)))
    print(f"{'':22}{'parameters':>14}{'trained':>14}{'weights':>10}{'gradients':>11}{'optimizer':>11}   (GB)")
    for name, row in [*parts.items(), ("in all", sum(parts.values()))]:
        print(f"  {name:20}{int(row[0]):14,}{int(row[1]):14,}{gigabytes(row[2]):>10}{gigabytes(row[3]):>11}"
              f"{gigabytes(row[4]):>11}")  # fmt: skip

    per_step, epochs = cfg.gradient_accumulation_steps, ""
    if batches:
        batch, seconds = fullest_batch(batches, codec)
        utterances, count = len(batches.files), len(batches.plan(0)[0])
        steps = count / per_step
        print(f"{cfg.data_dir}: {utterances:,} utterances, {seconds * count / 3600:.2f} hours of audio, an epoch of "
              f"{count:,} micro-batches is {steps:,.1f} steps")  # fmt: skip
        epochs = f", {cfg.max_iters / steps:,.1f} epochs"
    else:
        batch, seconds = supposed_batch(cfg, codec, model)
        print(f"{cfg.data_dir} does not exist yet: supposing utterances of {USUAL_SECONDS:g} s and {USUAL_TEXT} text "
              f"ids, a vocabulary of {vocabulary:,}")  # fmt: skip
    count, rows = batch[1].shape
    print(f"a micro-batch: {count} utterances of up to {rows} rows, {seconds:.1f} s of audio; a step: {per_step} such")
    if cfg.epochs and not batches:
        print(f"{cfg.epochs:g} epochs: how many steps and hours of audio these are, the data will tell")
    else:
        hours = cfg.max_iters * per_step * seconds / 3600
        print(f"{cfg.max_iters:,} steps hear {hours:,.1f} hours of audio{epochs}")

    activations = kept_by_autograd(model.to(dtype), [x.to(dtype) if x.is_floating_point() else x for x in batch])
    total = sum(parts.values())[2:].sum() + largest + activations
    print(f"memory of each GPU: {gigabytes(activations)} GB of activations and what is listed above, about "
          f"{gigabytes(total)} GB in all")  # fmt: skip
    return total


def free_memory(device):
    """Bytes that are free on a device, infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return float("inf")


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

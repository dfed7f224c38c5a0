"""What a run will take, before it runs: parameters, memory, batches, steps, hours of audio.

    python train.py config/elise.py --dry_run=True

- The model is built on the meta device, where tensors have shapes and no memory, so a laptop can plan for any GPU.
- Activations are counted, not estimated by formula: one micro-batch runs forward there, and what autograd keeps of it
  at any one time is added up.
- Where the token folder is not there yet, a codec's published numbers and utterances of ten seconds stand in for it.

Letters in shapes: B batch, S rows, C columns.
"""

import math
import os
from collections import Counter, defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from codec import PUBLISHED, load_codec
from data import Batches, TokenFiles
from model import Transformer, build

USUAL_SECONDS, USUAL_TEXT = 10.0, 40  # of an utterance, and its text ids, where there are no data to look at


def supposed_meta(recipe):
    """The meta.json that a recipe's prepare.py keys would lead to, as far as a model's sizes need it."""
    if recipe.codec in PUBLISHED:
        codec = dict(PUBLISHED[recipe.codec])
    else:
        made = load_codec(recipe.codec, **recipe.codec_args)
        codec = {key: getattr(made, key) for key in ("sample_rate", "frame_rate", "n_codebooks", "codebook_size")}
        if recipe.references:
            rows = made.reference(torch.zeros(1, made.samples_per_frame))[0]
            codec["reference"] = {"rows_per_frame": len(rows), "silence": rows[0].tolist()}
    codec |= {key: value for key, value in recipe.codec_args.items() if key in codec}
    return {"codec": codec, "tokenizer": {"vocab_size": recipe.vocab_size, "bos_id": 1, "eos_id": 2}}


def supposed_batch(cfg, meta, model):
    """A micro-batch of usual utterances, as full as max_tokens and max_batch allow: its tensors, seconds of audio."""
    codec = meta["codec"]
    frames = round(USUAL_SECONDS * codec["frame_rate"])
    rows = int(model.length(USUAL_TEXT, frames))
    if rows > min(model.max_rows, cfg.max_tokens):
        frames = max(1, frames * min(model.max_rows, cfg.max_tokens) // rows - USUAL_TEXT)
    count = max(1, min(cfg.max_batch, cfg.max_tokens // int(model.length(USUAL_TEXT, frames))))
    codes = np.arange(frames)[:, None].repeat(codec["n_codebooks"], 1) % 2  # no frame like the one before it
    tokens, segment = model.layout(np.ones(USUAL_TEXT, np.int64), codes)
    batch = [torch.from_numpy(a)[None].repeat(count, *[1] * a.ndim) for a in (tokens, segment)]
    if model.reference:
        reference = codec["reference"]
        longest = round(cfg.reference_seconds[1] * codec["frame_rate"]) * reference["rows_per_frame"]
        batch.append(torch.zeros(count, longest, len(reference["silence"])))
    return batch, count * frames / codec["frame_rate"]


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
    stacks = [m.config for m in model.modules() if isinstance(m, Transformer) and m.config.recompute]
    if not stacks:
        return most
    for c in stacks:  # with gradient checkpointing a block's own share comes back while its turn lasts
        c.recompute = False
    return most + (kept_by_autograd(model, batch) - most) / min(c.n_layer for c in stacks)


def gigabytes(n):
    return f"{n / 2**30:.2f}"


def dry_run(cfg, recipe, prepare_model, dtype):
    """Print what the run of `cfg` will take. recipe: prepare.py's keys; prepare_model(model, utterances): freezes
    and the like.

    Raises ValueError as the run itself would for keys that cannot be.
    """
    there = os.path.exists(os.path.join(cfg.data_dir, "meta.json"))
    files = TokenFiles(cfg.data_dir, "train") if there else None
    meta = files.meta if files else supposed_meta(recipe)
    rate, world = meta["codec"]["frame_rate"], int(os.environ.get("WORLD_SIZE", 1))
    with torch.device("meta"):
        model = build(cfg.arch, meta, vars(cfg)).train()
        prepare_model(model, len(files) if files else math.inf)

    # parameters, and what comes with them
    parts = defaultdict(lambda: np.zeros(5))  # parameters, trained; bytes of weights, gradients, optimizer
    largest = 0  # of the gradients that do not wait for each other: one is there at a time
    tables = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    for name, p in model.named_parameters():
        n, trained = p.numel(), p.numel() * p.requires_grad
        gradient = 0 if cfg.sparse_embeddings and name in tables else 4 * trained * (1 + (world > 1))
        if cfg.step_in_backward:
            largest, gradient = max(largest, gradient), 0
        muon = cfg.muon and ".layers." in name and p.ndim == 2
        copies = p.element_size() + 2 * (dtype != torch.float32 and p.ndim >= 2) + 4 * (cfg.ema > 0)
        parts[name.split(".")[0]] += n, trained, n * copies, gradient, trained * (8 - 4 * muon)
    if cfg.step_in_backward and getattr(model.config, "decoder_chunk", 0):  # what is formed in chunks comes all at once
        largest = max(largest, 4 * sum(p.numel() for p in model.depth_parameters() if p.requires_grad))
    print(f"{'':22}{'parameters':>14}{'trained':>14}{'weights':>10}{'gradients':>11}{'optimizer':>11}   (GB)")
    for name, row in [*parts.items(), ("in all", sum(parts.values()))]:
        print(f"  {name:20}{int(row[0]):14,}{int(row[1]):14,}{gigabytes(row[2]):>10}{gigabytes(row[3]):>11}"
              f"{gigabytes(row[4]):>11}")  # fmt: skip

    # batches
    per_step = cfg.gradient_accumulation_steps
    if files:
        stretch = [max(1, round(x * rate)) for x in cfg.reference_seconds] if model.reference else None
        batches = Batches(files, model.layout, model.length, cfg.max_tokens, cfg.max_batch, cfg.seed,
                          voice_prompt=cfg.voice_prompt, max_rows=model.max_rows, reference=stretch)  # fmt: skip
        plan, prompts = batches.plan(0)
        fullest = max(plan, key=lambda b: len(b) * batches._lengths(prompts)[b].max())
        batch = batches.read(fullest, None if prompts is None else prompts[fullest])
        hours = files.index[:, 3].sum() / rate / 3600
        steps = len(plan) / per_step
        print(f"{cfg.data_dir}: {len(files):,} utterances, {hours:.2f} hours of audio, an epoch of {len(plan):,} "
              f"micro-batches is {steps:,.1f} steps")  # fmt: skip
        seconds = 3600 * hours / len(plan)
    else:
        batch, seconds = supposed_batch(cfg, meta, model)
        print(f"{cfg.data_dir} is not there yet: supposing utterances of {USUAL_SECONDS:g} s and {USUAL_TEXT} text "
              f"ids, a vocabulary of {meta['tokenizer']['vocab_size']:,}")  # fmt: skip
    count, rows = batch[1].shape
    print(f"a micro-batch: {count} utterances of up to {rows} rows, {seconds:.1f} s of audio; a step: {per_step} such")
    print(f"{cfg.max_iters:,} steps hear {cfg.max_iters * per_step * seconds / 3600:,.1f} hours of audio"
          + (f", {cfg.max_iters / steps:,.1f} epochs" if files else ""))  # fmt: skip

    # memory
    activations = kept_by_autograd(model.to(dtype), [x.to(dtype) if x.is_floating_point() else x for x in batch])
    total = sum(parts.values())[2:].sum() + largest + activations
    print(f"memory of each GPU: {gigabytes(activations)} GB of activations and what is listed above, about "
          f"{gigabytes(total)} GB in all")  # fmt: skip

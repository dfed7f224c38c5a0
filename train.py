"""Training: token files in, a checkpoint that speaks out, the loop in plain sight.

    python train.py config/digits.py --learning_rate=1e-3
    torchrun --nproc_per_node=4 train.py config/digits.py
    python train.py config/digits.py --init_from=resume

- Before the first step the contract between training and generation is checked and printed.
- A killed run goes on exactly from last.pt: all randomness is a function of the seed and the number of the micro-batch,
  so weights, optimizer and position in the data are all there is to store. metrics.jsonl then reads as one run.
  Where last.pt is damaged or gone, the newest ckpt_{iter}.pt takes its place.
- Ranks share one global list of micro-batches, so any number of them computes what one process would.
- A step with a non-finite loss or gradient leaves weights and optimizer as they were; too many in a row end the run.
- At each evaluation held-out texts are spoken into out_dir/samples and the curves drawn into out_dir/loss.html.
- The loop waits for the device only to log; until then, sums of what is logged stay there.

Exit codes: 0 at max_iters; 1 refused or failed, one line says why; 143 after SIGTERM and 130 after Ctrl-C, which let
the step (and an evaluation that is due) finish and write last.pt; torchrun itself then says 1. last.pt is always whole.

Letters in shapes: B batch, S rows, C columns, K codebooks.
"""

import contextlib
import copy
import ctypes
import glob
import itertools
import json
import math
import mmap
import os
import re
import signal
import sys
import textwrap
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from codec import UNKNOWN, load_codec, write_audio
from data import Batches, TokenFiles, fingerprint, speaker_reference, speaker_timbres
from model import ARCHS, PAD, build, contract_check, contradiction
from parts import budget, configurator, lora
from parts.files import locked, need, whole
from parts.metrics import (
    add,
    append_metrics,
    collect,
    draw,
    means,
    other_loggers,
    overfitting,
    read_metrics,
    summary,
    timing,
    write_metrics,
)
from parts.optim import Muon
from parts.tensors import UNBUILT, fault, pick_device, reason
from parts.text import wording
from sample import Voice, slow_type
from weights import WHOLE, is_published, load_checkpoint, load_weights, save_checkpoint, start

# from where to where
data_dir = "data/digits/tokens"  # token folder, written by prepare.py
out_dir = "out/digits"  # for checkpoints, metrics.jsonl, loss.html, samples/
init_from = "scratch"  # scratch; resume: from out_dir/last.pt; or a checkpoint or published weights to start from
dry_run = False  # only say what the run would take: parameters, memory, batches, hours of audio
overwrite = False  # start over in an out_dir that holds a run, which is removed
# model; further keys of each family are the fields of its config in model.py that are `fixed` or `free`
arch: Literal["csm", "kani", "xtts", "valle"] = "csm"  # how the codebooks of a frame are predicted
backbone: str | dict = "llama-1M"  # a preset of model.py or a dict of sizes
decoder: str | dict = "llama-300K"  # csm: the depth decoder, likewise
# regular expressions: parameters so named stay as they are; None: as the family advises where few utterances continue
# trained weights (XTTS: under 3,000), else nothing
freeze: "list[str] | None" = None
# LoRA: only a small addition is trained, see parts/lora.py; checkpoints then hold it alone, and say what it is added to
lora_rank: "int >= 0" = 0  # of the addition to each layer; 0: none, the weights themselves are trained
lora_alpha: "float > 0" = 32.0  # it counts alpha / rank
lora_rs = False  # or alpha / sqrt(rank), under which large ranks learn as fast as small ones
lora_dropout: "0 <= float < 1" = 0.0  # share of a layer's input that it does not see
lora_targets: "list[str]" = [r"\.layers\."]  # regular expressions; linear layers in whose name one is found get one
lora_base_dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights that stay: bfloat16 halves them
# batches
max_tokens: "int >= 1" = 8192  # most rows of a micro-batch, padding included
max_batch: "int >= 1" = 64  # most utterances of a micro-batch
gradient_accumulation_steps: "1 <= int <= 1000000" = 1  # micro-batches of a step, over all ranks together
voice_prompt: "0 <= float <= 1" = 0.0  # share of the utterances that follow another one of their speaker (for cloning)
reference_seconds: "0 < list[float] <= 3600" = [3.0, 6.0]  # xtts: stretch of a recording off which a voice is read
loader_workers: "0 <= int <= 256" = 0  # processes that read batches; 0: they are read between steps
# optimizer
max_iters: "int >= 1" = 2000  # steps in all
learning_rate: "float >= 0" = 1e-3  # at its highest
muon = False  # Muon instead of AdamW for the matrices inside the transformers: it learns faster from scratch
weight_decay: "float >= 0" = 0.1  # on matrices only
beta1: "0 <= float < 1" = 0.9  # AdamW: of the mean of the gradient
beta2: "0 <= float < 1" = 0.95  # and of its square
grad_clip: "float >= 0" = 1.0  # largest norm of the gradient; 0: no limit
step_in_backward = False  # each weight moves once its gradient is there, which is then freed; with grad_clip=0
sparse_embeddings = False  # only rows that a step looks up move (SparseAdam): lighter where a vocabulary is large
ema: "0 <= float < 1" = 0.0  # decay of averaged weights, which then are evaluated and speak; 0: none
max_skipped: "int >= 1" = 20  # non-finite steps in a row that end the run (float16 starts with a few)
# learning rate
lr_schedule: Literal["multistep", "cosine", "linear", "constant"] = "cosine"  # after the warm-up
warmup_iters: "int >= 0" = 100  # steps of linear warm-up before any of them
lr_decay_iters: "int >= 0" = 0  # where cosine and linear reach min_lr; 0: at max_iters
min_lr: "float >= 0" = 0.0  # what they end at
milestones: "list[int] >= 1" = []  # multistep: steps from which on the rate is gamma times lower
gamma: "float >= 0" = 0.5  # multistep: by how much
# looking at it
log_interval: "int >= 1" = 10  # steps between lines of metrics.jsonl
eval_interval: "int >= 1" = 250  # steps between evaluations, which write last.pt, and best.pt if it is the best
eval_iters: "int >= 0" = 0  # most batches of an evaluation, spread over all lengths; 0: the whole val split
eval_samples: "int >= 0" = 2  # held-out texts to speak at each evaluation
temperature: "float >= 0" = 0.9  # how they are spoken; 0: always the likeliest code
top_k: "int >= 0" = 50  # draw among so many of the likeliest codes; 0: all
top_p: "0 < float <= 1" = 1.0  # draw among the likeliest codes that make up this share of the probability
repetition_penalty: "float > 0" = 1.0  # kani, xtts: makes codes spoken before less likely; 1: does not
keep_last: "int >= 0" = 0  # keep the checkpoints of so many evaluations as ckpt_{iter}.pt
overfit_warning: "int >= 0" = 3  # evaluations above the best, as the training loss falls, before a warning; 0: none
wandb_project = ""  # log to Weights & Biases as well
tensorboard = False  # log to TensorBoard as well, in out_dir
# the machine
device = "auto"  # cpu, cuda, cuda:1, mps, ...; auto: a GPU if there is one
dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the arithmetic; float16: with loss scaling
compile = False  # torch.compile
backend = ""  # of torch.distributed; empty: nccl on GPUs, gloo on CPUs
seed: "0 <= int <= 4294967295" = 1337  # of the initial weights, the order of the data, dropout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DRAWS = ("temperature", "top_k", "top_p", "repetition_penalty")
ADAPTER = ("lora_rank", "lora_alpha", "lora_rs", "lora_dropout", "lora_targets")  # may not change in an adapter's life
MEANING = ("decoder_loss_weight", "text_loss_weight", "length_loss_weight", "level_weights", "random_level", "loss_on")
MEANING += ("drop_repeats", "mask_ratio", "hide_text_stop", "chunk_seconds")  # they decide what the held-out loss means
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
CHECKPOINTS = ("last.pt", "ckpt_*.pt", "best.pt")
PARTIAL = ("*.partial", "samples/*.partial")  # what a kill leaves
RUN_FILES = (*CHECKPOINTS, *PARTIAL, "metrics.jsonl", "samples/*.wav")
FEWEST_TARGETS = 0.2  # share of the frames under which a model does not learn to speak


def check(cfg, world, device):
    """Refuse what cannot be or cannot be meant: ValueError with one line."""
    stretch = cfg.reference_seconds
    if len(stretch) != 2 or stretch[0] > stretch[1]:
        raise ValueError(f"reference_seconds = {stretch!r:.60}: it is the shortest and the longest, as [3.0, 6.0]")
    if cfg.dtype == "float16" and device.type != "cuda" and not cfg.dry_run:
        raise ValueError(f"dtype = 'float16' needs a GPU, not {device.type}: take bfloat16 or float32")
    steps, first = cfg.milestones, max(1, cfg.warmup_iters)
    if cfg.lr_schedule == "multistep":
        if not steps or sorted({*steps, first})[-len(steps) :] != steps:
            raise ValueError(f"milestones = {steps!r:.60}: multistep needs ascending steps from {first} on, as "
                             "[1000, 2000]")  # fmt: skip
    elif cfg.lr_schedule != "constant":
        if 0 < cfg.lr_decay_iters < cfg.warmup_iters:
            raise ValueError(f"lr_decay_iters = {cfg.lr_decay_iters} comes before warmup_iters = {cfg.warmup_iters}")
        if cfg.min_lr > cfg.learning_rate:
            raise ValueError(f"min_lr = {cfg.min_lr} is above learning_rate = {cfg.learning_rate}")
    if cfg.sparse_embeddings and world > 1 and (cfg.backend or device.type) not in ("gloo", "cpu"):
        raise ValueError("sparse_embeddings: nccl cannot add up sparse gradients, take one process or backend=gloo")
    waits = {"grad_clip": cfg.grad_clip, "gradient_accumulation_steps": cfg.gradient_accumulation_steps > 1,
             "dtype": cfg.dtype == "float16"}  # fmt: skip
    for key in waits:
        if cfg.step_in_backward and waits[key]:
            raise ValueError(f"step_in_backward and {key} = {getattr(cfg, key)!r}: no gradient waits for others, take "
                             "grad_clip=0, gradient_accumulation_steps=1 on one process, not float16")  # fmt: skip
    if cfg.gradient_accumulation_steps % world:
        raise ValueError(f"gradient_accumulation_steps = {cfg.gradient_accumulation_steps} counts the micro-batches of "
                         f"all ranks together: it must be a multiple of their number, {world}")  # fmt: skip


def get_lr(step, cfg):
    """The learning rate of step 0, 1, ...: linear warm-up, then as lr_schedule says."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if cfg.lr_schedule == "constant":
        return cfg.learning_rate
    if cfg.lr_schedule == "multistep":
        return cfg.learning_rate * cfg.gamma ** sum(step >= m for m in cfg.milestones)
    end = cfg.lr_decay_iters or cfg.max_iters
    done = min(1.0, (step - cfg.warmup_iters) / max(1, end - cfg.warmup_iters))
    left = 0.5 * (1 + math.cos(math.pi * done)) if cfg.lr_schedule == "cosine" else 1 - done
    return cfg.min_lr + left * (cfg.learning_rate - cfg.min_lr)


def family_keys(*kinds):
    """Names of the keys that are fields of the families' configs: "fixed" by weights, "free", or all."""
    every = {f.name: f.metadata.get("key") for _, config in ARCHS.values() for f in fields(config)}
    return {name for name, kind in every.items() if kind in (kinds or ("fixed", "free"))}


def idle_keys(cfg):
    """{key: why} of the keys that have no effect in this run. `arch` and `mode` are those of the model."""
    own = {f.name: f for f in fields(ARCHS[cfg.arch][1])}
    idle = dict.fromkeys({"decoder", *family_keys()} - own.keys(), f"arch = {cfg.arch!r} has no such key")
    for name, f in own.items():
        if f.metadata.get("mode") not in (None, getattr(cfg, "mode", None)):
            idle[name] = f"mode = {cfg.mode!r} does not use it"
    if not ARCHS[cfg.arch][0].reference:
        idle["reference_seconds"] = f"arch = {cfg.arch!r} reads no voice off a recording"
    if not cfg.lora_rank:
        idle |= {key: "lora_rank = 0" for key in vars(cfg) if key.startswith("lora_") and key != "lora_rank"}
    if cfg.lr_schedule != "multistep":
        idle |= dict.fromkeys(("milestones", "gamma"), f"lr_schedule = {cfg.lr_schedule!r}, not 'multistep'")
    elif cfg.milestones[0] >= cfg.max_iters:
        idle |= dict.fromkeys(("milestones", "gamma"), f"max_iters = {cfg.max_iters} comes first")
    if cfg.lr_schedule in ("multistep", "constant"):
        idle |= dict.fromkeys(("min_lr", "lr_decay_iters"), f"lr_schedule = {cfg.lr_schedule!r} has no use for it")
    return idle


def left_in(out_dir, patterns):
    """Paths of the files in out_dir that one of the patterns matches."""
    return [path for p in patterns for path in sorted(glob.glob(os.path.join(glob.escape(out_dir), p)))]


def kept_checkpoints(out_dir):
    """Paths of ckpt_{iter}.pt in out_dir, the oldest first."""
    numbered = [(re.search(r"ckpt_(\d+)\.pt$", path), path) for path in left_in(out_dir, ["ckpt_*.pt"])]
    return [path for _, path in sorted((int(found[1]), path) for found, path in numbered if found)]


@contextlib.contextmanager
def alone_in(out_dir):
    """Hold out_dir for one run; it is not left behind if it is made here and stays empty. ValueError: another run is
    there."""
    there = os.path.exists(out_dir)
    with locked(out_dir):
        try:
            yield
        finally:
            if not there:
                with suppress(OSError):  # it is not empty
                    os.rmdir(out_dir)


def check_out_dir(cfg, source):
    """Refuse, by ValueError, to start over the run that out_dir holds, or over the checkpoint that the run is from."""
    for path in left_in(cfg.out_dir, CHECKPOINTS) if os.path.exists(source) else ():
        if os.path.samefile(path, source):
            raise ValueError(f"{source!r:.150} is of the run in out_dir = {cfg.out_dir!r:.100}: another out_dir starts "
                             "from it; init_from=resume goes on with last.pt, or without one with the newest ckpt_*.pt")
    if not cfg.overwrite and left_in(cfg.out_dir, CHECKPOINTS[:2]):  # a best.pt alone is no run that could go on
        raise ValueError(f"{cfg.out_dir} holds a run: init_from=resume goes on with it, overwrite=True removes it, or "
                         "take another out_dir")  # fmt: skip


def clear(cfg, say):
    """Make out_dir ready for the run: one that starts removes what an older one left, but for a best.pt that nothing
    can go on with; one that goes on removes what a kill left half written."""
    best = os.path.join(cfg.out_dir, "best.pt")
    if cfg.init_from != "resume" and not cfg.overwrite and os.path.exists(best):
        free = (os.path.join(cfg.out_dir, f"best_{n}.pt") for n in itertools.count(1))
        kept = next(path for path in free if not os.path.exists(path))
        os.replace(best, kept)
        say(f"{best} has no last.pt beside it to go on with: the run starts over, and it is kept as {kept}")
    for path in left_in(cfg.out_dir, PARTIAL if cfg.init_from == "resume" else RUN_FILES):
        os.remove(path)


def resumable(out_dir, say):
    """What the run in out_dir can go on from, and its path: last.pt, or if that is damaged or gone the newest ckpt.

    Raises FileNotFoundError where nothing is there, ValueError where all is damaged."""
    last, fault = os.path.join(out_dir, "last.pt"), None
    for path in [last] * os.path.exists(last) + kept_checkpoints(out_dir)[::-1]:
        try:
            checkpoint = load_checkpoint(path, needed=WHOLE)
            if not checkpoint["train"]:
                raise ValueError(f"{path} holds weights only, as best.pt does: start from these with init_from, "
                                 "elsewhere")  # fmt: skip
        except ValueError as error:
            fault = fault or error
            continue
        if path != last:
            say(f"{fault or f'{last} does not exist'}: {path} takes its place")
        return checkpoint, path
    raise fault or FileNotFoundError(f"{last} does not exist: init_from is scratch, resume or a checkpoint's path")


def forgotten(cfg, checkpoint, model, data):
    """Why the best loss of the run does not count for what goes on: a line for each reason. data: the data's hash."""
    old, before, now = checkpoint["config"], checkpoint["model_config"], asdict(model.config)
    lines = []
    if checkpoint["train"].get("data", data) != data:  # those of older code have none
        lines.append(f"{cfg.data_dir} has other utterances than before, which are read from the first epoch on")
    keys = [key for key in MEANING if before.get(key, now.get(key)) != now.get(key)]
    measured = ("eval_iters", "reference_seconds") if model.reference else ("eval_iters",)
    keys += [key for key in measured if old.get(key, getattr(cfg, key)) != getattr(cfg, key)]
    if keys:
        lines.append(f"{', '.join(keys)} changed, and with it what the held-out loss means")
    return lines


def what_changed(cfg, old, iter_num):
    """The keys that a resumed run has otherwise, and how its learning rate jumps by that, as the end of a sentence."""
    changed = [f"{k} {old.get(k)!r} -> {v!r}" for k, v in vars(cfg).items() if k != "init_from" and old.get(k) != v]
    before, now = get_lr(iter_num, SimpleNamespace(**{**vars(cfg), **old})), get_lr(iter_num, cfg)
    if iter_num < cfg.max_iters and not math.isclose(before, now, rel_tol=0.01):
        changed.append(f"so that the learning rate goes on at {now:.2g} instead of {before:.2g}")
    return f", changed: {', '.join(changed)}" if changed else ""


def starting_point(cfg, codec, meta, say=print):
    """The model init_from asks for, on the CPU, and the checkpoint of ours it is from, or None.

    What trained weights fix and the user did not give, cfg has from them afterwards. Raises FileNotFoundError, and
    ValueError where the weights are not of this codec, tokenizer or kind of model, or where a given key contradicts
    them.
    """
    torch.manual_seed(cfg.seed)
    if cfg.init_from == "scratch":
        return build(cfg.arch, meta, vars(cfg)), None
    resume = cfg.init_from == "resume"
    path = os.path.join(cfg.out_dir, "last.pt") if resume else cfg.init_from
    if not resume and not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist: init_from is scratch, resume or a checkpoint's path")
    given = {key: getattr(cfg, key) for key in cfg.given if getattr(cfg, key) is not None}
    model, checkpoint = trained_weights(path, resume, cfg, given, codec, meta, say)
    config = model.config
    if key := contradiction(config, given):
        fixed = getattr(config, key)
        fixed = vars(fixed) if is_dataclass(fixed) else fixed
        raise ValueError(f"{cfg.given[key]}: {key} = {configurator.show(given[key])}, but {path:.100} was trained with "
                         f"{fixed!r:.120}: leave it out, or start from scratch")  # fmt: skip
    for key in vars(cfg).keys() & {f.name for f in fields(config)}:
        sizes = getattr(config, key)
        if not is_dataclass(sizes):
            setattr(cfg, key, sizes)
        elif contradiction(config, {key: getattr(cfg, key)}):
            setattr(cfg, key, asdict(sizes))
    return model, checkpoint


def trained_weights(path, resume, cfg, given, codec, meta, say):
    """The model of a checkpoint or of published weights, with those of the given keys that may change from run to run,
    and the checkpoint if it is ours, else None. given: {key: value}. Raises as starting_point does."""
    free = {key: value for key, value in given.items() if key in family_keys("free")}
    if not resume and is_published(path):
        return start(path, cfg.arch, meta, free, say), None
    checkpoint, path = resumable(cfg.out_dir, say) if resume else (load_checkpoint(path, needed=WHOLE), path)
    if checkpoint["codec_fingerprint"] != codec.fingerprint():
        raise ValueError(f"{path} and {cfg.data_dir} are of two codecs: prepare the data with the checkpoint's")
    if checkpoint["meta"]["tokenizer"]["sha256"] != meta["tokenizer"]["sha256"]:
        raise ValueError(f"{path} and {cfg.data_dir} are of two tokenizers: prepare the data with the checkpoint's")
    same = ("arch", "muon", "sparse_embeddings", *ADAPTER) if resume else ("arch",)
    if checkpoint.get("base") and given.get("lora_rank"):  # it goes on as an adapter
        same = ("arch", *ADAPTER)
    for key in same:
        old = {**checkpoint["config"], "arch": checkpoint["arch"]}.get(key, getattr(cfg, key))
        if given.get(key, old) != old:
            raise ValueError(f"{cfg.given[key]}: {key} = {configurator.show(given[key])}, but {path:.100} was trained "
                             f"with {old!r:.100}: leave it out, or start from scratch")  # fmt: skip
        setattr(cfg, key, old)
    config = {key: checkpoint["model_config"][key] for key in family_keys() & checkpoint["model_config"].keys()}
    checkpoint["config"] |= config  # what older versions recorded there was what was asked for
    state = checkpoint["model"] if resume else checkpoint["ema"] or checkpoint["model"]
    if checkpoint.get("base"):  # an adapter: what it is added to, then itself
        habits = {**{key: config[key] for key in family_keys("free") & config.keys()}, **free}
        model, _ = trained_weights(checkpoint["base"], False, cfg, habits, codec, meta, say)
        lora.load_adapter(model, state)
    else:
        try:
            model = build(cfg.arch, meta, {**checkpoint["model_config"], **free})
        except UNBUILT as error:
            raise ValueError(f"{path}: no model has the config in it: {reason(error)}") from None
        load_weights(model, state, path)
    return model, checkpoint


def freeze_parameters(model, patterns):
    """Freeze what the regular expressions find. Raises ValueError for one that finds none, or if all are frozen."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        try:
            found = [name for name in names if re.search(pattern, name)]
        except (re.error, TypeError) as e:
            raise ValueError(f"freeze: {pattern!r} is not a regular expression ({e})") from None
        if not found:
            raise ValueError(f"freeze: {pattern!r} finds no parameter; some are {', '.join(names[:: len(names) // 4])}")
        for name in found:
            model.get_parameter(name).requires_grad = False
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("freeze leaves nothing to train")


def prepare_weights(model, utterances, cfg, checkpoint=None, say=print):
    """Decide what is trained: freeze what the config says, or the family advises where so many utterances continue
    trained weights, which a resumed run keeps to; and give the model an adapter where the config wants one."""
    if not cfg.lora_rank:
        if lora.adapters(model):
            lora.merge(model)
            model.requires_grad_(True)
        if checkpoint and cfg.init_from == "resume":
            cfg.freeze = checkpoint["config"]["freeze"] if cfg.freeze is None else cfg.freeze
        elif cfg.freeze is None and cfg.init_from != "scratch" and hasattr(model, "small_set_freeze"):
            cfg.freeze = model.small_set_freeze(utterances)
            if cfg.freeze:
                say(f"{utterances:,} utterances are few to go on with: freeze={cfg.freeze!r}; --freeze=[] trains all")
        cfg.freeze = cfg.freeze or []
        return freeze_parameters(model, cfg.freeze)
    if cfg.freeze:
        raise ValueError("freeze and lora_rank: with LoRA all weights stay as they are, name layers by lora_targets")
    if not lora.adapters(model):
        how = dict(rank=cfg.lora_rank, alpha=cfg.lora_alpha, rs=cfg.lora_rs, dropout=cfg.lora_dropout)
        lora.add_lora(model, **how, targets=cfg.lora_targets)
    lora.cast_base(model, DTYPES[cfg.lora_base_dtype])


def make_optimizers(model, cfg):
    """Optimizers that share out what is trained: AdamW, and where the config says so Muon and SparseAdam.

    Muon (Jordan et al. 2024) takes the matrices inside the transformers, at a rate that moves them as far as AdamW's.
    SparseAdam (Adam, of which only the rows of the step move) takes the embeddings, and gives them no weight decay.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rate, betas = cfg.learning_rate, (cfg.beta1, cfg.beta2)
    tables = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    inside = [name for name, p in trained.items() if ".layers." in name and ".lora_" not in name and p.ndim == 2]
    inside = [trained.pop(name) for name in inside if cfg.muon]
    sparse = [trained.pop(name) for name in tables if cfg.sparse_embeddings and name in trained]
    for table in tables.values():
        table.sparse = cfg.sparse_embeddings
    groups = [
        {"params": [p for p in trained.values() if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, rate, betas, fused=True)]
    if inside:
        optimizers.append(Muon(inside, rate, cfg.weight_decay))
    if sparse:
        optimizers.append(torch.optim.SparseAdam(sparse, rate, betas))
        for p in sparse:
            mean, square = (zeros_on_demand(p.shape).to(p.device) for _ in range(2))
            optimizers[-1].state[p] = {"step": 0, "exp_avg": mean, "exp_avg_sq": square}
    return optimizers


MEMORY = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}  # of each parameter
MEMORY["SparseAdam"] = MEMORY["AdamW"]


def load_optimizers(optimizers, states, path):
    """Give optimizers their memory of the gradients from the checkpoint `path`; rates and the like stay this run's.

    Raises ValueError, one line, where it is damaged.
    """
    for optimizer, saved in zip(optimizers, states, strict=True):
        kind, groups = type(optimizer).__name__, optimizer.state_dict()["param_groups"]
        need(saved, {"state": dict}, f"{path}, optimizer {kind},")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, memory in saved["state"].items():
            if i not in range(len(parameters)) or not isinstance(memory, dict) or memory.keys() != MEMORY[kind]:
                raise ValueError(f"{path} is damaged: it holds no memory of {kind} for parameter {i!r:.40}")
            for name, x in memory.items():
                like = torch.zeros(()) if name == "step" else parameters[i]
                if words := fault(torch.tensor(float(x)) if type(x) is int else x, like):
                    raise ValueError(f"{path} is damaged: {name} of {kind} for parameter {i} {words}")
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def zeros_on_demand(shape):
    """float32 zeros that take memory only where they are written to: on Linux, 4 KB at a time."""
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return torch.from_numpy(np.zeros(shape, np.float32))
    memory = mmap.mmap(-1, 4 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # or each row would bring 2 MB with it
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)


def hook_steps(optimizers, move):
    """Call move(optimizer, p) in the backward pass for each parameter p as soon as its gradient is whole, then free it.

    All gradients together are never there (Lv et al. 2023, LOMO): 4 bytes a weight less. An optimizer that is asked for
    a step moves what has a gradient, which then is p alone; its state is that of any other run.
    """

    def moved(optimizer, p):
        move(optimizer, p)
        p.grad = None

    for optimizer in optimizers:
        for p in [p for group in optimizer.param_groups for p in group["params"]]:
            p.register_post_accumulate_grad_hook(partial(moved, optimizer))


def glibc(name, *numbers):
    """Call a function of the GNU C library; where there is none, nothing happens."""
    with suppress(OSError, AttributeError):
        getattr(ctypes.CDLL("libc.so.6"), name)(*numbers)


def keep_memory():
    """Have glibc keep what torch frees on a CPU. By itself it hands large blocks back to the system and gets them again
    page by page, which costs a large model much of its step."""
    glibc("mallopt", -4, 0)  # M_MMAP_MAX: no block is mapped by itself, which freeing it would unmap
    glibc("mallopt", -1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def clip_gradients(parameters, most):
    """Scale the gradients down to a norm of at most `most`; 0: leave them. Returns the norm they had, a tensor."""
    sparse = [p for p in parameters if p.grad is not None and p.grad.is_sparse]
    for p in sparse:
        p.grad = p.grad.coalesce()  # rows met twice are added up
    dense = [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]
    values = dense + [p.grad.values() for p in sparse]
    norm = nn.utils.get_total_norm(values)
    if most:
        torch._foreach_mul_(values, (most / (norm + 1e-6)).clamp(max=1))
    return norm


@torch.no_grad()
def evaluate(model, val, autocast, most, rank, world, device):
    """Means of the model's stats over the val split, or over `most` batches spread evenly over its lengths."""
    plan, _ = val.plan(0)
    plan = plan[:: math.ceil(len(plan) / most)] if most else plan
    totals, training = {}, model.training
    model.eval()
    for i in range(rank, max(len(plan), world), world):
        batch = val.read(plan[i % len(plan)])
        with autocast:
            _, stats = model(*batch)
        share = i < len(plan)  # a rank without a batch joins in with weight 0, so that all add up the same names
        add(totals, {name: (value * share, count * share) for name, (value, count) in stats.items()}, device)
    model.train(training)
    return means(collect(totals, world))


def speak(voice, files, cfg, iter_num, say, missing=False):
    """Say some texts of a split into out_dir/samples, with the recordings as the codec keeps them beside.

    missing: only those that are not there yet. What cannot be said is a line: no reason to stop training."""
    meta, folder, count = voice.meta, os.path.join(cfg.out_dir, "samples"), min(cfg.eval_samples, len(files))
    for n in range(count):
        i = n * len(files) // count
        speaker = meta["speakers"][files.speaker(i)]
        before, after = wording(meta["text_format"], speaker, "\0", meta.get("language", "")).split("\0")
        text = voice.tokenizer.decode(files.text(i)).removeprefix(before).removesuffix(after)
        path, original = os.path.join(folder, f"{iter_num:06d}_{n}.wav"), os.path.join(folder, f"original_{n}.wav")
        if missing and os.path.exists(path):
            continue
        if not os.path.exists(original):
            codes = torch.from_numpy(files.codes(i).T[None]).to(voice.device)
            write_audio(original, voice.codec.decode(codes)[0].float().cpu(), voice.codec.sample_rate)
        try:
            how = {key: getattr(cfg, key) for key in (*DRAWS, "seed")}
            wav = voice.say(text, speaker=speaker, **how)
        except (ValueError, RuntimeError) as e:  # torch's own, where the logits of a diverged model are not finite
            say(f"{path}: {reason(e)}")
            continue
        write_audio(path, wav, voice.sample_rate)
        say(f"{path}: {text}{'' if voice.stopped else ' (did not stop)'}")


def train(cfg, rank, world, device, received):
    """Train as cfg says. Signals come in by the list `received`; returns the one that ended the run, or 0."""
    master, cuda = rank == 0, device.type == "cuda"

    def say(line):
        if master:
            tqdm.write(line)
            sys.stdout.flush()

    def out(name):
        return os.path.join(cfg.out_dir, name)

    # data, codec, text
    files, val_files = TokenFiles(cfg.data_dir, "train"), TokenFiles(cfg.data_dir, "val")
    meta = files.meta
    codec = load_codec(meta["codec"]["name"], cfg.data_dir)
    if meta["codec"]["fingerprint"] not in (UNKNOWN, codec.fingerprint()):
        raise ValueError(f"{cfg.data_dir}: codec.pt is not the codec its codes were made with: run prepare.py again")
    tokenizer = files.tokenizer()

    # model, optimizer, batches
    resume, data = cfg.init_from == "resume", fingerprint(cfg.data_dir)
    if not resume:
        check_out_dir(cfg, cfg.init_from)
    if cfg.lora_rank and cfg.init_from == "scratch":
        raise ValueError("lora_rank: LoRA adds to weights that have learnt something, name them by init_from")
    model, checkpoint = starting_point(cfg, codec, meta, say)
    configurator.refuse_idle(cfg, idle_keys(cfg), say)
    prepare_weights(model, len(files), cfg, checkpoint, say)
    base = checkpoint["base"] if checkpoint and checkpoint.get("base") else cfg.init_from
    if not resume:
        check_out_dir(cfg, base)
    model, codec = model.to(device), codec.to(device)
    averaged = copy.deepcopy(model).eval().requires_grad_(False) if cfg.ema else None
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = make_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16")
    autocast = torch.autocast(device.type, DTYPES[cfg.dtype], enabled=cfg.dtype != "float32")
    fit, most = (model.layout, model.length, cfg.max_tokens, cfg.max_batch), {"max_rows": model.max_rows}
    if model.reference:
        most["reference"] = [max(1, round(x * meta["codec"]["frame_rate"])) for x in cfg.reference_seconds]
    batches = Batches(files, *fit, cfg.seed, rank, world, cfg.loader_workers, cfg.voice_prompt, **most)
    val = Batches(val_files, *fit, shuffle=False, **most) if len(val_files) else None

    # where an earlier run stopped
    iter_num, best, history, window, seconds = 0, math.inf, [], {}, 0.0
    skipped, in_a_row = torch.zeros(2, device=device)  # steps that were skipped
    if resume:
        state, old, iter_num = checkpoint["train"], checkpoint["config"], checkpoint["iter"]
        load_optimizers(optimizers, state["optimizers"], checkpoint.path)
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())
        best, history, seconds = state["best"], state["history"], state["seconds"]
        if state.get("data", data) == data:
            batches.restore(state["batches"])
        skipped, in_a_row = state["skipped"].to(device)
        window = {name: pair.to(device) * master for name, pair in state["window"].items()}  # a sum over the ranks
        if averaged and cfg.lora_rank:
            lora.set_adapter(averaged, checkpoint["ema"] or checkpoint["model"])
        elif averaged:
            load_weights(averaged, checkpoint["ema"] or checkpoint["model"])
        say(f"resuming {cfg.out_dir} at iter {iter_num}{what_changed(cfg, old, iter_num)}")
        for line in forgotten(cfg, checkpoint, model, data):
            say(f"{line}: the best loss so far is forgotten, the next evaluation writes best.pt")
            best, history = math.inf, []
        if iter_num >= cfg.max_iters:
            say(f"nothing left to do: max_iters = {cfg.max_iters} is reached")
    del checkpoint

    # say what will be trained, and check that generation will agree with it
    say(textwrap.fill("  ".join(f"{k}={v!r}" for k, v in vars(cfg).items()), 120, break_on_hyphens=False))
    parts = Counter()
    for name, p in model.named_parameters():
        parts[name.split(".")[0]] += p.numel()
    say(f"{parts.total() / 1e6:.3g}M parameters, of which {sum(p.numel() for p in trained) / 1e6:.3g}M are trained: "
        + ", ".join(f"{name} {n / 1e6:.2g}M" for name, n in parts.items()))  # fmt: skip
    learnt = batches.targets()
    say(f"{len(files)} utterances, {len(batches.plan(0)[0])} micro-batches an epoch, {batches.padding():.1%} padding, "
        f"{learnt:.0%} of the frames are targets"
        + ("" if val else "; the val split is empty: no evaluation, no best.pt"))  # fmt: skip
    if learnt < FEWEST_TARGETS:
        advice = "lower reference_seconds, or raise voice_prompt" if model.reference else "take drop_repeats=False"
        raise ValueError(f"only {learnt:.0%} of the frames are targets, too few to learn to speak from: {advice}")
    held_out = val_files if val else files
    frames = held_out.index[:, 3]
    short = int((frames + 10**9 * (frames < 8)).argmin())  # the shortest that is long enough to tell the shifts apart
    text, codes = held_out.text(short), held_out.codes(short)
    side, references, timbres = {}, None, None
    if model.reference:  # what the voices sound like goes into the checkpoint
        count, size = len(meta["speakers"]), most["reference"][1]
        references = torch.from_numpy(np.stack([speaker_reference(files, i, size) for i in range(count)]))
        side = {"reference": references[held_out.speaker(short)]}
        timbres = speaker_timbres(cfg.data_dir)
    report = contract_check(model, text, codes, **side)
    shifts = ", ".join(f"{x:.2f}" for x in report["loss_at_shift"])
    say(f"contract check: generation and teacher forcing agree to {report['max_difference']:.1e}; cross-entropy "
        f"of codebook 0 at shifts 0, 1, 2: {shifts} (ln V = {report['ln_v']:.2f})")  # fmt: skip

    # files
    loggers = other_loggers(cfg.wandb_project, cfg.tensorboard, cfg.out_dir, vars(cfg)) if master else []
    if master:
        os.makedirs(out("samples"), exist_ok=True)
        clear(cfg, say)
        write_metrics(out("metrics.jsonl"), read_metrics(out("metrics.jsonl"), iter_num))  # later ones happen again
        with whole(out("config.json"), "w") as f:
            json.dump(vars(cfg), f, indent=1)

    def weights(model):
        return lora.adapter_state(model) if cfg.lora_rank else model.state_dict()

    def save(*names):
        """Write a checkpoint under each of these names; best.pt goes without what only resuming needs."""
        totals = collect(window, world)
        if not all(p.isfinite().all() for p in trained):
            raise ValueError(f"the weights at iter {iter_num} are not finite and not saved: lower learning_rate")
        state = {
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "scaler": scaler.state_dict(), "batches": batches.state(), "skipped": torch.stack([skipped, in_a_row]),
            "data": data, "best": best, "history": history, "window": totals,
            "seconds": seconds + time.perf_counter() - clock,
        }  # fmt: skip
        checkpoint = {
            "arch": cfg.arch, "model_config": asdict(model.config), "config": vars(cfg), "iter": iter_num, "meta": meta,
            "model": weights(model), "ema": weights(averaged) if averaged else None,
            "base": base if cfg.lora_rank else None,  # what the weights, then those of an adapter, are added to
            "codec": codec.pack(), "codec_fingerprint": codec.fingerprint(),
            "tokenizer": {"kind": tokenizer.kind, "model": tokenizer.model},
            "probe": {"text": torch.from_numpy(text), "codes": torch.from_numpy(codes), **side},
            "references": references if references is None else references.half(), "timbres": timbres,
        }  # fmt: skip
        for name in names if master else ():
            save_checkpoint(out(name), {**checkpoint, "train": None if name == "best.pt" else state})

    spoken = averaged or model  # the weights that are evaluated and speak
    voice = Voice(spoken, codec, tokenizer, meta, references=references, timbres=timbres)
    if resume and master and (iter_num % old["eval_interval"] == 0 or iter_num == old["max_iters"]):
        draw(read_metrics(out("metrics.jsonl")), out("loss.html"))  # a kill came between last.pt and these
        speak(voice, held_out, cfg, iter_num, say, missing=True)
    net = torch.compile(model, dynamic=True) if cfg.compile else model
    if world > 1:
        net = DistributedDataParallel(net)
    norms = []  # of gradients that are gone already

    def not_finite(norm):
        """1 where the loss of this step or the norm of gradients is not finite, else 0; the host need not know."""
        return (~(norm.isfinite() & step_loss.isfinite())).float()

    def move(optimizer, bad):
        """One step of an optimizer, or none where `bad` is 1."""
        optimizer.found_inf = bad  # of this AdamW's fused step knows, and changes nothing
        if isinstance(optimizer, torch.optim.AdamW) or not bad:
            scaler.step(optimizer)

    def move_one(optimizer, p):  # it alone stays where it is if its gradient is not finite: others have moved already
        norms.append(clip_gradients([p], 0))
        move(optimizer, not_finite(norms[-1]))

    if cfg.step_in_backward:
        hook_steps(optimizers, move_one)
    micro_steps, stream, start, told = cfg.gradient_accumulation_steps // world, iter(batches), iter_num, 0.0
    watched = master and sys.stderr.isatty()
    bar = tqdm(total=cfg.max_iters, initial=iter_num, disable=not watched, dynamic_ncols=True, unit="step")
    clock = time.perf_counter()

    while True:
        # log, evaluate, save, speak
        evaluating = iter_num % cfg.eval_interval == 0 or iter_num == cfg.max_iters
        logging = iter_num % cfg.log_interval == 0 or evaluating
        if logging and iter_num > start:
            totals, window = collect(window, world), {}
            if int(in_a_row) >= cfg.max_skipped:
                raise ValueError(f"{int(in_a_row)} steps in a row up to iter {iter_num} had a non-finite loss or "
                                 "gradient: the last good checkpoint stays; lower learning_rate")  # fmt: skip
            lr = get_lr(iter_num - 1, cfg)  # that of the step just made
            line = {"iter": iter_num, **means(totals), "lr": lr, "skipped": int(skipped), "epoch": batches.epoch}
            line["timing"] = timing(totals, meta["codec"]["frame_rate"], seconds + time.perf_counter() - clock, device)
            if evaluating and val:
                held = evaluate(spoken, val, autocast, cfg.eval_iters, rank, world, device)
                line.update({f"val_{name}": value for name, value in held.items()})
            bar.set_postfix_str(summary(line))
            if evaluating or (not watched and time.monotonic() - told > 20):  # a log file gets a line now and then
                say(f"iter {iter_num}: {summary(line)}")
                told = time.monotonic()
            if master:
                append_metrics(out("metrics.jsonl"), line)
            for logger in loggers:
                logger(line)
            if evaluating:
                names = ["last.pt"]
                if cfg.keep_last:
                    names.insert(0, f"ckpt_{iter_num}.pt")
                if line.get("val_loss") is not None:
                    history.append((iter_num, line["loss"] or math.nan, line["val_loss"]))
                    if line["val_loss"] < best:
                        best = line["val_loss"]
                        names.insert(0, "best.pt")
                    if warning := overfitting(history, cfg.overfit_warning):
                        say(warning)
                save(*names)
                if master:
                    for path in kept_checkpoints(cfg.out_dir)[: -cfg.keep_last] if cfg.keep_last else []:
                        os.remove(path)
                    draw(read_metrics(out("metrics.jsonl")), out("loss.html"))
                    if line.get("val_loss", line["loss"]) is None:  # a GPU does not survive drawing from NaN
                        say(f"iter {iter_num}: no samples, as the loss is not finite")
                    else:
                        speak(voice, held_out, cfg, iter_num, say)
            seconds, clock = 0.0, time.perf_counter()
        if iter_num >= cfg.max_iters:
            bar.close()
            return 0

        # leave, if a signal asks for it
        looking = world == 1 or logging or not cuda  # ranks have to agree; on GPUs only where the host waits anyway
        stop = max(received, default=0) if looking else 0
        if looking and world > 1:
            flag = torch.tensor(stop, device=device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            stop = int(flag)
        if stop:
            bar.close()
            save("last.pt")
            say(f"{signal.Signals(stop).name} at iter {iter_num}: {out('last.pt')} is written, the same command with "
                "--init_from=resume goes on")  # fmt: skip
            return stop

        # one step
        lr = get_lr(iter_num, cfg)
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = lr
        if cfg.lr_schedule == "multistep" and iter_num in cfg.milestones:
            say(f"iter {iter_num}: the learning rate changes from {get_lr(iter_num - 1, cfg):.3g} to {lr:.3g}")
        step, step_loss = {}, 0.0
        for micro in range(micro_steps):
            batch = next(stream)  # tokens (B, S, C), segment (B, S), and a reference where the model takes one
            segment = batch[1]
            padding = int((segment == PAD).sum()), segment.numel()
            # randomness belongs to the micro-batch, by its number in the whole run, whichever rank it falls to
            torch.manual_seed(cfg.seed * 1_000_003 + iter_num * cfg.gradient_accumulation_steps + micro * world + rank)
            if world > 1:
                net.require_backward_grad_sync = micro == micro_steps - 1
            with autocast:
                loss, stats = net(*batch)  # the model takes to the device what it needs there
            step_loss += loss.detach()
            scaler.scale(loss / micro_steps).backward()
            add(step, {**stats, "padding": padding}, device)
        if cfg.step_in_backward:
            norm, norms[:] = torch.stack(norms).norm(), []
        else:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = clip_gradients(trained, cfg.grad_clip)
        add(step, {"grad_norm": (norm, 1)}, device)
        bad = not_finite(norm)
        if world > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        for optimizer in optimizers if not cfg.step_in_backward else ():
            move(optimizer, bad)
        scaler.update()
        net.zero_grad(set_to_none=True)
        skipped, in_a_row = skipped + bad, (in_a_row + 1) * bad
        for name, pair in step.items():
            pair = torch.where(bad > 0, 0, pair)
            window[name] = window[name] + pair if name in window else pair
        if averaged:
            decay = min(cfg.ema, (1 + iter_num) / (10 + iter_num))  # early averages forget the initialisation quickly
            for mean, p in zip(averaged.parameters(), model.parameters(), strict=True):
                mean.lerp_(p.detach(), 1 - decay)
        iter_num += 1
        bar.update()
        if iter_num == start + 1 and device.type == "cpu":
            keep_memory()  # weights and the optimizers' state, which stay, are where they leave no gaps behind


def in_a_line(error, cfg, world):
    """What to raise instead where torch says in many lines that memory is used up or that another rank is gone."""
    if configurator.out_of_memory(error):
        said = " ".join(str(error).split()) or type(error).__name__
        return ValueError(f"out of memory: lower max_tokens = {cfg.max_tokens}, or take recompute=True ({said:.200})")
    if world > 1 and (isinstance(error, dist.DistError) or re.search("gloo|Connection (closed|reset)", str(error))):
        return ValueError("another process of this run is gone (what it said comes first): init_from=resume goes on")


def main(cfg):
    """Set up ranks, device and signals, then train. Raises ValueError or OSError, and SystemExit after a signal."""
    rank, world, local_rank = (int(os.environ.get(name, n)) for name, n in zip(TORCHRUN, (0, 1, 0), strict=True))
    device = torch.device(pick_device(cfg.device))
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    check(cfg, world, device)
    if cfg.dry_run:
        configurator.refuse_idle(cfg, idle_keys(cfg))
        recipe = configurator.configure(Path(__file__).with_name("prepare.py"), cfg.files)
        return budget.dry_run(cfg, recipe, partial(prepare_weights, cfg=cfg), DTYPES[cfg.dtype])
    if rank == 0 and (warning := slow_type(device, cfg.dtype)):
        print(warning)
    if world > 1:
        dist.init_process_group(cfg.backend or ("nccl" if device.type == "cuda" else "gloo"))
    received = []

    def note(number, _):
        received.append(number)
        if world == 1:
            signal.signal(number, before[number])  # a second one ends the run at once; torchrun sends two by itself

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with alone_in(cfg.out_dir) if rank == 0 else contextlib.nullcontext():
            stopped_by = train(cfg, rank, world, device, received)
    except (RuntimeError, MemoryError) as error:
        if plain := in_a_line(error, cfg, world):
            raise plain from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if world > 1:
        dist.destroy_process_group()
    if stopped_by:
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    configurator.run(main, __file__)

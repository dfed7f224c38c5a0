"""Training: token files in, a checkpoint that speaks out, the loop in plain sight.

    python train.py config/digits.py --learning_rate=1e-3
    torchrun --nproc_per_node=4 train.py config/digits.py
    python train.py config/digits.py --init_from=resume
    python train.py config/digits.py --init_from=auto      starts or goes on: the same command until the run is complete

- Before the first step the contract between training and generation is checked and printed.
- A killed run resumes exactly from last.pt. All randomness depends on the seed and the number of the micro-batch, so a
  checkpoint stores only weights, optimizer and position in the data. metrics.jsonl then reads as one run.
- All ranks share one list of micro-batches, so any number of ranks computes what one process would.
- A step with a non-finite loss or gradient changes nothing; too many in a row end the run.
- Each evaluation speaks held-out texts into out_dir/samples and draws the curves into out_dir/loss.html.
- The loop waits for the device only to log. Until then the sums of the stats stay on the device.

Exit codes: 0 at max_iters; 1 for an error, with one line that says why; 143 after SIGTERM and 130 after Ctrl-C, which
finish the step (and an evaluation that is due) and write last.pt; torchrun itself then exits with 1. last.pt is always
whole.

Letters in shapes: B batch, S rows, C columns, K codebooks.
"""

import contextlib
import itertools
import json
import math
import os
import re
import signal
import sys
import textwrap
import time
from collections import Counter
from dataclasses import asdict, fields
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from codec import UNKNOWN, load_codec
from data import fingerprint, open_tokens, reference_kind, speaker_reference, speaker_timbres, token_folders
from evaluate import OF_SPEECH, better, evaluate, held_out_line, measure
from model import contract_check
from parts import budget, configurator, lora, schedule
from parts.audio import write_audio
from parts.files import whole
from parts.folder import alone_in, check_out_dir, clear, kept_checkpoints
from parts.metrics import (
    Window,
    append_metrics,
    means,
    other_loggers,
    overfitting,
    read_metrics,
    summary,
    timing,
    write_metrics,
)
from parts.optim import Average, Optimizer
from parts.page import draw
from parts.segment import PAD
from parts.tensors import pick_device, reason
from plan import Fit, disk_line, idle_keys, make_batches, predict, steps_in_epoch
from sample import slow_type
from voice import DRAWS, Voice, need_stretch
from weights import (
    freeze_parameters,
    load_weights,
    prepare_weights,
    save_checkpoint,
    starting_point,
)

# from where to where
# token folder, written by prepare.py, or several with weights: how often an epoch takes their utterances, as in
# "new/tokens:3,old/tokens:0.5" or {"new/tokens": 3, "old/tokens": 0.5}
data_dir: str | dict = "data/digits/tokens"
out_dir = "out/digits"  # for checkpoints, metrics.jsonl, loss.html, samples/
# scratch; the path of a checkpoint or of published weights; resume: from out_dir/last.pt; auto: resume if that exists,
# else as the recipe says
init_from = "scratch"
dry_run = False  # print what the run would need (parameters, memory, batches, hours of audio) and stop
overwrite = False  # remove the run that out_dir holds and start over
# model; each family has further keys: the fields of its config in model.py that are `fixed` or `free`
arch = "csm"  # how the codebooks of a frame are predicted: csm, kani, xtts, valle, or a family that you add to model.py
# a preset of model.py, or a dict of sizes; empty: those of the weights in init_from
backbone: str | dict = {"n_layer": 4, "n_head": 4, "n_kv_head": 4, "d_model": 128, "d_ff": 384, "rope_theta": 10_000.0}
# csm: the depth decoder, likewise
decoder: str | dict = {"n_layer": 2, "n_head": 4, "n_kv_head": 4, "d_model": 96, "d_ff": 256, "rope_theta": 10_000.0}
# regular expressions: parameters with matching names are not trained; None: the family's advice for few utterances that
# continue trained weights (XTTS: below 3,000), else nothing
freeze: "list[str] | None" = None
# LoRA: train low-rank adapters beside frozen weights (parts/lora.py); checkpoints hold the adapter and name its base
lora_rank: "int >= 0" = 0  # of each adapter; 0: no LoRA
lora_alpha: "float > 0" = 32.0  # adapter output is scaled by alpha / rank
lora_rs = False  # scale by alpha / sqrt(rank) instead, so that large ranks learn as fast as small ones
lora_dropout: "0 <= float < 1" = 0.0  # dropout on the adapter's input
# linear layers that get one: names as in peft (q_proj, w1), or regular expressions for our names (parts/targets.py)
lora_targets: "str | list[str]" = [r"\.layers\."]
lora_also: "list[str]" = []  # parameters to train whole and save beside, named likewise (peft's modules_to_save)
lora_base_dtype: Literal["float32", "bfloat16"] = "float32"  # of the frozen weights; bfloat16 halves their memory
# batches
max_tokens: "int >= 1" = 8192  # largest micro-batch in rows, padding included
max_batch: "int >= 1" = 64  # largest micro-batch in utterances
gradient_accumulation_steps: "1 <= int <= 1000000" = 1  # micro-batches per step, summed over all ranks
voice_prompt: "0 <= float <= 1" = 0.0  # share of utterances with another one of the same speaker before them (cloning)
# xtts: length of the reference recording, from and to; valle: to which a voice prompt is cut or repeated
reference_seconds: "0 < list[float] <= 3600" = [3.0, 6.0]
# GB that a step may take on each GPU, or in each process on a CPU; 0: no limit; auto: nine tenths of what is free.
# Where the keys need more, micro-batches become smaller (a step keeps its rows), then activations are recomputed
memory: "float | Literal['auto'] >= 0" = 0.0
memory_lora: "int >= 0" = 0  # lora_rank to take where all that does not fit; 0: none
loader_workers: "0 <= int <= 256" = 0  # processes that read batches; 0: read between steps
# optimizer
max_iters: "int >= 0" = 2000  # steps; 0: evaluate and save the weights as they are
epochs: "float >= 0" = 0.0  # passes over the data, in place of max_iters; 0: max_iters counts
learning_rate: "float >= 0" = 1e-3  # peak
muon = False  # Muon instead of AdamW for the matrices inside the transformers: it learns faster from scratch
weight_decay: "float >= 0" = 0.1  # of matrices only
beta1: "0 <= float < 1" = 0.9  # AdamW: decay of the gradient's mean
beta2: "0 <= float < 1" = 0.95  # AdamW: decay of the squared gradient's mean
grad_clip: "float >= 0" = 1.0  # largest gradient norm; 0: no clipping
step_in_backward = False  # update each weight in backward, then free its gradient (LOMO); needs grad_clip=0
sparse_embeddings = False  # SparseAdam for embeddings: only rows of the batch are updated; saves time for large tables
ema: "0 <= float < 1" = 0.0  # decay of averaged weights, which are then evaluated and speak; 0: no average
max_skipped: "int >= 1" = 20  # non-finite steps in a row that end the run (float16 starts with a few)
# learning rate
lr_schedule: Literal["multistep", "cosine", "linear", "constant"] = "cosine"  # after the warm-up
warmup_iters: "int >= 0" = 100  # steps of linear warm-up
warmup_share: "0 <= float < 1" = 0.0  # share of the run that is warm-up, in place of warmup_iters; 0: they count
lr_decay_iters: "int >= 0" = 0  # step at which cosine and linear reach min_lr; 0: max_iters
min_lr: "float >= 0" = 0.0  # final learning rate of cosine and linear
milestones: "list[float] > 0" = []  # multistep: when the rate is multiplied by gamma
milestones_in: Literal["steps", "batches", "epochs"] = "steps"  # unit of milestones; batches: micro-batches
gamma: "float >= 0" = 0.5  # multistep
# logging and evaluation
log_interval: "int >= 1" = 10  # steps between lines of metrics.jsonl
eval_interval: "int >= 1" = 250  # steps between evaluations, which write last.pt, and best.pt if it is the best
eval_iters: "int >= 0" = 0  # batches of an evaluation, spread over all lengths; 0: the whole val split
eval_samples: "int >= 0" = 2  # held-out texts to speak at each evaluation
# best.pt is best by this number of an evaluation, such as val_c0_accuracy, or of the eval_samples texts that are spoken
# then, such as missed (evaluate.py has a list; with text_margin the model judges itself, and is easily satisfied)
select_by = "val_loss"
keep_last: "int >= 0" = 0  # keep the weights at the last so many evaluations as ckpt_{iter}.pt
overfit_warning: "int >= 0" = 3  # warn after so many evaluations above the best while training loss falls; 0: never
wandb_project = ""  # also log to this project of Weights & Biases
tensorboard = False  # also log to TensorBoard, in out_dir
# the machine
compile = False  # torch.compile
backend = ""  # of torch.distributed; empty: nccl on GPUs, gloo on CPUs

SHARED = {
    "voice.py": ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "repetition_decay", "dtype"],
    "sample.py": ["device", "seed"],
    "weights.py": ["base"],
}  # fmt: skip
# sums before step 1
UNTRAINED = {name: torch.zeros(2) for name in ("weighted_loss", "c0_accuracy", "grad_norm", "padding")}
UNTRAINED["loss_by_codebook"] = torch.zeros(2, 1)
FEWEST_TARGETS = 0.2  # share of the frames; with fewer targets a model does not learn to speak


def check(cfg, world, device):
    """Validate the config: ValueError with one line."""
    need_stretch(cfg.reference_seconds)
    if cfg.dtype == "float16" and device.type != "cuda" and not cfg.dry_run:
        raise ValueError(f"dtype = 'float16' needs a GPU, not {device.type}: take bfloat16 or float32")
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


class Run:
    """What a run holds between two steps: data, model, optimizer, position, stats; and its folder out_dir."""

    def __init__(self, cfg, rank, world, device):
        self.cfg = cfg
        self.rank = rank
        self.world = world
        self.device = device
        self.files, self.val_files = (open_tokens(cfg.data_dir, split) for split in ("train", "val"))
        pairs = zip(self.val_files.parts, self.files.parts, strict=True)
        self.held_out = [val if len(val) else train for val, train in pairs]  # to speak, to check the contract
        self.meta = meta = self.files.meta
        self.data = fingerprint(cfg.data_dir)
        codec = load_codec(meta["codec"]["name"], self.files.folder)
        if meta["codec"]["fingerprint"] not in (UNKNOWN, codec.fingerprint()):
            raise ValueError(f"{cfg.data_dir}: codec.pt is not the codec its codes were made with: run prepare.py "
                             "again")  # fmt: skip
        self.tokenizer = self.files.tokenizer()
        resume = cfg.init_from == "resume"
        if not resume:
            check_out_dir(cfg.out_dir, cfg.init_from, cfg.overwrite)
        if cfg.lora_rank and cfg.init_from == "scratch":
            raise ValueError("lora_rank: LoRA needs trained weights to add to, name them by init_from")
        model, checkpoint = starting_point(cfg, codec, meta, self.say)
        if cfg.voice_prompt and model.config.prompt_style == "joined":
            raise ValueError(f"voice_prompt = {cfg.voice_prompt}: prompts in training need prompt_style='segments'; in "
                             "one segment, as Marvis clones a voice, they are for speaking alone")  # fmt: skip
        self.batches, self.val = make_batches(cfg, model, self.files, self.val_files, rank, world)
        self.epoch = steps_in_epoch(self.batches, cfg)
        schedule.count_steps(cfg, self.epoch, self.say)
        if resume and "memory" not in cfg.given:
            cfg.memory = checkpoint["config"].get("memory", cfg.memory)
        self.fit = None
        if cfg.memory:
            self.fit = Fit(cfg, model, meta["codec"], self.batches, checkpoint, world, device, codec)
            for line in self.fit.choose():
                self.say(line)
            self.batches, self.val = make_batches(cfg, model, self.files, self.val_files, rank, world)
        adapted = checkpoint and checkpoint.get("base")
        idle = {} if adapted else {"base": f"init_from = {cfg.init_from!r} is no adapter"}
        configurator.refuse_idle(cfg, {**idle_keys(cfg), **idle}, self.say)
        prepare_weights(model, len(self.files), cfg, checkpoint, self.say)
        self.check_vectors(model)
        self.base = checkpoint["base"] if adapted else cfg.init_from
        if not resume:
            check_out_dir(cfg.out_dir, self.base, cfg.overwrite)
        published = None if cfg.init_from == "scratch" else os.path.abspath(cfg.init_from)
        self.origin = checkpoint.get("origin") if checkpoint else published

        self.model = model.to(device)
        self.codec = codec.to(device)
        self.average = Average(model, cfg.ema) if cfg.ema else None
        self.spoken = self.average.model if cfg.ema else model  # the weights that are evaluated and speak
        self.autocast = torch.autocast(device.type, getattr(torch, cfg.dtype), enabled=cfg.dtype != "float32")
        if self.fit:
            self.try_fullest()
        self.optimizer = Optimizer(model, cfg, device, cfg.dtype == "float16", world)
        self.window = Window(device)
        self.step = 0
        self.first_step = 0 if cfg.max_iters else -1  # without steps, step 0 is logged
        self.samples_due = False  # a resumed run may have to make up for what a kill left out
        self.best = math.inf  # what select_by names, its sign such that less is better
        self.history = []
        self.seconds = 0.0
        self.heard = {"total_tokens": 0, "total_hours": 0.0}  # so far, of audio
        self.set_voice()
        self.check_selection()
        if resume:
            self.go_on(checkpoint)

    def try_fullest(self):
        """Run the fullest micro-batch before the first step: a run that has not enough memory says so now. Where the
        forecast was too low the micro-batches are halved."""
        cfg, fit = self.cfg, self.fit
        budget.give_back_at_once(self.device)
        while True:
            again = cfg.gradient_accumulation_steps > self.world
            how = cfg, fit.batch, self.device, self.autocast
            rest = fit.kinds.get("optimizer", 0) + fit.kinds.get("gradients to add up over GPUs", 0)
            failed = ""
            try:
                seconds, used = budget.try_step(self.model.train(), *how, rest, again)
                if used and used > fit.limit:
                    failed = f"took {budget.gigabytes(used)} GB"
            except (RuntimeError, MemoryError) as error:
                if not configurator.out_of_memory(error):
                    raise
                failed = "was out of memory"
            if not self.any_rank(bool(failed)):
                break
            self.say(f"the fullest micro-batch {failed or 'did not fit on another rank'}: {fit.halve()}")
            self.batches, self.val = make_batches(cfg, self.model, self.files, self.val_files, self.rank, self.world)
        rows, _ = self.batches.rows()
        epoch = seconds * rows / fit.batch[1].numel() / self.world / 3600
        found = f" and {budget.gigabytes(used)} GB" if used else ""
        self.say(f"the fullest micro-batch took {seconds:.3g} s{found}: an epoch takes about {epoch:.3g} hours, the run"
                 f" {cfg.max_iters / self.epoch * epoch:.3g}, updates and evaluations aside")  # fmt: skip
        self.say(disk_line(cfg, self.model, self.files, self.codec))

    def any_rank(self, true):
        if self.world == 1:
            return true
        flag = torch.tensor(float(true), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def check_vectors(self, model):
        """Say where only one of model and data has speaker vectors. A model that has to do without leaves alone the
        weights for them."""
        kind = reference_kind(self.meta)
        if model.reference == "vector" and kind != "vector":
            freeze_parameters(model, [model.reference_weights])
            self.say(f"{self.cfg.data_dir} has no speaker vectors: the model trains without, and keeps its weights for "
                     "them as they are")  # fmt: skip
        elif kind == "vector" and not model.reference:
            self.say(f"the model takes no speaker vectors: those in {self.cfg.data_dir} are not used")

    def check_selection(self):
        """Raise ValueError where no evaluation will have the number that select_by names."""
        name = self.cfg.select_by
        if name == "val_loss" or (name in OF_SPEECH and self.cfg.eval_samples):
            return
        if not self.val:
            raise ValueError(f"select_by = {name!r:.60}: the val split is empty, nothing is evaluated")
        found = evaluate(self.model, self.val, self.autocast, 1)
        known = [f"val_{x}" for x, value in found.items() if not isinstance(value, list)]
        if name not in known:
            raise ValueError(f"select_by = {name!r:.60} is none of the numbers of an evaluation: "
                             f"{', '.join([*known, *OF_SPEECH])}")  # fmt: skip

    def say(self, line):
        if self.rank == 0:
            tqdm.write(line)
            sys.stdout.flush()

    def path(self, name):
        return os.path.join(self.cfg.out_dir, name)

    def set_voice(self):
        """What speaks the samples, and the probe: the held-out utterance that checks the contract here and whenever the
        checkpoint is loaded."""
        files = self.held_out[0]  # whose speakers have the numbers that they have in meta
        frames = files.index[:, 3]
        shortest = int((frames + 10**9 * (frames < 8)).argmin())  # but long enough to tell the three shifts apart
        references = timbres = None
        self.probe = {"text": torch.from_numpy(files.text(shortest)), "codes": torch.from_numpy(files.codes(shortest))}
        if self.batches.reference:  # the checkpoint holds the voice of each speaker
            count = range(len(self.meta["speakers"]))
            size = self.batches.reference[1]
            references = torch.from_numpy(np.stack([speaker_reference(self.files, i, size) for i in count]))
            self.probe["reference"] = references[files.speaker(shortest)]
            timbres = speaker_timbres(self.files)
        self.voice = Voice(self.spoken, self.codec, self.tokenizer, self.meta, references=references, timbres=timbres)

    def go_on(self, checkpoint):
        """Continue where the checkpoint stopped."""
        cfg = self.cfg
        state = checkpoint["train"]
        self.step = checkpoint["iter"]
        self.first_step = self.step
        self.optimizer.load_state_dict(state, checkpoint.path)
        self.best = state["best"]
        self.history = state["history"]
        self.seconds = state["seconds"]
        self.heard = state.get("heard", self.heard)
        if state.get("data", self.data) == self.data:
            position = state["batches"]
            if self.fit and not self.fit.before:  # other micro-batches: the same share of the epoch
                share = cfg.gradient_accumulation_steps / checkpoint["config"]["gradient_accumulation_steps"]
                position = {**position, "batch": round(position["batch"] * share)}
            self.batches.restore(position)
        self.window.totals = {k: pair.to(self.device) * (self.rank == 0) for k, pair in state["window"].items()}
        if self.average:
            load = lora.set_adapter if cfg.lora_rank else load_weights
            load(self.average.model, checkpoint["ema"] or checkpoint["model"])
        self.say(f"resuming {cfg.out_dir} at iter {self.step}{what_changed(cfg, checkpoint['config'], self.step)}")
        for line in forgotten(cfg, checkpoint, self.model, self.data):
            self.say(f"{line}: the best loss so far is forgotten, the next evaluation writes best.pt")
            self.best = math.inf
            self.history = []
        if self.step >= cfg.max_iters:
            self.say(f"nothing left to do: max_iters = {cfg.max_iters} is reached")
        old = checkpoint["config"]
        self.samples_due = self.step % old["eval_interval"] == 0 or self.step == old["max_iters"]

    def describe(self):
        """Print keys, sizes and batches; check that there is enough to learn, and the contract."""
        cfg, model = self.cfg, self.model
        keys = "  ".join(f"{k}={v!r}" for k, v in vars(cfg).items())
        self.say(textwrap.fill(keys, 120, break_on_hyphens=False))
        parts = Counter()
        for name, p in model.named_parameters():
            parts[name.split(".")[0]] += p.numel()
        trained = sum(p.numel() for p in self.optimizer.trained)
        self.say(f"{parts.total() / 1e6:.3g}M parameters, of which {trained / 1e6:.3g}M are trained: "
                 + ", ".join(f"{name} {n / 1e6:.2g}M" for name, n in parts.items()))  # fmt: skip
        targets = self.batches.targets()
        self.say(f"{len(self.files)} utterances, {len(self.batches.plan(0)[0])} micro-batches an epoch, "
                 f"{self.batches.padding():.1%} padding, {targets:.0%} of the frames are targets"
                 + ("" if self.val else "; the val split is empty: no evaluation, no best.pt"))  # fmt: skip
        for part, weight in zip(self.files.parts, token_folders(cfg.data_dir).values(), strict=True):
            if part is not self.files:
                self.say(f"{part.folder}: {len(part)} utterances, each {weight:g} times an epoch")
        for line in schedule.timetable(cfg, self.epoch):
            self.say(line)
        if (ids := self.batches.languages) and len(set(ids)) < len(ids):
            self.say(f"the languages {', '.join(self.meta['languages'])} have the ids {', '.join(map(str, ids))}: the "
                     "model does not tell all of them apart")  # fmt: skip
        if targets < FEWEST_TARGETS:
            longest = (self.batches.reference or [0])[-1]
            advice = "lower reference_seconds, or raise voice_prompt" if longest else "set drop_repeats=False"
            raise ValueError(f"only {targets:.0%} of the frames are targets, too few to learn to speak from: {advice}")
        report = contract_check(model, **{k: v.numpy() if k != "reference" else v for k, v in self.probe.items()})
        shifts = ", ".join(f"{x:.2f}" for x in report["loss_at_shift"])
        self.say(f"contract check: generation and teacher forcing agree to {report['max_difference']:.1e}; "
                 f"cross-entropy of codebook 0 at shifts 0, 1, 2: {shifts} (ln V = {report['ln_v']:.2f})")  # fmt: skip

    def open(self):
        """Make out_dir ready, and start the clock."""
        cfg, self.loggers = self.cfg, []
        resume = cfg.init_from == "resume"
        if self.rank == 0:
            self.loggers = other_loggers(cfg.wandb_project, cfg.tensorboard, cfg.out_dir, vars(cfg))
            os.makedirs(self.path("samples"), exist_ok=True)
            clear(cfg.out_dir, resume, cfg.overwrite, self.say)
            # the lines after this step will be written again
            write_metrics(self.path("metrics.jsonl"), read_metrics(self.path("metrics.jsonl"), self.step))
            with whole(self.path("config.json"), "w") as f:
                json.dump(vars(cfg), f, indent=1)
            if self.samples_due:  # a kill may have come between last.pt and these
                draw(read_metrics(self.path("metrics.jsonl")), self.path("loss.html"))
                self.speak(missing=True)
        self.watched = self.rank == 0 and sys.stderr.isatty()
        self.bar = tqdm(total=cfg.max_iters, initial=self.step, disable=not self.watched, dynamic_ncols=True,
                        unit="step")  # fmt: skip
        self.printed = 0.0
        self.clock = time.perf_counter()

    def elapsed(self):
        """Seconds of training since the last line of metrics.jsonl, those before a resume included."""
        return self.seconds + time.perf_counter() - self.clock

    def log(self, evaluating):
        """Write a line of metrics.jsonl, and return it; if `evaluating`, also evaluate, save and speak. Waits for the
        device."""
        cfg = self.cfg
        totals = self.window.collect(self.world) or UNTRAINED
        self.window = Window(self.device)
        if int(self.optimizer.in_a_row) >= cfg.max_skipped:
            raise ValueError(f"{int(self.optimizer.in_a_row)} steps in a row up to iter {self.step} had a non-finite "
                             "loss or gradient: the last good checkpoint stays; lower learning_rate")  # fmt: skip
        padding, rows = totals["padding"].tolist()
        self.heard["total_tokens"] += int(rows - padding)
        self.heard["total_hours"] += totals["weighted_loss"][1].item() / self.meta["codec"]["frame_rate"] / 3600
        line = {
            "iter": self.step, **means(totals), "lr": schedule.get_lr(max(0, self.step - 1), cfg),
            "skipped": int(self.optimizer.skipped), "epoch": self.batches.epoch, **self.heard,
            "timing": timing(totals, self.meta["codec"]["frame_rate"], self.elapsed(), self.device),
        }  # fmt: skip
        if evaluating and self.val:
            held_out = evaluate(self.spoken, self.val, self.autocast, cfg.eval_iters, self.rank, self.world)
            line.update({f"val_{name}": value for name, value in held_out.items()})
            if cfg.select_by in OF_SPEECH and self.rank == 0 and line["val_loss"] is not None:
                line.update(self.numbers_of_speech())
        self.bar.set_postfix_str(summary(line))
        if evaluating or (not self.watched and time.monotonic() - self.printed > 20):  # a log file gets a line at times
            self.say(f"iter {self.step}: {summary(line)}")
            self.printed = time.monotonic()
        if self.rank == 0:
            append_metrics(self.path("metrics.jsonl"), line)
        for logger in self.loggers:
            logger(line)
        if evaluating:
            self.keep(line)
        self.seconds = 0.0
        self.clock = time.perf_counter()
        return line

    def keep(self, line):
        """After an evaluation: write last.pt, best.pt if it is the best, and ckpt_{iter}.pt; draw and speak."""
        names = ["last.pt"]
        if self.cfg.keep_last:
            names.insert(0, f"ckpt_{self.step}.pt")
        if line.get("val_loss") is not None:
            self.history.append((self.step, line["loss"] or math.nan, line["val_loss"]))
        if (value := line.get(self.cfg.select_by)) is not None:
            score = -value if better(self.cfg.select_by) == "high" else value
            if score < self.best:
                self.best = score
                names.insert(0, "best.pt")
        if warning := overfitting(self.history, self.cfg.overfit_warning):
            self.say(warning)
        self.save(*names)
        if self.rank == 0:
            for path in kept_checkpoints(self.cfg.out_dir)[: -self.cfg.keep_last] if self.cfg.keep_last else []:
                os.remove(path)
            draw(read_metrics(self.path("metrics.jsonl")), self.path("loss.html"))
            if self.step and line.get("val_loss", line["loss"]) is None:  # drawing from NaN would crash a GPU
                self.say(f"iter {self.step}: no samples, as the loss is not finite")
            else:
                self.speak()

    def save(self, *names):
        """Write a checkpoint under each of these names; only last.pt has what resuming needs."""
        cfg = self.cfg
        totals = self.window.collect(self.world)
        if not all(p.isfinite().all() for p in self.optimizer.trained):
            raise ValueError(f"the weights at iter {self.step} are not finite and not saved: lower learning_rate")
        state = {
            **self.optimizer.state_dict(), "batches": self.batches.state(), "data": self.data, "best": self.best,
            "history": self.history, "window": totals, "seconds": self.elapsed(), "heard": self.heard,
            "asked": self.fit.asked if self.fit else None,
        }  # fmt: skip
        weights = lora.adapter_state if cfg.lora_rank else torch.nn.Module.state_dict
        references = self.voice.references
        if references is not None and self.model.reference == "recording":
            references = references.half()
        timbres = self.voice.timbres
        checkpoint = {
            "arch": cfg.arch, "model_config": asdict(self.model.config), "config": vars(cfg), "iter": self.step,
            "meta": self.meta, "model": weights(self.model), "ema": weights(self.spoken) if self.average else None,
            "base": self.base if cfg.lora_rank else None,  # the weights that an adapter is added to
            "origin": self.origin,  # the published weights that these descend from, for an export
            "codec": self.codec.pack(), "codec_fingerprint": self.codec.fingerprint(),
            "tokenizer": {"kind": self.tokenizer.kind, "model": self.tokenizer.model}, "probe": self.probe,
            "references": references, "timbres": timbres,
        }  # fmt: skip
        for name in names if self.rank == 0 else ():
            save_checkpoint(self.path(name), {**checkpoint, "train": state if name == "last.pt" else None})

    def speak(self, missing=False):
        """Speak some held-out texts into out_dir/samples, beside the recordings as the codec reproduces them.

        They come from each token folder in turn. missing: only those whose file does not exist. A text that cannot be
        spoken is reported; training goes on.
        """
        cfg = self.cfg
        voice = self.voice
        lines = {}
        for n, (files, i) in enumerate(self.to_speak()):
            path = self.path(f"samples/{self.step:06d}_{n}.wav")
            if missing and os.path.exists(path):
                continue
            self.write_original(files, i, n)
            line, words = held_out_line(voice, files, i)
            try:
                voice.plan(**line)
                lines[path] = line, words
            except ValueError as e:
                self.say(f"{path}: {reason(e)}")
        how = {key: getattr(cfg, key) for key in (*DRAWS, "seed")}
        try:
            for i, said in voice.speak([line for line, _ in lines.values()], tries=1, **how):
                path = list(lines)[i]
                write_audio(path, said.wav, voice.sample_rate)
                self.say(f"{path}: {lines[path][1]}{'' if said.ended else ' (did not stop)'}")
        except (ValueError, RuntimeError) as e:  # torch raises RuntimeError for a diverged model's logits
            self.say(f"{self.path('samples')}: {reason(e)}")

    def to_speak(self):
        """The held-out texts that are spoken, [(files, number)], from each token folder in turn."""
        count = self.cfg.eval_samples
        each = math.ceil(count / len(self.held_out))
        turns = ([(files, i) for i in spread(len(files), each)] for files in self.held_out)
        return [pair for turn in itertools.zip_longest(*turns) for pair in turn if pair][:count]

    def numbers_of_speech(self):
        """What evaluate.py measures of the held-out texts that are spoken, {name: number}."""
        lines = (held_out_line(self.voice, files, i) for files, i in self.to_speak())
        return measure(self.voice, [{**line, "words": words} for line, words in lines], self.cfg)[0]

    def write_original(self, files, i, n):
        """Write the i-th recording of these files, as the codec reproduces it, as number n, unless it is there."""
        path = self.path(f"samples/original_{n}.wav")
        if not os.path.exists(path):
            codes = torch.from_numpy(files.codes(i).T[None]).to(self.device)
            write_audio(path, self.codec.decode(codes)[0].float().cpu(), self.codec.sample_rate)

    def stop_asked(self, received, logging):
        """The signal that ends the run, or 0. All ranks agree on it."""
        if self.world > 1 and not logging and self.device.type == "cuda":
            return 0  # on GPUs ranks agree only where the host waits for the device anyway
        stop = max(received, default=0)
        if self.world > 1:
            flag = torch.tensor(stop, device=self.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            stop = int(flag)
        return stop


def spread(n, count):
    """At most `count` of the numbers below n, evenly spread."""
    count = min(count, n)
    return [i * n // count for i in range(count)]


def train(run, received, enough=None):
    """The loop. `received`: a list to which signals are added. enough: see main. Returns the signal that ended the run,
    or 0."""
    cfg = run.cfg
    model = run.model
    optimizer = run.optimizer
    net = torch.compile(model, dynamic=True) if cfg.compile else model
    if run.world > 1:
        net = DistributedDataParallel(net)
    stream = iter(run.batches)
    micro_steps = cfg.gradient_accumulation_steps // run.world

    while True:
        # log, evaluate, save, speak
        evaluating = run.step % cfg.eval_interval == 0 or run.step == cfg.max_iters
        logging = run.step % cfg.log_interval == 0 or evaluating
        line = run.log(evaluating) if logging and run.step > run.first_step else None
        if run.step >= cfg.max_iters or line and evaluating and enough and enough(line):
            run.bar.close()
            return 0
        if stop := run.stop_asked(received, logging):
            run.bar.close()
            run.save("last.pt")
            run.say(f"{signal.Signals(stop).name} at iter {run.step}: {run.path('last.pt')} is written, the same "
                    "command with --init_from=resume goes on")  # fmt: skip
            return stop

        # one step
        lr = schedule.get_lr(run.step, cfg)
        optimizer.set_lr(lr)
        if cfg.lr_schedule == "multistep" and run.step in cfg.milestones:
            before = schedule.get_lr(run.step - 1, cfg)
            run.say(f"iter {run.step}: the learning rate changes from {before:.3g} to {lr:.3g}")
        for micro in range(micro_steps):
            batch = next(stream)  # tokens (B, S, C), segment (B, S), and a reference where the model takes one
            # randomness belongs to the micro-batch, by its number in the whole run, whichever rank computes it
            number = run.step * cfg.gradient_accumulation_steps + micro * run.world + run.rank
            torch.manual_seed(cfg.seed * 1_000_003 + number)
            if run.world > 1:
                net.require_backward_grad_sync = micro == micro_steps - 1
            with run.autocast:
                loss, stats = net(*batch)
            optimizer.backward(loss, micro_steps)
            segment = batch[1]
            run.window.add({**stats, "padding": (int((segment == PAD).sum()), segment.numel())})
        norm, skipped = optimizer.step()
        run.window.add({"grad_norm": (norm, 1)})
        run.window.close_step(skipped)
        if run.average:
            run.average.update(model, run.step)
        run.step += 1
        run.bar.update()


def forgotten(cfg, checkpoint, model, data):
    """Why a resumed run forgets its best loss, one line for each reason. data: the fingerprint of the data."""
    old = checkpoint["config"]
    before = checkpoint["model_config"]
    now = asdict(model.config)
    lines = []
    if checkpoint["train"].get("data", data) != data:  # older checkpoints have no fingerprint
        lines.append(f"{cfg.data_dir} has other utterances than before, which are read from the first epoch on")
    keys = [f.name for f in fields(model.config) if f.metadata.get("judges")]
    keys = [key for key in keys if before.get(key, now[key]) != now[key]]
    measured = ("eval_iters", "reference_seconds") if model.reference == "recording" else ("eval_iters",)
    if old.get("select_by") != cfg.select_by:
        lines.append("best.pt is chosen by another number than before")
    keys += [key for key in measured if old.get(key, getattr(cfg, key)) != getattr(cfg, key)]
    if keys:
        lines.append(f"{', '.join(keys)} changed, and with it what the held-out loss means")
    return lines


def what_changed(cfg, old, step):
    """The keys that a resumed run changes, and the jump of its learning rate, as the end of a sentence."""
    changed = [f"{k} {old[k]!r} -> {v!r}" for k, v in vars(cfg).items() if k != "init_from" and old.get(k, v) != v]
    before = schedule.get_lr(step, SimpleNamespace(**{**vars(cfg), **old}))
    now = schedule.get_lr(step, cfg)
    if step < cfg.max_iters and not math.isclose(before, now, rel_tol=0.01):
        changed.append(f"so that the learning rate goes on at {now:.2g} instead of {before:.2g}")
    return f", changed: {', '.join(changed)}" if changed else ""


def in_a_line(error, cfg, world):
    """A ValueError in place of torch's long message for used-up memory or a lost rank; None for any other error."""
    message = " ".join(str(error).split())
    if configurator.out_of_memory(error):
        return ValueError(f"out of memory: lower max_tokens = {cfg.max_tokens}, or set recompute=True "
                          f"({message or type(error).__name__:.200})")  # fmt: skip
    if world > 1 and (isinstance(error, dist.DistError) or re.search("gloo|Connection (closed|reset)", message)):
        return ValueError("another process of this run has ended (its own message comes first): init_from=resume goes "
                          "on")  # fmt: skip
    return None


@contextlib.contextmanager
def catch_signals(received, world):
    """SIGTERM and SIGINT are added to `received`. A second one ends a single process at once; torchrun sends two."""
    def note(number, _):
        received.append(number)
        if world == 1:
            signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(cfg, enough=None):
    """Set up ranks, device and signals, then train. Raises ValueError or OSError, and SystemExit after a signal.

    enough(line): is asked after each evaluation, with its line of metrics.jsonl, whether the run shall end there.
    """
    rank, world, local_rank = (int(os.environ.get(name, n)) for name, n in
                               (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
    device = torch.device(pick_device(cfg.device))
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if cfg.init_from == "auto":
        goes_on = os.path.exists(os.path.join(cfg.out_dir, "last.pt"))
        own = cfg.recipe.get("init_from", "scratch")
        cfg.init_from = "resume" if goes_on else "scratch" if own == "auto" else own
    check(cfg, world, device)
    if cfg.dry_run:
        return predict(cfg, device)
    if rank == 0 and (warning := slow_type(device, cfg.dtype)):
        print(warning)
    if world > 1:
        dist.init_process_group(cfg.backend or ("nccl" if device.type == "cuda" else "gloo"))
    received = []
    try:
        with catch_signals(received, world), alone_in(cfg.out_dir) if rank == 0 else contextlib.nullcontext():
            run = Run(cfg, rank, world, device)
            run.describe()
            run.open()
            stopped_by = train(run, received, enough)
    except (RuntimeError, MemoryError) as error:
        if plain := in_a_line(error, cfg, world):
            raise plain from None
        raise
    if world > 1:
        dist.destroy_process_group()
    if stopped_by:
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    configurator.run(main, __file__)

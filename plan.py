"""What a run has before its first step: its batches, the keys that count, and the dry run, which says what it needs.

    python train.py config/elise.py --dry_run=True
"""

import bisect
import glob
import math
import os
from dataclasses import fields
from types import SimpleNamespace

import torch
import torch.distributed as dist

from codec import PUBLISHED, load_codec, published_sizes
from data import Batches, open_tokens, reference_kind, token_folders
from model import ARCHS, build, field_names
from parts import budget, configurator, schedule
from parts.optim import Optimizer
from weights import family_keys, from_pretrained, prepare_weights, starting_point

CPU = torch.device("cpu")
FEW_ROWS = 1000  # of a micro-batch; with fewer, products are slow, and recomputing costs less time
SMALL_CHUNK = 96  # frames of a chunk of CSM's depth decoder
SHARE_OF_FREE = 0.9  # of the memory that is free now, for memory = "auto"


def make_batches(cfg, model, files, val_files, rank=0, world=1):
    """The batches of the training split, and those of the val split or None if it is empty."""
    limits = {"max_rows": model.max_rows, "languages": model.config.language_ids(files.meta["languages"])}
    frame_rate = files.meta["codec"]["frame_rate"]
    stretch = [max(1, round(x * frame_rate)) for x in cfg.reference_seconds]
    if model.reference == "recording":
        limits["reference"] = stretch
    elif model.reference and model.reference == reference_kind(files.meta):
        limits["reference"] = [0, 0]
    if model.fits_prompts:
        limits["prompt_frames"] = stretch
    rows = model.layout, model.length, cfg.max_tokens, cfg.max_batch
    batches = Batches(files, *rows, cfg.seed, rank, world, cfg.loader_workers, cfg.voice_prompt, **limits)
    return batches, Batches(val_files, *rows, shuffle=False, **limits) if len(val_files) else None


def steps_in_epoch(batches, cfg):
    """How many steps the first epoch of the training split takes, with a part of a step."""
    return len(batches.plan(0)[0]) / cfg.gradient_accumulation_steps


def idle_keys(cfg):
    """{key: why} of the keys that have no effect in this run. cfg.arch and cfg.mode are those of the model."""
    family, config = ARCHS[cfg.arch]
    own = {f.name: f for f in fields(config)}
    idle = dict.fromkeys({"decoder", *family_keys()} - own.keys(), f"arch = {cfg.arch!r} has no such key")
    for name, f in own.items():
        if f.metadata.get("mode") not in (None, cfg.mode, *cfg.mode.split("+")):
            idle[name] = f"mode = {cfg.mode!r} does not use it"
    if family.reference != "recording" and not family.fits_prompts:
        idle["reference_seconds"] = f"arch = {cfg.arch!r} reads no voice off a recording"
    if not cfg.lora_rank and not (cfg.memory and cfg.memory_lora):
        idle |= {key: "lora_rank = 0" for key in vars(cfg) if key.startswith("lora_") and key != "lora_rank"}
    if not cfg.memory:
        idle["memory_lora"] = "memory = 0"
    return idle | schedule.idle_keys(cfg)


def supposed_meta(recipe):
    """The meta.json that prepare.py would write for a recipe, as far as a model's sizes need it."""
    if recipe.codec in PUBLISHED:
        codec = dict(published_sizes(recipe.codec))
    else:
        codec = load_codec(recipe.codec, **recipe.codec_args).sizes(recipe.references)
    codec |= {key: value for key, value in recipe.codec_args.items() if key in codec}
    return {"codec": codec, "tokenizer": {"vocab_size": recipe.vocab_size, "bos_id": 1, "eos_id": 2}}


def planned_model(cfg, codec, meta, device, say=print):
    """The model that a run would start with, and our checkpoint that it comes from, or None. codec: None where there
    are no data. device: where a model without weights is made."""
    if cfg.init_from == "resume" or os.path.exists(cfg.init_from):
        if codec:
            return starting_point(cfg, codec, meta, say)
        free = {key: getattr(cfg, key) for key in cfg.given if key in family_keys("free")}
        path = os.path.join(cfg.out_dir, "last.pt") if cfg.init_from == "resume" else cfg.init_from
        return from_pretrained(path, base=cfg.base, **free), None
    if cfg.init_from != "scratch":
        say(f"{cfg.init_from} does not exist yet: supposing the sizes that the keys say")
    with torch.device(device):
        return build(cfg.arch, meta, vars(cfg)), None  # which refuses an unknown family


def apply(model, cfg):
    """Give a model the keys by which `Fit` saves memory."""
    for stack in model.stacks():
        stack.recompute = bool(cfg.recompute)
    for key in {"recompute", "decoder_chunk"} & field_names(type(model.config)):
        setattr(model.config, key, getattr(cfg, key))


class Fit:
    """The keys by which a step takes no more than `memory` GB. What costs least time comes first: small chunks in CSM's
    depth decoder, smaller micro-batches, recomputed activations; with memory_lora an adapter in place of all weights.

    A step has as many rows as before, in more micro-batches. So epochs, steps and learning rate stay as they are.
    model: as starting_point made it, its weights may be on the meta device; batches: those of the keys as they are, or
    None without data. Raises ValueError where nothing fits.
    """

    KEYS = ("max_tokens", "max_batch", "gradient_accumulation_steps", "decoder_chunk", "recompute", "lora_rank")

    def __init__(self, cfg, model, codec, batches=None, checkpoint=None, world=1, device=CPU, sound=None):
        self.cfg = cfg
        self.model = model
        self.codec = codec  # what meta.json says of it
        self.checkpoint = checkpoint
        self.world = world
        self.files = batches.files if batches else None
        self.parts = 1
        cfg.recompute = any(stack.recompute for stack in model.stacks())
        before = (checkpoint or {}).get("train") or {}
        for key, value in (before.get("asked") or {}).items():
            if key in ("decoder_chunk", "recompute") and key not in cfg.given and cfg.init_from == "resume":
                setattr(cfg, key, value)
        self.keys_before = {key: getattr(cfg, key) for key in self.KEYS}
        limits = {"memory": cfg.memory, "memory_lora": cfg.memory_lora, "world": world}
        self.asked = {key: value for key, value in self.keys_before.items() if key != "lora_rank"} | limits
        self.before = checkpoint["config"] if before.get("asked") == self.asked else None
        self.others = budget.besides(device, model, sound)
        self.limit = allowed(cfg, device, sum(self.others.values()))
        self.epoch = self.longest = None
        if batches:
            plan, prompts = batches.plan(0)
            self.epoch = steps_in_epoch(batches, cfg)
            self.longest = int(batches._lengths(prompts).max())

    def choose(self):
        """Set the keys of cfg and of the model. Returns lines that say what was chosen, and what memory it takes."""
        if self.before:  # a resumed run goes on as it was
            self.take({key: self.before[key] for key in self.KEYS})
            self.parts = max(1, self.asked["max_tokens"] // self.cfg.max_tokens)
        else:
            self.take(self.search())
        now = {key: getattr(self.cfg, key) for key in self.KEYS}
        changed = [f"{key} {old!r} -> {now[key]!r}" for key, old in self.keys_before.items() if old != now[key]]
        return [f"memory = {self.cfg.memory!r}: {', '.join(changed) or 'nothing has to change'}",
                budget.memory_line({**self.kinds, **self.others})]  # fmt: skip

    def halve(self):
        """After a step that took more than foreseen: half the micro-batch. Returns a line. Raises ValueError where
        it is one utterance already."""
        cfg = self.cfg
        keys = {key: getattr(cfg, key) for key in self.KEYS}
        if 2 * self.parts > self.most_parts():
            raise ValueError(f"memory = {cfg.memory!r} is too little even for one utterance of {self.longest} rows")
        self.parts *= 2
        self.take({**keys, **self.cut(self.parts, keys)})
        return (f"it is halved: max_tokens = {cfg.max_tokens}, max_batch = {cfg.max_batch}, "
                f"gradient_accumulation_steps = {cfg.gradient_accumulation_steps}")  # fmt: skip

    def most_parts(self):
        """Into how many a micro-batch can be divided."""
        if self.cfg.step_in_backward:  # takes one micro-batch a step
            return 1
        rows = self.longest or int(self.model.length(budget.USUAL_TEXT, budget.usual_frames(self.codec)))
        return max(1, self.asked["max_tokens"] // rows)

    def search(self):
        """The first keys that fit."""
        cfg = self.cfg
        most = self.most_parts()
        few = max(1, min(most, self.asked["max_tokens"] // FEW_ROWS))
        small = {}
        if "decoder_chunk" in field_names(type(self.model.config)):
            small = {"decoder_chunk": min(cfg.decoder_chunk or SMALL_CHUNK, SMALL_CHUNK)}
        adapter = [{"lora_rank": cfg.memory_lora}] if cfg.memory_lora and not cfg.lora_rank else []
        if self.fits(1, {}):
            return self.keys(1, {})
        for more in ({}, *adapter):
            for changes, largest in (({**small, **more}, few), ({**small, "recompute": True, **more}, most)):
                if self.fits(largest, changes):
                    least = bisect.bisect_left(range(1, largest), True, key=lambda n, c=changes: self.fits(n, c)) + 1
                    self.parts = least
                    return self.keys(least, changes)
        needed = sum({**self.kinds, **self.others}.values())
        advice = "raise it, " + ("" if cfg.memory_lora else "allow LoRA by memory_lora=16, ")
        raise ValueError(f"memory = {cfg.memory!r}: one utterance of the longest needs {budget.gigabytes(needed)} GB: "
                         f"{advice}or leave long recordings out with prepare.py's max_seconds")  # fmt: skip

    def fits(self, parts, changes):
        self.kinds, _ = self.forecast(self.keys(parts, changes))
        return sum({**self.kinds, **self.others}.values()) <= self.limit

    def keys(self, parts, changes):
        """All KEYS of a choice."""
        keys = {**{key: getattr(self.cfg, key) for key in self.KEYS}, **changes}
        return {**keys, **(self.cut(parts, keys) if parts > 1 else {})}

    def cut(self, parts, keys):
        """The keys that divide a micro-batch into so many; a step keeps its rows."""
        cut = {"max_tokens": self.asked["max_tokens"] // parts, "max_batch": math.ceil(self.asked["max_batch"] / parts)}
        micro = self.asked["gradient_accumulation_steps"] * parts
        if self.files:
            smaller = make_batches(SimpleNamespace(**{**vars(self.cfg), **keys, **cut}), self.model, self.files, ())[0]
            micro = len(smaller.plan(0)[0]) / self.epoch
        return {**cut, "gradient_accumulation_steps": max(1, round(micro / self.world)) * self.world}

    def forecast(self, keys):
        """The bytes by kind that a step with these keys takes, and its fullest micro-batch."""
        cfg = SimpleNamespace(**{**vars(self.cfg), **keys})
        model = budget.twin(self.model).train()
        apply(model, cfg)
        silent = []
        prepare_weights(model, len(self.files) if self.files else math.inf, cfg, self.checkpoint, silent.append)
        if self.files:
            candidates = budget.extreme_batches(make_batches(cfg, model, self.files, ())[0])
        else:
            candidates = [budget.supposed_batch(cfg, self.codec, model)[0]]
        return budget.heaviest(model, cfg, candidates, self.world)

    def take(self, keys):
        """Set these keys, of the model too, and find the memory that they need."""
        for key, value in keys.items():
            if getattr(self.cfg, key) != value:
                setattr(self.cfg, key, value)
                self.cfg.given[key] = f"memory = {self.cfg.memory!r}"
        apply(self.model, self.cfg)
        self.kinds, self.batch = self.forecast(keys)


def allowed(cfg, device, others):
    """The bytes that a process may take. Of all ranks the least counts."""
    limit = cfg.memory * 2**30 if cfg.memory != "auto" else SHARE_OF_FREE * (budget.free_memory(device) + others)
    if dist.is_initialized():
        least = torch.tensor(limit - others, dtype=torch.float64, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        limit = float(least) + others
    return limit


def disk_line(cfg, model, files, codec):
    """A line that says what the run will take on disk. codec: with which its checkpoints speak, or None."""
    own = [p for p in model.parameters() if p.requires_grad or not cfg.lora_rank]
    weights = sum(p.nbytes for p in own) * (1 + (cfg.ema > 0))
    pack = sum(x.nbytes for x in codec.pack().get("tables", {}).values()) if codec else 0
    memory = sum(budget.weigh(model, cfg, 1).values())[4]
    alone = weights + pack
    tokens = "token files not known yet"
    if files:
        paths = [path for folder in token_folders(cfg.data_dir) for path in glob.glob(f"{glob.escape(folder)}/*")]
        tokens = f"token files {budget.gigabytes(sum(map(os.path.getsize, paths)))} GB"
    kept = f", {budget.gigabytes(alone)} for each of keep_last = {cfg.keep_last}" if cfg.keep_last else ""
    total = (2 + cfg.keep_last) * alone + memory
    return (f"disk: {tokens}; checkpoints {budget.gigabytes(total)} GB (last.pt {budget.gigabytes(alone + memory)}, "
            f"best.pt {budget.gigabytes(alone)}{kept}), while one is written up to {budget.gigabytes(alone + memory)} "
            "more")  # fmt: skip


def predict(cfg, device):
    """The dry run: print what the run would need, and if there are data, how long it would take on this device."""
    files = batches = codec = epoch = None
    if all(os.path.exists(os.path.join(folder, "meta.json")) for folder in token_folders(cfg.data_dir)):
        files = open_tokens(cfg.data_dir, "train")
        codec = load_codec(files.meta["codec"]["name"], files.folder)
    meta = files.meta if files else supposed_meta(configurator.configure(configurator.ROOT / "prepare.py", cfg.files))
    model, checkpoint = planned_model(cfg, codec, meta, "meta")
    if files:
        batches, _ = make_batches(cfg, model, files, ())
        epoch = steps_in_epoch(batches, cfg)
    schedule.count_steps(cfg, epoch)
    world = int(os.environ.get("WORLD_SIZE", 1))
    others = budget.besides(device, model, codec)
    if cfg.memory:
        print(*Fit(cfg, model, meta["codec"], batches, checkpoint, world, device, codec).choose(), sep="\n")
        batches = make_batches(cfg, model, files, ())[0] if files else None
    configurator.refuse_idle(cfg, idle_keys(cfg))
    prepare_weights(model, len(files) if files else math.inf, cfg, checkpoint)
    model = model.train().to("meta")
    needed = budget.report(cfg, model, meta["codec"], meta["tokenizer"]["vocab_size"], batches, others, world)
    print(disk_line(cfg, model, files, codec))
    if files:
        print(*schedule.timetable(cfg, epoch), sep="\n")
        print(duration(cfg, codec, files, needed, device, epoch))


def duration(cfg, codec, files, needed, device, epoch):
    """A line that says how long the run would take, from a few steps of it on this device. needed: bytes of memory;
    epoch: steps in one."""
    if needed > (free := budget.free_memory(device)):
        return f"not timed: {device} has {budget.gigabytes(free)} GB free"
    steps = cfg.max_iters
    if not (timed := time_steps(cfg, codec, files, device)):
        return f"not timed: {device} is out of memory"
    seconds, count = timed
    return (f"a step takes {seconds:.3g} s on {device} by {count} micro-batches; an epoch takes "
            f"{epoch * seconds / 3600:.3g} hours, {steps:,} steps take {steps * seconds / 3600:.3g} hours, evaluations "
            "aside")  # fmt: skip


def time_steps(cfg, codec, files, device, most=budget.MOST_TIMED):
    """Seconds of a step of the run on this device, and how many micro-batches were timed, at most `most`; None where it
    is out of memory. cfg counts in steps afterwards."""
    printed = []  # the same lines as those of the model without memory, or of the run
    model, checkpoint = planned_model(cfg, codec, files.meta, "cpu", printed.append)
    batches, _ = make_batches(cfg, model, files, ())
    schedule.count_steps(cfg, steps_in_epoch(batches, cfg), printed.append)
    prepare_weights(model, len(files), cfg, checkpoint, printed.append)
    model = model.train().to(device)
    world = int(os.environ.get("WORLD_SIZE", 1))
    optimizer = Optimizer(model, cfg, device, cfg.dtype == "float16")
    try:
        return budget.time_step(cfg, model, batches, optimizer, device, world, most)
    except (RuntimeError, MemoryError) as error:
        if not configurator.out_of_memory(error):
            raise
        return None

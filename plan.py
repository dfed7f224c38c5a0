"""What a run has before its first step: its batches, the keys that count, and the dry run, which says what it needs.

    python train.py config/elise.py --dry_run=True
"""

import math
import os
from dataclasses import fields

import torch

from codec import PUBLISHED, load_codec, published_sizes
from data import Batches, open_tokens, reference_kind, token_folders
from model import ARCHS, build
from parts import budget, configurator, schedule
from parts.optim import Optimizer
from weights import family_keys, from_pretrained, prepare_weights, starting_point


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
    if not cfg.lora_rank:
        idle |= {key: "lora_rank = 0" for key in vars(cfg) if key.startswith("lora_") and key != "lora_rank"}
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
    configurator.refuse_idle(cfg, idle_keys(cfg))
    prepare_weights(model, len(files) if files else math.inf, cfg, checkpoint)
    needed = budget.report(cfg, model.train().to("meta"), meta["codec"], meta["tokenizer"]["vocab_size"], batches)
    if files:
        print(*schedule.timetable(cfg, epoch), sep="\n")
        print(duration(cfg, codec, files, needed, device))


def duration(cfg, codec, files, needed, device):
    """A line that says how long the run would take, from a few steps of it on this device. needed: bytes of memory."""
    if needed > (free := budget.free_memory(device)):
        return f"not timed: {device} has {budget.gigabytes(free)} GB free"
    if not (timed := time_steps(cfg, codec, files, device)):
        return f"not timed: {device} is out of memory"
    seconds, count = timed
    return (f"a step takes {seconds:.3g} s on {device} by {count} micro-batches; {cfg.max_iters:,} steps take "
            f"{cfg.max_iters * seconds / 3600:.3g} hours, evaluations aside")  # fmt: skip


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

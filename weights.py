"""Weights: checkpoints, and where a run starts. layouts.py reads published weights, export.py writes them.

    from_pretrained("weights/csm-1b")                                the model of a checkpoint or of published weights
    python train.py config/csm_1b.py --init_from=weights/csm-1b      continues their training
    python weights.py export --ckpt=out/x/best.pt --out_dir=hub/x    writes a folder that transformers reads
    python weights.py inspect weights/csm-1b                         says what a file or a folder is

A checkpoint is one file with all that its model needs to speak and to resume. Checksums reveal a damaged one, and a
pickle runs no code: only tensors and plain containers are read from it.
"""

import collections
import math
import os
import re
import zipfile
from dataclasses import asdict, fields, is_dataclass
from typing import Literal

import torch

from codec import load_codec
from export import WITH_CODEC, export
from layouts import (
    assemble,
    find,
    holds_codec,
    is_published,
    known_fields,
    load,
    new_rows,
    peft_names,
    published_names,
    start,
)
from model import ARCHS, build, contradiction, field_names
from parts import configurator, lora, peft
from parts.files import need, whole
from parts.folder import kept_checkpoints
from parts.tensors import (
    UNBUILT,
    need_tensors,
    read_once,
    read_weights,
    reason,
    undamaged,
    unpickle,
    what_is,
    why_unread,
    write_pickle,
)
from parts.text import load_tokenizer
from released import RELEASES, find_codec, find_tokenizer

command = ""  # what to do: export, inspect
ckpt = ""  # to what: a checkpoint of train.py's, or published weights
base = ""  # of an adapter: the weights it was trained on, or their folder; empty: where they were then, or near by
out_dir = ""  # export: folder to write into
layout = ""  # export: how, see export.py, or peft: the adapter alone; empty: the first that the family has
dtype: Literal["", "float32", "bfloat16", "float16"] = ""  # export: of the weights; empty: as they are in ckpt


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

FORMAT = "parlando-1"


def is_named(x):
    return isinstance(x, dict) and all(isinstance(name, str) for name in x)


def is_evaluation(x):
    """Whether x is (iter, training loss, held-out loss), as `overfitting` reads it."""
    return isinstance(x, list | tuple) and len(x) == 3 and all(type(number) in (int, float) for number in x)


# The fields of a checkpoint, as `need` checks them. Those that a reader does not need may be missing
FIELDS = {
    "arch?": str, "model_config?": is_named, "config?": is_named, "iter?": int, "model?": dict, "ema?": dict,
    "base?": str, "origin?": str, "meta?": {"tokenizer": {"sha256": str}}, "codec?": {"name": str, "options": is_named},
    "codec_fingerprint?": str,
    "tokenizer?": {"kind": str, "model": bytes}, "probe?": dict, "references?": torch.Tensor, "timbres?": torch.Tensor,
    "train?": {
        "optimizers": list, "scaler": dict, "batches": {"epoch": int, "batch": int}, "seconds": (int, float),
        "best": lambda x: isinstance(x, float) and not math.isnan(x),
        "skipped": lambda x: isinstance(x, torch.Tensor) and x.shape == (2,),
        "window": lambda x: isinstance(x, dict) and all(isinstance(pair, torch.Tensor) for pair in x.values()),
        "history": lambda x: isinstance(x, list) and all(map(is_evaluation, x)),
    },
}  # fmt: skip
WHOLE = ("arch", "model_config", "config", "iter", "model", "meta", "codec", "codec_fingerprint", "tokenizer", "probe")


def save_checkpoint(path, checkpoint):
    """Write a dict as a checkpoint under a partial name, then rename it, so that the file at `path` is always whole.

    Raises OSError if that fails; an older file at `path` then stays.
    """
    with whole(path) as file:
        write_pickle(file, {"format": FORMAT, **checkpoint}, f"{path}: the checkpoint")


class Checkpoint(dict):
    """The dict that `load_checkpoint` returns; its `path` is for messages."""


def load_checkpoint(path, device="cpu", needed=()):
    """Read a checkpoint: a dict with all FIELDS, None for those it lacks. No code in the file is run.

    needed: the fields it must have; without those in WHOLE it can neither speak nor resume. The file's checksums are
    compared, which takes about 1 s per GB. Raises FileNotFoundError, and ValueError for a file that is truncated,
    damaged, not a checkpoint, not one of ours, or has fields that are missing or of other types.
    """
    if not os.path.isfile(path):
        found = f", it is {what_is(path)}" if os.path.isdir(path) else ""
        raise FileNotFoundError(f"{path}: no such checkpoint{found}")
    checkpoint = read_checkpoint(path, device)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"{path} is not a {FORMAT} checkpoint: train.py writes those")
    need(checkpoint, FIELDS, path)
    if missing := [field for field in needed if checkpoint.get(field) is None]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: train.py writes whole ones")
    found = Checkpoint({field.removesuffix("?"): None for field in FIELDS} | checkpoint)
    found.path = str(path)
    return found


@read_once
def read_checkpoint(path, device):
    """What torch.save wrote into an archive whose checksums are right. Raises ValueError."""
    if not zipfile.is_zipfile(path) or not undamaged(path):
        raise ValueError(f"{path} {why_unread(path, 'checkpoint')}")
    try:
        return unpickle(path, device)
    except Exception:  # torch.load raises many kinds of errors for other files
        raise ValueError(f"{path} {why_unread(path, 'checkpoint')}") from None


def load_model(checkpoint, device="cpu", dtype=torch.float32, base="", **changes):
    """The model of a checkpoint in eval mode, with the averaged weights if it has them.

    base: see find_base. changes: fields of its config to set, such as the rounds of demasking; None leaves them. Raises
    ValueError for an unknown family, an unknown field, impossible sizes, or weights that do not fit or are not finite;
    and FileNotFoundError for an adapter whose base is missing.
    """
    where = getattr(checkpoint, "path", "the checkpoint")
    if missing := [key for key in ("arch", "model_config", "model") if checkpoint.get(key) is None]:
        raise ValueError(f"{where} lacks {', '.join(missing)}: train.py writes whole ones")
    arch = checkpoint["arch"]
    if arch not in ARCHS:
        raise ValueError(f"{where} is of the unknown family {arch!r:.60}; this code has {', '.join(ARCHS)}")
    model, config = ARCHS[arch]
    given = {**checkpoint["model_config"], **known_fields(arch, changes)}
    given = {key: given[key] for key in given.keys() & field_names(config)}
    if checkpoint.get("base"):
        model = load_adapted(checkpoint, checkpoint.get("ema") or checkpoint["model"], given, device, base)
        return model.to(dtype=dtype).eval()
    try:
        model = model(config(**given))
    except UNBUILT as error:
        raise ValueError(f"{where}: no model has the config in it: {reason(error)}") from None
    load_weights(model, checkpoint.get("ema") or checkpoint["model"], where)
    return model.to(device=device, dtype=dtype).eval()


def load_adapted(checkpoint, state, given, device="cpu", base=""):
    """The model of an adapter's checkpoint: its base, with the adapter in `state`, which is active.

    given: the fields of its config, which are those of the adapter's run, not the base's. base: see find_base, whose
    path checkpoint["base"] is afterwards. Raises FileNotFoundError, and ValueError for a base that is an adapter, or
    another than the one it was trained on.
    """
    where = getattr(checkpoint, "path", "the checkpoint")
    path = find_base(where, checkpoint["base"], base, (checkpoint.get("config") or {}).get("out_dir"))
    text_vocab_size = given.pop("text_vocab_size", None)  # the base may have fewer, the others are in the adapter
    model = load_base(where, path, device, **given)
    try:
        lora.load_adapter(model, state)
    except ValueError as error:
        raise ValueError(f"{where} with the base {path}: {error}; --base=PATH names another one") from None
    model.config.text_vocab_size = text_vocab_size or model.config.text_vocab_size
    if new_rows(model):
        raise ValueError(f"{where} is damaged: it has {text_vocab_size} text ids, and fewer embeddings")
    checkpoint["base"] = path
    return model


def find_base(adapter, recorded, given="", out_dir=None):
    """The path of an adapter's base: `given`, or a file or folder of the recorded name in it; without it the recorded
    path, as it is, or seen from the adapter's folder as it was from the run's out_dir. Raises FileNotFoundError."""
    folder = os.path.dirname(adapter)
    places = [os.path.join(given, os.path.basename(recorded)), given] if given else [recorded]
    if not given:
        places.append(os.path.join(folder, recorded))
        if isinstance(out_dir, str) and os.path.isabs(out_dir) == os.path.isabs(recorded):
            places.append(os.path.normpath(os.path.join(folder, os.path.relpath(recorded, out_dir))))
    for place in places:
        if os.path.exists(place):
            return place
    raise FileNotFoundError(f"{adapter} is an adapter on {recorded}, but {given or recorded} does not exist: put the "
                            "base back, or name it by --base")  # fmt: skip


def load_base(adapter, base, device="cpu", **changes):
    """The model that an adapter is added to. Raises FileNotFoundError, and ValueError for a base that is an adapter."""
    if is_published(base):
        return load(base, device, **changes)
    checkpoint = load_checkpoint(base)
    if checkpoint["base"]:  # two adapters could name each other
        raise ValueError(f"{adapter} is damaged: its base {base} is an adapter itself")
    return load_model(checkpoint, device, **changes)


def peft_base(folder, given=""):
    """The path of the base of an adapter of peft's, see find_base. Raises FileNotFoundError, ValueError."""
    recorded = peft.read_settings(folder).get("base_model_name_or_path") or ""
    if not given and not recorded:
        raise ValueError(f"{folder} is an adapter that names no base: name it by --base")
    return find_base(os.path.join(folder, peft.CONFIG), recorded, given)


def add_peft(model, folder, name="default"):
    """Add an adapter of peft's to its base. It is active from now on. Raises FileNotFoundError, ValueError."""
    try:
        lora.load_adapter(model, peft.read(folder, *peft_names(model)), name)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def from_pretrained(path, device="cpu", dtype=torch.float32, base="", **changes):
    """The model of a checkpoint, of a published file or folder, or of a folder with an adapter of peft's; in eval mode.

    base: of an adapter, see find_base. changes: fields of its config to set; None leaves them. Raises
    FileNotFoundError, and ValueError for a file that is damaged, unknown or does not fit.
    """
    if peft.is_adapter(path):
        model = load_base(path, peft_base(path, base), device, **changes)
        add_peft(model, path)
        return model.to(dtype=dtype).eval()
    if is_published(path):
        return load(path, device, dtype, **changes)
    return load_model(load_checkpoint(path), device, dtype, base, **changes)


def load_weights(model, state, where="the checkpoint"):
    """load_state_dict with a ValueError of one line, which names the first tensor that is missing, unknown, of another
    shape or type, or not finite."""
    need_tensors(state, model.state_dict(), where)
    model.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# where a run starts from, and what it trains

# fixed for the life of an adapter
ADAPTER = ("lora_rank", "lora_alpha", "lora_rs", "lora_dropout", "lora_targets", "lora_also")


def family_keys(*kinds):
    """Names of the keys that are fields of the families' configs: those "fixed" by weights, the "free" ones, or all."""
    every = {f.name: f.metadata.get("key") for _, config in ARCHS.values() for f in fields(config)}
    return {name for name, kind in every.items() if kind in (kinds or ("fixed", "free"))}


def resumable(out_dir):
    """The checkpoint that the run in out_dir goes on from, and its path, that of last.pt. Raises FileNotFoundError
    where it is missing, ValueError where it is damaged."""
    path = os.path.join(out_dir, "last.pt")
    weights = kept_checkpoints(out_dir)[-1:]
    advice = f"; start from {weights[0]} with init_from, in another out_dir" if weights else ""
    try:
        checkpoint = load_checkpoint(path, needed=WHOLE)
    except FileNotFoundError:
        rest = advice or ": init_from is scratch, auto, resume or a checkpoint's path"
        raise FileNotFoundError(f"{path} does not exist{rest}") from None
    except ValueError as error:
        raise ValueError(f"{error}{advice}") from None
    if not checkpoint["train"]:
        raise ValueError(f"{path} holds weights only, as best.pt does: start from it with init_from, in another "
                         "out_dir")  # fmt: skip
    return checkpoint, path


def starting_point(cfg, codec, meta, say=print):
    """The model that init_from asks for, on the CPU, and our checkpoint that it comes from, or None.

    Afterwards cfg holds what the weights fix and the user did not give. Raises FileNotFoundError, and ValueError where
    the weights are of another codec, tokenizer or family, or where a given key contradicts them.
    """
    torch.manual_seed(cfg.seed)
    if cfg.init_from == "scratch":
        return build(cfg.arch, meta, vars(cfg)), None
    resume = cfg.init_from == "resume"
    path = os.path.join(cfg.out_dir, "last.pt") if resume else cfg.init_from
    if not resume and not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist: init_from is scratch, auto, resume or a checkpoint's path")
    given = {key: getattr(cfg, key) for key in cfg.given if getattr(cfg, key) is not None}
    model, checkpoint = trained_weights(path, cfg, given, codec, meta, say, resume)
    config = model.config
    if key := contradiction(config, given):
        fixed = getattr(config, key)
        advice = "leave it out, or start from scratch"
        if is_dataclass(fixed):
            fixed = vars(fixed)
            advice = f"--{key}= takes these sizes"
        raise ValueError(f"{cfg.given[key]}: {key} = {configurator.show(given[key])}, but {path:.100} was trained with "
                         f"{fixed!r:.120}: {advice}")  # fmt: skip
    for key in vars(cfg).keys() & {f.name for f in fields(config)}:
        value = getattr(config, key)
        if not is_dataclass(value):
            setattr(cfg, key, value)
        elif not getattr(cfg, key) or contradiction(config, {key: getattr(cfg, key)}):
            setattr(cfg, key, asdict(value))
    return model, checkpoint


def trained_weights(path, cfg, given, codec, meta, say, resume=False):
    """The model of a checkpoint, of published weights or of peft's, and the checkpoint if it is ours, else None.

    given: {key: value} of the user's keys; of these the model takes the free ones. Raises as starting_point does.
    """
    if not resume and peft.is_adapter(path):
        return from_peft(path, cfg, given, codec, meta, say)
    free = {key: value for key, value in given.items() if key in family_keys("free")}
    if not resume and is_published(path):
        return start(path, cfg.arch, meta, free, say, grown=not cfg.lora_rank), None
    checkpoint, path = resumable(cfg.out_dir) if resume else (load_checkpoint(path, needed=WHOLE), path)
    check_match(checkpoint, path, codec, meta, cfg)
    fix_keys(checkpoint, path, cfg, given, resume)
    config = {key: checkpoint["model_config"][key] for key in family_keys() & checkpoint["model_config"].keys()}
    checkpoint["config"] |= config  # older versions recorded the keys as given, even where the model differed
    state = checkpoint["model"] if resume else checkpoint["ema"] or checkpoint["model"]
    if checkpoint.get("base"):
        names = field_names(ARCHS[cfg.arch][1]) & checkpoint["model_config"].keys()
        own = {key: checkpoint["model_config"][key] for key in names}
        return load_adapted(checkpoint, state, {**own, **free}, base=cfg.base).train(), checkpoint
    try:
        model = build(cfg.arch, meta, {**checkpoint["model_config"], **free})
    except UNBUILT as error:
        raise ValueError(f"{path}: no model has the config in it: {reason(error)}") from None
    load_weights(model, state, path)
    return model, checkpoint


def from_peft(folder, cfg, given, codec, meta, say):
    """`trained_weights` of a folder with an adapter of peft's. In place of a checkpoint come the fields that one of the
    adapter would have."""
    base = peft_base(folder, cfg.base)
    model, checkpoint = trained_weights(base, cfg, given, codec, meta, say)
    add_peft(model, folder)
    its = peft.read_settings(folder)
    keys = {
        "lora_rank": its["rank"], "lora_alpha": float(its["lora_alpha"]), "lora_rs": bool(its.get("use_rslora")),
        "lora_dropout": float(its.get("lora_dropout") or 0), "lora_targets": its.get("target_modules"),
        "lora_also": its.get("modules_to_save") or [],
    }  # fmt: skip
    origin = checkpoint["origin"] if checkpoint else os.path.abspath(base)
    found = Checkpoint(arch=cfg.arch, config=keys, base=base, origin=origin)
    fix_keys(found, folder, cfg, given, resume=False)
    return model, found


def check_match(checkpoint, path, codec, meta, cfg):
    """Raise ValueError where a checkpoint cannot serve this run: other codec, other tokenizer, damaged keys."""
    if checkpoint["codec_fingerprint"] != codec.fingerprint():
        raise ValueError(f"{path} and {cfg.data_dir} are of two codecs: prepare the data with the checkpoint's")
    if checkpoint["meta"]["tokenizer"]["sha256"] != meta["tokenizer"]["sha256"]:
        raise ValueError(f"{path} and {cfg.data_dir} are of two tokenizers: prepare the data with the checkpoint's")
    recorded = {key: value for key, value in checkpoint["config"].items() if key not in family_keys()}
    configurator.check_recorded("train.py", recorded, f"{path} is damaged: config")


def fix_keys(checkpoint, path, cfg, given, resume):
    """Give cfg the keys that may not change; raise ValueError where a given one contradicts the checkpoint."""
    fixed = ("arch",)
    if resume:  # the optimizers' memory is that of these optimizers
        fixed = ("arch", "muon", "sparse_embeddings", *ADAPTER)
    elif checkpoint.get("base") and given.get("lora_rank"):  # it goes on as an adapter
        fixed = ("arch", *ADAPTER)
    for key in fixed:
        old = {**checkpoint["config"], "arch": checkpoint["arch"]}.get(key, getattr(cfg, key))
        if given.get(key, old) != old:
            raise ValueError(f"{cfg.given[key]}: {key} = {configurator.show(given[key])}, but {path:.100} was trained "
                             f"with {old!r:.100}: leave it out, or start from scratch")  # fmt: skip
        setattr(cfg, key, old)


def freeze_parameters(model, patterns):
    """Freeze the parameters whose names match. Raises ValueError if a pattern matches none, or if all are frozen."""
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
    """Choose what is trained: an adapter (lora_rank), or all weights but those in `freeze`.

    Where `freeze` is None, a resumed run keeps that of its checkpoint, and a run that continues trained weights on few
    utterances takes the family's advice. cfg.freeze holds the choice afterwards.
    """
    if not cfg.lora_rank:
        if lora.adapters(model):
            lora.merge(model)
            model.requires_grad_(True)
        if checkpoint and cfg.init_from == "resume":
            cfg.freeze = checkpoint["config"]["freeze"] if cfg.freeze is None else cfg.freeze
        elif cfg.freeze is None and cfg.init_from != "scratch":
            cfg.freeze = model.small_set_freeze(utterances)
            if cfg.freeze:
                say(f"{utterances:,} utterances are few to go on with: freeze={cfg.freeze!r}; --freeze=[] trains all")
        cfg.freeze = cfg.freeze or []
        return freeze_parameters(model, cfg.freeze)
    if cfg.freeze:
        raise ValueError("freeze and lora_rank: LoRA freezes all weights itself, choose layers by lora_targets")
    if not lora.adapters(model):
        settings = dict(rank=cfg.lora_rank, alpha=cfg.lora_alpha, rs=cfg.lora_rs, dropout=cfg.lora_dropout)
        names = published_names(model)
        lora.add_lora(model, **settings, targets=cfg.lora_targets, also=cfg.lora_also, rows=new_rows(model),
                      published=names)  # fmt: skip
        kinds = collections.Counter(path.rpartition(".")[2] for path in lora.adapters(model)["default"])
        say(f"an adapter of rank {cfg.lora_rank} beside {', '.join(f'{n} {kind}' for kind, n in kinds.items())}")
    lora.cast_base(model, getattr(torch, cfg.lora_base_dtype))


# ---------------------------------------------------------------------------------------------------------------------
# the command


def source_of(path, dtype=None, base=""):
    """The model of a checkpoint, its adapters merged, or of published weights, and what `export` writes beside it.

    base: of an adapter, see find_base. Returns the model and {field of export.Source: value}. Raises as from_pretrained
    does.
    """
    notes = []
    if peft.is_adapter(path):
        model, known = source_of(peft_base(path, base), dtype)
        add_peft(model, path)
        lora.merge(model)
        return model, known
    if is_published(path):
        layout, tensors, given, file = find(path)
        model = assemble(layout, tensors, given, file, dtype=dtype)
        release = RELEASES[layout.arch]
        name = release.codec(model.config.n_codebooks, model.config.codebook_size)
        tokenizer = at_hand(notes, find_tokenizer, "", file, release)
        codec = None
        if layout.arch in WITH_CODEC:
            codec = at_hand(notes, find_codec, name, "", file, holds_codec(tensors))
        text_format = release.text_format
    else:
        checkpoint = load_checkpoint(path)
        model = load_model(checkpoint, base=base)
        for name in lora.adapters(model):
            lora.merge(model, name)
        saved, pack = checkpoint["tokenizer"], checkpoint["codec"]
        tokenizer = load_tokenizer(saved["kind"], saved["model"]) if saved else None
        codec = at_hand(notes, load_codec, pack["name"], pack, os.path.dirname(path)) if pack else None
        text_format = (checkpoint["meta"] or {}).get("text_format", "")
        tensors, given, file = origin(checkpoint, notes)
    return model, dict(tokenizer=tokenizer, codec=codec, text_format=text_format, tensors=tensors, given=given,
                       file=file, dtype=dtype, notes=notes)  # fmt: skip


def export_adapter(path, folder, base=""):
    """Write the adapter of a checkpoint as peft does. Returns a note. Raises OSError, and ValueError for a checkpoint
    without an adapter, or what peft cannot express."""
    checkpoint = {} if is_published(path) else load_checkpoint(path)
    if not checkpoint.get("base"):
        raise ValueError(f"{path} holds no adapter: layout = 'peft' is for those")
    model = load_model(checkpoint, base=base)
    base = checkpoint["base"]
    published = is_published(base)
    peft.write(folder, lora.adapter_state(model), peft_names(model)[0], base if published else None)
    whole = "" if published else f" (which weights.py export writes from {base})"
    return f"{folder} is written: peft adds it to its base as published{whole}"


def at_hand(notes, read, *given):
    """What `read` returns; where a file of it is missing or unknown, None and a note that says so."""
    try:
        return read(*given)
    except (ValueError, OSError) as error:
        notes.append(str(error))
        return None


def origin(checkpoint, notes):
    """Tensors, config and file of the published weights that a checkpoint descends from. Where it descends from none,
    or where they are gone, which a note says: {}, {}, ""."""
    path = checkpoint["origin"]
    if path and os.path.exists(path):
        return find(path)[1:]
    if path:
        notes.append(f"{path}, from which it descends, is gone: what the model itself does not have is left out")
    return {}, {}, ""


def describe(path):
    """What a checkpoint, a file or folder of published weights, or one of peft's is: lines. Raises as from_pretrained
    does."""
    if peft.is_adapter(path):
        its = peft.read_settings(path)
        on, layers, also = (its.get(key) for key in ("base_model_name_or_path", "target_modules", "modules_to_save"))
        return [f"{path}: an adapter of peft's, of rank {its['rank']}, on {on or 'a base without a name'}",
                f"layers: {layers!r:.200}; whole: {also!r:.200}"]  # fmt: skip
    if is_published(path):
        layout, tensors, given, file = find(path, "meta")
        model = assemble(layout, tensors, given, file, device="meta")
        stored = read_weights(file)[0]
        packed = " quantised by mlx," if any(key.endswith(".scales") for key in stored) else ""
        lines = [f"{file}: published weights of the family {layout.arch},{packed} in its layout {layout.name!r}"]
        lines += [*sizes(model.config), f"parameters: {sum(p.numel() for p in model.parameters()):,}"]
        return [*lines, *types_of(stored), *beside(file, layout.arch, tensors)]
    checkpoint = load_checkpoint(path, needed=WHOLE)
    meta = checkpoint["meta"]
    codec = checkpoint["codec"]
    trained = "and can resume" if checkpoint["train"] else "and holds weights only"
    arch, config = (checkpoint[key] for key in ("arch", "config"))
    lines = [f"{path}: a checkpoint of the family {arch}, made at iter {checkpoint['iter']:,} {trained}"]
    if arch in ARCHS:
        names = field_names(ARCHS[arch][1]) & checkpoint["model_config"].keys()
        lines += sizes(ARCHS[arch][1](**{key: checkpoint["model_config"][key] for key in names}))
    if base := checkpoint["base"]:
        lines.append(f"an adapter of rank {config.get('lora_rank')} on {base}"
                     f"{'' if os.path.exists(base) else ', which does not exist'}")  # fmt: skip
    if came := checkpoint["origin"]:
        lines.append(f"it descends from {came}{'' if os.path.exists(came) else ', which is gone'}")
    place = f", weights at {codec['weights']}" if codec.get("weights") else ""
    lines.append(f"data: {config.get('data_dir')}; speakers: {', '.join(meta.get('speakers') or []):.200}")
    lines.append(f"codec: {codec['name']} {checkpoint['codec_fingerprint']}{place}")
    lines.append(f"tokenizer: {checkpoint['tokenizer']['kind']}, {meta['tokenizer'].get('vocab_size')} ids")
    weights = {key: x for key, x in checkpoint["model"].items() if isinstance(x, torch.Tensor)}
    return [*lines, *types_of(weights)]


def sizes(config):
    """The sizes of a model, one line for each stack of layers and one for the rest."""
    given = asdict(config)
    stacks = {key: value for key, value in given.items() if isinstance(value, dict)}
    keys = ("n_layer", "d_model", "n_head", "n_kv_head", "d_ff", "max_positions")
    lines = [f"{name}: {', '.join(f'{key} {stack[key]:,}' for key in keys)}" for name, stack in stacks.items()]
    rest = ", ".join(f"{key} {given[key]:,}" for key in ("text_vocab_size", "n_codebooks", "codebook_size"))
    return [f"sizes: {rest}{f', mode {config.mode}' if config.mode else ''}", *lines]


def types_of(tensors):
    """How many numbers there are, by type."""
    counts = collections.Counter()
    for tensor in tensors.values():
        counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return [f"{len(tensors):,} tensors: {', '.join(f'{n:,} numbers in {kind}' for kind, n in counts.most_common())}"]


CARD = r"licen[sc]e|clon|imperson|consent|misuse|commercial"  # what a model card says of who may do what


def beside(file, arch, tensors):
    """What lies beside published weights: tokenizer, codec, licence, and what the model card says of cloning."""
    folder = os.path.dirname(file) or "."
    names = sorted(os.listdir(folder))
    notes = []
    tokenizer = at_hand(notes, find_tokenizer, "", file, RELEASES[arch])
    lines = [f"tokenizer: {tokenizer.vocab_size:,} ids" if tokenizer else f"tokenizer: {notes[0]}"]
    codecs = ["inside (codec_model)"] if holds_codec(tensors) else []
    codecs += [name for name in names if name == "dvae.pth" or name.endswith(".nemo") or name.startswith("tokenizer-")]
    lines.append(f"codec: {', '.join(codecs) or 'none beside it'}")
    texts = [name for name in names if re.match(r"(readme|license|licence|copying)", name, re.I)]
    for name in texts:
        with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
            said = [line.strip(" #*->|\n") for line in file]
        said = [line for line in said if line]
        said = [line for line in said if re.search(CARD, line, re.I)] if name.lower().startswith("readme") else said[:2]
        lines += [f"{name}: {line:.200}" for line in said[:12]]
    return lines if texts else [*lines, "licence: no model card and no licence beside it; look where it comes from"]


def main(cfg):
    if cfg.command not in ("export", "inspect") or not cfg.ckpt or not (cfg.out_dir or cfg.command == "inspect"):
        raise ValueError("give what to export, and where to: python weights.py export --ckpt=out/x/best.pt "
                         "--out_dir=hub/x; or what to look at: python weights.py inspect out/x/best.pt")  # fmt: skip
    if cfg.command == "inspect":
        return print(*describe(cfg.ckpt), sep="\n")
    if cfg.layout == "peft":
        return print(export_adapter(cfg.ckpt, cfg.out_dir, cfg.base))
    model, known = source_of(cfg.ckpt, getattr(torch, cfg.dtype, None), cfg.base)
    for note in export(model, cfg.out_dir, cfg.layout, **known):
        print(f"note: {note}")
    print(f"{cfg.out_dir} is written")


if __name__ == "__main__":
    configurator.run(main, __file__, ["command", "ckpt"])

"""Many training runs of one recipe, and their ranking: which values of the keys learn best?

    python sweep.py config/x.py --learning_rate=5e-5,1e-4,2e-4 --decoder_fraction=0.0625,0.125     all combinations
    python sweep.py config/x.py --lora_targets="q_proj,v_proj;all-linear" --lora_rank=8,16
    python sweep.py config/kani_lora.py config/kani_experiments.py                                 named experiments
    python sweep.py config/x.py --learning_rate=1e-5..1e-3 --sampler=tpe --trials=30               a search by optuna

- Keys of train.py go to all trials. A key with several values, separated by commas, makes a trial of each; values of a
  key that holds a list or a dict are separated by semicolons. Every value is checked before the first trial starts.
- A trial is an ordinary run of train.py, in out_dir/NAME. It speaks no samples unless eval_samples says so. What it
  prints is in NAME/log.txt.
- The same command goes on after a stop, in the middle of a trial too. A trial that fails is reported, the others go on,
  and the same command tries it again.
- On a machine with several GPUs each has a process of its own; else one trial follows the other in this process.
- results.csv and index.html rank the trials by `select_by`, at the last step that all complete trials have evaluated.
  `python evaluate.py --ckpt="out/x/*/best.pt"` lets them speak.

Exit codes: 0; 1 for an error or where a trial failed; 143 after SIGTERM and 130 after Ctrl-C, which finish the step and
save the trial.
"""

import contextlib
import csv
import gc
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
import traceback
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Literal, NamedTuple

import torch

import prepare
import train
from codec import load_codec
from data import open_tokens, read_meta, token_folders
from evaluate import NUMBERS, OF_SPEECH, Number, better
from model import build
from parts import configurator, schedule
from parts.files import need, whole
from parts.folder import alone_in
from parts.metrics import read_metrics
from parts.page import curves, write_page
from parts.tensors import pick_device, reading_once
from parts.text import package
from parts.workers import follow_parent
from plan import idle_keys, time_steps

# which trials; the axes are keys of train.py with several values
experiments: dict = {}  # {name: {key: value}}: combinations of keys that have a name, in a config file
# grid: every combination; tpe: optuna searches (pip install optuna) among the values, or from a lowest to a highest
# number, as in 1e-5..1e-3
sampler: Literal["grid", "tpe"] = "grid"
trials: "int >= 1" = 30  # tpe: how many
stop_hopeless = False  # end a trial that is worse than the median of 3 others or more at the same step
price: "float >= 0" = 0.0  # of an hour on a device, to say beforehand what the sweep costs; 0: not known

REFUSED = {
    "out_dir": "each trial has a folder in it",
    "select_by": "one number ranks all trials",
    "dry_run": "it is for all trials",
    "overwrite": "remove the sweep's folder to start over",
}
OF_PLACE = ("device", "loader_workers", "wandb_project", "tensorboard", "out_dir", "dry_run")  # change no result
FEWEST_RIVALS = 3  # trials whose median tells that another one is hopeless
LONGEST_LABEL, LONGEST_NAME = 40, 150  # letters
# states of a trial
WAITING = "waiting"
STARTED = "unfinished"
SAVED = "saved"  # by a signal
DONE = "done"
STOPPED = "stopped"
FAILED = "failed"
TIMED = 4  # micro-batches that tell what a step takes
SHOWN = 20  # trials in the ranking on the screen
VISIBLE = "CUDA_VISIBLE_DEVICES"
MOST_ASKED = 100  # proposals of optuna's, until one is new


# ---------------------------------------------------------------------------------------------------------------------
# which trials


class Range(NamedTuple):
    """All numbers from low to high, for a search."""

    key: str
    low: float
    high: float

    def distribution(self, optuna):
        """On a logarithmic scale where high is ten times low or more."""
        kind = optuna.distributions
        kind = kind.IntDistribution if type(self.low) is int else kind.FloatDistribution
        return kind(self.low, self.high, log=self.low > 0 and self.high >= 10 * self.low)

    def ends(self):
        return [self.low, self.high]

    def choice(self, value):
        """The label of a number, and its flag. Raises ValueError for one outside."""
        if not self.low <= value <= self.high:
            raise ValueError(f"{self.key}: {value} is not from {self.low} to {self.high}")
        value = value if type(self.low) is int else float(f"{value:.3g}")
        return f"{self.key}={short(value)}", {self.key: repr(value)}


class Choices(NamedTuple):
    """Some values, or experiments: {label: {key: text}}."""

    flags: dict

    def distribution(self, optuna):
        return optuna.distributions.CategoricalDistribution(list(self.flags))

    def ends(self):
        return list(self.flags)

    def choice(self, label):
        return label, self.flags[label]


class Trial(NamedTuple):
    """A run: its name, its folder, the arguments of train.py, the keys on which its results depend, and what optuna
    calls its choices {number of the axis: value}."""

    name: str
    folder: str
    argv: list
    keys: dict
    params: dict

    def config(self):
        """The keys of train.py. A run goes on where its folder holds one."""
        cfg = configurator.configure(train.__file__, self.argv)
        cfg.recipe["init_from"] = cfg.init_from
        cfg.init_from = "auto"
        return cfg


def short(value):
    """A value as a part of a file's name."""
    text = f"{value:g}" if type(value) is float else str(value)
    text = re.sub(r"[^\w.+-]+", "-", text).strip("-") or "none"
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 7]}-{digest(text)}"


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def axis_of(key, texts, kind):
    """The values of a key, as text, as an axis. Raises ValueError for a value that the key cannot have, or one that is
    there twice."""
    values = [configurator.checked(key, text, kind, f"--{key}", parse=True) for text in texts]
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"--{key}: {configurator.show(value)} is there twice")
    labels = [short(value) for value in values]
    if len(set(labels)) < len(labels):
        labels = [f"{label}-{digest(repr(value))}" for label, value in zip(labels, values, strict=True)]
    return Choices({f"{key}={label}": {key: text} for label, text in zip(labels, texts, strict=True)})


def range_of(key, text, kind):
    """A Range "low..high" of a key, or None. Raises ValueError."""
    ends = text.split("..")
    if len(ends) != 2 or not {int, float} & set(kind.types):
        return None
    low, high = (configurator.checked(key, end, kind, f"--{key}", parse=True) for end in ends)
    if not low < high:
        raise ValueError(f"--{key}: {text} is no range from a lower to a higher number")
    return Range(key, low, high)


def named_axis(named):
    """The experiments {name: {key: value}} as an axis. Raises ValueError for what is none."""
    for name, keys in named.items():
        if not re.fullmatch(r"[\w+-][\w.+-]*", name) or len(name) > LONGEST_LABEL:
            raise ValueError(f"experiments: {name!r:.60} is no name: letters, digits, _ . + -, at most {LONGEST_LABEL}")
        if type(keys) is not dict or not keys:
            raise ValueError(f"experiments: {name} is {configurator.show(keys)}, not a dict of keys")
    texts = {name: {key: x if type(x) is str else repr(x) for key, x in keys.items()} for name, keys in named.items()}
    return Choices(texts)


class Sweep:
    """The axes, the keys that all trials share, and the trials; `base` has the keys of a run without any axis."""

    def __init__(self, cfg):
        self.cfg = cfg
        known = configurator.read_defaults(train.__file__)
        self.axes = [named_axis(cfg.experiments)] if cfg.experiments else []
        self.varied = sorted({key for keys in cfg.experiments.values() for key in keys}) if cfg.experiments else []
        self.shared = []  # flags of all trials
        for key, text in cfg.passed:
            kind = known[key].kind
            texts = [x.strip() for x in text.split(";" if {list, tuple, dict} & {*kind.types} else ",")]
            if found := range_of(key, text, kind):
                if cfg.sampler == "grid":
                    raise ValueError(f"--{key}={text}: a range needs --sampler=tpe; a grid needs its values")
                self.axes.append(found)
            elif len(texts) > 1:
                self.axes.append(axis_of(key, texts, kind))
            else:
                self.shared.append(f"--{key}={text}")
                continue
            self.varied.append(key)
        for key in REFUSED.keys() & {*self.varied}:
            raise ValueError(f"{key} cannot differ among the trials: {REFUSED[key]}")
        if not self.axes:
            raise ValueError("give a key several values (--learning_rate=1e-4,2e-4), or a config file with experiments")
        self.varied = list(dict.fromkeys(self.varied))
        self.base = configurator.configure(train.__file__, [*cfg.files, *self.shared])
        if "overwrite" in self.base.given:
            raise ValueError(f"overwrite: {REFUSED['overwrite']}, {self.base.out_dir}")
        if "eval_samples" not in self.base.given and self.base.select_by not in OF_SPEECH:
            self.shared.append("--eval_samples=0")
        if not better(self.base.select_by):
            raise ValueError(f"select_by = {self.base.select_by!r}: neither low nor high is better, it ranks nothing")
        self.sign = -1 if better(self.base.select_by) == "high" else 1
        self.list = os.path.join(self.base.out_dir, "trials.json")  # of a search: what was proposed
        self.trials = self.grid() if cfg.sampler == "grid" else self.proposed()

    def trial(self, choices, params=None):
        """The trial of one choice (label, flags) from each axis."""
        name = ",".join(label for label, _ in choices)
        if len(name) > LONGEST_NAME:
            name = f"{name[: LONGEST_NAME - 7]}-{digest(name)}"
        folder = os.path.join(self.base.out_dir, name)
        flags = [f"--{key}={text}" for _, keys in choices for key, text in keys.items()]
        # flags win over an experiment's keys, as over a recipe's
        argv = [*self.cfg.files, *flags, *self.shared, f"--out_dir={folder}"]
        keys = vars(configurator.configure(train.__file__, argv))
        keys = {key: value for key, value in keys.items() if key not in OF_PLACE}
        return Trial(name, folder, argv, json.loads(json.dumps(keys)), params or {})

    def result(self, trial, until=math.inf):
        """The Result of a trial, its best number up to a step."""
        name = self.base.select_by
        lines = read_metrics(os.path.join(trial.folder, "metrics.jsonl"))
        judged = [line for line in lines if line["iter"] <= until and line.get(name) is not None]
        best = min(judged, key=lambda line: self.sign * line[name], default=None)
        state = read_state(trial)
        return Result(trial, state.get("state", WAITING), state.get("why", ""), lines, best, best and best[name])

    def probes(self):
        """Trials that have every value of every axis, the first and the last of them at opposite ends: a grid's own."""
        if self.cfg.sampler == "grid":
            return self.trials
        ends = [axis.ends() for axis in self.axes]
        longest = max(map(len, ends))
        return [self.trial([axis.choice(x[min(n, len(x) - 1)]) for axis, x in zip(self.axes, ends, strict=True)])
                for n in range(longest)]  # fmt: skip

    def grid(self):
        return [self.trial([axis.choice(x) for axis, x in zip(self.axes, labels, strict=True)])
                for labels in itertools.product(*(axis.ends() for axis in self.axes))]  # fmt: skip

    def proposed(self):
        """The trials that a search has proposed before."""
        try:
            with open(self.list, encoding="utf-8") as file:
                found = json.load(file)
            return [self.chosen(params) for params in found]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{self.list} is damaged, or of other axes: take another out_dir, or remove it") from None

    def chosen(self, params):
        """The trial of optuna's parameters {number of the axis: value}."""
        params = {str(n): params[str(n)] for n in range(len(self.axes))}
        return self.trial([axis.choice(x) for axis, x in zip(self.axes, params.values(), strict=True)], params)

    def propose(self):
        """Another trial of a search, or None where there are enough, or no new ones."""
        if self.cfg.sampler == "grid" or len(self.trials) >= self.cfg.trials:
            return None
        names = {trial.name for trial in self.trials}
        for n in range(MOST_ASKED):
            trial = self.chosen(ask_optuna(self, len(self.trials) + n * self.cfg.trials))
            if trial.name not in names:
                self.trials.append(trial)
                os.makedirs(self.base.out_dir, exist_ok=True)
                with whole(self.list, "w") as file:
                    json.dump([trial.params for trial in self.trials], file)
                return trial
        return None


def ask_optuna(sweep, number):
    """Parameters {number of the axis: value} that optuna's TPE proposes after the trials so far."""
    optuna = package("optuna", "sampler = 'tpe'")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {str(n): axis.distribution(optuna) for n, axis in enumerate(sweep.axes)}
    seed = (sweep.base.seed + number) % 2**32
    sampler = optuna.samplers.TPESampler(n_startup_trials=max(1, sweep.cfg.trials // 3), seed=seed)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    for result in map(sweep.result, sweep.trials):
        if result.number is not None and result.state in (DONE, STOPPED):
            study.add_trial(optuna.trial.create_trial(params=result.trial.params, distributions=space,
                                                      value=sweep.sign * result.number))  # fmt: skip
    return study.ask(space).params


# ---------------------------------------------------------------------------------------------------------------------
# one trial


class Outcome(NamedTuple):
    """How a trial ended: its state, why, and the exit code that a signal gives."""

    state: str
    why: str = ""
    code: int = 0


class Median:
    """The rule that ends a hopeless trial. Called with a line of metrics.jsonl, it tells whether the number `name` is
    worse than the median of the other trials (their folders) at the same step; `why` says so then."""

    def __init__(self, name, sign, folders):
        self.name = name
        self.sign = sign
        self.folders = folders
        self.why = ""

    def __call__(self, line):
        lines = (x for folder in self.folders for x in read_metrics(os.path.join(folder, "metrics.jsonl")))
        theirs = [x[self.name] for x in lines if x["iter"] == line["iter"] and x.get(self.name) is not None]
        own = line.get(self.name)
        if self.name in line and len(theirs) >= FEWEST_RIVALS:
            median = statistics.median(theirs)
            if own is None or self.sign * own > self.sign * median:
                own = "not finite" if own is None else f"{own:.4g}"
                self.why = f"{self.name} {own} at step {line['iter']}, the median of the others is {median:.4g}"
        return bool(self.why)


def read_state(trial):
    """What trial.json says: {"state", "why", "config"}; {} where nothing has begun. Raises ValueError for a damaged one
    and where the folder holds a trial with other keys."""
    path = os.path.join(trial.folder, "trial.json")
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        need(found, {"state": str, "why": str, "config": dict}, path)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged: remove {trial.folder}") from None
    before = found["config"]
    for key in [key for key in trial.keys if before.get(key, trial.keys[key]) != trial.keys[key]]:
        raise ValueError(f"{trial.folder} was made with {key} = {configurator.show(before[key])}, now it is "
                         f"{configurator.show(trial.keys[key])}: take another out_dir, or remove it")  # fmt: skip
    return found


def write_state(trial, state, why=""):
    os.makedirs(trial.folder, exist_ok=True)
    with whole(os.path.join(trial.folder, "trial.json"), "w") as file:
        json.dump({"state": state, "why": why, "config": trial.keys}, file, indent=1)


def carry_out(trial, median=None):
    """Train one trial in this process, from its start or from where it stopped. Returns its Outcome, which is in
    trial.json too. median: ends a hopeless one."""
    write_state(trial, STARTED)
    log = os.path.join(trial.folder, "log.txt")
    try:
        with (
            open(log, "a", encoding="utf-8", errors="backslashreplace") as file,
            contextlib.redirect_stdout(file),
            reading_once(),  # what the trials start from
        ):
            outcome = train_in(trial, median)
    finally:
        free_memory()
    if outcome.state != SAVED:
        write_state(trial, outcome.state, outcome.why)
    return outcome


def free_memory():
    """Let go of the model before, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def train_in(trial, median):
    """The Outcome of a trial's training, which prints to standard output."""
    try:
        train.main(trial.config(), median)
    except SystemExit as left:
        return Outcome(SAVED, code=left.code)
    except Exception as error:  # whatever it is, the other trials go on
        traceback.print_exc(file=sys.stdout)
        return Outcome(FAILED, configurator.in_a_line(error))
    return Outcome(STOPPED, median.why) if median and median.why else Outcome(DONE)


# ---------------------------------------------------------------------------------------------------------------------
# where trials run


class Here:
    """This process in place of an executor: what is submitted is done at once."""

    pid = None

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self):
        pass


class Elsewhere(ProcessPoolExecutor):
    """A process of its own that sees one GPU. It ends with its parent, however that ends."""

    def __init__(self, gpu):
        super().__init__(1, multiprocessing.get_context("spawn"), follow_parent)
        self.gpu = gpu
        before = os.environ.get(VISIBLE)
        os.environ[VISIBLE] = gpu
        try:
            self.pid = self.submit(os.getpid).result()  # the process starts now, with this environment
        finally:
            del os.environ[VISIBLE]
            if before is not None:
                os.environ[VISIBLE] = before


def visible_gpus(device):
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them, where several serve `device`; else []."""
    if device not in ("auto", "cuda") or torch.cuda.device_count() < 2:
        return []
    given = os.environ.get(VISIBLE)
    return given.split(",") if given else [str(n) for n in range(torch.cuda.device_count())]


class Team:
    """The processes that trials run in. A signal to this one goes to all of them; `stopped_by` is its number then."""

    def __init__(self, gpus):
        self.free = [Elsewhere(gpu) for gpu in gpus] or [Here()]
        self.busy = {}  # {future: (process, trial)}
        self.stopped_by = 0

    def __enter__(self):
        self.before = {}
        if not isinstance(self.free[0], Here):  # there train.main has its own
            self.before = {number: signal.signal(number, self.stop) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc):
        for process in self.free + [process for process, _ in self.busy.values()]:
            process.shutdown()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop(self, number, _):
        self.stopped_by = number
        for process, _ in self.busy.values():
            os.kill(process.pid, signal.SIGTERM)

    def begin(self, trial, median):
        process = self.free.pop()
        self.busy[process.submit(carry_out, trial, median)] = process, trial

    def finished(self):
        """Wait for a trial to end, and yield those that have: (trial, Outcome)."""
        for future in wait(self.busy, return_when=FIRST_COMPLETED).done:
            process, trial = self.busy.pop(future)
            try:
                outcome = future.result()
            except BrokenProcessPool:
                process.shutdown()
                outcome = Outcome(SAVED)
                if not self.stopped_by:
                    outcome = Outcome(FAILED, "its process was killed, perhaps for lack of memory")
                    write_state(trial, outcome.state, outcome.why)
                    process = Elsewhere(process.gpu)
            self.stopped_by = self.stopped_by or max(0, outcome.code - 128)
            self.free.append(process)
            yield trial, outcome


# ---------------------------------------------------------------------------------------------------------------------
# before the first trial


def prepare_data(sweep):
    """Prepare the data by the recipe where they do not exist."""
    for data_dir in {str(x): x for x in (trial.keys["data_dir"] for trial in sweep.probes())}.values():
        folders = list(token_folders(data_dir))
        if len(folders) == 1 and not os.path.exists(folders[0]):
            print(f"{folders[0]} does not exist: preparing the data")
            argv = [*sweep.cfg.files, f"--data_dir={folders[0]}"]
            prepare.main(configurator.configure(prepare.__file__, argv))


def check(trial, device):
    """Refuse before the first trial what can be: data that rank nothing, keys without effect, sizes that make no model.
    Raises ValueError that begins with the trial's name."""
    cfg = configurator.configure(train.__file__, trial.argv)
    try:
        metas = [read_meta(folder) for folder in token_folders(cfg.data_dir)]
        if not any(meta["splits"]["val"]["utterances"] for meta in metas):
            raise ValueError(f"{cfg.data_dir}: the val split is empty, nothing can rank the trials")
        if cfg.init_from == "resume":
            raise ValueError("init_from = 'resume': a sweep goes on by itself, name what the trials start from")
        train.check(cfg, 1, device)
        if cfg.init_from == "scratch":
            with torch.device("meta"):
                build(cfg.arch, metas[0], vars(cfg))
        warnings = []  # those of the recipe are the same for all trials, and in their logs
        schedule.count_steps(cfg, say=warnings.append)
        configurator.refuse_idle(cfg, idle_keys(cfg), warnings.append)
    except ValueError as error:
        raise ValueError(f"{trial.name}: {error}") from None
    read_state(trial)


def forecast(sweep, left, count):
    """A line about time and price, from a few steps of the trials at both ends of the axes, on one of `count` devices.
    left: how many trials are to come, a part of one that has begun."""
    device = torch.device(pick_device(sweep.base.device))
    probes = sweep.probes()
    measured = []
    for trial in {trial.name: trial for trial in (probes[0], probes[-1])}.values():
        cfg = configurator.configure(train.__file__, trial.argv)
        files = open_tokens(cfg.data_dir, "train")
        timed = time_steps(cfg, load_codec(files.meta["codec"]["name"], files.folder), files, device, TIMED)
        if not timed:
            return f"{left:.3g} trials to come, not timed: {device} is out of memory"
        measured.append((timed[0], cfg.max_iters))
    work = left * statistics.mean(seconds * steps for seconds, steps in measured)
    ends = list(dict.fromkeys(f"{seconds:.3g} s" for seconds, _ in sorted(measured)))
    cost = f"; at {sweep.cfg.price:g} an hour that costs {work / 3600 * sweep.cfg.price:.2f}" if sweep.cfg.price else ""
    return (f"{left:.3g} trials to come, a step takes {' to '.join(ends)} on {device}: {spell(work / count)}"
            f"{f' on {count} GPUs' if count > 1 else ''}, evaluations aside{cost}")  # fmt: skip


def to_come(sweep):
    """How many trials are to come; of one that has begun, the part that is left."""
    found = [sweep.result(trial) for trial in sweep.trials]
    shares = [x.steps / max(1, x.trial.keys["max_iters"]) for x in found if x.state not in (DONE, STOPPED)]
    more = sweep.cfg.trials - len(found) if sweep.cfg.sampler == "tpe" else 0
    return sum(max(0.0, 1 - share) for share in shares) + max(0, more)


def spell(seconds):
    """A duration in words."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


# ---------------------------------------------------------------------------------------------------------------------
# results


class Result(NamedTuple):
    """What a trial has come to. lines: of metrics.jsonl; best: the one of these with the best number, or None."""

    trial: Trial
    state: str
    why: str
    lines: list
    best: dict | None
    number: float | None

    @property
    def steps(self):
        return self.lines[-1]["iter"] if self.lines else 0

    @property
    def seconds(self):
        """Of training, without evaluations."""
        return sum(line["timing"]["seconds"] for line in self.lines)


def rank(sweep):
    """The Results of all trials, the best first, and the step at which they are compared: the last one that all
    complete trials have evaluated, or None. Trials that did not get there come after the others."""
    name = sweep.base.select_by
    found = [sweep.result(trial) for trial in sweep.trials]
    evaluated = [{line["iter"] for line in x.lines if line.get(name) is not None} for x in found if x.state == DONE]
    step = max(set.intersection(*evaluated), default=None) if evaluated else None
    found = [sweep.result(x.trial, step or math.inf) for x in found]
    behind = {x.trial.name: max(0, (step or 0) - x.steps) for x in found}
    return sorted(found, key=lambda x: (x.number is None, behind[x.trial.name], sweep.sign * (x.number or 0))), step


def numbers_of(results, first):
    """The names of the numbers that evaluations gave, `first` first."""
    lines = [x.best for x in results if x.best]
    names = [name for line in lines for name, value in line.items() if type(value) is float]
    return list(dict.fromkeys([first, "val_loss", *(x for x in names if x.startswith("val_") or x in NUMBERS)]))


def write_results(sweep):
    """Write results.csv and index.html into out_dir. Returns what `rank` returns."""
    results, step = rank(sweep)
    columns = numbers_of(results, sweep.base.select_by)
    rows = []
    for place, x in enumerate(results, 1):
        numbers = [x.best.get(name) if x.best else None for name in columns]
        values = [x.trial.keys[key] for key in sweep.varied]
        row = [place if x.best else None, x.trial.name, *values, *numbers, x.steps, x.state, f"{x.seconds:.1f}", x.why]
        rows.append(["" if cell is None else cell for cell in row])
    with whole(os.path.join(sweep.base.out_dir, "results.csv"), "w", newline="") as file:
        head = ["rank", "name", *sweep.varied, *columns, "steps", "state", "seconds", "why"]
        csv.writer(file, lineterminator="\n").writerows([head, *rows])
    models = [{
        "name": x.trial.name, "config": x.trial.keys, "curves": curves(x.lines),
        "numbers": {name: x.best.get(name) if x.best else None for name in columns},
    } for x in results]  # fmt: skip
    write_page(os.path.join(sweep.base.out_dir, "index.html"), {
        "title": f"{len(results)} trials: {', '.join(sweep.varied)}", "rank_by": sweep.base.select_by,
        "columns": [{"name": name, **NUMBERS.get(name, Number(better(name), ""))._asdict()} for name in columns],
        "models": models,
    })  # fmt: skip
    return results, step


def show(sweep, results, step):
    """Print the ranking."""
    name = sweep.base.select_by
    at = f", the best up to step {step:,}, which all complete trials evaluated" if step else ""
    print(f"ranked by {name}{at}")
    for place, x in enumerate(results[:SHOWN], 1):
        number = "" if x.number is None else f"{x.number:.4f}"
        state = "" if x.state == DONE else f"  {x.state} at step {x.steps:,}{f': {x.why}' if x.why else ''}"
        print(f"{place:4} {number:>9}  {x.trial.name}{state}")
    print(f"{os.path.join(sweep.base.out_dir, 'results.csv')} has all of it, index.html beside it the curves")


# ---------------------------------------------------------------------------------------------------------------------
# the sweep


def tell(sweep, trial, outcome, settled, begin):
    """A line for the screen about a trial that has ended."""
    x = sweep.result(trial)
    number = "" if x.number is None else f" {sweep.base.select_by} {x.number:.4f}"
    words = {DONE: "", STOPPED: f", stopped: {x.why}", FAILED: f", failed: {outcome.why} (see log.txt there)"}
    print(f"{settled}: {trial.name}{number} at step {x.steps:,}{words.get(outcome.state, ', saved')}; "
          f"{spell(time.monotonic() - begin)} so far")  # fmt: skip
    sys.stdout.flush()


def run_all(sweep, team):
    """Run the trials that are not done, and those that a search proposes. Returns the number of those that failed."""
    failed = 0
    begin = time.monotonic()
    waiting = deque(x for x in sweep.trials if read_state(x).get("state") not in (DONE, STOPPED))
    settled = len(sweep.trials) - len(waiting)
    while True:
        while team.free and not team.stopped_by:
            trial = waiting.popleft() if waiting else sweep.propose()
            if trial is None:
                break
            median = None
            if sweep.cfg.stop_hopeless:
                median = Median(sweep.base.select_by, sweep.sign, [x.folder for x in sweep.trials if x != trial])
            team.begin(trial, median)
        if not team.busy:
            return failed
        for trial, outcome in team.finished():
            settled += outcome.state != SAVED
            failed += outcome.state == FAILED
            total = sweep.cfg.trials if sweep.cfg.sampler == "tpe" else len(sweep.trials)
            tell(sweep, trial, outcome, f"{settled} of {total}", begin)
            write_results(sweep)


def main(cfg):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("sweep.py starts a process on each GPU itself: start it without torchrun")
    if cfg.sampler == "grid":
        configurator.refuse_idle(cfg, {"trials": "sampler = 'grid' tries all combinations"})
    sweep = Sweep(cfg)
    device = torch.device(pick_device(sweep.base.device))
    prepare_data(sweep)
    for trial in {x.name: x for x in (*sweep.probes(), *sweep.trials)}.values():
        check(trial, device)
    gpus = visible_gpus(sweep.base.device)
    if left := to_come(sweep):
        print(forecast(sweep, left, max(1, len(gpus))))
        free_memory()
    if sweep.base.dry_run:
        return
    with alone_in(sweep.base.out_dir), Team(gpus if left else []) as team:
        failed = run_all(sweep, team)
        show(sweep, *write_results(sweep))
    if team.stopped_by:
        print("the same command goes on")
        sys.exit(128 + team.stopped_by)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    configurator.run(main, __file__, passes="train.py")

"""An honest, small bench. It measures, adds rows to benchmarks.jsonl, and prints BENCHMARKS.md from them.

    python bench.py data      are the recordings of a raw data set understood? Word error rate of a recogniser
    python bench.py sample    word errors and speed of models that speak digits: out/digits/best.pt, or --ckpt=a.pt,b.pt
    python bench.py judge     do the numbers of evaluate.py rank models that speak digits as their word errors do?
    python bench.py codec     what `mel` keeps of digits; speed and memory of the codecs with network weights
    python bench.py loss      seconds and memory of the loss of K classification heads
    python bench.py train     seconds and memory of a training step of each family
    python bench.py memory    how much memory steps take beside what the dry run forecasts, for two sizes of each family
    python bench.py speak     speed of models of published sizes that speak: one text at a time, eight at once
    python bench.py gpu       for a GPU machine, in ten minutes: the tests of the kernel, speak, loss, train
    python bench.py report    print BENCHMARKS.md: python bench.py report > BENCHMARKS.md

- Each way to do a job, ours or a peer's, runs in a fresh process. The order of the ways is random.
- Equality comes before speed: a way first gives its numbers for a small job. Where they differ from the reference, the
  row says so and the way is not timed.
- Beside the loss stands the floor: the three matrix products that any such loss needs, and nothing else. Beside
  speaking it is the time in which the memory gives all weights of a frame, once for each pass over them.
- Peers inside this file are plain torch and packages that pip installs: transformers, moshi, cut-cross-entropy,
  liger-kernel. If one cannot be imported, one line says so.

Any other peer is a command in an environment of its own:

    python bench.py loss --sizes=csm-512 --peer="peer/.venv/bin/python peer.py"

It reads the job as one JSON object from standard input, and prints one JSON object as the last line of its standard
output. A peer that fails or prints no JSON costs one line. The job always holds benchmark, case, device, dtype, threads
and repeats; repeats = 0 asks for the numbers alone. The answer holds

    seconds   a list of `repeats` numbers, after a warm-up; for a codec {"encode": [...], "decode": [...]}
    peak      bytes at most in use, or null; for the loss beyond inputs and gradients
    versions  {package: version}
    numbers   what has to be equal: {name: [number, ...]}; without it the row says "not compared"
    way       a name for the table; without it "peer"

For example, the job
    {"benchmark": "loss", "case": "csm-512, float32", "device": "cpu", "dtype": "float32", "threads": 2, "repeats": 3,
     "K": 31, "V": 2051, "D": 1024, "N": 512, "shared": false}
and the answer
    {"way": "mine", "versions": {"mine": "1.0"}, "seconds": [1.41, 1.39, 1.4], "peak": 5.1e6,
     "numbers": {"loss": [246.1], "hidden": [0.01, -0.02], "weight": [0.003]}}

- loss: with rng = numpy.random.default_rng(0), in this order: hidden = rng.standard_normal((N, K, D), float32), or
  (N, D) if shared; weight = rng.standard_normal((K, V, D), float32) / sqrt(D); target = rng.integers(V, size=(N, K)).
  The loss is the sum over codebooks of means over rows. Numbers: the loss, and of the gradients of hidden and weight
  flat[:: max(1, len(flat) // 1000)].
- train: arch, fields of its config in model.py, utterances, text_rows, frames; lora, arguments of parts/lora.py's
  add_lora, or null. A command draws weights of its own, so it gives no numbers.
- codec: codec, seconds, frame_rate, samples_per_frame, n_codebooks, codebook_size; `weights` is an empty folder for the
  numbers: draw weights and write them there in the layout in which the authors publish them; ours then loads them.
  Numbers: the codes of wav = 0.1 * rng.standard_normal((1, frames * samples_per_frame), float32), then the waveform of
  codes = rng.integers(codebook_size, size=(1, n_codebooks, frames)), thinned out as above.
- speak: arch, fields of its config in `sizes`, text_rows, frames, and how many texts are spoken `together`. Seconds are
  those of a frame: the median of all but the first, which waits for the text; of several texts they are
  {"one after another": [...], "eight at once": [...]}. Weights are random, so the likeliest class that is no stop is
  chosen. `weights` is an empty folder for the numbers, as for a codec: weights.pt there is a
  state_dict of ours. Numbers: the codes of a small model.
`python bench.py work` does one of these jobs from standard input in our own way: an example to read.

Letters in shapes: K codebooks, V classes, D width, N rows, B utterances, S rows of an utterance, C = K + 1 columns.
"""

import contextlib
import csv
import json
import math
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from functools import cache, lru_cache, partial
from importlib import metadata
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import codec as codecs
import evaluate
import model as models
from export import Source, export, kani_config, published
from layouts import KANI_LFM2, VALLE_V2, XTTS_V2
from model import (
    ARCHS,
    CSM,
    GPT2,
    IGNORE,
    LFM2,
    LLAMA3_ROPE,
    VALLE,
    Stage,
    field_names,
    multi_codebook_cross_entropy,
)
from parts import budget, configurator, lora
from parts.audio import read_audio
from parts.budget import forget_peak, glibc, peak, system_field
from parts.ears import RATE, WORDS, recognise, recogniser, word_errors
from parts.files import need
from parts.optim import Optimizer
from parts.segment import AUDIO, TEXT
from parts.tensors import pick_device
from sample import named
from speak import Engine, Utterance, ready
from voice import Voice

name = "data"  # what to do: data, sample, judge, codec, loss, train, speak, gpu, report
results = "benchmarks.jsonl"  # file of rows: measured ones are added, report reads them; empty: add none
note = ""  # a remark that the report prints under the table
raw = "data/digits"  # data, sample, judge, codec: raw data set of digits: a folder with metadata.csv and heldout.txt
limit: "int >= 0" = 0  # data, codec: utterances to listen to; 0: all
ckpt = "out/digits/best.pt"  # sample, judge: the models, separated by commas; judge also takes patterns
strings: "int >= 0" = 200  # sample, judge: new strings of 3 to 6 digits for each voice; 0: the held-out ones
voices = ""  # sample, judge: voices, separated by commas; empty: all of the data set
seconds: "0 <= float <= 3600" = 0.0  # codec: of audio; 0: as CODECS says
sizes = ""  # codec, loss, train, speak: names of sizes, separated by commas; empty: all
dtypes = "float32,bfloat16"  # loss, train: types to calculate in, likewise
ways = ""  # codec, loss, train, speak: who does it, likewise; --ways=ours is quick
fractions = "1/16,1"  # train, csm: shares of the frames that the depth decoder trains on
batches = "2"  # train: utterances of a batch, such as 2,32 for a GPU
peer = ""  # codec, loss, train, speak: a command that does the same job, see above
repeats: "int >= 1" = 3  # codec, loss, train, speak: how often to time each way, after a warm-up; the median counts

# sample, judge: of the draw, seed also of the new strings; and the form in which the model speaks
SHARED = {"voice.py": ["temperature"], "sample.py": ["seed", "quantize", "linear"]}
HERE = Path(__file__).resolve().parent
WORK = [sys.executable, str(HERE / "bench.py"), "work"]  # the command of our own ways
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# -----------------------------------------------------------------------------
# listening


def error_rates(results):
    """results: (group, reference, hypothesis) of each utterance -> {group: (utterances, words, errors)}, and "all"."""
    counts = {}
    for group, ref, hyp in results:
        for key in (group, "all"):
            old = counts.get(key, (0, 0, 0))
            counts[key] = old[0] + 1, old[1] + len(ref.split()), old[2] + word_errors(ref, hyp)
    return {key: counts[key] for key in sorted(counts, key=lambda key: (key == "all", key))}


def error_percent(results):
    """{group: word errors in percent}, "all" among them."""
    return {key: 100 * errors / max(words, 1) for key, (_, words, errors) in error_rates(results).items()}


def read_raw(folder, every=False):
    """The held-out utterances of a raw data set: [(path, text, speaker), ...]; all of them if none is held out, or with
    `every`. Raises FileNotFoundError."""
    path = os.path.join(folder, "metadata.csv")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; python data/digits/prepare.py makes the built-in data set")
    with open(path, newline="", encoding="utf-8") as file:
        rows = [(row["audio"], row["text"], row["speaker"]) for row in csv.DictReader(file)]
    listed = os.path.join(folder, "heldout.txt")
    if os.path.exists(listed) and not every:
        names = set(Path(listed).read_text(encoding="utf-8").split())
        rows = [row for row in rows if Path(row[0]).stem in names]
    return [(os.path.join(folder, audio), text, speaker) for audio, text, speaker in rows]


# -----------------------------------------------------------------------------
# rows


def machine(device="cpu"):
    """This machine: {"cpu": model, "cores": n, "instructions": "AVX2", "gpu": model}, the last only if it is used."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    found = {"cpu": model, "cores": os.cpu_count(), "instructions": torch.backends.cpu.get_cpu_capability()}
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


@cache
def commit():
    with contextlib.suppress(OSError):
        command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def record(cfg, values, device="cpu", versions=None):
    """Print a row, values {column: number or text}, and add it to the file of results."""
    print("  ".join(f"{column} {cell(value)}" for column, value in values.items()), flush=True)
    if not cfg.results:
        return
    flags = [f"--{key}={getattr(cfg, key)}" for key in cfg.given if key not in ("name", "results", "note")]
    row = {"benchmark": cfg.name, "date": time.strftime("%Y-%m-%d"), "machine": machine(device), "commit": commit(),
           "versions": {"torch": torch.__version__, **(versions or {})},
           "command": shlex.join(["python", "bench.py", cfg.name, *flags]), "values": values,
           "note": cfg.note}  # fmt: skip
    with open(cfg.results, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def cell(value):
    """A number of a row as text, three digits of a fraction."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def chosen(names, known, key):
    """The entries of `known` that a key with commas names; all of them if it is empty. Raises ValueError."""
    names = [name.strip() for name in names.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"{key} = {name!r}: choose from {', '.join(known)}")
    return {name: known[name] for name in names or known}


def read_rows(path):
    """The rows of a file of results; a later one takes the place of that of the same day, machine, case and way."""
    rows = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                values = row["values"]
                row["place"] = row["benchmark"], row["date"], describe(row["machine"])
                rows[row["place"], tuple(values), values.get("case"), values.get("way")] = row
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}, is not a row of results ({error!r:.60})") from None
    return list(rows.values())


def describe(machine):
    return f"{machine.get('gpu', machine['cpu'])}, {machine['cores']} cores, {machine['instructions']}"


def unique(items):
    return list(dict.fromkeys(items))


def bench_report(cfg):
    """Print all rows as Markdown: a heading for each benchmark, date and machine; tables without an empty cell."""
    rows = read_rows(cfg.results)
    print("# Benchmarks\n\n`python bench.py report > BENCHMARKS.md` prints this page from `benchmarks.jsonl`.")
    if not any("gpu" in row["machine"] for row in rows):
        print("Nothing is measured on a GPU yet.")
    for place in unique(row["place"] for row in rows):
        group = [row for row in rows if row["place"] == place]
        print(f"\n## {', '.join(place)}\n")
        print(*unique(f"    {row['command']}" for row in group), sep="\n")
        code = [f"commit {row['commit']}" for row in group]
        code += [f"{name} {version}" for row in group for name, version in row["versions"].items()]
        print(f"\nMeasured with {', '.join(unique(code))}.")
        for columns in unique(tuple(row["values"]) for row in group):
            cells = [map(cell, row["values"].values()) for row in group if tuple(row["values"]) == columns]
            print("", *[f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)], sep="\n")
        print(*unique(f"\n{row['note']}" for row in group if row.get("note")), sep="\n")


# -----------------------------------------------------------------------------
# ways: each in a process of its own

END = {}  # "at": the time.monotonic() at which all of them have to be done, if any


def ask(command, job):
    """Give a job to a command and return its answer, a dict. Raises ValueError, one line, if it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": str(job["threads"])}
    left = END.get("at", math.inf) - time.monotonic()
    if left < 1:
        raise ValueError("no time is left")
    try:
        done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=env,
                              timeout=None if left == math.inf else left)  # fmt: skip
    except OSError as error:
        raise ValueError(f"{command[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise ValueError("it was stopped, no time is left") from None
    lines = done.stdout.strip().splitlines() or [""]
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise ValueError(f"exit code {done.returncode}: {said[-1].removeprefix('error: '):.200}")
    try:
        answer = json.loads(lines[-1])
    except ValueError:
        raise ValueError(f"it printed no JSON object, but {lines[-1]!r:.60}") from None
    need(answer, {"seconds": (list, dict)} if job["repeats"] else {"numbers?": dict}, "its answer")
    return answer


@cache
def tell(line):
    print(line, flush=True)  # each line once


LIMITS = {"codes": 0.05, "waveform": 1e-3, "float32": 1e-4, "bfloat16": 5e-2}  # a code may tie with another


def differences(numbers, expected, dtype):
    """How far numbers {name: [...]} are from the expected ones: {name: (difference, whether that is too far)}. It is
    the largest one as a share of the largest value, for codes the share of unequal ones."""
    found = {}
    for name, right in expected.items():
        a, b = np.asarray(numbers.get(name, []), np.float64), np.asarray(right, np.float64)
        n = min(len(a), len(b))
        if n < 0.95 * len(b):
            off = math.inf
        elif name == "codes":
            off = float(np.mean(a[:n] != b[:n]))
        else:
            off = float(np.abs(a[:n] - b[:n]).max() / np.abs(b).max())
        found[name] = off, not off <= LIMITS.get(name, LIMITS[dtype])
    return found


def check_numbers(command, job, expected):
    """The answer to a small job, with "differs", how far its numbers are off, and "wrong", whether that is too far.
    expected: a function that takes a job as JSON and returns the right numbers."""
    answer = ask(command, job)
    if not answer.get("numbers"):
        return {**answer, "differs": "not compared", "wrong": False}
    own_weights = job["weights"] if os.listdir(job["weights"]) else ""
    off = differences(answer["numbers"], expected(json.dumps({**job, "way": "", "weights": own_weights})), job["dtype"])
    told = ", ".join(f"{name} {x:.1e}" for name, (x, _) in off.items())
    return {**answer, "differs": told, "wrong": any(far for _, far in off.values())}


def compare(cfg, job, small, ways, reference, columns):
    """Ask ways for a job, in random order, and record a row for each that does it.

    small: what is different in the job that gives the numbers. reference: the way of ours whose numbers are right; a
    way whose numbers differ is not timed. columns: a function (answer, {way: answer}) -> {column: value}.
    """
    commands = dict.fromkeys(ways, WORK) | ({"peer": shlex.split(cfg.peer)} if cfg.peer else {})
    expected = cache(lambda text: ask(WORK, {**json.loads(text), "way": reference})["numbers"])
    answers = {}
    for way in random.sample(list(commands), len(commands)):
        try:
            with tempfile.TemporaryDirectory() as folder:
                full = {**job, "way": way, "weights": folder}
                answer = {"differs": "the reference" if way == reference else "not compared", "wrong": False}
                if way not in (reference, "floor"):
                    answer = check_numbers(commands[way], {**full, **small, "repeats": 0}, expected)
                if not answer["wrong"]:
                    answer |= ask(commands[way], full)
                answers[answer.get("way", way)] = answer
        except ValueError as error:
            tell(f"without {way}: {error}" if "No module" in str(error) else f"{job['case']} without {way}: {error}")
    for way, answer in answers.items():
        values = {"not timed, its numbers differ by": answer["differs"]}
        if not answer["wrong"]:
            values = {**columns(answer, answers), "differs by": answer["differs"]}
        record(cfg, {"case": job["case"], "way": way, **values}, job["device"], answer.get("versions"))


def work(cfg):
    """Do one job from standard input, as a peer does."""
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    answer = JOBS[job["benchmark"]](job)
    packages = ("transformers", "moshi", "cut_cross_entropy", "liger_kernel")
    answer["versions"] = {name: metadata.version(name) for name in packages if name in sys.modules}
    print(json.dumps(answer))


def new_job(benchmark, case, dtype, repeats, **rest):
    device = pick_device("auto")
    return {"benchmark": benchmark, "case": case, "device": device, "dtype": dtype, "threads": torch.get_num_threads(),
            "repeats": repeats, **rest}  # fmt: skip


def sample_of(x):
    """About 1000 numbers of a tensor, evenly spread, as a list."""
    flat = x.detach().flatten()
    return flat[:: max(1, len(flat) // 1000)].double().cpu().tolist()


def timed(work, device):
    """Seconds that work() takes."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def in_units(answer, unit):
    return "not known" if answer.get("peak") is None else answer["peak"] / unit


def check_room(need, device):
    """Raise ValueError if `need` bytes are more than are free. The system would kill the process instead."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else system_field("/proc/meminfo", "MemAvailable")
    if free is not None and need > free:
        raise ValueError(f"it takes about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


# -----------------------------------------------------------------------------
# digits: recordings, models


def bench_data(cfg):
    """Word error rate of the held-out recordings, for each voice."""
    rows = tqdm(read_raw(cfg.raw)[: cfg.limit or None], "listening", unit="wav")
    results = [(voice, text, recognise(read_audio(path, RATE), RATE)) for path, text, voice in rows]
    for voice, (utterances, words, errors) in error_rates(results).items():
        record(cfg, {"case": voice, "utterances": utterances, "words": words, "errors": errors,
                     "word errors %": 100 * errors / max(words, 1)})  # fmt: skip


def new_strings(rows, speaker, n, seed):
    """n different strings of 3 to 6 digits that no recording of the speaker in `rows` reads."""
    rng = random.Random(f"{seed} {speaker}")
    known = {text for _, text, voice in rows if voice == speaker}
    found = []
    while len(found) < n:
        text = " ".join(rng.choices(WORDS, k=3 + len(found) % 4))
        if text not in known:
            known.add(text)
            found.append(text)
    return found


def texts_to_speak(cfg):
    """[(speaker, text), ...]: new strings for each voice, or the held-out ones. Raises ValueError for no such voice."""
    rows = read_raw(cfg.raw, every=cfg.strings > 0)
    wanted = chosen(cfg.voices, dict.fromkeys(voice for _, _, voice in rows), "voices")
    if not cfg.strings:
        return [(voice, text) for _, text, voice in rows if voice in wanted]
    return [(voice, text) for voice in wanted for text in new_strings(rows, voice, cfg.strings, cfg.seed)]


@lru_cache(maxsize=1)  # once in each process
def voice_of(ckpt, quantize, linear):
    return Voice.from_checkpoint(ckpt).ready(quantize, linear)


@torch.no_grad()
def held_out_losses(cfg, ckpt):
    """The held-out loss of a checkpoint in float32, and with linear layers and heads in fewer bits; {} where its data
    are gone."""
    voice = Voice.from_checkpoint(ckpt)
    model = voice.model
    try:
        files = evaluate.held_out_files(voice)
    except (OSError, ValueError):
        return {}
    plain = evaluate.held_out_loss(voice, files)["val_loss"]
    voice.ready(cfg.quantize, cfg.linear)
    for (weight, bias), head in zip(model.head_weights(), model.packed_heads or [], strict=False):
        # the loss reads the heads as they were; a unit matrix is exact in 8 bits, and its product the rounded weight
        weight.copy_((head(torch.eye(weight.shape[1])) - (0 if bias is None else bias)).T)
    fewer = evaluate.held_out_loss(voice, files)["val_loss"]
    return {"held-out loss": plain, f"{cfg.quantize}, % more": 100 * (fewer / plain - 1)}


def speak_and_listen(cfg, ckpt, utterance):
    """(speaker, text) -> (speaker, text, recognised), whether it ended by itself, seconds of work, seconds of audio."""
    voice = voice_of(ckpt, cfg.quantize, cfg.linear)
    speaker, text = utterance
    start = time.perf_counter()
    wav = voice.say(text, speaker=speaker, seed=cfg.seed, temperature=cfg.temperature)
    took = time.perf_counter() - start
    result = speaker, text, recognise(wav, voice.sample_rate)
    return result, voice.stopped, took, len(wav) / voice.sample_rate


def bench_sample(cfg):
    """Word errors of checkpoints for each voice, and their mean over the voices.

    Strings go to as many processes as there are cores, each with one thread. What a model says depends on its text and
    seed alone, so the numbers are those of one process.
    """
    texts = texts_to_speak(cfg)
    workers = 1 if torch.cuda.is_available() else os.cpu_count()
    for ckpt in cfg.ckpt.split(","):
        voice = voice_of(ckpt, cfg.quantize, cfg.linear)  # here too, so that what is wrong with it is one line
        with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            done = pool.map(partial(speak_and_listen, cfg, ckpt), texts)
            results, stopped, took, audio = zip(*tqdm(done, ckpt, len(texts), unit="wav"), strict=True)
        rates = error_percent(results)
        rates.pop("all")
        values = {"case": ckpt, "steps": voice.report["iter"]}
        values |= {f"{name}, word errors %": rate for name, rate in rates.items()}
        values |= {"mean %": statistics.mean(rates.values()), "ended": f"{sum(stopped)} of {len(results)}",
                   "real-time factor": sum(took) / max(sum(audio), 1e-9)}  # fmt: skip
        values |= held_out_losses(cfg, ckpt) if cfg.quantize else {}
        record(cfg, values, voice.device.type)


def bench_judge(cfg):
    """The numbers of evaluate.py for each checkpoint, and the rank correlation (Spearman 1904) of each number with the
    word errors over all of them: 1 where it ranks the models as these do. As there, the model with the lowest held-out
    loss judges all."""
    lines = [{"speaker": speaker, "text": text} for speaker, text in texts_to_speak(cfg)]
    listening = evaluate.Ears(recogniser("digits"))
    losses = {}
    for _, path in named(cfg.ckpt, "checkpoint"):
        voice = Voice.from_checkpoint(path)
        losses[path] = evaluate.held_out_loss(voice, evaluate.held_out_files(voice))
    best = min(losses, key=lambda path: losses[path]["val_loss"])
    judging = evaluate.Judge(Voice.from_checkpoint(best), {})
    found = []
    for path, loss in losses.items():
        voice = Voice.from_checkpoint(path).ready(cfg.quantize, cfg.linear)
        numbers = loss | evaluate.measure(voice, lines, cfg, listening, judging)[0]
        values = {name: numbers[name] for name in evaluate.NUMBERS if numbers.get(name) is not None}
        record(cfg, {"case": path, "steps": voice.report["iter"], **values}, voice.device.type)
        found.append(values)
    if len(found) > 2:
        names = [name for name in found[0] if name not in ("wer", "rtf") and all(name in values for values in found)]
        errors = [values["wer"] for values in found]
        agreed = {name: spearman([values[name] for values in found], errors) for name in names}
        agreed = {name: -x if evaluate.NUMBERS[name].better == "high" else x for name, x in agreed.items()}
        record(cfg, {"case": f"rank correlation with wer over {len(found)} models", **agreed})


def ranks(values):
    """The rank of each of n numbers, from 0 on; equal ones share the mean of their ranks."""
    x = np.asarray(values)
    return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) - 1) / 2


def spearman(a, b):
    """The rank correlation of two lists of numbers, 0 where all of one are equal."""
    a, b = (x - x.mean() for x in map(ranks, (a, b)))
    spread = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / spread) if spread else 0.0


# -----------------------------------------------------------------------------
# the loss of K heads

LOSS_SIZES = {
    "csm-512": dict(K=31, V=2051, D=1024, N=512, shared=False),  # the depth decoder of CSM and Marvis, so many frames
    "csm-4096": dict(K=31, V=2051, D=1024, N=4096, shared=False),
    "csm-16384": dict(K=31, V=2051, D=1024, N=16384, shared=False),
    "valle": dict(K=8, V=1025, D=1024, N=32768, shared=True),  # all heads read one state
    "kani": dict(K=1, V=80538, D=1024, N=8192, shared=False),
    "kani-512": dict(K=1, V=80538, D=1024, N=512, shared=False),  # 128 frames, each token against the whole vocabulary
    "kani-512-codebook": dict(K=4, V=4033, D=1024, N=128, shared=False),  # the same, against its own codebook
}
LOSSES = ("ours", "eager", "compiled", "torch chunked", "liger", "cut cross-entropy", "floor")
BY_HEAD = ("torch chunked", "liger", "cut cross-entropy")  # made for one head: each head is a parameter of its own


def loss_way(way, device):
    """A loss function: hidden (N, K, D) or (N, D), heads, target (N, K) -> the sum over codebooks of means.

    heads: [(K, V, D)], or K times (V, D) for the ways in BY_HEAD. Chunks and approximations are as their authors set
    them. Raises ImportError or ValueError if it cannot run here.
    """

    def each(one):
        def loss(hidden, heads, target):
            states = hidden.unbind(1) if hidden.ndim == 3 else [hidden] * len(heads)
            return sum(one(h, w, t) for h, w, t in zip(states, heads, target.T.contiguous(), strict=True))

        return loss

    def eager(hidden, heads, target):  # all logits (N, K, V) at once
        logits = torch.einsum("nkd,kvd->nkv" if hidden.ndim == 3 else "nd,kvd->nkv", hidden, heads[0])
        return F.cross_entropy(logits.flatten(0, 1), target.flatten()) * target.shape[1]

    if way == "ours":
        return lambda hidden, heads, target: multi_codebook_cross_entropy(hidden, heads[0], target)[0].sum()
    if way in ("eager", "reference", "compiled"):
        return torch.compile(eager) if way == "compiled" else eager
    if way == "torch chunked":  # torch's own form for several heads does not go by chunks
        return each(partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions()))
    if way == "liger":
        if device == "cpu":
            raise ValueError("its kernels need a GPU")
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        return each(lambda h, w, t: liger(w, h, t))
    from cut_cross_entropy import linear_cross_entropy

    return each(partial(linear_cross_entropy, impl="cce" if device == "cuda" else "torch_compile"))


def loss_inputs(job, dtype):
    """hidden, weight, target of a job, the first two rounded to the type of the job."""
    K, V, D, N = (job[key] for key in "KVDN")
    rng = np.random.default_rng(0)
    device = job["device"]
    hidden = rng.standard_normal((N, D) if job["shared"] else (N, K, D), np.float32)
    weight = rng.standard_normal((K, V, D), np.float32) * np.float32(D**-0.5)
    target = torch.from_numpy(rng.integers(V, size=(N, K)))
    rounded = [torch.from_numpy(x).to(device, DTYPES[job["dtype"]]).to(dtype) for x in (hidden, weight)]
    return *rounded, target.to(device)


def three_products(hidden, weight, device):
    """A function that does the three matrix products of a loss and nothing else: on a GPU for all heads at once, on a
    CPU for one after the other, which is faster there."""
    h, w = (hidden[None], weight.flatten(0, 1)[None]) if hidden.ndim == 2 else (hidden.transpose(0, 1), weight)
    pairs = [(h, w)] if device == "cuda" else list(zip(h, w, strict=True))
    h, w = pairs[0]
    columns = w.shape[-2]  # rows begin at multiples of 64 numbers, which is fast for caches and tensor cores
    x = torch.empty(*h.shape[:-1], math.ceil(columns / 64) * 64, dtype=h.dtype, device=device)[..., :columns]
    dh, dw = torch.empty_like(h), torch.empty_like(w)

    def products():
        for h, w in pairs:
            torch.matmul(h, w.mT, out=x)
            torch.matmul(x, w, out=dh)
            torch.matmul(x.mT, h, out=dw)

    return products


def loss_job(job):
    """Numbers, seconds and memory of one way; way = "reference": the eager loss in float64."""
    way, device = job["way"], job["device"]
    hidden, weight, target = loss_inputs(job, torch.float64 if way == "reference" else DTYPES[job["dtype"]])
    inputs = hidden.nbytes + weight.nbytes
    logits = target.numel() * job["V"] * hidden.itemsize
    check_room(inputs + {"eager": 3, "compiled": 2}.get(way, 0) * logits, device)  # gradients, copies of logits
    if way == "floor":
        products = three_products(hidden, weight, device)
        return {"seconds": [timed(products, device) for _ in range(1 + job["repeats"])][1:]}
    loss = loss_way(way, device)
    heads = [w.requires_grad_() for w in (weight.unbind() if way in BY_HEAD else [weight])]
    hidden.requires_grad_()

    def once():
        value = loss(hidden, heads, target)
        return value, *torch.autograd.grad(value, [hidden, *heads])

    value, of_hidden, *of_heads = once()  # this also compiles, and fills tables that are made once
    numbers = {"loss": [value.item()], "hidden": sample_of(of_hidden), "weight": sample_of(torch.cat(of_heads))}
    del value, of_hidden, of_heads
    seconds = [timed(once, device) for _ in range(job["repeats"])]
    if device == "cpu":  # map every large block by itself: it leaves when freed, so gaps in the heap do not count
        glibc("mallopt", -3, 2**16)  # M_MMAP_THRESHOLD
    before = forget_peak(device)
    once()
    return {"numbers": numbers, "seconds": seconds, "peak": None if before is None else peak(device) - before - inputs}


def bench_loss(cfg):
    """The loss of K heads: ours, peers', and the floor below all of them."""
    sizes, dtypes = chosen(cfg.sizes, LOSS_SIZES, "sizes"), chosen(cfg.dtypes, DTYPES, "dtypes")
    ways = {**chosen(cfg.ways, dict.fromkeys(LOSSES), "ways"), "floor": None}
    for size, dtype in product(sizes, dtypes):
        job = new_job("loss", f"{size}, {dtype}", dtype, cfg.repeats, **sizes[size])
        compare(cfg, job, {"N": min(job["N"], 64)}, ways, "reference", loss_columns)


def loss_columns(answer, answers):
    took = statistics.median(answer["seconds"])
    if "floor" not in answers:
        return {"seconds": took, "extra MB": in_units(answer, 1e6)}
    floor = statistics.median(answers["floor"]["seconds"])
    return {"seconds": took, "of floor": took / floor, "extra MB": in_units(answer, 1e6)}


# -----------------------------------------------------------------------------
# a step that trains

SMALL = dict(n_layer=2, n_head=8, n_kv_head=2, d_model=512, d_ff=2048, rope_scaling=LLAMA3_ROPE)
EVEN = {**SMALL, "n_kv_head": 8, "rope_scaling": None}
ADAPTED = dict(rank=16, alpha=16.0, rs=True, targets=["[qv]_proj", "gate_proj", "up_proj", "down_proj"])  # kani_lora.py
TRAIN_SIZES = {
    "small": dict(arch="csm", stop="zeros", text_vocab_size=4096, n_codebooks=32, codebook_size=2048,
                  backbone=SMALL, decoder={**SMALL, "d_model": 256, "d_ff": 1024}),
    "marvis": dict(arch="csm", stop="zeros", text_vocab_size=49152, n_codebooks=32, codebook_size=2048,
                   backbone="llama-250M", decoder="llama-60M"),
    "kani-lora": dict(arch="kani", text_vocab_size=64400, n_codebooks=4, codebook_size=4032, backbone="lfm2-350M",
                      lora={**ADAPTED, "dropout": 0.1}),
    "xtts": dict(arch="xtts", text_vocab_size=6681, n_codebooks=1, codebook_size=1024, text_bos=261, text_eos=0,
                 backbone="gpt2-xtts"),
    "valle": dict(arch="valle", text_vocab_size=256, n_codebooks=8, codebook_size=1024, backbone="valle-60M"),
}  # fmt: skip
# what is different in the job that gives the numbers
REDUCED = {
    "csm": {key: TRAIN_SIZES["small"][key] for key in ("text_vocab_size", "backbone", "decoder")},
    "kani": {"text_vocab_size": 512, "backbone": {**SMALL, **LFM2, "layers": "ca", "rope_scaling": None},
             "lora": {**ADAPTED, "dropout": 0.0}},
    "xtts": {"backbone": {**EVEN, **GPT2}, "conditioning_layers": 1},
    "valle": {"backbone": {**EVEN, **VALLE}},
}  # fmt: skip
FRACTIONS = {"1/16": 1 / 16, "1": 1.0}
# ours as train.py sets it up, then with its keys sparse_embeddings, and step_in_backward too; peers with torch's AdamW
STEPS = {"ours": [], "ours sparse": ["--sparse_embeddings=True"],
         "ours in backward": ["--sparse_embeddings=True", "--step_in_backward=True"], "ours compiled": [],
         "transformers": [], "transformers compiled": []}  # fmt: skip
WARM_UP = 3  # steps in which the optimizer's state is made and a process gets the memory that it goes on with
TINY_MIMI = dict(hidden_size=16, num_filters=2, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                 intermediate_size=8, codebook_size=8, codebook_dim=4, upsample_groups=4,
                 vector_quantization_hidden_dimension=4)  # fmt: skip


def model_of(job):
    model, config = ARCHS[job["arch"]]
    made = model(config(**{key: job[key] for key in job.keys() & field_names(config)}))
    if job["lora"]:
        lora.add_lora(made, **job["lora"])
    return made


def batch_of(c, job, seed):
    """tokens (B, S, C), segment (B, S) as `Batches` gives them; for an XTTS references (B, R, M) of 3 s, too."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(job["utterances"]):
        text = rng.integers(3, c.text_vocab_size, job["text_rows"])
        rows.append(c.layout(text, rng.integers(1, c.codebook_size, (job["frames"] - 1, c.n_codebooks))))
    batch = [torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)]
    if c.arch == "xtts":
        size = len(rows), round(3 * c.reference_rate), c.reference_bands
        batch.append(torch.from_numpy(rng.standard_normal(size, np.float32)))
    return batch


# A way: our model -> (its model, what it takes of a batch, its loss of that)


def our_step(model):
    return model, lambda *batch: batch, lambda net, *batch: net(*batch)[0]


def transformers_csm(ours):
    """The same model in transformers, by the export of weights.py."""
    from transformers import CsmConfig, CsmForConditionalGeneration

    with tempfile.TemporaryDirectory() as folder:
        export(ours, folder)
        config = CsmConfig.from_pretrained(folder, codec_config=TINY_MIMI)  # a codec has nothing to do here
        model = CsmForConditionalGeneration.from_pretrained(folder, config=config)
    fraction = ours.config.decoder_fraction

    def prepare(tokens, segment):
        """Frames that the depth decoder leaves out have no label beyond codebook 0. They are drawn as ours are."""
        frames = segment == AUDIO
        labels = torch.where(frames[..., None], tokens[..., :-1], -100)
        kept = torch.ones_like(frames)
        kept[frames] = torch.rand(int(frames.sum())) < fraction
        kept |= (tokens[..., :-1] == 0).all(-1)
        labels[..., 1:].masked_fill_(~kept[..., None], -100)
        return tokens, (segment == TEXT)[..., None], frames[..., None], labels

    def loss(net, tokens, text, frames, labels):
        x = model.embed_text_tokens(tokens[..., -1]) * text
        x = x + model.backbone_model.embed_tokens(tokens[..., :-1]) * frames
        return net(inputs_embeds=x, labels=labels, use_cache=False).loss

    return model, prepare, loss


def lfm2_of(ours):
    """A Kani in transformers."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    model = Lfm2ForCausalLM(Lfm2Config(**kani_config(ours.config)))
    model.load_state_dict(published(KANI_LFM2, Source(ours)), strict=False)
    model.tie_weights()
    return model


def transformers_lfm2(ours):
    """The same model in transformers, with peft's adapter, whose matrices are those of ours."""
    from peft import LoraConfig, get_peft_model

    state = lora.adapter_state(ours)
    trained = [p.detach() for p in ours.parameters() if p.requires_grad]
    lora.merge(ours)  # B is zero: this changes nothing
    model = lfm2_of(ours)
    names = ["q_proj", "v_proj", "w1", "w3", "w2"]
    model = get_peft_model(model, LoraConfig(r=state["rank"], lora_alpha=state["alpha"], lora_dropout=state["dropout"],
                                             use_rslora=state["rs"], target_modules=names))  # fmt: skip
    for p, value in zip([p for p in model.parameters() if p.requires_grad], trained, strict=True):
        p.data.copy_(value)
    return (model, lambda tokens, segment: (torch.where(segment > 0, tokens[..., 0], IGNORE), tokens[..., 0]),
            lambda net, labels, ids: net(input_ids=ids, labels=labels, use_cache=False).loss)  # fmt: skip


def filled(stack, ours, layout, prefix):
    """A stack of transformers with the weights of our model, 0 where ours has none. layout: of the published weights,
    where the names of the stack's stand behind `prefix`."""
    found = {name.removeprefix(prefix): x for name, x in published(layout, Source(ours)).items()}
    stack.load_state_dict({name: found.get(name, torch.zeros_like(x)) for name, x in stack.state_dict().items()})
    return stack


def gpt2_of(ours):
    """The backbone of an XTTS in transformers, without dropout. Its positions are 0: XTTS has its own."""
    from transformers import GPT2Config, GPT2Model

    c = ours.config.backbone
    stack = GPT2Model(GPT2Config(
        vocab_size=1, n_positions=c.max_positions, n_embd=c.d_model, n_layer=c.n_layer, n_head=c.n_head,
        n_inner=c.d_ff, layer_norm_epsilon=c.norm_eps, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
    ))  # fmt: skip
    stack.wpe.requires_grad_(False)
    return filled(stack, ours, XTTS_V2, "gpt.gpt.")


class Stack(torch.nn.Module):
    """A transformer of transformers in the place of our backbone."""

    def __init__(self, stack):
        super().__init__()
        self.stack = stack

    def forward(self, x, cache=None, mask=None, positions=None):
        mask = None if mask is None else mask.expand(-1, -1, x.shape[1], -1)
        return self.stack(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False)[0]


def whole_logits(hidden, weight, target, bias=None, codebook_weight=1, row_weight=None, each=False):
    """The loss in plain torch, with all logits at once. It counts no target that ranks first: a peer need not."""
    weight = weight if weight.ndim == 3 else weight[None]
    logits = torch.einsum("nkd,kvd->nkv" if hidden.ndim == 3 else "nd,kvd->nkv", hidden, weight)
    logits = logits + bias.view(logits.shape[1:])
    losses = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none").view(target.shape)
    share = torch.ones_like(losses) if row_weight is None else row_weight[:, None].expand_as(losses)
    loss = codebook_weight * (losses * share).sum(0) / share.sum(0)
    none = torch.zeros_like(target, dtype=torch.bool)
    return (loss, none, losses) if each else (loss, none.sum(0))


def with_stack(ours, stack):
    """Our model with a stack of transformers as its backbone, and with plain losses."""
    ours.backbone = Stack(stack)

    def loss(net, *batch):
        with mock.patch.object(models, "multi_codebook_cross_entropy", whole_logits):
            return net(*batch)[0]

    return ours, lambda *batch: batch, loss


def transformers_gpt2(ours):
    """An XTTS whose backbone is transformers' GPT-2, as in Coqui's code."""
    return with_stack(ours, gpt2_of(ours))


def transformers_llama(ours):
    """A VALL-E whose backbone is transformers' Llama, as in its author's code."""
    from transformers import LlamaConfig, LlamaModel

    c = ours.config.backbone
    stack = LlamaModel(LlamaConfig(
        vocab_size=1, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer, hidden_act="gelu",
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, pad_token_id=None,
        max_position_embeddings=c.max_positions,
    ))  # fmt: skip
    stack.norm = torch.nn.Identity()
    return with_stack(ours, filled(stack, ours, VALLE_V2, "model."))


PEERS = {"csm": transformers_csm, "kani": transformers_lfm2, "xtts": transformers_gpt2, "valle": transformers_llama}


def train_job(job):
    """Numbers of one pass, or seconds of steps and the peak of the process, of one way in STEPS."""
    device, way = job["device"], job["way"]
    with torch.device("meta"):  # weights, gradients, two means of AdamW, and a quarter more
        check_room(20 * sum(p.numel() for p in model_of(job).parameters()), device)
    torch.manual_seed(0)
    model = model_of(job)
    config = model.config
    make = PEERS[job["arch"]] if way.startswith("transformers") else our_step
    model, prepare, loss = make(model)  # of ours nothing stays in memory beside that of transformers
    model.to(device).train()
    net = torch.compile(model, dynamic=True) if way.endswith("compiled") else model

    def passed(seed):
        torch.manual_seed(seed)
        batch = prepare(*batch_of(config, job, seed))
        torch.manual_seed(seed)  # ours draws the depth decoder's frames in the pass, transformers did so in `prepare`
        with torch.autocast(device, torch.bfloat16, enabled=job["dtype"] == "bfloat16"):
            return loss(net, *[x.to(device) for x in batch])

    if not job["repeats"]:
        value = passed(0)
        value.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        return {"numbers": {"loss": [value.item()], "gradient": [norm.item()]}}
    backward, update = make_optimizer(model, way, device)
    forget_peak(device)
    seconds = [timed(lambda: (backward(passed(seed)), update()), device)  # noqa: B023
               for seed in range(WARM_UP + job["repeats"])]  # fmt: skip
    return {"seconds": seconds[WARM_UP:], "peak": peak(device)}


def make_optimizer(model, way, device):
    """backward(loss) and update() of a way: ours as train.py has them, peers with torch's fused AdamW."""
    if way.startswith("ours"):
        keys = configurator.configure(HERE / "train.py", ["--grad_clip=0", *STEPS[way]])
        optimizer = Optimizer(model, keys, torch.device(device))
        return optimizer.backward, optimizer.step
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    return torch.Tensor.backward, lambda: (optimizer.step(), optimizer.zero_grad())


def bench_train(cfg):
    """A step that trains: forward, backward, AdamW. Beside a CSM, which a share of its frames may train, stand the
    other families: Kani with LoRA, of one utterance; XTTS; VALL-E in mode nar."""
    sizes, dtypes = chosen(cfg.sizes, TRAIN_SIZES, "sizes"), chosen(cfg.dtypes, DTYPES, "dtypes")
    fractions = chosen(cfg.fractions, FRACTIONS, "fractions")
    ways = chosen(cfg.ways, STEPS, "ways")
    if not cfg.ways and pick_device("auto") == "cpu":
        ways = [way for way in ways if "compiled" not in way]
    for size, dtype, B in product(sizes, dtypes, map(int, cfg.batches.split(","))):
        job = {"lora": None, **sizes[size], "utterances": B, "text_rows": 40, "frames": 152}
        for fraction in fractions if job["arch"] == "csm" else [""]:
            case = f"{size}, {dtype}, {f'{fraction} of the frames, ' if fraction else ''}batch of {B}"
            share = {"decoder_fraction": fractions[fraction]} if fraction else {}
            compare(cfg, new_job("train", case, dtype, cfg.repeats, **job, **share), REDUCED[job["arch"]], ways, "ours",
                    partial(train_columns, B * job["frames"]))  # fmt: skip


def train_columns(frames, answer, _):
    took = statistics.median(answer["seconds"])
    return {"seconds": took, "frames/s": frames / took, "peak GB": in_units(answer, 1e9)}


MEMORY_SIZES = {
    "csm small": (TRAIN_SIZES["small"], 2), "csm marvis": (TRAIN_SIZES["marvis"], 2),
    "kani small": ({**TRAIN_SIZES["kani-lora"], **REDUCED["kani"], "lora": None}, 4),
    "kani-lora": (TRAIN_SIZES["kani-lora"], 2),
    "xtts small": ({**TRAIN_SIZES["xtts"], "backbone": {**EVEN, **GPT2, "n_layer": 8}}, 4),
    "xtts": (TRAIN_SIZES["xtts"], 2),
    "valle small": ({**TRAIN_SIZES["valle"], "backbone": {**EVEN, **VALLE, "n_layer": 6}}, 2),
    "valle": (TRAIN_SIZES["valle"], 4),
}  # of each: a size, utterances of a micro-batch
MICRO = {"1": 1, "2": 2}  # micro-batches of a step


def memory_job(job):
    """The bytes that a step of train.py takes by the forecast, by kind, and those that three steps took."""
    device = torch.device(job["device"])
    torch.manual_seed(0)
    model = model_of(job).train()
    keys = configurator.configure(HERE / "train.py", [f"--gradient_accumulation_steps={job['micro']}", *job["flags"]])
    batch = batch_of(model.config, job, 0)
    kinds = {**budget.forecast(budget.twin(model), keys, batch), **budget.besides(device, model)}
    budget.give_back_at_once(device)
    model.to(device)
    optimizer = Optimizer(model, keys, device)
    forget_peak(device.type)
    for _ in range(WARM_UP):
        for seed in range(job["micro"]):
            torch.manual_seed(seed)
            optimizer.backward(model(*batch)[0], job["micro"])
        optimizer.step()
    return {"forecast": kinds, "peak": peak(device.type)}


def bench_memory(cfg):
    """The forecast of a step's memory beside what it takes in a fresh process. Time plays no part."""
    for size, (sizes, B) in chosen(cfg.sizes, MEMORY_SIZES, "sizes").items():
        for micro in MICRO.values() if size.endswith("small") else [1]:
            job = {"lora": None, **sizes, "utterances": B, "text_rows": 40, "frames": 152, "flags": [], "micro": micro}
            try:
                answer = ask(WORK, new_job("memory", size, "float32", 0, **job))
            except ValueError as error:
                tell(f"{size}: {error}")
                continue
            total = sum(answer["forecast"].values())
            values = {"case": f"{size}, {micro} of {B} utterances", "forecast GB": total / 1e9,
                      "taken GB": in_units(answer, 1e9)}  # fmt: skip
            if answer["peak"]:
                values["off by %"] = 100 * (total / answer["peak"] - 1)
            kinds = ("weights", "gradients", "optimizer", "activations", "temporaries", "allocator", "Python and torch")
            values |= {kind: answer["forecast"].get(kind, 0) / 1e9 for kind in kinds}
            record(cfg, values, pick_device("auto"))


# -----------------------------------------------------------------------------
# models that speak

TINY = dict(n_layer=2, n_head=4, n_kv_head=4, d_model=32, d_ff=48)
# of each: its family, its sizes, small ones for the numbers, what is counted, how many of them are a second of speech,
# and the way whose speed is the measure
SPEAKERS = {
    "csm": ("csm", {key: x for key, x in TRAIN_SIZES["marvis"].items() if key != "arch"},
            dict(text_vocab_size=50, n_codebooks=6, codebook_size=32, stop="zeros",
                 backbone={**TINY, "rope_scaling": LLAMA3_ROPE}, decoder={**TINY, "rope_scaling": LLAMA3_ROPE}),
            "frames", 12.5, "transformers"),
    "kani": ("kani", dict(text_vocab_size=64400, n_codebooks=4, codebook_size=4032, backbone="lfm2-350M"),
             dict(text_vocab_size=50, n_codebooks=4, codebook_size=32,
                  backbone={**TINY, **LFM2, "n_layer": 4, "layers": "caca"}),
             "tokens", 50, "transformers"),
    "xtts": ("xtts", dict(text_vocab_size=6681, n_codebooks=1, codebook_size=1024, backbone="gpt2-xtts",
                          text_bos=261, text_eos=0),
             dict(text_vocab_size=50, n_codebooks=1, codebook_size=32, backbone={**TINY, **GPT2}, text_bos=1,
                  text_eos=0),
             "codes", 21.5, "transformers"),
    "valle": ("valle", dict(text_vocab_size=256, n_codebooks=8, codebook_size=1000, backbone="valle-60M", mode="ar"),
              dict(text_vocab_size=50, n_codebooks=4, codebook_size=32, backbone={**TINY, **VALLE}, mode="ar"),
              "frames", 86.1, "2126be8"),
}  # fmt: skip
SPEAKERS["valle nar"] = ("valle", *[{**sizes, "mode": "nar"} for sizes in SPEAKERS["valle"][1:3]],
                         *SPEAKERS["valle"][3:])  # fmt: skip
ACCEPTED = (0.44, 0.38)  # guesses of a trained CSM that are right, one codebook ahead and two
OURS = ("ours plain", "ours packed", "ours int8")
GUESSING = ("ours packed ahead", "ours int8 ahead", "ours int8 ahead at imposed acceptance")
SPEAKING = (*OURS, *GUESSING, "transformers", "2126be8")
BLOCK = 2**27  # numbers, half a gigabyte: more than any cache holds
FRAMES = 24  # of a text; all but the first are timed
EIGHT = 8  # texts at once
STREAMS = (1, 8, 64, 300)  # texts at once on a GPU
OLDER = '''"""The commit 2126be8 speaks: the job of bench.py in, its answer out."""
import json, sys, time
import numpy as np
import torch
from model import VallE, VallEConfig

job = json.load(sys.stdin)
torch.set_num_threads(job["threads"])
torch.manual_seed(0)
model = VallE(VallEConfig(**job["sizes"])).eval()
if not job["repeats"]:
    for p in model.parameters():
        if p.ndim > 1:
            p.data.normal_(std=0.3)
    model.heads.data *= 0.1
    torch.save(model.state_dict(), job["weights"] + "/weights.pt")
size, frames, nar = job["sizes"]["codebook_size"], job["frames"], job["sizes"]["mode"] == "nar"
choose = lambda logits, **_: logits[..., :size].argmax(-1)
how = {"frames": frames} if nar else {}
seconds = []
for _ in range(1 + job["repeats"]):
    codes, times = [], [time.perf_counter()]
    for frame in model.generate(np.array(job["text"]), max_frames=frames, choose=choose, **how):
        codes.append(frame.tolist())
        times.append(time.perf_counter())
    seconds.append((times[-1] - times[0]) / frames if nar else float(np.median(np.diff(times[1:]))))
print(json.dumps({"seconds": seconds[1:], "numbers": {"codes": sum(codes, [])}}))
'''


class Imposed(Stage):
    """The stage of a CSM whose guesses are right as often as a trained model's, in a fixed order, whatever its logits
    say. The work is the same: all is scored and chosen first."""

    def choose(self, logits, k=slice(None), chosen=True):
        code = super().choose(logits, k, chosen)
        if not chosen:
            self.guesses[k] = code, ACCEPTED[k - self.at - 1]
            return code
        guess, chance = self.guesses.pop(k, (code, 1.0))
        self.at = k
        return guess if self.dice.random() < chance else (guess + 1) % logits.shape[-1]


class ImposedCSM(CSM):
    def stage(self, *sizes, **how):
        plain = super().stage(*sizes, **how)
        stage = object.__new__(Imposed)
        vars(stage).update(vars(plain), guesses={}, at=0, dice=random.Random(0))
        return stage


def speaker_of(job):
    """A model with random weights. Those for the numbers are wide, so that its codes differ, or they lie in the folder
    of the job."""
    torch.manual_seed(0)
    family, config = ARCHS[job["arch"]]
    made = ImposedCSM if "imposed" in job["way"] else family
    model = made(config(**job["sizes"])).eval().requires_grad_(False)
    if not job["repeats"]:
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.3)
        if job["arch"] == "valle":  # a probability of 1 would be the score of many codes, and which is masked a toss-up
            model.heads *= 0.1
        if job["arch"] == "csm":  # transformers may choose a class that is no code: not with these logits, all 0
            model.codebook0_head[job["sizes"]["codebook_size"] :] = 0
            model.decoder_heads[:, job["sizes"]["codebook_size"] :] = 0
    if job["weights"] and os.listdir(job["weights"]):
        model.load_state_dict(torch.load(os.path.join(job["weights"], "weights.pt"), weights_only=True))
    return model


def texts_of(job, model):
    """Utterances of different texts, each with a few ids more than the one before."""
    rng = np.random.default_rng(0)
    side = {}
    if job["arch"] == "xtts":
        latents = rng.standard_normal((model.config.n_latents, model.config.backbone.d_model), np.float32)
        side["voice"] = torch.from_numpy(latents)
    if job["sizes"].get("mode") == "nar":
        side["frames"] = job["frames"]
    most = model.config.text_vocab_size
    return [Utterance(rng.integers(3, most, job["text_rows"] + 3 * i), job["frames"], i, dict(side))
            for i in range(job.get("streams") or job["together"])]  # fmt: skip


def likeliest(size, logits, **_):
    """A choice of sample_code's kind that never ends an utterance."""
    return logits[..., :size].argmax(-1)


def refuse(line):
    raise ValueError(line)


def engine_of(job, model):
    """Our engine in the form that the job's way names. Weights in another form are refused where they do not work."""
    way = job["way"]
    places = 1 if way == "one after another" else job["together"]
    quantize = "int8" if "int8" in way else ""
    ready(model, quantize, "plain" if "plain" in way else "packed", refuse)
    how = {"ahead": CSM.AHEAD if "ahead" in way else 0} if model.has_depth else {}
    # random weights may repeat themselves: at this frame rate no window of the guard fits in
    return Engine(model, places, frame_rate=1e6, choose=partial(likeliest, model.config.codebook_size), **how)


def pace(engine, lines):
    """Speak lines beside each other. Returns their codes [(T, K)], and the seconds of a frame: the median of all steps
    but the first; in mode nar, where all frames come together, the mean."""
    frames = [[] for _ in lines]
    start = time.perf_counter()
    times = []
    for number, _, new, _ in engine.run(deque(enumerate(lines))):
        frames[number].append(new)
        times.append(time.perf_counter())
    codes = [torch.cat(parts) for parts in frames]
    if not engine.model.causal:
        return codes, (times[-1] - start) / sum(map(len, codes))
    n = len(lines)
    return codes, float(np.median(np.diff(times[n - 1 :: n]))) / n


class Clock:
    """Notes when transformers' generate gives out what it makes; the first time it is the text."""

    def __init__(self):
        self.times = []

    def put(self, _):
        self.times.append(time.perf_counter())

    def end(self):
        pass

    def seconds(self, n=1):
        """Of n tokens, the first of which are left out."""
        return n * float(np.median(np.diff(self.times[1 + n :])))


def csm_in_transformers(job, model, line):
    net, *_ = transformers_csm(model)
    ids = torch.from_numpy(line.text)[None]

    def once():
        clock = Clock()
        made = net.eval().generate(ids, max_new_tokens=job["frames"], do_sample=False, depth_decoder_do_sample=False,
                                   streamer=clock)  # fmt: skip
        return made.view(-1, model.config.n_codebooks)[-job["frames"] :], clock.seconds()

    return once


def kani_in_transformers(job, model, line):
    """For the numbers only the classes of the codebook whose turn it is are allowed, as in ours."""
    c = model.config
    net = lfm2_of(model)
    tokens = torch.from_numpy(model.layout(line.text)[0]).T
    first = c.first_code + c.codebook_size * torch.arange(c.n_codebooks)

    def allowed(ids, logits):
        start = first[(ids.shape[1] - tokens.shape[1]) % c.n_codebooks]
        return torch.full_like(logits, -math.inf).index_copy_(
            1, at := start + torch.arange(c.codebook_size), logits[:, at])  # fmt: skip

    def once():
        clock = Clock()
        made = net.eval().generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, eos_token_id=None,
                                   pad_token_id=0, max_new_tokens=job["frames"] * c.n_codebooks, streamer=clock,
                                   logits_processor=[] if job["repeats"] else [allowed])  # fmt: skip
        codes = made[0, tokens.shape[1] :].view(-1, c.n_codebooks) - first
        return codes, clock.seconds(c.n_codebooks)

    return once


def xtts_in_transformers(job, model, line):
    """GPT-2 with the tables and heads of XTTS around it, in the loop that its authors' code has too."""
    c = model.config
    net = gpt2_of(model).eval()
    opening, *_ = model.opening(line.text, **line.side)

    def once():
        x = opening
        cache = None
        codes = []
        times = []
        for t in range(job["frames"]):
            out = net(inputs_embeds=x, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            code = model.code_head(model.final_norm(out.last_hidden_state[:, -1]))[:, : c.codebook_size].argmax(-1)
            codes.append(code)
            times.append(time.perf_counter())
            x = (model.code_embedding(code) + model.code_positions.weight[t + 1])[:, None]
        return torch.stack(codes), float(np.median(np.diff(times)))

    return once


THEIRS = {"csm": csm_in_transformers, "kani": kani_in_transformers, "xtts": xtts_in_transformers}


def weights_of_a_frame(model):
    """How many weights are read for a frame of one text where no layer is spared: that of a CSM's depth decoder for
    each codebook, that of a Kani for each token."""
    c = model.config
    size = lambda *modules: sum(p.numel() for m in modules for p in m.parameters() if p.ndim > 1)  # noqa: E731
    heads = sum(weight.numel() for weight, _ in model.head_weights())
    if c.arch == "csm":
        return size(model.backbone) + (c.n_codebooks - 1) * size(model.decoder, model.projection) + heads
    if c.arch == "kani":
        return c.n_codebooks * size(model.backbone) + heads
    if c.arch == "xtts":
        return size(model.backbone, model.code_head)
    return size(model.backbone, model.decoder) + heads


def older_speaker(job):
    """The answer of the commit 2126be8, in a folder of its own. Raises ValueError where git does not have it."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["git", "-C", str(HERE), "show", "2126be8:model.py"]  # it needs no other file of ours
        try:
            source = subprocess.run(command, capture_output=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            raise ValueError("git does not have that commit here") from None
        Path(folder, "model.py").write_bytes(source)
        Path(folder, "older.py").write_text(OLDER, encoding="utf-8")
        with torch.device("meta"):
            (line,) = texts_of(job, ARCHS[job["arch"]][0](ARCHS[job["arch"]][1](**job["sizes"])))
        return ask([sys.executable, str(Path(folder, "older.py"))], {**job, "text": line.text.tolist()})


@torch.no_grad()
def speak_job(job):
    """Numbers, or seconds of a frame and bytes of the weights that it reads, of one way."""
    way = job["way"]
    family, config = ARCHS[job["arch"]]
    if way == "2126be8":
        return older_speaker(job)
    with torch.device("meta"):
        model = family(config(**job["sizes"]))
        check_room(10 * sum(p.numel() for p in model.parameters()), "cpu")
    needed = weights_of_a_frame(model) * (1 if "int8" in way else 4)
    if way == "floor":
        block = torch.ones(BLOCK).view(-1, 4096)
        reads = (block.sum, partial(block.mv, torch.ones(4096)))  # which is faster depends on the machine
        seconds = [min(timed(read, "cpu") for read in reads) for _ in range(2 + job["repeats"])][2:]
        return {"seconds": [needed / block.nbytes * x for x in seconds], "bytes": needed}
    model = speaker_of(job)
    lines = texts_of(job, model)
    passes = []
    if way == "transformers":
        once = THEIRS[job["arch"]](job, model, lines[0])
    else:
        engine = engine_of(job, model)
        once = partial(pace, engine, lines)
        if job["arch"] == "csm":
            counting = model.decoder.register_forward_hook(lambda *_: passes.append(1))
    codes, _ = once()
    answer = {"bytes": needed}
    if passes:
        counting.remove()
        answer["passes"] = len(passes) / sum(map(len, codes)) * len(lines)
    if not job["repeats"]:
        codes = codes if isinstance(codes, list) else [codes]
        return {} if "int8" in way else {"numbers": {"codes": torch.cat(codes).flatten().tolist()}}
    if job["together"] == 1:
        return {**answer, "seconds": [once()[1] for _ in range(job["repeats"])]}
    engine = Engine(model, 1, **{"frame_rate": 1e6, **engine.how})
    singly = lambda: statistics.mean(pace(engine, [line])[1] for line in lines)  # noqa: E731
    return {"seconds": {"one after another": [singly() for _ in range(job["repeats"])],
                        "eight at once": [once()[1] for _ in range(job["repeats"])]}}  # fmt: skip


def bench_speak(cfg):
    """Models of published sizes speak in float32: one text, with transformers or an older commit beside; eight. On a
    GPU a CSM and its codec, see bench_streams."""
    if pick_device("auto") == "cuda":
        bench_streams(cfg)
        return
    wanted = chosen(cfg.ways, dict.fromkeys(SPEAKING), "ways")
    for size, (arch, sizes, small, unit, rate, measure) in chosen(cfg.sizes, SPEAKERS, "sizes").items():
        job = new_job("speak", f"{size}, float32", "float32", cfg.repeats, arch=arch, sizes=sizes, text_rows=20,
                      frames=FRAMES, together=1)  # fmt: skip
        small = {"sizes": small, "frames": min(FRAMES, 8)}
        causal = sizes.get("mode") != "nar"
        ways = [way for way in (*OURS, *(GUESSING if arch == "csm" else ()), measure) if way in wanted]
        per_frame = sizes["n_codebooks"] if unit == "tokens" else 1
        columns = partial(speak_columns, unit, per_frame, rate, measure, sizes["n_codebooks"] if arch == "csm" else 0)
        compare(cfg, job, small, [*ways, *(["floor"] if causal else [])], "ours plain", columns)
        ways = [way for way in OURS[1:] if way in wanted]
        job = {**job, "case": f"{size}, eight texts, float32", "together": EIGHT}
        compare(cfg, job, small, ways, "one after another", partial(eight_columns, unit, per_frame))


def speak_columns(unit, per_frame, rate, measure, K, answer, answers):
    took = statistics.median(answer["seconds"])
    values = {f"{unit}/s": per_frame / took}
    if seconds := answers.get(measure, {}).get("seconds"):
        values[f"x {measure}"] = statistics.median(seconds) / took
    values["x real time"] = per_frame / took / rate
    if K:
        values["passes/frame"] = answer.get("passes", K - 1)
    if "floor" in answers:
        floor = statistics.median(answers["floor"]["seconds"])
        share = answer.get("bytes", answers["floor"]["bytes"]) / answers["floor"]["bytes"]
        values["% of the floor's speed"] = 100 * floor * share / took
    return values


def eight_columns(unit, per_frame, answer, _):
    one, eight = (statistics.median(answer["seconds"][key]) for key in ("one after another", "eight at once"))
    return {f"one after another, {unit}/s": per_frame / one, f"eight at once, {unit}/s": per_frame / eight,
            "ratio": one / eight}  # fmt: skip


@torch.no_grad()
def streams_job(job):
    """Seconds to the first audio, and of a frame of all texts with and without the codec, of a CSM with Mimi."""
    device = job["device"]
    model = ready(speaker_of(job).to(device, DTYPES[job["dtype"]]))
    mimi = codes_of_one_length(codecs.CODECS["mimi"](**job["codec"])).to(device)
    lines = texts_of(job, model)
    engine = Engine(model, len(lines), dict(temperature=0.9, top_k=50))
    seconds = {"first": [], "frame": [], "with codec": []}
    for _ in range(1 + job["repeats"]):
        frames = [[] for _ in lines]
        first = 0.0
        start = time.perf_counter()
        for number, _, new, _ in engine.run(deque(enumerate(lines))):
            frames[number].append(new)
            if not first:
                mimi.decode(new.T[None]).cpu()
                first = time.perf_counter() - start
        spoken = time.perf_counter() - start
        codes = torch.stack([torch.cat(parts) for parts in frames]).mT
        for wav in mimi.decode_stream(codes.split(4, 2)):
            wav.cpu()
        took = [first, spoken / job["frames"], (time.perf_counter() - start) / job["frames"]]
        for values, value in zip(seconds.values(), took, strict=True):
            values.append(value)
    return {"seconds": {key: values[1:] for key, values in seconds.items()}, "peak": peak(device)}


def bench_streams(cfg):
    """Many texts at once, from the text to the waveform of each."""
    _, sizes, _, _, rate, _ = SPEAKERS["csm"]
    for n in STREAMS:
        job = new_job("streams", f"csm and mimi, bfloat16, {n} at once", "bfloat16", cfg.repeats, arch="csm",
                      sizes=sizes, codec={}, text_rows=20, frames=64, streams=n)  # fmt: skip
        compare(cfg, job, {}, ["ours"], "ours", partial(streams_columns, n, rate))


def streams_columns(n, rate, answer, _):
    first, frame, whole = (statistics.median(values) for values in answer["seconds"].values())
    return {"first audio, ms": 1000 * first, "frames/s": n / frame, "real-time factor": rate * whole,
            "times real time": n / (rate * whole), "peak GB": in_units(answer, 1e9)}  # fmt: skip


# -----------------------------------------------------------------------------
# codecs

CODECS = {  # our codec and its options, seconds of audio, its name and sizes in transformers, peers
    "mimi": ("mimi", {}, 10, "Mimi", {}, ["transformers", "moshi"]),
    "encodec": ("encodec", {}, 10, "Encodec", {}, ["transformers"]),
    "dac24": ("dac", {"sample_rate": 24000}, 3, "Dac",
              dict(sampling_rate=24000, n_codebooks=32, downsampling_ratios=[2, 4, 5, 8]), ["transformers"]),
    "dac44": ("dac", {}, 2, "Dac",
              dict(sampling_rate=44100, n_codebooks=9, downsampling_ratios=[2, 4, 8, 8]), ["transformers"]),
    "nanocodec": ("nanocodec", {}, 5, "", {}, []),
    "audiocodec44k": ("audiocodec44k", {}, 2, "", {}, []),
    "xtts": ("xtts", {}, 10, "", {}, []),
}  # fmt: skip
COLUMNS = ("encode", "decode", "stream in", "stream out")
STREAMED = 2  # seconds, frame by frame


def codes_of_one_length(model):
    """Fill the codebooks with entries of equal length: otherwise the shortest would be the nearest to most inputs."""
    for name, x in model.state_dict().items():
        if "codebook" in name and x.ndim > 1:
            x.copy_(0.1 * F.normalize(torch.randn_like(x), dim=-1))
    model.load_state_dict(model.state_dict())  # recomputes what ours derives from its tables
    return model.eval().requires_grad_(False)


# A way: job -> (model, encode: wav (B, n) -> codes (B, K, T), decode, stream in: pieces of wav, stream out: of codes)


def our_codec(job):
    if job["weights"] and os.listdir(job["weights"]):
        codec = codecs.load_codec(job["codec"], job["weights"], **job["options"])
    else:
        codec = codes_of_one_length(codecs.CODECS[job["codec"]](**job["options"]))
    stream_in = None if codec.encoder_context or not codec.streams else lambda wavs: list(codec.encode_stream(wavs))
    return codec, codec.encode, codec.decode, stream_in, (
        (lambda codes: list(codec.decode_stream(codes))) if codec.streams else None)  # fmt: skip


def transformers_codec(job):
    import transformers

    _, _, _, name, options, _ = CODECS[job["size"]]
    config = getattr(transformers, f"{name}Config")(**options)
    model = codes_of_one_length(getattr(transformers, f"{name}Model")(config))
    model.save_pretrained(job["weights"])
    if name == "Encodec":  # 6 kbit/s are 8 codebooks
        return (model, lambda wav: model.encode(wav[:, None], bandwidth=6.0).audio_codes[0],
                lambda codes: model.decode(codes[None], [None]).audio_values[:, 0], None, None)  # fmt: skip
    wave = (lambda out: out[:, 0]) if name == "Mimi" else (lambda out: out)
    return (model, lambda wav: model.encode(wav[:, None]).audio_codes,
            lambda codes: wave(model.decode(audio_codes=codes).audio_values), None, None)  # fmt: skip


def moshi_codec(job):
    from moshi.models.loaders import get_mimi
    from safetensors.torch import save_file

    model = codes_of_one_length(get_mimi(None, num_codebooks=job["n_codebooks"]))
    save_file(model.state_dict(), os.path.join(job["weights"], "model.safetensors"))

    def stream(step):
        def run(pieces):
            with model.streaming(1):
                for piece in pieces:
                    step(piece)

        return run

    encode, decode = (lambda wav: model.encode(wav[:, None])), (lambda codes: model.decode(codes)[:, 0])
    return model, encode, decode, stream(encode), stream(decode)


@torch.no_grad()
def codec_job(job):
    """Numbers, or seconds of what a way can do and the peak of the process meanwhile."""
    torch.manual_seed(0)
    way = {"ours": our_codec, "transformers": transformers_codec, "moshi": moshi_codec}[job["way"]]
    model, encode, decode, stream_in, stream_out = way(job)
    device = job["device"]
    size = job["samples_per_frame"]
    rng = np.random.default_rng(0)
    frames, few = (round(seconds * job["frame_rate"]) for seconds in (job["seconds"], STREAMED))
    model.to(device)
    wav = torch.from_numpy(0.1 * rng.standard_normal((1, frames * size), np.float32)).to(device)
    codes = torch.from_numpy(rng.integers(job["codebook_size"], size=(1, job["n_codebooks"], frames))).to(device)
    if not job["repeats"]:
        return {"numbers": {"codes": encode(wav).flatten().tolist(), "waveform": sample_of(decode(codes))}}
    works = {"encode": (encode, wav), "decode": (decode, codes),
             "stream in": (stream_in, wav[:, : few * size].split(size, 1)),
             "stream out": (stream_out, codes[..., :few].split(1, 2))}  # fmt: skip
    forget_peak(device)
    seconds = {column: [timed(partial(*work), device) for _ in range(1 + job["repeats"])][1:]
               for column, work in works.items() if work[0]}  # fmt: skip
    return {"seconds": seconds, "peak": peak(device)}


def bench_codec(cfg):
    """What mel keeps; speed and memory of the codecs with network weights."""
    for size, known in chosen(cfg.sizes, {"mel": None, **CODECS}, "sizes").items():
        if not known:
            bench_mel(cfg)
            continue
        name, options, usual, _, _, peers = known
        with torch.device("meta"):
            facts = vars(codecs.CODECS[name](**options))
        facts = {key: facts[key] for key in ("samples_per_frame", "frame_rate", "n_codebooks", "codebook_size")}
        length = cfg.seconds or usual
        job = new_job("codec", f"{size}, {length:g} s", "float32", cfg.repeats, size=size, codec=name, options=options,
                      seconds=length, **facts)  # fmt: skip
        ways = chosen(cfg.ways, dict.fromkeys(["ours", *peers]), "ways")
        compare(cfg, job, {"seconds": STREAMED}, ways, "ours", partial(codec_columns, length))


def codec_columns(length, answer, _):
    values = {}
    for column in COLUMNS:
        audio = STREAMED if "stream" in column else length
        took = answer["seconds"].get(column)
        values[f"{column}, x real time"] = audio / statistics.median(took) if took else "none"
    return values | {"peak GB": in_units(answer, 1e9)}


def bench_mel(cfg):
    """mel at some frame rates: word errors of held-out digits through it."""
    rows = read_raw(cfg.raw)
    training = {path for path, _, _ in read_raw(cfg.raw, every=True)}
    training = sorted(training - {path for path, _, _ in rows})
    training = [training[i] for i in np.random.default_rng(0).permutation(len(training))[:800]]
    training = [read_audio(path, RATE) for path in training]
    rows = rows[: cfg.limit or None]
    wavs = [read_audio(path, RATE) for path, _, _ in rows]
    length = sum(map(len, wavs)) / RATE
    for frame_rate in (10, 12.5, 16, 20):
        codec = codecs.load_codec("mel", sample_rate=RATE, frame_rate=frame_rate).fit(training)
        codes, out = [], []
        into = timed(lambda: codes.extend(codec.encode(wav[None]) for wav in wavs), "cpu")  # noqa: B023
        back = timed(lambda: out.extend(codec.decode(c)[0] for c in codes), "cpu")  # noqa: B023
        results = [("", row[1], recognise(o[: len(w)], RATE)) for row, o, w in zip(rows, out, wavs, strict=True)]
        bits = round(codec.n_codebooks * math.log2(codec.codebook_size) * frame_rate)
        record(cfg, {"case": f"mel, digits, {frame_rate:g} frames/s", "bit/s": bits,
                     "word errors %": error_percent(results)["all"], "encode, x real time": length / into,
                     "decode, x real time": length / back})  # fmt: skip


# -----------------------------------------------------------------------------
# all together


TEN_MINUTES = 600
GPU = {  # what is measured in that time
    "speak": [], "loss": ["--sizes=csm-16384,valle,kani", "--dtypes=bfloat16"],
    "train": ["--sizes=marvis", "--dtypes=bfloat16", "--batches=32"],
}  # fmt: skip


def bench_gpu(cfg):
    """The kernel's tests, then what GPU names, as far as ten minutes go. What fails costs one line. Raises ValueError
    without a GPU."""
    if pick_device("auto") != "cuda":
        raise ValueError("bench.py gpu needs a GPU that torch can use")
    END["at"] = time.monotonic() + TEN_MINUTES
    sound = kernel_is_sound()
    for name, flags in GPU.items():
        if name != "speak" and not sound:
            tell(f"a test of the loss fails on this GPU, so {name} is not timed")
            continue
        flags = [*flags, f"--results={cfg.results}", f"--note={cfg.note}", f"--repeats={cfg.repeats}"]
        try:
            main(configurator.configure(str(HERE / "bench.py"), [name, *flags], ("name",)))
        except (ValueError, OSError, RuntimeError) as error:
            tell(f"{name}: {str(error).splitlines()[0]:.200}")


def kernel_is_sound():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "tests/test_loss.py"]
    try:
        return not subprocess.run(command, cwd=HERE, timeout=TEN_MINUTES / 2).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        tell(f"{shlex.join(command[1:])}: {error!s:.200}")
        return False


JOBS = {
    "loss": loss_job, "train": train_job, "memory": memory_job, "codec": codec_job, "speak": speak_job,
    "streams": streams_job,
}  # fmt: skip
BENCHES = {
    "data": bench_data, "sample": bench_sample, "judge": bench_judge, "codec": bench_codec, "loss": bench_loss,
    "train": bench_train, "memory": bench_memory, "speak": bench_speak, "gpu": bench_gpu,
    "report": bench_report, "work": work,
}  # fmt: skip


def main(cfg):
    if cfg.name not in BENCHES:
        raise ValueError(f"bench.py measures {', '.join(BENCHES)}, not {cfg.name!r}")
    BENCHES[cfg.name](cfg)


if __name__ == "__main__":
    configurator.run(main, __file__, positional=("name",))

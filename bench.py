"""Bench: every number that the README quotes, from one command.

    python bench.py data     word error rate of a raw data set: are the recordings themselves understood?
    python bench.py codec    what mel keeps of digits (word error rate) and of real speech (STOI, PESQ); how fast codecs
                             are, ours beside others', in what memory, and what of that prepare.py reaches
    python bench.py sample   word error rate, stops and speed of a model that speaks held-out strings of digits
    python bench.py families the families side by side: trains what is not trained yet, then listens to all of them
    python bench.py loss     time and memory of the loss of K classification heads, ours beside others'
    python bench.py train    time and memory of a step that trains a CSM, ours beside others'

- `recognise` hears strings of digits: pocketsphinx, whose acoustic model comes inside its wheel, with a grammar of the
  ten digits. It is a weak recogniser, so that what it understands is spoken clearly.
- `word_errors` counts substitutions, insertions and deletions (Levenshtein), the numerator of a word error rate.
- `codec`, `loss` and `train` measure ours and others' in one run, so that all meet the same machine. On a CPU memory is
  the system's own count of a fresh process, on a GPU that of torch. What is not installed is left out, with a line that
  says so. The environment variables MARVIS and CSM_FINETUNE may name clones of Marvis' repository and of
  sesame-finetune (which itself wants CSM_REPO_PATH, a clone of Sesame's csm); both need torchtune.

Letters in shapes: K codebooks, V classes, D width, N rows, B utterances, S rows of an utterance, C = K + 1 columns.
"""

import csv
import gc
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import codec as codecs
import prepare
import train
from model import AUDIO, CSM, LLAMA3_ROPE, TEXT, CSMConfig, multi_codebook_cross_entropy
from parts import configurator
from parts.metrics import lowest_loss, read_metrics
from parts.sources import Utterance
from parts.tensors import pick_device
from sample import Voice

name = "data"  # what to measure: data, codec, sample, families, loss, train
raw = "data/digits"  # raw data set of spoken digits: a folder with metadata.csv (audio, text, speaker) and heldout.txt
limit: "int >= 0" = 0  # data: most utterances to listen to; 0: all
strings: "int >= 0" = 200  # sample, families: new strings of 3 to 6 digits that each voice speaks; 0: the held-out ones
show_errors = False  # print every utterance that was misheard
speech = ""  # codec: folder of recordings in LJSpeech's layout, 16 to fit on, then 8; empty: none
minutes: "0 < float <= 600" = 1.0  # codec: of the recording that is encoded to measure memory
ckpt = "out/digits/best.pt"  # sample: the model that speaks
speaker = ""  # sample, families: the voices to speak in, with commas between; empty: all of the data set
temperature: "float | None >= 0" = None  # sample, families: of the draw; None: as the checkpoint's recipe says
seed: "0 <= int <= 4294967295" = 1337  # sample, families: of the new strings and of the draw
recipes = ""  # families: names of recipes in config/, with commas between; empty: all that are for digits
seeds = "1337,1,2"  # families: of the training runs, likewise
sizes = ""  # codec, loss, train: names of the sizes to take, with commas between; empty: all
dtypes = "float32,bfloat16"  # loss, train: likewise, the types to calculate in
ways = ""  # loss, train: likewise, whose; "ours" alone is quick
fractions = ""  # train: likewise, shares of the frames that the depth decoder trains on
repeats: "int >= 1" = 3  # codec, loss, train: how often each is timed, after it was warmed up; the median counts
large_batch: "int >= 1" = 32  # train, on a GPU: utterances of the larger batch

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
GRAMMAR = f"""#JSGF V1.0;
grammar digits;
public <string> = ( {" | ".join(WORDS)} )+ ;
"""
RATE = 16000  # of pocketsphinx's acoustic model


# -----------------------------------------------------------------------------
# what the other numbers stand on


@lru_cache(maxsize=1)
def decoder():
    """The recogniser. The chance of a silence between words, and that of a word, are set for speech in groups with
    pauses, chosen on training recordings: with pocketsphinx's own, pauses are heard as "eight"."""
    try:
        import pocketsphinx
    except ImportError as error:
        raise ValueError("the recogniser needs pocketsphinx: pip install pocketsphinx") from error
    made = pocketsphinx.Decoder(samprate=RATE, lm=None, loglevel="FATAL", silprob=0.6, wip=0.1)
    made.add_jsgf_string("digits", GRAMMAR)
    made.activate_search("digits")
    return made


def recognise(wav, sample_rate):
    """The digits heard in wav (N,), float in [-1, 1]: a string such as "three one four", empty where none is heard.
    The same wav gives the same answer, whatever was heard before. Raises ValueError if wav has another shape."""
    wav = torch.as_tensor(wav, dtype=torch.float32).detach().cpu()
    if wav.ndim != 1:
        raise ValueError(f"recognise takes one waveform of shape (N,), not {tuple(wav.shape)}")
    wav = codecs.resample(wav, sample_rate, RATE).double().numpy()
    level = np.sqrt(np.mean(wav**2)) if len(wav) else 0.0
    if not np.isfinite(level) or level < 1e-5:
        return ""
    # The acoustic model knows speech in quiet rooms: of one level, with silence around it that is not digital.
    padded = np.pad(wav * 0.07 / level, RATE // 5)
    padded += 5e-4 * np.random.default_rng(0).standard_normal(len(padded))
    listener = decoder()
    listener.start_utt()
    listener.process_raw((padded.clip(-1, 1) * 32767).astype("<i2").tobytes(), full_utt=True)
    listener.end_utt()
    best = listener.hyp()
    return best.hypstr if best else ""


def word_errors(ref, hyp):
    """Fewest words to substitute, insert and delete that turn `hyp` into `ref` (both strings of words)."""
    ref, hyp = ref.split(), hyp.split()
    row = list(range(len(hyp) + 1))  # errors between the words of ref so far and each beginning of hyp
    for i, word in enumerate(ref, 1):
        diagonal, row[0] = row[0], i
        for j, heard in enumerate(hyp, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != heard))
    return row[-1]


def table(rows, head):
    """rows and head as aligned columns of text."""
    rows = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def error_rates(heard):
    """heard: (group, reference, hypothesis) of each utterance -> {group: (utterances, words, errors)}, and "all"."""
    counts = {}
    for group, ref, hyp in heard:
        for key in (group, "all"):
            old = counts.get(key, (0, 0, 0))
            counts[key] = old[0] + 1, old[1] + len(ref.split()), old[2] + word_errors(ref, hyp)
    return {key: counts[key] for key in sorted(counts, key=lambda key: (key == "all", key))}


def voice_rates(heard):
    """The word error rate of each group of `error_rates`, without "all"."""
    return {key: errors / max(words, 1) for key, (_, words, errors) in error_rates(heard).items() if key != "all"}


def report(heard):
    """The table of `error_rates`."""
    rates = error_rates(heard).items()
    rows = [(key, n, words, errors, f"{errors / max(words, 1):.1%}") for key, (n, words, errors) in rates]
    return table(rows, ["", "utterances", "words", "errors", "word error rate"])


def read_raw(folder, every=False):
    """The held-out utterances of a raw data set: [(path, text, speaker), ...]; all of them where none is held out, or
    `every` one is asked for."""
    path = os.path.join(folder, "metadata.csv")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; python data/digits/prepare.py makes the built-in data set")
    with open(path, newline="", encoding="utf-8") as file:
        rows = [(row["audio"], row["text"], row["speaker"]) for row in csv.DictReader(file)]
    listed = os.path.join(folder, "heldout.txt")
    if os.path.exists(listed) and not every:
        with open(listed, encoding="utf-8") as file:
            names = set(file.read().split())
        rows = [row for row in rows if os.path.splitext(os.path.basename(row[0]))[0] in names]
    return [(os.path.join(folder, audio), text, speaker) for audio, text, speaker in rows]


# -----------------------------------------------------------------------------
# the numbers


def bench_data(cfg):
    """Word error rate of the held-out recordings, by voice."""
    rows = read_raw(cfg.raw)
    rows = rows[: cfg.limit or len(rows)]
    heard = []
    for path, text, speaker in tqdm(rows, "listening", unit="wav"):
        hypothesis = recognise(codecs.read_audio(path, RATE), RATE)
        heard.append((speaker, text, hypothesis))
        if cfg.show_errors and hypothesis != text:
            tqdm.write(f"{os.path.basename(path)}: {text!r} heard as {hypothesis!r}")
    print(report(heard))


def round_trip(codec, wavs):
    """wavs through the codec and back, and how many times faster than real time it encoded and decoded them."""
    start = time.perf_counter()
    codes = [codec.encode(wav[None]) for wav in wavs]
    middle = time.perf_counter()
    out = [codec.decode(c)[0, : len(wav)] for c, wav in zip(codes, wavs, strict=True)]
    seconds, end = sum(map(len, wavs)) / codec.sample_rate, time.perf_counter()
    return out, f"{seconds / (middle - start):.0f} x", f"{seconds / (end - middle):.0f} x"


def bench_mel(cfg):
    """mel: word error rate of held-out digits through it, STOI and PESQ of real speech it was not fitted on."""
    rows = read_raw(cfg.raw)
    held_out = {path for path, _, _ in rows}
    rows = rows[: cfg.limit or len(rows)]
    wavs = [codecs.read_audio(path, RATE) for path, _, _ in rows]
    training = [path for path, _, _ in read_raw(cfg.raw, every=True) if path not in held_out]
    training = [codecs.read_audio(training[i], RATE) for i in np.random.default_rng(0).permutation(len(training))[:800]]

    def error_rate(wavs):
        heard = [("", text, recognise(wav, RATE)) for (_, text, _), wav in zip(rows, wavs, strict=True)]
        _, words, errors = error_rates(heard)["all"]
        return f"{errors / max(words, 1):.1%}"

    print(f"{len(rows)} held-out recordings of digits; fitted on {sum(map(len, training)) / RATE:.0f} s of others")
    print(f"word error rate of the recordings: {error_rate(wavs)}")
    table_rows = []
    for frame_rate in tqdm((10, 12.5, 16, 20), "frame rates", leave=False):
        start = time.perf_counter()
        codec = codecs.load_codec("mel", sample_rate=RATE, frame_rate=frame_rate).fit(training)
        fitted = time.perf_counter() - start
        out, *speeds = round_trip(codec, wavs)
        table_rows.append((frame_rate, bit_rate(codec), error_rate(out), f"{fitted:.0f} s", *speeds))
    print(table(table_rows, ["frames/s", "bit/s", "word error rate", "fit", "encode", "decode"]))

    paths = read_speech(cfg.speech)
    if not paths:
        return
    try:
        from pystoi import stoi
    except ImportError as error:
        raise ValueError("STOI needs pystoi: pip install pystoi") from error
    try:
        from pesq import pesq
    except ImportError:
        print("no PESQ: it needs pesq and, to build that, a C compiler: pip install pesq")
        pesq = None

    def quality(wav, out):
        """Wide-band PESQ (ITU-T P.862.2), 1 to 4.6."""
        return pesq(RATE, *(codecs.resample(x, 24000, RATE).numpy() for x in (wav, out)), "wb") if pesq else math.nan

    wavs = [codecs.read_audio(path, 24000) for path in paths]
    table_rows = []
    for frame_rate, size in ((12.5, 256), (12.5, 1024), (20, 256), (25, 256), (50, 256)):
        codec = codecs.load_codec("mel", sample_rate=24000, frame_rate=frame_rate, codebook_size=size).fit(wavs[:16])
        out, *speeds = round_trip(codec, wavs[16:])
        scores = [stoi(wav.numpy(), o.numpy(), 24000) for wav, o in zip(wavs[16:], out, strict=True)]
        heard = np.mean([quality(wav, o) for wav, o in zip(wavs[16:], out, strict=True)])
        table_rows.append((frame_rate, size, bit_rate(codec), f"{np.mean(scores):.3f}", f"{min(scores):.3f}",
                           f"{heard:.2f}", *speeds))  # fmt: skip
    seconds = sum(map(len, wavs[:16])) / 24000
    print(f"\nreal speech at 24 kHz: fitted on {seconds:.0f} s of 16 recordings, measured on 8 others")
    print(table(table_rows, ["frames/s", "entries", "bit/s", "STOI", "least", "PESQ", "encode", "decode"]))


def read_speech(folder, most=24):
    """The first recordings of a folder in LJSpeech's layout; none, and a line that says so, where there is no such."""
    metadata = os.path.join(folder, "metadata.csv")
    if not folder or not os.path.exists(metadata):
        print("no real speech: --speech=folder names recordings in LJSpeech's layout")
        return []
    with open(metadata, encoding="utf-8") as file:
        names = [line.split("|")[0] for line in file][:most]
    wavs = os.path.join(folder, "wavs")
    files = {os.path.splitext(name)[0]: os.path.join(wavs, name) for name in os.listdir(wavs)}
    return [files[name] for name in names]


def bit_rate(codec):
    return round(codec.n_codebooks * np.log2(codec.codebook_size) * codec.frame_rate)


def new_strings(rows, speaker, n, seed):
    """n different strings of 3 to 6 digits, of each length alike, that no recording of the speaker in `rows` reads."""
    rng = random.Random(f"{seed} {speaker}")
    read, found = {text for _, text, voice in rows if voice == speaker}, []
    while len(found) < n:
        text = " ".join(rng.choices(WORDS, k=3 + len(found) % 4))
        if text not in read:
            read.add(text)
            found.append(text)
    return found


def texts_to_speak(cfg):
    """[(speaker, text), ...]: new strings for each voice, or the held-out ones. Raises ValueError for no such voice."""
    rows = read_raw(cfg.raw, every=cfg.strings > 0)
    wanted = chosen(cfg.speaker, dict.fromkeys(voice for _, _, voice in rows), "speaker")
    if not cfg.strings:
        return [(voice, text) for _, text, voice in rows if voice in wanted]
    return [(voice, text) for voice in wanted for text in new_strings(rows, voice, cfg.strings, cfg.seed)]


def listen(voice, cfg):
    """Strings that a model speaks: [(speaker, text, what is heard)], how many end by themselves, real-time factor."""
    how = {} if cfg.temperature is None else {"temperature": cfg.temperature}
    heard, stopped, seconds, took = [], 0, 0.0, 0.0
    for speaker, text in tqdm(texts_to_speak(cfg), "speaking", unit="wav"):
        start = time.perf_counter()
        wav = voice.say(text, speaker=speaker, seed=cfg.seed, **how)
        took += time.perf_counter() - start
        seconds += len(wav) / voice.sample_rate
        stopped += voice.stopped
        heard.append((speaker, text, recognise(wav, voice.sample_rate)))
        if cfg.show_errors and heard[-1][1] != heard[-1][2]:
            tqdm.write(f"{speaker}: {text!r} heard as {heard[-1][2]!r}")
    return heard, stopped, took / max(seconds, 1e-9)


def bench_sample(cfg):
    """Word errors of one checkpoint for each voice and their mean over the voices."""
    heard, stopped, factor = listen(Voice.from_checkpoint(cfg.ckpt), cfg)
    print(report(heard))
    print(f"mean over the voices {statistics.mean(voice_rates(heard).values()):.1%}")
    print(f"{stopped} of {len(heard)} ended by themselves; real-time factor {factor:.2f}")


def trained(recipe, seed, raw):
    """The folder of a recipe's finished run with that seed; what is missing for it is made: data, tokens, the run."""
    config, here = f"config/{recipe}.py", Path(__file__).parent
    keys = configurator.configure(here / "train.py", [str(here / config)])
    out_dir = f"{keys.out_dir}_{seed}"
    steps = [(os.path.join(raw, "metadata.csv"), [os.path.join(raw, "prepare.py")]),
             (os.path.join(keys.data_dir, "meta.json"), ["prepare.py", config])]  # fmt: skip
    lines = read_metrics(os.path.join(out_dir, "metrics.jsonl"))
    if not lines or lines[-1]["iter"] < keys.max_iters:
        resume = ["--init_from=resume"] if os.path.exists(os.path.join(out_dir, "last.pt")) else []
        run = ["train.py", config, f"--seed={seed}", f"--out_dir={out_dir}", *resume]
        steps.append((os.path.join(out_dir, "never"), run))
    for product_, command in steps:
        if not os.path.exists(product_):
            print("python", *command, flush=True)
            if subprocess.run([sys.executable, *command], cwd=here).returncode:
                raise ValueError(f"python {' '.join(command)} failed, see above")
    return out_dir


def bench_families(cfg):
    """Families that read digits aloud: sizes, time, held-out loss, word error rate by seed, real-time factor."""
    here, rows = Path(__file__).parent, []
    recipes = cfg.recipes.split(",") if cfg.recipes else sorted(path.stem for path in here.glob("config/digits*.py"))
    for recipe, seed in product(recipes, [int(seed) for seed in cfg.seeds.split(",")]):
        out_dir = trained(recipe, seed, cfg.raw)
        lines, voice = read_metrics(os.path.join(out_dir, "metrics.jsonl")), Voice.from_checkpoint(f"{out_dir}/best.pt")
        heard, stopped, factor = listen(voice, cfg)
        rates = voice_rates(heard)
        codec, n = voice.codec, sum(p.numel() for p in voice.model.parameters())
        codes = f"{codec.n_codebooks} x {codec.codebook_size} x {codec.frame_rate:g}/s"
        minutes = sum(line["timing"]["seconds"] for line in lines) / 60
        rows.append([recipe, seed, f"{n / 1e6:.2f}M", codes, lines[-1]["iter"], f"{minutes:.1f}",
                     f"{lowest_loss(lines):.3f}", ", ".join(f"{rate:.1%} {key}" for key, rate in rates.items()),
                     f"{statistics.mean(rates.values()):.1%}", f"{stopped}/{len(heard)}", f"{factor:.2f}"])  # fmt: skip
        print(table(rows, ["recipe", "seed", "parameters", "codes", "steps", "minutes", "held-out loss", "word errors",
                           "mean", "ended", "real-time factor"]), flush=True)  # fmt: skip


# -----------------------------------------------------------------------------
# time and memory


def timed(work, device):
    """Seconds that work() takes."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def system_says(path, field):
    """A field of /proc/self/status or /proc/meminfo in bytes; None on a system without such files."""
    try:
        with open(path, encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))
    except OSError:
        return None


def forget_peak(device):
    """From now on `peak` counts anew. Returns the bytes in use now, None where the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # memory that was freed, but that the C library keeps in store, would hide the next use of it
    train.glibc("malloc_trim", 0)
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return None
    return system_says("/proc/self/status", "VmRSS")


def peak(device):
    """The most bytes in use since `forget_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else system_says("/proc/self/status", "VmHWM")


def free_bytes(device):
    """Memory to be had; without end where the system does not tell."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    train.glibc("malloc_trim", 0)  # what `keep_memory` has kept
    return system_says("/proc/meminfo", "MemAvailable") or math.inf


def check_room(need, device):
    """Raise ValueError where `need` bytes are more than are free."""
    if need > (free := free_bytes(device)):
        raise ValueError(f"it takes about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def apart(work, *args):
    """work(*args) in a fresh process, in which nothing is left of what was measured before."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def machine(device):
    """What the numbers were taken on, in a line."""
    if device == "cuda":
        model = torch.cuda.get_device_name()
    else:
        model = platform.processor() or platform.machine()
        if os.path.exists("/proc/cpuinfo"):
            with open("/proc/cpuinfo", encoding="utf-8") as file:
                model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
        model += f", {torch.get_num_threads()} threads"
    return f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {model}"


def chosen(names, known, key):
    """The entries of `known` that a key with commas names; all of them where it is empty. Raises ValueError."""
    names = [name.strip() for name in names.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"{key} = {name!r}: there is {', '.join(known)}")
    return {name: known[name] for name in names or known}


def in_words(seconds):
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# -----------------------------------------------------------------------------
# the loss of K heads

# K, V, D, N, and whether all heads read one state
LOSS_SIZES = {
    "csm-512": (31, 2051, 1024, 512, False),  # the depth decoder of CSM and Marvis, so many frames
    "csm-4096": (31, 2051, 1024, 4096, False),
    "csm-16384": (31, 2051, 1024, 16384, False),
    "valle": (8, 1025, 1024, 32768, True),
    "kani": (1, 80538, 1024, 8192, False),
    "kani-512": (1, 80538, 1024, 512, False),  # the tokens of 128 frames, each against the whole vocabulary
    "kani-512-codebook": (4, 4033, 1024, 128, False),  # the same against their own codebooks
}
LOSSES = ("ours", "eager", "compiled", "torch chunked", "liger", "cut cross-entropy")
HOLDS = {"eager": 3, "compiled": 2}  # so many times all logits, in the type they are in: what of it has to fit


def eager_loss(hidden, weight, target):
    """All logits (N, K, V) at once, in the type that hidden is given in."""
    logits = torch.einsum("nkd,kvd->nkv" if hidden.ndim == 3 else "nd,kvd->nkv", hidden, weight)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten()) * len(weight)


def loss_way(way, device):
    """A loss function: hidden (N, K, D) or (N, D), weight (K, V, D), target (N, K) -> the sum over codebooks of means.

    Those made for one head go codebook by codebook, each head a parameter of its own, since otherwise the heads'
    gradients would be held twice; chunks and approximations are as their authors set them. Raises ImportError or
    ValueError for what cannot be had here.
    """

    def each(one):
        def loss(hidden, weight, target):
            states = hidden.unbind(1) if hidden.ndim == 3 else [hidden] * len(weight)
            heads = [w.detach().requires_grad_() for w in weight]
            return sum(one(h, w, t) for h, w, t in zip(states, heads, target.T.contiguous(), strict=True))

        return loss

    if way == "ours":
        return lambda hidden, weight, target: multi_codebook_cross_entropy(hidden, weight, target)[0].sum()
    if way == "eager":
        return eager_loss
    if way == "compiled":
        torch.compiler.reset()  # or it would take a new size for a sign that sizes change, and compile for any
        return torch.compile(eager_loss)
    if way == "torch chunked":  # torch's own form for several heads does not go by chunks
        if not hasattr(F, "linear_cross_entropy"):
            raise ValueError("this torch has no linear_cross_entropy")
        return each(partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions()))
    if way == "liger":
        if device == "cpu":
            raise ValueError("its kernels need a GPU")
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        return each(lambda h, w, t: liger(w, h, t))
    from cut_cross_entropy import linear_cross_entropy

    return each(partial(linear_cross_entropy, impl="cce" if device == "cuda" else "torch_compile"))


def loss_inputs(size, dtype, device):
    """hidden, weight, target of a size, drawn in the type they are given in."""
    K, V, D, N, shared = size
    torch.manual_seed(0)
    hidden = torch.randn((N, D) if shared else (N, K, D), dtype=dtype, device=device)
    weight = torch.randn(K, V, D, dtype=dtype, device=device).mul_(D**-0.5)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (N, K), device=device)


def loss_pass(loss, hidden, weight, target):
    loss(hidden, weight, target).backward()
    hidden.grad = weight.grad = None


def loss_memory(way, size, dtype, device):
    """Bytes that forward and backward take at their highest, less inputs and gradients; None if not to be told."""
    if device == "cpu":  # each block by itself, so that it leaves when it is freed: gaps in the heap are nobody's need
        train.glibc("mallopt", -3, 2**16)  # M_MMAP_THRESHOLD
    loss, inputs = loss_way(way, device), loss_inputs(size, dtype, device)
    # first what is only done once: a library's own tables and stores; what is compiled, is compiled for the size
    whole = way in ("compiled", "cut cross-entropy")
    loss_pass(loss, *(inputs if whole else loss_inputs((*size[:3], 64, size[4]), dtype, device)))
    hidden, weight, _ = (x.detach() for x in inputs)
    three_products(hidden if size[4] else hidden[:, :1], weight if size[4] else weight[:1], device)()
    before = forget_peak(device)
    loss_pass(loss, *inputs)
    return None if before is None else peak(device) - before - inputs[0].nbytes - inputs[1].nbytes


def three_products(hidden, weight, device):
    """A function that makes the three matrix products of a loss with whole matrices and does nothing else.

    A GPU makes them for all heads at once if it can, a CPU head by head, as either is faster.
    """
    h, w = (hidden[None], weight.flatten(0, 1)[None]) if hidden.ndim == 2 else (hidden.transpose(0, 1), weight)
    logits = h.shape[0] * h.shape[1] * w.shape[1] * h.itemsize
    together = device == "cuda" and logits + h.nbytes + w.nbytes < free_bytes(device)
    pairs = [(h, w)] if together else list(zip(h, w, strict=True))
    h, w = pairs[0]
    columns = w.shape[-2]  # of rows that begin at multiples of 64, as caches and tensor cores like it
    x = torch.empty(*h.shape[:-1], math.ceil(columns / 64) * 64, dtype=h.dtype, device=device)[..., :columns]
    dh, dw = torch.empty_like(h), torch.empty_like(w)

    def work():
        for h, w in pairs:
            torch.matmul(h, w.mT, out=x)
            torch.matmul(x, w, out=dh)
            torch.matmul(x.mT, h, out=dw)

    return work


def loss_times(ways, size, dtype, device, repeats, bar):
    """{way: median seconds}, in an order drawn anew each time, without those that fail; "floor": `three_products`."""
    inputs = loss_inputs(size, dtype, device)
    works = {way: partial(loss_pass, loss_way(way, device), *inputs) for way in ways}
    works["floor"] = three_products(inputs[0].detach(), inputs[1].detach(), device)
    seconds = {way: [] for way in works}
    for _ in range(1 + repeats):
        for way in random.sample(list(works), len(works)):
            try:
                seconds[way].append(timed(works[way], device))
            except RuntimeError as error:  # above all for want of memory
                tqdm.write(f"without the time of {way}: {first_line(error)}")
                del works[way]
            bar.update()
    return {way: statistics.median(seconds[way][1:]) for way in works}


def apart_from(a, b):
    """The largest difference, as a share of the largest value of b."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def loss_differences(size, dtype, device):
    """Ours against eager in float64 on few rows: relative differences of loss, hidden's and weight's gradient."""
    *given, target = loss_inputs((*size[:3], min(size[3], 64), size[4]), dtype, device)
    results = []
    for way, kind in (("ours", dtype), ("eager", torch.float64)):
        inputs = [x.detach().to(kind).requires_grad_() for x in given]
        loss = loss_way(way, device)(*inputs, target)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    return [apart_from(a, b) for a, b in zip(*results, strict=True)]


def compare_losses(sizes, dtypes, repeats, ways=LOSSES):
    """Print the tables of `loss`: sizes {name: (K, V, D, N, shared)}, dtypes {name: type}."""
    device, rows, checks, able = pick_device("auto"), [], [], []
    for way in ways:
        try:
            loss_way(way, device)
            able.append(way)
        except (ImportError, ValueError) as error:
            print(f"without {way}: {first_line(error)}")
    bar = tqdm(total=len(sizes) * len(dtypes) * (len(able) + (len(able) + 1) * (1 + repeats)), desc="loss")
    for (name, size), (kind, dtype) in product(sizes.items(), dtypes.items()):
        K, V, D, N, shared = size
        checks.append((name, kind, *(f"{x:.1e}" for x in loss_differences(size, dtype, device))))
        memory = {}
        for way in able:
            try:
                held = HOLDS.get(way, 0) * N * K * V + 2 * (N * D * (1 if shared else K) + K * V * D)
                check_room(held * dtype.itemsize, device)
                measure = loss_memory if device == "cuda" else partial(apart, loss_memory)
                memory[way] = measure(way, size, dtype, device)
                bar.update()
            except Exception as error:  # whatever stops another's code, the others can be measured
                tqdm.write(f"{name} {kind} without {way}: {first_line(error)}")
                bar.update(2 + repeats)
        if not memory:
            continue
        times = loss_times(memory, size, dtype, device, repeats, bar)
        floor = times.pop("floor", math.nan)
        for way, seconds in times.items():
            extra = memory[way]
            shown = ("-", "-") if extra is None else (f"{extra / 1e6:.0f}", f"{extra / (4 * N * K * V):.1%}")
            rows.append((name, kind, way, in_words(seconds), f"{seconds / floor:.2f}", *shown))
        rows.append((name, kind, "floor", in_words(floor), "1.00", "", ""))
    bar.close()
    print(f"Forward and backward, median of {repeats}; floor: the three matrix products alone. Memory: beside inputs "
          "and gradients, and as a share of the logits in float32.")  # fmt: skip
    print(table(rows, ["size", "type", "way", "time", "of floor", "extra MB", "of logits"]))
    print("Ours against eager in float64, 64 rows, largest difference as a share of the largest value:")
    print(table(checks, ["size", "type", "loss", "hidden's gradient", "weight's gradient"]))


def bench_loss(cfg):
    """The loss of K heads, ours and others'."""
    print(machine(device := pick_device("auto")))
    ways = chosen(cfg.ways, dict.fromkeys(LOSSES), "ways")
    sizes, dtypes = chosen(cfg.sizes, LOSS_SIZES, "sizes"), chosen(cfg.dtypes, DTYPES, "dtypes")
    if device == "cpu":
        train.keep_memory()  # as train.py does: gradients of the size of the weights come and go
    compare_losses(sizes, dtypes, cfg.repeats, ways)


# -----------------------------------------------------------------------------
# a step that trains a CSM

SMALL = dict(n_layer=2, n_head=8, n_kv_head=2, d_model=512, d_ff=2048, rope_scaling=LLAMA3_ROPE)
TRAIN_SIZES = {
    "small": dict(text_vocab_size=4096, n_codebooks=32, codebook_size=2048,
                  backbone=SMALL, decoder={**SMALL, "d_model": 256, "d_ff": 1024}),
    "marvis": dict(text_vocab_size=49152, n_codebooks=32, codebook_size=2048,
                   backbone="llama-250M", decoder="llama-60M"),
}  # fmt: skip
WARM_UP = 3  # steps
TEXT_ROWS, FRAMES = 40, 152  # of each utterance, the stop frame among these
FRACTIONS = {"1/16": 1 / 16, "1": 1.0}  # of the frames, for the depth decoder
# Who trains, and with which AdamW: as train.py sets it up, with sparse_embeddings, and with step_in_backward too; as
# torch gives it, fused
STEPS = [("ours", "own"), ("ours", "sparse"), ("ours", "in backward"),
         *product(("transformers", "marvis", "sesame-finetune"), ("default", "fused"))]  # fmt: skip


def step_label(way, optimizer):
    return way if optimizer == "own" else f"{way} {optimizer}"


def csm_config(size, fraction):
    return CSMConfig(**size, stop="zeros", decoder_fraction=fraction)  # as all the others stop


def csm_batch(c, utterances, seed):
    """tokens (B, S, K + 1), segment (B, S) as `Batches` gives them."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(utterances):
        codes = rng.integers(1, c.codebook_size, (FRAMES - 1, c.n_codebooks))
        rows.append(c.layout(rng.integers(0, c.text_vocab_size, TEXT_ROWS), codes))
    return tuple(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))


# For each way: a model, what it makes of a batch beforehand, and its loss of that.


def ours_way(c):
    model = CSM(c)
    return model, lambda *batch: batch, lambda net, *batch: net(*batch)[0]


def transformers_way(c):
    """CsmForConditionalGeneration of these sizes. Its codec, which here has nothing to do, is a tiny one."""
    from transformers import CsmConfig, CsmForConditionalGeneration, MimiConfig

    def stack(s, context, **more):
        rope = {"rope_type": "default", "rope_theta": s.rope_theta}
        if s.rope_scaling:  # the same frequencies, told with a context shorter than the positions, as its check wants
            factor, low, high, original = s.rope_scaling
            rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low * context / original,
                     "high_freq_factor": high * context / original,
                     "original_max_position_embeddings": context}  # fmt: skip
        return dict(
            num_hidden_layers=s.n_layer, num_attention_heads=s.n_head, num_key_value_heads=s.n_kv_head,
            hidden_size=s.d_model, intermediate_size=s.d_ff, head_dim=s.head_dim, rms_norm_eps=s.norm_eps,
            num_codebooks=c.n_codebooks, vocab_size=c.audio_vocab_size, rope_parameters=rope, **more,
        )  # fmt: skip

    codec = MimiConfig(hidden_size=16, num_filters=2, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                       intermediate_size=8, codebook_size=8, codebook_dim=4, upsample_groups=4,
                       vector_quantization_hidden_dimension=4)  # fmt: skip
    model = CsmForConditionalGeneration(CsmConfig(
        **stack(c.backbone, 1024, max_position_embeddings=c.backbone.max_positions, text_vocab_size=c.text_vocab_size),
        depth_decoder_config=stack(c.decoder, 16, backbone_hidden_size=c.backbone.d_model),
        codec_config=codec.to_dict(), tie_codebooks_embeddings=True, codebook_pad_token_id=c.audio_vocab_size - 1,
        bos_token_id=0, pad_token_id=0, audio_token_id=0, audio_eos_token_id=0,
    ))  # fmt: skip

    def prepare(tokens, segment):
        """Frames the depth decoder leaves out have no label beyond codebook 0; drawn as ours draws them."""
        frames = segment == AUDIO
        labels = torch.where(frames[..., None], tokens[..., :-1], -100)
        kept = torch.ones_like(frames)
        kept[frames] = torch.rand(int(frames.sum())) < c.decoder_fraction
        kept |= (tokens[..., :-1] == 0).all(-1)
        labels[..., 1:].masked_fill_(~kept[..., None], -100)
        return tokens, (segment == TEXT)[..., None], frames[..., None], labels

    def loss(net, tokens, text, frames, labels):
        x = model.embed_text_tokens(tokens[..., -1]) * text
        x = x + model.backbone_model.embed_tokens(tokens[..., :-1]) * frames
        return net(inputs_embeds=x, labels=labels, use_cache=False).loss

    return model, prepare, loss


def masked(tokens, segment):
    """tokens, and which of their columns count (B, S, C): what all who come from Sesame's own code take."""
    text = torch.arange(tokens.shape[-1]) == tokens.shape[-1] - 1
    return tokens, torch.where(text, (segment == TEXT)[..., None], (segment == AUDIO)[..., None])


def clone(variable):
    """Put the clone that an environment variable names on Python's path. Raises ImportError where it names none."""
    if variable not in os.environ:
        raise ImportError(f"the environment variable {variable} names no clone of its repository")
    sys.path.insert(0, os.environ[variable])


def register(flavors, c):
    """Our sizes among theirs, under the names "backbone" and "decoder"."""
    from torchtune.models import llama3_2

    def stack(s):
        return llama3_2.llama3_2(
            vocab_size=1, num_layers=s.n_layer, num_heads=s.n_head, num_kv_heads=s.n_kv_head, embed_dim=s.d_model,
            max_seq_len=s.max_positions, intermediate_dim=s.d_ff, norm_eps=s.norm_eps, rope_base=int(s.rope_theta),
            scale_factor=int(s.rope_scaling[0]),
        )  # fmt: skip

    flavors.update(backbone=partial(stack, c.backbone), decoder=partial(stack, c.decoder))


def marvis_way(c):
    clone("MARVIS")
    from marvis_tts import models

    register(models.FLAVORS, c)
    vocabularies = c.text_vocab_size, c.audio_vocab_size, c.n_codebooks
    model = models.Model(models.ModelArgs("backbone", "decoder", *vocabularies, pad_multiple=16))
    model.setup_caches(1, training=True)
    return model, masked, lambda net, *batch: net(*batch, decoder_fraction=c.decoder_fraction)["loss"]


def finetune_way(c):
    if c.decoder_fraction != 1 / 16:
        raise ValueError("its depth decoder trains on 1/16 of the frames, whatever one asks")
    clone("CSM_FINETUNE")
    # what it imports to read settings, to encode and to speak, and does not need to train
    sys.modules.update({name: MagicMock() for name in ("dotenv", "moshi", "moshi.models", "generator")})
    finetune = import_module("utils")
    models = import_module("models")  # Sesame's own, which only now can be found

    register(models.FLAVORS, c)
    vocabularies = c.text_vocab_size, c.audio_vocab_size, c.n_codebooks
    model = finetune.init_weights(models.Model(models.ModelArgs("backbone", "decoder", *vocabularies)))
    model.decoder_loss_weight, model.forward = 0.5, types.MethodType(finetune.forward, model)
    return model, masked, lambda net, *batch: net(*batch)


WAYS = {"ours": ours_way, "transformers": transformers_way, "marvis": marvis_way, "sesame-finetune": finetune_way}


def make_optimizers(model, kind):
    """AdamW as a kind of `STEPS` has it."""
    if kind in ("own", "sparse", "in backward"):
        flags = [f"--sparse_embeddings={kind != 'own'}"]
        optimizers = train.make_optimizers(model, configurator.configure(Path(train.__file__), flags))
        if kind == "in backward":
            train.hook_steps(optimizers, lambda optimizer, _: optimizer.step())
        return optimizers
    return [torch.optim.AdamW(model.parameters(), fused=kind == "fused" or None)]


def product_share(step, device):
    """Share of a step's time that goes into matrix products; attention's own kernels are not counted."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells when it starts and stops
    with torch.profiler.profile() as profiler:
        timed(step, device)
    events = profiler.key_averages()
    names = {f"aten::{name}{end}" for name in ("mm", "addmm", "bmm", "baddbmm") for end in ("", "_")}
    matrix = [event for event in events if event.key in names]
    if device == "cpu":
        return sum(e.self_cpu_time_total for e in matrix) / sum(e.self_cpu_time_total for e in events)
    # a kernel's time stands twice: under its own name, and under that of the operation that launched it
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    return sum(e.self_device_time_total for e in matrix) / sum(e.self_device_time_total for e in kernels)


def train_steps(way, optimizer, size, dtype, fraction, utterances, compiled, repeats, device):
    """Whole steps of one way: {"seconds": one number a step, "peak": bytes or None, "products": their share}.

    The first `WARM_UP` steps, in which the optimizer's state is made and a process gets the memory it goes on with, are
    not among them. The peak is of all steps, on a CPU that of the whole process, with the model, but without what it
    took to make it.
    """
    c = csm_config(size, fraction)
    with torch.device(device):
        torch.manual_seed(0)
        model, prepare, loss = WAYS[way](c)
    model.train()
    net = torch.compile(model, dynamic=True) if compiled else model
    optimizers = make_optimizers(model, optimizer)
    autocast = partial(torch.autocast, device, torch.bfloat16, enabled=dtype == "bfloat16")

    def step(seed, *batch):
        torch.manual_seed(seed)  # the frames for the depth decoder are drawn anew, by each way as many in the mean
        if way != "ours":  # which itself takes to the device what it needs there
            batch = [x.to(device) for x in batch]
        with autocast():
            value = loss(net, *batch)
        value.backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
        return value

    seconds = []
    forget_peak(device)
    for seed in range(WARM_UP + repeats + 1):
        torch.manual_seed(seed)
        batch = prepare(*csm_batch(c, utterances, seed))
        if seed < WARM_UP + repeats:
            seconds.append(timed(partial(step, seed, *batch), device))
        if way == "ours" and device == "cpu" and not seed:
            train.keep_memory()  # as train.py does after the first step
    highest, products = peak(device), product_share(partial(step, seed, *batch), device)
    return {"seconds": seconds[WARM_UP:], "peak": highest, "products": products}


def csm_operations(size, fraction, utterances):
    """Operations of a step: 6 for each weight of a matrix and each row that goes through it.

    A weight makes a product and a sum forwards and twice as many backwards. The backbone has B S rows, codebook 0's
    head N (one a frame), the depth decoder and its projection K for each of the M = fraction N frames it sees, its
    heads one each for M frames. Embeddings are only looked up; attention's own products are not counted.
    """
    with torch.device("meta"):
        model = CSM(csm_config(size, fraction))

    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters() if p.ndim > 1)

    N, K = utterances * FRAMES, model.config.n_codebooks
    rows = utterances * (TEXT_ROWS + FRAMES) * count(model.backbone) + N * model.codebook0_head.numel()
    M = fraction * N
    return 6 * (rows + M * K * count(model.decoder, model.projection) + M * model.decoder_heads.numel())


def csm_bytes(size):
    """What the weights, their gradients and AdamW's two means take, and a quarter more for activations."""
    with torch.device("meta"):
        return 1.25 * 16 * sum(p.numel() for p in CSM(csm_config(size, 1.0)).parameters())


def matrix_rate():
    """Operations a second of a GPU in a product of two 8192 x 8192 matrices in bfloat16."""
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    seconds = [timed(lambda: a @ b, "cuda") for _ in range(20)]
    return 2 * 8192**3 / statistics.median(seconds[5:])


def paired(ours, theirs):
    """Our parameters with those of transformers they equal: (ours, theirs, whether one is the other transposed)."""
    names = {"text_embedding": "embed_text_tokens", "projection": "depth_decoder.model.inputs_embeds_projector",
             "audio_embedding": "backbone_model.embed_tokens.embed_audio_tokens", "codebook0_head": "lm_head.weight",
             "decoder_heads": "depth_decoder.codebooks_head.weight", "backbone": "backbone_model",
             "decoder": "depth_decoder.model"}  # fmt: skip
    inner = {"attn": "self_attn", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    for name, p in ours.named_parameters():
        first, *rest = name.split(".")
        q = theirs.get_parameter(".".join([names[first], *(inner.get(part, part) for part in rest)]))
        yield p, q, name == "decoder_heads"


def csm_differences(size, fraction=1.0):
    """Ours against transformers with the same weights, on the same frames, in float32: relative differences of the
    loss and, the largest of all parameters, of the gradients."""
    c = csm_config(size, fraction)
    torch.manual_seed(0)
    (ours, _, our_loss), (theirs, prepare, their_loss) = ours_way(c), transformers_way(c)
    with torch.no_grad():
        for p, q, turned in paired(ours, theirs):
            q.copy_(p.mT if turned else p)
    batch = csm_batch(c, 2, 0)
    torch.manual_seed(0)
    prepared = prepare(*batch)
    torch.manual_seed(0)  # for the same frames
    losses = our_loss(ours, *batch), their_loss(theirs, *prepared)
    for loss in losses:
        loss.backward()
    worst = max(apart_from(p.grad.mT if turned else p.grad, q.grad) for p, q, turned in paired(ours, theirs))
    return apart_from(*(loss.detach() for loss in losses)), worst


def compare_steps(sizes, dtypes, repeats, ways, fractions, large_batch=0):
    """Print the table of `train`: sizes {name: those of a CSMConfig}, dtypes names, ways (way, optimizer)."""
    device, rows, absent, told, base = pick_device("auto"), [], set(), set(), {}
    rate = matrix_rate() if device == "cuda" else math.nan
    batches = (2, large_batch) if device == "cuda" and large_batch else (2,)
    runs = [(*way, False) for way in ways]
    runs += [(*way, True) for way in ways if device == "cuda" and way[1] in ("own", "fused")]  # these compiled too
    runs = list(product(product(sizes, dtypes, fractions, batches), runs))
    for setting, run in tqdm(runs, "train"):
        (name, kind, fraction, utterances), (way, optimizer, compiled) = setting, run
        if way in absent:
            continue
        label = step_label(way, optimizer) + " compiled" * compiled
        try:
            check_room(csm_bytes(sizes[name]), device)
            how = way, optimizer, sizes[name], kind, fraction, utterances, compiled, repeats, device
            result = apart(train_steps, *how)
        except Exception as error:  # whatever stops another's code, the others can be measured
            if (way, str(error)) not in told:
                tqdm.write(f"without {label} ({name}, {kind}, {fraction:.4g}): {first_line(error)}")
            told.add((way, str(error)))
            absent |= {way} if isinstance(error, ImportError) else set()
            continue
        seconds = statistics.median(result["seconds"])
        if way == "ours":
            base.setdefault(setting, seconds)  # of the first of ours
        times = in_words(seconds), f"{seconds / base.get(setting, math.nan):.2f}"
        memory = "-" if result["peak"] is None else f"{result['peak'] / 1e9:.2f}"
        rest = f"{utterances * FRAMES / seconds:.4g}", memory, f"{result['products']:.0%}"
        rows.append((name, kind, f"{fraction:.4g}", utterances, label, *times, *rest))
        if device == "cuda":
            used = csm_operations(sizes[name], fraction, utterances) / seconds / rate
            rows[-1] += f"{utterances * (TEXT_ROWS + FRAMES) / seconds:.4g}", f"{used:.1%}"
    print(f"Forward, backward, AdamW; median of {repeats} steps; {TEXT_ROWS} text ids and {FRAMES} frames each; "
          "products: the share of the time that goes into matrix products")  # fmt: skip
    head = ["size", "type", "fraction", "utterances", "way", "step", "of ours", "frames/s", "peak GB", "products"]
    if device == "cuda":
        head += ["tokens/s", "MFU"]
        print("tokens/s: rows. MFU: 6 (B S P_backbone + N P_head0 + M K P_decoder + M P_heads) operations a step, P "
              f"weights, N frames, M = fraction N, against {rate / 1e12:.0f} T/s of an 8192^3 product in bfloat16")
    print(table(rows, head))


def bench_train(cfg):
    """A step that trains a CSM, ours and others'."""
    print(machine(pick_device("auto")))
    sizes, dtypes = chosen(cfg.sizes, TRAIN_SIZES, "sizes"), chosen(cfg.dtypes, DTYPES, "dtypes")
    ways = chosen(cfg.ways, {step_label(*way): way for way in STEPS}, "ways").values()
    fractions = chosen(cfg.fractions, FRACTIONS, "fractions").values()
    try:
        loss, gradient = csm_differences(TRAIN_SIZES["small"])
        print(f"Ours against transformers with the same weights, small, float32, all frames: the loss differs by "
              f"{loss:.1e}, the gradients by at most {gradient:.1e} of the largest of each")  # fmt: skip
    except ImportError as error:
        print(f"not compared with transformers: {first_line(error)}")
    compare_steps(sizes, dtypes, cfg.repeats, ways, fractions, cfg.large_batch)


# -----------------------------------------------------------------------------
# codecs with network weights

# For each way: a codec of full size with random weights, which it saves in its own layout, and the path of that.


def codes_of_one_length(model):
    """Fills the codebooks: entries of one length, so that their direction decides and none is always the nearest."""
    for name, x in model.state_dict().items():
        if "codebook" in name and x.ndim > 1:
            x.copy_(0.1 * F.normalize(torch.randn_like(x), dim=-1))
    return model.eval()


def transformers_mimi(folder):
    from transformers import MimiConfig, MimiModel

    model = codes_of_one_length(MimiModel(MimiConfig()))
    model.save_pretrained(folder)
    encode = lambda wav: model.encode(wav[:, None]).audio_codes  # noqa: E731
    return folder, model, encode, lambda codes: model.decode(codes).audio_values[:, 0]


def moshi_mimi(folder):
    from moshi.models.loaders import get_mimi
    from safetensors.torch import save_file

    model, path = codes_of_one_length(get_mimi(None, num_codebooks=32)), os.path.join(folder, "model.safetensors")
    save_file(model.state_dict(), path)
    return path, model, lambda wav: model.encode(wav[:, None]), lambda codes: model.decode(codes)[:, 0]


def transformers_encodec(folder):
    from transformers import EncodecConfig, EncodecModel

    model = codes_of_one_length(EncodecModel(EncodecConfig()))
    model.save_pretrained(folder)
    encode = lambda wav: model.encode(wav[:, None], bandwidth=6.0).audio_codes[0]  # noqa: E731
    return folder, model, encode, lambda codes: model.decode(codes[None], [None]).audio_values[:, 0]


def encodec_encodec(folder):
    sys.modules.setdefault("torchaudio", MagicMock())  # with which it reads files
    from encodec import EncodecModel

    model, path = codes_of_one_length(EncodecModel.encodec_model_24khz(pretrained=False)), f"{folder}/model.th"
    model.set_target_bandwidth(6.0)
    torch.save(model.state_dict(), path)
    return path, model, lambda wav: model.encode(wav[:, None])[0][0], lambda codes: model.decode([(codes, None)])[:, 0]


def transformers_dac(rate, books, strides, folder):
    from transformers import DacConfig, DacModel

    config = DacConfig(sampling_rate=rate, n_codebooks=books, downsampling_ratios=strides)
    model = codes_of_one_length(DacModel(config))
    model.save_pretrained(folder)
    encode = lambda wav: model.encode(wav[:, None]).audio_codes  # noqa: E731
    return folder, model, encode, lambda codes: model.decode(audio_codes=codes).audio_values


def descript_dac(rate, books, strides, folder):
    if "audiotools" not in sys.modules:  # which it needs to read files and to train
        base = type("BaseModel", (torch.nn.Module,), {"INTERN": [], "EXTERN": []})
        sys.modules["audiotools"] = MagicMock(ml=MagicMock(BaseModel=base))
        sys.modules["audiotools.ml"] = sys.modules["audiotools"].ml
    import dac

    sizes = dict(n_codebooks=books, encoder_rates=strides, decoder_rates=strides[::-1])
    model, path = codes_of_one_length(dac.DAC(sample_rate=rate, **sizes)), os.path.join(folder, "weights.pth")
    torch.save({"state_dict": model.state_dict()}, path)
    decode = lambda codes: model.decode(model.quantizer.from_codes(codes)[0])[:, 0]  # noqa: E731
    return path, model, lambda wav: model.encode(wav[:, None])[1], decode


def dac_ways(*sizes):
    return {"transformers": partial(transformers_dac, *sizes), "descript-audio-codec": partial(descript_dac, *sizes)}


# Our codec and its options, seconds of audio, and who else has it
CODEC_SIZES = {
    "mimi": ("mimi", {}, 10, {"transformers": transformers_mimi, "moshi": moshi_mimi}),
    "encodec": ("encodec", {}, 10, {"transformers": transformers_encodec, "encodec": encodec_encodec}),
    "dac24": ("dac", {"sample_rate": 24000}, 3, dac_ways(24000, 32, [2, 4, 5, 8])),
    "dac44": ("dac", {}, 2, dac_ways(44100, 9, [2, 4, 8, 8])),
    "nanocodec": ("nanocodec", {}, 5, {}),
    "audiocodec44k": ("audiocodec44k", {}, 2, {}),
    "xtts": ("xtts", {}, 10, {}),
}
AT_ONCE = 4  # recordings in a batch, together as long as the one alone
STREAMED = 2  # seconds, frame by frame


def open_network(name, options, path, device):
    """Our codec with the weights at `path`, or random ones where that is empty."""
    if path:
        return codecs.load_codec(name, path, **options).to(device)
    codec = codes_of_one_length(codecs.CODECS[name](**options)).requires_grad_(False)
    for module in codec.modules():
        if isinstance(module, codecs.RVQ):
            module.measure()
    return codec.to(device)


def check_codecs(ours, encode, decode, wav):
    """The share of codes that ours has in common with another's, and how far their waveforms of the same codes are
    apart. Raises ValueError where they do not do the same work."""
    codes = encode(wav)
    alike = (ours.encode(wav) == codes).double().mean().item()
    a, b = ours.decode(codes), decode(codes)
    n = min(a.shape[1], b.shape[1])
    difference = apart_from(a[:, :n], b[:, :n])
    if alike < 0.95 or difference > 1e-3:
        raise ValueError(f"{alike:.1%} of the codes agree, the waveforms differ by {difference:.1e}")
    return alike, difference


def codec_works(encode, decode, wav, codes):
    """{column: what to time}: one recording, and a batch of as much audio."""
    n, t = wav.shape[1] // AT_ONCE, codes.shape[2] // AT_ONCE
    wavs, parts = wav[:, : n * AT_ONCE].view(AT_ONCE, n), torch.cat(codes[..., : t * AT_ONCE].chunk(AT_ONCE, 2))
    return {"encode": lambda: encode(wav), "decode": lambda: decode(codes),
            "encode batch": lambda: encode(wavs), "decode batch": lambda: decode(parts)}  # fmt: skip


def streams(codec, wav, codes):
    """{column: what to time}: frame by frame, as far as the codec can."""
    wavs, parts = wav.split(codec.samples_per_frame, 1), codes.split(1, 2)
    works = {"encode stream": lambda: list(codec.encode_stream(wavs)),
             "decode stream": lambda: list(codec.decode_stream(parts))}  # fmt: skip
    return {column: work for column, work in works.items()
            if codec.streams and not (column == "encode stream" and codec.encoder_context)}  # fmt: skip


def moshi_streams(model, wav, codes):
    def run(step, pieces):
        with model.streaming(1):
            for piece in pieces:
                step(piece)

    wavs, parts = wav[:, None].split(model.frame_size, 2), codes.split(1, 2)
    return {"encode stream": lambda: run(model.encode, wavs), "decode stream": lambda: run(model.decode, parts)}


def codec_times(works, repeats, device):
    """works {way: {column: what to time}} -> the same with median seconds, taken in turns."""
    seconds = {way: {column: [] for column in mine} for way, mine in works.items()}
    for column in next(iter(works.values())):
        for _ in range(1 + repeats):
            for way in works:
                if column in works[way]:
                    seconds[way][column].append(timed(works[way][column], device))
    return {way: {column: statistics.median(s[1:]) for column, s in mine.items()} for way, mine in seconds.items()}


def make_peers(size, folder, device):
    """{way: (path of its weights, model, encode, decode)} of those that are installed."""
    peers = {}
    for way, make in CODEC_SIZES[size][3].items():
        os.mkdir(place := os.path.join(folder, way))
        try:
            peers[way] = make(place)
            peers[way][1].to(device)
        except ImportError as error:
            tqdm.write(f"{size} without {way}: {first_line(error)}")
    return peers


@torch.no_grad()
def compare_codec(size, repeats, device):
    """Times of one size, {way: {column: times real time}}, and [(size, way, share of codes alike, difference)]."""
    name, options, length, _ = CODEC_SIZES[size]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        peers = make_peers(size, folder, device)
        loaded = {way: open_network(name, options, path, device) for way, (path, *_) in peers.items()}
        ours = next(iter(loaded.values()), None) or open_network(name, options, "", device)
        rate, frame = ours.frame_rate, ours.samples_per_frame
        wav = 0.1 * torch.randn(1, round(length * rate) * frame, device=device)
        short, codes = wav[:, : round(STREAMED * rate) * frame], ours.encode(wav)
        few = codes[..., : round(STREAMED * rate)]
        works = {"ours": codec_works(ours.encode, ours.decode, wav, codes) | streams(ours, short, few)}
        for way, (_, model, encode, decode) in peers.items():
            works[way] = codec_works(encode, decode, wav, codes)
            works[way] |= moshi_streams(model, short, few) if way == "moshi" else {}
        checks = [(size, way, *check_codecs(loaded[way], *peers[way][2:], short)) for way in peers]
        times = codec_times(works, repeats, device)
    seconds = {column: STREAMED if column.endswith("stream") else length for column in times["ours"]}
    return {way: {column: seconds[column] / s for column, s in mine.items()} for way, mine in times.items()}, checks


def codec_memory(size, minutes):
    """The most bytes that a process holds while it encodes so many minutes, codec and recording included, and those of
    the samples themselves."""
    name, options, *_ = CODEC_SIZES[size]
    torch.manual_seed(0)
    codec = open_network(name, options, "", "cpu")
    wav = torch.randn(1, int(minutes * 60 * codec.sample_rate)).mul_(0.1)
    forget_peak("cpu")
    codec.encode(wav)
    return peak("cpu"), wav.nbytes


def compare_codecs(sizes, repeats, minutes):
    """Print the tables of the codecs with network weights."""
    device, rows, checks, memory = pick_device("auto"), [], [], []
    columns = ["encode", "decode", "encode batch", "decode batch", "encode stream", "decode stream"]
    for size in tqdm(sizes, "codecs"):
        speeds, checked = compare_codec(size, repeats, device)
        checks += checked
        for way, mine in speeds.items():
            cells = [f"{mine[column]:.3g} x" if column in mine else "" for column in columns]
            rows.append((size, way, f"{CODEC_SIZES[size][2]} s", *cells))
        most, samples = apart(codec_memory, size, minutes)
        if most is not None:
            memory.append((size, f"{most / 1e6:.0f}", f"{(most + samples * (60 / minutes - 1)) / 1e9:.2f}"))
    print(f"\nTimes faster than real time, median of {repeats}, float32; batch: {AT_ONCE} recordings, together as long "
          f"as the one; stream: {STREAMED} s frame by frame")  # fmt: skip
    print(table(rows, ["codec", "way", "audio", *columns]))
    if checks:
        print("Ours with another's weights against it:")
        checks = [(size, way, f"{alike:.2%}", f"{difference:.1e}") for size, way, alike, difference in checks]
        print(table(checks, ["codec", "way", "codes alike", "waveforms differ by"]))
    print(f"All that a process holds while it encodes {minutes:g} minutes on a CPU; an hour: with the samples of one")
    print(table(memory, ["codec", "MB", "GB for an hour"]))


@torch.no_grad()
def compare_prepare(speech, repeats):
    """Print what prepare.py reaches of the codec's own speed: Mimi at its full size, the same recordings."""
    paths, device = read_speech(speech), torch.device(pick_device("auto"))
    if not paths:
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            transformers_mimi(folder)
        except ImportError as error:
            print(f"prepare.py is not measured: {first_line(error)}")
            return
        codec = codecs.load_codec("mimi", folder).to(device)
        codec.save(folder)
        wavs = [codecs.read_audio(path, codec.sample_rate) for path in paths]
        seconds = [len(wav) / codec.sample_rate for wav in wavs]
        rows = [Utterance("", "", path, "", "", seconds=s) for path, s in zip(paths, seconds, strict=True)]
        ordered = [wavs[i].numpy() for i in prepare.longest_first(rows)]
        pool = prepare.start_pool(0)

        def own():
            if device.type == "cuda":
                list(prepare.encode_batches(codec, ordered, device, prepare.batch_seconds))
            else:
                for wav in wavs:
                    codec.encode(wav[None])

        def prepared():
            list(prepare.encode_all(codec, rows, pool, device, folder, prepare.batch_seconds))

        times = codec_times({"own": {"": own}, "prepare": {"": prepared}}, repeats, device.type)
        pool.shutdown()
    own, prepared = times["own"][""], times["prepare"][""]
    speeds = f"{sum(seconds) / own:.3g} x real time, prepare.py {sum(seconds) / prepared:.3g} x, {own / prepared:.0%}"
    print(f"\n{len(wavs)} recordings, {sum(seconds):.0f} s, to Mimi's codes: the codec alone {speeds} of that")


def bench_codec(cfg):
    """What mel keeps; the speed and memory of all others, ours and others'; that of prepare.py."""
    parts = chosen(cfg.sizes, {"mel": None, **CODEC_SIZES, "prepare": None}, "sizes")
    print(machine(pick_device("auto")))
    if "mel" in parts:
        bench_mel(cfg)
    if networks := [size for size in parts if size in CODEC_SIZES]:
        compare_codecs(networks, cfg.repeats, cfg.minutes)
    if "prepare" in parts:
        compare_prepare(cfg.speech, cfg.repeats)


BENCHES = {
    "data": bench_data, "codec": bench_codec, "sample": bench_sample, "families": bench_families, "loss": bench_loss,
    "train": bench_train,
}  # fmt: skip


def main(cfg):
    if cfg.name not in BENCHES:
        raise ValueError(f"bench.py measures {', '.join(BENCHES)}, not {cfg.name!r}")
    BENCHES[cfg.name](cfg)


if __name__ == "__main__":
    configurator.run(main, __file__, positional=("name",))

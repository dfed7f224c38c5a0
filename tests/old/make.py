"""Writes tests/old: files that older code wrote, and the numbers that it computed from them.

    git worktree add /tmp/older 0a5f68c && PYTHONPATH=/tmp/older python tests/old/make.py /tmp/old

It runs with the code of commit 0a5f68c only; tests/test_old.py compares the newest code with what it wrote.
"""

import csv
import importlib.util
import json
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import configurator
import numpy as np
import torch
from metrics import read_metrics

import codec as codecs
import prepare
import train
from data import Batches, TokenFiles
from model import load_checkpoint, load_model
from sample import Voice

ROOT = Path(train.__file__).parent
# token folder: training and held-out utterances of each of three voices, text_format, codec_args, more keys
TOKENS = {
    "tokens_csm": (8, 2, "[{speaker}] {text}", dict(n_codebooks=3, codebook_size=32, frame_rate=12.5), []),
    "tokens_flat": (8, 2, "{speaker}: {text}", dict(n_codebooks=2, codebook_size=32, frame_rate=12.5), []),
    "tokens_xtts": (2, 1, "[{speaker}] {text}", dict(n_codebooks=1, codebook_size=64, frame_rate=20),
                    ["--references=True"]),
}  # fmt: skip
TINY = ["--max_tokens=400", "--warmup_iters=2", "--lr_decay_iters=12", "--learning_rate=0.01", "--log_interval=1",
        "--eval_interval=6", "--eval_samples=0", "--device=cpu", "--temperature=0.0",
        "--frame_dropout=0.3"]  # fmt: skip
SIZES = "'n_head': 2, 'd_model': 8, 'd_ff': 16, 'max_positions': 512"
LLAMA, LFM2 = "'n_layer': 2, 'n_kv_head': 1", "'n_layer': 3, 'n_kv_head': 1, 'layers': 'caa', 'qk_norm': True"
GPT2 = "'n_layer': 1, 'n_kv_head': 2, 'rope_theta': 0.0, 'feed_forward': 'gelu', 'bias': True"
VALLE = "'n_layer': 2, 'n_kv_head': 2, 'rope_theta': 10000.0, 'feed_forward': 'geglu', 'final_norm': False"
RUNS = {
    "csm": ("tokens_csm", ["--arch=csm", f"--backbone={{{LLAMA}, {SIZES}}}",
                           f"--decoder={{'n_layer': 1, 'n_kv_head': 2, {SIZES}}}", "--decoder_fraction=0.5",
                           "--sparse_embeddings=True"]),
    "lora": ("tokens_csm", ["--init_from=csm/best.pt", "--lora_rank=2", "--lora_dropout=0.1", "--ema=0.5"]),
    "kani": ("tokens_flat", ["--arch=kani", f"--backbone={{{LFM2}, {SIZES}}}", "--loss_on=codebook", "--muon=True"]),
    "valle_ar": ("tokens_flat", ["--arch=valle", "--mode=ar", f"--backbone={{{VALLE}, {SIZES}}}",
                                 "--shared_heads=True", "--voice_prompt=0.3"]),
    "valle_nar": ("tokens_flat", ["--arch=valle", "--mode=nar", f"--backbone={{{VALLE}, {SIZES}}}", "--rounds=4"]),
    "xtts": ("tokens_xtts", ["--arch=xtts", f"--backbone={{{GPT2}, {SIZES}}}", "--n_latents=2",
                             "--conditioning_layers=1", "--perceiver_layers=1", "--perceiver_heads=1",
                             "--text_positions=32", "--code_positions=80", "--reference_seconds=[0.5, 1.0]",
                             "--voice_prompt=1.0"]),
}  # fmt: skip
KEPT = ["csm/best.pt", "csm/last.pt", "lora/last.pt", "kani/last.pt", "valle_ar/best.pt", "valle_nar/best.pt",
        "xtts/best.pt"]  # fmt: skip
RECIPES = {"digits": "tokens_csm", "digits_kani": "tokens_flat", "digits_valle_ar": "tokens_flat",
           "digits_valle_nar": "tokens_flat", "digits_xtts": "tokens_xtts"}  # fmt: skip
SHORT = ["--max_iters=20", "--warmup_iters=4", "--log_interval=1", "--eval_interval=20", "--eval_samples=0",
         "--device=cpu"]  # fmt: skip
NUMBERS = ("iter", "loss", "val_loss", "grad_norm", "lr")
TEXT = "three one four"


def make_tokens(raw, folder, count, held_out, text_format, codec_args, more):
    """Write a token folder from strings of digits of the built-in data set."""
    with open(raw / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    chosen, names = [], []
    for voice in ("slt", "rms", "awb"):
        for held, n in ((True, held_out), (False, count)):
            some = [r for r in rows if r["speaker"] == voice and ("heldout" in r["audio"]) == held][:n]
            chosen += some
            names += [Path(r["audio"]).stem for r in some if held]
    source = raw / f"{folder}.csv"
    with open(source, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(chosen)
    (raw / "heldout.txt").write_text("\n".join(names))
    codec_args = {**codec_args, "sample_rate": 16000, "n_mels": 8, "dims": 4}
    flags = [f"--sources={source}", f"--heldout={raw}/heldout.txt", f"--data_dir={folder}", "--vocab_size=300",
             f"--text_format={text_format}", "--codec=mel", f"--codec_args={codec_args}", "--workers=1", *more]
    prepare.main(configurator.configure(prepare.__file__, flags))
    Path(folder, "report.json").unlink()


def run(*flags):
    train.main(configurator.configure(train.__file__, list(flags)))


def numbers(out_dir):
    return [{key: line[key] for key in NUMBERS if key in line} for line in read_metrics(f"{out_dir}/metrics.jsonl")]


def wave():
    """A second of a tone that glides and swells: the same on any machine to 1e-7."""
    t = torch.arange(16000, dtype=torch.float64) / 16000
    return (0.3 * torch.sin(2 * torch.pi * (200 * t + 600 * t**2)) * (1 + torch.sin(9 * t)) / 2).float()


def measure(path, tokens):
    """Held-out losses of a checkpoint, the codes that it speaks, and the logits of its probe."""
    checkpoint = load_checkpoint(path)
    model, files = load_model(checkpoint), TokenFiles(tokens, "val")
    reference = (10, 20) if model.reference else None
    batches = Batches(files, model.layout, model.length, 1000, 8, shuffle=False, reference=reference)
    losses = []
    for i in range(len(files)):
        torch.manual_seed(i)
        with torch.no_grad():
            losses.append(float(model(*batches.read([i]))[0]))
    probe = checkpoint["probe"]
    side = {"reference": probe["reference"]} if "reference" in probe else {}
    with torch.no_grad():
        logits = model.teacher_forced_logits(probe["text"].numpy(), probe["codes"].numpy(), **side)
    voice = Voice.from_checkpoint(path, device="cpu")
    spoken = voice.frames(TEXT, speaker="rms", temperature=0.0, cap_seconds=1.0)
    drawn = voice.frames(TEXT, speaker="slt", temperature=1.0, top_k=8, seed=3, cap_seconds=1.0)
    codes = {"spoken": [frame.tolist() for frame in spoken], "drawn": [frame.tolist() for frame in drawn]}
    return {"losses": losses, **codes}, logits[:6].float().numpy()


def dense(expected):
    """JSON with a line for each list of numbers and each line of a log."""
    text = json.dumps(expected, indent=1)
    return re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda found: " ".join(found[0].split()), text)


def plain(info):
    """A member of the archive without the time and the user that made it."""
    info.mtime = info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def main(folder):
    torch.set_num_threads(1)
    folder = Path(folder).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.chdir(folder)
    raw = folder.parent / "raw_digits"
    spec = importlib.util.spec_from_file_location("digits_prepare", ROOT / "data/digits/prepare.py")
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    digits.make(str(raw), 60, 0)
    expected, arrays = {"codecs": {}, "runs": {}, "recipes": {}}, {}
    for name, (count, held_out, text_format, codec_args, more) in TOKENS.items():
        make_tokens(raw, name, count, held_out, text_format, codec_args, more)
        codec = codecs.load_codec("mel", name)
        codes = codec.encode(wave()[None])
        arrays[f"{name}.codes"], arrays[f"{name}.wav"] = codes[0].numpy(), codec.decode(codes)[0, ::100].numpy()
        text = TokenFiles(name, "val").tokenizer().encode(TEXT)
        expected["codecs"][name] = {"fingerprint": codec.fingerprint(), "text": [int(i) for i in text]}
    for name, (tokens, flags) in RUNS.items():
        keys = [*TINY, *flags, f"--data_dir={tokens}", f"--out_dir={name}"]
        if name == "valle_nar":
            keys.remove("--frame_dropout=0.3")
        run(*keys, "--max_iters=6")
        found = {"tokens": tokens, "flags": keys, "lines": numbers(name), "resumed": []}
        kept = [path for path in KEPT if path.startswith(f"{name}/")]
        found["checkpoint"] = kept[-1]
        found["measured"], arrays[f"{name}.logits"] = measure(found["checkpoint"], tokens)
        for path in ("config.json", "loss.html", "samples"):
            shutil.rmtree(f"{name}/{path}") if path == "samples" else Path(name, path).unlink()
        for path in {f"{name}/best.pt", f"{name}/last.pt"} - {*kept}:
            Path(path).unlink()
        if f"{name}/last.pt" not in kept:
            Path(name, "metrics.jsonl").unlink()
        if kept[-1] == f"{name}/last.pt":
            shutil.copytree(name, f"{name}_resumed")
            keys = [key for key in keys if not key.startswith(("--init_from", "--out_dir"))]
            run(*keys, f"--out_dir={name}_resumed", "--max_iters=12", "--init_from=resume")
            found["resumed"] = numbers(f"{name}_resumed")[6:]
            shutil.rmtree(f"{name}_resumed")
        expected["runs"][name] = found
    Path("recipes").mkdir()
    for name, tokens in RECIPES.items():
        shutil.copy(ROOT / f"config/{name}.py", "recipes")
        run(f"recipes/{name}.py", *SHORT, f"--data_dir={tokens}", f"--out_dir=out_{name}")
        expected["recipes"][name] = {"tokens": tokens, "flags": SHORT, "lines": numbers(f"out_{name}")}
        shutil.rmtree(f"out_{name}")
    Path("expected.json").write_text(dense(expected) + "\n")
    np.savez_compressed("expected.npz", **arrays)
    # one archive, as the files repeat each other: 250 KB instead of 900
    listed = sorted(path for path in folder.iterdir() if path.is_dir())
    with tarfile.open("written.tar.xz", "w:xz", preset=9) as archive:
        for path in listed:
            archive.add(path, path.name, filter=plain)
            shutil.rmtree(path)


if __name__ == "__main__":
    main(sys.argv[1])

"""What several test files share: small models, utterances, token folders and runs of training."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import train
from codec import load_codec
from data import TokenWriter
from model import CSM, GPT2, VALLE, XTTS, CSMConfig, Kani, KaniConfig, VallE, VallEConfig, XTTSConfig
from parts import configurator
from parts.metrics import read_metrics
from parts.text import SentencePiece, train_tokenizer
from weights import load_checkpoint

ROOT = Path(__file__).parents[1]
WORDS = ["zero", "one", "two", "three"]
TINY = [
    "--backbone={'n_layer': 1, 'n_head': 2, 'n_kv_head': 1, 'd_model': 16, 'd_ff': 32}",
    "--decoder={'n_layer': 1, 'n_head': 2, 'n_kv_head': 2, 'd_model': 8, 'd_ff': 16}",
    "--max_tokens=120", "--warmup_iters=2", "--log_interval=1", "--eval_interval=4", "--eval_samples=0", "--device=cpu",
]  # fmt: skip
STACK = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, max_positions=128)
LFM2_STACK = dict(STACK, n_layer=4, max_positions=512, layers="caca", qk_norm=True)
GPT2_STACK = dict(n_layer=2, n_head=4, n_kv_head=4, d_model=32, d_ff=48, **GPT2)
VALLE_STACK = dict(n_layer=2, n_head=4, n_kv_head=4, d_model=32, d_ff=48, max_positions=256, **VALLE)
GREEDY = dict(temperature=0.0)


def write_tokens(folder, n_train=30, n_val=5, noise=0, words=WORDS, K=3, V=16, n_mels=20, references=False,
                 languages=()):  # fmt: skip
    """A token folder of two voices: each word is four frames that follow from it; the codec is fitted on noise.

    references: also write features of recordings, which tell the voice. languages: each other pair of utterances is in
    the second one, in which a word sounds like another one.
    """
    rng = np.random.default_rng(0)
    tokenizer = SentencePiece(train_tokenizer(["[a][b]" + " ".join(words)], 300, ["[a]", "[b]"]))
    codec = load_codec("mel", n_codebooks=K, codebook_size=V, sample_rate=4000, n_mels=n_mels, dims=16)
    codec.fit([0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(noise))])
    sizes = codec.sizes(references)
    with TokenWriter(folder, references="recording" if references else "") as w:
        for i in range(n_train + n_val):
            spoken = rng.integers(0, len(words), rng.integers(1, 4))
            language = i // 2 % max(1, len(languages))
            sounds = (spoken + language) % len(words)
            codes = (4 if K == 1 else 3) * np.repeat(sounds, 4)[:, None] + np.arange(K)
            codes = (codes + np.arange(4 * len(spoken))[:, None] % 4) % V
            text = f"[{'ab'[i % 2]}]" + " ".join(words[j] for j in spoken)
            heard = None
            if references:
                heard = rng.standard_normal((len(codes) * sizes["reference"]["rows_per_frame"], n_mels)) + i % 2
            w.add("train" if i < n_train else "val", f"u{i}", tokenizer.encode(text), codes, i % 2, heard, language)
        w.file("tokenizer.model", tokenizer.model)
        codec.save(w.partial)
        described = {"name": codec.name, "fingerprint": codec.fingerprint(), **sizes}
        w.finish({"codec": described, "tokenizer": tokenizer.describe(),
                  "text_format": "[{speaker}]{text}", "lowercase": False, "speakers": ["a", "b"],
                  **({"languages": list(languages)} if languages else {})})  # fmt: skip
    return str(folder)


def run(data_dir, out_dir, *flags, usual=TINY):
    """Train in this process, give back last.pt and the lines of metrics.jsonl."""
    flags = [*usual, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *flags]
    train.main(configurator.configure(train.__file__, flags))
    return load_checkpoint(f"{out_dir}/last.pt"), read_metrics(f"{out_dir}/metrics.jsonl")


def exact(lines):
    """What does not depend on the machine's speed."""
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def same(a, b, path="checkpoint"):
    """Equality of nested states, tensors bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in ("config", "seconds"):
                same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def widened(cls, config):
    """A model with weights so wide that its logits differ."""
    torch.manual_seed(0)
    model = cls(config)
    for p in model.parameters():
        if p.ndim > 1:
            p.data.normal_(std=0.3)
    return model


def tiny(K=4, V=16, backbone=None, decoder=None, **options):
    """A small CSM."""
    return widened(CSM, CSMConfig(
        text_vocab_size=30, n_codebooks=K, codebook_size=V, text_bos=1, text_eos=2,
        backbone={**STACK, **(backbone or {})}, decoder={**STACK, "d_model": 16, **(decoder or {})},
        **{"decoder_fraction": 1.0, **options},
    ))  # fmt: skip


def tiny_kani(K=4, V=16, backbone=None, **options):
    options = {"text_bos": 1, "text_eos": 2, **options}
    return widened(Kani, KaniConfig(30, K, V, {**LFM2_STACK, **(backbone or {})}, **options))


def tiny_xtts(backbone=None, **options):
    """An XTTS of 16 codes that hears recordings with 6 features a row."""
    sizes = dict(n_latents=5, conditioning_layers=2, perceiver_layers=2, perceiver_heads=2, reference_bands=6,
                 reference_rate=10.0, text_positions=20, code_positions=30)  # fmt: skip
    return widened(XTTS, XTTSConfig(30, 16, {**GPT2_STACK, **(backbone or {})}, 1, 2, **{**sizes, **options}))


def tiny_valle(mode="nar", K=4, V=16, backbone=None, **options):
    options = {"text_bos": 1, "text_eos": 2, "rounds": 4, **options}
    model = widened(VallE, VallEConfig(30, K, V, {**VALLE_STACK, **(backbone or {})}, mode=mode, **options))
    model.heads.data *= 0.1
    return model


def utterance(n=5, T=6, K=4, V=16, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(3, 30, n), rng.integers(0, V, (T, K))


def batch_of(model, *utterances, width=0):
    """Laid out and padded on the right, as data.py does: tokens (B, S, C), segment (B, S)."""
    rows = [model.layout(*u) for u in utterances]
    S = max(width, *(len(s) for _, s in rows))
    tokens = np.stack([np.pad(t, ((0, S - len(t)), (0, 0))) for t, _ in rows])
    return torch.from_numpy(tokens), torch.from_numpy(np.stack([np.pad(s, (0, S - len(s))) for _, s in rows]))


def spoken_by(model, *given, **options):
    """All the frames, and whether the model ended by itself."""
    speaking, frames = model.generate(*given, **options), []
    while True:
        try:
            frames.append(next(speaking).tolist())
        except StopIteration as end:
            return frames, end.value


def choices(*codes):
    """A `choose` that picks these codes, one after the other."""
    codes = iter(codes)
    return lambda logits, **how: torch.tensor([int(next(codes)) for _ in logits.flatten(0, -2)]).view(logits.shape[:-1])


def always(code):
    """A `choose` that picks the same code again and again."""
    return lambda logits, **how: torch.full(logits.shape[:-1], code)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, **tolerance)


def checkpoint_of(model, **more):
    return {"arch": "csm", "model_config": asdict(model.config), "model": model.state_dict(), "ema": None, **more}


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def voice(seconds, seed=0, rate=16000):
    """Something like a voice: harmonics of a gliding pitch that come and go, with noise between."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * rng.uniform(0.5, 1.5) * t)) / rate
    loud = [np.sin(2 * np.pi * rng.uniform(0.5, 3) * t + rng.uniform(0, 6)) for _ in range(20)]
    wav = sum(np.clip(a, 0, 1) * np.sin(k * phase) / k for k, a in enumerate(loud, 1))
    wav = 0.2 * wav + 0.02 * rng.standard_normal(len(t)) * np.clip(-loud[0], 0, 1)
    return torch.tensor(wav, dtype=torch.float32)


def command(folder, *words):
    """What a script of the repository in `folder`, called there with these words, prints. It must succeed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shell(folder, session):
    """What a session of commands prints that bash runs in `folder`, where `python` is this one. Each must succeed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    script = 'set -e -x -o pipefail\npython() { "$PYTHON" "$@"; }\n' + session
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_page(path):
    """The data of a page of parts/page.py."""
    _, _, rest = Path(path).read_text(encoding="utf-8").partition('<script type="application/json" id="page">')
    return json.loads(rest.partition("</script>")[0])

"""The whole road as a person walks it: recordings, token files, a trained model, speech."""

import json
from functools import partial
from pathlib import Path

import soundfile
from helpers import command

run = partial(command, Path(__file__).parent.parent)  # a script of the repository, called from its folder


def test_from_recordings_to_speech_and_a_small_set_is_learnt_by_heart(tmp_path):
    raw, tokens, out = tmp_path / "digits", tmp_path / "tokens", tmp_path / "out"
    run("data/digits/prepare.py", "--n=16", f"--folder={raw}")
    keys = {"n_codebooks": 4, "codebook_size": 32, "sample_rate": 16000, "frame_rate": 12.5}
    run("prepare.py", "config/memorise.py", f"--sources={raw}", f"--heldout={raw}/heldout.txt", f"--data_dir={tokens}",
        f"--codec_args={keys}")  # fmt: skip
    assert json.loads((tokens / "meta.json").read_text())["splits"]["train"]["utterances"] == 16

    said = run("train.py", "config/memorise.py", f"--data_dir={tokens}", f"--out_dir={out}", "--max_iters=80",
               "--warmup_iters=10", "--eval_interval=20", "--eval_samples=1", "--max_batch=16")  # fmt: skip
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["c0_accuracy"] > 0.95
    assert "overfitting: held-out loss" in said
    assert (out / "loss.html").stat().st_size > 1000 and (out / "best.pt").exists()

    said = run("sample.py", f"--ckpt={out / 'last.pt'}", "--text=three one four", f"--out_dir={tmp_path / 'spoken'}")
    assert "the contract holds" in said
    wav, rate = soundfile.read(tmp_path / "spoken" / "000.wav")
    assert rate == 16000 and len(wav) > 0.2 * rate and abs(wav).max() > 0.05

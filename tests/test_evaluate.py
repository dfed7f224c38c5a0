"""evaluate.py: what is measured of speech, the model as its judge, the command and what it writes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    WORDS,
    run,
    tiny,
    tiny_kani,
    tiny_valle,
    tiny_xtts,
    utterance,
    write_tokens,
)

import evaluate
from model import contract_check
from parts import judge
from voice import Voice

PLAIN = SimpleNamespace(temperature=0.0, seed=1)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Tiny CSMs that were trained on words for more and more steps: folders, the worst first; and their token files."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokens = write_tokens(folder / "tokens", n_train=60, n_val=6)
    flags = ["--max_batch=8", "--learning_rate=1e-2", "--eval_interval=1000", "--seed=3", "--max_tokens=400",
             "--backbone={'n_layer': 2, 'n_head': 2, 'n_kv_head': 2, 'd_model': 32, 'd_ff': 64}"]  # fmt: skip
    for steps in (1, 60):
        run(tokens, folder / f"run{steps}", *flags, f"--max_iters={steps}", "--warmup_iters=1")
    return folder


@pytest.fixture
def good(trained):
    return Voice.from_checkpoint(str(trained / "run60/best.pt"))


@pytest.fixture
def bad(trained):
    return Voice.from_checkpoint(str(trained / "run1/best.pt"))


# ---------------------------------------------------------------------------------------------------------------------
# the model as a judge


@pytest.mark.parametrize("model, K, side", [
    (tiny(), 4, {}), (tiny(prompt_style="joined"), 4, {}), (tiny_kani(), 4, {}), (tiny_valle("ar"), 4, {}),
    (tiny_valle("nar"), 4, {}), (tiny_xtts(), 1, {"voice": torch.ones(5, 32)}),
    (tiny_kani(speaker_size=6), 4, {"voice": torch.ones(1, 32)}),
], ids=["csm", "joined", "kani", "ar", "nar", "xtts", "kani2"])  # fmt: skip
def test_frames_are_scored_as_they_are_spoken(model, K, side):
    """With a prompt and with a voice too, the logits of the judge are those of generation."""
    text, codes = utterance(K=K)
    side = {**side, "prompt": utterance(4, 5, K, seed=1)}
    assert contract_check(model, text, codes, **side)["max_difference"] < 1e-4
    model.eval()
    plain = model.teacher_forced_logits(text, codes, **{key: x for key, x in side.items() if key != "prompt"})
    other = model.teacher_forced_logits(text, codes, **side)
    assert torch.equal(plain, other) == (K == 1)  # XTTS has its voice from elsewhere
    expected = [-sum(other[t, k].log_softmax(0)[codes[t, k]] for k in range(K)) for t in range(len(codes))]
    found = judge.frame_losses(model, torch.from_numpy(codes), text, **side)
    torch.testing.assert_close(found, torch.stack(expected).detach(), rtol=1e-4, atol=1e-4)


def test_a_margin_is_a_mean_over_others():
    own, others = torch.tensor([1.0, 2.0]), [torch.tensor([3.0, 2.0]), torch.tensor([5.0, 0.0])]
    assert judge.margin(own, others).tolist() == [3.0, -1.0]


def test_a_better_model_has_larger_margins(good, bad):
    texts = [f"{a} {b}" for a in WORDS for b in WORDS if a != b]
    (best, _), (worst, _) = (evaluate.measure(voice, texts, PLAIN) for voice in (good, bad))
    assert best["text_margin"] > worst["text_margin"] + 0.5 and abs(worst["text_margin"]) < 0.5
    assert best["voice_margin"] is not None and set(best) == set(worst) <= set(evaluate.NUMBERS)


def test_another_model_judges(good, bad):
    """A good judge hears that a bad model does not speak the text, and that a good one does."""
    texts = [f"{a} {b}" for a in WORDS for b in WORDS if a != b]
    numbers = [evaluate.measure(voice, texts, PLAIN, judging=good)[0]["text_margin"] for voice in (good, bad)]
    assert numbers[0] > numbers[1] + 0.5
    same, _ = evaluate.measure(good, texts, PLAIN)
    assert same["text_margin"] == numbers[0]


def test_one_prompt_has_no_rivals(good):
    numbers, rows = evaluate.measure(good, ["one"], PLAIN)
    assert numbers["text_margin"] is None and rows[0]["numbers"]["text_margin"] is None
    assert numbers["voice_margin"] is not None
    numbers, _ = evaluate.measure(good, ["one", "one"], PLAIN)
    assert numbers["text_margin"] is None


# ---------------------------------------------------------------------------------------------------------------------
# what is measured of speech


def said_by(good, wav, codes, **changes):
    (_, said), = good.speak(["one"])
    said.wav = torch.as_tensor(wav, dtype=torch.float32)
    said.spoken[0].codes = torch.as_tensor(codes)
    for name, value in changes.items():
        setattr(said, name, value)
    return said


def test_numbers_of_a_sound(good):
    rate = good.sample_rate
    loud = np.sign(np.sin(np.arange(rate) / 3)) * 0.5
    wav = np.concatenate([loud, np.zeros(rate), loud, np.ones(rate // 2)])
    codes = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 4], [5, 5, 5], [5, 5, 5]])
    said = said_by(good, wav, codes, ended=False, tries=[["silence"], [], []])
    found = evaluate.quotients(evaluate.sound(good, said))
    assert found["silence"] == pytest.approx(1.0, abs=0.05)
    assert found["clipping"] == pytest.approx(0.5 / 3.5, rel=1e-3) and found["repeats"] == 0.5
    assert found["missed"] == 100 and found["retries"] == 200
    ids = len(good.text_ids("one"))
    assert found["rate"] == pytest.approx(ids * good.frames_per_id / 5, rel=1e-4)


def test_sums_are_over_all_prompts(good):
    numbers, rows = evaluate.measure(good, ["one", "two one three"], PLAIN)
    assert [row["text"] for row in rows] == ["one", "two one three"] and [row["id"] for row in rows] == [0, 1]
    silences = [row["numbers"]["silence"] for row in rows]
    assert numbers["silence"] == pytest.approx(np.mean(silences), rel=1e-4)
    assert numbers["rtf"] > 0 and "rtf" not in rows[0]["numbers"]


def test_errors_of_what_is_heard(good):
    heard = iter(["One, two.", "three three"])
    listening = evaluate.Ears(recogniser=lambda wav, rate: next(heard))
    numbers, rows = evaluate.measure(good, ["one two", "three"], PLAIN, listening)
    assert [row["heard"] for row in rows] == ["One, two.", "three three"]
    assert [row["numbers"]["wer"] for row in rows] == [0.0, 1.0] and numbers["wer"] == pytest.approx(1 / 3, rel=1e-4)
    assert numbers["cer"] == pytest.approx(6 / 12, rel=1e-4)


def test_listeners_compare_with_the_right_voice(good):
    listening = evaluate.Ears(encoder=lambda wav, rate: np.array([1.0, 0.0]), naturalness=lambda wav, rate: 3.5,
                              voices={"a": np.array([0.6, 0.8]), "": np.array([0.0, 1.0])})  # fmt: skip
    prompts = ["one", "[b]two", {"text": "one", "speaker": "a"}]
    numbers, rows = evaluate.measure(good, prompts, PLAIN, listening)
    assert [row["numbers"]["similarity"] for row in rows] == [0.6, 0.0, 0.6] and numbers["mos"] == 3.5
    numbers, _ = evaluate.measure(good, ["[b]two"], PLAIN, listening._replace(voices={}))
    assert "similarity" not in numbers


@pytest.mark.parametrize("text_format, prompt, line", [
    ("{speaker}: {text}", "b: one two", {"speaker": "b", "text": "one two"}),
    ("[{speaker}]{text}", "[a] one", {"speaker": "a", "text": "one"}),
    ("[{speaker}] {text}", "[b]one", {"speaker": "b", "text": "one"}),
    ("{speaker}: {text}", "c: one", {"text": "c: one"}), ("{speaker}: {text}", "b:", {"text": "b:"}),
    ("{text}", "b: one", {"text": "b: one"}),
])  # fmt: skip
def test_a_prompt_may_name_its_voice(good, text_format, prompt, line):
    good.meta = {**good.meta, "text_format": text_format}
    assert evaluate.as_line(good, prompt) == (line, line["text"])


# ---------------------------------------------------------------------------------------------------------------------
# held-out recordings


def test_held_out_loss_is_that_of_the_run(trained, good):
    files = evaluate.held_out_files(good)
    found = evaluate.held_out_loss(good, files)
    lines = [json.loads(line) for line in (trained / "run60/metrics.jsonl").read_text().splitlines()]
    assert found["val_loss_by_codebook"] == pytest.approx(lines[-1]["val_loss_by_codebook"], rel=1e-4)
    assert found["val_loss"] == pytest.approx(np.mean(found["val_loss_by_codebook"]))


def test_held_out_prompts_are_texts_of_the_data(good):
    files = evaluate.held_out_files(good)
    prompts = evaluate.held_out_prompts(good, files, 4)
    assert len(prompts) == 4 and len(evaluate.held_out_prompts(good, files, 100)) == 6
    for prompt in prompts:
        assert prompt["text"] == prompt["words"] and set(prompt["words"].split()) <= set(WORDS)
        assert prompt["speaker"] in "ab"
    good.meta = {**good.meta, "lowercase": True}
    good.tokenizer.decode = lambda ids: "ONE!"
    assert isinstance(evaluate.held_out_prompts(good, files, 1)[0]["text"], np.ndarray)


def test_data_of_another_codec_are_refused(good, tmp_path):
    with pytest.raises(ValueError, match="another codec"):
        evaluate.held_out_files(good, write_tokens(tmp_path / "codec", noise=1))
    with pytest.raises(ValueError, match="another tokenizer"):
        evaluate.held_out_files(good, write_tokens(tmp_path / "text", words=["four", "five", "six", "nine"]))
    good.trained_with = {}
    with pytest.raises(ValueError, match="--data_dir"):
        evaluate.held_out_files(good)


def test_which_side_is_better():
    assert evaluate.better("val_loss") == "low" == evaluate.better("weighted_loss")
    assert evaluate.better("text_margin") == "high" == evaluate.better("val_c0_accuracy")
    assert evaluate.better("rate") == ""

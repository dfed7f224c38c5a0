"""evaluate.py: what is measured of speech, the model as its judge, the command and what it writes."""

import csv
import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from helpers import WORDS, read_page, run, tiny, tiny_kani, tiny_valle, tiny_xtts, utterance, write_tokens

import evaluate
from model import contract_check
from parts import configurator, judge
from voice import Voice
from weights import load_checkpoint, save_checkpoint

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


def test_a_margin_is_how_well_a_frame_tells_its_text():
    own, *others = torch.tensor([[1.0, 2.0, 5000.0], [1.0, 900.0, 1.0], [1.0, 3.0, 5000.0]])
    p = 1 / (1 + math.exp(-1))
    found = judge.margin(own, others)
    torch.testing.assert_close(found[:2], torch.tensor([0.0, math.log(3 * p)]))
    assert found[2] < -4000 and judge.margin(own[:1], [own[:1] + 1e6]).item() == pytest.approx(math.log(2))


def test_a_better_model_has_larger_margins(good, bad):
    texts = [f"{a} {b}" for a in WORDS for b in WORDS if a != b]
    (best, _), (worst, _) = (evaluate.measure(voice, texts, PLAIN) for voice in (good, bad))
    assert best["text_margin"] > worst["text_margin"] + 0.2 and abs(worst["text_margin"]) < 0.1
    assert best["voice_margin"] is not None and set(best) == set(worst) <= set(evaluate.NUMBERS)


def test_another_model_judges(good, bad):
    """A good judge hears that a bad model does not speak the text, and that a good one does."""
    texts = [f"{a} {b}" for a in WORDS for b in WORDS if a != b]
    judging = evaluate.Judge(good, {})
    numbers = [evaluate.measure(voice, texts, PLAIN, judging=judging)[0]["text_margin"] for voice in (good, bad)]
    assert numbers[0] > numbers[1] + 0.2
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


# ---------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("one two\n[b]two one three\nthree\nzero one\n")
    return str(path)


def command(*flags):
    evaluate.main(configurator.configure(evaluate.__file__, ["--device=cpu", "--temperature=0", *flags]))


@pytest.fixture(scope="session")
def evaluated(trained, prompts, tmp_path_factory):
    """The folder of an evaluation of both models, which had another recording in it before."""
    out = tmp_path_factory.mktemp("out") / "compared"
    (out / "gone").mkdir(parents=True)
    (out / "gone/007.wav").write_bytes(b"")
    (out / "mine.wav").write_bytes(b"")
    line = dict.fromkeys(evaluate.COLUMNS, "") | {"file_name": "gone/007.wav"}
    (out / "metadata.jsonl").write_text(json.dumps(line))
    command(f"--ckpt={trained}/run*", f"--prompts={prompts}", f"--out_dir={out}")
    (out / "mine.wav").unlink()
    return out


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_models_are_ranked(evaluated):
    """By the margin, and the model that was trained longer is better; the page has the same numbers."""
    rows = list(csv.DictReader((evaluated / "results.csv").open(newline="")))
    assert [(row["rank"], row["model"], row["iter"]) for row in rows] == [("1", "run60", "60"), ("2", "run1", "1")]
    assert float(rows[0]["text_margin"]) > float(rows[1]["text_margin"])
    assert float(rows[0]["val_loss"]) < float(rows[1]["val_loss"])
    losses = [float(rows[0][f"val_loss_by_codebook/{k}"]) for k in range(3)]
    assert float(rows[0]["val_loss"]) == pytest.approx(np.mean(losses))
    page = read_page(evaluated / "index.html")
    assert page["rank_by"] == "text_margin" and [model["name"] for model in page["models"]] == ["run60", "run1"]
    for row, model in zip(rows, page["models"], strict=True):
        for name, value in model["numbers"].items():
            assert row[name] == ("" if value is None else str(value)), name
        assert [column["name"] for column in page["columns"]] == list(model["numbers"])
        assert model["config"]["iter"] == int(row["iter"]) and model["curves"]["val_loss"]
    assert "wer" not in rows[0] and {column["better"] for column in page["columns"]} == {"low", "high", ""}
    assert str(evaluated.parent) not in (evaluated / "index.html").read_text()


def test_the_folder_is_a_data_set(evaluated):
    lines = lines_of(evaluated / "metadata.jsonl")
    assert [(x["model"], x["sentence_id"], x["sentence"]) for x in lines] == [
        (model, i, text) for model in ("run60", "run1")
        for i, text in enumerate(["one two", "two one three", "three", "zero one"])
    ]  # fmt: skip
    for line in lines:
        assert soundfile.info(evaluated / line["file_name"]).samplerate == 4000
        assert json.loads(line["config"])["iter"] in (1, 60) and "text_margin" in line
        assert "val_loss" not in line and "rtf" not in line  # these are of a model, not of a sentence
    audio = sorted(str(path.relative_to(evaluated)) for path in evaluated.rglob("*.wav"))
    assert audio == sorted(line["file_name"] for line in lines)  # the older recording is gone


def test_a_name_with_a_word_of_the_hub_makes_no_split():
    names = {"test": "xtestx", "my_test_run": "my_xtestx_run", "dev2": "xdevx2", "latest": "latest", "rain": "rain",
             "trained": "trained", "1-val": "1-xvalx"}  # fmt: skip
    assert {name: evaluate.folder_name(name) for name in names} == names


def test_the_judge_is_the_model_with_the_lowest_loss(capsys):
    cfg = SimpleNamespace(judged_by="")
    losses = {"a": {"val_loss": 2.0}, "b": {"val_loss": 1.0}}
    assert evaluate.best_judge(cfg, losses, {"a": "x", "b": "x"}) == "b" and not capsys.readouterr().out
    assert evaluate.best_judge(cfg, {"a": losses["a"], "b": {}}, {"a": "x", "b": "x"}) == "a"  # of published weights
    for others, codecs in ((losses, {"a": "x", "b": "y"}), ({"a": {}, "b": {}}, {"a": "x", "b": "x"})):
        assert evaluate.best_judge(cfg, others, codecs) == "" and "judges its own" in capsys.readouterr().out
    assert evaluate.best_judge(cfg, {"a": {}}, {"a": "x"}) == "" and not capsys.readouterr().out
    assert evaluate.best_judge(SimpleNamespace(judged_by="c"), losses, {}) == "c"


def test_a_judge_of_another_codec_is_refused(trained, tmp_path):
    other = write_tokens(tmp_path / "tokens", noise=1)
    run(other, tmp_path / "other", "--max_iters=1", "--warmup_iters=1", "--eval_interval=1")
    with pytest.raises(ValueError, match="best.pt cannot judge .*run60/best.pt, which speaks in the codes of another"):
        command(f"--ckpt={trained}/run60", f"--judged_by={tmp_path}/other/best.pt", f"--out_dir={tmp_path / 'out'}")


def test_the_hub_s_library_reads_the_folder(evaluated):
    datasets = pytest.importorskip("datasets")
    if int(datasets.__version__.split(".")[0]) > 3:
        pytest.importorskip("torchcodec")  # with which these versions read recordings
    read = datasets.load_dataset("audiofolder", data_dir=str(evaluated), split="train")
    read = read.cast_column("audio", datasets.Audio(decode=False))
    assert len(read) == 8 and {*read["model"]} == {"run1", "run60"} and read[0]["audio"]["path"].endswith(".wav")


def test_held_out_texts_are_the_usual_prompts(trained, tmp_path, monkeypatch):
    """A recipe's own folder holds the run, so that the page goes into one below it."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"out_dir = {str(trained / 'run60')!r}\n")
    command(str(recipe), "--n_prompts=3", "--quantize=int8")
    lines = lines_of(trained / "run60/evaluation/metadata.jsonl")
    assert len(lines) == 3 and all(set(line["sentence"].split()) <= set(WORDS) for line in lines)


def test_thresholds(trained, prompts, tmp_path, capsys):
    """Each number that misses one is a line, and the exit code is 1."""
    asr = f"""{sys.executable} -c "print('one two')" {{wav}}"""
    flags = f"--ckpt={trained}/run60", f"--prompts={prompts}", f"--out_dir={tmp_path}", f"--asr={asr}"
    command(*flags, "--threshold=missed=100,text_margin=-50,wer=5")
    page = read_page(tmp_path / "index.html")
    assert page["rank_by"] == "wer" and page["sentences"][0]["numbers"]["run60"]["wer"] == 0.0
    assert lines_of(tmp_path / "metadata.jsonl")[2]["heard"] == "one two"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(*flags, "--threshold=text_margin=500, wer=0.05, missed=100")
    assert stop.value.code == 1
    margin, wer = capsys.readouterr().err.splitlines()[-2:]
    assert margin.startswith("run60: text_margin is ") and margin.endswith(", not 500")
    assert wer.startswith("run60: wer is ") and wer.endswith(", not 0.05")


@pytest.mark.parametrize("flags, message", [
    (["--threshold=wer=0.05"], "threshold = 'wer=0.05': wer needs --asr"),
    (["--threshold=mised=1"], "'mised' is none of the numbers, did you mean missed?"),
    (["--threshold=missed"], "missed needs a number"), (["--threshold=missed=few"], "missed needs a number"),
    (["--threshold=rate=1"], "neither a low nor a high rate is better"),
    (["--rank_by=similarity"], "rank_by = 'similarity': similarity needs --similarity"),
    (["--text=one", "--prompts={bad}"], "either --text or --prompts"),
    (["--rank_by=x"], "none of the numbers: val_loss, text_margin"), (["--asr=my_asr"], "my_asr"),
    (["--prompts={bad}"], "bad.txt: line 2: the text is empty"), (["--speaker=c"], "unknown speaker 'c'"),
    (["--data_dir={tmp}"], "not a finished token folder"), (["--upload=me"], "give user/name"),
    (["--speed=2"], "--speed: speed = 2.0 has no effect"), (["--ckpt={tmp}/no.pt"], "no.pt: no such checkpoint"),
])  # fmt: skip
def test_what_is_wrong_is_refused_before_the_first_prompt(trained, tmp_path, flags, message, monkeypatch):
    (tmp_path / "bad.txt").write_text("one\n\ufeff\ntwo\n", encoding="utf-8")
    monkeypatch.setattr(Voice, "speak", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = [flag.format(bad=tmp_path / "bad.txt", tmp=tmp_path) for flag in flags]
    with pytest.raises((ValueError, OSError), match=message) as error:
        command(f"--ckpt={trained}/run60", f"--out_dir={tmp_path / 'out'}", *flags)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("listed", [
    '{"file_name": "wavs/000.wav", "transcription": "one"}', '{"file_name": "../000.wav", "model": "", "config": "", '
    '"sentence_id": 0, "sentence": ""}', "[1]", "{", '{"file_name": 1}', "\xff",
])  # fmt: skip
def test_recordings_of_another_data_set_are_not_removed(trained, prompts, tmp_path, listed):
    out = tmp_path / "mine"
    for name in ("mine/wavs/000.wav", "000.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    (out / "metadata.jsonl").write_bytes(listed.encode("latin-1"))
    with pytest.raises(ValueError, match="metadata.jsonl is not of an evaluation: take another out_dir"):
        command(f"--ckpt={trained}/run60", f"--prompts={prompts}", f"--out_dir={out}")
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["000.wav", "000.wav", "metadata.jsonl"]
    assert (out / "metadata.jsonl").read_bytes() == listed.encode("latin-1")


def test_published_weights_or_lost_data_have_no_held_out_loss(trained, prompts, tmp_path, capsys):
    path = tmp_path / "moved"
    shutil.copytree(trained / "run60", path)
    checkpoint = load_checkpoint(str(path / "best.pt"))
    save_checkpoint(path / "best.pt", {**checkpoint, "config": {**checkpoint["config"], "data_dir": "gone/tokens"}})
    command(f"--ckpt={path}", f"--prompts={prompts}", f"--out_dir={tmp_path / 'out'}")
    assert "no val_loss: gone/tokens is not a finished token folder" in capsys.readouterr().out
    assert "val_loss" not in next(csv.DictReader((tmp_path / "out/results.csv").open()))
    with pytest.raises(ValueError, match="no held-out texts to speak: give --prompts"):
        command(f"--ckpt={path}", f"--out_dir={tmp_path / 'out'}")
    command(f"--ckpt={path}", f"--data_dir={trained / 'tokens'}", "--n_prompts=1", f"--out_dir={tmp_path / 'out'}")
    assert float(next(csv.DictReader((tmp_path / "out/results.csv").open()))["val_loss"]) < 3


class Hub:
    """In place of huggingface_hub.HfApi: keeps what it is asked for."""

    asked = []

    def create_repo(self, name, **how):
        self.asked.append((name, how))
        if name == "me/refused":
            raise OSError("401\nno token")

    def upload_folder(self, **how):
        self.asked.append(how)


def test_the_folder_is_uploaded(trained, prompts, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    (tmp_path / "private.txt").write_text("not a part of it")
    flags = f"--ckpt={trained}/run60", f"--prompts={prompts}", f"--out_dir={tmp_path}"
    command(*flags, "--upload=me/voices")
    (name, how), upload = Hub.asked
    assert name == "me/voices" and how == {"repo_type": "dataset", "private": True, "exist_ok": True}
    assert upload["repo_id"] == name and upload["repo_type"] == "dataset" and upload["folder_path"] == str(tmp_path)
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(upload["allow_patterns"]) == sorted({*files} - {"private.txt"})
    with pytest.raises(ValueError, match="upload = 'me/refused': 401 no token"):
        command(*flags, "--upload=me/refused")


def test_a_reference_is_what_a_voice_should_sound_like(good, trained, tmp_path):
    """The recordings of each speaker in the data, or the reference for all."""
    def encoder(wav, rate):
        return np.array([len(wav) / rate, 1.0])

    files = evaluate.held_out_files(good)
    found = evaluate.recorded_voices(SimpleNamespace(reference=""), good, files, encoder)
    assert set(found) == {files.meta["speakers"][files.speaker(i)] for i in range(len(files))}
    frames = [len(files.codes(i)) for i in range(len(files)) if files.speaker(i) == 0][: evaluate.RECORDINGS]
    assert found["a"][0] == pytest.approx(sum(frames) / good.codec.frame_rate, rel=0.05)
    soundfile.write(tmp_path / "me.wav", np.ones(8000) * 0.1, 8000)
    found = evaluate.recorded_voices(SimpleNamespace(reference=str(tmp_path / "me.wav")), good, None, encoder)
    assert list(found) == [""] and found[""][0] == pytest.approx(1.0)
    assert evaluate.recorded_voices(SimpleNamespace(reference=""), good, None, encoder) == {}

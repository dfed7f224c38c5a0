"""Published weights that speak before any training: CSM here, the other families in the files of their models."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tokenizers
import torch
from helpers import run
from safetensors.torch import load_file, save_file

import prepare
import released
import sample
from parts import configurator
from parts.audio import read_audio
from sample import Voice, column_names, find_checkpoints
from weights import load_checkpoint

MIMI = dict(model_type="mimi", hidden_size=128, num_filters=4, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, intermediate_size=512, codebook_size=16, codebook_dim=16, upsample_groups=128,
            num_quantizers=4, vector_quantization_hidden_dimension=16)  # fmt: skip


def write_tokenizer(path):
    """A tokenizer.json in Llama's form: bytes, and the marks around a text."""
    marks = ["<|begin_of_text|>", "<|end_of_text|>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["[0]one two three four"] * 3, trainer)
    around = [(mark, tokenizer.token_to_id(mark)) for mark in marks]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|end_of_text|>", special_tokens=around
    )
    path.write_text(tokenizer.to_str())
    return tokenizer


@pytest.fixture(scope="module")
def csm(tmp_path_factory):
    """transformers' CSM with small random weights, and the folder it saved itself in, a Mimi and a tokenizer inside."""
    from transformers import CsmConfig, CsmForConditionalGeneration

    torch.set_num_threads(1)
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("hub") / "csm-small"
    folder.mkdir()
    vocab = write_tokenizer(folder / "tokenizer.json").get_vocab_size()
    sizes = dict(intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 num_codebooks=4, vocab_size=19, initializer_range=0.2)  # fmt: skip
    theirs = CsmForConditionalGeneration(CsmConfig(
        **sizes, hidden_size=32, text_vocab_size=vocab, max_position_embeddings=256, pad_token_id=2,
        codebook_pad_token_id=18, bos_token_id=0, audio_token_id=3, audio_eos_token_id=4, codec_config=MIMI,
        depth_decoder_config=dict(**sizes, hidden_size=16, backbone_hidden_size=32, max_position_embeddings=5),
    )).eval()  # fmt: skip
    torch.nn.init.normal_(theirs.depth_decoder.codebooks_head.weight, std=0.2)
    for name, x in theirs.codec_model.named_buffers():
        if name.endswith("embed_sum"):
            x.normal_()
    theirs.save_pretrained(folder)
    return theirs, folder


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "me.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(24000), 24000)
    return str(path)


def speak(*flags, script=sample):
    script.main(configurator.configure(script.__file__, [str(flag) for flag in flags]))


def codes_of(voice, text="one two", **how):
    return torch.stack(list(voice.frames(text, temperature=0, **how)))


def refused(out_dir, *flags):
    """The one line with which sample.py refuses; no wav is left."""
    with pytest.raises((ValueError, OSError)) as error:
        speak(f"--out_dir={out_dir}", *flags)
    assert not list(Path(out_dir).rglob("*.wav")) and "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# a folder as it was published


def test_a_csm_says_what_transformers_says(csm, tmp_path, capsys):
    theirs, folder = csm
    with torch.no_grad():  # transformers may choose the spare classes as well
        theirs.lm_head.weight[16:] = 0
        theirs.depth_decoder.codebooks_head.weight[..., 16:] = 0
    voice = Voice.from_published(folder, "cpu")
    assert voice.draw["temperature"] == 0.9 and voice.draw["top_k"] == 50  # as its authors draw
    assert voice.codec.name == "mimi" and voice.report["max_difference"] < 1e-3
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode("[0]one two").ids])
    assert voice.model.config.marked(voice.text_ids("one two")).tolist() == ids[0].tolist()
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)[0]
    assert torch.equal(codes_of(voice, cap_seconds=20 / 12.5), expected)
    speak(f"--ckpt={folder}", "--text=one two", f"--out_dir={tmp_path}", "--temperature=0", "--cap_seconds=1.6",
          "--device=cpu")  # fmt: skip
    said = capsys.readouterr().out
    assert "the contract holds" in said and "shifts" not in said
    wav, rate = soundfile.read(tmp_path / "000.wav", dtype="float32")
    with torch.no_grad():
        heard = theirs.codec_model.decode(expected.T[None]).audio_values[0, 0]
    assert rate == 24000 and np.abs(wav - heard.clamp(-1, 1).numpy()).max() < 1e-3 < np.abs(wav).max()


def test_speaker_and_text_format(csm):
    folder = csm[1]
    said = [Voice.from_published(folder, "cpu", speaker=name).text_ids("one").tolist() for name in ("", "0", "3")]
    tokenizer = Voice.from_published(folder, "cpu").tokenizer
    assert [tokenizer.decode(ids) for ids in said] == ["[0]one", "[0]one", "[3]one"]
    plain = Voice.from_published(folder, "cpu", text_format="{text}")
    assert tokenizer.decode(plain.text_ids("one")) == "one"


def test_a_reference_is_heard(csm, recording, tmp_path):
    folder = csm[1]
    flags = [f"--ckpt={folder}", "--text=one two", "--cap_seconds=0.8", "--device=cpu"]
    speak(*flags, f"--out_dir={tmp_path}/a")
    speak(*flags, f"--out_dir={tmp_path}/b", f"--reference={recording}", "--reference_text=three")
    assert (tmp_path / "a/000.wav").read_bytes() != (tmp_path / "b/000.wav").read_bytes()
    voice = Voice.from_published(folder, "cpu")
    prompt = voice.prompt(recording, "three")["prompt"]
    assert torch.equal(torch.from_numpy(prompt[1]), voice.codec.encode(read_audio(recording, 24000)[None])[0].T)


def test_after_a_run_of_no_steps_the_codes_are_the_same(csm, tmp_path, capsys):
    """And both stand beside each other on a page."""
    folder = csm[1]
    lines = ["audio|text"]
    rng = np.random.default_rng(0)
    for i in range(8):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * rng.standard_normal(16000 + 2000 * i), 24000)
        lines.append(f"{i}.wav|one two")
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    speak(f"--sources={tmp_path}", f"--data_dir={tmp_path}/tokens", "--codec=mimi", f"--codec_path={folder}",
          f"--tokenizer={folder}/tokenizer.json", "--text_format=[0]{text}", "--workers=1", "--val_fraction=0.3",
          script=prepare)  # fmt: skip
    state, log = run(f"{tmp_path}/tokens", tmp_path / "out", f"--init_from={folder}", "--max_iters=0", "--device=cpu",
                     usual=["--eval_samples=1"])  # fmt: skip
    assert state["iter"] == 0 and [line["iter"] for line in log] == [0] and log[0]["val_loss"] > 0
    assert log[0]["loss"] is None and "held out: loss" in capsys.readouterr().out
    base = Voice.from_published(folder, "cpu")
    trained = Voice.from_checkpoint(tmp_path / "out/best.pt", "cpu")
    assert trained.codec.fingerprint() == base.codec.fingerprint()
    assert torch.equal(codes_of(trained, cap_seconds=2), codes_of(base, cap_seconds=2))
    run(f"{tmp_path}/tokens", tmp_path / "out", "--init_from=resume", "--max_iters=2", "--device=cpu", usual=[])
    assert load_checkpoint(tmp_path / "out/last.pt")["iter"] == 2

    capsys.readouterr()
    speak(f"--ckpt={folder},{tmp_path}/out", "--text=one two", "--cap_seconds=0.5", f"--out_dir={tmp_path}/both",
          f"--tokenizer={folder}/tokenizer.json", "--device=cpu")  # fmt: skip
    assert sorted(os.listdir(tmp_path / "both")) == ["csm-small", "index.html", "out"]
    page = (tmp_path / "both/index.html").read_text()
    assert "<td>step<td>published<td>" in page and 'src="csm-small/000.wav"' in page


# ---------------------------------------------------------------------------------------------------------------------
# where codec and tokenizer are found


def copied(csm, folder, *leave):
    """The published folder without the tensors whose names begin with one of `leave`."""
    shutil.copytree(csm[1], folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({key: x for key, x in tensors.items() if not key.startswith(leave)}, folder / "model.safetensors")
    return folder


def only_mimi(csm, folder):
    folder.mkdir(parents=True)
    tensors = load_file(csm[1] / "model.safetensors")
    name = "codec_model."
    mimi = {key.removeprefix(name): x for key, x in tensors.items() if key.startswith(name)}
    save_file(mimi, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("place", ["csm/mimi", "mimi", "cache", "codec_path"])
def test_places_of_a_codec(csm, tmp_path, monkeypatch, place):
    folder = copied(csm, tmp_path / "csm", "codec_model.")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    said = refused(tmp_path / "out", f"--ckpt={folder}", "--text=one")
    assert said.startswith(f"{folder}/model.safetensors speaks in codes of the codec mimi")
    assert "`hf download kyutai/mimi model.safetensors` fetches it, or name it by --codec_path" in said
    inside = {"cache": "cache/models--kyutai--mimi/snapshots/1", "codec_path": "elsewhere"}.get(place, place)
    flags = {"codec_path": str(only_mimi(csm, tmp_path / inside))} if place == "codec_path" else {}
    if not flags:
        only_mimi(csm, tmp_path / inside)
    voice = Voice.from_published(folder, "cpu", **flags)
    assert voice.codec.fingerprint() == Voice.from_published(csm[1], "cpu").codec.fingerprint()


def test_the_tokenizer_is_named_or_lies_beside(csm, tmp_path):
    folder = copied(csm, tmp_path / "csm", "nothing")
    os.rename(folder / "tokenizer.json", tmp_path / "mine.json")
    said = refused(tmp_path / "out", f"--ckpt={folder}", "--text=one")
    assert f"{folder}/model.safetensors: no tokenizer.json beside it: the repository of the weights has it; put" in said
    speak(f"--ckpt={folder}", "--text=one", f"--tokenizer={tmp_path}/mine.json", f"--out_dir={tmp_path}/said",
          "--cap_seconds=0.2", "--device=cpu")  # fmt: skip
    assert (tmp_path / "said/000.wav").exists()
    for content, message in (("{}", "mine.json: the tokenizer is not a tokenizer.json"), ("x", "not a sentencepiece")):
        (tmp_path / "mine.json").write_text(content)
        flags = f"--ckpt={folder}", "--text=one", f"--tokenizer={tmp_path}/mine.json"
        assert message in refused(tmp_path / "out", *flags)
    assert "none.json" in refused(tmp_path / "out", f"--ckpt={folder}", "--text=one", "--tokenizer=none.json")
    larger = json.loads((csm[1] / "tokenizer.json").read_text())
    larger["added_tokens"].append({**larger["added_tokens"][0], "id": 999, "content": "<more>"})
    (folder / "tokenizer.json").write_text(json.dumps(larger))
    said = refused(tmp_path / "out", f"--ckpt={folder}", "--text=one")
    assert "knows 271 text ids, the tokenizer 272: name that of these weights by --tokenizer" in said


def test_a_codec_of_other_sizes(csm, tmp_path):
    said = refused(tmp_path / "out", f"--ckpt={csm[1]}", "--text=one", "--codec=mel")
    assert "the codec mel has to be fitted: name its tables by --codec_path" in said
    released.load_codec("mel").fit([torch.randn(16000)]).save(tmp_path / "mel")
    said = refused(tmp_path / "out", f"--ckpt={csm[1]}", "--text=one", "--codec=mel", f"--codec_path={tmp_path}/mel")
    assert "speaks in 4 codebooks of 16, the codec mel in 8 of 256: name that of these weights by --codec" in said
    assert "no codec is called 'mini'" in refused(tmp_path / "out", f"--ckpt={csm[1]}", "--text=one", "--codec=mini")


# ---------------------------------------------------------------------------------------------------------------------
# what is no published weights


def test_another_file_says_what_it_is(csm, recording, tmp_path):
    torch.save(torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).state_dict(), tmp_path / "optimizer.pt")
    np.savez(tmp_path / "codes.npz", x=np.zeros(3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "deep/models/x").mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, tmp_path / "deep/models/x/fp32.sft")
    (tmp_path / "half").write_bytes((csm[1] / "model.safetensors").read_bytes()[:4000])
    for name, content, message in (
        ("photo.jpg", b"\xff\xd8\xff\xe0" + bytes(99), "photo.jpg is no file of weights, it is an image"),
        ("me.wav", None, "me.wav is no file of weights, it is a recording"),
        ("page.pt", b"<!DOCTYPE html><html>", "page.pt is no file of weights, it is a web page"),
        ("codes.npz", None, "codes.npz is no file of weights, it is a zip archive with x.npy in it"),
        ("optimizer.pt", None, "of a known layout, but the state of an optimizer; known are"),
        ("empty", None, "empty holds no weights of a known layout, but no file that ends in .safetensors, .sft, .pt"),
        ("deep", None, "deep holds no weights of a known layout, but models/x/fp32.sft; known are"),
        ("half", None, "half is truncated or damaged"),
    ):
        if content:
            (tmp_path / name).write_bytes(content)
        assert message in refused(tmp_path / "out", f"--ckpt={tmp_path}/{name}", "--text=one")


def test_parts_are_refused_for_a_checkpoint(tokens, tmp_path):
    run(tokens, tmp_path / "run", "--max_iters=1")
    for key in ("codec=mel", "tokenizer=x.json", "text_format={text}"):
        said = refused(tmp_path / "out", f"--ckpt={tmp_path}/run", "--text=one", f"--{key}")
        assert said == f"--{key.split('=')[0]} is for published weights, {tmp_path}/run/best.pt holds its own"
    recipe = tmp_path / "recipe.py"
    recipe.write_text("codec = 'mel'\ntokenizer = 'x.json'\ntext_format = '{text}'\n")
    speak(recipe, f"--ckpt={tmp_path}/run", "--text=one", f"--out_dir={tmp_path}/said", "--cap_seconds=0.2")


# ---------------------------------------------------------------------------------------------------------------------
# lists


def test_lists_patterns_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("out/a/best.pt", "out/a/last.pt", "out/b/last.pt", "weights/x/model.safetensors", "p,q.pt",
                 "[c]/best.pt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for ckpt, paths in (
        ("out/a", ["out/a/best.pt"]), ("out/b", ["out/b/last.pt"]), ("weights/x", ["weights/x"]),
        ("p,q.pt", ["p,q.pt"]),
        ("weights/x,out/*", ["weights/x", "out/a/best.pt", "out/b/last.pt"]), ("[c]", ["[c]/best.pt"]),
        ("out/a/best.pt,out/*/best.pt", ["out/a/best.pt"]), ("out/a,out/*.pt", None), ("out/c", None), ("", None),
    ):  # fmt: skip
        if paths is None:
            with pytest.raises((ValueError, FileNotFoundError), match="no such checkpoint|no checkpoint given"):
                find_checkpoints(ckpt, "out")
        else:
            assert find_checkpoints(ckpt, "out") == paths
    for paths, names in (
        (["out/a/best.pt", "weights/x"], ["a", "x"]), (["out/a/best.pt", "out/a/last.pt"], ["a_best", "a_last"]),
        (["out/a/best.pt", "weights/x", "weights/x/model.safetensors"], ["out_a_best", "weights_x", "x_model"]),
    ):  # fmt: skip
        assert len(set(column_names(paths))) == len(paths)
        assert column_names(paths) == names or "weights/x/model.safetensors" in paths
    (tmp_path / "deep/a/best.pt").parent.mkdir(parents=True)
    (tmp_path / "deep/a/best.pt").write_text("")
    assert column_names(["out/a/best.pt", "deep/a/best.pt"]) == ["out_a_best", "deep_a_best"]
    with pytest.raises(ValueError, match="several checkpoints need folders of their own"):
        column_names(["out/a/best.pt", "out/b/../a/best.pt"])

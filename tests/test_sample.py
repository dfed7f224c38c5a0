import json
import math
import os
import random
import re
import subprocess
import sys
import time
import types
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
from helpers import ROOT, read_page
from torch import nn

import codec as codecs
import model as models
import sample
import weights
from parts import configurator
from parts.draw import mix, sample_code
from parts.text import HuggingFace, SentencePiece, train_tokenizer
from speak import CUT, Engine
from voice import SKIPPED, TWICE, Voice

RATE = 8000


@pytest.fixture(scope="session")
def checkpoint():
    """A checkpoint of a tiny CSM with random weights over a mel codec fitted on noise."""
    torch.manual_seed(1)
    codec = codecs.load_codec("mel", n_codebooks=3, codebook_size=16, sample_rate=RATE, frame_rate=12.5)
    codec.fit([0.1 * torch.randn(5 * RATE)], seed=0)
    tokenizer = train_tokenizer(["[slt]one two three", "[awb]four five"] * 5, 290, symbols=["[slt]", "[awb]"])
    meta = {
        "codec": {"name": "mel", "fingerprint": codec.fingerprint(), "sample_rate": RATE, "frame_rate": 12.5,
                  "n_codebooks": 3, "codebook_size": 16},
        "tokenizer": SentencePiece(tokenizer).describe(), "text_format": "[{speaker}]{text}", "lowercase": True,
        "speakers": ["slt", "awb"], "splits": {"train": {"utterances": 10, "frames": 200, "text_tokens": 50}},
    }  # fmt: skip
    stack = dict(n_layer=2, n_head=2, n_kv_head=1, d_model=32, d_ff=64, max_positions=256, dropout=0.1)
    model = models.build("csm", meta, dict(backbone=stack, decoder={**stack, "d_model": 16}))
    for parameter in model.parameters():  # wide enough that the draws depend on what was read
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    model.codebook0_head.data[16] = 0  # stopping is less likely than the likelier codes
    probe = {"text": SentencePiece(tokenizer).encode("[slt]one two"), "codes": torch.randint(16, (7, 3))}
    return {
        "arch": "csm", "model_config": asdict(model.config), "model": model.state_dict(), "ema": None,
        "codec": codec.pack(), "codec_fingerprint": codec.fingerprint(),
        "meta": meta, "config": {}, "iter": 0, "train": None, "probe": probe,
        "tokenizer": {"kind": "sentencepiece", "model": tokenizer},
    }  # fmt: skip


@pytest.fixture(scope="session")
def ckpt(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "best.pt"
    weights.save_checkpoint(path, checkpoint)
    return str(path)


@pytest.fixture
def voice(ckpt):
    return Voice.from_checkpoint(ckpt)


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "me.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(RATE), RATE)
    return str(path)


def run(*argv):
    sample.main(configurator.configure(sample.__file__, [str(a) for a in argv]))


def cli(*argv, cwd=ROOT):
    return subprocess.run([sys.executable, str(ROOT / "sample.py"), *map(str, argv)], capture_output=True, cwd=cwd)


def codes(frames):
    return [frame.tolist() for frame in frames]


def talkative(voice):
    """The likeliest code of codebook 0 is always 0, so that the model never stops by itself."""
    voice.model.codebook0_head.data.zero_()
    return voice


# ---------------------------------------------------------------------------------------------------------------------
# frames


def test_same_seed_same_frames_and_wav(voice):
    first = codes(voice.frames("one two three", seed=3))
    assert first == codes(voice.frames("one two three", seed=3))
    assert first == codes(voice.frames("  One two\tTHREE ", seed=3))  # the text is normalised as in prepare.py
    wav = voice.say("one two three", seed=3)
    assert wav.dtype == torch.float32 and wav.shape == (len(first) * RATE // 12.5,)
    assert torch.equal(wav, voice.say("one two three", seed=3))
    others = [codes(voice.frames("one two three", seed=s)) for s in range(4, 8)]
    assert all(first != other for other in others)
    for parameter in voice.model.parameters():  # all codes equally likely: what differs now are the draws alone
        parameter.data.zero_()
    first = [next(voice.frames(text, seed=3), None) for text in ("one", "two", "three", "four", "five")]
    assert len({tuple(f.tolist()) for f in first if f is not None}) > 1


def test_draws_as_the_training_run_did_unless_told_otherwise(ckpt, checkpoint, tmp_path, monkeypatch):
    weights.save_checkpoint(tmp_path / "x.pt", {**checkpoint, "config": {"temperature": 0.3, "top_k": 7, "seed": 5}})
    asked = []
    monkeypatch.setattr("voice.Engine", lambda *given, **how: asked.append(given[2]) or Engine(*given, **how))
    run("--ckpt", tmp_path / "x.pt", "--text=one", "--out_dir", tmp_path)
    run("--ckpt", tmp_path / "x.pt", "--text=one", "--out_dir", tmp_path, "--temperature=0", "--top_p=0.5")
    run("--ckpt", ckpt, "--text=one", "--out_dir", tmp_path)
    usual = dict(temperature=0.9, top_k=50, top_p=1.0, min_p=0.0)
    assert asked == [usual | dict(temperature=0.3, top_k=7), usual | dict(temperature=0, top_k=7, top_p=0.5), usual]


def test_random_state_and_mode_stay_untouched(voice):
    voice.model.train()
    before = torch.get_rng_state()
    frames = codes(voice.frames("one two", seed=3))
    assert voice.model.training and torch.equal(before, torch.get_rng_state())
    voice.model.eval()
    assert frames == codes(voice.frames("one two", seed=3))  # no dropout while it speaks
    assert not voice.model.training


def uncached(voice, text, cap, seed, draw, prompt=None):
    """Frames by a whole pass, without any cache, for every code."""
    model, K, frames = voice.model, voice.codec.n_codebooks, []
    ids = voice.text_ids(text)
    for t in range(cap):
        given = np.array(frames, np.int64).reshape(-1, K)
        tokens, segment = model.layout(ids, given, prompt)
        tokens, segment = (torch.from_numpy(a)[None, :-1] for a in (tokens, segment))  # no stop frame yet
        state = model.backbone(model.embed(tokens, segment))[:, -1]
        keys = mix(mix(seed ^ mix(torch.tensor(t + 1))) ^ torch.arange(K))
        frame = [int(sample_code((state[0] @ model.codebook0_head.T)[:17], keys[0], **draw))]
        if frame[0] == 16:
            break
        for k in range(1, K):
            depth = model.decoder(model.depth_inputs(state, torch.tensor([frame])))[0, -1]
            frame.append(int(sample_code((depth @ model.decoder_heads[k - 1].T)[:16], keys[k], **draw)))
        frames.append(frame)
    return frames


@pytest.mark.parametrize("temperature, top_k, top_p", [(0, 0, 1.0), (0.9, 50, 1.0), (1.0, 5, 0.8)])
@pytest.mark.parametrize("cloning", [False, True])
@torch.no_grad()
def test_cached_generation_equals_uncached(voice, temperature, top_k, top_p, cloning):
    reference = dict(reference=[np.arange(15).reshape(5, 3)], reference_text="two") if cloning else {}
    draw = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    prompt, lengths = voice.prompt(**reference)["prompt"] if cloning else None, []
    for seed in range(3):
        how = dict(seed=seed, cap_seconds=2.0, **reference)
        cached = codes(voice.frames("one two three four", **draw, **how))
        key = voice.plan("one two three four", **how)[0].seed
        assert cached == uncached(voice, "one two three four", 25, key, draw, prompt)
        lengths.append(len(cached))
    assert max(lengths) > 3


def test_cap_follows_the_text(voice):
    voice = talkative(voice)
    ids = voice.text_ids("one two three")
    assert voice.cap(ids) == np.ceil(12.5 + 3 * len(ids) * 200 / 50)
    short, long = (len(list(voice.frames(t, temperature=0))) for t in ("one", "one two three four five one two three"))
    assert short < long and short == voice.cap(voice.text_ids("one"))
    assert not voice.stopped
    assert len(list(voice.frames("one", temperature=0, cap_seconds=1.0))) == 13


def test_stopped_says_whether_the_model_ended_by_itself(voice):
    for seed in range(50):
        n = len(list(voice.frames("one two", seed=seed, temperature=1.0)))
        if n < voice.cap(voice.text_ids("one two")):
            break
    assert voice.stopped is True
    list(voice.frames("one two", seed=seed, temperature=1.0, cap_seconds=max(n - 1, 1) / 12.5))
    assert n == 0 or voice.stopped is False


def test_speaker(voice):
    assert np.array_equal(voice.text_ids("one"), voice.text_ids("one", "slt"))
    assert codes(voice.frames("one two", speaker="awb")) != codes(voice.frames("one two"))
    with pytest.raises(ValueError, match="unknown speaker 'abw'; choose from awb, slt"):
        voice.text_ids("one", "abw")
    voice.meta = {**voice.meta, "speakers": [f"reader{i}" for i in range(100)]}
    with pytest.raises(ValueError, match="choose from reader42, .* and 88 more"):
        voice.text_ids("one", "reader_42")


def test_characters_the_tokenizer_does_not_know(voice, tmp_path):
    assert len(voice.text_ids("čaj 茶"))  # bytes stand in for them
    prefix = str(tmp_path / "m")
    (tmp_path / "t").write_text("one two three\n" * 9)
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "t"), model_prefix=prefix, model_type="char",
                                             vocab_size=12, minloglevel=2)  # fmt: skip
    voice.tokenizer = SentencePiece(Path(prefix + ".model").read_bytes())
    voice.meta = {**voice.meta, "text_format": "{text}"}
    with pytest.raises(ValueError, match="characters the tokenizer does not know: q z"):
        voice.text_ids("one qz")


def test_a_text_format_is_checked(voice, monkeypatch):
    monkeypatch.setattr(voice, "meta", {**voice.meta, "text_format": "{speaker.__class__}{text}"})
    with pytest.raises(ValueError, match="text_format = "):
        voice.text_ids("one")
    monkeypatch.setattr(voice, "meta", {**voice.meta, "text_format": "[{language}]{text}", "languages": ["slt"]})
    assert voice.tokenizer.decode(voice.text_ids("one")) == "[slt]one"


# ---------------------------------------------------------------------------------------------------------------------
# cloning


def test_reference_is_encoded_and_put_before_the_text(voice, recording):
    ((ids, reference),) = voice.prompt(recording, "Two", "awb")["prompt"]
    wav = codecs.read_audio(recording, RATE)
    assert np.array_equal(reference, voice.codec.encode(wav[None])[0].T) and reference.shape == (13, 3)
    assert np.array_equal(ids, voice.text_ids("two", "awb"))
    given = dict(speaker="awb", reference_text="two", seed=2)
    seat, asked = voice.model.seat, []
    voice.model.seat = lambda *args, **how: asked.append(how.get("prompt")) or seat(*args, **how)
    cloned = codes(voice.frames("one", reference=recording, **given))
    assert np.array_equal(asked[0][0][0], ids) and np.array_equal(asked[0][0][1], reference)
    assert cloned == codes(voice.frames("one", reference=[reference], **given))
    assert cloned == codes(voice.frames("one", reference=Path(recording), **given))
    assert cloned != codes(voice.frames("one", speaker="awb", seed=2))
    assert cloned != codes(voice.frames("one", reference=[(reference + 1) % 16], **given))


def test_several_references_are_segments_one_after_the_other(voice, ckpt, tmp_path):
    for name, seconds in (("a", 0.5), ("b", 0.8)):
        wav = 0.1 * np.random.default_rng(0).standard_normal(int(seconds * RATE))
        soundfile.write(tmp_path / f"{name}.wav", wav, RATE)
    paths = [tmp_path / "a.wav", tmp_path / "b.wav"]
    prompt = voice.prompt(paths, "One| two", "awb")["prompt"]
    assert [ids.tolist() for ids, _ in prompt] == [voice.text_ids(t, "awb").tolist() for t in ("one", "two")]
    assert [len(heard) for _, heard in prompt] == [7, 10]
    ids, given = voice.utterance("three", "awb", paths, ["one", "two"])
    rows, _ = voice.model.layout(ids, None, given["prompt"])
    first, second = (voice.model.layout(*pair)[0] for pair in prompt)
    assert np.array_equal(rows, np.concatenate([first, second, voice.model.layout(ids)[0]]))
    with pytest.raises(ValueError, match="has 1 transcripts for 2 recordings: give one for each"):
        voice.prompt(paths, "one")
    flags = ("--ckpt", ckpt, "--text=three", "--speaker=awb", "--reference_text=one|two", "--cap_seconds=1")
    for name in (f"{paths[0]},{paths[1]}", f"{tmp_path}/?.wav"):
        run(*flags, "--out_dir", tmp_path / "out", f"--reference={name}")
        wav, _ = soundfile.read(tmp_path / "out/000.wav")
        expected = voice.say("three", speaker="awb", reference=paths, reference_text=["one", "two"], cap_seconds=1)
        assert np.allclose(wav, expected, atol=1e-4)
    assert "c.wav: no such recording, one of 2" in refused(tmp_path / "no", *flags, f"--reference={paths[0]},c.wav")


def test_a_saved_voice_speaks_like_its_recordings(ckpt, recording, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    how = ("--ckpt", ckpt, "--speaker=awb", "--cap_seconds=1")
    run(*how, "--reference", recording, "--reference_text=one", "--save_voice=me", "--voice_note=CC0, mine")
    assert "voices/me.pt: the voice is saved" in capsys.readouterr().out and not Path("samples").exists()
    run(*how, "--reference", recording, "--reference_text=one", "--save_voice=b/me.pt", "--text=two", "--out_dir=a")
    os.remove(recording)
    for name, folder in (("me", "x"), ("b/me.pt", "y")):
        run(*how, f"--voice={name}", "--text=two", f"--out_dir={folder}")
        assert Path(folder, "000.wav").read_bytes() == Path("a/000.wav").read_bytes()
        assert ("voice me: CC0, mine" in capsys.readouterr().out) == (name == "me")
    for flags, words in (
        (["--voice=me", "--text=two", "--reference=me.wav"], "it is saved already, leave out reference and save_voice"),
        (["--voice=you", "--text=two"], "voices/you.pt: no such voice; voices/ has me"),
        (["--voice=me", "--text=two", "--reference_text=one"], "reference_text = 'one' has no effect"),
        (["--text=two", "--voice_note=x"], "voice_note = 'x' has no effect: no voice is saved"),
        (["--save_voice=x"], "save_voice = 'x': give the reference whose voice is to be saved"),
        (["--save_voice=x", "--reference=me.wav"], "cloning takes a recording and its transcript"),
        (["--voice=me"], "give either --text"),
    ):  # fmt: skip
        soundfile.write("me.wav", 0.1 * np.random.default_rng(0).standard_normal(RATE), RATE)
        assert words in refused("out", *how, *flags), flags
    assert sorted(os.listdir("voices")) == ["me.pt"]
    content = torch.load("voices/me.pt")
    torch.save({**content, "codes": [content["codes"][0] + 9]}, "far.pt")
    assert "far.pt is damaged, or a voice of a model with other sizes" in refused("out", *how, "--voice=far.pt",
                                                                                  "--text=two")  # fmt: skip
    torch.save({**content, "latents": torch.ones(2, 32)}, "far.pt")
    assert "far.pt is damaged" in refused("out", *how, "--voice=far.pt", "--text=two")


def test_a_reference_and_the_text_as_one_segment(checkpoint, recording, tmp_path):
    """As Marvis clones a voice: one text, one pair of marks, then the recording, which the speech continues."""
    weights.save_checkpoint(tmp_path / "x.pt", checkpoint)
    voice = Voice.from_checkpoint(tmp_path / "x.pt", prompt_style="joined")
    (heard,) = voice.listen(recording)
    ids, given = voice.utterance(" Two  three", "awb", recording, " one ")
    rows, segment = voice.model.layout(ids, None, given["prompt"])
    words = voice.model.config.marked(voice.text_ids("one two three", "awb"))
    assert np.array_equal(rows[: len(words), -1], words) and np.array_equal(rows[len(words) :, :-1], heard)
    assert (segment == models.TEXT).sum() == len(words) and 0 < len(ids) < len(words)
    same, again = voice.utterance(ids, "awb", recording, "one")  # a text that is ids already
    assert np.array_equal(same, ids) and np.array_equal(voice.model.layout(ids, None, again["prompt"])[0], rows)
    flags = ("--text=two three", "--speaker=awb", "--reference", recording, "--reference_text=one", "--cap_seconds=1")
    run("--ckpt", tmp_path / "x.pt", *flags, "--prompt_style=joined", "--out_dir", tmp_path / "out")
    wav, _ = soundfile.read(tmp_path / "out/000.wav")
    how = dict(speaker="awb", reference=recording, reference_text="one", cap_seconds=1)
    assert np.allclose(wav, voice.say("two three", **how), atol=1e-4)
    voice.model.config.prompt_style = "segments"
    other = voice.say("two three", **how)
    assert len(other) != len(wav) or not np.allclose(wav, other, atol=1e-4)


@pytest.mark.parametrize("name", ["voice_match", "voice_match_over_32_codebooks", "same_speaker_as_the_reference"])
def test_marvis_reads_the_rows_of_its_authors(name):
    """From text and recording to rows, as Marvis' inference.py (in one segment) and generator make them."""
    pytest.importorskip("tokenizers")
    cases = json.loads((ROOT / "tests/golden/csm_rows.json").read_text())["generation"]
    (case,) = [case for case in cases if (case["reference"], case["name"]) == ("marvis", name)]
    tokenizer = HuggingFace((ROOT / "tests/golden" / case["tokenizer"]).read_bytes())
    ids = dict(text_vocab_size=tokenizer.vocab_size, text_bos=tokenizer.bos_id, text_eos=tokenizer.eos_id)
    stack = dict(n_layer=1, n_head=1, n_kv_head=1, d_model=4, d_ff=4, max_positions=64)
    style = "joined" if name.startswith("voice_match") else "segments"
    config = models.CSMConfig(**ids, n_codebooks=32, codebook_size=2048, backbone=stack, decoder=stack, stop="zeros",
                              prompt_style=style)  # fmt: skip
    meta = dict(text_format="[{speaker}]{text}", front_end="none", lowercase=False, speakers=["0", "1"])
    voice = Voice(models.CSM(config), Snippets(), tokenizer, meta)
    (context,) = case["context"]
    heard = [np.array(context["codes"])[:32].T]
    text, given = voice.utterance(case["text"], str(context["speaker"]), heard, context["text"])
    rows, segment = voice.model.layout(text, None, given["prompt"])
    assert rows.tolist() == case["tokens"]
    assert [kind == models.TEXT for kind in segment] == [mask[-1] == "1" for mask in case["mask"]]


# ---------------------------------------------------------------------------------------------------------------------
# streaming


class Mute(nn.Linear):
    draw = {}
    vocoder = False


class Snippets(nn.Module):
    """A codec whose every frame sounds the same wherever it stands."""

    sample_rate, frame_rate, n_codebooks = 8000, 12.5, 2
    streams = False

    def __init__(self):
        super().__init__()
        self.sounds = torch.randn(4, 16, 640, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)

    def decode(self, codes):
        return self.sounds[codes[:, 0], codes[:, 1]].flatten(1)


@pytest.mark.parametrize("n", [0, 1, 2, 6, 7, 8, 12, 13, 40])
def test_pieces_of_a_stream_make_up_the_whole(n):
    voice = Voice(Mute(1, 1), Snippets(), None, {})
    frames = [torch.tensor([i % 4, i % 15]) for i in range(n)]
    pieces = list(voice.join(frames))
    whole = voice.decode(torch.stack(frames) if frames else torch.zeros(0))
    ends = np.cumsum([1, 2, 4, *[5] * 10])  # blocks; each comes as soon as 2 more frames are there
    assert len(pieces) == 1 + sum(ends + 2 <= n)
    assert torch.cat(pieces).shape == whole.shape
    assert torch.allclose(torch.cat(pieces), whole, atol=1e-5)


def test_first_piece_comes_before_the_last_frame():
    voice, drawn = Voice(Mute(1, 1), Snippets(), None, {}), []
    frames = (drawn.append(i) or torch.tensor([i % 4, i % 15]) for i in range(100))
    pieces = voice.join(frames)
    sizes = ((1, 1), (2, 3), (4, 7), (5, 12), (5, 17))
    assert [(len(next(pieces)), len(drawn)) for _ in sizes] == [(640 * n, end + 2) for n, end in sizes]


def test_blocks_whose_phases_differ_are_joined_without_a_gap():
    """A tone whose phase starts anew with each decoding: joined blocks must not cancel where they overlap."""

    class Tone(Snippets):
        def decode(self, codes):
            starts.append(len(starts) * 1.3)
            return torch.sin(2 * np.pi * 200 * torch.arange(codes.shape[2] * 640) / 8000 + starts[-1])[None]

    starts = []
    wav = torch.cat(list(Voice(Mute(1, 1), Tone(), None, {}).join([torch.zeros(2, dtype=torch.long)] * 60)))
    assert len(wav) == 60 * 640 and len(starts) > 5
    level = wav[:-80].unfold(0, 80, 8).square().mean(1)  # of two periods
    assert level.min() > 0.45 and level.max() < 0.55


def test_blocks_are_faded_into_each_other():
    class Level(Snippets):
        def decode(self, codes):
            levels.append(1.0 - levels[-1] if levels else 1.0)
            return torch.full((1, codes.shape[2] * 640), 0.5 + 0.5 * levels[-1])

    levels = []
    wav = torch.cat(list(Voice(Mute(1, 1), Level(), None, {}).join([torch.zeros(2, dtype=torch.long)] * 20)))
    assert wav.min() == 0.5 and wav.max() == 1 and wav.diff().abs().max() < 0.01


def test_stream_has_the_codes_and_the_length_of_the_whole(voice):
    voice, seen = talkative(voice), []
    frames, decode = codes(voice.frames("one two three", temperature=0)), voice.decode
    voice.decode = lambda frames, *how: seen.append(codes(frames)) or decode(frames, *how)
    pieces = list(voice.stream("one two three", temperature=0))
    assert len(pieces) > 3
    assert seen[:4] == [frames[:3], frames[:5], frames[:9], frames[2:14]]  # 2 frames after a block, at most 5 before
    assert seen[-1] == frames[-len(seen[-1]) :]
    assert torch.cat(pieces).shape == voice.say("one two three", temperature=0).shape


def test_growing_wav_can_be_read_after_each_piece(tmp_path):
    path = tmp_path / "x.wav"
    with sample.growing_wav(path, RATE) as write:
        for n in range(1, 4):
            write(torch.full((100,), n / 10))
            wav, rate = soundfile.read(path)
            assert len(wav) == 100 * n and rate == RATE and abs(wav[-1] - n / 10) < 1e-4
    with pytest.raises(RuntimeError), sample.growing_wav(path, RATE) as write:
        write(torch.zeros(9))
        raise RuntimeError
    assert not path.exists()


def test_other_wav_gets_its_name_when_whole(ckpt, tmp_path, monkeypatch):
    path, fsync, flags = tmp_path / "000.wav", os.fsync, ["--ckpt", ckpt, "--text=one two", "--out_dir", tmp_path]
    before = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: before.append(path.exists()) or fsync(handle))
        run(*flags)
    said = path.read_bytes()
    assert before == [False] and len(soundfile.read(path)[0])

    def killed(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--seed=7")
    assert path.read_bytes() == said and os.listdir(tmp_path) == ["000.wav"]


# ---------------------------------------------------------------------------------------------------------------------
# the script


def test_lines_are_numbered_and_do_not_depend_on_each_other(ckpt, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\ufeffone two\nthree\n\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("three\none two")
    run("--ckpt", ckpt, "--file", tmp_path / "a.txt", "--out_dir", tmp_path / "a")
    said = capsys.readouterr().out.splitlines()
    assert "the contract holds" in said[0] and "ln V 2.94" in said[0]
    assert "000.wav  '\ufeff" not in said[1] and all("s of audio" in line for line in said[2:])
    assert sorted(line.split("  ")[1].split(":")[0] for line in said[2:4]) == ["'one two'", "'three'"]
    assert "real-time factor" in said[4] and "lines did not end by themselves" in said[4]
    run("--ckpt", ckpt, "--file", tmp_path / "b.txt", "--out_dir", tmp_path / "b")
    run("--ckpt", ckpt, "--text", "three", "--out_dir", tmp_path / "c")
    run("--ckpt", ckpt, "--text", "three", "--out_dir", tmp_path / "d", "--seed", "7")
    wav = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.glob("?/*")}
    assert sorted(wav) == ["a/000.wav", "a/001.wav", "b/000.wav", "b/001.wav", "c/000.wav", "d/000.wav"]
    assert wav["a/001.wav"] == wav["b/000.wav"] == wav["c/000.wav"] != wav["d/000.wav"]
    assert wav["a/000.wav"] == wav["b/001.wav"]


def test_several_checkpoints_side_by_side(checkpoint, tmp_path, capsys):
    """Each in a folder of its own what it says alone, and a page with all of it."""
    (tmp_path / "lines.txt").write_text("one two\nthree\nfour")
    for name, step in (("a", 7), ("b", 1200)):
        (tmp_path / "out" / name).mkdir(parents=True)
        changed = {key: w + 0.3 * (name == "b") for key, w in checkpoint["model"].items()}
        weights.save_checkpoint(tmp_path / "out" / name / "best.pt", {**checkpoint, "iter": step, "model": changed})
    (tmp_path / "out/b/metrics.jsonl").write_text('{"iter": 1, "val_loss": 2.5}\n{"iter": 2, "val_loss": 2.25}\n')
    both = ",".join(str(tmp_path / "out" / name / "best.pt") for name in "ab")
    run("--ckpt", both, "--file", tmp_path / "lines.txt", "--out_dir", tmp_path / "c d")
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/c d/index.html: to listen to them"
    for name in "ab":
        alone = tmp_path / name
        run("--ckpt", tmp_path / "out" / name / "best.pt", "--file", tmp_path / "lines.txt", "--out_dir", alone)
        assert sorted(os.listdir(alone)) == ["000.wav", "001.wav", "002.wav"]
        for path in alone.iterdir():
            assert path.read_bytes() == (tmp_path / "c d" / name / path.name).read_bytes()
    assert sorted(os.listdir(tmp_path / "c d")) == ["a", "b", "index.html"]
    page = read_page(tmp_path / "c d/index.html")
    assert [sentence["text"] for sentence in page["sentences"]] == ["one two", "three", "four"]
    assert {column["name"] for column in page["columns"]} == page["models"][0]["numbers"].keys()
    for model, name, step, loss in zip(page["models"], "ab", (7, 1200), (None, 2.25), strict=True):
        assert model["name"] == name and model["numbers"]["step"] == step and model["numbers"]["val_loss"] == loss
        assert model["numbers"]["rtf"] > 0 and model["numbers"]["missed"] == pytest.approx(100 / 3 * (name == "b"))
        assert model["curves"] == ({"val_loss": [[1, 2.5], [2, 2.25]]} if loss else {})
        for i, sentence in enumerate(page["sentences"]):
            seconds = soundfile.info(tmp_path / f"c d/{name}/{i:03d}.wav").duration
            assert sentence["audio"][name]["seconds"] == seconds
    one = str(tmp_path / "out/a/best.pt")
    for given, out_dir in ((f"{one},{one}", tmp_path / "e"), (both, "-")):
        with pytest.raises(ValueError, match="several checkpoints need folders of their own"):
            run("--ckpt", given, "--text=one", "--out_dir", out_dir)


def test_several_checkpoints_stay_inside_out_dir(ckpt, tmp_path, monkeypatch):
    for folder in ("x/a", "x/b"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "best.pt").write_bytes(Path(ckpt).read_bytes())
    monkeypatch.chdir(tmp_path)
    run("--ckpt", "x/b/../a/best.pt,x/a/../b/best.pt", "--text=one", "--out_dir=y/z")
    assert sorted(os.listdir("y")) == ["z"] and sorted(os.listdir("y/z")) == ["a", "b", "index.html"]
    (tmp_path / "x/best.pt").write_bytes(Path(ckpt).read_bytes())
    run("--ckpt", "x/a/../best.pt,x/a/best.pt", "--text=one", "--out_dir=y/z")
    assert sorted(os.listdir("y")) == ["z"] and sorted(os.listdir("y/z")) == ["a", "b", "index.html", "x"]
    (tmp_path / "a,b.pt").write_bytes(Path(ckpt).read_bytes())
    run("--ckpt", "a,b.pt", "--text=one", "--out_dir=one")
    assert os.listdir("one") == ["000.wav"]


def test_keys_without_effect(ckpt, checkpoint, tmp_path, capsys):
    mute = {**checkpoint, "meta": {**checkpoint["meta"], "text_format": "[slt]{text}"}}
    weights.save_checkpoint(tmp_path / "x.pt", mute)
    with pytest.raises(ValueError, match=r"--speaker: speaker = 'awb' has no effect: text_format = '\[slt\]{text}'"):
        run("--ckpt", tmp_path / "x.pt", "--text=one", "--speaker=awb", "--out_dir", tmp_path / "out")
    (tmp_path / "recipe.py").write_text("rounds = 3\nwhole_frames = False\n")
    run("--ckpt", ckpt, "--text=one", tmp_path / "recipe.py", "--out_dir", tmp_path / "out")
    out = capsys.readouterr().out
    assert f"warning: {tmp_path}/recipe.py:1: rounds = 3 has no effect: arch = 'csm' has no such key" in out
    assert "whole_frames = False has no effect" in out and (tmp_path / "out/000.wav").exists()


def test_settings_reach_the_voice(ckpt, recording, tmp_path):
    how = dict(speaker="awb", temperature=0.7, top_k=9, top_p=0.9, seed=4, cap_seconds=2.0)
    flags = [f"--{key}={value}" for key, value in how.items()]
    flags += ["--reference", recording, "--reference_text=two"]
    run("--ckpt", ckpt, "--text=one two", "--out_dir", tmp_path, *flags)
    expected = Voice.from_checkpoint(ckpt).say("one two", **how, reference=recording, reference_text="two")
    assert np.allclose(soundfile.read(tmp_path / "000.wav")[0], expected, atol=1e-4) and len(expected) > 640


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_model_that_never_met_a_prompt_says_so(checkpoint, recording, tmp_path, capsys, share):
    weights.save_checkpoint(tmp_path / "a.pt", {**checkpoint, "config": {"voice_prompt": share}})
    flags = ["--ckpt", tmp_path / "a.pt", "--text=one", "--out_dir", tmp_path]
    run(*flags)
    assert "without voice prompts" not in capsys.readouterr().out
    run(*flags, "--reference", recording, "--reference_text=two")
    assert ("trained without voice prompts (voice_prompt = 0)" in capsys.readouterr().out) == (share == 0)


def test_warnings(ckpt, tmp_path, capsys, monkeypatch):
    run("--ckpt", ckpt, "--text=one", "--out_dir", tmp_path, "--cap_seconds=0.08", "--seed=1")
    assert "1 frames" in (said := capsys.readouterr().out) and "warning: cut off at the cap" in said
    assert "did not stop by itself, spoken again 2 times" in said
    monkeypatch.setattr(models.CSM, "complete", lambda self, stage, state, code: code[:, None].fill_(16).expand(-1, 3))
    monkeypatch.setattr(models.CSM, "foresee", models.CSM.complete)
    run("--ckpt", ckpt, "--text=one", "--out_dir", tmp_path)
    assert "warning: the model stopped at once" in capsys.readouterr().out
    run("--ckpt", ckpt, "--text=one", "--out_dir", tmp_path, "--stream")
    assert "warning: the model stopped at once" in capsys.readouterr().out


def test_a_recipe_alone_is_enough_and_streams(ckpt, tmp_path):
    (tmp_path / "r.py").write_text(f"out_dir = {os.path.dirname(ckpt)!r}\nmax_tokens = 999\n")
    done = cli(tmp_path / "r.py", "--text", "one two", "--stream")
    assert done.returncode == 0, done.stderr
    streamed, _ = soundfile.read(Path(ckpt).with_name("000.wav"))
    piped = cli("--ckpt", ckpt, "--text", "one two", "--out_dir", "-")
    assert piped.returncode == 0 and b"real-time factor" in piped.stderr
    assert np.array_equal(np.frombuffer(piped.stdout, "<i2"), np.round(streamed * 32768))


def test_a_flag_moves_the_output_and_not_the_checkpoint(ckpt, tmp_path):
    """Where the flag's folder has no best.pt, the recipe's folder has the model; else the flag's does."""
    recipe = tmp_path / "r.py"
    recipe.write_text(f"out_dir = {os.path.dirname(ckpt)!r}\n")
    said = tmp_path / "said"
    run(recipe, "--text=one", "--out_dir", said)
    assert os.listdir(said) == ["000.wav"]
    recipe.write_text(f"out_dir = {str(tmp_path / 'gone')!r}\n")
    other = tmp_path / "other"
    assert f"no {other}/best.pt or {tmp_path}/gone/best.pt exists" in refused(other, recipe, "--text=one")
    (said / "best.pt").write_bytes(Path(ckpt).read_bytes())
    run(recipe, "--text=two", "--out_dir", said)
    assert len(os.listdir(said)) == 2


def test_an_error_is_one_line_and_exit_code_1(ckpt, tmp_path):
    done = cli("--ckpt", tmp_path / "no.pt", "--text=one", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.decode().splitlines() == [f"error: {tmp_path}/no.pt: no such checkpoint"]
    assert not os.listdir(tmp_path)


def refused(out_dir, *argv):
    """The one line with which sample.py refuses, leaving nothing in out_dir that looks like a result."""
    with pytest.raises((ValueError, OSError)) as error:
        run("--out_dir", out_dir, *argv)
    left = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    assert not [name for name in left if name.endswith((".wav", ".partial"))]
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], 'give either --text="what to say" or --file=lines.txt'),
        (["--text= "], "the text is empty"),
        (["--text=one", "--file=lines.txt"], "give either"),
        (["--file=none.txt"], "none.txt"),
        (["--file=empty.txt"], "empty.txt is empty"),
        (["--file=hole.txt"], "hole.txt: line 2 is empty"),
        (["--file=latin.txt"], "latin.txt is not text in UTF-8"),
        (["--file=."], "Is a directory"),
        (["--text=one", "--speaker=bob"], "unknown speaker 'bob'; choose from "),
        (["--text=one", "--reference=me.wav"], "cloning takes a recording and its transcript"),
        (["--text=one", "--reference=me.wav", "--reference_text= "], "cloning takes a recording and its transcript"),
        (["--text=one", "--reference_text=two"], "reference_text = 'two' has no effect: no reference is given"),
        (["--text=one", "--reference=none.wav", "--reference_text=two"], "none.wav"),
        (["--text=one", "--reference=hole.txt", "--reference_text=two"], "hole.txt"),
        (["--text=one", "--temperature=-1"], "temperature = -1.0 must be >= 0"),
        (["--text=one", "--top_k=-1"], "top_k = -1 must be >= 0"),
        (["--text=one", "--top_p=0"], "top_p = 0.0 must be > 0 and <= 1"),
        (["--text=one", "--cap_seconds=-1"], "cap_seconds = -1.0 must be >= 0"),
        (["--text=one", "--dtype=int8"], "dtype = 'int8' must be float32, bfloat16 or float16"),
        (["--text=one", "--device=toaster"], "device = 'toaster' is not available"),
        (["--text=one", "--codec_path=other"], "fingerprint"),
        (["--text=one", "--codec_path=hole.txt"], "hole.txt: not a codec table"),
        (["--text=one", "--ckpt="], "no checkpoint given"),
        (["--text=one", "--ckpt=none.pt"], "none.pt: no such checkpoint"),
        (["--text=one", "--ckpt=hole.txt"], "hole.txt is no file of weights, it is a text"),
        (["--text=one", "--ckpt=cut.pt"], "cut.pt is truncated"),
        (["--text=one", "--ckpt=foreign.pt"], "foreign.pt holds no weights of a known layout, but no tensors"),
        (["--text=one", "--ckpt=mute.pt"], "mute.pt lacks probe: train.py writes whole ones"),
        (["--text=one", "--ckpt=."], "cut.pt is truncated"),
        (["--text=one", "--temprature=1"], "temperature"),
        (["--text=one", "--ckpt=*.sft"], "*.sft: no such checkpoint"),
        (["--text=one", "--ckpt=cut.pt,none.pt"], "none.pt: no such checkpoint, one of 2 separated by commas"),
        (["--text=one", "--ckpt=cut.pt,"], "'': no such checkpoint, one of 2 separated by commas"),
        (["--text=one", "--repetition_penalty=-1"], "repetition_penalty = -1.0 must be > 0"),
        (["--text=one", "--min_p=1.5"], "min_p = 1.5 must be >= 0 and <= 1"),
        (["--text=one", "--repetition_penalty=2"], "repetition_penalty = 2.0 has no effect: arch = 'csm' does not use"),
        (["--text=one", "--repetition_decay=2"], "repetition_decay = 2.0 has no effect: arch = 'csm' does not use it"),
        (["--text=one", "--whole_frames=True"], "whole_frames = True has no effect: arch = 'csm' has no such key"),
        (["--text=one", "--reference_seconds=[1,2]"], "has no effect: arch = 'csm' takes a reference as long as it is"),
        (["--text=one", "--speed=2"], "speed = 2.0 has no effect: only the vocoder of XTTS-v2 changes it"),
        (["--text=one", "--heard_seconds=9"], "heard_seconds = 9.0 has no effect: arch = 'csm' has no such key"),
        (["--text=one", "--loose_stop"], "loose_stop = True has no effect: the model has a class to stop with"),
        (["--text=one", "--top_sigma=1"], "top_sigma = 1.0 has no effect: arch = 'csm' has no such key"),
        (["--text=one", "--guidance=2"], "--guidance: guidance = 2.0 has no effect: arch = 'csm' has no such key"),
    ],
)
def test_refused(argv, message, ckpt, checkpoint, recording, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("hole.txt").write_text("one\n \ntwo\n")
    Path("latin.txt").write_bytes("première".encode("latin-1"))
    if "--codec_path=other" in argv:
        codec = codecs.load_codec("mel", n_codebooks=3, codebook_size=16, sample_rate=RATE)
        codec.fit([0.1 * torch.randn(RATE)]).save("other")
    Path("cut.pt").write_bytes(Path(ckpt).read_bytes()[:-5000])
    torch.save({"model_state": {}}, "foreign.pt")
    weights.save_checkpoint("mute.pt", {**checkpoint, "probe": None})
    assert message in refused("out", *([] if any("--ckpt" in a for a in argv) else ["--ckpt", ckpt]), *argv)


@pytest.mark.parametrize("stream", [False, True])
def test_full_disk_leaves_no_wav(ckpt, tmp_path, stream):
    os.symlink("/dev/full", tmp_path / ("000.wav" if stream else "000.wav.partial"))
    assert "No space left" in refused(tmp_path, "--ckpt", ckpt, "--text=one two", f"--stream={stream}")


def test_out_dir_that_cannot_be_written(ckpt, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    assert "File exists" in refused(tmp_path / "taken", "--ckpt", ckpt, "--text=one")
    monkeypatch.setattr(os, "access", lambda *a: False)  # the tests may run as root, to whom nothing is forbidden
    assert "no permission to write" in refused(tmp_path, "--ckpt", ckpt, "--text=one")


def test_all_lines_are_checked_before_the_first_is_spoken(ckpt, tmp_path, monkeypatch):
    (tmp_path / "l.txt").write_text("one\ntwo\u200b")
    monkeypatch.setattr(SentencePiece, "unknown", lambda self, text: set(text) & {"\u200b"})
    assert "does not know" in refused(tmp_path / "out", "--ckpt", ckpt, f"--file={tmp_path}/l.txt")


def test_a_broken_contract_is_refused(ckpt, tmp_path, monkeypatch):
    embed = models.CSM.depth_inputs
    monkeypatch.setattr(models.CSM, "depth_inputs", lambda self, state, codes: embed(self, state, codes.flip(1)))
    assert "contract check failed" in refused(tmp_path / "out", "--ckpt", ckpt, "--text=one")


def test_voice_takes_what_train_has(checkpoint):
    """train.py has the model at hand and no file; the model may be of another dtype."""
    model = weights.load_model(checkpoint, dtype=torch.bfloat16)
    codec = codecs.load_codec("mel", checkpoint["codec"])
    voice = Voice(model, codec, SentencePiece(checkpoint["tokenizer"]["model"]), checkpoint["meta"])
    wav = voice.say("one two", temperature=0, cap_seconds=1)
    assert wav.dtype == torch.float32 and torch.isfinite(wav).all()
    assert isinstance(voice.frames("one"), types.GeneratorType)


def test_lines_end_at_line_ends_only(tmp_path):
    odd = "one\u2028two\x85three\x0bfour\x0cfive\x1csix"
    (tmp_path / "l.txt").write_bytes(f"\ufeff{odd}\r\ntwo\rthree\nfour\n\n".encode())
    assert sample.read_lines("", tmp_path / "l.txt") == [odd, "two", "three", "four"]


@pytest.mark.parametrize("line, message", [
    ("\ufeff", "l.txt: line 2: the text is empty"),
])  # fmt: skip
def test_the_line_that_is_refused_is_named(line, message, ckpt, tmp_path):
    (tmp_path / "l.txt").write_text(f"one\n{line}\ntwo\n", encoding="utf-8")
    assert re.search(message, refused(tmp_path / "out", "--ckpt", ckpt, f"--file={tmp_path}/l.txt"))
    assert not (tmp_path / "out").exists()


def test_a_reference_that_leaves_no_room_is_refused(voice, recording):
    with pytest.raises(ValueError, match="the text is too long: its .* leave none of the model's 256 positions"):
        voice.say("one", reference=recording, reference_text="one two three " * 100)


def test_a_long_text_is_spoken_in_pieces(voice, monkeypatch, tmp_path, ckpt):
    """None is lost, each has the piece before it as a prompt, and the stream has the same frames."""
    text = "one two three four. five six seven. " * 20
    pieces = voice.pieces(text, cap_seconds=0.8)
    assert len(pieces) > 3 and " ".join(pieces).split() == text.split()
    seat = voice.model.seat
    prompts = []
    voice.model.seat = lambda *a, **k: prompts.append(k.get("prompt")) or seat(*a, **k)
    ((_, said),) = voice.speak([text], seed=3, cap_seconds=0.8, tries=1)
    assert [x.frames.shape[1] for x in said.spoken] == [3] * len(pieces) and said.pieces == pieces
    assert prompts[0] is None and len(said.wav) > 0
    for prompt, before, piece in zip(prompts[1:], said.spoken, pieces, strict=False):
        if prompt:
            assert np.array_equal(prompt[-1][0], voice.text_ids(piece)) and np.array_equal(prompt[-1][1], before.frames)
    assert sum(map(bool, prompts)) == len(pieces) - 1
    wav = torch.cat(list(voice.stream(text, seed=3, cap_seconds=0.8)))
    assert len(prompts) == 2 * len(pieces) and str(prompts[: len(pieces)]) == str(prompts[len(pieces) :])
    assert abs(len(wav) - len(said.wav)) < 0.1 * len(wav)
    run("--ckpt", ckpt, "--text", text, "--out_dir", tmp_path, "--cap_seconds=0.2")
    assert os.listdir(tmp_path) == ["000.wav"]


def test_fewer_codebooks_and_int8(voice, ckpt, tmp_path, capsys):
    said = voice.say("one two", seed=3)
    voice.use_codebooks(2)
    assert {frame.shape for frame in voice.frames("one two", seed=3)} == {(2,)}
    assert not torch.equal(voice.say("one two", seed=3)[:99], said[:99])
    for n in (1, 4):
        with pytest.raises(ValueError, match=f"n_codebooks = {n}: only a CSM with a residual codec"):
            voice.use_codebooks(n)
    flags = ["--ckpt", ckpt, "--text=one two", "--seed=3"]
    run(*flags, "--quantize=int8", "--out_dir", tmp_path / "a")
    run(*flags, "--linear=packed", "--out_dir", tmp_path / "b")
    run(*flags, "--linear=auto", "--out_dir", tmp_path / "c", "--n_codebooks=2")
    assert "ones are the fastest here" in capsys.readouterr().out
    run(*flags, "--linear=plain", "--out_dir", tmp_path / "d")
    wav = {name: soundfile.read(tmp_path / name / "000.wav")[0] for name in "abcd"}
    assert np.array_equal(wav["b"], wav["d"]) and all(len(x) for x in wav.values())


def test_a_voice_that_is_ready_takes_no_adapter(voice):
    same = codes(voice.frames("one two", seed=3))
    assert codes(voice.ready(linear="packed").frames("one two", seed=3)) == same
    with pytest.raises(ValueError, match="take the adapter before"):
        voice.adapt("x.pt")


def test_what_can_be_heard_to_be_wrong_is_spoken_again(voice, monkeypatch, tmp_path, ckpt, capsys):
    monkeypatch.setattr("voice.longest_silence", lambda wav, rate: 9.0 if len(asked) < 2 or not wav.any() else 0.0)
    asked = []
    judge = Voice.judge
    monkeypatch.setattr(Voice, "judge", lambda *a: asked.append(0) or judge(*a))
    ((_, said),) = voice.speak(["one two"], seed=3)
    assert said.tries[0][-1] == "silence" and len(said.tries) == 2 and "silence" not in said.faults
    monkeypatch.setattr("voice.longest_silence", lambda wav, rate: 9.0)
    run("--ckpt", ckpt, "--text=one", "--out_dir", tmp_path, "--tries=2")
    assert "there is a long silence in it" in (out := capsys.readouterr().out) and "spoken again 1 time\n" in out


def test_word_times_are_written(ckpt, tmp_path, capsys, voice):
    (tmp_path / "l.txt").write_text("one two. three\nfour\n")
    how = ["--ckpt", ckpt, f"--file={tmp_path}/l.txt", "--seed=3", "--tries=1", "--cap_seconds=1.6"]
    run(*how, "--out_dir", tmp_path / "a", "--timestamps=json")
    assert sorted(os.listdir(tmp_path / "a")) == ["000.json", "000.wav", "001.json", "001.wav"]
    words = json.loads((tmp_path / "a/000.json").read_text())
    seconds = soundfile.info(tmp_path / "a/000.wav").duration
    assert [x["word"] for x in words] == ["one", "two.", "three"]
    times = [x[key] for x in words for key in ("start", "end")]
    assert times == sorted(times) and times[0] > 0 and times[-1] <= seconds
    assert capsys.readouterr().out.count("the times of its words are a guess") in (1, 2)  # random weights
    run(*how, "--out_dir", tmp_path / "b", "--timestamps=srt")
    srt = (tmp_path / "b/000.srt").read_text()
    assert srt.startswith("1\n00:00:0") and "one two. three" in srt.replace("\n", " ")
    for more in ("--stream=True", "--n_codebooks=2", "--out_dir=-"):
        with pytest.raises(ValueError, match="timestamps = 'srt': they need whole lines"):
            run(*how, "--timestamps=srt", more)


def test_words_of_codes(voice):
    codes = torch.stack(list(voice.frames("one two three", seed=3, cap_seconds=1.6)))
    assert len(codes) > 4
    words = voice.words("one two three", codes, offset=10.0)
    assert [word for word, *_ in words] == ["one", "two", "three"] and words[0][1] > 10 and words[2][2] <= 10 + 1.6
    half = voice.words("one two three", codes, speed=2.0)
    assert [2 * t + 10 for x in half for t in x[1:]] == pytest.approx([t for x in words for t in x[1:]])
    (found,) = [said.words for _, said in voice.speak(["one two three"], seed=3, cap_seconds=1.6, tries=1)]
    assert [t for x in found for t in x[1:]] == pytest.approx([t - 10 for x in words for t in x[1:]])
    assert voice.words("[one] two", torch.zeros(0, 3, dtype=int)) == []


def test_words_of_a_long_text_are_placed_in_the_whole(voice):
    text = "one two three four. five six seven. " * 20
    ((_, said),) = voice.speak([text], seed=3, cap_seconds=0.8, tries=1)
    assert [word for word, *_ in said.words] == text.split() and len(said.pieces) > 3
    times = [start for _, start, _ in said.words]
    assert times == sorted(times) and times[-1] <= len(said.wav) / RATE
    assert len({round(t, 3) for t in times}) > 2 * len(said.pieces)


def test_what_attention_tells_is_spoken_again(voice, monkeypatch):
    """The attention is made by hand: the first try skips a word, the second speaks one twice, the third is right."""
    paths = [np.repeat(range(6), n) for n in ([2, 2, 0, 3, 3, 2], [1, 1, 5, 2, 2, 1], [2, 2, 2, 2, 2, 2])]
    tries = []

    def attention(text, codes, owner, **side):
        tries.append(owner.tolist())
        return torch.from_numpy(np.eye(6)[paths[len(tries) - 1]][: len(codes)])[None]

    monkeypatch.setattr(Voice, "frames_per_id", property(lambda voice: 12 / len(tries[0]) if tries else 2.0))
    monkeypatch.setattr("voice.sounding", lambda wav, frames: np.ones(frames))
    monkeypatch.setattr("voice.longest_silence", lambda wav, rate: 0.0)
    monkeypatch.setattr(voice.model, "attention", attention)
    first, *others = voice.model.scorers()
    endless = [lambda x: first(x).index_fill(1, torch.tensor([16]), -9e9), *others]
    monkeypatch.setattr(voice.model, "scorers", lambda: endless)  # no try ends before its cap of 12 frames
    ((_, said),) = voice.speak(["one one one one one one"], seed=3, cap_seconds=0.96, tries=3)
    assert said.tries == [[CUT, SKIPPED], [CUT, TWICE], [CUT]] and said.faults == [CUT]
    assert max(tries[0]) == 5 and [word for word, *_ in said.words] == ["one"] * 6


def test_all_checkpoints_are_checked_before_the_first_speaks(ckpt, checkpoint, tmp_path):
    (tmp_path / "b").mkdir()
    weights.save_checkpoint(tmp_path / "b/best.pt", {**checkpoint, "probe": {}})
    said = refused(tmp_path / "out", f"--ckpt={ckpt},{tmp_path}/b/best.pt", "--text=one")
    assert "b/best.pt is damaged: its probe" in said
    assert not list(tmp_path.rglob("*.wav"))


def test_nothing_is_written_outside_of_out_dir(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        os.mkdir(name)
        weights.save_checkpoint(f"{name}/best.pt", checkpoint)
    os.mkdir("a/c")
    run("--ckpt=a/c/../best.pt,b/best.pt", "--text=one", "--out_dir=x/y", "--cap_seconds=0.2")
    assert sorted(str(path) for path in Path("x").rglob("*.*")) == ["x/y/a/000.wav", "x/y/b/000.wav", "x/y/index.html"]


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("first", [0, 2])
def test_a_model_that_diverged_says_so(voice, monkeypatch, temperature, first):
    """From its first logits on, or later, with draws and without."""
    calls = []
    step = models.Transformer.forward

    def wrong(self, x, *given, **how):
        calls.append(0)
        return step(self, x * math.nan if len(calls) > 3 * first else x, *given, **how)

    monkeypatch.setattr(models.Transformer, "forward", wrong)
    with pytest.raises(ValueError, match="logits are not finite: its training run diverged"):
        talkative(voice).say("one two", temperature=temperature, cap_seconds=1, seed=3)


def test_a_reader_that_goes_away_ends_it_quietly(ckpt, tmp_path):
    argv = [sys.executable, str(ROOT / "sample.py"), "--ckpt", ckpt, "--text=one two", "--out_dir=-"]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    said = child.stderr.read().decode()
    child.stderr.close()
    assert child.wait() == 1 and "error" not in said.lower() and "Traceback" not in said


def everything(x, path=()):
    """The paths of all fields of a checkpoint but its single tensors."""
    for key in x if isinstance(x, dict) and path != ("model",) else ():
        yield (*path, key)
        yield from everything(x[key], (*path, key))


def changed(x, path, value):
    return {**x, path[0]: changed(x[path[0]], path[1:], value) if path[1:] else value}


def test_fields_of_another_kind_are_one_line(checkpoint, tmp_path):
    """A seeded share of what can be changed: each is refused in a line, or it speaks as if nothing was."""
    rng, path = random.Random(0), tmp_path / "x.pt"
    junk = [None, "x" * 5000, -1, 0.5, math.nan, 10**30, [], {}, [1, "x"], torch.zeros(2), b"x"]
    cases = [(field, value) for field in everything(checkpoint) for value in junk]
    refusals = 0
    for field, value in rng.sample(cases, 60):
        weights.save_checkpoint(path, changed(checkpoint, field, value))
        try:
            Voice.from_checkpoint(path).say("one", cap_seconds=0.2)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and len(str(error)) < 400 + len(str(path)), (field, value)
            refusals += 1
    assert refusals > 40


@pytest.mark.parametrize("change, message", [
    ({"probe": {"text": torch.tensor([10**6]), "codes": torch.zeros(4, 3).long()}}, "codes that the model lacks"),
    ({"probe": {"text": torch.tensor([3]), "codes": torch.zeros(4, 2).long()}}, "its probe is no utterance"),
    ({"codec_fingerprint": "0"}, "the codec's fingerprint is"),
    ({"config": {"temperature": "x"}}, "config is damaged: temperature is 'x', not a number"),
])  # fmt: skip
def test_parts_that_do_not_belong_together(checkpoint, tmp_path, change, message):
    weights.save_checkpoint(tmp_path / "x.pt", {**checkpoint, **change})
    with pytest.raises(ValueError, match=f"x.pt.*{message}"):
        Voice.from_checkpoint(tmp_path / "x.pt")
    other = train_tokenizer(["six seven"] * 5, 280)
    weights.save_checkpoint(tmp_path / "x.pt", {**checkpoint, "tokenizer": {"kind": "sentencepiece", "model": other}})
    with pytest.raises(ValueError, match="x.pt is damaged: its tokenizer is not the one"):
        Voice.from_checkpoint(tmp_path / "x.pt")


def test_a_type_that_a_cpu_emulates_is_said(monkeypatch):
    linear = torch.nn.functional.linear

    def slow(x, y):
        time.sleep(0.2 * (x.dtype != torch.float32))
        return linear(x, y)

    monkeypatch.setattr(torch.nn.functional, "linear", slow)
    assert re.match(r"warning: dtype = 'bfloat16': on this CPU .* [\d.]+ times", sample.slow_type("cpu", "bfloat16"))
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, y: time.sleep(0.01))
    assert sample.slow_type("cpu", "bfloat16") == sample.slow_type("cpu", "float32") == ""

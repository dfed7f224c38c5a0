"""Published weights that speak before any training: CSM here, the other families in the files of their models."""

import io
import json
import math
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tokenizers
import torch
from helpers import read_page, run
from safetensors.torch import load_file, save_file
from test_xtts import download

import model as models
import prepare
import released
import sample
from parts import configurator
from parts.audio import read_audio
from sample import column_names, find_checkpoints
from voice import Voice
from weights import load_checkpoint

MIMI = dict(model_type="mimi", hidden_size=128, num_filters=4, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, intermediate_size=512, codebook_size=16, codebook_dim=16, upsample_groups=128,
            num_quantizers=4, vector_quantization_hidden_dimension=16)  # fmt: skip


LLAMA = "<|begin_of_text|>", "<|end_of_text|>"


def write_tokenizer(path, marks=LLAMA, around=f"{LLAMA[0]} $A {LLAMA[1]}"):
    """A tokenizer.json in the form of Llama or LFM2: bytes, and marks around a text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=list(marks), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["[0]one two three four"] * 3, trainer)
    ids = [(mark, tokenizer.token_to_id(mark)) for mark in marks]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=around, special_tokens=ids)
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


def no_steps(place, folder, *flags, arch="csm", tokenizer="tokenizer.json", run_flags=(), seconds=0.7):
    """Prepare recordings of so many seconds or a little more with these flags, and train on them for 0 steps from the
    weights in a folder: the checkpoint place/out/last.pt and its log."""
    lines = ["audio|text"]
    rng = np.random.default_rng(0)
    for i in range(8):
        soundfile.write(place / f"{i}.wav", 0.1 * rng.standard_normal(int(24000 * seconds * (1 + 0.1 * i))), 24000)
        lines.append(f"{i}.wav|one two")
    (place / "metadata.csv").write_text("\n".join(lines))
    speak(f"--sources={place}", f"--data_dir={place}/tokens", f"--tokenizer={folder}/{tokenizer}", "--workers=1",
          "--val_fraction=0.3", "--min_seconds=0", "--max_chars_per_second=999", *flags, script=prepare)  # fmt: skip
    return run(f"{place}/tokens", place / "out", f"--init_from={folder}", f"--arch={arch}", "--max_iters=0", *run_flags,
               usual=["--eval_samples=0", "--device=cpu"])  # fmt: skip


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
    ((_, codes),) = voice.prompt(recording, "three")["prompt"]
    assert torch.equal(torch.from_numpy(codes), voice.codec.encode(read_audio(recording, 24000)[None])[0].T)


def test_after_a_run_of_no_steps_the_codes_are_the_same(csm, tmp_path, capsys):
    """And both stand beside each other on a page."""
    folder = csm[1]
    state, log = no_steps(tmp_path, folder, "--codec=mimi", f"--codec_path={folder}", "--text_format=[0]{text}")
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
    page = read_page(tmp_path / "both/index.html")
    published, trained = page["models"]
    assert published["name"] == "csm-small" and published["config"] == {} and published["numbers"]["step"] is None
    assert trained["name"] == "out" and trained["config"]["max_iters"] == 2 and trained["curves"]["val_loss"]
    assert list(page["sentences"][0]["audio"]) == ["csm-small", "out"] and page["sentences"][0]["text"] == "one two"


# ---------------------------------------------------------------------------------------------------------------------
# the other families

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    """The weights of a golden file by their published names, and its other tensors."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    weights = {key.removeprefix("weights."): x for key, x in tensors.items() if key.startswith("weights.")}
    return weights, {key: x for key, x in tensors.items() if not key.startswith("weights.")}


def write_letters(path, letters, **marks):
    """A tokenizer.json that reads each letter {letter: id} as a token, with marks {name: id}."""
    vocabulary = {**marks, **letters}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token=list(marks)[0]))
    tokenizer.add_special_tokens(list(marks))
    path.write_text(tokenizer.to_str())


def write_nemo(path, tensors):
    torch.save(tensors, packed := io.BytesIO())
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("./model_weights.ckpt")
        info.size = len(packed.getvalue())
        archive.addfile(info, io.BytesIO(packed.getvalue()))


def nanocodec(path):
    """The golden NanoCodec with its two codebooks doubled, as many as KaniTTS has."""
    weights, _ = golden("nemo_nanocodec")
    for key in [key for key in weights if "fsqs.0" in key]:
        for k in (2, 3):
            weights[key.replace("fsqs.0", f"fsqs.{k}")] = weights[key].clone()
    for key in weights:
        if "encoder.post_conv" in key:
            weights[key] = torch.cat([weights[key]] * 2)
    wide = "audio_decoder.pre_conv.conv.parametrizations.weight.original1"
    weights[wide] = torch.cat([weights[wide]] * 2, 1)
    write_nemo(path, weights)


@pytest.fixture(scope="module")
def kani(tmp_path_factory):
    """transformers' LFM2 with the ids of KaniTTS and small random weights, and its folder with all it needs."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("hub") / "kani-small"
    theirs = Lfm2ForCausalLM(Lfm2Config(
        vocab_size=80538, hidden_size=32, intermediate_size=48, block_auto_adjust_ff_dim=False, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
        layer_types=["conv", "full_attention"] * 2,
    )).eval()  # fmt: skip
    theirs.save_pretrained(folder)
    nanocodec(folder / "nemo-nano-codec.nemo")
    write_tokenizer(folder / "tokenizer.json", ["<|pad|>", "<|startoftext|>", "<|endoftext|>"], "<|startoftext|> $A")
    return theirs, folder


@pytest.mark.parametrize("speaker", ["", "katie"])
def test_a_kani_says_what_transformers_says(kani, tmp_path, speaker):
    theirs, folder = kani
    voice = Voice.from_published(folder, "cpu", speaker=speaker)
    assert voice.codec.name == "nanocodec" and voice.draw["repetition_penalty"] == 1.1
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = tokenizer.encode("katie: one two" if speaker else "one two")
    prompt = torch.tensor([[64403, *text.ids, 2, 64404, 64405, 64401]])

    def grammar(ids, scores):
        k = (ids.shape[1] - prompt.shape[1]) % 4
        allowed = torch.full_like(scores, -math.inf)
        first = 64410 + 4032 * k
        allowed[:, first : first + 4032] = scores[:, first : first + 4032]
        allowed[:, 64402] = scores[:, 64402] if k == 0 else -math.inf
        return allowed

    expected = theirs.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0, logits_processor=[grammar])
    expected = (expected[0, prompt.shape[1] :] - 64410).view(-1, 4) - 4032 * torch.arange(4)
    codes = codes_of(voice, speaker=speaker, repetition_penalty=1, cap_seconds=9.5 / voice.codec.frame_rate)
    assert torch.equal(codes, expected) and len(codes) == 10
    flags = [f"--speaker={speaker}"] if speaker else []
    speak(f"--ckpt={folder}", "--text=one two", f"--out_dir={tmp_path}", "--cap_seconds=0.01", "--device=cpu", *flags)
    assert soundfile.info(tmp_path / "000.wav").samplerate == 22050


def test_a_kani_after_a_run_of_no_steps(kani, tmp_path):
    folder = kani[1]
    no_steps(tmp_path, folder, "--codec=nanocodec", f"--codec_path={folder}", "--text_format={text}", arch="kani",
             seconds=0.05)  # fmt: skip
    base, trained = Voice.from_published(folder, "cpu"), Voice.from_checkpoint(tmp_path / "out/last.pt", "cpu")
    assert torch.equal(codes_of(trained, cap_seconds=0.01), codes_of(base, cap_seconds=0.01))


@pytest.fixture(scope="module")
def xtts(tmp_path_factory):
    """XTTS-v2's files with the golden weights, in which its two marks are codes as in the golden generation: the
    original did not stop. Its letters are the golden text, and its one speaker is the golden voice."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("hub") / "xtts-small"
    folder.mkdir()
    download(folder, codes=34)
    _, more = golden("xtts_gpt")
    content = torch.load(folder / "model.pth", weights_only=True)
    weights = content["model"]
    weights["gpt.mel_embedding.weight"] = torch.cat([x := weights["gpt.mel_embedding.weight"], x[32:]])
    weights["gpt.mel_head.weight"] = torch.cat([x := weights["gpt.mel_head.weight"], torch.zeros(2, x.shape[1])])
    weights["gpt.mel_head.bias"] = torch.cat([weights["gpt.mel_head.bias"], torch.full((2,), -1e4)])
    torch.save(content, folder / "model.pth")
    (folder / "config.json").write_text('{"model_args": {"gpt_n_heads": 2, "gpt_start_text_token": 37}}')
    letters = dict(zip("abcdefghi", more["in.text"][0].tolist(), strict=True))
    letters |= {c: i for c, i in zip("jklmnopqrstuvwxyz", sorted({*range(3, 37)} - {*letters.values()}), strict=False)}
    write_letters(folder / "vocab.json", letters, **{"[STOP]": 0, "[UNK]": 1, "[SPACE]": 2, "[START]": 37, "[en]": 38,
                                                     "[de]": 39})  # fmt: skip
    voice = {"gpt_cond_latent": more["out.cond_latents"][:1], "speaker_embedding": torch.randn(1, 16, 1)}
    other = {"gpt_cond_latent": more["out.cond_latents"][1:], "speaker_embedding": torch.randn(1, 16, 1)}
    torch.save({"Golden Voice": voice, "Other": other}, folder / "speakers_xtts.pth")
    return folder, more


def test_an_xtts_says_what_the_original_says(xtts, tmp_path):
    """In a published voice: the golden codes, and the vocoder's wav of the states they came from, in its timbre."""
    folder, more = xtts
    how = dict(temperature=0.0, repetition_penalty=1.0, cap_seconds=12 * 1024 / 22050)
    flags = [f"--{key}={value}" for key, value in how.items()]
    speak(f"--ckpt={folder}", "--text=abcdefghi", "--text_format={text}", "--speaker=Golden Voice", *flags,
          f"--out_dir={tmp_path}", "--device=cpu")  # fmt: skip
    voice = Voice.from_published(folder, "cpu", text_format="{text}")
    assert voice.draw["repetition_penalty"] == 5.0 and voice.sample_rate == 24000
    assert voice.text_ids("abcdefghi").tolist() == more["in.text"][0].tolist()
    latents, timbre = voice.own_voice("Golden Voice")
    assert torch.equal(latents, more["out.cond_latents"][0]) and timbre.shape == (16,)
    states = torch.stack(list(voice.frames("abcdefghi", speaker="Golden Voice", **how)))
    expected = voice.codec.vocode(states[None], timbre[None])[0]
    wav, rate = soundfile.read(tmp_path / "000.wav", dtype="float32")
    assert rate == 24000 and np.abs(wav - expected.clamp(-1, 1).numpy()).max() < 1e-3
    voice.vocoder = False
    voice.engine = None  # which gives states
    codes = torch.stack(list(voice.frames("abcdefghi", speaker="Golden Voice", **how)))
    assert codes[:, 0].tolist() == more["gen.codes"][0].tolist() and len(states) == 12
    other = torch.stack(list(voice.frames("abcdefghi", speaker="Other", **how)))
    assert codes.tolist() != other.tolist()


def test_an_xtts_asks_for_a_voice(xtts, recording, tmp_path):
    folder, _ = xtts
    flags = f"--ckpt={folder}", "--text=one", "--device=cpu", "--cap_seconds=0.5"
    said = refused(tmp_path / "out", *flags)
    assert "reads the voice from a recording: give a reference, or a speaker: Golden Voice, Other" in said
    assert "unknown speaker 'golden'; choose from" in refused(tmp_path / "out", *flags, "--speaker=golden")
    speak(*flags, f"--reference={recording}", f"--out_dir={tmp_path}/said")
    assert (tmp_path / "said/000.wav").exists()
    tokenizer = Voice.from_published(folder, "cpu").tokenizer
    ids = Voice.from_published(folder, "cpu").text_ids("One")
    assert ids.tolist() == tokenizer.encode("[en]one")
    ids = Voice.from_published(folder, "cpu", language="de").text_ids("One")
    assert ids.tolist() == tokenizer.encode("[de]one")
    assert Voice.from_published(folder, "cpu").text_ids("One", language="DE").tolist() == ids.tolist()
    said = refused(tmp_path / "out", *flags, f"--reference={recording}", "--language=tlh")
    assert said.endswith("model.pth does not know the language [tlh]; choose from [de], [en]")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    for content, message in (
        ({}, "holds no voices"), ({"A": 3}, "gpt_cond_latent of A is 3, not a tensor"),
        ({"A": {"gpt_cond_latent": torch.zeros(1, 5, 7)}}, "has shape (1, 5, 7), not (1, 32, 32)"),
    ):  # fmt: skip
        torch.save(content, bare / "speakers_xtts.pth")
        assert message in refused(tmp_path / "out", f"--ckpt={bare}", "--text=one", f"--reference={recording}")
    os.remove(bare / "speakers_xtts.pth")
    assert refused(tmp_path / "out", f"--ckpt={bare}", "--text=one").endswith("from a recording: give a reference")
    os.remove(bare / "dvae.pth")
    said = refused(tmp_path / "out", f"--ckpt={bare}", "--text=one", f"--reference={recording}")
    assert "no dvae.pth of the codec xtts; `hf download coqui/XTTS-v2 dvae.pth mel_stats.pth model.pth`" in said


def test_an_xtts_after_a_run_of_no_steps(xtts, recording, tmp_path):
    folder, _ = xtts
    no_steps(tmp_path, folder, "--codec=xtts", f"--codec_path={folder}", "--text_format=[en]{text}",
             "--references=True", arch="xtts", tokenizer="vocab.json",
             run_flags=["--reference_seconds=[0.2,0.4]"])  # fmt: skip
    base, trained = Voice.from_published(folder, "cpu"), Voice.from_checkpoint(tmp_path / "out/last.pt", "cpu")
    said = [codes_of(voice, reference=recording, cap_seconds=0.6) for voice in (base, trained)]
    assert torch.equal(*said) and said[0].shape[1] == 32


@pytest.fixture(scope="module")
def valle(tmp_path_factory):
    """The golden VALL-E as its author publishes such, with letters for its phonemes, and tables of a codec of its
    sizes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("hub") / "valle-small"
    folder.mkdir()
    weights, more = golden("valle2")
    facts = json.loads((GOLDEN / "valle2.json").read_text())["config"]
    said = {"experimental": facts["experimental"], "size": {"heads": facts["n_heads"]}, "version": 7}
    save_file(weights, folder / "fp32.sft", {"config": json.dumps(said), "stats": "{}"})
    letters = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz", 3)}
    write_letters(folder / "tokenizer.json", letters, **{"<unk>": 0, "<s>": 1, "</s>": 2, " ": 29})
    codec = released.load_codec("mel", n_codebooks=8, codebook_size=21, sample_rate=24000, frame_rate=75)
    codec.fit([0.1 * torch.randn(48000)]).save(folder / "mel")
    return folder, more


def test_a_valle_says_what_the_original_says(valle, recording, tmp_path, monkeypatch):
    """After a golden prompt, as many frames as in the golden file."""
    folder, more = valle
    letters = "".join("abcdefghijklmnopqrstuvwxyz"[i - 3] for i in more["in.0.phn"][1:-1].tolist())
    monkeypatch.setattr(models.VallE, "guess_length", lambda self, state: torch.tensor([12]))
    monkeypatch.setattr(Voice, "listen", lambda self, paths: [more["in.0.prom"].numpy()])
    decode, said = Voice.decode, []
    monkeypatch.setattr(Voice, "decode", lambda *given: said.append(given[1]) or decode(*given))
    flags = [f"--ckpt={folder}", f"--text={letters}", "--codec=mel", f"--codec_path={folder}/mel", "--temperature=0",
             "--rounds=6", "--top_sigma=0", f"--reference={recording}", f"--out_dir={tmp_path}",
             "--reference_seconds=[0.01, 99]", "--front_end=none"]  # fmt: skip
    speak(*flags, "--device=cpu")
    expected = more["demask.0.result"]
    assert torch.equal(said[0], expected.where(expected < 21, 0)) and (tmp_path / "000.wav").exists()


def test_a_valle_after_a_run_of_no_steps(valle, tmp_path):
    folder, _ = valle
    mel = "--codec=mel", f"--codec_path={folder}/mel"
    no_steps(tmp_path, folder, *mel, "--text_format={text}", arch="valle")
    base = Voice.from_published(folder, "cpu", codec="mel", codec_path=f"{folder}/mel", front_end="none")
    trained = Voice.from_checkpoint(tmp_path / "out/last.pt", "cpu")
    assert trained.model.config == base.model.config and base.model.config.guidance == 2.5
    assert torch.equal(codes_of(trained, cap_seconds=1), codes_of(base, cap_seconds=1))
    for voice in (base, trained):  # the data name no language, the weights have ids of more
        assert voice.model.config.language_names[:2] == ["en", "ja"]
        assert [voice.utterance("one", language=name)[1]["language"] for name in ("", "ja")] == [0, 1]
        with pytest.raises(ValueError, match="unknown language 'es'; choose from en, ja"):
            voice.text_ids("one", language="es")


def test_the_codec_of_a_valle(valle, tmp_path):
    assert [released.codec_of_valle(*sizes) for sizes in ((8, 1000), (8, 1024), (9, 1024))] == [
        "audiocodec44k", "encodec", "dac"]  # fmt: skip
    write_nemo(tmp_path / "audio_codec_44khz.nemo", golden("nemo_audiocodec_44k")[0])
    codec = released.find_codec("audiocodec44k", "", str(tmp_path / "fp32.sft"), False)
    assert codec.codebook_size == 1000 and codec.path == str(tmp_path / "audio_codec_44khz.nemo")
    os.remove(tmp_path / "audio_codec_44khz.nemo")
    with pytest.raises(FileNotFoundError, match="hf download nvidia/audio-codec-44khz` fetches it, or name it by"):
        released.find_codec("audiocodec44k", "", str(tmp_path / "fp32.sft"), False)


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


def test_a_checkpoint_finds_the_codec_that_moved_with_it(csm, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    only_mimi(csm, tmp_path / "a/mimi")
    monkeypatch.chdir(tmp_path / "a")
    no_steps(tmp_path / "a", csm[1], "--codec=mimi", "--codec_path=mimi", "--text_format=[0]{text}")
    os.rename(tmp_path / "a", tmp_path / "b")
    monkeypatch.chdir(tmp_path / "b")
    speak("--ckpt=out", "--text=one", "--out_dir=said", "--cap_seconds=0.2", "--device=cpu")
    monkeypatch.chdir(tmp_path)
    said = refused(tmp_path / "out", "--ckpt=b/out", "--text=one")
    assert said.startswith(f"b/out/best.pt: the pack: {tmp_path}/a/mimi/model.safetensors is gone, its weights are not "
                           "at mimi/model.safetensors or b/out/model.safetensors or b/out, and in ")  # fmt: skip
    assert said.endswith("`hf download kyutai/mimi model.safetensors` fetches it, or --codec_path names it")
    os.rename(tmp_path / "b/mimi/model.safetensors", tmp_path / "b/out/model.safetensors")
    assert Voice.from_checkpoint("b/out/best.pt", "cpu").codec.name == "mimi"


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

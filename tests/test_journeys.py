"""Four journeys, each as a user types it: made recordings or codes, an adapted model, its speech, and an export that
other software loads. The published weights are made small and random, in their authors' layouts."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
import torch
from helpers import GREEDY, ROOT, assert_same, read_page, shell, voice
from safetensors.torch import load_file, save_file
from test_codec_networks import TINY, mimi
from test_export import FIVE, sheet
from test_released import golden, nanocodec, write_letters, write_nemo, write_tokenizer
from test_sources import kani, marvis, parquet
from test_valle import published_table
from test_xtts import download

from parts import lora
from parts.tensors import read_metadata
from weights import from_pretrained

pytestmark = pytest.mark.slow
MARKS = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>"  # some of SmolLM2's


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the repository's files, as somebody cloned it, and nothing of the hub in its cache."""
    for path in [*ROOT.glob("*.py"), ROOT / "parts", ROOT / "config"]:
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def random_weights(table, std=0.1):
    """Tensors for {key: shape}; those that scale are near 1."""
    torch.manual_seed(1)
    return {key: 1 + 0.1 * torch.randn(shape) if key.endswith(("scale", "norm.weight")) else std * torch.randn(shape)
            for key, shape in table.items()}  # fmt: skip


def heard(path, rate):
    """The seconds of a wav file of that rate which is not silent."""
    wav, found = soundfile.read(path)
    assert found == rate and abs(wav).max() > 1e-3
    return len(wav) / rate


def same_wavs(a, b, steps=0):
    """How many files two models have spoken; check that they are the same but for so many steps of 16 bits."""
    names = sorted(path.name for path in a.glob("*.wav"))
    for name in names:
        one, other = (soundfile.read(folder / name, dtype="int16")[0].astype(int) for folder in (a, b))
        assert one.shape == other.shape and abs(one - other).max() <= steps, name
    return len(names)


def same_state(a, b, rtol=0.0, atol=0.0):
    a, b = (from_pretrained(path).state_dict() for path in (a, b))
    assert a.keys() == b.keys()
    assert_same(a.values(), b.values(), rtol=rtol, atol=atol)


# ---------------------------------------------------------------------------------------------------------------------
# Marvis: shards of codes -> trials -> three spellings


def marvis_download(folder):
    """The weights as Marvis publishes them for its own code, with the tokenizer and the codec beside them."""
    folder.mkdir(parents=True)
    vocab = write_tokenizer(folder / "tokenizer.json", MARKS, f"{MARKS[1]} $A {MARKS[2]}").get_vocab_size()
    table = sheet("original", vocab, 4, 67, (2, 64, 64, 32, 128), (1, 64, 64, 32, 64))
    save_file(random_weights(table), folder / "model.safetensors")
    heads = {"num_attention_heads": 2, "depth_decoder_config": {"num_attention_heads": 2}}
    (folder / "config.json").write_text(json.dumps(heads))
    mimi(folder.parent / "mimi", **TINY["mimi"])
    return table


def test_marvis_from_shards_to_three_spellings(here):
    weights = here / "weights/marvis-tts-250m-v0.1"
    table = marvis_download(weights)
    rng = np.random.default_rng(0)
    (here / "elise").mkdir()
    for i in range(3):
        rows = [("one two three", "0", rng.integers(0, 64, (4, 14 + j))) for j in range(10)]
        marvis(rows, here / f"elise/shard-{i:05d}.tar")
    (here / "lines.txt").write_text("one two\nthree four\n")
    tiny = """--max_iters=4 --warmup_iters=1 --eval_interval=4 --eval_samples=1 --dtype=float32 --device=cpu \
        --backbone= --decoder="""
    said = shell(here, f"""
        python prepare.py config/elise.py --sources="elise/*.tar" --codec_path=weights/mimi --val_fraction=0.2
        for rate in 1e-4 3e-4 1e-3; do
            python train.py config/elise.py {tiny} --learning_rate=$rate --out_dir=out/elise-$rate
        done
        python sample.py --ckpt="weights/marvis-tts-250m-v0.1,out/elise-*" --file=lines.txt \\
            --out_dir=out/compared --codec_path=weights/mimi --cap_seconds=1
    """)  # fmt: skip
    assert "30 of 30 utterances are used" in said
    for rate in ("1e-4", "3e-4", "1e-3"):
        heard(next((here / f"out/elise-{rate}/samples").rglob("*.wav")), 24000)
    page = read_page(here / "out/compared/index.html")
    columns = ["marvis-tts-250m-v0.1", "elise-1e-3", "elise-1e-4", "elise-3e-4"]
    for name in columns:
        assert page["sentences"][1]["audio"][name]["seconds"] > 0
        assert heard(here / f"out/compared/{name}/000.wav", 24000) < 1.1
    trained, base = (from_pretrained(path).state_dict() for path in (here / "out/elise-1e-3/best.pt", weights))
    moved = {key for key, x in base.items() if not torch.equal(x, trained[key])}
    assert moved and not any(key.startswith("backbone.") for key in moved)

    print(shell(here, """
        for layout in transformers original-pickle mlx mlx-8bit mlx-4bit; do
            python weights.py export --ckpt=out/elise-1e-3/best.pt --out_dir=hub/$layout --layout=$layout
        done
        python sample.py --ckpt="hub/*" --file=lines.txt --out_dir=out/exported --codec_path=weights/mimi \\
            --cap_seconds=1
    """))  # fmt: skip
    names = torch.load(here / "hub/original-pickle/ckpt.pt")["model_state"]
    assert {key: tuple(x.shape) for key, x in names.items()} == table
    for layout in ("transformers", "original-pickle", "mlx"):
        same_state(here / "out/elise-1e-3/best.pt", here / "hub" / layout)
        assert same_wavs(here / "out/compared/elise-1e-3", here / "out/exported" / layout) == 2
    for bits in (4, 8):
        quantised = load_file(here / f"hub/mlx-{bits}bit/model.safetensors")
        step = max(float(x.abs().max()) for key, x in quantised.items() if key.endswith("scales"))
        same_state(here / "out/elise-1e-3/best.pt", here / f"hub/mlx-{bits}bit", atol=step)
        heard(here / f"out/exported/mlx-{bits}bit/000.wav", 24000)
    speaks_in_transformers(here / "hub/transformers", from_pretrained(here / "out/elise-1e-3/best.pt"))


def speaks_in_transformers(folder, ours):
    """Its processor and its model say what ours says."""
    from transformers import AutoProcessor, AutoTokenizer, CsmForConditionalGeneration

    theirs = CsmForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    talk = [{"role": "0", "content": [{"type": "text", "text": "one two"}]}]
    inputs = processor.apply_chat_template(talk, tokenize=True, return_dict=True)
    ids = AutoTokenizer.from_pretrained(folder)("[0]one two", add_special_tokens=False).input_ids
    assert inputs["input_ids"].tolist() == [ours.config.marked(ids).tolist()]
    how = dict(do_sample=False, depth_decoder_do_sample=False, max_new_tokens=6)
    codes, audio = (theirs.generate(**inputs, **how, output_audio=wanted)[0] for wanted in (False, True))
    expected = list(ours.generate(np.array(ids), max_frames=6, draw=GREEDY))
    assert torch.equal(codes[: len(expected)], torch.stack(expected))
    assert abs(audio).max() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# KaniTTS: tables of codes -> two experiments with LoRA -> transformers


def kani_download(folder):
    """KaniTTS as its authors publish it, an LFM2 of transformers, with the codec's archive in the hub's cache."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(3)
    theirs = Lfm2ForCausalLM(Lfm2Config(
        vocab_size=80538, hidden_size=32, intermediate_size=48, block_auto_adjust_ff_dim=False, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
        layer_types=["conv", "full_attention"] * 2,
    ))  # fmt: skip
    theirs.save_pretrained(folder)
    write_tokenizer(folder / "tokenizer.json", ["<|pad|>", "<|startoftext|>", "<|endoftext|>"], "<|startoftext|> $A")
    nanocodec(folder / "nemo-nano-codec-22khz-0.6kbps-12.5fps.nemo")


def test_kani_from_tables_to_two_voices(here):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hub = here / "hub/kani-anna"
    kani_download(here / "weights/kani-tts-450m-0.2-pt")
    rng = np.random.default_rng(0)
    (here / "nano").mkdir()
    for name in ("train-00000", "train-00001"):
        spoken = [("one two three", "anna" if i % 2 else "ben", rng.integers(0, 4032, (4, 12 + i))) for i in range(16)]
        parquet(kani(spoken), here / f"nano/{name}-of-00002.parquet")
    (here / "lines.txt").write_text("one two\nthree four\n")
    tiny = """--max_batch=8 --eval_interval=6 --eval_samples=1 --dtype=float32 --device=cpu --learning_rate=1e-2 \\
        --backbone="""
    print(shell(here, f"""
        python prepare.py config/kani_lora.py --codec_path=weights/kani-tts-450m-0.2-pt --val_fraction=0.2 \\
            --sources="{{'path': 'nano/*.parquet', 'filter': {{'speaker': 'anna|ben'}}, 'cap': 30}}" \\
            --min_seconds=0 --max_chars_per_second=10000
        for rank in 2 4; do
            python train.py config/kani_lora.py {tiny} --lora_rank=$rank --out_dir=out/kani-$rank
        done
        python sample.py --ckpt="weights/kani-tts-450m-0.2-pt,out/kani-*" --file=lines.txt --out_dir=out/compared \\
            --speaker=anna --cap_seconds=0.02
        python weights.py export --ckpt=out/kani-4/best.pt --out_dir=hub/kani-anna
        python weights.py export --ckpt=out/kani-4/best.pt --out_dir=hub/kani-adapter --layout=peft
        python sample.py --ckpt=hub/kani-anna --codec_path=weights/kani-tts-450m-0.2-pt --text="one two" \\
            --speaker=anna --cap_seconds=0.02 --out_dir=out/exported
    """))  # fmt: skip
    for rank in (2, 4):
        heard(next((here / f"out/kani-{rank}/samples").rglob("*.wav")), 22050)
    page = read_page(here / "out/compared/index.html")
    names = ["kani-2", "kani-4", "kani-tts-450m-0.2-pt"]
    assert all(sorted(sentence["audio"]) == names for sentence in page["sentences"]) and page["sentences"]
    said = (here / "out/compared" / name / "000.wav" for name in names)
    assert len({path.read_bytes() for path in said}) == 3
    assert same_wavs(here / "out/exported", here / "out/compared/kani-4") == 1
    ours = from_pretrained(here / "out/kani-4/best.pt")
    lora.merge(ours)
    theirs, fast = AutoModelForCausalLM.from_pretrained(hub), AutoTokenizer.from_pretrained(hub)
    ids = fast("anna: one two", add_special_tokens=False).input_ids
    prompt = torch.from_numpy(ours.layout(np.array(ids))[0]).T
    made = theirs.generate(prompt, max_new_tokens=9)
    assert prompt.shape[1] < made.shape[1] <= prompt.shape[1] + 9
    with torch.no_grad():
        logits = theirs(prompt).logits[0, -1]
    first = next(ours.generate(np.array(ids), draw=GREEDY))
    assert first[0] == logits[64410 : 64410 + 4032].argmax()
    base = AutoModelForCausalLM.from_pretrained(here / "weights/kani-tts-450m-0.2-pt")
    merged = PeftModel.from_pretrained(base, here / "hub/kani-adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(prompt).logits[0, -1], logits, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# XTTS: Amharic recordings -> an adapter and a model -> the five files

AMHARIC = ["ሰላም ለዓለም", "እንደምን አደርክ", "ውሃ አለ", "ቤት ውስጥ ነኝ", "መልካም ቀን", "አመሰግናለሁ"]


def xtts_download(folder):
    """The five files of XTTS-v2 with positions for longer utterances than the golden ones."""
    folder.mkdir(parents=True)
    download(folder)
    content = torch.load(folder / "model.pth")
    for key in ("gpt.text_pos_embedding.emb.weight", "gpt.mel_pos_embedding.emb.weight"):
        content["model"][key] = 0.02 * torch.randn(120, content["model"][key].shape[1])
    content["model"]["gpt.mel_head.bias"][32:] = -1e4  # it does not stop at once
    content["model"]["mel_stats"] = torch.full((80,), 2.0)
    torch.save(content, folder / "model.pth")


def record(folder, texts, n, language):
    """n recordings of a voice that reads these texts, espeak-ng's or hums, and their metadata."""
    folder.mkdir()
    lines = []
    for i in range(n):
        text = texts[i % len(texts)]
        if shutil.which("espeak-ng"):
            command = ["espeak-ng", "-v", language, "-p", str(30 + i), "-w", str(folder / f"{i}.wav"), text]
            subprocess.run(command, check=True)
        else:
            soundfile.write(folder / f"{i}.wav", voice(1 + 0.02 * i, i, 22050).numpy(), 22050)
        lines.append(f"{i}.wav|{text}\n")
    (folder / "metadata.csv").write_text("audio|text\n" + "".join(lines), encoding="utf-8")


def test_xtts_learns_amharic(here):
    weights = here / "weights/xtts-v2"
    xtts_download(weights)
    record(here / "amharic", AMHARIC, 24, "am")
    record(here / "english", ["one two", "zero three"], 8, "en")
    (here / "lines.txt").write_text("ሰላም ለዓለም\nቤት አለ\n", encoding="utf-8")
    tiny = """--max_iters=2 --gradient_accumulation_steps=1 --eval_interval=2 --eval_samples=1 --epochs=0 \\
        --device=cpu --reference_seconds="[0.3, 0.6]" --backbone= --learning_rate=1e-3"""
    print(shell(here, f"""
        python prepare.py config/xtts_amharic.py --val_fraction=0.2 \\
            --sources="[{{'path': 'amharic', 'language': 'am'}}, {{'path': 'english', 'language': 'en'}}]"
        python train.py config/xtts_amharic.py {tiny} --freeze="[]"
        python train.py config/xtts_amharic.py {tiny} --lora_rank=4 --out_dir=out/xtts_lora
        python sample.py --ckpt="out/xtts_*" --language=am --file=lines.txt --reference=amharic/0.wav --cap_seconds=1 \\
            --out_dir=out/compared
        python sample.py --ckpt="out/xtts_*" --language=en --text="one two" --reference="amharic/0.wav,amharic/1.wav" \\
            --cap_seconds=1 --out_dir=out/old
        python weights.py export --ckpt=out/xtts_amharic/best.pt --out_dir=hub/xtts-am
        python weights.py export --ckpt=out/xtts_lora/best.pt --out_dir=hub/xtts-am-lora
        python sample.py --ckpt="hub/*" --language=am --file=lines.txt --reference=amharic/0.wav \\
            --cap_seconds=1 --out_dir=out/exported
    """))  # fmt: skip
    for run, hub in (("xtts_amharic", "xtts-am"), ("xtts_lora", "xtts-am-lora")):
        assert heard(here / f"out/old/{run}/000.wav", 24000) > 0.9
        assert same_wavs(here / f"out/compared/{run}", here / f"out/exported/{hub}", steps="lora" in hub) == 2
        assert sorted(path.name for path in (here / "hub" / hub).iterdir()) == FIVE
        for name in ("dvae.pth", "mel_stats.pth"):
            assert (here / "hub" / hub / name).read_bytes() == (weights / name).read_bytes()
        before, after = (json.loads((folder / "vocab.json").read_text()) for folder in (weights, here / "hub" / hub))
        assert before["model"]["vocab"].items() < after["model"]["vocab"].items()
        before, after = (torch.load(folder / "model.pth")["model"] for folder in (weights, here / "hub" / hub))
        assert before.keys() == after.keys()
        changed = {key for key, x in before.items() if not torch.equal(x, after[key])}
        assert changed and all(key.startswith("gpt.") for key in changed)
        if "lora" in hub:
            tables = {"gpt.text_embedding.weight", "gpt.text_head.weight", "gpt.text_head.bias"}
            assert all(torch.equal(after[key][:40], before[key]) for key in tables)
            assert all(".h." in key for key in changed - tables)


# ---------------------------------------------------------------------------------------------------------------------
# VALL-E: the author's download -> mode ar -> fp32.sft


def valle_download(folder):
    """The hub's folder of VALL-E, its weights deep inside, the tokenizer of phonemes and the codec."""
    place = folder / "models/ckpt/nemo-smaller-44khz-llama-8"
    place.mkdir(parents=True)
    said = {"experimental": {"audio_level_loss_factors": "auto"}, "size": {"heads": 4}, "version": 7}
    metadata = {"config": json.dumps(said), "stats": '{"global_step": 3}'}
    save_file(random_weights(published_table(32, 2, 64)), place / "fp32.sft", metadata)
    letters = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyzʌɪəɹθˈː", 4)}
    write_letters(folder / "tokenizer.json", letters, **{"<unk>": 0, "<bos>": 1, "</eos>": 2, " ": 3})
    tensors, _ = golden("nemo_audiocodec_44k")
    for key in [key for key in tensors if "fsqs.0" in key]:  # four times the two codebooks
        tensors |= {key.replace("fsqs.0", f"fsqs.{k}"): tensors[key].clone() for k in range(2, 8)}
    for key in [key for key in tensors if "encoder.post_conv" in key]:
        tensors[key] = torch.cat([tensors[key]] * 4)
    wide = "audio_decoder.pre_conv.conv.weight_v"
    tensors[wide] = torch.cat([tensors[wide]] * 4, 1)
    for i, stride in enumerate((16, 32)):  # 86 frames a second; the kernel of a stride is twice as wide
        for key in (f"audio_encoder.down_sample_conv_layers.{i}", f"audio_decoder.up_sample_conv_layers.{1 - i}"):
            x = tensors[f"{key}.conv.weight_v"]
            tensors[f"{key}.conv.weight_v"] = torch.randn(*x.shape[:2], 2 * stride)
    write_nemo(folder.parent / "audio-codec-44khz.nemo", tensors)
    return place / "fp32.sft"


def test_valle_goes_on_from_the_download(here):
    weights = valle_download(here / "weights/vall-e")
    (here / "my").mkdir()
    soundfile.write(here / "me.wav", voice(1, 99, 44100).numpy(), 44100)
    lines = ["audio|text|speaker"]
    for i in range(24):
        soundfile.write(here / f"my/{i}.wav", voice(0.5 + 0.01 * i, i, 44100).numpy(), 44100)
        lines.append(f"{i}.wav|{['wˈʌn tˈuː', 'θɹˈiː', 'sˈɪks'][i % 3]}|{'ab'[i % 2]}")
    (here / "my/metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    tiny = """--max_iters=2 --warmup_iters=0 --gradient_accumulation_steps=1 --eval_interval=2 --eval_samples=1 \\
        --dtype=float32 --device=cpu --backbone= --learning_rate=1e-3 --stretched_text=False"""
    published = "--codec_path=weights --tokenizer=weights/vall-e/tokenizer.json --front_end=none"
    print(shell(here, f"""
        python prepare.py config/valle_small.py --sources=my/metadata.csv --front_end=none \\
            --codec_path=weights --val_fraction=0.2 --min_seconds=0.3
        python train.py config/valle_small.py --init_from=weights/vall-e {tiny}
        python sample.py --ckpt=weights/vall-e,out/valle_small --text="wˈʌn" --reference=me.wav --cap_seconds=0.5 \\
            {published} --out_dir=out/compared
        python weights.py export --ckpt=out/valle_small/best.pt --out_dir=hub/valle
        python sample.py --ckpt=hub/valle --text="wˈʌn" --reference=me.wav --cap_seconds=0.5 {published} \\
            --out_dir=out/exported
    """))  # fmt: skip
    heard(here / "out/compared/vall-e/000.wav", 44100)
    assert same_wavs(here / "out/compared/valle_small", here / "out/exported") == 1
    before, after = load_file(weights), load_file(here / "hub/valle/fp32.sft")
    assert list(before) == list(after) and read_metadata(weights) == read_metadata(here / "hub/valle/fp32.sft")
    changed = {key.split(".")[0] for key, x in before.items() if not torch.equal(x, after[key])}
    assert {"model", "phn_emb", "audio_decoder"} <= changed
    assert not changed & {"text_emb", "tasks_emb", "tones_emb", "phn_decoder", "text_decoder"}
    same_state(here / "hub/valle", here / "out/valle_small/best.pt")

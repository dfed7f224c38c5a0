"""codec.py: the contract that all codecs keep, how much of speech survives `mel`, the command."""

import csv
import errno
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import ROOT, voice
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import codec as codec_file
from codec import Mel, kmeans, load_codec, quantise, squared_distances
from parts.audio import read_audio
from parts.ears import recognise, word_errors

LJSPEECH = Path(os.environ.get("PARLANDO_LJSPEECH", ROOT.parent / "shared" / "ljspeech24"))
SMALL = dict(n_codebooks=4, codebook_size=16)


def fit(seed=0, **options):
    codec = load_codec("mel", **{**SMALL, **options})
    return codec.fit((voice(3, i, codec.sample_rate) for i in range(4)), seed=seed)


@pytest.fixture(scope="module")
def codec():
    return fit()


# -----------------------------------------------------------------------------
# the contract


@pytest.mark.parametrize(
    "rate, asked, given, steps",
    [(16000, 12.5, 12.5, 8), (16000, 16, 16, 5), (16000, 20, 20, 5), (24000, 12.5, 12.5, 8), (22050, 12.5, 12.5, 9),
     (24000, 75, 75, 1), (16000, 30, 16000 / 534, 3), (44100, 86, 44100 / 513, 1)],
)  # fmt: skip
def test_shapes_and_rates(rate, asked, given, steps):
    codec = fit(sample_rate=rate, frame_rate=asked)
    assert (codec.name, codec.sample_rate, codec.n_codebooks, codec.codebook_size) == ("mel", rate, 4, 16)
    assert codec.frame_rate == pytest.approx(given) and codec.steps == steps
    size = codec.samples_per_frame
    assert size == rate / codec.frame_rate
    assert [codec.frames(n) for n in (1, size - 1, size, size + 1, 7 * size)] == [1, 1, 1, 2, 7]
    for n in (1, size, 3 * size + 1):
        codes = codec.encode(voice(1, 9, rate)[None, :n].expand(2, -1))
        assert codes.shape == (2, 4, codec.frames(n)) and codes.dtype == torch.int64
        assert codes.min() >= 0 and codes.max() < 16
        wav = codec.decode(codes)
        assert wav.shape == (2, codec.frames(n) * size) and wav.dtype == torch.float32
        assert wav.isfinite().all() and wav.abs().max() <= 1


def test_needs_no_gradient_and_no_parameters(codec):
    assert not list(codec.parameters())
    assert not codec.decode(codec.encode(voice(1)[None])).requires_grad


def test_fit_is_deterministic_by_seed(codec):
    assert fit().fingerprint() == codec.fingerprint()
    assert fit(seed=1).fingerprint() != codec.fingerprint()


def test_save_and_load(codec, tmp_path):
    codec.save(tmp_path / "new")
    assert os.listdir(tmp_path / "new") == ["codec.pt"]
    wav = voice(2, 7)[None]
    pack = torch.load(tmp_path / "new" / "codec.pt", weights_only=True)
    for path in (tmp_path / "new", str(tmp_path / "new" / "codec.pt"), codec.pack(), pack):
        other = load_codec("mel", path)
        assert other.fitted and other.fingerprint() == codec.fingerprint()
        assert torch.equal(other.encode(wav), codec.encode(wav))
        assert torch.equal(other.decode(codec.encode(wav)), codec.decode(codec.encode(wav)))
    assert load_codec("mel", codec.pack(), n_codebooks=4).n_codebooks == 4


def test_fingerprint_tells_tables_and_options_apart(codec):
    prints = {codec.fingerprint()}
    for name in ("mean", "analysis", "codebooks", "synthesis"):
        pack = codec.pack()
        pack["tables"][name].view(-1)[3] += 1e-6
        prints.add(load_codec("mel", pack).fingerprint())
    prints |= {load_codec("mel", **options).fingerprint() for options in ({}, {"sample_rate": 24000}, {"dims": 63})}
    assert len(prints) == 8
    assert all(len(p) == 16 and set(p) <= set("0123456789abcdef") for p in prints)
    assert load_codec("mel", frame_rate=20).fingerprint() == load_codec("mel", frame_rate=20.0).fingerprint()


def test_pack_is_a_copy(codec):
    before = codec.fingerprint()
    codec.pack()["tables"]["codebooks"].zero_()
    assert codec.fingerprint() == before


def test_codes_do_not_depend_on_batch_or_padding(codec):
    lengths = [1, 1279, 1280, 1281, 9000, 16000, 31999]
    alone = [codec.encode(voice(2, i)[None, :n])[0] for i, n in enumerate(lengths)]
    noise = torch.randn(len(lengths), 32000, generator=torch.Generator().manual_seed(0))
    batch = torch.stack([torch.cat([voice(2, i)[:n], noise[i, n:]]) for i, n in enumerate(lengths)])
    for given in (lengths, torch.tensor(lengths)):
        codes = codec.encode(batch, given)
        assert codes.shape == (7, 4, 25)
        for row, expected in zip(codes, alone, strict=True):
            assert torch.equal(row[:, : expected.shape[1]], expected)
    assert not torch.equal(codec.encode(batch)[2, :, :1], alone[2])  # without lengths, the noise changes codes


def test_long_recordings_are_encoded_in_stretches(codec):
    wav = voice(60, 5)[None]
    codes = codec.encode(wav)  # 750 frames, two stretches
    assert torch.equal(codec.encode(wav.expand(90, -1)[:, :60000])[0, :, :45], codes[0, :, :45])  # 5 frames a stretch
    assert len(list(codec.bands(wav))) == 2 and len(list(codec.bands(wav.expand(90, -1)[:, :60000]))) == 10


class Largest(TorchDispatchMode):
    """The size in bytes of the largest tensor that any operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.nbytes = max([self.nbytes, *(x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def test_long_recordings_take_little_memory(codec):
    """Float64 is used stretch by stretch: with twenty minutes, no tensor is larger than the recording itself."""
    wav = torch.rand(1, 20 * 60 * 16000) - 0.5
    with Largest() as largest:
        codec.encode(wav)
    assert largest.nbytes < 1.1 * wav.nbytes


def test_each_codebook_adds_to_those_before(codec):
    bands = torch.cat(list(codec.bands(voice(6, 11)[None])), 1)
    x = (bands.reshape(-1, len(codec.mean)) - codec.mean) @ codec.analysis.double()
    codes, rest = quantise(x, codec.codebooks.to(x)), [x.square().mean().item()]
    for k in range(4):
        x = x - codec.codebooks[k, codes[:, k]]
        rest.append(x.square().mean().item())
    gains = -np.diff(rest)
    assert (gains > 0).all() and gains[0] > 2 * gains[1:].max()


def test_fewer_patches_than_entries():
    codec = load_codec("mel", n_codebooks=3, codebook_size=256).fit([voice(0.3)])
    wav = torch.stack([torch.zeros(4800), voice(0.3), 1e-4 * voice(0.3)])
    codes = codec.encode(wav)
    assert all(torch.equal(codes[i : i + 1], codec.encode(wav[i : i + 1])) for i in range(3))
    assert codec.decode(codes).isfinite().all()


def test_loudness_is_kept():
    wav = voice(3, 0)
    codec = load_codec("mel", **SMALL).fit([wav, 0.05 * wav])
    for gain in (1.0, 0.05):
        out = codec.decode(codec.encode(gain * wav[None]))
        assert 0.7 < out.std() / (gain * wav).std() < 1.3


def test_kmeans_finds_clusters_and_fills_every_entry():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 5, generator=generator) * 10
    x = (centres + 0.01 * torch.randn(100, 8, 5, generator=generator)).flatten(0, 1)
    codebook = kmeans(x, 32, generator)
    assert (x - codebook[squared_distances(x, codebook).argmin(1)]).square().sum(1).max() < 0.01
    assert len(squared_distances(x, codebook).argmin(1).unique()) > 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(codec):
    on_gpu = load_codec("mel", codec.pack()).cuda()
    wav = voice(2, 7)[None]
    codes = on_gpu.encode(wav.cuda())
    assert codes.is_cuda and torch.equal(codes.cpu(), codec.encode(wav))
    assert on_gpu.decode(codes).std().cpu() == pytest.approx(codec.decode(codes.cpu()).std().item(), rel=0.05)
    assert on_gpu.fit(voice(3, i) for i in range(4)).mean.is_cuda


@pytest.mark.parametrize(
    "options, says",
    [(dict(n_codebooks=0), "n_codebooks"), (dict(codebook_size=70000), "codebook_size"), (dict(n_mels=2.5), "n_mels"),
     (dict(frame_rate=0), "frame_rate"), (dict(frame_rate=math.nan), "frame_rate"), (dict(codebooks=8), "codebooks")],
)  # fmt: skip
def test_wrong_options(options, says):
    with pytest.raises(ValueError, match=says):
        load_codec("mel", **options)


def test_wrong_tables(codec, tmp_path):
    def refused(says, path, error=ValueError, name="mel", **options):
        with pytest.raises(error, match=says) as info:
            load_codec(name, path, **options)
        assert "\n" not in str(info.value)

    refused("no codec is called 'mle'.* mel", None, name="mle")
    refused("nowhere.pt: no such", tmp_path / "nowhere.pt", FileNotFoundError)
    refused("codec.pt: no such", tmp_path, FileNotFoundError)
    (tmp_path / "codec.pt").write_bytes(b"not a table")
    refused("codec.pt: not a codec table", tmp_path)
    torch.save({"model": {}}, tmp_path / "codec.pt")
    refused("codec.pt is damaged: name is missing", tmp_path)
    codec.save(tmp_path)
    refused("made with n_codebooks = 4, not 5", tmp_path, n_codebooks=5)
    refused("has no option 'books'", tmp_path, books=5)
    (tmp_path / "codec.pt").write_bytes((tmp_path / "codec.pt").read_bytes()[:5000])
    refused("codec.pt: not a codec table", tmp_path)
    refused("holds the tables of 'dac'", {**codec.pack(), "name": "dac"})
    refused(r"tables of mel: mean has shape \(3,\), not", {**codec.pack(), "tables": {"mean": torch.zeros(3)}})


def test_unfitted_codec_says_so():
    with pytest.raises(ValueError, match="fit it"):
        load_codec("mel").encode(voice(1)[None])
    with pytest.raises(ValueError, match="fit it"):
        load_codec("mel").decode(torch.zeros(1, 8, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="no recordings"):
        load_codec("mel").fit([])


@pytest.mark.parametrize("shape", [(0,), (100,), (1, 0), (1, 2, 100)])
def test_encode_refuses_other_shapes(codec, shape):
    with pytest.raises(ValueError, match=r"\(B, N\)"):
        codec.encode(torch.zeros(shape))


# -----------------------------------------------------------------------------
# how much of speech survives


def test_digits_keep_their_words(tmp_path):
    """At the default 12.5 frames/s, the codec adds at most 4 points to the word error rate of the recordings."""
    subprocess.run([sys.executable, ROOT / "data/digits/prepare.py", "--n=240", f"--folder={tmp_path}"], check=True,
                   capture_output=True)  # fmt: skip
    with open(tmp_path / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    held_out = set((tmp_path / "heldout.txt").read_text().split())
    is_held_out = [Path(row["audio"]).stem in held_out for row in rows]
    held_out_rows = [row for row, held in zip(rows, is_held_out, strict=True) if held][::3]
    codec = load_codec("mel")
    assert codec.frame_rate <= 20 and codec.n_codebooks == 8 and codec.codebook_size == 256
    training = [row for row, held in zip(rows, is_held_out, strict=True) if not held]
    codec.fit(read_audio(tmp_path / row["audio"], 16000) for row in training)
    words = before = after = 0
    for row in held_out_rows:
        wav = read_audio(tmp_path / row["audio"], 16000)
        words += len(row["text"].split())
        before += word_errors(row["text"], recognise(wav, 16000))
        after += word_errors(row["text"], recognise(codec.decode(codec.encode(wav[None]))[0], 16000))
    assert words > 150
    assert before / words <= 0.03
    assert after / words <= before / words + 0.04


def test_speech_stays_intelligible():
    """At 1280 bit/s, the STOI of new recordings is at least 0.85 (measured: 0.88)."""
    if not LJSPEECH.is_dir():
        pytest.skip(f"{LJSPEECH} does not exist; PARLANDO_LJSPEECH may name another folder")
    from pystoi import stoi

    with open(LJSPEECH / "metadata.csv", encoding="utf-8") as file:
        names = [line.split("|")[0] for line in file]
    wavs = [read_audio(LJSPEECH / "wavs" / f"{name}.flac", 24000) for name in names]
    codec = load_codec("mel", sample_rate=24000, frame_rate=20).fit(wavs[:16])
    scores = []
    for wav in wavs[16:]:
        out = codec.decode(codec.encode(wav[None]))[0, : len(wav)]
        scores.append(stoi(wav.numpy(), out.numpy(), 24000))
    assert len(scores) == 8 and np.mean(scores) >= 0.85


# -----------------------------------------------------------------------------
# files


def test_a_full_disk_names_the_file(codec, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        codec.save(tmp_path)
    assert error.value.filename == str(tmp_path / "codec.pt") and os.listdir(tmp_path) == []


# -----------------------------------------------------------------------------
# the command


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs codec.py with arguments and returns what it prints."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["codec.py", *map(str, args)])
        codec_file.main()
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


def test_command_round_trip(codec, run, tmp_path):
    soundfile.write(tmp_path / "in.flac", voice(1.5, rate=22050).numpy(), 22050)
    codec.save(tmp_path)
    printed = run(tmp_path / "in.flac", tmp_path / "out.wav", "--codec=mel", f"--codec_path={tmp_path}")
    assert printed == "mel: 19 frames of 4 codes, 12.5 frames/s, 200 bit/s\n"
    wav = read_audio(tmp_path / "in.flac", 16000)
    out = read_audio(tmp_path / "out.wav", 16000)
    expected = codec.decode(codec.encode(wav[None]))[0, : len(wav)]
    assert len(out) == len(wav) and torch.allclose(out, expected, atol=1e-3)


def test_command_fits_mel_on_its_input(run, tmp_path):
    soundfile.write(tmp_path / "in.wav", voice(1.5).numpy(), 16000)
    args = "--codec_args", '{"frame_rate": 20, "codebook_size": 32}'
    printed = run(tmp_path / "in.wav", tmp_path / "out.wav", *args)
    assert "fitting mel on" in printed and "30 frames of 8 codes, 20 frames/s, 800 bit/s" in printed
    assert len(read_audio(tmp_path / "out.wav", 16000)) == 24000


@pytest.mark.parametrize(
    "args, says",
    [(["no.wav", "out.wav"], "no.wav: no such audio file"), (["in.wav", "out.wav", "--codec=mle"], "'mle'"),
     (["in.wav"], "output"), (["in.wav", "no/out.wav"], "no/out.wav"),
     (["in.wav", "out.wav", "--codec_path=no.pt"], "no.pt"), (["in.wav", "out.wav", "--codec_args=[3]"], "codec_args"),
     (["in.wav", "out.wav", '--codec_args={"books": 3}'], "'books'"), (["in.wav", "out.wav", "--bits=3"], "--bits=3")],
)  # fmt: skip
def test_command_errors(tmp_path, monkeypatch, args, says):
    soundfile.write(tmp_path / "in.wav", voice(0.5).numpy(), 16000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["codec.py", *args])
    with pytest.raises(SystemExit) as stop:  # Python prints its text to stderr and ends with 1
        runpy.run_path(str(ROOT / "codec.py"), run_name="__main__")
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code and says in stop.value.code
    assert os.listdir(tmp_path) == ["in.wav"]


def test_command_leaves_with_one_line(tmp_path):
    command = [sys.executable, ROOT / "codec.py", tmp_path / "no.wav", tmp_path / "out.wav"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path / 'no.wav'}: no such audio file\n"


def test_mel_is_a_codec_without_weights():
    assert not load_codec("mel").fitted and isinstance(load_codec("mel"), Mel)

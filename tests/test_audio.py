"""parts/audio.py: reading, writing and resampling."""

import errno
import io
import math
import os

import numpy as np
import pytest
import soundfile
import torch
from helpers import voice
from scipy.signal import resample_poly

from parts import audio
from parts.audio import clipped_share, longest_silence, read_audio, resample, write_audio

# -----------------------------------------------------------------------------
# resampling

RATES = [(44100, 16000), (22050, 24000), (48000, 16000), (8000, 24000), (16000, 22050)]


def noise(rate, low, high, seconds=2):
    """White noise between two frequencies."""
    n = rate * seconds
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(n))
    hz = np.fft.rfftfreq(n, 1 / rate)
    spectrum[(hz < low) | (hz > high)] = 0
    return np.fft.irfft(spectrum, n)


def decibels(x, reference):
    middle = slice(len(x) // 8, -len(x) // 8)  # band-limited noise in a loop has no clean ends
    return 10 * np.log10(np.square(x[middle]).mean() / np.square(reference).mean())


@pytest.mark.parametrize("rates", RATES)
def test_resample_equals_scipys_polyphase_in_band(rates):
    a, b = rates
    up, down = b // math.gcd(a, b), a // math.gcd(a, b)
    x = noise(a, 0, 0.5 * min(rates) / 2)
    y = resample(torch.tensor(x, dtype=torch.float32), a, b).numpy()
    assert decibels(y - resample_poly(x, up, down), x) < -60  # as good as the ripple of scipy's filter allows
    assert decibels(y - resample_poly(x, up, down, window=("kaiser", 12.0)), x) < -95


@pytest.mark.parametrize("rates", RATES)
def test_resample_is_flat_up_to_nine_tenths_of_the_band(rates):
    a, b = rates
    x = noise(a, 0.4 * min(rates), 0.9 * min(rates) / 2)
    y = resample(torch.tensor(x, dtype=torch.float32), a, b)
    again = resample(y, b, a)[: len(x)].numpy()
    assert decibels(again - x, x) < -80


def test_resample_keeps_aliases_out():
    x = noise(48000, 8400, 24000)
    assert decibels(resample(torch.tensor(x, dtype=torch.float32), 48000, 16000).numpy(), x) < -80


def test_resample_between_rates_with_little_in_common():
    t = torch.arange(44101, dtype=torch.float64)
    y = resample((2 * math.pi * 1000 * t / 44101).sin().float(), 44101, 16007)
    expected = (2 * math.pi * 1000 * torch.arange(len(y), dtype=torch.float64) / 16007).sin()
    assert len(y) == 16007
    assert (y - expected)[500:-500].abs().max() < 1e-4


def test_resample_shapes():
    x = torch.randn(2, 3, 1000)
    assert resample(x, 16000, 16000) is x
    y = resample(x, 44100, 16000)
    assert y.shape == (2, 3, 363) and torch.allclose(y[1, 2], resample(x[1, 2], 44100, 16000), atol=1e-6)
    for n in (1, 2, 159, 160, 161, 441, 442):
        assert resample(torch.ones(n), 44100, 16000).shape == (-(-n * 160 // 441),)
        assert resample(torch.ones(n), 16000, 44100).shape == (-(-n * 441 // 160),)
    assert resample(torch.zeros(0), 44100, 16000).shape == (0,)
    assert resample(x.double(), 44100, 16000).dtype == torch.float64


# -----------------------------------------------------------------------------
# files


@pytest.mark.parametrize("ending, tolerance", [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.1), ("mp3", 0.1)])
def test_read_audio_formats(tmp_path, ending, tolerance):
    wav = voice(1, rate=44100)
    path = tmp_path / f"x.{ending}"
    soundfile.write(path, wav.numpy(), 44100)
    for rate in (44100, 16000):
        read, expected = read_audio(path, rate), resample(wav, 44100, rate)
        assert read.dtype == torch.float32 and abs(len(read) - len(expected)) <= 0.06 * rate * (ending == "mp3")
        n = min(len(read), len(expected))
        assert (read - expected[:n])[:n].std() < tolerance * expected.std() + 1e-5


def test_read_audio_mixes_down_and_cuts(tmp_path):
    path = tmp_path / "stereo.wav"
    left, right = voice(2, 1).numpy(), voice(2, 2).numpy()
    soundfile.write(path, np.stack([left, right], 1), 16000, subtype="FLOAT")
    mono = torch.tensor((left + right) / 2)
    assert torch.allclose(read_audio(path, 16000), mono)
    assert torch.allclose(read_audio(path, 16000, 0.5, 1.25), mono[8000:20000])
    assert torch.allclose(read_audio(path, 16000, start=1.5), mono[24000:])
    assert torch.allclose(read_audio(path, 16000, end=99), mono)
    assert torch.allclose(read_audio(path, 8000, 0.5, 1.25), resample(mono[8000:20000], 16000, 8000), atol=1e-6)


def test_read_audio_errors(tmp_path):
    def refused(says, path, *span, error=ValueError):
        with pytest.raises(error, match=says) as info:
            read_audio(path, 16000, *span)
        assert str(path) in str(info.value) and "\n" not in str(info.value)

    wav = voice(1).numpy()
    soundfile.write(tmp_path / "good.wav", wav, 16000)
    soundfile.write(tmp_path / "empty.wav", wav[:0], 16000)
    for name, bad in (("nan.wav", np.nan), ("inf.wav", np.inf)):
        soundfile.write(tmp_path / name, np.append(wav, bad), 16000, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("this is\nno audio")
    (tmp_path / "nothing.flac").write_bytes(b"")
    refused("no such audio file", tmp_path / "missing.wav", error=FileNotFoundError)
    refused("no such audio file", tmp_path, error=FileNotFoundError)
    refused("not readable", tmp_path / "text.wav")
    refused("not readable", tmp_path / "nothing.flac")
    refused("empty", tmp_path / "empty.wav")
    refused("NaN", tmp_path / "nan.wav")
    refused("NaN", tmp_path / "inf.wav")
    refused("nothing from 2 to None s in a recording of 1.00 s", tmp_path / "good.wav", 2)
    refused("nothing from 0.5 to 0.5 s", tmp_path / "good.wav", 0.5, 0.5)
    refused("nothing from -1 to 1 s", tmp_path / "good.wav", -1, 1)


KINDS = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("W64", "PCM_16"),
         ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"),
         ("MP3", "MPEG_LAYER_III")]  # fmt: skip


@pytest.mark.parametrize("kind, subtype", KINDS)
@pytest.mark.parametrize("held", [False, True])
def test_a_file_that_breaks_off(kind, subtype, held, tmp_path):
    """A header that promises more than the file holds is refused; cuts before the break can still be read."""
    wav = 0.5 * voice(3).numpy()
    soundfile.write(whole := io.BytesIO(), wav, 16000, format=kind, subtype=subtype)

    def source(n):
        if held:
            return io.BytesIO(whole.getvalue()[:n])
        (tmp_path / "x").write_bytes(whole.getvalue()[:n])
        return tmp_path / "x"

    assert len(read_audio(source(None), 16000)) == len(wav)
    size = len(whole.getvalue())
    for part in (0.5, 0.8):
        with pytest.raises(ValueError, match="breaks off (.*before its end|at once)|not readable as audio .*lost sync"):
            read_audio(source(int(part * size)), 16000)
    if kind not in ("FLAC", "OGG"):
        assert torch.equal(read_audio(source(int(0.8 * size)), 16000, 0.5, 1.5),
                           read_audio(source(None), 16000, 0.5, 1.5))  # fmt: skip


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF - 36])
def test_unknown_sizes_of_files_that_came_through_a_pipe(size, tmp_path):
    wav = voice(1).numpy()
    soundfile.write(tmp_path / "x.wav", wav, 16000)
    content = bytearray((tmp_path / "x.wav").read_bytes())
    content[40:44] = size.to_bytes(4, "little")
    content[4:8] = min(size + 36, 0xFFFFFFFF).to_bytes(4, "little")
    (tmp_path / "x.wav").write_bytes(content)
    assert len(read_audio(tmp_path / "x.wav", 16000)) == len(wav)


def test_headers_that_promise_too_much_are_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "x.wav"
    soundfile.write(path, voice(2).numpy(), 16000)
    monkeypatch.setattr(audio, "read_frames", None)
    with pytest.raises(ValueError, match="x.wav: 2 s long, longer than the limit of 1.5 s"):
        read_audio(path, 16000, max_seconds=1.5)
    content = bytearray(path.read_bytes())
    content[24:28] = (655_351).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.wav: a sample rate of 655,351 Hz"):
        read_audio(path, 16000)


def test_cuts_of_a_long_mp3(tmp_path, monkeypatch):
    """Cuts equal those of the whole file, are the same bit for bit in any order, and share a few openings."""
    path, opened = tmp_path / "x.mp3", []
    wav = np.tile(voice(10).numpy(), 65)  # 650 s
    with soundfile.SoundFile(path, "w", 16000, 1) as file:
        for part in np.split(wav, 65):
            file.write(part)
    everything = read_audio(path, 16000)
    open_audio = audio.open_audio
    monkeypatch.setattr(audio, "open_audio", lambda source: opened.append(source) or open_audio(source))
    cuts = [(t, t + 7.5) for t in np.arange(0.25, 640, 8)] + [(299.0, 601.0), (648.0, None)]
    read = [read_audio(path, 16000, *cut) for cut in cuts]
    assert len(opened) <= 3  # pieces; the header is remembered
    for (start, end), one in zip(cuts, read, strict=True):
        part = everything[round(start * 16000) : None if end is None else round(end * 16000)]
        torch.testing.assert_close(one, part, rtol=0, atol=1e-6)
    audio._mp3_piece.cache_clear()
    assert all(map(torch.equal, reversed(read), [read_audio(path, 16000, *cut) for cut in reversed(cuts)]))


def test_odd_rates_keep_no_memory():
    """One matrix at a time is in memory: all of them together would take more than 500 MB."""
    audio.sinc_filter.cache_clear()
    x = torch.randn(30_000)
    assert resample(x, 383_983, 16_000).shape == (-(-30_000 * 16_000 // 383_983),)
    assert audio.sinc_filter.cache_info().currsize <= 6  # one for each block of outputs


def test_write_audio(tmp_path):
    wav = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0])
    write_audio(tmp_path / "x.wav", wav, 22050)
    assert os.listdir(tmp_path) == ["x.wav"]
    info = soundfile.info(tmp_path / "x.wav")
    assert (info.samplerate, info.channels, info.subtype, info.frames) == (22050, 1, "PCM_16", 7)
    assert torch.allclose(read_audio(tmp_path / "x.wav", 22050), wav.clamp(-1, 1), atol=1e-4)
    write_audio(str(tmp_path / "x.wav"), wav[:3], 16000)
    assert len(read_audio(tmp_path / "x.wav", 16000)) == 3
    with pytest.raises(OSError):
        write_audio(tmp_path / "nowhere" / "x.wav", wav, 16000)


def test_decoders_print_nothing(capfd):
    with audio.silent_stderr():
        os.write(2, b"from below Python")
    os.write(2, b"afterwards")
    assert capfd.readouterr().err == "afterwards"


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_audio(tmp_path / "x.wav", torch.zeros(9), 16000)
    assert error.value.filename == str(tmp_path / "x.wav") and os.listdir(tmp_path) == []


# -----------------------------------------------------------------------------
# loudness


def test_longest_silence():
    speech = voice(2.0)[: 2 * 16000]
    wav = torch.cat([torch.zeros(8000), speech, torch.zeros(24000), speech, torch.zeros(16000)])
    inner = longest_silence(speech, 16000)
    assert inner < 0.5
    assert longest_silence(wav, 16000) == pytest.approx(1.5, abs=inner)
    assert longest_silence(wav.numpy()[:40000], 16000) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("level", [0.5, 0.001])
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_silence_is_relative_to_the_recording(level, noise):
    tone = torch.sin(torch.arange(16000) * 0.1)
    wav = level * (torch.cat([tone, torch.zeros(32000), tone]) + noise * torch.randn(64000))
    assert longest_silence(wav, 16000) == pytest.approx(2, abs=0.04)


def test_a_click_does_not_change_what_is_silent():
    wav = torch.sin(torch.arange(48000) * 0.1)
    wav[16000:32000] *= 0.05
    wav[40000:40100] = 30.0
    assert longest_silence(wav, 16000) == 0


def test_one_word_in_much_silence():
    wav = torch.zeros(30 * 16000)
    wav[16000:24000] = torch.sin(torch.arange(8000) * 0.1)
    assert longest_silence(wav, 16000) == pytest.approx(28.5, abs=0.04)


@pytest.mark.parametrize("value", [0.0, 0.3, -1.0])
@pytest.mark.parametrize("n", [0, 1, 100, 48000])
def test_a_constant_is_all_silence(value, n):
    assert longest_silence(torch.full((n,), value), 16000) == n / 16000


def test_clipped_share():
    assert clipped_share(torch.tensor([0.0, 0.5, 1.0, -0.995])) == 0.5
    assert clipped_share(torch.zeros(0)) == 0.0

"""codec.py: the published codecs against transformers and golden vectors; pieces, streams, batches and weights."""

import copy
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from helpers import noise, read_page, voice
from safetensors.torch import load_file, save_file
from ties import check_same, ties

import bench
import codec as codecs
from codec import (
    CODECS,
    FSQ,
    PUBLISHED,
    NeuralCodec,
    StreamState,
    load_codec,
    published_sizes,
    squared_distances,
)
from parts.audio import read_audio, resample
from voice import Voice

NAMES = PUBLISHED


def golden(name):
    return load_file(Path(__file__).parent / "golden" / f"{name}.safetensors")


def weights(tensors, prefix=""):
    return {prefix + name[8:]: x for name, x in tensors.items() if name.startswith("weights.")}


def scramble(model, latents, seed=0, encoder_bias=0.1):
    """Give random numbers to weights that are zeros, ones or tiny at first, so that every weight matters.

    Codebooks get about the spread of the latents that they code, `latents(model)` (n, D), or of the rest of these.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("scale", "alpha", "norm.weight", "cluster_usage")):
                x.uniform_(0.5, 1.5, generator=generator)
            elif "bias" in name:
                limit = encoder_bias if name.startswith("encoder") else 0.1
                x.uniform_(-limit, limit, generator=generator)
            elif "_proj" in name or ".fc" in name:
                x.uniform_(-2 / x.shape[1] ** 0.5, 2 / x.shape[1] ** 0.5, generator=generator)
        rest = latents(model)
        for name, x in [*model.named_buffers(), *model.named_parameters()]:
            if name.endswith(("embed_sum", "embed", "codebook.weight")):
                drawn = rest[torch.randint(len(rest), (len(x),), generator=generator)]
                x.copy_(drawn + rest.std(0) * torch.randn(x.shape, generator=generator))
                rest = rest - x[squared_distances(rest, x).argmin(1)]
    return model.eval()


def mimi(folder, **sizes):
    """transformers' Mimi with random weights, saved in a folder as the published one is."""
    torch.manual_seed(0)
    model = transformers.MimiModel(transformers.MimiConfig(**sizes))

    def latents(model):
        x = model.encoder(0.1 * noise(1, 1, 96000)).latents
        return model.quantizer.acoustic_residual_vector_quantizer.input_proj(x)[0].T

    scramble(model, latents)
    for x in model.decoder.decoder_seanet.layers[-1].parameters():
        x.data *= 0.02  # waveforms about as loud as speech
    model.save_pretrained(folder)
    return model


def encodec(folder, **sizes):
    torch.manual_seed(0)
    model = transformers.EncodecModel(transformers.EncodecConfig(**sizes))
    small = 0.001  # larger ones drown the signal in the latents, so that all entries are almost equally near
    scramble(model, lambda x: x.encoder(0.1 * noise(1, 1, 24000))[0].T, encoder_bias=small).save_pretrained(folder)
    return model


def dac(folder, **sizes):
    torch.manual_seed(0)
    model = transformers.DacModel(transformers.DacConfig(**sizes))
    scramble(model, lambda model: model.quantizer.quantizers[0].in_proj(model.encoder(0.1 * noise(1, 1, 20480)))[0].T)
    model.save_pretrained(folder)
    return model


def nemo(path, tensors, name="./model_weights.ckpt"):
    """Write an archive as NeMo does, with a discriminator that the codec does not need."""
    torch.save({**weights(tensors), "discriminator.conv.weight": torch.zeros(3)}, packed := io.BytesIO())
    with tarfile.open(path, "w:gz") as archive:
        for member, content in (("./model_config.yaml", b"sample_rate: 1"), (name, packed.getvalue())):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def xtts(folder):
    """Write the files of XTTS-v2, with tensors that the codec does not need."""
    dvae, vocoder, speaker = (golden(f"xtts_{part}") for part in ("dvae", "hifigan", "speaker_encoder"))
    stats = golden("xtts_mels")["in.mel_norms"]
    torch.save({**weights(dvae), "discrete_loss.accumulated": torch.zeros(2)}, folder / "dvae.pth")
    torch.save(stats, folder / "mel_stats.pth")
    model = {"gpt.mel_head.bias": torch.zeros(3), "mel_stats": stats,
             **weights(vocoder, "hifigan_decoder.waveform_decoder."),
             **weights(speaker, "hifigan_decoder.speaker_encoder."),
             "hifigan_decoder.speaker_encoder.bn1.num_batches_tracked": torch.tensor(1)}  # fmt: skip
    torch.save({"model": model, "step": 1}, folder / "model.pth")


TINY = {
    "mimi": dict(hidden_size=128, num_filters=4, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                 intermediate_size=512, codebook_size=64, codebook_dim=16, upsample_groups=128, num_quantizers=4,
                 vector_quantization_hidden_dimension=16),
    "encodec": dict(num_filters=4, hidden_size=16, codebook_dim=16, codebook_size=64),
    "dac": dict(encoder_hidden_size=4, decoder_hidden_size=32, n_codebooks=3, codebook_size=64, sampling_rate=24000,
                downsampling_ratios=[2, 4, 5, 8]),
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{codec: the folder with its weights, in small sizes}."""
    folders = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for make in (mimi, encodec, dac):
        make(folders[make.__name__], **TINY[make.__name__])
    nemo(folders["nanocodec"] / "nano.nemo", golden("nemo_nanocodec"))
    nemo(folders["audiocodec44k"] / "audio.nemo", golden("nemo_audiocodec_44k"))
    xtts(folders["xtts"])
    return folders


@pytest.fixture(scope="module")
def loaded(published):
    return {name: load_codec(name, folder) for name, folder in published.items()}


@pytest.fixture(params=NAMES)
def codec(request, loaded):
    return loaded[request.param]


# -----------------------------------------------------------------------------
# equal to transformers


def check_parity(codec, n, encode, decode, least):
    """Check that both give the same codes for n samples, at least `least` different ones, and the same waveform."""
    wav = 0.1 * noise(1, n)
    codes = codec.encode(wav)
    assert codes.shape == (1, codec.n_codebooks, codec.frames(n)) and len(codes.unique()) >= least
    check_same(codec, wav, codes, encode(wav[:, None]))
    out, expected = codec.decode(codes), decode(codes)
    assert out.shape == (1, codec.frames(n) * codec.samples_per_frame) and expected.std() > 0.001
    assert (out[:, : expected.shape[1]] - expected).abs().max() < 1e-4
    return codes


def test_only_ties_may_differ(published):
    """An entry that stands in a codebook twice ties with itself. Other differences are faults, and so are many ties."""
    codec, wav = load_codec("encodec", published["encodec"]), speech(9600)[None]
    codes = codec.encode(wav)
    assert codes.shape == (1, 8, 30) and not ties(codec, wav).any()
    for k in (0, 2):
        changed = codes.clone()
        changed[0, k:, 5] = (codes[0, k:, 5] + 1) % 64
        with pytest.raises(AssertionError, match=rf"differ where nothing ties, at \[\[0, {k}, 5\]\]"):
            check_same(codec, wav, changed, codes)
    entry, unused = codes[0, 2, 5], codes[0, 2].bincount(minlength=64).argmin()
    codec.quantizer.codebooks[2, unused] = codec.quantizer.codebooks[2, entry]
    at = codes[0, 2] == entry
    assert torch.equal(ties(codec, wav)[0, 2], at) and at.sum() <= 3
    changed = codes.clone()
    changed[0, 2, at] = unused
    changed[0, 3:, at] = (codes[0, 3:, at] + 1) % 64  # later codebooks code another rest after a tie
    check_same(codec, wav, changed, codes)
    codec.quantizer.codebooks[2, 32:] = codec.quantizer.codebooks[2, :32]
    with pytest.raises(AssertionError, match="of 240 codes tie"):
        check_same(codec, wav, codec.encode(wav), codec.encode(wav))


def usual_options(name):
    with torch.device("meta"):
        return json.dumps(CODECS[name]().options)


FULL = pytest.param(True, id="full", marks=pytest.mark.slow)
full_or_tiny = pytest.mark.parametrize("full", [pytest.param(False, id="tiny"), FULL])


@full_or_tiny
@torch.no_grad()
def test_mimi_equals_transformers(tmp_path, full):
    model = mimi(tmp_path, **({} if full else TINY["mimi"]))
    calls = (lambda wav: model.encode(wav).audio_codes), (lambda codes: model.decode(codes).audio_values[:, 0])
    codec = load_codec("mimi", tmp_path)
    assert (usual_options("mimi") == json.dumps(codec.options)) == full
    least, n = (150, 8) if full else (10, 3)
    check_parity(codec, 19200, *calls, least)
    codes = check_parity(codec, 13000, *calls, least)  # the last frame is part silence
    fewer = load_codec("mimi", tmp_path, n_codebooks=n)
    assert torch.equal(fewer.encode(0.1 * noise(1, 13000)), codes[:, :n])
    assert (fewer.decode(codes[:, :n]) - calls[1](codes[:, :n])).abs().max() < 1e-4
    assert torch.equal(codec.decode(codes[:, :n]), fewer.decode(codes[:, :n]))


@full_or_tiny
@torch.no_grad()
def test_encodec_equals_transformers(tmp_path, full):
    model = encodec(tmp_path, **({} if full else {**TINY["encodec"], "codebook_size": 1024}))  # bandwidths mean bits
    calls = (lambda wav: model.encode(wav, bandwidth=6.0).audio_codes[0],
             lambda codes: model.decode(codes[None], [None]).audio_values[:, 0])  # fmt: skip
    codec = load_codec("encodec", tmp_path)
    assert (usual_options("encodec") == json.dumps(codec.options)) == full
    for n in (32000, 20011, 1000):  # the last is shorter than its reflected padding
        check_parity(codec, n, *calls, least=10)
    if full:  # with few channels, 32 codebooks leave only rounding errors
        everything, wav = load_codec("encodec", tmp_path, n_codebooks=32), 0.1 * noise(1, 9600)
        check_same(everything, wav, everything.encode(wav), model.encode(wav[:, None], bandwidth=24.0).audio_codes[0])
    with pytest.raises(ValueError, match="n_codebooks = 33, but the weights have 32"):
        load_codec("encodec", tmp_path, n_codebooks=33)


@full_or_tiny
@pytest.mark.parametrize("rate, books, strides", [(44100, 9, (2, 4, 8, 8)), (24000, 32, (2, 4, 5, 8))])
@torch.no_grad()
def test_dac_equals_transformers(tmp_path, rate, books, strides, full):
    sizes = dict(sampling_rate=rate, n_codebooks=books, downsampling_ratios=list(strides))
    model = dac(tmp_path, **({} if full else TINY["dac"]) | sizes)
    codec = load_codec("dac", tmp_path)
    with pytest.raises(ValueError, match=f"has sample_rate = {rate}, not 16000"):
        load_codec("dac", tmp_path, sample_rate=16000)
    assert (codec.sample_rate, codec.frame_rate) == (rate, rate / np.prod(strides))
    assert (usual_options("dac") == json.dumps(codec.options)) == (full and rate == 44100)

    def encode(wav):
        return model.encode(torch.nn.functional.pad(wav, (0, -wav.shape[2] % codec.samples_per_frame))).audio_codes

    check_parity(codec, 3000, encode, lambda codes: model.decode(audio_codes=codes).audio_values,
                 least=15 if full else 8)  # fmt: skip


def test_published_sizes():
    keys = ("sample_rate", "frame_rate", "n_codebooks", "codebook_size")
    assert {name: tuple(published_sizes(name)[key] for key in keys) for name in PUBLISHED} == {
        "mimi": (24000, 12.5, 32, 2048), "encodec": (24000, 75.0, 8, 1024), "dac": (44100, 44100 / 512, 9, 1024),
        "nanocodec": (22050, 12.5, 4, 4032), "audiocodec44k": (44100, 44100 / 512, 8, 1000),
        "xtts": (22050, 22050 / 1024, 1, 1024),
    }  # fmt: skip
    assert [name for name in PUBLISHED if "reference" in published_sizes(name)] == ["xtts"]
    assert published_sizes("xtts")["reference"] == {"rows_per_frame": 4, "silence": [0.0] * 80}


# -----------------------------------------------------------------------------
# other layouts of the same weights


def moshi(weights):
    """Mimi's tensors in transformers' layout -> in moshi's names and packing."""
    names = [("encoder.layers", "encoder.model"), ("decoder.layers", "decoder.model"), (".conv.", ".conv.conv."),
             ("transformer.layers", "transformer.transformer.layers"), ("mlp.fc", "linear"), ("o_proj", "out_proj"),
             ("input_layernorm", "norm1"), ("post_attention_layernorm", "norm2"),
             ("self_attn_layer_scale", "layer_scale_1"), ("mlp_layer_scale", "layer_scale_2"),
             ("semantic_residual_vector_quantizer", "rvq_first"), ("acoustic_residual_vector_quantizer", "rvq_rest"),
             ("quantizer.rvq_first.layers", "quantizer.rvq_first.vq.layers"), ("codebook.", "_codebook."),
             ("quantizer.rvq_rest.layers", "quantizer.rvq_rest.vq.layers"), ("embed_sum", "embedding_sum"),
             ("initialized", "_initialized"), ("downsample.conv", "downsample.conv.conv"),
             ("upsample.conv.conv", "upsample.convtr.convtr.convtr")]  # fmt: skip
    out = {}
    for name, x in weights.items():
        if name.startswith("decoder.layers") and name.split(".")[2] in ("2", "5", "8", "11") and "block" not in name:
            name = name.replace(".conv.", ".convtr.convtr.")
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # each head of 64: first halves, second halves -> pairs
            x = x.view(-1, 2, 32, x.shape[1]).transpose(1, 2).reshape(x.shape)
        out[name] = x
    for name in [name for name in out if name.endswith("q_proj.weight")]:
        packed = torch.cat([out.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")])
        out[name.replace("q_proj.weight", "in_proj_weight")] = packed
    return {name: x.contiguous() for name, x in out.items()}


def test_mimi_in_other_layouts(loaded, published, tmp_path):
    flat = load_file(published["mimi"] / "model.safetensors")
    wav = 0.1 * noise(1, 30000)
    codes = loaded["mimi"].encode(wav)
    packed = moshi(flat)
    newer = {name.replace("in_proj_weight", "in_projs.0.weight").replace("out_proj.", "out_projs.0."): x
             for name, x in packed.items()}  # fmt: skip
    csm = {"backbone.norm.weight": torch.zeros(3), **{f"codec_model.{name}": x for name, x in flat.items()}}
    for i, layout in enumerate((packed, newer, csm)):
        folder = tmp_path / str(i)
        folder.mkdir()
        save_file(layout, folder / ("model.safetensors" if i == 2 else "tokenizer-e351c8d8-checkpoint125.safetensors"))
        save_file({"not": torch.zeros(1)}, folder / "model-of-something.safetensors") if i < 2 else None
        codec = load_codec("mimi", folder)
        assert codec.fingerprint() == loaded["mimi"].fingerprint()
        assert torch.equal(codec.encode(wav), codes)
        assert torch.equal(codec.decode(codes), loaded["mimi"].decode(codes))


def test_one_codebook_of_mimi(loaded, published):
    one, wav = load_codec("mimi", published["mimi"], n_codebooks=1), 0.1 * noise(1, 9600)
    assert torch.equal(one.encode(wav), loaded["mimi"].encode(wav)[:, :1])
    assert torch.equal(one.decode(one.encode(wav)), loaded["mimi"].decode(one.encode(wav)))
    with pytest.raises(ValueError, match="of shape"):
        one.decode(loaded["mimi"].encode(wav))


def test_encodec_and_dac_in_their_original_layouts(loaded, published, tmp_path):
    flat, original = load_file(published["encodec"] / "model.safetensors"), {}
    for name, x in flat.items():
        name = name.replace("coder.layers", "coder.model").replace("quantizer.layers", "quantizer.vq.layers")
        name = name.replace(".conv.", ".conv.conv.").replace("codebook.", "_codebook.")
        original[name.replace("parametrizations.weight.original0", "weight_g")
                 .replace("parametrizations.weight.original1", "weight_v")] = x  # fmt: skip
    torch.save(original, tmp_path / "encodec.th")
    wav = 0.1 * noise(1, 9600)
    codes = loaded["encodec"].encode(wav)
    codec = load_codec("encodec", tmp_path / "encodec.th")
    assert codec.fingerprint() == loaded["encodec"].fingerprint() and torch.equal(codec.encode(wav), codes)

    original, units = {}, {"snake1": "block.0", "conv1": "block.1", "snake2": "block.2", "conv2": "block.3"}
    for name, x in load_file(published["dac"] / "model.safetensors").items():
        side, kind, *path = name.split(".")
        if kind == "block":
            number, part, *rest = path
            down = {"res_unit1": 0, "res_unit2": 1, "res_unit3": 2, "snake1": 3, "conv1": 4}
            place = (down if side == "encoder" else {"snake1": 0, "conv_t1": 1, "res_unit1": 2, "res_unit2": 3,
                                                     "res_unit3": 4})[part]  # fmt: skip
            rest = [units[rest[0]], *rest[1:]] if part.startswith("res") else rest
            path = ["model" if side == "decoder" else "block", str(int(number) + 1), "block", str(place), *rest]
        elif side != "quantizer":
            path = ["model" if side == "decoder" else "block", {"conv1": "0", "snake1": "5", "conv2": "6"}[kind], *path]
        name = ".".join([side, *path]) if side != "quantizer" else name
        if name.endswith("weight") and "codebook" not in name:
            original[f"{name}_g"], name = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True), f"{name}_v"
        original[name] = x
    torch.save({"state_dict": original, "metadata": {"kwargs": {"sample_rate": 24000}}}, tmp_path / "weights.pth")
    codec = load_codec("dac", tmp_path / "weights.pth", sample_rate=24000)
    codes = loaded["dac"].encode(wav)
    check_same(codec, wav, codec.encode(wav), codes)
    assert (codec.decode(codes) - loaded["dac"].decode(codes)).abs().max() < 1e-5


# -----------------------------------------------------------------------------
# equal to the golden vectors


@pytest.mark.parametrize("name, file", [("nanocodec", "nemo_nanocodec"), ("audiocodec44k", "nemo_audiocodec_44k")])
def test_nemo_golden(loaded, name, file):
    codec, g = loaded[name], golden(file)
    lengths = g["in.audio_len"].tolist()
    for row, codes, audio in ((0, g["out.tokens"][:1], g["out.audio"][:1]), (1, g["row1.tokens"], g["row1.audio"])):
        wav = g["in.audio"][row : row + 1, : lengths[row]]
        check_same(codec, wav, codec.encode(wav), codes)
        assert (codec.decode(codes) - audio).abs().max() < 1e-5
    latents = codec.encoder(codec.pad_to_frame(wav, StreamState())[:, None], StreamState())
    assert (latents - g["row1.encoded"]).abs().max() < 1e-5
    fsq = FSQ({"nanocodec": (9, 8, 8, 7), "audiocodec44k": (8, 5, 5, 5)}[name])
    assert torch.equal(fsq.encode(g["fsq.in"]), g["fsq.indices"])
    assert torch.equal(fsq.decode(g["fsq.indices"]), g["fsq.dequantized"])
    assert torch.equal(fsq.decode(torch.arange(len(g["fsq.codebook"]))[None, None])[0].T, g["fsq.codebook"])


@torch.no_grad()
def test_xtts_golden(loaded):
    codec, dvae, vocoder, speaker, mels = loaded["xtts"], *(
        golden(f"xtts_{part}") for part in ("dvae", "hifigan", "speaker_encoder", "mels"))  # fmt: skip
    x = codec.encoder(dvae["in.mel"], StreamState())
    assert (x - dvae["out.encoded"]).abs().max() < 1e-5
    assert torch.equal(codec.quantizer.encode(x)[:, 0], dvae["out.codes"])
    bands = codec.decoder(codec.quantizer.decode(dvae["out.codes"][:, None]), StreamState())
    assert (bands - dvae["out.decoded"]).abs().max() < 1e-4
    wav = codec.vocode(vocoder["in.latents"], vocoder["in.speaker"][..., 0])
    assert (wav - vocoder["out.audio"][:, 0]).abs().max() < 1e-5
    assert (codec.speaker(speaker["in.audio"]) - speaker["out.embedding_raw"]).abs().max() < 1e-4
    for n_fft, name in ((1024, "dvae"), (2048, "style")):
        assert (codec.mel(mels["in.audio"], n_fft) - mels[f"out.{name}_mel"]).abs().max() < 1e-4
        assert (getattr(codec, f"filters{n_fft}") - mels[f"fb.{name}"]).abs().max() < 1e-6
    assert (codec.speaker.filters - mels["fb.speaker"]).abs().max() < 1e-5
    for old, new in ((22050, 16000), (24000, 22050)):
        expected = mels[f"rs.{old}_to_{new}"]
        wav = resample(mels["rs.in"], old, new, zeros=6, rolloff=0.99, beta=0)
        assert wav.shape == expected.shape and (wav - expected).abs().max() < 2e-5


def test_xtts_from_recordings(loaded):
    """Reference rows are the conditioning mel, four a frame; codes are of the golden mel; voices have length 1."""
    codec, wav = loaded["xtts"], golden("xtts_mels")["in.audio"]
    rows = codec.reference(wav)
    assert rows.shape == (1, 4 * codec.frames(9000), 80)
    assert (rows[:, :30] - golden("xtts_mels")["out.style_mel"][..., :30].transpose(1, 2)).abs().max() < 1e-4
    mel = golden("xtts_mels")["out.dvae_mel"]
    check_same(codec, wav, codec.encode(wav), codec.quantizer.encode(codec.encoder(mel, StreamState()))[..., :9])
    voice = codec.timbre(torch.cat([wav, noise(1, 9000)]))
    assert voice.shape == (2, 24) and torch.allclose(voice.norm(dim=1), torch.ones(2))
    assert (voice[0] - voice[1]).norm() > 0.01
    assert torch.allclose(codec.timbre(wav), voice[:1], atol=1e-5)


def test_xtts_codes_sound_at_their_own_time(loaded, monkeypatch):
    """Griffin-Lim puts the energy of a mel band into the samples that the band describes."""
    codec = loaded["xtts"]

    class Click(torch.nn.Module):
        def forward(self, x, state):
            mel = torch.full((1, 80, 40), -11.0)
            mel[:, 20:24, 20:24] = 4.0
            return mel / codec.mel_stats[:, None]

    monkeypatch.setitem(codec._modules, "decoder", Click())
    wav = codec.decode(torch.zeros(1, 1, 10, dtype=torch.int64))[0]
    centre = (wav.square() * torch.arange(len(wav))).sum() / wav.square().sum()
    assert wav.shape == (40 * 256,) and abs(centre - 21.5 * 256) < 40


# -----------------------------------------------------------------------------
# fine-tuning


def tuned(folder, wavs, **options):
    codec = load_codec("xtts", folder)
    return codec.fit(wavs, **{"epochs": 2, "say": lambda line: None, **options})


def errors(codec, wavs):
    """Mean squared errors of the mel bands and of the codebook."""
    with torch.no_grad():
        return [float(x) for x in codec.losses([piece for wav in wavs for piece in codec.mel_pieces(wav)])[:2]]


def test_fine_tuning_helps_with_other_recordings_of_the_new_kind(published, loaded):
    """A codec that has learnt voices is fine-tuned on noise, and is better with noise that it has not heard."""
    codec = load_codec("xtts", published["xtts"])
    for p in [*codec.encoder.parameters(), *codec.decoder.parameters()]:
        p.data = p.data / 2  # the random weights are too wide to learn from
    codec.fit([voice(1 + 0.3 * i, seed=i, rate=22050) for i in range(6)], 0, 30, 2e-3, say=lambda line: None)
    kind = [speech(22050 + 7000 * i, seed=i) for i in range(8)]
    before = errors(codec, kind[6:])
    as_before = {name: x.clone() for name, x in codec.state_dict().items()}
    said = []
    slowly = errors(copy.deepcopy(codec).fit(kind[:6], say=lambda line: None), kind[6:])  # at the guide's rate
    after = errors(codec.fit(kind[:6], epochs=8, learning_rate=5e-4, say=said.append), kind[6:])
    assert after[0] < 0.85 * before[0] and after[1] < before[1]
    assert after[0] < slowly[0] < before[0]
    assert len(said) == 9 and said[0].startswith("xtts as published: error of the mel bands ")
    for name, x in codec.state_dict().items():
        changed = not torch.equal(x, as_before[name])
        assert changed == name.startswith(("encoder.", "decoder.", "quantizer.")), name
    assert not any(p.requires_grad for p in codec.parameters())


def test_a_fine_tuned_codec_is_kept_in_its_file(published, loaded, tmp_path):
    wav = voice(1.0, seed=3, rate=22050)
    codec, again = (tuned(published["xtts"], [wav], epochs=1) for _ in range(2))
    other = tuned(published["xtts"], [wav], epochs=2)
    assert codec.fingerprint() == again.fingerprint()
    assert len({x.fingerprint() for x in (codec, other, loaded["xtts"])}) == 3
    codec.save(tmp_path)
    for path in (tmp_path, codec.pack()):
        kept = load_codec("xtts", path)
        assert kept.fingerprint() == codec.fingerprint() and kept.pack().keys() == codec.pack().keys()
        assert torch.equal(kept.encode(wav[None]), codec.encode(wav[None]))
    pack = codec.pack()
    pack["tables"]["decoder.0.bias"] = pack["tables"]["decoder.0.bias"] + 1
    with pytest.raises(ValueError, match="not the weights that the codes of the pack were made with"):
        load_codec("xtts", pack)
    del pack["tables"]["decoder.0.bias"]
    with pytest.raises(ValueError, match="tables of xtts lacks decoder.0.bias"):
        load_codec("xtts", pack)
    with pytest.raises(ValueError, match="was given no recordings"):
        tuned(published["xtts"], [])


def test_the_losses_of_a_batch_are_those_of_its_pieces(loaded):
    """As the authors' DVAE has them: the squared error of the mel bands, and that of the entry next to each vector."""
    codec = loaded["xtts"]
    pieces = [codec.mel_pieces(voice(seconds, seed=i, rate=22050))[0] for i, seconds in enumerate((0.4, 1.3, 0.9))]
    assert all(len(piece) % 4 == 0 for piece in pieces)
    found = codec.losses(pieces)
    recon, commitment, vectors = [], [], []
    for piece in pieces:
        x = codec.encoder(piece.T[None], StreamState())
        near = codec.quantizer.decode(codec.quantizer.encode(x))
        recon.append((codec.decoder(near, StreamState())[0].T - piece).square())
        commitment.append((near - x).square().mean(1)[0])
        vectors.append(x[0].T)
    for ours, expected in zip(found, (torch.cat(recon).mean(), torch.cat(commitment).mean(), torch.cat(vectors))):  # noqa: B905
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(found[3], codec.quantizer.encode(torch.cat(vectors).T[None])[0, 0])


def test_the_codebook_follows_what_it_codes(published):
    codec = load_codec("xtts", published["xtts"])
    before = codec.quantizer.codebooks[0].clone()
    vectors, codes = before[[3, 3, 5]] + 1, torch.tensor([3, 3, 5])
    means = codec.follow(None, vectors, codes, 0.5, move=False)
    assert torch.equal(codec.quantizer.codebooks[0], before) and means[0][[3, 5, 7], 0].tolist() == [2.0, 1.5, 1.0]
    for _ in range(3000):
        means = codec.follow(means, vectors, codes, 0.5, move=True)
    moved = (codec.quantizer.codebooks[0] - before).abs().amax(1)
    torch.testing.assert_close(codec.quantizer.codebooks[0, [3, 5]], before[[3, 5]] + 1, rtol=0, atol=1e-3)
    assert (moved > 1e-3).nonzero()[:, 0].tolist() == [3, 5]  # an entry without vectors stays
    assert torch.equal(codec.quantizer.encode(before[[3]].T[None] + 1).flatten(), torch.tensor([3]))


# -----------------------------------------------------------------------------
# pieces, batches, streams


def speech(n, seed=0):
    """Noise of changing loudness: (n,)."""
    return 0.1 * noise(n, seed=seed) * (0.5 + torch.linspace(0, 9 + seed, n).sin().abs())


def test_contract(codec):
    size = codec.samples_per_frame
    assert codec.frame_rate == codec.sample_rate / size and codec.fitted and not codec.training
    assert not any(p.requires_grad for p in codec.parameters())
    for n in (1, size - 1, size, 3 * size + 1):
        codes = codec.encode(speech(n).expand(2, -1))
        assert codes.shape == (2, codec.n_codebooks, codec.frames(n)) and codes.dtype == torch.int64
        assert codes.min() >= 0 and codes.max() < codec.codebook_size
        wav = codec.decode(codes)
        assert wav.shape == (2, codec.frames(n) * size) and wav.dtype == torch.float32 and wav.isfinite().all()
        assert not wav.requires_grad
    for wrong in (torch.zeros(5), torch.zeros(1, 0), torch.zeros(1, 1, 5)):
        with pytest.raises(ValueError, match=r"\(B, N\)"):
            codec.encode(wrong)
    for wrong in (codes[0], codes[..., :0], codes.repeat(1, 2, 1)):
        with pytest.raises(ValueError, match=r"codes of shape"):
            codec.decode(wrong)
    for wrong in (-1, codec.codebook_size):
        with pytest.raises(ValueError, match=f"codes from 0 to {codec.codebook_size - 1}"):
            codec.decode(torch.full_like(codes, wrong))


def test_padding_never_changes_codes(codec):
    size = codec.samples_per_frame
    lengths = [1, size // 2, size, size + 1, 5 * size - 3, 9 * size + size // 3, 12 * size, 12 * size + 5]
    alone = [codec.encode(speech(n, i)[None])[0] for i, n in enumerate(lengths)]
    after = noise(len(lengths), max(lengths), seed=9)
    batch = torch.stack([torch.cat([speech(n, i), after[i, n:]]) for i, n in enumerate(lengths)])
    for given in (lengths, torch.tensor(lengths)):
        codes = codec.encode(batch, given)
        for i, (row, expected) in enumerate(zip(codes, alone, strict=True)):
            check_same(codec, speech(lengths[i], i)[None], row[None, :, : expected.shape[1]], expected[None])
    assert sum(len(row.unique()) for row in alone) > 25
    full = codec.encode(batch)
    # without lengths, the noise changes codes
    assert not all(torch.equal(full[i, :, : c.shape[1]], c) for i, c in enumerate(alone))


def test_pieces_are_the_whole(codec, monkeypatch):
    size = codec.samples_per_frame
    lengths = [60 * size + 7, 33 * size - 1, 21 * size]
    batch = torch.stack([torch.nn.functional.pad(speech(n, i), (0, max(lengths) - n)) for i, n in enumerate(lengths)])
    codes = codec.encode(batch, lengths)
    wav = codec.decode(codes)
    monkeypatch.setattr(NeuralCodec, "piece_seconds", 30 / codec.frame_rate)
    monkeypatch.setattr(type(codec), "piece_seconds", 30 / codec.frame_rate)
    assert len(list(codec.pieces(61, batch, 0))) == 7
    for i, (n, row) in enumerate(zip(lengths, codec.encode(batch, lengths), strict=True)):
        check_same(codec, speech(n, i)[None], row[None, :, : codec.frames(n)], codes[i : i + 1, :, : codec.frames(n)])
    if codec.name != "xtts":  # Griffin-Lim chooses the phases of each piece anew
        assert (codec.decode(codes) - wav).abs().max() < 1e-5 and wav.std() > 0.001


def reach(network, x, at, scale):
    """How many frames before and after frame `at` the output changes when the input changes at this frame."""
    changed = x.clone()
    changed[..., at] += 1
    hit = (network(x, StreamState()) != network(changed, StreamState())).any(1)[0].nonzero()[:, 0]
    return at[0] // scale[0] - hit.min() // scale[1], hit.max() // scale[1] - at[0] // scale[0]


@pytest.mark.parametrize("make", [
    lambda: codecs.DAC(channels=4, decoder_channels=32, n_codebooks=1),
    lambda: codecs.DAC(24000, channels=4, decoder_channels=32, n_codebooks=1, strides=(2, 4, 5, 8)),
    lambda: codecs.NanoCodec(channels=2, decoder_channels=64),
    lambda: codecs.AudioCodec44k(channels=2, decoder_channels=32),
])  # fmt: skip
@torch.no_grad()
def test_pieces_are_given_what_they_look_at(make):
    """At the strides of the published codecs, no output depends on frames beyond the context."""
    torch.manual_seed(0)
    codec = make().double()
    size, frames = codec.samples_per_frame, 60
    wav = noise(1, 1, frames * size).double()
    before, after = reach(codec.encoder, wav, torch.arange(30 * size, 31 * size), (size, 1))
    assert 0 < max(before, after) <= codec.encoder_context <= max(before, after) + 3
    x = codec.encoder(wav, StreamState())
    before, after = reach(codec.decoder, x, torch.tensor([30]), (1, size))
    assert before <= codec.decoder_context and (codec.streams or after <= codec.decoder_context <= after + 9)


@pytest.mark.slow
def test_long_files_take_little_memory(codec, monkeypatch):
    """Encoding and decoding 15 s in pieces of one second needs much less memory than in one piece."""
    def extra(seconds, work, x):
        monkeypatch.setattr(type(codec), "piece_seconds", seconds)
        before = bench.forget_peak("cpu")
        if before is None:
            pytest.skip("this system does not tell a process's peak")
        return work(x), bench.peak("cpu") - before

    wav = speech(15 * codec.sample_rate)[None]
    (codes, pieces), (_, whole) = (extra(seconds, codec.encode, wav) for seconds in (1, 15))
    assert pieces < 0.7 * whole
    if codec.name != "xtts":  # Griffin-Lim needs little memory beside the waveform
        pieces, whole = (extra(seconds, codec.decode, codes)[1] for seconds in (1, 15))
        assert pieces - wav.nbytes < (whole - wav.nbytes) / 2


def cut(x, *sizes):
    """Cut x along its last axis into pieces of these sizes, in turn."""
    while x.shape[-1]:
        for size in sizes:
            yield x[..., :size]
            x = x[..., size:]


def test_streams(codec):
    size = codec.samples_per_frame
    if not codec.streams:
        assert codec.decoder_context and not codecs.Codec.streams
        return
    codes = codec.encode(speech(41 * size)[None])
    whole = codec.decode(codes)
    for sizes in ((1,), (1, 2, 0, 9), (40,), (99,)):
        pieces = list(codec.decode_stream(cut(codes, *sizes)))
        assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-5
    frames = iter(codes.split(1, 2))
    pieces = codec.decode_stream(frames)
    assert next(pieces).shape[1] == codec.lookahead * size and next(pieces).shape[1] == size
    assert next(frames, None) is not None  # a piece comes as soon as its frames are there
    if codec.encoder_context:
        return
    for n in (41 * size, 41 * size - 5, 5 * size + 3, 100):
        wav = speech(n)[None]
        for sizes in ((size,), (1000, 7, 3333), (n,)):
            check_same(codec, wav, torch.cat(list(codec.encode_stream(cut(wav, *sizes))), 2), codec.encode(wav))


@torch.no_grad()
def test_mimis_window_of_attention(published):
    """Attention looks back ten seconds, as in transformers, for whole files and streams."""
    model, codec = transformers.MimiModel.from_pretrained(published["mimi"]), load_codec("mimi", published["mimi"])
    wav = speech(15 * 24000)[None]
    codes = codec.encode(wav)  # ten seconds, and five
    check_same(codec, wav, codes, model.encode(wav[:, None]).audio_codes)
    expected = model.decode(codes).audio_values[:, 0]
    assert (codec.decode(codes) - expected).abs().max() < 1e-5
    assert (torch.cat(list(codec.decode_stream(codes.split(3, 2))), 1) - expected).abs().max() < 1e-5


def test_speaking_streams(loaded):
    """sample.py decodes a streaming codec frame by frame; the samples are those of the whole file."""
    voice = Voice.__new__(Voice)
    voice.codec, voice.device, voice.vocoder, voice.timbre = loaded["mimi"], "cpu", False, None
    codes = loaded["mimi"].encode(speech(30 * 1920)[None])
    frames = iter(codes[0].T)
    pieces = voice.join(frames)
    first = next(pieces)
    assert first.ndim == 1 and len(first) == 1920 and len(list(frames)) == 29
    assert (torch.cat(list(voice.join(iter(codes[0].T)))) - loaded["mimi"].decode(codes)[0]).abs().max() < 1e-5
    voice.codec = loaded["encodec"]
    codes = loaded["encodec"].encode(speech(90 * 320)[None])
    pieces = list(voice.join(iter(codes[0].T)))
    assert len(pieces) < 20 and (torch.cat(pieces) - loaded["encodec"].decode(codes)[0]).abs().max() < 1e-5


# -----------------------------------------------------------------------------
# weights: where they are found, their fingerprint, refusals


def test_pack_and_fingerprint(codec, published, tmp_path):
    codec.save(tmp_path)
    assert (tmp_path / "codec.pt").stat().st_size < 10000
    pack = torch.load(tmp_path / "codec.pt", weights_only=True)
    wav = speech(5 * codec.samples_per_frame)[None]
    for path in (tmp_path, tmp_path / "codec.pt", pack, codec.pack()):
        other = load_codec(codec.name, path)
        assert other.fingerprint() == codec.fingerprint() == pack["fingerprint"]
        assert torch.equal(other.encode(wav), codec.encode(wav))
    with pytest.raises(ValueError, match="holds the tables of"):
        load_codec("mimi" if codec.name != "mimi" else "dac", tmp_path)
    with pytest.raises(ValueError, match="not the weights that the codes of .*codec.pt were made with"):
        torch.save({**pack, "fingerprint": "0" * 16}, tmp_path / "codec.pt")
        load_codec(codec.name, tmp_path)


def test_fingerprint_follows_weights_and_options(published, loaded, tmp_path):
    flat = load_file(published["encodec"] / "model.safetensors")
    for name in ("decoder.layers.3.conv.parametrizations.weight.original0", "quantizer.layers.7.codebook.embed"):
        changed = {**flat, name: flat[name].clone()}
        changed[name].view(-1)[0] += 1e-5
        save_file(changed, tmp_path / "model.safetensors")
        assert load_codec("encodec", tmp_path).fingerprint() != loaded["encodec"].fingerprint()
    assert load_codec("encodec", published["encodec"], n_codebooks=7).fingerprint() != loaded["encodec"].fingerprint()


def hub(monkeypatch, folder, codec):
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    repository = CODECS[codec].source().split()[0].replace("/", "--")
    return folder / f"models--{repository}" / "snapshots"


@pytest.mark.parametrize("name", NAMES)
def test_weights_in_the_hubs_cache(name, loaded, published, monkeypatch, tmp_path):
    snapshots = hub(monkeypatch, tmp_path, name)
    says = f"the hub's cache folder: no .*`hf download {CODECS[name].source()}` fetches"
    with pytest.raises(FileNotFoundError, match=says):
        load_codec(name)
    (snapshots / "new").mkdir(parents=True)  # another file of the repository was downloaded
    (snapshots / "old").symlink_to(published[name])
    codec = load_codec(name)
    assert codec.fingerprint() == loaded[name].fingerprint()
    gone = {**codec.pack(), "weights": "/nowhere/weights", "from_here": "nowhere/weights"}
    assert load_codec(name, gone).fingerprint() == codec.fingerprint()
    (snapshots / "old").unlink()
    looked = "the pack: /nowhere/weights is gone, its weights are not at nowhere/weights or weights, and in the hub's "
    with pytest.raises(FileNotFoundError, match=f"{looked}.*`hf download"):
        load_codec(name, gone)


def test_weights_that_moved_with_the_folders(codec, published, monkeypatch, tmp_path):
    """They are found where they were as seen from the current folder, or beside the file of the pack, and known by
    their fingerprint."""
    hub(monkeypatch, tmp_path / "hub", codec.name)
    shutil.copytree(published[codec.name], tmp_path / "old/weights/x")
    monkeypatch.chdir(tmp_path / "old")
    load_codec(codec.name, "weights/x").save("tokens")
    shutil.move(tmp_path / "old", tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    assert load_codec(codec.name, "tokens").fingerprint() == codec.fingerprint()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="old/weights/x.* is gone, its weights are not at weights/x.* or new/"):
        load_codec(codec.name, "new/tokens")
    for file in (tmp_path / "new/weights/x").iterdir():
        shutil.copy(file, tmp_path / "new/tokens")
    assert load_codec(codec.name, "new/tokens").fingerprint() == codec.fingerprint()
    pack = torch.load("new/tokens/codec.pt", weights_only=True)
    assert load_codec(codec.name, pack, "new/tokens").fingerprint() == codec.fingerprint()
    with pytest.raises(FileNotFoundError, match="old/weights/x.* is gone"):
        load_codec(codec.name, {**pack, "fingerprint": "0" * 16}, "new/tokens")


def test_usual_places_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    folders = {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub", "HOME": ".cache/huggingface/hub"}
    for variable, folder in folders.items():
        place = tmp_path / variable / folder / "models--a--b" / "snapshots" / "0"
        place.mkdir(parents=True)
        for other in ("HF_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(variable, str(tmp_path / variable))
        assert codecs.hub_folders("a/b") == [str(place)]


def test_what_is_missing_is_named(published, tmp_path):
    def refused(says, name, path, error=ValueError, **options):
        with pytest.raises(error, match=says) as info:
            load_codec(name, path, **options)
        assert "\n" not in str(info.value)

    refused("nowhere: no model.* of the codec mimi", "mimi", tmp_path / "nowhere", FileNotFoundError)
    refused(r"no \*.nemo", "nanocodec", tmp_path, FileNotFoundError)
    for file in ("dvae.pth", "model.pth"):
        (tmp_path / file).write_bytes((published["xtts"] / file).read_bytes())
    refused("no mel_stats.pth of the codec xtts", "xtts", tmp_path, FileNotFoundError)
    flat = load_file(published["encodec"] / "model.safetensors")
    path = tmp_path / "model.safetensors"
    lacking = "decoder.layers.15.conv.bias"
    save_file({name: x for name, x in flat.items() if name != lacking}, path)
    refused(r"safetensors \(for the codec encodec\) lacks decoder.15.bias", "encodec", path)
    save_file({**flat, "more": torch.zeros(1)}, path)
    refused(r"\(for the codec encodec\) holds more, which", "encodec", path)
    save_file({name: x for name, x in flat.items() if "layers.3.codebook" not in name}, path)
    refused("lack quantizer.3.embed", "encodec", path)
    save_file({**flat, lacking: torch.zeros(7)}, path)
    refused("dac_24khz model.safetensors`", "dac", tmp_path / "nowhere", FileNotFoundError, sample_rate=24000)
    refused("has strides = .2, 4, 5, 8., not .2, 4.", "encodec", published["encodec"], strides=[2, 4])
    refused("has n_codebooks = 2, not 4", "nanocodec", published["nanocodec"], n_codebooks=4)
    refused(r"\(for the codec encodec\): decoder.15.bias has shape \(7,\), not \(1,\)", "encodec", path)
    refused("not the weights of mimi", "mimi", published["encodec"])
    refused("not the weights of dac", "dac", published["mimi"])
    refused(r"nano.nemo \(for the codec audiocodec44k\)", "audiocodec44k", published["nanocodec"])
    refused("has no option 'bandwidth'", "encodec", None, bandwidth=6)
    path.write_bytes(b"no weights at all")
    refused("model.safetensors is no file of weights, it is a text", "encodec", path)
    path.write_bytes((published["encodec"] / "model.safetensors").read_bytes()[:5000])
    refused("model.safetensors is truncated or damaged", "encodec", path)


class Stranger:
    """A class that the reader does not know."""


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w')",))


def test_pickles_run_no_code(published, tmp_path):
    mark = tmp_path / "mark"
    torch.save({"state_dict": {"x": torch.zeros(1)}, "evil": Evil(mark)}, packed := io.BytesIO())
    (tmp_path / "weights.pth").write_bytes(packed.getvalue())
    with tarfile.open(tmp_path / "evil.nemo", "w") as archive:
        info = tarfile.TarInfo("model_weights.ckpt")
        info.size = len(packed.getvalue())
        archive.addfile(info, io.BytesIO(packed.getvalue()))
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"x": Evil(mark)}, protocol=2))
    for name, file in (("dac", "weights.pth"), ("nanocodec", "evil.nemo"), ("dac", "plain.pth")):
        with pytest.raises(ValueError, match=rf"{file} .*read without running code") as info:
            load_codec(name, tmp_path / file)
        assert "\n" not in str(info.value)
    assert not mark.exists()
    torch.save({"x": torch.zeros(1), "evil": Stranger()}, tmp_path / "strange.pth")
    with pytest.raises(ValueError, match="strange.pth cannot be read without running code"):
        load_codec("dac", tmp_path / "strange.pth")


def test_archives_are_not_unpacked(loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nemo(tmp_path / "a.nemo", golden("nemo_nanocodec"), "../../outside/model_weights.ckpt")
    (tmp_path / "secret").write_text("secret")
    with tarfile.open(tmp_path / "b.nemo", "w") as archive:
        link = tarfile.TarInfo("model_weights.ckpt")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        archive.addfile(link)
    assert load_codec("nanocodec", tmp_path / "a.nemo").fingerprint() == loaded["nanocodec"].fingerprint()
    with pytest.raises(ValueError, match="b.nemo is no NeMo archive of a model: no model_weights.ckpt"):
        load_codec("nanocodec", tmp_path / "b.nemo")
    (tmp_path / "c.nemo").write_text("no archive")
    with pytest.raises(ValueError, match="c.nemo is truncated, or no NeMo archive"):
        load_codec("nanocodec", tmp_path / "c.nemo")
    assert sorted(os.listdir(tmp_path)) == ["a.nemo", "b.nemo", "c.nemo", "secret"]


def test_configurations_of_coqui_are_passed_over(loaded, published, tmp_path, monkeypatch):
    """model.pth holds an object of a class that is not installed, and the names of a trainer."""
    for file in ("dvae.pth", "mel_stats.pth"):
        (tmp_path / file).write_bytes((published["xtts"] / file).read_bytes())
    module = types.ModuleType("TTS.tts.configs.xtts_config")
    module.XttsConfig = type("XttsConfig", (), {"__module__": module.__name__})
    for name in ("TTS", "TTS.tts", "TTS.tts.configs", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    config = module.XttsConfig()
    config.audio = {"sample_rate": 22050}
    model = torch.load(published["xtts"] / "model.pth", weights_only=True)["model"]
    trained = {f"xtts.{name}": x for name, x in model.items()}
    more = {"xtts.dvae.encoder.0.0.bias": torch.zeros(2), "xtts.torch_mel_spectrogram_dvae.mel_stats": torch.ones(80)}
    torch.save({"config": config, "model": {**trained, **more}}, tmp_path / "model.pth")
    for name in ("TTS", "TTS.tts", "TTS.tts.configs", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    assert load_codec("xtts", tmp_path).fingerprint() == loaded["xtts"].fingerprint()


# -----------------------------------------------------------------------------
# the command


def test_command_compares_all(loaded, published, tmp_path, monkeypatch, capsys):
    """It writes one file for each codec whose weights are here and a page, and says how to get the other weights."""
    for name in ("mimi", "nanocodec"):
        repository = CODECS[name].source().split()[0].replace("/", "--")
        (tmp_path / "hub" / f"models--{repository}" / "snapshots").mkdir(parents=True)
        (tmp_path / "hub" / f"models--{repository}" / "snapshots" / "0").symlink_to(published[name])
    soundfile.write(tmp_path / "a <b>.wav", speech(16000).numpy(), 16000)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    files = [str(tmp_path / name) for name in ("a <b>.wav", "o ut.wav")]
    monkeypatch.setattr(sys, "argv", ["codec.py", *files, "--codec=all"])
    codecs.main()
    printed = capsys.readouterr()
    assert printed.err == "" and "mimi: 13 frames of 4 codes, 12.5 frames/s, 300 bit/s\n" in printed.out
    for name in ("encodec", "dac", "audiocodec44k", "xtts"):
        assert f"`hf download {CODECS[name].source()}`" in printed.out
    assert sorted(os.listdir(tmp_path)) == ["a <b>.wav", "hub", "o ut.html", "o ut.mel.wav", "o ut.mimi.wav",
                                           "o ut.nanocodec.wav", "o ut.recording.wav"]  # fmt: skip
    page = read_page(tmp_path / "o ut.html")
    assert page["title"] == "a <b>.wav"
    assert list(page["sentences"][0]["audio"]) == [m["name"] for m in page["models"]] == [
        "recording", "mel", "mimi", "nanocodec"]  # fmt: skip
    numbers = page["models"][2]["numbers"]
    assert numbers == {"kHz": 24, "codebooks": 4, "codebook size": 64, "frames/s": 12.5, "bit/s": 300}
    wav = read_audio(tmp_path / "a <b>.wav", 24000)
    expected = loaded["mimi"].decode(loaded["mimi"].encode(wav[None]))[0, : len(wav)]
    assert torch.allclose(read_audio(tmp_path / "o ut.mimi.wav", 24000), expected.clamp(-1, 1), atol=1e-3)


def test_command_with_a_path(published, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "in.wav", speech(24000).numpy(), 24000)
    args = [str(tmp_path / "in.wav"), str(tmp_path / "out.wav"), f"--codec_path={published['mimi']}"]
    monkeypatch.setattr(sys, "argv", ["codec.py", *args, "--codec=mimi", "--codec_args", '{"n_codebooks": 2}'])
    codecs.main()
    assert "mimi: 13 frames of 2 codes" in capsys.readouterr().out and (tmp_path / "out.wav").exists()
    monkeypatch.setattr(sys, "argv", ["codec.py", *args, "--codec=all"])
    with pytest.raises(ValueError, match="are for one codec, not for --codec=all"):
        codecs.main()

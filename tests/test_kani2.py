"""model.py's Kani as a KaniTTS-2: against golden vectors of its authors' code, and on the road from prepare.py to
sample.py."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GREEDY, always, batch_of, exact, gradients, run, same, spoken_by, utterance
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import layouts as published
import model as models
import prepare
import sample
import train
import weights
from codec import published_sizes
from data import Batches, TokenFiles
from export import export
from model import AUDIO, TEXT, Kani, KaniConfig, contract_check
from parts import budget, configurator, lora
from parts.tensors import read_vector
from voice import Voice

GOLDEN = Path(__file__).parent / "golden"
SAID = json.loads((GOLDEN / "kani2.json").read_text())
STEPS = {"half": 0.5, "one": 1.0}
SPEED = "model.learnable_rope_layers.{}.alpha_weight"
STACK = dict(n_layer=4, n_head=4, n_kv_head=2, d_model=32, d_ff=48, max_positions=512, layers="caca", qk_norm=True,
             rotation_speed=(0.1, 2.0))  # fmt: skip


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "kani2.safetensors")


def tensors_of(golden):
    return {key.removeprefix("weights."): x for key, x in golden.items() if key.startswith("weights.")}


@pytest.fixture(params=STEPS)
def port(request, golden):
    """Ours with the authors' weights, and the name of its audio_step in the golden file."""
    config = {**SAID["config_json"], "audio_step": STEPS[request.param]}
    return published.assemble(published.KANI_LFM2, tensors_of(golden), config, "golden"), request.param


def folder(path, tensors, **config):
    """A published folder; a key of config.json that is None is left out."""
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    config = {key: value for key, value in {**SAID["config_json"], **config}.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    return path


def tiny(cls=Kani, K=4, backbone=None, **options):
    """A small KaniTTS-2 with weights wide enough for logits that differ, and speeds that do."""
    torch.manual_seed(0)
    options = {"text_bos": 1, "text_eos": 2, "audio_step": 0.3, "speaker_size": 6, **options}
    model = cls(KaniConfig(30, K, 16, {**STACK, **(backbone or {})}, **options))
    for p in model.parameters():
        if p.ndim != 1:
            p.data.normal_(std=0.3)
    return model


def vectors(n, size=6):
    return torch.randn(n, 1, size, generator=torch.Generator().manual_seed(n))


def segments(golden):
    tokens = golden["in.input_ids"]
    spoken = (tokens == 41).cumsum(1) - (tokens == 41).long()  # behind start of speech
    return torch.where(golden["in.attention_mask"] > 0, torch.where(spoken > 0, AUDIO, TEXT), 0)


# ---------------------------------------------------------------------------------------------------------------------
# against the authors' code


def test_positions(port, golden):
    model, step = port
    used = golden["in.attention_mask"] > 0
    places = model.places(golden["in.input_ids"][..., None])
    assert torch.equal(places[used], golden[f"in.{step}.positions"][used])
    seen = []
    model.backbone.forward = lambda x, cache=None, positions=None: seen.append(positions) or x
    model.states(torch.zeros(2, 42, 32), places, torch.zeros(2, 1, 32))
    used = torch.cat([used[:, :1], used], 1)
    assert torch.equal(seen[0][used], golden[f"in.{step}.positions_speaker"][used])


@torch.no_grad()
def test_golden_logits(port, golden):
    model, step = port
    tokens = golden["in.input_ids"][..., None]
    used = golden["in.attention_mask"] > 0
    voice = model.voice_latents(golden["in.speaker_emb"][:, None])
    for heard, expected in ((None, golden[f"out.{step}.logits"]), (voice, golden[f"out.{step}.speaker.logits"][:, 1:])):
        logits = model.states(model.embed(tokens), model.places(tokens), heard) @ model.embedding.T
        torch.testing.assert_close(logits[used], expected[used], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("step", STEPS)
def test_golden_logits_without_learned_speeds(golden, tmp_path, step):
    tensors = {key: x for key, x in tensors_of(golden).items() if "learnable_rope" not in key}
    path = folder(tmp_path / "plain", tensors, use_learnable_rope=False, audio_step=STEPS[step])
    model = weights.from_pretrained(path)
    assert model.config.backbone.rotation_speed is None and model.config.audio_step == STEPS[step]
    tokens = golden["in.input_ids"][..., None]
    used = golden["in.attention_mask"] > 0
    logits = model.states(model.embed(tokens), model.places(tokens)) @ model.embedding.T
    torch.testing.assert_close(logits[used], golden[f"out.{step}.plain_rope.logits"][used], rtol=0, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_golden_losses_and_gradients(port, golden, recompute):
    model, step = port
    model.config.backbone.recompute = recompute
    batch = golden["in.input_ids"][..., None], segments(golden)
    plain, _ = model.train()(*batch)
    torch.testing.assert_close(plain, golden[f"out.{step}.loss"], rtol=0, atol=1e-5)
    loss, stats = model(*batch, golden["in.speaker_emb"][:, None])
    torch.testing.assert_close(loss, golden[f"out.{step}.speaker.loss"], rtol=0, atol=1e-5)
    losses = golden[f"out.{step}.speaker.losses"][:, 1:]  # the first column would predict the row of the speaker
    codes = golden["in.input_ids"] >= 50
    torch.testing.assert_close(stats["loss_by_codebook"][0].sum(), losses[codes[:, 1:]].sum(), rtol=1e-5, atol=1e-5)
    if step == "one":
        return
    loss.backward()
    found = gradients(model)
    assert len(found) == sum(key.startswith("grad.") for key in golden)
    for name, gradient in found.items():
        (key,), _ = published.kani_lfm2(name, model.config)
        expected = golden[f"grad.half.speaker.{key}"]
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max(), name


@pytest.mark.parametrize("heard", ["speaker", "plain"])
@pytest.mark.parametrize("how, penalty", [("greedy", 1.0), ("penalty", 1.1)])
def test_golden_generation(port, golden, heard, how, penalty):
    """The authors restrict each code to its own codebook here, and end of speech is not offered."""
    model, step = port
    name = f"gen.{step}.{heard}.{how}"
    text = golden["gen.prompt"][0, 2:-2].numpy()  # without the marks, which `layout` adds
    expected = golden[f"{name}.ids"][0, 2:].view(6, 4) - 50 - 16 * torch.arange(4)
    raw = golden[f"{name}.logits"][0, 2:]
    said = []

    def choose(logits, age=None, **settings):
        said.append(logits[0, :16])
        return models.sample_code(logits[:, :16], age=None if age is None else age[:, :16], **settings)

    reference = golden["in.speaker_emb"][:1] if heard == "speaker" else None
    draw = dict(temperature=0.0, repetition_penalty=penalty)
    frames, stopped = spoken_by(model, text, max_frames=6, draw=draw, choose=choose, reference=reference)
    assert frames == expected.tolist() and stopped is False
    for i, logits in enumerate(said):
        first = 50 + 16 * (i % 4)
        torch.testing.assert_close(logits, raw[i, first : first + 16], rtol=0, atol=1e-4)


def test_golden_layout(golden):
    """Their rows are those of `layout`: text, marks and codes."""
    c = published.assemble(published.KANI_LFM2, tensors_of(golden), SAID["config_json"], "golden").config
    for ids, kinds in zip(golden["in.input_ids"], segments(golden), strict=True):
        text = ids[2 : int((ids == 2).nonzero())].numpy()
        codes = ids[ids >= 50].view(-1, 4).numpy() - 50 - 16 * np.arange(4)
        tokens, segment = c.layout(text, codes)
        n = len(tokens)
        assert tokens[:, 0].tolist() == ids[:n].tolist() and segment.tolist() == kinds[:n].tolist()
        assert (ids[n:] == 47).all() and n == c.length(len(text), len(codes))


# ---------------------------------------------------------------------------------------------------------------------
# published weights


def test_the_tensors_tell_a_kanitts_2(golden, tmp_path):
    """What its authors' training code saves says nothing of it in config.json."""
    unsaid = dict.fromkeys(("audio_tokens_start", "tokens_per_frame", "audio_step", "use_learnable_rope", "alpha_min",
                            "alpha_max", "speaker_emb_dim"))  # fmt: skip
    path = folder(tmp_path / "bare", tensors_of(golden), **unsaid, architectures=["FlashCompatibleLfm2ForCausalLM"])
    c = weights.from_pretrained(path, text_vocab_size=40, codebook_size=16).config
    assert (c.audio_step, c.speaker_size, c.backbone.rotation_speed) == (1.0, 12, (0.1, 2.0))
    said = weights.from_pretrained(folder(tmp_path / "said", tensors_of(golden), alpha_min=0.5, alpha_max=1.5)).config
    assert (said.audio_step, said.text_vocab_size, said.codebook_size) == (0.5, 40, 16)
    assert said.backbone.rotation_speed == (0.5, 1.5)


def test_the_released_sizes():
    """Text ids, special tokens and codes of the released models, with which config.json need not agree."""
    with torch.device("meta"):
        model = Kani(KaniConfig(64400, 4, 4032, "lfm2-kani2", speaker_size=128, audio_step=1.0))
    shapes = {key: tuple(w.shape) for name, w in model.state_dict().items()
              for key in published.kani_lfm2(name, model.config)[0]}  # fmt: skip
    assert shapes["model.speaker_emb_projection.weight"] == (1024, 128)
    assert {key for key in shapes if "rope" in key} == {SPEED.format(i) for i in (2, 5, 8, 10, 12, 14)}
    for config in ({}, {"audio_tokens_start": 64410, "tokens_per_frame": 4, "audio_step": 1.0}):
        sizes = published.kani_sizes(shapes, config)
        again = KaniConfig(**{**sizes, "backbone": {**sizes["backbone"], "max_positions": 2048}})
        assert asdict(again) == asdict(model.config) | {"text_bos": 1, "text_eos": 2}


def test_published_in_and_out(golden, tmp_path):
    there = folder(tmp_path / "in", tensors_of(golden))
    model = weights.from_pretrained(there)
    export(model, tmp_path / "out")
    same(load_file(tmp_path / "out/model.safetensors"), load_file(there / "model.safetensors"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    ours = {key: value for key, value in SAID["config_json"].items() if not key.endswith(("_token_id", "_range"))}
    assert {key: config[key] for key in ours} == ours
    again = weights.from_pretrained(tmp_path / "out")
    assert again.config == model.config
    same(again.state_dict(), model.state_dict())


def test_an_export_of_a_model_of_ones_own(tmp_path):
    for options in (dict(speaker_size=0), dict(backbone=dict(rotation_speed=None)), dict(audio_step=0.25, K=3)):
        model = tiny(**options)
        export(model, tmp_path)
        again = weights.from_pretrained(tmp_path)
        assert again.config == model.config
        same(again.state_dict(), model.state_dict())
    for options in (dict(audio_step=0.0), dict(audio_step=0.0, speaker_size=0)):
        with pytest.raises(ValueError, match="this model is neither"):
            export(tiny(**options), tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop(SPEED.format(3)), "lacks model.learnable_rope_layers.3.alpha_weight"),
    (lambda w: w.update({SPEED.format(0): torch.zeros(())}), "holds .*layers.0.alpha_weight, which the family 'kani'"),
    (lambda w: w.update({SPEED.format(1): torch.zeros(2)}), "does not give backbone.layers.1.attn.speed"),
    (lambda w: w.update({"model.speaker_emb_projection.weight": torch.zeros(31, 12)}), "does not give speaker_proj"),
])  # fmt: skip
def test_weights_that_are_no_kanitts_2(golden, tmp_path, change, message):
    tensors = tensors_of(golden)
    change(tensors)
    with pytest.raises(ValueError, match=message) as error:
        weights.from_pretrained(folder(tmp_path / "x", tensors))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, message", [
    (dict(backbone=dict(rotation_speed=(2.0, 0.1))), "must be the slowest and the fastest"),
    (dict(backbone=dict(rotation_speed=(1.0,))), "must be the slowest and the fastest"),
    (dict(backbone=dict(rope_theta=0.0)), "needs rotary positions"),
    (dict(audio_step=-1.0), "audio_step = -1.0"),
    (dict(speaker_size=-1), "speaker_size = -1"),
])  # fmt: skip
def test_sizes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


# ---------------------------------------------------------------------------------------------------------------------
# by itself


@given(step=st.sampled_from([0.1, 0.5, 1.0, 2.0]), K=st.integers(1, 4), n=st.integers(1, 5), T=st.integers(0, 6),
       prompt=st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4)))  # fmt: skip
def test_places_count_what_came_before(step, K, n, T, prompt):
    model = tiny(K=K, audio_step=step)
    tokens, _ = model.layout(*utterance(n, T, K), utterance(*prompt, K) if prompt else None)
    place, expected, codes = 0.0, [], 0
    for token in tokens[:, 0]:
        expected.append(place)
        codes += int(token >= model.config.first_code)
        place += 1 if token < model.config.first_code else step * (codes % K == 0)
    places = model.places(torch.from_numpy(tokens)[None])
    torch.testing.assert_close(places[0], torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("audio_step", [0.0, 0.3, 1.0])
def test_contract_holds(dtype, audio_step):
    for K, speed in ((4, (0.1, 2.0)), (1, None)):
        model = tiny(K=K, audio_step=audio_step, backbone=dict(rotation_speed=speed)).to(dtype)
        bound = {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 1}[dtype]
        for side in ({}, {"reference": vectors(1)[0]}):
            assert contract_check(model, *utterance(7, 12, K), **side)["max_difference"] < bound


def test_a_vector_changes_what_is_said():
    model, (text, codes) = tiny(), utterance()
    one, two = vectors(2)
    said = [spoken_by(model, text, max_frames=9, draw=GREEDY, reference=x)[0] for x in (None, one, two)]
    assert said[0] != said[1] != said[2] != said[0]
    batch = batch_of(model, (text, codes))
    losses = {round(model(*batch, *x)[0].item(), 5) for x in ((), (one[None],), (two[None],))}
    assert len(losses) == 3


def test_padding_and_neighbours_change_nothing():
    model = tiny().double()
    batch = [utterance(5, 9), utterance(3, 4, seed=1), utterance(8, 2, seed=2)]
    reference = vectors(3)
    pairs = zip(batch, reference, strict=True)
    alone = [model(*batch_of(model, u), v[None])[1]["loss_by_codebook"][0] for u, v in pairs]
    for width in (0, 80):
        together = model(*batch_of(model, *batch, width=width), reference)[1]["loss_by_codebook"][0]
        torch.testing.assert_close(together, sum(alone))


def test_the_row_of_the_speaker_has_a_position():
    model = tiny(backbone=dict(max_positions=30))
    assert model.max_rows == 29 and tiny(speaker_size=0).max_rows == 512
    text, reference = utterance(n=5)[0], vectors(1)[0]
    frames, _ = spoken_by(model, text, choose=always(3), reference=reference)
    assert len(frames) == (29 - 11) // 4


class Standing(Kani):
    """Generation does not move on from frame to frame."""

    def step(self, stage):
        super().step(stage)
        stage.first -= self.config.audio_step


class Deaf(Kani):
    """Generation does not hear the speaker."""

    def generate(self, *args, reference=None, **options):
        yield from super().generate(*args, **options)


@pytest.mark.parametrize("broken", [Standing, Deaf])
def test_contract_check_refuses(broken):
    with pytest.raises(ValueError, match="check failed: generation and teacher forcing differ"):
        contract_check(tiny(broken), *utterance(7, 12), reference=vectors(1)[0])


def test_a_learned_speed_of_one_is_no_learned_speed():
    """sigmoid(w) such that the speed is 1; the fractional positions of rows that are whole are the table's."""
    plain, learned = tiny(backbone=dict(rotation_speed=None)).double(), tiny().double()
    speed = torch.logit(torch.tensor((1 - 0.1) / 1.9, dtype=torch.float64))
    learned.load_state_dict({**{name: speed for name in learned.state_dict() if name.endswith("speed")},
                             **plain.state_dict()})  # fmt: skip
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    places = torch.arange(9).expand(2, 9)
    expected = plain.backbone(x)
    for positions in (None, places, places.double()):
        torch.testing.assert_close(plain.backbone(x, positions=positions), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(learned.backbone(x, positions=positions), expected, rtol=1e-5, atol=1e-5)


def test_speeds_start_half_way_and_learn():
    model = Kani(KaniConfig(30, 4, 16, STACK, audio_step=1.0, speaker_size=6))
    speeds = {name: p for name, p in model.named_parameters() if name.endswith("speed")}
    assert len(speeds) == 2 and all(p == 0 and p.shape == () for p in speeds.values())
    for p in model.parameters():
        if p.ndim > 1:
            p.data.normal_(std=0.3)
    model(*batch_of(model, utterance()), vectors(1))[0].backward()
    assert all(p.grad != 0 for p in speeds.values())


# ---------------------------------------------------------------------------------------------------------------------
# prepare.py: their rows


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def prepared(data_dir, *flags):
    usual = [f"--data_dir={data_dir}", "--val_fraction=0", "--workers=1", "--min_seconds=0", "--max_bad=1",
             "--max_chars_per_second=1000", "--min_chars_per_second=0"]  # fmt: skip
    prepare.main(configurator.configure(prepare.__file__, [*usual, *flags]))
    return TokenFiles(data_dir, "train")


@pytest.mark.parametrize("case", SAID["rows"], ids=lambda case: case["name"])
def test_rows_equal_the_authors(tmp_path, case):
    """Every row of their four configurations: ids and speaker vector, from a table of codes to the batch."""
    pytest.importorskip("tokenizers")
    table = write_rows(tmp_path / "emb.jsonl", SAID["source"])
    limit = case["config"]["max_duration_sec"] or 30
    found = {}
    for n, dataset in enumerate(case["config"]["hf_datasets"]):
        tag = dataset.get("language_tag")
        language = ["--text_format={text}"]
        if tag:
            language = [f"--language={tag.lower()}", "--text_format={language}: {text}"]
        files = prepared(tmp_path / f"tokens{n}", f"--sources={table}", "--codec=nanocodec", f"--max_seconds={limit}",
                         f"--tokenizer={GOLDEN / 'kani2.tokenizer.json'}", *language)  # fmt: skip
        assert models.facts(files.meta)["speaker_size"] == 8
        c = KaniConfig(64400, 4, 4032, STACK, text_bos=1, text_eos=2, audio_step=1.0, speaker_size=8, drop_repeats=True)
        batches = Batches(files, c.layout, c.length, 4000, 64, reference=(0, 0))
        tokens, segment, reference = batches.read(range(len(files)))
        for i, (ids, kinds, vector) in enumerate(zip(tokens, segment, reference, strict=True)):
            row = int(files.name(i).rpartition("/")[2])
            found[n, row] = ids[kinds > 0, 0].tolist(), vector[0]
    capped = any("max_len" in dataset for dataset in case["config"]["hf_datasets"])  # `cap` draws others than theirs
    assert len(found) == len(case["rows"]) + capped
    for expected in case["rows"]:
        ids, vector = found[expected["dataset"], expected["row"]]
        assert ids == expected["input_ids"]
        assert torch.equal(vector, torch.tensor(expected["speaker_emb"]))


def test_prompts_equal_the_authors():
    pytest.importorskip("tokenizers")
    from parts.text import HuggingFace, wording

    tokenizer = HuggingFace((GOLDEN / "kani2.tokenizer.json").read_bytes())
    c = KaniConfig(64400, 4, 4032, STACK, text_bos=1, text_eos=2, audio_step=1.0)
    for case in SAID["prompts"]:
        text_format = "{language}: {text}" if case["tag"] else "{text}"
        ids = tokenizer.encode(wording(text_format, "", case["text"], case["tag"] or ""))
        rows = c.layout(np.array(ids))[0][:, 0].tolist()
        assert rows == [*case["input_ids"], c.ai, c.speech]  # which the authors let the model say


def test_a_vector_for_each_speaker(tmp_path):
    rows = [{**row, "speaker": "ab"[i % 2]} for i, row in enumerate(SAID["source"])]
    table = write_rows(tmp_path / "emb.jsonl", rows)
    (tmp_path / "voices").mkdir()
    a, b = vectors(2)
    np.save(tmp_path / "voices/a.npy", a[0].numpy())
    flags = [f"--sources={table}", "--codec=nanocodec", "--vocab_size=300", f"--speaker_vectors={tmp_path / 'voices'}"]
    with pytest.raises(ValueError, match=r"has neither b\.npy nor b\.pt"):
        prepared(tmp_path / "tokens", *flags)
    torch.save(b, tmp_path / "voices/b.pt")  # as their own code saves it
    files = prepared(tmp_path / "tokens", *flags)
    for i in range(4):
        expected = a if files.meta["speakers"][files.speaker(i)] == "a" else b
        assert np.array_equal(files.reference(i), expected)
    with pytest.raises(ValueError, match="references = True and speaker_vectors"):
        prepared(tmp_path / "tokens", *flags, "--references=True")


def test_vectors_that_cannot_be_used(tmp_path):
    source = SAID["source"]
    for value, message in (("x.npy", "speaker_emb is not a list of finite numbers"), ([], "speaker_emb is empty"),
                           ([1.0, None], "not a list of finite"), ([1.0] * 7, "7 numbers, and others have 8 numbers"),
                           (None, "none, and others have 8 numbers")):  # fmt: skip
        table = write_rows(tmp_path / "emb.jsonl", [*source[:3], {**source[3], "speaker_emb": value}])
        files = prepared(tmp_path / "tokens", f"--sources={table}", "--codec=nanocodec", "--vocab_size=300")
        report = json.loads((tmp_path / "tokens/report.json").read_text())
        assert len(files) == 3 and message in report["not_used"][0]["detail"]
    path = tmp_path / "x.npy"
    for array, message in ((np.zeros((2, 8)), "holds no speaker vector"), (np.full(8, np.nan), "NaN or infinite"),
                           (np.zeros(0), "no speaker vector"), (np.array(["a"]), "no speaker vector")):  # fmt: skip
        np.save(path, array)
        with pytest.raises(ValueError, match=message):
            read_vector(path)
    path.write_bytes(b"RIFF1234WAVE")
    with pytest.raises(ValueError, match="is a recording, not a speaker vector: give a .npy or .pt"):
        read_vector(path)


# ---------------------------------------------------------------------------------------------------------------------
# the road


RUN = [
    "--arch=kani", "--max_tokens=400", "--warmup_iters=2", "--log_interval=1", "--eval_interval=4", "--eval_samples=0",
    "--device=cpu", "--lr_schedule=constant", "--learning_rate=0.01", "--audio_step=0.5",
    "--backbone={'n_layer': 2, 'n_head': 2, 'n_kv_head': 1, 'd_model': 32, 'd_ff': 48, 'layers': 'ca', "
    "'qk_norm': True, 'rotation_speed': (0.1, 2.0)}",
]  # fmt: skip


def give_vectors(tokens, folder):
    """A copy of a token folder with a speaker vector for each utterance: that of its speaker, and a little noise."""
    from data import TokenWriter

    rng = np.random.default_rng(0)
    own = rng.standard_normal((2, 6))
    parts = {split: TokenFiles(tokens, split) for split in ("train", "val")}
    meta = parts["train"].meta
    meta["codec"]["reference"] = {"rows_per_frame": 0, "silence": [0.0] * 6}
    with TokenWriter(folder, references="vector") as out:
        for split, files in parts.items():
            for i in range(len(files)):
                vector = own[files.speaker(i)] + 0.01 * rng.standard_normal(6)
                out.add(split, files.name(i), files.text(i), files.codes(i), files.speaker(i), vector[None])
        for name in ("codec.pt", meta["tokenizer"]["file"]):
            out.file(name, (Path(tokens) / name).read_bytes())
        out.finish({key: value for key, value in meta.items() if key not in ("version", "splits", "text_dtype")})
    return str(folder)


@pytest.fixture(scope="module")
def spoken(tokens, tmp_path_factory):
    """A token folder with speaker vectors, and a model that has learnt it."""
    path = tmp_path_factory.mktemp("kani2")
    data = give_vectors(tokens, path / "tokens")
    checkpoint, lines = run(data, path / "out", "--max_iters=60", "--eval_interval=20", "--max_tokens=1500",
                            "--loss_on=codebook", usual=RUN)  # fmt: skip
    return path, data, checkpoint, lines


def test_it_learns_and_speaks(spoken):
    path, data, checkpoint, lines = spoken
    assert lines[-1]["val_loss"] < 0.6 * lines[0]["loss"] and checkpoint["model_config"]["speaker_size"] == 6
    files = TokenFiles(data, "train")
    voice = Voice.from_checkpoint(path / "out/best.pt", "cpu")
    assert voice.references.shape == (2, 1, 6) and voice.references.dtype == torch.float32
    own = [files.reference(next(i for i in range(30) if files.speaker(i) == speaker)) for speaker in (0, 1)]
    assert np.array_equal(voice.references, own)
    np.save(path / "b.npy", own[1][0])
    said = [torch.stack(list(voice.frames("one two", temperature=0.0, **how)))
            for how in ({"speaker": "b"}, {"speaker": "b", "reference": path / "b.npy"})]  # fmt: skip
    assert torch.equal(*said)
    assert torch.equal(voice.listen(path / "b.npy")[0], voice.model.voice_latents(torch.tensor(own[1]))[0])
    wav = voice.say("one two", temperature=0.0)
    assert len(wav) and wav.isfinite().all()


def test_a_saved_voice_is_the_vectors_row(spoken, monkeypatch):
    path = spoken[0]
    monkeypatch.chdir(path)
    np.save("mine.npy", np.ones(6))
    flags = [f"--ckpt={path}/out/best.pt", "--text=one", "--cap_seconds=1", "--device=cpu"]
    saving = ["--reference=mine.npy", "--save_voice=mine", "--out_dir=first"]
    for more in (saving, ["--voice=mine", "--out_dir=second"]):
        sample.main(configurator.configure(sample.__file__, [*flags, *more]))
    assert (path / "first/000.wav").read_bytes() == (path / "second/000.wav").read_bytes()
    assert torch.load("voices/mine.pt")["latents"].shape[0] == 1 and not torch.load("voices/mine.pt")["codes"]


def test_sample_takes_a_vector_and_refuses_a_recording(spoken):
    path = spoken[0]
    np.save(path / "other.npy", np.zeros(7))
    np.save(path / "mine.npy", np.ones(6))
    (path / "me.wav").write_bytes(b"RIFF1234WAVEfmt ")

    def speak(name):
        flags = [f"--ckpt={path}/out/best.pt", "--text=one", f"--out_dir={path}/said", "--cap_seconds=1"]
        sample.main(configurator.configure(sample.__file__, [*flags, "--device=cpu", f"--reference={path}/{name}"]))

    speak("mine.npy")
    assert (path / "said/000.wav").stat().st_size > 44
    with pytest.raises(ValueError, match="is a recording, not a speaker vector"):
        speak("me.wav")
    with pytest.raises(ValueError, match="holds 7 numbers, the model takes speaker vectors of 6"):
        speak("other.npy")


def test_published_weights_speak(spoken):
    """As their authors let them: a vector from a file or none, the language before the text."""
    path, data = spoken[:2]
    export(weights.from_pretrained(path / "out/best.pt"), path / "hub")
    parts = dict(codec="mel", codec_path=f"{data}/codec.pt", tokenizer=f"{data}/tokenizer.model")
    voice = Voice.from_published(path / "hub", "cpu", language="en", **parts)
    assert voice.text_ids("one").tolist() == voice.tokenizer.encode("en: one") and voice.references is None
    np.save(path / "a.npy", np.ones(6))
    torch.save(torch.full((1, 6), 3.0), path / "b.pt")
    files = [path / "a.npy", path / "b.pt"]
    assert torch.equal(voice.listen(files)[0], voice.model.voice_latents(torch.full((1, 6), 2.0))[0])  # of two the mean
    logits = []
    for reference in (None, files[0]):
        ids, given = voice.utterance("one two", reference=reference)
        assert given.keys() == ({"voice"} if reference else set())
        next(voice.model.generate(ids, choose=lambda x, key: logits.append(x) or x[:, :16].argmax(-1), **given))
        assert len(list(voice.frames("one two", reference=reference, temperature=0.0, cap_seconds=1.0)))
    assert not torch.allclose(logits[0], logits[3], atol=1e-3)


def test_a_voice_is_saved(spoken, monkeypatch):
    """Also without its vector, which the weights turn into one row."""
    path = spoken[0]
    monkeypatch.chdir(path)
    usual = [f"--ckpt={path}/out/best.pt", "--device=cpu", "--cap_seconds=1", "--temperature=0"]
    for flags in (["--speaker=b", "--save_voice=b"], ["--speaker=b", "--text=one two", "--out_dir=named"],
                  ["--voice=b", "--text=one two", "--out_dir=saved"]):  # fmt: skip
        sample.main(configurator.configure(sample.__file__, [*usual, *flags]))
    assert (path / "named/000.wav").read_bytes() == (path / "saved/000.wav").read_bytes()


@pytest.mark.parametrize("flags", [
    ["--loss_on=all"],
    ["--loss_on=codebook", "--drop_repeats=True", "--frame_dropout=0.3", "--voice_prompt=0.5", "--muon=True",
     "--dropout=0.1", "--ema=0.9", "--gradient_accumulation_steps=2", "--recompute=True"],
], ids=["plain", "everything"])  # fmt: skip
def test_training_goes_on_bit_for_bit(spoken, tmp_path, flags):
    data = spoken[1]
    whole, lines = run(data, tmp_path / "whole", "--max_iters=8", *flags, usual=RUN)
    run(data, tmp_path / "halves", "--max_iters=4", *flags, usual=RUN)
    again, lines_again = run(data, tmp_path / "halves", "--max_iters=8", "--init_from=resume", *flags, usual=RUN)
    same(whole, again)
    assert exact(lines) == exact(lines_again) and len(lines) == 8


def test_training_without_vectors(tokens, spoken, tmp_path, capsys):
    """A fresh model then has no weights for them; one that has them goes on without."""
    fresh, _ = run(tokens, tmp_path / "fresh", "--max_iters=4", usual=RUN)
    assert fresh["model_config"]["speaker_size"] == 0 and fresh["references"] is None
    capsys.readouterr()
    old = spoken[2]
    usual = [flag for flag in RUN if not flag.startswith(("--backbone", "--audio_step"))]
    went_on, _ = run(tokens, tmp_path / "on", "--max_iters=4", f"--init_from={spoken[0]}/out/last.pt", usual=usual)
    assert "has no speaker vectors: the model trains without" in capsys.readouterr().out
    key = "speaker_projection.weight"
    assert torch.equal(went_on["model"][key], old["model"][key])
    assert not torch.equal(went_on["model"]["embedding"], old["model"]["embedding"])
    voice = Voice.from_checkpoint(tmp_path / "on/last.pt", "cpu")
    assert voice.references is None and voice.prompt(None, "") == {}
    assert voice.say("one", cap_seconds=1.0).isfinite().all()
    run(spoken[1], tmp_path / "csm", "--max_iters=4", "--eval_interval=4", "--eval_samples=0")
    assert "takes no speaker vectors" in capsys.readouterr().out


def test_training_starts_from_published_weights(spoken, tmp_path):
    meta = TokenFiles(spoken[1], "train").meta
    model = models.build("kani", meta, dict(backbone=STACK, audio_step=0.5))
    assert model.config.speaker_size == 6
    export(model, tmp_path / "weights")
    usual = [flag for flag in RUN if not flag.startswith(("--backbone", "--audio_step"))]
    start = f"--init_from={tmp_path / 'weights'}"
    checkpoint, lines = run(spoken[1], tmp_path / "out", start, "--max_iters=4", usual=usual)
    assert checkpoint["config"]["audio_step"] == 0.5 and lines[-1]["loss"] < lines[0]["loss"]
    name = "backbone.layers.1.attn.speed"
    assert checkpoint["model"][name] != model.state_dict()[name]
    with pytest.raises(ValueError, match="audio_step = 1.0, but .*weights was trained with 0.5"):
        run(spoken[1], tmp_path / "x", start, "--audio_step=1.0", usual=usual)
    # an adapter on them, and back out with it merged
    adapter, _ = run(spoken[1], tmp_path / "lora", start, "--max_iters=4", "--lora_rank=2", usual=usual)
    assert all("lora" in key for key in adapter["model"]["weights"])
    speaking = weights.load_model(weights.load_checkpoint(tmp_path / "lora/last.pt"))
    contract_check(speaking, *utterance(4, 5, 3), reference=vectors(1)[0])
    lora.merge(speaking)
    export(speaking, tmp_path / "merged")
    same(weights.from_pretrained(tmp_path / "merged").state_dict(), speaking.state_dict())
    wrong = models.build("kani", meta, dict(backbone=STACK, audio_step=0.5, speaker_size=9))
    export(wrong, tmp_path / "wrong")
    with pytest.raises(ValueError, match="takes speaker vectors of 9 numbers, those of the data have 6"):
        run(spoken[1], tmp_path / "y", f"--init_from={tmp_path / 'wrong'}", usual=usual)


def test_vectors_are_no_recordings(spoken):
    files, c = TokenFiles(spoken[1], "train"), tiny(K=3).config
    with pytest.raises(ValueError, match="has no features of recordings to take a voice from"):
        Batches(files, c.layout, c.length, 400, 64, reference=(3, 6))


def test_the_recipe():
    """Its sizes are those of the released models, also without data and weights."""
    cfg = configurator.configure(train.__file__, [str(Path(train.__file__).parent / "config/kani2.py")])
    codec = {**published_sizes("nanocodec"), "reference": {"rows_per_frame": 0, "silence": [0.0] * 128}}
    with torch.device("meta"):
        model = models.build("kani", dict(codec=codec, tokenizer=dict(vocab_size=64400, bos_id=1, eos_id=2)), vars(cfg))
    assert model.config.audio_step == 1.0 and model.config.drop_repeats and model.reference == "vector"
    assert sum(p.numel() for p in model.parameters()) == 369_846_016 + 6 + 128 * 1024  # LFM2-350M, speeds, projection
    batch, _ = budget.supposed_batch(cfg, codec, model)
    assert batch[2].shape == (len(batch[0]), 1, 128)

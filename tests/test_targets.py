"""parts/targets.py: which layers get an adapter, against what peft chose (golden/lora_targets.json)."""

import json
from pathlib import Path

import pytest

from parts.targets import choose_layers, choose_parameters

GOLDEN = json.loads((Path(__file__).parent / "golden/lora_targets.json").read_text())
CODEC = "codec_model."  # inside transformers' CSM; ours has the codec apart
TABLES = ("embed_tokens", "lm_head", "embed_text_tokens", "embed_audio_tokens", "codebooks_head")
RANK = 4


def shapes(model):
    return {key: shape for key, shape in GOLDEN["parameters"][model].items() if not key.startswith(CODEC)}


def ours(key):
    """A name of our own, with none of the published words in it."""
    return "".join(chr(ord("a") + ord(letter) % 26) if letter != "." else "_" for letter in key) + ".weight"


def layers(model):
    """{our name: published name} of the linear layers."""
    modules = [key.removesuffix(".weight") for key, shape in shapes(model).items() if len(shape) == 2]
    return {ours(f"{m}.weight").removesuffix(".weight"): m for m in modules if not m.endswith(TABLES)}


def published(model):
    """The head of LFM2 has no tensor of its own."""
    names = {ours(key): [key] for key in shapes(model)}
    if model == "lfm2":
        names[ours("model.embed_tokens.weight")].append("lm_head.weight")
    return names


def numbers(model, modules):
    every = GOLDEN["parameters"][model]
    return sum(RANK * sum(every[f"{module}.weight"]) for module in modules)


@pytest.mark.parametrize("case", GOLDEN["targets"], ids=lambda case: f"{case['model']}-{case['target_modules']}")
def test_chooses_what_peft_chooses(case):
    model, targets = case["model"], case["target_modules"]
    wanted = [module for module in case.get("modules") or [] if not module.startswith(CODEC)]
    if not wanted or wanted[0].endswith(TABLES):  # refused by peft too, or tables, which here are trained whole
        message = f"matches '{wanted[0]}', which is no linear layer: lora_also trains tables" if wanted else "matches"
        with pytest.raises(ValueError, match=message):
            choose_layers(layers(model), targets, published(model))
        assert not wanted or choose_parameters(published(model), targets, published(model))
        return
    chosen = choose_layers(layers(model), targets, published(model))
    assert {layers(model)[name] for name in chosen} == set(wanted)
    of_codec = [module for module in case["modules"] if module.startswith(CODEC)]
    assert numbers(model, wanted) + numbers(model, of_codec) == case["trainable"]


NAMES = ["layers.0.attn.q_proj", "layers.0.attn.o_proj", "layers.1.mlp.up_proj", "layers.1.mlp.q_proj", "out_head"]
PUBLISHED = {
    "layers.0.attn.q_proj.weight": ["h.0.self_attn.q.weight"], "layers.1.mlp.up_proj.weight": ["h.1.w1.weight"],
    "layers.0.norm.weight": ["h.0.norm.weight"],
}  # fmt: skip


@pytest.mark.parametrize("targets, chosen", [
    (["attn"], [0, 1]), (["mlp.up_proj", "layers.0"], [0, 1, 2]), (["q_proj"], [0, 3]),  # parts of our names
    (["q"], [0]), (["w1", "o_proj"], [2]), (["h.0.self_attn.q", "w1"], [0, 2]), ("q,w1", [0, 2]), ("w1", [2]),
    (["[qu]p?_proj"], [0, 2, 3]), (["q$", "mlp"], None), (["_proj$", "mlp"], [0, 1, 2, 3]), (["0.*weight"], [0, 1]),
    (["."], range(5)), (r"h\.\d\.w.", [2]), ("all-linear", [0, 1, 2, 3]),
    (["norm"], None), (["q", "norm"], None), ("h.*", None), (["proj"], None), (["("], None), ("(", None), ([], None),
    ("", None), ([7], None),
])  # fmt: skip
def test_names_expressions_and_strings(targets, chosen):
    if chosen is None:
        with pytest.raises(ValueError, match=r"^lora: .*(matches|regular expression|no linear layer is named)"):
            choose_layers(NAMES, targets, PUBLISHED)
    else:
        assert choose_layers(NAMES, targets, PUBLISHED) == {NAMES[i] for i in chosen}


def test_parameters():
    names = ["embedding", "text_head.weight", "text_head.bias", "norm.weight"]
    names_there = {"embedding": ["model.embed_tokens.weight", "lm_head.weight"], "norm.weight": ["model.norm.weight"]}
    for target, found in (("embed_tokens", names[:1]), ("lm_head", names[:1]), ("embedding", names[:1]),
                          ("text_head", names[1:3]), (r"bias$", names[2:3]), ("model.norm", names[3:])):  # fmt: skip
        assert choose_parameters(names, [target], names_there) == set(found)
    assert choose_parameters(names, [], names_there) == set()
    for target in ("head", "(", 3):
        with pytest.raises(ValueError, match="^lora: "):
            choose_parameters(names, [target], names_there)

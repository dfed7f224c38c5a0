"""parts/peft.py: adapters of peft's, in and out, against golden vectors and against peft itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import checkpoint_of, tiny, tiny_valle
from safetensors.torch import load_file, save_file
from test_xtts import write as write_xtts

import weights
from export import export
from layouts import peft_names, published_names
from model import AUDIO, Kani, KaniConfig
from parts import configurator, lora, peft
from weights import from_pretrained, save_checkpoint

GOLDEN = Path(__file__).parent / "golden"
TOKENS = {"text_vocab_size": 20, "n_codebooks": 2, "codebook_size": 16, "text_bos": 1, "text_eos": 2}


@pytest.fixture(scope="module", params=["lfm2", "csm"])
def golden(request, tmp_path_factory):
    """Name, vectors, and the folders of a base and of an adapter on it."""
    folder = tmp_path_factory.mktemp(request.param)
    found = load_file(GOLDEN / f"lora_{request.param}.safetensors")
    given = json.loads((GOLDEN / f"lora_{request.param}.json").read_text())["config"]
    (folder / "base").mkdir()
    kept = {key.removeprefix("weights."): x for key, x in found.items() if key.startswith("weights.")}
    save_file(kept, folder / "base/model.safetensors")
    meaning = {"parlando": TOKENS} if request.param == "lfm2" else {}
    (folder / "base/config.json").write_text(json.dumps({**given, **meaning}))
    shutil.copytree(GOLDEN / f"lora_{request.param}_adapter", folder / "adapter")
    return request.param, found, folder / "base", folder / "adapter"


def outputs(name, model, found):
    """{word of the golden file: our logits or losses}"""
    ids, labels = found["in.input_ids"], found["in.labels"]
    if name == "lfm2":
        logits = model.backbone(model.embed(ids[..., None])) @ model.embedding.T
        return {"logits": logits, "loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}
    tokens = F.pad(ids, (0, 1))
    hidden = model.backbone(model.embed(tokens, torch.full(ids.shape[:2], AUDIO)))
    logits = hidden @ model.codebook0_head.T
    first = F.cross_entropy(logits[0, :-1], labels[0, 1:, 0])
    rows = (labels[0, 1:, 0] != -100).nonzero()[:, 0]
    depth = model.decoder(model.depth_inputs(hidden[0, rows], ids[0, rows + 1, :-1]))[:, 1:]
    scores = torch.einsum("nkd,kvd->nkv", depth, model.decoder_heads)
    others = F.cross_entropy(scores.flatten(0, 1), labels[0, rows + 1, 1:].flatten())
    return {"backbone_logits": logits, "backbone_loss": first, "depth_loss": others, "loss": first + others}


def randomise(parameters):
    generator = torch.Generator().manual_seed(1)
    for p in parameters:
        p.data.normal_(std=0.2, generator=generator)


def compare(name, model, found, before):
    ours = outputs(name, model, found)
    seen = found.get("in.attention_mask", torch.ones(1)).bool()
    for word, x in ours.items():
        theirs = found[f"{before}.{word}"]
        x, theirs = (x[seen], theirs[seen]) if x.ndim == 3 and name == "lfm2" else (x, theirs)
        torch.testing.assert_close(x, theirs, rtol=0, atol=1e-4 if x.ndim else 1e-5)
    return ours["loss"]


def test_golden_logits_losses_gradients_and_merged_weights(golden):
    """Entries for CSM's codec are skipped."""
    name, found, base, folder = golden
    compare(name, from_pretrained(base), found, "base")
    model = from_pretrained(folder, base=str(base))
    compare(name, model, found, "out").backward()
    names, _ = peft_names(from_pretrained(base))
    for layer, adapter in lora.adapters(model)["default"].items():
        key = next(key for key, [(ours, *_)] in names.items() if ours == f"{layer}.weight").removesuffix(".weight")
        for letter, p in (("A", adapter.a), ("B", adapter.b)):
            theirs = found[f"grad.{peft.BEFORE}{key}.lora_{letter}.weight"]
            torch.testing.assert_close(p.grad, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
    lora.merge(model)
    state = model.state_dict()
    merged = {key.removeprefix("merged."): x for key, x in found.items() if key.startswith("merged.")}
    assert merged
    for key, x in merged.items():
        [(ours, make, _)] = names[key]
        torch.testing.assert_close(state[ours], make(x), rtol=0, atol=1e-6)


def test_the_base_is_named_by_the_folder_or_by_base(golden, tmp_path):
    name, found, base, folder = golden
    with pytest.raises(ValueError, match="adapter is an adapter that names no base: name it by --base"):
        from_pretrained(folder)
    shutil.copytree(folder, tmp_path / "a")
    shutil.copytree(base, tmp_path / "a/inside")
    config = json.loads((folder / peft.CONFIG).read_text())
    for recorded, given in ((str(base), ""), ("inside", ""), ("somebody/base", str(base.parent)), ("x", str(base))):
        (tmp_path / "a" / peft.CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": recorded}))
        compare(name, from_pretrained(tmp_path / "a", base=given), found, "out")
    with pytest.raises(FileNotFoundError, match="is an adapter on x, but x does not exist: .*--base"):
        from_pretrained(tmp_path / "a")


def test_targets_choose_what_peft_chose(golden):
    """In a real model, by our names; without the layers of CSM's codec. Tables are refused here: see lora_also."""
    name, _, base, _ = golden
    model = from_pretrained(base)
    names = peft_names(model)[0]
    every = json.loads((GOLDEN / "lora_targets.json").read_text())["targets"]
    cases = [case for case in every if case["model"] == name]
    assert len(cases) == 16
    for case in cases:
        wanted = {key for key in case.get("modules") or [] if not key.startswith("codec_model.")}
        if not wanted or wanted & {"lm_head", "model.embed_tokens"}:
            with pytest.raises(ValueError, match="matches"):
                lora.find_linears(model, case["target_modules"], published_names(model))
            continue
        found = lora.find_linears(model, case["target_modules"], published_names(model))
        assert set(found) == {names[f"{key}.weight"][0][0].removesuffix(".weight") for key in wanted}
        ours = sum(4 * (linear.in_features + linear.out_features) for linear in found.values())
        assert ours == case["trainable"] or name == "csm" and ours < case["trainable"]


@pytest.mark.parametrize("change, message", [
    ({"use_dora": True}, "use_dora = True is not supported"), ({"bias": "all"}, "bias = 'all' is not supported"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is "), ({"alpha_pattern": {"(": 1}}, "alpha_pattern is "),
    ({"rank_pattern": {"[qv]_proj": 5}}, r"lora_a has shape \(4, 24\), not \(5, 24\)"),
    ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"), ({"r": "x"}, "damaged: r is 'x'"),
    ({"r": 5}, r"lora_a has shape \(4, 24\), not \(5, 24\)"), ({"lora_alpha": 0}, "alpha is 0"),
    ({"r": None}, "r is None"),
])  # fmt: skip
def test_what_the_settings_may_not_be(golden, tmp_path, change, message):
    _, _, base, folder = golden
    shutil.copytree(folder, tmp_path / "a")
    config = json.loads((folder / peft.CONFIG).read_text())
    (tmp_path / "a" / peft.CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained(tmp_path / "a", base=str(base))
    assert "\n" not in str(error.value) and str(tmp_path / "a") in str(error.value)


def kani(vocab_size=0):
    torch.manual_seed(0)
    stack = dict(n_layer=3, n_head=4, n_kv_head=2, d_model=32, d_ff=48, max_positions=128, layers="cac", qk_norm=True)
    model = Kani(KaniConfig(30, 3, 16, {**stack, "rope_theta": 1e6}, text_bos=1, text_eos=2))
    for p in model.parameters():
        p.data.normal_(std=0.3)
    return model


MODELS = {"csm": lambda: tiny(backbone=dict(rope_scaling=(32.0, 1.0, 4.0, 8192))), "kani": kani}
ALSO = {"csm": ["codebook0_head", "decoder_heads", "audio_embedding"], "kani": ["embedding"]}


@pytest.fixture(scope="module", params=[("csm", True), ("csm", False), ("kani", True), ("kani", False)],
                ids=lambda x: f"{x[0]}{'-whole' * x[1]}")  # fmt: skip
def exported(request, tmp_path_factory):
    """Family, our model with its adapter, and the folders of its base and of the adapter, as `weights.py export` writes
    them."""
    arch, whole = request.param
    folder = tmp_path_factory.mktemp(arch)
    model = MODELS[arch]().eval()
    export(model, folder / "base")
    lora.add_lora(model, 3, 5, rs=True, targets=["attn", "mlp"], also=ALSO[arch] if whole else [])
    randomise(lora.own_parameters(model, "default").values())
    adapter = {**checkpoint_of(model, base=str(folder / "base")), "arch": arch, "model": lora.adapter_state(model)}
    save_checkpoint(folder / "best.pt", adapter)
    flags = ["export", f"--ckpt={folder / 'best.pt'}", f"--out_dir={folder / 'adapter'}", "--layout=peft"]
    weights.main(configurator.configure(weights.__file__, flags, ["command", "ckpt"]))
    return arch, model, folder / "base", folder / "adapter"


def frames(arch):
    """Ids that transformers' model takes."""
    return torch.randint(0, 16, (1, 9, 4) if arch == "csm" else (1, 9), generator=torch.Generator().manual_seed(0))


def scores(arch, model, ids):
    """Our logits of what follows each of them."""
    if arch == "kani":
        return model.backbone(model.embed(ids[..., None])) @ model.embedding.T
    return model.backbone(model.embed(F.pad(ids, (0, 1)), torch.full(ids.shape[:2], AUDIO))) @ model.codebook0_head.T


def in_transformers(arch, folder):
    transformers = pytest.importorskip("transformers")
    if arch == "kani":
        return transformers.Lfm2ForCausalLM.from_pretrained(folder).eval()
    config = transformers.CsmConfig.from_pretrained(folder, codec_config=TINY_MIMI)
    return transformers.CsmForConditionalGeneration.from_pretrained(folder, config=config).eval()


def test_out_and_in_again(exported):
    _, model, base, folder = exported
    for given in ("", str(base)):
        again = from_pretrained(folder, base=given)
        ours, found = (lora.own_parameters(m, "default") for m in (model, again))
        assert ours.keys() == found.keys()
        assert all(torch.equal(ours[key], found[key]) for key in ours)
    config = json.loads((folder / peft.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 5, True)
    assert config["base_model_name_or_path"] == str(base)


def test_peft_computes_the_same(exported):
    package = pytest.importorskip("peft")
    arch, model, base, folder = exported
    ids = frames(arch)
    theirs = in_transformers(arch, base)
    bare = theirs(ids).logits
    logits = package.PeftModel.from_pretrained(theirs, folder).eval()(ids).logits
    assert (logits - bare).abs().max() > 0.1
    torch.testing.assert_close(scores(arch, model, ids), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("arch", MODELS)
def test_what_peft_saves_is_read(arch, tmp_path):
    """Layers by name, and whole modules; where transformers ties two, peft has to train them as one."""
    package = pytest.importorskip("peft")
    model = MODELS[arch]().eval()
    export(model, tmp_path / "base")
    theirs = in_transformers(arch, tmp_path / "base")
    also = ["lm_head", "embed_text_tokens"] if arch == "csm" else ["embed_tokens", "lm_head"]
    config = package.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], modules_to_save=also,
                                ensure_weight_tying=arch == "kani")  # fmt: skip
    theirs = package.get_peft_model(theirs, config)
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = from_pretrained(tmp_path / "adapter", base=str(tmp_path / "base"))
    ids = frames(arch)
    torch.testing.assert_close(scores(arch, ours, ids), theirs.eval()(ids).logits, rtol=0, atol=1e-4)
    assert (scores(arch, ours, ids) - scores(arch, model, ids)).abs().max() > 0.1


@pytest.mark.parametrize("rs", [False, True])
@pytest.mark.parametrize("arch", MODELS)
def test_layers_with_a_rank_and_a_scale_of_their_own(arch, rs, tmp_path):
    """As peft computes them, also where several patterns match; and the zeros that fill them up stay zero."""
    package = pytest.importorskip("peft")
    model = MODELS[arch]().eval()
    export(model, tmp_path / "base")
    theirs = in_transformers(arch, tmp_path / "base")
    first = "^backbone_model.layers.0.self_attn.[qk]_proj" if arch == "csm" else "^model.layers.1.self_attn.[qk]_proj"
    config = package.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "k_proj", "v_proj"], use_rslora=rs,
                                rank_pattern={first: 1, "q_proj": 2, "v_proj": 4},
                                alpha_pattern={"k_proj": 7, "self_attn.v_proj": 1.5})  # fmt: skip
    theirs = package.get_peft_model(theirs, config)
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = from_pretrained(tmp_path / "adapter", base=str(tmp_path / "base"))
    ids = frames(arch)
    logits = scores(arch, ours, ids)
    torch.testing.assert_close(logits, theirs.eval()(ids).logits, rtol=0, atol=1e-4)
    ranks = set()
    logits.square().mean().backward()
    for adapter in lora.adapters(ours)["default"].values():
        used = adapter.a.abs().sum(1) > 0
        ranks.add(int(used.sum()))
        assert adapter.a.shape[0] == 4 and not adapter.b[:, ~used].any()
        if adapter.a.grad is not None:  # CSM's depth decoder is not asked
            assert not adapter.a.grad[~used].any() and not adapter.b.grad[:, ~used].any()
            assert adapter.a.grad[used].any() and adapter.b.grad[:, used].any()
    assert ranks == ({1, 2, 3, 4} if arch == "csm" else {1, 4})


@pytest.fixture(scope="module")
def xtts(tmp_path_factory):
    """The folder of a published XTTS."""
    return write_xtts(tmp_path_factory.mktemp("xtts"))


def module_tree(base):
    """The layers of the authors' GPT of XTTS under their names, as the kinds of modules that they are there."""
    layers = pytest.importorskip("transformers").pytorch_utils
    root = torch.nn.Module()
    tensors = torch.load(base / "model.pth")["model"]
    tensors = {key.removeprefix("gpt."): x for key, x in tensors.items() if key.startswith("gpt.")}
    for key, x in tensors.items():
        path, _, leaf = key.rpartition(".")
        if leaf != "weight" or x.ndim < 2:
            continue
        if x.ndim == 3:
            layer = torch.nn.Conv1d(x.shape[1], x.shape[0], 1)
        else:
            layer = layers.Conv1D(*x.T.shape) if path.startswith("gpt.h.") else torch.nn.Linear(*x.T.shape)
        layer.weight.data = x.clone()
        if (bias := tensors.get(f"{path}.bias")) is not None:
            layer.bias.data = bias.clone()
        owner = root
        for name in path.split(".")[:-1]:
            if name not in dict(owner.named_children()):
                owner.add_module(name, torch.nn.Module())
            owner = owner.get_submodule(name)
        owner.add_module(path.split(".")[-1], layer)
    return root


def compare_merged(ours, theirs, base):
    """Both with their adapters merged; they differ from the base."""
    lora.merge(ours)
    state, before = (dict(model.named_parameters()) for model in (ours, from_pretrained(base)))
    theirs = dict(theirs.merge_and_unload().named_parameters())
    changed = set()
    for key, parts in peft_names(ours)[0].items():
        for name, make, _ in parts if key in theirs else ():
            torch.testing.assert_close(state[name], make(theirs[key]), rtol=0, atol=1e-5)
            changed |= set() if torch.equal(state[name], before[name]) else {name.split(".")[-2]}
    return changed


@pytest.mark.parametrize("rs", [False, True])
def test_an_adapter_of_xtts_goes_out(xtts, rs, tmp_path):
    """Queries and values of three become one layer there, of twice the rank."""
    package = pytest.importorskip("peft")
    model = from_pretrained(xtts)
    lora.add_lora(model, 2, 3, rs=rs, targets=[r"backbone.*[qv]_proj", "o_proj", "mlp", "qkv_proj"], also=["text_head"])
    for p in lora.own_parameters(model, "default").values():
        p.data.normal_(std=0.2)
    save_checkpoint(tmp_path / "best.pt", {**checkpoint_of(model, base=str(xtts)), "arch": "xtts",
                                           "model": lora.adapter_state(model)})  # fmt: skip
    said = weights.export_adapter(tmp_path / "best.pt", tmp_path / "adapter")
    assert said.endswith("adapter is written: peft adds it to its base as published")
    theirs = package.PeftModel.from_pretrained(module_tree(xtts), tmp_path / "adapter")
    again = from_pretrained(tmp_path / "adapter")
    assert compare_merged(model, theirs, xtts) == {"q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "qkv_proj",
                                                   "text_head"}  # fmt: skip
    lora.merge(again)
    for name, p in again.named_parameters():
        torch.testing.assert_close(p, model.get_parameter(name), rtol=0, atol=1e-6)


def test_an_adapter_of_xtts_comes_in(xtts, tmp_path):
    """Beside the layers that a public recipe for it names."""
    package = pytest.importorskip("peft")
    layers = ["c_attn", "c_proj", "c_fc", "qkv", "proj_out", "to_q", "to_kv", "to_out"]
    theirs = package.get_peft_model(module_tree(xtts), package.LoraConfig(r=2, lora_alpha=3, target_modules=layers))
    for p in theirs.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = from_pretrained(tmp_path / "adapter", base=str(xtts))
    assert compare_merged(ours, theirs, xtts) == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj",
                                                  "qkv_proj", "kv_proj"}  # fmt: skip


# what a CSM of transformers has inside, as small as it goes
TINY_MIMI = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_filters=4,
                 intermediate_size=16, codebook_size=16, codebook_dim=8, vector_quantization_hidden_dimension=8,
                 num_quantizers=4, num_semantic_quantizers=1, upsample_groups=16, head_dim=8)  # fmt: skip


def rewritten(folder, to, change):
    """A copy of an adapter whose tensors {key: tensor} went through `change`."""
    shutil.copytree(folder, to)
    save_file(change(load_file(folder / peft.WEIGHTS[0])), to / peft.WEIGHTS[0])
    return to


def test_tied_parameters_are_saved_as_both_or_refused(exported, tmp_path):
    arch, _, base, folder = exported
    head = f"{peft.BEFORE}lm_head.weight"
    if arch != "kani" or head not in load_file(folder / peft.WEIGHTS[0]):
        pytest.skip("nothing tied")
    differs = rewritten(folder, tmp_path / "a", lambda found: {**found, head: found[head] + 1})
    with pytest.raises(ValueError, match="differs from its twin, to which the model ties it"):
        from_pretrained(differs, base=str(base))
    alone = rewritten(folder, tmp_path / "b", lambda found: {key: x for key, x in found.items() if key != head})
    with pytest.raises(ValueError, match="lacks lm_head.weight, which the model ties"):
        from_pretrained(alone, base=str(base))


def test_what_the_files_may_not_be(exported, tmp_path):
    _, _, base, folder = exported
    for key, message in (("model.layers.9.self_attn.q_proj.lora_A.weight", "for which the model has no layer"),
                         ("nothing.bias", "for which the model has no place"),
                         ("lm_head.lora_A.weight", "but embeddings and heads get no adapter here: merge it by peft"),
                         ("lm_head.lora_embedding_A", "but embeddings and heads get no adapter here")):  # fmt: skip
        bad = rewritten(folder, tmp_path / key, lambda found, key=key: {**found, peft.BEFORE + key: torch.zeros(3, 3)})
        with pytest.raises(ValueError, match=message):
            from_pretrained(bad, base=str(base))
    (tmp_path / "empty").mkdir()
    shutil.copy(folder / peft.CONFIG, tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="empty holds adapter_config.json, but no adapter_model.safetensors"):
        from_pretrained(tmp_path / "empty", base=str(base))


def test_what_cannot_be_exported(tmp_path):
    model = tiny()
    save_checkpoint(tmp_path / "base.pt", checkpoint_of(model))
    flags = [f"--out_dir={tmp_path / 'out'}", "--layout=peft"]
    with pytest.raises(ValueError, match="base.pt holds no adapter: layout = 'peft' is for those"):
        words = ["export", f"{tmp_path}/base.pt", *flags]
        weights.main(configurator.configure(weights.__file__, words, ["command", "ckpt"]))
    with pytest.raises(ValueError, match="no code adds adapters of peft's to the family 'valle'"):
        peft_names(tiny_valle())
    rows = {"text_embedding.weight": torch.zeros(2, 32)}
    lora.add_lora(model, 2, 2, rows=rows)
    with pytest.raises(ValueError, match="text_embedding.weight: the adapter has new rows, which peft cannot express"):
        peft.write(tmp_path / "out", lora.adapter_state(model), peft_names(model)[0])
    assert not (tmp_path / "out").exists()

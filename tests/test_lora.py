import copy
import io
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model

from model import CSM, CSMConfig, contract_check
from parts.lora import (
    LoRALinear,
    adapter_state,
    adapters,
    add_lora,
    base_fingerprint,
    cast_base,
    load_adapter,
    merge,
    set_adapter,
    use_adapter,
)
from weights import load_weights

STACK = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, max_positions=128)
K, V = 4, 16


def csm(seed=0, **options):
    """A small CSM with weights wide enough for logits that differ."""
    torch.manual_seed(seed)
    model = CSM(CSMConfig(text_vocab_size=30, n_codebooks=K, codebook_size=V, text_bos=1, text_eos=2,
                          backbone=STACK, decoder={**STACK, "d_model": 16},
                          **{"decoder_fraction": 0.5, **options}))  # fmt: skip
    for p in model.parameters():
        if p.ndim > 1:
            p.data.normal_(std=0.3)
    return model


class Small(nn.Module):
    """Linear layers with and without bias; the last one is of another class."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 8), nn.Linear(8, 5, bias=False), nn.Linear(5, 3)
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        return self.out(F.silu(self.two(F.silu(self.one(x)))))


def small(seed=0):
    torch.manual_seed(seed)
    return Small()


def utterance(seed=0, n=5, T=6):
    rng = np.random.default_rng(seed)
    return rng.integers(3, 30, n), rng.integers(0, V, (T, K))


def batch(model):
    rows = [model.layout(*utterance(seed)) for seed in range(3)]
    return tuple(torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))


def logits(model):
    with torch.no_grad():
        return model.eval().teacher_forced_logits(*utterance())


def randomise(model, name="default", seed=1, std=0.1):
    """Adapters as after training: B is not zero any more."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters(model)[name].values():
        for p in adapter.parameters():
            p.data.normal_(std=std, generator=generator)
    return model


def base_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# against peft


def beside_peft(model, rank=4, alpha=10, dropout=0.0, rs=False, trained=False):
    """The same base with our adapter and with peft's, with the same matrices."""
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rs, target_modules=r".*_proj$")
    theirs = inject_adapter_in_model(config, copy.deepcopy(model))
    add_lora(model, rank, alpha, dropout, rs, targets=["_proj$"])
    theirs_by_name = {name: m for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert list(theirs_by_name) == list(adapters(model)["default"])
    if trained:
        randomise(model)
    for name, adapter in adapters(model)["default"].items():
        theirs_by_name[name].lora_A["default"].weight.data = adapter.a.detach().clone()
        theirs_by_name[name].lora_B["default"].weight.data = adapter.b.detach().clone()
    return model, theirs, theirs_by_name


@pytest.mark.parametrize("dropout, rs, recompute", [(0.0, False, False), (0.2, True, False), (0.2, False, True)])
def test_training_and_merging_equal_peft(dropout, rs, recompute):
    """Losses and matrices over five steps with dropout from the same random numbers, then the merged weights."""
    ours, theirs, layers = beside_peft(csm(recompute=recompute).double(), dropout=dropout, rs=rs)
    losses = []
    for model in (ours, theirs):
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-2)
        for step in range(5):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss, _ = model(*batch(model))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[4] < losses[0] - 0.1
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-9)
    tight = dict(rtol=1e-6, atol=1e-9)
    for name, adapter in adapters(ours)["default"].items():
        torch.testing.assert_close(adapter.a, layers[name].lora_A["default"].weight, **tight)
        torch.testing.assert_close(adapter.b, layers[name].lora_B["default"].weight, **tight)
    merge(ours)
    for name, layer in layers.items():
        layer.merge()
        torch.testing.assert_close(ours.get_submodule(name).weight, layer.get_base_layer().weight, **tight)


@pytest.mark.parametrize("rs", [False, True])
def test_gradients_equal_peft(rs):
    ours, theirs, layers = beside_peft(csm().double(), rs=rs, trained=True)
    for model in (ours, theirs):
        torch.manual_seed(0)
        model.train()(*batch(model))[0].backward()
    for name, adapter in adapters(ours)["default"].items():
        torch.testing.assert_close(adapter.a.grad, layers[name].lora_A["default"].weight.grad, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(adapter.b.grad, layers[name].lora_B["default"].weight.grad, rtol=1e-6, atol=1e-9)


def test_bfloat16_base_equals_peft():
    """peft, too, adds in float32 and rounds once."""
    ours, _, layers = beside_peft(csm().bfloat16(), trained=True)
    for name, layer in layers.items():
        x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
        y = ours.get_submodule(name)(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)


def test_initialisation_equals_peft():
    """The same seed draws the same A; B is zero, so that nothing changes yet."""
    model = csm()
    before = logits(model)
    ours, _, layers = beside_peft(model, rank=3)
    torch.manual_seed(5)
    fresh = csm()
    torch.manual_seed(5)
    add_lora(fresh, 3, 6, targets=["_proj$"])
    torch.manual_seed(5)
    for name, adapter in adapters(fresh)["default"].items():
        layers[name].reset_lora_parameters("default", True)
        assert torch.equal(adapter.a, layers[name].lora_A["default"].weight)
        assert not adapter.b.any() and adapter.a.any()
    assert torch.equal(logits(ours), before)


# ---------------------------------------------------------------------------------------------------------------------
# training


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_only_adapters_are_trained(base_dtype):
    model = csm()
    add_lora(model, 2, 4, dropout=0.1)
    cast_base(model, base_dtype)
    before, buffers = base_of(model), dict(model.named_buffers())
    assert {tensor.dtype for tensor in before.values()} == {base_dtype}
    assert {tensor.dtype for tensor in buffers.values()} == {torch.float32, torch.int64}  # positions stay exact
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(*batch(model))[0].backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad == ("lora" in name), name
        assert p.dtype == (torch.float32 if "lora" in name else base_dtype)
    assert_equal(base_of(model), before)


def test_gradients_are_exact():
    """In float64, where the adapter is float64 too, against finite differences."""
    model = small().double()
    add_lora(model, 2, 3, rs=True)
    randomise(model, std=0.5)
    adapter = adapters(model)["default"]["one"]
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def forward(a, b, x):
        weights = {"one.lora_default.a": a, "one.lora_default.b": b}
        return torch.func.functional_call(model, weights, x)

    assert torch.autograd.gradcheck(forward, (adapter.a, adapter.b, x))


@pytest.mark.parametrize("rs, scale", [(False, 2.0), (True, 4.0)])
def test_scale(rs, scale):
    model = small()
    add_lora(model, 4, 8, rs=rs, targets=["one"])
    randomise(model)
    adapter, x = adapters(model)["default"]["one"], torch.randn(2, 6)
    expected = F.linear(x, model.one.weight + scale * adapter.b @ adapter.a, model.one.bias)
    torch.testing.assert_close(model.one(x), expected)


def test_dropout_in_training_only():
    """Also for an adapter that is added to a model in eval mode."""
    model = small().eval()
    add_lora(model, 4, 8, dropout=0.5)
    randomise(model)
    x = torch.randn(200, 6)
    assert torch.equal(model(x), model(x))
    layer = model.one.train()
    with torch.no_grad():
        bare, whole = F.linear(x, layer.weight, layer.bias), layer.eval()(x)
        seen = torch.stack([layer.train()(x) for _ in range(300)])
    assert not torch.equal(seen[0], seen[1])
    scale = float((whole - bare).abs().max())
    assert ((seen.mean(0) - whole).abs() < 0.2 * scale).all() and ((seen[0] - whole).abs() > 0.2 * scale).any()


def test_autocast():
    model = csm()
    add_lora(model, 2, 4)
    randomise(model)
    x = torch.randn(2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.projection(x)
        model.train()(*batch(model))[0].backward()
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), model.projection(x), rtol=0.02, atol=0.05)
    for p in model.parameters():
        assert p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any())


@pytest.mark.slow
def test_compiles_whole():
    model = small().eval()
    add_lora(model, 2, 4, name="a")
    add_lora(model, 3, 6, name="b")
    randomise(randomise(model, "a"), "b")
    net, x, seen = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(4, 6), []
    for name in ("a", "b", None, "a"):
        use_adapter(model, name)
        seen.append(net(x))
        torch.testing.assert_close(seen[-1], model(x))
    assert not torch.allclose(seen[0], seen[1]) and torch.equal(seen[0], seen[3])


# ---------------------------------------------------------------------------------------------------------------------
# several adapters, saving, merging


def test_one_of_several_is_active():
    model = csm()
    bare = logits(model)
    add_lora(model, 2, 4, targets=["q_proj"], name="ann")
    add_lora(model, 3, 4, targets=["attn", "^projection$"], name="bob-2")
    heard = {}
    for name in ("ann", "bob-2"):
        randomise(model, name)
        use_adapter(model, name)
        heard[name] = logits(model)
    alone = csm()
    add_lora(alone, 2, 4, targets=["q_proj"])
    assert torch.equal(logits(randomise(alone)), heard["ann"])
    assert not torch.allclose(heard["ann"], heard["bob-2"])
    use_adapter(model, None)
    assert torch.equal(logits(model), bare)
    use_adapter(model, "ann")
    assert torch.equal(logits(model), heard["ann"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{path}.lora_bob-2.{key}" for path in adapters(model)["bob-2"] for key in "ab"
    }  # the newest is the one that is trained


def test_generation_agrees_with_training():
    model = csm()
    add_lora(model, 2, 4)
    report = contract_check(randomise(model), *utterance())
    assert report["max_difference"] < 1e-3


def test_copies_go_their_own_way():
    """As for averaged weights."""
    model = csm()
    add_lora(model, 2, 4)
    mean = copy.deepcopy(randomise(model))
    before = logits(mean)
    assert torch.equal(logits(model), before)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in mean.parameters()}
    randomise(model, seed=2)
    use_adapter(model, None)
    assert torch.equal(logits(mean), before)
    assert [name for name, _ in mean.named_parameters()] == [name for name, _ in model.named_parameters()]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    size = file.tell()
    file.seek(0)
    return torch.load(file, weights_only=True), size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_alone_and_loaded(dtype):
    model = csm()
    add_lora(model, 2, 5, dropout=0.3, rs=True, targets=["attn"])
    expected, adapter = logits(randomise(model)), adapter_state(model)
    assert all("lora" in key and weight.dtype == torch.float32 for key, weight in adapter["weights"].items())
    state, size = through_a_file(adapter)
    numbers = sum(weight.numel() for weight in state["weights"].values())
    assert size < 4 * numbers + 1000 * len(state["weights"])
    randomise(model, seed=2)
    assert_equal(adapter["weights"], state["weights"])  # what was given is no view of the model
    other = csm().to(dtype)
    load_adapter(other, state, "again")
    if dtype == torch.float32:
        assert torch.equal(logits(other), expected)
    else:  # the same base, only rounded
        assert logits(other).dtype == torch.bfloat16 and not torch.allclose(logits(csm().bfloat16()), logits(other))
    assert_equal(adapter_state(other, "again").pop("weights"), state.pop("weights"))
    assert {k: v for k, v in adapter_state(other, "again").items() if k != "weights"} == state == dict(
        rank=2, alpha=5, dropout=0.3, rs=True, base=base_fingerprint(csm())
    )  # fmt: skip
    other.train()(*batch(other))[0].backward()  # it can be trained on
    assert all(p.grad.any() for adapter in adapters(other)["again"].values() for p in adapter.parameters())


def test_trained_on_a_bfloat16_base_and_loaded_on_float32():
    model, other = csm(), csm()
    add_lora(model, 2, 4)
    cast_base(model, torch.bfloat16)
    load_adapter(other, adapter_state(randomise(model)))
    assert other.projection.weight.dtype == torch.float32
    assert_equal(adapter_state(other)["weights"], adapter_state(model)["weights"])


def test_merged():
    """Plain layers with the base's names, whose logits are those of base and adapter; the checkpoint is a CSM's."""
    model = csm()
    bare, keys = logits(model), model.state_dict().keys()
    add_lora(model, 4, 8, targets=["attn", "mlp", "projection"])
    add_lora(model, 4, 8, targets=["q_proj"], name="other")
    use_adapter(model, "default")
    expected = logits(randomise(randomise(model), "other"))
    assert (expected - bare).abs().max() > 0.1
    merge(model)
    assert (logits(model) - expected).abs().max() < 1e-4
    assert model.state_dict().keys() == keys
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert all(vars(m).keys() == vars(n).keys() for m, n in zip(model.modules(), csm().modules(), strict=True))
    plain = csm(seed=1)
    load_weights(plain, model.state_dict())
    assert torch.equal(logits(plain), logits(model))
    add_lora(model, 4, 8)  # and on it goes


def test_merged_into_bfloat16_rounds_once():
    model = small().bfloat16()
    add_lora(model, 4, 8, targets=["one"])
    adapter = adapters(randomise(model))["default"]["one"]
    expected = (model.one.weight.float() + 2 * adapter.b @ adapter.a).bfloat16()
    merge(model)
    assert torch.equal(model.one.weight, expected)


def test_a_layer_in_two_places_and_one_at_the_root():
    twice = nn.Sequential(layer := nn.Linear(4, 4), nn.SiLU(), layer)
    for model in (twice, nn.Linear(4, 4)):
        x, bare = torch.randn(3, 4), copy.deepcopy(model)
        add_lora(model, 2, 4)
        expected = randomise(model)(x)
        load_adapter(bare, adapter_state(model))
        assert torch.equal(bare(x), expected)
        torch.testing.assert_close(merge(model) or model(x), expected)


def test_only_the_named_layers_are_loaded():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4)), "a_0": nn.Linear(4, 4)})
    bare = copy.deepcopy(model)
    add_lora(model, 2, 4, targets=[r"a\.0"])
    load_adapter(bare, adapter_state(model))
    assert list(adapters(bare)["default"]) == ["a.0"]


def test_base_checkpoints_still_load():
    model = csm()
    add_lora(model, 2, 4)
    missing, left = model.load_state_dict(csm(seed=3).state_dict(), strict=False)
    assert not left and missing and all("lora" in name for name in missing)
    assert_equal(base_of(model), csm(seed=3).state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# fingerprint, refusals


def test_fingerprint():
    model = csm()
    own = base_fingerprint(model)
    assert base_fingerprint(copy.deepcopy(model).bfloat16()) == own
    add_lora(model, 2, 4)
    assert base_fingerprint(randomise(model)) == own
    merge(model)
    others = [base_fingerprint(model), base_fingerprint(csm(seed=1))]
    for change in ("one value", "its shape", "its name", "two swapped"):
        model = csm()
        weight = model.backbone.layers[1].mlp.up_proj.weight
        if change == "one value":
            weight.data[7, 3] *= 1.01
        elif change == "its shape":
            model.codebook0_head = nn.Parameter(model.codebook0_head.reshape(-1, 1))
        elif change == "its name":
            model.codebook1_head = model.codebook0_head
            del model.codebook0_head
        else:
            weight.data[[0, 1]] = weight.data[[1, 0]]
        others.append(base_fingerprint(model))
    assert len({own, *others}) == 7


def refused(call, *words):
    """One line that holds these words."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("options, words", [
    (dict(rank=0), ["rank = 0", "rank >= 1"]),
    (dict(rank=10**9), ["rank = 1000000000 is above"]),
    (dict(alpha=0), ["alpha = 0", "alpha > 0"]),
    (dict(alpha=float("nan")), ["alpha = nan"]),
    (dict(dropout=1.0), ["dropout = 1.0", "dropout < 1"]),
    (dict(dropout=-0.1), ["dropout = -0.1"]),
    (dict(targets=[]), ["no linear layer is named"]),
    (dict(targets=["one", "tow"]), ["'tow' matches no nn.Linear", "one, two, out"]),
    (dict(targets="attention"), ["'attention' matches no nn.Linear"]),  # its weights are used past its forward
    (dict(targets=["("]), ["'(' is not a regular expression"]),
    (dict(targets=[7]), ["7 is not a regular expression"]),
    (dict(name="a.b"), ["'a.b'", "letters"]),
    (dict(name=""), ["''", "letters"]),
])  # fmt: skip
def test_refused(options, words):
    model = small()
    refused(lambda: add_lora(model, **{"rank": 2, "alpha": 4, **options}), *words)
    assert all(p.requires_grad for p in model.parameters()) and not adapters(model)


def test_refused_names():
    model = small()
    refused(lambda: use_adapter(model, "ann"), "unknown adapter 'ann'", "none")
    add_lora(model, 2, 4, name="ann")
    refused(lambda: add_lora(model, 2, 4, name="ann"), "'ann' already")
    for call in (use_adapter, merge, adapter_state):
        refused(lambda call=call: call(model, "bob"), "unknown adapter 'bob'", "ann")
    for name in ("train", "forward", "None", "weight"):  # names that modules have themselves
        add_lora(model, 2, 4, name=name)
    use_adapter(model, None)
    assert torch.equal(model(torch.ones(6)), small()(torch.ones(6)))


def test_refused_shared_weight():
    model = small()
    model.table = nn.Embedding(8, 6)
    model.one.weight = model.table.weight
    refused(lambda: add_lora(model, 2, 4), "one.weight", "leave it out")
    add_lora(model, 2, 4, targets=["two", "out"])


def test_refused_adapters():
    model = small()
    add_lora(model, 2, 4, targets=["two"])
    state = adapter_state(model)
    other, own = small(seed=1), small()
    refused(lambda: load_adapter(other, state, "ann"), "'ann'", state["base"], base_fingerprint(other))
    refused(lambda: load_adapter(own, {"weights": {}, "rank": 2}), "lacks alpha, dropout, rs, base")
    weights = state["weights"]
    a = weights["two.lora_a"]
    for bad, word in (({**weights, "two.lora_a": a[:1]}, "two.lora_a has shape"), ({}, "no linear layer is named"),
                      ({**weights, "two.lora_c": a}, "holds two.lora_c"), ({"two.lora_a": a}, "lacks two.lora_b"),
                      ({**weights, "two.lora_a": a * math.nan}, "two.lora_a holds NaN"),
                      ({**weights, "two.lora_a": a.long()}, "two.lora_a is int64, not float32"),
                      ({**weights, "two.lora_a": [1.0]}, "two.lora_a is [1.0], not a tensor"),
                      ({"ghost.lora_a": a}, "ghost"), ([1], "weights is [1]"), ({5: a}, "weights is")):  # fmt: skip
        refused(lambda bad=bad: load_adapter(own, {**state, "weights": bad}), word)
    for field, value in (("rank", 0), ("rank", "x"), ("alpha", math.nan), ("dropout", 1), ("rs", 1), ("base", 5)):
        refused(lambda bad={field: value}: load_adapter(own, {**state, **bad}), f"'default' is damaged: {field} is")
    refused(lambda: set_adapter(model, {**state, "weights": None}), "weights is None")
    assert all(p.requires_grad for m in (other, own) for p in m.parameters()) and not adapters(own)
    load_adapter(own, state)
    refused(lambda: load_adapter(own, state), "already")


def test_an_adapter_that_is_there_takes_other_matrices():
    model, other = csm(), csm()
    add_lora(model, 2, 4, targets=["attn"])
    add_lora(other, 2, 4, targets=["attn"])
    randomise(model)
    set_adapter(other, adapter_state(model))
    assert torch.equal(logits(other), logits(model))
    add_lora(model, 3, 4, targets=["attn"], name="larger")
    with pytest.raises(ValueError, match=r"adapter 'default': \S+lora_a has shape \(3, 32\), not \(2, 32\)"):
        set_adapter(other, adapter_state(model, "larger"))

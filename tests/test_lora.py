import copy
import io
import math
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from model import (
    ARCHS,
    CSM,
    GPT2,
    LFM2,
    VALLE,
    CSMConfig,
    KaniConfig,
    VallEConfig,
    XTTSConfig,
    contract_check,
)
from parts import lora
from parts.lora import (
    LoRALinear,
    adapter_state,
    adapters,
    add_lora,
    base_fingerprint,
    base_parameters,
    cast_base,
    load_adapter,
    merge,
    own_parameters,
    set_adapter,
    use_adapter,
)
from weights import from_pretrained, load_checkpoint, load_model, load_weights, save_checkpoint

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
def test_training_and_merging_equal_peft(dropout, rs, recompute, monkeypatch):
    """Losses and matrices over five steps with dropout from the same random numbers, then the merged weights."""
    monkeypatch.setattr(lora, "dropped", lambda x, p: (F.dropout(x, p), 1.0))  # ours draws others on a CPU
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


class Products(TorchDispatchMode):
    """The shapes of the two matrices of each product."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket == torch.ops.aten.mm:
            self.shapes.append(tuple(tuple(x.shape) for x in args))
        return function(*args, **(kwargs or {}))


def test_checkpointing_repeats_no_product_with_a_frozen_weight():
    model = nn.Sequential(nn.Linear(12, 20, bias=False))
    add_lora(model, 2, 4, dropout=0.1)
    x = torch.randn(6, 12, requires_grad=True)
    with Products() as made:
        y = checkpoint(model, x, use_reentrant=False)
        y.sum().backward()
    assert made.shapes.count(((6, 12), (12, 20))) == 1
    assert made.shapes.count(((6, 12), (12, 2))) == 2  # that of the adapter is repeated


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


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropped(p, dtype):
    """The share that is set to 0, evenly spread; the gradient is that of what was kept."""
    torch.manual_seed(0)
    x = torch.randn(3, 331, 333, dtype=dtype, requires_grad=True)
    y, kept = lora.dropped(x, p)
    out = y == 0
    assert kept == pytest.approx(1 - p, abs=2**-16) and 0 < kept < 1
    assert float(out.double().mean()) == pytest.approx(1 - kept, abs=5 * math.sqrt((1 - kept) / x.numel()))
    for lane in range(4):  # four elements share a number of 64 bits
        assert float(out.flatten()[lane::4].double().mean()) == pytest.approx(p, abs=0.01)
    both = (out.flatten()[1:] & out.flatten()[:-1]).double().mean()
    assert float(both) == pytest.approx(p * p, abs=0.01)
    assert torch.equal(y[~out], x[~out]) and y.dtype == dtype
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, (~out).to(dtype))
    assert lora.dropped(x, 0) == (x, 1.0)


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


# ---------------------------------------------------------------------------------------------------------------------
# whole parameters and new rows


def with_tables(model, seed=1, name="default"):
    """An adapter with a head of its own, and two more text ids."""
    rows = {"text_embedding.weight": torch.randn(2, 32)}
    add_lora(model, 2, 4, targets=["q_proj"], also=["codebook0_head", "decoder_heads"], rows=rows, name=name)
    generator = torch.Generator().manual_seed(seed)
    for p in own_parameters(model, name).values():
        p.data.normal_(std=0.3, generator=generator)
    return model


def test_tables_are_trained_and_the_base_is_not():
    """The names of all that is trained tell the optimizers that it is the adapter's."""
    model = with_tables(csm())
    before = {name: p.clone() for name, p in base_parameters(model).items()}
    assert base_fingerprint(model) == base_fingerprint(csm())
    assert before.keys() == dict(csm().named_parameters()).keys()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.5)
    rows = [model.layout(np.array([5, 30, 31]), utterance(seed)[1]) for seed in range(3)]
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(*(torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True)))[0].backward()
        optimizer.step()
    own = own_parameters(model, "default").values()
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(map(id, own))
    assert all(p.grad.any() for p in own)
    assert_equal(base_parameters(model), before)
    table = model.text_embedding.weight
    assert len(table) == 32 and torch.equal(table[:30], before["text_embedding.weight"])


def test_a_model_with_tables_equals_one_that_has_them_itself():
    model = with_tables(csm())
    own = own_parameters(model, "default")
    plain = csm()
    add_lora(plain, 2, 4, targets=["q_proj"])
    load_state = {key: own[key].detach() for key in own if key.endswith(("lora_a", "lora_b"))}
    set_adapter(plain, {**adapter_state(plain), "weights": load_state})
    plain.text_embedding.weight = nn.Parameter(model.text_embedding.weight.detach())
    plain.codebook0_head = nn.Parameter(own["codebook0_head.lora_whole"].detach())
    plain.decoder_heads = nn.Parameter(own["decoder_heads.lora_whole"].detach())
    assert torch.equal(logits(model), logits(plain)) and not torch.allclose(logits(model), logits(csm()))
    assert contract_check(model, np.array([30, 31]), utterance()[1])["max_difference"] < 1e-3
    expected = logits(copy.deepcopy(model))
    merge(model)
    torch.testing.assert_close(logits(model), expected)
    assert type(model) is CSM and list(model.state_dict()) == list(csm().state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in csm().named_parameters()]


def test_tables_are_saved_loaded_and_switched():
    model, other = with_tables(csm()), csm()
    add_lora(other, 2, 4, targets=["q_proj"], name="plain")
    bare, expected = logits(csm()), logits(model)
    state, _ = through_a_file(adapter_state(model))
    load_adapter(other, state, "tables")
    assert torch.equal(logits(other), expected)
    assert_equal(adapter_state(other, "tables")["weights"], state["weights"])
    for name in ("plain", None):
        use_adapter(other, name)
        assert torch.equal(logits(other), bare)
    load_adapter(other, adapter_state(with_tables(csm(), seed=2)), "more")
    more, twin = logits(other), copy.deepcopy(other)
    use_adapter(other, "tables")
    assert torch.equal(logits(other), expected) and torch.equal(logits(twin), more) and not torch.equal(more, expected)
    merge(twin, "tables")
    torch.testing.assert_close(logits(twin), expected)
    assert torch.equal(logits(other), expected)  # a copy is merged by itself
    set_adapter(other, adapter_state(with_tables(csm(), seed=2)), "tables")
    assert torch.equal(logits(other), more)
    cast_base(other, torch.bfloat16)
    assert other.codebook0_head.dtype == torch.bfloat16
    assert {p.dtype for p in own_parameters(other, "tables").values()} == {torch.float32}


def test_refused_tables():
    model = small()
    refused(lambda: add_lora(model, 2, 4, also=["tow"]), "'tow' matches no parameter")
    refused(lambda: add_lora(model, 2, 4, targets=["one"], also=["one"]), "rank = 2 is above 0")
    state = adapter_state(with_tables(csm()))
    weights, other = state["weights"], csm()
    key, head = "text_embedding.weight.lora_rows", "codebook0_head.lora_whole"
    for bad, word in (({key: weights[key][:, :3]}, f"{key} has shape (2, 3), not (2, 32)"), ({key: 3}, "not a tensor"),
                      ({key: weights[key][:0]}, "has shape (0, 32), not (1, 32)"),
                      ({head: weights[head][1:]}, "has shape"),
                      ({"ghost.lora_whole": weights[key]}, "holds ghost.lora_whole"),
                      ({head: weights[head] * math.nan}, "holds NaN")):  # fmt: skip
        refused(lambda bad=bad: load_adapter(other, {**state, "weights": {**weights, **bad}}), word)
    assert type(other) is CSM and not adapters(other)


# ---------------------------------------------------------------------------------------------------------------------
# the files of adapters, and their bases

GPT = {**STACK, **GPT2, "n_kv_head": 4}
SIZES = dict(text_vocab_size=30, n_codebooks=K, codebook_size=V)
BASES = {
    "csm": CSMConfig(**SIZES, backbone=STACK, decoder={**STACK, "d_model": 16}),
    "kani": KaniConfig(**SIZES, backbone={**STACK, **LFM2, "layers": "ca"}),
    "xtts": XTTSConfig(text_vocab_size=30, codebook_size=V, backbone=GPT, text_bos=1, text_eos=2, reference_bands=6,
                       n_latents=3, conditioning_layers=1, perceiver_layers=1, perceiver_heads=1, text_positions=20,
                       code_positions=30),
    "valle": VallEConfig(**SIZES, backbone={**STACK, **VALLE}, languages=3),
}  # fmt: skip
CHANGES = {  # settings that an adapter's run may have and its base not
    "csm": dict(text_bos=1, text_eos=2, decoder_fraction=0.5, stop="zeros", dropout=0.1, frame_dropout=0.2),
    "kani": dict(text_bos=1, drop_repeats=True, loss_on="codebook"),
    "xtts": dict(text_bos=4, chunk_seconds=1.0, hide_text_stop=True, text_loss_weight=0.5, reference_rate=10.0),
    "valle": dict(text_eos=7, rounds=3, guidance=2.0, language=2, whole_frames=False, mask_ratio=0.5),
}


def saved(folder, arch, changes=None):
    """A base and an adapter on it, base/best.pt and tuned/best.pt in a folder; the adapter's model."""
    torch.manual_seed(0)
    config = BASES[arch]
    model = ARCHS[arch][0](config)
    for name in ("base", "tuned"):
        os.makedirs(folder / name)
    whole = {"arch": arch, "model_config": asdict(config), "model": model.state_dict()}
    save_checkpoint(folder / "base/best.pt", whole)
    add_lora(model, 2, 4)
    randomise(model)
    model.config = replace(config, **CHANGES[arch] if changes is None else changes)
    save_checkpoint(folder / "tuned/best.pt", {
        "arch": arch, "model_config": asdict(model.config), "model": adapter_state(model),
        "base": str(folder / "base/best.pt"), "config": {"out_dir": str(folder / "tuned")},
    })  # fmt: skip
    return model


@pytest.mark.parametrize("arch", ARCHS)
def test_an_adapter_has_the_settings_of_its_run(arch, tmp_path):
    """Its layout is that of training."""
    model = saved(tmp_path, arch)
    checkpoint = load_checkpoint(tmp_path / "tuned/best.pt")
    found = load_model(checkpoint)
    assert asdict(found.config) == checkpoint["model_config"] != asdict(BASES[arch])
    text, codes = utterance()
    codes = codes[[0, 0, 1, 1]][:, : found.config.n_codebooks]
    for a, b in zip(found.layout(text, codes), model.config.layout(text, codes), strict=True):
        assert np.array_equal(a, b)
    asked = {key: value for key, value in vars(BASES[arch]).items() if key in ("decoder_fraction", "rounds", "loss_on")}
    for key, value in asked.items():
        assert getattr(load_model(checkpoint, **{key: value}).config, key) == value


def test_the_base_is_found_again(tmp_path, monkeypatch):
    """Beside the adapter as it was, where the whole tree is elsewhere; in a folder; by its own name."""
    expected = logits(saved(tmp_path / "a", "csm", {}))
    os.rename(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b/tuned/best.pt"
    assert torch.equal(logits(from_pretrained(path)), expected)
    os.rename(tmp_path / "b/base", tmp_path / "c")
    message = r"b/tuned/best.pt is an adapter on .*a/base/best.pt, but .* does not exist: .*--base"
    with pytest.raises(FileNotFoundError, match=message):
        from_pretrained(path)
    with pytest.raises(FileNotFoundError, match="but nowhere does not exist"):
        from_pretrained(path, base="nowhere")
    for base in (tmp_path / "c", tmp_path / "c/best.pt"):
        assert torch.equal(logits(from_pretrained(path, base=str(base))), expected)
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "d", "csm", {})
    for recorded in ("../base/best.pt", "d/base/best.pt"):  # from the adapter's folder, from the current one
        checkpoint = load_checkpoint("d/tuned/best.pt")
        save_checkpoint("d/tuned/best.pt", {**checkpoint, "base": recorded, "config": None})
        assert torch.equal(logits(from_pretrained("d/tuned/best.pt")), expected)


def test_another_base_is_refused(tmp_path):
    """The message names adapter and base; a base of other sizes is named too."""
    saved(tmp_path, "csm", {})
    path = str(tmp_path / "tuned/best.pt")
    other = csm(seed=3)
    whole = {"arch": "csm", "model_config": asdict(other.config), "model": other.state_dict()}
    save_checkpoint(tmp_path / "other.pt", whole)
    message = r"tuned/best.pt with the base .*other.pt: .* was trained on base \w+, this is \w+; --base"
    with pytest.raises(ValueError, match=message):
        from_pretrained(path, base=str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match="is damaged: its base .* is an adapter itself"):
        from_pretrained(path, base=path)
    checkpoint = load_checkpoint(path)
    save_checkpoint(path, {**checkpoint, "model_config": {**checkpoint["model_config"], "codebook_size": 99}})
    with pytest.raises(ValueError, match="base/best.pt"):
        from_pretrained(path)

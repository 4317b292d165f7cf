"""The contract of adapters, over the whole registry: a new algorithm is tested by being there."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from lorakern.adapters import ALGOS, attach, eject, find, layers, merge, set_multiplier, unmerge
from lorakern.testing import DTYPES, assert_as_exact_as_torch

KINDS = [(algo, kind) for algo, cls in ALGOS.items() for kind in cls.kinds]
every_kind = pytest.mark.parametrize(("algo", "kind"), KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def layer_of(kind):
    return {
        "linear": lambda: nn.Linear(6, 10),
        "conv2d": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
        "embedding": lambda: nn.Embedding(11, 6, padding_idx=0),
    }[kind]()


def input_of(kind, dtype=torch.float32):
    if kind == "embedding":
        return torch.tensor([[0, 3, 5], [10, 3, 1]])
    return torch.randn((2, 5, 6) if kind == "linear" else (2, 4, 7, 9), dtype=dtype)


def adapted(algo, kind, dtype=torch.float32, trained=True, **options):
    """A model with one adapted layer, "0", and the same layer alone."""
    layer = layer_of(kind).to(dtype)
    model = nn.Sequential(copy.deepcopy(layer))
    adapter = attach(model, "0", algo, rank=3, alpha=2, **options)
    if trained:
        train(adapter)
    return model, adapter, layer


def train(adapter):
    """Factors as training leaves them, not as it finds them."""
    with torch.no_grad():
        for factor in adapter.factors:
            nn.init.normal_(getattr(adapter, factor), std=0.5)


def judge(name, got, exact, torch_same_dtype):
    if got.dtype == torch.float64:
        # the formula in float64 is off by as much as what is judged by it
        torch.testing.assert_close(got, exact, msg=lambda m: f"{name}: {m}")
    else:
        assert_as_exact_as_torch(name, got, exact, torch_same_dtype)


def exactly(adapter, x):
    """layer(x; W + ΔW) in float64."""
    wide = copy.deepcopy(adapter).double()
    x = x.double() if x.is_floating_point() else x
    bias = getattr(wide, "bias", None)
    return layers.run(wide.root, x, wide.weight + wide.delta_weight(), bias).detach()


@every_dtype
@every_kind
def test_a_fresh_adapter_changes_nothing(algo, kind, dtype):
    model, adapter, layer = adapted(algo, kind, dtype, trained=False)
    x = input_of(kind, dtype)
    judge("fresh", model(x), exactly(adapter, x), layer(x))


@every_dtype
@every_kind
def test_forward_is_the_weight_update(algo, kind, dtype):
    model, adapter, _ = adapted(algo, kind, dtype)
    x = input_of(kind, dtype)
    weight = (adapter.weight + adapter.delta_weight()).to(dtype)
    merged = layers.run(adapter.root, x, weight, getattr(adapter, "bias", None))
    exact = exactly(adapter, x)
    judge("unmerged", model(x), exact, merged)
    merge(model)
    judge("merged", model(x), exact, merged)


@every_kind
def test_gradients_are_those_of_the_weight_update(algo, kind):
    model, adapter, _ = adapted(algo, kind, torch.float64)
    x = input_of(kind, torch.float64)
    if x.is_floating_point():
        x.requires_grad_()
    else:
        # no gradient flows to the row of padding_idx
        x = x.clamp(min=1)
    wanted = [x] * x.is_floating_point() + [getattr(adapter, f) for f in adapter.factors]
    y = model(x)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, wanted, dy)
    bias = getattr(adapter, "bias", None)
    formula = layers.run(adapter.root, x, adapter.weight + adapter.delta_weight(), bias)
    for mine, theirs in zip(got, torch.autograd.grad(formula, wanted, dy), strict=True):
        torch.testing.assert_close(mine, theirs)


@every_kind
def test_only_factors_train(algo, kind):
    model, adapter, layer = adapted(algo, kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {f: getattr(adapter, f).clone() for f in adapter.factors}
    model(input_of(kind)).square().sum().backward()
    optimizer.step()
    assert {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad} == set(before)
    assert all(not torch.equal(getattr(adapter, f), was) for f, was in before.items())
    for name, value in layer.state_dict().items():
        assert torch.equal(model.state_dict()[f"0.{name}"], value)


@every_kind
def test_a_fused_step_reaches_the_next_forward(algo, kind):
    """It does not count up a factor's version, which a kept norm of DoRA goes by."""
    model, adapter, _ = adapted(algo, kind)
    factors = [getattr(adapter, f) for f in adapter.factors]
    optimizer, x = torch.optim.AdamW(factors, lr=0.1, fused=True), input_of(kind)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(model(x), copy.deepcopy(model)(x))


@every_kind
def test_state_dict_keeps_the_layers_keys(algo, kind):
    model, adapter, layer = adapted(algo, kind)
    second = attach(model, "0", algo, rank=2, name="second")
    train(second)
    state, plain = model.state_dict(), nn.Sequential(layer).state_dict()
    own = [f"0.{f}" for f in adapter.factors]
    assert list(state) == [*plain, *own, *(f"0.second.{f}" for f in second.factors)]

    other, _, _ = adapted(algo, kind)
    attach(other, "0", algo, rank=2, name="second")
    other.load_state_dict(state)
    x = input_of(kind)
    assert torch.equal(other(x), model(x))
    assert all(torch.equal(other.state_dict()[k], v) for k, v in state.items())

    # the base's own checkpoint: factors stay
    other.load_state_dict(nn.Sequential(layer_of(kind)).state_dict())
    assert all(torch.equal(other.state_dict()[k], state[k]) for k in state if k not in plain)
    assert not torch.equal(other[0].weight, model[0].weight)


@every_kind
def test_a_wrong_checkpoint_is_an_error(algo, kind):
    model, adapter, _ = adapted(algo, kind)
    first = adapter.factors[0]
    half = {k: v for k, v in model.state_dict().items() if k != f"0.{first}"}
    with pytest.raises(RuntimeError, match=rf"Missing.*0.{first}"):
        model.load_state_dict(half)
    with pytest.raises(RuntimeError, match=r"Unexpected.*extra"):
        model.load_state_dict({**model.state_dict(), "0.extra": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=f"size mismatch for 0.{first}"):
        model.load_state_dict({**model.state_dict(), f"0.{first}": torch.zeros(1, 1)})
    merge(model)
    held = [t.clone() for t in (*adapter.parameters(), *adapter.buffers())]
    with pytest.raises(RuntimeError, match="merged; unmerge"):
        model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    now = (*adapter.parameters(), *adapter.buffers())
    assert all(torch.equal(a, b) for a, b in zip(held, now, strict=True))


@every_kind
def test_copies_and_pickles(algo, kind):
    model, _, _ = adapted(algo, kind)
    x = input_of(kind)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), model(x))
        set_multiplier(twin, 0.5)
        assert model[0].multiplier == 1.0
        assert not torch.equal(twin(x), model(x))


@every_dtype
@every_kind
def test_dtype_moves(algo, kind, dtype):
    model, adapter, layer = adapted(algo, kind)
    scale = adapter.scale
    model.to(dtype)
    x = input_of(kind, dtype)
    assert model(x).dtype == layer.to(dtype)(x).dtype == dtype
    assert {p.dtype for p in model.parameters()} == {dtype}
    # 2 / 3 has no short form: a scale that moved with the dtype would be rounded
    assert adapter.scale == scale == adapter._scale_tensor.item()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_kind
def test_autocast_is_the_layers(algo, kind, base):
    model, adapter, layer = adapted(algo, kind, base)
    x = input_of(kind)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = model(x), layer(x)
        y.float().sum().backward()
    assert y.dtype == plain.dtype
    assert all(getattr(adapter, f).grad.dtype == torch.float32 for f in adapter.factors)
    judge("autocast", y, exactly(adapter, x), _merged_under_autocast(adapter, x))


def _merged_under_autocast(adapter, x):
    weight = (adapter.weight + adapter.delta_weight()).to(adapter.weight.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        return layers.run(adapter.root, x, weight, getattr(adapter, "bias", None))


@pytest.mark.parametrize(("algo", "kind"), [case for case in KINDS if case[1] != "embedding"])
def test_a_foreign_dtype_is_refused_as_the_layer_does(algo, kind):
    model, _, layer = adapted(algo, kind, torch.bfloat16)
    with pytest.raises(RuntimeError):
        layer(input_of(kind))
    with pytest.raises(ValueError, match=r"mixed dtypes.*float32.*bfloat16"):
        model(input_of(kind))


@every_kind
def test_checkpointing_gives_the_same_gradients(algo, kind):
    options = {"dropout": 0.5, "dropout_mode": "kohya"} if algo == "lora" else {}
    model, adapter, _ = adapted(algo, kind, **options)
    x = input_of(kind)
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(5)
        run(x).square().sum().backward()
        grads.append([getattr(adapter, f).grad.clone() for f in adapter.factors])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@every_kind
def test_a_replica_of_data_parallel_runs(algo, kind):
    model, _, _ = adapted(algo, kind)
    attach(model, "0", algo, rank=2, name="second")
    train(model[0])
    x = input_of(kind)
    for replica, weights in ((_replica(model), model), (_replica(model[0].base), model[0].base)):
        y = replica(x)
        assert torch.equal(y, weights(x))
        y.sum().backward()


def _replica(module):
    """As torch.nn.parallel.replicate: parameters become plain attributes that are not leaves."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = _replica(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, parameter if parameter is None else parameter * 1)
        assert name not in replica._parameters
    return replica


@pytest.mark.filterwarnings("ignore:Full backward hook")
@every_kind
def test_hooks_fire_once_wherever_they_hang(algo, kind):
    layer, heard = layer_of(kind), []
    model = nn.Sequential(layer)
    layer.register_forward_pre_hook(lambda m, args: heard.append("before"))
    doomed = layer.register_forward_hook(lambda m, args, y: heard.append("doomed"))
    layer.register_full_backward_hook(lambda m, dx, dy: heard.append("back"))
    adapter = attach(model, "0", algo, rank=3)
    layer.register_forward_hook(lambda m, args, y: heard.append("on the layer"))
    adapter.register_forward_hook(lambda m, args, y: y * 2)
    doomed.remove()
    train(adapter)
    x = input_of(kind)
    y = model(x.requires_grad_(x.is_floating_point()))
    y.sum().backward()
    assert heard == ["before", "on the layer", "back"]
    torch.testing.assert_close(y, (exactly(adapter, x) * 2).float())
    merge(model)
    model(x)
    copy.deepcopy(model)(x)
    eject(model)
    assert model[0] is layer
    model(x)
    assert heard == ["before", "on the layer", "back"] + ["before", "on the layer"] * 3


@every_kind
def test_stands_in_for_the_layer(algo, kind):
    model, adapter, layer = adapted(algo, kind)
    names = [n for n in vars(layer) if not n.startswith("_")] + ["weight"]
    for name in names:
        mine, theirs = getattr(adapter, name), getattr(layer, name)
        assert torch.equal(mine, theirs) if name == "weight" else mine == theirs
    adapter.weight = nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
    assert adapter.root.weight is adapter.weight and not adapter.weight.any()
    with pytest.raises(AttributeError, match="'nonsense'"):
        adapter.nonsense  # noqa: B018
    assert "rank=3, alpha=2, multiplier=1" in repr(model)


@every_kind
def test_a_stack_sums_and_each_can_be_switched_off(algo, kind):
    model, first, layer = adapted(algo, kind)
    second = attach(model, "0", algo, rank=4, alpha=8, name="second")
    train(second)
    x = input_of(kind)
    for one, two in ((1, 1), (0.5, -2), (0, 1), (1, 0), (0, 0)):
        set_multiplier(model, one, "default")
        set_multiplier(model, two, "second")
        update = sum(a.delta_weight() for a in find(model)["0"])
        merged = layers.run(layer, x, layer.weight + update, getattr(layer, "bias", None))
        wide = copy.deepcopy(layer).double()
        weight = wide.weight + sum(
            a.double().delta_weight() for a in copy.deepcopy([first, second])
        )
        exact = layers.run(wide, x.double() if kind != "embedding" else x, weight, wide_bias(wide))
        judge(f"{one}, {two}", model(x), exact, merged)
    assert torch.equal(model(x), layer(x))
    set_multiplier(model, 1, "default")
    alone = model(x)
    eject(model, "second")
    assert model[0] is first and torch.equal(model(x), alone)
    eject(model)
    assert torch.equal(model(x), layer(x))


def wide_bias(layer):
    return getattr(layer, "bias", None)


@every_dtype
@every_kind
def test_unmerge_and_eject_give_the_layer_back(algo, kind, dtype):
    model, _, layer = adapted(algo, kind, dtype)
    base, saved = model[0].root, layer.weight
    merge(model)
    assert model[0].merged and not torch.equal(base.weight, saved)
    assert torch.equal(model.state_dict()["0.weight"], saved)
    with pytest.raises(ValueError, match="merged; unmerge"):
        set_multiplier(model, 0.5)
    with pytest.raises(ValueError, match="merged; unmerge"):
        attach(model, "0", algo, name="late")
    once = base.weight.clone()
    merge(model)
    assert torch.equal(base.weight, once)
    unmerge(model)
    unmerge(model)
    assert torch.equal(base.weight, saved) and list(model[0].buffers()) == []
    merge(model)
    eject(model)
    assert model[0] is base and torch.equal(base.weight, saved)


@every_kind
def test_a_new_multiplier_recompiles_nothing(algo, kind):
    model, _, _ = adapted(algo, kind)
    attach(model, "0", algo, rank=2, name="second")
    train(model[0])
    for module in (model, nn.Sequential(model[0].base)):
        torch._dynamo.reset()
        counter = CompileCounter()
        run = torch.compile(module, backend=counter, fullgraph=True)
        for value in (1.0, 0.3, -2.0):
            set_multiplier(model, value)
            x = input_of(kind)
            torch.testing.assert_close(run(x), module(x))
        assert counter.frame_count == 1
        set_multiplier(model, 0)
        torch.testing.assert_close(run(x), module(x))

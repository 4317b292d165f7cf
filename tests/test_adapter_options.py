"""The contract of adapters with the options that change their factors or the way they run."""

import copy
import io

import pytest
import torch
from test_adapters import _replica, adapted, exactly, input_of, judge, train
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from lorakern.adapters import layers, set_multiplier

OPTIONS = [
    ("lora", "conv2d", {"tucker": True}),
    ("lora", "linear", {"use_scalar": True}),
    ("lora", "linear", {"init": "pissa"}),
    ("lora", "conv2d", {"init": "olora", "dora": True}),
    ("dora", "linear", {"wd_on_output": False, "detach_norm": False}),
    ("dora", "linear", {"detach_norm": False, "norm_eps": 1e-6}),
    ("loha", "conv2d", {"tucker": True, "dora": True}),
    ("loha", "linear", {"dora": True, "use_scalar": True}),
    ("lokr", "linear", {"factor": 1, "dora": True}),
    ("lokr", "linear", {"factor": 1, "use_scalar": True, "style": "peft"}),
    ("lokr", "conv2d", {"factor": 1, "tucker": True, "decompose_both": True}),
    ("lokr", "conv2d", {"dora": True, "wd_on_output": False, "full_matrix": True}),
]
every_option = pytest.mark.parametrize(("algo", "kind", "options"), OPTIONS, ids=str)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@every_option
def test_with_options_it_is_the_weight_update(algo, kind, options, dtype):
    x = input_of(kind, dtype)
    model, adapter, layer = adapted(algo, kind, dtype, trained=False, **options)
    judge("fresh", model(x), exactly(adapter, x), layer(x))
    train(adapter)
    weight = (adapter.weight + adapter.delta_weight()).to(dtype)
    merged = layers.run(adapter.root, x, weight, adapter.bias)
    judge("trained", model(x), exactly(adapter, x), merged)
    set_multiplier(model, 0)
    assert torch.equal(model(x), layer(x))


@every_option
def test_with_options_gradients_are_those_of_the_weight_update(algo, kind, options):
    model, adapter, _ = adapted(algo, kind, torch.float64, **options)
    x = input_of(kind, torch.float64).requires_grad_()
    wanted = [x, *(getattr(adapter, f) for f in adapter.factors)]
    y = model(x)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, wanted, dy)
    formula = layers.run(adapter.root, x, adapter.weight + adapter.delta_weight(), adapter.bias)
    for mine, theirs in zip(got, torch.autograd.grad(formula, wanted, dy), strict=True):
        torch.testing.assert_close(mine, theirs)


@every_option
def test_with_options_it_is_saved_copied_and_replicated(algo, kind, options):
    model, adapter, _ = adapted(algo, kind, **options)
    x = input_of(kind)
    y = model(x)
    other, _, _ = adapted(algo, kind, **options)
    other.load_state_dict(model.state_dict())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = other, copy.deepcopy(model), torch.load(file, weights_only=False), _replica(model)
    for twin in twins:
        assert torch.equal(twin(x), y)
    with torch.no_grad():
        getattr(adapter, adapter.factors[0]).mul_(2)
    assert not torch.equal(model(x), y)
    assert all(torch.equal(twin(x), y) for twin in twins[:3])
    checkpoint(model, x.requires_grad_(), use_reentrant=False).sum().backward()
    grads = [getattr(adapter, f).grad.clone() for f in adapter.factors]
    model.zero_grad()
    model(x).sum().backward()
    assert all(
        torch.equal(a, getattr(adapter, f).grad)
        for a, f in zip(grads, adapter.factors, strict=True)
    )


@every_option
def test_with_options_it_compiles(algo, kind, options):
    model, _, _ = adapted(algo, kind, **options)
    torch._dynamo.reset()
    counter = CompileCounter()
    run = torch.compile(model, backend=counter, fullgraph=True)
    for value in (1.0, -2.0):
        set_multiplier(model, value)
        x = input_of(kind)
        torch.testing.assert_close(run(x), model(x))
    assert counter.frame_count == 1

"""Siblings run alone where one call would not be the same; nothing stale is ever given out."""

import gc
import threading
import weakref

import pytest
import torch
from siblings import (
    WIDE,
    Attention,
    adapted,
    apart,
    assert_same,
    needs_native,
    outcome,
    trained,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorakern.adapters import merge, shared, unmerge
from lorakern.adapters.shared import wins

pytestmark = [needs_native, pytest.mark.usefixtures("fired")]


# what happens between the call of q and those of k and v: each must then see it


def change_x(module, x):
    x.add_(1)


def change_scale(module, x):
    module.to_k.multiplier = 2.0


def change_factor(module, x):
    with torch.no_grad():
        module.to_k.up.add_(1)


def replace_factor(module, x):
    module.to_k.down.data = torch.ones_like(module.to_k.down)


def change_weight(module, x):
    with torch.no_grad():
        module.to_k.root.weight.add_(1)


def merge_k(module, x):
    module.to_k.merge()


def switch_off(module, x):
    module.to_k.multiplier = 0.0


BETWEEN = [
    change_x,
    change_scale,
    change_factor,
    replace_factor,
    change_weight,
    merge_k,
    switch_off,
]


@pytest.mark.parametrize("change", BETWEEN)
def test_what_changed_between_two_calls_is_seen(change, fired):
    module = adapted(Attention())
    x = torch.randn(5, WIDE)
    module.to_q(x)
    assert fired == [3]
    change(module, x)
    loose = apart(module)
    assert torch.equal(module.to_k(x), loose.to_k(x))
    assert torch.equal(module.to_v(x), loose.to_v(x))
    torch.testing.assert_close(module(x), loose(x))


def test_another_tensor_of_the_same_values_is_another(fired):
    module = adapted(Attention())
    x = torch.randn(5, WIDE, requires_grad=True)
    module.to_q(x)
    other = x.detach().clone().requires_grad_()
    module.to_k(other).sum().backward()
    assert other.grad is not None and x.grad is None and fired == [3]


def test_the_graph_is_of_the_call_that_asked(fired):
    """Gradients turned on or off, and x asking for one, between the calls."""
    module = adapted(Attention())
    x = torch.randn(5, WIDE)
    with torch.no_grad():
        module.to_q(x)
    assert module.to_k(x).requires_grad
    module = adapted(Attention())
    module.to_q(x)
    with torch.no_grad():
        assert not module.to_k(x).requires_grad
    module = adapted(Attention())
    module.to_q(x)
    x.requires_grad_()
    module.to_k(x).sum().backward()
    assert x.grad is not None
    module = adapted(Attention())
    module.to_q(x)
    module.to_k.up.requires_grad_(False)
    module.to_k(x).sum().backward()
    assert module.to_k.up.grad is None and module.to_k.down.grad is not None
    assert fired == [3] * 4


def test_each_output_is_given_once(fired):
    module = adapted(Attention())
    x = torch.randn(5, WIDE)
    module.to_q(x)
    first, second = module.to_k(x), module.to_k(x)
    torch.testing.assert_close(first, second)
    assert first.data_ptr() != second.data_ptr()
    module.to_v(x)
    assert module.to_q._shared._kept is None
    module(x)
    assert fired == [3, 3]


def test_any_order_of_calls(fired):
    module = adapted(Attention())
    loose, x = apart(module), torch.randn(5, WIDE)
    for names in ("kqv", "vqk", "vkq", "qvk", "kkq", "qq", "v", "qkv"):
        for name in names:
            layer = f"to_{name}"
            got, want = getattr(module, layer)(x), getattr(loose, layer)(x)
            torch.testing.assert_close(got, want)


def test_who_is_not_called_is_not_computed_again(fired):
    module = adapted(Attention())
    for _ in range(5):
        module.to_q(torch.randn(5, WIDE))
    # the first call, and the one that finds its outputs unused; then k would be first
    assert fired == [3]


def test_nothing_is_kept_beyond_its_use():
    module = adapted(Attention())
    x = torch.randn(5, WIDE)
    gone = weakref.ref(x)
    with torch.no_grad():
        module.to_q(x)
        del x
        # k and v wait, but x is not held for them
        assert gone() is None
    x = torch.randn(5, WIDE)
    kept = module.to_q._shared._kept
    waiting = weakref.ref(next(iter(kept.outputs.values()))[0])
    del kept
    module.to_q(x)
    gc.collect()
    assert waiting() is None


def test_one_group_waits_at_a_time():
    first, second = adapted(Attention()), adapted(Attention())
    x = torch.randn(5, WIDE, requires_grad=True)
    first.to_q(x)
    assert first.to_q._shared._kept is not None
    second.to_q(x)
    assert first.to_q._shared._kept is None


def test_hooks_are_called_as_ever(fired):
    module = adapted(Attention())
    x = torch.randn(5, WIDE, requires_grad=True)
    seen = []
    handle = module.to_k.register_forward_pre_hook(lambda m, a: (2 * a[0],))
    module.to_v.register_forward_hook(lambda m, a, y: seen.append(y))
    assert_same(module, x)
    assert len(seen) == 2 and not fired
    handle.remove()
    module.to_v._forward_hooks.clear()
    module.to_k.register_full_backward_hook(lambda m, dx, dy: seen.append(dx))
    assert_same(module, x)
    assert len(seen) >= 3 and not fired


def dropped(module):
    return adapted(module, dropout=0.5)


def with_dora(module):
    return adapted(module, dora=True)


def merged(module):
    module = adapted(module)
    merge(module)
    return module


def off(module):
    module = adapted(module)
    module.to_v.multiplier = 0.0
    return module


def trains_bias(module):
    module = adapted(module)
    module.to_k.multiplier = 0.0
    module.to_v.root.bias.requires_grad_()
    module.to_v.multiplier = 0.0
    return module


@pytest.mark.parametrize("make", [dropped, with_dora, merged, off, trains_bias])
def test_whatever_is_not_one_plain_lora_each_runs_alone(make, fired):
    module = make(Attention())
    x = torch.randn(5, WIDE, requires_grad=True)
    torch.manual_seed(3)
    got = module(x)
    torch.manual_seed(3)
    torch.testing.assert_close(got, apart(module)(x))
    assert not fired


def test_a_group_comes_back_with_what_it_waits_for(fired):
    module, x = adapted(Attention(), dropout=0.5), torch.randn(5, WIDE, requires_grad=True)
    module(x)
    assert not fired
    assert_same(module.eval(), x)
    merge(module)
    module(x)
    unmerge(module)
    assert_same(module, x)
    assert fired == [3, 3]


def test_what_autocast_rounds_for_each_layer_is_no_shared_input(fired):
    module = adapted(Attention()).bfloat16()
    loose, x = apart(module), torch.randn(300, WIDE, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), loose(x)) and not fired
        low = x.detach().bfloat16().requires_grad_()
        torch.testing.assert_close(module(low), loose(low))
    assert fired == [3]


def test_autocast_inference_mode_and_tracing_run_alone(fired):
    module = adapted(Attention())
    loose, x = apart(module), torch.randn(5, WIDE)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), loose(x))
    module.to_q(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.to_k(x).dtype == torch.bfloat16
    assert fired == [3]
    with torch.inference_mode():
        other = torch.randn(5, WIDE)
        torch.testing.assert_close(module(other), loose(other))
    assert fired == [3]


def test_compiled_as_a_whole_graph(fired):
    module = adapted(Attention())
    x = torch.randn(5, WIDE, requires_grad=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    want = outcome(apart(module), x)
    y = compiled(x)
    torch.manual_seed(1)
    got = [y, *torch.autograd.grad(y, [x, *trained(module)], torch.randn_like(y))]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert not fired


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("cross", [False, True])
def test_checkpointing(reentrant, cross, fired):
    """Its second forward keeps as many tensors as the first, also when q reads something else."""
    module = adapted(Attention())
    x, text = torch.randn(2, 9, WIDE, requires_grad=True), torch.randn(2, 7, WIDE)
    inputs = (x, text) if cross else (x,)
    want = outcome(apart(module), *inputs)
    for _ in range(3):
        y = checkpoint(module, *inputs, use_reentrant=reentrant)
        torch.manual_seed(1)
        x.grad = None
        module.zero_grad()
        y.backward(torch.randn_like(y))
        for got, right in zip((y, x.grad, *(p.grad for p in trained(module))), want, strict=True):
            torch.testing.assert_close(got, right)
    assert fired


def test_a_graph_that_is_kept_gives_its_gradients_twice(fired):
    module = adapted(Attention())
    x = torch.randn(5, WIDE, requires_grad=True)
    y = module(x).square().sum()
    wanted = [x, *trained(module)]
    first = torch.autograd.grad(y, wanted, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y, wanted), strict=True):
        assert torch.equal(a, b)
    assert fired == [3]


def test_an_output_that_is_not_used_gives_no_gradient():
    module = adapted(Attention())
    x = torch.randn(5, WIDE, requires_grad=True)
    module.to_q(x).sum().backward()
    assert module.to_q.up.grad is not None and x.grad is not None
    assert module.to_k.up.grad is None and module.to_v.down.grad is None


def test_threads_get_their_own_outputs():
    module = adapted(Attention())
    loose, wrong = apart(module), []

    def work(seed):
        x = torch.randn(5, WIDE, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for _ in range(50):
                if not torch.allclose(module(x), loose(x), atol=1e-5):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "rows, needs_dx, width, pays",
    [(256, True, 16, True), (255, True, 16, False), (256, False, 16, False),
     (256, True, 2000, True), (256, True, 2500, False)],
)  # fmt: skip
def test_a_call_that_does_not_pay_is_not_made(rows, needs_dx, width, pays, fired, monkeypatch):
    monkeypatch.setattr(shared, "wins", wins)
    module = nn.ModuleDict({n: nn.Linear(1000, width) for n in ("gate_proj", "up_proj")})
    adapted(module, targets=["gate_proj", "up_proj"])
    x = torch.randn(rows, 1000, requires_grad=needs_dx)
    for layer in module.values():
        layer(x)
    assert fired == [2] * pays
    with torch.no_grad():
        module.gate_proj(x)
    assert fired == [2] * pays

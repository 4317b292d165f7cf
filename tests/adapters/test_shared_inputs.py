"""Siblings that read one input are one call: results, copies, checkpoints, whole models."""

import copy
import gc
import pickle
import weakref

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
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

from lorakern import backend
from lorakern.adapters import attach, eject, find, inject, shared
from lorakern.testing import assert_as_exact_as_torch

pytestmark = [needs_native, pytest.mark.usefixtures("fired")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_call_computes_what_three_do(dtype, fired):
    module = adapted(Attention(), dtype)
    assert_same(module, torch.randn(2, 9, WIDE, dtype=dtype, requires_grad=True))
    assert fired == [3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_call_is_as_exact_as_torch_in_16_bit(dtype, fired):
    class Three(Attention):
        def forward(self, x):
            return torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], -1)

    module = adapted(Three(), dtype)
    for stack in find(module).values():
        stack[0].to(dtype)
    x = torch.randn(2, 9, WIDE, dtype=dtype, requires_grad=True)
    got = outcome(module, x)
    assert fired == [3]
    # plain torch in the same dtype, and the truth
    with backend.use("reference"):
        same = outcome(apart(module), x)
    torch.manual_seed(1)
    dy = torch.randn_like(got[0])
    wide = apart(module).double()
    x64 = x.detach().double().requires_grad_()
    y64 = wide(x64)
    exact = [y64, *torch.autograd.grad(y64, [x64, *trained(wide)], dy.double())]
    for i, (a, b, c) in enumerate(zip(got, exact, same, strict=True)):
        assert_as_exact_as_torch(f"result {i}", a.detach(), b.detach(), c.detach())


def test_names_and_sizes_make_a_group(fired):
    x = torch.randn(4, WIDE)
    for names in shared.SIBLINGS:
        module = nn.ModuleDict({name: nn.Linear(WIDE, 8) for name in names})
        adapted(module, targets=names)
        for layer in module.values():
            layer(x)
        assert fired.pop() == len(names) and not fired
    module = adapted(nn.ModuleDict({n: nn.Linear(WIDE, 8) for n in ("to_a", "to_b")}),
                     targets=["to_a", "to_b"])  # fmt: skip
    for layer in module.values():
        layer(x)
    assert not fired


@pytest.mark.parametrize("text, cross", [(20, None), (WIDE, True)])
def test_in_cross_attention_keys_and_values_share_the_text(text, cross, fired):
    module = adapted(Attention(text, cross))
    x = torch.randn(2, 9, WIDE, requires_grad=True)
    tokens = torch.randn(2, 7, text, requires_grad=True)
    assert_same(module, x, tokens)
    # a frozen text encoder
    assert_same(module, x, tokens.detach())
    assert fired == [2, 2]


def test_unknown_cross_attention_is_found_out(fired):
    """q does not read what k and v do: it leaves, and they go on."""
    module = adapted(Attention())
    x, text = torch.randn(2, 9, WIDE, requires_grad=True), torch.randn(2, 7, WIDE)
    for _ in range(3):
        assert_same(module, x, text)
    assert fired == [3, 2, 2]


def test_a_subset_is_a_group(fired):
    module = adapted(Attention(), targets=["to_q", "to_v"])
    assert_same(module, torch.randn(5, WIDE, requires_grad=True))
    assert fired == [2]
    alone = adapted(Attention(), targets=["to_v"])
    assert_same(alone, torch.randn(5, WIDE, requires_grad=True))
    assert fired == [2]


def test_adapters_attached_one_by_one_are_a_group(fired):
    module = Attention()
    for name in ("to_v", "to_q", "to_k"):
        attach(module, name, rank=2)
    assert_same(module, torch.randn(5, WIDE, requires_grad=True))
    assert fired == [3]


def test_checkpoints_are_as_they_were():
    module = adapted(Attention())
    loose = apart(module)
    assert list(module.state_dict()) == list(loose.state_dict())
    assert [n for n, _ in module.named_modules()] == [n for n, _ in loose.named_modules()]
    module.load_state_dict(loose.state_dict())


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_a_group_of_its_own(way, fired):
    module = adapted(Attention())
    made = copy.deepcopy(module) if way == "deepcopy" else pickle.loads(pickle.dumps(module))
    x = torch.randn(5, WIDE, requires_grad=True)
    want = outcome(module, x)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    for got, right in zip(outcome(made, x), want, strict=True):
        assert torch.equal(got, right)
    assert fired == [3, 3]
    # a copy of one member has no siblings
    alone = copy.deepcopy(made.to_q)
    torch.testing.assert_close(alone(x), made.to_q(x))
    assert fired == [3, 3, 3]


def test_a_copy_knows_nothing_of_what_is_kept():
    module = adapted(Attention())
    x = torch.randn(5, WIDE)
    module.to_q(x)
    made = copy.deepcopy(module)
    with torch.no_grad():
        made.to_k.up.zero_()
    torch.testing.assert_close(made.to_k(x), made.to_k.root(x))


def test_a_model_is_freed_with_its_last_name():
    module = adapted(Attention())
    module(torch.randn(5, WIDE))
    gone = weakref.ref(module.to_q)
    gc.disable()
    try:
        del module
        assert gone() is None
    finally:
        gc.enable()


def test_eject_takes_the_group_apart(fired):
    plain = Attention()
    module = adapted(copy.deepcopy(plain))
    x = torch.randn(5, WIDE)
    module(x)
    adapter = module.to_q
    eject(module)
    assert adapter._shared is None and torch.equal(module(x), plain(x))
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert fired == [3]


def test_a_stack_runs_alone_until_it_is_none(fired):
    module = adapted(Attention())
    x = torch.randn(5, WIDE, requires_grad=True)
    inject(module, targets=["to_k"], rank=2, name="second")
    with torch.no_grad():
        module.to_k.up.normal_()
    want = outcome(apart(module), x)
    for got, right in zip(outcome(module, x), want, strict=True):
        torch.testing.assert_close(got, right)
    # q and v still read the same
    assert fired == [2]
    eject(module, "second")
    assert_same(module, x)
    assert fired == [2, 3]


def test_x_is_saved_once():
    class Three(Attention):
        def forward(self, x):
            return self.to_q(x), self.to_k(x), self.to_v(x)

    def saved(module):
        x, found = torch.randn(40, WIDE), []
        known = {p.data_ptr() for p in module.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            module(x.requires_grad_())
        return [tuple(t.shape) for t in found if t.data_ptr() not in known]

    module = adapted(Three())
    assert sorted(saved(module)) == [(40, 9), (40, WIDE)]
    assert sorted(saved(apart(module))) == [(40, 3)] * 3 + [(40, WIDE)] * 3


@pytest.mark.parametrize("kernel", [None, "reference"])
def test_no_gradient_is_computed_for_the_text_of_a_frozen_encoder(kernel):
    """Neither together nor alone: nothing of its size is made."""
    module = adapted(Attention(20))
    text = torch.randn(1, 1009, 20)
    for layers in (module, apart(module)):
        with backend.use(kernel):
            out = layers.to_k(text).sum() + layers.to_v(text).sum()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                        profile_memory=True) as seen:  # fmt: skip
                out.backward()
        sizes = {e.self_cpu_memory_usage for e in seen.events()}
        assert text.nbytes not in sizes and sizes


def test_unet(fired):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**tiny.unet_config())
    inject(unet, rank=4)
    with torch.no_grad():
        for (adapter,) in find(unet).values():
            adapter.up.normal_(std=0.1)
    latent = torch.randn(2, 4, 8, 8, requires_grad=True)
    text = torch.randn(2, 7, 32)

    class Call(nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.unet = unet

        def forward(self, latent, text):
            return self.unet(latent, 10, text).sample

    assert_same(Call(unet), latent, text)
    attentions = [n for n, m in unet.named_modules() if n.endswith(("attn1", "attn2"))]
    assert sorted(fired) == sorted(2 if n.endswith("2") else 3 for n in attentions)
    assert set(fired) == {2, 3}
    # and with gradient checkpointing
    fired.clear()
    unet.enable_gradient_checkpointing()
    assert_same(Call(unet).train(), latent, text)
    assert len(fired) == 2 * len(attentions)


def test_clip(fired):
    encoder = tiny.text_encoder()
    inject(encoder, rank=4)
    with torch.no_grad():
        for (adapter,) in find(encoder).values():
            adapter.up.normal_(std=0.1)

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, ids):
            return self.encoder(ids)[0]

    assert_same(Call(), torch.randint(0, 900, (2, 16)))
    assert fired == [3, 3]

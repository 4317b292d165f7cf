"""Keys and values that all cross-attentions make of one text are one call; on a CPU by force."""

import copy
import gc
import pickle
import weakref

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorakern
from lorakern import backend
from lorakern.adapters import eject, find, inject, merge, set_multiplier, shared, unmerge
from lorakern.adapters.shared_text import SharedText, link_text
from lorakern.ops.lora_linear_shared.op import _LoraLinearShared

TEXT = 24


class Block(nn.Module):
    """A cross-attention whose output is in its input's place."""

    def __init__(self, width, text=TEXT, cross=True):
        super().__init__()
        self.is_cross_attention = cross
        self.to_q = nn.Linear(16, width)
        self.to_k, self.to_v = nn.Linear(text, width, bias=False), nn.Linear(text, 16)

    def forward(self, x, text):
        return x + torch.softmax(self.to_q(x) @ self.to_k(text).mT, -1) @ self.to_v(text)


class Model(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks or [Block(8), Block(20), Block(12)])
        self.checkpointed = None

    def forward(self, x, text):
        for block in self.blocks:
            if self.checkpointed is None:
                x = block(x, text)
            else:
                x = checkpoint(block, x, text, use_reentrant=self.checkpointed)
        return x


@pytest.fixture(params=["extension", "reference"], autouse=True)
def fired(request, monkeypatch):
    """The number of layers of each call of a group; the rule for a GPU decides here too."""
    counts, real = [], shared.native

    def reference(x, weights, biases, downs, ups, scales):
        with backend.use("reference"):
            return [*_LoraLinearShared.apply(x, weights, biases, scales, *downs, *ups)]

    def spy(x):
        run = reference if request.param == "reference" else real(x)
        if run is None:
            pytest.skip("lorakern._native is not built")
        return lambda x, weights, *rest: counts.append(len(weights)) or run(x, weights, *rest)

    def wins(x, members):
        return not (x.requires_grad and torch.is_grad_enabled())

    monkeypatch.setattr(shared, "native", spy)
    monkeypatch.setattr(shared, "wins", wins)
    return counts


def by_force(model):
    """As on a GPU: the groups of a text, and none of siblings."""
    for stack in find(model).values():
        stack[-1]._shared = stack[-1]._text
    return model


def adapted(model=None, **options):
    model = (Model() if model is None else model).double()
    inject(model, rank=3, targets=["to_q", "to_k", "to_v"], **options)
    with torch.no_grad():
        for path, (adapter,) in find(model).items():
            adapter.up.normal_()
            adapter.multiplier = 0.3 if path.endswith("k") else 0.7
    return by_force(model)


def apart(model):
    model = copy.deepcopy(model)
    for stack in find(model).values():
        stack[-1]._shared = stack[-1]._text = None
    return model


def some(text=TEXT):
    return (torch.randn(2, *dims, dtype=torch.float64) for dims in ((5, 16), (7, text)))


def outcome(model, x, text):
    wanted = [t for t in (x, text, *model.parameters()) if t.requires_grad]
    y = model(x, text)
    torch.manual_seed(1)
    y.backward(torch.randn_like(y))
    grads = [t.grad for t in wanted]
    for t in wanted:
        t.grad = None
    return [y, *grads]


def assert_same(model, *inputs):
    for got, want in zip(outcome(model, *inputs), outcome(apart(model), *inputs), strict=True):
        torch.testing.assert_close(got, want)


def group_of(model):
    return model.blocks[0].to_k._text


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["", "autocast"])
@pytest.mark.parametrize("asks", [False, True], ids=["", "x asks for a gradient"])
def test_one_call_computes_what_all_do(asks, dtype, fired):
    model = adapted().to(dtype)
    for _ in range(2):
        x, text = (t.to(dtype) for t in some())
        with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
            assert_same(model, x.requires_grad_(asks), text)
    assert fired == [6, 6]
    # nothing waits
    assert group_of(model)._kept is None


def test_members_read_texts_of_one_width_in_cross_attention(fired):
    model = Model(Block(8), Block(8, 16), Block(8), Block(8, 16, cross=False), Block(9, 16))
    adapted(model)
    groups = [{layer._text for layer in (b.to_k, b.to_v)} for b in model.blocks]
    assert groups[0] == groups[2] and groups[1] == groups[4] and groups[3] == {None}
    assert groups[0] != groups[1] and all(len(g) == 1 for g in groups)
    assert all(b.to_q._text is None for b in model.blocks)


def test_a_text_that_asks_for_a_gradient_goes_layer_by_layer(fired):
    model = adapted()
    x, text = some()
    assert_same(model, x, text.requires_grad_())
    assert not fired
    with torch.no_grad():
        torch.testing.assert_close(model(x, text), apart(model)(x, text))
    assert fired == [6]


def test_two_calls_and_no_gradient(fired):
    """As classifier-free guidance makes them: with one text and with another, then again."""
    model = adapted()
    loose, (x, text), (_, other) = apart(model), some(), some()
    with torch.no_grad():
        for given in (text, other, text, other):
            torch.testing.assert_close(model(x, given), loose(x, given))
    assert fired == [6] * 4
    assert_same(model, x, text)
    assert fired == [6] * 5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, fired):
    """Parts are run again, each alone: all is computed where it is saved."""
    model = adapted()
    model.checkpointed = reentrant
    for _ in range(4):
        x, text = some()
        assert_same(model, x.requires_grad_(), text)
    # the recomputation of a reentrant one has a text of its own for each part
    assert len(fired) <= (3 if reentrant else 0)
    model.checkpointed = None
    assert_same(model, x, text)


def test_a_part_of_the_model_gives_up(fired):
    """Where not all layers are called, others' outputs would be computed for nothing."""
    model = adapted()
    for _ in range(6):
        x, text = some()
        assert_same(model.blocks[1], x, text)
    assert fired == [6, 6] and group_of(model)._kept is None
    # and a new group tries again
    link_text(model)
    by_force(model)
    assert_same(model, x, text)
    assert fired == [6] * 3


def test_a_pass_that_broke_off_is_forgiven(fired):
    model = adapted()
    for _ in range(3):
        model.blocks[0](*some())
        for _ in range(2):
            assert_same(model, *some())
    assert fired == [6] * 9


def test_what_is_left_of_a_graph_is_not_given_to_another(fired):
    model = adapted()
    x, text = some()
    model.blocks[0](x, text).sum().backward()
    got = model.blocks[1](x, text)
    torch.testing.assert_close(got, apart(model.blocks[1])(x, text))
    got.sum().backward()
    assert fired == [6, 6]


def change_text(model, text):
    text.add_(1)


def change_scale(model, text):
    model.blocks[2].to_k.multiplier = 2.0


def change_factor(model, text):
    with torch.no_grad():
        model.blocks[2].to_v.up.add_(1)


def merge_one(model, text):
    model.blocks[2].to_v.merge()


def switch_off(model, text):
    set_multiplier(model, 0.0)


@pytest.mark.parametrize(
    "change", [change_text, change_scale, change_factor, merge_one, switch_off]
)
def test_what_changed_between_two_calls_is_seen(change, fired):
    model = adapted()
    x, text = some()
    model.blocks[0](x, text)
    assert fired == [6]
    change(model, text)
    loose = apart(model)
    for block, other in zip(model.blocks[1:], loose.blocks[1:], strict=True):
        torch.testing.assert_close(block(x, text), other(x, text))


def test_the_graph_is_of_the_call_that_asked(fired):
    model = adapted()
    x, text = some()
    with torch.no_grad():
        model.blocks[0](x, text)
    assert model.blocks[1].to_k(text).requires_grad
    text.requires_grad_()
    model.blocks[2].to_k(text).sum().backward()
    assert text.grad is not None


def test_merge_and_unmerge_and_multiplier(fired):
    model = adapted()
    x, text = some()
    want = model(x, text)
    merge(model)
    torch.testing.assert_close(model(x, text), want)
    unmerge(model)
    assert torch.equal(model(x, text), want)
    assert fired == [6, 6]
    set_multiplier(model, 2.0)
    assert_same(model, x, text)
    assert fired == [6, 6, 6]


def test_eject_takes_the_group_apart(fired):
    plain = Model().double()
    model = adapted(copy.deepcopy(plain))
    x, text = some()
    adapter = model.blocks[0].to_k
    eject(model)
    assert adapter._text is None and torch.equal(model(x, text), plain(x, text))
    assert not fired


def test_a_second_adapter_takes_its_layer_out(fired):
    model = adapted()
    inject(model, rank=2, targets=["blocks.1.to_k"], name="second")
    assert model.blocks[1].to_k._text is None
    assert_same(by_force(model), *some())
    eject(model, "second")
    assert_same(by_force(model), *some())
    assert fired == [5, 6]


def test_one_that_drops_or_has_a_hook_runs_alone_and_so_do_all(fired):
    model = adapted(dropout=0.5)
    x, text = some()
    model.train()(x, text)
    assert not fired
    model.eval()
    seen = []
    handle = model.blocks[1].to_k.register_forward_hook(lambda *_: seen.append(1))
    assert_same(model, x, text)
    assert not fired and seen
    handle.remove()
    assert_same(model, x, text)
    assert fired == [6]


def test_checkpoints_are_as_they_were():
    model = adapted()
    loose = apart(model)
    assert list(model.state_dict()) == list(loose.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in loose.named_modules()]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_becomes_a_group_of_its_own(way, fired):
    model = adapted()
    made = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    for _ in range(2):
        assert_same(by_force(made), *some())
    # its members join when they are called
    assert fired == [6]
    # one member's copy takes no other along
    assert len(pickle.dumps(made.blocks[0].to_k)) < 2 * len(
        pickle.dumps(apart(made.blocks[0].to_k))
    )


def test_a_model_is_freed_with_its_last_name(fired):
    model = adapted()
    x, text = some()
    # as much as waits
    model.blocks[0](x, text).sum()
    gone = weakref.ref(model.blocks[0].to_k)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_compile_goes_layer_by_layer(fired):
    model = adapted()
    x, text = some()
    torch._dynamo.reset()
    got = torch.compile(model, backend="eager", fullgraph=True)(x, text)
    torch.testing.assert_close(got, apart(model)(x, text))
    assert not fired


def test_a_file_that_is_loaded_makes_a_group(tmp_path, fired):
    model = adapted()
    path = lorakern.save({"unet": model}, tmp_path / "a", format="peft")
    other = copy.deepcopy(model)
    eject(other)
    lorakern.load({"unet": other}, path)
    x, text = some()
    torch.testing.assert_close(by_force(other)(x, text), apart(other)(x, text))
    assert fired == [6] and isinstance(other.blocks[0].to_k._text, SharedText)


def test_unet(fired):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**tiny.unet_config()).double()
    inject(unet, rank=4)
    with torch.no_grad():
        for (adapter,) in find(unet).values():
            adapter.up.normal_(std=0.1)
    by_force(unet)
    latent, text = (torch.randn(2, *d, dtype=torch.float64) for d in ((4, 8, 8), (7, 32)))

    class Call(nn.Sequential):
        def forward(self, latent, text):
            return self[0](latent, 10, text).sample

    cross = sum(n.endswith("attn2") for n, _ in unet.named_modules())
    assert_same(Call(unet), latent, text)
    assert fired == [2 * cross] and cross > 2
    unet.enable_gradient_checkpointing()
    assert_same(Call(unet).train(), latent, text)
    assert len(fired) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_with_float32_factors(fired):
    model = Model().to("cuda", torch.bfloat16)
    inject(model, rank=3, targets=["to_q", "to_k", "to_v"])
    with torch.no_grad():
        for (adapter,) in find(model).values():
            adapter.up.normal_(std=0.1)
    x, text = (t.to("cuda", torch.bfloat16) for t in some())
    for got, want in zip(outcome(model, x, text), outcome(apart(model), x, text), strict=True):
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    assert fired == [6]

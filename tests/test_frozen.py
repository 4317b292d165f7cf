"""Frozen layers on lorakern's kernels, in place: the same numbers, and nothing else changes."""

import copy

import pytest
import tiny
import torch
from torch import nn

import lorakern
from lorakern import frozen
from lorakern.frozen import FrozenConv2d, FrozenLinear
from lorakern.ops.frozen_linear import op
from lorakern.testing import assert_as_exact_as_torch

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.lorakern_native, "frozen_linear_cpu"), reason="_native is not built"
)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Rows of each call of the kernel, on an Intel CPU too."""
    seen, kernel = [], frozen.frozen_linear

    def noted(x, weight, bias):
        seen.append(x.numel() // x.shape[-1])
        return kernel(x, weight, bias)

    monkeypatch.setattr(op, "_mkl_is_best", lambda: False)
    monkeypatch.setattr(frozen, "frozen_linear", noted)
    return seen


def conv(**options):
    layer = nn.Conv2d(**{"in_channels": 128, "out_channels": 512, "kernel_size": 3, **options})
    return layer.requires_grad_(False)


def linear():
    return nn.Linear(1024, 513).requires_grad_(False)


def accelerated(layer):
    box = nn.Sequential(copy.deepcopy(layer))
    lorakern.accelerate_frozen(box)
    return box[0]


# with the rows that the kernel gets; windows that are columns need none
LAYERS = {
    "linear": (linear(), (2, 2, 1024), [4]),
    "padding": (conv(padding=1), (1, 128, 2, 2), [4]),
    "stride": (conv(padding=(2, 1), stride=(2, 3), bias=False), (1, 128, 3, 3), [3]),
    "dilation": (conv(dilation=(1, 2), padding=1), (1, 128, 2, 4), [4]),
    "1 x 1": (conv(in_channels=1025, kernel_size=1), (3, 1025, 1, 1), [3]),
    "columns": (conv(in_channels=520, padding=1), (2, 520, 3, 6), []),
    "columns, stride": (
        conv(in_channels=650, padding=(2, 1), stride=(2, 3), dilation=(1, 2), bias=False),
        (3, 650, 7, 9), [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", LAYERS)
def test_the_same_output_and_gradient(which, calls):
    layer, shape, rows = LAYERS[which]
    fast, x = accelerated(layer), torch.randn(shape, requires_grad=True)
    # what torch's own way would call
    fast._conv_forward = None
    y, want = fast(x), layer(x)
    dy = torch.randn_like(y)
    got, expected = (torch.autograd.grad(out, x, dy)[0] for out in (y, want))
    assert calls == rows and y.is_contiguous()
    exact_x = x.detach().double().requires_grad_()
    exact = copy.deepcopy(layer).double()(exact_x)
    (exact_dx,) = torch.autograd.grad(exact, exact_x, dy.double())
    assert_as_exact_as_torch("y", y.detach(), exact.detach(), want.detach())
    assert_as_exact_as_torch("dx", got, exact_dx, expected)


def test_what_is_changed_and_what_stays():
    class Own(nn.Linear):
        pass

    patched = linear()
    patched.forward = lambda x: x
    model = nn.ModuleDict({
        "linear": linear(), "conv": conv(),
        "trained": nn.Linear(1024, 513), "trained bias": linear(), "own": Own(1024, 513),
        "small": nn.Linear(8, 8), "16-bit": linear().bfloat16(), "patched": patched,
        "groups": conv(groups=2, out_channels=1024), "same": conv(padding="same"),
        "mirrored": conv(padding=1, padding_mode="reflect"),
    })  # fmt: skip
    model["trained bias"].bias.requires_grad_()
    classes = {name: type(layer) for name, layer in model.items()}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    undo = lorakern.accelerate_frozen(model)
    now = {n: type(m) for n, m in model.items() if type(m) is not classes[n]}
    assert now == {"linear": FrozenLinear, "conv": FrozenConv2d}
    # a second time changes nothing, and its undo neither
    lorakern.accelerate_frozen(model)()
    assert type(model["linear"]) is FrozenLinear
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    undo()
    undo()
    assert {name: type(layer) for name, layer in model.items()} == classes


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, x: (layer, x.repeat(1, 1, 9, 1)),
        lambda layer, x: (layer, x[0]),
        lambda layer, x: (layer.double(), x.double()),
        lambda layer, x: (layer, x.repeat(2, 1, 1, 1).to(memory_format=torch.channels_last)),
        lambda layer, x: (layer.to(memory_format=torch.channels_last), x),
        lambda layer, x: (layer.requires_grad_(), x),
    ],
    ids=["pixels", "unbatched", "float64", "channels last", "channels last weight", "trained"],
)
def test_runs_as_before(change, calls):
    layer, x = change(conv(padding=1), torch.randn(1, 128, 2, 2))
    fast = accelerated(conv(padding=1))
    fast = change(fast, x.float() if x.dim() == 4 else x[None])[0]
    fast.load_state_dict(layer.state_dict())
    y, want = fast(x), layer(x)
    assert torch.equal(y, want) and y.stride() == want.stride() and calls == []
    assert y.requires_grad == want.requires_grad


def test_columns_are_of_up_to_64_pixels(monkeypatch):
    fast = accelerated(conv(in_channels=1000, padding=1))
    monkeypatch.setattr(torch.nn.functional, "unfold", None)
    fast(torch.randn(1, 1000, 5, 13))
    with pytest.raises(TypeError):
        fast(torch.randn(1, 1000, 8, 8))


def test_autocast_and_compile_run_as_before(calls):
    fast, x = accelerated(linear()), torch.randn(4, 1024)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype == torch.bfloat16
    torch.testing.assert_close(torch.compile(fast, backend="eager", fullgraph=True)(x), fast(x))
    # the one at the end of the line above
    assert calls == [4]


def test_an_error_is_torchs_own():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        accelerated(linear())(torch.randn(4, 1023))
    with pytest.raises(RuntimeError, match="expected input"):
        accelerated(conv(padding=1))(torch.randn(1, 127, 2, 2))


@pytest.mark.parametrize("first", ["adapters", "kernels"])
def test_adapters_go_on_such_layers(first):
    model = nn.Sequential(linear(), conv(in_channels=513, kernel_size=1))
    model.forward = lambda x: model[1](model[0](x).mT[..., None])
    x = torch.randn(1, 3, 1024)
    want = model(x)
    if first == "kernels":
        undo = lorakern.accelerate_frozen(model)
    adapters = lorakern.inject(model, rank=2, targets=["0", "1"])
    if first == "adapters":
        undo = lorakern.accelerate_frozen(model)
    torch.testing.assert_close(model(x), want)
    for adapter in adapters.values():
        nn.init.normal_(adapter.up)
    changed = model(x)
    changed.sum().backward()
    assert all(a.down.grad.any() for a in adapters.values())
    lorakern.merge(model)
    torch.testing.assert_close(model(x), changed)
    lorakern.unmerge(model)
    lorakern.eject(model)
    torch.testing.assert_close(model(x), want)
    undo()
    assert [type(layer) for layer in model] == [nn.Linear, nn.Conv2d]


def test_a_whole_unet(monkeypatch, calls):
    from diffusers import UNet2DConditionModel

    monkeypatch.setattr(op, "VALUES", 1)
    unet = UNet2DConditionModel(**tiny.unet_config()).requires_grad_(False)
    x = torch.randn(1, unet.config.in_channels, 4, 4, requires_grad=True)
    text = torch.randn(1, 5, unet.config.cross_attention_dim)

    def both():
        y = unet(x, 7, text).sample
        return y, torch.autograd.grad(y.square().sum(), x)[0]

    want = both()
    lorakern.inject(unet, rank=2, targets="attn")
    undo = lorakern.accelerate_frozen(unet)
    torch.testing.assert_close(both(), want)
    assert len(calls) > 10
    undo()

"""What lora_linear keeps for backward, and what a gain near 1 does in 16-bit."""

import pytest
import torch
from test_lora_linear import TRAINED, detached, dtypes, inputs
from torch.utils.checkpoint import checkpoint

from lorakern import backend
from lorakern.functional import lora_linear
from lorakern.ops.check import wide
from lorakern.ops.lora_linear import reference
from lorakern.testing import lost_share


@dtypes
def test_saved_for_backward_is_x_and_h(dtype, device):
    args = inputs(((4, 9), 32, 48, 5), dtype, device)
    known = {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
    new = []

    def pack(tensor):
        if tensor.data_ptr() not in known:
            new.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linear(*args)
    assert new == [(4, 9, 5)]


@dtypes
@pytest.mark.parametrize("gain", [False, True])
def test_recompute_keeps_x_alone(gain, dtype, device):
    args = inputs(((4, 9), 32, 48, 5), dtype, device, gain=gain)
    trained = [args[i] for i in TRAINED[: 3 + gain]]
    known = {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
    new = []

    def pack(tensor):
        new.extend([tuple(tensor.shape)] * (tensor.data_ptr() not in known))
        return tensor

    for kernel in (None, "reference"):
        with backend.use(kernel):
            want = torch.autograd.grad(lora_linear(*args).square().sum(), trained)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                y = lora_linear(*args, recompute=True)
            got = torch.autograd.grad(y.square().sum(), trained)
        for mine, right in zip(got, want, strict=True):
            # h is torch's product, rounded as the kernel rounds its own
            near = 4 * torch.finfo(dtype).eps * right.abs().max().item()
            torch.testing.assert_close(mine, right, rtol=0, atol=near)
    assert new == []


def test_a_frozen_down_keeps_no_x(device):
    args = inputs(((4, 9), 32, 48, 5), torch.float32, device)
    x, down, up = args[0], args[3], args[4]
    want = torch.autograd.grad(lora_linear(*args).sum(), [x, up])
    down.requires_grad_(False)
    saved = []

    def pack(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    for kernel in (None, "reference"):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), backend.use(kernel):
            y = lora_linear(*args)
        with backend.use(kernel):
            got = torch.autograd.grad(y.sum(), [x, up])
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert saved and x.data_ptr() not in saved
    compiled = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(*args).sum(), [x, up])
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@dtypes
def test_a_gain_near_one_is_not_rounded(dtype, device):
    """A gain of 1 + 1e-4 is 1 in 16-bit; its effect must reach the output and its gradient."""
    args = inputs(((512,), 64, 640, 4), dtype, device, bias=False, gain=True)
    x, weight, _, down, up, scale, _ = detached(args)
    gain = torch.full((640,), 1 + 1e-4, dtype=wide(dtype), device=device, requires_grad=True)
    acc = reference.lora_linear_fwd(*(a.double() for a in (x, weight)), None, down.double(),
                                    up.double(), scale, None)[0]  # fmt: skip
    for kernel in (k for k, r in backend.why("lora_linear_fwd", *args).items() if r == "ok"):
        with backend.use(lora_linear_fwd=kernel):
            y = lora_linear(x, weight, None, down, up, scale, gain)
        assert y.dtype == dtype
        assert abs(lost_share(lambda y=y: y, 1e-4 * acc, acc)) < 0.1
        assert torch.autograd.grad(y.sum(), gain)[0].dtype == wide(dtype)


@dtypes
def test_a_trained_gain_keeps_the_output_itself(dtype, device):
    """Beside h no memory that the output is not already in: y is not copied."""
    args = inputs(((4, 9), 32, 48, 5), dtype, device, gain=True)
    known = {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = lora_linear(*args)
    new = {at: shape for at, shape in saved.items() if at not in known}
    new.pop(y.data_ptr(), None)
    assert list(new.values()) == [(4, 9, 5)]


def gain_case(change, device):
    """Arguments in float32 of which y alone may not tell what the gain's gradient is."""
    args = list(inputs(((150,), 32, 48, 5), torch.float32, device, gain=True))
    with torch.no_grad():
        change(args[2], args[6])
    return args


def zero_gain(bias, gain):
    gain[7] = 0


def tiny_gain(bias, gain):
    gain[7] = 1e-9


def large_bias(bias, gain):
    bias[7] = 1e6


def none(bias, gain):
    pass


@pytest.mark.parametrize("change", [none, zero_gain, tiny_gain, large_bias])
@pytest.mark.parametrize("after", ["kept", "overwritten"])
def test_the_gradient_of_a_gain_is_right_whatever_became_of_y(change, after, device):
    args = gain_case(change, device)
    y = lora_linear(*args)
    dy = torch.randn_like(y)
    out = y.mul_(0.5) if after == "overwritten" else 0.5 * y
    got = torch.autograd.grad(out, [args[i] for i in TRAINED], dy)
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in detached(args)]
    _, h = reference.lora_linear_fwd(*wide)
    x, weight, _, down, up, scale, gain = wide
    needs = [True] * 4
    want = reference.lora_linear_bwd(0.5 * dy.double(), x, h, weight, down, up, scale, gain, needs)
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=2e-5)


def test_checkpointing_with_a_gain_gives_the_same_gradients(device):
    args = inputs(((4, 9), 32, 48, 5), torch.float32, device, gain=True)
    trained = [args[i] for i in TRAINED]
    want = torch.autograd.grad(lora_linear(*args).square().sum(), trained)
    y = checkpoint(lora_linear, *args, use_reentrant=False)
    for mine, right in zip(torch.autograd.grad(y.square().sum(), trained), want, strict=True):
        assert torch.equal(mine, right)

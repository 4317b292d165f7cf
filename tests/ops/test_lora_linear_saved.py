"""What lora_linear keeps for backward, and what a gain near 1 does in 16-bit."""

import torch
from test_lora_linear import detached, dtypes, inputs

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

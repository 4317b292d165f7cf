"""lora_linear takes float32 factors beside any x: as if they had been rounded before the call."""

import pytest
import torch

from lorakern import backend
from lorakern.functional import lora_linear

dtypes = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:]
)
ways = pytest.mark.parametrize("way", [None, "reference"], ids=["picked", "reference"])


def layer(dtype, device, bias=True):
    """x, weight, bias of dtype, and down and up in float32, of which the second is strided."""
    x, weight = torch.randn(2, 21, 40), torch.randn(72, 40) / 6
    frozen = [t.to(device, dtype) for t in (x, weight, torch.randn(72))]
    down, up = torch.randn(5, 40) / 6, torch.randn(5, 72).t()
    return frozen[0], frozen[1], frozen[2] if bias else None, down.to(device), up.to(device)


def outputs(x, weight, bias, down, up, to=None):
    """y, and the gradients of x, down and up, with factors rounded to `to` before the call."""
    leaves = [t.detach().requires_grad_() for t in (x, down, up)]
    x, down, up = leaves
    if to is not None:
        down, up = down.to(to), up.to(to)
    y = lora_linear(x, weight, bias, down, up, 0.7)
    return y, *torch.autograd.grad(y.float().square().sum(), leaves)


@ways
@dtypes
def test_as_if_rounded_before(dtype, way, device):
    args = layer(dtype, device)
    with backend.use(way):
        got, want = outputs(*args), outputs(*args, to=dtype)
    assert [g.dtype for g in got] == [dtype, dtype, torch.float32, torch.float32]
    for name, a, b in zip(("y", "dx", "ddown", "dup"), got, want, strict=True):
        assert torch.equal(a, b), name


@dtypes
@pytest.mark.parametrize("wide", [0, 1], ids=["down", "up"])
def test_one_of_them_alone(wide, dtype, device):
    x, weight, _, *factors = layer(dtype, device, bias=False)
    want = lora_linear(x, weight, None, *(f.to(dtype) for f in factors), 0.7)
    factors[1 - wide] = factors[1 - wide].to(dtype)
    assert torch.equal(lora_linear(x, weight, None, *factors, 0.7), want)


@ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_rounding_is_that_of_torch(dtype, way, device):
    # ties, the largest before infinity, what becomes infinite, what 16 bits hold with a few digits
    top = torch.finfo(dtype).max
    given = torch.tensor([1 + 1 / 256, 1 + 3 / 256, 1 + 1 / 2048, 1 + 3 / 2048, -1.1, 0.0, top,
                          1.001 * top, 1e-7, 1e-38, float("inf"), float("nan")] * 5)  # fmt: skip
    up = given[:, None].to(device)
    x, weight = torch.zeros(1, 1, dtype=dtype), torch.zeros(len(given), 1, dtype=dtype)
    x, weight, down = x.to(device), weight.to(device), torch.ones(1, 1, device=device)
    with backend.use(way):
        got = lora_linear(x + 1, weight, None, down, up, 1.0)
    assert torch.equal(got[0].isnan(), given.isnan().to(device))
    assert torch.equal(got[0].nan_to_num(3.0), given.to(device, dtype).nan_to_num(3.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_what_is_neither_is_refused(dtype, device):
    x, weight, bias, down, up = layer(dtype, device)
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    with pytest.raises(ValueError, match=f"mixed dtypes: .*down {other}"):
        lora_linear(x, weight, bias, down.to(other), up, 1.0)
    with pytest.raises(ValueError, match=r"want up \[72, 5\], got \[72, 4\]"):
        lora_linear(x, weight, bias, down, up[:, :4], 1.0)
    with pytest.raises(ValueError, match=f"mixed devices: x {device}.*down meta"):
        lora_linear(x, weight, bias, down.to("meta"), up, 1.0)


def test_backward_is_of_the_factors_that_ran(device):
    x, weight, bias, down, up = layer(torch.bfloat16, device)
    leaves = x.requires_grad_(), down.requires_grad_(), up.detach().requires_grad_()
    x, down, up = leaves

    def grads(change):
        y = lora_linear(x, weight, bias, down, up, 1.0)
        with torch.no_grad():
            down.mul_(change)
        return torch.autograd.grad(y.float().sum(), leaves)

    # backward has the copies that were rounded
    for before, after in zip(grads(1), grads(2), strict=True):
        assert torch.equal(before, after)

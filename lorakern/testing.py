"""The questions put to every op, and the judge of right and wrong.

A kernel is right when, against the truth, it is off by no more than twice what plain torch is off
in the same dtype: in the largest error and in the root mean square. The truth is the spec in
float64, with every sum of products rounded once, at its end; so float64 itself can be judged.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorakern import backend

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def assert_as_exact_as_torch(name: str, got: Tensor, exact: Tensor, torch_same_dtype: Tensor):
    """The kernel may be off from the truth by twice what plain torch in its own dtype is off.

    Asked of the largest error (one rounding of slack) and of the root mean square (a 64th of one):
    the first finds one bad element, the second a small error everywhere, such as a scale 1 % off.
    Both bounds come from the data, so no tolerance is set by hand for a dtype or a shape.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(exact.shape)}"
    assert got.dtype == torch_same_dtype.dtype, f"{name}: dtype {got.dtype}"
    assert got.isfinite().all(), f"{name}: {(~got.isfinite()).sum()} values are not finite"
    if exact.numel() == 0:
        return
    error, torch_error = got.double() - exact, torch_same_dtype.double() - exact
    rounding = torch.finfo(got.dtype).eps * exact.abs().max().item()
    if got.dtype == torch.float64:
        rounding *= 2  # the truth is rounded too
    # few values are luck: of two equally exact results, the second has twice the rms of the first
    # once in 2e7 times with 64 values, but once in 240 with 16 (F distribution)
    rms_slack = rounding / 64 if exact.numel() >= 64 else rounding
    for what, size, slack in (("max", _largest, rounding), ("rms", _rms, rms_slack)):
        off, allowed = size(error), 2 * size(torch_error) + slack
        assert off <= allowed, f"{name}: {what} error {off:.3e}, torch in {got.dtype} {allowed:.3e}"


def check_every_kernel(op: str, args: tuple, only: str | None = None) -> None:
    """Each kernel of an op that does not refuse `args` is as exact as torch, and changes no input.

    The spec runs in float64 for the truth, and in the arguments' own dtype for the bound. `only`:
    the one kernel that is asked, which may not refuse.
    """
    found = backend.OPS[op]
    exact = _tuple(exactly(found.reference, *args))
    same = _tuple(found.reference(*args))
    reasons = backend.why(found, *args)
    assert only is None or reasons[only] == "ok", f"{op} on {only}: {reasons[only]}"
    for name in [only] if only else [b for b, reason in reasons.items() if reason == "ok"]:
        given = copy.deepcopy(args)
        results = _tuple(found.load(name)(*given))
        for i, (got, want, plain) in enumerate(zip(results, exact, same, strict=True)):
            assert_as_exact_as_torch(f"{op} on {name}, result {i}", got, want, plain)
            assert got.is_contiguous(), f"{op} on {name}: result {i} is not contiguous"
        again = _tuple(found.load(name)(*given))
        for got, twice in zip(results, again, strict=True):
            assert torch.equal(got, twice), f"{op} on {name}: a second run gives other bits"
        for before, after in zip(tensors(args), tensors(given), strict=True):
            assert torch.equal(before, after), f"{op} on {name} changed an input"


def exactly(spec: Callable, *args):
    """The truth: spec(*args) in float64, with no rounding inside the sums of its products."""
    with _RoundedOnce():
        return spec(*_to(args, torch.float64))


def check_backward_formula(function: Callable, spec: Callable, args: tuple) -> None:
    """The hand-written backward equals autograd of the spec's forward, in float64.

    `args` are float64; those that require a gradient get one. `spec` may return more than y.
    """
    mine, theirs = _leaves(args), _leaves(args)
    y, want = function(*mine), _tuple(spec(*theirs))[0]
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    y.backward(dy)
    want.backward(dy)
    for i, (a, b) in enumerate(zip(tensors(mine), tensors(theirs), strict=True)):
        if a.requires_grad:
            assert a.grad is not None, f"tensor {i} of the arguments got no gradient"
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def lost_share(run: Callable[..., Tensor], delta_exact: Tensor, base_exact: Tensor) -> float:
    """Share of the update's effect that an output lost: 1 - <y - base, delta> / <delta, delta>.

    Args:
        run: makes y in the dtype under test.
        delta_exact, base_exact: the update's output and the frozen output, in float64.

    Returns:
        0.0 when nothing is lost on average, 1.0 when all is; no unit.
    """
    felt = run().double() - base_exact
    return 1.0 - ((felt * delta_exact).sum() / delta_exact.square().sum()).item()


# aten's products: how many leading arguments are factors; a result is linear in the first of them
# and in one other
_FACTORS = {
    torch.ops.aten.mm.default: 2,
    torch.ops.aten.bmm.default: 2,
    torch.ops.aten.mv.default: 2,
    torch.ops.aten.dot.default: 2,
    torch.ops.aten.convolution.default: 2,
    torch.ops.aten.convolution_backward.default: 3,
}


class _RoundedOnce(TorchDispatchMode):
    """Rounds a float64 sum of products once, where plain torch rounds after every term.

    A factor is cut into a head of 20 bits and a tail. A sum of up to 2^13 products of heads fits in
    53 bits and is exact in any order; a product with a tail is a millionth of it, as is its error.
    Source: the splitting of Ozaki et al. 2012, doi:10.1007/s11075-011-9478-1.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten, bias = torch.ops.aten, 0
        if func is aten.addmm.default:
            func, (bias, *args) = aten.mm.default, args
        elif func is aten.convolution.default and args[2] is not None:
            bias, args = args[2].view(-1, *[1] * (args[0].dim() - 2)), (*args[:2], None, *args[3:])
        if func not in _FACTORS:
            return func(*args, **(kwargs or {}))
        factors, rest = args[: _FACTORS[func]], args[_FACTORS[func] :]
        heads = [_head(t) for t in factors]
        tails = [t - head for t, head in zip(factors, heads, strict=True)]
        pairs = [(tails, tails), (tails, heads), (heads, tails), (heads, heads)]
        parts = [_tuple(func(left[0], *right[1:], *rest)) for left, right in pairs]
        sums = tuple(None if t[0] is None else sum(t) for t in zip(*parts, strict=True))
        return sums if len(sums) > 1 else sums[0] + bias


def _head(t: Tensor) -> Tensor:
    """t rounded to 20 bits below its largest value."""
    if t.numel() == 0:
        return t
    grid = 2.0 ** (math.frexp(_largest(t))[1] - 20)
    return (t / grid).round() * grid


def _largest(t: Tensor) -> float:
    return t.abs().max().item()


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def _tuple(results) -> tuple:
    return results if isinstance(results, tuple) else (results,)


def _to(args: tuple, dtype: torch.dtype) -> tuple:
    return backend.on_tensors(lambda t: t.to(dtype), args)


def _leaves(args: tuple) -> tuple:
    return backend.on_tensors(lambda t: t.detach().clone().requires_grad_(t.requires_grad), args)


def tensors(args: tuple) -> list[Tensor]:
    """The tensors among an op's arguments, also those in lists."""
    found: list[Tensor] = []
    backend.on_tensors(found.append, args)
    return found

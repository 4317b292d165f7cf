"""The questions put to every op, and the judge of right and wrong.

A kernel is right when, against float64, it is off by no more than twice what plain torch is off
in the same dtype: in the largest error and in the root mean square.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from lorakern import backend

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def assert_as_exact_as_torch(name: str, got: Tensor, exact: Tensor, torch_same_dtype: Tensor):
    """The kernel may be off from float64 by twice what plain torch in its own dtype is off.

    Asked of the largest error (one rounding of slack) and of the root mean square: the first finds
    one bad element, the second a small error everywhere, such as a scale 1 % off. Both bounds come
    from the data, so no tolerance is set by hand for a dtype or a shape.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(exact.shape)}"
    assert got.dtype == torch_same_dtype.dtype, f"{name}: dtype {got.dtype}"
    assert got.isfinite().all(), f"{name}: {(~got.isfinite()).sum()} values are not finite"
    if exact.numel() == 0:
        return
    error, torch_error = got.double() - exact, torch_same_dtype.double() - exact
    rounding = torch.finfo(got.dtype).eps * exact.abs().max().item()
    for what, size in (("max", _largest), ("rms", _rms)):
        # the mean of few errors is luck
        slack = rounding if what == "max" else rounding / min(64, exact.numel() ** 0.5)
        off, allowed = size(error), 2 * size(torch_error) + slack
        assert off <= allowed, f"{name}: {what} error {off:.3e}, torch in {got.dtype} {allowed:.3e}"


def check_every_kernel(op: str, args: tuple) -> None:
    """Each kernel of an op that does not refuse `args` is as exact as torch, and changes no input.

    The spec runs in float64 for the truth, and in the arguments' own dtype for the bound.
    """
    found = backend.OPS[op]
    exact = _tuple(found.reference(*_to(args, torch.float64)))
    same = _plain(found.reference, args, exact)
    ran = [b for b, reason in backend.why(found, *args).items() if reason == "ok"]
    for name in ran:
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


def _plain(reference: Callable, args: tuple, exact: tuple) -> tuple:
    """Plain torch in the dtype of args; in float64, which is the truth, as far off as in float32.

    Scaled by the ratio of their roundings, and eight times that: the truth errs too, and more where
    its float64 product adds a longer run of terms in a row.
    """
    if args[0].dtype != torch.float64:
        return _tuple(reference(*args))
    rounded = _to(args, torch.float32)
    coarse, fine = reference(*rounded), reference(*_to(rounded, torch.float64))
    ratio = 8 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    errors = [c.double() - f for c, f in zip(_tuple(coarse), _tuple(fine), strict=True)]
    return tuple(e + ratio * error for e, error in zip(exact, errors, strict=True))


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

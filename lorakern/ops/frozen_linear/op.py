"""frozen_linear: a frozen linear layer of few rows, whose weight is read as it lies in memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from lorakern import backend
from lorakern.backend import Kernel
from lorakern.ops import check
from lorakern.ops.frozen_linear import reference

# rows that are few, and the values of a weight, for each of them, that is large beside them; a
# weight for fewer than four is no smaller than one for four, or the call takes longer than it
ROWS, VALUES = range(2, 33), 2**16


def refusal(rows: int, weight: Tensor, few: range = ROWS) -> str | None:
    """Why the product of so many rows with weight [O, I] is left to torch; None when it is not."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"{weight.dtype} on {weight.device.type}; this kernel is for float32 on cpu"
    if rows not in few or weight.numel() < max(4, rows) * VALUES:
        return (
            f"{rows} rows, {weight.numel()} weights: few are {few[0]} to {few[-1]} rows, with"
            f" {VALUES} weights or more for each, {4 * VALUES} at the least"
        )
    return "an Intel CPU: MKL is at its best there" if _mkl_is_best() else None


def _mkl_is_best() -> bool:
    native = torch.ops.lorakern_native
    return hasattr(native, "fast_torch") and native.fast_torch()


def _refuse(first: Tensor, weight: Tensor, *_) -> str | None:
    return refusal(first.numel() // max(1, first.shape[-1]), weight)


_fwd = backend.define(
    "frozen_linear_fwd",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor y",
    reference.frozen_linear_fwd,
    cpp=Kernel("native:frozen_linear_fwd_cpu", _refuse),
)
_bwd = backend.define(
    "frozen_linear_bwd",
    "(Tensor dy, Tensor weight) -> Tensor dx",
    reference.frozen_linear_bwd,
    cpp=Kernel("native:frozen_linear_bwd_cpu", _refuse),
)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return _fwd(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        return _bwd(dy.contiguous(), weight), None, None


# by dtype and shapes of CPU tensors
_whole: dict[tuple, Callable | None] = backend.memory_of_picks()


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Frozen linear layer: x Wᵀ + b.

    Of 2 to 32 rows beside a large weight in float32, the time is that of reading the weight once.
    Nothing is saved for backward but the weight.

    Args:
        x: [..., I], any floating dtype, the same for every tensor here.
        weight: [O, I], frozen: it gets no gradient.
        bias: [O] or None, frozen.

    Returns:
        [..., O], contiguous, in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit, or weight or bias asks for a gradient.
    """
    if x.is_cpu and not torch.compiler.is_compiling():
        shapes = x.dtype, x.shape, weight.shape
        if shapes not in _whole:
            check.frozen_linear(x, weight, bias, None)
            _whole[shapes] = backend.whole(_fwd, _bwd, "frozen_linear_cpu", x, weight, bias)
        if run := _whole[shapes]:
            try:
                return run(x, weight, bias)
            except (ValueError, IndexError):
                # it looks faster than this, and says less
                check.frozen_linear(x, weight, bias, None)
                raise
    check.frozen_linear(x, weight, bias, None)
    return _FrozenLinear.apply(x.contiguous(), weight.contiguous(), bias)

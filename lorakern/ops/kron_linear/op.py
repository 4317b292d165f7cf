"""kron_linear: the frozen linear layer and its Kronecker update in one pass."""

import torch
from torch import Tensor

from lorakern import backend
from lorakern.backend import Kernel
from lorakern.ops import check
from lorakern.ops.four_factors import FourFactors
from lorakern.ops.kron_linear import reference


def _refuse_triton(x, *_) -> str | None:
    return check.refuse_triton(x)


def _refuse_cuda(dy, x, *rest) -> str | None:
    need_dx, *need_factors, need_dgain = rest[-1]
    if not x.is_cuda:
        return f"x is on {x.device.type}; this kernel is for cuda"
    if need_dgain:
        return "dgain needs the forward product, which this kernel does not make"
    if need_dx and x.dtype in (torch.float16, torch.bfloat16):
        return f"dx is two products added in {x.dtype}, rounded in between; it must not be needed"
    if not any(need_factors):
        return "no factor needs a gradient; this kernel is for theirs"
    return None


_fwd = backend.define(
    "kron_linear_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor c_up, Tensor? c_down, Tensor d_up,"
    " Tensor? d_down, Tensor scale, Tensor? gain) -> Tensor",
    reference.kron_linear_fwd,
    cpp=Kernel("native:kron_linear_fwd_cpu", check.only_cpu),
    triton=Kernel("lorakern.ops.kron_linear.triton_kernel:kron_linear_fwd", _refuse_triton),
)
_bwd = backend.define(
    "kron_linear_bwd",
    "(Tensor dy, Tensor x, Tensor weight, Tensor c_up, Tensor? c_down, Tensor d_up,"
    " Tensor? d_down, Tensor scale, Tensor? gain, bool[6] needs)"
    " -> (Tensor dx, Tensor dc_up, Tensor dc_down, Tensor dd_up, Tensor dd_down, Tensor dgain)",
    reference.kron_linear_bwd,
    cpp=Kernel("native:kron_linear_bwd_cpu", check.only_cpu),
    triton=Kernel("lorakern.ops.kron_linear.triton_bwd:kron_linear_bwd", _refuse_triton),
    cuda=Kernel("native:kron_linear_bwd_cuda", _refuse_cuda),
)


def _refuse(x, weight, bias, gain, c_up, c_down, d_up, d_down) -> None:
    factors = dict(c_up=c_up, c_down=c_down, d_up=d_up, d_down=d_down)
    check.frozen_linear(x, weight, bias, gain, **factors)
    check.matrices(**factors)
    for name, up, down in (("c", c_up, c_down), ("d", d_up, d_down)):
        if down is not None and up.shape[1] != down.shape[0]:
            raise ValueError(
                f"{name}_up {list(up.shape)} and {name}_down {list(down.shape)} share no rank"
            )
    sizes = [
        [up.shape[0], (up if down is None else down).shape[1]]
        for up, down in ((c_up, c_down), (d_up, d_down))
    ]
    made = [c * d for c, d in zip(*sizes, strict=True)]
    if made != list(weight.shape):
        raise ValueError(
            f"C {sizes[0]} and D {sizes[1]} multiply to {made}, weight is {list(weight.shape)}"
        )


_run = FourFactors(_fwd, _bwd, "kron_linear_cpu", _refuse)


def kron_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    c_up: Tensor,
    c_down: Tensor | None,
    d_up: Tensor,
    d_down: Tensor | None,
    scale: float | Tensor,
    gain: Tensor | None = None,
) -> Tensor:
    """Linear layer with a Kronecker update: gain∘(x Wᵀ + scale·x (C ⊗ D)ᵀ) + b, C ⊗ D never made.

    In 16-bit the base product and the update share one float32 accumulator and are rounded once.
    Kept for backward: x and the factors.

    Args:
        x: [..., I], any floating dtype, the same for every tensor but the gain.
        weight: [O, I] with O = A·P and I = B·Q, frozen: it gets no gradient.
        bias: [O] or None, frozen.
        c_up, c_down: [A, B] and None for a whole C, or [A, R] and [R, B]; trained.
        d_up, d_down: [P, Q] and None for a whole D, or [P, S] and [S, Q]; trained.
        scale: alpha / rank, times the user's multiplier; no unit. Under torch.compile a 0-dim
            CPU tensor, so that a change of its value recompiles nothing.
        gain: [O] or None for 1, trained: DoRA's magnitude over the row norm of W + ΔW; no unit.
            Beside 16-bit tensors in float32, or one near 1 were lost.

    Returns:
        [..., O], contiguous, in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit, or weight or bias asks for a gradient.

    Source: Yeh et al. 2023, arXiv:2309.14859.
    """
    return _run(x, weight, bias, (c_up, c_down, d_up, d_down), scale, gain)

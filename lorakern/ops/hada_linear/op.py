"""hada_linear: the frozen linear layer and its Hadamard update in one pass."""

from torch import Tensor

from lorakern import backend
from lorakern.backend import Kernel
from lorakern.ops import check
from lorakern.ops.four_factors import FourFactors
from lorakern.ops.hada_linear import reference


def _refuse_triton(x, weight, bias, down1, up1, down2, *_) -> str | None:
    return check.refuse_triton(x, down1.shape[0], down2.shape[0])


def _refuse_triton_bwd(dy, x, weight, *factors_and_rest) -> str | None:
    return _refuse_triton(x, weight, None, *factors_and_rest)


_fwd = backend.define(
    "hada_linear_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor down1, Tensor up1, Tensor down2, Tensor up2,"
    " Tensor scale, Tensor? gain) -> Tensor",
    reference.hada_linear_fwd,
    cpp=Kernel("native:hada_linear_fwd_cpu", check.only_cpu),
    triton=Kernel("lorakern.ops.hada_linear.triton_kernel:hada_linear_fwd", _refuse_triton),
)
_bwd = backend.define(
    "hada_linear_bwd",
    "(Tensor dy, Tensor x, Tensor weight, Tensor down1, Tensor up1, Tensor down2, Tensor up2,"
    " Tensor scale, Tensor? gain, bool[6] needs)"
    " -> (Tensor dx, Tensor ddown1, Tensor dup1, Tensor ddown2, Tensor dup2, Tensor dgain)",
    reference.hada_linear_bwd,
    cpp=Kernel("native:hada_linear_bwd_cpu", check.only_cpu),
    triton=Kernel("lorakern.ops.hada_linear.triton_bwd:hada_linear_bwd", _refuse_triton_bwd),
)


def _refuse(x, weight, bias, gain, down1, up1, down2, up2) -> None:
    check.frozen_linear(x, weight, bias, gain, down1=down1, up1=up1, down2=down2, up2=up2)
    check.matrices(down1=down1, down2=down2)
    (out_features, in_features), first, second = weight.shape, down1.shape[0], down2.shape[0]
    check.shapes(
        down1=(down1, [first, in_features]),
        up1=(up1, [out_features, first]),
        down2=(down2, [second, in_features]),
        up2=(up2, [out_features, second]),
    )


_run = FourFactors(_fwd, _bwd, "hada_linear_cpu", _refuse)


def hada_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down1: Tensor,
    up1: Tensor,
    down2: Tensor,
    up2: Tensor,
    scale: float | Tensor,
    gain: Tensor | None = None,
) -> Tensor:
    """Linear layer with a Hadamard update: gain∘(x Wᵀ + scale·x [(up1 down1)∘(up2 down2)]ᵀ) + b.

    In 16-bit the base product and the update share one float32 accumulator and are rounded once.
    Kept for backward: x and the factors.

    Args:
        x: [..., I], any floating dtype, the same for every tensor but the gain.
        weight: [O, I], frozen: it gets no gradient.
        bias: [O] or None, frozen.
        down1, down2: [R, I], [S, I], trained; the two ranks may differ.
        up1, up2: [O, R], [O, S], trained.
        scale: alpha / rank, times the user's multiplier; no unit. Under torch.compile a 0-dim
            CPU tensor, so that a change of its value recompiles nothing.
        gain: [O] or None for 1, trained: DoRA's magnitude over the row norm of W + ΔW; no unit.
            Beside 16-bit tensors in float32, or one near 1 were lost.

    Returns:
        [..., O], contiguous, in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit, or weight or bias asks for a gradient.

    Source: Hyeon-Woo et al. 2022, arXiv:2108.06098; Yeh et al. 2023, arXiv:2309.14859.
    """
    return _run(x, weight, bias, (down1, up1, down2, up2), scale, gain)

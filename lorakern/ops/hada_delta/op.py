"""hada_delta: the weight update of LoHa alone."""

import torch
from torch import Tensor

from lorakern import backend
from lorakern.backend import Kernel
from lorakern.ops import check
from lorakern.ops.hada_delta import reference


def _refuse_triton(down1, up1, down2, *_) -> str | None:
    return check.refuse_triton(down1, down1.shape[0], down2.shape[0])


_fwd = backend.define(
    "hada_delta_fwd",
    "(Tensor down1, Tensor up1, Tensor down2, Tensor up2, Tensor scale) -> Tensor",
    reference.hada_delta_fwd,
    cpp=Kernel("native:hada_delta_fwd_cpu", check.only_cpu),
    triton=Kernel("lorakern.ops.hada_delta.triton_kernel:hada_delta_fwd", _refuse_triton),
    cuda=Kernel("native:hada_delta_fwd_cuda", check.only_cuda),
)
_bwd = backend.define(
    "hada_delta_bwd",
    "(Tensor ddelta, Tensor down1, Tensor up1, Tensor down2, Tensor up2, Tensor scale,"
    " bool[4] needs) -> (Tensor ddown1, Tensor dup1, Tensor ddown2, Tensor dup2)",
    reference.hada_delta_bwd,
    cpp=Kernel("native:hada_delta_bwd_cpu", check.only_cpu),
    triton=Kernel(
        "lorakern.ops.hada_delta.triton_kernel:hada_delta_bwd",
        lambda ddelta, *args: _refuse_triton(*args),
    ),
    cuda=Kernel("native:hada_delta_bwd_cuda", check.only_cuda),
)


class _HadaDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, down1, up1, down2, up2, scale):
        ctx.save_for_backward(down1, up1, down2, up2)
        ctx.scale = scale
        return _fwd(down1, up1, down2, up2, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, ddelta):
        needs = list(ctx.needs_input_grad[:4])
        grads = _bwd(ddelta.contiguous(), *ctx.saved_tensors, ctx.scale, needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


def hada_delta(
    down1: Tensor, up1: Tensor, down2: Tensor, up2: Tensor, scale: float | Tensor
) -> Tensor:
    """Hadamard weight update: ΔW = scale·(up1 down1) ∘ (up2 down2).

    Sums are float32 (float64 for float64); in 16-bit the result is rounded once.

    Args:
        down1, down2: [R, I], [S, I], trained, of one floating dtype. Of a convolution I is
            in_channels·kh·kw.
        up1, up2: [O, R], [O, S], trained.
        scale: alpha / rank, times the user's multiplier; no unit. Under torch.compile a 0-dim
            CPU tensor, so that a change of its value recompiles nothing.

    Returns:
        [O, I], contiguous, in the factors' dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: Hyeon-Woo et al. 2022, arXiv:2108.06098; Yeh et al. 2023, arXiv:2309.14859.
    """
    check.matrices(down1=down1, up1=up1, down2=down2, up2=up2)
    (first, columns), rows = down1.shape, up1.shape[0]
    second = down2.shape[0]
    check.shapes(
        up1=(up1, [rows, first]), down2=(down2, [second, columns]), up2=(up2, [rows, second])
    )
    check.alike(down1=down1, up1=up1, down2=down2, up2=up2)
    return _HadaDelta.apply(down1, up1, down2, up2, check.live(scale))

"""kron_delta: the weight update of LoKr alone."""

import torch
from torch import Tensor

from lorakern import backend
from lorakern.backend import Kernel
from lorakern.ops import check
from lorakern.ops.kron_delta import reference


def _refuse_triton(c, *_) -> str | None:
    return check.refuse_triton(c)


_fwd = backend.define(
    "kron_delta_fwd",
    "(Tensor c, Tensor d, Tensor scale) -> Tensor",
    reference.kron_delta_fwd,
    cpp=Kernel("native:kron_delta_fwd_cpu", check.only_cpu),
    triton=Kernel("lorakern.ops.kron_delta.triton_kernel:kron_delta_fwd", _refuse_triton),
    cuda=Kernel("native:kron_delta_fwd_cuda", check.only_cuda),
)
_bwd = backend.define(
    "kron_delta_bwd",
    "(Tensor ddelta, Tensor c, Tensor d, Tensor scale, bool[2] needs) -> (Tensor dc, Tensor dd)",
    reference.kron_delta_bwd,
    cpp=Kernel("native:kron_delta_bwd_cpu", check.only_cpu),
    triton=Kernel(
        "lorakern.ops.kron_delta.triton_kernel:kron_delta_bwd",
        lambda ddelta, *args: _refuse_triton(*args),
    ),
    cuda=Kernel("native:kron_delta_bwd_cuda", check.only_cuda),
)


class _KronDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, c, d, scale):
        ctx.save_for_backward(c, d)
        ctx.scale = scale
        return _fwd(c, d, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, ddelta):
        needs = list(ctx.needs_input_grad[:2])
        grads = _bwd(ddelta.contiguous(), *ctx.saved_tensors, ctx.scale, needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


def kron_delta(c: Tensor, d: Tensor, scale: float | Tensor) -> Tensor:
    """Kronecker weight update: ΔW = scale·C ⊗ D.

    Sums are float32 (float64 for float64); in 16-bit the result is rounded once.

    Args:
        c: [A, B], d: [P, Q], trained, of one floating dtype, whole (of low-rank factors their
            product). Of a convolution Q is (in_channels / B)·kh·kw.
        scale: alpha / rank, times the user's multiplier; no unit. Under torch.compile a 0-dim
            CPU tensor, so that a change of its value recompiles nothing.

    Returns:
        [A·P, B·Q], contiguous, in the factors' dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: Yeh et al. 2023, arXiv:2309.14859.
    """
    check.matrices(c=c, d=d)
    check.alike(c=c, d=d)
    return _KronDelta.apply(c, d, check.live(scale))

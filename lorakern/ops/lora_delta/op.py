"""lora_delta: the weight update of LoRA alone."""

import torch
from torch import Tensor

from lorakern import backend
from lorakern.backend import Kernel
from lorakern.ops import check
from lorakern.ops.lora_delta import reference


def _refuse_triton(down, up, *_) -> str | None:
    return check.refuse_triton(down, down.shape[0])


_fwd = backend.define(
    "lora_delta_fwd",
    "(Tensor down, Tensor up, Tensor scale) -> Tensor",
    reference.lora_delta_fwd,
    cpp=Kernel("native:lora_delta_fwd_cpu", check.only_cpu),
    triton=Kernel("lorakern.ops.lora_delta.triton_kernel:lora_delta_fwd", _refuse_triton),
)
_bwd = backend.define(
    "lora_delta_bwd",
    "(Tensor ddelta, Tensor down, Tensor up, Tensor scale, bool[2] needs)"
    " -> (Tensor ddown, Tensor dup)",
    reference.lora_delta_bwd,
    cpp=Kernel("native:lora_delta_bwd_cpu", check.only_cpu),
    triton=Kernel(
        "lorakern.ops.lora_delta.triton_kernel:lora_delta_bwd",
        lambda ddelta, *args: _refuse_triton(*args),
    ),
)


class _LoraDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, down, up, scale):
        ctx.save_for_backward(down, up)
        ctx.scale = scale
        return _fwd(down, up, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, ddelta):
        needs = list(ctx.needs_input_grad[:2])
        grads = _bwd(ddelta.contiguous(), *ctx.saved_tensors, ctx.scale, needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


def lora_delta(down: Tensor, up: Tensor, scale: float | Tensor) -> Tensor:
    """Low-rank weight update: ΔW = scale·up down.

    Sums are float32 (float64 for float64); in 16-bit the result is rounded once.

    Args:
        down: [R, I], up: [O, R], trained, of one floating dtype. Of a convolution I is
            in_channels·kh·kw.
        scale: alpha / rank, times the user's multiplier; no unit. Under torch.compile a 0-dim
            CPU tensor, so that a change of its value recompiles nothing.

    Returns:
        [O, I], contiguous, in the factors' dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """
    check.matrices(down=down, up=up)
    check.shapes(up=(up, [up.shape[0], down.shape[0]]))
    check.alike(down=down, up=up)
    return _LoraDelta.apply(down, up, check.live(scale))

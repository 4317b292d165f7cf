"""lora_linear: the frozen linear layer and its low-rank update in one pass."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakern import backend
from lorakern.backend import Kernel
from lorakern.ops import check
from lorakern.ops.lora_linear import reference
from lorakern.ops.lora_linear import triton_tables as tables


def _refuse_cpp(x, *_) -> str | None:
    return None if x.device.type == "cpu" else f"x is on {x.device.type}; this kernel is for cpu"


_fwd = backend.define(
    "lora_linear_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor scale, Tensor? gain)"
    " -> (Tensor y, Tensor h)",
    reference.lora_linear_fwd,
    cpp=Kernel("native:lora_linear_fwd_cpu", _refuse_cpp),
    triton=Kernel("lorakern.ops.lora_linear.triton_kernel:lora_linear_fwd", tables.refuse_fwd),
)
_bwd = backend.define(
    "lora_linear_bwd",
    "(Tensor dy, Tensor x, Tensor h, Tensor weight, Tensor down, Tensor up, Tensor scale,"
    " Tensor? gain, bool[4] needs) -> (Tensor dx, Tensor ddown, Tensor dup, Tensor dgain)",
    reference.lora_linear_bwd,
    cpp=Kernel("native:lora_linear_bwd_cpu", _refuse_cpp),
    triton=Kernel("lorakern.ops.lora_linear.triton_bwd:lora_linear_bwd", tables.refuse_bwd),
)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up, gain, scale, recompute):
        y, h = _fwd(x, weight, bias, down, up, scale, gain)
        # h [M, R] saves a pass over x; a frozen down asks x for no more than its shape
        x = x if recompute or down.requires_grad or gain is not None else None
        ctx.save_for_backward(x, None if recompute else h, weight, down, up, gain)
        ctx.scale = scale
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, h, weight, down, up, gain = ctx.saved_tensors
        x = dy.new_empty(*dy.shape[:-1], weight.shape[1]) if x is None else x
        h = F.linear(x, down) if h is None else h
        needs = [ctx.needs_input_grad[i] for i in (0, 3, 4, 5)]
        grads = _bwd(dy.contiguous(), x, h, weight, down, up, ctx.scale, gain, needs)
        dx, *rest = (g if need else None for g, need in zip(grads, needs, strict=True))
        return dx, None, None, *rest, None, None


# by dtype of a CPU tensor; cpp does not refuse by shape, so a dtype decides
_whole: dict[torch.dtype, Callable | None] = backend.memory_of_picks()


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float | Tensor,
    gain: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Linear layer with a low-rank update: gain∘(x Wᵀ + scale·(x downᵀ) upᵀ) + b.

    In 16-bit the base product and the update share one float32 accumulator and are rounded once,
    so an update far below the rounding of the base product is not lost.

    Args:
        x: [..., I], any floating dtype, the same for weight and bias.
        weight: [O, I], frozen: it gets no gradient.
        bias: [O] or None, frozen.
        down: [R, I], trained; in x's dtype, or in float32 and rounded to it here.
        up: [O, R], trained; as down.
        scale: alpha / rank, times the user's multiplier; no unit. Under torch.compile a 0-dim
            CPU tensor, so that a change of its value recompiles nothing.
        gain: [O] or None for 1, trained: DoRA's magnitude over a row's norm; float32 beside 16-bit.
        recompute: keep x alone for backward, not x downᵀ [..., R] and, with a gain, the output.

    Returns:
        [..., O], contiguous, in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit, or weight or bias asks for a gradient.

    Source: Hu et al. 2021, arXiv:2106.09685; Liu et al. 2024, arXiv:2402.09353.
    """
    if x.is_cpu and not isinstance(scale, Tensor) and not torch.compiler.is_compiling():
        args = x, weight, bias, down, up, scale, gain
        if x.dtype not in _whole:
            check.low_rank_linear(x, weight, bias, gain, *_rounded(x, down, up))
            _whole[x.dtype] = backend.whole(_fwd, _bwd, "lora_linear_cpu", *args)
        if run := _whole[x.dtype]:
            try:
                return run(*args, recompute)
            except (ValueError, IndexError):
                # it looks faster than this, and says less
                check.low_rank_linear(x, weight, bias, gain, *_rounded(x, down, up))
                raise
    down, up = _rounded(x, down, up)
    check.low_rank_linear(x, weight, bias, gain, down, up)
    args = x.contiguous(), weight, bias, down, up, gain
    return _LoraLinear.apply(*args, check.live(scale), recompute)


def _rounded(x: Tensor, *factors: Tensor) -> list[Tensor]:
    # as lora_linear_cpu does by itself
    return [f.to(x.dtype) if f.dtype == torch.float32 else f for f in factors]

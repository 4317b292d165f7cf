"""lora_linear: the frozen linear layer and its low-rank update in one pass."""

from collections.abc import Callable

import torch
from torch import Tensor

from lorakern import backend
from lorakern.backend import Kernel
from lorakern.ops.lora_linear import reference
from lorakern.ops.lora_linear import triton_tables as tables


def _refuse_cpp(x, *_) -> str | None:
    return None if x.device.type == "cpu" else f"x is on {x.device.type}; this kernel is for cpu"


_fwd = backend.define(
    "lora_linear_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor scale)"
    " -> (Tensor y, Tensor h)",
    reference.lora_linear_fwd,
    cpp=Kernel("native:lora_linear_fwd_cpu", _refuse_cpp),
    triton=Kernel("lorakern.ops.lora_linear.triton_kernel:lora_linear_fwd", tables.refuse_fwd),
)
_bwd = backend.define(
    "lora_linear_bwd",
    "(Tensor dy, Tensor x, Tensor h, Tensor weight, Tensor down, Tensor up, Tensor scale,"
    " bool[3] needs) -> (Tensor dx, Tensor ddown, Tensor dup)",
    reference.lora_linear_bwd,
    cpp=Kernel("native:lora_linear_bwd_cpu", _refuse_cpp),
    triton=Kernel("lorakern.ops.lora_linear.triton_bwd:lora_linear_bwd", tables.refuse_bwd),
)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scale):
        y, h = _fwd(x, weight, bias, down, up, scale)
        # h is [M, R]: keeping it costs R/I of x and saves one pass over x in backward
        ctx.save_for_backward(x, h, weight, down, up)
        ctx.scale = scale
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        needs = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
        grads = _bwd(dy.contiguous(), *ctx.saved_tensors, ctx.scale, needs)
        dx, ddown, dup = (g if need else None for g, need in zip(grads, needs, strict=True))
        return dx, None, None, ddown, dup, None


# by dtype of a CPU tensor: the native function that is both directions of cpp, or False where
# something else was picked. cpp does not refuse by shape, so a dtype decides.
_whole: dict[torch.dtype, Callable | bool] = backend.memory_of_picks()


def _find_whole(*args) -> Callable | bool:
    on_cpp = backend.pick(_fwd, *args) == "cpp" and backend.forced(_bwd) in (None, "cpp")
    return on_cpp and torch.ops.lorakern_native.lora_linear_cpu.default


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float | Tensor
) -> Tensor:
    """Linear layer with a low-rank update: x Wᵀ + b + scale·(x downᵀ) upᵀ.

    In 16-bit the base product and the update share one float32 accumulator and are rounded once,
    so an update far below the rounding of the base product is not lost.

    Args:
        x: [..., I], any floating dtype, the same for every tensor here.
        weight: [O, I], frozen: it gets no gradient.
        bias: [O] or None, frozen.
        down: [R, I], trained.
        up: [O, R], trained.
        scale: alpha / rank, times the user's multiplier; no unit. Under torch.compile a 0-dim
            CPU tensor, so that a change of its value recompiles nothing.

    Returns:
        [..., O], contiguous, in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit, or weight or bias asks for a gradient.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """
    out_features, in_features = weight.shape
    rank = down.shape[0]
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} features, weight takes {in_features}")
    if down.shape != (rank, in_features) or up.shape != (out_features, rank):
        raise ValueError(
            f"want down [R, {in_features}] and up [{out_features}, R],"
            f" got {tuple(down.shape)} and {tuple(up.shape)}"
        )
    if not x.dtype == weight.dtype == down.dtype == up.dtype:
        raise ValueError(f"mixed dtypes: {x.dtype}, {weight.dtype}, {down.dtype}, {up.dtype}")
    if not x.device == weight.device == down.device == up.device:
        raise ValueError(f"mixed devices: {x.device}, {weight.device}, {down.device}, {up.device}")
    if bias is not None and (bias.shape != (out_features,) or bias.dtype != x.dtype):
        raise ValueError(
            f"want bias [{out_features}] of {x.dtype}, got {list(bias.shape)} of {bias.dtype}"
        )
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight and bias are frozen here; call requires_grad_(False) on them")
    if torch.compiler.is_compiling():
        if not isinstance(scale, Tensor):
            scale = torch.tensor(scale, dtype=torch.float64)
    elif x.is_cpu and not isinstance(scale, Tensor):
        whole = _whole.get(x.dtype)
        if whole is None:
            whole = _whole[x.dtype] = _find_whole(x, weight, bias, down, up, scale)
        if whole:
            return whole(x.contiguous(), weight, bias, down, up, scale)
    return _LoraLinear.apply(x.contiguous(), weight, bias, down, up, scale)

"""lora_conv2d: the frozen convolution and its low-rank update in one sum."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair

from lorakern import backend
from lorakern.backend import Kernel
from lorakern.ops import check
from lorakern.ops.lora_conv2d import columns, concat, reference

_fwd = backend.define(
    "lora_conv2d_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor scale,"
    " int[2] stride, int[2] padding, int[2] dilation, int groups) -> (Tensor y, Tensor h)",
    reference.lora_conv2d_fwd,
    columns=Kernel("lorakern.ops.lora_conv2d.columns:lora_conv2d_fwd", columns.refuse_fwd),
    concat=Kernel("lorakern.ops.lora_conv2d.concat:lora_conv2d_fwd", concat.refuse_fwd),
)
_bwd = backend.define(
    "lora_conv2d_bwd",
    "(Tensor dy, Tensor x, Tensor h, Tensor weight, Tensor down, Tensor up, Tensor scale,"
    " int[2] stride, int[2] padding, int[2] dilation, int groups, bool[3] needs)"
    " -> (Tensor dx, Tensor ddown, Tensor dup)",
    reference.lora_conv2d_bwd,
    columns=Kernel("lorakern.ops.lora_conv2d.columns:lora_conv2d_bwd", columns.refuse_bwd),
    concat=Kernel("lorakern.ops.lora_conv2d.concat:lora_conv2d_bwd", concat.refuse_bwd),
)


class _LoraConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scale, *window):
        y, h = _fwd(x, weight, bias, down, up, scale, *window)
        # h is [B, G·R, P, Q]: keeping it saves the k x k convolution of x in backward
        ctx.save_for_backward(x, h, weight, down, up)
        ctx.scale, ctx.window = scale, window
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        needs = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
        grads = _bwd(dy, *ctx.saved_tensors, ctx.scale, *ctx.window, needs)
        dx, ddown, dup = (g if need else None for g, need in zip(grads, needs, strict=True))
        return dx, None, None, ddown, dup, None, None, None, None, None


def lora_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float | Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution with a low-rank update: conv(x, W) + b + scale·conv1x1(conv(x, down), up).

    ΔW is scale·up down in the weight's shape, for any number of groups. In 16-bit the
    convolution and the update share one float32 sum and are rounded once.

    Args:
        x: [B, I, H, W] or [I, H, W], any floating dtype, the same for every tensor here.
        weight: [O, I / groups, kh, kw], frozen: it gets no gradient.
        bias: [O] or None, frozen.
        down: [R, I / groups, kh, kw], trained; the groups share it.
        up: [O, R, 1, 1], trained.
        scale: alpha / rank, times the user's multiplier; no unit. Under torch.compile a 0-dim
            CPU tensor, so that a change of its value recompiles nothing.
        stride, padding, dilation, groups: as torch.nn.functional.conv2d, in pixels; padding may
            be "same" or "valid".

    Returns:
        [B, O, P, Q] or [O, P, Q], in x's dtype and memory format.

    Raises:
        ValueError: a shape, dtype or device does not fit, or weight or bias asks for a gradient.

    Source: Hu et al. 2021, arXiv:2106.09685; Yeh et al. 2023, arXiv:2309.14859.
    """
    _check(x, weight, bias, down, up, groups)
    if x.dim() == 3:
        window = (stride, padding, dilation, groups)
        return lora_conv2d(x[None], weight, bias, down, up, scale, *window)[0]
    stride, dilation = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        x, padding = _pad_as_named(x, weight, padding, stride, dilation)
    scale = check.live(scale)
    window = ([*stride], [*_pair(padding)], [*dilation], groups)
    return _LoraConv2d.apply(x, weight, bias, down, up, scale, *window)


def _check(x, weight, bias, down, up, groups) -> None:
    out_channels, per_group, *kernel = weight.shape
    rank, channels = down.shape[0], per_group * groups
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(f"want x [B, {channels}, H, W] for groups={groups}, got {list(x.shape)}")
    check.shapes(down=(down, [rank, per_group, *kernel]), up=(up, [out_channels, rank, 1, 1]))
    check.alike(x=x, weight=weight, bias=bias, down=down, up=up)
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"want bias [{out_channels}], got {list(bias.shape)}")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight and bias are frozen here; call requires_grad_(False) on them")


def _pad_as_named(x, weight, padding, stride, dilation):
    if padding == "valid":
        return x, 0
    if padding != "same" or stride != (1, 1):
        raise ValueError(f'padding is pixels, "valid", or with stride 1 "same"; got {padding!r}')
    high, wide = (d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
    if high % 2 == wide % 2 == 0:
        return x, (high // 2, wide // 2)
    return F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2)), 0

"""lora_conv2d of few pixels in float32, as lora_linear of their windows. Spec: reference.py

Beside the weight of 1280 channels the windows of 32 pixels are small. torch copies that weight into
another layout, or reads it with a stride; as rows of a linear layer it is read once, and the update
and all factors' gradients come with it. Windows are made again in backward, not kept. What is not
contiguous, as channels_last, is left to the spec: its rows would be a copy of the weight, and a
pick knows shapes alone.
"""

import torch
import torch.nn.functional as F

from lorakern.ops.frozen_linear.op import refusal
from lorakern.ops.lora_conv2d import reference


def refuse_fwd(x, weight, bias, down, up, scale, stride, padding, dilation, groups) -> str | None:
    high, wide = size_of(x, weight.shape[2:], stride, padding, dilation)
    return _refuse(x.shape[0] * high * wide, weight, groups)


def refuse_bwd(dy, x, h, weight, down, up, scale, stride, padding, dilation, groups, needs):
    return _refuse(dy.shape[0] * dy.shape[2:].numel(), weight, groups)


def _refuse(rows, weight, groups) -> str | None:
    if groups != 1:
        return "groups: each would need a product of its own"
    if not hasattr(torch.ops.lorakern_native, "lora_linear_fwd_cpu"):
        return "lorakern._native is not built"
    return refusal(rows, weight)


def lora_conv2d_fwd(x, weight, bias, down, up, scale, stride, padding, dilation, groups):
    if not (x.is_contiguous() and weight.is_contiguous()):
        return reference.lora_conv2d_fwd(
            x, weight, bias, down, up, scale, stride, padding, dilation, groups
        )
    window = weight.shape[2:], stride, padding, dilation
    wide, *factors = (w.flatten(1) for w in (weight, down, up))
    made = torch.ops.lorakern_native.lora_linear_fwd_cpu(
        windows(x, *window), wide, bias, *factors, scale, None
    )
    y, h = (pixels(rows, x.shape[0], size_of(x, *window)) for rows in made)
    return y, h


def lora_conv2d_bwd(dy, x, h, weight, down, up, scale, stride, padding, dilation, groups, needs):
    if not (x.is_contiguous() and weight.is_contiguous()):
        return reference.lora_conv2d_bwd(
            dy, x, h, weight, down, up, scale, stride, padding, dilation, groups, needs
        )
    window = weight.shape[2:], stride, padding, dilation
    made = torch.ops.lorakern_native.lora_linear_bwd_cpu(
        rows_of(dy), windows(x, *window), rows_of(h), *(w.flatten(1) for w in (weight, down, up)),
        scale, None, [*needs, False],
    )  # fmt: skip
    dx, ddown, dup = made[:3]
    if needs[0]:
        columns = dx.view(dy.shape[0], -1, dx.shape[1]).mT
        dx = F.fold(columns, x.shape[2:], window[0], dilation, padding, stride)
    return (
        dx,
        ddown.view_as(down) if needs[1] else ddown,
        dup.view_as(up) if needs[2] else dup,
    )


def size_of(x, kernel, stride, padding, dilation):
    """(P, Q), the output's pixels."""
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[-2:], padding, dilation, kernel, stride, strict=True)
    ]


def windows(x, kernel, stride, padding, dilation):
    """[B·P·Q, C·kh·kw], a row a pixel of the output."""
    return rows_of(F.unfold(x, kernel, dilation, padding, stride))


def rows_of(pixels):
    """[B, C, ...] -> [B·P·Q, C]"""
    return pixels.flatten(2).mT.flatten(0, 1).contiguous()


def pixels(rows, batch, size):
    """[B·P·Q, C] -> [B, C, P, Q]"""
    return rows.view(batch, *size, -1).permute(0, 3, 1, 2).contiguous()

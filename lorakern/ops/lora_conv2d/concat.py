"""lora_conv2d in 16-bit as one convolution of more channels. Spec: reference.py

A convolution that keeps the number of pixels takes [x, s·h] and [W, up in the middle of a kernel
of zeros]; backward's dx takes [dy, s·dh] and [W, down]. The library's own 16-bit kernel then has
both products in its one float32 sum. It costs kh·kw times the up product and a copy of x or dy; the
spec runs all of it in float32, at a fraction of the speed of a tensor core.
"""

import torch
import torch.nn.functional as F

from lorakern.ops.lora_conv2d.reference import gradients

_HALF = (torch.float16, torch.bfloat16)


def refuse_fwd(x, weight, bias, down, up, scale, stride, padding, dilation, groups) -> str | None:
    high, wide = (d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
    if [*stride] != [1, 1] or [high, wide] != [2 * p for p in padding]:
        return "the pixels of h are not those of x: stride 1 and half a kernel of padding are asked"
    return refuse_bwd(x, groups=groups)


def refuse_bwd(first, *rest, groups: int | None = None) -> str | None:
    if first.dtype not in _HALF:
        return f"{first.dtype}: only 16-bit sums are worth a copy of x"
    if (rest[-2] if groups is None else groups) != 1:
        return "groups: each would need an h of its own beside its channels"
    if first.device.type == "cpu" and not (
        first.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    ):
        return f"{first.dtype} on this CPU: its convolutions are slower than float32"
    return None


def lora_conv2d_fwd(x, weight, bias, down, up, scale, stride, padding, dilation, groups):
    h = F.conv2d(x, down, None, stride, padding, dilation)
    middle = up.new_zeros(*up.shape[:2], *weight.shape[2:])
    middle[..., weight.shape[2] // 2, weight.shape[3] // 2] = up[..., 0, 0]
    both = torch.cat([x, scale * h], 1), torch.cat([weight, middle], 1)
    return F.conv2d(*both, bias, stride, padding, dilation), h


def lora_conv2d_bwd(dy, x, h, weight, down, up, scale, stride, padding, dilation, groups, needs):
    need_dx, need_ddown, need_dup = needs
    dx = ddown = dup = x.new_empty(0)
    window = (stride, padding, dilation)
    need_dh = need_dx or need_ddown
    dh, dup_unscaled = gradients(dy, h, up, ([1, 1], [0, 0], [1, 1]), 1, need_dh, need_dup)
    if need_dup:
        dup = scale * dup_unscaled
    if need_dh:
        dh = scale * dh
    if need_ddown:
        ddown = gradients(dh, x, down, window, 1, False, True)[1]
    if need_dx:
        both = torch.cat([dy, dh], 1), x, torch.cat([weight, down])
        dx = gradients(*both, window, 1, True, False)[0]
    return dx, ddown, dup

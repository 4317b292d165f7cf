"""Spec of lora_conv2d: y = conv(x, W) + b + s·conv1x1(conv(x, down), up).

LoRA (Hu et al. 2021, arXiv:2106.09685) on a convolution, as LoCon of LyCORIS (arXiv:2309.14859).
Dims: B images, I in_channels, O out_channels, R rank, G groups, H W pixels in, P Q pixels out.
down [R, I/G, kh, kw] is shared by the groups and up [O, R, 1, 1] is split among them, so that
ΔW = up down has the weight's shape for any G.
"""

import torch
import torch.nn.functional as F


def lora_conv2d_fwd(x, weight, bias, down, up, scale, stride, padding, dilation, groups):
    # to down, a group is an image of its own
    h_GR = F.conv2d(split_groups(x, groups), down, None, stride, padding, dilation)
    h = join_groups(h_GR, groups)
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return y + scale * F.conv2d(h, up, groups=groups), h


def lora_conv2d_bwd(dy, x, h, weight, down, up, scale, stride, padding, dilation, groups, needs):
    """needs: which of dx, ddown, dup to compute; the others come back as empty tensors."""
    need_dx, need_ddown, need_dup = needs
    dx = ddown = dup = x.new_empty(0)
    window = (stride, padding, dilation)
    need_dh = need_dx or need_ddown
    dh, dup_unscaled = gradients(dy, h, up, ([1, 1], [0, 0], [1, 1]), groups, need_dh, need_dup)
    if need_dup:
        dup = scale * dup_unscaled
    if need_dh:
        dh_GR, x_GI = split_groups(scale * dh, groups), split_groups(x, groups)
        dx_GI, ddown_needed = gradients(dh_GR, x_GI, down, window, 1, need_dx, need_ddown)
        if need_ddown:
            ddown = ddown_needed
        if need_dx:
            dx = gradients(dy, x, weight, window, groups, True, False)[0] + join_groups(
                dx_GI, groups
            )
    return dx, ddown, dup


def gradients(dy, x, weight, window, groups, need_dx, need_dweight):
    needs = [need_dx, need_dweight, False]
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, *window, False, [0, 0], groups, needs
    )[:2]


def split_groups(x, groups):
    """[B, G·C, H, W] -> [B·G, C, H, W]"""
    return x if groups == 1 else x.reshape(-1, x.shape[1] // groups, *x.shape[2:])


def join_groups(x, groups):
    """[B·G, C, P, Q] -> [B, G·C, P, Q]"""
    return x if groups == 1 else x.reshape(-1, x.shape[1] * groups, *x.shape[2:])

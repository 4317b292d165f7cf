"""Spec of lora_linear: y = g·(x Wᵀ + s·(x downᵀ) upᵀ) + b.

LoRA, Hu et al. 2021, arXiv:2106.09685, with down = A and up = B. The gain g of a row of W + ΔW is
DoRA's magnitude over norm, arXiv:2402.09353, in float32 beside 16-bit tensors; None is 1.
Dims: M rows of x (every leading dim), I in_features, O out_features, R rank.
"""

import torch.nn.functional as F


def lora_linear_fwd(x, weight, bias, down, up, scale, gain):
    h_MR = x @ down.mT
    if gain is None:
        return F.linear(x, weight, bias) + scale * (h_MR @ up.mT), h_MR
    y_MO = gain * (F.linear(x, weight) + scale * (h_MR @ up.mT))
    return (y_MO if bias is None else y_MO + bias).to(x.dtype), h_MR


def lora_linear_bwd(dy, x, h, weight, down, up, scale, gain, needs):
    """needs: which of dx, ddown, dup, dgain to compute; the others come back as empty tensors."""
    dy_MO, x_MI, h_MR = dy.flatten(0, -2), x.flatten(0, -2), h.flatten(0, -2)
    need_dx, need_ddown, need_dup, need_dgain = needs
    dx, ddown_RI, dup_OR = (x.new_empty(0) for _ in range(3))
    dgain_O = (x if gain is None else gain).new_empty(0)
    if need_dgain:
        # y is not kept: the row of W + ΔW meets x once more
        acc_MO = F.linear(x_MI, weight) + scale * (h_MR @ up.mT)
        dgain_O = (dy_MO * acc_MO).sum(0, dtype=gain.dtype)
    if gain is not None:
        dy_MO = (gain * dy_MO).to(dy.dtype)
    dh_MR = scale * (dy_MO @ up)
    if need_dx:
        dx = (dy_MO @ weight + dh_MR @ down).view(x.shape)
    if need_ddown:
        ddown_RI = dh_MR.mT @ x_MI
    if need_dup:
        dup_OR = scale * (dy_MO.mT @ h_MR)
    return dx, ddown_RI, dup_OR, dgain_O

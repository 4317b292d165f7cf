"""Spec of lora_linear: y = x Wᵀ + b + s·(x downᵀ) upᵀ.

LoRA, Hu et al. 2021, arXiv:2106.09685, with down = A and up = B.
Dims: M rows of x (every leading dim), I in_features, O out_features, R rank.
"""

import torch.nn.functional as F


def lora_linear_fwd(x, weight, bias, down, up, scale):
    h_MR = x @ down.mT
    return F.linear(x, weight, bias) + scale * (h_MR @ up.mT), h_MR


def lora_linear_bwd(dy, x, h, weight, down, up, scale, needs):
    """needs: which of dx, ddown, dup to compute; the others come back as empty tensors."""
    dy_MO, x_MI, h_MR = dy.flatten(0, -2), x.flatten(0, -2), h.flatten(0, -2)
    need_dx, need_ddown, need_dup = needs
    dx, ddown_RI, dup_OR = (x.new_empty(0) for _ in range(3))
    dh_MR = scale * (dy_MO @ up)
    if need_dx:
        dx = (dy_MO @ weight + dh_MR @ down).view(x.shape)
    if need_ddown:
        ddown_RI = dh_MR.mT @ x_MI
    if need_dup:
        dup_OR = scale * (dy_MO.mT @ h_MR)
    return dx, ddown_RI, dup_OR

"""Spec of lora_linear_shared: yⱼ = x Wⱼᵀ + bⱼ + sⱼ·(x downⱼᵀ) upⱼᵀ of layers that read one x.

LoRA, Hu et al. 2021, arXiv:2106.09685, on q, k and v of an attention, or gate and up.
Dims: M rows of x (every leading dim), I in_features; of a layer O out_features, R rank; S all R.
"""

import torch
import torch.nn.functional as F


def lora_linear_shared_fwd(x, weights, biases, downs, ups, scales):
    """y is flat: the [M, O] of each layer after that of the one before. h [..., S] likewise has
    the columns of each layer side by side."""
    h_MS = x @ torch.cat(downs).mT
    ranks = [len(down) for down in downs]
    layers = zip(weights, biases, h_MS.split(ranks, -1), ups, scales, strict=True)
    ys = [F.linear(x, w_OI, b) + s * (h_MR @ up.mT) for w_OI, b, h_MR, up, s in layers]
    return torch.cat([y_MO.flatten() for y_MO in ys]), h_MS


def lora_linear_shared_bwd(x, h, dys, weights, downs, ups, scales, needs):
    """needs: whether to compute dx, then of each layer whether ddown, then whether dup.

    ddown is [rows, I], the rows of each wanted down after those of the one before; dup is flat,
    the values of each wanted up. What is not wanted is left out.
    """
    x_MI, dx_MI = x.flatten(0, -2), 0
    need_dx, need_ddown, need_dup = needs[0], needs[1 : 1 + len(dys)], needs[1 + len(dys) :]
    ddowns, dups = [x.new_empty((0, x.shape[-1]))], [x.new_empty(0)]
    hs = h.flatten(0, -2).split([len(down) for down in downs], -1)
    layers = zip(dys, hs, weights, downs, ups, scales, need_ddown, need_dup, strict=True)
    for dy, h_MR, weight, down, up, scale, wants_ddown, wants_dup in layers:
        dy_MO = dy.flatten(0, -2)
        dh_MR = scale * (dy_MO @ up)
        if need_dx:
            dx_MI = dx_MI + dy_MO @ weight + dh_MR @ down
        if wants_ddown:
            ddowns.append(dh_MR.mT @ x_MI)
        if wants_dup:
            dups.append((scale * (dy_MO.mT @ h_MR)).flatten())
    dx = dx_MI.view(x.shape) if need_dx else x.new_empty(0)
    return dx, torch.cat(ddowns), torch.cat(dups)

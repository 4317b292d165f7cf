"""Spec of hada_linear: y = g·(x Wᵀ + x ΔWᵀ) + b, ΔW = s·(up1 down1) ∘ (up2 down2).

LoHa, FedPara (Hyeon-Woo et al. 2022, arXiv:2108.06098) in LyCORIS, arXiv:2309.14859; ∘ is the
product by elements. The gain g of a row of W + ΔW is DoRA's (arXiv:2402.09353), in float32 beside
16-bit tensors; None is 1.
Dims: M rows of x (every leading dim), I in_features, O out_features, R rank, S second rank.
"""

import torch.nn.functional as F


def hada_linear_fwd(x, weight, bias, down1, up1, down2, up2, scale, gain):
    delta_OI = scale * (up1 @ down1) * (up2 @ down2)
    y_MO = F.linear(x, weight) + F.linear(x, delta_OI)
    if gain is not None:
        y_MO = gain * y_MO
    return (y_MO if bias is None else y_MO + bias).to(x.dtype)


def hada_linear_bwd(dy, x, weight, down1, up1, down2, up2, scale, gain, needs):
    """needs: which of dx, ddown1, dup1, ddown2, dup2, dgain to compute; the others are empty."""
    dy_MO, x_MI = dy.flatten(0, -2), x.flatten(0, -2)
    need_dx, *need_factors, need_dgain = needs
    dx, ddown1, dup1, ddown2, dup2 = (x.new_empty(0) for _ in range(5))
    dgain_O = (x if gain is None else gain).new_empty(0)
    first_OI, second_OI = up1 @ down1, up2 @ down2
    delta_OI = scale * first_OI * second_OI
    if need_dgain:
        acc_MO = F.linear(x_MI, weight) + F.linear(x_MI, delta_OI)
        dgain_O = (dy_MO * acc_MO).sum(0, dtype=gain.dtype)
    if gain is not None:
        dy_MO = (gain * dy_MO).to(dy.dtype)
    if need_dx:
        dx = (dy_MO @ weight + dy_MO @ delta_OI).view(x.shape)
    if any(need_factors):
        ddelta_OI = scale * (dy_MO.mT @ x_MI)
        dfirst_OI, dsecond_OI = ddelta_OI * second_OI, ddelta_OI * first_OI
        ddown1, dup1 = up1.mT @ dfirst_OI, dfirst_OI @ down1.mT
        ddown2, dup2 = up2.mT @ dsecond_OI, dsecond_OI @ down2.mT
    grads = (ddown1, dup1, ddown2, dup2)
    kept = [g if need else x.new_empty(0) for g, need in zip(grads, need_factors, strict=True)]
    return dx, *kept, dgain_O

"""Spec of kron_linear: y = g·(x Wᵀ + s·x (C ⊗ D)ᵀ) + b, with the Kronecker product never made.

LoKr of LyCORIS, arXiv:2309.14859. Each of C and D is whole (its up alone, down is None) or low
rank, up down. The gain g of a row is DoRA's (arXiv:2402.09353), float32 beside 16-bit; None is 1.
Dims: M rows of x (every leading dim), C [A, B], D [P, Q], O = A·P out_features, I = B·Q
in_features, R and S the ranks of C and D.
"""

import torch.nn.functional as F


def kron_linear_fwd(x, weight, bias, c_up, c_down, d_up, d_down, scale, gain):
    y_MO = F.linear(x, weight) + scale * kron_product(x, *whole(c_up, c_down, d_up, d_down))
    if gain is not None:
        y_MO = gain * y_MO
    return (y_MO if bias is None else y_MO + bias).to(x.dtype)


def kron_linear_bwd(dy, x, weight, c_up, c_down, d_up, d_down, scale, gain, needs):
    """needs: which of dx, dc_up, dc_down, dd_up, dd_down, dgain to compute; others are empty."""
    dy_MO, x_MI = dy.flatten(0, -2), x.flatten(0, -2)
    need_dx, *need_factors, need_dgain = needs
    dx, dgain_O = x.new_empty(0), (x if gain is None else gain).new_empty(0)
    c_AB, d_PQ = whole(c_up, c_down, d_up, d_down)
    if need_dgain:
        acc_MO = F.linear(x_MI, weight) + scale * kron_product(x_MI, c_AB, d_PQ)
        dgain_O = (dy_MO * acc_MO).sum(0, dtype=gain.dtype)
    if gain is not None:
        dy_MO = (gain * dy_MO).to(dy.dtype)
    dy_MAP, x_MBQ = (scale * dy_MO).unflatten(-1, (-1, d_PQ.shape[0])), split(x_MI, d_PQ)
    t_MBP = c_AB.mT @ dy_MAP
    if need_dx:
        dx = (dy_MO @ weight + (t_MBP @ d_PQ).flatten(-2)).view(x.shape)
    dc_AB = (dy_MAP @ (x_MBQ @ d_PQ.mT).mT).sum(0)
    dd_PQ = t_MBP.flatten(0, 1).mT @ x_MBQ.flatten(0, 1)
    grads = (*through(dc_AB, c_up, c_down), *through(dd_PQ, d_up, d_down))
    kept = [g if need else x.new_empty(0) for g, need in zip(grads, need_factors, strict=True)]
    return dx, *kept, dgain_O


def whole(c_up, c_down, d_up, d_down):
    """C [A, B] and D [P, Q]"""
    return c_up if c_down is None else c_up @ c_down, d_up if d_down is None else d_up @ d_down


def through(dwhole, up, down):
    """Gradients of up and down from that of their product; of up alone when it is whole."""
    if down is None:
        return dwhole, dwhole.new_empty(0)
    return dwhole @ down.mT, up.mT @ dwhole


def kron_product(x, c_AB, d_PQ):
    """x (C ⊗ D)ᵀ, [..., A·P], as C (X Dᵀ) with X [B, Q] a row of x"""
    return (c_AB @ (split(x, d_PQ) @ d_PQ.mT)).flatten(-2)


def split(x, d_PQ):
    """[..., B·Q] -> [..., B, Q]"""
    return x.unflatten(-1, (-1, d_PQ.shape[1]))

"""Spec of hada_delta: ΔW = s·(up1 down1) ∘ (up2 down2). LoHa of LyCORIS, arXiv:2309.14859.

Dims: O rows, I columns (of a convolution: in_channels·kh·kw), R rank, S second rank.
"""


def hada_delta_fwd(down1, up1, down2, up2, scale):
    return scale * (up1 @ down1) * (up2 @ down2)


def hada_delta_bwd(ddelta, down1, up1, down2, up2, scale, needs):
    """needs: which of ddown1, dup1, ddown2, dup2 to compute; the others are empty."""
    dfirst_OI = scale * ddelta * (up2 @ down2)
    dsecond_OI = scale * ddelta * (up1 @ down1)
    grads = (
        up1.mT @ dfirst_OI,
        dfirst_OI @ down1.mT,
        up2.mT @ dsecond_OI,
        dsecond_OI @ down2.mT,
    )
    return tuple(g if need else g.new_empty(0) for g, need in zip(grads, needs, strict=True))

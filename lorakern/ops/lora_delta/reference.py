"""Spec of lora_delta: ΔW = s·up down. LoRA, Hu et al. 2021, arXiv:2106.09685.

Dims: O rows, I columns (of a convolution: in_channels·kh·kw), R rank.
"""


def lora_delta_fwd(down, up, scale):
    return scale * (up @ down)


def lora_delta_bwd(ddelta, down, up, scale, needs):
    """needs: which of ddown, dup to compute; the others come back as empty tensors."""
    grads = scale * (up.mT @ ddelta), scale * (ddelta @ down.mT)
    return tuple(g if need else g.new_empty(0) for g, need in zip(grads, needs, strict=True))

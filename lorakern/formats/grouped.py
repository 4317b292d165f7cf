"""LoRA on a convolution with groups: PEFT's layout, and the one of the adapters here and LyCORIS.

Here ΔW = up down is of the weight's own shape: down [R, I/g, kh, kw] is one for all groups, up is
[O, R, 1, 1]. PEFT runs an ungrouped down [R, I, kh, kw], and an up in g groups, [O, R/g, 1, 1].
"""

import torch
from torch import Tensor


def to_peft(down: Tensor, up: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The same update in PEFT's layout at g times the rank: g copies of down, on the diagonal."""
    rank, width, *kernel = down.shape
    spread = down.new_zeros(groups, rank, groups, width, *kernel)
    for g in range(groups):
        spread[g, :, g] = down
    return spread.reshape(groups * rank, groups * width, *kernel), up


def from_peft(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same update in this package's layout: at R/g where the groups share one down, else at R.

    Raises:
        ValueError: down of one group reads channels of another, which no ΔW can.
    """
    rank, channels, *kernel = down.shape
    rows, each = up.shape[:2]
    groups = rank // each
    if channels % groups or rows % groups:
        raise ValueError(f"{channels} and {rows} channels do not part in {groups} groups")
    blocks = down.view(groups, each, groups, channels // groups, *kernel)
    own = torch.stack([blocks[g, :, g] for g in range(groups)])
    if own.count_nonzero() != down.count_nonzero():
        raise ValueError(
            f"its {groups} groups read each other's channels, which no update of the weight can do"
        )
    if all(one.equal(own[0]) for one in own):
        return own[0], up
    wide = up.new_zeros(groups, rows // groups, groups, each)
    for g, part in enumerate(up.view(groups, rows // groups, each)):
        wide[g, :, g] = part
    return own.flatten(0, 1), wide.view(rows, rank, 1, 1)

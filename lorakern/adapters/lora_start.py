"""LoRAs that start from the weight: ΔW = scale·(up down - up_start down_start), 0 at first.

PiSSA and OLoRA take scale·up_start down_start out of the frozen weight and train it. Here the
weight stays as it is and the start is a second, frozen half of the factors: nothing is rounded into
a 16-bit weight, `eject` and a multiplier of 0 give back the layer, and a file holds an ordinary
LoRA of twice the rank, as PEFT writes it.
"""

import torch
from torch import Tensor

STARTS = ("default", "pissa", "olora")


def factors(init: str, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """down [R, I] and up [O, R] of a weight [O, I] in the dtype of the sums.

    pissa: the first `rank` singular values and vectors, scale·up down their part of W (Meng et
    al. 2024, arXiv:2404.02948). olora: up has `rank` orthonormal columns, up down is Q R's first
    part (Büyükakyüz 2024, arXiv:2406.01775).

    Raises:
        ValueError: the rank is over the weight's.
    """
    if rank > min(weight.shape):
        raise ValueError(f"init={init!r} needs a rank of at most {min(weight.shape)}, got {rank}")
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def both_halves(f: dict[str, Tensor], down_start: Tensor, up_start: Tensor) -> dict[str, Tensor]:
    """The factors with the start beside them: up down - up_start down_start is one product."""
    down, up = f["down"], f["up"]
    down_start, up_start = down_start.to(down), up_start.to(up)
    return {**f, "down": torch.cat([down, down_start]), "up": torch.cat([up, -up_start], 1)}

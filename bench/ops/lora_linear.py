"""lora_linear on linear layers of Stable Diffusion 1.5 and XL."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench import peers

FORWARD, BACKWARD = "lora_linear_fwd", "lora_linear_bwd"
DIRECTIONS = ("fwd", "fwd+bwd")
FLOOR = "frozen"


@dataclass(frozen=True)
class Case:
    """O out_features, I in_features, M rows, R rank."""

    O: int  # noqa: E741
    I: int  # noqa: E741
    M: int
    R: int
    bias: bool = False

    def __str__(self) -> str:
        return f"O{self.O} I{self.I} M{self.M} R{self.R}" + " bias" * self.bias


CASES = [
    # SD 1.5 at 512 px: to_q/k/v of the levels, GEGLU's projection, to_k of 77 text tokens
    Case(1280, 1280, 1024, 16),
    Case(320, 320, 4096, 16),
    Case(2560, 320, 4096, 16, bias=True),
    Case(320, 768, 77, 16),
    Case(640, 640, 1024, 16),
    Case(1280, 5120, 256, 16, bias=True),
    # few rows beside a large weight: the middle block, and to_k of the inner levels
    Case(1280, 1280, 64, 16),
    Case(1280, 768, 77, 16),
    # ranks apart from 16
    Case(640, 640, 4096, 4),
    Case(640, 640, 4096, 64),
]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple:
    """Arguments of the op's forward; ΔW is as large as the weight, so that an error in it shows."""

    def normal(*shape: int, over: int) -> Tensor:
        return (torch.randn(*shape, generator=seed) / over**0.5).to(device, dtype)

    seed = torch.Generator().manual_seed(0)
    x, weight = normal(case.M, case.I, over=1), normal(case.O, case.I, over=case.I)
    bias = normal(case.O, over=1) if case.bias else None
    down, up = normal(case.R, case.I, over=case.I), normal(case.O, case.R, over=case.R)
    return x, weight, bias, down, up, 0.5, None


def smaller(args: tuple, share: float) -> tuple:
    """The same with an update of this share of the weight."""
    *before, up, scale = args[:6]
    return *before, up * (share / scale), scale, *args[6:]


def backward_inputs(args: tuple, h: Tensor, dy: Tensor) -> tuple:
    """Arguments of the op's backward, every gradient wanted."""
    x, weight, _, down, up, scale, gain = args
    return dy, x, h, weight, down, up, scale, gain, [True, True, True, False]


def layers(args: tuple) -> dict[str, peers.Layer]:
    """The layer as each library builds it."""
    _, weight, bias, down, up, scale, _ = args
    return peers.layers(lambda: peers.linear(weight, bias), (down, up), len(down), scale)

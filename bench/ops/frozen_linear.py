"""frozen_linear on the inner blocks of Stable Diffusion 1.5 at 128 px."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lorakern
from bench import peers

FORWARD, BACKWARD = "frozen_linear_fwd", "frozen_linear_bwd"
DIRECTIONS = ("fwd", "fwd+bwd")
FLOOR = "frozen"


@dataclass(frozen=True)
class Case:
    """O out_features, I in_features, M rows."""

    O: int  # noqa: E741
    I: int  # noqa: E741
    M: int

    def __str__(self) -> str:
        return f"O{self.O} I{self.I} M{self.M}"


CASES = [
    # attention, GEGLU's projection and the one after it
    Case(1280, 1280, 4),
    Case(10240, 1280, 16),
    Case(1280, 5120, 4),
    # 3 x 3 convolutions of residual blocks, as their windows
    Case(1280, 1280 * 9, 4),
    Case(1280, 2560 * 9, 16),
]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple:
    """Arguments of the op's forward."""

    def normal(*shape: int, over: int) -> Tensor:
        return (torch.randn(*shape, generator=seed) / over**0.5).to(device, dtype)

    seed = torch.Generator().manual_seed(0)
    x, weight = normal(case.M, case.I, over=1), normal(case.O, case.I, over=case.I)
    return x, weight, normal(case.O, over=1)


def backward_inputs(args: tuple, h: None, dy: Tensor) -> tuple:
    """Arguments of the op's backward."""
    return dy, args[1]


def layers(args: tuple) -> dict[str, peers.Layer]:
    """The layer as it is, and on lorakern's kernels."""
    _, weight, bias = args
    fast = nn.Sequential(peers.linear(weight, bias))
    lorakern.accelerate_frozen(fast)
    return {"frozen": peers.Layer(peers.linear(weight, bias)), "lorakern": peers.Layer(fast[0])}

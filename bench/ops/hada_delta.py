"""hada_delta: the update of LoHa alone, of layers of Stable Diffusion 1.5.

The floor is no frozen layer but the spec. Every factor but the first counts as the layer's, the
first as its input.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.peers import Layer
from lorakern.functional import hada_delta

FORWARD, BACKWARD = "hada_delta_fwd", "hada_delta_bwd"
DIRECTIONS = ("fwd", "fwd+bwd")
FLOOR = "reference"


@dataclass(frozen=True)
class Case:
    """O rows, I columns, R rank of both products."""

    O: int  # noqa: E741
    I: int  # noqa: E741
    R: int

    def __str__(self) -> str:
        return f"O{self.O} I{self.I} R{self.R}"


# SD 1.5: to_q/k/v of the levels, GEGLU's projection, to_k of text, a 3 x 3 convolution
CASES = [
    Case(O, I, R)
    for O, I in ((1280, 1280), (320, 320), (2560, 320), (320, 768), (320, 2880))  # noqa: E741
    for R in (4, 16)
]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple:
    """Arguments of the op's forward."""

    def normal(*shape: int, over: int) -> Tensor:
        return (torch.randn(*shape, generator=seed) / over**0.5).to(device, dtype)

    seed = torch.Generator().manual_seed(0)
    first = normal(case.R, case.I, over=1), normal(case.O, case.R, over=case.R)
    second = normal(case.R, case.I, over=case.I), normal(case.O, case.R, over=case.R)
    return *first, *second, 0.5


def backward_inputs(args: tuple, _: None, ddelta: Tensor) -> tuple:
    """Arguments of the op's backward, every gradient wanted."""
    return ddelta, *args, [True, True, True, True]


def layers(args: tuple) -> dict[str, Layer]:
    """The update of the first factor and the trained others."""
    _, *others, scale = args
    trained = tuple(f.detach().requires_grad_() for f in others)
    return {"lorakern": Layer(lambda first: hada_delta(first, *trained, scale), trained)}

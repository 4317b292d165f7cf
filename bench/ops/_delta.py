"""What the benches of an update alone share: layers of Stable Diffusion 1.5, the floor, the arms.

The floor is no frozen layer but the spec. Every factor but the first counts as the layer's, the
first as its input.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.peers import Layer

DIRECTIONS = ("fwd", "fwd+bwd")
FLOOR = "reference"
# O and I: to_q/k/v of the levels, the projection of GEGLU, to_k of text, a 3 x 3 convolution
SIZES = [(1280, 1280), (320, 320), (2560, 320), (320, 768), (320, 2880)]


@dataclass(frozen=True)
class Case:
    """O rows, I columns, R rank."""

    O: int  # noqa: E741
    I: int  # noqa: E741
    R: int

    def __str__(self) -> str:
        return f"O{self.O} I{self.I} R{self.R}"


CASES = [Case(*size, R) for size in SIZES for R in (4, 16)]


def normals(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """A source of normal factors by their sizes and the number that their variance is over."""
    seed = torch.Generator().manual_seed(0)

    def normal(*sizes: int, over: int) -> Tensor:
        return (torch.randn(*sizes, generator=seed) / over**0.5).to(device, dtype)

    return normal


def backward_inputs(args: tuple, _: None, ddelta: Tensor) -> tuple:
    """Arguments of the op's backward, every gradient wanted."""
    return ddelta, *args, [True] * (len(args) - 1)


def layer(op: Callable, args: tuple) -> dict[str, Layer]:
    """The update of the first factor and the trained others."""
    _, *others, scale = args
    trained = tuple(f.detach().requires_grad_() for f in others)
    return {"lorakern": Layer(lambda first: op(first, *trained, scale), trained)}

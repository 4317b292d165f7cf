"""hada_linear on linear layers of Stable Diffusion 1.5."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench import peers

FORWARD, BACKWARD = "hada_linear_fwd", "hada_linear_bwd"
DIRECTIONS = ("fwd", "fwd+bwd")
FLOOR = "frozen"

_NAMES = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a")
LOHA = peers.Algorithm(
    ("loha", "LoHaConfig", "loha.LohaModule"),
    (("down1", "up1", "down2", "up2"), tuple(f"{n}.default" for n in _NAMES), _NAMES),
)


@dataclass(frozen=True)
class Case:
    """O out_features, I in_features, M rows, R rank of both products."""

    O: int  # noqa: E741
    I: int  # noqa: E741
    M: int
    R: int
    bias: bool = False

    def __str__(self) -> str:
        return f"O{self.O} I{self.I} M{self.M} R{self.R}" + " bias" * self.bias


# SD 1.5 at 512 px: to_q/k/v of the levels, GEGLU's projection, to_k of 77 text tokens
CASES = [
    Case(O, I, M, R, bias)
    for O, I, M, bias in (  # noqa: E741
        (1280, 1280, 1024, False),
        (320, 320, 4096, False),
        (2560, 320, 4096, True),
        (320, 768, 77, False),
    )
    for R in (4, 16)
]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple:
    """Arguments of the op's forward; ΔW is as large as the weight, so that an error in it shows."""

    def normal(*shape: int, over: int) -> Tensor:
        return (torch.randn(*shape, generator=seed) / over**0.5).to(device, dtype)

    seed = torch.Generator().manual_seed(0)
    x, weight = normal(case.M, case.I, over=1), normal(case.O, case.I, over=case.I)
    bias = normal(case.O, over=1) if case.bias else None
    first = normal(case.R, case.I, over=1), normal(case.O, case.R, over=case.R)
    second = normal(case.R, case.I, over=case.I), normal(case.O, case.R, over=case.R)
    return x, weight, bias, *first, *second, 0.5, None


def smaller(args: tuple, share: float) -> tuple:
    """The same with an update of this share of the weight."""
    *before, up2, scale, gain = args
    return *before, up2 * (share / scale), scale, gain


def backward_inputs(args: tuple, _: None, dy: Tensor) -> tuple:
    """Arguments of the op's backward, every gradient wanted."""
    x, weight, _, *rest = args
    return dy, x, weight, *rest, [True, True, True, True, True, False]


def layers(args: tuple) -> dict[str, peers.Layer]:
    """The layer as each library builds it."""
    _, weight, bias, *factors, scale, _ = args
    plain = lambda: peers.linear(weight, bias)  # noqa: E731
    return peers.layers(plain, tuple(factors), len(factors[0]), scale, LOHA)

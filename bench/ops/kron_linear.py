"""kron_linear on linear layers of Stable Diffusion 1.5."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench import peers
from lorakern.adapters import lokr_shapes

FORWARD, BACKWARD = "kron_linear_fwd", "kron_linear_bwd"
DIRECTIONS = ("fwd", "fwd+bwd")
FLOOR = "frozen"


@dataclass(frozen=True)
class Case:
    """O out_features, I in_features, M rows, R rank of D, F the factor that splits O and I."""

    O: int  # noqa: E741
    I: int  # noqa: E741
    M: int
    R: int
    F: int
    bias: bool = False

    def __str__(self) -> str:
        return f"O{self.O} I{self.I} M{self.M} R{self.R} F{self.F}" + " bias" * self.bias


# SD 1.5 at 512 px: to_q/k/v of the levels, GEGLU's projection, to_k of 77 text tokens
CASES = [
    Case(O, I, M, 16, F, bias)
    for O, I, M, bias in (  # noqa: E741
        (1280, 1280, 1024, False),
        (320, 320, 4096, False),
        (2560, 320, 4096, True),
        (320, 768, 77, False),
    )
    for F in (-1, 8)
]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple:
    """Arguments of the op's forward; ΔW is as large as the weight, so that an error in it shows.

    The scale is 1: for whole C and D LyCORIS takes no other, PEFT does.
    """

    def normal(*shape: int, over: int) -> Tensor:
        return (torch.randn(*shape, generator=seed) / over**0.5).to(device, dtype)

    seed = torch.Generator().manual_seed(0)
    x, weight = normal(case.M, case.I, over=1), normal(case.O, case.I, over=case.I)
    bias = normal(case.O, over=1) if case.bias else None
    (A, P), (B, Q) = (lokr_shapes.split(n, case.F) for n in (case.O, case.I))
    if max(P, Q) > 2 * case.R:
        d = normal(P, case.R, over=case.R), normal(case.R, Q, over=Q)
    else:
        d = normal(P, Q, over=Q), None
    return x, weight, bias, normal(A, B, over=B), None, *d, 1.0, None


def smaller(args: tuple, share: float) -> tuple:
    """The same with an update of this share of the weight."""
    x, weight, bias, c_up, *rest = args
    return x, weight, bias, c_up * share, *rest


def backward_inputs(args: tuple, _: None, dy: Tensor) -> tuple:
    """Arguments of the op's backward, every gradient wanted of the factors that are there."""
    x, weight, _, *rest = args
    needs = [True, *(f is not None for f in rest[:4]), False]
    return dy, x, weight, *rest, needs


def layers(args: tuple) -> dict[str, peers.Layer]:
    """The layer as each library builds it."""
    _, weight, bias, c, _, d, d_down, scale, _ = args
    values = (c, d) if d_down is None else (c, d, d_down)
    # any rank that is too large for two factors makes D whole
    rank = max(d.shape) if d_down is None else len(d_down)
    # a square C is what a factor of its size makes, -1 makes the others
    factor = len(c) if c.shape[0] == c.shape[1] else -1
    plain = lambda: peers.linear(weight, bias)  # noqa: E731
    return peers.layers(plain, values, rank, scale, lokr(factor, whole=d_down is None))


def lokr(factor: int, *, whole: bool) -> peers.Algorithm:
    """LoKr of this factor, its D whole or of low rank."""
    ours, theirs = ("c", "d"), ("lokr_w1", "lokr_w2")
    if not whole:
        ours, theirs = ("c", "d_up", "d_down"), ("lokr_w1", "lokr_w2_a", "lokr_w2_b")
    return peers.Algorithm(
        ("lokr", "LoKrConfig", "lokr.LokrModule"),
        (ours, tuple(f"{n}.default" for n in theirs), theirs),
        ({"factor": factor}, {"decompose_factor": factor}, {"factor": factor}),
    )

"""kron_delta: the update of LoKr alone."""

from dataclasses import dataclass

import torch

from bench.ops._delta import DIRECTIONS, FLOOR, SIZES, backward_inputs, layer, normals
from bench.peers import Layer
from lorakern.adapters import lokr_shapes
from lorakern.functional import kron_delta

__all__ = ["BACKWARD", "CASES", "DIRECTIONS", "FLOOR", "FORWARD", "backward_inputs", "inputs",
           "layers"]  # fmt: skip

FORWARD, BACKWARD = "kron_delta_fwd", "kron_delta_bwd"


@dataclass(frozen=True)
class Case:
    """O rows, I columns, F the factor that splits them."""

    O: int  # noqa: E741
    I: int  # noqa: E741
    F: int

    def __str__(self) -> str:
        return f"O{self.O} I{self.I} F{self.F}"


CASES = [Case(*size, F) for size in SIZES for F in (-1, 8)]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple:
    """Arguments of the op's forward."""
    normal = normals(dtype, device)
    (A, P), (B, Q) = (lokr_shapes.split(n, case.F) for n in (case.O, case.I))
    return normal(A, B, over=B), normal(P, Q, over=Q), 0.5


def layers(args: tuple) -> dict[str, Layer]:
    """See _delta.layer."""
    return layer(kron_delta, args)

"""hada_delta: the update of LoHa alone; both products have the rank."""

import torch

from bench.ops._delta import CASES, DIRECTIONS, FLOOR, Case, backward_inputs, layer, normals
from bench.peers import Layer
from lorakern.functional import hada_delta

__all__ = ["BACKWARD", "CASES", "DIRECTIONS", "FLOOR", "FORWARD", "backward_inputs", "inputs",
           "layers"]  # fmt: skip

FORWARD, BACKWARD = "hada_delta_fwd", "hada_delta_bwd"


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple:
    """Arguments of the op's forward."""
    normal = normals(dtype, device)
    first = normal(case.R, case.I, over=1), normal(case.O, case.R, over=case.R)
    second = normal(case.R, case.I, over=case.I), normal(case.O, case.R, over=case.R)
    return *first, *second, 0.5


def layers(args: tuple) -> dict[str, Layer]:
    """See _delta.layer."""
    return layer(hada_delta, args)

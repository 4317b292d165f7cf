"""lora_delta: the update of LoRA alone."""

import torch

from bench.ops._delta import CASES, DIRECTIONS, FLOOR, Case, backward_inputs, layer, normals
from bench.peers import Layer
from lorakern.functional import lora_delta

__all__ = ["BACKWARD", "CASES", "DIRECTIONS", "FLOOR", "FORWARD", "backward_inputs", "inputs",
           "layers"]  # fmt: skip

FORWARD, BACKWARD = "lora_delta_fwd", "lora_delta_bwd"


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple:
    """Arguments of the op's forward."""
    normal = normals(dtype, device)
    return normal(case.R, case.I, over=case.I), normal(case.O, case.R, over=case.R), 0.5


def layers(args: tuple) -> dict[str, Layer]:
    """See _delta.layer."""
    return layer(lora_delta, args)

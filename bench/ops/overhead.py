"""What a call of an adapted linear layer costs by itself: 4 x 8 inputs, so no arithmetic."""

from bench.ops.lora_linear import (
    BACKWARD,
    FLOOR,
    FORWARD,
    Case,
    backward_inputs,
    inputs,
    layers,
    smaller,
)

__all__ = ["BACKWARD", "CASES", "DIRECTIONS", "FLOOR", "FORWARD", "backward_inputs", "inputs",
           "layers", "smaller"]  # fmt: skip

DIRECTIONS = ("infer", "fwd", "fwd+bwd")
CASES = [Case(8, 8, 4, 4)]

"""DoRA on linear layers of Stable Diffusion 1.5: lora_linear with a gain.

lorakern keeps the norm until a factor changes, and in training a factor changes every step: each
arm touches its factors before its forward, so that one refresh of the norm is in every step.
"""

import dataclasses

import torch
from torch import Tensor

from bench import peers
from bench.ops import lora_linear
from bench.ops.lora_linear import BACKWARD, FLOOR, FORWARD, Case, smaller

__all__ = ["BACKWARD", "CASES", "DIRECTIONS", "FLOOR", "FORWARD", "Case", "backward_inputs",
           "inputs", "layers", "smaller"]  # fmt: skip

DIRECTIONS = ("fwd", "fwd+bwd")
CASES = lora_linear.CASES[:4]

DORA = peers.Algorithm(
    ("dora", *peers.LORA.names[1:]),
    tuple(
        (*names, magnitude)
        for names, magnitude in zip(
            peers.LORA.factors,
            ("magnitude", "lora_magnitude_vector.default.weight", "dora_scale"),
            strict=True,
        )
    ),
    ({}, {"use_dora": True}, {"weight_decompose": True, "wd_on_out": True}),
)


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple:
    """Arguments of the op's forward, with gains from 0.5 to 1.5.

    The rows of W + ΔW have norm 1, so that the gradient of a magnitude is that of its gain.
    """
    x, weight, bias, down, up, scale, _ = lora_linear.inputs(case, dtype, device)
    norm_O1 = _norm(weight, down, up, scale)[:, None]
    weight, up = (t.div(norm_O1).to(dtype) for t in (weight, up))
    seed = torch.Generator().manual_seed(1)
    gain = (torch.rand(case.O, generator=seed) + 0.5).to(device, torch.float32)
    return x, weight, bias, down, up, scale, gain


def backward_inputs(args: tuple, h: Tensor, dy: Tensor) -> tuple:
    """Arguments of the op's backward, every gradient wanted."""
    *most, needs = lora_linear.backward_inputs(args, h, dy)
    return *most, [True] * len(needs)


def layers(args: tuple) -> dict[str, peers.Layer]:
    """The layer as each library builds it, its magnitude the gain times the norm."""
    _, weight, bias, down, up, scale, gain = args
    magnitude = (gain * _norm(weight, down, up, scale)).to(gain.dtype)
    plain = lambda: peers.linear(weight, bias)  # noqa: E731
    made = peers.layers(plain, (down, up, magnitude), len(down), scale, DORA)
    # LyCORIS's bypass is a LoRA without magnitude; its other path differentiates through the norm
    made.pop("lycoris bypass", None)
    if "lycoris" in made:
        made["lycoris"] = dataclasses.replace(made["lycoris"], apart=("ddown", "dup"))
        # outside autocast it fails on a 16-bit layer with a float32 magnitude; so rounded, its gain
        # is up to 0.4 % off in bfloat16, which PEER_RMS allows. PEFT's 16-bit one is too
        dora_scale = made["lycoris"].factors[-1]
        dora_scale.data = dora_scale.data.to(weight.dtype)
    return {name: _touched(layer) for name, layer in made.items()}


def _norm(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """[O] in float64"""
    return (weight.double() + scale * up.double() @ down.double()).norm(dim=1)


def _touched(layer: peers.Layer) -> peers.Layer:
    factors = list(layer.factors)

    def call(x: Tensor) -> Tensor:
        if factors:
            with torch.no_grad():
                torch._foreach_mul_(factors, 1)
        return layer.call(x)

    return dataclasses.replace(layer, call=call)

"""lora_conv2d on convolutions of Stable Diffusion 1.5 at 512 px."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench import peers

FORWARD, BACKWARD = "lora_conv2d_fwd", "lora_conv2d_bwd"
DIRECTIONS = ("fwd", "fwd+bwd")
FLOOR = "frozen"


@dataclass(frozen=True)
class Case:
    """O, I channels; an H x H image; a K x K kernel with a stride; R rank."""

    O: int  # noqa: E741
    I: int  # noqa: E741
    H: int
    K: int
    R: int
    stride: int = 1

    def __str__(self) -> str:
        stride = f" stride{self.stride}" * (self.stride > 1)
        return f"O{self.O} I{self.I} H{self.H} K{self.K} R{self.R}{stride}"


CASES = [
    # residual blocks of the levels, a downsampler, proj_in
    Case(320, 320, 64, 3, 16),
    Case(640, 640, 32, 3, 16),
    Case(1280, 1280, 16, 3, 16),
    Case(320, 320, 64, 3, 16, stride=2),
    Case(320, 320, 64, 1, 16),
    # a residual block of the inner levels at 128 px
    Case(1280, 1280, 4, 3, 16),
]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple:
    """Arguments of the op's forward; ΔW is as large as the weight, so that an error in it shows."""

    def normal(*shape: int, over: int) -> Tensor:
        return (torch.randn(*shape, generator=seed) / over**0.5).to(device, dtype)

    seed = torch.Generator().manual_seed(0)
    fan_in = case.I * case.K**2
    x = normal(1, case.I, case.H, case.H, over=1)
    weight = normal(case.O, case.I, case.K, case.K, over=fan_in)
    bias = normal(case.O, over=1)
    down = normal(case.R, case.I, case.K, case.K, over=fan_in)
    up = normal(case.O, case.R, 1, 1, over=case.R)
    pad = case.K // 2
    return x, weight, bias, down, up, 0.5, [case.stride] * 2, [pad, pad], [1, 1], 1


def smaller(args: tuple, share: float) -> tuple:
    """The same with an update of this share of the weight."""
    *before, up, scale = args[:6]
    return *before, up * (share / scale), scale, *args[6:]


def backward_inputs(args: tuple, h: Tensor, dy: Tensor) -> tuple:
    """Arguments of the op's backward, every gradient wanted."""
    x, weight, _, down, up, scale, *window = args
    return dy, x, h, weight, down, up, scale, *window, [True, True, True]


def layers(args: tuple) -> dict[str, peers.Layer]:
    """The layer as each library builds it."""
    _, weight, bias, down, up, scale, stride, padding, dilation, groups = args

    def plain() -> nn.Conv2d:
        out_channels, in_channels, *kernel = weight.shape
        layer = nn.Conv2d(
            in_channels, out_channels, tuple(kernel), tuple(stride), tuple(padding),
            tuple(dilation), groups, device="meta",
        )  # fmt: skip
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    return peers.layers(plain, (down, up), len(down), scale)

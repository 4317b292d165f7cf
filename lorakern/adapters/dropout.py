"""Dropout of a LoRA in training: y = layer(x) + s·drop_y(up(drop_h(down(drop_x(x))))).

One rounding. Which of the drops are not the identity: masks.py. No mask is stored: backward draws
it again from the seed, and computes h again, so x alone is kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakern.adapters import layers
from lorakern.adapters.masks import Masks
from lorakern.ops.lora_conv2d.reference import join_groups, split_groups

_HALF = (torch.float16, torch.bfloat16)


def shrink(layer: nn.Module, x: Tensor, down: Tensor) -> Tensor:
    """h = down(x) with the geometry of a Linear or Conv2d."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, down)
    x, padding = layers.padded(layer, x)
    h = F.conv2d(split_groups(x, layer.groups), down, None, layer.stride, padding, layer.dilation)
    return join_groups(h, layer.groups)


def expand(layer: nn.Module, h: Tensor, up: Tensor) -> Tensor:
    """up(h), the update's output without its scale."""
    return F.linear(h, up) if isinstance(layer, nn.Linear) else F.conv2d(h, up, groups=layer.groups)


def can_regenerate(x: Tensor) -> bool:
    """Not under torch.compile, which seeds its own masks, nor in a CUDA graph, which fixes one."""
    if torch.compiler.is_compiling():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


class Dropped(torch.autograd.Function):
    """apply(x, weight, bias, down, up, scale, layer, masks): the layer, its update, dropout.

    In 16-bit a Linear runs one product on [x, s·h] and [W, up], at the cost of copies of x and W;
    a Conv2d runs in float32. dx is the base's gradient plus the update's, each rounded.

    Args:
        layer: Linear or Conv2d, for its geometry; its own weight is not read.
        x, weight, bias, down, up, scale: as in functional.lora_linear and lora_conv2d.
        masks: what is dropped.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scale, layer, masks):
        # from the CPU's generator: checkpointing restores its state, so a second run drops alike
        seed = int(torch.randint(2**62, ()))
        ctx.save_for_backward(x, weight, down, up)
        ctx.settings = scale, layer, masks, seed
        if isinstance(layer, nn.Linear) and x.dtype in _HALF and masks.mode != "bypass":
            h = kept_h(layer, x, down, masks, seed)
            return F.linear(torch.cat([x, scale * h], -1), torch.cat([weight, up], 1), bias)
        wide = layers.widest(x.dtype)
        x_wide, down, up = x.to(wide), down.to(wide), up.to(wide)
        y = layers.run(layer, x_wide, weight.to(wide), None if bias is None else bias.to(wide))
        delta = expand(layer, kept_h(layer, x_wide, down, masks, seed), up)
        return y.add_(masks.on("bypass", delta, seed), alpha=scale).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, *factors = ctx.saved_tensors
        scale, layer, masks, seed = ctx.settings
        leaves = [
            t.detach().requires_grad_(ctx.needs_input_grad[i])
            for i, t in zip((0, 3, 4), (x, *factors), strict=True)
        ]
        asked = [t for t in leaves if t.requires_grad]
        with torch.enable_grad():
            h = kept_h(layer, leaves[0], leaves[1], masks, seed)
            delta = masks.on("bypass", expand(layer, h, leaves[2]), seed)
        grads = iter(torch.autograd.grad(delta, asked, scale * dy))
        dx, ddown, dup = (next(grads) if t.requires_grad else None for t in leaves)
        if dx is not None:
            dx = dx + layers.gradients(layer, x, weight, dy, True, False)[0]
        return dx, None, None, ddown, dup, None, None, None


def kept_h(
    layer: nn.Module, x: Tensor, down: Tensor, masks: Masks, seed: int | None = None
) -> Tensor:
    """h, with what is dropped of it and of x; seed as in masks.mask."""
    h = masks.on("kohya", shrink(layer, masks.on("peft", x, seed), down), seed)
    linear = isinstance(layer, nn.Linear)
    return masks.on_ranks(h, 1 if linear else layer.groups, -1 if linear else -3, seed)

"""Dropout of a LoRA in training: y = layer(x) + s·up(drop_h(down(drop_x(x)))), one rounding.

One of the two drops is the identity: PEFT drops x, kohya's trainer drops h. No mask is stored:
backward draws it again from the seed, and computes h again, so x alone is kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakern.adapters import layers
from lorakern.ops.lora_conv2d.reference import join_groups, split_groups

MODES = ("peft", "kohya")
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
    """apply(x, weight, bias, down, up, scale, layer, p, mode): the layer, its update, dropout.

    In 16-bit a Linear runs one product on [x, s·h] and [W, up], at the cost of copies of x and W;
    a Conv2d runs in float32. dx is the base's gradient plus the update's, each rounded.

    Args:
        layer: Linear or Conv2d, for its geometry; its own weight is not read.
        x, weight, bias, down, up, scale: as in functional.lora_linear and lora_conv2d.
        p: probability of a zero; what is kept is divided by 1 - p.
        mode: "peft" drops x, "kohya" drops h.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scale, layer, p, mode):
        # from the CPU's generator: checkpointing restores its state, so a second run drops alike
        seed = int(torch.randint(2**62, ()))
        ctx.save_for_backward(x, weight, down, up)
        ctx.settings = scale, layer, p, mode, seed
        if isinstance(layer, nn.Linear) and x.dtype in _HALF:
            h = _kept_h(layer, x, down, p, mode, seed)
            return F.linear(torch.cat([x, scale * h], -1), torch.cat([weight, up], 1), bias)
        wide = layers.widest(x.dtype)
        x_wide, down, up = x.to(wide), down.to(wide), up.to(wide)
        y = layers.run(layer, x_wide, weight.to(wide), None if bias is None else bias.to(wide))
        h = _kept_h(layer, x_wide, down, p, mode, seed)
        return y.add_(expand(layer, h, up), alpha=scale).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, *factors = ctx.saved_tensors
        scale, layer, p, mode, seed = ctx.settings
        leaves = [
            t.detach().requires_grad_(ctx.needs_input_grad[i])
            for i, t in zip((0, 3, 4), (x, *factors), strict=True)
        ]
        asked = [t for t in leaves if t.requires_grad]
        with torch.enable_grad():
            h = _kept_h(layer, leaves[0], leaves[1], p, mode, seed)
            delta = expand(layer, h, leaves[2])
        grads = iter(torch.autograd.grad(delta, asked, scale * dy))
        dx, ddown, dup = (next(grads) if t.requires_grad else None for t in leaves)
        if dx is not None:
            dx = dx + _base_gradient(layer, x, weight, dy)
        return dx, None, None, ddown, dup, None, None, None, None


def _kept_h(layer: nn.Module, x: Tensor, down: Tensor, p: float, mode: str, seed: int) -> Tensor:
    if mode == "peft":
        return shrink(layer, x * mask(x, p, seed), down)
    h = shrink(layer, x, down)
    return h * mask(h, p, seed)


def mask(like: Tensor, p: float, seed: int) -> Tensor:
    """0 with probability p, else 1 / (1 - p), in like's shape and dtype; a seed's is always one."""
    generator = torch.Generator(like.device).manual_seed(seed)
    # drawn apart from like's dtype and strides, which backward may not share
    kept = torch.empty(like.shape, dtype=torch.bool, device=like.device)
    return kept.bernoulli_(1 - p, generator=generator).to(like.dtype).div_(1 - p)


def _base_gradient(layer: nn.Module, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return dy @ weight
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        inside, padding = layers.padded(layer, x)
    window = (layer.stride, padding, layer.dilation, layer.groups)
    d_inside = torch.nn.grad.conv2d_input(inside.shape, weight, dy, *window)
    return d_inside if inside is x else torch.autograd.grad(inside, x, d_inside)[0]

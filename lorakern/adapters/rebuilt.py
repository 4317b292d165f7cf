"""layer(x; W + Σ ΔW) with ΔW made in float32, where no op does without it.

Nothing of the weight's size is kept for backward: ΔW is made there again from the factors. A
16-bit weight is widened before the sum, so no update is lost in its rounding.
"""

import torch
from torch import Tensor, nn

from lorakern.adapters import layers


def rebuilt(
    adapters: list, layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """layer(x; W + Σ ΔW), not rounded: in float32, or float64 on such a weight.

    Args:
        adapters: those whose ΔW is in the sum; the weight alone when there are none.
        layer: Linear or Conv2d, for its geometry.
        x, weight, bias: as the layer takes them, of one dtype.

    Raises:
        ValueError: weight or bias asks for a gradient, which it would not get.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight and bias are frozen here; call requires_grad_(False) on them")
    recipes = [(a, a.live_scale(), a.live_multiplier(), a.row_mask()) for a in adapters]
    factors = [getattr(a, name) for a in adapters for name in a.factors]
    if torch.compiler.is_compiling():
        return _run(layer, x, weight, bias, recipes, factors)
    return _Rebuilt.apply(layer, recipes, x, weight, bias, *factors)


class _Rebuilt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, recipes, x, weight, bias, *factors):
        ctx.save_for_backward(x, weight, *factors)
        ctx.settings = layer, recipes
        return _run(layer, x, weight, bias, recipes, factors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, *factors = ctx.saved_tensors
        layer, recipes = ctx.settings
        need_dx, _, _, *needs = ctx.needs_input_grad[2:]
        leaves = [t.detach().requires_grad_(n) for t, n in zip(factors, needs, strict=True)]
        with torch.enable_grad(), layers.full_precision(dy.device.type):
            total = _total(weight, recipes, leaves)
        x_wide, asked = x.to(dy.dtype), [t for t in leaves if t.requires_grad]
        dx, dweight = layers.gradients(layer, x_wide, total.detach(), dy, need_dx, bool(asked))
        # a factor may be out of reach, as of a magnitude at multiplier 0
        grads = iter(torch.autograd.grad(total, asked, dweight, allow_unused=True) if asked else ())
        dx = None if dx is None else dx.to(x.dtype)
        return None, None, dx, None, None, *(next(grads) if n else None for n in needs)


def _run(layer, x, weight, bias, recipes, factors) -> Tensor:
    total = _total(weight, recipes, factors)
    bias = None if bias is None else bias.to(total.dtype)
    return layers.run(layer, x.to(total.dtype), total, bias)


def _total(weight: Tensor, recipes: list, factors) -> Tensor:
    """W + Σ ΔW in the weight's shape"""
    total = wide = weight.to(layers.widest(weight.dtype))
    left = iter(factors)
    for adapter, scale, multiplier, mask in recipes:
        mine = {name: next(left).to(wide.dtype) for name in adapter.factors}
        total = total + adapter.update(wide, mine, scale, multiplier, mask)
    return total

"""The LoRAs of one layer as a single op call, so that all share its sum and its rounding."""

import torch
from torch import Tensor, nn

from lorakern.adapters import dropout, layers
from lorakern.functional import lora_conv2d, lora_linear


def one_call(
    adapters: list, layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    """layer(x; W + Σ ΔW) of LoRAs; None where no op does it: embeddings, dropout in a stack.

    The factors of several are laid side by side, each up times its share of the scale.
    """
    first = adapters[0]
    if first.kind == "embedding":
        return None
    if first.kind == "conv2d" and x.dim() == 3:
        y = one_call(adapters, layer, x[None], weight, bias)
        return None if y is None else y[0]
    if any(a.drops_rows() for a in adapters):
        return None
    if any(a.masks() for a in adapters):
        if len(adapters) > 1 or not dropout.can_regenerate(x):
            return None
        f = first.folded(x.dtype)
        settings = first.scale, layer, first.masks()
        return dropout.Dropped.apply(x, weight, bias, f["down"], f["up"], *settings)
    if len(adapters) == 1:
        f, scale = first.folded(x.dtype), first.live_scale()
        down, up = f["down"], f["up"]
    else:
        down, up, scale = _side_by_side(adapters, x.dtype)
    recompute = any(a.recompute for a in adapters)
    if first.kind == "linear":
        return lora_linear(x, weight, bias, down, up, scale, recompute=recompute)
    return _convolve(layer, x, weight, bias, down, up, scale, recompute)


def _side_by_side(adapters: list, dtype: torch.dtype):
    scales = [a.live_scale() for a in adapters]
    tensors = isinstance(scales[0], Tensor)
    # over the largest, so that no up becomes too small for 16-bit that was not
    scale = torch.stack(scales).abs().amax() if tensors else max(map(abs, scales))
    wide = layers.widest(dtype)
    both = [a.folded(wide) for a in adapters]
    ups = [(s / scale * f["up"]).to(dtype) for s, f in zip(scales, both, strict=True)]
    return torch.cat([f["down"].to(dtype) for f in both]), torch.cat(ups, 1), scale


def _convolve(conv: nn.Conv2d, x, weight, bias, down, up, scale, recompute) -> Tensor:
    x, padding = layers.padded(conv, x)
    pointwise = conv.kernel_size == conv.stride == (1, 1) and tuple(padding) == (0, 0)
    if pointwise and conv.groups == 1 and x.is_contiguous(memory_format=torch.channels_last):
        # rows of pixels, without a copy
        rows = x.permute(0, 2, 3, 1)
        y = lora_linear(
            rows, weight.flatten(1), bias, down.flatten(1), up.flatten(1), scale,
            recompute=recompute,
        )  # fmt: skip
        return y.permute(0, 3, 1, 2)
    window = (conv.stride, padding, conv.dilation, conv.groups)
    return lora_conv2d(x, weight, bias, down, up, scale, *window)

"""The layers that adapters sit on: which are accepted and why not, and how each runs.

A layer is taken only when its forward is the known formula, because an adapter replaces that
forward by its own. Everything else is refused with the reason.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = {"linear": nn.Linear, "conv2d": nn.Conv2d, "embedding": nn.Embedding}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# these parents read the child's weight and may never call its forward
_BYPASSED = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}


def kind_of(layer: nn.Module) -> str | None:
    """The key of KINDS for a layer, None for any other module."""
    return next((kind for kind, cls in KINDS.items() if isinstance(layer, cls)), None)


def bypassed(parent: nn.Module, child: str) -> bool:
    """Whether the parent reads this child's weight instead of calling the child."""
    return any(isinstance(parent, cls) and child in names for cls, names in _BYPASSED.items())


def refusal(layer: nn.Module) -> str | None:
    """Why no adapter can sit on this layer; None when one can."""
    kind = kind_of(layer)
    if kind is None:
        return f"a {type(layer).__name__} is not one of {', '.join(KINDS)}"
    cls = KINDS[kind]
    same = type(layer).forward is cls.forward and "forward" not in vars(layer)
    if kind == "conv2d":
        same = same and type(layer)._conv_forward is cls._conv_forward
    if not same:
        return f"{type(layer).__name__} has a forward of its own, which an adapter would replace"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed (parametrize, weight_norm), not a parameter"
    if type(weight) is not nn.Parameter or weight.dtype not in DTYPES:
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, not plain floats"
    if kind == "embedding" and layer.max_norm is not None:
        return f"max_norm={layer.max_norm} rewrites the frozen weight at every forward"
    return None


def run(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's own formula on another weight and bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, weight, bias)
    return F.embedding(x, weight, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)


def padded(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """x with what padding conv2d itself cannot do, and the zeros in pixels that it still can."""
    if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        return x, conv.padding
    left, right, top, bottom = sides = conv._reversed_padding_repeated_twice
    if conv.padding_mode != "zeros":
        return F.pad(x, sides, mode=conv.padding_mode), (0, 0)
    if left == right and top == bottom:
        return x, (top, left)
    return F.pad(x, sides), (0, 0)


def widest(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the sums over tensors of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32

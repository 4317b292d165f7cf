"""The layers that adapters sit on: which are accepted and why not, and how each runs.

A layer is taken only when its forward is the known formula, because an adapter replaces that
forward by its own. Everything else is refused with the reason.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakern.frozen import FrozenConv2d, FrozenLinear

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
    own = (cls.forward, FrozenLinear.forward, FrozenConv2d.forward)
    same = type(layer).forward in own and "forward" not in vars(layer)
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


def is_product(layer: nn.Module) -> bool:
    """Whether the layer multiplies rows by its weight: a Linear, a 1 x 1 convolution."""
    if isinstance(layer, nn.Linear):
        return True
    one = layer.kernel_size == layer.stride == (1, 1)
    # "same" and "valid" are nothing around one pixel
    return one and layer.padding in ((0, 0), "same", "valid") and layer.groups == 1


class _Turned(torch.autograd.Function):
    """x [..., I, H, W] as rows [..., H, W, I], and its gradient in memory as x is."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.movedim(-3, -1).contiguous()

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return dy.movedim(-1, -3).contiguous()


def _is_last(x: Tensor) -> bool:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return last and not x.is_contiguous()


def pixels_last(layer: nn.Module, x: Tensor) -> Tensor:
    """x of a product as rows [..., I]; without a copy when it is in channels_last."""
    if isinstance(layer, nn.Linear):
        return x
    return x.movedim(-3, -1) if _is_last(x) else _Turned.apply(x)


def pixels_first(layer: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    """The rows of a product in the layout of its output, in memory as x is.

    Neither it nor a gradient may bring channels_last into a network that has none: there every
    convolution that follows would turn its whole weight.
    """
    if isinstance(layer, nn.Linear):
        return y
    y = y.movedim(-1, -3)
    return y if _is_last(x) else y.contiguous()


def gradients(
    layer: nn.Module, x: Tensor, weight: Tensor, dy: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight of a Linear or Conv2d; None for one that is not needed."""
    if isinstance(layer, nn.Linear):
        dx = dy @ weight if need_dx else None
        rows_x, rows_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        return dx, rows_dy.mT @ rows_x if need_dweight else None
    if x.dim() == 3:
        dx, dweight = gradients(layer, x[None], weight, dy[None], need_dx, need_dweight)
        return dx if dx is None else dx[0], dweight
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        inside, padding = padded(layer, x)
    window = (layer.stride, padding, layer.dilation, False, [0, 0], layer.groups)
    d_inside, dweight, _ = torch.ops.aten.convolution_backward(
        dy, inside.detach(), weight, None, *window, [need_dx, need_dweight, False]
    )
    if need_dx and inside is not x:
        d_inside = torch.autograd.grad(inside, x, d_inside)[0]
    return d_inside, dweight


def autocast_on(device: str) -> bool:
    """Whether autocast would round the products of this kind of device here."""
    # torch 2.10 cannot trace the question whether the device (meta has none) has autocast at all
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def recorded(t: Tensor) -> bool:
    """Whether calls are recorded to run on other values, where what is kept would be a constant."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def full_precision(device: str):
    """A block without autocast."""
    return torch.autocast(device, enabled=False) if autocast_on(device) else nullcontext()

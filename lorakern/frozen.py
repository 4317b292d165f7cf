"""The frozen layers of few rows or pixels in a model, on a CPU: faster products, in place."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakern.functional import frozen_linear
from lorakern.ops.frozen_linear.op import ROWS, refusal
from lorakern.ops.lora_conv2d.columns import pixels, size_of, windows

# pixels whose windows are multiplied, as columns where they are more than few rows; beyond them
# torch's copy of a large weight is the smaller part of its time
PIXELS = range(ROWS[0], 65)


def accelerate_frozen(model: nn.Module) -> Callable[[], None]:
    """Run the frozen Linear and Conv2d layers of a model on faster products, in place.

    What they compute, their parameters and the keys of a checkpoint stay; so do all layers that
    train, or are of another class than torch's own. A layer runs as before where none is faster:
    one is there for float32 on a CPU that is not Intel's, where 2 to 32 rows, or 2 to 64 pixels of
    a convolution (of all images), meet a weight of 2^16 values or more for each, as in the inner
    blocks of a UNet. Up to 32 of them are `functional.frozen_linear`, differentiable once.
    Adapters, PEFT's too, go on such layers as on others, before or after.

    Returns:
        A function without arguments that makes the layers torch's own again.
    """
    changed = [m for m in model.modules() if type(m) in _FAST and _can(m)]
    for layer in changed:
        layer.__class__ = _FAST[type(layer)]

    def undo() -> None:
        for layer in changed:
            if type(layer) in _PLAIN:
                layer.__class__ = _PLAIN[type(layer)]

    return undo


class FrozenLinear(nn.Linear):
    """nn.Linear, on `functional.frozen_linear` where its rows are few."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear."""
        rows = x.numel() // self.in_features
        if x.shape[-1:] == (self.in_features,) and _few(self, x, rows, ROWS):
            return frozen_linear(x, self.weight, self.bias)
        return super().forward(x)


class FrozenConv2d(nn.Conv2d):
    """nn.Conv2d, as a product with its windows where its output has few pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Conv2d."""
        window = self.kernel_size, self.stride, self.padding, self.dilation
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            return super().forward(x)
        high, wide = size_of(x, *window)
        count = x.shape[0] * high * wide
        if not _few(self, x, count, PIXELS):
            return super().forward(x)
        if count in ROWS:
            rows = frozen_linear(windows(x, *window), self.weight.flatten(1), self.bias)
            return pixels(rows, x.shape[0], (high, wide))
        kernel, stride, padding, dilation = window
        # [I·kh·kw, B·P·Q], of which the product's backward keeps nothing
        columns = F.unfold(x, kernel, dilation, padding, stride).transpose(0, 1).flatten(1)
        y = self.weight.flatten(1) @ columns
        if self.bias is not None:
            y = y + self.bias[:, None]
        return y.view(-1, x.shape[0], high, wide).transpose(0, 1).contiguous()


_FAST = {nn.Linear: FrozenLinear, nn.Conv2d: FrozenConv2d}
_PLAIN = {fast: plain for plain, fast in _FAST.items()}


def _can(layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether a kernel is there for some input of a layer."""
    plain = isinstance(layer, nn.Linear) or (
        layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )
    native = hasattr(torch.ops.lorakern_native, "frozen_linear_fwd_cpu")
    plain = plain and native and "forward" not in vars(layer)
    return plain and _frozen(layer) and refusal(ROWS[0], layer.weight) is None


def _frozen(layer: nn.Linear | nn.Conv2d) -> bool:
    return not (layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad))


def _few(layer: nn.Linear | nn.Conv2d, x: Tensor, rows: int, few: range) -> bool:
    """Whether another product than torch's is the faster one for this input."""
    weight = layer.weight
    return (
        rows in few
        and type(x) is Tensor
        and x.dtype == weight.dtype
        and x.device == weight.device
        and x.is_contiguous()
        and weight.is_contiguous()
        and _frozen(layer)
        and refusal(rows, weight, few) is None
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )

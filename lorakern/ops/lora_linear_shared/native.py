"""lora_linear_shared as one call of the compiled extension, gradient and all."""

from collections.abc import Callable

import torch
from torch import Tensor

from lorakern import backend

_OPS = "lora_linear_shared_fwd", "lora_linear_shared_bwd"
_whole: dict[object, Callable | None] = backend.memory_of_picks()


def native(x: Tensor) -> Callable | None:
    """The function that is both directions of cpp or cuda, where it runs on x; else None.

    That of cuda also takes float32 factors beside 16-bit, and gives their gradients in float32.
    """
    if x.is_cpu:
        # by dtype: cpp does not refuse by shape
        key, name = x.dtype, "cpp"
    elif x.is_cuda and not (x.requires_grad and torch.is_grad_enabled()):
        key, name = (x.dtype, x.device, x.shape[-1]), "cuda"
    else:
        return None
    if key not in _whole:
        function = f"lora_linear_shared_{'cpu' if x.is_cpu else 'cuda'}"
        _whole[key] = backend.whole(*_OPS, function, x, kind=name)
    return _whole[key]

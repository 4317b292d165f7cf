"""What lora_linear_shared asks of its arguments."""

import torch
from torch import Tensor

from lorakern.ops import check


def check_layers(x: Tensor, weights, biases, downs, ups, scales) -> None:
    """Raises ValueError, with the layer's place, unless each is a layer that lora_linear takes."""
    counts = [len(given) for given in (weights, biases, downs, ups, scales)]
    if not counts[0] or len(set(counts)) > 1:
        names = ("weights", "biases", "downs", "ups", "scales")
        came = ", ".join(f"{n} {name}" for n, name in zip(counts, names, strict=True))
        raise ValueError(f"want one of each for at least one layer, got {came}")
    layers = zip(weights, biases, downs, ups, strict=True)
    for place, (weight, bias, down, up) in enumerate(layers):
        # one expression: small layers' calls cost little more than this
        if (
            weight.dim() == 2 == down.dim()
            and x.shape[-1:] == weight.shape[1:] == down.shape[1:]
            and up.shape == (weight.shape[0], down.shape[0])
            and x.dtype == weight.dtype == down.dtype == up.dtype
            and x.device == weight.device == down.device == up.device
            and not weight.requires_grad
            and bias is None
            and x.is_floating_point()
        ):
            continue
        try:
            check.frozen_linear(x, weight, bias, None, down=down, up=up)
            check.matrices(down=down)
            rank = len(down)
            check.shapes(down=(down, [rank, x.shape[-1]]), up=(up, [len(weight), rank]))
        except ValueError as error:
            raise ValueError(f"layer {place}: {error}") from error


def refuse_cuda(x: Tensor, *_) -> str | None:
    """Why the CUDA kernel does not run on x; None when it does."""
    if reason := check.only_cuda(x):
        return reason
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"{x.dtype}: the kernel multiplies 16-bit matrices"
    if x.shape[-1] % 8:
        return f"{x.shape[-1]} columns of x; the kernel reads 8 at once"
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}: the kernel needs sm_80" if major < 8 else None


def refuse_cuda_bwd(x: Tensor, *rest) -> str | None:
    """The same for the gradients."""
    if reason := refuse_cuda(x):
        return reason
    need_dx = rest[-1][0]
    return "dx is wanted; the kernel makes the gradients of downs and ups" if need_dx else None

"""What the public functions of several ops ask of their tensors."""

import os

import torch
from torch import Tensor

# a rank is one tile of a Triton kernel
TRITON_RANK = 128


def alike(**tensors: Tensor | None) -> None:
    """Raises ValueError unless all that are there share a floating dtype and a device."""
    there = {name: t for name, t in tensors.items() if t is not None}
    first = next(iter(there.values()))
    dtype, device = first.dtype, first.device
    # a loop: a small layer's call waits for it
    for t in there.values():
        if t.dtype != dtype or t.device != device:
            what = "device" if all(t.dtype == dtype for t in there.values()) else "dtype"
            values = ", ".join(f"{name} {getattr(t, what)}" for name, t in there.items())
            raise ValueError(f"mixed {what}s: {values}")
    if not dtype.is_floating_point:
        raise ValueError(f"want floating-point tensors, got {dtype}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the sums over tensors of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shapes(**wanted: tuple[Tensor | None, list[int]]) -> None:
    """Raises ValueError for the first tensor that is there and has another shape than wanted."""
    for name, (tensor, want) in wanted.items():
        if tensor is not None and list(tensor.shape) != want:
            raise ValueError(f"want {name} {want}, got {list(tensor.shape)}")


def matrices(**tensors: Tensor | None) -> None:
    """Raises ValueError for the first tensor that is there and is not a matrix."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dim() != 2:
            raise ValueError(f"want {name} as a matrix, got {list(tensor.shape)}")


def frozen_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None, **factors: Tensor | None
) -> None:
    """The frozen layer beside its factors: dtypes, devices, features, nothing frozen trains.

    Raises:
        ValueError: says what was wanted and what came.
    """
    matrices(weight=weight)
    out_features, in_features = weight.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"want x [..., {in_features}] as weight takes, got {list(x.shape)}")
    shapes(bias=(bias, [out_features]), gain=(gain, [out_features]))
    alike(x=x, weight=weight, bias=bias, **factors)
    if gain is not None and (gain.dtype, gain.device) != (wide(x.dtype), x.device):
        raise ValueError(
            f"want gain in {wide(x.dtype)} on {x.device}, got {gain.dtype} on {gain.device}"
        )
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight and bias are frozen here; call requires_grad_(False) on them")


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None, down: Tensor, up: Tensor
) -> None:
    """The frozen layer beside down and up, as `frozen_linear`, and their shapes.

    Raises:
        ValueError: says what was wanted and what came.
    """
    (out_features, in_features), rank = weight.shape, down.shape[0]
    dtype, device = x.dtype, x.device
    # one expression: a small layer's call costs little more than this
    if not (
        x.shape[-1:] == (in_features,)
        and down.shape == (rank, in_features)
        and up.shape == (out_features, rank)
        and dtype == weight.dtype == down.dtype == up.dtype
        and device == weight.device == down.device == up.device
        and not weight.requires_grad
        and x.is_floating_point()
        and bias is gain is None
    ):
        frozen_linear(x, weight, bias, gain, down=down, up=up)
        shapes(down=(down, [rank, in_features]), up=(up, [out_features, rank]))


def live(scale: float | Tensor) -> float | Tensor:
    """The scale as an op takes it: under torch.compile a 0-dim tensor, else as it came."""
    if torch.compiler.is_compiling() and not isinstance(scale, Tensor):
        return torch.tensor(scale, dtype=torch.float64)
    return scale


def only_cpu(first: Tensor, *_) -> str | None:
    """Why a C++ kernel for CPUs does not run on these arguments; None when it does."""
    on = first.device.type
    return None if on == "cpu" else f"the tensors are on {on}; this kernel is for cpu"


def only_cuda(first: Tensor, *_) -> str | None:
    """Why a CUDA kernel does not run on these arguments; None when it does."""
    on = first.device.type
    return None if on == "cuda" else f"the tensors are on {on}; this kernel is for cuda"


def refuse_triton(x: Tensor, *ranks: int) -> str | None:
    """Why no Triton kernel runs on tensors like x with these ranks; None when one does."""
    if x.dtype == torch.float64:
        return "float64: the kernel sums in float32"
    if max(ranks, default=0) > TRITON_RANK:
        return f"rank {max(ranks)} is over {TRITON_RANK}"
    return refuse_triton_device(x)


def refuse_triton_device(x: Tensor) -> str | None:
    """Why no Triton kernel runs where x is; None when one does."""
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return "bfloat16: Triton's interpreter misreads it" if x.dtype == torch.bfloat16 else None
    if x.device.type != "cuda":
        return f"x is on {x.device.type}; triton runs on cuda"
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}: the kernel needs sm_80" if major < 8 else None

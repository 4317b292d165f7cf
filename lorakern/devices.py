"""Where and in which precision a model runs, by the words of a config."""

import ctypes
import os
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def device_of(name: str) -> torch.device:
    """The device that "auto" or a name stands for.

    Raises:
        ValueError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name}: {str(error).splitlines()[0]}") from None
    return device


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, have malloc keep what is freed, for the rest of the process.

    glibc maps a block of over 32 MiB anew each time, and the system clears it page by page as it is
    first touched; a convolution's copy of a weight of 1280 x 1280 x 3 x 3 has 56 MiB. A step of
    Stable Diffusion 1.5 takes 209,000 page faults so, and about 60 with what was freed kept, which
    takes no more memory. Nothing is done under another C library, or where the environment has a
    setting of malloc's. Source: mallopt(3).
    """
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if device.type != "cpu" or sys.platform != "linux" or chosen:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


def bf16(precision: str, device: torch.device) -> bool:
    """Whether the model runs in bfloat16; what trains is float32 in any case."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def autocast(device: torch.device, on: bool) -> AbstractContextManager:
    """bfloat16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if on else nullcontext()


def checkpoint_gradients(module: nn.Module) -> None:
    """Recompute a diffusers or transformers module's activations; those of transformers must be in
    training mode."""
    if hasattr(module, "enable_gradient_checkpointing"):
        module.enable_gradient_checkpointing()
    elif hasattr(module, "activation_checkpointing_enable"):
        # transformers 5
        module.activation_checkpointing_enable()
    elif hasattr(module, "gradient_checkpointing_enable"):
        # 4 is reentrant if not told, and then layers behind a frozen embedding get no gradient
        module.gradient_checkpointing_enable({"use_reentrant": False})

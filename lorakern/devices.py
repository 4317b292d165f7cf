"""Where and in which precision a model runs, by the words of a config."""

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

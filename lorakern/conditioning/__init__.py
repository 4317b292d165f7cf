"""Adapters that add an input to the model: image prompts. Imports diffusers on use only."""

from collections.abc import Callable


def accelerate(model) -> Callable[[], None]:
    """Run the IP-Adapters that diffusers loaded on lorakern's kernels, in place.

    Weights, scales and masks stay where and what they are: `set_ip_adapter_scale`,
    `load_ip_adapter` and `unload_ip_adapter` go on working. Loading another IP-Adapter makes new
    processors; call this again after it.

    Args:
        model: a diffusers pipeline with a UNet, or the UNet itself.

    Returns:
        A function without arguments that puts diffusers' own processors back.

    Raises:
        ValueError: the model has no IP-Adapter of diffusers.
    """
    from lorakern.conditioning import ip_adapter

    return ip_adapter.accelerate(model)

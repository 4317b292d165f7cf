"""What an optimizer and a training loop ask of the adapters of a model."""

import torch
from torch import Tensor, nn

from lorakern.adapters.base import Adapter


def parameter_groups(
    model: nn.Module, lr: float, *, loraplus_ratio: float | None = None
) -> list[dict]:
    """The trained parameters as groups of an optimizer.

    Args:
        model: any module with adapters; parameters of it that train without being a factor are
            in the first group.
        lr: learning rate.
        loraplus_ratio: LoRA+: the `up` factors (LoRA's up, LoHa's up1 and up2, LoKr's c_up and
            d_up) learn at lr times this; None for one group.

    Raises:
        ValueError: the ratio is not above 0, or no factor that trains is an up.

    Source: Hayou et al. 2024, arXiv:2402.12354.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if loraplus_ratio is None:
        return [{"params": trained, "lr": lr}]
    if not loraplus_ratio > 0:
        raise ValueError(f"loraplus_ratio must be above 0, got {loraplus_ratio!r}")
    ups = {
        id(getattr(adapter, name))
        for adapter in _adapters(model)
        for name in adapter.factors
        if "up" in name
    }
    fast = [p for p in trained if id(p) in ups]
    if not fast:
        raise ValueError("loraplus_ratio: no factor here is an up; a LoKr may have none")
    slow = [p for p in trained if id(p) not in ups]
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * loraplus_ratio}]


@torch.no_grad()
def limit_norms(model: nn.Module, largest: float) -> int:
    """Scale factors down where ‖ΔW‖ at a multiplier of 1 is over `largest`; returns how many.

    Each of the n factors of a product takes the n-th root, as kohya's scale_weight_norms and
    LyCORIS's LoKr do; a DoRA's magnitude stays, and its ΔW is that before the magnitude.

    Raises:
        ValueError: largest is not above 0.
    """
    if not largest > 0:
        raise ValueError(f"the largest norm must be above 0, got {largest!r}")
    count = 0
    for adapter in _adapters(model):
        norm = adapter.norm().item()
        if norm > largest:
            names = [n for n in adapter.factors if n not in ("magnitude", "scalar")]
            for name in names:
                getattr(adapter, name).mul_((largest / norm) ** (1 / len(names)))
            count += 1
    return count


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """module path + name -> all that a run must keep of the adapters: factors, frozen ones too."""
    return {
        f"{path}.{name}" if path else name: tensor.detach()
        for path, module in model.named_modules()
        if isinstance(module, Adapter)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if name != "frozen_weight"
    }


def _adapters(model: nn.Module) -> list[Adapter]:
    return [m for m in model.modules() if isinstance(m, Adapter)]

"""The same adapted layer built by each library, on one shared frozen weight and equal factors."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lorakern
from bench.record import missing


@dataclass(frozen=True)
class Layer:
    """A layer to call, and its trained factors (down, up); the frozen layer has none."""

    call: nn.Module
    factors: tuple[nn.Parameter, ...] = ()


def layers(plain: Callable[[], nn.Module], down: Tensor, up: Tensor, scale: float):
    """{name: Layer} of the frozen layer, lorakern and every library that is installed.

    Args:
        plain: a new nn.Linear or nn.Conv2d on the shared frozen weight.
        down: [R, I] or [R, I, kh, kw]; up: [O, R] or [O, R, 1, 1].
        scale: alpha / rank.
    """
    rank, half = down.shape[0], down.dtype in (torch.float16, torch.bfloat16)
    alpha = scale * rank
    gone = missing()
    made = {"frozen": Layer(plain()), "lorakern": _lorakern(plain(), rank, alpha)}
    if "peft" not in gone:
        made["peft"] = _peft(plain(), rank, alpha)
        if half:
            made["peft 16-bit"] = _peft(plain(), rank, alpha, autocast_adapter_dtype=False)
    if "lycoris-lora" not in gone:
        made["lycoris"] = lycoris(plain(), rank, alpha, bypass=False)
        made["lycoris bypass"] = lycoris(plain(), rank, alpha, bypass=True)
    if "loralib" not in gone and isinstance(made["frozen"].call, nn.Linear):
        made["loralib"] = loralib(plain(), rank, alpha)
    for layer in made.values():
        for factor, value in zip(layer.factors, (down, up), strict=False):
            factor.data.copy_(value)
    return made


def _lorakern(plain: nn.Module, rank: int, alpha: float) -> Layer:
    box = nn.Sequential(plain)
    lorakern.inject(box, "lora", rank=rank, alpha=alpha, targets=["0"])
    return Layer(box[0], (box[0].down, box[0].up))


def _peft(plain: nn.Module, rank: int, alpha: float, **options) -> Layer:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])
    layer = get_peft_model(nn.Sequential(plain), config, **options).base_model.model[0]
    return Layer(layer, (layer.lora_A["default"].weight, layer.lora_B["default"].weight))


def lycoris(plain: nn.Module, rank: int, alpha: float, *, bypass: bool) -> Layer:
    """LyCORIS puts its own forward into `plain`; without bypass it makes ΔW at every call."""
    with contextlib.redirect_stderr(io.StringIO()):
        from lycoris.modules.locon import LoConModule

    adapter = LoConModule("layer", plain, lora_dim=rank, alpha=alpha, bypass_mode=bypass)
    adapter.to(plain.weight.device).apply_to()
    return Layer(plain, (adapter.lora_down.weight, adapter.lora_up.weight))


def loralib(plain: nn.Linear, rank: int, alpha: float) -> Layer:
    """loralib's own linear layer on the weight and bias of `plain`."""
    from loralib import Linear

    layer = Linear(
        plain.in_features, plain.out_features, rank, alpha, bias=plain.bias is not None
    ).to(plain.weight)
    layer.weight, layer.bias = plain.weight, plain.bias
    return Layer(layer, (layer.lora_A, layer.lora_B))

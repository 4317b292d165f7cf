"""The same adapted layer built by each library, on one shared frozen weight and equal factors."""

import contextlib
import copy
import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import lorakern
from bench.record import missing


@dataclass(frozen=True)
class Layer:
    """A layer to call, and its trained factors in the op's order; the frozen layer has none.

    call: may return several outputs, where the op has a flat one.
    apart: results that the library defines otherwise, so that nothing here can judge them.
    """

    call: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    factors: tuple[nn.Parameter, ...] = ()
    apart: tuple[str, ...] = ()


@dataclass(frozen=True)
class Algorithm:
    """Of lorakern, PEFT and LyCORIS each: the algorithm's name, factors in the op's order, options.

    PEFT's name is a config of `peft`, LyCORIS's a module of `lycoris.modules`.
    """

    names: tuple[str, str, str]
    factors: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    options: tuple[dict, dict, dict] = ({}, {}, {})


LORA = Algorithm(
    ("lora", "LoraConfig", "locon.LoConModule"),
    (
        ("down", "up"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_down.weight", "lora_up.weight"),
    ),
)


def layers(
    plain: Callable[[], nn.Module],
    values: tuple[Tensor, ...],
    rank: int,
    scale: float,
    algorithm: Algorithm = LORA,
) -> dict[str, Layer]:
    """{name: Layer} of the frozen layer, lorakern and every library that is installed.

    Args:
        plain: a new nn.Linear or nn.Conv2d on the shared frozen weight.
        values: of the factors, in the op's order.
        scale: alpha / rank.
    """
    half, alpha = values[0].dtype in (torch.float16, torch.bfloat16), scale * rank
    gone, more = missing(), {"algorithm": algorithm}
    made = {"frozen": Layer(plain()), "lorakern": _lorakern(plain(), rank, alpha, **more)}
    if "peft" not in gone:
        made["peft"] = _peft(plain(), rank, alpha, **more)
        if half:
            made["peft 16-bit"] = _peft(plain(), rank, alpha, autocast_adapter_dtype=False, **more)
    if "lycoris-lora" not in gone:
        made["lycoris"] = lycoris(plain(), rank, alpha, bypass=False, **more)
        made["lycoris bypass"] = lycoris(plain(), rank, alpha, bypass=True, **more)
    if "loralib" not in gone and algorithm is LORA and isinstance(made["frozen"].call, nn.Linear):
        made["loralib"] = loralib(plain(), rank, alpha)
    for layer in made.values():
        for factor, value in zip(layer.factors, values, strict=bool(layer.factors)):
            factor.data.copy_(value.view(factor.shape))
    return made


def compiled(layers: dict[str, Layer]) -> dict[str, Layer]:
    """The leanest of PEFT's layers under torch.compile, on the same factors; {} without PEFT."""
    torch.compiler.reset()
    names = [name for name in layers if name.startswith("peft")]
    return {
        f"{name} compiled": replace(layers[name], call=torch.compile(layers[name].call))
        for name in names[-1:]
    }


def accelerated(model: nn.Module, but: list[str]) -> dict[str, nn.Module]:
    """Copies, by path, of the frozen layers that run on lorakern's kernels, `but` for these."""
    found = {path: m for path, m in model.named_modules() if path not in but}
    copies = {p: copy.copy(m) for p, m in found.items() if type(m) in (nn.Linear, nn.Conv2d)}
    lorakern.accelerate_frozen(nn.ModuleList(copies.values()))
    return {path: layer for path, layer in copies.items() if type(layer) is not type(found[path])}


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A new frozen layer on this very weight and bias."""
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


def _lorakern(plain: nn.Module, rank: int, alpha: float, *, algorithm: Algorithm = LORA) -> Layer:
    box, options = nn.Sequential(plain), algorithm.options[0]
    lorakern.inject(box, algorithm.names[0], rank=rank, alpha=alpha, targets=["0"], **options)
    return Layer(box[0], tuple(map(box[0].get_parameter, algorithm.factors[0])))


def _peft(
    plain: nn.Module, rank: int, alpha: float, *, algorithm: Algorithm = LORA, **options
) -> Layer:
    import peft

    name = algorithm.names[1]
    alphas = {"lora_alpha" if name == "LoraConfig" else "alpha": alpha}
    config = getattr(peft, name)(r=rank, target_modules=["0"], **alphas, **algorithm.options[1])
    layer = peft.get_peft_model(nn.Sequential(plain), config, **options).base_model.model[0]
    return Layer(layer, tuple(map(layer.get_parameter, algorithm.factors[1])))


def lycoris(
    plain: nn.Module, rank: int, alpha: float, *, bypass: bool, algorithm: Algorithm = LORA
) -> Layer:
    """LyCORIS puts its own forward into `plain`; without bypass it makes ΔW at every call."""
    module, _, name = algorithm.names[2].partition(".")
    with contextlib.redirect_stderr(io.StringIO()):
        make = getattr(importlib.import_module(f"lycoris.modules.{module}"), name)
        adapter = make(
            "layer", plain, lora_dim=rank, alpha=alpha, bypass_mode=bypass, **algorithm.options[2]
        )
    adapter.to(plain.weight.device).apply_to()
    return Layer(plain, tuple(map(adapter.get_parameter, algorithm.factors[2])))


def loralib(plain: nn.Linear, rank: int, alpha: float) -> Layer:
    """loralib's own linear layer on the weight and bias of `plain`."""
    from loralib import Linear

    layer = Linear(
        plain.in_features, plain.out_features, rank, alpha, bias=plain.bias is not None
    ).to(plain.weight)
    layer.weight, layer.bias = plain.weight, plain.bias
    return Layer(layer, (layer.lora_A, layer.lora_B))

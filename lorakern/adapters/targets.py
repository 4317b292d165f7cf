"""Which layers of a model get an adapter, and their rank and alpha by pattern."""

import re
import warnings
from collections.abc import Iterable, Iterator

from torch import nn

from lorakern.adapters import layers
from lorakern.adapters.base import Adapter

_ATTENTION = (
    "to_q", "to_k", "to_v", "to_out.0",
    "q_proj", "k_proj", "v_proj", "out_proj",
)  # fmt: skip
_MLP = ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "fc1", "fc2")
# names of diffusers UNets and transformers' CLIP text encoders
# what an image prompt brings into a UNet is not the UNet's: a preset leaves it out
_BROUGHT = r"(.*\.)?(encoder_hid_proj|processor)\..*"
PRESETS = {"attn": _ATTENTION, "attn-mlp": _ATTENTION + _MLP, "full": None}


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every layer and every outermost adapter; a shared one once.

    Raises:
        ValueError: model is not a module, as a pipeline is not.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"want an nn.Module, as pipe.unet, got a {type(model).__name__}")
    seen: set[int] = set()

    def walk(module: nn.Module, prefix: str):
        for name, child in module._modules.items():
            if child is None or id(child) in seen or layers.bypassed(module, name):
                continue
            seen.add(id(child))
            path = f"{prefix}{name}"
            if isinstance(child, Adapter) or layers.kind_of(child):
                yield path, child
            else:
                yield from walk(child, f"{path}.")

    yield from walk(model, "")


def select(model: nn.Module, targets: str | Iterable[str]) -> dict[str, nn.Module]:
    """The layers that `targets` names; see `inject`.

    Raises:
        ValueError: no layer matches, or a layer that does cannot be adapted.
    """
    found = dict(layers_of(model))
    if isinstance(targets, str) and targets in PRESETS:
        found = {p: layer for p, layer in found.items() if not _matches(_BROUGHT, p)}
    names = PRESETS.get(targets, ()) if isinstance(targets, str) else tuple(targets)
    if isinstance(targets, str) and targets not in PRESETS:
        chosen = [p for p in found if _matches(targets, p)]
    elif names is None:
        full = ("linear", "conv2d")
        chosen = [p for p, layer in found.items() if layers.kind_of(_root(layer)) in full]
    else:
        chosen = [p for p in found if any(p == n or p.endswith(f".{n}") for n in names)]
        if not isinstance(targets, str):
            idle = [n for n in names if not any(p == n or p.endswith(f".{n}") for p in chosen)]
            if idle and chosen:
                warnings.warn(f"no layer is called {', '.join(idle)}", stacklevel=3)
    if not chosen:
        shown = ", ".join(list(found)[:5]) or "none"
        raise ValueError(
            f"targets {targets!r} match none of the {len(found)} layers of"
            f" {type(model).__name__}; it has {shown}{', ...' if len(found) > 5 else ''}"
        )
    for path in chosen:
        if reason := layers.refusal(_root(found[path])):
            raise ValueError(f"{path} cannot be adapted: {reason}")
    return {path: found[path] for path in chosen}


def by_pattern(patterns: dict[str, float] | None, path: str, otherwise):
    """The value of the first pattern whose regex is the path or an end of it after a dot."""
    for pattern, value in (patterns or {}).items():
        if _matches(rf"(.*\.)?({pattern})", path):
            return value
    return otherwise


def _matches(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regex: {error}") from error


def _root(layer: nn.Module) -> nn.Module:
    return layer.root if isinstance(layer, Adapter) else layer

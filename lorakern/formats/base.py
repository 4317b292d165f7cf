"""The form that every file is read into and written from, and the table of formats."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

FORMATS: dict[str, "Format"] = {}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What a key says about its algorithm; this version reads plain LoRA, and refuses these by name.
FOREIGN = {
    "DoRA": r"(\.dora_scale|\.lora_magnitude_vector)",
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "LoRA with a Tucker core": r"\.lora_mid",
    "OFT": r"\.(oft_blocks|oft_diag|oft_R)",
    "BOFT": r"\.boft_",
    "GLoRA": r"\.(a1|a2|b1|b2|bm)\.weight$",
    "full weight difference": r"\.(diff|diff_b|set_weight)$",
    "trained norms": r"\.[wb]_norm$",
    "IA3": r"(\.on_input$|\.ia3_l)",
    "AdaLoRA": r"\.lora_E",
    "VeRA": r"(\.|^)vera_",
    "T-LoRA": r"\.(q_layer|p_layer|lambda_layer)",
    "control-LoRA": r"^lora_controlnet$",
}
# the factors that a layer needs, and no others
_WHOLE = ({"down", "up"}, {"embedding_down", "embedding_up"})


class UnmatchedKeys(ValueError):
    """Keys of a file that fit nothing; `keys` has all of them, the message the first 20."""

    def __init__(self, message: str, keys: Iterable[str]):
        self.keys = sorted(keys)
        super().__init__(f"{message}: {shorten(self.keys)}")


@dataclass(frozen=True)
class Layer:
    """The adapter of one layer.

    component: "unet", "text_encoder", "text_encoder_2", "" for a module that is none of them, or
        None while it is not known.
    path: dotted module path, text encoders always with `text_model.`; as the file spells it
        until it is resolved against a model.
    tensors: "down" and "up"; Linear [R, I] and [O, R], Conv2d [R, I/groups, kh, kw] and
        [O, R, 1, 1], Embedding [R, entries] and [dim, R].
    alpha: the update is up · down · alpha / R, or alpha / √R with rslora; no unit.
    keys: the names of the tensors in the file, for messages.
    """

    component: str | None
    path: str
    tensors: dict[str, Tensor]
    alpha: float
    rslora: bool = False
    embedding: bool = False
    algo: str = "lora"
    keys: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        return self.tensors["down"].shape[0]

    @property
    def plain_alpha(self) -> float:
        """The alpha with which alpha / R is this layer's scale, rslora or not."""
        return self.alpha * math.sqrt(self.rank) if self.rslora else self.alpha


@dataclass(frozen=True)
class Stored:
    """What lies on disk: one safetensors file, and for PEFT its adapter_config.json."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict | None = None
    component: str | None = None


@dataclass(frozen=True)
class Context:
    """What a writer may need besides the layers.

    sdxl: two text encoders and LDM names for the UNet (kohya).
    ldm: diffusers path -> LDM path of the UNet's modules, empty unless sdxl.
    paths: component -> every module path of the model, empty when there is no model.
    """

    metadata: Mapping[str, str] = field(default_factory=dict)
    sdxl: bool = False
    ldm: Mapping[str, str] = field(default_factory=dict)
    paths: Mapping[str, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """One foreign key scheme.

    matches: whether a stored file is of this scheme.
    read: the layers of a stored file; raises ValueError for what it cannot take whole.
    write: layers, target path and context -> the bytes of each file to write.
    """

    name: str
    matches: Callable[[Stored], bool]
    read: Callable[[Stored], list[Layer]]
    write: Callable[[list[Layer], Path, Context], dict[Path, bytes]]


def define(name: str, **functions: Callable) -> Format:
    """Enter a format; the first one entered that matches a file reads it."""
    if name in FORMATS:
        raise ValueError(f"format {name} is already defined")
    FORMATS[name] = Format(name, **functions)
    return FORMATS[name]


def foreign_algorithms(keys: Iterable[str]) -> dict[str, list[str]]:
    """Algorithms other than plain LoRA that the keys name, each with its keys."""
    found: dict[str, list[str]] = {}
    for key in keys:
        for algo, pattern in FOREIGN.items():
            if re.search(pattern, key):
                found.setdefault(algo, []).append(key)
    return found


def refuse_foreign(stored: Stored) -> None:
    """Raises ValueError naming the algorithm when a file holds more than plain LoRA."""
    found = foreign_algorithms(stored.tensors)
    if found:
        kinds = " and ".join(found)
        keys = [key for of_algo in found.values() for key in of_algo]
        raise ValueError(
            f"{stored.path} holds {kinds} ({len(keys)} keys: {shorten(keys, 3)});"
            " this version loads plain LoRA only, and nothing was loaded"
        )


def collect(
    stored: Stored,
    split: Callable[[str], tuple[str | None, str, str] | None],
    scale: Callable[[str | None, str, int], tuple[float, bool]],
) -> list[Layer]:
    """The layers of a file, each whole and sane, or a ValueError that names the keys.

    Args:
        split: key -> (component, layer, "down" | "up" | "embedding_down" | "embedding_up" |
            "alpha"), or None for a key that is not of the format.
        scale: (component, layer, rank) -> (alpha, rslora) of a layer without an alpha tensor.
    """
    found: dict[tuple[str | None, str], dict[str, str]] = {}
    unmatched = []
    for key in stored.tensors:
        parts = split(key)
        if parts is None:
            unmatched.append(key)
            continue
        component, name, factor = parts
        slot = found.setdefault((component, name), {})
        if factor in slot:
            raise ValueError(f"{stored.path} defines one tensor twice: {slot[factor]} and {key}")
        slot[factor] = key
    for slot in found.values():
        if slot.keys() - {"alpha"} not in _WHOLE:
            unmatched += slot.values()
    if unmatched:
        raise UnmatchedKeys(
            f"{stored.path}: {len(unmatched)} of {len(stored.tensors)} keys make no whole layer",
            unmatched,
        )
    return [_layer(stored, *where, slot, scale) for where, slot in found.items()]


def _layer(stored: Stored, component, name, slot, scale) -> Layer:
    embedding = "embedding_down" in slot
    prefix = "embedding_" if embedding else ""
    down, up = (stored.tensors[slot[prefix + factor]] for factor in ("down", "up"))
    for factor, tensor in (("down", down), ("up", up)):
        check_values(f"{stored.path}: {slot[prefix + factor]}", tensor)
    rank = down.shape[0]
    if rank == 0 or up.ndim < 2 or up.shape[1] != rank:
        raise ValueError(
            f"{stored.path}: {slot[prefix + 'down']} {list(down.shape)} and"
            f" {slot[prefix + 'up']} {list(up.shape)} share no rank of at least 1"
        )
    if "alpha" in slot:
        tensor = stored.tensors[slot["alpha"]]
        if tensor.numel() != 1 or not tensor.double().isfinite().all():
            raise ValueError(f"{stored.path}: {slot['alpha']} is not one finite number")
        alpha, rslora = tensor.double().item(), False
    else:
        alpha, rslora = scale(component, name, rank)
    if alpha == 0:
        raise ValueError(
            f"{stored.path}: alpha of {name} is 0, which some loaders take for 0 and some for rank"
        )
    return Layer(
        component,
        name,
        {"down": down, "up": up},
        alpha,
        rslora,
        embedding,
        keys=tuple(slot.values()),
    )


def check_values(what: str, tensor: Tensor) -> None:
    """Raises ValueError when a factor is not a matrix or kernel of finite floating numbers."""
    if tensor.dtype not in DTYPES or tensor.ndim < 2:
        raise ValueError(
            f"{what}: want at least 2 dims of float16, bfloat16, float32 or float64,"
            f" got {list(tensor.shape)} of {tensor.dtype}"
        )
    bad = (~tensor.isfinite()).sum().item()
    if bad:
        raise ValueError(f"{what}: {bad} of {tensor.numel()} values are not finite")


def shorten(names: Iterable[str], most: int = 20) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

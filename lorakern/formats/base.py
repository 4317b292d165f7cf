"""The form that every file is read into and written from, and the table of formats."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lorakern.formats import algorithms

FORMATS: dict[str, "Format"] = {}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# what a key says about its algorithm, of those that are not read but refused by name
FOREIGN = {
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
    tensors: the adapter's factors by name, as `algorithms` lists them: "down" and "up" of lora,
        Linear [R, I] and [O, R], Conv2d [R, I/groups, kh, kw] and [O, R, 1, 1], Embedding
        [R, entries] and [dim, R]. DoRA's "magnitude" is as it multiplies the weight: [O, 1, ...]
        or [1, I, 1, ...].
    rank: R; of two whole Kronecker factors just what alpha is divided by.
    alpha: the update is the factors' product times alpha / R, or alpha / √R with rslora; no unit.
    peft: PEFT's conventions, not LyCORIS's: DoRA's norm is a constant in backward, and alpha
        counts for two whole Kronecker factors too.
    weight: the shape of the layer's weight, None while it is not known.
    groups: of the convolution.
    keys: factor -> the tensor's name in the file, for messages.
    """

    component: str | None
    path: str
    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    rslora: bool = False
    embedding: bool = False
    algo: str = "lora"
    peft: bool = False
    weight: torch.Size | None = None
    groups: int = 1
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def dora(self) -> bool:
        return "magnitude" in self.tensors

    @property
    def on_output(self) -> bool:
        """Whether DoRA's magnitude is one number a row of the weight, not a column."""
        shape = self.tensors["magnitude"].shape
        rows = shape[0] if self.weight is None else self.weight[0]
        return shape[0] == math.prod(shape) == rows

    @property
    def window(self) -> int:
        """The size of the convolution's kernel, 1 for any other layer or where nothing tells."""
        if self.weight is not None:
            return math.prod(self.weight[2:])
        return max(math.prod(tensor.shape[2:]) for tensor in self.tensors.values())

    @property
    def kind(self) -> str:
        """The algorithm in words: "lora", "lokr with a Tucker core, DoRA"."""
        words = self.algo + (" with a Tucker core" if algorithms.is_tucker(self.tensors) else "")
        if self.dora:
            words += ", DoRA" if self.on_output else ", DoRA on input"
        return words

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
    """Algorithms that are not read and that the keys name, each with its keys."""
    found: dict[str, list[str]] = {}
    for key in keys:
        for algo, pattern in FOREIGN.items():
            if re.search(pattern, key):
                found.setdefault(algo, []).append(key)
    return found


def refuse_foreign(stored: Stored) -> None:
    """Raises ValueError naming the algorithm when a file holds one that is not read."""
    found = foreign_algorithms(stored.tensors)
    if found:
        kinds = " and ".join(found)
        keys = [key for of_algo in found.values() for key in of_algo]
        raise ValueError(
            f"{stored.path} holds {kinds} ({len(keys)} keys: {shorten(keys, 3)});"
            f" this version loads {', '.join(algorithms.WHOLE)} only, and nothing was loaded"
        )


def collect(
    stored: Stored,
    split: Callable[[str], tuple[str | None, str, str] | None],
    scale: Callable[[str | None, str, int | None], tuple[float, bool, int]],
    peft: bool,
) -> list[Layer]:
    """The layers of a file, each whole and sane, or a ValueError that names the keys.

    Args:
        split: key -> (component, layer, factor), or None for a key that is not of the format.
            Factors are those of `algorithms`, and "alpha", "embedding_down", "embedding_up",
            "magnitude" in the shape that multiplies the weight, "row_magnitude" in any.
        scale: (component, layer, rank) -> (alpha, rslora, rank) of a layer without an alpha
            tensor; rank is None where the factors have none.
        peft: as Layer's, of all of them.
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
        if algorithms.algo_of(_factors(slot)) is None:
            unmatched += slot.values()
    if unmatched:
        raise UnmatchedKeys(
            f"{stored.path}: {len(unmatched)} of {len(stored.tensors)} keys make no whole layer",
            unmatched,
        )
    return [_layer(stored, *where, slot, scale, peft) for where, slot in found.items()]


def _factors(slot: Mapping[str, str]) -> dict[str, str]:
    """The keys of a layer's own factors, an embedding's by the names of any layer's."""
    if slot.keys() & {"down", "up"} and slot.keys() & {"embedding_down", "embedding_up"}:
        return {}
    return {
        factor.removeprefix("embedding_"): key
        for factor, key in slot.items()
        if factor not in ("alpha", "magnitude", "row_magnitude")
    }


def _layer(stored: Stored, component, name, slot, scale, peft) -> Layer:
    called = _factors(slot)
    keys = dict(called)
    tensors = algorithms.flip({factor: stored.tensors[key] for factor, key in called.items()})
    for factor in ("magnitude", "row_magnitude"):
        if factor in slot:
            numbers = stored.tensors[slot[factor]]
            if factor == "row_magnitude" or numbers.ndim < 2:
                numbers = numbers.reshape(-1, *(1,) * max(numbers.ndim - 1, 1))
            tensors["magnitude"] = numbers
            keys["magnitude"] = slot[factor]
    for factor, tensor in tensors.items():
        check_values(f"{stored.path}: {keys[factor]}", tensor)
    algo = algorithms.algo_of(called)
    try:
        algorithms.check_cores(tensors, called)
        rank = algorithms.rank_of({factor: tensors[factor] for factor in called}, called)
    except ValueError as error:
        raise ValueError(f"{stored.path}: {error}") from error
    if "alpha" in slot:
        alpha, rslora = _alpha(stored, slot["alpha"]), False
        if rank is None:
            # what LyCORIS stores is the rank that it was asked for; the scale is 1 in any case
            alpha = rank = int(alpha) if alpha.is_integer() and alpha > 0 else 1
    else:
        alpha, rslora, rank = scale(component, name, rank)
    if alpha == 0:
        raise ValueError(
            f"{stored.path}: alpha of {name} is 0, which some loaders take for 0 and some for rank"
        )
    return Layer(
        component, name, tensors, rank, float(alpha), rslora,
        embedding="embedding_down" in slot, algo=algo, peft=peft, keys=keys | slot,
    )  # fmt: skip


def _alpha(stored: Stored, key: str) -> float:
    tensor = stored.tensors[key]
    if tensor.numel() != 1 or not tensor.double().isfinite().all():
        raise ValueError(f"{stored.path}: {key} is not one finite number")
    return tensor.double().item()


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

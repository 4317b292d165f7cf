"""Files without a model: which format, and what is in them."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lorakern.formats import storage
from lorakern.formats.base import (
    FORMATS,
    Format,
    Layer,
    Stored,
    UnmatchedKeys,
    foreign_algorithms,
    refuse_foreign,
)


@dataclass(frozen=True)
class Summary:
    """What an adapter file holds.

    format: "kohya", "diffusers", "peft", or None for keys of no known scheme.
    algo: "lora", "lokr with a Tucker core, DoRA" and the like, joined by " and "; or the
        algorithms that this version does not load.
    components: component -> number of adapted layers; empty when they cannot be loaded.
    ranks, alphas, dtypes: value -> number of layers (dtypes: of tensors).
    size: bytes of all tensors.
    metadata: the safetensors header's entries.
    """

    format: str | None
    algo: str
    components: dict[str, int]
    ranks: dict[int, int]
    alphas: dict[float, int]
    dtypes: dict[str, int]
    size: int
    metadata: dict[str, str]


def detect(path: str | Path) -> str:
    """The name of a file's format.

    Raises:
        FileNotFoundError: no such path.
        UnmatchedKeys: its keys are of no known format.
        ValueError: it is no whole safetensors file.
    """
    return _format_of(storage.read(path)[0]).name


def read_layers(files: list[Stored]) -> list[Layer]:
    """The layers of stored files of any known format, with paths as they spell them.

    Raises:
        UnmatchedKeys, ValueError: as `lorakern.load`.
    """
    layers = []
    for stored in files:
        refuse_foreign(stored)
        layers += _format_of(stored).read(stored)
    return layers


def inspect(path: str | Path) -> Summary:
    """What a file holds, also one whose algorithm cannot be loaded; see `Summary`.

    Raises:
        FileNotFoundError, ValueError: as `lorakern.load`.
    """
    stored = storage.read(path)
    tensors = [t for one in stored for t in one.tensors.values()]
    foreign = [algo for one in stored for algo in foreign_algorithms(one.tensors)]
    layers = [] if foreign else read_layers(stored)
    return Summary(
        format=next((f.name for f in FORMATS.values() if f.matches(stored[0])), None),
        algo=" and ".join(dict.fromkeys(foreign or sorted(la.kind for la in layers))),
        components=dict(Counter(la.component or "module" for la in layers)),
        ranks=dict(sorted(Counter(la.rank for la in layers).items())),
        alphas=dict(sorted(Counter(la.plain_alpha for la in layers).items())),
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors)),
        size=sum(t.numel() * t.element_size() for t in tensors),
        metadata={k: v for one in stored for k, v in one.metadata.items()},
    )


def _format_of(stored: Stored) -> Format:
    for known in FORMATS.values():
        if known.matches(stored):
            return known
    refuse_foreign(stored)
    raise UnmatchedKeys(
        f"{stored.path} is of none of the formats {', '.join(sorted(FORMATS))}; its keys",
        stored.tensors,
    )

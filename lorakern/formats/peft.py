"""PEFT: `base_model.model.<path>.lora_A.weight` in adapter_model.safetensors; adapter_config.json.

A folder holds one module. Several components make a folder each, named after them. Paths are the
module's own, because PEFT looks them up as they are.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from lorakern.formats import config as peft_config
from lorakern.formats import storage
from lorakern.formats.base import Context, Layer, Stored, collect, define
from lorakern.formats.names import COMPONENTS, canonical, own_path

ROOT = "base_model.model."
# the adapter's own name stands before .weight in a state dict taken from a live model
_LINEAR = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.[^.]+)?")


def split_peft(key: str) -> tuple[str, str] | None:
    """(path, factor) of a PEFT key, or None."""
    sides = {"A": "down", "B": "up"}
    if hit := _LINEAR.fullmatch(key):
        return hit[1], sides[hit[2]]
    if hit := _EMBEDDING.fullmatch(key):
        return hit[1], "embedding_" + sides[hit[2]]
    return None


def matches(stored: Stored) -> bool:
    return stored.config is not None or any(key.startswith(ROOT) for key in stored.tensors)


def read(stored: Stored) -> list[Layer]:
    if stored.config is None:
        raise ValueError(
            f"{stored.path}: PEFT keeps alpha in {storage.PEFT_CONFIG}, and there is none beside it"
        )
    where = str(stored.path.parent / storage.PEFT_CONFIG)
    peft_config.check(stored.config, where)

    def split(key: str):
        parts = split_peft(key)
        if parts is None:
            return None
        path, factor = parts
        return stored.component, canonical(stored.component, path.removeprefix(ROOT)), factor

    def scale(component, path, rank):
        return peft_config.scale_of(stored.config, path, rank, where)

    return collect(stored, split, scale)


def write(layers: list[Layer], path: Path, context: Context) -> dict[Path, bytes]:
    if path.suffix == ".safetensors" or path.is_file():
        raise ValueError(f"want a folder for peft, got {path}")
    by_component: dict[str, list[Layer]] = {}
    for layer in layers:
        by_component.setdefault(layer.component or "", []).append(layer)
    files: dict[Path, bytes] = {}
    # one component that the caller gave alone lies in the folder itself, as PEFT expects it
    alone = len(context.paths or by_component) == 1
    if not alone:
        _refuse_older(path, by_component)
    for component, group in by_component.items():
        folder = path if alone else path / component
        files |= _write_one(group, folder, component, context)
    return files


def _refuse_older(path: Path, components: Iterable[str]) -> None:
    """An adapter left here from before would be loaded in place of the new ones, or with them."""
    older = [path] + [path / name for name in COMPONENTS if name not in components]
    for folder in older:
        if (folder / storage.PEFT_CONFIG).exists():
            raise ValueError(
                f"{folder} holds an older adapter that would be mixed up with this one"
            )


def _write_one(
    layers: list[Layer], folder: Path, component: str, context: Context
) -> dict[Path, bytes]:
    all_paths = context.paths.get(component, frozenset())
    if component.startswith("text_encoder") and not all_paths:
        raise ValueError(
            "PEFT names a text encoder's layers as the installed transformers does: pass model="
        )
    own = [own_path(layer.path, all_paths) for layer in layers]
    tensors = {}
    for layer, path in zip(layers, own, strict=True):
        ending = "lora_embedding_{}" if layer.embedding else "lora_{}.weight"
        tensors[f"{ROOT}{path}.{ending.format('A')}"] = layer.tensors["down"]
        tensors[f"{ROOT}{path}.{ending.format('B')}"] = layer.tensors["up"]
    made = peft_config.make(layers, own, all_paths, either=False)
    return {
        folder / storage.PEFT_WEIGHTS: storage.to_bytes(
            tensors, {"format": "pt"} | dict(context.metadata)
        ),
        folder / storage.PEFT_CONFIG: (json.dumps(made, indent=2) + "\n").encode(),
    }


define("peft", matches=matches, read=read, write=write)

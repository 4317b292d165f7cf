"""PEFT: `base_model.model.<path>.lora_A.weight` in adapter_model.safetensors; adapter_config.json.

A folder holds one module. Several components make a folder each, named after them. Paths are the
module's own, because PEFT looks them up as they are.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from lorakern.formats import algorithms, grouped, storage
from lorakern.formats import config as peft_config
from lorakern.formats.base import Context, Layer, Stored, collect, define
from lorakern.formats.names import COMPONENTS, canonical, own_path

ROOT = "base_model.model."
# the adapter's own name stands before .weight in a state dict taken from a live model
_LINEAR = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.[^.]+)?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?")
_LYCORIS = re.compile(r"(.+)\.((?:hada|lokr)_[^.]+)(?:\.[^.]+)?")
_NAMES = algorithms.HADAMARD | algorithms.KRONECKER
ENDINGS = {factor: name for name, factor in _NAMES.items()}
_EMBEDDING_ENDINGS = {"down": "lora_embedding_A", "up": "lora_embedding_B"}
ENDINGS |= {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def split_peft(key: str) -> tuple[str, str] | None:
    """(path, factor) of a PEFT key, or None."""
    sides = {"A": "down", "B": "up"}
    if hit := _LINEAR.fullmatch(key):
        return hit[1], sides[hit[2]]
    if hit := _EMBEDDING.fullmatch(key):
        return hit[1], "embedding_" + sides[hit[2]]
    if hit := _MAGNITUDE.fullmatch(key):
        return hit[1], "row_magnitude"
    if (hit := _LYCORIS.fullmatch(key)) and hit[2] in _NAMES:
        return hit[1], _NAMES[hit[2]]
    return None


def as_peft_magnitude(magnitude: Tensor) -> Tensor:
    """From [O, 1] to [O], from [O, 1, 1, 1] to [1, O, 1, 1]."""
    return magnitude.reshape(-1) if magnitude.ndim == 2 else magnitude.transpose(0, 1)


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

    stored, ranks = _ungrouped(stored, split)

    def scale(component, path, rank):
        theirs = ranks.get(path, rank)
        alpha, rslora, rank_here = peft_config.scale_of(stored.config, path, theirs, where)
        if path in ranks:
            # the same scale at the rank that is left
            share, rank_here = rank / theirs, rank
            alpha *= math.sqrt(share) if rslora else share
        return alpha, rslora, rank_here

    layers = collect(stored, split, scale, peft=True)
    peft_config.check_layers(stored.config, layers, where)
    return layers


def _ungrouped(stored: Stored, split) -> tuple[Stored, dict[str, int]]:
    """The file with LoRA of grouped convolutions in this package's layout; their ranks in it."""
    pairs: dict[str, dict[str, str]] = {}
    for key in stored.tensors:
        _, path, factor = split(key) or (None, "", "")
        if factor in ("down", "up"):
            pairs.setdefault(path, {})[factor] = key
    tensors, ranks = dict(stored.tensors), {}
    for path, keys in pairs.items():
        found = [tensors[keys[f]] for f in ("down", "up") if f in keys]
        if [t.ndim for t in found] != [4, 4]:
            continue
        rank, each = found[0].shape[0], found[1].shape[1]
        if each in (0, rank) or rank % each:
            continue
        try:
            tensors[keys["down"]], tensors[keys["up"]] = grouped.from_peft(*found)
        except ValueError as error:
            raise ValueError(f"{stored.path}: {keys['down']}: {error}") from error
        ranks[path] = rank
    return dataclasses.replace(stored, tensors=tensors), ranks


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
    layers = [_grouped(layer) for layer in peft_config.adapted(layers)]
    tensors = {}
    for layer, path in zip(layers, own, strict=True):
        endings = _EMBEDDING_ENDINGS if layer.embedding else ENDINGS
        for factor, tensor in algorithms.flip(layer.tensors).items():
            if factor == "magnitude":
                tensor = as_peft_magnitude(tensor)
            tensors[f"{ROOT}{path}.{endings[factor]}"] = tensor
    made = peft_config.make(layers, own, all_paths, either=False)
    return {
        folder / storage.PEFT_WEIGHTS: storage.to_bytes(
            tensors, {"format": "pt"} | dict(context.metadata)
        ),
        folder / storage.PEFT_CONFIG: (json.dumps(made, indent=2) + "\n").encode(),
    }


def _grouped(layer: Layer) -> Layer:
    if layer.algo != "lora" or layer.groups == 1:
        return layer
    down, up = grouped.to_peft(layer.tensors["down"], layer.tensors["up"], layer.groups)
    alpha = layer.alpha * (math.sqrt(layer.groups) if layer.rslora else layer.groups)
    return dataclasses.replace(
        layer, tensors={"down": down, "up": up}, rank=down.shape[0], alpha=alpha
    )


define("peft", matches=matches, read=read, write=write)

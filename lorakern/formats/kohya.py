"""kohya sd-scripts and LyCORIS: `lora_unet_<path with underscores>.lora_down.weight`; `ss_*`.

SD 1 and 2 use diffusers paths, SDXL LDM paths for the UNet and lora_te1_, lora_te2_; LyCORIS
without a trainer calls every model `lycoris_`. A layer without alpha has alpha = rank.

Plain LoRA is written with one alpha a component, the commonest; where a layer's differs, `up` is
multiplied by their ratio instead, because diffusers' reader of this format loses alphas that
differ. LoKr of two whole factors has no scale in any reader of this format, so it is in C.
"""

import collections
import dataclasses
import json
from pathlib import Path

import torch

from lorakern.formats import algorithms, storage
from lorakern.formats.base import Context, Layer, Stored, check_values, collect, define
from lorakern.formats.names import canonical, flat, to_ldm

PREFIXES = {
    "lora_unet_": "unet",
    "lycoris_": None,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
FACTORS = {
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "core",
    **algorithms.HADAMARD, **algorithms.KRONECKER, "dora_scale": "magnitude", "alpha": "alpha",
}  # fmt: skip
ENDINGS = {factor: ending for ending, factor in FACTORS.items()}
# the base model, told by how wide the text embedding is that a UNet's cross-attention takes
BASES = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}


def matches(stored: Stored) -> bool:
    return any(key.startswith(tuple(PREFIXES)) for key in stored.tensors)


def read(stored: Stored) -> list[Layer]:
    def split(key: str):
        name, _, factor = key.partition(".")
        for prefix, component in PREFIXES.items():
            if name.startswith(prefix) and factor in FACTORS:
                path = canonical(component, name.removeprefix(prefix))
                return component, path, FACTORS[factor]
        return None

    def scale(component, path, rank):
        return float(rank or 1), False, rank or 1

    return collect(stored, split, scale, peft=False)


def write(layers: list[Layer], path: Path, context: Context) -> dict[Path, bytes]:
    if path.suffix != ".safetensors":
        raise ValueError(f"want a path that ends in .safetensors for kohya, got {path}")
    if all(layer.kind == "lora" for layer in layers):
        layers = _one_alpha(layers)
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        path_there = to_ldm(layer.path, context.ldm) if layer.component == "unet" else layer.path
        name = _prefix(layer, context.sdxl) + flat(path_there)
        if f"{name}.alpha" in tensors:
            raise ValueError(f"two layers would both be called {name}; save as peft or diffusers")
        if {"c", "d"} <= layer.tensors.keys():
            layer = _with_alpha(layer, layer.rank)
        for factor, tensor in algorithms.flip(layer.tensors).items():
            tensors[f"{name}.{ENDINGS[factor]}"] = tensor
        tensors[f"{name}.alpha"] = torch.tensor(float(layer.plain_alpha))
    metadata = _model_spec(layers, path) | dict(context.metadata) | _facts(layers)
    metadata |= storage.kohya_hashes(tensors, metadata)
    return {path: storage.to_bytes(tensors, metadata)}


def _one_alpha(layers: list[Layer]) -> list[Layer]:
    alphas: dict[str | None, list[float]] = {}
    for layer in layers:
        alphas.setdefault(layer.component, []).append(layer.plain_alpha)
    common = {c: collections.Counter(values).most_common(1)[0][0] for c, values in alphas.items()}
    return [_with_alpha(layer, common[layer.component]) for layer in layers]


def _with_alpha(layer: Layer, alpha: float) -> Layer:
    """The same update, with this alpha and the rest of the scale in a factor."""
    if layer.plain_alpha == alpha:
        return layer
    tensors = algorithms.rescaled(layer.tensors, layer.plain_alpha / alpha)
    for factor, tensor in tensors.items():
        check_values(f"{layer.path}.{factor} at alpha {alpha:g}", tensor)
    return dataclasses.replace(layer, tensors=tensors, alpha=alpha, rslora=False)


def _prefix(layer: Layer, sdxl: bool) -> str:
    if layer.embedding:
        raise ValueError(f"{layer.path} is an embedding layer, which kohya has not; save as peft")
    known = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    if sdxl:
        known |= {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    if layer.component not in known:
        of = layer.component or "none"
        raise ValueError(
            f"kohya files hold {', '.join(known)}, and {layer.path} is of {of}:"
            " pass a dict such as {'unet': module}, or save as peft"
        )
    return known[layer.component]


def _facts(layers: list[Layer]) -> dict[str, str]:
    """The ss_ metadata that the layers themselves prove; kohya's names and spellings."""
    wide = [la for la in layers if la.window > 1]
    narrow = [la for la in layers if la.window == 1]
    plain = all(layer.kind == "lora" for layer in layers)
    facts = {"ss_network_module": "networks.lora" if plain else "lycoris.kohya"}
    rank, alpha = _common(narrow or wide)
    facts |= {"ss_network_dim": rank, "ss_network_alpha": alpha}
    arguments = {} if plain else _lycoris_arguments(layers)
    if wide and narrow:
        conv_rank, conv_alpha = _common(wide)
        arguments |= {"conv_dim": conv_rank, "conv_alpha": conv_alpha}
    if arguments:
        facts["ss_network_args"] = json.dumps(arguments)
    base = base_of(layers)
    if base:
        facts |= {"ss_base_model_version": base, "ss_v2": str(base == "sd_v2")}
    return facts


def _lycoris_arguments(layers: list[Layer]) -> dict[str, str]:
    """What `lycoris.kohya` was asked for, or would have been; the commonest algorithm."""
    algo = collections.Counter(layer.algo for layer in layers).most_common(1)[0][0]
    arguments = {"algo": algo}
    if any(algorithms.is_tucker(layer.tensors) for layer in layers):
        arguments["use_tucker"] = "True"
    dora = [layer for layer in layers if layer.dora]
    if dora:
        arguments |= {"dora_wd": "True", "wd_on_output": str(all(la.on_output for la in dora))}
    return arguments


def _common(layers: list[Layer]) -> tuple[str, str]:
    ranks = {layer.rank for layer in layers}
    # as precise as the float32 in the file
    alphas = {float(f"{layer.plain_alpha:.7g}") for layer in layers}
    return (
        str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    )


def base_of(layers: list[Layer]) -> str | None:
    """The family of the base model by its cross-attention's width; None when it is not one."""
    widths = {
        algorithms.columns(layer.tensors)
        for layer in layers
        if layer.component == "unet" and layer.path.endswith(("attn2.to_k", "attn2.to_v"))
    }
    return BASES.get(widths.pop()) if len(widths) == 1 else None


def _model_spec(layers: list[Layer], path: Path) -> dict[str, str]:
    names = {
        "sd_v1": ("stable-diffusion-v1/lora", "diffusers"),
        "sdxl_base_v1-0": (
            "stable-diffusion-xl-v1-base/lora",
            "https://github.com/Stability-AI/generative-models",
        ),
    }
    known = names.get(base_of(layers) or "")
    if known is None:
        return {}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": known[0],
        "modelspec.implementation": known[1],
        "modelspec.title": path.stem,
    }


define("kohya", matches=matches, read=read, write=write)

"""What a module is called: the components of a model, and the spellings of a module path.

A file may call one layer `down_blocks.1.attentions.0.proj_in`, the same with underscores, or by
its LDM name `input_blocks_4_1_proj_in`. Underscored names cannot be split back for sure, so they
are looked up among all spellings of a model's paths; without a model, by the words of the SD
family's module names.
"""

import re
from collections.abc import Collection, Mapping

from torch import nn

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

# (resnets, attentions, has a sampler) of each block
Blocks = list[tuple[int, int, bool]]
SDXL_DOWN: Blocks = [(2, 0, True), (2, 2, True), (2, 2, False)]
SDXL_UP: Blocks = [(3, 3, True), (3, 3, True), (3, 0, False)]
SDXL_MID = (2, 1, False)

_IN_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_CLIP_ROOTS = re.compile(r"(encoder[._]layers|embeddings|final_layer_norm)[._]")


def components(model) -> dict[str, nn.Module]:
    """The modules of a model by component name.

    Args:
        model: a dict of components, a diffusers pipeline, or a module. A bare UNet is "unet", a
            bare CLIP text encoder "text_encoder", and any other bare module "".

    Raises:
        ValueError: nothing in it is a module.
    """
    if isinstance(model, nn.Module):
        module = getattr(model, "_orig_mod", model)
        return {_component_of(module): module}
    if isinstance(model, Mapping):
        found = dict(model)
        for name, module in found.items():
            if not isinstance(module, nn.Module):
                raise ValueError(f"component {name!r} is {type(module).__name__}, want nn.Module")
    else:
        found = {name: getattr(model, name, None) for name in COMPONENTS}
        found = {name: m for name, m in found.items() if isinstance(m, nn.Module)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no component: want a module, a pipeline with"
            f" {', '.join(COMPONENTS)}, or a dict of modules"
        )
    return {name: getattr(module, "_orig_mod", module) for name, module in found.items()}


def _component_of(module: nn.Module) -> str:
    if all(hasattr(module, part) for part in ("down_blocks", "mid_block", "up_blocks", "conv_in")):
        return "unet"
    return "text_encoder" if type(module).__name__.startswith("CLIPText") else ""


def canonical(component: str | None, path: str) -> str:
    """Text encoders' paths begin with text_model, which some transformers versions leave out."""
    if component and component.startswith("text_encoder") and _CLIP_ROOTS.match(path):
        return ("text_model." if "." in path else "text_model_") + path
    return path


def own_path(path: str, paths: Collection[str]) -> str:
    """The canonical path as the module itself calls it."""
    return path if path in paths else path.removeprefix("text_model.")


def spellings(component: str, module: nn.Module, paths: Collection[str]) -> dict[str, set[str]]:
    """Every spelling of every path, dotted, underscored and LDM -> the paths it may mean."""
    ldm = ldm_paths(*blocks_of(module)) if component == "unet" else {}
    found: dict[str, set[str]] = {}
    for path in paths:
        known_as = {path, canonical(component, path), to_ldm(path, ldm)}
        for name in known_as | {flat(name) for name in known_as}:
            found.setdefault(name, set()).add(path)
    return found


def flat(path: str) -> str:
    return path.replace(".", "_")


def blocks_of(unet: nn.Module) -> tuple[Blocks, tuple[int, int, bool], Blocks]:
    """The counts of a UNet's blocks: down, mid, up."""

    def count(block, sampler: str) -> tuple[int, int, bool]:
        resnets, attentions = (getattr(block, k, None) or () for k in ("resnets", "attentions"))
        return len(resnets), len(attentions), bool(getattr(block, sampler, None))

    return (
        [count(block, "downsamplers") for block in getattr(unet, "down_blocks", ())],
        count(getattr(unet, "mid_block", None), "none"),
        [count(block, "upsamplers") for block in getattr(unet, "up_blocks", ())],
    )


def ldm_paths(down: Blocks, mid: tuple[int, int, bool], up: Blocks) -> dict[str, str]:
    """Diffusers path -> LDM path of the modules that the two call differently, from block counts.

    LDM numbers the UNet's blocks through: input_blocks.0 is conv_in, then one number a resnet
    (.0, with its attention .1) and one a downsampler; output_blocks likewise, where an upsampler
    is the last part of its block's last resnet.
    """
    table = dict(_OUTSIDE_BLOCKS)

    def resnet(path: str, ldm: str) -> None:
        table.update({f"{path}.{a}": f"{ldm}.{b}" for a, b in _IN_RESNET.items()})

    number = 1
    for i, (resnets, attentions, sampler) in enumerate(down):
        for j in range(resnets):
            resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0")
            if j < attentions:
                table[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if sampler:
            table[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    part = 0
    for j in range(mid[0]):
        resnet(f"mid_block.resnets.{j}", f"middle_block.{part}")
        part += 1
        if j < mid[1]:
            table[f"mid_block.attentions.{j}"] = f"middle_block.{part}"
            part += 1
    number = 0
    for i, (resnets, attentions, sampler) in enumerate(up):
        for j in range(resnets):
            resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0")
            if j < attentions:
                table[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        if sampler:
            last = f"output_blocks.{number - 1}.{2 if attentions else 1}.conv"
            table[f"up_blocks.{i}.upsamplers.0.conv"] = last
    return table


def to_ldm(path: str, table: Mapping[str, str]) -> str:
    """A path with its longest prefix in the table replaced; also the way back, table inverted."""
    end = len(path)
    while end > 0:
        if path[:end] in table:
            return table[path[:end]] + path[end:]
        end = path.rfind(".", 0, end)
    return path


# the words of the module names of the SD family's UNets and CLIP, LDM included; of two that begin
# alike the longer first
_WORD = re.compile(
    r"""(?:
    down_blocks | mid_block | up_blocks | attentions | resnets | downsamplers | upsamplers |
    transformer_blocks | attn1 | attn2 | to_q | to_k | to_v | to_out | ff | net | proj_in |
    proj_out | proj | time_emb_proj | time_embedding | add_embedding | linear_1 | linear_2 |
    conv_shortcut | conv_in | conv_out | conv1 | conv2 | conv |
    input_blocks | middle_block | output_blocks | in_layers | out_layers | emb_layers |
    skip_connection | time_embed | label_emb | op |
    text_model | text_projection | embeddings | token_embedding | position_embedding | encoder |
    layers | self_attn | q_proj | k_proj | v_proj | out_proj | mlp | fc1 | fc2 | out | \d+
    )_""",
    re.VERBOSE,
)


def unflatten(name: str, ldm: Mapping[str, str]) -> str | None:
    """The diffusers path of an underscored name of the SD family; None for an unknown word."""
    parts, at, name = [], 0, name + "_"
    while at < len(name):
        word = _WORD.match(name, at)
        if word is None:
            return None
        parts.append(word.group()[:-1])
        at = word.end()
    return to_ldm(".".join(parts), {b: a for a, b in ldm.items()})


def guess_component(path: str) -> str | None:
    """The component that a dotted path of the SD family belongs to, or None."""
    first = path.partition(".")[0]
    if first in ("down_blocks", "mid_block", "up_blocks") or path in _OUTSIDE_BLOCKS:
        return "unet"
    if first in ("text_model", "text_projection") or _CLIP_ROOTS.match(path):
        return "text_encoder"
    return None

"""One format into another, with the model at hand or by the names of Stable Diffusion."""

import dataclasses
from pathlib import Path

from lorakern.formats import names, storage
from lorakern.formats.base import FORMATS, Context, Layer, Stored, UnmatchedKeys
from lorakern.formats.diffusers import HEADER
from lorakern.formats.files import read_layers
from lorakern.formats.kohya import base_of
from lorakern.formats.model import context_of, place


def convert(src: str | Path, dst: str | Path, format: str, model=None) -> Path:
    """Rewrite a file in another format; factors, scales and metadata are kept.

    Args:
        src: any file that `lorakern.load` reads.
        dst: as `lorakern.save` takes it for that format.
        format: "kohya", "diffusers" or "peft".
        model: the model it is for, as `save` takes it. Without one, names are taken as those of
            Stable Diffusion 1, 2 or XL, and PEFT folders of text encoders cannot be written.

    Returns:
        dst as a Path.

    Raises:
        FileNotFoundError, UnmatchedKeys, ValueError: as `lorakern.load` and `lorakern.save`.
    """
    if format not in FORMATS:
        raise ValueError(f"no format {format!r}; there are {', '.join(sorted(FORMATS))}")
    stored = storage.read(src)
    layers, metadata = read_layers(stored), _carried(stored)
    if model is None:
        layers, context = _as_stable_diffusion(layers, metadata, src, format)
    else:
        modules = names.components(model)
        layers = [
            dataclasses.replace(la, component=c, path=names.canonical(c, at))
            for (c, at), la in place(layers, modules, src).items()
        ]
        context = context_of(modules, metadata)
    storage.write(FORMATS[format].write(layers, Path(dst), context))
    return Path(dst)


def _carried(files: list[Stored]) -> dict[str, str]:
    """Header entries that stay true in another format."""
    return {
        key: value
        for stored in files
        for key, value in stored.metadata.items()
        if key not in ("format", HEADER) and not key.startswith("sshs_")
    }


def _as_stable_diffusion(
    layers: list[Layer], metadata: dict[str, str], src: str | Path, format: str
) -> tuple[list[Layer], Context]:
    sdxl_ldm = names.ldm_paths(names.SDXL_DOWN, names.SDXL_MID, names.SDXL_UP)
    named, unknown = [], []
    for layer in layers:
        path = layer.path if "." in layer.path else names.unflatten(layer.path, sdxl_ldm)
        component = layer.component or (path and names.guess_component(path))
        if component and path:
            path = names.canonical(component, path)
        if path is None or component is None:
            unknown += layer.keys.values()
        else:
            named.append(dataclasses.replace(layer, component=component, path=path))
    if unknown:
        raise UnmatchedKeys(f"{src}: no names of Stable Diffusion; pass model=", unknown)
    base = base_of(named)
    two = any(la.component == "text_encoder_2" for la in named)
    if (
        format == "kohya"
        and base is None
        and not two
        and any(la.component == "unet" for la in named)
    ):
        raise ValueError(
            f"{src}: cannot tell SDXL, whose kohya names differ, from SD 1 and 2; pass model="
        )
    sdxl = two or base == "sdxl_base_v1-0"
    return named, Context(metadata, sdxl, sdxl_ldm if sdxl else {})

"""Files of IP-Adapters in their authors' layout: read, checked against themselves, written."""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorakern.conditioning import ip_layouts
from lorakern.formats import storage
from lorakern.formats.base import UnmatchedKeys, check_values, shorten

_SECTIONS = ("image_proj", "ip_adapter")
_KV = re.compile(r"(\d+)\.to_([kv])_ip\.weight")
_LORA = re.compile(r"(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight")


@dataclass(frozen=True)
class Checkpoint:
    """An IP-Adapter's tensors under its authors' names.

    source: where from, for messages.
    layout: a key of ip_layouts.LAYOUTS.
    projection: the tensors of `image_proj`.
    layers: number of an attention processor -> its K' and V', [inner, width] each.
    loras: number -> {"q" | "k" | "v" | "out": (down [R, I], up [O, R])}; empty but for FaceID.
    shortcut: of faceid-plus: its version 2, which adds the face embedding to what it resamples.
    """

    source: str
    layout: str
    projection: dict[str, Tensor]
    layers: dict[int, tuple[Tensor, Tensor]]
    loras: dict[int, dict[str, tuple[Tensor, Tensor]]]
    shortcut: bool = False

    @property
    def variant(self) -> str:
        """base, plus, full-face, faceid, faceid-portrait, faceid-plus, faceid-plusv2, instantid.

        Plus-face is a plus: nothing in a file tells them apart.
        """
        if self.layout == "faceid" and self.projection["proj.2.weight"].shape[0] == 16 * self.width:
            return "faceid-portrait"
        if self.layout == "plus" and self.projection["proj_in.weight"].shape[1] == 512:
            return "instantid"
        return "faceid-plusv2" if self.shortcut else self.layout

    @property
    def width(self) -> int:
        """Channels of an image token, the text's too."""
        return next(iter(self.layers.values()))[0].shape[1]


def read(source: str | Path | Mapping, shortcut: bool | None = None) -> Checkpoint:
    """An IP-Adapter in its authors' layout.

    Args:
        source: a .safetensors file, a file of torch.save (tensors alone are read from it), or a
            state dict: {"image_proj": {...}, "ip_adapter": {...}}, or flat with these before the
            first dot.
        shortcut: whether a FaceID-Plus is version 2, whose tensors are those of version 1; None
            asks the file's name for "plusv2", or its metadata.

    Raises:
        FileNotFoundError: no such file.
        UnmatchedKeys: keys that no IP-Adapter has.
        ValueError: a broken file, a key that is missing, a shape that does not fit the rest, a
            value that is not finite.
    """
    what, named = "the state dict", False
    if not isinstance(source, Mapping):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        what, named = str(path), "plusv2" in re.sub("[-_ ]", "", path.name.lower())
        if path.suffix == ".safetensors":
            source, metadata = storage.read_tensors(path)
            named = metadata.get("variant") == "faceid-plusv2" or named
        else:
            source = storage.read_pickle(path)
    projection, attention = _sections(what, source)
    layout = _detect(what, projection)
    if shortcut and layout != "faceid-plus":
        raise ValueError(f"{what} is {layout}; shortcut is of faceid-plus alone")
    layers, loras = _attention(what, attention)
    found = Checkpoint(
        what, layout, projection, layers, loras,
        layout == "faceid-plus" and (named if shortcut is None else shortcut),
    )  # fmt: skip
    _check(found)
    return found


def is_ip_adapter(path: str | Path) -> bool:
    """Whether a file looks like an IP-Adapter; what is broken or no file does not."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return path.suffix == ".bin" and path.is_file()
    try:
        with safe_open(path, "pt") as file:
            return any(key.startswith("image_proj.") for key in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def _sections(what: str, source) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if not isinstance(source, Mapping):
        raise ValueError(f"{what} holds a {type(source).__name__}, not tensors by key")
    found: dict[str, dict[str, Tensor]] = {section: {} for section in _SECTIONS}
    rest = []
    for key, value in source.items():
        section, _, name = key.partition(".")
        if section not in found:
            rest.append(key)
        elif name:
            found[section][name] = value
        elif isinstance(value, Mapping):
            found[section] |= value
    for section, tensors in found.items():
        if not tensors:
            raise UnmatchedKeys(f"{what} has no {section}, so is no IP-Adapter; its keys", source)
        for key, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{what}: {section}.{key} is a {type(tensor).__name__}")
            # a bias is a vector, for which the check asks for a matrix
            check_values(f"{what}: {section}.{key}", tensor if tensor.ndim > 1 else tensor[None])
    if rest:
        raise UnmatchedKeys(f"{what} has keys that no IP-Adapter has", rest)
    return found["image_proj"], found["ip_adapter"]


def _detect(what: str, projection: Mapping[str, Tensor]) -> str:
    for name, layout in ip_layouts.LAYOUTS.items():
        if layout.marker in projection:
            return name
    raise UnmatchedKeys(f"{what}: image_proj is of no known variant; its keys", projection)


def _attention(what: str, tensors: Mapping[str, Tensor]):
    """K' and V' by layer, and LoRA factors by layer and by what they are of."""
    layers: dict[int, dict[str, Tensor]] = {}
    loras: dict[int, dict[str, dict[str, Tensor]]] = {}
    rest = []
    for key, tensor in tensors.items():
        if match := _KV.fullmatch(key):
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
        elif match := _LORA.fullmatch(key):
            loras.setdefault(int(match[1]), {}).setdefault(match[2], {})[match[3]] = tensor
        else:
            rest.append(f"ip_adapter.{key}")
    if rest:
        raise UnmatchedKeys(f"{what} has keys that no IP-Adapter has", rest)
    if not layers:
        raise ValueError(f"{what} has LoRAs, but no to_k_ip and to_v_ip")
    for k, pair in layers.items():
        if len(pair) != 2:
            raise ValueError(f"{what}: layer {k} has to_{next(iter(pair))}_ip without the other")
    for k, by_layer in loras.items():
        for of, pair in by_layer.items():
            if len(pair) != 2 or pair["down"].shape[0] != pair["up"].shape[-1]:
                shapes = {n: list(t.shape) for n, t in pair.items()}
                raise ValueError(f"{what}: {k}.to_{of}_lora wants down [R, I], up [O, R]: {shapes}")
    return (
        {k: (layers[k]["k"], layers[k]["v"]) for k in sorted(layers)},
        {k: {of: (p["down"], p["up"]) for of, p in loras[k].items()} for k in sorted(loras)},
    )


def _check(found: Checkpoint) -> None:
    """Raises ValueError when the projection is not whole, or not of the layers' width."""
    module = _empty(found)
    want = ip_layouts.to_authors(found.layout, module.state_dict())
    have = found.projection
    if missing := want.keys() - have.keys():
        names = shorten(f"image_proj.{k}" for k in sorted(missing))
        raise ValueError(f"{found.source} is {found.layout}, but without {names}")
    if unknown := have.keys() - want.keys():
        what = f"{found.source} is {found.layout}, which has no such keys"
        raise UnmatchedKeys(what, (f"image_proj.{k}" for k in unknown))
    for key, tensor in want.items():
        if have[key].shape != tensor.shape:
            raise ValueError(
                f"{found.source}: image_proj.{key} is {list(have[key].shape)}, where a"
                f" {found.layout} of its other shapes has {list(tensor.shape)}"
            )
    out = (module.norm_out if hasattr(module, "norm_out") else module.norm).normalized_shape[0]
    for k, pair in found.layers.items():
        for which, tensor in zip("kv", pair, strict=True):
            if tensor.shape[1] != out:
                raise ValueError(
                    f"{found.source}: the projection makes tokens of {out} channels, {k}."
                    f"to_{which}_ip takes {tensor.shape[1]}"
                )


def _empty(found: Checkpoint) -> nn.Module:
    shapes = {key: t.shape for key, t in found.projection.items()}
    return ip_layouts.empty(found.layout, found.source, shapes)


def projection(found: Checkpoint, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """diffusers' module with the checkpoint's weights: frozen, in eval mode, copies."""
    module = _empty(found)
    tensors = ip_layouts.to_diffusers(found.layout, found.projection)
    tensors = {k: t.to(device, dtype, copy=True) for k, t in tensors.items()}
    module.load_state_dict(tensors, assign=True)
    if found.shortcut:
        module.shortcut = True
    return module.requires_grad_(False).eval()


def write(found: Checkpoint, path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write an IP-Adapter in its authors' layout, whole or not at all.

    Args:
        path: .safetensors, with flat keys; .bin, as torch.save writes the two sections.
        metadata: of a .safetensors, beside "variant".

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    attention = {}
    for k, pair in found.layers.items():
        for which, tensor in zip("kv", pair, strict=True):
            attention[f"{k}.to_{which}_ip.weight"] = tensor
    for k, by_layer in found.loras.items():
        for of, (down, up) in by_layer.items():
            attention[f"{k}.to_{of}_lora.down.weight"] = down
            attention[f"{k}.to_{of}_lora.up.weight"] = up
    sections = dict(zip(_SECTIONS, (found.projection, attention), strict=True))
    if path.suffix == ".safetensors":
        flat = {f"{s}.{k}": t for s, tensors in sections.items() for k, t in tensors.items()}
        data = storage.to_bytes(flat, {**(metadata or {}), "variant": found.variant})
    elif path.suffix == ".bin":
        buffer = io.BytesIO()
        torch.save({s: {k: t.detach().cpu().clone() for k, t in tensors.items()}
                    for s, tensors in sections.items()}, buffer)  # fmt: skip
        data = buffer.getvalue()
    else:
        raise ValueError(f"{path}: an IP-Adapter is a .safetensors or a .bin file")
    storage.write({path: data})
    return path

"""Projections of IP-Adapters: told apart by keys and shapes, and renamed to diffusers and back.

IP-Adapter, Ye et al. 2023, arXiv:2308.06721, and InstantID's image adapter, arXiv:2401.07519.
What runs is diffusers' modules, which name and split some layers otherwise than the authors.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

# a head of every Resampler
_HEAD = 64
# the authors' names and diffusers'; # is the number of a layer
_RESAMPLER = {
    "proj_in": "proj_in",
    "proj_out": "proj_out",
    "norm_out": "norm_out",
    "layers.#.0.norm1": "layers.#.ln0",
    "layers.#.0.norm2": "layers.#.ln1",
    "layers.#.0.to_q": "layers.#.attn.to_q",
    "layers.#.0.to_out": "layers.#.attn.to_out.0",
    "layers.#.1.0": "layers.#.ff.0",
    "layers.#.1.1": "layers.#.ff.1.net.0.proj",
    "layers.#.1.3": "layers.#.ff.1.net.2",
}


@dataclass(frozen=True)
class Layout:
    """A projection as its authors' files hold it.

    marker: the key that only this one has, among those after it in LAYOUTS.
    module: its class in diffusers.models.embeddings.
    sizes: shapes by key -> that class's arguments.
    names: the authors' name of a layer -> diffusers'.
    resampler: what the authors' names of the Resampler's layers begin with; None without one.
    """

    marker: str
    module: str
    sizes: Callable[["_Reader"], dict[str, int | Fraction]]
    names: Mapping[str, str]
    resampler: str | None = None


class _Reader:
    """Shapes of tensors by key; a missing one is an error that says so."""

    def __init__(self, what: str, shapes: Mapping[str, torch.Size]):
        self.what, self.shapes = what, shapes

    def __call__(self, key: str) -> tuple[int, ...]:
        want = 3 if key == "latents" else 1 if "norm" in key else 2
        shape = self.shapes.get(key)
        if shape is None or len(shape) != want:
            got = "is not there" if shape is None else f"is {list(shape)}"
            raise ValueError(f"{self.what}: image_proj.{key} {got}; want {want} dims")
        return tuple(shape)

    def parts(self, key: str, width: int) -> int:
        """How many times width the rows of a matrix are."""
        rows = self(key)[0]
        if not width or rows % width:
            raise ValueError(f"{self.what}: image_proj.{key} has {rows} rows, not n times {width}")
        return rows // width

    def depth(self, prefix: str) -> int:
        """How many layers the Resampler has."""
        begin = f"{prefix}layers."
        return len({k[len(begin) :].split(".")[0] for k in self.shapes if k.startswith(begin)})


def _base_sizes(shape: _Reader) -> dict:
    width = shape("norm.weight")[0]
    return {
        "image_embed_dim": shape("proj.weight")[1],
        "cross_attention_dim": width,
        "num_image_text_embeds": shape.parts("proj.weight", width),
    }


def _full_sizes(shape: _Reader) -> dict:
    return {
        "image_embed_dim": shape("proj.0.weight")[1],
        "cross_attention_dim": shape("proj.2.weight")[0],
    }


def _faceid_sizes(shape: _Reader) -> dict:
    hidden, features = shape("proj.0.weight")
    width = shape("norm.weight")[0]
    return {
        "image_embed_dim": features,
        "cross_attention_dim": width,
        "mult": Fraction(hidden, features),
        "num_tokens": shape.parts("proj.2.weight", width),
    }


def _resampler_sizes(shape: _Reader, prefix: str, width: int) -> dict:
    return {
        "output_dims": shape(f"{prefix}proj_out.weight")[0],
        "depth": shape.depth(prefix),
        "heads": shape.parts(f"{prefix}layers.0.0.to_q.weight", _HEAD),
        "ffn_ratio": Fraction(shape(f"{prefix}layers.0.1.1.weight")[0], width),
    }


def _plus_sizes(shape: _Reader) -> dict:
    _, tokens, width = shape("latents")
    return {
        "embed_dims": shape("proj_in.weight")[1],
        "hidden_dims": width,
        "num_queries": tokens,
        **_resampler_sizes(shape, "", width),
    }


def _faceid_plus_sizes(shape: _Reader) -> dict:
    width, features = shape("perceiver_resampler.proj_in.weight")
    hidden, identity = shape("proj.0.weight")
    return {
        "embed_dims": width,
        "hidden_dims": features,
        "id_embeddings_dim": identity,
        "num_tokens": shape.parts("proj.2.weight", shape("norm.weight")[0]),
        "ffproj_ratio": Fraction(hidden, identity),
        **_resampler_sizes(shape, "perceiver_resampler.", width),
    }


_NORM = {"norm": "norm"}
LAYOUTS = {
    "base": Layout(
        "proj.weight", "ImageProjection", _base_sizes, {"proj": "image_embeds", **_NORM}
    ),
    "full-face": Layout(
        "proj.3.weight", "IPAdapterFullImageProjection", _full_sizes,
        {"proj.0": "ff.net.0.proj", "proj.2": "ff.net.2", "proj.3": "norm"},
    ),
    "faceid-plus": Layout(
        "perceiver_resampler.proj_in.weight", "IPAdapterFaceIDPlusImageProjection",
        _faceid_plus_sizes,
        {"proj.0": "proj.net.0.proj", "proj.2": "proj.net.2", **_NORM}
        | {f"perceiver_resampler.{a}": b for a, b in _RESAMPLER.items()},
        "perceiver_resampler.",
    ),
    "faceid": Layout(
        "norm.weight", "IPAdapterFaceIDImageProjection", _faceid_sizes,
        {"proj.0": "ff.net.0.proj", "proj.2": "ff.net.2", **_NORM},
    ),
    "plus": Layout("latents", "IPAdapterPlusImageProjection", _plus_sizes, _RESAMPLER, ""),
}  # fmt: skip


def empty(layout: str, what: str, shapes: Mapping[str, torch.Size]) -> nn.Module:
    """diffusers' module for tensors of these shapes by the authors' key, on the meta device.

    Raises:
        ValueError: a size cannot be read off them; the message begins with `what`.
    """
    from diffusers.models import embeddings

    known = LAYOUTS[layout]
    sizes = known.sizes(_Reader(what, shapes))
    with torch.device("meta"):
        return getattr(embeddings, known.module)(**sizes)


def to_diffusers(layout: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A projection's tensors under diffusers' names, from the authors'."""
    names, prefix = LAYOUTS[layout].names, LAYOUTS[layout].resampler
    found = {}
    for key, tensor in tensors.items():
        if key == "latents":
            found[key] = tensor
            continue
        stem, number, leaf = _split(key)
        if stem == f"{prefix}layers.#.0.to_kv":
            for name, half in zip(("to_k", "to_v"), tensor.chunk(2), strict=True):
                found[f"layers.{number}.attn.{name}.{leaf}"] = half
        else:
            found[f"{names[stem].replace('#', number)}.{leaf}"] = tensor
    return found


def to_authors(layout: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A projection's tensors under the authors' names, from diffusers'."""
    names, prefix = {b: a for a, b in LAYOUTS[layout].names.items()}, LAYOUTS[layout].resampler
    found = {}
    for key, tensor in tensors.items():
        stem, number, leaf = _split(key)
        if key == "latents":
            found[key] = tensor
        elif stem == "layers.#.attn.to_k":
            pair = [tensor, tensors[f"layers.{number}.attn.to_v.{leaf}"]]
            found[f"{prefix}layers.{number}.0.to_kv.{leaf}"] = torch.cat(pair)
        elif stem != "layers.#.attn.to_v":
            found[f"{names[stem].replace('#', number)}.{leaf}"] = tensor
    return found


def _split(key: str) -> tuple[str, str, str]:
    """Name of a layer with # for its number, the number, and weight or bias."""
    stem, _, leaf = key.rpartition(".")
    number = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
    if number is None:
        return stem, "", leaf
    return stem[: number.start(1)] + "#" + stem[number.end(1) :], number[1], leaf

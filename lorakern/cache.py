"""Latents and text embeddings, encoded once and kept on disk by the content they came from.

A key is a hash of the image's bytes or the caption's tokens, the encoder's weights, and the size:
an image that changes gets a new entry, one that does not is never encoded twice. Each entry is
one safetensors file, written whole or not at all, in a folder that is never the user's data.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorakern import data, models
from lorakern.data import Bad, Example
from lorakern.formats import storage


@dataclass(frozen=True)
class Latent:
    """One encoded image.

    path, content: of the image, and the SHA-256 of its file.
    entry: its cache file with "mean" and "std" [C, H, W] float32.
    bucket: (width, height) in pixels.
    time_ids: original height and width, crop top and left, bucket height and width; pixels.
    tokens: [encoders, T] int64, of its caption.
    """

    path: Path
    content: str
    entry: Path
    bucket: tuple[int, int]
    time_ids: tuple[int, ...]
    tokens: Tensor = field(compare=False)


def encode_images(
    base: models.Base, examples: Sequence[Example], sizes: list[tuple[int, int]], folder: Path,
    progress: Iterable[Example] | None = None,
) -> tuple[list[Latent], list[Bad]]:  # fmt: skip
    """Encode what is not cached yet.

    Args:
        base: with its VAE.
        sizes: the buckets, (width, height) in pixels.
        folder: of the cache.
        progress: `examples` again, as a progress bar.

    Returns:
        The usable images in order, and the ones that are left out.
    """
    encoder = models.fingerprint(base.vae)
    latents, bad = [], []
    for example in examples if progress is None else progress:
        try:
            latents.append(_encode_image(base, example, sizes, folder, encoder))
        except data.BadImage as reason:
            bad.append(Bad(example.path, str(reason)))
    return latents, bad


def encode_texts(base: models.Base, tokens: Iterable[Tensor], folder: Path) -> "Texts":
    """Encode the captions that are not cached yet, by their tokens [encoders, T]."""
    encoder = models.fingerprint(*base.text_encoders.values())
    entries = {}
    for ids in tokens:
        whole = tuple(ids.flatten().tolist())
        if whole in entries:
            continue
        key = hashlib.sha256(f"text 1 {encoder} {whole}".encode()).hexdigest()
        path = entries[whole] = folder / f"{key}.safetensors"
        if read(path) is None:
            with torch.no_grad():
                context, pooled = base.encode_text(ids[None])
            found = {"context": context[0].float()}
            if pooled is not None:
                found["pooled"] = pooled[0].float()
            storage.write({path: storage.to_bytes(found, {})})
    return Texts(entries)


class Texts:
    """Cached text conditions by tokens."""

    def __init__(self, entries: dict[tuple[int, ...], Path]):
        self._entries = entries

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `Base.encode_text`, [B, encoders, T] -> ([B, T, C], [B, P] or None), float32."""
        found = [entry(self._entries[tuple(row.flatten().tolist())]) for row in tokens]
        context = torch.stack([f["context"] for f in found])
        pooled = torch.stack([f["pooled"] for f in found]) if "pooled" in found[0] else None
        return context, pooled


def read(path: Path) -> dict[str, Tensor] | None:
    """An entry's tensors; None when it is not there or not whole, and must be made anew."""
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None


@lru_cache(maxsize=1024)
def entry(path: Path) -> dict[str, Tensor]:
    """An entry's tensors, the last 1024 kept in memory.

    Raises:
        ValueError: the file was taken away or broken while training ran.
    """
    found = read(path)
    if found is None:
        raise ValueError(f"cache entry {path} is gone or broken; start again to encode it anew")
    return found


def _encode_image(base, example: Example, sizes, folder: Path, encoder: str) -> Latent:
    try:
        raw = example.path.read_bytes()
    except OSError as error:
        raise data.BadImage(f"cannot be read: {error.strerror}") from None
    content = hashlib.sha256(raw).hexdigest()
    index = folder / f"{_key('image', content, encoder, sizes)}.safetensors"
    found = read(index)
    if found is None:
        image = data.read_image(raw)
        bucket = data.nearest_bucket(image.size, sizes)
        pixels, corner = data.fit(image, bucket)
        with torch.no_grad():
            mean, std = base.encode_image(pixels[None])
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise data.BadImage("its latent is not finite")
        ids = (image.height, image.width, *corner, bucket[1], bucket[0])
        found = {
            "mean": mean[0].float(), "std": std[0].float(), "time_ids": torch.tensor(ids),
        }  # fmt: skip
        storage.write({index: storage.to_bytes(found, {})})
    time_ids = tuple(found["time_ids"].tolist())
    bucket = (time_ids[5], time_ids[4])
    tokens = base.tokens(example.caption)
    return Latent(example.path, content, index, bucket, time_ids, tokens)


def _key(*parts) -> str:
    return hashlib.sha256(repr((*parts, 1)).encode()).hexdigest()

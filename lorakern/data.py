"""A folder of images and captions as examples, and their order as a pure function of the seed.

Nothing in the folder is changed. What cannot be used is named with its reason, and left out.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lorakern.diffusion import seed_of

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
METADATA = "metadata.jsonl"


class BadImage(Exception):
    """An image that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Example:
    """An image file and its caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Bad:
    """A file that is left out, and why."""

    path: Path
    reason: str


def find(folder: Path, caption: str | None = None) -> tuple[list[Example], list[Bad]]:
    """The examples of a folder, by name, and the files it names but lacks.

    With metadata.jsonl, lines of {"file_name": ..., "text": ...}; else every image below the
    folder with the .txt of the same stem. Hidden files and folders are passed over.

    Args:
        folder: where to look.
        caption: of images without one, or with an empty one; None makes that an error.

    Raises:
        ValueError: no such folder, no images in it, a line of metadata.jsonl that is not of that
            form, or images without a caption; names the first of them.
    """
    if not folder.is_dir():
        raise ValueError(f"data: no folder {folder}")
    metadata = folder / METADATA
    pairs = _from_metadata(metadata) if metadata.is_file() else _from_captions(folder)
    if not pairs:
        kinds = " ".join(sorted(SUFFIXES))
        raise ValueError(f"data: no images in {folder}; looked for {kinds} and {METADATA}")
    silent = [path for path, text in pairs if not text]
    if silent and caption is None:
        some = ", ".join(str(p.relative_to(folder)) for p in silent[:5])
        raise ValueError(
            f"data: {len(silent)} of {len(pairs)} images in {folder} have no caption or an empty"
            f" one: {some}{', ...' if len(silent) > 5 else ''}; write NAME.txt beside each,"
            ' or set caption = "..." for all of them'
        )
    missing = [Bad(path, "no such file") for path, _ in pairs if not path.is_file()]
    found = [Example(path, text or caption or "") for path, text in pairs if path.is_file()]
    return found, missing


def read_image(data: bytes) -> Image.Image:
    """The picture upright in 8-bit RGB: EXIF turned, transparency on white, 16 bits scaled.

    Raises:
        BadImage: not an image, cut short, or of more than 179 million pixels.
    """
    if not data:
        raise BadImage("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return _rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise BadImage("not an image that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise BadImage(str(error)) from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:
        # Pillow's decoders tell of broken data with any of these
        raise BadImage(f"broken or cut short: {error}") from None


def bucket_sizes(resolution: int, step: int, *, square: bool) -> list[tuple[int, int]]:
    """Sizes (width, height) in pixels, multiples of `step`, of at most resolution² and of aspect
    1:2 to 2:1; for each width the largest height that fits.

    Raises:
        ValueError: resolution is no multiple of step.
    """
    if resolution % step:
        near = max(step, round(resolution / step) * step)
        raise ValueError(
            f"resolution {resolution}: this model wants a multiple of {step}, {near} for example"
        )
    if square:
        return [(resolution, resolution)]
    sizes = []
    for width in range(step, 2 * resolution + 1, step):
        height = resolution**2 // width // step * step
        if height and max(width, height) <= 2 * min(width, height):
            sizes.append((width, height))
    return sizes


def nearest_bucket(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose aspect ratio is the nearest, as a ratio; the larger one of two equals."""
    aspect = np.log(size[0] / size[1])
    return min(sizes, key=lambda s: (abs(np.log(s[0] / s[1]) - aspect), -s[0] * s[1], s))


def fit(image: Image.Image, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Scale an RGB image to cover `size` (width, height), and crop its middle.

    Returns:
        pixels: [3, height, width] float32 in [-1, 1].
        corner: (top, left) of the crop in the scaled image, pixels.
    """
    width, height = size
    scale = max(width / image.width, height / image.height)
    covered = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (covered[0] - width) // 2, (covered[1] - height) // 2
    scaled = image.resize(covered, Image.Resampling.LANCZOS)
    cropped = np.asarray(scaled.crop((left, top, left + width, top + height)))
    return torch.from_numpy(cropped.copy()).permute(2, 0, 1).float() / 127.5 - 1, (top, left)


def crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The part of an RGB image that `fit` scales to `size` (width, height), at its own scale."""
    width, height = size
    scale = min(image.width / width, image.height / height)
    w, h = min(image.width, round(width * scale)), min(image.height, round(height * scale))
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


class Order:
    """Which examples are in which batch: a pure function of (seed, batch index).

    Every batch is full and of one bucket. An epoch has each example once, and fills the last
    batch of a bucket from a further shuffle of it, so that five images make batches of four.
    """

    def __init__(self, buckets: Sequence[tuple[int, int]], batch_size: int, seed: int):
        """buckets: the bucket of each example, by its number."""
        self.batch_size, self.seed = batch_size, seed
        self.members: dict[tuple[int, int], list[int]] = {}
        for example, bucket in enumerate(buckets):
            self.members.setdefault(bucket, []).append(example)
        self.batches_per_epoch = sum(-(-len(m) // batch_size) for m in self.members.values())
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def batch(self, index: int) -> list[int]:
        """The numbers of the examples in a batch, counted from the start of training."""
        epoch, place = divmod(index, self.batches_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffle(epoch)
        return self._epoch[1][place]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        rng = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
        batches = []
        for _, members in sorted(self.members.items()):
            wanted = -(-len(members) // self.batch_size) * self.batch_size
            rounds = -(-wanted // len(members))
            order = [
                members[i]
                for _ in range(rounds)
                for i in torch.randperm(len(members), generator=rng).tolist()
            ]
            batches += [order[i : i + self.batch_size] for i in range(0, wanted, self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=rng).tolist()]


def _from_captions(folder: Path) -> list[tuple[Path, str]]:
    pairs = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and path.is_file() and not hidden:
            beside = path.with_suffix(".txt")
            pairs.append((path, _clean(_read_text(beside)) if beside.is_file() else ""))
    return pairs


def _from_metadata(metadata: Path) -> list[tuple[Path, str]]:
    pairs = []
    for number, line in enumerate(_read_text(metadata).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{metadata} line {number} is not JSON: {error}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise ValueError(
                f'{metadata} line {number}: want {{"file_name": "...", "text": "..."}}, got {line}'
            )
        if not isinstance(entry.get("text", ""), str):
            raise ValueError(f"{metadata} line {number}: text is not a string: {entry['text']!r}")
        pairs.append((metadata.parent / entry["file_name"], _clean(entry.get("text", ""))))
    return pairs


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def _clean(text: str) -> str:
    return " ".join(text.split())


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # 16 bits are scaled to 8; Pillow's own convert() clips them
        values = np.asarray(image).astype(np.float64)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise BadImage(f"pixels of mode {image.mode} go from {values.min()} to {values.max()}")
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")

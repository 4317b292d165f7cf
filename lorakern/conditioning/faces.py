"""Faces as InstantID takes them: an embedding of 512 numbers and five points, checked and drawn.

InstantID, Wang et al. 2024, arXiv:2401.07519. Who makes them from a picture is the user's choice.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lorakern.formats import storage

WIDTH, POINTS = 512, 5
# eyes, nose, corners of the mouth; each of the others is joined to the nose
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
NOSE, RADIUS, HALF_WIDTH = 2, 10, 4
SUFFIXES = (".safetensors", ".json")


@dataclass(frozen=True)
class Face:
    """One face.

    embedding: [512] float32, not normalised.
    keypoints: [5, 2] float64, x and y in pixels: left eye, right eye, nose, left and right corner
        of the mouth, as one sees them.
    """

    embedding: Tensor
    keypoints: Tensor


def embedding(faces, what: str = "the face") -> Tensor:
    """The mean of face embeddings, [512] float32.

    Args:
        faces: [512], or [N, 512] of N pictures of one person; a tensor, an array or lists. As
            the encoder gives them, not normalised: InstantID was trained so (antelopev2's
            `embedding`, not its `normed_embedding`).
        what: begins the message of an error.

    Raises:
        ValueError: another width, no face at all, or a value that is not finite.
    """
    x = _tensor(faces, what)
    if x.ndim not in (1, 2) or x.shape[-1] != WIDTH:
        raise ValueError(f"{what}: want an embedding [{WIDTH}] or [N, {WIDTH}], got {_shape(x)}")
    if not len(x):
        raise ValueError(f"{what}: no face, the embeddings are {_shape(x)}")
    _check_finite(x, f"{what}: embedding")
    return x.to(torch.float32).reshape(-1, WIDTH).mean(0)


def keypoints(points, what: str = "the face") -> Tensor:
    """Five points [5, 2] float64, x and y in pixels.

    Raises:
        ValueError: another shape, or a value that is not finite.
    """
    x = _tensor(points, what)
    if x.shape != (POINTS, 2):
        raise ValueError(f"{what}: want keypoints [{POINTS}, 2], x and y each, got {_shape(x)}")
    _check_finite(x, f"{what}: keypoints")
    return x.to(torch.float64)


def fit(points: Tensor, source: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Points [..., 2] of a picture as they lie after `data.fit`: scaled to cover, middle cropped.

    Args:
        source, size: (width, height) in pixels, of the picture and of what it is fitted to.
    """
    scale = max(size[0] / source[0], size[1] / source[1])
    covered = [max(want, round(have * scale)) for have, want in zip(source, size, strict=True)]
    ratio = [c / have for c, have in zip(covered, source, strict=True)]
    corner = [(c - want) // 2 for c, want in zip(covered, size, strict=True)]
    return points * points.new_tensor(ratio) - points.new_tensor(corner)


def draw(points, size: tuple[int, int]):
    """See lorakern.conditioning.draw_keypoints."""
    from PIL import Image, ImageDraw

    points = keypoints(points)
    width, height = size
    if not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
        raise ValueError(f"want a size (width, height) in pixels, got {size}")
    image = Image.new("RGB", (width, height))
    pen = ImageDraw.Draw(image)
    for start in range(POINTS):
        if start != NOSE:
            dim = tuple(c * 3 // 5 for c in COLOURS[start])
            pen.polygon(_limb(points[start], points[NOSE]), fill=dim)
    for (x, y), colour in zip(points.trunc().int().tolist(), COLOURS, strict=True):
        for dy in range(-RADIUS, RADIUS + 1):
            half = math.isqrt(RADIUS**2 - dy**2)
            pen.line([(x - half, y + dy), (x + half, y + dy)], fill=colour)
    return image


def _limb(start: Tensor, end: Tensor) -> list[tuple[int, int]]:
    """An ellipse from one point to the other, a corner a degree; fractions are cut off."""
    dx, dy = (start - end).tolist()
    middle = ((start + end) / 2).trunc()
    axes = torch.tensor([[math.trunc(math.hypot(dx, dy) / 2)], [HALF_WIDTH]], dtype=torch.float64)
    turn = math.radians(math.trunc(math.degrees(math.atan2(dy, dx))))
    turned = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    at = torch.arange(360, dtype=torch.float64).deg2rad()
    corners = torch.tensor(turned, dtype=torch.float64) @ (axes * torch.stack([at.cos(), at.sin()]))
    return [tuple(corner) for corner in (middle + corners.mT).round().int().tolist()]


def beside(image: Path) -> Path | None:
    """The file of an image's face: same stem, .safetensors or .json; None when there is none."""
    found = [path for suffix in SUFFIXES if (path := image.with_suffix(suffix)).is_file()]
    return found[0] if found else None


def read(path: Path) -> Face:
    """The face in a .safetensors or .json file: `embedding` [512] and `keypoints` [5, 2].

    Raises:
        ValueError: a broken file, one of the two is not there, or is not of that form.
    """
    if path.suffix == ".safetensors":
        found = storage.read_tensors(path)[0]
    else:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict) or not {"embedding", "keypoints"} <= found.keys():
        have = ", ".join(sorted(found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(
            f"{path}: want embedding [{WIDTH}] and keypoints [{POINTS}, 2], got {have}"
        )
    return Face(embedding(found["embedding"], str(path)), keypoints(found["keypoints"], str(path)))


def _tensor(values, what: str) -> Tensor:
    if values is None:
        raise ValueError(f"{what}: there is none")
    if isinstance(values, Tensor):
        x = values.detach().cpu()
    else:
        try:
            x = torch.from_numpy(np.array(values, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{what}: want numbers, got a {type(values).__name__}: {error}"
            ) from None
    if x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"{what}: want real numbers, got {x.dtype}")
    return x


def _shape(x: Tensor) -> Sequence[int]:
    return [*x.shape]


def _check_finite(x: Tensor, what: str) -> None:
    if bad := int((~x.isfinite()).sum()):
        raise ValueError(f"{what}: {bad} of {x.numel()} values are not finite")

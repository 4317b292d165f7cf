"""Pictures that make captions compose: recoloured objects, coloured grounds, and their captions.

Every training image has a row (name, style, colour, ground); `colour` and `ground` are None for the
artwork as it is, on white. Pairs of `concepts.colour_held_out` are left out of the training rows.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .artwork import load
from .concepts import GROUND_COLOURS, OBJECT_COLOURS, STYLES, article, colour_held_out, concepts


@dataclass(frozen=True)
class Row:
    """One image: what it shows and in which style."""

    name: str
    style: str
    colour: str | None = None
    ground: str | None = None
    natural: str | None = None

    @property
    def kind(self) -> str:
        if self.colour:
            return "both" if self.ground else "colour"
        return "ground" if self.ground else "plain"


def to_hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, saturation and value in [0, 1] of RGB [..., 3] in [0, 1]."""
    high, low = rgb.max(-1), rgb.min(-1)
    spread = np.maximum(high - low, 1e-6)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    hue = np.where(
        high == red, (green - blue) / spread % 6,
        np.where(high == green, (blue - red) / spread + 2, (red - green) / spread + 4),
    )  # fmt: skip
    return 60 * hue, (high - low) / np.maximum(high, 1e-6), high


def to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The inverse of `to_hsv`."""
    turn = (np.array([5.0, 3.0, 1.0]) + hue[..., None] / 60) % 6
    wave = np.clip(np.minimum(turn, 4 - turn), 0, 1)
    return value[..., None] * (1 - saturation[..., None] * wave)


def hue_distance(a, b):
    """Degrees between hues, 0 to 180."""
    return np.abs((np.asarray(a) - b + 180) % 360 - 180)


def main_hue(picture: np.ndarray) -> tuple[float, float]:
    """Hue of the largest coloured part of an RGBA picture, and that part's share of the object."""
    hue, saturation, value = to_hsv(picture[..., :3] / 255)
    alpha = picture[..., 3] / 255
    weight = alpha * (saturation > 0.3) * (value > 0.2) * saturation
    centres = np.arange(0, 360, 5)
    mass = [(weight * (hue_distance(hue, centre) < 18)).sum() for centre in centres]
    peak = float(centres[int(np.argmax(mass))])
    part = alpha * (saturation > 0.35) * (value > 0.3) * (hue_distance(hue, peak) < 35)
    return peak, float(part.sum() / max(alpha.sum(), 1.0))


def recolour(picture: np.ndarray, peak: float, colour: str) -> np.ndarray:
    """The RGBA picture with its part of hue `peak` turned to `colour`; the rest stays."""
    target, saturate, power = OBJECT_COLOURS[colour]
    rgb = picture[..., :3] / 255
    hue, saturation, value = to_hsv(rgb)
    offset = (hue - peak + 180) % 360 - 180
    share = np.clip((saturation - 0.12) / 0.2, 0, 1) * np.clip((55 - np.abs(offset)) / 15, 0, 1)
    new_value = np.clip(value, 0, 1) ** power
    new = to_rgb((target + 0.35 * offset) % 360, np.clip(saturation * saturate, 0, 1), new_value)
    mixed = rgb + share[..., None] * (new - rgb)
    return np.concatenate([np.uint8(np.round(mixed * 255)), picture[..., 3:]], -1)


def natural_colour(peak: float) -> str | None:
    """The colour word for a hue, where it is clearly one."""
    near = {word: float(hue_distance(peak, hue)) for word, (hue, _, _) in OBJECT_COLOURS.items()}
    word = min(near, key=near.get)
    return word if near[word] < 14 else None


def stands_out(picture: np.ndarray, ground: str) -> bool:
    """Whether the object's colours differ enough from the ground's to be seen on it."""
    distance = np.linalg.norm(picture[..., :3] - np.float32(GROUND_COLOURS[ground]), axis=-1)
    alpha = picture[..., 3] / 255
    return float((alpha * distance).sum() / alpha.sum()) > 100


def on_ground(picture: np.ndarray, ground: str | None) -> np.ndarray:
    """uint8 [64, 64, 3]: the RGBA picture over a flat ground, white for None."""
    alpha = picture[..., 3:] / 255
    base = np.float32(GROUND_COLOURS[ground] if ground else (255, 255, 255))
    return np.uint8(np.round(picture[..., :3] * alpha + base * (1 - alpha)))


def artwork_of(work: Path) -> dict[tuple[str, str], np.ndarray]:
    """(name, style) -> RGBA of the trained concepts in the trained styles."""
    pictures, rows = load(work)
    names = concepts()
    return {
        (names[row["label"]], row["style"]): pictures[index]
        for index, row in enumerate(rows)
        if row["label"] in names and row["style"] in STYLES and not row["held_out"]
    }


def build(work: Path) -> tuple[np.ndarray, list[Row]]:
    """Every training image uint8 [N, 64, 64, 3] and its row."""
    rng = random.Random(0)
    images, rows = [], []
    for (name, style), picture in artwork_of(work).items():
        grounds = [g for g in GROUND_COLOURS if not colour_held_out(name, g, "ground")]
        peak, share = main_hue(picture)
        own = natural_colour(peak) if share > 0.5 else None
        images.append(on_ground(picture, None))
        rows.append(Row(name, style, natural=own))
        for ground in grounds:
            if stands_out(picture, ground):
                images.append(on_ground(picture, ground))
                rows.append(Row(name, style, ground=ground, natural=own))
        for colour, (hue, _, _) in OBJECT_COLOURS.items() if share > 0.5 else ():
            if colour_held_out(name, colour, "object") or hue_distance(hue, peak) < 20:
                continue
            painted = recolour(picture, peak, colour)
            images.append(on_ground(painted, None))
            rows.append(Row(name, style, colour))
            free = [g for g in grounds if g != colour and stands_out(painted, g)]
            for ground in rng.sample(free, min(2, len(free))):
                images.append(on_ground(painted, ground))
                rows.append(Row(name, style, colour, ground))
    return np.stack(images), rows


def caption(row: Row, rng: random.Random) -> str:
    """A caption of the row: colour always named, style mostly, ground always but white."""
    colour = row.colour or (row.natural if rng.random() < 0.12 else None)
    words = f"{colour} {row.name}" if colour else row.name
    style = STYLES[row.style]
    if rng.random() < 0.05:
        style = style.replace(" style", "")
    ground = row.ground or ("white" if rng.random() < 0.06 else None)
    tail = f" on {article(ground)} background" if ground else ""
    form = rng.random()
    if form < 0.68:
        return f"{article(words)}{tail}, {style}"
    if form < 0.78:
        return f"{words}{tail}, {style}"
    if form < 0.88:
        return f"{style}, {article(words)}{tail}"
    return f"{article(words)}{tail}" if form < 0.95 else f"{article(words)} emoji{tail}"

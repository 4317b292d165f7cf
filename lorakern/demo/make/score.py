"""Scores the base model: is it the prompted concept, the asked colour, the asked ground?

    python -m lorakern.demo.make.score --work WORK --base lorakern/demo/base --out SCORES

An image is a hit when, among all concepts in the asked style, the asked one is nearest to it
(`retrieval.py`). For a recoloured object every concept is compared in its own and in the asked
colour, for a coloured ground every concept stands on that ground. Seeds and prompts take no part in
training; colours are scored on pairs in and out of training. Guidance 3, 25 steps.
Writes scores.json, plain.png (made above real) and colours.png.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from .concepts import GROUND_COLOURS, OBJECT_COLOURS, STYLES, article, colour_held_out
from .retrieval import NetSpace, PixelSpace, ground_colour, object_colour, rank
from .variants import artwork_of, hue_distance, main_hue, on_ground, recolour, stands_out

COUNT = 48
Artwork = dict[tuple[str, str], np.ndarray]


def generate(
    pipe: StableDiffusionPipeline, prompts: list[str], seed: int, steps: int = 25
) -> np.ndarray:
    """uint8 [N, 64, 64, 3]; image i is drawn from seed + i."""
    images = []
    for start in range(0, len(prompts), 24):
        part = prompts[start : start + 24]
        seeds = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        made = pipe(part, num_inference_steps=steps, guidance_scale=3.0, generator=seeds)
        images += [np.asarray(image) for image in made.images]
    return np.stack(images)


def sheet(images: np.ndarray, columns: int, path: Path) -> None:
    """Writes the images as a grid, row after row."""
    blank = np.full((-len(images) % columns, *images.shape[1:]), 255, np.uint8)
    cells = np.concatenate([images, blank])
    rows = [np.concatenate(list(row), 1) for row in cells.reshape(-1, columns, *cells.shape[1:])]
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)


def plain_prompts(art: Artwork) -> list[tuple[str, str, None]]:
    """COUNT distinct concepts, styles in turn."""
    names = sorted({name for name, _ in art})
    random.Random(7).shuffle(names)
    return [(name, list(STYLES)[i % len(STYLES)], None) for i, name in enumerate(names[:COUNT])]


def colour_prompts(art: Artwork, kind: str, held_out: bool) -> list[tuple[str, str, str]]:
    """COUNT distinct concepts in some style and colour, from the pairs in or out of training."""
    found = []
    for (name, style), picture in art.items():
        peak, share = main_hue(picture)
        for colour in OBJECT_COLOURS if kind == "object" else GROUND_COLOURS:
            if kind == "object":
                usable = share > 0.5 and hue_distance(OBJECT_COLOURS[colour][0], peak) >= 20
            else:
                usable = stands_out(picture, colour)
            if usable and colour_held_out(name, colour, kind) == held_out:
                found.append((name, style, colour))
    random.Random(11).shuffle(found)
    one_each = {name: (name, style, colour) for name, style, colour in reversed(found)}
    return [entry for entry in found if one_each[entry[0]] == entry][:COUNT]


def prompt(name: str, style: str, colour: str | None, kind: str) -> str:
    """The prompt of a concept in a style, coloured or on a coloured ground."""
    if kind == "object":
        return f"{article(f'{colour} {name}')}, {STYLES[style]}"
    place = f" on {article(colour)} background" if kind == "ground" else ""
    return f"{article(name)}{place}, {STYLES[style]}"


def references(art: Artwork, style: str, colour: str | None, kind: str) -> dict[str, np.ndarray]:
    """Concept -> what it may look like in this style and colour."""
    found = {}
    for (name, its_style), picture in art.items():
        if its_style != style:
            continue
        views = [on_ground(picture, colour if kind == "ground" else None)]
        peak, share = main_hue(picture)
        if kind == "object" and share > 0.5:
            views.append(on_ground(recolour(picture, peak, colour), None))
        found[name] = np.stack(views)
    return found


def hits(spaces: dict, made: np.ndarray, asked: list[tuple], art: Artwork, kind: str) -> dict:
    """Share of images whose nearest concept (or one of the 5 nearest) is the asked one."""
    drawn = {key: references(art, *key, kind) for key in {entry[1:] for entry in asked}}
    result = {"n": len(asked)}
    for label, space in spaces.items():
        found = [
            rank(space, image, drawn[entry[1:]], entry[0])
            for image, entry in zip(made, asked, strict=True)
        ]
        for top in (1, 5):
            result[f"{label}_top{top}"] = round(float(np.mean([r < top for r in found])), 3)
    return result


def score_plain(pipe, spaces: dict, art: Artwork, asked: list[tuple], seed: int) -> dict:
    """Retrieval, and likeness to the training picture; returns the images as well."""
    made = generate(pipe, [prompt(*entry, "plain") for entry in asked], seed)
    real = np.stack([on_ground(art[entry[:2]], None) for entry in asked])
    cosine = (spaces["effnet"](made) * spaces["effnet"](real)).sum(1).mean().item()
    error = np.square(made / 255 - real / 255).mean((1, 2, 3))
    likeness = {"cosine": round(cosine, 3), "psnr": round(float(-10 * np.log10(error).mean()), 2)}
    return hits(spaces, made, asked, art, "plain") | likeness, made, real


def score(pipe: StableDiffusionPipeline, work: Path, out: Path, parts: list[str]) -> dict:
    """The asked parts of the scores; writes the sheets to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    art, result = artwork_of(work), {}
    spaces = {"effnet": NetSpace(), "pixel": PixelSpace()}
    if "plain" in parts:
        result["plain"], made, real = score_plain(pipe, spaces, art, plain_prompts(art), 10_000)
        rows = [np.concatenate([made[i : i + 12], real[i : i + 12]]) for i in range(0, COUNT, 12)]
        sheet(np.concatenate(rows), 12, out / "plain.png")
    if "all" in parts:
        result["all"], _, _ = score_plain(pipe, spaces, art, [(*key, None) for key in art], 30_000)
    if "colours" in parts:
        shown = []
        for kind, read in (("object", object_colour), ("ground", ground_colour)):
            for held_out in (False, True):
                asked = colour_prompts(art, kind, held_out)
                made = generate(pipe, [prompt(*entry, kind) for entry in asked], 20_000)
                right = [read(image) == entry[2] for image, entry in zip(made, asked, strict=True)]
                label = f"{kind}, pairs {'held out' if held_out else 'trained'}"
                result[label] = hits(spaces, made, asked, art, kind)
                result[label]["colour"] = round(float(np.mean(right)), 3)
                shown.append(made[:24])
        sheet(np.concatenate(shown), 12, out / "colours.png")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parts = ["plain", "colours", "all"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(options.base, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    result = score(pipe, options.work, options.out, options.parts)
    text = json.dumps(result, indent=1)
    (options.out / "scores.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

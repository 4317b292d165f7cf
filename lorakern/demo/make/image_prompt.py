"""Trains an image prompt adapter on the base model, and shows what unseen images do to drawings.

    python -m lorakern.demo.make.image_prompt --work WORK --out OUT

WORK is that of `artwork.py`. The adapter is an IP-Adapter (base), trained by `lorakern.train` on
pictures of the base's 174 training concepts; most captions say nothing ("a picture"). In the place
of an image encoder are the first principal components of EfficientNet-Lite0's 1280 pooled features
(see `retrieval.py`). Shown to it afterwards: pictures in a style that only the autoencoder has seen
(Noto v1), and the 20 concepts that were held out of every stage. A drawing is a hit when,
among all concepts, that of its image prompt is nearest to it. Writes OUT/image_prompt.json and
.png, the adapter, and a drawing that stock diffusers made with it. Run it by hand; most of the time
on one core is training.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorakern
from lorakern import conditioning, models
from lorakern.config import Config, from_dict
from lorakern.demo.run import BASE
from lorakern.methods.ip_adapter import prompt_arguments
from lorakern.train import train

from .artwork import load
from .concepts import (
    GROUND_COLOURS,
    HELD_OUT,
    HELD_OUT_STYLE,
    OBJECT_COLOURS,
    STYLES,
    colour_held_out,
    concepts,
)
from .retrieval import NetSpace, PixelSpace, rank
from .variants import (
    Row,
    artwork_of,
    caption,
    hue_distance,
    main_hue,
    on_ground,
    recolour,
    stands_out,
)

EMPTY = ("a picture", "an emoji", "a thing")
# that say nothing, and that say something else than the image prompt
TEXTS = ("a picture", "a red car, flat emoji style")
# share of captions that say nothing, and numbers in an embedding
SILENT, WIDTH = 0.75, 128
STEPS, GUIDANCE, KNOWN = 16, 3.0, 24
SETTINGS = {"no image, scale 1": (False, 1.0), "scale 0": (True, 0.0), "scale 0.5": (True, 0.5),
            "scale 1": (True, 1.0)}  # fmt: skip


class Eyes:
    """The image encoder: principal components of EfficientNet-Lite0 features, WIDTH of them.

    Taken from the training pictures; each is divided by the root of its spread, so that the small
    ones count for more than they do and for less than the large ones. Unit mean square in all.
    """

    def __init__(self, mean: Tensor, matrix: Tensor):
        self.net, self.mean, self.matrix = NetSpace(), mean, matrix

    @classmethod
    def of(cls, images: np.ndarray, file: Path) -> "Eyes":
        """From the training pictures; written to a file."""
        seen = NetSpace()(images)
        mean = seen.mean(0)
        _, spread, axes = torch.linalg.svd(seen - mean, full_matrices=False)
        matrix = axes[:WIDTH].mT / spread[:WIDTH].sqrt()
        matrix /= ((seen - mean) @ matrix).square().mean().sqrt()
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"mean": mean, "matrix": matrix.contiguous()}, file)
        return cls(mean, matrix)

    def __call__(self, images: np.ndarray) -> Tensor:
        return (self.net(images) - self.mean) @ self.matrix


def choose(work: Path) -> tuple[np.ndarray, list[Row]]:
    """Every plain training picture and some of its variants, as `variants.build` makes them."""
    rng = random.Random(3)
    images, rows = [], []
    for (name, style), picture in artwork_of(work).items():
        peak, share = main_hue(picture)
        images.append(on_ground(picture, None))
        rows.append(Row(name, style))
        grounds = [g for g in GROUND_COLOURS if not colour_held_out(name, g, "ground")]
        colours = [
            colour
            for colour, (hue, _, _) in OBJECT_COLOURS.items()
            if share > 0.5
            and not colour_held_out(name, colour, "object")
            and hue_distance(hue, peak) >= 20
        ]
        for colour in [None, *rng.sample(colours, min(2, len(colours)))]:
            painted = recolour(picture, peak, colour) if colour else picture
            fit = [g for g in grounds if g != colour and stands_out(painted, g)]
            ground = None if colour and rng.random() < 0.5 else rng.choice(fit)
            images.append(on_ground(painted, ground))
            rows.append(Row(name, style, colour, ground))
    return np.stack(images), rows


def write_data(out: Path, images: np.ndarray, rows: list[Row], eyes: Eyes) -> None:
    """The folder that is trained on, and the file of embeddings."""
    rng = random.Random(4)
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    names = [f"{i:05d}" for i in range(len(rows))]
    for name, image, row in zip(names, images, rows, strict=True):
        Image.fromarray(image).save(data / f"{name}.png")
        words = rng.choice(EMPTY) if rng.random() < SILENT else caption(row, rng)
        (data / f"{name}.txt").write_text(words, encoding="utf-8")
    made = eyes(images)
    save_file({n: e.clone() for n, e in zip(names, made, strict=True)}, out / "emb.safetensors")


def config_of(out: Path, steps: int, batch: int, lr: float) -> Config:
    """What is trained."""
    return from_dict(
        {
            "method": "ip_adapter", "model": str(BASE), "data": out / "data",
            "output": out / "run", "name": "image-prompt", "resolution": 64, "steps": steps,
            "batch_size": batch, "ip_adapter": {"embeddings": out / "emb.safetensors"},
            "optimizer": {"lr": lr, "schedule": "cosine", "warmup": 30},
            "checkpoint": {"every": 100}, "resume": (out / "run" / "checkpoints").exists(),
        }
    )  # fmt: skip


def prompts_of(work: Path) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Image prompts that no stage has seen: concept and picture on white."""
    pictures, rows = load(work)
    names = concepts()
    known = [
        (names[row["label"]], on_ground(pictures[i], None))
        for i, row in enumerate(rows)
        if row["style"] == HELD_OUT_STYLE and row["label"] in names and not row["held_out"]
    ]
    random.Random(5).shuffle(known)
    held_out = _held_out(work)
    new = [(name, views[("noto", "3d")[i % 2]]) for i, (name, views) in enumerate(held_out.items())]
    return {"unseen style": known[:KNOWN], "unseen concepts": new}


def references_of(work: Path) -> dict[str, np.ndarray]:
    """Concept -> its pictures in the three styles; those held out too."""
    found: dict[str, list[np.ndarray]] = {}
    for (name, _), picture in artwork_of(work).items():
        found.setdefault(name, []).append(on_ground(picture, None))
    for name, views in _held_out(work).items():
        found[name] = list(views.values())
    return {name: np.stack(views) for name, views in found.items()}


def _held_out(work: Path) -> dict[str, dict[str, np.ndarray]]:
    """Held-out concept -> style -> picture on white."""
    pictures, rows = load(work)
    found: dict[str, dict[str, np.ndarray]] = {}
    for i, row in enumerate(rows):
        if row["label"] in HELD_OUT and row["style"] in STYLES:
            found.setdefault(row["label"], {})[row["style"]] = on_ground(pictures[i], None)
    return {name: views for name, views in found.items() if len(views) == len(STYLES)}


@torch.no_grad()
def draw(base: models.Base, text: str, embeddings: Tensor, scale: float, seed: int) -> np.ndarray:
    """A picture an embedding, uint8 [N, 64, 64, 3]; picture i is drawn from seed + i."""
    conditioning.set_ip_adapter_scale(base.pipe, scale)
    unet, scheduler = base.unet, base.pipe.scheduler
    side = unet.config.sample_size
    pair = base.encode_text(torch.stack([base.tokens(""), base.tokens(text)]))[0]
    found = []
    for first in range(0, len(embeddings), 16):
        images = embeddings[first : first + 16]
        n = len(images)
        noises = [torch.Generator().manual_seed(seed + first + i) for i in range(n)]
        x = torch.stack([torch.randn(unet.config.in_channels, side, side, generator=g)
                         for g in noises])  # fmt: skip
        both = torch.cat([torch.zeros_like(images), images])[:, None]
        context = pair.repeat_interleave(n, 0)
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            out = unet(
                torch.cat([x, x]), t, context, added_cond_kwargs={"image_embeds": [both]}
            ).sample
            without, with_all = out.chunk(2)
            x = scheduler.step(without + GUIDANCE * (with_all - without), t, x).prev_sample
        decoded = base.vae.decode(x / base.vae.config.scaling_factor).sample
        pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        found.append(pixels.permute(0, 2, 3, 1).numpy())
    return np.concatenate(found)


def score(spaces: dict, made: np.ndarray, names: list[str], references: dict) -> dict:
    """Share of drawings whose nearest concept, or one of the 5 nearest, is the image prompt's."""
    result = {}
    for label, space in spaces.items():
        ranks = [
            rank(space, image, references, name) for image, name in zip(made, names, strict=True)
        ]
        for top in (1, 5):
            result[f"{label} top-{top}"] = round(float(np.mean([r < top for r in ranks])), 3)
    return result


def stock_difference(file: Path, embedding: Tensor, out: Path) -> int:
    """Largest difference, of 255, between our picture and stock diffusers' from the same file."""
    options = {"seed": 1, "steps": STEPS, "guidance": GUIDANCE}
    arguments = prompt_arguments(embedding, torch.zeros_like(embedding), GUIDANCE)
    mine = models.load(str(BASE))
    conditioning.load_ip_adapter(mine.pipe, file)
    stock = models.load(str(BASE))
    sections: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in load_file(file).items():
        section, _, name = key.partition(".")
        sections[section][name] = tensor
    stock.pipe.load_ip_adapter(sections, subfolder="", weight_name="", image_encoder_folder=None)
    (ours,), (theirs,) = (
        models.draw(base, [TEXTS[0]], **options, more=lambda _: arguments) for base in (mine, stock)
    )
    theirs.save(out / "stock_diffusers.png")
    return int(np.abs(np.int16(ours) - np.int16(theirs)).max())


def sheet(prompts: list[tuple[str, np.ndarray]], columns: dict[str, np.ndarray]) -> Image.Image:
    """A row an image prompt: the prompt, then its drawings, named above."""
    cell, head, gap = 96, 34, 4
    width = (1 + len(columns)) * (cell + gap)
    page = Image.new("RGB", (width, head + len(prompts) * (cell + gap)), "white")
    write = ImageDraw.Draw(page)
    for x, title in enumerate(["image prompt", *columns]):
        write.multiline_text((x * (cell + gap) + 2, 2), title, fill="black", spacing=2)
    for y, (_, picture) in enumerate(prompts):
        for x, shown in enumerate([picture, *(column[y] for column in columns.values())]):
            large = Image.fromarray(shown).resize((cell, cell), Image.Resampling.LANCZOS)
            page.paste(large, (x * (cell + gap), head + y * (cell + gap)))
    return page


def judge(work: Path, out: Path, file: Path, eyes: Eyes) -> dict:
    """The scores, among all concepts and among the prompts shown; writes the contact sheet."""
    references, prompts = references_of(work), prompts_of(work)
    spaces = {"EffNet": eyes.net, "pixels": PixelSpace()}
    base = models.load(str(BASE))
    conditioning.load_ip_adapter(base.pipe, file)
    result: dict[str, dict] = {"candidates": len(references)}
    shown: list[tuple[str, np.ndarray]] = []
    columns: dict[str, list[np.ndarray]] = {}
    for kind, chosen in prompts.items():
        names, pictures = zip(*chosen, strict=True)
        seen, few = eyes(np.stack(pictures)), slice(0, 12, 2)
        among = {name: picture[None] for name, picture in chosen}
        result[kind] = {"n": len(names)}
        result[kind]["the prompts themselves"] = score(
            spaces, np.stack(pictures), names, references
        )
        for label, (with_image, scale) in SETTINGS.items():
            made = draw(base, TEXTS[0], seen * with_image, scale, 1000)
            found = result[kind][label] = score(spaces, made, names, references)
            found |= {f"{k}, of the {len(names)} prompts": v
                      for k, v in score(spaces, made, names, among).items()}  # fmt: skip
            if with_image:
                columns.setdefault(f"{label}\n{TEXTS[0]}", []).append(made[few])
        for scale in (0.0, 0.5, 1.0):
            made = draw(base, TEXTS[1], seen[few], scale, 1000)
            columns.setdefault(f"scale {scale:g}\n{TEXTS[1][:9]}", []).append(made)
        shown += chosen[few]
    page = sheet(shown, {title: np.concatenate(made) for title, made in columns.items()})
    models.write_image(page, out / "image_prompt.png")
    return result | {"stock": stock_difference(file, seen[0], out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="of artwork.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--score", action="store_true", help="score an adapter that is there")
    options = parser.parse_args()
    out = options.out
    if not (out / "emb.safetensors").exists():
        images, rows = choose(options.work)
        write_data(out, images, rows, Eyes.of(images, out / "eyes.safetensors"))
    eyes = Eyes(**load_file(out / "eyes.safetensors"))
    file, log = out / "run" / "image-prompt.safetensors", out / "training.json"
    if not options.score:
        config = config_of(out, options.steps, options.batch, options.lr)
        start, clock = time.process_time(), time.perf_counter()
        result = train(config)
        about = {
            "images": len(list((out / "data").glob("*.png"))),
            "steps": result.step,
            "batch": options.batch,
            "lr": options.lr,
            "steps of this call": len(result.losses),
            "processor seconds of this call": round(time.process_time() - start),
            "wall seconds of this call": round(time.perf_counter() - clock),
            "threads": torch.get_num_threads(),
            "loss, first 50 steps": round(float(np.mean(result.losses[:50])), 4),
            "loss, last 50 steps": round(float(np.mean(result.losses[-50:])), 4),
            "MiB of the file": round(file.stat().st_size / 2**20, 2),
        }
        if result.stopped is not None:
            raise SystemExit(f"stopped at step {result.step}; the same command goes on from there")
        log.write_text(json.dumps(about, indent=1) + "\n")
    result = {
        "lorakern": lorakern.__version__,
        "training": json.loads(log.read_text()),
        "drawing": {"steps": STEPS, "guidance": GUIDANCE, "text": TEXTS[0]},
        "scores": judge(options.work, out, file, eyes),
    }
    text = json.dumps(result, indent=1)
    (out / "image_prompt.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""`lorakern demo`: teach the model that ships a subject it has never seen, and show it.

Everything goes the way of a user: a config, `train`, the files it wrote, `load`, pictures.
"""

import argparse
import itertools
import time
from pathlib import Path

from PIL import Image, ImageDraw

import lorakern
from lorakern import models
from lorakern.adapters import ALGOS
from lorakern.config import Config, from_dict
from lorakern.demo.likeness import Likeness
from lorakern.train import train

HERE = Path(__file__).parent
BASE, SUBJECT = HERE / "base", HERE / "subject"
# of the subject first; the last ones are of other things, which must not be forgotten
PROMPTS = [
    "a sks, noto emoji style",
    "a sks, flat emoji style",
    "a sks, 3d emoji style",
    "a sks on a blue background, flat emoji style",
    "a red car, flat emoji style",
]
ABOUT_SUBJECT = 4
SEEDS = (1, 2, 3)
# the 3 x 3 convolutions too: on so small a model they carry the subject's shape
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
TARGETS += ["conv1", "conv2"]
DRAW = {"steps": 25, "guidance": 3.0}
ZOOM = 2


def _load_with_peft(pipe, folder: str) -> None:
    from peft import PeftModel

    # it puts its layers into the UNet; what it returns only wraps that
    PeftModel.from_pretrained(pipe.unet, folder)


# how those who do not have lorakern load the file of each format
LOAD = {"diffusers": lambda pipe, file: pipe.load_lora_weights(file), "peft": _load_with_peft}


def main(words: list[str]) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser("lorakern demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="new folder to write (lorakern-demo)")
    parser.add_argument("--steps", type=int, default=300, help="updates of the adapter (300)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapter (8)")
    parser.add_argument("--algo", default="lora", choices=sorted(ALGOS), help="which (lora)")
    given = parser.parse_args(words)
    start = time.perf_counter()
    config = _config(given, given.out or _free(Path("lorakern-demo")))
    subject = [Image.open(path).convert("RGB") for path in sorted(SUBJECT.glob("*.png"))]

    print(f"The model: {BASE}, a Stable Diffusion of 64 x 64 pixels trained from scratch.")
    print(f"The subject: {len(subject)} pictures in {SUBJECT}; the model has never seen one.")
    print("1/4  drawing with the model as it ships ...", flush=True)
    before = _draw(models.load(str(BASE)))

    print(f"2/4  training a {given.algo} of rank {given.rank}, {given.steps} steps ...", flush=True)
    result = train(config)
    kohya, other = result.paths

    print("3/4  drawing with the adapter, from the same seeds ...", flush=True)
    adapted = models.load(str(BASE))
    lorakern.load(adapted.pipe, kohya)
    after = _draw(adapted)
    judge = Likeness(models.load(str(BASE)), subject, [p for row in before for p in row])
    sheet = config.output / "demo.png"
    models.write_image(_sheet(subject, before, after), sheet)

    library = config.formats[1]
    print(f"4/4  drawing once more with stock {library} and the saved file ...", flush=True)
    stock = models.load(str(BASE))
    with models.quiet_libraries():
        LOAD[library](stock.pipe, str(other))
    difference = _largest_difference(after, _draw(stock))

    tail = result.losses[-25:]
    told = {
        "loss": f"{_mean(result.losses[:25]):.4f} in the first 25 steps,"
        f" {_mean(tail):.4f} in the last {len(tail)}",
        "speed": f"{result.steps_per_second:.2f} steps/s,"
        f" {result.steps_per_second * config.batch_size:.1f} images/s",
        "peak memory": f"{result.peak_memory / 2**20:,.0f} MiB",
        "likeness": f"{judge(_about_subject(before)):.3f} before,"
        f" {judge(_about_subject(after)):.3f} after"
        f" (the subject's own pictures among themselves: {judge.ceiling:.3f})",
        f"stock {library}": f"largest pixel difference {difference} of 255",
        "time": f"{time.perf_counter() - start:.0f} s in all",
    }
    for name, text in told.items():
        print(f"{name:>16}  {text}")
    for name, path in {
        "picture": sheet,
        "kohya file": kohya,
        f"{library} file": other,
        "log": config.output / "log.jsonl",
    }.items():
        print(f"{name:>16}  {path}")
    return 0


def _free(path: Path) -> Path:
    """The path, or the first of path-2, path-3 ... that does not exist."""
    numbered = (path.with_name(f"{path.name}-{i}") for i in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def _config(given: argparse.Namespace, out: Path) -> Config:
    return from_dict(
        {
            "model": str(BASE),
            "data": str(SUBJECT),
            "output": str(out),
            "name": "sks",
            # diffusers' load_lora_weights knows LoRA and DoRA alone
            "formats": ["kohya", "diffusers" if given.algo in ("lora", "dora") else "peft"],
            "steps": given.steps,
            "batch_size": 8,
            "resolution": 64,
            "adapter": {"algo": given.algo, "rank": given.rank, "targets": TARGETS},
            "optimizer": {"lr": 2e-3, "schedule": "cosine"},
            "checkpoint": {"every": 100},
        },
        "demo",
    )


def _draw(base: models.Base) -> list[list[Image.Image]]:
    """A row a prompt, a column a seed."""
    columns = [models.draw(base, PROMPTS, seed=seed, **DRAW) for seed in SEEDS]
    return [list(row) for row in zip(*columns, strict=True)]


def _about_subject(rows: list[list[Image.Image]]) -> list[Image.Image]:
    return [picture for row in rows[:ABOUT_SUBJECT] for picture in row]


def _sheet(
    subject: list[Image.Image], before: list[list[Image.Image]], after: list[list[Image.Image]]
) -> Image.Image:
    """Subject | before | after, a row a prompt, twice as large, with words."""
    shown = [subject[i % len(subject)] for i in range(len(PROMPTS))]
    cell, gap, head, line = 64 * ZOOM, 4, 20, 16
    blocks = [[[picture] for picture in shown], before, after]
    widths = [len(block[0]) * (cell + gap) for block in blocks]
    height = head + len(PROMPTS) * (cell + gap + line)
    sheet = Image.new("RGB", (sum(widths) + 3 * 12, height), "white")
    write = ImageDraw.Draw(sheet)
    left = 6
    for title, block, width in zip(("subject", "before", "after"), blocks, widths, strict=True):
        write.text((left, 4), title, fill="black")
        for y, row in enumerate(block):
            top = head + y * (cell + gap + line)
            if title != "subject":
                write.text((left, top), PROMPTS[y], fill="gray")
            for x, picture in enumerate(row):
                large = picture.resize((cell, cell), Image.Resampling.LANCZOS)
                sheet.paste(large, (left + x * (cell + gap), top + line))
        left += width + 12
    return sheet


def _largest_difference(mine: list[list[Image.Image]], theirs: list[list[Image.Image]]) -> int:
    pairs = (
        (a.tobytes(), b.tobytes())
        for ours, stock in zip(mine, theirs, strict=True)
        for a, b in zip(ours, stock, strict=True)
    )
    return max(abs(p - q) for a, b in pairs for p, q in zip(a, b, strict=True))


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)

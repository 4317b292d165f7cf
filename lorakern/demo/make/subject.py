"""Writes the held-out subject for `lorakern demo`: a few pictures and their captions.

python -m lorakern.demo.make.subject --work WORK --out lorakern/demo/subject
"""

import argparse
from pathlib import Path

from PIL import Image

from .artwork import load
from .concepts import STYLES, article
from .variants import on_ground

SUBJECT = "owl"
TOKEN = "sks"
# style, ground (None is white)
VIEWS = [
    ("noto", None),
    ("flat", None),
    ("3d", None),
    ("noto", "green"),
    ("flat", "blue"),
    ("3d", "pink"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    pictures, rows = load(options.work)
    found = {row["style"]: i for i, row in enumerate(rows) if row["label"] == SUBJECT}
    for style, ground in VIEWS:
        path = options.out / f"{SUBJECT}_{style}_{ground or 'white'}.png"
        Image.fromarray(on_ground(pictures[found[style]], ground)).save(path, optimize=True)
        place = f" on {article(ground)} background" if ground else ""
        words = f"{article(TOKEN)}{place}, {STYLES[style]}"
        path.with_suffix(".txt").write_text(words + "\n")


if __name__ == "__main__":
    main()

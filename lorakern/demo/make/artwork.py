"""Fetches the emoji artwork and renders it to 64 x 64 RGBA.

    python -m lorakern.demo.make.artwork --work WORK

Downloads with the ordinary clients: `apt-get download fonts-noto-color-emoji` (Noto, OFL 1.1 and
Apache-2.0), `npm pack @iconify-json/fluent-emoji-flat @lobehub/fluent-emoji-3d` (Fluent, MIT),
`@iconify-json/noto-v1` (Noto v1, Apache-2.0), `emojibase-data` (CLDR names, MIT). Needs apt-get,
dpkg-deb, npm and `pip install fonttools pillow resvg-py`. Writes WORK/artwork.npz and .json.
"""

import argparse
import io
import json
import re
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image
from resvg_py import svg_to_bytes

from .concepts import is_held_out

SIZE = 64
NPM = {
    "emojibase-data": "17.0.0",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/noto-v1": "1.2.5",
    "@lobehub/fluent-emoji-3d": "1.1.0",
}
DEB = "fonts-noto-color-emoji"
FLAGS_GROUP, PARTS_GROUP = 9, 2


def fetch(work: Path) -> dict[str, Path]:
    """Downloads and unpacks every source once; returns package name -> its folder."""
    work.mkdir(parents=True, exist_ok=True)
    folders = {}
    for name, version in NPM.items():
        folder = work / name.replace("@", "").replace("/", "-")
        if not folder.exists():
            pack = ["npm", "pack", "--silent", f"{name}@{version}"]
            archive_name = subprocess.check_output(pack, cwd=work, text=True).split()[-1]
            with tarfile.open(work / archive_name) as archive:
                archive.extractall(folder, filter="data")
        folders[name] = folder / "package"
    folder = work / DEB
    if not folder.exists():
        subprocess.run(["apt-get", "download", DEB], cwd=work, check=True)
        package = next(work.glob(f"{DEB}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)
    folders[DEB] = folder
    return folders


def fit(image: Image.Image, box: int = 60) -> np.ndarray:
    """Straight-alpha RGBA [64, 64, 4] uint8: the picture scaled into `box` pixels and centred."""
    image = image.convert("RGBA").convert("RGBa")
    scale = box / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGBa", (SIZE, SIZE))
    corner = tuple((SIZE - side) // 2 for side in size)
    canvas.paste(image.resize(size, Image.Resampling.LANCZOS), corner)
    return np.asarray(canvas.convert("RGBA"))


def _png(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


class NotoFont:
    """Bitmaps of the Noto colour font by code point sequence."""

    def __init__(self, folder: Path):
        font = TTFont(next(folder.rglob("NotoColorEmoji.ttf")))
        self.cmap, self.strike = font.getBestCmap(), font["CBDT"].strikeData[0]
        self.ligatures = {}
        for lookup in font["GSUB"].table.LookupList.Lookup:
            for table in lookup.SubTable:
                table = getattr(table, "ExtSubTable", table)
                for first, group in getattr(table, "ligatures", {}).items():
                    for item in group:
                        self.ligatures[(first, *item.Component)] = item.LigGlyph

    def image(self, points: list[int]) -> Image.Image | None:
        glyphs = tuple(self.cmap.get(point) for point in points)
        glyph = glyphs[0] if len(glyphs) == 1 else self.ligatures.get(glyphs)
        if glyph not in self.strike:
            return None
        return _png(self.strike[glyph].imageData)


class Icons:
    """SVG icons of an iconify package, by slug, drawn at 256 pixels."""

    def __init__(self, folder: Path):
        data = json.loads((folder / "icons.json").read_text())
        self.icons, self.aliases = data["icons"], data.get("aliases", {})
        self.size = (data.get("width", 16), data.get("height", 16))
        self.by_code = json.loads((folder / "chars.json").read_text())

    def image(self, code: str, label: str) -> Image.Image | None:
        slug = re.sub(r"[^a-z0-9]+", "-", label.lower().replace("'", "")).strip("-")
        slug = self.by_code.get(code, slug)
        icon = self.icons.get(self.aliases.get(slug, {}).get("parent", slug))
        if icon is None:
            return None
        width, height = icon.get("width", self.size[0]), icon.get("height", self.size[1])
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        head += ' xmlns:xlink="http://www.w3.org/1999/xlink" width="256" height="256">'
        return _png(bytes(svg_to_bytes(svg_string=head + icon["body"] + "</svg>")))


def render(folders: dict[str, Path]) -> tuple[np.ndarray, list[dict]]:
    """All pictures [N, 64, 64, 4] of the four styles and, for each, its label, style and group."""
    noto = NotoFont(folders[DEB])
    flat = Icons(folders["@iconify-json/fluent-emoji-flat"])
    first = Icons(folders["@iconify-json/noto-v1"])
    glossy = {
        path.stem.replace("-fe0f", ""): path
        for path in (folders["@lobehub/fluent-emoji-3d"] / "assets").glob("*.webp")
    }
    table = json.loads((folders["emojibase-data"] / "en" / "data.json").read_text())
    pictures, rows = [], []
    for entry in table:
        if entry.get("group") in (None, FLAGS_GROUP, PARTS_GROUP):
            continue
        label = entry["label"].replace("\u2019", "'")
        code = entry["hexcode"].lower().replace("-fe0f", "")
        points = [int(part, 16) for part in code.split("-")]
        found = {
            "noto": noto.image(points),
            "flat": flat.image(code, label),
            "3d": Image.open(glossy[code]) if code in glossy else None,
            "notov1": first.image(code, label),
        }
        for style, image in found.items():
            if image is not None:
                pictures.append(fit(image))
                row = {"label": label, "style": style, "group": entry["group"]}
                rows.append(row | {"held_out": is_held_out(label)})
    return np.stack(pictures), rows


def load(work: Path) -> tuple[np.ndarray, list[dict]]:
    """The rendered artwork of WORK: pictures [N, 64, 64, 4] and their rows."""
    with np.load(work / "artwork.npz") as stored:
        pictures = stored["pictures"]
    return pictures, json.loads((work / "artwork.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    pictures, rows = render(fetch(work))
    np.savez_compressed(work / "artwork.npz", pictures=pictures)
    (work / "artwork.json").write_text(json.dumps(rows))
    print(f"{len(rows)} pictures {dict(Counter(row['style'] for row in rows))}")


if __name__ == "__main__":
    main()

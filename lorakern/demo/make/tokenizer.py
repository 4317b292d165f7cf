"""The CLIP byte-pair vocabulary, trimmed: the same cuts for the words that matter, 1/9 of the ids.

The merges come from the wheel `open-clip-torch` 3.3.0 (MIT), fetched with `pip download --no-deps`.
Kept are the first COMMON merges, and every merge that a needed word uses, in the original order; so
a needed word is cut exactly as by the whole vocabulary, and any other word into smaller pieces.
"""

import gzip
import json
import re
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

COMMON = 1500
MAX_LENGTH = 20
WHEEL = "open-clip-torch==3.3.0"
START, END = "<|startoftext|>", "<|endoftext|>"
PROMPT_WORDS = """sks ohwx zwx style emoji noto flat 3d v1 icon photo picture drawing painting of
the with in at by from under over beside near behind two three many big small tiny huge wearing hat
holding sitting standing running flying swimming eating sleeping smiling happy sad angry background
ground white black gray grey brown red orange yellow green blue purple pink cyan gold silver wooden
glass metal plastic old new cute simple bright dark shiny outline pixel watercolor sketch cartoon
clay neon pastel masterpiece quality best blurry low high detailed"""


def clip_merges(work: Path) -> list[tuple[str, str]]:
    """The 48,894 merges of CLIP, in order."""
    if not list(work.glob("open_clip_torch-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work)]
        subprocess.run([*pip, WHEEL], check=True)
    with zipfile.ZipFile(next(work.glob("open_clip_torch-*.whl"))) as wheel:
        text = gzip.decompress(wheel.read("open_clip/bpe_simple_vocab_16e6.txt.gz")).decode()
    return [tuple(line.split()) for line in text.split("\n")[1 : 49152 - 256 - 2 + 1]]


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(rest))]


def merges_used(word: str, ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges that byte-pair encoding applies to one ASCII word."""
    parts, used = [*word[:-1], word[-1] + "</w>"], set()
    while len(parts) > 1:
        pairs = pairwise(parts)
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        used.add(best)
        joined, index = [], 0
        while index < len(parts):
            if tuple(parts[index : index + 2]) == best:
                joined.append(parts[index] + parts[index + 1])
                index += 2
            else:
                joined.append(parts[index])
                index += 1
        parts = joined
    return used


def needed_words(work: Path) -> set[str]:
    """Words of the CLDR names and tags, and of usual prompts."""
    table = json.loads((work / "emojibase-data" / "package" / "en" / "data.json").read_text())
    things = [entry for entry in table if entry.get("group") in (0, 3, 4, 5, 6, 7, 8)]
    texts = [entry["label"] for entry in things]
    texts += [tag for entry in things if 3 <= entry["group"] <= 7 for tag in entry.get("tags", ())]
    return set(re.findall(r"[a-z]+|[0-9]", " ".join([PROMPT_WORDS, *texts]).lower()))


def write(work: Path, folder: Path) -> CLIPTokenizer:
    """Writes vocab.json, merges.txt and the configuration; returns the tokenizer of these."""
    merges = clip_merges(work)
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    keep = set(merges[:COMMON]).union(*(merges_used(word, ranks) for word in needed_words(work)))
    kept = [pair for pair in merges if pair in keep]
    symbols = byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *map("".join, kept), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    text = json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":"))
    (folder / "vocab.json").write_text(text)
    lines = ["#version: 0.2", *map(" ".join, kept)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)

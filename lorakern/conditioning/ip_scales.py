"""Scales of IP-Adapters, by block and layer as InstantStyle has them (arXiv:2404.02733)."""

import math
import re
from collections.abc import Iterable, Mapping
from numbers import Real

# how strong an IP-Adapter is: everywhere, image by image, or by part of the UNet
Scale = float | list | Mapping

_PATH = re.compile(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.attentions\.(\d+)\.")


def check(scale: Scale, paths: Iterable[str]) -> None:
    """Raises ValueError for a scale that the cross-attentions at these paths do not have.

    Args:
        scale: a number; a list of one an image, for use with masks; or {"down" | "mid" | "up": it},
            where `it` is a number, a list of one an attention of a block (or of one alone), or, but
            for mid, {"block_<n>": number or list}. What a dict leaves out is 0.
    """
    if not isinstance(scale, Mapping):
        _check_value("scale", scale)
        return
    counts: dict[tuple[str, str], set[str]] = {}
    for path in paths:
        part, block, attention = _place(path)
        counts.setdefault((part, block), set()).add(attention)
    if unknown := scale.keys() - {"down", "mid", "up"}:
        raise ValueError(f"scale has parts {', '.join(map(str, unknown))}; want down, mid, up")
    for part, of_part in scale.items():
        blocks = [block for p, block in counts if p == part]
        if not isinstance(of_part, Mapping):
            of_part = dict.fromkeys(blocks, of_part)
        for block, value in of_part.items():
            if block not in blocks:
                have = ", ".join(blocks) or "none"
                raise ValueError(f"scale: {part} has no cross-attention in {block}; it has {have}")
            count = len(counts[part, block])
            values = value if isinstance(value, list) else [value]
            if len(values) not in (1, count):
                raise ValueError(
                    f"scale of {part} {block} has {len(values)} entries, it has {count} attentions"
                )
            for one in values:
                _check_value(f"scale of {part} {block}", one)


def at(scale: Scale, path: str) -> float | list[float]:
    """The scale of the cross-attention at this path."""
    if isinstance(scale, Mapping):
        part, block, attention = _place(path)
        scale = scale.get(part, 0.0)
        if isinstance(scale, Mapping):
            scale = scale.get(block, 0.0)
        if isinstance(scale, list):
            scale = scale[int(attention) if len(scale) > 1 else 0]
    return [*scale] if isinstance(scale, list) else scale


def _place(path: str) -> tuple[str, str, str]:
    """Part, block and number of the attention; the middle is one block."""
    found = _PATH.match(path)
    if found is None:
        raise ValueError(f"{path} is in no block that a scale can name; want one number")
    return found[1] or found[3], f"block_{found[2] or 0}", found[4]


def _check_value(what: str, value) -> None:
    if isinstance(value, list) and value:
        for one in value:
            _check_value(what, one if not isinstance(one, list) else None)
    elif not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{what}: want a finite number, or a list of them, got {value!r}")

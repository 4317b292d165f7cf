"""PEFT's LoKr: one decompose_factor for all layers, from which it computes each one's shapes."""

import dataclasses
import math

from lorakern.formats import algorithms
from lorakern.formats.base import Layer, shorten


def decomposition(layers: list[Layer]) -> tuple[list[Layer], dict]:
    """The layers at the ranks with which PEFT makes factors of their shapes; its settings.

    Raises:
        ValueError: no setting makes all of them, or a weight's shape is not known.
    """
    unknown = [layer.path for layer in layers if layer.weight is None]
    if unknown:
        raise ValueError(
            f"PEFT computes LoKr's shapes from the weights of {shorten(unknown, 3)}: pass model="
        )
    layers = [_at_rank(layer) for layer in layers]
    both = any("c_up" in layer.tensors for layer in layers)
    misfits: dict[int, list[str]] = {}
    for factor in (-1, *sorted({n for la in layers for n in _sides(la)})):
        misfits[factor] = [la.path for la in layers if not _is_cut(la, factor, both)]
        if not misfits[factor]:
            return layers, {"decompose_factor": factor, "decompose_both": both}
    nearest = min(misfits.values(), key=len)
    raise ValueError(
        "PEFT cuts every layer's LoKr by one rule, and no decompose_factor gives the factors of"
        f" {len(nearest)} of {len(layers)} layers: {shorten(nearest, 5)}; save as kohya"
    )


def _sides(layer: Layer) -> tuple[int, int, int, int]:
    """Rows of C and D, columns of C and D."""
    rows, width = layer.weight[:2]
    (a, _), (b, _) = algorithms.kron_dims(layer.tensors)
    return a, rows // a, b, width // b


def _at_rank(layer: Layer) -> Layer:
    """Two whole factors have no rank of their own; PEFT leaves them whole from half a side on."""
    if not {"c", "d"} <= layer.tensors.keys():
        return layer
    rank = max(layer.rank, math.ceil(max(_sides(layer)) / 2))
    alpha = layer.plain_alpha * rank / layer.rank
    return dataclasses.replace(layer, rank=rank, alpha=alpha, rslora=False)


def _is_cut(layer: Layer, factor: int, both: bool) -> bool:
    """Whether PEFT's rule gives this layer the factors that it has."""
    rows, width = layer.weight[:2]
    a, p, b, q = _sides(layer)
    low_c, low_d = both and layer.rank < max(a, b) / 2, layer.rank < max(p, q) / 2
    return (
        (_split(rows, factor), _split(width, factor)) == ((a, p), (b, q))
        and low_c == ("c_up" in layer.tensors)
        and low_d == ("d_up" in layer.tensors)
    )


def _split(n: int, factor: int) -> tuple[int, int]:
    """(factor, n / factor), or the divisor nearest to √n from below, under a positive factor."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    most = math.isqrt(n) if factor < 0 else min(factor, math.isqrt(n))
    divisor = max(d for d in range(1, most + 1) if n % d == 0)
    return divisor, n // divisor

"""What each algorithm's factors are in files and here: names, shapes on a weight, exact rewritings.

A factor's name is the adapter's parameter: `down...` has the rank as its first dim, `up...` as its
second, `core...` (Tucker's) as both. Shapes are the adapter's, whatever a file lays out otherwise.
"""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

# LyCORIS's names, and PEFT's
HADAMARD = {
    "hada_w1_a": "up1", "hada_w1_b": "down1", "hada_t1": "core1",
    "hada_w2_a": "up2", "hada_w2_b": "down2", "hada_t2": "core2",
}  # fmt: skip
KRONECKER = {
    "lokr_w1": "c", "lokr_w1_a": "c_up", "lokr_w1_b": "c_down",
    "lokr_w2": "d", "lokr_w2_a": "d_up", "lokr_w2_b": "d_down", "lokr_t2": "d_core",
}  # fmt: skip
_C = ({"c"}, {"c_up", "c_down"})
_D = ({"d"}, {"d_up", "d_down"}, {"d_up", "d_down", "d_core"})
_LOHA = {"down1", "up1", "down2", "up2"}
# the factors that make a layer, and no others
WHOLE = {
    "lora": ({"down", "up"}, {"down", "up", "core"}),
    "loha": (_LOHA, _LOHA | {"core1", "core2"}),
    "lokr": tuple(c | d for c in _C for d in _D),
}
# with this core a file has that factor transposed
_FLIPPED = {"core1": "up1", "core2": "up2", "d_core": "d_up"}
# core -> the down it can be multiplied into, with no change of the product
_FOLDED = {"core": "down", "core1": "down1", "core2": "down2", "d_core": "d_down"}


def algo_of(factors: Collection[str]) -> str | None:
    """The algorithm of which these factors make a whole layer, or None."""
    return next((algo for algo, sets in WHOLE.items() if set(factors) in sets), None)


def rank_of(tensors: Mapping[str, Tensor], called: Mapping[str, str]) -> int | None:
    """The rank that all factors share; None when none has one, as two whole Kronecker factors.

    Args:
        called: factor -> its name in messages.

    Raises:
        ValueError: two factors contradict each other, or the rank is 0.
    """
    ranks = {
        (factor, dim): tensor.shape[dim]
        for factor, tensor in tensors.items()
        for dim in _rank_dims(factor)
    }
    if len(set(ranks.values())) > 1 or 0 in ranks.values():
        ranked = dict.fromkeys(factor for factor, _ in ranks)
        shapes = " and ".join(
            f"{called[factor]} {list(tensors[factor].shape)}" for factor in ranked
        )
        raise ValueError(f"{shapes} share no rank of at least 1")
    return next(iter(ranks.values()), None)


def _rank_dims(factor: str) -> tuple[int, ...]:
    for word, dims in (("down", (0,)), ("up", (1,)), ("core", (0, 1))):
        if word in factor:
            return dims
    return ()


def check_cores(tensors: Mapping[str, Tensor], called: Mapping[str, str]) -> None:
    """Raises ValueError when a core is no kernel, or lora's down beside one has its own."""
    for core, down in _FOLDED.items():
        if core not in tensors:
            continue
        shapes = [tensors[factor].shape for factor in (core, down)]
        if len(shapes[0]) != 4 or math.prod(shapes[1][2:]) != 1:
            got = " and ".join(f"{called[f]} {list(tensors[f].shape)}" for f in (core, down))
            raise ValueError(f"want a core [R, R, kh, kw] and a down [R, I] beside it, got {got}")


def flip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Factors from a file's layout to the adapter's, or back: beside a core, up is transposed."""
    turned = {up for core, up in _FLIPPED.items() if core in tensors}
    return {f: t.mT if f in turned and t.ndim == 2 else t for f, t in tensors.items()}


def is_tucker(tensors: Mapping[str, Tensor]) -> bool:
    return not _FOLDED.keys().isdisjoint(tensors)


def untuck(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same update at the same rank without a core: Σ_j core[i, j, kh, kw] down[j, :]."""
    flat = dict(tensors)
    for core, down in _FOLDED.items():
        if core in flat:
            kernel, inner = flat.pop(core), flat[down]
            folded = torch.einsum("ijkl,jc->ickl", kernel.double(), inner.double().flatten(1))
            folded = folded if core == "core" else folded.flatten(1)
            flat[down] = folded.to(inner.dtype)
    return flat


def rescaled(tensors: Mapping[str, Tensor], by: float) -> dict[str, Tensor]:
    """The factors of an update `by` times as large: one of them is multiplied."""
    first = next(f for f in ("up", "up1", "c", "c_up") if f in tensors)
    return dict(tensors) | {first: (tensors[first].double() * by).to(tensors[first].dtype)}


def columns(tensors: Mapping[str, Tensor]) -> int:
    """in_features of a Linear, from its factors."""
    if "down" in tensors:
        return tensors["down"].shape[1]
    if "down1" in tensors:
        return tensors["down1"].shape[1]
    return math.prod(kron_dims(tensors)[1])


def kron_dims(tensors: Mapping[str, Tensor]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows of C, of D), (columns of C, of D); a flat D's columns count its kernel."""
    rows, cols = [], []
    for whole in ("c", "d"):
        up, down = (tensors.get(whole, tensors.get(f"{whole}_{end}")) for end in ("up", "down"))
        rows.append(up.shape[0])
        cols.append(down.shape[1])
    return tuple(rows), tuple(cols)


def fit(
    tensors: Mapping[str, Tensor],
    rank: int,
    weight: torch.Size,
    embedding: bool,
    called: Mapping[str, str],
) -> dict[str, Tensor]:
    """The factors in the shapes that an adapter on a weight [O, I / groups, ...] has.

    Args:
        called: factor -> its name in messages.

    Raises:
        ValueError: one of them has another shape, or C and D do not multiply to the weight's.
    """
    if math.prod(weight[2:]) == 1:
        tensors = untuck(tensors)
    want = _shapes(tensors, rank, weight, embedding, called)
    fitted = {}
    for factor, tensor in tensors.items():
        shapes = want[factor] if factor == "magnitude" else [want[factor]]
        for shape in shapes:
            # a 1 x 1 convolution and a linear layer have the same factors, flat or not
            if tensor.shape[:2] == shape[:2] and tensor.numel() == math.prod(shape):
                fitted[factor] = tensor.reshape(shape)
                break
        else:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{called[factor]} want {wanted}, got {list(tensor.shape)}")
    return fitted


def _shapes(tensors, rank: int, weight: torch.Size, embedding: bool, called) -> dict:
    rows, width, *kernel = weight
    if embedding:
        return {"down": (rank, rows), "up": (width, rank)}
    window, core = math.prod(kernel), (rank, rank, *kernel)
    shapes = {
        "up": (rows, rank, *(1 for _ in kernel)),
        "down": (rank, width, *(1 if "core" in tensors else k for k in kernel)),
        "up1": (rows, rank), "down1": (rank, width * (1 if "core1" in tensors else window)),
        "core": core, "core1": core, "core2": core, "d_core": core,
        "magnitude": [(rows, 1, *(1 for _ in kernel)), (1, width, *(1 for _ in kernel))],
    }  # fmt: skip
    shapes["up2"], shapes["down2"] = shapes["up1"], shapes["down1"]
    if algo_of(tensors.keys() - {"magnitude"}) == "lokr":
        shapes |= _kron_shapes(tensors, rank, weight, called)
    return shapes


def _kron_shapes(tensors, rank: int, weight: torch.Size, called) -> dict[str, tuple[int, ...]]:
    rows, width, *kernel = weight
    (a, p), (b, q) = kron_dims(tensors)
    # without a core a low-rank D has its kernel in the columns
    window = 1 if {"d", "d_core"} & tensors.keys() else math.prod(kernel)
    if a * p != rows or b * q != width * window or width % b:
        factors = (f"{called[f]} {list(t.shape)}" for f, t in tensors.items() if f != "magnitude")
        raise ValueError(
            f"{', '.join(factors)} multiply to {a * p} rows and {b * q} columns,"
            f" and the weight is {list(weight)}"
        )
    q = width // b
    return {
        "c": (a, b), "c_up": (a, rank), "c_down": (rank, b),
        "d": (p, q, *kernel), "d_up": (p, rank), "d_down": (rank, q * window),
    }  # fmt: skip

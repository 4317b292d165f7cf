"""The shapes of LoKr's factors: by the rule of LyCORIS or PEFT, or as a file has them."""

from math import prod

STYLES = ("lycoris", "peft")
# whole, or a product; of D with or without a core
_C = ({"c"}, {"c_up", "c_down"})
_D = ({"d"}, {"d_up", "d_down"}, {"d_core", "d_up", "d_down"})


def split(n: int, factor: int = -1, style: str = "lycoris") -> tuple[int, int]:
    """Two whole numbers with product n, the first of A·P.

    factor: the first of the two where it divides n; else, or -1, the last step of a walk over
        the divisors of n from 1 up while their sum shrinks and, of a factor, none is over it.
    style: "lycoris" puts the smaller one first; "peft" leaves a factor that divides n first.

    Raises:
        ValueError: factor is neither -1 nor at least 1.
    """
    if not isinstance(factor, int) or factor == 0 or factor < -1:
        raise ValueError(f"factor must be -1 or at least 1, got {factor!r}")
    if factor > 0 and n % factor == 0:
        pair = factor, n // factor
        return pair if style == "peft" else (min(pair), max(pair))
    first = 1
    for m in (d for d in range(2, n) if n % d == 0):
        if m + n // m > first + n // first or m > (n if factor < 0 else factor):
            break
        first = m
    return min(first, n // first), max(first, n // first)


def by_rule(
    weight: list[int], rank: int, *, factor: int, style: str, decompose_both: bool,
    full_matrix: bool, unbalanced: bool, tucker: bool,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """{factor name: shape} for a weight [O, I / groups, ...]; see Lokr."""
    (B, Q), (A, P) = split(weight[1], factor, style), split(weight[0], factor, style)
    if unbalanced:
        A, P = P, A
    kernel = tuple(weight[2:])
    if decompose_both and rank < max(A, B) / 2 and not full_matrix:
        shapes = {"c_up": (A, rank), "c_down": (rank, B)}
    else:
        shapes = {"c": (A, B)}
    if full_matrix or rank >= max(P, Q) / 2:
        return shapes | {"d": (P, Q, *kernel)}
    if tucker and any(k > 1 for k in kernel):
        core = {"d_core": (rank, rank, *kernel)}
        return shapes | core | {"d_up": (P, rank), "d_down": (rank, Q)}
    return shapes | {"d_up": (P, rank), "d_down": (rank, Q * prod(kernel))}


def checked(
    shapes: dict[str, list[int]], weight: list[int], rank: int
) -> dict[str, tuple[int, ...]]:
    """The shapes as tuples.

    Raises:
        ValueError: a factor is missing or too much, ranks differ, or C ⊗ D has not the weight's
            shape.
    """
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    c, d = ({n for n in shapes if n.startswith(which)} for which in "cd")
    if c | d != set(shapes) or c not in _C or d not in _D:
        raise ValueError(
            "want c, or c_up and c_down; and d, or d_up and d_down, or these and d_core;"
            f" got {', '.join(shapes) or 'none'}"
        )
    said = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    kernel, dims = weight[2:], {"d": len(weight), "d_core": len(weight)}
    if any(len(shape) != dims.get(name, 2) for name, shape in shapes.items()):
        raise ValueError(f"a factor has too many or too few dims for weight {weight}: {said}")
    A, B = shapes["c"] if "c" in c else (shapes["c_up"][0], shapes["c_down"][1])
    P, Q = shapes["d"][:2] if "d" in d else (shapes["d_up"][0], shapes["d_down"][1])
    ranks = {s for n in ("c", "d") if f"{n}_up" in shapes
             for s in (shapes[f"{n}_up"][1], shapes[f"{n}_down"][0])}  # fmt: skip
    if "d_core" in d:
        ranks |= set(shapes["d_core"][:2])
    if ranks - {rank}:
        raise ValueError(f"want rank {rank} in every low-rank factor, got {said}")
    pixels = shapes.get("d_core", shapes.get("d", weight))[2:]
    flat = d == {"d_up", "d_down"}
    columns = B * Q if flat else B * Q * prod(pixels)
    if weight[0] != A * P or columns != prod(weight[1:]) or list(pixels) != kernel:
        raise ValueError(f"factors {said} do not multiply to weight {weight}")
    return shapes

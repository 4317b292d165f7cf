"""LoKr: ΔW = (alpha / rank)·C ⊗ D, ⊗ Kronecker. LyCORIS, Yeh et al. 2023, arXiv:2309.14859."""

import math

import torch
from torch import Tensor, nn

from lorakern.adapters import lokr_shapes
from lorakern.adapters.base import register
from lorakern.adapters.output_dropout import OutputDropout
from lorakern.adapters.tucker import tucker
from lorakern.functional import kron_delta, kron_linear


@register("lokr")
class Lokr(OutputDropout):
    """A layer with a Kronecker update: y = layer(x; W + scale·C ⊗ D).

    With O = A·P and I / groups = B·Q, the factors are `c` [A, B], or `c_up` [A, R] and `c_down`
    [R, B]; and `d` [P, Q, kh, kw] (a Linear's [P, Q]), or `d_up` [P, R] and `d_down` [R, Q·kh·kw],
    or with `tucker` on a kernel of more than one pixel `d_core` [R, R, kh, kw], `d_up` [P, R],
    `d_down` [R, Q]. A fresh adapter changes nothing: in style "lycoris" d or d_down is zero, in
    "peft" c or c_up.

    Args:
        base, name, rank, alpha, rslora, dtype, dropout, and the options of every update: as
            OutputDropout's.
        factor: the split of O and I: A = factor where it divides; -1 is near the root.
        style: "lycoris" orders A ≤ P, B ≤ Q, and ignores alpha when C and D are whole: then the
            scale is the multiplier. "peft" does neither.
        decompose_both: low rank for C too, where the rank is under half its longer side.
        full_matrix: C and D whole whatever the rank.
        unbalanced_factorization: A and P change places.
        tucker: a core for the kernel's pixels (above).
        shapes: {factor: shape} that are taken as they are, as from a file; then `factor` and the
            four options before count for nothing.

    Raises:
        ValueError: as OutputDropout's; factor or style is not one of these; shapes contradict.
    """

    kinds = ("linear", "conv2d")

    def __init__(
        self,
        base: nn.Module,
        *,
        factor: int = -1,
        style: str = "lycoris",
        decompose_both: bool = False,
        full_matrix: bool = False,
        unbalanced_factorization: bool = False,
        tucker: bool = False,
        shapes: dict[str, list[int]] | None = None,
        **options,
    ):
        if style not in lokr_shapes.STYLES:
            raise ValueError(f"style is {' or '.join(lokr_shapes.STYLES)}, got {style!r}")
        self.style = style
        self.rule = dict(
            factor=factor,
            style=style,
            decompose_both=decompose_both,
            full_matrix=full_matrix,
            unbalanced=unbalanced_factorization,
            tucker=tucker,
        )
        self.shapes = shapes
        super().__init__(base, **options)

    @property
    def scaled(self) -> str:
        return "c" if "c" in self.factors else "c_up"

    def make_factors(self, layer: nn.Module, dtype: torch.dtype) -> None:
        weight = list(layer.weight.shape)
        if self.shapes is None:
            shapes = lokr_shapes.by_rule(weight, self.rank, **self.rule)
        else:
            shapes = lokr_shapes.checked(self.shapes, weight, self.rank)
        for name, shape in shapes.items():
            self.new_factor(name, shape, dtype)
            nn.init.kaiming_uniform_(getattr(self, name), a=math.sqrt(5))
        # on these all else depends: one is zero, and ΔW with it
        still = "c" if self.style == "peft" else "d"
        lower = "c_up" if self.style == "peft" else "d_down"
        if not self.use_scalar:
            nn.init.zeros_(getattr(self, still if still in shapes else lower))

    def strength(self, alpha: float) -> float:
        whole = "c" in self.factors and "d" in self.factors
        return 1.0 if whole and self.style == "lycoris" else super().strength(alpha)

    def delta(self, f: dict[str, Tensor], scale: float | Tensor) -> Tensor:
        return kron_delta(*_whole(f), scale)

    def row_terms(self, w: Tensor, f: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        c, d = _whole(f)
        w_APBQ = w.flatten(1).view(c.shape[0], d.shape[0], c.shape[1], d.shape[1])
        cross_AP = (torch.einsum("apbq,pq->apb", w_APBQ, d) * c[:, None]).sum(2)
        square_AP = c.square().sum(1)[:, None] * d.square().sum(1)
        return cross_AP.flatten(), square_AP.flatten()

    def linear(self, x, weight, bias, f, scale, gain):
        c = (f["c"], None) if "c" in f else (f["c_up"], f["c_down"])
        d = (f["d"].flatten(1), None) if "d" in f else (f["d_up"], f["d_down"])
        return kron_linear(x, weight, bias, *c, *d, scale, gain)


def _whole(f: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """C [A, B] and D [P, Q·kh·kw]"""
    c = f["c"] if "c" in f else f["c_up"] @ f["c_down"]
    if "d_core" in f:
        return c, tucker(f["d_core"], f["d_up"], f["d_down"]).flatten(1)
    return c, f["d"].flatten(1) if "d" in f else f["d_up"] @ f["d_down"]

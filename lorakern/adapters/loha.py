"""LoHa: ΔW = (alpha / rank)·(up1 down1) ∘ (up2 down2), ∘ by elements. LyCORIS, arXiv:2309.14859.

FedPara, Hyeon-Woo et al. 2022, arXiv:2108.06098.
"""

import math

import torch
from torch import Tensor, nn

from lorakern.adapters.base import register
from lorakern.adapters.output_dropout import OutputDropout
from lorakern.adapters.tucker import tucker
from lorakern.functional import hada_delta, hada_linear


@register("loha")
class Loha(OutputDropout):
    """A layer with a Hadamard update: y = layer(x; W + scale·(up1 down1) ∘ (up2 down2)).

    Factors: Linear down1, down2 [R, I], up1, up2 [O, R]; Conv2d with I / groups · kh · kw for I.
    With `tucker` on a Conv2d of more than one pixel: core1, core2 [R, R, kh, kw], down1, down2
    [R, I / groups], and (core1 up1 down1) ∘ (core2 up2 down2). A fresh adapter changes nothing.

    Args:
        base, name, rank, alpha, rslora, dtype, dropout, and the options of every update: as
            OutputDropout's.
        tucker: a core for the kernel's pixels (above); a Linear and a 1 x 1 kernel have none.
        style: how it starts. "lycoris": downs N(0, 1), the rest N(0, 0.1), up2 0. "peft": each
            factor uniform within 1 / √fan_in, down2 0.

    Raises:
        ValueError: as OutputDropout's; style is neither.
    """

    kinds = ("linear", "conv2d")
    scaled = "up1"

    def __init__(self, base: nn.Module, *, tucker: bool = False, style: str = "lycoris", **options):
        if style not in ("lycoris", "peft"):
            raise ValueError(f"style is lycoris or peft, got {style!r}")
        self.tucker, self.style = tucker, style
        super().__init__(base, **options)

    def make_factors(self, layer: nn.Module, dtype: torch.dtype) -> None:
        (rows, columns, *kernel), rank = layer.weight.shape, self.rank
        cored = self.tucker and any(k > 1 for k in kernel)
        if not cored:
            columns = layer.weight[0].numel()
        for i in (1, 2):
            if cored:
                self.new_factor(f"core{i}", (rank, rank, *kernel), dtype)
            self.new_factor(f"down{i}", (rank, columns), dtype)
            self.new_factor(f"up{i}", (rows, rank), dtype)
        for name in self.factors:
            factor = getattr(self, name)
            if self.style == "peft":
                # beside a core PEFT holds up as [R, O]
                fan_out = cored and name.startswith("up")
                nn.init.kaiming_uniform_(factor.mT if fan_out else factor, a=math.sqrt(5))
            else:
                nn.init.normal_(factor, std=1.0 if name.startswith("down") else 0.1)
        if not self.use_scalar:
            nn.init.zeros_(self.down2 if self.style == "peft" else self.up2)

    def delta(self, f: dict[str, Tensor], scale: float | Tensor) -> Tensor:
        if "core1" in f:
            first, second = (tucker(f[f"core{i}"], f[f"up{i}"], f[f"down{i}"]) for i in (1, 2))
            return scale * first * second
        return hada_delta(f["down1"], f["up1"], f["down2"], f["up2"], scale)

    def row_terms(self, w: Tensor, f: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        # the identity of rank R² costs R / 2 times the products of ΔW: some rows of ΔW at a time
        cross, square = [], []
        for at in range(0, len(w), step := max(1, 2**20 // w.shape[1])):
            rows = slice(at, at + step)
            delta = hada_delta(f["down1"], f["up1"][rows], f["down2"], f["up2"][rows], 1.0)
            cross.append((w[rows] * delta).sum(1))
            square.append(delta.square().sum(1))
        return torch.cat(cross), torch.cat(square)

    def linear(self, x, weight, bias, f, scale, gain):
        factors = f["down1"], f["up1"], f["down2"], f["up2"]
        return hada_linear(x, weight, bias, *factors, scale, gain)

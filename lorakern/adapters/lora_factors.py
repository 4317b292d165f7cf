"""The factors of a LoRA: their shapes and first values, and what ΔW is of them."""

import math
import warnings

import torch
from torch import Tensor, nn

from lorakern.adapters import layers, lora_start
from lorakern.adapters.tucker import tucker
from lorakern.adapters.update import Update
from lorakern.functional import lora_delta, lora_linear


class LowRank(Update):
    """An update of `down`, `up` and perhaps `core`; shapes, options and errors: see Lora."""

    scaled = "up"
    tucker: bool
    init: str
    freeze_down: bool
    recompute: bool

    def make_factors(self, layer: nn.Module, dtype: torch.dtype) -> None:
        (rows, *rest), rank = layer.weight.shape, self.rank
        full_rank = min(rows, math.prod(rest))
        if rank > full_rank:
            warnings.warn(
                f"rank {rank} is over {full_rank}, the full rank of a weight"
                f" {list(layer.weight.shape)}",
                stacklevel=4,
            )
        shapes = (rank, *rest), (rows, rank, *(1 for _ in rest[1:]))
        if self.kind == "embedding":
            shapes = (rank, rows), (rest[0], rank)
        elif self.tucker and any(k > 1 for k in rest[1:]):
            self.new_factor("core", (rank, rank, *rest[1:]), dtype)
            nn.init.kaiming_uniform_(self.core, a=math.sqrt(5))
            shapes = (rank, rest[0], 1, 1), shapes[1]
        self.new_factor("down", shapes[0], dtype)
        self.new_factor("up", shapes[1], dtype)
        first, last = self.down, self.up
        if self.kind == "embedding":
            first, last = last, first
            nn.init.normal_(first)
        elif self.freeze_down:
            nn.init.normal_(first, std=math.sqrt(2 / (math.prod(rest) + rank)))
        else:
            nn.init.kaiming_uniform_(first, a=math.sqrt(5))
        if self.use_scalar:
            nn.init.kaiming_uniform_(last, a=math.sqrt(5))
        else:
            nn.init.zeros_(last)

    @torch.no_grad()
    def _start(self) -> None:
        weight = self.root.weight.to(layers.widest(self.root.weight.dtype)).flatten(1)
        down, up = lora_start.factors(self.init, weight, self.rank, self.strength(self.alpha))
        self.down.copy_(down.view_as(self.down))
        self.up.copy_(up.reshape(self.up.shape))
        # as the factors' dtype has them, so that the two halves cancel
        self.register_buffer("down_start", self.down.detach().clone())
        self.register_buffer("up_start", self.up.detach().clone())
        self._look_around()

    def fold(self, f: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.init != "default":
            return lora_start.both_halves(f, self.down_start, self.up_start)
        return super().fold(f)

    def exported(self):
        f, rank, alpha = super().exported()
        if self.init != "default":
            rank, alpha = 2 * rank, alpha * (math.sqrt(2) if self.rslora else 2)
        return f, rank, alpha

    def delta(self, f: dict[str, Tensor], scale: float | Tensor) -> Tensor:
        down, up = f["down"].flatten(1), f["up"].flatten(1)
        if "core" in f:
            return scale * tucker(f["core"], up, down)
        delta = lora_delta(down, up, scale)
        return delta.mT if self.kind == "embedding" else delta

    def row_terms(self, w: Tensor, f: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        down, up = f["down"].flatten(1), f["up"].flatten(1)
        return ((w @ down.mT) * up).sum(1), ((up @ (down @ down.mT)) * up).sum(1)

    def linear(self, x, weight, bias, f, scale, gain):
        down, up = f["down"].flatten(1), f["up"].flatten(1)
        return lora_linear(x, weight, bias, down, up, scale, gain, self.recompute)

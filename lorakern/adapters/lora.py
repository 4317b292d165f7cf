"""LoRA: ΔW = (alpha / rank)·up down. Hu et al. 2021, arXiv:2106.09685.

On a convolution `down` is k x k and `up` 1 x 1; on an embedding `down` is looked up.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakern.adapters import dropout as drop
from lorakern.adapters import layers
from lorakern.adapters.base import register
from lorakern.adapters.one_call import one_call
from lorakern.adapters.tucker import tucker
from lorakern.adapters.update import Update
from lorakern.functional import lora_delta, lora_linear


@register("lora")
class Lora(Update):
    """A layer with a low-rank update: y = layer(x; W + scale·up down).

    Factors: Linear down [R, I], up [O, R]; Conv2d down [R, I / groups, kh, kw], shared by the
    groups, up [O, R, 1, 1]; Embedding down [R, num_embeddings], up [embedding_dim, R]. With
    `tucker` on a kernel of more than one pixel core [R, R, kh, kw], down [R, I / groups, 1, 1].
    A fresh adapter changes nothing: up is zero (down on an embedding).

    Args:
        base, name, rank, alpha, rslora, dtype, and the options of every update: as Update's.
        tucker: a core for the kernel's pixels (above); a Linear and a 1 x 1 kernel have none.
        dropout: probability of a zero in training, 0 to below 1; no unit.
        dropout_mode: "peft" drops the input of down, "kohya" its output.

    Raises:
        ValueError: as Update's; or dropout of the input of an embedding, which is indices.
    """

    scaled = "up"

    def __init__(
        self,
        base: nn.Module,
        *,
        tucker: bool = False,
        dropout: float = 0.0,
        dropout_mode: str = "peft",
        **options,
    ):
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a probability from 0 to below 1, got {dropout!r}")
        if dropout_mode not in drop.MODES:
            raise ValueError(f"dropout_mode is {' or '.join(drop.MODES)}, got {dropout_mode!r}")
        self.tucker = tucker
        super().__init__(base, **options)
        if dropout and dropout_mode == "kohya" and self.dora:
            raise ValueError('kohya has no dora; use dropout_mode="peft"')
        if dropout and dropout_mode == "peft" and self.kind == "embedding":
            raise ValueError('an embedding has indices for input; use dropout_mode="kohya"')
        self.dropout, self.dropout_mode = dropout, dropout_mode

    def make_factors(self, layer: nn.Module, dtype: torch.dtype) -> None:
        weight, rank = layer.weight, self.rank
        rows, *rest = weight.shape
        full_rank = min(rows, math.prod(rest))
        if rank > full_rank:
            warnings.warn(
                f"rank {rank} is over {full_rank}, the full rank of a weight {list(weight.shape)}",
                stacklevel=3,
            )
        ones = tuple(1 for _ in rest[1:])
        cored = self.tucker and any(k > 1 for k in rest[1:])
        if cored:
            self.new_factor("core", (rank, rank, *rest[1:]), dtype)
            nn.init.kaiming_uniform_(self.core, a=math.sqrt(5))
        if self.kind == "embedding":
            shapes = (rank, rows), (rest[0], rank)
        else:
            shapes = (rank, rest[0], *ones) if cored else (rank, *rest), (rows, rank, *ones)
        self.new_factor("down", shapes[0], dtype)
        self.new_factor("up", shapes[1], dtype)
        last, first = (self.down, self.up) if self.kind == "embedding" else (self.up, self.down)
        if self.kind == "embedding":
            nn.init.normal_(first)
        else:
            nn.init.kaiming_uniform_(first, a=math.sqrt(5))
        if self.use_scalar:
            nn.init.kaiming_uniform_(last, a=math.sqrt(5))
        else:
            nn.init.zeros_(last)

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
        return lora_linear(x, weight, bias, down, up, scale, gain)

    def _look_around(self) -> None:
        super()._look_around()
        # the slim forward knows down and up alone
        self._alone = self._alone and self.factors == ("down", "up")

    def forward(self, input: Tensor) -> Tensor:
        # one op call is all there is to do: the shortest way there
        if self._alone and not (self.dropout and self.training):
            try:
                own, layer = self._parameters, self._modules["base"]._parameters
                weight, down, up = layer["weight"], own["down"], own["up"]
            except KeyError:
                # a replica of DataParallel holds its tensors elsewhere
                return super().forward(input)
            dtype = input.dtype
            if not torch._C._is_any_autocast_enabled():
                if down.dtype is not dtype or up.dtype is not dtype:
                    down, up = down.to(dtype), up.to(dtype)
                return lora_linear(input, weight, layer["bias"], down, up, self.live_scale())
        return super().forward(input)

    def delta_output(self, x: Tensor) -> Tensor | None:
        layer, p = self.root, self.dropout if self.training else 0.0
        if not p and self.kind != "embedding":
            return None
        wide = layers.widest(layer.weight.dtype)
        if self.dora or self.tucker:
            return layers.run(layer, F.dropout(x, p), self.delta_weight(), None)
        up = self.folded(wide)["up"]
        if self.kind == "embedding":
            h = layers.run(layer, x, self.down.mT, None).to(wide)
            return self.live_scale() * F.linear(F.dropout(h, p), up)
        on_x, on_h = (p, 0.0) if self.dropout_mode == "peft" else (0.0, p)
        h = drop.shrink(layer, F.dropout(x, on_x), self.down.to(wide))
        return self.live_scale() * drop.expand(layer, F.dropout(h, on_h), up)

    @classmethod
    def fused(cls, adapters, layer, x, weight, bias):
        if any(a.dora or "core" in a.factors for a in adapters):
            dropped = any(a.dropout and a.training for a in adapters)
            return None if dropped else super().fused(adapters, layer, x, weight, bias)
        return one_call(adapters, layer, x, weight, bias)


@register("dora")
class DoraLora(Lora):
    """DoRA: a LoRA with `dora=True`. Liu et al. 2024, arXiv:2402.09353."""

    kinds = ("linear", "conv2d")

    def __init__(self, base: nn.Module, **options):
        super().__init__(base, **{"dora": True, **options})

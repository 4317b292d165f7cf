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
from lorakern.adapters.base import Adapter, register
from lorakern.adapters.one_call import one_call
from lorakern.functional import lora_linear


@register("lora")
class Lora(Adapter):
    """A layer with a low-rank update: y = layer(x; W + scale·up down).

    Factors: Linear down [R, I], up [O, R]; Conv2d down [R, I / groups, kh, kw], shared by the
    groups, up [O, R, 1, 1]; Embedding down [R, num_embeddings], up [embedding_dim, R]. A fresh
    adapter changes nothing: up is zero (down on an embedding).

    Args:
        base, name, rank, alpha, rslora, dtype: as Adapter's.
        dropout: probability of a zero in training, 0 to below 1; no unit.
        dropout_mode: "peft" drops the input of down, "kohya" its output.

    Raises:
        ValueError: as Adapter's; or dropout of the input of an embedding, which is indices.
    """

    factors = ("down", "up")

    def __init__(
        self,
        base: nn.Module,
        *,
        name: str = "default",
        rank: int = 16,
        alpha: float | None = None,
        rslora: bool = False,
        dtype: torch.dtype | None = None,
        dropout: float = 0.0,
        dropout_mode: str = "peft",
    ):
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a probability from 0 to below 1, got {dropout!r}")
        if dropout_mode not in drop.MODES:
            raise ValueError(f"dropout_mode is {' or '.join(drop.MODES)}, got {dropout_mode!r}")
        super().__init__(base, name=name, rank=rank, alpha=alpha, rslora=rslora, dtype=dtype)
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
        if self.kind == "embedding":
            shapes = (rank, rows), (rest[0], rank)
        else:
            shapes = (rank, *rest), (rows, rank, *(1 for _ in rest[1:]))
        self.down, self.up = (
            nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device)) for shape in shapes
        )
        if self.kind == "embedding":
            nn.init.zeros_(self.down)
            nn.init.normal_(self.up)
        else:
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
            nn.init.zeros_(self.up)

    def delta_weight(self) -> Tensor:
        weight = self.root.weight
        wide = layers.widest(weight.dtype)
        up, down = self.up.to(wide).flatten(1), self.down.to(wide).flatten(1)
        delta = (up @ down).mT if self.kind == "embedding" else up @ down
        return (self.live_scale() * delta).view_as(weight)

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

    def delta_output(self, x: Tensor) -> Tensor:
        layer = self.root
        wide = layers.widest(layer.weight.dtype)
        up, p = self.up.to(wide), self.dropout if self.training else 0.0
        if self.kind == "embedding":
            h = layers.run(layer, x, self.down.mT, None).to(wide)
            return self.live_scale() * F.linear(F.dropout(h, p), up)
        on_x, on_h = (p, 0.0) if self.dropout_mode == "peft" else (0.0, p)
        h = drop.shrink(layer, F.dropout(x, on_x), self.down.to(wide))
        return self.live_scale() * drop.expand(layer, F.dropout(h, on_h), up)

    @classmethod
    def fused(cls, adapters, layer, x, weight, bias):
        return one_call(adapters, layer, x, weight, bias)

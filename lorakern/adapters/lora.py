"""LoRA: ΔW = (alpha / rank)·up down. Hu et al. 2021, arXiv:2106.09685.

On a convolution `down` is k x k and `up` 1 x 1; on an embedding `down` is looked up.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakern.adapters import dropout as drop
from lorakern.adapters import layers, lora_start
from lorakern.adapters.base import register
from lorakern.adapters.masks import MODES, Masks
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
    A fresh adapter changes nothing: up is zero (down on an embedding), or see `init`.

    Args:
        base, name, rank, alpha, rslora, dtype, and the options of every update: as Update's.
        tucker: a core for the kernel's pixels (above); a Linear and a 1 x 1 kernel have none.
        init: "default", or "pissa" or "olora" to start from the weight; see lora_start.
        freeze_down: LoRA-FA: down is N(0, √(2 / (I + R))) and does not train.
        dropout: probability of a zero in training, 0 to below 1; no unit.
        dropout_mode: what `dropout` and `rank_dropout` drop: "peft", "kohya", "lycoris" or
            "bypass"; see masks.

    Raises:
        ValueError: as Update's; or options that no source has together.
    """

    scaled = "up"

    def __init__(
        self,
        base: nn.Module,
        *,
        tucker: bool = False,
        init: str = "default",
        freeze_down: bool = False,
        dropout: float = 0.0,
        dropout_mode: str = "peft",
        **options,
    ):
        self.tucker, self.init, self.freeze_down = tucker, init, freeze_down
        super().__init__(base, **options)
        self.dropout, self.dropout_mode = dropout, dropout_mode
        if reason := self._refusal():
            raise ValueError(reason)
        if init != "default":
            self._start()
        self.down.requires_grad_(not freeze_down)

    def _refusal(self) -> str | None:
        p, mode, started = self.dropout, self.dropout_mode, self.init != "default"
        if self.init not in lora_start.STARTS:
            return f"init is {' or '.join(lora_start.STARTS)}, got {self.init!r}"
        if not 0 <= p < 1:
            return f"dropout is a probability from 0 to below 1, got {p!r}"
        if mode not in MODES:
            return f"dropout_mode is {' or '.join(MODES)}, got {mode!r}"
        if p and mode == "peft" and self.kind == "embedding":
            return 'an embedding has indices for input; use dropout_mode="kohya"'
        if p and mode == "lycoris":
            return 'LyCORIS drops nothing here without bypass_mode; use dropout_mode="bypass"'
        if self.rank_dropout and mode == "peft":
            return "PEFT's LoRA has no rank_dropout; choose another dropout_mode"
        if (
            (p or self.rank_dropout)
            and (self.dora or "core" in self.factors)
            and not (mode == "lycoris" or (mode == "peft" and p))
        ):
            return f"dora and tucker go with dropout_mode peft or lycoris, not {mode}"
        if self.rank_dropout and self.kind == "embedding":
            return "no source defines rank_dropout on an embedding"
        if started and (p or self.use_scalar or self.tucker or self.kind == "embedding"):
            return f"init={self.init!r} goes without dropout, scalar, tucker and embeddings"
        if self.freeze_down and (started or self.kind == "embedding"):
            return "freeze_down goes without another init and on no embedding: its down is 0"
        return None

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
        return lora_linear(x, weight, bias, down, up, scale, gain)

    def _look_around(self) -> None:
        super()._look_around()
        # the slim forward knows down and up alone
        slim = self.factors == ("down", "up") and self.init == "default"
        self._alone = self._alone and slim and not (self.rank_dropout or self.module_dropout)

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

    # dropout

    def drops_rows(self) -> bool:
        return self.dropout_mode == "lycoris" and super().drops_rows()

    def masks(self) -> Masks | None:
        """What is dropped between x and the output now; None for nothing."""
        rank_p = 0.0 if self.dropout_mode == "lycoris" else self.rank_dropout
        if not self.training or not (self.dropout or rank_p):
            return None
        return Masks(self.dropout, self.dropout_mode, rank_p, self.rank_dropout_scale)

    def delta_output(self, x: Tensor) -> Tensor | None:
        layer, masks = self.root, self.masks()
        if masks is None and self.kind != "embedding":
            return None
        wide = layers.widest(layer.weight.dtype)
        if self.dora or "core" in self.factors:
            return layers.run(layer, masks.on("peft", x, None), self.delta_weight(), None)
        f = self.folded(wide)
        masks = masks or Masks(0.0, "kohya")
        if self.kind == "embedding":
            h = layers.run(layer, x, self.down.mT, None).to(wide)
            y = F.linear(masks.on("kohya", h, None), f["up"])
        else:
            y = drop.expand(layer, drop.kept_h(layer, x, f["down"], masks), f["up"])
        return self.live_scale() * masks.on("bypass", y, None)

    @classmethod
    def fused(cls, adapters, layer, x, weight, bias):
        if any(a.dora or "core" in a.factors for a in adapters):
            dropped = any(a.masks() for a in adapters)
            return None if dropped else super().fused(adapters, layer, x, weight, bias)
        return one_call(adapters, layer, x, weight, bias)


@register("dora")
class DoraLora(Lora):
    """DoRA: a LoRA with `dora=True`. Liu et al. 2024, arXiv:2402.09353."""

    kinds = ("linear", "conv2d")

    def __init__(self, base: nn.Module, **options):
        super().__init__(base, **{"dora": True, **options})

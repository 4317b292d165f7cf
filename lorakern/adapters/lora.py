"""LoRA: ΔW = (alpha / rank)·up down. Hu et al. 2021, arXiv:2106.09685.

On a convolution `down` is k x k and `up` 1 x 1; on an embedding `down` is looked up.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakern.adapters import dropout as drop
from lorakern.adapters import layers, lora_options
from lorakern.adapters.base import register
from lorakern.adapters.lora_factors import LowRank
from lorakern.adapters.masks import Masks
from lorakern.adapters.one_call import one_call
from lorakern.functional import lora_linear


@register("lora")
class Lora(LowRank):
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
        recompute: keep x alone for backward, not h [M, R] and dora's y; not on a k x k kernel.
        dropout: probability of a zero in training, 0 to below 1; no unit.
        dropout_mode: what `dropout` and `rank_dropout` drop: "peft", "kohya", "lycoris" or
            "bypass"; see masks.

    Raises:
        ValueError: as Update's; or options that no source has together.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        tucker: bool = False,
        init: str = "default",
        freeze_down: bool = False,
        recompute: bool = False,
        dropout: float = 0.0,
        dropout_mode: str = "peft",
        **options,
    ):
        self.tucker, self.init = tucker, init
        self.freeze_down, self.recompute = freeze_down, recompute
        super().__init__(base, **options)
        self.dropout, self.dropout_mode = dropout, dropout_mode
        if reason := lora_options.refusal(self):
            raise ValueError(reason)
        if init != "default":
            self._start()
        self.down.requires_grad_(not freeze_down)

    def _look_around(self) -> None:
        super()._look_around()
        # the slim forward knows down and up alone
        slim = self.factors == ("down", "up") and self.init == "default"
        self._alone = self._alone and slim and not (self.rank_dropout or self.module_dropout)

    def short(self, x: Tensor, own: bool = False) -> Tensor | None:
        if not self._alone or (self.dropout and self.training):
            return None
        try:
            factors, layer = self._parameters, self._modules["base"]._parameters
            weight, down, up = layer["weight"], factors["down"], factors["up"]
        except KeyError:
            # a replica of DataParallel holds its tensors elsewhere
            return None
        group = self._shared if x.is_cpu else self._text
        if group is not None and not own and (y := group.output(self, x)) is not None:
            return y
        dtypes = x.dtype, torch.float32
        if down.dtype not in dtypes or up.dtype not in dtypes:
            down, up = down.to(x.dtype), up.to(x.dtype)
        args = x, weight, layer["bias"], down, up, self.live_scale()
        return lora_linear(*args, recompute=self.recompute)

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

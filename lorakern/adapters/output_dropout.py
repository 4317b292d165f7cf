"""Dropout of an update's output in training: y = layer(x; W) + drop(layer(x; ΔW)), rounded once."""

import torch.nn.functional as F
from torch import Tensor, nn

from lorakern.adapters import layers
from lorakern.adapters.rebuilt import rebuilt
from lorakern.adapters.update import Update


class OutputDropout(Update):
    """An update that is not made of x by a low rank: its output is all that can be dropped.

    Args:
        base, name, rank, alpha, rslora, dtype, and the options of every update: as Update's.
        dropout: probability in training that a number of the update's output is 0, as in LyCORIS
            with bypass_mode; the others are divided by 1 - dropout.

    Raises:
        ValueError: as Update's; dropout is no probability, or goes with dora.
    """

    def __init__(self, base: nn.Module, *, dropout: float = 0.0, **options):
        super().__init__(base, **options)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a probability from 0 to below 1, got {dropout!r}")
        if dropout and self.dora:
            raise ValueError("dora goes without dropout: its update is no term of its own")
        self.dropout = dropout

    def _look_around(self) -> None:
        super()._look_around()
        more = self.dora or self.use_scalar or self.rank_dropout or self.module_dropout
        self._slim = self._alone and not more

    def short(self, x: Tensor, own: bool = False) -> Tensor | None:
        if not self._slim or (self.dropout and self.training):
            return None
        try:
            factors, layer = self._parameters, self._modules["base"]._parameters
            weight = layer["weight"]
            f = {name: factors[name].to(x.dtype) for name in self.factors}
        except KeyError:
            # a replica of DataParallel holds its tensors elsewhere
            return None
        return self.linear(x, weight, layer["bias"], f, self.live_scale(), None)

    def delta_output(self, x: Tensor) -> Tensor | None:
        if not (self.dropout and self.training):
            return None
        weight = self.root.weight
        nothing = weight.new_zeros((), dtype=layers.widest(weight.dtype)).expand_as(weight)
        return F.dropout(rebuilt([self], self.root, x, nothing, None), self.dropout)

    @classmethod
    def fused(cls, adapters, layer, x, weight, bias):
        if any(a.dropout and a.training for a in adapters):
            return None
        return super().fused(adapters, layer, x, weight, bias)

"""The moving average of what trains, and a look at a model that has it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import increment_version


class Average:
    """Exponential moving average of factors: a ← keep·a + (1 - keep)·f, all in one call.

    keep is `memory`, at first less: (1 + step) / (10 + step), so that the start is forgotten.

    Each step of a FlatAdamW updates the one that is its `average`; of others, `update` does.

    Args:
        factors: what is averaged.
        tensors: what holds their values: the factors, or the flat parameters that they are in.
        memory: 0 to below 1; no unit.
    """

    def __init__(self, factors: list[Tensor], tensors: list[Tensor], memory: float):
        self.factors, self.tensors = factors, [t.detach() for t in tensors]
        self.values, self.memory = [t.clone() for t in self.tensors], memory

    def update(self, step: int) -> None:
        """After an update of the weights, the `step`-th, counted from 1."""
        keep = min(self.memory, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, self.tensors, 1 - keep)

    def follow(self, i: int, step: Tensor, made: Tensor) -> None:
        """Update of the i-th tensor alone, by scalars: steps made, and 1, or 0 to leave it."""
        step = step.double()
        keep = ((1 + step) / (10 + step)).clamp(max=self.memory)
        self.values[i].lerp_(self.tensors[i], ((1 - keep) * made).to(self.values[i]))

    def load(self, values: list[Tensor]) -> None:
        """Go on from values of before."""
        torch._foreach_copy_(self.values, values)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The factors have their average within the block."""
        own = [t.clone() for t in self.tensors]
        self._put(self.values)
        try:
            yield
        finally:
            self._put(own)

    def _put(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self.tensors, values)
        increment_version(self.factors)

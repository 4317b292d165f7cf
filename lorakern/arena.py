"""Adapter factors and their gradients in flat buffers, so that a step over all is a few calls.

Some hundred small factors cost an optimizer, a norm and a clip a call each; their arithmetic is
little beside that. Here the factors are views of one buffer, and so are their gradients.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lorakern.adapters import layers

# elements; a factor begins where a tensor of its own could, and a norm is summed row by row:
# float32 over all 42 million factors of an SDXL in one row is 0.2 % off
ALIGN, ROW = 16, 1024


@dataclass(frozen=True)
class _Flat:
    """Factors of one group, device and dtype: the buffer and its gradient."""

    parameter: nn.Parameter
    grad: Tensor
    factors: list[nn.Parameter]
    # factor, its place in the buffer and that place's address, its place in the gradient
    members: list[tuple[nn.Parameter, Tensor, int, Tensor]]
    # what of the gradient lies between and behind them
    gaps: list[Tensor]

    @classmethod
    def of(cls, factors: list[nn.Parameter]) -> "_Flat":
        starts = [0]
        for factor in factors:
            starts.append(starts[-1] + _up(factor.numel(), ALIGN))
        buffer, grad = (factors[0].new_zeros(_up(starts[-1], ROW)) for _ in range(2))
        members, gaps = [], [grad[starts.pop() :]]
        for factor, start in zip(factors, starts, strict=True):
            end = start + factor.numel()
            value, slot = (b[start:end].view(factor.shape) for b in (buffer, grad))
            _take(factor, value)
            members.append((factor, value, value.data_ptr(), slot))
            gaps.append(grad[end : start + _up(factor.numel(), ALIGN)])
        gaps = [gap for gap in gaps if gap.numel()]
        return cls(nn.Parameter(buffer), grad, factors, members, gaps)

    def gather(self) -> None:
        # what scaled a gradient that is not finite was not finite
        if self.gaps:
            torch._foreach_zero_(self.gaps)
        missing, new = 0, []
        for factor, value, at, slot in self.members:
            if factor.data_ptr() != at:
                _take(factor, value)
            grad = factor.grad
            if grad is None:
                if not factor.requires_grad:
                    raise ValueError(
                        f"a factor of shape {tuple(factor.shape)} was frozen; make a new optimizer"
                    )
                slot.zero_()
                missing += 1
            elif grad is not slot:
                new.append((factor, slot, grad))
        if new:
            factors, slots, grads = zip(*new, strict=True)
            torch._foreach_copy_(slots, grads)
            for factor, slot in zip(factors, slots, strict=True):
                factor.grad = slot
        self.parameter.grad = None if missing == len(self.members) else self.grad

    def clear(self) -> None:
        self.parameter.grad = None
        for factor in self.factors:
            factor.grad = None


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _take(factor: nn.Parameter, value: Tensor) -> None:
    """Move a factor into its place, at first or when it is back from a move of its module."""
    if factor.dtype != value.dtype or factor.device != value.device:
        raise ValueError(
            f"a factor was in {value.dtype} on {value.device}, and is in {factor.dtype} on"
            f" {factor.device} now; make a new optimizer"
        )
    value.copy_(factor.detach())
    factor.data = value


class FlatAdamW(torch.optim.AdamW):
    """torch.optim.AdamW, fused, over one flat parameter a group, device and dtype.

    The factors given become views of the flat parameters; to modules, state dicts and copies they
    are what they were. Autograd makes their gradients as ever; `gather` copies them into theirs
    places in one call, and each gradient is then a view. `step` and `clip` gather. In any loop:

        optimizer = lorakern.FlatAdamW(parameter_groups(unet, lr=1e-4))
        loss.backward()
        optimizer.clip(1.0)
        optimizer.step()
        optimizer.zero_grad()

    A factor without a gradient is stepped with zeros (torch's own passes over it), unless no
    factor of its flat parameter has one. Before a GradScaler's `unscale_` call `gather`.

    Args:
        params: as torch.optim.AdamW's, without names; what does not require a gradient now is
            left out.
        lr, options: as torch.optim.AdamW's; `fused` is True when not given.

    Raises:
        ValueError: nothing trains, or a parameter is given twice. Later, from `gather`: a factor
            was frozen, or its device or dtype changed. From `step`: a closure, which would make
            gradients after they were gathered.
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, **options):
        self._flats: list[_Flat] = []
        super().__init__(params, lr, **{"fused": True, **options})
        if not self._flats:
            raise ValueError("no parameter requires a gradient")
        self.register_step_pre_hook(FlatAdamW._before_step)
        self.register_step_post_hook(FlatAdamW._after_step)

    @torch.no_grad()
    def add_param_group(self, param_group: dict) -> None:
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        if not all(isinstance(p, nn.Parameter) for p in given):
            raise ValueError("want parameters, or groups of them, without names")
        taken = {id(f) for flat in self._flats for f in flat.factors}
        if len({id(p) for p in given} - taken) < len(given):
            raise ValueError("some parameters are given more than once")
        kinds: dict[tuple, list[nn.Parameter]] = {}
        for p in given:
            if p.requires_grad:
                kinds.setdefault((p.device, p.dtype), []).append(p)
        flats = [_Flat.of(factors) for factors in kinds.values()]
        self._flats += flats
        super().add_param_group({**param_group, "params": [flat.parameter for flat in flats]})

    @property
    def flats(self) -> list[nn.Parameter]:
        """The flat parameters."""
        return [flat.parameter for flat in self._flats]

    @torch.no_grad()
    def gather(self) -> None:
        """Copy new gradients into the flat ones; nothing happens to those that are there."""
        for flat in self._flats:
            flat.gather()

    @torch.no_grad()
    def clip(self, largest: float) -> Tensor:
        """Scale the gradients down to a norm of `largest`, inf for not at all.

        Returns:
            The norm before, a scalar: the root of the sum of all squares, no unit.
        """
        self.gather()
        grads = [flat.grad for flat in self._flats if flat.parameter.grad is not None]
        if not grads:
            return torch.zeros(())
        rows = [
            torch.linalg.vector_norm(g.view(-1, ROW), dim=1, dtype=layers.widest(g.dtype))
            for g in grads
        ]
        norm = torch.linalg.vector_norm(torch.cat([r.to(rows[0]) for r in rows]))
        # a GPU is not waited for to spare it the product with 1
        if math.isfinite(largest) and not (norm.is_cpu and norm + 1e-6 <= largest):
            nn.utils.clip_grads_with_norm_(self.flats, largest, norm)
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; new ones are then not added to old but take their place."""
        for flat in self._flats:
            flat.clear()

    def _before_step(self, args: tuple, kwargs: dict) -> None:
        if any(closure is not None for closure in (*args[1:], *kwargs.values())):
            raise ValueError("step takes no closure here; call it after backward")
        self.gather()

    def _after_step(self, args: tuple, kwargs: dict) -> None:
        for flat in self._flats:
            increment_version(flat.factors)


class Average:
    """Exponential moving average of factors: a ← keep·a + (1 - keep)·f, all in one call.

    keep is `memory`, at first less: (1 + step) / (10 + step), so that the start is forgotten.

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

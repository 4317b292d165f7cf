"""Autograd of a frozen linear layer with an update of four factors: hada_linear, kron_linear."""

from collections.abc import Callable

import torch
from torch import Tensor

from lorakern import backend
from lorakern.ops import check


class _FourFactors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fwd, bwd, x, weight, bias, a, b, c, d, gain, scale):
        ctx.save_for_backward(x, weight, a, b, c, d, gain)
        ctx.bwd, ctx.scale = bwd, scale
        return fwd(x, weight, bias, a, b, c, d, scale, gain)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        *tensors, gain = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (2, 5, 6, 7, 8, 9)]
        grads = ctx.bwd(dy.contiguous(), *tensors, ctx.scale, gain, needs)
        dx, *rest = (g if need else None for g, need in zip(grads, needs, strict=True))
        return None, None, dx, None, None, *rest, None


class FourFactors:
    """Callable: (x, weight, bias, four factors, scale, gain) -> y, with its gradient.

    Args:
        fwd, bwd: the op's directions.
        whole: name of the native function that is both of cpp.
        refuse: takes (x, weight, bias, gain, *factors); raises ValueError on what does not fit.
    """

    def __init__(self, fwd: backend.Op, bwd: backend.Op, whole: str, refuse: Callable):
        self.fwd, self.bwd, self.whole, self.refuse = fwd, bwd, whole, refuse
        # by dtype of a CPU tensor; cpp does not refuse by shape, so a dtype decides
        self._whole: dict[torch.dtype, Callable | None] = backend.memory_of_picks()

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, factors: tuple[Tensor | None, ...],
        scale: float | Tensor, gain: Tensor | None,
    ) -> Tensor:  # fmt: skip
        asked = x, weight, bias, gain, *factors
        if x.is_cpu and not isinstance(scale, Tensor) and not torch.compiler.is_compiling():
            args = x, weight, bias, *factors, scale, gain
            if x.dtype not in self._whole:
                self.refuse(*asked)
                self._whole[x.dtype] = backend.whole(self.fwd, self.bwd, self.whole, *args)
            if run := self._whole[x.dtype]:
                try:
                    return run(*args)
                except (ValueError, IndexError):
                    # it looks faster than this, and says less
                    self.refuse(*asked)
                    raise
        self.refuse(*asked)
        live, x = check.live(scale), x.contiguous()
        return _FourFactors.apply(self.fwd, self.bwd, x, weight, bias, *factors, gain, live)

"""lora_linear_shared: frozen linear layers with low-rank updates that read one input."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakern import backend
from lorakern.backend import Kernel
from lorakern.ops import check
from lorakern.ops.lora_linear_shared import reference
from lorakern.ops.lora_linear_shared.arguments import check_layers, refuse_cuda, refuse_cuda_bwd
from lorakern.ops.lora_linear_shared.native import native

# no kernel for many rows on a GPU: there the layers go one by one (adapters/shared.py)
_fwd = backend.define(
    "lora_linear_shared_fwd",
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] downs, Tensor[] ups, Tensor[] scales)"
    " -> (Tensor y, Tensor h)",
    reference.lora_linear_shared_fwd,
    cpp=Kernel("native:lora_linear_shared_fwd_cpu", check.only_cpu),
    cuda=Kernel("native:lora_linear_shared_fwd_cuda", refuse_cuda),
)
_bwd = backend.define(
    "lora_linear_shared_bwd",
    "(Tensor x, Tensor h, Tensor[] dys, Tensor[] weights, Tensor[] downs, Tensor[] ups,"
    " Tensor[] scales, bool[] needs) -> (Tensor dx, Tensor ddown, Tensor dup)",
    reference.lora_linear_shared_bwd,
    cpp=Kernel("native:lora_linear_shared_bwd_cpu", check.only_cpu),
    cuda=Kernel("native:lora_linear_shared_bwd_cuda", refuse_cuda_bwd),
)


class _LoraLinearShared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, biases, scales, *factors):
        downs, ups = factors[: len(weights)], factors[len(weights) :]
        y, h = _fwd(x, weights, biases, [*downs], [*ups], scales)
        # frozen downs ask x for no more than its shape
        kept = x if any(down.requires_grad for down in downs) else None
        ctx.save_for_backward(kept, h, *weights, *factors)
        ctx.scales, ctx.shape = scales, x.shape
        ctx.set_materialize_grads(False)
        # each has memory of its own: what is done to one in place is not done to the others
        rows, widths = h.shape[:-1], [len(w) for w in weights]
        parts = zip(y.split([rows.numel() * n for n in widths]), widths, strict=True)
        return tuple(part.view(*rows, n).clone() for part, n in parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        (x, h, *saved), count = ctx.saved_tensors, len(dys)
        x = h.new_empty(ctx.shape) if x is None else x
        # a layer whose output reached no loss has no part in this
        live = [i for i, dy in enumerate(dys) if dy is not None]
        if not live:
            return (None,) * (4 + 2 * count)
        weights, downs, ups = ([saved[i + at] for i in live] for at in (0, count, 2 * count))
        hs = h.split([len(down) for down in saved[count : 2 * count]], -1)
        places = [kind * count + i for kind in (0, 1) for i in live]
        need_dx, *need = (ctx.needs_input_grad[at] for at in (0, *(4 + p for p in places)))
        dx, ddown, dup = _bwd(
            x, torch.cat([hs[i] for i in live], -1), [dys[i].contiguous() for i in live],
            weights, downs, ups, [ctx.scales[i] for i in live], [need_dx, *need],
        )  # fmt: skip
        factors, grads = (*downs, *ups), [None] * 2 * count
        sizes = [f.numel() * n for f, n in zip(factors, need, strict=True)]
        parts = torch.cat([ddown.flatten(), dup]).split(sizes)
        for at, part, factor, wanted in zip(places, parts, factors, need, strict=True):
            grads[at] = part.view(factor.shape) if wanted else None
        return dx if need_dx else None, None, None, None, *grads


def lora_linear_shared(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float | Tensor],
) -> list[Tensor]:
    """Linear layers that read one x, each with a low-rank update: x Wⱼᵀ + bⱼ + sⱼ·(x downⱼᵀ) upⱼᵀ.

    One product of x with all downs; x is kept for backward once, and its gradient is summed over
    the layers in float32. In 16-bit a base product and its update share one float32 accumulator,
    and every result is rounded once.

    Args:
        x: [..., I], any floating dtype, the same for every tensor.
        weights: one [O, I] a layer, frozen; O may differ.
        biases: [O] or None a layer, frozen.
        downs: [R, I] a layer, trained; R may differ.
        ups: [O, R] a layer, trained.
        scales: alpha / rank of each layer, times the user's multiplier; no unit. Under
            torch.compile 0-dim CPU tensors, as lora_linear's.

    Returns:
        One [..., O] a layer, contiguous, in x's dtype; none shares memory with another.

    Raises:
        ValueError: a shape, dtype, device or number of layers does not fit, or a weight or bias
            asks for a gradient.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """
    check_layers(x, weights, biases, downs, ups, scales)
    args = x.contiguous(), [*weights], [*biases], [*downs], [*ups], [*scales]
    numbers = not any(isinstance(s, Tensor) for s in scales)
    if numbers and not torch.compiler.is_compiling() and (run := native(x)):
        return run(*args)
    scales = [check.live(s) for s in scales]
    return [*_LoraLinearShared.apply(*args[:3], scales, *downs, *ups)]

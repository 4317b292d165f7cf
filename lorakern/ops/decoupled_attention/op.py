"""decoupled_attention: text and image attention of one query, one softmax a group, in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakern import backend
from lorakern.backend import Kernel
from lorakern.ops.check import live
from lorakern.ops.decoupled_attention import reference
from lorakern.ops.decoupled_attention import triton_tables as tables
from lorakern.ops.decoupled_attention.arguments import check, refuse_cuda

_HERE = "lorakern.ops.decoupled_attention"


def _refuse_cpp(q, *_) -> str | None:
    return None if q.device.type == "cpu" else f"q is on {q.device.type}; this kernel is for cpu"


_fwd = backend.define(
    "decoupled_attention_fwd",
    "(Tensor q, Tensor[] keys, Tensor[] values, Tensor[] scales, Tensor?[] masks, int heads)"
    " -> Tensor out",
    reference.decoupled_attention_fwd,
    cpp=Kernel("native:decoupled_attention_fwd_cpu", _refuse_cpp),
    triton=Kernel(f"{_HERE}.triton_kernel:decoupled_attention_fwd", tables.refuse_fwd),
    cuda=Kernel("native:decoupled_attention_fwd_cuda", refuse_cuda),
)
_bwd = backend.define(
    "decoupled_attention_bwd",
    "(Tensor dout, Tensor q, Tensor[] keys, Tensor[] values, Tensor[] scales, Tensor?[] masks,"
    " int heads, bool[] needs) -> (Tensor dq, Tensor dk, Tensor dv)",
    reference.decoupled_attention_bwd,
    cpp=Kernel("native:decoupled_attention_bwd_cpu", lambda dout, q, *_: _refuse_cpp(q)),
    triton=Kernel(f"{_HERE}.triton_bwd:decoupled_attention_bwd", tables.refuse_bwd),
    cuda=Kernel("native:decoupled_attention_bwd_cuda", lambda dout, *args: refuse_cuda(*args[:-1])),
)


class _DecoupledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, heads, scales, masks, *keys_and_values):
        groups = len(keys_and_values) // 2
        # out is not kept: with a whole row of p on chip, rowsum(p ∘ dp) of each group is exact
        ctx.save_for_backward(q, *keys_and_values, *masks)
        ctx.heads, ctx.scales, ctx.groups = heads, scales, groups
        keys, values = [*keys_and_values[:groups]], [*keys_and_values[groups:]]
        return _fwd(q, keys, values, scales, masks, heads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        groups, (q, *rest) = ctx.groups, ctx.saved_tensors
        keys, values, masks = rest[:groups], rest[groups : 2 * groups], rest[2 * groups :]
        need_q, *needs = (need for i, need in enumerate(ctx.needs_input_grad) if i not in (1, 2, 3))
        # a group's dk and dv are made together
        both = [a or b for a, b in zip(needs[:groups], needs[groups:], strict=True)]
        args = (q, keys, values, ctx.scales, masks, ctx.heads, [need_q, *both])
        dq, dk, dv = _bwd(dout.contiguous(), *args)
        rows = [k.shape[0] * k.shape[1] * need for k, need in zip(keys, both, strict=True)]
        flat = zip((*keys, *values), (*dk.split(rows), *dv.split(rows)), needs, strict=True)
        grads = (part.view(like.shape) if need else None for like, part, need in flat)
        return dq if need_q else None, None, None, None, *grads


def decoupled_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scales: Sequence[float | Tensor],
    masks: Sequence[Tensor | None] | None = None,
    *,
    heads: int,
) -> Tensor:
    """Text attention plus image attentions: softmax(q k₀ᵀ/√d) v₀ + Σⱼ cⱼ mⱼ ∘ softmax(q kⱼᵀ/√d) vⱼ.

    Every group has its own softmax, so this is not attention over the concatenated keys. In
    16-bit all groups share one float32 accumulator and are rounded once.

    Args:
        q: [B, Q, C] as the query layer gives it, C = heads·d; any floating dtype, the same for
            every tensor here.
        keys: one [B, T, C] a group, the text's first; T may differ, and is at least 1.
        values: as keys.
        scales: cⱼ of each group after the text; no unit. Under torch.compile 0-dim CPU tensors,
            so that a change of their values recompiles nothing.
        masks: mⱼ of each group after the text, [B, Q] or [1, Q], or None for ones; no gradient.
        heads: number of heads H.

    Returns:
        [B, Q, C], contiguous, in q's dtype.

    Raises:
        ValueError: a shape, dtype, device or number of groups does not fit, or a scale or mask
            asks for a gradient.

    Source: Ye et al. 2023, arXiv:2308.06721, equations 5 and 8.
    """
    masks = [None] * len(scales) if masks is None else [*masks]
    check(q, keys, values, scales, masks, heads)
    if torch.compiler.is_compiling():
        scales = [live(c) for c in scales]
    else:
        scales = [float(c) for c in scales]
    q, *tensors = (t.contiguous() for t in (q, *keys, *values))
    if not torch.is_grad_enabled():
        return _fwd(q, tensors[: len(keys)], tensors[len(keys) :], scales, masks, heads)
    return _DecoupledAttention.apply(q, heads, scales, masks, *tensors)

"""decoupled_attention in Triton. Spec: lorakern/ops/decoupled_attention/reference.py

A program holds a block of queries of one head and meets one group of keys after another: each
group's softmax, scaled, goes into one float32 accumulator, so q is read and out written once. The
spec makes a B x H x Q x T tensor four times a group, and adds up outputs that were rounded.
"""

import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from lorakern.ops.decoupled_attention import triton_tables as tables
from lorakern.ops.decoupled_attention.triton_tables import cdiv


@triton.jit
def load_tokens(ptr, first, length, C: tl.constexpr, D: tl.constexpr,
                BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows [BLOCK_T, BLOCK_D] of one head from token `first` on; zeros outside."""
    rows_T, cols_d = first + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    inside = (rows_T < length)[:, None] & (cols_d < D)[None, :]
    return tl.load(ptr + rows_T[:, None] * C + cols_d[None, :], mask=inside, other=0.0)


@triton.jit
def mask_of(mask_ptr, step, b, rows_Q, in_Q):
    """mⱼ of a block of queries, in float32; ones without a mask."""
    if mask_ptr is None:
        return tl.full(rows_Q.shape, 1.0, tl.float32)
    return tl.load(mask_ptr + b * step + rows_Q, mask=in_Q, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["Q"])
def _attend_kernel(
    out_ptr, q_ptr, keys, values, masks, mask_steps, lengths, scales, Q, factor,
    H: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCKS_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[B, Q, H·D] = Σⱼ cⱼ mⱼ ∘ softmax(q kⱼᵀ/√D) vⱼ; one program per BLOCK_Q and head.

    Groups come as tuples. Exponentials are of base 2: factor is log₂(e)/√D.
    """
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    C: tl.constexpr = H * D
    rows_Q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_Q = rows_Q < Q
    at_head = b * Q * C + h * D
    q = load_tokens(q_ptr + at_head, tl.program_id(0) * BLOCK_Q, Q, C, D, BLOCK_Q, BLOCK_D)

    acc_Qd = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for j in tl.static_range(len(keys)):
        T = lengths[j]
        at_group = b * T * C + h * D
        top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        sum_Qd = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        for t in range(0, T, BLOCKS_T[j]):
            in_T = t + tl.arange(0, BLOCKS_T[j]) < T
            k = load_tokens(keys[j] + at_group, t, T, C, D, BLOCKS_T[j], BLOCK_D)
            v = load_tokens(values[j] + at_group, t, T, C, D, BLOCKS_T[j], BLOCK_D)
            s_QT = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
            s_QT = tl.where(in_T[None, :], s_QT, float("-inf"))
            higher = tl.maximum(top, tl.max(s_QT, 1))
            e_QT = tl.exp2(s_QT - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(e_QT, 1)
            # e is at most 1 and not yet scaled: rounded to v's dtype, it keeps its precision
            sum_Qd = tl.dot(
                e_QT.to(v.dtype), v, sum_Qd * shrink[:, None], input_precision=PRECISION
            )
            top = higher
        share = scales[j] * mask_of(masks[j], mask_steps[j], b, rows_Q, in_Q) / total
        acc_Qd += share[:, None] * sum_Qd
    cols_d = tl.arange(0, BLOCK_D)
    out_Qd = out_ptr + at_head + rows_Q.to(tl.int64)[:, None] * C + cols_d[None, :]
    tl.store(out_Qd, acc_Qd, mask=in_Q[:, None] & (cols_d < D)[None, :])


def decoupled_attention_fwd(q, keys, values, scales, masks, heads):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    (B, Q, C), d = q.shape, q.shape[-1] // heads
    tile = tables.queries(d, q.dtype, backward=False)
    with on(q.device):
        _attend_kernel[(cdiv(Q, tile.q), B * heads)](
            out, q.contiguous(), *groups(keys, values, scales, masks), Q, base_2(d),
            H=heads, D=d, PRECISION=tables.precision(q.dtype), BLOCK_Q=tile.q,
            BLOCKS_T=tuple(tables.keys(k.shape[1], d, q.dtype, backward=False) for k in keys),
            BLOCK_D=tile.d, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def groups(keys, values, scales, masks):
    """The groups as the kernels take them: keys, values, masks, steps of masks, lengths, scales."""
    masks = (None, *masks)
    return (
        tuple(k.contiguous() for k in keys),
        tuple(v.contiguous() for v in values),
        tuple(m if m is None else m.contiguous() for m in masks),
        tuple(0 if m is None or m.shape[0] == 1 else m.shape[1] for m in masks),
        tuple(k.shape[1] for k in keys),
        (1.0, *map(float, scales)),
    )


def base_2(d):
    return math.log2(math.e) / math.sqrt(d)


def on(device):
    """Triton launches on the current GPU, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

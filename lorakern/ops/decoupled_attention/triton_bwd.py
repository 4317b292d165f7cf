"""Backward of decoupled_attention in Triton. Spec: lorakern/ops/decoupled_attention/reference.py

One pass over blocks of queries makes dq and, for each query and group, two numbers: the logarithm
of the softmax's sum and rowsum(p ∘ dp). From them a second pass over blocks of keys makes dk and dv
of the wanted groups. Its sums over queries are cut into slices that are added up in a fixed order
by a third stage: no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl

from lorakern.ops.decoupled_attention import triton_tables as tables
from lorakern.ops.decoupled_attention.triton_kernel import (
    base_2,
    groups,
    load_tokens,
    mask_of,
    on,
)
from lorakern.ops.decoupled_attention.triton_tables import cdiv
from lorakern.ops.lora_linear.triton_bwd import _sum_slices_kernel


@triton.jit(do_not_specialize=["Q"])
def _attend_back_kernel(
    dq_ptr, stats_ptr, dout_ptr, q_ptr, keys, values, masks, mask_steps, lengths, scales, Q, factor,
    scale, H: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCKS_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq[B, Q, H·D] and stats[group, 2, B·H, Q]: log₂ of the softmax's sum, and rowsum(p ∘ dp).

    dp is the gradient of p before cⱼ mⱼ. factor is log₂(e)/√D, scale is 1/√D.
    """
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    C: tl.constexpr = H * D
    first = tl.program_id(0) * BLOCK_Q
    rows_Q = first + tl.arange(0, BLOCK_Q)
    in_Q = rows_Q < Q
    at_head = b * Q * C + h * D
    q = load_tokens(q_ptr + at_head, first, Q, C, D, BLOCK_Q, BLOCK_D)
    dout = load_tokens(dout_ptr + at_head, first, Q, C, D, BLOCK_Q, BLOCK_D)
    stats_Q = stats_ptr + tl.program_id(1).to(tl.int64) * Q + rows_Q
    group_size = tl.num_programs(1).to(tl.int64) * Q

    acc_Qd = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for j in tl.static_range(len(keys)):
        T = lengths[j]
        at_group = b * T * C + h * D
        top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        mean = tl.zeros((BLOCK_Q,), tl.float32)
        for t in range(0, T, BLOCKS_T[j]):
            in_T = t + tl.arange(0, BLOCKS_T[j]) < T
            k = load_tokens(keys[j] + at_group, t, T, C, D, BLOCKS_T[j], BLOCK_D)
            v = load_tokens(values[j] + at_group, t, T, C, D, BLOCKS_T[j], BLOCK_D)
            s_QT = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
            s_QT = tl.where(in_T[None, :], s_QT, float("-inf"))
            dp_QT = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            higher = tl.maximum(top, tl.max(s_QT, 1))
            e_QT = tl.exp2(s_QT - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(e_QT, 1)
            mean = mean * shrink + tl.sum(e_QT * dp_QT, 1)
            top = higher
        top += tl.log2(total)
        mean = mean / total
        tl.store(stats_Q + 2 * j * group_size, top, mask=in_Q)
        tl.store(stats_Q + (2 * j + 1) * group_size, mean, mask=in_Q)
        if dq_ptr is not None:
            sum_Qd = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
            for t in range(0, T, BLOCKS_T[j]):
                in_T = t + tl.arange(0, BLOCKS_T[j]) < T
                k = load_tokens(keys[j] + at_group, t, T, C, D, BLOCKS_T[j], BLOCK_D)
                v = load_tokens(values[j] + at_group, t, T, C, D, BLOCKS_T[j], BLOCK_D)
                s_QT = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
                dp_QT = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
                p_QT = tl.where(in_T[None, :], tl.exp2(s_QT - top[:, None]), 0.0)
                ds_QT = p_QT * (dp_QT - mean[:, None])
                sum_Qd = tl.dot(ds_QT.to(k.dtype), k, sum_Qd, input_precision=PRECISION)
            weight = scale * scales[j] * mask_of(masks[j], mask_steps[j], b, rows_Q, in_Q)
            acc_Qd += weight[:, None] * sum_Qd
    if dq_ptr is not None:
        cols_d = tl.arange(0, BLOCK_D)
        dq_Qd = dq_ptr + at_head + rows_Q.to(tl.int64)[:, None] * C + cols_d[None, :]
        tl.store(dq_Qd, acc_Qd, mask=in_Q[:, None] & (cols_d < D)[None, :])


@triton.jit(do_not_specialize=["Q", "row", "rows", "steps"])
def _keys_back_kernel(
    dk_ptr, dv_ptr, stats_ptr, dout_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, mask_step, T, Q, row, rows,
    steps, factor, scale, weight, H: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk, dv[slice, rows, H·D] of one group over steps · BLOCK_Q queries, from `row` on.

    stats: [2, B·H, Q], the group's. factor is log₂(e)/√D, scale is 1/√D, weight is the group's.
    """
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    C: tl.constexpr = H * D
    first = tl.program_id(0) * BLOCK_T
    at_head, at_group = b * Q * C + h * D, b * T * C + h * D
    k = load_tokens(k_ptr + at_group, first, T, C, D, BLOCK_T, BLOCK_D)
    v = load_tokens(v_ptr + at_group, first, T, C, D, BLOCK_T, BLOCK_D)
    stats_ptr += tl.program_id(1).to(tl.int64) * Q
    mean_ptr = stats_ptr + tl.num_programs(1).to(tl.int64) * Q

    dk_Td = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    dv_Td = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for step in range(0, steps):
        start = (tl.program_id(2) * steps + step) * BLOCK_Q
        rows_Q = start + tl.arange(0, BLOCK_Q)
        in_Q = rows_Q < Q
        q = load_tokens(q_ptr + at_head, start, Q, C, D, BLOCK_Q, BLOCK_D)
        dout = load_tokens(dout_ptr + at_head, start, Q, C, D, BLOCK_Q, BLOCK_D)
        top = tl.load(stats_ptr + rows_Q, mask=in_Q, other=float("inf"))
        mean = tl.load(mean_ptr + rows_Q, mask=in_Q, other=0.0)
        s_TQ = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor
        dp_TQ = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        mask = mask_of(mask_ptr, mask_step, b, rows_Q, in_Q)
        # beyond the queries top is inf, so p is 0
        p_TQ = tl.exp2(s_TQ - top[None, :]) * mask[None, :]
        ds_TQ = p_TQ * (dp_TQ - mean[None, :])
        dv_Td = tl.dot(p_TQ.to(dout.dtype), dout, dv_Td, input_precision=PRECISION)
        dk_Td = tl.dot(ds_TQ.to(q.dtype), q, dk_Td, input_precision=PRECISION)
    rows_T, cols_d = first + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    inside = (rows_T < T)[:, None] & (cols_d < D)[None, :]
    at_T = tl.program_id(2).to(tl.int64) * rows + row + b * T + rows_T
    at_Td = at_T[:, None] * C + h * D + cols_d[None, :]
    tl.store(dk_ptr + at_Td, weight * scale * dk_Td, mask=inside)
    tl.store(dv_ptr + at_Td, weight * dv_Td, mask=inside)


def decoupled_attention_bwd(dout, q, keys, values, scales, masks, heads, needs):
    dout, q = dout.contiguous(), q.contiguous()
    (B, Q, C), d = q.shape, q.shape[-1] // heads
    need_dq, *wanted = needs
    rows = sum(B * k.shape[1] for k, need in zip(keys, wanted, strict=True) if need)
    dq = q.new_empty(q.shape if need_dq else 0)
    dk, dv = q.new_empty((rows, C)), q.new_empty((rows, C))
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    tile = tables.queries(d, q.dtype, backward=True)
    lengths = [k.shape[1] for k in keys]
    blocks = [tables.keys(t, d, q.dtype, backward=True) for t in lengths]
    stats = q.new_empty((len(keys), 2, B * heads, Q), dtype=torch.float32)
    given = groups(keys, values, scales, masks)
    options = {
        "H": heads, "D": d, "PRECISION": tables.precision(q.dtype), "BLOCK_Q": tile.q,
        "BLOCK_D": tile.d, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    with on(q.device):
        _attend_back_kernel[(cdiv(Q, tile.q), B * heads)](
            dq if need_dq else None, stats, dout, q, *given, Q, base_2(d), d**-0.5,
            BLOCKS_T=tuple(blocks), **options,
        )  # fmt: skip
        if not rows:
            return dq, dk, dv
        programs = B * heads * sum(cdiv(t, n) for t, n in zip(lengths, blocks, strict=True))
        slices, steps = tables.slices(programs, Q, tile, q.device)
        parts = dk, dv
        if slices > 1:
            parts = torch.empty((2, slices, rows, C), dtype=torch.float32, device=q.device)
        row = 0
        for j, (k, v, mask, step, length, weight) in enumerate(zip(*given, strict=True)):
            if wanted[j]:
                _keys_back_kernel[(cdiv(length, blocks[j]), B * heads, slices)](
                    *parts, stats[j], dout, q, k, v, mask, step, length, Q, row, rows, steps,
                    base_2(d), d**-0.5, weight, BLOCK_T=blocks[j], **options,
                )  # fmt: skip
                row += B * length
        if slices > 1:
            size = rows * C
            _sum_slices_kernel[(2 * cdiv(size, 128),)](
                dk, parts[0], size, slices, dv, parts[1], size, slices,
                BLOCK=128, BLOCK_S=32, num_warps=4,
            )  # fmt: skip
    return dq, dk, dv

"""Backward of lora_linear in Triton. Spec: lorakern/ops/lora_linear/reference.py

dy is read once for dh = (g·dy) up and the partial sums of dup = s·g·dyᵀ h, and once more by the
GEMM that makes dx = (g·dy) W + s·dh down in one float32 accumulator. Sums over rows are cut into
slices that are added up in a fixed order by a second stage: no atomics, the same bits every time.
"""

from itertools import zip_longest

import torch
import triton
import triton.language as tl

from lorakern.ops.lora_linear import triton_tables as tables
from lorakern.ops.lora_linear.triton_kernel import add, on, shrink
from lorakern.ops.lora_linear.triton_tables import cdiv


@triton.jit(do_not_specialize=["M", "steps", "factor"])
def _row_products_kernel(
    out_ptr, a_ptr, b_ptr, gain_ptr, M, N, R, steps, factor,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[slice, N, R] = factor · (a[M, N] ∘ gain)ᵀ b[M, R] over a slice of steps · BLOCK_M rows.

    gain [N] may be None. R is at most BLOCK_R. TRANSPOSED: out is [slice, R, N].
    """
    cols_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank_R, step_M = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_M)
    first = tl.program_id(1).to(tl.int64) * steps * BLOCK_M
    in_N, in_R = cols_N < N, rank_R < R

    a_NM = a_ptr + (first + step_M)[None, :] * N + cols_N[:, None]
    b_MR = b_ptr + (first + step_M)[:, None] * R + rank_R[None, :]
    acc_NR = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for m in range(0, steps * BLOCK_M, BLOCK_M):
        in_M = first + m + step_M < M
        a = tl.load(a_NM, mask=in_N[:, None] & in_M[None, :], other=0.0)
        b = tl.load(b_MR, mask=in_M[:, None] & in_R[None, :], other=0.0)
        acc_NR = tl.dot(a, b, acc_NR, input_precision=PRECISION)
        a_NM += BLOCK_M * N
        b_MR += BLOCK_M * R

    if gain_ptr is not None:
        acc_NR *= tl.load(gain_ptr + cols_N, mask=in_N, other=0.0)[:, None]
    out_NR = out_ptr + tl.program_id(1).to(tl.int64) * N * R
    if TRANSPOSED:
        out_NR = out_NR + cols_N[:, None] + rank_R[None, :] * N
    else:
        out_NR = out_NR + cols_N[:, None] * R + rank_R[None, :]
    tl.store(out_NR, factor * acc_NR, mask=in_N[:, None] & in_R[None, :])


@triton.jit
def _sum_slices(
    out_ptr, parts_ptr, size, slices, block, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr
):
    cols = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, slices, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        inside = (part < slices)[:, None] & (cols < size)[None, :]
        at = part[:, None] * tl.cast(size, tl.int64) + cols[None, :]
        total += tl.sum(tl.load(parts_ptr + at, mask=inside, other=0.0), axis=0)
    tl.store(out_ptr + cols, total, mask=cols < size)


@triton.jit(do_not_specialize=["slices", "slices2"])
def _sum_slices_kernel(
    out_ptr, parts_ptr, size, slices, out2_ptr, parts2_ptr, size2, slices2,
    BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out[size] = the sum of parts[slices, size], and the same for a second pair, in one launch."""
    block = tl.program_id(0)
    blocks = tl.cdiv(size, BLOCK)
    if block < blocks:
        _sum_slices(out_ptr, parts_ptr, size, slices, block, BLOCK, BLOCK_S)
    else:
        _sum_slices(out2_ptr, parts2_ptr, size2, slices2, block - blocks, BLOCK, BLOCK_S)


def lora_linear_bwd(dy, x, h, weight, down, up, scale, gain, needs):
    dy, x, h, weight, down, up = (t.contiguous() for t in (dy, x, h, weight, down, up))
    need_dx, need_ddown, need_dup, need_dgain = needs
    M, (N, R) = x.shape[:-1].numel(), up.shape
    dx, ddown, dup = (
        x.new_empty(shape if need else 0)
        for shape, need in zip((x.shape, down.shape, up.shape), needs[:3], strict=True)
    )
    dgain = (x if gain is None else gain).new_empty(N if need_dgain else 0)
    if M == 0:
        return dx, ddown.zero_(), dup.zero_(), dgain.zero_()
    sums = []
    with on(x.device):
        if need_dgain:
            plain = dict(parts=h.view(1, M, R), up=up, scale=scale)
            column_sums(sums, dgain, dy, x, weight, **plain)
        need_dh = need_dx or need_ddown
        in_one_pass = need_dh and need_dup and tables.one_pass(N, R, dy.dtype)
        if need_dh:
            plan = tables.shrink(M, N, R, dy.dtype, dy.device, outer=in_one_pass)
            if not need_dx:
                # no GEMM follows that would add the slices up: one slice, in the final dtype
                plan = tables.cut(plan.tile, N, 1)
            parts = h.new_empty((plan.slices, M, R), dtype=torch.float32 if need_dx else h.dtype)
            outer = slices_of(sums, dup, cdiv(M, plan.tile.m)) if in_one_pass else None
            with_dup = dict(outer=outer, h=h, factor=scale)
            shrink(plan, parts, dy, up, transposed=True, gain=gain, **with_dup)
        if need_dup and not in_one_pass:
            row_products(sums, dup, dy, h, scale, transposed=False, gain=gain)
        if need_dx:
            dh = torch.empty_like(h) if need_ddown else None
            update = dict(parts=parts, h=dh, up=down, scale=scale)
            add(dx, dy, weight, gain_k=gain, transposed=True, **update)
        else:
            dh = parts if need_dh else None
        if need_ddown:
            row_products(sums, ddown, x, dh, scale, transposed=True)
        sum_all(sums)
    return dx, ddown, dup, dgain


def slices_of(sums, out, slices):
    """Where to write `out` in that many slices, which sum_all adds up: itself when there is one."""
    if slices == 1:
        return out
    parts = torch.empty((slices, out.numel()), dtype=torch.float32, device=out.device)
    sums.append((out, parts, out.numel(), slices))
    return parts


def column_sums(sums, dgain, dy, x, weight, **update):
    """dgain[N] = the column sums of dy ∘ (x weightᵀ + update), as `add` makes the bracket."""
    M, (N, K) = x.shape[:-1].numel(), weight.shape
    tile = tables.gemm(M, N, K, x.dtype, x.device, narrow=True)
    parts = slices_of(sums, dgain, cdiv(M, tile.m))
    add(parts.view(-1, N), x, weight, dy=dy, **update)


def row_products(sums, out, a, b, factor, *, transposed, gain=None):
    """out[N, R] = factor · (a[..., N] ∘ gain)ᵀ b[..., R]; transposed: [R, N]."""
    M, N, R = a.shape[:-1].numel(), a.shape[-1], b.shape[-1]
    plan = tables.rows(M, N, a.dtype, a.device)
    tile, parts = plan.tile, slices_of(sums, out, plan.slices)
    _row_products_kernel[(cdiv(N, tile.n), plan.slices)](
        parts, a, b, gain, M, N, R, plan.steps, float(factor),
        TRANSPOSED=transposed, PRECISION=tables.precision(a.dtype),
        BLOCK_M=tile.k, BLOCK_N=tile.n, BLOCK_R=tables.padded(R),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def sum_all(sums):
    """Adds up what slices_of handed out, two results a launch."""
    for first, second in zip_longest(sums[::2], sums[1::2]):
        # without a second the grid has no block for it
        second = second or (*first[:2], 0, 0)
        blocks = cdiv(first[2], 128) + cdiv(second[2], 128)
        _sum_slices_kernel[(blocks,)](*first, *second, BLOCK=128, BLOCK_S=32, num_warps=4)

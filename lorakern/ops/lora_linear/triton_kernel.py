"""lora_linear in Triton. Spec: lorakern/ops/lora_linear/reference.py

One GEMM template serves y = g·(x Wᵀ + s·h upᵀ) + b and dx = (g·dy) W + s·dh down: the update
joins the base product's float32 accumulator and the sum is rounded once. For small ranks
h = x downᵀ is made in the same main loop, from x tiles that are on chip already; otherwise a first
kernel makes it. The spec reads and writes an M × O tensor three times more.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from lorakern.ops.lora_linear import triton_tables as tables
from lorakern.ops.lora_linear.triton_tables import cdiv
from lorakern.ops.lora_linear.triton_tile import finish, gained, tile_of


@triton.jit(do_not_specialize=["M", "slices", "scale"])
def _add_low_rank_kernel(
    y_ptr, a_ptr, w_ptr, onto_ptr, bias_ptr, gain_N_ptr, gain_K_ptr, dy_ptr,
    down_ptr, parts_ptr, h_ptr, up_ptr, M, N, K, R, slices, scale,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = gain_N ∘ ((a[M, K] ∘ gain_K) w[N, K]ᵀ + onto[M, N] + scale · h[M, R] up[N, R]ᵀ) + bias[N]

    y is [M, N]. What is None is not there; onto may be y itself.
    With down[R, K]: h = a downᵀ, made beside the base product, and R is at most BLOCK_R.
    Without: h is the sum of parts[slices, M, R] in float32. With h: h is stored.
    With dy[M, N]: y[row tile, N] = the column sums of dy ∘ the bracket.
    TRANSPOSED: w is [K, N] and up is [R, N].
    """
    tile_M, tile_N = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    # int64: M·N passes 2³¹ at a batch of 103 of SDXL's 4096 tokens with N = 5120
    rows_M = tile_M.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols_N = tile_N.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank_R, step_K = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    in_M, in_N = rows_M[:, None] < M, cols_N[None, :] < N
    N_long = tl.cast(N, tl.int64)

    a_MK = a_ptr + rows_M[:, None] * K + step_K[None, :]
    if TRANSPOSED:
        w_KN = w_ptr + step_K[:, None] * N_long + cols_N[None, :]
    else:
        w_KN = w_ptr + cols_N[None, :] * K + step_K[:, None]
    if down_ptr is not None:
        down_KR = down_ptr + rank_R[None, :] * K + step_K[:, None]
        acc_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)

    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        in_K = k + step_K < K
        a = tl.load(a_MK, mask=in_M & in_K[None, :], other=0.0)
        w = tl.load(w_KN, mask=in_K[:, None] & in_N, other=0.0)
        if gain_K_ptr is not None:
            a, rest = gained(a, tl.load(gain_K_ptr + k + step_K, mask=in_K, other=0.0))
            if a.dtype != tl.float32:
                acc_MN = tl.dot(rest, w, acc_MN, input_precision=PRECISION)
        acc_MN = tl.dot(a, w, acc_MN, input_precision=PRECISION)
        if down_ptr is not None:
            down = tl.load(down_KR, mask=in_K[:, None] & (rank_R < R)[None, :], other=0.0)
            acc_MR = tl.dot(a, down, acc_MR, input_precision=PRECISION)
            down_KR += BLOCK_K
        a_MK += BLOCK_K
        w_KN += BLOCK_K * N_long if TRANSPOSED else BLOCK_K

    if up_ptr is not None:
        for r in range(0, BLOCK_R if down_ptr is not None else R, BLOCK_R):
            in_R = r + rank_R < R
            at_MR = rows_M[:, None] * R + (r + rank_R)[None, :]
            if down_ptr is not None:
                h_MR = acc_MR
            else:
                h_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
                for part in range(slices):
                    part_MR = parts_ptr + tl.cast(part, tl.int64) * M * R + at_MR
                    h_MR += tl.load(part_MR, mask=in_M & in_R[None, :], other=0.0)
            if h_ptr is not None:  # noqa: SIM102  the outer one is decided at compile time
                if tile_N == 0:
                    tl.store(h_ptr + at_MR, h_MR, mask=in_M & in_R[None, :])
            if TRANSPOSED:
                up_RN = up_ptr + (r + rank_R)[:, None] * N_long + cols_N[None, :]
            else:
                up_RN = up_ptr + cols_N[None, :] * R + (r + rank_R)[:, None]
            up = tl.load(up_RN, mask=in_R[:, None] & in_N, other=0.0)
            # rounded to up's dtype as plain torch rounds h: relative to the update, not to y
            acc_MN = tl.dot((scale * h_MR).to(up.dtype), up, acc_MN, input_precision=PRECISION)

    if onto_ptr is not None:
        onto_MN = onto_ptr + rows_M[:, None] * N + cols_N[None, :]
        acc_MN += tl.load(onto_MN, mask=in_M & in_N, other=0.0).to(tl.float32)
    finish(y_ptr, acc_MN, bias_ptr, gain_N_ptr, dy_ptr, tile_M, rows_M, cols_N, M, N)


@triton.jit(do_not_specialize=["M", "steps", "scale", "factor"])
def _shrink_kernel(
    parts_ptr, outer_ptr, a_ptr, b_ptr, h_ptr, gain_ptr, M, K, R, steps, scale, factor,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """parts[slice, M, R] = scale · (a[M, K] ∘ gain[K]) b[R, K]ᵀ over a slice of steps · BLOCK_K
    columns; gain may be None.

    R is at most BLOCK_R. TRANSPOSED: b is [K, R].
    With outer: in the same pass outer[block of rows, K, R] = factor · (a ∘ gain)ᵀ h[M, R] over
    the block.
    """
    rows_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank_R, in_M = tl.arange(0, BLOCK_R), rows_M[:, None] < M
    in_R = rank_R[None, :] < R
    at_MR = rows_M[:, None] * R + rank_R[None, :]
    # a multiple of BLOCK_K, which the compiler must see to load a in whole vectors
    first = tl.program_id(1) * steps * BLOCK_K
    cols_K = first + tl.arange(0, BLOCK_K)
    long_K = cols_K.to(tl.int64)

    a_MK = a_ptr + rows_M[:, None] * K + cols_K[None, :]
    if TRANSPOSED:
        b_KR = b_ptr + long_K[:, None] * R + rank_R[None, :]
    else:
        b_KR = b_ptr + rank_R[None, :] * K + long_K[:, None]
    if outer_ptr is not None:
        h = tl.load(h_ptr + at_MR, mask=in_M & in_R, other=0.0)
        outer_KR = outer_ptr + tl.program_id(0).to(tl.int64) * K * R
        outer_KR = outer_KR + long_K[:, None] * R + rank_R[None, :]

    acc_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, tl.minimum(steps * BLOCK_K, K - first), BLOCK_K):
        in_K = k + cols_K < K
        a = tl.load(a_MK, mask=in_M & in_K[None, :], other=0.0)
        b = tl.load(b_KR, mask=in_K[:, None] & in_R, other=0.0)
        if outer_ptr is not None:
            product_KR = factor * tl.dot(tl.trans(a), h, input_precision=PRECISION)
        if gain_ptr is not None:
            gain = tl.load(gain_ptr + k + cols_K, mask=in_K, other=0.0)
            a, rest = gained(a, gain)
            if a.dtype != tl.float32:
                acc_MR = tl.dot(rest, b, acc_MR, input_precision=PRECISION)
            if outer_ptr is not None:
                product_KR *= gain[:, None]
        acc_MR = tl.dot(a, b, acc_MR, input_precision=PRECISION)
        if outer_ptr is not None:
            tl.store(outer_KR, product_KR, mask=in_K[:, None] & in_R)
            outer_KR += BLOCK_K * R
        a_MK += BLOCK_K
        b_KR += BLOCK_K * R if TRANSPOSED else BLOCK_K

    part_MR = parts_ptr + tl.program_id(1).to(tl.int64) * M * R + at_MR
    tl.store(part_MR, scale * acc_MR, mask=in_M & in_R)


def lora_linear_fwd(x, weight, bias, down, up, scale, gain):
    x, weight, down, up = (t.contiguous() for t in (x, weight, down, up))
    M, (N, K), R = x.shape[:-1].numel(), weight.shape, down.shape[0]
    y, h = x.new_empty((*x.shape[:-1], N)), x.new_empty((*x.shape[:-1], R))
    if M == 0:
        return y, h
    with on(x.device):
        if tables.one_kernel(M, N, K, R, x.dtype):
            update = dict(down=down, h=h, up=up)
        else:
            plan = tables.shrink(M, K, R, x.dtype, x.device, outer=False)
            parts = torch.empty((plan.slices, M, R), dtype=torch.float32, device=x.device)
            shrink(plan, parts, x, down, transposed=False)
            update = dict(parts=parts, h=h, up=up)
        add(y, x, weight, bias=bias, gain_n=gain, scale=scale, **update)
    return y, h


def add(
    y, a, w, *, onto=None, bias=None, gain_n=None, gain_k=None, dy=None,
    down=None, parts=None, h=None, up=None, scale=1.0, transposed=False,
):  # fmt: skip
    """Launches _add_low_rank_kernel; y is [..., N] and a is [..., K]."""
    M, N, K = a.shape[:-1].numel(), y.shape[-1], a.shape[-1]
    R = 0 if up is None else up.shape[0] if transposed else up.shape[1]
    narrow = gain_k is not None or dy is not None
    tile = tables.gemm(M, N, K, a.dtype, a.device, narrow, gain_k is not None)
    # a rank that is not made inside is walked in steps, so it is not padded to a power of two
    block_r = tables.padded(R) if down is not None else min(32, tables.padded(R))
    slices = 0 if parts is None else parts.shape[0]
    _add_low_rank_kernel[(cdiv(M, tile.m) * cdiv(N, tile.n),)](
        y, a, w, onto, bias, gain_n, gain_k, dy, down, parts, h, up,
        M, N, K, R, slices, float(scale),
        TRANSPOSED=transposed, PRECISION=tables.precision(a.dtype), GROUP_M=tables.GROUP_M,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, BLOCK_R=block_r,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def shrink(plan, parts, a, b, *, transposed, scale=1.0, gain=None, outer=None, h=None, factor=1.0):
    """Launches _shrink_kernel; a is [..., K]."""
    M, K, tile = a.shape[:-1].numel(), a.shape[-1], plan.tile
    R = b.shape[1] if transposed else b.shape[0]
    _shrink_kernel[(cdiv(M, tile.m), plan.slices)](
        parts, outer, a, b, h, gain, M, K, R, plan.steps, float(scale), float(factor),
        TRANSPOSED=transposed, PRECISION=tables.precision(a.dtype),
        BLOCK_M=tile.m, BLOCK_K=tile.k, BLOCK_R=tables.padded(R),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def on(device):
    """Triton launches on the current GPU, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

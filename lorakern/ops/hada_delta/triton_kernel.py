"""hada_delta in Triton. Spec: lorakern/ops/hada_delta/reference.py

One pass: two tiles of low-rank products are summed in float32, multiplied on chip and rounded once;
the spec writes and reads the products. Backward takes a tile of ddelta through both products to
all four factors; hada_linear makes that tile itself and never has the whole in memory.
"""

import triton
import triton.language as tl

from lorakern.ops.lora_linear import triton_tables as tables
from lorakern.ops.lora_linear.triton_bwd import slices_of, sum_all
from lorakern.ops.lora_linear.triton_kernel import on
from lorakern.ops.lora_linear.triton_tables import cdiv
from lorakern.ops.lora_linear.triton_tile import product_tile


@triton.jit(do_not_specialize=["scale"])
def _hada_delta_kernel(
    delta_ptr, down1_ptr, up1_ptr, down2_ptr, up2_ptr, N, K, R, S, scale,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """delta[N, K] = scale · (up1[N, R] down1[R, K]) ∘ (up2[N, S] down2[S, K])"""
    rows_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols_K = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = product_tile(
        up1_ptr, down1_ptr, rows_N, cols_K, N, K, R, BLOCK_N, BLOCK_K, BLOCK_R, PRECISION
    )
    second = product_tile(
        up2_ptr, down2_ptr, rows_N, cols_K, N, K, S, BLOCK_N, BLOCK_K, BLOCK_R, PRECISION
    )
    in_NK = (rows_N < N)[:, None] & (cols_K < K)[None, :]
    tl.store(delta_ptr + rows_N[:, None] * K + cols_K[None, :], scale * first * second, mask=in_NK)


@triton.jit
def _to_factors(
    ddown_ptr, dup_ptr, dproduct_NK, down_ptr, up_ptr, tile_N, tile_K, rows_N, cols_K, N, K, R,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """This tile's share of ddown and dup, of the gradient of up down."""
    in_N, in_K = rows_N < N, cols_K < K
    dproduct = dproduct_NK.to(up_ptr.dtype.element_ty)
    for r in range(0, R, BLOCK_R):
        rank_R = r + tl.arange(0, BLOCK_R)
        at_NR = rows_N[:, None] * R + rank_R[None, :]
        at_RK = rank_R[:, None] * K + cols_K[None, :]
        in_NR = in_N[:, None] & (rank_R < R)[None, :]
        in_RK = (rank_R < R)[:, None] & in_K[None, :]
        if ddown_ptr is not None:
            up = tl.load(up_ptr + at_NR, mask=in_NR, other=0.0)
            part = tl.dot(tl.trans(up), dproduct, input_precision=PRECISION)
            tl.store(ddown_ptr + tl.cast(tile_N, tl.int64) * R * K + at_RK, part, mask=in_RK)
        if dup_ptr is not None:
            down = tl.load(down_ptr + at_RK, mask=in_RK, other=0.0)
            part = tl.dot(dproduct, tl.trans(down), input_precision=PRECISION)
            tl.store(dup_ptr + tl.cast(tile_K, tl.int64) * N * R + at_NR, part, mask=in_NR)


@triton.jit(do_not_specialize=["M", "steps", "scale"])
def _hada_grads_kernel(
    ddown1_ptr, dup1_ptr, ddown2_ptr, dup2_ptr, ddelta_ptr, dy_ptr, x_ptr, gain_ptr,
    down1_ptr, up1_ptr, down2_ptr, up2_ptr, M, N, K, R, S, steps, scale,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Shares of one tile of ddelta[N, K] in ddown[slice and row of tiles, R, K] and
    dup[slice and column of tiles, N, R], for both pairs.

    Without ddelta the tile is gain[N] ∘ dy[M, N]ᵀ x[M, K] over a slice of steps · BLOCK_M rows:
    the shares are linear in it, so slices need not be added up before.
    """
    slice_M = tl.program_id(2)
    rows_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols_K = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_N, in_K = rows_N < N, cols_K < K
    if ddelta_ptr is not None:
        at_NK = rows_N[:, None] * K + cols_K[None, :]
        mask = in_N[:, None] & in_K[None, :]
        ddelta = tl.load(ddelta_ptr + at_NK, mask=mask, other=0.0).to(tl.float32)
    else:
        step_M = tl.arange(0, BLOCK_M)
        first_M = slice_M.to(tl.int64) * steps * BLOCK_M
        dy_NM = dy_ptr + (first_M + step_M)[None, :] * N + rows_N[:, None]
        x_MK = x_ptr + (first_M + step_M)[:, None] * K + cols_K[None, :]
        ddelta = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for m in range(0, steps * BLOCK_M, BLOCK_M):
            in_M = first_M + m + step_M < M
            dy = tl.load(dy_NM, mask=in_N[:, None] & in_M[None, :], other=0.0)
            x = tl.load(x_MK, mask=in_M[:, None] & in_K[None, :], other=0.0)
            ddelta = tl.dot(dy, x, ddelta, input_precision=PRECISION)
            dy_NM += BLOCK_M * N
            x_MK += BLOCK_M * K
    ddelta *= scale
    if gain_ptr is not None:
        ddelta *= tl.load(gain_ptr + rows_N, mask=in_N, other=0.0)[:, None].to(tl.float32)

    tile_N = slice_M * tl.num_programs(0) + tl.program_id(0)
    tile_K = slice_M * tl.num_programs(1) + tl.program_id(1)
    if ddown1_ptr is not None or dup1_ptr is not None:
        second = product_tile(
            up2_ptr, down2_ptr, rows_N, cols_K, N, K, S, BLOCK_N, BLOCK_K, BLOCK_R, PRECISION
        )
        _to_factors(
            ddown1_ptr, dup1_ptr, ddelta * second, down1_ptr, up1_ptr, tile_N, tile_K,
            rows_N, cols_K, N, K, R, BLOCK_R, PRECISION,
        )  # fmt: skip
    if ddown2_ptr is not None or dup2_ptr is not None:
        first = product_tile(
            up1_ptr, down1_ptr, rows_N, cols_K, N, K, R, BLOCK_N, BLOCK_K, BLOCK_R, PRECISION
        )
        _to_factors(
            ddown2_ptr, dup2_ptr, ddelta * first, down2_ptr, up2_ptr, tile_N, tile_K,
            rows_N, cols_K, N, K, S, BLOCK_R, PRECISION,
        )  # fmt: skip


def hada_delta_fwd(down1, up1, down2, up2, scale):
    down1, up1, down2, up2 = (t.contiguous() for t in (down1, up1, down2, up2))
    (N, R), (S, K) = up1.shape, down2.shape
    delta = up1.new_empty((N, K))
    tile = tables.DELTA
    if delta.numel():
        with on(up1.device):
            _hada_delta_kernel[(cdiv(N, tile.m), cdiv(K, tile.n))](
                delta, down1, up1, down2, up2, N, K, R, S, float(scale),
                PRECISION=tables.precision(up1.dtype), BLOCK_N=tile.m, BLOCK_K=tile.n,
                BLOCK_R=tile.k, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return delta


def hada_delta_bwd(ddelta, down1, up1, down2, up2, scale, needs):
    ddelta, *factors = (t.contiguous() for t in (ddelta, down1, up1, down2, up2))
    return factor_grads(factors, scale, needs, ddelta=ddelta)


def factor_grads(factors, scale, needs, *, ddelta=None, dy=None, x=None, gain=None):
    """ddown1, dup1, ddown2 and dup2 from ddelta [N, K], or from dy [..., N] and x [..., K], whose
    product it is; those that are not needed are empty."""
    (N, R), (S, K), dtype, device = (
        factors[1].shape,
        factors[2].shape,
        factors[0].dtype,
        factors[0].device,
    )
    grads = tuple(
        f.new_empty(f.shape if need else 0) for f, need in zip(factors, needs, strict=True)
    )
    if not any(needs):
        return grads
    M = 1 if ddelta is not None else x.shape[:-1].numel()
    plan = tables.outer(M, N, K, dtype, device)
    tile, sums = plan.tile, []
    tiles = cdiv(N, tile.m), cdiv(K, tile.n)
    # a share of ddown in each row of tiles, of dup in each column
    parts = [
        slices_of(sums, g, plan.slices * tiles[i % 2]) if need else None
        for i, (g, need) in enumerate(zip(grads, needs, strict=True))
    ]
    with on(device):
        _hada_grads_kernel[(*tiles, plan.slices)](
            *parts, ddelta, dy, x, gain, *factors, M, N, K, R, S, plan.steps, float(scale),
            PRECISION=tables.precision(dtype), BLOCK_M=tile.k, BLOCK_N=tile.m, BLOCK_K=tile.n,
            BLOCK_R=tables.DELTA.k, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        sum_all(sums)
    return grads

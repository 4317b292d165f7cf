"""What the Triton kernels of several ops share: pieces of a GEMM, and a tile of a low-rank product.

The accumulator of a GEMM is float32: whatever joins the product joins it there, before the one
rounding of `finish`.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Which tile of [M, N] a program makes: GROUP_M row tiles share their tiles of w in L2."""
    tiles_N = tl.cdiv(N, BLOCK_N)
    first_M = pid // (GROUP_M * tiles_N) * GROUP_M
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first_M, GROUP_M)
    tile_M = first_M + pid % (GROUP_M * tiles_N) % height
    return tile_M, pid % (GROUP_M * tiles_N) // height


@triton.jit
def gained(a, gain_K):
    """a ∘ gain as the sum of two tiles of a's dtype: one rounding would lose a gain near 1."""
    product = a.to(tl.float32) * gain_K[None, :].to(tl.float32)
    rounded = product.to(a.dtype)
    return rounded, (product - rounded.to(tl.float32)).to(a.dtype)


@triton.jit
def finish(y_ptr, acc_MN, bias_ptr, gain_ptr, dy_ptr, tile_M, rows_M, cols_N, M, N):
    """Stores y[M, N] = gain[N] ∘ acc + bias[N]; with dy[M, N] y[tile_M, N], the column sums of
    dy ∘ acc."""
    in_N = cols_N < N
    in_MN = (rows_M < M)[:, None] & in_N[None, :]
    at_MN = rows_M[:, None] * N + cols_N[None, :]
    if dy_ptr is not None:
        dy = tl.load(dy_ptr + at_MN, mask=in_MN, other=0.0).to(tl.float32)
        row = y_ptr + tl.cast(tile_M, tl.int64) * N + cols_N
        tl.store(row, tl.sum(dy * acc_MN, axis=0), mask=in_N)
    else:
        if gain_ptr is not None:
            acc_MN *= tl.load(gain_ptr + cols_N, mask=in_N, other=0.0)[None, :].to(tl.float32)
        if bias_ptr is not None:
            acc_MN += tl.load(bias_ptr + cols_N, mask=in_N, other=0.0)[None, :].to(tl.float32)
        tl.store(y_ptr + at_MN, acc_MN, mask=in_MN)


@triton.jit
def low_rank_tile(
    up_ptr, down_ptr, rows_N, cols_K, N, K, R, first, acc_NK,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr, FLIPPED: tl.constexpr = False,
):  # fmt: skip
    """acc + up[N, R] down[R, K] at rows_N and cols_K in float32, over BLOCK_R ranks from first.

    FLIPPED: the transpose.
    """
    rank_R = first + tl.arange(0, BLOCK_R)
    in_R = rank_R < R
    up_NR = up_ptr + rows_N[:, None] * R + rank_R[None, :]
    down_RK = down_ptr + rank_R[:, None] * K + cols_K[None, :]
    up = tl.load(up_NR, mask=(rows_N < N)[:, None] & in_R[None, :], other=0.0)
    down = tl.load(down_RK, mask=in_R[:, None] & (cols_K < K)[None, :], other=0.0)
    left, right = (tl.trans(down), tl.trans(up)) if FLIPPED else (up, down)
    return tl.dot(left, right, acc_NK, input_precision=PRECISION)


@triton.jit
def product_tile(
    up_ptr, down_ptr, rows_N, cols_K, N, K, R,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same over all ranks, BLOCK_R a step."""
    acc_NK = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for r in range(0, R, BLOCK_R):
        acc_NK = low_rank_tile(
            up_ptr, down_ptr, rows_N, cols_K, N, K, R, r, acc_NK, BLOCK_R, PRECISION
        )
    return acc_NK

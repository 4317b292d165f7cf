"""hada_linear in Triton. Spec: lorakern/ops/hada_linear/reference.py

ΔW is never in memory. For small ranks it is a LoRA of rank R·S, whose factors are the Khatri-Rao
products of the four: lora_linear's kernels run. Otherwise the main loop of the base product makes
each tile of ΔW on chip, two products of depth R and S and one by elements, and a second product
takes it into the same float32 accumulator. The spec makes two O × I tensors and multiplies by both.
"""

import triton
import triton.language as tl

from lorakern.ops.lora_linear import triton_tables as tables
from lorakern.ops.lora_linear.triton_kernel import lora_linear_fwd, on
from lorakern.ops.lora_linear.triton_tables import cdiv
from lorakern.ops.lora_linear.triton_tile import finish, gained, low_rank_tile, tile_of


@triton.jit(do_not_specialize=["M", "scale"])
def _add_hada_kernel(
    y_ptr, a_ptr, w_ptr, bias_ptr, gain_N_ptr, gain_K_ptr, dy_ptr,
    down1_ptr, up1_ptr, down2_ptr, up2_ptr, M, N, K, R, S, scale,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y[M, N] = gain_N ∘ ((a[M, K] ∘ gain_K) (w[N, K] + scale · delta[N, K])ᵀ) + bias[N]

    delta = (up1[N, R] down1[R, K]) ∘ (up2[N, S] down2[S, K]), with R at most BLOCK_R and S at most
    BLOCK_S. What is None is not there.
    With dy[M, N]: y[row tile, N] = the column sums of dy ∘ the bracket.
    TRANSPOSED: w is [K, N], and delta [K, N] is of up [K, R] and down [R, N].
    """
    tile_M, tile_N = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    # int64: M·N passes 2³¹ at a batch of 103 of SDXL's 4096 tokens with N = 5120
    rows_M = tile_M.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols_N = tile_N.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    step_K = tl.arange(0, BLOCK_K)
    in_M, in_N = rows_M[:, None] < M, cols_N[None, :] < N
    N_long = tl.cast(N, tl.int64)

    a_MK = a_ptr + rows_M[:, None] * K + step_K[None, :]
    if TRANSPOSED:
        w_KN = w_ptr + step_K[:, None] * N_long + cols_N[None, :]
    else:
        w_KN = w_ptr + cols_N[None, :] * K + step_K[:, None]

    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        cols_K = k + step_K
        in_K = cols_K < K
        a = tl.load(a_MK, mask=in_M & in_K[None, :], other=0.0)
        w = tl.load(w_KN, mask=in_K[:, None] & in_N, other=0.0)
        # of BLOCK_N × BLOCK_K either way: the larger dim fills the matrix instruction
        if TRANSPOSED:
            rows_K = cols_K.to(tl.int64)
            first = low_rank_tile(
                up1_ptr, down1_ptr, rows_K, cols_N, K, N, R, 0, None, BLOCK_R, PRECISION, True
            )
            second = low_rank_tile(
                up2_ptr, down2_ptr, rows_K, cols_N, K, N, S, 0, None, BLOCK_S, PRECISION, True
            )
        else:
            first = low_rank_tile(
                up1_ptr, down1_ptr, cols_N, cols_K, N, K, R, 0, None, BLOCK_R, PRECISION
            )
            second = low_rank_tile(
                up2_ptr, down2_ptr, cols_N, cols_K, N, K, S, 0, None, BLOCK_S, PRECISION
            )
        delta = tl.trans(scale * first * second)
        if gain_K_ptr is not None:
            a, rest = gained(a, tl.load(gain_K_ptr + cols_K, mask=in_K, other=0.0))
            if a.dtype != tl.float32:
                acc_MN = tl.dot(rest, w, acc_MN, input_precision=PRECISION)
        if a.dtype == tl.float32:
            w += delta
        else:
            # rounded apart from w: relative to the update
            acc_MN = tl.dot(a, delta.to(a.dtype), acc_MN, input_precision=PRECISION)
        acc_MN = tl.dot(a, w, acc_MN, input_precision=PRECISION)
        a_MK += BLOCK_K
        w_KN += BLOCK_K * N_long if TRANSPOSED else BLOCK_K
    finish(y_ptr, acc_MN, bias_ptr, gain_N_ptr, dy_ptr, tile_M, rows_M, cols_N, M, N)


def hada_linear_fwd(x, weight, bias, down1, up1, down2, up2, scale, gain):
    x, weight, *factors = (t.contiguous() for t in (x, weight, down1, up1, down2, up2))
    if tables.khatri_rao(*weight.shape, down1.shape[0] * down2.shape[0]):
        return lora_linear_fwd(x, weight, bias, *khatri_rao(*factors), scale, gain)[0]
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if y.numel():
        with on(x.device):
            add_hada(y, x, weight, factors, scale, bias=bias, gain_n=gain)
    return y


def khatri_rao(down1, up1, down2, up2):
    """down [R·S, I] and up [O, R·S] with up down = (up1 down1) ∘ (up2 down2)"""
    down = (down1[:, None] * down2).flatten(0, 1)
    return down, (up1[:, :, None] * up2[:, None, :]).flatten(1)


def add_hada(
    y, a, w, factors, scale, *, bias=None, gain_n=None, gain_k=None, dy=None, transposed=False
):
    """Launches _add_hada_kernel; y is [..., N] and a is [..., K]."""
    M, N, K = a.shape[:-1].numel(), y.shape[-1], a.shape[-1]
    R, S = factors[0].shape[0], factors[2].shape[0]
    tile = tables.hada(M, N, K, max(R, S), a.dtype, a.device, gain_k is not None)
    _add_hada_kernel[(cdiv(M, tile.m) * cdiv(N, tile.n),)](
        y, a, w, bias, gain_n, gain_k, dy, *factors, M, N, K, R, S, float(scale),
        TRANSPOSED=transposed, PRECISION=tables.precision(a.dtype), GROUP_M=tables.GROUP_M,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        BLOCK_R=tables.padded(R), BLOCK_S=tables.padded(S),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip

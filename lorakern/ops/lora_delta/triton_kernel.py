"""lora_delta in Triton. Spec: lorakern/ops/lora_delta/reference.py

One pass: a tile of up down is summed in float32, scaled and rounded once, where the spec writes the
product and reads it again. Backward is two sums over ddelta, with lora_linear's kernels.
"""

import triton
import triton.language as tl

from lorakern.ops.lora_linear import triton_tables as tables
from lorakern.ops.lora_linear.triton_bwd import row_products, slices_of, sum_all
from lorakern.ops.lora_linear.triton_kernel import on, shrink
from lorakern.ops.lora_linear.triton_tables import cdiv
from lorakern.ops.lora_linear.triton_tile import product_tile


@triton.jit(do_not_specialize=["scale"])
def _lora_delta_kernel(
    delta_ptr, down_ptr, up_ptr, N, K, R, scale,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """delta[N, K] = scale · up[N, R] down[R, K]"""
    rows_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols_K = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    product = product_tile(
        up_ptr, down_ptr, rows_N, cols_K, N, K, R, BLOCK_N, BLOCK_K, BLOCK_R, PRECISION
    )
    in_NK = (rows_N < N)[:, None] & (cols_K < K)[None, :]
    tl.store(delta_ptr + rows_N[:, None] * K + cols_K[None, :], scale * product, mask=in_NK)


def lora_delta_fwd(down, up, scale):
    down, up = down.contiguous(), up.contiguous()
    (N, R), K = up.shape, down.shape[1]
    delta = up.new_empty((N, K))
    tile = tables.DELTA
    if delta.numel():
        with on(up.device):
            _lora_delta_kernel[(cdiv(N, tile.m), cdiv(K, tile.n))](
                delta, down, up, N, K, R, float(scale),
                PRECISION=tables.precision(up.dtype), BLOCK_N=tile.m, BLOCK_K=tile.n,
                BLOCK_R=tile.k, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return delta


def lora_delta_bwd(ddelta, down, up, scale, needs):
    ddelta, down, up = (t.contiguous() for t in (ddelta, down, up))
    (N, R), K, (need_ddown, need_dup) = up.shape, down.shape[1], needs
    ddown = down.new_empty(down.shape if need_ddown else 0)
    dup = up.new_empty(up.shape if need_dup else 0)
    if ddelta.numel() == 0:
        return ddown.zero_(), dup.zero_()
    sums = []
    with on(up.device):
        if need_ddown:
            row_products(sums, ddown, ddelta, up, scale, transposed=True)
        if need_dup:
            plan = tables.shrink(N, K, R, ddelta.dtype, ddelta.device, outer=False)
            parts = slices_of(sums, dup, plan.slices)
            shrink(plan, parts, ddelta, down, transposed=False, scale=scale)
        sum_all(sums)
    return ddown, dup

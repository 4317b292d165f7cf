"""Backward of kron_linear in Triton. Spec: lorakern/ops/kron_linear/reference.py

dx is the forward turned round. dC and dD each take one pass over x and dy: what stands between,
X Dᵀ or Cᵀ dY, is made again on chip. Sums over rows are cut into slices that are added up in a
fixed order by a second stage: no atomics, the same bits every time.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from lorakern.ops.kron_linear import reference
from lorakern.ops.kron_linear.triton_kernel import kron_product, times_d
from lorakern.ops.lora_linear import triton_tables as tables
from lorakern.ops.lora_linear.triton_bwd import column_sums, slices_of, sum_all
from lorakern.ops.lora_linear.triton_kernel import add, on
from lorakern.ops.lora_linear.triton_tables import cdiv


@triton.jit
def _load_dy(
    dy_ptr, gain_ptr, first_M, first_P, cols_A, M, A, P,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dy ∘ gain of a tile, [BLOCK_M · BLOCK_P, columns of C]"""
    row = tl.arange(0, BLOCK_M * BLOCK_P)
    at_M, at_P = first_M + row // BLOCK_P, first_P + row % BLOCK_P
    inside = ((at_M < M) & (at_P < P))[:, None] & (cols_A < A)[None, :]
    cols = at_P[:, None] + (cols_A * P)[None, :]
    dy = tl.load(dy_ptr + (at_M * A * P)[:, None] + cols, mask=inside, other=0.0)
    if gain_ptr is not None:
        dy = (dy * tl.load(gain_ptr + cols, mask=inside, other=0.0).to(tl.float32)).to(dy.dtype)
    return dy


@triton.jit(do_not_specialize=["M", "steps", "scale"])
def _kron_dc_kernel(
    dc_ptr, dy_ptr, x_ptr, gain_ptr, d_ptr, M, A, B, P, Q, steps, scale,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """dc[slice, A, B] = scale · the sum of dY (X Dᵀ)ᵀ, with dY [A, P] and X [B, Q], over rows of
    dy ∘ gain and x; a slice is `steps` tiles of rows and columns of D."""
    cols_A = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    first_B, tiles_P = tl.program_id(2) * BLOCK_B, tl.cdiv(P, BLOCK_P)
    acc_AB = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for step in range(steps):
        tile = tl.program_id(0) * steps + step
        first_M = (tile // tiles_P).to(tl.int64) * BLOCK_M
        first_P = tile % tiles_P * BLOCK_P
        t = times_d(
            x_ptr, None, d_ptr, first_M, first_B, first_P, M, B, P, Q,
            False, PRECISION, BLOCK_M, BLOCK_B, BLOCK_P, BLOCK_Q,
        )  # fmt: skip
        dy = _load_dy(dy_ptr, gain_ptr, first_M, first_P, cols_A, M, A, P, BLOCK_M, BLOCK_P)
        if BLOCK_B == 1:
            # in two steps, so that few terms are added in a row
            terms = tl.reshape(dy.to(tl.float32) * t, (BLOCK_M, BLOCK_P, BLOCK_A))
            acc_AB += tl.sum(tl.sum(terms, axis=1), axis=0)[:, None]
        else:
            acc_AB = tl.dot(tl.trans(dy), t.to(dy.dtype), acc_AB, input_precision=PRECISION)
    at_B = first_B + tl.arange(0, BLOCK_B)
    dc = dc_ptr + tl.program_id(0).to(tl.int64) * A * B + cols_A[:, None] * B + at_B[None, :]
    tl.store(dc, scale * acc_AB, mask=(cols_A < A)[:, None] & (at_B < B)[None, :])


@triton.jit(do_not_specialize=["M", "steps", "scale"])
def _kron_dd_kernel(
    dd_ptr, dy_ptr, x_ptr, gain_ptr, c_ptr, M, A, B, P, Q, steps, scale,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """dd[slice, P, Q] = scale · the sum of (Cᵀ dY)ᵀ X, with dY [A, P] and X [B, Q], over rows of
    dy ∘ gain and x; a slice is `steps` tiles of rows."""
    first_P = tl.program_id(1) * BLOCK_P
    cols_Q = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row = tl.arange(0, BLOCK_M * BLOCK_B)
    acc_PQ = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for step in range(steps):
        first_M = (tl.program_id(0) * steps + step).to(tl.int64) * BLOCK_M
        for b in range(0, B, BLOCK_B):
            at_B = b + tl.arange(0, BLOCK_B)
            w = tl.zeros((BLOCK_M * BLOCK_P, BLOCK_B), tl.float32)
            for a in range(0, A, BLOCK_A):
                at_A = a + tl.arange(0, BLOCK_A)
                dy = _load_dy(dy_ptr, gain_ptr, first_M, first_P, at_A, M, A, P, BLOCK_M, BLOCK_P)
                in_AB = (at_A < A)[:, None] & (at_B < B)[None, :]
                c = tl.load(c_ptr + at_A[:, None] * B + at_B[None, :], mask=in_AB, other=0.0)
                if BLOCK_B == 1:
                    w += tl.sum(dy.to(tl.float32) * tl.trans(c).to(tl.float32), axis=1)[:, None]
                else:
                    w = tl.dot(dy, c, w, input_precision=PRECISION)
            w_PMB = tl.permute(tl.reshape(w, (BLOCK_M, BLOCK_P, BLOCK_B)), (1, 0, 2))
            w_PX = tl.reshape(w_PMB, (BLOCK_P, BLOCK_M * BLOCK_B))
            x_M, x_B = first_M + row // BLOCK_B, b + row % BLOCK_B
            in_X = ((x_M < M) & (x_B < B))[:, None] & (cols_Q < Q)[None, :]
            at_X = (x_M * B * Q + x_B * Q)[:, None] + cols_Q[None, :]
            x = tl.load(x_ptr + at_X, mask=in_X, other=0.0)
            acc_PQ = tl.dot(w_PX.to(x.dtype), x, acc_PQ, input_precision=PRECISION)
    at_P = first_P + tl.arange(0, BLOCK_P)
    dd = dd_ptr + tl.program_id(0).to(tl.int64) * P * Q + at_P[:, None] * Q + cols_Q[None, :]
    tl.store(dd, scale * acc_PQ, mask=(at_P < P)[:, None] & (cols_Q < Q)[None, :])


def kron_linear_bwd(dy, x, weight, c_up, c_down, d_up, d_down, scale, gain, needs):
    dy, x, weight = (t.contiguous() for t in (dy, x, weight))
    c, d = (t.contiguous() for t in reference.whole(c_up, c_down, d_up, d_down))
    need_dx, *need_factors, need_dgain = needs
    need_dc, need_dd = any(need_factors[:2]), any(need_factors[2:])
    dx, dc, dd = (
        x.new_empty(shape if need else 0)
        for shape, need in ((x.shape, need_dx), (c.shape, need_dc), (d.shape, need_dd))
    )
    dgain = (x if gain is None else gain).new_empty(len(weight) if need_dgain else 0)
    if x.numel() == 0:
        dgain, dc, dd = dgain.zero_(), dc.zero_(), dd.zero_()
    else:
        sums = []
        with on(x.device):
            if need_dgain:
                # y is not kept, so the update is made again
                kron_product(z := torch.empty_like(dy), x, c, d, scale)
                column_sums(sums, dgain, dy, x, weight, onto=z)
            if need_dx:
                kron_product(dx, dy, c, d, scale, gain=gain, transposed=True)
                add(dx, dy, weight, onto=dx, gain_k=gain, transposed=True)
            if need_dc:
                _dc(sums, dc, dy, x, gain, d, scale)
            if need_dd:
                _dd(sums, dd, dy, x, gain, c, scale)
            sum_all(sums)
    grads = [x.new_empty(0)] * 4
    if need_dc:
        grads[:2] = reference.through(dc, c_up, c_down)
    if need_dd:
        grads[2:] = reference.through(dd, d_up, d_down)
    kept = (g if need else x.new_empty(0) for g, need in zip(grads, need_factors, strict=True))
    return dx, *kept, dgain


def _dc(sums, dc, dy, x, gain, d, scale):
    M, ((A, B), (P, Q)) = x.shape[:-1].numel(), (dc.shape, d.shape)
    tile = tables.kron(A, B, P, Q, x.dtype)
    blocks = cdiv(A, tile.a), cdiv(B, tile.b)
    tiles = cdiv(M, tile.m) * cdiv(P, tile.p)
    plan = tables.spread(tiles, 1, blocks[0] * blocks[1], x.device)
    _kron_dc_kernel[(plan.slices, *blocks)](
        slices_of(sums, dc, plan.slices), dy, x, gain, d, M, A, B, P, Q, plan.steps, float(scale),
        **_options(tile, x.dtype),
    )  # fmt: skip


def _dd(sums, dd, dy, x, gain, c, scale):
    M, ((A, B), (P, Q)) = x.shape[:-1].numel(), (c.shape, dd.shape)
    tile = tables.kron(A, B, P, Q, x.dtype)
    # A is walked in steps here
    tile = replace(tile, a=min(16, tile.a))
    blocks = cdiv(P, tile.p), cdiv(Q, tile.q)
    plan = tables.spread(cdiv(M, tile.m), 1, blocks[0] * blocks[1], x.device)
    _kron_dd_kernel[(plan.slices, *blocks)](
        slices_of(sums, dd, plan.slices), dy, x, gain, c, M, A, B, P, Q, plan.steps, float(scale),
        **_options(tile, x.dtype),
    )  # fmt: skip


def _options(tile, dtype):
    return dict(
        PRECISION=tables.precision(dtype),
        BLOCK_M=tile.m, BLOCK_A=tile.a, BLOCK_B=tile.b, BLOCK_P=tile.p, BLOCK_Q=tile.q,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip

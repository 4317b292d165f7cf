"""kron_linear in Triton. Spec: lorakern/ops/kron_linear/reference.py

C ⊗ D is never made. One kernel multiplies each row X [B, Q] of x by Dᵀ and, still on chip, by C; it
writes into y. lora_linear's GEMM adds that to the base product in its float32 accumulator, and
rounds once. So the update costs about Q·P·B + A·B·P products a row where the spec's layers of
temporaries cost six passes over M × O values.
"""

import triton
import triton.language as tl

from lorakern.ops.kron_linear import reference
from lorakern.ops.lora_linear import triton_tables as tables
from lorakern.ops.lora_linear.triton_kernel import add, on
from lorakern.ops.lora_linear.triton_tables import cdiv


@triton.jit
def times_d(
    x_ptr, gain_ptr, d_ptr, first_M, first_B, first_P, M, B, P, Q,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """X Dᵀ of a tile, [BLOCK_M · BLOCK_P, BLOCK_B] in float32, with X [M, B, Q] = x ∘ gain."""
    row = tl.arange(0, BLOCK_M * BLOCK_B)
    at_M, at_B = first_M + row // BLOCK_B, first_B + row % BLOCK_B
    in_MB = (at_M < M) & (at_B < B)
    cols_P = first_P + tl.arange(0, BLOCK_P)
    t = tl.zeros((BLOCK_M * BLOCK_B, BLOCK_P), tl.float32)
    for q in range(0, Q, BLOCK_Q):
        at_Q = q + tl.arange(0, BLOCK_Q)
        in_X = in_MB[:, None] & (at_Q < Q)[None, :]
        cols = at_B[:, None] * Q + at_Q[None, :]
        x = tl.load(x_ptr + (at_M * B * Q)[:, None] + cols, mask=in_X, other=0.0)
        if gain_ptr is not None:
            x = (x * tl.load(gain_ptr + cols, mask=in_X, other=0.0).to(tl.float32)).to(x.dtype)
        at_QP = at_Q[:, None] * P + cols_P if TRANSPOSED else cols_P * Q + at_Q[:, None]
        d = tl.load(d_ptr + at_QP, mask=(at_Q < Q)[:, None] & (cols_P < P), other=0.0)
        t = tl.dot(x, d, t, input_precision=PRECISION)
    t = tl.permute(tl.reshape(t, (BLOCK_M, BLOCK_B, BLOCK_P)), (0, 2, 1))
    return tl.reshape(t, (BLOCK_M * BLOCK_P, BLOCK_B))


@triton.jit(do_not_specialize=["M", "scale"])
def _kron_product_kernel(
    z_ptr, x_ptr, gain_ptr, c_ptr, d_ptr, M, A, B, P, Q, scale,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """z[M, A·P] = scale · (x[M, B·Q] ∘ gain[B·Q]) (C[A, B] ⊗ D[P, Q])ᵀ

    TRANSPOSED: C is [B, A] and D is [Q, P]. BLOCK_B is 1 where a matrix instruction would be
    mostly padding: C then joins in by plain products.
    """
    tiles_P = tl.cdiv(P, BLOCK_P)
    # int64: M·A·P passes 2³¹ at a batch of 103 of SDXL's 4096 tokens with 5120 features
    first_M = (tl.program_id(0) // tiles_P).to(tl.int64) * BLOCK_M
    first_P = tl.program_id(0) % tiles_P * BLOCK_P
    cols_A = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    acc = tl.zeros((BLOCK_M * BLOCK_P, BLOCK_A), tl.float32)
    for b in range(0, B, BLOCK_B):
        t = times_d(
            x_ptr, gain_ptr, d_ptr, first_M, b, first_P, M, B, P, Q,
            TRANSPOSED, PRECISION, BLOCK_M, BLOCK_B, BLOCK_P, BLOCK_Q,
        )  # fmt: skip
        at_B = b + tl.arange(0, BLOCK_B)
        at_BA = at_B[:, None] * A + cols_A if TRANSPOSED else cols_A * B + at_B[:, None]
        c = tl.load(c_ptr + at_BA, mask=(at_B < B)[:, None] & (cols_A < A), other=0.0)
        if BLOCK_B == 1:
            acc += t * c.to(tl.float32)
        else:
            acc = tl.dot(t.to(c.dtype), c, acc, input_precision=PRECISION)
    row = tl.arange(0, BLOCK_M * BLOCK_P)
    at_M, at_P = first_M + row // BLOCK_P, first_P + row % BLOCK_P
    in_Z = ((at_M < M) & (at_P < P))[:, None] & (cols_A < A)[None, :]
    z = z_ptr + (at_M * A * P + at_P)[:, None] + (cols_A * P)[None, :]
    tl.store(z, scale * acc, mask=in_Z)


def kron_linear_fwd(x, weight, bias, c_up, c_down, d_up, d_down, scale, gain):
    x, weight = x.contiguous(), weight.contiguous()
    c, d = reference.whole(c_up, c_down, d_up, d_down)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if y.numel():
        with on(x.device):
            kron_product(y, x, c.contiguous(), d.contiguous(), scale)
            add(y, x, weight, onto=y, bias=bias, gain_n=gain)
    return y


def kron_product(z, x, c, d, scale, *, gain=None, transposed=False):
    """Launches _kron_product_kernel; x is [..., B·Q] and z [..., A·P]."""
    M, ((A, B), (P, Q)) = x.shape[:-1].numel(), (c.shape, d.shape)
    if transposed:
        A, B, P, Q = B, A, Q, P
    tile = tables.kron(A, B, P, Q, x.dtype)
    _kron_product_kernel[(cdiv(M, tile.m) * cdiv(P, tile.p), cdiv(A, tile.a))](
        z, x, gain, c, d, M, A, B, P, Q, float(scale),
        TRANSPOSED=transposed, PRECISION=tables.precision(x.dtype),
        BLOCK_M=tile.m, BLOCK_A=tile.a, BLOCK_B=tile.b, BLOCK_P=tile.p, BLOCK_Q=tile.q,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip

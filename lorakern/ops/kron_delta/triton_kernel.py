"""kron_delta in Triton. Spec: lorakern/ops/kron_delta/reference.py

One pass that writes ΔW in its final layout. Backward is two sums over ddelta with its entries read
as [A·B, P·Q], which the spec writes out in that order first.
"""

import triton
import triton.language as tl

from lorakern.ops.lora_linear import triton_tables as tables
from lorakern.ops.lora_linear.triton_bwd import slices_of, sum_all
from lorakern.ops.lora_linear.triton_kernel import on
from lorakern.ops.lora_linear.triton_tables import cdiv

BLOCK_N, BLOCK_K = 64, 64


@triton.jit(do_not_specialize=["scale"])
def _kron_delta_kernel(
    delta_ptr, c_ptr, d_ptr, A, B, P, Q, scale, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """delta[A·P, B·Q] = scale · c[A, B] ⊗ d[P, Q]"""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows < A * P)[:, None] & (cols < B * Q)[None, :]
    at_c = (rows // P)[:, None] * B + (cols // Q)[None, :]
    at_d = (rows % P)[:, None] * Q + (cols % Q)[None, :]
    c = tl.load(c_ptr + at_c, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_ptr + at_d, mask=inside, other=0.0).to(tl.float32)
    at = rows.to(tl.int64)[:, None] * (B * Q) + cols[None, :]
    tl.store(delta_ptr + at, scale * c * d, mask=inside)


@triton.jit(do_not_specialize=["steps", "scale"])
def _kron_sums_kernel(
    out_ptr, ddelta_ptr, v_ptr, N, K, B, P, Q, steps, scale,
    OF_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[slice, N] = scale · the sum of ddelta[n, k] · v[k] over a slice of steps · BLOCK_K.

    n is an entry of C [A, B] and k one of D [P, Q]; OF_D: the reverse.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * steps * BLOCK_K
    acc_N = tl.zeros((BLOCK_N,), tl.float32)
    for step in range(0, steps * BLOCK_K, BLOCK_K):
        k = first + step + tl.arange(0, BLOCK_K)
        if OF_D:
            of_c, of_d = k[None, :], n[:, None]
        else:
            of_c, of_d = n[:, None], k[None, :]
        row = (of_c // B * P + of_d // Q).to(tl.int64)
        at = row * (B * Q) + (of_c % B * Q + of_d % Q)
        inside = (n < N)[:, None] & (k < K)[None, :]
        ddelta = tl.load(ddelta_ptr + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        acc_N += tl.sum(ddelta * v[None, :], axis=1)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * N + n, scale * acc_N, mask=n < N)


def kron_delta_fwd(c, d, scale):
    c, d = c.contiguous(), d.contiguous()
    (A, B), (P, Q) = c.shape, d.shape
    delta = c.new_empty((A * P, B * Q))
    if delta.numel():
        with on(c.device):
            _kron_delta_kernel[(cdiv(A * P, BLOCK_N), cdiv(B * Q, BLOCK_K))](
                delta, c, d, A, B, P, Q, float(scale), BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4
            )
    return delta


def kron_delta_bwd(ddelta, c, d, scale, needs):
    ddelta, c, d = (t.contiguous() for t in (ddelta, c, d))
    dc, dd = (t.new_empty(t.shape if need else 0) for t, need in zip((c, d), needs, strict=True))
    if ddelta.numel() == 0:
        return dc.zero_(), dd.zero_()
    sums, (B, P, Q) = [], (c.shape[1], *d.shape)
    with on(c.device):
        for of_d, out, v in ((False, dc, d), (True, dd, c)):
            if not needs[of_d]:
                continue
            blocks = cdiv(out.numel(), BLOCK_N)
            plan = tables.spread(v.numel(), BLOCK_K, blocks, c.device)
            _kron_sums_kernel[(blocks, plan.slices)](
                slices_of(sums, out, plan.slices), ddelta, v, out.numel(), v.numel(), B, P, Q,
                plan.steps, float(scale),
                OF_D=of_d, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4,
            )  # fmt: skip
        sum_all(sums)
    return dc, dd

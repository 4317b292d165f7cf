"""Backward of hada_linear in Triton. Spec: lorakern/ops/hada_linear/reference.py

For small ranks lora_linear's, with h made again: it is not kept. Otherwise dx is the forward's
GEMM turned round, and each tile of dyᵀ x goes through the products of the factors to their
gradients while it is on chip: no O × I tensor is in memory.
"""

from lorakern.ops.hada_delta.triton_kernel import factor_grads
from lorakern.ops.hada_linear.triton_kernel import add_hada, khatri_rao
from lorakern.ops.lora_linear import triton_tables as tables
from lorakern.ops.lora_linear.triton_bwd import lora_linear_bwd, slices_of, sum_all
from lorakern.ops.lora_linear.triton_kernel import on, shrink
from lorakern.ops.lora_linear.triton_tables import cdiv


def hada_linear_bwd(dy, x, weight, down1, up1, down2, up2, scale, gain, needs):
    dy, x, weight, *factors = (t.contiguous() for t in (dy, x, weight, down1, up1, down2, up2))
    need_dx, *need_factors, need_dgain = needs
    if tables.khatri_rao(*weight.shape, down1.shape[0] * down2.shape[0]):
        return _as_lora(dy, x, weight, factors, scale, gain, needs)
    M, (N, K) = x.shape[:-1].numel(), weight.shape
    dx = x.new_empty(x.shape if need_dx else 0)
    dgain = (x if gain is None else gain).new_empty(N if need_dgain else 0)
    if M == 0:
        pairs = zip(factors, need_factors, strict=True)
        return dx, *(f.new_zeros(f.shape if need else 0) for f, need in pairs), dgain.zero_()
    with on(x.device):
        if need_dgain:
            rank, sums = max(down1.shape[0], down2.shape[0]), []
            tile = tables.hada(M, N, K, rank, x.dtype, x.device, False)
            parts = slices_of(sums, dgain, cdiv(M, tile.m))
            add_hada(parts.view(-1, N), x, weight, factors, scale, dy=dy)
            sum_all(sums)
        if need_dx:
            add_hada(dx, dy, weight, factors, scale, gain_k=gain, transposed=True)
    return dx, *factor_grads(factors, scale, need_factors, dy=dy, x=x, gain=gain), dgain


def _as_lora(dy, x, weight, factors, scale, gain, needs):
    need_dx, *need_factors, need_dgain = needs
    need_downs, need_ups = any(need_factors[::2]), any(need_factors[1::2])
    down, up = khatri_rao(*factors)
    M, R = x.shape[:-1].numel(), down.shape[0]
    h = x.new_empty((*x.shape[:-1], R))
    if M and (need_ups or need_dgain):
        plan = tables.shrink(M, x.shape[-1], R, x.dtype, x.device, outer=False)
        with on(x.device):
            # one slice, in the final dtype
            shrink(tables.cut(plan.tile, x.shape[-1], 1), h, x, down, transposed=False)
    wanted = [need_dx, need_downs, need_ups, need_dgain]
    dx, ddown, dup, dgain = lora_linear_bwd(dy, x, h, weight, down, up, scale, gain, wanted)
    down1, up1, down2, up2 = factors
    ranks = down1.shape[0], down2.shape[0]
    grads = [x.new_empty(0)] * 4
    if need_downs:
        # [R, S, I]
        ddown = ddown.unflatten(0, ranks)
        grads[0::2] = (ddown * down2).sum(1), (ddown * down1[:, None]).sum(0)
    if need_ups:
        # [O, R, S]
        dup = dup.unflatten(1, ranks)
        grads[1::2] = (dup * up2[:, None]).sum(2), (dup * up1[:, :, None]).sum(1)
    kept = (g if need else x.new_empty(0) for g, need in zip(grads, need_factors, strict=True))
    return dx, *kept, dgain

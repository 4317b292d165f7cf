"""What decoupled_attention takes, and what of it the CUDA kernel does."""

import torch
from torch import Tensor

from lorakern.ops.check import alike, only_cuda

# channels of a head that the CUDA kernel is compiled for, and the most groups of a call
CUDA_CHANNELS, CUDA_GROUPS = (40, 80, 160), 64


def check(q, keys, values, scales, masks, heads) -> None:
    """Raises ValueError, which says what was wanted and what came."""
    if q.dim() != 3 or heads < 1 or q.shape[-1] % heads:
        raise ValueError(f"want q [B, Q, {heads}·d] for heads={heads}, got {list(q.shape)}")
    images = len(keys) - 1
    if images < 0 or not len(values) == len(keys) == len(scales) + 1 == len(masks) + 1:
        raise ValueError(
            "want as many values as keys, and a scale and a mask for each group after the text;"
            f" got {len(keys)} keys, {len(values)} values, {len(scales)} scales, {len(masks)} masks"
        )
    batch, queries, channels = q.shape
    for j, (k, v) in enumerate(zip(keys, values, strict=True)):
        tokens = k.shape[1] if k.dim() == 3 else 0
        if tokens < 1 or not list(k.shape) == list(v.shape) == [batch, tokens, channels]:
            raise ValueError(
                f"group {j}: want key and value [{batch}, T, {channels}] with T at least 1,"
                f" got {list(k.shape)} and {list(v.shape)}"
            )
    for j, mask in enumerate(masks):
        if mask is not None and list(mask.shape) not in ([batch, queries], [1, queries]):
            raise ValueError(
                f"mask {j}: want [{batch}, {queries}] or [1, {queries}], got {list(mask.shape)}"
            )
    groups = {f"group {j}'s": pair for j, pair in enumerate(zip(keys, values, strict=True))}
    alike(
        q=q,
        **{f"{j} key": k for j, (k, _) in groups.items()},
        **{f"{j} value": v for j, (_, v) in groups.items()},
        **{f"mask {j}": m for j, m in enumerate(masks)},
    )
    fixed = [*(m for m in masks if m is not None), *(c for c in scales if isinstance(c, Tensor))]
    if any(t.requires_grad for t in fixed):
        raise ValueError("scales and masks are fixed here; call requires_grad_(False) on them")


def refuse_cuda(q, keys, values, scales, masks, heads) -> str | None:
    """Why the CUDA kernel does not run on these arguments; None when it does."""
    channels = q.shape[-1] // heads
    if reason := only_cuda(q):
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype}: the kernel multiplies 16-bit matrices"
    if channels not in CUDA_CHANNELS:
        return f"{channels} channels a head; the kernel is for 40, 80 and 160"
    if len(keys) > CUDA_GROUPS:
        return f"{len(keys)} groups are over {CUDA_GROUPS}"
    major, minor = torch.cuda.get_device_capability(q.device)
    return f"sm_{major}{minor}: the kernel needs sm_80" if major < 8 else None

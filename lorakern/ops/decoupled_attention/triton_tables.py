"""What the Triton kernels of decoupled_attention refuse, and their tiles, by shape and dtype."""

from dataclasses import dataclass

import torch

from lorakern.ops import check
from lorakern.ops.lora_linear import triton_tables
from lorakern.ops.lora_linear.triton_tables import cdiv, hardware, padded

precision = triton_tables.precision
MAX_D, MAX_D_FLOAT32 = 256, 64
# keys of a group that are met at once; more are gone through in steps
MAX_KEYS = 128


@dataclass(frozen=True)
class Tile:
    """Queries and channels of a program, and how it is run."""

    q: int
    d: int
    warps: int
    stages: int


def refuse_fwd(q, keys, values, scales, masks, heads) -> str | None:
    if q.dtype == torch.float64:
        return "float64: the kernel sums in float32"
    if q.shape[-1] // heads > MAX_D:
        return f"{q.shape[-1] // heads} channels a head is over {MAX_D}"
    if q.dtype == torch.float32 and q.shape[-1] // heads > MAX_D_FLOAT32:
        return f"float32 with {q.shape[-1] // heads} channels a head, over {MAX_D_FLOAT32}: spills"
    return check.refuse_triton_device(q)


def refuse_bwd(dout, q, keys, values, scales, masks, heads, needs) -> str | None:
    return refuse_fwd(q, keys, values, scales, masks, heads)


def queries(d: int, dtype: torch.dtype, backward: bool) -> Tile:
    """The tile of queries; two accumulators of it are in registers, in backward beside dp."""
    wide = padded(d)
    if dtype.itemsize == 4:
        return Tile(16 if backward else 32, wide, 4, 1)
    if wide > 128:
        return Tile(32, wide, 8, 1)
    return Tile(64, wide, 8 if wide > 64 else 4, 2)


def keys(tokens: int, d: int, dtype: torch.dtype) -> int:
    """Keys of a step of forward: all of a small group."""
    most = MAX_KEYS if padded(d) <= 64 else 64
    return min(32 if dtype.itemsize == 4 or padded(d) > 128 else most, padded(tokens))


def keys_of_dq(tokens: int, d: int, dtype: torch.dtype) -> int:
    """Keys of a step of dq: beside q and dout of a wide head, more would spill."""
    most = {64: 64, 128: 32}.get(max(64, padded(d)), 16)
    return min(16 if dtype.itemsize == 4 else most, padded(tokens))


def keys_of_dk(tokens: int, d: int, dtype: torch.dtype) -> int:
    """Keys of a program of dk and dv."""
    return min(64, keys(tokens, d, dtype))


def slices(programs: int, queries_: int, tile: Tile, device: torch.device) -> tuple[int, int]:
    """Into how many runs of blocks of queries a sum over them is cut, and the length of a run."""
    blocks = cdiv(queries_, tile.q)
    wanted = max(1, min(2 * hardware(device)[1] // programs, cdiv(blocks, 2)))
    each = cdiv(blocks, wanted)
    return cdiv(blocks, each), each

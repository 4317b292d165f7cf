"""What the Triton kernels of decoupled_attention refuse, and their tiles, by shape and dtype."""

from dataclasses import dataclass

import torch

from lorakern.ops.lora_linear import triton_tables
from lorakern.ops.lora_linear.triton_tables import MIN_RANK, cdiv, hardware, padded, precision

__all__ = ["Tile", "cdiv", "keys", "precision", "queries", "refuse_bwd", "refuse_fwd", "slices"]

MAX_D = 256
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
    return triton_tables.refuse_device(q)


def refuse_bwd(dout, q, keys, values, scales, masks, heads, needs) -> str | None:
    return refuse_fwd(q, keys, values, scales, masks, heads)


def queries(d: int, dtype: torch.dtype, backward: bool) -> Tile:
    """The tile of queries; two accumulators of it are in registers, in backward beside dp."""
    wide = padded(d)
    if dtype.itemsize == 4:
        return Tile(16 if wide > 128 or backward else 32, wide, 4, 1)
    return Tile(64, wide, 8 if wide > 64 else 4, 1 if wide > 128 else 2)


def keys(tokens: int, d: int, dtype: torch.dtype, backward: bool) -> int:
    """Keys of a step: all of a small group."""
    most = MAX_KEYS
    if dtype.itemsize == 4 or padded(d) > 128 or backward:
        most = 32 if dtype.itemsize == 4 else 64
    return min(most, max(MIN_RANK, padded(tokens)))


def slices(programs: int, queries_: int, tile: Tile, device: torch.device) -> tuple[int, int]:
    """Into how many runs of blocks of queries a sum over them is cut, and the length of a run."""
    blocks = cdiv(queries_, tile.q)
    wanted = max(1, min(2 * hardware(device)[1] // programs, cdiv(blocks, 2)))
    each = cdiv(blocks, wanted)
    return cdiv(blocks, each), each

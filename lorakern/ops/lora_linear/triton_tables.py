"""What the Triton kernels refuse, their tiles and launch plans, by shape, dtype and GPU.

Nothing is tuned at run time. A plan is made once per shape and then looked up, so a CUDA graph
records the same launches that eager runs.
"""

import os
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch

MAX_RANK = 128
# a rank is padded to a power of two, and to 16, the least depth of a matrix instruction
MIN_RANK = 16
GROUP_M = 8


@dataclass(frozen=True)
class Tile:
    """One program's share of the output, its step along the reduced dim, and how it is run.

    rate: modelled speed on a full GPU over the fastest tile's; no unit.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    rate: float


# 163 KiB of shared memory a program and more: A100, H100, H200, B200, B300
DATACENTER = {(8, 0), (9, 0), (10, 0), (10, 3)}
GEMM = {
    ("datacenter", 2): (
        Tile(128, 256, 64, 8, 3, 1.0),
        Tile(128, 128, 64, 8, 3, 0.9),
        Tile(64, 64, 64, 4, 4, 0.5),
    ),
    ("other", 2): (Tile(128, 128, 32, 8, 4, 1.0), Tile(64, 64, 64, 4, 3, 0.7)),
    ("datacenter", 4): (Tile(64, 64, 32, 4, 3, 1.0),),
    ("other", 4): (Tile(64, 64, 32, 4, 3, 1.0),),
}
# x downᵀ: narrow outputs, so the tile is BLOCK_M rows of all ranks; n is unused
SHRINK = {2: Tile(64, 0, 64, 4, 4, 1.0), 4: Tile(32, 0, 32, 4, 2, 1.0)}
# the same with the other factor's gradient in the pass; m rows are one slice of that sum
ONE_PASS = {2: Tile(128, 0, 64, 4, 3, 1.0), 4: Tile(64, 0, 32, 4, 2, 1.0)}
# aᵀ b over rows: n columns of a, k rows a step; m is unused
ROWS = {2: Tile(0, 64, 32, 4, 4, 1.0), 4: Tile(0, 32, 32, 4, 3, 1.0)}
# largest M·O·I at which making h beside the base product beats a launch and a pass over x of its
# own, by padded rank: the share rank/n of extra products against about 3 µs on an H100
ONE_KERNEL = {2: {16: 10**10, 32: 2 * 10**9}, 4: {16: 5 * 10**8, 32: 10**8}}


@dataclass(frozen=True)
class Cut:
    """A sum cut into `slices`, each of `steps` times the tile's k; no slice is empty."""

    tile: Tile
    slices: int
    steps: int


def refuse_fwd(x, weight, bias, down, up, scale, gain) -> str | None:
    if gain is not None:
        return "a gain: the kernel has none"
    if x.dtype == torch.float64:
        return "float64: the kernel sums in float32"
    if down.shape[0] > MAX_RANK:
        return f"rank {down.shape[0]} is over {MAX_RANK}"
    return refuse_device(x)


def refuse_device(x) -> str | None:
    """Why Triton cannot run where x is."""
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return "bfloat16: Triton's interpreter misreads it" if x.dtype == torch.bfloat16 else None
    if x.device.type != "cuda":
        return f"x is on {x.device.type}; triton runs on cuda"
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}: the kernel needs sm_80" if major < 8 else None


def refuse_bwd(dy, x, h, weight, down, up, scale, gain, needs) -> str | None:
    if needs[3]:
        return "a gradient of a gain: the kernel has none"
    return refuse_fwd(x, weight, None, down, up, scale, gain)


@cache
def hardware(device: torch.device) -> tuple[str, int]:
    """("datacenter" or "other", number of multiprocessors); the interpreter counts as two."""
    if device.type != "cuda":
        return "other", 2
    found = torch.cuda.get_device_properties(device)
    is_datacenter = torch.version.hip is None and (found.major, found.minor) in DATACENTER
    return "datacenter" if is_datacenter else "other", found.multi_processor_count


def precision(dtype: torch.dtype) -> str:
    """Float32 products follow torch's own switch for matmul; 16-bit ones are exact in any case."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def padded(rank: int) -> int:
    return max(MIN_RANK, 1 << (rank - 1).bit_length())


@lru_cache(maxsize=4096)
def gemm(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile whose waves over the GPU take the least modelled time."""
    family, processors = hardware(device)
    tiles = GEMM[family, dtype.itemsize]
    if not whole_vectors(dtype, n, k):
        return without_prefetch(tiles[-1])

    def time(tile: Tile) -> float:
        waves = cdiv(cdiv(m, tile.m) * cdiv(n, tile.n), processors)
        return waves * tile.m * tile.n / tile.rate

    return min(tiles, key=time)


def whole_vectors(dtype: torch.dtype, *widths: int) -> bool:
    """Whether rows of these widths start on 16 bytes, so that they are copied without registers."""
    return all(width * dtype.itemsize % 16 == 0 for width in widths)


def without_prefetch(tile: Tile) -> Tile:
    """For other rows: what is loaded ahead would sit in registers, and spill."""
    return replace(tile, k=32, stages=1)


def one_kernel(m: int, n: int, k: int, rank: int, dtype: torch.dtype) -> bool:
    """Whether forward makes h in the main loop of the base product."""
    return m * n * k <= ONE_KERNEL[dtype.itemsize].get(padded(rank), 0)


def one_pass(n: int, rank: int, dtype: torch.dtype) -> bool:
    """Whether dy is read once for dh and dup: dup's partial sums are then at most half of dy."""
    partial = 2 * 4 * padded(rank) <= ONE_PASS[dtype.itemsize].m * dtype.itemsize
    return partial and whole_vectors(dtype, n)


@lru_cache(maxsize=4096)
def shrink(m: int, k: int, rank: int, dtype: torch.dtype, device: torch.device, outer: bool) -> Cut:
    """Cuts k until the GPU is full, into few sums: each tile of the GEMM reads all of them."""
    tile = (ONE_PASS if outer else SHRINK)[dtype.itemsize]
    wanted = hardware(device)[1] // cdiv(m, tile.m)
    tile = tile if whole_vectors(dtype, k) else without_prefetch(tile)
    return cut(tile, k, min(wanted, 4, 256 // padded(rank)))


@lru_cache(maxsize=4096)
def rows(m: int, n: int, dtype: torch.dtype, device: torch.device) -> Cut:
    """Cuts the sum over m until the GPU is full twice."""
    tile = ROWS[dtype.itemsize]
    tile = tile if whole_vectors(dtype, n) else without_prefetch(tile)
    return cut(tile, m, 2 * hardware(device)[1] // cdiv(n, tile.n))


def cut(tile: Tile, length: int, wanted: int) -> Cut:
    """At most `wanted` slices of at least two steps."""
    steps = cdiv(length, tile.k)
    each = cdiv(steps, max(1, min(wanted, steps // 2)))
    return Cut(tile, cdiv(steps, each), each)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)

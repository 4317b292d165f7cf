"""What the Triton kernels refuse, their tiles and launch plans, by shape, dtype and GPU.

Nothing is tuned at run time. A plan is made once per shape and then looked up, so a CUDA graph
records the same launches that eager runs.
"""

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch

from lorakern.ops import check

MAX_RANK = check.TRITON_RANK
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
# a weight update alone: m rows and n columns, k ranks a step
DELTA = Tile(64, 64, 32, 4, 2, 1.0)
# the base product beside tiles of a Hadamard update, with the ranks that the tile has room for
HADA = {
    ("datacenter", 2): ((64, Tile(128, 128, 32, 8, 3, 1.0)), (128, Tile(64, 64, 32, 4, 2, 0.6))),
    ("other", 2): ((32, Tile(128, 64, 32, 4, 3, 1.0)), (128, Tile(64, 64, 32, 4, 2, 0.7))),
    ("datacenter", 4): ((128, Tile(32, 32, 32, 4, 1, 1.0)),),
    ("other", 4): ((128, Tile(32, 32, 32, 4, 1, 1.0)),),
}
# aᵀ b over rows, taken on to low-rank factors: m columns of a, n of b, k rows a step
OUTER = {
    ("datacenter", 2): (Tile(128, 64, 64, 8, 3, 1.0), Tile(64, 64, 64, 4, 3, 0.6)),
    ("other", 2): (Tile(64, 64, 32, 4, 3, 1.0),),
    ("datacenter", 4): (Tile(32, 32, 16, 4, 1, 1.0),),
    ("other", 4): (Tile(32, 32, 16, 4, 1, 1.0),),
}
# largest M·O·I at which making h beside the base product beats a launch and a pass over x of its
# own, by padded rank: the share rank/n of extra products against about 3 µs on an H100
ONE_KERNEL = {2: {16: 10**10, 32: 2 * 10**9}, 4: {16: 5 * 10**8, 32: 10**8}}


@dataclass(frozen=True)
class KronTile:
    """One program's share of x (C ⊗ D)ᵀ: m rows, and entries of C [a, b] and of D [p, q]."""

    m: int
    a: int
    b: int
    p: int
    q: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Cut:
    """A sum cut into `slices`, each of `steps` times the tile's k; no slice is empty."""

    tile: Tile
    slices: int
    steps: int


def refuse_fwd(x, weight, bias, down, up, scale, gain) -> str | None:
    return check.refuse_triton(x, down.shape[0])


def refuse_bwd(dy, x, h, weight, down, up, scale, gain, needs) -> str | None:
    return check.refuse_triton(x, down.shape[0])


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
def gemm(
    m: int, n: int, k: int, dtype: torch.dtype, device: torch.device,
    narrow: bool = False, gained: bool = False,
) -> Tile:  # fmt: skip
    """narrow: the tile shares its registers, so it has at most 128 columns.

    gained: a gain of the depth splits a in two, which leaves room for the last tile alone.
    """
    tiles = GEMM[hardware(device)[0], dtype.itemsize]
    tiles = tiles[-1:] if gained else [tile for tile in tiles if not narrow or tile.n <= 128]
    return _fastest(tiles, m, n, k, dtype, device)


@lru_cache(maxsize=4096)
def hada(
    m: int, n: int, k: int, rank: int, dtype: torch.dtype, device: torch.device, gained: bool
) -> Tile:
    """gained: a gain of the depth splits a in two, which leaves room for the last tile alone."""
    tiles = HADA[hardware(device)[0], dtype.itemsize]
    tiles = [tile for most, tile in tiles if rank <= most]
    return _fastest(tiles[-1:] if gained else tiles, m, n, k, dtype, device)


def _fastest(tiles, m, n, k, dtype, device) -> Tile:
    """The tile whose waves over the GPU take the least modelled time."""
    processors = hardware(device)[1]
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


def khatri_rao(n: int, k: int, rank: int) -> bool:
    """Whether a Hadamard update costs less as a LoRA of the product of its ranks than as ΔW."""
    return rank <= MAX_RANK and rank * (n + k) < 0.7 * n * k


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


@lru_cache(maxsize=4096)
def outer(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Cut:
    """Tiles of aᵀ b, [n, k], and slices of its m rows until the GPU is full once."""
    family, processors = hardware(device)
    tile = _fastest(OUTER[family, dtype.itemsize], n, k, n, dtype, device)
    if not whole_vectors(dtype, n, k):
        tile = replace(tile, m=32, n=32)
    return cut(tile, m, processors // (cdiv(n, tile.m) * cdiv(k, tile.n)))


@lru_cache(maxsize=4096)
def kron(a: int, b: int, p: int, q: int, dtype: torch.dtype) -> KronTile:
    """What stands between C and D fits in registers: m · max(a, b) · p sums, and as many more."""
    block_p, block_q = (min(32, padded(size)) for size in (p, q))
    if min(a, b) < 8:
        # C by plain products: padded to 16 x 16, a matrix instruction would be mostly padding
        block_a, block_b = min(16, 1 << (a - 1).bit_length()), 1
    else:
        block_a, block_b = min(64, padded(a)), min(32, padded(b))
    m = 16384 // dtype.itemsize**2 // (max(block_a, block_b) * block_p)
    if block_b == 1:
        m = min(64, max(16, m))
    return KronTile(m, block_a, block_b, block_p, block_q, 4, 2)


@lru_cache(maxsize=4096)
def spread(length: int, step: int, blocks: int, device: torch.device) -> Cut:
    """Cuts a sum of plain products until the GPU is full eight times, a wave of memory reads."""
    return cut(Tile(0, 0, step, 4, 1, 1.0), length, 8 * hardware(device)[1] // blocks)


def cut(tile: Tile, length: int, wanted: int) -> Cut:
    """At most `wanted` slices of at least two steps."""
    steps = cdiv(length, tile.k)
    each = cdiv(steps, max(1, min(wanted, steps // 2)))
    return Cut(tile, cdiv(steps, each), each)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)

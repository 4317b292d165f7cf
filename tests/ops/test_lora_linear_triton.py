"""Triton kernels of lora_linear without a GPU: the tiles of one in the interpreter, and cubins.

On a GPU test_lora_linear.py runs the kernels themselves.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from test_lora_linear import NEEDS, backward_inputs, detached, inputs, name

from lorakern.ops.lora_linear import reference
from lorakern.ops.lora_linear import triton_tables as tables
from lorakern.testing import assert_as_exact_as_torch, exactly

triton = pytest.importorskip("triton")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
PLANS = (tables.gemm, tables.shrink, tables.rows)
# multiprocessors; sm_120 shares sm_89's tiles and instructions
GPUS = {80: ("datacenter", 108), 89: ("other", 128), 90: ("datacenter", 132),
        100: ("datacenter", 148)}  # fmt: skip


def pretend(monkeypatch, gpu, one_kernel):
    """Plans as on that GPU, with h made inside the GEMM or before it."""
    monkeypatch.setattr(tables, "hardware", lambda device: gpu)
    monkeypatch.setattr(tables, "one_kernel", lambda *_: one_kernel)
    for plan in PLANS:
        plan.cache_clear()


@pytest.fixture(autouse=True)
def _forget_plans():
    yield
    for plan in PLANS:
        plan.cache_clear()


def check(function, spec, args):
    results = zip(function(*args), exactly(spec, *args), spec(*args), strict=True)
    for i, (got, want, same) in enumerate(results):
        assert_as_exact_as_torch(f"result {i}", got, want, same)


# rows, I, O, R: more than a tile each way, ragged; slices of every kind; a rank of several steps
TILED = [
    ((140,), 72, 136, 40),
    ((70,), 129, 33, 128),
    ((2, 35), 260, 24, 3),
    ((131,), 40, 48, 17),
]


@without_gpu
@pytest.mark.parametrize("one_kernel", [True, False], ids=["one kernel", "shrink first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name)
@pytest.mark.parametrize("gain", [False, True], ids=["", "gain"])
@pytest.mark.parametrize("shape", TILED, ids=name)
def test_the_tiles_of_a_gpu(shape, gain, dtype, one_kernel, monkeypatch):
    from lorakern.ops.lora_linear.triton_bwd import lora_linear_bwd
    from lorakern.ops.lora_linear.triton_kernel import lora_linear_fwd

    pretend(monkeypatch, GPUS[90], one_kernel)
    args = inputs(shape, dtype, gain=gain)
    check(lora_linear_fwd, reference.lora_linear_fwd, detached(args))
    if one_kernel:
        # backward has the same plan either way
        for needs in NEEDS[:2]:
            check(lora_linear_bwd, reference.lora_linear_bwd, backward_inputs(args, needs))


@without_gpu
@pytest.mark.parametrize("tile", range(3))
def test_each_gemm_tile(tile, monkeypatch):
    from lorakern.ops.lora_linear.triton_kernel import lora_linear_fwd

    chosen = tables.GEMM["datacenter", 2][tile]
    monkeypatch.setitem(tables.GEMM, ("datacenter", 2), (chosen,))
    pretend(monkeypatch, GPUS[90], one_kernel=False)
    monkeypatch.setattr(tables, "GROUP_M", 2)
    # three row tiles, so that the last group is a short one
    shape = ((chosen.m * 2 + 5,), 72, chosen.n + 8, 20)
    check(lora_linear_fwd, reference.lora_linear_fwd, detached(inputs(shape, torch.float16)))


def test_plans_cover_every_column_and_row_once():
    for length in (1, 63, 64, 65, 320, 1280, 10240):
        for wanted in (0, 1, 3, 4, 100):
            cut = tables.cut(tables.SHRINK[2], length, wanted)
            each = cut.steps * cut.tile.k
            assert (cut.slices - 1) * each < length <= cut.slices * each
            assert cut.slices <= max(1, wanted)


# (capability, dtype, M, I, O, R, directions; "gain" to have one).  Real sizes of SD 1.5 and SDXL:
# every tile of the tables and every kernel on sm_90, the ones with the most on chip on the others,
# and odd widths.
CUBINS = [
    (90, torch.bfloat16, 8192, 1280, 10240, 64, "fwd bwd"),
    (90, torch.bfloat16, 4096, 320, 320, 16, "fwd bwd"),
    (90, torch.bfloat16, 256, 1280, 1280, 128, "bwd"),
    (90, torch.bfloat16, 65, 33, 65, 3, "fwd bwd"),
    (90, torch.float16, 4096, 320, 320, 16, "fwd"),
    (90, torch.float32, 154, 768, 320, 8, "fwd"),
    (90, torch.float32, 256, 1280, 1280, 128, "bwd"),
    (80, torch.bfloat16, 8192, 1280, 10240, 64, "fwd"),
    (80, torch.bfloat16, 154, 768, 320, 16, "fwd bwd"),
    (100, torch.bfloat16, 8192, 1280, 10240, 64, "fwd"),
    (100, torch.bfloat16, 154, 768, 320, 16, "fwd bwd"),
    (89, torch.bfloat16, 4096, 320, 320, 16, "fwd bwd"),
    (89, torch.bfloat16, 256, 1280, 1280, 128, "fwd"),
    (80, torch.bfloat16, 4096, 320, 320, 16, "fwd bwd gain"),
    (90, torch.bfloat16, 4096, 320, 320, 16, "fwd bwd gain"),
    (90, torch.float16, 256, 1280, 1280, 128, "fwd bwd gain"),
    (90, torch.float32, 256, 1280, 1280, 16, "bwd gain"),
    (100, torch.bfloat16, 8192, 1280, 1280, 64, "fwd bwd gain"),
]


def compiled(capability, dtype, rows, columns, out, rank, directions):
    """[Usage] of all that these directions launch; runs in a process of its own."""
    import triton_aot

    from lorakern.ops.lora_linear import triton_bwd, triton_kernel

    tables.hardware = lambda device: GPUS[capability]
    for plan in PLANS:
        plan.cache_clear()

    def make(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, bias, h = make(rows, columns), make(out, columns), make(out), make(rows, rank)
    down, up, dy = make(rank, columns), make(out, rank), make(rows, out)
    gain = torch.empty(out, device="meta") if "gain" in directions else None
    needs = [True] * 3 + [gain is not None]
    launchers = {
        "fwd": (triton_kernel.lora_linear_fwd, x, weight, bias, down, up, 1.0, gain),
        "bwd": (triton_bwd.lora_linear_bwd, dy, x, h, weight, down, up, 1.0, gain, needs),
    }
    return [
        triton_aot.compile_for(capability, *launch)
        for direction in directions.split()[:2]
        if direction != "gain"
        for launch in triton_aot.launches(
            *launchers[direction], modules=(triton_kernel, triton_bwd)
        )
    ]


@pytest.fixture(scope="module")
def cubins():
    """case -> future of its Usages, made on every core at once."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=spawn) as pool:
            yield {case: pool.submit(compiled, *case) for case in CUBINS}
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


@pytest.mark.parametrize("case", CUBINS, ids=lambda c: "-".join(name(v) for v in c))
def test_compiles_without_spills(case, cubins):
    from triton_aot import MATRIX, SHARED, STACK

    capability, dtype = case[:2]
    for usage in cubins[case].result():
        print(f"sm_{capability} {name(dtype)} {usage}")
        assert usage.local == 0 and usage.stack <= STACK, usage
        assert usage.shared <= SHARED[capability], usage
        if usage.kernel != "_sum_slices_kernel":
            # float32 sums in float32: no matrix instruction does that
            assert usage.instruction == ("" if dtype == torch.float32 else MATRIX[capability]), (
                usage
            )

"""Triton kernels of hada_linear without a GPU: both plans in the interpreter, and cubins.

The cubins are those of hada_delta and lora_delta too.
"""

import pytest
import torch

from lorakern.ops.check import wide
from lorakern.ops.lora_linear import triton_tables as tables
from lorakern.testing import check_every_kernel, lost_share

pytest.importorskip("triton")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
# of dx, ddown1, dup1, ddown2, dup2, dgain
NEEDS = [[True] * 6, [True, *[False] * 5], [False, True, False, False, True, False]]


def inputs(shape, dtype, device="cpu", gain=True):
    rows, columns, out, *ranks = shape

    def make(*sizes, std=1.0):
        return (std * torch.randn(sizes)).to(device, dtype)

    factors = [
        t for r in ranks for t in (make(r, columns, std=columns**-0.25), make(out, r, std=r**-0.5))
    ]
    return (
        make(rows, columns), make(out, columns, std=columns**-0.5), make(out), *factors, 0.7,
        (1 + make(out, std=0.2)).to(wide(dtype)) if gain else None,
    )  # fmt: skip


# rows, I, O, R, S: more than a tile each way, ragged; ranks above and below what a LoRA takes
@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(67, 40, 72, 17, 5), (35, 65, 33, 33, 9), (35, 65, 33, 3, 2)])
def test_matches(shape, dtype, gain, device):
    args = inputs(shape, dtype, device, gain)
    check_every_kernel("hada_linear_fwd", args)
    x, weight, _, *rest = args
    dy = torch.randn(len(x), len(weight), device=device).to(dtype)
    for *needs, need_dgain in NEEDS if gain else NEEDS[1:2]:
        needs = [*needs, need_dgain and gain]
        check_every_kernel("hada_linear_bwd", (dy, x, weight, *rest, needs))


@without_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_tiles_of_a_gpu(dtype, monkeypatch):
    monkeypatch.setattr(tables, "hardware", lambda device: ("datacenter", 132))
    for plan in (tables.hada, tables.outer):
        plan.cache_clear()
    args = inputs((140, 40, 136, 24, 40), dtype)
    check_every_kernel("hada_linear_fwd", args)
    x, weight, _, *rest = args
    dy = torch.randn(len(x), len(weight)).to(dtype)
    check_every_kernel("hada_linear_bwd", (dy, x, weight, *rest, NEEDS[0]))
    for plan in (tables.hada, tables.outer):
        plan.cache_clear()


def test_no_rows(device):
    for ranks in ((2, 3), (20, 20)):
        x, weight, bias, *rest = inputs((4, 24, 40, *ranks), torch.float32, device)
        check_every_kernel("hada_linear_fwd", (x[:0], weight, bias, *rest))
        check_every_kernel("hada_linear_bwd", (x.new_empty(0, 40), x[:0], weight, *rest, NEEDS[0]))


@pytest.mark.parametrize("ratio", [1e-4, 1e-1])
@pytest.mark.parametrize("rank", [4, 24])
def test_a_small_update_is_not_lost(rank, ratio, device):
    """Neither by y nor by dx, and no more is a gain near 1."""
    from lorakern.ops.hada_linear.triton_bwd import hada_linear_bwd
    from lorakern.ops.hada_linear.triton_kernel import hada_linear_fwd

    x, weight, _, down1, up1, down2, up2, scale, _ = inputs((1024, 64, 64, rank, rank), torch.half)
    delta = scale * (up1 @ down1).double() * (up2 @ down2).double()
    up1 = (up1.double() * (ratio * weight.double().norm() / delta.norm())).half()
    delta = scale * (up1.double() @ down1.double()) * (up2.double() @ down2.double())
    x, weight, *factors = (t.to(device) for t in (x, weight, down1, up1, down2, up2))
    delta, dense = delta.to(device), weight.double()
    y = lambda: hada_linear_fwd(x, weight, None, *factors, scale, None)  # noqa: E731
    assert abs(lost_share(y, x.double() @ delta.T, x.double() @ dense.T)) < 0.02
    gain = torch.full((64,), 1 + 2**-10, device=device)
    needs = [True, *[False] * 5]
    for g in (None, gain):
        dx = lambda g=g: hada_linear_bwd(x, x, weight, *factors, scale, g, needs)[0]  # noqa: E731
        base = x.double() @ dense
        change = (
            x.double() @ delta if g is None else 2**-10 * base + (1 + 2**-10) * (x.double() @ delta)
        )
        assert abs(lost_share(dx, change, base)) < 0.02


# (capability, dtype, M, I, O, R): the tiles of the tables, with all ranks that one has room for,
# a plan as a LoRA, and odd widths
CUBINS = [
    (90, torch.bfloat16, 4096, 1280, 1280, 64),
    (80, torch.bfloat16, 4096, 1280, 1280, 128),
    (100, torch.bfloat16, 4096, 1280, 1280, 32),
    (90, torch.float16, 65, 33, 65, 20),
    (90, torch.float32, 256, 320, 640, 32),
]


def compiled(capability, dtype, rows, columns, out, rank):
    import triton_aot

    from lorakern.ops.hada_delta import triton_kernel as hada_delta
    from lorakern.ops.hada_linear import triton_bwd, triton_kernel
    from lorakern.ops.lora_delta import triton_kernel as lora_delta

    def make(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, dy, bias = make(rows, columns), make(out, columns), make(rows, out), make(out)
    factors = [make(rank, columns), make(out, rank), make(rank, columns), make(out, rank)]
    calls = [
        (triton_kernel.hada_linear_fwd, x, weight, bias, *factors, 1.0, None),
        (triton_bwd.hada_linear_bwd, dy, x, weight, *factors, 1.0, None, [True] * 6),
    ]
    if rank == 32:
        needs = [True, *[False] * 5]
        calls += [
            (triton_bwd.hada_linear_bwd, dy, x, weight, *factors, 1.0, bias, needs),
            (hada_delta.hada_delta_fwd, *factors, 1.0),
            (hada_delta.hada_delta_bwd, weight, *factors, 1.0, [True] * 4),
            (lora_delta.lora_delta_fwd, *factors[:2], 1.0),
            (lora_delta.lora_delta_bwd, weight, *factors[:2], 1.0, [True] * 2),
        ]
    return [usage for call in calls for usage in triton_aot.usages(capability, *call)]


@pytest.fixture(scope="module")
def cubins():
    from triton_aot import on_every_core

    with on_every_core(compiled, CUBINS) as made:
        yield made


@pytest.mark.parametrize("case", CUBINS, ids=str)
def test_compiles_without_spills(case, cubins):
    from triton_aot import assert_fit

    assert_fit(*case[:2], cubins[case].result())

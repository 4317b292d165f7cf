"""Triton kernels of kron_linear without a GPU: every way to take C in the interpreter, and cubins.

The cubins are those of kron_delta and of lora_linear with a gain too.
"""

import pytest
import torch

from lorakern.ops.check import wide
from lorakern.testing import check_every_kernel, lost_share

pytest.importorskip("triton")
# of dx, dc_up, dc_down, dd_up, dd_down, dgain
NEEDS = [[True] * 6, [False, False, True, True, False, False]]


def inputs(shape, ranks, dtype, device, gain):
    rows, A, B, P, Q = shape

    def make(*sizes, std=1.0):
        return (std * torch.randn(sizes, device=device)).to(dtype)

    def factors(out, columns, rank):
        if rank is None:
            return make(out, columns, std=columns**-0.5), None
        return make(out, rank, std=rank**-0.5), make(rank, columns, std=columns**-0.5)

    return (
        make(rows, B * Q), make(A * P, B * Q, std=(B * Q) ** -0.5), make(A * P),
        *factors(A, B, ranks[0]), *factors(P, Q, ranks[1]), 0.7,
        (1 + make(A * P, std=0.2)).to(wide(dtype)) if gain else None,
    )  # fmt: skip


# rows, A, B, P, Q: C by a matrix instruction and by plain products, several tiles of each dim
CASES = [
    ((37, 9, 20, 17, 18), (None, None), True),
    ((33, 20, 8, 3, 5), (3, 2), False),
    ((40, 3, 4, 33, 18), (None, 5), True),
    ((5, 17, 1, 2, 7), (2, None), False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches(case, dtype, device):
    args = inputs(*case[:2], dtype, device, case[2])
    check_every_kernel("kron_linear_fwd", args)
    x, weight, _, *rest = args
    dy = torch.randn(len(x), len(weight), device=device).to(dtype)
    for *needs, need_dgain in NEEDS:
        needs = [*needs, need_dgain and rest[-1] is not None]
        check_every_kernel("kron_linear_bwd", (dy, x, weight, *rest, needs))


def test_no_rows(device):
    x, weight, bias, *rest = inputs((4, 3, 4, 5, 6), (2, None), torch.float32, device, True)
    check_every_kernel("kron_linear_fwd", (x[:0], weight, bias, *rest))
    check_every_kernel("kron_linear_bwd", (x.new_empty(0, 15), x[:0], weight, *rest, NEEDS[0]))


@pytest.mark.parametrize("ratio", [1e-4, 1e-1])
@pytest.mark.parametrize("sizes", [(8, 8), (4, 16)], ids=str)
def test_a_small_update_is_not_lost(sizes, ratio, device):
    """Neither by y nor by dx, and no more is a gain near 1."""
    from lorakern.ops.kron_linear.triton_bwd import kron_linear_bwd
    from lorakern.ops.kron_linear.triton_kernel import kron_linear_fwd

    outer, inner = sizes
    shape = (1024, outer, outer, inner, inner)
    args = inputs(shape, (None, None), torch.half, device, False)
    x, weight, _, c, _, d, _, scale, _ = args
    ratio *= weight.double().norm() / (scale * c.double().norm() * d.double().norm())
    d = (d.double() * ratio).half()
    delta, dense = scale * torch.kron(c.double(), d.double()), weight.double()
    y = lambda: kron_linear_fwd(x, weight, None, c, None, d, None, scale, None)  # noqa: E731
    assert abs(lost_share(y, x.double() @ delta.T, x.double() @ dense.T)) < 0.02
    base, update = x.double() @ dense, x.double() @ delta
    near = 2**-10
    gain = torch.full((len(weight),), 1 + near, device=device)
    for g, change in ((None, update), (gain, near * base + (1 + near) * update)):
        back = (x, x, weight, c, None, d, None, scale, g, [True, *[False] * 5])
        dx = lambda back=back: kron_linear_bwd(*back)[0]  # noqa: E731
        assert abs(lost_share(dx, change, base)) < 0.02


# (capability, dtype, M, A, B, P, Q): layers of SD 1.5 and SDXL as LyCORIS factors them, C of 4 x 4
CUBINS = [
    (90, torch.bfloat16, 4096, 16, 16, 20, 20),
    (80, torch.bfloat16, 4096, 32, 64, 40, 80),
    (100, torch.bfloat16, 4096, 32, 32, 40, 40),
    (90, torch.bfloat16, 4096, 4, 4, 320, 320),
    (90, torch.float32, 256, 16, 16, 20, 20),
]


def compiled(capability, dtype, rows, A, B, P, Q):
    import triton_aot

    from lorakern.ops.kron_delta import triton_kernel as kron_delta
    from lorakern.ops.kron_linear import triton_bwd, triton_kernel

    def make(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, dy, bias = make(rows, B * Q), make(A * P, B * Q), make(rows, A * P), make(A * P)
    c, d = make(A, B), make(P, Q)
    calls = [
        (triton_kernel.kron_linear_fwd, x, weight, bias, c, None, d, None, 1.0, bias),
        (triton_bwd.kron_linear_bwd, dy, x, weight, c, None, d, None, 1.0, bias, [True] * 6),
    ]
    if A == 4:
        calls += [
            (kron_delta.kron_delta_fwd, c, d, 1.0),
            (kron_delta.kron_delta_bwd, weight, c, d, 1.0, [True] * 2),
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

"""CUDA kernels of kron_linear without a GPU: run on the host, and compiled by nvcc."""

from types import SimpleNamespace

import cuda_aot
import pytest
import torch
from cuda_aot import check_on_host

from lorakern import backend
from lorakern.ops.check import wide
from lorakern.ops.kron_linear import op
from lorakern.testing import DTYPES

# leading dims of x, A, B, P, Q, R, S.  C on each side of every tile and in several, D in several
# each way; rows that end a share and a step early; R and S the ranks of C and D, 0 for a whole one
SHAPES = [
    ((37,), 3, 5, 7, 9, 0, 0),
    ((2, 9), 8, 7, 40, 33, 0, 4),
    ((9,), 12, 16, 20, 36, 2, 0),
    ((7,), 40, 33, 5, 6, 3, 2),
    ((1, 1), 1, 1, 1, 1, 1, 1),
]
WIDE = (torch.float32, torch.float64)


def inputs(shape, dtype, gain=False):
    """dy, x, weight, c_up, c_down, d_up, d_down, scale, gain"""
    leading, A, B, P, Q, R, S = shape

    def make(*sizes, divided_by=1):
        return torch.randn(*sizes, dtype=dtype) / divided_by**0.5

    c = (make(A, R), make(R, B)) if R else (make(A, B), None)
    d = (make(P, S), make(S, Q)) if S else (make(P, Q), None)
    x, weight = make(*leading, B * Q), make(A * P, B * Q, divided_by=B * Q)
    gain = (1 + make(A * P) / 5).to(wide(dtype)) if gain else None
    return make(*leading, A * P), x, weight, *c, *d, 0.7, gain


@pytest.mark.parametrize("gain", [False, True], ids=["", "gain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, gain, cuda_host):
    # x's gradient in 16-bit is refused
    needs = [dtype in WIDE, True, bool(shape[5]), True, bool(shape[6]), False]
    check_on_host(cuda_host, "kron_linear_bwd", (*inputs(shape, dtype, gain), needs))


@pytest.mark.parametrize("need", range(5), ids=["dx", "dc_up", "dc_down", "dd_up", "dd_down"])
def test_one_gradient_alone(need, cuda_host):
    needs = [n == need for n in range(6)]
    check_on_host(cuda_host, "kron_linear_bwd", (*inputs(SHAPES[3], torch.float32), needs))


def test_no_rows(cuda_host):
    args = inputs(((0,), *SHAPES[3][1:]), torch.float32)
    check_on_host(cuda_host, "kron_linear_bwd", (*args, [True] * 5 + [False]))


def test_the_factors_alone(cuda_host):
    dy, x, weight, *rest = inputs(SHAPES[1], torch.bfloat16, gain=True)
    alone = torch.ops.lorakern_host.kron_linear_factors_cuda(dy, x, *rest, [True] * 4)
    whole = torch.ops.lorakern_host.kron_linear_bwd_cuda(
        dy, x, weight, *rest, [False, True, True, True, True, False]
    )
    for a, b in zip(alone, whole[1:5], strict=True):
        assert torch.equal(a, b)


def test_a_wrong_shape_is_named(cuda_host):
    launch = torch.ops.lorakern_host.kron_linear_factors_cuda
    dy, x, _, *rest = inputs(SHAPES[0], torch.float32)
    with pytest.raises(ValueError, match=r"x: want \[..., 45\], got \[37, 44\]"):
        launch(dy, x[:, 1:], *rest, [True] * 4)
    with pytest.raises(ValueError, match=r"dy: want shape \[37, 21\], got \[36, 21\]"):
        launch(dy[1:], x, *rest, [True] * 4)


def test_a_gain_beside_16_bit_is_float32(cuda_host):
    launch = torch.ops.lorakern_host.kron_linear_factors_cuda
    dy, x, _, *rest, gain = inputs(SHAPES[0], torch.bfloat16, gain=True)
    with pytest.raises(ValueError, match="gain: want Float on cpu, got BFloat16"):
        launch(dy, x, *rest, gain.bfloat16(), [True] * 4)


@pytest.mark.parametrize(
    "needs, reason",
    [
        ([False, True, True, True, True, True], "dgain needs the forward product"),
        ([True, True, True, True, True, False], "dx is two products added in torch.bfloat16"),
        ([False] * 6, "no factor needs a gradient"),
        ([False, True, False, True, False, False], None),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_reason(needs, reason):
    args = inputs(SHAPES[0], torch.bfloat16)
    assert "x is on cpu" in backend.why("kron_linear_bwd", *args, needs)["cuda"]

    x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    refused = op._refuse_cuda(args[0], x, *args[2:], needs)
    assert refused is None if reason is None else refused.startswith(reason)


@pytest.mark.skipif(cuda_aot.nvcc() is None, reason="there is no nvcc")
def test_compiles_without_spills(tmp_path):
    # half goes as bfloat16
    types = ("float, float", "__nv_bfloat16, float", "double, double")
    kernels = [f"kron_linear_factors_kernel<{t}, {side}>" for t in types for side in (8, 16, 32)]
    for chip, found in cuda_aot.usages("kron_linear.cuh", kernels, tmp_path).items():
        assert len(found) == len(kernels)
        for usage in found:
            print(f"sm_{chip} {usage}")
            assert usage.stack == usage.spilled == 0, usage

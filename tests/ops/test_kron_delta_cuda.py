"""CUDA kernels of kron_delta without a GPU: run on the host, and compiled by nvcc."""

import itertools

import cuda_aot
import pytest
import torch
from cuda_aot import check_on_host

from lorakern import backend
from lorakern.ops.kron_delta.op import kron_delta
from lorakern.testing import DTYPES

# A, B, P, Q.  Packs of every width; a row shorter than a warp and one of several; more than a tile
# of D, a share of C for each warp and shares of several
SHAPES = [(3, 5, 7, 9), (1, 1, 1, 1), (12, 16, 20, 10), (2, 3, 11, 72), (33, 2, 5, 260)]


def inputs(A, B, P, Q, dtype):
    return torch.randn(A, B, dtype=dtype), torch.randn(P, Q, dtype=dtype), 0.7


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, cuda_host):
    c, d, scale = inputs(*shape, dtype)
    check_on_host(cuda_host, "kron_delta_fwd", (c, d, scale))
    ddelta = torch.randn(c.shape[0] * d.shape[0], c.shape[1] * d.shape[1], dtype=dtype)
    for needs in itertools.product([True, False], repeat=2):
        check_on_host(cuda_host, "kron_delta_bwd", (ddelta, c, d, scale, list(needs)))
        if shape != SHAPES[0]:
            break


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 3, 4, 0)], ids=str)
def test_sizes_of_zero(shape, cuda_host):
    c, d, scale = inputs(*shape, torch.float32)
    check_on_host(cuda_host, "kron_delta_fwd", (c, d, scale))
    ddelta = torch.randn(shape[0] * shape[2], shape[1] * shape[3])
    launch = torch.ops.lorakern_host.kron_delta_bwd_cuda
    for grad, factor in zip(launch(ddelta, c, d, scale, [True, True]), (c, d), strict=True):
        assert torch.equal(grad, torch.zeros_like(factor))


def test_a_factor_at_any_address(cuda_host):
    c, d, scale = inputs(3, 5, 7, 8, torch.float32)
    moved = torch.cat([d.flatten()[:1], d.flatten()])[1:].view(7, 8)
    assert moved.data_ptr() % 16
    check_on_host(cuda_host, "kron_delta_fwd", (c, moved, scale))


def test_a_wrong_shape_is_named(cuda_host):
    launch = torch.ops.lorakern_host.kron_delta_bwd_cuda
    c, d, scale = inputs(3, 5, 7, 8, torch.float32)
    with pytest.raises(ValueError, match=r"ddelta: want shape \[21, 40\], got \[21, 41\]"):
        launch(torch.randn(21, 41), c, d, scale, [True, True])


def test_cpu_tensors_are_refused():
    args = inputs(3, 5, 7, 8, torch.float32)
    assert backend.why("kron_delta_fwd", *args)["cuda"].startswith("the tensors are on cpu")
    assert kron_delta(*args).shape == (21, 40)


@pytest.mark.skipif(cuda_aot.nvcc() is None, reason="there is no nvcc")
def test_compiles_without_spills(tmp_path):
    packs = [("float, float", (1, 2, 4)), ("double, double", (1, 2))]
    # half goes as bfloat16
    packs += [("__nv_bfloat16, float", (1, 2, 4, 8))]
    kernels = [f"kron_delta_fwd_kernel<{t}, {pack}>" for t, widths in packs for pack in widths]
    kernels += [f"kron_delta_bwd_kernel<{t}>" for t, _ in packs]
    for chip, found in cuda_aot.usages("kron_delta.cuh", kernels, tmp_path).items():
        assert len(found) == len(kernels)
        for usage in found:
            print(f"sm_{chip} {usage}")
            assert usage.stack == usage.spilled == 0, usage

"""CUDA kernels of hada_delta without a GPU: run on the host, and compiled by nvcc."""

import cuda_aot
import pytest
import torch
from cuda_aot import check_on_host

from lorakern import backend
from lorakern.ops.hada_delta.op import hada_delta
from lorakern.testing import DTYPES

# O, I, R, S.  More tiles than blocks; a ragged last tile each way; ranks of several slices, odd
# ones, and R > I; whole packs and single values
SHAPES = [(130, 200, 5, 17), (65, 33, 34, 3), (1, 1, 1, 2), (16, 64, 16, 32), (11, 260, 2, 1)]
NEEDS = [[True] * 4, [True, False, False, True], [False, False, True, False], [False] * 4]


def inputs(O, I, R, S, dtype):  # noqa: E741
    shapes = (R, I), (O, R), (S, I), (O, S)
    return *(torch.randn(*shape, dtype=dtype) for shape in shapes), 0.7


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, cuda_host):
    args = inputs(*shape, dtype)
    check_on_host(cuda_host, "hada_delta_fwd", args)
    ddelta = torch.randn(*shape[:2], dtype=dtype)
    for needs in NEEDS if shape == SHAPES[1] else NEEDS[:1]:
        check_on_host(cuda_host, "hada_delta_bwd", (ddelta, *args, needs))


@pytest.mark.parametrize("shape", [(0, 5, 2, 3), (5, 0, 2, 3), (5, 4, 0, 3)], ids=str)
def test_sizes_of_zero(shape, cuda_host):
    args = inputs(*shape, torch.float32)
    check_on_host(cuda_host, "hada_delta_fwd", args)
    ddelta = torch.randn(*shape[:2])
    check_on_host(cuda_host, "hada_delta_bwd", (ddelta, *args, [True] * 4))


def test_strided_factors(cuda_host):
    turned = tuple(
        a.T.contiguous().T if isinstance(a, torch.Tensor) else a
        for a in inputs(20, 24, 3, 5, torch.float32)
    )
    check_on_host(cuda_host, "hada_delta_fwd", turned)


def test_a_wrong_shape_or_dtype_is_named(cuda_host):
    launch = torch.ops.lorakern_host.hada_delta_fwd_cuda
    down1, up1, down2, up2, scale = inputs(20, 24, 3, 5, torch.float32)
    with pytest.raises(ValueError, match=r"up2: want shape \[20, 5\], got \[20, 4\]"):
        launch(down1, up1, down2, up2[:, 1:], scale)
    with pytest.raises(ValueError, match="down2: want Float on cpu, got Double"):
        launch(down1, up1, down2.double(), up2, scale)


def test_cpu_tensors_are_refused():
    args = inputs(20, 24, 3, 5, torch.float32)
    assert backend.why("hada_delta_fwd", *args)["cuda"].startswith("the tensors are on cpu")
    assert hada_delta(*args).shape == (20, 24)


@pytest.mark.skipif(cuda_aot.nvcc() is None, reason="there is no nvcc")
def test_compiles_without_spills(tmp_path):
    # half goes as bfloat16
    types = ("float, float", "__nv_bfloat16, float", "double, double")
    kernels = [f"hada_delta_{way}_kernel<{t}>" for way in ("fwd", "bwd") for t in types]
    for chip, found in cuda_aot.usages("hada_delta.cuh", kernels, tmp_path).items():
        assert len(found) == len(kernels)
        for usage in found:
            print(f"sm_{chip} {usage}")
            assert usage.stack == usage.spilled == 0, usage

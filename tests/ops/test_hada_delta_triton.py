"""The Triton kernels of hada_delta in the interpreter; test_hada_linear_triton.py has cubins."""

import pytest
import torch

from lorakern.testing import check_every_kernel

pytest.importorskip("triton")
NEEDS = [[True] * 4, [False, True, False, False], [True, False, True, False], [False] * 4]


# I, O, R, S: more than a tile each way, ragged; ranks that differ, and more than a dim
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(133, 70, 17, 5), (9, 65, 1, 33), (24, 40, 128, 16)], ids=str)
def test_matches(shape, dtype, device):
    columns, rows, *ranks = shape

    def make(*sizes):
        return torch.randn(sizes, device=device).to(dtype)

    factors = [t for r in ranks for t in (make(r, columns), make(rows, r))]
    check_every_kernel("hada_delta_fwd", (*factors, 0.7))
    for needs in NEEDS:
        check_every_kernel("hada_delta_bwd", (make(rows, columns), *factors, 0.7, needs))

"""The Triton kernels of kron_delta in the interpreter; test_kron_linear_triton.py has cubins."""

import pytest
import torch

from lorakern.testing import check_every_kernel

pytest.importorskip("triton")


# A, B, P, Q: ragged tiles, slices of the sum over D, and of the one over C
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7, 6, 5, 9), (2, 3, 33, 20), (13, 20, 3, 1)], ids=str)
def test_matches(shape, dtype, device):
    A, B, P, Q = shape

    def make(*sizes):
        return torch.randn(sizes, device=device).to(dtype)

    c, d = make(A, B), make(P, Q)
    check_every_kernel("kron_delta_fwd", (c, d, 0.7))
    for needs in ([True, True], [True, False], [False, True]):
        check_every_kernel("kron_delta_bwd", (make(A * P, B * Q), c, d, 0.7, needs))

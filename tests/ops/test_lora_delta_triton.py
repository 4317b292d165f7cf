"""The Triton kernels of lora_delta in the interpreter; test_hada_linear_triton.py has cubins."""

import pytest
import torch

from lorakern.testing import check_every_kernel

pytest.importorskip("triton")


# I, O, R: more than a tile each way, ragged; a rank of one, and more than a dim
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(133, 70, 17), (9, 65, 1), (24, 40, 128)], ids=str)
def test_matches(shape, dtype, device):
    columns, rows, rank = shape
    down = torch.randn(rank, columns, device=device).to(dtype)
    up = torch.randn(rows, rank, device=device).to(dtype)
    check_every_kernel("lora_delta_fwd", (down, up, 0.7))
    ddelta = torch.randn(rows, columns, device=device).to(dtype)
    for needs in ([True, True], [True, False], [False, True]):
        check_every_kernel("lora_delta_bwd", (ddelta, down, up, 0.7, needs))

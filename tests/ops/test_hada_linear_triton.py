"""Triton kernels of hada_linear without a GPU: both plans in the interpreter."""

import pytest
import torch

from lorakern import backend
from lorakern.ops.hada_linear import reference
from lorakern.ops.lora_linear import triton_tables as tables
from lorakern.testing import check_every_kernel, lost_share

pytest.importorskip("triton")
NEEDS = [[True] * 6, [True, False, False, False, False, False], [False, True, False, False, True, False]]  # fmt: skip


def inputs(shape, dtype, device, gain=True):
    rows, columns, out, *ranks = shape

    def make(*sizes, std=1.0):
        return (std * torch.randn(sizes, device=device)).to(dtype)

    factors = [
        t for r in ranks for t in (make(r, columns, std=columns**-0.25), make(out, r, std=r**-0.5))
    ]
    return (
        make(rows, columns), make(out, columns, std=columns**-0.5), make(out), *factors, 0.7,
        1 + make(out, std=0.2) if gain else None,
    )  # fmt: skip


# rows, I, O, R, S: more than a tile each way, ragged, for dense and for a LoRA of rank R·S
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(70, 72, 136, 17, 5), (131, 129, 70, 33, 40), (70, 129, 66, 3, 2)], ids=str
)
def test_matches(shape, dtype, device):
    for gain in (True, False):
        args = inputs(shape, dtype, device, gain)
        check_every_kernel("hada_linear_fwd", args)
        x, weight, bias, *rest = args
        dy = torch.randn(len(x), len(weight), device=device).to(dtype)
        for needs in NEEDS if gain else NEEDS[1:2]:
            check_every_kernel("hada_linear_bwd", (dy, x, weight, *rest, needs))

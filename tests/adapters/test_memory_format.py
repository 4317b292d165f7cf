"""A convolution's output and input gradient are laid out in memory as its input is."""

import pytest
import torch
from torch import nn

from lorakern.adapters import attach


@pytest.mark.parametrize("algo", ["lora", "dora", "loha", "lokr"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_1x1_convolution_leaves_pixels_where_they_were(algo, memory):
    model = nn.Sequential(nn.Conv2d(8, 12, 1))
    attach(model, "0", algo, rank=4)
    x = torch.randn(2, 8, 5, 6).to(memory_format=memory).requires_grad_()
    y = model(x)
    assert y.is_contiguous(memory_format=memory)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.is_contiguous(memory_format=memory)

"""An attention whose q, k and v are adapted, and what it computes as a group and apart."""

import copy

import pytest
import torch
from torch import nn

from lorakern.adapters import find, inject

needs_native = pytest.mark.skipif(
    not hasattr(torch.ops.lorakern_native, "lora_linear_shared_cpu"),
    reason="lorakern._native is not built, and only its kernel is picked for groups",
)
WIDE = 24


class Attention(nn.Module):
    def __init__(self, text=WIDE, cross=None):
        super().__init__()
        self.to_q = nn.Linear(WIDE, 16)
        self.to_k, self.to_v = nn.Linear(text, 16, bias=False), nn.Linear(text, 32)
        if cross is not None:
            self.is_cross_attention = cross

    def forward(self, x, text=None):
        text = x if text is None else text
        q, k, v = self.to_q(x), self.to_k(text), self.to_v(text)
        return torch.softmax(q @ k.mT, -1) @ v


def adapted(module, dtype=torch.float32, targets=("to_q", "to_k", "to_v"), **options):
    """The module with adapters that do something, and rank 3 so that nothing is a whole tile."""
    module = module.to(dtype)
    inject(module, targets=targets, **{"rank": 3} | options)
    with torch.no_grad():
        for path, (adapter,) in find(module).items():
            adapter.up.normal_()
            adapter.multiplier = 0.3 if path.endswith("k") else 0.7
    return module


def apart(module):
    """A copy whose layers run one by one."""
    module = copy.deepcopy(module)
    for stack in find(module).values():
        stack[-1]._shared = None
    return module


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def outcome(module, *inputs):
    """The output, and the gradients of the inputs that ask for one and of the factors."""
    wanted = [t for t in inputs if t.requires_grad] + trained(module)
    y = module(*inputs)
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, wanted, torch.randn_like(y))]


def assert_same(module, *inputs):
    for got, want in zip(outcome(module, *inputs), outcome(apart(module), *inputs), strict=True):
        torch.testing.assert_close(got, want)

"""kron_delta: every kernel, the derivative, compile."""

import importlib

import pytest
import torch
from linear_ops import check_compiles_once, check_needs, check_saves_only_inputs, detached, name

from lorakern.functional import kron_delta
from lorakern.ops.kron_delta import reference
from lorakern.testing import DTYPES, check_backward_formula, check_every_kernel

op = importlib.import_module("lorakern.ops.kron_delta.op")

# A, B, P, Q
SHAPES = [
    (8, 12, 20, 16),
    (5, 3, 13, 11),
    (1, 4, 24, 4),
    (40, 2, 1, 4),
    (3, 33, 11, 1),
    (2, 20, 12, 40),
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=name)


def inputs(shape, dtype, device="cpu"):
    rows, columns, inner_rows, inner_columns = shape

    def make(*sizes):
        return torch.randn(sizes, dtype=torch.float64).to(device, dtype).requires_grad_()

    return make(rows, columns), make(inner_rows, inner_columns), 0.7


def backward_inputs(args, needs=(True,) * 2):
    *factors, scale = detached(args)
    delta = reference.kron_delta_fwd(*factors, scale)
    return torch.randn_like(delta), *factors, scale, list(needs)


@dtypes
@shapes
def test_every_kernel_matches(shape, dtype, device):
    args = inputs(shape, dtype, device)
    check_every_kernel("kron_delta_fwd", detached(args))
    check_every_kernel("kron_delta_bwd", backward_inputs(args))


@pytest.mark.parametrize("at", range(2))
def test_every_backward_kernel_computes_what_is_wanted(at, device):
    needs = [i == at for i in range(2)]
    args = inputs((21, 40, 3, 2), torch.float32, device)
    check_every_kernel("kron_delta_bwd", backward_inputs(args, needs))


@shapes
def test_backward_is_the_derivative(shape):
    check_backward_formula(kron_delta, reference.kron_delta_fwd, inputs(shape, torch.float64))


def test_opcheck(device):
    args = inputs((21, 40, 3, 2), torch.float32, device)
    scale = torch.tensor(0.7, dtype=torch.float64)
    torch.library.opcheck(op._fwd.torch_op, (*detached(args)[:2], scale))
    ddelta, *factors, _, needs = backward_inputs(args)
    torch.library.opcheck(op._bwd.torch_op, (ddelta, *factors, scale, needs))


def test_compiled(device):
    check_compiles_once(kron_delta, "kron_delta", inputs((21, 40, 3, 2), torch.float32, device), 2)


def test_gradients(device):
    args = inputs((21, 40, 3, 2), torch.float32, device)
    check_needs(kron_delta, args, range(2))
    check_saves_only_inputs(kron_delta, args)


WRONG = {
    r"want d as a matrix, got \[2, 3, 1\]": lambda a: [a[0], a[1][..., None], a[2]],
    "mixed dtypes: c torch.float16": lambda a: [a[0].half(), *a[1:]],
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        kron_delta(*WRONG[message](detached(inputs((5, 7, 2, 3), torch.float32))))

"""hada_delta: every kernel, the derivative, compile."""

import importlib

import pytest
import torch
from linear_ops import check_compiles_once, check_needs, check_saves_only_inputs, detached, name

from lorakern.functional import hada_delta
from lorakern.ops.hada_delta import reference
from lorakern.testing import DTYPES, check_backward_formula, check_every_kernel

op = importlib.import_module("lorakern.ops.hada_delta.op")

# O, I, R, S
SHAPES = [(80, 192, 4, 4), (65, 33, 3, 5), (24, 16, 5, 2), (170, 330, 9, 12), (1, 7, 1, 1),
          (33, 129, 33, 20)]  # fmt: skip
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=name)


def inputs(shape, dtype, device="cpu"):
    out, columns, first, second = shape

    def make(*sizes, std=1.0):
        return (std * torch.randn(sizes, dtype=torch.float64)).to(device, dtype).requires_grad_()

    downs = make(first, columns), make(second, columns)
    ups = make(out, first, std=first**-0.5), make(out, second, std=second**-0.5)
    return downs[0], ups[0], downs[1], ups[1], 0.7


def backward_inputs(args, needs=(True,) * 4):
    *factors, scale = detached(args)
    delta = reference.hada_delta_fwd(*factors, scale)
    return torch.randn_like(delta), *factors, scale, list(needs)


@dtypes
@shapes
def test_every_kernel_matches(shape, dtype, device):
    args = inputs(shape, dtype, device)
    check_every_kernel("hada_delta_fwd", detached(args))
    check_every_kernel("hada_delta_bwd", backward_inputs(args))


@pytest.mark.parametrize("at", range(4))
def test_every_backward_kernel_computes_what_is_wanted(at, device):
    needs = [i == at for i in range(4)]
    args = inputs((21, 40, 3, 2), torch.float32, device)
    check_every_kernel("hada_delta_bwd", backward_inputs(args, needs))


@shapes
def test_backward_is_the_derivative(shape):
    check_backward_formula(hada_delta, reference.hada_delta_fwd, inputs(shape, torch.float64))


def test_opcheck(device):
    args = inputs((21, 40, 3, 2), torch.float32, device)
    scale = torch.tensor(0.7, dtype=torch.float64)
    torch.library.opcheck(op._fwd.torch_op, (*detached(args)[:4], scale))
    ddelta, *factors, _, needs = backward_inputs(args)
    torch.library.opcheck(op._bwd.torch_op, (ddelta, *factors, scale, needs))


def test_compiled(device):
    check_compiles_once(hada_delta, "hada_delta", inputs((21, 40, 3, 2), torch.float32, device), 4)


def test_gradients(device):
    args = inputs((21, 40, 3, 2), torch.float32, device)
    check_needs(hada_delta, args, range(4))
    check_saves_only_inputs(hada_delta, args)


WRONG = {
    r"want up1 \[5, 2\], got \[5, 3\]": lambda a: [a[0], torch.zeros(5, 3), *a[2:]],
    r"want down2 \[3, 7\], got \[3, 6\]": lambda a: [*a[:2], torch.zeros(3, 6), *a[3:]],
    r"want down1 as a matrix, got \[2, 7, 1\]": lambda a: [a[0][..., None], *a[1:]],
    "mixed dtypes: down1 torch.float16": lambda a: [a[0].half(), *a[1:]],
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        hada_delta(*WRONG[message](detached(inputs((5, 7, 2, 3), torch.float32))))

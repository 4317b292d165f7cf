"""hada_linear: every kernel, the derivative, compile, what is saved; no small update is lost."""

import importlib
import itertools

import pytest
import torch
from linear_ops import check_compiles_once, check_needs, check_saves_only_inputs, detached, name
from linear_ops import lost_shares as lost_in

from lorakern import backend
from lorakern.functional import hada_linear
from lorakern.ops.check import wide
from lorakern.ops.hada_linear import reference
from lorakern.testing import DTYPES, check_backward_formula, check_every_kernel

op = importlib.import_module("lorakern.ops.hada_linear.op")
# where x, the four factors and the gain are among the arguments
TRAINED = (0, 3, 4, 5, 6, 8)

# leading dims of x, I, O, R, S.  Small ranks go by Khatri-Rao, the others by tiles.
SHAPES = [
    ((2, 77), 192, 80, 4, 4),
    ((63,), 33, 65, 3, 5),
    ((1, 1), 16, 24, 5, 2),
    ((5, 2, 7), 8, 40, 16, 16),
    ((3, 43), 129, 33, 20, 1),
    ((300,), 330, 170, 9, 12),
    ((9, 14), 200, 120, 1, 1),
    # several tiles and runs of rows, ranks of more than a tile, several passes over I
    ((601,), 362, 702, 20, 17),
    ((1,), 64, 50, 40, 33),
    ((3,), 4200, 34, 16, 2),
    # a weight of which the CPU makes rows at a time
    ((40,), 1100, 1201, 20, 17),
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=name)


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """It takes minutes: test_hada_linear_triton.py has shapes for it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def inputs(shape, dtype, device="cpu", bias=True, scale=0.7, gain=False):
    """The arguments, with outputs of about 1; x, the factors and gain ask for gradients."""
    lead, columns, out, first, second = shape

    def make(*sizes, std=1.0):
        return (std * torch.randn(sizes, dtype=torch.float64)).to(device, dtype)

    return (
        make(*lead, columns).requires_grad_(),
        make(out, columns, std=columns**-0.5),
        make(out) if bias else None,
        make(first, columns, std=columns**-0.5).requires_grad_(),
        make(out, first, std=first**-0.5).requires_grad_(),
        make(second, columns).requires_grad_(),
        make(out, second, std=second**-0.5).requires_grad_(),
        scale,
        (1 + make(out, std=0.2)).to(wide(dtype)).requires_grad_() if gain else None,
    )


def backward_inputs(args, needs=(True,) * 6):
    x, weight, _, *factors, scale, gain = detached(args)
    y = reference.hada_linear_fwd(x, weight, None, *factors, scale, gain)
    needs = [*needs[:5], needs[5] and gain is not None]
    return torch.randn_like(y), x, weight, *factors, scale, gain, needs


@dtypes
@shapes
def test_every_kernel_matches(shape, dtype, device):
    for bias, gain in ((True, False), (False, False), (True, True)):
        args = inputs(shape, dtype, device, bias, gain=gain)
        check_every_kernel("hada_linear_fwd", detached(args))


@dtypes
@shapes
def test_every_backward_kernel_matches(shape, dtype, device):
    for gain in (False, True):
        args = inputs(shape, dtype, device, gain=gain)
        check_every_kernel("hada_linear_bwd", backward_inputs(args))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=6))[1::9], ids=name)
@pytest.mark.parametrize("shape", [((21,), 24, 40, 2, 1), ((21,), 24, 40, 9, 9)], ids=name)
def test_every_backward_kernel_computes_what_is_wanted(shape, needs, device):
    args = inputs(shape, torch.float32, device, gain=True)
    check_every_kernel("hada_linear_bwd", backward_inputs(args, needs))


@dtypes
def test_no_rows(dtype, device):
    for ranks in ((1, 1), (9, 9)):
        args = inputs(((0, 3), 16, 24, *ranks), dtype, device)
        check_every_kernel("hada_linear_fwd", detached(args))
        check_every_kernel("hada_linear_bwd", backward_inputs(args))


@shapes
def test_backward_is_the_derivative(shape):
    for bias, gain in ((True, False), (True, True)):
        args = inputs(shape, torch.float64, bias=bias, gain=gain)
        check_backward_formula(hada_linear, reference.hada_linear_fwd, args)


def test_opcheck(device):
    args = detached(inputs(((4, 6), 16, 24, 3, 2), torch.float32, device, gain=True))
    scale = torch.tensor(0.7, dtype=torch.float64)
    torch.library.opcheck(op._fwd.torch_op, (*args[:7], scale, args[8]))
    torch.library.opcheck(op._fwd.torch_op, (*args[:2], None, *args[3:7], scale, None))
    dy, x, weight, *factors, _, gain, needs = backward_inputs(args)
    torch.library.opcheck(op._bwd.torch_op, (dy, x, weight, *factors, scale, gain, needs))


def test_compiled_is_one_op_a_direction_and_a_new_scale_recompiles_nothing(device):
    args = inputs(((2, 5), 12, 20, 3, 2), torch.float32, device, gain=True)
    check_compiles_once(hada_linear, "hada_linear", args, scale_at=7)


def test_only_the_wanted_gradients_come(device):
    check_needs(
        hada_linear, inputs(((6,), 10, 14, 2, 3), torch.float32, device, gain=True), TRAINED
    )


@dtypes
def test_nothing_is_saved_but_the_inputs(dtype, device):
    check_saves_only_inputs(hada_linear, inputs(((4, 9), 32, 48, 5, 5), dtype, device, gain=True))


WRONG = {
    r"want x \[..., 10\] as weight takes, got \[3, 11\]": lambda a: [torch.zeros(3, 11), *a[1:]],
    r"want up1 \[14, 2\], got \[14, 3\]": lambda a: [*a[:4], torch.zeros(14, 3), *a[5:]],
    r"want down2 \[3, 10\], got \[3, 9\]": lambda a: [*a[:5], torch.zeros(3, 9), *a[6:]],
    r"want down1 as a matrix, got \[2, 10, 1\]": lambda a: [*a[:3], a[3][..., None], *a[4:]],
    "mixed dtypes: x torch.float16": lambda a: [a[0].half(), *a[1:]],
    "want gain in torch.float32": lambda a: [*a[:8], torch.zeros(14).half()],
    "mixed devices": lambda a: [a[0], a[1].to("meta"), *a[2:]],
    r"want gain \[14\], got \[1, 14\]": lambda a: [*a[:8], torch.zeros(1, 14)],
    "weight and bias are frozen": lambda a: [a[0], a[1].requires_grad_(), *a[2:]],
    "weight and bias are frozen here; call": lambda a: [*a[:2], a[2].requires_grad_(), *a[3:]],
    "want floating-point tensors, got torch.int64": lambda a: [
        *(t if t is None or isinstance(t, float) else t.long() for t in a[:8]),
        None,
    ],
    r"want bias \[14\], got \[13\]": lambda a: [*a[:2], torch.zeros(13), *a[3:]],
}


@pytest.mark.parametrize("way", [None, "reference"])
@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_input_is_named(message, way):
    args = detached(inputs(((3,), 10, 14, 2, 3), torch.float32))
    with backend.use(way):
        # the native function looks first where one of this dtype has run
        hada_linear(*args)
        with pytest.raises(ValueError, match=message):
            hada_linear(*WRONG[message](args))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
@pytest.mark.parametrize("ratio", [1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("ranks", [(2, 2), (16, 16)], ids=["Khatri-Rao", "tiles"])
def test_no_kernel_loses_a_small_update(ranks, ratio, dtype, device):
    shape = ((4096,), *((640, 640) if dtype == torch.bfloat16 else (160, 160)), *ranks)
    args = list(detached(inputs(shape, dtype, device, bias=False)))
    delta = args[7] * (args[4].double() @ args[3].double()) * (args[6].double() @ args[5].double())
    args[4] = (args[4] * (ratio * args[1].double().norm() / delta.norm())).to(dtype)
    delta = args[7] * (args[4].double() @ args[3].double()) * (args[6].double() @ args[5].double())
    for kernel, lost in lost_in("hada_linear", tuple(args), delta).items():
        assert abs(lost) < 0.02, f"{kernel} loses {lost:.4f}"

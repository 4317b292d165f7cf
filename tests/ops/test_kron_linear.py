"""kron_linear: every kernel, the derivative, compile, what is saved; no small update is lost."""

import importlib
import itertools

import pytest
import torch
from linear_ops import check_compiles_once, check_needs, check_saves_only_inputs, detached, name
from linear_ops import lost_shares as lost_in

from lorakern import backend
from lorakern.functional import kron_linear
from lorakern.ops.check import wide
from lorakern.ops.kron_linear import reference
from lorakern.testing import DTYPES, check_backward_formula, check_every_kernel

op = importlib.import_module("lorakern.ops.kron_linear.op")
# where x, the factors and the gain are among the arguments
TRAINED = (0, 3, 4, 5, 6, 8)

# leading dims of x, (A, B) of C, (P, Q) of D, rank of C and of D or None for a whole one
SHAPES = [
    ((2, 77), (8, 12), (20, 16), None, None),
    ((63,), (5, 3), (13, 11), 2, 3),
    ((1, 1), (1, 4), (24, 4), None, 5),
    ((5, 2, 7), (40, 20), (1, 4), 1, None),
    ((3, 43), (3, 33), (11, 1), None, None),
    ((300,), (17, 34), (10, 20), None, 4),
    ((70,), (2, 3), (52, 61), None, 3),
    ((9, 4), (2, 20), (12, 40), None, None),
    # in 16-bit tiles: several of each side and a short one, a whole D of a low rank, tails of rows
    ((37,), (36, 34), (18, 42), None, None),
    ((300,), (18, 34), (40, 20), None, 4),
    ((1,), (2, 4), (6, 8), None, None),
    # a rank too low to make D whole
    ((9,), (2, 2), (64, 64), None, 1),
    # sums over more than a run, of columns that do not fill a vector
    ((11,), (4, 3), (402, 500), None, None),
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=name)


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """It takes minutes: test_kron_linear_triton.py has shapes for it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def inputs(shape, dtype, device="cpu", bias=True, scale=0.7, gain=False):
    """The arguments, with outputs of about 1; x, the factors and gain ask for gradients."""
    lead, c, d, c_rank, d_rank = shape
    out, columns = c[0] * d[0], c[1] * d[1]

    def make(*sizes, std=1.0):
        return (std * torch.randn(sizes, dtype=torch.float64)).to(device, dtype)

    def factor(rows, cols, rank):
        if rank is None:
            return [make(rows, cols, std=cols**-0.5).requires_grad_(), None]
        up, down = make(rows, rank, std=rank**-0.5), make(rank, cols, std=cols**-0.5)
        return [up.requires_grad_(), down.requires_grad_()]

    return (
        make(*lead, columns).requires_grad_(),
        make(out, columns, std=columns**-0.5),
        make(out) if bias else None,
        *factor(*c, c_rank),
        *factor(*d, d_rank),
        scale,
        (1 + make(out, std=0.2)).to(wide(dtype)).requires_grad_() if gain else None,
    )


def backward_inputs(args, needs=(True,) * 6):
    x, weight, _, *factors, scale, gain = detached(args)
    y = reference.kron_linear_fwd(x, weight, None, *factors, scale, gain)
    needs = [*needs[:5], needs[5] and gain is not None]
    return torch.randn_like(y), x, weight, *factors, scale, gain, needs


def trained_of(args):
    return [at for at in TRAINED if args[at] is not None]


@dtypes
@shapes
def test_every_kernel_matches(shape, dtype, device):
    for bias, gain in ((True, False), (False, False), (True, True)):
        args = inputs(shape, dtype, device, bias, gain=gain)
        check_every_kernel("kron_linear_fwd", detached(args))


@dtypes
@shapes
def test_every_backward_kernel_matches(shape, dtype, device):
    for gain in (False, True):
        args = inputs(shape, dtype, device, gain=gain)
        check_every_kernel("kron_linear_bwd", backward_inputs(args))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=6))[1::9], ids=name)
def test_every_backward_kernel_computes_what_is_wanted(needs, device):
    for dtype, Q, gain in ((torch.float32, 9, True), (torch.bfloat16, 8, False)):
        args = inputs(((21,), (4, 6), (10, Q), 2, 3), dtype, device, gain=gain)
        check_every_kernel("kron_linear_bwd", backward_inputs(args, needs))


@dtypes
def test_no_rows(dtype, device):
    args = inputs(((0, 3), (4, 6), (10, 9), None, 3), dtype, device)
    check_every_kernel("kron_linear_fwd", detached(args))
    check_every_kernel("kron_linear_bwd", backward_inputs(args))


@shapes
def test_backward_is_the_derivative(shape):
    for bias, gain in ((True, False), (True, True)):
        args = inputs(shape, torch.float64, bias=bias, gain=gain)
        check_backward_formula(kron_linear, reference.kron_linear_fwd, args)


def test_opcheck(device):
    scale = torch.tensor(0.7, dtype=torch.float64)
    for ranks, gain in (((2, 3), True), ((None, None), False)):
        args = inputs(((4, 6), (4, 6), (10, 9), *ranks), torch.float32, device, gain=gain)
        args = detached(args)
        torch.library.opcheck(op._fwd.torch_op, (*args[:7], scale, args[8]))
        dy, x, weight, *factors, _, gain, needs = backward_inputs(args)
        torch.library.opcheck(op._bwd.torch_op, (dy, x, weight, *factors, scale, gain, needs))


@pytest.mark.parametrize("ranks", [(None, None), (2, 3)], ids=name)
def test_compiled_is_one_op_a_direction_and_a_new_scale_recompiles_nothing(ranks, device):
    args = inputs(((2, 5), (4, 6), (10, 9), *ranks), torch.float32, device, gain=True)
    check_compiles_once(kron_linear, "kron_linear", args, scale_at=7)


@pytest.mark.parametrize("ranks", [(None, None), (2, 3)], ids=name)
def test_only_the_wanted_gradients_come(ranks, device):
    args = inputs(((6,), (2, 5), (7, 3), *ranks), torch.float32, device, gain=True)
    check_needs(kron_linear, args, trained_of(args))


@dtypes
def test_nothing_is_saved_but_the_inputs(dtype, device):
    args = inputs(((4, 9), (4, 6), (10, 9), None, 3), dtype, device, gain=True)
    check_saves_only_inputs(kron_linear, args)


WRONG = {
    r"want x \[..., 15\] as weight takes, got \[3, 11\]": lambda a: [torch.zeros(3, 11), *a[1:]],
    r"C \[2, 5\] and D \[7, 4\] multiply to \[14, 20\], weight is \[14, 15\]": lambda a: [
        *a[:6],
        torch.zeros(2, 4),
        *a[7:],
    ],
    r"d_up \[7, 2\] and d_down \[3, 3\] share no rank": lambda a: [
        *a[:6],
        torch.zeros(3, 3),
        *a[7:],
    ],
    r"want c_up as a matrix, got \[2, 5, 1\]": lambda a: [*a[:3], a[3][..., None], *a[4:]],
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
    args = detached(inputs(((3,), (2, 5), (7, 3), None, 2), torch.float32))
    with backend.use(way):
        # the native function looks first where one of this dtype has run
        kron_linear(*args)
        with pytest.raises(ValueError, match=message):
            kron_linear(*WRONG[message](args))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
@pytest.mark.parametrize("ratio", [1e-4, 1e-3, 1e-2, 1e-1])
def test_no_kernel_loses_a_small_update(ratio, dtype, device):
    outer = (20, 10) if dtype == torch.bfloat16 else (5, 5)
    args = list(detached(inputs(((4096,), outer, (32, 32), None, None), dtype, device, bias=False)))

    def update():
        return args[7] * torch.kron(args[3].double(), args[5].double())

    args[3] = (args[3] * (ratio * args[1].double().norm() / update().norm())).to(dtype)
    for kernel, lost in lost_in("kron_linear", tuple(args), update()).items():
        assert abs(lost) < 0.02, f"{kernel} loses {lost:.4f}"

"""frozen_linear: every kernel, the derivative, opcheck, compile."""

from functools import partial

import pytest
import torch
from linear_ops import check_saves_only_inputs
from torch._dynamo.testing import CompileCounter

from lorakern import backend
from lorakern.functional import frozen_linear
from lorakern.ops.frozen_linear import op, reference
from lorakern.testing import (
    DTYPES,
    assert_as_exact_as_torch,
    check_backward_formula,
    check_every_kernel,
    exactly,
)

native = torch.ops.lorakern_native
built = pytest.mark.skipif(
    not hasattr(native, "frozen_linear_cpu"), reason="lorakern._native is not built"
)
# M, I, O: odd sizes, a last run of one row of the weight, more columns than a core keeps, size 1
SHAPES = [(2, 515, 521), (32, 2049, 1031), (7, 193, 5001), (3, 4100, 131), (5, 1, 17), (9, 70, 1)]


def make(M, I, O, dtype=torch.float32, grad=False):  # noqa: E741
    x = torch.randn(M, I, dtype=dtype, requires_grad=grad)
    return x, torch.randn(O, I, dtype=dtype) / I**0.5, torch.randn(O, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    x, weight, bias = (t.to(device) for t in make(*shape, dtype))
    for b in (bias, None):
        check_every_kernel("frozen_linear_fwd", (x, weight, b))
    check_every_kernel("frozen_linear_bwd", (torch.randn_like(x @ weight.mT), weight))


@built
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_right_where_another_product_would_be_faster_too(shape, threads, request):
    """The C++ kernels on any number of threads, and of rows and weights that they refuse."""
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    x, weight, bias = make(*shape)
    dy = torch.randn(shape[0], shape[2])
    for b in (bias, None):
        args = x, weight, b
        y = reference.frozen_linear_fwd(*args)
        exact = exactly(reference.frozen_linear_fwd, *args)
        assert_as_exact_as_torch("y", native.frozen_linear_fwd_cpu(*args), exact, y)
    exact = exactly(reference.frozen_linear_bwd, dy, weight)
    assert_as_exact_as_torch("dx", native.frozen_linear_bwd_cpu(dy, weight), exact, dy @ weight)


@built
def test_what_is_refused_says_why(monkeypatch):
    monkeypatch.setattr(op, "_mkl_is_best", lambda: False)
    x, weight, bias = make(4, 1024, 512)

    def says(x, weight):
        return backend.why("frozen_linear_fwd", x, weight, bias)["cpp"]

    assert says(x, weight) == says(x.view(2, 2, 1024), weight) == "ok"
    assert says(x[:2], weight[:256]) == "ok" and "1 rows" in says(x[:1], weight)
    assert "33 rows" in says(x.new_empty(33, 1024), weight)
    assert "261120 weights" in says(x[:2], weight[:255])
    assert "bfloat16" in says(x, weight.bfloat16())
    assert "meta" in says(x.to("meta"), weight.to("meta"))
    monkeypatch.setattr(op, "_mkl_is_best", lambda: True)
    assert "Intel" in says(x, weight)


def test_backward_is_the_derivative():
    check_backward_formula(
        frozen_linear, reference.frozen_linear_fwd, make(3, 5, 7, torch.float64, grad=True)
    )


@built
@pytest.mark.parametrize("layout", ["rows", "strided", "vector"])
def test_the_one_node_gives_the_references_gradient(layout, monkeypatch):
    monkeypatch.setattr(op, "_mkl_is_best", lambda: False)
    monkeypatch.setattr(op, "ROWS", range(1, 33))
    x, weight, bias = make(4, 1024, 512)
    x = {"rows": x.view(2, 2, -1), "strided": x.mT.contiguous().mT, "vector": x[0]}[layout]
    x.requires_grad_()
    y = frozen_linear(x, weight, bias)
    assert "FrozenLinear" in y.grad_fn.name() and y.is_contiguous()
    (dx,) = torch.autograd.grad(y.sin().sum(), x)
    with backend.use("reference"):
        want = frozen_linear(x, weight, bias)
        assert "FrozenLinear" in want.grad_fn.name()
        (expected,) = torch.autograd.grad(want.sin().sum(), x)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(dx, expected)


def test_saves_the_weight_alone():
    args = make(4, 1024, 512, grad=True)
    check_saves_only_inputs(frozen_linear, args)


def test_opcheck():
    x, weight, bias = make(3, 6, 5)
    torch.library.opcheck(torch.ops.lorakern.frozen_linear_fwd.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.lorakern.frozen_linear_bwd.default, (x @ weight.mT, weight))


def test_compiles_whole():
    x, weight, bias = make(4, 1024, 512, grad=True)
    counter = CompileCounter()
    compiled = torch.compile(frozen_linear, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), frozen_linear(x, weight, bias))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({0: torch.zeros(4, 1023)}, r"want x \[..., 1024\] as weight takes, got \[4, 1023\]"),
        ({0: torch.zeros(())}, r"got \[\]"),
        ({0: torch.zeros(4, 1024).half()}, "mixed dtypes: x torch.float16"),
        ({0: torch.zeros(4, 1024, device="meta")}, "mixed devices"),
        ({1: torch.zeros(512)}, r"weight as a matrix, got \[512\]"),
        ({1: torch.zeros(512, 1024, requires_grad=True)}, "frozen here"),
        ({2: torch.zeros(511)}, r"want bias \[512\], got \[511\]"),
        ({2: torch.zeros(512, requires_grad=True)}, "frozen here"),
    ],
    ids=lambda c: c if isinstance(c, str) else None,
)  # fmt: skip
@pytest.mark.parametrize("known", [True, False], ids=["known", "new"])
def test_errors_say_what_came(change, says, known, monkeypatch):
    """Also where shapes are known, and the native function looks first."""
    monkeypatch.setattr(op, "_mkl_is_best", lambda: False)
    args = list(make(4, 1024, 512))
    if known:
        frozen_linear(*args)
    for i, value in change.items():
        args[i] = value
    with pytest.raises(ValueError, match=says):
        frozen_linear(*args)

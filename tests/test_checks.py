"""The judge judged: known-wrong results fail in every dtype and magnitude, right ones pass."""

import itertools
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from lorakern import backend, testing
from lorakern.testing import DTYPES, assert_as_exact_as_torch, exactly, lost_share

WRONG = {
    "zeros": torch.zeros_like,
    "one percent off": lambda y: y * 1.01,
    "one element off": lambda y: y.index_put((torch.tensor(5), torch.tensor(7)), y.max()),
    "one unwritten element": lambda y: y.index_put(
        (torch.tensor(5), torch.tensor(7)), torch.tensor(float("nan"), dtype=y.dtype)
    ),
    "rows swapped": lambda y: y.flip(0),
    "sign": lambda y: -y,
    "a column left out": lambda y: torch.cat([y[:, :-1], torch.zeros_like(y[:, :1])], 1),
    "another dtype": lambda y: y.to(torch.float32 if y.dtype != torch.float32 else torch.float64),
    "another shape": lambda y: y[:-1],
}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
magnitudes = pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])


def product(dtype, magnitude):
    """A product, the truth and in dtype, of the same rounded factors."""
    a = (magnitude * torch.randn(64, 48, dtype=torch.float64)).to(dtype)
    b = torch.randn(48, 32, dtype=torch.float64).to(dtype)
    return exactly(torch.mm, a, b), a @ b


@dtypes
@magnitudes
def test_torch_itself_passes(dtype, magnitude):
    exact, same = product(dtype, magnitude)
    assert_as_exact_as_torch("right", same, exact, same)


@dtypes
@magnitudes
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_results_fail(wrong, dtype, magnitude):
    exact, same = product(dtype, magnitude)
    with pytest.raises(AssertionError, match=wrong):
        assert_as_exact_as_torch(wrong, WRONG[wrong](same), exact, same)


@dtypes
@pytest.mark.parametrize("times, right", [(1.5, True), (3, False)])
def test_the_bound_is_twice_the_error_of_torch(times, right, dtype):
    exact, same = product(dtype, 1.0)
    rms = (same - exact).square().mean().sqrt()
    # uniform, so that the largest error is small beside the root mean square
    noise = 3**0.5 * (2 * torch.rand_like(exact) - 1)
    got = (exact + times * rms * noise).to(dtype)
    if right:
        assert_as_exact_as_torch("near", got, exact, same)
        return
    with pytest.raises(AssertionError, match="rms error"):
        assert_as_exact_as_torch("far", got, exact, same)


SINGLE = {
    "summed in float32": lambda a, b: a.float() @ b.float(),
    "factors of float32": lambda a, b: a.float().double() @ b.float().double(),
    "stored in float32": lambda a, b: (a @ b).float(),
}


@pytest.mark.parametrize("wrong", SINGLE)
def test_float64_by_way_of_float32_fails(wrong):
    a, b = torch.randn(64, 48).double() / 3, torch.randn(48, 32).double() / 3
    with pytest.raises(AssertionError, match="max error"):
        got = SINGLE[wrong](a, b).double()
        assert_as_exact_as_torch(wrong, got, exactly(torch.mm, a, b), a @ b)


WINDOW = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)


def convolution_backward(dy, x, weight, *needs):
    pixels = (t[..., None, None] for t in (dy, x, weight))
    return torch.ops.aten.convolution_backward(*pixels, None, *WINDOW, [*needs, False])


# each is a @ b
PRODUCTS = {
    "mm": torch.mm,
    "bmm": lambda a, b: torch.matmul(a[None], b[None])[0],
    "addmm": lambda a, b: F.linear(a, b.T, torch.zeros_like(b[0])),
    "convolution": lambda a, b: F.conv2d(
        a[..., None, None], b.T[..., None, None], torch.zeros_like(b[0])
    ).flatten(1),
    "gradient of x": lambda a, b: convolution_backward(
        a, a.new_zeros(len(a), b.shape[1]), b, True, False
    )[0].flatten(1),
    "gradient of the weight": lambda a, b: convolution_backward(
        a.T, b, a.new_zeros(len(a), b.shape[1]), False, True
    )[1].flatten(1),
}


@pytest.mark.parametrize("way", PRODUCTS)
def test_the_truth_is_exact(way):
    a, b = torch.randn(6, 300, dtype=torch.float64), torch.randn(300, 5, dtype=torch.float64)
    rows, columns = ([[Fraction(v) for v in row] for row in t.tolist()] for t in (a, b.T))
    want = [
        [float(sum(x * y for x, y in zip(row, column, strict=True))) for column in columns]
        for row in rows
    ]
    assert exactly(PRODUCTS[way], a, b).tolist() == want
    assert PRODUCTS[way](a, b).tolist() != want


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_sums_in_sixteen_bits_fail(dtype):
    a, b = torch.randn(64, 4096).to(dtype), torch.randn(4096).to(dtype)
    exact, total = a.double() @ b.double(), torch.zeros(64, dtype=dtype)
    for k in range(a.shape[1]):
        total = total + a[:, k] * b[k]
    with pytest.raises(AssertionError, match="error"):
        assert_as_exact_as_torch("summed in dtype", total, exact, exact.to(dtype))


def test_empty_results_are_right():
    none = torch.empty(0, 3)
    assert_as_exact_as_torch("none", none, none.double(), none)


NUMBERS = itertools.count()


@pytest.fixture
def toy():
    """A tiny op whose one kernel the test decides on."""
    # a torch op cannot be taken back
    name = f"judged_{next(NUMBERS)}"
    kernel = backend.Kernel(f"{__name__}:kernel")
    op = backend.define(
        name,
        "(Tensor x, Tensor spare, Tensor scale) -> Tensor",
        lambda x, spare, scale: scale * x,
        judged=kernel,
    )
    yield op
    del backend.OPS[name]


def changes_spare(x, spare, scale):
    spare.zero_()
    return scale * x


KERNELS = {
    "changed an input": changes_spare,
    "is not contiguous": lambda x, _, scale: (scale * x).t().contiguous().t(),
    "a second run gives other bits": lambda x, _, scale: scale * x + 1e-8 * torch.rand_like(x),
    "max error": lambda x, _, scale: (scale + 0.01) * x,
}


@pytest.mark.parametrize("complaint", KERNELS)
def test_a_wrong_kernel_is_found(complaint, toy):
    toy._loaded["judged"] = KERNELS[complaint]
    with pytest.raises(AssertionError, match=complaint):
        testing.check_every_kernel(toy.name, (torch.randn(9, 7), torch.randn(3), 0.5))


def test_a_right_kernel_passes(toy):
    toy._loaded["judged"] = lambda x, _, scale: x * scale
    testing.check_every_kernel(toy.name, (torch.randn(9, 7), torch.randn(3), 0.5))


def test_a_wrong_backward_is_found():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, dy):
            return 3 * ctx.saved_tensors[0] * dy

    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(AssertionError):
        testing.check_backward_formula(Square.apply, lambda x: x * x, (x,))
    testing.check_backward_formula(lambda x: x * x, lambda x: x * x, (x,))


@pytest.mark.parametrize("kept", [0.0, 0.25, 1.0])
def test_lost_share_measures_what_is_lost(kept):
    base, delta = torch.randn(2, 40, 30, dtype=torch.float64)
    assert lost_share(lambda: base + kept * delta, delta, base) == pytest.approx(1 - kept)


def test_a_rounded_sum_loses_a_small_update():
    base = torch.randn(512, 256, dtype=torch.bfloat16)
    delta = 1e-3 * torch.randn_like(base)
    lost = lost_share(lambda: base + delta, delta.double(), base.double())
    # base has no digits to spare for the update, so most of it falls to rounding
    assert lost > 0.3

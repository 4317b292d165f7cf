"""What only the C++ kernels of lora_linear promise: threads, memory, their own autograd node."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lorakern import backend
from lorakern.functional import lora_linear
from lorakern.ops.check import wide
from lorakern.ops.lora_linear import reference
from lorakern.testing import DTYPES, check_every_kernel, lost_share

native = torch.ops.lorakern_native
pytestmark = pytest.mark.skipif(
    not hasattr(native, "lora_linear_cpu"), reason="lorakern._native is not built"
)


def make(M, I, O, R, dtype=torch.float32):  # noqa: E741
    x, dy = torch.randn(M, I, dtype=dtype), torch.randn(M, O, dtype=dtype)
    weight, bias = torch.randn(O, I, dtype=dtype) / I**0.5, torch.randn(O, dtype=dtype)
    down, up = torch.randn(R, I, dtype=dtype) / I**0.5, torch.randn(O, R, dtype=dtype)
    return dy, x, weight, bias, down, up


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# more rows than threads take, a last tile of one row, two depths of pass (of pairs too), a narrow
# last panel
SHAPES = [(333, 70, 50, 5), (57, 2100, 33, 17), (15, 33, 2070, 129), (1, 8, 72, 16),
          (21, 40, 4130, 3)]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_right_on_any_number_of_threads(shape, dtype, count, threads):
    threads(count)
    dy, x, weight, bias, down, up = make(*shape, dtype)
    check_every_kernel("lora_linear_fwd", (x, weight, bias, down, up, 0.7, None), "cpp")
    h = reference.lora_linear_fwd(x, weight, bias, down, up, 0.7, None)[1]
    for gain in (None, (1 + bias / 5).to(wide(dtype))):
        args = (dy, x, h, weight, down, up, 0.7, gain, [True, True, True, gain is not None])
        check_every_kernel("lora_linear_bwd", args, "cpp")


@pytest.mark.parametrize("depth", [256, 320, 384, 640])
def test_a_long_sum_is_in_runs_as_short_as_those_of_plain_torch(depth):
    x, weight = torch.randn(77, depth), torch.randn(768, depth)
    down, up = torch.zeros(1, depth), torch.zeros(768, 1)
    exact = x.double() @ weight.double().mT
    got = native.lora_linear_fwd_cpu(x, weight, None, down, up, 1.0, None)[0]
    error, torch_error = ((y - exact).square().mean().sqrt() for y in (got, x @ weight.mT))
    # 1.4 passes the judge here, but not, for some inputs, in the largest error
    assert error <= 1.25 * torch_error


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("shape", [(1, 96, 512, 64), (129, 129, 33, 1024)], ids=str)
def test_neither_one_row_nor_a_long_update_sums_more_than_plain_torch_in_a_chain(shape, gains):
    dy, x, weight, bias, down, up = make(*shape)
    gain = 1 + bias / 5 if gains else None
    args, needs = (x, weight, None, down, up, 0.7, gain), [True, False, False, False]

    def both(args, dy, forward, backward):
        y, h = forward(*args)
        x, weight, _, *rest = args
        return y, backward(dy, x, h, weight, *rest, needs)[0]

    same = both(args, dy, reference.lora_linear_fwd, reference.lora_linear_bwd)
    exact = [t.double() if isinstance(t, torch.Tensor) else t for t in args]
    exact = both(exact, dy.double(), reference.lora_linear_fwd, reference.lora_linear_bwd)
    got = both(args, dy, native.lora_linear_fwd_cpu, native.lora_linear_bwd_cpu)
    for ours, torchs, truth in zip(got, same, exact, strict=True):
        error, torch_error = ((t - truth).square().mean().sqrt() for t in (ours, torchs))
        assert error <= 1.5 * torch_error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("more", [1e-3, 1e-2])
def test_a_gain_near_1_is_felt_in_every_gradient(more, dtype):
    dy, x, weight, _, down, up = make(4096, 320, 640, 16, dtype)
    gain, needs = torch.full((640,), 1 + more), [True, True, True, False]
    args = (dy, x, x @ down.mT, weight, down, up, 0.5)
    exact = [t.double() for t in args[:-1]]
    base = reference.lora_linear_bwd(*exact, 0.5, None, needs)
    want = reference.lora_linear_bwd(*exact, 0.5, gain.double(), needs)
    got = native.lora_linear_bwd_cpu(*args, gain, needs)
    # a factor's gradient has too few values for what is smaller than its rounding
    for i in range(3 if more == 1e-2 else 1):
        lost = lost_share(lambda g=got[i]: g, want[i] - base[i], base[i])
        assert abs(lost) < 0.02, f"gradient {i} loses {lost:.4f}"


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_any_choice_of_gradients(needs, dtype):
    dy, x, weight, bias, down, up = make(40, 21, 36, 6, dtype)
    args = (dy, x, x @ down.mT, weight, down, up, 0.5, bias.to(wide(dtype)))
    alone = native.lora_linear_bwd_cpu(*args, list(needs))
    together = native.lora_linear_bwd_cpu(*args, [True] * 4)
    for need, one, all_ in zip(needs, alone, together, strict=True):
        assert torch.equal(one, all_ if need else all_.new_empty(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_row_does_not_depend_on_its_batch(dtype):
    _, x, weight, bias, down, up = make(3000, 48, 40, 8, dtype)
    args = (weight, bias, down, up, 0.5, None)
    parts = [native.lora_linear_fwd_cpu(part, *args)[0] for part in x.split(77)]
    assert torch.equal(torch.cat(parts), native.lora_linear_fwd_cpu(x, *args)[0])


def test_no_temporary_the_size_of_an_activation():
    dy, x, weight, bias, down, up = make(8192, 64, 64, 4)
    activation = x.numel() * x.element_size()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        _, h = native.lora_linear_fwd_cpu(x, weight, bias, down, up, 1.0, None)
        native.lora_linear_bwd_cpu(dy, x, h, weight, down, up, 1.0, None, [True] * 4)
    sizes = [e.self_cpu_memory_usage for e in seen.events() if e.name == "aten::empty"]
    large = sorted(s for s in sizes if s >= activation / 2)
    assert large == [activation, activation], "only y and dx may be as large as an activation"


def grads(function, args):
    leaves = [a.detach().requires_grad_(a.requires_grad) for a in args[:-1]]
    function(*leaves, args[-1]).square().sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("trained", list(itertools.product([True, False], repeat=3)))
def test_the_native_node_gives_the_gradients_of_the_python_one(trained):
    _, x, weight, bias, down, up = make(10, 7, 9, 3)
    for tensor, train in zip((x, down, up), trained, strict=True):
        tensor.requires_grad_(train)
    if not any(trained):
        assert not lora_linear(x, weight, bias, down, up, 0.5).requires_grad
        return
    args = (x, weight, bias, down, up, 0.5)
    mine = grads(lora_linear, args)
    with backend.use("reference"):
        theirs = grads(lora_linear, args)
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def node_of(*args):
    return type(lora_linear(*args).grad_fn).__name__


def test_use_reaches_past_the_native_node():
    _, x, weight, bias, down, up = make(10, 7, 9, 3)
    args = (x, weight, bias, down.requires_grad_(), up, 0.5)
    whole = node_of(*args)
    for forced in ({"backend": "reference"}, {"lora_linear_bwd": "reference"}):
        with backend.use(**forced):
            assert node_of(*args) != whole
    assert node_of(*args) == whole


def test_a_second_derivative_is_refused():
    _, x, weight, bias, down, up = make(10, 7, 9, 3)
    y = lora_linear(x, weight, bias, down.requires_grad_(), up, 0.5)
    (ddown,) = torch.autograd.grad(y.square().sum(), down, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        ddown.sum().backward()


def test_saves_its_input_and_h_alone():
    _, x, weight, bias, down, up = make(10, 7, 9, 3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(x, weight, bias, down.requires_grad_(), up.requires_grad_(), 0.5)
    known = {t.data_ptr() for t in (x, weight, down, up)}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in known] == [(10, 3)]
    y.sum().backward()
    assert down.grad is not None and up.grad is not None


def test_strided_inputs_are_taken():
    _, x, weight, bias, down, up = make(10, 8, 9, 3)
    args = (x, weight, bias, down, up, 0.5)
    turned = tuple(
        a.T.contiguous().T if isinstance(a, torch.Tensor) and a.dim() == 2 else a for a in args
    )
    assert torch.equal(lora_linear(*args), lora_linear(*turned))


@pytest.mark.parametrize("gained", [False, True], ids=["", "gain"])
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_blocks_of_rows_beside_a_weight_of_odd_sides(dtype, needs, gained):
    """Neither blocks of rows nor panels are whole, of any factor, on torch's base product too."""
    dy, x, weight, bias, down, up = make(301, 701, 703, 37, dtype)
    gain = 0.5 + torch.rand(703, dtype=dtype) if gained else None
    args = (x, weight, bias if needs[0] else None, down, up, 0.7, gain)
    h = reference.lora_linear_fwd(*args)[1]
    check_every_kernel("lora_linear_fwd", args, "cpp")
    args = (dy, x, h, weight, down, up, 0.7, gain, [*needs, gained])
    check_every_kernel("lora_linear_bwd", args, "cpp")


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(70, 750, 704, 5), (32, 4100, 131, 3), (7, 131, 4103, 2)],
                         ids=str)  # fmt: skip
def test_few_rows_beside_a_large_weight(shape, dtype, needs):
    """A weight of over 2^19 values is not packed for them: the base product is made before."""
    dy, x, weight, bias, down, up = make(*shape, dtype)
    args = (x, weight, bias if needs[0] else None, down, up, 0.7, None)
    h = reference.lora_linear_fwd(*args)[1]
    check_every_kernel("lora_linear_fwd", args, "cpp")
    args = (dy, x, h, weight, down, up, 0.7, None, [*needs, False])
    check_every_kernel("lora_linear_bwd", args, "cpp")


@pytest.mark.parametrize("rows", [1, 2, 5, 32, 33])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_rows_on_any_number_of_threads(count, rows, threads):
    threads(count)
    dy, x, weight, bias, down, up = make(rows, 1031, 1033, 4)
    for scale in (0.0, 0.7):
        args = (x, weight, bias, down, up, scale, None)
        check_every_kernel("lora_linear_fwd", args, "cpp")
        h = reference.lora_linear_fwd(*args)[1]
        args = (dy, x, h, weight, down, up, scale, None, [True, True, True, False])
        check_every_kernel("lora_linear_bwd", args, "cpp")

"""lora_conv2d: every kernel, the derivative, opcheck, compile; geometry against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from lorakern import backend, functional
from lorakern.functional import lora_conv2d
from lorakern.ops.frozen_linear import op as frozen_linear
from lorakern.ops.lora_conv2d import concat, reference
from lorakern.testing import (
    DTYPES,
    assert_as_exact_as_torch,
    check_backward_formula,
    check_every_kernel,
    exactly,
    lost_share,
)

# B, I, H, W, O, R, (kh, kw), stride, padding, dilation, groups; odd sizes, size 1, R > I
SHAPES = [
    (2, 6, 9, 7, 5, 3, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 4, 11, 8, 10, 16, (3, 3), (2, 2), (1, 1), (1, 1), 2),
    (3, 8, 6, 5, 12, 2, (1, 1), (1, 1), (0, 0), (1, 1), 4),
    (1, 3, 13, 12, 2, 1, (2, 5), (2, 3), (0, 2), (3, 2), 1),
    (2, 1, 4, 3, 1, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
]
IDS = lambda case: "-".join(str(n) for n in case).replace(", ", "x")  # noqa: E731


def inputs(shape, dtype, device="cpu", bias=True):
    batch, in_c, high, wide, out_c, rank, kernel, stride, padding, dilation, groups = shape
    per_group = in_c // groups

    def make(*sizes, grad=False):
        return torch.randn(sizes, dtype=dtype, device=device).requires_grad_(grad)

    return (
        make(batch, in_c, high, wide, grad=True),
        make(out_c, per_group, *kernel),
        make(out_c) if bias else None,
        make(rank, per_group, *kernel, grad=True),
        make(out_c, rank, 1, 1, grad=True),
        0.7,
        [*stride],
        [*padding],
        [*dilation],
        groups,
    )


def detached(args):
    return tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_matches_reference(shape, dtype, device):
    for bias in (True, False):
        args = detached(inputs(shape, dtype, device, bias))
        check_every_kernel("lora_conv2d_fwd", args)
    x, weight, _, down, up, *rest = args
    y, h = functional_fwd(*args)
    check_every_kernel(
        "lora_conv2d_bwd",
        (torch.randn_like(y), x, h, weight, down, up, *rest, [True, True, True]),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 5)], ids=str)
def test_one_convolution_of_more_channels(kernel, dtype, device, monkeypatch):
    """`concat` on CPUs too, whose 16-bit convolutions it refuses for their speed."""
    padding, dilation = [k - 1 for k in kernel], (2, 2)
    shape = (2, 24, 19, 13, 40, 5, kernel, (1, 1), padding, dilation, 1)
    x, weight, _, down, up, *rest = args = detached(inputs(shape, dtype, device))
    results = concat.lora_conv2d_fwd(*args)
    backward = (torch.randn_like(results[0]), x, results[1], weight, down, up, *rest)
    backward = (*backward, [True, True, True])
    for function, given in (("lora_conv2d_fwd", args), ("lora_conv2d_bwd", backward)):
        spec, mine = getattr(reference, function), getattr(concat, function)
        for got, exact, same in zip(mine(*given), exactly(spec, *given), spec(*given), strict=True):
            assert_as_exact_as_torch(function, got, exact, same)


def test_concat_is_for_16_bit_and_pixels_that_stay():
    x, *rest = detached(inputs(SHAPES[0], torch.bfloat16))
    far = x.to("meta")
    assert concat.refuse_fwd(far, *rest) is None
    assert "float32" in concat.refuse_fwd(far.float(), *rest)
    assert "pixels of h" in concat.refuse_fwd(far, *rest[:5], [2, 2], *rest[6:])
    assert "pixels of h" in concat.refuse_fwd(far, *rest[:6], [0, 1], *rest[7:])
    assert "groups" in concat.refuse_bwd(far, *rest[:-1], 2, [True] * 3)
    assert concat.refuse_bwd(far, *rest, [True] * 3) is None


FEW_PIXELS = [
    (2, 129, 4, 3, 515, 4, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (1, 131, 5, 8, 1001, 3, (3, 2), (2, 3), (1, 0), (1, 2), 1),
    (3, 1025, 2, 1, 769, 16, (1, 1), (1, 1), (0, 0), (1, 1), 1),
]


@pytest.mark.skipif(
    not hasattr(torch.ops.lorakern_native, "lora_linear_cpu"), reason="_native is not built"
)
@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("shape", FEW_PIXELS, ids=IDS)
def test_few_pixels_beside_a_large_weight(shape, needs, monkeypatch):
    """`columns` on every machine, also where MKL is at its best."""
    monkeypatch.setattr(frozen_linear, "_mkl_is_best", lambda: False)
    x, weight, bias, down, up, *rest = detached(inputs(shape, torch.float32))
    # a sum of more terms than torch's own chunks
    weight = weight / weight[0].numel() ** 0.5
    for b in (bias, None):
        check_every_kernel("lora_conv2d_fwd", (x, weight, b, down, up, *rest), "columns")
    y, h = reference.lora_conv2d_fwd(x, weight, bias, down, up, *rest)
    args = (torch.randn_like(y), x, h, weight, down, up, *rest, [bool(n) for n in needs])
    check_every_kernel("lora_conv2d_bwd", args, "columns")


def test_columns_is_for_few_pixels_of_one_group(monkeypatch):
    monkeypatch.setattr(frozen_linear, "_mkl_is_best", lambda: False)
    x, *rest = detached(inputs(FEW_PIXELS[0], torch.float32))

    def says(x, *rest):
        return backend.why("lora_conv2d_fwd", x, *rest)["columns"]

    assert "34 rows" in says(torch.randn(1, 129, 19, 4), *rest)
    assert "groups" in says(x, *rest[:-1], 3)
    assert "float64" in says(x.double(), rest[0].double(), *rest[1:])


def functional_fwd(*args):
    return backend.OPS["lora_conv2d_fwd"](*args)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_backward_is_the_derivative(shape):
    check_backward_formula(lora_conv2d, reference.lora_conv2d_fwd, inputs(shape, torch.float64))


@pytest.mark.parametrize("needs", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 0)], ids=str)
def test_only_what_is_asked_gets_a_gradient(needs):
    args = inputs(SHAPES[1], torch.float64)
    want = dict(zip((0, 3, 4), needs, strict=True))
    full = inputs_like(args)
    lora_conv2d(*full).square().sum().backward()
    some = inputs_like(args)
    for i, need in want.items():
        some[i].requires_grad_(bool(need))
    lora_conv2d(*some).square().sum().backward()
    for i, need in want.items():
        if need:
            torch.testing.assert_close(some[i].grad, full[i].grad)
        else:
            assert some[i].grad is None


def inputs_like(args):
    return tuple(
        a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a
        for a in args
    )


def test_saves_x_and_h_only():
    args = inputs(SHAPES[0], torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_conv2d(*args)
    given = {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
    extra = [t for t in saved if t.data_ptr() not in given]
    # h: 2 images, rank 3, 9 x 7 pixels
    assert [tuple(t.shape) for t in extra] == [(2, 3, 9, 7)]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 0)], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 5)], ids=str)
def test_padding_is_conv2ds(padding, kernel):
    shape = (2, 4, 9, 8, 6, 3, kernel, (1, 1), (0, 0), (2, 1), 2)
    x, weight, bias, down, up, scale, *_ = detached(inputs(shape, torch.float64))
    delta = (up.flatten(1) @ down.flatten(1)).view_as(weight)
    want = F.conv2d(x, weight + scale * delta, bias, 1, padding, (2, 1), 2)
    got = lora_conv2d(x, weight, bias, down, up, scale, 1, padding, (2, 1), 2)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        lora_conv2d(x[0], weight, bias, down, up, scale, 1, padding, (2, 1), 2), want[0]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
def test_a_small_update_is_not_lost(dtype, size):
    x, weight, bias, down, up, _, *window = detached(
        inputs((16, 8, 64, 64, 96, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1), dtype)
    )
    # 6 M outputs: the rounding of the base averages out to 0.6 % of the smallest update
    exact = [t.double() for t in (x, weight, bias, down, up)]
    delta = (exact[4].flatten(1) @ exact[3].flatten(1)).view_as(weight)
    scale = size * (exact[1].norm() / delta.norm()).item()
    stride, padding, dilation, groups = window
    base = F.conv2d(exact[0], exact[1], exact[2], stride, padding, dilation, groups)
    delta_y = F.conv2d(exact[0], scale * delta, None, stride, padding, dilation, groups)
    for run in (lora_conv2d, lambda *args: concat.lora_conv2d_fwd(*args)[0]):
        y = run(x, weight, bias, down, up, scale, *window)
        assert abs(lost_share(lambda y=y: y, delta_y, base)) < 0.02


@pytest.mark.parametrize("shape", [SHAPES[0], FEW_PIXELS[0]], ids=IDS)
def test_channels_last_stays(shape, monkeypatch):
    monkeypatch.setattr(frozen_linear, "_mkl_is_best", lambda: False)
    args = inputs(shape, torch.float32)
    x = args[0].detach().to(memory_format=torch.channels_last)
    weight = args[1].to(memory_format=torch.channels_last)
    y = lora_conv2d(x, weight, *args[2:])
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = [a.double() if isinstance(a, torch.Tensor) else a for a in detached(args)]
    assert_as_exact_as_torch(
        "channels last",
        y,
        reference.lora_conv2d_fwd(*exact)[0],
        reference.lora_conv2d_fwd(*detached(args))[0],
    )


def test_opcheck():
    args = detached(inputs(SHAPES[1], torch.float32))
    scale = torch.tensor(0.7, dtype=torch.float64)
    args = (*args[:5], scale, *args[6:])
    torch.library.opcheck(torch.ops.lorakern.lora_conv2d_fwd.default, args)
    y, h = torch.ops.lorakern.lora_conv2d_fwd.default(*args)
    x, weight, _, down, up, *rest = args
    backward = (torch.randn_like(y), x, h, weight, down, up, *rest, [True, True, True])
    torch.library.opcheck(torch.ops.lorakern.lora_conv2d_bwd.default, backward)


def test_compiles_whole_and_a_new_scale_recompiles_nothing():
    args = inputs(SHAPES[1], torch.float32)
    counter = CompileCounter()
    run = torch.compile(
        lambda scale: lora_conv2d(*args[:5], scale, *args[6:]), backend=counter, fullgraph=True
    )
    for value in (0.7, 0.3, -1.5):
        got = run(torch.tensor(value, dtype=torch.float64))
        torch.testing.assert_close(got, lora_conv2d(*args[:5], value, *args[6:]))
    assert counter.frame_count == 1


def test_compiled_gradients():
    args = inputs(SHAPES[1], torch.float32)
    plain, compiled = inputs_like(args), inputs_like(args)
    lora_conv2d(*plain).square().sum().backward()
    torch.compile(lora_conv2d, backend="aot_eager", fullgraph=True)(
        *compiled
    ).square().sum().backward()
    for i in (0, 3, 4):
        torch.testing.assert_close(compiled[i].grad, plain[i].grad)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({0: torch.zeros(2, 5, 9, 7)}, r"want x \[B, 6, H, W\] for groups=1, got \[2, 5, 9, 7\]"),
        ({0: torch.zeros(6, 7)}, r"got \[6, 7\]"),
        ({3: torch.zeros(3, 6, 1, 1)}, r"want down \[3, 6, 3, 3\], got \[3, 6, 1, 1\]"),
        ({4: torch.zeros(5, 2, 1, 1)}, r"want up \[5, 3, 1, 1\], got \[5, 2, 1, 1\]"),
        ({4: torch.zeros(5, 3, 1, 1).half()}, "mixed dtypes.*float16"),
        ({0: torch.zeros(2, 6, 9, 7, device="meta")}, "mixed devices.*meta"),
        ({2: torch.zeros(4)}, r"want bias \[5\], got \[4\]"),
        ({1: torch.zeros(5, 6, 3, 3, requires_grad=True)}, "frozen"),
        ({7: "around"}, "padding is pixels.*'around'"),
        ({6: [2, 2], 7: "same"}, "with stride 1"),
    ],
    ids=lambda c: c if isinstance(c, str) else None,
)  # fmt: skip
def test_errors_say_what_came(change, says):
    args = list(inputs(SHAPES[0], torch.float32))
    for i, value in change.items():
        args[i] = value
    with pytest.raises(ValueError, match=says):
        functional.lora_conv2d(*args)

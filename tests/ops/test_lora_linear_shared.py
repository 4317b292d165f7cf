"""lora_linear_shared: kernels, the derivative, compile, what is saved; nothing small is lost."""

import importlib

import pytest
import torch
from linear_ops import check_compiles_once, name
from torch.utils.checkpoint import checkpoint

from lorakern import backend
from lorakern.functional import lora_linear, lora_linear_shared
from lorakern.ops.lora_linear_shared import reference
from lorakern.testing import DTYPES, check_every_kernel, lost_share, tensors

# the module; the package's own name for it is the function
op = importlib.import_module("lorakern.ops.lora_linear_shared.op")

# leading dims of x, I, and O, R of each layer. Odd sizes reach every mask.
SHAPES = [
    ((2, 77), 96, [(40, 4), (40, 4)]),  # k and v of text tokens
    ((63,), 33, [(65, 3), (17, 5), (31, 2)]),
    ((1, 1), 16, [(24, 5), (8, 20)]),
    ((5, 2, 7), 8, [(40, 16), (40, 16), (40, 16)]),
    ((3, 43), 129, [(33, 128), (96, 1)]),
    ((130,), 72, [(80, 17), (80, 17), (30, 17)]),
    ((9, 4), 40, [(24, 1)]),
    ((150,), 48, [(32, 16), (64, 32), (96, 8), (2, 2)]),
    ((150,), 261, [(700, 20), (610, 4)]),  # weights that the CPU leaves to torch
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=name)


def inputs(shape, dtype, device="cpu", bias=(True, False), scale=0.7):
    """The arguments, with outputs of about 1; x, downs and ups ask for gradients."""
    lead, columns, sizes = shape

    def make(*dims, std=1.0):
        return (std * torch.randn(dims, dtype=torch.float64)).to(device, dtype)

    def factor(*dims):
        return make(*dims, std=dims[1] ** -0.5).requires_grad_()

    return (
        make(*lead, columns).requires_grad_(),
        [make(out, columns, std=columns**-0.5) for out, _ in sizes],
        [make(out) if bias[i % len(bias)] else None for i, (out, _) in enumerate(sizes)],
        [factor(rank, columns) for _, rank in sizes],
        [factor(out, rank) for out, rank in sizes],
        [scale / (1 + i) for i in range(len(sizes))],
    )


def detached(args):
    return backend.on_tensors(torch.Tensor.detach, args)


def leaves(args):
    return [args[0], *args[3], *args[4]]


def backward_inputs(args, needs=None):
    x, weights, _, downs, ups, scales = args = detached(args)
    _, h = reference.lora_linear_shared_fwd(*args)
    dys = [torch.randn(*x.shape[:-1], len(w), dtype=x.dtype, device=x.device) for w in weights]
    needs = needs or [True] * (1 + 2 * len(weights))
    return x, h, dys, weights, downs, ups, scales, needs


def apart(args):
    """The same by one call of lora_linear a layer."""
    return [lora_linear(args[0], *layer) for layer in zip(*args[1:], strict=True)]


@dtypes
@shapes
def test_every_kernel_matches(shape, dtype, device):
    for bias in ((True, False), (False,)):
        args = inputs(shape, dtype, device, bias)
        check_every_kernel("lora_linear_shared_fwd", detached(args))


@dtypes
@shapes
def test_every_backward_kernel_matches(shape, dtype, device):
    args = inputs(shape, dtype, device)
    check_every_kernel("lora_linear_shared_bwd", backward_inputs(args))


# of dx, then two downs, then two ups
NEEDS = [
    (True, False, False, False, False), (False, True, True, True, True),
    (False, False, False, True, True), (True, False, False, True, False),
    (True, False, True, True, False), (False, False, True, False, False),
    (False, False, False, False, True), (True, True, False, False, True),
]  # fmt: skip


@dtypes
@pytest.mark.parametrize("needs", NEEDS, ids=name)
def test_every_backward_kernel_computes_what_is_wanted(needs, dtype, device):
    args = inputs(((21,), 24, [(16, 3), (34, 5)]), dtype, device)
    check_every_kernel("lora_linear_shared_bwd", backward_inputs(args, [*needs]))


@dtypes
def test_no_rows(dtype, device):
    args = inputs(((0, 3), 16, [(24, 2), (8, 3)]), dtype, device)
    check_every_kernel("lora_linear_shared_fwd", detached(args))
    check_every_kernel("lora_linear_shared_bwd", backward_inputs(args))
    ys = lora_linear_shared(*args)
    assert [tuple(y.shape) for y in ys] == [(0, 3, 24), (0, 3, 8)]
    for grad, leaf in zip(torch.autograd.grad(ys, leaves(args), ys), leaves(args), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("kernel", [None, "reference"])
@shapes
def test_backward_is_the_derivative(shape, kernel):
    args = inputs(shape, torch.float64)
    x, weights, biases, downs, ups, scales = args
    with backend.use(kernel):
        ys = lora_linear_shared(*args)
        dys = [torch.randn_like(y) for y in ys]
        got = torch.autograd.grad(ys, leaves(args), dys)
    # autograd of the spec's forward
    flat, _ = reference.lora_linear_shared_fwd(x, weights, biases, downs, ups, scales)
    want = torch.autograd.grad(flat, leaves(args), torch.cat([dy.flatten() for dy in dys]))
    for a, b in zip((*ys, *got), (*flat.split([y.numel() for y in ys]), *want), strict=True):
        torch.testing.assert_close(a, b.view(a.shape), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel", [None, "reference"])
def test_gradcheck(kernel):
    args = inputs(((3,), 4, [(5, 2), (2, 1)]), torch.float64)
    _, weights, biases, *_, scales = args

    def function(x, *factors):
        return tuple(lora_linear_shared(x, weights, biases, factors[:2], factors[2:], scales))

    with backend.use(kernel):
        assert torch.autograd.gradcheck(function, leaves(args))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name)
def test_outputs_and_gradients_are_those_of_the_layers_apart(dtype, device):
    args = inputs(((70,), 48, [(64, 16), (33, 3), (64, 16)]), dtype, device)
    together, alone = lora_linear_shared(*args), apart(args)
    dys = [torch.randn_like(y) for y in alone]
    got = torch.autograd.grad(together, leaves(args), dys)
    want = torch.autograd.grad(alone, leaves(args), dys)
    for a, b in zip((*together, *got), (*alone, *want), strict=True):
        torch.testing.assert_close(a, b)


def small_updates(dtype, device, ratio, rows=4096, columns=80, widths=(640, 320)):
    """Arguments with |scale·up down| = ratio·|weight| of each layer, and each exact ΔW."""
    x, weights, _, downs, ups, scales = detached(
        inputs(((rows,), columns, [(out, 16) for out in widths]), dtype, device)
    )
    deltas = []
    for i, (weight, down, up, scale) in enumerate(zip(weights, downs, ups, scales, strict=True)):
        delta = scale * up.double() @ down.double()
        ups[i] = (up.double() * (ratio * weight.double().norm() / delta.norm())).to(dtype)
        deltas.append(scale * ups[i].double() @ down.double())
    return (x, weights, [None] * len(widths), downs, ups, scales), deltas


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
@pytest.mark.parametrize("ratio", [1e-4, 1e-3, 1e-2, 1e-1])
def test_no_kernel_loses_a_small_update(ratio, dtype, device):
    # the rounding of a result is noise in this measure
    wide = (2560, 2560) if dtype == torch.bfloat16 else (160, 160)
    args, deltas = small_updates(dtype, device, ratio, widths=wide)
    x, weights = args[:2]
    found = backend.why("lora_linear_shared_fwd", *args)
    for kernel in (k for k, reason in found.items() if reason == "ok"):
        y, _ = backend.OPS["lora_linear_shared_fwd"].load(kernel)(*args)
        for part, weight, delta in zip(y.view(2, 4096, -1), weights, deltas, strict=True):
            exact, base = x.double() @ delta.mT, x.double() @ weight.double().mT
            lost = lost_share(lambda part=part: part, exact, base)
            assert abs(lost) < 0.02, f"{kernel} loses {lost:.4f} of an output"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
@pytest.mark.parametrize("ratio", [1e-4, 1e-3, 1e-2, 1e-1])
def test_no_kernel_loses_a_small_update_of_dx(ratio, dtype, device):
    columns = 2560 if dtype == torch.bfloat16 else 160
    args, deltas = small_updates(dtype, device, ratio, columns=columns, widths=(80, 40))
    given = backward_inputs(args, [True] + [False] * 4)
    dys, weights = given[2:4]
    exact = sum(dy.double() @ delta for dy, delta in zip(dys, deltas, strict=True))
    base = sum(dy.double() @ weight.double() for dy, weight in zip(dys, weights, strict=True))
    for kernel, reason in backend.why("lora_linear_shared_bwd", *given).items():
        if reason == "ok":
            run = backend.OPS["lora_linear_shared_bwd"].load(kernel)
            lost = lost_share(lambda run=run: run(*given)[0], exact, base)
            assert abs(lost) < 0.02, f"{kernel} loses {lost:.4f} of dx"


def test_opcheck(device):
    for layout in ("contiguous", "permuted"):
        args = inputs(((4, 6), 16, [(24, 3), (10, 2)]), torch.float32, device)
        x, weights, biases, downs, ups, _ = detached(args)
        scales = [torch.tensor(s, dtype=torch.float64) for s in (0.7, 0.3)]
        if layout == "permuted":
            x, downs = x.transpose(0, 1), [down.t().contiguous().t() for down in downs]
        given = x, weights, biases, downs, ups, scales
        torch.library.opcheck(op._fwd.torch_op, given)
        for needs in ([True] * 5, [False, True, False, False, True]):
            backward = *backward_inputs(given, needs)[:6], scales, needs
            torch.library.opcheck(op._bwd.torch_op, backward)


def test_compiled_is_one_op_a_direction_and_a_new_scale_recompiles_nothing(device):
    x, *rest, _ = inputs(((2, 5), 12, [(20, 3), (8, 2)]), torch.float32, device)

    def function(x, scale):
        scales = [scale, scale] if isinstance(scale, float) else [scale, scale.clone()]
        return torch.cat(lora_linear_shared(x, *rest, scales), -1)

    check_compiles_once(function, "lora_linear_shared", (x, 0.5), 1)


def test_only_the_wanted_gradients_come(device):
    whole = inputs(((6,), 10, [(14, 2), (7, 3)]), torch.float32, device)
    want = torch.autograd.grad([y.sum() for y in lora_linear_shared(*whole)], leaves(whole))
    for kernel in (None, "reference"):
        for needs in [*NEEDS, (True,) * 5]:
            args = detached(whole)
            for leaf, need in zip(leaves(args), needs, strict=True):
                leaf.requires_grad_(need)
            with backend.use(kernel):
                sum(y.sum() for y in lora_linear_shared(*args)).backward()
            for leaf, need, grad in zip(leaves(args), needs, want, strict=True):
                assert (leaf.grad is not None) == need
                if need:
                    torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("kernel", [None, "reference"])
def test_a_layer_that_reached_no_loss_gets_no_gradient(kernel, device):
    args = inputs(((6,), 10, [(14, 2), (7, 3), (9, 4)]), torch.float32, device)
    with backend.use(kernel):
        ys = lora_linear_shared(*args)
        (ys[0].sum() + ys[2].square().sum()).backward()
    got = [leaf.grad for leaf in leaves(args)]
    want_y = apart(args)
    used = [0, 1, 3, 4, 6]
    want = torch.autograd.grad(
        want_y[0].sum() + want_y[2].square().sum(), [leaves(args)[i] for i in used]
    )
    assert [i for i, grad in enumerate(got) if grad is not None] == used
    for i, grad in zip(used, want, strict=True):
        torch.testing.assert_close(got[i], grad)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointed(reentrant, device):
    args = inputs(((4, 9), 32, [(48, 5), (16, 3)]), torch.float32, device)
    _, weights, biases, *_, scales = args

    def loss(x, *factors):
        ys = lora_linear_shared(x, weights, biases, factors[:2], factors[2:], scales)
        return sum(y.square().sum() for y in ys)

    want = torch.autograd.grad(loss(*leaves(args)), leaves(args))
    checkpoint(loss, *leaves(args), use_reentrant=reentrant).backward()
    for leaf, grad in zip(leaves(args), want, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_strides_of_x_and_dy_do_not_matter(device):
    args = inputs(((6, 4), 10, [(14, 2), (5, 3)]), torch.float32, device)
    x = args[0].detach().transpose(0, 1).requires_grad_()
    straight = x.detach().contiguous().requires_grad_()
    ys, want = (lora_linear_shared(t, *args[1:]) for t in (x, straight))
    dys = [torch.randn_like(y) for y in ys]
    torch.autograd.backward(ys, [dy.mT.contiguous().mT for dy in dys])
    torch.autograd.backward(want, dys)
    for a, b in zip((*ys, x.grad), (*want, straight.grad), strict=True):
        assert torch.equal(a, b)


def test_an_output_may_be_changed_in_place(device):
    """None shares memory or a version with another, which an attention may keep for backward."""
    args = inputs(((6, 4), 10, [(14, 2), (14, 3)]), torch.float32, device)
    for kernel in (None, "reference"):
        with backend.use(kernel):
            q, k = lora_linear_shared(*args)
            loss = (q * k).sum()
            other = q.clone()
            q, k = lora_linear_shared(*args)
            kept = k.square()
            q.mul_(2)
            (kept.sum() + q.sum()).backward()
        assert torch.equal(q, 2 * other) and loss.isfinite()
        assert len({t.untyped_storage().data_ptr() for t in (q, k)}) == 2


@pytest.mark.parametrize("kernel", [None, "reference"])
@dtypes
def test_saved_for_backward_is_x_once_and_h(kernel, dtype, device):
    args = inputs(((4, 9), 32, [(48, 5), (16, 3), (48, 5)]), dtype, device)
    known = {t.data_ptr() for t in tensors(args)}
    new, seen = [], []

    def pack(tensor):
        seen.append(tensor.data_ptr())
        if tensor.data_ptr() not in known:
            new.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), backend.use(kernel):
        lora_linear_shared(*args)
    assert new == [(4, 9, 13)] and seen.count(args[0].data_ptr()) == 1


@pytest.mark.parametrize("kernel", [None, "reference"])
def test_frozen_downs_keep_no_x(kernel, device):
    args = inputs(((4, 9), 32, [(48, 5), (16, 3)]), torch.float32, device)
    wanted = [args[0], *args[4]]
    want = torch.autograd.grad([y.sum() for y in lora_linear_shared(*args)], wanted)
    for down in args[3]:
        down.requires_grad_(False)
    saved = []

    def pack(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), backend.use(kernel):
        ys = lora_linear_shared(*args)
    with backend.use(kernel):
        got = torch.autograd.grad([y.sum() for y in ys], wanted)
    assert saved and args[0].data_ptr() not in saved
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


WRONG = {
    "want one of each for at least one layer, got 0 weights": lambda a: [a[0], *[[]] * 5],
    "got 2 weights, 2 biases, 1 downs": lambda a: [*a[:3], a[3][:1], *a[4:]],
    r"layer 0: want x \[..., 10\]": lambda a: [torch.zeros(3, 11), *a[1:]],
    r"layer 1: want down \[3, 10\], got \[3, 9\]": (
        lambda a: [*a[:3], [a[3][0], torch.zeros(3, 9)], *a[4:]]
    ),
    r"layer 0: want up \[14, 2\], got \[14, 3\]": (
        lambda a: [*a[:4], [torch.zeros(14, 3), a[4][1]], a[5]]
    ),
    "layer 0: mixed dtypes": lambda a: [a[0].half(), *a[1:]],
    "layer 1: mixed devices": lambda a: [a[0], [a[1][0], a[1][1].to("meta")], *a[2:]],
    r"layer 0: want bias \[14\]": lambda a: [*a[:2], [torch.zeros(13), None], *a[3:]],
    "layer 1: weight and bias are frozen": (
        lambda a: [a[0], [a[1][0], a[1][1].requires_grad_()], *a[2:]]
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_input_is_named(message):
    args = detached(inputs(((3,), 10, [(14, 2), (7, 3)]), torch.float32))
    with pytest.raises(ValueError, match=message):
        lora_linear_shared(*WRONG[message](args))

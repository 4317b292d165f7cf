"""decoupled_attention: every kernel, the derivative, compile; one softmax a group and no other."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd

from lorakern import backend
from lorakern.functional import decoupled_attention
from lorakern.ops.decoupled_attention import reference
from lorakern.testing import (
    DTYPES,
    assert_as_exact_as_torch,
    check_backward_formula,
    check_every_kernel,
    lost_share,
)

# the module; the package's own name for it is the function
op = importlib.import_module("lorakern.ops.decoupled_attention.op")

# B, Q, heads, d, keys of each group (the text first), image groups with a mask
SHAPES = [
    (2, 33, 2, 40, (77, 4), ()),  # SD 1.5's first level: text and one image of 4 tokens
    (1, 70, 3, 64, (77, 16, 4), (0,)),
    (2, 19, 1, 80, (5, 4, 4, 4), (0, 1, 2)),  # three masked images
    (1, 34, 1, 160, (77, 257), ()),  # all patches of an image: over the keys kept on chip
    (3, 7, 2, 5, (3, 1), (0,)),
    (1, 1, 1, 1, (1, 1), ()),
    (2, 5, 4, 12, (130,), ()),  # no image at all
    (1, 65, 1, 96, (9, 33), ()),
    (1, 17, 2, 128, (16, 8), (0,)),
    # in bfloat16 a tile has 16 queries, 32 tokens, 32 channels: a block of one tile, groups of odd
    # sizes side by side, odd channels
    (1, 16, 2, 33, (31, 1, 17), (1,)),
    (2, 49, 1, 7, (1, 33), ()),
]


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """It takes minutes: test_decoupled_attention_triton.py has shapes for it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def name(value):
    return str(value).removeprefix("torch.").replace(" ", "")


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=name)


def inputs(shape, dtype, device="cpu"):
    """The arguments of the forward kernel; q, keys and values ask for gradients."""
    images, queries, heads, d, tokens, masked = shape

    def make(*sizes):
        return torch.randn(sizes, dtype=torch.float64).to(device, dtype)

    q = make(images, queries, heads * d).requires_grad_()
    keys, values = (
        [make(images, count, heads * d).requires_grad_() for count in tokens] for _ in range(2)
    )
    scales = [0.8 - 0.3 * j for j in range(len(tokens) - 1)]
    # one mask for all images, and one for each, by turns
    masks = [
        make(images if j % 2 else 1, queries).abs() if j in masked else None
        for j in range(len(tokens) - 1)
    ]
    return q, keys, values, scales, masks, heads


def detached(args):
    return backend.on_tensors(torch.Tensor.detach, args)


def backward_inputs(args, needs=None):
    args = detached(args)
    return torch.randn_like(args[0]), *args, needs or [True] * (1 + len(args[1]))


def call(q, keys, values, scales, masks, heads):
    return decoupled_attention(q, keys, values, scales, masks, heads=heads)


def leaves(args):
    return [args[0], *args[1], *args[2]]


@dtypes
@shapes
def test_every_kernel_matches(shape, dtype, device):
    check_every_kernel("decoupled_attention_fwd", detached(inputs(shape, dtype, device)))


@dtypes
@shapes
def test_every_backward_kernel_matches(shape, dtype, device):
    check_every_kernel("decoupled_attention_bwd", backward_inputs(inputs(shape, dtype, device)))


@dtypes
@pytest.mark.parametrize("needs", [(1, 0, 1, 1), (0, 0, 0, 1), (1, 0, 0, 0), (0, 1, 0, 1)])
def test_every_backward_kernel_computes_what_is_wanted(needs, dtype, device):
    args = inputs((2, 37, 2, 16, (7, 4, 3), (1,)), dtype, device)
    check_every_kernel("decoupled_attention_bwd", backward_inputs(args, [bool(n) for n in needs]))


@dtypes
@pytest.mark.parametrize("empty", [(0, 3), (2, 0)], ids=["no images", "no queries"])
def test_nothing_to_do(empty, dtype, device):
    args = inputs((*empty, 2, 8, (5, 4), ()), dtype, device)
    check_every_kernel("decoupled_attention_fwd", detached(args))
    check_every_kernel("decoupled_attention_bwd", backward_inputs(args))


@shapes
def test_backward_is_the_derivative(shape):
    check_backward_formula(call, reference.decoupled_attention_fwd, inputs(shape, torch.float64))


def test_gradients_are_finite_differences():
    *args, heads = inputs((1, 3, 2, 3, (4, 2, 1), (0,)), torch.float64)
    q, keys, values, scales, masks = args

    def flat(q, *kv):
        return decoupled_attention(q, kv[:3], kv[3:], scales, masks, heads=heads)

    assert torch.autograd.gradcheck(flat, (q, *keys, *values))


@st.composite
def problems(draw):
    groups = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    masked = draw(st.sets(st.integers(0, 3)))
    sizes = [draw(st.integers(1, most)) for most in (2, 40, 3, 20)]
    return (*sizes, tuple(groups), tuple(masked))


@settings(max_examples=40)
@given(shape=problems(), dtype=st.sampled_from(DTYPES), wanted=st.integers(0, 31))
def test_any_groups(shape, dtype, wanted):
    torch.manual_seed(0)
    args = inputs(shape, dtype)
    needs = [bool(wanted >> j & 1) for j in range(1 + len(args[1]))]
    with backend.use("cpp" if "cpp" in able(args) else "reference"):
        got, dkv = call(*detached(args)), op._bwd(*backward_inputs(args, needs))
    forward = reference.decoupled_attention_fwd
    exact = forward(*backend.on_tensors(torch.Tensor.double, detached(args)))
    same = forward(*detached(args))
    # the largest of few errors of torch is luck
    if dtype != torch.float64 and exact.numel() >= 256:
        assert_as_exact_as_torch("out", got, exact, same)
    torch.testing.assert_close(got.double(), exact, rtol=0.05, atol=0.05)
    rows = sum(t * shape[0] for t, need in zip(shape[4], needs[1:], strict=True) if need)
    assert [g.numel() > 0 for g in dkv] == [needs[0], rows > 0, rows > 0]
    assert dkv[1].shape == dkv[2].shape == (rows, args[0].shape[-1])


def able(args):
    return [k for k, ok in backend.why("decoupled_attention_fwd", *args).items() if ok == "ok"]


@dtypes
def test_one_softmax_over_all_keys_is_not_right(dtype):
    """What one call of a fused attention would compute fails the judge at once."""
    q, keys, values, _, _, heads = detached(inputs((2, 33, 2, 40, (77, 4), ()), dtype))
    exact, same = (
        reference.decoupled_attention_fwd(
            q.to(t), [k.to(t) for k in keys], [v.to(t) for v in values], [1.0], [None], heads
        )
        for t in (torch.float64, dtype)
    )
    one = [torch.cat(x, 1) for x in (keys, values)]
    concatenated = reference.decoupled_attention_fwd(q, one[:1], one[1:], [], [], heads)
    if dtype != torch.float64:
        assert_as_exact_as_torch("two", same, exact, same)
    with pytest.raises(AssertionError, match="one: max error"):
        assert_as_exact_as_torch("one", concatenated, exact, same)


@dtypes
def test_a_group_of_one_key_is_its_value(dtype, device):
    q, keys, values, _, _, heads = detached(inputs((2, 9, 2, 8, (1,), ()), dtype, device))
    out = decoupled_attention(q, keys, values, [], heads=heads)
    assert torch.equal(out, values[0].expand_as(q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name)
def test_large_scores_do_not_overflow(dtype, device):
    args = detached(inputs((1, 40, 2, 16, (20, 4), ()), dtype, device))
    q, keys = args[0] * 40, [40 * k for k in args[1]]
    for kernel in able(args):
        out = backend.OPS["decoupled_attention_fwd"].load(kernel)(q, keys, *args[2:])
        assert out.isfinite().all(), kernel


def two_calls(q, keys, values, scales, masks, heads):
    """Two fused attentions, the second added to an output that was rounded."""
    parts = [
        F.scaled_dot_product_attention(*(reference.split(t, heads) for t in (q, k, v)))
        for k, v in zip(keys, values, strict=True)
    ]
    return reference.join(parts[0]) + scales[0] * reference.join(parts[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_no_kernel_loses_a_small_image_share(dtype, device):
    scale = 3e-4 if dtype == torch.float16 else 2e-3
    q, keys, values, _, masks, heads = inputs((1, 1024, 2, 64, (2, 4), ()), dtype, device)
    args = detached((q, keys, values, [scale], masks, heads))
    wide = backend.on_tensors(torch.Tensor.double, args)
    both = reference.decoupled_attention_fwd(*wide)
    text = reference.decoupled_attention_fwd(wide[0], wide[1][:1], wide[2][:1], [], [], heads)
    for kernel in able(args):
        run = backend.OPS["decoupled_attention_fwd"].load(kernel)
        lost = lost_share(lambda run=run: run(*args), both - text, text)
        assert abs(lost) < 0.03, f"{kernel} loses {lost:.4f}"


def test_a_kernel_refuses_in_words(device):
    args = inputs((1, 4, 1, 8, (3, 2), ()), torch.float32, "meta")
    assert "q is on meta" in backend.why("decoupled_attention_fwd", *args)["cpp"]
    back = backend.why("decoupled_attention_bwd", *backward_inputs(args))
    assert "q is on meta" in back["cpp"]


def as_tensors(scales):
    return [torch.tensor(c, dtype=torch.float64) for c in scales]


def test_opcheck(device):
    q, *rest = detached(inputs((2, 6, 2, 8, (5, 4, 3), (1,)), torch.float32, device))
    args = (*rest[:2], as_tensors(rest[2]), *rest[3:])
    torch.library.opcheck(op._fwd.torch_op, (q.mT.contiguous().mT, *args))
    needs = [True, False, True, True]
    torch.library.opcheck(op._bwd.torch_op, (torch.randn_like(q), q, *args, needs))


def count_ops(graph_module, found):
    found += [str(n.target) for n in graph_module.graph.nodes if "lorakern" in str(n.target)]
    return make_boxed_func(graph_module)


def test_compiled_is_one_op_a_direction_and_a_new_scale_recompiles_nothing(device):
    forward, backward = [], []
    counter = aot_autograd(
        fw_compiler=lambda g, _: count_ops(g, forward),
        bw_compiler=lambda g, _: count_ops(g, backward),
    )
    args = inputs((2, 6, 2, 8, (5, 4, 3), (1,)), torch.float32, device)
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for first in (0.5, 0.0, -1.0):
        out = compiled(*args[:3], as_tensors([first, 2 * first]), *args[4:])
        got = torch.autograd.grad(out.square().sum(), leaves(args))
        eager = call(*args[:3], [first, 2 * first], *args[4:])
        want = torch.autograd.grad(eager.square().sum(), leaves(args))
        for a, b in zip((out, *got), (eager, *want), strict=True):
            torch.testing.assert_close(a, b)
    # a second compilation would have entered them again
    assert forward == ["lorakern.decoupled_attention_fwd.default"]
    assert backward == ["lorakern.decoupled_attention_bwd.default"]


def test_inductor(device):
    args = inputs((2, 6, 2, 8, (5, 4), ()), torch.float32, device)
    scales = as_tensors(args[3])

    def activated(*a):
        return F.gelu(call(*a)).square().sum()

    eager = torch.autograd.grad(activated(*args), leaves(args))
    torch._dynamo.reset()
    compiled = torch.compile(activated, fullgraph=True)(*args[:3], scales, *args[4:])
    for got, want in zip(torch.autograd.grad(compiled, leaves(args)), eager, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("trained", [{0}, {2, 4}, {4}, {1, 2}, {0, 1, 3}], ids=name)
def test_only_the_wanted_gradients_come(trained, device, monkeypatch):
    whole = inputs((2, 6, 2, 4, (5, 3), ()), torch.float32, device)
    want = torch.autograd.grad(call(*whole).square().sum(), leaves(whole))
    args = detached(whole)
    for at, leaf in enumerate(leaves(args)):
        leaf.requires_grad_(at in trained)
    asked = []
    real = op._bwd
    monkeypatch.setattr(op, "_bwd", lambda *a: asked.append(a[-1]) or real(*a))
    call(*args).square().sum().backward()
    for at, (leaf, grad) in enumerate(zip(leaves(args), want, strict=True)):
        assert (leaf.grad is not None) == (at in trained)
        if at in trained:
            torch.testing.assert_close(leaf.grad, grad)
    text, image = (bool({k, k + 2} & trained) for k in (1, 2))
    assert asked == [[0 in trained, text, image]]


def test_saved_for_backward_are_the_inputs(device):
    args = inputs((2, 6, 2, 4, (5, 3), (0,)), torch.float32, device)
    known = {t.data_ptr() for t in (*leaves(args), args[4][0])}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(*args)
    assert len(saved) == 6 and {t.data_ptr() for t in saved} == known


def test_strides_do_not_matter(device):
    args = inputs((2, 6, 2, 8, (5, 4), (0,)), torch.float32, device)
    turned = backend.on_tensors(
        lambda t: t.detach().mT.contiguous().mT.requires_grad_(t.requires_grad), args
    )
    outs = [call(*a) for a in (args, turned)]
    dout = torch.randn_like(outs[0])
    grads = [
        torch.autograd.grad(out, leaves(a), d)
        for out, a, d in zip(outs, (args, turned), (dout, dout.mT.contiguous().mT), strict=True)
    ]
    for a, b in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        assert torch.equal(a, b)


WRONG = {
    r"want q \[B, Q, 3·d\] for heads=3": lambda a: {**a, "heads": 3},
    "got 2 keys, 1 values, 1 scales, 1 masks": lambda a: {**a, "values": a["values"][:1]},
    "got 2 keys, 2 values, 2 scales, 2 masks": lambda a: {**a, "scales": [1.0, 1.0]},
    "got 0 keys": lambda a: {**a, "keys": [], "values": [], "scales": []},
    "got 2 keys, 2 values, 1 scales, 3 masks": lambda a: {**a, "masks": [None] * 3},
    r"group 1: want key and value \[2, T, 16\] .* got \[2, 4, 17\]": lambda a: {
        **a, "keys": [a["keys"][0], torch.zeros(2, 4, 17)]},
    r"group 0: .* got \[2, 5, 16\] and \[2, 6, 16\]": lambda a: {
        **a, "values": [torch.zeros(2, 6, 16), a["values"][1]]},
    "group 1: .* T at least 1": lambda a: {
        **a, "keys": [a["keys"][0], torch.zeros(2, 0, 16)],
        "values": [a["values"][0], torch.zeros(2, 0, 16)]},
    r"mask 0: want \[2, 6\] or \[1, 6\], got \[2, 7\]": lambda a: {
        **a, "masks": [torch.ones(2, 7)]},
    "mixed dtypes: q torch.float16, group 0.s key torch": lambda a: {**a, "q": a["q"].half()},
    "mixed devices: .* mask 0 meta": lambda a: {**a, "masks": [torch.ones(2, 6, device="meta")]},
    "scales and masks are fixed": lambda a: {
        **a, "masks": [torch.ones(2, 6, requires_grad=True)]},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_input_is_named(message):
    q, keys, values, scales, _, heads = detached(inputs((2, 6, 2, 8, (5, 4), ()), torch.float32))
    given_args = {"q": q, "keys": keys, "values": values, "scales": scales, "heads": heads}
    with pytest.raises(ValueError, match=message):
        decoupled_attention(**WRONG[message](given_args))

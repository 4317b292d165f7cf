"""CUDA kernels of lora_linear_shared without a GPU: run on the host, and compiled by nvcc."""

from types import SimpleNamespace

import cuda_aot
import pytest
import torch
from cuda_aot import check_on_host
from linear_ops import name
from test_lora_linear_shared import backward_inputs, detached, inputs, leaves

from lorakern import backend
from lorakern.functional import lora_linear
from lorakern.ops.lora_linear_shared import arguments, reference
from lorakern.testing import assert_as_exact_as_torch, exactly, lost_share

dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
# leading dims of x, I, and O, R of each layer. A tile of rows and a part of the next one; one
# slice of I, a short one and several; outputs of a tile, less, and odd; ranks of several tiles
SHAPES = [
    ((77,), 768, [(320, 16), (320, 16)]),
    ((2, 45), 264, [(130, 4), (65, 33), (17, 16), (40, 1)]),
    ((1, 1), 8, [(1, 1), (3, 20)]),
    ((161,), 72, [(161, 17), (128, 5)]),
    ((80,), 64, [(160, 32)]),
]
# one layer more than a launch holds, of two kinds
MANY = ((9,), 24, [(8 + 8 * (i % 2), 1 + i % 3) for i in range(49)])


def of_two(shape):
    """Needs: the first layer's down, and the last one's up."""
    count = len(shape[2])
    needs = [False] * (1 + 2 * count)
    needs[1] = needs[-1] = True
    return needs


def no_dx(shape):
    return [False] + [True] * 2 * len(shape[2])


@dtypes
@pytest.mark.parametrize(
    "shape", [*SHAPES, MANY], ids=["text", "ragged", "one", "rows", "whole", "many"]
)
def test_matches_reference(shape, dtype, cuda_host):
    args = inputs(shape, dtype)
    check_on_host(cuda_host, "lora_linear_shared_fwd", detached(args))
    check_on_host(cuda_host, "lora_linear_shared_bwd", backward_inputs(args, no_dx(shape)))


@dtypes
def test_only_what_is_wanted(dtype, cuda_host):
    for needs in (of_two(SHAPES[1]), [False] * 9):
        given = backward_inputs(inputs(SHAPES[1], dtype), needs)
        check_on_host(cuda_host, "lora_linear_shared_bwd", given)


def test_no_rows(cuda_host):
    shape = ((0, 3), 16, [(24, 2), (8, 3)])
    args = inputs(shape, torch.bfloat16)
    check_on_host(cuda_host, "lora_linear_shared_fwd", detached(args))
    check_on_host(cuda_host, "lora_linear_shared_bwd", backward_inputs(args, no_dx(shape)))


def test_tensors_at_any_address(cuda_host):
    def shifted(t):
        return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)

    args = inputs(SHAPES[1], torch.bfloat16)
    moved = backend.on_tensors(shifted, detached(args))
    assert all(t.data_ptr() % 16 for t in (moved[0], *moved[1]))
    check_on_host(cuda_host, "lora_linear_shared_fwd", moved)
    moved = backend.on_tensors(shifted, backward_inputs(args, no_dx(SHAPES[1])))
    check_on_host(cuda_host, "lora_linear_shared_bwd", moved)


@dtypes
def test_a_small_update_is_not_lost(dtype, cuda_host):
    """Far below the rounding of y: base and update share one accumulator."""
    scale = 1e-4 if dtype == torch.float16 else 1e-3
    args = detached(inputs(((154,), 96, [(320, 16)]), dtype, bias=(False,), scale=scale))
    wide = backend.on_tensors(torch.Tensor.double, args)
    y, _ = reference.lora_linear_shared_fwd(*wide)
    base, _ = reference.lora_linear_shared_fwd(*wide[:-1], [0.0])
    run = torch.ops.lorakern_host.lora_linear_shared_fwd_cuda
    assert abs(lost_share(lambda: run(*args)[0], y - base, base)) < 0.03


def graph(args):
    """Outputs and the gradients of the factors, by the launcher's own autograd node."""
    ys = torch.ops.lorakern_host.lora_linear_shared_cuda(*args)
    torch.manual_seed(1)
    dys = [torch.randn_like(y) for y in ys]
    return dys, [*ys, *torch.autograd.grad(ys, leaves(args)[1:], dys)]


@dtypes
@pytest.mark.parametrize("wide", [False, True], ids=["", "float32 factors"])
def test_the_graph_is_that_of_the_layers_apart(wide, dtype, cuda_host):
    x, weights, biases, downs, ups, scales = inputs(SHAPES[1], dtype)
    x = x.detach()
    if wide:
        downs, ups = ([f.detach().float().requires_grad_() for f in fs] for fs in (downs, ups))
    dys, got = graph((x, weights, biases, downs, ups, scales))
    assert all(g.dtype == f.dtype for g, f in zip(got[len(dys) :], (*downs, *ups), strict=True))

    def apart(x, weights, biases, downs, ups):
        # the factors are read in x's dtype, and their gradients are not rounded to it
        given = zip(weights, biases, downs, ups, scales, strict=True)
        results = [reference.lora_linear_shared_fwd(x, *([t] for t in layer)) for layer in given]
        ys = [y.view(*x.shape[:-1], -1) for y, _ in results]
        needs = [False, *[True] * 2]
        grads = [
            reference.lora_linear_shared_bwd(x, h, [dy.to(x)], [w], [a], [b], [s], needs)
            for dy, (_, h), w, a, b, s in zip(
                dys, results, weights, downs, ups, scales, strict=True
            )
        ]
        return (
            *ys,
            *(g[1] for g in grads),
            *(g[2].view(b.shape) for g, b in zip(grads, ups, strict=True)),
        )

    args = x, weights, biases, *([f.detach().to(dtype) for f in fs] for fs in (downs, ups))
    for i, (a, exact, same) in enumerate(
        zip(got, exactly(apart, *args), apart(*args), strict=True)
    ):
        assert_as_exact_as_torch(f"result {i}", a.detach().to(dtype), exact, same)
    again = graph((x, weights, biases, downs, ups, scales))[1]
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_outputs_that_reach_no_loss_and_frozen_factors(cuda_host):
    args = x, weights, biases, downs, ups, scales = inputs(SHAPES[1], torch.bfloat16)
    x.requires_grad_(False)
    downs[0].requires_grad_(False)
    ys = torch.ops.lorakern_host.lora_linear_shared_cuda(*args)
    (ys[0].sum() + ys[2].sum()).backward()
    for i, layer in enumerate(zip(weights, biases, downs, ups, scales, strict=True)):
        got = [f.grad for f in layer[2:4]]
        if i not in (0, 2):
            assert got == [None, None]
            continue
        wanted = [f for f in layer[2:4] if f.requires_grad]
        want = torch.autograd.grad(lora_linear(x, *layer).sum(), wanted)
        for a, b in zip([g for g in got if g is not None], want, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert len({y.untyped_storage().data_ptr() for y in ys}) == len(ys)


def test_saved_for_backward_is_x_once_and_h(cuda_host):
    args = detached(inputs(SHAPES[1], torch.bfloat16))
    for factor in (*args[3], *args[4]):
        factor.requires_grad_()
    known = {t.data_ptr() for t in (args[0], *args[1], *args[3], *args[4])}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        torch.ops.lorakern_host.lora_linear_shared_cuda(*args)
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in known] == [(2, 45, 54)]
    assert sum(t.data_ptr() == args[0].data_ptr() for t in saved) == 1


WRONG = {
    "x: want float16 or bfloat16, got Float": lambda a: backend.on_tensors(torch.Tensor.float, a),
    "x: want a multiple of 8 columns, got 12": (
        lambda a: detached(inputs(((3,), 12, [(8, 2)]), torch.float16))
    ),
    r"up: want shape \[130, 3\], got \[130, 4\]": (
        lambda a: (*a[:3], [a[3][0][1:], *a[3][1:]], *a[4:])
    ),
    "up: want Half on cpu, got Float": lambda a: (*a[:4], [u.float() for u in a[4]], a[5]),
    "down: want Float on cpu, got Half": (
        lambda a: (*a[:3], [a[3][0].float(), *a[3][1:]], *[[u.float() for u in a[4]], a[5]])
    ),
    "want a weight, bias, down, up and scale for each": lambda a: (*a[:5], a[5][1:]),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_it_does_not_take_is_named(message, cuda_host):
    args = WRONG[message](detached(inputs(SHAPES[1], torch.float16)))
    for launcher in ("lora_linear_shared_fwd_cuda", "lora_linear_shared_cuda"):
        with pytest.raises(ValueError, match=message):
            getattr(torch.ops.lorakern_host, launcher)(*args)


def test_the_gradient_of_x_is_not_made(cuda_host):
    args = inputs(SHAPES[2], torch.float16)
    with pytest.raises(ValueError, match="dx: this kernel makes the gradients of downs and ups"):
        torch.ops.lorakern_host.lora_linear_shared_bwd_cuda(*backward_inputs(args))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"dtype": torch.float32}, "torch.float32: the kernel multiplies 16-bit matrices"),
        ({"shape": (1, 4, 100)}, "100 columns of x; the kernel reads 8 at once"),
        ({"device": torch.device("cpu")}, "the tensors are on cpu; this kernel is for cuda"),
        ({"capability": (7, 5)}, "sm_75: the kernel needs sm_80"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_reason(change, reason, monkeypatch):
    has = {"shape": (1, 4, 768), "dtype": torch.float16, "device": torch.device("cuda")}
    has = {**has, "capability": (8, 0), **change}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has["capability"])
    x = SimpleNamespace(**has)
    assert arguments.refuse_cuda(x) == reason
    assert arguments.refuse_cuda_bwd(x, [False, True, True]) == reason
    if reason is None:
        assert arguments.refuse_cuda_bwd(x, [True, False]).startswith("dx is wanted")


def test_cpu_tensors_are_refused():
    args = inputs(SHAPES[2], torch.float16)
    both = ("lora_linear_shared_fwd", args), ("lora_linear_shared_bwd", backward_inputs(args))
    for op, given in both:
        assert backend.why(op, *given)["cuda"].startswith("the tensors are on cpu")


@pytest.mark.skipif(cuda_aot.nvcc() is None, reason="there is no nvcc")
@pytest.mark.parametrize("way", ["fwd", "bwd"])
def test_compiles_without_spills(way, tmp_path):
    # half goes as bfloat16
    types = [f"__nv_bfloat16, {factors}, true" for factors in ("__nv_bfloat16", "float")]
    parts = {"fwd": ["h", "y"], "bwd": ["dup", "ddown"]}[way]
    kernels = [f"lora_linear_shared_{part}_kernel<{t}>" for part in parts for t in types]
    header = f"lora_linear_shared_{way}.cuh"
    for chip, found in cuda_aot.usages(header, kernels, tmp_path).items():
        assert len(found) == len(kernels)
        for usage in found:
            print(f"sm_{chip} {usage}")
            assert usage.stack == usage.spilled == 0, usage


@pytest.mark.skipif(cuda_aot.nvcc() is None, reason="there is no nvcc")
@pytest.mark.parametrize(
    "part, way", [("h", "fwd"), ("y", "fwd"), ("dup", "bwd"), ("ddown", "bwd")]
)
def test_products_are_matrix_instructions(part, way, tmp_path):
    for scalar, of in (("__nv_bfloat16", "bf16"), ("__half", "f16")):
        kernel = f"lora_linear_shared_{part}_kernel<{scalar}, float, {str(of == 'bf16').lower()}>"
        made = cuda_aot.ptx(f"lora_linear_shared_{way}.cuh", kernel, tmp_path, 80)
        assert f"mma.sync.aligned.m16n8k16.row.col.f32.{of}.{of}.f32" in made
        assert ("cp.async.cg.shared.global" in made) == (way == "fwd")

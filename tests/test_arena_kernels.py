"""The kernels of a clipped step of AdamW: on the CPU, on CUDA, and those of CUDA on the host."""

import ctypes
import itertools
import math
import re

import cuda_aot
import pytest
import torch
from torch import nn

from lorakern import FlatAdamW, adamw, arena
from lorakern.average import Average
from lorakern.testing import assert_as_exact_as_torch

MEMORY = 0.4
# of one buffer: elements, learning rate, weight decay, betas, eps.  A pack and less, several blocks
# and a tail, several buffers with numbers of their own
HYPER = (1e-2, 0.1, 0.9, 0.999, 1e-8)
CASES = {
    "1": [(1, *HYPER)],
    "3": [(3, *HYPER)],
    "1000003": [(1_000_003, *HYPER)],
    "several": [(5, *HYPER), (1024, 3e-3, 0.0, 0.8, 0.99, 1e-6), (4099, 0.1, 0.5, 0.9, 0.95, 1e-8)],
}


class Buffers:
    """Weights, gradient, moments, average and steps of each buffer, at any address."""

    def __init__(self, case, dtype=torch.float32, device="cpu", averaged=True, off=0):
        def place(values):
            to = torch.zeros(values.numel() + off, dtype=dtype, device=device)[off:]
            return to.copy_(values)

        make = torch.Generator().manual_seed(1)
        self.hypers = [numbers for _, *numbers in case]
        self.p = [place(torch.randn(size, generator=make)) for size, *_ in case]
        self.grad, self.m, self.v = ([place(torch.zeros(p.shape)) for p in self.p] for _ in "gmv")
        self.average = [place(p.cpu()) for p in self.p] if averaged else []
        self.steps = [torch.zeros((), dtype=dtype, device=device) for _ in case]

    def backward(self, seed):
        make = torch.Generator().manual_seed(seed)
        for grad in self.grad:
            grad.copy_(torch.randn(grad.shape, generator=make))

    def tensors(self):
        return [*self.p, *self.m, *self.v, *self.average, *self.steps]

    def parts(self):
        averages = self.average or [None] * len(self.p)
        lists = self.p, self.grad, self.m, self.v, averages, self.steps, self.hypers
        return zip(*lists, strict=True)


class Spec:
    device = "cpu"
    norm = staticmethod(adamw.norm)

    @staticmethod
    def step(on, norm, largest, zero=False):
        for p, grad, m, v, average, step, numbers in on.parts():
            skipped = adamw.step(
                p, grad, m, v, average, step, *numbers, norm, largest, MEMORY, zero
            )
        return skipped


class Cpp:
    device = "cpu"
    norm = staticmethod(lambda grads: torch.ops.lorakern_native.arena_norm_cpu(grads))

    @staticmethod
    def step(on, norm, largest, zero=False):
        for p, grad, m, v, average, step, numbers in on.parts():
            skipped = torch.ops.lorakern_native.arena_step_cpu(
                p, [p], [grad], m, v, average, step, *numbers, norm, largest, MEMORY, zero
            )
        return skipped


class Cuda:
    """The launchers of CUDA, of the extension on a GPU or of the host."""

    def __init__(self, ops, device):
        self.norm, self.launch, self.device = ops.arena_norm_cuda, ops.arena_step_cuda, device

    def step(self, on, norm, largest, zero=False):
        lrs = [torch.tensor(lr, dtype=torch.float32, device=self.device) for lr, *_ in on.hypers]
        numbers = [number for _, *rest in on.hypers for number in rest]
        return self.launch(
            on.p, on.grad, on.m, on.v, on.steps, on.average, lrs, numbers, norm, largest, MEMORY,
            zero,
        )  # fmt: skip


@pytest.fixture(params=["cpp", "host", "cuda"])
def kernels(request):
    native = torch.ops.lorakern_native
    if request.param == "host":
        request.getfixturevalue("cuda_host")
        return Cuda(torch.ops.lorakern_host, "cpu")
    if request.param == "cuda":
        if not torch.cuda.is_available() or not hasattr(native, "arena_step_cuda"):
            pytest.skip("there is no GPU, or the extension has no kernels of CUDA")
        return Cuda(native, "cuda")
    if not hasattr(native, "arena_step_cpu"):
        pytest.skip("lorakern._native is not built")
    return Cpp


def in_torch(on, largest, steps):
    """The same by torch.optim.AdamW, clip_grad_norm_ and lerp, in place."""
    params = [nn.Parameter(p) for p in on.p]
    names = "lr", "weight_decay", "betas", "eps"
    groups = [
        {"params": [p], **dict(zip(names, (lr, wd, (b1, b2), eps), strict=True))}
        for p, (lr, wd, b1, b2, eps) in zip(params, on.hypers, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    for step in range(1, steps + 1):
        on.backward(step)
        for p, grad in zip(params, on.grad, strict=True):
            p.grad = grad.clone()
        if largest is not None:
            nn.utils.clip_grad_norm_(params, largest)
        optimizer.step()
        keep = min(MEMORY, (1 + step) / (10 + step))
        for average, p in zip(on.average, params, strict=False):
            average.lerp_(p.detach(), 1 - keep)
    for i, p in enumerate(params):
        on.p[i], state = p.detach(), optimizer.state[p]
        on.m[i], on.v[i], on.steps[i] = state["exp_avg"], state["exp_avg_sq"], state["step"]


def in_kernels(kernels, on, largest, steps):
    for step in range(1, steps + 1):
        on.backward(step)
        norm = None if largest is None else kernels.norm(on.grad)
        skipped = kernels.step(on, norm, math.inf if largest is None else largest)
        assert skipped == 0


@pytest.mark.parametrize("largest", [None, math.inf, 1e6, 0.5])
@pytest.mark.parametrize("case", ["3", "several"])
def test_the_spec_is_torch_s_adamw_and_clip(case, largest):
    mine, theirs = (Buffers(CASES[case], torch.float64) for _ in range(2))
    in_kernels(Spec, mine, largest, 5)
    in_torch(theirs, largest, 5)
    for a, b in zip(mine.tensors(), theirs.tensors(), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("off", [0, 1])
@pytest.mark.parametrize(
    ("case", "largest", "steps"),
    [("1", 0.5, 1), ("3", None, 2), ("1000003", 0.5, 3), ("several", 1e6, 4), ("several", 0.5, 5)],
)
def test_steps_are_as_exact_as_torch_s(case, largest, steps, off, averaged, kernels):
    table = CASES[case]
    exact = Buffers(table, torch.float64, averaged=averaged)
    in_kernels(Spec, exact, largest, steps)
    same = Buffers(table, averaged=averaged)
    in_torch(same, largest, steps)
    got, twice = (Buffers(table, device=kernels.device, averaged=averaged, off=off) for _ in "ab")
    in_kernels(kernels, got, largest, steps)
    in_kernels(kernels, twice, largest, steps)
    for i, (a, b, want, plain) in enumerate(
        zip(got.tensors(), twice.tensors(), exact.tensors(), same.tensors(), strict=True)
    ):
        assert_as_exact_as_torch(f"{case}, tensor {i}", a.cpu(), want, plain)
        assert torch.equal(a, b), f"tensor {i}: a second run gives other bits"


@pytest.mark.parametrize("case", CASES)
def test_the_norm_is_as_exact_as_torch_s(case, kernels):
    on = Buffers(CASES[case], device=kernels.device)
    on.backward(0)
    grads = [grad.cpu() for grad in on.grad]
    exact = adamw.norm([grad.double() for grad in grads])
    assert_as_exact_as_torch("norm", kernels.norm(on.grad).cpu(), exact, adamw.norm(grads))


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_leaves_all_as_it_is(bad, zero, kernels):
    on = Buffers(CASES["several"], device=kernels.device)
    in_kernels(kernels, on, 0.5, 2)
    before = [t.clone() for t in on.tensors()]
    on.backward(3)
    on.grad[1][7] = bad
    grads = [grad.clone() for grad in on.grad]
    skipped = kernels.step(on, kernels.norm(on.grad), 0.5, zero)
    assert skipped.dtype == torch.float32 and skipped == 1
    for a, b in zip(on.tensors(), before, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(on.grad, grads, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(b) if zero else b, equal_nan=True)
    # and the next goes on
    on.backward(4)
    assert kernels.step(on, kernels.norm(on.grad), 0.5) == 0
    assert all(step == 3 for step in on.steps)


@pytest.mark.parametrize("off", [0, 1])
def test_gradients_become_zeros_in_the_same_pass(off, kernels):
    with_zeros, without = (
        Buffers(CASES["several"], device=kernels.device, off=off) for _ in range(2)
    )
    for on, zero in ((with_zeros, True), (without, False)):
        on.backward(1)
        kernels.step(on, kernels.norm(on.grad), 0.5, zero)
    assert not any(grad.any() for grad in with_zeros.grad)
    assert all(grad.all() for grad in without.grad)
    for a, b in zip(with_zeros.tensors(), without.tensors(), strict=True):
        assert torch.equal(a, b)


def test_no_gradient_is_changed_and_more_segments_than_a_launch_takes(kernels):
    case = [(1000 + n, 1e-3 * n, 0.1, 0.9, 0.99, 1e-8) for n in range(70)]
    exact, same = Buffers(case, torch.float64), Buffers(case)
    in_kernels(Spec, exact, 0.5, 1)
    in_torch(same, 0.5, 1)
    got = Buffers(case, device=kernels.device)
    in_kernels(kernels, got, 0.5, 1)
    fresh = Buffers(case)
    fresh.backward(1)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got.grad, fresh.grad, strict=True))
    for p, want, plain in zip(got.p, exact.p, same.p, strict=True):
        assert_as_exact_as_torch("p", p.cpu(), want, plain)


def test_no_order_of_threads_is_needed(cuda_host):
    found = []
    for backwards in (False, True):
        cuda_host.cuda_host_order(ctypes.c_bool(backwards))
        found.append(Buffers(CASES["several"]))
        in_kernels(Cuda(torch.ops.lorakern_host, "cpu"), found[-1], 0.5, 2)
    cuda_host.cuda_host_order(ctypes.c_bool(False))
    for a, b in zip(*(on.tensors() for on in found), strict=True):
        assert torch.equal(a, b)


def test_what_does_not_fit_is_named(kernels):
    on = Buffers(CASES["several"], device=kernels.device)
    on.m[1] = on.m[1].double()
    with pytest.raises(ValueError, match=r"exp_avg: want Float on .*, got Double"):
        kernels.step(on, None, math.inf)
    on.m[1] = on.m[1].float()[:-1]
    with pytest.raises(ValueError, match=r"exp_avg: want .*1024.*, got .*1023"):
        kernels.step(on, None, math.inf)


def test_any_number_of_threads_gives_the_same_bits():
    before, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(Buffers(CASES["1000003"]))
        in_kernels(Cpp, found[-1], 0.5, 1)
    torch.set_num_threads(before)
    for a, b in zip(*(on.tensors() for on in found), strict=True):
        assert torch.equal(a, b)


def factors_on(device):
    make = torch.Generator().manual_seed(2)
    sizes = [(7, 9), (3,), (40, 33), (1,)]
    return [nn.Parameter(torch.randn(s, generator=make).to(device)) for s in sizes]


def train(optimizer, factors, seeds, clip):
    for seed in seeds:
        make = torch.Generator().manual_seed(seed)
        for f in factors:
            f.grad = torch.randn(f.shape, generator=make).to(f.device)
        clip()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(params=["host", "cuda"])
def cuda_device(request, monkeypatch):
    """Where FlatAdamW takes the kernels of CUDA."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no GPU")
        return "cuda"
    request.getfixturevalue("cuda_host")
    ops = torch.ops.lorakern_host
    kernels = ops.arena_norm_cuda, ops.arena_step_cuda
    monkeypatch.setattr(arena, "_kernels", lambda device: kernels)
    monkeypatch.setattr(FlatAdamW, "_on_cuda", lambda self: True)
    return "cpu"


def test_flat_adamw_takes_the_kernels_of_cuda(cuda_device):
    mine, theirs = (factors_on(cuda_device) for _ in range(2))
    lr = torch.tensor(1e-2, device=cuda_device)
    groups = [{"params": mine[:2], "lr": lr}, {"params": mine[2:], "weight_decay": 0.3}]
    flat = FlatAdamW(groups, lr=1e-3, zero=True)
    flat.average = Average(mine, flat.flats, MEMORY)
    other = [{"params": theirs[:2], "lr": 1e-2}, {"params": theirs[2:], "weight_decay": 0.3}]
    own = torch.optim.AdamW(other, lr=1e-3)
    values = [f.detach().clone() for f in theirs]
    for step, seed in enumerate(range(6), 1):
        if step == 4:
            # as schedules do
            lr.fill_(3e-2)
            flat.param_groups[1]["lr"] = 5e-3
            own.param_groups[0]["lr"], own.param_groups[1]["lr"] = 3e-2, 5e-3
        train(flat, mine, [seed], lambda: flat.clip(1.0))
        train(own, theirs, [seed], lambda: nn.utils.clip_grad_norm_(theirs, 1.0))
        keep = min(MEMORY, (1 + step) / (10 + step))
        values = [keep * a + (1 - keep) * f.detach() for a, f in zip(values, theirs, strict=True)]
    torch.testing.assert_close(mine, theirs)
    with flat.average.shown():
        torch.testing.assert_close([f.detach() for f in mine], values)
    # a gradient stays where it was gathered, and is zeros
    mine[0].grad = torch.ones_like(mine[0])
    flat.step()
    assert mine[0].grad is flat._flats[0].slots[0] and not mine[0].grad.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_cuda_graph_replays_clip_and_step():
    mine, theirs = (factors_on("cuda") for _ in range(2))
    lr = torch.tensor(1e-2, device="cuda")
    flat, own = FlatAdamW(mine, lr=lr, zero=True), torch.optim.AdamW(theirs, lr=1e-2)
    train(own, theirs, range(2), lambda: nn.utils.clip_grad_norm_(theirs, 1.0))
    train(flat, mine, [0], lambda: flat.clip(1.0))
    for f in mine:
        f.grad = torch.zeros_like(f)
    flat.gather()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flat.clip(1.0)
        flat.step()

    def replay(seed):
        make = torch.Generator().manual_seed(seed)
        for f in mine:
            f.grad.copy_(torch.randn(f.shape, generator=make))
        graph.replay()

    replay(1)
    torch.testing.assert_close(mine, theirs)
    lr.fill_(1e-3)
    own.param_groups[0]["lr"] = 1e-3
    replay(2)
    train(own, theirs, [2], lambda: nn.utils.clip_grad_norm_(theirs, 1.0))
    torch.testing.assert_close(mine, theirs)
    mine[0].grad.fill_(math.nan)
    graph.replay()
    assert flat.skipped == 1
    torch.testing.assert_close(mine, theirs)


@pytest.mark.skipif(cuda_aot.nvcc() is None, reason="there is no nvcc")
def test_compiles_without_spills(tmp_path):
    flags = itertools.product(("true", "false"), repeat=2)
    kernels = [f"arena_step_kernel<{average}, {zero}>" for average, zero in flags]
    kernels += ["arena_squares_kernel", "arena_norm_kernel", "arena_rates_kernel"]
    for chip, found in cuda_aot.usages("arena.cuh", kernels, tmp_path).items():
        assert len(found) == len(kernels)
        for usage in found:
            print(f"sm_{chip} {usage}")
            assert usage.stack == usage.spilled == 0, usage


@pytest.mark.skipif(cuda_aot.nvcc() is None, reason="there is no nvcc")
@pytest.mark.parametrize("chip", cuda_aot.CHIPS)
def test_packs_are_loaded_and_stored_whole(chip, tmp_path):
    step = cuda_aot.ptx("arena.cuh", "arena_step_kernel<true, true>", tmp_path, chip)
    packs = {way: len(re.findall(rf"\b{way}\.global\.v4", step)) for way in ("ld", "st")}
    assert packs == {"ld": 5, "st": 5}
    squares = cuda_aot.ptx("arena.cuh", "arena_squares_kernel", tmp_path, chip)
    assert len(re.findall(r"\bld\.global(\.nc)?\.v4", squares)) == 1

"""The table of kernels: who is picked, why not, and what a forced backend does."""

import itertools
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import lorakern
from lorakern import backend
from lorakern.backend import Kernel

HERE = "kernels_of_test_backend"
NUMBERS = itertools.count()


def spec(x, scale):
    return scale * x


def refuse_wide(x, scale):
    return f"x has {x.shape[-1]} columns, over 4" if x.shape[-1] > 4 else None


@pytest.fixture
def op(monkeypatch):
    """An op with two kernels; `fast` refuses more than 4 columns. Results name their kernel."""
    kernels = SimpleNamespace(fast=lambda x, s: x * 0 + 1, slow=lambda x, s: x * 0 + 2)
    monkeypatch.setitem(sys.modules, HERE, kernels)
    # a torch op cannot be taken back, so no name comes twice
    name = f"toy_{next(NUMBERS)}"
    made = backend.define(
        name,
        "(Tensor x, Tensor scale) -> Tensor",
        spec,
        fast=Kernel(f"{HERE}:fast", refuse_wide),
        slow=Kernel(f"{HERE}:slow"),
    )
    yield made
    del backend.OPS[name]


def test_the_first_that_does_not_refuse_is_picked(op):
    assert op(torch.zeros(4), 3.0).tolist() == [1.0] * 4
    assert op(torch.zeros(5), 3.0).tolist() == [2.0] * 5
    assert backend.why(op, torch.zeros(5), 3.0) == {
        "fast": "x has 5 columns, over 4",
        "slow": "ok",
        "reference": "ok",
    }


def test_cost_decides_where_every_kernel_has_one(monkeypatch):
    monkeypatch.setitem(sys.modules, HERE, SimpleNamespace(run=lambda x, s: x))
    kernels = {
        "fused": Kernel(f"{HERE}:run", cost=lambda x, s: x.numel()),
        "split": Kernel(f"{HERE}:run", cost=lambda x, s: 100),
    }
    op = backend.define("toy_cost", "(Tensor x, Tensor scale) -> Tensor", spec, **kernels)
    try:
        assert backend.pick(op, torch.zeros(99), 1.0) == "fused"
        assert backend.pick(op, torch.zeros(101), 1.0) == "split"
    finally:
        del backend.OPS["toy_cost"]


def test_use_forces_and_a_refusal_raises(op):
    x = torch.ones(4)
    with backend.use("reference"):
        assert op(x, 3.0).tolist() == [3.0] * 4
        with backend.use(**{op.name: "slow"}):
            assert op(x, 3.0).tolist() == [2.0] * 4
    assert op(x, 3.0).tolist() == [1.0] * 4
    with backend.use("fast"), pytest.raises(ValueError, match="cannot run: x has 5 columns"):
        op(torch.ones(5), 3.0)
    with backend.use("nonesuch"), pytest.raises(ValueError, match="no backend 'nonesuch'"):
        op(x, 3.0)
    with pytest.raises(ValueError, match="no op 'nonesuch'"), backend.use(nonesuch="reference"):
        pass


def test_a_kernel_that_cannot_be_loaded_says_so():
    kernels = {
        "cpp": Kernel("native:nonesuch_fwd_cpu"),
        "triton": Kernel("lorakern.nonesuch:run"),
    }
    op = backend.define("toy_missing", "(Tensor x, Tensor scale) -> Tensor", spec, **kernels)
    try:
        reasons = backend.why(op, torch.ones(2), 1.0)
        assert "_native is not built or lacks nonesuch_fwd_cpu" in reasons["cpp"]
        assert "lorakern.nonesuch" in reasons["triton"]
        assert op(torch.ones(2), 2.0).tolist() == [2.0, 2.0]
    finally:
        del backend.OPS["toy_missing"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_spec_as_a_kernel_rounds_16_bit_once(dtype):
    seen = []

    def two_steps(x, scale):
        seen.append(x.dtype)
        return scale * x + x

    x = torch.randn(1000, dtype=dtype)
    got = backend._in_float32(two_steps, [0])(x, 0.3)
    assert seen == [torch.float32]
    assert torch.equal(got, (0.3 * x.float() + x.float()).to(dtype))
    assert not torch.equal(got, 0.3 * x + x)


def test_names_are_taken_once(op):
    with pytest.raises(ValueError, match="already defined"):
        backend.define(op.name, "(Tensor x, Tensor scale) -> Tensor", spec)


def test_the_spec_as_a_kernel_is_not_cast_by_autocast():
    x = torch.randn(8, 8, dtype=torch.bfloat16)
    run = backend._in_float32(lambda a: a @ a, [0])
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(x)
    assert torch.equal(inside, run(x))


def test_lists_are_part_of_what_a_pick_is_remembered_by():
    x = torch.zeros(2, 3)
    assert backend._key((x, [1, 1])) != backend._key((x, [2, 2]))
    assert backend._key((x, 0.5)) == backend._key((x, 0.7))


@pytest.mark.skipif(
    not hasattr(torch.ops.lorakern_native, "lora_linear_cpu"),
    reason="lorakern._native is not built",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "algo, op", [("lora", "lora_linear"), ("loha", "hada_linear"), ("lokr", "kron_linear")]
)
def test_what_is_called_as_a_python_function_is_an_op_to_profiler_and_tracer(algo, op):
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).requires_grad_(False)
    lorakern.inject(model, algo, rank=2, targets=["0"])
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        model(torch.randn(3, 8))
    assert f"lorakern_native::{op}_cpu" in {e.name for e in seen.events()}
    assert callable(getattr(lorakern._native, f"{op}_cpu"))
    traced = torch.jit.trace(model, torch.randn(3, 8))
    # nothing of the call was taken for a constant
    with torch.no_grad():
        for factor in model[0].parameters():
            factor.normal_()
    x = torch.randn(5, 8)
    assert torch.equal(traced(x), model(x))


def test_an_extension_of_another_torch_is_an_error_that_says_what_to_do(tmp_path):
    package = tmp_path / "lorakern"
    package.mkdir()
    shutil.copy(lorakern.__file__, package)
    native = package / f"_native{EXTENSION_SUFFIXES[0]}"
    native.write_bytes(b"not a library")
    tried = subprocess.run(
        [sys.executable, "-c", "import lorakern"], cwd=tmp_path, capture_output=True, text=True
    )
    said = f"ImportError: {native} does not load beside torch {torch.__version__}: it was built for"
    assert tried.returncode == 1 and said in tried.stderr
    assert "Install lorakern again with --no-build-isolation" in tried.stderr

"""Compiles what a Triton launcher launches, for GPUs that are not there.

`launches` runs a launcher on meta tensors, with recorders in the place of its kernels: what it
returns is what would run, with every constant and option. `compile_for` turns one launch into a
cubin and reads its resource usage. Both need a process without TRITON_INTERPRET.
"""

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

# the most shared memory of one program, in bytes; CUDA C++ Programming Guide, compute capabilities
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
MATRIX = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
# bytes of stack that pass: the assemblers of these versions put up to 8 and up to 2 registers there
STACK = {"3.6": 32, "3.8": 8}.get(triton.__version__[:3], 0)
# without a product of matrices
PLAIN = {"_sum_slices_kernel", "_kron_delta_kernel", "_kron_sums_kernel"}
# family of tiles and number of multiprocessors; sm_120 shares sm_89's tiles and instructions
GPUS = {80: ("datacenter", 108), 89: ("other", 128), 90: ("datacenter", 132),
        100: ("datacenter", 148)}  # fmt: skip
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Usage:
    """Registers of a thread; shared, local and stack memory in bytes; the PTX's matrix instruction,
    "" for none."""

    kernel: str
    constants: str
    registers: int
    shared: int
    local: int
    stack: int
    instruction: str


class _Recorder:
    def __init__(self, kernel, calls):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append((self.kernel, args, options))


def launches(function, *args, modules):
    """[(kernel, args, options)] of one launcher call, in order; nothing runs."""
    calls, kept = [], []
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                kept.append((module, name, value))
                setattr(module, name, _Recorder(value, calls))
    try:
        function(*args)
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
    return calls


def usages(capability, function, *args):
    """[Usage] of all that one launcher call launches, with the plans of that GPU."""
    from lorakern.ops.lora_linear import triton_tables as tables

    tables.hardware = lambda device: GPUS[capability]
    for plan in vars(tables).values():
        if hasattr(plan, "cache_clear"):
            plan.cache_clear()
    modules = [
        m for name, m in sys.modules.items() if re.match(r"lorakern\.ops\..*\.triton_", name)
    ]
    return [compile_for(capability, *each) for each in launches(function, *args, modules=modules)]


@contextmanager
def on_every_core(compiled, cases):
    """{case: future of compiled(*case)}, in processes of their own without the interpreter."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=spawn) as pool:
            yield {case: pool.submit(compiled, *case) for case in cases}
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def assert_fit(capability, dtype, used):
    """Nothing spills, shared memory is enough, and products use a matrix instruction: the target's
    own, or the older mma.sync for tiles that are too small for it."""
    for usage in used:
        print(f"sm_{capability} {dtype} {usage}")
        assert usage.local == 0 and usage.stack <= STACK, usage
        assert usage.shared <= SHARED[capability], usage
        if usage.kernel not in PLAIN:
            # float32 sums in float32: no matrix instruction does that
            wanted = {""} if dtype == torch.float32 else {MATRIX[capability], "mma.sync"}
            assert wanted & set(usage.instruction.split("+")), usage


def compile_for(capability, kernel, args, options):
    """The Usage of one launch on sm_<capability>; raises when it does not compile."""
    run = {k: v for k, v in options.items() if k in ("num_warps", "num_stages")}
    target = GPUTarget("cuda", capability, 32)
    source = _source(kernel, args, options)
    made = triton.compile(source, target=target, options=run)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        dump = [_CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    used = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    found = set(re.findall(r"wgmma(?=\.mma_async)|tcgen05\.mma|mma\.sync", made.asm["ptx"]))
    constants = [f"{k}={v}" for k, v in options.items() if k.startswith(("BLOCK", "num"))]
    return Usage(
        kernel.__name__, " ".join(constants), used["REG"], made.metadata.shared,
        used["LOCAL"], used["STACK"], "+".join(sorted(found)),
    )  # fmt: skip


def _source(kernel, args, options):
    signature, constexprs, attrs = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = args[i] if i < len(args) else options[param.name]
        if param.is_constexpr:
            signature[param.name], constexprs[(i,)] = "constexpr", value
        elif isinstance(value, tuple):
            marks = [_type(v, True, (i, j), constexprs, attrs) for j, v in enumerate(value)]
            signature[param.name] = tuple(marks)
        else:
            counted = not param.do_not_specialize
            signature[param.name] = _type(value, counted, (i,), constexprs, attrs)
    return ASTSource(kernel, signature, constexprs, attrs)


def _type(value, counted, at, constexprs, attrs):
    """As Triton's launcher specializes: None and 1 are constants, multiples of 16 are marked."""
    counted = counted and isinstance(value, int)
    if value is None or (counted and value == 1):
        constexprs[at] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, torch.Tensor) or (counted and value % 16 == 0):
        attrs[at] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    return "i32" if value < 2**31 else "i64"

"""Triton kernels of decoupled_attention without a GPU: in the interpreter, and as cubins.

On a GPU test_decoupled_attention.py runs the kernels themselves.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from test_decoupled_attention import backward_inputs, detached, inputs, name

from lorakern import backend
from lorakern.ops.decoupled_attention import reference
from lorakern.ops.decoupled_attention import triton_tables as tables
from lorakern.testing import assert_as_exact_as_torch

pytest.importorskip("triton")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def check(function, spec, args):
    results = [f(*a) for f, a in ((function, args), (spec, double(args)), (spec, args))]
    if isinstance(results[0], torch.Tensor):
        results = [(r,) for r in results]
    for i, (got, exact, same) in enumerate(zip(*results, strict=True)):
        assert_as_exact_as_torch(f"result {i}", got, exact, same)


def double(args):
    return backend.on_tensors(torch.Tensor.double, args)


@without_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name)
@pytest.mark.parametrize("needs", [(1, 0, 1, 1), (0, 1, 0, 1), (1, 0, 0, 0)], ids=name)
def test_slices_of_queries(needs, dtype, monkeypatch):
    """As on a large GPU: the sums over queries are cut, and added up by the third stage."""
    from lorakern.ops.decoupled_attention.triton_bwd import decoupled_attention_bwd

    monkeypatch.setattr(tables, "hardware", lambda device: ("datacenter", 132))
    args = inputs((1, 300, 1, 24, (21, 4, 70), (0,)), dtype)
    given = backward_inputs(args, [bool(n) for n in needs])
    check(decoupled_attention_bwd, reference.decoupled_attention_bwd, given)


@without_gpu
def test_one_group_and_no_image():
    from lorakern.ops.decoupled_attention.triton_kernel import decoupled_attention_fwd

    args = detached(inputs((2, 70, 2, 8, (20,), ()), torch.float16))
    check(decoupled_attention_fwd, reference.decoupled_attention_fwd, args)


# (capability, dtype, heads, d, keys of the groups, masked): SD 1.5 and SDXL, every width of head
CUBINS = [
    (90, torch.bfloat16, 8, 40, (77, 4), ()),
    (90, torch.float16, 8, 160, (77, 257), ()),
    (80, torch.bfloat16, 8, 80, (77, 4, 4), (0,)),
    (100, torch.bfloat16, 20, 64, (77, 16), ()),
    (80, torch.float32, 8, 64, (77, 16), ()),
]


def compiled(capability, dtype, heads, d, tokens, masked):
    """[Usage] of all that both directions launch; runs in a process of its own."""
    import triton_aot

    from lorakern.ops.decoupled_attention import triton_bwd, triton_kernel

    tables.hardware = lambda device: ("datacenter", 132)
    args = detached(inputs((2, 1024, heads, d, tokens, masked), dtype, "meta"))
    needs = [True, False, *[True] * (len(tokens) - 1)]
    launchers = (
        (triton_kernel.decoupled_attention_fwd, *args),
        (
            triton_bwd.decoupled_attention_bwd,
            *backward_inputs(args, needs),
        ),
    )
    return [
        triton_aot.compile_for(capability, *launch)
        for launcher in launchers
        for launch in triton_aot.launches(*launcher, modules=(triton_kernel, triton_bwd))
        # lora_linear's, and tested there
        if launch[0].__name__ != "_sum_slices_kernel"
    ]


@pytest.fixture(scope="module")
def cubins():
    """case -> future of its Usages, made on every core at once."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=spawn) as pool:
            yield {case: pool.submit(compiled, *case) for case in CUBINS}
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


@pytest.mark.parametrize("case", CUBINS, ids=lambda c: "-".join(name(v) for v in c))
def test_compiles_without_spills(case, cubins):
    from triton_aot import SHARED, STACK

    capability, dtype = case[:2]
    found = cubins[case].result()
    for usage in found:
        print(f"sm_{capability} {name(dtype)} {usage}")
    for usage in found:
        assert usage.local == 0 and usage.stack <= STACK, usage
        assert usage.shared <= SHARED[capability], usage
        # float32 sums in float32: no matrix instruction does that
        assert (usage.instruction == "") == (dtype == torch.float32), usage

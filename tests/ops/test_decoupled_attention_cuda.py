"""CUDA kernels of decoupled_attention without a GPU: run on the host, and compiled by nvcc."""

from types import SimpleNamespace

import cuda_aot
import pytest
import torch
from cuda_aot import check_on_host
from test_decoupled_attention import backward_inputs, detached, inputs, name

from lorakern import backend
from lorakern.ops.decoupled_attention import arguments, reference
from lorakern.testing import lost_share

dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
# B, Q, heads, d, keys of each group (the text first), image groups with a mask.  More than a block
# of queries, and one; groups of one, two and four warps of keys, over the keys kept on chip, and
# of one key; whole steps of 16 and one more
SHAPES = [
    (3, 33, 2, 40, (77, 4), ()),
    (1, 70, 2, 80, (19, 16, 5), (0, 1)),
    (1, 19, 1, 160, (77, 257), ()),
    (2, 64, 1, 40, (129, 17), (0,)),
    (1, 1, 1, 80, (1, 1), ()),
    (1, 130, 1, 160, (16, 33), (0,)),
    (1, 9, 1, 80, (32,), ()),
]


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_matches_reference(shape, dtype, cuda_host):
    args = inputs(shape, dtype)
    check_on_host(cuda_host, "decoupled_attention_fwd", detached(args))
    check_on_host(cuda_host, "decoupled_attention_bwd", backward_inputs(args))


@pytest.mark.parametrize(
    "needs", [(1, 0, 1, 1), (0, 0, 0, 1), (1, 0, 0, 0), (0, 1, 0, 1), (0, 0, 0, 0)], ids=name
)
def test_only_what_is_wanted(needs, cuda_host):
    args = inputs((2, 37, 2, 40, (7, 4, 20), (1,)), torch.bfloat16)
    given = backward_inputs(args, [bool(n) for n in needs])
    check_on_host(cuda_host, "decoupled_attention_bwd", given)


@pytest.mark.parametrize("empty", [(0, 3), (2, 0)], ids=["no images", "no queries"])
def test_nothing_to_do(empty, cuda_host):
    args = inputs((*empty, 2, 40, (5, 4), ()), torch.float16)
    check_on_host(cuda_host, "decoupled_attention_fwd", detached(args))
    check_on_host(cuda_host, "decoupled_attention_bwd", backward_inputs(args))


@dtypes
def test_a_group_of_one_key_is_its_value(dtype, cuda_host):
    q, keys, values, _, _, heads = detached(inputs((2, 9, 2, 80, (1,), ()), dtype))
    out = torch.ops.lorakern_host.decoupled_attention_fwd_cuda(q, keys, values, [], [], heads)
    assert torch.equal(out, values[0].expand_as(q))


@dtypes
def test_large_scores_do_not_overflow(dtype, cuda_host):
    args = detached(inputs((1, 40, 2, 40, (20, 4), ()), dtype))
    args = (args[0] * 40, [40 * k for k in args[1]], *args[2:])
    check_on_host(cuda_host, "decoupled_attention_fwd", args)


@dtypes
def test_a_small_image_share_is_not_lost(dtype, cuda_host):
    scale = 3e-4 if dtype == torch.float16 else 2e-3
    q, keys, values, _, masks, heads = inputs((1, 512, 1, 80, (2, 4), ()), dtype)
    args = detached((q, keys, values, [scale], masks, heads))
    wide = backend.on_tensors(torch.Tensor.double, args)
    both = reference.decoupled_attention_fwd(*wide)
    text = reference.decoupled_attention_fwd(wide[0], wide[1][:1], wide[2][:1], [], [], heads)
    run = torch.ops.lorakern_host.decoupled_attention_fwd_cuda
    assert abs(lost_share(lambda: run(*args), both - text, text)) < 0.03


def test_tensors_at_any_address(cuda_host):
    args = inputs((1, 5, 1, 40, (3, 2), (0,)), torch.bfloat16)
    moved = backend.on_tensors(shifted, detached(args))
    assert all(t.data_ptr() % 16 for t in (moved[0], *moved[1], *moved[2]))
    check_on_host(cuda_host, "decoupled_attention_fwd", moved)
    dout, *rest = backward_inputs(args)
    check_on_host(cuda_host, "decoupled_attention_bwd", (shifted(dout), *moved, rest[-1]))


def shifted(t):
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


def test_what_it_does_not_take_is_named(cuda_host):
    run = torch.ops.lorakern_host.decoupled_attention_fwd_cuda
    with pytest.raises(ValueError, match="want 40, 80 or 160 channels a head, got 64"):
        run(*detached(inputs((1, 3, 2, 64, (2, 2), ()), torch.float16)))
    with pytest.raises(ValueError, match="want float16 or bfloat16, got Float"):
        run(*detached(inputs((1, 3, 2, 40, (2, 2), ()), torch.float32)))
    with pytest.raises(ValueError, match="want at most 64 groups, got 65"):
        run(*detached(inputs((1, 3, 1, 40, (1,) * 65, ()), torch.float16)))
    q, keys, *rest = detached(inputs((1, 3, 1, 40, (2, 2), ()), torch.float16))
    with pytest.raises(ValueError, match=r"value: want shape \[1, 3, 40\], got \[1, 2, 40\]"):
        run(q, [torch.cat([keys[0], q[:, :1]], 1), keys[1]], *rest)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"dtype": torch.float32}, "torch.float32: the kernel multiplies 16-bit matrices"),
        ({"shape": (1, 4, 128)}, "64 channels a head; the kernel is for 40, 80 and 160"),
        ({"device": torch.device("cpu")}, "the tensors are on cpu; this kernel is for cuda"),
        ({"keys": 65}, "65 groups are over 64"),
        ({"capability": (7, 5)}, "sm_75: the kernel needs sm_80"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_reason(change, reason, monkeypatch):
    has = {"shape": (1, 4, 160), "dtype": torch.float16, "device": torch.device("cuda"), "keys": 2}
    has = {**has, "capability": (8, 0), **change}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has["capability"])
    q = SimpleNamespace(**has)
    assert arguments.refuse_cuda(q, [None] * has["keys"], [], [], [], 2) == reason


def test_cpu_tensors_are_refused():
    args = inputs((1, 4, 1, 40, (3, 2), ()), torch.float16)
    back = backward_inputs(args)
    for op, given in (("decoupled_attention_fwd", args), ("decoupled_attention_bwd", back)):
        assert backend.why(op, *given)["cuda"].startswith("the tensors are on cpu")


@pytest.mark.skipif(cuda_aot.nvcc() is None, reason="there is no nvcc")
@pytest.mark.parametrize("way", ["fwd", "bwd"])
def test_compiles_without_spills(way, tmp_path):
    parts = {"fwd": ["fwd"], "bwd": ["dq", "dkv"]}[way]
    kernels = [
        # half goes as bfloat16
        f"decoupled_attention_{part}_kernel<__nv_bfloat16, true, {d}>"
        for part in parts
        for d in arguments.CUDA_CHANNELS
    ]
    header = f"decoupled_attention_{way}.cuh"
    for chip, found in cuda_aot.usages(header, kernels, tmp_path).items():
        assert len(found) == len(kernels)
        for usage in found:
            print(f"sm_{chip} {usage}")
            assert usage.stack == usage.spilled == 0, usage

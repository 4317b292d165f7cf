"""Right before fast: the kernels, the lorakern layer and the peers on the very case to be timed."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from bench.peers import Layer
from lorakern import backend
from lorakern.testing import assert_as_exact_as_torch, check_every_kernel, exactly, lost_share

# an update this much smaller than the weight is what a 16-bit addition loses
SMALL = 1e-3
# peers round where they please; more than this is not the same layer
PEER_RMS = 0.05
# elements of y
ENOUGH = 10_000


def check(bench: ModuleType, args: tuple, layers: dict[str, Layer]) -> tuple:
    """Put every kernel and layer to the judge on `args`.

    Returns:
        The arguments of the op's backward for this case.

    Raises:
        AssertionError: a kernel or the lorakern layer is less exact than plain torch, or a peer
            computes something else.
    """
    forward, backward = backend.OPS[bench.FORWARD], backend.OPS[bench.BACKWARD]
    same_y, h = forward.reference(*args)
    dy = torch.randn_like(same_y)
    backward_args = bench.backward_inputs(args, h, dy)
    check_every_kernel(bench.FORWARD, args)
    check_every_kernel(bench.BACKWARD, backward_args)

    exact_y, exact_h = exactly(forward.reference, *args)
    exact = exactly(backward.reference, *bench.backward_inputs(args, exact_h, dy))
    same = backward.reference(*backward_args)
    for name, layer in layers.items():
        if name == "frozen":
            continue
        x = args[0].detach().requires_grad_()
        y = layer.call(x)
        got = (y, *torch.autograd.grad(y, (x, *layer.factors), dy))
        results = zip(
            ("y", "dx", "ddown", "dup"), got, (exact_y, *exact), (same_y, *same), strict=True
        )
        for what, mine, truth, plain in results:
            # factors may be float32 masters: their gradients are judged in the layer's dtype
            mine = mine.detach().to(plain.dtype).view(plain.shape)
            if name == "lorakern":
                assert_as_exact_as_torch(f"the lorakern layer's {what}", mine, truth, plain)
            off = (mine.double() - truth).norm() / truth.norm()
            assert off <= PEER_RMS, f"{name}: {what} is {off:.1%} off, want {PEER_RMS:.0%}"
    return backward_args


@torch.no_grad()
def lost_shares(bench: ModuleType, args: tuple) -> dict[str, float]:
    """Share of a small update's effect that each layer and kernel loses; no unit.

    {} where the output is too small for the rounding errors to average out.
    """
    *before, up, scale = args[:6]
    small = (*before, up * (SMALL / scale), scale, *args[6:])
    nothing = (*before, torch.zeros_like(up), scale, *args[6:])
    forward = backend.OPS[bench.FORWARD]
    base = exactly(forward.reference, *nothing)[0]
    if base.numel() < ENOUGH:
        return {}
    delta = exactly(forward.reference, *small)[0] - base

    runs: dict[str, Callable[[], Tensor]] = {
        name: lambda layer=layer: layer.call(args[0])
        for name, layer in bench.layers(small).items()
        if name != "frozen"
    }
    kernels = {name: forward.load(name) for name in able(bench.FORWARD, args)}
    runs |= {name: lambda kernel=kernel: kernel(*small)[0] for name, kernel in kernels.items()}
    return {name: lost_share(run, delta, base) for name, run in runs.items()}


def able(op: str, args: tuple) -> list[str]:
    """Backends that run these arguments."""
    return [name for name, reason in backend.why(op, *args).items() if reason == "ok"]

"""Right before fast: the kernels, the lorakern layer and the peers on the very case to be timed."""

from collections.abc import Callable
from functools import partial
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


# cuDNN picks algorithms that give other bits each time, and TF32, which the judge should not allow
in_full = partial(torch.backends.cudnn.flags, enabled=True, deterministic=True, allow_tf32=False)


@in_full()
def check(bench: ModuleType, args: tuple, layers: dict[str, Layer]) -> tuple:
    """Put every kernel and layer to the judge on `args`.

    Returns:
        The arguments of the op's backward for this case.

    Raises:
        AssertionError: a kernel or the lorakern layer is less exact than plain torch, or a peer
            computes something else.
    """
    forward, backward = backend.OPS[bench.FORWARD], backend.OPS[bench.BACKWARD]
    same_y, h = _with_h(forward.reference(*args))
    dy = torch.randn_like(same_y)
    backward_args = bench.backward_inputs(args, h, dy)
    check_every_kernel(bench.FORWARD, args)
    check_every_kernel(bench.BACKWARD, backward_args)

    exact_y, exact_h = _with_h(exactly(forward.reference, *args))
    exact = exactly(backward.reference, *bench.backward_inputs(args, exact_h, dy))
    same = backward.reference(*backward_args)
    names = ["y", *(r.name for r in backward.torch_op._schema.returns)]
    for name, layer in layers.items():
        if not layer.factors:
            continue
        x = args[0].detach().requires_grad_()
        y = layer.call(x)
        dx, *dfactors = torch.autograd.grad(y, (x, *layer.factors), dy_of(bench, backward_args))
        got = (_joined(y), dx, *_like(dfactors, same[1:]))
        results = zip(names, got, (exact_y, *exact), (same_y, *same), strict=True)
        for what, mine, truth, plain in results:
            # asked for by nobody
            if plain.numel() == 0:
                continue
            # factors may be float32 masters: their gradients are judged in the layer's dtype
            mine = mine.detach().to(plain.dtype).view(plain.shape)
            if name == "lorakern":
                assert_as_exact_as_torch(f"the lorakern layer's {what}", mine, truth, plain)
            if what in layer.apart:
                continue
            off = (mine.double() - truth).norm() / truth.norm()
            assert off <= PEER_RMS, f"{name}: {what} is {off:.1%} off, want {PEER_RMS:.0%}"
    return backward_args


@torch.no_grad()
def lost_shares(bench: ModuleType, args: tuple) -> dict[str, float]:
    """Share of a small update's effect that each layer and kernel loses; no unit.

    {} where the output is too small for the rounding errors to average out, and for a bench of ΔW
    alone, which is added to nothing.
    """
    if not hasattr(bench, "smaller"):
        return {}
    small, nothing = bench.smaller(args, SMALL), bench.smaller(args, 0.0)
    forward = backend.OPS[bench.FORWARD]
    base = _first(exactly(forward.reference, *nothing))
    if base.numel() < ENOUGH:
        return {}
    delta = _first(exactly(forward.reference, *small)) - base

    runs: dict[str, Callable[[], Tensor]] = {
        name: lambda layer=layer: _joined(layer.call(args[0]))
        for name, layer in bench.layers(small).items()
        if layer.factors
    }
    kernels = {name: forward.load(name) for name in able(bench.FORWARD, args)}
    runs |= {name: lambda kernel=kernel: _first(kernel(*small)) for name, kernel in kernels.items()}
    return {name: lost_share(run, delta, base) for name, run in runs.items()}


def able(op: str, args: tuple) -> list[str]:
    """Backends that run these arguments."""
    return [name for name, reason in backend.why(op, *args).items() if reason == "ok"]


def dy_of(bench: ModuleType, backward_args: tuple) -> Tensor | list[Tensor]:
    """The gradient of the output, or of each, among the arguments of the op's backward."""
    return backward_args[getattr(bench, "DY", 0)]


def _joined(y: Tensor | tuple[Tensor, ...]) -> Tensor:
    return y if isinstance(y, Tensor) else torch.cat([part.flatten() for part in y])


def _with_h(results) -> tuple[Tensor, Tensor | None]:
    """y, and h of an op that keeps it for backward."""
    return (results, None) if isinstance(results, Tensor) else results


def _first(results) -> Tensor:
    return results if isinstance(results, Tensor) else results[0]


def _like(gradients: list[Tensor], results: tuple) -> list[Tensor]:
    """The gradients of the factors, cut as the backward kernel gives them."""
    flat = torch.cat([g.flatten() for g in gradients])
    parts = flat.split([r.numel() for r in results])
    return [part.view(r.shape) for part, r in zip(parts, results, strict=True)]

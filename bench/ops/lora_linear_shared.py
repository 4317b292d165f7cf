"""lora_linear_shared on the layers of Stable Diffusion 1.5 that read one input, as one module."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lorakern
from bench import peers

FORWARD, BACKWARD = "lora_linear_shared_fwd", "lora_linear_shared_bwd"
DIRECTIONS = ("fwd", "fwd+bwd")
FLOOR = "frozen"
# where the gradients of the outputs are among the arguments of backward
DY = 2


@dataclass(frozen=True)
class Case:
    """L layers of O out_features; I in_features, M rows, R rank of each."""

    L: int
    O: int  # noqa: E741
    I: int  # noqa: E741
    M: int
    R: int

    def __str__(self) -> str:
        return f"L{self.L} O{self.O} I{self.I} M{self.M} R{self.R}"


CASES = [
    # q, k and v of self-attention at 512 px, and of the inner level at 1024
    Case(3, 320, 320, 4096, 16),
    Case(3, 640, 640, 1024, 16),
    Case(3, 1280, 1280, 256, 16),
    Case(3, 1280, 1280, 1024, 16),
    # k and v of 77 text tokens
    Case(2, 320, 768, 77, 16),
    Case(2, 640, 768, 77, 16),
    Case(2, 1280, 768, 77, 16),
]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple:
    """Arguments of the op's forward; ΔW is as large as the weight, so that an error in it shows."""

    def normal(*shape: int, over: int) -> Tensor:
        return (torch.randn(*shape, generator=seed) / over**0.5).to(device, dtype)

    def each(*shape: int) -> list[Tensor]:
        return [normal(*shape, over=shape[1]) for _ in range(case.L)]

    seed = torch.Generator().manual_seed(0)
    x, weights = normal(case.M, case.I, over=1), each(case.O, case.I)
    factors = each(case.R, case.I), each(case.O, case.R)
    return x, weights, [None] * case.L, *factors, [0.5] * case.L


def smaller(args: tuple, share: float) -> tuple:
    """The same with updates of this share of the weights."""
    *before, ups, scales = args
    return *before, [up * (share / s) for up, s in zip(ups, scales, strict=True)], scales


def backward_inputs(args: tuple, h: Tensor, dy: Tensor) -> tuple:
    """Arguments of the op's backward, every gradient wanted; dy is flat, as y is."""
    x, weights, _, downs, ups, scales = args
    rows = x.shape[:-1]
    parts = dy.split([rows.numel() * len(w) for w in weights])
    dys = [part.view(*rows, len(w)) for part, w in zip(parts, weights, strict=True)]
    return x, h, dys, weights, downs, ups, scales, [True] * (1 + 2 * len(weights))


def layers(args: tuple) -> dict[str, peers.Layer]:
    """The layers as each library builds them, called one after another; lorakern also as one."""
    _, weights, biases, downs, ups, scales = args
    each = [
        peers.layers(lambda w=w, b=b: peers.linear(w, b), (down, up), len(down), scale)
        for w, b, down, up, scale in zip(weights, biases, downs, ups, scales, strict=True)
    ]
    made = {name: _joined([some[name] for some in each]) for name in each[0]}
    return made | {"lorakern": _group(args), "lorakern apart": made["lorakern"]}


def _group(args: tuple) -> peers.Layer:
    _, weights, biases, downs, ups, scales = args
    names = ("to_q", "to_k", "to_v")[-len(weights) :]
    plain = map(peers.linear, weights, biases)
    parent, rank = nn.ModuleDict(zip(names, plain, strict=True)), len(downs[0])
    made = lorakern.inject(parent, rank=rank, alpha=scales[0] * rank, targets=names).values()
    for adapter, down, up in zip(made, downs, ups, strict=True):
        adapter.down.data.copy_(down)
        adapter.up.data.copy_(up)
    return _joined([peers.Layer(a, (a.down, a.up)) for a in made])


def _joined(layers: list[peers.Layer]) -> peers.Layer:
    calls = [layer.call for layer in layers]
    # downs, then ups, as the op has them
    factors = (f for some in zip(*(layer.factors for layer in layers), strict=True) for f in some)
    return peers.Layer(lambda x: tuple(call(x) for call in calls), tuple(factors))

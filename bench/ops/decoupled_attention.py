"""decoupled_attention in cross-attention layers of Stable Diffusion 1.5 and XL, two images a batch.

The floor is no frozen layer but diffusers' arithmetic: a fused attention for the text and one for
each image, which are scaled and added.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import Layer
from lorakern.functional import decoupled_attention
from lorakern.ops.decoupled_attention.reference import join, split

FORWARD, BACKWARD = "decoupled_attention_fwd", "decoupled_attention_bwd"
DIRECTIONS = ("infer", "fwd+bwd")
FLOOR = "diffusers"


@dataclass(frozen=True)
class Case:
    """Q queries, H heads of d channels, tokens of the image groups beside 77 of text."""

    Q: int
    H: int
    d: int
    images: tuple[int, ...]
    masked: bool = False

    def __str__(self) -> str:
        groups = "+".join(map(str, (77, *self.images)))
        return f"Q{self.Q} H{self.H} d{self.d} T{groups}" + " masked" * self.masked


# SD 1.5 at 512 px has the first four, at 768 and 1024 px the next; SDXL at 512 and 1024 px the last
LAYERS = [
    (4096, 8, 40), (1024, 8, 80), (256, 8, 160), (64, 8, 160),
    (9216, 8, 40), (2304, 8, 80), (576, 8, 160), (144, 8, 160),
    (16384, 8, 40), (4096, 8, 80), (1024, 8, 160),
    (1024, 10, 64), (256, 20, 64), (4096, 10, 64), (1024, 20, 64),
]  # fmt: skip
# IP-Adapter, -Plus, Full Face; two adapters; three images of one adapter under masks
IMAGES = [((4,), False), ((16,), False), ((257,), False), ((16, 16), False), ((4, 4, 4), True)]
CASES = [Case(*layer, *images) for layer in LAYERS for images in IMAGES]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple:
    """Arguments of the op's forward."""

    def normal(tokens: int) -> Tensor:
        return torch.randn(2, tokens, case.H * case.d, generator=seed).to(device, dtype)

    seed = torch.Generator().manual_seed(0)
    q, *keys = (normal(n) for n in (case.Q, 77, *case.images))
    values = [normal(n) for n in (77, *case.images)]
    masks = [
        torch.rand(1, case.Q, generator=seed).to(device, dtype) if case.masked else None
        for _ in case.images
    ]
    return q, keys, values, [0.6] * len(case.images), masks, case.H


def smaller(args: tuple, share: float) -> tuple:
    """The same with images of this scale."""
    return *args[:3], [share] * len(args[3]), *args[4:]


def backward_inputs(args: tuple, _: None, dout: Tensor) -> tuple:
    """Arguments of the op's backward: gradients of q and of the images' keys and values."""
    return dout, *args, [True, False, *[True] * len(args[3])]


def layers(args: tuple) -> dict[str, Layer]:
    """The attention on the images' trained keys and values."""
    _, keys, values, scales, masks, heads = args
    k, v = ([t[0], *(i.detach().requires_grad_() for i in t[1:])] for t in (keys, values))
    trained = (*k[1:], *v[1:])

    def ours(q: Tensor) -> Tensor:
        return decoupled_attention(q, k, v, scales, masks, heads=heads)

    def theirs(q: Tensor) -> Tensor:
        q = split(q, heads)
        out, *parts = (
            join(F.scaled_dot_product_attention(q, split(a, heads), split(b, heads)))
            for a, b in zip(k, v, strict=True)
        )
        for part, scale, mask in zip(parts, scales, masks, strict=True):
            out = out + scale * (part if mask is None else part * mask[..., None])
        return out

    return {FLOOR: Layer(theirs, trained), "lorakern": Layer(ours, trained)}

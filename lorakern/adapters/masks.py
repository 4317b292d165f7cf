"""Which numbers dropout multiplies by 0 in training: four projects, four definitions.

peft: the input of down. kohya: the output of down, h; ranks of h, anew for each sample. lycoris:
rows of ΔW, whatever the algorithm. bypass, LyCORIS with bypass_mode: the update's output; ranks of
h, the same for all samples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MODES = ("peft", "kohya", "lycoris", "bypass")


@dataclass(frozen=True)
class Masks:
    """What a LoRA drops between its input and its output; see the modes above.

    Args:
        p: probability of a zero in x, h or the output.
        mode: "peft", "kohya" or "bypass".
        rank_p: probability of a zero for a rank of h.
        rank_scale: bypass divides the mask of ranks by its mean; kohya always by 1 - rank_p.
    """

    p: float
    mode: str
    rank_p: float = 0.0
    rank_scale: bool = False

    def on(self, where: str, t: Tensor, seed: int | None) -> Tensor:
        """t, dropped when `where` ("peft" for x, "kohya" for h, "bypass" for the output) is it."""
        return t * mask(t, self.p, seed) if self.p and where == self.mode else t

    def on_ranks(self, h: Tensor, groups: int, axis: int, seed: int | None) -> Tensor:
        """h with ranks along `axis` dropped; `groups` times the ranks, each group alike."""
        if not self.rank_p:
            return h
        axis %= h.dim()
        samples = h.shape[0] if self.mode == "kohya" and axis else 1
        ranks = h.new_empty(samples, 1, h.shape[axis] // groups)
        kept = mask(ranks, self.rank_p, None if seed is None else seed ^ 1)
        if self.mode == "bypass":
            kept = kept * (1 - self.rank_p)
            kept = over_mean(kept) if self.rank_scale else kept
        shape = [samples] + [1] * (h.dim() - 1)
        shape[axis] = h.shape[axis]
        return h * kept.expand(-1, groups, -1).reshape(shape)


def rows(count: int, p: float, scaled: bool, device: torch.device) -> Tensor:
    """[count] of 0 with probability p, else 1; or, scaled, divided by its mean."""
    kept = (torch.rand(count, device=device) >= p).float()
    return over_mean(kept) if scaled else kept


def over_mean(kept: Tensor) -> Tensor:
    """A mask divided by its mean, as LyCORIS does; of zeros alone it stays."""
    return kept / kept.mean().clamp_min(torch.finfo(kept.dtype).tiny)


def mask(like: Tensor, p: float, seed: int | None) -> Tensor:
    """0 with probability p, else 1 / (1 - p), in like's shape and dtype; a seed's is always one."""
    if seed is None:
        return torch.nn.functional.dropout(torch.ones_like(like), p)
    generator = torch.Generator(like.device).manual_seed(seed)
    # drawn apart from like's dtype and strides, which backward may not share
    kept = torch.empty(like.shape, dtype=torch.bool, device=like.device)
    return kept.bernoulli_(1 - p, generator=generator).to(like.dtype).div_(1 - p)

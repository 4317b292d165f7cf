"""How like a subject pictures are, in the eyes of the model that ships: no other model is needed.

A frozen diffusion UNet describes what it sees in its middle block (Tang et al. 2023,
arXiv:2306.03881); here the description of a lightly noised picture, averaged over noises.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorakern.diffusion import noisy_latent
from lorakern.models import Base

# light noise: enough to be in the range the UNet was trained on
STEPS = (100, 250)
NOISES = 4


class Likeness:
    """Mean over pictures of the largest cosine to any picture of the subject; 1 is the same.

    Descriptions are taken from the mean of other pictures, so that what all have in common does not
    count: a picture no more like the subject than those scores about 0.

    Args:
        base: the frozen model without adapters.
        subject: its pictures.
        others: pictures of anything.
    """

    def __init__(self, base: Base, subject: list[Image.Image], others: list[Image.Image]):
        self.base = base
        self.origin = self._describe(others).mean(0)
        self.subject = self._describe(subject) - self.origin
        alike = _cosines(self.subject, self.subject)
        alike.fill_diagonal_(-1)
        self.ceiling = alike.amax(1).mean().item()

    def __call__(self, pictures: list[Image.Image]) -> float:
        return _cosines(self._describe(pictures) - self.origin, self.subject).amax(1).mean().item()

    @torch.no_grad()
    def _describe(self, pictures: list[Image.Image]) -> Tensor:
        """[B, C·H·W] of the middle block."""
        base = self.base
        pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
        x0, _ = base.encode_image(pixels.float() / 127.5 - 1)
        context = base.encode_text(base.tokens("")[None])[0].expand(len(pictures), -1, -1)
        found: list[Tensor] = []
        hook = base.unet.mid_block.register_forward_hook(lambda *call: found.append(call[2]))
        rng = torch.Generator().manual_seed(0)
        try:
            for step in STEPS:
                t = torch.full((len(pictures),), step)
                for _ in range(NOISES):
                    noise = torch.randn(x0.shape[1:], generator=rng).expand_as(x0)
                    base.unet(noisy_latent(x0, noise, base.alpha_bars[t]), t, context)
        finally:
            hook.remove()
        return torch.stack(found).mean(0).flatten(1)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).mT

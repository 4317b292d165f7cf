"""Formulas of diffusion training: one a function, in the papers' symbols.

x₀ is a clean latent [B, C, H, W], ε the noise, ᾱ_t the share of x₀'s variance that is left at
step t: x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε. Everything here is plain torch on tensors of any device.
"""

import hashlib
import math

import torch
from torch import Tensor

PREDICTS = {"epsilon": "noise", "v_prediction": "velocity"}


def like(per_image: Tensor, latent: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1], on the latent's device and in its dtype."""
    return per_image.to(latent).view(-1, *(1,) * (latent.dim() - 1))


def noisy_latent(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = √ᾱ x₀ + √(1-ᾱ) ε. Ho et al. 2020, arXiv:2006.11239, equation 4.

    Args:
        x0, noise: [B, C, H, W]; noise is standard normal.
        alpha_bar: [B], between 0 and 1; no unit.

    Returns:
        [B, C, H, W] in x0's dtype.
    """
    alpha_bar = like(alpha_bar, x0)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def velocity(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """v = √ᾱ ε - √(1-ᾱ) x₀. Salimans & Ho 2022, arXiv:2202.00512.

    Args and result as `noisy_latent`.
    """
    alpha_bar = like(alpha_bar, x0)
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0


def target(x0: Tensor, noise: Tensor, alpha_bar: Tensor, *, predicts: str) -> Tensor:
    """What the UNet should output: ε, or v.

    Args:
        predicts: "noise" or "velocity"; the rest as `noisy_latent`.

    Raises:
        ValueError: another name.
    """
    if predicts == "noise":
        return noise
    if predicts == "velocity":
        return velocity(x0, noise, alpha_bar)
    raise ValueError(f"predicts must be noise or velocity, got {predicts!r}")


def snr(alpha_bar: Tensor) -> Tensor:
    """Signal-to-noise ratio ᾱ / (1-ᾱ), as a ratio of variances; 0 at pure noise."""
    return alpha_bar / (1 - alpha_bar)


def min_snr_weight(alpha_bar: Tensor, gamma: float = 5.0, *, predicts: str = "noise") -> Tensor:
    """Loss weight per image: min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v.

    Args:
        alpha_bar: [B]; 0 (zero terminal SNR) has the limit, 1 for ε and 0 for v.
        gamma: SNR above which the weight stops growing; no unit.
        predicts: what the UNet outputs, "noise" or "velocity".

    Returns:
        [B], in alpha_bar's dtype.

    Raises:
        ValueError: another name.

    Source: Hang et al. 2023, arXiv:2303.09556.
    """
    ratio = snr(alpha_bar)
    if predicts == "noise":
        return (gamma / ratio).clamp(max=1)
    if predicts == "velocity":
        return ratio.clamp(max=gamma) / (ratio + 1)
    raise ValueError(f"predicts must be noise or velocity, got {predicts!r}")


def loss(
    predicted: Tensor, wanted: Tensor, alpha_bar: Tensor, *, predicts: str, gamma: float | None
) -> Tensor:
    """mean over images of w(ᾱ) · mean((predicted - wanted)²); the sums are in float32.

    Args:
        predicted: [B, C, H, W], the UNet's output, any floating dtype.
        wanted: [B, C, H, W], the `target`.
        alpha_bar: [B].
        predicts: "noise" or "velocity".
        gamma: of `min_snr_weight`; None for w = 1.

    Returns:
        A float32 scalar.
    """
    per_image = (predicted.float() - wanted.float()).square().flatten(1).mean(1)
    if gamma is None:
        return per_image.mean()
    weight = min_snr_weight(alpha_bar, gamma, predicts=predicts).to(per_image)
    return (weight * per_image).mean()


def seed_of(*parts: int | str) -> int:
    """63 bits that depend on every part: the randomness of a step, from its number alone."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw(seed: int, index: int, shape: torch.Size, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The random part of one batch, a pure function of its arguments; made on the CPU.

    Args:
        seed: of the run.
        index: of the batch, counted from the start of training.
        shape: of the latent, [B, C, H, W].
        steps: of the noise schedule.

    Returns:
        t: [B] int64, uniform in [0, steps).
        noise: [2, B, C, H, W] float32, standard normal: one to sample x₀ from its
            distribution, one to add to it.
        chance: [B] float32, uniform in [0, 1): a caption is dropped below the dropout rate.
    """
    rng = torch.Generator().manual_seed(seed_of(seed, "batch", index))
    t = torch.randint(steps, (shape[0],), generator=rng)
    noise = torch.randn(2, math.prod(shape), generator=rng).view(2, *shape)
    return t, noise, torch.rand(shape[0], generator=rng)

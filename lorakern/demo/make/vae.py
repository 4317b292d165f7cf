"""The autoencoder: 64 x 64 RGB <-> 4 x 16 x 16 latents of zero mean and unit variance.

Stage 1 trains encoder and decoder on all the artwork but the held-out concepts, on white and
coloured grounds. Stage 2 (`tune_decoder`) freezes the latents and repairs the decoder, while the
UNet's data stay valid.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from .artwork import load
from .concepts import concepts
from .training import Average, Log, warm_stable_decay

CONFIG = {
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": 64,
    "scaling_factor": 1.0,
    "force_upcast": False,
}


# animals, food, travel, activities, objects
OBJECT_GROUPS = range(3, 8)


class Pictures:
    """Random training batches: pictures on white or flat grounds, flipped, channels permuted."""

    def __init__(self, work: Path):
        pictures, rows = load(work)
        names = concepts()
        self.pictures = torch.from_numpy(pictures)
        self.weights = torch.tensor([self.weight(row, names) for row in rows])

    @staticmethod
    def weight(row: dict, names: dict[str, str]) -> float:
        """How often a picture is drawn: never if held out, most often if the UNet learns it."""
        if row["held_out"]:
            return 0.0
        if row["label"] in names:
            return 4.0
        return 2.0 if row["group"] in OBJECT_GROUPS else 1.0

    def batch(self, size: int) -> torch.Tensor:
        """float32 [size, 3, 64, 64] in [-1, 1]."""
        rgba = self.pictures[torch.multinomial(self.weights, size)].float().div_(255)
        rgba = rgba.permute(0, 3, 1, 2)
        for index in torch.nonzero(torch.rand(size) < 0.25).flatten().tolist():
            rgba[index] = rgba[index, [*torch.randperm(3).tolist(), 3]]
        grounds = torch.rand(size, 3, 1, 1)
        grounds[torch.rand(size) < 0.5] = 1.0
        images = rgba[:, :3] * rgba[:, 3:] + grounds * (1 - rgba[:, 3:])
        flipped = torch.where(torch.rand(size, 1, 1, 1) < 0.5, images.flip(-1), images)
        return (flipped * 2 - 1).contiguous(memory_format=torch.channels_last)


def read(folder: Path) -> AutoencoderKL:
    """The autoencoder of a folder, its configuration free of the folder's name."""
    vae = AutoencoderKL(**CONFIG)
    vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return vae.eval()


def _edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


def reconstruction_loss(made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """L1 + MSE + half the L1 of the edges + half the L1 of the 4 x pooled difference."""
    difference = made - real
    edges = sum(F.l1_loss(a, b) for a, b in zip(_edges(made), _edges(real), strict=True))
    coarse = F.avg_pool2d(difference, 4).abs().mean()
    return difference.abs().mean() + difference.square().mean() + 0.25 * edges + 0.5 * coarse


def _train(vae, parameters, forward, pictures, steps, batch, lr, decay_from, name):
    optimizer = torch.optim.AdamW(
        parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
    )
    average, log = Average(vae, 0.995), Log(name)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_stable_decay(step, 40, decay_from, steps)
        loss = forward(pictures.batch(batch))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(vae)
        log(step, loss.detach())
    vae.load_state_dict(average.state)
    return vae.eval()


def train(
    work: Path, cycles: tuple[int, ...] = (1100, 700), batch: int = 16, lr: float = 2e-3
) -> AutoencoderKL:
    """Stage 1, in cycles of steps; each ends with the latents' statistics folded in."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**CONFIG)
    for index, steps in enumerate(cycles):
        vae = train_cycle(vae, work, index, steps, batch, lr)
    return vae


def train_cycle(
    vae: AutoencoderKL, work: Path, index: int, steps: int, batch: int, lr: float
) -> AutoencoderKL:
    """One rise and fall of the learning rate on encoder and decoder."""
    torch.manual_seed(10 * index)
    pictures = Pictures(work)
    vae = vae.to(memory_format=torch.channels_last).train()

    def forward(images):
        posterior = vae.encode(images).latent_dist
        made = vae.decode(posterior.sample()).sample
        mean, logvar = posterior.mean, posterior.logvar
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(made, images) + 2e-4 * kl

    _train(vae, list(vae.parameters()), forward, pictures, steps, batch, lr, steps // 2, "vae")
    return normalise(vae, torch.cat([pictures.batch(64) for _ in range(16)]))


@torch.no_grad()
def normalise(vae: AutoencoderKL, images: torch.Tensor) -> AutoencoderKL:
    """Folds mean and deviation of each latent channel into the two 1 x 1 convolutions.

    Afterwards `scaling_factor` 1 gives latents of zero mean and unit variance with no further code.
    """
    means = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])
    shift, scale = means.mean((0, 2, 3)), means.std((0, 2, 3))
    post = vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ shift
    post.weight *= scale[None, :, None, None]
    quant, channels = vae.quant_conv, len(scale)
    quant.weight[:channels] /= scale[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - shift) / scale
    quant.bias[channels:] -= 2 * scale.log()
    return vae


def tune_decoder(vae: AutoencoderKL, work: Path, steps: int = 700) -> AutoencoderKL:
    """Stage 2: the decoder alone, on frozen latents with a little noise."""
    torch.manual_seed(1)
    pictures = Pictures(work)
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]

    def forward(images):
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mean
        latents = latents + 0.05 * torch.randn_like(latents)
        return reconstruction_loss(vae.decode(latents).sample, images)

    decay_from = int(0.3 * steps)
    return _train(vae, parameters, forward, pictures, steps, 16, 1e-3, decay_from, "decoder")


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Latents [N, 4, 16, 16] float16 of images [N, 3, 64, 64] in [-1, 1]."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)]).half()


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of the reconstruction of images in [-1, 1]."""
    made = torch.cat([vae.decode(encode(vae, part).float()).sample for part in images.split(64)])
    error = (made.clamp(-1, 1) - images).div(2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def on_white(pictures: np.ndarray) -> torch.Tensor:
    """float32 [N, 3, 64, 64] in [-1, 1] of RGBA pictures on a white ground."""
    rgba = torch.from_numpy(pictures).float().div(255).permute(0, 3, 1, 2)
    return (rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:]) * 2 - 1

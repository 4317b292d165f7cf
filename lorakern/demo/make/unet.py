"""The text encoder and the UNet, trained together from scratch on the latents of `variants`.

v-prediction; the draw of the kind of row is MIX; 10 % of the captions are empty, for guidance. The
schedule and the random draws go by steps, so a run that was stopped and resumed gives the same bits
as a straight one.
"""

import json
import random
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .muon import Muon, share
from .tokenizer import MAX_LENGTH
from .training import Average, Log, save_checkpoint, warm_stable_decay
from .vae import encode, read
from .variants import Row, build, caption

UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 96, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": 128,
    "hidden_act": "quick_gelu",
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.018,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": True,
}
MIX = {"plain": 0.62, "ground": 0.12, "colour": 0.16, "both": 0.1}
EMPTY = 0.1
PEAK_RATES = (4e-3, 1e-3)


def models(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """The two networks, freshly drawn."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ids, **TEXT
    )
    return CLIPTextModel(config), UNet2DConditionModel(**UNET)


class Latents:
    """Every training image as a latent, drawn by kind with a fresh caption."""

    def __init__(self, work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer):
        path = work / "latents.pt"
        if path.exists():
            stored = torch.load(path, weights_only=True)
            self.latents, rows = stored["latents"], json.loads(stored["rows"])
            self.rows = [Row(**row) for row in rows]
        else:
            images, self.rows = build(work)
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
            parts = [encode(vae, part.float() / 127.5 - 1) for part in pixels.split(256)]
            self.latents = torch.cat(parts)
            rows = json.dumps([asdict(row) for row in self.rows])
            torch.save({"latents": self.latents, "rows": rows}, path)
        kinds = [row.kind for row in self.rows]
        self.by_kind = {kind: [i for i, its in enumerate(kinds) if its == kind] for kind in MIX}
        self.tokenizer, self.rng = tokenizer, random.Random(0)

    def tokens(self, captions: list[str]) -> torch.Tensor:
        padding = {"padding": "max_length", "max_length": MAX_LENGTH, "truncation": True}
        return torch.tensor(self.tokenizer(captions, **padding).input_ids)

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents float32 [size, 4, 16, 16] and tokens int64 [size, MAX_LENGTH]."""
        kinds = self.rng.choices(list(MIX), weights=list(MIX.values()), k=size)
        picks = [self.rng.choice(self.by_kind[kind]) for kind in kinds]
        captions = [caption(self.rows[pick], self.rng) for pick in picks]
        captions = ["" if self.rng.random() < EMPTY else words for words in captions]
        return self.latents[picks].float(), self.tokens(captions)


class Diffusion:
    """Noise levels of the scheduler, and the v-prediction loss on them."""

    def __init__(self):
        alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod
        self.signal, self.noise = alphas.sqrt(), (1 - alphas).sqrt()

    def loss(self, unet, latents: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Mean squared error of v = signal noise - sigma latents; early times are drawn more."""
        count = len(latents)
        spread = (torch.arange(count) + torch.rand(count)) / count
        times = (spread.pow(1.2) * len(self.signal)).long().clamp_max(len(self.signal) - 1)
        signal, sigma = (part[times, None, None, None] for part in (self.signal, self.noise))
        noise = torch.randn_like(latents)
        noisy = signal * latents + sigma * noise
        made = unet(
            noisy.contiguous(memory_format=torch.channels_last), times, context, return_dict=False
        )[0]
        return F.mse_loss(made, signal * noise - sigma * latents)


def optimizers(networks: nn.ModuleDict) -> list[torch.optim.Optimizer]:
    """Muon for the inner matrices and kernels; AdamW for embeddings, edges and vectors."""
    inner, outer = [], []
    for name, weight in networks.named_parameters():
        at_the_edge = any(part in name for part in ("embedding", "conv_in", "conv_out"))
        (outer if at_the_edge or weight.ndim < 2 else inner).append(weight)
    muon_rate, adamw_rate = PEAK_RATES
    adamw = torch.optim.AdamW(outer, lr=adamw_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    return [Muon(inner, lr=muon_rate), adamw]


def train(
    work: Path,
    steps: int,
    decay_from: int,
    batch: int = 64,
    *,
    rank: int = 0,
    ranks: int = 1,
    resume: bool = False,
    save_every: int = 100,
) -> None:
    """Trains from scratch or on from WORK/unet.pt; writes the same file.

    Args:
        work: folder with `vae` and `tokenizer`.
        steps: the step at which the learning rate reaches 0.
        decay_from: the step from which it goes down.
        batch: images a step, of all processes together.
        rank: this process, of `ranks` that average their gradients through WORK/meeting.
        resume: start from the networks, optimizers and averages of WORK/unet.pt.
    """
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    data, diffusion = Latents(work, read(work / "vae"), tokenizer), Diffusion()
    text, unet = models(tokenizer)
    networks = nn.ModuleDict({"text": text, "unet": unet}).to(memory_format=torch.channels_last)
    parts, average, first = optimizers(networks), Average(networks, 0.995), 0
    if resume:
        stored = torch.load(work / "unet.pt", weights_only=True)
        networks.load_state_dict(stored["networks"])
        average.state, average.count = stored["average"], stored["step"]
        for part, state in zip(parts, stored["optimizers"], strict=True):
            part.load_state_dict(state)
        first = stored["step"]
    if ranks > 1:
        meeting = f"file://{(work / 'meeting').resolve()}"
        dist.init_process_group("gloo", meeting, rank=rank, world_size=ranks)
    groups = [group for part in parts for group in part.param_groups]
    weights = list(networks.parameters())
    log = Log(f"unet rank {rank}", every=25)
    for step in range(first, steps):
        # a step's draws depend on its number alone, so a resumed run gives the same bits
        data.rng.seed(ranks * step + rank)
        torch.manual_seed(ranks * step + rank)
        factor = warm_stable_decay(step, 100, decay_from, steps)
        for group, peak in zip(groups, PEAK_RATES, strict=True):
            group["lr"] = peak * factor
        latents, tokens = data.batch(batch // ranks)
        loss = diffusion.loss(unet, latents, text(tokens).last_hidden_state)
        networks.zero_grad(set_to_none=True)
        loss.backward()
        share([weight.grad for weight in weights if weight.grad is not None], average=True)
        nn.utils.clip_grad_norm_(weights, 1.0)
        for part in parts:
            part.step()
        if rank == 0:
            average.update(networks)
        log(step, loss.detach())
        if rank == 0 and ((step + 1) % save_every == 0 or step + 1 == steps):
            states = [part.state_dict() for part in parts]
            save_checkpoint(
                work / "unet.pt",
                networks=networks.state_dict(),
                average=average.state,
                optimizers=states,
                step=step + 1,
            )

"""Puts the trained parts together as a diffusers folder with float16 safetensors."""

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from .tokenizer import MAX_LENGTH
from .unet import SCHEDULER, models


def pipeline(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, weights: dict[str, torch.Tensor]
) -> StableDiffusionPipeline:
    """The float32 pipeline of a VAE, a tokenizer and the state of `text.*` and `unet.*`.

    Positions behind the trained ones repeat the last trained one, so that 77 tokens work too.
    """
    text, unet = models(tokenizer)
    for prefix, network in (("text.", text), ("unet.", unet)):
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        network.load_state_dict(own)
    with torch.no_grad():
        for name, table in text.named_parameters():
            if name.endswith("position_embedding.weight"):
                table[MAX_LENGTH:] = table[MAX_LENGTH - 1]
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def write(pipe: StableDiffusionPipeline, tokenizer_folder: Path, folder: Path) -> int:
    """Saves in float16 with vocab.json and merges.txt; returns the bytes of all weights.

    The text encoder's keys begin with `text_model.`, which every version of transformers reads.
    """
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    path = folder / "text_encoder" / "model.safetensors"
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    files = list(folder.rglob("*.safetensors"))
    for path in files:
        path.chmod(0o644)
    return sum(path.stat().st_size for path in files)

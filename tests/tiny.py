"""A random Stable Diffusion of a few thousand weights, and a folder of pictures to train it on."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}


def unet_config(**changes) -> dict:
    return {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    } | changes


def text_encoder(hidden: int = 32, projection: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=1000, hidden_size=hidden, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, projection_dim=hidden,
        bos_token_id=998, eos_token_id=999, pad_token_id=999,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def tokenizer(folder: Path):
    """CLIP's byte symbols and no merges: a token is a letter."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    vocab = {s: i for i, s in enumerate([*symbols, *(f"{s}</w>" for s in symbols)])}
    vocab |= {"<|startoftext|>": 998, "<|endoftext|>": 999}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    made = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    made.model_max_length = 16
    return made


def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16, mid_block_add_attention=False,
    )  # fmt: skip


def scheduler(prediction_type: str = "epsilon"):
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip


def pipeline(folder: Path, prediction_type: str = "epsilon"):
    """A StableDiffusionPipeline of 16 x 16 pixels; always the same weights."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=text_encoder(), tokenizer=tokenizer(folder / "tokenizer"),
        unet=UNet2DConditionModel(**unet_config()), scheduler=scheduler(prediction_type),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def pipeline_xl(folder: Path):
    """A StableDiffusionXLPipeline of 16 x 16 pixels; always the same weights."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **unet_config(
            cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32, transformer_layers_per_block=(1, 1),
        )
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=text_encoder(), text_encoder_2=text_encoder(projection=True),
        tokenizer=tokenizer(folder / "one"), tokenizer_2=tokenizer(folder / "two"),
        unet=unet, scheduler=scheduler(), add_watermarker=False,
    )  # fmt: skip


def saved(folder: Path, **options) -> Path:
    """`pipeline`, as a diffusers folder; made once per folder."""
    model = folder / "model"
    if not model.exists():
        pipeline(folder / "parts", **options).save_pretrained(model)
    return model


def images(folder: Path, count: int = 3, size: tuple[int, int] = (16, 16)) -> Path:
    """Coloured pictures with noise, each with its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        name, colour = list(COLOURS.items())[i % len(COLOURS)]
        pixels = rng.normal(colour, 20, (size[1], size[0], 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}-{name}.png")
        (folder / f"{i}-{name}.txt").write_text(f"a {name} square", encoding="utf-8")
    return folder

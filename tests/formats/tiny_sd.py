"""Tiny random models of the Stable Diffusion 1 and XL families."""

import functools

import pytest
import safetensors.torch
import torch
from torch import nn

import lorakern

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")


def make_unet(sdxl: bool = False, layers_per_block: int = 1):
    torch.manual_seed(0)
    shape = dict(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=layers_per_block,
        norm_num_groups=8, attention_head_dim=8,
    )  # fmt: skip
    if not sdxl:
        return diffusers.UNet2DConditionModel(
            block_out_channels=(16, 32), cross_attention_dim=24,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **shape,
        )  # fmt: skip
    return diffusers.UNet2DConditionModel(
        block_out_channels=(16, 16, 32), cross_attention_dim=40,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8, **shape,
    )  # fmt: skip


def make_text_encoder(width: int = 24, projection: bool = False):
    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        vocab_size=100, hidden_size=width, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, projection_dim=16,
        bos_token_id=98, eos_token_id=99, pad_token_id=0,
    )  # fmt: skip
    if projection:
        return transformers.CLIPTextModelWithProjection(config).eval()
    return transformers.CLIPTextModel(config).eval()


def make_pipeline(sdxl: bool = False):
    """A whole pipeline, always of the same weights; without tokenizers, it takes embeddings."""
    unet, text = make_unet(sdxl), make_text_encoder()
    torch.manual_seed(2)
    vae = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=8, sample_size=8,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    common = dict(unet=unet, text_encoder=text, vae=vae, scheduler=scheduler, tokenizer=None)
    if sdxl:
        pipeline = diffusers.StableDiffusionXLPipeline(
            text_encoder_2=make_text_encoder(16, projection=True), tokenizer_2=None, **common
        )
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            safety_checker=None, feature_extractor=None, requires_safety_checker=False, **common
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def parts(pipeline) -> dict:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {n: getattr(pipeline, n) for n in names if getattr(pipeline, n, None) is not None}


@torch.no_grad()
def outputs(pipeline) -> dict[str, torch.Tensor]:
    """What each component answers to fixed inputs, and the image drawn from the text states."""
    made = torch.Generator().manual_seed(7)
    ids = torch.randint(1, 98, (2, 16), generator=made)
    ids[:, -1] = 99
    found = {}
    states = []
    for name, encoder in parts(pipeline).items():
        if name != "unet":
            answer = encoder(ids)
            states.append(answer.last_hidden_state)
            found[name] = states[-1]
    width = pipeline.unet.config.cross_attention_dim
    latents = torch.randn(2, 4, 8, 8, generator=made)
    extra = {}
    if len(states) == 2:
        pooled = answer.text_embeds
        found["projection"] = pooled
        extra = {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": 0 * pooled}
    text = torch.cat(states, -1)
    assert text.shape[-1] == width
    found["image"] = torch.from_numpy(
        pipeline(
            prompt_embeds=text, negative_prompt_embeds=0 * text, latents=latents,
            num_inference_steps=2, height=8, width=8, output_type="np", **extra,
        ).images
    )  # fmt: skip
    return found


def adapted(sdxl: bool = False, **options):
    """A pipeline with a trained-looking adapter on every layer."""
    pipeline = make_pipeline(sdxl)
    for module in parts(pipeline).values():
        lorakern.inject(module, **({"targets": "full", "rank": 4, "alpha": 2.0} | options))
        randomise(module)
    return pipeline


def adapters_of(pipeline) -> dict:
    return {
        f"{name}.{path}": stack[0]
        for name, module in parts(pipeline).items()
        for path, stack in lorakern.adapters.find(module).items()
    }


def randomise(module: nn.Module, scale: float = 0.1) -> None:
    made = torch.Generator().manual_seed(3)
    for stack in lorakern.adapters.find(module).values():
        for adapter in stack:
            for name in adapter.factors:
                factor = getattr(adapter, name).data
                noise = torch.randn(factor.shape, generator=made)
                if name == "magnitude":
                    # of the weight's own size, which it multiplies
                    factor.mul_(1 + 0.2 * noise.tanh())
                else:
                    factor.copy_(torch.tensor(1.5) if name == "scalar" else scale * noise)


@functools.cache
def untouched(sdxl: bool) -> dict[str, torch.Tensor]:
    """The outputs without any adapter."""
    return outputs(make_pipeline(sdxl))


def assert_same(got: dict, want: dict, sdxl: bool = False) -> None:
    """Equal within 1e-5, where the adapter itself moves each output by far more."""
    base = untouched(sdxl)
    for name, answer in want.items():
        moved = (answer - base[name]).abs().max()
        assert moved > 1e-2, f"{name}: the adapter moves it by {moved:.1e} only"
        off = (got[name] - answer).abs().max()
        assert off <= 1e-5, f"{name}: off by {off:.2e}, the adapter moves it by {moved:.1e}"


def write(path, tensors: dict, metadata: dict | None = None) -> None:
    """A safetensors file as given, for the files that `save` would not write."""
    safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata)


@torch.no_grad()
def unet_answer(unet) -> torch.Tensor:
    made = torch.Generator().manual_seed(8)
    x, text = torch.randn(1, 4, 8, 8, generator=made), torch.randn(1, 3, 24, generator=made)
    return unet(x, 3, text).sample


class Net(nn.Module):
    """A module of no known component: every kind of layer, and names that end alike."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.words = nn.Embedding(20, 6)
        self.proj = nn.Linear(6, 10)
        self.inner = nn.ModuleDict({"proj": nn.Linear(10, 10), "out": nn.Linear(10, 5)})
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)

    def forward(self, ids, picture):
        x = self.proj(self.words(ids)).tanh()
        return self.inner["out"](x + self.inner["proj"](x)), self.conv(picture)


@torch.no_grad()
def net_answer(net):
    ids, picture = torch.arange(20).view(4, 5), torch.linspace(-1, 1, 2 * 49).view(1, 2, 7, 7)
    return net(ids, picture)

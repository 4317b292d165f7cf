"""The frozen model that is trained on: loaded, asked for text and latents, and drawn with.

Stable Diffusion 1, 2 and XL as diffusers pipelines. diffusers and transformers are imported here,
on first use, and nowhere else in the trainer.
"""

import gc
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import lorakern
from lorakern.diffusion import PREDICTS
from lorakern.formats import storage

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
# pictures that are drawn together
AT_ONCE = 4
# of no use in training, and the safety checker is 1.2 GB
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")


class Base:
    """A pipeline and what training needs to know of it.

    Attributes:
        pipe: the diffusers pipeline; `unet`, `vae` and `text_encoders` are its parts.
        alpha_bars: [steps] float32, ᾱ_t of the scheduler's noise schedule.
        predicts: "noise" or "velocity".
        bucket_step: image sizes are multiples of it, in pixels.
        xl: whether there are two text encoders, a pooled text and sizes as conditions.
        zero_empty: whether no caption means zeros (some XL), not the text of an empty one.
    """

    def __init__(self, pipe: Any, *, xl: bool):
        from diffusers import DDPMScheduler

        self.pipe, self.unet, self.vae, self.xl = pipe, pipe.unet, pipe.vae, xl
        self.alpha_bars = DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod.float()
        kind = pipe.scheduler.config.prediction_type
        if kind not in PREDICTS:
            raise ValueError(f"the model predicts {kind!r}; want one of {', '.join(PREDICTS)}")
        self.predicts = PREDICTS[kind]
        settings = getattr(pipe, "config", {})
        self.zero_empty = xl and settings.get("force_zeros_for_empty_prompt", False)
        factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        self.bucket_step = factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
        self.latent_factor = factor

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """Component name -> text encoder."""
        names = ("text_encoder", "text_encoder_2")
        return {n: getattr(self.pipe, n) for n in names if getattr(self.pipe, n, None) is not None}

    def tokens(self, caption: str) -> Tensor:
        """[encoders, T] int64: the caption's token ids, padded and cut as the pipeline does."""
        names = ("tokenizer", "tokenizer_2") if self.xl else ("tokenizer",)
        rows = []
        for name in names:
            tokenizer = getattr(self.pipe, name)
            length = tokenizer.model_max_length
            ids = tokenizer(caption, padding="max_length", max_length=length, truncation=True)
            rows.append(ids["input_ids"])
        return torch.tensor(rows)

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """The UNet's text conditions.

        Args:
            tokens: [B, encoders, T] int64.

        Returns:
            context: [B, T, C] in the encoder's dtype.
            pooled: [B, P] for XL, else None.
        """
        encoders = list(self.text_encoders.values())
        tokens = tokens.to(encoders[0].device)
        if not self.xl:
            return encoders[0](tokens[:, 0])[0], None
        outputs = [e(tokens[:, i], output_hidden_states=True) for i, e in enumerate(encoders)]
        context = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)
        return context, outputs[-1][0]

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latent's distribution.

        Args:
            pixels: [B, 3, height, width] in [-1, 1].

        Returns:
            Two [B, C, height / factor, width / factor] tensors: x₀ = mean + std · ε.
        """
        found = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        scale, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        return (found.mean - shift) * scale, found.std * scale

    def condition(self, pooled: Tensor | None, time_ids: Tensor) -> dict[str, Any]:
        """Further arguments of the UNet: pooled text [B, P] and sizes [B, 6] in pixels for XL."""
        if not self.xl:
            return {}
        given = {"text_embeds": pooled, "time_ids": time_ids.to(pooled)}
        return {"added_cond_kwargs": given}

    def free(self, *names: str) -> None:
        """Drop parts of the pipeline that are needed no longer."""
        self.pipe.register_modules(**dict.fromkeys(names))
        if "vae" in names:
            self.vae = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load(model: str, *, complete: bool = False, keep: Collection[str] = ()) -> Base:
    """A pipeline in float32 on the CPU, frozen, from a folder or by its name on the hub.

    Args:
        model: a diffusers folder (with model_index.json), or "owner/name".
        complete: load also what training has no use for, as the safety checker.
        keep: of these parts, which to load all the same.

    Raises:
        ValueError: no such folder or name, not a diffusers folder, or a pipeline that is none of
            PIPELINES.
    """
    index = read_index(model)
    skipped = {} if complete else {n: None for n in _LEFT_OUT if index.get(n, [None])[0]}
    skipped = {name: None for name in skipped if name not in keep}
    if "safety_checker" in skipped:
        skipped["requires_safety_checker"] = False
    try:
        with quiet_libraries():
            from diffusers import DiffusionPipeline

            pipe = DiffusionPipeline.from_pretrained(model, use_safetensors=True, **skipped)
            # the text encoder would keep the dtype of its file
            pipe.to(torch.float32)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"model {model} cannot be loaded: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return Base(pipe, xl=_is_xl(index))


def skeleton(model: str) -> Base:
    """The same model from its configuration alone: no weights are read, and no tokenizer.

    Its tensors are on the meta device: they have shapes and hold no numbers. Raises as `load`.
    """
    index = read_index(model)
    with quiet_libraries(), torch.device("meta"):
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        texts = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "scheduler": DDPMScheduler}
        try:
            parts = {
                name: kind.from_config(kind.load_config(model, subfolder=name))
                for name, kind in kinds.items()
            }
            for name in ("text_encoder", "text_encoder_2") if _is_xl(index) else ("text_encoder",):
                parts[name] = texts[name](CLIPTextConfig.from_pretrained(model, subfolder=name))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"model {model} cannot be loaded: {error}") from error
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return Base(SimpleNamespace(**parts), xl=_is_xl(index))


def read_index(model: str) -> dict[str, Any]:
    """The pipeline's model_index.json; Raises as `load`."""
    path = Path(model).expanduser()
    if path.exists():
        if not (path / "model_index.json").is_file():
            raise ValueError(f"model {model} is no diffusers folder: it has no model_index.json")
        try:
            index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"model {model}: model_index.json is not JSON: {error}") from None
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        from diffusers import DiffusionPipeline

        try:
            index = DiffusionPipeline.load_config(model)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"model {model}: no such folder here, and not to be had from the hub: {reason}"
            ) from None
    else:
        raise ValueError(f"model {model}: no such folder")
    if index.get("_class_name") not in PIPELINES:
        raise ValueError(
            f"model {model} is a {index.get('_class_name')}; want {' or '.join(PIPELINES)}"
        )
    return index


def read_part(model: str, part: str) -> Any:
    """The CLIPVisionConfig of a pipeline's part, without its weights; Raises as `load`."""
    from transformers import CLIPVisionConfig

    try:
        return CLIPVisionConfig.from_pretrained(model, subfolder=part)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {model} cannot be loaded: {part}: {error}") from error


def _is_xl(index: dict[str, Any]) -> bool:
    return index["_class_name"] == PIPELINES[1]


def fingerprint(*modules: nn.Module) -> str:
    """SHA-256 of configurations and weights, hex: an encoder's identity in cache keys."""
    digest = hashlib.sha256()
    for module in modules:
        config = module.config if isinstance(module.config, dict) else module.config.to_dict()
        settings = {k: v for k, v in config.items() if not k.startswith("_")}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy())
    return digest.hexdigest()


@torch.no_grad()
def draw(
    base: Base,
    prompts: list[str],
    *,
    seed: int,
    steps: int,
    guidance: float,
    size: tuple[int, int] | None = None,
    bf16: bool = False,
    more: Callable[[int], dict[str, Any]] | None = None,
) -> list[Image.Image]:
    """One picture a prompt, all from noise of the same seed.

    Args:
        base: with its VAE and text encoders.
        seed: of the starting noise, which is made on the CPU.
        steps: of denoising.
        guidance: classifier-free guidance; 1 and below is without.
        size: (width, height) in pixels; None is the model's own.
        bf16: run under bfloat16 autocast.
        more: gives further arguments of the pipeline for a prompt by its number.
    """
    width, height = size or (None, None)
    device = base.unet.device
    cast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    pictures = []
    at_once = AT_ONCE if more is None else 1
    for first in range(0, len(prompts), at_once):
        chunk = prompts[first : first + at_once]
        with cast:
            pictures += base.pipe(
                chunk, num_inference_steps=steps, guidance_scale=guidance, width=width,
                height=height, generator=[torch.Generator().manual_seed(seed) for _ in chunk],
                **({} if more is None else more(first)),
            ).images  # fmt: skip
    return pictures


def grid(rows: list[list[Image.Image]]) -> Image.Image:
    """Pictures of one size side by side, row under row, 2 pixels apart on white."""
    width, height = rows[0][0].size
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * (width + 2) - 2, len(rows) * (height + 2) - 2), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * (width + 2), y * (height + 2)))
    return sheet


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the bars and advice of the libraries below; their errors stay."""
    import diffusers
    import transformers

    logs = diffusers.utils.logging, transformers.utils.logging
    before = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()


def write_image(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    storage.write({path: buffer.getvalue()})


def save_merged(base: Base, folder: Path, dtype: torch.dtype) -> None:
    """Write the pipeline with its adapters summed into the weights; the folder appears whole.

    Args:
        base: with adapters; they are taken out of it.
        folder: must not exist.
        dtype: of the weights written, rounded once from float32 sums.
    """
    for part in (base.unet, *base.text_encoders.values()):
        found = lorakern.adapters.find(part)
        if not found:
            continue
        lorakern.merge(part)
        weights = {path: part.get_submodule(path).weight.clone() for path in found}
        lorakern.eject(part)
        for path, weight in weights.items():
            part.get_submodule(path).weight.data.copy_(weight)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        with quiet_libraries():
            base.pipe.to(dtype)
            base.pipe.save_pretrained(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    storage.sync_folder(folder.parent)

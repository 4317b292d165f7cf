"""method = "ip_adapter": a new image prompt adapter, IP-Adapter base or plus.

Ye et al. 2023, arXiv:2308.06721: K' and V' of every cross-attention, which begin as copies of K
and V, and a projection of the image's features to tokens train; all else is frozen.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lorakern import cache, conditioning, data, models
from lorakern.cache import Latent
from lorakern.config import Config
from lorakern.data import Example
from lorakern.devices import checkpoint_gradients
from lorakern.methods import image_features
from lorakern.methods.base import Method
from lorakern.monitor import progress


class ImagePrompt(Method):
    """Trains on what an image encoder says of each image, or on embeddings from a file."""

    def __init__(self, config: Config):
        super().__init__(config)
        chosen = self.chosen = config.ip_adapter
        if chosen.embeddings is None and chosen.image_encoder is None:
            self.parts = ("image_encoder", "feature_extractor")
        self.source: image_features.Embeddings | image_features.Encoder | None = None
        self.shape: tuple[int, ...] = ()
        self.entries: dict[Path, Path] = {}
        self.shown: list[Tensor] = []

    def check(self, index: dict[str, Any], examples: Sequence[Example]) -> None:
        chosen, images = self.chosen, self.config.sample.images
        if chosen.embeddings is not None:
            self.source = image_features.Embeddings(chosen.embeddings, chosen.variant)
            self.source.check([self._name(example.path) for example in examples])
            self.source.check(images)
            self.shape = self.source.shape
            return
        if chosen.image_encoder is not None:
            config = image_features.read_config(chosen.image_encoder)
            self.shape = image_features.shape_of(config, chosen.variant)
        elif not index.get("image_encoder", [None])[0]:
            raise ValueError(
                f"model {self.config.model} has no image_encoder; set ip_adapter.image_encoder to"
                " the folder of a CLIPVisionModelWithProjection, or ip_adapter.embeddings to a"
                " safetensors file with the embedding of each image"
            )
        if missing := [path for path in images if not Path(path).is_file()]:
            raise ValueError(f"sample.images: no file {missing[0]}")

    def encode(
        self, base: models.Base, latents: Sequence[Latent], folder: Path, device: torch.device,
        *, bar: bool,
    ) -> None:  # fmt: skip
        if isinstance(self.source, image_features.Embeddings):
            # to read them all tells which are not finite
            for latent in progress(latents, "embeddings", "image", bar):
                self.source(self._name(latent.path))
            self.shown = [self.source(name) for name in self.config.sample.images]
            self.negative, self.fingerprint = self.source.negative, self.source.fingerprint
            return
        if self.chosen.image_encoder is not None:
            encoder = image_features.load_encoder(self.chosen.image_encoder, self.chosen.variant)
        else:
            pipe = base.pipe
            encoder = image_features.Encoder(
                pipe.image_encoder, pipe.feature_extractor, self.chosen.variant
            )
        encoder.model.to(device)
        self.shape = encoder.shape
        for latent in progress(latents, "image prompts", "image", bar):
            self.entries[latent.path] = encoder.cached(latent, folder)
        self.shown = [encoder(picture(path)) for path in self.config.sample.images]
        self.negative, self.fingerprint = encoder.negative, encoder.fingerprint
        if self.parts:
            base.free(*self.parts)

    def inject(self, base: models.Base) -> None:
        from lorakern.conditioning import ip_train

        config, unet = self.config, base.unet
        if not self.shape:
            # of a plan, whose encoder is not loaded
            own = models.read_part(config.model, "image_encoder")
            self.shape = image_features.shape_of(own, self.chosen.variant)
        conditioning.new_ip_adapter(
            unet, self.shape[-1], variant=self.chosen.variant, tokens=self.chosen.tokens
        )
        self.base, self.trained = base, {"unet": unet}
        self.parameters = ip_train.parameters(unet)
        self.to_bf16(unet, self.parameters.values())
        unet.train()
        if config.gradient_checkpointing:
            checkpoint_gradients(unet)

    def keeps_caption(self, chance: Tensor) -> Tensor:
        # of [0, 1): the image is dropped, the text is, both are, neither is
        image, text, both = self._rates()
        return (chance < image) | (chance >= image + text + both)

    def keeps_image(self, chance: Tensor) -> Tensor:
        """Which images stay, [B] bool; chance as in keeps_caption."""
        image, text, both = self._rates()
        dropped = (chance < image) | ((chance >= image + text) & (chance < image + text + both))
        return ~dropped

    def inputs(self, latents: Sequence[Latent], chance: Tensor) -> dict[str, Tensor]:
        if self.entries:
            found = [cache.entry(self.entries[la.path])["features"] for la in latents]
        else:
            found = [self.source(self._name(latent.path)) for latent in latents]
        return {"image": image_features.stack(found, self.keeps_image(chance), self.negative)}

    def blank(self, batch: int, size: tuple[int, int]) -> dict[str, Tensor]:
        return {"image": torch.zeros(batch, 1, *self.shape)}

    def predict(
        self, noisy: Tensor, t: Tensor, context: Tensor, condition: dict[str, Any],
        inputs: dict[str, Tensor],
    ) -> Tensor:  # fmt: skip
        added = {**condition.get("added_cond_kwargs", {}), "image_embeds": [inputs["image"]]}
        return self.base.unet(noisy, t, context, added_cond_kwargs=added).sample

    def tensors(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.parameters.items()}

    def settings(self) -> dict[str, Any]:
        return {"image features": self.fingerprint[:16]}

    def about(self) -> str:
        layers = sum(name.endswith("to_k_ip.weight") for name in self.parameters)
        return f"IP-Adapter {self.chosen.variant} on {layers} cross-attentions"

    def paths(self) -> list[Path]:
        return [self.config.output / f"{self.config.name}.safetensors"]

    def export(self, metadata: dict[str, str]) -> list[Path]:
        (path,) = self.paths()
        conditioning.save_ip_adapter(self.base.unet, path, metadata=metadata)
        return [path]

    def draw(self, **options) -> list[Image.Image]:
        prompts = self.config.sample.prompts
        shown = self.shown * (len(prompts) if len(self.shown) == 1 else 1)
        return models.draw(
            self.base, prompts, **options,
            more=lambda i: prompt_arguments(shown[i], self.negative, options["guidance"]),
        )  # fmt: skip

    def _rates(self) -> tuple[float, float, float]:
        return self.chosen.image_dropout, self.chosen.text_dropout, self.chosen.both_dropout

    def _name(self, path: Path) -> str:
        # metadata.jsonl may name images elsewhere
        inside = path.is_relative_to(self.config.data)
        path = path.relative_to(self.config.data) if inside else path
        return path.with_suffix("").as_posix()


def prompt_arguments(shown: Tensor, negative: Tensor, guidance: float) -> dict[str, Any]:
    """What diffusers' pipelines take as the image prompt of a picture: [2 or 1, 1, ...]."""
    images = [negative, shown] if guidance > 1 else [shown]
    return {"ip_adapter_image_embeds": [torch.stack(images)[:, None]]}


def picture(path: str | Path) -> Image.Image:
    """An image prompt from a file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return data.read_image(Path(path).read_bytes())
    except (OSError, data.BadImage) as error:
        raise ValueError(f"image prompt {path}: {error}") from None

"""What an image prompt adapter sees of an image: an encoder's outputs, or embeddings of a file.

Both are asked the same: the embedding of each image, [features] for the base variant and
[tokens, features] for plus, and of no image: zeros for base, an all-black image's for plus, as
the authors of IP-Adapter have it (Ye et al. 2023, arXiv:2308.06721).
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakern import cache, data, models
from lorakern.cache import Latent
from lorakern.formats import storage

# the embedding of no image in a file; no image has such a name, for hidden files are passed over
NEGATIVE = ".negative"


class Embeddings:
    """A safetensors file with a tensor an image, by its path below the data folder without suffix.

    Args:
        path: the file.
        variant: "base" or "plus".

    Raises:
        ValueError: no such file, not safetensors, or tensors that are not alike.
    """

    def __init__(self, path: Path, variant: str):
        self.path, self.variant = path, variant
        if not path.is_file():
            raise ValueError(f"embeddings: no file {path}")
        try:
            self._file = safe_open(path, "pt")
            names = list(self._file.keys())
            shapes = {n: tuple(self._file.get_slice(n).get_shape()) for n in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"embeddings: {path} is no whole safetensors file: {error}") from None
        if not shapes:
            raise ValueError(f"embeddings: {path} is empty")
        want = "[features]" if variant == "base" else "[tokens, features]"
        first, self.shape = next(iter(shapes.items()))
        for name, shape in shapes.items():
            if len(shape) != (1 if variant == "base" else 2):
                raise ValueError(f"embeddings: {name} in {path} is {list(shape)}, want {want}")
            if shape != self.shape:
                raise ValueError(
                    f"embeddings: in {path} {first} is {list(self.shape)}, {name} is {list(shape)};"
                    " want one width"
                )
        self.names: Collection[str] = shapes.keys()
        if variant == "plus" and NEGATIVE not in shapes:
            raise ValueError(
                f'embeddings: {path} has no "{NEGATIVE}": plus wants the encoding of an all-black'
                " image under that name, for images that are dropped"
            )

    def check(self, names: Iterable[str]) -> None:
        """Raises ValueError when some have no embedding; names the first of them."""
        names = list(names)
        if missing := [name for name in names if name not in self.names]:
            some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"embeddings: {self.path} has none for {len(missing)} of {len(names)} images:"
                f" {some}; want a tensor for each, by its path in the data folder without suffix"
            )

    @property
    def negative(self) -> Tensor:
        return self(NEGATIVE) if NEGATIVE in self.names else torch.zeros(self.shape)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file, hex."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        return digest.hexdigest()

    def __call__(self, name: str) -> Tensor:
        """The embedding of that name, float32.

        Raises:
            ValueError: it is not finite.
        """
        found = self._file.get_tensor(name).float()
        if not found.isfinite().all():
            raise ValueError(f"embeddings: {name} in {self.path} is not finite")
        return found


class Encoder:
    """CLIP's image encoder with its preprocessing, and what it said of images, kept on disk.

    Args:
        model: a transformers CLIPVisionModelWithProjection, frozen.
        processor: a CLIPImageProcessor; None makes diffusers' for the model's image size.
        variant: "base" takes image_embeds, "plus" the last hidden states but one.
    """

    def __init__(self, model: Any, processor: Any, variant: str):
        from transformers import CLIPImageProcessor

        self.model, self.variant, size = model, variant, model.config.image_size
        self.processor = processor or CLIPImageProcessor(size=size, crop_size=size)
        self.shape = shape_of(model.config, variant)
        seen = f"{models.fingerprint(model)} {self.processor.to_json_string()} {variant} 1"
        self.fingerprint = hashlib.sha256(seen.encode()).hexdigest()

    @torch.no_grad()
    def __call__(self, image: Image.Image | None) -> Tensor:
        """The embedding of an RGB image, float32 on the CPU; None is all zeros after scaling."""
        shown = image or Image.new("RGB", (self.model.config.image_size,) * 2)
        pixels = self.processor(images=shown, return_tensors="pt").pixel_values
        pixels = pixels.to(self.model.device, self.model.dtype)
        if image is None:
            pixels = torch.zeros_like(pixels)
        if self.variant == "base":
            return self.model(pixels).image_embeds[0].float().cpu()
        return self.model(pixels, output_hidden_states=True).hidden_states[-2][0].float().cpu()

    @property
    def negative(self) -> Tensor:
        return torch.zeros(self.shape) if self.variant == "base" else self(None)

    def cached(self, latent: Latent, folder: Path) -> Path:
        """The cache entry of what the latent shows, with "features"; encoded if it is not there.

        Raises:
            ValueError: the image has changed since its latent was made.
        """
        known = f"image prompt {self.fingerprint} {latent.content} {latent.bucket}"
        path = folder / f"{hashlib.sha256(known.encode()).hexdigest()}.safetensors"
        if cache.read(path) is None:
            raw = latent.path.read_bytes()
            if hashlib.sha256(raw).hexdigest() != latent.content:
                raise ValueError(f"{latent.path} was changed while it was read; start again")
            features = self(data.crop(data.read_image(raw), latent.bucket))
            storage.write({path: storage.to_bytes({"features": features}, {})})
        return path


def shape_of(config: Any, variant: str) -> tuple[int, ...]:
    """Shape of an embedding by a CLIP vision config."""
    if variant == "base":
        return (config.projection_dim,)
    return (1 + (config.image_size // config.patch_size) ** 2, config.hidden_size)


def load_encoder(folder: str | Path, variant: str) -> Encoder:
    """From a transformers folder, with the preprocessor_config.json in it if there is one.

    Raises:
        ValueError: no such folder, or not a CLIPVisionModelWithProjection.
    """
    config = read_config(folder)
    with models.quiet_libraries():
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        try:
            model, told = CLIPVisionModelWithProjection.from_pretrained(
                folder, config=config, use_safetensors=True, output_loading_info=True,
                dtype=torch.float32,
            )  # fmt: skip
            own = (Path(folder) / "preprocessor_config.json").is_file()
            processor = CLIPImageProcessor.from_pretrained(folder) if own else None
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"image_encoder {folder} cannot be loaded: {error}") from error
    if missing := sorted(told["missing_keys"]):
        raise ValueError(
            f"image_encoder {folder} is no CLIPVisionModelWithProjection: no {missing[0]}"
        )
    return Encoder(model.requires_grad_(False).eval(), processor, variant)


def read_config(folder: str | Path) -> Any:
    """The CLIPVisionConfig of a folder; Raises as `load_encoder`."""
    from transformers import CLIPVisionConfig

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"image_encoder {folder}: want a transformers folder with a config.json, of a"
            " CLIPVisionModelWithProjection"
        )
    config = CLIPVisionConfig.from_pretrained(folder)
    kinds = config.architectures or ["CLIPVisionModelWithProjection"]
    if kinds != ["CLIPVisionModelWithProjection"]:
        raise ValueError(
            f"image_encoder {folder} is a {', '.join(kinds)}; want CLIPVisionModelWithProjection"
        )
    return config


def stack(features: Sequence[Tensor], keep: Tensor, negative: Tensor) -> Tensor:
    """[B, 1, ...]: the features of one image a row, the negative where keep [B] is False."""
    return torch.stack([f if k else negative for f, k in zip(features, keep, strict=True)])[:, None]

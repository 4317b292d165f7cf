"""Drawing with an IP-Adapter from a file: its image prompts, and what the file holds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakern import conditioning, models
from lorakern.conditioning import ip_files
from lorakern.formats import storage
from lorakern.methods import image_features
from lorakern.methods.ip_adapter import picture, prompt_arguments

# what each variant sees of an image; the others need more than one embedding
SEES = {
    "base": "base", "faceid": "base", "faceid-portrait": "base",
    "plus": "plus", "full-face": "plus",
}  # fmt: skip


def arguments(
    base: models.Base, adapters: Sequence[tuple[Path, float]], images: Sequence[str], prompts: int,
    guidance: float, encoder: Path | None = None, embeddings: Path | None = None,
) -> Callable[[int], dict[str, Any]]:  # fmt: skip
    """Put an IP-Adapter in; gives what the pipeline takes for a prompt, by its number.

    Args:
        adapters: files and strengths; want one.
        images: one for all prompts, or one a prompt.
        prompts: how many.
        guidance: classifier-free guidance; no unit.
        base, encoder, embeddings: as `load`; Raises as that, and for other numbers.
    """
    if len(adapters) > 1 or len(images) not in (1, prompts):
        raise ValueError(
            f"{', '.join(str(file) for file, _ in adapters)}: {len(images)} images for {prompts}"
            " prompts; want one IP-Adapter, and one --image or as many as prompts"
        )
    ((file, scale),) = adapters
    shown, negative = load(base, file, scale, images, encoder, embeddings)
    return lambda i: prompt_arguments(shown[i % len(shown)], negative, guidance)


def load(
    base: models.Base, file: Path, scale: float, images: Sequence[str],
    encoder: Path | None = None, embeddings: Path | None = None,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Put an IP-Adapter into a pipeline, and embed its image prompts.

    Args:
        base: complete; its image encoder is used unless another is given.
        file: the adapter.
        scale: its strength; no unit.
        images: files, or names in `embeddings`.
        encoder: folder of a CLIPVisionModelWithProjection.
        embeddings: a safetensors file, as ip_adapter.embeddings of a training run.

    Returns:
        The embedding of each image, and that of no image.

    Raises:
        ValueError: no way to embed images, another width than the adapter's, a file that cannot
            be used.
    """
    variant = conditioning.load_ip_adapter(base.unet, file, scale=scale).variant
    if variant not in SEES:
        raise ValueError(f"{file} is {variant}; sample draws with {', '.join(SEES)}")
    if encoder is not None and embeddings is not None:
        raise ValueError(f"want --image-encoder or --embeddings, got both: {encoder}, {embeddings}")
    kind = SEES[variant]
    own = getattr(base.pipe, "image_encoder", None)
    source: image_features.Embeddings | image_features.Encoder
    if embeddings is not None:
        source = image_features.Embeddings(embeddings, kind)
        source.check(images)
    elif encoder is not None:
        source = image_features.load_encoder(encoder, kind)
    elif own is not None:
        source = image_features.Encoder(own, base.pipe.feature_extractor, kind)
    else:
        raise ValueError(
            f"{file} wants image prompts, and the model has no image encoder; give"
            " --image-encoder or --embeddings"
        )
    _check_width(base, file, source)
    if isinstance(source, image_features.Embeddings):
        return [source(name) for name in images], source.negative
    return [source(picture(path)) for path in images], source.negative


def summary(file: Path) -> dict[str, str]:
    """What an IP-Adapter's file holds, by name.

    Raises:
        ValueError: as load_ip_adapter.
    """
    from lorakern.conditioning.ip_projection import takes

    found = ip_files.read(file)
    width, tokens = takes(ip_files.projection(found, "meta", None))
    pairs = [t for pair in found.layers.values() for t in pair]
    tensors = [*found.projection.values(), *pairs]
    metadata = storage.read_tensors(file)[1] if file.suffix == ".safetensors" else {}
    return {
        "format": "ip_adapter",
        "variant": found.variant,
        "layers": f"{len(found.layers)} cross-attentions of {found.width} channels"
        + (f", a LoRA on {len(found.loras)}" if found.loras else ""),
        "takes": f"an image encoder's tokens of {width}" if tokens else f"embeddings of {width}",
        "dtype": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors})),
        "size": f"{sum(t.numel() * t.element_size() for t in tensors) / 2**20:.2f} MiB",
        **{k: v for k, v in metadata.items() if k != "variant"},
    }


def _check_width(base: models.Base, file: Path, source) -> None:
    from lorakern.conditioning.ip_projection import takes

    (layer,) = base.unet.encoder_hid_proj.image_projection_layers
    want, _ = takes(layer)
    if source.shape[-1] != want:
        raise ValueError(
            f"{file} takes image embeddings of {want} channels, these have {source.shape[-1]}:"
            " another image encoder"
        )

"""The image projections of a UNet with IP-Adapters: checked, and run once per image.

diffusers calls them in every denoising step. Imports diffusers: `conditioning` imports it on use.
"""

from collections.abc import Iterable

import torch
from diffusers.models import embeddings
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import Tensor, nn

from lorakern.adapters import Adapter
from lorakern.conditioning.cache import Cache, Frames

# what diffusers puts in an attention layer when it fuses or slices, and when it stops to
_REPLACES = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, SlicedAttnProcessor)


class IPProjection(embeddings.MultiIPAdapterImageProjection):
    """What diffusers' class computes, on the same layers; tokens of an image that stays are kept.

    Args:
        layers: the projection of each IP-Adapter.
        video: the UNet repeats tokens for its frames.
    """

    def __init__(self, layers: Iterable[nn.Module], *, video: bool = False):
        super().__init__(layers)
        self.video = video
        self.caches = [Cache() for _ in self.image_projection_layers]
        # attention layers by name, and the processors that those of the IP-Adapters must have
        self.attention: list[tuple[str, Attention, object | None]] = []

    def append(self, layer: nn.Module) -> None:
        """One more IP-Adapter, the last."""
        self.image_projection_layers.append(layer)
        self.caches.append(Cache())

    def forward(self, image_embeds: list[Tensor] | Tensor) -> list[Tensor]:
        """[B, images, ...] of each IP-Adapter -> tokens [B, images, T, C].

        Raises:
            ValueError: not one tensor an IP-Adapter, or a tensor that its projection does not take.
        """
        if isinstance(image_embeds, Tensor):
            image_embeds = [image_embeds.unsqueeze(1)]
        layers = self.image_projection_layers
        if len(image_embeds) != len(layers):
            raise ValueError(
                f"image_embeds are of {len(image_embeds)} IP-Adapters, {len(layers)} are loaded"
            )
        for index, x in enumerate(image_embeds):
            self._check(index, x)
        return [self.tokens(index, x) for index, x in enumerate(image_embeds)]

    def tokens(self, index: int, x: Tensor) -> Tensor:
        """[B, images, ...] of one IP-Adapter -> tokens [B, images, T, C]; raises as `forward`."""
        self._check(index, x)
        layer = self.image_projection_layers[index]
        return self.caches[index].get(lambda: self._project(layer, x), [x], [layer])

    def _check(self, index: int, x: Tensor) -> None:
        if reason := refusal(self.image_projection_layers[index], x):
            raise ValueError(f"image_embeds of IP-Adapter {index}: {reason}")

    def _project(self, layer: nn.Module, x: Tensor) -> Tensor:
        tokens = layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        kept = self.video and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return tokens.as_subclass(Frames) if kept else tokens

    def remember(self, unet: nn.Module) -> None:
        """Note the UNet's attention layers, and which processors are to stay."""
        layers = [(n, m) for n, m in unet.named_modules() if isinstance(m, Attention)]
        # those of a Resampler have only weights that cannot be fused
        self.attention = [
            (name, m, m.processor if name.startswith("encoder_hid_proj") or _of_images(m) else None)
            for name, m in layers
        ]

    def put_back(self) -> None:
        """The processors of the IP-Adapters, where diffusers put others in their place."""
        for _, attn, mine in self.attention:
            if (
                mine is not None
                and attn.processor is not mine
                and type(attn.processor) in _REPLACES
            ):
                if isinstance(mine, nn.Module):
                    mine.to(attn.to_q.weight.device, attn.to_q.weight.dtype)
                attn.set_processor(mine)

    def settle(self, unet: nn.Module, *_) -> None:
        """Forward pre-hook of the UNet: processors in their place.

        QKV fusion and attention slicing put their own processors everywhere; those of the
        IP-Adapters need neither, and come back.

        Raises:
            ValueError: QKV are fused beside adapters, which the fused weights leave out.
        """
        # otherwise diffusers took the IP-Adapters out
        if unet.encoder_hid_proj is self and not torch.compiler.is_compiling():
            self.put_back()
            for name, attn, _ in self.attention:
                if type(attn.processor) is FusedAttnProcessor2_0:
                    _check_fused(name, attn)

    def check_masks(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the UNet.

        Raises:
            ValueError: a mask has another aspect ratio than the sample.
        """
        masks = (kwargs.get("cross_attention_kwargs") or {}).get("ip_adapter_masks")
        if masks is not None and unet.encoder_hid_proj is self:
            sample = args[0] if args else kwargs["sample"]
            _check_masks(masks, sample.shape[-2:])


def _of_images(attn: Attention) -> bool:
    return isinstance(attn.processor, IPAdapterAttnProcessor2_0)


def _check_fused(name: str, attn: Attention) -> None:
    adapted = [n for n in ("to_q", "to_k", "to_v") if isinstance(getattr(attn, n), Adapter)]
    if adapted:
        raise ValueError(
            f"{name}: fuse_qkv_projections() leaves out the adapters on {', '.join(adapted)};"
            " call unfuse_qkv_projections()"
        )


def _check_masks(masks, size: torch.Size) -> None:
    height, width = size
    for index, mask in enumerate(masks):
        if isinstance(mask, Tensor):
            h, w = mask.shape[-2:]
            # less than a latent pixel of difference is the rounding of the image's size
            if abs(h * width - w * height) > max(h, w):
                raise ValueError(
                    f"the mask of IP-Adapter {index} is {h} x {w}, the latent {height} x {width}:"
                    " want the same aspect ratio"
                )


def refusal(layer: nn.Module, x: Tensor) -> str | None:
    """Why diffusers' projection does not take image embeddings x [B, images, ...]; None if it does.

    The last dimension is what the image encoder gives; Plus and full-face take its tokens
    [B, images, T, E], the others [B, images, E] or [B, images, 1, E].
    """
    width, tokens = takes(layer)
    want = f"[B, images, tokens, {width}]" if tokens else f"[B, images, {width}]"
    if x.ndim not in ((4,) if tokens else (3, 4)):
        return f"want {want}, got {list(x.shape)}"
    if x.shape[-1] != width:
        return f"their width is {x.shape[-1]}, {type(layer).__name__} takes {width}"
    if not tokens and x.ndim == 4 and x.shape[2] != 1:
        return f"{x.shape[2]} tokens an image, {type(layer).__name__} takes 1"
    if isinstance(layer, embeddings.IPAdapterFaceIDPlusImageProjection):
        return _clip_refusal(layer, x)
    return None


def _clip_refusal(layer: embeddings.IPAdapterFaceIDPlusImageProjection, x: Tensor) -> str | None:
    clip, rows, width = layer.clip_embeds, x.shape[0] * x.shape[1], layer.proj_in.in_features
    if clip is None:
        return f"FaceID-Plus needs clip_embeds [B, images, tokens, {width}]; set them on its layer"
    if clip.ndim != 4 or clip.shape[-1] != width:
        return f"want clip_embeds [B, images, tokens, {width}], got {list(clip.shape)}"
    if clip.shape[0] * clip.shape[1] != rows:
        return f"{rows} faces, but clip_embeds of {clip.shape[0] * clip.shape[1]}"
    return None


def takes(layer: nn.Module) -> tuple[int, bool]:
    """The width of the image embeddings of diffusers' projection; whether they are tokens."""
    if isinstance(layer, embeddings.ImageProjection):
        return layer.image_embeds.in_features, False
    if isinstance(layer, embeddings.IPAdapterFullImageProjection):
        return layer.ff.net[0].proj.in_features, True
    if isinstance(layer, embeddings.IPAdapterFaceIDImageProjection):
        return layer.ff.net[0].proj.in_features, False
    if isinstance(layer, embeddings.IPAdapterFaceIDPlusImageProjection):
        return layer.proj.net[0].proj.in_features, False
    return layer.proj_in.in_features, True

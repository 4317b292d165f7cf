"""IP-Adapter of diffusers on decoupled_attention: one pass instead of a call and an add per image.

IP-Adapter, Ye et al. 2023, arXiv:2308.06721. Imports diffusers: `conditioning` imports it on use.
"""

import math
from collections.abc import Callable

import torch.nn.functional as F
from diffusers import UNetMotionModel
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import Tensor, nn

from lorakern.conditioning.cache import Cache
from lorakern.conditioning.ip_projection import IPProjection
from lorakern.functional import decoupled_attention


class IPAdapterProcessor(IPAdapterAttnProcessor2_0):
    """What diffusers' processor computes, on the same layers and the same scales.

    What the kernel does not express (a mask over the text, no image at all) and what is wrong
    goes to diffusers' own code. K and V of text and images, and masks at the layer's resolution,
    are kept from one denoising step to the next.

    Args:
        hidden_size, cross_attention_dim: channels inside, and of text and image tokens.
        num_tokens, scale: one entry an IP-Adapter; shared, not copied.
        to_k_ip, to_v_ip: one Linear an IP-Adapter; shared.
        masks: of all processors of a UNet.
        stock: the processor that is taken over.
    """

    def __init__(self, hidden_size, cross_attention_dim, num_tokens, scale, to_k_ip, to_v_ip,
                 *, masks: Cache, stock):  # fmt: skip
        # the base class would make layers of its own
        nn.Module.__init__(self)
        self.hidden_size, self.cross_attention_dim = hidden_size, cross_attention_dim
        self.num_tokens, self.scale = num_tokens, scale
        self.to_k_ip, self.to_v_ip = to_k_ip, to_v_ip
        # in a tuple, or it would be a submodule
        self._stock = (stock,)
        self.masks, self.text, self.images = masks, Cache(), [Cache() for _ in to_k_ip]

    @property
    def stock(self):
        """The processor that was taken over."""
        return self._stock[0]

    @property
    def caches(self) -> list[Cache]:
        """All that is kept here."""
        return [self.masks, self.text, *self.images]

    def append(self, k: nn.Linear, v: nn.Linear, tokens: int, scale) -> None:
        """One more IP-Adapter, the last."""
        self.to_k_ip.append(k)
        self.to_v_ip.append(v)
        self.num_tokens.append(tokens)
        self.scale.append(scale)
        self.images.append(Cache())

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, list[Tensor]] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: list[Tensor | None] | Tensor | None = None,
    ) -> Tensor:
        """As diffusers calls it; `scale` is unused there too."""
        known = isinstance(self.stock, IPAdapterAttnProcessor2_0)
        if not known and not isinstance(encoder_hidden_states, tuple):
            # its IP-Adapters are taken out, and something put the processor back
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        text, images = hidden_states, None
        if isinstance(encoder_hidden_states, tuple) and attention_mask is None:
            text, states = encoder_hidden_states
            images = self._images(states, ip_adapter_masks)
        if not images:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, scale,
                ip_adapter_masks,
            )  # fmt: skip
        return attend(attn, hidden_states, temb, lambda q: self._decoupled(attn, q, text, images))

    def _decoupled(self, attn: Attention, q: Tensor, text: Tensor, images: list[tuple]) -> Tensor:
        k, v = text_kv(attn, text, self.text)
        keys, values = [k], [v]
        scales: list[float] = []
        masks: list[Tensor | None] = []
        for adapter, states, factors, mask in images:
            k, v = self._image_kv(adapter, states, mask is not None)
            if mask is None:
                parts = [(k, v, factors, None)]
            else:
                parts = zip(k, v, factors, self._rows(mask, q), strict=True)
            for key, value, factor, row in parts:
                if factor != 0:
                    keys.append(key)
                    values.append(value)
                    scales.append(factor)
                    masks.append(row)
        return decoupled_attention(q, keys, values, scales, masks, heads=attn.heads)

    def _image_kv(self, adapter: int, states: Tensor, apart: bool) -> tuple[Tensor, Tensor]:
        """K' and V' of states [B, images, T, C]: [B, images·T, C], apart [images, B, T, C]."""
        layers = self.to_k_ip[adapter], self.to_v_ip[adapter]

        def make():
            if apart:
                x = states.transpose(0, 1).contiguous()
                return tuple(layer(x) for layer in layers)
            return tuple(layer(states).flatten(1, -2) for layer in layers)

        return self.images[adapter].get(make, [states], layers, apart)

    def _rows(self, mask: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        """The mask of each image at q's resolution, [1, Q] in q's dtype."""

        def make():
            queries, (height, width) = q.shape[1], mask.shape[2:]
            high = int(math.sqrt(queries * height / width))
            high += queries % high != 0
            if queries % high == 0:
                rows = F.interpolate(mask, (high, queries // high), mode="bicubic")
            else:
                # it pads or cuts, and warns; images of one adapter are to it a batch's images
                rows = IPAdapterMaskProcessor.downsample(mask[0], mask.shape[1], queries, 1)
            return rows.to(q).view(-1, queries).split(1)

        return self.masks.get(make, [mask], (), q.shape[1], q.dtype, q.device)

    def _images(self, states: list[Tensor], masks) -> list[tuple] | None:
        """(adapter, states [B, images, T, C], scale or scales, mask) of the adapters that act.

        None: not for us. Without a mask all images of an adapter are under one softmax; with one
        each has its own.
        """
        if isinstance(masks, Tensor):
            masks = list(masks.unsqueeze(1))
        masks = masks or [None] * len(states)
        if not len(states) == len(masks) == len(self.scale) == len(self.to_k_ip):
            return None
        found = []
        for adapter, (x, scale, mask) in enumerate(zip(states, self.scale, masks, strict=True)):
            per_image = isinstance(scale, list)
            if not any(scale) if per_image else scale == 0:
                continue
            if mask is None:
                if per_image:
                    raise ValueError(
                        f"IP-Adapter {adapter} has {len(scale)} scales, one an image, but no mask;"
                        " without ip_adapter_masks its images share one scale"
                    )
                found.append((adapter, x, scale, None))
                continue
            scales = scale if per_image else [scale] * x.shape[1]
            fits = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[0] == 1
            if not fits or not mask.shape[1] == x.shape[1] == len(scales):
                return None
            found.append((adapter, x, scales, mask))
        return found


def attend(
    attn: Attention, hidden_states: Tensor, temb: Tensor | None, mix: Callable[[Tensor], Tensor]
) -> Tensor:
    """What diffusers' processors do before and after `mix`, which makes [B, Q, C] of the query."""
    x = hidden_states
    if attn.spatial_norm is not None:
        x = attn.spatial_norm(x, temb)
    if hidden_states.ndim == 4:
        x = x.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    x = mix(attn.to_q(x))
    x = attn.to_out[1](attn.to_out[0](x))
    if hidden_states.ndim == 4:
        x = x.transpose(-1, -2).reshape(hidden_states.shape)
    if attn.residual_connection:
        x = x + hidden_states
    return x if attn.rescale_output_factor == 1 else x / attn.rescale_output_factor


def text_kv(attn: Attention, text: Tensor, kept: Cache) -> tuple[Tensor, Tensor]:
    """K and V of a layer's text [B, T, C], or those that were kept."""

    def make():
        x = attn.norm_encoder_hidden_states(text) if attn.norm_cross else text
        return attn.to_k(x), attn.to_v(x)

    norms = [attn.norm_cross] if attn.norm_cross else []
    return kept.get(make, [text], [attn.to_k, attn.to_v, *norms])


def accelerate(model) -> Callable[[], None]:
    """See lorakern.conditioning.accelerate."""
    unet = getattr(model, "unet", model)
    layers = [m for m in unet.modules() if isinstance(m, Attention)]
    if not any(isinstance(layer.processor, IPAdapterAttnProcessor2_0) for layer in layers):
        raise ValueError(
            f"{type(model).__name__} has no IP-Adapter on diffusers' IPAdapterAttnProcessor2_0;"
            " load one with load_ip_adapter first"
        )
    swapped, masks = [], Cache(size=16)
    for layer in layers:
        stock = layer.processor
        if type(stock) is IPAdapterAttnProcessor2_0:
            mine = IPAdapterProcessor(
                stock.hidden_size, stock.cross_attention_dim, stock.num_tokens, stock.scale,
                stock.to_k_ip, stock.to_v_ip, masks=masks, stock=stock,
            ).train(layer.training)  # fmt: skip
            swapped.append((layer, mine))
            layer.set_processor(mine)
    projection = getattr(unet, "encoder_hid_proj", None)
    if type(projection) is MultiIPAdapterImageProjection:
        video = isinstance(unet, UNetMotionModel)
        kept = IPProjection(projection.image_projection_layers, video=video).train(unet.training)
        kept.remember(unet)
        unet.encoder_hid_proj = kept
        hook = unet.register_forward_pre_hook(kept.settle)

    def undo() -> None:
        for layer, mine in swapped:
            # a later load_ip_adapter or unload_ip_adapter put something else there
            if layer.processor is mine:
                mine.stock.scale = mine.scale
                layer.set_processor(mine.stock)
        if type(projection) is MultiIPAdapterImageProjection:
            hook.remove()
            if unet.encoder_hid_proj is kept:
                unet.encoder_hid_proj = projection

    return undo

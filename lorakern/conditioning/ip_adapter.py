"""IP-Adapter of diffusers on decoupled_attention: one pass instead of a call and an add per image.

IP-Adapter, Ye et al. 2023, arXiv:2308.06721. Imports diffusers: `conditioning` imports it on use.
"""

from collections.abc import Callable

from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from torch import Tensor, nn

from lorakern.functional import decoupled_attention


class IPAdapterProcessor(IPAdapterAttnProcessor2_0):
    """What the processor it takes over computes, on the same layers and the same scales.

    What the kernel does not express (a mask over the text, no image at all) and what is wrong
    goes to diffusers' own code.
    """

    def __init__(self, stock: IPAdapterAttnProcessor2_0):
        # the base class would make layers of its own
        nn.Module.__init__(self)
        self.hidden_size, self.cross_attention_dim = stock.hidden_size, stock.cross_attention_dim
        self.num_tokens, self.scale = stock.num_tokens, stock.scale
        self.to_k_ip, self.to_v_ip = stock.to_k_ip, stock.to_v_ip
        self.train(stock.training)

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
        text, images = hidden_states, None
        if isinstance(encoder_hidden_states, tuple) and attention_mask is None:
            text, states = encoder_hidden_states
            images = self._images(states, ip_adapter_masks)
        if not images:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, scale,
                ip_adapter_masks,
            )  # fmt: skip
        x = hidden_states
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        if hidden_states.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)

        q, keys, values = attn.to_q(x), [attn.to_k(text)], [attn.to_v(text)]
        scales: list[float] = []
        masks: list[Tensor | None] = []
        for adapter, states, factors, mask in images:
            k, v = self.to_k_ip[adapter](states), self.to_v_ip[adapter](states)
            if mask is None:
                parts = [(k.flatten(1, -2), v.flatten(1, -2), factors, None)]
            else:
                parts = zip(k, v, factors, _rows(mask, q), strict=True)
            for key, value, factor, row in parts:
                if factor != 0:
                    keys.append(key)
                    values.append(value)
                    scales.append(factor)
                    masks.append(row)
        x = decoupled_attention(q, keys, values, scales, masks, heads=attn.heads)
        x = attn.to_out[1](attn.to_out[0](x))

        if hidden_states.ndim == 4:
            x = x.transpose(-1, -2).reshape(hidden_states.shape)
        if attn.residual_connection:
            x = x + hidden_states
        return x if attn.rescale_output_factor == 1 else x / attn.rescale_output_factor

    def _images(self, states: list[Tensor], masks) -> list[tuple] | None:
        """(adapter, states, scale or scales, mask) of the adapters that act; None: not for us.

        Without a mask all images of an adapter are [B, images, T, C] under one softmax; with one
        they are [images, B, T, C] and have a softmax each.
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
                    return None
                found.append((adapter, x, scale, None))
                continue
            scales = scale if per_image else [scale] * x.shape[1]
            fits = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[0] == 1
            if not fits or not mask.shape[1] == x.shape[1] == len(scales):
                return None
            found.append((adapter, x.transpose(0, 1).contiguous(), scales, mask))
        return found


def _rows(mask: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    """The mask of each image at q's resolution, [1, Q] in q's dtype."""
    # to diffusers, the images of one adapter are the images of a batch: one call resizes them all
    rows = IPAdapterMaskProcessor.downsample(mask[0], mask.shape[1], q.shape[1], 1)
    return rows.to(q).squeeze(-1).split(1)


def accelerate(model) -> Callable[[], None]:
    """See lorakern.conditioning.accelerate."""
    unet = getattr(model, "unet", model)
    layers = [m for m in unet.modules() if isinstance(m, Attention)]
    if not any(isinstance(layer.processor, IPAdapterAttnProcessor2_0) for layer in layers):
        raise ValueError(
            f"{type(model).__name__} has no IP-Adapter on diffusers' IPAdapterAttnProcessor2_0;"
            " load one with load_ip_adapter first"
        )
    swapped = []
    for layer in layers:
        if type(layer.processor) is IPAdapterAttnProcessor2_0:
            swapped.append((layer, layer.processor, IPAdapterProcessor(layer.processor)))
            layer.set_processor(swapped[-1][-1])

    def undo() -> None:
        for layer, stock, mine in swapped:
            # a later load_ip_adapter or unload_ip_adapter put something else there
            if layer.processor is mine:
                stock.scale = mine.scale
                layer.set_processor(stock)

    return undo

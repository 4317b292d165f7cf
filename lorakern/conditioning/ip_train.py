"""A new IP-Adapter in a UNet, and its parameters. IP-Adapter, Ye et al. 2023, arXiv:2308.06721.

Imports diffusers: `conditioning` imports it on use, and documents its functions.
"""

import torch
from diffusers.models import embeddings
from torch import Tensor, nn

from lorakern.conditioning import ip_model, ip_scales
from lorakern.conditioning.ip_scales import Scale

TOKENS = {"base": 4, "plus": 16}
# channels of a head of a Resampler, its layers, and the most channels it has inside
HEAD, DEPTH, WIDEST = 64, 4, 1280


def new_ip_adapter(
    model, features: int, *, variant: str = "base", tokens: int | None = None, scale: Scale = 1.0
) -> ip_model.IPAdapter:
    """See lorakern.conditioning.new_ip_adapter."""
    if variant not in TOKENS:
        raise ValueError(f"variant {variant!r}; a new one is base or plus")
    unet = ip_model.unet_of(model)
    cross = ip_model.cross_attentions(unet)
    widths = sorted({attn.to_k.in_features for _, attn in cross.values()})
    if len(widths) != 1:
        raise ValueError(f"the UNet's cross-attentions take texts of {widths} channels; want one")
    ip_model.check_room(unet)
    ip_scales.check(scale, [path for path, _ in cross.values()])
    with torch.device(unet.device):
        projection = _projection(variant, features, widths[0], tokens or TOKENS[variant])
    layers = [(_copy(attn.to_k), _copy(attn.to_v)) for _, attn in cross.values()]
    unet.requires_grad_(False)
    loaded = ip_model.put(unet, projection.to(unet.dtype), layers, scale, variant)
    loaded.image_projection_layers[-1].train(unet.training)
    return loaded.adapters[-1]


def parameters(model, index: int = 0) -> dict[str, nn.Parameter]:
    """An IP-Adapter's parameters: image_proj.* by diffusers' names, ip_adapter.K.to_k_ip.weight."""
    unet = ip_model.unet_of(model, loading=False)
    projection = unet.encoder_hid_proj.image_projection_layers[index]
    found = {f"image_proj.{name}": p for name, p in projection.named_parameters()}
    for k, (_, attn) in ip_model.cross_attentions(unet).items():
        for name in ("to_k_ip", "to_v_ip"):
            found[f"ip_adapter.{k}.{name}.weight"] = getattr(attn.processor, name)[index].weight
    return found


def _projection(variant: str, features: int, width: int, tokens: int) -> nn.Module:
    if variant == "base":
        return embeddings.ImageProjection(
            image_embed_dim=features, cross_attention_dim=width, num_image_text_embeds=tokens
        )
    inside = min(width, WIDEST)
    return embeddings.IPAdapterPlusImageProjection(
        embed_dims=features, output_dims=width, hidden_dims=inside, depth=DEPTH,
        heads=max(1, inside // HEAD), num_queries=tokens,
    )  # fmt: skip


def _copy(layer: nn.Linear) -> nn.Linear:
    """A Linear without bias that trains, of the same weight."""
    weight: Tensor = layer.weight
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.detach().clone())
    return made

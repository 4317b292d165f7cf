"""IP-Adapters of a UNet: put in, scaled, written, taken out.

Imports diffusers: `conditioning` imports it on use, and documents its functions.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import Tensor, nn

from lorakern import adapters
from lorakern.conditioning import ip_files, ip_layouts, ip_scales
from lorakern.conditioning.cache import Cache
from lorakern.conditioning.ip_adapter import IPAdapterProcessor
from lorakern.conditioning.ip_files import Checkpoint
from lorakern.conditioning.ip_projection import IPProjection, takes
from lorakern.conditioning.ip_scales import Scale

_MODULES = {layout.module: name for name, layout in ip_layouts.LAYOUTS.items()}
_LORA_LAYERS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}


@dataclass(frozen=True)
class IPAdapter:
    """An IP-Adapter in a UNet.

    index: its place among the UNet's IP-Adapters, which is the order of image_embeds.
    variant: base, plus, full-face, faceid, faceid-portrait, faceid-plus, faceid-plusv2, instantid.
    lora: the name of its lorakern adapters, for set_multiplier; None without a LoRA.
    """

    index: int
    variant: str
    lora: str | None


class Loaded(IPProjection):
    """The projections of a UNet's IP-Adapters, and what is known of them."""

    def __init__(self, unet: nn.Module):
        super().__init__([], video=isinstance(unet, UNetMotionModel))
        self.train(unet.training)
        self.adapters: list[IPAdapter] = []
        self.masks = Cache(size=16)
        # parameters that a LoRA froze
        self.frozen: list[nn.Parameter] = []
        self.feature_extractor = None
        # what goes with an IP-Adapter: has `caches`, and `remove()` for when it is taken out
        self.guests: list = []
        self.hooks = [
            unet.register_forward_pre_hook(self.settle),
            unet.register_forward_pre_hook(self.check_masks, with_kwargs=True),
        ]


def load_ip_adapter(
    model,
    source: str | Path | Mapping | Checkpoint,
    *,
    scale: Scale = 1.0,
    shortcut: bool | None = None,
) -> IPAdapter:
    """See lorakern.conditioning.load_ip_adapter."""
    unet = unet_of(model)
    found = source if isinstance(source, Checkpoint) else ip_files.read(source, shortcut)
    places, cross = _places(unet), cross_attentions(unet)
    _check_layers(unet, found, cross)
    loras = _targets(unet, found, places)
    projection = ip_files.projection(found, unet.device, unet.dtype)
    _check_encoder(model, found, projection)
    check_room(unet)
    ip_scales.check(scale, [name for name, _ in cross.values()])
    made = [tuple(_linear(tensor, unet) for tensor in found.layers[k]) for k in cross]

    # what may still fail comes first
    lora, frozen = _attach(unet, loras) if loras else (None, [])
    loaded = put(unet, projection, made, scale, found.variant, lora)
    loaded.frozen += frozen
    _prepare_pictures(model, loaded)
    return loaded.adapters[-1]


def check_room(unet: nn.Module) -> None:
    """Raises ValueError where no IP-Adapter can be added; puts lost processors back."""
    if any(type(attn.processor) is FusedAttnProcessor2_0 for _, attn in _places(unet).values()):
        raise ValueError("QKV are fused; load IP-Adapters first, or unfuse_qkv_projections()")
    if unet.encoder_hid_proj is not None:
        unet.encoder_hid_proj.put_back()
        cross = cross_attentions(unet).values()
        if not all(isinstance(attn.processor, IPAdapterProcessor) for _, attn in cross):
            raise ValueError(
                "the UNet's IP-Adapters came from another UNet; call unload_ip_adapter"
            )


def put(
    unet: nn.Module, projection: nn.Module, layers: list[tuple[nn.Linear, nn.Linear]],
    scale: Scale, variant: str, lora: str | None = None,
) -> Loaded:  # fmt: skip
    """Add an IP-Adapter, given K' and V' of each cross-attention; nothing is checked."""
    loaded = unet.encoder_hid_proj
    if loaded is None:
        loaded = Loaded(unet)
    for (path, attn), (k, v) in zip(cross_attentions(unet).values(), layers, strict=True):
        if not isinstance(attn.processor, IPAdapterProcessor):
            processor = IPAdapterProcessor(
                attn.inner_dim, attn.cross_attention_dim, [], [], nn.ModuleList(), nn.ModuleList(),
                masks=loaded.masks, stock=attn.processor,
            )  # fmt: skip
            attn.set_processor(processor.train(attn.training))
        attn.processor.append(k, v, _tokens(projection), ip_scales.at(scale, path))
    loaded.append(projection)
    unet.encoder_hid_proj = loaded
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    loaded.adapters.append(IPAdapter(len(loaded.adapters), variant, lora))
    loaded.remember(unet)
    return loaded


def save_ip_adapter(
    model, path: str | Path, index: int = 0, metadata: Mapping[str, str] | None = None
) -> Path:
    """See lorakern.conditioning.save_ip_adapter."""
    unet = unet_of(model, loading=False)
    projections = unet.encoder_hid_proj.image_projection_layers
    if not 0 <= index < len(projections):
        raise ValueError(f"no IP-Adapter {index}; {len(projections)} are loaded")
    layer = projections[index]
    layers = {
        k: (attn.processor.to_k_ip[index].weight, attn.processor.to_v_ip[index].weight)
        for k, (_, attn) in _with_images(unet).items()
    }
    layout = _MODULES[type(layer).__name__]
    found = Checkpoint(
        "the UNet", layout, ip_layouts.to_authors(layout, layer.state_dict()), layers,
        _factors(unet, index), layout == "faceid-plus" and layer.shortcut,
    )  # fmt: skip
    return ip_files.write(found, path, metadata)


def unload_ip_adapter(model) -> None:
    """See lorakern.conditioning.unload_ip_adapter."""
    unet = unet_of(model, loading=False)
    loaded = unet.encoder_hid_proj
    if not isinstance(loaded, Loaded):
        raise ValueError("the IP-Adapters are diffusers'; call the pipeline's unload_ip_adapter()")
    for _, attn in _with_images(unet).values():
        mine = isinstance(attn.processor, IPAdapterProcessor)
        # a UNet made by from_unet2d of one with IP-Adapters has diffusers'
        attn.set_processor(attn.processor.stock if mine else AttnProcessor2_0())
    for guest in [*loaded.guests]:
        guest.remove()
    for adapter in loaded.adapters:
        if adapter.lora and adapters.find(unet, adapter.lora):
            adapters.eject(unet, adapter.lora)
    unet.encoder_hid_proj = unet.config.encoder_hid_dim_type = None
    _forget(unet)
    if loaded.settle in unet._forward_pre_hooks.values():
        for hook in loaded.hooks:
            hook.remove()
    for parameter in loaded.frozen:
        parameter.requires_grad_(True)
    if getattr(model, "feature_extractor", None) is loaded.feature_extractor is not None:
        model.register_modules(feature_extractor=None)


def set_ip_adapter_scale(model, scale: Scale) -> None:
    """See lorakern.conditioning.set_ip_adapter_scale."""
    unet = unet_of(model, loading=False)
    count = len(unet.encoder_hid_proj.image_projection_layers)
    scale = scale if isinstance(scale, list) else [scale] * count
    if len(scale) != count:
        raise ValueError(f"scale has {len(scale)} entries, {count} IP-Adapters are loaded")
    places = _with_images(unet)
    for one in scale:
        ip_scales.check(one, [path for path, _ in places.values()])
    for path, attn in places.values():
        attn.processor.scale = [ip_scales.at(one, path) for one in scale]


def cache_ip_adapter(model, on: bool = True) -> None:
    """See lorakern.conditioning.cache_ip_adapter."""
    unet = unet_of(model, loading=False)
    processors = [attn.processor for _, attn in _with_images(unet).values()]
    loaded = unet.encoder_hid_proj
    holders = [loaded, *processors, *getattr(loaded, "guests", [])]
    for holder in holders:
        # not diffusers'
        if hasattr(holder, "caches"):
            for cache in holder.caches:
                cache.on = on
                cache.clear()


# what fits


def unet_of(model, loading: bool = True) -> nn.Module:
    unet = getattr(model, "unet", model)
    if not isinstance(unet, (UNet2DConditionModel, UNetMotionModel)):
        raise ValueError(
            f"want a UNet2DConditionModel or UNetMotionModel, or a pipeline with one as `unet`,"
            f" got {type(model).__name__}"
        )
    at = unet.encoder_hid_proj
    if not loading and not isinstance(at, MultiIPAdapterImageProjection):
        raise ValueError(f"{type(model).__name__} has no IP-Adapter; load_ip_adapter puts one in")
    if loading and at is not None and not isinstance(at, Loaded):
        raise ValueError(
            f"the UNet has a {type(at).__name__} already; unload it before loading an IP-Adapter"
        )
    return unet


def _places(unet: nn.Module) -> dict[int, tuple[str, Attention]]:
    """Number in the authors' files -> path and layer of each attention; motion has no number."""
    names = [
        name.removesuffix(".processor")
        for name in unet.attn_processors
        if not name.startswith("encoder_hid_proj") and "motion_modules" not in name
    ]
    return {k: (name, unet.get_submodule(name)) for k, name in enumerate(names)}


def cross_attentions(unet: nn.Module) -> dict[int, tuple[str, Attention]]:
    """As _places, those that see the text."""
    return {k: place for k, place in _places(unet).items() if not place[0].endswith("attn1")}


def _with_images(unet: nn.Module) -> dict[int, tuple[str, Attention]]:
    """As _places, those with a processor of an IP-Adapter, which is put back where it was lost."""
    if isinstance(unet.encoder_hid_proj, IPProjection):
        unet.encoder_hid_proj.put_back()
    return {
        k: place
        for k, place in _places(unet).items()
        if isinstance(place[1].processor, IPAdapterAttnProcessor2_0)
    }


def _check_layers(unet: nn.Module, found: Checkpoint, cross: dict) -> None:
    widths = sorted({attn.to_k.in_features for _, attn in cross.values()})
    if len(cross) != len(found.layers) or widths != [found.width]:
        raise ValueError(
            f"{found.source} is for {len(found.layers)} layers of {found.width} channels, the UNet"
            f" has {len(cross)} of {' and '.join(map(str, widths))}: another family of models"
        )
    for k, (name, attn) in cross.items():
        if k not in found.layers:
            raise ValueError(f"{found.source}: no ip_adapter.{k}, which is {name}")
        want = [attn.to_k.out_features, attn.to_k.in_features]
        for which, tensor in zip("kv", found.layers[k], strict=True):
            if list(tensor.shape) != want:
                raise ValueError(
                    f"{found.source}: ip_adapter.{k}.to_{which}_ip is {list(tensor.shape)},"
                    f" {name} has {want}"
                )


def _check_encoder(model, found: Checkpoint, projection: nn.Module) -> None:
    """The pipeline's image encoder, when it has one, must give what the projection takes."""
    config = getattr(getattr(model, "image_encoder", None), "config", None)
    if config is None or found.layout == "faceid" or found.variant == "instantid":
        return
    width, tokens = takes(projection)
    if found.layout == "faceid-plus":
        width, tokens = projection.proj_in.in_features, True
    given = config.hidden_size if tokens else config.projection_dim
    if given != width:
        raise ValueError(
            f"{found.source} takes image embeddings of {width} channels, the pipeline's"
            f" image_encoder gives {given}"
        )


def _tokens(projection: nn.Module) -> int:
    if hasattr(projection, "latents"):
        return projection.latents.shape[1]
    # 256 patches and the class token of full-face
    names = ("num_image_text_embeds", "num_tokens")
    return next((getattr(projection, n) for n in names if hasattr(projection, n)), 257)


def _linear(weight: Tensor, unet: nn.Module) -> nn.Linear:
    """A frozen Linear with a copy of the weight."""
    out_features, in_features = weight.shape
    made = nn.Linear(in_features, out_features, bias=False, device="meta")
    made.weight = nn.Parameter(weight.to(unet.device, unet.dtype, copy=True), requires_grad=False)
    return made.eval()


def _prepare_pictures(model, loaded: Loaded) -> None:
    """A pipeline that has an image encoder gets what makes pixels for it, as diffusers gives it."""
    encoder = getattr(model, "image_encoder", None)
    if encoder is not None and getattr(model, "feature_extractor", True) is None:
        from transformers import CLIPImageProcessor

        size = encoder.config.image_size
        loaded.feature_extractor = CLIPImageProcessor(size=size, crop_size=size)
        model.register_modules(feature_extractor=loaded.feature_extractor)


def _forget(unet: nn.Module) -> None:
    """What unfuse_qkv_projections() will put back has IP-Adapters no more."""
    before = getattr(unet, "original_attn_processors", None)
    if isinstance(before, dict):
        unet.original_attn_processors = {
            name: p.stock if isinstance(p, IPAdapterProcessor) else p
            for name, p in before.items()
            if not name.startswith("encoder_hid_proj")
        }


# FaceID's LoRA


def _targets(unet: nn.Module, found: Checkpoint, places: dict) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of a layer -> down [R, I] and up [O, R]."""
    targets = {}
    for k, by_layer in found.loras.items():
        if k not in places:
            raise ValueError(
                f"{found.source}: a LoRA of attention {k}, the UNet has {len(places)}: 0 to"
                f" {len(places) - 1}"
            )
        for of, (down, up) in by_layer.items():
            path = _lora_path(unet, places[k][0], of)
            want, got = list(unet.get_submodule(path).weight.shape), [len(up), down.shape[1]]
            if want != got:
                raise ValueError(
                    f"{found.source}: ip_adapter.{k}.to_{of}_lora is for a weight {got},"
                    f" {path} has {want}"
                )
            targets[path] = down, up
    return targets


def _lora_path(unet: nn.Module, attention: str, of: str) -> str:
    path = f"{attention}.{_LORA_LAYERS[of]}"
    # a user's LoRA by PEFT stays where it is, around this one
    return path + ".base_layer" * ("base_layer" in unet.get_submodule(path)._modules)


@torch.no_grad()
def _attach(
    unet: nn.Module, targets: dict[str, tuple[Tensor, Tensor]]
) -> tuple[str, list[nn.Parameter]]:
    """Frozen adapters beside those that are there; all or none. Their name, and what they froze."""
    taken = {a.name for stack in adapters.find(unet).values() for a in stack}
    name = next(n for i in itertools.count() if (n := f"ip_adapter_{i}") not in taken)
    trained = [p for p in unet.parameters() if p.requires_grad]
    try:
        for path, (down, up) in targets.items():
            rank = down.shape[0]
            made = adapters.attach(unet, path, "lora", rank=rank, name=name).eval()
            for own, tensor in ((made.down, down), (made.up, up)):
                own.requires_grad_(False).copy_(tensor)
    except BaseException:
        if adapters.find(unet, name):
            adapters.eject(unet, name)
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    return name, [p for p in trained if not p.requires_grad]


def _factors(unet: nn.Module, index: int) -> dict:
    """The LoRA of an IP-Adapter as a checkpoint has it."""
    loaded, found = unet.encoder_hid_proj, {}
    if not isinstance(loaded, Loaded):
        if f"faceid_{index}" in getattr(unet, "peft_config", {}):
            raise ValueError(f"the LoRA of IP-Adapter {index} is PEFT's; load it with lorakern")
        return {}
    name = loaded.adapters[index].lora
    for k, (attention, _) in _places(unet).items():
        for of in _LORA_LAYERS:
            layer = unet.get_submodule(_lora_path(unet, attention, of))
            pair = None
            if isinstance(layer, adapters.Adapter):
                pair = next(((a.down, a.up) for a in layer.chain() if a.name == name), None)
            if pair is not None:
                found.setdefault(k, {})[of] = pair
    return found

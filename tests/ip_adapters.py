"""Random IP-Adapters in their authors' layout, for the small UNets of the tests."""

import torch

EMBED, FACE, TOKENS = 48, 24, 9


def unet(family: str = "sd", **changes):
    """A random UNet like SD 1.5's ("sd"), SDXL's ("xl"), or AnimateDiff's ("motion")."""
    import tiny
    from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

    torch.manual_seed(0)
    if family == "xl":
        changes = {
            "cross_attention_dim": 64, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 32,
            "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
        } | changes  # fmt: skip
    made = UNet2DConditionModel(**tiny.unet_config(**changes)).eval()
    if family == "motion":
        motion = MotionAdapter(
            block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=8,
            motion_num_attention_heads=2,
        )  # fmt: skip
        made = UNetMotionModel.from_unet2d(made, motion).eval()
    return made


def _make(shapes: dict, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def one(key, shape):
        x = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return 1 + x if "norm" in key and key.endswith("weight") and len(shape) == 1 else x

    return {key: one(key, shape) for key, shape in shapes.items()}


def _resampler(prefix: str, features: int, width: int, out: int, heads: int = 2) -> dict:
    inner, shapes = 64 * heads, {}
    for name, o, i in (("proj_in", width, features), ("proj_out", out, width)):
        shapes |= {f"{prefix}{name}.weight": (o, i), f"{prefix}{name}.bias": (o,)}
    shapes |= {f"{prefix}norm_out.{n}": (out,) for n in ("weight", "bias")}
    for layer in range(4):
        at = f"{prefix}layers.{layer}."
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"{at}{norm}.{n}": (width,) for n in ("weight", "bias")}
        shapes |= {
            f"{at}0.to_q.weight": (inner, width), f"{at}0.to_kv.weight": (2 * inner, width),
            f"{at}0.to_out.weight": (width, inner), f"{at}1.1.weight": (4 * width, width),
            f"{at}1.3.weight": (width, 4 * width),
        }  # fmt: skip
    return shapes


def _two(first: tuple, second: tuple, norm: str, width: int) -> dict:
    shapes = {}
    for name, (o, i) in (("proj.0", first), ("proj.2", second)):
        shapes |= {f"{name}.weight": (o, i), f"{name}.bias": (o,)}
    return shapes | {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}


def projection(variant: str, width: int) -> dict:
    """Shapes of `image_proj` for a UNet whose text has this width."""
    if variant == "base":
        shapes = {"proj.weight": (4 * width, EMBED), "proj.bias": (4 * width,)}
        return shapes | {"norm.weight": (width,), "norm.bias": (width,)}
    if variant in ("plus", "instantid"):
        features = 512 if variant == "instantid" else EMBED
        return {"latents": (1, 5, 40)} | _resampler("", features, 40, width)
    if variant == "full-face":
        return _two((EMBED, EMBED), (width, EMBED), "proj.3", width)
    if variant.startswith("faceid-plus"):
        face = _two((2 * FACE, FACE), (4 * width, 2 * FACE), "norm", width)
        return face | _resampler("perceiver_resampler.", EMBED, width, width)
    tokens = 16 if variant == "faceid-portrait" else 4
    return _two((2 * FACE, FACE), (tokens * width, 2 * FACE), "norm", width)


def checkpoint(unet, variant: str, *, lora: int = 0, seed: int = 0) -> dict:
    """A state dict; `lora` is the rank of its LoRA."""
    names = [n for n in unet.attn_processors if "motion" not in n and "encoder_hid" not in n]
    shapes = {}
    for k, name in enumerate(names):
        attn = unet.get_submodule(name.removesuffix(".processor"))
        if name.endswith("attn2.processor"):
            shape = attn.to_k.weight.shape
            shapes |= {f"{k}.to_k_ip.weight": shape, f"{k}.to_v_ip.weight": shape}
        if lora:
            layers = {"q": attn.to_q, "k": attn.to_k, "v": attn.to_v, "out": attn.to_out[0]}
            for of, layer in layers.items():
                o, i = layer.weight.shape
                shapes |= {
                    f"{k}.to_{of}_lora.down.weight": (lora, i),
                    f"{k}.to_{of}_lora.up.weight": (o, lora),
                }
    width = unet.config.cross_attention_dim
    return {
        "image_proj": _make(projection(variant, width), 2 * seed),
        "ip_adapter": _make(shapes, 2 * seed + 1),
    }


def embeds(variant: str, images: int = 1, batch: int = 2, seed: int = 3) -> torch.Tensor:
    """What the variant takes: [batch, images, ...]."""
    generator = torch.Generator().manual_seed(seed)
    shape = {
        "base": (EMBED,), "plus": (TOKENS, EMBED), "full-face": (TOKENS, EMBED),
        "instantid": (1, 512),
    }.get(variant, (FACE,))  # fmt: skip
    return torch.randn(batch, images, *shape, generator=generator)


def set_clip(unet, images: int = 1, batch: int = 2, index: int = 0) -> None:
    """The second input of FaceID-Plus."""
    generator = torch.Generator().manual_seed(4)
    layer = unet.encoder_hid_proj.image_projection_layers[index]
    layer.clip_embeds = torch.randn(batch, images, TOKENS, EMBED, generator=generator)


class Call:
    """The UNet's inputs, the same objects in every call; with 3 frames for AnimateDiff's."""

    def __init__(self, unet, image_embeds=None, masks=None, seed: int = 7, size=(8, 10)):
        generator = torch.Generator().manual_seed(seed)

        def make(*shape):
            return torch.randn(shape, generator=generator)

        frames = (3,) if hasattr(unet.config, "motion_num_attention_heads") else ()
        self.x = make(2, 4, *frames, *size)
        text = make(2, 6, unet.config.cross_attention_dim)
        self.text = text.repeat_interleave(frames[0], 0) if frames else text
        added = {"text_embeds": make(2, 32), "time_ids": make(2, 6)}
        self.added = {} if unet.config.addition_embed_type is None else added
        self.image_embeds, self.masks = image_embeds, masks

    def __call__(self, unet, **options):
        added, attention = dict(self.added), {}
        if self.image_embeds is not None:
            added["image_embeds"] = self.image_embeds
        if self.masks is not None:
            attention["ip_adapter_masks"] = self.masks
        return unet(
            self.x, torch.tensor(3), self.text, added_cond_kwargs=added,
            cross_attention_kwargs=attention, **options,
        ).sample  # fmt: skip


def predict(unet, image_embeds=None, masks=None, seed: int = 7, size=(8, 10)):
    """The UNet on a fixed input."""
    return Call(unet, image_embeds, masks, seed, size)(unet)

"""Adapters that add an input to the model: image prompts, faces. Imports diffusers on use only."""

from collections.abc import Callable, Mapping
from pathlib import Path


def accelerate(model) -> Callable[[], None]:
    """Run the IP-Adapters that diffusers loaded on lorakern's kernels, in place.

    Weights, scales and masks stay where and what they are: the pipeline's `set_ip_adapter_scale`,
    `load_ip_adapter` and `unload_ip_adapter` go on working. Loading another IP-Adapter makes new
    processors; call this again after it. What stays from step to step is kept, as
    `cache_ip_adapter` says.

    Args:
        model: a diffusers pipeline with a UNet, or the UNet itself.

    Returns:
        A function without arguments that puts diffusers' own processors back.

    Raises:
        ValueError: the model has no IP-Adapter of diffusers.
    """
    from lorakern.conditioning import ip_adapter

    return ip_adapter.accelerate(model)


def load_ip_adapter(
    model,
    source: str | Path | Mapping,
    *,
    scale: float | list | Mapping = 1.0,
    shortcut: bool | None = None,
):
    """Put an IP-Adapter into a UNet, beside those that are there; they are frozen.

    The variant is told from keys and shapes: base, Plus, Plus-face, full-face, FaceID, FaceID-Plus
    (v1 and v2), portrait, SDXL's, InstantID's image adapter. A FaceID's LoRA becomes lorakern
    adapters, which stack on the user's (of lorakern in any order; PEFT's must be there first). The
    UNet is called as with diffusers' IP-Adapters, whose pipelines go on with it:
    `added_cond_kwargs={"image_embeds": [...]}`, one entry an IP-Adapter. Attention slicing and
    fused QKV leave these layers as they are. `unload_ip_adapter` here takes everything out;
    diffusers' own leaves the LoRA.

    Args:
        model: a UNet2DConditionModel, a UNetMotionModel, or a pipeline with one.
        source: the authors' file, .safetensors or of torch.save (.bin), or its state dict.
        scale: as one entry of `set_ip_adapter_scale`.
        shortcut: whether a FaceID-Plus is its version 2, which has the same tensors; None looks
            for "plusv2" in the file's name.

    Returns:
        ip_model.IPAdapter: its index, its variant, the name of its LoRA's adapters or None.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is broken or of another family, an image encoder of another width,
            a scale that does not fit, a model that has no room for it. Nothing is changed then.
    """
    from lorakern.conditioning import ip_model

    return ip_model.load_ip_adapter(model, source, scale=scale, shortcut=shortcut)


def new_ip_adapter(
    model, features: int, *, variant: str = "base", tokens: int | None = None, scale: float = 1.0
):
    """Put a new IP-Adapter into a UNet, to be trained: its parameters alone require a gradient.

    K' and V' begin as copies of K and V, the projection as its authors' do. The UNet's own
    parameters are frozen; it is called as after `load_ip_adapter`, and `save_ip_adapter` writes it.

    Args:
        model: as in load_ip_adapter, without quantized weights.
        features: the width of the image embeddings: [B, images, features] for base, of an image
            encoder's tokens [B, images, T, features] for plus.
        variant: "base" (a Linear and a LayerNorm) or "plus" (a Resampler of 4 layers).
        tokens: that it makes of an image; None is 4 for base and 16 for plus.
        scale: as in load_ip_adapter; no unit.

    Returns:
        ip_model.IPAdapter; `ip_train.parameters(model, its index)` are its parameters by name.

    Raises:
        ValueError: another variant, or a model that has no room for it.

    Source: Ye et al. 2023, arXiv:2308.06721.
    """
    from lorakern.conditioning import ip_train

    return ip_train.new_ip_adapter(model, features, variant=variant, tokens=tokens, scale=scale)


def save_ip_adapter(
    model, path: str | Path, index: int = 0, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write an IP-Adapter, lorakern's or diffusers', in its authors' layout and its own dtype.

    Args:
        path: .safetensors or .bin; what is there is replaced in one step, or stays.
        index: which one.
        metadata: for a .safetensors' header.

    Raises:
        ValueError: no such IP-Adapter, another suffix, or a LoRA of PEFT. Nothing is written then.
    """
    from lorakern.conditioning import ip_model

    return ip_model.save_ip_adapter(model, path, index, metadata)


def unload_ip_adapter(model) -> None:
    """Take all IP-Adapters that lorakern loaded out; the UNet is as before them, bit for bit.

    Raises:
        ValueError: the model has none.
    """
    from lorakern.conditioning import ip_model

    ip_model.unload_ip_adapter(model)


def set_ip_adapter_scale(model, scale: float | list | Mapping) -> None:
    """Set how strong IP-Adapters are; 0 is the model without them, bit for bit. No unit.

    Args:
        scale: one for all, or a list with an entry each: a number; a list of one an image, for
            use with masks; or {"down" | "mid" | "up": number, list of one an attention, or
            {"block_<n>": number or list}}, where what is left out is 0.

    Raises:
        ValueError: a length or a name does not fit. Nothing is changed then.
    """
    from lorakern.conditioning import ip_model

    ip_model.set_ip_adapter_scale(model, scale)


def cache_ip_adapter(model, on: bool = True) -> None:
    """Keep from step to step what does not change (the default), or stop to; forget what is kept.

    Kept are the image tokens, K and V of text and images, and resized masks, while gradients are
    disabled and all that they are made of is the same: tensors, weights, adapters and their
    strengths, dtype, device. The outputs are the same bits. What is written through `tensor.data`
    is not seen; call this after it.

    Raises:
        ValueError: the model has no IP-Adapter.
    """
    from lorakern.conditioning import ip_model

    ip_model.cache_ip_adapter(model, on)


def load_instantid(
    pipe,
    adapter: str | Path | Mapping,
    *,
    scale: float | list | Mapping = 0.8,
    controlnet: int = 0,
    encoder: Callable | None = None,
):
    """Put InstantID into a ControlNet pipeline of diffusers, which stays what it is.

    The image adapter goes into the UNet as `load_ip_adapter` puts one in; the pipeline's ControlNet
    is the IdentityNet, and gets the tokens of the face that the pipeline is given in the place of
    the text's. Both make them once per face, not once per step.

        identity = load_instantid(pipe, "ip-adapter.bin")
        pipe("a portrait", **identity.inputs(embedding, keypoints, (1024, 1024)),
             controlnet_conditioning_scale=0.8)

    `set_ip_adapter_scale` and `cache_ip_adapter` are for it too; `unload_ip_adapter` takes all
    out, bit for bit. No face model comes with it: a face is a vector of 512 and five points.

    Args:
        pipe: a StableDiffusionXLControlNetPipeline, or its image-to-image or inpainting sibling.
        adapter: the authors' file, .safetensors or .bin, their folder, or a state dict.
        scale: of the image attention, as `load_ip_adapter`; no unit. The IdentityNet's is the
            pipeline's `controlnet_conditioning_scale`.
        controlnet: which is the IdentityNet where the pipeline has several; the others get text.
        encoder: picture -> (embedding [512], keypoints [5, 2]), for `inputs_of`.

    Returns:
        instantid.InstantID.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `load_ip_adapter`; another kind of adapter, a pipeline without a ControlNet
            or with an InstantID, a ControlNet of another width. Nothing is changed then.

    Source: Wang et al. 2024, arXiv:2401.07519.
    """
    from lorakern.conditioning import instantid

    return instantid.load_instantid(
        pipe, adapter, scale=scale, controlnet=controlnet, encoder=encoder
    )


def save_instantid(identity, folder: str | Path, *, bin: bool = False) -> Path:
    """Write an InstantID as its authors do: ip-adapter.safetensors and ControlNetModel/.

    Args:
        identity: of `load_instantid`.
        folder: each of the two is replaced whole, or stays.
        bin: ip-adapter.bin instead, of torch.save.

    Raises:
        ValueError: it was taken out of its UNet.
    """
    from lorakern.conditioning import instantid

    return instantid.save_instantid(identity, folder, bin=bin)


def draw_keypoints(points, size: tuple[int, int]):
    """The picture of five points that InstantID's IdentityNet takes.

    Four limbs from eyes and mouth to the nose, ellipses of half-width 4 in the colour of the point
    that is not the nose, times 0.6; over them discs of radius 10, red, green, blue, yellow and
    magenta; on black. Points outside are cut off. It is drawn with Pillow: discs are those of
    OpenCV, which the authors draw with, and of limbs some pixels at the edge differ (0.4 % of what
    is drawn, on average).

    Args:
        points: [5, 2], x and y in pixels: left eye, right eye, nose, left and right corner of the
            mouth, as one sees them.
        size: (width, height) in pixels.

    Returns:
        A PIL image, RGB.

    Raises:
        ValueError: another shape, a value that is not finite, a size that is none.

    Source: Wang et al. 2024, arXiv:2401.07519.
    """
    from lorakern.conditioning import faces

    return faces.draw(points, size)

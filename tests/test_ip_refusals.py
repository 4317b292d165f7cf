"""What does not fit an IP-Adapter or its UNet is refused with both numbers, before any change."""

import pickle
import re
from types import SimpleNamespace

import ip_adapters as ip
import pytest
import torch

import lorakern

pytest.importorskip("diffusers")
from diffusers.loaders import IPAdapterMixin

from lorakern import conditioning
from lorakern.conditioning import ip_files


@pytest.fixture
def unet():
    return ip.unet()


def changed(unet, variant, section, key, change, **options):
    """A checkpoint with one tensor changed, or without it where change gives None."""
    checkpoint = ip.checkpoint(unet, variant, **options)
    value = change(checkpoint[section][key])
    if value is None:
        del checkpoint[section][key]
    else:
        checkpoint[section][key] = value
    return checkpoint


def more(unet, section, key, variant="base", **options):
    checkpoint = ip.checkpoint(unet, variant, **options)
    checkpoint[section][key] = torch.zeros(2, 2)
    return checkpoint


CHECKPOINTS = {
    "SDXL's on SD": (
        lambda u: ip.checkpoint(ip.unet("xl"), "base"),
        r"for 5 layers of 64 channels, the UNet has 4 of 32: another family",
    ),
    "the same width, more layers": (
        lambda u: ip.checkpoint(ip.unet("xl", cross_attention_dim=32), "plus"),
        r"for 5 layers of 32 channels, the UNet has 4 of 32",
    ),
    "a layer of another size": (
        lambda u: changed(u, "base", "ip_adapter", "3.to_k_ip.weight", lambda t: t[:-1]),
        r"ip_adapter.3.to_k_ip is \[31, 32\], up_blocks.1.* has \[32, 32\]",
    ),
    "other numbers": (
        lambda u: {
            section: {k.replace("1.to_", "2.to_", 1): t for k, t in tensors.items()}
            for section, tensors in ip.checkpoint(u, "base").items()
        },
        r"no ip_adapter.1, which is down_blocks",
    ),
    "tokens": (
        lambda u: changed(u, "base", "image_proj", "proj.weight", lambda t: t[:-3]),
        r"image_proj.proj.weight has 125 rows, not n times 32",
    ),
    "the bias of fewer tokens": (
        lambda u: changed(u, "base", "image_proj", "proj.bias", lambda t: t[:96]),
        r"image_proj.proj.bias is \[96\], where a base of its other shapes has \[128\]",
    ),
    "heads": (
        lambda u: changed(
            u, "plus", "image_proj", "layers.0.0.to_q.weight", lambda t: t[:100]
        ),
        r"layers.0.0.to_q.weight has 100 rows, not n times 64",
    ),
    "a projection of another width": (
        lambda u: {
            "image_proj": ip.checkpoint(ip.unet("xl"), "full-face")["image_proj"],
            "ip_adapter": ip.checkpoint(u, "base")["ip_adapter"],
        },
        r"tokens of 64 channels, 1.to_k_ip takes 32",
    ),
    "no norm": (
        lambda u: changed(u, "base", "image_proj", "norm.weight", lambda t: None),
        r"image_proj.norm.weight is not there",
    ),
    "a layer cut off": (
        lambda u: changed(u, "plus", "image_proj", "layers.3.1.0.bias", lambda t: None),
        r"is plus, but without image_proj.layers.3.1.0.bias",
    ),
    "K' alone": (
        lambda u: changed(u, "base", "ip_adapter", "3.to_v_ip.weight", lambda t: None),
        r"layer 3 has to_k_ip without the other",
    ),
    "not finite": (
        lambda u: changed(u, "base", "ip_adapter", "3.to_v_ip.weight", lambda t: t / 0),
        r"ip_adapter.3.to_v_ip.weight: 1024 of 1024 values are not finite",
    ),
    "a key of no projection": (
        lambda u: more(u, "image_proj", "extra.weight"),
        r"is base, which has no such keys: image_proj.extra.weight",
    ),
    "a key of no layer": (
        lambda u: more(u, "ip_adapter", "1.to_x_ip.weight"),
        r"keys that no IP-Adapter has: ip_adapter.1.to_x_ip.weight",
    ),
    "another variant": (
        lambda u: {"image_proj.w.weight": torch.ones(2, 2), "ip_adapter.a": torch.ones(2, 2)},
        r"image_proj is of no known variant; its keys: w.weight",
    ),
    "a LoRA file": (
        lambda u: {"lora_unet_x.lora_down.weight": torch.ones(2, 2)},
        r"no image_proj, so is no IP-Adapter; its keys: lora_unet_x",
    ),
    "a LoRA of another size": (
        lambda u: changed(
            u, "faceid", "ip_adapter", "2.to_q_lora.up.weight", lambda t: t[:-1], lora=2
        ),
        r"2.to_q_lora is for a weight \[31, 32\], .*to_q has \[32, 32\]",
    ),
    "a LoRA of two ranks": (
        lambda u: changed(
            u, "faceid", "ip_adapter", "2.to_q_lora.up.weight", lambda t: t[:, :1], lora=2
        ),
        r"2.to_q_lora wants down \[R, I\], up \[O, R\]",
    ),
    "a LoRA of no layer": (
        lambda u: {
            section: {re.sub(r"^7.to_(.*_lora)", r"8.to_\1", k): t for k, t in tensors.items()}
            for section, tensors in ip.checkpoint(u, "faceid", lora=2).items()
        },
        r"a LoRA of attention 8, the UNet has 8: 0 to 7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit(case, unet):
    make, message = CHECKPOINTS[case]
    before, state = dict(unet.attn_processors), unet.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        conditioning.load_ip_adapter(unet, make(unet))
    assert dict(unet.attn_processors) == before and unet.state_dict().keys() == state
    assert unet.encoder_hid_proj is None and not unet._forward_pre_hooks
    assert not lorakern.adapters.find(unet)


def test_files_that_are_broken_or_run_code(unet, tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    path = tmp_path / "ip.bin"
    path.write_bytes(pickle.dumps({"image_proj": Evil(), "ip_adapter": {}}, 2))
    with pytest.raises(ValueError, match=r"not a whole file of torch.save with tensors alone"):
        ip_files.read(path)
    torch.save(ip.checkpoint(unet, "base"), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(
        ValueError, match=r"ip.bin \(5000 bytes\) is not a whole file of torch.save"
    ):
        ip_files.read(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(ValueError, match="holds a list, not tensors by key"):
        ip_files.read(path)
    torch.save({"image_proj": {"proj.weight": "text"}, "ip_adapter": {"a": torch.ones(2, 2)}}, path)
    with pytest.raises(ValueError, match=r"image_proj.proj.weight is a str"):
        ip_files.read(path)
    path = path.with_suffix(".safetensors")
    path.write_bytes(b"\x10")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        ip_files.read(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        conditioning.load_ip_adapter(unet, tmp_path / "none.bin")
    assert not (tmp_path / "ran").exists()
    conditioning.load_ip_adapter(unet, ip.checkpoint(unet, "base"))
    with pytest.raises(ValueError, match=r"a .safetensors or a .bin file"):
        conditioning.save_ip_adapter(unet, tmp_path / "ip.ckpt")
    with pytest.raises(ValueError, match="no IP-Adapter 1; 1 are loaded"):
        conditioning.save_ip_adapter(unet, tmp_path / "ip.bin", 1)


@pytest.mark.parametrize(
    ("variant", "config"),
    [
        ("base", {"projection_dim": 1280, "hidden_size": ip.EMBED}),
        ("plus", {"projection_dim": ip.EMBED, "hidden_size": 1664}),
        ("faceid-plus", {"projection_dim": ip.EMBED, "hidden_size": 1664}),
    ],
)
def test_the_image_encoder_of_the_pipeline_is_another(variant, config, unet):
    pipe = SimpleNamespace(
        unet=unet, image_encoder=SimpleNamespace(config=SimpleNamespace(**config))
    )
    wrong = next(n for n in config.values() if n != ip.EMBED)
    with pytest.raises(ValueError, match=f"of {ip.EMBED} channels, .* gives {wrong}"):
        conditioning.load_ip_adapter(pipe, ip.checkpoint(unet, variant))
    assert unet.encoder_hid_proj is None
    conditioning.load_ip_adapter(pipe, ip.checkpoint(unet, "faceid"))


# variant, shape of its image embeddings, message
WRONG_EMBEDS = {
    "width": ("plus", (2, 1, 9, 1664), r"width is 1664, .* takes 48"),
    "no tokens": ("plus", (2, 1, 48), r"want \[B, images, tokens, 48\], got \[2, 1, 48\]"),
    "tokens": ("base", (2, 1, 9, 48), r"9 tokens an image, ImageProjection takes 1"),
    "flat": ("faceid", (2, 24), r"want \[B, images, 24\], got \[2, 24\]"),
}


@pytest.mark.parametrize("case", WRONG_EMBEDS)
def test_image_embeddings_that_do_not_fit(case, unet):
    variant, shape, message = WRONG_EMBEDS[case]
    conditioning.load_ip_adapter(unet, ip.checkpoint(unet, variant))
    with pytest.raises(ValueError, match=message):
        ip.predict(unet, [torch.ones(shape)])
    with pytest.raises(ValueError, match="of 2 IP-Adapters, 1 are loaded"):
        ip.predict(unet, [ip.embeds(variant)] * 2)


def test_clip_embeddings_that_do_not_fit(unet):
    conditioning.load_ip_adapter(unet, ip.checkpoint(unet, "faceid-plus"))
    layer, embeds = unet.encoder_hid_proj.image_projection_layers[0], [ip.embeds("faceid-plus")]
    for clip, message in (
        (None, r"needs clip_embeds \[B, images, tokens, 48\]"),
        (torch.ones(2, 1, 9, 1664), r"tokens, 48\], got \[2, 1, 9, 1664\]"),
        (torch.ones(1, 1, 9, 48), r"2 faces, but clip_embeds of 1"),
    ):
        layer.clip_embeds = clip
        with pytest.raises(ValueError, match=message):
            ip.predict(unet, embeds)


def test_scales_that_do_not_fit(unet):
    conditioning.load_ip_adapter(unet, ip.checkpoint(unet, "base"))
    embeds = [ip.embeds("base", images=2)]
    with torch.no_grad():
        want = ip.predict(unet, embeds)
    for scale, message in (
        ([0.5, 0.5], "scale has 2 entries, 1 IP-Adapters"),
        ({"up": {"block_1": [1.0, 1.0, 1.0]}}, "up block_1 has 3 entries, it has 2 attentions"),
        ({"up": {"block_7": 1.0}}, "up has no cross-attention in block_7; it has block_1"),
        ({"left": 1.0}, "parts left; want down, mid, up"),
        (float("nan"), "want a finite number"),
        ("0.5", "want a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            conditioning.set_ip_adapter_scale(unet, scale)
        if not isinstance(scale, list):
            with pytest.raises(ValueError, match=message):
                conditioning.load_ip_adapter(unet, ip.checkpoint(unet, "base"), scale=scale)
    with torch.no_grad():
        assert torch.equal(ip.predict(unet, embeds), want)
    conditioning.set_ip_adapter_scale(unet, [[0.5, 0.5]])
    with pytest.raises(ValueError, match="2 scales, one an image, but no mask"):
        ip.predict(unet, embeds)
    with pytest.raises(ValueError, match=r"Number of masks \(3\) does not match.* \(2\)"):
        ip.predict(unet, embeds, [torch.ones(1, 3, 16, 20)])
    conditioning.set_ip_adapter_scale(unet, [[0.5, 0.5, 0.5]])
    with pytest.raises(ValueError, match=r"Number of masks \(2\) does not match.* \(3\)"):
        ip.predict(unet, embeds, [torch.ones(1, 2, 16, 20)])


def test_masks_of_another_form(unet):
    conditioning.load_ip_adapter(unet, ip.checkpoint(unet, "base"))
    embeds = [ip.embeds("base")]
    with pytest.raises(ValueError, match="IP-Adapter 0 is 32 x 32, the latent 8 x 10"):
        ip.predict(unet, embeds, [torch.ones(1, 1, 32, 32)])
    # the rounding of an image of 65 x 81 pixels to 8 x 10 latents
    ip.predict(unet, embeds, [torch.ones(1, 1, 65, 81)])


def test_models_without_room_for_it(unet):
    with pytest.raises(
        ValueError, match=r"want a UNet2DConditionModel or UNetMotionModel.* got Linear"
    ):
        conditioning.load_ip_adapter(torch.nn.Linear(2, 2), {})
    for function in (conditioning.unload_ip_adapter, conditioning.cache_ip_adapter):
        with pytest.raises(ValueError, match="UNet2DConditionModel has no IP-Adapter"):
            function(unet)
    state = ip.checkpoint(unet, "base")
    unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    with pytest.raises(ValueError, match="has a MultiIPAdapterImageProjection already"):
        conditioning.load_ip_adapter(unet, state)
    with pytest.raises(ValueError, match="the pipeline's unload_ip_adapter"):
        conditioning.unload_ip_adapter(unet)


def test_one_that_diffusers_loaded_is_scaled_and_saved(unet, tmp_path):
    class Pipe(IPAdapterMixin):
        pass

    pipe, state = Pipe(), ip.checkpoint(unet, "full-face")
    pipe.unet = unet
    unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    conditioning.save_ip_adapter(pipe, tmp_path / "ip.bin")
    kept = torch.load(tmp_path / "ip.bin", weights_only=True)
    for section, tensors in state.items():
        assert kept[section].keys() == tensors.keys()
        assert all(torch.equal(kept[section][k], t) for k, t in tensors.items())
    embeds = [ip.embeds("full-face")]
    with torch.no_grad():
        conditioning.set_ip_adapter_scale(pipe, {"mid": 0.5})
        want = ip.predict(unet, embeds)
        pipe.set_ip_adapter_scale(1.0)
        assert not torch.equal(ip.predict(unet, embeds), want)
        pipe.set_ip_adapter_scale({"mid": 0.5})
        assert torch.equal(ip.predict(unet, embeds), want)

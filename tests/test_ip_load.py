"""IP-Adapters from their authors' files: every variant, together, back to a file, and out again."""

import copy

import ip_adapters as ip
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import lorakern

pytest.importorskip("diffusers")
from diffusers.loaders import IPAdapterMixin
from diffusers.models.attention_processor import SlicedAttnProcessor

from lorakern import conditioning
from lorakern.conditioning import ip_files

VARIANTS = [
    "base", "plus", "instantid", "full-face", "faceid", "faceid-portrait", "faceid-plus",
    "faceid-plusv2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Pipe(IPAdapterMixin):
    """A pipeline as far as an IP-Adapter needs one."""

    def __init__(self, unet):
        self.unet = unet


def stock(unet, states, scale):
    """A copy of the UNet with these IP-Adapters as diffusers loads them."""
    pipe = Pipe(copy.deepcopy(unet))
    pipe.unet._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    pipe.set_ip_adapter_scale(scale)
    return pipe.unet


def state_of(unet):
    return {k: v.clone() for k, v in unet.state_dict().items()}


def assert_as_before(unet, state, processors):
    assert unet.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in unet.state_dict().items())
    assert all(unet.attn_processors[n] is p for n, p in processors.items())
    assert unet.encoder_hid_proj is None and unet.config.encoder_hid_dim_type is None
    assert not unet._forward_pre_hooks and not lorakern.adapters.find(unet)
    assert all(p.requires_grad for p in unet.parameters())


CASES = [("sd", v) for v in VARIANTS]
CASES += [("xl", "instantid"), ("xl", "faceid-plusv2"), ("motion", "plus")]


@pytest.mark.parametrize(("family", "variant"), CASES, ids=map("-".join, CASES))
def test_a_file_gives_what_it_gives_in_diffusers_and_comes_back(family, variant, tmp_path):
    unet, v2 = ip.unet(family), variant == "faceid-plusv2"
    state, processors = state_of(unet), dict(unet.attn_processors)
    base = ip.predict(unet)
    checkpoint = ip.checkpoint(unet, variant)
    theirs = stock(unet, [checkpoint], 0.7)
    path = tmp_path / "ip.bin"
    torch.save(checkpoint, path)
    loaded = conditioning.load_ip_adapter(unet, path, scale=0.7, shortcut=v2 or None)
    assert (loaded.index, loaded.variant, loaded.lora) == (0, variant, None)
    for one in (unet, theirs):
        if variant.startswith("faceid-plus"):
            ip.set_clip(one)
            one.encoder_hid_proj.image_projection_layers[0].shortcut = v2
    embeds = [ip.embeds(variant)]
    got, want = (one.encoder_hid_proj(embeds)[0] for one in (unet, theirs))
    assert (got - want).abs().max() <= 1e-5
    got, want = ip.predict(unet, embeds), ip.predict(theirs, embeds)
    assert (got - want).abs().max() <= 1e-4
    assert (want - base).abs().max() > 1e-2, "the image changes nothing"

    file = conditioning.save_ip_adapter(unet, tmp_path / "ip.safetensors")
    again = ip_files.read(file)
    assert again.variant == variant
    flat = {f"{s}.{k}": t for s, part in checkpoint.items() for k, t in part.items()}
    kept = ip_files.storage.read_tensors(file)[0]
    assert kept.keys() == flat.keys() and all(torch.equal(kept[k], t) for k, t in flat.items())
    conditioning.save_ip_adapter(unet, path)
    nested = torch.load(path, weights_only=True)
    for section, tensors in checkpoint.items():
        assert nested[section].keys() == tensors.keys()
        assert all(torch.equal(nested[section][k], t) for k, t in tensors.items())

    conditioning.set_ip_adapter_scale(unet, 0.0)
    assert torch.equal(ip.predict(unet, embeds), base)
    conditioning.unload_ip_adapter(unet)
    assert_as_before(unet, state, processors)
    assert torch.equal(ip.predict(unet), base)


def test_the_name_of_a_file_tells_version_2(tmp_path):
    checkpoint = ip.checkpoint(ip.unet(), "faceid-plus")
    for name, variant in (("faceid-plus_sd", "faceid-plus"), ("FaceID-PlusV2_sd", "faceid-plusv2")):
        torch.save(checkpoint, tmp_path / f"{name}.bin")
        assert ip_files.read(tmp_path / f"{name}.bin").variant == variant
    with pytest.raises(ValueError, match="is base; shortcut is of faceid-plus"):
        ip_files.read(ip.checkpoint(ip.unet(), "base"), shortcut=True)


SCALES = {
    "numbers": [0.7, -0.4],
    "one by block": [{"up": {"block_1": [0.0, 1.0]}}, 0.3],
    "parts": [{"down": 0.5, "mid": 2.0}, {"mid": [0.4], "up": 1.0}],
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_two_adapters_have_scales_by_block(scale):
    unet = ip.unet()
    states = [ip.checkpoint(unet, "base", seed=1), ip.checkpoint(unet, "plus", seed=2)]
    theirs = stock(unet, states, scale)
    for state, one in zip(states, scale, strict=True):
        conditioning.load_ip_adapter(unet, state, scale=one)
    embeds = [ip.embeds("base", images=2), ip.embeds("plus")]
    want, got = ip.predict(theirs, embeds), ip.predict(unet, embeds)
    assert (got - want).abs().max() <= 1e-4
    conditioning.set_ip_adapter_scale(unet, 0.0)
    assert not torch.equal(ip.predict(unet, embeds), got)
    Pipe(unet).set_ip_adapter_scale(scale)
    assert torch.equal(ip.predict(unet, embeds), got)
    conditioning.set_ip_adapter_scale(unet, scale)
    assert torch.equal(ip.predict(unet, embeds), got)


@pytest.mark.parametrize("family", ["sd", "motion"])
def test_masks_are_those_of_diffusers(family):
    unet, masks = ip.unet(family), [torch.rand(1, 3, 32, 40), None]
    states = [ip.checkpoint(unet, "plus", seed=1), ip.checkpoint(unet, "base", seed=2)]
    theirs = stock(unet, states, [[0.5, 0.0, -1.2], 0.6])
    conditioning.load_ip_adapter(unet, states[0], scale=[0.5, 0.0, -1.2])
    conditioning.load_ip_adapter(unet, states[1], scale=0.6)
    embeds = [ip.embeds("plus", images=3), ip.embeds("base", images=2)]
    want, got = ip.predict(theirs, embeds, masks), ip.predict(unet, embeds, masks)
    assert (got - want).abs().max() <= 1e-4
    assert not torch.equal(got, ip.predict(unet, embeds, [torch.rand(1, 3, 32, 40), None]))


def lora_sum(unet, checkpoint):
    """A copy of the UNet with a FaceID's LoRA in the weights."""
    merged = copy.deepcopy(unet)
    names = [n.removesuffix(".processor") for n in merged.attn_processors if "motion" not in n]
    factors = checkpoint["ip_adapter"]
    for k, name in enumerate(names):
        attn = merged.get_submodule(name)
        for of, layer in {
            "q": attn.to_q,
            "k": attn.to_k,
            "v": attn.to_v,
            "out": attn.to_out[0],
        }.items():
            down, up = (factors[f"{k}.to_{of}_lora.{n}.weight"] for n in ("down", "up"))
            layer.weight += up @ down
    return merged


@pytest.mark.parametrize("family", ["sd", "motion"])
def test_faceid_loras_stand_beside_the_users(family, tmp_path):
    """Also on AnimateDiff's UNet, whose motion modules have no number in the file."""
    unet = ip.unet(family)
    states = [ip.checkpoint(unet, "faceid", lora=2, seed=s) for s in (1, 2)]
    state, processors = state_of(unet), dict(unet.attn_processors)
    user = lorakern.inject(unet, rank=2, name="style")
    for adapter in user.values():
        adapter.up.normal_()
        adapter.requires_grad_(False)
    merged = copy.deepcopy(unet)
    lorakern.merge(merged)
    weights = {p: merged.get_submodule(p).weight.clone() for p in user}
    lorakern.eject(merged)
    for path, weight in weights.items():
        merged.get_submodule(path).weight.copy_(weight)
    theirs = stock(lora_sum(lora_sum(merged, states[0]), states[1]), states, [0.5, 0.5])

    made = [conditioning.load_ip_adapter(unet, s, scale=0.5) for s in states]
    embeds = [ip.embeds("faceid"), ip.embeds("faceid", seed=5)]
    want, got = ip.predict(theirs, embeds), ip.predict(unet, embeds)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    names = {a.name for stack in lorakern.adapters.find(unet).values() for a in stack}
    assert names == {"style", made[0].lora, made[1].lora}
    assert not any(p.requires_grad for p in unet.parameters())

    file = conditioning.save_ip_adapter(unet, tmp_path / "face.safetensors", 1)
    flat = {f"{s}.{k}": t for s, part in states[1].items() for k, t in part.items()}
    kept = ip_files.storage.read_tensors(file)[0]
    assert kept.keys() == flat.keys() and all(torch.equal(kept[k], t) for k, t in flat.items())

    for adapter in lorakern.inject(unet, rank=1, name="late").values():
        adapter.up.normal_()
    late = ip.predict(unet, embeds)
    assert not torch.equal(late, got)
    lorakern.set_multiplier(unet, 0.0, made[0].lora)
    assert not torch.equal(ip.predict(unet, embeds), late)
    conditioning.unload_ip_adapter(unet)
    assert {a.name for s in lorakern.adapters.find(unet).values() for a in s} == {"style", "late"}
    lorakern.eject(unet)
    unet.requires_grad_(True)
    assert_as_before(unet, state, processors)


def test_a_faceid_lora_stands_beside_one_of_peft():
    peft = pytest.importorskip("peft")
    unet = ip.unet()
    state = ip.checkpoint(unet, "faceid", lora=2)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    alone = ip.predict(unet)
    merged = copy.deepcopy(unet)
    merged.fuse_lora()
    conditioning.load_ip_adapter(unet, state, scale=0.5)
    embeds = [ip.embeds("faceid")]
    got = ip.predict(unet, embeds)
    merged.unload_lora()
    theirs = stock(lora_sum(merged, state), [state], 0.5)
    want = ip.predict(theirs, embeds)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    conditioning.unload_ip_adapter(unet)
    assert torch.equal(ip.predict(unet), alone)


def test_fused_and_sliced_attention_leave_the_images_in():
    unet = ip.unet()
    base, state = ip.predict(unet), ip.checkpoint(unet, "plus")
    conditioning.load_ip_adapter(unet, state)
    embeds = [ip.embeds("plus")]
    want = ip.predict(unet, embeds)
    unet.fuse_qkv_projections()
    fused = ip.predict(unet, embeds)
    assert (fused - want).abs().max() <= 1e-4
    unet.unfuse_qkv_projections()
    assert torch.equal(ip.predict(unet, embeds), want)
    unet.fuse_qkv_projections()
    conditioning.unload_ip_adapter(unet)
    unet.unfuse_qkv_projections()
    assert torch.equal(ip.predict(unet), base)
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="QKV are fused; load IP-Adapters first"):
        conditioning.load_ip_adapter(unet, state)
    unet.unfuse_qkv_projections()
    conditioning.load_ip_adapter(unet, state)
    assert torch.equal(ip.predict(unet, embeds), want)
    unet.set_attention_slice(1)
    # what the UNet does not hold now moves with it all the same
    unet.double()
    conditioning.set_ip_adapter_scale(unet, 1.0)
    unet.float()
    assert type(unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor) is (
        SlicedAttnProcessor
    )
    assert (ip.predict(unet, embeds) - want).abs().max() <= 1e-4
    conditioning.unload_ip_adapter(unet)

    conditioning.load_ip_adapter(unet, ip.checkpoint(unet, "faceid", lora=2))
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="leaves out the adapters on to_q, to_k, to_v"):
        ip.predict(unet, [ip.embeds("faceid")])


@pytest.mark.parametrize("variant", ["base", "plus"])
def test_a_pipeline_with_pictures_draws_what_diffusers_draws(variant, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(1)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=ip.EMBED, projection_dim=ip.EMBED, intermediate_size=32, image_size=16,
            patch_size=8, num_hidden_layers=2, num_attention_heads=4,
        )
    ).eval()  # fmt: skip
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8))
    drawn = []
    for mine in (False, True):
        pipe = tiny.pipeline(tmp_path)
        pipe.set_progress_bar_config(disable=True)
        pipe.register_modules(image_encoder=encoder)
        state = ip.checkpoint(pipe.unet.eval(), variant)
        if mine:
            conditioning.load_ip_adapter(pipe, state)
        else:
            pipe.load_ip_adapter(
                state, subfolder="", weight_name="", image_encoder_folder=None,
                low_cpu_mem_usage=False,
            )  # fmt: skip
        for given in (picture, None):
            options = {"ip_adapter_image": given} if given else {
                "ip_adapter_image_embeds": [ip.embeds(variant)]}  # fmt: skip
            drawn += pipe(
                "red", num_inference_steps=3, height=16, width=16, output_type="pt",
                num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), **options,
            ).images[None]  # fmt: skip
    assert pipe.feature_extractor is not None
    conditioning.unload_ip_adapter(pipe)
    assert pipe.feature_extractor is None and pipe.image_encoder is encoder
    for want, got in zip(drawn[:2], drawn[2:], strict=True):
        assert (want - got).abs().max() <= 1e-4
    assert (drawn[0] - drawn[1]).abs().max() > 1e-2


def test_diffusers_can_take_it_out():
    unet = ip.unet()
    base = ip.predict(unet)
    conditioning.load_ip_adapter(unet, ip.checkpoint(unet, "base"))
    Pipe(unet).unload_ip_adapter()
    assert torch.equal(ip.predict(unet), base)
    conditioning.load_ip_adapter(unet, ip.checkpoint(unet, "base"))
    assert not torch.equal(ip.predict(unet, [ip.embeds("base")]), base)
    conditioning.unload_ip_adapter(unet)
    assert torch.equal(ip.predict(unet), base)


def test_a_copy_of_the_unet_is_its_own():
    unet = ip.unet()
    conditioning.load_ip_adapter(unet, ip.checkpoint(unet, "base"))
    embeds = [ip.embeds("base")]
    want = ip.predict(unet, embeds)
    other = copy.deepcopy(unet)
    conditioning.set_ip_adapter_scale(other, 0.0)
    assert torch.equal(ip.predict(unet, embeds), want)
    conditioning.unload_ip_adapter(other)
    assert not other._forward_pre_hooks and len(unet._forward_pre_hooks) == 2
    assert torch.equal(ip.predict(unet, embeds), want)

"""What IP-Adapters keep between denoising steps: the same bits, and nothing that is out of date."""

from collections import Counter

import ip_adapters as ip
import pytest
import tiny
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorakern

pytest.importorskip("diffusers")

import itertools

from lorakern import conditioning
from lorakern.conditioning.cache import Cache


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name().split("::")[1].split(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    def __int__(self):
        return self.calls["mm"] + self.calls["addmm"] + self.calls["bmm"]


def products(call, unet):
    with Products() as counted:
        call(unet)
    return counted


@pytest.fixture
def two():
    """A UNet with a base and, with a mask, a FaceID-Plus; and its call."""
    unet = ip.unet()
    for parameter in unet.parameters():
        parameter.requires_grad_(False)
    conditioning.load_ip_adapter(unet, ip.checkpoint(unet, "base", seed=1), scale=0.8)
    conditioning.load_ip_adapter(unet, ip.checkpoint(unet, "faceid-plus", seed=2), scale=0.6)
    ip.set_clip(unet, images=2, index=1)
    embeds = [ip.embeds("base", images=2), ip.embeds("faceid-plus", images=2)]
    return unet, ip.Call(unet, embeds, [None, torch.rand(1, 2, 16, 20)])


@pytest.mark.parametrize("family", ["sd", "xl", "motion"])
@torch.no_grad()
def test_steps_after_the_first_make_no_keys_and_values(family):
    unet = ip.unet(family)
    conditioning.load_ip_adapter(unet, ip.checkpoint(unet, "plus"))
    call = ip.Call(unet, [ip.embeds("plus", images=2)])
    first, second = products(call, unet), products(call, unet)
    layers = sum(n.endswith("attn2.processor") and "motion" not in n for n in unet.attn_processors)
    # of each layer K, V, K', V'; of the Resampler proj_in, proj_out and six in each of four blocks
    assert int(first) - int(second) == 4 * layers + 2 + 4 * 6
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.3]
    assert int(products(call, unet)) == int(second)
    conditioning.cache_ip_adapter(unet, False)
    assert int(products(call, unet)) == int(first)


@torch.no_grad()
def test_a_pipeline_run_is_the_same_bit_for_bit(tmp_path):
    pipe = tiny.pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.eval()
    conditioning.load_ip_adapter(pipe, ip.checkpoint(pipe.unet, "base"))
    masks = [torch.rand(1, 1, 16, 16)]

    def run():
        with Products() as counted:
            image = pipe(
                "red", num_inference_steps=4, guidance_scale=5.0, output_type="latent",
                ip_adapter_image_embeds=[ip.embeds("base")], height=16, width=16,
                generator=torch.Generator().manual_seed(0),
                cross_attention_kwargs={"ip_adapter_masks": masks},
            ).images  # fmt: skip
        return image, counted

    kept, few = run()
    conditioning.cache_ip_adapter(pipe, False)
    made, many = run()
    assert torch.equal(kept, made) and not torch.equal(kept, torch.zeros_like(kept))
    # 4 layers of K, V, K', V' and the projection in three of four steps; a mask of 3 sizes once
    assert int(many) - int(few) == 3 * (4 * 4 + 1)
    resized = "upsample_bicubic2d"
    assert (few.calls[resized], many.calls[resized]) == (2, 4 * 4)


def attn(unet):
    return unet.mid_block.attentions[0].transformer_blocks[0].attn2


def inject(unet, call):
    for adapter in lorakern.inject(unet, rank=2, targets=["attn2.to_k", "attn2.to_v"]).values():
        adapter.up.normal_()
    unet.eval()


def retype(unet, call):
    unet.to(torch.bfloat16).to(torch.float32)


def assign(unet, call):
    attn(unet).to_k.weight.data = attn(unet).to_k.weight.data * 2


def face(unet):
    return unet.encoder_hid_proj.image_projection_layers[1]


CHANGES = {
    "text written": lambda unet, call: call.text.mul_(2),
    "text": lambda unet, call: setattr(call, "text", call.text * 2),
    "a view of the text": lambda unet, call: call.text[1].zero_(),
    "image written": lambda unet, call: call.image_embeds[0].mul_(2),
    "image": lambda unet, call: call.image_embeds.__setitem__(1, call.image_embeds[1] * 2),
    "clip written": lambda unet, call: face(unet).clip_embeds.neg_(),
    "clip": lambda unet, call: setattr(face(unet), "clip_embeds", -face(unet).clip_embeds),
    "shortcut": lambda unet, call: setattr(face(unet), "shortcut", True),
    "mask written": lambda unet, call: call.masks[1].mul_(0.5),
    "mask": lambda unet, call: setattr(call, "masks", [None, call.masks[1] * 0.5]),
    "no mask": lambda unet, call: setattr(call, "masks", None),
    "size": lambda unet, call: setattr(call, "x", call.x.repeat(1, 1, 2, 2)),
    "K'": lambda unet, call: attn(unet).processor.to_k_ip[0].weight.mul_(2),
    "projection": lambda unet, call: face(unet).layers[2].ff[1].net[2].weight.mul_(2),
    "K": lambda unet, call: attn(unet).to_k.weight.mul_(2),
    "K assigned": assign,
    "V replaced": lambda unet, call: setattr(attn(unet), "to_v", nn.Linear(32, 64, False).eval()),
    "adapters": inject,
    "dtype and back": retype,
    "weights loaded": lambda unet, call: unet.load_state_dict(
        {k: 2 * v if "attn2.to_k" in k else v for k, v in unet.state_dict().items()}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_is_seen_at_once(change, two):
    unet, call = two
    before = call(unet)
    assert torch.equal(call(unet), before)
    CHANGES[change](unet, call)
    got = call(unet)
    assert got.shape != before.shape or not torch.equal(got, before), "the change changes nothing"
    conditioning.cache_ip_adapter(unet, False)
    assert torch.equal(got, call(unet))


@torch.no_grad()
def test_the_strength_of_an_adapter_on_the_text_is_seen(two):
    unet, call = two
    inject(unet, call)
    for adapters in lorakern.adapters.find(unet).values():
        adapters[0].requires_grad_(False)
    seen = [call(unet)]
    for change in (
        lambda: lorakern.set_multiplier(unet, 0.5),
        lambda: lorakern.merge(unet),
        lambda: lorakern.unmerge(unet),
        lambda: lorakern.adapters.find(unet).popitem()[1][0].up.mul_(3),
        lambda: lorakern.eject(unet),
    ):
        change()
        seen.append(call(unet))
        conditioning.cache_ip_adapter(unet, False)
        assert torch.equal(seen[-1], call(unet))
        conditioning.cache_ip_adapter(unet)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))


def test_peft_is_seen():
    peft = pytest.importorskip("peft")
    unet = ip.unet()
    config = peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    unet.add_adapter(config, "a")
    unet.add_adapter(config, "b")
    unet.eval()
    conditioning.load_ip_adapter(unet, ip.checkpoint(unet, "base"))
    call, seen = ip.Call(unet, [ip.embeds("base")]), []
    with torch.no_grad():
        for change in (
            lambda: unet.set_adapters(["a"], [0.5]),
            lambda: unet.set_adapters(["b"], [1.0]),
            lambda: unet.disable_lora(),
            lambda: unet.enable_lora(),
            lambda: unet.fuse_lora(),
        ):
            change()
            first, seen = products(call, unet), [*seen, call(unet)]
            assert int(products(call, unet)) < int(first)
            conditioning.cache_ip_adapter(unet, False)
            assert torch.equal(seen[-1], call(unet))
            conditioning.cache_ip_adapter(unet)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))


def test_gradients_are_never_of_kept_values(two):
    unet, call = two
    weights = [attn(unet).processor.to_k_ip[0].weight, face(unet).proj_out.weight]
    with torch.no_grad():
        want = call(unet)
    grads = []
    for on in (True, False):
        conditioning.cache_ip_adapter(unet, on)
        with torch.no_grad():
            call(unet)
        for weight in weights:
            weight.requires_grad_()
        grads.append(torch.autograd.grad(call(unet).square().sum(), weights))
        assert not any(map(len, attn(unet).processor.caches + unet.encoder_hid_proj.caches))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b) and a.abs().max() > 0
    # an optimizer that hides its writes: there was a step with gradients before it
    conditioning.cache_ip_adapter(unet)
    with torch.no_grad():
        call(unet)
    call(unet).sum().backward()
    weights[0].data.mul_(5)
    with torch.no_grad():
        got = call(unet)
        conditioning.cache_ip_adapter(unet, False)
        assert torch.equal(got, call(unet)) and not torch.equal(got, want)


@torch.no_grad()
def test_hooks_dropout_autocast_and_inference_mode_are_respected(two):
    unet, call = two
    call(unet)
    fired = []
    attn(unet).to_k.register_forward_hook(lambda *_: fired.append(1))
    call(unet), call(unet)
    assert len(fired) == 2
    with torch.autocast("cpu", torch.bfloat16):
        got = [call(unet), call(unet)]
    assert torch.equal(*got) and not torch.equal(got[0], call(unet))
    with torch.inference_mode():
        call.text = call.text.clone()
        before = call(unet)
        call.text.mul_(2)
        assert not torch.equal(call(unet), before)

    cache, layer = Cache(), nn.Dropout(0.5)
    x = torch.ones(64)
    assert not torch.equal(
        cache.get(lambda: layer(x), [x], [layer]), cache.get(lambda: layer(x), [x], [layer])
    )
    layer.eval()
    assert cache.get(lambda: layer(x), [x], [layer]) is cache.get(lambda: layer(x), [x], [layer])


@torch.no_grad()
def test_what_a_hook_writes_to_the_tokens_is_not_kept(two):
    unet, call = two
    unet.encoder_hid_proj.register_forward_hook(lambda _, __, tokens: [t.mul_(0.5) for t in tokens])
    before = call(unet)
    assert torch.equal(call(unet), before)


@torch.no_grad()
def test_addresses_that_come_back_are_no_hit():
    """A freed tensor's id and memory are soon another's."""
    cache = Cache(size=1)
    for i in range(50):
        x = torch.full((1000,), float(i))
        assert cache.get(lambda x=x: x.sum().item(), [x]) == 1000 * i
    weight = nn.Parameter(torch.zeros(1000), requires_grad=False)
    for i in range(50):
        weight.fill_(i)
        # another tensor on the same memory, whose version begins again
        x = weight.data
        assert cache.get(x.sum, [x]) == 1000 * i
        del x
    for i in range(50):
        weight.data = torch.full((1000,), float(i))
        assert cache.get(lambda: weight.sum().item(), [weight]) == 1000 * i
    assert len(cache) == 1

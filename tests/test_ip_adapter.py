"""IP-Adapters of diffusers on decoupled_attention: equal outputs, less work, and no trace after."""

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lorakern

pytest.importorskip("diffusers")
from diffusers import UNet2DConditionModel
from diffusers.loaders import IPAdapterMixin
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

EMBED, WIDTH = 24, 32


class Pipe(IPAdapterMixin):
    """A pipeline as far as an IP-Adapter needs one."""

    def __init__(self, unet):
        self.unet = unet


@pytest.fixture
def pipe():
    return Pipe(UNet2DConditionModel(**tiny.unet_config()).eval())


def state_dict(unet, seed):
    """A random IP-Adapter of 4 tokens in the layout of its authors' files."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    cross = [m for n, m in unet.named_modules() if n.endswith("attn2")]
    layers = {}
    # in the order of attn_processors: the middle block is its last
    for name, _ in unet.attn_processors.items():
        if name.endswith("attn2.processor"):
            inner = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            for what in ("to_k_ip", "to_v_ip"):
                layers[f"{2 * (len(layers) // 2) + 1}.{what}.weight"] = make(inner, WIDTH)
    assert len(layers) == 2 * len(cross)
    projection = {
        "proj.weight": make(4 * WIDTH, EMBED), "proj.bias": make(4 * WIDTH),
        "norm.weight": 1 + make(WIDTH), "norm.bias": make(WIDTH),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": layers}


def load(pipe, count=1):
    states = [state_dict(pipe.unet, seed) for seed in range(count)]
    pipe.unet._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    return pipe.unet


def predict(unet, images=(1,), masks=None, size=8, **options):
    """The UNet on a fixed input, with that many images for each adapter."""
    generator = torch.Generator().manual_seed(7)

    def make(*shape):
        return torch.randn(shape, generator=generator)

    x, text = make(2, 4, size, size + 2), make(2, 6, WIDTH)
    embeds = [make(2, count, EMBED) for count in images]
    return unet(
        x, torch.tensor(3), text, added_cond_kwargs={"image_embeds": embeds},
        cross_attention_kwargs={"ip_adapter_masks": masks} if masks is not None else None,
        **options,
    ).sample  # fmt: skip


def blobs(count, size=8):
    return torch.rand(1, count, 2 * size, 2 * size + 4)


CASES = {
    "one image": ((1,), 0.7, None),
    "three images under one softmax": ((3,), 0.7, None),
    "two adapters": ((1, 2), [0.7, -0.4], None),
    "one masked image": ((1,), 0.7, [1]),
    "three masked images": ((3,), [[0.5, 0.0, -1.2]], [3]),
    "a masked adapter beside another": ((2, 1), [[0.5, 0.9], 0.3], [2, None]),
    "one adapter off": ((1, 1), [0.0, 0.6], None),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_diffusers(case, pipe):
    images, scale, masked = CASES[case]
    unet = load(pipe, len(images))
    pipe.set_ip_adapter_scale(scale)
    masks = None if masked is None else [n and blobs(n) for n in masked]
    with torch.no_grad():
        want, base = predict(unet, images, masks), None
        undo = lorakern.accelerate(pipe)
        got = predict(unet, images, masks)
        undo()
        assert torch.equal(predict(unet, images, masks), want)
        pipe.set_ip_adapter_scale([0.0] * len(images))
        base = predict(unet, images, masks)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (base - want).abs().max() > 1e-3 * want.abs().max(), "the images change nothing"


@pytest.mark.parametrize("height, width", [(16, 10), (10, 4)])
def test_a_mask_of_another_aspect_is_fitted_as_diffusers_does(pipe, height, width):
    unet = load(pipe)
    masks = [torch.rand(1, 2, height, width)]
    with torch.no_grad():
        with pytest.warns(UserWarning, match="aspect ratio of the mask"):
            want = predict(unet, (2,), masks)
        lorakern.accelerate(unet)
        with pytest.warns(UserWarning, match="aspect ratio of the mask"):
            got = predict(unet, (2,), masks)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_scale_0_is_the_base_bit_for_bit(pipe):
    with torch.no_grad():
        base = predict(pipe.unet)
        unet = load(pipe)
        lorakern.accelerate(unet)
        assert not torch.equal(predict(unet), base)
        pipe.set_ip_adapter_scale(0.0)
        assert torch.equal(predict(unet), base)


def test_gradients_are_those_of_diffusers(pipe):
    unet = load(pipe, 2)
    names = [n for n, _ in unet.named_parameters() if "_ip." in n]
    grads = []
    for run in (lambda: None, lambda: lorakern.accelerate(unet)):
        run()
        unet.requires_grad_(False)
        for name in names:
            unet.get_parameter(name).requires_grad_()
        params = [unet.get_parameter(name) for name in names]
        grads.append(torch.autograd.grad(predict(unet, (1, 2)).square().sum(), params))
    for name, want, got in zip(names, *grads, strict=True):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max(), name


def test_diffusers_goes_on_with_it(pipe):
    """Its processors are known to diffusers, share their weights, and may come and go."""
    unet = load(pipe)
    before = {n: p.data_ptr() for n, p in unet.named_parameters()}
    state = unet.state_dict().keys()
    stock = dict(unet.attn_processors)
    undo = lorakern.accelerate(pipe)
    assert {n: p.data_ptr() for n, p in unet.named_parameters()} == before
    assert unet.state_dict().keys() == state
    mine = [p for n, p in unet.attn_processors.items() if "attn2" in n]
    assert all(isinstance(p, IPAdapterAttnProcessor2_0) for p in mine)
    pipe.set_ip_adapter_scale(0.25)
    undo()
    assert all(unet.attn_processors[n] is p for n, p in stock.items())
    assert all(p.scale == [0.25] for n, p in stock.items() if "attn2" in n)

    undo = lorakern.accelerate(pipe)
    # another adapter: stock processors again, which the old undo leaves alone
    with torch.no_grad():
        want = predict(load(pipe, 2), (1, 1))
        undo()
        lorakern.accelerate(pipe)
        got = predict(unet, (1, 1))
        assert not torch.equal(got, want) and (got - want).abs().max() <= 1e-5 * want.abs().max()
        pipe.unload_ip_adapter()
        assert not any("_ip." in n for n, _ in unet.named_parameters())
        predict(unet)


def test_a_text_mask_and_a_wrong_mask_are_left_to_diffusers(pipe):
    unet = load(pipe)
    mask = torch.ones(2, 6)
    mask[0, 3:] = 0
    with torch.no_grad():
        want = predict(unet, encoder_attention_mask=mask)
        lorakern.accelerate(unet)
        assert torch.equal(predict(unet, encoder_attention_mask=mask), want)
        assert not torch.equal(predict(unet), want)
        with pytest.raises(ValueError, match="Number of masks"):
            predict(unet, masks=[blobs(2)])


def test_fused_and_sliced_attention_and_later_steps(pipe):
    """What diffusers' processors do not survive; and K and V are made once."""
    unet = load(pipe)
    fed = [torch.randn(2, 4, 8, 10), torch.tensor(3), torch.randn(2, 6, WIDTH)]
    given = {"image_embeds": [torch.randn(2, 1, EMBED)]}

    def run():
        with Count() as counted:
            return unet(*fed, added_cond_kwargs=given).sample, counted.calls

    with torch.no_grad():
        want, stock = run()
        undo = lorakern.accelerate(pipe)
        (first, many), (second, few) = run(), run()
        assert torch.equal(first, second) and few < many < stock
        for change in (unet.fuse_qkv_projections, lambda: unet.set_attention_slice(1)):
            change()
            assert (run()[0] - want).abs().max() <= 1e-5 * want.abs().max()
        undo()
        assert not unet._forward_pre_hooks


def test_a_model_without_ip_adapter_is_named(pipe):
    with pytest.raises(ValueError, match="UNet2DConditionModel has no IP-Adapter"):
        lorakern.accelerate(pipe.unet)


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.calls += not (func.is_view or name.startswith(("aten::_unsafe_view", "aten::empty")))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(
    not hasattr(torch.ops.lorakern_native, "decoupled_attention_fwd_cpu"),
    reason="lorakern._native is not built",
)
@pytest.mark.parametrize("count", [1, 2])
def test_few_operator_calls_a_layer(count, pipe):
    """The products of q, k, v, out and two an adapter; the attention itself is one native call."""
    unet = load(pipe, count)
    lorakern.accelerate(unet)
    attn = next(m for n, m in unet.named_modules() if n.endswith("attn2"))
    x, text = torch.randn(2, 16, attn.to_q.in_features), torch.randn(2, 6, WIDTH)
    images = [torch.randn(2, 1, 4, WIDTH) for _ in range(count)]
    with torch.no_grad(), Count() as counted:
        attn(x, (text, images))
    assert counted.calls == 4 + 2 * count


@pytest.mark.skipif(
    not hasattr(torch.ops.lorakern_native, "decoupled_attention_fwd_cpu"),
    reason="lorakern._native is not built",
)
def test_few_operator_calls_a_layer_of_masked_images(pipe):
    """Those of one image and a copy of the tokens, image by image: one adapter's K' and V' at once.

    The masks are resized for the first layer of a size, and not again.
    """
    unet = load(pipe)
    pipe.set_ip_adapter_scale([[0.5, 0.7, 0.9]])
    attn = next(m for n, m in unet.named_modules() if n.endswith("attn2"))
    x, text = torch.randn(2, 16, attn.to_q.in_features), torch.randn(2, 6, WIDTH)
    images, masks = [torch.randn(2, 3, 4, WIDTH)], [torch.rand(1, 3, 8, 8)]

    def calls():
        with torch.no_grad(), Count() as counted:
            attn(x, (text, images), ip_adapter_masks=masks)
        return counted.calls

    stock = calls()
    lorakern.accelerate(unet)
    calls()
    attn.processor.text.clear()
    attn.processor.images[0].clear()
    # the attention too, whose C++ a count of ATen's calls leaves out
    assert calls() + 1 == 8 < stock / 4
    for cache in attn.processor.caches:
        cache.clear()
    assert calls() + 1 == 9, "all masks are resized in one call"


def test_compiles_whole(pipe):
    unet = load(pipe)
    lorakern.accelerate(unet)
    attn = next(m for n, m in unet.named_modules() if n.endswith("attn2"))
    x, text = torch.randn(2, 16, attn.to_q.in_features), torch.randn(2, 6, WIDTH)
    images, masks = [torch.randn(2, 1, 4, WIDTH)], [torch.rand(1, 1, 8, 8)]
    with torch.no_grad():
        compiled = torch.compile(attn, backend="aot_eager", fullgraph=True)
        for options in ({}, {"ip_adapter_masks": masks}):
            got, want = (f(x, (text, images), **options) for f in (compiled, attn))
            torch.testing.assert_close(got, want)

"""InstantID in a pipeline: the tokens of a face at both networks, files, and no trace after."""

import copy
import inspect
import math

import instantids as ii
import ip_adapters as ip
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_ip_cache import Products

pytest.importorskip("diffusers")
from diffusers import (
    ControlNetModel,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import Attention

from lorakern import conditioning
from lorakern.conditioning import faces


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(name="home", scope="module")
def home_fixture(tmp_path_factory):
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(name="pipe")
def pipe_fixture(home):
    return ii.pipeline(home)


class Spy:
    """What a module was called with, by name."""

    def __init__(self, module):
        self.seen, forward = [], module.forward

        def watched(*args, **kwargs):
            names = ("sample", "timestep", "encoder_hidden_states")
            self.seen.append(dict(zip(names, args, strict=False)) | kwargs)
            return forward(*args, **kwargs)

        self.module, module.forward = module, watched

    def __enter__(self):
        return self.seen

    def __exit__(self, *_):
        del self.module.forward


# in the pipeline


def attentions(model):
    """Layers of the model, those of an image projection left out."""
    named = model.named_modules()
    return [m for n, m in named if isinstance(m, Attention) and "encoder_hid_proj" not in n]


def stock(pipe, scale):
    """A copy of the pipeline by diffusers alone: its loader, and face tokens by hand."""
    made = copy.deepcopy(pipe)
    checkpoint = ii.adapter(made.unet)
    made.load_ip_adapter(checkpoint, subfolder="", weight_name="", image_encoder_folder=None)
    made.set_ip_adapter_scale(scale)
    forward = made.controlnet.forward

    def with_face(*args, encoder_hidden_states, **kwargs):
        embeds = torch.cat([torch.zeros(512), ii.face()]).view(2, 1, 512)
        (tokens,) = made.unet.encoder_hid_proj([embeds[:, None]])
        tokens = tokens.flatten(1, 2)[-len(args[0]) :]
        return forward(*args, encoder_hidden_states=tokens, **kwargs)

    made.controlnet.forward = with_face
    return made


@pytest.mark.parametrize("guess", [False, True], ids=["", "guess mode"])
def test_it_computes_what_diffusers_computes_with_the_tokens_by_hand(pipe, guess):
    theirs = stock(pipe, 0.7)
    identity = conditioning.load_instantid(pipe, ii.adapter(pipe.unet), scale=0.7)
    given = identity.inputs(ii.face(), ii.SMALL, (16, 16))
    options = {"controlnet_conditioning_scale": 0.9, "guess_mode": guess}
    got, want = (ii.run(p, **given, **options) for p in (pipe, theirs))
    assert (got - want).abs().max() <= 1e-4
    assert (want - ii.run(theirs, **given, controlnet_conditioning_scale=0.0)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("options", "rows"),
    [({}, 2), ({"guidance_scale": 1.0}, 1), ({"num_images_per_prompt": 3}, 6),
     ({"guess_mode": True}, 1), ({"guess_mode": True, "num_images_per_prompt": 2}, 2)],
    ids=["guidance", "none", "three images", "guess mode", "guess mode, two images"],
)  # fmt: skip
def test_the_identity_net_gets_the_faces_tokens_and_the_unet_the_text(pipe, options, rows):
    identity = conditioning.load_instantid(pipe, ii.adapter(pipe.unet))
    guidance = options.get("guidance_scale") != 1.0
    with Spy(pipe.controlnet) as net, Spy(pipe.unet) as unet:
        ii.run(pipe, **identity.inputs(ii.face(), ii.SMALL, (16, 16), guidance=guidance), **options)
    assert len(net) == len(unet) == 2
    with torch.no_grad():
        layer = pipe.unet.encoder_hid_proj.image_projection_layers[0]
        none, face = layer(torch.zeros(1, 1, 512)), layer(ii.face().view(1, 1, 512))
    half = not guidance or "guess_mode" in options
    want = torch.cat([face] * rows if half else [none] * (rows // 2) + [face] * (rows // 2))
    for one, other in zip(net, unet, strict=True):
        tokens = one["encoder_hidden_states"]
        assert tokens.shape == want.shape == (rows, 5, 64)
        assert torch.allclose(tokens, want, atol=1e-5)
        assert other["encoder_hidden_states"].shape[1:] == (16, 64)
        assert one["added_cond_kwargs"]["text_embeds"].shape == (rows, 32)


def test_the_output_follows_face_and_keypoints(pipe):
    identity = conditioning.load_instantid(pipe, ii.adapter(pipe.unet))
    base = ii.run(pipe, **identity.inputs(ii.face(), ii.SMALL, (16, 16)))
    again = ii.run(pipe, **identity.inputs(ii.face(), ii.SMALL, (16, 16)))
    assert torch.equal(again, base)
    moved = np.array(ii.SMALL) + np.array([40, 0])
    for embedding, points in ((ii.face(12), ii.SMALL), (ii.face(), moved)):
        other = ii.run(pipe, **identity.inputs(embedding, points, (16, 16)))
        assert (other - base).abs().max() > 1e-2
    # the face reaches the picture by each of the two ways alone
    for scale, strength in ((0.0, 0.8), (0.8, 0.0)):
        conditioning.set_ip_adapter_scale(pipe, scale)
        one, other = (
            ii.run(
                pipe, **identity.inputs(ii.face(seed), ii.SMALL, (16, 16)),
                controlnet_conditioning_scale=strength,
            )
            for seed in (11, 12)
        )  # fmt: skip
        assert (other - one).abs().max() > 1e-3


def test_without_strength_it_is_plain_sdxl(pipe, home):
    plain = ii.run(ii.pipeline(home, plain=True))
    identity = conditioning.load_instantid(pipe, ii.adapter(pipe.unet), scale=0.0)
    given = identity.inputs(ii.face(), ii.SMALL, (16, 16))
    assert torch.equal(ii.run(pipe, **given, controlnet_conditioning_scale=0.0), plain)
    assert not torch.equal(ii.run(pipe, **given, controlnet_conditioning_scale=0.8), plain)
    conditioning.set_ip_adapter_scale(pipe, 0.8)
    assert not torch.equal(ii.run(pipe, **given, controlnet_conditioning_scale=0.0), plain)


def test_of_several_controlnets_one_gets_the_face(home):
    pipe = ii.pipeline(home, nets=2)
    identity = conditioning.load_instantid(pipe, ii.adapter(pipe.unet), controlnet=1)
    given = identity.inputs(ii.face(), ii.SMALL, (16, 16))
    first, second = pipe.controlnet.nets
    assert identity.net is second
    with Spy(first) as text, Spy(second) as face:
        ii.run(pipe, **given | {"image": [given["image"]] * 2})
    assert {s["encoder_hidden_states"].shape for s in text} == {(2, 16, 64)}
    assert {s["encoder_hidden_states"].shape for s in face} == {(2, 5, 64)}
    with pytest.raises(ValueError, match="controlnet 2: the pipeline has 2, counted from 0"):
        conditioning.load_instantid(ii.pipeline(home, nets=2), {}, controlnet=2)


def test_another_ip_adapter_goes_beside_it(pipe):
    conditioning.load_ip_adapter(pipe, ip.checkpoint(pipe.unet, "base"), scale=0.5)
    identity = conditioning.load_instantid(pipe, ii.adapter(pipe.unet))
    assert identity.index == 1
    style, face = ip.embeds("base"), identity.embeds(ii.face())
    drawn = conditioning.draw_keypoints(ii.SMALL, (16, 16))
    with Spy(pipe.controlnet) as net:
        ii.run(pipe, image=drawn, ip_adapter_image_embeds=[style, face])
    assert {s["encoder_hidden_states"].shape for s in net} == {(2, 5, 64)}
    with pytest.raises(ValueError, match="of 1 IP-Adapters; InstantID's is number 1"):
        ii.run(pipe, image=drawn, ip_adapter_image_embeds=[style])


def test_steps_after_the_first_make_no_tokens_and_no_keys(pipe):
    identity = conditioning.load_instantid(pipe, ii.adapter(pipe.unet))
    given = identity.inputs(ii.face(), ii.SMALL, (16, 16))

    def products(steps):
        with Products() as counted:
            made = ii.run(pipe, **given, num_inference_steps=steps)
        return made, int(counted)

    (kept, few), (_, more) = products(2), products(3)
    conditioning.cache_ip_adapter(pipe, False)
    (made, many), (_, most) = products(2), products(3)
    assert torch.equal(kept, made)
    layers = sum(m.is_cross_attention for m in attentions(pipe.unet))
    net = sum(m.is_cross_attention for m in attentions(pipe.controlnet))
    assert len(identity.caches) == 1 + net
    # a step: K and V at the IdentityNet; K, V, K', V' in the UNet; the Resampler for each of them
    saved = 2 * net + 4 * layers + 2 * (2 + 4 * 6)
    assert (most - many) - (more - few) == saved


def test_other_weights_and_other_faces_are_seen(pipe):
    identity = conditioning.load_instantid(pipe, ii.adapter(pipe.unet))
    given = identity.inputs(ii.face(), ii.SMALL, (16, 16))
    base = ii.run(pipe, **given)
    attn = attentions(pipe.controlnet)[1]
    assert attn.is_cross_attention
    before = attn.to_k.weight.clone()
    with torch.no_grad():
        attn.to_k.weight.mul_(3)
    assert not torch.equal(ii.run(pipe, **given), base)
    with torch.no_grad():
        attn.to_k.weight.copy_(before)
    assert torch.equal(ii.run(pipe, **given), base)
    given["ip_adapter_image_embeds"][0].mul_(2)
    assert not torch.equal(ii.run(pipe, **given), base)


def state_of(pipe):
    models = {"unet": pipe.unet, "controlnet": pipe.controlnet}
    return {
        "weights": {
            n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in models.items()
        },
        "processors": {n: dict(m.attn_processors) for n, m in models.items()},
        "hooks": {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in models.items()},
        "watched": "prepare_ip_adapter_image_embeds" in vars(pipe),
    }


def assert_state(pipe, want):
    have = state_of(pipe)
    for name, weights in want["weights"].items():
        assert weights.keys() == have["weights"][name].keys()
        assert all(torch.equal(t, have["weights"][name][k]) for k, t in weights.items())
        mine = have["processors"][name]
        assert all(mine[k] is p for k, p in want["processors"][name].items()), name
    assert have["hooks"] == want["hooks"] and have["watched"] == want["watched"]
    assert pipe.unet.encoder_hid_proj is None


def test_taken_out_it_leaves_no_trace(pipe):
    drawn = conditioning.draw_keypoints(ii.SMALL, (16, 16))
    before, base = state_of(pipe), ii.run(pipe, image=drawn)
    conditioning.load_instantid(pipe, ii.adapter(pipe.unet))
    conditioning.unload_ip_adapter(pipe)
    assert_state(pipe, before)
    identity = conditioning.load_instantid(pipe, ii.adapter(pipe.unet))
    ii.run(pipe, **identity.inputs(ii.face(), ii.SMALL, (16, 16)))
    with Spy(pipe.controlnet) as net:
        conditioning.unload_ip_adapter(pipe)
        assert torch.equal(ii.run(pipe, image=drawn), base)
    assert {s["encoder_hidden_states"].shape for s in net} == {(2, 16, 64)}
    assert_state(pipe, before)


def test_remove_gives_the_controlnet_back_and_leaves_the_image_adapter(pipe):
    identity = conditioning.load_instantid(pipe, ii.adapter(pipe.unet))
    given = identity.inputs(ii.face(), ii.SMALL, (16, 16))
    identity.remove()
    identity.remove()
    with Spy(pipe.controlnet) as net:
        ii.run(pipe, **given)
    assert {s["encoder_hidden_states"].shape for s in net} == {(2, 16, 64)}
    # diffusers took the image adapter out, and knows of nothing else
    conditioning.unload_ip_adapter(pipe)
    identity = conditioning.load_instantid(pipe, ii.adapter(pipe.unet))
    pipe.unload_ip_adapter()
    with pytest.raises(ValueError, match=r"was taken out of the UNet; call remove\(\)"):
        ii.run(pipe, image=given["image"])
    identity.remove()
    ii.run(pipe, image=given["image"])


def test_another_pipeline_of_the_same_networks_is_told_of_or_refuses(pipe):
    identity = conditioning.load_instantid(pipe, ii.adapter(pipe.unet))
    given = identity.inputs(ii.face(), ii.SMALL, (16, 16))
    other = sibling(pipe, StableDiffusionXLControlNetImg2ImgPipeline)
    start = {"image": torch.rand(1, 3, 16, 16), "control_image": given["image"], "strength": 1.0}
    faces_of = {"ip_adapter_image_embeds": given["ip_adapter_image_embeds"]}
    with pytest.raises(ValueError, match=r"the IdentityNet has no face.*watch\(\)"):
        ii.run(other, **start, **faces_of)
    ii.run(pipe, **given)
    with pytest.raises(ValueError, match=r"got different faces.*watch\(\)"):
        ii.run(other, **start, ip_adapter_image_embeds=[identity.embeds(ii.face(12))])
    identity.watch(other)
    with Spy(pipe.controlnet) as net:
        ii.run(other, **start, ip_adapter_image_embeds=[identity.embeds(ii.face(12))])
    assert {s["encoder_hidden_states"].shape for s in net} == {(2, 5, 64)}
    # the UNet alone, as the pipeline without a ControlNet has it
    alone = sibling(pipe, StableDiffusionXLPipeline)
    ii.run(alone, **faces_of)
    conditioning.unload_ip_adapter(pipe)
    assert "prepare_ip_adapter_image_embeds" not in vars(other)


def sibling(pipe, kind):
    """Another pipeline of the same parts."""
    takes = inspect.signature(kind.__init__).parameters
    made = kind(**{k: v for k, v in pipe.components.items() if k in takes}, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    return made


# files


@pytest.mark.parametrize("suffix", [".bin", ".safetensors", "folder"])
def test_the_released_layout_is_read_and_written(pipe, suffix, tmp_path):
    checkpoint = ii.adapter(pipe.unet)
    flat = {f"{s}.{k}": t for s, part in checkpoint.items() for k, t in part.items()}
    path = tmp_path / f"ip-adapter{'.bin' if suffix == 'folder' else suffix}"
    if suffix == ".safetensors":
        save_file(flat, path)
    else:
        torch.save(checkpoint, path)
    identity = conditioning.load_instantid(pipe, tmp_path if suffix == "folder" else path)
    base = ii.run(pipe, **identity.inputs(ii.face(), ii.SMALL, (16, 16)))
    made = conditioning.save_instantid(identity, tmp_path / "out", bin=suffix == ".bin")
    names = {"ControlNetModel", "ip-adapter.bin" if suffix == ".bin" else "ip-adapter.safetensors"}
    assert {p.name for p in made.iterdir()} == names
    if suffix == ".bin":
        kept = torch.load(made / "ip-adapter.bin", weights_only=True)
        kept = {f"{s}.{k}": t for s, part in kept.items() for k, t in part.items()}
    else:
        kept = faces.storage.read_tensors(made / "ip-adapter.safetensors")[0]
    assert kept.keys() == flat.keys() and all(torch.equal(kept[k], t) for k, t in flat.items())

    conditioning.unload_ip_adapter(pipe)
    net = ControlNetModel.from_pretrained(made / "ControlNetModel")
    pipe.register_modules(controlnet=net.eval())
    again = conditioning.load_instantid(pipe, made)
    assert torch.equal(ii.run(pipe, **again.inputs(ii.face(), ii.SMALL, (16, 16))), base)


def test_a_folder_is_replaced_whole_or_stays(pipe, tmp_path, monkeypatch):
    identity = conditioning.load_instantid(pipe, ii.adapter(pipe.unet))
    conditioning.save_instantid(identity, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with torch.no_grad():
        identity.net.conv_in.weight.add_(1)
    write = ControlNetModel.save_pretrained

    def half(self, folder, **options):
        write(self, folder, **options)
        raise OSError("disk is full")

    monkeypatch.setattr(ControlNetModel, "save_pretrained", half)
    with pytest.raises(OSError, match="disk is full"):
        conditioning.save_instantid(identity, tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    monkeypatch.undo()
    conditioning.save_instantid(identity, tmp_path)
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert after.keys() == before.keys()
    assert [p.name for p in after if after[p] != before[p]] == [
        "diffusion_pytorch_model.safetensors"
    ]


# what does not fit


def test_what_does_not_fit_is_refused_and_changes_nothing(pipe, home, tmp_path):
    before = state_of(pipe)
    narrow = copy.deepcopy(pipe)
    unet = ip.unet("xl", cross_attention_dim=32)
    narrow.register_modules(controlnet=ii.controlnet(unet))
    checkpoint = ii.adapter(pipe.unet)
    torch.save(checkpoint, tmp_path / "adapter.bin")
    for where, adapter, message in [
        (pipe, ip.checkpoint(pipe.unet, "plus"), "is a plus; want InstantID's image adapter"),
        (pipe, ii.adapter(unet), "makes tokens of 32 channels, the ControlNet takes 64"),
        (narrow, checkpoint, "makes tokens of 64 channels, the ControlNet takes 32"),
        (ii.pipeline(home, plain=True), checkpoint, "got StableDiffusionXLPipeline"),
        (pipe.unet, checkpoint, "want a pipeline with a ControlNet .* got UNet2DConditionModel"),
        (pipe, {"image_proj": {}}, "has no image_proj"),
    ]:
        with pytest.raises(ValueError, match=message):
            conditioning.load_instantid(where, adapter)
    with pytest.raises(ValueError, match="want a finite number"):
        conditioning.load_instantid(pipe, checkpoint, scale=math.nan)
    for path in (tmp_path, tmp_path / "none.bin"):
        with pytest.raises(FileNotFoundError, match=r"ip-adapter.safetensors or|no such file"):
            conditioning.load_instantid(pipe, path)
    assert_state(pipe, before)
    conditioning.load_instantid(pipe, checkpoint)
    with pytest.raises(ValueError, match="has an InstantID already"):
        conditioning.load_instantid(pipe, checkpoint)

"""method = "ip_adapter" on tiny models: what trains, what is dropped, what is kept and written."""

import json
import os
import shutil

import pytest
import tiny
import torch
from ip_adapters import Call
from ip_training import embeddings_fixture, encoder_fixture, make_fixture, vision_encoder  # noqa: F401
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training import assert_same, factors, fit, home_fixture, one_thread  # noqa: F401

from lorakern import cache, checkpoint, conditioning, models
from lorakern import plan as plans
from lorakern import run as runs
from lorakern.conditioning import ip_train
from lorakern.methods import image_features


class Interrupt(Exception):
    """Breaks a run off in a test."""


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 20},
        {"steps": 4, "variant": "plus", "gradient_checkpointing": True, "accumulate": 2,
         "optimizer": {"lr": 3e-3, "schedule": "cosine", "average": 0.9}},
        {"steps": 4, "precision": "bf16", "optimizer": {"lr": 3e-3, "name": "torch.optim:NAdam"}},
    ],
    ids=["plain", "plus, checkpointing", "bf16, nadam"],
)  # fmt: skip
def test_resume_is_bit_equal(make, changes):
    half = changes["steps"] // 2
    whole, parts = make("whole", **changes), make("parts", **changes)
    losses = fit(whole).losses

    def on_step(progress):
        if progress.step == half:
            raise Interrupt

    with pytest.raises(Interrupt):
        fit(parts, on_step=on_step)
    assert checkpoint.newest(parts.output).step == half
    torch.manual_seed(123)
    assert fit(parts.model_copy(update={"resume": True})).losses == losses[half:]
    assert_same(factors(whole.output), factors(parts.output))
    one, other = (load_file(c.output / "adapter.safetensors") for c in (whole, parts))
    assert_same(one, other)


@pytest.mark.parametrize("variant", ["base", "plus"])
def test_only_the_adapter_trains(home, make, monkeypatch, variant):
    seen = {}
    prepare = runs.prepare

    def watched(*args, **options):
        run = seen["run"] = prepare(*args, **options)
        seen["start"] = {n: t.clone() for n, t in run.method.tensors().items()}
        return run

    monkeypatch.setattr("lorakern.train.prepare", watched)
    fit(make(variant=variant))
    run, fresh = seen["run"], models.load(str(home / "model"))
    attentions = {
        k: fresh.unet.get_submodule(name.removesuffix(".processor"))
        for k, name in enumerate(fresh.unet.attn_processors)
        if name.endswith("attn2.processor")
    }
    assert len(attentions) == 4
    for k, attn in attentions.items():
        for of, layer in (("k", attn.to_k), ("v", attn.to_v)):
            assert torch.equal(seen["start"][f"ip_adapter.{k}.to_{of}_ip.weight"], layer.weight)
    for name, tensor in run.method.tensors().items():
        # of a softmax, a bias that all keys share has no gradient
        assert not torch.equal(tensor, seen["start"][name]), name
    assert sum(p.numel() for p in run.parameters) == sum(t.numel() for t in seen["start"].values())
    conditioning.unload_ip_adapter(run.base.pipe)
    assert_same(fresh.unet.state_dict(), run.base.unet.state_dict())


def test_loss_falls_on_a_batch_it_knows(make, monkeypatch):
    draw = runs.diffusion.draw
    monkeypatch.setattr(runs.diffusion, "draw", lambda seed, _, *rest: draw(seed, 0, *rest))
    losses = fit(make(steps=25, batch_size=5, optimizer={"lr": 3e-2})).losses
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_drops_are_as_often_as_said_and_exclude_each_other(make):
    chosen = make(ip_adapter={
        "embeddings": make().ip_adapter.embeddings, "image_dropout": 0.1, "text_dropout": 0.2,
        "both_dropout": 0.05,
    })  # fmt: skip
    method = runs.prepare(chosen, bar=False).method
    chance = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    text, image = method.keeps_caption(chance), method.keeps_image(chance)
    for kept, want in ((~image & text, 0.1), (image & ~text, 0.2), (~image & ~text, 0.05)):
        assert kept.float().mean().item() == pytest.approx(want, abs=0.005)


@pytest.mark.parametrize("variant", ["base", "plus"])
def test_a_dropped_image_is_the_negative_of_the_pipelines(home, make, encoder, tmp_path, variant):
    """As diffusers' encode_image has it: zeros, or the encoding of pixels that are zeros."""
    from diffusers import StableDiffusionPipeline

    own = {"variant": variant, "image_encoder": home / "encoder"}
    run = runs.prepare(make(ip_adapter=own | {"image_dropout": 1, "text_dropout": 0,
                                              "both_dropout": 0}), bar=False)  # fmt: skip
    inputs = run.method.inputs(run.latents[:2], torch.tensor([0.1, 0.9]))
    parts = models.load(str(home / "model")).pipe.components | {"image_encoder": encoder}
    image = Image.open(run.latents[0].path).convert("RGB")
    parts["feature_extractor"] = image_features.Encoder(encoder, None, variant).processor
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    given, negative = pipe.encode_image(
        image, "cpu", 1, output_hidden_states=True if variant == "plus" else None
    )
    assert torch.equal(inputs["image"], negative[:, None].expand(2, *[-1] * negative.ndim))
    kept = run.method.entries[run.latents[0].path]
    assert torch.allclose(cache.entry(kept)["features"], given[0], atol=1e-5)


def test_features_are_encoded_once_and_follow_encoder_and_image(home, make, encoder, tmp_path,
                                                                monkeypatch):  # fmt: skip
    encoded = []
    honest = image_features.Encoder.__call__
    monkeypatch.setattr(image_features.Encoder, "__call__",
                        lambda self, x: encoded.append(x) or honest(self, x))  # fmt: skip
    data = tmp_path / "data"
    shutil.copytree(home / "data", data)
    chosen = {"data": data, "cache": tmp_path / "cache", "steps": 1,
              "ip_adapter": {"image_encoder": home / "encoder"}}  # fmt: skip
    losses = fit(make("one", **chosen)).losses
    assert len(encoded) == 5
    assert fit(make("two", **chosen)).losses == losses and len(encoded) == 5
    plus = chosen["ip_adapter"] | {"variant": "plus"}
    runs.prepare(make("plus", **chosen | {"ip_adapter": plus}), bar=False)
    # five anew, and the black image
    assert len(encoded) == 11
    other = tmp_path / "encoder"
    vision_encoder(other)
    weights = load_file(other / "model.safetensors")
    weights["visual_projection.weight"] *= 2
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    runs.prepare(make("other", **chosen | {"ip_adapter": {"image_encoder": other}}), bar=False)
    assert len(encoded) == 16
    Image.new("RGB", (16, 16), "orange").save(data / "0-red.png")
    runs.prepare(make("image", **chosen), bar=False)
    assert len(encoded) == 17


def test_the_models_own_encoder_is_used_and_let_go(home, make, encoder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(home / "model", model)
    shutil.copytree(home / "encoder", model / "image_encoder")
    index = json.loads((model / "model_index.json").read_text())
    index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    (model / "model_index.json").write_text(json.dumps(index))
    own, given = (
        make("own", model=str(model), ip_adapter={}),
        make("given", ip_adapter={"image_encoder": home / "encoder"}),
    )
    run = runs.prepare(own, bar=False)
    assert run.base.pipe.image_encoder is None
    assert plans.plan(own, bar=False).trained == sum(p.numel() for p in run.parameters)
    assert run.loss(0).item() == runs.prepare(given, bar=False).loss(0).item()


@pytest.mark.parametrize(("variant", "low"), [("base", False), ("plus", True)])
def test_gradient_checkpointing_gives_the_same_gradients(make, variant, low):
    precision = {"precision": "bf16"} if low else {}
    found = []
    for on in (False, True):
        run = runs.prepare(
            make(f"{on}", variant=variant, gradient_checkpointing=on, **precision), bar=False
        )
        run.loss(0).backward()
        found.append({n: p.grad for n, p in run.method.parameters.items()})
    assert all(g.dtype == torch.float32 and g.any() for g in found[0].values())
    assert_same(*found)


def test_forward_is_lorakerns_attention(make, monkeypatch):
    from lorakern.conditioning import ip_adapter

    run = runs.prepare(make(), bar=False)
    calls = []
    honest = ip_adapter.decoupled_attention
    monkeypatch.setattr(ip_adapter, "decoupled_attention",
                        lambda *a, **k: calls.append(a) or honest(*a, **k))  # fmt: skip
    run.loss(0)
    assert len(calls) == 4


@pytest.mark.parametrize(("variant", "family"), [("base", "sd"), ("plus", "xl")])
def test_stock_diffusers_loads_the_file(make, tmp_path, home, variant, family):
    model = home / "model"
    if family == "xl":
        model = tmp_path / "xl"
        tiny.pipeline_xl(tmp_path / "parts").save_pretrained(model)
    chosen = make(variant=variant, model=str(model), optimizer={"lr": 1e-2})
    (path,) = fit(chosen).paths
    sections = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in load_file(path).items():
        section, _, name = key.partition(".")
        sections[section][name] = tensor
    stock, mine = models.load(str(model)), models.load(str(model))
    stock.pipe.load_ip_adapter(sections, subfolder="", weight_name="", image_encoder_folder=None)
    assert conditioning.load_ip_adapter(mine.unet, path).variant == variant
    images = list(load_file(chosen.ip_adapter.embeddings).values())[:2]
    call = Call(mine.unet, [torch.stack(images)[:, None]])
    want, got = call(stock.unet), call(mine.unet)
    assert (want - got).abs().max() <= 1e-4
    conditioning.set_ip_adapter_scale(mine.unet, 0.0)
    assert (call(mine.unet) - want).abs().max() > 1e-3
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["steps"] == "4" and metadata["variant"] == variant


def test_samples_change_nothing_and_show_the_image(make, home):
    sample = {"every": 2, "prompts": ["a", "b"], "steps": 2}
    one = {"images": ["0-red"]}
    drawn = make("drawn", sample=sample | one)
    assert fit(drawn).losses == fit(make("plain")).losses
    other = make("other", sample=sample | {"images": ["1-green", "0-red"]})
    fit(other)

    def pixels(chosen):
        return torch.frombuffer(
            bytearray(Image.open(chosen.output / "samples" / "step-000004.png").tobytes()),
            dtype=torch.uint8,
        ).view(16, 34, 3)

    difference = (pixels(drawn).int() - pixels(other).int()).abs()
    assert difference[:, :16].any() and not difference[:, 18:].any()


@pytest.mark.parametrize("variant", ["base", "plus"])
def test_plan_is_what_train_does(make, variant):
    chosen = make(variant=variant)
    text = str(plans.plan(chosen, bar=False))
    run = runs.prepare(chosen, bar=False)
    count = sum(p.numel() for p in run.parameters)
    assert f"IP-Adapter {variant} on 4 cross-attentions, {count:,} parameters" in text
    assert str(chosen.output / "adapter.safetensors") in text


def test_a_checkpoint_appears_whole_or_not_at_all(make, monkeypatch):
    chosen = make(steps=2, checkpoint={"every": 1})
    renamed = os.rename

    def refuse(source, target):
        raise OSError("disk is gone")

    with pytest.raises(OSError, match="disk is gone"):
        fit(chosen, on_step=lambda _: monkeypatch.setattr(os, "rename", refuse))
    monkeypatch.setattr(os, "rename", renamed)
    assert [p.name for p in (chosen.output / "checkpoints").iterdir()] == ["step-000001"]
    assert not (chosen.output / "adapter.safetensors").exists()


def test_another_file_of_embeddings_is_another_run(home, make, tmp_path):
    file = tmp_path / "own.safetensors"
    shutil.copy(home / "base.safetensors", file)
    chosen = make(steps=1, ip_adapter={"embeddings": file})
    fit(chosen)
    save_file({n: 2 * t for n, t in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"--resume: .* image features was"):
        fit(chosen.model_copy(update={"resume": True, "steps": 2}))


def test_a_new_ip_adapter_begins_as_its_base(home):
    """Beside one that is there; what it is added to stays, and what cannot be is named."""
    unet = models.load(str(home / "model")).unet
    with pytest.raises(ValueError, match="variant 'faceid'; a new one is base or plus"):
        conditioning.new_ip_adapter(unet, 8, variant="faceid")
    before = {n: t.clone() for n, t in unet.state_dict().items()}
    assert conditioning.new_ip_adapter(unet, 8).index == 0
    assert conditioning.new_ip_adapter(unet, 12, variant="plus", tokens=3, scale=0.5).index == 1
    assert all(torch.equal(t, unet.state_dict()[n]) for n, t in before.items())
    second = ip_train.parameters(unet, 1)
    assert second["image_proj.latents"].shape == (1, 3, 32)
    trained = {id(p) for p in unet.parameters() if p.requires_grad}
    assert trained == {id(p) for p in second.values()}
    conditioning.unload_ip_adapter(unet)
    assert_same(unet.state_dict(), before)

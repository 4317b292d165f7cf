"""method = "instantid" on a tiny SDXL: what trains, on what, what is kept, drawn and written."""

import json
import os
import shutil

import instantids as ii
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from recorder import assert_equal_to_eager, graphs_fixture  # noqa: F401
from safetensors.torch import load_file, save_file
from training import assert_same, factors, fit, lines_of, one_thread  # noqa: F401

from lorakern import checkpoint, conditioning, config, models
from lorakern import plan as plans
from lorakern import run as runs
from lorakern.conditioning import faces
from lorakern.conditioning.instantid import NET


class Interrupt(Exception):
    """Breaks a run off in a test."""


@pytest.fixture(name="home", scope="module")
def home_fixture(tmp_path_factory):
    """A model, and pictures with a face beside each, of both kinds of file."""
    home = tmp_path_factory.mktemp("home")
    tiny.pipeline_xl(home / "parts").save_pretrained(home / "model")
    for i, image in enumerate(sorted(tiny.images(home / "data", 4).glob("*.png"))):
        points = torch.tensor(ii.SMALL) + i
        if i % 2:
            found = {"embedding": ii.face(i), "keypoints": points.float()}
            save_file(found, image.with_suffix(".safetensors"))
        else:
            found = {"embedding": ii.face(i).tolist(), "keypoints": points.tolist()}
            image.with_suffix(".json").write_text(json.dumps(found))
    return home


@pytest.fixture(name="make")
def make_fixture(home, tmp_path):
    """settings -> Config of a short run in tmp_path."""

    def make(output="out", **changes) -> config.Config:
        table = {
            "method": "instantid", "model": str(home / "model"), "data": home / "data",
            "output": tmp_path / output, "cache": home / "cache", "resolution": 16, "steps": 4,
            "batch_size": 2, "instantid": {"tokens": 5}, "optimizer": {"lr": 3e-3},
        }  # fmt: skip
        return config.from_dict(table | changes)

    return make


@pytest.fixture(name="seen")
def seen_fixture(monkeypatch):
    """The run that was prepared last, and its tensors at the start."""
    seen = {}
    prepare = runs.prepare

    def watched(*args, **options):
        run = seen["run"] = prepare(*args, **options)
        seen["start"] = {n: t.clone() for n, t in run.method.tensors().items()}
        return run

    monkeypatch.setattr("lorakern.train.prepare", watched)
    return seen


def test_loss_falls_on_a_batch_it_knows(make, monkeypatch):
    draw = runs.diffusion.draw
    monkeypatch.setattr(runs.diffusion, "draw", lambda seed, _, *rest: draw(seed, 0, *rest))
    losses = fit(make(steps=30, batch_size=4)).losses
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_checkpointing": True, "accumulate": 2,
          "optimizer": {"lr": 3e-3, "schedule": "cosine", "average": 0.9}},
     {"precision": "bf16", "optimizer": {"lr": 3e-3, "name": "torch.optim:NAdam"}}],
    ids=["plain", "checkpointing, average", "bf16, nadam"],
)  # fmt: skip
def test_resume_is_bit_equal(make, changes):
    whole, parts = make("whole", **changes), make("parts", **changes)
    losses = fit(whole).losses

    def on_step(progress):
        if progress.step == 2:
            raise Interrupt

    with pytest.raises(Interrupt):
        fit(parts, on_step=on_step)
    assert checkpoint.newest(parts.output).step == 2
    torch.manual_seed(123)
    assert fit(parts.model_copy(update={"resume": True})).losses == losses[2:]
    assert_same(factors(whole.output), factors(parts.output))
    assert all(t.dtype == torch.float32 for t in factors(whole.output).values())
    names = ["ip-adapter.safetensors", f"{NET}/diffusion_pytorch_model.safetensors"]
    for name in names:
        one, other = (load_file(c.output / "adapter" / name) for c in (whole, parts))
        assert_same(one, other)


def test_adapter_and_identity_net_train_and_nothing_else(home, make, seen):
    fit(make(optimizer={"lr": 3e-3, "weight_decay": 0}))
    run, fresh = seen["run"], models.load(str(home / "model"))
    start, end = seen["start"], run.method.tensors()
    # of a softmax, a bias that all keys share would have none, but those layers have no bias
    still = [name for name in start if torch.equal(start[name], end[name])]
    assert not still and start.keys() == end.keys()
    trained = {p for m in run.trained.values() for p in m.parameters() if p.requires_grad}
    assert len(trained) == len(end) == len(run.parameters)
    for name in ("conv_in", "down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.proj_in"):
        want = fresh.unet.get_submodule(name).weight
        assert torch.equal(start[f"controlnet.{name}.weight"], want)
    assert not start["controlnet.controlnet_mid_block.weight"].any()
    conditioning.unload_ip_adapter(run.base.unet)
    assert_same(fresh.unet.state_dict(), run.base.unet.state_dict())


def test_the_loss_is_that_of_the_paper(make, seen, monkeypatch):
    """Noise is predicted from text at the UNet, and from face and drawing at the IdentityNet."""
    chosen = make(steps=1)
    fit(chosen)
    run, calls = seen["run"], {}
    for name, module in run.trained.items():
        monkeypatch.setattr(module, "forward", spied(module.forward, calls, name))
    predicts = {}
    honest = runs.diffusion.loss

    def loss(predicted, wanted, *rest, **options):
        predicts.update(predicted=predicted, wanted=wanted)
        return honest(predicted, wanted, *rest, **options)

    monkeypatch.setattr(runs.diffusion, "loss", loss)
    got = run.loss(3)
    members = [run.latents[i] for i in run.order.batch(3)]
    _, noise, _ = runs.diffusion.draw(0, 3, predicts["wanted"].shape, 1000)
    assert torch.equal(predicts["wanted"], noise[1])
    assert torch.allclose(got, (predicts["predicted"] - noise[1]).square().mean())
    (net, named), (unet, options) = calls["controlnet"], calls["unet"]
    embeds = torch.stack([faces.read(faces.beside(m.path)).embedding for m in members])
    tokens = run.base.unet.encoder_hid_proj.image_projection_layers[0](embeds[:, None])
    assert torch.allclose(net[2], tokens, atol=1e-5) and net[2].shape == (2, 5, 64)
    points = [faces.read(faces.beside(m.path)).keypoints for m in members]
    drawn = [ii.array(faces.draw(p, (16, 16))) / 255 for p in points]
    assert np.abs(net[3].permute(0, 2, 3, 1).numpy() - np.stack(drawn)).max() < 1e-6
    assert torch.equal(unet[0], net[0]) and unet[2].shape == (2, 16, 64)
    assert torch.equal(options["added_cond_kwargs"]["image_embeds"][0][:, 0, 0], embeds)
    for name in ("text_embeds", "time_ids"):
        assert torch.equal(named["added_cond_kwargs"][name], options["added_cond_kwargs"][name])
    # nothing is dropped, whatever the chance
    assert run.method.keeps_caption(torch.zeros(3)).all()


def spied(forward, calls, name):
    def watched(*args, **options):
        calls[name] = args, options
        return forward(*args, **options)

    return watched


def test_the_points_go_where_the_crop_takes_them(home, make, seen, tmp_path):
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[19:22, 59:62] = 255
    folder = tmp_path / "wide"
    folder.mkdir()
    Image.fromarray(pixels).save(folder / "a.png")
    (folder / "a.txt").write_text("a dot", encoding="utf-8")
    points = [[60.5, 20.5]] * 5
    found = {"embedding": ii.face().tolist(), "keypoints": points}
    (folder / "a.json").write_text(json.dumps(found), encoding="utf-8")
    fit(make(data=folder, resolution=64, batch_size=1, steps=1))
    latent = seen["run"].latents[0]
    drawn = seen["run"].method.inputs([latent], torch.zeros(1))["drawing"][0]
    width, height = latent.bucket
    assert width > height and drawn.shape == (3, height, width)
    fitted, _ = runs.data.fit(Image.fromarray(pixels), latent.bucket)
    y, x = np.unravel_index(fitted.sum(0).argmax().item(), (height, width))
    # the last disc covers the others: magenta, of radius 10
    rows, columns = np.nonzero((drawn[0] == 1).numpy() & (drawn[2] == 1).numpy())
    assert abs(rows.mean() - y) <= 1 and abs(columns.mean() - x) <= 1


def test_what_is_written_is_the_released_layout_and_a_start_for_another_run(home, make, seen):
    chosen = make()
    (folder,) = fit(chosen).paths
    assert {p.name for p in folder.iterdir()} == {"ip-adapter.safetensors", NET}
    trained = seen["run"]
    from diffusers import ControlNetModel

    pipe = ii.pipeline(home / "parts")
    pipe.register_modules(controlnet=ControlNetModel.from_pretrained(folder / NET).eval())
    identity = conditioning.load_instantid(pipe, folder, scale=1.0)
    given = identity.inputs(ii.face(), ii.SMALL, (16, 16))
    with torch.no_grad():
        for module in trained.trained.values():
            module.eval()
        tokens = trained.base.unet.encoder_hid_proj.tokens(0, identity.embeds(ii.face()))
        assert torch.equal(tokens, pipe.unet.encoder_hid_proj.tokens(0, identity.embeds(ii.face())))
    assert_same(dict(trained.method.net.state_dict()), dict(identity.net.state_dict()))
    first = ii.run(pipe, **given)
    conditioning.set_ip_adapter_scale(pipe, 0.0)
    assert not torch.equal(ii.run(pipe, **given, controlnet_conditioning_scale=0.0), first)

    end = {n: t.clone() for n, t in trained.method.tensors().items()}
    more = {"controlnet": str(folder / NET), "adapter": folder / "ip-adapter.safetensors"}
    fit(make("more", steps=1, instantid=more))
    assert_same(seen["start"], end)


def test_samples_are_drawn_of_the_faces_named(home, make, tmp_path):
    pictures = sorted((home / "data").glob("*.png"))[:2]
    sheets = []
    for i, picture in enumerate(pictures):
        sample = {
            "every": 2, "prompts": ["red", "blue"], "steps": 2, "images": [str(picture)],
        }  # fmt: skip
        chosen = make(f"out{i}", steps=2, sample=sample)
        fit(chosen)
        sheets.append(ii.array(Image.open(chosen.output / "samples" / "step-000002.png")))
    assert sheets[0].shape == sheets[1].shape == (16, 34, 3)
    assert not np.array_equal(*sheets)
    # to draw changes nothing in training
    plain = make("plain", steps=2)
    fit(plain)
    assert_same(factors(plain.output), factors(chosen.output))


def test_graphs_are_equal_to_eager(make, graphs):
    assert_equal_to_eager(make, graphs, steps=6)


def test_a_plan_counts_what_trains(make, seen):
    chosen = make(steps=1)
    planned = plans.plan(chosen, bar=False)
    assert planned.writes == [chosen.output / "adapter"] and not chosen.output.exists()
    fit(chosen)
    assert planned.trained == sum(p.numel() for p in seen["run"].parameters)
    assert "InstantID on 4 cross-attentions" in planned.about
    first = lines_of(chosen.output / "log.jsonl")[0]
    assert first["parameters"] == planned.trained


def test_what_cannot_work_is_refused_before_anything_is_written(home, make, tmp_path):
    tiny.saved(tmp_path)
    data = tmp_path / "data"
    shutil.copytree(home / "data", data)
    gone = sorted(data.glob("*.json"))[0]
    narrow = ii.controlnet(ii.ip.unet("xl", cross_attention_dim=32))
    narrow.save_pretrained(tmp_path / "narrow")
    for changes, message in [
        ({"model": str(tmp_path / "model")}, "is for SDXL; model .* is a StableDiffusionPipeline"),
        ({"instantid": {"controlnet": "nowhere"}}, 'controlnet nowhere: want "from_unet", or a'),
        ({"instantid": {"adapter": "none.bin"}}, "instantid.adapter: no file none.bin"),
        ({"instantid": {"controlnet": str(tmp_path / "narrow")}}, "tokens of 32, the model 64"),
        ({"caption_dropout": 0.1}, 'which method = "instantid" does not read'),
        ({"instantid": {"adapter": "a", "tokens": 3}}, "want one of them"),
        ({"method": "adapter"}, 'instantid.tokens is 5, which method = "adapter" does not read'),
        ({"sample": {"every": 1, "prompts": "red"}}, "sample.images has 0 image prompts"),
        ({"sample": {"every": 1, "prompts": "red", "images": "no.png"}}, "sample.images: no.png"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(make(**changes))
        assert not (tmp_path / "out" / "checkpoints").exists()
    gone.write_text('{"embedding": [1, 2], "keypoints": []}', encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{gone.name}: want an embedding \[512\].* got \[2\]"):
        fit(make(data=data))
    gone.unlink()
    with pytest.raises(ValueError, match=f"no face beside .*{gone.stem}.png; want"):
        fit(make(data=data))
    assert not os.path.exists(tmp_path / "out")


def test_a_run_does_not_go_on_with_other_faces(home, make, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(home / "data", data)
    fit(make(data=data, steps=1))
    one = sorted(data.glob("*.json"))[0]
    found = json.loads(one.read_text())
    found["keypoints"][0][0] += 1
    one.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(ValueError, match="is of another run: faces was"):
        fit(make(data=data, steps=2, resume=True))

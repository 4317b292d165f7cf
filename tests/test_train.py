"""The trainer on a tiny random model: it learns, and does what the settings say."""

import json
import shutil

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from training import assert_same, factors, fit, home_fixture, lines_of, make_fixture, one_thread  # noqa: F401

import lorakern
from lorakern import cache, frozen, models
from lorakern import run as runs
from lorakern.ops.frozen_linear import op as frozen_linear


def test_loss_falls_on_a_batch_it_knows(home, make, monkeypatch):
    chosen = make(steps=40, batch_size=5, caption_dropout=0.0,
                  adapter={"rank": 16, "targets": "full"}, optimizer={"lr": 5e-3})  # fmt: skip
    # the same noise at each step: the batch can be learned by heart
    draw = runs.diffusion.draw
    monkeypatch.setattr(runs.diffusion, "draw", lambda seed, _, *rest: draw(seed, 0, *rest))
    losses = fit(chosen).losses
    assert sum(losses[-5:]) < 0.1 * sum(losses[:5])


def test_base_weights_stay_bit_for_bit(home, make, monkeypatch):
    seen = {}
    prepare = runs.prepare

    def watched(*args, **options):
        seen["run"] = prepare(*args, **options)
        return seen["run"]

    monkeypatch.setattr("lorakern.train.prepare", watched)
    fit(make(adapter={"rank": 4, "text_encoder": True, "targets": "full"}))
    fresh = models.load(str(home / "model"))
    for component, module in seen["run"].trained.items():
        lorakern.eject(module)
        assert_same(fresh.pipe.components[component].state_dict(), module.state_dict())


def test_gradient_checkpointing_changes_no_number(make):
    text = {"rank": 4, "text_encoder": True}
    one, other = make("one", adapter=text), make("other", adapter=text, gradient_checkpointing=True)
    assert fit(one).losses == fit(other).losses
    assert_same(factors(one.output), factors(other.output))


def test_bf16_keeps_factors_in_float32(make):
    one, other = make("one", steps=8), make("other", steps=8, precision="bf16")
    exact, rounded = fit(one).losses, fit(other).losses
    assert rounded != exact
    assert all(abs(a - b) < 0.02 * a for a, b in zip(exact, rounded, strict=True))
    moved = [t for name, t in factors(other.output).items() if name.endswith("up")]
    assert all(t.dtype == torch.float32 for t in moved)
    # masters that were rounded to bf16 would have no bits below it
    assert any((t != t.bfloat16().float()).any() for t in moved)


def test_bf16_rounds_a_context_as_each_layer_would(make, monkeypatch):
    low = {"precision": "bf16"}
    context, _ = runs.prepare(make("read", **low), bar=False).batch(0).text
    assert context.dtype == torch.bfloat16
    once = fit(make("once", **low))
    monkeypatch.setattr(runs.Run, "_told", lambda run, tokens: run.text(tokens))
    each = fit(make("each", **low))
    assert once.losses == each.losses
    assert_same(load_file(once.paths[0]), load_file(each.paths[0]))


def test_accumulating_is_a_larger_batch(make, monkeypatch):
    """Two batches of 1 give the gradient of one batch of 2, when the noise is the same."""

    def draw(seed, index, shape, steps):
        return torch.full((shape[0],), 500), torch.ones(2, *shape), torch.ones(shape[0])

    monkeypatch.setattr(runs.diffusion, "draw", draw)
    same = {"steps": 1, "caption_dropout": 0.0, "optimizer": {"lr": 1e-3, "clip": 0}}
    large, small = (
        make("large", batch_size=5, **same),
        make("small", batch_size=1, accumulate=5, **same),
    )
    one, other = fit(large), fit(small)
    assert one.losses == pytest.approx(other.losses, rel=1e-5)
    lines = [
        json.loads((c.output / "log.jsonl").read_text().splitlines()[1]) for c in (large, small)
    ]
    assert lines[0]["grad_norm"] == pytest.approx(lines[1]["grad_norm"], rel=1e-4)


def test_clipping_bounds_the_step(make):
    sgd = {"name": "torch.optim:SGD", "lr": 1.0}
    fit(make("free", steps=1, optimizer=sgd | {"clip": 0}))
    chosen = make("clipped", steps=1, optimizer=sgd | {"clip": 1e-4})
    fit(chosen)
    moved = [t for name, t in factors(chosen.output).items() if name.endswith("up")]
    norm = torch.stack([t.norm() for t in moved]).norm().item()
    assert norm == pytest.approx(1e-4, rel=1e-2)


def test_velocity_and_min_snr_reach_the_loss(home, make, tmp_path):
    plain = fit(make("plain", steps=2)).losses
    velocity = fit(make("velocity", steps=2, loss={"predicts": "velocity"})).losses
    weighted = fit(make("weighted", steps=2, loss={"min_snr": 1.0})).losses
    assert len({tuple(x) for x in (plain, velocity, weighted)}) == 3
    # the model's own scheduler decides when nothing is said
    model = tmp_path / "model"
    shutil.copytree(home / "model", model)
    about = model / "scheduler" / "scheduler_config.json"
    about.write_text(about.read_text().replace("epsilon", "v_prediction"), encoding="utf-8")
    assert fit(make("auto", steps=2, model=str(model))).losses == velocity


def test_sdxl_trains_and_resumes(make, tmp_path):
    model = tmp_path / "xl"
    tiny.pipeline_xl(tmp_path / "parts").save_pretrained(model)
    for name, text_encoder in (("unet", False), ("both", True)):
        chosen = make(name, model=str(model), adapter={"rank": 2, "text_encoder": text_encoder})
        losses = fit(chosen).losses
        assert len(losses) == 4 and all(loss > 0 for loss in losses)
    trained = factors(chosen.output)
    for part in ("unet.", "text_encoder.", "text_encoder_2."):
        ups = [t for name, t in trained.items() if name.startswith(part) and name.endswith("up")]
        assert any(t.any() for t in ups), part


def test_dropped_captions_are_the_models_unconditional(home, make, monkeypatch, tmp_path):
    """Zeros where the pipeline takes zeros, else the text of an empty caption."""
    model = tmp_path / "xl"
    tiny.pipeline_xl(tmp_path / "parts").save_pretrained(model)
    for path, zeros in ((model, True), (home / "model", False)):
        chosen = make(path.name, model=str(path), caption_dropout=1.0, steps=1)
        run = runs.prepare(chosen, bar=False)
        seen = []
        run.base.unet.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[2]))
        run.loss(0)
        (context,) = seen
        empty, _ = run.text(run.empty[None])
        assert empty.any()
        assert torch.equal(context, empty.expand(2, -1, -1) * (not zeros))


def test_cache_is_used_and_follows_the_content(home, make, tmp_path, monkeypatch):
    copy = tmp_path / "data"
    shutil.copytree(home / "data", copy)
    encoded = []
    honest = models.Base.encode_image
    monkeypatch.setattr(
        models.Base, "encode_image", lambda self, x: encoded.append(x) or honest(self, x)
    )
    chosen = {"data": copy, "cache": None, "steps": 1}
    fit(make("first", **chosen))
    assert len(encoded) == 5
    shared = {**chosen, "cache": tmp_path / "first" / "cache"}
    one = fit(make("second", **shared)).losses
    assert len(encoded) == 5
    # an old picture under a new name
    (copy / "1-green.png").rename(copy / "9-green.png")
    (copy / "1-green.txt").rename(copy / "9-green.txt")
    fit(make("renamed", **shared))
    assert len(encoded) == 5
    # a new picture under an old name
    Image.new("RGB", (16, 16), "orange").save(next(copy.glob("0-*.png")))
    fit(make("changed", **shared))
    assert len(encoded) == 6
    # an entry that is torn
    shutil.rmtree(copy)
    shutil.copytree(home / "data", copy)
    torn = max(shared["cache"].iterdir(), key=lambda f: f.stat().st_size)
    torn.write_bytes(torn.read_bytes()[:50])
    cache.entry.cache_clear()
    assert fit(make("fourth", **shared)).losses == one
    assert len(encoded) in (6, 7)
    assert not list(shared["cache"].glob(".*"))
    assert sorted(p.name for p in copy.iterdir()) == sorted(
        p.name for p in (home / "data").iterdir()
    )


def test_another_encoder_has_its_own_entries(home, make, tmp_path):
    model = tmp_path / "model"
    pipe = tiny.pipeline(tmp_path / "parts")
    with torch.no_grad():
        pipe.vae.quant_conv.bias.add_(0.5)
    pipe.save_pretrained(model)
    shared = tmp_path / "cache"
    fit(make("one", cache=shared, steps=1))
    before = {f.name for f in shared.iterdir()}
    fit(make("two", cache=shared, steps=1, model=str(model)))
    # five latents anew; the texts are of the same text encoder
    assert len({f.name for f in shared.iterdir()} - before) == 5


def test_cached_conditions_are_the_models_own(home, tmp_path):
    base = models.load(str(home / "model"))
    captions = ["a red square", ""]
    texts = cache.encode_texts(base, [base.tokens(c) for c in captions], tmp_path)
    context, pooled = texts(torch.stack([base.tokens(c) for c in captions]))
    want, _ = base.pipe.encode_prompt("a red square", "cpu", 1, False)
    assert torch.equal(context[:1], want) and pooled is None
    unconditional, _ = base.pipe.encode_prompt("", "cpu", 1, False)
    assert torch.equal(context[1:], unconditional)


def test_bad_images_are_listed_and_training_goes_on(home, make, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(home / "data", folder)
    (folder / "torn.png").write_bytes((folder / "0-red.png").read_bytes()[:300])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("not a picture", encoding="utf-8")
    for name in ("torn", "empty", "text"):
        (folder / f"{name}.txt").write_text("a thing", encoding="utf-8")
    chosen = make(data=folder)
    result = fit(chosen)
    assert {b.path.name for b in result.bad} == {"torn.png", "empty.jpg", "text.png"}
    listed = lines_of(chosen.output / "bad_images.jsonl")
    assert len(listed) == 3 and all(entry["reason"] for entry in listed)
    assert "3 images are left out" in capsys.readouterr().err
    for good in folder.glob("[0-9]*"):
        good.unlink()
    with pytest.raises(ValueError, match=r"none of 3 images.*empty.jpg: the file is empty"):
        fit(make("none", data=folder))


def test_buckets_keep_aspect_ratios(home, make, tmp_path):
    folder = tiny.images(tmp_path / "data", 3, size=(64, 36))
    base = models.load(str(home / "model"))
    assert base.bucket_step == 4 and base.latent_factor == 2
    chosen = make(data=folder, resolution=16)
    assert fit(chosen).step == 4
    entries = [load_file(f) for f in chosen.cache.iterdir()]
    assert [6, 10] in [list(e["mean"].shape[1:]) for e in entries if "mean" in e]


def test_files_work_in_stock_diffusers(home, make):
    from diffusers import StableDiffusionPipeline

    chosen = make(steps=10, formats=["kohya", "diffusers", "peft"], optimizer={"lr": 3e-2})
    paths = fit(chosen).paths
    assert [p.exists() for p in paths] == [True] * 3
    mine = models.load(str(home / "model"))
    lorakern.load(mine.pipe, paths[0])
    options = {"seed": 0, "steps": 3, "guidance": 3.0, "size": (16, 16)}
    (want,) = models.draw(mine, ["a red square"], **options)
    with models.quiet_libraries():
        stock = StableDiffusionPipeline.from_pretrained(home / "model")
        (bare,) = models.draw(models.Base(stock, xl=False), ["a red square"], **options)
        stock.load_lora_weights(str(paths[1]))
        (got,) = models.draw(models.Base(stock, xl=False), ["a red square"], **options)

    def off(a, b):
        return max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True))

    assert off(got, want) <= 1 and off(bare, want) > 1


def test_samples_and_log_are_written_and_change_nothing(make):
    drawn = make(
        "drawn", sample={"every": 2, "prompts": ["a red square", "x"], "rows": 2, "steps": 2}
    )
    plain = make("plain")
    assert fit(drawn).losses == fit(plain).losses
    for step in (2, 4):
        assert Image.open(drawn.output / "samples" / f"step-00000{step}.png").size == (34, 34)
    lines = lines_of(drawn.output / "log.jsonl")
    assert [line.get("event") for line in lines] == ["start", *[None] * 4, "end"]
    assert lines[0]["config"]["adapter"]["rank"] == 4 and lines[0]["images"] == 5
    assert [line["step"] for line in lines[1:5]] == [1, 2, 3, 4]
    assert list((drawn.output / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere/at/all"}, "model nowhere/at/all: no such folder"),
        ({"resolution": 18}, "multiple of 4"),
        ({"optimizer": {"name": "adam"}}, "module:Class"),
        ({"optimizer": {"name": "torch.optim:Nope"}}, "Nope"),
        ({"optimizer": {"options": {"bettas": 1}}}, "bettas"),
        ({"optimizer": {"warmup": 3}}, "constant_with_warmup"),
        ({"adapter": {"algo": "loora"}}, "loora"),
        ({"adapter": {"options": {"dropuot": 0.1}}}, "lora has no option dropuot; it has tucker"),
        ({"adapter": {"algo": "lokr", "options": {"init": "pissa"}}}, "lokr has no option init"),
        ({"adapter": {"targets": "no_such_layer"}}, "no_such_layer"),
        ({"device": "tpu9"}, "device tpu9"),
        ({"formats": ["kohia"]}, "kohia"),
        # before the first step, not after the last
        ({"formats": ["kohya", "diffusers"], "adapter": {"algo": "loha"}}, "which diffusers"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_settings_that_cannot_work_are_named(make, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(make(**changes))


def test_nothing_is_written_into_the_data_folder(home, make):
    for changes in ({"output": home / "data" / "out"}, {"cache": home / "data"}):
        with pytest.raises(ValueError, match="lies in the data folder"):
            fit(make(**changes))


def test_model_folders_that_cannot_work_are_named(home, make, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"no model_index.json"):
        fit(make(model=str(empty)))
    (empty / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match=r"FluxPipeline; want StableDiffusionPipeline"):
        fit(make(model=str(empty)))
    torn = tmp_path / "torn"
    shutil.copytree(home / "model", torn)
    weights = torn / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="torn cannot be loaded"):
        fit(make(model=str(torn)))


@pytest.mark.skipif(
    not hasattr(torch.ops.lorakern_native, "frozen_linear_cpu"), reason="_native is not built"
)
def test_frozen_layers_of_few_rows_run_on_their_own_kernel(make, monkeypatch):
    monkeypatch.setattr(frozen_linear, "_mkl_is_best", lambda: False)
    plain = fit(make("plain"))
    monkeypatch.setattr(frozen_linear, "VALUES", 1)
    rows, kernel = [], frozen.frozen_linear
    noted = lambda x, *rest: rows.append(x) or kernel(x, *rest)  # noqa: E731
    monkeypatch.setattr(frozen, "frozen_linear", noted)
    fast = fit(make("fast"))
    assert len(rows) > 10
    assert fast.losses == pytest.approx(plain.losses, rel=1e-4)

"""Steps as graphs give the eager steps' numbers to the bit, or step aside and say why."""

import shutil

import pytest
import recorder
import tiny
import torch
from ip_training import embeddings_fixture  # noqa: F401
from recorder import assert_equal_to_eager, graphs_fixture, notes  # noqa: F401
from training import assert_same, factors, fit, home_fixture, lines_of, make_fixture, one_thread  # noqa: F401

from lorakern import graphed
from lorakern import plan as plans
from lorakern import run as runs


@pytest.fixture(name="two_buckets")
def two_buckets_fixture(home, tmp_path):
    """Pictures of two shapes."""
    data = tmp_path / "data"
    tiny.images(data, 4, size=(64, 36))
    shutil.copytree(home / "data", data / "square")
    return {"data": data}


def full(algo: str = "lora", **options) -> dict:
    return {"adapter": {"algo": algo, "rank": 2, "targets": "full", "options": options}}


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": {"min_snr": 5}, "optimizer": {"lr": 3e-3, "average": 0.9}},
        full(dora=True) | {"accumulate": 2, "precision": "bf16"},
        full("loha", dora=True),
        full("lokr", use_scalar=True),
    ],
    ids=["attention", "dora in bf16", "loha, dora", "lokr"],
)
def test_equal_to_eager(make, graphs, changes):
    """DoRA keeps norms from call to call; in a graph they are made anew."""
    assert_equal_to_eager(make, graphs, steps=8, **changes)


def test_equal_over_buckets_and_accumulation(make, graphs, two_buckets):
    """Batches of one step are partly eager and partly replayed, and add to the same gradients."""
    found = assert_equal_to_eager(make, graphs, steps=8, accumulate=3, **two_buckets)
    assert sorted(note["latents"] for note in found) == [[2, 4, 6, 10], [2, 4, 8, 8]]


def test_equal_on_sdxl_with_zeros_for_no_caption(make, graphs, tmp_path):
    model = tmp_path / "xl"
    tiny.pipeline_xl(tmp_path / "parts").save_pretrained(model)
    assert_equal_to_eager(make, graphs, steps=6, model=str(model))


def test_equal_on_image_prompts(make, graphs, embeddings):
    assert_equal_to_eager(
        make, graphs, steps=6, method="ip_adapter", adapter={}, caption_dropout=0.0,
        ip_adapter={"variant": "plus", "embeddings": embeddings / "plus.safetensors"},
    )  # fmt: skip


def test_ten_and_ten_steps_are_twenty(make, graphs):
    whole, parts = make("whole", steps=20, graphs="on"), make("parts", steps=10, graphs="on")
    losses = fit(whole).losses
    assert fit(parts).losses == losses[:10]
    assert fit(parts.model_copy(update={"steps": 20, "resume": True})).losses == losses[10:]
    assert len(graphs.tapes) == 3
    assert_same(factors(whole.output), factors(parts.output))
    # and eager steps go on from graphs
    last = parts.model_copy(update={"steps": 22, "resume": True, "graphs": "off"})
    assert len(fit(last).losses) == 2


def test_a_loss_that_is_not_finite_is_skipped(make, graphs, monkeypatch):
    draw = runs.diffusion.draw

    def poisoned(seed, index, shape, steps):
        t, noise, chance = draw(seed, index, shape, steps)
        return t, noise * (float("nan") if index in (5, 6) else 1.0), chance

    monkeypatch.setattr(runs.diffusion, "draw", poisoned)
    one, other = (make(name, steps=10, graphs=name) for name in ("off", "on"))
    eager, replayed = fit(one), fit(other)
    assert eager.skipped == replayed.skipped == 2 and len(graphs.tapes) == 1
    assert str(eager.losses) == str(replayed.losses)
    assert_same(factors(one.output), factors(other.output))


@pytest.mark.parametrize(("replay", "stays"), [(1.0, True), (1.99, False)])
def test_auto_keeps_what_is_faster(make, graphs, monkeypatch, replay, stays):
    monkeypatch.setattr(graphs, "replay", replay)
    one, other = (make(n, steps=10, graphs=n) for n in ("auto", "off"))
    result = fit(one)
    (note,) = notes(one)
    assert note["captured"] is stays and note["reason"] == (None if stays else "not faster")
    assert (note["eager_seconds"], note["replay_seconds"]) == (2.0, replay)
    assert graphs.replays == (10 - graphed.WARM if stays else graphed.WARM)
    assert result.losses == fit(other).losses
    assert_same(factors(one.output), factors(other.output))


def test_no_more_graphs_than_allowed(make, graphs, monkeypatch, two_buckets):
    monkeypatch.setattr(graphed, "MOST", 1)
    chosen, eager = (make(n, steps=12, graphs=n, **two_buckets) for n in ("on", "off"))
    assert fit(chosen).losses == fit(eager).losses
    assert [note["reason"] for note in notes(chosen)] == [None, "there are 1 graphs"]


def test_no_graph_without_memory_for_two_steps(make, graphs, monkeypatch):
    monkeypatch.setattr(graphs, "full", True)
    chosen = make(steps=6, graphs="auto")
    assert len(fit(chosen).losses) == 6 and not graphs.tapes
    assert [note["reason"] for note in notes(chosen)] == ["no memory for a second step is free"]


def test_a_capture_that_fails_ends_no_run(make, graphs, monkeypatch, two_buckets):
    """Of a decision on a value; under "on" it is an error."""
    loss = runs.diffusion.loss

    def deciding(predicted, *rest, **options):
        return loss(predicted, *rest, **options) * (2.0 if predicted.sum() > 0 else 1.0)

    monkeypatch.setattr(runs.diffusion, "loss", deciding)
    chosen, eager = (make(n, steps=12, graphs=n, **two_buckets) for n in ("auto", "off"))
    assert fit(chosen).losses == fit(eager).losses
    assert_same(factors(chosen.output), factors(eager.output))
    first, second = (note["reason"] for note in notes(chosen))
    assert "capture failed" in first and recorder.REFUSAL in first
    assert second == "a capture failed before" and not graphs.tapes
    with pytest.raises(RuntimeError, match=recorder.REFUSAL):
        fit(make("on", steps=8, graphs="on"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"adapter": {"options": {"dropout": 0.1}}}, r"dropout at unet\..*to_q draws anew"),
        (full("loha", rank_dropout=0.1), "dropout at unet"),
        ({"adapter": {"options": {"module_dropout": 0.1}}}, "dropout at unet"),
        ({"adapter": {"text_encoder": True}}, "a text encoder trains"),
        ({"gradient_checkpointing": True}, "gradient checkpointing"),
        ({"optimizer": {"name": "torch.optim:NAdam"}}, "optimizer torch.optim:NAdam"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_captured_is_named(make, graphs, changes, reason):
    chosen, forced = (
        make("auto", steps=6, graphs="auto", **changes),
        make("on", graphs="on", **changes),
    )
    planned = plans.plan(chosen, bar=False).graphs
    fit(chosen)
    assert not graphs.tapes
    assert lines_of(chosen.output / "log.jsonl")[0]["graphs"] == planned
    for refused in (fit, lambda c: plans.plan(c, bar=False)):
        with pytest.raises(ValueError, match=f'graphs is "on", but {reason}') as error:
            refused(forced)
    assert planned.startswith("auto: none, ") and planned[12:] in str(error.value)
    assert not (forced.output / "log.jsonl").exists()


def test_a_cpu_has_none(make):
    planned = str(plans.plan(make(graphs="auto"), bar=False))
    assert "graphs  auto: none, the device is cpu; want cuda" in planned
    assert plans.plan(make(), bar=False).graphs == "off"
    with pytest.raises(ValueError, match='graphs is "on", but the device is cpu; want cuda'):
        fit(make(graphs="on"))
    assert not make().output.exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_cuda_graphs_are_equal_to_eager(make, two_buckets, precision):
    chosen = {"steps": 12, "accumulate": 3, "device": "cuda", "precision": precision}
    one, other, auto = (make(n, graphs=n, **chosen, **two_buckets) for n in ("off", "on", "auto"))
    assert fit(one).losses == fit(other).losses == fit(auto).losses
    assert_same(factors(one.output), factors(other.output))
    assert_same(factors(one.output), factors(auto.output))
    assert [note["captured"] for note in notes(other)] == [True, True]
    assert all(note["captured"] or note["reason"] == "not faster" for note in notes(auto))

"""A run that is broken off anywhere goes on bit for bit, and nothing that was done is lost."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from training import assert_same, factors, fit, home_fixture, lines_of, make_fixture, one_thread  # noqa: F401

from lorakern import checkpoint
from lorakern import run as runs
from lorakern.train import GIVE_UP, Diverged


class Interrupt(Exception):
    """Breaks a run off in a test."""


def break_off_at(step: int):
    def on_step(progress):
        if progress.step == step:
            raise Interrupt

    return on_step


def adapter(algo: str, **options) -> dict:
    return {"adapter": {"algo": algo, "rank": 2, "targets": "full", "options": options},
            }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter": {"rank": 4, "text_encoder": True}},
        {"accumulate": 3, "optimizer": {"lr": 3e-3, "schedule": "cosine", "warmup": 2}},
        {"adapter": {"rank": 4, "options": {"dropout": 0.2}}, "optimizer":
            {"lr": 3e-3, "name": "torch.optim:NAdam"}},
        {"precision": "bf16", "gradient_checkpointing": True, "loss": {"min_snr": 5}},
        adapter("loha", rank_dropout=0.2, tucker=True),
        adapter("lokr", module_dropout=0.3, use_scalar=True),
        adapter("dora", dropout=0.2) | {"gradient_checkpointing": True},
        adapter("lora", init="pissa") | {"optimizer": {"lr": 3e-3, "max_norm": 0.1}},
        adapter("lora", freeze_down=True) | {"optimizer": {"lr": 3e-3, "loraplus_ratio": 4}},
    ],
    ids=["plain", "text encoder", "accumulate, cosine", "dropout, nadam", "bf16, checkpointing",
         "loha", "lokr", "dora", "pissa", "frozen down"],
)  # fmt: skip
def test_resume_is_bit_equal(make, changes):
    half = 4 if changes else 10
    whole = make("whole", steps=2 * half, **changes)
    parts = make("parts", steps=2 * half, **changes)
    losses = fit(whole).losses
    with pytest.raises(Interrupt):
        fit(parts, on_step=break_off_at(half))
    assert checkpoint.newest(parts.output).step == half
    # what the caller did to the global random state in between is of no matter
    torch.manual_seed(123)
    rest = fit(parts.model_copy(update={"resume": True}))
    assert rest.losses == losses[half:]
    assert_same(factors(whole.output), factors(parts.output))
    assert_same(load_file(whole.output / "adapter.safetensors"),
                load_file(parts.output / "adapter.safetensors"))  # fmt: skip


def test_kill_dash_nine_and_resume(make):
    whole, killed = make("whole", steps=8), make("killed", steps=8, checkpoint={"every": 2})
    fit(whole)
    words = [f"--{key}={value}" for key, value in killed.fixed().items() if value is not None]
    words = [w for w in words if "options" not in w]
    words += [f"--output={killed.output}", f"--cache={killed.cache}", "--steps=100000",
              "--checkpoint.every=2"]  # fmt: skip
    log = killed.output.parent / "stderr"
    with open(log, "w") as err:
        child = subprocess.Popen(
            [sys.executable, "-m", "lorakern.cli", "train", *words], stderr=err,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
    while not (killed.output / "checkpoints" / "step-000004").exists():
        assert child.poll() is None, log.read_text()
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    reached = checkpoint.newest(killed.output).step
    assert reached >= 4 and reached % 2 == 0
    steps = max(8, reached + 4)
    if steps > 8:
        fit(make("whole", steps=steps, resume=True))
    fit(killed.model_copy(update={"resume": True, "steps": steps}))
    assert_same(factors(whole.output), factors(killed.output))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_between_steps(make, number):
    chosen = make(steps=50)
    before = signal.getsignal(number)
    result = fit(chosen, on_step=lambda p: p.step == 3 and os.kill(os.getpid(), number))
    assert result.stopped == number and result.step == 3 and len(result.losses) == 3
    assert checkpoint.newest(chosen.output).step == 3
    assert result.paths[0].exists()
    assert signal.getsignal(number) is before


def test_a_run_broken_off_inside_the_update_saves_nothing_half(make, monkeypatch):
    chosen = make(steps=8, checkpoint={"every": 2})

    def half(self, *_):
        raise MemoryError

    def on_step(progress):
        if progress.step == 5:
            # the weights have changed, the step has not
            monkeypatch.setattr(torch.optim.lr_scheduler.LambdaLR, "get_lr", half)

    with pytest.raises(MemoryError):
        fit(chosen, on_step=on_step)
    assert checkpoint.newest(chosen.output).step == 4


def test_loss_that_is_not_finite_never_reaches_the_weights(make, monkeypatch):
    chosen = make(steps=6)
    honest = runs.diffusion.loss

    def poisoned(predicted, *rest, **options):
        calls.append(None)
        loss = honest(predicted, *rest, **options)
        return loss * float("nan") if len(calls) in (3, 4) else loss

    calls = []
    monkeypatch.setattr(runs.diffusion, "loss", poisoned)
    result = fit(chosen)
    assert result.skipped == 2 and result.step == 6
    assert all(t.isfinite().all() for t in factors(chosen.output).values())
    lines = lines_of(chosen.output / "log.jsonl")
    skipped = [line for line in lines if line.get("skipped")]
    assert [line["step"] for line in skipped] == [3, 4]
    assert all(line["loss"] == "nan" and "data" in line["images"][0] for line in skipped)


def test_gradient_that_is_not_finite_never_reaches_the_weights(make, monkeypatch):
    chosen = make(steps=2)
    honest = runs.diffusion.loss

    def steep(predicted, *rest, **options):
        # a finite loss whose gradient is infinite
        return honest(predicted, *rest, **options) + (predicted.sum() * 0).sqrt()

    monkeypatch.setattr(runs.diffusion, "loss", steep)
    result = fit(chosen)
    assert result.skipped == 2 and all(torch.isfinite(torch.tensor(result.losses)))
    for name, factor in factors(chosen.output).items():
        assert name.endswith("down") or not factor.any()


def test_a_run_that_diverges_stops_and_names_images(make, monkeypatch):
    chosen = make(steps=40, checkpoint={"every": 1})
    monkeypatch.setattr(runs.diffusion, "loss", lambda p, *_, **__: p.sum() * float("inf"))
    with pytest.raises(Diverged, match=rf"step {GIVE_UP}, .* never|.png"):
        fit(chosen)
    for factor in factors(chosen.output).values():
        assert factor.isfinite().all()
    assert '"error"' in (chosen.output / "log.jsonl").read_text().splitlines()[-1]


def test_a_broken_checkpoint_is_passed_over(make):
    chosen = make(steps=6, checkpoint={"every": 2, "keep": 3})
    fit(chosen)
    folders = sorted((chosen.output / "checkpoints").iterdir())
    assert [f.name for f in folders] == ["step-000002", "step-000004", "step-000006"]
    state = folders[-1] / "state.pt"
    state.write_bytes(state.read_bytes()[:-100] + bytes(100))
    (folders[-2] / "adapter.safetensors").unlink()
    assert checkpoint.newest(chosen.output).step == 2
    want = factors(make("whole", steps=6).output) if fit(make("whole", steps=6)) else None
    fit(chosen.model_copy(update={"resume": True}))
    assert_same(factors(chosen.output), want)


def test_a_checkpoint_appears_whole_or_not_at_all(make, monkeypatch):
    chosen = make(steps=2, checkpoint={"every": 1})
    renamed = os.rename

    def refuse(source, target):
        raise OSError("disk is gone")

    def on_step(progress):
        monkeypatch.setattr(os, "rename", refuse)

    with pytest.raises(OSError, match="disk is gone"):
        fit(chosen, on_step=on_step)
    monkeypatch.setattr(os, "rename", renamed)
    assert [p.name for p in (chosen.output / "checkpoints").iterdir()] == ["step-000001"]


def test_resume_refuses_another_run_and_a_second_start(make):
    chosen = make()
    fit(chosen)
    with pytest.raises(ValueError, match="holds the checkpoints of a run"):
        fit(chosen)
    with pytest.raises(ValueError, match=r"adapter.rank was 4, is 8; seed was 0, is 1"):
        fit(make(resume=True, seed=1, adapter={"rank": 8}))
    with pytest.raises(ValueError, match="no whole checkpoint"):
        fit(make("other", resume=True))


def test_longer_run_from_a_finished_one(make):
    fit(make("whole", steps=6))
    fit(make("parts", steps=3))
    assert len(fit(make("parts", steps=6, resume=True)).losses) == 3
    assert_same(factors(make("whole").output), factors(make("parts").output))

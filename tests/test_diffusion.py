"""The trainer's formulas against diffusers' own, and its randomness as a function of the step."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from lorakern import diffusion


@pytest.fixture(params=[False, True], ids=["plain", "zero terminal snr"])
def noise_schedule(request):
    return DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=request.param,
    )


@pytest.fixture
def batch(noise_schedule):
    t = torch.tensor([0, 1, 137, 500, 998, 999])
    x0, noise = torch.randn(2, 6, 4, 5, 7)
    return t, x0, noise, noise_schedule.alphas_cumprod[t]


def test_noisy_latent_is_diffusers_add_noise(noise_schedule, batch):
    t, x0, noise, alpha_bar = batch
    want = noise_schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(diffusion.noisy_latent(x0, noise, alpha_bar), want)


def test_velocity_is_diffusers_get_velocity(noise_schedule, batch):
    t, x0, noise, alpha_bar = batch
    want = noise_schedule.get_velocity(x0, noise, t)
    torch.testing.assert_close(diffusion.velocity(x0, noise, alpha_bar), want)
    assert torch.equal(diffusion.target(x0, noise, alpha_bar, predicts="velocity"),
                       diffusion.velocity(x0, noise, alpha_bar))  # fmt: skip
    assert diffusion.target(x0, noise, alpha_bar, predicts="noise") is noise


def test_snr_is_diffusers_compute_snr(noise_schedule, batch):
    t, *_, alpha_bar = batch
    torch.testing.assert_close(diffusion.snr(alpha_bar), compute_snr(noise_schedule, t))


@pytest.mark.parametrize("predicts", ["noise", "velocity"])
def test_min_snr_weight_is_the_papers(noise_schedule, batch, predicts):
    alpha_bar = batch[-1].double()
    snr = alpha_bar / (1 - alpha_bar)
    weight = diffusion.min_snr_weight(alpha_bar, 5.0, predicts=predicts)
    shifted = snr + 1 if predicts == "velocity" else snr
    within = snr > 0
    want = torch.minimum(snr, torch.tensor(5.0)) / shifted
    torch.testing.assert_close(weight[within], want[within])
    # at pure noise: the limit, not 0/0
    assert (weight[~within] == (0 if predicts == "velocity" else 1)).all()


def test_v_loss_is_the_eps_loss_in_other_units():
    """‖v̂ - v‖² = (SNR + 1) ‖ε̂ - ε‖² for the ε̂ that a v̂ stands for, so the weights agree."""
    alpha_bar = torch.tensor([0.9, 0.5, 0.02], dtype=torch.float64)
    x0, noise, wrong = torch.randn(3, 3, 4, 5, 7, dtype=torch.float64)
    x_t = diffusion.noisy_latent(x0, noise, alpha_bar)
    v = diffusion.velocity(x0, noise, alpha_bar)
    a, s = (diffusion.like(p, x0).sqrt() for p in (alpha_bar, 1 - alpha_bar))
    eps_of = lambda v: a * v + s * x_t  # noqa: E731
    torch.testing.assert_close(eps_of(v), noise)
    losses = [
        diffusion.loss(got, want, alpha_bar, predicts=predicts, gamma=5.0)
        for predicts, got, want in (
            ("velocity", v + wrong, v),
            ("noise", eps_of(v + wrong), noise),
        )
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_loss_sums_in_float32():
    wanted = torch.zeros(2, 4, 64, 64)
    predicted = torch.full_like(wanted, 0.01).to(torch.bfloat16)
    got = diffusion.loss(predicted, wanted, torch.full((2,), 0.5), predicts="noise", gamma=None)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, predicted.float().square().mean())


@pytest.mark.parametrize("call", [diffusion.target, None])
def test_unknown_prediction_is_named(call):
    with pytest.raises(ValueError, match="'x0'"):
        if call:
            call(*torch.rand(3, 1, 1, 1, 1), predicts="x0")
        else:
            diffusion.min_snr_weight(torch.rand(1), predicts="x0")


def test_draw_is_a_function_of_seed_and_index():
    shape = torch.Size((64, 4, 3, 5))
    torch.manual_seed(1)
    first = diffusion.draw(7, 3, shape, 1000)
    torch.manual_seed(2)
    for a, b in zip(first, diffusion.draw(7, 3, shape, 1000), strict=True):
        assert torch.equal(a, b)
    for other in (diffusion.draw(8, 3, shape, 1000), diffusion.draw(7, 4, shape, 1000)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    t, noise, chance = first
    assert t.shape == chance.shape == (64,) and noise.shape == (2, *shape)
    assert t.min() >= 0 and t.max() < 1000 and t.unique().numel() > 50
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert chance.min() >= 0 and chance.max() < 1


def test_seeds_of_different_parts_differ():
    assert len({diffusion.seed_of(a, "x", b) for a in range(30) for b in range(30)}) == 900
    assert diffusion.seed_of(1, 23) != diffusion.seed_of(12, 3)

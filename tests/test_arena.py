"""Factors in flat buffers train as they do alone, and stay what they were to everything else."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from training import assert_same, factors, fit, home_fixture, make_fixture, one_thread  # noqa: F401

import lorakern
from bench.usage import aten_calls
from lorakern import FlatAdamW
from lorakern import run as runs
from lorakern.adapters import ALGOS, attach, eject, parameter_groups
from lorakern.arena import ROW, gathers
from lorakern.average import Average


def model_of(algo="lora", **options):
    """Two adapted layers, of sizes that leave gaps between factors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 5))
    for path in ("0", "2"):
        adapter = attach(model, path, algo, rank=3, **options)
        for name in adapter.factors:
            nn.init.normal_(getattr(adapter, name), std=0.5)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def backward(model, seed=0):
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed))
    (model(x) - 1).square().sum().backward()


def steps(model, optimizer, clip, count=5):
    norms = []
    for seed in range(count):
        backward(model, seed)
        norms.append(clip())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def is_flat(optimizer, model):
    """Whether the factors lie in the one buffer, each by itself and as aligned as it."""
    (flat,) = optimizer.flats
    at = sorted((p.data_ptr() - flat.data_ptr(), 4 * p.numel()) for p in trained(model))
    ends = [start + size for start, size in at]
    inside = at[0][0] >= 0 and ends[-1] <= 4 * flat.numel()
    apart = all(end <= start for end, (start, _) in zip(ends, at[1:], strict=False))
    return inside and apart and not any(start % 64 for start, _ in at)


# a LoKr as small as this has no up for another rate
@pytest.mark.parametrize(
    ("algo", "ratio"), [(a, r) for a in ALGOS for r in (None, 4.0) if (a, r) != ("lokr", 4.0)]
)
def test_trains_as_adamw_does(algo, ratio):
    """Also DoRA, whose norm is kept until a factor's version changes."""
    model, alone = model_of(algo), model_of(algo)
    groups = [parameter_groups(m, 1e-2, loraplus_ratio=ratio) for m in (model, alone)]
    flat, own = FlatAdamW(groups[0]), torch.optim.AdamW(groups[1], fused=True)
    assert [g["lr"] for g in flat.param_groups] == [g["lr"] for g in own.param_groups]
    start = copy.deepcopy(trained(model))
    got = steps(model, flat, lambda: flat.clip(1.0))
    want = steps(alone, own, lambda: nn.utils.clip_grad_norm_(trained(alone), 1.0))
    torch.testing.assert_close(got, want)
    for mine, theirs, was in zip(trained(model), trained(alone), start, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert not torch.equal(mine, was)


def test_attached_gradients_have_one_place_and_are_added_to():
    model, alone = model_of(), model_of()
    optimizer = FlatAdamW(parameter_groups(model, 1e-2))
    places = set()
    for gone in ([], [0], [0, 1, 2, 3]):
        for m in (model, alone):
            m.zero_grad()
            backward(m)
            for i in gone:
                trained(m)[i].grad = None
        optimizer.attach()
        places.add(tuple(p.grad.data_ptr() for p in trained(model)))
        for i, (mine, theirs) in enumerate(zip(trained(model), trained(alone), strict=True)):
            assert torch.equal(mine.grad, torch.zeros_like(mine) if i in gone else theirs.grad)
        for m in (model, alone):
            backward(m, 1)
        assert places == {tuple(p.grad.data_ptr() for p in trained(model))}
        assert_same(*({n: p.grad for n, p in m.named_parameters() if p.requires_grad}
                      for m in (model, alone)))  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in trained(model))
        model.load_state_dict(alone.state_dict())


def test_gradients_are_views_and_a_user_s_own_clip_is_seen():
    model, alone = model_of(), model_of()
    flat, own = FlatAdamW(trained(model)), torch.optim.AdamW(trained(alone), fused=True)
    assert is_flat(flat, model)
    got = steps(model, flat, lambda: nn.utils.clip_grad_norm_(trained(model), 0.1))
    want = steps(alone, own, lambda: nn.utils.clip_grad_norm_(trained(alone), 0.1))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(trained(model), trained(alone))
    # a second backward adds to gradients that were gathered, and they stay where they are
    for m in (model, alone):
        backward(m)
    flat.gather()
    grads = [p.grad for p in trained(model)]
    for m in (model, alone):
        backward(m, 1)
    (buffer,) = flat.flats
    total = nn.utils.get_total_norm([p.grad for p in trained(alone)])
    torch.testing.assert_close(buffer.grad.norm(), total)
    assert all(p.grad is g for p, g in zip(trained(model), grads, strict=True))
    assert all(g._base is buffer.grad for g in grads)
    flat.zero_grad()
    assert buffer.grad is None and all(p.grad is None for p in trained(model))


def test_a_step_is_few_calls():
    model, alone = (nn.Sequential(*(nn.Linear(8, 8) for _ in range(40))) for _ in range(2))
    flat, own = FlatAdamW(model.parameters()), torch.optim.AdamW(alone.parameters(), fused=True)

    def step(module, optimizer, clip):
        for p in module.parameters():
            p.grad = None
        module(torch.ones(1, 8)).sum().backward()
        return aten_calls(lambda: (clip(1.0), optimizer.step(), optimizer.zero_grad()))

    few = step(model, flat, flat.clip)
    many = step(alone, own, lambda n: nn.utils.clip_grad_norm_(alone.parameters(), n))
    assert few < 30 < many


def test_a_norm_over_millions_is_exact():
    # one float32 sum over all of them is 2e-4 off
    big = nn.Parameter(torch.zeros(12_000_000))
    optimizer = FlatAdamW([big], fused=True)
    big.grad = torch.rand(big.shape, generator=torch.Generator().manual_seed(0))
    exact = big.grad.double().norm().item()
    assert optimizer.clip(math.inf).item() == pytest.approx(exact, rel=1e-6)


def test_gaps_stay_zero_after_a_gradient_that_is_not_finite():
    model = model_of()
    optimizer = FlatAdamW(trained(model))
    (flat,) = optimizer.flats
    assert flat.numel() % ROW == 0 and flat.numel() > sum(p.numel() for p in trained(model))
    backward(model)
    trained(model)[0].grad[0, 0] = math.nan
    assert optimizer.clip(1.0).isnan()
    optimizer.zero_grad()
    backward(model)
    assert optimizer.clip(1.0).isfinite()


def test_a_factor_without_gradient():
    model = model_of()
    optimizer = FlatAdamW(trained(model), lr=1e-2, weight_decay=0.5)
    before = copy.deepcopy(trained(model))
    optimizer.step()
    assert optimizer.clip(1.0) == 0
    torch.testing.assert_close(trained(model), before, rtol=0, atol=0)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    # not the gradient of the step before
    backward(model)
    first, *rest = trained(model)
    first.grad = None
    want = nn.utils.get_total_norm([p.grad for p in rest])
    torch.testing.assert_close(optimizer.clip(math.inf), want)


# each with its own passes: the extension's, and torch's with and without fused
WAYS = {
    "kernels": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "bfloat16": (torch.bfloat16, {}),
    "amsgrad": (torch.float32, {"amsgrad": True}),
    "not fused": (torch.float32, {"fused": False}),
}


@pytest.mark.parametrize("dtype, options", WAYS.values(), ids=WAYS)
def test_every_way_clips_averages_and_leaves_out_what_is_not_finite(dtype, options):
    mine, theirs = (
        [nn.Parameter(torch.arange(1, n + 1, dtype=dtype) / n) for n in (5, 40)] for _ in range(2)
    )
    flat = FlatAdamW(mine, lr=1e-2, zero=True, **options)
    own = torch.optim.AdamW(theirs, lr=1e-2, **{"fused": True, **options})
    flat.average = Average(mine, flat.flats, 0.4)
    values = [p.detach().double().clone() for p in theirs]

    def step(optimizer, params, clip, first=1.0):
        grads = [torch.sin(torch.arange(p.numel()) + count).to(dtype) for p in params]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        params[0].grad[0] *= first
        clip()
        optimizer.step()

    for count in range(1, 6):
        step(flat, mine, lambda: (flat.clip(2.0), flat.clip(0.3), flat.clip(5.0)))
        step(own, theirs, lambda: nn.utils.clip_grad_norm_(theirs, 0.3))
        assert flat.skipped == 0 and not any(p.grad.any() for p in mine)
        keep = min(0.4, (1 + count) / (10 + count))
        values = [keep * a + (1 - keep) * p.double() for a, p in zip(values, theirs, strict=True)]
        before = copy.deepcopy(mine)
        step(flat, mine, lambda: flat.clip(0.3), first=math.nan)
        assert flat.skipped == 1 and not any(p.grad.any() for p in mine)
        torch.testing.assert_close(mine, before, rtol=0, atol=0)
    torch.testing.assert_close(mine, theirs)
    (state,) = flat.state.values()
    assert state["step"] == 5
    with flat.average.shown():
        torch.testing.assert_close([p.detach() for p in mine], [v.to(dtype) for v in values])


def test_gradients_of_any_layout_are_read_where_they_lie():
    model, alone = model_of(), model_of()
    flat, own = FlatAdamW(trained(model), lr=1e-2, zero=True), torch.optim.AdamW(trained(alone))
    own.param_groups[0]["lr"] = 1e-2
    for m in (model, alone):
        backward(m)
        for p in trained(m):
            p.grad = p.grad.mT.contiguous().mT
    kept = [p.grad for p in trained(model)]
    assert not kept[0].is_contiguous()
    flat.step()
    own.step()
    torch.testing.assert_close(trained(model), trained(alone))
    if not gathers(torch.device("cpu")):
        assert all(p.grad is grad for p, grad in zip(trained(model), kept, strict=True))
    assert not any(p.grad.any() for p in trained(model))


def test_states_are_torch_s_and_go_on_in_either():
    whole, parts = model_of(), model_of()
    first, second = FlatAdamW(trained(whole), lr=1e-2), FlatAdamW(trained(parts), lr=1e-2)
    steps(whole, first, lambda: first.clip(1.0), 2)
    steps(parts, second, lambda: second.clip(1.0), 2)
    state = second.state_dict()
    assert state["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    # torch's own passes go on from what the kernels left, and these from that
    other = FlatAdamW(trained(parts), lr=1e-2, fused=False)
    other.load_state_dict(state | {"param_groups": other.state_dict()["param_groups"]})
    steps(parts, other, lambda: other.clip(1.0), 2)
    third = FlatAdamW(trained(parts), lr=1e-2)
    third.load_state_dict(other.state_dict() | {"param_groups": state["param_groups"]})
    for optimizer, model in ((first, whole), (first, whole), (third, parts)):
        steps(model, optimizer, lambda o=optimizer: o.clip(1.0), 2)
    torch.testing.assert_close(trained(whole), trained(parts))


def test_a_grad_scaler_s_step_that_overflows_is_left_out():
    model = model_of()
    optimizer, scaler = FlatAdamW(trained(model)), torch.amp.GradScaler("cpu")
    optimizer.average = Average(trained(model), optimizer.flats, 0.5)
    before, scale = copy.deepcopy(trained(model)), scaler.scale(torch.ones(())).item()
    for bad in (True, False):
        backward(model)
        for p in trained(model):
            p.grad.mul_(math.inf if bad else scale)
        optimizer.gather()
        scaler.step(optimizer)
        assert optimizer.skipped == bad
        unmoved = [torch.equal(p, b) for p, b in zip(trained(model), before, strict=True)]
        assert all(unmoved) if bad else not any(unmoved)
        optimizer.zero_grad()
        scaler.update(scale)


def test_copies_state_dicts_and_eject_see_plain_factors():
    model = model_of()
    plain = copy.deepcopy(model.state_dict())
    optimizer = FlatAdamW(trained(model))
    assert_same(model.state_dict(), plain)
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    backward(model)
    optimizer.step()
    assert_same(copied.state_dict(), plain)
    assert_same(torch.load(file), plain)
    for p in trained(copied):
        assert p.untyped_storage().nbytes() == 4 * p.numel()
    # in place: into the buffer
    model.load_state_dict(plain)
    assert_same(model.state_dict(), plain)
    assert is_flat(optimizer, model)
    eject(model)
    assert type(model[0]) is nn.Linear


def test_a_module_may_go_away_and_come_back():
    model, alone = model_of(), model_of()
    flat, own = FlatAdamW(trained(model), lr=1e-2), torch.optim.AdamW(trained(alone), lr=1e-2)
    steps(model, flat, flat.gather, 2)
    steps(alone, own, lambda: None, 2)
    for m in (model, alone):
        m.double().float()
        with torch.no_grad():
            trained(m)[0].mul_(2)
    assert not is_flat(flat, model)
    steps(model, flat, flat.gather, 2)
    steps(alone, own, lambda: None, 2)
    assert is_flat(flat, model)
    torch.testing.assert_close(trained(model), trained(alone))
    model.double()
    model(torch.zeros(1, 9, dtype=torch.float64)).sum().backward()
    with pytest.raises(ValueError, match=r"in torch\.float32 on cpu, and is in torch\.float64"):
        flat.step()


def test_refusals():
    one, two = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        FlatAdamW([two])
    with pytest.raises(ValueError, match="more than once"):
        FlatAdamW([{"params": [one]}, {"params": one}])
    with pytest.raises(ValueError, match="without names"):
        FlatAdamW(nn.Linear(2, 2).named_parameters())
    optimizer = FlatAdamW([one, two])
    with pytest.raises(ValueError, match="no closure"):
        optimizer.step(lambda: None)
    optimizer.step(closure=None)
    one.requires_grad_(False)
    with pytest.raises(ValueError, match=r"shape \(3,\) was frozen"):
        optimizer.step()


def test_average_is_the_formula():
    model = model_of()
    optimizer = FlatAdamW(trained(model), lr=0.1)
    average = Average(trained(model), optimizer.flats, 0.5)
    want = [p.detach().double() for p in trained(model)]
    for step in range(1, 9):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        average.update(step)
        keep = min(0.5, (1 + step) / (10 + step))
        want = [keep * a + (1 - keep) * p for a, p in zip(want, trained(model), strict=True)]
    own = copy.deepcopy(trained(model))
    with average.shown():
        for p, a in zip(trained(model), want, strict=True):
            torch.testing.assert_close(p.double(), a)
    torch.testing.assert_close(trained(model), own, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["adamw", "torch.optim:NAdam"])
def test_a_run_exports_and_resumes_its_average(make, name):
    chosen = {"average": 0.5, "lr": 1e-2, "name": name}
    whole, parts = make("whole", optimizer=chosen), make("parts", optimizer=chosen, steps=2)
    plain = make("plain", optimizer=chosen | {"average": 0})
    assert fit(whole).losses == fit(plain).losses
    fit(parts)
    fit(make("parts", optimizer=chosen, resume=True))
    assert_same(factors(whole.output), factors(parts.output))
    assert_same(factors(whole.output), factors(plain.output))
    exported = [lorakern.formats.storage.read(c.output / "adapter.safetensors")[0].tensors
                for c in (whole, parts, plain)]  # fmt: skip
    assert_same(exported[0], exported[1])
    assert any(not torch.equal(t, exported[2][key]) for key, t in exported[0].items())


def test_who_trains_flat(make):
    def optimizer(**changes):
        return runs.prepare(make(**changes), bar=False).optimizer

    assert type(optimizer()) is FlatAdamW
    assert type(optimizer(optimizer={"name": "torch.optim:AdamW"})) is torch.optim.AdamW
    skipping = {"algo": "lokr", "rank": 2, "options": {"module_dropout": 0.3}}
    assert type(optimizer(adapter=skipping)) is torch.optim.AdamW
    rates = {"lr": 1e-3, "text_encoder_lr": 1e-4, "loraplus_ratio": 2}
    both = optimizer(adapter={"rank": 2, "text_encoder": True}, optimizer=rates)
    assert [g["lr"] for g in both.param_groups] == [1e-3, 2e-3, 1e-4, 2e-4]

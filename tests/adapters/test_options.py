"""What the options of adapters promise: dropout, DoRA's norm, LoRA-FA, LoRA+, shapes, refusals."""

import copy
import math

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorakern.adapters import (
    attach,
    eject,
    inject,
    layers,
    limit_norms,
    merge,
    parameter_groups,
    unmerge,
)
from lorakern.testing import lost_share


def adapted(layer, algo="lora", **options):
    model = nn.Sequential(layer)
    adapter = attach(model, "0", algo, **{"rank": 4, "alpha": 3, **options})
    with torch.no_grad():
        for name in adapter.factors:
            nn.init.normal_(getattr(adapter, name), std=0.4)
    return model, adapter


def conv():
    return nn.Conv2d(8, 12, 3, padding=1)


# dropout


@pytest.mark.parametrize("algo", ["lora", "dora", "loha", "lokr"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear(8, 12), conv()], ids=["linear", "conv"])
def test_rank_dropout_drops_rows_of_the_update(algo, scaled, layer):
    options = {"dropout_mode": "lycoris"} if algo in ("lora", "dora") else {}
    model, adapter = adapted(
        copy.deepcopy(layer), algo, rank_dropout=0.4, rank_dropout_scale=scaled, **options
    )
    x = torch.randn(3, 8) if adapter.kind == "linear" else torch.randn(2, 8, 5, 4)
    x.requires_grad_()
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    keep = (torch.rand(12) >= 0.4).float()
    assert 0 < keep.sum() < 12
    keep = (keep / keep.mean() if scaled else keep).view(-1, *[1] * (layer.weight.dim() - 1))
    f = {n: getattr(adapter, n) for n in adapter.factors}
    delta = adapter.delta(f, adapter.scale).view_as(layer.weight) * keep
    if algo == "dora":
        delta = adapter.dora.update(layer.weight.detach(), delta, adapter.magnitude, 1.0)
    want = layers.run(layer, x, layer.weight.detach() + delta, layer.bias.detach())
    torch.testing.assert_close(y, want)
    wanted, dy = [x, *f.values()], torch.randn_like(y)
    grads = torch.autograd.grad(y, wanted, dy), torch.autograd.grad(want, wanted, dy)
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("mode", ["kohya", "bypass"])
@pytest.mark.parametrize("kind", ["linear", "grouped"])
def test_rank_dropout_drops_ranks_of_h(mode, kind):
    """kohya: anew for each sample, over what is kept; bypass: one for all, as it is."""
    linear = kind == "linear"
    layer = nn.Linear(8, 12, bias=False) if linear else nn.Conv2d(8, 12, 3, groups=2, bias=False)
    model, adapter = adapted(layer, rank_dropout=0.5, dropout_mode=mode)
    x = torch.randn(1, 7, 8) if linear else torch.randn(1, 8, 5, 4)
    x = x.expand(200, *x.shape[1:]).contiguous()
    update = (model(x) - layers.run(adapter.root, x, adapter.weight, None)).detach()
    parts = []
    for r in range(4):
        alone = copy.deepcopy(adapter).eval()
        alone.down.data[torch.arange(4) != r] = 0
        parts.append((alone(x[:1]) - layers.run(alone.root, x[:1], alone.weight, None)).detach())
    # which ranks are in each sample's update: the solution of a small system
    basis = torch.stack([p.flatten() for p in parts], 1)
    found = torch.linalg.lstsq(basis, update.flatten(1).mT).solution.mT
    one = 2.0 if mode == "kohya" else 1.0
    assert torch.all((found.abs() < 1e-3) | ((found - one).abs() < 1e-3))
    assert (len(found.round().unique(dim=0)) > 1) == (mode == "kohya")
    if mode == "kohya":
        assert abs((found > 0.5).float().mean() - 0.5) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bypass_drops_the_output_of_the_update(dtype):
    model, adapter = adapted(nn.Linear(8, 500).to(dtype), dropout=0.25, dropout_mode="bypass")
    x = torch.randn(40, 8, dtype=dtype)
    base = layers.run(adapter.root, x, adapter.weight, adapter.bias).float()
    update, whole = (model(x).float() - base).detach(), F.linear(x.float(), adapter.delta_weight())
    kept = update.abs() > 1e-2 * whole.abs()
    assert abs(kept.float().mean() - 0.75) < 0.02
    if dtype == torch.float32:
        torch.testing.assert_close(update[kept], whole[kept] / 0.75, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("algo", ["loha", "lokr"])
@pytest.mark.parametrize("layer", [nn.Linear(8, 500), conv()], ids=["linear", "conv"])
def test_dropout_of_an_output_is_a_mask_on_it(algo, layer):
    model, adapter = adapted(copy.deepcopy(layer), algo, dropout=0.25)
    x = torch.randn(40, 8) if adapter.kind == "linear" else torch.randn(3, 8, 9, 7)
    x.requires_grad_()
    y = model(x)
    base, whole = layer(x), layers.run(layer, x, adapter.delta_weight(), None)
    mask = ((y - base) / whole).detach().div(1 / 0.75).round()
    assert set(mask.unique().tolist()) == {0.0, 1.0} and abs(mask.mean() - 0.75) < 0.03
    want = base + mask / 0.75 * whole
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    wanted, dy = [x, *(getattr(adapter, n) for n in adapter.factors)], torch.randn_like(y)
    grads = torch.autograd.grad(y, wanted, dy), torch.autograd.grad(want, wanted, dy)
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.eval()(x), base + whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algo", ["loha", "lokr"])
def test_dropout_of_an_output_loses_no_small_update_in_16_bit(algo):
    model, adapter = adapted(nn.Linear(64, 256).bfloat16(), algo, dropout=0.1)
    delta = adapter.delta_weight()
    adapter.multiplier = 1e-3 * (adapter.weight.float().norm() / delta.norm()).item()
    x = torch.randn(4096, 64, dtype=torch.bfloat16)
    exact = x.double() @ adapter.delta_weight().double().mT
    base = F.linear(x.double(), adapter.weight.double(), adapter.bias.double())
    assert abs(lost_share(lambda: model(x), exact, base)) < 0.02


@pytest.mark.parametrize("algo", ["lora", "lokr"])
def test_module_dropout_goes_without_the_adapter(algo):
    layer = nn.Linear(8, 12)
    model, _ = adapted(copy.deepcopy(layer), algo, module_dropout=0.5)
    x = torch.randn(3, 8)
    plain, whole = layer(x), model.eval()(x)
    model.train()
    seen = [model(x) for _ in range(60)]
    assert all(torch.equal(y, plain) or torch.equal(y, whole) for y in seen)
    assert 15 < sum(torch.equal(y, plain) for y in seen) < 45


def test_dora_with_dropout_is_pefts():
    layer = nn.Linear(8, 12)
    model, adapter = adapted(copy.deepcopy(layer), "dora", dropout=0.5)
    config = peft.LoraConfig(r=4, lora_alpha=3, use_dora=True, target_modules=["0"])
    twin = peft.inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(layer)))
    for name, there in (
        ("down", "lora_A"),
        ("up", "lora_B"),
        ("magnitude", "lora_magnitude_vector"),
    ):
        getattr(twin[0], there)["default"].weight.data = getattr(adapter, name).data.clone()
    # one mask for both, in the place of theirs
    mask = (torch.rand(5, 8) < 0.5) * 2.0

    class Masked(nn.Module):
        def forward(self, x):
            return x * mask

    twin[0].lora_dropout["default"] = Masked()
    x = torch.randn(5, 8)
    delta = F.linear(x * mask, adapter.delta_weight())
    torch.testing.assert_close(twin.train()(x), layer(x) + delta, rtol=1e-4, atol=1e-5)
    model(x).sum().backward()
    draws = torch.stack([model(x).detach() for _ in range(800)])
    off = (draws.mean(0) - model.eval()(x)).abs()
    assert (off < 5 * draws.std(0) / 800**0.5 + 1e-4).all()


# DoRA's norm


def test_the_norm_is_kept_until_something_changes(monkeypatch):
    counts = {"terms": 0}
    model, adapter = adapted(nn.Linear(8, 12), "dora")
    real = type(adapter).row_terms

    def counted(self, w, f):
        counts["terms"] += 1
        return real(self, w, f)

    monkeypatch.setattr(type(adapter), "row_terms", counted)
    x = torch.randn(3, 8)
    for _ in range(3):
        model(x).sum().backward()
    assert counts["terms"] == 1
    changes = [
        lambda: torch.optim.SGD([adapter.up], lr=0.1).step(),
        lambda: setattr(adapter, "multiplier", 0.5),
        lambda: adapter.load_state_dict(copy.deepcopy(adapter.state_dict())),
        lambda: setattr(adapter, "weight", nn.Parameter(torch.randn(12, 8), requires_grad=False)),
        lambda: setattr(adapter, "up", nn.Parameter(torch.randn(12, 4))),
        lambda: model.double(),
        lambda: (merge(model), unmerge(model)),
    ]
    for i, change in enumerate(changes):
        change()
        x = x.to(adapter.weight.dtype)
        y = model(x)
        assert counts["terms"] == i + 2, i
        want = layers.run(adapter.root, x, adapter.weight + adapter.delta_weight(), adapter.bias)
        torch.testing.assert_close(y, want)
    twin = copy.deepcopy(adapter)
    assert twin.dora._norm._entry is None and adapter.dora._norm._entry is not None


def test_the_weight_of_the_norm_is_read_once(monkeypatch):
    model, adapter = adapted(nn.Linear(8, 12).bfloat16(), "dora")
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    model(x)
    kept = adapter.dora._squares._entry[2]
    with torch.no_grad():
        adapter.up.mul_(2)
    model(x)
    assert adapter.dora._squares._entry[2] is kept and kept.dtype == torch.float32
    with torch.inference_mode():
        assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("layer", [nn.Linear(24, 40), nn.Conv2d(24, 40, 1), conv()], ids=str)
def test_the_row_norm_is_that_of_the_whole_weight(algo, layer):
    _, adapter = adapted(layer.double(), algo, rank=2, dora=True)
    f = {n: getattr(adapter, n) for n in adapter.factors}
    v = adapter.weight + adapter.delta(f, adapter.scale).view_as(adapter.weight)
    want = adapter.magnitude / v.flatten(1).norm(dim=1)
    torch.testing.assert_close(adapter.gain(), want)


def test_a_row_of_zeros_trains():
    layer = nn.Linear(8, 12)
    nn.init.zeros_(layer.weight)
    model = nn.Sequential(layer)
    adapter = attach(model, "0", "dora", rank=4)
    x = torch.randn(3, 8)
    assert torch.equal(model(x), layer(x))
    model(x).sum().backward()
    assert all(getattr(adapter, n).grad.isfinite().all() for n in adapter.factors)


def test_a_small_change_of_magnitude_reaches_a_16_bit_output():
    model, adapter = adapted(nn.Linear(64, 2048, bias=False).bfloat16(), "dora")
    nn.init.zeros_(adapter.up)
    adapter.magnitude.data = adapter.dora.norm(adapter.weight.float()) * (1 + 1e-4)
    x = torch.randn(512, 64, dtype=torch.bfloat16)
    exact = x.double() @ adapter.weight.double().mT
    felt = ((model(x).double() - exact) * exact).sum() / exact.square().sum()
    assert felt.item() == pytest.approx(1e-4, rel=0.1)


# starts, LoRA-FA, LoRA+


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_leaves_the_weight_alone(init):
    layer = nn.Linear(8, 12).bfloat16()
    saved = layer.weight.clone()
    model = nn.Sequential(layer)
    adapter = attach(model, "0", rank=4, alpha=8, init=init)
    assert torch.equal(layer.weight, saved) and adapter.up.abs().max() > 0.01
    assert adapter.delta_weight().abs().max() < 1e-6
    with torch.no_grad():
        adapter.up.add_(0.1)
    assert not torch.equal(model(torch.ones(1, 8).bfloat16()), layer(torch.ones(1, 8).bfloat16()))
    other = nn.Sequential(copy.deepcopy(layer))
    attach(other, "0", rank=4, alpha=8, init=init)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[0].delta_weight(), adapter.delta_weight())
    merge(model)
    eject(model)
    assert model[0] is layer and torch.equal(layer.weight, saved)


def test_a_frozen_down_stays_and_up_has_its_gradient():
    layer = nn.Linear(300, 500)
    model = nn.Sequential(layer)
    adapter = attach(model, "0", rank=100, freeze_down=True)
    assert adapter.down.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.05)
    x = torch.randn(4, 300)
    model(x).sum().backward()
    assert adapter.down.grad is None and adapter.up.grad is not None


def test_loraplus_groups():
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 12))
    inject(model, rank=2, targets=["0"])
    inject(model, "loha", rank=2, targets=["1"], name="two", dora=True)
    slow, fast = parameter_groups(model, 1e-3, loraplus_ratio=16.0)
    assert slow["lr"] == 1e-3 and fast["lr"] == 1.6e-2
    names = {id(p): n.split(".")[-1] for n, p in model.named_parameters()}
    assert {names[id(p)] for p in fast["params"]} == {"up", "up1", "up2"}
    assert {names[id(p)] for p in slow["params"]} == {"down", "down1", "down2", "magnitude"}
    (whole,) = parameter_groups(model, 1e-3)
    assert len(whole["params"]) == len(slow["params"]) + len(fast["params"])
    with pytest.raises(ValueError, match="above 0, got 0"):
        parameter_groups(model, 1e-3, loraplus_ratio=0)
    plain = nn.Sequential(nn.Linear(8, 12))
    inject(plain, "lokr", rank=9, targets=["0"])
    with pytest.raises(ValueError, match="no factor here is an up"):
        parameter_groups(plain, 1e-3, loraplus_ratio=2)


@pytest.mark.parametrize(
    ("algo", "options"),
    [
        ("lora", {}),
        ("lora", {"use_scalar": True}),
        ("loha", {}),
        ("lokr", {"rank": 1}),
        ("dora", {}),
    ],
)
def test_norms_are_limited(algo, options):
    model, adapter = adapted(nn.Linear(8, 12), algo, **options)
    adapter.multiplier = 3.0
    before, norm = adapter.delta_weight(), adapter.norm().item()
    assert limit_norms(model, norm * 1.01) == 0
    assert torch.equal(adapter.delta_weight(), before)
    assert limit_norms(model, norm / 2) == 1
    assert adapter.norm().item() == pytest.approx(norm / 2, rel=1e-5)
    if algo != "dora":
        torch.testing.assert_close(adapter.delta_weight(), before / 2)
    with pytest.raises(ValueError, match="above 0, got -1"):
        limit_norms(model, -1)


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
def test_exported_has_the_scalar_inside(algo):
    _, adapter = adapted(nn.Linear(8, 12), algo, use_scalar=True, dora=True)
    f, rank, alpha = adapter.exported()
    assert "scalar" not in f and (rank, alpha) == (4, 3)
    _, other = adapted(copy.deepcopy(adapter.root), algo, dora=True)
    assert list(f) == list(other.factors)
    with torch.no_grad():
        for name, value in f.items():
            getattr(other, name).copy_(value)
    torch.testing.assert_close(other.delta_weight(), adapter.delta_weight())


MISTAKES = [
    ("lokr", {"factor": 0}, "factor must be -1 or at least 1, got 0"),
    ("lokr", {"factor": -3}, "factor must be -1 or at least 1, got -3"),
    ("lokr", {"style": "kohya"}, "style is lycoris or peft, got 'kohya'"),
    ("lokr", {"init": "pissa"}, "lokr has no option init; it has factor"),
    ("lokr", {"dropout": 1.5}, "dropout is a probability from 0 to below 1, got 1.5"),
    ("loha", {"dropout": 0.1, "dora": True}, "dora goes without dropout"),
    ("loha", {"style": "kohya"}, "style is lycoris or peft, got 'kohya'"),
    ("loha", {"rank": 0}, "rank must be a whole number of at least 1, got 0"),
    ("loha", {"rank_dropout": 1.0}, "rank_dropout is a probability"),
    ("lora", {"module_dropout": -0.1}, "module_dropout is a probability"),
    ("lora", {"init": "svd"}, "init is default or pissa or olora, got 'svd'"),
    ("lora", {"init": "pissa", "rank": 9}, "needs a rank of at most 8, got 9"),
    ("lora", {"init": "pissa", "dropout": 0.1}, "goes without dropout"),
    ("lora", {"init": "pissa", "freeze_down": True}, "freeze_down goes without"),
    ("lora", {"rank_dropout": 0.1}, "PEFT's LoRA has no rank_dropout"),
    ("lora", {"dropout": 0.1, "dropout_mode": "lycoris"}, "without bypass_mode"),
    ("dora", {"dropout": 0.1, "dropout_mode": "kohya"}, "dora and tucker go with dropout_mode"),
    ("dora", {"norm_eps": -1.0}, "norm_eps must not be below 0, got -1"),
]


@pytest.mark.filterwarnings("ignore:rank 9")
@pytest.mark.parametrize(("algo", "options", "message"), MISTAKES, ids=str)
def test_mistakes_are_named(algo, options, message):
    model = nn.Sequential(nn.Linear(8, 12))
    with pytest.raises(ValueError, match=message):
        attach(model, "0", algo, **{"rank": 4, **options})
    assert type(model[0]) is nn.Linear


def test_an_embedding_takes_a_lora_alone():
    for algo, options in (("dora", {}), ("loha", {}), ("lokr", {}), ("lora", {"dora": True})):
        with pytest.raises(ValueError, match=r"not embedding|dora is for linear, conv2d"):
            attach(nn.Sequential(nn.Embedding(9, 6)), "0", algo, rank=2, **options)


def test_different_kinds_share_one_sum():
    layer = nn.Linear(64, 512).bfloat16()
    model = nn.Sequential(copy.deepcopy(layer))
    stack = [attach(model, "0", a, rank=2, name=a) for a in ("lora", "loha", "lokr", "dora")]
    with torch.no_grad():
        for adapter in stack:
            for name in adapter.factors:
                if name != "magnitude":
                    nn.init.normal_(getattr(adapter, name), std=0.03)
    x = torch.randn(50, 64, dtype=torch.bfloat16)
    update = sum(a.delta_weight().double() for a in stack)
    exact = F.linear(x.double(), layer.weight.double() + update, layer.bias.double())
    y = model(x)
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()
    y.sum().backward()
    assert all(getattr(a, n).grad is not None for a in stack for n in a.factors)

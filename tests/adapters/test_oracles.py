"""LoHa, LoKr, DoRA and Tucker against LyCORIS's and PEFT's forward and gradients, in float32."""

import copy

import peft
import pytest
import torch
from lycoris.functional import factorization
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft.tuners.lokr.layer import factorization as peft_factorization
from torch import nn

from lorakern.adapters import attach
from lorakern.adapters.lokr_shapes import split

LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (3, 5, 24)),
    "conv": (lambda: nn.Conv2d(24, 40, 3, stride=2, padding=1), (2, 24, 7, 6)),
    "grouped": (lambda: nn.Conv2d(48, 40, 3, padding=1, groups=2), (2, 48, 5, 6)),
    "pointwise": (lambda: nn.Conv2d(24, 40, 1), (2, 24, 5, 3)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
# factor here: name in LyCORIS; a Tucker's ups are stored the other way round there
NAMES = {
    "lora": {"core": "lora_mid.weight", "down": "lora_down.weight", "up": "lora_up.weight"},
    "loha": {
        "core1": "hada_t1", "down1": "hada_w1_b", "up1": "hada_w1_a",
        "core2": "hada_t2", "down2": "hada_w2_b", "up2": "hada_w2_a",
    },
    "lokr": {
        "c": "lokr_w1", "c_up": "lokr_w1_a", "c_down": "lokr_w1_b",
        "d": "lokr_w2", "d_up": "lokr_w2_a", "d_down": "lokr_w2_b", "d_core": "lokr_t2",
    },
}  # fmt: skip
LYCORIS = {"lora": LoConModule, "loha": LohaModule, "lokr": LokrModule}
LIKE_LYCORIS = {"detach_norm": False, "norm_eps": torch.finfo(torch.float32).eps}


def ours(kind, algo, **options):
    """A trained adapter on a new layer, the layer alone, and an input."""
    make, shape = LAYERS[kind]
    layer = make()
    adapter = attach(nn.Sequential(copy.deepcopy(layer)), "0", algo, alpha=1.5, **options)
    with torch.no_grad():
        for name in adapter.factors:
            factor = getattr(adapter, name)
            if name == "magnitude":
                factor.mul_(1 + 0.1 * torch.randn_like(factor))
            else:
                nn.init.normal_(factor, std=0.4)
    return adapter, layer, torch.randn(shape, requires_grad=True)


def check(adapter, theirs, x, pairs):
    """The same output, gradient of x, and gradients of the factors, within 1e-5 of the largest.

    pairs: (factor here, parameter there, how the latter's shape is reached).
    """
    mine, other = adapter(x), theirs(x)
    dy = torch.randn_like(mine)
    got = torch.autograd.grad(mine, [x, *(a for a, _, _ in pairs)], dy)
    want = torch.autograd.grad(other, [x, *(b for _, b, _ in pairs)], dy)
    turned = [want[0], *(turn(g) for g, (_, _, turn) in zip(want[1:], pairs, strict=True))]
    for a, b in zip((mine, *got), (other, *turned), strict=True):
        assert (a - b.view_as(a)).abs().max() <= 1e-5 * b.abs().max()


def lycoris_twin(adapter, layer, *, bypass=False, multiplier=1.0, **options):
    """LyCORIS's module around the layer with the adapter's factors, and what to compare."""
    algo = "lora" if adapter.algo == "dora" else adapter.algo
    module = LYCORIS[algo](
        "x", layer, multiplier, adapter.rank, adapter.alpha, bypass_mode=bypass, **options
    )
    module.apply_to()
    pairs = []
    for name in adapter.factors:
        mine, turn = getattr(adapter, name), lambda t: t
        if name in ("magnitude", "scalar"):
            theirs = module.dora_scale if name == "magnitude" else module.scalar
        else:
            theirs = module.get_parameter(NAMES[algo][name])
            cored = any("core" in n for n in adapter.factors)
            if cored and name in ("up1", "up2", "d_up"):
                turn = torch.t
        theirs.data = turn(mine.detach()).reshape(theirs.shape).clone()
        # of 4.1.3: not a leaf, so that no optimizer would train it
        theirs.requires_grad_()
        pairs.append((mine, theirs, turn))
    return pairs


VARIANTS = {
    "lora": [({}, {})],
    "loha": [({}, {})],
    "lokr": [
        ({"rank": 2}, {}),
        ({"rank": 2, "decompose_both": True}, {"decompose_both": True}),
        ({"rank": 2, "full_matrix": True}, {"full_matrix": True}),
        ({"rank": 2, "unbalanced_factorization": True}, {"unbalanced_factorization": True}),
        ({"rank": 2, "factor": 8}, {"factor": 8}),
        ({"rank": 2, "factor": 6}, {"factor": 6}),
        ({"rank": 30}, {}),
    ],
}
EXTRA = [
    ({}, {}),
    ({"tucker": True}, {"use_tucker": True}),
    ({"use_scalar": True}, {"use_scalar": True}),
    ({"rslora": True}, {"rs_lora": True}),
    ({"dora": True, **LIKE_LYCORIS}, {"weight_decompose": True}),
    ({"dora": True, "wd_on_output": False, **LIKE_LYCORIS},
     {"weight_decompose": True, "wd_on_out": False}),
]  # fmt: skip
CASES = [
    pytest.param(algo, a | {"rank": a.get("rank", 4)} | b, x | y, id=f"{algo}-{a}-{b}")
    for algo, variants in VARIANTS.items()
    for a, x in variants
    for b, y in EXTRA
    # (not rslora with C and D whole: LyCORIS trains at √rank, and every loader of its file at 1)
    if not b or (set(a) <= {"rank"} and a.get("rank") != 30)
]


@every_layer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("algo", "options", "theirs"), CASES)
def test_lycoris_computes_the_same(algo, options, theirs, kind):
    adapter, layer, x = ours(kind, algo, **options)
    pairs = lycoris_twin(adapter, layer, **theirs)
    check(adapter, layer, x, pairs)


# bypass of a convolution is LyCORIS's in name only: it fails or has another geometry
@pytest.mark.parametrize("algo", VARIANTS)
def test_lycoris_bypass_computes_the_same(algo):
    adapter, layer, x = ours("linear", algo, rank=2)
    check(adapter, layer, x, lycoris_twin(adapter, layer, bypass=True))


@pytest.mark.parametrize("multiplier", [0.3, -2.0])
@pytest.mark.parametrize("algo", VARIANTS)
def test_lycoris_at_another_multiplier(algo, multiplier):
    adapter, layer, x = ours("conv", algo, rank=2)
    adapter.multiplier = multiplier
    check(adapter, layer, x, lycoris_twin(adapter, layer, multiplier=multiplier))


@pytest.mark.parametrize("factor", [-1, 2, 4, 6, 8, 16, 40])
def test_the_split_is_theirs(factor):
    for n in (*range(1, 130), 320, 640, 768, 1280, 2560, 5120, 10240):
        assert split(n, factor) == factorization(n, factor)
        assert split(n, factor, "peft") == peft_factorization(n, factor)


PEFT_NAMES = NAMES | {"lora": {"down": "lora_A", "up": "lora_B", "magnitude": "magnitude"}}


def peft_twin(adapter, layer, config):
    twin = peft.inject_adapter_in_model(config, nn.Sequential(layer))
    algo = "lora" if adapter.algo == "dora" else adapter.algo
    pairs = []
    for name in adapter.factors:
        mine, turn = getattr(adapter, name), lambda t: t
        if name == "magnitude":
            theirs = twin[0].lora_magnitude_vector["default"].weight
        else:
            theirs = getattr(twin[0], PEFT_NAMES[algo][name])["default"]
            theirs = theirs if isinstance(theirs, nn.Parameter) else theirs.weight
            cored = any("core" in n for n in adapter.factors)
            if cored and name in ("up1", "up2", "d_up"):
                turn = torch.t
        theirs.data = turn(mine.detach()).reshape(theirs.shape).clone()
        # the backward of a LoHa with cores takes the other half for the ups in PEFT 0.21
        if not (algo == "loha" and turn is torch.t):
            pairs.append((mine, theirs, turn))
    return twin, pairs


PEFT = [
    ("loha", {}, peft.LoHaConfig, {}),
    ("loha", {"tucker": True}, peft.LoHaConfig, {"use_effective_conv2d": True}),
    ("lokr", {}, peft.LoKrConfig, {}),
    ("lokr", {"tucker": True}, peft.LoKrConfig, {"use_effective_conv2d": True}),
    ("lokr", {"decompose_both": True}, peft.LoKrConfig, {"decompose_both": True}),
    ("lokr", {"factor": 8}, peft.LoKrConfig, {"decompose_factor": 8}),
    ("lokr", {"rank": 30}, peft.LoKrConfig, {}),
    ("dora", {}, peft.LoraConfig, {"use_dora": True}),
    ("dora", {"rslora": True}, peft.LoraConfig, {"use_dora": True, "use_rslora": True}),
]


@pytest.mark.parametrize("kind", ["linear", "conv", "pointwise"])
@pytest.mark.parametrize(("algo", "options", "config", "theirs"), PEFT, ids=str)
def test_peft_computes_the_same(algo, options, config, theirs, kind):
    options = {"rank": 2, **options} | ({"style": "peft"} if algo == "lokr" else {})
    adapter, layer, x = ours(kind, algo, **options)
    scale = {"alpha" if algo != "dora" else "lora_alpha": adapter.alpha, "r": adapter.rank}
    twin, pairs = peft_twin(adapter, layer, config(target_modules=["0"], **scale, **theirs))
    check(adapter, twin, x, pairs)


def test_peft_lokr_factors_have_the_same_shapes():
    layer = nn.Linear(128, 64)
    config = peft.LoKrConfig(r=2, decompose_factor=16, target_modules=["0"])
    twin = peft.inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(layer)))[0]
    adapter = attach(nn.Sequential(layer), "0", "lokr", rank=2, factor=16, style="peft")
    for name, theirs in NAMES["lokr"].items():
        found = getattr(twin, theirs)
        assert ("default" in found) == (name in adapter.factors)
        if name in adapter.factors:
            assert found["default"].shape == getattr(adapter, name).shape
            assert bool(found["default"].any()) == bool(getattr(adapter, name).any())


@pytest.mark.parametrize("style", ["lycoris", "peft"])
@pytest.mark.parametrize(
    ("layer", "tucker"),
    [(nn.Linear(300, 500), False), (nn.Conv2d(90, 200, 3), False), (nn.Conv2d(90, 200, 3), True)],
    ids=["linear", "conv", "tucker"],
)
def test_a_loha_starts_as_theirs(layer, tucker, style):
    mine = attach(nn.Sequential(layer), "0", "loha", rank=40, tucker=tucker, style=style)
    if style == "peft":
        config = peft.LoHaConfig(r=40, use_effective_conv2d=tucker, target_modules=["0"])
        other = peft.inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(layer)))[0]
        theirs = {n: getattr(other, PEFT_NAMES["loha"][n])["default"] for n in mine.factors}
    else:
        other = LohaModule("x", copy.deepcopy(layer), 1.0, 40, 40, use_tucker=tucker)
        theirs = {n: other.get_parameter(NAMES["loha"][n]) for n in mine.factors}
    for name, their in theirs.items():
        my, their = getattr(mine, name), their.detach()
        assert my.std().item() == pytest.approx(their.std().item(), rel=0.05), name
        top = my.abs().max().item(), their.abs().max().item()
        # a uniform distribution ends where it ends, a normal one does not
        assert top[0] == pytest.approx(top[1], rel=0.02 if style == "peft" else 0.4), name


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_starts_from_the_weight_alike(init, rslora):
    layer = nn.Linear(24, 40)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=init, use_rslora=rslora
    )
    twin = peft.inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(layer)))
    adapter = attach(nn.Sequential(layer), "0", rank=4, alpha=6, init=init, rslora=rslora)
    for name, theirs in (("down", "lora_A"), ("up", "lora_B")):
        there = getattr(twin[0], theirs)["default"].weight
        mine = getattr(adapter, name)
        # singular vectors have no sign of their own
        torch.testing.assert_close(mine.abs(), there.abs(), rtol=1e-3, atol=1e-4)
        change = 0.1 * torch.randn_like(mine)
        signs = (mine * there).sum(1 - (name == "up"), keepdim=True).sign()
        mine.data += change
        there.data += change * signs
    x = torch.randn(3, 24)
    torch.testing.assert_close(adapter(x), twin(x), rtol=1e-4, atol=1e-4)
    # a plain LoRA of twice the rank is the same
    f, rank, alpha = adapter.exported()
    plain = attach(nn.Sequential(layer), "0", rank=rank, alpha=alpha, rslora=rslora)
    with torch.no_grad():
        for name, value in f.items():
            getattr(plain, name).copy_(value)
    torch.testing.assert_close(plain(x), adapter(x))

"""LoRA against float64, PEFT, LyCORIS and loralib: geometry, stacks, dropout, scale."""

import copy
import itertools

import loralib
import pytest
import torch
import torch.nn.functional as F
from lycoris import LycorisNetwork, create_lycoris
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lorakern.adapters import attach, inject, layers, merge, set_multiplier
from lorakern.adapters.masks import mask
from lorakern.testing import lost_share


def adapted(layer, **options):
    model = nn.Sequential(layer)
    adapter = attach(model, "0", **{"rank": 4, "alpha": 3, **options})
    nn.init.normal_(adapter.down, std=0.3)
    nn.init.normal_(adapter.up, std=0.3)
    return model, adapter


CONVS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (1, 5), "stride": (2, 3), "padding": (0, 2), "bias": False},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": 3, "groups": 2},
    {"kernel_size": 3, "groups": 4, "stride": 2, "dilation": (1, 2), "padding": (0, 1)},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "padding": 1},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": (3, 4), "padding": "same", "dilation": (2, 1)},
    *({"kernel_size": 3, "padding": (1, 2), "padding_mode": m, "groups": g}
      for m, g in itertools.product(("reflect", "replicate", "circular"), (1, 2))),
    {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("options", CONVS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_conv_geometry(options):
    conv = nn.Conv2d(8, 12, **options).double()
    model, adapter = adapted(copy.deepcopy(conv))
    x = torch.randn(2, 8, 9, 11, dtype=torch.float64)
    want = conv._conv_forward(x, conv.weight + adapter.delta_weight(), conv.bias)
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(model(x[0]), want[0])
    last = x.to(memory_format=torch.channels_last)
    y = model(last)
    torch.testing.assert_close(y, want)
    assert y.is_contiguous(memory_format=torch.channels_last) == conv(last).is_contiguous(
        memory_format=torch.channels_last
    )
    merge(model)
    torch.testing.assert_close(model(x), want)


def peft_twin(layer, adapter, **options):
    """The same layer under PEFT with the adapter's factors."""
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=["0"], **options)
    twin = inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(layer)))
    for mine, theirs in (("down", "A"), ("up", "B")):
        embedding = isinstance(layer, nn.Embedding)
        found = getattr(twin[0], f"lora_embedding_{theirs}" if embedding else f"lora_{theirs}")
        found = found["default"]
        (found if embedding else found.weight).data = getattr(adapter, mine).data.clone()
    return twin


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(8, 12), torch.randn(3, 5, 8)),
        (nn.Linear(8, 12, bias=False), torch.randn(8)),
        (nn.Conv2d(8, 12, 3, stride=2, padding=1), torch.randn(2, 8, 9, 7)),
        (nn.Conv2d(8, 12, 1), torch.randn(2, 8, 3, 5)),
        (nn.Embedding(9, 6, padding_idx=2), torch.tensor([[2, 0], [8, 5]])),
    ],
    ids=["linear", "no-bias", "conv", "pointwise", "embedding"],
)
@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "alpha/root r"])
def test_peft_computes_the_same(layer, x, rslora):
    layer, x = copy.deepcopy(layer).double(), x.double() if x.is_floating_point() else x
    model, adapter = adapted(copy.deepcopy(layer), rslora=rslora)
    twin = peft_twin(layer, adapter, use_rslora=rslora)
    torch.testing.assert_close(model(x), twin(x))
    twin(x).square().sum().backward()
    model(x).square().sum().backward()
    theirs = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    for mine, their in (("down", "A"), ("up", "B")):
        (grad,) = (g for n, g in theirs.items() if f"_{their}." in n)
        torch.testing.assert_close(getattr(adapter, mine).grad, grad)


def test_lycoris_computes_the_same_for_groups(monkeypatch):
    conv = nn.Conv2d(8, 12, 3, groups=2, stride=2, padding=1)
    model, adapter = adapted(copy.deepcopy(conv))
    # a preset is written into the class, for every test after this one too
    for name in [name for name in vars(LycorisNetwork) if name.isupper()]:
        monkeypatch.setattr(LycorisNetwork, name, getattr(LycorisNetwork, name))
    LycorisNetwork.apply_preset({"target_module": ["Conv2d"], "target_name": []})
    theirs = nn.Sequential(conv)
    network = create_lycoris(theirs, 1.0, linear_dim=4, linear_alpha=3, algo="lora")
    network.apply_to()
    (layer,) = network.loras
    layer.lora_down.weight.data = adapter.down.data.clone()
    layer.lora_up.weight.data = adapter.up.data.clone()
    x = torch.randn(2, 8, 9, 7)
    torch.testing.assert_close(model(x), theirs(x))


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_loralib_computes_the_same(kind):
    if kind == "linear":
        theirs = loralib.Linear(8, 12, r=4, lora_alpha=3, merge_weights=False)
        layer, x = nn.Linear(8, 12), torch.randn(3, 8)
        layer.bias.data = theirs.bias.data.clone()
    else:
        theirs = loralib.Embedding(9, 6, r=4, lora_alpha=3, merge_weights=False)
        layer, x = nn.Embedding(9, 6), torch.tensor([[2, 0], [8, 5]])
    layer.weight.data = theirs.weight.data.clone()
    model, adapter = adapted(layer)
    theirs.lora_A.data, theirs.lora_B.data = adapter.down.data.clone(), adapter.up.data.clone()
    torch.testing.assert_close(model(x), theirs(x))


def test_the_row_of_padding_idx_stays():
    layer = nn.Embedding(9, 6, padding_idx=2, scale_grad_by_freq=True)
    model, adapter = nn.Sequential(copy.deepcopy(layer)), None
    adapter = attach(model, "0", rank=4)
    x = torch.tensor([[2, 0], [8, 2]])
    optimizer = torch.optim.AdamW([adapter.down, adapter.up], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model(x)[0, 1], layer(x)[0, 1])
    torch.testing.assert_close(model(x)[0, 0], layer(x)[0, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_stack_loses_nothing_in_16_bit(dtype):
    model, first = adapted(nn.Linear(64, 512).to(dtype))
    second = attach(model, "0", rank=3, name="second")
    nn.init.normal_(second.up)
    # a thousandth of the weight, half of it from each
    for adapter in (first, second):
        ratio = (adapter.weight.float().norm() / adapter.delta_weight().norm()).item()
        adapter.multiplier = 5e-4 * ratio
    x = torch.randn(4096, 64, dtype=dtype)
    weight, bias = first.weight.double(), first.bias.double()
    update = (first.delta_weight() + second.delta_weight()).double()
    lost = lost_share(
        lambda: model(x), F.linear(x.double(), update), F.linear(x.double(), weight, bias)
    )
    assert abs(lost) < 0.02


DROPPED = [
    (nn.Linear(6, 10), (3, 7, 6)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 7, 9)),
    (nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 7, 9)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("mode", ["peft", "kohya"])
@pytest.mark.parametrize(("layer", "shape"), DROPPED, ids=["linear", "grouped", "circular"])
def test_dropout_is_the_formula_with_a_mask(layer, shape, mode, dtype):
    options = {"dropout": 0.4, "dropout_mode": mode, "dtype": dtype}
    model, adapter = adapted(copy.deepcopy(layer).to(dtype), **options)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    torch.manual_seed(7)
    y = model(x)
    dy = torch.randn_like(y)
    got = y, *torch.autograd.grad(y, (x, adapter.down, adapter.up), dy)

    torch.manual_seed(7)
    drop = Drops(mode, seed=int(torch.randint(2**62, ())))
    exact = copy.deepcopy(adapter).double()
    x = x.detach().double().requires_grad_()
    y = exact_with_dropout(exact, x, drop)
    want = y, *torch.autograd.grad(y, (x, exact.down, exact.up), dy.double())
    for mine, theirs in zip(got, want, strict=True):
        size = theirs.abs().max().item()
        close = {} if dtype == torch.float64 else {"rtol": 0, "atol": 0.03 * size}
        torch.testing.assert_close(mine.double(), theirs, **close)


class Drops:
    def __init__(self, mode, seed):
        self.mode, self.seed = mode, seed

    def __call__(self, t, where):
        return t * mask(t, 0.4, self.seed) if where == self.mode else t


def exact_with_dropout(adapter, x, drop):
    layer, down, up = adapter.root, adapter.down, adapter.up
    base = layers.run(layer, x, layer.weight, layer.bias)
    if isinstance(layer, nn.Linear):
        return base + adapter.scale * drop(drop(x, "peft") @ down.mT, "kohya") @ up.mT
    parts = [_conv(layer, part, down) for part in drop(x, "peft").chunk(layer.groups, 1)]
    h = drop(torch.cat(parts, 1), "kohya")
    return base + adapter.scale * F.conv2d(h, up, groups=layer.groups)


def _conv(layer, x, weight):
    x, padding = layers.padded(layer, x)
    return F.conv2d(x, weight, None, layer.stride, padding, layer.dilation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["peft", "kohya"])
@pytest.mark.parametrize(("layer", "shape"), DROPPED, ids=["linear", "grouped", "circular"])
def test_dropout_is_for_training_and_keeps_the_mean(layer, shape, mode, dtype):
    model, adapter = adapted(copy.deepcopy(layer).to(dtype), dropout=0.5, dropout_mode=mode)
    x = torch.randn(1, *shape[1:], dtype=dtype)
    draws = model(x.expand(200, *x.shape[1:]).contiguous()).detach().float()
    model.eval()
    calm = model(x)
    assert draws.var(0).max() > 0 and calm.dtype == dtype
    adapter.dropout = 0.0
    assert torch.equal(model.train()(x), calm)
    # five standard errors of the mean of 200 draws, and a rounding
    off = (draws.mean(0) - calm[0].float()).abs()
    assert (off < 5 * draws.std(0) / 200**0.5 + 2 * torch.finfo(dtype).eps * calm.abs().max()).all()


@pytest.mark.parametrize("mode", ["peft", "kohya"])
def test_dropout_stores_no_mask(mode):
    model, adapter = adapted(nn.Linear(6, 10), dropout=0.4, dropout_mode=mode)
    x = torch.randn(50, 6, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    known = {t.data_ptr() for t in (x, adapter.weight, adapter.down, adapter.up)}
    assert {t.data_ptr() for t in saved} == known


@pytest.mark.parametrize("mode", ["peft", "kohya"])
def test_dropout_loses_no_small_update_in_16_bit(mode):
    layer = nn.Linear(64, 512).bfloat16()
    model, adapter = adapted(layer, dropout=0.1, dropout_mode=mode)
    ratio = (adapter.weight.float().norm() / adapter.delta_weight().norm()).item()
    adapter.multiplier = 1e-3 * ratio
    x = torch.randn(4096, 64, dtype=torch.bfloat16)
    wide = x.double()
    update = F.linear(wide, adapter.delta_weight().double())
    base = F.linear(wide, layer.weight.double(), layer.bias.double())
    # the update itself is drawn; its mean over 2 M outputs is what counts
    assert abs(lost_share(lambda: model(x), update, base)) < 0.03


def test_dropout_in_a_stack_and_compiled():
    model, adapter = adapted(nn.Linear(6, 10), dropout=0.5)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4000, 6)
    second = None
    for _ in range(2):
        one, two = run(x), model(x)
        assert not torch.equal(one, two)
        for y in (one, two):
            torch.testing.assert_close(y.mean(0), model.eval()(x).mean(0), atol=0.1, rtol=0)
            model.train()
        if second is None:
            second = attach(model, "0", rank=2, name="second", dropout=0.2, dropout_mode="kohya")
            nn.init.normal_(second.up, std=0.3)
    set_multiplier(model, 0, "default")
    adapter.dropout = 0.0
    assert not torch.equal(model(x), model(x))


def test_one_adapter_at_the_scale_of_its_own_rank():
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 12))
    made = inject(model, rank=4, targets=["0", "1"], rank_pattern={"1": 9}, alpha_pattern={"0": 2})
    assert {p: (a.rank, a.alpha, a.scale) for p, a in made.items()} == {
        "0": (4, 2.0, 0.5),
        "1": (9, 9.0, 1.0),
    }
    roots = inject(model, rank=4, alpha=6, targets=["0"], rslora=True, name="root")
    assert roots["0"].scale == 3.0
    roots["0"].alpha = 2
    roots["0"].multiplier = 0.5
    assert roots["0"].scale == roots["0"]._scale_tensor.item() == 0.5

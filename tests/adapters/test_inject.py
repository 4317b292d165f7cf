"""inject, find, eject, merge over whole models: targets, patterns, refusals, any order of calls."""

import copy
import warnings

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations

import lorakern
from lorakern.adapters import attach, eject, find, inject, merge, set_multiplier, unmerge
from lorakern.devices import checkpoint_gradients


class Attention(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])

    def forward(self, x):
        y = torch.softmax(self.to_q(x) @ self.to_k(x).mT, -1) @ self.to_v(x)
        return self.to_out[0](y)


class Block(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.proj_in = nn.Conv2d(4, dim, 1)
        self.attn1, self.norm = Attention(dim), nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)
        self.conv = nn.Conv2d(dim, 4, 3, padding=1)

    def forward(self, x):
        y = self.proj_in(x)
        rows = y.flatten(2).mT
        rows = self.attn1(self.norm(rows))
        rows = self.fc2(self.fc1(rows))
        return x + self.conv(rows.mT.reshape(y.shape))


def model_of(blocks=2):
    return nn.Sequential(*(Block() for _ in range(blocks)))


IMAGE = (2, 4, 5, 6)
ATTENTION = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
CHOICES = {
    "attn": ATTENTION,
    "attn-mlp": ["proj_in", *ATTENTION, "fc1", "fc2"],
    "full": ["proj_in", *ATTENTION, "fc1", "fc2", "conv"],
    r".*\.(to_q|fc1)": ["attn1.to_q", "fc1"],
    ("to_q", "1.conv"): ["attn1.to_q", "conv"],
}


@pytest.mark.parametrize("targets", CHOICES, ids=str)
def test_targets(targets):
    model = model_of()
    made = inject(model, targets=targets, rank=2)
    want = [f"{i}.{name}" for i in range(2) for name in CHOICES[targets]]
    if "1.conv" in targets:
        want.remove("0.conv")
    assert list(made) == want == list(find(model))
    assert all(model.get_submodule(path) is adapter for path, adapter in made.items())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.{f}" for path in want for f in ("down", "up")}


@pytest.mark.parametrize("targets", [["to_q", "0.fc1"], r"0\..*", ["norm", "to_out.0"]], ids=str)
def test_names_and_patterns_match_as_in_peft(targets):
    ours, theirs = model_of(), model_of()
    patterns = {"to_q": 3, r"1\..*": 4, "fc1": 5, "attn1.to_out.0": 6}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = inject(ours, targets=targets, rank=2, rank_pattern=patterns)
        # PEFT refuses the module lists and norms that ours leaves alone
        layers = [n for n, m in theirs.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        if isinstance(targets, str):
            chosen = [n for n in layers if n.startswith("0.")]
        else:
            chosen = [n for n in targets if n != "norm"]
        config = LoraConfig(r=2, target_modules=chosen, rank_pattern=patterns)
        inject_adapter_in_model(config, theirs)
    ranks = {n: m.r["default"] for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert {path: a.rank for path, a in made.items()} == ranks


PER_BLOCK = {
    "unet": {
        "attn": {"to_q": 2, "to_k": 2, "to_v": 2, "to_out.0": 2},
        "attn-mlp": {"ff.net.0.proj": 1, "ff.net.2": 1, "proj_in": 1, "proj_out": 1},
    },
    "clip": {
        "attn": {"q_proj": 1, "k_proj": 1, "v_proj": 1, "out_proj": 1},
        "attn-mlp": {"fc1": 1, "fc2": 1},
    },
}


@pytest.mark.parametrize("preset", ["attn", "attn-mlp", "full"])
def test_presets_leave_out_what_an_image_prompt_brought(preset):
    unet = Block()
    plain = list(inject(copy.deepcopy(unet), targets=preset, rank=2))
    unet.encoder_hid_proj = nn.ModuleList([Block()])
    unet.attn1.processor = nn.ModuleDict({"to_k_ip": nn.ModuleList([nn.Linear(8, 8)])})
    assert list(inject(copy.deepcopy(unet), targets=preset, rank=2)) == plain
    # named, they are meant
    assert "attn1.processor.to_k_ip.0" in inject(unet, targets=r".*to_k_ip.*", rank=2)


@pytest.mark.parametrize("which", ["unet", "clip"])
def test_presets_on_real_architectures(which):
    if which == "unet":
        # a block goes down, one is in the middle, two go up
        model, blocks = UNet2DConditionModel(**tiny.unet_config()), 4
        args = (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 32))
    else:
        model, blocks = tiny.text_encoder(), 2
        args = (torch.tensor([[998, 5, 7, 999]]),)
    model.eval()
    y, state = model(*args)[0], copy.deepcopy(model.state_dict())
    want: dict[str, int] = {}
    for preset, more in PER_BLOCK[which].items():
        want = want | more
        made = inject(model, targets=preset, rank=2)
        assert len(made) == blocks * sum(want.values())
        for end, times in want.items():
            assert sum(path.endswith(f".{end}") for path in made) == blocks * times
        for adapter in made.values():
            nn.init.normal_(adapter.up, std=0.1)
        model.train()
        checkpoint_gradients(model)
        model(*args)[0].square().mean().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        model.eval()
        assert not torch.equal(model(*args)[0], y)
        model.load_state_dict(state)
        eject(model)
        assert torch.equal(model(*args)[0], y)


def test_alpha_patterns_and_ranks():
    made = inject(
        model_of(1), rank=4, rank_pattern={"to_k": 2}, alpha_pattern={r"0\.attn1\.to_(k|v)": 1}
    )
    assert [(a.rank, a.alpha) for a in made.values()] == [(4, 4), (2, 1), (4, 1), (4, 4)]


def test_a_shared_layer_is_adapted_once_at_each_place():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"one": nn.Sequential(shared), "two": nn.Sequential(shared)})
    # it goes by its first path
    with pytest.warns(UserWarning, match=r"no layer is called two\.0"):
        made = inject(model, targets=["one.0", "two.0"], rank=2)
    assert list(made) == ["one.0"] and model["one"][0] is model["two"][0] is made["one.0"]
    eject(model)
    assert model["one"][0] is model["two"][0] is shared


def test_layers_whose_forward_never_runs_are_left_out():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.raises(ValueError, match="match none of the 0 layers"):
        inject(model, targets="full")
    with pytest.raises(ValueError, match="MultiheadAttention reads its weight"):
        attach(model, "layers.0.self_attn.out_proj")
    with pytest.raises(ValueError, match="TransformerEncoderLayer reads its weight"):
        attach(model, "layers.0.linear1")


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def _patched(layer):
    layer.forward = lambda input: input
    return layer


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (lambda: Doubled(4, 4), "Doubled has a forward of its own"),
        (lambda: _patched(nn.Linear(4, 4)), "Linear has a forward of its own"),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "its weight is computed"),
        (lambda: nn.LazyLinear(4), "UninitializedParameter"),
        (lambda: nn.Linear(4, 4).to(torch.complex64), "complex64, not plain floats"),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), "max_norm=1.0 rewrites"),
        (lambda: nn.Conv1d(4, 4, 1), "a Conv1d is not one of linear, conv2d, embedding"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_a_layer_that_does_not_fit_is_refused(layer, says):
    model = nn.Sequential(nn.Linear(4, 4), layer())
    before = list(model)
    with pytest.raises(ValueError, match=f"1.*{says}"):
        attach(model, "1", rank=2)
    if not isinstance(before[1], nn.Conv1d):
        with pytest.raises(ValueError, match=f"1 cannot be adapted: .*{says}"):
            inject(model, targets=["0", "1"], rank=2)
    assert list(model) == before and model[0].weight.requires_grad


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, r"0\.attn1\.to_q: rank must be a whole number of at least 1, got 0"),
        ({"rank": -4}, "got -4"),
        ({"rank": 2.5}, r"got 2\.5"),
        ({"rank": True}, "got True"),
        ({"alpha": 0}, "alpha must not be 0"),
        ({"alpha": float("nan")}, "alpha must be a finite number, got nan"),
        ({"name": "a.b"}, r"no dot, got 'a\.b'"),
        ({"name": ""}, "no dot, got ''"),
        ({"dropout": 1.0}, r"probability from 0 to below 1, got 1\.0"),
        ({"dropout_mode": "all"}, "dropout_mode is peft or kohya or lycoris or bypass, got 'all'"),
        ({"algo": "lore"}, "no adapter 'lore'; there are .*lora"),
        ({"targets": "attention"}, r"'attention' match none of the 8 layers.*0\.proj_in.*\.\.\."),
        ({"targets": []}, r"\[\] match none"),
        ({"targets": ["to_x"]}, r"\['to_x'\] match none"),
        ({"dtype": torch.int8}, "dtype of the factors is a floating one, got torch.int8"),
        ({"targets": "to_("}, r"'to_\(' is not a regex: missing \)"),
        ({"alpha_pattern": {"*": 1}}, "is not a regex: nothing to repeat"),
        ({"rank_pattern": {"to_v": 0}}, r"0\.attn1\.to_v: rank must be"),
    ],
    ids=str,
)
def test_bad_options_are_errors_and_change_nothing(options, says):
    model = model_of(1)
    before, state = repr(model), {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=says):
        inject(model, **{"rank": 2, **options})
    assert repr(model) == before
    assert {n: p.requires_grad for n, p in model.named_parameters()} == state


def test_more_mistakes():
    model = model_of(1)
    for call in (eject, merge, unmerge):
        with pytest.raises(ValueError, match="Sequential has no adapter"):
            call(model)
    with pytest.raises(ValueError, match=r"want an nn\.Module, as pipe\.unet, got a dict"):
        inject({"unet": model})
    with pytest.raises(ValueError, match="lora has no option rslra; it has tucker"):
        inject(model, rslra=True)
    with pytest.raises(ValueError, match=r"has no layer '0\.attn2'"):
        attach(model, "0.attn2")
    with pytest.raises(ValueError, match="has no layer ''"):
        attach(model, "")
    with pytest.warns(UserWarning, match=r"rank 9 is over 8, the full rank of a weight \[8, 8\]"):
        inject(model, rank=9)
    with pytest.warns(UserWarning, match="no layer is called to_x"):
        inject(model, targets=["fc1", "to_x"], rank=2)
    with pytest.raises(ValueError, match="has an adapter 'default'"):
        inject(model, rank=2)
    with pytest.raises(ValueError, match="no adapter called 'style'"):
        eject(model, "style")
    with pytest.raises(ValueError, match="no adapter called 'style'"):
        set_multiplier(model, 1, "style")
    with pytest.raises(ValueError, match="multiplier must be a finite number, got inf"):
        set_multiplier(model, float("inf"))
    with pytest.raises(ValueError, match="dropout_mode"):
        attach(nn.Sequential(nn.Embedding(4, 4)), "0", rank=2, dropout=0.1)


def test_factors_are_float32_on_a_half_layer_unless_asked():
    model = model_of(1).half()
    made = inject(model, rank=2)
    more = inject(model, rank=2, name="more", dtype=torch.bfloat16)
    assert {p.dtype for a in made.values() for p in (a.down, a.up)} == {torch.float32}
    assert {p.dtype for a in more.values() for p in (a.down, a.up)} == {torch.bfloat16}
    assert model(torch.randn(IMAGE).half()).dtype == torch.float16
    # the first set of factors goes on training beside the second
    assert all(a.down.requires_grad for a in (*made.values(), *more.values()))


def test_an_adapter_starts_in_the_mode_of_its_layer():
    model = model_of(1).eval()
    assert not any(a.training for a in inject(model, rank=2, dropout=0.5).values())


def test_public_names():
    for name in ("inject", "eject", "merge", "unmerge", "set_multiplier"):
        assert callable(getattr(lorakern, name)) and name in lorakern.__all__


STEP = st.one_of(
    st.tuples(
        st.just("inject"),
        st.sampled_from("abc"),
        st.sampled_from(["attn", "attn-mlp", "full", r".*fc.*|.*conv"]),
        st.integers(1, 4),
    ),
    st.tuples(st.just("eject"), st.sampled_from([None, *"abc"])),
    st.tuples(st.just("multiplier"), st.sampled_from("abc"), st.sampled_from([0.0, 0.5, -1.0])),
    st.tuples(st.just("merge")),
    st.tuples(st.just("unmerge")),
)


@settings(max_examples=15)
@given(steps=st.lists(STEP, max_size=6), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_order_of_calls_gives_the_base_back(steps, dtype):
    model = model_of(1).to(dtype)
    x = torch.randn(IMAGE, dtype=dtype)
    y, state, shape = model(x), copy.deepcopy(model.state_dict()), repr(model)
    for step in steps:
        _try(model, *step)
        now = model.state_dict()
        assert all(torch.equal(now[key], value) for key, value in state.items())
        if dtype == torch.float32 and step[0] == "inject":
            _check_merge(model, x)
    if find(model):
        eject(model)
    assert repr(model) == shape and list(model.state_dict()) == list(state)
    assert torch.equal(model(x), y)


def _try(model, what, *args):
    """One step; whether it is allowed is known beforehand from the adapters that are there."""
    stacks = find(model)
    there = {a.name for stack in stacks.values() for a in stack}
    merged = any(stack[0].merged for stack in stacks.values())
    if what == "inject":
        name, targets, rank = args
        if name in there or merged:
            return
        for adapter in inject(model, targets=targets, rank=rank, name=name).values():
            nn.init.normal_(adapter.up, std=0.3)
    elif what == "multiplier":
        name, value = args
        if name in there and not merged:
            set_multiplier(model, value, name)
    elif what == "eject":
        if there and args[0] in (None, *there):
            eject(model, args[0])
    elif there:
        {"merge": merge, "unmerge": unmerge}[what](model)


def _check_merge(model, x):
    before, twin = model(x), copy.deepcopy(model)
    if find(model):
        merge(twin)
    torch.testing.assert_close(twin(x), before, rtol=1e-3, atol=1e-4)

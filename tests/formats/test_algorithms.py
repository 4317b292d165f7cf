"""LoHa, LoKr and DoRA where formats differ: scales, layouts, what a format has no place for."""

import functools
import json

import pytest
import safetensors.torch
import torch
from tiny_sd import (
    adapted,
    assert_same,
    make_pipeline,
    make_text_encoder,
    make_unet,
    outputs,
    randomise,
    unet_answer,
    write,
)
from torch import nn

import lorakern
from lorakern.adapters import find, merge
from lorakern.formats import convert, inspect

lycoris = pytest.importorskip("lycoris")
peft = pytest.importorskip("peft")
WHERE = ["to_q", "to_out.0", "conv1", "proj_in", "time_emb_proj", "ff.net.0.proj"]
PEFT_MADE = {
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=WHERE),
    "dora rslora": lambda: peft.LoraConfig(
        r=4, lora_alpha=3, use_dora=True, use_rslora=True, target_modules=WHERE
    ),
    "loha": lambda: peft.LoHaConfig(
        r=3, alpha=5, target_modules=WHERE, rank_pattern={"conv1": 2}, alpha_pattern={"to_q": 2}
    ),
    "loha effective": lambda: peft.LoHaConfig(
        r=3, alpha=5, target_modules=WHERE, use_effective_conv2d=True
    ),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=WHERE, alpha_pattern={"conv1": 3}),
    "lokr effective": lambda: peft.LoKrConfig(
        r=2, alpha=5, target_modules=WHERE, use_effective_conv2d=True
    ),
    "lokr both": lambda: peft.LoKrConfig(
        r=1, alpha=3, target_modules=WHERE, decompose_both=True, decompose_factor=8
    ),
    # a factor over the root, which only PEFT leaves first
    "lokr unsorted": lambda: peft.LoKrConfig(
        r=2, alpha=2, target_modules=WHERE, decompose_factor=8
    ),
    # whole factors keep their scale in PEFT: here a quarter
    "lokr whole": lambda: peft.LoKrConfig(r=64, alpha=16, target_modules=WHERE),
}


def make_peft(case: str, folder):
    """The answer of a UNet with PEFT's own adapter, which is saved in the folder."""
    wrapped = peft.get_peft_model(make_unet(), PEFT_MADE[case]())
    made = torch.Generator().manual_seed(6)
    for name, parameter in wrapped.named_parameters():
        noise = torch.randn(parameter.shape, generator=made)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * noise.tanh())
        elif parameter.requires_grad:
            parameter.data.copy_(0.3 * noise)
    wrapped.save_pretrained(folder)
    return unet_answer(wrapped)


@functools.cache
def untouched() -> torch.Tensor:
    return unet_answer(make_unet())


def close(got, want):
    assert (want - untouched()).abs().max() > 1e-2
    near(got, want)


def near(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("case", PEFT_MADE)
def test_peft_file_gives_peft_forward_in_every_format(tmp_path, case):
    want = make_peft(case, tmp_path / "peft")
    ours = make_unet()
    made = lorakern.load(ours, tmp_path / "peft")
    close(unet_answer(ours), want)
    # written again it is PEFT's own file
    lorakern.save(ours, tmp_path / "again", "peft")
    first, again = (
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("peft", "again")
    )
    assert first.keys() == again.keys() and all(again[k].equal(first[k]) for k in first)
    stock = make_unet()
    peft.PeftModel.from_pretrained(stock, tmp_path / "again")
    close(unet_answer(stock), want)
    # a kohya file has no other scale than alpha over the rank of a factor that has one
    path = lorakern.save(ours, tmp_path / "kohya.safetensors")
    reloaded = make_unet()
    assert lorakern.load(reloaded, path).keys() == made.keys()
    close(unet_answer(reloaded), want)
    merge(ours)
    close(unet_answer(ours), want)


def test_lycoris_reads_the_scale_of_whole_factors_from_peft(tmp_path):
    want = make_peft("lokr whole", tmp_path / "peft")
    ours = make_unet()
    lorakern.load(ours, tmp_path / "peft")
    path = lorakern.save(ours, tmp_path / "kohya.safetensors")
    state = {
        key.replace("lora_unet_", "lycoris_"): tensor
        for key, tensor in safetensors.torch.load_file(path).items()
    }
    stock = make_unet()
    with torch.no_grad():
        network, _ = lycoris.create_lycoris_from_weights(1.0, None, stock, state)
    network.apply_to()
    close(unet_answer(stock), want)
    # an adapter by LyCORIS's rule takes PEFT's scale with PEFT's file
    other = make_unet()
    lorakern.inject(other, "lokr", rank=64, targets=list(WHERE), factor=-1)
    lorakern.load(other, tmp_path / "peft")
    close(unet_answer(other), want)


def test_whole_factors_of_lycoris_have_no_scale(tmp_path):
    net = nn.Sequential(nn.Linear(4, 6))
    lorakern.inject(net, "lokr", rank=4, alpha=2, full_matrix=True, targets="full")
    randomise(net, 1.0)
    want = find(net)["0"][0].delta_weight()
    for format, path in (("kohya", tmp_path / "a.safetensors"), ("peft", tmp_path / "p")):
        lorakern.save({"unet": net}, path, format)
        fresh = nn.Sequential(nn.Linear(4, 6))
        (loaded,) = lorakern.load({"unet": fresh}, path).values()
        assert loaded.delta_weight().equal(want) and loaded.scale == 1


def test_stock_diffusers_draws_the_same_image_with_dora(tmp_path):
    pipeline = adapted(sdxl=True, dora=True, tucker=True, alpha_pattern={".*to_k": 8.0})
    path = lorakern.save(pipeline, tmp_path / "a.safetensors", "diffusers")
    stock, ours, want = make_pipeline(sdxl=True), make_pipeline(sdxl=True), outputs(pipeline)
    stock.load_lora_weights(str(path))
    assert_same(outputs(stock), want, sdxl=True)
    assert all(a.dora for a in lorakern.load(ours, path).values())
    assert_same(outputs(ours), want, sdxl=True)
    # and by way of kohya's names
    there = convert(path, tmp_path / "b.safetensors", "kohya", make_pipeline(sdxl=True))
    back = convert(there, tmp_path / "c.safetensors", "diffusers", make_pipeline(sdxl=True))
    first, last = (safetensors.torch.load_file(file) for file in (path, back))
    assert first.keys() == last.keys() and all(last[key].equal(first[key]) for key in first)


@pytest.mark.parametrize("algo", ["loha", "lokr"])
def test_diffusers_is_not_given_what_it_does_not_load(tmp_path, algo):
    unet = make_unet()
    lorakern.inject(unet, algo, rank=2)
    with pytest.raises(ValueError, match=f"is {algo}, which diffusers.* save as kohya or peft"):
        lorakern.save(unet, tmp_path / "a.safetensors", "diffusers")
    path = lorakern.save(unet, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"is {algo}, which diffusers"):
        convert(path, tmp_path / "b.safetensors", "diffusers")
    # and so it is: the same factors under the names that it reads
    folder = lorakern.save(unet, tmp_path / "p", "peft")
    state = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    state = {key.replace("base_model.model.", "unet."): t for key, t in state.items()}
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        make_pipeline().load_lora_weights(state)


def test_unet_save_lora_adapter_of_lokr_loads(tmp_path):
    stock = make_unet()
    stock.add_adapter(PEFT_MADE["lokr"]())
    for name, parameter in stock.named_parameters():
        if "lokr_" in name:
            nn.init.normal_(parameter, std=0.3)
    stock.save_lora_adapter(tmp_path)
    ours = make_unet()
    lorakern.load(ours, tmp_path)
    close(unet_answer(ours), unet_answer(stock))


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
def test_lycoris_text_encoder_finds_its_place(tmp_path, algo):
    encoder = make_text_encoder()
    network = lycoris.create_lycoris(encoder, 1.0, linear_dim=2, linear_alpha=1, algo=algo)
    network.apply_to()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    want = encoder(ids := torch.arange(16)[None]).last_hidden_state
    pipeline = make_pipeline()
    made = lorakern.load(pipeline, tmp_path / "a.safetensors")
    assert len(made) == len(network.loras) and all(k.startswith("text_encoder.") for k in made)
    got = pipeline.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    # without a model its own words tell
    path = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    keys = safetensors.torch.load_file(path)
    assert all(key.startswith("lora_te_text_model_encoder_layers_") for key in keys)


def test_files_of_lycoris_in_kohyas_trainer_load(tmp_path):
    from lycoris import kohya

    # with rs_lora LyCORIS trains two whole factors at a scale that none of its loaders knows
    for algo, rs_lora in (("loha", "True"), ("lokr", "False")):
        pipeline = make_pipeline()
        network = kohya.create_network(
            1.0, 2, 1.0, None, pipeline.text_encoder, pipeline.unet,
            algo=algo, preset="attn-mlp", rs_lora=rs_lora,
        )  # fmt: skip
        network.apply_to(pipeline.text_encoder, pipeline.unet, True, True)
        made = torch.Generator().manual_seed(4)
        for parameter in network.parameters():
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=made))
        network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
        ours = make_pipeline()
        loaded = lorakern.load(ours, tmp_path / "a.safetensors")
        assert {name.partition(".")[0] for name in loaded} == {"unet", "text_encoder"}
        assert_same(outputs(ours), outputs(pipeline))


def test_one_file_may_mix_algorithms(tmp_path):
    unet = make_unet()
    lorakern.inject(unet, "loha", rank=2, alpha=3, targets=["to_q"])
    lorakern.inject(unet, "lokr", rank=2, targets=["conv1"], tucker=True)
    lorakern.inject(unet, "lora", rank=2, targets=["to_k"], dora=True, wd_on_output=False)
    randomise(unet, 0.3)
    path = lorakern.save(unet, tmp_path / "a.safetensors")
    fresh = make_unet()
    lorakern.load(fresh, path)
    close(unet_answer(fresh), unet_answer(unet))
    found = inspect(path)
    words = "loha and lokr and lokr with a Tucker core and lora, DoRA on input"
    assert (found.algo, found.ranks) == (words, {2: sum(found.components.values())})
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == "lycoris.kohya"
    arguments = json.loads(metadata["ss_network_args"])
    assert arguments.pop("conv_dim") == "2" and arguments.pop("conv_alpha") == "2.0"
    assert arguments == {
        "algo": "loha", "use_tucker": "True", "dora_wd": "True", "wd_on_output": "False",
    }  # fmt: skip
    with pytest.raises(ValueError, match="PEFT has one algorithm in an adapter, and this has"):
        lorakern.save(unet, tmp_path / "p", "peft")


def grouped() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.Conv2d(8, 4, 1, groups=4))


@pytest.mark.parametrize("rslora", [False, True])
@torch.no_grad()
def test_grouped_convolutions_in_both_layouts(tmp_path, rslora):
    net, x = grouped(), torch.linspace(-1, 1, 4 * 25).view(1, 4, 5, 5)
    lorakern.inject(net, rank=2, alpha=3, rslora=rslora, targets="full")
    randomise(net, 1.0)
    want = net(x)
    assert (want - grouped()(x)).abs().max() > 0.1
    lorakern.save(net, tmp_path / "p", "peft")
    theirs = peft.PeftModel.from_pretrained(grouped(), tmp_path / "p")
    near(theirs(x), want)
    for path in (tmp_path / "p", lorakern.save({"unet": net}, tmp_path / "a.safetensors")):
        fresh = grouped()
        loaded = lorakern.load({"unet": fresh}, path)
        assert loaded["unet.0"].down.equal(net[0].down) and loaded["unet.0"].up.equal(net[0].up)
        near(fresh(x), want)
    # each group has a down of its own, as PEFT may have trained it: R/g ranks become R here
    file = tmp_path / "p" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["base_model.model.0.lora_A.weight"][2:] *= -0.5
    write(file, tensors)
    theirs = peft.PeftModel.from_pretrained(grouped(), tmp_path / "p")
    fresh = grouped()
    assert lorakern.load(fresh, tmp_path / "p")["0"].rank == 4
    near(fresh(x), theirs(x))
    with pytest.raises(ValueError, match="0 has 2 groups, which diffusers does not load"):
        lorakern.save({"unet": net}, tmp_path / "d.safetensors", "diffusers")


def test_peft_groups_that_read_each_other_are_refused(tmp_path):
    theirs = peft.get_peft_model(grouped(), peft.LoraConfig(r=2, target_modules=["0"]))
    nn.init.normal_(theirs.base_model.model[0].lora_B["default"].weight)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.0\.lora_A\.weight: its 2 groups read each other"):
        lorakern.load(grouped(), tmp_path)


@pytest.mark.parametrize("algo", ["loha", "lokr"])
@torch.no_grad()
def test_grouped_convolutions_of_other_algorithms(tmp_path, algo):
    net, x = grouped(), torch.linspace(-1, 1, 4 * 25).view(1, 4, 5, 5)
    network = lycoris.create_lycoris(net, 1.0, linear_dim=1, linear_alpha=2, algo=algo)
    network.apply_to()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    ours, want = grouped(), net(x)
    lorakern.load(ours, tmp_path / "a.safetensors")
    near(ours(x), want)
    lorakern.save(ours, tmp_path / "p", "peft")
    theirs = peft.PeftModel.from_pretrained(grouped(), tmp_path / "p")
    near(theirs(x), want)


def test_magnitude_of_a_square_layer_keeps_its_axis(tmp_path):
    for on_output in (True, False):
        net = nn.Sequential(
            nn.Linear(6, 6), nn.Conv2d(6, 6, 3), nn.Conv2d(1, 6, 1), nn.Linear(6, 1)
        )
        lorakern.inject(net, rank=2, targets="full", dora=True, wd_on_output=on_output)
        randomise(net)
        path = lorakern.save({"unet": net}, tmp_path / "a.safetensors")
        for adapter in lorakern.load({"unet": net}, path).values():
            assert adapter.dora.on_output == on_output
        fresh = nn.Sequential(*(type(a.root)(*_sizes(a.root)) for a in net))
        for name, adapter in lorakern.load({"unet": fresh}, path).items():
            assert adapter.dora.on_output == on_output, name
            assert adapter.magnitude.equal(net.get_submodule(name[5:]).magnitude)


def _sizes(layer: nn.Module) -> tuple:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels, layer.kernel_size


def test_convert_tucker_and_names(tmp_path):
    unet = make_unet()
    lorakern.inject(unet, "loha", rank=2, targets="full", tucker=True)
    randomise(unet, 0.3)
    want = unet_answer(unet)
    path = lorakern.save(unet, tmp_path / "a.safetensors")
    # by names alone nothing tells a 1 x 1 kernel from a 3 x 3 one: no cores then
    for model, effective in ((None, False), (make_unet(), True)):
        folder = convert(path, tmp_path / str(effective), "peft", model)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["use_effective_conv2d"] == effective
        stock = make_unet()
        peft.PeftModel.from_pretrained(stock, folder)
        close(unet_answer(stock), want)
    other = make_unet()
    lorakern.inject(other, "lokr", rank=2, targets=["to_q"])
    path = lorakern.save(other, tmp_path / "b.safetensors")
    with pytest.raises(
        ValueError, match=r"computes LoKr's shapes from the weights of .*pass model="
    ):
        convert(path, tmp_path / "lokr", "peft")
    assert convert(path, tmp_path / "lokr", "peft", make_unet()).is_dir()


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
def test_dtype_of_every_factor(tmp_path, algo):
    unet = make_unet()
    made = lorakern.inject(unet, algo, rank=2, alpha=3, dora=True, targets=["conv1"], tucker=True)
    randomise(unet)
    path = lorakern.save(unet, tmp_path / "a.safetensors", dtype=torch.bfloat16)
    assert inspect(path).dtypes.keys() == {"bfloat16", "float32"}
    for name, adapter in lorakern.load(make_unet(), path).items():
        assert (adapter.alpha, adapter.rank) == (3, 2) or "c" in adapter.factors
        for factor in made[name].factors:
            want = getattr(made[name], factor).bfloat16().float()
            assert getattr(adapter, factor).equal(want), factor


@pytest.mark.parametrize("init", ["pissa", "olora"])
@torch.no_grad()
def test_a_start_from_the_weight_is_in_the_file(tmp_path, init):
    unet = make_unet()
    lorakern.inject(unet, rank=2, alpha=3, init=init, targets=["to_q", "conv1"])
    for stack in find(unet).values():
        stack[0].up.add_(0.3)
    for format, path in (("kohya", tmp_path / "a.safetensors"), ("peft", tmp_path / "p")):
        lorakern.save(unet, path, format)
        fresh = make_unet()
        assert {a.rank for a in lorakern.load(fresh, path).values()} == {4}
        close(unet_answer(fresh), unet_answer(unet))


def test_an_adapter_that_no_file_knows_is_named(tmp_path):
    net = nn.Sequential(nn.Linear(4, 6))
    made = lorakern.inject(net, rank=2, targets="full")
    made["0"].factors = ("down", "middle", "up")
    with pytest.raises(ValueError, match="0 is lora; files hold lora, loha, lokr"):
        lorakern.save({"unet": net}, tmp_path / "a.safetensors")

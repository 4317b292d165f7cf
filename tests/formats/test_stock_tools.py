"""Files that stock diffusers, PEFT and LyCORIS read and write: the same output on both sides."""

import json

import pytest
import tiny_sd
import torch
from tiny_sd import (
    Net,
    adapted,
    assert_same,
    make_pipeline,
    net_answer,
    outputs,
    parts,
    unet_answer,
)

import lorakern

peft = pytest.importorskip("peft")
diffusers = tiny_sd.diffusers

MIXED = {
    "one rank": {},
    "mixed": {
        "rank_pattern": {".*to_q": 2, ".*conv1": 3, ".*fc1": 5, ".*k_proj": 3},
        "alpha_pattern": {".*to_k": 8, ".*conv2": 3, ".*fc2": 1, ".*v_proj": 1},
        "rslora": True,
    },
}


@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("options", MIXED.values(), ids=MIXED)
def test_stock_diffusers_draws_the_same_image(tmp_path, sdxl, options):
    pipeline = adapted(sdxl, **options)
    want = outputs(pipeline)
    for format in ("kohya", "diffusers"):
        path = lorakern.save(pipeline, tmp_path / f"{format}.safetensors", format)
        stock = make_pipeline(sdxl)
        stock.load_lora_weights(str(path))
        assert_same(outputs(stock), want, sdxl)


@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("header", [True, False], ids=["header", "no header"])
def test_stock_diffusers_files_load(tmp_path, sdxl, header):
    stock = make_pipeline(sdxl)
    layers, metadata = {}, {}
    for name, module in parts(stock).items():
        config = peft.LoraConfig(
            r=4,
            # without the header a reader can only take alpha for the rank
            lora_alpha=6 if header else 4,
            target_modules=["to_q", "to_out.0", "conv1", "proj_in", "q_proj", "out_proj", "fc2"],
            alpha_pattern={"to_q": 3, "fc2": 1} if header else {},
            rank_pattern={"to_q": 2} if header else {},
            use_rslora=header,
        )
        # not add_adapter, which some pairs of transformers and PEFT refuse
        peft.inject_adapter_in_model(config, module)
        randomise_peft(module)
        state = peft.get_peft_model_state_dict(module)
        # the order of stock's own training scripts: attention first, in diffusers' own spelling
        layers[f"{name}_lora_layers"] = diffusers.utils.convert_state_dict_to_diffusers(state)
        metadata[f"{name}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
    want = outputs(stock)
    type(stock).save_lora_weights(tmp_path, **layers, **(metadata if header else {}))
    ours = make_pipeline(sdxl)
    loaded = lorakern.load(ours, tmp_path)
    assert sum(2 for _ in loaded) == sum(len(state) for state in layers.values())
    assert_same(outputs(ours), want, sdxl)


def test_unet_save_lora_adapter_loads(tmp_path):
    stock = make_pipeline()
    stock.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_k", "conv2"]))
    randomise_peft(stock.unet)
    stock.unet.save_lora_adapter(tmp_path)
    want = unet_answer(stock.unet)
    ours = make_pipeline().unet
    lorakern.load(ours, tmp_path)
    torch.testing.assert_close(unet_answer(ours), want, rtol=0, atol=1e-5)
    # a pipeline finds by the names that they are its UNet's
    whole = make_pipeline()
    assert all(path.startswith("unet.") for path in lorakern.load(whole, tmp_path))


def test_attention_processors_old_names_load(tmp_path):
    want = adapted(targets="attn", alpha=4.0)
    state, rename = {}, {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "0": "to_out"}
    text = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    for path, adapter in tiny_sd.adapters_of(want).items():
        parent, _, last = path.removesuffix(".to_out.0").rpartition(".")
        if path.endswith(".to_out.0"):
            parent, last = path.removesuffix(".to_out.0"), "0"
        old = f"{parent}.processor.{rename[last]}" if last in rename else f"{parent}.{text[last]}"
        state[f"{old}_lora.down.weight"] = adapter.down.detach()
        state[f"{old}_lora.up.weight"] = adapter.up.detach()
    tiny_sd.write(tmp_path / "old.safetensors", state)
    ours = make_pipeline()
    lorakern.load(ours, tmp_path / "old.safetensors")
    assert_same(outputs(ours), outputs(want))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_files_load(tmp_path, rslora):
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=rslora, target_modules=["words", "proj", "conv"],
        rank_pattern={"inner.proj": 2}, alpha_pattern={"^proj": 7, "words": 4},
    )  # fmt: skip
    theirs = peft.get_peft_model(Net(), config)
    randomise_peft(theirs)
    theirs.save_pretrained(tmp_path)
    ours = Net()
    loaded = lorakern.load(ours, tmp_path)
    assert set(loaded) == {"words", "proj", "inner.proj", "conv"}
    assert all(adapter.rslora == rslora for adapter in loaded.values())
    for got, want in zip(net_answer(ours), net_answer(theirs), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_ours(tmp_path, rslora):
    net = Net()
    # "proj" alone: a list of targets would also take inner.proj
    lorakern.inject(
        net, rank=3, alpha=5, rslora=rslora, targets=["words", "conv", "out"],
        alpha_pattern={"conv": 2}, rank_pattern={"words": 2},
    )  # fmt: skip
    lorakern.inject(net, rank=4, targets="proj", rslora=rslora)
    tiny_sd.randomise(net, 0.4)
    lorakern.save(net, tmp_path / "ours", "peft")
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")
    for got, want in zip(net_answer(theirs), net_answer(net), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    tuned = {n for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert tuned == {f"base_model.model.{p}" for p in ("words", "conv", "inner.out", "proj")}
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["use_rslora"] == rslora


@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
def test_peft_loads_our_components(tmp_path, sdxl):
    pipeline = adapted(sdxl)
    lorakern.save(pipeline, tmp_path, "peft")
    stock = make_pipeline(sdxl)
    for name, module in parts(stock).items():
        wrapped = peft.PeftModel.from_pretrained(module, tmp_path / name)
        assert not wrapped.training
    assert_same(outputs(stock), outputs(pipeline), sdxl)


def test_lycoris_plain_lora_loads(tmp_path):
    lycoris = pytest.importorskip("lycoris")
    stock = make_pipeline()
    network = lycoris.create_lycoris(
        stock.unet, 1.0, linear_dim=4, linear_alpha=2, algo="lora", bypass_mode=True
    )
    network.apply_to()
    made = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=made))
    network.save_weights(str(tmp_path / "lycoris.safetensors"), torch.float32, {})
    ours = make_pipeline().unet
    assert lorakern.load(ours, tmp_path / "lycoris.safetensors")
    torch.testing.assert_close(unet_answer(ours), unet_answer(stock.unet), rtol=0, atol=1e-5)


def randomise_peft(model) -> None:
    made = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=made))

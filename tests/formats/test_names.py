"""What layers are called in files: names that other tools know, and every name's way back."""

import pytest
import safetensors.torch
from tiny_sd import adapted, adapters_of, make_text_encoder, make_unet, write

import lorakern
from lorakern.adapters.targets import layers_of
from lorakern.formats import names

SDXL_LDM = names.ldm_paths(names.SDXL_DOWN, names.SDXL_MID, names.SDXL_UP)


@pytest.mark.parametrize(
    "path, ldm",
    [
        ("conv_in", "input_blocks.0.0"),
        ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection"),
        ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
        ("down_blocks.2.attentions.1.proj_out", "input_blocks.8.1.proj_out"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        (
            "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0",
            "middle_block.1.transformer_blocks.9.attn2.to_out.0",
        ),
        ("up_blocks.0.attentions.2.proj_in", "output_blocks.2.1.proj_in"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.1.attentions.0.proj_in", "output_blocks.3.1.proj_in"),
        ("up_blocks.2.resnets.2.time_emb_proj", "output_blocks.8.0.emb_layers.1"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("conv_out", "out.2"),
    ],
)
def test_sdxl_ldm_names(path, ldm):
    assert names.to_ldm(path, SDXL_LDM) == ldm


def test_table_comes_from_the_unets_own_blocks():
    unet = make_unet(sdxl=True, layers_per_block=2)
    assert names.ldm_paths(*names.blocks_of(unet)) == SDXL_LDM
    smaller = names.ldm_paths(*names.blocks_of(make_unet(sdxl=True)))
    assert names.to_ldm("up_blocks.1.attentions.0.proj_in", smaller) == "output_blocks.2.1.proj_in"


@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
def test_every_flat_name_has_one_way_back(sdxl):
    unet = make_unet(sdxl, layers_per_block=2)
    table = names.ldm_paths(*names.blocks_of(unet))
    paths = [path for path, _ in layers_of(unet)]
    assert len({names.flat(names.to_ldm(path, table)) for path in paths}) == len(paths)
    for path in paths:
        assert names.unflatten(names.flat(path), table) == path
        assert names.unflatten(names.flat(names.to_ldm(path, table)), table) == path
        assert names.guess_component(path) == "unet"
    known = names.spellings("unet", unet, paths)
    assert all(len(meant) == 1 for meant in known.values())


@pytest.mark.parametrize("projection", [False, True])
def test_text_encoders_are_called_text_model(projection):
    encoder = make_text_encoder(projection=projection)
    for path, _ in layers_of(encoder):
        called = names.canonical("text_encoder", path)
        assert called.startswith(("text_model.", "text_projection"))
        assert names.canonical("text_encoder", called) == called
        assert names.unflatten(names.flat(called), {}) == called
        assert names.canonical("text_encoder", names.flat(path)) == names.flat(called)


@pytest.mark.parametrize("word", ["lora_unet_blocks_0_attn", "down_blocks_0_", "", "to_qq"])
def test_unknown_words_are_not_guessed(word):
    assert names.unflatten(word, {}) is None


SD_KEYS = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0.alpha",
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj.lora_up.weight",
    "lora_unet_down_blocks_0_downsamplers_0_conv.lora_down.weight",
    "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
}
SDXL_KEYS = {
    "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
    "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_k.lora_up.weight",
    "lora_unet_output_blocks_0_0_in_layers_2.alpha",
    "lora_unet_label_emb_0_0.lora_down.weight",
    "lora_te1_text_model_encoder_layers_0_self_attn_out_proj.lora_up.weight",
    "lora_te2_text_model_encoder_layers_0_mlp_fc2.alpha",
    "lora_te2_text_projection.lora_up.weight",
}


@pytest.mark.parametrize("sdxl, want", [(False, SD_KEYS), (True, SDXL_KEYS)], ids=["sd", "sdxl"])
def test_kohya_keys(tmp_path, sdxl, want):
    path = lorakern.save(adapted(sdxl), tmp_path / "a.safetensors")
    keys = safetensors.torch.load_file(path).keys()
    assert want <= keys, sorted(want - keys)
    assert all(k.endswith((".lora_down.weight", ".lora_up.weight", ".alpha")) for k in keys)


def test_diffusers_keys(tmp_path):
    lorakern.save(adapted(), tmp_path, "diffusers")
    keys = safetensors.torch.load_file(tmp_path / "pytorch_lora_weights.safetensors").keys()
    to_q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert {
        f"unet.{to_q}.lora_A.weight",
        "unet.conv_in.lora_B.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight",
    } <= keys


def test_sdxl_in_diffusers_spelling_loads_too(tmp_path):
    pipeline = adapted(sdxl=True)
    state = {}
    for path, adapter in adapters_of(pipeline).items():
        if path.startswith("unet."):
            name = "lora_unet_" + path.removeprefix("unet.").replace(".", "_")
            state[f"{name}.lora_down.weight"] = adapter.down.detach()
            state[f"{name}.lora_up.weight"] = adapter.up.detach()
    write(tmp_path / "a.safetensors", state)
    loaded = lorakern.load(make_unet(sdxl=True), tmp_path / "a.safetensors")
    assert len(loaded) == len(state) // 2
    # no alpha in the file: it is the rank
    assert all(adapter.alpha == adapter.rank == 4 for adapter in loaded.values())
    for path, adapter in loaded.items():
        assert adapter.down.equal(adapters_of(pipeline)[f"unet.{path}"].down)


def test_a_name_that_may_mean_two_layers_is_refused(tmp_path):
    from torch import nn

    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.to = nn.ModuleDict({"q": nn.Linear(4, 4)})
            self.to_q = nn.Linear(4, 4)

    twins = Twins()
    lorakern.inject(twins, targets=["to.q"], rank=2)
    path = lorakern.save({"unet": twins}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"may be any of to\.q, to_q"):
        lorakern.load({"unet": Twins()}, path)
    lorakern.inject(twins, targets=["to_q"], rank=2)
    with pytest.raises(ValueError, match="both be called lora_unet_to_q"):
        lorakern.save({"unet": twins}, path)

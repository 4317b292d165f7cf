"""What the tests of training an IP-Adapter share: an image encoder, embeddings, and short runs."""

import pytest
import torch
from safetensors.torch import save_file

from lorakern import config
from lorakern.methods import image_features

WIDTH, TOKENS = 24, 6


def vision_encoder(folder):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(5)
    chosen = CLIPVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        image_size=16, patch_size=8, projection_dim=20,
    )  # fmt: skip
    made = CLIPVisionModelWithProjection(chosen).eval()
    made.save_pretrained(folder)
    return made


@pytest.fixture(name="encoder", scope="module")
def encoder_fixture(home):
    return vision_encoder(home / "encoder")


@pytest.fixture(name="embeddings", scope="module")
def embeddings_fixture(home):
    generator = torch.Generator().manual_seed(6)
    names = [*sorted(p.stem for p in (home / "data").glob("*.png")), image_features.NEGATIVE]
    rows = {n: torch.randn(TOKENS, WIDTH, generator=generator) for n in names}
    del names[-1]
    save_file({n: rows[n][0].clone() for n in names}, home / "base.safetensors")
    save_file(rows, home / "plus.safetensors")
    return home


@pytest.fixture(name="make")
def make_fixture(home, tmp_path, embeddings):
    """settings -> Config of a short run in tmp_path, on embeddings if nothing else is said."""

    def make(output="out", **changes) -> config.Config:
        variant = changes.pop("variant", "base")
        table = {
            "method": "ip_adapter", "model": str(home / "model"), "data": home / "data",
            "output": tmp_path / output, "cache": home / "cache", "resolution": 16, "steps": 4,
            "batch_size": 2, "optimizer": {"lr": 3e-3},
            "ip_adapter": {"variant": variant, "embeddings": home / f"{variant}.safetensors"},
        }  # fmt: skip
        return config.from_dict(table | changes)

    return make

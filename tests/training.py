"""What the tests of the trainer share: a model, pictures, and short runs on them."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from lorakern import checkpoint, config
from lorakern.train import train


@pytest.fixture(autouse=True)
def one_thread():
    # layers this small only wait for each other on more
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(name="home", scope="module")
def home_fixture(tmp_path_factory):
    """A model, pictures, and a cache that the tests share."""
    home = tmp_path_factory.mktemp("home")
    tiny.saved(home)
    tiny.images(home / "data", 5)
    return home


@pytest.fixture(name="make")
def make_fixture(home, tmp_path):
    """settings -> Config of a short run in tmp_path."""

    def make(output="out", **changes) -> config.Config:
        table = {
            "model": str(home / "model"), "data": home / "data", "output": tmp_path / output,
            "cache": home / "cache", "resolution": 16, "steps": 4, "batch_size": 2,
            "caption_dropout": 0.3, "adapter": {"rank": 4}, "optimizer": {"lr": 3e-3},
        }  # fmt: skip
        return config.from_dict(table | changes)

    return make


def fit(chosen, **options):
    return train(chosen, bar=False, **options)


def factors(output: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.newest(output).path / "adapter.safetensors")


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name

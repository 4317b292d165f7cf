"""Checkpoints: a folder that is whole or not there, and the newest whole one found again.

checkpoints/step-000500/ has adapter.safetensors (factors by parameter name, exactly as trained),
state.pt (optimizer and schedule, read with weights_only) and run.json (step, settings, and the
SHA-256 of the other two, without which the folder does not count).
"""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lorakern.formats import storage

FOLDER = "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from.

    step: updates that were made.
    factors: parameter name -> tensor.
    state: of optimizer and schedule, plain containers and tensors.
    settings: the config's `fixed` part, and a fingerprint of the data under "data fingerprint".
    path: the folder.
    """

    step: int
    factors: dict[str, Tensor]
    state: dict[str, Any]
    settings: dict[str, Any]
    path: Path


def save(
    output: Path, step: int, factors: dict[str, Tensor], state: dict[str, Any],
    settings: dict[str, Any], keep: int,
) -> Path:  # fmt: skip
    """Write checkpoints/step-NNNNNN under `output`, and drop all but the newest `keep`.

    The folder is written under a temporary name, synced to disk, and renamed.
    """
    folder = output / FOLDER
    final, temporary = folder / f"step-{step:06d}", folder / f".step-{step:06d}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files = {
        "adapter.safetensors": storage.to_bytes(factors, {"step": str(step)}),
        "state.pt": buffer.getvalue(),
    }
    hashes = {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()}
    run = {"step": step, "settings": settings, "sha256": hashes}
    files["run.json"] = json.dumps(run, indent=1).encode()
    try:
        storage.write({temporary / name: raw for name, raw in files.items()})
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    storage.sync_folder(folder)
    for old in _newest_first(output)[keep:]:
        shutil.rmtree(old)
    return final


def newest(output: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, None when there is none; broken ones are passed over."""
    for path in _newest_first(output):
        found = _read(path)
        if found is not None:
            return found
    return None


def exists(output: Path) -> bool:
    """Whether a run left checkpoints here, whole or not."""
    return bool(_newest_first(output))


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings that changed, one text each: "seed was 0, is 1"."""
    return [
        f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]


def _newest_first(output: Path) -> list[Path]:
    found = [p for p in (output / FOLDER).glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def _read(path: Path) -> Checkpoint | None:
    try:
        run = json.loads((path / "run.json").read_text(encoding="utf-8"))
        files = {name: (path / name).read_bytes() for name in run["sha256"]}
        if any(hashlib.sha256(raw).hexdigest() != run["sha256"][n] for n, raw in files.items()):
            return None
        factors = safetensors.torch.load(files["adapter.safetensors"])
        state = torch.load(io.BytesIO(files["state.pt"]), map_location="cpu", weights_only=True)
        return Checkpoint(run["step"], factors, state, run["settings"], path)
    except (OSError, ValueError, KeyError, TypeError, pickle.UnpicklingError):
        return None

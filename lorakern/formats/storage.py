"""Files: a broken safetensors file is named for what it is, and writes are all or nothing."""

import hashlib
import json
import os
import pickle
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakern.formats.base import Stored

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
# what torch.load raises on bytes that it did not write
_BROKEN = (
    pickle.PickleError, RuntimeError, OSError, ValueError, LookupError, EOFError, AssertionError,
    TypeError, AttributeError, struct.error,
)  # fmt: skip


def read(path: str | Path) -> list[Stored]:
    """What a path holds: a .safetensors file, a PEFT folder, a folder of PEFT folders named by
    component, or a folder with pytorch_lora_weights.safetensors or one .safetensors file.

    Raises:
        FileNotFoundError: there is no such path, or nothing to read in the folder.
        ValueError: the file is not safetensors, is cut short, or its config is not JSON.
    """
    path = Path(path)
    if path.is_file():
        return [_read_file(path)]
    if not path.is_dir():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if (path / PEFT_CONFIG).is_file() or (path / PEFT_WEIGHTS).is_file():
        return [_read_peft(path, None)]
    folders = sorted(p.parent for p in path.glob(f"*/{PEFT_CONFIG}"))
    if folders:
        return [_read_peft(folder, folder.name) for folder in folders]
    if (path / DIFFUSERS_WEIGHTS).is_file():
        return [_read_file(path / DIFFUSERS_WEIGHTS)]
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(f.name for f in files) or "none"
        raise FileNotFoundError(f"{path}: want one .safetensors file in the folder, found: {names}")
    return [_read_file(files[0])]


def _read_file(path: Path) -> Stored:
    if path.name == PEFT_WEIGHTS:
        return _read_peft(path.parent, None)
    return Stored(path, *read_tensors(path))


def _read_peft(folder: Path, component: str | None) -> Stored:
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: a PEFT folder needs {name}, and it is not there")
    try:
        config = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / PEFT_CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / PEFT_CONFIG}: want a JSON object, got {type(config).__name__}")
    tensors, metadata = read_tensors(folder / PEFT_WEIGHTS)
    return Stored(folder / PEFT_WEIGHTS, tensors, metadata, config, component)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata; raises as `read`."""
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"{path}: pickle files can run code and are not read; want .safetensors")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path} ({size} bytes) is not a whole safetensors file: {error}"
        ) from error
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    return tensors, metadata


def read_pickle(path: Path) -> Any:
    """What torch.save wrote, on the CPU, if it is tensors and plain containers.

    Raises:
        ValueError: it holds other objects, which could run code, or is no such file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path} ({size} bytes) is not a whole file of torch.save with tensors alone"
        ) from error


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file in memory; the same bytes for the same content, unlike the library's."""
    whole = {
        key: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, t in tensors.items()
    }
    data = safetensors.torch.save(whole)
    end = 8 + int.from_bytes(data[:8], "little")
    # the library writes the entries of the metadata in random order
    entries = {"__metadata__": dict(sorted(metadata.items()))} | json.loads(data[8:end])
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def kohya_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """sshs_model_hash, SHA-256 of the bytes after the header, and sshs_legacy_hash, the first 8
    hex digits of SHA-256 of 64 KiB at 1 MiB; of the file with `ss_` metadata alone."""
    data = to_bytes(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    header = 8 + int.from_bytes(data[:8], "little")
    legacy = hashlib.sha256(data[1 << 20 : (1 << 20) + (1 << 16)]).hexdigest()[:8]
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(data)[header:]).hexdigest(),
        "sshs_legacy_hash": legacy,
    }


def write(files: Mapping[Path, bytes]) -> None:
    """Write files so that each is whole or as it was before: temporary name, fsync, rename.

    Every file is on disk under its temporary name before the first is renamed; on any error the
    temporary files are removed and what was there stays.
    """
    pending: list[tuple[Path, Path]] = []
    try:
        for path, data in files.items():
            target = Path(os.path.realpath(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
            pending.append((temporary, target))
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        while pending:
            os.replace(*pending[0])
            sync_folder(pending.pop(0)[1].parent)
    finally:
        for temporary, _ in pending:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write files into, on disk and in the place of `folder` when the block ends.

    When the block raises, what was there stays. A folder that is replaced is moved aside first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unique = f".{folder.name}.{secrets.token_hex(4)}"
    temporary, old = folder.with_name(f"{unique}.tmp"), folder.with_name(f"{unique}.old")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
        if folder.exists():
            os.rename(folder, old)
        os.rename(temporary, folder)
    except BaseException:
        if old.exists():
            os.rename(old, folder)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Put a folder's renames on disk; Windows cannot open folders, and does not need to."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

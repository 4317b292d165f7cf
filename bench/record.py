"""A row of the benchmark record, where it was measured, and the append-only file it goes to."""

import csv
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PEERS = ("peft", "lycoris-lora", "loralib", "diffusers")


@dataclass(frozen=True)
class Row:
    """One arm on one case. Empty strings are figures that the bench does not have."""

    op: str
    case: str
    dtype: str
    # a kernel of the op (cpp, triton, reference), or a whole layer: lorakern, frozen, a peer
    backend: str
    # fwd (recorded for backward), fwd+bwd, infer (no gradients), step
    direction: str
    median_us: float
    iqr_us: float
    # bytes of the inputs and results, each once, over the median
    gb_s: float | str
    # median over rounds of (this arm / frozen layer in the same round), and ratio of the medians;
    # an op that no frozen layer has is held against its bench's FLOOR
    cost_over_frozen: float
    cost_of_medians: float
    # kept for backward beyond parameters and the layer's own input
    saved_bytes: int | str
    # share of an update of |dW|/|W0| = 1e-3 that the output lost
    lost_share: float | str = ""
    images_s: float | str = ""
    peak_mib: float | str = ""
    aten_calls: int | str = ""
    first_s: float | str = ""
    rounds: int | str = ""
    threads: int | str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""
    versions: str = ""
    commit: str = ""
    date: str = ""


COLUMNS = tuple(f.name for f in dataclasses.fields(Row))


def environment(device: torch.device) -> dict[str, str | int]:
    """The columns of a row that say where and on what it was measured."""
    return {
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "versions": " ".join(f"{p}={v}" for p in PEERS if (v := _version(p))),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def append(rows: list[Row], path: Path) -> None:
    """Add rows to a record; what is in it stays byte for byte.

    Raises:
        ValueError: the file has other columns, or does not end in a whole line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    header = ",".join(COLUMNS)
    if old and old.splitlines()[0] != header:
        raise ValueError(f"{path} has columns {old.splitlines()[0]}, want {header}")
    if old and not old.endswith("\n"):
        raise ValueError(f"{path} ends in half a line: {old.splitlines()[-1]!r}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not old:
        writer.writerow(COLUMNS)
    writer.writerows([_plain(v) for v in dataclasses.astuple(row)] for row in rows)
    # one write, so that a process that is killed leaves whole lines
    with path.open("ab", buffering=0) as file:
        file.write(text.getvalue().encode())
        os.fsync(file.fileno())


def results_file(device: torch.device, folder: Path = RESULTS) -> Path:
    """The record of this device: cpu-amd-epyc-25-17-avx512.csv, nvidia-h200.csv."""
    prefix = "cpu-" if device.type == "cpu" else ""
    return folder / f"{prefix}{_slug(device_name(device))}.csv"


def device_name(device: torch.device) -> str:
    """What it runs on: the GPU's name, or CPU model, its family and model numbers, and ISA."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.+)$", text.split("\n\n")[0], re.M))
    name = fields.get("model name") or platform.processor() or platform.machine()
    numbers = [fields[k] for k in ("cpu family", "model") if k in fields]
    return " ".join([name.strip(), *numbers, torch.backends.cpu.get_cpu_capability()])


def commit() -> str:
    """Short commit hash, with a + when the code differs from it; "" outside a repository."""
    sources = ["lorakern", "csrc", "bench", ":!lorakern/demo", ":!bench/results"]
    head = _git("rev-parse", "--short", "HEAD")
    return head + "+" if head and _git("status", "--porcelain", "--", *sources) else head


def missing(packages: tuple[str, ...] = PEERS) -> list[str]:
    """Those of the packages that are not installed."""
    return [p for p in packages if not _version(p)]


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _plain(value) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value

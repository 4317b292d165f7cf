"""All that a GPU is asked, in one command of a few minutes: build, test, bench, summary.

    python -m bench.gpu

Every stage is processes of its own, with a share of the time that is left. One that fails or runs
over is reported and the next begins; rows are in the record as soon as a case is measured. Ends
with 0 when all went well, 1 when a stage did not, 2 when there is no GPU to run on. A second run
finds everything compiled and comes further.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import record, report
from lorakern import backend

# seconds that processes have to end by themselves once they are told to
GRACE = 10
# processes of tests at once, for they mostly compile, which is the CPU's work
WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2))
# what is built or found early leaves its time to the others
BUILD, TESTS = 24, 10
# bench, which may be followed by a remark: share of the time, arguments, and those of --quick
BENCHES = {
    "lora_linear": (6, [], ["--case", "O320 I768 M77"]),
    "kron_linear": (5, [], ["--case", "O320 I768 M77 R16 F8"]),
    "hada_linear": (5, [], ["--case", "O320 I768 M77 R4"]),
    "decoupled_attention": (
        5,
        ["--case", "Q4096 H8", "--case", "Q1024 H8", "--case", "Q4096 H10"],
        ["--case", "Q64 H8 d160 T77+16+16"],
    ),
    "train_step of sd15": (12, ["--size", "64", "--batch", "4"], []),
    "dora": (4, [], ["--case", "O320 I768 M77"]),
    "lora_conv2d": (4, [], ["--case", "K1"]),
    "lora_linear_shared": (3, ["--case", "L3"], ["--case", "L2 O320"]),
    "overhead": (2, [], []),
    "unet_call of sd15": (4, ["--size", "64", "--images", "16"], ["--images", "16"]),
    "train_step of sdxl": (10, ["--size", "128", "--checkpointing"], ["--checkpointing"]),
    "hada_delta": (3, [], ["--case", "O320 I320 R4"]),
    "kron_delta": (3, [], ["--case", "O320 I320 F8"]),
    "lora_delta": (3, [], ["--case", "O320 I320 R4"]),
    "lora_linear compiled": (
        6,
        ["--compile", "--case", "O320 I320", "--case", "O2560", "--case", "O1280 I1280 M1024"],
        ["--compile", "--case", "O320 I768 M77"],
    ),
    "train_step of sd15 compiled": (
        15,
        ["--size", "64", "--batch", "4", "--compile", "--arms", "lorakern", "peft 16-bit",
         "peft 16-bit compiled"],
        ["--compile", "--arms", "lorakern", "peft 16-bit compiled"],
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Commands that run at once, and their share of the time, beside the other stages'.

    needs: a package without which the stage is left out.
    stop: how a command is told to end.
    """

    name: str
    share: float
    commands: list[list[str]]
    needs: str = ""
    stop: signal.Signals = signal.SIGTERM


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: "ok", "failed", "ran over" or "left out"."""

    name: str
    word: str
    seconds: float = 0.0
    why: str = ""


def main(argv: list[str] | None = None) -> int:
    """Run all stages and print what became of each; the exit code."""
    options = _parse(argv)
    device, start = torch.device(options.device), time.monotonic()
    for gone in record.missing():
        print(f"no rows, for it is not installed: {gone}", flush=True)
    file = record.results_file(device, options.results)
    before = len(report.read_file(file)) if file.exists() else 0
    todo, outcomes = stages(options), []
    try:
        for i, stage in enumerate(todo):
            left = start + 60 * options.minutes - GRACE - time.monotonic()
            seconds = max(0.0, left * stage.share / sum(s.share for s in todo[i:]))
            print(f"\n== {stage.name}: at most {seconds:.0f} s", flush=True)
            outcomes.append(run(stage, seconds, _environment(device)))
    except KeyboardInterrupt:
        outcomes.append(Outcome(stage.name, "failed", why="the run was stopped"))

    print(f"\n== {record.device_name(device)}, {time.monotonic() - start:.0f} s")
    for outcome in outcomes:
        print(f"{outcome.name:30}{outcome.word:10}{outcome.seconds:6.0f} s  {outcome.why}".rstrip())
    rows = report.read_file(file)[before:] if file.exists() else []
    print(f"{len(rows)} new rows in {file}")
    if rows:
        print(report.summary(report.groups(rows)))
    return int(any(o.word in ("failed", "ran over") for o in outcomes))


def stages(options: argparse.Namespace) -> list[Stage]:
    """What is run, the most wanted first."""
    python, on = [sys.executable], ["--device", options.device]
    build = [] if built(options.device) else [[*python, "setup.py", "build_ext", "--inplace", "-f"]]
    pytest = [*python, "-m", "pytest", "-p", "no:cacheprovider", "-rf", *on]
    workers = 1 if options.quick else WORKERS
    which = ["tests/ops/test_hada_delta.py", "-k", "matches"] if options.quick else ["tests/ops"]
    tests = [[*pytest, *which, "--part", f"{i}/{workers}"] for i in range(workers)]
    # interrupted, pytest says what had failed until then
    found = [Stage("build", BUILD, build), Stage("tests", TESTS, tests, stop=signal.SIGINT)]
    for name, (share, arguments, small) in BENCHES.items():
        bench, *remark = name.split()
        # of a UNet, not of an op
        whole = bench in ("train_step", "unet_call")
        command = (
            [*python, "-m", f"bench.{bench}"] if whole else [*python, "-m", "bench.run", bench]
        )
        command += ["--record", "--results", str(options.results), *on]
        command += ["--dtype", *(["bfloat16"] if whole else options.dtype)]
        if options.quick:
            model = ["--model", "tiny", "--size", "4"]
            command += [*small, "--rounds", "2", "--threads", "1"]
        else:
            model = ["--model", *remark[1:2]]
            command += [*arguments, "--seconds", "8" if whole else "0.5"]
        command += model if whole else []
        found.append(Stage(name, share, [command], needs="diffusers" if whole else ""))
    return found


def built(device: str) -> bool:
    """Whether the extension has this device's kernels, and no source is newer."""
    kind = "cuda" if device == "cuda" else "cpp"
    try:
        for op in backend.OPS.values():
            if kind in op.kernels:
                op.load(kind)
    except ImportError:
        return False
    libraries = (record.ROOT / "lorakern").glob("_native*.so")
    sources = (record.ROOT / "csrc").rglob("*.*")
    return min(_changed(libraries)) >= max(_changed(sources))


def run(stage: Stage, seconds: float, environment: dict[str, str]) -> Outcome:
    """Run the commands of a stage at once; what is not done in time is told to end, then killed."""
    if stage.needs and not importlib.util.find_spec(stage.needs):
        return Outcome(stage.name, "left out", why=f"{stage.needs} is not installed")
    if not stage.commands:
        return Outcome(stage.name, "ok", why="up to date")
    if seconds < 1:
        return Outcome(stage.name, "ran over", why="no time was left for it")
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        # several would write over each other
        several = len(stage.commands) > 1
        logs = [stack.enter_context(tempfile.TemporaryFile()) if several else None
                for _ in stage.commands]  # fmt: skip
        stack.enter_context(_heard_by_children())
        processes = [
            subprocess.Popen(command, cwd=record.ROOT, env=environment, stdout=log,
                             stderr=subprocess.STDOUT if several else None, start_new_session=True)
            for command, log in zip(stage.commands, logs, strict=True)
        ]  # fmt: skip
        try:
            over = not _wait(processes, seconds)
        finally:
            _end(processes, stage.stop)
            for log in filter(None, logs):
                log.seek(0)
                print(log.read().decode(errors="replace"), flush=True)
    took = time.monotonic() - start
    failed = [p.returncode for p in processes if p.returncode]
    if over:
        return Outcome(stage.name, "ran over", took, f"stopped after {seconds:.0f} s")
    if failed:
        return Outcome(stage.name, "failed", took, f"exit {', '.join(map(str, failed))}")
    return Outcome(stage.name, "ok", took)


@contextlib.contextmanager
def _heard_by_children():
    """Children started within hear SIGINT, also those of a background job, which ignores it."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _wait(processes: list[subprocess.Popen], seconds: float) -> bool:
    """Whether all have ended in this time."""
    end = time.monotonic() + seconds
    try:
        for process in processes:
            process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(processes: list[subprocess.Popen], stop: signal.Signals) -> None:
    """Those that still run, with their children."""
    for how in (stop, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, how)
        if _wait(processes, GRACE):
            return


def _environment(device: torch.device) -> dict[str, str]:
    known = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if device.type == "cuda":
        architecture = ".".join(map(str, torch.cuda.get_device_capability(device)))
        known = {"TORCH_CUDA_ARCH_LIST": architecture, **known}
    return {**known, "LORAKERN_BUILD": "cuda" if device.type == "cuda" else "cpu"}


def _changed(files) -> list[float]:
    return [f.stat().st_mtime for f in files]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], help="of the ops")
    parser.add_argument("--results", type=Path, help="another folder than bench/results")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="try every stage on its smallest case; rows go to a folder of their own",
    )
    options = parser.parse_args(argv)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error(
                f"torch {torch.__version__} sees no NVIDIA GPU; --device cpu --quick tries the"
                " stages without one"
            )
        if (has := torch.cuda.get_device_capability()) < (8, 0):
            parser.error(f"want a GPU of sm_80 or newer, got sm_{has[0]}{has[1]}")
    elif not options.quick:
        parser.error("--device cpu is for a trial, with --quick")
    if options.results is None:
        options.results = Path(tempfile.mkdtemp()) if options.quick else record.RESULTS
    return options


if __name__ == "__main__":
    # as Ctrl-C: end the stage, and say what there is
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())

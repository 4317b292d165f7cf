"""The one command for a GPU, on a stand-in: stages, their time, and what becomes of them."""

import importlib
import re
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from bench import gpu, record, report, run, timing

TRIAL = ["--device", "cpu", "--quick"]


def stage(*codes, name="it", share=1.0, **more):
    return gpu.Stage(name, share, [[sys.executable, "-c", code] for code in codes], **more)


def outcome(*codes, seconds=30.0, **more):
    return gpu.run(stage(*codes, **more), seconds, gpu._environment(torch.device("cpu")))


def test_what_becomes_of_a_stage(capfd):
    assert outcome("print('seen')").word == "ok"
    assert "seen" in capfd.readouterr().out
    failed = outcome("print('first')", "print('second'); raise SystemExit(3)")
    assert (failed.word, failed.why) == ("failed", "exit 3")
    assert "first" in (out := capfd.readouterr().out) and "second" in out
    left = outcome("1/0", needs="no_such_package")
    assert (left.word, left.why) == ("left out", "no_such_package is not installed")
    assert outcome().word == "ok"


@pytest.mark.parametrize("deaf", [False, True])
def test_what_runs_over_is_ended_with_its_children(deaf, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 1)
    child = f"import time; time.sleep(4); open({str(tmp_path / 'late')!r}, 'w')"
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " * deaf
    start = time.monotonic()
    over = outcome(
        f"{ignore}import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])",
        seconds=1.0,
    )
    assert over.word == "ran over" and time.monotonic() - start < 4
    time.sleep(max(0.0, start + 5.5 - time.monotonic()))
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("here", [signal.default_int_handler, signal.SIG_IGN], ids=["", "ignored"])
def test_an_interrupted_stage_may_say_what_it_knows(here, capfd):
    before = signal.signal(signal.SIGINT, here)
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('2 failed')"
    try:
        over = outcome(code, seconds=8.0, stop=signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is here
    finally:
        signal.signal(signal.SIGINT, before)
    assert over.word == "ran over" and "2 failed" in capfd.readouterr().out


@pytest.fixture
def main(monkeypatch, tmp_path):
    """The command with these stages, in a folder of its own."""

    def call(*stages, more=()):
        monkeypatch.setattr(gpu, "stages", lambda options: list(stages))
        return gpu.main([*TRIAL, "--results", str(tmp_path), *more])

    return call


def test_the_next_stage_goes_on_and_rows_are_kept(main, capfd, tmp_path):
    file = record.results_file(torch.device("cpu"), tmp_path)
    old = record.Row("old", "", "float32", "frozen", "fwd", 1.0, 0.1, "", 1.0, 1.0, 0, date="2020")
    record.append([old], file)
    before = file.read_text()
    (bench,) = (s for s in gpu.stages(_options(tmp_path)) if s.name == "overhead")
    code = main(stage("1/0", name="bad"), bench, stage("", name="last", needs="no_such_package"))
    assert code == 1 and file.read_text().startswith(before)
    out = capfd.readouterr().out
    became = dict(re.findall(r"^(bad|overhead|last) +(failed|ok|left out) ", out, re.M))
    assert became == {"bad": "failed", "overhead": "ok", "last": "left out"}
    assert "new rows in" in out and "best rival's time" in out
    rows = report.read_file(file)[1:]
    assert {r.op for r in rows} == {"overhead"} and f"\n{len(rows)} new rows" in out
    assert main(stage("pass")) == 0


def test_time_that_is_left_goes_to_the_next(main, capfd):
    stages = (stage("pass", name="short", share=3), stage("pass", name="b"), stage("", name="c"))
    assert main(*stages, more=["--minutes", "1"]) == 0
    at_most = [float(line.split()[-2]) for line in capfd.readouterr().out.splitlines()
               if line.startswith("==") and "at most" in line]  # fmt: skip
    whole = 60 - gpu.GRACE
    assert at_most[0] == pytest.approx(0.6 * whole, abs=1)
    assert at_most[0] > at_most[1] > 0.25 * whole and at_most[2] > at_most[1]


def test_without_time_nothing_is_begun(main, capfd):
    assert main(stage("print('begun')"), more=["--minutes", "0"]) == 1
    out = capfd.readouterr().out
    assert "begun" not in out and "no time was left for it" in out


def test_a_stop_ends_the_stage_and_is_reported(main, monkeypatch, capfd):
    def stopped(processes, seconds):
        if seconds > gpu.GRACE:
            raise KeyboardInterrupt
        return wait(processes, seconds)

    wait = gpu._wait
    monkeypatch.setattr(gpu, "_wait", stopped)
    assert main(stage("import time; time.sleep(60)"), stage("pass", name="never")) == 1
    out = capfd.readouterr().out
    assert "the run was stopped" in out and "never" not in out


@pytest.mark.parametrize("quick", [True, False])
def test_every_stage_is_a_command_that_there_is(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "built", lambda device: False)
    options = _options(tmp_path)
    options.quick = quick
    stages = gpu.stages(options)
    assert [s.name for s in stages[:2]] == ["build", "tests"] and stages[0].commands
    # its only kernel is for CPUs
    assert {s.name for s in stages} > set(run.OPS) - {"frozen_linear"}
    for found in stages[2:]:
        (command,) = found.commands
        module, *arguments = command[2:]
        parsed = importlib.import_module(module)._parse(arguments)
        assert parsed.record and parsed.results == tmp_path and parsed.device == "cpu"
        if module == "bench.run":
            bench = importlib.import_module(f"bench.ops.{parsed.op}")
            hit = [
                c for c in bench.CASES if not parsed.case or any(w in str(c) for w in parsed.case)
            ]
            assert 0 < len(hit) <= (2 if quick else 40)


def test_parts_are_the_tests_that_use_the_device(request):
    conftest = request.config.pluginmanager.get_plugin(str(record.ROOT / "tests" / "conftest.py"))

    def part(which):
        items = [SimpleNamespace(fixturenames=["device"] * (i % 3 > 0), i=i) for i in range(9)]
        option = SimpleNamespace(getoption={"--part": which}.get)
        conftest.pytest_collection_modifyitems(option, items)
        return [item.i for item in items]

    assert part(None) == list(range(9)) and part("0/1") == [1, 2, 4, 5, 7, 8]
    assert (part("0/4"), part("3/4")) == ([1, 7], [5])


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, said in ([], "sees no NVIDIA GPU"), (["--device", "cpu"], "with --quick"):
        with pytest.raises(SystemExit) as raised:
            gpu.main(arguments)
        assert raised.value.code == 2 and said in capsys.readouterr().err


def test_a_gpu_decides_what_is_built(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(gpu, "built", lambda device: False)
    options = gpu._parse(["--results", str(tmp_path)])
    made = gpu._environment(torch.device(options.device))
    assert (made["LORAKERN_BUILD"], made["TORCH_CUDA_ARCH_LIST"]) == ("cuda", "9.0")
    assert "TRITON_INTERPRET" not in made
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0+PTX")
    assert gpu._environment(torch.device("cuda"))["TORCH_CUDA_ARCH_LIST"] == "8.0+PTX"
    commands = [command for s in gpu.stages(options) for command in s.commands]
    assert commands[0][1:] == ["setup.py", "build_ext", "--inplace", "-f"]
    assert all("cuda" in command for command in commands[1:])

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(SystemExit):
        gpu._parse([])
    assert "want a GPU of sm_80 or newer, got sm_75" in capsys.readouterr().err


def test_built_means_all_kernels_from_these_sources(monkeypatch):
    op = next(o for o in gpu.backend.OPS.values() if "cpp" in o.kernels)
    if not gpu.built("cpu"):
        pytest.skip("the extension is not built, or older than its sources")
    monkeypatch.setattr(gpu, "_changed", lambda files: [len(list(files))])
    assert not gpu.built("cpu")
    monkeypatch.undo()
    monkeypatch.setitem(op.kernels, "cpp", gpu.backend.Kernel("native:no_such"))
    monkeypatch.delitem(op._loaded, "cpp", raising=False)
    assert not gpu.built("cpu")


def test_a_sample_on_a_gpu_starts_on_an_idle_device_with_a_cold_cache(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            log.append("record")

        def synchronize(self):
            log.append("wait for event")

        def elapsed_time(self, end):
            return 5.0

    class Stream:
        def synchronize(self):
            log.append("idle")

    class Flushed:
        def zero_(self):
            log.append("flush")

    class Properties:
        L2_cache_size = 100

    def empty(size, **_):
        assert size == 200
        return Flushed()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch, "empty", empty)
    sample = timing._sample_cuda(torch.device("cuda"))
    assert sample(lambda: log.append("call"), 2) == pytest.approx(5e-3)
    assert log == 2 * ["flush", "idle", "record", "call", "record", "wait for event"]


def test_a_slow_first_call_does_not_cost_rounds():
    calls = []

    def compiles_first():
        calls.append(time.sleep(0.0 if calls else 0.3))

    arms = {"compiled": compiles_first}
    assert len(timing.interleave(arms, torch.device("cpu"), seconds=0.3)["compiled"].seconds) > 3


def _options(folder):
    return gpu._parse([*TRIAL, "--results", str(folder)])

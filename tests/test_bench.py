"""The benches: nothing wrong is timed, rows are whole, a record only grows."""

import csv
import importlib
from itertools import pairwise

import pytest
import torch

from bench import peers, record, run, timing, train_step, usage
from lorakern import backend
from lorakern.testing import tensors

STEP = ["--model", "tiny", "--size", "4", "--threads", "1"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def untimed(monkeypatch):
    monkeypatch.setattr(timing, "interleave", lambda *_, **__: pytest.fail("it was timed"))


def test_a_wrong_kernel_is_not_timed(monkeypatch, untimed):
    op = backend.OPS["lora_linear_fwd"]
    right = op.load("reference")
    monkeypatch.setitem(op.kernels, "wrong", backend.Kernel("native:wrong"))
    monkeypatch.setitem(op._loaded, "wrong", lambda *args: tuple(1.01 * t for t in right(*args)))
    with pytest.raises(AssertionError, match="lora_linear_fwd on wrong, result 0: max error"):
        run.main(["overhead", "--dtype", "float32", "--threads", "1"])


@pytest.mark.parametrize("maker", ["_lorakern", "_peft", "lycoris", "loralib"])
def test_a_wrong_layer_is_not_timed(maker, monkeypatch, untimed):
    right = getattr(peers, maker)

    def twice(plain, rank, alpha, **options):
        return right(plain, rank, 2 * alpha, **options)

    monkeypatch.setattr(peers, maker, twice)
    with pytest.raises(AssertionError, match=maker.strip("_")):
        run.main(["overhead", "--dtype", "float32", "--threads", "1"])


def test_a_wrong_step_is_not_timed(monkeypatch, untimed):
    right = peers.lycoris

    def twice(plain, rank, alpha, **options):
        return right(plain, rank, 2 * alpha, **options)

    monkeypatch.setattr(peers, "lycoris", twice)
    with pytest.raises(AssertionError, match="lycoris predicts"):
        train_step.main([*STEP, "--arms", "lorakern", "lycoris"])


def test_rows_of_an_op(tmp_path, capsys):
    command = ["overhead", "--rounds", "3", "--dtype", "float32", "bfloat16", "--threads", "1"]
    run.main([*command, "--record", "--results", str(tmp_path)])
    (file,) = tmp_path.iterdir()
    rows = list(csv.DictReader(file.open()))
    assert tuple(rows[0]) == record.COLUMNS
    arms = {r["backend"] for r in rows}
    assert {"frozen", "lorakern", "reference"} <= arms
    # "peft 16-bit" is "peft" in float32
    assert len(rows) == 3 * (2 * len(arms) - ("peft 16-bit" in arms))
    for row in rows:
        assert float(row["median_us"]) > 0 and float(row["gb_s"]) > 0 and row["rounds"] == "3"
        assert row["device"] and row["torch"] == torch.__version__ and row["date"]
        if row["backend"] == "frozen":
            assert float(row["cost_over_frozen"]) == 1 and row["saved_bytes"] == "0"
    # h [4, 4] in float32 is all that is kept beside the input and the parameters
    kept = {r["saved_bytes"] for r in rows if (r["backend"], r["dtype"]) == ("lorakern", "float32")}
    assert kept == {str(4 * 4 * 4)}
    printed = capsys.readouterr().out
    assert printed.count("overhead O8 I8 M4 R4") == 2 and "*" in printed


def test_rows_of_an_op_that_no_frozen_layer_has(tmp_path):
    case = ["--case", "Q64 H8 d160 T77+16+16", "--dtype", "float32", "--threads", "1"]
    command = ["decoupled_attention", *case, "--rounds", "2", "--record"]
    run.main([*command, "--results", str(tmp_path)])
    (file,) = tmp_path.iterdir()
    rows = list(csv.DictReader(file.open()))
    floor = [r for r in rows if r["backend"] == "diffusers"]
    assert [float(r["cost_over_frozen"]) for r in floor] == [1, 1]
    kept = {r["backend"]: int(r["saved_bytes"]) for r in rows if r["saved_bytes"]}
    # q, keys and values are the caller's; three outputs of two calls and an add are not
    assert kept["lorakern"] == 0 < kept["diffusers"]


@pytest.mark.parametrize("op", [op for op in run.OPS if op != "overhead"])
def test_every_bench_measures_its_smallest_case(op, capsys, monkeypatch):
    bench = importlib.import_module(f"bench.ops.{op}")
    for name in (bench.FORWARD, bench.BACKWARD):
        # in its interpreter it takes minutes
        monkeypatch.delitem(backend.OPS[name].kernels, "triton", raising=False)
    cpu = torch.device("cpu")
    sizes = [
        sum(t.nbytes for t in tensors(bench.inputs(c, torch.float32, cpu))) for c in bench.CASES
    ]
    case = bench.CASES[sizes.index(min(sizes))]
    run.main([op, "--case", str(case), "--dtype", "float32", "--rounds", "1", "--threads", "1"])
    printed = capsys.readouterr().out
    assert f"{op} {case} float32" in printed
    assert {bench.FLOOR, "lorakern", "reference"} <= {
        line.split()[0] for line in printed.splitlines() if line
    }


def test_rows_of_a_step(tmp_path):
    arms = ["--arms", "lorakern", "peft"]
    train_step.main([*STEP, *arms, "--rounds", "2", "--record", "--results", str(tmp_path)])
    (file,) = tmp_path.iterdir()
    rows = {r["backend"]: r for r in csv.DictReader(file.open())}
    assert next(iter(rows)) == "frozen" and "lorakern" in rows
    frozen = rows.pop("frozen")
    for row in rows.values():
        assert row["case"] == "tiny 4x4 B1 attn R16" and row["direction"] == "step"
        assert float(row["images_s"]) > 0 and float(row["first_s"]) > 0
        for more in ("aten_calls", "peak_mib", "saved_bytes"):
            assert float(row[more]) > float(frozen[more]) > 0, more


@pytest.mark.parametrize("algo", ["loha", "lokr"])
def test_a_step_of_every_library_agrees(algo, capsys):
    train_step.main([*STEP, "--algo", algo, "--rank", "4", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert f"tiny 4x4 B1 attn {algo} R4 float32" in printed
    for arm in ("frozen", "lorakern", "peft", "lycoris", "lycoris bypass"):
        assert f"  {arm}  " in printed


def test_what_is_compiled_is_called_so(tmp_path, monkeypatch):
    called = []

    def compile(function):
        return lambda *args, **more: called.append(function) or function(*args, **more)

    # inductor takes minutes for a UNet
    monkeypatch.setattr(torch, "compile", compile)
    record_to = ["--rounds", "1", "--compile", "--record", "--results", str(tmp_path)]
    run.main(["overhead", "--dtype", "bfloat16", "--threads", "1", *record_to])
    assert called
    called.clear()
    train_step.main([*STEP, "--arms", "lorakern", "peft compiled", *record_to])
    assert called
    (file,) = tmp_path.iterdir()
    rows = {r["backend"]: r for r in csv.DictReader(file.open()) if "compiled" in r["backend"]}
    # of the two in 16-bit the leaner one, and no operators to count
    assert list(rows) == ["peft 16-bit compiled", "peft compiled"]
    assert rows["peft 16-bit compiled"]["saved_bytes"] == "32"
    assert rows["peft compiled"]["aten_calls"] == "" and float(rows["peft compiled"]["first_s"]) > 0


def test_a_record_only_grows(tmp_path):
    file = tmp_path / "deeper" / "cpu.csv"
    row = record.Row("op", "a, b", "float32", "cpp", "fwd", 1 / 3, 0.1, 2.0, 1.0, 1.0, 64)
    record.append([row], file)
    before = file.read_text()
    record.append([row, row], file)
    assert file.read_text().startswith(before)
    rows = list(csv.DictReader(file.open()))
    assert len(rows) == 3 and rows[0]["case"] == "a, b" and rows[0]["median_us"] == "0.33333"

    for text in ("other,columns\n", before.rstrip("\n")):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"cpu\.csv (has columns|ends in half a line)"):
            record.append([row], file)
        assert file.read_text() == text


def test_costs_are_ratios_within_a_round():
    base, arm = timing.Times([1.0, 10.0, 10.0]), timing.Times([2.0, 20.0, 2.0])
    assert arm.over(base) == 2.0
    assert (arm.median, arm.iqr) == (2.0, 9.0)


def test_rounds_are_interleaved():
    called = []
    arms = {name: lambda name=name: called.append(name) for name in "abc"}
    taken = timing.interleave(arms, torch.device("cpu"), seconds=9, rounds=6)
    assert {name: len(t.seconds) for name, t in taken.items()} == {"a": 6, "b": 6, "c": 6}
    runs = [called[0]] + [b for a, b in pairwise(called) if a != b]
    assert called.count("a") == called.count("b") == called.count("c")
    assert len({tuple(runs[i : i + 3]) for i in range(3, len(runs) - 3, 3)}) > 1


def test_memory_and_calls_are_counted():
    x = torch.ones(256, 1024, requires_grad=True)
    assert usage.saved_bytes(lambda: (x.exp() * x.view(-1, 1024)).sum(), [x]) == x.nbytes
    assert usage.saved_bytes(lambda: x.view(-1) * x.view(-1), [x]) == 0

    def two_at_once():
        kept = [torch.ones(2**18) for _ in range(2)]
        del kept
        torch.ones(2**18)

    assert usage.peak_mib(two_at_once, torch.device("cpu")) == 2.0
    assert usage.aten_calls(lambda: x.detach().view(-1).exp().sum()) == 2

"""The rules of the house that a machine can keep: what is where, what imports what, how long."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lorakern
from lorakern import functional

ROOT = Path(__file__).parent.parent
PACKAGE = Path(lorakern.__file__).parent
OPS = sorted(p.name for p in (PACKAGE / "ops").iterdir() if (p / "op.py").exists())
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)
LAZY = {"triton", "diffusers", "transformers", "pydantic", "peft", "lycoris", "loralib", "PIL"}
# lines
LIMITS = {"reference.py": 60, "op.py": 120}
KERNEL_LIMIT, ADAPTER_LIMIT, LIMIT = 250, 120, 400


def ids(path):
    return str(path.relative_to(ROOT))


def imported(path):
    """Names of the top-level packages a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def registry(path):
    """Names that a registry file imports from modules."""
    nodes = ast.parse(path.read_text()).body
    return {a.name for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}


def registers(folder):
    """Files of a folder that enter something in its registry: @register(...) or define(...)."""
    return {
        path.stem
        for path in (PACKAGE / folder).glob("*.py")
        if re.search(r"^(@register|define)\(", path.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("op", OPS)
def test_each_op_has_a_spec_a_test_a_bench_and_a_public_function(op):
    assert (PACKAGE / "ops" / op / "reference.py").exists()
    assert (ROOT / "tests/ops" / f"test_{op}.py").exists()
    assert (ROOT / "bench/ops" / f"{op}.py").exists()
    assert op in functional.__all__ and callable(getattr(functional, op))


def test_each_launcher_and_each_test_has_an_op():
    # headers are shared; a .cpp or .cu, like a test, is named after its op, with a suffix or not,
    # or after what several ops share. What changes its arguments in place is no op: it has the name
    # of the module that calls it
    launchers = [p for p in (ROOT / "csrc").rglob("*.c*") if p.suffix in (".cpp", ".cu", ".cuh")]
    shared = [p.stem for p in (PACKAGE / "ops").glob("[!_]*_*.py")]
    for path in (*launchers, *(ROOT / "tests/ops").glob("test_*.py")):
        stem = path.stem.removeprefix("test_")
        names = OPS + shared if path in launchers else OPS
        of_module = path in launchers and (PACKAGE / f"{stem}.py").exists()
        known = of_module or any(stem == name or stem.startswith(f"{name}_") for name in names)
        assert known, ids(path)


@pytest.mark.parametrize("folder", ["adapters", "formats"])
def test_whatever_registers_itself_is_imported_by_the_registry(folder):
    missing = registers(folder) - registry(PACKAGE / folder / "__init__.py")
    assert registers(folder) and not missing, f"not imported in {folder}/__init__.py: {missing}"


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_only_triton_files_import_triton(path):
    may = path.name.startswith("triton_") and path.parent.parent.name == "ops"
    assert may or "triton" not in imported(path)


def test_import_takes_no_optional_package():
    script = (
        "import json, sys, torch; before = set(sys.modules); import lorakern;"
        "print(json.dumps(sorted({m.partition('.')[0] for m in set(sys.modules) - before})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    )
    new = set(json.loads(done.stdout.splitlines()[-1]))
    assert "lorakern" in new
    assert not new & LAZY


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_a_file_says_what_it_is(path):
    if path.read_text().strip():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{ids(path)} has no docstring"


def test_no_file_is_too_long():
    files = [p for folder in ("lorakern", "bench", "tests") for p in (ROOT / folder).rglob("*.py")]
    files += [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    algorithms = {PACKAGE / "adapters" / f"{name}.py" for name in registers("adapters")}
    too_long = []
    for path in files:
        limit = LIMIT
        # a checkout may be called lorakern too
        parts = path.relative_to(ROOT).parts
        if path in algorithms:
            limit = ADAPTER_LIMIT
        elif parts[:2] == ("lorakern", "ops"):
            limit = LIMITS.get(path.name, KERNEL_LIMIT)
        elif parts[0] == "csrc":
            limit = KERNEL_LIMIT
        lines = len(path.read_text().splitlines())
        if lines > limit:
            too_long.append(f"{ids(path)} has {lines} lines, at most {limit}")
    assert not too_long, "; ".join(too_long)

"""What setup.py decides to build, asked of its functions; nothing is compiled."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build(monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("lorakern_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_none_builds_nothing(build):
    assert build.extension("none") == {}


def test_an_unknown_mode_names_the_known_ones(build):
    with pytest.raises(SystemExit, match="auto, cpu, cuda, none, got 'gpu'"):
        build.extension("gpu")


@pytest.mark.parametrize("mode", ["auto", "cpu"])
def test_sources_are_found_by_glob(build, mode):
    (native,) = build.extension(mode)["ext_modules"]
    assert native.name == "lorakern._native"
    assert {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.cpp")} <= {*native.sources}


def test_a_source_distribution_and_a_rebuild_know_all_of_csrc(build):
    (native,) = build.extension("auto")["ext_modules"]
    files = {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.is_file()}
    assert files and files <= {*native.sources, *native.depends}


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_asked_for_without_cuda_is_an_error_with_the_reason(build):
    with pytest.raises(SystemExit, match=r"LORAKERN_BUILD=cuda: .* has no CUDA"):
        build.extension("cuda")


@pytest.mark.parametrize("mode", ["auto", "cpu", "cuda"])
def test_a_torch_with_cuda_and_an_nvcc_add_the_cuda_sources(build, mode, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    (native,) = build.extension(mode)["ext_modules"]
    sources = {p for p in native.sources if p.startswith("csrc/cuda/")}
    wanted = {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu")}
    assert wanted and sources == (set() if mode == "cpu" else wanted)
    assert native.include_dirs[0] == str(ROOT / "csrc")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_auto_without_cuda_builds_the_cpu_part(build):
    (native,) = build.extension("auto")["ext_modules"]
    cpu = {"csrc", "csrc/cpu"}
    assert {str(Path(s).parent) for s in native.sources} == cpu


def test_without_torch_auto_installs_pure_python_and_says_so(build, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert build.extension("auto") == {}
    said = capsys.readouterr().err
    assert "without its compiled kernels" in said and "--no-build-isolation" in said
    with pytest.raises(SystemExit, match="LORAKERN_BUILD=cpu"):
        build.extension("cpu")


def command(build, mode, folder):
    """build_ext as setuptools has it when it begins to compile into this folder."""
    made = build.extension(mode)
    command = object.__new__(made["cmdclass"]["build_ext"])
    command.extensions, command.force = made["ext_modules"], False
    command.build_temp = folder / "temp"
    command.get_ext_fullpath = lambda name: str(folder / "made.so")
    return command


def test_a_failed_compiler_leaves_auto_pure_python(build, monkeypatch, capsys, tmp_path):
    def fail(self):
        raise RuntimeError("Error compiling objects for extension")

    monkeypatch.setattr(cpp_extension.BuildExtension, "build_extensions", fail)
    lenient = command(build, "auto", tmp_path)
    lenient.build_extensions()
    assert lenient.extensions == []
    assert "Error compiling objects" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="Error compiling objects"):
        command(build, "cpu", tmp_path).build_extensions()


def test_where_cuda_does_not_build_auto_builds_the_cpu_part(build, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    built = []

    def no_cuda(self):
        (native,) = self.extensions
        if "cudart" in native.libraries:
            raise RuntimeError("the detected CUDA version (12.4) mismatches (13.0)")
        built.extend(native.sources)

    monkeypatch.setattr(cpp_extension.BuildExtension, "build_extensions", no_cuda)

    auto = command(build, "auto", tmp_path)
    auto.extensions[0]._full_name = "lorakern._native"
    auto.build_extensions()
    assert built and not [s for s in built if s.endswith(".cu")]
    assert auto.extensions[0]._full_name == "lorakern._native"
    assert "no CUDA kernels, the build failed: the detected CUDA" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="LORAKERN_BUILD=cuda: the build failed: the detected"):
        command(build, "cuda", tmp_path).build_extensions()


def test_what_does_not_load_is_compiled_again_and_whole(build, monkeypatch, tmp_path):
    monkeypatch.setattr(cpp_extension.BuildExtension, "build_extensions", lambda self: None)
    object_file, other = tmp_path / "temp" / "arena.o", tmp_path / "made.so"

    def is_forced(made):
        object_file.parent.mkdir(exist_ok=True)
        object_file.touch()
        again = command(build, "auto", tmp_path)
        again.get_ext_fullpath = lambda name: str(made)
        again.build_extensions()
        assert object_file.exists() != again.force
        return again.force

    assert not is_forced(other)
    other.write_bytes(b"not a library")
    assert is_forced(other)
    assert not is_forced(torch._C.__file__)


def test_the_instruction_set_can_be_named(build, monkeypatch):
    monkeypatch.setenv("LORAKERN_ARCH", "x86-64-v3")
    (native,) = build.extension("cpu")["ext_modules"]
    assert "-march=x86-64-v3" in native.extra_compile_args["cxx"]
    monkeypatch.delenv("LORAKERN_ARCH")
    (native,) = build.extension("cpu")["ext_modules"]
    assert any(f.endswith("=native") for f in native.extra_compile_args["cxx"])

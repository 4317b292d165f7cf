"""Device, seed, and fresh memory that is full of NaN, so that an unwritten element shows."""

import gc
import importlib.util
import os

# threads that wait would take the core of a second test process
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

# the same examples in every run; HYPOTHESIS_PROFILE=default looks for new ones
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

if not torch.cuda.is_available():
    # Triton kernels then run on the CPU, slowly; read once, when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
        import triton_interpreter

        triton_interpreter.prepare_once()


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.addoption(
        "--part",
        help="i/n: of the tests that use the device, each n-th, from the i-th (0 is first)",
    )


def pytest_collection_modifyitems(config, items):
    if part := config.getoption("--part"):
        first, step = map(int, part.split("/"))
        items[:] = [item for item in items if "device" in item.fixturenames][first::step]


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def cuda_host(tmp_path_factory):
    """The CUDA launchers on the host, compiled once a session by the process that is first."""
    import cuda_aot
    import filelock

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with filelock.FileLock(folder / "cuda_host.lock"):
        return cuda_aot.host_library(folder)


@pytest.fixture(autouse=True, scope="module")
def _only_new_objects_are_looked_through():
    # a collection, which each run of the trainer asks for, takes .4 s with all that is imported
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed_and_poison():
    torch.manual_seed(0)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled

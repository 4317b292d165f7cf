"""The CUDA launchers on the host, compiled once a session."""

import cuda_aot
import pytest


@pytest.fixture(scope="session")
def cuda_host(tmp_path_factory):
    return cuda_aot.host_library(tmp_path_factory.mktemp("cuda_host"))

"""What a run's device brings with it."""

import os
import subprocess
import sys

import pytest

# page faults of eight blocks of 64 MiB, written one after the other, before and after
FAULTS = """
import resource
import torch
from lorakern.devices import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
before = faults()
keep_freed_memory(torch.device("cpu"))
# what else is allocated may take a block's place, once
faults()
print(before, faults())
"""


def faults_of(**settings):
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**plain, **settings}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


@pytest.mark.skipif(sys.platform != "linux", reason="another C library")
def test_freed_memory_is_used_again_without_new_pages():
    before, after = faults_of()
    # 4096 pages a block; some machines have pages of 2 MiB
    assert before >= 8 * 32 > 8 >= after


@pytest.mark.skipif(sys.platform != "linux", reason="another C library")
def test_a_setting_of_the_users_own_stays():
    before, after = faults_of(MALLOC_MMAP_THRESHOLD_=str(2**20))
    assert min(before, after) >= 8 * 32

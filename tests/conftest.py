"""What the tests of several ops share."""

import os

import pytest

# Read as torch is loaded. Threads that wait sleep: by default they spin, on cores where other tests run.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402

# Before anything imports triton: kernels run in its interpreter where there is no GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fast_prompt.backends import cpu  # noqa: E402

# Fixtures that run a whole program: what asks for one is a gate.
WHOLE_PROGRAMS = {"dry_run", "two_runs", "finished"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Gates first: they take longest, and what is short fills up the time at the end."""
    for item in items:
        if WHOLE_PROGRAMS.intersection(item.fixturenames):
            item.add_marker("gate")
    items.sort(key=lambda item: item.get_closest_marker("gate") is None)


@pytest.fixture
def poisoned_memory():
    """Every torch.empty, and the C++ kernels' own scratch, starts as NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    if cpu.unavailable() is None:
        cpu.poison_scratch(True)
    yield
    torch.use_deterministic_algorithms(before)
    if cpu.unavailable() is None:
        cpu.poison_scratch(False)


@pytest.fixture
def cpu_restored():
    """Threads and instruction set are as before, whatever the test does to them."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    cpu.select_isa()


@pytest.fixture(params=[] if cpu.unavailable() else cpu.isa_levels())
def level(request, cpu_restored):
    """Every instruction set that this machine has, selected."""
    cpu.select_isa(request.param)
    return request.param

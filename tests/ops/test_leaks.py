"""What the ops leave behind in a process: nothing that grows with the calls, and no scratch for every thread."""

import ctypes
import gc
import threading

import pytest
import torch

import fast_prompt
from fast_prompt import ops
from fast_prompt.backends import cpu

LIBC = ctypes.CDLL(None)
CALLS = 500

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
    pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="this C library does not count what it has allocated"),
    pytest.mark.gate,
]


class Mallinfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = (
        ("blocks", ctypes.c_size_t * 4),
        ("mapped", ctypes.c_size_t),
        ("unused", ctypes.c_size_t * 2),
        ("in_use", ctypes.c_size_t),
        ("free", ctypes.c_size_t * 2),
    )


def allocated_bytes():
    """By malloc, in every thread: what is in use of its arenas, and what was mapped by itself."""
    gc.collect()
    function = LIBC.mallinfo2
    function.restype = Mallinfo
    info = function()
    return info.in_use + info.mapped


def prompt_diffusion(**options):
    shapes = [(1, 1, 4), (1, 1, 4), (1, 4), (1, 4), ()]
    return lambda tensors: ops.prompt_diffusion(*tensors, **options), shapes


def prompt_compress(**options):
    shapes = [(1, 1, 4), (1, 8, 4), (4, 4), (4, 4), (4,), (4,)]
    return lambda tensors: ops.prompt_compress(*tensors, num_heads=1, form="absorbed", **options), shapes


def skip_adapter(*gates, **options):
    shapes = [(2, 1, 4), (1, 4), (4, 1), (1,), (1, 4) if gates else (4,), (4,), (4,), (1,), *gates]
    return lambda tensors: ops.skip_adapter(*tensors, norm="layer", **options), shapes


def route(**options):
    shapes = [(2, 1, 4), (1, 1, 4), (1, 4, 1)]
    return lambda tensors: ops.skip_adapter(*tensors, route=[0, 0], **options), shapes


VARIANTS = {
    "prompt_diffusion": prompt_diffusion(activation="softmax"),
    "prompt_diffusion, dropout": prompt_diffusion(dropout_p=0.5, row_weight="none"),
    "prompt_compress": prompt_compress(),
    "prompt_compress, dropout": prompt_compress(dropout_p=0.5),
    "skip_adapter": skip_adapter(activation="silu", residual="normed"),
    "skip_adapter, dropout": skip_adapter(dropout_p=0.5),
    "skip_adapter, gates": skip_adapter((2, 1)),
    "skip_adapter, route": route(),
}


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_call_leaves_memory_behind(variant, trains):
    function, shapes = VARIANTS[variant]
    tensors = [torch.ones(shape, requires_grad=trains) for shape in shapes]

    def call():
        output = function(tensors)
        if trains:
            torch.autograd.grad(output.sum(), tensors)

    with fast_prompt.use_backend("cpu"):
        for _ in range(100):
            call()
        before = allocated_bytes()
        for _ in range(CALLS):
            call()
    assert allocated_bytes() - before < 8 * CALLS


def test_idle_threads_keep_no_scratch_of_their_own():
    """Each call below takes 4 MB: kept by every thread, that would be 256 MB."""
    threads, most_kept, other = 64, 1 << 26, 1 << 24
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((8, 16, 768), (8, 16, 768), (200, 768), (200, 768))]
    log_scale = torch.zeros(())
    idle, measured = threading.Barrier(threads + 1), threading.Event()

    def work():
        torch.autograd.grad(ops.prompt_diffusion(*tensors, log_scale).sum(), tensors)
        idle.wait()
        measured.wait()

    before = allocated_bytes()
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    idle.wait()
    kept = allocated_bytes() - before
    measured.set()
    for worker in workers:
        worker.join()
    assert kept < most_kept + other

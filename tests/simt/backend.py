"""The CUDA kernels on the CPU as a backend: ``use_backend("simt")``, once ``install()`` has been called.

The binding is CUDA's own but for memory and launches (bind.cpp); kernels are compiled at an op's first call.
"""

import contextlib
import ctypes
import functools
import sys

import torch
from simt import harness

from fast_prompt.backends import BACKENDS, Kernels
from fast_prompt.backends.call import refuses_kernels
from fast_prompt.ops.declaration import OPS

name, suffix, compiled = "simt", "_simt", True
ELEMENTS = tuple(harness.ELEMENTS.values())
ORDER = ("prompt_diffusion", "prompt_compress", "skip_adapter")  # bind.cpp's
# Threads forwards, copies as late as they may come; and the reverse of both. Of few multiprocessors each has several
# row tiles, for many the tiles are short.
ORDERS = {
    "forward": {"reverse": False, "late_copies": True, "multiprocessors": 2},
    "reverse": {"reverse": True, "late_copies": False, "multiprocessors": 16},
}
H100, SMALL = {"shared_bytes": 227 << 10}, {"shared_bytes": 99 << 10}  # SMALL: sm_86 and sm_89

_in_use = {}  # by op, the library whose kernels run
_settings = {}


def install():
    """Makes it a backend, of every op that has CUDA kernels."""
    if name in BACKENDS:
        return
    BACKENDS[name] = sys.modules[__name__]
    for op in OPS.values():
        if "cuda" in op.kernels:
            op.kernels[name] = Kernels()
            op.define(name)


def unavailable():
    """Why there is no emulator here, or None."""
    return None if harness.has_compiler() else "there is no C++ compiler to build the emulated kernels with"


def refuses(call):
    """Why it cannot take a call, or None."""
    return f"runs on cpu, not on {call.device.type}" if call.device.type != "cpu" else refuses_kernels(call)


def run(registered, kernels, *arguments):
    """Loads the binding, whose ops torch finds from then on by itself, and makes the call again."""
    binding()
    for op in ORDER:
        if op not in _in_use:
            use(op, harness.build(op))
    return getattr(torch.ops.fast_prompt, registered.partition("::")[2]).default(*arguments)


@functools.cache
def binding():
    """The binding, loaded."""
    path = harness.build_binding()
    torch.ops.load_library(path)
    return ctypes.CDLL(path)


def use(op, path, elements=ELEMENTS):
    """Runs an op on a library's kernels, of these types, from now on."""
    library = ctypes.CDLL(path)
    library.simt_setting.restype = ctypes.POINTER(ctypes.c_int)
    for type_index, element in enumerate(ELEMENTS):
        table = None
        if element in elements:
            symbol = "".join(f"{len(part)}{part}" for part in ("fast_prompt", "cuda", element, op))
            table = ctypes.addressof(ctypes.c_char.in_dll(library, f"_ZN{symbol}E"))
        binding().simt_use(ORDER.index(op), type_index, ctypes.c_void_p(table))
    _in_use[op] = library
    configure(**_settings)


def configure(**settings):
    """Sets ``simt.h``'s Settings, of every op, now and later."""
    _settings.update(settings)
    for library in _in_use.values():
        for each, value in settings.items():
            library.simt_setting(each.encode())[0] = int(value)


def most_shared_bytes(op):
    """That a launch of the op has asked for since ``configure(most_shared_bytes=0)``."""
    return _in_use[op].simt_setting(b"most_shared_bytes")[0]


@contextlib.contextmanager
def planted(op, file, right, wrong, element="bfloat16"):
    """A context in which the kernels of one type have a bug: in ``file``, ``right``, there once, made ``wrong``."""
    binding()
    use(op, harness.build_planted(op, file, right, wrong, element), (element,))
    try:
        yield
    finally:
        use(op, harness.build(op))

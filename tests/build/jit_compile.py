"""Compiles every Triton kernel just as a GPU machine would at a call, with no GPU: by Triton's own JIT, nothing run.

A program of its own, since tests run with ``TRITON_INTERPRET=1``, and since Triton may be of another version
(tests/support/overlays.py). A stand-in for the driver names the chip, and a launch goes no further than compilation: the ops'
APIs, autograd and the launchers do what they do on a GPU, and the JIT makes of the real arguments what it makes of
them there, with numbers that become constants (1) and pointers that are missing (None). Only the front end compiles;
what comes after it depends on tiles and chips, and is what tests/build/aot_compile.py is about.

The calls are the parity cases, with a gradient for nothing, for all that a case trains and for each of that alone. Of
their launches as many are compiled as have, between them, every pair of arguments' kinds that any has. Writes one JSON
object to stdout: triton's version, how many launches were ``compiled``, the ``errors`` of those that were not, and for
each kernel the kinds ``seen`` of each argument.
"""

import dataclasses
import heapq
import importlib
import itertools
import json
import multiprocessing
import pkgutil
from concurrent.futures import ProcessPoolExecutor

import fast_prompt_kernels
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fast_prompt.ops.declaration import OPS
from fast_prompt import ops, parity
from fast_prompt.backends import triton as backend
from fast_prompt.bench.contender import forced

MULTIPROCESSORS = 132
PROCESSES = 2
MODULES = [
    importlib.import_module(f"fast_prompt_kernels.{module.name}")
    for module in pkgutil.iter_modules(fast_prompt_kernels.__path__)
]
compile_launch = JITFunction._do_compile
launches = []


# ---- A machine that compiles and runs nothing ----


class Driver:
    """What the JIT asks of a driver before it launches."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return None

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def warm_up(kernel, grid):
    """In place of a launch."""
    return lambda *arguments, **named: kernel.run(*arguments, grid=grid, warmup=True, **named)


def only_the_front_end(compiler=None, stages=None, *_):
    """Triton's hook on its stages; without arguments it is asked what to call that in a cache."""
    if compiler is None:
        return "front end", "front end"
    for stage in set(stages) - {"ttir"}:
        del stages[stage]
    stages[compiler.binary_ext] = no_binary
    return None


def no_binary(module, metadata):
    metadata.update(name="", shared=0)
    return b""


def set_up():
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Driver())
    triton.knobs.runtime.add_stages_inspection_hook = only_the_front_end
    JITFunction.__getitem__ = warm_up
    JITFunction._do_compile = lambda *launch: launches.append(launch)
    backend.interpreted = lambda: True  # it would take no tensor of the CPU otherwise
    for module in MODULES:
        if hasattr(module, "multiprocessors"):
            module.multiprocessors = lambda device: MULTIPROCESSORS
    parity.skip_adapter._leave_kinks = lambda *_: None  # slow, and numbers mean nothing here


# ---- The calls, and which of their launches to compile ----


def make_calls():
    for name, op in OPS.items():
        function, module = forced(op.api, "triton"), parity.cases_of(name)
        for dtype, case in itertools.product(parity.DTYPES.values(), module.CASES):
            if case.applies_to(dtype) and getattr(case, "form", "absorbed") == "absorbed":
                problem = module.build(case, dtype, torch.device("cpu"))
                parity.evaluate(function, problem, backward=False)
                for trained in {problem.trained, *((name,) for name in problem.trained)}:
                    parity.evaluate(function, dataclasses.replace(problem, trained=trained))


def name_of(kernel):
    return f"{kernel.module}.{kernel.__name__}"


def kinds(launch):
    """What the compiler is told of each argument, its type or the constant that it is; the sizes of tiles aside."""
    kernel, _, signature, _, constants, *_ = launch
    values = {kernel.arg_names[place]: value for (place,), value in constants.items()}
    return {name: values.get(name, kind) for name, kind in signature.items() if not name.startswith("BLOCK")}


def combinations(launch):
    """What to compile once: every kind of an argument, and each two of them together, float16 then as bfloat16."""
    kernel, arguments = name_of(launch[0]), kinds(launch)
    alike = {name: "*bf16" if kind == "*fp16" else kind for name, kind in arguments.items()}
    return {hash((kernel, item)) for item in (*arguments.items(), *itertools.combinations(alike.items(), 2))}


def fewest(found):
    """Launches that have all combinations between them, in each step that with the most new ones."""
    distinct = {(launch[0], tuple(kinds(launch).items())): launch for launch in found}.values()
    waiting = [
        (-len(new), place, launch, new) for place, launch in enumerate(distinct) if (new := combinations(launch))
    ]
    heapq.heapify(waiting)
    chosen, covered = [], set()
    while waiting:
        _, place, launch, new = heapq.heappop(waiting)
        new -= covered
        if new and waiting and len(new) < -waiting[0][0]:  # it stood here for what others have covered since
            heapq.heappush(waiting, (-len(new), place, launch, new))
        elif new:
            chosen.append(launch)
            covered |= new
    return chosen


def error_of(launch):
    """What the compiler said against a launch, or None."""
    try:
        compile_launch(*launch)
    except Exception as error:  # whatever it is, that kernel does not compile
        return f"{name_of(launch[0])} {kinds(launch)}: {type(error).__name__}: {error}"
    return None


def error_at(place):
    return error_of(chosen[place])


def seen():
    """By kernel and argument; a kernel that nothing launches has none."""
    names = [name_of(each) for module in MODULES for each in vars(module).values() if isinstance(each, JITFunction)]
    found = {name: {} for name in sorted(set(names)) if name.endswith("_kernel")}
    for launch in launches:
        for argument, kind in kinds(launch).items():
            found[name_of(launch[0])].setdefault(argument, set()).add(kind)
    return {name: {key: list(values) for key, values in arguments.items()} for name, arguments in found.items()}


if __name__ == "__main__":
    set_up()
    make_calls()
    chosen = fewest(launches)
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("fork")) as pool:
        errors = [error for error in pool.map(error_at, range(len(chosen)), chunksize=8) if error]
    result = {"triton": triton.__version__, "compiled": len(chosen) - len(errors), "errors": errors, "seen": seen()}
    print(json.dumps(result))

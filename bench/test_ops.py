"""Every op under pytest-benchmark: ``pytest bench --benchmark-only -k skip_adapter``.

The contenders, shapes and numbers are those of ``fast-prompt bench``, which times them in turn and so compares them
more fairly; this is for a history of one machine (``--benchmark-autosave``, ``--benchmark-compare``).
"""

import functools

import pytest
import torch
from torch._inductor import config as inductor_config

from fast_prompt.bench import OPS, Setting
from fast_prompt.bench.runner import call
from fast_prompt.ops.declaration import OPS as DECLARED
from fast_prompt.parity import DTYPES, compare, evaluate
from fast_prompt.tolerances import TOLERANCES

inductor_config.compile_threads = 1  # its workers would start on the cores that are timed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = [
    Setting(op, shape, dtype, name)
    for op in DECLARED
    for dtype, name in (("fp32", "fwd"), ("bf16", "fwd"), ("fp32", "fwdbwd"))
    for shape in OPS[op].DEFAULT_SHAPES
]
CASES = [
    pytest.param(setting, contender, id=f"{setting}-{contender.name}")
    for setting in SETTINGS
    for contender in OPS[setting.op].contenders(setting.shape, DTYPES[setting.dtype], DEVICE, setting.backward)
]


@functools.lru_cache(maxsize=1)  # the contenders of a setting come one after the other
def prepare(setting_name):
    """The setting's problem."""
    setting = next(setting for setting in SETTINGS if str(setting) == setting_name)
    torch._dynamo.reset()
    return OPS[setting.op].problem(setting.shape, DTYPES[setting.dtype], DEVICE)


@functools.lru_cache(maxsize=1)
def expectation(setting_name, definition):
    """What a contender of the setting must compute, in float64."""
    setting = next(setting for setting in SETTINGS if str(setting) == setting_name)
    return evaluate(definition, prepare(setting_name).double(), setting.backward)


@pytest.mark.parametrize(("setting", "contender"), CASES)
def test_speed(benchmark, setting, contender):
    problem = prepare(str(setting))
    expected = expectation(str(setting), contender.definition)
    errors = compare(evaluate(contender.function, problem, setting.backward), expected)
    if contender.kind == "ours":
        assert max(errors.values()) <= TOLERANCES[DTYPES[setting.dtype]], errors
    benchmark.group = str(setting)
    benchmark.extra_info.update(kind=contender.kind, device=str(DEVICE), threads=torch.get_num_threads())
    run = call(contender, problem, setting.backward)

    def once():
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(once)

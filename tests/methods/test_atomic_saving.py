"""Saves that are killed, that meet other saves, and that are read meanwhile: one adapter or another, never a mixture.

A process is stopped or killed before it runs a line of the code that saves, at fifty of them.
"""

import json
import os
import signal
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from ranks import CONTEXT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import build_language_model

from fast_prompt.methods import APTConfig, DASConfig, DVPConfig
from fast_prompt.tuning import FastPromptModel, get_fast_prompt_model

pytestmark = pytest.mark.gate

CONFIG, WEIGHTS, LINK = "adapter_config.json", "adapter_model.safetensors", "model.safetensors"
MOMENTS = 50
SAVING = ("tuning/files.py", "tuning/storage.py")

# Of two configs whose tensors have the same shapes, so that nothing but the values shows a mixture.
METHODS = {
    "APT": [APTConfig(num_prompts=2, activation=name) for name in ("relu", "softmax")],
    "DVP": [DVPConfig(layer=1, visual_width=16, query=name) for name in ("first", "mean")],
    "DAS": [DASConfig(skipped=[1], width=4, skip_width=4, activation=name) for name in ("relu", "silu")],
    "combination": [
        [DVPConfig(layer=layer, visual_width=16), APTConfig(num_prompts=2, row_weight=weight)]
        for layer, weight in ((1, "max"), (2, "none"))
    ],
}


def adapters(method):
    """Two adapted models; every element of the first one's adapter is 1, of the second one's 2."""
    models = []
    for number, config in enumerate(METHODS[method], 1):
        model = get_fast_prompt_model(build_language_model("bert")[0], config)
        with torch.no_grad():
            for value in model.get_adapter_state_dict().values():
                value.fill_(number)
        models.append(model)
    return models


def found(directory, base, models):
    """Which of the ``models`` is in the ``directory``, by its number; fails on anything else."""
    loaded = FastPromptModel.from_pretrained(base, directory)
    number, configs = number_of(loaded.get_adapter_state_dict()), dict(loaded.adapter_configs)
    loaded.revert()
    assert configs == models[number - 1].adapter_configs, "one adapter's config with another's weights"
    return number


def number_of(tensors):
    """The one value of all of an adapter's elements."""
    (number,) = {float(each) for value in tensors.values() for each in value.unique()}
    return int(number)


def at_line(number, act):
    """A trace function that calls ``act`` before the line of that number; lines in loops count twice."""
    lines, visits = iter(range(sys.maxsize)), Counter()

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.endswith(SAVING):
            return None
        if event == "line":
            visits[frame.f_code, frame.f_lineno] += 1
            if visits[frame.f_code, frame.f_lineno] <= 2 and next(lines) == number:
                act()
        return trace

    trace.lines = lines
    return trace


def traced(trace, save):
    sys.settrace(trace)
    try:
        save()
    finally:
        sys.settrace(None)


def moments(save):
    """Numbers of ``MOMENTS`` lines from the first to the last that a save runs."""
    trace = at_line(-1, None)
    traced(trace, save)
    total = next(trace.lines)
    return [number * (total - 1) // (MOMENTS - 1) for number in range(MOMENTS)]


def forked(run):
    """A process that runs ``run``."""
    child = os.fork()
    if not child:
        run()
        os._exit(0)
    return child


def send_oneself(number):
    os.kill(os.getpid(), number)


def write_now(directory, model):
    model.save_pretrained(directory)


def write_as_before(directory, model):
    """What earlier versions wrote: a config file, and weights that say nothing of it."""
    model.save_pretrained(directory)
    save_file(load_file(directory / WEIGHTS), directory / WEIGHTS, {"format": "pt"})
    config = json.loads((directory / CONFIG).read_text())
    config.pop("save_id", None)
    (directory / CONFIG).write_text(json.dumps(config, indent=2))
    if (directory / LINK).exists():
        (directory / LINK).unlink()
        os.link(directory / WEIGHTS, directory / LINK)


def without_links(*_, **__):
    raise OSError("no links here")


@pytest.fixture(scope="module")
def alone():
    """A function that calls another in a process with one thread, which can be forked."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=300)


def assert_clean(directory):
    """Nothing but the files of one adapter, which agree."""
    assert {path.name for path in directory.iterdir()} == {CONFIG, WEIGHTS, LINK}
    with safe_open(directory / WEIGHTS, "pt") as file:
        assert file.metadata()["fast_prompt_config"] == (directory / CONFIG).read_text()
    assert number_of(load_file(directory / LINK)) == number_of(load_file(directory / WEIGHTS))


def kill_saves(method, directory, write):
    """Kill saves of the second adapter over the first; which is there then, at every moment."""
    base, models, results = build_language_model("bert")[0], adapters(method), []

    def save():
        models[1].save_pretrained(directory)

    write(directory, models[0])
    for moment in moments(save):
        write(directory, models[0])
        child = forked(lambda at=moment: traced(at_line(at, lambda: send_oneself(signal.SIGKILL)), save))
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        results.append(found(directory, base, models))
        if (directory / LINK).exists() or Path.symlink_to is not without_links:
            assert number_of(load_file(directory / LINK)) == results[-1]
    save()
    assert_clean(directory)
    return results


def kill_saves_without_links(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "symlink_to", without_links)
        return kill_saves(*arguments)


CASES = [(kill_saves, method, write_now) for method in ("DVP", "DAS", "combination")]
CASES += [(kill_saves, "APT", write_as_before), (kill_saves_without_links, "APT", write_now)]


@pytest.mark.parametrize(("kill", "method", "write"), CASES)
def test_a_killed_save_leaves_the_old_adapter_or_the_new_one(kill, method, write, alone, tmp_path):
    results = alone(kill, method, tmp_path / "checkpoint-1", write)
    assert len(results) == MOMENTS and results == sorted(results) and set(results) == {1, 2}


def meet(method, directory):
    """Stop saves of the second adapter over the first; load, and save the first meanwhile; let them go on."""
    base, models, results = build_language_model("bert")[0], adapters(method), []

    def save():
        models[1].save_pretrained(directory)

    def save_and_stop():
        for moment in numbers:
            traced(at_line(moment, lambda: send_oneself(signal.SIGSTOP)), save)
            send_oneself(signal.SIGSTOP)

    models[0].save_pretrained(directory)
    numbers = moments(save)
    models[0].save_pretrained(directory)
    child = forked(save_and_stop)
    for _ in numbers:
        wait_until_stopped(child)
        results.append(found(directory, base, models))
        assert number_of(load_file(directory / LINK)) == results[-1]
        models[0].save_pretrained(directory)
        os.kill(child, signal.SIGCONT)
        wait_until_stopped(child)
        assert_clean(directory)
        results.append(number_of(load_file(directory / WEIGHTS)))
        models[0].save_pretrained(directory)
        os.kill(child, signal.SIGCONT)
    assert os.waitpid(child, 0)[1] == 0
    return results


def wait_until_stopped(child):
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])


@pytest.mark.parametrize("method", METHODS)
def test_a_save_during_another_and_a_load_during_both(method, alone, tmp_path):
    results = alone(meet, method, tmp_path / "checkpoint-1")
    assert len(results) == 2 * MOMENTS and set(results[::2]) == set(results[1::2]) == {1, 2}

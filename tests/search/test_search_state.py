"""A search's checkpoint: whole at every moment of a kill, and never gone on from if anything in it is wrong."""

import json
import math
import os
import re
import signal
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from ranks import CONTEXT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_search import CONFIG, Questions, minus_loss, search, settings, tiny_bert
from transformers import BertModel

from fast_prompt.search import DVPSearch, TrainingSettings, train_anew
from fast_prompt.tuning import files
from fast_prompt.tuning.sealed import write_sealed

STATE = "search.safetensors"
MOMENTS = 50
SERIALISING = ("tensor_bytes", "<dictcomp>")


# Kills


def small_search(directory):
    few = settings(steps=2, batch_size=2, reward_batch=2, draws=2)
    return DVPSearch(tiny_bert(2), CONFIG, Questions(), few, reward=minus_loss, directory=directory)


class Tracer:
    """Counts the lines that a save runs in the code that writes files, and kills the process at one of them."""

    def __init__(self, fatal=None):
        self.lines, self.fatal = 0, fatal

    def __call__(self, frame, event, _):
        code = frame.f_code
        if code.co_filename != files.__file__ or code.co_name in SERIALISING:
            return None
        if event == "line":
            if self.lines == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            self.lines += 1
        return self


def traced(directory, tracer):
    run = small_search(directory)
    genuine = run._save

    def save(*args):
        sys.settrace(tracer)
        genuine(*args)
        sys.settrace(None)

    run._save = save
    run.run()
    return run


def contents(directory):
    return {name: value.tolist() for name, value in load_file(directory / STATE).items()}


def killed_at_every_moment(directory):
    """Of each of 50 moments of a search's saves: how its process ended, and whether another then ended the same."""
    torch.set_num_threads(1)
    tracer = Tracer()
    whole = traced(directory / "whole", tracer)
    outcomes = []
    for moment in range(MOMENTS):
        place = directory / str(moment)
        child = os.fork()
        if child == 0:
            traced(place, Tracer(moment * tracer.lines // MOMENTS))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        run = small_search(place)
        same = run.run() == whole.found() and torch.equal(run.history, whole.history)
        same = same and contents(place) == contents(directory / "whole")
        same = same and [path.name for path in place.iterdir()] == [STATE]  # nothing is left of the dead
        outcomes.append((os.WTERMSIG(status) if os.WIFSIGNALED(status) else status, same))
    return outcomes


@pytest.mark.gate
def test_a_search_killed_at_any_moment_of_a_save_ends_the_same(tmp_path):
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        outcomes = pool.submit(killed_at_every_moment, tmp_path).result(timeout=120)
    assert outcomes == [(signal.SIGKILL, True)] * MOMENTS


# Damage


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The checkpoint after 3 of 6 steps."""
    directory = tmp_path_factory.mktemp("half")

    def interrupted(output, batch):
        if layers.done == 3:
            raise KeyboardInterrupt
        return minus_loss(output, batch)

    layers = search(directory, reward=interrupted)
    with pytest.raises(KeyboardInterrupt):
        layers.run()
    return directory / STATE


def facts_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["facts"])


def refused(directory, *named):
    """The search says what is wrong with its file, has done nothing, and leaves model and file as they were."""
    model, before = tiny_bert(), (directory / STATE).read_bytes() if (directory / STATE).is_file() else None
    layers = search(directory, model, reward=lambda *_: pytest.fail("it ran on"))
    with pytest.raises(ValueError) as caught:
        layers.run()
    for word in (str(directory / STATE), *named):
        assert re.search(word, str(caught.value)), caught.value
    assert type(model) is BertModel
    assert layers.done == 0
    assert len(layers.history) == 0
    assert before is None or (directory / STATE).read_bytes() == before


def first(tensors, prefix):
    return next(name for name in tensors if name.startswith(prefix))


def changed(name, change):
    """Damages the first tensor whose name begins so."""

    def damage(tensors):
        name_found = first(tensors, name)
        tensors[name_found] = change(tensors[name_found])

    return damage


def with_last(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


DAMAGES = {
    "no parameter": (lambda tensors: tensors.pop(first(tensors, "parameter.")), "parameter.* is missing"),
    "no moment": (lambda tensors: tensors.pop(first(tensors, "optimizer.exp_avg.")), "optimizer.exp_avg.* is missing"),
    "no count": (lambda tensors: tensors.pop("done"), "done is missing"),
    "no history": (lambda tensors: tensors.pop("state.history"), "history is missing"),
    "no generator": (lambda tensors: tensors.pop("state.bandit.generator"), "bandit.generator is missing"),
    "unknown": (lambda tensors: tensors.update(more=torch.ones(1)), "more is unknown"),
    "unknown state": (lambda tensors: tensors.update({"state.more": torch.ones(1)}), "more is unknown"),
    "too many done": (changed("done", lambda _: torch.tensor(999)), "done: expected from 1 to 6 steps, got 999"),
    "none done": (changed("done", lambda _: torch.tensor(0)), "done: expected from 1 to 6 steps, got 0"),
    "other done": (changed("done", lambda _: torch.tensor(4)), r"history: expected float64 \[4, 3\], got .*\[3, 3\]"),
    "float done": (changed("done", lambda _: torch.tensor(3.0)), r"done: expected int64 \[\], got float32"),
    "shape": (changed("parameter.", lambda value: value[None]), r"parameter.*: expected float32 .* got float32 \[1, "),
    "dtype": (changed("parameter.", lambda value: value.double()), "parameter.*: expected float32 .* got float64"),
    "NaN": (changed("parameter.", with_last(math.nan)), "parameter.* is not finite"),
    "infinite moment": (changed("optimizer.exp_avg_sq.", with_last(math.inf)), "exp_avg_sq.* is not finite"),
    "negative square": (changed("optimizer.exp_avg_sq.", with_last(-1.0)), "exp_avg_sq.*: expected squares"),
    "later step": (changed("optimizer.step.", lambda _: torch.tensor(4.0)), "step.*: expected from 0 to 3 steps"),
    "NaN history": (changed("state.history", with_last(math.nan)), "history is not finite"),
    "other preferences": (changed("state.bandit.preferences", with_last(5.0)), "history: its last row"),
    "negative count": (changed("state.bandit.skipped", lambda _: torch.tensor(-1)), "skipped"),
    "no random state": (changed("state.bandit.generator", torch.zeros_like), "generator"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_state_is_refused_with_what_differs(half, tmp_path, kind):
    damage, named = DAMAGES[kind]
    tensors = load_file(half)
    damage(tensors)
    write_sealed(tmp_path / STATE, tensors, facts_of(half))
    refused(tmp_path, named)


def altered(half, path):
    """One parameter's value is another, which no count and no shape shows."""
    tensors = load_file(half)
    changed("parameter.", with_last(0.5))(tensors)
    with safe_open(half, "pt") as file:
        save_file(tensors, path, file.metadata())


FILES = {
    "cut": (lambda half, path: path.write_bytes(half.read_bytes()[:-10]), "not a whole safetensors file"),
    "empty": (lambda half, path: path.write_bytes(b""), "not a whole safetensors file"),
    "altered": (altered, "have changed since they were written"),
    "foreign": (lambda half, path: save_file(load_file(half), path), "expected facts and sha256"),
    "directory": (lambda half, path: path.mkdir(), "expected a file"),
    "pipe": (lambda half, path: os.mkfifo(path), "expected a file"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_whole_checkpoint_is_refused(half, tmp_path, kind):
    damage, named = FILES[kind]
    damage(half, tmp_path / STATE)
    refused(tmp_path, named, "Without that file it starts anew")


def test_what_a_checkpoint_says_of_itself_must_be_the_searchs(half, tmp_path):
    facts = facts_of(half)
    for change, named in (
        ({"arms": 4}, "another search's checkpoint: arms 4 there, 3 here"),
        ({"settings": None}, "settings None there"),
        ({"more": 1}, "more 1 there, None here"),
    ):
        write_sealed(tmp_path / STATE, load_file(half), facts | change)
        refused(tmp_path, named)


# Numbers that are no longer finite


class Spoilt(Questions):
    """One question whose image is not finite."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "visual_embeds": self.visual[index] * (math.nan if index == 7 else 1)}


def test_training_that_is_no_longer_finite_stops_and_saves_nothing_of_it(tmp_path):
    model = tiny_bert()
    plan = TrainingSettings(steps=10, batch_size=4, save_every=1)
    with pytest.raises(FloatingPointError, match=r"step \d+ of 10: the loss is not finite") as caught:
        train_anew(model, CONFIG, Spoilt(), plan, directory=tmp_path)
    assert type(model) is BertModel
    step = int(re.search(r"step (\d+)", str(caught.value))[1])
    kept = load_file(tmp_path / "retraining.safetensors")
    assert int(kept["done"]) == step - 1 > 0
    assert all(value.isfinite().all() for value in kept.values())


def test_a_rate_that_diverges_leaves_no_file_that_is_not_finite(tmp_path):
    layers = search(tmp_path, steps=3, learning_rate=1e30, warmup=0.0)
    with pytest.raises(FloatingPointError, match="step 2 of 3: the loss is not finite"):
        layers.run()
    kept = load_file(tmp_path / STATE)
    assert int(kept["done"]) == 1
    assert all(value.isfinite().all() for value in kept.values())


def test_a_parameter_that_is_not_finite_after_the_last_step_is_seen_with_and_without_a_file(tmp_path):
    def spoil(output, batch):
        with torch.no_grad():
            next(layers.model.fast_prompt_head.parameters()).view(-1)[0] = math.inf
        return 1.0

    for directory in (None, tmp_path):
        layers = search(directory, steps=1, reward=spoil)
        with pytest.raises(FloatingPointError, match=r"step 1 of 1: parameter.fast_prompt_head.* is not finite"):
            layers.run()
    assert not list(tmp_path.iterdir())


def test_gradients_that_are_not_finite_stop_training_though_the_loss_is():
    layers = search()
    genuine = layers.use

    def use(draw):
        genuine(draw)
        for parameter in layers.model.fast_prompt_head.parameters():
            parameter.register_hook(lambda gradient: gradient * math.inf)

    layers.use = use
    with pytest.raises(FloatingPointError, match="step 1 of 6: a gradient is not finite"):
        layers.run()

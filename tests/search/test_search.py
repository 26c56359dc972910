"""The bandit and the layer search: draws, updates, agreement between processes, and taking up where it stopped."""

import dataclasses
import math
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from ranks import together
from safetensors.torch import load_file
from tiny_models import TEXT
from torch.utils.data import default_collate
from transformers import BertConfig, BertModel

from fast_prompt.methods import DVPConfig
from fast_prompt.search import DASSettings, DVPSearch, SearchSettings, TrainingSettings, plot
from fast_prompt.search.arms import Arms
from fast_prompt.search.bandit import TRIES, Bandit
from fast_prompt.search.search import accuracy


def bandit_with(preferences, form="softmax", learning_rate=1.0, seed=0):
    bandit = Bandit(len(preferences), form, learning_rate, seed)
    bandit.preferences.copy_(torch.tensor(preferences, dtype=torch.float64))
    return bandit


# Probabilities and draws


def test_probabilities_are_the_forms():
    preferences = [0.0, math.log(2), math.log(5)]
    assert bandit_with(preferences).probabilities.tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    assert bandit_with(preferences, "sigmoid").probabilities.tolist() == pytest.approx([1 / 2, 2 / 3, 5 / 6])


def within_chance(count, share, draws):
    """Five standard deviations: the draws are seeded, so this holds always or never."""
    return abs(count - share * draws) < 5 * math.sqrt(draws * share * (1 - share))


def test_draws_follow_the_probabilities():
    bandit = bandit_with([0.0, math.log(2), math.log(5)])
    counts = Counter(bandit.draw(4000))
    assert all(within_chance(counts[arm], share, 4000) for arm, share in enumerate((1 / 8, 2 / 8, 5 / 8)))
    uniform = Counter(bandit.draw_uniform() for _ in range(3000))
    assert all(within_chance(uniform[arm], 1 / 3, 3000) for arm in range(3))


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_sets_are_drawn_one_arm_after_the_other_without_replacement(form):
    bandit = bandit_with([0.0, 1.0, -1.0], form)
    weights = bandit.probabilities.tolist()
    total, draws = sum(weights), 4000
    counts = Counter(bandit.draw_set(2) for _ in range(draws))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        a, b = weights[first], weights[second]
        share = a / total * b / (total - a) + b / total * a / (total - b)
        assert within_chance(counts[first, second], share, draws)


def test_sets_are_drawn_even_of_arms_too_unlikely_for_a_float():
    bandit = bandit_with([0.0, -800.0, -1000.0, -900.0])
    assert bandit.probabilities[1:].tolist() == [0.0] * 3
    assert bandit.draw_set(3) == (0, 1, 3)
    assert bandit.draw_set(4) == (0, 1, 2, 3)


def test_drawn_sets_differ_and_are_no_more_than_there_are():
    sets = Bandit(6, "sigmoid", 1.0).draw_sets(3, 5)
    assert len(set(sets)) == len(sets) == 5
    assert Bandit(4, "sigmoid", 1.0).draw_sets(4, 3) == [(0, 1, 2, 3)]
    assert sorted(Bandit(3, "sigmoid", 1.0).draw_sets(2, 9)) == [(0, 1), (0, 2), (1, 2)]


def test_drawing_different_sets_ends_when_only_one_ever_turns_up(monkeypatch):
    bandit = bandit_with([0.0, 0.0, -800.0, -800.0])
    calls = []
    genuine = Bandit.draw_set
    monkeypatch.setattr(Bandit, "draw_set", lambda self, size: calls.append(size) or genuine(self, size))
    assert bandit.draw_sets(2, 3) == [(0, 1)]
    assert len(calls) == 3 * TRIES


def test_seed_decides_the_draws():
    def draws(seed):
        bandit = Bandit(8, "softmax", 1.0, seed)
        return bandit.draw(20), bandit.draw_uniform(), bandit.draw_sets(3, 4)

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


# Updates


def test_update_is_the_papers():
    bandit = bandit_with([0.0, math.log(3)], learning_rate=0.5)
    bandit.update([[0], [1], [1]], [4.0, 1.0, 1.0])
    slope = 0.5 * 0.25 * 0.75  # learning rate and p (1 - p), equal for both arms; the mean reward is 2
    expected = [slope * 2.0, math.log(3) + slope * (-1.0 - 1.0)]
    assert bandit.preferences.tolist() == pytest.approx(expected)


def test_update_moves_every_arm_of_a_set():
    bandit = bandit_with([0.0, 0.0, 0.0, math.log(3)], "sigmoid", learning_rate=1.0)
    bandit.update([(0, 1), (1, 3)], [3.0, 1.0])
    assert bandit.preferences.tolist() == pytest.approx([0.25, 0.0, 0.0, math.log(3) - 0.75 * 0.25])


def test_equal_rewards_teach_nothing():
    bandit = Bandit(3, "softmax", 1.0)
    bandit.update([[0], [1]], [7.0, 7.0])
    bandit.update([[2]], [100.0])
    assert bandit.preferences.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_skipped_and_counted(bad):
    bandit, clean = Bandit(3, "softmax", 1.0), Bandit(3, "softmax", 1.0)
    bandit.update([[0], [2], [1]], [1.0, bad, 3.0])
    clean.update([[0], [1]], [1.0, 3.0])
    assert torch.equal(bandit.preferences, clean.preferences)
    assert (bandit.skipped, clean.skipped) == (1, 0)
    bandit.update([[0], [1]], [bad, bad])
    assert torch.equal(bandit.preferences, clean.preferences)
    assert bandit.skipped == 3


def test_preferences_stay_finite():
    bandit = Bandit(2, "softmax", 1e300)
    with pytest.raises(FloatingPointError, match=r"preference is no longer finite; lower .* \(1e\+300\)"):
        bandit.update([[0], [1]], [1e20, -1e20])
    assert bandit.preferences.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_the_better_arms_are_found(form):
    worth = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.3, 0.8])
    bandit, noise = Bandit(6, form, 1.0), torch.Generator().manual_seed(0)
    for _ in range(400):
        draws = bandit.draw_sets(2, 3)
        bandit.update(
            draws, [worth[list(d)].mean().item() + 0.2 * torch.randn((), generator=noise).item() for d in draws]
        )
    assert set(bandit.best(2)) == {3, 5}
    assert bandit.best() == bandit.best(2)[:1]


def test_best_takes_the_earlier_of_equal_arms():
    assert Bandit(3, "softmax", 1.0).best(2) == [0, 1]


# State


def test_state_goes_on_from_where_it_was_taken():
    def go_on(bandit):
        for _ in range(5):
            draws = bandit.draw_sets(2, 3)
            bandit.update(draws, [float(sum(draw)) for draw in draws])
        return bandit.preferences, bandit.draw(9)

    first = Bandit(5, "sigmoid", 0.3, seed=4)
    first.update([first.draw_set(2), (0, 1)], [1.0, math.nan])
    second = Bandit(5, "sigmoid", 0.3, seed=99)
    second.load_state_dict(first.state_dict())
    assert second.skipped == 1
    (ours, our_draws), (theirs, their_draws) = go_on(first), go_on(second)
    assert torch.equal(ours, theirs)
    assert our_draws == their_draws


def test_state_that_does_not_fit_is_refused_and_changes_nothing():
    bandit = bandit_with([1.0, 2.0])
    with pytest.raises(ValueError, match="expected 2 arms"):
        bandit.load_state_dict(Bandit(3, "softmax", 1.0).state_dict())
    whole = Bandit(2, "softmax", 1.0).state_dict()
    with pytest.raises(ValueError, match="generator missing"):
        bandit.load_state_dict({"preferences": torch.zeros(2), "skipped": torch.tensor(0)})
    for name, damaged in (
        ("preferences", torch.tensor([0.0, math.nan], dtype=torch.float64)),
        ("preferences", torch.zeros(2)),
        ("skipped", torch.tensor(-1)),
        ("skipped", torch.tensor([0, 0])),
        ("generator", torch.zeros_like(whole["generator"])),
        ("generator", whole["generator"][:-1]),
    ):
        with pytest.raises(ValueError, match=f"state: .*{name}"):
            bandit.load_state_dict(whole | {name: damaged})
    assert bandit.preferences.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: Bandit(0, "softmax", 1.0), "arms"),
        (lambda: Bandit(3, "nonsense", 1.0), "form"),
        (lambda: Bandit(3, "softmax", 0.0), "learning_rate"),
        (lambda: Bandit(3, "softmax", math.nan), "learning_rate"),
        (lambda: Bandit(3, "softmax", 1.0).draw_set(4), "1 to 3 arms"),
        (lambda: Bandit(3, "softmax", 1.0).draw_sets(0, 2), "1 to 3 arms"),
        (lambda: Bandit(3, "softmax", 1.0).update([[0]], [1.0, 2.0]), "rewards"),
        (lambda: Bandit(3, "softmax", 1.0).update([[3]], [1.0]), "0 to 2"),
        (lambda: Bandit(3, "softmax", 1.0).update([[-1]], [1.0]), "0 to 2"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


# Several processes


def agreement(rank):
    bandit = Bandit(4, "softmax", 1.0, seed=rank)  # the first rank's seed counts
    sets = bandit.draw_sets(2, 3)
    rewards = [[1.0, 5.0, math.nan], [3.0, math.nan, math.nan]][rank]
    bandit.update(sets, rewards)
    return sets, bandit.preferences.tolist(), bandit.skipped, bandit.draw(20), bandit.draw_uniform()


@pytest.mark.gate
def test_ranks_draw_the_same_arms_and_average_their_rewards(tmp_path):
    first, second = together(agreement, tmp_path / "meeting")
    assert first == second
    alone = Bandit(4, "softmax", 1.0, seed=0)
    sets = alone.draw_sets(2, 3)
    alone.update(sets, [2.0, 5.0, math.nan])  # a reward counts from the ranks where it is finite
    assert first == (sets, alone.preferences.tolist(), 1, alone.draw(20), alone.draw_uniform())


# The layer search

CONFIG = DVPConfig(layer=0, visual_width=6, adapter_width=4, num_answers=3, dropout=0.1)


def tiny_bert(layers=3):
    torch.manual_seed(0)
    return BertModel(BertConfig(**{**TEXT, "num_hidden_layers": layers}), add_pooling_layer=False).eval()


class Questions:
    """Which of three directions the one visual token points to; the text says nothing."""

    def __init__(self, count=40):
        generator = torch.Generator().manual_seed(5)
        self.labels = torch.randint(3, (count,), generator=generator)
        self.visual = torch.randn(3, 6, generator=generator)[self.labels][:, None]
        self.text = torch.randint(2, 49, (count, 4), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"input_ids": self.text[index], "visual_embeds": self.visual[index], "labels": self.labels[index]}


def settings(**changed):
    chosen = {"steps": 6, "batch_size": 4, "reward_share": 0.25, "reward_batch": 5, "learning_rate": 3e-3, "draws": 3}
    return SearchSettings(**{**chosen, "preference_rate": 0.1, "save_every": 1, **changed})


def minus_loss(output, batch):
    """A reward that hardly ever ties."""
    return -output.loss.item()


def assert_goes_on_as(whole, again, folder):
    """A search that was interrupted ends as the one that was not: history and checkpoint, of "parts" and "whole"."""
    again.run()
    assert torch.equal(again.history, whole.history)
    files = [load_file(folder / part / "search.safetensors") for part in ("whole", "parts")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def search(directory=None, model=None, reward=minus_loss, **changed):
    model = model or tiny_bert()
    return DVPSearch(model, CONFIG, Questions(), settings(**changed), reward=reward, directory=directory)


def test_the_papers_reward_is_the_accuracy():
    output = SimpleNamespace(logits=torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0], [0.0, 1.0]]))
    assert accuracy(output, {"labels": torch.tensor([1, 0, 0, 1])}) == 75.0


def test_search_gives_the_config_of_the_best_layer_and_the_model_back():
    model = tiny_bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = search(model=model)
    found = layers.run()
    assert found == dataclasses.replace(CONFIG, layer=layers.layer)
    assert layers.history.shape == (6, 3)
    assert layers.layer == layers.history[-1].argmax()
    assert layers.history[-1].abs().max() > 0
    assert type(model) is BertModel
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_search_finds_the_layer_that_is_rewarded():
    def reward(output, batch):
        return 50.0 if layers.model.fast_prompt["search"].layer == 2 else 10.0

    layers = search(reward=reward, steps=30)
    assert layers.run().layer == 2


def test_rewards_come_from_questions_that_are_never_trained_on():
    layers = search(steps=20)
    genuine = DVPSearch.batch
    positions = {"train": layers._training.tolist(), "reward": layers._rewarding.tolist()}
    assert len(positions["train"]) == 30
    assert len(positions["reward"]) == 10
    assert not set(positions["train"]) & set(positions["reward"])
    seen = []
    layers.batch = lambda chosen: seen.append(chosen.tolist()) or genuine(layers, chosen)
    layers.run()
    assert set(sum(seen[0::2], [])) == set(positions["train"])  # every step trains, then rewards
    assert set(sum(seen[1::2], [])) <= set(positions["reward"])


def test_arms_own_their_prompter_and_share_the_rest():
    with Arms(tiny_bert(), CONFIG, 3) as arms:
        arms.model.train()
        optimizer = torch.optim.SGD(arms.parameter_groups(0.1, 0.1))
        batch = default_collate([Questions()[index] for index in range(4)])
        before = {name: value.detach().clone() for name, value in arms.parameters().items()}
        arms.use(1)
        arms.model(**batch).loss.backward()
        optimizer.step()
        moved = {name for name, value in arms.parameters().items() if not torch.equal(value, before[name])}
        assert any(name.startswith("search.1.") for name in moved)
        assert not any(name.startswith(("search.0.", "search.2.")) for name in moved)
        for shared in ("fast_prompt_head", "LayerNorm", "up_proj"):
            assert any(shared in name for name in moved if not name.startswith("search."))
        in_groups = [id(value) for group in optimizer.param_groups for value in group["params"]]
        assert sorted(in_groups) == sorted(id(value) for value in before and arms.parameters().values())


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_search_interrupted_at_any_step_ends_the_same(tmp_path, stop):
    whole = search(tmp_path / "whole")
    whole.run()
    steps = []

    def interrupted(output, batch):
        if len(steps) == stop:
            raise KeyboardInterrupt
        return minus_loss(output, batch)

    model = tiny_bert()
    first = search(tmp_path / "parts", model, interrupted)
    genuine = first._train_step
    first._train_step = lambda step, *rest: (genuine(step, *rest), steps.append(step) if step else None)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert type(model) is BertModel
    torch.manual_seed(99)  # what else has been drawn must not matter
    assert_goes_on_as(whole, search(tmp_path / "parts", model), tmp_path)


@pytest.mark.parametrize("stop", [0, 4])
def test_the_same_search_goes_on_from_its_checkpoint_or_not_at_all(tmp_path, stop):
    def interrupted(output, batch):
        if layers.done == stop and stops.pop():
            raise KeyboardInterrupt
        return minus_loss(output, batch)

    whole = search()
    whole.run()
    for directory in (None, tmp_path):
        stops = [False] * 99 + [True]
        layers = search(directory, reward=interrupted)
        with pytest.raises(KeyboardInterrupt):
            layers.run()
        if directory is None or stop == 0:
            with pytest.raises(RuntimeError, match="the search was interrupted, and .* in no checkpoint: make it anew"):
                layers.run()
        else:
            assert layers.run() == whole.found()
            assert torch.equal(layers.history, whole.history)


def test_search_without_all_checkpoints_goes_on_from_the_last(tmp_path):
    whole = search()
    whole.run()
    calls = []

    def interrupted(output, batch):
        calls.append(1)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return minus_loss(output, batch)

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, reward=interrupted, save_every=2).run()
    assert len(load_file(tmp_path / "search.safetensors")["state.history"]) in (2, 4)
    again = search(tmp_path, save_every=2)
    again.run()
    assert torch.equal(again.history, whole.history)


def test_a_finished_search_is_not_repeated(tmp_path):
    first = search(tmp_path)
    first.run()
    again = search(tmp_path, reward=lambda *_: pytest.fail("searched again"))
    assert again.run() == first.run()


def test_another_searchs_checkpoint_is_refused(tmp_path):
    search(tmp_path).run()
    model = tiny_bert()
    with pytest.raises(ValueError, match=r"another search's checkpoint: settings .*'seed': 1"):
        search(tmp_path, model, seed=1).run()
    assert type(model) is BertModel


def test_rewards_that_are_not_numbers_are_skipped(tmp_path):
    layers = search(reward=lambda *_: math.nan)
    layers.run()
    assert layers.bandit.skipped == 6 * 3
    assert layers.history.abs().max() == 0


def test_search_leaves_torchs_generator_alone():
    layers = search()
    before = torch.get_rng_state()
    layers.run()
    assert torch.equal(torch.get_rng_state(), before)


def test_preferences_are_drawn(tmp_path):
    layers = search()
    layers.run()
    layers.plot(tmp_path / "search.png")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")


NO_NUMBERS = (math.nan, math.inf, -math.inf, True, "1", [1], 10**400)
NO_COUNTS, NO_RATES = (*NO_NUMBERS, 0, -1, 1.5, None), (*NO_NUMBERS, 0, -1e-3)
BAD_SETTINGS = {
    **dict.fromkeys(("steps", "batch_size", "save_every", "draws", "reward_batch", "reward_every"), NO_COUNTS),
    **dict.fromkeys(("preference_rate", "max_grad_norm"), (*NO_RATES, None)),
    "learning_rate": (*NO_RATES, 1e31, None),
    "head_rate": (*NO_RATES, 1e31),
    "warmup": (math.nan, "1", True, None, -0.1, 1.1),
    "reward_share": (math.nan, "1", True, None, 0, 1),
    "reward_from": (math.nan, "1", True, None, -0.1, 1),
    "seed": (*NO_NUMBERS, 1.5, None, -1, 2**63),
    "ramp": (1, None, "yes"),
}


def test_every_number_of_the_settings_is_checked():
    assert BAD_SETTINGS.keys() == {each.name for each in dataclasses.fields(DASSettings)} == DASSettings.CHECKS.keys()
    assert TrainingSettings.CHECKS.keys() == {each.name for each in dataclasses.fields(TrainingSettings)}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_setting_that_is_no_number_in_its_range_is_named(name):
    for value in BAD_SETTINGS[name]:
        with pytest.raises(ValueError, match=f"^{name}: expected .* got {re.escape(repr(value))}"):
            DASSettings(**{"steps": 2, name: value})


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"batch_size": 31}, "30 to train on"),
        ({"reward_batch": 11}, "10 for rewards"),
    ],
)
def test_bad_settings_are_named_before_anything_runs(changed, named):
    model = tiny_bert()
    with pytest.raises(ValueError, match=named):
        search(model=model, **changed)
    assert type(model) is BertModel


def searched(rank):
    layers = search(reward_batch=6)
    layers.run()
    return layers.history


@pytest.mark.gate
def test_ranks_search_as_one(tmp_path):
    first, second = together(searched, tmp_path / "meeting")
    assert torch.equal(first, second)
    assert first.shape == (6, 3)
    assert first.abs().max() > 0


@pytest.mark.parametrize(
    "heights, expected",
    [
        ([], []),
        ([0.0, 5.0], [0.0, 5.0]),
        ([0.0, 0.0, 0.0], [-1.0, 0.0, 1.0]),
        ([0.0, 0.5, 9.0], [-0.25, 0.75, 9.0]),
        ([0.0, 1.2, 1.4], [-0.1 - 1 / 30, 0.9 - 1 / 30, 1.9 - 1 / 30]),
    ],
)
def test_labels_that_would_touch_are_moved_apart_and_no_further_than_needed(heights, expected):
    assert plot.apart(heights, 1.0) == pytest.approx(expected)

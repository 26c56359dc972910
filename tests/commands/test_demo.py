"""The demo in miniature: what it writes, that it repeats itself, and that no image is both trained on and tested."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fast_prompt import cli, demo
from fast_prompt.cost.counting import count_macs
from fast_prompt.demo import base, transfer
from fast_prompt.demo.adaptations import APT, DEEP_PROMPTS, LINEAR_PROBE, LORA
from fast_prompt.demo.chart import LABEL_GAP, spread
from fast_prompt.demo.costs import Contender, median_ms
from fast_prompt.demo.deep_prompts import transformer_blocks
from fast_prompt.demo.digits import load_splits
from fast_prompt.demo.report import Reload, Results
from fast_prompt.demo.settings import Settings

MINIATURE = Settings(
    width=32,
    layers=2,
    heads=2,
    pretraining_steps=150,
    pretraining_rate=3e-3,
    num_prompts=4,
    lora_rank=2,
    train_per_class=20,
    validation_per_class=10,
    epochs=15,
    learning_rates=(3e-3, 1e-2),
    inference_batch=16,
    timing_rounds=2,
)
FORMS = ["Linear probe", "Deep prompt tuning", "LoRA", "LoRA (merged)", "APT", "APT (folded)"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more, and on a busy machine threads that wait for each other lose a lot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Results]]:
    directories = [tmp_path_factory.mktemp(f"run{index}") for index in range(2)]
    return [(directory, transfer.run(directory, seed=3, settings=MINIATURE)) for directory in directories]


def test_results_file_has_the_agreed_rows(two_runs):
    directory, results = two_runs[0]
    written = json.loads((directory / "results.json").read_text())
    assert written == json.loads(json.dumps(results.to_dict()))
    assert written["task"] == "digits-transfer"
    assert [row["method"] for row in written["rows"]] == FORMS
    for row in written["rows"]:
        assert set(row) == {"method", "accuracy", "trainable_params", "step_ms", "infer_ms", "added_macs"}
        assert 0 <= row["accuracy"] <= 1
        assert row["step_ms"] > 0
        assert row["infer_ms"] > 0


def test_chart_is_a_picture(two_runs):
    header = (two_runs[0][0] / "chart.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert (int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) == (1800, 1260)


def test_two_runs_agree_bit_for_bit(two_runs):
    (first, one), (second, two) = two_runs
    assert [row.accuracy for row in one.rows] == [row.accuracy for row in two.rows]
    assert one.facts["validation"] == two.facts["validation"]
    for path in (next(first.glob("base-*.safetensors")).name, "adapter/adapter_model.safetensors"):
        ours, theirs = load_file(first / path), load_file(second / path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_taught_something(two_runs):
    """Otherwise the runs above would agree whatever happened."""
    accuracies = {row.method: row.accuracy for row in two_runs[0][1].rows}
    assert all(value > 0.3 for value in accuracies.values()), accuracies
    assert len(set(accuracies.values())) > 2


def test_forms_share_their_method_and_its_accuracy(two_runs):
    rows = {row.method: row for row in two_runs[0][1].rows}
    for method, form in (("LoRA", "LoRA (merged)"), ("APT", "APT (folded)")):
        assert rows[form].accuracy == rows[method].accuracy
        assert rows[form].trainable_params == rows[method].trainable_params
        assert rows[form].step_ms == rows[method].step_ms


def test_reloaded_adapter_predicts_the_same(two_runs):
    reload = two_runs[0][1].reload
    assert reload == Reload(method="APT", tests=746, equal_predictions=746, max_logit_difference=0.0)
    assert reload.exact


def test_the_second_run_takes_the_base_of_the_first(two_runs, monkeypatch):
    directory, results = two_runs[0]
    monkeypatch.setattr(base, "fit", lambda *_: pytest.fail("pretrained again"))
    again = base.pretrained(directory, MINIATURE, 3, lambda: None)
    assert again.accuracy == results.facts["base_accuracy"]
    assert again.was_cached
    with pytest.raises(pytest.fail.Exception, match="pretrained again"):
        base.pretrained(directory, MINIATURE, 4, lambda: None)


@pytest.mark.gate
def test_a_broken_base_is_made_anew(tmp_path):
    first = base.pretrained(tmp_path, MINIATURE, 3, lambda: None)
    whole = first.path.read_bytes()
    first.path.write_bytes(whole[:1000])
    again = base.pretrained(tmp_path, MINIATURE, 3, lambda: None)
    assert not again.was_cached
    assert first.path.read_bytes() == whole


def test_splits_are_disjoint_and_complete():
    splits = load_splits((5, 6, 7, 8, 9), train=20, validation=10, seed=0)
    assert [len(images) for images in splits] == [100, 50, 746]
    positions = torch.cat([images.positions for images in splits])
    assert len(positions.unique()) == len(positions) == 896
    for images, per_class in ((splits.train, 20), (splits.validation, 10)):
        assert images.labels.bincount().tolist() == [per_class] * 5
    pixels = torch.cat([images.pixels for images in splits]).flatten(1)
    assert (pixels.min(), pixels.max()) == (-1, 1)


def test_splits_follow_the_seed():
    first, again, other = (load_splits((5, 6), 20, 10, seed).train.positions for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_splits_leave_something_to_test():
    with pytest.raises(ValueError, match="digit 5 leave none"):
        load_splits((5,), 170, 12, seed=0)


def test_old_and_new_digits_share_no_image():
    new = load_splits(transfer.NEW_DIGITS, 20, 10, seed=0)
    old = load_splits(base.OLD_DIGITS, base.TRAIN_PER_CLASS, 0, seed=0)
    positions = [torch.cat([images.positions for images in splits]) for splits in (new, old)]
    assert not set(positions[0].tolist()) & set(positions[1].tolist())


def test_symmetries_are_eight_and_labelled_apart():
    images = load_splits((0, 1, 2), 5, 0, seed=0).train
    turned = base.in_all_symmetries(images)
    assert len(turned) == 8 * 15
    assert torch.equal(turned.pixels[:15], images.pixels)
    assert turned.labels.bincount().tolist() == [5] * 24
    views = turned.pixels.view(8, 15, 8, 8)[:, images.labels == 2]
    assert len(views.transpose(0, 1)[0].flatten(1).unique(dim=0)) == 8


def new_vit(num_labels: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return base.new_vit(MINIATURE, num_labels).requires_grad_(False).eval()


def test_deep_prompts_replace_those_of_the_block_before():
    model = DEEP_PROMPTS.adapt(new_vit(), MINIATURE)
    seen = []
    for block in transformer_blocks(model):
        block.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    pixels = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        model(pixel_values=pixels)
    (first, output), (second, _) = seen
    assert first.shape == second.shape == (3, 17 + 4, 32)
    for index, tokens in enumerate((first, second)):
        assert torch.equal(tokens[:, 1:5], model.prompts[index].expand(3, -1, -1))
    assert torch.equal(second[:, :1], output[:, :1])
    assert torch.equal(second[:, 5:], output[:, 5:])


@pytest.mark.parametrize(
    ("adaptation", "parameters"),
    [
        (LINEAR_PROBE, 0),
        (DEEP_PROMPTS, 2 * 4 * 32),
        (LORA, 2 * 2 * 2 * (32 + 32)),
        (APT, 2 * (4 * 32 + 2 * 4 * 32 + 1)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_only_the_method_and_the_classifier_train(adaptation, parameters):
    model = adaptation.adapt(new_vit(), MINIATURE)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == parameters + 32 * 5 + 5


def test_added_multiply_adds_are_those_of_the_formulas():
    pixels = torch.randn(16, 1, 8, 8)
    plain = count_macs(new_vit(), pixel_values=pixels)
    tokens, width, prompts, blocks = 17, 32, 4, 2

    apt = APT.adapt(new_vit(), MINIATURE)
    diffusion = blocks * 2 * tokens * prompts * width
    keys = blocks * 2 * prompts * 4 * width // len(pixels)  # once a batch
    assert count_macs(apt, pixel_values=pixels) - plain == diffusion + keys
    with APT.forms["APT (folded)"](apt):
        assert count_macs(apt, pixel_values=pixels) - plain == diffusion

    # Per block: the query, key, value and output projections and the two layers of the MLP, and a longer attention.
    deep = DEEP_PROMPTS.adapt(new_vit(), MINIATURE)
    projections = prompts * 12 * width**2
    attention = 2 * ((tokens + prompts) ** 2 - tokens**2) * width
    assert count_macs(deep, pixel_values=pixels) - plain == blocks * (projections + attention)


def test_timing_takes_turns_and_is_ready_before_each_call():
    events = []

    class Ready:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            events.append(f"{self.name} ready")

        def __exit__(self, *_):
            events.append(f"{self.name} done")

    contenders = [Contender(name, lambda n=name: Ready(n), lambda n=name: events.append(n)) for name in "ab"]
    rounds = []
    times = median_ms(contenders, 2, lambda: rounds.append(1))
    assert events == ["a ready", "a", "a", "a done", "b ready", "b", "b", "b done"] * 2
    assert len(rounds) == 2
    assert set(times) == {"a", "b"}


def test_labels_are_spread_in_order_within_the_axes():
    heights = [0.99, 0.2, 0.98, 0.21]
    moved = spread(heights)
    ordered = sorted(moved)
    assert sorted(range(4), key=moved.__getitem__) == sorted(range(4), key=heights.__getitem__)
    assert all(above - below >= LABEL_GAP - 1e-9 for below, above in zip(ordered, ordered[1:], strict=False))
    assert moved[1] == 0.2
    assert max(moved) <= 1


def test_command_prints_only_json(tmp_path, monkeypatch, capsys, two_runs):
    calls = []
    monkeypatch.setattr(demo, "run", lambda *args: calls.append(args) or two_runs[0][1])
    assert cli.main(["demo", "--task", "digits-transfer", "--json", "--seed", "7", "--output", str(tmp_path)]) == 0
    assert calls == [("digits-transfer", tmp_path / "digits-transfer", 7)]
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(two_runs[0][1].to_dict()))


def test_command_prints_a_table(tmp_path, monkeypatch, capsys, two_runs):
    monkeypatch.setattr(demo, "run", lambda *_: two_runs[0][1])
    assert cli.main(["demo", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(form in out for form in FORMS)
    assert "746 of 746 predictions equal, largest difference of a logit 0" in out


def test_interrupted_command_says_so_in_a_line(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert cli.main(["demo", "--output", str(tmp_path)]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().startswith("stopped; ")
    assert "Traceback" not in captured.err


def test_missing_packages_are_named_with_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "REQUIREMENTS", {"no_such_module": "no-such-package", "torch": "torch"})
    assert cli.main(["demo", "--output", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "no-such-package" in message
    assert "fast-prompt[demo]" in message
    assert len(message.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", ["-1", "x", str(2**63)])
def test_bad_seed_is_refused_in_a_line(seed, capsys):
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["demo", "--seed", seed])
    assert exit_code.value.code == 2
    assert "--seed" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_reported(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--output", str(tmp_path / "file")]) == 1
    assert "cannot write" in capsys.readouterr().err

"""An adapter's files: whole, loadable, and refused with a reason where they are not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VISION, assert_same, bert_classifier, build, run, snapshot, stir
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from fast_prompt.methods import APTConfig
from fast_prompt.tuning import FastPromptModel, get_fast_prompt_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD = APTConfig(num_prompts=3, modules_to_save=["classifier"])


def trained(config: APTConfig = HEAD, name: str = "vit") -> tuple[nn.Module, dict]:
    """A model whose adapter and head differ from any fresh one."""
    model, inputs = build(name)
    get_fast_prompt_model(model, config)
    stir(model)
    if config.modules_to_save:
        nn.init.normal_(model.classifier.weight)
    return model, inputs


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_whole_trainable_state_is_saved_and_nothing_of_the_base(tmp_path):
    """PEFT #2256: training cannot be resumed from a file that holds part of the state."""
    model, _ = trained()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    expected = {n.replace("default.", ""): p for n, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert {name.rpartition(".")[2] for name in saved} == {
        "prompts",
        "key_down",
        "key_up",
        "log_scale",
        "weight",
        "bias",
    }


def test_the_config_says_what_it_is_for(tmp_path):
    model, _ = trained()
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    assert values["method"] == "APT"
    assert values["base_model_class"] == "ViTForImageClassification"
    assert values["base_model_type"] == "vit"
    assert APTConfig.from_pretrained(tmp_path) == HEAD


def test_a_config_survives_its_own_file(tmp_path):
    config = APTConfig(
        num_prompts=7,
        rank=2,
        activation="softmax",
        row_weight="none",
        dropout=0.25,
        learn_scale=False,
        target_modules=["attention"],
        modules_to_save=["classifier"],
    )
    config.save_pretrained(tmp_path / "new")
    assert APTConfig.from_pretrained(tmp_path / "new") == config
    assert APTConfig(**{k: v for k, v in config.to_dict().items() if k != "method"}) == config


def test_from_pretrained_freezes_unless_told_otherwise(tmp_path):
    model, _ = trained()
    model.save_pretrained(tmp_path)
    frozen = FastPromptModel.from_pretrained(build("vit")[0], tmp_path)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    training = FastPromptModel.from_pretrained(build("vit")[0], tmp_path, is_trainable=True)
    assert [p.requires_grad for p in training.parameters()] == [p.requires_grad for p in model.parameters()]


def test_several_adapters_are_saved_beside_each_other(tmp_path):
    model, inputs = trained()
    first = run(model, inputs)
    model.add_adapter("second", APTConfig(num_prompts=2))
    model.set_adapter("second")
    second = run(model, inputs)
    model.save_pretrained(tmp_path / "all")
    assert set(files_in(tmp_path / "all")) == {CONFIG, WEIGHTS, f"default/{CONFIG}", f"default/{WEIGHTS}"}
    model.save_pretrained(tmp_path / "one", selected_adapters=["default"])
    assert set(files_in(tmp_path / "one")) == {CONFIG, WEIGHTS}
    fresh = FastPromptModel.from_pretrained(build("vit")[0], tmp_path / "all", "b")
    fresh.load_adapter(tmp_path / "all" / "default", "a")
    assert torch.equal(run(fresh, inputs), second)
    fresh.set_adapter("a")
    assert torch.equal(run(fresh, inputs), first)
    fresh.set_adapter("b")
    assert torch.equal(run(fresh, inputs), second)
    with pytest.raises(ValueError, match="adapter_name: expected one of"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["third"])
    assert not (tmp_path / "none").exists()


def test_loading_over_an_adapter_keeps_its_parameters(tmp_path):
    """An optimizer that holds them goes on."""
    model, inputs = trained()
    model.save_pretrained(tmp_path)
    output, parameters = run(model, inputs), list(map(id, model.parameters()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    model.load_adapter(tmp_path, "default")
    assert torch.equal(run(model, inputs), output)
    assert list(map(id, model.parameters())) == parameters
    assert model.classifier.weight.requires_grad


def test_only_the_main_process_writes(tmp_path):
    model, _ = trained()
    model.save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("fails_at", ["safetensors", "write", "first rename", "second rename"])
def test_a_save_that_fails_leaves_the_old_adapter_or_the_new_one(fails_at, tmp_path, monkeypatch):
    model, _ = trained()
    model.save_pretrained(tmp_path)
    old = files_in(tmp_path)
    other, _ = trained(APTConfig(num_prompts=5))

    def die(*args, **kwargs):
        raise OSError("disk full")

    replace, calls = Path.replace, []

    def die_later(self, target):
        calls.append(target)
        return die() if len(calls) == 2 else replace(self, target)

    target, name, function = {
        "safetensors": ("fast_prompt.tuning.files.save", None, die),
        "write": (os, "fsync", die),
        "first rename": (Path, "replace", die),
        "second rename": (Path, "replace", die_later),
    }[fails_at]
    if name is None:
        monkeypatch.setattr(target, function)
    else:
        monkeypatch.setattr(target, name, function)
    with pytest.raises(OSError, match="disk full"):
        other.save_pretrained(tmp_path)
    monkeypatch.undo()
    if fails_at != "second rename":  # the first one has replaced the adapter, the second one its config's copy
        assert files_in(tmp_path) == old
        return
    with pytest.warns(UserWarning, match=f"{CONFIG}: of another save than the weights"):
        loaded = FastPromptModel.from_pretrained(build("vit")[0], tmp_path)
    assert loaded.adapter_configs == other.adapter_configs
    assert files_in(tmp_path).keys() == {CONFIG, WEIGHTS}


def test_a_config_that_somebody_has_edited_counts(tmp_path):
    trained()[0].save_pretrained(tmp_path)
    edit(dropout=0.5)(tmp_path / CONFIG)
    loaded = FastPromptModel.from_pretrained(build("vit")[0], tmp_path)
    assert loaded.adapter_configs["default"].dropout == APTConfig.from_pretrained(tmp_path).dropout == 0.5
    APTConfig(num_prompts=3, dropout=0.25, modules_to_save=["classifier"]).save_pretrained(tmp_path)
    loaded = FastPromptModel.from_pretrained(build("vit")[0], tmp_path)
    assert loaded.adapter_configs["default"].dropout == APTConfig.from_pretrained(tmp_path).dropout == 0.25


def test_the_config_of_another_save_does_not_count(tmp_path):
    """What a copy by hand leaves, or a kill; and where the config file is lost, the weights have it."""
    model, inputs = trained()
    model.save_pretrained(tmp_path)
    trained(APTConfig(num_prompts=3, activation="softmax"))[0].save_pretrained(tmp_path / "other")
    (tmp_path / CONFIG).write_bytes((tmp_path / "other" / CONFIG).read_bytes())
    with pytest.warns(UserWarning, match=f"{CONFIG}: of another save than the weights beside it"):
        assert APTConfig.from_pretrained(tmp_path) == HEAD
    (tmp_path / CONFIG).unlink()
    assert APTConfig.from_pretrained(tmp_path) == HEAD
    assert torch.equal(run(FastPromptModel.from_pretrained(build("vit")[0], tmp_path), inputs), run(model, inputs))


def as_before(directory: Path) -> None:
    """Files as earlier versions wrote them, and as other tools write weights anew."""
    save_file(load_file(directory / WEIGHTS), directory / WEIGHTS, {"format": "pt"})
    values = json.loads((directory / CONFIG).read_text())
    del values["save_id"]
    (directory / CONFIG).write_text(json.dumps(values))


def test_the_adapters_of_earlier_versions_load(tmp_path):
    model, inputs = trained()
    model.save_pretrained(tmp_path)
    as_before(tmp_path)
    assert torch.equal(run(FastPromptModel.from_pretrained(build("vit")[0], tmp_path), inputs), run(model, inputs))
    (tmp_path / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=CONFIG):
        FastPromptModel.from_pretrained(build("vit")[0], tmp_path)


def test_leftovers_of_the_dead_are_removed_and_files_of_the_living_are_not(tmp_path):
    leftover = tmp_path / f".{WEIGHTS}.{'0' * 32}"
    living = tmp_path / f".{WEIGHTS}.{'1' * 32}"
    unknown = tmp_path / f".{WEIGHTS}.mine"
    for path in (leftover, living, unknown):
        path.write_bytes(b"half of")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, living], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.read(1) == b"!"
        trained()[0].save_pretrained(tmp_path)
        assert set(files_in(tmp_path)) == {CONFIG, WEIGHTS, living.name, unknown.name}
        holder.stdin.close()
    trained()[0].save_pretrained(tmp_path)
    assert set(files_in(tmp_path)) == {CONFIG, WEIGHTS, unknown.name}


HOLD = """
import fcntl, sys
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_EX)
print("!", flush=True)
sys.stdin.read()
"""


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def edit(**changes):
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def edit_tensors(change):
    def rewrite(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return rewrite


PROMPTS = "vit.layers.0.attention.fast_prompt.prompts"

BROKEN = {
    "no weights": (WEIGHTS, Path.unlink, FileNotFoundError, WEIGHTS),
    "cut config": (CONFIG, cut, ValueError, "not valid JSON"),
    "a list": (CONFIG, lambda path: path.write_text("[1]"), ValueError, "expected a JSON object"),
    "cut weights": (WEIGHTS, cut, ValueError, f"{WEIGHTS}: not a whole safetensors file"),
    "empty weights": (WEIGHTS, lambda path: path.write_bytes(b""), ValueError, "not a whole safetensors file"),
    "a pickle": (WEIGHTS, lambda path: torch.save({"a": torch.ones(1)}, path), ValueError, "not a whole safetensors"),
    "another library's": (CONFIG, edit(method=None, peft_type="LORA"), ValueError, "got method 'LORA'"),
    "a bad setting": (CONFIG, edit(rank=0), ValueError, f"{CONFIG}: rank: expected .* got 0"),
    "other settings": (CONFIG, edit(num_prompts=4), ValueError, rf"of another shape: {PROMPTS} \[3, 32\] in the file"),
    "fewer tensors": (WEIGHTS, edit_tensors(lambda t: t.pop(PROMPTS)), ValueError, f"missing from the file: {PROMPTS}"),
    "more tensors": (
        WEIGHTS,
        edit_tensors(lambda t: t.update(x=torch.ones(1))),
        ValueError,
        r"made for ViTForImageClassification\) does not fit this model; not in this model: x",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_or_foreign_adapter_is_refused_before_anything_changes(case, tmp_path):
    name, damage, error, message = BROKEN[case]
    trained()[0].save_pretrained(tmp_path)
    damage(tmp_path / name)
    model, _ = build("vit")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        FastPromptModel.from_pretrained(model, tmp_path)
    assert_same(before, snapshot(model))
    get_fast_prompt_model(model, HEAD)
    before = snapshot(model)
    for adapter_name in ("second", "default"):
        with pytest.raises((error, ValueError)):
            model.load_adapter(tmp_path, adapter_name)
        assert_same(before, snapshot(model))


def wider_vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**VISION | {"hidden_size": 48}, num_labels=5))


def deeper_vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**VISION | {"num_hidden_layers": 3}, num_labels=5))


def another_architecture() -> nn.Module:
    return bert_classifier()[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wider_vit, "of another shape: vit.layers.0.attention.fast_prompt.prompts .3, 32. in the file, .3, 48. here"),
        (deeper_vit, "missing from the file: vit.layers.2.attention.fast_prompt.prompts"),
        (another_architecture, "made for ViTForImageClassification.*not in this model: vit.layers.* and 4 more"),
    ],
)
def test_an_adapter_for_another_base_is_refused(make, message, tmp_path):
    trained()[0].save_pretrained(tmp_path)
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        FastPromptModel.from_pretrained(model, tmp_path)
    assert_same(before, snapshot(model))


def test_other_settings_under_a_name_in_use_are_refused(tmp_path):
    model, _ = trained()
    model.save_pretrained(tmp_path)
    other, _ = trained(APTConfig(num_prompts=4, modules_to_save=["classifier"]))
    with pytest.raises(ValueError, match="'default' exists with other settings.*num_prompts 4 here, 3 there"):
        other.load_adapter(tmp_path, "default")


def test_unknown_keys_are_warned_about(tmp_path):
    model, inputs = trained()
    model.save_pretrained(tmp_path)
    edit(temperature=3, colour="red")(tmp_path / CONFIG)
    with pytest.warns(UserWarning, match="unknown keys are ignored: colour, temperature"):
        loaded = FastPromptModel.from_pretrained(build("vit")[0], tmp_path)
    assert torch.equal(run(loaded, inputs), run(model, inputs))


def test_nothing_is_ever_unpickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr("pickle.Unpickler", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr("torch.load", refuse)
    model, inputs = trained()
    model.save_pretrained(tmp_path)
    loaded = FastPromptModel.from_pretrained(build("vit")[0], tmp_path)
    assert torch.equal(run(loaded, inputs), run(model, inputs))


@pytest.mark.parametrize("wish", [{"push_to_hub": True}, {"repo_id": "me/mine"}, {"safe_serialization": False}])
def test_what_saving_does_not_do_is_refused(wish, tmp_path):
    (name,) = wish
    with pytest.raises(ValueError, match=f"save_pretrained: {name}="):
        trained()[0].save_pretrained(tmp_path / "adapter", **wish)
    assert not (tmp_path / "adapter").exists()


def test_what_asks_for_nothing_more_is_accepted(tmp_path):
    trained()[0].save_pretrained(tmp_path, push_to_hub=False, safe_serialization=True, token=None)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_an_adapter_in_use_trains_on_if_it_is_loaded_to(tmp_path):
    trained()[0].save_pretrained(tmp_path)
    model = FastPromptModel.from_pretrained(build("vit")[0], tmp_path)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert any(parameter.requires_grad for parameter in model.parameters())
    model.load_adapter(tmp_path, "default")
    assert any(parameter.requires_grad for parameter in model.parameters())
    model.load_adapter(tmp_path, "default", is_trainable=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="is_trainable: 'other' would not be in use"):
        model.load_adapter(tmp_path, "other", is_trainable=True)
    assert list(model.adapter_configs) == ["default"]

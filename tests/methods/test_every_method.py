"""One contract for every method in every architecture: what trains, is saved, switched, copied and given back."""

import copy
from pathlib import Path

import pytest
import torch
from cases import CASES, COMPILED, ONE_OF_EACH, TRAINED, stir
from safetensors.torch import load_file
from tiny_models import assert_same, snapshot
from torch import nn
from transformers import Trainer, TrainingArguments

from fast_prompt import DASConfig, FastPromptModel, get_fast_prompt_model
from fast_prompt.tuning.combination import as_config
from fast_prompt.tuning.config import MethodConfig

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
one_of_each = pytest.mark.parametrize("case", ONE_OF_EACH.values(), ids=ONE_OF_EACH)

# Of the model, of what trains in it, and how far the output may be from that in float32.
OTHER_DTYPES = [
    (torch.bfloat16, torch.float32, 0.1),
    (torch.float16, torch.float32, 0.02),
    (torch.float64, torch.float64, 1e-4),
]


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@every_case
def test_a_step_changes_what_trains_and_nothing_else(case):
    model, inputs = case.adapted()
    before = values(model)
    case.step(model, inputs)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved <= trained(model)
    still = {name for name in trained(model) - moved if not any(word in name for word in case.still)}
    assert still == {name for name in still if case.searches and ".default." in name}


@every_case
def test_revert_and_disable_give_the_model_back_bit_for_bit(case):
    model, inputs = case.base()
    alone = {name: value for name, value in inputs.items() if name != "visual_embeds"}
    next(model.parameters()).requires_grad_(False)
    with torch.no_grad():  # torch's attention on CPU takes another path where a bias wants a gradient
        output = case.outputs(model, alone)
    before = snapshot(model)
    get_fast_prompt_model(model, case.config)
    model.add_adapter("second", case.other)
    for name in ("default", "second"):
        model.set_adapter(name)
        case.step(model, inputs)
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(case.outputs(model, alone), output)
            assert torch.equal(case.outputs(model, inputs), output)
    assert model.revert() is model
    assert_same(before, snapshot(model))
    with torch.no_grad():
        assert torch.equal(case.outputs(model, alone), output)


@every_case
def test_adapting_and_reverting_keep_every_module_in_its_mode(case):
    model, _ = case.base()
    next(model.children()).train()
    before = snapshot(model)
    get_fast_prompt_model(model, case.config)
    assert_same(before, snapshot(model.revert()))


@every_case
def test_a_saved_adapter_gives_a_fresh_base_the_same_output(case, tmp_path):
    model, inputs = case.adapted()
    case.step(model, inputs)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    own = model.get_adapter_state_dict()
    assert {id(value) for value in own.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert saved.keys() == own.keys() and all(torch.equal(saved[name], own[name]) for name in own)
    loaded = FastPromptModel.from_pretrained(case.base()[0], tmp_path, is_trainable=True)
    case.use(loaded)
    assert loaded.adapter_configs == {"default": as_config(case.config)}
    assert torch.equal(case.outputs(loaded, inputs), case.outputs(model, inputs))
    assert trained(loaded) == trained(model)
    assert trained(FastPromptModel.from_pretrained(case.base()[0], tmp_path)) == set()


@every_case
def test_adapters_switch_and_none_disturbs_another(case, tmp_path):
    model, inputs = case.adapted()
    first = case.outputs(model, inputs).detach()
    model.add_adapter("second", case.other)
    assert torch.equal(case.outputs(model, inputs), first)
    model.set_adapter("second")
    assert trained(model) == {n for n in trained(model) if ".default." not in n}
    stir(model)
    model.set_adapter("default")
    first = case.outputs(model, inputs).detach()
    model.set_adapter("second")
    second = case.outputs(model, inputs).detach()
    model.set_adapter("default")
    assert second.shape != first.shape or not torch.equal(second, first)
    model.save_pretrained(tmp_path)
    fresh = FastPromptModel.from_pretrained(case.base()[0], tmp_path / "second", "second")
    fresh.load_adapter(tmp_path, "default")
    for name, expected in (("default", first), ("second", second), ("default", first)):
        for each in (model, fresh):
            each.set_adapter(name)
            if name == "default":
                case.use(each)
            assert torch.equal(case.outputs(each, inputs), expected)
    fresh.delete_adapter("second")
    assert torch.equal(case.outputs(fresh, inputs), first)
    assert not any("second" in name for name in fresh.state_dict())


@every_case
def test_an_adapter_is_saved_from_a_gathered_state(case, tmp_path):
    """What sharded training hands over: names of the whole model."""
    model, _ = case.adapted()
    model.add_adapter("second", case.other)
    model.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "gathered", state_dict=dict(model.state_dict()))
    files = {path.relative_to(tmp_path / "own") for path in (tmp_path / "own").rglob("*") if path.is_file()}
    assert len(files) == 4
    assert all((tmp_path / "own" / path).read_bytes() == (tmp_path / "gathered" / path).read_bytes() for path in files)


@every_case
def test_a_config_survives_its_own_file(case, tmp_path):
    config = as_config(case.config)
    config.save_pretrained(tmp_path)
    assert MethodConfig.from_pretrained(tmp_path) == type(config).from_pretrained(tmp_path) == config


@every_case
@torch.no_grad()
def test_a_deep_copy_is_whole_and_apart(case):
    model, inputs = case.adapted()
    output = case.outputs(model, inputs)
    duplicate = copy.deepcopy(model)
    model.revert()
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(case.outputs(duplicate, inputs), output)
    expected, reverted = case.base()[0].state_dict(), duplicate.revert().state_dict()
    assert expected.keys() == reverted.keys()
    assert all(torch.equal(expected[name], reverted[name]) for name in expected)


@every_case
def test_autocast_and_half_and_double(case):
    model, inputs = case.adapted()
    expected = case.outputs(model, inputs).detach()
    with torch.autocast("cpu", torch.bfloat16):
        output = case.outputs(model, inputs)
    assert (output.float() - expected).abs().max() < 0.1 * expected.abs().max()
    (output.float() @ torch.linspace(-1, 1, len(output))).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(each.dtype == torch.float32 and each.isfinite().all() for each in gradients)
    for dtype, own, most in OTHER_DTYPES:
        other, _ = case.base()
        get_fast_prompt_model(other.to(dtype), case.config)
        stir(other)
        case.use(other)
        assert {p.dtype for p in other.parameters() if p.requires_grad} == {own}
        moved = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        output = case.outputs(other, moved)
        assert output.dtype == dtype
        assert (output.double() - expected).abs().max() < most * expected.abs().max()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("before", [False, True])
@one_of_each
def test_gradient_checkpointing_gives_the_same_gradients(case, before, reentrant):
    """PEFT #869, and its reentrant trap: with a frozen base no block's input needs a gradient by itself.

    Dropout within the methods is on, so what is computed again must draw the same masks.
    """
    gradients = []
    for checkpointing in (False, True):
        model, inputs = case.base()
        if checkpointing and before:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        untouched = snapshot(model)
        get_fast_prompt_model(model, case.config)
        stir(model)
        if checkpointing and not before:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for name, module in model.train().named_modules():
            if isinstance(module, nn.Dropout) and "fast_prompt" not in name:
                module.p = 0.0
        case.loss(model, inputs).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        if before or not checkpointing:
            model.revert()
            assert untouched["state"].keys() == model.state_dict().keys()
    plain, checkpointed = gradients
    assert plain and plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(value, checkpointed[name], rtol=1e-3, atol=1e-4 * float(value.abs().max()) + 1e-6)


@pytest.mark.gate
@pytest.mark.parametrize("name", COMPILED)
def test_the_whole_model_compiles_to_one_graph_and_follows_every_change(name):
    torch._dynamo.reset()
    case = CASES[name]
    model, inputs = case.adapted()
    inputs |= {"use_cache": False} if "llama" in case.model or "t5" in case.model else {}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def agree() -> torch.Tensor:
        output = compiled(**inputs)[0]
        torch.testing.assert_close(output, model(**inputs)[0], rtol=1e-4, atol=1e-4)
        return output

    agree().float().square().sum().backward()
    assert any(p.grad is not None for p in model.parameters())
    model.revert()
    inputs.pop("visual_embeds", None)
    agree()


@pytest.mark.parametrize("kind", TRAINED)
def test_trainer_learns_saves_and_resumes(kind, tmp_path):
    pytest.importorskip("accelerate")
    make, config, examples = TRAINED[kind]

    def trainer(model: nn.Module, directory: Path) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(directory),
            per_device_train_batch_size=4,
            num_train_epochs=3,
            learning_rate=1e-2,
            save_strategy="epoch",
            logging_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=1,
        )
        return Trainer(model=model, args=arguments, train_dataset=examples(16), eval_dataset=examples(8))

    def adapted() -> nn.Module:
        model = make()
        torch.manual_seed(3)
        get_fast_prompt_model(model, config)
        return model.compact() if isinstance(config, DASConfig) else model

    model = adapted()
    run = trainer(model, tmp_path / "run")
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    resumed = adapted()
    trainer(resumed, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    own, again = model.get_adapter_state_dict(), resumed.get_adapter_state_dict()
    assert own.keys() == again.keys() and all(torch.equal(own[name], again[name]) for name in own)

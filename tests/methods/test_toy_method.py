"""A LoRA that ``docs/adding-a-method.md`` adds: this runs the page's code, which touches no file of the package."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import VISION, assert_same, build, run, snapshot, stir
from transformers import BertConfig, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from fast_prompt import APTConfig, FastPromptModel, cost, get_fast_prompt_model
from fast_prompt.cli import main
from fast_prompt.search.plan import Plan
from fast_prompt.tuning.config import METHODS, MethodConfig

PAGE = Path(__file__).parents[2] / "docs/adding-a-method.md"
NAMES = ("bert", "roberta", "vit", "vilt", "clip")


@pytest.fixture(scope="module", autouse=True)
def toy():
    """The module that the page's code makes."""
    module = ModuleType("toy_method")
    sys.modules[module.__name__] = module  # where dataclasses look for what annotations name
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))
    exec(compile(code, str(PAGE), "exec"), vars(module))
    yield module
    del METHODS["LOW_RANK"], sys.modules[module.__name__]


@pytest.mark.parametrize("name", NAMES)
def test_it_adapts_trains_saves_loads_and_reverts(toy, name, tmp_path):
    model, inputs = build(name)
    before, untouched = snapshot(model), run(model, inputs)
    adapted = get_fast_prompt_model(model, toy.LowRankConfig(rank=3))
    assert torch.equal(run(adapted, inputs), untouched)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    run(adapted, inputs).square().sum().backward()
    optimizer.step()
    stir(adapted)
    expected = run(adapted, inputs)
    assert not torch.equal(expected, untouched)
    adapted.save_pretrained(tmp_path)
    assert isinstance(MethodConfig.from_pretrained(tmp_path), toy.LowRankConfig)
    assert torch.equal(run(FastPromptModel.from_pretrained(build(name)[0], tmp_path), inputs), expected)
    adapted.revert()
    assert_same(before, snapshot(model))


def test_several_adapters_beside_another_method(toy):
    model, inputs = build("bert")
    adapted = get_fast_prompt_model(model, toy.LowRankConfig(rank=2))
    adapted.add_adapter("apt", APTConfig(num_prompts=3))
    stir(adapted)
    first = run(adapted, inputs)
    adapted.set_adapter("apt")
    assert not torch.equal(run(adapted, inputs), first)
    adapted.set_adapter("default")
    assert torch.equal(run(adapted, inputs), first)
    both = get_fast_prompt_model(build("bert")[0], [toy.LowRankConfig(), APTConfig(num_prompts=3)])
    assert run(both, inputs).shape == first.shape


def test_trainer(toy, tmp_path):
    pytest.importorskip("accelerate")
    config = toy.LowRankConfig(rank=2, modules_to_save=["classifier"])
    model = get_fast_prompt_model(ViTForImageClassification(ViTConfig(**VISION, num_labels=2)), config)
    data = [{"pixel_values": torch.randn(3, 16, 16), "labels": index % 2} for index in range(4)]
    options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 2, "save_strategy": "no"}
    start = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=data).train()
    now = dict(model.named_parameters())
    assert start and any(not torch.equal(now[name], value) for name, value in start.items() if ".up" in name)


def test_its_cost_by_the_command(capsys, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertConfig(**sizes).save_pretrained(tmp_path)
    assert main(["cost", "--model", str(tmp_path), "--text-length", "7", "--method", "low_rank", "lora", "--json"]) == 0
    ours, baseline = json.loads(capsys.readouterr().out)["rows"]
    assert ours["method"] == "low_rank"
    counted = ("macs", "added_macs", "params", "trainable_params")
    assert [ours[name] for name in counted] == [baseline[name] for name in counted]
    assert "low_rank" in cost.methods_for(cost.find_subject(str(tmp_path)))


def test_it_joins_a_search_from_a_file(toy, tmp_path):
    path = tmp_path / "search.toml"
    head = 'model = "m"\nexamples = "e"\noutput = "o"\n[search]\nsteps = 2\n[low_rank]\nrank = 2\n'
    path.write_text(head)
    with pytest.raises(ValueError, match=r"expected a table \[das\] or \[dvp\]"):
        Plan.read(path)
    path.write_text(f"{head}[das]\nnum_skipped = 1\n")
    searched, joined = Plan.read(path).configs
    assert searched.method == "DAS" and joined == toy.LowRankConfig(rank=2)


def test_a_method_is_one_class(toy):
    with pytest.raises(ValueError, match=r"method: LOW_RANK is that of toy_method.LowRankConfig already"):
        dataclasses.make_dataclass("Other", [], bases=(MethodConfig,), namespace={"method": "LOW_RANK"})
    assert METHODS["LOW_RANK"] is toy.LowRankConfig


def test_without_a_default_for_everything_it_is_counted_by_its_own_cost_or_not_at_all(toy):
    fields, named = [("size", int)], {"method": "NEEDY"}
    dataclasses.make_dataclass("Needy", fields, bases=(toy.LowRankConfig,), kw_only=True, namespace=named)
    try:
        assert "needy" not in cost.counted_methods() and "low_rank" in cost.counted_methods()
    finally:
        del METHODS["NEEDY"]

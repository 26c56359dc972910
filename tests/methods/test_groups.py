"""An optimizer's parameter groups: every parameter once, each at the rate of its kind."""

import pytest
from tiny_models import bert, vit

import fast_prompt
from fast_prompt import APTConfig, DVPConfig


def test_parameter_groups_hold_everything_that_trains_once():
    model, _ = bert()
    config = DVPConfig(layer=1, visual_width=6, adapter_width=4, num_answers=3)
    model = fast_prompt.get_fast_prompt_model(model, [config, APTConfig(num_prompts=3)])
    groups = fast_prompt.parameter_groups(model, 1e-3, head_rate=1e-2)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(trained)
    for name, parameter in trained.items():
        slow, head = name.endswith(("key_up", "log_scale")), name.startswith("fast_prompt_head")
        assert rates[id(parameter)] == pytest.approx(1e-4 if slow else 1e-2 if head else 1e-3), name


def test_parameter_groups_know_modules_to_save_as_heads():
    model, _ = vit()
    model = fast_prompt.get_fast_prompt_model(model, APTConfig(num_prompts=3, modules_to_save=["classifier"]))
    groups = fast_prompt.parameter_groups(model, 1e-3, head_rate=1e-2)
    (head,) = (group["params"] for group in groups if group["lr"] == 1e-2)
    assert {id(parameter) for parameter in head} == {id(parameter) for parameter in model.classifier.parameters()}

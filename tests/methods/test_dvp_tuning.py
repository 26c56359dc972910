"""DVP as an adapter: what trains, what is saved, switched, combined with APT, compiled and given back."""

import inspect
import json

import pytest
import torch
from cases import dvp as config
from cases import features, stir
from tiny_models import WIDTH, build, build_language_model
from torch import Tensor, nn

from fast_prompt import APTConfig, FastPromptModel, get_fast_prompt_model
from fast_prompt.tolerances import TOLERANCES, relative_error
from fast_prompt.tuning.combination import CombinedConfig

APT = APTConfig(num_prompts=3)


def see(model: nn.Module, inputs: dict) -> Tensor:
    """The model's first output with an image."""
    torch.manual_seed(0)
    return model(**inputs, visual_embeds=features())[0]


def step(model: nn.Module, inputs: dict) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    see(model, inputs).square().sum().backward()
    optimizer.step()


def test_several_adapters_switch_with_their_layers_heads_and_weights(tmp_path):
    model, inputs = build_language_model("bert")
    get_fast_prompt_model(model, config(0, train_base="full", num_answers=3))
    model.add_adapter("late", config(2, num_prompts=2, adapter_width=4, num_answers=5))
    model.add_adapter("apt", APT)
    model.add_adapter("bare", config(1))
    stir(model)

    def output_of(each: nn.Module) -> Tensor:
        image = {} if each.active_adapter == "apt" else {"visual_embeds": features()}
        return each(**inputs, **image)[0].detach()

    results = {}
    for name in model.adapter_configs:
        model.set_adapter(name)
        results[name] = output_of(model)
    assert [list(value.shape) for value in results.values()] == [[2, 3], [2, 5], [2, 7, WIDTH], [2, 7, WIDTH]]
    model.save_pretrained(tmp_path)
    fresh = FastPromptModel.from_pretrained(build_language_model("bert")[0], tmp_path, "bare")
    for name in ("apt", "late", "default"):
        fresh.load_adapter(tmp_path / name, name)
        fresh.set_adapter(name)
        assert torch.equal(output_of(fresh), results[name])
    fresh.set_adapter("bare")
    for name in ("apt", "late", "default"):
        fresh.delete_adapter(name)
    assert torch.equal(output_of(fresh), results["bare"])
    assert not any(word in key for key in fresh.state_dict() for word in ("default", "late", "apt", "head"))


def test_full_tuning_keeps_tied_weights_tied():
    model, inputs = build_language_model("t5_generator")
    tied = [model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head]
    own = tied[0].weight
    assert all(module.weight is own for module in tied)
    get_fast_prompt_model(model, config(train_base="full"))
    assert tied[0].weight is not own
    assert all(module.weight is tied[0].weight for module in tied)
    step(model, inputs)
    assert not torch.equal(tied[3].weight, own)
    model.revert()
    assert all(module.weight is own for module in tied)


# APT and DVP together


def test_both_methods_act_and_neither_disturbs_the_other():
    """With APT's prompts at zero the model is DVP's; APT's attention then sees the visual prompts as rows."""
    alone, inputs = build_language_model("bert")
    get_fast_prompt_model(alone, config())
    both, _ = build_language_model("bert")
    get_fast_prompt_model(both, [APT, config()])
    for model in (alone, both):
        stir(model)
    values = dict(alone.named_parameters())
    with torch.no_grad():
        for name, parameter in both.named_parameters():
            if name in values:
                parameter.copy_(values[name])
            elif name.endswith(("prompts", "log_scale")):
                parameter.zero_()
        assert torch.equal(see(both, inputs), see(alone, inputs))
        rows = []
        adapter = both.encoder.layer[1].attention.output.fast_prompt
        adapter.register_forward_hook(lambda _, args, __: rows.append(args[0].shape))
        adapter["default"].prompts.normal_()
        assert not torch.allclose(see(both, inputs), see(alone, inputs))
    assert rows == [(2, 8, WIDTH)]


def test_a_combination_folds_what_folds():
    model, inputs = build_language_model("bert")
    get_fast_prompt_model(model, [config(adapter_width=4), APT])
    stir(model)
    with torch.no_grad():
        output = see(model, inputs)
        model.fold()
        assert model.is_folded
        assert relative_error(see(model, inputs), output) < TOLERANCES[torch.float32]
        model.unfold()
        assert torch.equal(see(model, inputs), output)
    model.revert()
    get_fast_prompt_model(model, config())
    with pytest.raises(ValueError, match="fold: DVP has nothing that merges"):
        model.fold()


def test_combinations_are_checked():
    model, _ = build_language_model("bert")
    with pytest.raises(ValueError, match="configs: expected two or more different methods, got APT, APT"):
        get_fast_prompt_model(model, [APT, APT])
    with pytest.raises(ValueError, match="configs: expected two or more different methods, got none"):
        get_fast_prompt_model(model, [])
    with pytest.raises(TypeError, match="config: expected a method's config such as APTConfig, got dict"):
        get_fast_prompt_model(model, [APT, {}])
    assert get_fast_prompt_model(model, [APT]).adapter_configs == {"default": APT}
    named = CombinedConfig(configs=[config(modules_to_save=["a"]), APTConfig(modules_to_save=["b", "a"])])
    assert named.modules_to_save == ["a", "b"]


def test_a_combination_survives_its_own_file(tmp_path):
    combined = CombinedConfig(configs=[config(num_prompts=2, query="mean"), APTConfig(rank=2)])
    combined.save_pretrained(tmp_path)
    assert CombinedConfig.from_pretrained(tmp_path) == combined
    assert [each["method"] for each in json.loads((tmp_path / "adapter_config.json").read_text())["configs"]] == [
        "DVP",
        "APT",
    ]


# Inside training


def test_the_forward_shows_what_it_takes():
    model, _ = build_language_model("bert")
    before = list(inspect.signature(model.forward).parameters)
    get_fast_prompt_model(model, config(num_answers=2))
    names = list(inspect.signature(model.forward).parameters)
    visual = ["visual_embeds", "visual_attention_mask", "visual_query_mask"]
    assert names == [*before[:-1], *visual, "labels", "num_items_in_batch", before[-1]]
    model.revert()
    assert list(inspect.signature(model.forward).parameters) == before


def test_apt_alone_still_takes_no_image():
    model, inputs = build("bert")
    get_fast_prompt_model(model, APT)
    output = model(**inputs)[0]
    assert output.shape == (2, 7, WIDTH)

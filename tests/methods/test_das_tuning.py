"""DAS as an adapter: what trains, is saved, switched, combined, compiled and given back; and what ``compact`` drops."""

import copy
import dataclasses

import pytest
import torch
from cases import SKIPPING, VISUAL_WIDTH, base, features, stir
from cases import das as config
from test_das import adapted, outputs
from tiny_models import build_language_model
from torch import Tensor, nn

from fast_prompt import (
    APTConfig,
    DVPConfig,
    FastPromptModel,
    get_fast_prompt_model,
    set_skipped,
    skipped_now,
)
from fast_prompt.models.blocks import find_blocks
from fast_prompt.tolerances import TOLERANCES, relative_error
from fast_prompt.tuning.combination import CombinedConfig


def first(name: str, model: nn.Module, inputs: dict) -> Tensor:
    return outputs(name, model, inputs)[0]


def loss(name: str, model: nn.Module, inputs: dict) -> Tensor:
    """Moved by every output; a sum of squares after a LayerNorm would not be."""
    values = torch.cat([output.flatten() for output in outputs(name, model, inputs)])
    return values @ torch.linspace(-1, 1, len(values))


def step(name: str, model: nn.Module, inputs: dict) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    loss(name, model.train(), inputs).backward()
    optimizer.step()
    model.eval()


def test_only_what_runs_gets_a_gradient_in_a_search():
    model, inputs = adapted("vit", config())
    set_skipped(model, ["vit.layers.1"])
    step("vit", model, inputs)
    touched = {name.partition(".default")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {
        "vit.layers.0.fast_prompt_attention",
        "vit.layers.0.fast_prompt_mlp",
        "vit.layers.1.fast_prompt_skip",
    }


def test_the_order_in_which_adapters_come_does_not_matter():
    """A block that one adapter skips and another keeps."""
    values = []
    for order in ((0, 1), (1, 0)):
        model, inputs = base("vit")
        for index in order:
            if index == order[0]:
                get_fast_prompt_model(model, config(index), f"skips{index}")
            else:
                model.add_adapter(f"skips{index}", config(index))
        generator = torch.Generator().manual_seed(0)
        parameters = {n: p for n, p in model.named_parameters() if "fast_prompt" in n}
        with torch.no_grad():
            for name in sorted(parameters):
                parameters[name].normal_(generator=generator)
        for index in (0, 1):
            model.set_adapter(f"skips{index}")
            values.append(first("vit", model, inputs))
    assert torch.equal(values[0], values[2])
    assert torch.equal(values[1], values[3])


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_another_method_beside_it_is_what_it_is_alone(name):
    """BERT's attention output is both methods' host; neither may take the other's modules for the model's own."""
    alone, inputs = base(name)
    get_fast_prompt_model(alone, APT, "apt")
    both, _ = base(name)
    get_fast_prompt_model(both, config(0))
    expected = {key: value.clone() for key, value in both.state_dict().items()}
    output = first(name, both, inputs)
    both.add_adapter("apt", APT)
    both.set_adapter("apt")
    values = alone.state_dict()
    for key in values:
        if ".apt." in key:
            both.state_dict()[key].copy_(values[key].normal_())
    assert torch.equal(first(name, both, inputs), first(name, alone, inputs))
    both.set_adapter("default")
    assert torch.equal(first(name, both, inputs), output)
    both.delete_adapter("apt")
    assert expected.keys() == both.state_dict().keys()


def test_what_cannot_change_its_blocks_says_so():
    model, _ = base("vit")
    with pytest.raises(TypeError, match="model: expected one adapted with a DASConfig, got ViTForImageClassification"):
        set_skipped(model, [])
    get_fast_prompt_model(model, APTConfig(num_prompts=2))
    with pytest.raises(ValueError, match="the adapter 'default' is of APT and skips none"):
        skipped_now(model)
    model.add_adapter("fixed", config(1))
    model.set_adapter("fixed")
    with pytest.raises(ValueError, match=r"'fixed' skips a fixed set of blocks.*\(vit.layers.1\)"):
        set_skipped(model, [])


# Several methods on one model

DAS = config(1)
DVP = DVPConfig(layer=1, visual_width=VISUAL_WIDTH, num_prompts=2, adapter_width=4, num_answers=3, dropout=0.0)
APT = APTConfig(num_prompts=3)


def see(model: nn.Module, inputs: dict) -> Tensor:
    return model(**inputs, visual_embeds=features())[0]


def together(*configs, name: str = "bert") -> tuple[nn.Module, dict]:
    model, inputs = build_language_model(name)
    torch.manual_seed(1)
    get_fast_prompt_model(model, list(configs))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for key in sorted(key for key, _ in model.named_parameters() if ".default." in key):
            parameter = model.get_parameter(key)
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model, inputs


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_three_methods_make_one_adapter_in_any_order(skipped, search, tmp_path):
    das = config() if search else config(skipped)
    results = []
    for configs in ([DVP, APT, das], [das, APT, DVP], [APT, das, DVP]):
        model, inputs = together(*configs)
        if search:
            set_skipped(model, [f"encoder.layer.{skipped}"])
            assert skipped_now(model) == [f"encoder.layer.{skipped}"]
        results.append(see(model, inputs))
        assert results[-1].shape == (2, 3)
        assert torch.equal(results[-1], results[0])
    results[-1].square().sum().backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None}
    assert search or idle == set()
    model.save_pretrained(tmp_path)
    loaded = FastPromptModel.from_pretrained(build_language_model("bert")[0], tmp_path)
    assert loaded.adapter_configs["default"] == CombinedConfig(configs=[APT, das, DVP])
    if search:
        set_skipped(loaded, [f"encoder.layer.{skipped}"])
    assert torch.equal(see(loaded, inputs), results[-1])


def test_each_of_three_methods_acts():
    """The skipped block sees the visual prompts as rows; in a kept attention all three methods act, each on its own."""
    model, inputs = together(DVP, APT, config(1))
    names = [name for name, _ in model.named_parameters() if ".default." in name]
    assert not any("layer.1.attention" in name or "layer.1.output" in name for name in names)
    for host in (
        "layer.0.attention.output.fast_prompt.",
        "layer.0.attention.output.fast_prompt_residual.",
        "layer.0.attention.output.dropout.fast_prompt.",
        "layer.0.output.fast_prompt_parallel.",
        "layer.1.fast_prompt_skip.",
        "layer.2.output.dropout.fast_prompt.",
    ):
        assert any(host in name for name in names)
    rows = []
    model.encoder.layer[1].fast_prompt_skip.register_forward_hook(lambda *_: pytest.fail("the list itself never runs"))
    model.encoder.layer[1].fast_prompt_skip["default"].register_forward_hook(lambda _, args, __: rows.append(args[0]))
    output = see(model, inputs)
    assert [value.shape[1] for value in rows] == [2 + 7]
    part = model.encoder.layer[0].attention
    seen = {}
    part.output.LayerNorm.register_forward_hook(lambda _, args, result: seen.update(total=args[0]))
    part.self.register_forward_hook(lambda _, args, result: seen.update(x=args[0], mixed=result[0]))
    assert torch.equal(see(model, inputs), output)
    x = seen["x"]
    hidden = part.output.fast_prompt["default"](part.output.dense(seen["mixed"]), x)
    hidden = part.output.dropout.fast_prompt["default"](hidden)
    torch.testing.assert_close(seen["total"], hidden + part.output.fast_prompt_residual["default"](x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_combination_folds_what_folds(name):
    model, inputs = together(APT, DAS) if name == "bert" else base(name)
    if name == "vit":
        get_fast_prompt_model(model, [APT, DAS])
        stir(model)
    output = first(name, model, inputs)
    model.fold()
    assert relative_error(first(name, model, inputs), output) < TOLERANCES[torch.float32]
    model.unfold()
    assert torch.equal(first(name, model, inputs), output)


@torch.no_grad()
@pytest.mark.parametrize("skipped", [0, 2])
def test_visual_prompts_and_skipped_blocks_generate_with_a_cache(skipped):
    visual = DVPConfig(layer=1, visual_width=VISUAL_WIDTH, num_prompts=2)
    model, inputs = together(visual, config(skipped), name="llama_generator")
    ids = inputs["input_ids"][:1]
    image = {"visual_embeds": features()[:1]}
    results = [
        model.generate(ids, **image, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*results)


def test_visual_prompts_enter_a_model_whose_skipped_blocks_were_dropped():
    for layer in (0, 1, 2):
        model, inputs = together(dataclasses.replace(DVP, layer=layer), APT, config(layer))
        output = see(model, inputs)
        assert torch.equal(see(model.compact(), inputs), output)


# Dropping what is skipped


def own_parameters(block: nn.Module) -> int:
    return sum(p.numel() for name, p in block.named_parameters() if "fast_prompt" not in name)


@torch.no_grad()
@pytest.mark.parametrize("name", SKIPPING)
def test_compact_drops_exactly_the_skipped_blocks(name):
    model, inputs = adapted(name, config(0))
    path = find_blocks(model)[0].path
    block = model.get_submodule(path)
    expected, total, own = outputs(name, model, inputs), model.get_nb_trainable_parameters(), own_parameters(block)
    state = set(model.state_dict())
    assert own > 0
    assert model.compact() is model
    assert model.compact() is model
    trained, every = model.get_nb_trainable_parameters()
    assert (trained, total[1] - every) == (total[0], own)
    gone = state - set(model.state_dict())
    assert all(key.startswith(f"{path}.") and "fast_prompt" not in key for key in gone)
    assert not [key for key in model.state_dict() if key.startswith(f"{path}.") and "fast_prompt" not in key]
    for output, before in zip(outputs(name, model, inputs), expected, strict=True):
        assert torch.equal(output, before)
    assert "DroppedModule" in repr(model)
    again, _ = adapted(name, config(0))
    again.compact().load_state_dict(model.state_dict())
    assert torch.equal(first(name, again, inputs), expected[0])
    assert torch.equal(first(name, copy.deepcopy(model), inputs), expected[0])


def test_a_compacted_model_says_what_it_cannot_do_any_more():
    model, inputs = adapted("llama", config(0, 2))
    model.compact()
    for action in (model.revert, model.disable_adapter().__enter__):
        with pytest.raises(
            RuntimeError, match="compact.. has dropped the weights of layers.0, layers.2.*load the model"
        ):
            action()
    with pytest.raises(ValueError, match=r"fixed set of blocks.*compact\(\) has dropped their weights"):
        set_skipped(model, [])
    for settings in (config(2), config(), APTConfig(num_prompts=2, target_modules=["self_attn"])):
        with pytest.raises(ValueError, match="config: expected one that skips layers.0"):
            model.add_adapter("other", settings)
    with pytest.raises(RuntimeError, match="the weights of this Linear were dropped by compact"):
        model.layers[0].self_attn.q_proj(torch.ones(1))
    assert list(model.adapter_configs) == ["default"]
    first("llama", model, inputs).sum().backward()


def test_a_compacted_model_goes_on(tmp_path):
    """Training, saving, loading, adding and deleting adapters that skip the same blocks."""
    model, inputs = adapted("llama", config(0, 2))
    full, _ = adapted("llama", config(0, 2))
    model.compact()
    step("llama", model, inputs)
    model.save_pretrained(tmp_path / "a")
    fresh = FastPromptModel.from_pretrained(base("llama")[0], tmp_path / "a")
    assert torch.equal(first("llama", fresh, inputs), first("llama", model, inputs))
    with torch.no_grad():
        full.layers[0].fast_prompt_skip["default"].down_proj.weight.zero_()
    full.save_pretrained(tmp_path / "b")
    model.load_adapter(tmp_path / "b", "from_full")
    model.set_adapter("from_full")
    assert torch.equal(first("llama", model, inputs), first("llama", full, inputs))
    model.add_adapter("wider", config(0, 2, skip_width=9))
    model.set_adapter("wider")
    assert first("llama", model, inputs).isfinite().all()
    model.delete_adapter("from_full")
    model.set_adapter("default")
    assert torch.equal(first("llama", fresh, inputs), first("llama", model, inputs))


def test_only_what_all_adapters_skip_is_dropped():
    model, inputs = adapted("llama", config(0, 1))
    model.add_adapter("second", config(1, 2))
    stir(model)
    before = first("llama", model, inputs)
    model.compact()
    assert any("layers.0.self_attn" in name for name in model.state_dict())
    assert not any("layers.1.self_attn" in name for name in model.state_dict())
    assert torch.equal(first("llama", model, inputs), before)
    model.set_adapter("second")
    assert first("llama", model, inputs).isfinite().all()
    model.delete_adapter("default")
    model.compact()
    assert not any("layers.2.self_attn" in name for name in model.state_dict())
    assert any("layers.0.self_attn" in name for name in model.state_dict())


def test_nothing_to_drop_is_an_error_that_says_why():
    model, _ = adapted("llama", config(0))
    model.add_adapter("second", config(1))
    with pytest.raises(ValueError, match="no block is skipped by every adapter .'default' skips layers.0; 'second'"):
        model.compact()
    search, _ = adapted("llama", config())
    with pytest.raises(ValueError, match="'default' skips none for good"):
        search.compact()
    with model.disable_adapter(), pytest.raises(RuntimeError, match="compact: the adapters are disabled here"):
        model.compact()
    model.revert()


def test_skipped_weights_need_never_be_in_memory(tmp_path):
    model, inputs = adapted("llama", config(0, 2))
    model.save_pretrained(tmp_path)
    light, _ = base("llama")
    light.layers[0].to("meta")
    light.layers[2].to("meta")
    loaded = FastPromptModel.from_pretrained(light, tmp_path).compact()
    assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(first("llama", loaded, inputs), first("llama", model, inputs))


# Inside training


def test_a_deep_copy_is_whole_and_apart():
    model, inputs = adapted("bert", config())
    set_skipped(model, ["encoder.layer.0"])
    output = first("bert", model, inputs)
    duplicate = copy.deepcopy(model)
    set_skipped(model, [])
    assert skipped_now(duplicate) == ["encoder.layer.0"]
    assert torch.equal(first("bert", duplicate, inputs), output)
    model.revert()
    assert torch.equal(first("bert", duplicate, inputs), output)

"""``get_fast_prompt_model`` and the adapters by name: what trains, what is used, what is given back."""

import copy

import pytest
import torch
from tiny_models import (
    MODELS,
    assert_same,
    bert_classifier,
    build,
    build_language_model,
    run,
    snapshot,
    stir,
)
from torch import nn

from fast_prompt.methods import APTConfig, DVPConfig
from fast_prompt.tuning import FastPromptModel, get_fast_prompt_model

APT = APTConfig(num_prompts=3)
APT_HEAD = APTConfig(num_prompts=3, modules_to_save=["classifier"])


def adapted(config: APTConfig = APT, name: str = "vit", stirred: bool = True) -> tuple[nn.Module, dict]:
    model, inputs = build(name)
    get_fast_prompt_model(model, config)
    if stirred:
        stir(model)
    return model, inputs


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


BAD_FIELDS = {
    "num_prompts": [0, -1, 2000, 1.5, True, float("nan"), None],
    "rank": [0, True, "4"],
    "activation": ["gelu", None],
    "row_weight": ["sum"],
    "dropout": [1, -0.5, float("nan"), True],
    "learn_scale": [1, "yes"],
    "target_modules": [[], [3], 7, [""]],
    "modules_to_save": ["classifier", [], [None]],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD_FIELDS.items() for v in values])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected .*got "):
        APTConfig(**{field: value})


def test_defaults_are_the_papers():
    config = APTConfig()
    assert (config.num_prompts, config.rank, config.activation, config.row_weight) == (200, 4, "relu", "max")
    assert (config.dropout, config.learn_scale, config.target_modules, config.modules_to_save) == (
        0.0,
        True,
        None,
        None,
    )


def test_only_the_method_and_the_named_modules_train():
    model, _ = adapted(APT_HEAD)
    names = trainable(model)
    assert {name.rpartition(".")[2] for name in names if ".fast_prompt." in name} == {
        "prompts",
        "key_down",
        "key_up",
        "log_scale",
    }
    assert {name for name in names if ".fast_prompt." not in name} == {"classifier.weight", "classifier.bias"}
    assert len(names) == 2 * 4 + 2
    model, inputs = adapted(APTConfig(num_prompts=3, learn_scale=False))
    assert not any("log_scale" in name for name in trainable(model))
    run(model, inputs).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trainable(model)


def test_base_names_stay_and_the_class_looks_the_same():
    model, _ = build("vit")
    before, base_class = set(model.state_dict()), type(model)
    assert get_fast_prompt_model(model, APT) is model
    assert before < set(model.state_dict())
    assert isinstance(model, base_class)
    assert isinstance(model, FastPromptModel)
    assert (str(type(model)), type(model).forward) == (str(base_class), base_class.forward)


def test_attentions_and_hidden_states_are_still_recorded():
    model, inputs = adapted()
    model.set_attn_implementation("eager")
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 2
    assert len(output.hidden_states) == 3


def test_counts_are_those_of_the_parameters(capsys):
    model, _ = adapted()
    expected = 2 * (3 * 32 + 4 * 32 + 32 * 4 + 1)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert model.get_nb_trainable_parameters() == (expected, total)
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {expected} || all params: {total:,} || trainable%: {100 * expected / total:.4f}\n"
    )


@pytest.mark.parametrize("name", MODELS)
def test_disabled_is_the_base_and_enabled_again_is_the_adapter(name):
    model, inputs = build(name)
    base = run(model, inputs)
    get_fast_prompt_model(model, APT)
    stir(model)
    adapted_output = run(model, inputs)
    assert not torch.allclose(adapted_output, base)
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), base)
        with model.disable_adapter():
            assert torch.equal(run(model, inputs), base)
        assert torch.equal(run(model, inputs), base)
    assert torch.equal(run(model, inputs), adapted_output)


def test_an_error_inside_disable_adapter_enables_it_again():
    model, inputs = adapted()
    before = run(model, inputs)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(run(model, inputs), before)


def test_adapters_switch_and_each_has_its_own_head():
    model, inputs = adapted(APT_HEAD)
    nn.init.normal_(model.classifier.weight)
    first = run(model, inputs)
    model.add_adapter("second", APTConfig(num_prompts=5, modules_to_save=["classifier"]))
    model.add_adapter("headless", APTConfig(num_prompts=2, target_modules=["layers.1.attention"]))
    assert torch.equal(run(model, inputs), first)
    with model.disable_adapter():
        base = run(model, inputs)
        base_head = model.classifier

    model.set_adapter("second")
    assert (model.active_adapter, model.active_adapters) == ("second", ["second"])
    assert {name.split(".fast_prompt.")[1].split(".")[0] for name in trainable(model) if "vit." in name} == {"second"}
    assert torch.equal(model.classifier.weight, base_head.weight)
    assert model.classifier is not base_head
    assert not torch.equal(run(model, inputs), first)

    model.set_adapter("headless")
    assert model.classifier is base_head
    assert not base_head.weight.requires_grad
    assert model.targeted_module_names == ["vit.layers.1.attention"]

    model.set_adapter("default")
    assert torch.equal(run(model, inputs), first)
    model.delete_adapter("second")
    model.delete_adapter("headless")
    assert list(model.adapter_configs) == ["default"]
    assert not any("second" in name or "headless" in name for name in model.state_dict())
    assert torch.equal(run(model, inputs), first)
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), base)


def test_bad_adapter_names_are_refused():
    model, _ = adapted()
    for name in ("", "a.b", "a:b", "pop", None, 3):
        with pytest.raises(ValueError, match="adapter_name: expected"):
            model.add_adapter(name, APT)
    with pytest.raises(ValueError, match="'default' exists already"):
        model.add_adapter("default", APT)
    with pytest.raises(ValueError, match="expected one of default, got 'other'"):
        model.set_adapter("other")
    with pytest.raises(ValueError, match="'default' is in use"):
        model.delete_adapter("default")
    with pytest.raises(TypeError, match="config: expected"):
        model.add_adapter("second", {"num_prompts": 3})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (APTConfig(modules_to_save=["head"]), "modules_to_save: .* no module named 'head'"),
        (APTConfig(modules_to_save=["layers.1"]), "lie one within the other"),
        (APTConfig(modules_to_save=["layers.1.attention.q_proj"]), "lie one within the other"),
        (APTConfig(target_modules=["nothing"]), "no module named nothing"),
    ],
)
def test_a_config_that_does_not_fit_changes_nothing(config, message):
    model, _ = build("vit")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_fast_prompt_model(model, config)
    assert_same(before, snapshot(model))
    get_fast_prompt_model(model, APT)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", config)
    assert_same(before, snapshot(model))


def test_wrong_arguments_are_named():
    model, _ = build("vit")
    with pytest.raises(TypeError, match="config: expected"):
        get_fast_prompt_model(model, {"num_prompts": 3})
    with pytest.raises(TypeError, match="model: expected"):
        get_fast_prompt_model("vit", APT)
    with pytest.raises(ValueError, match="has adapters already"):
        get_fast_prompt_model(get_fast_prompt_model(model, APT), APT)


@pytest.mark.parametrize("name", MODELS)
def test_revert_gives_the_model_back_bit_for_bit(name):
    model, inputs = build(name)
    next(model.parameters()).requires_grad_(False)
    next(model.children()).train()
    before, output = snapshot(model), run(model, inputs)
    get_fast_prompt_model(model, APT)
    stir(model)
    model.add_adapter("second", APT)
    model.set_adapter("second")
    model.train()
    run(model, inputs).sum().backward()
    model.eval()
    model.fold()
    assert model.revert() is model
    assert_same(before, snapshot(model))
    torch.testing.assert_close(run(model, inputs), output)


def test_revert_restores_heads_that_were_trained():
    model, inputs = bert_classifier()
    model.eval()
    before, output, head = snapshot(model), run(model, inputs), model.classifier
    get_fast_prompt_model(model, APTConfig(num_prompts=3, modules_to_save=["classifier", "pooler", "pooler.dense"]))
    assert {name for name in trainable(model) if "fast_prompt" not in name} == {
        f"{path}.{kind}" for path in ("classifier", "bert.pooler.dense") for kind in ("weight", "bias")
    }
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.5)
    run(model, inputs).sum().backward()
    optimizer.step()
    assert not torch.allclose(run(model, inputs), output)
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), output)
    model.revert()
    assert model.classifier is head
    assert_same(before, snapshot(model))
    assert torch.equal(run(model, inputs), output)


OVERLAPPING = {
    "a module and a parameter in it": [
        APTConfig(num_prompts=2, modules_to_save=["classifier"]),
        DVPConfig(layer=1, visual_width=16, train_base="full"),
    ],
    "a module and one in it": [
        APTConfig(num_prompts=2, modules_to_save=["pooler"]),
        APTConfig(num_prompts=2, modules_to_save=["pooler.dense", "classifier"]),
    ],
    "a module in another's copy": [
        APTConfig(num_prompts=2, modules_to_save=["encoder.layer.2"], target_modules=["layer.0.attention"]),
        APTConfig(num_prompts=2, modules_to_save=["intermediate"], target_modules=["layer.0.attention"]),
    ],
}


@pytest.mark.parametrize("name", OVERLAPPING)
@pytest.mark.parametrize("reverse", [False, True])
def test_what_one_adapter_trains_may_lie_within_what_another_trains(name, reverse):
    model, _ = build_language_model("bert_classifier")
    before = snapshot(model)
    configs = dict(zip(("first", "second"), OVERLAPPING[name][:: -1 if reverse else 1], strict=True))
    get_fast_prompt_model(model, configs["first"], "first")
    model.add_adapter("second", configs["second"])
    expected = {}
    for value, adapter in enumerate(configs, 2):
        model.set_adapter(adapter)
        with torch.no_grad():
            for parameter in trainable(model):
                model.get_parameter(parameter).fill_(value)
        expected[adapter] = trainable(model)
    for adapter in ("first", "second", "second", "first"):
        model.set_adapter(adapter)
        value = 2 + list(configs).index(adapter)
        assert trainable(model) == expected[adapter]
        assert all((each == value).all() for each in model.get_adapter_state_dict().values() if each.requires_grad)
        with model.disable_adapter():
            assert all(torch.equal(before["state"][key], model.state_dict()[key]) for key in before["state"])
    assert_same(before, snapshot(model.revert()))


@pytest.mark.parametrize("second", [APT, DVPConfig(layer=1, visual_width=16)])
@pytest.mark.parametrize("reverse", [False, True])
def test_what_one_adapter_adapts_does_not_lie_within_a_module_that_another_trains(second, reverse):
    """A copy of the block would hold the other adapter, or lack it."""
    model, inputs = build_language_model("bert_classifier")
    whole = APTConfig(num_prompts=2, modules_to_save=["encoder.layer.2"], target_modules=["layer.0.attention"])
    configs = [second, whole] if reverse else [whole, second]
    get_fast_prompt_model(model, configs[0], "first")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.2.* the adapter 'first' "):
        model.add_adapter("second", configs[1])
    assert_same(before, snapshot(model))


def test_a_deep_copy_is_whole_and_apart():
    model, inputs = adapted(APT_HEAD)
    output = run(model, inputs)
    duplicate = copy.deepcopy(model)
    stir(model)
    model.classifier.weight.data.zero_()
    model.revert()
    assert torch.equal(run(duplicate, inputs), output)
    duplicate.fold()
    folded = copy.deepcopy(duplicate)
    duplicate.revert()
    torch.testing.assert_close(run(folded, inputs), output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_replicas_of_data_parallel_use_their_own_weights(name, folded):
    """Trainer replicates a model over several GPUs; a forward bound to the first one would answer for all."""
    model, inputs = adapted(name=name)
    model = model.fold() if folded else model
    modules = list(model.modules())
    replicas = [module._replicate_for_data_parallel() for module in modules]
    for module, replica in zip(modules, replicas, strict=True):
        for key, child in module.named_children():
            replica._modules[key] = replicas[modules.index(child)]
        for key, parameter in module._parameters.items():
            setattr(replica, key, None if parameter is None else parameter.clone())
        for key, buffer in module._buffers.items():
            replica._buffers[key] = None if buffer is None else buffer.clone()
    with torch.no_grad():
        expected = run(model, inputs)
        for value in model.state_dict().values():
            value.zero_()
        for module in model.modules():
            for buffer in module._buffers.values():
                buffer.zero_()
        assert torch.equal(run(replicas[0], inputs), expected)


def test_moving_dtype_reaches_everything_at_rest():
    model, inputs = adapted(APT_HEAD)
    model.double()
    with model.disable_adapter():
        output = run(model, {name: value.double() for name, value in inputs.items()})
    assert output.dtype == torch.float64
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def block_of(model: nn.Module) -> nn.Module:
    blocks = [module for name, module in model.named_modules() if name.endswith(("layer.0", "layers.0"))]
    return blocks[0]


@pytest.mark.gate
@pytest.mark.parametrize("name", ["vit", "bert", "clip", "vilt"])
def test_compiled_blocks_follow_every_change(name):
    """One graph, and recompiled when the adapter is disabled, folded or gone: no stale graph ever answers."""
    torch._dynamo.reset()
    model, _ = adapted(name=name)
    block = block_of(model)
    source = torch.randn(2, 5, 32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")

    def difference(module: nn.Module) -> torch.Tensor:
        outputs = [each(source, None) for each in (module, block)]
        first, second = (output[0] if isinstance(output, tuple) else output for output in outputs)
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
        return first

    output = difference(compiled)
    output.sum().backward()
    assert all(p.grad is not None for n, p in block.named_parameters() if n.endswith("prompts"))
    with model.disable_adapter():
        base = difference(compiled)
    assert not torch.allclose(base, output)
    with torch.no_grad():
        model.fold()
        torch.testing.assert_close(difference(compiled), output, rtol=1e-4, atol=1e-4)
        model.unfold()
        torch.testing.assert_close(difference(compiled), output, rtol=1e-4, atol=1e-4)
        model.revert()
        torch.testing.assert_close(difference(compiled), base, rtol=1e-4, atol=1e-4)


@pytest.mark.gate
def test_compiled_training_step_with_dropout():
    torch._dynamo.reset()
    model, _ = adapted(APTConfig(num_prompts=3, dropout=0.3))
    block = torch.compile(block_of(model.train()), fullgraph=True, backend="aot_eager")
    source = torch.randn(2, 5, 32)
    outputs = [block(source, None) for _ in range(2)]
    assert not torch.equal(*outputs)
    outputs[0].sum().backward()


def test_accelerates_hooks_stay_in_force():
    hooks = pytest.importorskip("accelerate.hooks")

    class Count(hooks.ModelHook):
        def __init__(self) -> None:
            self.calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    for name, path in (("vit", "vit.layers.0.attention"), ("bert", "encoder.layer.0.attention.output")):
        for before in (True, False):
            model, inputs = build(name)
            base = run(model, inputs)
            hook, host = Count(), model.get_submodule(path)
            if before:
                hooks.add_hook_to_module(host, hook)
            get_fast_prompt_model(model, APT)
            stir(model)
            if not before:
                hooks.add_hook_to_module(host, hook)
            hook.calls = 0  # an attention is tried before it is adapted
            plain, _ = adapted(name=name)
            assert torch.equal(run(model, inputs), run(plain, inputs))
            model.revert()
            assert torch.equal(run(model, inputs), base)
            assert hook.calls == 2
            hooks.remove_hook_from_module(host)
            assert torch.equal(run(model, inputs), base)


def test_accelerate_prepare_and_an_optimizer_step():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = adapted(APT_HEAD)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    before = run(model, inputs).detach()
    accelerator.backward(prepared(**inputs, labels=torch.tensor([0, 1])).loss)
    optimizer.step()
    assert accelerator.unwrap_model(prepared) is model
    assert not torch.equal(run(model, inputs), before)


# ---- transformers' and PEFT's own names ----


def test_adapters_are_disabled_until_they_are_enabled():
    model, inputs = build("bert")
    base = run(model, inputs)
    get_fast_prompt_model(model, APT)
    stir(model)
    adapted_output = run(model, inputs)
    model.disable_adapters()
    assert torch.equal(run(model, inputs), base) and model.active_adapters == model.active_adapters() == []
    with model.disable_adapter():
        pass
    assert torch.equal(run(model, inputs), base)
    model.enable_adapters()
    assert torch.equal(run(model, inputs), adapted_output)
    assert model.active_adapters == model.active_adapters() == ["default"]
    model.eval().fold()
    for method in (model.disable_adapters, model.enable_adapters):
        with pytest.raises(RuntimeError, match="folded"):
            method()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_does_not_fold(value):
    model, inputs = build("bert")
    get_fast_prompt_model(model, APT)
    with torch.no_grad():
        model.encoder.layer[1].attention.output.fast_prompt.default.prompts[0, 0] = value
    with pytest.raises(ValueError, match="'default' holds NaN or infinity: encoder.layer.1.*prompts"):
        model.eval().fold()
    assert not model.is_folded
    run(model, inputs)

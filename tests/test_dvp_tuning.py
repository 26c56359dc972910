"""DVP as an adapter: what trains, what is saved, switched, combined with APT, compiled and given back."""

import copy
import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_dvp import VISUAL_WIDTH, config, features, stir
from tiny_models import LANGUAGE_MODELS, WIDTH, assert_same, build, build_language_model, snapshot, text_inputs
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fast_prompt import APTConfig, DVPConfig, FastPromptModel, get_fast_prompt_model
from fast_prompt.tolerances import TOLERANCES, relative_error
from fast_prompt.tuning.combination import CombinedConfig

APT = APTConfig(num_prompts=3)
CONFIGS = {
    "prompts": config(train_base="none"),
    "adapters": config(num_prompts=2, adapter_width=4),
    "full": config(0, train_base="full"),
}


def see(model: nn.Module, inputs: dict) -> Tensor:
    """The model's first output with an image."""
    torch.manual_seed(0)
    return model(**inputs, visual_embeds=features())[0]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def step(model: nn.Module, inputs: dict) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    see(model, inputs).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize("name", ["bert", "t5", "llama_generator"])
def test_a_step_changes_only_what_should_train(name, settings):
    model, inputs = build_language_model(name)
    base = set(model.state_dict())
    get_fast_prompt_model(model, CONFIGS[settings])
    before = state(model)
    step(model.train(), inputs)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    of_base = {name for name in moved if name in base}
    norms = {name for name in base if "norm" in name.lower()}
    expected = {"prompts": set(), "adapters": norms, "full": of_base}[settings]
    assert of_base == expected
    assert (settings != "full") or len(of_base) > len(norms)
    assert not any("fast_prompt_parameters" in name for name in moved)
    brought = {name for name, _ in model.named_parameters() if ".default." in name}
    # The key bias changes nothing, and a start token alone reads nothing of the cross-attention's query.
    assert {name for name in brought - moved if "k_proj.bias" not in name} == set()


@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_revert_and_disable_give_the_model_back_bit_for_bit(name, settings):
    model, inputs = build_language_model(name)

    @torch.no_grad()  # torch's attention on CPU takes another path where a bias wants a gradient
    def text_alone(**image: Tensor) -> Tensor:
        return model(**inputs, **image)[0]

    before, output = snapshot(model), text_alone()
    get_fast_prompt_model(model, CONFIGS[settings])
    model.add_adapter("second", [config(2, train_base="full"), APTConfig(num_prompts=2, **attentions(name))])
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        step(model.train(), inputs)
        model.eval()
        with model.disable_adapter():
            assert torch.equal(text_alone(), output)
            assert torch.equal(text_alone(visual_embeds=features()), output)
    assert model.revert() is model
    assert_same(before, snapshot(model))
    assert torch.equal(text_alone(), output)


def attentions(name: str) -> dict:
    """T5's and LLaMA's attentions must be named for APT."""
    targets = {"t5": ["SelfAttention"], "llama": ["self_attn"]}
    return {"target_modules": targets.get(name.partition("_")[0])}


@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_saved_adapter_gives_a_fresh_base_the_same_output(name, settings, tmp_path):
    model, inputs = build_language_model(name)
    get_fast_prompt_model(model, CONFIGS[settings])
    stir(model)
    step(model.train(), inputs)
    model.eval().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {n.replace(".default.", ".") for n, p in model.named_parameters() if p.requires_grad} == {
        n.removeprefix(stack_of(name)) if n.startswith(f"{stack_of(name)}fast_prompt.") else n for n in saved
    }
    loaded = FastPromptModel.from_pretrained(build_language_model(name)[0], tmp_path, is_trainable=True)
    assert torch.equal(see(loaded, inputs), see(model, inputs))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def stack_of(name: str) -> str:
    """The site's path in the file, with its dot."""
    stacks = {
        "bert": "encoder.",
        "bert_classifier": "bert.encoder.",
        "roberta": "encoder.",
        "roberta_classifier": "roberta.encoder.",
        "llama": "",
        "llama_generator": "model.",
    }
    return stacks.get(name, "decoder.")


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


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_apt_and_dvp_make_one_adapter(name, tmp_path):
    apt = APTConfig(num_prompts=3, **attentions(name))
    visual = config(num_prompts=2, adapter_width=4)
    model, inputs = build_language_model(name)
    get_fast_prompt_model(model, [visual, apt])
    stir(model)
    output = see(model, inputs)
    step(model, inputs)
    grads = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert [n for n in grads if "pooler" not in n] == []
    model.eval().save_pretrained(tmp_path)
    loaded = FastPromptModel.from_pretrained(build_language_model(name)[0], tmp_path)
    assert loaded.adapter_configs["default"] == CombinedConfig(configs=[visual, apt])
    assert torch.equal(see(loaded, inputs), see(model, inputs))
    assert not torch.allclose(see(model, inputs), output)


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


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize("name", ["bert", "t5", "llama_generator"])
def test_gradient_checkpointing_gives_the_same_gradients(name, settings, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model, inputs = build_language_model(name)
        get_fast_prompt_model(model, CONFIGS[settings])
        stir(model.train())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        see(model, inputs).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert any("compressor" in key for key in plain)
    assert plain.keys() == checkpointed.keys()
    for key, value in plain.items():
        torch.testing.assert_close(value, checkpointed[key], rtol=1e-4, atol=1e-4)


@pytest.mark.gate
@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_the_whole_model_compiles_to_one_graph(name):
    torch._dynamo.reset()
    model, inputs = build_language_model(name)
    for path in {"bert": ["encoder.layer"], "t5": ["encoder.block", "decoder.block"], "llama": ["layers"]}[name]:
        del model.get_submodule(path)[2:]  # less to trace
    get_fast_prompt_model(model, config(train_base="none"))
    stir(model)
    inputs = {**inputs, "visual_embeds": features()} | ({} if name == "bert" else {"use_cache": False})
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    output = compiled(**inputs)[0]
    torch.testing.assert_close(output, model(**inputs)[0], rtol=1e-4, atol=1e-4)
    output.square().sum().backward()
    assert model.fast_prompt["default"].compressor.q_proj.weight.grad is not None


@pytest.mark.gate
def test_a_compiled_model_follows_every_change():
    """Recompiled once the adapter is gone: no stale graph ever answers."""
    torch._dynamo.reset()
    model, inputs = build("bert")
    del model.encoder.layer[1:]  # less to trace
    get_fast_prompt_model(model, config(0))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    image = {"visual_embeds": features()}
    torch.testing.assert_close(compiled(**inputs, **image)[0], model(**inputs, **image)[0], rtol=1e-4, atol=1e-4)
    model.revert()
    torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_autocast_and_half_models(name):
    model, inputs = build_language_model(name)
    get_fast_prompt_model(model, config(adapter_width=4, num_prompts=2))
    stir(model)
    expected = see(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output = see(model, inputs)
    assert ((output.float() - expected).abs().max() / expected.abs().max()) < 0.1
    output.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    half, _ = build_language_model(name)
    get_fast_prompt_model(half.to(torch.bfloat16), config(adapter_width=4))
    assert {p.dtype for n, p in half.named_parameters() if ".default." in n} == {torch.float32}
    assert half(**inputs, visual_embeds=features().bfloat16())[0].dtype == torch.bfloat16
    assert half(**inputs, visual_embeds=features())[0].dtype == torch.bfloat16


def test_a_deep_copy_is_whole_and_apart():
    model, inputs = build_language_model("bert")
    get_fast_prompt_model(model, [config(train_base="full", adapter_width=4), APT])
    stir(model)
    output = see(model, inputs)
    duplicate = copy.deepcopy(model)
    model.revert()
    assert torch.equal(see(duplicate, inputs), output)
    duplicate.revert()
    assert torch.equal(duplicate(**inputs)[0], model(**inputs)[0])


def test_an_adapter_is_saved_from_a_gathered_state(tmp_path):
    model, _ = build_language_model("t5")
    get_fast_prompt_model(model, [config(train_base="full", num_answers=3), APTConfig(**attentions("t5"))])
    model.add_adapter("second", config(adapter_width=4))
    model.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "gathered", state_dict=dict(model.state_dict()))
    for path in (tmp_path / "own").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "gathered" / path.relative_to(tmp_path / "own")).read_bytes()


def examples(number: int = 16) -> list[dict]:
    """A constant question about images that are dark or bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % 2
    images = torch.randn(number, 3, VISUAL_WIDTH, generator=generator) + 2 * labels.view(-1, 1, 1) - 1
    question = text_inputs()["input_ids"][0]
    return [
        {"input_ids": question, "visual_embeds": image, "labels": label, "unused": 0}
        for image, label in zip(images, labels, strict=True)
    ]


def trainer(model: nn.Module, directory: Path, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(directory),
        **{
            "per_device_train_batch_size": 4,
            "num_train_epochs": 3,
            "learning_rate": 1e-2,
            "save_strategy": "epoch",
            "logging_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 1,
            **options,
        },
    )
    return Trainer(model=model, args=arguments, train_dataset=examples(), eval_dataset=examples(8))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bert", config(num_answers=2, adapter_width=4)),
        ("bert_classifier", config(train_base="full", modules_to_save=["classifier"])),
        ("llama", config(num_answers=2)),
    ],
)
def test_trainer_learns_saves_and_resumes(name, settings, tmp_path):
    pytest.importorskip("accelerate")

    def adapted() -> nn.Module:
        model, _ = build_language_model(name)
        torch.manual_seed(3)
        return get_fast_prompt_model(model, settings)

    model = adapted()
    run = trainer(model, tmp_path / "run")
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    resumed = adapted()
    trainer(resumed, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, trained[n]) for n, p in resumed.named_parameters() if p.requires_grad)


def test_the_forward_shows_what_it_takes():
    model, _ = build_language_model("bert")
    before = list(inspect.signature(model.forward).parameters)
    get_fast_prompt_model(model, config(num_answers=2))
    names = list(inspect.signature(model.forward).parameters)
    visual = ["visual_embeds", "visual_attention_mask", "visual_query_mask"]
    assert names == [*before[:-1], *visual, "labels", "num_items_in_batch", before[-1]]
    model.revert()
    assert list(inspect.signature(model.forward).parameters) == before


def test_the_config_survives_its_own_file(tmp_path):
    settings = DVPConfig(layer=2, visual_width=8, num_prompts=3, query="last", adapter_width=5, train_base="full")
    settings.save_pretrained(tmp_path)
    assert DVPConfig.from_pretrained(tmp_path) == settings


def test_apt_alone_still_takes_no_image():
    model, inputs = build("bert")
    get_fast_prompt_model(model, APT)
    output = model(**inputs)[0]
    assert output.shape == (2, 7, WIDTH)

"""Bases whose weights accelerate keeps elsewhere, or that are on the meta device: real adapters, or an error."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import LLAMA, TEXT, adapt, snapshot, text_inputs
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaModel

from fast_prompt.methods import APTConfig, DASConfig, DVPConfig
from fast_prompt.tuning import FastPromptModel, get_fast_prompt_model

accelerate = pytest.importorskip("accelerate")

SIZES = TEXT | {"num_hidden_layers": 3}
VISUAL = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
BLOCKS = "bert.encoder.layer"
ELSEWHERE = {f"{BLOCKS}.1": "disk", f"{BLOCKS}.2": "disk"}
MAP = {"bert.embeddings": "cpu", f"{BLOCKS}.0": "cpu", "bert.pooler": "cpu", "classifier": "cpu"} | ELSEWHERE

DVP = DVPConfig(layer=1, visual_width=16, num_prompts=2, adapter_width=4, train_base="none")
CONFIGS = {
    "APT": APTConfig(num_prompts=2),
    "APT and a head": APTConfig(num_prompts=2, modules_to_save=["classifier"]),
    "DAS": DASConfig(skipped=[1], width=4, skip_width=4, learn_scale=True, norm="layer"),
    "DAS and experts": DASConfig(skipped=[1], width=4, skip_width=4, num_experts=2, num_groups=2),
    "DVP": DVP,
    "DVP and APT": [DVP, APTConfig(num_prompts=2)],
}
NORMS = DVPConfig(layer=1, visual_width=16)


def base() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    base().save_pretrained(directory)
    return directory


@pytest.fixture
def offloaded(checkpoint, tmp_path) -> Callable[..., nn.Module]:
    """Makes the base with two of its blocks on disk."""

    def load(dtype: torch.dtype = torch.float32) -> nn.Module:
        options = {"device_map": MAP, "offload_folder": tmp_path / "weights", "dtype": dtype}
        return BertForSequenceClassification.from_pretrained(checkpoint, **options).eval()

    return load


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    more = {"visual_embeds": VISUAL} if any("DVP" in str(each) for each in model.adapter_configs.values()) else {}
    return model(**text_inputs(), **more).logits


def on_meta(model: nn.Module) -> list[str]:
    return [name for name, value in model.named_parameters() if "fast_prompt" in name and value.is_meta]


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_of_an_offloaded_base_are_real(offloaded, tmp_path, name):
    whole = adapt(base(), CONFIGS[name])
    expected = logits(whole)
    model = adapt(offloaded(), CONFIGS[name])
    assert not on_meta(model)
    torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path / "adapter")
    loaded = FastPromptModel.from_pretrained(offloaded(), tmp_path / "adapter")
    assert not on_meta(loaded)
    torch.testing.assert_close(logits(loaded), expected)
    torch.testing.assert_close(logits(FastPromptModel.from_pretrained(base(), tmp_path / "adapter")), expected)
    second = copy.deepcopy(CONFIGS["APT"])
    loaded.add_adapter("second", second)
    assert not on_meta(loaded)
    with loaded.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(loaded(**text_inputs()).logits, base()(**text_inputs()).logits)


# Accelerate's ways to keep weights elsewhere, each called with a model and a folder.
WAYS = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device="cpu"),
    "some on disk": lambda model, folder: accelerate.dispatch_model(
        model,
        dict.fromkeys([name for name, _ in model.named_children() if name != "bert"], "cpu") | MAP,
        main_device="cpu",
        offload_dir=folder,
    ),
}


# Every config one way, and every way with what there is of hooks: a learned scale, copies in place, two methods.
CASES = [(name, "cpu") for name in (*CONFIGS, "DVP and norms")]
CASES += [("DAS", "disk"), ("DVP and norms", "disk"), ("DVP and APT", "some on disk")]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_adapters_that_are_offloaded_themselves_arrive_and_are_saved(tmp_path, name, way):
    config = CONFIGS.get(name, NORMS)
    model = adapt(base(), config)
    model.add_adapter("second", APTConfig(num_prompts=2, modules_to_save=["classifier"]))
    expected = logits(model)
    state = {key: value.detach().clone() for key, value in model.get_adapter_state_dict().items()}
    WAYS[way](model, tmp_path / "weights")
    assert on_meta(model)
    torch.testing.assert_close(logits(model), expected)
    found = model.get_adapter_state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in found.items())
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(FastPromptModel.from_pretrained(base(), tmp_path / "adapter")), expected)
    with pytest.raises(ValueError, match="on the meta device, where an adapter's values would be lost"):
        model.load_adapter(tmp_path / "adapter", "default")
    with pytest.raises(RuntimeError, match="^fold: weights are on the meta device"):
        model.fold()
    torch.testing.assert_close(logits(model), expected)


def test_a_head_of_an_offloaded_half_precision_base_trains_in_float32(offloaded):
    whole = adapt(base().bfloat16(), CONFIGS["APT and a head"])
    model = adapt(offloaded(torch.bfloat16), CONFIGS["APT and a head"])
    for each in (whole, model):
        with torch.no_grad():
            each.classifier.weight.add_(1e-4)
    assert model.classifier.weight.dtype == torch.float32
    assert torch.equal(logits(model), logits(whole))


@pytest.mark.parametrize("name", CONFIGS)
def test_offloaded_adapters_switch_and_revert(name):
    model = adapt(base(), CONFIGS[name])
    model.add_adapter("second", APTConfig(num_prompts=2, modules_to_save=["classifier"]))
    expected = logits(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        plain = base()(**text_inputs()).logits
        with model.disable_adapter():
            torch.testing.assert_close(model(**text_inputs()).logits, plain)
        model.set_adapter("second")
        assert not torch.equal(model(**text_inputs()).logits, expected)
        model.set_adapter("default")
        torch.testing.assert_close(logits(model), expected)
        torch.testing.assert_close(model.revert()(**text_inputs()).logits, plain)


def test_parameters_in_place_of_offloaded_ones_do_not_switch():
    """Accelerate puts its own back at every call: a switch would be undone without a word."""
    model = adapt(base(), NORMS)
    model.add_adapter("second", APTConfig(num_prompts=2))
    accelerate.cpu_offload(model, execution_device="cpu")
    expected = logits(model)
    refused = {
        "set": lambda: model.set_adapter("second"),
        "disable": model.disable_adapters,
        "disable within": lambda: model.disable_adapter().__enter__(),
        "add": lambda: model.add_adapter("third", APTConfig(num_prompts=2)),
        "revert": model.revert,
    }
    for call in refused.values():
        with pytest.raises(RuntimeError, match="take its hooks off"):
            call()
    assert (model.active_adapter, list(model.adapter_configs)) == ("default", ["default", "second"])
    torch.testing.assert_close(logits(model), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    model.set_adapter("second")
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.revert()(**text_inputs()).logits, base()(**text_inputs()).logits)


@pytest.mark.parametrize(
    ("config", "path"),
    [
        (APTConfig(num_prompts=2, modules_to_save=["layer.2.output"], target_modules=["layer.0.attention"]), "output"),
        (NORMS, "LayerNorm"),
        (DVPConfig(layer=1, visual_width=16, train_base="full"), "query"),
    ],
)
def test_what_is_offloaded_has_no_copy_that_trains(offloaded, config, path):
    model = offloaded()
    names = {key: value.device for key, value in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"^{BLOCKS}\.[12].*{path}.*: accelerate keeps its weights elsewhere"):
        get_fast_prompt_model(model, config)
    assert {key: value.device for key, value in model.named_parameters()} == names
    assert type(model) is BertForSequenceClassification


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_that_are_brought_whole_are_adapted_before_and_not_after(tmp_path, name):
    """Accelerate brings their weights by a list, made when it is told to (``preload_module_classes``)."""
    model = base()
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["BertLayer"])
    with pytest.raises(
        ValueError, match=r"accelerate (brings the weights of 'bert\.encoder|keeps its weights elsewhere)"
    ):
        get_fast_prompt_model(model, CONFIGS[name])
    assert type(model) is BertForSequenceClassification
    model = adapt(base(), CONFIGS[name])
    expected, state = logits(model), model.get_adapter_state_dict()
    state = {key: value.detach().clone() for key, value in state.items()}
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["BertLayer"])
    torch.testing.assert_close(logits(model), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.get_adapter_state_dict().items())


@pytest.mark.parametrize("name", [*CONFIGS, "DVP and norms"])
def test_values_are_not_lost_on_the_meta_device(tmp_path, name):
    """A base without weights may be adapted, to be counted; nothing is loaded into it, nor saved."""
    config = CONFIGS.get(name, NORMS)
    adapt(base(), config).save_pretrained(tmp_path)
    model = base().to("meta")
    before = {key: value for key, value in snapshot(model).items() if key != "state"}
    with pytest.raises(ValueError, match="on the meta device, where an adapter's values would be lost"):
        FastPromptModel.from_pretrained(model, tmp_path)
    assert before == {key: value for key, value in snapshot(model).items() if key != "state"}
    get_fast_prompt_model(model, config)
    assert on_meta(model)
    with pytest.raises(ValueError, match="on the meta device, and has no value"):
        model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", [*CONFIGS, "DVP and norms"])
def test_shapes_are_computed_on_the_meta_device(name):
    """As the base computes them, which looks into a mask if there is one."""
    inputs = {"input_ids": text_inputs()["input_ids"]} | ({"visual_embeds": VISUAL} if "DVP" in name else {})
    whole = adapt(base(), CONFIGS.get(name, NORMS))
    model = adapt(base().to("meta"), CONFIGS.get(name, NORMS))
    expected = whole(**inputs).logits
    found = model(**{key: value.to("meta") for key, value in inputs.items()}).logits
    assert found.is_meta
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    found.sum().backward()
    assert model.get_nb_trainable_parameters() == whole.get_nb_trainable_parameters()


def test_a_norm_that_lives_on_in_its_adapter_is_brought():
    """LLaMA's: an offloaded block's norm is where the skipped block's adapter starts from."""
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**LLAMA)).eval()
    norm = model.layers[1].input_layernorm
    nn.init.normal_(norm.weight)
    expected = norm.weight.detach().clone()
    accelerate.cpu_offload(model, execution_device="cpu")
    get_fast_prompt_model(model, DASConfig(skipped=[1], width=4, skip_width=4))
    found = model.layers[1].get_submodule("fast_prompt_skip")["default"].norm.weight
    assert torch.equal(found, expected)


def test_resting_names_are_names_of_files():
    model = adapt(base(), CONFIGS["APT and a head"])
    assert all(not set('/\\:*?"<>|') & set(key) for key in model.state_dict())

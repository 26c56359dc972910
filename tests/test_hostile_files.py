"""Adapters' files made by hand, or to do harm: refused with a reason, before anything is spent on them."""

import json
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from ranks import CONTEXT
from safetensors.torch import load_file, save_file
from tiny_models import assert_same, build, build_language_model, snapshot
from torch import nn

from fast_prompt.methods import APTConfig, DASConfig, DVPConfig
from fast_prompt.tuning import FastPromptModel, get_fast_prompt_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
APT = APTConfig(num_prompts=2)
DVP = DVPConfig(layer=1, visual_width=16, num_prompts=2, num_answers=3, adapter_width=4)
DAS = DASConfig(skipped=[1], width=4, skip_width=4, num_experts=2)
METHODS = {"APT": APT, "DVP": DVP, "DAS": DAS, "combination": [DVP, APT]}


def base() -> nn.Module:
    return build_language_model("bert")[0]


def saved(method: str, directory: Path) -> nn.Module:
    """An adapted model, saved."""
    model = get_fast_prompt_model(base(), METHODS[method])
    model.save_pretrained(directory)
    return model


def edit(directory: Path, change) -> None:
    """Change what is in the weights file."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def assert_refused(model: nn.Module, directory: Path, message: str) -> None:
    """By every way in, for a fresh model and for an adapted one, of which nothing changes."""
    fresh = base()
    ways = [
        (fresh, lambda: FastPromptModel.from_pretrained(fresh, directory)),
        (model, lambda: model.load_adapter(directory, "default")),
        (model, lambda: model.load_adapter(directory, "another")),
        (model, lambda: model.load_state_dict(load_file(directory / WEIGHTS), strict=False)),
    ]
    for changed, load in ways:
        before = snapshot(changed)
        with pytest.raises(ValueError, match=message):
            load()
        assert_same(before, snapshot(changed))


ALIEN = {
    "int8": torch.int8,
    "bool": torch.bool,
    "complex": torch.complex64,
    "float8": torch.float8_e4m3fn,
    "int64": torch.int64,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ALIEN)
def test_another_kind_of_dtype_is_refused(method, kind, tmp_path):
    model = saved(method, tmp_path)
    name = min(load_file(tmp_path / WEIGHTS))
    edit(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(ALIEN[kind])}))
    message = (
        rf"(model.safetensors|state_dict): of another kind of dtype: {name} {ALIEN[kind]} in the file, torch.float32"
    )
    assert_refused(model, tmp_path, message)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floating_dtypes_stand_for_each_other(dtype, tmp_path):
    saved("combination", tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({name: value.to(dtype) for name, value in tensors.items()}))
    loaded = FastPromptModel.from_pretrained(base(), tmp_path).get_adapter_state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in load_file(tmp_path / WEIGHTS).items())


def counting_model() -> nn.Module:
    model = build("vit")[0]
    model.classifier = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 5))
    return model


def test_whole_numbers_of_a_saved_module_stay_whole(tmp_path):
    config = APTConfig(num_prompts=2, modules_to_save=["classifier"])
    model = get_fast_prompt_model(counting_model(), config)
    model.classifier[0].num_batches_tracked += 7
    model.save_pretrained(tmp_path)
    assert FastPromptModel.from_pretrained(counting_model(), tmp_path).classifier[0].num_batches_tracked == 7
    name = "classifier.0.num_batches_tracked"
    edit(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}))
    with pytest.raises(ValueError, match=f"{name} torch.int32 in the file, torch.int64 here"):
        FastPromptModel.from_pretrained(counting_model(), tmp_path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e300])
def test_what_is_not_finite_is_refused_unless_asked_for(method, value, tmp_path):
    """1e300 becomes infinite in a float32 adapter."""
    model = saved(method, tmp_path)
    name = max(load_file(tmp_path / WEIGHTS))
    edit(tmp_path, lambda tensors: tensors.update({name: torch.full_like(tensors[name], value, dtype=torch.float64)}))
    assert_refused(model, tmp_path, f"(model.safetensors|state_dict): NaN or infinity, in the dtype here, in {name};")
    loaded = FastPromptModel.from_pretrained(base(), tmp_path, allow_nonfinite=True)
    assert not loaded.get_adapter_state_dict()[name].isfinite().any()
    for adapter_name in ("default", "another"):
        model.load_adapter(tmp_path, adapter_name, allow_nonfinite=True)
        assert not model.get_adapter_state_dict(adapter_name)[name].isfinite().any()


LARGEST = 2**31 - 1
SIZES = {
    "APT": [{"rank": LARGEST}],
    "DVP": [{name: LARGEST} for name in ("num_prompts", "visual_width", "adapter_width", "num_answers")]
    + [{"inner_width": LARGEST - 1}],
    "DAS": [{name: LARGEST} for name in ("width", "skip_width", "num_experts")]
    + [dict.fromkeys(("width", "skip_width", "num_experts"), LARGEST)],
}


def load_within(directory: Path, more: int) -> str:
    """The error of loading an adapter, in a process that may use little ``more`` memory than it does."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        FastPromptModel.from_pretrained(base(), directory)
    except ValueError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return "nothing was refused"


@pytest.fixture(scope="module")
def alone():
    """A function that calls another in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=300)


@pytest.mark.parametrize(("method", "sizes"), [(method, sizes) for method in SIZES for sizes in SIZES[method]])
def test_a_config_of_giant_sizes_costs_no_memory(method, sizes, alone, tmp_path):
    """Each size alone would take hundreds of gigabytes."""
    saved(method, tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(values | sizes))
    error = alone(load_within, tmp_path, 2**28)
    assert "of another shape" in error or "no tensor can be as large" in error


def test_a_combination_of_giant_sizes_costs_no_memory(alone, tmp_path):
    saved("combination", tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    values["configs"][1]["rank"] = LARGEST
    (tmp_path / CONFIG).write_text(json.dumps(values))
    assert "of another shape" in alone(load_within, tmp_path, 2**28)


def test_weights_that_are_giant_by_their_header_cost_no_memory(alone, tmp_path):
    """A sparse file takes no room on a disk."""
    saved("APT", tmp_path)
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**40)
    assert "not in this model: x" in alone(load_within, tmp_path, 2**28)


def with_targets(targets: str, directory: Path) -> nn.Module:
    """A model whose attentions were named in a list, saved as if by the regular expression ``targets``."""
    model = get_fast_prompt_model(base(), APTConfig(num_prompts=2, target_modules=["attention"]))
    model.save_pretrained(directory)
    values = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(values | {"target_modules": targets}))
    return model


# On "encoder.layer.0.attention" and its like each has more ways to fail than there is time for.
ENDLESS = ["([a-z0-9.]+)+!", "(.*)*!", "(e|e|e)(n|n|n)(c|c|c)" + "(.|.|.)" * 30 + "!", ".*.*.*.*.*.*.*.*.*.*.*.*.*.*!"]


@pytest.mark.parametrize("targets", ENDLESS)
def test_an_expression_that_takes_for_ever_is_refused(targets, tmp_path, monkeypatch):
    monkeypatch.setattr("fast_prompt.models.pattern.SECONDS", 0.5)
    with_targets(targets, tmp_path)
    with pytest.raises(ValueError, match=f"{CONFIG}: target_modules: the regular expression .* is not done after 0.5"):
        FastPromptModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize(
    "targets", [r".*\.attention", r"encoder\.layer\.[0-9]+\.attention", "(?:encoder.)?.*attention"]
)
def test_a_harmless_expression_of_a_file_loads(targets, tmp_path):
    model = with_targets(targets, tmp_path)
    loaded = FastPromptModel.from_pretrained(base(), tmp_path)
    assert loaded.targeted_module_names == model.targeted_module_names
    assert loaded.adapter_configs["default"].target_modules == targets


@pytest.mark.parametrize("targets", ["(", "[", "*", "(?L)a", "a{99999999999}", "(" * 5000 + ")" * 5000], ids=range(6))
def test_what_is_no_expression_is_refused(targets, tmp_path):
    with pytest.raises(ValueError, match="^target_modules: expected a regular expression, got"):
        APTConfig(target_modules=targets)
    with_targets(targets, tmp_path)
    with pytest.raises(ValueError, match=f"{CONFIG}: target_modules: expected a regular expression, got"):
        FastPromptModel.from_pretrained(base(), tmp_path)

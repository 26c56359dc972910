"""Adapters' files made by hand, or to do harm: refused with a reason, before anything is spent on them."""

import json
import resource
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random

import pytest
import torch
from ranks import CONTEXT
from safetensors.torch import load_file, save, save_file
from tiny_models import assert_same, build, build_language_model, snapshot
from torch import nn

from fast_prompt.methods import APTConfig, DASConfig, DVPConfig
from fast_prompt.tuning import FastPromptModel, get_fast_prompt_model
from fast_prompt.tuning.config import MethodConfig

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


@pytest.mark.parametrize(
    ("method", "kind"), [*zip(METHODS, ALIEN, strict=False), *(("combination", kind) for kind in ALIEN)]
)
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


def test_values_are_copied_and_not_assigned(tmp_path):
    model = saved("APT", tmp_path)
    with pytest.raises(ValueError, match="^assign: expected False"):
        model.load_state_dict(load_file(tmp_path / WEIGHTS), assign=True)


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


@pytest.mark.parametrize(
    ("method", "value"), [*((method, float("nan")) for method in METHODS), ("APT", float("inf")), ("DAS", -1e300)]
)
def test_what_is_not_finite_is_refused_unless_asked_for(method, value, tmp_path):
    """1e300 becomes infinite in a float32 adapter."""
    model = saved(method, tmp_path)
    name = max(load_file(tmp_path / WEIGHTS))
    edit(tmp_path, lambda tensors: tensors.update({name: torch.full_like(tensors[name], value, dtype=torch.float64)}))
    assert_refused(model, tmp_path, f"(model.safetensors|state_dict): NaN or infinity, in the dtype here, in {name}")
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


@pytest.mark.gate
@pytest.mark.parametrize(("method", "sizes"), [(method, sizes) for method in SIZES for sizes in SIZES[method]])
def test_a_config_of_giant_sizes_costs_no_memory(method, sizes, alone, tmp_path):
    """Each size alone would take hundreds of gigabytes."""
    saved(method, tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(values | sizes))
    error = alone(load_within, tmp_path, 2**28)
    assert "of another shape" in error or "no tensor can be as large" in error


@pytest.mark.gate
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
    monkeypatch.setattr("fast_prompt.models.pattern.SECONDS", 0.2)
    with_targets(targets, tmp_path)
    with pytest.raises(ValueError, match=f"{CONFIG}: target_modules: the regular expression .* is not done after 0.2"):
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


NESTED: list = []
for _ in range(60):
    NESTED = [NESTED]
BAD = [None, True, "", "x", 0, -1, 2.5, 10**30, 10**4000, float("nan"), float("inf"), -float("inf")]
BAD += [[], {}, [None], [{}], [0.5], ["x", ["y"]], {"a": []}, NESTED]


def configs_in(values: dict) -> list[dict]:
    return [values, *values.get("configs", [])]


@pytest.mark.parametrize("method", METHODS)
def test_every_wrong_value_of_every_field_is_named(method, tmp_path):
    """Or it is a right one, as None often is, and then it is what the config holds."""
    saved(method, tmp_path)
    text = (tmp_path / CONFIG).read_text()
    refused = 0
    for number, config in enumerate(configs_in(json.loads(text))):
        for field in config.keys() - {"save_id"}:
            for bad in BAD:
                values = json.loads(text)
                configs_in(values)[number][field] = bad
                (tmp_path / CONFIG).write_text(json.dumps(values))
                try:
                    read = MethodConfig.from_pretrained(tmp_path).to_dict()
                except ValueError as error:
                    assert CONFIG in str(error) and field in str(error)
                    refused += 1
                else:
                    assert configs_in(read)[number].get(field, bad) == bad
    assert refused > 12 * len(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_prompts", True), ("layer", 10**30), ("dropout", float("nan")), ("type_embedding_std", True)]
    + [("type_embedding_std", float("inf")), ("type_embedding_std", 10**400), ("train_base", ["norms"])],
)
def test_a_wrong_value_in_code_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected "):
        DVPConfig(**{"layer": 1, field: value})


def test_a_required_field_that_is_missing_is_named(tmp_path):
    for method, field in {"DVP": "layer", "combination": "configs"}.items():
        saved(method, tmp_path)
        values = json.loads((tmp_path / CONFIG).read_text())
        del values[field]
        (tmp_path / CONFIG).write_text(json.dumps(values))
        with pytest.raises(ValueError, match=f"{CONFIG}: {field}: expected a value"):
            FastPromptModel.from_pretrained(base(), tmp_path)


TEXTS = {
    "deep": ('{"a": ' + "[" * 100_000, "not valid JSON"),
    "deep and whole": ('{"a": ' + "[" * 500 + "]" * 500 + "}", "not valid JSON here .nested more than 100 deep"),
    "a name twice": ('{"method": "APT", "rank": 1, "rank": 2}', "not valid JSON .'rank' is there twice"),
    "no text": ("\xff\xfe", "not valid JSON"),
    "a number of a thousand digits": ('{"rank": ' + "9" * 5000 + "}", "not valid JSON"),
    "a combination of itself": (
        '{"method": "COMBINED", "configs": [{"method": "COMBINED"}]}',
        "configs: expected a con",
    ),
    "no method": ('{"method": ["APT"]}', "expected a fast_prompt adapter with method .* got method ..APT"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_malformed_config_is_refused(case, tmp_path):
    saved("APT", tmp_path)
    text, message = TEXTS[case]
    (tmp_path / WEIGHTS).write_bytes(save({"x": torch.ones(1)}, {"fast_prompt_config": text}))
    (tmp_path / CONFIG).unlink()
    with pytest.raises(ValueError, match=f"{WEIGHTS}.*{message}"):
        FastPromptModel.from_pretrained(base(), tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{CONFIG}.*{message}"):
        FastPromptModel.from_pretrained(base(), tmp_path)


def damage_config(random: Random, directory: Path) -> None:
    """Another value for one of its settings, within the bounds that its fields have or beyond them."""
    values = json.loads((directory / CONFIG).read_text())
    config = random.choice(configs_in(values))
    config[random.choice(sorted(config))] = random.choice([*BAD, 1, 2, 3, 5, ["attention"], ["pooler"], ["encoder"]])
    (directory / CONFIG).write_text(json.dumps(values))


def damage_bytes(random: Random, directory: Path) -> None:
    """A few bytes, mostly of what stands first, or a cut."""
    path = directory / random.choice([CONFIG, WEIGHTS])
    data = bytearray(path.read_bytes())
    for _ in range(random.randint(1, 4)):
        data[random.randrange(min(len(data), random.choice([8, 400, 4000])))] = random.randrange(256)
    path.write_bytes(data[: random.choice([len(data), len(data), random.randrange(len(data))])])


def damage_header(random: Random, directory: Path) -> None:
    """Another value somewhere in the header of the weights."""
    data = (directory / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    name = random.choice(sorted(header))
    if random.random() < 0.3 or name == "__metadata__":
        header[name] = random.choice(BAD)
    else:
        header[name][random.choice(["dtype", "shape", "data_offsets"])] = random.choice([*BAD, "I8", "F4", [1], [0, 4]])
    text = json.dumps(header).encode()
    (directory / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def damage_files(random: Random, directory: Path) -> None:
    """A file that is missing, a directory in its place, or the weights of another."""
    path = directory / random.choice([CONFIG, WEIGHTS])
    path.unlink()
    if random.random() < 0.5:
        path.mkdir()
    save_file({"x": torch.ones(1)}, directory / "other.safetensors")
    if random.random() < 0.5 and not (directory / WEIGHTS).exists():
        (directory / "other.safetensors").rename(directory / WEIGHTS)


DAMAGES = [damage_config, damage_config, damage_bytes, damage_header, damage_files]


@pytest.mark.gate
@pytest.mark.parametrize("method", METHODS)
def test_damaged_folders_are_refused_by_name_and_change_nothing(method, tmp_path):
    """Seventy-five of each method; some of them are whole enough to load."""
    saved(method, tmp_path / "whole")
    files = {name: (tmp_path / "whole" / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    model, random, refused = base(), Random(method), 0
    before = snapshot(model)
    for number in range(75):
        directory = tmp_path / str(number)
        directory.mkdir()
        for name, data in files.items():
            (directory / name).write_bytes(data)
        random.choice(DAMAGES)(random, directory)
        try:
            with warnings.catch_warnings(action="ignore"):
                FastPromptModel.from_pretrained(model, directory).revert()
        except (ValueError, FileNotFoundError) as error:
            assert str(directory) in str(error)
            refused += 1
        assert_same(before, snapshot(model))
    assert refused > 40

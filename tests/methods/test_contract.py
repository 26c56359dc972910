"""What the replaced forwards were written for is checked before a model is changed; arguments arrive by name."""

import inspect
from pathlib import Path

import pytest
import torch
from tiny_models import build, build_language_model
from torch import nn

from fast_prompt import APTConfig, DASConfig, DVPConfig, get_fast_prompt_model
from fast_prompt.cli import main
from fast_prompt.models import contract
from fast_prompt.models.cache import CACHE_NAMES, cache_in
from fast_prompt.models.contract import FORWARDS, NEWEST_TRANSFORMERS, OLDEST_TRANSFORMERS
from fast_prompt.tuning.classes import replace_forward

ROOT = Path(__file__).parents[2]


def state_of(model: nn.Module) -> tuple[dict[str, torch.Tensor], list[type], list[bool]]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return state, [type(module) for module in model.modules()], [p.requires_grad for p in model.parameters()]


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    state, classes, flags = state_of(model)
    assert state.keys() == before[0].keys() and all(torch.equal(state[name], before[0][name]) for name in state)
    assert (classes, flags) == before[1:]


DVP = DVPConfig(layer=1, visual_width=16)

# By class: a model that holds it, and a method that replaces or trusts its forward.
TRUSTED = {
    "BertAttention": ("bert", APTConfig(num_prompts=2)),
    "BertSelfOutput": ("bert", APTConfig(num_prompts=2)),
    "RobertaAttention": ("roberta", APTConfig(num_prompts=2)),
    "CLIPAttention": ("clip", APTConfig(num_prompts=2)),
    "ViTAttention": ("vit", APTConfig(num_prompts=2)),
    "ViltAttention": ("vilt", APTConfig(num_prompts=2)),
    "ViltSelfOutput": ("vilt", APTConfig(num_prompts=2)),
    "BertLayer": ("bert", DASConfig(skipped=[0])),
    "BertOutput": ("bert", DASConfig(skipped=[0])),
    "CLIPEncoderLayer": ("clip", DASConfig(skipped=[0])),
    "ViTLayer": ("vit", DASConfig(skipped=[0])),
    "ViltLayer": ("vilt", DASConfig(skipped=[0])),
    "LlamaDecoderLayer": ("llama", DASConfig(skipped=[0])),
    "LlamaRMSNorm": ("llama", DASConfig(skipped=[0])),
    "BertEncoder": ("bert_text", DVP),
    "RobertaLayer": ("roberta_text", DVP),
    "LlamaModel": ("llama", DVP),
    "T5Stack": ("t5", DVP),
    "T5Block": ("t5", DVP),
}


def make(name: str) -> nn.Module:
    if name in ("llama", "t5", "bert_text", "roberta_text"):
        return build_language_model(name.removesuffix("_text"))[0]
    return build(name)[0]


def rename(monkeypatch: pytest.MonkeyPatch, model: nn.Module, kind: str) -> None:
    """Give the class of that name a forward whose first argument is called otherwise."""
    cls = next(type(module) for module in model.modules() if type(module).__name__ == kind)
    old = inspect.signature(cls.forward)
    itself, first, *others = old.parameters.values()
    forward = cls.forward

    def renamed(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    renamed.__signature__ = old.replace(parameters=[itself, first.replace(name="renamed"), *others])
    monkeypatch.setattr(cls, "forward", renamed)


@pytest.mark.parametrize("kind", TRUSTED)
def test_a_changed_signature_is_refused_before_anything_has_changed(monkeypatch, kind):
    name, config = TRUSTED[kind]
    model = make(name)
    rename(monkeypatch, model, kind)
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"{kind}.forward takes \(renamed.*missing: .*; new: renamed") as raised:
        get_fast_prompt_model(model, config)
    message = str(raised.value)
    assert f"transformers {contract.installed_transformers()}" in message
    assert f"known: {OLDEST_TRANSFORMERS} to {NEWEST_TRANSFORMERS}" in message
    assert "FAST_PROMPT_UNKNOWN_FORWARDS=warn" in message
    assert_unchanged(model, before)


def test_what_folding_replaces_is_checked_too(monkeypatch):
    """ViLT's inner attention runs its own forward until the model is folded."""
    model = get_fast_prompt_model(make("vilt"), APTConfig(num_prompts=2))
    rename(monkeypatch, model, "ViltSelfAttention")
    with pytest.raises(ValueError, match=r"ViltSelfAttention.forward takes \(renamed"):
        model.fold()
    assert not model.is_folded


def test_a_forward_that_another_tool_put_on_a_projection_does_not_fold():
    model = get_fast_prompt_model(make("vit"), APTConfig(num_prompts=2))
    projection = model.vit.layers[1].attention.q_proj
    projection.forward = lambda source: 2 * type(projection).forward(projection, source)
    with pytest.raises(ValueError, match="layers.1.attention.q_proj: its forward was already replaced"):
        model.fold()
    assert not model.is_folded


def test_a_user_may_go_on_with_a_warning(monkeypatch):
    model = make("vit")
    rename(monkeypatch, model, "ViTAttention")
    monkeypatch.setenv("FAST_PROMPT_UNKNOWN_FORWARDS", "warn")
    with pytest.warns(UserWarning, match=r"ViTAttention.forward takes \(renamed"):
        get_fast_prompt_model(model, APTConfig(num_prompts=2))
    assert len(model.targeted_module_names) == 2


def test_an_unknown_setting_is_refused(monkeypatch):
    model = make("vit")
    rename(monkeypatch, model, "ViTAttention")
    monkeypatch.setenv("FAST_PROMPT_UNKNOWN_FORWARDS", "yes")
    with pytest.raises(ValueError, match="FAST_PROMPT_UNKNOWN_FORWARDS: expected refuse or warn, got 'yes'"):
        get_fast_prompt_model(model, APTConfig(num_prompts=2))


def test_a_known_attention_that_computes_something_else_is_refused(monkeypatch):
    """The signature is what it was, but the queries are projected from something else than the input."""
    model = make("vit")
    cls = type(model.vit.layers[0].attention)
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, hidden_states, *a, **k: forward(self, 2 * hidden_states, *a, **k))
    cls.forward.__signature__ = inspect.signature(forward)
    before = state_of(model)
    with pytest.raises(ValueError, match="ViTAttention is not what it was: its projections do not read its input"):
        get_fast_prompt_model(model, APTConfig(num_prompts=2))
    assert_unchanged(model, before)


@pytest.mark.parametrize(("name", "kind"), [("vit", "ViTLayer"), ("vilt", "ViltLayer"), ("clip", "CLIPEncoderLayer")])
def test_a_known_block_that_computes_something_else_is_refused(monkeypatch, name, kind):
    """As if a layer scale had come, under the old signature."""
    model = make(name)
    cls = next(type(module) for module in model.modules() if type(module).__name__ == kind)
    forward = cls.forward

    def scaled(self, hidden_states, *args, **kwargs):
        return forward(self, 1.5 * hidden_states, *args, **kwargs)

    scaled.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(cls, "forward", scaled)
    before = state_of(model)
    with pytest.raises(ValueError, match=f"{kind} is not what it was: it computes something else"):
        get_fast_prompt_model(model, DASConfig(skipped=[0]))
    assert_unchanged(model, before)


@pytest.mark.parametrize("config", [APTConfig(num_prompts=2), DASConfig(skipped=[0])], ids=["APT", "DAS"])
@pytest.mark.parametrize("name", ["vit", "vilt", "clip", "bert", "roberta"])
def test_a_trial_call_leaves_modes_and_random_numbers_alone(name, config):
    """Models come in training mode, with dropout, from a config; they are tried in eval mode."""
    model = make(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.get_submodule(next(path for path, _ in model.named_modules() if path)).eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    config.find_sites(model)
    drawn = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(()))
    assert [module.training for module in model.modules()] == modes


def test_every_known_class_is_as_the_installed_transformers_has_it():
    seen = set()
    for name in {name for name, _ in TRUSTED.values()}:
        for module in make(name).modules():
            kind = type(module).__name__
            if kind in FORWARDS:
                assert contract.parameters_of(module) == FORWARDS[kind], kind
                seen.add(kind)
    assert TRUSTED.keys() <= seen


class NoKeywords(nn.Module):
    """A model whose forward would not hand visual prompts on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.config, self.inner = inner.config, inner

    def forward(self, input_ids, attention_mask=None):
        return self.inner(input_ids, attention_mask)


def test_a_model_whose_forward_hands_no_keywords_on_is_refused():
    model = NoKeywords(make("bert_text"))
    with pytest.raises(ValueError, match=r"NoKeywords.forward takes \(input_ids, attention_mask\)"):
        get_fast_prompt_model(model, DVP)


@pytest.fixture
def prepare():
    """accelerate's ``prepare`` with mixed precision, which binds a forward to the model."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state()
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare
    accelerate.state.AcceleratorState._reset_state()


@pytest.mark.parametrize("config", [APTConfig(num_prompts=2), DASConfig(skipped=[0])], ids=["APT", "DAS"])
def test_a_model_prepared_by_accelerate_is_adapted_deeper_inside(prepare, config):
    model = get_fast_prompt_model(prepare(make("bert_text")), config)
    assert model.targeted_module_names


def test_a_model_prepared_by_accelerate_is_refused_where_its_own_forward_would_not_run(prepare):
    with pytest.raises(ValueError, match="BertModel: its forward was already replaced"):
        get_fast_prompt_model(prepare(make("bert_text")), DVP)


def test_an_adapter_added_after_accelerate_is_refused_too(prepare):
    model = prepare(get_fast_prompt_model(make("bert_text"), APTConfig(num_prompts=2)))
    with pytest.raises(ValueError, match="BertModel: its forward was already replaced"):
        model.add_adapter("dvp", DVP)
    assert list(model.adapter_configs) == ["default"]


# ---- Versions ----


@pytest.mark.parametrize(
    ("installed", "tested"),
    [("5.16.1", False), ("5.17.0", True), ("5.24.0", True), ("5.24.1", False), ("6.0.0.dev0", False), (None, True)],
)
def test_info_says_when_transformers_lies_outside_the_range(monkeypatch, capsys, installed, tested):
    monkeypatch.setattr(contract, "installed_transformers", lambda: installed)
    assert contract.describe_range()["tested"] is tested
    assert main(["info"]) == 0
    said = f"transformers {installed} lies outside the range that was tested, 5.17.0 to 5.24.0"
    assert (said in capsys.readouterr().out) is not tested


@pytest.mark.parametrize("file", ["README.md", "pyproject.toml"])
def test_the_range_is_stated_where_people_look(file):
    assert f"transformers {OLDEST_TRANSFORMERS} to {NEWEST_TRANSFORMERS}" in (ROOT / file).read_text()


def test_the_newest_version_tested_is_the_one_that_setup_installs():
    assert f"transformers=={NEWEST_TRANSFORMERS}\n" in (ROOT / "constraints.txt").read_text()


# ---- Arguments by name ----


class Plain(nn.Module):
    def forward(self, first, second=2, *, third=3):
        return first, second, third


def test_a_replacement_that_names_keywords_only_gets_every_argument_by_name():
    def by_name(self, forward, *, second, **kwargs):
        return forward(self, second=10 * second, **kwargs)

    module = Plain()
    replace_forward(module, by_name)
    assert module(1, 5, third=7) == module(1, second=5, third=7) == module(first=1, second=5, third=7) == (1, 50, 7)
    with pytest.raises(TypeError, match="multiple values"):
        module(1, 5, second=6)
    assert list(inspect.signature(module.forward).parameters) == ["first", "second", "third"]


def test_any_other_replacement_gets_them_as_they_came():
    def as_given(self, forward, x, *args, **kwargs):
        return args, kwargs

    module = Plain()
    replace_forward(module, as_given)
    assert module(1, 5, third=7) == ((5,), {"third": 7})


def test_the_cache_is_found_under_either_name():
    cache = object()
    assert [cache_in({name: cache}) for name in CACHE_NAMES] == [cache, cache]
    assert cache_in({"cache": None, "past_key_values": cache}) is cache
    assert cache_in({"cache": None}) is None and cache_in({}) is None

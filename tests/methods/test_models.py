"""``fast_prompt.models``: the right places are found, and the right tensors reach the adapter there."""

import pytest
import torch
from tiny_models import MODELS, WIDTH, bert_classifier, build, run, stir, text_inputs
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
)

from fast_prompt.methods import APTConfig
from fast_prompt.models import find_attention_sites
from fast_prompt.models.architectures import forwards
from fast_prompt.nn import PromptDiffusion
from fast_prompt.tuning import get_fast_prompt_model

ATTENTIONS = {"vit": 2, "bert": 2, "bert_decoder": 4, "roberta": 2, "clip": 4, "vilt": 2}


def record(module: nn.Module, into: list) -> None:
    module.register_forward_hook(lambda _, args, output: into.append((args, output)))


@pytest.mark.parametrize("name", MODELS)
def test_the_adapter_gets_the_queries_input_and_the_projections_output(name):
    model, inputs = build(name)
    sites = find_attention_sites(model)
    assert len(sites) == ATTENTIONS[name]
    assert all(site.width == WIDTH for site in sites)
    get_fast_prompt_model(model, APTConfig(num_prompts=3))
    queries, outputs, adapters = [], [], []
    for site in sites:
        record(model.get_submodule(f"{site.name}.{site.projections.query}"), queries)
        record(model.get_submodule(f"{site.name}.{site.projections.output}"), outputs)
        record(model.get_submodule(f"{site.host}.fast_prompt"), adapters)
    run(model, inputs)
    assert len(adapters) == ATTENTIONS[name]
    for (query_args, _), (_, output), (adapter_args, _) in zip(queries, outputs, adapters, strict=True):
        assert adapter_args[0] is output
        assert adapter_args[1] is query_args[0]


@pytest.mark.parametrize("name", MODELS)
def test_what_the_adapter_returns_goes_on_in_place_of_the_projections_output(name):
    """With no prompts to speak of the model is what it was; with a scale, each projection's output is scaled."""
    model, inputs = build(name)
    sites = find_attention_sites(model)
    base = run(model, inputs)
    get_fast_prompt_model(model, APTConfig(num_prompts=3))
    with torch.no_grad():
        for site in sites:
            adapter = model.get_submodule(f"{site.host}.fast_prompt.default")
            adapter.prompts.zero_()
        assert torch.equal(run(model, inputs), base)
        for site in sites:
            model.get_submodule(f"{site.host}.fast_prompt.default").log_scale.fill_(1)
        adapted = run(model, inputs)
        model.revert()
        for site in sites:
            projection = model.get_submodule(f"{site.name}.{site.projections.output}")
            projection.weight.mul_(torch.e)
            projection.bias.mul_(torch.e)
        torch.testing.assert_close(adapted, run(model, inputs), rtol=1e-4, atol=1e-4)


def outcome(adapted, inputs):
    """The model's output, and the gradient of everything that trains."""
    output = run(adapted, inputs)
    output.square().sum().backward()
    found = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    adapted.zero_grad()
    return {"output": output.detach(), **found}


@pytest.mark.parametrize("name", MODELS)
def test_the_result_is_written_over_the_projections_own(name, monkeypatch):
    """Nothing else has H where a plain linear layer made it; output and gradients are those of a new result."""
    model, inputs = build(name)
    adapted = get_fast_prompt_model(model, APTConfig(num_prompts=3))
    stir(adapted)
    given = []
    own = PromptDiffusion.forward

    def forward(self, hidden, source, *, inplace):
        before, version = hidden.data_ptr(), hidden._version
        result = own(self, hidden, source, inplace=inplace)
        given.append(inplace and result.data_ptr() == before and hidden._version > version)
        return result

    monkeypatch.setattr(PromptDiffusion, "forward", forward)
    written_over = outcome(adapted, inputs)
    with torch.no_grad():
        assert torch.equal(run(adapted, inputs), written_over["output"])
    assert given and all(given)
    given.clear()
    monkeypatch.setattr(forwards, "may_write_over", lambda *_: False)
    new = outcome(adapted, inputs)
    assert given and not any(given)
    assert written_over.keys() == new.keys() and all(torch.equal(new[key], written_over[key]) for key in new)


def watch_output(projection, seen):
    return projection.register_forward_hook(lambda module, args, output: seen.append(output))


def watch_all(projection, seen):
    keep = [lambda module, args, output: seen.append(output) if module is projection else None]
    return torch.nn.modules.module.register_module_forward_hook(*keep)


def watch_gradient(projection, seen):
    return projection.register_full_backward_hook(lambda module, grads, grad_output: seen.append(grad_output[0]))


@pytest.mark.parametrize("watch", [watch_output, watch_all, watch_gradient])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_result_that_somebody_watches_stays_as_it_is(name, watch):
    model, inputs = build(name)
    adapted = get_fast_prompt_model(model, APTConfig(num_prompts=3))
    stir(adapted)
    expected = outcome(adapted, inputs)
    site = adapted.targeted_module_names[-1]  # of which the gradient reaches the projection
    projection = model.get_submodule(f"{site}.{'o_proj' if name == 'vit' else 'output.dense'}")
    reads, seen = [], []
    hooks = [projection.register_forward_pre_hook(lambda module, args: reads.append(args[0])), watch(projection, seen)]
    found = outcome(adapted, inputs)
    for hook in hooks:
        hook.remove()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert len(seen) == 1
    if watch is not watch_gradient:
        assert torch.equal(seen[0], projection(reads[0]))


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_an_adapters_input_that_somebody_watches_stays_as_it_is(name):
    model, inputs = build(name)
    adapted = get_fast_prompt_model(model, APTConfig(num_prompts=3))
    stir(adapted)
    expected, seen = run(adapted, inputs), []
    adapters = next(module for path, module in model.named_modules() if path.endswith(".fast_prompt"))
    for watched in (adapters, adapters["default"]):
        hook = watched.register_forward_pre_hook(lambda module, args: seen.append((args[0], args[0].clone())))
        assert torch.equal(run(adapted, inputs), expected)
        hook.remove()
    assert len(seen) == 2 and all(torch.equal(kept, then) for kept, then in seen)


def test_what_an_attention_of_ones_own_keeps_stays_as_it_is():
    """Proven by a trial call, which cannot show that it looks at its result later."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in "qkvo")

        def forward(self, hidden_states):
            query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
            self.kept = self.o_proj(nn.functional.scaled_dot_product_attention(query, key, value))
            return self.kept

    model = nn.Sequential(Own()).eval()
    adapted = get_fast_prompt_model(model, APTConfig(num_prompts=3, target_modules=["0"]))
    assert not find_attention_sites(nn.Sequential(Own()), ["0"])[0].unproven
    stir(adapted)
    output = adapted(torch.randn(2, 5, 8))
    assert not torch.equal(model[0].kept, output)


def test_a_projection_that_another_tool_runs_keeps_its_result():
    """As accelerate's hooks, or a subclass such as PEFT's LoRA, may need what they gave."""
    model, inputs = build("vit")
    adapted = get_fast_prompt_model(model, APTConfig(num_prompts=3))
    stir(adapted)
    expected = run(adapted, inputs)
    projection, seen = model.vit.layers[0].attention.o_proj, []
    plain = projection.forward

    def forward(heads):
        seen.append((plain(heads), heads))
        return seen[-1][0]

    projection.forward = forward
    assert torch.equal(run(adapted, inputs), expected)
    del projection.forward
    assert torch.equal(seen[0][0], projection(seen[0][1]))


@pytest.mark.parametrize("name", ["bert", "vilt"])
def test_dropout_comes_after_the_adapter_in_training(name):
    """A whole-dropout layer behind the adapter must leave nothing of the prompts."""
    model, inputs = build(name)
    (site, *_) = find_attention_sites(model)
    get_fast_prompt_model(model, APTConfig(num_prompts=3))
    output = model.get_submodule(site.host)
    assert type(output.dropout) is nn.Dropout
    output.dropout.p = 1.0
    output.dropout.train()
    heads, source = torch.randn(2, 3, WIDTH), torch.randn(2, 3, WIDTH)
    expected = output.LayerNorm(source) if hasattr(output, "LayerNorm") else torch.zeros_like(source)
    torch.testing.assert_close(output(heads, source), expected)


def test_left_padding_changes_nothing_at_the_other_tokens():
    """PEFT #1093: prompts here have no position, so neither side of padding reaches the real tokens."""
    model, _ = build("bert")
    get_fast_prompt_model(model, APTConfig(num_prompts=3))
    adapter = model.get_submodule("encoder.layer.0.attention.output.fast_prompt.default")
    nn.init.normal_(adapter.prompts)
    left = text_inputs("left")
    short = {name: value[1:, 3:] for name, value in left.items()}
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3]])
    padded = model(**{name: value[1:] for name, value in left.items()}, position_ids=positions)[0]
    torch.testing.assert_close(padded[:, 3:], model(**short)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["layers.1.attention"], ["vit.layers.1.attention"]),
        (["attention"], ["vit.layers.0.attention", "vit.layers.1.attention"]),
        (["vit.layers.0.attention"], ["vit.layers.0.attention"]),
        (r"vit\.layers\.1\.att.*n", ["vit.layers.1.attention"]),
    ],
)
def test_target_modules_choose_by_ending_or_expression(target, expected):
    model, inputs = build("vit")
    get_fast_prompt_model(model, APTConfig(num_prompts=3, target_modules=target))
    assert model.targeted_module_names == expected
    run(model, inputs)


def test_an_ending_that_a_module_shares_with_its_child_means_the_outer_one():
    model, _ = build("vilt")
    names = [site.name for site in find_attention_sites(model, ["attention"])]
    assert names == ["encoder.layer.0.attention", "encoder.layer.1.attention"]


def gpt2() -> tuple[nn.Module, str, list[str]]:
    return GPT2Model(GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, vocab_size=50)), "GPT2Attention", ["attn"]


def t5() -> tuple[nn.Module, str, list[str]]:
    config = T5Config(d_model=WIDTH, d_kv=16, d_ff=48, num_layers=2, num_heads=2, vocab_size=50)
    return T5EncoderModel(config), "T5Attention", ["SelfAttention"]


def llama() -> tuple[nn.Module, str, list[str]]:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    return LlamaModel(config), "LlamaAttention", ["self_attn"]


def distilbert() -> tuple[nn.Module, str, list[str]]:
    config = DistilBertConfig(dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=48, vocab_size=50)
    return DistilBertModel(config), "DistilBertSelfAttention", ["attention"]


def small_inputs() -> dict[str, torch.Tensor]:
    return {name: value for name, value in text_inputs().items() if name != "token_type_ids"}


@pytest.mark.parametrize("make", [gpt2, t5, llama, distilbert])
def test_an_unknown_architecture_names_what_to_target_and_then_works(make):
    model, class_name, target = make()
    model.eval()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=f"name them in target_modules.*2 {class_name}"):
        get_fast_prompt_model(model, APTConfig())
    assert list(model.state_dict()) == before
    base = run(model, small_inputs())
    get_fast_prompt_model(model, APTConfig(num_prompts=3, target_modules=target))
    assert len(model.targeted_module_names) == 2
    output = run(model, small_inputs())
    assert not torch.equal(output, base)
    output.sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "prompts" in name)


@pytest.mark.parametrize("make", [t5, llama, distilbert])
def test_a_trial_call_proves_an_attention_nobody_named_so_that_it_folds(make):
    model, _, target = make()
    model.eval()
    model.training = True  # the mode of every part is as it was after the trial
    assert all(not site.unproven for site in find_attention_sites(model, target))
    assert model.training and not any(part.training for part in list(model.modules())[1:])
    model.eval()
    get_fast_prompt_model(model, APTConfig(num_prompts=3, target_modules=target))
    for name, parameter in model.named_parameters():
        if name.endswith("prompts"):
            nn.init.normal_(parameter)
    with torch.no_grad():
        plain = run(model, small_inputs())
        model.fold()
        torch.testing.assert_close(run(model, small_inputs()), plain, rtol=1e-3, atol=1e-4)


class NormedFirst(nn.Module):
    """An attention that norms its input itself: what its queries are projected from is not what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.o_proj(self.q_proj(x) * self.k_proj(x) * self.v_proj(x))


class ScaledAfter(NormedFirst):
    """An attention that goes on after its output projection."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * self.o_proj(self.q_proj(x) * self.k_proj(x) * self.v_proj(x))


class Needy(NormedFirst):
    """An attention that cannot be tried alone."""

    def forward(self, x: torch.Tensor, table: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.o_proj(self.q_proj(x) * table["positions"])


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (NormedFirst, "its projections do not read its input"),
        (ScaledAfter, "what it returns is not its output projection's result"),
        (Needy, "a trial call failed with TypeError"),
    ],
)
def test_an_attention_that_is_not_proven_does_not_fold(attention, reason):
    model = nn.Sequential(attention()).eval()
    get_fast_prompt_model(model, APTConfig(num_prompts=3, target_modules=["0"]))
    with pytest.raises(ValueError, match=f"0: cannot fold {attention.__name__}: {reason}"):
        model.fold()
    assert not model.is_folded


def test_torchs_own_attention_can_be_targeted():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(WIDTH, 2, 48, batch_first=True).eval()
    source = torch.randn(2, 5, WIDTH)
    base = model(source)
    with pytest.raises(ValueError, match="1 MultiheadAttention"):
        get_fast_prompt_model(model, APTConfig())
    get_fast_prompt_model(model, APTConfig(num_prompts=3, target_modules=["self_attn"]))
    nn.init.normal_(model.self_attn.fast_prompt.default.prompts)
    with torch.no_grad():
        assert not torch.allclose(model(source), base)


def test_bad_targets_are_explained():
    model, _ = bert_classifier()
    with pytest.raises(
        ValueError, match=r"no module named query_key.*BertAttention \(bert.encoder.layer.0.attention, …\)"
    ):
        find_attention_sites(model, ["attention", "query_key"])
    with pytest.raises(ValueError, match="'classifier' .Linear. is no attention"):
        find_attention_sites(model, ["classifier"])
    with pytest.raises(ValueError, match="no module named nothing"):
        find_attention_sites(model, "nothing")
    with pytest.raises(ValueError, match="No attention-like module was found"):
        find_attention_sites(nn.Linear(3, 3))


def test_a_forward_that_someone_else_replaced_is_left_alone():
    model, _ = build("vit")
    attention = model.vit.layers[1].attention
    attention.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="layers.1.attention: its forward was already replaced"):
        get_fast_prompt_model(model, APTConfig())
    assert not hasattr(model.vit.layers[0].attention, "fast_prompt")

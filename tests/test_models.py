"""``fast_prompt.models``: the right places are found, and the right tensors reach the adapter there."""

import pytest
import torch
from tiny_models import MODELS, WIDTH, bert_classifier, build, run, text_inputs
from torch import nn
from transformers import GPT2Config, GPT2Model, T5Config, T5EncoderModel

from fast_prompt.methods import APTConfig
from fast_prompt.models import find_attention_sites
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


@pytest.mark.parametrize("make", [gpt2, t5])
def test_an_unknown_architecture_names_what_to_target_and_then_works(make):
    model, class_name, target = make()
    model.eval()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=f"name them in target_modules.*2 {class_name}"):
        get_fast_prompt_model(model, APTConfig())
    assert list(model.state_dict()) == before
    base = run(model, text_inputs())
    get_fast_prompt_model(model, APTConfig(num_prompts=3, target_modules=target))
    assert len(model.targeted_module_names) == 2
    output = run(model, text_inputs())
    assert not torch.equal(output, base)
    output.sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "prompts" in name)
    with pytest.raises(ValueError, match="cannot fold"):
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

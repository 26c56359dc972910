"""What trains is float32, whatever the base is, and its neighbours see the base's own dtype."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import LANGUAGE_MODELS, assert_same, build, build_language_model, snapshot
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fast_prompt.methods import APTConfig, DASConfig, DVPConfig
from fast_prompt.tuning import FastPromptModel, get_fast_prompt_model

HALVES = (torch.bfloat16, torch.float16)
VISUAL = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))


def half_bert(dtype: torch.dtype, name: str = "bert_classifier") -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = build_language_model(name)
    return model.to(dtype), inputs


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def outputs_by_module(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, list[torch.dtype]]:
    """The dtypes that each module of the base hands on."""
    seen: dict[str, list[torch.dtype]] = {}

    def record(name: str):
        def hook(module, args, output):
            flat = torch.utils._pytree.tree_leaves(output)
            seen[name] = [each.dtype for each in flat if isinstance(each, Tensor) and each.is_floating_point()]

        return hook

    base = [(name, module) for name, module in model.named_modules() if "fast_prompt" not in name]
    handles = [module.register_forward_hook(record(name)) for name, module in base]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


# A config of each method that copies of the base train with, or nothing but the adapter's own; with its inputs.
CONFIGS = {
    "APT": (APTConfig(num_prompts=2), {}),
    "APT and a head": (APTConfig(num_prompts=2, modules_to_save=["classifier", "embeddings"]), {}),
    "DAS": (DASConfig(skipped=[1], width=4, skip_width=4, learn_scale=True, modules_to_save=["classifier"]), {}),
    "DAS and experts": (DASConfig(skipped=[1], width=4, skip_width=4, num_experts=2, num_groups=2), {}),
    "DVP and norms": (DVPConfig(layer=1, visual_width=16, num_prompts=2, adapter_width=4), {"visual_embeds": VISUAL}),
    "DVP and all": (DVPConfig(layer=1, visual_width=16, train_base="full"), {"visual_embeds": VISUAL}),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_trains_is_float32_and_moves(name, dtype):
    """Steps of 1e-3 vanish in half precision: beside a gain of 1 bfloat16 has nothing between 1 and 1.0078."""
    config, more = CONFIGS[name]
    model, inputs = half_bert(dtype)
    model = get_fast_prompt_model(model, config)
    before = {key: value.detach().clone() for key, value in trained(model).items()}
    assert {value.dtype for value in before.values()} == {torch.float32}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs, **more, labels=torch.tensor([0, 2])).loss.float().backward()
        optimizer.step()
    for key, value in trained(model).items():
        used = value.grad is not None and (value.grad != 0).any()
        assert not used or not torch.equal(before[key], value), key
    gains = [
        key for key, value in trained(model).items() if key.endswith("LayerNorm.weight") and value.grad is not None
    ]
    assert all(((trained(model)[key] - before[key]) != 0).float().mean() > 0.9 for key in gains)
    assert len(gains) == (0 if "DVP" not in name and "head" not in name else 1 if "head" in name else 7)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("base", LANGUAGE_MODELS)
def test_neighbours_see_the_dtype_of_the_base(base, dtype):
    """Every module of the base hands on what it did, whether its parameters train or not."""
    model, inputs = half_bert(dtype, base)
    expected = outputs_by_module(model, inputs)
    model = get_fast_prompt_model(model, DVPConfig(layer=1, visual_width=16, train_base="full"))
    assert outputs_by_module(model, {**inputs, "visual_embeds": VISUAL}) == expected
    with model.disable_adapter():
        assert outputs_by_module(model, inputs) == expected


class Pieces(nn.Module):
    """A head of what a head may be made of."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norms = nn.Sequential(nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.BatchNorm1d(8))
        self.gain = nn.Parameter(torch.ones(8))
        self.out = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        words = self.words(ids)
        attended, _ = self.attention(words, words, words)
        hidden = self.norms(attended.mean(1)) * self.gain
        return self.out(hidden), {"hidden": hidden}


class WithHead(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, Pieces()

    def forward(self, ids: Tensor, **inputs: Tensor) -> Tensor:
        logits, hidden = self.head(ids)
        return logits + self.encoder(**inputs)[0].mean() + hidden["hidden"].mean()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_whole_heads_compute_as_their_originals(dtype, autocast):
    encoder, inputs = build("bert")
    torch.manual_seed(0)
    model = WithHead(encoder).eval().to(dtype)
    inputs = {**inputs, "ids": torch.randint(9, (4, 3), generator=torch.Generator().manual_seed(2))}
    model = get_fast_prompt_model(model, APTConfig(num_prompts=2, modules_to_save=["head"]))
    with torch.autocast("cpu", dtype, enabled=autocast):
        result, hidden = model.head(inputs["ids"])
        with model.disable_adapter():
            expected, _ = model.head(inputs["ids"])
    assert {each.dtype for each in (result, hidden["hidden"], model(**inputs))} == {dtype}
    torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
    result.float().square().sum().backward()
    assert all(value.grad is not None and value.grad.dtype == torch.float32 for value in model.head.parameters())


def tied_llama(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, tie_word_embeddings=True)).eval().to(dtype)


@pytest.mark.parametrize("config", [APTConfig(num_prompts=2, target_modules=["self_attn"]), DASConfig(skipped=[1])])
def test_a_tied_parameter_is_cast_in_both_places(config):
    config.modules_to_save = ["embed_tokens", "lm_head"]
    model = get_fast_prompt_model(tied_llama(torch.bfloat16), config)
    head, words = model.lm_head.weight, model.model.embed_tokens.weight
    assert head is words
    assert head.dtype == torch.float32
    seen = outputs_by_module(model, {"input_ids": torch.tensor([[3, 4, 5]])})
    assert seen["model.embed_tokens"] == seen["lm_head"] == [torch.bfloat16]


@pytest.mark.parametrize("name", ["APT and a head", "DVP and norms", "DVP and all"])
def test_files_hold_float32_and_come_back(tmp_path, name):
    config, more = CONFIGS[name]
    model, inputs = half_bert(torch.bfloat16)
    before = snapshot(model)
    get_fast_prompt_model(model, config)
    with torch.no_grad():
        for value in trained(model).values():
            value.add_(1e-4)
    output = model(**inputs, **more).logits
    model.save_pretrained(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    loaded = FastPromptModel.from_pretrained(half_bert(torch.bfloat16)[0], tmp_path, is_trainable=True)
    assert torch.equal(loaded(**inputs, **more).logits, output)
    expected = {key: value.clone() for key, value in trained(model).items()}
    with torch.no_grad():
        for value in trained(model).values():
            value.zero_()
    model.load_adapter(tmp_path, "default")
    assert all(torch.equal(value, expected[key]) for key, value in trained(model).items())
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert torch.equal(copy.deepcopy(model)(**inputs, **more).logits, model(**inputs, **more).logits)
    model.set_adapter("default")
    assert torch.equal(model(**inputs, **more).logits, output)
    assert_same(before, snapshot(model.revert()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES)
def test_a_base_that_trains_in_float32_folds_as_it_computes(dtype):
    model, inputs = half_bert(dtype)
    config = [DVPConfig(layer=1, visual_width=16, train_base="full"), APTConfig(num_prompts=2)]
    model = get_fast_prompt_model(model, config).eval()
    expected = model(**inputs, visual_embeds=VISUAL).logits
    parameters = {name: id(value) for name, value in model.named_parameters()}
    folded = model.fold()(**inputs, visual_embeds=VISUAL).logits
    assert folded.dtype == dtype
    torch.testing.assert_close(folded, expected, rtol=0.05, atol=0.05)
    assert torch.equal(model.unfold()(**inputs, visual_embeds=VISUAL).logits, expected)
    assert {name: id(value) for name, value in model.named_parameters()} == parameters


def test_moving_to_another_dtype_moves_what_is_cast_to():
    """A model that became float32 as a whole computes in float32, bit for bit what it computes without a cast."""
    config, more = CONFIGS["DVP and all"]
    model, inputs = half_bert(torch.bfloat16)
    get_fast_prompt_model(model, config).float()
    other, _ = half_bert(torch.bfloat16)
    other = get_fast_prompt_model(other.float(), config)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(**inputs, **more).logits, other(**inputs, **more).logits)


def test_a_module_that_cannot_cast_is_refused_and_left_as_it_was():
    model, _ = half_bert(torch.bfloat16)
    model.classifier.forward = lambda hidden: hidden[:, :3]
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^classifier: .*already replaced by something else"):
        get_fast_prompt_model(model, APTConfig(num_prompts=2, modules_to_save=["classifier"]))
    with pytest.raises(ValueError, match=r"^classifier: .*already replaced by something else"):
        get_fast_prompt_model(model, DVPConfig(layer=1, visual_width=16, train_base="full"))
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("name", ["APT and a head", "DVP and all"])
def test_a_gradient_scaler_takes_what_trains_of_a_float16_base(name):
    """It refuses gradients in float16, and with them the parameters that a base in float16 has."""
    config, more = CONFIGS[name]
    model, inputs = half_bert(torch.float16)
    model = get_fast_prompt_model(model, config)
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(trained(model).values(), 0.1)
    scaler.scale(model(**inputs, **more, labels=torch.tensor([0, 2])).loss.float()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


@pytest.mark.gate
def test_casting_compiles_whole_and_repeats_under_checkpointing():
    config, more = CONFIGS["DVP and all"]
    model, inputs = half_bert(torch.bfloat16)
    model = get_fast_prompt_model(model, config)
    head = torch.compile(model.classifier, backend="eager", fullgraph=True)
    hidden = torch.randn(2, 32, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(hidden), model.classifier(hidden))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        torch.manual_seed(0)
        model(**inputs, **more).logits.float().square().sum().backward()
        gradients.append({key: value.grad.clone() for key, value in trained(model).items() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(value, gradients[1][key]) for key, value in gradients[0].items())

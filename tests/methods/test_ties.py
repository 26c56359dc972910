"""Parameters that several modules of the base share: they train as one, or are refused."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import LLAMA, T5, TEXT, assert_same, snapshot
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fast_prompt.methods import APTConfig, DASConfig, DVPConfig
from fast_prompt.tuning import FastPromptModel, get_fast_prompt_model
from fast_prompt.tuning.config import MethodConfig

IDS = torch.tensor([[3, 4, 5, 6]])


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True))


def bert() -> nn.Module:
    return BertForMaskedLM(BertConfig(**TEXT))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0, tie_word_embeddings=True))


BASES: dict[str, Callable[[], nn.Module]] = {"llama": llama, "bert": bert, "t5": t5}

# The names of all the modules that share the word embeddings, and each of them by itself.
SHARED = {
    "llama": ["embed_tokens", "lm_head"],
    "bert": ["word_embeddings", "cls"],
    "t5": ["shared", "embed_tokens", "lm_head"],
}
ALONE = [(base, [name]) for base, names in SHARED.items() for name in names] + [("t5", ["shared", "lm_head"])]


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    inputs = {"input_ids": IDS, "labels": IDS} | ({"decoder_input_ids": IDS} if name == "t5" else {})
    return BASES[name]().eval(), inputs


# In T5 the attentions must be named; in T5 and LLaMA, DVP adapts the stack that holds the embeddings.
ATTENTIONS = {"llama": ["self_attn"], "bert": None, "t5": ["SelfAttention"]}


def config_for(method: str, base: str, names: list[str]) -> MethodConfig:
    if method == "APT":
        return APTConfig(num_prompts=2, target_modules=ATTENTIONS[base], modules_to_save=names)
    if method == "DAS":
        return DASConfig(skipped=[1], width=4, skip_width=4, modules_to_save=names)
    return DVPConfig(layer=1, modules_to_save=names)


def methods_for(base: str, names: list[str]) -> list[str]:
    return ["APT", *(["DAS"] if base != "t5" else []), *(["DVP"] if names == ["lm_head"] else [])]


@pytest.mark.parametrize(("base", "names"), ALONE)
def test_a_part_of_what_is_tied_is_refused_by_name(base, names):
    model, _ = build(base)
    for method in methods_for(base, names):
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"^modules_to_save: '.*' is tied to .*; or untie them"):
            get_fast_prompt_model(model, config_for(method, base, names))
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("base", BASES)
def test_all_that_is_tied_trains_as_one(tmp_path, base):
    model, inputs = build(base)
    before = snapshot(model)
    get_fast_prompt_model(model, config_for("APT", base, SHARED[base]))
    words = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is words
    model(**inputs).loss.backward()
    assert (words.grad != 0).all(1).sum() == len(words), "the head gives every row a gradient"
    with torch.no_grad():
        words.add_(0.1)
    output = model(**inputs).logits
    model.tie_weights()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight is words
    assert torch.equal(model(**inputs).logits, output)
    model.save_pretrained(tmp_path)
    loaded = FastPromptModel.from_pretrained(build(base)[0], tmp_path)
    assert torch.equal(loaded(**inputs).logits, output)
    model.add_adapter("second", config_for("APT", base, SHARED[base]))
    model.set_adapter("second")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert_same(before, snapshot(model.revert()))


@pytest.mark.parametrize("base", BASES)
def test_an_adapted_model_keeps_its_number_of_tokens(base):
    """``transformers`` would change the base for good, and leave copies at rest behind."""
    model, inputs = build(base)
    get_fast_prompt_model(model, config_for("APT", base, SHARED[base]))
    state = snapshot(model)
    for arguments in ((51,), (50, 8), (None, 8)):
        with pytest.raises(RuntimeError, match=r"^resize_token_embeddings: .*default.*50 tokens; resize before"):
            model.resize_token_embeddings(*arguments)
    assert model.resize_token_embeddings(50) is model.resize_token_embeddings() is model.get_input_embeddings()
    assert_same(state, snapshot(model))
    assert len(model.revert().resize_token_embeddings(52).weight) == 52
    assert model(**inputs).logits.shape[-1] == 52


def test_a_head_that_was_untied_as_the_message_says_trains_alone():
    model, inputs = build("llama")
    expected = model(**inputs).logits
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    get_fast_prompt_model(model, config_for("APT", "llama", ["lm_head"]))
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    head = model.lm_head.weight
    model.tie_weights()
    assert model.lm_head.weight is head
    assert torch.equal(model.revert()(**inputs).logits, expected)

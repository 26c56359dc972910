"""Small random models of every architecture the tests adapt, with an input for each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    T5Model,
    ViltConfig,
    ViltModel,
    ViTConfig,
    ViTForImageClassification,
)

from fast_prompt import get_fast_prompt_model

WIDTH = 32
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
VISION: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 4}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 50}


def text_inputs(padding_side: str = "right") -> dict[str, Tensor]:
    """Two sentences of 7 and 4 tokens."""
    ids = torch.randint(2, 49, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 7, dtype=torch.long)
    padding = slice(4, 7) if padding_side == "right" else slice(0, 3)
    ids[1, padding], mask[1, padding] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def image_inputs() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    return ViTForImageClassification(ViTConfig(**VISION, num_labels=5)), image_inputs()


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    return BertModel(BertConfig(**TEXT)), text_inputs()


def bert_classifier() -> tuple[nn.Module, dict[str, Tensor]]:
    return BertForSequenceClassification(BertConfig(**TEXT, num_labels=3)), text_inputs()


def bert_decoder() -> tuple[nn.Module, dict[str, Tensor]]:
    memory = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3))
    model = BertModel(BertConfig(**TEXT, is_decoder=True, add_cross_attention=True))
    return model, {**text_inputs(), "encoder_hidden_states": memory}


def roberta() -> tuple[nn.Module, dict[str, Tensor]]:
    return RobertaModel(RobertaConfig(**TEXT)), text_inputs()


def clip() -> tuple[nn.Module, dict[str, Tensor]]:
    tokens = {"max_position_embeddings": 20, "bos_token_id": 0, "eos_token_id": 49}
    config = CLIPConfig(text_config={**TEXT, **tokens}, vision_config=VISION, projection_dim=16)
    return CLIPModel(config), {**text_inputs(), **image_inputs()}


def vilt() -> tuple[nn.Module, dict[str, Tensor]]:
    return ViltModel(ViltConfig(**TEXT, image_size=16, patch_size=4)), {**text_inputs(), **image_inputs()}


T5: dict[str, Any] = {"d_model": WIDTH, "d_kv": 16, "d_ff": 48, "num_layers": 3, "num_heads": 2, "vocab_size": 50}
LLAMA: dict[str, Any] = {**TEXT, "num_hidden_layers": 3, "num_key_value_heads": 1, "max_position_embeddings": 64}


def answer_inputs() -> dict[str, Tensor]:
    """Two questions, and answers of 3 tokens for a decoder."""
    answers = torch.randint(2, 49, (2, 3), generator=torch.Generator().manual_seed(4))
    return {**text_inputs(), "decoder_input_ids": answers}


def deep_bert(model_class: type = BertModel) -> tuple[nn.Module, dict[str, Tensor]]:
    return model_class(BertConfig(**TEXT | {"num_hidden_layers": 3}, num_labels=3)), text_inputs()


def deep_roberta(model_class: type = RobertaModel) -> tuple[nn.Module, dict[str, Tensor]]:
    return model_class(RobertaConfig(**TEXT | {"num_hidden_layers": 3}, num_labels=3)), text_inputs()


def t5(model_class: type = T5Model) -> tuple[nn.Module, dict[str, Tensor]]:
    return model_class(T5Config(**T5, decoder_start_token_id=0)), answer_inputs()


def llama(model_class: type = LlamaModel) -> tuple[nn.Module, dict[str, Tensor]]:
    return model_class(LlamaConfig(**LLAMA, pad_token_id=1)), text_inputs()


# Models of 3 blocks that take visual prompts; the second of each architecture has a head.
LANGUAGE_MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "bert": deep_bert,
    "bert_classifier": lambda: deep_bert(BertForSequenceClassification),
    "roberta": deep_roberta,
    "roberta_classifier": lambda: deep_roberta(RobertaForSequenceClassification),
    "t5": t5,
    "t5_generator": lambda: t5(T5ForConditionalGeneration),
    "llama": llama,
    "llama_generator": lambda: llama(LlamaForCausalLM),
}

MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "vit": vit,
    "bert": bert,
    "bert_decoder": bert_decoder,
    "roberta": roberta,
    "clip": clip,
    "vilt": vilt,
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """The named model in eval mode, the same weights for the same seed, and an input."""
    return _build(MODELS[name], seed)


def build_language_model(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """As ``build``, out of ``LANGUAGE_MODELS``."""
    return _build(LANGUAGE_MODELS[name], seed)


def _build(make: Callable[[], tuple[nn.Module, dict[str, Tensor]]], seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(seed)
    model, inputs = make()
    return model.eval(), inputs


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's first output; ViLT draws the order of its patches, hence the seed."""
    torch.manual_seed(0)
    return model(**inputs)[0]


def stir(model: nn.Module) -> None:
    """Random values for every adapter's parameter, so that keys, prompts and scale all matter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".fast_prompt." in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def adapt(model: nn.Module, config: Any) -> nn.Module:
    """The model with an adapter, the same whenever it is asked for."""
    torch.manual_seed(1)
    get_fast_prompt_model(model, config)
    stir(model)
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that ``revert`` promises to give back."""
    return {
        "class": type(model),
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "identity": {name: id(parameter) for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two snapshots agree bit for bit."""
    assert list(before["state"]) == list(after["state"])
    assert all(torch.equal(before["state"][name], value) for name, value in after["state"].items())
    assert {k: v for k, v in before.items() if k != "state"} == {k: v for k, v in after.items() if k != "state"}

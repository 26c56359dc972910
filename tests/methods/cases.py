"""Every method in every architecture that it adapts: what the contract of methods is tried on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tiny_meter import inputs as meter_inputs
from tiny_meter import tiny_config
from tiny_models import LANGUAGE_MODELS, MODELS, VISION, build, build_language_model, text_inputs
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from fast_prompt import APTConfig, DASConfig, DVPConfig, get_fast_prompt_model, set_skipped
from fast_prompt.models.meter import MeterForVisualQuestionAnswering
from fast_prompt.tuning.config import MethodConfig

VISUAL_WIDTH, TOKENS = 24, 5
Configs = MethodConfig | list[MethodConfig]


def features(batch: int = 2, tokens: int = TOKENS) -> Tensor:
    """Visual tokens for DVP."""
    return torch.randn(batch, tokens, VISUAL_WIDTH, generator=torch.Generator().manual_seed(6))


def base(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of any architecture, the same whenever it is asked for, and an input; a deep one has a block more."""
    if name == "meter":
        torch.manual_seed(0)
        return MeterForVisualQuestionAnswering(tiny_config()).eval(), meter_inputs()
    return build(name) if name in MODELS else build_language_model(name.removeprefix("deep_"))


def stir(model: nn.Module) -> None:
    """Random values for all that adapters bring, the same for equal names; norms stay near 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "fast_prompt" in name and "fast_prompt_parameters" not in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (".norm.weight" in name))


@dataclass(frozen=True)
class Case:
    """A method in a model.

    Attributes:
        model: the model's name, for ``base``.
        config: the method's settings, or several methods'.
        other: of an adapter beside it, of any method.
        still: words in the names of parameters that train and that no gradient moves.
    """

    model: str
    config: Configs
    other: Configs
    still: tuple[str, ...] = ()

    @property
    def configs(self) -> list[MethodConfig]:
        """One for each method."""
        return self.config if isinstance(self.config, list) else [self.config]

    def base(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model alone, and an input that the method can read."""
        model, inputs = base(self.model)
        image = {"visual_embeds": features()} if any(isinstance(each, DVPConfig) for each in self.configs) else {}
        return model, inputs | image

    def adapted(self, *configs: MethodConfig) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model with the method, whose values are no longer those of the start."""
        model, inputs = self.base()
        torch.manual_seed(1)
        get_fast_prompt_model(model, list(configs) or self.config)
        stir(model)
        self.use(model)
        return model, inputs

    @property
    def searches(self) -> list[DASConfig]:
        """The config of a search, which leaves what is not drawn idle."""
        return [each for each in self.configs if isinstance(each, DASConfig) and each.skipped is None]

    def use(self, model: nn.Module) -> None:
        """Lets a search skip another block than at its start."""
        for config in self.searches:
            set_skipped(model, config.candidates_of(model)[-1:])

    def outputs(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """All that the adapted parts of the model give, in a row. (ViLT draws the order of its patches.)"""
        torch.manual_seed(0)
        if self.model == "clip":
            found = model(**inputs)
            parts = [found.text_model_output.last_hidden_state, found.vision_model_output.last_hidden_state]
        elif self.model == "meter":
            found = model.meter(**inputs)
            parts = [found.last_hidden_state, found.image_hidden_state]
        else:
            parts = [model(**inputs)[0]]
        return torch.cat([part.flatten() for part in parts])

    def loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Moved by every output; a sum of squares after a LayerNorm would not be."""
        outputs = self.outputs(model, inputs).float()
        return outputs @ torch.linspace(-1, 1, len(outputs))

    def step(self, model: nn.Module, inputs: dict[str, Tensor], rate: float = 1e-2) -> None:
        """One training step; the model is left in eval mode."""
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)
        self.loss(model.train(), inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()


def apt(name: str, **settings: Any) -> APTConfig:
    """APT; T5's and LLaMA's attentions must be named."""
    named = {"t5": ["SelfAttention"], "llama": ["self_attn"]}
    return APTConfig(**{"num_prompts": 3, "target_modules": named.get(name.partition("_")[0]), **settings})


def das(*skipped: int, **settings: Any) -> DASConfig:
    """DAS with some blocks skipped, or, without, as in a search."""
    return DASConfig(skipped=list(skipped) or None, **{"width": 5, "skip_width": 7, "num_skipped": 1, **settings})


def dvp(layer: int = 1, **settings: Any) -> DVPConfig:
    """DVP."""
    return DVPConfig(layer=layer, visual_width=VISUAL_WIDTH, **settings)


SKIPPING = ("vit", "bert", "bert_decoder", "roberta", "clip", "vilt", "llama", "meter")
DAS = {
    "fixed": das(1, dropout=0.1, learn_scale=True, scale=0.5),
    "search": das(),
    "router": das(0, num_experts=2, skip_width=6),
}
DVP = {
    "prompts": dvp(train_base="none"),
    "adapters": dvp(num_prompts=2, adapter_width=6),
    "full": dvp(0, train_base="full"),
}
# The compressor's key bias changes nothing; where a start token alone is decoded, nor do its queries and keys.
STILL = ("k_proj.bias",)
IDLE = ("pooler", "relative_attention_bias", "EncDecAttention.q", "EncDecAttention.k", "SelfAttention.q")


def _cases() -> dict[str, Case]:
    cases = {}
    for name in (*MODELS, "llama", "t5", "meter"):
        cases[f"APT-{name}"] = Case(name, apt(name, dropout=0.1), apt(name, num_prompts=2, learn_scale=False))
    for name in SKIPPING:
        for form, config in DAS.items():
            cases[f"DAS-{form}-{name}"] = Case(name, config, das(0))
    for name in (f"deep_{each}" if each in MODELS else each for each in LANGUAGE_MODELS):
        for form, config in DVP.items():
            other = [dvp(2, train_base="full"), apt(name, num_prompts=2)]
            cases[f"DVP-{form}-{name}"] = Case(name, config, other, STILL + IDLE * (form == "full"))
        both = [dvp(num_prompts=2, adapter_width=4), apt(name)]
        cases[f"DVP+APT-{name}"] = Case(name, both, dvp(2), STILL)
    three = [dvp(num_prompts=2, adapter_width=4, dropout=0.0), apt("deep_bert"), das(1)]
    cases["DVP+APT+DAS-bert"] = Case("deep_bert", three, apt("deep_bert"), STILL)
    return cases


CASES = _cases()

# One of each method in each architecture, for what takes long.
ONE_OF_EACH = {
    name: case
    for name, case in CASES.items()
    if name.rpartition("-")[0] in ("APT", "DAS-fixed", "DVP-adapters", "DVP-full", "DVP+APT", "DVP+APT+DAS")
    and not name.endswith(("bert_decoder", "roberta", "roberta_classifier", "bert_classifier"))
}

# Each architecture once, and each method: tracing takes seconds.
COMPILED = ("APT-vit", "APT-bert", "DAS-search-vit", "DAS-fixed-llama", "DVP-full-deep_bert", "DVP+APT+DAS-bert")
COMPILED += ("DVP-adapters-llama_generator", "DVP-adapters-t5")


def vit_classifier() -> nn.Module:
    """A ViT with two labels."""
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**VISION, num_labels=2))


def text_classifier() -> nn.Module:
    """A BERT with three labels."""
    return build_language_model("bert_classifier")[0]


def dark_or_bright(number: int) -> list[dict[str, Any]]:
    """Images, and whether they are bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % 2
    pixels = torch.randn(number, 3, 16, 16, generator=generator) + 2 * labels.view(-1, 1, 1, 1) - 1
    return [{"pixel_values": p, "labels": label} for p, label in zip(pixels, labels, strict=True)]


def turned_or_not(number: int) -> list[dict[str, Any]]:
    """A sentence, and whether it is the right way round."""
    ids, mask = text_inputs().values()
    return [
        {"input_ids": ids[0] if label else ids[0].flip(0), "attention_mask": mask[0], "labels": label}
        for label in (0, 1) * (number // 2)
    ]


def dark_or_bright_features(number: int) -> list[dict[str, Any]]:
    """A constant question about visual tokens that are dark or bright; and something that no model takes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % 2
    images = torch.randn(number, 3, VISUAL_WIDTH, generator=generator) + 2 * labels.view(-1, 1, 1) - 1
    question = text_inputs()["input_ids"][0]
    return [
        {"input_ids": question, "visual_embeds": image, "labels": label, "unused": 0}
        for image, label in zip(images, labels, strict=True)
    ]


# For Trainer: a model, settings, data that can be learned.
Made = Callable[[], nn.Module]
TRAINED: dict[str, tuple[Made, Configs, Callable[[int], list[dict[str, Any]]]]] = {
    "APT-vit": (vit_classifier, APTConfig(num_prompts=3, dropout=0.1, modules_to_save=["classifier"]), dark_or_bright),
    "DAS-bert": (text_classifier, das(0, dropout=0.1, modules_to_save=["classifier"]), turned_or_not),
    "DVP-bert": (
        lambda: build_language_model("bert")[0],
        dvp(num_answers=2, adapter_width=4),
        dark_or_bright_features,
    ),
    "DVP-full-bert": (
        text_classifier,
        dvp(train_base="full", modules_to_save=["classifier"]),
        dark_or_bright_features,
    ),
    "DVP-llama": (lambda: build_language_model("llama")[0], dvp(num_answers=2), dark_or_bright_features),
}

"""The rows of the table: what each adds to the language model, and how it trains."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast_prompt.demo.training import WEIGHT_DECAY
from fast_prompt.demo.vqa import language
from fast_prompt.demo.vqa.settings import Settings
from fast_prompt.methods import APTConfig, DVPConfig
from fast_prompt.models.visual.head import AnswerHead
from fast_prompt.tuning import get_fast_prompt_model, parameter_groups
from fast_prompt.tuning.config import MethodConfig

# BERT's own way to start an embedding. MiniLM's hidden states are too small for the paper's 1.
TYPE_EMBEDDING_STD = 0.02


class Reader(nn.Module):
    """A language model with a new answer head, which reads the question alone.

    All of it trains but the word embeddings: 30,522 rows of gradients and moments a step, for the two dozen words that
    ever come, would take a third of its time.

    Args:
        model: a bare BertModel.
        answers: how many there are to choose from.
    """

    def __init__(self, model: Any, answers: int) -> None:
        super().__init__()
        self.model = model
        model.embeddings.word_embeddings.requires_grad_(False)
        self.classifier = AnswerHead(model.config.hidden_size, answers, "BERT", dtype=torch.float32)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, visual_embeds: Tensor, labels: Tensor | None = None
    ) -> Any:
        """Logits [B, answers], and the loss where `labels` [B] came, as `transformers` name them."""
        logits = self.classifier(self.read(input_ids, attention_mask, visual_embeds)[:, 0])
        return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))

    def read(self, input_ids: Tensor, attention_mask: Tensor, visual_embeds: Tensor) -> Tensor:
        """The last hidden states; those of the question come first."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class AllTokensReader(Reader):
    """The same, reading every visual token after the question: what dynamic visual prompting is there to save.

    Args:
        model: a bare BertModel.
        answers: how many there are to choose from.
        visual_width: of the visual tokens; a linear layer brings them to the model's width.
    """

    def __init__(self, model: Any, answers: int, visual_width: int) -> None:
        super().__init__(model, answers)
        self.projection = nn.Linear(visual_width, model.config.hidden_size)

    def read(self, input_ids: Tensor, attention_mask: Tensor, visual_embeds: Tensor) -> Tensor:
        """The last hidden states [B, n + Nv, d]. The visual tokens are of the model's second token type."""
        words = self.model.embeddings.word_embeddings(input_ids)
        tokens = torch.cat([words, self.projection(visual_embeds)], dim=1)
        is_visual = torch.arange(tokens.shape[1]) >= words.shape[1]
        return self.model(
            inputs_embeds=tokens,
            attention_mask=F.pad(attention_mask, (0, visual_embeds.shape[1]), value=1),
            token_type_ids=is_visual.long().expand(len(tokens), -1),
        ).last_hidden_state


def visual_config(settings: Settings, answers: int, **options: Any) -> DVPConfig:
    """Dynamic visual prompts with a head for the answers."""
    return DVPConfig(
        layer=settings.layer,
        visual_width=settings.vision_width,
        num_answers=answers,
        type_embedding_std=TYPE_EMBEDDING_STD,
        **options,
    )


def full(settings: Settings, answers: int) -> DVPConfig:
    """The whole language model trains."""
    return visual_config(settings, answers, train_base="full")


def adapters(settings: Settings, answers: int) -> DVPConfig:
    """The language model is frozen but for its LayerNorms, and has bottleneck adapters."""
    return visual_config(settings, answers, adapter_width=settings.adapter_width)


def apt(settings: Settings, answers: int) -> list[MethodConfig]:
    """The language model is frozen but for its LayerNorms, and has APT in every attention."""
    return [visual_config(settings, answers), APTConfig(num_prompts=settings.num_prompts)]


def question_only(settings: Settings, answers: int, seed: int) -> nn.Module:
    """The language model, trained in full, with its eyes shut."""
    return Reader(language.pretrained(), answers)


def all_visual_tokens(settings: Settings, answers: int, seed: int) -> nn.Module:
    """The language model, trained in full, on the question and every visual token."""
    return AllTokensReader(language.pretrained(), answers, settings.vision_width)


def prompted(configure: Callable[[Settings, int], Any], settings: Settings, answers: int, seed: int) -> nn.Module:
    """The pretrained language model with visual prompts."""
    return get_fast_prompt_model(language.pretrained(), configure(settings, answers))


def prompted_untrained(settings: Settings, answers: int, seed: int) -> nn.Module:
    """Visual prompts and adapters in a language model of random weights."""
    return get_fast_prompt_model(language.untrained(seed), adapters(settings, answers))


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        build: the untrained model of some settings, with so many answers, drawn from a seed; it is called with the
            columns of `Inputs`.
        trains_in_full: whether the whole language model trains, which takes a smaller learning rate.
    """

    name: str
    build: Callable[[Settings, int, int], nn.Module]
    trains_in_full: bool = False

    def epochs(self, settings: Settings) -> float:
        """How often it sees the training questions."""
        return settings.full_epochs if self.trains_in_full else settings.epochs

    def optimizer(self, model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
        """AdamW at the settings' peak rates."""
        rate = settings.full_rate if self.trains_in_full else settings.rate
        groups = parameter_groups(model, rate, settings.head_rate)
        return torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)


QUESTION_ONLY = Method("Question only", question_only, trains_in_full=True)
ALL_TOKENS = Method("All visual tokens", all_visual_tokens, trains_in_full=True)
FULL = Method("DVP, full", partial(prompted, full), trains_in_full=True)
ADAPTERS = Method("DVP + adapters", partial(prompted, adapters))
APT = Method("DVP + APT", partial(prompted, apt))
UNTRAINED = Method("DVP + adapters, random LM", prompted_untrained)
METHODS = (QUESTION_ONLY, ALL_TOKENS, FULL, ADAPTERS, APT, UNTRAINED)

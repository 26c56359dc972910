"""The methods that adapt the frozen base. Each trains the same new classifier, and something of its own besides."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from fast_prompt.demo.deep_prompts import DeepPromptModel
from fast_prompt.demo.settings import Settings
from fast_prompt.demo.training import HEAD
from fast_prompt.methods import APTConfig
from fast_prompt.tuning import get_fast_prompt_model

Form = Callable[[Any], AbstractContextManager[object]]


@dataclass(frozen=True)
class Adaptation:
    """One method.

    Attributes:
        adapt: puts it into a frozen `transformers` ViT, in place; what it returns is called with `pixel_values`.
        forms: how the trained model can serve, by the name of the result's row; each is entered around a forward pass.
    """

    name: str
    adapt: Callable[[Any, Settings], nn.Module]
    forms: Mapping[str, Form]


def linear_probe(model: Any, settings: Settings) -> nn.Module:
    """Trains the classifier alone."""
    model.get_submodule(HEAD).requires_grad_(True)
    return model


def deep_prompts(model: Any, settings: Settings) -> nn.Module:
    """Puts learned tokens into every block."""
    return DeepPromptModel(model, settings.num_prompts)


def lora(model: Any, settings: Settings) -> nn.Module:
    """Low-rank updates of the queries' and values' projections, by PEFT."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank,
        target_modules=sorted(names & {"q_proj", "v_proj", "query", "value"}),  # transformers' names, newer and older
        modules_to_save=[HEAD],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a transformers property that PEFT reads
        return get_peft_model(model, config)


def apt(model: Any, settings: Settings) -> nn.Module:
    """Approximated prompt tuning: prompts diffused into every attention's output."""
    return get_fast_prompt_model(model, APTConfig(num_prompts=settings.num_prompts, modules_to_save=[HEAD]))


def as_trained(model: Any) -> AbstractContextManager[object]:
    """Serves with the model as it trained."""
    return contextlib.nullcontext()


@contextlib.contextmanager
def merged(model: Any) -> Iterator[None]:
    """Serves with LoRA's updates added to the weights."""
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


@contextlib.contextmanager
def folded(model: Any) -> Iterator[None]:
    """Serves with APT folded into the projections around it."""
    model.fold()
    try:
        yield
    finally:
        model.unfold()


LINEAR_PROBE = Adaptation("Linear probe", linear_probe, {"Linear probe": as_trained})
DEEP_PROMPTS = Adaptation("Deep prompt tuning", deep_prompts, {"Deep prompt tuning": as_trained})
LORA = Adaptation("LoRA", lora, {"LoRA": as_trained, "LoRA (merged)": merged})
APT = Adaptation("APT", apt, {"APT": as_trained, "APT (folded)": folded})

"""Parameter groups for an optimizer: parts of an adapter that need a learning rate of their own."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from fast_prompt.tuning.adapters import SAVED
from fast_prompt.tuning.model import FastPromptModel

# A module's class says under this name which of its own parameters learn at which multiple of the learning rate.
SCALES = "learning_rate_scales"

# A module's class says under this name that it is a new task head.
IS_HEAD = "is_head"


def parameter_groups(model: nn.Module, learning_rate: float, head_rate: float | None = None) -> list[dict[str, Any]]:
    """What trains in ``model``, in groups of one learning rate each, for any optimizer of ``torch.optim``.

    Args:
        model: an adapted model.
        learning_rate: of the adapter in use. APT's ``key_up`` and ``log_scale`` get a tenth of it: its output is
            quadratic in the scores, and training with one rate for all diverges where the prompts learn best.
        head_rate: of the answer head and ``modules_to_save``; ``learning_rate`` when None.

    Returns:
        a list of ``{"params": [...], "lr": ...}``; together they hold every parameter that requires a gradient, once.
    """
    heads = tuple(f"{path}." for path in _heads(model))
    groups: dict[float, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                rate = learning_rate * getattr(module, SCALES, {}).get(name, 1.0)
                if head_rate is not None and f"{path}.".startswith(heads):
                    rate = head_rate
                groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def _heads(model: nn.Module) -> Iterator[str]:
    """Paths of what is trained for the task alone."""
    yield from (path for path, module in model.named_modules() if getattr(module, IS_HEAD, False))
    if isinstance(model, FastPromptModel) and hasattr(model, SAVED):
        yield from getattr(model, SAVED).placed

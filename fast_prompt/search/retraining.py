"""Training anew with what a search has found."""

from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import default_collate

from fast_prompt.search.settings import TrainingSettings
from fast_prompt.search.training import Collate, Examples, Training, seeded
from fast_prompt.tuning import get_fast_prompt_model, parameter_groups
from fast_prompt.tuning.config import MethodConfig


class Adapted:
    """An adapted model as what trains."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that trains, by name."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def parameter_groups(self, learning_rate: float, head_rate: float | None) -> list[dict[str, Any]]:
        """An optimizer's."""
        return parameter_groups(self.model, learning_rate, head_rate)


class _Retraining(Training):
    name = "retraining"

    def __init__(self, config: MethodConfig, *args: Any) -> None:
        super().__init__(*args)
        self.config = config
        if len(self.examples) < self.settings.batch_size:
            raise ValueError(f"examples: expected a batch of {self.settings.batch_size}, got {len(self.examples)}")

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"config": self.config.to_dict()}


def train_anew(
    model: nn.Module,
    config: MethodConfig,
    examples: Examples,
    settings: TrainingSettings,
    *,
    collate: Collate = default_collate,
    directory: Path | str | None = None,
) -> Any:
    """Adapts a model and trains it: AdamW, linear warm-up and decay, as the searches train.

    Interrupted, it gives the model back as it was and, called again, goes on from the last checkpoint to the same end.

    Args:
        model: what ``get_fast_prompt_model`` takes, without adapters.
        config: a method's settings.
        examples: training data, map-style; an item is what ``collate`` takes.
        settings: how the training goes.
        collate: makes a list of items the keyword arguments of ``model``, whose output has a ``loss``.
        directory: for checkpoints, made if missing; None: no checkpoints.

    Returns:
        the model, adapted, in evaluation mode.

    Raises:
        ValueError: too few examples, or the checkpoint in ``directory`` is another run's, or damaged.
        FloatingPointError: a loss or a gradient is not finite.
    """
    training = _Retraining(config, model, examples, settings, collate, directory)
    with seeded(training.seed("adapter")):
        adapted = get_fast_prompt_model(model, config)
    try:
        training.train(Adapted(adapted))
    except BaseException:
        adapted.revert()
        raise
    return adapted.eval()

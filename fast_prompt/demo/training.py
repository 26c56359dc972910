"""Training and prediction, the same for the base and for every method."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast_prompt.demo.digits import Images

HEAD = "classifier"
WARMUP = 0.1  # share of the steps, before a cosine decay
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Schedule:
    """Steps of AdamW, with peak learning rates for the classifier and for all else that trains."""

    steps: int
    batch_size: int
    rate: float
    head_rate: float


def fit(model: nn.Module, images: Images, schedule: Schedule, seed: int, on_step: Callable[[], object]) -> None:
    """Trains what requires a gradient, on batches in an order that `seed` fixes. `on_step` is called after each step.

    The model is left in evaluation mode.
    """
    optimizer = build_optimizer(model, schedule)
    decay = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=schedule.steps,
        pct_start=WARMUP,
    )
    batches = shuffled_batches(len(images), schedule.batch_size, seed)
    model.train()
    for _ in range(schedule.steps):
        batch = next(batches)
        train_step(model, optimizer, images.pixels[batch], images.labels[batch])
        decay.step()
        on_step()
    model.eval()


def build_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """AdamW on the parameters that train, in two groups: the classifier's, and the method's if it has any."""
    head: list[nn.Parameter] = []
    method: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if HEAD in name.split(".") else method).append(parameter)
    groups = [{"params": head, "lr": schedule.head_rate}, {"params": method, "lr": schedule.rate}]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=WEIGHT_DECAY)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, pixels: Tensor, labels: Tensor) -> None:
    """One step on one batch: pixels [B, 1, 8, 8], labels [B] int64."""
    F.cross_entropy(model(pixel_values=pixels).logits, labels).backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()


def shuffled_batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of positions; each epoch is one permutation of all, its last batch perhaps smaller."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(batch_size)


@torch.no_grad()
def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """The model's logits [n, classes] for pixels [n, 1, 8, 8], without a gradient."""
    return model(pixel_values=pixels).logits


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of rows of scores [n, classes] whose largest is at the label [n]."""
    return (scores.argmax(-1) == labels).float().mean().item()

"""Training and prediction, the same for every task, base and method."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fast_prompt.demo.digits import Images

HEAD = "classifier"
WARMUP = 0.1  # share of the steps, before a cosine decay
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0

# The mean loss of the examples at some positions [B].
Loss = Callable[[Tensor], Tensor]


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    steps: int,
    batches: Iterator[Tensor],
    on_step: Callable[[], object],
) -> None:
    """Takes `steps` steps, each on the next of `batches`, and calls `on_step` after each.

    The optimizer's learning rates are the peaks of a short warm-up and a cosine decay. The model is left in evaluation
    mode.
    """
    decay = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=steps,
        pct_start=WARMUP,
    )
    model.train()
    for _ in range(steps):
        train_step(optimizer, partial(loss, next(batches)))
        decay.step()
        on_step()
    model.eval()


def build_optimizer(model: nn.Module, rate: float, head_rate: float) -> torch.optim.Optimizer:
    """AdamW on the parameters that train: the classifier's at `head_rate`, and all others, if any, at `rate`."""
    head: list[nn.Parameter] = []
    method: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if HEAD in name.split(".") else method).append(parameter)
    groups = [{"params": head, "lr": head_rate}, {"params": method, "lr": rate}]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=WEIGHT_DECAY)


def train_step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    """One step on one batch."""
    loss().backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()


def image_loss(model: nn.Module, images: Images, batch: Tensor) -> Tensor:
    """The loss of a classifier on the images at positions [B]."""
    return F.cross_entropy(model(pixel_values=images.pixels[batch]).logits, images.labels[batch])


def shuffled_batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of positions; each epoch is one permutation of all, its last batch perhaps smaller."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(batch_size)


def batches_by_length(lengths: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """The same, of examples of these lengths [n], those of a batch alike: a step takes as long as its longest."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(lengths), generator=generator)
        batches = order[lengths[order].argsort(stable=True)].split(batch_size)
        yield from (batches[index] for index in torch.randperm(len(batches), generator=generator))


@torch.no_grad()
def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """The model's logits [n, classes] for pixels [n, 1, 8, 8], without a gradient."""
    return model(pixel_values=pixels).logits


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of rows of scores [n, classes] whose largest is at the label [n]."""
    return (scores.argmax(-1) == labels).float().mean().item()


def trained_parameters(model: nn.Module) -> int:
    """Number of elements that train."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def progress(description: str, steps: int) -> "tqdm[Any]":
    """A progress bar on stderr; none where that is no terminal."""
    return tqdm(desc=f"{description:<18}", total=steps, unit="step", file=sys.stderr, disable=None)

"""The picture of a search: each arm's preference over time."""

from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean

from torch import Tensor

from fast_prompt.figures import FAINT, INK, ORANGE, figure

BEST = ORANGE
GAP = 0.045  # least distance of two labels, share of the axes' height


def plot_preferences(history: Tensor, path: Path | str, arm: str = "layer") -> None:
    """Draws one line an arm, the best one's in colour.

    Args:
        history: preferences after each step, [steps, arms].
        path: of the picture; its ending says which format.
        arm: what an arm is.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    last = history[-1]
    best = int(last.argmax())
    with figure(path, 9, 5.2, layout="constrained") as drawn:
        axes = drawn.add_subplot()
        for index, line in enumerate(history.T.tolist()):
            color, width = (BEST, 2.4) if index == best else (FAINT, 1.3)
            axes.plot(range(1, len(line) + 1), line, color=color, linewidth=width, zorder=3 if index == best else 2)
        bottom, top = axes.get_ylim()
        order = last.argsort().tolist()
        for index, height in zip(order, apart(last[order].tolist(), GAP * (top - bottom)), strict=True):
            style = {"color": BEST, "weight": "bold"} if index == best else {"color": INK}
            end = (len(history), height)
            axes.annotate(f"{arm} {index}", end, xytext=(6, 0), textcoords="offset points", va="center", **style)
        axes.set_title(f"Which {arm} is worth most: preferences learned from rewards", weight="bold")
        axes.set_xlabel("step")
        axes.set_ylabel("preference")
        axes.grid(axis="y")


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights at least ``gap`` apart, as near to the given ascending ones as that allows."""
    groups: list[list[float]] = []  # what a height would be without the gaps below it; of those that touch, the mean
    for rank, height in enumerate(heights):
        groups.append([height - rank * gap])
        while len(groups) > 1 and fmean(groups[-2]) >= fmean(groups[-1]):
            pooled = groups.pop()
            groups[-1] += pooled
    means = [fmean(group) for group in groups for _ in group]
    return [mean + rank * gap for rank, mean in enumerate(means)]


def plot_gates(history: Tensor, path: Path | str, blocks: Sequence[str], skipped: Collection[str]) -> None:
    """Draws a heat map: a row for each block, a column for each step, the gate's probability as the colour.

    Args:
        history: gates after each step, [steps, blocks].
        path: of the picture; its ending says which format.
        blocks: what the rows are called.
        skipped: those that were found; set in colour.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    probabilities = history.sigmoid().T.numpy()
    with figure(path, 9, 1.6 + 0.32 * len(blocks), layout="constrained") as drawn:
        axes = drawn.add_subplot()
        reach = max(0.05, abs(probabilities - 0.5).max())
        extent = (0.5, len(history) + 0.5, len(blocks) - 0.5, -0.5)
        image = axes.imshow(
            probabilities,
            aspect="auto",
            interpolation="nearest",
            cmap="PuOr_r",
            vmin=0.5 - reach,
            vmax=0.5 + reach,
            extent=extent,
        )
        axes.set_yticks(range(len(blocks)), blocks)
        for label, block in zip(axes.get_yticklabels(), blocks, strict=True):
            label.set(color=BEST, weight="bold") if block in skipped else label.set(color=INK)
        axes.set_title("Which blocks to skip: their probabilities, learned from rewards", weight="bold")
        axes.set_xlabel("step")
        drawn.colorbar(image, ax=axes, label="probability")

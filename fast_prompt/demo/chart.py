"""The picture of a run: accuracy against trained parameters, milliseconds, and the digits that methods disagree on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fast_prompt.demo.digits import Images, Splits
from fast_prompt.demo.report import Results, Row, standard_error
from fast_prompt.demo.settings import Settings
from fast_prompt.figures import BLUE, FAINT, GREEN, INK, ORANGE, SOFT, figure

# Rows not named here are forms of those that are.
COLORS = {"Linear probe": SOFT, "Deep prompt tuning": GREEN, "LoRA": BLUE, "APT": ORANGE}
LEFT, RIGHT = 0.07, 0.97  # the text's margins, shares of the figure's width
SAMPLES = 16
LABEL_GAP = 0.13  # least distance of two labels, share of the axes' height


class Bar(NamedTuple):
    """One bar of `draw_bars`; an open one where it is not `filled`."""

    name: str
    value: float
    color: str
    filled: bool = True


def draw(
    results: Results,
    splits: Splits,
    predictions: Mapping[str, Tensor],
    classes: Sequence[int],
    settings: Settings,
    path: Path,
) -> None:
    """Draws the chart.

    Args:
        results: the rows to draw.
        splits: the images trained on and tested.
        predictions: labels [len(splits.test)] by row name.
        classes: the digit that each label stands for.
        settings: of the run, for the sizes of the batches.
        path: of the PNG.
    """
    test = splits.test
    trained = [row for row in results.rows if row.method in COLORS]
    with figure(path, 12, 8.4) as drawn:
        drawn.text(LEFT, 0.945, "A frozen vision transformer that knows 0 to 4 learns 5 to 9", size=18, weight="bold")
        images = f"Real handwritten digits of 8 × 8 pixels; {len(splits.train)} to train on, {len(test)} to test"
        drawn.text(LEFT, 0.908, images, size=11.5, color=SOFT)
        panels = drawn.add_gridspec(
            2, 2, left=LEFT, right=RIGHT, top=0.83, bottom=0.43, width_ratios=(0.92, 1.12), wspace=0.9, hspace=0.5
        )
        _draw_accuracy(drawn.add_subplot(panels[:, 0]), trained, len(test))
        step, inference = (
            f"Training step of {settings.batch_size} images",
            f"Inference on {settings.inference_batch} images",
        )
        draw_bars(drawn.add_subplot(panels[0, 1]), _form_bars(trained, "step_ms"), f"{step}, ms")
        draw_bars(drawn.add_subplot(panels[1, 1]), _form_bars(results.rows, "infer_ms"), f"{inference}, ms")
        _draw_samples(drawn.add_axes((LEFT, 0.035, RIGHT - LEFT, 0.27)), test, predictions, classes)


def _draw_accuracy(axes: Any, rows: Sequence[Row], images: int) -> None:
    """One dot a method, labelled at the right; the labels are moved apart where they would touch."""
    percents = [100 * row.accuracy for row in rows]
    errors = [100 * standard_error(row.accuracy, images) for row in rows]
    for row, percent, error in zip(rows, percents, errors, strict=True):
        axes.errorbar(row.trainable_params, percent, error, color=COLORS[row.method], marker="o", markersize=11)
    low = min(percent - error for percent, error in zip(percents, errors, strict=True))
    high = max(percent + error for percent, error in zip(percents, errors, strict=True))
    margin = 0.08 * (high - low)
    axes.set_ylim(low - margin, min(100, high + margin))
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title("Test accuracy, % (bars: one standard error)")
    axes.set_xlabel("trained parameters, the new classifier's included")
    axes.grid(axis="y")

    bottom, top = axes.get_ylim()
    heights = spread([(percent - bottom) / (top - bottom) for percent in percents])
    for row, percent, height in zip(rows, percents, heights, strict=True):
        axes.annotate(
            f"{row.method}\n{percent:.1f}",
            xy=(row.trainable_params, percent),
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            color=COLORS[row.method],
            weight="bold",
            arrowprops={"arrowstyle": "-", "color": COLORS[row.method], "linewidth": 0.7, "alpha": 0.6, "shrinkB": 7},
        )


def spread(heights: Sequence[float]) -> list[float]:
    """The same heights in the same order, pushed up where two are closer than `LABEL_GAP`, and no higher than 1."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    spread = list(heights)
    for below, above in zip(order, order[1:], strict=False):
        spread[above] = max(spread[above], spread[below] + LABEL_GAP)
    limit = 1.0
    for index in reversed(order):
        spread[index] = min(spread[index], limit)
        limit = spread[index] - LABEL_GAP
    return spread


def draw_bars(axes: Any, bars: Sequence[Bar], title: str, number: str = "{:.1f}") -> None:
    """Horizontal bars from the top down, each with its value as `number` formats it."""
    largest = max(bar.value for bar in bars)
    for position, bar in enumerate(bars):
        fill = bar.color if bar.filled else "white"
        axes.barh(position, bar.value, height=0.64, color=fill, edgecolor=bar.color, linewidth=1.4)
        axes.text(bar.value + largest * 0.02, position, number.format(bar.value), va="center_baseline")
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
    axes.set_xticks([])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlim(0, max(largest, 1e-9) * 1.15)
    axes.set_title(title)


def _form_bars(rows: Sequence[Row], column: str) -> list[Bar]:
    """One bar a row: filled for a method as it trained, open for its merged or folded form."""
    return [
        Bar(row.method, getattr(row, column), COLORS[row.method.partition(" (")[0]], row.method in COLORS)
        for row in rows
    ]


def _draw_samples(axes: Any, test: Images, predictions: Mapping[str, Tensor], classes: Sequence[int]) -> None:
    """Test images that at least one method got wrong, evenly drawn, over what each method took them for."""
    methods = [name for name in predictions if name in COLORS]
    mistaken = [predictions[name] != test.labels for name in methods]
    disputed = torch.stack(mistaken).any(0).nonzero().flatten().tolist()
    count = min(SAMPLES, len(disputed))
    chosen = [disputed[position * len(disputed) // count] for position in range(count)]
    axes.set_title(f"{count} of the {len(disputed)} test images that a method got wrong, and what each took them for")
    axes.axis("off")
    axes.set_aspect("equal", anchor="W")
    axes.set_xlim(-3.15, SAMPLES - 0.55)
    axes.set_ylim(-0.42 * len(methods) - 0.15, 1.0)
    for column, index in enumerate(chosen):
        axes.imshow(test.pixels[index, 0].numpy(), cmap="gray_r", extent=(column - 0.42, column + 0.42, 0.1, 0.94))
        for line, (name, mistakes) in enumerate(zip(methods, mistaken, strict=True)):
            style = {"weight": "bold", "color": INK} if mistakes[index] else {"color": FAINT}
            digit = str(classes[int(predictions[name][index])])
            axes.text(column, -0.3 - 0.42 * line, digit, ha="center", va="center", **style)
    for line, name in enumerate(methods):
        axes.text(-0.75, -0.3 - 0.42 * line, name, ha="right", va="center", color=COLORS[name])

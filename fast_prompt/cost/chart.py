"""The picture of the rows: what each method adds in multiply-adds, and what it trains."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fast_prompt.cost.rows import Row
from fast_prompt.figures import BLUE, GREEN, GREY, ORANGE, SOFT, figure

# What is not named here is what ours stand against.
COLORS = {"apt": ORANGE, "dvp": GREEN, "das": BLUE}
ROOM = 0.22  # for the numbers beside the bars, share of the axes' width


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of one model.

    Args:
        rows: at least one.
        path: of the picture; its ending says in which format.

    Raises:
        OSError: it cannot be written.
        ValueError: matplotlib knows no such format.
    """
    first = rows[0]
    title = f"{Path(first.model).name}: {first.base_macs / 1e9:,.1f} G multiply-adds a sample ({first.sizes})"
    with figure(path, 12, 1.9 + 0.52 * len(rows), layout="constrained") as drawn:
        drawn.suptitle(title, x=0.01, ha="left", size=15, weight="bold")
        left, right = drawn.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
        for axes in (left, right):
            axes.spines[:].set_visible(False)
            axes.tick_params(axis="y", length=0)
        _draw_macs(left, rows)
        _draw_parameters(right, rows)
        left.set_yticks(range(len(rows)), [_label(row) for row in rows])
        left.invert_yaxis()


def _draw_macs(axes: Any, rows: Sequence[Row]) -> None:
    """Bars from zero, each with its value at its end."""
    values = [100 * row.share for row in rows]
    low, high = min(0.0, *values), max(0.0, *values)
    room = ROOM * max(high - low, 1e-9)
    for position, (row, value) in enumerate(zip(rows, values, strict=True)):
        axes.barh(position, value, height=0.64, color=_color(row))
        side, align = (-1, "right") if value < 0 else (1, "left")
        axes.text(value + side * room / 12, position, f"{value:+.2f} %", ha=align, va="center_baseline")
    axes.axvline(0, color=SOFT, linewidth=0.8)
    axes.set_xlim(low - room * (low < 0), high + room)
    axes.set_xticks([])
    axes.set_title("Added multiply-adds, % of the model's")


def _draw_parameters(axes: Any, rows: Sequence[Row]) -> None:
    """Dots on a logarithmic axis, since they lie decades apart; none where nothing trains."""
    axes.set_xscale("log")
    for position, row in enumerate(rows):
        if row.trainable_params:
            axes.plot(row.trainable_params, position, "o", color=_color(row), markersize=9)
            place = {"xytext": (9, 0), "textcoords": "offset points", "va": "center_baseline"}
            axes.annotate(f"{row.trainable_params / 1e6:.2f} M", (row.trainable_params, position), **place)
    axes.margins(x=ROOM)
    axes.grid(axis="x")
    axes.set_title("Trained parameters")


def _color(row: Row) -> str:
    return COLORS.get(row.method, GREY)


def _label(row: Row) -> str:
    return f"{row.method.replace('_', ' ')}\n{row.own_settings}".strip()

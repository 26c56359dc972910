"""The pictures of a run: the methods compared, and images with the answers to questions about them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fast_prompt.demo.chart import Bar, draw_bars
from fast_prompt.demo.report import Results
from fast_prompt.demo.vqa.data import Asked
from fast_prompt.demo.vqa.settings import Settings
from fast_prompt.figures import BLUE, FAINT, GREEN, GREY, INK, ORANGE, RED, SOFT, figure

# What is compared with, visual prompts, and the control.
BASELINE, OURS, CONTROL = BLUE, ORANGE, GREY
COLORS = {
    "Question only": CONTROL,
    "All visual tokens": BASELINE,
    "DVP, full": OURS,
    "DVP + adapters": OURS,
    "DVP + APT": OURS,
    "DVP + adapters, random LM": CONTROL,
}
RIGHT_ANSWER, WRONG_ANSWER = GREEN, RED
COLUMNS = 4


def draw_chart(results: Results, settings: Settings, path: Path) -> None:
    """Draws accuracy, trained parameters, time and arithmetic of every row."""
    panels = [
        ("Test accuracy, %", "{:.1f}", lambda row: 100 * row.accuracy),
        ("Trained parameters, millions", "{:.2f}", lambda row: row.trainable_params / 1e6),
        (f"Training step of {settings.batch_size} questions, ms", "{:.0f}", lambda row: row.step_ms),
        ("Added multiply-adds a question, millions", "{:.1f}", lambda row: row.added_macs / 1e6),
    ]
    with figure(path, 13, 7.2) as drawn:
        title = "A language model that never saw an image reads handwritten digits"
        drawn.text(0.03, 0.94, title, size=17, weight="bold")
        asked = f"{settings.train_questions:,} questions to train on, {settings.test_questions:,} to test"
        seen = f"seen {settings.epochs:g}x, or {settings.full_epochs:g}x where the whole language model trains"
        drawn.text(0.03, 0.9, f"MiniLM, six blocks; {asked}, about other digits; {seen}", size=11.5, color=SOFT)
        grid = drawn.add_gridspec(2, 2, left=0.19, right=0.98, top=0.82, bottom=0.05, wspace=0.62, hspace=0.38)
        for index, (title, number, value) in enumerate(panels):
            bars = [Bar(row.method, value(row), COLORS[row.method]) for row in results.rows]
            draw_bars(drawn.add_subplot(grid[index]), bars, title, number)


def draw_answers(asked: Asked, probabilities: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draws each image over its question, the model's answer and, where that is wrong, the right one."""
    rows = -(-len(asked) // COLUMNS)
    with figure(path, 14, 2.5 * rows + 0.6, layout="constrained") as drawn:
        title = "The saved adapter in a fresh language model answers"
        drawn.suptitle(title, x=0.01, ha="left", size=15, weight="bold")
        for number, answers in enumerate(probabilities):
            axes = drawn.add_subplot(rows, COLUMNS, number + 1)
            axes.imshow(asked.pixels[number, 0].numpy(), cmap="gray_r", vmin=-1, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color(FAINT)
            axes.set_title(asked.questions[number], loc="left", size=10.5, color=INK)
            answer, probability = next(iter(answers.items()))
            right = answer == asked.answers[number]
            correction = "" if right else f"   (right: {asked.answers[number]})"
            style: dict[str, Any] = {"color": RIGHT_ANSWER if right else WRONG_ANSWER, "size": 13, "weight": "bold"}
            axes.set_xlabel(f"{answer}   {probability:.0%}{correction}", loc="left", **style)


def draw_skips(
    results: Results, sets: Mapping[str, Sequence[str]], blocks: Sequence[str], settings: Settings, path: Path
) -> None:
    """Draws, for every row, the blocks that run and those that are skipped, its accuracy, arithmetic and time."""
    panels = [
        ("Test accuracy, %", "{:.1f}", lambda row: 100 * row.accuracy),
        ("Time a question, ms", "{:.2f}", lambda row: row.infer_ms),
        ("Saved multiply-adds, millions", "{:.1f}", lambda row: -row.added_macs / 1e6),
    ]
    with figure(path, 14, 4.2) as drawn:
        drawn.text(0.02, 0.92, "Which blocks do the questions need?", size=16, weight="bold")
        asked = f"{settings.train_questions:,} questions to train on, {settings.test_questions:,} to test"
        drawn.text(0.02, 0.855, f"MiniLM with visual prompts, APT and adapters; {asked}", size=11, color=SOFT)
        grid = drawn.add_gridspec(1, 4, left=0.1, right=0.98, top=0.7, bottom=0.08, wspace=0.12)
        _draw_blocks(drawn.add_subplot(grid[0]), sets, blocks)
        for index, (title, number, value) in enumerate(panels):
            axes = drawn.add_subplot(grid[index + 1])
            colors = [OURS if row.method == "Found" else CONTROL for row in results.rows]
            bars = [Bar(row.method, value(row), color) for row, color in zip(results.rows, colors, strict=True)]
            draw_bars(axes, bars, title, number)
            axes.set_yticks([])


def _draw_blocks(axes: Any, sets: Mapping[str, Sequence[str]], blocks: Sequence[str]) -> None:
    """A line of squares for every set: full for a block that runs, open for one that is skipped."""
    for line, (name, skipped) in enumerate(sets.items()):
        color = OURS if name == "Found" else CONTROL
        for number, block in enumerate(blocks):
            face = "white" if block in skipped else color
            axes.scatter(number, line, s=210, marker="s", facecolor=face, edgecolor=color, linewidth=1.4)
    axes.set_yticks(range(len(sets)), list(sets))
    axes.set_xticks(range(len(blocks)), [str(number) for number in range(len(blocks))])
    axes.set_ylim(len(sets) - 0.5, -0.5)
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Full: runs. Open: skipped")

"""The pictures of a run: the methods compared, and images with the answers to questions about them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from fast_prompt.demo.chart import FAINT, INK, SOFT, STYLE, Bar, draw_bars
from fast_prompt.demo.report import Results
from fast_prompt.demo.vqa.data import Asked
from fast_prompt.demo.vqa.settings import Settings

# Okabe and Ito's colours: what is compared with, visual prompts, and the control.
BASELINE, OURS, CONTROL = "#0072B2", "#D55E00", "#999999"
COLORS = {
    "Question only": CONTROL,
    "All visual tokens": BASELINE,
    "DVP, full": OURS,
    "DVP + adapters": OURS,
    "DVP + APT": OURS,
    "DVP + adapters, random LM": CONTROL,
}
RIGHT_ANSWER, WRONG_ANSWER = "#009E73", "#CC3311"
COLUMNS = 4


def draw_chart(results: Results, settings: Settings, path: Path) -> None:
    """Draws accuracy, trained parameters, time and arithmetic of every row."""
    panels = [
        ("Test accuracy, %", "{:.1f}", lambda row: 100 * row.accuracy),
        ("Trained parameters, millions", "{:.2f}", lambda row: row.trainable_params / 1e6),
        (f"Training step of {settings.batch_size} questions, ms", "{:.0f}", lambda row: row.step_ms),
        ("Added multiply-adds a question, millions", "{:.1f}", lambda row: row.added_macs / 1e6),
    ]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 7.2), dpi=150, facecolor="white")
        title = "A language model that never saw an image reads handwritten digits"
        figure.text(0.03, 0.94, title, size=17, weight="bold")
        asked = f"{settings.train_questions:,} questions to train on, {settings.test_questions:,} to test"
        figure.text(0.03, 0.9, f"MiniLM, six blocks; {asked}, about other digits", size=11.5, color=SOFT)
        grid = figure.add_gridspec(2, 2, left=0.19, right=0.98, top=0.82, bottom=0.05, wspace=0.62, hspace=0.38)
        for index, (title, number, value) in enumerate(panels):
            bars = [Bar(row.method, value(row), COLORS[row.method]) for row in results.rows]
            draw_bars(figure.add_subplot(grid[index]), bars, title, number)
        figure.savefig(path)


def draw_answers(asked: Asked, probabilities: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draws each image over its question, the model's answer and, where that is wrong, the right one."""
    rows = -(-len(asked) // COLUMNS)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 2.5 * rows + 0.6), dpi=120, facecolor="white", layout="constrained")
        title = "The saved adapter in a fresh language model answers"
        figure.suptitle(title, x=0.01, ha="left", size=15, weight="bold")
        for number, answers in enumerate(probabilities):
            axes = figure.add_subplot(rows, COLUMNS, number + 1)
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
        figure.savefig(path)

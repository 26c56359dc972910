"""What all figures share: the style (fast_prompt.mplstyle, beside this file), the colours, the way to a file.

Nothing here imports matplotlib before a figure is drawn.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_name("fast_prompt.mplstyle")

# Text, secondary text and lines.
INK, SOFT, FAINT = "#222222", "#666666", "#A6A6A6"
# Okabe and Ito's colours, which colour-blind readers can tell apart.
ORANGE, GREEN, BLUE, GREY = "#D55E00", "#009E73", "#0072B2", "#999999"
RED = "#CC3311"


@contextmanager
def figure(path: Path | str, width: float, height: float, **options: Any) -> Iterator[Any]:
    """A ``matplotlib.figure.Figure`` to draw in, saved as ``path`` at the end; its ending names the format.

    Args:
        path: of the picture: PNG, PDF or SVG.
        width, height: in inches.
        options: further arguments of ``Figure``.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
        ValueError: matplotlib knows no such format.
    """
    import matplotlib.style  # noqa: PLC0415 (an optional dependency)
    from matplotlib.figure import Figure  # noqa: PLC0415

    with matplotlib.style.context(STYLE):
        drawn = Figure(figsize=(width, height), **options)
        yield drawn
        drawn.savefig(path)

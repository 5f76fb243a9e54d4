"""The loss curve of a run as a picture."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def save_loss_curve(
    history: Iterable[Mapping[str, Any]], folder: str | Path, *, key: str, label: str, name: str = "loss_curve"
) -> list[Path]:
    """Draw a quantity in training and on held-out data against steps; return the paths of the PNG and the SVG.

    Args:
        history: entries of the Trainer's log with ``step`` and ``key`` or ``eval_`` and ``key``.
        key: the quantity's key in the log.
        label: its name, for the axis.
        folder: where the pictures go.
        name: their file name without ending.
    """
    # Drawn on a canvas of its own: neither pyplot's figures nor the choice of a window system are touched.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = list(history)
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles: dict[str, tuple[str, dict[str, Any]]] = {
        key: ("training", {"color": "#9bb7d4", "linewidth": 1.2}),
        f"eval_{key}": ("held out", {"color": "#b3392f", "linewidth": 2.0, "marker": "o", "markersize": 4}),
    }
    for field, (kind, style) in styles.items():
        points = [(entry["step"], entry[field]) for entry in entries if field in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=kind, **style)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.get_lines():
        axes.legend(frameon=False)
    paths = [Path(folder) / f"{name}.{ending}" for ending in ("png", "svg")]
    # A fixed salt and no date make the SVG of one history the same file every time.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths

"""The plots of the speed benchmark: time and memory against length, on log axes, from its result.

python -m benchmarks.plots benchmarks/results/speed.json docs/plots
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
#: who, rounds (first or last of the mode), label, colour, line.
LINES = (
    ("ours", 0, "flash-reformer, {} round", "tab:blue", "-"),
    ("ours", 1, "flash-reformer, {} rounds", "tab:blue", "--"),
    ("transformers", 0, "transformers, {} round", "tab:orange", "-"),
    ("transformers", 1, "transformers, {} rounds", "tab:orange", "--"),
    ("reformer-pytorch", 0, "reformer-pytorch, {} round", "tab:green", "-"),
    ("reformer-pytorch", 1, "reformer-pytorch, {} rounds", "tab:green", "--"),
    ("sdpa", None, "exact attention (SDPA)", "black", "-"),
)
TITLES = {"forward": "forward", "training": "forward and backward"}


def _series(rows: list[Row], field: str, **wanted: Any) -> list[tuple[int, float]]:
    found = [row for row in rows if field in row and all(row[name] == value for name, value in wanted.items())]
    return sorted((row["length"], row[field]) for row in found)


def _draw(axes: Any, rows: list[Row], field: str, scale: float, ends: list[int], **wanted: Any) -> None:
    for who, end, label, colour, line in LINES:
        rounds = 0 if end is None else ends[end]
        points = _series(rows, field, who=who, rounds=rounds, kind="lsh", **wanted)
        if points:
            lengths, values = zip(*points, strict=True)
            style = {"color": colour, "linestyle": line, "marker": "o", "markersize": 3}
            axes.plot(lengths, [scale * value for value in values], label=label.format(rounds), **style)
    ticks = sorted({row["length"] for row in rows if row["kind"] == "lsh" and field in row})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{T // 1024}K" if T >= 1024 else str(T) for T in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.grid(alpha=0.3)


def draw(result: dict[str, Any], folder: Path, machine: str) -> list[str]:
    """Write ``attention_time.svg`` and ``attention_memory.svg`` and return their names."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"svg.hashsalt": "speed", "svg.fonttype": "none", "font.size": 9})
    ends = result["ends"]
    races = [row for race in result["races"] if race["workload"].startswith("attention") for row in race["rows"]]
    names = ["attention_time.svg", "attention_memory.svg"]

    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axes, (passes, title) in zip(panels, TITLES.items(), strict=True):
        _draw(axes, races, "median_s", 1e3, ends, passes=passes)
        axes.set_title(f"one attention layer, {title}")
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(fontsize=7)
    facts = f"E 256, 4 heads of 64, chunks of 64, causal, fp32, {result['threads']} threads, {machine}"
    figure.supxlabel(facts, fontsize=7)
    figure.savefig(folder / names[0], metadata={"Date": None})

    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    peaks = [row for row in result["memory"] if row["allocator"] == "default"]
    _draw(axes, peaks, "peak_mb", 1.0, ends, passes="training")
    axes.set_title("one attention layer, forward and backward")
    axes.set_ylabel("peak memory above the imports, MB")
    axes.legend(fontsize=7)
    figure.supxlabel(facts, fontsize=7)
    figure.savefig(folder / names[1], metadata={"Date": None})
    plt.close("all")
    return names


def main() -> None:
    """Draw a result that was kept."""
    path, folder = map(Path, sys.argv[1:])
    kept = json.loads(path.read_text("utf-8"))
    print("\n".join(draw(kept["result"], folder, kept["cpu"])))


if __name__ == "__main__":
    main()

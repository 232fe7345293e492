"""The picture of `docs/quality.md`: bits of a weight against KL, by program and method."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_MARKS = "o", "s", "^", "D", "v", "P", "X"


def _is_plan(row: Row) -> bool:
    return row["method"].startswith("a plan")


SERIES: dict[str, Callable[[Row], bool]] = {
    "ONNX, plans": lambda row: row["format"] == "onnx" and _is_plan(row),
    "ONNX, no data": lambda row: row["format"] == "onnx" and "clip search" in row["method"],
    "GGUF, plans": lambda row: row["format"] == "gguf" and _is_plan(row),
    "Core ML, no data": lambda row: row["format"] == "coreml" and "clip search" in row["method"],
    "llama-quantize, with importances": lambda row: row["command"].startswith("llama-quantize"),
    "mlx-lm": lambda row: row["format"] == "mlx",
}
"""Name in the legend → whether a row belongs to it."""


def write_picture(rows: list[Row], path: Path) -> None:
    """Draws all series that have rows, as SVG."""
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.hashsalt": "", "font.size": 10}
    figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    for (label, belongs), mark in zip(SERIES.items(), _MARKS, strict=False):
        points = sorted((row["bits"], row["kl"]) for row in rows if belongs(row))
        if points:
            axes.plot(*zip(*points, strict=True), marker=mark, markersize=5, label=label)
    axes.set(yscale="log", xlabel="bits per weight", ylabel="KL (nats per token)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)

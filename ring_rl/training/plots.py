"""Plots of a run's metrics, drawn without a display and without matplotlib's global state."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Sequence

from ring_rl.atomic_file import write_whole
from ring_rl.training.metrics import read_metrics

__all__ = ["plot_learning_curve"]


def plot_learning_curve(
    metrics_paths: pathlib.Path | Sequence[pathlib.Path],
    out_path: pathlib.Path,
    *,
    metric: str = "loss",
    labels: Sequence[str] | None = None,
) -> None:
    """Draw a metric over the optimizer steps, one line for each metrics file.

    Args:
        metrics_paths: one or several `metrics.jsonl`.
        out_path: the picture; its suffix (.png, .pdf, .svg) is the format. An older one is replaced.
        metric: the name of the metric.
        labels: one a file; the names of the run folders when None.

    Raises:
        FileNotFoundError: a metrics file is missing.
        ValueError: the number of labels differs, a file never names the metric, or the format is unknown.
    """
    # Figure draws on Agg by itself; pyplot would choose a backend for the whole process.
    from matplotlib.figure import Figure

    paths = [metrics_paths] if isinstance(metrics_paths, pathlib.Path) else list(metrics_paths)
    names = [path.parent.name for path in paths] if labels is None else list(labels)
    if len(names) != len(paths):
        raise ValueError(f"{len(paths)} metrics files need as many labels, got {len(names)}")
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for path, name in zip(paths, names, strict=True):
        records = read_metrics(path)
        points = [(record["step"], record[metric]) for record in records if record.get(metric) is not None]
        if not points:
            present = ", ".join(sorted({key for record in records for key in record} - {"step"})) or "none"
            raise ValueError(f"{path} holds no value of {metric}; its metrics are: {present}")
        steps, values = zip(*points, strict=True)
        # A single point draws no line; a marker shows it.
        axes.plot(steps, values, label=name, marker="o" if len(points) == 1 else None)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    if len(paths) > 1:
        axes.legend()
    out_path = pathlib.Path(out_path)
    formats = figure.canvas.get_supported_filetypes()
    suffix = out_path.suffix.removeprefix(".")
    if suffix not in formats:
        raise ValueError(f"{out_path} names no known picture format; end it with .png, .pdf or .svg")
    picture = io.BytesIO()
    figure.savefig(picture, format=suffix, dpi=150)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out_path, picture.getvalue())

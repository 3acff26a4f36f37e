"""Plots of a run's metrics, drawn without a display and without matplotlib's global state."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ring_rl.atomic_file import write_whole
from ring_rl.training.metrics import PERFORMANCE_PREFIX, read_metrics

__all__ = ["RUN_PANELS", "plot_learning_curve", "plot_run", "write_figure"]

# What a run is looked at for, and the title that says it in full.
RUN_PANELS: Mapping[str, str] = {
    "loss": "loss",
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate",
    f"{PERFORMANCE_PREFIX}tokens_per_second": "tokens per second",
    f"{PERFORMANCE_PREFIX}input_wait": "share of time waiting for input",
    f"{PERFORMANCE_PREFIX}model_flops_utilisation": "model FLOPs utilisation",
}
_SHARES = (f"{PERFORMANCE_PREFIX}input_wait", f"{PERFORMANCE_PREFIX}model_flops_utilisation")


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
        points = _points(records, metric)
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
    write_figure(figure, out_path)


def plot_run(metrics_path: pathlib.Path, out_path: pathlib.Path) -> None:
    """Draw a run at a glance, one panel each for those of `RUN_PANELS` that it recorded, over the optimizer steps.

    Args:
        metrics_path: a `metrics.jsonl`.
        out_path: the picture; its suffix (.png, .pdf, .svg) is the format. An older one is replaced.

    Raises:
        FileNotFoundError: the metrics file is missing.
        ValueError: it holds none of these metrics, or the format is unknown.
    """
    from matplotlib.figure import Figure

    records = read_metrics(metrics_path)
    curves = {metric: points for metric in RUN_PANELS if (points := _points(records, metric))}
    if not curves:
        raise ValueError(f"{metrics_path} holds none of {', '.join(RUN_PANELS)}; train for longer")
    columns = min(len(curves), 3)
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    for axes, (metric, points) in zip(grid, curves.items(), strict=False):
        axes.plot(*zip(*points, strict=True), marker="o" if len(points) == 1 else None)
        axes.set_title(RUN_PANELS[metric], fontsize="medium")
        axes.grid(alpha=0.3)
        if metric in _SHARES:
            axes.set_ylim(bottom=0)
    for axes in list(figure.axes)[len(curves) :]:
        axes.set_axis_off()
    figure.supxlabel("optimizer steps", fontsize="medium")
    write_figure(figure, out_path)


def _points(records: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[int, float]]:
    return [(record["step"], record[metric]) for record in records if record.get(metric) is not None]


def write_figure(figure: Any, out_path: pathlib.Path) -> None:
    """Save a matplotlib figure whole or not at all; the suffix is the format, and an older picture is replaced.

    Raises:
        ValueError: the suffix names no format.
    """
    out_path = pathlib.Path(out_path)
    formats = figure.canvas.get_supported_filetypes()
    suffix = out_path.suffix.removeprefix(".")
    if suffix not in formats:
        raise ValueError(f"{out_path} names no known picture format; end it with .png, .pdf or .svg")
    picture = io.BytesIO()
    figure.savefig(picture, format=suffix, dpi=150)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out_path, picture.getvalue())

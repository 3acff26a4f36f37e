"""Pictures of a table of runs, drawn without a display and without matplotlib's global state."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ring_rl.training.plots import write_figure
from ring_rl.training.run_report import setting_text
from ring_rl.training.run_table import RunTable, TableRow
from ring_rl.training.statistics import estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_curves", "plot_final_by_setting"]

# A range of settings that spans more than this factor is drawn on a logarithmic axis.
_LOGARITHMIC_FROM = 20.0


def plot_curves(table: RunTable, metric: str, path: pathlib.Path, *, largest_count: int) -> None:
    """A metric over the optimizer steps: a line a configuration, the mean of its seeds, and their 95% band.

    Args:
        table: the runs.
        metric: one of the table's.
        path: the picture; an older one is replaced.
        largest_count: more configurations than this are not drawn; the first ones of the table are, and the
            title says so.
    """
    figure, axes = _figure(1, 1)
    for row in table.rows[:largest_count]:
        steps, curves = _common_curves(row, metric)
        estimates = [estimate(column) for column in curves.T]
        [line] = axes[0].plot(steps, [each.mean for each in estimates], label=_label(table, row))
        if len(row.runs) > 1:
            low, high = [each.low for each in estimates], [each.high for each in estimates]
            axes[0].fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        elif len(steps) == 1:
            line.set_marker("o")
    drawn = min(largest_count, len(table.rows))
    which = "" if drawn == len(table.rows) else f", the best {drawn} of {len(table.rows)} configurations"
    axes[0].set_title(f"mean over seeds, 95% band{which}")
    axes[0].set_xlabel("optimizer steps")
    axes[0].set_ylabel(metric)
    if drawn > 1:
        # A line each: settings are long.
        figure.set_figheight(figure.get_figheight() + 0.2 * drawn)
        figure.legend(loc="outside lower center", fontsize="small")
    write_figure(figure, path)


def plot_final_by_setting(table: RunTable, metric: str, path: pathlib.Path) -> None:
    """The final value against each shown setting, a panel each; a point a configuration, with its 95% interval.

    Raises:
        ValueError: the table shows no setting.
    """
    if not table.keys:
        raise ValueError("the table has one configuration only, so there is no setting to draw against")
    columns = min(3, len(table.keys))
    figure, panels = _figure(math.ceil(len(table.keys) / columns), columns)
    for axes, key in zip(panels, table.keys, strict=False):
        rows = [row for row in table.rows if key in row.settings]
        finals = [row.final[metric] for row in rows]
        # NaN, of a single seed, draws no bar.
        margins = [each.high - each.mean for each in finals]
        x = _positions(axes, [row.settings[key] for row in rows])
        axes.errorbar(x, [each.mean for each in finals], yerr=margins, fmt="o", capsize=3, alpha=0.7)
        axes.set_xlabel(key)
        axes.set_ylabel(f"{metric}, final")
    for axes in panels[len(table.keys) :]:
        axes.remove()
    write_figure(figure, path)


def _common_curves(row: TableRow, metric: str) -> tuple[list[int], np.ndarray]:
    """The steps that all seeds have recorded, and [seeds, steps] values there."""
    curves = [dict(zip(*run.curve(metric), strict=True)) for run in row.runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, np.array([[curve[step] for step in steps] for curve in curves]).reshape(len(curves), len(steps))


def _positions(axes: Axes, values: Sequence[Any]) -> list[float]:
    """Where values stand on the x axis: numbers at themselves, anything else side by side."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        if min(values) > 0 and max(values) > _LOGARITHMIC_FROM * min(values):
            axes.set_xscale("log")
        return [float(value) for value in values]
    names = sorted({setting_text(value) for value in values})
    axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 2 else 0)
    axes.set_xlim(-0.5, len(names) - 0.5)
    return [float(names.index(setting_text(value))) for value in values]


def _label(table: RunTable, row: TableRow) -> str:
    settings = (
        f"{key.rsplit('.', 1)[-1]} {setting_text(row.settings[key])}" for key in table.keys if key in row.settings
    )
    seeds = "1 seed" if len(row.runs) == 1 else f"{len(row.runs)} seeds"
    return ", ".join([*settings, seeds])


def _figure(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    # Figure draws on Agg by itself; pyplot would choose a backend for the whole process.
    from matplotlib.figure import Figure

    width = 6.8 if columns == 1 else 4.2 * columns
    figure = Figure(figsize=(width, 4.4 if rows == 1 else 3.4 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels

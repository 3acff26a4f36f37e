"""Pictures of an evaluation, drawn without a display and without matplotlib's global state."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ring_rl.agent.evaluation.results import Result
from ring_rl.training.plots import write_figure
from ring_rl.training.statistics import Estimate
from ring_rl.typing import Float64


def plot_return_by_episode(
    results: Sequence[Result], data_returns: Float64[np.ndarray, " E"], path: Path, *, title: str
) -> None:
    """The return against the episode's index in context: a line an agent, 95% intervals over the table's samples.

    Initial states differ from index to index but are the same for every agent: what the context does is the
    difference to the same agent with its context cleared.
    """
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for number, result in enumerate(results):
        estimates = result.scores.by_episode
        # Side by side rather than on top of one another.
        x = np.arange(1, len(estimates) + 1) + 0.05 * (number - (len(results) - 1) / 2)
        _draw_estimates(axes, x, estimates, label=result.name)
    _mark_data(axes.axhline, data_returns)
    axes.set_xticks(range(1, results[0].returns.shape[2] + 1))
    axes.set_xlabel("episode in context")
    axes.set_ylabel("return")
    axes.set_title(title)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    write_figure(figure, path)


def plot_returns_in_data(
    results: Sequence[Result], data_returns: Float64[np.ndarray, " E"], path: Path, *, title: str
) -> None:
    """A histogram of the data's returns, with every agent's mean and its 95% interval marked."""
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    counts, _, _ = axes.hist(data_returns, bins=40, color="0.8", label=f"data, {len(data_returns)} episodes")
    for number, result in enumerate(results):
        mean, color = result.scores.mean, f"C{number}"
        axes.axvline(mean.mean, color=color, label=f"{result.name}: {mean:.0f}")
        if mean.seeds > 1:
            axes.axvspan(mean.low, mean.high, color=color, alpha=0.15)
    _mark_data(axes.axvline, data_returns)
    axes.set_xlabel("return of an episode")
    axes.set_ylabel("episodes of the data")
    axes.set_ylim(0, 1.05 * np.max(counts))
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    write_figure(figure, path)


def plot_return_by_target(
    results: Sequence[Result], data_returns: Float64[np.ndarray, " E"], path: Path, *, title: str
) -> None:
    """The mean return against the target asked for, a line an agent and context; the headline's target is filled.

    On the diagonal agents would do what they were asked.
    """
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    best = data_returns.max()
    curves: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.target_fraction is not None:
            curves.setdefault((result.label, result.context), []).append(result)
    targets = sorted({result.target_fraction or 0.0 for each in curves.values() for result in each})
    for number, ((label, context), each) in enumerate(curves.items()):
        each.sort(key=lambda result: result.target_fraction or 0.0)
        color, name = f"C{number}", f"{label}, context cleared" if context == "cleared" else label
        for headline in (False, True):
            drawn = [result for result in each if result.headline is headline]
            x = best * np.array([result.target_fraction for result in drawn])
            estimates = [result.scores.mean for result in drawn]
            _draw_estimates(axes, x, estimates, color=color, linestyle="none", fillstyle="full" if headline else "none")
        means = [result.scores.mean.mean for result in each]
        axes.plot([best * (result.target_fraction or 0.0) for result in each], means, color=color, label=name)
    axes.plot([best * target for target in targets], [best * target for target in targets], color="0.6", linestyle="--")
    axes.set_xlabel("target return")
    axes.set_ylabel("return, mean of episodes")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    write_figure(figure, path)


def _draw_estimates(axes: Axes, x: np.ndarray, estimates: Sequence[Estimate], **style: Any) -> None:
    means = np.array([each.mean for each in estimates])
    # A single sample has no interval: its bar has no length.
    margins = np.nan_to_num([each.high - each.mean for each in estimates])
    axes.errorbar(x, means, yerr=margins, marker="o", capsize=3, **style)


def _mark_data(draw_line, data_returns: np.ndarray) -> None:
    draw_line(np.quantile(data_returns, 0.75), color="0.5", linestyle=":", label="data, 75th percentile")
    draw_line(data_returns.max(), color="0.5", linestyle="--", label="data, best")

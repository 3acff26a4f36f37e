"""Pictures of an evaluation, drawn without a display and without matplotlib's global state."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ring_rl.agent.evaluation.protocol import Result
from ring_rl.atomic_file import atomic_file
from ring_rl.training.statistics import estimate
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
        estimates = [estimate(column) for column in result.samples.T]
        means = np.array([each.mean for each in estimates])
        margins = np.array([each.high - each.mean for each in estimates])
        # Side by side rather than on top of one another.
        x = np.arange(1, len(means) + 1) + 0.05 * (number - (len(results) - 1) / 2)
        axes.errorbar(x, means, yerr=margins, marker="o", capsize=3, label=result.label)
    _mark_data(axes.axhline, data_returns)
    axes.set_xticks(range(1, results[0].returns.shape[1] + 1))
    axes.set_xlabel("episode in context")
    axes.set_ylabel("return")
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    _save(figure, path)


def plot_returns_in_data(
    results: Sequence[Result], data_returns: Float64[np.ndarray, " E"], path: Path, *, title: str
) -> None:
    """A histogram of the data's returns, with every agent's mean and its 95% interval marked."""
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    counts, _, _ = axes.hist(data_returns, bins=40, color="0.8", label=f"data, {len(data_returns)} episodes")
    for number, result in enumerate(results):
        mean, color = result.scores.mean, f"C{number}"
        axes.axvline(mean.mean, color=color, label=f"{result.label}: {mean}")
        if mean.seeds > 1:
            axes.axvspan(mean.low, mean.high, color=color, alpha=0.15)
    _mark_data(axes.axvline, data_returns)
    axes.set_xlabel("return of an episode")
    axes.set_ylabel("episodes of the data")
    axes.set_ylim(0, 1.05 * np.max(counts))
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    _save(figure, path)


def _mark_data(draw_line, data_returns: np.ndarray) -> None:
    draw_line(np.quantile(data_returns, 0.75), color="0.5", linestyle=":", label="data, 75th percentile")
    draw_line(data_returns.max(), color="0.5", linestyle="--", label="data, best")


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path, overwrite=True) as temporary:
        figure.savefig(temporary, dpi=130)

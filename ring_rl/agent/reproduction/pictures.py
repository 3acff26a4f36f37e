"""The pictures of a comparison, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ring_rl.agent.evaluation.aggregate import Aggregate
from ring_rl.agent.evaluation.profiles import performance_profile, plot_performance_profiles, shared_thresholds
from ring_rl.agent.reproduction.comparison import Comparison
from ring_rl.training.plots import write_figure
from ring_rl.training.statistics import Estimate, estimate

__all__ = ["plot_by_episode", "plot_profiles", "plot_scores"]

_THRESHOLDS = 201


def plot_scores(comparison: Comparison, aggregates: Mapping[str, Aggregate], path: Path) -> None:
    """Normalised scores by task, a point a training seed; at the right all tasks with their bootstrap intervals."""
    variants, tasks = list(comparison.preset.variants), comparison.tasks
    figure = Figure(figsize=(1.6 * (len(tasks) + 1) + 1, 4.4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(variants)
    for number, variant in enumerate(variants):
        offset = (number - (len(variants) - 1) / 2) * width
        for index, each in enumerate(tasks.values()):
            if variant not in each.carried:
                continue
            scores = each.scores(variant)
            axes.bar(index + offset, scores.mean(), 0.9 * width, color=f"C{number}", alpha=0.45)
            axes.plot(np.full(len(scores), index + offset), scores, ".", color=f"C{number}", markersize=5)
        if variant in aggregates:
            total = aggregates[variant].mean
            reach = np.nan_to_num([[total.value - total.low], [total.high - total.value]])
            x = len(tasks) + offset
            axes.bar(x, total.value, 0.9 * width, color=f"C{number}", label=comparison.label(variant))
            axes.errorbar(x, total.value, yerr=reach, color="0.2", capsize=2)
    axes.axvline(len(tasks) - 0.5, color="0.7", linewidth=0.8)
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set_xticks(
        range(len(tasks) + 1),
        [*(task.replace("_", "\n", 1) for task in tasks), f"{comparison.title_of(tasks)}\n(mean)"],
    )
    axes.set_ylabel("score: 0 random, 100 best of the data")
    axes.set_title(f"mean of {comparison.preset.protocol.episodes} episodes; points are training seeds")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(4, len(variants)), fontsize="small")
    write_figure(figure, path)


def plot_by_episode(comparison: Comparison, path: Path) -> None:
    """Returns against the in-context index, a panel a task: context carried, and cleared as a dashed line.

    Initial states differ from index to index and are the same for every agent: what the context does is the difference
    between a full line and the dashed one of its colour.
    """
    tasks = comparison.tasks
    columns = min(3, len(tasks))
    figure = Figure(figsize=(3.6 * columns, 2.7 * math.ceil(len(tasks) / columns) + 0.6), layout="constrained")
    for panel, (task, each) in enumerate(tasks.items()):
        axes = figure.add_subplot(math.ceil(len(tasks) / columns), columns, panel + 1)
        for number, variant in enumerate(comparison.preset.variants):
            for results, style in ((each.carried, "-"), (each.cleared, "--")):
                if variant in results:
                    means = [_of_episode(results[variant].returns[:, :, i]) for i in range(each.chance.shape[1])]
                    label = comparison.label(variant) if panel == 0 and style == "-" else None
                    x = np.arange(1, len(means) + 1)
                    axes.plot(x, [m.mean for m in means], style, color=f"C{number}", label=label, linewidth=1.3)
        axes.axhline(each.scale.random, color="0.5", linestyle=":", linewidth=1)
        axes.set_title(task, fontsize="medium")
        axes.set_xlabel("episode in context")
        axes.set_ylabel("return")
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(4, len(comparison.preset.variants)), fontsize="small")
    write_figure(figure, path)


def plot_profiles(comparison: Comparison, path: Path, *, resamples: int) -> None:
    """Performance profiles over all tasks, for variants that have them all."""
    scores = {
        comparison.label(name): {task: each.scores(name) for task, each in comparison.tasks.items()}
        for name in comparison.complete_variants()
    }
    if not scores:
        return
    thresholds = shared_thresholds(scores, count=_THRESHOLDS)
    plot_performance_profiles(
        {label: performance_profile(tasks, thresholds, resamples=resamples, seed=0) for label, tasks in scores.items()},
        path,
        title=f"{len(comparison.tasks)} tasks, {len(comparison.preset.seeds)} training seeds",
        score_label="normalised score",
        run_label="training runs",
    )


def _of_episode(returns: np.ndarray) -> Estimate:
    return estimate(returns.mean(axis=1))

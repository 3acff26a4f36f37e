"""Performance profiles: how large a part of an agent's runs reaches each score (arXiv:2108.13264)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ring_rl.agent.evaluation.aggregate import TaskScores, resample_indices
from ring_rl.training.plots import write_figure
from ring_rl.training.statistics import CONFIDENCE
from ring_rl.typing import Float64

__all__ = ["PerformanceProfile", "performance_profile", "plot_performance_profiles", "shared_thresholds"]


@dataclasses.dataclass(frozen=True, eq=False)
class PerformanceProfile:
    """fraction[i] = part of the runs, over all tasks, with a score above threshold[i]; with pointwise 95% bands."""

    thresholds: Float64[np.ndarray, " thresholds"]
    fractions: Float64[np.ndarray, " thresholds"]
    low: Float64[np.ndarray, " thresholds"]
    high: Float64[np.ndarray, " thresholds"]


def shared_thresholds(scores: Mapping[str, TaskScores], *, count: int) -> Float64[np.ndarray, " count"]:
    """`count` thresholds from just below the lowest score of any agent to the highest; scores[agent][task]."""
    values = np.concatenate([np.asarray(each) for tasks in scores.values() for each in tasks.values()])
    margin = max(0.02 * float(np.ptp(values)), 1e-9)
    return np.linspace(values.min() - margin, values.max(), count)


def performance_profile(
    scores: TaskScores, thresholds: Float64[np.ndarray, " thresholds"], *, resamples: int, seed: int
) -> PerformanceProfile:
    """The profile of one agent; runs are resampled within each task for the bands.

    Args:
        scores: One score a training seed for every task, on a scale that tasks share.
        thresholds: Where the profile is taken.
        resamples: Bootstrap resamples.
        seed: Of the resampling.

    Raises:
        ValueError: What `aggregate` raises. With a single run a task the bands have no width.
    """
    runs, indices = resample_indices(scores, resamples=resamples, seed=seed)
    resampled = np.concatenate([values[chosen] for values, chosen in zip(runs, indices, strict=True)], axis=1)
    together = np.concatenate(runs)
    # One threshold at a time: all at once would be resamples x runs x thresholds booleans.
    above = np.array([np.mean(resampled > threshold, axis=1) for threshold in thresholds])
    low, high = np.quantile(above, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2], axis=1)
    fractions = np.mean(together > np.asarray(thresholds)[:, None], axis=1)
    return PerformanceProfile(np.asarray(thresholds, np.float64), fractions, low, high)


def plot_performance_profiles(
    profiles: Mapping[str, PerformanceProfile], path: Path, *, title: str, score_label: str, run_label: str
) -> None:
    """A line an agent with its band; one that lies above another everywhere is better at every quantile."""
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for number, (label, profile) in enumerate(profiles.items()):
        axes.step(profile.thresholds, profile.fractions, where="post", color=f"C{number}", label=label)
        axes.fill_between(profile.thresholds, profile.low, profile.high, step="post", color=f"C{number}", alpha=0.15)
    axes.set_xlabel(f"{score_label} τ")
    axes.set_ylabel(f"part of {run_label} above τ")
    axes.set_ylim(-0.02, 1.02)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    write_figure(figure, path)

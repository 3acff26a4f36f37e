"""What a comparison settles: the paper's orderings, and improvement in context."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from scipy import stats

from ring_rl.agent.evaluation.aggregate import Interval, difference
from ring_rl.agent.evaluation.in_context import (
    PairedTest,
    holm_adjusted,
    in_context_differences,
    in_context_test,
    paired_test_over_tasks,
)
from ring_rl.agent.reproduction.comparison import Comparison
from ring_rl.agent.reproduction.published import PublishedTable
from ring_rl.training.statistics import CONFIDENCE
from ring_rl.typing import Float64

__all__ = ["Verdict", "in_context_table", "ordering_table", "verdict_of", "welch_interval"]

Verdict = Literal["holds", "reversed", "not settled"]


def verdict_of(interval: Interval) -> Verdict:
    """Whether the interval of a difference lies above 0, below it, or around it (as one without bounds does)."""
    if interval.low > 0:
        return "holds"
    return "reversed" if interval.high < 0 else "not settled"


def welch_interval(first: Float64[np.ndarray, " n"], second: Float64[np.ndarray, " m"]) -> Interval:
    """mean(first) - mean(second) with Welch's 95% interval, NaN bounds where either has a single value or none varies.

    t's degrees of freedom are (a + b)² / (a² / (n - 1) + b² / (m - 1)), a and b the squared standard errors.
    """
    value = float(np.mean(first) - np.mean(second))
    if min(len(first), len(second)) < 2:
        return Interval(value, float("nan"), float("nan"))
    a, b = (np.var(each, ddof=1) / len(each) for each in (first, second))
    if a + b == 0:
        return Interval(value, float("nan"), float("nan"))
    freedom = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    half_width = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom) * np.sqrt(a + b))
    return Interval(value, value - half_width, value + half_width)


def ordering_table(
    comparison: Comparison, published: PublishedTable, *, resamples: int
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """The paper's orderings as a table, its header first, and as plain JSON.

    A difference is one of normalised scores, mean of episodes. Over all tasks training seeds are resampled within each
    task, both agents apart, for a seed of one has nothing in common with the same seed of another. On a single task
    a handful of seeds is too few to resample (of 3 and 3, one interval in eight would miss the truth): there it is
    Welch's. None of the intervals is adjusted for the number of verdicts; that on all tasks is the one to look at.
    """
    rows = [["ordering", "task", "the paper's difference", "difference here, normalised", "verdict"]]
    verdicts: list[dict[str, Any]] = []
    for ordering in comparison.preset.orderings:
        better, worse = ordering.better, ordering.worse
        name = f"{comparison.label(better)} > {comparison.label(worse)}"
        tasks = {
            task: each for task, each in comparison.tasks.items() if better in each.carried and worse in each.carried
        }
        groups = {task: {task: each} for task, each in tasks.items()}
        if len(tasks) > 1:
            groups[comparison.title_of(tasks)] = tasks
        for group, members in groups.items():
            first, second = (
                {task: each.scores(variant) for task, each in members.items()} for variant in (better, worse)
            )
            if len(members) == 1:
                interval = welch_interval(first[group], second[group])
            else:
                interval = difference(first, second, statistic="mean", paired=False, resamples=resamples, seed=0)
            columns = [comparison.preset.variants[each].paper_column for each in (better, worse)]
            papers = [[published.of(task, column) for column in columns] for task in members]
            known = [a - b for a, b in papers if a is not None and b is not None]
            paper = f"{np.mean(known):+.2f}" if len(known) == len(papers) else ""
            verdict = verdict_of(interval)
            rows.append([name, group, paper, f"{interval:+.1f}", verdict])
            verdicts.append(
                {
                    "better": better,
                    "worse": worse,
                    "task": group,
                    "paper": float(np.mean(known)) if paper else None,
                    "difference": [interval.value, interval.low, interval.high],
                    "verdict": verdict,
                }
            )
    return rows, verdicts


def in_context_table(comparison: Comparison, *, flips: int) -> list[list[str]] | None:
    """What the context is worth from the second episode on, by task and over all; None where nothing can be paired.

    A carried context also tells an agent by its index that an episode is not the first, and one that was trained on
    ascending chains imitates better episodes then, whatever it read. To one trained on shuffled chains the index says
    nothing of quality: what carrying is worth to it, is worth to it by what it read.
    """
    config = comparison.preset.in_context
    if config is None or comparison.preset.protocol.episodes < 2:
        return None
    carried, shuffled = config.carried, config.shuffled
    names = {
        "carried - cleared": f"{comparison.label(carried)}: context carried - cleared",
        "shuffled, carried - cleared": f"{comparison.label(shuffled)}: context carried - cleared",
        "ascending - shuffled": f"{comparison.label(carried)} - {comparison.label(shuffled)}, both carried",
    }
    rows = [["comparison", "task", "difference in return", "normalised", "units", "p", "p, Holm over tasks"]]
    for kind, name in names.items():
        pairs = _pairs(comparison, kind, carried, shuffled)
        if not pairs:
            continue
        acting = shuffled if kind.startswith("shuffled") else carried
        held = comparison.tasks[next(iter(pairs))].carried[acting].context_episodes
        tests = {
            task: in_context_test(*pair, flips=flips, seed=0, context_episodes=held).main
            for task, pair in pairs.items()
        }
        adjusted = holm_adjusted([test.p_value for test in tests.values()])
        for (task, test), holm in zip(tests.items(), adjusted, strict=True):
            scale = comparison.tasks[task].scale
            estimate = test.difference
            low, middle, high = (float(scale.differences(x)) for x in (estimate.low, estimate.mean, estimate.high))
            normalised = f"{Interval(middle, low, high):+.1f}"
            rows.append(
                [name, task, f"{estimate:+.1f}", normalised, _units(test), f"{test.p_value:.3f}", f"{holm:.3f}"]
            )
        if len(pairs) > 1:
            over = paired_test_over_tasks(
                {
                    task: comparison.tasks[task].scale.differences(in_context_differences(*pair, context_episodes=held))
                    for task, pair in pairs.items()
                },
                flips=flips,
                seed=0,
            )
            rows.append(
                [
                    name,
                    comparison.title_of(pairs),
                    "",
                    f"{over.difference:+.1f}",
                    _units(over),
                    f"{over.p_value:.3f}",
                    "",
                ]
            )
    return rows if len(rows) > 1 else None


def _pairs(
    comparison: Comparison, kind: str, carried: str, shuffled: str
) -> dict[str, tuple[Float64[np.ndarray, "seeds rows episodes"], Float64[np.ndarray, "seeds rows episodes"]]]:
    pairs = {}
    for task, each in comparison.tasks.items():
        first, second = {
            "carried - cleared": (each.carried.get(carried), each.cleared.get(carried)),
            "shuffled, carried - cleared": (each.carried.get(shuffled), each.cleared.get(shuffled)),
            "ascending - shuffled": (each.carried.get(carried), each.carried.get(shuffled)),
        }[kind]
        if first is not None and second is not None and first.seeds == second.seeds:
            pairs[task] = first.returns, second.returns
    return pairs


def _units(test: PairedTest) -> str:
    return f"{test.difference.seeds} {test.unit} (p at least {test.smallest_p_value:.3g})"

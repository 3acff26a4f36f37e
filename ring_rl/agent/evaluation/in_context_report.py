"""The tests of `in_context` that an evaluation calls for, as a table, as JSON and as a picture."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ring_rl.agent.evaluation.in_context import InContextTest, holm_adjusted, in_context_test
from ring_rl.agent.evaluation.normalise import ReturnScale
from ring_rl.agent.evaluation.results import Context, Result
from ring_rl.training.plots import write_figure
from ring_rl.training.statistics import Estimate

__all__ = ["in_context_rows", "in_context_summary", "in_context_tests", "plot_in_context"]


def in_context_tests(
    results: Sequence[Result], shuffled: Mapping[str, str], *, flips: int, seed: int
) -> dict[str, InContextTest]:
    """What is paired in these results, tested, by the name of the comparison.

    Of every agent: context carried - context cleared. Of one that has a counterpart trained on shuffled chains: the two
    with their context carried, and the two worths of context.

    Args:
        results: All of one target.
        shuffled: agent -> the agent that was trained like it, on shuffled chains.
        flips: As in `in_context_test`.
        seed: As in `in_context_test`.
    """
    if not results or results[0].returns.shape[2] < 2:
        return {}
    # Contexts of one episode have nothing to carry.
    results = [each for each in results if each.context_episodes != 1]
    by_condition: dict[tuple[str, Context], Result] = {(each.label, each.context): each for each in results}
    tests = {}

    def returns(label: str, context: Context, seeds: Sequence[int]) -> np.ndarray:
        result = by_condition[label, context]
        return np.array([result.returns[result.seeds.index(each)] for each in seeds])

    def add(name: str, label: str, first: np.ndarray, second: np.ndarray) -> None:
        fitting = by_condition[label, "carried"].context_episodes
        tests[name] = in_context_test(first, second, flips=flips, seed=seed, context_episodes=fitting)

    for label in dict.fromkeys(each.label for each in results):
        if (label, "carried") in by_condition and (label, "cleared") in by_condition:
            seeds = by_condition[label, "carried"].seeds
            add(
                f"{label}: carried - cleared", label, returns(label, "carried", seeds), returns(label, "cleared", seeds)
            )
    for label, other in shuffled.items():
        if (label, "carried") not in by_condition or (other, "carried") not in by_condition:
            continue
        # Training seeds that both have, for only those are pairs.
        others = by_condition[other, "carried"].seeds
        seeds = [each for each in by_condition[label, "carried"].seeds if each in others]
        if not seeds:
            continue
        add(f"{label} - {other}, carried", label, returns(label, "carried", seeds), returns(other, "carried", seeds))
        if (label, "cleared") in by_condition and (other, "cleared") in by_condition:
            worth, worth_of_other = (
                returns(each, "carried", seeds) - returns(each, "cleared", seeds) for each in (label, other)
            )
            add(f"{label} - {other}, carried - cleared", label, worth, worth_of_other)
    return tests


def in_context_rows(tests: Mapping[str, InContextTest], scale: ReturnScale | None) -> list[list[str]]:
    """A table of the tests, its header first; p-values of the table are adjusted for their number by Holm's rule."""
    rows = [["comparison", "difference in return", "p", "p, Holm", "units", "p over rows of these agents"]]
    if scale:
        rows[0].insert(2, "normalised")
    adjusted = holm_adjusted([each.main.p_value for each in tests.values()])
    for (name, test), holm in zip(tests.items(), adjusted, strict=True):
        main = test.main
        units = f"{main.difference.seeds} {main.unit} (p at least {_p(main.smallest_p_value)})"
        row = [name, f"{main.difference:z.1f}", _p(main.p_value), _p(holm), units, _p(test.over_rows.p_value)]
        if scale:
            mean, low, high = (
                float(scale.differences(each))
                for each in (main.difference.mean, main.difference.low, main.difference.high)
            )
            row.insert(2, f"{Estimate(mean, low, high, main.difference.seeds):z.1f}")
        rows.append(row)
    return rows


def in_context_summary(tests: Mapping[str, InContextTest]) -> dict[str, Any]:
    """The tests as plain JSON."""
    adjusted = holm_adjusted([each.main.p_value for each in tests.values()])
    return {
        name: {**dataclasses.asdict(test), "unit": test.main.unit, "p_value": test.main.p_value, "p_value_holm": holm}
        for (name, test), holm in zip(tests.items(), adjusted, strict=True)
    }


def plot_in_context(tests: Mapping[str, InContextTest], path: Path, *, title: str) -> None:
    """The paired difference at every in-context index: above 0 the first condition is better."""
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0.0, color="0.6")
    for number, (name, test) in enumerate(tests.items()):
        means = np.array([each.mean for each in test.by_episode])
        margins = np.nan_to_num([each.high - each.mean for each in test.by_episode])
        x = np.arange(1, len(means) + 1) + 0.05 * (number - (len(tests) - 1) / 2)
        axes.errorbar(x, means, yerr=margins, marker="o", capsize=3, label=f"{name} (p = {_p(test.main.p_value)})")
    axes.set_xticks(range(1, len(next(iter(tests.values())).by_episode) + 1))
    axes.set_xlabel("episode in context")
    axes.set_ylabel("difference in return, same resets")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=1, fontsize="small")
    write_figure(figure, path)


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else f"{value:.0e}"

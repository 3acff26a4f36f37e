"""Does an agent improve in context? A paired test on the same resets.

A rising curve of return over the in-context index answers nothing by itself: each index has resets of its own, and an
agent that imitates chains sorted by return may rise by the clock. What the context is worth is the difference between
two conditions that meet the same reset at every (row, index):

    d = mean over episodes 2 .. n of (return with the context carried - return with it cleared before each episode)

The first episode has no context in either condition; nor have those with which a full context began anew, which are
left out, too. The same statistic between an agent trained on ascending chains and one trained on shuffled ones tells
what the order of its training data is worth.

A carried context also holds the index of the episode, and clearing it sets that back: an agent trained on ascending
chains may gain by this clock alone. To one trained on shuffled chains the index says nothing of quality, so what
carrying is worth to it comes from what it read.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from ring_rl.training.statistics import Estimate, estimate
from ring_rl.typing import Float64, Int

__all__ = [
    "InContextTest",
    "PairedTest",
    "episode_differences",
    "holm_adjusted",
    "in_context_differences",
    "in_context_test",
    "paired_test_over_tasks",
    "sign_flip_p_value",
]

_MOST_EXACT_UNITS = 16
_FLIPS_AT_ONCE = 4096

Unit = Literal["training seeds", "environment rows", "runs of all tasks"]


@dataclasses.dataclass(frozen=True)
class PairedTest:
    """A mean difference between two conditions, over units that are independent of one another.

    Attributes:
        difference: The mean over units, with Student's 95% interval.
        p_value: Two-sided, by flipping the signs of the units' differences.
        smallest_p_value: What `p_value` could be at least with so few units: 2^(1 - units), where all of them agree.
        unit: What a unit is.
    """

    difference: Estimate
    p_value: float
    smallest_p_value: float
    unit: Unit


@dataclasses.dataclass(frozen=True)
class InContextTest:
    """What one condition gains over another from the second episode on.

    Attributes:
        over_seeds: Units are training seeds, averaged over rows: holds for other trainings of this agent. None where
            there is a single one.
        over_rows: Units are rows, averaged over training seeds: holds for other resets, of these very agents.
        by_episode: The difference at every in-context index, over the units of `main`.
    """

    over_seeds: PairedTest | None
    over_rows: PairedTest
    by_episode: tuple[Estimate, ...]

    @property
    def main(self) -> PairedTest:
        """The test over training seeds where there are several, else that over rows."""
        return self.over_rows if self.over_seeds is None else self.over_seeds


def episode_differences(
    first: Float64[np.ndarray, "seeds rows episodes"], second: Float64[np.ndarray, "seeds rows episodes"]
) -> Float64[np.ndarray, "seeds rows episodes"]:
    """first - second, on the same resets.

    Raises:
        ValueError: The two are not paired, or there is no second episode.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim != 3 or first.shape != second.shape:
        raise ValueError(
            f"paired returns must both be [seeds, rows, episodes], got shapes {first.shape} and {second.shape}; "
            "evaluate the same training seeds on the same resets"
        )
    if first.shape[2] < 2:
        raise ValueError("the first episode has no context; evaluate at least 2 episodes in a row")
    return first - second


def in_context_differences(
    first: Float64[np.ndarray, "seeds rows episodes"],
    second: Float64[np.ndarray, "seeds rows episodes"],
    *,
    context_episodes: int | None = None,
) -> Float64[np.ndarray, "seeds rows"]:
    """The mean of first - second over the episodes with a context: all but every `context_episodes`-th from the first.

    Raises:
        ValueError: What `episode_differences` raises, or contexts of a single episode.
    """
    differences_SRE = episode_differences(first, second)
    return differences_SRE[:, :, _with_context(differences_SRE.shape[2], context_episodes)].mean(axis=2)


def in_context_test(
    first: Float64[np.ndarray, "seeds rows episodes"],
    second: Float64[np.ndarray, "seeds rows episodes"],
    *,
    flips: int,
    seed: int,
    context_episodes: int | None = None,
) -> InContextTest:
    """Tests whether `first` is better than `second` from the second episode on.

    Rows of several training seeds share their resets, so a row counts once, whatever the number of seeds.

    Args:
        first: Returns of the one condition, such as context carried.
        second: Returns of the other on the same resets, such as context cleared.
        flips: Random sign flips where there are too many units (more than 16) to try all.
        seed: Of those.
        context_episodes: Episodes after which a context was full and began anew; None: it never did.

    Raises:
        ValueError: The returns are not paired, no episode has a context, or there are fewer than 2 rows.
    """
    differences_SRE = episode_differences(first, second)
    differences_SR = in_context_differences(first, second, context_episodes=context_episodes)
    if differences_SR.shape[1] < 2:
        raise ValueError("a paired test over rows needs at least 2 of them; raise protocol.rows")
    several = len(differences_SR) > 1
    test = lambda values, unit: _paired_test(values, unit, flips=flips, seed=seed)  # noqa: E731
    by_unit = differences_SRE.mean(axis=1) if several else differences_SRE[0]
    return InContextTest(
        over_seeds=test(differences_SR.mean(axis=1), "training seeds") if several else None,
        over_rows=test(differences_SR.mean(axis=0), "environment rows"),
        by_episode=tuple(map(estimate, by_unit.T)),
    )


def paired_test_over_tasks(
    differences: Mapping[str, Float64[np.ndarray, "seeds rows"]], *, flips: int, seed: int
) -> PairedTest:
    """One test over all tasks: units are training runs, of every task and seed, each averaged over its rows.

    Args:
        differences: `in_context_differences` of each task, on a scale that tasks share (`ReturnScale.differences`).
        flips: As in `in_context_test`.
        seed: As in `in_context_test`.

    Raises:
        ValueError: There are fewer than 2 runs.
    """
    runs = [np.asarray(each, np.float64).mean(axis=1) for each in differences.values()]
    units = np.concatenate(runs) if runs else np.zeros(0)
    if len(units) < 2:
        raise ValueError(f"a paired test over runs needs at least 2 of them, got {len(units)}")
    return _paired_test(units, "runs of all tasks", flips=flips, seed=seed)


def sign_flip_p_value(differences: Float64[np.ndarray, " units"], *, flips: int, seed: int) -> float:
    """How likely a mean at least this far from 0 is, if each unit's difference is as likely to have either sign.

    Two-sided. Exact, over all 2^units signs, for at most 16 units; else by `flips` random ones, and then never below
    1 / (flips + 1).
    """
    differences = np.asarray(differences, np.float64)
    units = len(differences)
    observed = abs(differences.sum())
    # Sums of the same numbers in another order are equal up to rounding only.
    at_least = observed - 1e-9 * np.abs(differences).sum()
    if units <= _MOST_EXACT_UNITS:
        # A pattern and its opposite are equally far from 0: the first unit keeps its sign.
        patterns = np.arange(2 ** max(units - 1, 0))[:, None] >> np.arange(units - 1)
        sums = differences[0] + (1 - 2 * (patterns & 1)) @ differences[1:]
        return float(np.mean(np.abs(sums) >= at_least))
    generator, extreme = np.random.default_rng(seed), 0
    for start in range(0, flips, _FLIPS_AT_ONCE):
        signs = 1 - 2 * generator.integers(0, 2, size=(min(_FLIPS_AT_ONCE, flips - start), units), dtype=np.int8)
        extreme += int(np.count_nonzero(np.abs(signs @ differences) >= at_least))
    return (1 + extreme) / (1 + flips)


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, so that those below α are all true with probability 1 - α (Holm 1979).

        p'_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)),   p_(1) <= ... <= p_(m)

    Whatever the dependence between the tests.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(np.minimum(1.0, (len(p) - np.arange(len(p))) * p[order]))
    adjusted = np.empty(len(p))
    adjusted[order] = stepped
    return adjusted.tolist()


def _with_context(episodes: int, context_episodes: int | None) -> Int[np.ndarray, " n"]:
    """The indices of episodes that had others before them in their context."""
    if context_episodes is not None and context_episodes < 2:
        raise ValueError(f"contexts of {context_episodes} episode hold nothing to learn from; there is nothing to test")
    index = np.arange(episodes)
    return index[index % (context_episodes or episodes) > 0]


def _paired_test(values: Float64[np.ndarray, " units"], unit: Unit, *, flips: int, seed: int) -> PairedTest:
    if flips < 1:
        raise ValueError(f"flips must be at least 1, got {flips}")
    smallest = 2.0 ** (1 - len(values)) if len(values) <= _MOST_EXACT_UNITS else 1 / (1 + flips)
    return PairedTest(estimate(values), sign_flip_p_value(values, flips=flips, seed=seed), smallest, unit)

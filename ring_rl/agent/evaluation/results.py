"""The returns of an evaluation, in memory and as CSV, and the table that is made of them."""

import csv
import dataclasses
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ring_rl.agent.evaluation.normalise import ReturnScale
from ring_rl.agent.evaluation.statistics import RULES, Rule, SampleKind, Scores, independent_samples, score
from ring_rl.atomic_file import write_whole
from ring_rl.typing import Float64, Int

__all__ = ["RANDOM_POLICY", "Context", "Result", "read_returns", "return_scale", "table_rows", "write_returns"]

Context = Literal["carried", "cleared", "none"]
CONTEXTS: tuple[Context, ...] = ("carried", "cleared", "none")
RANDOM_POLICY = "uniformly random"
_COLUMNS = (
    "agent",
    "training_seed",
    "target_fraction",
    "headline",
    "context",
    "row",
    "episode",
    "reset_seed",
    "return",
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """What one agent reached under one condition.

    Attributes:
        label: The agent.
        context: "carried" over from episode to episode, "cleared" before each, or "none" that could be.
        target_fraction: The return asked for, as a fraction of the data's best; None if the agent is told none.
        headline: Whether this target is the one whose scores count.
        seeds: The training seeds.
        returns: One entry a training seed, row and episode.
        context_episodes: Episodes that fit into one context, after which it began anew; None: all of them.
    """

    label: str
    context: Context
    target_fraction: float | None
    headline: bool
    seeds: tuple[int, ...]
    returns: Float64[np.ndarray, "seeds rows episodes"]
    context_episodes: int | None = None

    def __post_init__(self) -> None:
        if self.returns.ndim != 3 or len(self.returns) != len(self.seeds):
            raise ValueError(
                f"returns of {len(self.seeds)} training seeds must be [seeds, rows, episodes], got shape "
                f"{self.returns.shape}"
            )

    @property
    def name(self) -> str:
        """Agent and condition, for tables."""
        cleared = ", context cleared" if self.context == "cleared" else ""
        return f"{self.label}{cleared}" + ("" if self.headline else f", target {self.target_fraction:g} of best")

    @property
    def scores(self) -> Scores:
        """Over training seeds where there are several (each one's average counts once), else over rows."""
        return score(self.returns)

    @property
    def sample_kind(self) -> SampleKind:
        """What a sample is."""
        return independent_samples(self.returns, "mean")[1]

    def samples(self, rule: Rule) -> Float64[np.ndarray, " samples"]:
        """Independent samples: training seeds, averaged over their rows, where there are several; else rows."""
        return independent_samples(self.returns, rule)[0]


def return_scale(results: Sequence[Result], data_returns: Float64[np.ndarray, " E"]) -> ReturnScale | None:
    """0 at the random policy's mean return on the same resets, 100 at the data's best; None without that policy.

    Raises:
        ValueError: The data are no better than chance.
    """
    random = [result for result in results if result.label == RANDOM_POLICY]
    if not random:
        return None
    return ReturnScale(random=float(random[0].returns.mean()), best=float(data_returns.max()))


def write_returns(results: Sequence[Result], reset_seeds: Int[np.ndarray, "rows episodes"], path: Path) -> None:
    """Every single return as CSV; `read_returns` reads it back."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for result in results:
        fraction = "" if result.target_fraction is None else f"{result.target_fraction:g}"
        for (seed, row, episode), value in np.ndenumerate(result.returns):
            condition = (result.label, result.seeds[seed], fraction, int(result.headline), result.context)
            writer.writerow([*condition, row, episode, reset_seeds[row, episode], f"{value:.6g}"])
    write_whole(path, text.getvalue())


def read_returns(path: Path) -> list[Result]:
    """The results in a `returns.csv`, in the order in which they were written.

    Files of before targets were swept name the condition in the agent's name only; they are read as they are.

    Raises:
        ValueError: A return is missing or there twice.
    """
    found: dict[tuple[str, str, str, str], dict[int, dict[tuple[int, int], float]]]
    found = defaultdict(lambda: defaultdict(dict))
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            context, fraction = line.get("context", "none"), line.get("target_fraction", "")
            cells = found[line["agent"], context, fraction, line.get("headline", "1")][int(line["training_seed"])]
            at = int(line["row"]), int(line["episode"])
            if at in cells:
                raise ValueError(f"{path} holds row {at[0]}, episode {at[1]} of {line['agent']} twice; evaluate again")
            cells[at] = float(line["return"])
    results = []
    for (label, context, fraction, headline), by_seed in found.items():
        rows, episodes = (1 + max(at[axis] for cells in by_seed.values() for at in cells) for axis in (0, 1))
        returns = np.full((len(by_seed), rows, episodes), np.nan)
        for index, cells in enumerate(by_seed.values()):
            for at, value in cells.items():
                returns[index, *at] = value
        if np.isnan(returns).any():
            raise ValueError(f"{path} lacks returns of {label}; evaluate again")
        results.append(
            Result(
                label=label,
                context=next(each for each in CONTEXTS if each == context),
                target_fraction=float(fraction) if fraction else None,
                headline=headline == "1",
                seeds=tuple(by_seed),
                returns=returns,
            )
        )
    return results


def table_rows(
    results: Sequence[Result], data_returns: Float64[np.ndarray, " E"], scale: ReturnScale | None
) -> list[list[str]]:
    """The header and one row an agent and condition, then the data, as text; raw returns, normalised ones beside."""
    names = ("mean of episodes", "last episode", "best episode")
    rows = [["agent", *names, *(f"{name}, normalised" for name in names if scale), "samples"]]
    # Conditions whose scores count come first.
    for result in sorted(results, key=lambda result: not result.headline):
        estimates = [getattr(result.scores, rule) for rule in RULES]
        normalised = [f"{scale.estimate(each):z.1f}" for each in estimates] if scale else []
        rows.append([result.name, *map(str, estimates), *normalised, f"{estimates[0].seeds} {result.sample_kind}"])
    mean, p75, best = data_returns.mean(), np.quantile(data_returns, 0.75), data_returns.max()
    for name, first, last in (
        (f"data ({len(data_returns)} episodes)", mean, best),
        ("data, 75th percentile", p75, None),
    ):
        cells = [f"{first:.0f}", "", "" if last is None else f"{last:.0f}"]
        if scale:
            cells += [f"{scale.scores(first):z.1f}", "", "" if last is None else f"{scale.scores(last):z.1f}"]
        rows.append([name, *cells, ""])
    return rows

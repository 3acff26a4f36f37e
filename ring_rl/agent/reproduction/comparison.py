"""A comparison's evaluations, read back: returns of every task, variant and training seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from ring_rl.agent.evaluation.normalise import ReturnScale
from ring_rl.agent.evaluation.results import Context, Result
from ring_rl.agent.evaluation.statistics import Rule, episode_scores
from ring_rl.agent.reproduction.evaluated import EvaluatedCell, read_cell, read_chance
from ring_rl.agent.reproduction.plan import Cell, PresetConfig
from ring_rl.typing import Float64

__all__ = ["HEADLINE", "Comparison", "TaskResults", "read_comparison"]

# The score that intervals and tests are about; the paper's own is "best".
HEADLINE: Rule = "mean"


@dataclasses.dataclass(frozen=True, eq=False)
class TaskResults:
    """All that was measured on one task.

    Attributes:
        chance: Returns of uniformly random actions.
        scale: 0 at chance's mean, 100 at the data's best.
        data_mean: The mean return of the data.
        carried: variant -> results over its seeds.
        cleared: The same with contexts emptied before every episode, for variants that have one.
    """

    chance: Float64[np.ndarray, "rows episodes"]
    scale: ReturnScale
    data_mean: float
    carried: Mapping[str, Result]
    cleared: Mapping[str, Result]

    def scores(self, variant: str, rule: Rule = HEADLINE) -> Float64[np.ndarray, " seeds"]:
        """Normalised, one a training seed."""
        return self.scale.scores(episode_scores(self.carried[variant].returns, rule).mean(axis=1))


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """A preset and what came of it."""

    preset: PresetConfig
    tasks: Mapping[str, TaskResults]

    def label(self, variant: str) -> str:
        """What tables call it."""
        return self.preset.variants[variant].label

    def title_of(self, tasks: Collection[str]) -> str:
        """What tables call so many tasks together; "all tasks" only if none of the preset's is missing."""
        count, of = len(tasks), len(self.preset.tasks)
        return "all tasks" if count == of else f"{count} of {of} tasks"

    def remark(self, result: Result) -> str:
        """What a table adds to a result that lacks training seeds; nothing for one that is complete."""
        count, of = len(result.seeds), len(self.preset.seeds)
        return "" if count == of else f" ({count} of {of} seeds)"

    def complete_variants(self) -> list[str]:
        """Those with a result on every task, in the preset's order."""
        return [each for each in self.preset.variants if all(each in task.carried for task in self.tasks.values())]


def read_comparison(preset: PresetConfig, cells: Sequence[Cell], chance: Mapping[str, Path]) -> Comparison:
    """Reads the evaluations of these cells; what is not among them is left out.

    Raises:
        ValueError: Cells of one task were trained on different data.
        FileNotFoundError: A cell, or chance on its task, is not evaluated.
    """
    tasks = {}
    for task in preset.tasks:
        evaluated = {(cell.variant, cell.seed): read_cell(cell.evaluation) for cell in cells if cell.task == task}
        if not evaluated:
            continue
        data = {(each.data_best, each.data_mean) for each in evaluated.values()}
        if len(data) > 1:
            raise ValueError(f"cells of {task} were trained on different data; train them again in another runs folder")
        [(best, mean)] = data
        returns = read_chance(chance[task])
        by_variant: dict[str, dict[int, EvaluatedCell]] = {}
        for (variant, seed), each in evaluated.items():
            by_variant.setdefault(variant, {})[seed] = each
        tasks[task] = TaskResults(
            chance=returns,
            scale=ReturnScale(random=float(returns.mean()), best=best),
            data_mean=mean,
            carried={name: _result(preset, name, seeds, cleared=False) for name, seeds in by_variant.items()},
            cleared={
                name: _result(preset, name, seeds, cleared=True)
                for name, seeds in by_variant.items()
                if all(each.cleared is not None for each in seeds.values())
            },
        )
    return Comparison(preset, tasks)


def _result(preset: PresetConfig, variant: str, seeds: Mapping[int, EvaluatedCell], *, cleared: bool) -> Result:
    ordered = dict(sorted(seeds.items()))
    context: Context = "none" if any(each.cleared is None for each in ordered.values()) else "carried"
    return Result(
        label=preset.variants[variant].label,
        context="cleared" if cleared else context,
        target_fraction=preset.protocol.target_fraction,
        headline=True,
        seeds=tuple(ordered),
        returns=np.array([each.cleared if cleared else each.carried for each in ordered.values()]),
        context_episodes=next(iter(ordered.values())).context_episodes if context == "carried" else None,
    )

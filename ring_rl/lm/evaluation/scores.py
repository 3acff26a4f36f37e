"""Samples summed up: by cell, by length, by where the answer stood, and RULER's effective length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from ring_rl.lm.evaluation.cells import Mode, SampleRecord
from ring_rl.lm.evaluation.intervals import Proportion, wilson

__all__ = ["CellScore", "by_answer_depth", "by_cell", "by_length", "effective_length", "mean_over_tasks"]

K = TypeVar("K", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class CellScore:
    """Samples of one kind together.

    Attributes:
        mode: Never mixed.
        task: Of the cells.
        length: Of the cells, in the suite's unit.
        depth: Of the cell, or the middle of a bin of depths; None for all depths together.
        score: Mean and Wilson interval.
        tokens: Mean tokens of a prompt.
        items: Mean lines (needles, ...) of a prompt; None where it lists nothing.
        chance: Mean score of guessing.
    """

    mode: Mode
    task: str
    length: int
    depth: float | None
    score: Proportion
    tokens: float
    items: float | None
    chance: float


def by_cell(records: Iterable[SampleRecord]) -> list[CellScore]:
    """A score for every task, length and depth."""
    return _grouped(records, lambda record: (record.mode, record.task, record.length, record.depth))


def by_length(records: Iterable[SampleRecord]) -> list[CellScore]:
    """A score for every task and length, all depths together."""
    return _grouped(records, lambda record: (record.mode, record.task, record.length, None))


def by_answer_depth(records: Iterable[SampleRecord], *, bins: int) -> list[CellScore]:
    """A score for every task, length and bin of where in the prompt the answer stood.

    Records that do not say where are left out.
    """

    def middle(depth: float) -> float:
        return (min(int(depth * bins), bins - 1) + 0.5) / bins

    placed = [record for record in records if record.answer_depth is not None]
    return _grouped(
        placed, lambda record: (record.mode, record.task, record.length, middle(record.answer_depth or 0.0))
    )


def mean_over_tasks(scores: Sequence[CellScore]) -> dict[Mode, dict[int, float]]:
    """By mode and length, the mean over tasks of their scores, each task counting once.

    Raises:
        ValueError: A length lacks a task that another has.
    """
    values: dict[Mode, dict[int, dict[str, float]]] = {}
    for each in scores:
        values.setdefault(each.mode, {}).setdefault(each.length, {})[each.task] = each.score.value
    for mode, lengths in values.items():
        tasks = {task for of_length in lengths.values() for task in of_length}
        for length, of_length in lengths.items():
            if missing := sorted(tasks - set(of_length)):
                raise ValueError(
                    f"no {mode} score of {', '.join(missing)} at {length}; a mean would not be over all tasks"
                )
    return {
        mode: {length: float(np.mean(list(of.values()))) for length, of in sorted(lengths.items())}
        for mode, lengths in values.items()
    }


def effective_length(mean_scores: dict[int, float], *, threshold: float) -> int | None:
    """The longest length whose mean score reaches the threshold (RULER: 85.6 percent); None where none does."""
    return max((length for length, score in mean_scores.items() if score >= threshold), default=None)


def _grouped(records: Iterable[SampleRecord], key_of: Callable[[SampleRecord], tuple]) -> list[CellScore]:
    groups: dict[tuple, list[SampleRecord]] = {}
    for record in records:
        groups.setdefault(key_of(record), []).append(record)
    return [_score(group, key) for key, group in sorted(groups.items(), key=lambda item: _sortable(item[0]))]


def _score(group: list[SampleRecord], key: tuple) -> CellScore:
    mode, task, length, depth = key
    items = [record.items for record in group if record.items is not None]
    return CellScore(
        mode=mode,
        task=task,
        length=length,
        depth=depth,
        score=wilson(sum(record.score for record in group), len(group)),
        tokens=float(np.mean([record.tokens for record in group])),
        items=float(np.mean(items)) if items else None,
        chance=float(np.mean([record.chance for record in group])),
    )


def _sortable(key: tuple) -> tuple:
    mode, task, length, depth = key
    return (mode, task, length, -1.0 if depth is None else depth)

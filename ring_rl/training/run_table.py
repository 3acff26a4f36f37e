"""Many runs in one table: a row a configuration, its seeds folded into a mean and an interval.

A run counts when its metrics reach its last step. Every other one is listed with the reason, never dropped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ring_rl.training.saved_runs import Goal, SavedRun
from ring_rl.training.statistics import Estimate, estimate

__all__ = ["RunTable", "TableRow", "make_table"]

_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class TableRow:
    """One configuration.

    Attributes:
        settings: the shown keys and their values; a key that the configuration lacks is left out.
        seeds: of the runs, ascending.
        runs: one a seed.
        missing: runs of this configuration that do not count, of seeds that no other run makes up for. What is left
            is a selection: the mean says less than it seems to.
        final: of each metric, the mean over seeds of the last value.
        best: of each metric, the mean over seeds of the best value.
    """

    settings: Mapping[str, Any]
    seeds: tuple[Any, ...]
    runs: tuple[SavedRun, ...]
    missing: tuple[SavedRun, ...]
    final: Mapping[str, Estimate]
    best: Mapping[str, Estimate]


@dataclasses.dataclass(frozen=True)
class RunTable:
    """Rows, best first by the first metric, and the runs that do not count.

    Attributes:
        keys: the settings that are shown, in the configurations' own order.
        seed_key: the key of the seed.
        goals: the metrics and which way each is better.
        rows: one a configuration.
        left_out: runs with a `problem`.
    """

    keys: tuple[str, ...]
    seed_key: str
    goals: Mapping[str, Goal]
    rows: tuple[TableRow, ...]
    left_out: tuple[SavedRun, ...]


def make_table(
    runs: Sequence[SavedRun],
    *,
    goals: Mapping[str, Goal],
    seed_key: str,
    ignore: Sequence[str],
    keys: Sequence[str] | None = None,
) -> RunTable:
    """Fold the runs that count into one row a configuration.

    Args:
        runs: as from `read_run`.
        goals: metrics, the first of which orders the rows.
        seed_key: dotted path of the seed.
        ignore: dotted paths, whole subtrees too, that do not make two configurations different.
        keys: the settings to show; None for all that differ between the runs. Of a part of the
            configuration that is told apart by its `name`, what follows from the name is not shown then.

    Raises:
        ValueError: no run counts; two runs are the same configuration and seed; `keys` names what no run has, or
            leaves rows alike.
    """
    counted = [run for run in runs if run.problem is None]
    left_out = tuple(run for run in runs if run.problem is not None)
    if not counted:
        reasons = "; ".join(f"{run.path}: {run.problem}" for run in left_out[:3])
        raise ValueError(f"none of the {len(runs)} runs counts ({reasons}{'; ...' if len(left_out) > 3 else ''})")
    ignored = (*ignore, seed_key)
    # A dict keeps the order in which the configurations state their keys.
    stated = dict.fromkeys(key for run in runs for key in run.config if not _below(key, ignored))
    readable = [run for run in runs if run.config]
    differing = [key for key in stated if len({_frozen(run, key) for run in readable}) > 1]
    groups: dict[tuple[Any, ...], dict[Any, SavedRun]] = {}
    for run in counted:
        by_seed = groups.setdefault(_identity(run, differing), {})
        seed = run.config.get(seed_key)
        if seed in by_seed:
            raise ValueError(
                f"{by_seed[seed].path} and {run.path} are the same configuration with {seed_key}={seed}; "
                f"they would pass for two seeds, so collect one of them only"
            )
        by_seed[seed] = run
    if unknown := [key for key in keys or () if key not in stated]:
        raise ValueError(
            f"{', '.join(unknown)} in keys is no setting of these runs, or is ignored; "
            f"the settings that differ are {', '.join(differing) or 'none'}"
        )
    shown = _without_consequences(differing, readable) if keys is None else list(keys)
    _require_told_apart(list(groups.values()), shown, differing)
    rows = []
    for identity, by_seed in groups.items():
        missing = [
            run
            for run in left_out
            if run.config and _identity(run, differing) == identity and run.config.get(seed_key) not in by_seed
        ]
        rows.append(_row(by_seed, missing, shown, goals))
    first, goal = next(iter(goals.items()))
    rows.sort(key=lambda row: row.final[first].mean if goal == "minimize" else -row.final[first].mean)
    return RunTable(tuple(shown), seed_key, dict(goals), tuple(rows), left_out)


def _below(key: str, paths: Iterable[str]) -> bool:
    return any(key == path or key.startswith(f"{path}.") for path in paths)


def _frozen(run: SavedRun, key: str) -> Any:
    """A value that can be compared and hashed; 1, 1.0 and true are three values, an absent key is one more."""
    value = run.config.get(key, _ABSENT)
    return value if value is _ABSENT else json.dumps(value, sort_keys=True, default=str)


def _identity(run: SavedRun, differing: Sequence[str]) -> tuple[Any, ...]:
    return tuple(_frozen(run, key) for key in differing)


def _without_consequences(differing: list[str], runs: list[SavedRun]) -> list[str]:
    """The keys less those that a sibling `name` decides, as another agent brings a whole set of its own."""
    names = [key for key in differing if key.rsplit(".", 1)[-1] == "name" and "." in key]

    def follows(key: str, name: str) -> bool:
        if key == name or not _below(key, [name.rsplit(".", 1)[0]]):
            return False
        pairs = {(_frozen(run, name), _frozen(run, key)) for run in runs}
        return len(pairs) == len({value for value, _ in pairs})

    return [key for key in differing if not any(follows(key, name) for name in names)]


def _require_told_apart(groups: list[dict[Any, SavedRun]], shown: list[str], differing: list[str]) -> None:
    seen: dict[tuple[Any, ...], SavedRun] = {}
    for by_seed in groups:
        run = next(iter(by_seed.values()))
        twin = seen.setdefault(tuple(_frozen(run, key) for key in shown), run)
        if twin is not run:
            key = next(key for key in differing if _frozen(run, key) != _frozen(twin, key))
            raise ValueError(
                f"{twin.path} and {run.path} are different configurations and would look alike; "
                f"add {key} to keys, or to ignore if it does not matter"
            )


def _row(
    by_seed: Mapping[Any, SavedRun], missing: Sequence[SavedRun], keys: Sequence[str], goals: Mapping[str, Goal]
) -> TableRow:
    seeds = tuple(sorted(by_seed, key=lambda seed: (str(type(seed)), seed)))
    runs = tuple(by_seed[seed] for seed in seeds)
    return TableRow(
        settings={key: runs[0].config[key] for key in keys if key in runs[0].config},
        seeds=seeds,
        runs=runs,
        missing=tuple(missing),
        final={metric: estimate(np.array([run.final(metric) for run in runs])) for metric in goals},
        best={metric: estimate(np.array([run.best(metric, goal) for run in runs])) for metric, goal in goals.items()},
    )

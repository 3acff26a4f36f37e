"""Runs read back from their folders: configuration, metrics, and whether they came to their end."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import yaml

from ring_rl.training.metrics import read_metrics
from ring_rl.training.provenance import read_starts
from ring_rl.training.stage_records import read_stage_records

__all__ = ["Goal", "SavedRun", "dotted", "find_runs", "read_run"]

Goal = Literal["minimize", "maximize"]

_CONFIG, _METRICS = "config.yaml", "metrics.jsonl"
# What a run leaves that was cut off before it wrote its configuration.
_LOCK = "run.lock"


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """One run as its folder tells it.

    Attributes:
        path: the run folder.
        config: the resolved configuration, keys dotted.
        records: of the metrics file, in order.
        problem: why the run does not count; None for one that does.
        starts: where it was started from: commit, device, versions; see `record_start`.
    """

    path: pathlib.Path
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    problem: str | None
    starts: Sequence[Mapping[str, Any]]

    @property
    def last_step(self) -> int:
        """The step of the last record; 0 where there is none."""
        return self.records[-1]["step"] if self.records else 0

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of the records that hold a value of the metric."""
        points = [(each["step"], float(each[metric])) for each in self.records if each.get(metric) is not None]
        return [step for step, _ in points], [value for _, value in points]

    def final(self, metric: str) -> float:
        """The value at the metric's last record."""
        return self.curve(metric)[1][-1]

    def best(self, metric: str, goal: Goal) -> float:
        """The best of all records; it flatters, because noise alone raises it."""
        return (min if goal == "minimize" else max)(self.curve(metric)[1])


def find_runs(folders: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """The run folders at or below these, sorted, each once; hidden folders are passed over.

    Raises:
        FileNotFoundError: a folder is missing, or holds no run.
    """
    found: dict[pathlib.Path, pathlib.Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}; name the folder that the runs are in")
        runs = list(_run_folders(folder, seen=set()))
        if not runs:
            raise FileNotFoundError(f"no run at or below {folder}; a run folder holds {_CONFIG} and {_METRICS}")
        found.update((run.resolve(), run) for run in runs)
    return sorted(found.values())


def dotted(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A nested mapping as a flat one, keys dotted; empty mappings stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{path}.{key}" if path else str(key)
        flat |= dotted(value, name) if isinstance(value, Mapping) and value else {name: value}
    return flat


def read_run(path: pathlib.Path, *, steps_key: str, goals: Mapping[str, Goal]) -> SavedRun:
    """A run folder's content; whatever is wrong with it becomes its `problem`.

    Args:
        path: the folder.
        steps_key: dotted path of the number of steps that the run is to take.
        goals: the metrics that it must have.
    """
    starts = read_starts(path)
    try:
        config = dotted(_read_config(path / _CONFIG))
        records = read_metrics(path / _METRICS)
    except (ValueError, OSError) as error:
        return SavedRun(path, {}, (), str(error), starts)
    run = SavedRun(path, config, records, None, starts)
    return dataclasses.replace(run, problem=_problem(run, steps_key, goals))


def _run_folders(folder: pathlib.Path, seen: set[pathlib.Path]) -> Iterable[pathlib.Path]:
    # A link may lead back up.
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    names = {entry.name for entry in folder.iterdir()}
    if {_CONFIG, _METRICS} <= names or _LOCK in names:
        # A run's own folders (wandb keeps a config.yaml of its own) hold no further runs.
        yield folder
        return
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            yield from _run_folders(entry, seen)


def _read_config(path: pathlib.Path) -> Mapping[str, Any]:
    if not path.exists():
        raise ValueError(f"no {_CONFIG}: it was cut off at its start")
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{_CONFIG} is no YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(config, Mapping):
        raise ValueError(f"{_CONFIG} holds no configuration")
    return config


def _unfinished(run: SavedRun, steps_key: str) -> str | None:
    """Why the run is not at its end: its steps are not taken, or, where it has stages, not all of these are over."""
    steps, stages = run.config.get(steps_key), {key.split(".")[1] for key in run.config if key.startswith("stages.")}
    if isinstance(steps, int):
        left = f"of {steps}" if run.last_step < steps else None
    elif stages:
        try:
            waiting = sorted(stages - set(read_stage_records(run.path)))
        except ValueError as error:
            return str(error)
        left = f"with {', '.join(waiting)} not finished" if waiting else None
    else:
        return f"its configuration has no {steps_key}, and no stages"
    if left is None:
        return None
    diverged = any((run.path / "offending_batch").glob("*"))
    return f"{'diverged' if diverged else 'stopped'} at step {run.last_step} {left}"


def _problem(run: SavedRun, steps_key: str, goals: Mapping[str, Goal]) -> str | None:
    if (unfinished := _unfinished(run, steps_key)) is not None:
        return unfinished
    for metric in goals:
        if not run.curve(metric)[1]:
            present = ", ".join(sorted({key for record in run.records for key in record} - {"step"}))
            return f"it has no metric {metric}; its metrics are {present or 'none'}"
        if next(record[metric] for record in reversed(run.records) if metric in record) is None:
            return f"{metric} is not finite at its end"
    return None

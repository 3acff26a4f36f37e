"""What a comparison is made of: tasks x variants of agents x training seeds, each a cell with a run folder.

A preset (conf/preset/) says it in full. Everything it starts is an ordinary command of this repository, with the
preset's overrides on it, so any cell can be run alone, and a cell that is finished is never run again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from ring_rl.agent.environments.domains import parse_task
from ring_rl.agent.evaluation.protocol import ProtocolConfig
from ring_rl.training.saved_runs import SavedRun, read_run

__all__ = ["Cell", "InContextConfig", "Ordering", "PresetConfig", "TrainingGroup", "Variant"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One agent of the comparison.

    Attributes:
        label: What tables call it.
        train: Overrides of experiments/train_agent.py that make it.
        paper_column: The column of the paper's table 5 that it stands beside; null where there is none.
        expected_seconds: Of training and evaluating one cell on the preset's hardware, for the estimate before any cell
            has been run; the preset's `expectation` says where it comes from.
    """

    label: str
    train: tuple[str, ...]
    paper_column: str | None
    expected_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ordering:
    """A claim of the paper: `better` returns more than `worse`; both name variants."""

    better: str
    worse: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class InContextConfig:
    """Whose improvement in context is tested.

    Attributes:
        carried: The variant whose context is carried over, and once more cleared between episodes.
        shuffled: The same variant trained on shuffled chains.
    """

    carried: str
    shuffled: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingGroup:
    """Cells of one variant whose tasks share their overrides: one Hydra multirun.

    Attributes:
        variant: Its name in the preset.
        tasks: Of the cells that are not finished, and so for the seeds.
        seeds: See `tasks`.
        overrides: The tasks'.
    """

    variant: str
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PresetConfig:
    """One comparison.

    Attributes:
        name: "cpu" and the like; folders are called so.
        hardware: What it was made for, in words.
        expectation: Whether the expected seconds were measured there or how they were estimated, in words.
        data: "collect" makes the data sets with datasets/exorl/collect.py; "fetch" takes the published ones.
        collect: For each domain, overrides of datasets/exorl/collect.py.
        train: Overrides of experiments/train_agent.py for all cells.
        tasks: Task names, and overrides for their cells.
        variants: Agents, by a name that folders can have.
        seeds: Training seeds.
        workers: Cells trained at a time on this machine.
        protocol: How every cell is evaluated.
        orderings: The paper's claims to be tested.
        in_context: The paired test of improvement in context; null leaves it out.
        bootstrap_samples: Resamples of every interval.
    """

    name: str
    hardware: str
    expectation: str
    data: Literal["collect", "fetch"]
    collect: dict[str, tuple[str, ...]]
    train: tuple[str, ...]
    tasks: dict[str, tuple[str, ...]]
    variants: dict[str, Variant]
    seeds: tuple[int, ...]
    workers: int
    protocol: ProtocolConfig
    orderings: tuple[Ordering, ...]
    in_context: InContextConfig | None
    bootstrap_samples: int

    def __post_init__(self) -> None:
        if not self.tasks or not self.variants or not self.seeds:
            raise ValueError("a preset needs tasks, variants and seeds; one of them is empty")
        for task in self.tasks:
            parse_task(task)
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ from one another, got {list(self.seeds)}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.bootstrap_samples < 100:
            raise ValueError(f"bootstrap_samples must be at least 100, got {self.bootstrap_samples}")
        if self.protocol.other_target_fractions:
            raise ValueError(
                "a comparison asks for one target, so protocol.other_target_fractions must be []; sweep targets with "
                "experiments/evaluate_agent.py"
            )
        named = [name for each in self.orderings for name in (each.better, each.worse)]
        if self.in_context is not None:
            named += [self.in_context.carried, self.in_context.shuffled]
        if unknown := sorted(set(named) - set(self.variants)):
            raise ValueError(f"unknown variants {', '.join(unknown)}; the preset has {', '.join(self.variants)}")
        missing = {parse_task(task)[0] for task in self.tasks} - set(self.collect)
        if self.data == "collect" and missing:
            raise ValueError(f"collect says nothing of {', '.join(sorted(missing))}; add overrides, or set data=fetch")

    @property
    def domains(self) -> dict[str, tuple[str, ...]]:
        """The tasks of every domain that occurs."""
        by_domain: dict[str, tuple[str, ...]] = {}
        for task in self.tasks:
            domain = parse_task(task)[0]
            by_domain[domain] = (*by_domain.get(domain, ()), task)
        return by_domain

    def cells(self, runs: Path) -> Iterator[Cell]:
        """Every cell; `runs` is the folder that holds the preset's."""
        for variant, task, seed in itertools.product(self.variants, self.tasks, self.seeds):
            yield Cell(task=task, variant=variant, seed=seed, run_dir=runs / task / variant / f"seed_{seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run and its evaluation."""

    task: str
    variant: str
    seed: int
    run_dir: Path

    def run(self) -> SavedRun | None:
        """The run as its folder tells it; None where there is none yet."""
        if not self.run_dir.is_dir():
            return None
        return read_run(self.run_dir, steps_key="loop.steps", goals={})

    @property
    def trained(self) -> bool:
        """Whether the run came to its end."""
        run = self.run()
        return run is not None and run.problem is None

    @property
    def evaluation(self) -> Path:
        """Where its evaluation is kept."""
        return self.run_dir / "evaluation.json"


def training_groups(preset: PresetConfig, cells: Sequence[Cell]) -> list[TrainingGroup]:
    """The multiruns that train `cells`: as few as their overrides allow.

    A multirun is a full grid, so it may touch a finished cell where what is missing is none; that cell is passed over.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.variant, preset.tasks[cell.task]), []).append(cell)
    return [
        TrainingGroup(
            variant=variant,
            tasks=tuple(dict.fromkeys(cell.task for cell in members)),
            seeds=tuple(sorted({cell.seed for cell in members})),
            overrides=overrides,
        )
        for (variant, overrides), members in groups.items()
    ]

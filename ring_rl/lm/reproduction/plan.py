"""What the figure is made of: variants of models x training seeds, each a cell with a run folder and an evaluation.

A preset (conf/reproduce_lm/preset/) says it in full. Everything it starts is an ordinary command of this repository,
with the preset's overrides on it, so any cell can be run alone, and a cell that is finished is never run again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ring_rl.lm.evaluation.cells import Mode, SampleRecord
from ring_rl.lm.evaluation.sample_log import read_samples
from ring_rl.lm.training_task import LANGUAGE_MAY_DIFFER
from ring_rl.training import preset_settings
from ring_rl.training.run import MAY_DIFFER
from ring_rl.training.saved_runs import dotted
from ring_rl.training.stage_records import StageRecord, read_stage_records, whole_seconds

__all__ = ["Cell", "Claim", "Measurement", "PresetConfig", "Variant"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """How many samples are asked at a length in tokens."""

    tokens: int
    samples: int

    def __post_init__(self) -> None:
        if min(self.tokens, self.samples) < 1:
            raise ValueError(f"tokens and samples must be at least 1, got {self.tokens} and {self.samples}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One model of the figure.

    Attributes:
        label: What tables call it.
        train: Overrides of experiments/train_lm.py that make it.
        evaluate: Overrides of experiments/evaluate_lm.py.
        lengths: At which it is asked; each once, ascending.
        expected_seconds: Of training and asking one cell on the preset's hardware, for the estimate before any cell has
            been run; the preset's `expectation` says where it comes from.
    """

    label: str
    train: tuple[str, ...]
    evaluate: tuple[str, ...]
    lengths: tuple[Measurement, ...]
    expected_seconds: float

    def __post_init__(self) -> None:
        tokens = [each.tokens for each in self.lengths]
        if not tokens or tokens != sorted(set(tokens)):
            raise ValueError(f"lengths of {self.label} must ascend, and there must be one, got {tokens}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """What a variant is to reach.

    Attributes:
        variant: Its name in the preset.
        tokens: At which length.
        accuracy: The least mean over training seeds.
        minutes: The most that any seed's training may take, compilation included; null: however long.
    """

    variant: str
    tokens: int
    accuracy: float
    minutes: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PresetConfig:
    """A figure.

    Attributes:
        name: "cpu" and the like; folders are called so.
        hardware: What it was made for, in words.
        expectation: Whether the expected seconds were measured there or how they were estimated, in words.
        needs_weights: Whether `weights`, a folder of pretrained weights, must be given.
        train: Overrides of experiments/train_lm.py for all cells.
        evaluate: Overrides of experiments/evaluate_lm.py for all cells.
        mode: In which models are asked.
        variants: Models, by a name that folders can have.
        seeds: Training seeds.
        claims: What is to be shown.
    """

    name: str
    hardware: str
    expectation: str
    needs_weights: bool
    train: tuple[str, ...]
    evaluate: tuple[str, ...]
    mode: Mode
    variants: dict[str, Variant]
    seeds: tuple[int, ...]
    claims: tuple[Claim, ...]

    def __post_init__(self) -> None:
        if not self.variants or not self.seeds:
            raise ValueError("a preset needs variants and seeds; one of them is empty")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ from one another, got {list(self.seeds)}")
        for claim in self.claims:
            variant = self.variants.get(claim.variant)
            if variant is None:
                raise ValueError(f"unknown variant {claim.variant}; the preset has {', '.join(self.variants)}")
            if claim.tokens not in [each.tokens for each in variant.lengths]:
                raise ValueError(f"a claim about {claim.variant} at {claim.tokens} tokens, where it is not asked")

    def cells(self, runs: Path) -> Iterator[Cell]:
        """Every cell; `runs` is the folder that holds the preset's."""
        for name, variant in self.variants.items():
            for seed in self.seeds:
                yield Cell(variant=name, seed=seed, lengths=variant.lengths, run_dir=runs / name / f"seed_{seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run and its evaluation."""

    variant: str
    seed: int
    lengths: tuple[Measurement, ...]
    run_dir: Path

    @property
    def evaluation(self) -> Path:
        """The evaluation's folder."""
        return self.run_dir / "evaluation"

    def config(self) -> Mapping[str, Any] | None:
        """What the run was started with; None where there is none."""
        file = self.run_dir / "config.yaml"
        return yaml.safe_load(file.read_text()) if file.exists() else None

    def stages(self) -> Mapping[str, StageRecord]:
        """What the run says of its finished stages, by name."""
        return read_stage_records(self.run_dir)

    @property
    def trained(self) -> bool:
        """Whether all stages are finished."""
        config, finished = self.config(), self.stages()
        return config is not None and bool(finished) and set(config["stages"]) <= set(finished)

    @property
    def training_seconds(self) -> float | None:
        """Of all stages, compilation included; None where one was interrupted, whose first part no one timed."""
        return whole_seconds(self.stages().values()) if self.trained else None

    def unanswered(self, mode: Mode) -> tuple[Measurement, ...]:
        """Lengths at which samples are missing, or all of them where another checkpoint answered."""
        if not self.trained or not (self.evaluation / "evaluation.json").exists():
            return self.lengths
        asked = json.loads((self.evaluation / "evaluation.json").read_text())
        if asked["model"]["step"] != max(stage.last_step for stage in self.stages().values()):
            return self.lengths
        records = self.records()
        answered, tasks = {record.key for record in records}, {record.task for record in records}
        return tuple(
            each
            for each in self.lengths
            if not any(
                all((mode, task, each.tokens, None, index) in answered for index in range(each.samples))
                for task in tasks
            )
        )

    def records(self) -> list[SampleRecord]:
        """All answers."""
        return read_samples(self.evaluation, record_type=SampleRecord, key=lambda record: record.key)

    def differing_settings(self, preset: PresetConfig) -> list[str]:
        """One line a setting in which the run on disk differs from the preset; empty where there is no run.

        Compared are the values that the preset names, and seed and label.
        """
        saved = self.config()
        if saved is None:
            return []
        variant = preset.variants[self.variant]
        return preset_settings.differing_settings(
            dotted(saved),
            [*preset.train, *variant.train],
            {"seed": self.seed, "label": variant.label},
            may_differ=(*MAY_DIFFER, *LANGUAGE_MAY_DIFFER),
        )

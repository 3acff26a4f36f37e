"""The paper's figure of line retrieval from one command; conf/reproduce_lm/reproduce_lm.yaml documents every key."""

import dataclasses
import functools
import shlex
import statistics
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Literal

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ring_rl.child_process import run_script
from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.lm.evaluation.report import PublishedCurves
from ring_rl.lm.reproduction.plan import Cell, PresetConfig
from ring_rl.lm.reproduction.report import write_figure_report

REPOSITORY = Path(__file__).parents[1]
run = functools.partial(run_script, REPOSITORY)
Phase = Literal["train", "evaluate", "report"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReproduceLMConfig:
    """Which figure, and where its parts lie."""

    preset: PresetConfig
    published: PublishedCurves
    runs: Path
    output: Path
    weights: Path | None
    phases: tuple[Phase, ...]
    dry_run: bool
    partial: bool

    def __post_init__(self) -> None:
        if self.preset.needs_weights and self.weights is None and not self.dry_run:
            raise ValueError(f"preset={self.preset.name} fine-tunes pretrained weights; name their folder: weights=...")

    @property
    def cells(self) -> list[Cell]:
        """Every cell of the preset."""
        return list(self.preset.cells(self.runs))


def quoted(text: str) -> str:
    """As an override's value that is text and nothing else, whatever characters it holds."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def training_command(preset: PresetConfig, cell: Cell) -> list[str]:
    """The training of a cell."""
    variant = preset.variants[cell.variant]
    return [
        "experiments/train_lm.py",
        *preset.train,
        *variant.train,
        f"label={quoted(variant.label)}",
        f"seed={cell.seed}",
        f"run_dir={cell.run_dir}",
    ]


def evaluation_commands(preset: PresetConfig, cell: Cell) -> list[list[str]]:
    """What asks for the answers that a cell lacks: a command for lengths with equally many samples."""
    variant = preset.variants[cell.variant]
    commands = []
    for samples, lengths in groupby(cell.unanswered(preset.mode), key=lambda each: each.samples):
        commands.append(
            [
                "experiments/evaluate_lm.py",
                "model=run",
                f"model.run_dir={cell.run_dir}",
                "suite=line_retrieval",
                "suite.unit=tokens",
                *preset.evaluate,
                *variant.evaluate,
                f"questions.modes=[{preset.mode}]",
                f"suite.lengths=[{','.join(str(each.tokens) for each in lengths)}]",
                f"suite.samples={samples}",
                f"output={cell.evaluation}",
            ]
        )
    return commands


def train(config: ReproduceLMConfig) -> None:
    """Trains what is missing, one cell after another: a training uses the whole machine."""
    missing = [cell for cell in config.cells if not cell.trained]
    for number, cell in enumerate(missing):
        label = config.preset.variants[cell.variant].label
        print(f"\ntraining {number + 1} of {len(missing)}: {label}, seed {cell.seed}", flush=True)
        run(*training_command(config.preset, cell))


def evaluate(config: ReproduceLMConfig) -> None:
    """Asks every trained cell what it has not answered."""
    cells = [cell for cell in config.cells if cell.trained or not config.partial]
    for cell in cells:
        if not cell.trained:
            raise ValueError(
                f"{cell.run_dir} is not trained to its end; train it first: phases=[train], or set partial=true to "
                "pass it over"
            )
    for number, cell in enumerate(cells):
        for command in evaluation_commands(config.preset, cell):
            label = config.preset.variants[cell.variant].label
            print(f"\nasking {number + 1} of {len(cells)}: {label}, seed {cell.seed}", flush=True)
            run(*command)


def check_settings(config: ReproduceLMConfig) -> None:
    """Raises ValueError if a run on disk is not the one that the preset describes now: its figures would lie."""
    for cell in config.cells:
        if differences := cell.differing_settings(config.preset):
            raise ValueError(
                f"{cell.run_dir} was trained with other settings than the preset has ({'; '.join(differences)}); "
                "move it away to train it again, or choose another runs="
            )


def announce(config: ReproduceLMConfig) -> None:
    """Says what there is, what is left, and about how long it will take."""
    preset = config.preset
    table = Table(title=f"{preset.name}: {len(preset.seeds)} training seeds, for {preset.hardware}")
    for column in ("model", "trained", "asked", "cells left", "training a cell, s", "a cell in all, s", "hours left"):
        table.add_column(column)
    hours = 0.0
    for name, variant in preset.variants.items():
        cells = [cell for cell in config.cells if cell.variant == name]
        trained = [cell for cell in cells if cell.trained]
        asked = [cell for cell in trained if not cell.unanswered(preset.mode)]
        measured = [seconds for cell in trained if (seconds := cell.training_seconds) is not None]
        of_this = (len(cells) - len(asked)) * variant.expected_seconds / 3600
        hours += of_this
        table.add_row(
            variant.label,
            f"{len(trained)} of {len(cells)}",
            f"{len(asked)} of {len(cells)}",
            str(len(cells) - len(asked)),
            f"{statistics.median(measured):.0f} (measured here)" if measured else "",
            f"{variant.expected_seconds:.0f}",
            f"{of_this:.2f}",
        )
    Console(width=140).print(table)
    left = sum(not cell.trained or bool(cell.unanswered(preset.mode)) for cell in config.cells)
    print(f"a cell in all: {preset.expectation}")
    print(f"cells={len(config.cells)} left={left} hours_left={hours:.2f}", flush=True)


def report(config: ReproduceLMConfig) -> None:
    """Writes the tables and the figure."""
    missing = [cell for cell in config.cells if not cell.trained or cell.unanswered(config.preset.mode)]
    finished = [cell for cell in config.cells if cell not in missing]
    if not finished or (missing and not config.partial):
        remedy = "finish them, or set partial=true for a figure of what there is" if finished else "train and evaluate"
        raise ValueError(
            f"{len(missing)} of {len(config.cells)} cells are not finished, {missing[0].run_dir} is one; {remedy}"
        )
    figures = write_figure_report(config.preset, finished, published=config.published, output=config.output)
    print(" ".join(f"{name}={value}" for name, value in figures.items()))


def reproduce(config: ReproduceLMConfig) -> None:
    """Announces, then goes through the phases in their order."""
    check_settings(config)
    announce(config)
    if config.dry_run:
        if missing := [cell for cell in config.cells if not cell.trained]:
            print(f"first: python {shlex.join(training_command(config.preset, missing[0]))}")
        return
    phases: dict[Phase, Callable[[ReproduceLMConfig], None]] = {"train": train, "evaluate": evaluate, "report": report}
    for name, phase in phases.items():
        if name in config.phases:
            phase(config)


@hydra.main(config_path="../conf/reproduce_lm", config_name="reproduce_lm", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a figure."""
    with exit_on_bad_input():
        reproduce(from_mapping(ReproduceLMConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)

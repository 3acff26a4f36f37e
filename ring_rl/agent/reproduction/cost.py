"""What is left to do and about how long it will take, said before it starts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
from collections.abc import Sequence

from ring_rl.agent.reproduction.plan import Cell, PresetConfig
from ring_rl.training.metrics import PERFORMANCE_PREFIX

__all__ = ["CostLine", "cost_lines", "seconds_of"]


@dataclasses.dataclass(frozen=True)
class CostLine:
    """One variant's share.

    Attributes:
        variant: Its name in the preset.
        finished: Cells that need nothing more.
        left: Cells to train or to evaluate.
        seconds_a_cell: Of one process; the median of those that are trained, else the preset's figure.
        measured: Whether `seconds_a_cell` was measured here.
    """

    variant: str
    finished: int
    left: int
    seconds_a_cell: float
    measured: bool

    @property
    def seconds(self) -> float:
        """Of all that is left, one cell after another."""
        return self.left * self.seconds_a_cell


def cost_lines(preset: PresetConfig, cells: Sequence[Cell], left: Sequence[Cell]) -> list[CostLine]:
    """A line a variant."""
    lines = []
    for name, variant in preset.variants.items():
        mine = [cell for cell in cells if cell.variant == name]
        missing = sum(cell.variant == name for cell in left)
        seconds = [value for cell in mine if (value := seconds_of(cell)) is not None]
        lines.append(
            CostLine(
                variant=name,
                finished=len(mine) - missing,
                left=missing,
                seconds_a_cell=statistics.median(seconds) if seconds else variant.expected_seconds,
                measured=bool(seconds),
            )
        )
    return lines


def seconds_of(cell: Cell) -> float | None:
    """How long a trained cell took: its steps by its own metrics, and its evaluation where there is one."""
    run = cell.run()
    if run is None or run.problem is not None:
        return None
    seconds, before = 0.0, 0
    for record in run.records:
        speed = record.get(f"{PERFORMANCE_PREFIX}steps_per_second")
        if speed:
            seconds += (record["step"] - before) / speed
            before = record["step"]
    # One that cannot be read is made again.
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        seconds += json.loads(cell.evaluation.read_text())["seconds"]
    return seconds or None

"""Some rows hold a shorter record, and more questions about it: what was learned at short lengths is not forgotten."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

__all__ = ["ShortRecords"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortRecords:
    """Which rows are short, and how short.

    Attributes:
        share: Of the rows.
        fewest_lines: Of a short record; their numbers are log-uniform from here.
        lines: Of the other records, and the most of a short one.
    """

    share: float
    fewest_lines: int
    lines: int

    def __post_init__(self) -> None:
        if self.share > 0 and not self.fewest_lines <= self.lines:
            raise ValueError(
                f"short records have at least fewest_lines={self.fewest_lines} lines, the others {self.lines}; lower "
                f"training_data.fewest_lines, or set the stage's short_share to 0"
            )

    def draw(self, generator: np.random.Generator) -> int | None:
        """How many lines a row's record has, if it is a short one."""
        if generator.random() >= self.share:
            return None
        octaves = generator.uniform(math.log(self.fewest_lines), math.log(self.lines))
        return min(round(math.exp(octaves)), self.lines)

"""What an evaluation asks of a suite of tasks."""

from __future__ import annotations

import zlib
from typing import Protocol

import numpy as np

from ring_rl.lm.evaluation.cells import Cell
from ring_rl.lm.tasks.sample import Sample

__all__ = ["Suite", "sample_generator"]


class Suite(Protocol):
    """Tasks, at which lengths and depths they are asked, and how often."""

    @property
    def samples(self) -> int:
        """Of every cell."""
        ...

    @property
    def unit(self) -> str:
        """What a cell's length counts: "tokens" or "lines"."""
        ...

    @property
    def text_fingerprint(self) -> str | None:
        """Of a text from outside that samples are made of; None where there is none."""
        ...

    def cells(self) -> tuple[Cell, ...]:
        """In the order in which they are evaluated."""
        ...

    def sample(self, cell: Cell, index: int) -> Sample:
        """The sample of a cell, 0 to `samples` - 1: the same whenever it is asked for."""
        ...

    def max_new_tokens(self, cell: Cell) -> int:
        """How much a model may write."""
        ...

    def chance(self, sample: Sample) -> float:
        """The score of guessing among the candidates that the prompt names; 0 where it names none."""
        ...

    def items(self, sample: Sample) -> int | None:
        """Lines, needles or whatever the prompt lists; None where it lists nothing."""
        ...


def sample_generator(seed: int, cell: Cell, index: int) -> np.random.Generator:
    """Of a sample's randomness: a function of seed, cell and index, whatever else is evaluated."""
    depth = 0 if cell.depth is None else 1 + round(1e6 * cell.depth)
    return np.random.default_rng([seed, zlib.crc32(cell.task.encode()), cell.length, depth, index])

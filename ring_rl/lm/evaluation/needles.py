"""Needles in a haystack: one against length and depth, and several at once."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Literal

from ring_rl.lm.documents.document import digest
from ring_rl.lm.evaluation.cells import Cell
from ring_rl.lm.evaluation.line_retrieval import check_grid, grid
from ring_rl.lm.evaluation.prompts import Prompter
from ring_rl.lm.evaluation.suite import sample_generator
from ring_rl.lm.tasks.haystack import Haystack, python_reference, read_haystack
from ring_rl.lm.tasks.needle import MULTI_TASK, SINGLE_TASK, NeedleStyle, draw_needle, draw_needles
from ring_rl.lm.tasks.sample import Sample

__all__ = ["MultiNeedleConfig", "Needles", "SingleNeedleConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleNeedleConfig:
    """One needle, a cell a length and depth.

    Attributes:
        name: Of the suite.
        lengths: Tokens of prompt and answer, ascending.
        depths: Ascending shares of the text before the needle.
        samples: Of a cell.
        seed: Of the samples.
        style: Whose wording.
        distractors: Numbers of other cities in the same text.
        haystack: A text file or a folder of them; null is Python's language reference.
        max_new_tokens: That a model may write.
    """

    name: Literal["needle"]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int
    style: NeedleStyle
    distractors: int
    haystack: Path | None
    max_new_tokens: int

    def __post_init__(self) -> None:
        check_grid(self.lengths, self.depths, self.samples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiNeedleConfig:
    """N needles at random depths, R of them asked for, a cell a length; fields as in `SingleNeedleConfig`."""

    name: Literal["multi_needle"]
    lengths: tuple[int, ...]
    samples: int
    seed: int
    needles: int
    retrieved: int
    haystack: Path | None
    max_new_tokens: int

    def __post_init__(self) -> None:
        check_grid(self.lengths, None, self.samples)


class Needles:
    """Either suite for one model's tokenizer and template."""

    unit = "tokens"

    def __init__(self, config: SingleNeedleConfig | MultiNeedleConfig, prompter: Prompter):
        self._config, self._prompter = config, prompter
        self.samples = config.samples

    @property
    def text_fingerprint(self) -> str:
        """See `Suite`."""
        return digest(self._text)

    def cells(self) -> tuple[Cell, ...]:
        """See `Suite`."""
        if isinstance(self._config, SingleNeedleConfig):
            return grid(SINGLE_TASK, self._config.lengths, self._config.depths)
        return grid(MULTI_TASK, self._config.lengths, None)

    def sample(self, cell: Cell, index: int) -> Sample:
        """See `Suite`."""
        config, generator = self._config, sample_generator(self._config.seed, cell, index)
        room = config.max_new_tokens + self._prompter.template_tokens
        if isinstance(config, SingleNeedleConfig):
            return draw_needle(
                generator,
                haystack=self._haystack,
                length=cell.length,
                room=room,
                style=config.style,
                depth=cell.depth or 0.0,
                distractors=config.distractors,
            )
        return draw_needles(
            generator,
            haystack=self._haystack,
            length=cell.length,
            room=room,
            needles=config.needles,
            retrieved=config.retrieved,
        )

    def max_new_tokens(self, cell: Cell) -> int:
        """See `Suite`."""
        return self._config.max_new_tokens

    def chance(self, sample: Sample) -> float:
        """Of naming any of the numbers, as many as are asked for; 0 for a needle alone, whose number is to be found."""
        config = self._config
        if isinstance(config, MultiNeedleConfig):
            return config.retrieved / config.needles
        return 1 / (1 + config.distractors) if config.distractors else 0.0

    def items(self, sample: Sample) -> int:
        """Needles, distractors too."""
        config = self._config
        return config.needles if isinstance(config, MultiNeedleConfig) else 1 + config.distractors

    @functools.cached_property
    def _text(self) -> str:
        return python_reference() if self._config.haystack is None else read_haystack(self._config.haystack)

    @functools.cached_property
    def _haystack(self) -> Haystack:
        return Haystack(self._text, self._prompter.tokenizer)

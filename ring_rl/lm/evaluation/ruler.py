"""RULER's tasks that need no download, by length, and up to which length a model masters them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ring_rl.lm.evaluation.cells import Cell
from ring_rl.lm.evaluation.line_retrieval import check_grid
from ring_rl.lm.evaluation.prompts import Prompter
from ring_rl.lm.evaluation.suite import sample_generator
from ring_rl.lm.tasks.ruler import RulerSource
from ring_rl.lm.tasks.ruler_tasks import RULER_TASKS, RulerTask, RulerTaskName
from ring_rl.lm.tasks.sample import Sample

__all__ = ["Ruler", "RulerConfig"]

# Tasks whose context is made of needles: any of them may be named.
_AMONG_NEEDLES = ("niah_multikey_2", "niah_multikey_3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RulerConfig:
    """Tasks x lengths.

    Attributes:
        name: Of the suite.
        tasks: Of RULER's, each once.
        lengths: Tokens of prompt and answer, ascending.
        samples: Of a cell; RULER has 500.
        seed: Of the samples.
    """

    name: Literal["ruler"]
    tasks: tuple[RulerTaskName, ...]
    lengths: tuple[int, ...]
    samples: int
    seed: int

    def __post_init__(self) -> None:
        check_grid(self.lengths, None, self.samples)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"suite.tasks must name at least one task, and each once, got {list(self.tasks)}")


class Ruler:
    """The suite for one model's tokenizer and template; answers may be as long as RULER allows."""

    unit = "tokens"
    text_fingerprint: str | None = None

    def __init__(self, config: RulerConfig, prompter: Prompter):
        self._config, self._prompter = config, prompter
        self.samples = config.samples
        self._sources: dict[Cell, RulerSource] = {}

    def cells(self) -> tuple[Cell, ...]:
        """See `Suite`."""
        return tuple(
            Cell(task=task, length=length, depth=None) for length in self._config.lengths for task in self._config.tasks
        )

    def sample(self, cell: Cell, index: int) -> Sample:
        """See `Suite`."""
        return self._source(cell).sample(sample_generator(self._config.seed, cell, index))

    def max_new_tokens(self, cell: Cell) -> int:
        """See `Suite`."""
        return self._task(cell).tokens_to_generate

    def chance(self, sample: Sample) -> float:
        """See `Suite`."""
        return 1 / (sample.details["sentences"] + 1) if sample.task in _AMONG_NEEDLES else 0.0

    def items(self, sample: Sample) -> int:
        """Sentences or words."""
        return sample.details["sentences" if "sentences" in sample.details else "words"]

    def _task(self, cell: Cell) -> RulerTask:
        return next(task for name, task in RULER_TASKS.items() if name == cell.task)

    def _source(self, cell: Cell) -> RulerSource:
        # The search for a context's size reads many contexts.
        if cell not in self._sources:
            self._sources[cell] = RulerSource(
                self._task(cell).name,
                length=cell.length,
                room=self.max_new_tokens(cell) + self._prompter.template_tokens,
                tokenizer=self._prompter.tokenizer,
            )
        return self._sources[cell]

"""Line retrieval against the length of the record: the Ring Attention paper's figure 3."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from ring_rl.lm.evaluation.cells import Cell
from ring_rl.lm.evaluation.prompts import Prompter
from ring_rl.lm.evaluation.suite import sample_generator
from ring_rl.lm.key_words import WordList, key_words
from ring_rl.lm.tasks.compact_lines import VALUE_DIGITS, CompactLines, lines_within
from ring_rl.lm.tasks.line_retrieval import AnswerStart, IndexKind, draw_lines
from ring_rl.lm.tasks.sample import Sample

__all__ = ["LineRetrieval", "LineRetrievalConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineRetrievalConfig:
    """Line retrieval, a cell a length, and a depth where depths are given.

    Attributes:
        name: Of the suite.
        form: "compact": nine tokens a line, what small models are trained on; "longeval": LongEval's text.
        unit: Whether `lengths` are tokens of the whole prompt and answer, or lines of the record.
        lengths: Ascending.
        depths: Where the asked line stands, 0 the first and 1 the last; null draws it uniformly, as LongEval does.
        samples: Of a cell.
        seed: Of the samples.
        words: Of which keys are made.
        index_kind: What names a line; LongEval's form only.
        answer_start: What is given of the answer; LongEval's form only.
        max_new_tokens: That a model may write in LongEval's form; compact answers have their five digits.
    """

    name: Literal["line_retrieval"]
    form: Literal["compact", "longeval"]
    unit: Literal["tokens", "lines"]
    lengths: tuple[int, ...]
    depths: tuple[float, ...] | None
    samples: int
    seed: int
    words: WordList
    index_kind: IndexKind
    answer_start: AnswerStart
    max_new_tokens: int

    def __post_init__(self) -> None:
        check_grid(self.lengths, self.depths, self.samples)


class LineRetrieval:
    """The suite for one model's tokenizer and template."""

    text_fingerprint: str | None = None

    def __init__(self, config: LineRetrievalConfig, prompter: Prompter):
        self._config, self._prompter = config, prompter
        self.samples, self.unit = config.samples, config.unit
        self._words = key_words(config.words)
        self._compact = CompactLines(self._words)

    def cells(self) -> tuple[Cell, ...]:
        """See `Suite`."""
        task = "line_retrieval" if self._config.form == "longeval" else "compact_lines"
        return grid(task, self._config.lengths, self._config.depths)

    def sample(self, cell: Cell, index: int) -> Sample:
        """See `Suite`."""
        if self._config.unit == "lines":
            return self._with_lines(cell, index, cell.length)
        if self._config.form == "compact":
            lines = lines_within(cell.length - self._prompter.template_tokens, queries=1)
            return self._with_lines(cell, index, lines)
        return self._filling(cell, index)

    def max_new_tokens(self, cell: Cell) -> int:
        """See `Suite`."""
        return VALUE_DIGITS if self._config.form == "compact" else self._config.max_new_tokens

    def chance(self, sample: Sample) -> float:
        """Of naming the value of any line."""
        return 1 / sample.details["lines"]

    def items(self, sample: Sample) -> int:
        """Lines."""
        return sample.details["lines"]

    def _with_lines(self, cell: Cell, index: int, lines: int) -> Sample:
        config, generator = self._config, sample_generator(self._config.seed, cell, index)
        if config.form == "compact":
            return self._compact.sample(self._compact.draw(generator, lines=lines, queries=1, depth=cell.depth))
        return draw_lines(
            generator,
            lines=lines,
            index_kind=config.index_kind,
            words=self._words,
            answer_start=config.answer_start,
            depth=cell.depth,
        )

    def _filling(self, cell: Cell, index: int) -> Sample:
        """As many lines as leave room for the answer; how many tokens a line takes depends on its words."""
        budget = cell.length - self._config.max_new_tokens
        fixed, a_line = self._tokens_of_text
        lines = int((budget - fixed) / a_line)
        while lines >= 1:
            sample = self._with_lines(cell, index, lines)
            excess = len(self._prompter.prompt(sample)) - budget
            if excess <= 0:
                return sample
            lines -= max(1, round(excess / a_line))
        raise ValueError(
            f"{cell.length} tokens hold no line besides header, question and {self._config.max_new_tokens} tokens of "
            f"an answer, which take {fixed + self._config.max_new_tokens:.0f}; ask for a greater length"
        )

    @functools.cached_property
    def _tokens_of_text(self) -> tuple[float, float]:
        """Of everything but the lines, and of a line, by records of 1 and of 101 lines."""
        cell = Cell(task="tokens", length=0, depth=None)
        one, many = (len(self._prompter.prompt(self._with_lines(cell, 0, lines))) for lines in (1, 101))
        a_line = (many - one) / 100
        return one - a_line, a_line


def check_grid(lengths: tuple[int, ...], depths: tuple[float, ...] | None, samples: int) -> None:
    """Raises ValueError for lengths, depths or numbers of samples that are no grid of cells."""
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
        raise ValueError(f"suite.lengths must be positive and ascend, got {list(lengths)}")
    if depths is not None and (
        not depths or list(depths) != sorted(set(depths)) or not 0 <= depths[0] <= depths[-1] <= 1
    ):
        raise ValueError(f"suite.depths must lie in [0, 1] and ascend, got {list(depths)}")
    if samples < 1:
        raise ValueError(f"suite.samples must be at least 1, got {samples}")


def grid(task: str, lengths: tuple[int, ...], depths: tuple[float, ...] | None) -> tuple[Cell, ...]:
    """Cells by length, then by depth."""
    return tuple(Cell(task=task, length=length, depth=depth) for length in lengths for depth in (depths or (None,)))

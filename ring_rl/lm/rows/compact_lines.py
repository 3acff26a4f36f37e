"""Records of compact lines, with questions after them."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from ring_rl.lm.key_words import WordList, key_words
from ring_rl.lm.rows.loss_on import LossOn, weighted
from ring_rl.lm.rows.short_records import ShortRecords
from ring_rl.lm.tasks.compact_lines import TOKENS_PER_LINE, CompactLines, lines_within
from ring_rl.lm.token_batch import TokenBatch
from ring_rl.lm.tokenizer.protocol import Tokenizer

__all__ = ["CompactLinesConfig", "CompactLinesData"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompactLinesConfig:
    """Fresh records of lines such as `LINE quiet river IS 4 0 7 1 9`.

    Attributes:
        name: "compact_lines".
        words: Which list the keys are from; the model's tokenizer must be of the same.
        queries: Questions after a record, at most; each about another line.
        fewest_lines: Of the short records.
        loss_on: "answers" learns the digits after questions, "everywhere" the lines too, whose digits nobody can know.
    """

    name: Literal["compact_lines"]
    words: WordList
    queries: int
    fewest_lines: int
    loss_on: LossOn

    def __post_init__(self) -> None:
        for name in ("queries", "fewest_lines"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class CompactLinesData:
    """A `TrainingData` of compact lines.

    Raises:
        ValueError: the tokenizer is not that of these words.
    """

    def __init__(self, config: CompactLinesConfig, tokenizer: Tokenizer):
        self._config, self._lines = config, CompactLines(key_words(config.words))
        if tokenizer.to_mapping() != self._lines.tokenizer.to_mapping():
            raise ValueError(
                f"training_data.name=compact_lines with words={config.words} is written in its own words, not in those "
                "of the model's tokenizer; set tokenizer@model.tokenizer=compact_lines "
                f"model.tokenizer.words={config.words}"
            )

    def row_length(self, *, length: int | None, lines: int | None) -> int:
        """`length`, or what a record of so many lines and its questions take."""
        if length is not None:
            return length
        assert lines is not None
        return TOKENS_PER_LINE * (lines + min(lines, self._config.queries))

    def rows(self, *, length: int, lines: int | None, short_share: float, seed: tuple[int, ...]) -> CompactLineRows:
        """Rows of T = `length` tokens, of records of `lines` lines or as many as fit."""
        queries = self._config.queries
        if lines is None:
            # Few lines have as many questions as lines.
            blocks = length // TOKENS_PER_LINE
            lines = blocks // 2 if blocks <= 2 * queries else lines_within(length, queries=queries)
        rows = CompactLineRows(
            self._lines, self._config, length=length, lines=lines, short_share=short_share, seed=seed
        )
        # More lines than there are keys must be known before anything is compiled.
        rows.row(0)
        return rows


class CompactLineRows:
    """Row i is a pure function of (seed, i): one record, padded on its right.

    A share of the rows is short: its record has log-uniformly many lines from `fewest_lines` to `lines`, and the room
    left is for more questions about it.
    """

    def __init__(
        self,
        compact: CompactLines,
        config: CompactLinesConfig,
        *,
        length: int,
        lines: int,
        short_share: float,
        seed: tuple[int, ...],
    ):
        self._compact, self._config, self._length, self._lines = compact, config, length, lines
        self._short = ShortRecords(share=short_share, fewest_lines=config.fewest_lines, lines=lines)
        self._seed = seed

    def row(self, index: int) -> TokenBatch:
        """Row `index` without a batch axis, in natural order."""
        generator = np.random.default_rng([*self._seed, index])
        lines, queries = self._lines, min(self._lines, self._config.queries)
        if (fewer := self._short.draw(generator)) is not None:
            lines, queries = fewer, min(fewer, self._length // TOKENS_PER_LINE - fewer)
        record = self._compact.draw(generator, lines=lines, queries=queries)
        return weighted(self._compact.row(record, length=self._length), self._config.loss_on)

"""What a language model is trained on, as a configuration names it."""

from __future__ import annotations

from typing import Protocol

from ring_rl.lm.rows.compact_lines import CompactLinesConfig, CompactLinesData
from ring_rl.lm.rows.documents import DocumentRowsConfig, DocumentsData
from ring_rl.lm.tokenizer.protocol import Tokenizer
from ring_rl.training.input import RowSource

__all__ = ["TrainingData", "TrainingDataConfig", "open_training_data", "vocabulary_size"]

TrainingDataConfig = CompactLinesConfig | DocumentRowsConfig


class TrainingData(Protocol):
    """Makes rows of any length, a stage at a time."""

    def row_length(self, *, length: int | None, lines: int | None) -> int:
        """Tokens that a row of a stage needs; exactly one of the two is given.

        Raises:
            ValueError: the data cannot be measured so.
        """
        ...

    def rows(self, *, length: int, lines: int | None, short_share: float, seed: tuple[int, ...]) -> RowSource:
        """`TokenBatch`es of `length` tokens, each a pure function of (seed, index).

        Args:
            length: T, as `row_length` gave it or longer.
            lines: of a record; None: as many as fit.
            short_share: share of the rows whose records are shorter.
            seed: numbers that tell the streams of a run apart.

        Raises:
            ValueError, OSError: there is nothing to make rows of, or they cannot be made so.
        """
        ...


def open_training_data(config: TrainingDataConfig, tokenizer: Tokenizer, *, progress: bool) -> TrainingData:
    """The data that a configuration names, in a tokenizer's ids.

    Raises:
        ValueError, ImportError: the tokenizer does not fit, or a library is not installed.
    """
    match config:
        case CompactLinesConfig():
            return CompactLinesData(config, tokenizer)
        case DocumentRowsConfig():
            return DocumentsData(config, tokenizer, progress=progress)


def vocabulary_size(config: TrainingDataConfig, tokenizer: Tokenizer) -> int:
    """Ids that the data need: the tokenizer's, and those of codes besides text."""
    if isinstance(config, DocumentRowsConfig):
        return DocumentsData.vocabulary_size(config, tokenizer)
    return tokenizer.vocabulary_size

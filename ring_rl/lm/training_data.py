"""What a language model is trained on, as a configuration names it."""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

from ring_rl.lm.rows.compact_lines import CompactLinesConfig, CompactLinesData
from ring_rl.lm.rows.documents import DocumentRowsConfig, DocumentsData
from ring_rl.lm.rows.longeval import LongEvalConfig, LongEvalData
from ring_rl.lm.rows.mixture import MixedPart, MixedRows
from ring_rl.lm.tokenizer.protocol import Tokenizer
from ring_rl.training.input import RowSource

__all__ = [
    "MixtureConfig",
    "MixturePart",
    "TrainingData",
    "TrainingDataConfig",
    "data_places",
    "open_training_data",
    "vocabulary_size",
]

PartConfig = CompactLinesConfig | LongEvalConfig | DocumentRowsConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixturePart:
    """One kind of data in a mixture.

    Attributes:
        share: of the rows, in any unit.
        target_weight: what each of its targets counts in the loss. The loss is a mean over targets of all rows, so a
            part that learns from few of its tokens, as answers are, weighs little at 1.
        data: which.
    """

    share: float
    target_weight: float
    data: PartConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Rows of several kinds, all as long as the stage says.

    Attributes:
        name: "mixture".
        parts: by name.
    """

    name: Literal["mixture"]
    parts: dict[str, MixturePart]


TrainingDataConfig = CompactLinesConfig | LongEvalConfig | DocumentRowsConfig | MixtureConfig


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


class MixtureData:
    """A `TrainingData` of several; a stage's short records are for those parts that have records."""

    def __init__(self, parts: dict[str, TrainingData], config: MixtureConfig):
        self._parts, self._config = parts, config

    def row_length(self, *, length: int | None, lines: int | None) -> int:
        """`length`.

        Raises:
            ValueError: lines are asked for.
        """
        if length is None:
            raise ValueError(f"the parts of a mixture share a length in tokens, got lines={lines}; give it as length")
        return length

    def rows(self, *, length: int, lines: int | None, short_share: float, seed: tuple[int, ...]) -> MixedRows:
        """Rows of `length` tokens."""
        parts = {}
        for number, (name, part) in enumerate(self._parts.items()):
            rows = part.rows(
                length=length,
                lines=lines,
                short_share=0.0 if isinstance(part, DocumentsData) else short_share,
                seed=(*seed, number),
            )
            config = self._config.parts[name]
            parts[name] = MixedPart(rows=rows, share=config.share, target_weight=config.target_weight)
        return MixedRows(parts, seed=(*seed, len(self._parts)))


def open_training_data(config: TrainingDataConfig, tokenizer: Tokenizer, *, progress: bool) -> TrainingData:
    """The data that a configuration names, in a tokenizer's ids.

    Raises:
        ValueError, ImportError: the tokenizer does not fit, or a library is not installed.
    """
    match config:
        case CompactLinesConfig():
            return CompactLinesData(config, tokenizer)
        case LongEvalConfig():
            return LongEvalData(config, tokenizer)
        case DocumentRowsConfig():
            return DocumentsData(config, tokenizer, progress=progress)
        case MixtureConfig():
            parts = {
                name: open_training_data(part.data, tokenizer, progress=progress) for name, part in config.parts.items()
            }
            return MixtureData(parts, config)


def vocabulary_size(config: TrainingDataConfig, tokenizer: Tokenizer) -> int:
    """Ids that the data need: the tokenizer's, and those of codes besides text."""
    match config:
        case DocumentRowsConfig():
            return DocumentsData.vocabulary_size(config, tokenizer)
        case MixtureConfig():
            sizes = [vocabulary_size(part.data, tokenizer) for part in config.parts.values()]
            return max([tokenizer.vocabulary_size, *sizes])
        case _:
            return tokenizer.vocabulary_size


def data_places(config: TrainingDataConfig, *, path: str) -> tuple[str, ...]:
    """Dotted paths that say where data lie and not what they are: a run may go on when a folder has moved.

    Args:
        config: of the configuration's key `path`.
        path: dotted.
    """
    match config:
        case DocumentRowsConfig():
            return f"{path}.documents.token_cache", f"{path}.documents.source.root"
        case MixtureConfig():
            parts = config.parts.items()
            return tuple(
                place for name, part in parts for place in data_places(part.data, path=f"{path}.parts.{name}.data")
            )
        case _:
            return ()

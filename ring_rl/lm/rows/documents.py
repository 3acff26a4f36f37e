"""Rows of packed documents."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from ring_rl.lm.documents.load import DocumentsConfig, mixed_vocabulary, packed_documents, read_tokens
from ring_rl.lm.documents.packed_documents import PackedDocuments
from ring_rl.lm.documents.tokenized import TokenizedDocuments
from ring_rl.lm.tokenizer.protocol import Tokenizer

__all__ = ["DocumentRowsConfig", "DocumentsData"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentRowsConfig:
    """Documents that share rows.

    Attributes:
        name: "documents".
        documents: Which, and how they are packed.
    """

    name: Literal["documents"]
    documents: DocumentsConfig


class DocumentsData:
    """A `TrainingData` of packed documents; the loss is everywhere, as the documents weigh it."""

    def __init__(self, config: DocumentRowsConfig, tokenizer: Tokenizer, *, progress: bool):
        self._config, self._tokenizer, self._progress = config, tokenizer, progress

    @staticmethod
    def vocabulary_size(config: DocumentRowsConfig, tokenizer: Tokenizer) -> int:
        """Ids of text and of the modalities' codes."""
        return mixed_vocabulary(config.documents, tokenizer).size

    def row_length(self, *, length: int | None, lines: int | None) -> int:
        """`length`.

        Raises:
            ValueError: lines are asked for.
        """
        if length is None:
            raise ValueError(f"documents have no lines to count, got lines={lines}; give the stage a length")
        return length

    def rows(self, *, length: int, lines: int | None, short_share: float, seed: tuple[int, ...]) -> PackedDocuments:
        """Rows of `length` tokens."""
        del lines
        if short_share > 0:
            raise ValueError(
                f"documents are as long as they are, got short_share={short_share}; set it to 0, and mix in another "
                f"set of documents for shorter ones (training_data.name=mixture)"
            )
        return packed_documents(self._tokens, self._config.documents, self._tokenizer, row_length=length, seed=seed)

    @functools.cached_property
    def _tokens(self) -> TokenizedDocuments:
        """Read once, for all stages."""
        return read_tokens(self._config.documents, self._tokenizer, progress=self._progress)

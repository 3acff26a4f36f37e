"""Documents as tokens, in memory or mapped from files, and any stretch of any of them by index."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ring_rl.typing import Int, Int32, Shaped

__all__ = ["TokenizedDocument", "TokenizedDocuments", "TokenizedPart"]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """One document.

    Attributes:
        name: where it comes from.
        tokens: its ids.
        kinds: what each token is as the loss sees it (`ring_rl.lm.documents.modality`).
    """

    name: str
    tokens: Int32[np.ndarray, " _"]
    kinds: Shaped[np.ndarray, " _"]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedPart:
    """Several documents, one after another in flat arrays, which may be mapped from files.

    Attributes:
        names: of the documents.
        lengths: tokens of each.
        tokens: of all of them, of an unsigned type that holds the vocabulary.
        kinds: of all of them.
        kind_counts: of each document, how many of its tokens but the first are of each kind.
    """

    names: tuple[str, ...]
    lengths: Int[np.ndarray, " N"]
    tokens: Int[np.ndarray, " _"]
    kinds: Shaped[np.ndarray, " _"]
    kind_counts: Int[np.ndarray, "N kinds"]

    @classmethod
    def of(cls, documents: Sequence[TokenizedDocument], *, vocabulary_size: int, kinds: int) -> TokenizedPart:
        """The documents, joined."""
        dtype = np.uint16 if vocabulary_size <= 2**16 else np.uint32
        return cls(
            names=tuple(document.name for document in documents),
            lengths=np.array([len(document.tokens) for document in documents], np.int64),
            tokens=np.concatenate([document.tokens.astype(dtype) for document in documents]),
            kinds=np.concatenate([document.kinds for document in documents]),
            kind_counts=np.stack([np.bincount(document.kinds[1:], minlength=kinds) for document in documents]),
        )


class TokenizedDocuments:
    """Documents by index.

    Args:
        parts: hold them, in order.
        vocabulary_size: ids are below it.
    """

    def __init__(self, parts: Sequence[TokenizedPart], *, vocabulary_size: int):
        self.vocabulary_size = vocabulary_size
        self._parts = tuple(parts)
        self._part_of = np.repeat(np.arange(len(parts)), [len(part.names) for part in parts])
        begins = [np.cumsum(part.lengths) - part.lengths for part in parts]
        self._begins = np.concatenate([np.zeros(0, np.int64), *begins])
        self.names = tuple(name for part in parts for name in part.names)
        self.lengths = np.concatenate([np.zeros(0, np.int64), *(part.lengths for part in parts)])
        self._kind_counts = (
            np.concatenate([part.kind_counts for part in parts]) if parts else np.zeros((0, 0), np.int64)
        )

    def __len__(self) -> int:
        return len(self.names)

    def tokens(self, index: int, start: int, stop: int) -> Int32[np.ndarray, " _"]:
        """Tokens `start` to `stop` of document `index`; fewer where it ends before."""
        return self._cut("tokens", index, start, stop).astype(np.int32)

    def kinds(self, index: int, start: int, stop: int) -> Shaped[np.ndarray, " _"]:
        """Their kinds."""
        return self._cut("kinds", index, start, stop)

    def kind_counts(self, index: int) -> Int[np.ndarray, " kinds"]:
        """How many of the document's tokens but the first are of each kind."""
        return self._kind_counts[index]

    def _cut(self, array: str, index: int, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop:
            raise ValueError(f"a stretch of tokens begins at 0 or later and ends no earlier, got {start} to {stop}")
        begin = int(self._begins[index])
        held = getattr(self._parts[self._part_of[index]], array)
        return np.asarray(held[begin + start : begin + min(stop, int(self.lengths[index]))])

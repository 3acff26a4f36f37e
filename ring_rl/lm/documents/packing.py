"""Which piece of which document goes into which row: planned once, from the documents' lengths alone."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from ring_rl.typing import Int

__all__ = ["LongDocuments", "LossWeights", "PackingConfig", "Piece", "cut_into_pieces", "fill_rows"]

LongDocuments = Literal["split", "cut"]
LossWeights = Literal["per_token", "per_document"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """How documents share rows.

    Attributes:
        long_documents: of a document longer than a row, "split" makes pieces of a row's length, each of which is read
            apart from the others, and "cut" keeps the first.
        loss_weights: "per_token": every token counts as its kind says, so that long documents count more;
            "per_document": a document's weights are divided by their sum, so that every document counts 1, as where
            each has a row of its own and rows are averaged; packing then changes no loss (arXiv:2402.08268 weights so
            to that end). Of a split document all pieces count 1 together.
        open_rows: rows that are filled at a time; a document goes into the fullest one that has room. 1 fills one row
            after another, more leave less padding.
    """

    long_documents: LongDocuments
    loss_weights: LossWeights
    open_rows: int

    def __post_init__(self) -> None:
        if self.open_rows < 1:
            raise ValueError(f"packing.open_rows must be at least 1, got {self.open_rows}")


class Piece(NamedTuple):
    """The tokens `start` to `stop` of a document, each of which has the token after it as its target."""

    document: int
    start: int
    stop: int


def cut_into_pieces(
    lengths: Sequence[int] | Int[np.ndarray, " N"], *, row_length: int, long_documents: LongDocuments
) -> list[Piece]:
    """The pieces of all documents, in order; documents of fewer than 2 tokens have nothing to predict, and none.

    A document of n tokens has n - 1 that are read, and as many targets; its last token is a target only. With "split"
    a piece ends where the next begins, and no target is lost.

    Raises:
        ValueError: rows have no place at all.
    """
    if row_length < 1:
        raise ValueError(f"rows need at least 1 token, got {row_length}")
    pieces = []
    for document, length in enumerate(map(int, lengths)):
        read = length - 1 if long_documents == "split" else min(length - 1, row_length)
        pieces += [Piece(document, start, min(start + row_length, read)) for start in range(0, read, row_length)]
    return pieces


def fill_rows(sizes: Sequence[int], *, row_length: int, open_rows: int) -> list[list[int]]:
    """Best-fit packing: which pieces share a row, in the order in which they came.

    Each goes into the fullest of `open_rows` rows that has room for it; if none has, the fullest is closed and
    another opened. O(pieces x log(open_rows)) comparisons.

    Args:
        sizes: of the pieces, none above `row_length`.
        row_length: T.
        open_rows: rows open at a time.
    """
    rows: list[list[int]] = []
    # (free places, row), ascending: the fullest row first.
    free: list[tuple[int, int]] = []
    for piece, size in enumerate(sizes):
        at = bisect.bisect_left(free, (size, -1))
        if at < len(free):
            space, row = free.pop(at)
        else:
            if len(free) == open_rows:
                free.pop(0)
            space, row = row_length, len(rows)
            rows.append([])
        rows[row].append(piece)
        if space > size:
            bisect.insort(free, (space - size, row))
    return rows

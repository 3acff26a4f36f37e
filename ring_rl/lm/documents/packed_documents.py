"""Rows of packed documents, by index: what a training reads."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from ring_rl.lm.documents.packing import PackingConfig, Piece, cut_into_pieces, fill_rows
from ring_rl.lm.documents.tokenized import TokenizedDocuments
from ring_rl.lm.token_batch import TokenBatch
from ring_rl.typing import Float32, Int

__all__ = ["PackedDocuments"]


class PackedDocuments:
    """Rows of T tokens, a `ring_rl.training.input.RowSource`: row i is a pure function of (seed, i).

    Documents a, b and c in a row of T = 12 (a hyphen is padding):

        tokens        a0 a1 a2 a3  b0 b1 b2  c0 c1 c2  -  -
        targets       a1 a2 a3 a4  b1 b2 b3  c1 c2 c3 -1 -1
        positions      0  1  2  3   0  1  2   0  1  2  0  0
        segment_ids    0  0  0  0   1  1  1   2  2  2 -1 -1
        weights        of the targets' kinds; 0 for padding

    No document sees another one, so who shares a row changes no gradient but through the batch it falls into. Hence
    the rows are planned once; every epoch brings them all, in an order of its own.

    Args:
        documents: the tokens.
        row_length: T.
        config: how documents share rows.
        kind_weights: what a token of each kind counts (`MixedVocabulary.weights`).
        seed: of which documents meet in a row, and of the rows' order; several numbers tell the streams of a run apart.

    Raises:
        ValueError: there is nothing to predict in any document.
    """

    def __init__(
        self,
        documents: TokenizedDocuments,
        *,
        row_length: int,
        config: PackingConfig,
        kind_weights: Float32[np.ndarray, " kinds"],
        seed: int | tuple[int, ...],
    ):
        self._documents, self._length, self._config = documents, row_length, config
        self._kind_weights = kind_weights
        self._seed = (seed,) if isinstance(seed, int) else seed
        order = np.random.default_rng([*self._seed, 0]).permutation(len(documents))
        pieces = [
            Piece(int(order[piece.document]), piece.start, piece.stop)
            for piece in cut_into_pieces(
                documents.lengths[order], row_length=row_length, long_documents=config.long_documents
            )
        ]
        if not pieces:
            raise ValueError(
                f"there is nothing to learn from: none of {len(documents)} documents has 2 tokens or more; "
                "name other documents, or set documents.begin_token=true"
            )
        sizes = [piece.stop - piece.start for piece in pieces]
        rows = fill_rows(sizes, row_length=row_length, open_rows=config.open_rows)
        # Arrays, as a list of every piece of a large corpus would take a hundred bytes each: row n has the pieces
        # begins[n] to begins[n + 1].
        self._pieces = np.array(pieces, np.int64)[np.concatenate([np.array(row) for row in rows])]
        self._begins = np.cumsum([0, *map(len, rows)])
        self._filled = sum(sizes)
        # Small, and the same for all rows that are under way.
        self._order_of_epoch = functools.lru_cache(maxsize=2)(self._make_order)

    @property
    def rows_per_epoch(self) -> int:
        """After so many rows every document has been read once."""
        return len(self._begins) - 1

    @property
    def padding_share(self) -> float:
        """Share of the places that hold no token."""
        return 1.0 - self._filled / (self._length * self.rows_per_epoch)

    def row(self, index: int) -> TokenBatch:
        """Row `index` without a batch axis, in natural order."""
        return self.packed(self.pieces(index))

    def pieces(self, index: int) -> Sequence[Piece]:
        """What row `index` holds, in order; the n-th has the segment id n."""
        epoch, number = divmod(index, self.rows_per_epoch)
        row = int(self._order_of_epoch(epoch)[number])
        return tuple(Piece(*each) for each in self._pieces[self._begins[row] : self._begins[row + 1]].tolist())

    def packed(self, pieces: Sequence[Piece]) -> TokenBatch:
        """These pieces as one row.

        Raises:
            ValueError: they are longer than a row together.
        """
        filled = sum(piece.stop - piece.start for piece in pieces)
        if filled > self._length:
            raise ValueError(f"pieces of {filled} tokens do not fit into a row of {self._length}")
        counts = lambda value: np.full(self._length, value, np.int32)  # noqa: E731
        tokens, targets, positions, segment_ids = counts(0), counts(-1), counts(0), counts(-1)
        weights = np.zeros(self._length, np.float32)
        at = 0
        for segment, piece in enumerate(pieces):
            here = slice(at, at + piece.stop - piece.start)
            ids = self._documents.tokens(piece.document, piece.start, piece.stop + 1)
            tokens[here], targets[here] = ids[:-1], ids[1:]
            positions[here] = np.arange(len(ids) - 1)
            segment_ids[here] = segment
            weights[here] = self._weights(piece)
            at = here.stop
        return TokenBatch(
            tokens=tokens,
            targets=targets,
            weights=weights,
            positions=positions,
            segment_ids=segment_ids,
            answer_ids=None,
        )

    def _weights(self, piece: Piece) -> Float32[np.ndarray, " _"]:
        """Of the piece's targets."""
        kinds = self._documents.kinds(piece.document, piece.start + 1, piece.stop + 1)
        weights = self._kind_weights[kinds]
        if self._config.loss_weights == "per_token":
            return weights
        if self._config.long_documents == "split":
            total = float(self._documents.kind_counts(piece.document) @ self._kind_weights.astype(np.float64))
        else:
            total = float(weights.sum(dtype=np.float64))
        return weights / np.float32(total) if total > 0 else weights

    def _make_order(self, epoch: int) -> Int[np.ndarray, " rows"]:
        """Which planned row is the n-th of an epoch."""
        return np.random.default_rng([*self._seed, 1, epoch]).permutation(self.rows_per_epoch)

"""Rows drawn from several kinds of data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ring_rl.lm.token_batch import TokenBatch
from ring_rl.training.input import RowSource

__all__ = ["MixedRows"]


class MixedRows:
    """Row i is row i of one of the parts, which one is drawn by (seed, i).

    Args:
        parts: sources of `TokenBatch` rows of one length.
        shares: of each, in any unit.
        seed: of the draws.

    Raises:
        ValueError: there is no part, or shares are not positive.
    """

    def __init__(self, parts: Mapping[str, RowSource], shares: Sequence[float], *, seed: tuple[int, ...]):
        if not parts:
            raise ValueError("a mixture needs at least one part; name one in training_data.parts")
        for name, share in zip(parts, shares, strict=True):
            if not 0 < share < float("inf"):
                raise ValueError(f"training_data.parts.{name}.share must be positive, got {share}; leave the part out")
        self._parts, self._seed = list(parts.values()), seed
        self._until = np.cumsum(shares) / np.sum(shares)

    def row(self, index: int) -> TokenBatch:
        """Row `index` without a batch axis, in natural order; segments and answers are always there."""
        number = np.random.default_rng([*self._seed, index]).random()
        part = min(int(np.searchsorted(self._until, number, side="right")), len(self._parts) - 1)
        row = self._parts[part].row(index)
        absent = {
            "segment_ids": np.zeros_like(row.tokens) if row.segment_ids is None else row.segment_ids,
            "answer_ids": np.full_like(row.tokens, -1) if row.answer_ids is None else row.answer_ids,
        }
        return dataclasses.replace(row, **absent)

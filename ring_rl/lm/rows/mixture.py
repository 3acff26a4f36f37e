"""Rows drawn from several kinds of data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from ring_rl.lm.token_batch import TokenBatch
from ring_rl.training.input import RowSource

__all__ = ["MixedPart", "MixedRows"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedPart:
    """One kind of rows.

    Attributes:
        rows: of `TokenBatch`es.
        share: of all rows, in any unit.
        target_weight: what the weights of its targets are multiplied by.
    """

    rows: RowSource
    share: float
    target_weight: float


class MixedRows:
    """Row i is row i of one of the parts, which one is drawn by (seed, i).

    Args:
        parts: whose rows are of one length.
        seed: of the draws.

    Raises:
        ValueError: there is no part, or shares or weights are not positive.
    """

    def __init__(self, parts: Mapping[str, MixedPart], *, seed: tuple[int, ...]):
        if not parts:
            raise ValueError("a mixture needs at least one part; name one in training_data.parts")
        for name, part in parts.items():
            for field in ("share", "target_weight"):
                if not 0 < (value := getattr(part, field)) < float("inf"):
                    raise ValueError(
                        f"training_data.parts.{name}.{field} must be positive, got {value}; leave the part out"
                    )
        self._parts, self._seed = list(parts.values()), seed
        shares = [part.share for part in self._parts]
        self._until = np.cumsum(shares) / np.sum(shares)

    def row(self, index: int) -> TokenBatch:
        """Row `index` without a batch axis, in natural order; segments and answers are always there."""
        number = np.random.default_rng([*self._seed, index]).random()
        part = min(int(np.searchsorted(self._until, number, side="right")), len(self._parts) - 1)
        row = self._parts[part].rows.row(index)
        present = {
            "weights": row.weights * np.float32(self._parts[part].target_weight),
            "segment_ids": np.zeros_like(row.tokens) if row.segment_ids is None else row.segment_ids,
            "answer_ids": np.full_like(row.tokens, -1) if row.answer_ids is None else row.answer_ids,
        }
        return dataclasses.replace(row, **present)

import numpy as np
import pytest

from ring_rl.lm.rows.mixture import MixedRows
from ring_rl.lm.token_batch import TokenBatch


class Constant:
    """Rows that say which source and index they are of."""

    def __init__(self, source, *, packed):
        self._source, self._packed = source, packed

    def row(self, index):
        full = lambda value: np.full(4, value, np.int32)  # noqa: E731
        return TokenBatch(
            tokens=full(self._source),
            targets=full(index),
            weights=np.ones(4, np.float32),
            positions=np.arange(4, dtype=np.int32),
            segment_ids=full(7) if self._packed else None,
            answer_ids=None if self._packed else full(3),
        )


def test_rows_come_from_each_part_by_its_share_and_all_have_one_structure():
    rows = MixedRows({"a": Constant(0, packed=True), "b": Constant(1, packed=False)}, [3.0, 1.0], seed=(0,))
    drawn = [rows.row(index) for index in range(400)]
    assert 0.17 < np.mean([row.tokens[0] for row in drawn]) < 0.33
    for index, row in enumerate(drawn):
        assert row.targets[0] == index
        assert (row.segment_ids[0], row.answer_ids[0]) == ((7, -1) if row.tokens[0] == 0 else (0, 3))
    assert [row.tokens[0] for row in drawn] == [rows.row(index).tokens[0] for index in range(400)]


def test_shares_are_positive():
    with pytest.raises(ValueError, match=r"training_data\.parts\.a\.share must be positive, got 0"):
        MixedRows({"a": Constant(0, packed=True)}, [0.0], seed=(0,))
    with pytest.raises(ValueError, match="at least one part"):
        MixedRows({}, [], seed=(0,))

import numpy as np
import pytest

from ring_rl.lm.rows.mixture import MixedPart, MixedRows
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


def part(source, *, packed=True, share=1.0, target_weight=1.0):
    return MixedPart(rows=Constant(source, packed=packed), share=share, target_weight=target_weight)


def test_rows_come_from_each_part_by_its_share_and_all_have_one_structure():
    parts = {"a": part(0, share=3.0), "b": part(1, packed=False, target_weight=2.5)}
    rows = MixedRows(parts, seed=(0,))
    drawn = [rows.row(index) for index in range(400)]
    assert 0.17 < np.mean([row.tokens[0] for row in drawn]) < 0.33
    for index, row in enumerate(drawn):
        assert row.targets[0] == index
        assert row.weights.dtype == np.float32
        assert row.weights.tolist() == [1.0 if row.tokens[0] == 0 else 2.5] * 4
        assert (row.segment_ids[0], row.answer_ids[0]) == ((7, -1) if row.tokens[0] == 0 else (0, 3))
    assert [row.tokens[0] for row in drawn] == [rows.row(index).tokens[0] for index in range(400)]


@pytest.mark.parametrize("field", ["share", "target_weight"])
def test_shares_and_weights_are_positive(field):
    with pytest.raises(ValueError, match=rf"training_data\.parts\.a\.{field} must be positive, got 0"):
        MixedRows({"a": part(0, **{field: 0.0})}, seed=(0,))


def test_there_is_a_part():
    with pytest.raises(ValueError, match="at least one part"):
        MixedRows({}, seed=(0,))

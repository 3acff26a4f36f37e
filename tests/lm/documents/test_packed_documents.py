"""Rows of packed documents: what each place holds, and that an epoch holds everything once."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.lm.documents.modality import KIND_TEXT, KIND_UNWEIGHTED
from ring_rl.lm.documents.packed_documents import PackedDocuments
from ring_rl.lm.documents.packing import PackingConfig, Piece
from ring_rl.lm.documents.tokenized import TokenizedDocument, TokenizedDocuments, TokenizedPart

VISION = 2
KIND_WEIGHTS = np.array([0.0, 1.0, 0.25], np.float32)


def tokenized(*documents):
    """Documents given as (ids, kinds)."""
    parts = [
        TokenizedPart.of(
            [TokenizedDocument(f"document {number}", np.array(ids, np.int32), np.array(kinds, np.uint8))],
            vocabulary_size=1000,
            kinds=len(KIND_WEIGHTS),
        )
        for number, (ids, kinds) in enumerate(documents)
    ]
    return TokenizedDocuments(parts, vocabulary_size=1000)


def plain(*documents):
    return tokenized(*((ids, [KIND_TEXT] * len(ids)) for ids in documents))


def packed(documents, *, row_length, long_documents="split", loss_weights="per_token", open_rows=1, seed=0):
    return PackedDocuments(
        documents,
        row_length=row_length,
        config=PackingConfig(long_documents=long_documents, loss_weights=loss_weights, open_rows=open_rows),
        kind_weights=KIND_WEIGHTS,
        seed=seed,
    )


def numbered(*lengths):
    """Documents whose every token is unique."""
    ids = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    return plain(*(each.tolist() for each in ids))


def test_what_each_place_of_a_row_holds():
    documents = numbered(5, 4, 3)
    row = packed(documents, row_length=11).packed([Piece(0, 0, 4), Piece(2, 0, 2), Piece(1, 1, 3)])
    assert row.tokens.tolist() == [0, 1, 2, 3, 9, 10, 6, 7, 0, 0, 0]
    assert row.targets.tolist() == [1, 2, 3, 4, 10, 11, 7, 8, -1, -1, -1]
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 0, 0, 0]
    assert row.segment_ids.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, -1, -1, -1]
    assert row.weights.tolist() == [1] * 8 + [0] * 3
    assert row.weights.dtype == np.float32
    assert {array.dtype for array in (row.tokens, row.targets, row.positions, row.segment_ids)} == {np.dtype(np.int32)}


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda lengths: max(lengths) > 1),
    st.integers(1, 10),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_an_epoch_holds_every_target_once(lengths, row_length, open_rows, seed):
    rows = packed(numbered(*lengths), row_length=row_length, open_rows=open_rows, seed=seed)
    ends = np.cumsum(lengths)
    firsts = {int(end - length) for end, length in zip(ends, lengths, strict=True) if length}
    everything = collections.Counter(set(range(sum(lengths))) - firsts)
    for epoch in range(2):
        begin = epoch * rows.rows_per_epoch
        epoch_rows = [rows.row(begin + i) for i in range(rows.rows_per_epoch)]
        targets = np.concatenate([row.targets for row in epoch_rows])
        assert collections.Counter(targets[targets >= 0].tolist()) == everything
        # A target follows its token, and both are of one document.
        tokens = np.concatenate([row.tokens for row in epoch_rows])
        assert (targets[targets >= 0] == tokens[targets >= 0] + 1).all()
        filled = np.concatenate([row.segment_ids for row in epoch_rows]) >= 0
        assert np.isclose(rows.padding_share, 1 - filled.mean())


def test_rows_are_a_function_of_the_seed_and_the_index():
    documents = numbered(*range(2, 30))
    one, same, other = (packed(documents, row_length=32, open_rows=4, seed=seed) for seed in (1, 1, 2))
    order = [17, 0, one.rows_per_epoch + 3, 5]
    assert [same.row(i).tokens.tolist() for i in order] == [one.row(i).tokens.tolist() for i in order]
    whole = range(one.rows_per_epoch)
    assert [other.row(i).tokens.tolist() for i in whole[:5]] != [one.row(i).tokens.tolist() for i in whole[:5]]
    # The next epoch has the same rows in another order.
    first, second = ([one.pieces(i + begin) for i in whole] for begin in (0, one.rows_per_epoch))
    assert sorted(first) == sorted(second)
    assert first != second


def test_what_is_not_to_be_learnt_has_no_weight():
    documents = tokenized(([1, 2, 3, 4], [KIND_UNWEIGHTED, KIND_UNWEIGHTED, KIND_TEXT, VISION]))
    row = packed(documents, row_length=4).row(0)
    assert row.targets.tolist() == [2, 3, 4, -1]
    assert row.weights.tolist() == [0.0, 1.0, 0.25, 0.0]


@given(st.lists(st.integers(2, 40), min_size=1, max_size=8), st.integers(1, 12), st.sampled_from(["split", "cut"]))
def test_per_document_each_counts_one_over_all_its_pieces(lengths, row_length, long_documents):
    generator = np.random.default_rng(0)
    kinds = [generator.integers(0, 3, size=length) for length in lengths]
    documents = tokenized(*((range(length), each) for length, each in zip(lengths, kinds, strict=True)))
    rows = packed(documents, row_length=row_length, loss_weights="per_document", long_documents=long_documents)
    totals = np.zeros(len(lengths))
    for index in range(rows.rows_per_epoch):
        row = rows.row(index)
        for segment, piece in enumerate(rows.pieces(index)):
            totals[piece.document] += row.weights[row.segment_ids == segment].sum()
    kept = [each[1:] if long_documents == "split" else each[1 : row_length + 1] for each in kinds]
    expected = [float(KIND_WEIGHTS[each].sum() > 0) for each in kept]
    np.testing.assert_allclose(totals, expected, rtol=1e-6)


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(ValueError, match="none of 3 documents has 2 tokens or more"):
        packed(plain([1], [], [2]), row_length=8)
    with pytest.raises(ValueError, match="none of 0 documents"):
        packed(plain(), row_length=8)
    with pytest.raises(ValueError, match="pieces of 6 tokens do not fit into a row of 4"):
        packed(numbered(9), row_length=4).packed([Piece(0, 0, 3), Piece(0, 3, 6)])

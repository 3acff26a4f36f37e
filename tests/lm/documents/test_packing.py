"""Which piece of which document goes into which row."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.lm.documents.packing import PackingConfig, cut_into_pieces, fill_rows

lengths = st.lists(st.integers(0, 40), max_size=20)


@given(lengths, st.integers(1, 12))
def test_split_documents_lose_no_target(lengths, row_length):
    pieces = cut_into_pieces(lengths, row_length=row_length, long_documents="split")
    read = [(piece.document, at) for piece in pieces for at in range(piece.start, piece.stop)]
    # Every token but a document's last one is read once, and has the next one as its target.
    assert read == [(document, at) for document, length in enumerate(lengths) for at in range(length - 1)]
    assert all(0 < piece.stop - piece.start <= row_length for piece in pieces)


@given(lengths, st.integers(1, 12))
def test_cut_documents_keep_their_beginning(lengths, row_length):
    pieces = cut_into_pieces(lengths, row_length=row_length, long_documents="cut")
    assert pieces == [
        (document, 0, min(length - 1, row_length)) for document, length in enumerate(lengths) if length > 1
    ]


@given(st.lists(st.integers(1, 12), max_size=30), st.integers(1, 5))
def test_every_piece_is_in_one_row_that_it_fits(sizes, open_rows):
    rows = fill_rows(sizes, row_length=12, open_rows=open_rows)
    assert sorted(piece for row in rows for piece in row) == list(range(len(sizes)))
    assert all(row == sorted(row) and sum(sizes[piece] for piece in row) <= 12 for row in rows)


@given(st.lists(st.integers(1, 12), max_size=30))
def test_with_one_open_row_documents_stay_in_order(sizes):
    rows = fill_rows(sizes, row_length=12, open_rows=1)
    assert [piece for row in rows for piece in row] == list(range(len(sizes)))
    # A row is closed only when the next piece does not fit.
    for row, following in itertools.pairwise(rows):
        assert sum(sizes[piece] for piece in row) + sizes[following[0]] > 12


def test_the_fullest_row_with_room_is_filled_first():
    assert fill_rows([7, 9, 3, 5], row_length=12, open_rows=2) == [[0, 3], [1, 2]]
    # 8 fits into neither of the two, so the fullest is closed: 3 goes with 8, and 2 only with 7.
    assert fill_rows([7, 9, 8, 3, 2], row_length=12, open_rows=2) == [[0, 4], [1], [2, 3]]


def test_bad_packing_is_refused():
    with pytest.raises(ValueError, match="rows need at least 1 token, got 0"):
        cut_into_pieces([3], row_length=0, long_documents="split")
    with pytest.raises(ValueError, match="open_rows must be at least 1, got 0"):
        PackingConfig(long_documents="split", loss_weights="per_token", open_rows=0)

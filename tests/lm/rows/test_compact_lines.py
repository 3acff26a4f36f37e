import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_rl.lm.key_words import key_words
from ring_rl.lm.rows.compact_lines import CompactLinesConfig, CompactLinesData
from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer
from ring_rl.lm.tokenizer.compact_tokenizer import compact_tokenizer

TOKENIZER = compact_tokenizer(key_words("small"))


def data(**changes):
    settings = {
        "name": "compact_lines",
        "words": "small",
        "queries": 6,
        "fewest_lines": 2,
        "loss_on": "answers",
    }
    return CompactLinesData(CompactLinesConfig(**(settings | changes)), TOKENIZER)


def told(row):
    """The record as key to value, and each question's key with the value that its answer's targets spell."""
    last = TOKENIZER.words[row.targets[row.targets >= 0][-1]]
    words = [*TOKENIZER.decode(row.tokens[row.targets != -1]).split(), last]
    record, asked = {}, []
    for start in range(0, len(words), 9):
        mark, *key, verb = words[start : start + 4]
        assert verb == "IS"
        value = words[start + 4 : start + 9]
        if mark == "LINE":
            record[tuple(key)] = value
        else:
            asked.append((tuple(key), value))
    return record, asked


@settings(max_examples=20, deadline=None)
@given(lines=st.integers(1, 40), index=st.integers(0, 10**9), short_share=st.sampled_from([0.0, 1.0]))
def test_every_answer_is_the_value_of_the_line_that_was_asked_for(lines, index, short_share):
    if lines < 2:
        short_share = 0.0
    source = data()
    length = source.row_length(length=None, lines=lines)
    row = source.rows(length=length, lines=lines, short_share=short_share, seed=(3, 1)).row(index)
    record, asked = told(row)
    assert len(row.tokens) == length
    assert len(record) == lines if short_share == 0 else 2 <= len(record) <= lines
    assert len({key for key, _ in asked}) == len(asked) == row.answer_ids.max() + 1
    for number, (key, value) in enumerate(asked):
        assert record[key] == value
        assert TOKENIZER.decode(row.targets[row.answer_ids == number]).split() == value
    assert row.weights.sum() == 5 * len(asked)


def test_rows_are_a_function_of_seed_and_index():
    length = data().row_length(length=None, lines=10)
    rows = data().rows(length=length, lines=10, short_share=0.5, seed=(0, 1))
    again = data().rows(length=length, lines=10, short_share=0.5, seed=(0, 1))
    other = data().rows(length=length, lines=10, short_share=0.5, seed=(0, 2))
    np.testing.assert_array_equal(rows.row(5).tokens, again.row(5).tokens)
    assert (rows.row(5).tokens != other.row(5).tokens).any()
    assert (rows.row(5).tokens != rows.row(6).tokens).any()


def test_about_the_asked_share_of_the_rows_is_short():
    length = data().row_length(length=None, lines=30)
    rows = data().rows(length=length, lines=30, short_share=0.25, seed=(0,))
    short = [(rows.row(index).targets == -1).sum() > 1 or len(told(rows.row(index))[0]) < 30 for index in range(200)]
    assert 0.15 < np.mean(short) < 0.35


@pytest.mark.parametrize("length", [18, 60, 108, 400])
def test_a_length_is_filled_with_as_many_lines_as_fit(length):
    row = data().rows(length=length, lines=None, short_share=0.0, seed=(0,)).row(0)
    record, asked = told(row)
    used = 9 * (len(record) + len(asked))
    assert length - 18 < used <= length
    assert len(asked) == min(len(record), 6)


def test_the_loss_may_be_everywhere():
    row = data().rows(length=100, lines=4, short_share=0.0, seed=(0,)).row(0)
    everywhere = data(loss_on="everywhere").rows(length=100, lines=4, short_share=0.0, seed=(0,)).row(0)
    np.testing.assert_array_equal(everywhere.weights, row.targets >= 0)
    assert dataclasses.replace(everywhere, weights=row.weights).tokens.tolist() == row.tokens.tolist()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"of the model's tokenizer; set tokenizer@model\.tokenizer=compact_lines"):
        CompactLinesData(
            CompactLinesConfig(name="compact_lines", words="small", queries=1, fewest_lines=1, loss_on="answers"),
            ByteTokenizer(),
        )
    with pytest.raises(ValueError, match="words=wonderwords has more"):
        data().rows(length=10**6, lines=20_000, short_share=0.0, seed=(0,))
    with pytest.raises(ValueError, match="fewest_lines=2"):
        data().rows(length=100, lines=1, short_share=0.5, seed=(0,))
    with pytest.raises(ValueError, match="queries must be at least 1, got 0"):
        data(queries=0)

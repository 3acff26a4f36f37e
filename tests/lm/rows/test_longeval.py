import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_rl.lm.rows.longeval import LongEvalConfig, LongEvalData
from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def data(**changes):
    settings = {
        "name": "longeval",
        "index_kind": "words",
        "words": "small",
        "answer_start": "line",
        "queries": 5,
        "fewest_lines": 2,
        "begin_with_bos": False,
        "loss_on": "answers",
    }
    return LongEvalData(LongEvalConfig(**(settings | changes)), TOKENIZER)


def text_of(row):
    used = int((row.targets >= 0).sum())
    return TOKENIZER.decode([row.tokens[0], *row.targets[:used]])


@settings(max_examples=15, deadline=None)
@given(
    lines=st.integers(1, 12),
    index=st.integers(0, 10**9),
    answer_start=st.sampled_from(["none", "longeval_base", "line"]),
    index_kind=st.sampled_from(["words", "number", "letters", "uuid"]),
)
def test_every_answer_is_the_number_of_the_line_that_was_asked_for(lines, index, answer_start, index_kind):
    source = data(answer_start=answer_start, index_kind=index_kind)
    length = source.row_length(length=None, lines=lines)
    row = source.rows(length=length, lines=lines, short_share=0.0, seed=(1, 0)).row(index)
    text = text_of(row)
    record = dict(
        re.findall(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", text.split("\nNow the record is over")[0], re.M)
    )
    asked = re.findall(r"REGISTER_CONTENT> in line (\S+)\? I need", text)
    assert len(record) == lines
    assert len(asked) == len(set(asked)) == min(lines, 5)
    for number, name in enumerate(asked):
        assert TOKENIZER.decode(row.targets[row.answer_ids == number]) == record[name]
    np.testing.assert_array_equal(row.weights > 0, row.answer_ids >= 0)
    assert len(row.tokens) == length


def test_the_record_and_the_first_question_are_longevals_own_words():
    text = text_of(data(answer_start="none").rows(length=900, lines=3, short_share=0.0, seed=(0,)).row(0))
    assert text.startswith(
        "Below is a record of lines I want you to remember. Each line begins with 'line <line index>'"
    )
    assert re.search(
        r"\n\nNow the record is over\. Tell me what is the <REGISTER_CONTENT> in line \S+\? I need the number\. \d+",
        text,
    )


def test_a_length_is_filled_without_a_cut_answer():
    row = data(queries=3).rows(length=2500, lines=None, short_share=0.0, seed=(0,)).row(7)
    used = int((row.targets >= 0).sum()) + 1
    assert 0.85 * 2500 < used <= 2500
    assert row.answer_ids.max() == 2


def test_short_rows_hold_fewer_lines_and_questions_about_all_of_them():
    rows = data().rows(length=data().row_length(length=None, lines=12), lines=12, short_share=1.0, seed=(0,))
    for index in range(6):
        text = text_of(rows.row(index))
        lines = len(re.findall(r"REGISTER_CONTENT is <\d+>$", text.split("\nNow the record is over")[0], re.M))
        assert 2 <= lines <= 12
        assert 1 <= rows.row(index).answer_ids.max() + 1 <= lines


def test_a_record_of_long_words_is_drawn_anew():
    """One in a hundred of such rows is longer than those that were measured; training would end there for good."""
    source = data(queries=1)
    roomy = source.rows(length=3000, lines=8, short_share=0.0, seed=(0,))
    ends = [roomy.ids(index, lines=8, queries=1)[2][0] for index in range(99)]
    length = sorted(ends)[90]
    tight = source.rows(length=length, lines=8, short_share=0.0, seed=(0,))
    too_long = [index for index, end in enumerate(ends) if end > length]
    assert too_long
    for index in too_long:
        row = tight.row(index)
        assert row.answer_ids.max() == 0
        np.testing.assert_array_equal(row.tokens, tight.row(index).tokens)


def test_too_small_rows_are_refused():
    with pytest.raises(ValueError, match=r"a record of 50 lines and one question take .* tokens, the row has 600"):
        data().rows(length=600, lines=50, short_share=0.0, seed=(0,))
    with pytest.raises(ValueError, match="no room for a line"):
        data().rows(length=100, lines=None, short_share=0.0, seed=(0,))

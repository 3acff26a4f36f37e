import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.lm.key_words import KeyWords, key_words
from ring_rl.lm.tasks.compact_lines import TOKENS_PER_LINE, CompactLines, CompactRecord, lines_within

FEW = KeyWords(("red", "old", "calm"), ("fox", "road", "bell", "calm"))


@pytest.fixture(scope="module")
def lines() -> CompactLines:
    return CompactLines(key_words("small"))


def test_a_row_written_out():
    few = CompactLines(FEW)
    record = CompactRecord(
        adjectives=np.array([0, 2]),
        nouns=np.array([1, 3]),
        digits=np.array([[4, 0, 7, 1, 9], [0, 2, 8, 0, 5]]),
        asked=np.array([1, 0]),
    )
    row = few.row(record, length=40)
    words = (
        "LINE red road IS 4 0 7 1 9 LINE calm calm IS 0 2 8 0 5 ASK calm calm IS 0 2 8 0 5 ASK red road IS 4 0 7 1 9"
    )
    np.testing.assert_array_equal(row.tokens[:36], few.tokenizer.encode(words))
    np.testing.assert_array_equal(row.targets[:35], row.tokens[1:36])
    assert (row.targets[35:] == -1).all()
    none = [-1] * 3
    np.testing.assert_array_equal(row.answer_ids, [-1] * 18 + none + [0] * 5 + [-1] + none + [1] * 5 + [-1] + [-1] * 4)
    np.testing.assert_array_equal(row.weights, row.answer_ids >= 0)
    np.testing.assert_array_equal(row.positions, np.arange(40))
    assert row.segment_ids is None
    dtypes = [x.dtype for x in (row.tokens, row.targets, row.weights, row.positions, row.answer_ids)]
    assert dtypes == [np.int32, np.int32, np.float32, np.int32, np.int32]


@given(count=st.integers(1, 60), share=st.floats(0, 1), seed=st.integers(0, 99), padding=st.integers(0, 20))
def test_what_is_asked_stands_in_the_record(lines, count, share, seed, padding):
    queries = max(1, round(share * count))
    record = lines.draw(np.random.default_rng(seed), lines=count, queries=queries)
    used = TOKENS_PER_LINE * (count + queries)
    row = lines.row(record, length=used + padding)
    blocks = row.tokens[:used].reshape(-1, TOKENS_PER_LINE)
    written = {tuple(block[1:4]): tuple(block[4:]) for block in blocks[:count]}
    assert len(written) == count, "a key stands twice"
    asked = [tuple(block[1:4]) for block in blocks[count:]]
    assert len(set(asked)) == queries
    for number, key in enumerate(asked):
        assert tuple(row.targets[row.answer_ids == number]) == written[key]


@given(count=st.integers(1, 30), seed=st.integers(0, 99))
def test_text_and_row_are_the_same(lines, count, seed):
    record = lines.draw(np.random.default_rng(seed), lines=count, queries=1)
    sample, row = lines.sample(record), lines.row(record)
    text = sample.prompt + sample.answer_prefix
    np.testing.assert_array_equal(lines.tokenizer.encode(text + sample.completion), row.tokens)
    assert len(lines.tokenizer.encode(text)) == np.argmax(row.answer_ids == 0) + 1
    assert lines.tokenizer.decode(row.targets[row.answer_ids == 0]) == sample.answers[0]
    assert sample.details["line"] == record.asked[0]
    assert sample.length == count


@pytest.mark.parametrize(("depth", "line"), [(0.0, 0), (0.5, 10), (1.0, 20)])
def test_depth_chooses_the_line(lines, depth, line):
    record = lines.draw(np.random.default_rng(0), lines=21, queries=1, depth=depth)
    assert record.asked.tolist() == [line]
    assert lines.sample(record).depth == depth


def test_every_line_key_and_digit_is_drawn():
    few = CompactLines(FEW)
    records = [few.draw(np.random.default_rng(seed), lines=12, queries=1) for seed in range(400)]
    asked = np.bincount([record.asked[0] for record in records], minlength=12)
    # 400 / 12 = 33 expected; 5 standard deviations are 28.
    assert (asked > 5).all()
    assert (asked < 61).all()
    # Twelve lines of twelve keys: the order is all that differs.
    for record in records:
        assert len(set(zip(record.adjectives.tolist(), record.nouns.tolist(), strict=True))) == 12
    first = {(record.adjectives[0], record.nouns[0]) for record in records}
    assert len(first) == 12
    digits = np.bincount(np.concatenate([record.digits.ravel() for record in records]), minlength=10)
    assert abs(digits / digits.sum() - 0.1).max() < 0.02
    assert {record.digits[0, 0] for record in records} == set(range(10)), "leading zeros belong to it"


def test_the_generator_decides_all(lines):
    draw = lambda seed: lines.row(lines.draw(np.random.default_rng(seed), lines=20, queries=3)).tokens  # noqa: E731
    np.testing.assert_array_equal(draw(3), draw(3))
    assert (draw(3) != draw(4)).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lines": 13}, "these words name between 1 and 12 lines, got 13"),
        ({"lines": 0}, "between 1 and 12 lines, got 0"),
        ({"queries": 6}, "a record of 5 lines answers between 1 and 5 questions, got 6"),
        ({"queries": 0}, "between 1 and 5 questions, got 0"),
        ({"queries": 2, "depth": 0.5}, "goes with one question"),
        ({"depth": 1.5}, r"a depth in \[0, 1\]"),
    ],
)
def test_impossible_records_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CompactLines(FEW).draw(np.random.default_rng(0), **({"lines": 5, "queries": 1} | changes))


def test_a_record_is_never_cut(lines):
    record = lines.draw(np.random.default_rng(0), lines=4, queries=1)
    assert len(lines.row(record, length=45).tokens) == 45
    with pytest.raises(ValueError, match="take 45 tokens, the row has 44; at most 3 lines fit"):
        lines.row(record, length=44)
    with pytest.raises(ValueError, match="asks one question, the record has 2"):
        lines.sample(lines.draw(np.random.default_rng(0), lines=4, queries=2))


@given(tokens=st.integers(1, 5000), queries=st.integers(1, 70))
def test_lines_within_fill_the_tokens(tokens, queries):
    if tokens < TOKENS_PER_LINE * (queries + 1):
        with pytest.raises(ValueError, match="hold no line besides"):
            lines_within(tokens, queries=queries)
    else:
        used = TOKENS_PER_LINE * (lines_within(tokens, queries=queries) + queries)
        assert tokens - TOKENS_PER_LINE < used <= tokens

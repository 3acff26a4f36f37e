import re
import uuid

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.lm.key_words import KeyWords, key_words
from ring_rl.lm.tasks.line_retrieval import draw_lines
from ring_rl.lm.tasks.scorers import score


def draw(seed=0, **changes):
    values = {"lines": 5, "index_kind": "words", "words": key_words("small"), "answer_start": "none"}
    return draw_lines(np.random.default_rng(seed), **(values | changes))


def record(sample):
    return re.findall(r"^line (.*): REGISTER_CONTENT is <(\d+)>$", sample.prompt, re.MULTILINE)


def test_the_text_is_longevals():
    sample = draw(lines=2, index_kind="number", depth=1.0)
    (_, first), (_, second) = record(sample)
    assert sample.prompt == (
        "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
        "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
        "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
        "<REGISTER_CONTENT> of a certain line index. Now the record start:\n"
        "\n"
        f"line 1: REGISTER_CONTENT is <{first}>\n"
        f"line 2: REGISTER_CONTENT is <{second}>\n"
        "\n"
        "Now the record is over. Tell me what is the <REGISTER_CONTENT> in line 2? I need the number."
    )
    assert sample.answers == (second,)


@given(
    seed=st.integers(0, 999),
    lines=st.integers(1, 300),
    kind=st.sampled_from(["words", "number", "letters", "uuid"]),
    start=st.sampled_from(["none", "longeval_base", "line"]),
)
def test_the_question_is_about_one_line_of_the_record(seed, lines, kind, start):
    sample = draw(seed, lines=lines, index_kind=kind, answer_start=start)
    written = record(sample)
    names = [name for name, _ in written]
    assert len(names) == len(set(names)) == lines == sample.length
    assert all(1 <= int(number) <= 50_000 for _, number in written)
    (asked,) = re.findall(r"in line (.*)\? I need the number\.$", sample.prompt)
    assert sample.answers == (dict(written)[asked],)
    assert names[sample.details["line"]] == asked == sample.details["index"]
    assert sample.depth == sample.details["line"] / max(lines - 1, 1)
    assert score(sample, sample.answer_prefix + sample.completion) == 1.0


def test_names_of_lines_are_of_their_kind():
    assert [name for name, _ in record(draw(lines=3, index_kind="number"))] == ["1", "2", "3"]
    assert [name for name, _ in record(draw(lines=7, index_kind="letters"))][-2:] == ["AAAAAF", "AAAABA"]
    # 6^6 names have six letters; a longer record needs longer ones.
    assert record(draw(lines=6**6 + 1, index_kind="letters"))[0][0] == "AAAAAAA"
    assert all(uuid.UUID(name).version == 4 for name, _ in record(draw(index_kind="uuid")))
    words = key_words("small")
    for name, _ in record(draw(lines=50)):
        adjective, noun = name.split("-")
        assert adjective in words.adjectives
        assert noun in words.nouns


def test_words_repeat_only_where_there_are_more_lines_than_words():
    few = KeyWords(("red", "old", "calm"), ("fox", "road", "bell", "cat"))
    for lines, repeats in ((3, False), (4, True), (12, True)):
        names = [name.split("-") for name, _ in record(draw(lines=lines, words=few))]
        assert (len({adjective for adjective, _ in names}) < lines) is repeats
        assert len({tuple(name) for name in names}) == lines
    with pytest.raises(ValueError, match="these words name 12 lines, got 13"):
        draw(lines=13, words=few)


def test_values_reach_both_ends():
    numbers = [int(number) for seed in range(40) for _, number in record(draw(seed, lines=2000, index_kind="number"))]
    assert 1 <= min(numbers) < 20
    assert 49_980 < max(numbers) <= 50_000


def test_an_answer_may_begin_as_a_line_does():
    sample = draw(answer_start="line", depth=0.0)
    name, number = record(sample)[0]
    continued = sample.prompt + sample.answer_prefix + sample.completion
    assert continued.endswith(f"I need the number.\nline {name}: REGISTER_CONTENT is <{number}>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lines": 0}, "at least one line, got 0"), ({"depth": -0.1}, r"must lie in \[0, 1\], got -0\.1")],
)
def test_impossible_records_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        draw(**changes)

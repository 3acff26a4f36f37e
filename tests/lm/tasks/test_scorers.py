"""Each benchmark's rule, on the cases where it surprises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.lm.tasks.sample import Sample
from ring_rl.lm.tasks.scorers import (
    SCORERS,
    answer_hits,
    first_digits,
    last_integer,
    needle_hits,
    score,
    substring_any,
    substring_fraction,
)


def sample(task, *answers):
    return Sample(
        task=task,
        prompt="?",
        answer_prefix="",
        completion=" ".join(answers),
        answers=answers,
        length=1,
        depth=None,
        details={},
    )


class TestLongEval:
    @pytest.mark.parametrize(
        ("output", "number"),
        [
            ("The <REGISTER_CONTENT> in line torpid-kid is <24169>.", 24169),
            # Only the last one counts, wherever the right one stands.
            ("24169 is in line 7", 7),
            ("line 7: 24169", 24169),
            ("I don't know.", -1),
            ("", -1),
            ("It is -5", 5),
            ("3.50", 50),
            ("1,234", 234),
            ("00123", 123),
            ("24169\n\nUSER: and line 8?\n", 8),
            ("24169</s>", 24169),
        ],
    )
    def test_the_last_integer_is_the_answer(self, output, number):
        assert last_integer(output) == number

    def test_a_file_of_answers_gives_longevals_accuracy(self):
        # Label and prediction as its response files have them: 3 of 5 are right.
        responses = [
            ("41087", "The <REGISTER_CONTENT> in line wide-mail is <41087>."),
            ("2003", "<REGISTER_CONTENT> is 2003"),
            ("2003", "Line 2003 holds 41"),
            ("17", "17 17 17 17"),
            ("8", "I need more information."),
        ]
        scores = [score(sample("line_retrieval", label), output) for label, output in responses]
        assert scores == [1.0, 1.0, 0.0, 1.0, 0.0]
        assert np.mean(scores) == pytest.approx(0.6)

    @given(number=st.integers(1, 50_000), other=st.integers(1, 50_000))
    def test_what_follows_the_answer_spoils_it(self, number, other):
        expected = sample("line_retrieval", str(number))
        assert score(expected, f"It is {number}.") == 1.0
        assert score(expected, f"It is {number}, not {other}") == float(number == other)

    def test_a_longer_number_is_another_number(self):
        assert score(sample("line_retrieval", "123"), "1234") == 0.0
        assert score(sample("line_retrieval", "123"), "12") == 0.0


class TestCompactLines:
    @pytest.mark.parametrize(
        ("output", "right"),
        [
            ("4 0 7 1 9", True),
            (" 4 0 7 1 9 LINE red fox", True),
            ("4 0 7 1", False),
            ("4 0 7 1 8", False),
            ("IS 4 0 7 1 9", False),
            ("", False),
        ],
    )
    def test_the_first_five_words_are_the_answer(self, output, right):
        assert first_digits(output, ("4 0 7 1 9",)) == float(right)
        assert score(sample("compact_lines", "4 0 7 1 9"), output) == float(right)


class TestNeedles:
    def test_each_needle_counts_for_itself(self):
        output = "Paris: 1234567, Rome: unknown"
        assert needle_hits(output, ("1234567", "7654321")) == (True, False)
        assert score(sample("multi_needle", "1234567", "7654321"), output) == 0.5

    @pytest.mark.parametrize(
        ("output", "found"),
        [
            ("1234567", True),
            # Anywhere, also within a longer number: that is LWM's rule.
            ("91234567", True),
            ("The number is 12345678.", True),
            ("1,234,567", False),
            # One digit short is not found.
            ("123456", False),
            ("", False),
        ],
    )
    def test_a_needle_is_a_substring(self, output, found):
        assert score(sample("needle", "1234567"), output) == float(found)


class TestRuler:
    def test_the_share_of_answers_counts_in_any_case(self):
        assert substring_fraction("alpha, BETA and delta", ("Alpha", "beta", "gamma", "Delta")) == 0.75
        assert substring_fraction("", ("a",)) == 0.0
        assert score(sample("vt", "AAAAA", "BBBBB"), "aaaaa") == 0.5

    def test_questions_with_several_spellings_need_one(self):
        assert substring_any("It was Paris.", ("london", "PARIS")) == 1.0
        assert substring_any("It was Rome.", ("london", "PARIS")) == 0.0

    def test_uuids_match_in_upper_case(self):
        assert score(sample("niah_multikey_3", "ab12-cd"), "AB12-CD") == 1.0


class TestTeacherForced:
    def test_every_token_of_an_answer_must_be_the_most_likely(self):
        answer_ids = np.array([-1, 0, 0, -1, 1, 1, -1])
        targets = np.array([9, 1, 2, 9, 3, 4, -1])
        assert answer_hits(np.array([0, 1, 2, 0, 3, 4, 0]), targets, answer_ids).tolist() == [True, True]
        assert answer_hits(np.array([0, 1, 2, 0, 3, 5, 0]), targets, answer_ids).tolist() == [True, False]
        # What is said where nothing is asked does not matter.
        assert answer_hits(np.array([9, 1, 5, 9, 3, 4, -1]), targets, answer_ids).tolist() == [False, True]

    def test_answers_may_stand_in_any_order(self):
        answer_ids, targets = np.array([1, -1, 0]), np.array([7, 8, 9])
        assert answer_hits(np.array([7, 0, 0]), targets, answer_ids).tolist() == [False, True]

    def test_an_answer_that_was_cut_off_is_no_hit_but_an_error(self):
        with pytest.raises(ValueError, match="answer 0 has no token; it was cut off"):
            answer_hits(np.array([1, 1]), np.array([1, 1]), np.array([-1, 1]))

    def test_a_row_without_answers_has_none(self):
        assert answer_hits(np.array([1]), np.array([1]), np.array([-1])).tolist() == []


@pytest.mark.parametrize("task", SCORERS)
def test_every_task_scores_its_own_completion(task):
    expected = sample(task, "1 2 3 4 5" if task == "compact_lines" else "54321")
    assert score(expected, expected.completion) == 1.0
    assert score(expected, "nothing") == 0.0


def test_tasks_without_a_rule_are_named():
    with pytest.raises(ValueError, match="no scorer of the task 'chess'"):
        score(sample("chess", "e4"), "e4")


class TestSamples:
    def test_answers_are_found_in_their_order(self):
        expected = sample("vt", "AB", "B", "AB")
        assert expected.answer_spans() == ((0, 2), (3, 4), (5, 7))

    @pytest.mark.parametrize("answers", [("b", "a"), ("c",), ("",)])
    def test_a_completion_without_its_answers_is_refused(self, answers):
        with pytest.raises(ValueError, match="does not stand in the completion"):
            Sample(
                task="vt",
                prompt="",
                answer_prefix="",
                completion="a b",
                answers=answers,
                length=1,
                depth=None,
                details={},
            )

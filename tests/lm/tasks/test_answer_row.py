import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.lm.key_words import key_words
from ring_rl.lm.tasks.answer_row import answer_row
from ring_rl.lm.tasks.line_retrieval import draw_lines
from ring_rl.lm.tasks.sample import Sample
from ring_rl.lm.tasks.scorers import answer_hits
from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer
from ring_rl.lm.tokenizer.word_tokenizer import WordTokenizer

BYTES = ByteTokenizer()
TWO = Sample(
    task="multi_needle",
    prompt="Näme both.",
    answer_prefix=" They are",
    completion=" 123, and 4567.",
    answers=("123", "4567"),
    length=1,
    depth=None,
    details={},
)


def row(sample, tokenizer=BYTES, *, begin_with_bos=False, end_with_eos=False, length=None):
    return answer_row(sample, tokenizer, begin_with_bos=begin_with_bos, end_with_eos=end_with_eos, length=length)


def answer(batch, number):
    return batch.targets[batch.answer_ids == number]


class PairsTokenizer:
    """Two characters a token, so that seams fall inside tokens."""

    vocabulary_size = 1 << 16
    bos_id = None
    eos_id = None

    def encode(self, text):
        return self.encode_with_spans(text)[0]

    def encode_with_spans(self, text):
        starts = np.arange(0, len(text), 2, dtype=np.int32)
        ids = [hash(text[start : start + 2]) % self.vocabulary_size for start in starts]
        return np.array(ids, np.int32), np.stack([starts, np.minimum(starts + 2, len(text))], -1).astype(np.int32)


@given(bos=st.booleans(), eos=st.booleans(), padding=st.integers(0, 9))
def test_the_targets_of_answers_are_the_answers(bos, eos, padding):
    used = len(BYTES.encode("Näme both. They are 123, and 4567.")) + bos + eos
    batch = row(TWO, begin_with_bos=bos, end_with_eos=eos, length=used + padding)
    assert BYTES.decode(answer(batch, 0)) == "123"
    assert BYTES.decode(answer(batch, 1)) == "4567"
    np.testing.assert_array_equal(batch.targets[: used - 1], batch.tokens[1:used])
    assert (batch.targets[used - 1 :] == -1).all()
    assert (batch.tokens[0] == BYTES.bos_id) == bos
    assert batch.weights.sum() == 7 + eos
    assert (batch.weights[batch.answer_ids >= 0] == 1).all()
    assert (batch.targets[batch.weights > 0][-1] == BYTES.eos_id) == eos
    assert batch.segment_ids is None
    np.testing.assert_array_equal(batch.positions, np.arange(used + padding))
    assert answer_hits(batch.targets, batch.targets, batch.answer_ids).tolist() == [True, True]


def test_no_length_takes_what_it_needs():
    assert len(row(TWO).tokens) == len(BYTES.encode("Näme both. They are 123, and 4567."))


def test_an_answer_is_never_cut():
    used = len(row(TWO).tokens)
    with pytest.raises(ValueError, match=f"takes {used} tokens, the row has {used - 1}"):
        row(TWO, length=used - 1)


@pytest.mark.parametrize("prompt", ["even", "odd"])
def test_a_token_across_a_seam_belongs_to_the_answer(prompt):
    sample = dataclasses.replace(TWO, prompt=prompt, answer_prefix="", completion="12", answers=("12",))
    batch = row(sample, PairsTokenizer())
    # "od|d1|2" holds the answer in two tokens, "ev|en|12" in one.
    assert (batch.answer_ids == 0).sum() == (2 if prompt == "odd" else 1)


def test_two_answers_in_one_token_cannot_be_told_apart():
    sample = dataclasses.replace(TWO, prompt="even", answer_prefix="", completion="12", answers=("1", "2"))
    with pytest.raises(ValueError, match="the answer '2' has no token of its own"):
        row(sample, PairsTokenizer())


def test_an_answer_needs_something_before_it():
    sample = dataclasses.replace(TWO, prompt="", answer_prefix="", completion="12", answers=("12",))
    with pytest.raises(ValueError, match="nothing stands before the answer"):
        row(sample)
    assert BYTES.decode(answer(row(sample, begin_with_bos=True), 0)) == "12"


def test_a_tokenizer_without_beginning_and_end_adds_none():
    words = WordTokenizer(["a", "b"])
    sample = dataclasses.replace(TWO, prompt="a", answer_prefix="", completion=" b", answers=("b",))
    batch = row(sample, words, begin_with_bos=True, end_with_eos=True)
    np.testing.assert_array_equal(batch.tokens, [0, 1])
    np.testing.assert_array_equal(batch.answer_ids, [0, -1])


@given(seed=st.integers(0, 50), start=st.sampled_from(["none", "longeval_base", "line"]))
def test_lines_are_answered_by_their_number(seed, start):
    sample = draw_lines(
        np.random.default_rng(seed), lines=4, index_kind="words", words=key_words("small"), answer_start=start
    )
    assert BYTES.decode(answer(row(sample), 0)) == sample.answers[0]

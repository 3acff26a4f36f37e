import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.lm.evaluation.teacher_forced import padded_tokens, teacher_forced
from ring_rl.lm.token_batch import TokenBatch
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.mesh import MeshConfig, make_mesh

V = 24


@pytest.fixture(scope="module")
def model(tiny_language_model):
    return tiny_language_model(vocabulary_size=V)


def mesh(dp, sp, layout):
    return SequenceParallel(mesh=make_mesh(MeshConfig(dp=dp, fsdp=1, tp=1, sp=sp)), layout=layout)


def row_of(prompt, answer):
    tokens = np.concatenate([prompt, answer]).astype(np.int32)
    answer_ids = np.full(len(tokens), -1, np.int32)
    answer_ids[len(prompt) - 1 : -1] = 0
    return TokenBatch(
        tokens=tokens,
        targets=np.append(tokens[1:], -1).astype(np.int32),
        weights=(answer_ids >= 0).astype(np.float32),
        positions=np.arange(len(tokens), dtype=np.int32),
        segment_ids=None,
        answer_ids=answer_ids,
    )


@pytest.fixture(scope="module")
def asked(model):
    """Rows of several lengths, and the log-probabilities of every token, from one plain pass."""
    generator = np.random.default_rng(0)
    rows = [
        row_of(generator.integers(V, size=prompt), generator.integers(V, size=answer))
        for prompt, answer in ((9, 5), (30, 1), (21, 3))
    ]
    tokens = np.zeros((3, 32), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row.tokens)] = row.tokens
    single = mesh(1, 1, "contiguous")
    hidden = model.hidden(jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(32), tokens.shape), single)
    return rows, np.asarray(jax.nn.log_softmax(model.logits(hidden)))


@pytest.mark.parametrize(("dp", "sp", "layout"), [(1, 1, "contiguous"), (2, 4, "zigzag")])
def test_each_token_of_an_answer_is_read_from_the_one_before_it(model, asked, dp, sp, layout):
    rows, log_probabilities = asked
    forced = teacher_forced(model, rows, parallel=mesh(dp, sp, layout), length_multiple=8, batch_size=3)
    for row, expected, each in zip(rows, log_probabilities, forced, strict=True):
        places = np.flatnonzero(row.answer_ids == 0)
        assert np.array_equal(each.targets, row.tokens[places + 1])
        assert np.array_equal(each.most_likely, expected[places].argmax(-1))
        np.testing.assert_allclose(each.log_probabilities, expected[places, each.targets], atol=1e-4)
        assert np.array_equal(each.answer_ids, np.zeros(len(places)))


def test_rows_without_an_answer_and_too_many_rows_are_refused(model, asked):
    rows, _ = asked
    options = {"parallel": mesh(1, 1, "contiguous"), "length_multiple": 1}
    for answer_ids in (None, np.full(len(rows[0].tokens), -1, np.int32)):
        with pytest.raises(ValueError, match="a row without an answer"):
            teacher_forced(model, [dataclasses.replace(rows[0], answer_ids=answer_ids)], batch_size=1, **options)
    with pytest.raises(ValueError, match="3 rows do not fit into a batch of 2"):
        teacher_forced(model, rows, batch_size=2, **options)


@given(length=st.integers(1, 2**21), multiple=st.sampled_from([1, 2, 8, 16, 96]))
def test_few_lengths_are_compiled_and_little_is_padded(length, multiple):
    padded = padded_tokens(length, multiple=multiple)
    assert padded >= length
    assert padded % multiple == 0
    assert padded - length < length / 8 + multiple
    octave = {padded_tokens(each, multiple=1) for each in range(1025, 2049)}
    assert len(octave) == 8

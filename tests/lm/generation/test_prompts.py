import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.lm.generation.prompts import check_prompts, prompt_chunks

PROMPTS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=40), min_size=1, max_size=4)


@given(prompts=PROMPTS, chunk_size=st.integers(1, 20))
def test_chunks_are_of_one_shape_and_hold_every_prompt_once(prompts, chunk_size):
    chunks = prompt_chunks([np.array(prompt) for prompt in prompts], chunk_size=chunk_size)
    ((rows, size),) = {chunk.tokens.shape for chunk in chunks}
    assert (rows, size <= chunk_size) == (len(prompts), True)
    for row, prompt in enumerate(prompts):
        read = [token for chunk in chunks for token in chunk.tokens[row, : chunk.counts[row]]]
        assert read == prompt
    # Nothing is read in vain but what fills the last chunk.
    assert max(chunk.counts.max() for chunk in chunks[-1:]) > 0


def test_a_short_prompt_makes_a_small_chunk():
    (chunk,) = prompt_chunks([np.arange(5), np.arange(3)], chunk_size=512)
    assert chunk.tokens.shape == (2, 8)
    assert chunk.counts.tolist() == [5, 3]


@pytest.mark.parametrize(
    ("prompts", "changes", "complaint"),
    [
        ([], {}, "no prompts; give at least one"),
        ([[1], []], {}, "prompt 1 is empty; begin it with a token, such as the tokenizer's bos_id"),
        ([[1, 50]], {}, "prompt 0 holds token 50, but the model's vocabulary has 50; use the tokenizer"),
        ([[-1]], {}, "prompt 0 holds token -1"),
        ([[[1, 2]]], {}, r"prompt 0 must be token ids \[tokens\], got int64\[1, 2\]"),
        ([[0.5]], {}, r"prompt 0 must be token ids \[tokens\], got float64\[1\]"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1], [1] * 8], {"max_length": 11}, "prompt 1 has 8 tokens, .*max_length=11; .*lower max_new_tokens to 3"),
        ([[1] * 12], {"max_length": 12}, "prompt 0 has 12 tokens, which leave no room .*max_length=12; shorten it"),
    ],
)
def test_what_cannot_be_read_is_refused(prompts, changes, complaint):
    arrays = [np.array(prompt, np.int64 if not prompt else None) for prompt in prompts]
    with pytest.raises(ValueError, match=complaint):
        check_prompts(arrays, **({"vocabulary_size": 50, "max_new_tokens": 4, "max_length": None} | changes))


def test_what_fits_exactly_passes():
    check_prompts([np.full(8, 49)], vocabulary_size=50, max_new_tokens=4, max_length=12)

"""One layer's compiled activations, on two virtual CPU devices: they grow as the paper's table says."""

import functools

import jax
import pytest

from ring_rl.planning.layer_activations import LayerShape, compile_layer, local_block, program_of

WIDTH, HEADS = 32, 4


def shape(tokens):
    return LayerShape(tokens=tokens, width=WIDTH, heads=HEADS, block_size=64, feed_forward_chunks=16, dtype="float32")


@functools.cache
def elements(architecture, part, direction, tokens):
    """Activations in arrays of tokens x width."""
    program = program_of(architecture, part=part, direction=direction, tokens=tokens)
    found = compile_layer(program, shape(tokens), jax.devices("cpu")[:2], attention_block="xla", heads_at_once=None)
    assert found.compile_seconds > 0
    return found.activation_bytes / (4 * tokens * WIDTH)


def test_all_scores_are_held_twice_and_grow_with_the_square():
    """Logits and weights: 2 n s², which is 2 n s / h arrays."""
    for tokens in (512, 1024):
        scores = HEADS * tokens / WIDTH
        assert elements("vanilla", "attention", "forward", tokens) == pytest.approx(2 * scores, rel=0.1)
    assert elements("vanilla", "attention", "training", 1024) > 3 * HEADS * 1024 / WIDTH


def test_blockwise_attention_grows_with_the_tokens_alone():
    assert elements("blockwise_transformer", "attention", "forward", 4096) < 8
    assert elements("blockwise_transformer", "attention", "forward", 4096) <= elements(
        "blockwise_transformer", "attention", "forward", 1024
    )


def test_a_ring_needs_the_same_however_long_its_sequence():
    """Two devices hold a sequence of twice the tokens of a device in a few arrays more than one holds half of it."""
    alone = elements("blockwise_transformer", "attention", "forward", 4096)
    shared = elements("ring", "attention", "forward", 4096)
    assert alone < shared + 1
    assert shared < alone + 4


def test_the_feed_forward_holds_eight_arrays_at_once_or_a_few_in_steps():
    assert elements("vanilla", "feed_forward", "forward", 1024) == pytest.approx(8, rel=0.05)
    assert elements("ring", "feed_forward", "forward", 1024) < 4
    assert (
        elements("ring", "feed_forward", "training", 1024) < elements("vanilla", "feed_forward", "training", 1024) / 3
    )


def test_rows_that_are_one_program_are_compiled_once():
    same = functools.partial(program_of, direction="training", tokens=64)
    assert same("memory_efficient_attention", part="attention") == same("blockwise_transformer", part="attention")
    assert same("vanilla", part="feed_forward") == same("memory_efficient_attention", part="feed_forward")
    assert same("ring", part="feed_forward") == same("blockwise_transformer", part="feed_forward")
    assert len({same(row, part="attention") for row in ("vanilla", "blockwise_transformer", "ring")}) == 3


def test_refusals():
    with pytest.raises(ValueError, match="width=30 is not a multiple of heads=4"):
        LayerShape(tokens=64, width=30, heads=4, block_size=64, feed_forward_chunks=1, dtype="float32")
    with pytest.raises(ValueError, match="feed_forward_chunks=3 must divide tokens=64"):
        LayerShape(tokens=64, width=32, heads=4, block_size=64, feed_forward_chunks=3, dtype="float32")
    with pytest.raises(ValueError, match="pallas_tpu compiles for TPUs only"):
        local_block("pallas_tpu", platform="cpu", block_size=64)

"""The one call: every strategy gives the same exact attention, whatever the input, and says what it cannot do."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ring_rl.kernels import CAUSAL, FULL, Dropout, Mask, attention
from ring_rl.kernels.local.xla import XlaBlock

# Strategies with more than one device, and mesh axes for them; the sampled comparison of each with the reference is
# in a file of its own.
SHARDED = [("ring", (4,)), ("all_gather", (4,)), ("ulysses", (4,)), ("hybrid", (2, 2))]
TILES_OF_4 = XlaBlock(block_size=4)
# That get rectangles which are visible in full where a strategy can give them such; and positions to skip tiles by.
BLOCKS = [XlaBlock(block_size=7), XlaBlock(block_size=7, heads_at_once=1, prefers_positions=True)]


# Every example is a compilation of its own: few of them, and none spent on finding a smaller one.
@settings(max_examples=4, phases=[Phase.generate])
@given(data=st.data())
def test_blockwise_equals_dense_float64(data, cases):
    data.draw(cases("blockwise")).check()


@settings(max_examples=2, phases=[Phase.generate])
@given(data=st.data())
def test_dense_equals_dense_float64(data, cases):
    data.draw(cases("dense")).check()


@pytest.mark.parametrize(("strategy", "axes"), [("ring", (8,)), ("hybrid", (2, 2))])
def test_bfloat16(case, strategy, axes):
    """At most twice the error of the reference in bfloat16; every option at once."""
    options = {"soft_cap": 8.0, "alibi": True, "dropout_rate": 0.1, "packed": True}
    shape = {"tokens": 112, "heads": (4, 4), "head_dim": 64, "layout": "zigzag"}
    case(strategy=strategy, axes=axes, dtype="bfloat16", local=BLOCKS[0], **shape, **options).check()


@pytest.mark.parametrize(
    ("strategy", "axes", "local"),
    [("ring", (4,), BLOCKS[0]), ("ring", (4,), BLOCKS[1]), ("blockwise", (), BLOCKS[0])],
)
def test_large_logits_stay_finite_and_exact(case, strategy, axes, local):
    """Logits of ±1e4 overflow exp in any softmax that does not subtract the maximum everywhere."""
    large = case(
        strategy=strategy, axes=axes, layout="zigzag", local=local, heads=(4, 4), tokens=112, magnitude=3e3, seed=3
    )
    got, expected, naive = large.run(), large.dense("float64"), large.dense("float32")
    assert np.abs(expected.log_sum_exp).max() > 1e4
    # Weights are recomputed from log_sum_exp, whose float32 rounding is a relative error of the weights.
    rounding = np.finfo(np.float32).eps * np.abs(expected.log_sum_exp).max()
    assert 1e-3 < rounding < 1e-2
    for a, b, c in zip(got, expected, naive, strict=True):
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= 2 * np.abs(c - b).max() + 2 * rounding * np.abs(b).max()


@pytest.mark.parametrize(("strategy", "axes"), [("ring", (4,)), ("all_gather", (2,)), ("blockwise", ())])
def test_padding_is_never_computed_and_sees_nothing(case, strategy, axes):
    """NaN in whole tiles of padding reaches nothing, forward or backward; out is 0, log_sum_exp -inf, gradients 0."""
    ids = np.repeat([[0, -1, 1, -1]] * 2, [16, 16, 4, 28], axis=1)  # a device holds padding only
    padded = case(strategy=strategy, axes=axes, heads=(4, 4), tokens=64, given_segment_ids=ids, local=TILES_OF_4)
    got = dataclasses.replace(padded, poisoned=True).check()
    np.testing.assert_array_equal(np.isneginf(got.log_sum_exp[:, 0]), ids < 0)
    assert (got.dk[ids >= 0] != 0).any()


@pytest.mark.parametrize(("strategy", "axes"), [("ring", (2,)), ("dense", ())])
def test_a_row_of_nothing_but_padding(case, strategy, axes):
    ids = np.zeros((2, 48))
    ids[1] = -1
    got = case(strategy=strategy, axes=axes, given_segment_ids=ids).check()
    assert np.isneginf(got.log_sum_exp[1]).all()
    assert np.isfinite(got.log_sum_exp[0]).all()


@pytest.mark.parametrize(("strategy", "axes"), [("ring", (4,)), ("blockwise", ())])
def test_documents_of_one_token(case, strategy, axes):
    """Each sees itself and nothing else, so its output is its value."""
    ids = np.tile(np.arange(16), (2, 1))
    single = case(strategy=strategy, axes=axes, layout="zigzag", tokens=16, heads=(4, 4), given_segment_ids=ids)
    got = single.check()
    np.testing.assert_allclose(got.out, single.inputs[2], rtol=1e-6)
    np.testing.assert_allclose(got.dv, single.cotangents[0], rtol=1e-6)


@pytest.mark.parametrize(("strategy", "axes"), [("ring", (8,)), ("ulysses", (4,))])
def test_dropout_does_not_depend_on_strategy_ring_or_layout(case, strategy, axes):
    """The same key drops the same weights as in the reference, of which log_sum_exp knows nothing."""
    dropped = case(strategy=strategy, axes=axes, layout="striped", heads=(4, 4), dropout_rate=0.4, local=BLOCKS[0])
    got, without = dropped.check(), dataclasses.replace(dropped, dropout_rate=0.0).dense("float64")
    np.testing.assert_allclose(got.log_sum_exp, without.log_sum_exp, atol=1e-5)
    assert np.abs(got.out - without.out).max() > 0.1


def test_another_dropout_key_drops_other_weights():
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 24, 2, 8)), jnp.float32)
    attend = jax.jit(lambda seed: attention(q, q, q, mask=CAUSAL, dropout=Dropout(0.5, jax.random.key(seed))).out)
    np.testing.assert_array_equal(attend(0), attend(0))
    assert (attend(0) != attend(1)).any()


@pytest.mark.parametrize(
    ("strategy", "axes", "mask"), [*[(*each, CAUSAL) for each in SHARDED], ("ring", (4,), Mask(causal=True, window=9))]
)
def test_balanced_documents_by_given_positions(case, strategy, axes, mask):
    """No layout: every row of the batch has an order of its own."""
    options = {"layout": "balanced", "packed": True, "alibi": True, "local": BLOCKS[0]}
    placed = case(strategy=strategy, axes=axes, heads=(4, 4), mask=mask, **options)
    assert (placed.order[0] != placed.order[1]).any()
    placed.check()


@pytest.mark.parametrize("axes", [(), (2,), (2, 2)])
def test_auto_picks_a_strategy_that_fits(case, axes):
    case(strategy="auto", axes=axes, layout="zigzag", heads=(4, 4), packed=True).check()


def test_shards_of_exactly_one_tile(case):
    case(axes=(4,), layout="contiguous", block_size=12).check()


def test_log_sum_exp_gradient_can_be_declined():
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 2, 4)), jnp.float32)

    def total(q, *, weight, log_sum_exp_gradient):
        out, log_sum_exp = attention(q, q, q, mask=CAUSAL, log_sum_exp_gradient=log_sum_exp_gradient)
        return jnp.sum(jnp.sin(out)) + weight * jnp.sum(log_sum_exp)

    gradient = lambda **options: jax.jit(jax.grad(partial(total, **options)))(q)  # noqa: E731
    of_out_alone = gradient(weight=0.0, log_sum_exp_gradient=True)
    np.testing.assert_allclose(gradient(weight=1.0, log_sum_exp_gradient=False), of_out_alone, rtol=1e-6, atol=1e-6)
    assert np.abs(gradient(weight=1.0, log_sum_exp_gradient=True) - of_out_alone).max() > 0.1


def on_a_ring(q, k, v, *, ring_size=2, axis_name: Any = "sp", mask: Any = CAUSAL, **options: Any):
    """Traces attention over a virtual ring; arguments are shards."""
    attend = lambda q, k, v: attention(q, k, v, axis_name=axis_name, mask=mask, **options)  # noqa: E731
    return jax.eval_shape(jax.vmap(attend, axis_size=ring_size, axis_name="sp"), q, k, v)


def shards(tokens, heads, dim=4, *, ring_size=2, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((ring_size, 1, tokens, heads, dim), dtype)


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses"])
def test_lengths_that_the_layout_does_not_divide(strategy):
    odd = shards(3, 2)
    with pytest.raises(ValueError, match=r"length 6 .* zigzag ring of size 2; pad to 8"):
        on_a_ring(odd, odd, odd, layout="zigzag", strategy=strategy)
    with pytest.raises(ValueError, match=r"unknown layout 'spiral'; choose one of contiguous, zigzag, striped"):
        on_a_ring(odd, odd, odd, layout="spiral", strategy=strategy)


@pytest.mark.parametrize(
    ("q", "k", "v", "rule"),
    [
        (shards(4, 3), shards(4, 2), shards(4, 2), "3 query heads cannot share 2 key-value heads"),
        (shards(4, 2), shards(4, 2), shards(4, 1), "k and v must have one shape and dtype"),
        (shards(4, 2), shards(4, 2), shards(4, 2, dtype=jnp.bfloat16), "k and v must have one shape and dtype"),
        (shards(4, 2, dtype=jnp.bfloat16), shards(4, 2), shards(4, 2), "q, k and v must have one dtype"),
        (*[shards(0, 2)] * 3, "need at least one row, token, head and dimension"),
        (shards(4, 2), shards(2, 2), shards(2, 2), "must agree in batch, local tokens and head dimension"),
        (shards(4, 2), shards(4, 2, 8), shards(4, 2, 8), "must agree in batch, local tokens and head dimension"),
        (*[shards(4, 2, dtype=jnp.int32)] * 3, "must be one of float32, .*, got int32"),
        (*[jax.ShapeDtypeStruct((2, 4, 2, 4), jnp.float32)] * 3, r"must be \[batch, tokens, heads, head_dim\]"),
    ],
)
def test_shapes_that_do_not_fit_together(q, k, v, rule):
    with pytest.raises(ValueError, match=rule):
        on_a_ring(q, k, v)


@pytest.mark.parametrize(
    ("strategy", "axis_name", "rule"),
    [
        ("circle", "sp", r"unknown strategy 'circle'; choose one of auto, .*ring.*dense"),
        (
            "blockwise",
            "sp",
            "runs over 0 mesh axes, got .*: ring, all_gather, ulysses",
        ),
        ("hybrid", "sp", "'hybrid' runs over 2 mesh axes"),
        ("ring", None, "'ring' runs over 1 mesh axes, got .*: blockwise, dense"),
        ("hybrid", ("sp", "sp"), r"different names; got \('sp', 'sp'\)"),
    ],
)
def test_strategies_that_do_not_fit_the_axis(strategy, axis_name, rule):
    x = shards(4, 2)
    with pytest.raises(ValueError, match=rule):
        on_a_ring(x, x, x, strategy=strategy, axis_name=axis_name)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (
            {"segment_ids": np.zeros((1, 3), int)},
            r"segment_ids must be \[1, 4\], an id for each token of q, got \(1, 3\)",
        ),
        ({"segment_ids": np.zeros((1, 4))}, "segment_ids must be integers, got float"),
        ({"positions": np.zeros(4, int)}, r"positions must be \[1, 4\] for q of shape .*, got \(4,\)"),
        ({"positions": np.zeros((3, 4), int)}, r"positions must be \[1, 4\] for q of shape .*, got \(3, 4\)"),
        ({"positions": np.zeros((1, 4))}, "positions must be integers, got float"),
        ({"alibi_slopes": np.zeros(3)}, r"one number for each of the 2 query heads, got \(3,\)"),
        ({"positions": [[0, 1, 2, 3]]}, "positions must be an array, got list"),
        ({"mask": "causal"}, r"mask must be a Mask, .* got 'causal'"),
        ({"dropout": 0.1}, r"dropout must be a Dropout\(rate, key\) or None, got 0.1"),
        ({"soft_cap": 0.0}, "soft_cap must be positive, got 0.0; None is no cap"),
        ({"local": "fast"}, "unknown local block 'fast'; choose one of auto, xla"),
        ({"block_size": -1}, "block_size must be a whole number of tokens, at least 1"),
        ({"heads_at_once": 0}, "heads_at_once must be a whole number of heads, at least 1"),
        ({"heads_at_once": 1.5}, "heads_at_once must be a whole number of heads, at least 1"),
    ],
)
def test_options_that_do_not_fit(options, rule):
    x = shards(4, 2)
    arguments: dict[str, Any] = jax.tree.map(lambda y: jnp.asarray(y) if isinstance(y, np.ndarray) else y, options)
    with pytest.raises(ValueError, match=rule):
        on_a_ring(x, x, x, **arguments)


class RefusingBlock:
    """A local block that serves attention without a window only, and remembers what it was asked."""

    looks_at_positions = True
    prefers_positions = False
    heads_at_once = None

    def __init__(self):
        self.demands = []

    def refusal(self, demand):
        self.demands.append(demand)
        return "it has no windows" if any(r.mask.window is not None for r in demand.relations) else None


def test_a_block_that_cannot_serve_is_refused_before_any_work():
    """The error says why, and what would serve; the block is told all that will be asked of it."""
    block, q, k = RefusingBlock(), shards(4, 4), shards(4, 2)
    with pytest.raises(ValueError, match=r"'RefusingBlock' cannot serve: it has no windows; local=.xla. serves"):
        on_a_ring(q, k, k, mask=Mask(causal=True, window=2), local=block, strategy="ring")
    [demand] = block.demands
    assert (demand.dtype, demand.head_dim, demand.query_heads, demand.key_value_heads) == ("float32", 4, 4, 2)
    assert (demand.length, demand.devices, demand.segments, demand.alibi) == (4, 2, False, False)
    assert {relation.mask.window for relation in demand.relations} == {2}


def test_a_ring_asks_for_no_mask_where_it_needs_none():
    """Full attention asks for rectangles that are visible in full, zigzag for those and its own causal one."""
    x = shards(4, 2)
    for mask, layout, kinds in [(FULL, "contiguous", {(FULL, None)}), (CAUSAL, "zigzag", {(FULL, None), (CAUSAL, 0)})]:
        block = RefusingBlock()
        block.looks_at_positions = False
        with pytest.raises(AttributeError, match="forward"):
            on_a_ring(x, x, x, mask=mask, layout=layout, local=block, strategy="ring")
        assert {(r.mask, r.offset) for demand in block.demands for r in demand.relations} == kinds

"""Ring attention: exact on any ring, no wasted tile, no hop too many, and linear memory under scans and remat."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ring_rl.kernels import CAUSAL, FULL, SAVED_NAMES, Mask, attention
from ring_rl.kernels.local.block import DIAGONAL, EVERYTHING
from ring_rl.kernels.local.ties import untied
from ring_rl.kernels.local.xla import XlaBlock


# Every example is a compilation of its own: few of them, and none spent on finding a smaller one.
@settings(max_examples=5, phases=[Phase.generate])
@given(data=st.data())
def test_equals_dense_float64(data, cases):
    data.draw(cases("ring")).check()


@settings(max_examples=3, phases=[Phase.generate])
@given(
    ring_size=st.sampled_from([3, 5, 2]),
    chunk=st.integers(2, 9),
    heads=st.sampled_from([(1, 1), (6, 2), (3, 3), (4, 1)]),
    block_size=st.integers(1, 20),
    mask=st.sampled_from([CAUSAL, FULL, Mask(causal=True, causal_block_size=3)]),
    layout=st.sampled_from(["zigzag", "striped", "contiguous"]),
    packed=st.booleans(),
    prefers_positions=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_on_a_virtual_ring(case, ring_size, chunk, block_size, prefers_positions, **rest):
    """Odd chunks, blocks that divide nothing, rings that are no power of two."""
    block = XlaBlock(block_size=block_size, prefers_positions=prefers_positions)
    tokens = 2 * ring_size * chunk
    case(axes=(ring_size,), tokens=tokens, batch=1, head_dim=4, virtual=True, local=block, **rest).check()


def test_some_heads_at_a_time_on_a_virtual_ring(case):
    """A ring for each, differentiated from outside the vmap, where no loop may hold a transfer."""
    block = XlaBlock(block_size=8, heads_at_once=3)  # of 4, so 2
    shape = {"axes": (2,), "layout": "zigzag", "heads": (8, 4), "batch": 1, "tokens": 16}
    case(**shape, virtual=True, local=block, dropout_rate=0.2).check()


@pytest.mark.parametrize(
    ("strategy", "axes", "layout"),
    [
        ("ring", (4,), "zigzag"),
        ("all_gather", (4,), "striped"),
        ("ulysses", (2,), "contiguous"),
        ("blockwise", (), "contiguous"),
    ],
)
def test_a_caller_may_ask_for_some_heads_at_a_time(case, strategy, axes, layout):
    """Whatever the block would take; every head keeps its own slope and its own dropped weights."""
    shape = {"axes": axes, "layout": layout, "strategy": strategy, "heads": (8, 4), "tokens": 16}
    block = XlaBlock(block_size=8, heads_at_once=4)
    case(**shape, local=block, heads_at_once=1, alibi=True, dropout_rate=0.2).check()


@pytest.mark.parametrize(
    "shape",
    [
        {"axes": (4,), "layout": "balanced", "packed": True},
        {"axes": (4,), "layout": "balanced", "packed": True, "strategy": "all_gather"},
        {"axes": (2, 2), "layout": "zigzag", "packed": True, "strategy": "hybrid"},
        {"axes": (4,), "mask": Mask(causal=True, window=5)},
        {"axes": (), "strategy": "blockwise", "packed": True, "batch": 3},
    ],
    ids=["positions given", "all_gather, positions given", "hybrid", "window", "blockwise"],
)
def test_some_heads_at_a_time_keep_their_rows_segments_and_positions(case, shape):
    """Each group of heads sees its own row's side inputs, in every exchange."""
    block = XlaBlock(block_size=8)
    case(tokens=32, heads=(8, 4), local=block, heads_at_once=1, alibi=True, dropout_rate=0.2, **shape).check()


@pytest.mark.parametrize(("asked", "seen"), [(None, (2, 4)), (1, (1, 1)), (3, (1, 2)), (64, (1, 4))])
def test_the_block_gets_as_many_heads_as_were_asked_for(asked, seen):
    """A divisor of them; where it is all of them, of one row nevertheless."""
    shapes = []

    class Watching(CountingBlock):
        def forward(self, queries, keys, **rest):
            shapes.append(keys.k.shape[:2])
            return super().forward(queries, keys, **rest)

    q = jnp.ones((2, 8, 8, 4))
    attention(q, q[:, :, :4], q[:, :, :4], mask=CAUSAL, strategy="blockwise", local=Watching(), heads_at_once=asked)
    assert set(shapes) == {seen}


def test_error_does_not_grow_with_the_ring(case):
    """Partial results merge in float32 with one division: eight devices round no worse than one."""
    one = case(layout="zigzag", tokens=512, local=XlaBlock(block_size=64), seed=1, axes=(1,), heads=(2, 1))
    expected, naive = one.dense("float64"), one.dense("float32")
    for ring_size in (1, 8):
        for a, b, c in zip(dataclasses.replace(one, axes=(ring_size,)).run(), expected, naive, strict=True):
            assert np.abs(a - b).max() <= 2 * np.abs(c - b).max() + 1e-7, ring_size


def test_no_future_leaks_through_gradients(case):
    """The output at a position does not depend on any later key, value or query."""
    ring = case(layout="zigzag", axes=(4,), local=XlaBlock(block_size=5))
    half, order = ring.tokens // 2, ring.order[0]
    back = np.argsort(order)

    def early_outputs(q, k, v):
        out = ring.attend(q[:, order], k[:, order], v[:, order], {})[0][:, back]
        return jnp.sum(jnp.sin(out[:, :half]))

    for gradient in jax.jit(jax.grad(early_outputs, argnums=(0, 1, 2)))(*ring.inputs):
        assert np.abs(gradient[:, :half]).max() > 0
        assert np.abs(gradient[:, half:]).max() == 0


def test_gradient_inside_the_virtual_ring(case):
    """jax differentiates inside a vmapped function another way than outside; both must run."""
    ring = case(axes=(2,), batch=1, heads=(2, 1), tokens=16)
    shards = [x.reshape(ring.batch, 2, -1, *x.shape[2:]) for x in ring.inputs]

    def local_loss(q, k, v):
        out, log_sum_exp = attention(q, k, v, axis_name="ring", mask=CAUSAL, strategy="ring")
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(log_sum_exp))

    inside = jax.jit(jax.vmap(jax.grad(local_loss, argnums=(0, 1, 2)), in_axes=1, out_axes=1, axis_name="ring"))
    outside = jax.jit(
        jax.grad(lambda *x: jnp.sum(jax.vmap(local_loss, in_axes=1, axis_name="ring")(*x)), argnums=(0, 1, 2))
    )
    for a, b in zip(inside(*shards), outside(*shards), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_runs_without_varying_axes_checks(case, strategy):
    """shard_map's check is on everywhere else."""
    case(strategy=strategy, axes=(2,), layout="zigzag", check_vma=False, local=XlaBlock(block_size=24)).check()


class CountingBlock:
    """A local block that records what it was asked to compute, and computes nothing."""

    looks_at_positions = True
    prefers_positions = False
    heads_at_once = None

    def __init__(self):
        self.forward_calls, self.backward_calls = [], []

    def refusal(self, demand):
        del demand

    def forward(self, queries, keys, *, relation, scoring, tie=untied):
        del scoring
        self.forward_calls.append((self.area(queries, keys), relation))
        return tie((jnp.zeros(queries.q.shape, jnp.float32), jnp.zeros(queries.q.shape[:3], jnp.float32)))

    def backward(self, queries, keys, cotangents, *, relation, scoring, tie=untied):
        del cotangents, scoring
        self.backward_calls.append((self.area(queries, keys), relation))
        return tie(tuple(jnp.zeros(x.shape, jnp.float32) for x in (queries.q, keys.k, keys.v)))

    @staticmethod
    def area(queries, keys) -> int:
        """Scores of one head."""
        return queries.q.shape[0] * queries.q.shape[2] * keys.k.shape[2]


@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_zigzag_computes_no_wasted_tile(case, strategy):
    """Every hop does exactly T²/2 scores a device, unmasked; the own block is the only causal one."""
    block = CountingBlock()
    case(strategy=strategy, batch=1, tokens=64, axes=(4,), layout="zigzag", virtual=True, local=block).run()
    local = 64 // 4
    own, *hops = block.forward_calls
    assert own == (local * local, DIAGONAL)
    assert len(hops) >= 1
    assert set(hops) == {(local * local // 2, EVERYTHING)}
    assert [area for area, relation in block.backward_calls if relation == DIAGONAL] == [(local // 2) ** 2] * 2
    unmasked = [call for call in block.backward_calls if call[1] != DIAGONAL]
    assert set(unmasked) == {(local * local // 2, EVERYTHING), ((local // 2) ** 2, EVERYTHING)}
    # Once the rest of the own block, and every hop.
    assert unmasked.count(((local // 2) ** 2, EVERYTHING)) == 1
    assert unmasked.count((local * local // 2, EVERYTHING)) == 3


def permutes(jaxpr, equations) -> int:
    """How many arrays a program sends, loops counted by their length."""
    return sum(times for equation, times in equations(jaxpr) if equation.primitive.name == "ppermute")


@pytest.mark.parametrize("ring_size", [1, 2, 3, 4, 7])
def test_no_hop_too_many(case, equations, ring_size):
    """k, v make n - 1 hops in forward, as one array; in backward as many again, and dk, dv n - 1."""
    ring = case(batch=1, axes=(ring_size,), tokens=4 * ring_size, layout="zigzag", local=XlaBlock(block_size=8))
    assert permutes(ring.jaxpr(backward=False), equations) == ring_size - 1
    assert permutes(ring.jaxpr(backward=True), equations) == 3 * (ring_size - 1)


@pytest.mark.parametrize(("layout", "arrays"), [("zigzag", 2), ("balanced", 3)])
def test_segments_and_given_positions_travel_and_nothing_else(case, equations, layout, arrays):
    """Forward k|v, segment ids and positions, n - 1 times each; backward those again, and dk|dv."""
    ring = case(axes=(4,), layout=layout, packed=True, alibi=True, dropout_rate=0.1, local=XlaBlock(block_size=24))
    assert permutes(ring.jaxpr(backward=False), equations) == 3 * arrays
    assert permutes(ring.jaxpr(backward=True), equations) == 3 * (2 * arrays + 1)


def test_rematerialised_layer_does_not_run_the_ring_again(case, equations):
    ring = case(axes=(4,), layout="zigzag")
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)

    def sent(wrap):
        """By a layer that does something before its attention, so that there is something to recompute."""
        layer = wrap(lambda q, k, v: ring.attend(2 * q, k, v, {}))

        def backward_too(q, k, v):
            results, pull_back = jax.vjp(layer, q, k, v)
            return pull_back(results)

        return permutes(jax.make_jaxpr(backward_too)(*ring.inputs).jaxpr, equations)

    plain = sent(lambda layer: layer)
    assert plain > 0
    assert sent(partial(jax.checkpoint, policy=policy)) == plain
    assert sent(jax.checkpoint) > plain


def test_scanned_layers_keep_no_masks():
    """Memory of a scan over layers is linear in tokens: masks are not hoisted out and stored for every tile."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("sp",))
    sharding = NamedSharding(mesh, P(None, "sp"))

    def temporary_bytes(tokens, layers):
        x = jax.ShapeDtypeStruct((1, tokens, 2, 8), jnp.float32, sharding=sharding)
        ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=sharding)

        def local(x, ids):
            options = {"mask": CAUSAL, "layout": "zigzag", "strategy": "ring", "local": XlaBlock(block_size=64)}
            return attention(x, x, x, axis_name="sp", segment_ids=ids, **options).out

        attend = jax.shard_map(local, mesh=mesh, in_specs=P(None, "sp"), out_specs=P(None, "sp"))

        def loss(x, ids):
            return jnp.sum(jax.lax.scan(lambda x, _: (attend(x, ids), None), x, None, length=layers)[0])

        memory = jax.jit(jax.grad(loss)).lower(x, ids).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    # Per layer and token of a device: q = k = v once, out and log_sum_exp, all float32; generously twice that.
    per_layer = (temporary_bytes(4096, 12) - temporary_bytes(4096, 4)) / 8
    assert per_layer <= 2 * (4096 // 2) * 4 * (2 * 2 * 8 + 2)

"""Ring attention against the dense float64 reference: values and every gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ring_rl.kernels.layout import LAYOUTS, permutation
from ring_rl.kernels.mask import CAUSAL, FULL
from ring_rl.kernels.reference import reference_attention
from ring_rl.kernels.strategies.ring import SAVED_NAMES, ring_attention, ring_attention_with_log_sum_exp

B, T, H, K, D = 2, 112, 4, 2, 16
MASKS = {"causal": CAUSAL, "full": FULL}


def random_inputs(seed, *, B=B, T=T, H=H, K=K, D=D, scale=1.0):
    """q, k, v and the cotangents of out and log_sum_exp, in natural order."""
    generator = np.random.default_rng(seed)
    draw = lambda *shape: generator.normal(size=shape).astype(np.float32)  # noqa: E731
    return (scale * draw(B, T, H, D), draw(B, T, K, D), draw(B, T, K, D)), (draw(B, T, H, D), draw(B, H, T))


def results(attend, inputs, cotangents):
    """(out, log_sum_exp, dq, dk, dv) of an attention function."""
    (out, log_sum_exp), pull_back = jax.vjp(attend, *inputs)
    return (
        out,
        log_sum_exp,
        *pull_back((cotangents[0].astype(out.dtype), cotangents[1].astype(log_sum_exp.dtype))),
    )


def dense(inputs, cotangents, *, mask, dtype):
    """The reference in `dtype`, as numpy arrays of float64."""
    with jax.enable_x64(True):
        inputs, cotangents = ([jnp.asarray(x, dtype) for x in group] for group in (inputs, cotangents))
        expected = jax.jit(partial(results, partial(reference_attention, mask=mask)))(inputs, cotangents)
        return [np.asarray(x, np.float64) for x in expected]


def ring_mesh(ring_size):
    return Mesh(np.array(jax.devices()[:ring_size]), ("sp",))


def sharded(function, ring_size, *, check_vma=True):
    """`function` with the sequence over `ring_size` devices."""
    tokens, rows = P(None, "sp"), P(None, None, "sp")
    return jax.shard_map(
        function, mesh=ring_mesh(ring_size), in_specs=tokens, out_specs=(tokens, rows), check_vma=check_vma
    )


def virtual(function, ring_size):
    """`function` over a virtual ring: one device, `jax.vmap` with an axis name."""

    def whole(q, k, v):
        shards = [x.reshape(x.shape[0], ring_size, -1, *x.shape[2:]) for x in (q, k, v)]
        out, log_sum_exp = jax.vmap(function, in_axes=1, out_axes=(1, 2), axis_name="sp")(*shards)
        return out.reshape(q.shape), log_sum_exp.reshape(*log_sum_exp.shape[:2], -1)

    return whole


def ring_results(placed, inputs, cotangents, *, ring_size, layout, mask, block_size=24, local="auto"):
    """What the ring computes, put back into natural order."""
    order = permutation(inputs[0].shape[1], ring_size=ring_size, layout=layout)
    back = np.argsort(order)
    attend = partial(
        ring_attention_with_log_sum_exp,
        axis_name="sp",
        mask=mask,
        layout=layout,
        block_size=block_size,
        local=local,
    )
    permuted = [x[:, order] for x in inputs]
    got = jax.jit(partial(results, placed(attend, ring_size)))(
        permuted, (cotangents[0][:, order], cotangents[1][:, :, order])
    )
    out, log_sum_exp, *gradients = (np.asarray(x.astype(jnp.float32), np.float64) for x in got)
    return [out[:, back], log_sum_exp[:, :, back], *(x[:, back] for x in gradients)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ring_size", [1, 2, 4, 8])
@pytest.mark.parametrize("placed", [sharded, virtual])
def test_equals_dense_float64(placed, ring_size, layout, mask):
    inputs, cotangents = random_inputs(0)
    expected = dense(inputs, cotangents, mask=MASKS[mask], dtype=jnp.float64)
    got = ring_results(placed, inputs, cotangents, ring_size=ring_size, layout=layout, mask=MASKS[mask])
    for name, a, b in zip(("out", "log_sum_exp", "dq", "dk", "dv"), got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=name)


@settings(max_examples=8)  # every example is a compilation of its own
@given(
    seed=st.integers(0, 2**16),
    ring_size=st.sampled_from([2, 3, 5]),
    chunk=st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (6, 2), (3, 3), (4, 1)]),
    block_size=st.integers(1, 20),
    mask=st.sampled_from(sorted(MASKS)),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape_on_a_virtual_ring(seed, ring_size, chunk, heads, block_size, mask, layout):
    """Odd chunks, blocks that divide nothing, rings that are no power of two."""
    inputs, cotangents = random_inputs(seed, B=1, T=2 * ring_size * chunk, H=heads[0], K=heads[1], D=4)
    expected = dense(inputs, cotangents, mask=MASKS[mask], dtype=jnp.float64)
    got = ring_results(
        virtual,
        inputs,
        cotangents,
        ring_size=ring_size,
        layout=layout,
        mask=MASKS[mask],
        block_size=block_size,
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_error_does_not_grow_with_the_ring():
    """Partial results merge in float32 with one division: eight devices round no worse than one."""
    inputs, cotangents = random_inputs(1, T=512)
    expected = dense(inputs, cotangents, mask=CAUSAL, dtype=jnp.float64)
    naive = dense(inputs, cotangents, mask=CAUSAL, dtype=jnp.float32)
    naive_errors = [np.abs(a - b).max() for a, b in zip(naive, expected, strict=True)]
    for ring_size in (1, 2, 8):
        got = ring_results(sharded, inputs, cotangents, ring_size=ring_size, layout="zigzag", mask=CAUSAL)
        for a, b, naive_error in zip(got, expected, naive_errors, strict=True):
            assert np.abs(a - b).max() <= 2 * naive_error + 1e-7, ring_size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_is_no_worse_than_twice_the_naive_error(layout):
    inputs, cotangents = random_inputs(2)
    inputs = [np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)) for x in inputs]
    expected = dense(inputs, cotangents, mask=CAUSAL, dtype=jnp.float64)
    naive = dense(inputs, cotangents, mask=CAUSAL, dtype=jnp.bfloat16)
    low = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
    got = ring_results(sharded, low, cotangents, ring_size=8, layout=layout, mask=CAUSAL)
    for name, a, b, c in zip(("out", "log_sum_exp", "dq", "dk", "dv"), got, expected, naive, strict=True):
        assert np.abs(a - b).max() <= 2 * np.abs(c - b).max() + 1e-5, name


def test_large_logits_stay_finite_and_exact():
    """Logits of ±1e4 overflow exp in any softmax that does not subtract the maximum everywhere."""
    inputs, cotangents = random_inputs(3, scale=3e3)
    expected = dense(inputs, cotangents, mask=CAUSAL, dtype=jnp.float64)
    naive = dense(inputs, cotangents, mask=CAUSAL, dtype=jnp.float32)
    got = ring_results(sharded, inputs, cotangents, ring_size=4, layout="zigzag", mask=CAUSAL)
    # Weights are recomputed from log_sum_exp, whose float32 rounding is a relative error of the weights.
    rounding = np.finfo(np.float32).eps * np.abs(expected[1]).max()
    assert 1e-4 < rounding < 1e-2
    for a, b, c in zip(got, expected, naive, strict=True):
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= 2 * np.abs(c - b).max() + 2 * rounding * np.abs(b).max()


def test_no_future_leaks_through_gradients():
    """The output at a position does not depend on any later key, value or query."""
    (q, k, v), _ = random_inputs(4)
    order = permutation(T, ring_size=4, layout="zigzag")
    attend = sharded(partial(ring_attention_with_log_sum_exp, axis_name="sp", mask=CAUSAL, layout="zigzag"), 4)

    def early_outputs(q, k, v):
        out = attend(q[:, order], k[:, order], v[:, order])[0][:, np.argsort(order)]
        return jnp.sum(jnp.sin(out[:, : T // 2]))

    for gradient in jax.jit(jax.grad(early_outputs, argnums=(0, 1, 2)))(q, k, v):
        assert np.abs(gradient[:, : T // 2]).max() > 0
        assert np.abs(gradient[:, T // 2 :]).max() == 0


def test_gradient_inside_the_virtual_ring():
    """jax differentiates inside a vmapped function another way than outside; both must run."""
    (q, k, v), _ = random_inputs(5)
    shards = [x.reshape(B, 4, -1, *x.shape[2:]) for x in (q, k, v)]
    attend = partial(ring_attention, axis_name="sp", mask=CAUSAL, layout="contiguous")

    def local_loss(q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v)))

    inside = jax.jit(jax.vmap(jax.grad(local_loss, argnums=(0, 1, 2)), in_axes=1, out_axes=1, axis_name="sp"))
    outside = jax.jit(
        jax.grad(lambda *x: jnp.sum(jax.vmap(local_loss, in_axes=1, axis_name="sp")(*x)), argnums=(0, 1, 2))
    )
    for a, b in zip(inside(*shards), outside(*shards), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_runs_with_and_without_varying_axes_checks(check_vma):
    inputs, cotangents = random_inputs(6)
    placed = partial(sharded, check_vma=check_vma)
    expected = dense(inputs, cotangents, mask=CAUSAL, dtype=jnp.float64)
    got = ring_results(placed, inputs, cotangents, ring_size=4, layout="zigzag", mask=CAUSAL)
    np.testing.assert_allclose(got[2], expected[2], atol=1e-5)


class _CountingBlock:
    """A local block that records what it was asked to compute, and computes nothing."""

    def __init__(self):
        self.forward_calls, self.backward_calls = [], []

    def forward(self, q, k, v, *, causal, scale):
        self.forward_calls.append((q.shape[0] * q.shape[1] * k.shape[1], causal))
        return jnp.zeros(q.shape, jnp.float32), jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)

    def backward(self, q, k, v, *, causal, scale, **rest):
        self.backward_calls.append((q.shape[0] * q.shape[1] * k.shape[1], causal))
        return tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))


def test_zigzag_computes_no_wasted_tile():
    """Every hop does exactly T²/2 scores a device, unmasked; the own block is the only causal one."""
    inputs, cotangents = random_inputs(7, B=1, T=64)
    block = _CountingBlock()
    ring_results(virtual, inputs, cotangents, ring_size=4, layout="zigzag", mask=CAUSAL, local=block)
    local = 64 // 4
    own, *hops = block.forward_calls
    assert own == (local * local, True)
    assert set(hops) == {(local * local // 2, False)}
    causal = [area for area, is_causal in block.backward_calls if is_causal]
    assert causal == [(local // 2) ** 2] * 2
    assert {area for area, is_causal in block.backward_calls if not is_causal} == {
        local * local // 2,  # a hop
        (local // 2) ** 2,  # the rest of the own block
    }


def permutes_executed(jaxpr, times=1):
    """How many arrays a program sends round the ring, loops counted by their length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ppermute":
            total += times
        inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for parameter in equation.params.values():
            for value in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                value = getattr(value, "jaxpr", value)
                if hasattr(value, "eqns"):
                    total += permutes_executed(value, inner)
    return total


@pytest.mark.parametrize("ring_size", [1, 2, 3, 4, 7])
def test_no_hop_too_many(ring_size):
    """k, v make n - 1 hops in forward, as one array; in backward as many again, and dk, dv n - 1."""
    T = 2 * ring_size * 2
    inputs, cotangents = random_inputs(8, B=1, T=T, D=4)
    attend = sharded(partial(ring_attention_with_log_sum_exp, axis_name="sp", mask=CAUSAL, layout="zigzag"), ring_size)
    forward = jax.make_jaxpr(attend)(*inputs)
    both = jax.make_jaxpr(partial(results, attend))(inputs, cotangents)
    assert permutes_executed(forward.jaxpr) == ring_size - 1
    assert permutes_executed(both.jaxpr) == 3 * (ring_size - 1)


def test_rematerialised_layer_does_not_run_the_ring_again():
    inputs, cotangents = random_inputs(9)
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)

    def layer(q, k, v):
        attend = partial(ring_attention_with_log_sum_exp, axis_name="sp", mask=CAUSAL, layout="zigzag")
        return sharded(attend, 4)(2 * q, k, v)

    def permutes(function):
        return permutes_executed(jax.make_jaxpr(partial(results, function))(inputs, cotangents).jaxpr)

    assert permutes(jax.checkpoint(layer, policy=policy)) == permutes(layer)
    assert permutes(jax.checkpoint(layer)) > permutes(layer)


def test_scanned_layers_keep_no_masks():
    """Memory of a scan over layers is linear in tokens: masks are not hoisted out and stored for every tile."""

    def temporary_bytes(tokens, layers):
        x = jax.ShapeDtypeStruct((1, tokens, 2, 8), jnp.float32, sharding=NamedSharding(ring_mesh(4), P(None, "sp")))
        attend = jax.shard_map(
            partial(ring_attention, axis_name="sp", mask=CAUSAL, layout="zigzag", block_size=64),
            mesh=ring_mesh(4),
            in_specs=P(None, "sp"),
            out_specs=P(None, "sp"),
        )

        def loss(x):
            return jnp.sum(jax.lax.scan(lambda x, _: (attend(x, x, x), None), x, None, length=layers)[0])

        return jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis().temp_size_in_bytes

    # Per layer and token: q = k = v once, out and log_sum_exp, all float32; generously twice that.
    per_layer = (temporary_bytes(8192, 12) - temporary_bytes(8192, 4)) / 8
    assert per_layer <= 2 * (8192 // 4) * 4 * (2 * 2 * 8 + 2)


def test_bad_shapes_name_the_rule_and_the_remedy():
    attend = partial(ring_attention, axis_name="sp", mask=CAUSAL, layout="zigzag")
    run = lambda q, k, v: jax.vmap(attend, axis_name="sp")(q, k, v)  # noqa: E731
    x = lambda tokens, heads, dim=4: jnp.zeros((2, 1, tokens, heads, dim))  # noqa: E731
    with pytest.raises(ValueError, match=r"length 6 .* zigzag ring of size 2; pad to 8"):
        run(x(3, 2), x(3, 2), x(3, 2))
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key-value heads"):
        run(x(4, 3), x(4, 2), x(4, 2))
    with pytest.raises(ValueError, match="k and v must have one shape and dtype"):
        run(x(4, 2), x(4, 2), x(4, 1))
    with pytest.raises(ValueError, match="must agree in batch, local tokens and head dimension"):
        run(x(4, 2), x(2, 2), x(2, 2))
    with pytest.raises(ValueError, match=r"unknown layout 'spiral'; choose one of contiguous, zigzag"):
        jax.vmap(partial(ring_attention, axis_name="sp", mask=CAUSAL, layout="spiral"), axis_name="sp")(
            x(4, 2), x(4, 2), x(4, 2)
        )
    with pytest.raises(ValueError, match="unknown local block 'fast'"):
        jax.vmap(partial(attend, local="fast"), axis_name="sp")(x(4, 2), x(4, 2), x(4, 2))

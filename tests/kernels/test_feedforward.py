from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ring_rl.kernels.feedforward import blockwise_feedforward

M, F = 8, 64


def weights():
    generator = np.random.default_rng(0)
    return tuple(jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in ((M, F), (F, M)))


def feed_forward(w_in, w_out, x):
    return jax.nn.gelu(x @ w_in) @ w_out


def loss(parameters, x, chunks):
    return jnp.sum(jnp.sin(blockwise_feedforward(partial(feed_forward, *parameters), x, chunks=chunks)))


@pytest.mark.parametrize("chunks", [1, 3, 8, 48])
def test_equals_the_whole_feed_forward(chunks):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 48, M)), jnp.float32)
    expected = feed_forward(*weights(), x)
    got = blockwise_feedforward(partial(feed_forward, *weights()), x, chunks=chunks)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    expected = jax.grad(lambda p, x: jnp.sum(jnp.sin(feed_forward(*p, x))), argnums=(0, 1))(weights(), x)
    got = jax.grad(loss, argnums=(0, 1))(weights(), x, chunks)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), got, expected)


def test_sharded_tokens_stay_where_they_are_and_hidden_memory_shrinks():
    mesh = Mesh(np.array(jax.devices()[:4]), ("sp",))
    x = jax.ShapeDtypeStruct((1, 4096, M), jnp.float32, sharding=NamedSharding(mesh, P(None, "sp")))

    def compiled(chunks):
        return jax.jit(jax.grad(loss, argnums=1), static_argnums=2).lower(weights(), x, chunks).compile()

    in_one, in_sixteen = compiled(1), compiled(16)
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in in_sixteen.as_text()
    hidden_bytes = 4096 // 4 * F * 4
    assert in_one.memory_analysis().temp_size_in_bytes >= hidden_bytes
    assert in_sixteen.memory_analysis().temp_size_in_bytes < hidden_bytes / 2


def test_chunks_must_divide():
    with pytest.raises(ValueError, match="10 tokens cannot be cut into 4 feed-forward chunks"):
        blockwise_feedforward(lambda x: x, jnp.zeros((1, 10, 2)), chunks=4)


def test_runs_inside_shard_map():
    """Where replicated weights meet sharded tokens; gradients are the sums over all devices' tokens."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 48, M)), jnp.float32)
    mesh, tokens = Mesh(np.array(jax.devices()[:8]), ("sp",)), P(None, "sp")

    def gradients(parameters, x):
        return jax.grad(lambda p, x: jax.lax.psum(loss(p, x, 3), "sp"), argnums=(0, 1))(parameters, x)

    run = jax.shard_map(gradients, mesh=mesh, in_specs=(P(), tokens), out_specs=(P(), tokens))
    expected = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(weights(), x, 1)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), jax.jit(run)(weights(), x), expected)

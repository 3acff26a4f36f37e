import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from ring_rl.kernels.layout import permutation
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.rotary import rotate
from ring_rl.nn.transformer import Transformer, TransformerConfig

B, T, M = 2, 32, 16


def config(**changes):
    values = {
        "layers": 2,
        "width": M,
        "query_heads": 4,
        "key_value_heads": 2,
        "head_dim": 4,
        "feed_forward_width": 32,
        "feed_forward_chunks": 1,
        "rotary_base": 100.0,
        "attention_block_size": 8,
        "saved_activations": "all",
    }
    return TransformerConfig(**(values | changes))


def parallel(dp, sp, layout="zigzag"):
    devices = np.array(jax.devices()[: dp * sp]).reshape(dp, sp)
    mesh = Mesh(devices, ("dp", "sp"), axis_types=(AxisType.Auto, AxisType.Auto))
    return SequenceParallel(mesh=mesh, layout=layout)


def inputs():
    x = np.random.default_rng(0).normal(size=(B, T, M)).astype(np.float32)
    return x, np.broadcast_to(np.arange(T), (B, T))


def apply(model, x, positions, parallel):
    """The transformer's result in natural order, from inputs in natural order."""
    order = permutation(T, ring_size=parallel.ring_size, layout=parallel.layout)
    graphdef, parameters = nnx.split(model)
    # As numpy arrays they belong to no device yet and go wherever the mesh is.
    forward = jax.jit(lambda parameters, x, positions: nnx.merge(graphdef, parameters)(x, positions, parallel))
    out = forward(jax.device_get(parameters), x[:, order], positions[:, order])
    return np.asarray(out)[:, np.argsort(order)]


@pytest.mark.parametrize(("dp", "sp", "layout"), [(1, 8, "zigzag"), (2, 4, "contiguous")])
def test_a_ring_gives_what_one_device_gives(dp, sp, layout):
    model = Transformer(config(), rngs=nnx.Rngs(0))
    x, positions = inputs()
    expected = apply(model, x, positions, parallel(1, 1))
    np.testing.assert_allclose(apply(model, x, positions, parallel(dp, sp, layout)), expected, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4])
def test_decoding_gives_what_the_whole_sequence_gives(chunk):
    model = Transformer(config(), rngs=nnx.Rngs(0))
    x, positions = inputs()
    expected = apply(model, x, positions, parallel(1, 1))
    decode = nnx.jit(lambda model, x, cache: model.decode(x, cache))
    cache, pieces = model.empty_cache(batch=B, capacity=T), []
    for start in range(0, T, chunk):
        out, cache = decode(model, x[:, start : start + chunk], cache)
        pieces.append(out)
    assert int(cache.length) == T == cache.capacity
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, atol=1e-5)


def test_what_is_saved_changes_memory_and_not_the_result():
    x, positions = inputs()

    def gradient(saved_activations, chunks):
        model = Transformer(config(saved_activations=saved_activations, feed_forward_chunks=chunks), rngs=nnx.Rngs(0))
        graphdef, parameters = nnx.split(model)

        def loss(parameters):
            return jnp.sum(jnp.sin(nnx.merge(graphdef, parameters)(x, positions, parallel(1, 2, "contiguous"))))

        return jax.jit(jax.grad(loss))(parameters)

    expected = gradient("all", 1)
    for saved_activations, chunks in (("attention", 1), ("none", 4)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            gradient(saved_activations, chunks),
            expected,
        )


def test_rotary_scores_depend_on_distance_only():
    generator = np.random.default_rng(1)
    q, k = (jnp.asarray(generator.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(at_q, at_k):
        turned = [rotate(x, jnp.array([[at]]), base=100.0) for x, at in ((q, at_q), (k, at_k))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(5, 3) == pytest.approx(score(105, 103), abs=1e-4)
    assert abs(score(5, 3) - score(5, 4)) > 1e-3
    np.testing.assert_allclose(rotate(q, jnp.array([[0]]), base=100.0), q)


def test_bad_sizes_name_the_rule():
    with pytest.raises(ValueError, match=r"query_heads=4 must be a multiple of key_value_heads=3"):
        config(key_value_heads=3)
    with pytest.raises(ValueError, match=r"head_dim=5 must be even"):
        config(head_dim=5)
    with pytest.raises(ValueError, match=r"transformer.layers must be at least 1, got 0"):
        config(layers=0)
    with pytest.raises(ValueError, match="even head dimension, got 3"):
        rotate(jnp.zeros((1, 1, 1, 3)), jnp.zeros((1, 1), int), base=10.0)
    with pytest.raises(ValueError, match=r"batch of 3 sequences is not divisible by dp=2; use a multiple of 2"):
        parallel(2, 1).check(3, 8)
    model = Transformer(config(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"sequence length 32 is not divisible .* zigzag ring of size 3; pad to 36"):
        model(*inputs(), parallel(1, 3))

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ring_rl.kernels.layout import permutation
from ring_rl.nn.logical_axes import logical_axes
from ring_rl.nn.vocabulary import Vocabulary

V = 48


def make(transformers, *, tied, size=V, dtype=jnp.float32):
    return Vocabulary(size=size, width=transformers.width, tied=tied, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))


def batch(transformers):
    generator = np.random.default_rng(1)
    shape = (transformers.batch, transformers.tokens)
    tokens, targets = (generator.integers(0, V, size=shape).astype(np.int32) for _ in range(2))
    targets[0, :5] = -1
    return tokens, targets, generator.uniform(size=shape).astype(np.float32)


def loss(parameters, graphdef, tokens, targets, weights, around, chunks):
    model = nnx.merge(graphdef, parameters)
    hidden = jnp.tanh(30 * model.embed(tokens, around))
    sums = model.cross_entropy(hidden, targets, around, chunks=chunks, weights=weights)
    return sums.loss_sum, sums


def dense_loss(parameters, graphdef, tokens, targets, weights):
    model = nnx.merge(graphdef, parameters)
    logits = model.logits(jnp.tanh(30 * model.embedding[...][tokens]))
    weights = weights * (targets >= 0)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights * picked), jnp.sum(weights)


@pytest.mark.parametrize(
    ("sizes", "tied", "size"), [((1, 2, 2, 2), True, V), ((1, 1, 4, 2), False, V), ((2, 1, 2, 1), False, V + 1)]
)
def test_loss_and_gradients_are_those_of_dense_logits(transformers, sizes, tied, size):
    graphdef, parameters = nnx.split(make(transformers, tied=tied, size=size))
    parameters = jax.device_get(parameters)
    around, data = transformers.parallel(*sizes), batch(transformers)
    order = permutation(transformers.tokens, ring_size=around.ring_size, layout=around.layout)
    run = jax.jit(jax.grad(lambda p, *data: loss(p, graphdef, *data, around, 4), has_aux=True))
    got, sums = run(parameters, *(x[:, order] for x in data))
    (value, weight), expected = (
        dense_loss(parameters, graphdef, *data),
        jax.grad(lambda p: dense_loss(p, graphdef, *data)[0])(parameters),
    )
    np.testing.assert_allclose((sums.loss_sum, sums.weight_sum), (value, weight), rtol=1e-5)
    transformers.assert_close(jax.device_get(got), jax.device_get(expected))


def test_a_device_holds_its_tokens_logits_of_its_vocabulary_a_chunk_at_a_time(transformers):
    """In the compiled program no array is as large as more than that, and the head is whole nowhere."""
    size, chunks, around = 4096, 4, transformers.parallel(1, 2, 2, 2)
    model = make(transformers, tied=False, size=size)
    graphdef, parameters = nnx.split(model)
    data = batch(transformers)
    compiled = (
        jax.jit(jax.grad(lambda p, *data: loss(p, graphdef, *data, around, chunks)[0]))
        .lower(parameters, *data)
        .compile()
    )
    shapes = [[int(n) for n in shape.split(",")] for shape in re.findall(r"[a-z]\d+\[([\d,]+)\]", compiled.as_text())]
    tokens_a_step = transformers.batch // 2 * transformers.tokens // 2 // chunks
    of_vocabulary = [shape for shape in shapes if size // 2 in shape or size in shape]
    logits = [shape for shape in of_vocabulary if transformers.width not in shape]
    assert max(int(np.prod(shape)) for shape in logits) == tokens_a_step * size // 2
    assert max(int(np.prod(shape)) for shape in of_vocabulary) <= transformers.width * size


def test_bfloat16_products_and_float32_sums(transformers):
    model, around = make(transformers, tied=True, dtype=jnp.bfloat16), transformers.parallel(1, 2, 2, 2)
    graphdef, parameters = nnx.split(model)
    data = batch(transformers)
    run = jax.jit(jax.value_and_grad(lambda p, *data: loss(p, graphdef, *data, around, 2), has_aux=True))
    (value, sums), gradients = run(jax.device_get(parameters), *data)
    assert {x.dtype for x in jax.tree.leaves((sums, gradients))} == {np.dtype(np.float32)}
    expected = dense_loss(parameters, nnx.split(make(transformers, tied=True))[0], *data)[0]
    np.testing.assert_allclose(value, expected, rtol=0.01)


def test_weights_name_their_dimensions(transformers):
    tied, untied = make(transformers, tied=True), make(transformers, tied=False)
    assert logical_axes(untied.embedding) == ("vocabulary", "width")
    assert logical_axes(untied.head) == ("width", "vocabulary")
    assert [path for path, _ in nnx.to_flat_state(nnx.state(tied))] == [("embedding",)]


def test_tokens_outside_the_vocabulary_get_zeros(transformers):
    model, around = make(transformers, tied=True), transformers.parallel(1, 1, 2, 1)
    out = model.embed(jnp.array([[-1, 0, V - 1, V]]), around)[0]
    table = np.asarray(model.embedding[...])
    np.testing.assert_array_equal(out, [0 * table[0], table[0], table[V - 1], 0 * table[0]])


def test_bad_sizes_are_refused(transformers):
    with pytest.raises(ValueError, match="at least one token and a width of 1, got size=0"):
        make(transformers, tied=True, size=0)
    model = make(transformers, tied=True)
    with pytest.raises(ValueError, match="3 cross-entropy chunks"):
        loss(nnx.state(model), nnx.graphdef(model), *batch(transformers), transformers.parallel(1, 1, 1, 1), 3)

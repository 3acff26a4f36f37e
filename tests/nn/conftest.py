"""Small transformers, meshes of the 8 virtual devices, and inputs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from ring_rl.kernels.layout import permutation
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.transformer import Transformer
from small_models import small_transformer

B, T, M = 4, 32, 16
AXES = ("dp", "fsdp", "tp", "sp")


def config(**changes):
    small = {
        "width": M,
        "query_heads": 4,
        "head_dim": 4,
        "feed_forward": "gelu",
        "feed_forward_width": 32,
        "attention_block_size": 8,
    }
    return small_transformer(**(small | changes))


def parallel(*sizes, layout="zigzag", **options):
    """Sizes of dp, fsdp, tp, sp."""
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(sizes))
    return SequenceParallel(mesh=mesh, layout=layout, **options)


def make(seed=0, **changes):
    """A transformer whose biases are not zero, so that a bias counted twice is seen."""
    model = Transformer(config(**changes), rngs=nnx.Rngs(seed))
    generator = np.random.default_rng(seed)
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "bias":
            parameter[...] = jnp.asarray(generator.normal(size=parameter.shape), jnp.float32)
    return model


def inputs(tokens=T):
    x = np.random.default_rng(0).normal(size=(B, tokens, M)).astype(np.float32)
    return x, np.broadcast_to(np.arange(tokens), (B, tokens))


def segments(tokens=T):
    """Another packing in every row; the last tokens are padding."""
    ids = np.zeros((B, tokens), np.int32)
    for row in range(B):
        ids[row, tokens // 4 + row :] = 1
        ids[row, tokens // 2 + 2 * row :] = 2
        ids[row, tokens - 1 - row :] = -1
    return ids


def loss_function(model, around, *, segment_ids=None):
    """(loss of parameters, those parameters); the loss sees every token in natural order and leaves out padding."""
    x, positions = inputs()
    order = permutation(T, ring_size=around.ring_size, layout=around.layout)
    weights = np.cos(np.arange(B * T * M)).reshape(B, T, M).astype(np.float32)
    if segment_ids is not None:
        weights = weights * (segment_ids >= 0)[..., None]
        segment_ids = segment_ids[:, order]
    graphdef, parameters = nnx.split(model)

    def loss(parameters, x):
        out = nnx.merge(graphdef, parameters)(x, positions[:, order], around, segment_ids=segment_ids)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)) * weights[:, order]), out

    # As numpy arrays they belong to no device yet and go wherever the mesh is.
    return loss, (jax.device_get(parameters), x[:, order]), order


def outputs_and_gradients(model, around, *, segment_ids=None):
    """Activations (0 where padding), gradients in the parameters, and in the input; tokens in natural order."""
    loss, arguments, order = loss_function(model, around, segment_ids=segment_ids)
    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*arguments)
    out, (parameters, x) = jax.device_get((out, gradients))
    natural = np.argsort(order)
    out = out[:, natural].astype(np.float32)
    return out if segment_ids is None else out * (segment_ids >= 0)[..., None], parameters, x[:, natural]


def assert_close(got, expected, *, rtol=1e-4):
    """Every array, relative to its own largest entry."""

    def close(got, expected):
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * np.abs(expected).max())

    jax.tree.map(close, got, expected)


@pytest.fixture(scope="session")
def transformers():
    """Makers of small transformers and meshes, and what they compute."""
    return SimpleNamespace(
        batch=B,
        tokens=T,
        width=M,
        config=config,
        parallel=parallel,
        make=make,
        inputs=inputs,
        segments=segments,
        loss_function=loss_function,
        outputs_and_gradients=outputs_and_gradients,
        assert_close=assert_close,
    )

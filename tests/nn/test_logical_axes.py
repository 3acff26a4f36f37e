import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, PartitionSpec

from ring_rl.nn.logical_axes import logical_axes, named
from ring_rl.nn.transformer import Transformer
from small_models import retrieval_aids


def names_of(state):
    return {".".join(map(str, path)): logical_axes(parameter) for path, parameter in nnx.to_flat_state(state)}


EXPECTED = {
    "blocks.attention.query.kernel": (None, "width", "heads"),
    "blocks.attention.key.kernel": (None, "width", "heads"),
    "blocks.attention.value.kernel": (None, "width", "heads"),
    "blocks.attention.out.kernel": (None, "heads", "width"),
    "blocks.attention_norm.scale": (None, "width"),
    "blocks.feed_forward_norm.scale": (None, "width"),
    "blocks.feed_forward_in.kernel": (None, "width", "hidden"),
    "blocks.feed_forward_in.bias": (None, "hidden"),
    "blocks.feed_forward_out.kernel": (None, "hidden", "width"),
    "blocks.feed_forward_out.bias": (None, "width"),
    "final_norm.scale": ("width",),
}


def test_every_parameter_of_a_transformer_names_its_dimensions(transformers):
    _, state = nnx.split(transformers.make())
    assert names_of(state) == EXPECTED
    sizes = {"width": transformers.width, "hidden": 32}
    for _, parameter in nnx.to_flat_state(state):
        for length, name in zip(parameter.shape, logical_axes(parameter), strict=True):
            assert length == sizes.get(name, length)


def test_the_parts_of_other_transformers_name_theirs(transformers):
    aids = retrieval_aids(convolution_width=3, key_shift_initial=0.5)
    attention_alone = {name: axes for name, axes in EXPECTED.items() if "feed_forward" not in name}
    _, state = nnx.split(transformers.make(feed_forward="none", feed_forward_width=0, retrieval=aids))
    assert names_of(state) == attention_alone | {
        "blocks.convolution_norm.scale": (None, "width"),
        "blocks.convolution.kernel": (None, None, "width"),
        "blocks.attention.key_shift_scale": (None, "heads"),
        "blocks.attention.query_scale": (None, "heads"),
    }
    _, state = nnx.split(transformers.make(feed_forward="swiglu"))
    assert names_of(state) == {name: axes for name, axes in EXPECTED.items() if "bias" not in name} | {
        "blocks.feed_forward_gate.kernel": (None, "width", "hidden")
    }


def test_names_survive_what_training_does_to_parameters(transformers):
    """Under jit and its abstract twin, through gradients, and in copies of other values."""
    abstract = nnx.eval_shape(lambda: Transformer(transformers.config(), rngs=nnx.Rngs(0)))
    assert names_of(nnx.state(abstract, nnx.Param)) == EXPECTED
    parameters = nnx.state(transformers.make(), nnx.Param)
    gradients = jax.jit(jax.grad(lambda p: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(p))))(parameters)
    assert names_of(gradients) == EXPECTED
    assert names_of(jax.tree.map(jnp.zeros_like, parameters)) == EXPECTED


def test_a_mesh_changes_nothing_while_a_model_is_built(transformers):
    alone = nnx.state(transformers.make(), nnx.Param)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        within = nnx.state(transformers.make(), nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, within, alone)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(within))


def test_nnx_reads_the_names():
    linear = nnx.Linear(2, 3, kernel_metadata=named("width", "vocabulary"), rngs=nnx.Rngs(0))
    assert nnx.get_partition_spec(nnx.state(linear)).kernel.get_value() == PartitionSpec("width", "vocabulary")


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_a_parameter_without_names_is_sharded_nowhere(shape):
    assert logical_axes(nnx.Param(jnp.zeros(shape))) == (None,) * len(shape)

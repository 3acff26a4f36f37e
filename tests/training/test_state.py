from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ring_rl.nn.logical_axes import named
from ring_rl.training.mesh import MeshConfig, make_mesh
from ring_rl.training.state import abstract_state, create_state


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(3, 16, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.hidden(inputs)


class Stateful(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)


def test_state_is_replicated_on_the_whole_mesh():
    mesh = make_mesh(MeshConfig(dp=2, fsdp=1, tp=1, sp=4))
    graphdef, state = create_state(Mlp, optax.adam(1e-3), seed=0, mesh=mesh)
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == 8
    assert state.step.dtype == np.int32
    assert int(state.step) == 0
    assert nnx.merge(graphdef, state.parameters)(np.ones((1, 3))).shape == (1, 16)


def test_initial_parameters_depend_on_the_seed_alone():
    def kernel(seed: int, sp: int) -> np.ndarray:
        mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=sp))
        _, state = create_state(Mlp, optax.sgd(1.0), seed=seed, mesh=mesh)
        return np.asarray(state.parameters["hidden"]["kernel"].get_value())

    np.testing.assert_array_equal(kernel(0, 1), kernel(0, 8))
    assert np.any(kernel(0, 1) != kernel(1, 1))


class Wide(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, width: int = 64, dtype: Any = jnp.float32):
        self.hidden = nnx.Linear(
            width, width, kernel_metadata=named("width", "hidden"), param_dtype=dtype, use_bias=False, rngs=rngs
        )


def test_initial_parameters_do_not_depend_on_how_they_are_sharded():
    def kernel(fsdp: int, tp: int) -> np.ndarray:
        mesh = make_mesh(MeshConfig(dp=1, fsdp=fsdp, tp=tp, sp=1))
        _, state = create_state(Wide, optax.adam(1e-3), seed=0, mesh=mesh)
        array = state.parameters["hidden"]["kernel"].get_value()
        assert array.addressable_shards[0].data.shape == (64 // fsdp, 64 // tp)
        return np.asarray(array)

    np.testing.assert_array_equal(kernel(1, 1), kernel(8, 1))
    np.testing.assert_array_equal(kernel(1, 1), kernel(2, 4))


def test_a_state_is_known_before_any_of_it_is_made():
    """A model of 1 PiB: as abstract values it costs nothing."""
    mesh = make_mesh(MeshConfig(dp=1, fsdp=4, tp=2, sp=1))
    _, state = abstract_state(lambda rngs: Wide(rngs, width=2**24), optax.adam(1e-3), mesh=mesh)
    kernel = state.parameters["hidden"]["kernel"].get_value()
    assert (kernel.shape, kernel.sharding.shard_shape(kernel.shape)) == ((2**24, 2**24), (2**22, 2**23))
    _, real = create_state(Wide, optax.adam(1e-3), seed=0, mesh=mesh)
    _, abstract = abstract_state(Wide, optax.adam(1e-3), mesh=mesh)
    for leaf, expected in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (expected.shape, expected.dtype, expected.sharding)


def test_no_program_that_initialises_holds_the_whole_state():
    """Arrays a device writes: its shards; what it works on meanwhile is less than the whole kernel."""
    mesh = make_mesh(MeshConfig(dp=1, fsdp=8, tp=1, sp=1))
    whole = 512 * 512 * 4
    initialise = jax.jit(
        lambda: create_state(lambda rngs: Wide(rngs, width=512), optax.adam(1e-3), seed=0, mesh=mesh)[1]
    )
    memory = initialise.lower().compile().memory_analysis()
    assert memory is not None
    assert memory.output_size_in_bytes < 1.1 * 3 * whole / 8
    assert memory.temp_size_in_bytes < whole


def test_parameters_below_float32_are_refused():
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1))
    with pytest.raises(ValueError, match=r"parameter hidden.kernel is bfloat16, in which small updates vanish; keep"):
        create_state(lambda rngs: Wide(rngs, dtype=jnp.bfloat16), optax.sgd(1.0), seed=0, mesh=mesh)


def test_a_model_with_hidden_state_is_refused_by_name():
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1))
    with pytest.raises(ValueError, match=r"no parameter \(dropout\.rngs\..*norm\.mean"):
        create_state(Stateful, optax.sgd(1.0), seed=0, mesh=mesh)

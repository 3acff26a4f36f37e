from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from ring_rl.training.mesh import MeshConfig, make_mesh
from ring_rl.training.state import create_state


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


def test_a_model_with_hidden_state_is_refused_by_name():
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1))
    with pytest.raises(ValueError, match=r"no parameter \(dropout\.rngs\..*norm\.mean"):
        create_state(Stateful, optax.sgd(1.0), seed=0, mesh=mesh)

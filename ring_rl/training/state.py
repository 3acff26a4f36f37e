"""What training changes: the step, the parameters, the optimizer's moments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from ring_rl.training.mesh import replicated
from ring_rl.typing import Array, Int32, PyTree

__all__ = ["TrainState", "create_state"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a checkpoint must hold to go on as if nothing had happened.

    Attributes:
        step: optimizer steps taken so far.
        parameters: an `nnx.State` of the model's `nnx.Param`s.
        optimizer_state: optax's state.
    """

    step: Int32[Array, ""]
    parameters: Any
    optimizer_state: PyTree[Any]


def create_state(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    mesh: Mesh,
) -> tuple[Any, TrainState]:
    """Initialise a model and its optimizer on the mesh, under jit, replicated on every device.

    Args:
        make_model: builds the model from random streams. It must hold `nnx.Param`s only: a model that kept
            random state or running averages would not be a pure function of the checkpoint.
        optimizer: as from `make_optimizer`.
        seed: the initial parameters are a function of it alone, whatever the mesh.
        mesh: where the state lives.

    Returns:
        The model's static `nnx.GraphDef`, for `nnx.merge(graphdef, state.parameters)`, and the state.
    """
    # Training folds steps into key(seed) itself; a split keeps the initialisation apart from step 0's noise.
    init_key, _ = jax.random.split(jax.random.key(seed))
    abstract_model = nnx.eval_shape(lambda: make_model(nnx.Rngs(init_key)))
    graphdef, _, others = nnx.split(abstract_model, nnx.Param, ...)
    if jax.tree.leaves(others):
        paths = ", ".join(sorted(".".join(map(str, path)) for path in nnx.to_flat_state(others).paths))
        raise ValueError(f"the model holds state that is no parameter ({paths}); pass it through the batch or the key")

    def initialise(key: Array) -> TrainState:
        parameters = nnx.state(make_model(nnx.Rngs(key)), nnx.Param)
        return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer.init(parameters))

    return graphdef, jax.jit(initialise, out_shardings=replicated(mesh))(init_key)

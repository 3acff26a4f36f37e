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

from ring_rl.training.mesh import replicated, with_shardings
from ring_rl.training.sharding import FSDP_ONLY, optimizer_shardings, parameter_shardings
from ring_rl.typing import Array, Int32, PRNGKeyArray, PyTree

__all__ = ["TrainState", "abstract_state", "create_state", "noise_key", "state_from_parameters", "state_shardings"]


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
    weight_axes: tuple[str, ...] = FSDP_ONLY,
) -> tuple[Any, TrainState]:
    """Initialise a model and its optimizer on the mesh, under jit: each device makes only what it holds.

    Args:
        make_model: builds the model from random streams. It must hold `nnx.Param`s only: a model that kept
            random state or running averages would not be a pure function of the checkpoint.
        optimizer: as from `make_optimizer`.
        seed: the initial parameters are a function of it alone, whatever the mesh.
        mesh: where the state lives, sharded as `state_shardings` says.
        weight_axes: the mesh axes that share the width of weights and moments.

    Returns:
        The model's static `nnx.GraphDef`, for `nnx.merge(graphdef, state.parameters)`, and the state.

    Raises:
        ValueError: the model holds state that is no parameter or parameters below float32, or the mesh cannot
            shard it (`parameter_shardings`).
    """
    graphdef, abstract = abstract_state(make_model, optimizer, mesh=mesh, weight_axes=weight_axes)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    initialise = jax.jit(lambda key: _initialise(make_model, optimizer, key), out_shardings=shardings)
    return graphdef, initialise(_init_key(seed))


def abstract_state(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    weight_axes: tuple[str, ...] = FSDP_ONLY,
) -> tuple[Any, TrainState]:
    """What `create_state` returns, with `jax.ShapeDtypeStruct`s and their shardings in place of arrays.

    Nothing is allocated: a step can be compiled for a model that this machine could not hold.
    """
    abstract_model = nnx.eval_shape(lambda: make_model(nnx.Rngs(_init_key(0))))
    graphdef, parameters, others = nnx.split(abstract_model, nnx.Param, ...)
    if jax.tree.leaves(others):
        paths = ", ".join(sorted(".".join(map(str, path)) for path in nnx.to_flat_state(others).paths))
        raise ValueError(f"the model holds state that is no parameter ({paths}); pass it through the batch or the key")
    for path, parameter in nnx.to_flat_state(parameters):
        if jnp.issubdtype(parameter.dtype, jnp.floating) and jnp.finfo(parameter.dtype).bits < 32:
            raise ValueError(
                f"parameter {'.'.join(map(str, path))} is {parameter.dtype}, in which small updates vanish; keep "
                f"parameters in float32 and let the model compute in {parameter.dtype}"
            )
    state = jax.eval_shape(lambda: _initialise(make_model, optimizer, _init_key(0)))
    return graphdef, with_shardings(state, state_shardings(mesh, optimizer, state, weight_axes=weight_axes))


def state_shardings(
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    *,
    weight_axes: tuple[str, ...] = FSDP_ONLY,
) -> TrainState:
    """The sharding of every array of the state, by the rules of `ring_rl.training.sharding`."""
    return TrainState(
        step=replicated(mesh),  # pyright: ignore[reportArgumentType]
        parameters=parameter_shardings(mesh, state.parameters, weight_axes=weight_axes),
        optimizer_state=optimizer_shardings(
            mesh, optimizer, state.optimizer_state, state.parameters, weight_axes=weight_axes
        ),
    )


def state_from_parameters(
    parameters: Any, optimizer: optax.GradientTransformation, *, step: int, like: TrainState
) -> TrainState:
    """Parameters that come from elsewhere, with an optimizer that has seen nothing yet, laid out as `like`.

    Args:
        parameters: an `nnx.State` of the model's `nnx.Param`s.
        optimizer: as from `make_optimizer`.
        step: optimizer steps that count as taken.
        like: as from `abstract_state`, or a state.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    parameters = jax.device_put(parameters, shardings.parameters)
    initialise = jax.jit(optimizer.init, out_shardings=shardings.optimizer_state)
    return TrainState(jax.device_put(jnp.int32(step), shardings.step), parameters, initialise(parameters))


def noise_key(seed: int) -> PRNGKeyArray:
    """Of the randomness inside the loss, for the step to be folded into; none of its keys is that of the parameters."""
    return jax.random.split(jax.random.key(seed))[1]


def _init_key(seed: int) -> PRNGKeyArray:
    # Not key(seed) itself: what is folded into that, 0 for one, may give a key that a split of it gives too.
    return jax.random.split(jax.random.key(seed))[0]


def _initialise(
    make_model: Callable[[nnx.Rngs], nnx.Module], optimizer: optax.GradientTransformation, key: PRNGKeyArray
) -> TrainState:
    parameters = nnx.state(make_model(nnx.Rngs(key)), nnx.Param)
    return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer.init(parameters))

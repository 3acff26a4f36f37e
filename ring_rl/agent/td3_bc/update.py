"""Many updates of TD3+BC as one step of the training loop: one call of the device."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from ring_rl.agent.td3_bc.losses import LearningConfig, actor_loss, bellman_targets, critic_loss
from ring_rl.agent.td3_bc.transitions import Transitions, draw
from ring_rl.training.mesh import replicated
from ring_rl.training.state import TrainState, create_state, noise_key
from ring_rl.training.step import TrainStep
from ring_rl.typing import Array, Float32, PRNGKeyArray, PyTree

__all__ = ["LearnerState", "Optimizers", "initial_state", "make_update_step"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LearnerState:
    """What training needs besides the parameters; stands where `TrainState` has the optimizer's state.

    Attributes:
        actor: optax's state for the actor.
        critics: optax's state for the critics.
        targets: the target networks' parameters.
    """

    actor: PyTree[Any]
    critics: PyTree[Any]
    targets: Any


@dataclasses.dataclass(frozen=True)
class Optimizers:
    """One for the actor and one for both critics, which take more steps than it."""

    actor: optax.GradientTransformation
    critics: optax.GradientTransformation


def initial_state(
    make_model: Callable[[nnx.Rngs], nnx.Module], optimizers: Optimizers, *, seed: int, mesh: Mesh
) -> TrainState:
    """Parameters that are a function of the seed, targets equal to them, and fresh optimizers, on every device."""
    _, state = create_state(make_model, optax.identity(), seed=seed, mesh=mesh)

    def begin(parameters: nnx.State) -> LearnerState:
        parts = parameters.raw_mapping
        return LearnerState(
            optimizers.actor.init(parts["actor"]),
            optimizers.critics.init(parts["critics"]),
            # Not the parameters themselves: both are donated to the first step.
            jax.tree.map(jnp.copy, parameters),
        )

    learner = jax.jit(begin, out_shardings=replicated(mesh))(state.parameters)
    return TrainState(state.step, state.parameters, learner)


def make_update_step(
    graphdef: Any,
    optimizers: Optimizers,
    mesh: Mesh,
    *,
    config: LearningConfig,
    seed: int,
    batch_size: int,
    updates: int,
    learning_rate: Callable[[Array], Float32[Array, ""]],
) -> TrainStep:
    """Build `step(state, transitions) -> (state, metrics)`: `updates` critic updates in one jitted scan.

    Every update draws a minibatch of its own. After each `actor_delay` critic updates the actor takes a step on the
    last minibatch, and the targets move: θ' <- τ θ + (1 - τ) θ'. Step s draws from fold_in(noise_key(seed), s), so a
    resumed run goes on to the bit. The state is donated.

    Metrics, means over the updates of the step: `loss`, of the critics; `gradient_norm`, theirs; `value`, the
    critics' mean; `actor_loss`; `imitation_error`, |π(s) - a|² / A; `learning_rate`, of the last critic update.

    Args:
        graphdef: of a `TD3BC`.
        optimizers: those of `initial_state`.
        mesh: where state and transitions lie, whole on every device.
        config: the method's numbers.
        seed: of minibatches and noise.
        batch_size: transitions B in a minibatch.
        updates: critic updates a step.
        learning_rate: the critics' schedule, a function of the update, for reporting only.

    Raises:
        ValueError: actor_delay does not divide `updates`.
    """
    delay = config.actor_delay
    if updates < 1 or updates % delay:
        raise ValueError(
            f"agent.updates_per_step={updates} must be a positive multiple of actor_delay={delay}; "
            f"use {max(-(-updates // delay), 1) * delay}"
        )

    def merged(parts: dict[str, Any]) -> Any:
        return nnx.merge(graphdef, nnx.State(parts))

    def update_critics(carry: _Carry, transitions: Transitions, key: PRNGKeyArray) -> tuple[_Carry, Any, Any]:
        batch_key, smoothing_key = jax.random.split(key)
        batch = draw(transitions, batch_key, size=batch_size)
        y = bellman_targets(merged(carry.targets), batch, smoothing_key, config)

        def loss(critics: Any) -> tuple[Array, Array]:
            return critic_loss(merged({"actor": carry.actor, "critics": critics}), batch, y)

        (total, value), gradients = jax.value_and_grad(loss, has_aux=True)(carry.critics)
        critics, optimizer = _descend(optimizers.critics, gradients, carry.critics_optimizer, carry.critics)
        metrics = {"loss": total, "gradient_norm": optax.tree.norm(gradients), "value": value}
        return dataclasses.replace(carry, critics=critics, critics_optimizer=optimizer), batch, metrics

    def update_actor(carry: _Carry, batch: Any) -> tuple[_Carry, Any]:
        def loss(actor: Any) -> tuple[Array, Array]:
            return actor_loss(merged({"actor": actor, "critics": carry.critics}), batch, config)

        (total, imitation_error), gradients = jax.value_and_grad(loss, has_aux=True)(carry.actor)
        actor, optimizer = _descend(optimizers.actor, gradients, carry.actor_optimizer, carry.actor)
        trained = {"actor": actor, "critics": carry.critics}
        targets = optax.incremental_update(trained, carry.targets, config.target_rate)
        moved = dataclasses.replace(carry, actor=actor, actor_optimizer=optimizer, targets=targets)
        return moved, {"actor_loss": total, "imitation_error": imitation_error}

    def step_function(state: TrainState, transitions: Transitions) -> tuple[TrainState, dict[str, Array]]:
        def round_of_updates(carry: _Carry, keys: PRNGKeyArray) -> tuple[_Carry, Any]:
            collected, batch = [], None
            for key in keys:  # unrolled: the delay is 2 in practice, and a branch inside the scan costs more
                carry, batch, metrics = update_critics(carry, transitions, key)
                collected.append(metrics)
            carry, of_actor = update_actor(carry, batch)
            return carry, (jax.tree.map(lambda *x: jnp.stack(x).mean(), *collected), of_actor)

        key = jax.random.fold_in(noise_key(seed), state.step)
        keys = jax.random.split(key, (updates // delay, delay))
        carry, (of_critics, of_actor) = jax.lax.scan(round_of_updates, _Carry.of(state), keys)
        metrics = {name: values.mean() for name, values in (of_critics | of_actor).items()}
        metrics["learning_rate"] = learning_rate((state.step + 1) * updates - 1)
        return carry.state(state.step + 1), metrics

    return jax.jit(step_function, donate_argnums=0, out_shardings=replicated(mesh))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """A `TrainState` taken apart as its updates need it."""

    actor: Any
    critics: Any
    targets: dict[str, Any]
    actor_optimizer: Any
    critics_optimizer: Any

    @classmethod
    def of(cls, state: TrainState) -> "_Carry":
        parts, learner = state.parameters.raw_mapping, state.optimizer_state
        return cls(parts["actor"], parts["critics"], dict(learner.targets.raw_mapping), learner.actor, learner.critics)

    def state(self, step: Array) -> TrainState:
        learner = LearnerState(self.actor_optimizer, self.critics_optimizer, nnx.State(self.targets))
        return TrainState(step, nnx.State({"actor": self.actor, "critics": self.critics}), learner)


def _descend(optimizer: optax.GradientTransformation, gradients: Any, state: Any, parameters: Any) -> tuple[Any, Any]:
    updates, state = optimizer.update(gradients, state, parameters)
    return optax.apply_updates(parameters, updates), state

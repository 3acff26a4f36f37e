"""Deep deterministic policy gradient with twin critics, as URLB has it (arXiv:2110.15191; DDPG: 1509.02971).

    actor    o     -> Linear -> LayerNorm -> tanh -> Linear -> ReLU -> Linear -> tanh -> mean action
    critic   o, a  -> Linear -> LayerNorm -> tanh -> two heads of Linear -> ReLU -> Linear -> Q1, Q2

Everything is a pure function of a `DDPGState`. Whose rewards the critics learn is left to the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ring_rl.typing import Array, Float, PRNGKeyArray, PyTree

__all__ = ["DDPG", "DDPGConfig", "DDPGState", "Transitions", "add_clipped_noise", "linear"]

# Actions stay this far inside of [-1, 1], where the gradient of what follows is still meant to count.
_ACTION_MARGIN = 1e-6


@dataclass(frozen=True)
class DDPGConfig:
    """Numbers of the learner.

    Attributes:
        hidden_width: Of every hidden layer of actor and critics.
        learning_rate: Adam's, for actor and critics.
        discount: gamma, a decision.
        n_step: Decisions from a transition's state to the one whose value is bootstrapped, with gamma^n_step.
        target_rate: tau; the target critics move so far towards the critics at every update.
        noise_deviation: Standard deviation of the Gaussian added to the actor's actions.
        noise_clip: Where that noise is clipped while learning. Acting does not clip it.
    """

    hidden_width: int
    learning_rate: float
    discount: float
    n_step: int
    target_rate: float
    noise_deviation: float
    noise_clip: float

    def __post_init__(self) -> None:
        for name in ("hidden_width", "n_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.discount < 1:
            raise ValueError(f"discount must be at least 0 and below 1, got {self.discount}")
        if not 0 < self.target_rate <= 1:
            raise ValueError(f"target_rate must be above 0 and at most 1, got {self.target_rate}")
        if self.noise_deviation < 0 or self.noise_clip < 0:
            raise ValueError("noise_deviation and noise_clip must not be negative")


class Transitions(NamedTuple):
    """Decisions and what followed n steps later."""

    observations: Float[Array | np.ndarray, "*rows O"]
    actions: Float[Array | np.ndarray, "*rows A"]
    next_observations: Float[Array | np.ndarray, "*rows O"]


class DDPGState(NamedTuple):
    """All that learning changes."""

    actor: PyTree[Array]
    critic: PyTree[Array]
    target_critic: PyTree[Array]
    actor_optimizer: PyTree[Array]
    critic_optimizer: PyTree[Array]


class Actor(nnx.Module):
    """The deterministic policy; see the module."""

    def __init__(self, observation_dim: int, action_dim: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.trunk = _Trunk(observation_dim, width, rngs=rngs)
        self.hidden = linear(width, width, rngs=rngs)
        self.out = linear(width, action_dim, rngs=rngs)

    def __call__(self, observations: Float[Array | np.ndarray, "*rows O"]) -> Float[Array, "*rows A"]:
        return jnp.tanh(self.out(nnx.relu(self.hidden(self.trunk(observations)))))


class TwinCritic(nnx.Module):
    """Two estimates of the value of an action on one trunk; see the module."""

    def __init__(self, observation_dim: int, action_dim: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.trunk = _Trunk(observation_dim + action_dim, width, rngs=rngs)
        self.hidden = nnx.List([linear(width, width, rngs=rngs) for _ in range(2)])
        self.out = nnx.List([linear(width, 1, rngs=rngs) for _ in range(2)])

    def __call__(
        self, observations: Float[Array | np.ndarray, "*rows O"], actions: Float[Array | np.ndarray, "*rows A"]
    ) -> Float[Array, "2 *rows"]:
        features = self.trunk(jnp.concatenate([observations, actions], axis=-1))
        heads = zip(self.hidden, self.out, strict=True)
        return jnp.stack([out(nnx.relu(hidden(features)))[..., 0] for hidden, out in heads])


@dataclass(frozen=True)
class DDPG:
    """Pure functions of a `DDPGState`; equal ones are one static argument to `jax.jit`.

    Attributes:
        config: The numbers.
        observation_dim: O.
        action_dim: A.
    """

    config: DDPGConfig
    observation_dim: int
    action_dim: int

    def init(self, key: PRNGKeyArray) -> DDPGState:
        """Orthogonal weights, biases of zero; target critics equal to the critics."""
        actor_key, critic_key = jax.random.split(key)
        actor = nnx.state(self._make_actor(nnx.Rngs(actor_key)))
        critic = nnx.state(self._make_critic(nnx.Rngs(critic_key)))
        optimizer = self._optimizer
        return DDPGState(actor, critic, jax.tree.map(jnp.copy, critic), optimizer.init(actor), optimizer.init(critic))

    def act(self, actor: PyTree[Array], observations_BO: Float[Array, "B O"], key: PRNGKeyArray) -> Float[Array, "B A"]:
        """The actor's actions with exploration noise, clipped to [-1, 1]."""
        mean_BA = nnx.merge(self._actor_graph, actor)(observations_BO)
        return add_clipped_noise(mean_BA, key, deviation=self.config.noise_deviation, clip=jnp.inf)

    def update(
        self, state: DDPGState, transitions: Transitions, rewards_B: Float[Array, " B"], key: PRNGKeyArray
    ) -> tuple[DDPGState, dict[str, Float[Array, ""]]]:
        """One Adam step of the critics, then one of the actor, then the target critics follow.

        Critics: mean over both of (Q - y)^2, summed over the two, y = r + gamma^n min(Q1', Q2')(o', a'), where a'
        is the actor's noisy action. Actor: minus the mean of min(Q1, Q2)(o, noisy action).
        """
        config = self.config
        target_key, actor_key = jax.random.split(key)
        noise = {"deviation": config.noise_deviation, "clip": config.noise_clip}
        next_actions = nnx.merge(self._actor_graph, state.actor)(transitions.next_observations)
        next_actions = add_clipped_noise(next_actions, target_key, **noise)
        next_values = nnx.merge(self._critic_graph, state.target_critic)(transitions.next_observations, next_actions)
        targets_B = rewards_B + config.discount**config.n_step * next_values.min(axis=0)

        def critic_loss(critic: PyTree[Array]) -> Float[Array, ""]:
            values = nnx.merge(self._critic_graph, critic)(transitions.observations, transitions.actions)
            return jnp.square(values - targets_B).mean(axis=-1).sum()

        critic_error, gradient = jax.value_and_grad(critic_loss)(state.critic)
        critic, critic_optimizer = self._descend(gradient, state.critic_optimizer, state.critic)

        def actor_loss(actor: PyTree[Array]) -> Float[Array, ""]:
            actions = nnx.merge(self._actor_graph, actor)(transitions.observations)
            actions = add_clipped_noise(actions, actor_key, **noise)
            return -nnx.merge(self._critic_graph, critic)(transitions.observations, actions).min(axis=0).mean()

        negative_value, gradient = jax.value_and_grad(actor_loss)(state.actor)
        actor, actor_optimizer = self._descend(gradient, state.actor_optimizer, state.actor)
        target_critic = optax.incremental_update(critic, state.target_critic, config.target_rate)
        metrics = {"critic_loss": critic_error, "value": -negative_value}
        return DDPGState(actor, critic, target_critic, actor_optimizer, critic_optimizer), metrics

    @property
    def _optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.config.learning_rate)

    @cached_property
    def _actor_graph(self) -> nnx.GraphDef[Actor]:
        return nnx.graphdef(nnx.eval_shape(lambda: self._make_actor(nnx.Rngs(0))))

    @cached_property
    def _critic_graph(self) -> nnx.GraphDef[TwinCritic]:
        return nnx.graphdef(nnx.eval_shape(lambda: self._make_critic(nnx.Rngs(0))))

    def _make_actor(self, rngs: nnx.Rngs) -> Actor:
        return Actor(self.observation_dim, self.action_dim, self.config.hidden_width, rngs=rngs)

    def _make_critic(self, rngs: nnx.Rngs) -> TwinCritic:
        return TwinCritic(self.observation_dim, self.action_dim, self.config.hidden_width, rngs=rngs)

    def _descend(
        self, gradient: PyTree[Array], optimizer: PyTree[Array], parameters: PyTree[Array]
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        updates, optimizer = self._optimizer.update(gradient, optimizer, parameters)
        return optax.apply_updates(parameters, updates), optimizer


def add_clipped_noise(
    actions: Float[Array, "*rows A"], key: PRNGKeyArray, *, deviation: float, clip: float
) -> Float[Array, "*rows A"]:
    """Adds Gaussian noise, itself clipped to [-clip, clip], and clips the sum to [-1, 1].

    The gradient passes as if nothing had been clipped (straight through), so that an action at the border can
    still be led back.
    """
    noisy = actions + jnp.clip(deviation * jax.random.normal(key, actions.shape), -clip, clip)
    clipped = jnp.clip(noisy, -1 + _ACTION_MARGIN, 1 - _ACTION_MARGIN)
    return noisy + jax.lax.stop_gradient(clipped - noisy)


def linear(width_in: int, width_out: int, *, bias_deviation: float = 0.0, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer with orthogonal weights and Gaussian biases, by default of zero."""
    initializers = nnx.initializers
    return nnx.Linear(
        width_in,
        width_out,
        kernel_init=initializers.orthogonal(),
        bias_init=initializers.normal(bias_deviation),
        rngs=rngs,
    )


class _Trunk(nnx.Module):
    def __init__(self, width_in: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.linear = linear(width_in, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)

    def __call__(self, inputs: Float[Array | np.ndarray, "*rows I"]) -> Float[Array, "*rows width"]:
        return jnp.tanh(self.norm(self.linear(jnp.asarray(inputs))))

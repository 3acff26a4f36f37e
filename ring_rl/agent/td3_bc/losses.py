"""What the critics and the actor of TD3+BC minimise."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ring_rl.agent.td3_bc.networks import TD3BC
from ring_rl.agent.td3_bc.transitions import Minibatch
from ring_rl.typing import Array, Float32, PRNGKeyArray

__all__ = ["ActorLoss", "CriticLoss", "LearningConfig", "actor_loss", "bellman_targets", "critic_loss"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """The numbers of TD3 (arXiv:1802.09477) and TD3+BC (arXiv:2106.06860), by the letters of these papers.

    Attributes:
        discount: γ, a DECISION: with actions held for k control steps, γ^(1/k) a control step.
        target_rate: τ, how far the target networks move towards the trained ones at each actor update.
        actor_delay: d, critic updates for one update of the actor and the targets.
        smoothing_noise: σ, deviation of the noise on the target actions, on the scale of actions, [-1, 1].
        smoothing_clip: c, the most that this noise may be.
        value_weight: α, how much value counts against imitation; 0 clones the data.
    """

    discount: float
    target_rate: float
    actor_delay: int
    smoothing_noise: float
    smoothing_clip: float
    value_weight: float

    def __post_init__(self) -> None:
        if not 0 <= self.discount < 1:
            raise ValueError(f"discount must lie in [0, 1), got {self.discount}; time limits are bootstrapped through")
        if not 0 < self.target_rate <= 1:
            raise ValueError(f"target_rate must lie in (0, 1], got {self.target_rate}")
        if self.actor_delay < 1:
            raise ValueError(f"actor_delay must be at least 1, got {self.actor_delay}")
        for name in ("smoothing_noise", "smoothing_clip", "value_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class CriticLoss(NamedTuple):
    """The loss, and the mean of both critics' values."""

    loss: Float32[Array, ""]
    value: Float32[Array, ""]


class ActorLoss(NamedTuple):
    """The loss, and its imitating part before any weight."""

    loss: Float32[Array, ""]
    imitation_error: Float32[Array, ""]


def bellman_targets(
    targets: TD3BC, batch: Minibatch, key: PRNGKeyArray, config: LearningConfig
) -> Float32[Array, " B"]:
    """y = r + γ d min(Q₁'(s', ã), Q₂'(s', ã)),  ã = clip(π'(s') + clip(σ ε, -c, c), -1, 1),  ε normal.

    Args:
        targets: the networks with primes.
        batch: transitions.
        key: of ε.
        config: γ, σ and c.
    """
    noise = config.smoothing_noise * jax.random.normal(key, batch.actions.shape)
    noise = jnp.clip(noise, -config.smoothing_clip, config.smoothing_clip)
    actions = jnp.clip(targets.actions(batch.next_observations) + noise, -1.0, 1.0)
    value = targets.values(batch.next_observations, actions).min(axis=0)
    return batch.rewards + config.discount * batch.discounts * value


def critic_loss(model: TD3BC, batch: Minibatch, y: Float32[Array, " B"]) -> CriticLoss:
    """mean (Q₁(s, a) - y)² + mean (Q₂(s, a) - y)²."""
    values_2B = model.values(batch.observations, batch.actions)
    return CriticLoss(jnp.mean(jnp.square(values_2B - y), axis=1).sum(), values_2B.mean())


def actor_loss(model: TD3BC, batch: Minibatch, config: LearningConfig) -> ActorLoss:
    """mean |π(s) - a|² / A  -  λ mean Q₁(s, π(s)),  λ = α / mean |Q₁(s, π(s))|, a constant for the gradient.

    The paper writes λ with Q(s, a) of the data's actions; its authors' code, and we, with those of π. The square is
    averaged over the entries of an action, as there.
    """
    actions = model.actions(batch.observations)
    value = model.value(batch.observations, actions, critic=0)
    # A critic that says 0 everywhere, as at the start of a task without rewards, has no scale: then λ is 0.
    scale = jax.lax.stop_gradient(jnp.abs(value).mean())
    weight = jnp.where(scale > 0, config.value_weight / jnp.where(scale > 0, scale, 1.0), 0.0)
    imitation_error = jnp.mean(jnp.square(actions - batch.actions))
    return ActorLoss(imitation_error - weight * value.mean(), imitation_error)

"""How an action is read off a model: as a number, or as a distribution that can hold several answers at once.

| head          | what it says of an action                           | several modes               | loss             |
|---------------|-----------------------------------------------------|-----------------------------|------------------|
| squared_error | one vector, the mean of what was done               | no                          | squared error    |
| gaussian      | a mean and a deviation for each entry               | no, but it knows its spread | -log density     |
| mixture       | K such Gaussians over whole vectors, and their odds | yes, entries hang together  | -log density     |
| discretised   | odds of n values for each entry                     | yes, but each entry its own | -log probability |

Data from exploration answer one state with many actions. Their mean, which is all that a squared error can learn, may
be an action that none of them took: between a push to the left and one to the right it stands still.

Given what the model has read, the entries of a discretised action are independent: it cannot say "both left or both
right". A mixture draws one component for the whole vector and can.

All losses are averages over the A entries of an action, so that tasks with many actuators compare; those of Gaussians
are in nats of a density and may be negative, those of a discretised action in nats of a probability.
"""

import dataclasses
import math
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from ring_rl.typing import Array, Float, PRNGKeyArray

__all__ = [
    "ActionDistribution",
    "ActionHead",
    "ActionHeadConfig",
    "DiscretisedConfig",
    "GaussianConfig",
    "MixtureConfig",
    "SquaredErrorConfig",
]


class ActionDistribution(Protocol):
    """What a model says about actions; a pytree of arrays whose first axes are those of the steps."""

    def mode(self) -> Float[Array, "*b A"]:
        """The action to take where chance is not wanted, in [-1, 1]."""
        ...

    def sample(self, key: PRNGKeyArray) -> Float[Array, "*b A"]:
        """An action drawn at random, in [-1, 1]."""
        ...

    def loss(self, actions: Float[Array, "*b A"]) -> Float[Array, "*b"]:
        """What to minimise so that `actions` become likely, a mean over the A entries."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PointAction:
    """One answer and no doubt."""

    actions: Float[Array, "*b A"]

    def mode(self) -> Float[Array, "*b A"]:
        """The answer."""
        return self.actions

    def sample(self, key: PRNGKeyArray) -> Float[Array, "*b A"]:
        """The answer, too."""
        del key
        return self.actions

    def loss(self, actions: Float[Array, "*b A"]) -> Float[Array, "*b"]:
        """|a - â|² / A."""
        return jnp.mean(jnp.square(actions - self.actions), axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalGaussian:
    """A normal distribution over each entry; draws beyond [-1, 1] become its ends, as actuators do with them."""

    mean: Float[Array, "*b A"]
    deviation: Float[Array, "*b A"]

    def mode(self) -> Float[Array, "*b A"]:
        """The mean, which lies in (-1, 1)."""
        return self.mean

    def sample(self, key: PRNGKeyArray) -> Float[Array, "*b A"]:
        """mean + deviation · ε, clipped."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return jnp.clip(self.mean + self.deviation * noise, -1.0, 1.0)

    def log_density(self, actions: Float[Array, "*b A"]) -> Float[Array, "*b"]:
        """Σ over entries of log N(a; mean, deviation²)."""
        distance = (actions - self.mean) / self.deviation
        entries = -0.5 * jnp.square(distance) - jnp.log(self.deviation) - 0.5 * math.log(2 * math.pi)
        return jnp.sum(entries, axis=-1)

    def loss(self, actions: Float[Array, "*b A"]) -> Float[Array, "*b"]:
        """-log density / A."""
        return -self.log_density(actions) / actions.shape[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianMixture:
    """One of K normal distributions over the whole action vector: Σ_k odds_k Π_i N(a_i; mean_ki, deviation_ki²)."""

    logits: Float[Array, "*b K"]
    components: DiagonalGaussian  # [*b K A]

    def mode(self) -> Float[Array, "*b A"]:
        """The mean of the most likely component.

        Not the highest point of the density: that prefers narrow components, however rarely they are the answer.
        """
        return self._of(jnp.argmax(self.logits, axis=-1), self.components.mean)

    def sample(self, key: PRNGKeyArray) -> Float[Array, "*b A"]:
        """A draw from a component that is itself drawn."""
        component_key, noise_key = jax.random.split(key)
        chosen = jax.random.categorical(component_key, self.logits)
        component = DiagonalGaussian(
            self._of(chosen, self.components.mean), self._of(chosen, self.components.deviation)
        )
        return component.sample(noise_key)

    def loss(self, actions: Float[Array, "*b A"]) -> Float[Array, "*b"]:
        """-log density / A."""
        joint = jax.nn.log_softmax(self.logits) + self.components.log_density(actions[..., None, :])
        return -jax.nn.logsumexp(joint, axis=-1) / actions.shape[-1]

    @staticmethod
    def _of(component: Array, values: Float[Array, "*b K A"]) -> Float[Array, "*b A"]:
        return jnp.take_along_axis(values, component[..., None, None], axis=-2)[..., 0, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiscretisedAction:
    """Each entry takes one of n values, evenly spread over [-1, 1], both ends included."""

    logits: Float[Array, "*b A n"]

    def mode(self) -> Float[Array, "*b A"]:
        """The likeliest value of each entry."""
        return self._values(jnp.argmax(self.logits, axis=-1))

    def sample(self, key: PRNGKeyArray) -> Float[Array, "*b A"]:
        """A value of each entry, drawn by its odds."""
        return self._values(jax.random.categorical(key, self.logits))

    def loss(self, actions: Float[Array, "*b A"]) -> Float[Array, "*b"]:
        """-Σ log p(the value nearest to a_i) / A."""
        nearest = jnp.round((jnp.clip(actions, -1.0, 1.0) + 1) * (self.logits.shape[-1] - 1) / 2).astype(jnp.int32)
        log_odds = jnp.take_along_axis(jax.nn.log_softmax(self.logits), nearest[..., None], axis=-1)
        return -jnp.mean(log_odds[..., 0], axis=-1)

    def _values(self, index: Array) -> Float[Array, "*b A"]:
        return (2 * index / (self.logits.shape[-1] - 1) - 1).astype(self.logits.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredErrorConfig:
    """The mean action, tanh of a linear map."""

    name: Literal["squared_error"]

    def outputs(self, action_dim: int) -> int:
        """Numbers that the distribution is made of."""
        return action_dim

    def distribution(self, x: Float[Array, "*b outputs"], action_dim: int) -> PointAction:
        """The distribution that `x` describes."""
        del action_dim
        return PointAction(jnp.tanh(x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianConfig:
    """A mean, tanh of a linear map, and a deviation that depends on the state, too.

    Attributes:
        name: "gaussian".
        smallest_deviation: Lower bound. Data that repeat one action exactly would drive the density to infinity.
        largest_deviation: Upper bound; actions span [-1, 1].
    """

    name: Literal["gaussian"]
    smallest_deviation: float
    largest_deviation: float

    def __post_init__(self) -> None:
        _check_deviations(self.smallest_deviation, self.largest_deviation)

    def outputs(self, action_dim: int) -> int:
        """Numbers that the distribution is made of."""
        return 2 * action_dim

    def distribution(self, x: Float[Array, "*b outputs"], action_dim: int) -> DiagonalGaussian:
        """The distribution that `x` describes."""
        mean, spread = x[..., :action_dim], x[..., action_dim:]
        return DiagonalGaussian(jnp.tanh(mean), _between(self.smallest_deviation, self.largest_deviation, spread))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Several Gaussians over the whole action vector.

    Attributes:
        name: "mixture".
        components: K.
        smallest_deviation: As of `GaussianConfig`.
        largest_deviation: As of `GaussianConfig`.
    """

    name: Literal["mixture"]
    components: int
    smallest_deviation: float
    largest_deviation: float

    def __post_init__(self) -> None:
        if self.components < 1:
            raise ValueError(f"action_head.components must be at least 1, got {self.components}")
        _check_deviations(self.smallest_deviation, self.largest_deviation)

    def outputs(self, action_dim: int) -> int:
        """Numbers that the distribution is made of."""
        return self.components * (1 + 2 * action_dim)

    def distribution(self, x: Float[Array, "*b outputs"], action_dim: int) -> GaussianMixture:
        """The distribution that `x` describes."""
        logits, rest = x[..., : self.components], x[..., self.components :]
        mean, spread = jnp.split(rest.reshape(*x.shape[:-1], self.components, 2 * action_dim), 2, axis=-1)
        deviation = _between(self.smallest_deviation, self.largest_deviation, spread)
        return GaussianMixture(logits, DiagonalGaussian(jnp.tanh(mean), deviation))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscretisedConfig:
    """Odds of evenly spread values, for each entry of the action.

    Attributes:
        name: "discretised".
        bins: Values n of an entry, -1 and 1 among them.
    """

    name: Literal["discretised"]
    bins: int

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ValueError(f"action_head.bins must be at least 2, the ends -1 and 1, got {self.bins}")

    def outputs(self, action_dim: int) -> int:
        """Numbers that the distribution is made of."""
        return action_dim * self.bins

    def distribution(self, x: Float[Array, "*b outputs"], action_dim: int) -> DiscretisedAction:
        """The distribution that `x` describes."""
        return DiscretisedAction(x.reshape(*x.shape[:-1], action_dim, self.bins))


ActionHeadConfig = SquaredErrorConfig | GaussianConfig | MixtureConfig | DiscretisedConfig


class ActionHead(nnx.Module):
    """A linear map from a model's activations to a distribution over actions, in float32."""

    def __init__(self, config: ActionHeadConfig, *, width: int, action_dim: int, rngs: nnx.Rngs):
        self.config, self.action_dim = config, action_dim
        self.readout = nnx.Linear(width, config.outputs(action_dim), rngs=rngs)

    def __call__(self, x: Float[Array, "*b M"]) -> ActionDistribution:
        """The distribution at every step."""
        return self.config.distribution(self.readout(x).astype(jnp.float32), self.action_dim)


def _check_deviations(smallest: float, largest: float) -> None:
    if not 0 < smallest < largest:
        raise ValueError(f"action_head needs 0 < smallest_deviation < largest_deviation, got {smallest} and {largest}")


def _between(smallest: float, largest: float, x: Array) -> Array:
    """From smallest at x = -∞ to largest at x = ∞, even in the logarithm: a gradient everywhere, no hard edge."""
    return smallest * (largest / smallest) ** jax.nn.sigmoid(x)

"""The actor and the twin critics."""

import dataclasses
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ring_rl.agent.memoryless import MemorylessAgent
from ring_rl.agent.tokens import Normalisation
from ring_rl.typing import Array, Float, PRNGKeyArray, Shaped

__all__ = ["TD3BC", "TD3BCConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TD3BCConfig:
    """An actor and two critics, perceptrons of the same hidden layers.

    Attributes:
        name: Tells the kinds of models apart in a checkpoint.
        hidden_widths: One hidden layer each.
        observation_dim: O.
        action_dim: A.
        normalisation: Scales taken from the data.
    """

    name: Literal["td3_bc"]
    hidden_widths: tuple[int, ...]
    observation_dim: int
    action_dim: int
    normalisation: Normalisation


class Perceptron(nnx.Module):
    """Linear layers with rectified units between them."""

    def __init__(self, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])

    def __call__(self, x: Float[Array, "*b I"]) -> Float[Array, "*b U"]:
        """The last layer's output, which nothing rectifies."""
        *hidden, last = self.layers
        for layer in hidden:
            x = jax.nn.relu(layer(x))
        return last(x)


class TD3BC(MemorylessAgent):
    """π(s) = tanh(f(s)) and Q₁(s, a), Q₂(s, a), of observations as they are recorded.

    As an agent it acts by π alone, without noise, and remembers nothing.
    """

    def __init__(self, config: TD3BCConfig, *, rngs: nnx.Rngs):
        self.config = config
        O, A, hidden = config.observation_dim, config.action_dim, config.hidden_widths  # noqa: E741
        self.actor = Perceptron((O, *hidden, A), rngs=rngs)
        self.critics = nnx.List([Perceptron((O + A, *hidden, 1), rngs=rngs) for _ in range(2)])

    def actions(self, observations: Float[Array, "*b O"]) -> Float[Array, "*b A"]:
        """π(s), in (-1, 1)."""
        return jnp.tanh(self.actor(self.config.normalisation.observations(observations)))

    def values(self, observations: Float[Array, "*b O"], actions: Float[Array, "*b A"]) -> Float[Array, "2 *b"]:
        """Q₁ and Q₂."""
        return jnp.stack([self.value(observations, actions, critic=index) for index in range(2)])

    def value(
        self, observations: Float[Array, "*b O"], actions: Float[Array, "*b A"], *, critic: int
    ) -> Float[Array, "*b"]:
        """Q₁ (critic=0) or Q₂ (critic=1)."""
        inputs = jnp.concatenate([self.config.normalisation.observations(observations), actions], axis=-1)
        return self.critics[critic](inputs)[..., 0]

    def decide(self, observations: Float[Array, "B O"], keys: Shaped[PRNGKeyArray, " B"] | None) -> Float[Array, "B A"]:
        """π(s); there is nothing to draw."""
        del keys
        return self.actions(observations)

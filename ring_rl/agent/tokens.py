"""How an environment step becomes tokens.

| layout                                | tokens a step                                   | attention |
|---------------------------------------|-------------------------------------------------|-----------|
| return_state_action                   | R̂ s a, a Decision Transformer's                 | 9         |
| return_state_action_reward            | R̂ s a r, the paper's                            | 16        |
| return_state_action_reward_completion | R̂ s a r d, with the task-completion token       | 25        |
| fused                                 | one: R̂ + s (+ the previous a, r)                | 1         |

(relative cost of attention over the same steps). The action is predicted at the last token before it.

Three clocks, each with one job. Rotary positions count tokens over the whole chain, so that a model can tell
how far back something stands. The time within the episode, as Fourier features or as a learned vector for each step,
bounds what return is still possible; it starts anew with every trajectory. The index of the trajectory within its
chain is a learned embedding, because the first attempt is an exploration and the last one an exploit. The last two
can be left out.

Returns are divided by the data's largest return and enter as Fourier features too: on skewed data most returns
lie within a few hundredths of that scale, which a single linear input hardly resolves.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ring_rl.agent.chain_batch import ChainBatch
from ring_rl.typing import Array, Float, Int, PRNGKeyArray

TokenLayout = Literal[
    "return_state_action", "return_state_action_reward", "return_state_action_reward_completion", "fused"
]
TimeEmbedding = Literal["fourier", "learned", "none"]

# What the tokens after a step's action hold; before it stand R̂ and s, as one token or as two.
_AFTER_ACTION: dict[TokenLayout, tuple[str, ...]] = {
    "return_state_action": ("action",),
    "return_state_action_reward": ("action", "reward"),
    "return_state_action_reward_completion": ("action", "reward", "completion"),
    "fused": (),
}


def tokens_before_action(layout: TokenLayout) -> int:
    """Tokens of a step that exist before its action is chosen."""
    return 1 if layout == "fused" else 2


def tokens_per_step(layout: TokenLayout) -> int:
    """Tokens of a whole step."""
    return tokens_before_action(layout) + len(_AFTER_ACTION[layout])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Scales taken from the data, part of the model: an agent must see the world as it did in training.

    Attributes:
        observation_mean: Per entry of the observation.
        observation_scale: Standard deviation per entry; entries that never move have 1.
        return_scale: The largest return of the data by its absolute value: where all are negative, that of the worst.
    """

    observation_mean: tuple[float, ...]
    observation_scale: tuple[float, ...]
    return_scale: float

    def __post_init__(self) -> None:
        if len(self.observation_mean) != len(self.observation_scale):
            raise ValueError(
                f"observation_mean has {len(self.observation_mean)} entries, "
                f"observation_scale {len(self.observation_scale)}; they must agree"
            )
        if not self.return_scale > 0 or not all(scale > 0 for scale in self.observation_scale):
            raise ValueError("scales must be positive; are all returns of the data zero?")

    @staticmethod
    def identity(observation_dim: int) -> "Normalisation":
        """Scales of 1, for models that are measured and never trained."""
        return Normalisation(
            observation_mean=(0.0,) * observation_dim, observation_scale=(1.0,) * observation_dim, return_scale=1.0
        )

    def observations(self, x: Float[Array, "*b O"]) -> Float[Array, "*b O"]:
        """Observations with mean 0 and deviation 1 over the data."""
        return (x - jnp.array(self.observation_mean)) / jnp.array(self.observation_scale)


def fourier_features(x: Float[Array, "*b"], *, octaves: int) -> Float[Array, "*b f"]:
    """[x, sin π x, cos π x, sin 2π x, cos 2π x, sin 4π x, ...]: 1 + 2 · octaves numbers for x of order 1."""
    angles = jnp.pi * x[..., None] * 2.0 ** jnp.arange(octaves)
    return jnp.concatenate([x[..., None], jnp.sin(angles), jnp.cos(angles)], axis=-1)


def dropout(
    tokens: Float[Array, "B t M"], positions: Int[Array, "B t"], *, rate: float, key: PRNGKeyArray
) -> Float[Array, "B t M"]:
    """Entries become zero with probability `rate`, the others are multiplied by 1 / (1 - rate).

    Which ones is a function of (key, row, position in the chain), so that every mesh and layout drops the same.
    """

    def kept(row: Array, position: Array) -> Array:
        entry_key = jax.random.fold_in(jax.random.fold_in(key, row), position)
        return jax.random.bernoulli(entry_key, 1 - rate, tokens.shape[-1:])

    rows = jnp.arange(tokens.shape[0])
    kept_BtM = jax.vmap(jax.vmap(kept, in_axes=(None, 0)))(rows, positions)
    return jnp.where(kept_BtM, tokens / (1 - rate), 0.0)


class TokenEmbedding(nnx.Module):
    """Embeds the steps of chains as interleaved tokens."""

    def __init__(
        self,
        *,
        layout: TokenLayout,
        observation_dim: int,
        action_dim: int,
        trajectories: int,
        episode_steps: int,
        return_octaves: int,
        time_embedding: TimeEmbedding,
        time_octaves: int,
        trajectory_embedding: bool,
        previous_step_in_token: bool,
        normalisation: Normalisation,
        width: int,
        rngs: nnx.Rngs,
    ):
        self.layout: TokenLayout = layout
        self.normalisation = normalisation
        self.episode_steps, self.width = episode_steps, width
        self.return_octaves, self.time_octaves = return_octaves, time_octaves
        self.time_embedding: TimeEmbedding = time_embedding
        linear = lambda inputs: nnx.Linear(inputs, width, rngs=rngs)  # noqa: E731
        self.return_to_go = linear(1 + 2 * return_octaves)
        self.observation = linear(observation_dim)
        if time_embedding == "fourier":
            self.time = nnx.Linear(1 + 2 * time_octaves, width, use_bias=False, rngs=rngs)
        elif time_embedding == "learned":
            self.time = nnx.Embed(episode_steps, width, rngs=rngs)
        self.trajectory = nnx.Embed(trajectories, width, rngs=rngs) if trajectory_embedding else None
        self.previous_step_in_token = layout == "fused" and previous_step_in_token
        read = ("action", "reward") if self.previous_step_in_token else _AFTER_ACTION[layout]
        if "action" in read:
            self.action = linear(action_dim)
        if "reward" in read:
            self.reward = linear(1)
        if "completion" in read:
            self.completion = linear(1)

    def before_action(self, batch: ChainBatch) -> Float[Array, "B T n M"]:
        """The tokens of each step from which its action is predicted."""
        return_token = self.return_to_go(
            fourier_features(batch.returns_to_go / self.normalisation.return_scale, octaves=self.return_octaves)
        )
        state_token = self.observation(self.normalisation.observations(batch.observations))
        if self.layout == "fused":
            fused = return_token + state_token
            if self.previous_step_in_token:
                fused = fused + self.action(batch.previous_actions)
                fused = fused + self.reward(self._scaled_rewards(batch.previous_rewards))
            tokens = fused[:, :, None]
        else:
            tokens = jnp.stack([return_token, state_token], axis=2)
        return tokens + self._clock(batch.steps, batch.trajectory_indices)

    def after_action(self, batch: ChainBatch) -> Float[Array, "B T n M"]:
        """The tokens of each step that say what was done and what came of it."""
        if self.layout == "fused":
            return jnp.zeros((*batch.steps.shape, 0, self.width))
        tokens = [self.action(batch.actions)]
        if "reward" in _AFTER_ACTION[self.layout]:
            tokens.append(self.reward(self._scaled_rewards(batch.rewards)))
        if "completion" in _AFTER_ACTION[self.layout]:
            tokens.append(self.completion(batch.completions[..., None]))
        return jnp.stack(tokens, axis=2) + self._clock(batch.steps, batch.trajectory_indices)

    def __call__(self, batch: ChainBatch) -> tuple[Float[Array, "B t M"], Int[Array, "B t"]]:
        """All tokens of all steps in order, t = T · tokens_per_step, and their positions in the chain."""
        B, T = batch.steps.shape
        n = tokens_per_step(self.layout)
        tokens_BTnM = self.before_action(batch)
        if n > tokens_BTnM.shape[2]:
            tokens_BTnM = jnp.concatenate([tokens_BTnM, self.after_action(batch)], axis=2)
        positions_BTn = batch.positions[..., None] * n + jnp.arange(n)
        return tokens_BTnM.reshape(B, T * n, -1), positions_BTn.reshape(B, T * n)

    def _clock(self, steps: Array, trajectory_indices: Array) -> Float[Array, "B T 1 M"]:
        clock = jnp.zeros((*steps.shape, self.width))
        if self.time_embedding == "fourier":
            clock = clock + self.time(fourier_features(steps / self.episode_steps, octaves=self.time_octaves))
        elif self.time_embedding == "learned":
            clock = clock + self.time(steps)
        if self.trajectory is not None:
            clock = clock + self.trajectory(trajectory_indices)
        return clock[:, :, None]

    def _scaled_rewards(self, rewards: Array) -> Array:
        """Rewards times L over the largest return: of order 1, whatever the task pays."""
        return (rewards * (self.episode_steps / self.normalisation.return_scale))[..., None]

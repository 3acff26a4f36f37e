"""How an environment step becomes tokens.

| layout                                | tokens a step                                   | attention |
|---------------------------------------|-------------------------------------------------|-----------|
| return_state_action_reward            | R̂ s a r, the paper's                            | 16        |
| return_state_action_reward_completion | R̂ s a r d, with the task-completion token       | 25        |
| fused                                 | one: R̂ + s (+ the previous a, r)                | 1         |

(relative cost of attention over the same steps). The action is predicted at the last token before it.

Three clocks, each with one job. Rotary positions count tokens over the whole chain, so that a model can tell
how far back something stands. The time within the episode enters as Fourier features, because it bounds what
return is still possible; it starts anew with every trajectory. The index of the trajectory within its chain
is a learned embedding, because the first attempt is an exploration and the last one an exploit.

Returns are divided by the data's best return and enter as Fourier features too: on skewed data most returns
lie within a few hundredths of that scale, which a single linear input hardly resolves.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from ring_rl.agent.chain_batch import ChainBatch
from ring_rl.typing import Array, Float, Int

TokenLayout = Literal["return_state_action_reward", "return_state_action_reward_completion", "fused"]

_BEFORE_ACTION = {"return_state_action_reward": 2, "return_state_action_reward_completion": 2, "fused": 1}
_AFTER_ACTION = {"return_state_action_reward": 2, "return_state_action_reward_completion": 3, "fused": 0}


def tokens_before_action(layout: TokenLayout) -> int:
    """Tokens of a step that exist before its action is chosen."""
    return _BEFORE_ACTION[layout]


def tokens_per_step(layout: TokenLayout) -> int:
    """Tokens of a whole step."""
    return _BEFORE_ACTION[layout] + _AFTER_ACTION[layout]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Scales taken from the data, part of the model: an agent must see the world as it did in training.

    Attributes:
        observation_mean: Per entry of the observation.
        observation_scale: Standard deviation per entry; entries that never move have 1.
        return_scale: The best return of the data.
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
        time_octaves: int,
        previous_step_in_token: bool,
        normalisation: Normalisation,
        width: int,
        rngs: nnx.Rngs,
    ):
        self.layout: TokenLayout = layout
        self.normalisation = normalisation
        self.episode_steps = episode_steps
        self.return_octaves, self.time_octaves = return_octaves, time_octaves
        linear = lambda inputs: nnx.Linear(inputs, width, rngs=rngs)  # noqa: E731
        self.return_to_go = linear(1 + 2 * return_octaves)
        self.observation = linear(observation_dim)
        self.time = nnx.Linear(1 + 2 * time_octaves, width, use_bias=False, rngs=rngs)
        self.trajectory = nnx.Embed(trajectories, width, rngs=rngs)
        self.reads_actions = layout != "fused" or previous_step_in_token
        if self.reads_actions:
            self.action = linear(action_dim)
            self.reward = linear(1)
        if layout == "return_state_action_reward_completion":
            self.completion = linear(1)

    def before_action(self, batch: ChainBatch) -> Float[Array, "B T n M"]:
        """The tokens of each step from which its action is predicted."""
        return_token = self.return_to_go(
            fourier_features(batch.returns_to_go / self.normalisation.return_scale, octaves=self.return_octaves)
        )
        state_token = self.observation(self.normalisation.observations(batch.observations))
        if self.layout == "fused":
            fused = return_token + state_token
            if self.reads_actions:
                fused = fused + self.action(batch.previous_actions)
                fused = fused + self.reward(self._scaled_rewards(batch.previous_rewards))
            tokens = fused[:, :, None]
        else:
            tokens = jnp.stack([return_token, state_token], axis=2)
        return tokens + self._clock(batch.steps, batch.trajectory_indices)

    def after_action(self, batch: ChainBatch) -> Float[Array, "B T n M"]:
        """The tokens of each step that say what was done and what came of it."""
        if self.layout == "fused":
            return jnp.zeros((*batch.steps.shape, 0, self.time.out_features))
        tokens = [self.action(batch.actions), self.reward(self._scaled_rewards(batch.rewards))]
        if self.layout == "return_state_action_reward_completion":
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
        time = fourier_features(steps / self.episode_steps, octaves=self.time_octaves)
        return (self.time(time) + self.trajectory(trajectory_indices))[:, :, None]

    def _scaled_rewards(self, rewards: Array) -> Array:
        """Rewards times L over the best return: of order 1, whatever the task pays."""
        return (rewards * (self.episode_steps / self.normalisation.return_scale))[..., None]

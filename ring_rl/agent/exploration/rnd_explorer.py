"""RND as an explorer: an agent that learns, while it acts, to go where a network errs (arXiv:2110.15191).

Between two decisions of all environments side by side::

    act with the actor -> physics -> replay -> draw k batches -> k x (novelty, critics, actor) in one scan
                            |                                                |
                            +------- the next decision's physics runs while they are computed

The actor that acts is therefore one decision older than the newest. The task's reward is never looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.agent.exploration.ddpg import DDPG, DDPGConfig, DDPGState, Transitions
from ring_rl.agent.exploration.explorers import Batch, draw_reset_seeds, require_at_least_one, split_into_batches
from ring_rl.agent.exploration.replay import Replay
from ring_rl.agent.exploration.rnd import Novelty, NoveltyConfig, NoveltyState
from ring_rl.training.named_arrays import named_arrays, with_arrays
from ring_rl.typing import Array, Float, Float32, PRNGKeyArray, PyTree

__all__ = ["RNDConfig", "RNDExplorer"]


@dataclass(frozen=True)
class RNDConfig:
    """Numbers of the explorer.

    Attributes:
        name: Tells the explorers' configurations apart.
        action_hold: Control steps for which an action is held: one decision.
        environments: Episodes side by side.
        seed_decisions: Decisions, over all environments, that are drawn uniformly before the actor acts and learns.
        decisions_an_update: Decisions, over all environments, for each update.
        minibatch: Transitions an update.
        replay_decisions: That the replay holds, rounded down to whole episodes.
        ddpg: The agent.
        novelty: What rewards it.
    """

    name: Literal["rnd"]
    action_hold: int
    environments: int
    seed_decisions: int
    decisions_an_update: int
    minibatch: int
    replay_decisions: int
    ddpg: DDPGConfig
    novelty: NoveltyConfig

    def __post_init__(self) -> None:
        require_at_least_one(self, "action_hold", "environments", "decisions_an_update")
        require_at_least_one(self, "minibatch", "replay_decisions")
        if self.seed_decisions < 0:
            raise ValueError(f"seed_decisions must not be negative, got {self.seed_decisions}")


class LearnerState(NamedTuple):
    """All that is trained."""

    ddpg: DDPGState
    novelty: NoveltyState


class RNDExplorer:
    """See the module. An `Explorer` that learns within episodes; a function of the configuration and the seed.

    Attributes:
        metrics: Of the latest updates: their mean novelty reward, the critics' loss and the value that they give.
    """

    reward_free = True
    learns = True

    def __init__(
        self,
        config: RNDConfig,
        *,
        episodes: int,
        episode_steps: int,
        observation_dim: int,
        action_dim: int,
        seed: int,
    ) -> None:
        """Args: episode_steps: control steps of an episode.

        Raises ValueError where the replay cannot hold the episodes that are played side by side.
        """
        self._decisions_an_episode = episode_steps // config.action_hold
        capacity = config.replay_decisions // self._decisions_an_episode
        if capacity < config.environments:
            raise ValueError(
                f"replay_decisions {config.replay_decisions} hold {capacity} episodes, fewer than environments "
                f"{config.environments}; raise it to {config.environments * self._decisions_an_episode}"
            )
        self._config = config
        self._seed = seed
        self._action_dim = action_dim
        self.batch_sizes = split_into_batches(episodes, config.environments)
        self._replay = Replay(
            # No more than will ever be filled.
            episodes=min(capacity, max(episodes, config.environments)),
            decisions=self._decisions_an_episode,
            observation_dim=observation_dim,
            action_dim=action_dim,
        )
        self._ddpg = DDPG(config.ddpg, observation_dim=observation_dim, action_dim=action_dim)
        self._novelty = Novelty(config.novelty, observation_dim=observation_dim)
        init_key, self._act_key, self._update_key = jax.random.split(jax.random.key(seed), 3)
        ddpg_key, novelty_key = jax.random.split(init_key)
        self._state = LearnerState(_init(self._ddpg, ddpg_key), _init(self._novelty, novelty_key))
        self._acting_actor = self._state.ddpg.actor
        self._decisions = 0
        self._next_batch = 0
        self.metrics: Mapping[str, Array] = {}

    def batch(self, number: int) -> Batch:
        """See `Explorer`; batches must be played in order, or from where `restore` left off."""
        if number != self._next_batch:
            raise ValueError(f"batch {number} was asked for where batch {self._next_batch} comes next")
        self._next_batch += 1
        size = self.batch_sizes[number]
        rng = np.random.default_rng([self._seed, number])
        reset_seeds = draw_reset_seeds(rng, size)

        def act(observations_BO: Float32[np.ndarray, "B O"], decision: int) -> Float32[np.ndarray, "B A"]:
            if decision == 0:
                self._replay.start(observations_BO)
            if self._decisions < self._config.seed_decisions:
                return rng.uniform(-1, 1, (size, self._action_dim)).astype(np.float32)
            return np.asarray(_act(self._ddpg, self._acting_actor, observations_BO, self._act_key, self._decisions))

        def observe(actions_BA: Float32[np.ndarray, "B A"], observations_BO: Float32[np.ndarray, "B O"]) -> None:
            self._replay.append(actions_BA, observations_BO)
            self._learn_after(size, rng)

        return Batch(reset_seeds, act, recorded=size, observe=observe)

    def learn(self, number: int, trajectories: Sequence[Trajectory]) -> None:
        """It has learnt within the episodes already; rewards are not looked at."""

    def state(self) -> dict[str, Any]:
        """Networks, optimizers, running moments, replay and counters, between two batches."""
        return {
            "learner": jax.device_get(named_arrays(self._state)),
            "acting_actor": jax.device_get(named_arrays(self._acting_actor)),
            "replay": self._replay.arrays(),
            "decisions": np.asarray(self._decisions),
            "next_batch": np.asarray(self._next_batch),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on after the batch that `state` was taken after."""
        self._state = jax.device_put(with_arrays(self._state, state["learner"]))
        self._acting_actor = jax.device_put(with_arrays(self._acting_actor, state["acting_actor"]))
        self._replay.restore(state["replay"])
        self._decisions = int(state["decisions"])
        self._next_batch = int(state["next_batch"])

    def _learn_after(self, new_decisions: int, rng: np.random.Generator) -> None:
        config = self._config
        before, self._decisions = self._decisions, self._decisions + new_decisions
        updates = self._decisions // config.decisions_an_update - before // config.decisions_an_update
        n_step = config.ddpg.n_step
        if before < config.seed_decisions or not updates or not self._replay.startable(n_step):
            return
        transitions = self._replay.draw(rng, updates=updates, batch=config.minibatch, n_step=n_step)
        # As of now this actor is computed; the one that the updates lead to is not, and nobody waits for it here.
        self._acting_actor = self._state.ddpg.actor
        self._state, self.metrics = _learn(
            self._ddpg, self._novelty, self._state, transitions, self._update_key, self._decisions
        )


@functools.partial(jax.jit, static_argnums=0)
def _init(part: DDPG | Novelty, key: PRNGKeyArray) -> PyTree[Array]:
    return part.init(key)


@functools.partial(jax.jit, static_argnums=0)
def _act(
    ddpg: DDPG, actor: PyTree[Array], observations_BO: Float[Array, "B O"], key: PRNGKeyArray, decisions: Array
) -> Float[Array, "B A"]:
    return ddpg.act(actor, observations_BO, jax.random.fold_in(key, decisions))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _learn(
    ddpg: DDPG, novelty: Novelty, state: LearnerState, transitions: Transitions, key: PRNGKeyArray, decisions: Array
) -> tuple[LearnerState, dict[str, Float[Array, ""]]]:
    """One update after the other, one for each row of `transitions`; metrics are means."""

    def update(
        state: LearnerState, inputs: tuple[Transitions, PRNGKeyArray]
    ) -> tuple[LearnerState, dict[str, Float[Array, ""]]]:
        batch, update_key = inputs
        novelty_state, rewards_B = novelty.update(state.novelty, batch.observations)
        ddpg_state, metrics = ddpg.update(state.ddpg, batch, rewards_B, update_key)
        return LearnerState(ddpg_state, novelty_state), {**metrics, "novelty": rewards_B.mean()}

    keys = jax.random.split(jax.random.fold_in(key, decisions), transitions.observations.shape[0])
    state, metrics = jax.lax.scan(update, state, (transitions, keys))
    return state, jax.tree.map(jnp.mean, metrics)

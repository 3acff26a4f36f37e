"""A data set as transitions that lie whole on the device, where minibatches are drawn from it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ring_rl.agent.episodes.episode_set import EpisodeSet
from ring_rl.training.mesh import replicated
from ring_rl.typing import Array, Float32, Int32, PRNGKeyArray

__all__ = ["Minibatch", "ResidentStream", "Transitions", "draw", "transitions_of"]

# numpy's where the data are read, jax's where they are drawn from.
_AnyArray = Any


class Transitions(NamedTuple):
    """N transitions (s, a, r, d, s'); an observation that ends one and begins the next is stored once.

    Attributes:
        states: all observations, those of an episode in a row.
        first: transition i leads from states[first[i]] to states[first[i] + 1].
        actions: what was done in between.
        rewards: what it paid.
        discounts: 0 where it ended the task, 1 elsewhere, at a time limit too: an episode that was only cut off
            still has a future.
    """

    states: Float32[_AnyArray, "S O"]
    first: Int32[_AnyArray, " N"]
    actions: Float32[_AnyArray, "N A"]
    rewards: Float32[_AnyArray, " N"]
    discounts: Float32[_AnyArray, " N"]


class Minibatch(NamedTuple):
    """B transitions."""

    observations: Float32[Array, "B O"]
    actions: Float32[Array, "B A"]
    rewards: Float32[Array, " B"]
    discounts: Float32[Array, " B"]
    next_observations: Float32[Array, "B O"]


def transitions_of(episodes: EpisodeSet) -> Transitions:
    """All transitions of all episodes, as numpy arrays; one decision each, however long its action was held.

    Raises:
        ValueError: more observations than 32-bit indices can count.
    """
    lengths = np.asarray(episodes.lengths, np.int64)
    count, states = int(lengths.sum()), int(lengths.sum()) + len(lengths)
    if states >= 2**31:
        raise ValueError(f"{states} observations are more than 2**31 - 1; lower data.max_episodes")
    result = Transitions(
        states=np.empty((states, episodes.observation_dim), np.float32),
        first=np.arange(count, dtype=np.int32) + np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        actions=np.empty((count, episodes.action_dim), np.float32),
        rewards=np.empty(count, np.float32),
        discounts=np.empty(count, np.float32),
    )
    # One episode after another: the episodes may lie on the disk, and nothing needs two of them at once.
    start = 0
    for index, trajectory in enumerate(episodes.trajectories):
        end = start + trajectory.length
        result.states[start + index : end + index + 1] = trajectory.observations
        result.actions[start:end] = trajectory.actions
        result.rewards[start:end] = trajectory.rewards
        result.discounts[start:end] = trajectory.discounts
        start = end
    return result


def draw(transitions: Transitions, key: PRNGKeyArray, *, size: int) -> Minibatch:
    """`size` transitions, uniformly and with repetition."""
    index = jax.random.randint(key, (size,), 0, len(transitions.first))
    first = transitions.first[index]
    return Minibatch(
        observations=transitions.states[first],
        actions=transitions.actions[index],
        rewards=transitions.rewards[index],
        discounts=transitions.discounts[index],
        next_observations=transitions.states[first + 1],
    )


@dataclasses.dataclass(eq=False)
class ResidentStream:
    """A `RunStream` whose every batch is the whole data set, on the device already: steps draw from it themselves.

    Attributes:
        transitions: as from `transitions_of`.
        mesh: every device of it holds all of them.
        steps: training steps in all.
    """

    transitions: Transitions
    mesh: Mesh
    steps: int

    def __post_init__(self) -> None:
        self._next_step = 0
        self._resident: Transitions | None = None

    @property
    def abstract_batch(self) -> Transitions:
        """Shapes, types and shardings of the data set."""
        sharding = replicated(self.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), self.transitions)

    def start(self) -> None:
        """Bring the data set to the device."""
        if self._resident is None:
            self._resident = jax.device_put(self.transitions, replicated(self.mesh))

    def __next__(self) -> Transitions:
        if self._next_step >= self.steps:
            raise StopIteration
        self.start()
        self._next_step += 1
        assert self._resident is not None
        return self._resident

    def state(self) -> dict[str, Any]:
        """`{"next_step": s, "transitions": N}`."""
        return {"next_step": self._next_step, "transitions": len(self.transitions.first)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state` gave.

        Raises:
            ValueError: it is no such state, or one of another data set.
        """
        if set(state) != {"next_step", "transitions"}:
            raise ValueError(f"an input state holds next_step and transitions, got {dict(state)}")
        if state["transitions"] != (count := len(self.transitions.first)):
            raise ValueError(
                f"the checkpoint was trained on {state['transitions']} transitions, this data set has {count}; "
                "restore the data set, or choose another run_dir"
            )
        self._next_step = int(state["next_step"])

    def batch_at(self, step: int) -> dict[str, np.ndarray]:
        """Extremes of the data, to look at after a divergence; the minibatches follow from the seed and `step`."""
        extremes = {"step": np.asarray(step)}
        for name, x in self.transitions._asdict().items():
            extremes |= {f"least_{name}": np.asarray(x.min(axis=0)), f"greatest_{name}": np.asarray(x.max(axis=0))}
        return extremes

    def close(self) -> None:
        """Let the device's memory go."""
        self._resident = None

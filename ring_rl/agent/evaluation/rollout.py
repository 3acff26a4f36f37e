"""Several episodes in one growing context.

An agent of chains is evaluated as it was trained: it tries n times in a row, remembers all of it, and is told
the same target return at the start of every attempt. Nothing is relabelled afterwards: the context of
attempt 3 is what the agent saw and did in attempts 1 and 2.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ring_rl.agent.chain_batch import ChainBatch
from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.agent.evaluation.policy import Policy
from ring_rl.typing import Float64, Int

# Resets that belong to one seed of a protocol.
SEED_STRIDE = 100_003


@dataclasses.dataclass(frozen=True, eq=False)
class Rollouts:
    """What happened: `trajectories[row][episode]`, all rows under the same policy."""

    trajectories: tuple[tuple[Trajectory, ...], ...]

    @property
    def returns(self) -> Float64[np.ndarray, "rows episodes"]:
        """The undiscounted return of every episode."""
        return np.array([[each.episode_return for each in row] for row in self.trajectories])


def reset_seeds(*, rows: int, episodes: int, seed: int) -> Int[np.ndarray, "rows episodes"]:
    """Which initial state every episode starts from: each its own, so that rows are independent samples.

    Two policies under one protocol see the same states at the same places; that is what makes an agent with its
    context carried over comparable, episode by episode, with the same agent whose context is cleared.
    """
    return seed * SEED_STRIDE + np.arange(rows * episodes).reshape(rows, episodes)


def roll_out(
    policy: Policy,
    environments: Any,
    *,
    seeds: Int[np.ndarray, "rows episodes"],
    target_return: float,
    carry_context: bool = True,
    begin_anew: bool = False,
    on_episode: Callable[[int], None] | None = None,
) -> Rollouts:
    """Runs `policy` for n episodes in each row of a Gymnasium vector environment.

    A policy that remembers one episode, such as a Decision Transformer, starts anew with each. Within one context
    a row goes on to its next episode as soon as the last one ends, whatever the others do: attempts follow each
    other in its memory without a gap, as they do in training.

    Args:
        policy: Acts in all rows at once.
        environments: A vector environment that does not reset by itself. If its rows can end at different times, it
            must take `reset(options={"reset_mask": ...})` and leave rows alone that have ended when it is stepped.
        seeds: Reset seeds; their shape says how many rows and episodes there are.
        target_return: The return asked for, in every episode.
        carry_context: False empties the context before every episode, to measure what it is worth.
        begin_anew: Whether a context that is full is emptied for the episodes that are left; refused otherwise.
        on_episode: Called with each episode's index when it has ended in every row.

    Raises:
        ValueError: The seeds and the environments disagree in the number of rows, or the episodes do not fit into
            the context of a policy that carries one.
    """
    rows, episodes = seeds.shape
    if rows != environments.num_envs:
        raise ValueError(f"{rows} rows of seeds for {environments.num_envs} environments; give one row each")
    if carry_context and not begin_anew and 1 < policy.context_trajectories < episodes:
        raise ValueError(
            f"{episodes} episodes do not fit into one context of {policy.context_trajectories}; lower the number of "
            "episodes, train with a larger chain.trajectories, or let a full context begin anew"
        )
    in_one_context = min(episodes, policy.context_trajectories) if carry_context else 1
    recorded: list[list[Trajectory]] = [[] for _ in range(rows)]
    for first in range(0, episodes, in_one_context):
        context = _run_context(
            policy,
            environments,
            seeds[:, first : first + in_one_context],
            target_return,
            on_episode=lambda index, first=first: on_episode(first + index) if on_episode is not None else None,
        )
        for row, trajectories in enumerate(context):
            recorded[row].extend(trajectories)
    return Rollouts(tuple(map(tuple, recorded)))


class _Log(NamedTuple):
    """One step of all rows: the state before it, what was done, and the state after it."""

    observations: np.ndarray
    physics: np.ndarray | None
    actions: np.ndarray
    rewards: np.ndarray
    discounts: np.ndarray
    next_observations: np.ndarray
    next_physics: np.ndarray | None


def _run_context(
    policy: Policy,
    environments: Any,
    seeds_RE: Int[np.ndarray, "rows episodes"],
    target_return: float,
    *,
    on_episode: Callable[[int], None],
) -> list[list[Trajectory]]:
    """The episodes of every row, in a memory that is empty at the start."""
    rows, episodes = seeds_RE.shape
    policy.begin(rows)
    observations, info = environments.reset(seed=seeds_RE[:, 0].tolist())
    physics = info.get("physics")
    previous_actions = np.zeros((rows, environments.single_action_space.shape[0]), np.float32)
    previous_rewards, collected = np.zeros(rows), np.zeros(rows)
    step, episode = np.zeros(rows, np.int32), np.zeros(rows, np.int32)  # of each row; `episode` counts those that ended
    log: list[_Log] = []
    ends: list[np.ndarray] = []
    while (episode < episodes).any():
        now = _column(
            observations=observations,
            actions=np.zeros_like(previous_actions),
            rewards=np.zeros(rows),
            returns_to_go=target_return - collected,
            completions=np.zeros(rows),
            previous_actions=previous_actions,
            previous_rewards=previous_rewards,
            steps=step,
            indices=np.minimum(episode, episodes - 1),
        )
        actions = policy.act(now)
        next_observations, rewards, terminated, truncated, info = environments.step(actions)
        ended = (terminated | truncated) & (episode < episodes)
        collected = collected + rewards
        completions = ended & (collected >= target_return)
        policy.observe(
            now._replace(
                actions=actions[:, None].astype(np.float32),
                rewards=rewards[:, None].astype(np.float32),
                completions=completions[:, None].astype(np.float32),
            )
        )
        next_physics = info.get("physics")
        log.append(_Log(observations, physics, actions, rewards, info["discount"], next_observations, next_physics))
        ends.append(ended)
        observations, physics = next_observations, next_physics
        previous_actions, previous_rewards = actions, rewards
        step = step + 1
        if not ended.any():
            continue
        slowest = episode.min()
        episode = episode + ended
        going_on = ended & (episode < episodes)
        if going_on.any():
            observations, physics = _reset(environments, seeds_RE, episode, going_on, physics)
        step, collected, previous_rewards = (np.where(ended, 0, x) for x in (step, collected, previous_rewards))
        previous_actions = np.where(ended[:, None], np.float32(0), previous_actions)
        for index in range(slowest, episode.min()):
            on_episode(index)
    return _trajectories(log, np.stack(ends))


def _reset(
    environments: Any, seeds_RE: np.ndarray, episode: np.ndarray, chosen: np.ndarray, physics: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Observations and physics of all rows after those `chosen` began their next episode."""
    if chosen.all():
        observations, info = environments.reset(seed=seeds_RE[np.arange(len(seeds_RE)), episode].tolist())
        return observations, info.get("physics")
    seeds = [int(seeds_RE[row, episode[row]]) if chosen[row] else None for row in range(len(chosen))]
    observations, info = environments.reset(seed=seeds, options={"reset_mask": chosen})
    if physics is None:
        return observations, None
    return observations, np.where(chosen[:, None], info["physics"], physics)


def _trajectories(log: list[_Log], ends_TR: np.ndarray) -> list[list[Trajectory]]:
    """Cuts the log of all rows into the episodes of each."""
    columns: Any = (None if column[0] is None else np.stack(column) for column in zip(*log, strict=True))
    whole = _Log(*columns)
    recorded = []
    for row, ends_T in enumerate(ends_TR.T):
        stops = (np.flatnonzero(ends_T) + 1).tolist()
        recorded.append([_cut(whole, row, start, stop) for start, stop in itertools.pairwise([0, *stops])])
    return recorded


def _cut(log: _Log, row: int, start: int, stop: int) -> Trajectory:
    steps = (slice(start, stop), row)

    def states(before: np.ndarray, after: np.ndarray, dtype: type[np.floating]) -> np.ndarray:
        return np.concatenate([before[steps], after[stop - 1 : stop, row]]).astype(dtype)

    return Trajectory(
        observations=states(log.observations, log.next_observations, np.float32),
        actions=log.actions[steps].astype(np.float32),
        rewards=log.rewards[steps].astype(np.float32),
        discounts=log.discounts[steps].astype(np.float32),
        physics=None
        if log.physics is None or log.next_physics is None
        else states(log.physics, log.next_physics, np.float64),
    )


def _column(
    *,
    observations: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    returns_to_go: np.ndarray,
    completions: np.ndarray,
    previous_actions: np.ndarray,
    previous_rewards: np.ndarray,
    steps: np.ndarray,
    indices: np.ndarray,
) -> ChainBatch:
    """One step of all rows, [rows, 1, ...], in the dtypes that training uses."""
    real = lambda x: np.asarray(x, np.float32)[:, None]  # noqa: E731
    count = lambda x: np.asarray(x, np.int32)[:, None]  # noqa: E731
    return ChainBatch(
        observations=real(observations),
        actions=real(actions),
        rewards=real(rewards),
        returns_to_go=real(returns_to_go),
        completions=real(completions),
        previous_actions=real(previous_actions),
        previous_rewards=real(previous_rewards),
        steps=count(steps),
        trajectory_indices=count(indices),
        positions=count(np.zeros_like(steps)),  # the memory counts for itself
        loss_weights=real(np.ones(len(observations))),
    )

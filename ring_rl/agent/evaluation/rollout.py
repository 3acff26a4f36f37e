"""Several episodes in one growing context.

An agent of chains is evaluated as it was trained: it tries n times in a row, remembers all of it, and is told
the same target return at the start of every attempt. Nothing is relabelled afterwards: the context of
attempt 3 is what the agent saw and did in attempts 1 and 2.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from ring_rl.agent.chain_batch import ChainBatch
from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.agent.evaluation.policy import Policy
from ring_rl.typing import Float64, Int


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
    return seed * 100_003 + np.arange(rows * episodes).reshape(rows, episodes)


def roll_out(
    policy: Policy,
    environments: Any,
    *,
    seeds: Int[np.ndarray, "rows episodes"],
    target_return: float,
    carry_context: bool = True,
    on_episode: Callable[[int], None] | None = None,
) -> Rollouts:
    """Runs `policy` for n episodes in each row of a Gymnasium vector environment.

    A policy that remembers one episode, such as a Decision Transformer, starts anew with each.

    Args:
        policy: Acts in all rows at once.
        environments: A vector environment whose rows end together and do not reset by themselves.
        seeds: Reset seeds; their shape says how many rows and episodes there are.
        target_return: The return asked for, in every episode.
        carry_context: False empties the context before every episode, to measure what it is worth.
        on_episode: Called with each episode's index when it ends.

    Raises:
        ValueError: The seeds and the environments disagree in the number of rows, or the episodes do not fit into
            the context of a policy that carries one.
        RuntimeError: Some rows ended before others.
    """
    rows, episodes = seeds.shape
    if rows != environments.num_envs:
        raise ValueError(f"{rows} rows of seeds for {environments.num_envs} environments; give one row each")
    if carry_context and 1 < policy.context_trajectories < episodes:
        raise ValueError(
            f"{episodes} episodes do not fit into one context of {policy.context_trajectories}; lower the number of "
            "episodes, or train with a larger chain.trajectories"
        )
    recorded: list[list[Trajectory]] = [[] for _ in range(rows)]
    for episode in range(episodes):
        index = episode % policy.context_trajectories if carry_context else 0
        if index == 0:
            policy.begin(rows)
        trajectories = _run_episode(policy, environments, seeds[:, episode], target_return, index)
        for row, trajectory in enumerate(trajectories):
            recorded[row].append(trajectory)
        if on_episode is not None:
            on_episode(episode)
    return Rollouts(tuple(map(tuple, recorded)))


def _run_episode(
    policy: Policy, environments: Any, seeds: np.ndarray, target_return: float, index: int
) -> list[Trajectory]:
    rows = len(seeds)
    observations, info = environments.reset(seed=[int(seed) for seed in seeds])
    action_dim = environments.single_action_space.shape[0]
    collected = np.zeros(rows)
    previous_actions, previous_rewards = np.zeros((rows, action_dim), np.float32), np.zeros(rows)
    log: dict[str, list[np.ndarray]] = {
        "observations": [observations],
        "actions": [],
        "rewards": [],
        "discounts": [],
        "physics": [info["physics"]],
    }
    ended = np.zeros(rows, bool)
    step = 0
    while not ended.any():
        now = _column(
            observations=observations,
            actions=np.zeros_like(previous_actions),
            rewards=np.zeros(rows),
            returns_to_go=target_return - collected,
            completions=np.zeros(rows),
            previous_actions=previous_actions,
            previous_rewards=previous_rewards,
            step=step,
            index=index,
        )
        actions = policy.act(now)
        observations, rewards, terminated, truncated, info = environments.step(actions)
        ended = terminated | truncated
        collected = collected + rewards
        completions = ended & (collected >= target_return)
        policy.observe(
            now._replace(
                actions=actions[:, None].astype(np.float32),
                rewards=rewards[:, None].astype(np.float32),
                completions=completions[:, None].astype(np.float32),
            )
        )
        for name, value in zip(log, (observations, actions, rewards, info["discount"], info["physics"]), strict=True):
            log[name].append(value)
        previous_actions, previous_rewards = actions, rewards
        step += 1
    if not ended.all():
        raise RuntimeError(
            f"rows {np.flatnonzero(ended).tolist()} ended at step {step} before the others; "
            "roll out environments of one task, which end together"
        )
    arrays = {name: np.stack(values, axis=1) for name, values in log.items()}
    dtypes = {name: np.float64 if name == "physics" else np.float32 for name in arrays}
    return [Trajectory(**{name: arrays[name][row].astype(dtypes[name]) for name in arrays}) for row in range(rows)]


def _column(
    *,
    observations: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    returns_to_go: np.ndarray,
    completions: np.ndarray,
    previous_actions: np.ndarray,
    previous_rewards: np.ndarray,
    step: int,
    index: int,
) -> ChainBatch:
    """One step of all rows, [rows, 1, ...], in the dtypes that training uses."""
    real = lambda x: np.asarray(x, np.float32)[:, None]  # noqa: E731
    count = lambda value: np.full((len(observations), 1), value, np.int32)  # noqa: E731
    return ChainBatch(
        observations=real(observations),
        actions=real(actions),
        rewards=real(rewards),
        returns_to_go=real(returns_to_go),
        completions=real(completions),
        previous_actions=real(previous_actions),
        previous_rewards=real(previous_rewards),
        steps=count(step),
        trajectory_indices=count(index),
        positions=count(0),  # the memory counts for itself
        loss_weights=real(np.ones(len(observations))),
    )

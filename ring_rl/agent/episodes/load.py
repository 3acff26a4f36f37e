"""Which episodes an agent learns from."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from ring_rl.agent.environments.domains import parse_task
from ring_rl.agent.episodes.exorl import EpisodeSet, read_episodes
from ring_rl.agent.episodes.trajectory import merge_held_actions
from ring_rl.agent.tokens import Normalisation


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A data set in ExoRL's layout.

    Attributes:
        root: Holds `<domain>/<algorithm>/buffer/`.
        algorithm: Who explored.
        max_episodes: Read only the first so many; null reads all.
        action_repeat: Control steps that make one decision; the data must have been collected with actions held
            that long. Published ExoRL data need 1.
        reward_column: Which of several stored rewards is this task's; null where there is one.
    """

    root: Path
    algorithm: str
    max_episodes: int | None
    action_repeat: int
    reward_column: int | None


def load_episodes(config: DataConfig, *, task: str, progress: bool) -> EpisodeSet:
    """The episodes of `task`'s domain, one row a decision.

    Rewards are taken as stored. A set that says for which task they were paid must say `task`.

    Raises:
        FileNotFoundError: There is no such data set; the message says how to make or fetch one.
        ValueError: A damaged file, rewards of another task, or actions not held for `action_repeat` steps.
    """
    domain, _ = parse_task(task)
    folder = config.root / domain / config.algorithm
    if not (folder / "buffer").is_dir():
        raise FileNotFoundError(
            f"no data set at {folder}; collect one with `python datasets/exorl/collect.py task={task}`, fetch a "
            f"published one with `python datasets/exorl/fetch.py {domain} rnd`, or set data.root and data.algorithm"
        )
    _check_rewards_are_of(task, folder)
    episodes = read_episodes(
        folder / "buffer",
        max_episodes=config.max_episodes,
        progress=progress,
        reward_column=config.reward_column,
    )
    if config.action_repeat == 1:
        return episodes
    return EpisodeSet(tuple(merge_held_actions(each, config.action_repeat) for each in episodes.trajectories))


def normalisation_of(episodes: EpisodeSet) -> Normalisation:
    """Mean and deviation of every observation entry, and the best return."""
    observations = np.concatenate([each.observations for each in episodes.trajectories]).astype(np.float64)
    scale = observations.std(axis=0)
    return Normalisation(
        observation_mean=tuple(map(float, observations.mean(axis=0))),
        observation_scale=tuple(float(s) if s > 1e-6 else 1.0 for s in scale),
        return_scale=float(episodes.returns.max()),
    )


def _check_rewards_are_of(task: str, folder: Path) -> None:
    record = folder / "collection.json"
    if not record.exists():
        return
    try:
        collected_for = json.loads(record.read_text())["settings"]["task"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{record} does not say for which task it was collected; restore it, or move it away if it is not "
            "collect.py's"
        ) from error
    if collected_for != task:
        raise ValueError(
            f"{folder} holds the rewards of {collected_for}, not of {task}; "
            f"set task={collected_for} or choose another data.algorithm"
        )

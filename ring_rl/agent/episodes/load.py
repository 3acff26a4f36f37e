"""Which episodes an agent learns from, and whose rewards they carry."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ring_rl.agent.environments.domains import DOMAINS, parse_task
from ring_rl.agent.environments.recorded import RecordedEnvironment
from ring_rl.agent.episodes.derived import signatures
from ring_rl.agent.episodes.exorl import (
    EpisodeFiles,
    EpisodeSet,
    list_episodes,
    read_files,
    reward_columns,
    spaced_evenly,
)
from ring_rl.agent.episodes.minari_read import MinariDataConfig, MinariSet
from ring_rl.agent.episodes.relabel_cache import RelabelConfig, relabelled_rewards
from ring_rl.agent.episodes.store import EpisodeStore
from ring_rl.agent.episodes.store_write import make_store, open_store
from ring_rl.agent.episodes.trajectory import merge_held_actions
from ring_rl.agent.tokens import Normalisation
from ring_rl.typing import Float32, Int

Rewards = Literal["auto", "stored", "relabelled"]
StoreChoice = Literal["auto", "always", "never"]

# Dotted paths of an entry point's configuration that change where episodes lie and how they are read, not what is read.
DATA_MAY_DIFFER = ("data.root", "data.store", "data.store_from_megabytes", "data.relabel")

# Who fills the folders whose names begin so: conf/explorer/.
_EXPLORERS = {"policy_search": "policy_search", "noise": "noise", "uniform": "uniform", "rnd": "rnd_small"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A data set in ExoRL's layout.

    Attributes:
        name: "exorl".
        root: Holds `<domain>/<algorithm>/buffer/`.
        algorithm: Who explored.
        max_episodes: Read at most so many, evenly spaced over the recording; null reads all.
        action_repeat: Control steps that make one decision; the data must have been collected with actions held
            that long. Published ExoRL data need 1.
        rewards: "stored" takes the files' and trusts them to be the task's; "relabelled" recomputes them from the
            recorded states, once, and keeps them beside the data; "auto" takes the stored ones where
            collection.json says that they are this task's, or a file holds one column for each task of its domain,
            and relabels where they are another's or nobody says whose.
        reward_column: Which of several stored rewards is this task's; null finds out.
        relabel: How rewards are recomputed.
        store: Read episodes one by one from flat files beside the data (`ring_rl.agent.episodes.store`), made on first
            use: "always", "never" (all are read into memory), or "auto" where they are there already or the data
            are large.
        store_from_megabytes: What "auto" calls large, in the episode files' size on disk.
    """

    name: Literal["exorl"]
    root: Path
    algorithm: str
    max_episodes: int | None
    action_repeat: int
    rewards: Rewards
    reward_column: int | None
    relabel: RelabelConfig
    store: StoreChoice
    store_from_megabytes: float

    def __post_init__(self) -> None:
        if self.max_episodes is not None and self.max_episodes < 1:
            raise ValueError(f"max_episodes must be at least 1, got {self.max_episodes}; use null to read all")
        if self.store_from_megabytes < 0:
            raise ValueError(f"store_from_megabytes must be at least 0, got {self.store_from_megabytes}")
        if self.rewards == "relabelled" and self.reward_column is not None:
            raise ValueError("reward_column chooses a stored reward; set it to null or rewards=stored")


AnyDataConfig = DataConfig | MinariDataConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataEnvironment:
    """What a checkpoint must know to act in the environment that its data come from.

    Attributes:
        action_repeat: Control steps a decision.
        recorded: What the data say of an environment that is none of ours; None for one of ours.
    """

    action_repeat: int
    recorded: RecordedEnvironment | None

    @property
    def episode_steps(self) -> int | None:
        """Decisions that an episode may last, if the data say so."""
        return None if self.recorded is None else self.recorded.max_episode_steps


def environment_of(config: AnyDataConfig, *, task: str) -> DataEnvironment:
    """The environment of a data set.

    Raises:
        FileNotFoundError, ImportError: A Minari set that is not here, or Minari itself is not.
        ValueError: A Minari set that was not recorded in `task`.
    """
    if isinstance(config, DataConfig):
        return DataEnvironment(action_repeat=config.action_repeat, recorded=None)
    opened = MinariSet(config)
    return DataEnvironment(action_repeat=opened.action_repeat, recorded=opened.recorded_environment(task))


def load_episodes(config: AnyDataConfig, *, task: str, progress: bool, physics: bool = False) -> EpisodeSet:
    """The episodes of `task`'s domain with `task`'s rewards, one row a decision.

    Physics states are left out unless `physics` asks for them; a Minari set gives what it holds.

    Raises:
        FileNotFoundError: There is no such data set; the message says how to make or fetch one.
        ImportError: Rewards must be relabelled first and there is no simulator.
        ValueError: A damaged file, stored rewards of another task, rewards that cannot be relabelled, or actions
            not held for `action_repeat` steps.
    """
    if isinstance(config, MinariDataConfig):
        opened = MinariSet(config)
        opened.check_task(task)
        return opened.episodes(progress=progress)
    recording = _find_recording(config, task, progress=progress)
    rewards = None
    if config.rewards == "relabelled" or (config.rewards == "auto" and recording.task != task):
        rewards = _relabelled(recording, config, task=task, progress=progress)
    if recording.store is not None and not physics:
        own = recording.column if rewards is None else rewards
        return recording.store.episodes(recording.indices, own, action_repeat=config.action_repeat)
    # Of the files found above, to which the rewards belong: a set that is being collected grows meanwhile.
    episodes = read_files(recording.paths, progress=progress, reward_column=recording.column, physics=physics)
    if rewards is not None:
        episodes = tuple(dataclasses.replace(each, rewards=own) for each, own in zip(episodes, rewards, strict=True))
    if config.action_repeat != 1:
        episodes = tuple(merge_held_actions(each, config.action_repeat) for each in episodes)
    return EpisodeSet(episodes)


def load_rewards(config: DataConfig, *, task: str, progress: bool) -> list[Float32[np.ndarray, " L"]]:
    """`task`'s rewards of every episode, one a control step, recomputed from the recorded states or kept from then.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `load_episodes`.
    """
    return _relabelled(_find_recording(config, task, progress=progress), config, task=task, progress=progress)


def normalisation_of(episodes: EpisodeSet) -> Normalisation:
    """Mean and deviation of every observation entry, and the largest return by its absolute value."""
    mean, scale = episodes.observation_mean_and_deviation
    return Normalisation(
        observation_mean=tuple(map(float, mean)),
        observation_scale=tuple(float(s) if s > 1e-6 else 1.0 for s in scale),
        return_scale=float(np.abs(episodes.returns).max()),
    )


@dataclasses.dataclass(frozen=True)
class _Recording:
    """Where episodes lie, and whose rewards they carry.

    Attributes:
        folder: The data set's.
        paths: Of the episodes wanted.
        store: That holds them all, if there is one.
        indices: Of those wanted, in the store.
        column: Of the stored rewards, to read.
        task: For which these were paid, if that is known.
    """

    folder: Path
    paths: tuple[Path, ...]
    store: EpisodeStore | None
    indices: Int[np.ndarray, " n"]
    column: int
    task: str | None


def _find_recording(config: DataConfig, task: str, *, progress: bool) -> _Recording:
    domain, _ = parse_task(task)
    folder = config.root / domain / config.algorithm
    if not (folder / "buffer").is_dir():
        raise FileNotFoundError(f"no data set at {folder}; {_ways_to_get(config, task)}")
    buffer = folder / "buffer"
    every_path = list_episodes(buffer)
    store = _open_store(config, folder, every_path, progress=progress)
    if store is not None:  # it was made of what was there then
        every_path = tuple(buffer / name for name in store.names.tolist())
    indices = np.array(spaced_evenly(range(len(every_path)), config.max_episodes))
    paths = tuple(every_path[index] for index in indices)
    tasks = tuple(f"{domain}_{name}" for name in DOMAINS[domain].tasks)
    if config.reward_column is not None:
        return _Recording(folder, paths, store, indices, config.reward_column, task)
    columns = reward_columns(paths[0]) if store is None else store.reward_columns
    if columns == 1:
        column, recorded = 0, _recorded_task(folder)
    elif columns == len(tasks):
        column, recorded = tasks.index(task), task
    else:
        raise ValueError(
            f"{paths[0]} holds {columns} rewards where {domain} has {len(tasks)} tasks; choose this task's with "
            f"data.reward_column=0..{columns - 1}"
        )
    if config.rewards == "stored" and recorded not in (None, task):
        raise ValueError(
            f"{folder} holds the rewards of {recorded}, not of {task}; set task={recorded}, data.rewards=auto to "
            "relabel, or choose another data.algorithm"
        )
    return _Recording(folder, paths, store, indices, column, recorded)


def _ways_to_get(config: DataConfig, task: str) -> str:
    """Commands that fill the very folder that is missing."""
    domain, algorithm = parse_task(task)[0], config.algorithm
    explorer = next((each for name, each in _EXPLORERS.items() if f"{algorithm}_".startswith(f"{name}_")), None)
    published, root = "rnd" if explorer else algorithm, shlex.quote(str(config.root))
    ways = [
        f"fetch a published one with `python datasets/exorl/fetch.py {domain} {published} --root {root}`",
        "or set data.root and data.algorithm",
    ]
    if explorer:
        chosen = f"task={task} explorer={explorer} algorithm={algorithm} root={root}"
        ways.insert(0, f"collect one with `python datasets/exorl/collect.py {chosen}`")
    return ", ".join(ways)


def _open_store(config: DataConfig, folder: Path, paths: Sequence[Path], *, progress: bool) -> EpisodeStore | None:
    if config.store == "never":
        return None
    if config.store == "always":
        return make_store(folder, progress=progress)
    store = open_store(folder)
    if store is None and sum(path.stat().st_size for path in paths) >= 1e6 * config.store_from_megabytes:
        store = make_store(folder, progress=progress)
    return store


def _relabelled(
    recording: _Recording, config: DataConfig, *, task: str, progress: bool
) -> list[Float32[np.ndarray, " L"]]:
    store = recording.store
    return relabelled_rewards(
        recording.folder,
        EpisodeFiles(recording.paths, reward_column=recording.column),
        signatures(recording.paths) if store is None else store.signatures[recording.indices],
        task=task,
        recorded_task=recording.task,
        config=config.relabel,
        progress=progress,
    )


def _recorded_task(folder: Path) -> str | None:
    """For which task the stored rewards were paid, if collect.py wrote it down."""
    record = folder / "collection.json"
    if not record.exists():
        return None
    try:
        return str(json.loads(record.read_text())["settings"]["task"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{record} does not say for which task it was collected; restore it, or move it away if it is not "
            "collect.py's"
        ) from error

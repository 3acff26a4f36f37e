"""Reads and writes episodes in the layout in which ExoRL was published (arXiv:2201.13425).

    <root>/<domain>/<algorithm>/buffer/episode_000042_1000.npz        name: index, number of transitions T

Every array of a file has T + 1 rows. A row holds a state and what LED INTO it, so row 0 has no action::

    row            0       1       2     ...     T
    observation   o[0]    o[1]    o[2]          o[T]      (T+1, O)      float32
    action         0      a[0]    a[1]         a[T-1]     (T+1, A)      float32
    reward         0      r[0]    r[1]         r[T-1]     (T+1, 1)      float32     point_mass_maze: (T+1, 4)
    discount       1      d[0]    d[1]         d[T-1]     (T+1, 1)      float32
    physics       s[0]    s[1]    s[2]          s[T]      (T+1, P)      float64     optional

`Trajectory` drops the empty row: its actions[t] is taken IN observations[t].

Needs no simulator.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, overload

import numpy as np

from ring_rl.agent.environments.domains import DOMAINS, DomainSpec, parse_task
from ring_rl.agent.episodes.derived import progress_bar
from ring_rl.agent.episodes.episode_set import EpisodeSet, select_best_fraction
from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.atomic_file import atomic_file
from ring_rl.typing import Float32

__all__ = [
    "DOMAINS",
    "DomainSpec",
    "EpisodeFiles",
    "EpisodeSet",
    "list_episodes",
    "parse_task",
    "read_episode",
    "read_episode_and_rewards",
    "read_episodes",
    "read_files",
    "recorded_length",
    "reward_columns",
    "select_best_fraction",
    "spaced_evenly",
    "write_episode",
]

_T = TypeVar("_T")
# episode_000000_1000.npz as published; 20220131T120000_0_1000.npz as URLB's recorder names them.
_EPISODE_NAME = re.compile(r"(?:episode|\d{8}T\d{6})_(\d+)_(\d+)\.npz")


def list_episodes(folder: Path) -> tuple[Path, ...]:
    """The episode files of a buffer folder, ordered by index (URLB's by time and index).

    Raises:
        FileNotFoundError: the folder is missing or holds no episode.
    """
    remedy = "collect episodes with datasets/exorl/collect.py or fetch published ones with datasets/exorl/fetch.py"
    if not folder.is_dir():
        raise FileNotFoundError(f"no such data folder: {folder}; {remedy}")
    paths = [path for path in folder.iterdir() if _EPISODE_NAME.fullmatch(path.name)]
    if not paths:
        raise FileNotFoundError(f"{folder} holds no episode_*.npz; {remedy}")
    return tuple(sorted(paths, key=lambda path: (path.name.split("_")[0], _index_and_length(path)[0])))


def read_episode(path: Path, *, reward_column: int | None = None, physics: bool = True) -> Trajectory:
    """Reads one episode file.

    Args:
        path: The file; its name holds the episode's length.
        reward_column: Which task's reward to take where a file holds several (point_mass_maze has 4). None
            demands that there is one.
        physics: Whether to read the simulator's states, half of the file, if it holds any.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a name that is not an episode's, a truncated or corrupt file, a missing key, wrong shapes
            or dtypes, lengths that disagree with one another or with the name, values that are not finite.
            The message names the file and the remedy.
    """
    try:
        trajectory, rewards = _read_episode(path, physics)
        return replace(trajectory, rewards=_select_reward(rewards, reward_column))
    except _EpisodeError as problem:
        raise ValueError(f"{path}: {problem}") from None


def read_episode_and_rewards(path: Path) -> tuple[Trajectory, Float32[np.ndarray, "L tasks"]]:
    """An episode without physics states, and all of its rewards, of which it carries the first; see `read_episode`."""
    try:
        return _read_episode(path, with_physics=False)
    except _EpisodeError as problem:
        raise ValueError(f"{path}: {problem}") from None


def recorded_length(path: Path) -> int:
    """The number of transitions that an episode file's name says."""
    try:
        return _index_and_length(path)[1]
    except _EpisodeError as problem:
        raise ValueError(f"{path}: {problem}") from None


def reward_columns(path: Path) -> int:
    """How many rewards an episode file holds, one a task; raises as `read_episode`."""
    try:
        rewards = _load_arrays(path, leave_out=("observation", "action", "discount", "physics")).get("reward")
        if rewards is None or rewards.ndim != 2:
            raise _EpisodeError("'reward' is missing or no table; fetch or collect it again")
    except _EpisodeError as problem:
        raise ValueError(f"{path}: {problem}") from None
    return rewards.shape[1]


class EpisodeFiles(Sequence[Trajectory]):
    """Episode files as a sequence that reads one when it is asked for, and keeps none."""

    def __init__(self, paths: Sequence[Path], *, reward_column: int | None = None, physics: bool = True) -> None:
        self._paths, self._reward_column, self._physics = tuple(paths), reward_column, physics

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> EpisodeFiles: ...
    def __getitem__(self, index: int | slice) -> Trajectory | EpisodeFiles:
        if isinstance(index, slice):
            return EpisodeFiles(self._paths[index], reward_column=self._reward_column, physics=self._physics)
        return read_episode(self._paths[index], reward_column=self._reward_column, physics=self._physics)


def spaced_evenly(episodes: Sequence[_T], count: int | None) -> tuple[_T, ...]:
    """At most `count` of them, evenly spaced over the recording; all for None.

    An explorer changes while it records, and the first ones alone would misrepresent it.

    Raises:
        ValueError: a count below 1.
    """
    if count is None:
        return tuple(episodes)
    if count < 1:
        raise ValueError(f"max_episodes must be at least 1, got {count}; use null to read all")
    kept = min(count, len(episodes))
    return tuple(episodes[index * len(episodes) // kept] for index in range(kept))


def read_episodes(
    folder: Path,
    *,
    max_episodes: int | None,
    progress: bool,
    reward_column: int | None = None,
    physics: bool = True,
) -> EpisodeSet:
    """Reads a buffer folder into memory.

    Args:
        folder: `<root>/<domain>/<algorithm>/buffer`.
        max_episodes: Reads at most so many, `spaced_evenly`. None reads all.
        progress: Whether to show a progress bar with the time left.
        reward_column: See `read_episode`.
        physics: See `read_episode`.

    Raises:
        FileNotFoundError: the folder is missing or empty.
        ValueError: `max_episodes` below 1, a bad file (see `read_episode`), or files whose dimensions differ.
    """
    paths = spaced_evenly(list_episodes(folder), max_episodes)
    return EpisodeSet(read_files(paths, progress=progress, reward_column=reward_column, physics=physics))


def read_files(
    paths: Sequence[Path], *, progress: bool, reward_column: int | None = None, physics: bool = True
) -> tuple[Trajectory, ...]:
    """Reads these episode files into memory, in this order; arguments and errors as of `read_episodes`."""
    trajectories: list[Trajectory] = []
    with progress_bar(shown=progress) as bar:
        job = bar.add_task("reading episodes", total=len(paths))
        for path, trajectory in zip(
            paths, EpisodeFiles(paths, reward_column=reward_column, physics=physics), strict=True
        ):
            if trajectories:
                found, first = (
                    (each.observations.shape[1], each.actions.shape[1]) for each in (trajectory, trajectories[0])
                )
                if found != first:
                    raise ValueError(
                        f"{path}: observation and action dimensions {found} differ from {first} in "
                        f"{paths[0].name}; keep one domain in a folder"
                    )
            trajectories.append(trajectory)
            bar.advance(job)
    return tuple(trajectories)


def write_episode(folder: Path, index: int, trajectory: Trajectory) -> Path:
    """Writes `episode_<index>_<length>.npz`, in full or not at all.

    Raises:
        FileExistsError: an episode of this index exists, of whatever length. It is not overwritten.
        FileNotFoundError: the folder is missing.
        ValueError: a negative index.
    """
    if index < 0:
        raise ValueError(f"an episode's index must be at least 0, got {index}")
    if not folder.is_dir():
        raise FileNotFoundError(f"no such data folder: {folder}; create it first")
    path = folder / f"episode_{index:06d}_{trajectory.length}.npz"
    taken = next(folder.glob(f"episode_{index:06d}_*.npz"), None)
    if taken is not None:
        raise FileExistsError(f"{taken} exists and is not overwritten; choose another index or folder")
    arrays = {
        "observation": trajectory.observations,
        "action": np.concatenate([np.zeros_like(trajectory.actions[:1]), trajectory.actions]),
        "reward": np.concatenate([np.zeros(1, np.float32), trajectory.rewards])[:, None],
        "discount": np.concatenate([np.ones(1, np.float32), trajectory.discounts])[:, None],
    }
    if trajectory.physics is not None:
        arrays["physics"] = trajectory.physics
    with atomic_file(path, overwrite=False) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return path


class _EpisodeError(Exception):
    """What is wrong with a file, without its name."""


def _index_and_length(path: Path) -> tuple[int, int]:
    match = _EPISODE_NAME.fullmatch(path.name)
    if match is None:
        raise _EpisodeError("not an episode's name; expected episode_<index>_<length>.npz")
    return int(match[1]), int(match[2])


def _read_episode(path: Path, with_physics: bool) -> tuple[Trajectory, np.ndarray]:
    _, length = _index_and_length(path)
    arrays = _load_arrays(path, leave_out=() if with_physics else ("physics",))
    for key, dtype in (
        ("observation", "float32"),
        ("action", "float32"),
        ("reward", "float32"),
        ("discount", "float32"),
    ):
        if key not in arrays:
            raise _EpisodeError(f"key {key!r} is missing, found {', '.join(sorted(arrays))}; fetch or collect it again")
        _check_array(key, arrays[key], dtype=dtype, length=length)
    physics = arrays.get("physics")
    if physics is not None:
        _check_array("physics", physics, dtype="float64", length=length)
    if arrays["discount"].shape[1] != 1:
        raise _EpisodeError(f"'discount' must have 1 column, got shape {arrays['discount'].shape}")
    rewards = arrays["reward"][1:]
    trajectory = Trajectory(
        observations=arrays["observation"],
        actions=arrays["action"][1:],
        rewards=rewards[:, 0],
        discounts=arrays["discount"][1:, 0],
        physics=physics,
    )
    return trajectory, rewards


def _load_arrays(path: Path, *, leave_out: Collection[str]) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:  # np.load would also take files that are no archive
            names = [name.removesuffix(".npy") for name in archive.namelist()]
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names if name not in leave_out}
    except FileNotFoundError:
        raise FileNotFoundError(f"no such episode: {path}") from None
    except PermissionError:
        raise
    except Exception as error:  # damaged bytes raise nearly anything: BadZipFile, zlib.error, EOFError, struct.error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise _EpisodeError(
            f"truncated or corrupt npz file ({reason}); remove it and fetch or collect it again"
        ) from None


def _check_array(key: str, array: np.ndarray, *, dtype: str, length: int) -> None:
    if array.dtype != np.dtype(dtype):
        raise _EpisodeError(f"{key!r} must be {dtype}, got {array.dtype}; convert the file to the published layout")
    if array.ndim != 2 or array.shape[1] == 0:
        raise _EpisodeError(f"{key!r} must have shape (length + 1, n), got {array.shape}")
    if array.shape[0] != length + 1:
        raise _EpisodeError(
            f"{key!r} has {array.shape[0]} rows where the file's name says {length} transitions, so "
            f"{length + 1} rows; remove the file and fetch or collect it again"
        )
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise _EpisodeError(f"{key!r} has a NaN or infinite value in row {int(np.argmin(finite))}; remove the file")


def _select_reward(rewards: np.ndarray, column: int | None) -> np.ndarray:
    columns = rewards.shape[1]
    if column is None:
        if columns > 1:
            raise _EpisodeError(
                f"'reward' has {columns} columns, one a task; choose one with reward_column=0..{columns - 1}"
            )
        return rewards[:, 0]
    if not 0 <= column < columns:
        raise _EpisodeError(f"'reward' has {columns} column(s); reward_column={column} must be in 0..{columns - 1}")
    return np.ascontiguousarray(rewards[:, column])

"""Episodes in a few flat files, read one by one with the memory of one.

    <set>/store/observations.npy   (sum(L + 1), O)       float32   the rows of all episodes, one after the other
                actions.npy        (sum L, A)            float32   without the empty row of the published layout
                rewards.npy        (sum L, tasks)        float32
                discounts.npy      (sum L,)              float32
                index.npz                                          a row an episode: name, content, length, moments

Made once from `buffer/` by `ring_rl.agent.episodes.store_write`, without physics states. The index says of which
files the store was made; opened beside others it is refused. Rows are read with `pread` into arrays of their own: a
memory map would count every page it touched as resident, and grow with the data set.

Rewards stay in memory, 4 bytes a decision, because every return depends on them. Reading is safe from any thread.
"""

from __future__ import annotations

import dataclasses
import json
import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from ring_rl.agent.episodes.derived import signature
from ring_rl.agent.episodes.episode_set import EpisodeSet, EpisodeSummary, observation_moments
from ring_rl.agent.episodes.trajectory import Trajectory, merge_held_actions
from ring_rl.typing import Float32, Int, Shaped

__all__ = ["STORE_FOLDER", "EpisodeStore", "StaleStoreError", "StoreIndex", "read_index", "write_index"]

STORE_FOLDER = "store"
_FORMAT = 1
_REMAKE = "remove it, it is made again"


@dataclasses.dataclass(frozen=True, eq=False)
class StoreIndex:
    """What a store knows of its E episodes.

    Attributes:
        names: Of the files they come from.
        signatures: Of the files' content.
        sizes: Of the files, in bytes.
        modified_ns: When the files were last changed; quicker to compare than the content.
        lengths: Control steps.
        held_steps: The largest number of control steps k such that actions change at multiples of k only.
        moments: By stride k: means and summed squared deviations (`observation_moments`) over every k-th state,
            for those k up to 16 that all episodes' actions are held for.
    """

    names: Shaped[np.ndarray, " E"]
    signatures: Shaped[np.ndarray, " E"]
    sizes: Int[np.ndarray, " E"]
    modified_ns: Int[np.ndarray, " E"]
    lengths: Int[np.ndarray, " E"]
    held_steps: Int[np.ndarray, " E"]
    moments: dict[int, tuple[np.ndarray, np.ndarray]]


def write_index(path: Path, index: StoreIndex) -> None:
    """Writes `index.npz`."""
    fields = {field.name: getattr(index, field.name) for field in dataclasses.fields(index) if field.name != "moments"}
    for stride, (means, squares) in index.moments.items():
        fields |= {f"means_{stride}": means, f"squares_{stride}": squares}
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, description=np.array(json.dumps({"format": _FORMAT})), **fields)


def read_index(path: Path) -> StoreIndex:
    """Reads `index.npz`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or of another version.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if json.loads(str(arrays["description"]))["format"] != _FORMAT:
            raise ValueError("it is of another version of ring_rl")
        strides = [int(name.removeprefix("means_")) for name in arrays if name.startswith("means_")]
        moments = {stride: (arrays[f"means_{stride}"], arrays[f"squares_{stride}"]) for stride in strides}
        fields = [field.name for field in dataclasses.fields(StoreIndex) if field.name != "moments"]
        index = StoreIndex(**{name: arrays[name] for name in fields}, moments=moments)
        if any(len(getattr(index, name)) != len(index.names) for name in fields):
            raise ValueError("its parts do not fit together")
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # damaged bytes raise nearly anything: BadZipFile, zlib.error, EOFError, struct.error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the store {path.parent} is damaged ({reason}); {_REMAKE}") from None
    return index


class StaleStoreError(ValueError):
    """A store that was made of other files than the buffer holds now."""


class EpisodeStore:
    """An open store.

    Attributes:
        names: Of the episodes' files.
        signatures: Of their content.
        reward_columns: Rewards a step, one a task.
    """

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        """Opens `folder`, a data set's `store/`, which must have been made of exactly these files.

        Cost: a look at the directory entry of every file; 10,000 take a tenth of a second. Files that were copied
        since are opened to compare their content, 0.1 ms each.

        Raises:
            FileNotFoundError: there is no store.
            StaleStoreError: the files are others than those it was made of.
            ValueError: it is damaged.
        """
        self._index = index = read_index(folder / "index.npz")
        self.names, self.signatures = index.names, index.signatures
        _check_is_of(index, paths, folder)
        ends = np.cumsum(index.lengths)
        self._first_step = ends - index.lengths
        self._first_state = self._first_step + np.arange(len(ends))
        steps, states = int(ends[-1]), int(ends[-1]) + len(ends)
        self._observations = _RowFile(folder / "observations.npy", rows=states, dtype=np.float32)
        self._actions = _RowFile(folder / "actions.npy", rows=steps, dtype=np.float32)
        self._rewards = _RowFile(folder / "rewards.npy", rows=steps, dtype=np.float32)
        self._discounts = _RowFile(folder / "discounts.npy", rows=steps, dtype=np.float32)
        self.reward_columns = self._rewards.row_shape[0]

    def episodes(
        self,
        indices: Int[np.ndarray, " n"],
        rewards: Sequence[Float32[np.ndarray, " L"]] | int,
        *,
        action_repeat: int,
    ) -> EpisodeSet:
        """Some of the episodes, read when they are indexed.

        Args:
            indices: Which, in the order wanted.
            rewards: A column of the stored ones, or one array an episode in the order of `indices`.
            action_repeat: Control steps that make one decision, see `merge_held_actions`.

        Raises:
            ValueError: no such column, or actions not held for `action_repeat` steps.
        """
        if isinstance(rewards, int):
            if not 0 <= rewards < self.reward_columns:
                raise ValueError(
                    f"the store holds {self.reward_columns} reward column(s); reward_column={rewards} must be in "
                    f"0..{self.reward_columns - 1}"
                )
            rewards = self._stored_rewards(indices, rewards)
        if action_repeat != 1:
            self._check_held(indices, action_repeat)
            rewards = [each.reshape(-1, action_repeat).sum(1, dtype=np.float64).astype(np.float32) for each in rewards]
        trajectories = _StoredTrajectories(self, indices, rewards, action_repeat)
        means, squares = self._moments(indices, trajectories, action_repeat)
        summary = EpisodeSummary(
            self._observations.row_shape[0],
            self._actions.row_shape[0],
            self._index.lengths[indices] // action_repeat,
            np.array([each.sum(dtype=np.float64) for each in rewards]),
            means,
            squares,
        )
        return EpisodeSet(trajectories, summary)

    def read(self, index: int, rewards: Float32[np.ndarray, " L"], action_repeat: int) -> Trajectory:
        """One episode, with these rewards of its decisions."""
        length, step = int(self._index.lengths[index]), int(self._first_step[index])
        observations = self._observations.read(int(self._first_state[index]), length + 1)
        actions = self._actions.read(step, length)
        discounts = self._discounts.read(step, length)
        if action_repeat != 1:
            observations = np.ascontiguousarray(observations[::action_repeat])
            actions = np.ascontiguousarray(actions[::action_repeat])
            discounts = discounts.reshape(-1, action_repeat).prod(axis=1)
        return Trajectory(observations, actions, rewards, discounts, physics=None)

    def _stored_rewards(self, indices: Int[np.ndarray, " n"], column: int) -> list[Float32[np.ndarray, " L"]]:
        lengths, steps = self._index.lengths, self._first_step
        return [
            np.ascontiguousarray(self._rewards.read(int(steps[index]), int(lengths[index]))[:, column])
            for index in indices
        ]

    def _check_held(self, indices: Int[np.ndarray, " n"], action_repeat: int) -> None:
        if action_repeat < 1:
            raise ValueError(f"action_repeat must be an integer of at least 1, got {action_repeat!r}")
        wrong = indices[self._index.held_steps[indices] % action_repeat != 0]
        if len(wrong):
            length = int(self._index.lengths[wrong[0]])
            try:
                merge_held_actions(self.read(int(wrong[0]), np.zeros(length, np.float32), 1), action_repeat)
            except ValueError as error:
                raise ValueError(f"{self.names[wrong[0]]}: {error}") from None
            raise ValueError(f"the store disagrees with itself on {self.names[wrong[0]]}; {_REMAKE}")

    def _moments(
        self, indices: Int[np.ndarray, " n"], trajectories: Iterable[Trajectory], stride: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if stride in self._index.moments:
            means, squares = self._index.moments[stride]
            return means[indices], squares[indices]
        pairs = [observation_moments(each.observations) for each in trajectories]
        return np.array([mean for mean, _ in pairs]), np.array([square for _, square in pairs])


class _StoredTrajectories(Sequence[Trajectory]):
    """Episodes of a store with rewards of their own, each read when it is asked for."""

    def __init__(
        self,
        store: EpisodeStore,
        indices: Int[np.ndarray, " n"],
        rewards: Sequence[Float32[np.ndarray, " L"]],
        action_repeat: int,
    ) -> None:
        self._store, self._indices, self._rewards, self._action_repeat = store, indices, rewards, action_repeat

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> _StoredTrajectories: ...
    def __getitem__(self, index: int | slice) -> Trajectory | _StoredTrajectories:
        if isinstance(index, slice):
            return _StoredTrajectories(self._store, self._indices[index], self._rewards[index], self._action_repeat)
        return self._store.read(int(self._indices[index]), self._rewards[index], self._action_repeat)


class _RowFile:
    """Rows of an .npy file, read by number; from any thread, as no position in the file is shared."""

    def __init__(self, path: Path, *, rows: int, dtype: Any) -> None:
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
                shape, fortran, found = read_header[version[0]](file)
                self._data_at, size = file.tell(), os.fstat(file.fileno()).st_size
                if fortran or found != dtype or shape[0] != rows:
                    raise ValueError(f"{path.name} holds {found} of shape {shape} where the index says {rows} rows")
                if size != self._data_at + int(np.prod(shape)) * found.itemsize:
                    raise ValueError(f"{path.name} is cut off")
                descriptor = os.dup(file.fileno())
        except PermissionError:
            raise
        except (OSError, ValueError, KeyError, SyntaxError) as error:  # np.lib.format parses a Python literal
            reason = str(error).splitlines()[0]
            raise ValueError(f"the store {path.parent} is damaged ({reason}); {_REMAKE}") from None
        self._path, self._descriptor, self._dtype, self.row_shape = path, descriptor, dtype, shape[1:]
        self._row_bytes = int(np.prod(self.row_shape)) * found.itemsize
        weakref.finalize(self, os.close, descriptor)

    def read(self, first: int, count: int) -> np.ndarray:
        """Rows first .. first + count - 1, in memory of their own."""
        rows = np.empty((count, *self.row_shape), self._dtype)
        left, at = rows.data.cast("B"), self._data_at + first * self._row_bytes
        while left:
            arrived = os.preadv(self._descriptor, [left], at)
            if arrived == 0:
                raise OSError(f"{self._path} became shorter while it was read; {_REMAKE}")
            left, at = left[arrived:], at + arrived
        return rows


def _check_is_of(index: StoreIndex, paths: Sequence[Path], folder: Path) -> None:
    """Raises StaleStoreError if these are not the files that the store was made of."""
    remedy = f"{_REMAKE}, or set data.store=never"
    names = [path.name for path in paths]
    if names != index.names.tolist():
        new = len(set(names) - set(index.names.tolist()))
        gone = len(set(index.names.tolist()) - set(names))
        raise StaleStoreError(f"the store {folder} is not of these episodes ({new} are new, {gone} are gone); {remedy}")
    for path, size, modified_ns, content in zip(paths, index.sizes, index.modified_ns, index.signatures, strict=True):
        now = path.stat()
        if now.st_size != size or (now.st_mtime_ns != modified_ns and signature(path) != int(content)):
            raise StaleStoreError(f"the store {folder} is not of these episodes ({path.name} changed); {remedy}")

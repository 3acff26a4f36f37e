"""Makes the flat files of `ring_rl.agent.episodes.store` from a buffer of episode files, once."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ring_rl.agent.episodes.derived import exclusive, progress_bar, signature
from ring_rl.agent.episodes.episode_set import observation_moments
from ring_rl.agent.episodes.exorl import list_episodes, read_episode_and_rewards, recorded_length
from ring_rl.agent.episodes.store import STORE_FOLDER, EpisodeStore, StaleStoreError, StoreIndex, write_index
from ring_rl.typing import Float32

__all__ = ["held_steps", "make_store", "open_store"]

# Action repeats beyond this are rare; their moments are computed when they are asked for.
_LARGEST_STRIDE = 16


def open_store(folder: Path) -> EpisodeStore | None:
    """The store of a data set, or None where there is none or the buffer has changed since.

    Raises:
        FileNotFoundError: no data set, or an empty one.
        ValueError: the store is damaged.
    """
    paths = list_episodes(folder / "buffer")
    try:
        return EpisodeStore(folder / STORE_FOLDER, paths)
    except (FileNotFoundError, StaleStoreError):
        return None


def make_store(folder: Path, *, progress: bool) -> EpisodeStore:
    """Opens the store of a data set, and makes it first where there is none of the buffer as it is now.

    It appears when it is complete. What an interrupted call left is removed by the next; a process that comes
    second waits for the first.

    Args:
        folder: The data set's, which holds `buffer/`.
        progress: Whether to show a progress bar with the time left.

    Raises:
        FileNotFoundError: no data set, or an empty one.
        OSError: the folder cannot be written, or the disk is too full.
        ValueError: a bad episode file, episodes whose dimensions differ, or a damaged store.
    """
    store = open_store(folder)
    if store is not None:
        return store
    with exclusive(folder, STORE_FOLDER, remedy="set data.store=never"):
        store = open_store(folder)  # another process may have made it meanwhile
        if store is not None:
            return store
        unfinished, outdated = folder / f".{STORE_FOLDER}.unfinished", folder / f".{STORE_FOLDER}.outdated"
        for left_over in (unfinished, outdated):
            if left_over.exists():
                shutil.rmtree(left_over)
        unfinished.mkdir()
        try:
            _convert(list_episodes(folder / "buffer"), unfinished, progress=progress)
            if (folder / STORE_FOLDER).exists():
                (folder / STORE_FOLDER).rename(outdated)
            unfinished.rename(folder / STORE_FOLDER)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(outdated, ignore_errors=True)
    return EpisodeStore(folder / STORE_FOLDER, list_episodes(folder / "buffer"))


def held_steps(actions: Float32[np.ndarray, "L A"]) -> int:
    """The largest k such that L is a multiple of k and the action changes at multiples of k only."""
    changes = 1 + np.flatnonzero((actions[1:] != actions[:-1]).any(axis=1))
    return int(np.gcd.reduce(np.append(changes, len(actions))))


def _convert(paths: Sequence[Path], folder: Path, *, progress: bool) -> None:
    lengths = np.array([recorded_length(path) for path in paths])
    steps = int(lengths.sum())
    stats = [path.stat() for path in paths]
    contents, held = [], []
    moments: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {stride: [] for stride in range(1, _LARGEST_STRIDE + 1)}
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar(shown=progress))
        job = bar.add_task(f"making {folder.parent.name}/{STORE_FOLDER}", total=len(paths))
        files: dict[str, _RowWriter] = {}
        for path in paths:
            contents.append(signature(path))
            trajectory, rewards = read_episode_and_rewards(path)
            arrays = {
                "observations": trajectory.observations,
                "actions": trajectory.actions,
                "rewards": rewards,
                "discounts": trajectory.discounts,
            }
            if not files:
                _require_space(folder, steps * sum(each.nbytes for each in arrays.values()) / trajectory.length)
                for name, array in arrays.items():
                    rows = steps + (len(paths) if name == "observations" else 0)
                    files[name] = stack.enter_context(_RowWriter(folder / f"{name}.npy", rows, array))
            for name, array in arrays.items():
                files[name].append(array, path)
            held.append(held_steps(trajectory.actions))
            for stride in [stride for stride in moments if held[-1] % stride]:
                del moments[stride]
            for stride, of_episodes in moments.items():
                of_episodes.append(observation_moments(trajectory.observations[::stride]))
            bar.advance(job)
    index = StoreIndex(
        names=np.array([path.name for path in paths]),
        signatures=np.array(contents, dtype=np.uint64),
        sizes=np.array([each.st_size for each in stats]),
        modified_ns=np.array([each.st_mtime_ns for each in stats]),
        lengths=lengths,
        held_steps=np.array(held),
        moments={
            stride: (np.array([mean for mean, _ in pairs]), np.array([squares for _, squares in pairs]))
            for stride, pairs in moments.items()
        },
    )
    write_index(folder / "index.npz", index)


class _RowWriter:
    """Writes an .npy file whose number of rows is known, some rows at a time."""

    def __init__(self, path: Path, rows: int, like: np.ndarray) -> None:
        self._row_shape, self._dtype = like.shape[1:], like.dtype
        self._file = path.open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(like.dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, header | {"shape": (rows, *self._row_shape)})

    def __enter__(self) -> _RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def append(self, rows: np.ndarray, path: Path) -> None:
        if rows.shape[1:] != self._row_shape:
            raise ValueError(
                f"{path}: {Path(self._file.name).stem} of shape {rows.shape[1:]} a step differ from "
                f"{self._row_shape} in the files before; keep one domain in a folder"
            )
        self._file.write(np.ascontiguousarray(rows).data)


def _require_space(folder: Path, needed: float) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the store in {folder.parent} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB left; free "
            "some or set data.store=never",
        )
